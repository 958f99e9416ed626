//! Hostile input: everything lowbit reads from strangers, changed at random from valid files and from inputs that once did harm.
//!
//! No panic, no more memory than a bound tied to the size of the input, no hang. The default run is short and the same every
//! time. By hand, longer, and writing the table of `docs/security.md`:
//!
//! ```text
//! LOWBIT_HOSTILE_TIMES=100 LOWBIT_HOSTILE_TABLE=1 cargo test --release --workspace --test hostile
//! LOWBIT_HOSTILE_TARGET=gguf LOWBIT_HOSTILE_SEED=7 cargo test --release --workspace --test hostile
//! ```
//!
//! The targets are plain functions, shared with `fuzz/` for cargo-fuzz.
#![allow(clippy::print_stderr)]

mod allocator;
mod mutate;
#[path = "../../report/tests/records/mod.rs"]
#[allow(dead_code)]
mod records;
mod seeds;
mod targets;

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use targets::Target;

#[global_allocator]
static ALLOCATOR: allocator::Counting = allocator::Counting;

/// Nothing that is read takes near this long; a loop without end does.
const HANG: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where inputs that did harm are kept for whoever mends it.
fn harmful(target: &str, input: &[u8]) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("hostile");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{target}-{}", &lowbit_checkpoint::hash::sha256_hex(input)[..12]));
    std::fs::write(&path, input).unwrap();
    path
}

/// The input at work and when it began, for the watchdog.
type Current = Arc<Mutex<(&'static str, Vec<u8>)>>;

fn all() -> Vec<Target> {
    targets::all().into_iter().chain([targets::serve()]).collect()
}

struct Row {
    name: &'static str,
    about: &'static str,
    inputs: u64,
    accepted: u64,
    peak: usize,
    bound: String,
}

/// Panics since the last question, on any thread: a server catches those of its own.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

#[test]
fn nothing_read_from_strangers_does_harm() {
    let number = |name: &str, usual: u64| variable(name).map_or(usual, |v| v.parse().unwrap());
    let (times, seed) = (number("LOWBIT_HOSTILE_TIMES", 1), number("LOWBIT_HOSTILE_SEED", 1));
    let only = variable("LOWBIT_HOSTILE_TARGET");
    let last: Arc<Mutex<String>> = Arc::default();
    let told = last.clone();
    std::panic::set_hook(Box::new(move |info| {
        if lowbit_checkpoint::guard::panics_are_errors() {
            return;
        }
        PANICS.fetch_add(1, Ordering::SeqCst);
        *told.lock().unwrap() = info.to_string();
    }));
    let (current, runs): (Current, Arc<AtomicU64>) = (Arc::default(), Arc::default());
    watch(current.clone(), runs.clone());
    let at_work = current.clone();
    let _ = allocator::TELL.set(Box::new(move || {
        if let Ok(now) = at_work.try_lock() {
            eprintln!(
                "{}: more than {} bytes at once: {}",
                now.0,
                allocator::MOST_AT_ONCE,
                harmful(now.0, &now.1).display()
            );
        }
    }));
    let (mut rows, mut faults) = (Vec::new(), Vec::new());
    for target in all().iter().filter(|t| only.as_ref().is_none_or(|o| o == t.name)) {
        let tmp =
            tempfile::tempdir_in(if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).unwrap();
        let mut seeds = (target.seeds)();
        let kept = root().join("fuzz/corpus").join(target.name);
        let mut files: Vec<_> = std::fs::read_dir(&kept).map_or(Vec::new(), |d| d.map(|e| e.unwrap().path()).collect());
        files.sort();
        seeds.extend(files.iter().map(|f| std::fs::read(f).unwrap()));
        let mut read = (target.open)(tmp.path());
        let mut random = mutate::Random::new(seed);
        let (count, mut peak, mut accepted) = (target.runs * times, 0, 0);
        for i in 0..count + seeds.len() as u64 {
            let input = match seeds.get(i as usize) {
                Some(whole) => whole.clone(),
                None => mutate::mutated(&seeds, &mut random),
            };
            *current.lock().unwrap() = (target.name, input.clone());
            runs.fetch_add(1, Ordering::SeqCst);
            let used = allocator::measured(|| {
                let read = std::panic::catch_unwind(AssertUnwindSafe(|| read(&input)));
                accepted += u64::from(read.unwrap_or(false));
            });
            peak = peak.max(used);
            let bound = target.base + target.per_byte * input.len();
            if PANICS.swap(0, Ordering::SeqCst) > 0 {
                faults.push(format!(
                    "{}: panic: {} ({})",
                    target.name,
                    last.lock().unwrap(),
                    harmful(target.name, &input).display()
                ));
            } else if used > bound || allocator::refused() {
                let file = harmful(target.name, &input);
                faults.push(format!(
                    "{}: {used} bytes for an input of {} ({})",
                    target.name,
                    input.len(),
                    file.display()
                ));
            }
            if faults.len() > 20 {
                break;
            }
        }
        // A target that takes nothing would find nothing.
        assert!(accepted > count / 1000, "{}: {accepted} inputs of {count} were what they claim to be", target.name);
        rows.push(row(target, count + seeds.len() as u64, accepted, peak));
    }
    current.lock().unwrap().0 = "";
    drop(std::panic::take_hook());
    assert!(faults.is_empty(), "{} inputs did harm:\n{}", faults.len(), faults.join("\n"));
    if variable("LOWBIT_HOSTILE_TABLE").is_some() {
        write_table(&rows);
    }
}

fn row(target: &Target, inputs: u64, accepted: u64, peak: usize) -> Row {
    let bound = format!("{} MB + {} × input", target.base >> 20, target.per_byte);
    Row { name: target.name, about: target.about, inputs, accepted, peak, bound }
}

/// Ends the process when one input is at work too long, and says which.
fn watch(current: Current, runs: Arc<AtomicU64>) {
    std::thread::spawn(move || {
        let mut seen = (0, std::time::Instant::now());
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = runs.load(Ordering::SeqCst);
            if now != seen.0 {
                seen = (now, std::time::Instant::now());
            } else if seen.1.elapsed() > HANG {
                let (name, input) = current.lock().unwrap().clone();
                if !name.is_empty() {
                    eprintln!("{name}: no end within {HANG:?}: {}", harmful(name, &input).display());
                    std::process::abort();
                }
            }
        }
    });
}

/// The generated part of `docs/security.md`.
fn write_table(rows: &[Row]) {
    let mut table =
        String::from("| target | reads | inputs | accepted | most memory | bound |\n|---|---|---:|---:|---:|---|\n");
    for r in rows {
        table += &format!(
            "| `{}` | {} | {} | {} | {:.1} MB | {} |\n",
            r.name,
            r.about,
            r.inputs,
            r.accepted,
            r.peak as f64 / (1 << 20) as f64,
            r.bound
        );
    }
    let path = root().join("docs/security.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (start, end) = ("<!-- generated -->\n", "<!-- end -->");
    let (from, to) = (text.find(start).unwrap() + start.len(), text.find(end).unwrap());
    std::fs::write(&path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
}

#[test]
fn the_table_names_every_target() {
    let text = std::fs::read_to_string(root().join("docs/security.md")).unwrap();
    for target in all() {
        assert!(
            text.contains(&format!("| `{}` | {} |", target.name, target.about)),
            "LOWBIT_HOSTILE_TABLE=1: {}",
            target.name
        );
        assert!(
            root().join("fuzz/fuzz_targets").join(format!("{}.rs", target.name)).exists(),
            "fuzz/fuzz_targets: {}",
            target.name
        );
    }
}

#[test]
fn the_measure_itself() {
    assert!((100_000..110_000).contains(&allocator::measured(|| drop(std::hint::black_box(vec![1u8; 100_000])))));
    let mut a = mutate::Random::new(3);
    let mut b = mutate::Random::new(3);
    let seeds = [b"{\"a\": [1, 2]}".to_vec(), vec![]];
    let made: Vec<_> = (0..200).map(|_| mutate::mutated(&seeds, &mut a)).collect();
    assert!(
        made == (0..200).map(|_| mutate::mutated(&seeds, &mut b)).collect::<Vec<_>>(),
        "the same inputs every time"
    );
    assert!(made.iter().filter(|m| **m == seeds[0]).count() < 20);
}
