//! Two tasks made of the demo's own text, so that `lowbit run demo` has something to judge: which word follows, and which of
//! two words follows, at every place of a paragraph from its ninth word on. Contexts of a paragraph begin alike and are
//! computed once; items of a paragraph form a cluster.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::writer::write_atomic;
use serde_json::json;

use crate::models::{DEMO_TEXT, cache_dir};

/// Task files, with the rows of both beside them.
const TASKS: [(&str, &str); 2] = [
    ("next_word.yaml", include_str!("../assets/demo-text/next_word.yaml")),
    ("which_word.yaml", include_str!("../assets/demo-text/which_word.yaml")),
];

/// Words of a paragraph before its first item.
const BEFORE: usize = 8;

/// One row a place, as JSON Lines.
fn rows() -> String {
    let paragraphs: Vec<Vec<&str>> = DEMO_TEXT.split("\n\n").map(|p| p.split_whitespace().collect()).collect();
    let all: Vec<&str> = paragraphs.iter().flatten().copied().collect();
    let mut out = String::new();
    let mut n = 0;
    for (paragraph, words) in paragraphs.iter().enumerate() {
        for (i, word) in words.iter().enumerate().skip(BEFORE) {
            // Another word from elsewhere: a fixed walk through the text that skips the word itself.
            let other = (1..).map(|k| all[(n * 797 + k * 131) % all.len()]).find(|w| w != word).unwrap_or("the");
            let options = if n % 2 == 0 { [*word, other] } else { [other, *word] };
            let row = json!({
                "paragraph": paragraph.to_string(), "context": words[..i].join(" "), "word": word,
                "options": options, "label": n % 2,
            });
            out += &row.to_string();
            out.push('\n');
            n += 1;
        }
    }
    out
}

/// Paths of the task files, written into the cache once.
pub fn unpacked() -> Result<Vec<PathBuf>> {
    let rows = rows();
    let texts: Vec<&str> = TASKS.iter().map(|t| t.1).chain([rows.as_str()]).collect();
    let id = sha256_hex(texts.concat().as_bytes());
    let dir = cache_dir().join(format!("demo-tasks-{}", id.get(..12).unwrap_or_default()));
    let files = TASKS.iter().copied().chain([("rows.jsonl", rows.as_str())]);
    let write = || -> Result<()> {
        std::fs::create_dir_all(&dir)?;
        for (name, text) in files.filter(|(name, _)| !dir.join(name).exists()) {
            write_atomic(&dir.join(name), text.as_bytes())?;
        }
        Ok(())
    };
    write().with_context(|| {
        format!("cannot write the demo's tasks into {}\nhint: set LOWBIT_CACHE to a writable folder", dir.display())
    })?;
    Ok(TASKS.iter().map(|(name, _)| dir.join(name)).collect())
}
