//! `lowbit eval --judge`: grades and comparisons by a judge that follows rules, and judges that cannot be trusted or fail.

use serde_json::{Value, json};

use super::endpoint::{items, writing};
use super::standin::{Play, StandIn, chat, last};
use super::{json as read, lowbit, ok, stderr};

/// A judge by rule: grades by length; of two answers it prefers the longer, and the first where `biased`.
fn judge_says(body: &Value, biased: bool) -> Play {
    let text = last(body);
    let part = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>\n")).unwrap_or(("", ""));
        rest.split_once(&format!("\n</{tag}>")).map_or("", |r| r.0).to_owned()
    };
    if text.contains("<answer_a>") {
        let (a, b) = (part("answer_a").len(), part("answer_b").len());
        return chat(match a.cmp(&b) {
            _ if biased => "Both are fine.\nVerdict: A",
            std::cmp::Ordering::Greater => "Longer.\n**Verdict: A**",
            std::cmp::Ordering::Less => "Longer.\nVerdict: B",
            std::cmp::Ordering::Equal => "Verdict: TIE",
        });
    }
    chat(format!("It has some words.\nGrade: {}", 1 + part("answer").split_whitespace().count().min(4)))
}

/// A model that writes `n` words to each prompt; `n` by the prompt's length.
fn model(words: impl Fn(usize) -> usize + Send + Sync + 'static) -> StandIn {
    StandIn::start(move |path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ => chat(vec!["word"; words(last(body).len())].join(" ")),
    })
}

const JUDGED: &str = "metric_list:\n  - {metric: judge, rubric: 'Words count. {{n}}', votes: 3, scale: [1, 5]}\n  - {metric: judge_pairwise, rubric: 'The longer the better.', votes: 2}\n";

#[test]
fn a_judge_grades_and_compares_and_the_gate_reads_it() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 40, JUDGED);
    let (long, short) = (model(|_| 4), model(|n| if n % 4 == 0 { 4 } else { 2 }));
    let judge = StandIn::start(|path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ => judge_says(body, false),
    });
    let run = |out: &str, judge: &str, own: &StandIn, other: &StandIn| {
        let mut c = lowbit(dir);
        c.args(["eval", "--endpoint", &own.url, "--reference-endpoint", &other.url, "--judge", judge, "--tasks"]);
        c.arg(&task).arg("-o").arg(dir.join(out)).output().unwrap()
    };
    let out = run("e.json", &judge.url, &short, &long);
    assert!(out.status.success(), "{}", stderr(&out));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("prefers first") && text.contains("writing/judge_pairwise"), "{text}");
    let record = read(&dir.join("e.json"));
    let worse = items(dir, "e").iter().filter(|i| i["metrics"]["judge"] == 0.5).count();
    assert!((10..40).contains(&worse), "{worse} of 40 answers are shorter");
    let grades = &record["judges"]["writing/judge"];
    assert_eq!((&grades["items"], &grades["unjudged"], &grades["unreadable"]), (&json!(40), &json!(0), &json!(0)));
    assert_eq!(
        (&grades["answers"], &grades["vote_kappa"], &grades["unanimous"]),
        (&json!(240), &json!(1.0), &json!(1.0))
    );
    let means = (1.0, (40 - worse) as f64 / 40.0 + 0.5 * worse as f64 / 40.0);
    let scored = &record["tasks"]["writing"];
    assert!((scored["reference"]["judge"].as_f64().unwrap() - means.0).abs() < 1e-12);
    assert!((scored["judge"].as_f64().unwrap() - means.1).abs() < 1e-12);
    let pairs = &record["judges"]["writing/judge_pairwise"]["pairwise"];
    assert_eq!((&pairs["losses"], &pairs["wins"], &pairs["identical"]), (&json!(worse), &json!(0), &json!(40 - worse)));
    assert_eq!((&pairs["order_consistent"], &pairs["first_position"]["value"]), (&json!(1.0), &json!(0.5)));
    let votes = std::fs::read_to_string(dir.join("e.judge.jsonl")).unwrap();
    assert_eq!(votes.lines().count(), 240 + 4 * worse);
    assert!(votes.lines().any(|l| l.contains("\"verdict\":\"reference\"") && l.contains("Longer")));
    // Rubrics are templates, votes have seeds of their own, and equal questions are asked once.
    let asked = judge.bodies("/v1/chat/completions");
    assert!(asked.iter().any(|b| last(b).contains("Words count. 7")), "no rubric with its row");
    let mut seeds: Vec<String> = asked.iter().map(|b| format!("{} {}", b["seed"], last(b))).collect();
    seeds.sort();
    seeds.dedup();
    assert_eq!(seeds.len(), asked.len());
    assert!(asked.iter().all(|b| b["temperature"] == 0.7 && b["messages"][0]["role"] == "system"));
    // A loss of most items is a regression, by grades and by comparison; a model against itself is none.
    for metric in ["judge", "judge_pairwise"] {
        let out = lowbit(dir)
            .arg("gate")
            .arg(dir.join("e.json"))
            .args(["--metric", &format!("writing={metric}")])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.code() == Some(1) && text.contains(metric), "{text}{}", stderr(&out));
    }
    let out = lowbit(dir)
        .arg("gate")
        .args(["e.json", "e.json"].map(|f| dir.join(f)))
        .args(["--metric", "writing=judge_pairwise"])
        .output()
        .unwrap();
    assert!(out.status.code() == Some(3) && stderr(&out).contains("its own run"), "{}", stderr(&out));
    assert!(run("same.json", &judge.url, &long, &long).status.success());
    let same = read(&dir.join("same.json"));
    assert_eq!(same["judges"]["writing/judge_pairwise"]["pairwise"]["identical"], 40);
    let out = lowbit(dir).arg("gate").arg(dir.join("same.json")).args(["--margin", "20"]).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
}

#[test]
fn a_judge_that_cannot_be_trusted_is_found_out() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 20, JUDGED);
    let (long, short) = (model(|_| 4), model(|_| 2));
    // Always the first answer; no grade for answers of two words.
    let judge = StandIn::start(|path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ if last(body).contains("<answer>\nword word\n</answer>") => chat("I cannot grade this.\nGrade: good"),
        _ => judge_says(body, true),
    });
    let run = |out: &str, more: &[&str]| {
        let mut c = lowbit(dir);
        c.args(["eval", "--endpoint", &short.url, "--tasks"]).arg(&task).arg("-o").arg(dir.join(out)).args(more);
        c.output().unwrap()
    };
    let out = run("e.json", &["--reference-endpoint", &long.url, "--judge", &judge.url]);
    assert!(out.status.success(), "{}", stderr(&out));
    let record = read(&dir.join("e.json"));
    let pairs = &record["judges"]["writing/judge_pairwise"]["pairwise"];
    assert_eq!(
        (&pairs["first_position"]["value"], &pairs["order_consistent"], &pairs["ties"]),
        (&json!(1.0), &json!(0.0), &json!(20))
    );
    assert!(pairs["first_position"]["low"].as_f64().unwrap() > 0.9 && pairs["order_kappa"] == 0.0, "{pairs}");
    let grades = &record["judges"]["writing/judge"];
    assert_eq!((&grades["unjudged"], &grades["unreadable"], &grades["answers"]), (&json!(20), &json!(60), &json!(120)));
    assert!(
        record["tasks"]["writing"].get("judge").is_none() && record["tasks"]["writing"]["reference"]["judge"] == 1.0
    );
    let gate = |more: &[&str]| lowbit(dir).arg("gate").arg(dir.join("e.json")).args(more).output().unwrap();
    let out = gate(&["--metric", "writing=judge"]);
    assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
    // What is missing is asked for.
    for (more, says) in [
        (&["--reference-endpoint", &long.url][..], "--judge URL"),
        (&["--judge", &judge.url], "--reference"),
        (&["--judge", &judge.url, "--reference-endpoint", &long.url, "--shard", "1/2"], "--shard"),
    ] {
        let out = run("f.json", more);
        assert!(out.status.code() == Some(3) && stderr(&out).contains(says), "{says}: {}", stderr(&out));
    }
    let plain = writing(dir, 3, "");
    let out = lowbit(dir)
        .args(["eval", "--endpoint", &short.url, "--judge", &judge.url, "--tasks"])
        .arg(&plain)
        .output()
        .unwrap();
    assert!(out.status.code() == Some(3) && stderr(&out).contains("no task has"), "{}", stderr(&out));
}

#[test]
fn a_judge_that_failed_goes_on_where_it_stopped() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 6, "metric_list:\n  - {metric: judge, rubric: 'Row {{n}}.', votes: 2}\n");
    let own = model(|_| 3);
    let judge = StandIn::start(|path, body, before| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ if last(body).contains("Row 4.") && before == 0 => Play::Status(403, "", "{\"detail\": \"quota\"}".into()),
        _ => judge_says(body, false),
    });
    let run = || {
        let mut c = lowbit(dir);
        c.args(["eval", "--endpoint", &own.url, "--judge", &judge.url, "--concurrency", "1", "--tasks"]).arg(&task);
        c.arg("-o").arg(dir.join("e.json")).output().unwrap()
    };
    let out = run();
    let says = stderr(&out);
    assert!(
        out.status.code() == Some(3) && says.contains("403: quota") && says.contains("document 4 of writing (judge)"),
        "{says}"
    );
    assert!(!dir.join("e.json").exists());
    let out = run();
    // The other vote on that row has a seed of its own, and is refused once, too.
    assert!(
        stderr(&out).contains("6 of 6 requests answered before") && out.status.code() == Some(3),
        "{}",
        stderr(&out)
    );
    assert!(run().status.success());
    assert_eq!(own.bodies("/v1/chat/completions").len(), 6);
    assert_eq!(judge.bodies("/v1/chat/completions").len(), 12 + 2);
    assert!(!dir.join("e.judge.journal").exists() && !dir.join("e.journal").exists());
    assert_eq!(read(&dir.join("e.json"))["tasks"]["writing"]["judge"], 0.75);
}

#[test]
fn a_local_model_is_judged_too() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let task = writing(dir, 4, "metric_list:\n  - {metric: judge, rubric: 'Words.', question: 'Go on: {{q}}'}\n");
    let judge = StandIn::start(|path, body, _| match path {
        "/v1/models" => Play::Json(Value::Null),
        _ => judge_says(body, false),
    });
    let mut c = lowbit(dir);
    c.args(["--quiet", "--device", "cpu", "eval", "demo", "--judge", &judge.url, "--judge-model", "j", "--tasks"]);
    ok(c.arg(&task).arg("-o").arg(dir.join("e.json")));
    let asked = judge.bodies("/v1/chat/completions");
    let wrote = items(dir, "e")[0]["responses"][0].as_str().unwrap().to_owned();
    assert!(asked.len() == 4 && asked.iter().any(|b| last(b).contains(&format!("<answer>\n{wrote}\n</answer>"))));
    assert!(asked.iter().all(|b| b["model"] == "j" && b["temperature"] == 0.0 && last(b).contains("Go on: ")));
    assert!(asked.iter().all(|b| last(b).contains("<reference_answer>")));
    assert_eq!(read(&dir.join("e.json"))["judges"]["writing/judge"]["judge"], format!("j at {}", judge.url));
    assert!(!dir.join("e.judge.journal").exists());
}
