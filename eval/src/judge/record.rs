//! What a judge said, in `eval.json` and `eval.judge.jsonl`.

use serde::{Deserialize, Serialize};

use crate::record::Interval;

/// `judges.<task>/<metric>` of `eval.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JudgeRecord {
    /// Who judged: `NAME at URL`.
    pub judge: String,
    /// The task's label.
    pub task: String,
    /// `judge` or `judge_pairwise`.
    pub metric: String,
    /// SHA-256 of the rubric as the task file has it.
    pub rubric_sha256: String,
    /// Ends of the scale, for grades; an item's value is `(mean grade − low) / (high − low)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<(i64, i64)>,
    /// Votes on each question.
    pub votes: u32,
    /// Of the judge.
    pub temperature: f64,
    /// Documents.
    pub items: usize,
    /// Documents without a verdict: no vote that could be read, of a model or in one of the orders. They have no value.
    pub unjudged: usize,
    /// Votes.
    pub answers: usize,
    /// Votes that could not be read.
    pub unreadable: usize,
    /// Fleiss' kappa of repeated votes on the same question; none for single votes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vote_kappa: Option<f64>,
    /// Share of questions with several readable votes on which all agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unanimous: Option<f64>,
    /// Of comparisons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairwise: Option<Pairwise>,
}

/// Candidate against reference. Intervals are of 95 %.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pairwise {
    /// Documents the candidate's answer is better for.
    pub wins: usize,
    /// The reference's.
    pub losses: usize,
    /// Neither's, identical answers included.
    pub ties: usize,
    /// Documents whose answers are the same to the letter: a tie, without asking.
    pub identical: usize,
    /// Mean over documents: 1 for the candidate, 0 for the reference, a half for a tie; orders and votes averaged.
    pub win_rate: Option<Interval>,
    /// Share of the votes that are no tie which prefer the answer read first: a half without position bias. Wilson's interval
    /// takes votes as independent.
    pub first_position: Option<Interval>,
    /// Share of documents whose verdict is the same in both orders.
    pub order_consistent: Option<f64>,
    /// Cohen's kappa of the two orders.
    pub order_kappa: Option<f64>,
}

/// One vote, a line of `eval.judge.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vote {
    /// The task's label.
    pub task: String,
    /// Document.
    pub doc: usize,
    /// Metric.
    pub metric: String,
    /// `candidate` or `reference`: whose answer was graded, or whose was read first.
    pub of: String,
    /// From 0.
    pub vote: u32,
    /// A grade, or `candidate`, `reference`, `tie`; none where it could not be read.
    pub verdict: Option<String>,
    /// The judge's words.
    pub text: String,
}
