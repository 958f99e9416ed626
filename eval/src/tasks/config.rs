//! A task file's keys, checked: lm-evaluation-harness 0.4's names and defaults, and a few of our own
//! (`local`, `cluster`, `retrieval`, `agent`; `docs/tasks.md`).

mod read;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value as Json};

use super::filters::FilterStep;
use super::metrics::Metric;
use super::pipeline::Pipeline;
use super::twins::Twin;

pub(crate) use read::distance;
pub use read::parse;

/// What is asked of the model and how the answer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputType {
    /// One log-likelihood a choice.
    MultipleChoice,
    /// One log-likelihood a document.
    LogLikelihood,
    /// The whole text's log-likelihood.
    Rolling,
    /// Generated text.
    Generate,
}

/// Where a text, target or list of choices comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// A column's name or a template: a name wins where the data has that column.
    Text(String),
    /// A fixed number: the index of the right choice.
    Index(i64),
    /// Fixed values.
    List(Vec<Json>),
    /// A twin of a Python function.
    Twin(Twin),
}

/// How few-shot examples are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// `random.Random(seed).sample` for each document in turn.
    Seeded,
    /// The first ones.
    FirstN,
}

/// `fewshot_config` over the task's own keys.
#[derive(Clone, Debug)]
pub struct Fewshot {
    /// Sampler.
    pub sampler: SamplerKind,
    /// Split the examples come from; none means training, else validation, else test.
    pub split: Option<String>,
    /// Examples given in the file.
    pub samples: Option<Vec<Map<String, Json>>>,
    /// Twin that prepares the rows.
    pub process_docs: Option<Twin>,
    /// Question.
    pub text: Field,
    /// Choices.
    pub choice: Option<Field>,
    /// Answer.
    pub target: Field,
    /// Start of the answer.
    pub gen_prefix: Option<String>,
    /// Between question and answer.
    pub target_delimiter: String,
    /// After an example.
    pub fewshot_delimiter: String,
}

/// `generation_kwargs`.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Stop texts.
    pub until: Vec<String>,
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Temperature where sampled.
    pub temperature: f64,
    /// Sample.
    pub do_sample: bool,
}

/// One entry of `filter_list`.
#[derive(Debug)]
pub struct FilterChain {
    /// Name; metrics of a chain not called `none` are `metric,name`.
    pub name: String,
    /// Steps in order.
    pub steps: Vec<FilterStep>,
}

/// How items become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregation {
    /// Arithmetic mean.
    Mean,
    /// Upper median.
    Median,
    /// `exp(−mean)` of log-likelihoods per document.
    Perplexity,
    /// `exp(−Σ ll / Σ weight)`.
    WeightedPerplexity,
    /// `−Σ ll / Σ bytes / ln 2`.
    BitsPerByte,
}

/// One entry of `metric_list`.
#[derive(Debug)]
pub struct MetricSpec {
    /// Name in records.
    pub name: String,
    /// What is computed for an item.
    pub metric: Metric,
    /// Over items.
    pub aggregation: Aggregation,
    /// Direction.
    pub higher_is_better: bool,
}

/// A task file, checked.
#[derive(Debug)]
pub struct TaskConfig {
    /// File for messages.
    pub file: PathBuf,
    /// Name.
    pub task: String,
    /// Tags.
    pub tags: Vec<String>,
    /// Hub data set, or `json`, `csv`, `parquet` with `data_files`.
    pub dataset_path: Option<String>,
    /// Its configuration.
    pub dataset_name: Option<String>,
    /// Files by split, relative to the task file.
    pub data_files: BTreeMap<String, Vec<String>>,
    /// Paths below `--data` to try, without extension; `{split}` stands for the split.
    pub local: Vec<String>,
    /// Splits.
    pub training_split: Option<String>,
    /// Split evaluated where there is no test split.
    pub validation_split: Option<String>,
    /// Split evaluated.
    pub test_split: Option<String>,
    /// Twin that prepares the rows.
    pub process_docs: Option<Twin>,
    /// Question.
    pub text: Field,
    /// Answer.
    pub target: Field,
    /// Choices.
    pub choice: Option<Field>,
    /// Twin that scores.
    pub process_results: Option<Twin>,
    /// Before everything; a column's name or a template.
    pub description: String,
    /// Between question and answer.
    pub target_delimiter: String,
    /// Between examples.
    pub fewshot_delimiter: String,
    /// Start of the answer.
    pub gen_prefix: Option<String>,
    /// Examples.
    pub fewshot: Fewshot,
    /// Shots where none are asked for.
    pub num_fewshot: Option<usize>,
    /// Kind of request.
    pub output_type: OutputType,
    /// For generated text.
    pub generation: Generation,
    /// Generations a document.
    pub repeats: usize,
    /// Filters.
    pub filters: Vec<FilterChain>,
    /// Metrics.
    pub metrics: Vec<MetricSpec>,
    /// Why answers cannot be scored, though requests can be made: the key of what is not there, and a reason.
    pub unscored: Option<(String, String)>,
    /// Column whose equal values form a cluster.
    pub cluster: Option<String>,
    /// Retrieval or agent task.
    pub pipeline: Option<Pipeline>,
    /// `metadata.version`.
    pub version: Json,
    /// SHA-256 of the keys as read.
    pub sha256: String,
}

impl TaskConfig {
    /// Split whose documents are evaluated.
    pub fn eval_split(&self) -> Option<&str> {
        self.test_split.as_deref().or(self.validation_split.as_deref())
    }

    /// Whether the document under evaluation is kept out of its own examples: lm-eval does so where both splits have
    /// the same name, or both have none.
    pub fn excludes_own(&self) -> bool {
        self.fewshot.split == self.test_split
    }
}
