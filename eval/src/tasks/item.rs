//! What one model made of one document: the record two models are paired by.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One document's outcome; one line of an items file.
///
/// Two items may be compared when `task`, `doc`, `doc_hash`, `prompt_hash` and `target_hash` are equal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The task's name (a subject of MMLU has its own).
    pub task: String,
    /// Position of the document in the evaluated split, from 0.
    pub doc: usize,
    /// SHA-256 of the document as canonical JSON, hexadecimal.
    pub doc_hash: String,
    /// SHA-256 over all requests of the document: kind, context, continuation or stop rules, in order.
    pub prompt_hash: String,
    /// SHA-256 of the expected answer.
    pub target_hash: String,
    /// What documents of the same origin share, where the task says so (a passage, a page): intervals cluster by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Values by metric name: 0 or 1 for `acc`, `acc_norm`, `acc_bytes`, `exact_match`; a share for `mc2`, `rouge_l`;
    /// `log_prob`, `words` and `bytes` for rolled texts. Where a task has named filters, `metric,filter`.
    pub metrics: BTreeMap<String, f64>,
    /// Log-likelihood of each request, in order of `idx`; empty for generated text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_probs: Vec<f64>,
    /// Index of the most likely choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<usize>,
    /// Indices of the right choices (one, for most tasks); empty where there are no choices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gold: Vec<usize>,
    /// What the model wrote, for generated text (the turns of a conversation in order).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub responses: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_back_and_keeps_what_matters() {
        let item = Item {
            task: "t".into(),
            doc: 3,
            doc_hash: "a".into(),
            prompt_hash: "b".into(),
            target_hash: "c".into(),
            cluster: None,
            metrics: [("acc".to_owned(), 1.0)].into(),
            log_probs: vec![-0.1, -23.537_280_000_000_003],
            choice: Some(0),
            gold: vec![0],
            responses: Vec::new(),
        };
        let line = serde_json::to_string(&item).unwrap();
        assert!(!line.contains('\n') && !line.contains("responses") && !line.contains("cluster"), "{line}");
        assert_eq!(serde_json::from_str::<Item>(&line).unwrap(), item);
    }
}
