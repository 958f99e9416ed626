//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answer;
use super::error::ApiError;
use super::request::{self, Common, StreamUsage};
use super::{App, now, stream};
use crate::engine::{Event, Usage};

#[derive(Debug, Deserialize)]
struct Body {
    messages: Vec<Map<String, Value>>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    #[serde(flatten)]
    common: Common,
}

/// Messages as templates take them: content is text, and parts of text are joined.
fn flatten(messages: Vec<Map<String, Value>>) -> Result<Value, ApiError> {
    let bad = |i: usize, why: &str| ApiError::field("messages", format!("message {i}: {why}"));
    let mut out = Vec::with_capacity(messages.len());
    for (i, mut m) in messages.into_iter().enumerate() {
        if !m.get("role").is_some_and(Value::is_string) {
            return Err(bad(i, "`role` is missing"));
        }
        let content = match m.get("content") {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(s)) => s.clone(),
            Some(Value::Array(parts)) => {
                let text = |p: &Value| {
                    let is_text = p.get("type").and_then(Value::as_str) == Some("text");
                    p.get("text").and_then(Value::as_str).filter(|_| is_text).map(str::to_string)
                };
                let all: Option<Vec<String>> = parts.iter().map(text).collect();
                all.ok_or_else(|| bad(i, "only parts of type `text` are supported"))?.concat()
            }
            Some(_) => return Err(bad(i, "`content` is text or a list of parts")),
        };
        m.insert("content".into(), Value::String(content));
        objects(&mut m);
        out.push(Value::Object(m));
    }
    Ok(Value::Array(out))
}

/// Arguments of calls are text in the API and objects in templates.
fn objects(message: &mut Map<String, Value>) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for arguments in calls.into_iter().flatten().filter_map(|c| c.pointer_mut("/function/arguments")) {
        let read = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
        if let Some(map) = read {
            *arguments = Value::Object(map);
        }
    }
}

/// Answers a request.
pub async fn handle(app: Arc<App>, bytes: &[u8]) -> Result<Response, ApiError> {
    let body: Body = super::parse(bytes)?;
    let common = &body.common;
    common.check_model(&app.name)?;
    let Some(template) = &app.template else {
        return Err(ApiError::bad("the model has no chat template; use /v1/completions"));
    };
    if body.messages.is_empty() {
        return Err(ApiError::field("messages", "there is none"));
    }
    let n = common.choices()?;
    let messages = flatten(body.messages)?;
    let tools = body.tools.as_ref().filter(|t| t.as_array().is_some_and(|a| !a.is_empty()));
    let variables = body.chat_template_kwargs.unwrap_or_default();
    let open = body.add_generation_prompt.unwrap_or(true);
    let rendered = template.render_request(&messages, tools, &variables, open);
    let rendered = rendered.map_err(|e| ApiError::field("messages", e.to_string()))?;
    // A rendered template carries its own special tokens.
    let prompt =
        app.engine.tokenizer.encode(&rendered, false).map_err(|e| ApiError::field("messages", e.to_string()))?;
    let mut params = common.params(app.vocab)?;
    let room = app.engine.max_len().saturating_sub(prompt.len());
    params.max_tokens = match common.max_completion_tokens.or(common.max_tokens) {
        Some(0) => return Err(ApiError::field("max_tokens", "at least 1")),
        Some(n) => n,
        None => app.default_max_tokens.min(room).max(1),
    };
    let top = request::alternatives("top_logprobs", body.top_logprobs.unwrap_or(0))?;
    params.logprobs = body.logprobs.unwrap_or(false).then_some(top);
    let events = request::submit(&app.engine, vec![prompt], n, &params)?;
    let id = app.next_id("chatcmpl");
    let wants = params.logprobs.is_some();
    if common.stream.unwrap_or(false) {
        let head = json!({"id": id, "object": "chat.completion.chunk", "created": now(), "model": app.name});
        let tells = common.stream_usage();
        let usage = vec![Usage::default(); n];
        return Ok(stream::response(events, n, Chunks { app, head, usage, tells, wants, started: vec![false; n] }));
    }
    let all = answer::collect(events, n).await?;
    let choice = |(i, a): (usize, &answer::Answer)| {
        let logprobs = if wants { answer::chat_logprobs(&app.engine.tokenizer, &a.tokens) } else { Value::Null };
        let message = json!({"role": "assistant", "content": a.text, "refusal": null});
        json!({"index": i, "message": message, "logprobs": logprobs, "finish_reason": answer::reason(a.finish)})
    };
    let choices: Vec<Value> = all.iter().enumerate().map(choice).collect();
    let usage = answer::usage(&all.iter().map(|a| a.usage).collect::<Vec<_>>(), n);
    let reply = json!({"id": id, "object": "chat.completion", "created": now(), "model": app.name,
        "choices": choices, "usage": usage});
    Ok(Json(reply).into_response())
}

struct Chunks {
    app: Arc<App>,
    head: Value,
    usage: Vec<Usage>,
    tells: StreamUsage,
    wants: bool,
    started: Vec<bool>,
}

impl Chunks {
    fn chunk(&self, index: usize, delta: Value, logprobs: Value, reason: Value) -> Value {
        let mut v = self.head.clone();
        v["choices"] = json!([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]);
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
        self.usage[index] = Usage { completion: 0, ..event.usage() };
        if !std::mem::replace(&mut self.started[index], true) {
            out.push(self.chunk(index, json!({"role": "assistant", "content": ""}), Value::Null, Value::Null));
        }
        match event {
            Event::Prompt(_) => {}
            Event::Piece { text, tokens, usage } => {
                self.usage[index] = usage;
                let tokenizer = &self.app.engine.tokenizer;
                let logprobs = if self.wants { answer::chat_logprobs(tokenizer, &tokens) } else { Value::Null };
                if !text.is_empty() || !tokens.is_empty() {
                    out.push(self.chunk(index, json!({"content": text}), logprobs, Value::Null));
                }
            }
            Event::Done { finish, usage } => {
                self.usage[index] = usage;
                out.push(self.chunk(index, json!({}), Value::Null, answer::reason(Some(finish))));
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
        v["usage"] = answer::usage(&self.usage, self.usage.len());
        vec![v]
    }
}
