//! Perplexity protocols: how a text becomes windows and which positions count.
//!
//! The protocol is part of the number: on one model `gptq-2048` says 5.47 where `lm-eval-word` says 8.79.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::encode::Encode;
use crate::error::{EvalError, Result};
use crate::text::{Source, detokenize_wikitext, word_count};
use crate::windows::{rolling, sliding};

/// Longest window of [`Protocol::Stride`], whatever the model allows.
pub const STRIDE_MAX_LENGTH: usize = 2048;

/// A way to cut and score a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `gptq-N`: the GPTQ paper's. One token stream, BOS at its start only if the tokenizer adds it, disjoint windows
    /// of N without the tail, all N − 1 targets of each.
    Gptq {
        /// Tokens per window.
        window: usize,
    },
    /// `llama.cpp-N`: chunks of N whose first token BOS overwrites if the tokenizer adds it; the second half counts.
    LlamaCpp {
        /// Tokens per chunk.
        window: usize,
    },
    /// `lm-eval-word[:N]`: every page rolled from BOS (else EOS), all its tokens scored once, per *original* word.
    LmEvalWord {
        /// Longest input; the model's own maximum when absent.
        max_length: Option<usize>,
    },
    /// `stride:N`: the Hugging Face sliding window, N new targets a step, windows of at most
    /// [`STRIDE_MAX_LENGTH`] tokens and never more than the model's positions.
    Stride {
        /// New targets per step.
        stride: usize,
    },
}

/// Tokens of which some are targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Context and targets.
    pub ids: Vec<u32>,
    /// Target positions: `ids[t]` is scored given `ids[..t]`. Starts at 1 or later.
    pub scored: Range<usize>,
    /// Which cluster of [`WindowPlan::weights`] it belongs to.
    pub cluster: usize,
}

/// Everything a model is to score.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowPlan {
    /// What made it.
    pub protocol: Protocol,
    /// Longest window in tokens: the N of the protocol, or the maximum length it settled on.
    pub window: usize,
    /// `stream start`, `every window`, `every page`, `every page (EOS)` or `none`.
    pub bos: &'static str,
    /// In order; those of one cluster are adjacent.
    pub windows: Vec<Window>,
    /// What the NLL of each cluster is divided by: its scored tokens, or its words. A cluster is a window, for
    /// `lm-eval-word` a page.
    pub weights: Vec<f64>,
}

impl WindowPlan {
    /// Targets of all windows.
    pub fn scored_tokens(&self) -> u64 {
        self.windows.iter().map(|w| w.scored.len() as u64).sum()
    }
}

/// What a protocol needs to know beside the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    /// Positions of the model; the smaller of the two where there is a reference.
    pub max_positions: usize,
    /// Starts pages where the tokenizer has no BOS.
    pub eos: Option<u32>,
    /// First windows (pages for `lm-eval-word`) only.
    pub limit: Option<usize>,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Protocol::Gptq { window } => write!(f, "gptq-{window}"),
            Protocol::LlamaCpp { window } => write!(f, "llama.cpp-{window}"),
            Protocol::LmEvalWord { max_length: None } => f.write_str("lm-eval-word"),
            Protocol::LmEvalWord { max_length: Some(n) } => write!(f, "lm-eval-word:{n}"),
            Protocol::Stride { stride } => write!(f, "stride:{stride}"),
        }
    }
}

impl FromStr for Protocol {
    type Err = EvalError;

    fn from_str(given: &str) -> Result<Self> {
        let unknown = |why| EvalError::UnknownProtocol { given: given.to_owned(), why };
        let number = |text: &str, least: usize| match text.parse::<usize>() {
            Ok(n) if n >= least => Ok(n),
            Ok(_) => Err(unknown("the length is too small to score anything")),
            Err(_) => Err(unknown("its length is not a number")),
        };
        if let Some(n) = given.strip_prefix("gptq-") {
            let window = number(n, 2)?;
            Ok(Protocol::Gptq { window })
        } else if let Some(n) = given.strip_prefix("llama.cpp-") {
            let window = number(n, 3)?;
            Ok(Protocol::LlamaCpp { window })
        } else if given == "lm-eval-word" {
            Ok(Protocol::LmEvalWord { max_length: None })
        } else if let Some(n) = given.strip_prefix("lm-eval-word:") {
            let max_length = Some(number(n, 1)?);
            Ok(Protocol::LmEvalWord { max_length })
        } else if let Some(n) = given.strip_prefix("stride:") {
            let stride = number(n, 1)?;
            Ok(Protocol::Stride { stride })
        } else {
            Err(unknown("no such name"))
        }
    }
}

impl Protocol {
    /// Cuts `source` into windows.
    pub fn plan(&self, source: &Source, tokenizer: &dyn Encode, setup: &Setup) -> Result<WindowPlan> {
        let limit = setup.limit.unwrap_or(usize::MAX);
        if limit == 0 {
            return Err(EvalError::BadSetting {
                what: "the limit",
                found: 0,
                expected: "at least one window is needed".into(),
            });
        }
        match *self {
            Protocol::LmEvalWord { max_length } => self.pages(source, tokenizer, setup, max_length, limit),
            Protocol::Gptq { window } => {
                let (ids, bos) = stream(source, tokenizer)?;
                self.enough(ids.len(), window, 1)?;
                let start = bos.map_or("none", |_| "stream start");
                let windows = ids.chunks_exact(window).map(|c| (c.to_vec(), 1..window)).take(limit);
                Ok(self.by_window(window, start, windows))
            }
            Protocol::LlamaCpp { window } => {
                let (ids, bos) = stream(source, tokenizer)?;
                self.enough(ids.len(), window, 2)?;
                let start = bos.map_or("none", |_| "every window");
                let windows = ids.chunks_exact(window).take(limit).map(|chunk| {
                    let mut chunk = chunk.to_vec();
                    if let (Some(bos), Some(first)) = (bos, chunk.first_mut()) {
                        *first = bos;
                    }
                    (chunk, window / 2 + 1..window)
                });
                Ok(self.by_window(window, start, windows))
            }
            Protocol::Stride { stride } => {
                let length = setup.max_positions.min(STRIDE_MAX_LENGTH);
                if stride > length {
                    return Err(EvalError::BadSetting {
                        what: "the stride",
                        found: stride,
                        expected: format!("windows are {length} tokens, so at most that"),
                    });
                }
                let (ids, bos) = stream(source, tokenizer)?;
                self.enough(ids.len(), 2, 1)?;
                let start = bos.map_or("none", |_| "stream start");
                let windows = sliding(&ids, length, stride).take(limit);
                Ok(self.by_window(length, start, windows))
            }
        }
    }

    /// Fails unless the stream fills `count` windows.
    fn enough(&self, found: usize, window: usize, count: usize) -> Result<()> {
        let needed = window.saturating_mul(count);
        if found >= needed {
            return Ok(());
        }
        Err(EvalError::TooShort {
            what: self.to_string(),
            needed,
            found,
            hint: "give a longer text or a shorter window",
        })
    }

    /// A plan in which every window is its own cluster, weighted by its targets.
    fn by_window(
        &self,
        window: usize,
        bos: &'static str,
        windows: impl Iterator<Item = (Vec<u32>, Range<usize>)>,
    ) -> WindowPlan {
        let windows: Vec<Window> =
            windows.enumerate().map(|(cluster, (ids, scored))| Window { ids, scored, cluster }).collect();
        let weights = windows.iter().map(|w| w.scored.len() as f64).collect();
        WindowPlan { protocol: *self, window, bos, windows, weights }
    }

    fn pages(
        &self,
        source: &Source,
        tokenizer: &dyn Encode,
        setup: &Setup,
        max_length: Option<usize>,
        limit: usize,
    ) -> Result<WindowPlan> {
        let pages = source.pages()?;
        let (prefix, bos) = match (tokenizer.bos_id(), setup.eos) {
            (Some(bos), _) => (bos, "every page"),
            (None, Some(eos)) => (eos, "every page (EOS)"),
            (None, None) => return Err(EvalError::NoPrefix),
        };
        let length = max_length.unwrap_or(setup.max_positions);
        if length == 0 || length > setup.max_positions {
            return Err(EvalError::BadSetting {
                what: "the maximum length",
                found: length,
                expected: format!("the model has {} positions", setup.max_positions),
            });
        }
        let (mut windows, mut weights) = (Vec::new(), Vec::new());
        for (cluster, page) in pages.iter().take(limit).enumerate() {
            let ids = tokenizer.encode(&detokenize_wikitext(page), true)?;
            windows.extend(rolling(prefix, &ids, length).map(|(ids, scored)| Window { ids, scored, cluster }));
            weights.push(word_count(page) as f64);
        }
        if windows.is_empty() {
            self.enough(0, 1, 1)?;
        }
        Ok(WindowPlan { protocol: *self, window: length, bos, windows, weights })
    }
}

/// The running text's tokens and the BOS the tokenizer put in front, if it does.
fn stream(source: &Source, tokenizer: &dyn Encode) -> Result<(Vec<u32>, Option<u32>)> {
    let ids = tokenizer.encode(&source.text()?, true)?;
    Ok((ids, tokenizer.added_bos()?))
}

#[cfg(test)]
mod tests;
