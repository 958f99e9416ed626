//! Text as Python writes and reads it: `str`, `repr`, `ast.literal_eval`, and the string methods task files use.
//!
//! A task's choices are often a template that prints a list, which is then read back as Python literals. Printing and
//! reading therefore follow Python's rules (language reference, section 2.4), not Jinja's or JSON's.

use minijinja::value::{Value, ValueKind};
use serde_json::Value as Json;

use crate::text::is_python_space;

/// `str.strip`, `lstrip` and `rstrip` without arguments.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

/// `str.isdigit` for the digits `int` accepts in a literal: ASCII, at least one.
pub fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Whether the first character is white space.
pub fn starts_with_space(text: &str) -> bool {
    text.chars().next().is_some_and(is_python_space)
}

/// Whether the last character is white space.
pub fn ends_with_space(text: &str) -> bool {
    text.chars().next_back().is_some_and(is_python_space)
}

/// `str.capitalize`: the first character in title case, all others in lower case.
pub fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    let mut upper = first.to_uppercase();
    // A character that becomes several (ß) has only the first of them in upper case.
    let mut out: String = upper.next().into_iter().collect();
    out.extend(upper.flat_map(char::to_lowercase));
    out.push_str(&chars.as_str().to_lowercase());
    out
}

/// `str(x)`: strings as they are, all else as [`repr`].
pub fn to_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

/// `repr(x)`.
pub fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => match i128::try_from(value.clone()) {
            Ok(whole) if value.is_integer() => whole.to_string(),
            _ => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float),
        },
        ValueKind::String => quote(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(|v| repr(&v)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            let items: Vec<String> = value.try_iter().into_iter().flatten().map(pair).collect();
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    }
}

/// A JSON value as a template sees it.
pub fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(map) => columns(map),
    }
}

/// The columns of a row as a template sees them.
pub fn columns(row: &serde_json::Map<String, Json>) -> Value {
    Value::from_pairs(row.iter().map(|(k, v)| (k.as_str(), value(v))))
}

/// `str(x)` of a JSON value.
pub fn json_to_str(json: &Json) -> String {
    match json {
        Json::String(text) => text.clone(),
        other => repr(&value(other)),
    }
}

/// `repr` of a float: the shortest digits that read back, with an exponent outside 1e-4 to 1e16.
pub fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, size) = match exponent.strip_prefix('-') {
            Some(size) => ('-', size),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{size:0>2}");
    }
    let text = format!("{x}");
    if text.contains('.') { text } else { text + ".0" }
}

fn quote(text: &str) -> String {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) || c as u32 == 0xad => {
                out.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push(mark);
    out
}

/// `ast.literal_eval` for strings, numbers, booleans, `None`, lists, tuples (as lists) and dictionaries with string keys.
pub fn literal_eval(text: &str) -> Result<Json, String> {
    let mut reader = Reader { text, at: 0 };
    // Leading blanks are what Python allows before an expression.
    reader.at = text.len() - text.trim_start_matches([' ', '\t']).len();
    let value = reader.value(0)?;
    reader.blanks();
    if reader.at < text.len() {
        return Err(reader.fail("the end"));
    }
    Ok(value)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

/// Nesting beyond this is refused.
const DEPTH: usize = 64;

impl Reader<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn blanks(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
    }

    fn take(&mut self, mark: &str) -> bool {
        let found = self.rest().starts_with(mark);
        if found {
            self.at += mark.len();
        }
        found
    }

    fn fail(&self, expected: &str) -> String {
        let found: String = self.rest().chars().take(12).collect();
        match found.is_empty() {
            true => format!("not a Python literal: expected {expected}, found the end"),
            false => format!("not a Python literal: expected {expected}, found `{found}` at byte {}", self.at),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Json, String> {
        if depth > DEPTH {
            return Err("not a Python literal: nested too deeply".into());
        }
        self.blanks();
        match self.peek() {
            Some('[') => self.list(']', depth),
            Some('(') => self.list(')', depth),
            Some('{') => self.dictionary(depth),
            Some('\'' | '"') => self.strings(),
            Some(c) if c.is_ascii_digit() || "+-.".contains(c) => self.number(),
            Some(_) => {
                for (word, value) in [("True", Json::Bool(true)), ("False", Json::Bool(false)), ("None", Json::Null)] {
                    let follows = |t: &str| t.chars().nth(word.len()).is_none_or(|c| !c.is_alphanumeric() && c != '_');
                    if self.rest().starts_with(word) && follows(self.rest()) {
                        self.at += word.len();
                        return Ok(value);
                    }
                }
                Err(self.fail("a string, a number or a list"))
            }
            None => Err(self.fail("a value")),
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Result<Json, String> {
        self.at += 1;
        let mut items = Vec::new();
        let mut comma = false;
        loop {
            self.blanks();
            if self.peek() == Some(close) {
                self.at += 1;
                // One value in parentheses is that value.
                return match (close, comma, items.len()) {
                    (')', false, 1) => Ok(items.remove(0)),
                    _ => Ok(Json::Array(items)),
                };
            }
            if !items.is_empty() && !comma {
                return Err(self.fail("`,`"));
            }
            items.push(self.value(depth + 1)?);
            self.blanks();
            comma = self.take(",");
        }
    }

    fn dictionary(&mut self, depth: usize) -> Result<Json, String> {
        self.at += 1;
        let mut map = serde_json::Map::new();
        let mut comma = true;
        loop {
            self.blanks();
            if self.take("}") {
                return Ok(Json::Object(map));
            }
            if !comma {
                return Err(self.fail("`,`"));
            }
            let key = self.value(depth + 1)?;
            self.blanks();
            if !self.take(":") {
                return Err(self.fail("`:`"));
            }
            map.insert(json_to_str(&key), self.value(depth + 1)?);
            self.blanks();
            comma = self.take(",");
        }
    }

    /// One string or several in a row, which Python joins.
    fn strings(&mut self) -> Result<Json, String> {
        let mut out = String::new();
        while let Some(mark @ ('\'' | '"')) = self.peek() {
            let triple: String = std::iter::repeat_n(mark, 3).collect();
            let long = self.take(&triple);
            if !long {
                self.at += 1;
            }
            loop {
                if long && self.take(&triple) {
                    break;
                }
                let Some(c) = self.peek() else { return Err(self.fail("the end of a string")) };
                self.at += c.len_utf8();
                match c {
                    '\\' => self.escape(&mut out)?,
                    '\n' if !long => return Err("not a Python literal: a line break in a string".into()),
                    c if c == mark && !long => break,
                    c => out.push(c),
                }
            }
            self.blanks();
        }
        Ok(Json::String(out))
    }

    fn escape(&mut self, out: &mut String) -> Result<(), String> {
        let Some(c) = self.peek() else { return Err(self.fail("an escape")) };
        self.at += c.len_utf8();
        let digits = match c {
            'n' => return self.push(out, '\n'),
            't' => return self.push(out, '\t'),
            'r' => return self.push(out, '\r'),
            'a' => return self.push(out, '\x07'),
            'b' => return self.push(out, '\x08'),
            'f' => return self.push(out, '\x0c'),
            'v' => return self.push(out, '\x0b'),
            '\n' => return Ok(()),
            '\\' | '\'' | '"' => return self.push(out, c),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            '0'..='7' => {
                let octal: String = self.rest().chars().take(2).take_while(|c| ('0'..='7').contains(c)).collect();
                self.at += octal.len();
                let code = u32::from_str_radix(&format!("{c}{octal}"), 8).unwrap_or(0);
                return self.push(out, char::from_u32(code).unwrap_or('\u{fffd}'));
            }
            // Python keeps an unknown escape as it stands.
            other => {
                out.push('\\');
                return self.push(out, other);
            }
        };
        let code = self.rest().get(..digits).and_then(|h| u32::from_str_radix(h, 16).ok()).and_then(char::from_u32);
        let Some(code) = code else { return Err(self.fail("hexadecimal digits")) };
        self.at += digits;
        self.push(out, code)
    }

    fn push(&self, out: &mut String, c: char) -> Result<(), String> {
        out.push(c);
        Ok(())
    }

    fn number(&mut self) -> Result<Json, String> {
        let rest = self.rest();
        let end = rest
            .char_indices()
            .find(|(i, c)| {
                let sign = "+-".contains(*c) && (*i == 0 || rest[..*i].ends_with(['e', 'E']));
                !(c.is_ascii_digit() || "._eE".contains(*c) || sign)
            })
            .map_or(rest.len(), |(i, _)| i);
        let digits = rest.get(..end).unwrap_or_default().replace('_', "");
        let plain = digits.trim_start_matches(['+', '-']);
        // Python refuses 007.
        let padded = plain.len() > 1 && plain.starts_with('0') && is_digits(plain) && plain.bytes().any(|b| b != b'0');
        let value = match digits.trim_start_matches('+').parse::<i64>() {
            Ok(whole) if !padded => Some(Json::from(whole)),
            Ok(_) => None,
            Err(_) => digits.parse::<f64>().ok().filter(|x| x.is_finite()).map(Json::from),
        };
        let Some(value) = value else { return Err(self.fail("a number")) };
        self.at += end;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn printed_lists_read_back() {
        for list in [
            json!(["it's", "say \"x\"", "both ' and \"", "tab\tline\nback\\slash", "é\u{a0}\u{7f}ü", ""]),
            json!([1, -2, 2.5, 1e-7, 1e22, true, null, {"a": [1], "b": "c"}]),
            json!([]),
        ] {
            let text = repr(&value(&list));
            assert_eq!(literal_eval(&text).unwrap(), list, "{text}");
        }
        assert_eq!(repr(&value(&json!(["a", "b'c", 1.0, true]))), "['a', \"b'c\", 1.0, True]");
        assert_eq!([float(1e16), float(1.5e-5), float(0.0001), float(-2.0)], ["1e+16", "1.5e-05", "0.0001", "-2.0"]);
    }

    #[test]
    fn literals_follow_python() {
        assert_eq!(
            literal_eval(r#"["a" 'b', (1,), (2), "\x41\u00e9\101\q"]"#).unwrap(),
            json!(["ab", [1], 2, "AéA\\q"])
        );
        assert_eq!(literal_eval("['''a\nb''',]").unwrap(), json!(["a\nb"]));
        for bad in ["[1 2]", "['a", "007", "name", "[1,,2]", "'a\nb'", "", "[1] x", "{1}"] {
            assert!(literal_eval(bad).is_err(), "{bad:?}");
        }
        assert!(literal_eval(&"[".repeat(100)).unwrap_err().contains("deeply"));
    }

    #[test]
    fn case_and_blanks() {
        assert_eq!(capitalize("hELLO Wörld É"), "Hello wörld é");
        assert_eq!(capitalize("ßa"), "Ssa");
        assert_eq!(capitalize(""), "");
        assert_eq!(strip("\u{1f} \u{a0}a b\n"), "a b");
        assert!(is_digits("012") && !is_digits("") && !is_digits("1a") && !is_digits("-1"));
    }
}
