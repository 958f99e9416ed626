//! Retrieval-augmented answers: did the model use the contexts it was given, and were they worth giving?
//!
//! A row holds a question, a list of contexts in order of rank, and the gold answer. Three requests are made a document:
//! the generated answer, and the log-likelihood of the gold answer with and without the contexts.

use std::collections::HashSet;

use serde_json::{Map, Value as Json};

use super::string_keys;
use crate::tasks::python::json_to_str;
use crate::tasks::rouge::words;
use crate::tasks::twins::Unfit;

/// Metrics of this kind of task, beside those of generated text.
pub const METRICS: &[&str] =
    &["faithfulness", "gold_log_prob", "gold_log_prob_closed", "context_gain", "context_precision", "context_recall"];

/// `retrieval` of a task file.
#[derive(Debug)]
pub struct Retrieval {
    /// Column of the contexts: a list of texts, best first.
    pub contexts: String,
    /// Column that says which contexts are relevant: a list of 0 and 1 or true and false. Without it a context is
    /// relevant when it contains a gold answer.
    pub relevant: Option<String>,
    /// Column of the statements the contexts should support, a list of texts; the gold answers without it.
    pub supporting: Option<String>,
    /// Template of the prompt without contexts.
    pub closed: String,
}

impl Retrieval {
    /// Reads the keys.
    pub fn parse(value: &Json) -> Result<Self, String> {
        let get = string_keys(value, &["contexts", "relevant", "supporting", "doc_to_text_closed"])?;
        Ok(Self {
            contexts: get("contexts")?.unwrap_or_else(|| "contexts".into()),
            relevant: get("relevant")?,
            supporting: get("supporting")?,
            closed: get("doc_to_text_closed")?.unwrap_or_else(|| "Question: {{question}}\nAnswer:".into()),
        })
    }

    /// Contexts of a row.
    pub fn contexts_of(&self, row: &Map<String, Json>) -> Result<Vec<String>, Unfit> {
        texts(row, &self.contexts)
    }

    /// What depends on the row alone: precision and recall of the contexts.
    pub fn of_contexts(&self, row: &Map<String, Json>, gold: &[String]) -> Result<(f64, f64), Unfit> {
        let contexts = self.contexts_of(row)?;
        let gold_words: Vec<String> = gold.iter().map(|g| spaced(g)).collect();
        let relevant: Vec<bool> = match &self.relevant {
            None => contexts.iter().map(|c| gold_words.iter().any(|g| spaced(c).contains(g.as_str()))).collect(),
            Some(column) => {
                let unfit = |problem: String| Unfit { column: column.clone(), problem };
                let list = row.get(column).and_then(Json::as_array);
                let list = list.ok_or_else(|| unfit("expected a list of 0 and 1".into()))?;
                if list.len() != contexts.len() {
                    return Err(unfit(format!("{} labels for {} contexts", list.len(), contexts.len())));
                }
                let label = |v: &Json| match (v.as_bool(), v.as_i64()) {
                    (Some(yes), _) => Ok(yes),
                    (None, Some(n @ (0 | 1))) => Ok(n == 1),
                    _ => Err(unfit(format!("expected a list of 0 and 1, found {v} in it"))),
                };
                list.iter().map(label).collect::<Result<_, _>>()?
            }
        };
        let supporting = match &self.supporting {
            None => gold.to_vec(),
            Some(column) => texts(row, column)?,
        };
        let pool: HashSet<String> = contexts.iter().flat_map(|c| words(c)).collect();
        let shares: Vec<f64> = supporting.iter().map(|s| share(&words(s), &pool)).collect();
        let recall = match self.supporting {
            // The best of several phrasings of the same answer, but all of several statements.
            None => shares.iter().copied().fold(0.0, f64::max),
            Some(_) => shares.iter().sum::<f64>() / shares.len().max(1) as f64,
        };
        Ok((average_precision(&relevant), recall))
    }

    /// Share of the answer's words that occur in the contexts or in the question: 1 for an answer without words.
    pub fn faithfulness(&self, answer: &str, row: &Map<String, Json>, prompt_closed: &str) -> Result<f64, Unfit> {
        let mut pool: HashSet<String> = self.contexts_of(row)?.iter().flat_map(|c| words(c)).collect();
        pool.extend(words(prompt_closed));
        let said = words(answer);
        Ok(if said.is_empty() { 1.0 } else { share(&said, &pool) })
    }
}

fn texts(row: &Map<String, Json>, column: &str) -> Result<Vec<String>, Unfit> {
    match row.get(column) {
        Some(Json::Array(list)) => Ok(list.iter().map(json_to_str).collect()),
        Some(other) => {
            Err(Unfit { column: column.into(), problem: format!("expected a list of texts, found {other}") })
        }
        None => Err(Unfit { column: column.into(), problem: "the row has no such column".into() }),
    }
}

/// The words with one blank around each, so that containment respects word borders.
fn spaced(text: &str) -> String {
    words(text).iter().fold(String::from(" "), |out, w| out + w + " ")
}

fn share(said: &[String], pool: &HashSet<String>) -> f64 {
    if said.is_empty() { 0.0 } else { said.iter().filter(|w| pool.contains(*w)).count() as f64 / said.len() as f64 }
}

/// Mean over the relevant ranks of the precision down to that rank; 0 when nothing is relevant.
fn average_precision(relevant: &[bool]) -> f64 {
    let (mut hits, mut sum) = (0.0, 0.0);
    for (rank, _) in relevant.iter().enumerate().filter(|(_, r)| **r) {
        hits += 1.0;
        sum += hits / (rank + 1) as f64;
    }
    if hits == 0.0 { 0.0 } else { sum / hits }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row() -> Map<String, Json> {
        json!({"contexts": ["Rain falls.", "The tower is in Paris, France.", "It is tall."], "marks": [1, 0, 1], "facts": ["tower Paris", "painted green"]})
            .as_object()
            .unwrap()
            .clone()
    }

    #[test]
    fn precision_is_by_rank_and_recall_by_words() {
        let r = Retrieval::parse(&json!({})).unwrap();
        let (precision, recall) = r.of_contexts(&row(), &["Paris".into(), "par".into()]).unwrap();
        assert_eq!((precision, recall), (0.5, 1.0));
        assert_eq!(r.of_contexts(&row(), &["Par".into()]).unwrap(), (0.0, 0.0));
        let r = Retrieval::parse(&json!({"relevant": "marks", "supporting": "facts"})).unwrap();
        let (precision, recall) = r.of_contexts(&row(), &["x".into()]).unwrap();
        assert!((precision - (1.0 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
        assert_eq!(recall, 0.5);
        for (marks, says) in
            [(json!([1, 0]), "2 labels for 3"), (json!([1, 0, "yes"]), "\"yes\""), (json!(1), "a list")]
        {
            let mut bad = row();
            bad.insert("marks".into(), marks);
            let e = r.of_contexts(&bad, &["x".into()]).unwrap_err();
            assert!(e.column == "marks" && e.problem.contains(says), "{e:?}");
        }
    }

    #[test]
    fn faithful_words_come_from_the_contexts() {
        let r = Retrieval::parse(&json!({})).unwrap();
        assert_eq!(r.faithfulness("The tower: Berlin", &row(), "Where?").unwrap(), 2.0 / 3.0);
        assert_eq!(r.faithfulness("", &row(), "").unwrap(), 1.0);
        let mut lacking = row();
        lacking.remove("contexts");
        assert_eq!(r.faithfulness("a", &lacking, "").unwrap_err().column, "contexts");
        assert!(Retrieval::parse(&json!({"context": "c"})).unwrap_err().contains("`context`"));
    }
}
