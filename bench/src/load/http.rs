//! HTTP/1.1, the part a load generator needs: an address, and responses parsed as they arrive (RFC 9112).

use crate::load::error::{LoadError, Result};

/// Longest response head we take.
const MAX_HEAD: usize = 64 << 10;

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Host, for the address and the `Host` header.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path before `/v1`, without a trailing slash; empty at the root.
    pub prefix: String,
}

impl Target {
    /// Reads `http://host[:port][/path][/v1]`; the scheme may be left out.
    pub fn parse(url: &str) -> Result<Self> {
        let bad = |why: &str| LoadError::option(url, why, "an address such as http://127.0.0.1:8000");
        if url.starts_with("https://") {
            return Err(LoadError::option(
                url,
                "TLS is not built in",
                "put a local proxy that speaks TLS in front, and load that over http",
            ));
        }
        let rest = url.strip_prefix("http://").unwrap_or(url);
        if rest.contains("://") {
            return Err(bad("an unknown scheme"));
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            Some((h, p)) if !h.ends_with(':') && !p.contains(']') => {
                (h, p.parse().map_err(|_| bad("the port is not a number below 65536"))?)
            }
            _ => (authority, 80),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.contains('@') {
            return Err(bad("no host, or a password in it"));
        }
        let path = path.trim_end_matches('/');
        let prefix = path.strip_suffix("/v1").unwrap_or(path).to_string();
        Ok(Self { host: host.to_string(), port, prefix })
    }

    /// Value of the `Host` header.
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// As an address, without a path of the API.
    pub fn url(&self) -> String {
        format!("http://{}{}", self.authority(), self.prefix)
    }
}

/// What the head of a response said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// The body is a stream of server-sent events.
    pub event_stream: bool,
    /// The connection may be used again.
    pub keep_alive: bool,
    /// `Server`, where it says.
    pub server: Option<String>,
    /// `Retry-After`, where it says.
    pub retry_after: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Length(u64),
    Chunk(u64),
    ChunkHead,
    ChunkEnd,
    Trailer,
    UntilClose,
    Done,
}

/// One response, as bytes come.
#[derive(Debug, Default)]
pub struct ResponseParser {
    pending: Vec<u8>,
    head: Option<Head>,
    body: Option<Body>,
}

impl ResponseParser {
    /// The head, once it is here.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// Whether the whole response is here.
    pub fn done(&self) -> bool {
        self.body == Some(Body::Done)
    }

    /// Whether not a byte has come.
    pub fn untouched(&self) -> bool {
        self.head.is_none() && self.pending.is_empty()
    }

    /// The peer closed: fine for a body that ends so, else the response is cut short.
    pub fn closed(&mut self) -> std::result::Result<(), &'static str> {
        match self.body {
            Some(Body::UntilClose | Body::Done) => {
                self.body = Some(Body::Done);
                Ok(())
            }
            Some(_) => Err("the connection was closed inside the body"),
            None => Err("the connection was closed before a response"),
        }
    }

    /// Takes the next bytes; calls `body` with every piece of the decoded body.
    pub fn push(&mut self, bytes: &[u8], body: &mut dyn FnMut(&[u8])) -> std::result::Result<(), String> {
        if self.body.is_none() {
            self.pending.extend_from_slice(bytes);
            let Some(used) = self.parse_head()? else { return Ok(()) };
            let rest = self.pending.split_off(used);
            self.pending.clear();
            return self.push_body(&rest, body);
        }
        self.push_body(bytes, body)
    }

    fn parse_head(&mut self) -> std::result::Result<Option<usize>, String> {
        let mut start = 0;
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 100];
            let mut response = httparse::Response::new(&mut headers);
            let rest = self.pending.get(start..).unwrap_or_default();
            let used = match response.parse(rest).map_err(|e| format!("not an HTTP response: {e}"))? {
                httparse::Status::Complete(n) => n,
                httparse::Status::Partial if rest.len() > MAX_HEAD => {
                    return Err("the response head is too long".into());
                }
                httparse::Status::Partial => return Ok(None),
            };
            let status = response.code.unwrap_or_default();
            // 1xx are announcements; the answer follows.
            if (100..200).contains(&status) {
                start += used;
                continue;
            }
            let text = |name: &str| {
                let found = response.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
                found.map(|h| String::from_utf8_lossy(h.value).trim().to_ascii_lowercase()).next_back()
            };
            let connection = text("connection").unwrap_or_default();
            let keep_alive = if response.version == Some(0) {
                connection.contains("keep-alive")
            } else {
                !connection.contains("close")
            };
            let chunked = text("transfer-encoding").is_some_and(|t| t.ends_with("chunked"));
            let length = match text("content-length") {
                Some(l) if !chunked => Some(l.parse::<u64>().map_err(|_| format!("Content-Length is {l:?}"))?),
                _ => None,
            };
            self.body = Some(match (chunked, length) {
                _ if status == 204 || status == 304 => Body::Done,
                (true, _) => Body::ChunkHead,
                (_, Some(0)) => Body::Done,
                (_, Some(n)) => Body::Length(n),
                _ => Body::UntilClose,
            });
            let framed = self.body != Some(Body::UntilClose);
            self.head = Some(Head {
                status,
                event_stream: text("content-type").is_some_and(|t| t.starts_with("text/event-stream")),
                keep_alive: keep_alive && framed,
                server: text("server"),
                retry_after: text("retry-after"),
            });
            return Ok(Some(start + used));
        }
    }

    fn push_body(&mut self, bytes: &[u8], body: &mut dyn FnMut(&[u8])) -> std::result::Result<(), String> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.body {
                None => return Err("a body before its head".into()),
                Some(Body::Done) => return Err("more bytes than the response has".into()),
                Some(Body::UntilClose) => {
                    body(rest);
                    return Ok(());
                }
                Some(Body::Length(left)) => {
                    let n = left.min(rest.len() as u64);
                    body(&rest[..n as usize]);
                    rest = &rest[n as usize..];
                    self.body = Some(if n == left { Body::Done } else { Body::Length(left - n) });
                }
                Some(Body::Chunk(left)) => {
                    let n = left.min(rest.len() as u64);
                    body(&rest[..n as usize]);
                    rest = &rest[n as usize..];
                    self.body = Some(if n == left { Body::ChunkEnd } else { Body::Chunk(left - n) });
                }
                Some(state) => {
                    // Lines between the chunks; one may be split over several reads.
                    let Some(at) = rest.iter().position(|&b| b == b'\n') else {
                        self.pending.extend_from_slice(rest);
                        return if self.pending.len() > MAX_HEAD {
                            Err("a chunk's head is too long".into())
                        } else {
                            Ok(())
                        };
                    };
                    self.pending.extend_from_slice(&rest[..at]);
                    rest = &rest[at + 1..];
                    let line = std::mem::take(&mut self.pending);
                    self.body = Some(after_line(state, line.trim_ascii())?);
                    self.pending = line;
                    self.pending.clear();
                }
            }
        }
        Ok(())
    }
}

fn after_line(state: Body, line: &[u8]) -> std::result::Result<Body, String> {
    match state {
        Body::ChunkHead => {
            let text = std::str::from_utf8(line).unwrap_or("?");
            let digits = text.split(';').next().unwrap_or_default().trim();
            match u64::from_str_radix(digits, 16) {
                Ok(0) => Ok(Body::Trailer),
                Ok(n) => Ok(Body::Chunk(n)),
                Err(_) => Err(format!("a chunk's length is {digits:?}")),
            }
        }
        Body::ChunkEnd if line.is_empty() => Ok(Body::ChunkHead),
        Body::ChunkEnd => Err("a chunk is longer than it says".into()),
        Body::Trailer if line.is_empty() => Ok(Body::Done),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&[u8]]) -> std::result::Result<(ResponseParser, String), String> {
        let (mut p, mut out) = (ResponseParser::default(), Vec::new());
        for c in chunks {
            p.push(c, &mut |b| out.extend_from_slice(b))?;
        }
        Ok((p, String::from_utf8_lossy(&out).into_owned()))
    }

    #[test]
    fn addresses() {
        let t = Target::parse("http://localhost:8000/v1/").unwrap();
        assert_eq!((t.host.as_str(), t.port, t.prefix.as_str()), ("localhost", 8000, ""));
        let t = Target::parse("[::1]:9/proxy").unwrap();
        assert_eq!((t.authority().as_str(), t.prefix.as_str()), ("[::1]:9", "/proxy"));
        assert_eq!(Target::parse("10.0.0.1").unwrap().port, 80);
        for bad in ["https://x", "ftp://x", "http://", "http://a:b", "http://u:p@h:1"] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_split_of_a_chunked_response_gives_the_same_body() {
        let bytes: &[u8] =
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\
            Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n \r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n";
        for cut in 0..=bytes.len() {
            let (p, body) = parse(&[&bytes[..cut], &bytes[cut..]]).unwrap();
            assert!(p.done() && body == "hello 0123456789", "cut at {cut}");
            let head = p.head().unwrap();
            assert!(head.event_stream && head.keep_alive && head.status == 200);
        }
    }

    #[test]
    fn lengths_and_closes() {
        let (p, body) =
            parse(&[b"HTTP/1.1 429 Too Many\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", b"ab", b"c"]).unwrap();
        assert!(p.done() && body == "abc" && !p.head().unwrap().keep_alive && p.head().unwrap().status == 429);
        let (mut p, body) = parse(&[b"HTTP/1.0 200 OK\r\n\r\nuntil", b" the end"]).unwrap();
        assert!(!p.done() && body == "until the end" && p.closed().is_ok() && p.done());
        let (mut p, _) = parse(&[b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"]).unwrap();
        assert!(p.closed().is_err());
        assert!(parse(&[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]).is_err());
        assert!(parse(&[b"SSH-2.0-OpenSSH\r\n\r\n"]).is_err());
        assert!(parse(&[b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab"]).is_err());
    }
}
