//! Data sets of a hub as rows of tasks, against a stand-in on 127.0.0.1.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lowbit_checkpoint::hash::sha256_hex;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use serde_json::{Value, json};

use super::{lowbit, ok, stderr};

/// Revision, as in addresses, with the commit it is.
const REVISIONS: [(&str, &str); 2] = [
    ("main", "1111111111111111111111111111111111111111"),
    ("refs%2Fconvert%2Fparquet", "2222222222222222222222222222222222222222"),
];

/// Revision, name, content.
type File = (&'static str, &'static str, Vec<u8>);

/// What the stand-in was asked for, and the file of which it sends half, once.
#[derive(Default)]
struct Watch {
    /// Name and first byte.
    asked: Mutex<Vec<(&'static str, usize)>>,
    half_of: Mutex<Option<&'static str>>,
    /// What every request is answered by, in place of all else.
    refuses: Option<u16>,
}

/// Serves the data set `org/quiz`; returns the address.
fn serve(files: Vec<File>, watch: Arc<Watch>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream, &files, &watch);
        }
    });
    address
}

fn answer(mut stream: TcpStream, files: &[File], watch: &Watch) -> std::io::Result<()> {
    let head: Vec<String> =
        BufReader::new(stream.try_clone()?).lines().map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
    let path = head.first().and_then(|l| l.split(' ').nth(1)).unwrap_or_default().to_owned();
    if let Some(code) = watch.refuses {
        return write!(stream, "HTTP/1.1 {code} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let named = |name: &str| REVISIONS.iter().find(|r| r.0 == name).map(|r| r.1);
    if let Some(sha) = path.strip_prefix("/api/datasets/org/quiz/revision/").and_then(named) {
        let list: Vec<Value> =
            files.iter().filter(|f| named(f.0) == Some(sha)).map(|f| json!({"rfilename": f.1})).collect();
        let body = json!({"sha": sha, "siblings": list}).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let of = path.strip_prefix("/datasets/org/quiz/resolve/").and_then(|p| p.split_once('/'));
    let found = of.and_then(|(sha, name)| Some((sha, files.iter().find(|f| named(f.0) == Some(sha) && f.1 == name)?)));
    let Some((sha, (_, name, content))) = found else {
        return write!(stream, "HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let range = head.iter().filter_map(|l| l.split_once(": ")).find(|h| h.0.eq_ignore_ascii_case("range"));
    let (from, to) = range.and_then(|h| h.1.strip_prefix("bytes=")?.split_once('-')).unwrap_or(("0", ""));
    let from = from.parse::<usize>().unwrap_or(0).min(content.len());
    let to = to.parse().map_or(content.len(), |to: usize| (to + 1).min(content.len()));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nX-Repo-Commit: {sha}\r\nETag: \"{}\"\r\nAccept-Ranges: bytes\r\n\
         Content-Range: bytes {from}-{}/{}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        sha256_hex(content),
        to - 1,
        content.len(),
        to - from
    )?;
    let body = &content[from..to];
    watch.asked.lock().unwrap().push((*name, from));
    // One byte is what the client asks for to learn of the size.
    if body.len() > 1 && watch.half_of.lock().unwrap().take_if(|half| half == name).is_some() {
        stream.write_all(&body[..body.len() / 2])?;
        // Until the other end is gone.
        return stream.read(&mut [0]).map(|_| ());
    }
    stream.write_all(body)
}

/// `eval --render` of a task of the data set's configuration `name`, with the hub at `url` and its cache in `dir`.
fn render(dir: &Path, url: &str, name: &str) -> Command {
    let file = dir.join(format!("{name}.yaml"));
    let yaml = format!(
        "task: {name}\ndataset_path: org/quiz\ndataset_name: {name}\ntest_split: test\ndoc_to_text: question\ndoc_to_target: answer\n"
    );
    std::fs::write(&file, yaml).unwrap();
    let mut c = lowbit(dir);
    for unset in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"] {
        c.env_remove(unset);
    }
    c.env("HF_ENDPOINT", url).env("HF_HOME", dir.join("hf")).env("NO_PROXY", "127.0.0.1");
    c.args(["--quiet", "eval", "--render", "--tasks"]).arg(&file);
    c
}

/// The first rendered context, and how many there are.
fn contexts(out: &Output) -> (String, usize) {
    let text = String::from_utf8_lossy(&out.stdout);
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    (lines[0]["context"].as_str().unwrap().to_owned(), lines.len())
}

/// A Parquet file of two columns of text.
fn table(question: &str, answer: &str) -> Vec<u8> {
    let schema = "message m { REQUIRED BYTE_ARRAY question (UTF8); REQUIRED BYTE_ARRAY answer (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for text in [question, answer] {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[ByteArray::from(text)], None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn tasks_read_data_sets_by_card_by_name_and_from_the_hubs_own_parquet() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let card = "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: test\n    path: e/*.csv\n---\n# Quiz\n";
    let (main, copy) = (REVISIONS[0].0, REVISIONS[1].0);
    let files: Vec<File> = vec![
        (main, "README.md", card.into()),
        (main, "e/rows.csv", "question,answer\nby card,1\n".into()),
        (main, "other/test.jsonl", "{\"question\": \"by name\", \"answer\": \"2\"}\n".into()),
        (main, "script.py", "no data".into()),
        (copy, "hard/test/0000.parquet", table("by copy", "3")),
        (copy, "hard/train/0000.parquet", table("not this", "0")),
    ];
    let url = serve(files, Arc::default());
    for (name, context) in [("easy", "by card"), ("hard", "by copy"), ("default", "by name"), ("absent", "by name")] {
        assert_eq!(contexts(&ok(&mut render(dir, &url, name))), (context.to_owned(), 1), "{name}");
    }
    let offline = ok(render(dir, &url, "easy").env("HF_HUB_OFFLINE", "1"));
    assert_eq!(contexts(&offline).0, "by card");
}

#[test]
fn a_download_that_was_killed_goes_on_where_it_was() {
    const ROWS: &str = "other/test.jsonl";
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let rows: String = (0..20_000).map(|i| format!("{{\"question\": \"q{i}\", \"answer\": \"{i}\"}}\n")).collect();
    let least = rows.len() as u64 / 4;
    let watch = Arc::new(Watch { half_of: Mutex::new(Some(ROWS)), ..Watch::default() });
    let url = serve(vec![(REVISIONS[0].0, ROWS, rows.into_bytes())], watch.clone());
    let blobs = dir.join("hf/hub/datasets--org--quiz/blobs");
    let came = || {
        let parts = super::names(&blobs).into_iter().filter(|n| n.ends_with(".part"));
        parts.map(|n| std::fs::metadata(blobs.join(n)).map_or(0, |m| m.len())).sum::<u64>()
    };
    let mut child = render(dir, &url, "rows").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while came() < least {
        assert!(start.elapsed() < Duration::from_secs(120), "{} of {least} bytes came", came());
        assert!(child.try_wait().unwrap().is_none(), "ended before it was killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(super::names(&blobs).iter().filter(|n| !n.ends_with(".lock")).count(), 1, "{:?}", super::names(&blobs));
    let kept = usize::try_from(came()).unwrap();
    let done = ok(render(dir, &url, "rows").args(["--limit", "3"]));
    assert_eq!(contexts(&done), ("q0".to_owned(), 3));
    let asked = watch.asked.lock().unwrap().clone();
    assert!(asked.contains(&(ROWS, kept)), "not from byte {kept} on: {asked:?}");
    assert_eq!(came(), 0);
}

#[test]
fn a_hub_that_refuses_is_an_error_and_leaves_nothing() {
    for (code, text, hint) in [
        (429, "too many requests (HTTP 429)", "wait some minutes, or set HF_TOKEN"),
        (500, "the hub answered HTTP 500", "try again later"),
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let url = serve(Vec::new(), Arc::new(Watch { refuses: Some(code), ..Watch::default() }));
        let out = render(tmp.path(), &url, "rows").output().unwrap();
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{said}");
        assert!(said.starts_with("error: ") && said.contains(text), "{said}");
        assert!(said.contains(&format!("hint: {hint}; or give --data")), "{said}");
        assert!(out.stdout.is_empty() && !tmp.path().join("hf/hub/datasets--org--quiz").exists());
    }
}
