//! The emulated device: the kernels compiled for the host by `build.rs`, behind the C interface of
//! `emulator/registry.cpp`.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Arg, Launch};
use crate::error::{KernelError, Result};

const NAME: &str = "emulated";

/// Bytes of the C side's message buffer.
const MESSAGE_BYTES: usize = 1024;

/// How the emulator runs kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmulatorOptions {
    /// OS threads a launch's blocks are spread over. A checked launch uses one.
    pub threads: usize,
    /// Look at every access of every kernel: bounds to the byte, writes to read-only arguments, races between the
    /// threads of a block (shared and global memory) and between blocks. Several times slower.
    pub checked: bool,
    /// 0 runs the threads of a block in order; anything else in a random order drawn from it.
    pub seed: u64,
    /// Bytes that the device has, as a GPU's memory ends somewhere.
    pub memory: usize,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        Self { threads: 1, checked: false, seed: 0, memory: usize::MAX }
    }
}

/// A kernel argument as `emulator/runtime.h` declares it.
#[repr(C)]
struct RawArg {
    /// The value or address.
    value: u64,
    /// First byte of the memory it points into.
    base: *mut u8,
    /// Size of that memory.
    bytes: u64,
    /// `r` read-only memory, `w` writable memory, `0` null, `i` integer, `f` float.
    kind: u32,
}

/// Launches in order.
pub struct EmulatedRecording(Vec<Step>);

enum Step {
    Launch { kernel: &'static str, launch: Launch, args: Vec<RawArg> },
    Clear { base: *mut u8, bytes: usize },
}

// SAFETY: plain addresses; who repeats a recording vouches for the memory (`Device::repeat`).
unsafe impl Send for EmulatedRecording {}
// SAFETY: as above.
unsafe impl Sync for EmulatedRecording {}

unsafe extern "C" {
    fn emu_checks_available() -> c_int;
    fn emu_alloc(bytes: u64, fill: c_int) -> *mut u8;
    fn emu_free(base: *mut u8);
    fn emu_launch(
        kernel: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        args: *const RawArg,
        count: u32,
        threads: u32,
        checked: c_int,
        seed: u64,
        message: *mut c_char,
        message_bytes: u64,
    ) -> c_int;
}

fn device_error(problem: &str, hint: &str) -> KernelError {
    KernelError::Device { device: NAME, problem: problem.to_string(), hint: Some(hint.to_string()) }
}

/// Host memory between pages that must not be touched.
pub struct EmulatedMemory {
    base: NonNull<u8>,
    bytes: usize,
    /// Bytes in use on its device.
    used: Arc<AtomicUsize>,
}

// SAFETY: plain memory owned by this value; it is written through `&mut`, or by kernels, see `EmulatedDevice::launch`.
unsafe impl Send for EmulatedMemory {}
// SAFETY: as above.
unsafe impl Sync for EmulatedMemory {}

impl Drop for EmulatedMemory {
    fn drop(&mut self) {
        // SAFETY: `base` came from `emu_alloc` and is freed once; launches are over when they return.
        unsafe { emu_free(self.base.as_ptr()) }
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The host as a device.
pub struct EmulatedDevice {
    options: EmulatorOptions,
    used: Arc<AtomicUsize>,
    /// Launches since recording began.
    recording: Mutex<Option<EmulatedRecording>>,
}

impl EmulatedDevice {
    /// Fails where the kernels, compiled with AVX2, FMA and F16C on x86-64, cannot run.
    pub fn new(options: EmulatorOptions) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
            return Err(device_error(
                "the emulated kernels were compiled for a processor with AVX2, FMA and F16C",
                "run with another device",
            ));
        }
        // SAFETY: takes nothing, reads a constant.
        if options.checked && unsafe { emu_checks_available() } == 0 {
            return Err(device_error(
                "the C++ compiler of this build cannot instrument memory accesses (-fsanitize=thread)",
                "build with GCC or Clang, or leave the checks off",
            ));
        }
        if options.threads == 0 {
            return Err(device_error("0 threads", "give at least 1"));
        }
        Ok(Self { options, used: Arc::default(), recording: Mutex::new(None) })
    }

    /// `emulated`.
    pub fn name(&self) -> &'static str {
        NAME
    }

    /// Memory of NaN bytes.
    pub fn alloc(&self, bytes: usize) -> Result<EmulatedMemory> {
        self.allocate(bytes, 0xff)
    }

    /// The contents become undefined again. (Not part of a recording.)
    pub fn forget(&self, m: &EmulatedMemory) -> Result<()> {
        // SAFETY: the whole of live memory, which is reached through raw pointers only.
        unsafe { m.base.as_ptr().write_bytes(0xff, m.bytes) };
        Ok(())
    }

    /// Zeros.
    pub fn clear(&self, m: &EmulatedMemory) -> Result<()> {
        let step = Step::Clear { base: m.base.as_ptr(), bytes: m.bytes };
        self.keep_or_run(step)
    }

    /// The same device with a recording of its own.
    pub fn recorder(&self) -> Self {
        Self { options: self.options, used: self.used.clone(), recording: Mutex::new(None) }
    }

    /// Launches are kept from now on.
    pub fn record(&self) -> Result<()> {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(EmulatedRecording(Vec::new()));
        Ok(())
    }

    /// What was kept.
    pub fn recorded(&self) -> Result<EmulatedRecording> {
        let kept = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        kept.ok_or_else(|| device_error("nothing is being recorded", "call record first"))
    }

    /// Runs it.
    pub fn repeat(&self, recording: &EmulatedRecording) -> Result<()> {
        recording.0.iter().try_for_each(|s| self.run(s))
    }

    fn keep_or_run(&self, step: Step) -> Result<()> {
        if let Some(kept) = self.recording.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            kept.0.push(step);
            return Ok(());
        }
        self.run(&step)
    }

    /// A copy to or from the host has no place in a recording.
    fn refuse_recorded(&self) -> Result<()> {
        match self.recording.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            None => Ok(()),
            Some(_) => Err(device_error("a copy to or from the host cannot be recorded", "run it before")),
        }
    }

    fn allocate(&self, bytes: usize, fill: c_int) -> Result<EmulatedMemory> {
        let (total, used) = (self.options.memory, self.used.fetch_add(bytes, Ordering::Relaxed));
        if used.checked_add(bytes).is_none_or(|n| n > total) {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
            return Err(KernelError::OutOfMemory {
                device: NAME,
                asked: bytes,
                free: total.saturating_sub(used),
                total,
            });
        }
        // SAFETY: any size may be asked for; null says that there is no memory.
        let base = NonNull::new(unsafe { emu_alloc(bytes as u64, fill) });
        match base {
            Some(base) => Ok(EmulatedMemory { base, bytes, used: self.used.clone() }),
            None => {
                self.used.fetch_sub(bytes, Ordering::Relaxed);
                Err(device_error(&format!("no memory for {bytes} bytes"), "use a smaller batch"))
            }
        }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, m: &EmulatedMemory, offset: usize, bytes: &[u8]) -> Result<()> {
        self.refuse_recorded()?;
        within(m, &(offset..offset.saturating_add(bytes.len())))?;
        // SAFETY: the range was checked, the memory is reached through raw pointers only, and `bytes` is other memory.
        unsafe { m.base.as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `range` back.
    pub fn read(&self, m: &EmulatedMemory, range: Range<usize>) -> Result<Vec<u8>> {
        self.refuse_recorded()?;
        within(m, &range)?;
        // SAFETY: the range was checked, every byte was filled at allocation, and no launch is running on `m`: the
        // launchers hold what they write exclusively.
        Ok(unsafe { slice::from_raw_parts(m.base.as_ptr().add(range.start), range.len()) }.to_vec())
    }

    /// Runs a kernel to its end.
    pub fn launch(&self, kernel: &'static str, l: &Launch, args: &[Arg<'_>]) -> Result<()> {
        let args = args.iter().map(raw_arg).collect::<Result<Vec<RawArg>>>()?;
        self.keep_or_run(Step::Launch { kernel, launch: *l, args })
    }

    fn run(&self, step: &Step) -> Result<()> {
        let (kernel, l, raw) = match step {
            Step::Launch { kernel, launch, args } => (*kernel, launch, args),
            Step::Clear { base, bytes } => {
                // SAFETY: all of an allocation that is alive (see `Device::repeat`).
                unsafe { base.write_bytes(0, *bytes) };
                return Ok(());
            }
        };
        let error = |problem: String| KernelError::Launch { kernel, launch: l.to_string(), problem };
        let name = CString::new(kernel).map_err(|_| error("a NUL in the kernel's name".to_string()))?;
        let mut message = [0u8; MESSAGE_BYTES];
        // SAFETY: the pointers are to live values of the stated counts; memory named by `args` is alive for the call.
        // The C side checks count and kinds of the arguments against the kernel's own, and throws nothing.
        let status = unsafe {
            emu_launch(
                name.as_ptr(),
                l.grid.as_ptr(),
                l.block.as_ptr(),
                l.shared_bytes,
                raw.as_ptr(),
                raw.len() as u32,
                u32::try_from(self.options.threads).unwrap_or(u32::MAX),
                c_int::from(self.options.checked),
                self.options.seed,
                message.as_mut_ptr().cast(),
                MESSAGE_BYTES as u64,
            )
        };
        if status == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&message).map(|m| m.to_string_lossy().into_owned());
        Err(error(text.unwrap_or_default()))
    }
}

fn within(m: &EmulatedMemory, range: &Range<usize>) -> Result<()> {
    if range.start > range.end || range.end > m.bytes {
        return Err(KernelError::Length { what: "device memory", expected: m.bytes, found: range.end });
    }
    Ok(())
}

fn raw_arg(arg: &Arg<'_>) -> Result<RawArg> {
    let pointer = |m: &super::device::Memory, offset: usize, kind: char| {
        let foreign = KernelError::ForeignHandle { backend: NAME, what: "memory" };
        let (m, place) = m.as_emulated().ok_or(foreign)?;
        let base = m.base.as_ptr();
        Ok(RawArg { value: base as u64 + (place + offset) as u64, base, bytes: m.bytes as u64, kind: kind as u32 })
    };
    let value =
        |v: u32, kind: char| RawArg { value: u64::from(v), base: std::ptr::null_mut(), bytes: 0, kind: kind as u32 };
    Ok(match *arg {
        Arg::In(m) => pointer(m, 0, 'r')?,
        Arg::Out(m) => pointer(m, 0, 'w')?,
        Arg::InAt(m, offset) => pointer(m, offset, 'w')?,
        Arg::Null => value(0, '0'),
        Arg::I32(v) => value(v as u32, 'i'),
        Arg::U32(v) => value(v, 'i'),
        Arg::F32(v) => value(v.to_bits(), 'f'),
    })
}
