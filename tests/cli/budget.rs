//! A budget of bits, recipes, and the memory that a plan says.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{demo, json, lowbit, ok, root, stderr};

fn quantize(tmp: &Path, out: &Path, more: &[&str]) -> Command {
    let mut c = lowbit(tmp);
    c.args(["--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(out).args(more);
    c
}

fn calibration() -> String {
    root().join("assets/demo-text/evaluation.txt").display().to_string()
}

fn bytes(record: &Value) -> u64 {
    record["after_bytes"].as_u64().unwrap()
}

#[test]
fn a_budget_beats_one_scheme_of_the_same_size() {
    let tmp = tempfile::tempdir().unwrap();
    let text = calibration();
    let data = ["--calib", &text, "--samples", "32", "--seq-len", "128"];
    let (uniform, mixed) = (tmp.path().join("uniform"), tmp.path().join("mixed"));
    ok(quantize(tmp.path(), &uniform, &["--group-size", "64", "--scheme", "w3a16"]).args(data));
    ok(quantize(tmp.path(), &mixed, &["--bits", "3.25"]).args(data));
    let (a, b) = (json(&uniform.join("quantize.json")), json(&mixed.join("quantize.json")));
    assert!(bytes(&b) <= bytes(&a), "{} {}", bytes(&b), bytes(&a));

    // Units of fused linears have one scheme, and the record says why each was chosen.
    let budget = &b["budget"];
    let curves = budget["curves"].as_array().unwrap();
    assert_eq!(curves.len(), 4 * 4);
    let of = |module: &str| {
        let layers = b["layers"].as_array().unwrap();
        layers.iter().find(|l| l["name"] == module).map(|l| l["scheme"].as_str().unwrap().to_string())
    };
    for c in curves {
        let chosen = &c["points"][c["chosen"].as_u64().unwrap() as usize];
        for m in c["modules"].as_array().unwrap() {
            assert_eq!(of(m.as_str().unwrap()).as_deref(), chosen["scheme"].as_str());
        }
        assert!(c["points"].as_array().unwrap().len() > 4, "{c}");
    }
    assert!(budget["bits_per_weight"].as_f64().unwrap() <= 3.25);
    assert!(budget["expected_kl"].as_f64() < budget["uniform"]["kl"].as_f64());
    ok(lowbit(tmp.path()).arg("verify").arg(&mixed).arg("--original").arg(demo()));

    // Another text than the calibration's.
    let other = tmp.path().join("other.txt");
    std::fs::copy(root().join("README.md"), &other).unwrap();
    let kl = |model: &Path, name: &str| {
        let out = tmp.path().join(name);
        let mut c = lowbit(tmp.path());
        c.arg("eval").arg(model).arg("--reference").arg(demo()).arg("--kl").arg(&other).args([
            "--kl-window",
            "256",
            "--limit",
            "4",
        ]);
        ok(c.arg("-o").arg(&out));
        json(&out)["kl"]["mean"].as_f64().unwrap()
    };
    let (u, m) = (kl(&uniform, "u.json"), kl(&mixed, "m.json"));
    assert!(m <= 0.9 * u, "mixed {m}, uniform {u}");

    // The measurement is kept: a plan over another budget needs no pass, and its text names each choice.
    let mut plan = lowbit(tmp.path());
    plan.args(["--device", "cpu", "plan"]).arg(demo()).args(data).args([
        "--size",
        "2.2MB",
        "--head",
        "auto",
        "--embedding",
        "keep",
    ]);
    let plan = ok(&mut plan);
    let said = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(said.contains("budget of") && said.contains("block 3") && said.contains("lm_head"), "{said}");
    let none = quantize(tmp.path(), &tmp.path().join("none"), &["--bits", "1.5"]).args(data).output().unwrap();
    assert_eq!(none.status.code(), Some(3));
    assert!(stderr(&none).contains("smallest candidates need"), "{}", stderr(&none));
}

#[test]
fn a_recipe_runs_again() {
    let tmp = tempfile::tempdir().unwrap();
    let (a, b, c) = (tmp.path().join("a"), tmp.path().join("b"), tmp.path().join("c"));
    ok(&mut quantize(
        tmp.path(),
        &a,
        &["--method", "rtn", "--group-size", "32", "--scheme", "w3a16", "--ignore", "re:.*down_proj"],
    ));
    let recipe = a.join("recipe.toml");
    ok(quantize(tmp.path(), &b, &[]).arg("--recipe").arg(&recipe));
    for file in ["model.safetensors", "config.json", "recipe.toml"] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file}");
    }
    // What is typed wins.
    ok(quantize(tmp.path(), &c, &["--scheme", "w8a16"]).arg("--recipe").arg(&recipe));
    assert_eq!(json(&c.join("quantize.json"))["scheme"], "w8a16-g32");

    let yaml = tmp.path().join("recipe.yaml");
    let text = "s:\n  m:\n    QuantizationModifier: {targets: [Linear], scheme: W8A16, ignore: [lm_head]}\n";
    std::fs::write(&yaml, text).unwrap();
    ok(quantize(tmp.path(), &tmp.path().join("d"), &[]).arg("--recipe").arg(&yaml));
    let d = json(&tmp.path().join("d/quantize.json"));
    assert_eq!((&d["scheme"], &d["method"]), (&"w8a16-channel".into(), &"rtn".into()));
    std::fs::write(&yaml, text.replace("W8A16", "W4A8")).unwrap();
    let refused = quantize(tmp.path(), &tmp.path().join("e"), &[]).arg("--recipe").arg(&yaml).output().unwrap();
    assert_eq!(refused.status.code(), Some(3));
    let said = stderr(&refused);
    assert!(said.contains("recipe.yaml") && said.contains("scheme W4A8") && said.contains("hint:"), "{said}");
}

#[test]
fn what_a_budget_cannot_choose_is_refused_before_it_measures() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, said) in [
        (&["--module", "re:.*down_proj=w8a16:64"][..], "a budget chooses the scheme of every linear"),
        (&["--format", "awq"], "awq holds one scheme, a budget needs several"),
        (&["--format", "gguf", "--scheme", "q4_0"], "gguf holds one scheme, a budget needs several"),
    ] {
        let mut plan = lowbit(tmp.path());
        // A text that is not there would be missed first.
        plan.arg("plan").arg(demo()).args(["--bits", "4", "--calib", "absent.txt"]).args(args);
        let out = plan.output().unwrap();
        let text = stderr(&out);
        assert!(out.status.code() == Some(3) && text.contains(said) && text.contains("hint:"), "{args:?}: {text}");
    }
}

#[test]
fn a_budget_leaves_room_for_scales_of_the_cache() {
    let tmp = tempfile::tempdir().unwrap();
    let text = calibration();
    let out = tmp.path().join("out");
    let args = ["--bits", "4.5", "--kv-scheme", "int8", "--calib", &text, "--samples", "8", "--seq-len", "128"];
    ok(&mut quantize(tmp.path(), &out, &args));
    ok(lowbit(tmp.path()).arg("verify").arg(&out).arg("--original").arg(demo()));
    let q = &json(&out.join("config.json"))["quantization_config"];
    assert_eq!(q["kv_cache_scheme"]["type"], "int");
}

/// Constants of the estimate are those of a release build, and threads and allocator add what nobody can say: a small model has a floor.
#[test]
fn quantizing_takes_the_memory_that_the_plan_says() {
    let tmp = tempfile::tempdir().unwrap();
    let text = tmp.path().join("text.txt");
    std::fs::write(&text, std::fs::read_to_string(calibration()).unwrap().repeat(4)).unwrap();
    let text = text.display().to_string();
    let all = ["--calib", &text, "--samples", "64", "--seq-len", "256"];
    let cases: [(&str, &[&str]); 5] = [("rtn", &[]), ("hqq", &[]), ("gptq", &all), ("fast", &all), ("best", &all)];
    let mut found = Vec::new();
    for (method, data) in cases {
        let args = ["--group-size", "64", "--method", method];
        let mut plan = lowbit(tmp.path());
        plan.args(["--device", "cpu", "--threads", "2", "--quiet", "--json", "plan"]).arg(demo()).args(args).args(data);
        let plan: Value = serde_json::from_slice(&ok(&mut plan).stdout).unwrap();
        let out = tmp.path().join(method);
        ok(quantize(tmp.path(), &out, &args).args(data).args(["--threads", "2", "--quiet"]));
        let said = plan["peak_memory_bytes"].as_u64().unwrap() as f64;
        let taken = json(&out.join("quantize.json"))["peak_rss_bytes"].as_u64().unwrap() as f64;
        eprintln!("{method}: planned {:.1} MB, taken {:.1} MB", said / 1e6, taken / 1e6);
        let floor = match (cfg!(debug_assertions), data.is_empty()) {
            (true, _) => 48e6,
            (false, true) => 4e6,
            (false, false) => 16e6,
        };
        assert!((said - taken).abs() <= (0.1 * taken).max(floor), "{method}: planned {said}, taken {taken}");
        // What is written is what was planned, to the byte.
        assert_eq!(plan["after_bytes"], json(&out.join("quantize.json"))["after_bytes"], "{method}");
        found.push((said, taken));
    }
    let [rtn, _, gptq, _, best] = found[..] else { panic!("{found:?}") };
    assert!(rtn.0 < gptq.0 && gptq.0 < best.0 && rtn.1 < gptq.1 && gptq.1 < best.1, "{found:?}");
}
