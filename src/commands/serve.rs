//! `lowbit serve`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use lowbit_bench::load::timer::raise_file_limit;
use lowbit_checkpoint::chat_template::ChatTemplate;
use lowbit_serve::engine::Models;
use lowbit_serve::{Engine, EngineOptions, Server, ServerOptions};

use crate::args::ServeArgs;
use crate::context::{Context, Purpose};
use crate::models;

/// Serves until SIGTERM or Ctrl-C.
pub fn serve(ctx: &Context, args: &ServeArgs) -> Result<()> {
    if args.end_with_stdin {
        // Nothing written there matters, and nobody is left to hear of the end.
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
    }
    let options = ServerOptions {
        address: SocketAddr::new(args.host, args.port),
        name: args.served_name.clone().unwrap_or_else(|| args.model.clone()),
        api_key: api_key(args)?,
        max_body_bytes: args.max_body,
        read_timeout: Duration::from_secs(args.read_timeout.max(1)),
        max_connections: args.max_connections,
        default_max_tokens: args.default_max_tokens,
        drain: Duration::from_secs(args.drain),
    };
    let located = models::locate(ctx, &args.model)?;
    let draft = args.draft.as_ref().map(|d| models::locate(ctx, d)).transpose()?;
    // A port that is taken shows before minutes of loading.
    let server = Server::bind(options)?;
    ctx.say(format!("loading {}", located.name));
    // As many connections as the system lets one have.
    raise_file_limit();
    let backend = ctx.backend_with_kv(Purpose::Speed, args.kv_cache)?;
    let (_, model, tokenizer) = located.load_with_tokenizer(backend.clone())?;
    let draft = draft.map(|d| d.load_on(backend)).transpose()?.map(|d| d.1);
    let vocab = model.config().vocab_size;
    let models = Models { model, draft, tokenizer: Arc::new(tokenizer) };
    let (engine, thread) = Engine::start(
        models,
        EngineOptions {
            max_concurrent: args.max_concurrent,
            kv_tokens: args.kv_tokens,
            max_len: args.max_len.unwrap_or(usize::MAX),
            prefill_tokens: args.prefill_tokens,
            max_queue: args.max_queue,
            kept_prompts: args.kept_prompts,
            draft_tokens: args.draft_tokens,
            draft_max_running: args.draft_max_running,
            kv_format: args.kv_cache.name(),
        },
    )?;
    let template = ChatTemplate::load(&located.dir)?;
    let url = format!("http://{}", server.address());
    let json = serde_json::json!({"url": url, "port": server.address().port(), "max_model_len": engine.max_len()});
    // Whoever reads the address may send SIGTERM at once: the server has it by then.
    ctx.release_signals();
    ctx.print(&json, || url.clone())?;
    server.run(engine, thread, template, vocab)?;
    Ok(())
}

fn api_key(args: &ServeArgs) -> Result<Option<String>> {
    let Some(name) = &args.api_key_env else { return Ok(None) };
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_string())),
        Ok(_) => bail!("the environment variable {name} is empty"),
        Err(e) => Err(anyhow!("the environment variable {name}: {e}")),
    }
}
