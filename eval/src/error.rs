//! Errors of an evaluation; each says what to change.

use std::path::PathBuf;

use lowbit_checkpoint::CheckpointError;
use lowbit_kernels::KernelError;
use lowbit_model::ModelError;

/// What can go wrong while scoring a model.
#[expect(missing_docs, reason = "the messages say what the fields are")]
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Tokenizer or checkpoint files failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An operation failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A task file or its data failed.
    #[error(transparent)]
    Task(#[from] crate::tasks::TaskError),
    /// A text file could not be read.
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// A text file is not UTF-8.
    #[error("{path} is not UTF-8 text (first bad byte at {offset})")]
    NotUtf8 { path: PathBuf, offset: usize },
    /// A line of a JSONL file is not JSON.
    #[error("{path}:{line}: {source}")]
    Json { path: PathBuf, line: usize, source: serde_json::Error },
    /// A line of a JSONL file lacks the field the first line has.
    #[error("{path}:{line}: no string field `{field}`; every line needs it")]
    MissingField { path: PathBuf, line: usize, field: &'static str },
    /// The file name says no format we read.
    #[error("{0}: expected a .raw, .txt or .jsonl file")]
    UnknownExtension(PathBuf),
    /// The protocol rolls over pages and the source has none.
    #[error(
        "{0} has no pages: lm-eval-word needs a .jsonl file with one `page` per line \
         (EleutherAI/wikitext_document_level)"
    )]
    NoPages(String),
    /// The protocol wants a running text and the source has pages.
    #[error(
        "{0} holds pages: this protocol needs a .raw or .txt file, or a .jsonl file with `text` lines; \
         pages are for lm-eval-word"
    )]
    OnlyPages(String),
    /// Not the name of a protocol.
    #[error("unknown protocol `{given}`: {why}; expected gptq-N, llama.cpp-N, lm-eval-word[:N] or stride:N")]
    UnknownProtocol { given: String, why: &'static str },
    /// Too few tokens for one result.
    #[error("{what} needs at least {needed} tokens and the text has {found}; {hint}")]
    TooShort { what: String, needed: usize, found: usize, hint: &'static str },
    /// A setting makes no sense.
    #[error("{what} is {found}; {expected}")]
    BadSetting { what: &'static str, found: usize, expected: String },
    /// A window does not fit in the model.
    #[error("a window feeds {tokens} tokens and the model has {positions} positions; ask for a shorter window")]
    WindowTooLong { tokens: usize, positions: usize },
    /// The models of a comparison do not share a vocabulary.
    #[error(
        "the candidate has {candidate} vocabulary entries and the reference {reference}; \
         drift needs the same vocabulary"
    )]
    VocabularyMismatch { candidate: usize, reference: usize },
    /// The text's tokens are not the model's.
    #[error("token {id} is outside the vocabulary of {vocab}; is this the model's tokenizer?")]
    BadToken { id: u32, vocab: usize },
    /// There is neither a BOS nor an EOS token to start a page with.
    #[error("lm-eval-word starts every page with BOS or EOS and the tokenizer names neither")]
    NoPrefix,
    /// An empty context needs a prefix token.
    #[error("the tokenizer names neither a BOS nor an EOS token, and a request without context needs one of them")]
    NoPrefixToken,
    /// A request that cannot be asked of this model.
    #[error("request {idx} of document {doc} of {task}: {problem}")]
    Request { task: String, doc: usize, idx: usize, problem: String },
    /// A server that cannot be used.
    #[error("{url} {problem}")]
    Endpoint { url: String, problem: String },
    /// A journal or cache file could not be used.
    #[error("{path}: {problem}")]
    Journal { path: PathBuf, problem: String },
    /// A journal could not be read or written.
    #[error("{}: {source}", path.display())]
    JournalIo { path: PathBuf, source: std::io::Error },
    /// Two models' items that cannot be set against each other.
    #[error("{problem}\nhint: evaluate both models with the same tasks, shots, limit, template and data")]
    Unpaired { problem: String },
    /// A scorer answered with the wrong number of values.
    #[error("the scorer returned {found} values where {expected} were asked for")]
    Scores { expected: usize, found: usize },
    /// A score is NaN or infinite.
    #[error("the {model}'s {what} is {value} at position {position} of window {window}")]
    NotFinite { model: &'static str, what: &'static str, value: f64, window: usize, position: usize },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, EvalError>;
