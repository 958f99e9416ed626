//! Requests and answers of the OpenAI API: completions and chat, streamed or whole.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::load::http::Target;

/// Which endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// Path below the target's prefix.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
}

/// How requests are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// Endpoint.
    pub endpoint: Endpoint,
    /// Model name in the body.
    pub model: String,
    /// Stream the answer.
    pub stream: bool,
    /// Make answers exactly as long as asked, by `ignore_eos` and `min_tokens` (vLLM's names).
    pub exact_output: bool,
    /// Further members of the body, overriding ours.
    pub extra: serde_json::Map<String, Value>,
}

impl Dialect {
    /// The JSON body. `messages` becomes one prompt for [`Endpoint::Completions`]: contents joined by blank lines.
    pub fn body(&self, messages: &[Message], output_tokens: Option<u32>) -> Vec<u8> {
        let mut body = json!({ "model": self.model, "stream": self.stream });
        if let Some(map) = body.as_object_mut() {
            match self.endpoint {
                Endpoint::Chat => map.insert("messages".into(), json!(messages)),
                Endpoint::Completions => {
                    let parts: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                    map.insert("prompt".into(), parts.join("\n\n").into())
                }
            };
            if let Some(n) = output_tokens {
                map.insert("max_tokens".into(), n.into());
                if self.exact_output {
                    map.insert("ignore_eos".into(), true.into());
                    map.insert("min_tokens".into(), n.into());
                }
            }
            if self.stream {
                map.insert("stream_options".into(), json!({"include_usage": true, "continuous_usage_stats": true}));
            }
            map.extend(self.extra.clone());
        }
        body.to_string().into_bytes()
    }
}

/// The constant part of every request.
#[derive(Clone, Debug)]
pub struct RequestHead {
    before_length: Vec<u8>,
}

impl RequestHead {
    /// `headers` are extra ones; an API key becomes `Authorization: Bearer`.
    pub fn new(target: &Target, path: &str, api_key: Option<&str>, headers: &[(String, String)]) -> Self {
        let mut head = format!(
            "POST {}{path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: lowbit-load\r\nAccept: text/event-stream, application/json\r\n\
             Content-Type: application/json\r\n",
            target.prefix,
            target.authority()
        );
        if let Some(key) = api_key {
            head.push_str(&format!("Authorization: Bearer {key}\r\n"));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("Content-Length: ");
        Self { before_length: head.into_bytes() }
    }

    /// Bytes on the wire.
    pub fn with_body(&self, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.before_length.len() + body.len() + 16);
        out.extend_from_slice(&self.before_length);
        out.extend_from_slice(body.len().to_string().as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
        out.extend_from_slice(body);
        out
    }
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    message: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
    tool_calls: Option<Value>,
}

/// Token counts of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Of the prompt.
    #[serde(default)]
    pub prompt_tokens: Option<u32>,
    /// Of the answer so far.
    #[serde(default)]
    pub completion_tokens: Option<u32>,
}

/// One event or one whole answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// It brought output: text, reasoning or a tool call, even an empty text of a choice that is no mere opening.
    pub has_output: bool,
    /// The text.
    pub text: String,
    /// Counts, where they are given.
    pub usage: Option<Usage>,
    /// An error object instead.
    pub error: Option<String>,
    /// `[DONE]`.
    pub done: bool,
}

/// Reads the data of an event, or a whole body.
pub fn read(data: &[u8]) -> std::result::Result<Part, String> {
    if data.trim_ascii() == b"[DONE]" {
        return Ok(Part { done: true, ..Part::default() });
    }
    let wire: Wire = serde_json::from_slice(data).map_err(|e| {
        let shown = String::from_utf8_lossy(data.get(..data.len().min(120)).unwrap_or_default()).into_owned();
        format!("not a completion object ({e}): {shown}")
    })?;
    let error = wire.error.filter(|e| !e.is_null()).map(|e| match e.get("message").and_then(Value::as_str) {
        Some(m) => m.to_string(),
        None => e.to_string(),
    });
    let mut part = Part { usage: wire.usage, error, ..Part::default() };
    for choice in wire.choices {
        let delta = choice.delta.or(choice.message);
        let texts = [
            choice.text,
            delta.as_ref().and_then(|d| d.content.clone()),
            delta.as_ref().and_then(|d| d.reasoning_content.clone()),
        ];
        for text in texts.into_iter().flatten().filter(|t| !t.is_empty()) {
            part.has_output = true;
            part.text.push_str(&text);
        }
        part.has_output |=
            delta.is_some_and(|d| d.tool_calls.is_some_and(|t| t.as_array().is_some_and(|a| !a.is_empty())));
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_both_endpoints() {
        let chat = read(br#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#).unwrap();
        assert!(!chat.has_output, "an opening brings no token");
        let chat =
            read(br#"{"choices":[{"delta":{"content":"hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#)
                .unwrap();
        assert!(chat.has_output && chat.text == "hi" && chat.usage.unwrap().completion_tokens == Some(2));
        assert!(read(br#"{"choices":[{"delta":{"reasoning_content":"so"}}],"usage":null}"#).unwrap().has_output);
        let text = read(br#"{"choices":[{"text":" a","index":0,"finish_reason":null}]}"#).unwrap();
        assert_eq!(text.text, " a");
        assert_eq!(read(br#"{"error":{"message":"full","code":503}}"#).unwrap().error.as_deref(), Some("full"));
        assert!(read(b" [DONE]").unwrap().done);
        assert!(read(b"<html>").is_err());
    }

    #[test]
    fn bodies() {
        let mut d = Dialect {
            endpoint: Endpoint::Completions,
            model: "m".into(),
            stream: true,
            exact_output: true,
            extra: serde_json::Map::new(),
        };
        let messages = [
            Message { role: "system".into(), content: "s".into() },
            Message { role: "user".into(), content: "u".into() },
        ];
        let v: Value = serde_json::from_slice(&d.body(&messages, Some(7))).unwrap();
        assert_eq!(
            (v["prompt"].as_str(), v["max_tokens"].as_u64(), v["ignore_eos"].as_bool()),
            (Some("s\n\nu"), Some(7), Some(true))
        );
        assert_eq!(v["stream_options"]["include_usage"], true);
        d.endpoint = Endpoint::Chat;
        d.extra.insert("temperature".into(), 0.into());
        let v: Value = serde_json::from_slice(&d.body(&messages, None)).unwrap();
        assert!(v.get("max_tokens").is_none() && v["messages"][1]["content"] == "u" && v["temperature"] == 0);
    }
}
