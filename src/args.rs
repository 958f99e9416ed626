//! What was typed: clap only, no files touched. One file, because commands share groups of options, and help is read as a whole.

mod budget;
mod endpoint;
mod serving;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use budget::BudgetArgs;
pub use endpoint::{EndpointArgs, JudgeArgs};
pub use serving::{CapacityArgs, CompareArgs, EndpointArg, KvCacheArg, LoadArgs, ServeArgs, ToolArg};

use crate::examples;

/// Quantize a language model, prove what that did to its accuracy, and measure what it gained in speed.
#[derive(Parser, Debug)]
#[command(name = "lowbit", version, max_term_width = 100, after_help = examples::TOP)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Debug, Clone)]
pub struct Global {
    /// Where to compute: auto, cpu, cuda, cuda:N, emulated (the CUDA kernels on the host), scalar (the slow reference).
    #[arg(long, global = true, default_value = "auto", value_parser = parse_device)]
    pub device: Device,
    /// Keep f32: on the CPU, where prompts and calibration would round factors to fixed point of 16 bits, and decode activations to 15 before packed
    /// weights (`bench` shows the KL); on a GPU as --arithmetic fast.
    #[arg(long, global = true)]
    pub exact: bool,
    /// How the GPU kernels compute products: `half` reads activations rounded to bf16, as 16-bit engines do; `fast` has f32 accuracy on
    /// tensor cores; `reproducible` takes the CPU's order of sums, bit for bit, so that calibration gives the same codes. Default on
    /// cuda: half where speed is the aim (bench, serve, generate, suite), fast elsewhere; on emulated: reproducible. On
    /// the CPU `reproducible` is --exact, and the others change nothing.
    #[arg(long, global = true, value_enum)]
    pub arithmetic: Option<ArithmeticArg>,
    /// On a GPU, submit every operation of a decode step by itself instead of repeating a recorded one.
    #[arg(long, global = true, hide = true)]
    pub no_graph: bool,
    /// Print one JSON document on stdout instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no talk on stderr, errors only.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Threads to use (default: all cores).
    #[arg(long, global = true)]
    pub threads: Option<usize>,
}

/// See `--arithmetic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArithmeticArg {
    /// Tensor cores, activations in bf16.
    Half,
    /// Tensor cores, f32 accuracy.
    Fast,
    /// The CPU's order.
    Reproducible,
}

/// See `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// A GPU where there is one, else the CPU.
    Auto,
    /// Rayon and SIMD.
    Cpu,
    /// A GPU by ordinal.
    Cuda(usize),
    /// The CUDA kernels compiled for the host.
    Emulated,
    /// The slow reference, for checking.
    Scalar,
}

fn parse_device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda(0)),
        "emulated" => Ok(Device::Emulated),
        "scalar" => Ok(Device::Scalar),
        _ => match text.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(n)) => Ok(Device::Cuda(n)),
            _ => Err("expected auto, cpu, cuda, cuda:N, emulated or scalar".into()),
        },
    }
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// The main job: plan, quantize, verify, eval and bench against the original, a verdict, report.
    #[command(after_help = examples::RUN)]
    Run(Box<RunArgs>),
    /// Architecture, tensors, dtypes, sizes, quantization found.
    Inspect(InspectArgs),
    /// Before any work: every tensor's fate and why, and the exact size of the output.
    #[command(after_help = examples::PLAN)]
    Plan(PlanArgs),
    /// Write the quantized checkpoint and quantize.json.
    #[command(after_help = examples::QUANTIZE)]
    Quantize(QuantizeArgs),
    /// Re-open an artefact and check every tensor against its config and record.
    Verify(VerifyArgs),
    /// Between checkpoint formats: GGUF or packed weights to a bf16 Hugging Face folder, or packed to packed.
    Convert(ConvertArgs),
    /// Perplexity and task scores, and drift against a reference in the same pass.
    #[command(after_help = examples::EVAL)]
    Eval(Box<EvalArgs>),
    /// A verdict on accuracy: pass, regression or inconclusive, as an exit code, JUnit XML and Markdown.
    #[command(after_help = examples::GATE)]
    Gate(GateArgs),
    /// Prefill and decode rates, interleaved with a reference, against the memory bandwidth.
    #[command(after_help = examples::BENCH)]
    Bench(BenchArgs),
    /// Load a serving endpoint: latencies with intervals, an objective's verdict, the highest rate that meets it.
    #[command(after_help = examples::LOAD)]
    Load(LoadArgs),
    /// Servers for a peak rate and what a million tokens costs, from load records or from a data sheet.
    #[command(after_help = examples::CAPACITY)]
    Capacity(CapacityArgs),
    /// Two load records against each other: ratios of latencies with intervals.
    Compare(CompareArgs),
    /// OpenAI-compatible server: completions and chat, streaming, continuous batching.
    #[command(after_help = examples::SERVE)]
    Serve(ServeArgs),
    /// Continue a prompt.
    Generate(GenerateArgs),
    /// Write report.html, report.md and report.json from the records in a folder, or compare several folders.
    #[command(after_help = examples::REPORT)]
    Report(ReportArgs),
    /// Print the completion script of a shell.
    #[command(after_help = examples::COMPLETIONS)]
    Completions(CompletionsArgs),
    /// Print the man page, or write those of all commands into a folder.
    #[command(after_help = examples::MAN)]
    Man(ManArgs),
    /// Check every operation of a device against the scalar reference, and time layer shapes of real models: what
    /// bench/gpu-suite runs (docs/gpu.md).
    #[command(hide = true)]
    Suite(SuiteArgs),
}

#[derive(Args, Debug, Clone)]
pub struct QuantOptions {
    /// Weights and inputs: w2a16, w3a16, w4a16, w8a16 (integers); w8a8, w8a8-static; fp8a16, fp8-dynamic, fp8-static, fp8-block;
    /// nvfp4a16, nvfp4, mxfp4a16. The static ones and nvfp4 store scales of inputs, from calibration data. With --format gguf q4_0, q5_0,
    /// q8_0, q4_k or q6_k.
    #[arg(long, default_value = "w4a16")]
    pub scheme: String,
    /// Another scheme for some modules: a name or a `re:` pattern, and `:GROUP` for integers, as in 're:.*down_proj=w8a16:64'.
    #[arg(long, value_name = "PATTERN=SCHEME")]
    pub module: Vec<String>,
    /// Store scales for keys and values in eight bits, from calibration data: one for a layer, or one for each head.
    #[arg(long, value_enum)]
    pub kv_scheme: Option<KvSchemeArg>,
    /// best, fast, gptq, round, hqq or rtn.
    #[arg(long, value_enum, default_value_t = MethodArg::Gptq)]
    pub method: MethodArg,
    /// Input columns that share a scale of integers, or `channel`. Default: 128.
    #[arg(long)]
    pub group_size: Option<String>,
    /// Zero point per group instead of a symmetric range.
    #[arg(long)]
    pub asymmetric: bool,
    /// Layout on disk.
    #[arg(long, value_enum, default_value_t = FormatArg::CompressedTensors)]
    pub format: FormatArg,
    /// Damping as a fraction of the mean Hessian diagonal.
    #[arg(long, default_value_t = 0.01)]
    pub damp: f64,
    /// Quantize columns left to right instead of by falling Hessian diagonal.
    #[arg(long)]
    pub no_act_order: bool,
    /// Steps of --method round on each block.
    #[arg(long, value_name = "N", default_value_t = lowbit_quantize::learned::STEPS)]
    pub learn_steps: usize,
    /// Scales from the extremes of each group instead of the Hessian-weighted search.
    #[arg(long)]
    pub minmax_scales: bool,
    /// What weighs errors in the search for scales. [default: diagonal]
    #[arg(long, value_enum, conflicts_with = "minmax_scales")]
    pub scale_search: Option<ScaleSearchArg>,
    /// Never write a negative scale (for engines that refuse them).
    #[arg(long)]
    pub unsigned_scales: bool,
    /// `w8`: quantize lm_head to 8 bits (untied when it shares the embedding's matrix), Q8_0 in a GGUF; `q6_k`: Q6_K, in a GGUF
    /// only; `auto`: as a budget decides; `keep` leaves it.
    #[arg(long, value_enum, default_value_t = HeadArg::Keep)]
    pub head: HeadArg,
    /// `w8`: quantize the token embedding to 8 bits (a tied one needs --head w8 as well); lowbit reads it, transformers 5.17 does not. In a GGUF as --head. `auto`: as a budget decides; `keep` leaves it.
    #[arg(long, value_enum, default_value_t = HeadArg::Keep)]
    pub embedding: HeadArg,
    /// Modules to leave alone: names, or `re:` patterns.
    #[arg(long)]
    pub ignore: Vec<String>,
    /// Calibration text: .txt, .jsonl, .json, .parquet, a folder of them, a hub data set, or `self`.
    #[arg(long)]
    pub calib: Option<String>,
    /// Calibration windows.
    #[arg(long, default_value_t = 128)]
    pub samples: usize,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    pub seq_len: usize,
    /// Draw random windows with this seed instead of the first ones.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Folder for the calibration activations (default: in memory).
    #[arg(long, value_name = "DIR")]
    pub offload: Option<PathBuf>,
    /// Any retry, fallback or surprise is an error.
    #[arg(long)]
    pub strict: bool,
    /// Largest shard in megabytes (10^6 bytes).
    #[arg(long, default_value_t = 5000)]
    pub shard_mb: u64,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Options from a file: a recipe.toml of an earlier run, or a recipe of llm-compressor (.yaml) where it maps. What is typed wins.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvSchemeArg {
    /// E4M3.
    Fp8,
    /// E4M3, a scale for each key/value head.
    Fp8Head,
    /// int8.
    Int8,
    /// int8, a scale for each key/value head.
    Int8Head,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// GPTQ on calibration data.
    Gptq,
    /// GPTQ aimed at the float model's outputs, then coordinate descent: the most accurate, at up to three times GPTQ's time.
    Best,
    /// GPTQ with what is nearly free.
    Fast,
    /// Rounding learned on each block's output by signed gradient descent (AutoRound), on the CPU: many times GPTQ's time; integers only.
    Round,
    /// Scales and zero points that let outliers go, no data; integers only.
    Hqq,
    /// Round to nearest, no data.
    Rtn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScaleSearchArg {
    /// The Hessian's diagonal: what an error costs where nothing makes up for it.
    Diagonal,
    /// GPTQ's pivots: what it costs once the columns solved later have made up for it; integers only.
    Pivots,
    /// The Hessian's block of the group, up to 256 columns and 6 bits (else the diagonal); integers only.
    Blocks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// Packed integers, int8, float codes, mixes.
    CompressedTensors,
    /// GPTQ v1.
    Gptq,
    /// GPTQ v2: zero points as they are.
    GptqV2,
    /// AWQ GEMM (4 bits).
    Awq,
    /// One file model.gguf, for llama.cpp.
    Gguf,
    /// Dense bfloat16 (convert only).
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HeadArg {
    /// Full precision.
    Keep,
    /// 8 bits.
    W8,
    /// 4 to 8 bits or full precision, as a budget decides.
    Auto,
    /// Q6_K (GGUF only).
    #[value(name = "q6_k")]
    Q6K,
}

#[derive(Args, Debug)]
pub struct RunArgs {
    /// A folder, a .gguf file, `demo`, or a hub id `org/name[@revision]`.
    pub model: String,
    /// Folder for the model, the records and the report.
    #[arg(long, short)]
    pub output: PathBuf,
    #[command(flatten)]
    pub quant: QuantOptions,
    /// Text for perplexity and KL (default for `demo`: a text of our own).
    #[arg(long)]
    pub eval_text: Option<PathBuf>,
    /// Perplexity protocol: gptq-N, llama.cpp-N, lm-eval-word, stride:N. Default: gptq-2048 (gptq-512 for the demo).
    #[arg(long)]
    pub protocol: Option<String>,
    /// KL windows at most.
    #[arg(long, default_value_t = 10)]
    pub kl_windows: usize,
    /// Perplexity windows at most.
    #[arg(long, default_value_t = 10)]
    pub limit: usize,
    /// Tasks to score both models on, as in `lowbit eval` (default for `demo`: two of our own). The gate judges them; the exit
    /// code is its verdict.
    #[arg(long, value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Folder with the tasks' data; without it data comes from the hub.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Folder with task files of your own.
    #[arg(long, value_name = "DIR")]
    pub include: Vec<PathBuf>,
    /// Documents at most, of each task.
    #[arg(long, value_name = "N")]
    pub task_limit: Option<usize>,
    /// Largest loss the gate accepts, percentage points (default as in `lowbit gate`).
    #[arg(long, value_name = "PP")]
    pub margin: Option<f64>,
    /// Largest mean KL divergence the gate accepts, nats a token.
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Largest ratio of perplexities the gate accepts.
    #[arg(long, value_name = "RATIO")]
    pub max_ppl_ratio: Option<f64>,
    /// Show the N positions of the --eval-text where the models part most (demo: 12).
    #[arg(long, value_name = "N")]
    pub worst_tokens: Option<usize>,
    /// Swap each linear (or block) back, one at a time, and rank them by KL regained per byte (demo: linear).
    #[arg(long, value_enum, value_name = "UNIT")]
    pub blame: Option<BlameArg>,
    /// Leave the verdict out, and of `demo` its tasks, tokens and layers.
    #[arg(long, conflicts_with_all = ["margin", "max_kl", "max_ppl_ratio"])]
    pub no_gate: bool,
    /// Leave the bench out.
    #[arg(long)]
    pub no_bench: bool,
    /// Timed repetitions of the bench.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// Serve both models in turn and load each: one stream, many, and rates between (load.json, load-reference.json); then let the
    /// quantized model draft for the original (speculation.json). The report draws them.
    #[arg(long)]
    pub serve_bench: bool,
    /// What is asked, as in `lowbit load --data`. [default: chat; demo for the demo]
    #[arg(long, value_name = "DATA", requires = "serve_bench")]
    pub serve_data: Option<String>,
    /// Objective, as in `lowbit load --slo`; it does not decide the exit code.
    #[arg(long, value_name = "SLO", default_value = "guidellm/chatbot", requires = "serve_bench")]
    pub serve_slo: String,
    /// Seconds of each of six stages.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, requires = "serve_bench")]
    pub serve_seconds: f64,
    /// Start anew in a folder that has results already.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Model.
    pub model: String,
}

#[derive(Args, Debug)]
pub struct PlanArgs {
    /// Model.
    pub model: String,
    #[command(flatten)]
    pub quant: QuantOptions,
}

#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Model.
    pub model: String,
    /// Checkpoint folder to write.
    #[arg(long, short)]
    pub output: PathBuf,
    #[command(flatten)]
    pub quant: QuantOptions,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
    /// Solve every block anew, also those that a stopped run of the same command solved.
    #[arg(long)]
    pub fresh: bool,
}

#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Checkpoint folder.
    pub model: String,
    /// The original, to compare untouched tensors bit for bit.
    #[arg(long)]
    pub original: Option<String>,
}

#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Model.
    pub model: String,
    /// Folder to write.
    #[arg(long, short)]
    pub output: PathBuf,
    /// Layout to write.
    #[arg(long, value_enum, default_value_t = FormatArg::Bf16)]
    pub format: FormatArg,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    /// Model.
    #[arg(required_unless_present_any = ["endpoint", "render"])]
    pub model: Option<String>,
    /// The model to compare with.
    #[arg(long)]
    pub reference: Option<String>,
    /// Text for perplexity: .raw, .txt, .jsonl.
    #[arg(long)]
    pub ppl: Option<PathBuf>,
    /// Protocols: gptq-N, llama.cpp-N, lm-eval-word, stride:N.
    #[arg(long, value_delimiter = ',', default_value = "gptq-2048")]
    pub protocol: Vec<String>,
    /// Text for KL against the reference.
    #[arg(long)]
    pub kl: Option<PathBuf>,
    /// Tokens per KL window.
    #[arg(long, default_value_t = 1024)]
    pub kl_window: usize,
    /// How MODEL keeps keys and values, as in `lowbit serve`; the reference keeps floats, so KL shows what that costs.
    #[arg(long, value_enum, default_value_t = KvCacheArg::Float, requires = "kl", conflicts_with_all = ["tasks", "blame", "endpoint"])]
    pub kv_cache: KvCacheArg,
    /// Let both models write on from N places of the --kl text: first differing token, lengths, loops.
    #[arg(long, value_name = "N", requires_all = ["kl", "reference"])]
    pub free_running: Option<usize>,
    /// Tokens each writes.
    #[arg(long, value_name = "N", default_value_t = 64, requires = "free_running")]
    pub free_tokens: usize,
    /// Show the N positions of the --kl text where the models part most, with what each would have written.
    #[arg(long, value_name = "N", requires_all = ["kl", "reference"])]
    pub worst_tokens: Option<usize>,
    /// Swap each linear (or block) back to the reference's, one at a time, and rank them by KL regained per byte.
    #[arg(long, value_enum, value_name = "UNIT", requires_all = ["kl", "reference"])]
    pub blame: Option<BlameArg>,
    /// Windows of --blame: every swap is measured on all of them.
    #[arg(long, value_name = "N", default_value_t = 4, requires = "blame")]
    pub blame_windows: usize,
    /// Windows at most, of each; documents at most, of each task.
    #[arg(long)]
    pub limit: Option<usize>,
    #[command(flatten)]
    pub tasks: TaskArgs,
    /// Write the record here.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Replace an existing record.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    #[command(flatten)]
    pub judge: JudgeArgs,
}

/// What --blame swaps at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BlameArg {
    /// One linear.
    Linear,
    /// All linears of a block.
    Block,
}

#[derive(Subcommand, Debug)]
pub enum EvalCommand {
    /// Put the records of all shards of a run together: what one run without --shard writes.
    Merge(MergeArgs),
}

#[derive(Args, Debug)]
pub struct MergeArgs {
    /// Records of all shards, in any order.
    #[arg(required = true)]
    pub shards: Vec<PathBuf>,
    /// Write the record here.
    #[arg(long, short)]
    pub output: PathBuf,
    /// Replace an existing record.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct GateArgs {
    /// Record of `lowbit eval` with tasks, or an items file (.jsonl).
    #[arg(required_unless_present = "simulate")]
    pub candidate: Option<PathBuf>,
    /// The same of the model compared with (default: the reference of the candidate's record).
    pub baseline: Option<PathBuf>,
    /// Largest loss that is accepted, percentage points (default: that of --until-decided where the record has one, else 0.5 for
    /// candidates of 8 bits and more and 1.0 for others). 0 asks whether anything was lost at all.
    #[arg(long, value_name = "PP")]
    pub margin: Option<f64>,
    /// Probability of a false alarm, all tasks together, and of a false pass.
    #[arg(long, default_value_t = 0.05)]
    pub alpha: f64,
    /// Probability of finding the losses that sizes are stated for.
    #[arg(long, default_value_t = 0.8)]
    pub power: f64,
    /// Metric to judge a task by, as in arc_challenge=acc_norm.
    #[arg(long, value_name = "TASK=METRIC")]
    pub metric: Vec<String>,
    /// Largest mean KL divergence from the reference, nats a token.
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Largest ratio of perplexities to the reference's.
    #[arg(long, value_name = "RATIO")]
    pub max_ppl_ratio: Option<f64>,
    /// Largest share of a task's items that may lack a judge's verdict, percent; beyond it nothing is decided.
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    pub max_unjudged: f64,
    /// Seed of permutations and simulations.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the verdict here.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Write JUnit XML here.
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Write a Markdown comment here.
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Replace existing files.
    #[arg(long)]
    pub force: bool,
    /// Judge made-up pairs instead: how often which verdict comes, with no loss, with --loss and with a loss of the margin.
    #[arg(long, conflicts_with_all = ["candidate", "output", "junit", "markdown"])]
    pub simulate: bool,
    /// Simulation: items of each task.
    #[arg(long, value_delimiter = ',', default_value = "10000", requires = "simulate")]
    pub items: Vec<u64>,
    /// Simulation: share of items whose score changes.
    #[arg(long, default_value_t = 0.05, requires = "simulate")]
    pub discordant: f64,
    /// Simulation: true loss, percentage points.
    #[arg(long, value_name = "PP", default_value_t = 0.3, requires = "simulate")]
    pub loss: f64,
    /// Simulation: looks at equal steps.
    #[arg(long, default_value_t = 1, requires = "simulate")]
    pub looks: usize,
    /// Simulation: evaluations.
    #[arg(long, default_value_t = 10_000, requires = "simulate")]
    pub runs: u64,
}

#[derive(Args, Debug, Default)]
pub struct TaskArgs {
    /// Tasks, groups, tags, patterns with `*` or task files, each with its number of examples: arc_easy,mmlu:5,my.yaml.
    #[arg(long, value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Folder with the tasks' data (docs/tasks.md); without it data comes from the hub.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Folder with task files of your own.
    #[arg(long, value_name = "DIR")]
    pub include: Vec<PathBuf>,
    /// Examples for every task whose name says none.
    #[arg(long, value_name = "N", visible_alias = "num-fewshot")]
    pub fewshot: Option<usize>,
    /// Print every request as a JSON line; run no model.
    #[arg(long, requires = "tasks")]
    pub render: bool,
    /// Release of lm-evaluation-harness whose rule on BOS holds: up to 0.4.9.1 none (but for Gemma), from 0.4.9.2 on what the
    /// tokenizer adds.
    #[arg(long, value_enum, default_value_t = Compat::Current)]
    pub compat: Compat,
    /// Most tokens of one input (default: the models' positions); part of the protocol of rolled texts.
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Keep answers here and take those of earlier runs with the same weights, tokenizer, kernels and protocol.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Part i of n of every task's documents; `lowbit eval merge` puts the records together.
    #[arg(long, value_name = "I/N", conflicts_with_all = ["ppl", "kl"])]
    pub shard: Option<lowbit_eval::engine::Shard>,
    /// Look at the verdict of `lowbit gate` at equal steps and stop once it is clear; its error is kept over all looks.
    #[arg(long, conflicts_with = "shard")]
    pub until_decided: bool,
    /// Looks of --until-decided.
    #[arg(long, default_value_t = 5, requires = "until_decided")]
    pub looks: usize,
    /// Margin of --until-decided, percentage points (default as in `lowbit gate`).
    #[arg(long, value_name = "PP", requires = "until_decided")]
    pub margin: Option<f64>,
    /// Put prompts through the model's chat template.
    #[arg(long, visible_alias = "chat")]
    pub apply_chat_template: bool,
    /// With a chat template: examples as turns of their own (`false`: all in one user message).
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub fewshot_as_multiturn: bool,
    /// System message before each task's description.
    #[arg(long, value_name = "TEXT")]
    pub system_instruction: Option<String>,
}

/// Release of lm-evaluation-harness whose BOS rule holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Compat {
    /// None, except Gemma's.
    #[value(name = "lm-eval-0.4.9.1")]
    Old,
    /// What the tokenizer adds by itself.
    #[default]
    #[value(name = "lm-eval-0.4.13", alias = "lm-eval-0.4.9.2")]
    Current,
}

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
pub struct GenerateArgs {
    /// Model.
    pub model: String,
    /// Text to continue.
    #[arg(long, short)]
    pub prompt: String,
    /// Treat the prompt as a user's message and render the chat template.
    #[arg(long)]
    pub chat: bool,
    /// Tokens at most.
    #[arg(long, short = 'n', default_value_t = 64)]
    pub max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep the k most likely tokens (0: all).
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the smallest set with this much probability.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the sampler.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Folders of `lowbit run`, or any with its records: plan.json, quantize.json, eval.json, gate.json, bench.json,
    /// load.json (and load-NAME.json), capacity.json. Several are compared in one page.
    #[arg(required = true, value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    /// Folder to write into (default: DIR, where there is one).
    #[arg(long, short, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// With --output: replace existing reports.
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// Shell.
    pub shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
pub struct ManArgs {
    /// Folder for lowbit.1 and a page for each command (default: print lowbit.1).
    #[arg(long, short, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Replace existing pages.
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
