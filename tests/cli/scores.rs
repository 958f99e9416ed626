//! `lowbit eval --tasks`: scores against lm-evaluation-harness's where `../shared` is at hand, restarts, shards, the cache.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::{json as read, lowbit, ok, root, stderr};

/// Places in the demo's text as two tasks: the word that follows (`words`), and which of two words follows (`pick`).
pub fn tasks(dir: &Path, most: usize) -> (PathBuf, PathBuf) {
    let text = std::fs::read_to_string(root().join("assets/demo-text/evaluation.txt")).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let places = (16..words.len()).step_by(3).take(most);
    let rows: Vec<(String, &str)> = places.map(|i| (words[i - 16..i].join(" "), words[i])).collect();
    assert_eq!(rows.len(), most, "of {} words", words.len());
    let line = |(i, (context, last)): (usize, &(String, &str))| {
        let other = rows[(i * 7 + 3) % rows.len()].1;
        let options = if i % 2 == 0 { [*last, other] } else { [other, *last] };
        json!({"context": context, "last": format!(" {last}"), "options": options, "label": i % 2}).to_string()
    };
    let lines: Vec<String> = rows.iter().enumerate().map(line).collect();
    std::fs::write(dir.join("rows.jsonl"), lines.join("\n")).unwrap();
    let head = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n";
    let words = format!(
        "task: words\n{head}output_type: loglikelihood\ndoc_to_text: '{{{{context}}}}'\ndoc_to_target: last\nmetric_list:\n  - metric: acc\n    aggregation: mean\n  - metric: perplexity\n"
    );
    let pick = format!(
        "task: pick\n{head}output_type: multiple_choice\ndoc_to_text: '{{{{context}}}}'\ndoc_to_target: label\ndoc_to_choice: options\n"
    );
    let (a, b) = (dir.join("words.yaml"), dir.join("pick.yaml"));
    std::fs::write(&a, words).unwrap();
    std::fs::write(&b, pick).unwrap();
    (a, b)
}

fn eval(dir: &Path, tasks: &(PathBuf, PathBuf), out: &str, more: &[&str]) -> Command {
    eval_of("demo", dir, tasks, out, more)
}

fn eval_of(model: &str, dir: &Path, tasks: &(PathBuf, PathBuf), out: &str, more: &[&str]) -> Command {
    let mut c = lowbit(dir);
    let names = format!("{},{}:2", tasks.0.display(), tasks.1.display());
    c.args(["--quiet", "eval", model, "--tasks", &names, "-o"]).arg(dir.join(out)).args(more);
    c
}

/// What must not depend on how a run went: the record without its clock and its own name.
fn lasting(path: &Path) -> Value {
    let mut v = read(path);
    let o = v.as_object_mut().unwrap();
    let seconds = |v: Option<Value>| v.unwrap().as_f64().unwrap();
    let (all, scoring) = (seconds(o.remove("seconds")), seconds(o.remove("scoring_seconds")));
    // Rendering comes before the clock of the whole starts.
    assert!(scoring > 0.0 && scoring < all + 5.0, "{scoring} of {all} s");
    o["items"]["candidate"].as_object_mut().unwrap().remove("file");
    if let Some(r) = o["items"].get_mut("reference") {
        r.as_object_mut().unwrap().remove("file");
    }
    let p = o["provenance"].as_object_mut().unwrap();
    p.remove("unix_time");
    p.remove("command");
    p.remove("threads");
    v
}

/// Waits until a file is larger than `size`; false when the process ended first.
fn grows(child: &mut Child, file: &Path, size: u64) -> bool {
    let start = Instant::now();
    loop {
        if std::fs::metadata(file).is_ok_and(|m| m.len() > size) {
            return true;
        }
        if child.try_wait().unwrap().is_some() || start.elapsed() > Duration::from_secs(300) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A quantized model beside the original on two tasks, with perplexity and KL on a text: once whole, and once killed three times while
/// tasks are answered and twice at the windows of the text.
#[test]
fn a_run_killed_at_tasks_and_texts_ends_with_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let w4 = dir.join("w4");
    let mut q = lowbit(dir);
    q.args(["--quiet", "quantize"]).arg(super::demo()).arg("-o").arg(&w4);
    ok(q.args(["--scheme", "w4a16", "--group-size", "64", "--calib", "self", "--samples", "8", "--seq-len", "64"]));
    let tasks = tasks(dir, 120);
    let text = root().join("assets/demo-text/evaluation.txt");
    let text = text.to_str().unwrap();
    let kl = ["--kl", text, "--kl-window", "128", "--ppl", text, "--protocol", "gptq-128"];
    let more = [&["--reference", "demo", "--threads", "1"][..], &kl[..]].concat();
    let eval = |out: &str| eval_of(w4.to_str().unwrap(), dir, &tasks, out, &more);
    ok(&mut eval("whole.json"));
    let journals = [dir.join("cut.journal"), dir.join("cut.texts.journal")];
    // Of the text, once in its perplexity and once in its KL, whose windows are a hundred times as long.
    for (journal, sizes) in journals.iter().zip([&[200, 200, 200][..], &[200, 20_000]]) {
        let mut size = 0;
        for (round, least) in sizes.iter().enumerate() {
            let mut child = eval("cut.json").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            assert!(grows(&mut child, journal, size.max(*least)), "round {round}: the run ended before it was killed");
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!dir.join("cut.json").exists(), "round {round}: a record of a run cut short");
            size = std::fs::metadata(journal).unwrap().len();
        }
        // A kill may tear a frame, too.
        std::fs::OpenOptions::new().append(true).open(journal).unwrap().set_len(size - 7).unwrap();
    }
    let mut last = lowbit(dir);
    let done = ok(last.args(eval("cut.json").get_args().filter(|a| **a != *"--quiet")));
    let said = stderr(&done);
    for what in ["answers", "windows"] {
        assert!(said.contains(&format!("{what} of an earlier run that was cut short")), "{said}");
    }
    assert!(journals.iter().all(|j| !j.exists()));
    for end in [".items.jsonl", ".reference.items.jsonl"] {
        let bytes = |run: &str| std::fs::read(dir.join(format!("{run}{end}"))).unwrap();
        assert!(bytes("cut") == bytes("whole"), "{end} differs");
    }
    assert_eq!(lasting(&dir.join("cut.json")), lasting(&dir.join("whole.json")));
    let record = read(&dir.join("whole.json"));
    let drift = |v: &Value| v["mean"].as_f64().unwrap();
    assert!(drift(&record["kl"]) > 1e-7 && drift(&record["task_drift"]["words"]) > 1e-7, "{record:#}");
    // Nothing is overwritten unasked.
    let again = eval("cut.json").output().unwrap();
    assert_eq!(again.status.code(), Some(3), "{}", stderr(&again));
}

#[test]
fn an_interrupted_evaluation_says_how_it_goes_on() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let (record, journal) = (dir.join("e.json"), dir.join("e.texts.journal"));
    let text = root().join("assets/demo-text/evaluation.txt");
    let command = || {
        let mut c = lowbit(dir);
        c.args(["--device", "cpu", "--threads", "1", "eval", "demo", "--reference", "demo", "--kl-window", "64"]);
        c.arg("--kl").arg(&text).arg("-o").arg(&record);
        c
    };
    let mut child = command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(grows(&mut child, &journal, 200), "the run ended before it was interrupted");
    ok(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let done = child.wait_with_output().unwrap();
    let said = stderr(&done);
    assert_eq!(done.status.code(), Some(130), "{said}");
    assert!(said.contains("hint: the same command goes on: answers and windows so far"), "{said}");
    assert!(journal.exists() && !record.exists());
    let said = stderr(&ok(&mut command()));
    assert!(said.contains("windows of an earlier run that was cut short"), "{said}");
    assert!(!journal.exists() && read(&record)["kl"]["mean"].as_f64().unwrap() <= 1e-7);
}

#[test]
fn a_model_beside_itself_loses_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    ok(&mut eval(dir, &tasks(dir, 60), "self.json", &["--reference", "demo"]));
    let record = read(&dir.join("self.json"));
    assert_eq!(record["tasks"]["words"]["delta"]["acc"], 0.0);
    assert!(record["task_drift"]["words"]["mean"].as_f64().unwrap() <= 1e-7);
}

#[test]
fn what_a_run_can_find_is_said_before_it() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let (words, pick) = tasks(dir, 40);
    let run = |out: &str, more: &[&str]| {
        let mut c = lowbit(dir);
        c.args(["eval", "demo", "--tasks", &format!("{},{}", words.display(), pick.display())]).args(more);
        let done = ok(c.arg("-o").arg(dir.join(out)));
        (stderr(&done), read(&dir.join(out)))
    };
    let (said, record) = run("beside.json", &["--reference", "demo"]);
    // At 0.8 of alpha in all items, at 0.1 in each of two tasks.
    for line in ["6.48 pp in all tasks (80 items)", "12.08 pp in pick (40 items)", "12.08 pp in words (40 items)"] {
        assert!(said.contains(line), "{said}");
    }
    let sizes = &record["detectable"];
    assert_eq!((&sizes["alpha"], &sizes["power"], &sizes["pool"]["n"]), (&json!(0.05), &json!(0.8), &json!(80)));
    assert!((sizes["tasks"]["pick"]["loss"].as_f64().unwrap() - 0.12083).abs() < 1e-5, "{sizes}");
    // Nothing is compared with nothing.
    let (said, record) = run("alone.json", &[]);
    assert!(!said.contains("power") && record.get("detectable").is_none(), "{said}");
}

#[test]
fn shards_merge_to_the_whole() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let tasks = tasks(dir, 80);
    ok(&mut eval(dir, &tasks, "whole.json", &["--reference", "demo", "--threads", "1"]));
    let shard = |i: usize, more: &[&str]| {
        let part = format!("{i}/3");
        let args = [&["--reference", "demo", "--shard", &part][..], more].concat();
        ok(&mut eval(dir, &tasks, &format!("part{i}.json"), &args));
    };
    let merge = |parts: &[usize], out: &str| {
        let mut c = lowbit(dir);
        c.args(["--quiet", "eval", "merge"]).args(parts.iter().map(|i| dir.join(format!("part{i}.json"))));
        c.arg("-o").arg(dir.join(out)).output().unwrap()
    };
    shard(1, &[]);
    shard(3, &[]);
    shard(2, &[]);
    let out = merge(&[1, 3], "no.json");
    assert!(out.status.code() == Some(3) && stderr(&out).contains("2/3"), "{}", stderr(&out));
    let out = merge(&[1, 2, 2, 3], "no.json");
    assert!(out.status.code() == Some(3) && stderr(&out).contains("both part 2/3"), "{}", stderr(&out));
    let out = merge(&[3, 1, 2], "merged.json");
    assert!(out.status.success(), "{}", stderr(&out));
    for end in [".items.jsonl", ".reference.items.jsonl"] {
        let bytes = |run: &str| std::fs::read(dir.join(format!("{run}{end}"))).unwrap();
        assert!(bytes("merged") == bytes("whole"), "{end} differs");
    }
    assert_eq!(lasting(&dir.join("merged.json")), lasting(&dir.join("whole.json")));
    assert!(!dir.join("no.json").exists());
    // A part of another run.
    shard(2, &["--limit", "40", "--force"]);
    let out = merge(&[1, 2, 3], "no.json");
    assert!(out.status.code() == Some(3) && stderr(&out).contains("limit"), "{}", stderr(&out));
}

#[test]
fn the_cache_answers_and_one_changed_weight_byte_misses() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let tasks = tasks(dir, 20);
    let model = dir.join("model");
    super::copy(&super::demo(), &model);
    let cache = dir.join("answers");
    let run = |out: &str| {
        let mut c = lowbit(dir);
        c.arg("eval").arg(&model).arg("--tasks").arg(&tasks.1).arg("--cache").arg(&cache);
        let out = ok(c.args(["--device", "cpu", "-o"]).arg(dir.join(out)));
        let text = stderr(&out);
        let line = text.lines().find(|l| l.contains("answered before")).unwrap().to_owned();
        line.split(", ").last().unwrap().to_owned()
    };
    assert_eq!(run("a.json"), "0 of 40 requests answered before");
    assert_eq!(run("b.json"), "40 of 40 requests answered before");
    let bytes = |f: &str| std::fs::read(dir.join(f)).unwrap();
    assert!(bytes("a.items.jsonl") == bytes("b.items.jsonl"));
    let weights = model.join("model.safetensors");
    let mut changed = std::fs::read(&weights).unwrap();
    let last = changed.len() - 2;
    changed[last] ^= 1;
    std::fs::write(&weights, changed).unwrap();
    assert_eq!(run("c.json"), "0 of 40 requests answered before");
}

/// The demo with a tokenizer that puts BOS before every text; as Gemma with the norms that family has.
fn with_bos(dir: &Path, gemma: bool) -> PathBuf {
    let model = dir.join(if gemma { "gemma" } else { "llama" });
    super::copy(&super::demo(), &model);
    let edit = |file: &str, pairs: &[(&str, Value)]| {
        let path = model.join(file);
        let mut keys = read(&path);
        pairs.iter().for_each(|(key, value)| keys[*key] = value.clone());
        std::fs::write(&path, keys.to_string()).unwrap();
    };
    edit("tokenizer_config.json", &[("add_bos_token", json!(true))]);
    if gemma {
        edit("config.json", &[("model_type", json!("gemma3_text")), ("query_pre_attn_scalar", json!(64))]);
        let path = model.join("model.safetensors");
        let (bytes, zeros) = (std::fs::read(&path).unwrap(), [0u8; 2 * 256]);
        let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let norms =
            [("self_attn.q", 64), ("self_attn.k", 64), ("pre_feedforward_layer", 256), ("post_feedforward_layer", 256)];
        for (norm, width) in norms {
            for layer in 0..4 {
                let mark = if width == 64 { "_norm" } else { "norm" };
                let view = TensorView::new(Dtype::BF16, vec![width], &zeros[..2 * width]).unwrap();
                tensors.push((format!("model.layers.{layer}.{norm}{mark}.weight"), view));
            }
        }
        let made = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(&path, made).unwrap();
    }
    model
}

#[test]
fn the_rule_of_older_releases_drops_bos_but_for_gemma() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let (_, pick) = tasks(dir, 12);
    let scores = |model: &Path, out: &str, more: &[&str]| -> Vec<Value> {
        let mut c = lowbit(dir);
        c.args(["--quiet", "--device", "cpu", "eval"]).arg(model).arg("--tasks").arg(&pick).args(more);
        ok(c.arg("-o").arg(dir.join(format!("{out}.json"))));
        let text = std::fs::read_to_string(dir.join(format!("{out}.items.jsonl"))).unwrap();
        text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["log_probs"].clone()).collect()
    };
    let old = ["--compat", "lm-eval-0.4.9.1"];
    let (llama, gemma) = (with_bos(dir, false), with_bos(dir, true));
    let bare = scores(&super::demo(), "bare", &[]);
    assert_ne!(scores(&llama, "llama", &[]), bare);
    assert_eq!(scores(&llama, "llama-old", &old), bare);
    assert_eq!(read(&dir.join("llama-old.json"))["provenance"]["options"]["compat"], "lm-eval-0.4.9.1");
    let begun = scores(&gemma, "gemma", &[]);
    assert_eq!(scores(&gemma, "gemma-old", &old), begun);
    // Which says something: without BOS they are others.
    std::fs::copy(super::demo().join("tokenizer_config.json"), gemma.join("tokenizer_config.json")).unwrap();
    assert_ne!(scores(&gemma, "gemma-bare", &[]), begun);
}

/// One document's log-likelihoods and greedy flags as lm-evaluation-harness has them.
type Golden = BTreeMap<(String, usize), Vec<(f64, bool)>>;

fn golden(path: &Path) -> (Golden, BTreeMap<String, Value>) {
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut text).unwrap();
    let (mut lines, mut metrics) = (Golden::new(), BTreeMap::new());
    for line in text.lines() {
        let v: Value = serde_json::from_str(line).unwrap();
        let task = v["task"].as_str().unwrap().to_owned();
        match v.get("metrics") {
            Some(m) => _ = metrics.insert(task, m.clone()),
            None => lines
                .entry((task, v["doc"].as_u64().unwrap() as usize))
                .or_default()
                .push((v["ll"].as_f64().unwrap(), v["greedy"].as_bool().unwrap())),
        }
    }
    (lines, metrics)
}

/// |Δ log-likelihood| at most 0.02, and the same metrics but for documents whose choices are closer than that.
#[test]
fn smollm2_scores_are_those_of_lm_eval() {
    let shared = root().join("../shared");
    let file = shared.join("golden/lm-eval/scores.jsonl.gz");
    let Some(model) = std::env::var_os("LOWBIT_SMOLLM2").filter(|_| file.exists()) else {
        eprintln!("skipped: ../shared is absent or LOWBIT_SMOLLM2 names no folder");
        return;
    };
    let (wanted, metrics) = golden(&file);
    assert_eq!(metrics.len(), 8);
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("eval.json");
    let names: Vec<&str> = metrics.keys().map(String::as_str).collect();
    let mut c = lowbit(tmp.path());
    c.args(["--quiet", "eval"]).arg(&model).args(["--tasks", &names.join(","), "--limit", "50", "--data"]);
    ok(c.arg(shared.join("data/eval")).arg("-o").arg(&out));
    let items = std::fs::read_to_string(tmp.path().join("eval.items.jsonl")).unwrap();
    let (mut worst, mut seen, mut close) = (0f64, 0, BTreeMap::<String, f64>::new());
    for line in items.lines() {
        let item: Value = serde_json::from_str(line).unwrap();
        let key = (item["task"].as_str().unwrap().to_owned(), item["doc"].as_u64().unwrap() as usize);
        let theirs = &wanted[&key];
        let ours: Vec<f64> = item["log_probs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(ours.len(), theirs.len(), "{key:?}");
        for (a, (b, _)) in ours.iter().zip(theirs) {
            worst = worst.max((a - b).abs());
            assert!((a - b).abs() <= 0.02, "{key:?}: {a} against {b}");
        }
        seen += ours.len();
        let mut order: Vec<usize> = (0..theirs.len()).collect();
        order.sort_by(|&x, &y| theirs[y].0.total_cmp(&theirs[x].0));
        match (item["choice"].as_u64(), order.get(1)) {
            (Some(choice), Some(&second)) if theirs[order[0]].0 - theirs[second].0 > 0.02 => {
                assert_eq!(choice as usize, order[0], "{key:?}");
            }
            (Some(_), Some(_)) => *close.entry(key.0.clone()).or_default() += 1.0,
            _ => assert_eq!(item["metrics"]["acc"] == 1.0, theirs[0].1, "{key:?}"),
        }
    }
    assert_eq!((seen, wanted.len()), (1323, 400));
    let record = read(&out);
    for (task, theirs) in &metrics {
        let ours = &record["tasks"][task.split(':').next().unwrap()];
        for metric in ["acc", "acc_norm"] {
            if let Some(want) = theirs.get(metric).and_then(Value::as_f64) {
                // A document whose choices are closer than the tolerance may go either way.
                let slack = close.get(task).copied().unwrap_or_default() / 50.0 + 1e-9;
                let got = ours[metric].as_f64().unwrap();
                assert!((got - want).abs() <= slack, "{task} {metric}: {got} against {want}");
            }
        }
    }
    eprintln!("largest difference of a log-likelihood: {worst:.5}");
}
