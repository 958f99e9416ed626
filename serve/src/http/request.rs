//! Request bodies: what both endpoints share, read field by field so that an error names the field.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use lowbit_model::Sampling;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use crate::engine::{Engine, Event, Job, Params};
use crate::guide::Form;

/// Answers of one request at most.
const MOST_CHOICES: usize = 128;
/// Alternatives of a token at most.
const MOST_LOGPROBS: usize = 20;

/// A string or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    #[serde(default)]
    pub include_usage: bool,
    /// With `include_usage`: the usage so far with each chunk, as vLLM has it.
    #[serde(default)]
    pub continuous_usage_stats: bool,
}

/// Which usage a stream tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamUsage {
    /// None.
    Never,
    /// In a last chunk.
    Last,
    /// In a last chunk, and with each chunk that of its answer so far.
    Each,
}

/// Fields both endpoints know. Unknown fields are ignored, as other servers do.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Common {
    pub model: Option<String>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub seed: Option<i64>,
    pub n: Option<usize>,
    pub stop: Option<OneOrMany>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<serde_json::Map<String, Value>>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub response_format: Option<Value>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<String>,
    pub guided_choice: Option<Vec<String>>,
    pub guided_grammar: Option<String>,
    pub structured_outputs: Option<Value>,
}

/// A schema, or a text that is one.
fn schema(field: &'static str, given: &Value) -> Result<Form, ApiError> {
    let parsed = given.as_str().map(serde_json::from_str).transpose();
    let parsed: Option<Value> = parsed.map_err(|e| ApiError::field(field, e.to_string()))?;
    Ok(Form::Schema(parsed.unwrap_or_else(|| given.clone())))
}

/// vLLM's later name for the `guided_*` fields: an object with one of them.
fn structured(given: &Value) -> Result<Form, ApiError> {
    const FIELD: &str = "structured_outputs";
    let wrong = |why: String| ApiError::field(FIELD, why);
    let members = given.as_object().ok_or_else(|| wrong("an object with json, regex, choice or grammar".into()))?;
    let mut forms = Vec::new();
    for (name, value) in members.iter().filter(|(_, v)| !v.is_null()) {
        let text = || value.as_str().map(str::to_string).ok_or_else(|| wrong(format!("`{name}` is a text")));
        forms.push(match name.as_str() {
            "json" => schema(FIELD, value)?,
            "regex" => Form::Regex(text()?),
            "grammar" => Form::Grammar(text()?),
            "choice" => {
                let texts = |l: &Vec<Value>| l.iter().map(|t| t.as_str().map(str::to_string)).collect();
                let list: Option<Vec<String>> = value.as_array().and_then(texts);
                Form::Choice(list.ok_or_else(|| wrong("`choice` is a list of texts".into()))?)
            }
            other => {
                return Err(wrong(format!("`{other}` is not supported; json, regex, choice and grammar are")));
            }
        });
    }
    match (forms.pop(), forms.len()) {
        (Some(form), 0) => Ok(form),
        _ => Err(wrong("exactly one of json, regex, choice and grammar".into())),
    }
}

fn within(name: &'static str, v: Option<f32>, low: f32, high: f32) -> Result<(), ApiError> {
    match v {
        Some(v) if !(v >= low && v <= high) => Err(ApiError::field(name, format!("{v} is not in {low} ..= {high}"))),
        _ => Ok(()),
    }
}

impl Common {
    /// Answers asked for.
    pub fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MOST_CHOICES => Ok(n),
            n => Err(ApiError::field("n", format!("{n} is not in 1 ..= {MOST_CHOICES}"))),
        }
    }

    /// The usage that a stream tells.
    pub fn stream_usage(&self) -> StreamUsage {
        match &self.stream_options {
            Some(o) if o.include_usage && o.continuous_usage_stats => StreamUsage::Each,
            Some(o) if o.include_usage => StreamUsage::Last,
            _ => StreamUsage::Never,
        }
    }

    /// Engine parameters; `max_tokens` is left to the endpoint.
    pub fn params(&self, vocab: usize) -> Result<Params, ApiError> {
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        let top_k = match self.top_k.unwrap_or(0) {
            -1 | 0 => 0,
            k => usize::try_from(k).map_err(|_| ApiError::field("top_k", format!("{k} is below -1")))?,
        };
        let mut bias = Vec::new();
        for (token, value) in self.logit_bias.iter().flatten() {
            let id = token.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
            let value = value.as_f64().filter(|v| (-100.0..=100.0).contains(v));
            let wrong = || ApiError::field("logit_bias", format!("`{token}`: a token id and a number in -100 ..= 100"));
            bias.push((id.ok_or_else(wrong)?, value.ok_or_else(wrong)? as f32));
        }
        let stop = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(s)) => vec![s.clone()],
            Some(OneOrMany::Many(list)) => list.clone(),
        };
        if stop.len() > 64 || stop.iter().any(|s| s.len() > 4096) {
            return Err(ApiError::field("stop", "up to 64 texts of up to 4096 bytes"));
        }
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
        Ok(Params {
            max_tokens: 0,
            sampling: Sampling {
                temperature: self.temperature.unwrap_or(1.0),
                top_k,
                top_p: self.top_p.unwrap_or(1.0),
                min_p: self.min_p.unwrap_or(0.0),
                seed: self.seed.map_or_else(now, |s| s as u64),
            },
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: bias,
            stop,
            stop_tokens: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special: self.skip_special_tokens.unwrap_or(true),
            logprobs: None,
            prompt_logprobs: false,
            form: self.form()?,
            without_draft: false,
        })
    }

    fn form(&self) -> Result<Option<Form>, ApiError> {
        let mut forms = Vec::new();
        if let Some(given) = &self.guided_json {
            // vLLM also takes the schema as text.
            forms.push(schema("guided_json", given)?);
        }
        forms.extend(self.guided_regex.clone().map(Form::Regex));
        forms.extend(self.guided_choice.clone().map(Form::Choice));
        forms.extend(self.guided_grammar.clone().map(Form::Grammar));
        if let Some(given) = &self.structured_outputs {
            forms.push(structured(given)?);
        }
        if let Some(format) = &self.response_format {
            match format.get("type").and_then(Value::as_str) {
                Some("text") => {}
                Some("json_object") => forms.push(Form::Schema(serde_json::json!({"type": "object"}))),
                Some("json_schema") => {
                    let schema = format.get("json_schema").and_then(|s| s.get("schema"));
                    let missing = || ApiError::field("response_format", "`json_schema.schema` is missing");
                    forms.push(Form::Schema(schema.ok_or_else(missing)?.clone()));
                }
                _ => return Err(ApiError::field("response_format", "`type` is text, json_object or json_schema")),
            }
        }
        match forms.len() {
            0 | 1 => Ok(forms.pop()),
            _ => Err(ApiError::bad("only one of response_format, structured_outputs and guided_* at a time")),
        }
    }

    /// Checks `model` against the name served.
    pub fn check_model(&self, served: &str) -> Result<(), ApiError> {
        match &self.model {
            Some(m) if m != served => Err(ApiError::new(
                axum::http::StatusCode::NOT_FOUND,
                "not_found_error",
                format!("the model `{m}` does not exist; `{served}` is served"),
            )),
            _ => Ok(()),
        }
    }
}

/// Checked number of alternatives.
pub fn alternatives(name: &'static str, n: usize) -> Result<usize, ApiError> {
    if n <= MOST_LOGPROBS { Ok(n) } else { Err(ApiError::field(name, format!("{n} is more than {MOST_LOGPROBS}"))) }
}

/// Submits `n` answers to each prompt; events carry the index `prompt · n + answer`.
pub fn submit(
    engine: &Engine,
    prompts: Vec<Vec<u32>>,
    n: usize,
    params: &Params,
) -> Result<UnboundedReceiver<(usize, Event)>, ApiError> {
    let (events, receiver) = unbounded_channel();
    let (arrived, asked) = (Instant::now(), prompts.len());
    let mut jobs = Vec::new();
    for (p, prompt) in prompts.into_iter().enumerate() {
        for i in 0..n {
            let mut params = params.clone();
            params.sampling.seed = params.sampling.seed.wrapping_add(i as u64);
            jobs.push(Job { index: p * n + i, prompt: prompt.clone(), params, events: events.clone(), arrived });
        }
    }
    engine.submit(jobs).map_err(|e| ApiError::from_engine(&e, engine.retry_after().as_secs().max(1)))?;
    (0..asked).for_each(|_| engine.metrics.choices.observe(n));
    Ok(receiver)
}
