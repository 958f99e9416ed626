//! A task with its data: documents in, requests out.

mod evaluate;
mod requests;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use minijinja::value::Value;
use serde_json::{Map, Value as Json};

use super::config::{Field, TaskConfig};
use super::data::{self, DataOptions, Row, Rows};
use super::error::{Result, TaskError};
use super::metrics::Metric;
use super::pipeline::Pipeline;
use super::python::{self, literal_eval};
use super::template::{RenderError, Templates};
use super::twins::{self, Twin, Unfit};

pub(in crate::tasks) use evaluate::keyed;
pub use requests::{DocumentHead, Documents, Rendered};

/// A task ready to render.
#[derive(Debug)]
pub struct Task {
    /// Its file.
    pub config: TaskConfig,
    /// Examples a document.
    pub shots: usize,
    /// As asked for: `arc_easy`, `arc_easy:5`.
    pub label: String,
    /// SHA-256 of the evaluated split's files.
    pub data_sha256: String,
    /// Files of the evaluated split.
    pub data_files: Vec<PathBuf>,
    /// What the user should know, such as examples from another split than the task names.
    pub notes: Vec<String>,
    templates: Templates,
    docs: Vec<Doc>,
    pool: Vec<Doc>,
    columns: HashSet<String>,
}

/// A prepared row.
#[derive(Clone, Debug)]
struct Doc {
    values: Map<String, Json>,
    value: Value,
    file: Arc<PathBuf>,
    row: usize,
}

impl Doc {
    fn new(row: Row, twin: Option<Twin>) -> std::result::Result<Self, (Row, Unfit)> {
        let values = match twin {
            None => row.values,
            Some(twin) => match twins::process_doc(twin, &row.values) {
                Ok(values) => values,
                Err(unfit) => return Err((row, unfit)),
            },
        };
        let value = python::columns(&values);
        Ok(Self { values, value, file: row.file, row: row.row })
    }
}

impl Task {
    /// Reads the data of a task. Few-shot rows are read only where there are shots.
    pub fn load(config: TaskConfig, shots: Option<usize>, label: String, options: &DataOptions<'_>) -> Result<Self> {
        let setting = |key: &str, problem: String| TaskError::Setting {
            file: config.file.clone(),
            task: config.task.clone(),
            key: key.into(),
            problem,
        };
        // A task that fixes 0 shots has its examples in the prompt already.
        let shots = if config.num_fewshot == Some(0) { 0 } else { shots.or(config.num_fewshot).unwrap_or(0) };
        let templates = compile(&config).map_err(|(key, problem)| setting(&key, problem))?;
        let split = config.eval_split().unwrap_or_default().to_owned();
        let rows = data::read(&data::find(&config, &split, options)?)?;
        let Rows { rows, sha256, files } = rows;
        if rows.is_empty() {
            let file = files.first().cloned().unwrap_or_default();
            return Err(TaskError::NoData {
                task: config.task.clone(),
                split,
                problem: format!("{} holds no rows", file.display()),
                hint: "a row a document: in .jsonl a JSON object a line".into(),
            });
        }
        let prepare = |rows: Vec<Row>, twin: Option<Twin>| -> Result<Vec<Doc>> {
            rows.into_iter()
                .map(|row| {
                    Doc::new(row, twin).map_err(|(row, unfit)| TaskError::Row {
                        file: row.file.as_path().to_owned(),
                        task: config.task.clone(),
                        row: row.row,
                        columns: vec![unfit.column],
                        problem: unfit.problem,
                    })
                })
                .collect()
        };
        let docs = prepare(rows, config.process_docs)?;
        let columns = docs.first().map(|d| d.values.keys().cloned().collect()).unwrap_or_default();
        let mut notes = Vec::new();
        let pool = match (shots, &config.fewshot.samples, &config.fewshot.split) {
            (0, _, _) => Vec::new(),
            (_, Some(samples), None) => {
                let file = Arc::new(config.file.clone());
                let row = |(i, values): (usize, &Map<String, Json>)| Row {
                    values: values.clone(),
                    file: Arc::clone(&file),
                    row: i + 1,
                };
                prepare(samples.iter().enumerate().map(row).collect(), None)?
            }
            _ => {
                let (from, files) = example_files(&config, options, &mut notes)?;
                if from == split && config.fewshot.process_docs == config.process_docs {
                    docs.clone()
                } else {
                    prepare(data::read(&files)?.rows, config.fewshot.process_docs)?
                }
            }
        };
        Ok(Self { shots, label, data_sha256: sha256, data_files: files, notes, templates, docs, pool, columns, config })
    }

    /// Documents in the evaluated split.
    pub fn len(&self) -> usize {
        self.docs.len()
    }

    /// Whether there are none; loading refuses that.
    pub fn is_empty(&self) -> bool {
        self.docs.is_empty()
    }

    fn wrong(&self, doc: &Doc, columns: &[&str], problem: impl Into<String>) -> TaskError {
        TaskError::Row {
            file: doc.file.as_path().to_owned(),
            task: self.config.task.clone(),
            row: doc.row,
            columns: columns.iter().map(|c| (*c).to_owned()).collect(),
            problem: problem.into(),
        }
    }

    fn unfit(&self, doc: &Doc, unfit: Unfit) -> TaskError {
        let columns: Vec<&str> = Some(unfit.column.as_str()).filter(|c| !c.is_empty()).into_iter().collect();
        self.wrong(doc, &columns, unfit.problem)
    }

    /// The columns that the value at `key` is made of: the one it names, or those of its template.
    fn columns_of<'a>(&'a self, key: &str, field: &'a Field) -> Vec<&'a str> {
        match field {
            Field::Text(text) if self.columns.contains(text) => vec![text.as_str()],
            Field::Text(_) => self.templates.names(key).iter().map(String::as_str).collect(),
            Field::Index(_) | Field::List(_) | Field::Twin(_) => Vec::new(),
        }
    }

    /// A template that does not render is the fault of a column that is missing, or else of those it is made of.
    fn unrendered(&self, doc: &Doc, key: &str, error: &RenderError) -> TaskError {
        match error.names.iter().find(|n| error.undefined && !doc.values.contains_key(*n)) {
            Some(name) => self.wrong(doc, &[name.as_str()], format!("`{key}` needs this column")),
            None => {
                let names: Vec<&str> = error.names.iter().map(String::as_str).collect();
                self.wrong(doc, &names, format!("`{key}`: {}", error.problem))
            }
        }
    }

    /// A column raw, or a rendered template.
    fn text_of(&self, doc: &Doc, key: &str, text: &str) -> Result<TextValue> {
        if self.columns.contains(text) {
            return match doc.values.get(text) {
                Some(value) => Ok(TextValue::Column(value.clone())),
                None => Err(self.wrong(doc, &[text], format!("`{key}` needs this column"))),
            };
        }
        let rendered = self.templates.render(key, &doc.value).map_err(|e| self.unrendered(doc, key, &e))?;
        if is_name(text) {
            // A bare name is a column, not a text to be shown.
            return Err(self.wrong(doc, &[text], format!("`{key}` names this column and the data has none of it")));
        }
        Ok(TextValue::Rendered(rendered))
    }

    /// `doc_to_text`: text, or the index of the input that is right.
    fn doc_to_text(&self, doc: &Doc, key: &str, field: &Field) -> Result<Json> {
        match field {
            Field::Index(n) => Ok((*n).into()),
            Field::List(_) => Err(self.wrong(doc, &[], format!("`{key}` is a list"))),
            Field::Twin(twin) => twins::value(*twin, &doc.values).map_err(|u| self.unfit(doc, u)),
            Field::Text(text) => Ok(match self.text_of(doc, key, text)? {
                TextValue::Column(value) => value,
                TextValue::Rendered(text) => self.digits(text).unwrap_or_else(Json::String),
            }),
        }
    }

    /// A rendered number is an index where the task has choices.
    fn digits(&self, text: String) -> std::result::Result<Json, String> {
        if self.config.choice.is_none() || !python::is_digits(&text) {
            return Err(text);
        }
        literal_eval(&text).map_err(|_| text)
    }

    /// `doc_to_target`: text, an index, or several of either.
    fn doc_to_target(&self, doc: &Doc, key: &str, field: &Field) -> Result<Json> {
        match field {
            Field::Index(n) => Ok((*n).into()),
            Field::List(list) => Ok(list.clone().into()),
            Field::Twin(twin) => twins::value(*twin, &doc.values).map_err(|u| self.unfit(doc, u)),
            Field::Text(text) => Ok(match self.text_of(doc, key, text)? {
                TextValue::Column(value) => value,
                TextValue::Rendered(text) => match self.digits(text) {
                    Ok(index) => index,
                    Err(text) if text.len() >= 2 && text.starts_with('[') && text.ends_with(']') => {
                        literal_eval(&text).unwrap_or(Json::String(text))
                    }
                    Err(text) => Json::String(text),
                },
            }),
        }
    }

    /// `doc_to_choice`: the texts to choose among.
    fn doc_to_choice(&self, doc: &Doc, key: &str, field: &Field) -> Result<Vec<String>> {
        let columns = self.columns_of(key, field);
        let value = match field {
            Field::Index(n) => return Err(self.wrong(doc, &[], format!("`{key}`: expected a list, found {n}"))),
            Field::List(list) => Json::Array(list.clone()),
            Field::Twin(twin) => twins::value(*twin, &doc.values).map_err(|u| self.unfit(doc, u))?,
            Field::Text(text) => match self.text_of(doc, key, text)? {
                TextValue::Column(value) => value,
                TextValue::Rendered(text) => literal_eval(&text)
                    .map_err(|p| self.wrong(doc, &columns, format!("`{key}` gives `{text}`, which is {p}")))?,
            },
        };
        let Json::Array(items) = value else {
            return Err(self.wrong(doc, &columns, format!("`{key}`: expected a list of choices, found {value}")));
        };
        if items.is_empty() {
            return Err(self.wrong(doc, &columns, format!("`{key}` gives no choices")));
        }
        items
            .into_iter()
            .map(|item| match item {
                Json::String(text) => Ok(text),
                other => Err(self.wrong(doc, &columns, format!("`{key}`: expected texts, found {other}"))),
            })
            .collect()
    }

    /// A setting that is a column, a template, or empty.
    fn plain(&self, doc: &Doc, key: &str, text: &str) -> Result<String> {
        if text.is_empty() {
            return Ok(String::new());
        }
        if let (true, Some(value)) = (doc.values.contains_key(text), doc.values.get(text)) {
            return Ok(python::json_to_str(value));
        }
        self.templates.render(key, &doc.value).map_err(|e| self.unrendered(doc, key, &e))
    }
}

impl Task {
    fn document(&self, head: &DocumentHead) -> Result<&Doc> {
        self.docs.get(head.doc).ok_or_else(|| TaskError::Responses {
            task: self.label.clone(),
            doc: head.doc,
            expected: "a document of this task".into(),
            found: "another".into(),
        })
    }

    /// A template of the file, of a document.
    pub(super) fn rendered(&self, head: &DocumentHead, key: &str) -> Result<String> {
        let doc = self.document(head)?;
        self.templates.render(key, &doc.value).map_err(|e| self.unrendered(doc, key, &e))
    }

    /// `doc_to_text` of a document, without examples.
    pub(super) fn asked(&self, head: &DocumentHead) -> Result<String> {
        let doc = self.document(head)?;
        Ok(python::json_to_str(&self.doc_to_text(doc, "doc_to_text", &self.config.text)?))
    }
}

/// The split and files examples come from.
///
/// Where the task does not fix the split, the first of training, validation and test split counts that is there: data
/// below `--data` often lack the training split. That is noted, since other examples give other scores.
fn example_files(
    config: &TaskConfig,
    options: &DataOptions<'_>,
    notes: &mut Vec<String>,
) -> Result<(String, Vec<PathBuf>)> {
    let splits: Vec<&String> = match &config.fewshot.split {
        Some(split) => vec![split],
        None => [&config.training_split, &config.validation_split, &config.test_split].into_iter().flatten().collect(),
    };
    let mut first = None;
    for split in splits {
        match data::find(config, split, options) {
            Ok(files) => {
                if let Some(TaskError::NoData { split: missing, .. }) = &first {
                    notes.push(format!("{}: no `{missing}` data, so examples come from `{split}`", config.task));
                }
                return Ok((split.clone(), files));
            }
            Err(e @ TaskError::NoData { .. }) => first = first.or(Some(e)),
            Err(e) => return Err(e),
        }
    }
    Err(first.unwrap_or_else(|| TaskError::Setting {
        file: config.file.clone(),
        task: config.task.clone(),
        key: "fewshot_split".into(),
        problem: "missing: examples need a split".into(),
    }))
}

enum TextValue {
    Column(Json),
    Rendered(String),
}

/// Whether a text can only be meant as a column's name.
fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_lowercase() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Compiles every template of a task under the key it stands at.
fn compile(config: &TaskConfig) -> std::result::Result<Templates, (String, String)> {
    let mut out = Templates::default();
    let shots = &config.fewshot;
    let mut add = |key: &str, text: &str| out.add(key, text).map_err(|p| (key.to_owned(), p));
    for (key, field) in [
        ("doc_to_text", Some(&config.text)),
        ("doc_to_target", Some(&config.target)),
        ("doc_to_choice", config.choice.as_ref()),
        ("fewshot_config.doc_to_text", Some(&shots.text)),
        ("fewshot_config.doc_to_target", Some(&shots.target)),
        ("fewshot_config.doc_to_choice", shots.choice.as_ref()),
    ] {
        if let Some(Field::Text(text)) = field {
            add(key, text)?;
        }
    }
    add("description", &config.description)?;
    add("gen_prefix", config.gen_prefix.as_deref().unwrap_or_default())?;
    add("fewshot_config.gen_prefix", shots.gen_prefix.as_deref().unwrap_or_default())?;
    if let Some(Pipeline::Retrieval(r)) = &config.pipeline {
        add("retrieval.doc_to_text_closed", &r.closed)?;
    }
    for metric in &config.metrics {
        if let Metric::Judge(spec) = &metric.metric {
            let [question, rubric] = Task::judge_keys(spec);
            add(&question, spec.question.as_deref().unwrap_or_default())?;
            add(&rubric, &spec.rubric)?;
        }
    }
    Ok(out)
}
