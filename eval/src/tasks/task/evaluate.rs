//! From the answers to one document to its [`Item`].

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::requests::DocumentHead;
use super::{Doc, Task};
use crate::tasks::config::{FilterChain, OutputType};
use crate::tasks::error::{Result, TaskError};
use crate::tasks::item::Item;
use crate::tasks::metrics::Metric;
use crate::tasks::pipeline::Pipeline;
use crate::tasks::python::json_to_str;
use crate::tasks::request::Response;
use crate::tasks::twins::{self, Twin};
use crate::text::word_count;

impl Task {
    /// What the answers to a document's requests, in order, amount to.
    pub fn item(&self, head: &DocumentHead, responses: &[Response]) -> Result<Item> {
        let doc = self.docs.get(head.doc).ok_or_else(|| self.misfit(head, "a document of this task", "another"))?;
        let mut item = Item {
            task: self.label.clone(),
            doc: head.doc,
            doc_hash: head.doc_hash.clone(),
            prompt_hash: head.prompt_hash.clone(),
            target_hash: head.target_hash.clone(),
            cluster: self.config.cluster.as_ref().and_then(|c| doc.values.get(c)).map(json_to_str),
            metrics: BTreeMap::new(),
            log_probs: Vec::new(),
            choice: None,
            gold: head.gold.clone(),
            responses: Vec::new(),
        };
        let mut greedy = Vec::new();
        for response in responses {
            match response {
                Response::LogLikelihood { log_prob, greedy: g } => {
                    item.log_probs.push(*log_prob);
                    greedy.push(*g);
                }
                Response::Rolling { log_prob } => item.log_probs.push(*log_prob),
                Response::Generated { text } => item.responses.push(text.clone()),
            }
        }
        if let Some(bad) = item.log_probs.iter().find(|ll| ll.is_nan()) {
            return Err(self.misfit(head, "a log-likelihood", &bad.to_string()));
        }
        match self.config.output_type {
            OutputType::MultipleChoice => self.choose(head, doc, &greedy, &mut item)?,
            OutputType::LogLikelihood => match (item.log_probs.as_slice(), greedy.as_slice()) {
                ([ll], [g]) => {
                    item.metrics.insert("log_prob".into(), *ll);
                    item.metrics.insert("acc".into(), f64::from(u8::from(*g)));
                }
                _ => return Err(self.misfit(head, "one log-likelihood", &responses.len().to_string())),
            },
            OutputType::Rolling => match item.log_probs.as_slice() {
                [ll] => {
                    let text = match self.config.process_results {
                        // Counted on the page as it was, before the detokenizer.
                        Some(Twin::WikitextResults) => doc.values.get("page").map(json_to_str).unwrap_or_default(),
                        _ => head.targets.first().cloned().unwrap_or_default(),
                    };
                    item.metrics.insert("log_prob".into(), *ll);
                    item.metrics.insert("words".into(), word_count(&text) as f64);
                    item.metrics.insert("bytes".into(), text.len() as f64);
                }
                _ => return Err(self.misfit(head, "one log-likelihood", &responses.len().to_string())),
            },
            OutputType::Generate => self.compare(head, doc, &mut item)?,
        }
        Ok(item)
    }

    fn misfit(&self, head: &DocumentHead, expected: &str, found: &str) -> TaskError {
        TaskError::Responses { task: self.label.clone(), doc: head.doc, expected: expected.into(), found: found.into() }
    }

    fn choose(&self, head: &DocumentHead, doc: &Doc, greedy: &[bool], item: &mut Item) -> Result<()> {
        let choices = head.choices.as_deref().unwrap_or_default();
        let wants = |m: &dyn Fn(&Metric) -> bool| self.config.metrics.iter().any(|s| m(&s.metric));
        let mutual = wants(&|m| matches!(m, Metric::AccMutualInfo));
        let expected = choices.len() * if mutual { 2 } else { 1 };
        if item.log_probs.len() != expected || expected == 0 {
            return Err(self.misfit(head, &format!("{expected} log-likelihoods"), &item.log_probs.len().to_string()));
        }
        let (given, alone) = item.log_probs.split_at(choices.len());
        let per = |f: &dyn Fn(&str) -> usize| -> Vec<f64> {
            given.iter().zip(choices).map(|(ll, c)| ll / f(c) as f64).collect()
        };
        let right = |choice: usize| f64::from(u8::from(item.gold.contains(&choice)));
        let best = argmax(given);
        let mut metrics = BTreeMap::new();
        for spec in &self.config.metrics {
            let value = match spec.metric {
                Metric::Acc => right(best),
                Metric::AccNorm => {
                    // Bytes beside code points: the two differ outside ASCII.
                    metrics.insert("acc_bytes".to_owned(), right(argmax(&per(&str::len))));
                    right(argmax(&per(&|c| c.chars().count())))
                }
                Metric::AccBytes => right(argmax(&per(&str::len))),
                Metric::AccMutualInfo => {
                    let gain: Vec<f64> = given.iter().zip(alone).map(|(g, a)| g - a).collect();
                    right(argmax(&gain))
                }
                Metric::Mc2 => twins::mc2(&doc.values, given).map_err(|u| self.unfit(doc, u))?,
                Metric::ExactMatch(_) => {
                    f64::from(u8::from(item.gold.iter().any(|g| greedy.get(*g).copied().unwrap_or(false))))
                }
                _ => continue,
            };
            metrics.insert(spec.name.clone(), value);
        }
        item.metrics = metrics;
        item.choice = Some(best);
        Ok(())
    }

    fn compare(&self, head: &DocumentHead, doc: &Doc, item: &mut Item) -> Result<()> {
        if let Some(Pipeline::Agent(agent)) = &self.config.pipeline {
            let turns = agent.turns(&doc.values).map_err(|u| self.unfit(doc, u))?;
            if turns.len() != item.responses.len() {
                return Err(self.misfit(head, &format!("{} texts", turns.len()), &item.responses.len().to_string()));
            }
            let [calls, names, arguments] = agent.score(&turns, &item.responses);
            for spec in &self.config.metrics {
                let value = match spec.metric {
                    Metric::Pipeline("tool_calls") => calls,
                    Metric::Pipeline("tool_names") => names,
                    Metric::Pipeline("tool_arguments") => arguments,
                    _ => continue,
                };
                item.metrics.insert(spec.name.clone(), value);
            }
            return Ok(());
        }
        if item.responses.len() != self.config.repeats {
            return Err(self.misfit(
                head,
                &format!("{} texts", self.config.repeats),
                &item.responses.len().to_string(),
            ));
        }
        let choices = filter_choices(doc, head.choices.as_deref());
        for chain in &self.config.filters {
            let text = self.filtered(doc, chain, item.responses.clone(), choices.as_deref())?;
            for spec in &self.config.metrics {
                let value = spec.metric.of_text(&text, &head.targets, &doc.values);
                if let Some(value) = value.map_err(|p| self.wrong(doc, &[], format!("metric `{}`: {p}", spec.name)))? {
                    item.metrics.insert(keyed(&spec.name, &chain.name), value);
                }
            }
        }
        if let Some(Pipeline::Retrieval(_)) = &self.config.pipeline {
            self.retrieved(head, doc, item)?;
        }
        Ok(())
    }

    fn filtered(
        &self,
        doc: &Doc,
        chain: &FilterChain,
        mut texts: Vec<String>,
        choices: Option<&[String]>,
    ) -> Result<String> {
        for step in &chain.steps {
            texts = step
                .apply(texts, choices)
                .map_err(|p| self.wrong(doc, &[], format!("filter `{}`: {p}", chain.name)))?;
        }
        Ok(texts.into_iter().next().unwrap_or_default())
    }

    /// Whether every filter can be applied to the texts of a document.
    pub(super) fn check_filters(&self, doc: &Doc, choices: Option<&[String]>) -> Result<()> {
        let choices = filter_choices(doc, choices);
        let texts = vec![String::new(); self.config.repeats];
        let apply = |chain| self.filtered(doc, chain, texts.clone(), choices.as_deref()).map(|_| ());
        self.config.filters.iter().try_for_each(apply)
    }

    /// What the first filter leaves of an item's texts.
    pub(in crate::tasks) fn answer_text(&self, head: &DocumentHead, item: &Item) -> Result<String> {
        let doc = self.document(head)?;
        match self.config.filters.first() {
            Some(chain) => {
                let choices = filter_choices(doc, head.choices.as_deref());
                self.filtered(doc, chain, item.responses.clone(), choices.as_deref())
            }
            None => Ok(item.responses.first().cloned().unwrap_or_default()),
        }
    }

    fn retrieved(&self, head: &DocumentHead, doc: &Doc, item: &mut Item) -> Result<()> {
        let Some(Pipeline::Retrieval(retrieval)) = &self.config.pipeline else { return Ok(()) };
        let (&[open, closed], Some(answer)) = (item.log_probs.as_slice(), item.responses.first()) else {
            return Err(self.misfit(head, "a text and two log-likelihoods", &item.log_probs.len().to_string()));
        };
        let unfit = |u| self.unfit(doc, u);
        let (precision, recall) = retrieval.of_contexts(&doc.values, &head.targets).map_err(unfit)?;
        let faithful = retrieval.faithfulness(answer, &doc.values, &self.closed_text(doc)?).map_err(unfit)?;
        let values: BTreeMap<&str, f64> = [
            ("faithfulness", faithful),
            ("gold_log_prob", open),
            ("gold_log_prob_closed", closed),
            ("context_gain", open - closed),
            ("context_precision", precision),
            ("context_recall", recall),
        ]
        .into();
        for spec in &self.config.metrics {
            if let Metric::Pipeline(name) = spec.metric
                && let Some(value) = values.get(name)
            {
                item.metrics.insert(spec.name.clone(), *value);
            }
        }
        Ok(())
    }
}

/// The choices that a filter looks for in a text: the row's own, else the task's.
fn filter_choices(doc: &Doc, given: Option<&[String]>) -> Option<Vec<String>> {
    match doc.values.get("choices").and_then(Json::as_array) {
        Some(own) => Some(own.iter().map(json_to_str).collect()),
        None => given.map(<[String]>::to_vec),
    }
}

/// `metric,filter`; a filter called `none` is not named.
pub(in crate::tasks) fn keyed(metric: &str, filter: &str) -> String {
    if filter == "none" { metric.to_owned() } else { format!("{metric},{filter}") }
}

/// Index of the largest, the first among equals.
fn argmax(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}
