//! Regular expressions of Python's `re`, on the fancy-regex engine.
//!
//! Differences that change what a task's filter finds are translated: `$` also matches before a last line break, `\Z`
//! is the end, `\s` knows the four ASCII separators, a `{` that opens no repetition is a character, and inside a set
//! `[`, `&&`, `~~` and `--` mean themselves.

use fancy_regex::Regex;

/// A compiled pattern of Python's.
#[derive(Debug)]
pub struct Pattern {
    regex: Regex,
    groups: usize,
}

impl Pattern {
    /// Compiles; the error says why not.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let regex = Regex::new(&translate(pattern)).map_err(|e| format!("`{pattern}` is not a pattern: {e}"))?;
        let groups = regex.captures_len() - 1;
        Ok(Self { regex, groups })
    }

    /// `re.findall`, with a match of several groups reduced to its groups: one string without groups or with one, all
    /// of them otherwise. A search that gives up (too much backtracking) ends the list.
    pub fn find_all(&self, text: &str) -> Vec<Vec<String>> {
        let mut out = Vec::new();
        for found in self.regex.captures_iter(text) {
            let Ok(found) = found else { break };
            let group = |i: usize| found.get(i).map_or(String::new(), |m| m.as_str().to_owned());
            out.push(match self.groups {
                0 => vec![group(0)],
                n => (1..=n).map(group).collect(),
            });
        }
        out
    }

    /// Whether it matches anywhere (`re.search`).
    pub fn found_in(&self, text: &str) -> bool {
        self.regex.is_match(text).unwrap_or(false)
    }

    /// `re.sub` with nothing.
    pub fn remove_from(&self, text: &str) -> String {
        self.regex.try_replacen(text, 0, fancy_regex::NoExpand("")).map_or_else(|_| text.to_owned(), |t| t.into_owned())
    }

    /// `re.sub` with `\1`, `\g<name>` in the replacement, all matches or the first `count`.
    pub fn replace(&self, text: &str, with: &str, count: usize) -> Result<String, String> {
        let template = replacement(with);
        self.regex.try_replacen(text, count, template.as_str()).map(|t| t.into_owned()).map_err(|e| e.to_string())
    }
}

/// Python's replacement text in this engine's notation.
fn replacement(with: &str) -> String {
    let mut out = String::new();
    let mut chars = with.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.next() {
                Some(d @ '0'..='9') => {
                    let mut number = d.to_string();
                    if let Some(d @ '0'..='9') = chars.peek().copied() {
                        number.push(d);
                        chars.next();
                    }
                    out.push_str(&format!("${{{number}}}"));
                }
                Some('g') => {
                    let name: String = chars.by_ref().skip(1).take_while(|c| *c != '>').collect();
                    out.push_str(&format!("${{{name}}}"));
                }
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some('r') => out.push('\r'),
                Some('\\') => out.push('\\'),
                Some(other) => {
                    out.push('\\');
                    out.push(other);
                }
                None => out.push('\\'),
            },
            c => out.push(c),
        }
    }
    out
}

const SPACES: &str = r"\s\x1c-\x1f";

fn translate(pattern: &str) -> String {
    let chars: Vec<char> = pattern.chars().collect();
    let at = |i: usize| chars.get(i).copied();
    // Flags stand at the start in Python 3.11 and later.
    let multiline =
        pattern.starts_with("(?") && pattern[2..].chars().take_while(char::is_ascii_alphabetic).any(|c| c == 'm');
    let mut out = String::new();
    let mut i = 0;
    let mut set = false;
    let mut set_start = 0;
    while let Some(c) = at(i) {
        i += 1;
        if c == '\\' {
            let next = at(i);
            i += 1;
            match next {
                Some('s') if set => out.push_str(SPACES),
                Some('s') => out.push_str(&format!("[{SPACES}]")),
                Some('S') if !set => out.push_str(&format!("[^{SPACES}]")),
                Some('Z') if !set => out.push_str(r"\z"),
                Some(other) if "\"'%,/:;=@`!<>".contains(other) => out.push(other),
                Some(other) => {
                    out.push('\\');
                    out.push(other);
                }
                None => out.push('\\'),
            }
        } else if set {
            match c {
                ']' if i - 1 > set_start => {
                    set = false;
                    out.push(']');
                }
                ']' | '[' | '&' | '~' => {
                    out.push('\\');
                    out.push(c);
                }
                '-' if at(i) == Some('-') => out.push_str(r"\-"),
                c => out.push(c),
            }
        } else {
            match c {
                '[' => {
                    set = true;
                    out.push('[');
                    if at(i) == Some('^') {
                        out.push('^');
                        i += 1;
                    }
                    set_start = i;
                }
                '$' if !multiline => out.push_str(r"(?=\n?\z)"),
                '{' => {
                    let body: String = chars[i..].iter().take_while(|c| **c != '}').collect();
                    let closed = at(i + body.chars().count()) == Some('}');
                    let counted = body.chars().all(|c| c.is_ascii_digit() || c == ',') && body.matches(',').count() < 2;
                    let repeats = closed && counted && body.chars().any(|c| c.is_ascii_digit());
                    if !repeats {
                        out.push_str(r"\{");
                    } else if body.starts_with(',') {
                        out.push_str("{0");
                    } else {
                        out.push('{');
                    }
                }
                '}' if !out_opens(&out) => out.push_str(r"\}"),
                c => out.push(c),
            }
        }
    }
    out
}

/// Whether the text written so far ends in an open repetition.
fn out_opens(out: &str) -> bool {
    let tail = out.trim_end_matches(|c: char| c.is_ascii_digit() || c == ',');
    tail.len() < out.len() && tail.ends_with('{') && !tail.ends_with(r"\{")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pattern: &str, text: &str) -> Vec<Vec<String>> {
        Pattern::new(pattern).unwrap().find_all(text)
    }

    #[test]
    fn findall_gives_groups() {
        assert_eq!(all(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "a 12,5 b 7"), [["12,5", ""], ["", "7"]]);
        assert_eq!(all(r"#### (\-?[0-9\.\,]+)", "x\n#### 1,234."), [["1,234."]]);
        assert_eq!(all("a+", "aab a"), [["aa"], ["a"]]);
        assert_eq!(all(r"(?<=\()[A-D](?=\))", "(B) or C"), [["B"]]);
    }

    #[test]
    fn python_reading_of_a_pattern() {
        assert_eq!(Pattern::new(r"\.$").unwrap().remove_from("5.\n"), "5\n");
        assert_eq!(Pattern::new(r"(?s).*#### ").unwrap().remove_from("a\nb\n#### 5"), "5");
        assert_eq!(all(r"[[a]+", "[a["), [["[a["]]);
        assert_eq!(all(r"[]x]", "]x"), [["]"], ["x"]]);
        assert_eq!(all(r"{x}", "{x}"), [["{x}"]]);
        assert_eq!(all(r"a{2}", "aaa"), [["aa"]]);
        assert_eq!(all(r"a{,2}b", "aab"), [["aab"]]);
        assert_eq!(all(r"a\sb", "a\u{1f}b").len(), 1);
        assert_eq!(all(r"(?m)a$", "a\na").len(), 2);
        assert_eq!(all(r"a\Z", "a\n").len(), 0);
        assert_eq!(all(r"(\w)\1", "xaab"), [["a"]]);
        assert!(Pattern::new("(").is_err());
    }

    #[test]
    fn replacements_know_groups() {
        let swap = Pattern::new(r"(?P<a>\w+) (\w+)").unwrap();
        assert_eq!(swap.replace("one two $5", r"\2 \g<a> $1", 0).unwrap(), "two one $1 $5");
        assert_eq!(Pattern::new("a").unwrap().replace("aaa", "b", 1).unwrap(), "baa");
    }
}
