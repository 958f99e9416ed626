//! One connection and the request on it: bytes out, bytes in, stamps.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use mio::net::TcpStream;

use crate::load::data::Item;
use crate::load::http::ResponseParser;
use crate::load::openai;
use crate::load::sse::SseParser;
use crate::load::trace::{Outcome, RequestTrace};

/// A request in flight.
pub(crate) struct Active {
    pub(crate) scheduled_ns: u64,
    pub(crate) sent_ns: u64,
    pub(crate) input_tokens: Option<u32>,
    /// Kept where turns follow.
    pub(crate) item: Option<Item>,
    /// The answer, kept where turns follow.
    pub(crate) text: String,
    pub(crate) request: Vec<u8>,
    written: usize,
    chunks_ns: Vec<u64>,
    chunk_tokens: Vec<u32>,
    usage: Option<openai::Usage>,
    error: Option<Outcome>,
    done_ns: Option<u64>,
    whole: Vec<u8>,
    /// Output came in chunks; a whole answer has no first token of its own.
    streamed: bool,
}

impl Active {
    pub(crate) fn new(
        request: Vec<u8>,
        input_tokens: Option<u32>,
        item: Option<Item>,
        scheduled_ns: u64,
        sent_ns: u64,
    ) -> Self {
        Self {
            scheduled_ns,
            sent_ns,
            input_tokens,
            item,
            text: String::new(),
            request,
            written: 0,
            chunks_ns: Vec::with_capacity(128),
            chunk_tokens: Vec::new(),
            usage: None,
            error: None,
            done_ns: None,
            whole: Vec::new(),
            streamed: true,
        }
    }

    /// Starts again, as if nothing had been answered.
    pub(crate) fn rewind(&mut self) {
        self.written = 0;
        self.whole.clear();
    }

    fn event(&mut self, data: &[u8], now: u64) {
        if self.done_ns.is_some() {
            return;
        }
        let part = match openai::read(data) {
            Ok(part) => part,
            Err(why) => {
                self.error.get_or_insert(Outcome::Protocol(why));
                return;
            }
        };
        if let Some(error) = part.error {
            self.error.get_or_insert(Outcome::Stream(error));
        }
        if part.done {
            self.done_ns = Some(now);
            return;
        }
        let before = self.usage.and_then(|u| u.completion_tokens).unwrap_or(0);
        let after = part.usage.and_then(|u| u.completion_tokens);
        if part.has_output {
            self.chunks_ns.push(now);
            // Counts per chunk are all there or none is used.
            if let (Some(after), true) = (after, self.chunk_tokens.len() + 1 == self.chunks_ns.len()) {
                self.chunk_tokens.push(after.saturating_sub(before));
            }
            if self.item.is_some() {
                self.text.push_str(&part.text);
            }
        }
        if part.usage.is_some() {
            self.usage = part.usage;
        }
    }

    /// The trace, at the end.
    pub(crate) fn into_trace(mut self, now: u64, outcome: Outcome) -> (RequestTrace, Option<Item>, String) {
        let counted = self.usage.and_then(|u| u.completion_tokens).filter(|&n| n > 0);
        let outcome = match (outcome, self.error.take()) {
            (Outcome::Ok, Some(e)) => e,
            (Outcome::Ok, None) if self.chunks_ns.is_empty() && counted.is_none() => {
                Outcome::Protocol("an answer without a token".into())
            }
            (o, _) => o,
        };
        let trace = RequestTrace {
            scheduled_ns: self.scheduled_ns,
            sent_ns: self.sent_ns,
            output_tokens: counted.unwrap_or(self.chunks_ns.len() as u32),
            counted_by_server: counted.is_some(),
            input_tokens: self.usage.and_then(|u| u.prompt_tokens).or(self.input_tokens),
            chunks_ns: if self.streamed { self.chunks_ns } else { Vec::new() },
            chunk_tokens: if self.streamed { self.chunk_tokens } else { Vec::new() },
            end_ns: self.done_ns.unwrap_or(now),
            outcome,
        };
        (trace, self.item, self.text)
    }
}

/// What came of an event on the connection.
pub(crate) enum Step {
    /// Nothing yet.
    Waiting,
    /// The request is over; whether the connection can serve another.
    Finished(Outcome, bool),
    /// Closed by the server before it saw the request: to be sent again.
    Stale,
}

/// A connection.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) active: Option<Active>,
    connected: bool,
    used: bool,
    parser: ResponseParser,
    sse: SseParser,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            active: None,
            connected: false,
            used: false,
            parser: ResponseParser::default(),
            sse: SseParser::default(),
        }
    }

    /// Puts a request on it and writes what goes.
    pub(crate) fn start(&mut self, active: Active) -> Step {
        self.parser = ResponseParser::default();
        self.sse = SseParser::default();
        self.active = Some(active);
        if self.connected { self.write() } else { Step::Waiting }
    }

    /// The socket is writable, perhaps for the first time.
    pub(crate) fn writable(&mut self) -> Step {
        if !self.connected {
            if let Ok(Some(e)) = self.stream.take_error() {
                return Step::Finished(Outcome::Connect(e.to_string()), false);
            }
            match self.stream.peer_addr() {
                Ok(_) => {
                    self.connected = true;
                    // A request is one small write; waiting for more of it would add 40 ms.
                    let _ = self.stream.set_nodelay(true);
                }
                Err(e) if e.kind() == ErrorKind::NotConnected => return Step::Waiting,
                Err(e) => return Step::Finished(Outcome::Connect(e.to_string()), false),
            }
        }
        self.write()
    }

    fn write(&mut self) -> Step {
        let Some(a) = &mut self.active else { return Step::Waiting };
        while let Some(rest) = a.request.get(a.written..).filter(|r| !r.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return self.broken("the server takes no bytes"),
                Ok(n) => a.written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return self.broken(&e.to_string()),
            }
        }
        Step::Waiting
    }

    /// Reads all there is; `now` gives the time after each read.
    pub(crate) fn readable(&mut self, buffer: &mut [u8], now: impl Fn() -> u64) -> Step {
        loop {
            let n = match self.stream.read(buffer) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Step::Waiting,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if !self.connected => return Step::Finished(Outcome::Connect(e.to_string()), false),
                Err(e) => return self.broken(&e.to_string()),
            };
            let stamp = now();
            let Some(a) = &mut self.active else {
                // An idle connection: closed, or a server that talks unasked. Neither can be used again.
                return Step::Finished(Outcome::Cancelled, false);
            };
            if n == 0 {
                if self.parser.untouched() {
                    return self.broken("closed before a response");
                }
                if let Err(why) = self.parser.closed() {
                    return Step::Finished(Outcome::Disconnected(why.into()), false);
                }
                return self.complete(stamp);
            }
            // Split borrows: the parser feeds events into the request.
            let Some(bytes) = buffer.get(..n) else { return Step::Waiting };
            let (parser, sse) = (&mut self.parser, &mut self.sse);
            let mut body = Vec::new();
            if let Err(why) = parser.push(bytes, &mut |piece| body.extend_from_slice(piece)) {
                return Step::Finished(Outcome::Protocol(why), false);
            }
            let head = parser.head();
            let streaming = head.is_some_and(|h| h.event_stream && (200..300).contains(&h.status));
            if streaming {
                sse.push(&body, |data| a.event(data, stamp));
                if sse.overflowed() {
                    return Step::Finished(Outcome::Protocol("an event of more than 16 MiB".into()), false);
                }
            } else {
                a.whole.extend_from_slice(&body);
            }
            let open_ended = head.is_some_and(|h| !h.keep_alive) && a.done_ns.is_some();
            if parser.done() || open_ended {
                return self.complete(stamp);
            }
        }
    }

    /// How long the server asks to wait before the request comes again: 429, or 503 that says so. Without a number of seconds it is one.
    pub(crate) fn refused(&self) -> Option<Duration> {
        let head = self.parser.head()?;
        let said = head.retry_after.as_deref();
        let seconds = said.and_then(|s| s.trim().parse::<f64>().ok());
        let wait = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(Duration::from_secs(1));
        (head.status == 429 || head.status == 503 && said.is_some()).then_some(wait)
    }

    /// The response is whole.
    fn complete(&mut self, now: u64) -> Step {
        let Some(a) = &mut self.active else { return Step::Waiting };
        let Some(head) = self.parser.head() else { return Step::Waiting };
        let keep = head.keep_alive && self.parser.done();
        self.used = true;
        if !(200..300).contains(&head.status) {
            let text = String::from_utf8_lossy(a.whole.get(..a.whole.len().min(300)).unwrap_or_default()).into_owned();
            return Step::Finished(Outcome::Status(head.status, text), keep);
        }
        if head.event_stream {
            self.sse.finish(|data| a.event(data, now));
        } else {
            let whole = std::mem::take(&mut a.whole);
            a.event(&whole, now);
            a.streamed = false;
        }
        Step::Finished(Outcome::Ok, keep)
    }

    /// The connection broke: a kept one that never answered was closed by the server while idle, as it may.
    fn broken(&self, why: &str) -> Step {
        if self.used && self.parser.untouched() {
            return Step::Stale;
        }
        Step::Finished(Outcome::Disconnected(why.into()), false)
    }
}
