//! The stand-in itself: one thread plays a script to every request, at times it knows beforehand, and logs its own stamps. `main.rs`
//! serves it to scripts, the tests of the load generator take it as a module.
#![allow(dead_code, reason = "each of the two uses a part")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lowbit_bench::load::timer::{Waiter, raise_file_limit};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Token};
use serde_json::json;

/// What the server does with a request, by its number.
pub type Script = Arc<dyn Fn(u64) -> Plan + Send + Sync>;

/// An answer: chunk k goes out `ttft + k · gap` after the request was read.
#[derive(Clone)]
pub struct Plan {
    pub ttft: Duration,
    pub gap: Duration,
    pub tokens: u32,
    /// Tokens in one chunk.
    pub pack: u32,
    pub end: End,
    pub stream: bool,
}

/// How an answer ends.
#[derive(Clone, Copy, PartialEq)]
pub enum End {
    Whole,
    Status(u16),
    /// 429, with so many seconds in `Retry-After`.
    Refused(u64),
    Cut,
    ErrorEvent,
}

/// Eight milliseconds to the first of five tokens, three between them.
pub fn plan() -> Plan {
    Plan {
        ttft: Duration::from_millis(8),
        gap: Duration::from_millis(3),
        tokens: 5,
        pack: 1,
        end: End::Whole,
        stream: true,
    }
}

/// When the server read a request and wrote each chunk, nanoseconds from its start. The end is written with the last chunk.
#[derive(Clone, Debug)]
pub struct Sent {
    pub read_ns: u64,
    pub chunks_ns: Vec<u64>,
    pub end_ns: u64,
}

/// A running server; it ends with the process.
pub struct StandIn {
    pub url: String,
    /// In the order of ending.
    pub log: Arc<Mutex<Vec<Sent>>>,
}

impl StandIn {
    /// Listens on a port of this machine, 0 being any free one.
    pub fn bind(port: u16, script: Script) -> std::io::Result<Self> {
        raise_file_limit();
        let mut listener = TcpListener::bind(([127, 0, 0, 1], port).into())?;
        let url = format!("http://{}", listener.local_addr()?);
        let waiter = Waiter::new().map_err(std::io::Error::other)?;
        waiter.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let server = Server {
            waiter,
            listener,
            connections: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            script,
            log: log.clone(),
            requests: 0,
            serial: 0,
            buffer: vec![0; 64 << 10],
        };
        std::thread::spawn(move || server.run());
        Ok(Self { url, log })
    }

    /// On any free port, for tests.
    pub fn start(script: Script) -> Self {
        Self::bind(0, script).expect("no port")
    }
}

const LISTENER: Token = Token(usize::MAX - 1);
const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

struct Connection {
    stream: TcpStream,
    /// Tells it from a later one in the same slot.
    serial: u64,
    input: Vec<u8>,
    output: Vec<u8>,
    playing: Option<Playing>,
}

struct Playing {
    plan: Plan,
    chat: bool,
    /// Next event.
    next: u32,
    read_ns: u64,
    chunks_ns: Vec<u64>,
}

struct Server {
    waiter: Waiter,
    listener: TcpListener,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// When which connection has something to say: time, slot, serial.
    due: BinaryHeap<Reverse<(u64, usize, u64)>>,
    script: Script,
    log: Arc<Mutex<Vec<Sent>>>,
    requests: u64,
    serial: u64,
    buffer: Vec<u8>,
}

impl Server {
    fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            let next = self.due.peek().map_or(u64::MAX, |Reverse(d)| d.0);
            if self.waiter.wait(&mut events, next.min(self.waiter.now() + 1_000_000_000)).is_err() {
                return;
            }
            for event in events.iter() {
                if event.token() == LISTENER {
                    self.accept();
                    continue;
                }
                // The timer's own token is no slot.
                let slot = event.token().0;
                if event.is_readable() || event.is_read_closed() {
                    self.read(slot);
                }
                if event.is_writable() {
                    self.flush(slot);
                }
            }
            while let Some(Reverse((at, slot, serial))) = self.due.peek().copied() {
                if at > self.waiter.now() {
                    break;
                }
                self.due.pop();
                self.play(slot, serial);
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((mut stream, _)) = self.listener.accept() {
            let _ = stream.set_nodelay(true);
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let both = Interest::READABLE | Interest::WRITABLE;
            if self.waiter.registry().register(&mut stream, Token(slot), both).is_err() {
                self.free.push(slot);
                continue;
            }
            self.serial += 1;
            let (input, output) = (Vec::new(), Vec::new());
            self.connections[slot] = Some(Connection { stream, serial: self.serial, input, output, playing: None });
        }
    }

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.connections.get_mut(slot).and_then(Option::as_mut)
    }

    fn close(&mut self, slot: usize) {
        if let Some(mut c) = self.connections.get_mut(slot).and_then(Option::take) {
            let _ = self.waiter.registry().deregister(&mut c.stream);
            self.free.push(slot);
        }
    }

    fn read(&mut self, slot: usize) {
        loop {
            let Some(c) = self.connections.get_mut(slot).and_then(Option::as_mut) else { return };
            match c.stream.read(&mut self.buffer) {
                Ok(0) => return self.close(slot),
                Ok(n) => c.input.extend_from_slice(&self.buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.close(slot),
            }
        }
        self.take(slot);
    }

    /// Begins the request that is whole, if one is and no other plays.
    fn take(&mut self, slot: usize) {
        let read_ns = self.waiter.now();
        let Some(c) = self.connection(slot).filter(|c| c.playing.is_none()) else { return };
        let serial = c.serial;
        let Some(head) = request(&mut c.input) else { return };
        if head.starts_with("get ") {
            let body =
                if head.starts_with("get /log") { self.logged() } else { r#"{"data":[{"id":"stand-in"}]}"#.into() };
            let kind = "Server: stand-in\r\nContent-Type: application/json";
            self.send(slot, &format!("HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
            return self.take(slot);
        }
        let plan = (self.script)(self.requests);
        self.requests += 1;
        let refusal = match plan.end {
            End::Status(code) => Some((code, String::new())),
            End::Refused(seconds) => Some((429, format!("Retry-After: {seconds}\r\n"))),
            _ => None,
        };
        if let Some((code, more)) = refusal {
            let body = r#"{"error":{"message":"no"}}"#;
            self.send(slot, &format!("HTTP/1.1 {code} No\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len()));
            self.note(Sent { read_ns, chunks_ns: Vec::new(), end_ns: read_ns });
            return self.take(slot);
        }
        self.due.push(Reverse((read_ns + ns(plan.ttft), slot, serial)));
        let chat = head.lines().next().is_some_and(|l| l.contains("/chat/"));
        if let Some(c) = self.connection(slot) {
            c.playing = Some(Playing { plan, chat, next: 0, read_ns, chunks_ns: Vec::new() });
        }
    }

    /// The next event of an answer.
    fn play(&mut self, slot: usize, serial: u64) {
        let now = self.waiter.now();
        let found = self.connections.get_mut(slot).and_then(Option::as_mut).filter(|c| c.serial == serial);
        let Some(p) = found.and_then(|c| c.playing.as_mut()) else { return };
        let (tokens, third) = (p.plan.tokens, p.next == 2);
        let usage = format!(r#"{{"prompt_tokens":4,"completion_tokens":{tokens},"total_tokens":{}}}"#, tokens + 4);
        let mut text = String::new();
        let mut last = true;
        if p.plan.end == End::Cut && third {
            self.finish(slot, now);
            return self.close(slot);
        } else if !p.plan.stream {
            let choice = if p.chat { r#"{"message":{"content":"all"}}"# } else { r#"{"text":"all"}"# };
            let body = format!(r#"{{"choices":[{choice}],"usage":{usage}}}"#);
            let kind = "Content-Type: application/json";
            text = format!("HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        } else {
            if p.next == 0 {
                text.push_str(HEAD);
            }
            let error = p.plan.end == End::ErrorEvent && third;
            if error {
                event(&mut text, r#"{"error":{"message":"out of memory"}}"#);
            } else {
                let chat = r#"{"choices":[{"index":0,"delta":{"content":" w"}}]}"#;
                event(&mut text, if p.chat { chat } else { r#"{"choices":[{"text":" w","index":0}]}"# });
                p.chunks_ns.push(now);
            }
            p.next += 1;
            last = error || p.next >= tokens.div_ceil(p.plan.pack);
            if last {
                event(&mut text, &format!(r#"{{"choices":[],"usage":{usage}}}"#));
                event(&mut text, "[DONE]");
                text.push_str("0\r\n\r\n");
            } else {
                let at = p.read_ns + ns(p.plan.ttft) + u64::from(p.next) * ns(p.plan.gap);
                self.due.push(Reverse((at, slot, serial)));
            }
        }
        if last {
            self.finish(slot, now);
        }
        self.send(slot, &text);
        if last {
            self.take(slot);
        }
    }

    /// Takes what plays off a connection and logs it.
    fn finish(&mut self, slot: usize, end_ns: u64) {
        if let Some(p) = self.connection(slot).and_then(|c| c.playing.take()) {
            self.note(Sent { read_ns: p.read_ns, chunks_ns: p.chunks_ns, end_ns });
        }
    }

    fn note(&self, sent: Sent) {
        if let Ok(mut log) = self.log.lock() {
            log.push(sent);
        }
    }

    /// `GET /log`.
    fn logged(&self) -> String {
        let log = self.log.lock().map(|l| l.clone()).unwrap_or_default();
        let rows = log.iter().map(|s| json!({"read_ns": s.read_ns, "chunks_ns": s.chunks_ns, "end_ns": s.end_ns}));
        serde_json::Value::Array(rows.collect()).to_string()
    }

    fn send(&mut self, slot: usize, text: &str) {
        if let Some(c) = self.connection(slot) {
            c.output.extend_from_slice(text.as_bytes());
        }
        self.flush(slot);
    }

    fn flush(&mut self, slot: usize) {
        let Some(c) = self.connection(slot) else { return };
        let mut done = 0;
        let broken = loop {
            let Some(rest) = c.output.get(done..).filter(|r| !r.is_empty()) else { break false };
            match c.stream.write(rest) {
                Ok(0) => break true,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
        };
        c.output.drain(..done);
        if broken {
            self.close(slot);
        }
    }
}

fn ns(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX / 4)
}

/// An event in a chunk of its own.
fn event(out: &mut String, data: &str) {
    let text = format!("data: {data}\r\n\r\n");
    out.push_str(&format!("{:x}\r\n{text}\r\n", text.len()));
}

/// Takes one whole request off the input; its head in lower case.
fn request(input: &mut Vec<u8>) -> Option<String> {
    let head_end = input.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&input[..head_end]).to_ascii_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length:"));
    let length: usize = length.map_or(Some(0), |v| v.trim().parse().ok())?;
    if input.len() < head_end + length {
        return None;
    }
    input.drain(..head_end + length);
    Some(head)
}
