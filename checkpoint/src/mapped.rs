//! Files mapped into memory, and what happens when one is cut short or rewritten while it is read.
//!
//! Reading a mapped page that its file no longer has raises SIGBUS, which by default ends the process without a word. The
//! program installs [`tell_of_truncation`]: the handler finds the file by the address, says which it was, and exits. Nothing
//! is salvaged, on purpose: values read from then on would be made up. An unfinished output keeps its hidden name, and the
//! next run removes it. A file rewritten in place raises nothing, so whoever made something from it asks
//! [`Mapped::unchanged`] before putting the result in place.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::time::SystemTime;

use crate::error::{CheckpointError, Result};

/// Bytes that [`Mapped::read_ahead`] asks for at a time: Linux reads no more of a longer piece than a disk's read-ahead, which is this.
const AHEAD_BYTES: usize = 128 << 10;

/// A mapped file. Dropped, its memory is unmapped.
pub struct Mapped {
    path: PathBuf,
    file: File,
    stamp: (u64, Option<SystemTime>),
    map: memmap2::Mmap,
    told: Option<Told>,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

fn stamp(meta: &Metadata) -> (u64, Option<SystemTime>) {
    (meta.len(), meta.modified().ok())
}

impl Mapped {
    /// Maps a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| CheckpointError::io(path, e);
        let file = crate::files::open(path).map_err(io)?;
        let stamp = stamp(&file.metadata().map_err(io)?);
        // SAFETY: the map is private and read-only. Memmap's contract also asks that nobody changes the file meanwhile, which
        // nobody can promise: see the module for what then happens.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        let told = Told::register(path, &map);
        Ok(Self { path: path.to_path_buf(), file, stamp, map, told })
    }

    /// Gives the memory of a part back to the system; reading it again reads the file again. A part that is not of this map, and
    /// a system that will not, change nothing.
    pub fn release(&self, part: &[u8]) {
        let Some(start) = self.place(part) else { return };
        // SAFETY: the map is read-only and backed by a file, so a page that is dropped is read from the file when it is next
        // touched: no value changes. Pages at the ends, shared with neighbours, are dropped and read again alike.
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len()) };
    }

    /// Reads the pages of a part and maps them, before they are touched. A part that is not of this map, and a system that does
    /// not know how, change nothing; what cannot be read is noticed where it is used.
    pub fn map_ahead(&self, part: &[u8]) {
        let Some(start) = self.place(part) else { return };
        #[cfg(target_os = "linux")]
        let _ = self.map.advise_range(memmap2::Advice::PopulateRead, start, part.len());
        #[cfg(not(target_os = "linux"))]
        let _ = start;
    }

    /// Has the system begin to read a part of the file, without waiting for it. A part that is not of this map, and a system that will
    /// not, change nothing.
    pub fn read_ahead(&self, part: &[u8]) {
        for piece in part.chunks(AHEAD_BYTES) {
            let Some(start) = self.place(piece) else { return };
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, start, piece.len());
        }
    }

    /// Where a part begins; `None` of one that is empty or not of this map.
    fn place(&self, part: &[u8]) -> Option<usize> {
        let start = (part.as_ptr() as usize).wrapping_sub(self.map.as_ptr() as usize);
        let inside = start.checked_add(part.len()).is_some_and(|end| end <= self.map.len());
        (inside && !part.is_empty()).then_some(start)
    }

    /// Fails when the file has another length or time of modification than when it was mapped.
    pub fn unchanged(&self) -> Result<()> {
        let now = stamp(&self.file.metadata().map_err(|e| CheckpointError::io(&self.path, e))?);
        if now == self.stamp {
            return Ok(());
        }
        Err(CheckpointError::invalid_hint(
            &self.path,
            format!("the file was changed while it was read ({} bytes then, {} now)", self.stamp.0, now.0),
            "nothing made from it was kept: wait until the file is complete, and give the same command again",
        ))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Before its text and its memory go.
        drop(self.told.take());
    }
}

/// Most files known to the handler at a time; a fault in a further one ends the process as if there were no handler.
const SLOTS: usize = 1024;

struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    text: AtomicPtr<u8>,
    text_len: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        text: AtomicPtr::new(std::ptr::null_mut()),
        text_len: AtomicUsize::new(0),
    }
}; SLOTS];
static EXIT_CODE: AtomicI32 = AtomicI32::new(0);
static INSTALLED: OnceLock<bool> = OnceLock::new();
static mut PREVIOUS: std::mem::MaybeUninit<libc::sigaction> = std::mem::MaybeUninit::uninit();

/// A place in the table, and the text that is printed from it.
struct Told {
    slot: &'static Slot,
    _text: Box<[u8]>,
}

impl Told {
    fn register(path: &Path, map: &[u8]) -> Option<Self> {
        let start = map.as_ptr() as usize;
        let text = format!(
            "error: {}: the file was cut short while it was read (it had {} bytes)\n\
             hint: make it whole again, and give the same command again; nothing unfinished was put in place\n",
            path.display(),
            map.len()
        );
        let mut text = text.into_bytes().into_boxed_slice();
        // An empty map starts nowhere.
        let free = |s: &&Slot| s.start.compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let slot = TABLE.iter().filter(|_| !map.is_empty()).find(free)?;
        slot.text.store(text.as_mut_ptr(), Ordering::SeqCst);
        slot.text_len.store(text.len(), Ordering::SeqCst);
        slot.end.store(start.saturating_add(map.len()), Ordering::SeqCst);
        Some(Self { slot, _text: text })
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.slot.end.store(0, Ordering::SeqCst);
        self.slot.start.store(0, Ordering::SeqCst);
    }
}

/// From now on a mapped file that is cut short ends the process with a message and `code` instead of SIGBUS. For programs: a
/// library does not change signals by itself. Faults elsewhere go to the handler that was there before.
pub fn tell_of_truncation(code: i32) {
    EXIT_CODE.store(code, Ordering::SeqCst);
    INSTALLED.get_or_init(|| {
        // SAFETY: the structure is plain data, valid when zeroed; the handler has the signature SA_SIGINFO asks for; PREVIOUS is
        // written here alone, once, before the handler that reads it can run.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let previous = &raw mut PREVIOUS;
            libc::sigaction(libc::SIGBUS, &action, previous.cast()) == 0
        }
    });
}

extern "C" fn on_bus_error(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; of memory only atomics and a registered text are read, and only functions are
    // called that may be called in a handler (write, _exit, sigaction). Texts live as long as their slot's end is not 0.
    unsafe {
        let at = (*info).si_addr() as usize;
        for slot in &TABLE {
            if (slot.start.load(Ordering::SeqCst)..slot.end.load(Ordering::SeqCst)).contains(&at) {
                let (text, len) = (slot.text.load(Ordering::SeqCst), slot.text_len.load(Ordering::SeqCst));
                libc::write(2, text.cast_const().cast(), len);
                libc::_exit(EXIT_CODE.load(Ordering::SeqCst));
            }
        }
        // Not ours: the access is repeated under whatever was there before.
        let previous = &raw const PREVIOUS;
        libc::sigaction(signal, previous.cast(), std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_is_noticed() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        std::fs::write(&path, "four").unwrap();
        let map = Mapped::open(&path).unwrap();
        map.unchanged().unwrap();
        // Replaced by a rename: the map still is the old file.
        std::fs::write(tmp.path().join("b"), "other").unwrap();
        std::fs::rename(tmp.path().join("b"), &path).unwrap();
        map.unchanged().unwrap();
        let map = Mapped::open(&path).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().set_len(3).unwrap();
        let error = map.unchanged().unwrap_err().to_string();
        assert!(error.contains("5 bytes then, 3 now"), "{error}");
    }

    #[test]
    fn parts_are_mapped_ahead_and_released_and_hold_what_the_file_does() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        let bytes: Vec<u8> = (0..40_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mapped::open(&path).unwrap();
        for part in [0..40_000, 5000..5001, 39_999..40_000] {
            map.read_ahead(&map.as_ref()[part.clone()]);
            map.map_ahead(&map.as_ref()[part.clone()]);
            map.release(&map.as_ref()[part]);
        }
        let held: &[u8] = map.as_ref();
        assert!(held == bytes);
        // Not of this map: left alone.
        map.read_ahead(&bytes);
        map.read_ahead(&[]);
        map.map_ahead(&bytes);
        map.map_ahead(&[]);
        assert_eq!((map.place(&bytes), map.place(&map.as_ref()[7..9])), (None, Some(7)));
    }

    #[test]
    fn slots_are_given_back() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a");
        std::fs::write(&path, "four").unwrap();
        for _ in 0..3 * SLOTS {
            assert!(Mapped::open(&path).unwrap().told.is_some());
        }
    }
}
