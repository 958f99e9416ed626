//! What a task asks of a model, and the model's answer.

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

/// One question to the model: the `idx`-th of document `doc` of `task`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The task's name.
    pub task: String,
    /// Position of the document in the evaluated split, from 0.
    pub doc: usize,
    /// Position among the document's requests, from 0: the choice of a multiple-choice document.
    pub idx: usize,
    /// What is asked.
    #[serde(flatten)]
    pub kind: RequestKind,
}

/// A message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Text.
    pub content: String,
    /// An assistant's calls of tools, in OpenAI's form but for their arguments, which are objects: as templates take them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Json>,
    /// Of what a tool returned: the call it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }

    /// As OpenAI's API takes it: arguments are text, and calls alone have no content.
    pub fn for_api(&self) -> Json {
        let mut out = json!({"role": self.role, "content": self.content});
        let text = |mut call: Json| {
            if let Some(arguments) = call.pointer_mut("/function/arguments").filter(|a| !a.is_string()) {
                *arguments = arguments.to_string().into();
            }
            call
        };
        if !self.tool_calls.is_empty() {
            out["tool_calls"] = self.tool_calls.iter().cloned().map(text).collect();
            if self.content.is_empty() {
                out["content"] = Json::Null;
            }
        }
        if let Some(id) = &self.tool_call_id {
            out["tool_call_id"] = id.as_str().into();
        }
        out
    }
}

/// The kinds of question; named as lm-evaluation-harness names them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RequestKind {
    /// How likely `continuation` is after `context`, and whether greedy decoding would give exactly it.
    ///
    /// The pair is encoded as one text; white space at the end of `context` belongs to the continuation's tokens.
    #[serde(rename = "loglikelihood")]
    LogLikelihood {
        /// Text given.
        context: String,
        /// Text scored.
        continuation: String,
    },
    /// How likely a whole text is, every token scored once, by windows of the model's length.
    #[serde(rename = "loglikelihood_rolling")]
    Rolling {
        /// Text scored.
        text: String,
    },
    /// What the model writes after `context`.
    #[serde(rename = "generate_until")]
    Generate {
        /// Text given.
        context: String,
        /// Stop at the first occurrence of any of these; the text returned ends before it. End-of-text tokens stop
        /// always.
        until: Vec<String>,
        /// Tokens at most.
        max_new_tokens: usize,
        /// Softmax temperature where `do_sample`.
        temperature: f64,
        /// Sample instead of taking the most likely token.
        do_sample: bool,
        /// The same as a conversation, where the prompt is one: what a chat endpoint is given instead of `context`. A last
        /// message of the assistant is the start of the answer.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        messages: Vec<Message>,
        /// Tools that the conversation may call, in OpenAI's form, where they are not told in words.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Json>,
    },
}

impl RequestKind {
    /// The text the model is given: nothing for a rolling request, which scores all of its text.
    pub fn context(&self) -> &str {
        match self {
            Self::LogLikelihood { context, .. } | Self::Generate { context, .. } => context,
            Self::Rolling { .. } => "",
        }
    }
}

/// The answer to a [`Request`] of the same kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Response {
    /// To [`RequestKind::LogLikelihood`].
    #[serde(rename = "loglikelihood")]
    LogLikelihood {
        /// Sum of the natural logarithms of the continuation's token probabilities.
        log_prob: f64,
        /// Whether each of its tokens is the most likely one at its place (the first among equals).
        greedy: bool,
    },
    /// To [`RequestKind::Rolling`].
    #[serde(rename = "loglikelihood_rolling")]
    Rolling {
        /// Sum over all tokens of the text.
        log_prob: f64,
    },
    /// To [`RequestKind::Generate`].
    #[serde(rename = "generate_until")]
    Generated {
        /// What the model wrote, cut before the stop text.
        text: String,
    },
}
