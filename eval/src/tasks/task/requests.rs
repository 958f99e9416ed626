//! Requests of each document, in order.

use lowbit_checkpoint::chat_template::ChatTemplate;
use lowbit_checkpoint::hash::sha256_hex;
use serde_json::{Map, Value as Json};

use super::{Doc, Task};
use crate::tasks::config::OutputType;
use crate::tasks::error::{Result, TaskError};
use crate::tasks::fewshot::Sampler;
use crate::tasks::metrics::Metric;
use crate::tasks::pipeline::Pipeline;
use crate::tasks::pipeline::agent::AgentTurn;
use crate::tasks::prompt::{self, ChatOptions, Question, Turn};
use crate::tasks::python::{ends_with_space, json_to_str};
use crate::tasks::request::{Request, RequestKind};
use crate::tasks::twins;

/// What identifies a document, and what its answers are compared with.
#[derive(Clone, Debug, PartialEq)]
pub struct DocumentHead {
    /// Position in the split.
    pub doc: usize,
    /// SHA-256 of the prepared row.
    pub doc_hash: String,
    /// SHA-256 over the requests.
    pub prompt_hash: String,
    /// SHA-256 of the target.
    pub target_hash: String,
    /// Choices, where there are some.
    pub choices: Option<Vec<String>>,
    /// Right choices.
    pub gold: Vec<usize>,
    /// Target texts.
    pub targets: Vec<String>,
}

/// A document's requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The document.
    pub head: DocumentHead,
    /// In order of `idx`.
    pub requests: Vec<Request>,
}

/// The documents of a task one after another; drawn in order, since examples depend on it.
pub struct Documents<'a> {
    task: &'a Task,
    chat: ChatOptions<'a>,
    sampler: Sampler,
    pool: Vec<&'a Map<String, Json>>,
    /// Rendered examples by position; each is the same wherever it is used.
    examples: Vec<Option<Vec<Turn>>>,
    next: usize,
    end: usize,
    inputs: bool,
}

impl Task {
    /// The first `limit` documents, rendered.
    pub fn documents<'a>(&'a self, chat: ChatOptions<'a>, limit: Option<usize>) -> Documents<'a> {
        // As in lm-eval, the first document decides whether the choices are inputs.
        let first = self.docs.first().map(|d| self.doc_to_text(d, "doc_to_text", &self.config.text));
        let inputs = self.config.choice.is_some() && matches!(first, Some(Ok(Json::Number(_))));
        Documents {
            task: self,
            chat,
            sampler: Sampler::new(self.config.fewshot.sampler),
            pool: self.pool.iter().map(|d| &d.values).collect(),
            examples: vec![None; self.pool.len()],
            next: 0,
            end: limit.unwrap_or(usize::MAX).min(self.docs.len()),
            inputs,
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Rendered>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let doc = self.next;
        self.next += 1;
        self.task.docs.get(doc).map(|d| self.render(doc, d))
    }
}

impl Documents<'_> {
    fn render(&mut self, index: usize, doc: &Doc) -> Result<Rendered> {
        let task = self.task;
        let config = &task.config;
        let choices = match &config.choice {
            Some(field) => Some(task.doc_to_choice(doc, "doc_to_choice", field)?),
            None => None,
        };
        let target = match config.pipeline {
            Some(Pipeline::Agent(_)) => Json::Null,
            _ => task.doc_to_target(doc, "doc_to_target", &config.target)?,
        };
        let (gold, targets) = self.gold(doc, &target, choices.as_deref())?;
        self.check(doc, choices.as_deref(), &targets)?;
        let kinds = match &config.pipeline {
            Some(Pipeline::Agent(agent)) => {
                let turns = agent.turns(&doc.values).map_err(|u| task.unfit(doc, u))?;
                let tools = agent.tools_of(&doc.values).map_err(|u| task.unfit(doc, u))?;
                let kinds: Result<Vec<RequestKind>> = turns.into_iter().map(|t| self.conversation(t, &tools)).collect();
                kinds?
            }
            _ => self.kinds(doc, choices.as_deref(), &target, &targets)?,
        };
        let prompt_hash = hash_kinds(&kinds);
        let requests = kinds
            .into_iter()
            .enumerate()
            .map(|(idx, kind)| Request { task: task.label.clone(), doc: index, idx, kind })
            .collect();
        let head = DocumentHead {
            doc: index,
            doc_hash: sha256_hex(Json::Object(doc.values.clone()).to_string().as_bytes()),
            prompt_hash,
            target_hash: sha256_hex(json_to_str(&target).as_bytes()),
            choices,
            gold,
            targets,
        };
        for metric in &config.metrics {
            if let Metric::Judge(spec) = &metric.metric {
                task.judged(&head, spec)?;
            }
        }
        Ok(Rendered { head, requests })
    }

    /// What scoring will need of the row: told before a model is asked anything.
    fn check(&self, doc: &Doc, choices: Option<&[String]>, targets: &[String]) -> Result<()> {
        let task = self.task;
        let config = &task.config;
        let unfit = |u| task.unfit(doc, u);
        if let Some(column) = &config.cluster
            && doc.values.get(column).is_none_or(Json::is_null)
        {
            return Err(task.wrong(doc, &[column.as_str()], "`cluster` needs a value of this column"));
        }
        if let Some(twin) = config.process_results {
            twins::check_results(twin, &doc.values).map_err(unfit)?;
        }
        match &config.pipeline {
            // Its turns are read for the requests.
            Some(Pipeline::Agent(_)) => return Ok(()),
            Some(Pipeline::Retrieval(_)) if targets.is_empty() => {
                let columns = task.columns_of("doc_to_target", &config.target);
                return Err(task.wrong(doc, &columns, "`doc_to_target` gives no answer"));
            }
            Some(Pipeline::Retrieval(retrieval)) => {
                retrieval.of_contexts(&doc.values, targets).map_err(unfit)?;
            }
            None => {}
        }
        if config.output_type == OutputType::Generate {
            task.check_filters(doc, choices)?;
        }
        for spec in &config.metrics {
            match (&spec.metric, config.output_type) {
                (Metric::Mc2, _) => {
                    twins::mc2_labels(&doc.values, choices.map_or(0, <[String]>::len)).map_err(unfit)?;
                }
                (metric, OutputType::Generate) => metric.check_row(targets, &doc.values).map_err(|(column, p)| {
                    let columns = match column {
                        Some(column) => vec![column],
                        None => task.columns_of("doc_to_target", &config.target),
                    };
                    task.wrong(doc, &columns, format!("metric `{}`: {p}", spec.name))
                })?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Right choices and target texts, checked against the choices.
    fn gold(&self, doc: &Doc, target: &Json, choices: Option<&[String]>) -> Result<(Vec<usize>, Vec<String>)> {
        let task = self.task;
        let texts = || match target {
            Json::Array(list) => list.iter().map(json_to_str).collect(),
            other => vec![json_to_str(other)],
        };
        let Some(choices) = choices else { return Ok((Vec::new(), texts())) };
        let (key, field) = match self.inputs {
            true => ("doc_to_text", &task.config.text),
            false => ("doc_to_target", &task.config.target),
        };
        let columns = task.columns_of(key, field);
        let label = match self.inputs {
            true => task.doc_to_text(doc, key, field)?,
            false => target.clone(),
        };
        let one = |label: &Json| -> Result<usize> {
            let found = match label {
                Json::Number(n) => n.as_u64().map(|n| n as usize).filter(|n| *n < choices.len()),
                Json::String(text) => choices.iter().position(|c| c == text),
                _ => None,
            };
            found.ok_or_else(|| {
                let problem = match label {
                    Json::Number(n) => {
                        format!("label {n} is outside the {} choices (0 to {})", choices.len(), choices.len() - 1)
                    }
                    other => format!("label {other} is none of the choices {choices:?}"),
                };
                task.wrong(doc, &columns, problem)
            })
        };
        let gold: Vec<usize> = match &label {
            Json::Array(list) => list.iter().map(one).collect::<Result<_>>()?,
            label => vec![one(label)?],
        };
        let targets = match (self.inputs, task.config.output_type) {
            (true, _) => texts(),
            (false, _) => gold.iter().filter_map(|g| choices.get(*g).cloned()).collect(),
        };
        Ok((gold, targets))
    }

    /// System text and examples.
    fn opening(&mut self, doc: &Doc) -> Result<Vec<Turn>> {
        let task = self.task;
        let config = &task.config;
        let description = task.plain(doc, "description", &config.description)?;
        let system = prompt::join_with(self.chat.system.unwrap_or_default(), &description, &config.fewshot_delimiter);
        let mut turns = Vec::new();
        if !system.is_empty() {
            turns.push(Turn::new("system", system));
        }
        let own = config.excludes_own().then_some(&doc.values);
        let Some(drawn) = self.sampler.sample(&self.pool, task.shots, own) else {
            return Err(TaskError::Setting {
                file: config.file.clone(),
                task: config.task.clone(),
                key: "num_fewshot".into(),
                problem: format!("{} examples asked for and the split has {}", task.shots, self.pool.len()),
            });
        };
        for i in drawn {
            if let Some(slot) = self.examples.get_mut(i) {
                if slot.is_none() {
                    *slot = Some(example(task, &task.pool[i], self.inputs)?);
                }
                turns.extend(slot.iter().flatten().cloned());
            }
        }
        Ok(turns)
    }

    fn finish(&self, turns: Vec<Turn>, continues: bool) -> Result<String> {
        prompt::render(turns, &self.chat, continues)
            .map_err(|source| TaskError::Chat { task: self.task.config.task.clone(), source })
    }

    /// A conversation as it stands: with its tools and calls as such where a server takes it or the template knows tools, else in
    /// words; in plain text with the roles' names.
    fn conversation(&self, turn: AgentTurn, tools: &[Json]) -> Result<RequestKind> {
        let begun = |mut turns: Vec<Turn>| {
            if let Some(system) = self.chat.system {
                match turns.first_mut() {
                    Some(first) if first.role == "system" => first.content = format!("{system}\n\n{}", first.content),
                    _ => turns.insert(0, Turn::new("system", system)),
                }
            }
            turns
        };
        let failed = |source| TaskError::Chat { task: self.task.config.task.clone(), source };
        let chat = ChatOptions { multiturn: true, ..self.chat };
        let native = self.chat.template.map_or(self.chat.messages, ChatTemplate::knows_tools);
        let mut history = begun(turn.history);
        let turns = if native { begun(turn.native) } else { history.clone() };
        let tools = if native { tools.to_vec() } else { Vec::new() };
        if let (Some(template), true) = (self.chat.template, native) {
            let messages = chat.messages(turns.clone());
            let context = prompt::render_tools(template, &messages, &tools).map_err(failed)?;
            return Ok(self.generate(context, turns, &chat, tools));
        }
        if self.chat.template.is_none() {
            for turn in &mut history {
                let mut role = turn.role.clone();
                role[..1].make_ascii_uppercase();
                turn.content = format!("{role}: {}", turn.content);
                turn.delimiter = "\n\n".into();
            }
            history.push(Turn::new("assistant", "Assistant:"));
        }
        let context = prompt::render(history, &chat, false).map_err(failed)?;
        Ok(self.generate(context, turns, &chat, tools))
    }

    /// `turns` are those the context was made of.
    fn generate(&self, context: String, turns: Vec<Turn>, chat: &ChatOptions<'_>, tools: Vec<Json>) -> RequestKind {
        let g = &self.task.config.generation;
        let conversation = chat.template.is_some() || chat.messages;
        RequestKind::Generate {
            context,
            until: g.until.clone(),
            max_new_tokens: g.max_new_tokens,
            temperature: g.temperature,
            do_sample: g.do_sample,
            messages: if conversation { chat.messages(turns) } else { Vec::new() },
            tools,
        }
    }

    /// Prompt for one question.
    fn ask(&self, opening: &[Turn], text: &str, prefix: &str, delimiter: &str) -> Result<String> {
        self.finish(self.turns(opening, text, prefix, delimiter), !prefix.is_empty())
    }

    /// Its turns.
    fn turns(&self, opening: &[Turn], text: &str, prefix: &str, delimiter: &str) -> Vec<Turn> {
        let question = Question {
            text,
            answer: None,
            gen_prefix: Some(prefix),
            target_delimiter: delimiter,
            fewshot_delimiter: "",
        };
        let mut turns = opening.to_vec();
        turns.extend(question.turns());
        turns
    }

    fn kinds(
        &mut self,
        doc: &Doc,
        choices: Option<&[String]>,
        target: &Json,
        targets: &[String],
    ) -> Result<Vec<RequestKind>> {
        let task = self.task;
        let config = &task.config;
        if config.output_type == OutputType::Rolling {
            return Ok(vec![RequestKind::Rolling { text: json_to_str(target) }]);
        }
        let opening = self.opening(doc)?;
        let prefix = task.plain(doc, "gen_prefix", config.gen_prefix.as_deref().unwrap_or_default())?;
        // Chat templates bring their own white space, except before an answer already begun.
        let begun = config.gen_prefix.as_deref().is_some_and(|p| !p.is_empty() && !ends_with_space(p));
        let delimiter = if self.chat.template.is_none() || begun { config.target_delimiter.as_str() } else { "" };
        let pair = |context: &str, continuation: &str| RequestKind::LogLikelihood {
            context: context.to_owned(),
            continuation: format!("{delimiter}{continuation}"),
        };
        if self.inputs {
            let continuation = json_to_str(target);
            let mut out = Vec::new();
            for choice in choices.unwrap_or_default() {
                out.push(pair(&self.ask(&opening, choice, &prefix, "")?, &continuation));
            }
            return Ok(out);
        }
        let text = match task.doc_to_text(doc, "doc_to_text", &config.text)? {
            Json::String(text) => text,
            other => {
                let columns = task.columns_of("doc_to_text", &config.text);
                return Err(task.wrong(doc, &columns, format!("`doc_to_text` gives {other}, which is not text")));
            }
        };
        let turns = self.turns(&opening, &text, &prefix, &config.target_delimiter);
        let context = self.finish(turns.clone(), !prefix.is_empty())?;
        match config.output_type {
            OutputType::MultipleChoice => {
                let choices = choices.unwrap_or_default();
                let mut out: Vec<RequestKind> = choices.iter().map(|c| pair(&context, c)).collect();
                if config.metrics.iter().any(|m| matches!(m.metric, Metric::AccMutualInfo)) {
                    out.extend(choices.iter().map(|c| pair("", c)));
                }
                Ok(out)
            }
            // The target brings its own white space.
            OutputType::LogLikelihood => {
                Ok(vec![RequestKind::LogLikelihood { context, continuation: json_to_str(target) }])
            }
            OutputType::Generate | OutputType::Rolling => {
                let mut out = vec![self.generate(context.clone(), turns, &self.chat, Vec::new()); config.repeats];
                if let (Some(Pipeline::Retrieval(_)), Some(gold)) = (&config.pipeline, targets.first()) {
                    let closed = task.closed_text(doc)?;
                    let closed = self.ask(&opening, &closed, &prefix, &config.target_delimiter)?;
                    out.push(pair(&context, gold));
                    out.push(pair(&closed, gold));
                }
                Ok(out)
            }
        }
    }
}

impl Task {
    /// The prompt of a retrieval task without its contexts.
    pub(super) fn closed_text(&self, doc: &Doc) -> Result<String> {
        let key = "retrieval.doc_to_text_closed";
        self.templates.render(key, &doc.value).map_err(|e| self.unrendered(doc, key, &e))
    }
}

/// The turns of one example.
fn example(task: &Task, doc: &Doc, inputs: bool) -> Result<Vec<Turn>> {
    let shots = &task.config.fewshot;
    let text = task.doc_to_text(doc, "fewshot_config.doc_to_text", &shots.text)?;
    let choices = match &shots.choice {
        Some(field) => Some(task.doc_to_choice(doc, "fewshot_config.doc_to_choice", field)?),
        None => None,
    };
    let target = task.doc_to_target(doc, "fewshot_config.doc_to_target", &shots.target)?;
    let prefix = task.plain(doc, "fewshot_config.gen_prefix", shots.gen_prefix.as_deref().unwrap_or_default())?;
    let asked = || task.columns_of("fewshot_config.doc_to_text", &shots.text);
    let choice_at = |n: &Json, columns: &[&str]| {
        let found = n.as_u64().and_then(|n| choices.as_ref()?.get(n as usize)).cloned();
        found.ok_or_else(|| task.wrong(doc, columns, format!("label {n} of an example is outside its choices")))
    };
    let text = match (&text, inputs) {
        (Json::String(text), _) => text.clone(),
        (Json::Number(_), true) => choice_at(&text, &asked())?,
        _ => return Err(task.wrong(doc, &asked(), format!("`doc_to_text` gives {text}, which is not text"))),
    };
    let answer = match &target {
        Json::Null => None,
        Json::Number(_) if choices.is_some() && !inputs => {
            Some(choice_at(&target, &task.columns_of("fewshot_config.doc_to_target", &shots.target))?)
        }
        // Of several right answers the first is shown.
        Json::Array(list) => list.first().map(json_to_str),
        other => Some(json_to_str(other)),
    };
    let question = Question {
        text: &text,
        answer: answer.as_deref().filter(|a| !a.is_empty()),
        gen_prefix: Some(&prefix),
        target_delimiter: &shots.target_delimiter,
        fewshot_delimiter: &shots.fewshot_delimiter,
    };
    Ok(question.turns())
}

/// SHA-256 over the requests; lengths keep their borders apart.
fn hash_kinds(kinds: &[RequestKind]) -> String {
    let mut text = String::new();
    let mut last: Option<&str> = None;
    let part = |text: &mut String, p: &str| text.push_str(&format!("{}:{p}\n", p.len()));
    for kind in kinds {
        match kind {
            RequestKind::LogLikelihood { context, continuation } => {
                // Choices share their context: it counts once.
                if last != Some(context.as_str()) {
                    part(&mut text, context);
                    last = Some(context);
                }
                part(&mut text, continuation);
            }
            RequestKind::Rolling { text: rolled } => part(&mut text, rolled),
            RequestKind::Generate { context, until, max_new_tokens, temperature, do_sample, messages, tools } => {
                // A conversation is the same question whatever template spells it.
                if messages.is_empty() {
                    part(&mut text, context);
                }
                for message in messages {
                    part(&mut text, &message.role);
                    part(&mut text, &message.content);
                    message.tool_calls.iter().for_each(|call| part(&mut text, &call.to_string()));
                    message.tool_call_id.iter().for_each(|id| part(&mut text, id));
                }
                tools.iter().for_each(|tool| part(&mut text, &tool.to_string()));
                text.push_str(&format!("{until:?} {max_new_tokens} {temperature} {do_sample}\n"));
            }
        }
    }
    sha256_hex(text.as_bytes())
}
