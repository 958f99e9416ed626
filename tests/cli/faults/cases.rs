//! The command lines that are stopped, what an undisturbed run of each does, and at which of its calls to stop it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::cli::{demo, lowbit, ok, root, scores, stderr};

/// The preloaded library; none where there is no C compiler, which `.ci/run` installs.
pub fn shim() -> Option<&'static Path> {
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
pub struct Case {
    pub name: &'static str,
    pub args: &'static [&'static str],
    /// Compared bit for bit; other outputs hold times and are read as JSON where they are.
    pub exact: &'static [&'static str],
    /// Outputs that are there last: where one is, everything is there.
    pub last: &'static str,
    /// Whether the exit code of an undisturbed run may be a verdict's.
    pub verdict: bool,
    /// Prepares the folder.
    pub before: fn(&Path),
}

/// An undisturbed run: the calls that change files, what is there at the end, the exit code.
pub struct Calm {
    pub calls: Vec<String>,
    pub files: BTreeMap<String, Vec<u8>>,
    pub code: i32,
    /// What was there before.
    pub prepared: BTreeMap<String, Vec<u8>>,
}

impl Calm {
    /// Another folder like that.
    pub fn folder(&self) -> tempfile::TempDir {
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
    pub fn command(&self, tmp: &Path) -> Command {
        let mut c = lowbit(tmp);
        c.current_dir(tmp).args(["--device", "cpu", "--threads", "1"]).args(self.args);
        c
    }

    pub fn struck(&self, tmp: &Path, at: usize, what: &str) -> Output {
        let mut c = self.command(tmp);
        c.env("LD_PRELOAD", shim().unwrap()).env("FAULT_UNDER", tmp).env("FAULT_AT", at.to_string());
        c.env("FAULT_DO", what).output().unwrap()
    }

    pub fn calm(&self) -> Calm {
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

    pub fn equals(&self, found: &BTreeMap<String, Vec<u8>>, wanted: &BTreeMap<String, Vec<u8>>, when: &str) {
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
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
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
pub fn without_leftovers(files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    files.into_iter().filter(|(n, _)| !n.split('/').any(|p| p.starts_with('.')) && !n.ends_with(".journal")).collect()
}

/// Numbers of the calls to strike at: two thirds that are not writes and a third that are, about `most` for the long run
/// (`LOWBIT_FAULTS=long`), else a third of it.
pub fn points(calls: &[String], most: usize) -> Vec<usize> {
    let most = if std::env::var("LOWBIT_FAULTS").is_ok_and(|v| v == "long") { most } else { most.div_ceil(3).max(3) };
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

pub const QUANTIZE: Case = Case {
    name: "quantize",
    args: &["quantize", "demo", "-o", "out", "--method", "rtn", "--group-size", "64", "--shard-mb", "2"],
    exact: &["out/model-00001-of-00003.safetensors", "out/config.json", "out/tokenizer.json"],
    last: "out",
    verdict: false,
    before: |_| (),
};

pub const CONVERT: Case = Case {
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

/// Blocks that are solved on data, each kept when it is written: another thread writes while the next is worked on.
pub const QUANTIZE_SOLVED: Case = Case {
    name: "quantize on data",
    args: &[
        "quantize",
        "demo",
        "-o",
        "out",
        "--method",
        "gptq",
        "--group-size",
        "64",
        "--calib",
        "text.txt",
        "--samples",
        "4",
        "--seq-len",
        "64",
    ],
    exact: &["out/model.safetensors", "out/config.json", "out/tokenizer.json"],
    last: "out",
    verdict: false,
    before: |tmp| {
        std::fs::copy(root().join("assets/demo-text/evaluation.txt"), tmp.join("text.txt")).unwrap();
    },
};

/// Another writer: one file for llama.cpp.
pub const QUANTIZE_GGUF: Case = Case {
    name: "quantize to GGUF",
    args: &["quantize", "demo", "-o", "out", "--method", "rtn", "--format", "gguf", "--scheme", "q8_0"],
    exact: &["out/model.gguf"],
    last: "out",
    verdict: false,
    before: |_| (),
};

pub const CONVERT_GGUF: Case = Case {
    name: "convert from GGUF",
    args: &["convert", "file", "-o", "out", "--format", "bf16"],
    exact: &["out/model.safetensors", "out/config.json", "out/tokenizer.json"],
    last: "out",
    verdict: false,
    before: |tmp| {
        let mut c = lowbit(tmp);
        c.args(["--quiet", "quantize"]).arg(demo()).args(["--method", "rtn", "--format", "gguf", "--scheme", "q8_0"]);
        ok(c.arg("-o").arg(tmp.join("file")));
    },
};

pub const RUN: Case = Case {
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
        scores::tasks(tmp, 5);
    },
};

pub const EVAL: Case = Case {
    name: "eval",
    args: &["eval", "demo", "--tasks", "words.yaml", "--limit", "4", "-o", "out.json"],
    exact: &["out.items.jsonl"],
    last: "out.json",
    verdict: false,
    before: |tmp| {
        scores::tasks(tmp, 5);
    },
};

pub const GATE: Case = Case {
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

pub const REPORT: Case = Case {
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

pub const BENCH: Case = Case {
    name: "bench",
    args: &["bench", "demo", "-p", "8", "-n", "2", "-r", "1", "-o", "out.json"],
    exact: &[],
    last: "out.json",
    verdict: false,
    before: |_| (),
};

pub const MERGE: Case = Case {
    name: "eval merge",
    args: &["eval", "merge", "part1.json", "part2.json", "-o", "out.json"],
    exact: &["out.items.jsonl"],
    last: "out.json",
    verdict: false,
    before: |tmp| {
        scores::tasks(tmp, 6);
        for part in ["1", "2"] {
            let mut c = lowbit(tmp);
            c.current_dir(tmp).args(["--quiet", "--device", "cpu", "eval", "demo", "--tasks", "words.yaml"]);
            ok(c.args(["--shard", &format!("{part}/2"), "-o", &format!("part{part}.json")]));
        }
    },
};

/// What `lowbit load` writes, from another tool's file: a server would give other numbers each time.
pub const LOAD: Case = Case {
    name: "load",
    args: &["load", "--import", "guidellm.json", "-o", "out.json", "--csv", "out.csv"],
    exact: &["out.csv"],
    last: "out.csv",
    verdict: true,
    before: |tmp| {
        std::fs::copy(root().join("bench/tests/import/guidellm-0.8.1.json"), tmp.join("guidellm.json")).unwrap();
    },
};

pub const CAPACITY: Case = Case {
    name: "capacity",
    args: &["capacity", "load.json", "--peak-rps", "9", "--gpu-hour", "1", "-o", "out.json"],
    exact: &[],
    last: "out.json",
    verdict: true,
    before: |tmp| {
        std::fs::copy(root().join("tests/records/load-1.json"), tmp.join("load.json")).unwrap();
    },
};

pub const MAN: Case = Case {
    name: "man",
    args: &["man", "-o", "out"],
    exact: &["out/lowbit.1", "out/lowbit-run.1", "out/lowbit-man.1"],
    last: "out/lowbit-man.1",
    verdict: false,
    before: |_| (),
};

/// A case of every command that writes, and of every writer that a command has. (`suite`, which no help lists, writes one file as
/// `bench` does, after minutes.)
pub fn all() -> [&'static Case; 14] {
    [
        &QUANTIZE,
        &QUANTIZE_SOLVED,
        &QUANTIZE_GGUF,
        &CONVERT,
        &CONVERT_GGUF,
        &RUN,
        &EVAL,
        &MERGE,
        &GATE,
        &REPORT,
        &BENCH,
        &LOAD,
        &CAPACITY,
        &MAN,
    ]
}
