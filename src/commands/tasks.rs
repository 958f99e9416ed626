//! `lowbit eval --tasks`: which requests the tasks make.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};

use anyhow::{Context as _, Result, bail};
use lowbit_checkpoint::chat_template::ChatTemplate;
use lowbit_checkpoint::hub;
use lowbit_eval::tasks::{ChatOptions, DataOptions, Registry, RequestKind, Suite};
use serde_json::{Value, json};

use crate::args::{Compat, EvalArgs, TaskArgs};
use crate::context::Context;
use crate::models;

/// What `--tasks` names, `--fewshot` put where a name says no number.
fn specs(args: &TaskArgs) -> Vec<String> {
    let says =
        |s: &str| s.rsplit_once(':').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    let with = |s: &String| match args.fewshot {
        Some(n) if !says(s) => format!("{s}:{n}"),
        _ => s.clone(),
    };
    args.tasks.iter().map(with).collect()
}

/// The options that decide what is asked, for the record and for `merge`.
pub fn options(args: &TaskArgs, limit: Option<usize>) -> BTreeMap<String, Value> {
    let compat = match args.compat {
        Compat::Old => "lm-eval-0.4.9.1",
        Compat::Current => "lm-eval-0.4.13",
    };
    BTreeMap::from([
        ("tasks".into(), specs(args).into()),
        ("data".into(), json!(args.data)),
        ("include".into(), json!(args.include)),
        ("limit".into(), limit.into()),
        ("compat".into(), compat.into()),
        ("max_length".into(), args.max_length.into()),
        ("apply_chat_template".into(), args.apply_chat_template.into()),
        ("fewshot_as_multiturn".into(), args.fewshot_as_multiturn.into()),
        ("system_instruction".into(), args.system_instruction.clone().into()),
    ])
}

/// Reads the task files and the data of what `--tasks` names.
pub fn load(ctx: &Context, args: &TaskArgs) -> Result<Suite> {
    let fetch =
        |spec: &str, choice: hub::Choice<'_>| hub::resolve_chosen(spec, &models::hub_options(), &ctx.progress, choice);
    let data = DataOptions { dir: args.data.as_deref(), hub: Some(&fetch) };
    let mut registry = Registry::shipped()?;
    for dir in &args.include {
        registry.add_folder(dir)?;
    }
    let suite = registry.load(&specs(args), &data)?;
    for note in suite.tasks.iter().flat_map(|t| &t.notes) {
        ctx.say(format!("note: {note}"));
    }
    Ok(suite)
}

/// The model's chat template, where it is asked for.
pub fn chat_template(ctx: &Context, args: &TaskArgs, model: &str) -> Result<Option<ChatTemplate>> {
    if !args.apply_chat_template {
        return Ok(None);
    }
    let model = models::locate(ctx, model)?;
    let template = ChatTemplate::load(&model.dir)?;
    template
        .with_context(|| format!("{} has no chat template\nhint: leave out --apply-chat-template", model.dir.display()))
        .map(Some)
}

/// The model whose chat template prompts go through: the one here, or the one that `--tokenizer` names.
pub fn template_of(args: &EvalArgs) -> Option<&str> {
    let local = args.model.as_deref().or(args.reference.as_deref());
    args.endpoint.tokenizer.as_deref().filter(|_| args.endpoint.any()).or(local)
}

/// Whether a server is asked by conversations.
pub fn asks_chat(args: &EvalArgs) -> bool {
    args.endpoint.any() && !args.endpoint.completions
}

/// How `--apply-chat-template` and its companions shape prompts; `messages` where a chat endpoint is asked.
pub fn chat_options<'a>(args: &'a TaskArgs, template: Option<&'a ChatTemplate>, messages: bool) -> ChatOptions<'a> {
    ChatOptions { template, multiturn: args.fewshot_as_multiturn, system: args.system_instruction.as_deref(), messages }
}

/// `--render`: every request on a line. A model is looked at for its chat template only, and plain prompts need none.
pub fn render(ctx: &Context, args: &EvalArgs) -> Result<()> {
    let template = match template_of(args) {
        Some(model) => chat_template(ctx, &args.tasks, model)?,
        None if args.tasks.apply_chat_template && !asks_chat(args) => {
            bail!("--apply-chat-template without a model: prompts go through a model's own template\nhint: give MODEL")
        }
        None => None,
    };
    let suite = load(ctx, &args.tasks)?;
    let chat = chat_options(&args.tasks, template.as_ref(), asks_chat(args));
    let mut out = BufWriter::with_capacity(1 << 20, std::io::stdout().lock());
    for task in &suite.tasks {
        for rendered in task.documents(chat, args.limit) {
            for request in rendered?.requests {
                let mut line = json!({ "task": request.task, "doc": request.doc, "idx": request.idx });
                line["kind"] = match request.kind {
                    RequestKind::LogLikelihood { .. } => "loglikelihood",
                    RequestKind::Rolling { .. } => "loglikelihood_rolling",
                    RequestKind::Generate { .. } => "generate_until",
                }
                .into();
                let (context, continuation) = match request.kind {
                    RequestKind::LogLikelihood { context, continuation } => (context, continuation),
                    // What is scored or continued is lm-eval's first argument.
                    RequestKind::Rolling { text } => (text, String::new()),
                    RequestKind::Generate {
                        context,
                        until,
                        max_new_tokens,
                        temperature,
                        do_sample,
                        messages,
                        tools,
                    } => {
                        line["until"] = until.into();
                        line["max_new_tokens"] = max_new_tokens.into();
                        line["temperature"] = temperature.into();
                        line["do_sample"] = do_sample.into();
                        if !messages.is_empty() {
                            line["messages"] = json!(messages);
                        }
                        if !tools.is_empty() {
                            line["tools"] = tools.into();
                        }
                        (context, String::new())
                    }
                };
                line["context"] = context.into();
                line["continuation"] = continuation.into();
                if !listening(writeln!(out, "{line}"))? {
                    return Ok(());
                }
            }
        }
    }
    listening(out.flush()).map(|_| ())
}

/// A reader that has seen enough is not a failure; a full disk is one.
fn listening(written: std::io::Result<()>) -> Result<bool> {
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("cannot write to stdout"),
        written => Ok(written.is_ok()),
    }
}
