//! Tokens to text as they come: whole characters only, stop strings found across token borders.

use std::sync::Arc;

use lowbit_checkpoint::tokenizer::Tokenizer;

use crate::error::Result;

/// Tokens before the first new one that its text may depend on.
const CONTEXT: usize = 4;

/// The text of one generation.
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    ids: Vec<u32>,
    /// `ids[from..shown]` are whole characters already given out, `ids[shown..]` is not.
    from: usize,
    shown: usize,
    stops: Vec<String>,
    /// Text that may turn out to be the start of a stop string.
    held: String,
}

/// What a token added.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is certain.
    pub text: String,
    /// A stop string was completed; it and what follows are not part of the text.
    pub stopped: bool,
}

impl TextStream {
    /// After `prompt`, whose last tokens decide about leading spaces.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], stops: Vec<String>, skip_special: bool) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        let shown = ids.len();
        let stops = stops.into_iter().filter(|s| !s.is_empty()).collect();
        Self { tokenizer, skip_special, ids, from: 0, shown, stops, held: String::new() }
    }

    /// Takes a token.
    pub fn push(&mut self, id: u32) -> Result<Piece> {
        self.ids.push(id);
        let old = self.tokenizer.decode(&self.ids[self.from..self.shown], self.skip_special)?;
        let new = self.tokenizer.decode(&self.ids[self.from..], self.skip_special)?;
        if new.ends_with('\u{fffd}') || new.len() < old.len() {
            return Ok(Piece::default());
        }
        let fresh = new.get(old.len()..).unwrap_or_default().to_string();
        self.from = self.shown;
        self.shown = self.ids.len();
        Ok(self.take(&fresh))
    }

    /// The rest, when no token follows: characters that stayed incomplete become U+FFFD.
    pub fn finish(&mut self) -> Result<String> {
        let old = self.tokenizer.decode(&self.ids[self.from..self.shown], self.skip_special)?;
        let new = self.tokenizer.decode(&self.ids[self.from..], self.skip_special)?;
        let mut text = std::mem::take(&mut self.held);
        text.push_str(new.get(old.len()..).unwrap_or_default());
        self.from = self.ids.len();
        self.shown = self.ids.len();
        Ok(text)
    }

    fn take(&mut self, fresh: &str) -> Piece {
        self.held.push_str(fresh);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            let text = self.held[..at].to_string();
            self.held.clear();
            return Piece { text, stopped: true };
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }
}

/// Length of the longest end of `text` that begins `stop` and is not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(i, _)| i).skip(1);
    ends.filter(|n| text.ends_with(&stop[..*n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_that_may_become_a_stop_are_held_back() {
        assert_eq!(overlap("abc##", "###"), 2);
        assert_eq!(overlap("abc", "###"), 0);
        assert_eq!(overlap("aé", "éx"), 2);
        assert_eq!(overlap("###", "###"), 2);
    }
}
