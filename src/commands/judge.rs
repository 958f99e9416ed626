//! `lowbit eval --judge`: a language model judges what the models wrote.

use std::path::PathBuf;

use anyhow::{Result, bail};
use lowbit_eval::endpoint::{Api, RemoteOptions};
use lowbit_eval::engine::{BosRule, Store};
use lowbit_eval::judge::{Judging, Mode, judge};
use lowbit_eval::record::{EvalRecord, Interval};
use lowbit_eval::tasks::{Item, Plan, Suite};

use crate::args::EvalArgs;
use crate::commands::endpoint::{Server, members, retry};
use crate::commands::scores::{Job, Output, open_stores};
use crate::commands::table::table;
use crate::context::Context;

/// A judge that answers, with what it has answered before.
pub struct Judge {
    server: Server,
    options: RemoteOptions,
    journal: Option<PathBuf>,
    cache: Option<PathBuf>,
}

impl Judge {
    /// The judge of a job; none where no task has one.
    pub fn connect(ctx: &Context, args: &EvalArgs, job: &Job, output: Option<&Output>) -> Result<Option<Self>> {
        let first = job.suite.judges().next().map(|(task, spec)| (task.to_owned(), spec.name()));
        let (url, (task, metric)) = match (&args.judge.judge, first) {
            (None, None) => return Ok(None),
            (Some(_), None) => bail!("--judge, and no task has a `judge` or `judge_pairwise` in its metric_list"),
            (None, Some((task, metric))) => {
                bail!("{task} is judged (`{metric}`)\nhint: --judge URL names the server of the judging model")
            }
            (Some(url), Some(first)) => (url, first),
        };
        if args.tasks.shard.is_some() || args.tasks.until_decided {
            bail!("{task} is judged (`{metric}`), which goes neither with --shard nor with --until-decided");
        }
        let compared = args.reference.is_some() || args.endpoint.reference_endpoint.is_some();
        if !compared && let Some((task, _)) = job.suite.judges().find(|j| j.1.mode == Mode::Pairwise) {
            bail!(
                "{task} compares answers with a reference's (`judge_pairwise`)\nhint: --reference MODEL, or --reference-endpoint URL"
            );
        }
        let (model, key) = (args.judge.judge_model.as_deref(), args.judge.judge_api_key_env.as_deref());
        let server = Server::connect(url, model, key, &[], args.endpoint.timeout)?;
        ctx.say(format!("judge: {}", server.name()));
        let options = RemoteOptions {
            api: Api::Chat,
            concurrency: args.endpoint.concurrency.max(1),
            retry: retry(args)?,
            bos: BosRule::Tokenizer,
            max_length: None,
            seed: 0,
            extra: members("--judge-body", args.judge.judge_body.as_deref())?,
        };
        Ok(Some(Self { server, options, journal: output.map(Output::judge_journal), cache: args.tasks.cache.clone() }))
    }

    /// Puts verdicts into the items.
    pub fn run(
        &self,
        ctx: &Context,
        suite: &Suite,
        plan: &Plan,
        candidate: &mut [Item],
        reference: Option<&mut [Item]>,
    ) -> Result<Judging> {
        let remote = self.server.remote(None, self.options.clone());
        let identity = remote.identity("none");
        let mut stores: Vec<Box<dyn Store>> =
            open_stores(ctx, self.journal.as_ref(), self.cache.as_deref(), &identity)?;
        let (name, mut told) = (self.server.name(), ctx.progress.counting("judge"));
        let judging = judge(&remote, &name, suite, plan, candidate, reference, &mut stores, &mut told)?;
        ctx.progress.clear();
        Ok(judging)
    }

    /// For the record.
    pub fn described(&self) -> serde_json::Value {
        self.server.described()
    }
}

/// What the judges are worth, as text.
pub fn summary(r: &EvalRecord) -> Option<String> {
    let number = |x: Option<f64>| x.map_or("–".into(), |v| format!("{v:.2}"));
    let share = |i: &Option<Interval>| {
        i.as_ref().map_or("–".into(), |i| format!("{:.3} [{:.3}, {:.3}]", i.value, i.low, i.high))
    };
    let rows: Vec<Vec<String>> = r
        .judges
        .iter()
        .map(|(name, j)| {
            let p = j.pairwise.as_ref();
            vec![
                name.clone(),
                format!("{} of {}", j.items - j.unjudged, j.items),
                format!("{} of {}", j.unreadable, j.answers),
                number(j.vote_kappa),
                p.map_or("–".into(), |p| format!("{}/{}/{}", p.wins, p.ties, p.losses)),
                p.map_or("–".into(), |p| share(&p.win_rate)),
                p.map_or("–".into(), |p| share(&p.first_position)),
                p.map_or("–".into(), |p| number(p.order_consistent)),
                p.map_or("–".into(), |p| number(p.order_kappa)),
            ]
        })
        .collect();
    let header = [
        "judged",
        "items",
        "unreadable",
        "vote κ",
        "won/tied/lost",
        "win rate [95 %]",
        "prefers first [95 %]",
        "same in both orders",
        "order κ",
    ];
    (!rows.is_empty()).then(|| table(&header, &rows))
}
