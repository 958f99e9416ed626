//! Every writing command, stopped at some of its calls that change files, spread over all of them ([`cases::points`]): killed, interrupted,
//! on a disk that fills up, on one that became read-only. A library preloaded into the program (`faults/shim.c`) counts the calls and
//! strikes, so the points are the same on every machine. At none of them is there half an output at its place, and the same command
//! completes afterwards. Which test holds which line of the table in `docs/security.md` is checked by `docs.rs`.

mod cases;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::docs::{commands, help};
use super::{demo, lowbit, names, ok, stderr};
use cases::{CONVERT, Calm, Case, GATE, QUANTIZE, all, files, points, shim, without_leftovers};

/// After a stop: each file is there whole or not at all, and the same command completes.
fn completes(case: &Case, calm: &Calm, tmp: &Path, when: &str) {
    let left = files(tmp);
    for (name, bytes) in left.iter().filter(|(n, _)| !n.split('/').any(|p| p.starts_with('.') || p.ends_with(".tmp"))) {
        // Journals grow by appending, and are read up to the first torn frame.
        if let Some(whole) = calm.files.get(name).filter(|_| case.exact.contains(&name.as_str())) {
            assert!(bytes == whole, "{}: {when}: half of {name}", case.name);
        }
    }
    // Complete, perhaps with a journal that has done its work.
    if left.keys().any(|n| n == case.last || n.starts_with(&format!("{}/", case.last))) {
        return case.equals(&without_leftovers(left), &calm.files, when);
    }
    let again = case.command(tmp).output().unwrap();
    // Of files that come one by one some are there: they are replaced when asked.
    let again = match again.status.code() {
        Some(3) if stderr(&again).contains("--force") => case.command(tmp).arg("--force").output().unwrap(),
        _ => again,
    };
    assert_eq!(again.status.code(), Some(calm.code), "{}: again after being {when}: {}", case.name, stderr(&again));
    case.equals(&files(tmp), &calm.files, &format!("again after being {when}"));
}

#[test]
fn killed_anywhere_nothing_is_half_done_and_the_same_command_completes() {
    if shim().is_none() {
        return;
    }
    for case in all() {
        let calm = case.calm();
        let calls = &calm.calls;
        for at in points(calls, 18) {
            let tmp = calm.folder();
            let when = format!("killed at call {at} of {}, {}", calls.len(), calls[at - 1]);
            let out = case.struck(tmp.path(), at, "kill");
            assert_eq!(out.status.code(), None, "{}: {when}: {}", case.name, stderr(&out));
            completes(case, &calm, tmp.path(), &when);
        }
    }
}

/// Ctrl-C while a file is written: the hint says how to go on, and so it goes.
#[test]
fn interrupted_anywhere_it_is_as_if_killed_and_the_hint_says_how_to_go_on() {
    if shim().is_none() {
        return;
    }
    for case in all() {
        let calm = case.calm();
        let (calls, mut heard) = (&calm.calls, 0);
        for at in points(calls, 12) {
            let tmp = calm.folder();
            let when = format!("interrupted at call {at} of {}, {}", calls.len(), calls[at - 1]);
            let out = case.struck(tmp.path(), at, "int");
            let said = stderr(&out);
            match out.status.code() {
                Some(130) => {
                    heard += 1;
                    assert!(said.contains("error: interrupted\nhint: "), "{}: {when}: {said}", case.name);
                }
                // The last step was under way: it is done.
                code => assert_eq!(code, Some(calm.code), "{}: {when}: {said}", case.name),
            }
            completes(case, &calm, tmp.path(), &when);
        }
        assert!(heard > 0, "{}: no interrupt was heard", case.name);
    }
}

/// A command that writes and is no case would be held by none of these tests.
#[test]
fn every_command_that_writes_is_a_case() {
    let top = help(&[]);
    for command in commands(&top) {
        let writes = help(&[command]).contains("\n  -o, --output");
        assert_eq!(writes, all().iter().any(|c| c.args[0] == command), "{command}: a case in faults/cases.rs");
    }
}

#[test]
fn on_a_disk_that_fails_the_error_names_the_place_and_nothing_is_left() {
    if shim().is_none() {
        return;
    }
    for case in all() {
        let calm = case.calm();
        let Calm { calls, files: wanted, code, .. } = &calm;
        for (fault, text, most) in
            [("ENOSPC", "No space left", 9), ("EROFS", "Read-only file system", 6), ("EIO", "Input/output error", 6)]
        {
            for at in points(calls, most) {
                let tmp = calm.folder();
                let when = format!("{fault} at call {at} of {}, {}", calls.len(), calls[at - 1]);
                let out = case.struck(tmp.path(), at, fault);
                let said = stderr(&out);
                assert!(
                    !said.contains("internal failure") && !said.contains("panicked"),
                    "{}: {when}: {said}",
                    case.name
                );
                let left = files(tmp.path());
                match out.status.code() {
                    // The call needed no room, or its failure changes nothing: a leftover could not be removed.
                    c if c == Some(*code) => case.equals(&without_leftovers(left), wanted, &when),
                    Some(3) => {
                        assert!(
                            said.contains(text)
                                && said.contains(tmp.path().to_str().unwrap())
                                    | said.contains("out")
                                    | said.contains("gate."),
                            "{}: {when}: {said}",
                            case.name
                        );
                        assert!(said.contains("hint: "), "{}: {when}: {said}", case.name);
                    }
                    code => panic!("{}: {when}: exit {code:?}: {said}", case.name),
                }
            }
        }
    }
}

/// What is said, word for word, and the codes.
#[test]
fn each_fault_is_told_with_its_place_and_the_way_out() {
    if shim().is_none() {
        return;
    }
    let mut all = String::new();
    for (case, file) in [(&QUANTIZE, "/model-00001-of-00003.safetensors"), (&GATE, "/.gate.xml.partial")] {
        let calm = case.calm();
        let at = calm.calls.iter().position(|c| c.starts_with("write ") && c.ends_with(file)).unwrap() + 1;
        for fault in ["ENOSPC", "EROFS", "EIO", "int"] {
            let tmp = calm.folder();
            let out = case.struck(tmp.path(), at, fault);
            let (said, code) = (stderr(&out), out.status.code().unwrap());
            let error = said.find("error: ").and_then(|start| said.get(start..)).unwrap_or_default();
            assert!(error.contains("\nhint: "), "{}: {fault}: {said}", case.name);
            all += &format!("{}: {fault}\nstatus: {code}\n{error}\n", case.name);
        }
    }
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("faults", all);
    });
}

#[test]
fn replacing_a_checkpoint_leaves_the_old_or_the_new_one() {
    if shim().is_none() {
        return;
    }
    let replace = Case {
        args: &["quantize", "demo", "-o", "packed", "--force", "--method", "rtn", "--group-size", "32"],
        ..CONVERT
    };
    let calm = replace.calm();
    let Calm { calls, files: wanted, prepared: before, .. } = &calm;
    let model = "packed/model.safetensors";
    assert!(before[model] != wanted[model]);
    for at in points(calls, 24) {
        let tmp = calm.folder();
        replace.struck(tmp.path(), at, "kill");
        let now = &files(tmp.path())[model];
        assert!(*now == before[model] || *now == wanted[model], "call {at}, {}", calls[at - 1]);
        ok(&mut replace.command(tmp.path()));
        let again = files(tmp.path());
        assert!(again[model] == wanted[model]);
        assert!(!again.keys().any(|n| n.starts_with('.')), "{:?}", again.keys());
    }
}

#[test]
fn a_file_cut_short_or_rewritten_while_it_is_read_is_an_error() {
    let Some(shim) = shim() else { return };
    let case = Case {
        args: &["quantize", "in", "-o", "out", "--method", "rtn", "--group-size", "64"],
        before: |tmp| super::copy(&demo(), &tmp.join("in")),
        ..QUANTIZE
    };
    let calm = case.calm();
    let calls = &calm.calls;
    let writes: Vec<usize> = (1..=calls.len()).filter(|i| calls[i - 1].starts_with("write ")).collect();
    // Before the first tensor, in the middle, and after the last one was read.
    for at in [writes[0], writes[writes.len() / 2], calls.len() - 2] {
        let tmp = calm.folder();
        let mut c = case.command(tmp.path());
        c.env("LD_PRELOAD", shim).env("FAULT_UNDER", tmp.path()).env("FAULT_AT", at.to_string()).env("FAULT_DO", "cut");
        let out = c.env("FAULT_FILE", tmp.path().join("in/model.safetensors")).output().unwrap();
        let said = stderr(&out);
        if at == calls.len() - 2 {
            // All of it had been read.
            assert!(out.status.success() || out.status.code() == Some(3), "{said}");
        } else {
            assert_eq!(out.status.code(), Some(3), "call {at}, {}: {said}", calls[at - 1]);
            assert!(said.contains("cut short while it was read"), "{said}");
            assert!(!tmp.path().join("out").exists());
        }
    }
}

#[test]
fn nobody_listening_ends_no_command() {
    let tmp = tempfile::tempdir().unwrap();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let quantize = |out: &str| {
        let mut c = lowbit(tmp.path());
        c.args(["quantize", "demo", "--method", "rtn", "--group-size", "64", "-o"]).arg(tmp.path().join(out));
        c
    };
    // Messages can be lost, a result cannot.
    assert_eq!(quantize("a").stderr(full()).status().unwrap().code(), Some(0));
    let out = quantize("b").stdout(full()).output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(stderr(&out).contains("cannot write to stdout"), "{}", stderr(&out));
    let out = lowbit(tmp.path()).args(["completions", "bash"]).stdout(full()).output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
}

#[test]
fn inputs_are_files() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("in");
    super::copy(&demo(), &dir);
    for file in ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"] {
        let path = dir.join(file);
        let kept = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let out = lowbit(tmp.path()).args(["generate", "--chat", "-p", "x", "-n", "1"]).arg(&dir).output().unwrap();
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{file}: {said}");
        assert!(said.contains(file) && said.contains("a device, pipe or socket where a file is wanted"), "{said}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, kept).unwrap();
    }
}

/// A server keeps nothing on disk, and who is started after it may have its port at once.
#[test]
fn a_killed_server_leaves_its_port_and_no_file() {
    let tmp = tempfile::tempdir().unwrap();
    let serve = |port: u16| -> (Child, u16) {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--device", "cpu", "--json", "serve", "--port", &port.to_string()]).arg(demo());
        let mut child = c.stdout(Stdio::piped()).spawn().unwrap();
        let said = serde_json::Deserializer::from_reader(child.stdout.take().unwrap());
        let hello = said.into_iter::<serde_json::Value>().next().unwrap().unwrap();
        (child, u16::try_from(hello["port"].as_u64().unwrap()).unwrap())
    };
    let (mut first, port) = serve(0);
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = r#"{"prompt": "The", "max_tokens": 200, "stream": true}"#;
    let length = body.len();
    write!(client, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
    let mut start = [0; 12];
    client.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    first.kill().unwrap();
    first.wait().unwrap();
    // Whoever was being answered is told: the connection ends.
    let end = client.read_to_end(&mut Vec::new());
    assert!(!matches!(&end, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock), "{end:?}");
    let (mut again, same) = serve(port);
    assert_eq!(same, port);
    again.kill().unwrap();
    again.wait().unwrap();
    assert!(files(tmp.path()).is_empty(), "{:?}", names(tmp.path()));
}

#[test]
fn a_jumping_clock_changes_no_measurement() {
    let Some(shim) = shim() else { return };
    let (tmp, url) = (tempfile::tempdir().unwrap(), super::load::server());
    let out = tmp.path().join("load.json");
    let mut c = lowbit(tmp.path());
    c.args(["load", &url, "--profile", "concurrent:2", "--max-requests", "50", "--quiet", "-o"]).arg(&out);
    let done = c.env("LD_PRELOAD", shim).env("FAULT_CLOCK", "1").output().unwrap();
    // 2 on a machine too busy for the client to keep up: what it measured is there all the same.
    assert!(matches!(done.status.code(), Some(0 | 2)), "{}", stderr(&done));
    let record = super::json(&out);
    let requests = record["stages"][0]["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 50);
    // An hour, in nanoseconds, is what every look at the wall clock jumps by.
    fn largest(v: &serde_json::Value) -> f64 {
        match v {
            serde_json::Value::Array(a) => a.iter().map(largest).fold(0.0, f64::max),
            serde_json::Value::Object(o) => o.values().map(largest).fold(0.0, f64::max),
            v => v.as_f64().map_or(0.0, f64::abs),
        }
    }
    for request in requests {
        assert!(largest(request) < 1800e9, "{request}");
    }
    // The jump is there: the record's own time is off.
    let real = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(record["provenance"]["unix_time"].as_u64().unwrap().abs_diff(real) > 1800);
}

#[test]
fn more_memory_than_there_is_is_refused_before_the_work() {
    let tmp = tempfile::tempdir().unwrap();
    let mut c = lowbit(tmp.path());
    c.args([
        "quantize",
        "demo",
        "--group-size",
        "64",
        "--calib",
        "self",
        "--samples",
        "1000000000",
        "--seq-len",
        "512",
    ]);
    let out = c.arg("-o").arg(tmp.path().join("out")).output().unwrap();
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(said.contains("MB of memory") && said.contains("hint: lower --samples"), "{said}");
    assert!(!tmp.path().join("out").exists());
}

/// A GPU's memory ends somewhere; the emulated one's ends where a test says.
#[test]
fn a_device_that_is_too_small_says_what_would_fit() {
    use lowbit_kernels::KernelError;
    use lowbit_kernels::cuda::{Device, EmulatorOptions, GpuBackend};
    let checkpoint = lowbit_checkpoint::Checkpoint::open(&demo()).unwrap();
    let load = |memory: usize| {
        let options = EmulatorOptions { threads: 2, memory, ..EmulatorOptions::default() };
        let backend = GpuBackend::new(std::sync::Arc::new(Device::emulated_with(options).unwrap()));
        lowbit_model::Model::load(&checkpoint, std::sync::Arc::new(backend)).map(|_| ())
    };
    load(64 << 20).unwrap();
    // The demo's weights are 8.4 MB.
    let error = anyhow::Error::new(load(5_000_000).unwrap_err());
    let found = error.chain().find_map(|c| c.downcast_ref::<KernelError>()).unwrap();
    let KernelError::OutOfMemory { asked, free, total, .. } = found else { panic!("{error:#}") };
    assert!(asked > free && free < total && *total == 5_000_000, "{asked} {free} {total}");
    assert!(found.to_string().contains("of 5.0 MB that the device has"), "{found}");
    let hint = found.hint().unwrap();
    assert!(
        hint.contains(&format!("what fits is {:.1} MB more", *free as f64 / 1e6)) && hint.contains("--kv-tokens"),
        "{hint}"
    );
}
