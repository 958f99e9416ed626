//! What is read from strangers, each as a function of bytes. `fuzz/` calls the same functions.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lowbit_bench::load::http::ResponseParser;
use lowbit_bench::load::import;
use lowbit_bench::load::metrics::Trim;
use lowbit_bench::load::openai;
use lowbit_bench::load::sse::SseParser;
use lowbit_bench::load::table::read_objects;
use lowbit_bench::slo::Slo;
use lowbit_calibration::load_texts;
use lowbit_checkpoint::chat_template::{ChatTemplate, Message};
use lowbit_checkpoint::gguf::GgufModel;
use lowbit_checkpoint::quant_config::QuantConfig;
use lowbit_checkpoint::store::TensorStore;
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::{Checkpoint, config};
use lowbit_eval::encode::Encode;
use lowbit_eval::endpoint::{Api, Remote, RemoteOptions, Reply, Retry, Served, ServerCodec, Transport};
use lowbit_eval::engine::{Answers, BosRule, NoStore, journal};
use lowbit_eval::tasks::{self, ChatOptions, DataOptions, Registry, Request, RequestKind, data};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::CpuBackend;
use lowbit_model::Model;
use lowbit_serve::{Engine, EngineOptions, InMemory, ServerOptions};

use super::{llm_compressor, recipe_table, seeds, tiny};

/// Takes inputs one after the other, in a folder of its own, and says whether they were what they claim to be.
pub type Reader = Box<dyn FnMut(&[u8]) -> bool>;

/// One kind of input.
pub struct Target {
    pub name: &'static str,
    /// For the table.
    pub about: &'static str,
    pub seeds: fn() -> Vec<Vec<u8>>,
    pub open: fn(&Path) -> Reader,
    /// Changed inputs of the default run.
    pub runs: u64,
    /// Memory that may be held: `base + per_byte · input`.
    pub base: usize,
    pub per_byte: usize,
}

const MB: usize = 1 << 20;

pub fn all() -> [Target; 19] {
    let target =
        |name, about, seeds, open, runs, base, per_byte| Target { name, about, seeds, open, runs, base, per_byte };
    [
        target("safetensors", "a weights file, every tensor of it", seeds::safetensors, safetensors, 20_000, MB, 64),
        target("index", "`model.safetensors.index.json`", seeds::index, index, 20_000, MB, 64),
        target("config", "`config.json`, each family", seeds::config, config_json, 200_000, MB, 64),
        target(
            "quantization",
            "`quantization_config`, each dialect",
            seeds::quantization,
            quantization,
            40_000,
            4 * MB,
            256,
        ),
        target("model", "`config.json` over real weights: load, one step", seeds::model, model, 20_000, 256 * MB, 64),
        target("packed", "`config.json` over packed weights: verify", seeds::packed, packed, 20_000, 64 * MB, 64),
        target("tensors", "packed weights: verify, load, one step", seeds::tensors, tensors, 4_000, 256 * MB, 64),
        target("gguf", "a GGUF file: config, tokenizer, every tensor", seeds::gguf, gguf, 40_000, 4 * MB, 64),
        target("tokenizer", "`tokenizer.json`: encode, decode", seeds::tokenizer, tokenizer, 30_000, 16 * MB, 1024),
        target("template", "a chat template, rendered", seeds::template, template, 20_000, 400 * MB, 64),
        target("task", "a task file and its requests", seeds::task, task, 30_000, 400 * MB, 1024),
        target("rows", "JSONL, gzip, JSON, CSV and Parquet by three readers", seeds::rows, rows, 8_000, 64 * MB, 2048),
        target("journal", "a journal of answers", seeds::journal, journal_file, 20_000, MB, 64),
        target("record", "records, and the report from them", seeds::record, record, 10_000, 64 * MB, 256),
        target("import", "results of load tests, ours and others'", seeds::import, imported, 10_000, 64 * MB, 256),
        target("recipe", "a recipe, ours and llm-compressor's", seeds::recipe, recipe, 20_000, 64 * MB, 1024),
        target("response", "a server's answer: HTTP and server-sent events", seeds::response, response, 40_000, MB, 64),
        target("endpoint", "a server's answers to `lowbit eval`", seeds::endpoint, endpoint, 20_000, 4 * MB, 1024),
        target("request", "HTTP requests to `lowbit serve`", seeds::request, request, 20_000, 256 * MB, 4096),
    ]
}

fn safetensors(dir: &Path) -> Reader {
    let dir = dir.to_path_buf();
    Box::new(move |bytes| {
        std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
        let Ok(store) = TensorStore::open(&dir) else { return false };
        for (name, t) in store.iter() {
            let _ = (t.to_f32(), store.vector(name, 3));
        }
        true
    })
}

fn index(dir: &Path) -> Reader {
    let dir = dir.to_path_buf();
    for (file, name) in [("1.safetensors", "a"), ("2.safetensors", "b")] {
        std::fs::write(dir.join(file), seeds::safetensors_of(&[(name, "F32", &[3])])).unwrap();
    }
    Box::new(move |bytes| {
        std::fs::write(dir.join("model.safetensors.index.json"), bytes).unwrap();
        let Ok(store) = TensorStore::open(&dir) else { return false };
        assert!(store.files().iter().all(|f| f.parent() == Some(dir.as_path())), "{:?}", store.files());
        true
    })
}

fn config_json(_: &Path) -> Reader {
    Box::new(|bytes| serde_json::from_slice(bytes).is_ok_and(|v| config::parse(Path::new("config.json"), &v).is_ok()))
}

fn quantization(_: &Path) -> Reader {
    Box::new(|bytes| {
        let Ok(v) = serde_json::from_slice(bytes) else { return false };
        let Ok(q) = QuantConfig::parse(Path::new("config.json"), &v) else { return false };
        for module in ["lm_head", "model.layers.0.self_attn.k_proj", ""] {
            let _ = q.scheme_of(module);
        }
        true
    })
}

fn backend() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new())
}

fn model(dir: &Path) -> Reader {
    tiny::write(dir, true);
    let (dir, backend) = (dir.to_path_buf(), backend());
    Box::new(move |bytes| {
        std::fs::write(dir.join("config.json"), bytes).unwrap();
        Checkpoint::open(&dir).is_ok_and(|ckpt| steps(&ckpt, &backend))
    })
}

/// Whether the model loads and makes a token.
fn steps(ckpt: &Checkpoint, backend: &Arc<dyn Backend>) -> bool {
    let Ok(model) = Model::load(ckpt, backend.clone()) else { return false };
    let options = lowbit_model::GenerateOptions { max_new_tokens: 1, ..Default::default() };
    lowbit_model::generate(&model, &[1, 2], &options, &mut |_| true).is_ok()
}

fn packed(dir: &Path) -> Reader {
    for (name, bytes) in tiny::packed() {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    let dir = dir.to_path_buf();
    Box::new(move |bytes| {
        std::fs::write(dir.join("config.json"), bytes).unwrap();
        Checkpoint::open(&dir).is_ok_and(|ckpt| lowbit_quantize::verify::verify(&ckpt, None, None).is_ok())
    })
}

/// Bytes of a file in which a name of its tensors stands.
const NAMES: usize = 4096;

/// Weights as compressed-tensors or as GPTQ has them, by the names in the file.
fn tensors(dir: &Path) -> Reader {
    let folders = [("words", tiny::packed()), ("gptq", tiny::packed_gptq())].map(|(name, files)| {
        let folder = dir.join(name);
        std::fs::create_dir(&folder).unwrap();
        for (file, bytes) in files {
            std::fs::write(folder.join(file), bytes).unwrap();
        }
        folder
    });
    let backend = backend();
    Box::new(move |bytes| {
        // The names stand before the numbers.
        let names = &bytes[..bytes.len().min(NAMES)];
        let folder = &folders[usize::from(names.windows(7).any(|w| w == b"qweight"))];
        std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
        let Ok(ckpt) = Checkpoint::open(folder) else { return false };
        lowbit_quantize::verify::verify(&ckpt, None, None).is_ok() & steps(&ckpt, &backend)
    })
}

fn gguf(dir: &Path) -> Reader {
    let path = dir.join("model.gguf");
    Box::new(move |bytes| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(mut model) = GgufModel::open(&path) else { return false };
        let whole = model.config_json().is_ok() & model.tokenizer_files().is_ok();
        for (name, _) in model.tensor_names() {
            let _ = model.read_bf16(&name);
        }
        whole
    })
}

fn tokenizer(dir: &Path) -> Reader {
    let dir = dir.to_path_buf();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    Box::new(move |bytes| {
        std::fs::write(dir.join("tokenizer.json"), bytes).unwrap();
        let Ok(t) = Tokenizer::load(&dir) else { return false };
        let Ok(ids) = t.encode("ab  c<s> \u{e9}\n", true) else { return false };
        let _ = (t.decode(&ids, false), t.decode(&[0, u32::MAX], true), t.token_bytes(4), t.vocab_size());
        true
    })
}

fn template(_: &Path) -> Reader {
    let messages =
        [Message::new("user", " Hi there "), Message::new("assistant", "Hello"), Message::new("user", "\u{e9}{{")];
    let sent = serde_json::json!([{"role": "user", "content": "x", "tool_calls": [1]}]);
    let tools = serde_json::json!([{"type": "function", "function": {"name": "f"}}]);
    Box::new(move |bytes| {
        let Ok(source) = std::str::from_utf8(bytes) else { return false };
        let tokens = vec![("bos_token".to_string(), "<s>".to_string())];
        let Ok(t) = ChatTemplate::compile(PathBuf::from("chat_template.jinja"), source, tokens) else { return false };
        let _ = t.render_request(&sent, Some(&tools), &serde_json::Map::new(), false);
        t.render_at(&messages, true, 1_700_000_000).is_ok()
    })
}

fn task(dir: &Path) -> Reader {
    let rows = r#"{"context": "a b", "last": " c", "options": ["c", "d"], "label": 0}"#;
    std::fs::write(dir.join("rows.jsonl"), format!("{rows}\n{rows}\n")).unwrap();
    let (dir, file) = (dir.to_path_buf(), dir.join("task.yaml"));
    Box::new(move |bytes| {
        std::fs::write(&file, bytes).unwrap();
        let mut registry = Registry::default();
        let options = DataOptions { dir: Some(&dir), hub: None };
        let Ok(suite) = registry.load(&[file.display().to_string()], &options) else { return false };
        suite.tasks.iter().all(|t| t.documents(ChatOptions::default(), Some(2)).all(|d| d.is_ok()))
    })
}

fn rows(dir: &Path) -> Reader {
    let dir = dir.to_path_buf();
    Box::new(move |bytes| {
        let Some((kind, rest)) = bytes.split_first() else { return false };
        let end = data::EXTENSIONS[usize::from(*kind) % data::EXTENSIONS.len()];
        let path = dir.join(format!("rows.{end}"));
        std::fs::write(&path, rest).unwrap();
        let read = data::read(std::slice::from_ref(&path)).is_ok()
            | read_objects(&path).is_ok()
            | load_texts(&path, None).is_ok();
        std::fs::remove_file(path).unwrap();
        read
    })
}

fn journal_file(dir: &Path) -> Reader {
    let path = dir.join("j");
    Box::new(move |bytes| {
        std::fs::write(&path, bytes).unwrap();
        journal::read_all(&path).is_ok_and(|found| found.is_some())
    })
}

fn record(dir: &Path) -> Reader {
    let dir = dir.to_path_buf();
    Box::new(move |bytes| {
        let Some((kind, rest)) = bytes.split_first() else { return false };
        let names = ["plan", "quantize", "eval", "gate", "bench", "load", "capacity"];
        let path = dir.join(format!("{}.json", names[usize::from(*kind) % names.len()]));
        std::fs::write(&path, rest).unwrap();
        let page = lowbit_report::load_all(std::slice::from_ref(&dir))
            .map(|all| (lowbit_report::html(&all), lowbit_report::markdown(&all)));
        std::fs::remove_file(path).unwrap();
        page.is_ok_and(|(html, _)| html.is_ok())
    })
}

fn imported(dir: &Path) -> Reader {
    let (path, slo) = (dir.join("load.json"), Slo::parse("ttft_p95<=400").unwrap());
    Box::new(move |bytes| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(mut record) = import::read(&path) else { return false };
        import::restage(&mut record, Some(Trim { warmup: 0.1, cooldown: 0.0 }), Some(&slo)).is_ok()
    })
}

fn recipe(_: &Path) -> Reader {
    let switch = |key: &str| match key {
        "scheme" | "group-size" | "samples" | "damp" | "ignore" => Some(false),
        "asymmetric" | "strict" => Some(true),
        _ => None,
    };
    Box::new(move |bytes| {
        let Some((kind, rest)) = bytes.split_first() else { return false };
        let Ok(text) = std::str::from_utf8(rest) else { return false };
        match kind % 2 {
            0 => recipe_table::read(text, &switch).is_ok(),
            _ => llm_compressor::read(text).is_ok(),
        }
    })
}

fn response(_: &Path) -> Reader {
    /// Body and events when the bytes come in pieces of `step`, as far as they are a response.
    fn read(bytes: &[u8], step: usize) -> (Vec<u8>, Vec<Vec<u8>>, bool) {
        let (mut parser, mut sse, mut body, mut events) =
            (ResponseParser::default(), SseParser::default(), Vec::new(), Vec::new());
        for piece in bytes.chunks(step) {
            if parser.done() {
                break;
            }
            if parser.push(piece, &mut |b| body.extend_from_slice(b)).is_err() {
                return (body, events, false);
            }
        }
        let whole = parser.closed().is_ok();
        sse.push(&body, |e| events.push(e.to_vec()));
        sse.finish(|e| events.push(e.to_vec()));
        (body, events, whole)
    }
    Box::new(|bytes| {
        let Some((step, rest)) = bytes.split_first() else { return false };
        let (a, b) = (read(rest, usize::from(*step).max(1)), read(rest, 1));
        // However an answer is cut into packets, it says the same.
        assert!(!a.2 || !b.2 || a.0 == b.0 && a.1 == b.1, "packets of {step} and of 1 differ");
        for data in a.1.iter().chain([&a.0]) {
            let _ = openai::read(data);
        }
        a.2
    })
}

/// A server that answers one kind of question by the input, and all others well.
struct Answering {
    kind: u8,
    body: Vec<u8>,
}

impl Answering {
    fn reply(&self, kind: u8, well: serde_json::Value) -> Result<Reply, String> {
        let body = if self.kind == kind { self.body.clone() } else { well.to_string().into_bytes() };
        Ok(Reply { status: 200, retry_after: None, body })
    }
}

impl Transport for Answering {
    fn post(&self, path: &str, _: &[u8]) -> Result<Reply, String> {
        match path {
            "/v1/chat/completions" => self.reply(1, seeds::said()),
            "/v1/completions" => self.reply(2, seeds::scored()),
            _ => self.reply(3, seeds::tokenized()),
        }
    }

    fn get(&self, _: &str) -> Result<Reply, String> {
        self.reply(0, seeds::listed())
    }

    fn url(&self) -> String {
        "http://s".into()
    }
}

/// The first byte picks what the input is: a list of models, a text, log-probabilities, tokens.
fn endpoint(dir: &Path) -> Reader {
    tiny::write(dir, false);
    let tokenizer = Tokenizer::load(dir).unwrap();
    let ask = |kind| Request { task: "t".into(), doc: 0, idx: 0, kind };
    let write = ask(RequestKind::Generate {
        context: "x".into(),
        until: vec!["\n".into()],
        max_new_tokens: 4,
        temperature: 0.0,
        do_sample: false,
        messages: vec![tasks::Message::new("user", "x")],
        tools: Vec::new(),
    });
    let score = ask(RequestKind::LogLikelihood { context: "a b".into(), continuation: " c".into() });
    let retry = Retry { retries: 0, patience: Duration::ZERO };
    let options = RemoteOptions {
        api: Api::Chat,
        concurrency: 1,
        retry,
        bos: BosRule::Tokenizer,
        max_length: None,
        seed: 0,
        extra: serde_json::Map::new(),
    };
    Box::new(move |bytes| {
        let Some((kind, rest)) = bytes.split_first() else { return false };
        let server = Answering { kind: kind % 4, body: rest.to_vec() };
        let Ok(served) = Served::find(&server, None) else { return false };
        if server.kind == 3 {
            let codec = ServerCodec::find(&server, &served.name, retry);
            return codec.is_ok_and(|c| c.is_some_and(|c| c.encode("x", true).is_ok()));
        }
        let request = if server.kind == 1 { &write } else { &score };
        let remote = Remote::new(&server, served, Some(&tokenizer), options.clone());
        remote.answer(std::slice::from_ref(request), &mut NoStore, &mut |_, _| ()).is_ok()
    })
}

fn request(dir: &Path) -> Reader {
    tiny::write(dir, false);
    let model = Model::load(&Checkpoint::open(dir).unwrap(), backend()).unwrap();
    let vocab = model.config().vocab_size;
    let models =
        lowbit_serve::engine::Models { model, draft: None, tokenizer: Arc::new(Tokenizer::load(dir).unwrap()) };
    let options = EngineOptions { max_concurrent: 4, kv_tokens: 1024, max_len: 48, ..Default::default() };
    let (engine, _) = Engine::start(models, options).unwrap();
    let options = ServerOptions {
        address: ([127, 0, 0, 1], 0).into(),
        name: "demo".into(),
        api_key: None,
        max_body_bytes: 1 << 18,
        read_timeout: Duration::from_secs(1),
        max_connections: 8,
        default_max_tokens: 4,
        drain: Duration::from_secs(1),
    };
    let server = InMemory::new(options, engine, ChatTemplate::load(dir).unwrap(), vocab).unwrap();
    Box::new(move |bytes| {
        let Some((kind, rest)) = bytes.split_first() else { return false };
        let post = |path: &str| {
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                rest.len()
            );
            [head.as_bytes(), rest].concat()
        };
        let answer = server.answer(&match kind % 3 {
            0 => post("/v1/chat/completions"),
            1 => post("/v1/completions"),
            _ => rest.to_vec(),
        });
        // A request that went wrong is the client's fault, never ours.
        assert!(!answer.starts_with(b"HTTP/1.1 500"), "{}", String::from_utf8_lossy(&answer));
        answer.starts_with(b"HTTP/1.1 200")
    })
}
