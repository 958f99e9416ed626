//! `lowbit serve`, `load`, `capacity` and `compare`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Model.
    pub model: String,
    /// Address to listen on; anything but loopback opens the server to the network.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port (0: any free one; the address is printed).
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Name of the model in the API (default: MODEL).
    #[arg(long)]
    pub served_name: Option<String>,
    /// Ends when stdin does: a server must not outlive the command that started it, however that ends.
    #[arg(long, hide = true)]
    pub end_with_stdin: bool,
    /// A cheaper model with the same tokenizer that proposes tokens, such as MODEL quantized; the text stays MODEL's own.
    #[arg(long, value_name = "MODEL")]
    pub draft: Option<String>,
    /// Tokens the draft proposes at a time.
    #[arg(long, default_value_t = 4)]
    pub draft_tokens: usize,
    /// Ask the draft while no more than this many sequences run.
    #[arg(long, default_value_t = 4)]
    pub draft_max_running: usize,
    /// Sequences that run at the same time.
    #[arg(long, default_value_t = 64)]
    pub max_concurrent: usize,
    /// Requests that may wait; further ones are answered 429.
    #[arg(long, default_value_t = 256)]
    pub max_queue: usize,
    /// Tokens the KV cache holds.
    #[arg(long, default_value_t = 32_768)]
    pub kv_tokens: usize,
    /// How keys and values are kept: `float` as the device does by itself, `int8` or `fp8` in a quarter of the memory (CPU), a scale for
    /// each token and head.
    #[arg(long, value_enum, default_value_t = KvCacheArg::Float)]
    pub kv_cache: KvCacheArg,
    /// Longest prompt plus answer (default: the model's own limit).
    #[arg(long)]
    pub max_len: Option<usize>,
    /// Prompt tokens computed between two steps of the running sequences.
    #[arg(long, default_value_t = 256)]
    pub prefill_tokens: usize,
    /// Prompts kept for requests that begin alike (0: none).
    #[arg(long, default_value_t = 64)]
    pub kept_prompts: usize,
    /// Tokens of a chat answer that names no limit.
    #[arg(long, default_value_t = 1024)]
    pub default_max_tokens: usize,
    /// Environment variable that holds the bearer token requests must carry.
    #[arg(long, value_name = "NAME")]
    pub api_key_env: Option<String>,
    /// Largest request body in bytes.
    #[arg(long, default_value_t = 8 << 20)]
    pub max_body: usize,
    /// Seconds a client has to send a request's header, and its body.
    #[arg(long, default_value_t = 30)]
    pub read_timeout: u64,
    /// Connections at a time.
    #[arg(long, default_value_t = 4096)]
    pub max_connections: usize,
    /// Seconds running requests get to finish after SIGTERM.
    #[arg(long, default_value_t = 60)]
    pub drain: u64,
}

#[derive(Args, Debug)]
pub struct LoadArgs {
    /// OpenAI-compatible server, such as http://127.0.0.1:8000.
    #[arg(required_unless_present = "import")]
    pub url: Option<String>,
    /// Instead of a server: a load record, a GuideLLM report (json) or a result of `vllm bench serve --save-detailed`, for the
    /// same tables, verdicts and records.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["url", "find_max"])]
    pub import: Option<PathBuf>,
    /// synchronous, concurrent:1,2,4, throughput[:512], constant:RATES, poisson:RATES, gamma:SHAPE:RATES,
    /// sweep[:10[:poisson[:512]]], replay[:SPEED]. With --find-max what is searched: poisson, constant, gamma:SHAPE, concurrent, replay.
    /// [default: synchronous; with --find-max poisson]
    #[arg(long)]
    pub profile: Option<String>,
    /// chat, rag, summarization, code, translation, long-context, demo; `input=512:128,output=256,prefix=0,turns=1`;
    /// a .jsonl, .json, .csv, .parquet or .txt file, or a folder of them; a hub data set (datasets/org/name[/file]); `text` for
    /// a text of our own.
    #[arg(long, default_value = "demo")]
    pub data: String,
    /// Model whose tokenizer makes the prompts of a workload or a trace as long as asked (else a word counts as a token) and counts
    /// the answers in conversations, which then say how long ours are.
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<String>,
    /// Ask the rows of a file in random order; not with replay.
    #[arg(long)]
    pub shuffle: bool,
    /// Output tokens where a row does not say.
    #[arg(long)]
    pub output_tokens: Option<u32>,
    /// Endpoint.
    #[arg(long, value_enum, default_value_t = EndpointArg::Chat)]
    pub endpoint: EndpointArg,
    /// Model name in the requests (default: the first of /v1/models).
    #[arg(long)]
    pub model: Option<String>,
    /// Ask for whole answers instead of streams.
    #[arg(long)]
    pub no_stream: bool,
    /// Let the model end its answers, instead of ignoring its end-of-text token.
    #[arg(long)]
    pub natural_output: bool,
    /// Bearer token (default: OPENAI_API_KEY).
    #[arg(long)]
    pub api_key: Option<String>,
    /// Further header, `NAME: VALUE`.
    #[arg(long)]
    pub header: Vec<String>,
    /// Further members of every body, as a JSON object.
    #[arg(long)]
    pub body: Option<String>,
    /// Seconds of a stage (30 when there is no --max-requests; a replay takes as long as its trace).
    #[arg(long)]
    pub duration: Option<f64>,
    /// Requests of a stage at most; with --find-max, of the first look at a rate.
    #[arg(long)]
    pub max_requests: Option<u64>,
    /// Requests of an open loop in flight at most; waiting counts.
    #[arg(long)]
    pub max_concurrency: Option<usize>,
    /// Stop at so many failures.
    #[arg(long)]
    pub max_errors: Option<u64>,
    /// Stop when a greater share of at least 20 requests failed.
    #[arg(long, default_value_t = 0.9)]
    pub max_error_rate: f64,
    /// Stop an open-loop stage once the server falls behind.
    #[arg(long)]
    pub stop_saturated: bool,
    /// Seconds a request may take.
    #[arg(long, default_value_t = 600.0)]
    pub timeout: f64,
    /// Seconds to wait for requests in flight at the end of a stage.
    #[arg(long, default_value_t = 30.0)]
    pub grace: f64,
    /// Left out at the start: below 1 a share of the stage, else seconds.
    #[arg(long, default_value_t = 0.0)]
    pub warmup: f64,
    /// Left out at the end, likewise.
    #[arg(long, default_value_t = 0.0)]
    pub cooldown: f64,
    /// Objective: guidellm/chatbot, mlperf/llama3.1-8b, ..., or ttft_p99<=200,itl_p99<=50.
    #[arg(long)]
    pub slo: Option<String>,
    /// Search the highest rate (or number of streams, or speed) that meets --slo.
    #[arg(long)]
    pub find_max: bool,
    /// Where the search begins: requests a second, streams, or a factor.
    #[arg(long, default_value_t = 1.0)]
    pub start_rate: f64,
    /// Nothing above this.
    #[arg(long, default_value_t = 10_000.0)]
    pub max_rate: f64,
    /// Width of the answer, relative.
    #[arg(long, default_value_t = 0.05)]
    pub tolerance: f64,
    /// Seed of texts and gaps.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print the table of another tool, by its definitions.
    #[arg(long = "as", value_enum)]
    pub show_as: Option<ToolArg>,
    /// Write the record, with every request, here.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Write a row a stage and latency here.
    #[arg(long)]
    pub csv: Option<PathBuf>,
    /// Replace existing files.
    #[arg(long)]
    pub force: bool,
}

/// See `--kv-cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum KvCacheArg {
    /// The device's own.
    #[default]
    Float,
    /// Eight bits.
    Int8,
    /// Eight bits, floats (e4m3).
    Fp8,
}

impl KvCacheArg {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// Endpoint of an OpenAI-compatible server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EndpointArg {
    /// /v1/completions.
    Completions,
    /// /v1/chat/completions.
    Chat,
}

/// Whose table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ToolArg {
    /// GuideLLM.
    Guidellm,
    /// vllm bench serve.
    Vllm,
    /// aiperf.
    Aiperf,
}

#[derive(Args, Debug)]
pub struct CapacityArgs {
    /// Load records (or files `lowbit load --import` reads), one a variant; `LOAD.json=GATE.json` adds the verdict on its
    /// accuracy.
    pub files: Vec<String>,
    /// Requests a second at the peak.
    #[arg(long)]
    pub peak_rps: Option<f64>,
    /// Objective (default: that of the records).
    #[arg(long)]
    pub slo: Option<String>,
    /// Price of a GPU for an hour.
    #[arg(long)]
    pub gpu_hour: Option<f64>,
    /// GPUs a server.
    #[arg(long, default_value_t = 1)]
    pub gpus: u32,
    /// Bursts within the peak, as a factor.
    #[arg(long, default_value_t = 1.2)]
    pub burst: f64,
    /// Share of its highest rate a server is loaded to.
    #[arg(long, default_value_t = 0.8)]
    pub headroom: f64,
    /// Servers that may fail.
    #[arg(long, default_value_t = 1)]
    pub spare: u64,
    /// Write the plan here; `lowbit report` reads capacity.json.
    #[arg(long, short, conflicts_with = "estimate")]
    pub output: Option<PathBuf>,
    /// Replace an existing plan.
    #[arg(long)]
    pub force: bool,
    /// From sizes and a data sheet, before any run.
    #[arg(long, conflicts_with_all = ["files", "gpu_hour", "slo"])]
    pub estimate: bool,
    /// Models to estimate: 8b, 70b, qwen2.5-7b, ..., a folder, a .gguf file, or a hub id.
    #[arg(long, value_delimiter = ',')]
    pub model: Vec<String>,
    /// GPU: h200, h100, a100-80, l40s, l4, a10, rtx4090, ... [default of an estimate: h200]. With load records: how much room a
    /// variant's weights (bench.json beside its record) leave there for keys and values.
    #[arg(long)]
    pub gpu: Option<String>,
    /// Workload of the estimate.
    #[arg(long, default_value = "chat")]
    pub data: String,
    /// Keys and values in 8 bits.
    #[arg(long)]
    pub kv_8bit: bool,
}

#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Load record to compare with, or a file `lowbit load --import` reads.
    pub before: PathBuf,
    /// Load record that is judged.
    pub after: PathBuf,
    /// Slower by more than this share is a regression: exit code 1.
    #[arg(long, default_value_t = 0.05)]
    pub margin: f64,
    /// Seed of the bootstrap.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}
