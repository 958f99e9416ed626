//! `lowbit eval --endpoint`: tasks answered by servers, alone, beside each other, or beside a model here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lowbit_bench::load::exchange::Exchange;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_eval::EvalRecord;
use lowbit_eval::endpoint::{Api, Remote, RemoteOptions, Reply, Retry, Served, ServerCodec, Transport, needs_tokens};
use lowbit_eval::engine::BosRule;
use lowbit_eval::engine::codec::Codec;
use lowbit_eval::tasks::RequestKind;
use serde_json::{Map, Value, json};

use crate::args::{Compat, EvalArgs, KvCacheArg};
use crate::commands::eval::{Models, refuse_existing, summary};
use crate::commands::judge::Judge;
use crate::commands::scores::{self, Job, Output, Party};
use crate::commands::tasks;
use crate::context::{Context, Purpose};
use crate::models;
use crate::provenance;

/// The exchange as evaluation wants it.
pub struct Wire(Exchange);

impl Transport for Wire {
    fn post(&self, path: &str, body: &[u8]) -> std::result::Result<Reply, String> {
        self.0.post(path, body).map(reply)
    }

    fn get(&self, path: &str) -> std::result::Result<Reply, String> {
        self.0.get(path).map(reply)
    }

    fn url(&self) -> String {
        self.0.url()
    }
}

fn reply(r: lowbit_bench::load::exchange::Response) -> Reply {
    Reply { status: r.status, retry_after: r.retry_after, body: r.body }
}

/// A model behind a server.
pub struct Server {
    wire: Wire,
    served: Served,
}

impl Server {
    /// Asks the server for its models. `key` names an environment variable.
    pub fn connect(
        url: &str,
        model: Option<&str>,
        key: Option<&str>,
        headers: &[String],
        timeout: f64,
    ) -> Result<Self> {
        let key = match key {
            None => None,
            Some(name) => {
                Some(std::env::var(name).with_context(|| format!("the environment variable {name} is not set"))?)
            }
        };
        let headers: Vec<(String, String)> = headers
            .iter()
            .map(|h| {
                let (name, value) = h.split_once(':').with_context(|| format!("--header {h:?} is not NAME: VALUE"))?;
                Ok((name.trim().to_owned(), value.trim().to_owned()))
            })
            .collect::<Result<_>>()?;
        let timeout = seconds(timeout)?;
        let wire = Wire(Exchange::new(url, key.as_deref(), &headers, timeout)?);
        let served = Served::find(&wire, model)?;
        Ok(Self { wire, served })
    }

    /// For records: `NAME at URL`.
    pub fn name(&self) -> String {
        format!("{} at {}", self.served.name, self.wire.url())
    }

    /// For records.
    pub fn described(&self) -> Value {
        json!({"url": self.wire.url(), "model": self.served.name, "listed": self.served.listed})
    }

    /// As one that answers.
    pub fn remote<'a>(&'a self, codec: Option<&'a dyn Codec>, options: RemoteOptions) -> Remote<'a> {
        Remote::new(&self.wire, self.served.clone(), codec, options)
    }
}

fn seconds(timeout: f64) -> Result<Duration> {
    let found = Duration::try_from_secs_f64(timeout).ok().filter(|d| !d.is_zero());
    found.with_context(|| format!("--timeout {timeout} is not a number of seconds above 0"))
}

/// Members of bodies, from the command line.
pub fn members(option: &str, text: Option<&str>) -> Result<Map<String, Value>> {
    match text.map(serde_json::from_str) {
        None => Ok(Map::new()),
        Some(Ok(Value::Object(map))) => Ok(map),
        Some(_) => bail!("{option} is not a JSON object\nhint: {option} '{{\"top_p\": 1}}'"),
    }
}

/// Tries and waits, from the command line.
pub fn retry(args: &EvalArgs) -> Result<Retry> {
    Ok(Retry { retries: args.endpoint.retries, patience: seconds(args.endpoint.timeout)? })
}

/// `lowbit eval` with a server on either side.
pub fn eval(ctx: &Context, args: &EvalArgs) -> Result<()> {
    check(args)?;
    refuse_existing(args.output.as_ref(), args.force)?;
    let output = args.output.as_deref().map(Output::of).transpose()?;
    // Mistakes in task files and data come before a server is asked.
    let job = Job::prepare(ctx, args, output.as_ref())?;
    let api = if args.endpoint.completions { Api::Completions } else { Api::Chat };
    check_prompts(args, &job, api)?;
    let judge = Judge::connect(ctx, args, &job, output.as_ref())?;
    let e = &args.endpoint;
    let connect = |url: &Option<String>, model: &Option<String>, key: &Option<String>| -> Result<Option<Server>> {
        let Some(url) = url else { return Ok(None) };
        let server = Server::connect(url, model.as_deref(), key.as_deref(), &e.header, e.timeout)?;
        ctx.say(format!("tasks: {}", server.name()));
        Ok(Some(server))
    };
    let own = connect(&e.endpoint, &e.endpoint_model, &e.api_key_env)?;
    let other = connect(&e.reference_endpoint, &e.reference_endpoint_model, &e.reference_api_key_env)?;
    let local = match (&args.model, &args.reference) {
        (Some(name), _) | (None, Some(name)) => {
            Some(Models::load(ctx, models::locate(ctx, name)?, None, KvCacheArg::Float)?)
        }
        (None, None) => None,
    };
    let tokenizer = match &e.tokenizer {
        Some(name) => Some(Tokenizer::load(&models::locate(ctx, name)?.dir)?),
        None => None,
    };
    let start = Instant::now();
    let options = RemoteOptions {
        api,
        concurrency: e.concurrency.max(1),
        retry: retry(args)?,
        bos: if job.compat == Compat::Old { BosRule::Never } else { BosRule::Tokenizer },
        max_length: job.max_length,
        seed: 0,
        extra: members("--body", e.body.as_deref())?,
    };
    let tokens = needs_tokens(&job.plan.requests, api);
    let ask_server = |server: Option<&Server>| tokens && tokenizer.is_none() && server.is_some();
    let own_codec = if ask_server(own.as_ref()) { server_codec(own.as_ref(), options.retry)? } else { None };
    let other_codec = if ask_server(other.as_ref()) { server_codec(other.as_ref(), options.retry)? } else { None };
    let mut parties: Vec<Party<'_>> = Vec::new();
    let here = local.as_ref().map(|models| job.party(ctx, models)).transpose()?;
    let served = |server, found| remote_party(server, tokenizer.as_ref(), found, options.clone());
    match (&own, &other, here) {
        (Some(a), None, here) => {
            parties.push(served(a, own_codec.as_ref()));
            parties.extend(here);
        }
        (None, Some(b), here) => {
            parties.extend(here);
            parties.push(served(b, other_codec.as_ref()));
        }
        (Some(a), Some(b), _) => {
            parties.push(served(a, own_codec.as_ref()));
            parties.push(served(b, other_codec.as_ref()));
        }
        (None, None, _) => bail!("no server is named"),
    }
    let bits = local.as_ref().filter(|_| own.is_none()).and_then(|m| m.bits);
    let answered = job.answer(ctx, &parties, parties.len() > 1, bits)?;
    let mut options = job.options.clone();
    options.insert("endpoint_api".into(), json!(api));
    options.insert("tokenizer".into(), json!(e.tokenizer));
    options.insert("body".into(), json!(e.body));
    for (key, server) in [("endpoint", &own), ("reference_endpoint", &other)] {
        if let Some(server) = server {
            options.insert(key.into(), server.described());
        }
    }
    if let Some(judge) = &judge {
        options.insert("judge".into(), judge.described());
    }
    let mut record = EvalRecord {
        schema: lowbit_eval::record::SCHEMA,
        provenance: origin(ctx, own.as_ref(), other.as_ref(), local.as_ref(), options)?,
        bits,
        shard: job.shard,
        look: answered.look.clone(),
        scoring_seconds: Some(answered.seconds),
        detectable: job.sizes.clone().filter(|_| parties.len() > 1),
        ..EvalRecord::default()
    };
    scores::judged(ctx, &job, &answered, judge.as_ref())?.fill(&mut record, output.as_ref())?;
    record.seconds = start.elapsed().as_secs_f64();
    if let Some(output) = &output {
        write_atomic(&output.record, &serde_json::to_vec_pretty(&record)?)?;
        output.finish()?;
        output.announce(ctx, &record);
    }
    ctx.print(&record, || summary(&record))
}

fn server_codec(server: Option<&Server>, retry: Retry) -> Result<Option<ServerCodec<'_>>> {
    match server {
        Some(s) => Ok(ServerCodec::find(&s.wire, &s.served.name, retry)?),
        None => Ok(None),
    }
}

/// A server as one that answers, by the tokenizer here or its own.
fn remote_party<'a>(
    server: &'a Server,
    local: Option<&'a Tokenizer>,
    own: Option<&'a ServerCodec<'a>>,
    options: RemoteOptions,
) -> Party<'a> {
    let codec = local.map(|t| t as &dyn Codec).or(own.map(|c| c as &dyn Codec));
    let tokenizer = match (local, own) {
        (Some(t), _) => t.sha256(),
        (None, Some(_)) => "server",
        (None, None) => "none",
    };
    let remote = server.remote(codec, options);
    Party { identity: remote.identity(tokenizer), url: Some(remote.url()), answers: Box::new(remote) }
}

fn check(args: &EvalArgs) -> Result<()> {
    if args.ppl.is_some() || args.kl.is_some() {
        bail!(
            "--ppl and --kl need whole distributions, and a server gives none\nhint: give MODEL and --reference as folders; rolled tasks such as wikitext work through --endpoint"
        );
    }
    if args.tasks.tasks.is_empty() {
        bail!("nothing to evaluate\nhint: give --tasks");
    }
    Ok(())
}

/// Both sides must be asked alike, and by something that can be asked so.
fn check_prompts(args: &EvalArgs, job: &Job, api: Api) -> Result<()> {
    let writes = |r: &lowbit_eval::Request| matches!(r.kind, RequestKind::Generate { .. });
    let local = args.model.is_some() || args.reference.is_some();
    let templated = args.tasks.apply_chat_template;
    if local && api == Api::Chat && !templated && job.plan.requests.iter().any(writes) {
        bail!(
            "the server would be asked through its chat template and the model here without one\nhint: --apply-chat-template for both, or --completions for neither"
        );
    }
    let rendered = api == Api::Completions || !job.plan.requests.iter().all(writes);
    if templated && rendered && tasks::template_of(args).is_none() {
        bail!(
            "--apply-chat-template needs the template here for prompts that are scored or sent as text\nhint: --tokenizer MODEL"
        );
    }
    Ok(())
}

/// Where the record comes from.
fn origin(
    ctx: &Context,
    own: Option<&Server>,
    other: Option<&Server>,
    local: Option<&Models>,
    options: BTreeMap<String, Value>,
) -> Result<Provenance> {
    Ok(match (own, local) {
        (Some(server), None) => {
            Provenance { reference: other.map(Server::name), ..provenance::of_client(ctx, 0, &server.name(), options) }
        }
        (Some(server), Some(l)) => Provenance {
            model: server.name(),
            reference: Some(l.candidate.name.clone()),
            reference_sha256: Some(l.candidate.sha256()?),
            ..provenance::without_model(ctx, Purpose::Accuracy, 0, options)?
        },
        (None, Some(l)) => Provenance {
            reference: other.map(Server::name),
            ..provenance::gather(ctx, Purpose::Accuracy, &l.candidate, None, 0, options)?
        },
        (None, None) => bail!("no model is named"),
    })
}
