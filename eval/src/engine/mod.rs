//! Answers requests of tasks with a model, or with a candidate and its reference side by side.
//!
//! ```text
//! requests ─► codec (tokens, lm-eval's rules) ─► plan (shared prefixes once) ─► execute (ragged batches) ─► answers
//!                                           └─► decode (text, one token a sequence and step) ───────────┘    │
//!        store: answers that are known are not asked again, new ones are kept as they come  ◄────────────────┘
//! ```
//!
//! A score depends on its own tokens alone. Budgets, order of requests, shards, restarts and threads change no bit.

pub mod codec;
pub mod decode;
pub mod execute;
pub mod journal;
pub(crate) mod ledger;
pub mod plan;
pub mod shard;

use std::collections::HashMap;

use lowbit_checkpoint::hash::sha256_hex;
use lowbit_kernels::backend::TokenScore;
use lowbit_model::Model;
use rayon::prelude::*;

pub use codec::{BosRule, Codec};
pub use execute::{Limits, Work};
pub use journal::{Found, Journal, NoStore, Store, request_key, window_key};
pub use shard::Shard;

use self::codec::{Encoded, Piece, Prompt, RequestEncoder};
use self::decode::{Rules, Written};
use self::execute::{Executor, Scored};
use self::ledger::Ledger;
use crate::drift::row::RowDrift;
use crate::error::{EvalError, Result};
use crate::tasks::{Request, RequestKind, Response};

/// Version of the engine's results, part of every key: raised when the same request may get another number.
pub const ENGINE_VERSION: u32 = 1;

/// How requests are read and run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineOptions {
    /// BOS rule.
    pub bos: BosRule,
    /// Most tokens of one input; the smaller of the models' positions when absent. Longer requests lose their
    /// beginning, rolled texts are cut into windows of it, so it is part of the protocol.
    pub max_length: Option<usize>,
    /// Seed of sampled text.
    pub seed: u64,
    /// Bounds that change no result.
    pub limits: Limits,
}

/// An answer, and the reference's.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The candidate's.
    pub response: Response,
    /// The reference's, to the same request.
    pub reference: Option<Response>,
    /// Drift of each scored row, in order, with a hash of the tokens the row has read: rows of equal hash are the same
    /// position (the choices of a question share their first).
    pub drift: Vec<(u64, RowDrift)>,
}

/// All answers, in the order of the requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One a request.
    pub answers: Vec<Answer>,
    /// What it cost.
    pub work: Work,
    /// Requests answered by the store.
    pub restored: usize,
}

/// Whoever answers requests: a model here, two side by side, a server.
pub trait Answers {
    /// Answers `requests`; what `store` knows is not asked again, and it hears of each new answer as it comes. `progress` hears of
    /// requests done and their number.
    fn answer(
        &self,
        requests: &[Request],
        store: &mut dyn Store,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome>;
}

impl Answers for Engine<'_> {
    fn answer(
        &self,
        requests: &[Request],
        store: &mut dyn Store,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome> {
        self.run(requests, store, progress)
    }
}

/// Models, tokenizer and options.
pub struct Engine<'a> {
    candidate: &'a Model,
    reference: Option<&'a Model>,
    codec: &'a dyn Codec,
    options: EngineOptions,
    max_length: usize,
}

/// A request whose pieces come back one row at a time.
struct Pending {
    pieces: Vec<usize>,
    missing: usize,
    rolled: bool,
}

impl<'a> Engine<'a> {
    /// With a reference, both models answer every request.
    pub fn new(
        candidate: &'a Model,
        reference: Option<&'a Model>,
        codec: &'a dyn Codec,
        options: EngineOptions,
    ) -> Result<Self> {
        let positions = |m: &Model| m.config().max_position_embeddings;
        let most = positions(candidate).min(reference.map_or(usize::MAX, positions));
        let max_length = options.max_length.unwrap_or(most);
        if max_length == 0 || max_length > most {
            return Err(EvalError::BadSetting {
                what: "the maximum length",
                found: max_length,
                expected: format!("the model has {most} positions"),
            });
        }
        if let Some(r) = reference
            && r.config().vocab_size != candidate.config().vocab_size
        {
            return Err(EvalError::VocabularyMismatch {
                candidate: candidate.config().vocab_size,
                reference: r.config().vocab_size,
            });
        }
        Ok(Self { candidate, reference, codec, options, max_length })
    }

    /// Most tokens of one input.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// What every answer depends on beside its request: weights (`model_sha256`), tokenizer, kernels and precision,
    /// protocol. Any difference gives another identity.
    pub fn identity(&self, weights: &Weights<'_>) -> String {
        let backend = self.candidate.backend();
        let fields = serde_json::json!({
            "candidate": weights.candidate,
            "reference": weights.reference,
            "tokenizer": weights.tokenizer,
            "kernels": [backend.name(), weights.precision, env!("CARGO_PKG_VERSION")],
            "engine": ENGINE_VERSION,
            "bos": self.options.bos.name(),
            "max_length": self.max_length,
            "seed": self.options.seed,
        });
        sha256_hex(fields.to_string().as_bytes())
    }

    /// Answers `requests`; `progress` hears of requests done and their number.
    pub fn run(
        &self,
        requests: &[Request],
        store: &mut dyn Store,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome> {
        let keys: Vec<String> = requests.par_iter().map(request_key).collect::<Result<_>>()?;
        let mut ledger = Ledger::open(&keys, store);
        let (asked, restored, total) = (std::mem::take(&mut ledger.todo), ledger.restored, ledger.total);
        progress(ledger.done(), total);
        let mut work = Work::default();
        {
            let mut done = |i: usize, answer: Answer| -> Result<()> {
                ledger.keep(i, answer, store)?;
                progress(ledger.done(), total);
                Ok(())
            };
            let (pieces, pending, prompts) = self.encode(requests, &asked)?;
            self.score(&pieces, pending, &mut work, &mut done)?;
            self.write(requests, prompts, &mut work, &mut done)?;
        }
        store.finish()?;
        let answers = ledger.answers()?;
        Ok(Outcome { answers, work, restored })
    }

    #[expect(clippy::type_complexity, reason = "three lists of one loop")]
    fn encode(
        &self,
        requests: &[Request],
        asked: &[usize],
    ) -> Result<(Vec<Piece>, HashMap<usize, Pending>, Vec<Prompt>)> {
        let encoder = RequestEncoder::new(self.codec, self.options.bos, self.max_length)?;
        let encoded: Vec<Encoded> =
            asked.par_iter().map(|&i| encoder.encode(i, &requests[i])).collect::<Result<_>>()?;
        let (mut pieces, mut pending, mut prompts) = (Vec::new(), HashMap::new(), Vec::new());
        for (&i, encoded) in asked.iter().zip(encoded) {
            match encoded {
                Encoded::Prompt(prompt) => prompts.push(prompt),
                Encoded::Scored(mut own) => {
                    let missing = own.iter().map(|p| p.targets.len()).sum();
                    let places = pieces.len()..pieces.len() + own.len();
                    let rolled = matches!(requests[i].kind, RequestKind::Rolling { .. });
                    pending.insert(i, Pending { pieces: places.collect(), missing, rolled });
                    pieces.append(&mut own);
                }
            }
        }
        Ok((pieces, pending, prompts))
    }

    fn score(
        &self,
        pieces: &[Piece],
        mut pending: HashMap<usize, Pending>,
        work: &mut Work,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let mut scores: Vec<Vec<Option<Scored>>> = pieces.iter().map(|p| vec![None; p.targets.len()]).collect();
        // A text without tokens has log-probability 0.
        let mut empty: Vec<usize> = pending.iter().filter(|p| p.1.missing == 0).map(|p| *p.0).collect();
        empty.sort_unstable();
        for i in empty {
            let rolled = || Response::Rolling { log_prob: 0.0 };
            let reference = self.reference.map(|_| rolled());
            done(i, Answer { response: rolled(), reference, drift: Vec::new() })?;
        }
        let families = plan::plan(pieces);
        let mut executor = Executor::new(self.candidate, self.reference, self.options.limits);
        executor.run(pieces, &families, &mut |target, scored| {
            let Some(piece) = pieces.get(target.piece) else { return Ok(()) };
            let values = [Some(scored.candidate.log_prob), scored.reference.map(|r| r.log_prob)];
            for (model, value) in ["candidate", "reference"].into_iter().zip(values) {
                if let Some(value) = value.filter(|v| !v.is_finite()) {
                    let (window, position) = (piece.request, target.row);
                    let value = f64::from(value);
                    return Err(EvalError::NotFinite { model, what: "log-probability", value, window, position });
                }
            }
            if let Some(place) = scores.get_mut(target.piece).and_then(|s| s.get_mut(target.at)) {
                *place = Some(scored);
            }
            let Some(entry) = pending.get_mut(&piece.request) else { return Ok(()) };
            entry.missing -= 1;
            if entry.missing > 0 {
                return Ok(());
            }
            match pending.remove(&piece.request) {
                Some(whole) => done(piece.request, self.sum(pieces, &whole, &mut scores)),
                None => Ok(()),
            }
        })?;
        let w = executor.work;
        work.computed_tokens += w.computed_tokens;
        work.asked_tokens += w.asked_tokens;
        work.calls += w.calls;
        work.forks += w.forks;
        Ok(())
    }

    /// Sums a request's rows in the order of its tokens, whatever order they were computed in.
    fn sum(&self, pieces: &[Piece], of: &Pending, scores: &mut [Vec<Option<Scored>>]) -> Answer {
        let mut sums = [0f64; 2];
        let mut greedy = [true; 2];
        let mut drift = Vec::new();
        for &p in &of.pieces {
            let hashes = row_hashes(&pieces[p]);
            for ((scored, &token), hash) in
                std::mem::take(&mut scores[p]).into_iter().flatten().zip(&pieces[p].targets).zip(hashes)
            {
                let add = |m: usize, s: TokenScore, sums: &mut [f64; 2], greedy: &mut [bool; 2]| {
                    sums[m] += f64::from(s.log_prob);
                    greedy[m] &= s.top1 == token;
                };
                add(0, scored.candidate, &mut sums, &mut greedy);
                if let Some(r) = scored.reference {
                    add(1, r, &mut sums, &mut greedy);
                }
                drift.extend(scored.drift.map(|d| (hash, d)));
            }
        }
        let response = |m: usize| match of.rolled {
            true => Response::Rolling { log_prob: sums[m] },
            false => Response::LogLikelihood { log_prob: sums[m], greedy: greedy[m] },
        };
        Answer { response: response(0), reference: self.reference.map(|_| response(1)), drift }
    }

    fn write(
        &self,
        requests: &[Request],
        prompts: Vec<Prompt>,
        work: &mut Work,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        if prompts.is_empty() {
            return Ok(());
        }
        let prompts: Vec<(Prompt, Rules)> = prompts
            .into_iter()
            .map(|p| {
                let rules = self.rules(&requests[p.request])?;
                Ok((p, rules))
            })
            .collect::<Result<_>>()?;
        let limits = &self.options.limits;
        let mut reference: HashMap<usize, Written> = HashMap::new();
        if let Some(model) = self.reference {
            let mut of_reference = Work::default();
            decode::write(model, self.codec, &prompts, limits, &mut of_reference, &mut |i, w| {
                reference.insert(i, w);
                Ok(())
            })?;
        }
        decode::write(self.candidate, self.codec, &prompts, limits, work, &mut |i, written| {
            let theirs = reference.remove(&i).map(|w| Response::Generated { text: w.text });
            done(i, Answer { response: Response::Generated { text: written.text }, reference: theirs, drift: vec![] })
        })
    }

    fn rules(&self, request: &Request) -> Result<Rules> {
        let RequestKind::Generate { until, max_new_tokens, temperature, do_sample, .. } = &request.kind else {
            return Ok(Rules { until: vec![], max_new_tokens: 0, temperature: 0.0, seed: 0, stop_at_eos: true });
        };
        let key = request_key(request)?;
        let own = u64::from_str_radix(key.get(..16).unwrap_or_default(), 16).unwrap_or_default();
        Ok(Rules {
            until: until.clone(),
            max_new_tokens: *max_new_tokens,
            temperature: if *do_sample { *temperature } else { 0.0 },
            seed: self.options.seed ^ own,
            stop_at_eos: true,
        })
    }
}

/// Hashes the identity of a run is made of.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `model_sha256` of the candidate's folder.
    pub candidate: &'a str,
    /// Of the reference's.
    pub reference: Option<&'a str>,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer: &'a str,
    /// What else decides the arithmetic: `exact`, a GPU's name.
    pub precision: &'a str,
}

/// For each scored row, FNV-1a over the tokens it has read.
fn row_hashes(piece: &Piece) -> impl Iterator<Item = u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let hashes = piece.ids.iter().map(move |id| {
        for b in id.to_le_bytes() {
            hash = (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        }
        hash
    });
    hashes.skip(piece.first)
}

#[cfg(test)]
mod tests;
