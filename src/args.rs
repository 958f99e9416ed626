//! What was typed: clap only, no files touched.

mod bench;
mod budget;
mod endpoint;
mod eval;
mod serving;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use bench::{BenchArgs, BenchFormat, SuiteArgs, SuitePart};
pub use budget::BudgetArgs;
pub use endpoint::{EndpointArgs, JudgeArgs};
pub use eval::{BlameArg, Compat, EvalArgs, EvalCommand, GateArgs, MergeArgs, TaskArgs};
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
    /// Where to compute: auto, cpu, cuda, cuda:N, emulated (the CUDA kernels on the host), scalar (the slow reference); for quantize, plan and run also
    /// several GPUs of one kind, as cuda:0,cuda:1.
    #[arg(long, global = true, default_value = "auto", value_parser = parse_devices)]
    pub device: Devices,
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

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
            Device::Emulated => f.write_str("emulated"),
            Device::Scalar => f.write_str("scalar"),
        }
    }
}

/// One device, or several that share the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// The one that commands of one device compute on.
    pub first: Device,
    /// The others.
    pub others: Vec<Device>,
}

fn parse_devices(text: &str) -> Result<Devices, String> {
    let mut all = text.split(',').map(parse_device).collect::<Result<Vec<_>, _>>()?;
    let first = all.remove(0);
    let others = all;
    for (i, device) in others.iter().enumerate() {
        match (first, device) {
            (Device::Emulated, Device::Emulated) => {}
            (Device::Cuda(a), Device::Cuda(b)) if a != *b && !others[..i].contains(device) => {}
            (Device::Cuda(_), Device::Cuda(_)) => return Err(format!("{device} is named twice")),
            _ => return Err("several devices are GPUs (cuda:0,cuda:1); the CPU takes all its cores by itself".into()),
        }
    }
    Ok(Devices { first, others })
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
    /// Change the float model so that it computes the same and is easier to round: `awq` (channel scales, searched on calibration data),
    /// `smoothquant` or `smoothquant=ALPHA` (the same for schemes with quantized inputs; default 0.5), `rotate` (Hadamard rotations).
    /// Rotate goes together with either of the others.
    #[arg(long, value_name = "NAME")]
    pub transform: Vec<String>,
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
    /// Samples of calibration computed together. Results do not depend on it, memory does. Default: as many as 2048 tokens make.
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
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
    /// Estimate the time: does the work of the first block with a few windows, in the temporary folder.
    #[arg(long)]
    pub probe: bool,
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
