//! A language model as judge of texts: grades by a rubric, or which of two answers is better.
//!
//! ```text
//! items of both models ─► cases (question, rubric, answers) ─► questions (both orders, repeated votes) ─► verdicts ─► items + record
//! ```
//!
//! A verdict that cannot be read is counted and never guessed. How far a judge may be trusted is in the record: agreement of
//! repeated votes (Fleiss' kappa), of the two orders (Cohen's), and its preference for what it reads first.

pub mod agreement;
mod prompt;
pub mod record;
mod run;
pub mod spec;
mod verdict;

pub use record::{JudgeRecord, Pairwise, Vote};
pub use run::{Judging, judge};
pub use spec::{JudgeSpec, Mode};
