//! The load generator against a scripted server whose own stamps are the truth.
#![allow(clippy::print_stderr)]

#[path = "../examples/stand_in/server.rs"]
mod server;

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lowbit_bench::load::client::Limits;
use lowbit_bench::load::data::Data;
use lowbit_bench::load::metrics::Trim;
use lowbit_bench::load::openai::Endpoint;
use lowbit_bench::load::profile::{Profile, StageSpec};
use lowbit_bench::load::record::StageRecord;
use lowbit_bench::load::run::{LoadOptions, Session};
use lowbit_bench::load::schedule::{Arrivals, Schedule};
use lowbit_bench::load::trace::{Outcome, RequestTrace};
use lowbit_bench::load::workload::Workload;
use server::{End, Plan, StandIn, plan};

fn options(url: &str, limits: Limits) -> LoadOptions {
    LoadOptions {
        url: url.to_string(),
        endpoint: Endpoint::Completions,
        model: None,
        stream: true,
        exact_output: true,
        api_key: Some("secret".into()),
        headers: vec![("X-Test".into(), "1".into())],
        extra: serde_json::Map::new(),
        data: Data::Synthetic { workload: Workload::parse("input=4,output=5").unwrap(), count: None },
        limits,
        stop_saturated: false,
        trim: Trim::default(),
        max_concurrency: None,
        seed: 1,
        slo: None,
    }
}

fn requests(n: u64) -> Limits {
    Limits { requests: Some(n), grace: Duration::from_secs(20), ..Limits::default() }
}

fn run(server: &StandIn, spec: StageSpec, n: u64) -> StageRecord {
    let mut session = Session::connect(options(&server.url, requests(n))).unwrap();
    assert_eq!(session.target().model, "stand-in");
    assert_eq!(session.target().server.as_deref(), Some("stand-in"));
    session.stage(&spec, None, &mut |_| false).unwrap()
}

fn percentile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((q * values.len() as f64).ceil() as usize).max(1) - 1]
}

/// The client's stamps follow the server's: percentile by percentile never earlier, and for the quarter of requests that the machine
/// disturbed least within 2 ms, less than the gap between chunks, so that counting from another chunk would show. How close they
/// are on a quiet machine is for a benchmark to say.
#[test]
fn measured_times_are_the_servers_own() {
    // A different plan each, so that a mix-up of requests would show.
    let server = StandIn::start(Arc::new(|i| Plan {
        ttft: Duration::from_millis(5 + i % 20),
        gap: Duration::from_millis(3 + i % 5),
        ..plan()
    }));
    let stage = run(&server, StageSpec::Open { rate: 100.0, arrivals: Arrivals::Poisson }, 200);
    assert_eq!(stage.metrics.ok(), 200, "{:?}", stage.metrics.outcomes);
    let mut log = server.log.lock().unwrap().clone();
    log.sort_by_key(|s| s.read_ns);
    let ms = |a: u64, b: u64| (b - a) as f64 * 1e-6;
    let mut traces = stage.requests.clone();
    traces.sort_by_key(|t| t.sent_ns);
    let client = |f: &dyn Fn(&RequestTrace) -> f64| traces.iter().map(f).collect::<Vec<f64>>();
    let pairs = [
        (
            "ttft from send",
            log.iter().map(|s| ms(s.read_ns, s.chunks_ns[0])).collect::<Vec<_>>(),
            client(&|t| (t.chunks_ns[0] - t.sent_ns) as f64 * 1e-6),
        ),
        (
            "mean gap",
            log.iter().map(|s| ms(s.chunks_ns[0], s.chunks_ns[4]) / 4.0).collect(),
            client(&|t| (t.chunks_ns[4] - t.chunks_ns[0]) as f64 * 1e-6 / 4.0),
        ),
        (
            "whole",
            log.iter().map(|s| ms(s.read_ns, s.end_ns)).collect(),
            client(&|t| (t.end_ns - t.sent_ns) as f64 * 1e-6),
        ),
    ];
    for (name, theirs, ours) in pairs {
        for q in [0.1, 0.5, 0.9] {
            let (want, got) = (percentile(theirs.clone(), q), percentile(ours.clone(), q));
            assert!(got >= want - 0.2, "{name} p{}: {got} ms, before the server's {want} ms", q * 100.0);
        }
        let lag = percentile(theirs.iter().zip(&ours).map(|(server, client)| client - server).collect(), 0.25);
        assert!(lag <= 2.0, "{name}: {lag} ms behind the server at p25");
    }
    assert!(traces.iter().all(|t| t.counted_by_server && t.output_tokens == 5 && t.input_tokens == Some(4)));
    assert!(stage.metrics.latency.contains_key("itl_token_ms"));
}

/// A server that stops for 400 ms: requests scheduled meanwhile wait, and their wait is in TTFT, since it counts from the
/// schedule, though a closed loop would have sent none of them.
#[test]
fn a_stall_is_measured_from_the_schedule() {
    let stall = Duration::from_millis(400);
    let started = Arc::new(Mutex::new(None::<Instant>));
    let server = StandIn::start(Arc::new(move |_| {
        // All requests share one stall, from 300 to 700 ms after the first.
        let first = *started.lock().unwrap().get_or_insert_with(Instant::now);
        let (now, from) = (first.elapsed(), Duration::from_millis(300));
        let left = if now > from { (from + stall).saturating_sub(now) } else { Duration::ZERO };
        Plan { ttft: left + Duration::from_millis(2), gap: Duration::ZERO, tokens: 2, ..plan() }
    }));
    let stage = run(&server, StageSpec::Open { rate: 50.0, arrivals: Arrivals::Constant }, 50);
    let ttft: Vec<f64> = stage.requests.iter().map(|t| (t.chunks_ns[0] - t.scheduled_ns) as f64 * 1e-6).collect();
    // 20 requests fall into the stall, their waits spread evenly from 400 ms down to nothing.
    let late = ttft.iter().filter(|t| **t > 100.0).count();
    assert!((12..=20).contains(&late), "{late} requests waited more than 100 ms");
    assert!(percentile(ttft, 1.0) > 350.0);
}

#[test]
fn failures_of_every_kind_are_told_apart() {
    let server = StandIn::start(Arc::new(|i| Plan {
        end: match i % 5 {
            0 => End::Status(503),
            1 => End::Cut,
            2 => End::ErrorEvent,
            _ => End::Whole,
        },
        ttft: Duration::from_millis(1),
        gap: Duration::from_millis(1),
        ..plan()
    }));
    let stage = run(&server, StageSpec::Closed(3), 50);
    let count = |class: &str| stage.metrics.outcomes.get(class).copied().unwrap_or(0);
    assert_eq!([count("ok"), count("status 503"), count("disconnected"), count("stream error")], [20, 10, 10, 10]);
    assert!(stage.requests.iter().any(|t| matches!(&t.outcome, Outcome::Status(503, body) if body.contains("no"))));
    let mut limits = requests(50);
    limits.errors = Some(4);
    let mut session = Session::connect(options(&server.url, limits)).unwrap();
    let stage = session.stage(&StageSpec::Closed(1), None, &mut |_| false).unwrap();
    assert_eq!(stage.stopped_by, "errors");
    assert_eq!(stage.requests.iter().filter(|t| t.outcome.failed()).count(), 4);
}

/// A full server's `Retry-After` is waited out by a closed loop, where it would only ask again; in an open loop a refusal is a result.
#[test]
fn refusals_are_waited_out_by_a_closed_loop() {
    let full = |n: u64| {
        StandIn::start(Arc::new(move |i| Plan { end: if i < n { End::Refused(1) } else { End::Whole }, ..plan() }))
    };
    let stage = run(&full(6), StageSpec::Throughput(8), 24);
    assert_eq!((stage.metrics.ok(), stage.rejected, stage.requests.len()), (24, 6, 24), "{:?}", stage.metrics.outcomes);
    // The wait is part of the answer's time, and no fault of the client.
    let waited = stage.requests.iter().filter(|t| t.end_ns - t.scheduled_ns >= 1_000_000_000).count();
    assert!(waited >= 6 && stage.client.schedule_delay_p99_ms < 900.0, "{waited}, {:?}", stage.client);
    let open = run(&full(20), StageSpec::Open { rate: 200.0, arrivals: Arrivals::Constant }, 20);
    assert_eq!((open.metrics.outcomes["status 429"], open.rejected), (20, 0));
}

#[test]
fn a_replay_keeps_the_times_of_its_trace_and_gamma_those_of_its_seed() {
    let server = StandIn::start(Arc::new(|_| Plan { ttft: Duration::from_millis(2), gap: Duration::ZERO, ..plan() }));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.jsonl");
    let row = |ms: u64| format!(r#"{{"timestamp": {ms}, "input_length": 12, "output_length": 5, "hash_ids": [1]}}"#);
    std::fs::write(&path, [40, 140, 190, 440, 460].map(row).join("\n")).unwrap();
    let mut o = options(&server.url, Limits::default());
    o.data = Data::read(&path, "trace", false, None, None).unwrap();
    let mut session = Session::connect(o).unwrap();
    let scheduled = |stage: &StageRecord| {
        assert!(stage.requests.iter().all(|t| t.sent_ns >= t.scheduled_ns && t.chunks_ns[0] > t.sent_ns));
        let mut at: Vec<u64> = stage.requests.iter().map(|t| t.scheduled_ns).collect();
        at.sort_unstable();
        at
    };
    // From the first on, twice as fast.
    let stage = session.stage(&StageSpec::Replay(2.0), None, &mut |_| false).unwrap();
    assert_eq!((stage.profile.as_str(), stage.stopped_by.as_str()), ("replay", "schedule ended"));
    assert_eq!((stage.metrics.ok(), scheduled(&stage)), (5, [0, 50, 75, 200, 210].map(|ms| ms * 1_000_000).to_vec()));
    let gamma = StageSpec::Open { rate: 200.0, arrivals: Arrivals::Gamma(0.5) };
    let stage = run(&server, gamma, 100);
    let want: Vec<u64> = Schedule::new(200.0, Arrivals::Gamma(0.5), 1).unwrap().take(100).collect();
    assert_eq!((stage.profile.as_str(), stage.metrics.ok(), scheduled(&stage)), ("gamma", 100, want));
}

/// A server that takes one request at a time: at twice its rate the stage ends with the alarm, at a cap the wait for a place counts
/// and the stage is marked.
#[test]
fn an_overload_stops_the_stage_and_a_cap_holds_requests_back() {
    let one = |service: Duration| {
        let free = Mutex::new(None::<Instant>);
        StandIn::start(Arc::new(move |_| {
            let (now, mut free) = (Instant::now(), free.lock().unwrap());
            let end = free.map_or(now, |f| f.max(now)) + service;
            *free = Some(end);
            Plan { ttft: end - now, tokens: 1, ..plan() }
        }))
    };
    let mut o = options(&one(Duration::from_millis(10)).url, Limits::default());
    o.limits.duration = Some(Duration::from_secs(120));
    o.stop_saturated = true;
    let double = StageSpec::Open { rate: 200.0, arrivals: Arrivals::Constant };
    let stage = Session::connect(o).unwrap().stage(&double, None, &mut |_| false).unwrap();
    assert_eq!(stage.stopped_by, "saturated", "{:?} after {} s", stage.saturation, stage.seconds);
    let growth = stage.saturation.unwrap().growth_per_second;
    assert!(growth > 30.0, "{growth} a second, where 100 are too many");

    let mut o = options(&one(Duration::from_millis(20)).url, requests(60));
    o.max_concurrency = Some(2);
    let stage = Session::connect(o).unwrap().stage(&double, None, &mut |_| false).unwrap();
    assert_eq!((stage.metrics.ok(), stage.metrics.rates.peak_concurrency), (60, 2));
    // The last is scheduled at 295 ms and answered after 60 · 20 ms at the earliest.
    let last = stage.requests.iter().max_by_key(|t| t.scheduled_ns).unwrap();
    assert!(last.chunks_ns[0] - last.scheduled_ns >= 900_000_000 && last.chunks_ns[0] - last.sent_ns < 600_000_000);
    assert!(stage.client.invalid[0].contains("the cap on concurrency"), "{:?}", stage.client);
}

#[test]
fn packed_chunks_whole_answers_turns_and_interruption() {
    let server = StandIn::start(Arc::new(|_| Plan { pack: 2, ..plan() }));
    let stage = run(&server, StageSpec::Closed(2), 10);
    assert!(stage.metrics.itl_token_missing.is_some() && stage.metrics.latency["icl_chunk_ms"].n == 20);
    assert_eq!(stage.metrics.rates.peak_concurrency, 2);

    let whole = StandIn::start(Arc::new(|_| Plan { stream: false, ..plan() }));
    let stage = run(&whole, StageSpec::Closed(1), 5);
    assert_eq!((stage.metrics.ok(), stage.metrics.latency.contains_key("ttft_ms")), (5, false));
    assert_eq!(stage.requests[0].output_tokens, 5);

    let mut o = options(&server.url, requests(12));
    o.data = Data::Synthetic { workload: Workload::parse("input=4,output=5,turns=3").unwrap(), count: None };
    o.endpoint = Endpoint::Chat;
    let mut session = Session::connect(o).unwrap();
    let chat = session.stage(&StageSpec::Closed(2), None, &mut |_| false).unwrap();
    // Chat chunks come as `text` from this server: the client takes either.
    assert_eq!(chat.metrics.ok(), 12);

    let slow = StandIn::start(Arc::new(|_| Plan { ttft: Duration::from_secs(30), ..plan() }));
    let mut session = Session::connect(options(&slow.url, requests(4))).unwrap();
    let began = Instant::now();
    let stage = session.stage(&StageSpec::Closed(4), None, &mut |live| live.seconds > 0.2).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!((stage.stopped_by.as_str(), stage.requests.len()), ("interrupted", 4));
    assert!(stage.requests.iter().all(|t| t.outcome == Outcome::Cancelled));
}

#[test]
fn a_dead_server_and_a_sweep() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Session::connect(options(&format!("http://{free}"), requests(1))).err().unwrap();
    assert!(error.to_string().contains("cannot reach"), "{error}");
    let server =
        StandIn::start(Arc::new(|_| Plan { ttft: Duration::from_millis(2), gap: Duration::from_millis(1), ..plan() }));
    let mut session = Session::connect(options(&server.url, requests(40))).unwrap();
    let stages = session.profile(&Profile::parse("sweep:3").unwrap(), &mut |_| {}, &mut |_| false).unwrap();
    let names: Vec<&str> = stages.iter().map(|s| s.profile.as_str()).collect();
    assert_eq!(names, ["synchronous", "throughput", "constant"]);
    let (first, last) = (stages[0].metrics.rates.requests_per_second, stages[1].metrics.rates.requests_per_second);
    assert!(first < stages[2].rate.unwrap() && stages[2].rate.unwrap() < last);
}
