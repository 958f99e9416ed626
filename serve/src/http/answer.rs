//! Answers collected, and the parts that both endpoints write alike.

use lowbit_checkpoint::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::ApiError;
use crate::engine::{Event, Finish, TokenLog, Usage};

/// One whole answer.
#[derive(Default)]
pub struct Answer {
    pub text: String,
    pub prompt: Vec<TokenLog>,
    pub tokens: Vec<TokenLog>,
    pub finish: Option<Finish>,
    pub usage: Usage,
}

/// Waits for `n` answers.
pub async fn collect(mut events: UnboundedReceiver<(usize, Event)>, n: usize) -> Result<Vec<Answer>, ApiError> {
    let mut answers: Vec<Answer> = (0..n).map(|_| Answer::default()).collect();
    while let Some((index, event)) = events.recv().await {
        let Some(a) = answers.get_mut(index) else { continue };
        match event {
            Event::Prompt(logs) => a.prompt = logs,
            Event::Piece { text, tokens, .. } => {
                a.text.push_str(&text);
                a.tokens.extend(tokens);
            }
            Event::Done { finish, usage } => (a.finish, a.usage) = (Some(finish), usage),
            Event::Failed(why) => return Err(internal(&why)),
        }
    }
    match answers.iter().all(|a| a.finish.is_some()) {
        true => Ok(answers),
        false => Err(internal("the engine stopped")),
    }
}

/// 500.
pub fn internal(why: &str) -> ApiError {
    ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "internal_error", why)
}

/// `finish_reason`.
pub fn reason(finish: Option<Finish>) -> Value {
    match finish {
        None => Value::Null,
        Some(Finish::Stop) => json!("stop"),
        Some(Finish::Length) => json!("length"),
    }
}

/// `usage` of all answers; a prompt with several answers counts once.
pub fn usage(all: &[Usage], n: usize) -> Value {
    let sum = |f: fn(&Usage) -> usize| all.iter().map(f).sum::<usize>();
    let prompt: usize = all.iter().step_by(n.max(1)).map(|u| u.prompt).sum();
    let cached: usize = all.iter().step_by(n.max(1)).map(|u| u.cached).sum();
    let (completion, drafted, accepted) = (sum(|u| u.completion), sum(|u| u.drafted), sum(|u| u.accepted));
    let mut v = json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    });
    if drafted > 0 {
        v["completion_tokens_details"] =
            json!({"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted});
    }
    v
}

/// A token as text.
pub fn spelling(tokenizer: &Tokenizer, id: u32) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match String::from_utf8(bytes) {
        Ok(text) => text,
        // Part of a character: spelled as OpenAI spells it.
        Err(e) => format!("bytes:{}", e.as_bytes().iter().map(|b| format!("\\x{b:02x}")).collect::<String>()),
    }
}

/// `logprobs` of the completions endpoint; `offset` is that of the first token in the text.
pub fn legacy_logprobs(tokenizer: &Tokenizer, logs: &[TokenLog], mut offset: usize) -> Value {
    let (mut tokens, mut values, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for log in logs {
        let text = spelling(tokenizer, log.id);
        offsets.push(offset);
        offset += text.chars().count();
        values.push(log.logprob);
        tops.push(log.logprob.map(|own| {
            let mut top: serde_json::Map<String, Value> =
                log.top.iter().rev().map(|(id, p)| (spelling(tokenizer, *id), json!(p))).collect();
            top.entry(text.clone()).or_insert(json!(own));
            top
        }));
        tokens.push(text);
    }
    json!({"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets})
}

/// `logprobs` of the chat endpoint.
pub fn chat_logprobs(tokenizer: &Tokenizer, logs: &[TokenLog]) -> Value {
    let one = |id: u32, p: f32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        json!({"token": spelling(tokenizer, id), "logprob": p, "bytes": bytes})
    };
    let content: Vec<Value> = logs
        .iter()
        .map(|l| {
            let mut v = one(l.id, l.logprob.unwrap_or(0.0));
            v["top_logprobs"] = l.top.iter().map(|(id, p)| one(*id, *p)).collect();
            v
        })
        .collect();
    json!({"content": content, "refusal": null})
}
