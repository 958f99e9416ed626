//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{self, Answer};
use super::error::ApiError;
use super::request::{self, Common, StreamUsage};
use super::{App, now, stream};
use crate::engine::{Event, Usage};

/// A prompt in the forms OpenAI's API has.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
struct Body {
    prompt: Prompt,
    echo: Option<bool>,
    logprobs: Option<usize>,
    suffix: Option<String>,
    best_of: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

/// Prompts of one request at most.
const MOST_PROMPTS: usize = 1024;

/// Answers a request.
pub async fn handle(app: Arc<App>, bytes: &[u8]) -> Result<Response, ApiError> {
    let body: Body = super::parse(bytes)?;
    let common = &body.common;
    common.check_model(&app.name)?;
    if body.suffix.as_deref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::field("suffix", "not supported"));
    }
    let n = common.choices()?;
    if body.best_of.is_some_and(|b| b != n) {
        return Err(ApiError::field("best_of", "only best_of = n is supported"));
    }
    let text = |t: &str| app.engine.tokenizer.encode(t, true).map_err(|e| ApiError::field("prompt", e.to_string()));
    let prompts: Vec<Vec<u32>> = match &body.prompt {
        Prompt::Text(t) => vec![text(t)?],
        Prompt::Tokens(ids) => vec![ids.clone()],
        Prompt::Texts(list) => list.iter().map(|t| text(t)).collect::<Result<_, _>>()?,
        Prompt::TokenLists(lists) => lists.clone(),
    };
    if prompts.is_empty() || prompts.len() > MOST_PROMPTS {
        return Err(ApiError::field("prompt", format!("1 to {MOST_PROMPTS} prompts, not {}", prompts.len())));
    }
    let echo = body.echo.unwrap_or(false);
    let mut params = common.params(app.vocab)?;
    params.max_tokens = common.max_tokens.or(common.max_completion_tokens).unwrap_or(16);
    params.logprobs = body.logprobs.map(|k| request::alternatives("logprobs", k)).transpose()?;
    params.prompt_logprobs = echo && params.logprobs.is_some();
    if params.max_tokens == 0 && !echo {
        return Err(ApiError::field("max_tokens", "0 needs `echo`"));
    }
    let echoed: Vec<String> = if echo {
        let decode = |ids: &Vec<u32>| app.engine.tokenizer.decode(ids, params.skip_special);
        prompts.iter().map(decode).collect::<Result<_, _>>().map_err(|e| ApiError::field("prompt", e.to_string()))?
    } else {
        Vec::new()
    };
    let answers = prompts.len() * n;
    let events = request::submit(&app.engine, prompts, n, &params)?;
    let head = json!({"id": app.next_id("cmpl"), "object": "text_completion", "created": now(), "model": app.name});
    if common.stream.unwrap_or(false) {
        let tells = common.stream_usage();
        let usage = vec![Usage::default(); answers];
        let wants = params.logprobs.is_some();
        let offsets = vec![0; answers];
        let format = Chunks { app, head, echoed, usage, n, tells, wants, offsets, started: vec![false; answers] };
        return Ok(stream::response(events, answers, format));
    }
    let all = answer::collect(events, answers).await?;
    let choices: Vec<Value> =
        all.iter().enumerate().map(|(i, a)| choice(&app, i, a, echoed.get(i / n), &params)).collect();
    let mut reply = head;
    reply["choices"] = choices.into();
    reply["usage"] = answer::usage(&all.iter().map(|a| a.usage).collect::<Vec<_>>(), n);
    Ok(Json(reply).into_response())
}

fn choice(app: &App, i: usize, a: &Answer, echoed: Option<&String>, params: &crate::engine::Params) -> Value {
    let logs: Vec<_> = a.prompt.iter().chain(&a.tokens).cloned().collect();
    let logprobs = match params.logprobs {
        Some(_) => answer::legacy_logprobs(&app.engine.tokenizer, &logs, 0),
        None => Value::Null,
    };
    let text = format!("{}{}", echoed.map_or("", String::as_str), a.text);
    json!({"index": i, "text": text, "logprobs": logprobs, "finish_reason": answer::reason(a.finish)})
}

struct Chunks {
    app: Arc<App>,
    head: Value,
    echoed: Vec<String>,
    usage: Vec<Usage>,
    n: usize,
    tells: StreamUsage,
    wants: bool,
    offsets: Vec<usize>,
    started: Vec<bool>,
}

impl Chunks {
    fn chunk(&self, index: usize, text: &str, logprobs: Value, reason: Value) -> Value {
        let mut v = self.head.clone();
        v["choices"] = json!([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]);
        match self.tells {
            StreamUsage::Never => {}
            StreamUsage::Last => v["usage"] = Value::Null,
            StreamUsage::Each => v["usage"] = answer::usage(&self.usage[index..=index], 1),
        }
        v
    }
}

impl stream::Format for Chunks {
    fn chunks(&mut self, index: usize, event: Event) -> Vec<Value> {
        let mut out = Vec::new();
        let tokenizer = self.app.engine.tokenizer.clone();
        self.usage[index] = Usage { completion: 0, ..event.usage() };
        if !std::mem::replace(&mut self.started[index], true)
            && let Some(echoed) = self.echoed.get(index / self.n)
            && !self.wants
        {
            out.push(self.chunk(index, echoed, Value::Null, Value::Null));
        }
        match event {
            Event::Prompt(logs) => {
                let echoed = self.echoed.get(index / self.n).cloned().unwrap_or_default();
                let logprobs = answer::legacy_logprobs(&tokenizer, &logs, 0);
                self.offsets[index] = echoed.chars().count();
                out.push(self.chunk(index, &echoed, logprobs, Value::Null));
            }
            Event::Piece { text, tokens, usage } => {
                self.usage[index] = usage;
                let logprobs = match self.wants {
                    true => answer::legacy_logprobs(&tokenizer, &tokens, self.offsets[index]),
                    false => Value::Null,
                };
                self.offsets[index] += text.chars().count();
                if !text.is_empty() || !tokens.is_empty() {
                    out.push(self.chunk(index, &text, logprobs, Value::Null));
                }
            }
            Event::Done { finish, usage } => {
                self.usage[index] = usage;
                out.push(self.chunk(index, "", Value::Null, answer::reason(Some(finish))));
            }
            Event::Failed(why) => out.push(answer::internal(&why).body()),
        }
        out
    }

    fn last(&mut self) -> Vec<Value> {
        if self.tells == StreamUsage::Never {
            return Vec::new();
        }
        let mut v = self.head.clone();
        v["choices"] = json!([]);
        v["usage"] = answer::usage(&self.usage, self.n);
        vec![v]
    }
}
