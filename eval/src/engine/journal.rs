//! Finished answers on disk, so that a run cut short goes on where it stopped.
//!
//! A file is a magic line and frames: length (u32), FNV-1a checksum (u64), payload, little-endian. The first payload is
//! the identity of the run (models, tokenizer, arithmetic, protocol); each other is the key of a request, or of a window of a text, and
//! its answer.
//! Floats are stored as their bits. A process killed while writing leaves a torn last frame: reading stops there and
//! the next writer cuts it off.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use lowbit_checkpoint::hash::sha256_hex;

use super::Answer;
use crate::drift::row::{RowDrift, TOP, WORDS};
use crate::error::{EvalError, Result};
use crate::tasks::{Request, Response};

const MAGIC: &[u8; 16] = b"lowbit journal1\n";
/// Answers between two calls of `fsync`: a crash of the machine, not of the process, loses at most these.
const SYNC_EVERY: usize = 512;

/// Where finished answers are kept.
pub trait Store {
    /// The answer to a request of this key, if it is known.
    fn get(&self, key: &str) -> Option<Answer>;
    /// Keeps an answer.
    fn put(&mut self, key: &str, answer: &Answer) -> Result<()>;
    /// Makes sure that what was put outlives the machine.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Keeps nothing.
pub struct NoStore;

impl Store for NoStore {
    fn get(&self, _: &str) -> Option<Answer> {
        None
    }

    fn put(&mut self, _: &str, _: &Answer) -> Result<()> {
        Ok(())
    }
}

/// The first answer found counts; each store hears of every new one.
impl Store for Vec<Box<dyn Store + '_>> {
    fn get(&self, key: &str) -> Option<Answer> {
        self.iter().find_map(|s| s.get(key))
    }

    fn put(&mut self, key: &str, answer: &Answer) -> Result<()> {
        self.iter_mut().try_for_each(|s| s.put(key, answer))
    }

    fn finish(&mut self) -> Result<()> {
        self.iter_mut().try_for_each(|s| s.finish())
    }
}

/// Key of a request: what is asked, not where it stands. Equal questions of two documents share an answer.
pub fn request_key(request: &Request) -> Result<String> {
    let text = serde_json::to_vec(&request.kind).map_err(|e| EvalError::Request {
        task: request.task.clone(),
        doc: request.doc,
        idx: request.idx,
        problem: e.to_string(),
    })?;
    Ok(sha256_hex(&text))
}

/// Key of a window of a text: what is measured on it, its tokens, and which of them are targets. Equal windows share an answer.
pub fn window_key(what: &str, ids: &[u32], scored: &Range<usize>) -> String {
    let mut bytes = format!("{what} {}..{}\n", scored.start, scored.end).into_bytes();
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    sha256_hex(&bytes)
}

/// How a journal was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// There was none.
    New,
    /// So many answers of the same run.
    Continued(usize),
    /// It belonged to other models or options and was started anew.
    Replaced,
}

/// An open journal.
pub struct Journal {
    path: PathBuf,
    file: File,
    answers: HashMap<String, Answer>,
    unsynced: usize,
    /// How it was found.
    pub found: Found,
}

impl Journal {
    /// Opens or starts the journal of a run. One process writes it at a time: the file is locked.
    pub fn open(path: &Path, identity: &str) -> Result<Self> {
        let io = |e: std::io::Error| journal_error(path, e);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(io)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        file.try_lock().map_err(|_| EvalError::Journal {
            path: path.to_path_buf(),
            problem: "another process is writing it; wait for it, or give this run another output".into(),
        })?;
        let bytes = std::fs::read(path).map_err(io)?;
        let read = read_frames(&bytes);
        let same = read.as_ref().is_some_and(|r| r.identity == identity);
        let (answers, end, found) = match read {
            Some(r) if same => {
                let found = if r.answers.is_empty() { Found::New } else { Found::Continued(r.answers.len()) };
                (r.answers, r.end as u64, found)
            }
            // Anything that is not a journal is not ours to overwrite.
            None if !bytes.is_empty() && !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) => {
                return Err(EvalError::Journal {
                    path: path.to_path_buf(),
                    problem: "is not a journal of lowbit; remove it or give another output".into(),
                });
            }
            Some(_) => (HashMap::new(), 0, Found::Replaced),
            None => (HashMap::new(), 0, Found::New),
        };
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(io)?;
        if end == 0 {
            file.write_all(MAGIC).and_then(|()| file.write_all(&frame(identity.as_bytes()))).map_err(io)?;
        }
        Ok(Self { path: path.to_path_buf(), file, answers, unsynced: 0, found })
    }

    /// Answers known.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Removes the file: the result it led to is written.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|e| journal_error(&self.path, e))
    }
}

impl Store for Journal {
    fn get(&self, key: &str) -> Option<Answer> {
        self.answers.get(key).cloned()
    }

    fn put(&mut self, key: &str, answer: &Answer) -> Result<()> {
        if self.answers.contains_key(key) {
            return Ok(());
        }
        // One write a frame: a kill leaves whole frames and at most one torn one.
        self.file.write_all(&frame(&encode(key, answer))).map_err(|e| journal_error(&self.path, e))?;
        self.answers.insert(key.to_owned(), answer.clone());
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<()> {
        self.unsynced = 0;
        self.file.sync_data().map_err(|e| journal_error(&self.path, e))
    }
}

/// Answers of a journal that nobody writes any more; `None` where the file is none or of another run.
pub fn read_answers(path: &Path, identity: &str) -> Result<Option<HashMap<String, Answer>>> {
    let bytes = std::fs::read(path).map_err(|e| journal_error(path, e))?;
    Ok(read_frames(&bytes).filter(|r| r.identity == identity).map(|r| r.answers))
}

/// Identity and answers of a journal that nobody writes any more; `None` where the file is none.
pub fn read_all(path: &Path) -> Result<Option<(String, HashMap<String, Answer>)>> {
    let bytes = std::fs::read(path).map_err(|e| journal_error(path, e))?;
    Ok(read_frames(&bytes).map(|r| (r.identity, r.answers)))
}

fn journal_error(path: &Path, source: std::io::Error) -> EvalError {
    EvalError::JournalIo { path: path.to_path_buf(), source }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 12);
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend(checksum(payload).to_le_bytes());
    out.extend(payload);
    out
}

struct Frames {
    identity: String,
    answers: HashMap<String, Answer>,
    /// Where the last whole frame ends.
    end: usize,
}

/// Reads whole frames up to the first that is not; `None` without magic and identity.
fn read_frames(bytes: &[u8]) -> Option<Frames> {
    let mut at = MAGIC.len();
    if bytes.get(..at)? != MAGIC {
        return None;
    }
    let mut next = || {
        let head = bytes.get(at..at + 12)?;
        let length = u32::from_le_bytes(head.get(..4)?.try_into().ok()?) as usize;
        let sum = u64::from_le_bytes(head.get(4..)?.try_into().ok()?);
        let payload = bytes.get(at + 12..(at + 12).checked_add(length)?)?;
        if checksum(payload) != sum {
            return None;
        }
        at += 12 + length;
        Some((payload, at))
    };
    let (identity, mut end) = next()?;
    let identity = String::from_utf8(identity.to_vec()).ok()?;
    let mut answers = HashMap::new();
    while let Some((payload, after)) = next() {
        let Some((key, answer)) = decode(payload) else { break };
        answers.insert(key, answer);
        end = after;
    }
    Some(Frames { identity, answers, end })
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_response(out: &mut Vec<u8>, r: &Response) {
    match r {
        Response::LogLikelihood { log_prob, greedy } => {
            out.push(1);
            out.extend(log_prob.to_bits().to_le_bytes());
            out.push(u8::from(*greedy));
        }
        Response::Rolling { log_prob } => {
            out.push(2);
            out.extend(log_prob.to_bits().to_le_bytes());
        }
        Response::Generated { text } => {
            out.push(3);
            put_text(out, text);
        }
    }
}

fn encode(key: &str, a: &Answer) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + a.drift.len() * (WORDS * 8 + 8 + TOP.len()));
    put_text(&mut out, key);
    put_response(&mut out, &a.response);
    match &a.reference {
        Some(r) => put_response(&mut out, r),
        None => out.push(0),
    }
    out.extend((a.drift.len() as u32).to_le_bytes());
    for (place, d) in &a.drift {
        out.extend(place.to_le_bytes());
        out.extend(d.values().iter().flat_map(|v| v.to_bits().to_le_bytes()));
        out.push(d.same_order);
        out.extend(d.in_common);
    }
    out
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take(&mut self, n: usize) -> Option<&[u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn f64(&mut self) -> Option<f64> {
        self.u64().map(f64::from_bits)
    }

    fn text(&mut self) -> Option<String> {
        let n = self.u32()? as usize;
        String::from_utf8(self.take(n)?.to_vec()).ok()
    }

    /// The outer `None` is a malformed frame, the inner one an absent response.
    fn response(&mut self) -> Option<Option<Response>> {
        Some(match self.byte()? {
            0 => None,
            1 => Some(Response::LogLikelihood { log_prob: self.f64()?, greedy: self.byte()? != 0 }),
            2 => Some(Response::Rolling { log_prob: self.f64()? }),
            3 => Some(Response::Generated { text: self.text()? }),
            _ => return None,
        })
    }
}

fn decode(payload: &[u8]) -> Option<(String, Answer)> {
    let mut r = Reader(payload);
    let key = r.text()?;
    let response = r.response()??;
    let reference = r.response()?;
    let rows = r.u32()? as usize;
    let mut drift = Vec::new();
    for _ in 0..rows {
        let place = r.u64()?;
        let mut values = [0.0; WORDS];
        for v in &mut values {
            *v = r.f64()?;
        }
        let same_order = r.byte()?;
        let in_common = r.take(TOP.len())?.try_into().ok()?;
        drift.push((place, RowDrift::from_values(values, same_order, in_common)));
    }
    r.0.is_empty().then_some((key, Answer { response, reference, drift }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(x: f64) -> Answer {
        let drift = RowDrift::from_values([x, 1.0, 2.0, 3.0, 4.0, 0.5, -0.0, f64::MIN_POSITIVE], 7, [1, 2, 3, 4, 5, 9]);
        Answer {
            response: Response::LogLikelihood { log_prob: x, greedy: true },
            reference: Some(Response::Generated { text: "é\n".into() }),
            drift: vec![(u64::MAX - 1, drift)],
        }
    }

    #[test]
    fn a_torn_tail_loses_one_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let mut j = Journal::open(&path, "run").unwrap();
        assert_eq!(j.found, Found::New);
        for i in 0..5 {
            j.put(&format!("k{i}"), &answer(f64::from(i) / 3.0)).unwrap();
        }
        drop(j);
        let whole = std::fs::read(&path).unwrap();
        let one = frame(&encode("k4", &answer(4.0 / 3.0))).len();
        for cut in [1, one / 2, one - 1] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let mut j = Journal::open(&path, "run").unwrap();
            assert_eq!(j.found, Found::Continued(4));
            assert_eq!(j.get("k3"), Some(answer(1.0)));
            assert_eq!(j.get("k4"), None);
            j.put("k4", &answer(4.0 / 3.0)).unwrap();
            drop(j);
            assert!(std::fs::read(&path).unwrap() == whole, "the file is not what it was");
        }
        // A flipped byte is seen.
        let mut bad = whole.clone();
        let at = bad.len() - one / 2;
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert_eq!(Journal::open(&path, "run").unwrap().found, Found::Continued(4));
    }

    #[test]
    fn another_run_starts_anew_and_a_foreign_file_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        Journal::open(&path, "a").unwrap().put("k", &answer(1.0)).unwrap();
        assert!(read_answers(&path, "b").unwrap().is_none());
        assert_eq!(read_answers(&path, "a").unwrap().unwrap().len(), 1);
        let open = Journal::open(&path, "b").unwrap();
        assert_eq!((open.found, open.len()), (Found::Replaced, 0));
        assert!(Journal::open(&path, "b").is_err(), "two writers");
        drop(open);
        std::fs::write(&path, "{\"a letter\": 1}").unwrap();
        assert!(Journal::open(&path, "b").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"{\"a letter\": 1}");
    }
}
