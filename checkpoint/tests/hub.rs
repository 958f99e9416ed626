//! The hub client against a stand-in on 127.0.0.1 that answers as the hub does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::hub::{HubOptions, HubProgress, resolve, resolve_chosen, resolve_dataset};

const MAIN: &str = "1111111111111111111111111111111111111111";
const OLD: &str = "2222222222222222222222222222222222222222";
const MAX_REQUESTS: usize = 100;
/// How long the silent hub is borne.
const SILENCE: Duration = Duration::from_millis(400);

/// What a GET of a file's body does.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The first body breaks off in its middle.
    TruncateOnce,
    /// Each body breaks off after some bytes.
    Truncate,
    /// The body is whole in length, with a wrong byte.
    Corrupt,
    /// More is announced than there is.
    WrongLength,
    /// A few bytes of a file come, and then nothing, with the connection open.
    Silent,
    /// Connections are taken and nothing is said.
    Mute,
}

#[derive(Clone)]
struct Site {
    revisions: BTreeMap<String, &'static str>,
    files: BTreeMap<(String, &'static str), BTreeMap<String, Vec<u8>>>,
    fault: Fault,
    token: Option<&'static str>,
    /// So many requests are answered by this status, before all others.
    refusals: (usize, u16),
}

struct Hub {
    address: String,
    stop: Arc<AtomicBool>,
    log: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    fn start(site: Site) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, written) = (stop.clone(), log.clone());
        let thread = std::thread::spawn(move || {
            let mut site = site;
            for _ in 0..MAX_REQUESTS {
                let Ok((stream, _)) = listener.accept() else { return };
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let _ = answer(stream, &mut site, &written);
            }
        });
        Self { address, stop, log, thread: Some(thread) }
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: format!("http://{}", self.address),
            token: Some("hf_secret".into()),
            offline: false,
            cache_dir: cache.to_path_buf(),
            silence: Duration::from_secs(20),
        }
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One request per connection.
fn answer(mut stream: TcpStream, site: &mut Site, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or("").trim_start_matches('/').to_string();
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(':') else { break };
        match key.to_ascii_lowercase().as_str() {
            "range" => range = value.trim().strip_prefix("bytes=").map(str::to_string),
            "authorization" => token = Some(value.trim().to_string()),
            _ => {}
        }
    }
    if site.fault == Fault::Mute {
        std::thread::sleep(SILENCE * 5);
        return Ok(());
    }
    log.lock().unwrap().push(format!("{path} {} {}", range.as_deref().unwrap_or("-"), token.as_deref().unwrap_or("-")));
    let refuse = |mut stream: TcpStream, code: u16| {
        write!(stream, "HTTP/1.1 {code} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    if site.refusals.0 > 0 {
        site.refusals.0 -= 1;
        return refuse(stream, site.refusals.1);
    }
    if site.token.is_some_and(|wanted| token.as_deref() != Some(&format!("Bearer {wanted}"))) {
        return refuse(stream, 401);
    }
    if let Some(name) = path.strip_prefix("api/") {
        let Some(sha) = site.revisions.get(name) else { return refuse(stream, 404) };
        let id = name.split_once('/').unwrap().1.split_once("/revision/").unwrap().0;
        let names: Vec<_> =
            site.files[&(id.to_string(), *sha)].keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": sha, "siblings": names }).to_string();
        let length = body.len();
        let kind = "Content-Type: application/json";
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
    }
    let (id, rest) = path.split_once("/resolve/").unwrap_or(("", ""));
    let (commit, file) = rest.split_once('/').unwrap_or(("", ""));
    let id = id.trim_start_matches("datasets/");
    let found =
        site.files.iter().find(|(key, _)| key.0 == id && key.1 == commit).and_then(|(_, files)| files.get(file));
    let Some(content) = found else { return refuse(stream, 404) };
    let (from, to) = range.as_deref().and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap_or(0);
    let to = to.parse::<usize>().map_or(content.len(), |to| (to + 1).min(content.len()));
    if from >= content.len() {
        return refuse(stream, 416);
    }
    let mut body = content[from..to].to_vec();
    let announced = body.len();
    if body.len() > 1 {
        match site.fault {
            Fault::None | Fault::WrongLength | Fault::Mute => {}
            Fault::TruncateOnce | Fault::Truncate | Fault::Silent => body.truncate((announced / 2).min(3)),
            Fault::Corrupt => body[0] ^= 1,
        }
        if site.fault == Fault::TruncateOnce {
            site.fault = Fault::None;
        }
    }
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nX-Repo-Commit: {commit}\r\nETag: \"weak\"\r\nX-Linked-ETag: \"{}\"\r\n\
         Accept-Ranges: bytes\r\nContent-Range: bytes {from}-{}/{}\r\nContent-Length: {announced}\r\n\
         Connection: close\r\n\r\n",
        sha256_hex(content),
        to - 1,
        content.len() + if site.fault == Fault::WrongLength { 7 } else { 0 }
    )?;
    stream.write_all(&body)?;
    if site.fault == Fault::Silent && announced > 1 {
        std::thread::sleep(SILENCE * 5);
    }
    Ok(())
}

fn files(entries: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
    entries.iter().map(|(name, text)| (name.to_string(), text.as_bytes().to_vec())).collect()
}

fn site(fault: Fault) -> Site {
    let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    let sharded = [
        ("config.json", r#"{"model_type":"llama"}"#),
        ("tokenizer.json", "{ }"),
        ("generation_config.json", "{  }"),
        ("chat_template.jinja", "{{ x }}"),
        ("LICENSE", "free"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", "first shard of the weights"),
        ("model-2.safetensors", "second shard of the weights"),
        ("consolidated.safetensors", "all of it again"),
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model.bin.index.json", "{}"),
        ("model.gguf", "gguf"),
        ("onnx/model.onnx", "onnx"),
    ];
    let single = [("config.json", r#"{"old":true}"#), ("model.safetensors", "all the old weights")];
    let data = [("README.md", "x"), ("a/train.jsonl", "{\"text\":1}\n"), ("a/x.csv", "1"), ("b/test.txt", "text")];
    let revision = |id: &str, rev: &str| format!("{id}/revision/{rev}");
    Site {
        revisions: BTreeMap::from([
            (revision("models/org/name", "main"), MAIN),
            (revision("models/org/name", "v1"), OLD),
            (revision("models/org/name", OLD), OLD),
            (revision("models/org/bare", "main"), MAIN),
            (revision("models/org/evil", "main"), MAIN),
            (revision("datasets/org/data", "main"), MAIN),
        ]),
        files: BTreeMap::from([
            (("org/name".to_string(), MAIN), files(&sharded)),
            (("org/name".to_string(), OLD), files(&single)),
            (("org/bare".to_string(), MAIN), files(&[("config.json", "{}"), ("pytorch_model.bin", "pickle")])),
            (("org/evil".to_string(), MAIN), files(&[("config.json", "{}"), ("../../../out.json", "{}")])),
            (("org/data".to_string(), MAIN), files(&data)),
        ]),
        fault,
        token: None,
        refusals: (0, 0),
    }
}

#[derive(Default)]
struct Count {
    announced: AtomicU64,
    seen: AtomicU64,
    started: AtomicU64,
    finished: AtomicU64,
}

impl HubProgress for Count {
    fn start(&self, _: &str, bytes: u64) {
        self.announced.fetch_add(bytes, Ordering::SeqCst);
        self.started.fetch_add(1, Ordering::SeqCst);
    }
    fn advance(&self, bytes: u64) {
        self.seen.fetch_add(bytes, Ordering::SeqCst);
    }
    fn finish(&self) {
        self.finished.fetch_add(1, Ordering::SeqCst);
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn problem_and_hint(error: &CheckpointError) -> String {
    format!("{error} | {}", error.hint().unwrap_or_default())
}

#[test]
fn downloads_what_a_model_needs_then_works_without_the_hub() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(Site { token: Some("hf_secret"), ..site(Fault::None) });
    let mut options = hub.options(cache.path());
    let count = Count::default();
    let dir = resolve("org/name", &options, &count).unwrap();
    let expected = "LICENSE chat_template.jinja config.json generation_config.json model-1.safetensors \
                    model-2.safetensors model.safetensors.index.json tokenizer.json";
    let expected: Vec<&str> = expected.split(' ').collect();
    assert_eq!(names(&dir), expected);
    assert_eq!(dir, cache.path().join("models--org--name/snapshots").join(MAIN));
    assert_eq!(std::fs::read_to_string(dir.join("model-2.safetensors")).unwrap(), "second shard of the weights");
    let total: u64 = expected.iter().map(|name| dir.join(name).metadata().unwrap().len()).sum();
    let loaded = |n: &AtomicU64| n.load(Ordering::SeqCst);
    assert_eq!((loaded(&count.announced), loaded(&count.seen)), (total, total));
    assert_eq!((loaded(&count.started), loaded(&count.finished)), (8, 8));
    assert!(hub.log().iter().all(|line| line.ends_with("Bearer hf_secret")), "{:?}", hub.log());
    // A second run asks what `main` is and fetches nothing.
    let before = hub.log().len();
    assert_eq!(resolve("org/name", &options, &()).unwrap(), dir);
    assert_eq!(hub.log().len(), before + 1);
    drop(hub);
    let gone = problem_and_hint(&resolve("org/name", &options, &()).unwrap_err());
    assert!(gone.contains("cannot fetch") && gone.contains("HF_HUB_OFFLINE"), "{gone}");
    options.offline = true;
    assert_eq!(resolve("org/name", &options, &()).unwrap(), dir);
    assert_eq!(resolve(&format!("org/name@{MAIN}"), &options, &()).unwrap(), dir);
    let other = problem_and_hint(&resolve("org/other", &options, &()).unwrap_err());
    assert!(other.contains("offline") && other.contains("HF_HUB_OFFLINE"), "{other}");
    std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    let partial = resolve("org/name", &options, &()).unwrap_err().to_string();
    assert!(partial.contains("model-2.safetensors is not in the cache"), "{partial}");
}

#[test]
fn a_revision_pins_the_commit() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::None));
    let options = hub.options(cache.path());
    let tag = resolve("org/name@v1", &options, &()).unwrap();
    assert!(tag.ends_with(OLD) && std::fs::read_to_string(tag.join("config.json")).unwrap() == r#"{"old":true}"#);
    assert_eq!(resolve(&format!("org/name@{OLD}"), &options, &()).unwrap(), tag);
    assert!(hub.log().iter().filter(|line| line.contains("/resolve/")).all(|line| line.contains(OLD)));
    let unknown = problem_and_hint(&resolve("org/name@v9", &options, &()).unwrap_err());
    assert!(unknown.contains("unknown revision `v9`") && unknown.contains("tag"), "{unknown}");
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::None));
    let options = hub.options(cache.path());
    let missing = problem_and_hint(&resolve("org/nothing", &options, &()).unwrap_err());
    assert!(
        missing.contains("org/nothing") && missing.contains("HTTP 404") && missing.contains("spelling"),
        "{missing}"
    );
    let bare = problem_and_hint(&resolve("org/bare", &options, &()).unwrap_err());
    assert!(bare.contains("no safetensors"), "{bare}");
    let evil = resolve("org/evil", &options, &()).unwrap_err().to_string();
    assert!(evil.contains("impossible"), "{evil}");
    let log = hub.log().len();
    for spec in ["", "../x", "org/../x", "org/name/x", "org/name@../../x", "org//name", "a b/c", "/etc"] {
        assert!(resolve(spec, &options, &()).is_err(), "{spec}");
    }
    assert_eq!(hub.log().len(), log, "an impossible name was sent to the hub");
    let gated = Hub::start(Site { token: Some("other"), ..site(Fault::None) });
    let with = problem_and_hint(&resolve("org/name", &gated.options(cache.path()), &()).unwrap_err());
    assert!(with.contains("HTTP 401") && with.contains("HF_TOKEN") && !with.contains("hf_secret"), "{with}");
    let anonymous = HubOptions { token: None, ..gated.options(cache.path()) };
    let without = problem_and_hint(&resolve("org/name", &anonymous, &()).unwrap_err());
    assert!(without.contains("without a token") && without.contains("HF_TOKEN"), "{without}");
    assert!(!format!("{:?}", gated.options(cache.path())).contains("hf_secret"));
}

#[test]
fn a_body_that_breaks_off_is_taken_up_again_or_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::TruncateOnce));
    let dir = resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("config.json")).unwrap(), r#"{"old":true}"#);
    assert!(hub.log().iter().any(|line| line.contains("config.json 3- ")), "{:?}", hub.log());
    for (fault, text) in [(Fault::Truncate, "config.json"), (Fault::Corrupt, "SHA-256")] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::start(site(fault));
        let error = problem_and_hint(&resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap_err());
        assert!(error.contains(text) && error.contains("run it again"), "{error}");
        let root = cache.path().join("models--org--name");
        assert!(!root.join("snapshots").join(OLD).join("config.json").exists());
        assert!(!root.join("refs/v1").exists());
        let blobs = names(&root.join("blobs"));
        assert!(blobs.iter().all(|name| name.ends_with(".part") || name.ends_with(".lock")), "{blobs:?}");
    }
}

#[test]
fn a_busy_hub_is_asked_again_and_a_lying_one_is_found_out() {
    for (times, code) in [(1, 500), (2, 503), (1, 429), (1, 408)] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::start(Site { refusals: (times, code), ..site(Fault::None) });
        let dir = resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap();
        assert!(dir.join("model.safetensors").exists(), "{times} times {code}");
    }
    for (code, text) in [(429, "too many requests (HTTP 429)"), (500, "HTTP 500"), (410, "HTTP 410")] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::start(Site { refusals: (99, code), ..site(Fault::None) });
        let error = problem_and_hint(&resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap_err());
        assert!(error.contains(text), "{error}");
        assert_eq!(hub.log().len(), if code == 410 { 1 } else { 3 }, "{code}: {:?}", hub.log());
        assert!(names(cache.path()).is_empty(), "{code}: something was kept");
    }
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::WrongLength));
    let error = problem_and_hint(&resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap_err());
    assert!(error.contains("config.json") && error.contains("run it again"), "{error}");
    let snapshot = cache.path().join("models--org--name/snapshots").join(OLD).join("config.json");
    assert!(!snapshot.exists(), "a file of the wrong length was taken for whole");
}

#[test]
fn a_hub_that_falls_silent_is_an_error_and_what_came_is_kept() {
    for fault in [Fault::Silent, Fault::Mute] {
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::start(site(fault));
        let start = std::time::Instant::now();
        let options = HubOptions { silence: SILENCE, ..hub.options(cache.path()) };
        let error = problem_and_hint(&resolve("org/name@v1", &options, &()).unwrap_err());
        assert!(error.contains("said nothing for 0.4 s") && error.contains("run it again"), "{error}");
        assert!(start.elapsed() < SILENCE * 4, "{:?}", start.elapsed());
        drop(hub);
        // The half that came is taken up by a range; one of the transfer left behind may still hold the lock for a moment.
        let hub = Hub::start(site(Fault::None));
        let dir = resolve("org/name@v1", &hub.options(cache.path()), &()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("config.json")).unwrap(), r#"{"old":true}"#);
        let resumed = hub.log().iter().any(|line| line.contains("config.json 3- "));
        assert_eq!(resumed, fault == Fault::Silent, "{:?}", hub.log());
    }
}

#[test]
fn files_are_chosen_by_names_and_card() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::None));
    let mut options = hub.options(cache.path());
    let csv = |names: &[String], card: Option<&str>| -> Vec<String> {
        assert_eq!(card, Some("x"));
        names.iter().filter(|n| n.ends_with(".csv")).cloned().chain(["../secret".to_string()]).collect()
    };
    let found = resolve_chosen("org/data", &options, &(), &csv).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].ends_with("a/x.csv") && std::fs::read_to_string(&found[0]).unwrap() == "1");
    assert!(!found[0].with_file_name("train.jsonl").exists(), "what was not chosen was fetched");
    assert!(resolve_chosen("org/data@refs/convert/parquet", &options, &(), &csv).is_err());
    assert!(hub.log().iter().any(|l| l.contains("refs%2Fconvert%2Fparquet")), "{:?}", hub.log());
    drop(hub);
    options.offline = true;
    assert_eq!(resolve_chosen("org/data", &options, &(), &csv).unwrap(), found);
}

#[test]
fn data_sets_come_by_folder_or_file() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::start(site(Fault::None));
    let mut options = hub.options(cache.path());
    let part = resolve_dataset("datasets/org/data/a", &options, &()).unwrap();
    assert_eq!(names(&part), ["train.jsonl"]);
    let all = resolve_dataset("org/data", &options, &()).unwrap();
    assert_eq!((names(&all), names(&all.join("b"))), (vec!["a".into(), "b".into()], vec!["test.txt".into()]));
    assert!(all.starts_with(cache.path().join("datasets--org--data")));
    assert!(resolve_dataset("org/data/none", &options, &()).is_err());
    drop(hub);
    options.offline = true;
    assert!(resolve_dataset("datasets/org/data/b/test.txt", &options, &()).unwrap().is_file());
}
