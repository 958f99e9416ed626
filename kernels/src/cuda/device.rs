//! One launch interface, two devices: CUDA, and the emulator that runs the same kernel sources on the host.
//!
//! Memory is bytes; what they mean is the launcher's business. Kernels are named as in their `.cu` files, and take
//! their arguments in the order written there, so that grids, shared sizes and argument lists of the host side are
//! tested on the emulator before a GPU sees them.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cuda")]
use super::driver::{CudaDevice, CudaMemory};
#[cfg(feature = "emulated")]
pub use super::emulated::EmulatorOptions;
#[cfg(feature = "emulated")]
use super::emulated::{EmulatedDevice, EmulatedMemory, EmulatedRecording};
#[cfg(feature = "cuda")]
use super::graph::CudaGraph;
#[cfg(feature = "cuda")]
use super::nvrtc::DeviceOptions;
use crate::error::{KernelError, Result};

/// Threads a block may have, on every device.
pub const MAX_BLOCK_THREADS: u64 = 1024;

/// Shared memory a block may ask for at launch: 227 KiB, the most of any device here (Hopper).
pub const MAX_SHARED_BYTES: u32 = 227 << 10;

/// Multiprocessors of the emulator: few, so that blocks have several tiles each.
#[cfg(feature = "emulated")]
const EMULATED_SMS: usize = 3;

/// Where kernels run.
pub struct Device {
    inner: Inner,
    /// Of a recorder: allocations that are used again, so that a repeated step finds its memory where it was.
    arena: Option<Arena>,
}

/// Blocks by size; one that nobody else holds is free. All use is in the order of one stream.
type Arena = Mutex<HashMap<usize, Vec<Arc<Allocation>>>>;

enum Inner {
    #[cfg(feature = "emulated")]
    Emulated(EmulatedDevice),
    #[cfg(feature = "cuda")]
    Cuda(CudaDevice),
}

/// Memory of one device, or a part of such; freed with the last that holds some of it.
pub struct Memory {
    block: Arc<Allocation>,
    offset: usize,
    bytes: usize,
}

/// Launches in their order, to be repeated with the same arguments.
pub struct Recording {
    inner: Recorded,
}

enum Recorded {
    #[cfg(feature = "emulated")]
    Emulated(EmulatedRecording),
    #[cfg(feature = "cuda")]
    Cuda(CudaGraph),
}

enum Allocation {
    #[cfg(feature = "emulated")]
    Emulated(EmulatedMemory),
    #[cfg(feature = "cuda")]
    Cuda(CudaMemory),
}

/// When a launch may begin.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the emulator runs one launch at a time"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// When the launch before has ended.
    After,
    /// When all blocks of the launch before have said `grid_ready()` or ended.
    Early,
}

/// The shape of a launch, in blocks, threads and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z; at most [`MAX_BLOCK_THREADS`] together.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block; at most [`MAX_SHARED_BYTES`].
    pub shared_bytes: u32,
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        write!(f, "grid {gx}x{gy}x{gz}, block {bx}x{by}x{bz}, {} bytes shared", self.shared_bytes)
    }
}

/// A kernel argument.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// Memory the kernel only reads: the checking emulator refuses a write.
    In(&'a Memory),
    /// Memory the kernel writes, and may read.
    Out(&'a Memory),
    /// Memory from a byte offset on; read or written.
    InAt(&'a Memory, usize),
    /// A null pointer, where the kernel allows one.
    Null,
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `float`.
    F32(f32),
}

impl Device {
    /// The kernels compiled for the host, blocks spread over `threads` OS threads. Out-of-bounds accesses that reach
    /// a page outside the buffer, stray writes beside it and divergent barriers are errors; see
    /// [`EmulatorOptions::checked`] for the complete check. Results do not depend on `threads`.
    #[cfg(feature = "emulated")]
    pub fn emulated(threads: usize) -> Result<Self> {
        Self::emulated_with(EmulatorOptions { threads, ..EmulatorOptions::default() })
    }

    /// The emulator with its checks chosen.
    #[cfg(feature = "emulated")]
    pub fn emulated_with(options: EmulatorOptions) -> Result<Self> {
        Ok(Self { inner: Inner::Emulated(EmulatedDevice::new(options)?), arena: None })
    }

    /// GPU `ordinal`; an error, never a panic, where there is no driver or no such GPU.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize, options: &DeviceOptions) -> Result<Self> {
        Ok(Self { inner: Inner::Cuda(CudaDevice::open(ordinal, options)?), arena: None })
    }

    /// As [`Device::cuda`] from the embedded PTX, whether there is an NVRTC or not.
    #[cfg(feature = "cuda")]
    pub fn cuda_from_ptx(ordinal: usize) -> Result<Self> {
        Ok(Self { inner: Inner::Cuda(CudaDevice::open_from_ptx(ordinal)?), arena: None })
    }

    /// `emulated` or `cuda`.
    pub fn name(&self) -> &'static str {
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => d.name(),
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => d.name(),
        }
    }

    /// The GPU behind it, for what only CUDA has (product name, free memory); `None` on the emulator.
    #[cfg(feature = "cuda")]
    pub fn as_cuda(&self) -> Option<&CudaDevice> {
        match &self.inner {
            Inner::Cuda(d) => Some(d),
            #[cfg(feature = "emulated")]
            Inner::Emulated(_) => None,
        }
    }

    /// Memory with undefined contents (NaN bytes on the emulator). Aligned to 256 bytes on CUDA; to 16 on the
    /// emulator, where the end lies as close as that allows to a page that must not be touched.
    pub fn alloc(&self, bytes: usize) -> Result<Memory> {
        if let Some(block) = self.free_block(bytes) {
            #[cfg(feature = "emulated")]
            if let (Inner::Emulated(d), Allocation::Emulated(m)) = (&self.inner, block.as_ref()) {
                d.forget(m)?;
            }
            return Ok(Memory { block, offset: 0, bytes });
        }
        let block = Arc::new(match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => Allocation::Emulated(d.alloc(bytes)?),
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => Allocation::Cuda(d.alloc(bytes)?),
        });
        if let Some(arena) = &self.arena {
            let mut blocks = arena.lock().unwrap_or_else(PoisonError::into_inner);
            blocks.entry(bytes).or_default().push(block.clone());
        }
        Ok(Memory { block, offset: 0, bytes })
    }

    fn free_block(&self, bytes: usize) -> Option<Arc<Allocation>> {
        let mut blocks = self.arena.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.get_mut(&bytes)?.iter().find(|b| Arc::strong_count(b) == 1).cloned()
    }

    /// Memory of zero bytes.
    pub fn alloc_zeroed(&self, bytes: usize) -> Result<Memory> {
        let m = self.alloc(bytes)?;
        match (&self.inner, m.block.as_ref()) {
            #[cfg(feature = "emulated")]
            (Inner::Emulated(d), Allocation::Emulated(block)) => d.clear(block)?,
            #[cfg(feature = "cuda")]
            (Inner::Cuda(d), Allocation::Cuda(block)) => d.clear(block)?,
            #[cfg(all(feature = "emulated", feature = "cuda"))]
            _ => return Err(self.foreign()),
        }
        Ok(m)
    }

    /// A copy of `bytes`.
    pub fn upload(&self, bytes: &[u8]) -> Result<Memory> {
        let mut m = self.alloc(bytes.len())?;
        self.write(&mut m, 0, bytes)?;
        Ok(m)
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, m: &mut Memory, offset: usize, bytes: &[u8]) -> Result<()> {
        let at = m.within(&(offset..offset.saturating_add(bytes.len())))?.start;
        match (&self.inner, m.block.as_ref()) {
            #[cfg(feature = "emulated")]
            (Inner::Emulated(d), Allocation::Emulated(m)) => d.write(m, at, bytes),
            #[cfg(feature = "cuda")]
            (Inner::Cuda(d), Allocation::Cuda(m)) => d.write(m, at, bytes),
            #[cfg(all(feature = "emulated", feature = "cuda"))]
            _ => Err(self.foreign()),
        }
    }

    /// Copies `range` back, after everything launched before.
    pub fn read(&self, m: &Memory, range: Range<usize>) -> Result<Vec<u8>> {
        let range = m.within(&range)?;
        match (&self.inner, m.block.as_ref()) {
            #[cfg(feature = "emulated")]
            (Inner::Emulated(d), Allocation::Emulated(m)) => d.read(m, range),
            #[cfg(feature = "cuda")]
            (Inner::Cuda(d), Allocation::Cuda(m)) => d.read(m, range),
            #[cfg(all(feature = "emulated", feature = "cuda"))]
            _ => Err(self.foreign()),
        }
    }

    /// The same device for sequences of launches that are recorded and repeated: its memory is used again instead of being
    /// freed, and between [`Device::record`] and [`Device::recorded`] launches are kept instead of run.
    pub fn recorder(&self) -> Result<Self> {
        let inner = match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => Inner::Emulated(d.recorder()),
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => Inner::Cuda(d.recorder()?),
        };
        Ok(Self { inner, arena: Some(Arena::default()) })
    }

    /// From now on launches and clears are recorded; copies to and from the host are errors.
    pub fn record(&self) -> Result<()> {
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => d.record(),
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => d.record(),
        }
    }

    /// Ends [`Device::record`]; what was recorded has not run yet.
    pub fn recorded(&self) -> Result<Recording> {
        let inner = match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => Recorded::Emulated(d.recorded()?),
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => Recorded::Cuda(d.recorded()?),
        };
        Ok(Recording { inner })
    }

    /// Runs a recording, in the order of everything else on this device.
    ///
    /// The caller vouches that all memory its launches were given is still alive, and that what the kernels read there
    /// keeps within the sizes they were recorded with.
    pub fn repeat(&self, recording: &Recording) -> Result<()> {
        match (&self.inner, &recording.inner) {
            #[cfg(feature = "emulated")]
            (Inner::Emulated(d), Recorded::Emulated(r)) => d.repeat(r),
            #[cfg(feature = "cuda")]
            (Inner::Cuda(d), Recorded::Cuda(r)) => d.repeat(r),
            #[cfg(all(feature = "emulated", feature = "cuda"))]
            _ => Err(self.foreign()),
        }
    }

    /// Copies `bytes` to the start of memory that recordings read, in stream order and without waiting for it. For
    /// recorders; a few kilobytes at most.
    pub fn stage(&self, m: &Memory, bytes: &[u8]) -> Result<()> {
        let at = m.within(&(0..bytes.len()))?.start;
        match (&self.inner, m.block.as_ref()) {
            #[cfg(feature = "emulated")]
            (Inner::Emulated(d), Allocation::Emulated(m)) => d.write(m, at, bytes),
            #[cfg(feature = "cuda")]
            (Inner::Cuda(d), Allocation::Cuda(m)) => d.stage(m, at, bytes),
            #[cfg(all(feature = "emulated", feature = "cuda"))]
            _ => Err(self.foreign()),
        }
    }

    /// Runs `kernel`. The emulator has finished when this returns, and checks the argument list against the kernel's
    /// own; CUDA may report a failure at the next copy.
    pub fn launch(&self, kernel: &'static str, l: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.launch_when(kernel, l, args, Start::After)
    }

    /// [`Device::launch`] of a kernel that may begin before the launch before it has ended: its source calls
    /// `grid_wait()` (`gpu.h`) before it touches what other launches write. Where the device cannot, an ordinary launch.
    pub fn launch_early(&self, kernel: &'static str, l: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.launch_when(kernel, l, args, Start::Early)
    }

    fn launch_when(&self, kernel: &'static str, l: Launch, args: &[Arg<'_>], start: Start) -> Result<()> {
        let threads: u64 = l.block.iter().map(|n| u64::from(*n)).product();
        let refuse = |problem: String| Err(KernelError::Launch { kernel, launch: l.to_string(), problem });
        if l.grid.contains(&0) || threads == 0 {
            return refuse("an empty launch".to_string());
        }
        if threads > MAX_BLOCK_THREADS || l.block[2] > 64 || l.grid[1].max(l.grid[2]) > 65535 {
            return refuse("more blocks or threads than a device takes".to_string());
        }
        if l.shared_bytes > MAX_SHARED_BYTES {
            return refuse(format!("more shared memory than {MAX_SHARED_BYTES} bytes"));
        }
        for arg in args {
            if let Arg::InAt(m, offset) = arg
                && *offset > m.bytes()
            {
                return refuse(format!("an argument starts at byte {offset} of {}", m.bytes()));
            }
        }
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(d) => d.launch(kernel, &l, args), // one at a time: early or not
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => {
                let mut words = args.iter().map(|a| self.word(a)).collect::<Result<Vec<u64>>>()?;
                d.launch(kernel, &l, &mut words, start)
            }
        }
    }

    /// Multiprocessors: blocks beyond a small multiple of it wait for others. The emulator counts as `EMULATED_SMS`.
    pub fn multiprocessors(&self) -> usize {
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(_) => EMULATED_SMS,
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => d.multiprocessors(),
        }
    }

    /// Whether the kernels of warpgroup products are there: Hopper with code for `sm_90a`, and the emulator.
    pub fn has_warpgroup_products(&self) -> bool {
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(_) => true,
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => d.arch() == "sm_90a",
        }
    }

    /// Whether the kernels of E4M3 products are there: GPUs from `sm_89` on with code for them, and the emulator.
    pub fn has_fp8_products(&self) -> bool {
        match &self.inner {
            #[cfg(feature = "emulated")]
            Inner::Emulated(_) => true,
            #[cfg(feature = "cuda")]
            Inner::Cuda(d) => d.has_fp8_products(),
        }
    }

    /// The argument in the low bytes of a word.
    #[cfg(feature = "cuda")]
    fn word(&self, arg: &Arg<'_>) -> Result<u64> {
        let address = |m: &Memory, offset: usize| match m.block.as_ref() {
            Allocation::Cuda(block) => Ok(block.address() + (m.offset + offset) as u64),
            #[cfg(feature = "emulated")]
            Allocation::Emulated(_) => Err(self.foreign()),
        };
        Ok(match *arg {
            Arg::In(m) | Arg::Out(m) => address(m, 0)?,
            Arg::InAt(m, offset) => address(m, offset)?,
            Arg::Null => 0,
            Arg::I32(v) => u64::from(v as u32),
            Arg::U32(v) => u64::from(v),
            Arg::F32(v) => u64::from(v.to_bits()),
        })
    }

    #[cfg(all(feature = "emulated", feature = "cuda"))]
    fn foreign(&self) -> KernelError {
        KernelError::ForeignHandle { backend: self.name(), what: "memory" }
    }
}

impl Memory {
    /// Bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part of it, on the same memory.
    pub fn part(&self, range: Range<usize>) -> Result<Self> {
        let inside = self.within(&range)?;
        Ok(Self { block: self.block.clone(), offset: inside.start, bytes: inside.len() })
    }

    /// `range` of the block this lies in.
    fn within(&self, range: &Range<usize>) -> Result<Range<usize>> {
        if range.start > range.end || range.end > self.bytes {
            return Err(KernelError::Length { what: "device memory", expected: self.bytes, found: range.end });
        }
        Ok(self.offset + range.start..self.offset + range.end)
    }

    /// The emulator's own view and the place in it; `None` for memory of a GPU.
    #[cfg(feature = "emulated")]
    pub(super) fn as_emulated(&self) -> Option<(&EmulatedMemory, usize)> {
        match self.block.as_ref() {
            Allocation::Emulated(m) => Some((m, self.offset)),
            #[cfg(feature = "cuda")]
            Allocation::Cuda(_) => None,
        }
    }
}
