//! Threads for the small, frequent loops of decode: fork and join cost a microsecond or two, because idle workers spin
//! for a while before they park.
//!
//! Rayon stays the scheduler of everything coarse (prefill, calibration, evaluation). A decode step makes a hundred
//! products of a few dozen microseconds each, where waking a sleeping rayon worker would cost as much as the work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Spins before a worker parks: about 100 µs, longer than the serial stretch between two products of a decode step.
const SPINS: u32 = 20_000;
/// Spins of the caller before it lets the scheduler run somebody else (an oversubscribed machine).
const PATIENCE: u32 = 10_000;

/// Bit of the gate: no job, or its tasks are all taken.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// A job: a closure of the caller's, alive until [`Pool::run`] returns.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Counts jobs; a change is what workers wait for.
    epoch: AtomicUsize,
    /// The job of this epoch; written before `epoch` changes, read after.
    job: Mutex<Option<SendJob>>,
    /// Tasks that nobody took yet: first in the low half, end in the high half.
    left: AtomicU64,
    /// Workers inside the job, and [`CLOSED`] when no more may enter.
    gate: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the closure behind the pointer is `Sync`, and `Pool::run` keeps it alive until every worker is done with it.
unsafe impl Send for SendJob {}

/// A set of workers; dropping it ends them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
    /// One job at a time; a second caller works alone instead of waiting.
    busy: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller's included.
    pub fn new(threads: usize) -> Self {
        let count = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: Mutex::new(None),
            left: AtomicU64::new(0),
            gate: AtomicUsize::new(CLOSED),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let workers: Vec<JoinHandle<()>> = (0..count)
            .filter_map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("lowbit-decode-{i}")).spawn(move || work(&shared, i)).ok()
            })
            .collect();
        let threads = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, threads, busy: Mutex::new(()) }
    }

    /// Calls `f(0) .. f(tasks − 1)`, each once, on any thread, and returns when all have returned. Which thread runs a
    /// task is not defined, so `f` must not let it show.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let guard = if tasks > 1 && tasks <= u32::MAX as usize && !self.workers.is_empty() {
            self.busy.try_lock().ok()
        } else {
            None
        };
        let Some(_guard) = guard else {
            (0..tasks).for_each(f);
            return;
        };
        let s = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the pointer only inside the gate, and this function closes it and
        // waits until it is empty before it returns (nor does it unwind earlier: the closure's panics are caught).
        let job: Job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f) };
        *s.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(SendJob(job));
        s.left.store((tasks as u64) << 32, Ordering::Relaxed);
        s.gate.fetch_and(!CLOSED, Ordering::SeqCst);
        s.epoch.fetch_add(1, Ordering::SeqCst);
        for (i, t) in self.threads.iter().enumerate() {
            if s.parked[i].load(Ordering::SeqCst) {
                t.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| pull(s, f, true)));
        // A worker that never came (asleep, or its core is busy with somebody else's work) is not waited for.
        s.gate.fetch_or(CLOSED, Ordering::SeqCst);
        let mut spins = 0;
        while s.gate.load(Ordering::SeqCst) != CLOSED {
            std::hint::spin_loop();
            spins += 1;
            if spins > PATIENCE {
                std::thread::yield_now();
            }
        }
        let theirs = s.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a task panicked on a worker");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for w in self.workers.drain(..) {
            // A worker's panic was already handed to the caller of `run`.
            let _ = w.join();
        }
    }
}

/// The caller takes from the front, workers from the back: tasks that follow each other in memory mostly fall to one thread, whose
/// prefetching then is not in vain.
fn pull(s: &Shared, f: &(dyn Fn(usize) + Sync), front: bool) {
    const FIRST: u64 = u32::MAX as u64;
    let take = |left: u64| {
        let (first, end) = (left & FIRST, left >> 32);
        match (first < end, front) {
            (false, _) => None,
            (true, true) => Some(left + 1),
            (true, false) => Some(left - (1 << 32)),
        }
    };
    while let Ok(left) = s.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
        f(if front { left & FIRST } else { (left >> 32) - 1 } as usize);
    }
}

fn work(s: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while s.epoch.load(Ordering::SeqCst) == seen {
            std::hint::spin_loop();
            spins += 1;
            if spins > SPINS {
                // Announce, look again, then sleep: a job posted in between either is seen here or sees the flag.
                s.parked[index].store(true, Ordering::SeqCst);
                if s.epoch.load(Ordering::SeqCst) == seen {
                    std::thread::park();
                }
                s.parked[index].store(false, Ordering::SeqCst);
                spins = 0;
            }
        }
        seen = s.epoch.load(Ordering::SeqCst);
        if s.stop.load(Ordering::SeqCst) {
            return;
        }
        if s.gate.fetch_add(1, Ordering::SeqCst) & CLOSED == 0 {
            let job = *s.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(job) = job {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    // SAFETY: this worker entered while the gate was open: `run` posted the job before it opened the
                    // gate and keeps the closure alive until the gate is empty.
                    let f = unsafe { &*job.0 };
                    pull(s, f, false);
                }));
                if result.is_err() {
                    s.panicked.store(true, Ordering::Relaxed);
                }
            }
        }
        s.gate.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Start of a slice that tasks write disjoint parts of.
pub struct Parts<T>(*mut T, usize);
// SAFETY: only disjoint parts are handed out (`part`'s contract), each to one task, while the slice is borrowed.
unsafe impl<T: Send> Send for Parts<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// Splits `slice` by hand.
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr(), slice.len())
    }

    /// Elements `from .. from + len`, clipped to the slice.
    ///
    /// # Safety
    /// The slice given to `new` is still borrowed, and no two live parts overlap.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one exclusive borrow")]
    pub unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        let from = from.min(self.1);
        let len = len.min(self.1 - from);
        // SAFETY: the range lies in the slice; the caller vouches for exclusiveness.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 300] {
                let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..200 {
                    pool.run(tasks, &|i| {
                        hits[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 200), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(30));
            let sum = AtomicUsize::new(0);
            pool.run(10, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45);
        }
    }

    #[test]
    fn a_nested_call_works_alone_and_a_panic_reaches_the_caller() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            })
        });
        assert_eq!(sum.load(Ordering::Relaxed), 12);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != 5))));
        assert!(result.is_err());
        pool.run(2, &|_| {});
    }
}
