//! A suite from its requests to what goes into the record.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::aggregate::Scores;
use super::config::OutputType;
use super::error::{Result, TaskError};
use super::item::Item;
use super::prompt::ChatOptions;
use super::registry::Suite;
use super::request::{Request, Response};
use super::task::DocumentHead;

/// All requests of a suite, and which document each belongs to.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// In order of task, document and index.
    pub requests: Vec<Request>,
    /// Task, document, number of its requests.
    pub(super) documents: Vec<(usize, DocumentHead, usize)>,
}

/// One model's results.
#[derive(Clone, Debug, Default)]
pub struct Evaluated {
    /// In order of task and document.
    pub items: Vec<Item>,
    /// By label of the task or name of the group.
    pub scores: BTreeMap<String, Scores>,
}

/// `tasks.<name>` of `eval.json`: the candidate's metrics by name, each with `<metric>_stderr` where it has one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Documents.
    pub n: usize,
    /// What items of this task are called, where that is not the record's name; empty for a group.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Examples a document; none for a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_fewshot: Option<usize>,
    /// The task file's version.
    #[serde(default, skip_serializing_if = "Json::is_null")]
    pub version: Json,
    /// SHA-256 of the task file's keys.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task_sha256: String,
    /// SHA-256 of the data.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub data_sha256: String,
    /// The reference's metrics, in the same form.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reference: BTreeMap<String, f64>,
    /// Candidate minus reference.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub delta: BTreeMap<String, f64>,
    /// Direction of each metric.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub higher_is_better: BTreeMap<String, bool>,
    /// Metrics and standard errors.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

/// A document of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Position of its task in the suite.
    pub task: usize,
    /// Position in the evaluated split.
    pub doc: usize,
    /// Its requests among the plan's.
    pub requests: Range<usize>,
}

impl Plan {
    /// Documents.
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// The documents in order.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        let mut at = 0;
        self.documents.iter().map(move |(task, head, count)| {
            let requests = at..at + count;
            at = requests.end;
            Span { task: *task, doc: head.doc, requests }
        })
    }

    /// The documents `keep` holds on to, with their requests, in the same order.
    pub fn part(&self, keep: impl Fn(&Span) -> bool) -> Plan {
        let mut out = Plan::default();
        for (span, document) in self.spans().zip(&self.documents) {
            if keep(&span) {
                out.documents.push(document.clone());
                out.requests.extend_from_slice(&self.requests[span.requests]);
            }
        }
        out
    }
}

impl Suite {
    /// Name asked for → labels of its tasks: a group's tasks count as one for whoever judges, a task alone as itself.
    pub fn families(&self) -> BTreeMap<String, Vec<String>> {
        let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for task in &self.tasks {
            // A group stands before the groups inside it.
            let group = self.groups.iter().find(|g| g.members.contains(&task.label));
            let name = group.map_or(&task.label, |g| &g.name);
            out.entry(name.clone()).or_default().push(task.label.clone());
        }
        out
    }

    /// Documents of a plan by the name they were asked for, as a verdict pairs them: without rolled texts, whose perplexity is
    /// judged otherwise.
    pub fn sizes(&self, plan: &Plan) -> BTreeMap<String, u64> {
        let families = self.families();
        let mut out = BTreeMap::new();
        for (index, _, _) in &plan.documents {
            let Some(task) = self.tasks.get(*index).filter(|t| t.config.output_type != OutputType::Rolling) else {
                continue;
            };
            let family = families.iter().find(|(_, labels)| labels.contains(&task.label));
            *out.entry(family.map_or(&task.label, |f| f.0).clone()).or_insert(0) += 1;
        }
        out
    }

    /// Renders every task, to be answered and scored.
    pub fn plan(&self, chat: ChatOptions<'_>, limit: Option<usize>) -> Result<Plan> {
        for config in self.tasks.iter().map(|t| &t.config) {
            if let Some((key, problem)) = config.unscored.clone() {
                return Err(TaskError::Setting { file: config.file.clone(), task: config.task.clone(), key, problem });
            }
        }
        let mut plan = Plan::default();
        for (index, task) in self.tasks.iter().enumerate() {
            for rendered in task.documents(chat, limit) {
                let rendered = rendered?;
                plan.documents.push((index, rendered.head, rendered.requests.len()));
                plan.requests.extend(rendered.requests);
            }
        }
        Ok(plan)
    }

    /// Scores the answers to a plan's requests, given in their order.
    pub fn evaluate(&self, plan: &Plan, answers: &[Response]) -> Result<Evaluated> {
        self.aggregate(self.items(plan, answers)?)
    }

    /// One item a document.
    pub fn items(&self, plan: &Plan, answers: &[Response]) -> Result<Vec<Item>> {
        let mut out = Vec::with_capacity(plan.documents.len());
        let mut rest = answers;
        for (index, head, count) in &plan.documents {
            let (Some(task), Some((own, after))) = (self.tasks.get(*index), rest.split_at_checked(*count)) else {
                return Err(TaskError::Responses {
                    task: "all".into(),
                    doc: head.doc,
                    expected: format!("{} answers", plan.requests.len()),
                    found: answers.len().to_string(),
                });
            };
            rest = after;
            out.push(task.item(head, own)?);
        }
        Ok(out)
    }

    /// Scores of tasks and groups from their items.
    pub fn aggregate(&self, items: Vec<Item>) -> Result<Evaluated> {
        let mut out = Evaluated { items, scores: BTreeMap::new() };
        for task in &self.tasks {
            let items: Vec<&Item> = out.items.iter().filter(|i| i.task == task.label).collect();
            out.scores.insert(task.label.clone(), task.scores(&items)?);
        }
        let groups = self.groups(&out.scores);
        out.scores.extend(groups);
        Ok(out)
    }

    /// What goes into `eval.json`, by the task's name; by its label (`name:shots`) where a task runs more than once.
    pub fn records(&self, candidate: &Evaluated, reference: Option<&Evaluated>) -> BTreeMap<String, TaskRecord> {
        let mut out = BTreeMap::new();
        for (label, scores) in &candidate.scores {
            let mut record = TaskRecord { n: scores.n, metrics: flat(scores), ..TaskRecord::default() };
            for (name, score) in &scores.metrics {
                record.higher_is_better.insert(name.clone(), score.higher_is_better);
            }
            if let Some(theirs) = reference.and_then(|r| r.scores.get(label)) {
                record.reference = flat(theirs);
                for (name, score) in &scores.metrics {
                    if let Some(other) = theirs.metrics.get(name) {
                        record.delta.insert(name.clone(), score.value - other.value);
                    }
                }
            }
            let mut name = label.clone();
            if let Some(task) = self.tasks.iter().find(|t| t.label == *label) {
                record.label.clone_from(&task.label);
                record.num_fewshot = Some(task.shots);
                record.version = task.config.version.clone();
                record.task_sha256.clone_from(&task.config.sha256);
                record.data_sha256.clone_from(&task.data_sha256);
                if self.tasks.iter().filter(|t| t.config.task == task.config.task).count() == 1 {
                    name.clone_from(&task.config.task);
                }
            }
            out.insert(name, record);
        }
        out
    }
}

fn flat(scores: &Scores) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    for (name, score) in &scores.metrics {
        out.insert(name.clone(), score.value);
        if let Some(stderr) = score.stderr {
            // `exact_match_stderr,strict-match`, as lm-eval spells it.
            let (metric, filter) = name.split_once(',').map_or((name.as_str(), None), |(m, f)| (m, Some(f)));
            let filter = filter.map_or(String::new(), |f| format!(",{f}"));
            out.insert(format!("{metric}_stderr{filter}"), stderr);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::config::parse;
    use super::super::data::DataOptions;
    use super::super::task::Task;
    use super::super::yaml::{Place, load};
    use super::*;

    fn suite(yaml: &str, rows: &str) -> (tempfile::TempDir, Suite) {
        let dir = tempfile::tempdir().unwrap();
        let head = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n";
        std::fs::write(dir.path().join("t.yaml"), format!("{head}{yaml}")).unwrap();
        std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
        let place = Place::Disk(dir.path().join("t.yaml"));
        let config = parse(&place, &load(&place).unwrap()).unwrap();
        let task = Task::load(config, None, "t".into(), &DataOptions::default()).unwrap();
        (dir, Suite { tasks: vec![task], ..Suite::default() })
    }

    fn ll(log_prob: f64) -> Response {
        Response::LogLikelihood { log_prob, greedy: log_prob > -1.0 }
    }

    #[test]
    fn choices_by_sum_code_point_and_byte() {
        let yaml = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: label\ndoc_to_choice: c\n";
        let (_dir, suite) = suite(
            yaml,
            "{\"q\": \"x\", \"c\": [\"ab\", \"éééé\", \"abcdef\"], \"label\": 1}\n{\"q\": \"y\", \"c\": [\"a\", \"b\"], \"label\": 1}\n",
        );
        let plan = suite.plan(ChatOptions::default(), None).unwrap();
        assert_eq!(plan.requests.len(), 5);
        // By sum the first; per code point the second (−0.75 against −1.5 and −0.8); per byte −0.375 also the second.
        let answers = [ll(-2.9), ll(-3.0), ll(-4.8), ll(-2.0), ll(-2.0)];
        let ours = suite.evaluate(&plan, &answers).unwrap();
        let metrics: Vec<f64> = ours.items[0].metrics.values().copied().collect();
        assert_eq!((ours.items[0].choice, metrics), (Some(0), vec![0.0, 1.0, 1.0]));
        // Of equals the first.
        assert_eq!((ours.items[1].choice, &ours.items[1].gold), (Some(0), &vec![1]));
        let theirs = suite.evaluate(&plan, &[ll(-9.0), ll(-3.0), ll(-9.0), ll(-3.0), ll(-2.0)]).unwrap();
        let record = &suite.records(&ours, Some(&theirs))["t"];
        assert_eq!((record.metrics["acc"], record.reference["acc"], record.delta["acc"]), (0.0, 1.0, -1.0));
        assert_eq!((record.metrics["acc_norm"], record.metrics["acc_norm_stderr"]), (0.5, 0.5));
        let text = serde_json::to_string(record).unwrap();
        assert_eq!(&serde_json::from_str::<TaskRecord>(&text).unwrap(), record);
        assert!(suite.evaluate(&plan, &answers[..4]).is_err());
    }

    #[test]
    fn filtered_text_and_rolled_text() {
        let yaml = "doc_to_text: q\ndoc_to_target: a\nfilter_list:\n  - name: first\n    filter: [{function: regex, regex_pattern: '[0-9]+'}, {function: take_first}]\n  - name: last\n    filter: [{function: regex, regex_pattern: '[0-9]+', group_select: -1}, {function: take_first}]\n";
        let (_dir, generated) = suite(yaml, "{\"q\": \"x\", \"a\": 7}\n");
        let plan = generated.plan(ChatOptions::default(), None).unwrap();
        let e = generated.evaluate(&plan, &[Response::Generated { text: "3 then 7".into() }]).unwrap();
        let want = [("exact_match,first".to_owned(), 0.0), ("exact_match,last".to_owned(), 1.0)];
        assert_eq!(e.items[0].metrics, want.into());
        assert_eq!(e.items[0].responses, ["3 then 7"]);

        let (_dir, rolled) =
            suite("output_type: loglikelihood_rolling\ndoc_to_target: a\n", "{\"a\": \"two words\"}\n{\"a\": \"x\"}\n");
        let plan = rolled.plan(ChatOptions::default(), None).unwrap();
        let e = rolled
            .evaluate(&plan, &[Response::Rolling { log_prob: -6.0 }, Response::Rolling { log_prob: -3.0 }])
            .unwrap();
        let s = &e.scores["t"].metrics;
        assert!((s["word_perplexity"].value - 3.0f64.exp()).abs() < 1e-9 && s["word_perplexity"].stderr.is_none());
        assert!((s["bits_per_byte"].value - 0.9 / std::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn retrieval_compares_with_and_without_contexts() {
        let yaml = "retrieval: {}\ndoc_to_text: '{{contexts[0]}} {{question}}'\ndoc_to_target: a\n";
        let (_dir, suite) =
            suite(yaml, "{\"contexts\": [\"Rome is in Italy\"], \"question\": \"Where is Rome?\", \"a\": \"Italy\"}\n");
        let plan = suite.plan(ChatOptions::default(), None).unwrap();
        let answers = [Response::Generated { text: "Italy".into() }, ll(-1.0), ll(-3.5)];
        let item = &suite.evaluate(&plan, &answers).unwrap().items[0];
        for (name, value) in [
            ("exact_match", 1.0),
            ("faithfulness", 1.0),
            ("context_gain", 2.5),
            ("context_precision", 1.0),
            ("context_recall", 1.0),
            ("rouge_l", 1.0),
        ] {
            assert_eq!(item.metrics[name], value, "{name}");
        }
    }
}
