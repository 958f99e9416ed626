//! The GPU path on the host gives the CPU's codes and perplexity.

use std::path::Path;

use super::{demo, json, lowbit, ok, root};

/// A model (`model`) and its perplexity on 128 tokens (`eval.json`).
fn run(tmp: &Path, device: &str) -> std::path::PathBuf {
    let out = tmp.join(device);
    std::fs::create_dir(&out).unwrap();
    let command = |name: &str| {
        let mut c = lowbit(tmp);
        c.args(["--quiet", "--device", device, "--arithmetic", "reproducible", name]);
        c
    };
    let mut c = command("quantize");
    c.arg(demo()).arg("-o").arg(out.join("model"));
    ok(c.args(["--calib", "self", "--samples", "4", "--seq-len", "48", "--group-size", "64"]));
    let mut c = command("eval");
    c.arg(out.join("model")).arg("--ppl").arg(root().join("assets/demo-text/evaluation.txt"));
    ok(c.args(["--protocol", "gptq-128", "--limit", "1", "-o"]).arg(out.join("eval.json")));
    out
}

/// Bytes of the tensors whose name ends in `weight_packed`, in the order of the file.
fn codes(dir: &Path) -> Vec<u8> {
    let file = std::fs::read(dir.join("model/model.safetensors")).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: serde_json::Value = serde_json::from_slice(header).unwrap();
    let mut places: Vec<(usize, usize)> = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| name.ends_with("weight_packed"))
        .map(|(_, t)| {
            let at = |i: usize| t["data_offsets"][i].as_u64().unwrap() as usize;
            (at(0), at(1))
        })
        .collect();
    places.sort_unstable();
    assert_eq!(places.len(), 28);
    places.into_iter().flat_map(|(a, b)| data[a..b].to_vec()).collect()
}

#[test]
fn the_emulated_gpu_writes_the_cpus_codes() {
    let tmp = tempfile::tempdir().unwrap();
    let (cpu, gpu) = (run(tmp.path(), "cpu"), run(tmp.path(), "emulated"));
    let (a, b) = (codes(&cpu), codes(&gpu));
    assert_eq!(a.len(), b.len());
    let other = |shift: u32| a.iter().zip(&b).filter(|(a, b)| (**a >> shift) & 15 != (**b >> shift) & 15).count();
    let (differ, total) = (other(0) + other(4), a.len() * 2);
    assert!(differ * 1000 <= total, "{differ} of {total} codes differ");
    let perplexity = |dir: &Path| json(&dir.join("eval.json"))["perplexity"].as_f64().unwrap();
    let (c, g) = (perplexity(&cpu), perplexity(&gpu));
    assert!((g / c - 1.0).abs() <= 1e-3, "perplexity {g} against {c}");
}

#[test]
fn two_devices_write_what_one_writes() {
    let tmp = tempfile::tempdir().unwrap();
    let written = |device: &str| {
        let out = tmp.path().join(device.replace(',', "-"));
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--device", device, "quantize"]).arg(demo()).arg("-o").arg(&out);
        c.args(["--samples", "2", "--seq-len", "32", "--group-size", "64", "--method", "gptq"]);
        ok(c.arg("--calib").arg(root().join("assets/demo-text/evaluation.txt")));
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(written("emulated") == written("emulated,emulated"));
}
