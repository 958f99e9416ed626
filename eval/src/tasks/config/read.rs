//! From a task file's keys to a [`TaskConfig`].

use std::collections::BTreeMap;

use lowbit_checkpoint::hash::sha256_hex;
use serde_json::{Map, Value as Json};

use super::{Aggregation, Fewshot, Field, FilterChain, Generation, MetricSpec, OutputType, SamplerKind, TaskConfig};
use crate::tasks::error::{Result, TaskError};
use crate::tasks::filters::FilterStep;
use crate::tasks::metrics::Metric;
use crate::tasks::pipeline::Pipeline;
use crate::tasks::python::json_to_str;
use crate::tasks::twins::Twin;
use crate::tasks::yaml::{FUNCTION, Place};

/// Keys that need Python, images or sound.
const UNSUPPORTED: &[&str] = &["use_prompt", "custom_dataset", "doc_to_image", "doc_to_audio", "class", "unsafe_code"];

/// Keys that change nothing here.
const IGNORED: &[&str] = &["should_decontaminate", "doc_to_decontamination_query", "task_alias", "metadata"];

/// Reads keys one by one and knows which were read.
struct Keys<'a> {
    file: std::path::PathBuf,
    folder: String,
    task: String,
    map: &'a Map<String, Json>,
    seen: std::collections::HashSet<&'a str>,
}

impl<'a> Keys<'a> {
    fn wrong(&self, key: &str, problem: impl Into<String>) -> TaskError {
        TaskError::Setting {
            file: self.file.clone(),
            task: self.task.clone(),
            key: key.into(),
            problem: problem.into(),
        }
    }

    fn get(&mut self, key: &'a str) -> Option<&'a Json> {
        self.seen.insert(key);
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn string(&mut self, key: &'a str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text.clone())),
            Some(Json::Number(n)) => Ok(Some(n.to_string())),
            Some(other) => Err(self.wrong(key, format!("expected a string, found {other}"))),
        }
    }

    fn count(&mut self, key: &'a str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) => Ok(Some(n as usize)),
                None => Err(self.wrong(key, format!("expected a whole number, found {v}"))),
            },
        }
    }

    fn strings(&mut self, key: &'a str) -> Result<Vec<String>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(v) => string_list(v).ok_or_else(|| self.wrong(key, format!("expected strings, found {v}"))),
        }
    }

    fn twin(&mut self, key: &'a str) -> Result<Option<Twin>> {
        match self.string(key)? {
            None => Ok(None),
            Some(text) => match text.strip_prefix(FUNCTION) {
                Some(name) => Twin::find(name, &self.folder).map(Some).map_err(|p| self.wrong(key, p)),
                None => Err(self.wrong(key, format!("expected `!function name`, found `{text}`"))),
            },
        }
    }

    fn field(&mut self, key: &'a str) -> Result<Option<Field>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        Ok(Some(match value {
            Json::String(text) => match text.strip_prefix(FUNCTION) {
                Some(name) => Field::Twin(Twin::find(name, &self.folder).map_err(|p| self.wrong(key, p))?),
                None => Field::Text(text.clone()),
            },
            Json::Number(n) => match n.as_i64() {
                Some(n) => Field::Index(n),
                None => return Err(self.wrong(key, format!("expected text or a whole number, found {n}"))),
            },
            Json::Array(items) => Field::List(items.clone()),
            Json::Object(map) => Field::List(map.values().cloned().collect()),
            other => return Err(self.wrong(key, format!("expected text, a number or a list, found {other}"))),
        }))
    }

    /// Fails at the first key nothing asked for.
    fn finish(&self) -> Result<()> {
        for key in self.map.keys() {
            if UNSUPPORTED.contains(&key.as_str())
                && !matches!(self.map.get(key), None | Some(Json::Null | Json::Bool(false)))
            {
                return Err(self.wrong(key, "needs Python, an image or a sound, which lowbit does not have"));
            }
            let known = self.seen.contains(key.as_str())
                || IGNORED.contains(&key.as_str())
                || UNSUPPORTED.contains(&key.as_str());
            if !known {
                let mut near: Vec<&&str> = self.seen.iter().collect();
                near.sort_by_key(|k| (distance(k, key), **k));
                let hint = near.first().map_or(String::new(), |k| format!("; did you mean `{k}`?"));
                return Err(self.wrong(key, format!("unknown key{hint}")));
            }
        }
        Ok(())
    }
}

/// Edits between two words (Levenshtein).
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (corner + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = next;
        }
    }
    row.last().copied().unwrap_or(0)
}

fn string_list(value: &Json) -> Option<Vec<String>> {
    match value {
        Json::String(text) => Some(vec![text.clone()]),
        Json::Array(items) => items.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// Checks the keys of one task.
pub fn parse(place: &Place, map: &Map<String, Json>) -> Result<TaskConfig> {
    let file = place.path();
    let Some(task) = map.get("task").and_then(Json::as_str) else {
        return Err(TaskError::File { file, problem: "no `task`: a task file names its task".into() });
    };
    let mut keys = Keys {
        file,
        folder: place.folder(),
        task: task.to_owned(),
        map,
        seen: std::collections::HashSet::from(["task"]),
    };
    let k = &mut keys;
    let tags = k.strings("tag")?;
    let output_type = match k.string("output_type")?.as_deref() {
        Some("multiple_choice") => OutputType::MultipleChoice,
        Some("loglikelihood") => OutputType::LogLikelihood,
        Some("loglikelihood_rolling") => OutputType::Rolling,
        None | Some("generate_until") => OutputType::Generate,
        Some(other) => {
            return Err(k.wrong(
                "output_type",
                format!(
                    "expected multiple_choice, loglikelihood, loglikelihood_rolling or generate_until, found `{other}`"
                ),
            ));
        }
    };
    let pipeline = pipeline(k)?;
    let fewshot_delimiter = k.string("fewshot_delimiter")?.unwrap_or_else(|| "\n\n".into());
    let target_delimiter = k.string("target_delimiter")?.unwrap_or_else(|| " ".into());
    let process_docs = k.twin("process_docs")?;
    let text = k.field("doc_to_text")?;
    let target = k.field("doc_to_target")?;
    let choice = k.field("doc_to_choice")?;
    if output_type == OutputType::MultipleChoice && choice.is_none() {
        return Err(k.wrong("doc_to_choice", "a multiple-choice task needs its choices"));
    }
    let asks_itself = pipeline.as_ref().is_some_and(Pipeline::makes_prompt);
    let empty = || Field::Text(String::new());
    let Some(text) = text.or_else(|| (output_type == OutputType::Rolling || asks_itself).then(empty)) else {
        return Err(k.wrong("doc_to_text", "missing: the question, as a column's name or a template"));
    };
    let Some(target) = target.or_else(|| asks_itself.then(empty)) else {
        return Err(k.wrong("doc_to_target", "missing: the answer, as a column's name or a template"));
    };
    let gen_prefix = k.string("gen_prefix")?;
    let fewshot_split = k.string("fewshot_split")?;
    let mut fewshot = Fewshot {
        sampler: SamplerKind::Seeded,
        split: fewshot_split,
        samples: None,
        process_docs,
        text: text.clone(),
        choice: choice.clone(),
        target: target.clone(),
        gen_prefix: gen_prefix.clone(),
        target_delimiter: target_delimiter.clone(),
        fewshot_delimiter: fewshot_delimiter.clone(),
    };
    if let Some(value) = k.get("fewshot_config") {
        fewshot_config(k, value, &mut fewshot)?;
    }
    let mut unscored = None;
    let process_results = results(k, &mut unscored)?;
    let config = TaskConfig {
        file: k.file.clone(),
        task: k.task.clone(),
        tags,
        dataset_path: k.string("dataset_path")?,
        dataset_name: k.string("dataset_name")?,
        data_files: data_files(k)?,
        local: k.strings("local")?,
        training_split: k.string("training_split")?,
        validation_split: k.string("validation_split")?,
        test_split: k.string("test_split")?,
        process_docs,
        text,
        target,
        choice,
        process_results,
        description: k.string("description")?.unwrap_or_default(),
        target_delimiter,
        gen_prefix,
        num_fewshot: k.count("num_fewshot")?,
        generation: generation(k, &fewshot_delimiter)?,
        fewshot_delimiter,
        fewshot,
        output_type,
        repeats: k.count("repeats")?.unwrap_or(1).max(1),
        filters: filters(k)?,
        cluster: k.string("cluster")?,
        metrics: match metrics(k, output_type, pipeline.as_ref(), &mut unscored) {
            Ok(metrics) => metrics,
            // A key misspelt is told before what follows from its absence.
            Err(e) => {
                k.finish()?;
                return Err(e);
            }
        },
        pipeline,
        unscored,
        version: map.get("metadata").and_then(|m| m.get("version")).cloned().unwrap_or(Json::Null),
        sha256: sha256_hex(Json::Object(map.clone()).to_string().as_bytes()),
    };
    k.finish()?;
    if config.eval_split().is_none() {
        return Err(k.wrong("test_split", "missing: a task needs a test_split or a validation_split"));
    }
    Ok(config)
}

fn pipeline(k: &mut Keys<'_>) -> Result<Option<Pipeline>> {
    let (retrieval, agent) = (k.get("retrieval"), k.get("agent"));
    match (retrieval, agent) {
        (Some(v), None) => Pipeline::retrieval(v).map(Some).map_err(|p| k.wrong("retrieval", p)),
        (None, Some(v)) => Pipeline::agent(v).map(Some).map_err(|p| k.wrong("agent", p)),
        (None, None) => Ok(None),
        _ => Err(k.wrong("agent", "a task is either `retrieval` or `agent`")),
    }
}

fn fewshot_config(k: &mut Keys<'_>, value: &Json, into: &mut Fewshot) -> Result<()> {
    let Json::Object(map) = value else {
        return Err(k.wrong("fewshot_config", format!("expected keys, found {value}")));
    };
    let mut inner =
        Keys { file: k.file.clone(), folder: k.folder.clone(), task: k.task.clone(), map, seen: Default::default() };
    let i = &mut inner;
    match i.string("sampler")?.as_deref() {
        None | Some("default") => {}
        Some("first_n") => into.sampler = SamplerKind::FirstN,
        Some(other) => return Err(i.wrong("sampler", format!("expected default or first_n, found `{other}`"))),
    }
    if let Some(split) = i.string("split")? {
        into.split = Some(split);
    }
    match i.get("samples") {
        None => {}
        Some(Json::Array(rows)) => {
            let rows: Option<Vec<Map<String, Json>>> = rows.iter().map(|r| r.as_object().cloned()).collect();
            into.samples = Some(rows.ok_or_else(|| i.wrong("samples", "expected a list of rows"))?);
        }
        Some(other) => return Err(i.wrong("samples", format!("expected a list of rows, found {other}"))),
    }
    if let Some(twin) = i.twin("process_docs")? {
        into.process_docs = Some(twin);
    }
    if let Some(field) = i.field("doc_to_text")? {
        into.text = field;
    }
    if let Some(field) = i.field("doc_to_choice")? {
        into.choice = Some(field);
    }
    if let Some(field) = i.field("doc_to_target")? {
        into.target = field;
    }
    if let Some(text) = i.string("gen_prefix")? {
        into.gen_prefix = Some(text);
    }
    if let Some(text) = i.string("target_delimiter")? {
        into.target_delimiter = text;
    }
    if let Some(text) = i.string("fewshot_delimiter")? {
        into.fewshot_delimiter = text;
    }
    i.finish()
}

fn data_files(k: &mut Keys<'_>) -> Result<BTreeMap<String, Vec<String>>> {
    let mut out = BTreeMap::new();
    let Some(kwargs) = k.get("dataset_kwargs") else { return Ok(out) };
    match kwargs.get("data_files") {
        None => {}
        Some(Json::Object(map)) => {
            for (split, files) in map {
                let list = string_list(files).ok_or_else(|| k.wrong("data_files", "expected file names by split"))?;
                out.insert(split.clone(), list);
            }
        }
        // Without splits, Python's `datasets` calls everything `train`.
        Some(files) => {
            let list = string_list(files).ok_or_else(|| k.wrong("data_files", "expected file names"))?;
            out.insert("train".into(), list);
        }
    }
    Ok(out)
}

/// Tokens at most where a task does not say.
const MAX_NEW_TOKENS: usize = 256;

fn generation(k: &mut Keys<'_>, fewshot_delimiter: &str) -> Result<Generation> {
    let mut out = Generation {
        until: vec![fewshot_delimiter.to_owned()],
        max_new_tokens: MAX_NEW_TOKENS,
        temperature: 0.0,
        do_sample: false,
    };
    let Some(value) = k.get("generation_kwargs") else { return Ok(out) };
    let Json::Object(map) = value else {
        return Err(k.wrong("generation_kwargs", format!("expected keys, found {value}")));
    };
    for (key, v) in map {
        let bad = |expected: &str| k.wrong(key, format!("expected {expected}, found {v}"));
        match key.as_str() {
            "until" => out.until = string_list(v).ok_or_else(|| bad("strings"))?,
            "max_gen_toks" | "max_new_tokens" | "max_tokens" => {
                out.max_new_tokens = v.as_u64().filter(|n| *n > 0).ok_or_else(|| bad("a number above 0"))? as usize;
            }
            "temperature" => {
                out.temperature = v.as_f64().filter(|t| *t >= 0.0).ok_or_else(|| bad("a number from 0"))?
            }
            "do_sample" => out.do_sample = v.as_bool().ok_or_else(|| bad("true or false"))?,
            _ => return Err(k.wrong(key, "generation knows until, max_gen_toks, temperature and do_sample")),
        }
    }
    Ok(out)
}

fn filters(k: &mut Keys<'_>) -> Result<Vec<FilterChain>> {
    let Some(value) = k.get("filter_list") else {
        return Ok(vec![FilterChain { name: "none".into(), steps: vec![FilterStep::TakeFirst] }]);
    };
    let wrong = |problem: &str| k.wrong("filter_list", problem);
    let chains = value.as_array().ok_or_else(|| wrong("expected a list of `name` and `filter`"))?;
    let mut out = Vec::with_capacity(chains.len());
    for chain in chains {
        let name = chain.get("name").and_then(Json::as_str).ok_or_else(|| wrong("a filter needs a `name`"))?;
        let steps =
            chain.get("filter").and_then(Json::as_array).ok_or_else(|| wrong("a filter needs its `filter` list"))?;
        let steps: std::result::Result<Vec<FilterStep>, String> = steps.iter().map(FilterStep::parse).collect();
        let steps = steps.map_err(|p| k.wrong("filter_list", format!("filter `{name}`: {p}")))?;
        out.push(FilterChain { name: name.into(), steps });
    }
    Ok(out)
}

/// `process_results`. A function without a twin is only needed for scores.
fn results(k: &mut Keys<'_>, unscored: &mut Option<(String, String)>) -> Result<Option<Twin>> {
    let function = k.string("process_results")?.is_some_and(|f| f.starts_with(FUNCTION));
    match k.twin("process_results") {
        Err(TaskError::Setting { key, problem, .. }) if function => {
            *unscored = Some((key, problem));
            Ok(None)
        }
        found => found,
    }
}

/// `metric_list`. What is not known, and what goes with a function that is not, is only needed for scores.
fn metrics(
    k: &mut Keys<'_>,
    output: OutputType,
    pipeline: Option<&Pipeline>,
    unscored: &mut Option<(String, String)>,
) -> Result<Vec<MetricSpec>> {
    let listed = k.get("metric_list");
    let default = |names: &[&str]| Json::Array(names.iter().map(|n| serde_json::json!({ "metric": n })).collect());
    let list = match (listed, pipeline, output) {
        (Some(list), _, _) => list.clone(),
        (None, Some(p), _) => default(p.default_metrics()),
        (None, None, OutputType::MultipleChoice) => default(&["acc", "acc_norm"]),
        (None, None, OutputType::LogLikelihood) => default(&["perplexity", "acc"]),
        (None, None, OutputType::Rolling) => default(&["word_perplexity", "byte_perplexity", "bits_per_byte"]),
        (None, None, OutputType::Generate) => default(&["exact_match"]),
    };
    let list = list.as_array().ok_or_else(|| k.wrong("metric_list", "expected a list of metrics"))?;
    let mut out = Vec::with_capacity(list.len() + 1);
    for entry in list {
        let name = entry.get("metric").and_then(Json::as_str);
        let name = name.ok_or_else(|| k.wrong("metric_list", "an entry needs its `metric`"))?;
        let metric = match Metric::parse(name, entry, output, pipeline) {
            Ok(metric) => metric,
            Err(p) if unscored.is_some() || !Metric::known(name, pipeline) => {
                unscored.get_or_insert(("metric_list".into(), format!("`{name}`: {p}")));
                continue;
            }
            Err(p) => return Err(k.wrong("metric_list", format!("`{name}`: {p}"))),
        };
        let (mut aggregation, mut higher) = metric.defaults();
        match entry.get("aggregation").and_then(Json::as_str) {
            None => {}
            Some("mean" | "nanmean") => aggregation = Aggregation::Mean,
            Some("median") => aggregation = Aggregation::Median,
            Some("perplexity") => aggregation = Aggregation::Perplexity,
            Some("weighted_perplexity") => aggregation = Aggregation::WeightedPerplexity,
            Some("bits_per_byte") => aggregation = Aggregation::BitsPerByte,
            Some(other) => {
                let problem = format!(
                    "`{name}`: unknown aggregation `{other}`; there are mean, median, perplexity, weighted_perplexity and bits_per_byte"
                );
                unscored.get_or_insert(("metric_list".into(), problem));
                continue;
            }
        }
        if let Some(h) = entry.get("higher_is_better") {
            higher = h.as_bool().ok_or_else(|| {
                k.wrong("metric_list", format!("`{name}`: higher_is_better is true or false, found {}", json_to_str(h)))
            })?;
        }
        if out.iter().any(|m: &MetricSpec| m.name == name) {
            return Err(k.wrong("metric_list", format!("`{name}` is listed twice")));
        }
        out.push(MetricSpec { name: name.into(), metric, aggregation, higher_is_better: higher });
    }
    Ok(out)
}
