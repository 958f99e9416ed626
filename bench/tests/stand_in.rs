//! The load generator against a scripted server whose own stamps are the truth.
#![allow(clippy::print_stderr)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lowbit_bench::load::client::Limits;
use lowbit_bench::load::data::Data;
use lowbit_bench::load::metrics::Trim;
use lowbit_bench::load::openai::Endpoint;
use lowbit_bench::load::profile::{Profile, StageSpec};
use lowbit_bench::load::record::StageRecord;
use lowbit_bench::load::run::{LoadOptions, Session};
use lowbit_bench::load::schedule::Arrivals;
use lowbit_bench::load::trace::{Outcome, RequestTrace};
use lowbit_bench::load::workload::Workload;

/// What the server does with a request, by its number.
type Script = Arc<dyn Fn(u64) -> Plan + Send + Sync>;

#[derive(Clone)]
struct Plan {
    ttft: Duration,
    gap: Duration,
    tokens: u32,
    /// Tokens in one chunk.
    pack: u32,
    end: End,
    stream: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Whole,
    Status(u16),
    Cut,
    ErrorEvent,
}

fn plan() -> Plan {
    Plan {
        ttft: Duration::from_millis(8),
        gap: Duration::from_millis(3),
        tokens: 5,
        pack: 1,
        end: End::Whole,
        stream: true,
    }
}

/// When the server read a request and wrote each chunk, on the clock of this process.
#[derive(Clone, Debug)]
struct Sent {
    read: Instant,
    chunks: Vec<Instant>,
    end: Instant,
}

struct StandIn {
    url: String,
    log: Arc<Mutex<Vec<Sent>>>,
}

impl StandIn {
    fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (count, shared) = (Arc::new(AtomicU64::new(0)), log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (script, count, log) = (script.clone(), count.clone(), shared.clone());
                std::thread::spawn(move || serve(stream, &script, &count, &log));
            }
        });
        Self { url, log }
    }
}

fn serve(mut stream: TcpStream, script: &Script, count: &AtomicU64, log: &Mutex<Vec<Sent>>) {
    stream.set_nodelay(true).unwrap();
    let mut pending = Vec::new();
    let mut buffer = [0u8; 16 << 10];
    loop {
        let head_end = loop {
            if let Some(at) = pending.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(n) => pending.extend_from_slice(&buffer[..n]),
            }
        };
        let head = String::from_utf8_lossy(&pending[..head_end]).to_ascii_lowercase();
        let length: usize =
            head.lines().find_map(|l| l.strip_prefix("content-length:")).map_or(0, |v| v.trim().parse().unwrap());
        while pending.len() < head_end + length {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(n) => pending.extend_from_slice(&buffer[..n]),
            }
        }
        let read = Instant::now();
        pending.drain(..head_end + length);
        if head.starts_with("get ") {
            let body = r#"{"data":[{"id":"stand-in"}]}"#;
            let _ =
                write!(stream, "HTTP/1.1 200 OK\r\nServer: stand-in\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            continue;
        }
        let p = script(count.fetch_add(1, Ordering::SeqCst));
        let Some(sent) = answer(&mut stream, &p, read) else { return };
        log.lock().unwrap().push(sent);
        if p.end == End::Cut {
            return;
        }
    }
}

fn answer(stream: &mut TcpStream, p: &Plan, read: Instant) -> Option<Sent> {
    if let End::Status(code) = p.end {
        let body = r#"{"error":{"message":"no"}}"#;
        write!(stream, "HTTP/1.1 {code} No\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
        return Some(Sent { read, chunks: vec![], end: Instant::now() });
    }
    let mut chunks = Vec::new();
    std::thread::sleep(p.ttft);
    if !p.stream {
        let body = format!(
            r#"{{"choices":[{{"text":"all"}}],"usage":{{"prompt_tokens":4,"completion_tokens":{}}}}}"#,
            p.tokens
        );
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .ok()?;
        return Some(Sent { read, chunks, end: Instant::now() });
    }
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        .ok()?;
    let mut piece = |text: &str| -> Option<Instant> {
        let text = format!("data: {text}\r\n\r\n");
        // One write a chunk, so that the stamp is its time.
        let bytes = format!("{:x}\r\n{text}\r\n", text.len());
        let now = Instant::now();
        stream.write_all(bytes.as_bytes()).ok()?;
        Some(now)
    };
    let events = p.tokens.div_ceil(p.pack);
    for k in 0..events {
        if k > 0 {
            std::thread::sleep(p.gap);
        }
        if p.end == End::Cut && k == 2 {
            return Some(Sent { read, chunks, end: Instant::now() });
        }
        if p.end == End::ErrorEvent && k == 2 {
            piece(r#"{"error":{"message":"out of memory"}}"#)?;
            break;
        }
        chunks.push(piece(r#"{"choices":[{"text":" w","index":0}]}"#)?);
    }
    piece(&format!(r#"{{"choices":[],"usage":{{"prompt_tokens":4,"completion_tokens":{}}}}}"#, p.tokens))?;
    let end = piece("[DONE]")?;
    stream.write_all(b"0\r\n\r\n").ok()?;
    Some(Sent { read, chunks, end })
}

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
    let log = server.log.lock().unwrap().clone();
    let ms = |a: Instant, b: Instant| b.duration_since(a).as_secs_f64() * 1e3;
    let mut traces = stage.requests.clone();
    traces.sort_by_key(|t| t.sent_ns);
    let client = |f: &dyn Fn(&RequestTrace) -> f64| traces.iter().map(f).collect::<Vec<f64>>();
    let pairs = [
        (
            "ttft from send",
            log.iter().map(|s| ms(s.read, s.chunks[0])).collect::<Vec<_>>(),
            client(&|t| (t.chunks_ns[0] - t.sent_ns) as f64 * 1e-6),
        ),
        (
            "mean gap",
            log.iter().map(|s| ms(s.chunks[0], s.chunks[4]) / 4.0).collect(),
            client(&|t| (t.chunks_ns[4] - t.chunks_ns[0]) as f64 * 1e-6 / 4.0),
        ),
        ("whole", log.iter().map(|s| ms(s.read, s.end)).collect(), client(&|t| (t.end_ns - t.sent_ns) as f64 * 1e-6)),
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
