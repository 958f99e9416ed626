//! `lowbit generate`.

use anyhow::{Result, bail};
use lowbit_checkpoint::chat_template::{ChatTemplate, Message};
use lowbit_model::{GenerateOptions, Sampling};

use crate::args::GenerateArgs;
use crate::context::{Context, Purpose, write_out};
use crate::models;

/// Continues a prompt; text goes to stdout as it comes.
pub fn generate(ctx: &Context, args: &GenerateArgs) -> Result<()> {
    let located = models::locate(ctx, &args.model)?;
    let (_, model, tokenizer) = located.load_with_tokenizer(ctx.backend_for(Purpose::Speed)?)?;
    let prompt = if args.chat {
        match ChatTemplate::load(&located.dir)? {
            Some(t) => t.render(&[Message::new("user", args.prompt.as_str())], true)?,
            None => bail!("{} has no chat template\nhint: drop --chat", located.name),
        }
    } else {
        args.prompt.clone()
    };
    // A rendered template carries its own special tokens.
    let ids = tokenizer.encode(&prompt, !args.chat)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
            ..Sampling::default()
        },
        stop: tokenizer.eos_ids().to_vec(),
    };
    let mut seen = Vec::new();
    let mut shown = 0;
    let mut failure = None;
    let out = lowbit_model::generate(&model, &ids, &options, &mut |id| {
        seen.push(id);
        if !ctx.json {
            match tokenizer.decode(&seen, true) {
                // A character may span tokens: hold the text back until it is whole.
                Ok(text) if !text.ends_with('\u{fffd}') => {
                    if let Err(e) = write_out(text.get(shown..).unwrap_or_default().as_bytes()) {
                        failure = Some(e);
                    }
                    shown = text.len();
                }
                Ok(_) => {}
                Err(e) => failure = Some(e.into()),
            }
        }
        failure.is_none() && !ctx.stop.load(std::sync::atomic::Ordering::Relaxed)
    })?;
    if let Some(e) = failure {
        return Err(e);
    }
    let times: Vec<f64> = out.times.iter().map(|t| t.as_secs_f64() * 1e3).collect();
    let json = serde_json::json!({"prompt_tokens": ids.len(), "text": tokenizer.decode(&out.tokens, true)?, "tokens": out.tokens, "times_ms": times});
    ctx.print(&json, String::new)
}
