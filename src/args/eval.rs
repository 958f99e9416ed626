//! `lowbit eval`, `eval merge` and `gate`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{EndpointArgs, JudgeArgs, KvCacheArg};

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
    /// Documents at most, of each task; without --windows also windows of --ppl and of --kl at most.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Windows of --ppl and of --kl at most, whatever --limit says of tasks.
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
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
