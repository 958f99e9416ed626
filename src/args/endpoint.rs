//! `lowbit eval`: models behind a server, and judges.

use clap::Args;

#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Endpoints")]
pub struct EndpointArgs {
    /// Ask the model of this OpenAI-compatible server, such as http://127.0.0.1:8000, instead of MODEL (docs/endpoints.md).
    #[arg(long, value_name = "URL", conflicts_with = "model")]
    pub endpoint: Option<String>,
    /// Its name in requests (default: the first of /v1/models).
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub endpoint_model: Option<String>,
    /// Environment variable with its bearer token.
    #[arg(long, value_name = "VAR", requires = "endpoint")]
    pub api_key_env: Option<String>,
    /// Compare with the model of this server, instead of --reference.
    #[arg(long, value_name = "URL", conflicts_with = "reference")]
    pub reference_endpoint: Option<String>,
    /// Its name in requests.
    #[arg(long, value_name = "NAME", requires = "reference_endpoint")]
    pub reference_endpoint_model: Option<String>,
    /// Environment variable with its bearer token.
    #[arg(long, value_name = "VAR", requires = "reference_endpoint")]
    pub reference_api_key_env: Option<String>,
    /// Let servers write texts by /v1/completions, the prompt as it is, instead of /v1/chat/completions.
    #[arg(long)]
    pub completions: bool,
    /// Model whose tokenizer (and chat template) the servers have (default: their /tokenize).
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<String>,
    /// Requests to a server at once.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub concurrency: usize,
    /// Seconds a request may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,
    /// Further tries of a request after no answer, 429, 5xx or an answer that cannot be read.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub retries: u32,
    /// Further header of requests to --endpoint and --reference-endpoint, `NAME: VALUE`.
    #[arg(long, value_name = "HEADER")]
    pub header: Vec<String>,
    /// Further members of every body, as a JSON object; null takes one of ours out.
    #[arg(long, value_name = "JSON")]
    pub body: Option<String>,
}

#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Judge")]
pub struct JudgeArgs {
    /// Server of the model that judges texts, for tasks with `judge` or `judge_pairwise` (docs/endpoints.md).
    #[arg(long, value_name = "URL")]
    pub judge: Option<String>,
    /// Its name in requests (default: the first of /v1/models).
    #[arg(long, value_name = "NAME", requires = "judge")]
    pub judge_model: Option<String>,
    /// Environment variable with its bearer token.
    #[arg(long, value_name = "VAR", requires = "judge")]
    pub judge_api_key_env: Option<String>,
    /// Further members of every body to it, as a JSON object.
    #[arg(long, value_name = "JSON", requires = "judge")]
    pub judge_body: Option<String>,
}

impl EndpointArgs {
    /// Whether a side is behind a server.
    pub fn any(&self) -> bool {
        self.endpoint.is_some() || self.reference_endpoint.is_some()
    }
}
