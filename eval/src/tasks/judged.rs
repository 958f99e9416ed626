//! What a judge is shown of a document.

use super::config::MetricSpec;
use super::error::{Result, TaskError};
use super::item::Item;
use super::metrics::Metric;
use super::registry::Suite;
use super::run::Plan;
use super::task::{DocumentHead, Task};
use crate::judge::JudgeSpec;

/// A document to be judged.
#[derive(Clone, Debug)]
pub struct Case<'a> {
    /// Place of its item among the plan's.
    pub item: usize,
    /// The task's label.
    pub task: &'a str,
    /// Document.
    pub doc: usize,
    /// How.
    pub spec: &'a JudgeSpec,
    /// What the model was asked.
    pub question: String,
    /// By what to judge.
    pub rubric: String,
    /// A right answer, where there is one to be shown.
    pub target: Option<String>,
}

fn spec(metric: &MetricSpec) -> Option<&JudgeSpec> {
    match &metric.metric {
        Metric::Judge(spec) => Some(spec),
        _ => None,
    }
}

impl Suite {
    /// The judges of the tasks, with the tasks' labels.
    pub fn judges(&self) -> impl Iterator<Item = (&str, &JudgeSpec)> {
        self.tasks.iter().flat_map(|t| t.config.metrics.iter().filter_map(spec).map(|s| (t.label.as_str(), s)))
    }

    /// Every document of a plan that is to be judged, once for each judge of its task.
    pub fn cases(&self, plan: &Plan) -> Result<Vec<Case<'_>>> {
        let mut out = Vec::new();
        for (item, (task, head, _)) in plan.documents.iter().enumerate() {
            let Some(task) = self.tasks.get(*task) else { continue };
            for spec in task.config.metrics.iter().filter_map(spec) {
                let (question, rubric) = task.judged(head, spec)?;
                let targets: Vec<&str> = head.targets.iter().map(|t| t.trim()).filter(|t| !t.is_empty()).collect();
                let target = (spec.show_target && !targets.is_empty()).then(|| targets.join("\n"));
                out.push(Case { item, task: &task.label, doc: head.doc, spec, question, rubric, target });
            }
        }
        Ok(out)
    }

    /// The text of an item that is judged: after the task's first filter.
    pub fn answer_text(&self, plan: &Plan, item: usize, of: &Item) -> Result<String> {
        let found = plan.documents.get(item).and_then(|(task, head, _)| Some((self.tasks.get(*task)?, head)));
        let Some((task, head)) = found else { return Err(missing(of)) };
        task.answer_text(head, of)
    }
}

fn missing(item: &Item) -> TaskError {
    TaskError::Responses { task: item.task.clone(), doc: item.doc, expected: "a document".into(), found: "none".into() }
}

impl Task {
    /// Keys of a judge's templates.
    pub(super) fn judge_keys(spec: &JudgeSpec) -> [String; 2] {
        ["question", "rubric"].map(|k| format!("{}.{k}", spec.name()))
    }

    /// Question and rubric of a document.
    pub(super) fn judged(&self, head: &DocumentHead, spec: &JudgeSpec) -> Result<(String, String)> {
        let [question, rubric] = Self::judge_keys(spec);
        let asked = match &spec.question {
            Some(_) => self.rendered(head, &question)?,
            None => self.asked(head)?,
        };
        Ok((asked, self.rendered(head, &rubric)?))
    }
}
