//! Structured output: which tokens a grammar allows next (llguidance).

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use lowbit_checkpoint::tokenizer::Tokenizer;
use serde_json::Value;
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::error::{Result, ServeError};

/// What the text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// An instance of a JSON schema.
    Schema(Value),
    /// All of it matches a regular expression.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Grammar(String),
}

/// Makes guides for one tokenizer.
pub struct Guides {
    factory: ParserFactory,
    eos: Vec<u32>,
}

/// The state of one text.
pub struct Guide {
    matcher: Matcher,
    eos: Vec<u32>,
}

impl Guides {
    /// Reads the vocabulary of a model with `vocab` logits.
    pub fn new(tokenizer: &Tokenizer, vocab: usize) -> Result<Self> {
        let words: Vec<Vec<u8>> = (0..vocab as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                // toktrie's mark of tokens that no text spells.
                if tokenizer.is_special(id) {
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat()
                } else {
                    bytes
                }
            })
            .collect();
        let eos = tokenizer.eos_ids().to_vec();
        let first = eos.first().copied().unwrap_or(vocab as u32 - 1);
        let trie = TokTrie::from(&TokRxInfo::new(vocab as u32, first), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&env).map_err(|e| ServeError::Options(format!("structured output: {e}")))?;
        factory.quiet();
        Ok(Self { factory, eos })
    }

    /// A guide for `form`, or why it is not a form.
    pub fn guide(&self, form: &Form) -> Result<Guide> {
        let grammar = match form {
            Form::Schema(schema) => TopLevelGrammar::from_json_schema(compact(schema)),
            Form::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Form::Choice(list) => {
                let quoted: Vec<String> = list.iter().map(|c| Value::String(c.clone()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            Form::Grammar(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let wrong = |e: String| ServeError::Request(format!("structured output: {e}"));
        let parser = self.factory.create_parser(grammar).map_err(|e| wrong(e.to_string()))?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(e) => Err(wrong(e)),
            None => Ok(Guide { matcher, eos: self.eos.clone() }),
        }
    }
}

/// The schema for JSON without white space between its parts: a small model may otherwise write nothing but spaces.
fn compact(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(map) = schema.as_object_mut() {
        map.entry("x-guidance").or_insert(serde_json::json!({"whitespace_flexible": false}));
    }
    schema
}

impl Guide {
    /// Sets the logits of tokens that may not come next to −∞.
    pub fn apply(&mut self, logits: &mut [f32]) -> Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| ServeError::Request(e.to_string()))?;
        // The end is allowed by any of the model's tokens for it.
        let end = self.eos.first().is_some_and(|e| mask.is_allowed(*e));
        for (id, l) in logits.iter_mut().enumerate() {
            let id = id as u32;
            let allowed = mask.is_allowed(id) || (end && self.eos.contains(&id));
            if !allowed {
                *l = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the token that was chosen.
    pub fn accept(&mut self, id: u32) -> Result<()> {
        if self.eos.contains(&id) {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|e| ServeError::Request(e.to_string()))
    }

    /// Nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}
