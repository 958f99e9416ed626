//! Tasks about a whole pipeline: retrieval-augmented answers, and agents that call tools.

pub mod agent;
pub mod retrieval;

use serde_json::Value as Json;

pub use agent::Agent;
pub use retrieval::Retrieval;

/// What a task file's `retrieval` or `agent` key asks for.
#[derive(Debug)]
pub enum Pipeline {
    /// A question with contexts that were retrieved for it.
    Retrieval(Retrieval),
    /// A conversation with tool calls.
    Agent(Agent),
}

impl Pipeline {
    /// Reads the value of `retrieval`.
    pub fn retrieval(value: &Json) -> Result<Self, String> {
        Retrieval::parse(value).map(Self::Retrieval)
    }

    /// Reads the value of `agent`.
    pub fn agent(value: &Json) -> Result<Self, String> {
        Agent::parse(value).map(Self::Agent)
    }

    /// Whether prompts are made from the conversation and not from `doc_to_text`.
    pub fn makes_prompt(&self) -> bool {
        matches!(self, Self::Agent(_))
    }

    /// Names of metrics of this kind of task.
    fn names(&self) -> &'static [&'static str] {
        match self {
            Self::Retrieval(_) => retrieval::METRICS,
            Self::Agent(_) => agent::METRICS,
        }
    }

    /// The metric of that name.
    pub fn metric(&self, name: &str) -> Option<&'static str> {
        self.names().iter().copied().find(|n| *n == name)
    }

    /// All names, for messages.
    pub fn known_metrics(&self) -> String {
        self.names().join(", ")
    }

    /// Metrics where the file lists none.
    pub fn default_metrics(&self) -> &'static [&'static str] {
        match self {
            Self::Retrieval(_) => &[
                "exact_match",
                "contains",
                "rouge_l",
                "faithfulness",
                "context_gain",
                "context_precision",
                "context_recall",
            ],
            Self::Agent(_) => agent::METRICS,
        }
    }
}

/// Reads keys, all of them strings, of which none but `known` may stand there.
fn string_keys<'a>(
    value: &'a Json,
    known: &[&str],
) -> Result<impl Fn(&str) -> Result<Option<String>, String> + 'a, String> {
    let map = value.as_object().ok_or_else(|| format!("expected keys, found {value}"))?;
    if let Some(key) = map.keys().find(|k| !known.contains(&k.as_str())) {
        return Err(format!("unknown key `{key}`; there are {}", known.join(", ")));
    }
    Ok(move |key: &str| match map.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("`{key}`: expected text, found {other}")),
    })
}
