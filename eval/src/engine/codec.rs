//! Requests to tokens, by the rules of lm-evaluation-harness 0.4.13 (`api/model.py`, `models/huggingface.py`,
//! `utils.py`): which tokens a model reads, and which of its rows answer the request.

use lowbit_checkpoint::tokenizer::Tokenizer;

use crate::encode::Encode;
use crate::error::{EvalError, Result};
use crate::tasks::{Request, RequestKind};
use crate::windows::rolling;

/// What the engine asks of a tokenizer.
pub trait Codec: Encode + Sync {
    /// Tokens that end a text, the preferred one first.
    fn eos_ids(&self) -> &[u32];

    /// Text of tokens; with `skip_special`, special tokens leave no trace.
    fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String>;
}

impl Codec for Tokenizer {
    fn eos_ids(&self) -> &[u32] {
        Tokenizer::eos_ids(self)
    }

    fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        Ok(Tokenizer::decode(self, ids, skip_special)?)
    }
}

/// Whether texts get the tokenizer's special tokens (BOS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BosRule {
    /// As the tokenizer does by itself, but no second BOS before a text that spells one (lm-eval 0.4.9.2 and later).
    #[default]
    Tokenizer,
    /// Never (lm-eval up to 0.4.9.1, but for Gemma: there `--compat lm-eval-0.4.9.1` keeps [`Self::Tokenizer`]).
    Never,
}

impl BosRule {
    /// Name in keys and records.
    pub fn name(self) -> &'static str {
        match self {
            BosRule::Tokenizer => "tokenizer",
            BosRule::Never => "never",
        }
    }
}

/// One run of tokens through the model of which rows are scored: row `first + i` against `targets[i]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the request it belongs to.
    pub request: usize,
    /// Tokens fed; the last target is not among them.
    pub ids: Vec<u32>,
    /// First scored row.
    pub first: usize,
    /// One a row, to the end: `ids.len() - first` of them.
    pub targets: Vec<u32>,
}

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Index of the request it belongs to.
    pub request: usize,
    /// Tokens given.
    pub ids: Vec<u32>,
}

/// A request in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// Log-probabilities to sum.
    Scored(Vec<Piece>),
    /// Text to write.
    Prompt(Prompt),
}

/// The encoder of one run.
pub struct RequestEncoder<'a> {
    codec: &'a dyn Codec,
    rule: BosRule,
    max_length: usize,
    prefix: Option<u32>,
    prefix_text: String,
}

impl<'a> RequestEncoder<'a> {
    /// `max_length`: most tokens of one input.
    pub fn new(codec: &'a dyn Codec, rule: BosRule, max_length: usize) -> Result<Self> {
        let prefix = codec.bos_id().or_else(|| codec.eos_ids().first().copied());
        let prefix_text = prefix.map(|id| codec.decode(&[id], false)).transpose()?.unwrap_or_default();
        Ok(Self { codec, rule, max_length, prefix, prefix_text })
    }

    /// Tokens of a text under the BOS rule.
    pub fn text(&self, text: &str) -> Result<Vec<u32>> {
        let spelled = !self.prefix_text.is_empty() && text.starts_with(&self.prefix_text);
        self.codec.encode(text, self.rule == BosRule::Tokenizer && !spelled)
    }

    fn prefix(&self) -> Result<u32> {
        self.prefix.ok_or(EvalError::NoPrefixToken)
    }

    /// Encodes `request`, the `index`-th.
    pub fn encode(&self, index: usize, request: &Request) -> Result<Encoded> {
        let failed = |problem: String| EvalError::Request {
            task: request.task.clone(),
            doc: request.doc,
            idx: request.idx,
            problem,
        };
        match &request.kind {
            RequestKind::LogLikelihood { context, continuation } => {
                let (context, continuation) = self.pair(context, continuation)?;
                if context.is_empty() {
                    return Err(failed("its context has no tokens, only white space".into()));
                }
                if continuation.is_empty() {
                    return Err(failed("its continuation adds no token to the context".into()));
                }
                if continuation.len() > self.max_length {
                    return Err(failed(format!(
                        "its continuation has {} tokens and an input may have {}",
                        continuation.len(),
                        self.max_length
                    )));
                }
                // The last max_length + 1 tokens, without the final one: cut from the left, the continuation whole.
                let targets = continuation.clone();
                let mut ids = context;
                ids.extend_from_slice(&continuation);
                ids.drain(..ids.len().saturating_sub(self.max_length + 1));
                ids.pop();
                let first = ids.len() - targets.len();
                Ok(Encoded::Scored(vec![Piece { request: index, ids, first, targets }]))
            }
            RequestKind::Rolling { text } => {
                let tokens = self.text(text)?;
                let pieces = rolling(self.prefix()?, &tokens, self.max_length)
                    .map(|(mut ids, scored)| {
                        let targets = ids[scored.clone()].to_vec();
                        ids.truncate(scored.end - 1);
                        Piece { request: index, ids, first: scored.start - 1, targets }
                    })
                    .collect();
                Ok(Encoded::Scored(pieces))
            }
            RequestKind::Generate { context, max_new_tokens, .. } => {
                let room = self.max_length.checked_sub(*max_new_tokens).filter(|&r| r > 0).ok_or_else(|| {
                    failed(format!(
                        "it asks for {max_new_tokens} new tokens and the model reads {}; nothing is left for the prompt",
                        self.max_length
                    ))
                })?;
                let mut ids = self.text(context)?;
                ids.drain(..ids.len().saturating_sub(room));
                if ids.is_empty() {
                    ids.push(self.prefix()?);
                }
                Ok(Encoded::Prompt(Prompt { request: index, ids }))
            }
        }
    }

    /// Context and continuation tokens of a pair.
    ///
    /// The pair is encoded whole and cut after as many tokens as the context alone has. Where a merge crosses the
    /// border this shifts tokens; published numbers include that, so it stays.
    fn pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        if context.is_empty() {
            let mut tokens = self.codec.encode(continuation, false)?;
            let prefix = self.prefix()?;
            if tokens.first() == Some(&prefix) {
                let rest = tokens.split_off(1);
                return Ok((tokens, rest));
            }
            return Ok((vec![prefix], tokens));
        }
        // The context's trailing white space moves to the continuation; the text as a whole stays what it was.
        let stripped = context.trim_end_matches(python_space);
        let mut whole = self.text(&format!("{context}{continuation}"))?;
        let context = self.text(stripped)?;
        let rest = whole.split_off(context.len().min(whole.len()));
        Ok((context, rest))
    }
}

/// Python's `str.isspace`: Unicode white space and the four separators U+001C–U+001F.
fn python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::ByteTokenizer;

    fn request(kind: RequestKind) -> Request {
        Request { task: "t".into(), doc: 4, idx: 1, kind }
    }

    fn pair(context: &str, continuation: &str) -> Request {
        request(RequestKind::LogLikelihood { context: context.into(), continuation: continuation.into() })
    }

    fn piece(adds_bos: bool, max_length: usize, r: &Request) -> Result<Piece> {
        let tokenizer = ByteTokenizer { adds_bos };
        let encoder = RequestEncoder::new(&tokenizer, BosRule::Tokenizer, max_length)?;
        match encoder.encode(0, r)? {
            Encoded::Scored(mut pieces) if pieces.len() == 1 => Ok(pieces.remove(0)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn trailing_space_of_the_context_is_scored() {
        let p = piece(false, 64, &pair("ab \n", "cd")).unwrap();
        assert_eq!(
            (p.ids.as_slice(), p.first, p.targets.as_slice()),
            (&b"ab \nc".map(u32::from)[..], 1, &b" \ncd".map(u32::from)[..])
        );
        let p = piece(false, 64, &pair("ab\u{1f}", "c")).unwrap();
        assert_eq!(p.targets, [0x1f, u32::from(b'c')]);
        let p = piece(true, 64, &pair("a", "c")).unwrap();
        assert_eq!((p.ids, p.first), (vec![256, 97], 1));
    }

    #[test]
    fn an_empty_context_is_the_prefix_token() {
        let p = piece(true, 64, &pair("", "cd")).unwrap();
        assert_eq!((p.ids, p.first, p.targets), (vec![256, 99], 0, vec![99, 100]));
        // The byte tokenizer spells its BOS as U+0100.
        let p = piece(true, 64, &pair("\u{100}a", "c")).unwrap();
        assert_eq!(p.ids, [256, 97]);
    }

    #[test]
    fn too_long_is_cut_from_the_left() {
        let p = piece(true, 4, &pair("abcdef", "gh")).unwrap();
        assert_eq!((p.ids, p.first, p.targets), (b"defg".map(u32::from).to_vec(), 2, b"gh".map(u32::from).to_vec()));
        let e = piece(true, 1, &pair("abcdef", "gh")).unwrap_err().to_string();
        assert!(e.contains("document 4 of t") && e.contains("2 tokens"), "{e}");
        assert!(piece(false, 8, &pair("  ", "")).is_err() && piece(true, 8, &pair("a", "")).is_err());
    }

    #[test]
    fn rolling_scores_each_token_once() {
        let tokenizer = ByteTokenizer { adds_bos: true };
        let encoder = RequestEncoder::new(&tokenizer, BosRule::Tokenizer, 3).unwrap();
        let Encoded::Scored(pieces) =
            encoder.encode(7, &request(RequestKind::Rolling { text: "abcd".into() })).unwrap()
        else {
            panic!("not scored")
        };
        // BOS is a token of the text under this rule, and scored after BOS.
        assert_eq!(pieces[0], Piece { request: 7, ids: vec![256, 256, 97], first: 0, targets: vec![256, 97, 98] });
        assert_eq!(pieces[1], Piece { request: 7, ids: vec![97, 98, 99], first: 1, targets: vec![99, 100] });
        let never = RequestEncoder::new(&tokenizer, BosRule::Never, 3).unwrap();
        assert_eq!(never.text("a").unwrap(), [97]);
    }

    #[test]
    fn a_prompt_leaves_room_for_what_is_written() {
        let tokenizer = ByteTokenizer { adds_bos: false };
        let encoder = RequestEncoder::new(&tokenizer, BosRule::Tokenizer, 5).unwrap();
        let generate = |context: &str, max_new_tokens| {
            request(RequestKind::Generate {
                context: context.into(),
                until: vec![],
                max_new_tokens,
                temperature: 0.0,
                do_sample: false,
                messages: vec![],
                tools: vec![],
            })
        };
        let Encoded::Prompt(p) = encoder.encode(0, &generate("abcdef", 2)).unwrap() else { panic!("scored") };
        assert_eq!(p.ids, b"def".map(u32::from));
        let Encoded::Prompt(p) = encoder.encode(0, &generate("", 2)).unwrap() else { panic!("scored") };
        assert_eq!(p.ids, [256]);
        assert!(encoder.encode(0, &generate("a", 5)).is_err());
    }
}
