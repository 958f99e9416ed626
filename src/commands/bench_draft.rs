//! `lowbit bench MODEL --draft QUANTIZED`: speculation by the engine that serves, with and without the draft in turns.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use lowbit_bench::speculation::{Answer, SpeculationRecord, summarize};
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_quantize::Progress;
use lowbit_serve::engine::{Event, Models, Params, Usage};
use lowbit_serve::{Engine, EngineOptions};

use crate::args::BenchArgs;
use crate::commands::table::table;
use crate::context::{Context, Purpose};
use crate::exit::VerdictError;
use crate::models::{self, Located};
use crate::provenance;

/// Prompts, each a paragraph of a text of ours.
const PROMPTS: usize = 4;
/// Tokens of a prompt.
const PROMPT_TOKENS: usize = 48;

/// An answer: its text, tokens a second after the first, and what the draft did.
struct Said {
    text: String,
    rate: f64,
    usage: Usage,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq)]
pub struct DraftOptions {
    /// Tokens proposed at a time.
    pub draft_tokens: usize,
    /// Tokens of an answer.
    pub output_tokens: usize,
    /// Of each prompt.
    pub repetitions: usize,
}

impl DraftOptions {
    /// For the record.
    pub fn map(&self, draft: &str) -> BTreeMap<String, serde_json::Value> {
        BTreeMap::from([
            ("draft".to_string(), draft.into()),
            ("draft_tokens".to_string(), self.draft_tokens.into()),
            ("generate".to_string(), self.output_tokens.into()),
            ("repetitions".to_string(), self.repetitions.into()),
        ])
    }
}

/// See the module.
pub fn bench(ctx: &Context, args: &BenchArgs, model: &str, draft: &str) -> Result<()> {
    let options = DraftOptions {
        draft_tokens: args.draft_tokens,
        output_tokens: args.generate.unwrap_or(128),
        repetitions: args.repetitions,
    };
    if options.output_tokens < 2 || options.repetitions == 0 || options.draft_tokens == 0 {
        bail!(
            "a draft is measured on answers of 2 tokens and more, by proposals of 1 and more\nhint: -n 128 -r 5 --draft-tokens 4"
        );
    }
    let (original, quantized) = (models::locate(ctx, model)?, models::locate(ctx, draft)?);
    let record = measure(ctx, &original, &quantized, options)?;
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    ctx.print(&record, || summary(&record))?;
    match record.identical {
        true => Ok(()),
        false => Err(VerdictError { code: 1, text: "a draft changed the text".into() }.into()),
    }
}

/// Answers with and without the draft, in turns.
pub fn measure(
    ctx: &Context,
    original: &Located,
    quantized: &Located,
    options: DraftOptions,
) -> Result<SpeculationRecord> {
    let DraftOptions { draft_tokens, output_tokens, repetitions } = options;
    let tokenizer = Arc::new(Tokenizer::load(&original.dir)?);
    let (_, own) = original.load(ctx, Purpose::Speed)?;
    let (_, cheap) = quantized.load(ctx, Purpose::Speed)?;
    let engine_options = EngineOptions {
        max_concurrent: 1,
        kept_prompts: 0,
        max_len: PROMPT_TOKENS + output_tokens,
        draft_tokens,
        ..EngineOptions::default()
    };
    let models = Models { model: own, draft: Some(cheap), tokenizer: tokenizer.clone() };
    let (engine, thread) = Engine::start(models, engine_options)?;
    let prompts: Vec<Vec<u32>> = models::DEMO_TEXT
        .split("\n\n")
        .map(|p| tokenizer.encode(p, true).map(|ids| ids.into_iter().take(PROMPT_TOKENS).collect::<Vec<u32>>()))
        .filter(|ids| ids.as_ref().map_or(true, |ids| ids.len() >= PROMPT_TOKENS / 2))
        .take(PROMPTS)
        .collect::<Result<_, _>>()?;
    let mut answers = Vec::new();
    ctx.progress.stage("speculation", (prompts.len() * repetitions) as u64);
    for (p, prompt) in prompts.iter().enumerate() {
        // Once both ways before anything is timed.
        say(&engine, prompt, 2, false)?;
        say(&engine, prompt, 2, true)?;
        for repetition in 0..repetitions {
            ctx.check_stop()?;
            // Who goes first alternates.
            let first = say(&engine, prompt, output_tokens, repetition % 2 == 0)?;
            let second = say(&engine, prompt, output_tokens, repetition % 2 == 1)?;
            let (with, without) = if repetition % 2 == 0 { (first, second) } else { (second, first) };
            answers.push(Answer {
                prompt: p,
                plain_tokens_per_second: without.rate,
                tokens_per_second: with.rate,
                drafted: with.usage.drafted as u64,
                accepted: with.usage.accepted as u64,
                identical: with.text == without.text,
            });
            ctx.progress.advance(1);
        }
    }
    drop(engine);
    thread.join().map_err(|_| anyhow!("the engine's thread failed"))?;
    ctx.progress.clear();
    let of = provenance::gather(ctx, Purpose::Speed, original, Some(quantized), 0, options.map(&quantized.name))?;
    Ok(summarize(of, draft_tokens, output_tokens, answers, 0)?)
}

/// Greedily says `tokens` tokens.
fn say(engine: &Engine, prompt: &[u32], tokens: usize, drafted: bool) -> Result<Said> {
    let mut params = Params { max_tokens: tokens, ignore_eos: true, without_draft: !drafted, ..Params::default() };
    params.sampling.temperature = 0.0;
    let (mut first, mut said) = (None, String::new());
    let usage = engine.answer(prompt.to_vec(), params, &mut |event| {
        if let Event::Piece { text, .. } = event {
            first.get_or_insert_with(Instant::now);
            said.push_str(&text);
        }
    })?;
    let seconds = first.map_or(0.0, |f| f.elapsed().as_secs_f64());
    Ok(Said { text: said, rate: (tokens - 1) as f64 / seconds.max(1e-9), usage })
}

/// The result as text.
pub fn summary(r: &SpeculationRecord) -> String {
    let rows = vec![
        vec!["alone".to_string(), format!("{:.2}", r.plain_tokens_per_second), "1.00".into()],
        vec!["with the draft".into(), format!("{:.2}", r.tokens_per_second), format!("{:.2}", r.tokens_per_pass)],
    ];
    format!(
        "{}\n{:.3}× [{:.3}, {:.3}]; {:.1} % of {} proposals at a time accepted; texts {}",
        table(&["", "tok/s", "tokens a pass"], &rows),
        r.ratio,
        r.low,
        r.high,
        100.0 * r.acceptance_rate,
        r.draft_tokens,
        if r.identical { "identical" } else { "DIFFER" }
    )
}
