//! Counts bytes, so that a claim on memory can be held against the size of an input.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The system's allocator, counted.
pub struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// A request beyond this ends the process before the machine suffers.
pub const MOST_AT_ONCE: usize = 1 << 30;
static REFUSED: AtomicBool = AtomicBool::new(false);

impl Counting {
    fn add(size: usize) {
        let now = NOW.fetch_add(size, Ordering::Relaxed) + size;
        PEAK.fetch_max(now, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator; counting touches atomics alone.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST_AT_ONCE {
            return refuse();
        }
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST_AT_ONCE {
            return refuse();
        }
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > MOST_AT_ONCE {
            return refuse();
        }
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        Self::add(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Called with a request too large, before its caller, who seldom survives that, hears of it.
pub static TELL: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

fn refuse() -> *mut u8 {
    REFUSED.store(true, Ordering::Relaxed);
    if let Some(tell) = TELL.get() {
        tell();
    }
    std::ptr::null_mut()
}

/// Runs `f`; most bytes held at a time beyond those held before.
pub fn measured(f: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    f();
    PEAK.load(Ordering::Relaxed).saturating_sub(before)
}

/// Whether a request was refused since the last question; a caller that survived it asked with care.
pub fn refused() -> bool {
    REFUSED.swap(false, Ordering::Relaxed)
}
