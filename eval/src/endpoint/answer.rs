//! What is read from a server's answers; nothing that is not there is made up.

use serde_json::{Value as Json, json};

use super::Reply;

/// What an answer holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    /// Text.
    Text(String),
    /// Sum over the scored tokens.
    Scored {
        /// Natural logarithms.
        log_prob: f64,
        /// Whether each is the most likely one at its place.
        greedy: bool,
    },
}

/// Why an answer cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unfit {
    /// Why.
    pub(super) problem: String,
    /// Whether asking again may help.
    pub(super) again: bool,
}

impl Unfit {
    /// A broken answer: the next may be whole.
    fn broken(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), again: true }
    }

    /// What the server does by its nature.
    fn lasting(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), again: false }
    }
}

/// Status and beginning of a body, the message of an error object alone.
pub(super) fn shown(reply: &Reply) -> String {
    let parsed: Option<Json> = serde_json::from_slice(&reply.body).ok();
    let message = parsed.as_ref().and_then(|v| {
        let error = v.get("error").unwrap_or(v);
        error.as_str().or_else(|| ["message", "detail"].iter().find_map(|k| error.get(k)?.as_str())).map(str::to_owned)
    });
    let text = message.unwrap_or_else(|| String::from_utf8_lossy(&reply.body).into_owned());
    let text: String = text.trim().chars().take(300).collect();
    format!("status {}{}", reply.status, if text.is_empty() { String::new() } else { format!(": {text}") })
}

fn choice(body: &[u8]) -> Result<Json, Unfit> {
    let value: Json = serde_json::from_slice(body).map_err(|_| {
        let text: String = String::from_utf8_lossy(body).chars().take(120).collect();
        Unfit::broken(format!("answered what is no JSON: {text}"))
    })?;
    if value.get("error").is_some_and(|e| !e.is_null()) {
        return Err(Unfit::broken(format!(
            "answered {}",
            shown(&Reply { status: 200, retry_after: None, body: body.to_vec() })
        )));
    }
    let first = value.get("choices").and_then(Json::as_array).and_then(|c| c.first()).cloned();
    first.ok_or_else(|| Unfit::broken("answered without `choices`"))
}

/// The text of either endpoint, cut before the first of `until`. Calls of tools become the JSON that agents are read from.
pub(super) fn text(body: &[u8], until: &[String]) -> Result<Found, Unfit> {
    let choice = choice(body)?;
    let reason = choice.get("finish_reason").and_then(Json::as_str).unwrap_or_default();
    let message = choice.get("message");
    let content = message.map_or_else(|| choice.get("text"), |m| m.get("content")).and_then(Json::as_str);
    let calls = message.and_then(|m| m.get("tool_calls")).filter(|c| c.as_array().is_some_and(|a| !a.is_empty()));
    let text = match (content, calls) {
        (_, Some(calls)) => json!({ "tool_calls": calls }).to_string(),
        (Some(text), None) => text.to_owned(),
        // A model that only thought until its tokens were used up has written nothing.
        (None, None) if ["stop", "length"].contains(&reason) && message.is_some() => String::new(),
        (None, None) if reason.is_empty() => return Err(Unfit::broken("answered without a text")),
        (None, None) => return Err(Unfit::lasting(format!("gave no text: it finished by `{reason}`"))),
    };
    if reason == "content_filter" {
        return Err(Unfit::lasting("gave a text that its content filter cut off"));
    }
    let end = until.iter().filter(|u| !u.is_empty()).filter_map(|u| text.find(u.as_str())).min();
    Ok(Found::Text(end.and_then(|e| text.get(..e)).map_or_else(|| text.clone(), str::to_owned)))
}

/// Sum of the last `scored` of the `tokens` log-probabilities of an echoed prompt.
pub(super) fn scores(body: &[u8], tokens: usize, scored: usize) -> Result<Found, Unfit> {
    const HINT: &str =
        "\nhint: log-likelihoods need /v1/completions with `echo` and `logprobs`, as `lowbit serve` and vLLM have them";
    let value: Json = serde_json::from_slice(body).unwrap_or_default();
    let choice = choice(body)?;
    let logs = choice.get("logprobs").filter(|l| !l.is_null());
    let logs = logs.ok_or_else(|| Unfit::lasting(format!("answered without `logprobs`{HINT}")))?;
    let list = |key: &str| logs.get(key).and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
    let (names, values, tops) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    if values.len() < tokens {
        return Err(Unfit::lasting(format!(
            "answered {} log-probabilities for {tokens} tokens: it does not echo the prompt{HINT}",
            values.len()
        )));
    }
    // The request's one new token is listed behind the prompt's: without it the list is shifted (some servers drop BOS).
    if choice.get("finish_reason").and_then(Json::as_str) == Some("length") && values.len() == tokens {
        return Err(Unfit::lasting(format!(
            "answered {tokens} log-probabilities for {tokens} tokens sent and one written: one is missing"
        )));
    }
    let counted = value.get("usage").and_then(|u| u.get("prompt_tokens")).and_then(Json::as_u64);
    if counted.is_some_and(|n| n != tokens as u64) {
        return Err(Unfit::lasting(format!(
            "counts {} tokens where {tokens} were sent: it adds tokens of its own",
            counted.unwrap_or_default()
        )));
    }
    let mut sum = 0.0;
    let mut greedy = true;
    for at in tokens.saturating_sub(scored)..tokens {
        let log_prob = values.get(at).and_then(Json::as_f64).filter(|v| v.is_finite());
        let log_prob = log_prob.ok_or_else(|| Unfit::lasting(format!("gave no log-probability of token {at}")))?;
        sum += log_prob;
        // The most likely token is the one of largest value; of equals the first listed.
        let top = tops.get(at).and_then(Json::as_object);
        let top = top.ok_or_else(|| Unfit::lasting(format!("gave no `top_logprobs` of token {at}")))?;
        let mut best: Option<(&String, f64)> = None;
        for (name, value) in top {
            let value = value.as_f64().unwrap_or(f64::NEG_INFINITY);
            if best.is_none_or(|b| value > b.1) {
                best = Some((name, value));
            }
        }
        let name = names.get(at).and_then(Json::as_str);
        // Two tokens may be spelled alike, parts of a character are: the value tells them apart.
        greedy &= best.is_some_and(|(n, v)| name == Some(n.as_str()) && log_prob >= v);
    }
    Ok(Found::Scored { log_prob: sum, greedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Json, until: &[&str]) -> Result<Found, Unfit> {
        let until: Vec<String> = until.iter().map(|u| (*u).to_owned()).collect();
        text(value.to_string().as_bytes(), &until)
    }

    #[test]
    fn texts() {
        let chat = |m: Json, reason: &str| json!({"choices": [{"message": m, "finish_reason": reason}]});
        assert_eq!(read(chat(json!({"content": "a\n\nb"}), "stop"), &["", "\n\n"]), Ok(Found::Text("a".into())));
        let calls = json!({"content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\":1}"}}]});
        let Ok(Found::Text(found)) = read(chat(calls, "tool_calls"), &[]) else { panic!() };
        assert_eq!(crate::tasks::pipeline::agent::calls_in(&found)[0].arguments, json!({"x": 1}));
        assert_eq!(read(json!({"choices": [{"text": "é"}]}), &[]), Ok(Found::Text("é".into())));
        assert_eq!(
            read(chat(json!({"content": null, "reasoning_content": "hm"}), "length"), &[]),
            Ok(Found::Text(String::new()))
        );
        assert!(!read(chat(json!({"content": null}), "content_filter"), &[]).unwrap_err().again);
        for broken in [json!({"choices": []}), json!({"error": {"message": "full"}}), json!([1])] {
            assert!(read(broken, &[]).unwrap_err().again);
        }
        assert!(text(b"<html>", &[]).unwrap_err().problem.contains("<html>"));
    }

    #[test]
    fn echoed_scores() {
        let body = |usage: u64| {
            json!({"usage": {"prompt_tokens": usage}, "choices": [{"logprobs": {
                "tokens": ["a", "b", "c", "x"], "token_logprobs": [null, -1.0, -0.5, -0.1],
                "top_logprobs": [null, {"z": -0.25, "b": -1.0}, {"c": -0.5, "d": -0.5}, {"x": -0.1}]}}]})
            .to_string()
        };
        let get = |scored| scores(body(3).as_bytes(), 3, scored);
        assert_eq!(get(1), Ok(Found::Scored { log_prob: -0.5, greedy: true }));
        assert_eq!(get(2), Ok(Found::Scored { log_prob: -1.5, greedy: false }));
        assert!(get(3).unwrap_err().problem.contains("token 0"));
        assert!(scores(body(4).as_bytes(), 3, 1).unwrap_err().problem.contains("adds tokens"));
        let e = scores(body(9).as_bytes(), 9, 1).unwrap_err();
        assert!(!e.again && e.problem.contains("does not echo"), "{e:?}");
        let shifted = body(4).replace("\"logprobs\":", "\"finish_reason\":\"length\",\"logprobs\":");
        assert!(scores(shifted.as_bytes(), 4, 1).unwrap_err().problem.contains("one is missing"));
        let none = json!({"choices": [{"text": "a", "logprobs": null}]}).to_string();
        assert!(scores(none.as_bytes(), 3, 1).unwrap_err().problem.contains("without `logprobs`"));
    }
}
