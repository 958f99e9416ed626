//! What happened to one request. All times are nanoseconds since the start of the stage, on one monotonic clock.

use serde::{Deserialize, Serialize};

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum Outcome {
    /// A whole answer with at least one token.
    Ok,
    /// No connection.
    Connect(String),
    /// The connection broke before the answer was whole.
    Disconnected(String),
    /// Another status than 2xx.
    Status(u16, String),
    /// The server reported an error inside the stream.
    Stream(String),
    /// Not HTTP, not events, not JSON, or an answer without a token.
    Protocol(String),
    /// Another tool's file says that it failed.
    Failed(String),
    /// Not done within the time a request may take.
    Timeout,
    /// The run ended first: neither a success nor the server's failure.
    Cancelled,
}

impl Outcome {
    /// Neither a success nor cut short by us.
    pub fn failed(&self) -> bool {
        !matches!(self, Self::Ok | Self::Cancelled)
    }

    /// Class of the outcome, for counting.
    pub fn class(&self) -> String {
        match self {
            Self::Ok => "ok".into(),
            Self::Connect(_) => "connect".into(),
            Self::Disconnected(_) => "disconnected".into(),
            Self::Status(code, _) => format!("status {code}"),
            Self::Stream(_) => "stream error".into(),
            Self::Protocol(_) => "protocol".into(),
            Self::Failed(_) => "failed".into(),
            Self::Timeout => "timeout".into(),
            Self::Cancelled => "cancelled".into(),
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestTrace {
    /// When the schedule wanted it to start. Without a schedule: when its stream became free.
    pub scheduled_ns: u64,
    /// When the client began to send it (the connection, if new, comes after this).
    pub sent_ns: u64,
    /// When each chunk with output arrived, in order.
    pub chunks_ns: Vec<u64>,
    /// Output tokens in each chunk where the server says so; else empty.
    pub chunk_tokens: Vec<u32>,
    /// When the response was over, or given up.
    pub end_ns: u64,
    /// Prompt tokens: the server's `usage`, else what the data set knows.
    pub input_tokens: Option<u32>,
    /// Output tokens: the server's `usage`, else one a chunk.
    pub output_tokens: u32,
    /// Whether `output_tokens` is the server's count.
    pub counted_by_server: bool,
    /// How it ended.
    pub outcome: Outcome,
}

impl RequestTrace {
    /// A whole answer.
    pub fn ok(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    /// First output.
    pub fn first_ns(&self) -> Option<u64> {
        self.chunks_ns.first().copied()
    }

    /// Last output.
    pub fn last_ns(&self) -> Option<u64> {
        self.chunks_ns.last().copied()
    }

    /// Tokens each chunk brought: as the server says, or one each when there are as many chunks as tokens. `None` when
    /// nobody can tell: a token's time is then not known.
    pub fn tokens_by_chunk(&self) -> Option<Vec<u32>> {
        let sum: u64 = self.chunk_tokens.iter().map(|&t| u64::from(t)).sum();
        if self.chunk_tokens.len() == self.chunks_ns.len() && sum == u64::from(self.output_tokens) {
            return Some(self.chunk_tokens.clone());
        }
        (self.chunks_ns.len() == self.output_tokens as usize).then(|| vec![1; self.chunks_ns.len()])
    }
}
