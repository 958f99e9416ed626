//! Server-sent events: bytes in, the data of each event out (WHATWG HTML, section 9.2 "Server-sent events").
//!
//! Lines end in LF, CR or CRLF, anywhere in the stream of chunks; several `data` lines of one event are joined by LF;
//! comments and other fields are skipped. An event without its blank line at the end of the stream is delivered by
//! [`SseParser::finish`], though a browser would drop it: some servers close right after the last line.

/// Longest event we keep; a server that sends more is not sending events.
const MAX_EVENT: usize = 16 << 20;

/// Parser state between chunks.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_cr: bool,
    started: bool,
    overflow: bool,
}

impl SseParser {
    /// Takes the next bytes; calls `event` with the data of each event that is complete.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&[u8])) {
        let mut rest = bytes;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_cr) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            match rest.iter().position(|&b| b == b'\n' || b == b'\r') {
                None => {
                    self.keep(rest);
                    return;
                }
                Some(at) => {
                    self.after_cr = rest[at] == b'\r';
                    if self.line.is_empty() {
                        // The common case: the whole line is in this chunk, and nothing is copied twice.
                        self.take_line(&rest[..at], &mut event);
                    } else {
                        self.keep(&rest[..at]);
                        let line = std::mem::take(&mut self.line);
                        self.take_line(&line, &mut event);
                        self.line = line;
                        self.line.clear();
                    }
                    rest = &rest[at + 1..];
                }
            }
        }
    }

    /// The stream is over: delivers what is left.
    pub fn finish(&mut self, mut event: impl FnMut(&[u8])) {
        if !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.take_line(&line, &mut event);
        }
        self.take_line(b"", &mut event);
    }

    /// Whether an event was longer than any real one.
    pub fn overflowed(&self) -> bool {
        self.overflow
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.line.len() + self.data.len() + bytes.len() > MAX_EVENT {
            self.overflow = true;
            self.line.clear();
            self.data.clear();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    fn take_line(&mut self, line: &[u8], event: &mut impl FnMut(&[u8])) {
        let line = if std::mem::replace(&mut self.started, true) {
            line
        } else {
            line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)
        };
        if line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                event(&self.data);
                self.data.clear();
            }
            return;
        }
        let Some(value) = line.strip_prefix(b"data") else { return };
        let value = match value {
            [] => value,
            [b':', b' ', v @ ..] | [b':', v @ ..] => v,
            // Another field whose name begins with "data".
            _ => return,
        };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        if self.data.len() + value.len() > MAX_EVENT {
            self.overflow = true;
        } else {
            self.data.extend_from_slice(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&[u8]]) -> Vec<String> {
        let (mut p, mut out) = (SseParser::default(), Vec::new());
        let mut keep = |d: &[u8]| out.push(String::from_utf8_lossy(d).into_owned());
        for c in chunks {
            p.push(c, &mut keep);
        }
        p.finish(&mut keep);
        out
    }

    #[test]
    fn every_split_and_line_end_gives_the_same_events() {
        let lf = "\u{feff}: hello\nevent: x\ndata: {\"a\": 1}\n\ndata:two\ndata\ndata:  lines\n\nid: 3\n\ndatabase: no\n\ndata: [DONE]\n\n";
        let want = ["{\"a\": 1}", "two\n\n lines", "[DONE]"];
        for text in [lf.to_string(), lf.replace('\n', "\r\n"), lf.replace('\n', "\r")] {
            let bytes = text.as_bytes();
            assert_eq!(parse(&[bytes]), want);
            for cut in 0..=bytes.len() {
                assert_eq!(parse(&[&bytes[..cut], &bytes[cut..]]), want, "cut at {cut}");
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(parse(&single), want);
        }
    }

    #[test]
    fn an_unfinished_event_is_delivered_at_the_end() {
        assert_eq!(parse(&[b"data: a\n\ndata: b"]), ["a", "b"]);
        assert_eq!(parse(&[b": only a comment\n\n"]), Vec::<String>::new());
    }
}
