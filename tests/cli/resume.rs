//! A quantization that is killed goes on where it was, and ends as if nothing had happened.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::experts::{model, released_model};
use super::{demo, lowbit, names, ok, stderr};

/// A method that carries two streams, so that both have to be carried on.
fn command(tmp: &Path, out: &Path, more: &[&str]) -> Command {
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let mut c = lowbit(tmp);
    c.args(["--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(out).arg("--calib").arg(text);
    c.args(["--samples", "24", "--seq-len", "128", "--group-size", "64", "--method", "best"]).args(more);
    c
}

/// All files of a checkpoint; of its record everything but times, the command line and the memory.
pub(super) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn without_times(v: &mut Value) {
        match v {
            Value::Object(o) => {
                for k in ["seconds", "stage_seconds", "unix_time", "peak_rss_bytes", "command"] {
                    o.remove(k);
                }
                o.values_mut().for_each(without_times);
            }
            Value::Array(a) => a.iter_mut().for_each(without_times),
            _ => {}
        }
    }
    let read = |name: &String| {
        let bytes = std::fs::read(dir.join(name)).unwrap();
        if name != "quantize.json" {
            return bytes;
        }
        let mut record: Value = serde_json::from_slice(&bytes).unwrap();
        without_times(&mut record);
        record.to_string().into_bytes()
    };
    names(dir).into_iter().map(|n| (n.clone(), read(&n))).collect()
}

fn equal(found: &Path, wanted: &BTreeMap<String, Vec<u8>>, when: &str) {
    let found = contents(found);
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{when}");
    for (name, bytes) in wanted {
        assert!(found[name] == *bytes, "{when}: {name} differs");
    }
}

/// Starts `c`, kills it after `wait`, and tells whether it was still at work.
fn killed(mut c: Command, wait: Duration) -> bool {
    let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(wait);
    let ended = child.try_wait().unwrap().is_some();
    child.kill().unwrap();
    child.wait().unwrap();
    !ended
}

#[test]
fn killed_at_any_time_it_goes_on_and_ends_the_same() {
    // LOWBIT_KILLS=30 for the long run; LOWBIT_KILL_SEED=N for other moments.
    let number = |key: &str| std::env::var(key).ok().map(|v| v.parse::<u32>().unwrap());
    let kills = number("LOWBIT_KILLS").unwrap_or(4);
    let seed = number("LOWBIT_KILL_SEED").unwrap_or(7);
    eprintln!("LOWBIT_KILLS={kills} LOWBIT_KILL_SEED={seed}");
    let tmp = tempfile::tempdir().unwrap();
    let calm = tmp.path().join("calm");
    let start = Instant::now();
    ok(&mut command(tmp.path(), &calm, &[]));
    let whole = start.elapsed();
    let wanted = contents(&calm);
    let (mut struck, mut gone_on) = (0, 0);
    let mut state = seed;
    for i in 0..kills {
        let out = tmp.path().join(format!("out{i}"));
        // Twice in some runs; early and late points alike.
        for _ in 0..=i % 2 {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            let share = f64::from(state >> 8) / f64::from(1u32 << 24);
            struck += u32::from(killed(command(tmp.path(), &out, &[]), whole.mul_f64(share)));
            assert!(!out.exists() || !tmp.path().join(format!(".out{i}.partial")).exists());
        }
        if !out.exists() {
            let done = ok(&mut command(tmp.path(), &out, &[]));
            gone_on += u32::from(stderr(&done).contains("were solved before"));
        }
        equal(&out, &wanted, &format!("run {i}"));
        assert!(!names(tmp.path()).iter().any(|n| n.starts_with('.')), "{:?}", names(tmp.path()));
        std::fs::remove_dir_all(out).unwrap();
    }
    eprintln!("{struck} kills, {gone_on} of {kills} runs went on from solved blocks");
    assert!(struck > 0);
}

/// Interrupts `c` when its second block is kept in `partial`.
fn interrupted(mut c: Command, partial: &Path) {
    let mut child = c.stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !partial.join(".journal/block-00001.json").exists() && started.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(2));
    }
    ok(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let done = child.wait().unwrap();
    let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(done.code(), Some(130), "{said}");
    assert!(said.contains("hint: the same command goes on where it stopped"), "{said}");
    assert!(said.contains("solved blocks are kept in"), "{said}");
}

#[test]
fn solved_blocks_are_taken_over_only_where_they_fit() {
    let tmp = tempfile::tempdir().unwrap();
    let (calm, out) = (tmp.path().join("calm"), tmp.path().join("out"));
    ok(&mut command(tmp.path(), &calm, &[]));
    let wanted = contents(&calm);
    let partial = tmp.path().join(".out.partial");
    let stopped = |more: &[&str]| interrupted(command(tmp.path(), &out, more), &partial);
    let again = |more: &[&str]| {
        let done = ok(&mut command(tmp.path(), &out, more));
        let said = stderr(&done);
        equal(&out, &wanted, &said);
        std::fs::remove_dir_all(&out).unwrap();
        assert!(!partial.exists());
        said
    };
    stopped(&[]);
    let said = again(&[]);
    assert!(said.contains("of 4 blocks were solved before") && !said.contains("note:"), "{said}");

    stopped(&[]);
    let said = again(&["--fresh"]);
    assert!(!said.contains("solved before") && !said.contains("note:"), "{said}");

    // Other options: nothing is taken over.
    stopped(&["--damp", "0.02"]);
    let said = again(&[]);
    assert!(said.contains("other options") && !said.contains("solved before"), "{said}");

    // A damaged block and all after it.
    stopped(&[]);
    std::fs::write(partial.join(".journal/block-00001.json"), "{}").unwrap();
    let said = again(&[]);
    assert!(said.contains("block 1 is solved anew") && said.contains("1 of 4 blocks were solved before"), "{said}");
}

/// Float codes, stored scales of inputs, keys and values: all of a block is taken over, and only for the same schemes.
#[test]
fn rounded_inputs_and_scales_of_the_cache_go_on_too() {
    let tmp = tempfile::tempdir().unwrap();
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let command = |out: &Path, scheme: &str, more: &[&str]| {
        let mut c = lowbit(tmp.path());
        c.args(["--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(out).arg("--calib").arg(&text);
        c.args(["--samples", "24", "--seq-len", "128", "--kv-scheme", "fp8-head", "--scheme", scheme]).args(more);
        c
    };
    let (calm, out) = (tmp.path().join("calm"), tmp.path().join("out"));
    let partial = tmp.path().join(".out.partial");
    let more = ["--module", "re:.*o_proj=w8a8-static", "--module", "re:.*down_proj=w4a16:64"];
    ok(&mut command(&calm, "nvfp4", &more));
    let wanted = contents(&calm);
    let again = || {
        let said = stderr(&ok(&mut command(&out, "nvfp4", &more)));
        equal(&out, &wanted, &said);
        std::fs::remove_dir_all(&out).unwrap();
        said
    };
    interrupted(command(&out, "nvfp4", &more), &partial);
    let said = again();
    assert!(said.contains("of 4 blocks were solved before") && !said.contains("note:"), "{said}");
    for (scheme, more) in [("fp8-static", &more[..]), ("nvfp4", &more[..2])] {
        interrupted(command(&out, scheme, more), &partial);
        let said = again();
        assert!(said.contains("other options") && !said.contains("solved before"), "{scheme}: {said}");
    }
}

/// Kills `c` as soon as its first block is kept in `partial`; whether it was still at work.
fn killed_after_a_block(mut c: Command, partial: &Path) -> bool {
    let entry = partial.join(".journal/block-00000.json");
    let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !entry.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // The entries are gone before a checkpoint is in place.
    entry.exists()
}

/// Experts, latent attention, both; one matrix an expert, or all in one tensor of MXFP4: blocks are put back with their experts, and the
/// record has the coverage of those that were solved before.
#[test]
fn killed_with_experts_or_latent_attention_it_goes_on_and_ends_the_same() {
    let tmp = tempfile::tempdir().unwrap();
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let eight = ["--scheme", "w8a16"];
    let models = [
        (model(tmp.path(), "mixtral"), &["--method", "gptq"][..]),
        (model(tmp.path(), "qwen3_moe"), &["--method", "best"]),
        (model(tmp.path(), "qwen2_moe"), &["--method", "rtn"]),
        (model(tmp.path(), "deepseek_v2"), &["--method", "fast"]),
        (model(tmp.path(), "deepseek_v3"), &["--method", "best"]),
        (released_model(tmp.path()), &eight),
    ];
    for (dir, more) in models {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let (calm, out) = (dir.with_extension("calm"), dir.with_extension("out"));
        let partial = tmp.path().join(format!(".{name}.out.partial"));
        let command = |out: &Path| {
            let mut c = lowbit(tmp.path());
            c.args(["--device", "cpu", "quantize"]).arg(&dir).arg("-o").arg(out).arg("--calib").arg(&text);
            c.args(["--samples", "80", "--seq-len", "32", "--group-size", "8"]).args(more);
            c
        };
        ok(&mut command(&calm));
        let wanted = contents(&calm);
        // It may be done before the signal comes.
        let struck = (0..30).any(|_| {
            let struck = killed_after_a_block(command(&out), &partial);
            if !struck {
                let _ = std::fs::remove_dir_all(&out);
            }
            struck
        });
        assert!(struck, "{name}");
        let said = stderr(&ok(&mut command(&out)));
        assert!(said.contains("blocks were solved before"), "{name}: {said}");
        equal(&out, &wanted, &format!("{name}: {said}"));
        assert!(!partial.exists(), "{name}");
    }
}
