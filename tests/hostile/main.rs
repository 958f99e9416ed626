//! Hostile input: everything lowbit reads from strangers, changed at random from valid files and from inputs that once did harm.
//!
//! No panic, no more memory than a bound tied to the size of the input, no hang. The default run is short and the same every
//! time. Long runs take seeds that were never used and write what they did into `fuzz/ledger.jsonl`; the table of
//! `docs/security.md` is made of that:
//!
//! ```text
//! LOWBIT_HOSTILE_TARGET=gguf LOWBIT_HOSTILE_SEED=7 LOWBIT_HOSTILE_TIMES=10 cargo test --release --workspace --test hostile
//! LOWBIT_HOSTILE_GOAL=10000000 LOWBIT_HOSTILE_MINUTES=60 cargo test --release --workspace --test hostile -- --ignored
//! for c in 0 1; do taskset -c $c cargo test --release --workspace --test hostile -- --ignored & done; wait
//! LOWBIT_HOSTILE_TABLE=1 cargo test --release --workspace --test hostile table
//! ```
//!
//! The targets are plain functions, shared with `fuzz/` for cargo-fuzz.
#![allow(clippy::print_stderr)]

mod allocator;
mod ledger;
// Readers that are part of the program and of no library.
#[path = "../../src/recipe/llm_compressor.rs"]
mod llm_compressor;
mod mutate;
#[path = "../../src/recipe/table.rs"]
mod recipe_table;
#[path = "../../report/tests/records/mod.rs"]
#[allow(dead_code)]
mod records;
mod seeds;
mod targets;
mod tiny;

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use targets::Target;

/// Options of a recipe, as `src/recipe.rs` has them.
type Given = Vec<(String, Option<Vec<String>>)>;

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

/// One input in so many is made from those that cost most, [`HEAVY`].
const SELDOM: usize = 10_000;
/// Fewer inputs than every target has in the default run.
const FEW: u64 = 4_000;
/// Files of the corpus that cost most by design: loops without end, bombs.
const HEAVY: &str = "heavy-";

/// The input at work, for the watchdog.
static CURRENT: Mutex<(&str, Vec<u8>)> = Mutex::new(("", Vec::new()));
static RUNS: AtomicU64 = AtomicU64::new(0);
/// Panics since the last question, on any thread: a server catches those of its own.
static PANICS: AtomicU64 = AtomicU64::new(0);
static LAST: Mutex<String> = Mutex::new(String::new());
/// Memory is counted for the whole process: one at a time.
static MEASURING: Mutex<()> = Mutex::new(());

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn number(name: &str, usual: u64) -> u64 {
    variable(name).map_or(usual, |v| v.parse().unwrap())
}

/// The targets of `LOWBIT_HOSTILE_TARGET` (names with commas between), or all.
fn chosen() -> Vec<Target> {
    let only = variable("LOWBIT_HOSTILE_TARGET");
    let wanted = |t: &Target| only.as_ref().is_none_or(|o| o.split(',').any(|name| name == t.name));
    targets::all().into_iter().filter(wanted).collect()
}

/// Watches panics, time and single large requests from here on. Every test of this file holds it: panics and bytes are counted for the
/// whole process.
fn watched() -> MutexGuard<'static, ()> {
    static ONCE: Once = Once::new();
    let guard = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if lowbit_checkpoint::guard::panics_are_errors() {
                return;
            }
            if CURRENT.lock().is_ok_and(|c| c.0.is_empty()) {
                return usual(info);
            }
            PANICS.fetch_add(1, Ordering::SeqCst);
            *LAST.lock().unwrap() = info.to_string();
        }));
        let _ = allocator::TELL.set(Box::new(|| {
            if let Ok(now) = CURRENT.try_lock() {
                let most = allocator::MOST_AT_ONCE;
                eprintln!("{}: more than {most} bytes at once: {}", now.0, harmful(now.0, &now.1).display());
            }
        }));
        watch();
    });
    guard
}

/// What a run of a target did.
#[derive(Default)]
struct Done {
    executions: u64,
    accepted: u64,
    peak: usize,
    faults: Vec<String>,
}

/// A target, with what its inputs are made of.
struct Hunt<'a> {
    target: &'a Target,
    seeds: mutate::Pool,
    heavy: mutate::Pool,
    /// Whether the inputs that are kept were given.
    replayed: bool,
    read: targets::Reader,
    _dir: tempfile::TempDir,
}

impl<'a> Hunt<'a> {
    fn new(target: &'a Target) -> Self {
        let shm = std::path::Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
        let kept = root().join("fuzz/corpus").join(target.name);
        let mut files: Vec<_> = std::fs::read_dir(&kept).map_or(Vec::new(), |d| d.map(|e| e.unwrap().path()).collect());
        files.sort();
        let (heavy, light): (Vec<_>, Vec<_>) =
            files.iter().partition(|f| f.file_name().unwrap().to_str().unwrap().starts_with(HEAVY));
        let read_all = |files: Vec<&PathBuf>| files.into_iter().map(|f| std::fs::read(f).unwrap()).collect::<Vec<_>>();
        let mut seeds = (target.seeds)();
        seeds.extend(read_all(light));
        let (seeds, heavy) = (mutate::Pool::new(seeds), mutate::Pool::new(read_all(heavy)));
        Self { target, seeds, heavy, replayed: false, read: (target.open)(dir.path()), _dir: dir }
    }

    /// One input; counts nothing but what it did.
    fn give(&mut self, input: Vec<u8>, done: &mut Done) {
        let name = self.target.name;
        {
            let mut now = CURRENT.lock().unwrap();
            now.0 = name;
            now.1.clone_from(&input);
        }
        RUNS.fetch_add(1, Ordering::SeqCst);
        let mut accepted = false;
        let used = allocator::measured(|| {
            let read = std::panic::catch_unwind(AssertUnwindSafe(|| (self.read)(&input)));
            accepted = read.unwrap_or(false);
        });
        done.accepted += u64::from(accepted);
        done.peak = done.peak.max(used);
        let bound = self.target.base + self.target.per_byte * input.len();
        if PANICS.swap(0, Ordering::SeqCst) > 0 {
            let file = harmful(name, &input);
            done.faults.push(format!("{name}: panic: {} ({})", LAST.lock().unwrap(), file.display()));
        } else if used > bound || allocator::refused() {
            let (file, length) = (harmful(name, &input), input.len());
            done.faults.push(format!("{name}: {used} bytes for an input of {length} ({})", file.display()));
        }
    }

    /// All inputs that are kept, the first time; then `count` changed ones, or as many as there is time for (one at least).
    fn run(&mut self, seed: u64, count: u64, until: Option<Instant>) -> Done {
        let mut random = mutate::Random::new(seed);
        let mut done = Done::default();
        if !self.replayed {
            self.replayed = true;
            for whole in [self.seeds.inputs(), self.heavy.inputs()].concat() {
                self.give(whole, &mut done);
            }
        }
        done.accepted = 0;
        let in_time = |executions: u64| executions == 0 || until.is_none_or(|end| Instant::now() < end);
        while done.executions < count && done.faults.len() <= 20 && in_time(done.executions) {
            let seldom = !self.heavy.inputs().is_empty() && random.below(SELDOM) == 0;
            let pool = if seldom { &self.heavy } else { &self.seeds };
            let input = pool.mutated(&mut random);
            done.executions += 1;
            self.give(input, &mut done);
        }
        CURRENT.lock().unwrap().0 = "";
        // A target that takes nothing would find nothing; of few inputs none may be taken.
        let (accepted, name) = (done.accepted, self.target.name);
        assert!(
            done.executions < FEW || accepted > done.executions / 1000,
            "{name}: {accepted} inputs of {} were what they claim to be",
            done.executions
        );
        done
    }
}

#[test]
fn nothing_read_from_strangers_does_harm() {
    let _one = watched();
    let (times, seed) = (number("LOWBIT_HOSTILE_TIMES", 1), number("LOWBIT_HOSTILE_SEED", 1));
    let mut faults = Vec::new();
    for target in chosen() {
        let start = Instant::now();
        let done = Hunt::new(&target).run(seed, target.runs * times, None);
        let (n, took) = (done.executions, start.elapsed().as_secs_f64());
        eprintln!("{}: {n} inputs in {took:.1} s, {} accepted, {} bytes", target.name, done.accepted, done.peak);
        faults.extend(done.faults);
    }
    assert!(faults.is_empty(), "{} inputs did harm:\n{}", faults.len(), faults.join("\n"));
}

fn ledger_file() -> PathBuf {
    root().join("fuzz/ledger.jsonl")
}

/// Holds a target for this process, so that no seed is taken twice; none where another process has it.
fn claimed(name: &str) -> Option<std::fs::File> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("hostile");
    std::fs::create_dir_all(&dir).unwrap();
    let file = std::fs::File::create(dir.join(format!("{name}.lock"))).unwrap();
    file.try_lock().ok().map(|()| file)
}

/// Seeds that no run had, target by target, those with the fewest executions first, until each has `LOWBIT_HOSTILE_GOAL` or the
/// `LOWBIT_HOSTILE_MINUTES` are over. Several processes may run at a time, each on a target of its own; on a core of its own
/// (`taskset`) none waits for the threads of another.
#[test]
#[ignore = "long; adds to fuzz/ledger.jsonl"]
fn long_runs_add_up() {
    /// Executions of a seed at most.
    const CHUNK: u64 = 1_000_000;
    /// Time of a seed at most: what a run that is cut off loses.
    const LONGEST: Duration = Duration::from_secs(120);
    let _one = watched();
    let (goal, minutes) = (number("LOWBIT_HOSTILE_GOAL", 10_000_000), number("LOWBIT_HOSTILE_MINUTES", 60));
    let (end, targets) = (Instant::now() + Duration::from_secs(minutes * 60), chosen());
    let mut hunts: Vec<Option<Hunt<'_>>> = targets.iter().map(|_| None).collect();
    let mut faults = Vec::new();
    while Instant::now() < end && faults.is_empty() {
        let entries = ledger::read(&ledger_file());
        let so_far = |i: usize| ledger::total(&entries, targets[i].name).map_or(0, |e| e.executions);
        let mut behind: Vec<usize> = (0..targets.len()).filter(|i| so_far(*i) < goal).collect();
        behind.sort_by_key(|i| so_far(*i));
        let free = behind.into_iter().find_map(|i| Some((i, claimed(targets[i].name)?)));
        let Some((at, _claim)) = free else { break };
        // Read again: who held the target until now has added to it.
        let known = ledger::total(&ledger::read(&ledger_file()), targets[at].name);
        let (had, seed) = known.map_or((0, 1), |e| (e.executions, e.seeds[1] + 1));
        if had >= goal {
            continue;
        }
        let (began, (date, commit)) = (Instant::now(), ledger::now());
        let target = &targets[at];
        let hunt = hunts[at].get_or_insert_with(|| Hunt::new(target));
        let done = hunt.run(seed, CHUNK.min(goal - had), Some(end.min(began + LONGEST)));
        let seconds = began.elapsed().as_secs();
        ledger::add(
            &ledger_file(),
            ledger::Entry {
                target: target.name.into(),
                seeds: [seed, seed],
                executions: done.executions,
                accepted: done.accepted,
                found: done.faults.len() as u64,
                most_bytes: done.peak,
                seconds,
                date,
                commit,
            },
        );
        eprintln!("{} {seed}: {} in {seconds} s, {} found", target.name, done.executions, done.faults.len());
        faults.extend(done.faults);
    }
    assert!(faults.is_empty(), "{} inputs did harm:\n{}", faults.len(), faults.join("\n"));
}

/// Ends the process when one input is at work too long, and says which.
fn watch() {
    std::thread::spawn(move || {
        let mut seen = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = RUNS.load(Ordering::SeqCst);
            if now != seen.0 {
                seen = (now, Instant::now());
            } else if seen.1.elapsed() > HANG {
                let (name, input) = CURRENT.lock().unwrap().clone();
                if !name.is_empty() {
                    eprintln!("{name}: no end within {HANG:?}: {}", harmful(name, &input).display());
                    std::process::abort();
                }
            }
        }
    });
}

/// 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let pieces: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap()).collect();
    pieces.join(",")
}

/// The generated part of `docs/security.md`, from the ledger.
fn table() -> String {
    let entries = ledger::read(&ledger_file());
    let mut table = String::from(
        "| target | reads | inputs | accepted | did harm | most memory | bound |\n|---|---|---:|---:|---:|---:|---|\n",
    );
    for t in targets::all() {
        let Some(e) = ledger::total(&entries, t.name) else { continue };
        table += &format!(
            "| `{}` | {} | {} | {:.2} % | {} | {:.1} MB | {} MB + {} × input |\n",
            t.name,
            t.about,
            grouped(e.executions),
            100.0 * e.accepted as f64 / e.executions as f64,
            e.found,
            e.most_bytes as f64 / (1 << 20) as f64,
            t.base >> 20,
            t.per_byte
        );
    }
    table
}

#[test]
fn the_table_is_that_of_the_ledger() {
    let _one = watched();
    let path = root().join("docs/security.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (start, end) = ("<!-- generated -->\n", "<!-- end -->");
    let (from, to) = (text.find(start).unwrap() + start.len(), text.find(end).unwrap());
    if variable("LOWBIT_HOSTILE_TABLE").is_some() {
        std::fs::write(&path, format!("{}{}{}", &text[..from], table(), &text[to..])).unwrap();
        return;
    }
    assert_eq!(
        &text[from..to],
        table(),
        "LOWBIT_HOSTILE_TABLE=1 cargo test --release --workspace --test hostile table"
    );
}

/// Every kind of input, and no seed twice.
#[test]
fn the_ledger_adds_up() {
    let _one = watched();
    let entries = ledger::read(&ledger_file());
    for t in targets::all() {
        assert!(ledger::total(&entries, t.name).is_some(), "{}: no long run", t.name);
        let mut seeds: Vec<[u64; 2]> = entries.iter().filter(|e| e.target == t.name).map(|e| e.seeds).collect();
        seeds.sort_unstable();
        assert!(seeds.windows(2).all(|w| w[0][1] < w[1][0]), "{}: a seed counted twice", t.name);
        let stub = root().join("fuzz/fuzz_targets").join(format!("{}.rs", t.name));
        assert!(stub.exists(), "{}", stub.display());
    }
}

#[test]
fn the_measure_itself() {
    let _one = watched();
    // The threads of this process are counted together: what the harness itself holds for a moment is not in the middle one.
    let mut seen: Vec<_> =
        (0..9).map(|_| allocator::measured(|| drop(std::hint::black_box(vec![1u8; 100_000])))).collect();
    seen.sort_unstable();
    assert!((100_000..110_000).contains(&seen[4]), "{seen:?}");
    let mut a = mutate::Random::new(3);
    let mut b = mutate::Random::new(3);
    let pool = mutate::Pool::new(vec![b"{\"a\": [1, 2]}".to_vec(), vec![]]);
    let made: Vec<_> = (0..200).map(|_| pool.mutated(&mut a)).collect();
    assert!(made == (0..200).map(|_| pool.mutated(&mut b)).collect::<Vec<_>>(), "the same inputs every time");
    assert!(made.iter().filter(|m| **m == pool.inputs()[0]).count() < 20);
}
