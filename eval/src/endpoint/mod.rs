//! Requests answered by an OpenAI-compatible server.
//!
//! ```text
//! requests ─► question (tokens or messages ─► body) ─► exchange (tries, waits) ─► answer (text, or log-probabilities summed)
//!        store: as for a model here; an answer that came is not asked again
//! ```
//!
//! Texts are written by `/v1/chat/completions`, or by `/v1/completions`. Log-likelihoods come from `/v1/completions` with `echo`
//! and `logprobs`: the tokens sent are those the engine would feed a model here, and the same ones are summed.
//!
//! Nothing here opens a socket: [`Transport`] does.

mod answer;
pub mod codec;
mod question;
pub mod retry;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use lowbit_checkpoint::hash::sha256_hex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::engine::codec::{Codec, RequestEncoder};
use crate::engine::ledger::Ledger;
use crate::engine::{Answer, Answers, BosRule, ENGINE_VERSION, Outcome, Store, Work, request_key};
use crate::error::{EvalError, Result};
use crate::tasks::{Request, RequestKind, Response};

pub use codec::ServerCodec;
pub use retry::Retry;

/// A whole response of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// How long the server asks to wait.
    pub retry_after: Option<Duration>,
    /// Body.
    pub body: Vec<u8>,
}

/// What carries requests to a server; many threads use it at once.
pub trait Transport: Sync {
    /// Sends a JSON body to a path such as `/v1/completions`. The error is the reason no whole response came.
    fn post(&self, path: &str, body: &[u8]) -> std::result::Result<Reply, String>;

    /// Asks for a path such as `/v1/models`.
    fn get(&self, path: &str) -> std::result::Result<Reply, String>;

    /// Address, for messages and keys.
    fn url(&self) -> String;
}

/// Who writes texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Api {
    /// `/v1/chat/completions`: messages, through the server's chat template.
    #[default]
    Chat,
    /// `/v1/completions`: the prompt as it is.
    Completions,
}

/// A model as its server lists it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// Name for requests.
    pub name: String,
    /// Most tokens of prompt and answer together, where the server says.
    pub max_len: Option<usize>,
    /// What else the list says of it, times and permissions aside: part of the keys answers are kept under.
    pub listed: Map<String, Json>,
}

impl Served {
    /// Asks `/v1/models` for `name`, or for the first model. A server without the list needs a name.
    pub fn find(transport: &dyn Transport, name: Option<&str>) -> Result<Self> {
        let failed = |problem: String| EvalError::Endpoint { url: transport.url(), problem };
        let reply = transport.get("/v1/models").map_err(|why| {
            failed(format!("does not answer: {why}\nhint: is the server up? `lowbit serve MODEL` starts one"))
        })?;
        if matches!(reply.status, 401 | 403) {
            let why = answer::shown(&reply);
            return Err(failed(format!(
                "refuses: {why}\nhint: --api-key-env VAR (--judge-api-key-env, --reference-api-key-env) names the variable with its token"
            )));
        }
        let list = (reply.status == 200).then(|| serde_json::from_slice::<Json>(&reply.body).ok()).flatten();
        let list = list.and_then(|v| v.get("data").and_then(Json::as_array).cloned());
        let id = |m: &Json| m.get("id").and_then(Json::as_str).map(str::to_owned);
        let (list, name) = match (list, name) {
            (None, None) => {
                let why = answer::shown(&reply);
                return Err(failed(format!(
                    "lists no models: {why}\nhint: name the model with --endpoint-model or --judge-model"
                )));
            }
            (list, Some(name)) => (list.unwrap_or_default(), name.to_owned()),
            (Some(list), None) => match list.first().and_then(id) {
                Some(first) => (list, first),
                None => return Err(failed("lists no model; name one with --endpoint-model or --judge-model".into())),
            },
        };
        let mut own = match list.into_iter().find(|m| id(m).as_deref() == Some(&name)) {
            Some(Json::Object(own)) => own,
            // A name the list does not know may still be an alias: the server will say.
            _ => Map::new(),
        };
        for passing in ["created", "permission"] {
            own.remove(passing);
        }
        let number = |v: Option<&Json>| v.and_then(Json::as_u64).map(|n| n as usize);
        let max_len = number(own.get("max_model_len")).or_else(|| number(own.get("meta").and_then(|m| m.get("n_ctx"))));
        Ok(Self { name, max_len, listed: own })
    }
}

/// How a server is asked.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// Who writes texts.
    pub api: Api,
    /// Requests at once.
    pub concurrency: usize,
    /// When to ask again.
    pub retry: Retry,
    /// BOS rule.
    pub bos: BosRule,
    /// Most tokens of one input; what the server bears when absent.
    pub max_length: Option<usize>,
    /// Seed, with which each request gets its own.
    pub seed: u64,
    /// Further members of every body, over ours; `null` takes one out.
    pub extra: Map<String, Json>,
}

/// A model behind a server.
pub struct Remote<'a> {
    transport: &'a dyn Transport,
    served: Served,
    /// Needed for log-likelihoods.
    codec: Option<&'a dyn Codec>,
    options: RemoteOptions,
}

/// A request, or one of several votes on it: votes are asked with seeds of their own.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// What is asked.
    pub request: &'a Request,
    /// Number of the vote, from 0.
    pub vote: u32,
}

impl Ask<'_> {
    /// Key in stores: the request's own for the first vote.
    fn key(&self) -> Result<String> {
        let own = request_key(self.request)?;
        Ok(if self.vote == 0 { own } else { sha256_hex(format!("{own} vote {}", self.vote).as_bytes()) })
    }
}

/// Without a limit of the server's, longer inputs are its own to refuse.
const UNLIMITED: usize = 1 << 30;

impl<'a> Remote<'a> {
    /// `codec` gives tokens for log-likelihoods and, in [`Api::Completions`], for prompts.
    pub fn new(
        transport: &'a dyn Transport,
        served: Served,
        codec: Option<&'a dyn Codec>,
        options: RemoteOptions,
    ) -> Self {
        Self { transport, served, codec, options }
    }

    /// The model.
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// Address.
    pub fn url(&self) -> String {
        self.transport.url()
    }

    /// What every answer depends on beside its request, as far as it can be known: the address, what the server says of the
    /// model, the tokenizer (its hash, or `server`), the protocol. Other weights behind the same name are *not* seen.
    pub fn identity(&self, tokenizer: &str) -> String {
        let o = &self.options;
        let fields = serde_json::json!({
            "endpoint": self.url(),
            "model": self.served.name,
            "listed": self.served.listed,
            "api": o.api,
            "extra": o.extra,
            "tokenizer": tokenizer,
            "version": env!("CARGO_PKG_VERSION"),
            "engine": ENGINE_VERSION,
            "bos": o.bos.name(),
            "max_length": self.max_length(),
            "seed": o.seed,
        });
        sha256_hex(fields.to_string().as_bytes())
    }

    /// Most tokens of an input. One place is left for the token that servers insist on writing, and one for the last token
    /// scored, which a model here is not fed.
    pub fn max_length(&self) -> usize {
        let server = self.served.max_len.map(|n| n.saturating_sub(2).max(1));
        self.options.max_length.or(server).unwrap_or(UNLIMITED)
    }

    /// Answers every vote; like [`Answers::answer`].
    pub fn ask(
        &self,
        asks: &[Ask<'_>],
        store: &mut dyn Store,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome> {
        let keys: Vec<String> = asks.iter().map(Ask::key).collect::<Result<_>>()?;
        let mut ledger = Ledger::open(&keys, store);
        let (todo, restored, total) = (std::mem::take(&mut ledger.todo), ledger.restored, ledger.total);
        progress(ledger.done(), total);
        let encoder = match self.codec {
            Some(codec) => Some(RequestEncoder::new(codec, self.options.bos, self.max_length())?),
            None => None,
        };
        let encoder = encoder.as_ref();
        let (next, stop, sent) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        let mut failed: Option<(usize, EvalError)> = None;
        std::thread::scope(|scope| {
            let (tx, rx) = mpsc::channel();
            for _ in 0..self.options.concurrency.clamp(1, todo.len().max(1)) {
                let tx = tx.clone();
                let (next, stop, sent, todo, keys) = (&next, &stop, &sent, &todo, &keys);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let Some(&i) = todo.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                        let (Some(ask), Some(key)) = (asks.get(i), keys.get(i)) else { break };
                        let result = self.one(ask.request, key, encoder, stop, sent).transpose();
                        let Some(result) = result else { break };
                        if result.is_err() {
                            // What is under way ends and is kept; nothing new begins.
                            stop.store(true, Ordering::Relaxed);
                        }
                        if tx.send((i, result)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(tx);
            for (i, result) in rx {
                let kept = result.and_then(|response| {
                    let answer = Answer { response, reference: None, drift: Vec::new() };
                    ledger.keep(i, answer, store)?;
                    progress(ledger.done(), total);
                    Ok(())
                });
                if let Err(e) = kept {
                    stop.store(true, Ordering::Relaxed);
                    // Of several the first by place, whatever came first.
                    if failed.as_ref().is_none_or(|(at, _)| i < *at) {
                        failed = Some((i, e));
                    }
                }
            }
        });
        store.finish()?;
        if let Some((_, e)) = failed {
            return Err(e);
        }
        let answers = ledger.answers()?;
        Ok(Outcome { answers, work: Work { calls: sent.load(Ordering::Relaxed) as u64, ..Work::default() }, restored })
    }

    /// One answer; `None` where the run stopped meanwhile.
    fn one(
        &self,
        request: &Request,
        key: &str,
        encoder: Option<&RequestEncoder<'_>>,
        stop: &AtomicBool,
        sent: &AtomicUsize,
    ) -> Result<Option<Response>> {
        let seed = u64::from_str_radix(key.get(..16).unwrap_or_default(), 16).unwrap_or_default() ^ self.options.seed;
        let failed = |problem: String| EvalError::Request {
            task: request.task.clone(),
            doc: request.doc,
            idx: request.idx,
            problem: format!("{} {problem}", self.url()),
        };
        let o = &self.options;
        let questions = question::of(request, encoder, &self.served.name, o.api, seed, &o.extra)?;
        let mut log_prob = 0.0;
        let mut greedy = true;
        for question in &questions {
            let body = question.body.to_string().into_bytes();
            let read = |reply: &Reply| question.read(reply);
            let send = || {
                sent.fetch_add(1, Ordering::Relaxed);
                self.transport.post(question.path, &body)
            };
            let Some(found) = self.options.retry.run(seed, stop, send, read).map_err(failed)? else { return Ok(None) };
            match found {
                answer::Found::Text(text) => return Ok(Some(Response::Generated { text })),
                answer::Found::Scored { log_prob: own, greedy: g } => {
                    log_prob += own;
                    greedy &= g;
                }
            }
        }
        Ok(Some(match request.kind {
            RequestKind::Rolling { .. } => Response::Rolling { log_prob },
            _ => Response::LogLikelihood { log_prob, greedy },
        }))
    }
}

impl Answers for Remote<'_> {
    fn answer(
        &self,
        requests: &[Request],
        store: &mut dyn Store,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Outcome> {
        let asks: Vec<Ask<'_>> = requests.iter().map(|request| Ask { request, vote: 0 }).collect();
        self.ask(&asks, store, progress)
    }
}

/// Whether answering needs tokens.
pub fn needs_tokens(requests: &[Request], api: Api) -> bool {
    let writes = |r: &Request| matches!(r.kind, RequestKind::Generate { .. });
    requests.iter().any(|r| !writes(r) || api == Api::Completions)
}

#[cfg(test)]
mod tests;
