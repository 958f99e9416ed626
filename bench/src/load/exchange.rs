//! One request and its whole answer, on kept connections: for callers that want answers and not their timing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::load::error::{LoadError, Result};
use crate::load::http::{ResponseParser, Target};

/// Longest body that is read.
const MAX_BODY: usize = 256 << 20;

/// A server and how to talk to it; many threads may use it at once, each request on a connection of its own.
#[derive(Debug)]
pub struct Exchange {
    target: Target,
    addresses: Vec<SocketAddr>,
    /// Headers after the request line, without the length.
    headers: String,
    timeout: Duration,
    idle: Mutex<Vec<TcpStream>>,
}

/// A whole response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// `Retry-After` in seconds; `None` without one, or where it is a date.
    pub retry_after: Option<Duration>,
    /// Decoded body.
    pub body: Vec<u8>,
}

/// How one try on one connection went wrong.
enum Failed {
    /// A kept connection that was closed before it answered: the server may do so, and the request goes out again.
    Stale,
    Other(String),
}

impl Exchange {
    /// Resolves the address and connects to nothing. `headers` are extra ones; an API key becomes `Authorization: Bearer`.
    pub fn new(url: &str, api_key: Option<&str>, headers: &[(String, String)], timeout: Duration) -> Result<Self> {
        let target = Target::parse(url)?;
        let clean = |s: &str| !s.is_empty() && !s.contains(['\r', '\n']);
        if let Some((name, _)) = headers.iter().find(|(n, v)| !clean(n) || !clean(v) || n.contains([' ', ':'])) {
            return Err(LoadError::option(name.as_str(), "not a header", "NAME: VALUE, each on one line"));
        }
        if api_key.is_some_and(|k| !clean(k)) {
            return Err(LoadError::option("the API key", "is empty or has a line break", "one line"));
        }
        let unreachable = |why: String| LoadError::Unreachable { url: target.url(), why };
        let addresses: Vec<SocketAddr> =
            (target.host.as_str(), target.port).to_socket_addrs().map_err(|e| unreachable(e.to_string()))?.collect();
        if addresses.is_empty() {
            return Err(unreachable("the name has no address".into()));
        }
        let mut text = format!(
            "Host: {}\r\nUser-Agent: lowbit\r\nAccept: application/json\r\nContent-Type: application/json\r\n",
            target.authority()
        );
        if let Some(key) = api_key {
            text.push_str(&format!("Authorization: Bearer {key}\r\n"));
        }
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        Ok(Self { target, addresses, headers: text, timeout, idle: Mutex::default() })
    }

    /// Where it goes, without a path of the API.
    pub fn url(&self) -> String {
        self.target.url()
    }

    /// `GET` of a path such as `/v1/models`. The error is the reason no whole response came.
    pub fn get(&self, path: &str) -> std::result::Result<Response, String> {
        self.send(&format!("GET {}{path} HTTP/1.1\r\n{}\r\n", self.target.prefix, self.headers), &[])
    }

    /// `POST` of a JSON body.
    pub fn post(&self, path: &str, body: &[u8]) -> std::result::Result<Response, String> {
        let (prefix, headers) = (&self.target.prefix, &self.headers);
        self.send(&format!("POST {prefix}{path} HTTP/1.1\r\n{headers}Content-Length: {}\r\n\r\n", body.len()), body)
    }

    fn send(&self, head: &str, body: &[u8]) -> std::result::Result<Response, String> {
        let request = [head.as_bytes(), body].concat();
        let deadline = Instant::now() + self.timeout;
        loop {
            let kept = self.idle.lock().ok().and_then(|mut idle| idle.pop());
            let used = kept.is_some();
            let stream = match kept {
                Some(stream) => stream,
                None => self.connect(deadline)?,
            };
            match self.talk(stream, &request, used, deadline) {
                Ok(response) => return Ok(response),
                Err(Failed::Stale) => {}
                Err(Failed::Other(why)) => return Err(why),
            }
        }
    }

    fn connect(&self, deadline: Instant) -> std::result::Result<TcpStream, String> {
        let mut last = String::new();
        for address in &self.addresses {
            match TcpStream::connect_timeout(address, left(deadline)?.min(Duration::from_secs(10))) {
                Ok(stream) => {
                    // A request is one write; waiting for more of it would add 40 ms.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(e) => last = format!("cannot connect: {e}"),
            }
        }
        Err(last)
    }

    fn talk(
        &self,
        mut stream: TcpStream,
        request: &[u8],
        used: bool,
        deadline: Instant,
    ) -> std::result::Result<Response, Failed> {
        let late =
            |e: &std::io::Error| matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
        let broken = |e: std::io::Error, untouched: bool| match (late(&e), used && untouched) {
            (true, _) => Failed::Other(format!("no whole answer within {:.1} s", self.timeout.as_secs_f64())),
            (_, true) => Failed::Stale,
            _ => Failed::Other(format!("the connection broke: {e}")),
        };
        let limit = left(deadline).map_err(Failed::Other)?;
        stream.set_write_timeout(Some(limit)).map_err(|e| broken(e, true))?;
        stream.write_all(request).map_err(|e| broken(e, true))?;
        let (mut parser, mut body, mut buffer) = (ResponseParser::default(), Vec::new(), vec![0u8; 32 << 10]);
        while !parser.done() {
            stream.set_read_timeout(Some(left(deadline).map_err(Failed::Other)?)).map_err(|e| broken(e, false))?;
            let n = match stream.read(&mut buffer) {
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken(e, parser.untouched())),
            };
            if n == 0 {
                if used && parser.untouched() {
                    return Err(Failed::Stale);
                }
                parser.closed().map_err(|why| Failed::Other(why.into()))?;
                break;
            }
            let bytes = buffer.get(..n).unwrap_or_default();
            parser.push(bytes, &mut |piece| body.extend_from_slice(piece)).map_err(Failed::Other)?;
            if body.len() > MAX_BODY {
                return Err(Failed::Other(format!("the answer is longer than {} MiB", MAX_BODY >> 20)));
            }
        }
        let Some(head) = parser.head() else { return Err(Failed::Other("no response".into())) };
        if head.keep_alive
            && let Ok(mut idle) = self.idle.lock()
        {
            idle.push(stream);
        }
        let seconds = head.retry_after.as_ref().and_then(|s| s.parse::<f64>().ok());
        let retry_after = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
        Ok(Response { status: head.status, retry_after, body })
    }
}

fn left(deadline: Instant) -> std::result::Result<Duration, String> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err("no whole answer within the time limit".into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    use super::*;

    /// Plays a script of responses, one a request; an empty one closes the connection. Returns what it was asked.
    fn server(script: Vec<&'static str>) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let handle = std::thread::spawn(move || {
            let mut asked = Vec::new();
            let mut script = script.into_iter();
            'connections: loop {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut writer = stream;
                loop {
                    let Some(answer) = script.next() else { return asked };
                    if answer.is_empty() {
                        continue 'connections;
                    }
                    let (mut line, mut length, mut first) = (String::new(), 0, String::new());
                    while reader.read_line(&mut line).unwrap() > 2 {
                        let lower = line.to_ascii_lowercase();
                        length = lower.strip_prefix("content-length: ").map_or(length, |l| l.trim().parse().unwrap());
                        first = if first.is_empty() { line.trim().to_string() } else { first };
                        line.clear();
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).unwrap();
                    asked.push(format!("{first} {}", String::from_utf8(body).unwrap()));
                    writer.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        (url, handle)
    }

    #[test]
    fn connections_are_kept_and_a_closed_one_is_replaced() {
        let (url, handle) = server(vec![
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
            "HTTP/1.1 429 Slow\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n",
            "",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\n\r\n",
        ]);
        let x = Exchange::new(&format!("{url}/v1"), None, &[], Duration::from_secs(20)).unwrap();
        assert_eq!(x.get("/v1/models").unwrap().body, b"ab");
        let second = x.post("/p", b"{1}").unwrap();
        assert_eq!((second.status, second.retry_after), (429, Some(Duration::from_secs(2))));
        assert_eq!(x.post("/p", b"{2}").unwrap().body, b"xyz");
        assert_eq!(
            handle.join().unwrap(),
            ["GET /v1/models HTTP/1.1 ", "POST /p HTTP/1.1 {1}", "POST /p HTTP/1.1 {2}"]
        );
    }

    #[test]
    fn a_cut_answer_and_silence_are_told() {
        let (url, _handle) = server(vec!["HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", ""]);
        let x = Exchange::new(&url, Some("k"), &[], Duration::from_secs(20)).unwrap();
        assert!(x.get("/").unwrap_err().contains("inside the body"));
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let x = Exchange::new(&url, None, &[], Duration::from_millis(50)).unwrap();
        assert!(x.get("/").unwrap_err().contains("within"));
        assert!(Exchange::new("http://h.invalid", None, &[], Duration::from_secs(1)).is_err());
        assert!(Exchange::new(&url, Some("a\nb"), &[], Duration::from_secs(1)).is_err());
    }
}
