//! What is wrong with a task file or its data: file, task, row and column.

use std::path::PathBuf;

/// Result of this module.
pub type Result<T> = std::result::Result<T, TaskError>;

/// What can go wrong between a task's name and its requests.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The operating system refused.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// File or folder.
        file: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// A task file is not YAML, or not the YAML of a task.
    #[error("{}: {problem}", file.display())]
    File {
        /// Task file.
        file: PathBuf,
        /// What, with the line where it is known.
        problem: String,
    },
    /// A setting of a task makes no sense or is not supported.
    #[error("{}: task `{task}`: `{key}`: {problem}", file.display())]
    Setting {
        /// Task file.
        file: PathBuf,
        /// Task.
        task: String,
        /// Key of the task file.
        key: String,
        /// Expected and found.
        problem: String,
    },
    /// Neither a task, a group nor a tag.
    #[error("unknown task `{name}`\nhint: {hint}")]
    Unknown {
        /// As given.
        name: String,
        /// What there is.
        hint: String,
    },
    /// A task's data is not there.
    #[error("task `{task}`: no data for its `{split}` split: {problem}\nhint: {hint}")]
    NoData {
        /// Task.
        task: String,
        /// Split.
        split: String,
        /// Where it was looked for.
        problem: String,
        /// A way out.
        hint: String,
    },
    /// A data file cannot be read as rows.
    #[error("{}: row {row}: {problem}", file.display())]
    Data {
        /// Data file.
        file: PathBuf,
        /// Row, from 1 (line for JSON lines).
        row: usize,
        /// Expected and found.
        problem: String,
    },
    /// A row is not what the task needs.
    #[error("{}: row {row}{}: task `{task}`: {problem}", file.display(), named(columns))]
    Row {
        /// Data file.
        file: PathBuf,
        /// Task.
        task: String,
        /// Row, from 1 (line for JSON lines).
        row: usize,
        /// Columns, where some are to blame.
        columns: Vec<String>,
        /// Expected and found.
        problem: String,
    },
    /// A chat template failed.
    #[error("task `{task}`: {source}")]
    Chat {
        /// Task.
        task: String,
        /// Reason.
        source: lowbit_checkpoint::CheckpointError,
    },
    /// Answers that do not fit the questions: a fault of the caller.
    #[error("task `{task}`, document {doc}: expected {expected}, found {found}")]
    Responses {
        /// Task.
        task: String,
        /// Document.
        doc: usize,
        /// Expected.
        expected: String,
        /// Found.
        found: String,
    },
}

/// `, column `x``, or `, columns `x`, `y``.
fn named(columns: &[String]) -> String {
    match columns {
        [] => String::new(),
        [one] => format!(", column `{one}`"),
        several => format!(", columns `{}`", several.join("`, `")),
    }
}
