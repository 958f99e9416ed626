//! A table that renders in HTML (through the template) and in Markdown.

use serde::Serialize;

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
    head: Vec<Head>,
    rows: Vec<Vec<Cell>>,
    total: bool,
}

impl Table {
    /// Columns by title; one that starts with `#` holds numbers.
    pub(crate) fn new(columns: &[&str]) -> Self {
        let head = columns
            .iter()
            .map(|c| match c.strip_prefix('#') {
                Some(text) => Head { text: text.to_owned(), num: true },
                None => Head { text: (*c).to_owned(), num: false },
            })
            .collect();
        Self { head, rows: Vec::new(), total: false }
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
        let mut t = Table::new(&["Name", "#Value"]);
        t.row(vec!["a|b<script>".into(), code("x`y|z".to_owned(), "")]);
        let text = t.markdown();
        assert!(text.contains("| --- | ---: |"));
        assert!(text.contains("a\\|b&lt;script&gt;"));
        assert!(text.contains("`x'y¦z`"));
    }
}
