//! A table that renders in HTML (through the template) and in Markdown.

use serde::Serialize;

use crate::format::NONE;

/// One cell.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Cell {
    text: String,
    title: String,
    code: bool,
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, ..Self::default() }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

/// Text in a fixed-width face, with the full text as a tooltip.
pub(crate) fn code(text: String, title: &str) -> Cell {
    Cell { text, title: title.to_owned(), code: true }
}

#[derive(Clone, Debug, Serialize)]
struct Head {
    text: String,
    num: bool,
}

/// Heads and rows; the first column names the row.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Table {
    caption: String,
    head: Vec<Head>,
    rows: Vec<Vec<Cell>>,
    total: bool,
    wrap: bool,
}

impl Table {
    /// What it holds, and its columns by title; one that starts with `#` holds numbers.
    pub(crate) fn new(caption: &str, columns: &[&str]) -> Self {
        let head = columns
            .iter()
            .map(|c| match c.strip_prefix('#') {
                Some(text) => Head { text: text.to_owned(), num: true },
                None => Head { text: (*c).to_owned(), num: false },
            })
            .collect();
        Self { caption: caption.to_owned(), head, rows: Vec::new(), total: false, wrap: false }
    }

    /// Lets cells break into lines, but not within brackets, for tables of many columns.
    pub(crate) fn wrapping(mut self) -> Self {
        self.wrap = true;
        let heads = self.head.iter_mut().map(|h| &mut h.text);
        for text in heads.chain(self.rows.iter_mut().flatten().map(|c| &mut c.text)) {
            let mut depth = 0usize;
            *text = text
                .chars()
                .map(|c| {
                    match c {
                        '[' => depth += 1,
                        ']' => depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    if c == ' ' && depth > 0 { '\u{a0}' } else { c }
                })
                .collect();
        }
        self
    }

    /// Whether it has no rows.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Without the columns that hold nothing but dashes.
    pub(crate) fn without_empty_columns(mut self) -> Self {
        let used: Vec<bool> = (0..self.head.len())
            .map(|i| self.rows.iter().any(|r| r.get(i).is_some_and(|c| c.text != NONE && !c.text.is_empty())))
            .collect();
        let mut keep = used.iter();
        self.head.retain(|_| *keep.next().unwrap_or(&true));
        for row in &mut self.rows {
            let mut keep = used.iter();
            row.retain(|_| *keep.next().unwrap_or(&true));
        }
        self
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// Adds the last row, a sum.
    pub(crate) fn total(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
        self.total = true;
    }

    /// As a pipe table.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        let heads: Vec<String> = self.head.iter().map(|h| escape(&h.text)).collect();
        let marks: Vec<&str> = self.head.iter().map(|h| if h.num { "---:" } else { "---" }).collect();
        out.push_str(&format!("| {} |\n| {} |\n", heads.join(" | "), marks.join(" | ")));
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().map(|c| if c.code { code_span(&c.text) } else { escape(&c.text) }).collect();
            out.push_str(&format!("| {} |\n", cells.join(" | ")));
        }
        out
    }
}

/// Text that Markdown and the HTML inside it leave alone.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '!' | '~' | '@' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A code span; what would end it or its table cell is replaced.
pub(crate) fn code_span(text: &str) -> String {
    let safe: String = text
        .chars()
        .map(|c| match c {
            '`' => '\'',
            '|' => '¦',
            '<' => '‹',
            '>' => '›',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect();
    if safe.trim().is_empty() { String::new() } else { format!("`{safe}`") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_is_escaped() {
        let mut t = Table::new("c", &["Name", "#Value"]);
        t.row(vec!["a|b<script>".into(), code("x`y|z".to_owned(), "")]);
        let text = t.markdown();
        assert!(text.contains("| --- | ---: |"));
        assert!(text.contains("a\\|b&lt;script&gt;"));
        assert!(text.contains("`x'y¦z`"));
        let mut t = Table::new("c", &["Name", "#Empty", "#Value"]);
        t.row(vec!["a".into(), NONE.into(), "1".into()]);
        t.row(vec!["b c".into(), NONE.into(), "1 [0 – 2]".into()]);
        assert!(t.clone().wrapping().markdown().contains("| b c | – | 1 \\[0\u{a0}–\u{a0}2\\] |"));
        assert!(t.without_empty_columns().markdown().starts_with("| Name | Value |\n"));
    }
}
