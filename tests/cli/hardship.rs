//! `lowbit serve` among clients that are broken, slow, silent or gone. `LOWBIT_SOAK_SECONDS=600` makes the soak as long as that.

use std::io::Read;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::serve::{Serving, prompt, start};

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

/// Sound requests, streamed and whole, among refused ones and clients that leave: every answer is its own, nothing is left, and
/// memory stays where it was after the warm-up.
#[test]
fn a_soak_mixes_up_nothing_and_leaks_nothing() {
    let s = start(&["--max-body", "500000", "--kept-prompts", "8", "--max-concurrent", "8"], &[]);
    let requests: Vec<Value> = (0..24).map(|i| request(i, 6 + i)).collect();
    let want: Vec<String> = requests.iter().map(|r| text(&s.complete(r.clone())).to_string()).collect();
    let refused = broken();
    let round = |s: &Serving, n: usize| {
        let i = n * 7 % requests.len();
        let got = if n.is_multiple_of(2) {
            text(&s.complete(requests[i].clone())).to_string()
        } else {
            let reply = s.post("/v1/completions", &streamed(&requests[i]));
            assert_eq!(reply.status, 200, "{reply:?}");
            joined(&reply.events())
        };
        assert_eq!(got, want[i], "request {i}");
    };
    let done = AtomicUsize::new(0);
    let soak = |requests: usize, seconds: u64| {
        /// Ends the others too, when one fails.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let (first, begun, over) = (done.load(Ordering::SeqCst), Instant::now(), AtomicBool::new(false));
        std::thread::scope(|t| {
            for _ in 0..4 {
                t.spawn(|| {
                    let _over = Over(&over);
                    while !over.load(Ordering::SeqCst) {
                        let n = done.fetch_add(1, Ordering::SeqCst);
                        if n - first >= requests && begun.elapsed() >= Duration::from_secs(seconds) {
                            return;
                        }
                        round(&s, n);
                    }
                });
            }
            t.spawn(|| {
                for n in (0..).take_while(|_| !over.load(Ordering::SeqCst)) {
                    let reply = s.raw("POST", "/v1/completions", "", &refused[n % refused.len()]);
                    assert!((400..500).contains(&reply.status), "{n}: {reply:?}");
                    // And one that hears the first token and leaves.
                    let mut gone =
                        s.send("POST", "/v1/completions", "", streamed(&request(n, 400)).to_string().as_bytes());
                    gone.read_exact(&mut [0; 30]).unwrap();
                }
            });
        });
    };
    soak(150, 0);
    let before = s.memory();
    let seconds = std::env::var("LOWBIT_SOAK_SECONDS").ok().and_then(|v| v.parse().ok()).unwrap_or(0);
    soak(600, seconds);
    s.wait_for("vllm:num_requests_running", 0.0);
    s.wait_for("vllm:num_requests_waiting", 0.0);
    // Eight kept prompts of one page each are what may stay; a page is 64 tokens.
    assert!(s.metric("lowbit:kv_cache_pages") <= 8.0, "{}", s.metric("lowbit:kv_cache_pages"));
    let grown = s.memory().saturating_sub(before);
    // A leak of one body or answer a request would be tens of MB; allocators keep some.
    assert!(grown < 24 << 20, "grew by {grown} bytes from {before}");
}
