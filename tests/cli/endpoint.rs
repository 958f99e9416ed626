//! `lowbit eval --endpoint`: a served model scores as it does here; servers that fail. (Judges: `judge.rs`.)

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::standin::{Play, StandIn, chat, last};
use super::{json as read, lowbit, ok, root, scores, serve, stderr};

/// Prompts to be continued, as a task file.
pub fn writing(dir: &Path, rows: usize, more: &str) -> PathBuf {
    let text = std::fs::read_to_string(root().join("assets/demo-text/evaluation.txt")).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let row = |i: usize| {
        let (q, a) = (words[i * 11..i * 11 + 9].join(" "), words[i * 11 + 9]);
        let passages = [words[i * 11 + 9..i * 11 + 20].join(" "), words[i * 11 + 20..i * 11 + 30].join(" ")];
        json!({"q": q, "a": a, "n": i, "question": q, "contexts": passages}).to_string()
    };
    std::fs::write(dir.join("prompts.jsonl"), (0..rows).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let path = dir.join("writing.yaml");
    let head =
        "task: writing\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompts.jsonl}}\ntest_split: test\n";
    let body = "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\ngeneration_kwargs: {until: [\"\\n\\n\"], max_gen_toks: 12}\n";
    std::fs::write(&path, format!("{head}{body}{more}")).unwrap();
    path
}

/// Items of the record `STEM.json`.
pub fn items(dir: &Path, stem: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join(format!("{stem}.items.jsonl"))).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The same decisions and texts, log-likelihoods within 1e-4.
fn same(a: &[Value], b: &[Value]) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().zip(b) {
        for key in ["task", "doc", "doc_hash", "prompt_hash", "target_hash", "choice", "responses"] {
            assert_eq!(x.get(key), y.get(key), "{key} of {x} and {y}");
        }
        let list = |v: &Value| -> Vec<f64> {
            v["log_probs"].as_array().map(|l| l.iter().map(|x| x.as_f64().unwrap()).collect()).unwrap_or_default()
        };
        let (p, q) = (list(x), list(y));
        assert!(p.len() == q.len() && p.iter().zip(&q).all(|(p, q)| (p - q).abs() <= 1e-4), "{x} {y}");
        for (name, value) in x["metrics"].as_object().unwrap() {
            let other = y["metrics"][name].as_f64().unwrap();
            assert!((value.as_f64().unwrap() - other).abs() <= 1e-4, "{name}: {x} {y}");
        }
    }
}

#[test]
fn a_served_model_scores_as_here() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let (words, pick) = scores::tasks(dir, 24);
    let texts = writing(dir, 6, "");
    let pages = dir.join("pages.yaml");
    std::fs::write(
        &pages,
        "task: pages\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompts.jsonl}}\ntest_split: test\noutput_type: loglikelihood_rolling\ndoc_to_target: q\n",
    )
    .unwrap();
    let retrieved = dir.join("retrieved.yaml");
    std::fs::write(
        &retrieved,
        "task: retrieved\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompts.jsonl}}\ntest_split: test\nretrieval: {}\ndoc_to_text: '{{contexts[0]}} {{question}}'\ndoc_to_target: a\ngeneration_kwargs: {until: [\".\"], max_gen_toks: 12}\n",
    )
    .unwrap();
    let all = [&words, &pick, &texts, &retrieved, &pages].map(|p| p.display().to_string()).join(",");
    let run = |out: &str, tasks: &str, args: &[&str]| {
        let mut c = lowbit(dir);
        c.args(["--device", "cpu", "eval", "--tasks", tasks, "--max-length", "300", "-o"])
            .arg(dir.join(out))
            .args(args);
        ok(&mut c)
    };
    run("here.json", &all, &["demo"]);
    let server = serve::start(&[], &[]);
    let url = format!("http://127.0.0.1:{}/v1", server.port);
    // Without a tokenizer here the server's is used; it does not say which token begins a rolled text.
    let some = [&words, &pick, &texts, &retrieved].map(|p| p.display().to_string()).join(",");
    run("served.json", &some, &["--endpoint", &url, "--completions"]);
    let here = items(dir, "here");
    assert!(here.len() == 24 + 24 + 6 + 6 + 6 && here.iter().any(|i| i["metrics"]["acc"] == 1.0));
    same(&here[..60], &items(dir, "served"));
    let blind = lowbit(dir).args(["eval", "--endpoint", &url, "--tasks"]).arg(&pages).output().unwrap();
    assert!(blind.status.code() == Some(3) && stderr(&blind).contains("--tokenizer"), "{}", stderr(&blind));
    // Tokens of our own instead of the server's, and the model here beside the served one.
    run("own.json", &all, &["--endpoint", &url, "--completions", "--tokenizer", "demo", "--concurrency", "3"]);
    same(&here, &items(dir, "own"));
    run("mixed.json", &all, &["demo", "--reference-endpoint", &url, "--completions", "--tokenizer", "demo"]);
    same(&items(dir, "mixed"), &items(dir, "mixed.reference"));
    let record = read(&dir.join("served.json"));
    assert_eq!(record["provenance"]["model"], format!("demo at {}", url.trim_end_matches("/v1")));
    assert_eq!(record["tasks"]["pick"]["acc"], read(&dir.join("here.json"))["tasks"]["pick"]["acc"]);
    for sides in [&["mixed.json"][..], &["own.json", "here.json"]] {
        let out = lowbit(dir).arg("gate").args(sides.iter().map(|s| dir.join(s))).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(
            [0, 2].contains(&out.status.code().unwrap()) && text.contains("loss +0.00 pp"),
            "{text}{}",
            stderr(&out)
        );
    }
    // Through the chat template on both sides.
    let name = texts.display().to_string();
    run("chat-here.json", &name, &["demo", "--apply-chat-template"]);
    run("chat-served.json", &name, &["--endpoint", &url]);
    same(&items(dir, "chat-here"), &items(dir, "chat-served"));
    let c = lowbit(dir).args(["eval", "demo", "--reference-endpoint", &url, "--tasks", &name]).output().unwrap();
    assert!(c.status.code() == Some(3) && stderr(&c).contains("--completions"), "{}", stderr(&c));
    // Shards of served runs.
    let own = ["--endpoint", url.as_str(), "--completions", "--tokenizer", "demo"];
    for (whole, tasks, args) in [("own", &all, &own[..]), ("chat-served", &name, &own[..2])] {
        for part in ["1/2", "2/2"] {
            run(&format!("{whole}-{}.json", &part[..1]), tasks, &[args, &["--shard", part]].concat());
        }
        let parts = [1, 2].map(|i| dir.join(format!("{whole}-{i}.json")));
        ok(lowbit(dir).args(["eval", "merge"]).args(parts).arg("-o").arg(dir.join("merged.json")).arg("--force"));
        assert_eq!(items(dir, "merged"), items(dir, whole));
    }
}

#[test]
fn an_agents_calls_are_read_from_text_and_from_the_api() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let call = |city: &str| json!([{"id": "1", "type": "function", "function": {"name": "weather", "arguments": json!({"city": city}).to_string()}}]);
    let row = |city: &str| {
        let messages = json!([{"role": "user", "content": format!("Weather in {city}?")}, {"role": "assistant", "content": null, "tool_calls": call(city)}]);
        json!({"messages": messages, "tools": [{"type": "function", "function": {"name": "weather"}}]}).to_string()
    };
    std::fs::write(dir.join("travel.jsonl"), ["Oslo", "Rome", "Bern"].map(row).join("\n")).unwrap();
    let task = dir.join("travel.yaml");
    std::fs::write(&task, "task: travel\ndataset_path: json\ndataset_kwargs: {data_files: {test: travel.jsonl}}\ntest_split: test\nagent: {tools: tools}\n").unwrap();
    let server = StandIn::start(move |path, body, _| match (path, last(body)) {
        ("/v1/models", _) => Play::Json(Value::Null),
        (_, text) if text.contains("Oslo") => {
            let message = json!({"role": "assistant", "content": null, "tool_calls": call("Oslo")});
            Play::Json(json!({"choices": [{"message": message, "finish_reason": "tool_calls"}]}))
        }
        (_, text) if text.contains("Rome") => chat("weather(city='Rome')"),
        _ => chat("It rains."),
    });
    ok(lowbit(dir)
        .args(["--quiet", "eval", "--endpoint", &server.url, "--tasks"])
        .arg(&task)
        .arg("-o")
        .arg(dir.join("e.json")));
    let right: Vec<f64> = items(dir, "e").iter().map(|i| i["metrics"]["tool_calls"].as_f64().unwrap()).collect();
    assert_eq!(right, [1.0, 1.0, 0.0]);
    // Tools go as tools, not in words.
    let asked = server.bodies("/v1/chat/completions");
    assert!(asked.iter().all(|b| b["messages"][0]["role"] == "user" && b["messages"].as_array().unwrap().len() == 1));
    let tool = json!([{"type": "function", "function": {"name": "weather"}}]);
    assert!(asked.iter().all(|b| b["tools"] == tool), "{asked:?}");
    // So do calls that were recorded, and what they returned.
    let trip = json!({"tools": tool, "messages": [
        {"role": "user", "content": "Where does it rain?"},
        {"role": "assistant", "content": null, "tool_calls": call("Oslo")},
        {"role": "tool", "tool_call_id": "1", "content": "Sun. Try Rome."},
        {"role": "assistant", "content": null, "tool_calls": call("Rome")}]});
    std::fs::write(dir.join("travel.jsonl"), trip.to_string()).unwrap();
    ok(lowbit(dir)
        .args(["--quiet", "eval", "--endpoint", &server.url, "--tasks"])
        .arg(&task)
        .arg("-o")
        .arg(dir.join("t.json")));
    let asked = server.bodies("/v1/chat/completions");
    let second = asked.iter().find(|b| b["messages"].as_array().unwrap().len() == 3).unwrap();
    assert_eq!(second["messages"][1], json!({"role": "assistant", "content": null, "tool_calls": call("Oslo")}));
    assert_eq!(second["messages"][2], json!({"role": "tool", "content": "Sun. Try Rome.", "tool_call_id": "1"}));
    // One of two turns: the first is answered by rain.
    assert_eq!(items(dir, "t")[0]["metrics"]["tool_calls"], 0.5);
}

/// Answers `wrote N` to the prompt of row N.
fn write_back(body: &Value) -> Play {
    chat(format!("wrote {}", last(body).len()))
}

#[test]
fn failures_that_pass_are_outlived() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 15, "");
    let seen = |body: &Value| last(body).len() % 5;
    let server = StandIn::start(move |path, body, before| match (path, before) {
        ("/v1/models", _) => Play::Json(Value::Null),
        (_, 0..6) if seen(body) == 0 => Play::Status(429, "Retry-After: 0\r\n", "{\"error\": \"full\"}".into()),
        (_, 0) => match seen(body) {
            1 => Play::Status(500, "", String::new()),
            2 => Play::Cut,
            3 => Play::Garbage,
            _ => Play::Status(503, "Retry-After: 0\r\n", String::new()),
        },
        _ => write_back(body),
    });
    let run = |retries: &str| {
        let mut c = lowbit(dir);
        c.args(["--quiet", "eval", "--endpoint", &server.url, "--retries", retries, "--force", "--tasks"]).arg(&task);
        c.arg("-o").arg(dir.join("e.json"));
        c
    };
    ok(&mut run("2"));
    let found = items(dir, "e");
    let prompts: Vec<Value> = std::fs::read_to_string(dir.join("prompts.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    for (item, row) in found.iter().zip(&prompts) {
        assert_eq!(item["responses"][0], format!("wrote {}", row["q"].as_str().unwrap().len()));
    }
    assert!(!dir.join("e.journal").exists());
}

#[test]
fn a_failure_that_lasts_is_an_error_that_names_its_document() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 5, "");
    let third = std::fs::read_to_string(dir.join("prompts.jsonl")).unwrap().lines().nth(2).unwrap().to_owned();
    let third = serde_json::from_str::<Value>(&third).unwrap()["q"].as_str().unwrap().to_owned();
    let bad = third.clone();
    let server = StandIn::start(move |path, body, before| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ if last(body) == bad && before == 0 => {
            Play::Status(400, "", "{\"error\": {\"message\": \"no such word\"}}".into())
        }
        _ => write_back(body),
    });
    let run = || {
        let mut c = lowbit(dir);
        c.args(["eval", "--endpoint", &server.url, "--concurrency", "1", "--tasks"])
            .arg(&task)
            .arg("-o")
            .arg(dir.join("e.json"));
        c.output().unwrap()
    };
    let out = run();
    let says = stderr(&out);
    assert_eq!(out.status.code(), Some(3));
    assert!(says.contains("document 2 of writing") && says.contains("400: no such word"), "{says}");
    assert!(!dir.join("e.json").exists() && !dir.join("e.items.jsonl").exists());
    // What was answered is not asked again.
    let out = run();
    assert!(out.status.success() && stderr(&out).contains("2 of 5 requests answered before"), "{}", stderr(&out));
    assert_eq!(server.bodies("/v1/chat/completions").len(), 3 + 3);
    // A server without log-probabilities of prompts.
    let (words, _) = scores::tasks(dir, 3);
    let deaf = StandIn::start(|path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        "/tokenize" => Play::Json(json!({"tokens": body["prompt"].as_str().unwrap().bytes().collect::<Vec<u8>>()})),
        "/v1/completions" => Play::Status(400, "", "{\"error\": {\"message\": \"Only no echo is supported\"}}".into()),
        _ => Play::Status(404, "", String::new()),
    });
    let ask = |url: &str| lowbit(dir).args(["eval", "--endpoint", url, "--tasks"]).arg(&words).output().unwrap();
    let out = ask(&deaf.url);
    let says = stderr(&out);
    assert!(
        out.status.code() == Some(3) && says.contains("Only no echo is supported") && says.contains("of words"),
        "{says}"
    );
    // A server that hangs.
    let hung = StandIn::start(|path, _, _| {
        if path != "/v1/models" {
            std::thread::sleep(Duration::from_secs(20));
        }
        Play::Json(Value::Null)
    });
    let mut c = lowbit(dir);
    c.args(["eval", "--endpoint", &hung.url, "--timeout", "0.5", "--retries", "1", "--limit", "1", "--tasks"])
        .arg(&task);
    let out = c.output().unwrap();
    let says = stderr(&out);
    assert!(
        out.status.code() == Some(3) && says.contains("asked 2 times") && says.contains("no whole answer"),
        "{says}"
    );
    let gone = ask("http://127.0.0.1:9");
    assert!(gone.status.code() == Some(3) && stderr(&gone).contains("http://127.0.0.1:9"), "{}", stderr(&gone));
    let url = lowbit(dir).args(["eval", "http://x", "--tasks", "piqa"]).output().unwrap();
    assert!(stderr(&url).contains("--endpoint http://x"), "{}", stderr(&url));
}

#[test]
fn a_killed_run_asks_only_for_the_rest() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 12, "");
    let server = StandIn::start(|path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ => {
            std::thread::sleep(Duration::from_millis(60));
            write_back(body)
        }
    });
    let run = |out: &str| {
        let mut c = lowbit(dir);
        c.args(["--quiet", "eval", "--endpoint", &server.url, "--concurrency", "2", "--tasks"]).arg(&task);
        c.arg("-o").arg(dir.join(out));
        c
    };
    let mut child = run("cut.json").stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while server.bodies("/v1/chat/completions").len() < 6 && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(dir.join("cut.journal").exists() && !dir.join("cut.json").exists());
    ok(&mut run("cut.json"));
    let asked = server.bodies("/v1/chat/completions").len();
    assert!((12..=16).contains(&asked), "{asked} requests for 12 prompts");
    ok(&mut run("whole.json"));
    let bytes = |f: &str| std::fs::read(dir.join(f)).unwrap();
    assert!(bytes("cut.items.jsonl") == bytes("whole.items.jsonl"));
}
