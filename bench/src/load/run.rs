//! A load run: the server found, stages driven, records made.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::load::client::{self, ClientConfig, Job, Limits, Observer, Pace, StageTraces};
use crate::load::data::Data;
use crate::load::error::{LoadError, Result};
use crate::load::http::{ResponseParser, Target};
use crate::load::metrics::{self, Trim, Window};
use crate::load::openai::{Dialect, Endpoint, RequestHead};
use crate::load::profile::{Profile, Search, StageSpec, sweep_rates};
use crate::load::record::{ClientCheck, StageRecord, TargetRecord};
use crate::load::saturation::Saturation;
use crate::load::schedule::Schedule;
use crate::load::timer::raise_file_limit;
use crate::load::trace::RequestTrace;
use crate::slo::Slo;
use crate::slo::search::{FindMax, Probe, SearchOptions, find_max};
use crate::slo::verdict::judge;

/// A client busier than this cannot stamp in time.
const CPU_LIMIT: f64 = 0.9;
/// A schedule kept to this, in ms, is kept whatever the latencies.
const DELAY_FLOOR_MS: f64 = 1.0;
/// Beyond the floor, a delay may be this share of the median time to first token.
const DELAY_SHARE: f64 = 0.05;
/// A closed loop has no schedule but its own answers: a delay takes from its rate, at most this share of the median end-to-end time.
const CLOSED_SHARE: f64 = 0.01;

/// Everything a run needs to know.
#[derive(Clone)]
pub struct LoadOptions {
    /// Address of the server.
    pub url: String,
    /// Endpoint.
    pub endpoint: Endpoint,
    /// Model name; `None` asks `/v1/models` for the first.
    pub model: Option<String>,
    /// Stream answers.
    pub stream: bool,
    /// Make answers exactly as long as asked.
    pub exact_output: bool,
    /// Bearer token.
    pub api_key: Option<String>,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// Further members of every body.
    pub extra: Map<String, Value>,
    /// What is asked.
    pub data: Data,
    /// When a stage ends.
    pub limits: Limits,
    /// Stop an open-loop stage once the server falls behind.
    pub stop_saturated: bool,
    /// What is left out of a stage.
    pub trim: Trim,
    /// Requests of an open loop at once, at most.
    pub max_concurrency: Option<usize>,
    /// Seed of texts and gaps.
    pub seed: u64,
    /// Objective stages are judged by.
    pub slo: Option<Slo>,
}

/// A stage so far, ten times a second.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Seconds.
    pub seconds: f64,
    /// In flight.
    pub in_flight: usize,
    /// Whole answers.
    pub ok: u64,
    /// Failures.
    pub failed: u64,
    /// Output tokens of the answers.
    pub output_tokens: u64,
    /// Median time to first token of the last hundred, ms.
    pub ttft_ms: Option<f64>,
}

/// Hears how a stage goes; `true` stops it.
pub type Progress<'a> = &'a mut dyn FnMut(&Live) -> bool;

/// A server that answers.
pub struct Session {
    options: LoadOptions,
    config: ClientConfig,
    target: TargetRecord,
    stages: u64,
}

impl Session {
    /// Resolves the address, tries it, and asks for the model's name.
    pub fn connect(options: LoadOptions) -> Result<Self> {
        raise_file_limit();
        for (name, value) in &options.headers {
            let clean = |s: &str| !s.is_empty() && !s.contains(['\r', '\n']);
            if !clean(name) || !clean(value) || name.contains([' ', ':']) {
                return Err(LoadError::option(name.as_str(), "not a header", "NAME: VALUE, each on one line"));
            }
        }
        if options.api_key.as_ref().is_some_and(|k| k.contains(['\r', '\n'])) {
            return Err(LoadError::option("the API key", "has a line break", "one line"));
        }
        let target = Target::parse(&options.url)?;
        let (address, stream) = reach(&target)?;
        let (server, listed) = models(&target, stream, &options)?;
        let model = match (&options.model, listed) {
            (Some(m), _) => m.clone(),
            (None, Ok(m)) => m,
            (None, Err(why)) => {
                return Err(LoadError::Server {
                    url: format!("{}/v1/models", target.url()),
                    why: format!("{why}\nhint: name the model with --model"),
                });
            }
        };
        let dialect = Dialect {
            endpoint: options.endpoint,
            model: model.clone(),
            stream: options.stream,
            exact_output: options.exact_output,
            extra: options.extra.clone(),
        };
        let head = RequestHead::new(&target, options.endpoint.path(), options.api_key.as_deref(), &options.headers);
        let record = TargetRecord {
            url: target.url(),
            endpoint: options.endpoint,
            model,
            streaming: options.stream,
            exact_output: options.exact_output,
            server,
        };
        Ok(Self { options, config: ClientConfig { address, head, dialect }, target: record, stages: 0 })
    }

    /// Who answers.
    pub fn target(&self) -> &TargetRecord {
        &self.target
    }

    /// Runs every stage of a profile. `begin` hears of each stage before it starts.
    pub fn profile(
        &mut self,
        profile: &Profile,
        begin: &mut dyn FnMut(&StageSpec),
        progress: Progress,
    ) -> Result<Vec<StageRecord>> {
        let mut out: Vec<StageRecord> = Vec::new();
        let mut run = |me: &mut Self, spec: StageSpec, out: &mut Vec<StageRecord>| -> Result<bool> {
            begin(&spec);
            let stage = me.stage(&spec, None, progress)?;
            let stop =
                stage.stopped_by == "interrupted" || matches!(stage.stopped_by.as_str(), "errors" | "error rate");
            out.push(stage);
            Ok(stop)
        };
        match profile {
            Profile::Stages(stages) => {
                for spec in stages {
                    if run(self, *spec, &mut out)? {
                        break;
                    }
                }
            }
            Profile::Sweep { stages, arrivals, streams } => {
                if run(self, StageSpec::Closed(1), &mut out)? || run(self, StageSpec::Throughput(*streams), &mut out)? {
                    return Ok(out);
                }
                let rate = |i: usize| out.get(i).map_or(0.0, |s: &StageRecord| s.metrics.rates.requests_per_second);
                for rate in sweep_rates(rate(0), rate(1), *stages) {
                    if run(self, StageSpec::Open { rate, arrivals: *arrivals }, &mut out)? {
                        break;
                    }
                }
            }
        }
        Ok(out)
    }

    /// Runs one stage. `requests` overrides the limits: so many and no time limit.
    pub fn stage(&mut self, spec: &StageSpec, requests: Option<u64>, progress: Progress) -> Result<StageRecord> {
        let o = &self.options;
        // Another stage asks other things: a prefix cache must not know the answers.
        let seed = o.seed.wrapping_add(self.stages.wrapping_mul(0x9e37_79b9));
        self.stages += 1;
        let mut limits = o.limits;
        if requests.is_some() {
            (limits.requests, limits.duration) = (requests, None);
        }
        let open = |schedule: Box<dyn Iterator<Item = u64> + Send>| Pace::Open { schedule, cap: o.max_concurrency };
        let pace = match spec {
            StageSpec::Closed(n) | StageSpec::Throughput(n) => Pace::Closed { streams: *n },
            StageSpec::Open { rate, arrivals } => open(Box::new(Schedule::new(*rate, *arrivals, seed)?)),
            StageSpec::Replay(speed) => {
                let times = o.data.times();
                if times.is_empty() {
                    return Err(LoadError::option(
                        "replay",
                        format!("not every row of {} has a timestamp", o.data.name()),
                        "rows with `timestamp` in ms",
                    ));
                }
                if times.windows(2).any(|w| w[1] < w[0]) {
                    return Err(LoadError::option(
                        "replay",
                        "timestamps go back in time",
                        "rows in the order of `timestamp`",
                    ));
                }
                let (first, speed) = (times[0], *speed);
                open(Box::new(times.into_iter().map(move |t| ((t - first) as f64 / speed) as u64)))
            }
        };
        let is_open = matches!(pace, Pace::Open { .. });
        if limits.duration.is_none() && limits.requests.is_none() && !matches!(spec, StageSpec::Replay(_)) {
            return Err(LoadError::option(
                "limits",
                "a stage would never end",
                "give a duration or a number of requests",
            ));
        }
        let (send, receive) = sync_channel::<Job>(256);
        let (data, head, dialect) = (o.data.clone(), self.config.head.clone(), self.config.dialect.clone());
        // Bodies are made ahead of time, beside the clock. The thread ends when the stage drops its receiver.
        let maker = std::thread::spawn(move || {
            for item in data.items(seed) {
                let request = head.with_body(&dialect.body(&item.messages, item.output_tokens));
                let input_tokens = item.input_tokens;
                let job = Job { request, input_tokens, item: item.has_next().then_some(item) };
                if send.send(job).is_err() {
                    break;
                }
            }
        });
        let mut watcher = Watcher {
            saturation: is_open.then(Saturation::default),
            stop_saturated: o.stop_saturated,
            live: Live::default(),
            recent: Vec::new(),
            progress,
        };
        let traces = client::run(&self.config, pace, &limits, &receive, &mut watcher);
        let alarm = watcher.saturation.as_ref().and_then(Saturation::alarm);
        drop(receive);
        let _ = maker.join();
        let traces = traces?;
        let stop = if traces.stopped_by == "requests" || traces.stopped_by == "schedule ended" {
            traces.traces.iter().map(|t| t.end_ns + 1).max()
        } else {
            None
        };
        // A stage of N requests ends with its last answer, one of N seconds at its second.
        let window = o.trim.window(if is_open { traces.stop_ns.max(1) } else { stop.unwrap_or(traces.stop_ns) });
        let capped = o.max_concurrency.is_some();
        let stage = stage_record(spec.name(), spec.rate(), spec.streams(), traces, window, o.slo.as_ref(), capped);
        Ok(StageRecord { saturation: alarm, ..stage })
    }

    /// Searches the highest rate (or number of streams, or speed) that meets the objective.
    pub fn find_max(
        &mut self,
        slo: &Slo,
        over: Search,
        options: &SearchOptions,
        begin: &mut dyn FnMut(f64, usize),
        progress: Progress,
    ) -> Result<(FindMax, Vec<StageRecord>)> {
        let mut stages = Vec::new();
        let mut interrupted = false;
        let found = find_max(slo, &SearchOptions { unit: over.unit(), ..*options }, &mut |rate, requests, _| {
            let warm = requests / 4;
            begin(rate, requests);
            let stage = self.stage(&over.stage(rate), Some((requests + warm) as u64), progress)?;
            interrupted |= stage.stopped_by == "interrupted";
            let mut traces: Vec<RequestTrace> = stage.requests.clone();
            traces.sort_by_key(|t| t.scheduled_ns);
            let probe = Probe {
                traces: traces.split_off(warm.min(traces.len())),
                rate: stage.metrics.rates.requests_per_second,
                saturated: stage.saturation.is_some(),
                client_limited: interrupted || !stage.client.invalid.is_empty(),
            };
            stages.push(stage);
            Ok(probe)
        })?;
        if interrupted {
            return Err(LoadError::Samples("the search was interrupted".into()));
        }
        Ok((found, stages))
    }
}

/// What the traces of a stage come to in a window. `capped`: requests may have had to wait for a place.
pub(crate) fn stage_record(
    profile: &str,
    rate: Option<f64>,
    streams: Option<usize>,
    traces: StageTraces,
    window: Window,
    slo: Option<&Slo>,
    capped: bool,
) -> StageRecord {
    let metrics = metrics::measure(&traces.traces, window);
    let end_to_end = metrics.percentile("e2e_ms", 0.5);
    let share = |ms: Option<f64>, share: f64| ms.map_or(DELAY_FLOOR_MS, |ms| (ms * share).max(DELAY_FLOOR_MS));
    let allowed = share(metrics.percentile("ttft_ms", 0.5).or(end_to_end), DELAY_SHARE);
    let allowed = if streams.is_some() { allowed.max(share(end_to_end, CLOSED_SHARE)) } else { allowed };
    StageRecord {
        profile: profile.into(),
        rate,
        streams,
        seconds: traces.end_ns as f64 * 1e-9,
        stopped_by: traces.stopped_by.clone(),
        rejected: traces.rejected,
        saturation: None,
        client: check(&traces, allowed, capped),
        slo: slo.map(|s| judge(&traces.traces, window, metrics.rates.requests_per_second, s)),
        metrics,
        requests: traces.traces,
    }
}

/// Judges the client itself: its p99 delay may be `allowed` ms.
fn check(traces: &StageTraces, allowed: f64, capped: bool) -> ClientCheck {
    let mut delays: Vec<f64> =
        traces.traces.iter().map(|t| t.sent_ns.saturating_sub(t.scheduled_ns) as f64 * 1e-6).collect();
    delays.sort_unstable_by(f64::total_cmp);
    let max = delays.last().copied().unwrap_or(0.0);
    let rank = (0.99 * delays.len() as f64).ceil() as usize;
    let p99 = delays.get(rank.saturating_sub(1)).copied().unwrap_or(0.0);
    let mut invalid = Vec::new();
    if p99 > allowed {
        let why = if capped {
            "the cap on concurrency, or a busy client, held requests back"
        } else {
            "the client could not keep its schedule"
        };
        invalid.push(format!("schedule delay p99 {p99:.2} ms, above {allowed:.2} ms: {why}"));
    }
    if traces.cpu_frac.is_some_and(|c| c > CPU_LIMIT) {
        invalid
            .push(format!("the client's thread was busy {:.0} % of the time", 100.0 * traces.cpu_frac.unwrap_or(0.0)));
    }
    ClientCheck {
        schedule_delay_p99_ms: p99,
        schedule_delay_max_ms: max,
        cpu_frac: traces.cpu_frac,
        connections: traces.connections,
        resent: traces.resent,
        invalid,
    }
}

struct Watcher<'a, 'b> {
    saturation: Option<Saturation>,
    stop_saturated: bool,
    live: Live,
    recent: Vec<f64>,
    progress: &'a mut (dyn FnMut(&Live) -> bool + 'b),
}

impl Observer for Watcher<'_, '_> {
    fn started(&mut self, now_ns: u64, _: usize) {
        if let Some(s) = &mut self.saturation {
            s.arrival(now_ns);
        }
    }

    fn finished(&mut self, t: &RequestTrace, _: usize) -> Option<String> {
        if t.ok() {
            self.live.ok += 1;
            self.live.output_tokens += u64::from(t.output_tokens);
        } else if t.outcome.failed() {
            self.live.failed += 1;
        }
        if let Some(first) = t.first_ns() {
            if self.recent.len() >= 100 {
                self.recent.remove(0);
            }
            self.recent.push(first.saturating_sub(t.scheduled_ns) as f64 * 1e-6);
        }
        let s = self.saturation.as_mut()?;
        s.completion(t.end_ns, t.scheduled_ns);
        (self.stop_saturated && s.alarm().is_some()).then(|| "saturated".to_string())
    }

    fn tick(&mut self, now_ns: u64, in_flight: usize) -> Option<String> {
        self.live.seconds = now_ns as f64 * 1e-9;
        self.live.in_flight = in_flight;
        let mut sorted = self.recent.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        self.live.ttft_ms = sorted.get(sorted.len() / 2).copied();
        (self.progress)(&self.live).then(|| "interrupted".to_string())
    }
}

/// The first address of the host that takes a connection: `localhost` has two, and a server may listen on one.
fn reach(target: &Target) -> Result<(SocketAddr, TcpStream)> {
    let unreachable = |why: String| LoadError::Unreachable { url: target.url(), why };
    let addresses = (target.host.as_str(), target.port).to_socket_addrs().map_err(|e| unreachable(e.to_string()))?;
    let mut last = "the host has no address".to_string();
    for address in addresses {
        match TcpStream::connect_timeout(&address, Duration::from_secs(10)) {
            Ok(stream) => return Ok((address, stream)),
            Err(e) => last = e.to_string(),
        }
    }
    Err(unreachable(last))
}

type Listed = std::result::Result<String, String>;

/// `Server` header and first model of `/v1/models`.
fn models(target: &Target, mut stream: TcpStream, options: &LoadOptions) -> Result<(Option<String>, Listed)> {
    let unreachable = |e: std::io::Error| LoadError::Unreachable { url: target.url(), why: e.to_string() };
    let mut request =
        format!("GET {}/v1/models HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", target.prefix, target.authority());
    if let Some(key) = &options.api_key {
        request.push_str(&format!("Authorization: Bearer {key}\r\n"));
    }
    for (name, value) in &options.headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(unreachable)?;
    stream.write_all(request.as_bytes()).map_err(unreachable)?;
    let (mut parser, mut body, mut buffer) = (ResponseParser::default(), Vec::new(), [0u8; 16 << 10]);
    let server_error = |why: String| LoadError::Server { url: target.url(), why };
    while !parser.done() {
        let n = stream.read(&mut buffer).map_err(unreachable)?;
        if n == 0 {
            parser.closed().map_err(|e| server_error(e.into()))?;
            break;
        }
        parser.push(&buffer[..n], &mut |b| body.extend_from_slice(b)).map_err(server_error)?;
    }
    let Some(head) = parser.head() else { return Err(server_error("no response".into())) };
    if !(200..300).contains(&head.status) {
        return Ok((
            head.server.clone(),
            Err(format!(
                "status {}: {}",
                head.status,
                String::from_utf8_lossy(&body).chars().take(200).collect::<String>()
            )),
        ));
    }
    let listed: Option<String> = serde_json::from_slice::<Value>(&body)
        .ok()
        .and_then(|v| Some(v.get("data")?.as_array()?.first()?.get("id")?.as_str()?.to_string()));
    Ok((head.server.clone(), listed.ok_or_else(|| "no model is listed".to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::trace::Outcome;

    const MS: u64 = 1_000_000;

    /// What is said against a client whose every request is late by `late_ns`: answers take a second, their first chunk 20 ms, both from
    /// when they were due. Five hundredths of 20 ms are the floor, a hundredth of a second is 10 ms.
    fn said(streams: Option<usize>, late_ns: u64) -> Vec<String> {
        let trace = |i: u64| {
            let due = i * 1000 * MS;
            RequestTrace {
                scheduled_ns: due,
                sent_ns: due + late_ns,
                chunks_ns: vec![due + 20 * MS],
                chunk_tokens: Vec::new(),
                end_ns: due + 1000 * MS,
                input_tokens: Some(10),
                output_tokens: 1,
                counted_by_server: true,
                outcome: Outcome::Ok,
            }
        };
        // As many as bound a median although requests that follow each other count as one.
        let end_ns = 400 * 1000 * MS;
        let traces = StageTraces {
            traces: (0..400).map(trace).collect(),
            stop_ns: end_ns,
            end_ns,
            stopped_by: "requests".into(),
            cpu_frac: None,
            connections: 1,
            resent: 0,
            rejected: 0,
        };
        stage_record("stage", None, streams, traces, Window { from_ns: 0, to_ns: end_ns }, None, false).client.invalid
    }

    #[test]
    fn a_closed_loop_may_be_late_by_a_hundredth_of_its_answers() {
        assert_eq!(said(Some(1), 9_900_000), Vec::<String>::new());
        let late = said(Some(1), 10_100_000);
        assert!(late.len() == 1 && late[0].starts_with("schedule delay p99 10.10 ms, above 10.00 ms"), "{late:?}");
        // A schedule has no such room.
        let open = said(None, 9_900_000);
        assert!(open.len() == 1 && open[0].starts_with("schedule delay p99 9.90 ms, above 1.00 ms"), "{open:?}");
        assert_eq!(said(None, 900_000), Vec::<String>::new());
    }
}
