//! Jinja as task files write it: strict about undefined names, values printed as Python prints them.

use std::collections::BTreeMap;

use lowbit_checkpoint::chat_template::{indentable, with_stack, writable};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::pattern::Pattern;
use super::python;
use crate::text::is_python_space;

/// What the rendering of one template may do: an instruction costs 1, as do 64 bytes that it makes.
const FUEL: u64 = 2_000_000;

/// The compiled templates of one task, by the key of the task file they stand under.
#[derive(Debug)]
pub struct Templates {
    env: Environment<'static>,
    needs: BTreeMap<String, Vec<String>>,
}

/// Why a template did not render.
#[derive(Debug)]
pub struct RenderError {
    /// Columns the template names, for the caller to find the one that is not there.
    pub names: Vec<String>,
    /// Whether something it names is not there.
    pub undefined: bool,
    /// What went wrong.
    pub problem: String,
}

impl Default for Templates {
    fn default() -> Self {
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_fuel(Some(FUEL));
        let syntax = env.syntax().to_builder().keep_trailing_newline(true).build();
        // Only delimiters can clash, and those are the defaults.
        if let Ok(syntax) = syntax {
            env.set_syntax(syntax);
        }
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_formatter(|out, _, value| {
            writable(value)?;
            let written = match value.as_str() {
                Some(text) => out.write_str(text),
                None => out.write_str(&python::to_str(value)),
            };
            written.map_err(Error::from)
        });
        env.set_unknown_method_callback(method);
        env.add_filter("regex_replace", regex_replace);
        env.add_filter("string", |value: &Value| writable(value).map(|()| python::to_str(value)));
        env.add_filter("trim", |text: &str| python::strip(text).to_owned());
        env.add_filter("capitalize", |text: &str| python::capitalize(text));
        env.add_filter("join", join);
        env.add_filter("tojson", tojson);
        Self { env, needs: BTreeMap::new() }
    }
}

/// `tojson`, of what is not larger than any text.
fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    writable(value)?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    indentable(value, indent.as_ref())?;
    minijinja::filters::tojson(value, indent, options)
}

impl Templates {
    /// Compiles the template under `key`; the error says what is wrong and in which line of it.
    pub fn add(&mut self, key: &str, source: &str) -> Result<(), String> {
        let wrong = |e: Error| {
            let text = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            format!("template does not parse: {text} (line {} of it)", e.line().unwrap_or(1))
        };
        // Jinja reads every kind of line end as \n.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        self.env.add_template_owned(key.to_owned(), source).map_err(wrong)?;
        let template = self.env.get_template(key).map_err(wrong)?;
        let mut names: Vec<String> = template.undeclared_variables(false).into_iter().collect();
        // `range` and its like are no columns.
        names.retain(|n| self.env.globals().all(|(global, _)| global != n));
        names.sort();
        self.needs.insert(key.to_owned(), names);
        Ok(())
    }

    /// The columns that the template under `key` names.
    pub fn names(&self, key: &str) -> &[String] {
        self.needs.get(key).map_or(&[], Vec::as_slice)
    }

    /// Renders with the columns of `row`.
    pub fn render(&self, key: &str, row: &Value) -> Result<String, RenderError> {
        self.env.get_template(key).and_then(|t| with_stack(t.source(), || t.render(row))).map_err(|e| RenderError {
            names: self.names(key).to_vec(),
            undefined: e.kind() == ErrorKind::UndefinedError,
            problem: e.detail().map_or_else(|| e.kind().to_string(), str::to_owned),
        })
    }
}

fn wrong(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

fn regex_replace(text: &str, pattern: &str, with: &str, count: Option<usize>, kwargs: Kwargs) -> Result<String, Error> {
    let count = kwargs.get::<Option<usize>>("count")?.or(count).unwrap_or(0);
    kwargs.assert_all_used()?;
    Pattern::new(pattern).and_then(|p| p.replace(text, with, count)).map_err(wrong)
}

/// `join` with Python's `str` of each item, or of one attribute of it.
fn join(items: &Value, separator: Option<&str>, kwargs: Kwargs) -> Result<String, Error> {
    let attribute: Option<&str> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    writable(items)?;
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(separator.unwrap_or_default());
        }
        match attribute {
            Some(name) => out.push_str(&python::to_str(&item.get_attr(name)?)),
            None => out.push_str(&python::to_str(&item)),
        }
    }
    Ok(out)
}

/// Python's methods of strings and lists; the rest is left to minijinja's own.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.is_undefined() || args.iter().any(Value::is_undefined) {
        return Err(Error::from(ErrorKind::UndefinedError));
    }
    let own = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), name, args)?,
        ValueKind::Seq if name == "index" => {
            let wanted = args.first().ok_or_else(|| wrong("index() needs a value"))?;
            let found = value.try_iter()?.position(|v| v == *wanted);
            Some(Value::from(
                found.ok_or_else(|| wrong(format!("{} is not in {}", python::repr(wanted), python::repr(value))))?,
            ))
        }
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn text_arg<'a>(args: &'a [Value], at: usize, name: &str) -> Result<&'a str, Error> {
    args.get(at).and_then(Value::as_str).ok_or_else(|| wrong(format!("{name}() needs a string")))
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let set = args.first().and_then(Value::as_str);
    let inside = |c: char| set.map_or_else(|| is_python_space(c), |s| s.contains(c));
    Ok(Some(match name {
        "strip" => Value::from(text.trim_matches(inside)),
        "lstrip" => Value::from(text.trim_start_matches(inside)),
        "rstrip" => Value::from(text.trim_end_matches(inside)),
        "capitalize" => Value::from(python::capitalize(text)),
        "removeprefix" => Value::from(text.strip_prefix(text_arg(args, 0, name)?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(text_arg(args, 0, name)?).unwrap_or(text)),
        "index" | "find" => {
            let needle = text_arg(args, 0, name)?;
            match text.find(needle) {
                Some(at) => Value::from(text.get(..at).unwrap_or_default().chars().count()),
                None if name == "find" => Value::from(-1),
                None => return Err(wrong(format!("`{needle}` is not in the text"))),
            }
        }
        "split" | "rsplit" => {
            let limit = args.get(1).and_then(|v| usize::try_from(v.clone()).ok());
            Value::from(split(text, set, limit, name == "rsplit")?)
        }
        "partition" | "rpartition" => {
            let mark = text_arg(args, 0, name)?;
            let cut = if name == "partition" { text.split_once(mark) } else { text.rsplit_once(mark) };
            let parts = match (cut, name) {
                (Some((before, after)), _) => [before, mark, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Value::from(parts.map(str::to_owned).to_vec())
        }
        "zfill" => {
            let width = args.first().and_then(|v| usize::try_from(v.clone()).ok()).unwrap_or(0);
            let (sign, digits) = text.split_at(text.len() - text.trim_start_matches(['+', '-']).len().min(text.len()));
            let missing = width.saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        _ => return Ok(None),
    }))
}

/// `str.split` and `str.rsplit`.
fn split(text: &str, mark: Option<&str>, limit: Option<usize>, right: bool) -> Result<Vec<String>, Error> {
    let limit = limit.map_or(usize::MAX, |n| n.saturating_add(1));
    let own = |parts: Vec<&str>| parts.into_iter().map(str::to_owned).collect();
    match mark {
        Some("") => Err(wrong("split() needs a separator that is not empty")),
        Some(mark) if right => {
            let mut parts: Vec<&str> = text.rsplitn(limit, mark).collect();
            parts.reverse();
            Ok(own(parts))
        }
        Some(mark) => Ok(own(text.splitn(limit, mark).collect())),
        None => {
            let mut parts = Vec::new();
            let mut rest = if right { text.trim_end_matches(is_python_space) } else { python_start(text) };
            while !rest.is_empty() && parts.len() + 1 < limit {
                let cut = if right { rest.rfind(is_python_space) } else { rest.find(is_python_space) };
                let Some(at) = cut else { break };
                let step = rest.get(at..).and_then(|r| r.chars().next()).map_or(1, char::len_utf8);
                let (before, after) = (rest.get(..at).unwrap_or_default(), rest.get(at + step..).unwrap_or_default());
                if right {
                    parts.push(after);
                    rest = before.trim_end_matches(is_python_space);
                } else {
                    parts.push(before);
                    rest = python_start(after);
                }
            }
            if !rest.is_empty() {
                parts.push(if right { python_start(rest) } else { rest });
            }
            if right {
                parts.reverse();
            }
            Ok(own(parts))
        }
    }
}

fn python_start(text: &str) -> &str {
    text.trim_start_matches(is_python_space)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str) -> Result<String, RenderError> {
        let mut t = Templates::default();
        t.add("x", source).unwrap();
        t.render(
            "x",
            &python::value(&json!({"q": " a  b c ", "n": 2, "f": 0.5, "c": {"text": ["x", "it's"], "label": ["A", "B"]}, "k": "B"})),
        )
    }

    #[test]
    fn expressions_of_task_files() {
        for (source, expected) in [
            ("{{c.text}}", r#"['x', "it's"]"#),
            ("{{[k, n, f, true, none]}}", "['B', 2, 0.5, True, None]"),
            ("{{c.label.index(k)}}", "1"),
            ("{{q.strip()}}|{{q.lstrip()}}|\n", "a  b c|a  b c |\n"),
            ("{{q.split(' ')[:-1]|join(' ')}}", " a  b c"),
            (
                "{{q.split()}}{{'a b  c'.split(none, 1)}}{{'a,b,c'.rsplit(',', 1)}}",
                "['a', 'b', 'c']['a', 'b  c']['a,b', 'c']",
            ),
            ("{{' '+q.split(' ')[-1]}}", " "),
            ("{{'x' if z is defined else 'y'}}", "y"),
            ("{{q|regex_replace('\\\\s+', '_')}}", "_a_b_c_"),
            ("{{'abc'.find('c')}}{{'abc'.find('z')}}{{'a-b'.partition('-')}}", "2-1['a', '-', 'b']"),
            ("{{c.text[0].upper()}}{{'%s' % k if false else k}}", "XB"),
            ("{% for t in c.text %}{{loop.index}}. {{t}}\n{% endfor %}", "1. x\n2. it's\n"),
        ] {
            assert_eq!(render(source).unwrap_or_else(|e| panic!("{source}: {}", e.problem)), expected, "{source}");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error_with_names() {
        let e = render("{{q}} {{missing.x}}").unwrap_err();
        assert_eq!((e.names, e.undefined), (vec!["missing".to_owned(), "q".to_owned()], true));
        assert!(render("{{missing}}").unwrap_err().undefined);
        assert!(render("{{c.label.index(missing)}}").unwrap_err().undefined);
        let e = render("{% for i in range(2) %}{{c.label.index(q)}}{% endfor %}").unwrap_err();
        assert_eq!((e.names, e.undefined), (vec!["c".to_owned(), "q".to_owned()], false));
        assert!(render("{{c.label.index('Z')}}").unwrap_err().problem.contains("'Z' is not in ['A', 'B']"));
        assert!(Templates::default().add("x", "{{ a").unwrap_err().contains("line 1"));
    }
}
