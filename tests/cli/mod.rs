//! Helpers shared by the integration tests.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod architecture;
mod batches;
mod bench;
mod budget;
mod docs;
mod drift;
mod emulated;
mod endpoint;
mod errors;
mod experts;
mod faults;
mod formats;
mod gate;
mod golden;
mod hardship;
mod hub;
mod judge;
mod large_check;
mod load;
mod load_check;
mod mistakes;
mod narrow;
mod pipeline;
mod records;
mod resume;
mod scores;
mod serve;
mod serve_scripts;
mod shell;
mod snapshots;
mod standin;
mod suite;
mod supply;
mod tasks;
mod transforms;

/// The repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The demo checkpoint.
pub fn demo() -> PathBuf {
    root().join("assets/demo")
}

/// Seconds after which a child is ended: far beyond what any needs, far below the patience of a CI.
fn patience() -> u32 {
    let soak = std::env::var("LOWBIT_SOAK_SECONDS").ok().and_then(|v| v.parse().ok()).unwrap_or(0);
    900 + soak
}

/// Sends `signal` to a child when the thread that started it is gone, which waits for it as long as it lives: a test that was killed
/// leaves nothing running.
fn ends_with_us(c: &mut Command, signal: libc::c_int) {
    let parent = std::process::id();
    // SAFETY: `prctl` and `getppid` may be called between `fork` and `exec`, and touch nothing of this process.
    unsafe {
        c.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Who was gone before that sends nothing.
            if libc::getppid().cast_unsigned() == parent {
                Ok(())
            } else {
                Err(std::io::ErrorKind::NotConnected.into())
            }
        });
    }
}

/// Ends a child that is still there after [`patience`] by SIGALRM, so that no test waits for it without end (an alarm outlives `exec`), and
/// with the test that started it. The child's own children have neither.
pub fn bounded(c: &mut Command) {
    ends_with_us(c, libc::SIGKILL);
    let seconds = patience();
    // SAFETY: `alarm` may be called between `fork` and `exec`, and touches nothing of this process.
    unsafe {
        c.pre_exec(move || {
            libc::alarm(seconds);
            Ok(())
        });
    }
}

/// The binary, with a cache of its own.
pub fn lowbit(cache: &Path) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_lowbit"));
    c.env("LOWBIT_CACHE", cache.join("cache")).current_dir(root());
    bounded(&mut c);
    c
}

/// A script of the repository, ended with all its children when it takes too long.
pub fn script(path: &str) -> Command {
    let mut c = Command::new("timeout");
    c.arg("--kill-after=10").arg(patience().to_string()).arg(root().join(path));
    // `timeout` passes it on to its children.
    ends_with_us(&mut c, libc::SIGTERM);
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

#[test]
fn a_child_ends_with_the_thread_that_started_it() {
    use std::os::unix::process::ExitStatusExt;
    let tmp = tempfile::tempdir().unwrap();
    let serve = || {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--device", "cpu", "serve"]).arg(demo()).args(["--port", "0"]);
        c.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut child = std::thread::scope(|s| s.spawn(serve).join().unwrap());
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
}
