//! `lowbit serve` among clients that are broken, slow, silent or gone. `LOWBIT_SOAK_SECONDS=600` makes the soak as long as that,
//! `LOWBIT_SOAK_MODEL` names another model than the demo, `LOWBIT_SOAK_OUT` a file for its record.

use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::serve::{Reply, Serving, prompt, start};

/// A request whose answer is always the same.
fn request(i: usize, tokens: usize) -> Value {
    let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
    json!({"prompt": prompt(i), "max_tokens": tokens, "temperature": temperature, "seed": i, "ignore_eos": true})
}

fn text(v: &Value) -> &str {
    v["choices"][0]["text"].as_str().unwrap()
}

fn streamed(v: &Value) -> Value {
    let mut v = v.clone();
    v["stream"] = true.into();
    v
}

fn joined(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect()
}

#[test]
fn a_thousand_idle_connections_are_borne() {
    lowbit_bench::load::timer::raise_file_limit();
    let s = start(&[], &[]);
    let want = s.complete(request(1, 8));
    let idle: Vec<TcpStream> = (0..1000).map(|_| s.connect()).collect();
    assert_eq!(s.complete(request(1, 8))["choices"], want["choices"]);
    assert_eq!(s.raw("GET", "/health", "", b"").status, 200);
    // Some of them wake up and ask.
    for mut stream in idle.into_iter().step_by(50) {
        use std::io::Write as _;
        write!(stream, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[test]
fn who_does_not_read_holds_up_nobody_and_loses_nothing() {
    let s = start(&["--max-concurrent", "4"], &[]);
    let long: Vec<Value> = (0..8).map(|i| request(i, 200)).collect();
    let want: Vec<String> = long.iter().map(|r| text(&s.complete(r.clone())).to_string()).collect();
    let silent: Vec<TcpStream> =
        long.iter().map(|r| s.send("POST", "/v1/completions", "", streamed(r).to_string().as_bytes())).collect();
    // More of them than run at once; others are served all the same.
    for i in 0..8 {
        assert_eq!(text(&s.complete(request(i, 200))), want[i]);
    }
    for (mut stream, want) in silent.into_iter().zip(&want) {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let reply = super::serve::reply(&bytes);
        assert_eq!(&joined(&reply.events()), want);
    }
}

/// Bodies that are refused, one way or another.
fn broken() -> Vec<Vec<u8>> {
    let mut out: Vec<Vec<u8>> = [
        "",
        "{",
        "[]",
        "null",
        "\u{0}",
        "{\"prompt\":",
        "{\"prompt\": \"a\", \"max_tokens\": -1}",
        "{\"prompt\": [[-1]]}",
        "{\"prompt\": {\"a\": 1}}",
        "{\"prompt\": \"a\", \"logit_bias\": {\"x\": 1}}",
        "{\"prompt\": \"a\", \"n\": 1000000}",
        "{\"prompt\": \"a\", \"guided_regex\": \"(\"}",
        "{\"prompt\": \"a\", \"temperature\": 1e999}",
    ]
    .map(|t| t.as_bytes().to_vec())
    .into();
    // Deep nesting, no UTF-8, a body over the limit.
    out.push([vec![b'['; 100_000], vec![b']'; 100_000]].concat());
    out.push(b"{\"prompt\": \"\xff\xfe\"}".to_vec());
    out.push(vec![b' '; 600_000]);
    out
}

/// Clients that want their answers and wait as long as they are told to.
const CLIENTS: usize = 16;
/// Connections that say nothing.
const IDLE: usize = 200;
/// Bytes of memory a minute after the warm-up, in a soak of minutes. A kilobyte lost with each request would be more.
const GROWTH: f64 = (1u64 << 20) as f64;

/// What a soak saw.
#[derive(Default)]
struct Seen {
    /// Sound requests answered rightly: whole, streamed, streamed to who reads slowly.
    answered: [AtomicUsize; 3],
    /// Sound requests that were refused with a time to wait.
    refused: AtomicUsize,
    /// Requests that are refused whatever the load.
    broken: AtomicUsize,
    /// Clients that left: while hearing a stream, before the whole answer came.
    left: [AtomicUsize; 2],
    /// Connections that said nothing.
    idle: AtomicUsize,
    /// What was not as it must be.
    wrong: Mutex<Vec<String>>,
    /// Seconds since the start, and bytes of memory.
    memory: Mutex<Vec<(f64, u64)>>,
}

impl Seen {
    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    fn answers(&self) -> usize {
        self.answered.iter().map(|a| a.load(Ordering::SeqCst)).sum()
    }
}

/// Ends the other threads too, however one ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Sleeps, unless the soak ends.
fn sleep(time: Duration, over: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A server under more than it takes, and what it has to answer.
struct Soak {
    server: Serving,
    /// Requests and their texts when asked alone.
    sound: Vec<(Value, String)>,
    /// For who reads slowly.
    slow: Vec<(Value, String)>,
    broken: Vec<Vec<u8>>,
    seen: Seen,
    begun: Instant,
    /// Between two looks at the memory.
    every: Duration,
}

impl Soak {
    fn new(model: &Path, kept: usize, every: Duration) -> Self {
        lowbit_bench::load::timer::raise_file_limit();
        let kept = kept.to_string();
        let options = ["--max-body", "500000", "--max-concurrent", "6", "--max-queue", "4", "--kept-prompts", &kept];
        let server = super::serve::start_model(model, &options, &[]);
        let alone = |r: Value| {
            let want = text(&server.complete(r.clone())).to_string();
            (r, want)
        };
        let sound = (0..24).map(|i| alone(request(i, 6 + i))).collect();
        let slow = (0..4).map(|i| alone(request(i, 100))).collect();
        Self { server, sound, slow, broken: broken(), seen: Seen::default(), begun: Instant::now(), every }
    }

    /// The answer, asked for again as long after each refusal as the server says; `None` when the soak ended meanwhile.
    fn ask(&self, body: &Value, read: &dyn Fn(TcpStream) -> Vec<u8>, over: &AtomicBool) -> Option<Reply> {
        loop {
            let stream = self.server.send("POST", "/v1/completions", "", body.to_string().as_bytes());
            let reply = super::serve::reply(&read(stream));
            if reply.status != 429 {
                return Some(reply);
            }
            self.seen.refused.fetch_add(1, Ordering::SeqCst);
            match reply.header("retry-after").and_then(|v| v.parse::<u64>().ok()).filter(|s| *s >= 1) {
                Some(seconds) => sleep(Duration::from_secs(seconds), over),
                None => self.seen.wrong(format!("429 without a time to wait: {reply:?}")),
            }
            if over.load(Ordering::SeqCst) {
                return None;
            }
        }
    }

    fn check(&self, kind: usize, reply: &Reply, want: &str) {
        let got = match (reply.status, kind) {
            (200, 0) => text(&reply.json()).to_string(),
            (200, _) => joined(&reply.events()),
            _ => return self.seen.wrong(format!("{reply:?}")),
        };
        if got == want {
            self.seen.answered[kind].fetch_add(1, Ordering::SeqCst);
        } else {
            self.seen.wrong(format!("{got:?} where {want:?} was due"));
        }
    }

    fn sound(&self, n: usize, over: &AtomicBool) {
        let (body, want) = &self.sound[n * 7 % self.sound.len()];
        let kind = n % 2;
        let body = if kind == 0 { body.clone() } else { streamed(body) };
        let all = |mut stream: TcpStream| {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            bytes
        };
        if let Some(reply) = self.ask(&body, &all, over) {
            self.check(kind, &reply, want);
        }
    }

    fn slow(&self, n: usize, over: &AtomicBool) {
        let (body, want) = &self.slow[n % self.slow.len()];
        let little = |mut stream: TcpStream| {
            let (mut bytes, mut piece) = (Vec::new(), [0; 512]);
            while let Ok(n @ 1..) = stream.read(&mut piece) {
                bytes.extend_from_slice(&piece[..n]);
                std::thread::sleep(Duration::from_millis(20));
            }
            bytes
        };
        if let Some(reply) = self.ask(&streamed(body), &little, over) {
            self.check(2, &reply, want);
        }
    }

    /// A request that nobody could answer, one that hears the beginning and leaves, one that leaves before its answer.
    fn unsound(&self, n: usize) {
        let reply = self.server.raw("POST", "/v1/completions", "", &self.broken[n % self.broken.len()]);
        if (400..500).contains(&reply.status) {
            self.seen.broken.fetch_add(1, Ordering::SeqCst);
        } else {
            self.seen.wrong(format!("broken request {n}: {reply:?}"));
        }
        let long = request(n, 400);
        let mut gone = self.server.send("POST", "/v1/completions", "", streamed(&long).to_string().as_bytes());
        let mut heard = [0; 30];
        if gone.read_exact(&mut heard).is_ok() && heard.starts_with(b"HTTP/1.1 200") {
            self.seen.left[0].fetch_add(1, Ordering::SeqCst);
        }
        drop(gone);
        let gone = self.server.send("POST", "/v1/completions", "", long.to_string().as_bytes());
        std::thread::sleep(Duration::from_millis(n as u64 % 5 * 10));
        drop(gone);
        self.seen.left[1].fetch_add(1, Ordering::SeqCst);
    }

    /// Everybody at once, until so many sound requests were answered, some of each kind and some left half heard, and so much time went by.
    fn run(&self, answers: usize, time: Duration) {
        let (before, begun, over, next) =
            (self.seen.answers(), Instant::now(), AtomicBool::new(false), AtomicUsize::new(0));
        let some = |counts: &[AtomicUsize]| counts.iter().all(|c| c.load(Ordering::SeqCst) > 0);
        let enough = || {
            self.seen.answers() - before >= answers
                && begun.elapsed() >= time
                && some(&self.seen.answered)
                && some(&self.seen.left)
        };
        // Where much is wrong more of it says nothing.
        let going = || !over.load(Ordering::SeqCst) && self.seen.wrong.lock().unwrap().len() < 100;
        std::thread::scope(|t| {
            for _ in 0..CLIENTS {
                t.spawn(|| {
                    let _over = Over(&over);
                    while going() && !enough() {
                        self.sound(next.fetch_add(1, Ordering::SeqCst), &over);
                    }
                });
            }
            for reader in 0..2 {
                let (over, going) = (&over, &going);
                t.spawn(move || (reader..).take_while(|_| going()).for_each(|n| self.slow(n, over)));
            }
            t.spawn(|| (0..).take_while(|_| going()).for_each(|n| self.unsound(n)));
            t.spawn(|| {
                while going() {
                    // Anew after a while: the server closes what says nothing for too long.
                    let silent: Vec<TcpStream> = (0..IDLE).map(|_| self.server.connect()).collect();
                    self.seen.idle.fetch_add(silent.len(), Ordering::SeqCst);
                    sleep(Duration::from_secs(5), &over);
                }
            });
            t.spawn(|| {
                while going() {
                    let now = (self.begun.elapsed().as_secs_f64(), self.server.memory());
                    self.seen.memory.lock().unwrap().push(now);
                    sleep(self.every, &over);
                }
            });
        });
    }
}

/// Slope of the line of least squares through points (x, y).
fn slope(points: &[(f64, u64)]) -> f64 {
    let n = points.len().max(1) as f64;
    let mean = |f: &dyn Fn(&(f64, u64)) -> f64| points.iter().map(f).sum::<f64>() / n;
    let (x, y) = (mean(&|p| p.0), mean(&|p| p.1 as f64));
    let spread = mean(&|p| (p.0 - x).powi(2));
    if spread > 0.0 { mean(&|p| (p.0 - x) * (p.1 as f64 - y)) / spread } else { 0.0 }
}

#[test]
fn a_slope_by_hand() {
    assert!((slope(&[(0.0, 1), (1.0, 3), (2.0, 5)]) - 2.0).abs() < 1e-12);
    assert!(slope(&[(1.0, 7)]).abs() < 1e-12);
}

/// More sound clients than are let in, each of which comes back when it is told to, slow readers, silent connections, broken requests and
/// clients that leave: every answer is the one that was given alone, nothing is left, and memory stays where it was after the warm-up.
#[test]
fn a_soak_mixes_up_nothing_and_leaks_nothing() {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let seconds: u64 = var("LOWBIT_SOAK_SECONDS").and_then(|v| v.parse().ok()).unwrap_or(0);
    let model = var("LOWBIT_SOAK_MODEL").map_or_else(super::demo, PathBuf::from);
    let long = seconds >= 120;
    let soak = Soak::new(&model, 0, Duration::from_millis(if long { 2000 } else { 100 }));
    soak.run(150, Duration::from_secs(seconds / 10));
    let (warm, before) = (soak.begun.elapsed().as_secs_f64(), soak.server.memory());
    soak.run(300, Duration::from_secs(seconds));
    let (seen, server) = (&soak.seen, &soak.server);
    server.wait_for("vllm:num_requests_running", 0.0);
    server.wait_for("vllm:num_requests_waiting", 0.0);
    let after = server.memory();
    let memory = seen.memory.lock().unwrap().clone();
    let warmed: Vec<(f64, u64)> = memory.iter().copied().filter(|(t, _)| *t >= warm).collect();
    let a_minute = 60.0 * slope(&warmed);
    // Pages are given back at the step that follows.
    server.wait_for("lowbit:kv_cache_pages", 0.0);
    let count = |a: &AtomicUsize| a.load(Ordering::SeqCst);
    let wrong = seen.wrong.lock().unwrap().clone();
    let grown = after.saturating_sub(before);
    // In a short soak the line is that of noise. A leak of one body or answer a request would be tens of MB; allocators keep some.
    let steady = if long { a_minute <= GROWTH } else { grown < 24 << 20 };
    let record = json!({
        "schema": 1,
        "tool": concat!("lowbit ", env!("CARGO_PKG_VERSION")),
        "model": model.file_name().map(|n| n.to_string_lossy().into_owned()),
        "threads": std::thread::available_parallelism().map_or(0, usize::from),
        "seconds": soak.begun.elapsed().as_secs_f64(),
        "warm_up_seconds": warm,
        "clients": CLIENTS,
        "answers_as_alone": {"whole": count(&seen.answered[0]), "streamed": count(&seen.answered[1]), "read_slowly": count(&seen.answered[2])},
        "told_to_come_back": count(&seen.refused),
        "broken_requests_refused": count(&seen.broken),
        "left": {"hearing": count(&seen.left[0]), "before_the_answer": count(&seen.left[1])},
        "idle_connections": {"at_a_time": IDLE, "all": count(&seen.idle)},
        "server": {
            "refused": server.metric("lowbit:requests_refused_total"),
            "cancelled": server.metric("lowbit:requests_cancelled_total"),
            "prompt_tokens": server.metric("vllm:prompt_tokens_total"),
            "generation_tokens": server.metric("vllm:generation_tokens_total"),
        },
        "kv_pages_at_the_end": server.metric("lowbit:kv_cache_pages"),
        "memory_bytes": {"after_warm_up": before, "at_the_end": after, "growth_a_minute": a_minute,
            "limit_a_minute": long.then_some(GROWTH), "samples": memory},
        "wrong": wrong,
        "pass": wrong.is_empty() && steady,
    });
    if let Some(path) = var("LOWBIT_SOAK_OUT") {
        std::fs::write(path, format!("{record:#}\n")).unwrap();
    }
    assert!(wrong.is_empty(), "{} of {} answers: {:?}", wrong.len(), seen.answers(), &wrong[..wrong.len().min(5)]);
    assert!(seen.answered.iter().all(|a| count(a) > 0), "{record}");
    assert!(count(&seen.refused) > 0, "never more than it takes: {record}");
    assert!(count(&seen.left[0]) > 0 && count(&seen.broken) > 0 && count(&seen.idle) >= IDLE, "{record}");
    assert!(steady, "{grown} bytes more than {before}, {a_minute:.0} a minute");
}

/// The same with prompts that stay: eight of one page each are what may.
#[test]
fn a_soak_with_kept_prompts_leaves_no_more_than_these() {
    let soak = Soak::new(&super::demo(), 8, Duration::from_secs(1));
    soak.run(150, Duration::ZERO);
    soak.server.wait_for("vllm:num_requests_running", 0.0);
    soak.server.wait_for("vllm:num_requests_waiting", 0.0);
    let wrong = soak.seen.wrong.lock().unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");
    let pages = soak.server.metric("lowbit:kv_cache_pages");
    assert!(pages <= 8.0, "{pages}");
}
