//! Texts to score: files, their hash, and lm-eval's treatment of WikiText pages.

use std::borrow::Cow;
use std::path::Path;
use std::sync::LazyLock;

use lowbit_checkpoint::hash::sha256_hex;
use regex::{Captures, NoExpand, Regex};

use crate::error::{EvalError, Result};

/// A text and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// File name as given.
    pub name: String,
    /// SHA-256 of the file's bytes.
    pub sha256: String,
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// One running text.
    Text(String),
    /// Rows of one running text, to be joined by a blank line.
    Rows(Vec<String>),
    /// Documents scored one by one.
    Pages(Vec<String>),
}

impl Source {
    /// Reads `.raw` and `.txt` whole, and `.jsonl` by lines, whose first decides between `page` and `text`.
    pub fn read(path: &Path) -> Result<Self> {
        let lines = match path.extension().and_then(|e| e.to_str()) {
            Some("raw" | "txt") => false,
            Some("jsonl") => true,
            _ => return Err(EvalError::UnknownExtension(path.to_owned())),
        };
        let bytes =
            lowbit_checkpoint::files::read(path).map_err(|source| EvalError::Read { path: path.to_owned(), source })?;
        let sha256 = sha256_hex(&bytes);
        let text = String::from_utf8(bytes)
            .map_err(|e| EvalError::NotUtf8 { path: path.to_owned(), offset: e.utf8_error().valid_up_to() })?;
        let content = if lines { parse_lines(path, &text)? } else { Content::Text(text) };
        Ok(Self { name: path.display().to_string(), sha256, content })
    }

    /// A running text that is not in a file.
    pub fn from_text(name: &str, text: String) -> Self {
        Self { name: name.to_owned(), sha256: sha256_hex(text.as_bytes()), content: Content::Text(text) }
    }

    /// Pages that are not in a file; the hash is that of their concatenation.
    pub fn from_pages(name: &str, pages: Vec<String>) -> Self {
        Self { name: name.to_owned(), sha256: sha256_hex(pages.concat().as_bytes()), content: Content::Pages(pages) }
    }

    /// The running text; rows are joined by `\n\n`.
    pub fn text(&self) -> Result<Cow<'_, str>> {
        match &self.content {
            Content::Text(text) => Ok(Cow::Borrowed(text)),
            Content::Rows(rows) => Ok(Cow::Owned(rows.join("\n\n"))),
            Content::Pages(_) => Err(EvalError::OnlyPages(self.name.clone())),
        }
    }

    /// The pages.
    pub fn pages(&self) -> Result<&[String]> {
        match &self.content {
            Content::Pages(pages) => Ok(pages),
            _ => Err(EvalError::NoPages(self.name.clone())),
        }
    }
}

fn parse_lines(path: &Path, text: &str) -> Result<Content> {
    let mut field = None;
    let mut values = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line_number = index + 1;
        let mut row: serde_json::Value = serde_json::from_str(line).map_err(|source| EvalError::Json {
            path: path.to_owned(),
            line: line_number,
            source,
        })?;
        let name = *field.get_or_insert(if row.get("page").is_some() { "page" } else { "text" });
        match row.get_mut(name).map(serde_json::Value::take) {
            Some(serde_json::Value::String(value)) => values.push(value),
            _ => {
                return Err(EvalError::MissingField { path: path.to_owned(), line: line_number, field: name });
            }
        }
    }
    Ok(match field {
        Some("page") => Content::Pages(values),
        _ => Content::Rows(values),
    })
}

/// Python's `\s` on text: Unicode white space and the four separators 1C to 1F.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Pieces between runs of white space, as lm-eval counts words: a blank edge counts as one more, an empty page as one.
pub fn word_count(page: &str) -> usize {
    let mut runs = 0;
    let mut inside = false;
    for c in page.chars() {
        let space = is_python_space(c);
        runs += usize::from(space && !inside);
        inside = space;
    }
    runs + 1
}

/// Opening and closing character of what loses the blanks at its inner edges.
const PAIRS: [(char, char); 5] = [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')];

/// The pairs as patterns; one that did not compile would be missing, which a test rules out.
static INNER_BLANKS: LazyLock<Vec<(char, char, Regex)>> = LazyLock::new(|| {
    PAIRS
        .iter()
        .filter_map(|&(open, close)| {
            let blank = r"[\s\x1c-\x1f]*";
            let pattern = format!(r"\{open}{blank}([^\{close}]*?){blank}\{close}");
            Regex::new(&pattern).ok().map(|r| (open, close, r))
        })
        .collect()
});

static SLASHED_DIGIT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("/' [0-9]/").ok());

/// lm-eval's WikiText clean-up, step by step in its order.
pub fn detokenize_wikitext(page: &str) -> String {
    let mut text = page.replace("s '", "s'");
    // Meant to join "' 9"; as written it needs slashes in the text and then writes its own pattern into it.
    if let Some(pattern) = SLASHED_DIGIT.as_ref() {
        text = pattern.replace_all(&text, NoExpand("/'[0-9]/")).into_owned();
    }
    for mark in ['-', ',', '.'] {
        text = text.replace(&format!(" @{mark}@ "), &mark.to_string());
    }
    for mark in [':', ';', '.', '!', '?', ','] {
        text = text.replace(&format!(" {mark} "), &format!("{mark} "));
    }
    for (open, close, pattern) in INNER_BLANKS.iter() {
        let tighten = |found: &Captures<'_>| format!("{open}{}{close}", &found[1]);
        text = pattern.replace_all(&text, tighten).into_owned();
    }
    for (from, to) in [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ] {
        text = text.replace(from, to);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_like_python_split() {
        for (page, words) in [("", 1), ("a", 1), ("a b", 2), (" a  b\n", 4), (" ", 2), ("a\x1fb\u{a0}c", 3)] {
            assert_eq!(word_count(page), words, "{page:?}");
        }
    }

    #[test]
    fn wikitext_is_cleaned_like_lm_eval() {
        assert_eq!(INNER_BLANKS.len(), PAIRS.len());
        assert!(SLASHED_DIGIT.is_some());
        for (page, expected) in [
            (" = = Career = = \n ", " == Career ==\n"),
            ("a guest @-@ starring role , 1 @,@ 000 ( or so ) .", "a guest-starring role, 1,000 (or so) ."),
            ("Teddy 's and the boys ' game : 3 ; 4", "Teddy's and the boys' game: 3; 4"),
            ("said \" well , yes \" to [ him ]", "said \"well, yes\" to [him]"),
            ("(\x1cx )", "(x)"),
            ("/' 5/ and 5", "/'[0-9]/ and 5"),
            ("90 \u{b0} N of { it }", "90\u{b0}N of {it}"),
        ] {
            assert_eq!(detokenize_wikitext(page), expected);
        }
    }

    #[test]
    fn files_are_read_by_kind() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let raw = Source::read(&file("a.raw", "one\n")).unwrap();
        assert_eq!(raw.text().unwrap(), "one\n");
        assert_eq!(raw.sha256, "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806");
        assert!(matches!(raw.pages(), Err(EvalError::NoPages(_))));
        let rows = Source::read(&file("b.jsonl", "{\"text\":\"a\"}\n\n{\"text\":\"b\"}\n")).unwrap();
        assert_eq!(rows.text().unwrap(), "a\n\nb");
        let pages = Source::read(&file("c.jsonl", "{\"page\":\"a\"}\n{\"page\":\"b\"}")).unwrap();
        assert_eq!(pages.pages().unwrap(), ["a", "b"]);
        assert!(matches!(pages.text(), Err(EvalError::OnlyPages(_))));
        let r = Source::read(&file("d.jsonl", "{\"text\":\"a\"}\n{\"page\":\"b\"}"));
        assert!(matches!(r, Err(EvalError::MissingField { line: 2, field: "text", .. })));
        let r = Source::read(&file("e.jsonl", "nonsense"));
        assert!(matches!(r, Err(EvalError::Json { line: 1, .. })));
        let r = Source::read(&file("f.parquet", ""));
        assert!(matches!(r, Err(EvalError::UnknownExtension(_))));
        assert!(matches!(Source::read(&dir.path().join("no.txt")), Err(EvalError::Read { .. })));
    }
}
