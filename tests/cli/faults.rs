//! Every writing command, stopped at each of its calls that change files: killed, on a disk that fills up, on one that became
//! read-only. A library preloaded into the program (`faults/shim.c`) counts the calls and strikes, so the points are the same on
//! every machine. At no point is there half an output at its place, and the same command completes afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use super::{demo, lowbit, ok, root, stderr};

/// The preloaded library; none where there is no C compiler, which `.ci/run` installs.
fn shim() -> Option<&'static Path> {
    static SHIM: OnceLock<Option<PathBuf>> = OnceLock::new();
    SHIM.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault-shim.so");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-o"])
            .arg(&out)
            .arg(root().join("tests/cli/faults/shim.c"))
            .arg("-ldl")
            .output();
        match made {
            Ok(done) => {
                assert!(done.status.success(), "{}", stderr(&done));
                Some(out)
            }
            Err(_) => {
                eprintln!("skipped: no C compiler");
                None
            }
        }
    })
    .as_deref()
}

/// A command line in a folder of its own, and the files it makes.
struct Case {
    name: &'static str,
    args: &'static [&'static str],
    /// Compared bit for bit; other outputs hold times and are read as JSON where they are.
    exact: &'static [&'static str],
    /// Outputs that are there last: where one is, everything is there.
    last: &'static str,
    /// Whether the exit code of an undisturbed run may be a verdict's.
    verdict: bool,
    /// Prepares the folder.
    before: fn(&Path),
}

/// An undisturbed run: the calls that change files, what is there at the end, the exit code.
struct Calm {
    calls: Vec<String>,
    files: BTreeMap<String, Vec<u8>>,
    code: i32,
    /// What was there before.
    prepared: BTreeMap<String, Vec<u8>>,
}

impl Calm {
    /// Another folder like that.
    fn folder(&self) -> tempfile::TempDir {
        folder(&self.prepared)
    }
}

fn folder(files: &BTreeMap<String, Vec<u8>>) -> tempfile::TempDir {
    let tmp = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = tmp.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    tmp
}

impl Case {
    fn command(&self, tmp: &Path) -> Command {
        let mut c = lowbit(tmp);
        c.current_dir(tmp).args(["--device", "cpu", "--threads", "1"]).args(self.args);
        c
    }

    fn struck(&self, tmp: &Path, at: usize, what: &str) -> Output {
        let mut c = self.command(tmp);
        c.env("LD_PRELOAD", shim().unwrap()).env("FAULT_UNDER", tmp).env("FAULT_AT", at.to_string());
        c.env("FAULT_DO", what).output().unwrap()
    }

    fn calm(&self) -> Calm {
        let made = tempfile::tempdir().unwrap();
        (self.before)(made.path());
        let prepared = files(made.path());
        let tmp = folder(&prepared);
        let log = tmp.path().with_extension("log");
        let mut c = self.command(tmp.path());
        c.env("LD_PRELOAD", shim().unwrap()).env("FAULT_UNDER", tmp.path()).env("FAULT_LOG", &log);
        let out = c.output().unwrap();
        let code = out.status.code().unwrap();
        assert!(code == 0 || self.verdict && code <= 2, "{}: {code}: {}", self.name, stderr(&out));
        let calls = std::fs::read_to_string(&log).unwrap().lines().map(str::to_string).collect();
        std::fs::remove_file(log).unwrap();
        Calm { calls, files: files(tmp.path()), code, prepared }
    }

    fn equals(&self, found: &BTreeMap<String, Vec<u8>>, wanted: &BTreeMap<String, Vec<u8>>, when: &str) {
        let place = |files: &BTreeMap<String, Vec<u8>>| {
            files.keys().filter(|n| !n.starts_with("cache")).cloned().collect::<Vec<_>>()
        };
        assert_eq!(place(found), place(wanted), "{}: {when}", self.name);
        for name in self.exact {
            assert!(found[*name] == wanted[*name], "{}: {when}: {name} differs", self.name);
        }
        for (name, bytes) in found.iter().filter(|(n, _)| n.ends_with(".json") && !n.starts_with("cache")) {
            assert!(serde_json::from_slice::<serde_json::Value>(bytes).is_ok(), "{}: {when}: {name}", self.name);
        }
    }
}

/// All files under a folder with their contents, by relative path.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for e in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
        let name = e.file_name().to_string_lossy().into_owned();
        match e.path().is_dir() {
            true => out.extend(files(&e.path()).into_iter().map(|(n, b)| (format!("{name}/{n}"), b))),
            false => {
                out.insert(name, std::fs::read(e.path()).unwrap());
            }
        }
    }
    out
}

/// Without hidden files and journals that could not be removed.
fn without_leftovers(files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    files.into_iter().filter(|(n, _)| !n.split('/').any(|p| p.starts_with('.')) && !n.ends_with(".journal")).collect()
}

/// Numbers of the calls to strike at: all that are not writes, and some of those, at most about `most`.
fn points(calls: &[String], most: usize) -> Vec<usize> {
    let all: Vec<usize> = (1..=calls.len()).collect();
    let (writes, others): (Vec<usize>, Vec<usize>) = all.into_iter().partition(|i| calls[i - 1].starts_with("write "));
    let thin =
        |v: Vec<usize>, most: usize| v.iter().copied().step_by(v.len().div_ceil(most).max(1)).collect::<Vec<_>>();
    let mut out = thin(others, most * 2 / 3);
    out.extend(thin(writes, most / 3));
    out.push(calls.len());
    out.sort_unstable();
    out.dedup();
    out
}

const QUANTIZE: Case = Case {
    name: "quantize",
    args: &["quantize", "demo", "-o", "out", "--method", "rtn", "--group-size", "64", "--shard-mb", "2"],
    exact: &["out/model-00001-of-00003.safetensors", "out/config.json", "out/tokenizer.json"],
    last: "out",
    verdict: false,
    before: |_| (),
};

const CONVERT: Case = Case {
    name: "convert",
    args: &["convert", "packed", "-o", "out", "--format", "gptq"],
    exact: &["out/model.safetensors", "out/config.json"],
    last: "out",
    verdict: false,
    before: |tmp| {
        let mut c = lowbit(tmp);
        c.args(["--quiet", "quantize"]).arg(demo()).args(["--method", "rtn", "--group-size", "64", "-o"]);
        ok(c.arg(tmp.join("packed")).args(["--unsigned-scales"]));
    },
};

const RUN: Case = Case {
    name: "run",
    args: &[
        "run",
        "demo",
        "-o",
        "out",
        "--method",
        "rtn",
        "--limit",
        "1",
        "--kl-windows",
        "1",
        "--task-limit",
        "3",
        "--repetitions",
        "1",
        "--no-bench",
        "--no-gate",
        "--tasks",
        "words.yaml",
    ],
    exact: &["out/model/model.safetensors", "out/eval.items.jsonl", "out/eval.reference.items.jsonl"],
    last: "out/report.json",
    verdict: false,
    before: |tmp| {
        super::scores::tasks(tmp, 5);
    },
};

const EVAL: Case = Case {
    name: "eval",
    args: &["eval", "demo", "--tasks", "words.yaml", "--limit", "4", "-o", "out.json"],
    exact: &["out.items.jsonl"],
    last: "out.json",
    verdict: false,
    before: |tmp| {
        super::scores::tasks(tmp, 5);
    },
};

const GATE: Case = Case {
    name: "gate",
    args: &[
        "gate",
        "eval.json",
        "--max-kl",
        "9",
        "--max-ppl-ratio",
        "9",
        "-o",
        "gate.json",
        "--junit",
        "gate.xml",
        "--markdown",
        "gate.md",
    ],
    exact: &["gate.xml", "gate.md"],
    last: "gate.json",
    verdict: false,
    before: |tmp| {
        let text = root().join("assets/demo-text/evaluation.txt");
        let mut c = lowbit(tmp);
        c.args(["--quiet", "eval", "demo", "--reference", "demo", "--limit", "4", "--protocol", "gptq-512"]);
        ok(c.arg("--ppl").arg(&text).arg("--kl").arg(&text).arg("-o").arg(tmp.join("eval.json")));
    },
};

const REPORT: Case = Case {
    name: "report",
    args: &["report", "records", "-o", "out"],
    exact: &["out/report.html", "out/report.md", "out/report.json"],
    last: "out/report.json",
    verdict: false,
    before: |tmp| {
        (GATE.before)(tmp);
        std::fs::create_dir(tmp.join("records")).unwrap();
        std::fs::rename(tmp.join("eval.json"), tmp.join("records/eval.json")).unwrap();
    },
};

const BENCH: Case = Case {
    name: "bench",
    args: &["bench", "demo", "-p", "8", "-n", "2", "-r", "1", "-o", "out.json"],
    exact: &[],
    last: "out.json",
    verdict: false,
    before: |_| (),
};

const MERGE: Case = Case {
    name: "eval merge",
    args: &["eval", "merge", "part1.json", "part2.json", "-o", "out.json"],
    exact: &["out.items.jsonl"],
    last: "out.json",
    verdict: false,
    before: |tmp| {
        super::scores::tasks(tmp, 6);
        for part in ["1", "2"] {
            let mut c = lowbit(tmp);
            c.current_dir(tmp).args(["--quiet", "--device", "cpu", "eval", "demo", "--tasks", "words.yaml"]);
            ok(c.args(["--shard", &format!("{part}/2"), "-o", &format!("part{part}.json")]));
        }
    },
};

/// What `lowbit load` writes, from another tool's file: a server would give other numbers each time.
const LOAD: Case = Case {
    name: "load",
    args: &["load", "--import", "guidellm.json", "-o", "out.json", "--csv", "out.csv"],
    exact: &["out.csv"],
    last: "out.csv",
    verdict: true,
    before: |tmp| {
        std::fs::copy(root().join("bench/tests/import/guidellm-0.8.1.json"), tmp.join("guidellm.json")).unwrap();
    },
};

const CAPACITY: Case = Case {
    name: "capacity",
    args: &["capacity", "load.json", "--peak-rps", "9", "--gpu-hour", "1", "-o", "out.json"],
    exact: &[],
    last: "out.json",
    verdict: true,
    before: |tmp| {
        std::fs::copy(root().join("tests/records/load-1.json"), tmp.join("load.json")).unwrap();
    },
};

const MAN: Case = Case {
    name: "man",
    args: &["man", "-o", "out"],
    exact: &["out/lowbit.1", "out/lowbit-run.1", "out/lowbit-man.1"],
    last: "out/lowbit-man.1",
    verdict: false,
    before: |_| (),
};

fn all() -> [&'static Case; 11] {
    [&QUANTIZE, &CONVERT, &RUN, &EVAL, &MERGE, &GATE, &REPORT, &BENCH, &LOAD, &CAPACITY, &MAN]
}

#[test]
fn killed_anywhere_nothing_is_half_done_and_the_same_command_completes() {
    if shim().is_none() {
        return;
    }
    for case in all() {
        let calm = case.calm();
        let Calm { calls, files: wanted, code, .. } = &calm;
        for at in points(calls, 18) {
            let tmp = calm.folder();
            let when = format!("killed at call {at} of {}, {}", calls.len(), calls[at - 1]);
            let out = case.struck(tmp.path(), at, "kill");
            assert_eq!(out.status.code(), None, "{}: {when}: {}", case.name, stderr(&out));
            let left = files(tmp.path());
            for (name, bytes) in
                left.iter().filter(|(n, _)| !n.split('/').any(|p| p.starts_with('.') || p.ends_with(".tmp")))
            {
                // Journals grow by appending, and are read up to the first torn frame.
                if let Some(whole) = wanted.get(name).filter(|_| case.exact.contains(&name.as_str())) {
                    assert!(bytes == whole, "{}: {when}: half of {name}", case.name);
                }
            }
            // Complete, perhaps with a journal that has done its work.
            if left.keys().any(|n| n == case.last || n.starts_with(&format!("{}/", case.last))) {
                case.equals(&without_leftovers(left), wanted, &when);
                continue;
            }
            let again = case.command(tmp.path()).output().unwrap();
            // Of files that come one by one some are there: they are replaced when asked.
            let again = match again.status.code() {
                Some(3) if stderr(&again).contains("--force") => {
                    case.command(tmp.path()).arg("--force").output().unwrap()
                }
                _ => again,
            };
            assert_eq!(again.status.code(), Some(*code), "{}: again after being {when}: {}", case.name, stderr(&again));
            case.equals(&files(tmp.path()), wanted, &format!("again after being {when}"));
        }
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
                        assert!(fault != "ENOSPC" || said.contains("hint: "), "{}: {when}: {said}", case.name);
                    }
                    code => panic!("{}: {when}: exit {code:?}: {said}", case.name),
                }
            }
        }
    }
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
