//! Helpers shared by the integration tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod architecture;
mod bench;
mod docs;
mod drift;
mod emulated;
mod endpoint;
mod errors;
mod faults;
mod formats;
mod gate;
mod golden;
mod hardship;
mod load;
mod mistakes;
mod pipeline;
mod scores;
mod serve;
mod serve_scripts;
mod shell;
mod snapshots;
mod standin;
mod suite;
mod tasks;

/// The repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The demo checkpoint.
pub fn demo() -> PathBuf {
    root().join("assets/demo")
}

/// The binary, with a cache of its own.
pub fn lowbit(cache: &Path) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_lowbit"));
    c.env("LOWBIT_CACHE", cache.join("cache")).current_dir(root());
    c
}

/// Runs and expects success.
pub fn ok(command: &mut Command) -> Output {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, stderr(&out));
    out
}

/// stderr as text.
pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Copies the files of a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap() {
        let e = e.unwrap();
        std::fs::copy(e.path(), to.join(e.file_name())).unwrap();
    }
}

/// Names in a folder, hidden ones too; none when it does not exist.
pub fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .map_or_else(|_| Vec::new(), |d| d.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect())
}

/// A JSON file.
pub fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}
