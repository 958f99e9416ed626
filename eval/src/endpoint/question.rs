//! From a request to the bodies a server is sent.

use serde_json::{Map, Value as Json, json};

use super::answer::{self, Found, Unfit};
use super::{Api, Reply};
use crate::engine::codec::{Encoded, RequestEncoder};
use crate::error::{EvalError, Result};
use crate::tasks::{Message, Request, RequestKind};

/// Stop texts OpenAI's API takes; the answer is cut here by all of them.
const MOST_STOPS: usize = 4;

/// What is read from the answer.
#[derive(Clone, Debug, PartialEq)]
enum Wanted {
    /// The text, cut before the first of these.
    Text(Vec<String>),
    /// Log-probabilities of the last `scored` of `tokens` tokens.
    Scores { tokens: usize, scored: usize },
}

/// One body and what to read from its answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Question {
    /// Path.
    pub(super) path: &'static str,
    /// Body.
    pub(super) body: Json,
    wanted: Wanted,
}

impl Question {
    /// Reads the answer to a request that went well.
    pub(super) fn read(&self, reply: &Reply) -> std::result::Result<Found, Unfit> {
        match &self.wanted {
            Wanted::Text(until) => answer::text(&reply.body, until),
            Wanted::Scores { tokens, scored } => answer::scores(&reply.body, *tokens, *scored),
        }
    }
}

/// The questions of a request: one, or one a window of a rolled text.
pub(super) fn of(
    request: &Request,
    encoder: Option<&RequestEncoder<'_>>,
    model: &str,
    api: Api,
    seed: u64,
    extra: &Map<String, Json>,
) -> Result<Vec<Question>> {
    let failed = |problem: &str| EvalError::Request {
        task: request.task.clone(),
        doc: request.doc,
        idx: request.idx,
        problem: problem.into(),
    };
    // OpenAI's type is a signed integer; 31 bits fit every server's.
    let seed = seed >> 33;
    let question = |path: &'static str, mut body: Json, wanted: Wanted| {
        body["model"] = model.into();
        body["seed"] = seed.into();
        if let Some(map) = body.as_object_mut() {
            for (key, value) in extra {
                match value {
                    Json::Null => _ = map.remove(key),
                    value => _ = map.insert(key.clone(), value.clone()),
                }
            }
        }
        Question { path, body, wanted }
    };
    match &request.kind {
        RequestKind::Generate { context, until, max_new_tokens, temperature, do_sample, messages, tools } => {
            let temperature = if *do_sample { *temperature } else { 0.0 };
            let stops: Vec<&String> = until.iter().filter(|u| !u.is_empty()).take(MOST_STOPS).collect();
            let mut body = json!({"max_tokens": max_new_tokens, "temperature": temperature});
            if !stops.is_empty() {
                body["stop"] = json!(stops);
            }
            let path = match api {
                Api::Chat if messages.is_empty() => {
                    return Err(failed("it is no conversation, and a chat endpoint takes nothing else"));
                }
                Api::Chat if messages.last().is_some_and(|m| m.role == "assistant") => {
                    return Err(failed(
                        "its answer is already begun (`gen_prefix`), and chat endpoints begin answers themselves\nhint: --completions",
                    ));
                }
                Api::Chat => {
                    body["messages"] = messages.iter().map(Message::for_api).collect();
                    if !tools.is_empty() {
                        body["tools"] = json!(tools);
                    }
                    "/v1/chat/completions"
                }
                Api::Completions => {
                    body["prompt"] = match encoder.map(|e| e.encode(0, request)).transpose()? {
                        Some(Encoded::Prompt(prompt)) => json!(prompt.ids),
                        _ => context.clone().into(),
                    };
                    "/v1/completions"
                }
            };
            Ok(vec![question(path, body, Wanted::Text(until.clone()))])
        }
        RequestKind::LogLikelihood { .. } | RequestKind::Rolling { .. } => {
            let encoder = encoder.ok_or_else(|| {
                failed("log-likelihoods need tokens, and the server has no /tokenize\nhint: --tokenizer MODEL")
            })?;
            let encoded = encoder.encode(0, request).map_err(|e| match e {
                // A server's /tokenize shows only what is put before a text by itself.
                EvalError::NoPrefixToken => failed(
                    "it has no context, and which token a text begins with is not known\nhint: --tokenizer MODEL, of a model with BOS or EOS",
                ),
                other => other,
            })?;
            let Encoded::Scored(pieces) = encoded else { return Ok(Vec::new()) };
            let scored = pieces.into_iter().filter(|p| !p.targets.is_empty()).map(|piece| {
                let mut ids = piece.ids;
                ids.extend(piece.targets.last());
                let wanted = Wanted::Scores { tokens: ids.len(), scored: piece.targets.len() };
                let body = json!({"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1});
                question("/v1/completions", body, wanted)
            });
            Ok(scored.collect())
        }
    }
}
