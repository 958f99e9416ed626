//! `lowbit serve` from outside: a raw HTTP client against the demo model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{demo, lowbit, ok};

/// A server, killed when dropped.
pub(super) struct Serving {
    child: Child,
    pub(super) port: u16,
    _cache: tempfile::TempDir,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn start(args: &[&str], env: &[(&str, &str)]) -> Serving {
    start_model(&demo(), args, env)
}

pub(super) fn start_model(model: &Path, args: &[&str], env: &[(&str, &str)]) -> Serving {
    let cache = tempfile::tempdir().unwrap();
    let mut c = lowbit(cache.path());
    c.args(["--quiet", "--device", "cpu", "--json", "serve"]).arg(model).args(["--port", "0", "--served-name", "demo"]);
    c.args(args).envs(env.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = c.spawn().unwrap();
    let mut text = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    while out.read_line(&mut text).unwrap() > 0 && serde_json::from_str::<Value>(&text).is_err() {}
    let hello: Value = serde_json::from_str(&text).unwrap();
    Serving { child, port: hello["port"].as_u64().unwrap().try_into().unwrap(), _cache: cache }
}

/// A reply.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    head: String,
    pub(super) body: String,
}

impl Reply {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// A header's value, in lower case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The chunks of a stream, which must end in `[DONE]`.
    pub(super) fn events(&self) -> Vec<Value> {
        let lines: Vec<&str> = self.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
        let (done, chunks) = lines.split_last().unwrap();
        assert_eq!(*done, "[DONE]", "{self:?}");
        chunks.iter().map(|c| serde_json::from_str(c).unwrap()).collect()
    }
}

impl Serving {
    /// Resident memory in bytes.
    pub(super) fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    pub(super) fn connect(&self) -> TcpStream {
        let s = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        s.set_write_timeout(Some(Duration::from_secs(120))).unwrap();
        s
    }

    pub(super) fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut s = self.connect();
        let n = body.len();
        write!(s, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {n}\r\n\r\n")
            .unwrap();
        // A server that refuses early may have closed already.
        let _ = s.write_all(body);
        s
    }

    pub(super) fn raw(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        let mut bytes = Vec::new();
        let _ = self.send(method, path, headers, body).read_to_end(&mut bytes);
        reply(&bytes)
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Reply {
        self.raw("POST", path, "Content-Type: application/json\r\n", body.to_string().as_bytes())
    }

    pub(super) fn complete(&self, body: Value) -> Value {
        let r = self.post("/v1/completions", &body);
        assert_eq!(r.status, 200, "{r:?}");
        r.json()
    }

    pub(super) fn metric(&self, name: &str) -> f64 {
        let text = self.raw("GET", "/metrics", "", b"").body;
        let line = text.lines().find(|l| l.starts_with(name) && l[name.len()..].starts_with('{'));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Of all the labels of a name.
    fn sum(&self, name: &str) -> f64 {
        let text = self.raw("GET", "/metrics", "", b"").body;
        let lines = text.lines().filter(|l| l.starts_with(name) && l[name.len()..].starts_with('{'));
        lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub(super) fn wait_for(&self, name: &str, want: f64) {
        let start = Instant::now();
        while self.metric(name) != want {
            assert!(start.elapsed() < Duration::from_secs(60), "{name} is {}, not {want}", self.metric(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Reads a stream up to its first event. Its head alone says only that the request was accepted.
fn hear(stream: &mut TcpStream) {
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(b"data: ") {
        stream.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
}

/// A whole response.
pub(super) fn reply(bytes: &[u8]) -> Reply {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let body =
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunk(body) } else { body.into() };
    Reply { status, head: head.to_ascii_lowercase(), body }
}

fn unchunk(mut text: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let n = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&rest[..n]);
        text = rest[n..].strip_prefix("\r\n").unwrap_or("");
    }
    out
}

pub(super) fn prompt(i: usize) -> String {
    format!("The {i} small boats on the river were waiting for")
}

#[test]
fn completions_stream_stop_echo_and_count() {
    let s = start(&[], &[]);
    let base = json!({"prompt": prompt(1), "max_tokens": 24, "temperature": 0, "ignore_eos": true});
    let with = |more: Value| {
        let mut v = base.clone();
        v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        v
    };
    let whole = s.complete(base.clone());
    let text = whole["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 24);

    let cache = tempfile::tempdir().unwrap();
    let out = ok(lowbit(cache.path()).args(["--quiet", "--device", "cpu", "generate"]).arg(demo()).args([
        "-n",
        "8",
        "-p",
        &prompt(1),
    ]));
    let alone = String::from_utf8(out.stdout).unwrap();
    assert!(text.starts_with(alone.trim_end_matches('\n')), "{text:?} {alone:?}");

    let streamed = s.post("/v1/completions", &with(json!({"stream": true, "stream_options": {"include_usage": true}})));
    let events = streamed.events();
    let joined: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(joined, text);
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 24);
    assert!(events.len() > 10, "text comes as it is made: {}", events.len());

    // A stop string that lies across tokens: the text ends before it.
    let middle: String = text.chars().skip(9).take(5).collect();
    let stopped = s.complete(with(json!({"stop": [middle.clone()]})));
    let cut = &text[..text.find(&middle).unwrap()];
    assert_eq!(
        (stopped["choices"][0]["text"].as_str().unwrap(), &stopped["choices"][0]["finish_reason"]),
        (cut, &json!("stop"))
    );

    // As lm-eval asks: tokens in, log-probabilities of the prompt out.
    let ids = s.post("/tokenize", &json!({"prompt": prompt(1)})).json()["tokens"].clone();
    let n = ids.as_array().unwrap().len();
    let scored = s.complete(json!({"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true}));
    let logs = &scored["choices"][0]["logprobs"];
    let values = logs["token_logprobs"].as_array().unwrap();
    assert_eq!((values.len(), &values[0]), (n + 1, &Value::Null));
    assert!(values[1..].iter().all(|v| v.as_f64().unwrap() < 0.0));
    let top = logs["top_logprobs"][n].as_object().unwrap();
    assert_eq!(top.values().next().unwrap(), &values[n], "greedy takes the most likely token");

    // Counted under vLLM's names: so far 24 + 24 tokens, those before the stop, and one.
    assert_eq!(s.metric("vllm:request_generation_tokens_count"), 4.0);
    let made = s.metric("vllm:request_generation_tokens_sum");
    assert_eq!(made, s.metric("vllm:generation_tokens_total"));
    assert_eq!(s.metric("vllm:request_prompt_tokens_sum"), 4.0 * n as f64);
    assert_eq!(s.metric("vllm:request_params_max_tokens_sum"), 73.0);
    assert_eq!(s.metric("vllm:request_params_n_sum"), 4.0);
    let spans = ["prefill", "decode", "queue"].map(|p| s.metric(&format!("vllm:request_{p}_time_seconds_sum")));
    let whole = s.metric("vllm:e2e_request_latency_seconds_sum");
    assert!(spans.iter().all(|t| *t > 0.0) && spans.iter().sum::<f64>() <= whole, "{spans:?} of {whole}");
    assert_eq!(s.metric("vllm:cache_config_info"), 1.0);

    let several =
        s.complete(json!({"prompt": [prompt(1), prompt(2)], "n": 2, "max_tokens": 6, "temperature": 1, "seed": 5}));
    let texts: Vec<&str> = several["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4);
    assert_ne!(texts[0], texts[1], "answers of one prompt have seeds of their own");
    let alone = s.complete(json!({"prompt": prompt(2), "max_tokens": 6, "temperature": 1, "seed": 6}));
    assert_eq!(alone["choices"][0]["text"], texts[3]);
}

#[test]
fn chat_answers_and_forms_hold() {
    let s = start(&[], &[]);
    let ask = |more: Value| {
        let mut v = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "max_tokens": 40, "temperature": 0.8, "seed": 1});
        v.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        s.post("/v1/chat/completions", &v)
    };
    let reply = ask(json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 4, "ignore_eos": true})).json();
    assert_eq!(reply["choices"][0]["message"]["role"], "assistant");
    let logs = reply["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(logs.len() == 4 && logs.iter().all(|l| l["top_logprobs"].as_array().unwrap().len() == 3));
    let first = ask(json!({"stream": true})).events();
    assert_eq!(first[0]["choices"][0]["delta"]["role"], "assistant");

    let picked = ask(json!({"guided_choice": ["red fish", "blue fish"]})).json();
    let text = picked["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(["red fish", "blue fish"].contains(&text), "{text:?}");
    let digits = ask(json!({"guided_regex": "[0-9]{3}-[0-9]{2}"})).json();
    let text = digits["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-' && text.replace('-', "").parse::<u32>().is_ok(), "{text:?}");
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["ok", "n"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": &schema}});
    let object = ask(json!({"response_format": format})).json();
    let text = object["choices"][0]["message"]["content"].as_str().unwrap();
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"));
    assert!(value["ok"].is_boolean() && value["n"].is_u64(), "{text}");
    assert_eq!(ask(json!({"guided_regex": "["})).status, 400);

    // The same under vLLM's later name.
    let said = |more: Value| {
        let reply = ask(json!({"structured_outputs": more}));
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    };
    assert!(["red fish", "blue fish"].contains(&said(json!({"choice": ["red fish", "blue fish"]})).as_str()));
    let text = said(json!({"regex": "[0-9]{3}-[0-9]{2}", "json": null}));
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-' && text.replace('-', "").parse::<u32>().is_ok(), "{text:?}");
    for schema in [schema.clone(), schema.to_string().into()] {
        let value: Value = serde_json::from_str(&said(json!({"json": schema}))).unwrap();
        assert!(value["ok"].is_boolean() && value["n"].is_u64(), "{value}");
    }
    for (refused, word) in [
        (json!({"structured_outputs": {"regex": "a+", "whitespace_pattern": " "}}), "whitespace_pattern"),
        (json!({"structured_outputs": {"regex": "a+", "choice": ["a"]}}), "exactly one"),
        (json!({"structured_outputs": {}}), "exactly one"),
        (json!({"structured_outputs": {"choice": [1]}}), "choice"),
        (json!({"structured_outputs": "a+"}), "object"),
        (json!({"structured_outputs": {"regex": "a+"}, "guided_regex": "a+"}), "only one"),
    ] {
        let reply = ask(refused.clone());
        assert_eq!(reply.status, 400, "{refused}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(word), "{refused}: {reply:?}");
    }
}

#[test]
fn a_stream_tells_its_usage_as_asked() {
    let s = start(&[], &[]);
    for (path, ask) in [
        ("/v1/completions", json!({"prompt": prompt(1)})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "Hello"}]})),
    ] {
        let stream = |options: Value| {
            let mut body = json!({"max_tokens": 12, "temperature": 0, "ignore_eos": true, "n": 2, "stream": true,
                "stream_options": options});
            body.as_object_mut().unwrap().extend(ask.as_object().unwrap().clone());
            s.post(path, &body).events()
        };
        let each = stream(json!({"include_usage": true, "continuous_usage_stats": true}));
        let (last, chunks) = each.split_last().unwrap();
        assert_eq!(last["usage"]["completion_tokens"], 24);
        for answer in 0..2 {
            let of = chunks.iter().filter(|c| c["choices"][0]["index"] == answer);
            let told: Vec<u64> = of
                .map(|c| {
                    assert_eq!(c["usage"]["prompt_tokens"], last["usage"]["prompt_tokens"], "{c}");
                    c["usage"]["completion_tokens"].as_u64().unwrap()
                })
                .collect();
            assert!(told.is_sorted() && told.len() > 4 && told.last() == Some(&12), "{path}: {told:?}");
        }
        let once = stream(json!({"include_usage": true}));
        let (last, chunks) = once.split_last().unwrap();
        assert!(last["usage"].is_object() && chunks.iter().all(|c| c.get("usage") == Some(&Value::Null)), "{once:?}");
        let never = stream(json!({"continuous_usage_stats": true}));
        assert!(never.iter().all(|c| c.get("usage").is_none()), "{never:?}");
    }
}

#[test]
fn what_is_wrong_is_refused_and_harms_nobody() {
    let s = start(
        &["--max-body", "20000", "--max-len", "128", "--read-timeout", "1", "--api-key-env", "KEY"],
        &[("KEY", "secret")],
    );
    let auth = "Authorization: Bearer secret\r\n";
    let post = |body: &[u8]| s.raw("POST", "/v1/completions", auth, body);
    let refused = |r: Reply, status: u16, word: &str| {
        assert_eq!(r.status, status, "{r:?}");
        let text = r.json()["error"]["message"].as_str().unwrap().to_string();
        assert!(text.contains(word), "{text} has no {word}");
    };
    refused(s.raw("POST", "/v1/completions", "", b"{}"), 401, "token");
    refused(s.raw("GET", "/v1/models", "Authorization: Bearer secreT\r\n", b""), 401, "token");
    refused(post(b"{\"prompt\": \"a\", "), 400, "JSON");
    refused(post(b"{\"prompt\": 3}"), 400, "JSON");
    refused(post(br#"{"prompt": "a", "temperature": -1}"#), 400, "temperature");
    refused(post(br#"{"prompt": [[99999999]]}"#), 400, "vocabulary");
    refused(post(br#"{"prompt": []}"#), 400, "prompt");
    refused(post(br#"{"prompt": "a", "max_tokens": 500}"#), 400, "together");
    refused(post(br#"{"prompt": "a", "model": "other"}"#), 404, "other");
    refused(post(&vec![b'x'; 30_000]), 413, "20000");
    refused(s.raw("GET", "/v1/nothing", auth, b""), 404, "nothing");
    refused(s.raw("DELETE", "/v1/completions", auth, b""), 405, "DELETE");
    assert_eq!(s.raw("GET", "/health", "", b"").status, 200);

    // Idle connections, half a header, half a body.
    let idle: Vec<TcpStream> = (0..200).map(|_| s.connect()).collect();
    let mut half = s.connect();
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nHost").unwrap();
    let mut slow = s.connect();
    write!(slow, "POST /v1/completions HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: 100\r\n\r\n{{").unwrap();
    let body = json!({"prompt": "a", "max_tokens": 2}).to_string();
    assert_eq!(post(body.as_bytes()).status, 200);
    let mut answer = String::new();
    let _ = slow.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let mut rest = Vec::new();
    let _ = half.read_to_end(&mut rest);
    drop(idle);
}

#[test]
fn sixteen_streams_equal_one_and_prompts_are_shared() {
    streams_equal_one(&[]);
}

/// Rounding knows nothing of the batch or of where a prompt's pages came from.
#[test]
fn with_caches_in_eight_bits_too() {
    streams_equal_one(&["--kv-cache", "int8"]);
    streams_equal_one(&["--kv-cache", "fp8"]);
}

fn streams_equal_one(kv: &[&str]) {
    let s = start(&[&["--kept-prompts", "0"], kv].concat(), &[]);
    let request = |i: usize| {
        let sampled = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
        json!({"prompt": prompt(i).repeat(1 + i % 5), "max_tokens": 32, "temperature": sampled, "seed": i, "ignore_eos": true})
    };
    let alone: Vec<Value> = (0..16).map(|i| s.complete(request(i))["choices"].clone()).collect();
    let together: Vec<Value> = std::thread::scope(|t| {
        let threads: Vec<_> = (0..16)
            .map(|i| {
                t.spawn({
                    let s = &s;
                    move || s.complete(request(i))["choices"].clone()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(a, b, "request {i}");
    }
    s.wait_for("lowbit:kv_cache_pages", 0.0);

    let s = start(kv, &[]);
    let long = prompt(3).repeat(20);
    let ask = || s.complete(json!({"prompt": long, "max_tokens": 16, "temperature": 0, "ignore_eos": true}));
    let (first, second) = (ask(), ask());
    assert_eq!(first["choices"], second["choices"]);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let n = second["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], n - 1);

    // Prompts that arrive together are computed together, but for one that begins as another does: it waits and finds that.
    let s = start(kv, &[]);
    let other = prompt(4).repeat(20);
    let three = json!({"prompt": [&long, &other, &long], "max_tokens": 16, "temperature": 0, "ignore_eos": true});
    let three = s.complete(three);
    for i in [0, 2] {
        assert_eq!(three["choices"][i]["text"], first["choices"][0]["text"], "prompt {i}");
    }
    assert_eq!(three["usage"]["prompt_tokens_details"]["cached_tokens"], n - 1);
}

#[test]
fn a_client_that_leaves_frees_its_pages_and_a_full_queue_says_so() {
    let s = start(&["--max-concurrent", "1", "--max-queue", "1", "--kept-prompts", "0"], &[]);
    let long = json!({"prompt": prompt(1), "max_tokens": 900, "temperature": 0, "ignore_eos": true, "stream": true});
    let open = |answers: usize| {
        let mut body = long.clone();
        body["n"] = answers.into();
        s.send("POST", "/v1/completions", "", body.to_string().as_bytes())
    };
    let mut running = open(1);
    // Once it has said something it runs, and waits no more; a reader this slow holds up nobody.
    hear(&mut running);
    // The answers of one request come one after the other and fill the queue for as long as a hundred of them take,
    // whether or not the first request has ended meanwhile.
    let waiting = open(128);
    let asked = Instant::now();
    while s.metric("vllm:num_requests_waiting") < 2.0 {
        assert!(asked.elapsed() < Duration::from_secs(60), "the queue never filled");
        std::thread::sleep(Duration::from_millis(2));
    }
    let refused = s.post("/v1/completions", &long);
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!(refused.head.contains("retry-after: "), "{refused:?}");
    assert!(s.metric("lowbit:kv_cache_pages") > 0.0);
    drop((running, waiting));
    s.wait_for("lowbit:kv_cache_pages", 0.0);
    assert_eq!((s.metric("vllm:num_requests_running"), s.metric("vllm:num_requests_waiting")), (0.0, 0.0));
    let ended = s.sum("vllm:request_success_total");
    assert_eq!(s.metric("lowbit:requests_cancelled_total") + ended, 129.0);
    assert!(ended < 100.0, "what nobody hears is not computed: {ended} answers");
}

#[test]
fn a_draft_does_not_change_the_text() {
    let tmp = tempfile::tempdir().unwrap();
    let draft = tmp.path().join("draft");
    ok(lowbit(tmp.path()).args(["--quiet", "quantize"]).arg(demo()).arg("-o").arg(&draft).args([
        "--method",
        "rtn",
        "--group-size",
        "64",
    ]));
    let plain = start(&[], &[]);
    let drafted = start(&["--draft", draft.to_str().unwrap()], &[]);
    for (i, temperature) in [(1, 0.0), (2, 0.0), (3, 0.8)] {
        let body =
            json!({"prompt": prompt(i), "max_tokens": 48, "temperature": temperature, "seed": 3, "ignore_eos": true});
        let (a, b) = (plain.complete(body.clone()), drafted.complete(body));
        assert_eq!(a["choices"], b["choices"], "prompt {i}");
        assert!(b["usage"]["completion_tokens_details"]["accepted_prediction_tokens"].as_u64().unwrap() > 0, "{b}");
    }
    let accepted = drafted.metric("vllm:spec_decode_num_accepted_tokens_total");
    assert!(accepted > 0.0 && accepted <= drafted.metric("vllm:spec_decode_num_draft_tokens_total"));
}

#[test]
fn sigterm_finishes_what_runs_and_refuses_the_rest() {
    let mut s = start(&[], &[]);
    let body = json!({"prompt": prompt(1), "max_tokens": 300, "temperature": 0, "ignore_eos": true, "stream": true});
    let mut running = s.send("POST", "/v1/completions", "", body.to_string().as_bytes());
    hear(&mut running);
    ok(Command::new("kill").args(["-TERM", &s.child.id().to_string()]));
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "cut off: {rest}");
    let status = s.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(TcpStream::connect(("127.0.0.1", s.port)).is_err());
}

#[test]
fn sigterm_is_not_lost_between_the_address_and_the_first_connection() {
    for _ in 0..10 {
        let mut s = start(&[], &[]);
        ok(Command::new("kill").args(["-TERM", &s.child.id().to_string()]));
        let late = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = s.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < late, "SIGTERM was lost");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "{status}");
    }
}
