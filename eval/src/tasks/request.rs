//! What a task asks of a model, and the model's answer.

use serde::{Deserialize, Serialize};

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
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
