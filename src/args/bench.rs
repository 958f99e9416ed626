//! `lowbit bench` and `suite`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::KvCacheArg;

/// Formats of llama-bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchFormat {
    /// Markdown.
    Md,
    /// Comma-separated.
    Csv,
    /// One document.
    Json,
    /// A line a row.
    Jsonl,
    /// Statements for sqlite.
    Sql,
}

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Model.
    #[arg(required_unless_present = "synthetic", conflicts_with = "synthetic")]
    pub model: Option<String>,
    /// The model to compare with.
    #[arg(long, conflicts_with = "synthetic")]
    pub reference: Option<String>,
    /// Measure speculation instead: this cheaper model, such as MODEL quantized, proposes tokens and MODEL checks them. Reports how
    /// many it accepts, the ratio of decode rates, and that the text is the same.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["reference", "synthetic", "prompt", "depth", "batch", "format"])]
    pub draft: Option<String>,
    /// Tokens the draft proposes at a time.
    #[arg(long, default_value_t = 4, requires = "draft")]
    pub draft_tokens: usize,
    /// How MODEL keeps keys and values, as in `lowbit serve`; the reference keeps floats.
    #[arg(long, value_enum, default_value_t = KvCacheArg::Float, conflicts_with_all = ["synthetic", "draft"])]
    pub kv_cache: KvCacheArg,
    /// Print the rows in a format of llama-bench, for the scripts that read them.
    #[arg(long, value_enum)]
    pub format: Option<BenchFormat>,
    /// Instead of a model: random weights in the shape of llama-3.1-8b, llama-3.2-1b, qwen3-32b or tiny, one format after the
    /// other.
    #[arg(long, value_name = "SHAPE")]
    pub synthetic: Option<String>,
    /// Formats of the linears of a synthetic model; the others are compared with the first.
    #[arg(long, value_delimiter = ',', default_value = "bf16,w8a16-g128,w4a16-g128", conflicts_with = "model")]
    pub formats: Vec<String>,
    /// Format of the head of a synthetic model: bf16 or w8a16.
    #[arg(long, default_value = "bf16", conflicts_with = "model")]
    pub head: String,
    /// Prompt tokens of the prefill test (0: none). [default: 512; synthetic 4096]
    #[arg(short, long)]
    pub prompt: Option<usize>,
    /// Tokens of the decode test (0: none). [default: 128; synthetic 32]
    #[arg(short = 'n', long)]
    pub generate: Option<usize>,
    /// Random tokens in the cache before the decode test. [default: 0; synthetic 1024]
    #[arg(short, long)]
    pub depth: Option<usize>,
    /// Batch sizes of the decode test. [default: 1; synthetic 1,4,16,64]
    #[arg(short, long, value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Timed repetitions.
    #[arg(short, long, default_value_t = 5)]
    pub repetitions: usize,
    /// Write the record here.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Replace an existing record.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct SuiteArgs {
    /// List every row with its bytes and flops; run nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// One half of it.
    #[arg(long, value_enum)]
    pub only: Option<SuitePart>,
    /// Start no row after this many seconds.
    #[arg(long)]
    pub limit_seconds: Option<u64>,
    /// Write the record here.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Replace an existing record.
    #[arg(long)]
    pub force: bool,
    /// Print a record as the Markdown tables of docs/gpu.md; run nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dry_run", "only", "limit_seconds", "output", "force"])]
    pub render: Option<PathBuf>,
}

/// Half of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SuitePart {
    /// The op table against the scalar reference.
    Correctness,
    /// Ceilings and timed rows.
    Kernels,
}
