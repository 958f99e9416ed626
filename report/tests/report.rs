//! The report as a whole, from synthetic records.

mod records;

use std::fs;
use std::path::Path;

use lowbit_quantize::record::ExpertCoverage;
use lowbit_report::{Records, ReportError, Variant, html, json, load, load_all, markdown, write};
use records::{all, bench, capacity, eval, gate, load_record, plan, quantize, several, speculation};
use serde_json::json as value;

/// The page of one directory. The template engine escapes slashes too.
fn page(r: Records) -> String {
    html(&[r.into()]).unwrap().replace("&#x2f;", "/")
}

fn text(r: Records) -> String {
    markdown(&[r.into()])
}

fn put(dir: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(dir.join(name), text).unwrap();
}

#[test]
fn page_has_the_key_figures() {
    let page = page(all());
    // To look at the pages: LOWBIT_REPORT_OUT=DIR cargo test --release --workspace --test report
    if let Some(dir) = std::env::var_os("LOWBIT_REPORT_OUT") {
        fs::create_dir_all(&dir).unwrap();
        fs::write(Path::new(&dir).join("one.html"), html(&[all().into()]).unwrap()).unwrap();
        fs::write(Path::new(&dir).join("several.html"), html(&several()).unwrap()).unwrap();
        fs::write(Path::new(&dir).join("several.md"), markdown(&several())).unwrap();
        fs::write(Path::new(&dir).join("one.md"), text(all())).unwrap();
    }
    for figure in [
        "Qwen/Qwen2.5-0.5B",
        "w4a16-g128-asym",
        "2.13× smaller",
        "993 MB → 466 MB, exact",
        "0.0234 nats/token",
        "95 % CI 0.0223 – 0.0245, 16,384 tokens",
        "95 % CI 2.09 – 2.18, tg128, batch 1",
        "93.12 [92.71 – 93.53]",
        "gptq-2048",
        "damping raised",
        "69.3 %",
        "21.3 GB/s",
        "1,642",
        "c4-validation.txt",
        "act_order = true",
        "2025-12-31 23:59:59 UTC",
        "margin 1.00",
        "Right with float, wrong when quantized: 2",
        "Wrong with float, right when quantized: 1",
        "roofline, 21.3 GB/s",
        "layers.0.mlp.down_proj",
        "probability of the token 67 % → 5.5 %",
        "limit: ttft_p95&lt;=400",
        "1.32× [1.32 – 1.32]",
        "✓ identical",
        "✓ cheapest",
        "✗ accuracy: regression",
    ] {
        assert!(page.contains(figure), "{figure}");
    }
    assert!(!page.contains("NaN") && !page.contains("Not among the records"));
}

#[test]
fn experts_have_their_coverage() {
    let mut q = quantize();
    assert!(!page(Records { quantize: Some(q.clone()), ..Records::default() }).contains("tokens of experts"));
    q.experts = vec![ExpertCoverage::new(7, vec![12_345, 0, 96, 4096], 2048)];
    let records = || Records { quantize: Some(q.clone()), ..Records::default() };
    let (page, text) = (page(records()), text(records()));
    assert!(page.contains("Calibration tokens of experts") && page.contains("starved"));
    // Block, experts, fewest, median, needed, starved, dead.
    assert!(text.contains("| 7 | 4 | 0 | 96 | 2,048 | 2 | 1 |"), "{text}");
}

#[test]
fn the_verdict_comes_first() {
    let order = |page: &str, marks: &[&str]| {
        let places: Vec<usize> =
            marks.iter().map(|m| page.find(m).unwrap_or_else(|| panic!("{m} is missing"))).collect();
        assert!(places.is_sorted(), "{marks:?}: {places:?}");
    };
    let regressed = Records { gate: Some(gate(4000, 400, 20, None)), ..all() };
    let passed = Records { gate: Some(gate(40_000, 20, 20, None)), ..all() };
    let unsure = Records { gate: Some(gate(400, 20, 10, None)), ..all() };
    for (r, word, mark) in [
        (regressed, "Regression", "❌"),
        (passed, "Pass", "✅"),
        (unsure, "Inconclusive", "❔"),
        (Records { gate: None, ..all() }, "Not gated", "➖"),
    ] {
        let reason = r.gate.as_ref().map_or("no verdict was asked for", |g| g.reason.get(1..).unwrap()).to_owned();
        let kind = format!("class=\"verdict {}\"", if mark == "➖" { "none".into() } else { word.to_lowercase() });
        let (tasks, section) =
            if r.gate.is_some() { ("## Tasks", "id=\"tasks\"") } else { ("## Drift", "id=\"accuracy\"") };
        let verdict = format!("**{mark} {word}.**");
        order(&text(r.clone()), &[&verdict, "| Size |", "| Drift |", "| Decode speed-up |", tasks, "## Provenance"]);
        order(&page(r), &[&kind, &reason, "class=\"tile\"", "id=\"triangle\"", section, "id=\"provenance\""]);
    }
    // Without a verdict the page says what brings one.
    let command = |eval: Option<lowbit_eval::record::EvalRecord>| page(Records { gate: None, eval, ..all() });
    assert!(command(all().eval).contains("<code>lowbit gate eval.json -o gate.json</code>"));
    assert!(command(Some(eval())).contains("--max-kl NATS"));
    assert!(command(None).contains("--tasks arc_easy,hellaswag"));
    // A limit on drift is judged and shown beside the tasks.
    let limited = Records { gate: Some(gate(4000, 20, 20, Some(0.01))), ..all() };
    assert!(page(limited.clone()).contains("Limits on drift") && text(limited).contains("| KL | 0.0234"));
}

#[test]
fn variants_are_compared_in_one_page() {
    let page = html(&several()).unwrap();
    assert_eq!(page, html(&several()).unwrap());
    for name in ["w8", "w4", "w3"] {
        assert!(page.contains(&format!("<th scope=\"row\">{name}</th>")), "{name}");
        assert!(page.contains(&format!("{name}: ")), "{name}");
    }
    assert!(page.contains("1.31 $&#x2f;M tokens") || page.contains("1.31 $/M tokens"));
    assert_eq!(page.matches("class=\"disc ").count(), 3, "every variant has a price, so the chart has no float model");
    assert!(page.matches("Relative error by layer, w").count() > 2);
    let short = markdown(&several());
    assert!(short.contains("| w3 | ") && short.contains("## Tasks, w4") && short.contains("## Capacity"));
    let data = json(&several());
    assert_eq!(data["variants"][2]["name"], "w3");
    // Other references do not compare.
    let mut other = several();
    other[1].records.eval.as_mut().unwrap().provenance.reference_sha256 = Some("f".repeat(64));
    assert!(html(&other).unwrap().contains("compared with different references"));
}

#[test]
fn pages_stay_below_a_mebibyte() {
    let deep = |mut r: Records, blocks: usize| {
        if let Some(q) = &mut r.quantize {
            q.layers = (0..blocks * 7)
                .map(|i| {
                    let mut l = q.layers[i % 7].clone();
                    let end = l.name.split_once(".0.").map(|e| e.1.to_owned()).unwrap();
                    (l.name, l.block) = (format!("model.layers.{}.{end}", i / 7), Some(i / 7));
                    l.events = vec!["damping raised to 0.1 after a failed Cholesky".into()];
                    l
                })
                .collect();
        }
        r
    };
    let one = page(deep(all(), 126));
    assert!(one.len() < 1 << 20 && one.contains("more are in report.json"), "{}", one.len());
    let many: Vec<Variant> =
        (0..12).map(|i| Variant { name: format!("variant-{i}"), records: deep(all(), 80) }).collect();
    let page = html(&many).unwrap();
    assert!(page.len() < 1 << 20, "{}", page.len());
}

#[test]
fn page_fetches_nothing_and_is_marked_up() {
    for page in [html(&[all().into()]).unwrap(), html(&several()).unwrap()] {
        let page = page.replace("&#x2f;", "/");
        for fetch in ["http://", "https://", "<script", "<img", "@import", "url(", " src="] {
            assert!(!page.contains(fetch), "{fetch}");
        }
        let charts = page.matches("<svg viewBox").count() - page.matches("aria-hidden=\"true\"><path").count();
        assert_eq!(page.matches("role=\"img\"><title>").count(), charts);
        assert_eq!(page.matches("</title><desc>").count(), charts);
        assert_eq!(page.matches("<table").count(), page.matches("<caption>").count());
        for landmark in
            ["<header>", "<main id=\"main\">", "<nav aria-label", "<footer>", "lang=\"en\"", "class=\"skip\""]
        {
            assert!(page.contains(landmark), "{landmark}");
        }
        // Every link of the page leads somewhere in it.
        for target in page.split("href=\"#").skip(1).filter_map(|s| s.split('"').next()) {
            assert!(page.contains(&format!("id=\"{target}\"")), "{target}");
        }
    }
}

#[test]
fn names_are_escaped() {
    let mut r = all();
    let evil = "x\"'><script>alert(1)</script>";
    if let Some(q) = &mut r.quantize {
        q.provenance.model = evil.into();
        q.scheme = evil.into();
        q.sizes[0].component = evil.into();
        q.layers[0].name = format!("{evil}q_proj");
        q.layers[0].events.push(evil.into());
        q.options.insert(evil.into(), value!(evil));
    }
    if let Some(e) = &mut r.eval {
        e.perplexities[0].source_sha256 = evil.into();
        e.worst_tokens[0].token = evil.into();
        e.worst_tokens[0].candidate_choices[0].token = evil.into();
        e.blame.as_mut().unwrap().suspects[0].module = evil.into();
        if let Some(k) = &mut e.kl {
            k.percentiles[0].0 = evil.into();
        }
    }
    if let Some(g) = &mut r.gate {
        g.reason = evil.into();
        g.tasks[0].name = evil.into();
        g.flips[0].task = evil.into();
    }
    if let Some(b) = &mut r.bench {
        b.rows[0].test = evil.into();
        b.rows[0].model = evil.into();
    }
    r.loads[0].0 = evil.into();
    r.loads[0].1.stages[0].profile = evil.into();
    r.capacity.as_mut().unwrap().variants[0].name = evil.into();
    let twice = [Variant { name: evil.into(), records: r.clone() }, Variant { name: "b".into(), records: r }];
    for variants in [&twice[..1], &twice] {
        let page = html(variants).unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
        assert!(!page.contains("x\"'>"));
        assert!(!markdown(variants).contains("<script"));
    }
}

#[test]
fn what_there_is_no_record_of_has_no_section() {
    let sections = |r: Records| -> Vec<String> {
        let page = page(r);
        assert!(!page.contains("NaN"));
        page.split("<section id=\"").skip(1).filter_map(|s| s.split('"').next()).map(str::to_owned).collect()
    };
    let only = |f: &dyn Fn(&mut Records)| {
        let mut r = Records::default();
        f(&mut r);
        r
    };
    assert_eq!(sections(only(&|_| ())), ["provenance"]);
    assert_eq!(sections(only(&|r| r.plan = Some(plan()))), ["size", "provenance"]);
    assert_eq!(sections(only(&|r| r.quantize = Some(quantize()))), ["size", "layers", "provenance"]);
    assert_eq!(sections(only(&|r| r.eval = Some(eval()))), ["accuracy", "provenance"]);
    assert_eq!(sections(only(&|r| r.gate = Some(gate(400, 9, 9, None)))), ["tasks", "provenance"]);
    assert_eq!(sections(only(&|r| r.bench = Some(bench()))), ["throughput", "provenance"]);
    assert_eq!(sections(only(&|r| r.capacity = Some(capacity()))), ["capacity", "provenance"]);
    let load = only(&|r| r.loads = vec![(String::new(), load_record(0.1))]);
    assert_eq!(sections(load), ["serving", "provenance"]);
    assert_eq!(sections(only(&|r| r.speculation = Some(speculation()))), ["speculation", "provenance"]);
    assert_eq!(
        sections(all()),
        [
            "triangle",
            "tasks",
            "accuracy",
            "tokens",
            "size",
            "layers",
            "blame",
            "throughput",
            "serving",
            "speculation",
            "capacity",
            "provenance"
        ]
    );
    let planned = only(&|r| r.plan = Some(plan()));
    assert!(
        page(planned.clone()).contains("Size (planned)")
            && page(planned).contains("Not among the records: quantize.json")
    );
    assert_eq!(json(&[Records::default().into()])["missing"].as_array().map(Vec::len), Some(5));
}

#[test]
fn empty_series_and_odd_numbers_pass() {
    let mut r = all();
    if let (Some(q), Some(e), Some(b), Some(g)) = (&mut r.quantize, &mut r.eval, &mut r.bench, &mut r.gate) {
        q.layers.clear();
        q.sizes.clear();
        q.after_bytes = 0;
        e.perplexities.clear();
        if let Some(k) = &mut e.kl {
            k.percentiles.clear();
            k.mean = f64::NAN;
        }
        if let Some(blame) = &mut e.blame {
            let endless = &mut blame.suspects[0].regained;
            (endless.low, endless.high) = (f64::NEG_INFINITY, f64::INFINITY);
        }
        b.rows.clear();
        b.speed_ups.clear();
        b.latency.clear();
        b.memory.clear();
        b.bandwidth_bytes_per_second = f64::NAN;
        g.pool.as_mut().unwrap().loss = f64::NAN;
        g.tasks.clear();
    }
    r.loads[0].1.stages.clear();
    let shown = page(r.clone());
    assert!(!shown.contains("NaN") && !shown.contains(">inf") && !shown.contains("[-inf"));
    assert!(!text(r).contains("NaN"));
}

#[test]
fn what_does_not_fit_together_is_said() {
    let mut r = all();
    if let (Some(e), Some(g)) = (&mut r.eval, &mut r.gate) {
        e.provenance.reference_sha256 = Some("f".repeat(64));
        g.provenance.unix_time = e.provenance.unix_time - 1;
    }
    if let Some(s) = &mut r.speculation {
        s.provenance.reference_sha256 = Some("f".repeat(64));
    }
    let shown = page(r);
    assert!(shown.contains("eval.json compares with another reference"));
    assert!(shown.contains("the verdict is on an earlier evaluation"));
    assert!(shown.contains("speculation.json is about another draft"));
}

#[test]
fn directory_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    assert!(matches!(load(at), Err(ReportError::NoRecords { .. })));
    put(at, "quantize.json", serde_json::to_vec(&quantize()).unwrap());
    put(at, "eval.json", serde_json::to_vec(&eval()).unwrap());
    put(at, "bench.json", serde_json::to_vec(&bench()).unwrap());
    put(at, "gate.json", serde_json::to_vec(&gate(400, 9, 9, None)).unwrap());
    put(at, "load.json", serde_json::to_vec(&load_record(0.1)).unwrap());
    put(at, "load-float.json", serde_json::to_vec(&load_record(0.2)).unwrap());
    put(at, "speculation.json", serde_json::to_vec(&speculation()).unwrap());
    let dirs = [at.to_owned()];
    let written = write(&dirs, at).unwrap();
    assert_eq!(written, ["report.html", "report.md", "report.json"].map(|n| at.join(n)));
    assert_eq!(fs::read_dir(at).unwrap().count(), 10);
    let bytes = fs::read(at.join("report.html")).unwrap();
    write(&dirs, at).unwrap();
    assert!(fs::read(at.join("report.html")).unwrap() == bytes, "the same records, other bytes");
    let data: serde_json::Value = serde_json::from_slice(&fs::read(at.join("report.json")).unwrap()).unwrap();
    assert_eq!(data["missing"], value!(["plan.json"]));
    assert_eq!(data["headline"]["decode_speed_up"]["batch"], 1);
    assert_eq!(data["headline"]["verdict"], data["gate"]["verdict"]);
    assert_eq!(data["speculation"]["acceptance_rate"], 0.6);
    assert_eq!(data["loads"]["float"]["stages"][0]["requests"], value!([]));
    assert!(fs::read_to_string(at.join("report.md")).unwrap().contains("| total | 993 MB | 466 MB | 2.13× |"));

    // Several directories are told apart by the ends of their paths, and written where asked.
    let more: Vec<_> = ["a/out", "b/out", "c"].map(|n| at.join(n)).to_vec();
    for dir in &more {
        fs::create_dir_all(dir).unwrap();
        fs::copy(at.join("eval.json"), dir.join("eval.json")).unwrap();
    }
    let names: Vec<String> = load_all(&more).unwrap().into_iter().map(|v| v.name).collect();
    assert_eq!(names, ["a/out", "b/out", "c"]);
    assert_eq!(write(&more, &at.join("all")).unwrap()[0], at.join("all/report.html"));

    let mut stale = gate(400, 9, 9, None);
    stale.provenance.model_sha256 = "e".repeat(64);
    put(&more[0], "gate.json", serde_json::to_vec(&stale).unwrap());
    let text = load(&more[0]).unwrap_err().to_string();
    assert!(text.starts_with("eval.json and gate.json are about different checkpoints"), "{text}");

    let mut other = bench();
    other.provenance.model_sha256 = "e".repeat(64);
    put(at, "bench.json", serde_json::to_vec(&other).unwrap());
    let text = load(at).unwrap_err().to_string();
    assert!(text.contains(&"b".repeat(64)) && text.contains(&"e".repeat(64)), "{text}");

    put(at, "load-float.json", "{}");
    put(at, "bench.json", serde_json::to_vec(&bench()).unwrap());
    let text = load(at).unwrap_err().to_string();
    assert!(text.contains("load-float.json:1:2: missing field"), "{text}");
    put(at, "bench.json", "{\n  \"schema\": 1,\n  oops\n}");
    let text = load(at).unwrap_err().to_string();
    assert!(text.contains("bench.json:3:3: "), "{text}");
}
