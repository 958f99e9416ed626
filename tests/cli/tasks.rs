//! Task files and their requests: against lm-evaluation-harness's where `../shared` is at hand, and on files of our own.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::Output;

use lowbit_checkpoint::hash::sha256_hex;
use serde_json::{Value, json};

use super::{lowbit, ok, root, stderr};

fn render(dir: &Path, args: &[&str]) -> Output {
    lowbit(dir).args(["eval", "demo", "--render"]).args(args).output().unwrap()
}

fn lines(out: &Output) -> Vec<Value> {
    assert!(out.status.success(), "{}", stderr(out));
    out.stdout.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect()
}

#[test]
fn every_golden_prompt_is_identical() {
    let shared = root().join("../shared");
    let golden = shared.join("golden/lm-eval/prompts.jsonl.gz");
    if !golden.exists() {
        eprintln!("skipped: ../shared is absent");
        return;
    }
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(golden).unwrap()).read_to_string(&mut text).unwrap();
    let mut wanted: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        if value.get("kind").is_some() {
            wanted.entry(value["task"].as_str().unwrap().to_owned()).or_default().push(value);
        }
    }
    assert_eq!(wanted.len(), 17);
    let dir = tempfile::tempdir().unwrap();
    let data = shared.join("data/eval");
    let names: Vec<&str> = wanted.keys().map(String::as_str).collect();
    let out = render(dir.path(), &["--tasks", &names.join(","), "--data", data.to_str().unwrap()]);
    let mut found: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in lines(&out) {
        found.entry(line["task"].as_str().unwrap().to_owned()).or_default().push(line);
    }
    let hash = |text: &Value| sha256_hex(text.as_str().unwrap().as_bytes())[..16].to_owned();
    for (task, wanted) in &wanted {
        let found = &found[task];
        assert_eq!(found.len(), wanted.len(), "{task}");
        for (f, w) in found.iter().zip(wanted) {
            let place = format!("{task} {} {}", w["doc"], w["idx"]);
            assert_eq!((&f["doc"], &f["idx"], &f["kind"]), (&w["doc"], &w["idx"], &w["kind"]), "{place}");
            assert_eq!(hash(&f["context"]), w["context"].as_str().unwrap(), "{place}: {}", f["context"]);
            if let Some(continuation) = w.get("continuation") {
                assert_eq!(hash(&f["continuation"]), continuation.as_str().unwrap(), "{place}: {}", f["continuation"]);
            }
        }
    }
}

/// A folder with the given files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

const CHOICE: &str = r#"
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: options
"#;

#[test]
fn a_task_of_ones_own() {
    let dir = folder(&[
        ("mine.yaml", CHOICE),
        (
            "rows.jsonl",
            "{\"question\": \"2+2?\", \"options\": [\"3\", \"4\"], \"label\": 1}\n{\"question\": \"1+1?\", \"options\": [\"2\", \"4\"], \"label\": 0}\n",
        ),
    ]);
    let file = dir.path().join("mine.yaml");
    let out = lines(&render(dir.path(), &["--tasks", &format!("{}:1", file.display()), "--limit", "1"]));
    assert_eq!(out.len(), 2);
    // The other row is the only example left.
    assert_eq!(out[1]["context"], "1+1? 2\n\n2+2?");
    assert_eq!((&out[0]["continuation"], &out[1]["continuation"]), (&json!(" 3"), &json!(" 4")));
    let by_name = lines(&render(dir.path(), &["--tasks", "mine", "--include", dir.path().to_str().unwrap()]));
    assert_eq!(by_name.len(), 4);
    assert_eq!(by_name[0]["context"], "2+2?");
}

#[test]
fn chat_templates_wrap_prompts() {
    let dir = folder(&[
        ("mine.yaml", CHOICE),
        (
            "rows.jsonl",
            "{\"question\": \"2+2?\", \"options\": [\"3\", \"4\"], \"label\": 1}\n{\"question\": \"1+1?\", \"options\": [\"2\", \"4\"], \"label\": 0}\n",
        ),
    ]);
    let file = format!("{}:1", dir.path().join("mine.yaml").display());
    let chat = |more: &[&str]| {
        let mut args =
            vec!["--tasks", &file, "--limit", "1", "--apply-chat-template", "--system-instruction", "Be brief."];
        args.extend(more);
        let out = lines(&render(dir.path(), &args));
        assert_eq!(out[1]["continuation"], "4");
        out[1]["context"].as_str().unwrap().to_owned()
    };
    let (many, one) = (chat(&[]), chat(&["--fewshot-as-multiturn", "false"]));
    assert!(many.contains("Be brief.") && many.contains("2+2?") && !many.contains("1+1? 2\n\n2+2?"), "{many}");
    assert!(one.contains("1+1? 2\n\n2+2?"), "{one}");
}

#[test]
fn plain_prompts_need_no_model() {
    let dir = folder(&[
        ("mine.yaml", CHOICE),
        ("rows.jsonl", "{\"question\": \"2+2?\", \"options\": [\"3\", \"4\"], \"label\": 1}\n"),
    ]);
    let file = dir.path().join("mine.yaml");
    let alone = |more: &[&str]| {
        lowbit(dir.path()).args(["eval", "--render", "--tasks"]).arg(&file).args(more).output().unwrap()
    };
    let out = alone(&[]);
    assert_eq!(lines(&out), lines(&render(dir.path(), &["--tasks", file.to_str().unwrap()])));
    let out = alone(&["--apply-chat-template"]);
    assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
    assert!(stderr(&out).contains("--apply-chat-template without a model"), "{}", stderr(&out));
    // Scoring needs one.
    let out = lowbit(dir.path()).args(["eval", "--tasks"]).arg(&file).output().unwrap();
    assert!(out.status.code() == Some(3) && stderr(&out).contains("MODEL"), "{}", stderr(&out));
}

#[test]
fn mistakes_name_file_task_row_and_column() {
    let good = "{\"question\": \"q\", \"options\": [\"a\", \"b\"], \"label\": 1}\n";
    let with = |row: &str| format!("{good}{row}\n");
    let filters = "output_type: generate_until\nfilter_list:\n  - name: f\n    filter:\n      - function: rexeg\n";
    let cases: Vec<(String, String, Vec<&str>)> = vec![
        (CHOICE.replace("options\n", "[a, b\n"), with(""), vec!["mine.yaml", "line ", "not valid YAML"]),
        (
            CHOICE.replace("output_type: multiple_choice\n", filters),
            with(""),
            vec!["mine.yaml", "task `mine`", "filter `f`", "`rexeg`", "majority_vote"],
        ),
        (
            CHOICE.into(),
            with("{\"options\": [\"a\"], \"label\": 0}"),
            vec!["rows.jsonl: row 2", "column `question`", "task `mine`"],
        ),
        (
            CHOICE.into(),
            with("{\"question\": \"q\", \"options\": [\"a\"]}"),
            vec!["rows.jsonl: row 2", "column `label`"],
        ),
        (
            CHOICE.into(),
            with("{\"question\": \"q\", \"options\": [\"a\", \"b\"], \"label\": 2}"),
            vec!["rows.jsonl: row 2, column `label`", "task `mine`", "label 2 is outside the 2 choices"],
        ),
        (CHOICE.into(), with("{\"question\": "), vec!["rows.jsonl: row 2", "not JSON"]),
        (CHOICE.replace("label\n", "labell\n"), with(""), vec!["column `labell`", "row 1"]),
        (CHOICE.replace("output_type", "output_typ"), with(""), vec!["unknown key", "did you mean `output_type`"]),
        (
            CHOICE.replace("output_type", "output_typ") + "metric_list:\n  - metric: acc\n",
            with(""),
            vec!["unknown key", "did you mean `output_type`"],
        ),
        (
            CHOICE.into(),
            String::new(),
            vec!["no data for its `test` split", "rows.jsonl holds no rows", "hint: a row a"],
        ),
        (CHOICE.replace("{{question}}", "{{question"), with(""), vec!["`doc_to_text`", "does not parse"]),
        (
            CHOICE.replace("rows.jsonl", "gone.jsonl"),
            with(""),
            vec!["no data for its `test` split", "gone.jsonl", "--data"],
        ),
        (format!("{CHOICE}process_docs: !function utils.f\n"), with(""), vec!["Python is not run", "utils.f"]),
        (format!("{CHOICE}num_fewshot: 9\n"), with(""), vec!["9 examples"]),
    ];
    for (yaml, rows, says) in cases.into_iter().chain(mistakes_of_rows()) {
        let dir = folder(&[("mine.yaml", &yaml), ("rows.jsonl", &rows)]);
        let out = render(dir.path(), &["--tasks", dir.path().join("mine.yaml").to_str().unwrap()]);
        let text = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{yaml}\n{text}");
        for part in says {
            assert!(text.contains(part), "expected `{part}` in: {text}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let out = render(dir.path(), &["--tasks", "arc_eazy"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(stderr(&out).contains("unknown task `arc_eazy`") && stderr(&out).contains("arc_easy"), "{}", stderr(&out));
}

/// Task file, rows and what is said of them: rows that cannot be asked, or whose answers could not be scored.
fn mistakes_of_rows() -> Vec<(String, String, Vec<&'static str>)> {
    let q = |more: &str| format!("{{\"question\": \"q\"{more}}}\n");
    let with = |good: &str, bad: &str| q(good) + &q(bad);
    let choice = |from: &str, to: &str| CHOICE.replace(from, to);
    // Targets and choices that are templates: the columns they are made of.
    let letters = choice(
        "doc_to_target: label\ndoc_to_choice: options\n",
        "doc_to_target: '{{choices.label.index(answerKey)}}'\ndoc_to_choice: '{{choices.text}}'\n",
    );
    let (texts, key) =
        (", \"choices\": {\"text\": [\"a\", \"b\"], \"label\": [\"A\", \"B\"]}", ", \"answerKey\": \"B\"");
    let templates = [
        (
            choice("doc_to_target: label", "doc_to_target: '{{label}}'"),
            with(", \"options\": [\"a\", \"b\"], \"label\": 1", ", \"options\": [\"a\", \"b\"], \"label\": 2"),
            vec!["row 2, column `label`", "label 2 is outside the 2 choices"],
        ),
        (
            letters.clone(),
            with(&format!("{texts}{key}"), &format!("{texts}, \"answerKey\": \"Z\"")),
            vec!["row 2, columns `answerKey`, `choices`", "'Z' is not in ['A', 'B']"],
        ),
        (
            letters.clone(),
            with(&format!("{texts}{key}"), texts),
            vec!["row 2, column `answerKey`", "`doc_to_target` needs"],
        ),
        (
            letters,
            with(&format!("{texts}{key}"), &format!("{key}, \"choices\": {{\"text\": \"a\", \"label\": [\"B\"]}}")),
            vec!["row 2, column `choices`", "`doc_to_choice` gives `a`"],
        ),
        (
            choice("doc_to_target: label", "doc_to_target: label\ndescription: '{{about.x}}'"),
            q(", \"options\": [\"a\", \"b\"], \"label\": 1"),
            vec!["row 1, column `about`", "`description` needs"],
        ),
    ];
    // Scoring: told before a model is asked.
    let written = |metric: &str| {
        choice("output_type: multiple_choice\n", "")
            .replace("doc_to_choice: options\n", &format!("metric_list:\n  - {metric}\n"))
    };
    let (options, copa) = (
        ", \"options\": [\"a\", \"b\"], \"label\": 1",
        ", \"choice1\": \"A\", \"choice2\": \"B\", \"premise\": \"It rained.\"",
    );
    let cause = choice("doc_to_target: label", "doc_to_target: !function copa.doc_to_target")
        .replace("doc_to_choice: options", "doc_to_choice: !function copa.doc_to_choice");
    let mc2 = format!("{CHOICE}metric_list:\n  - metric: mc2\n");
    let rag = |keys: &str| {
        written("metric: exact_match")
            .replace("test_split", &format!("retrieval: {{contexts: passages, {keys}}}\ntest_split"))
    };
    let passages = ", \"label\": \"x\", \"passages\": [\"a\", \"b\"]";
    let scores = [
        (
            cause.clone(),
            with(&format!("{copa}, \"label\": 0"), &format!("{copa}, \"label\": 3")),
            vec!["row 2, column `label`", "expected 0 or 1, found 3"],
        ),
        (cause, with(&format!("{copa}, \"label\": 0"), copa), vec!["row 2, column `label`", "no such column"]),
        (format!("{CHOICE}cluster: pasage\n"), q(options), vec!["row 1, column `pasage`", "`cluster`"]),
        (
            format!("{CHOICE}cluster: passage\n"),
            with(&format!("{options}, \"passage\": 1"), options),
            vec!["row 2, column `passage`", "`cluster`"],
        ),
        (mc2.clone(), q(options), vec!["row 1, column `mc2_targets`", "`labels`"]),
        (
            mc2,
            q(&format!("{options}, \"mc2_targets\": {{\"labels\": [1]}}")),
            vec!["column `mc2_targets`", "1 labels for 2 answers"],
        ),
        (
            written("metric: numeric"),
            with(", \"label\": \"1,000\"", ", \"label\": \"many\""),
            vec!["row 2, column `label`", "`numeric`", "`many` is not a number"],
        ),
        (
            written("metric: json_equal").replace("doc_to_target: label", "doc_to_target: '{{label}}'"),
            with(", \"label\": \"{}\"", ", \"label\": \"{\""),
            vec!["row 2, column `label`", "`json_equal`", "is not JSON"],
        ),
        (
            written("metric: regex"),
            q(", \"label\": \"(\""),
            vec!["row 1, column `label`", "`regex`", "is not a pattern"],
        ),
        (
            written("{metric: json_schema, schema_column: form}"),
            with(", \"label\": 1, \"form\": {\"type\": \"object\"}", ", \"label\": 1, \"form\": {\"type\": \"thing\"}"),
            vec!["row 2, column `form`", "`json_schema`", "thing"],
        ),
        (
            written("{metric: json_schema, schema_column: form}"),
            q(", \"label\": 1"),
            vec!["row 1, column `form`", "no such column"],
        ),
        (
            rag("relevant: marks"),
            with(&format!("{passages}, \"marks\": [1, 0]"), &format!("{passages}, \"marks\": [1]")),
            vec!["row 2, column `marks`", "1 labels for 2 contexts"],
        ),
        (rag("supporting: facts"), q(passages), vec!["row 1, column `facts`", "no such column"]),
        (
            written("metric: exact_match") + "filter_list:\n  - {name: f, filter: [{function: multi_choice_regex}]}\n",
            q(", \"label\": \"x\""),
            vec!["row 1", "filter `f`", "needs rows with a list `choices`"],
        ),
    ];
    templates.into_iter().chain(scores).collect()
}

#[test]
fn what_cannot_be_scored_is_rendered_all_the_same() {
    for (keys, says) in [
        ("metric_list:\n  - metric: accuracy\n", vec!["`metric_list`", "`accuracy`", "acc_norm"]),
        ("metric_list:\n  - {metric: acc, aggregation: f1}\n", vec!["`acc`: unknown aggregation `f1`"]),
        ("process_results: !function utils.f\nmetric_list:\n  - metric: em\n", vec!["`process_results`", "utils.f"]),
    ] {
        let row = "{\"question\": \"q\", \"options\": [\"a\", \"b\"], \"label\": 1}\n";
        let dir = folder(&[("mine.yaml", &format!("{CHOICE}{keys}")), ("rows.jsonl", row)]);
        let file = dir.path().join("mine.yaml");
        assert_eq!(lines(&render(dir.path(), &["--tasks", file.to_str().unwrap()])).len(), 2);
        // Before the model is looked for, let alone read.
        let out = lowbit(dir.path()).args(["eval", "no/such/folder", "--tasks"]).arg(&file).output().unwrap();
        let text = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{text}");
        for part in says.into_iter().chain(["mine.yaml: task `mine`"]) {
            assert!(text.contains(part), "expected `{part}` in: {text}");
        }
    }
}

#[test]
fn pipelines_make_their_own_requests() {
    let retrieval = "task: rag\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n\
        retrieval: {contexts: passages}\n\
        doc_to_text: \"{% for p in passages %}{{p}}\\n{% endfor %}Question: {{question}}\\nAnswer:\"\ndoc_to_target: answer\n";
    let row = json!({"passages": ["Rain.", "Rome is in Italy."], "question": "Where is Rome?", "answer": "Italy"});
    let dir = folder(&[("rag.yaml", retrieval), ("rows.jsonl", &row.to_string())]);
    let out = lines(&render(dir.path(), &["--tasks", dir.path().join("rag.yaml").to_str().unwrap()]));
    let kinds: Vec<&str> = out.iter().map(|l| l["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["generate_until", "loglikelihood", "loglikelihood"]);
    assert_eq!(out[1]["context"], out[0]["context"]);
    assert_eq!(out[2]["context"], "Question: Where is Rome?\nAnswer:");
    assert_eq!(out[2]["continuation"], " Italy");

    let agent = "task: agent\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\nagent: {tools: tools}\n";
    let row = json!({"tools": [{"name": "f"}], "messages": [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]});
    let dir = folder(&[("agent.yaml", agent), ("rows.jsonl", &row.to_string())]);
    let file = dir.path().join("agent.yaml");
    let out = lines(&render(dir.path(), &["--tasks", file.to_str().unwrap()]));
    assert_eq!(out.len(), 2);
    let second = out[1]["context"].as_str().unwrap();
    assert!(second.starts_with("System: ") && second.ends_with("User: Tool result: done\n\nAssistant:"), "{second}");
    let chat = ok(lowbit(dir.path()).args(["eval", "demo", "--render", "--apply-chat-template", "--tasks"]).arg(&file));
    // The demo's template knows no tools: they are told in words.
    let second = &lines(&chat)[1];
    assert!(!second["context"].as_str().unwrap().contains("User: ") && second.get("tools").is_none(), "{second}");
    assert!(second["context"].as_str().unwrap().starts_with("system: You can call these tools"), "{second}");
    // One that knows them gets them as such.
    let model = dir.path().join("model");
    super::copy(&super::demo(), &model);
    let template = "{{ tools | tojson }}{% for m in messages %}|{{ m.role }} {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}|";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let chat = ok(lowbit(dir.path()).arg("eval").arg(&model).args(["--render", "--chat", "--tasks"]).arg(&file));
    let second = &lines(&chat)[1];
    assert_eq!(second["tools"], json!([{"type": "function", "function": {"name": "f"}}]));
    let context = second["context"].as_str().unwrap();
    assert!(
        context.starts_with("[{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]|user Go|assistant [{"),
        "{context}"
    );
    assert!(context.ends_with("|tool done|"), "{context}");
    assert_eq!(second["messages"][1]["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
    assert_eq!(second["messages"][2]["tool_call_id"], second["messages"][1]["tool_calls"][0]["id"]);
}
