//! Launches captured as a CUDA graph, and host values brought to the device without waiting.
//!
//! Launches are captured on a stream of the recorder's own, where nothing ever runs, so that other threads may go on
//! using the device. Graphs run on the device's stream, in order with everything else. A capture is begun in relaxed
//! mode: memory that an operation allocates meanwhile comes from the device's stream and is no part of the graph.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUevent_flags_enum as EventFlag, CUstreamCaptureMode as CaptureMode};
use cudarc::driver::{CudaStream, result};

use super::driver::{Shared, failed};
use crate::error::Result;

/// Copies under way at once.
const SLOTS: usize = 4;
/// Bytes of one.
const SLOT_BYTES: usize = 16 << 10;

/// What a device needs to record.
pub struct Recorder {
    capture: Arc<CudaStream>,
    capturing: AtomicBool,
    staging: Mutex<Staging>,
}

/// Pinned memory in turns: a slot is written again once its last copy is done.
struct Staging {
    shared: Arc<Shared>,
    base: NonNull<u8>,
    done: Vec<sys::CUevent>,
    next: usize,
}

// SAFETY: pinned memory owned by this value and event handles, used from any thread that has the context current, which
// every use binds first.
unsafe impl Send for Staging {}

impl Staging {
    fn new(shared: &Arc<Shared>) -> Result<Self> {
        // SAFETY: the context is current; the memory is written before it is read.
        let base = unsafe { result::malloc_host(SLOTS * SLOT_BYTES, 0) }.map_err(|e| failed("pinned memory", e))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| failed("pinned memory", result_of(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)))?;
        let mut made = Self { shared: shared.clone(), base, done: Vec::with_capacity(SLOTS), next: 0 };
        for _ in 0..SLOTS {
            let event = result::event::create(EventFlag::CU_EVENT_DISABLE_TIMING).map_err(|e| failed("an event", e))?;
            made.done.push(event);
        }
        Ok(made)
    }
}

fn result_of(status: sys::CUresult) -> cudarc::driver::DriverError {
    cudarc::driver::DriverError(status)
}

impl Drop for Staging {
    fn drop(&mut self) {
        let s = &self.shared;
        s.context.record_err(s.context.bind_to_thread());
        s.context.record_err(s.stream.synchronize());
        for event in &self.done {
            // SAFETY: created by this value, destroyed once.
            s.context.record_err(unsafe { result::event::destroy(*event) });
        }
        // SAFETY: allocated by `malloc_host`, freed once; the stream that reads it is idle.
        s.context.record_err(unsafe { result::free_host(self.base.as_ptr().cast::<c_void>()) });
    }
}

impl Recorder {
    pub(super) fn new(shared: &Arc<Shared>) -> Result<Self> {
        shared.bind()?;
        let capture = shared.context.new_stream().map_err(|e| failed("making a stream", e))?;
        Ok(Self { capture, capturing: AtomicBool::new(false), staging: Mutex::new(Staging::new(shared)?) })
    }

    /// The stream launches go to while they are recorded.
    pub(super) fn capturing(&self) -> Option<sys::CUstream> {
        self.capturing.load(Ordering::Relaxed).then(|| self.capture.cu_stream())
    }

    pub(super) fn begin(&self, shared: &Shared) -> Result<()> {
        shared.bind()?;
        // SAFETY: the stream is this recorder's own and alive.
        unsafe { result::stream::begin_capture(self.capture.cu_stream(), CaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) }
            .map_err(|e| shared.late("beginning to record", e))?;
        self.capturing.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn end(&self, shared: &Arc<Shared>) -> Result<CudaGraph> {
        self.capturing.store(false, Ordering::Relaxed);
        shared.bind()?;
        // SAFETY: the stream is this recorder's own and alive; where no capture is under way, this is an error.
        let graph = unsafe { result::stream::end_capture(self.capture.cu_stream()) }
            .map_err(|e| shared.late("recording", e))?;
        // SAFETY: a graph just captured; it is destroyed once, and an executable graph does not need it.
        let (made, destroyed) = unsafe {
            (result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)), result::graph::destroy(graph))
        };
        let exec = made.map_err(|e| shared.late("making a recording executable", e))?;
        destroyed.map_err(|e| shared.late("recording", e))?;
        Ok(CudaGraph { shared: shared.clone(), exec })
    }

    /// Copies through the next slot; false where `bytes` do not fit one.
    pub(super) fn stage(&self, shared: &Shared, to: sys::CUdeviceptr, bytes: &[u8]) -> Result<bool> {
        if bytes.len() > SLOT_BYTES {
            return Ok(false);
        }
        shared.bind()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = staging.next;
        staging.next = (slot + 1) % SLOTS;
        let Some(event) = staging.done.get(slot).copied() else { return Ok(false) };
        // SAFETY: the event is alive; one never recorded counts as done. Then nothing reads the slot, which lies within
        // the pinned memory and holds SLOT_BYTES.
        let pinned = unsafe {
            result::event::synchronize(event).map_err(|e| shared.late("waiting for a copy", e))?;
            let at = staging.base.as_ptr().add(slot * SLOT_BYTES);
            at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            std::slice::from_raw_parts(at, bytes.len())
        };
        // SAFETY: the caller checked that the target is alive and large enough; the source is pinned and is not written
        // before the event after it is done.
        unsafe {
            result::memcpy_htod_async(to, pinned, shared.stream.cu_stream())
                .and_then(|()| result::event::record(event, shared.stream.cu_stream()))
        }
        .map_err(|e| shared.late("copying to the GPU", e))?;
        Ok(true)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.capturing.load(Ordering::Relaxed) {
            // SAFETY: ends the capture of our own stream; the graph is not used.
            if let Ok(graph) = unsafe { result::stream::end_capture(self.capture.cu_stream()) } {
                // SAFETY: a graph just captured, destroyed once.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        }
    }
}

/// Launches as one submission.
pub struct CudaGraph {
    shared: Arc<Shared>,
    exec: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread that has the context current; uses are in the order of one stream.
unsafe impl Send for CudaGraph {}
// SAFETY: as above.
unsafe impl Sync for CudaGraph {}

impl CudaGraph {
    pub(super) fn launch(&self, shared: &Arc<Shared>) -> Result<()> {
        if !Arc::ptr_eq(&self.shared, shared) {
            return Err(crate::error::KernelError::ForeignHandle { backend: "cuda", what: "recording" });
        }
        shared.bind()?;
        shared.submitted("one of a recorded step");
        // SAFETY: the graph is alive; who repeats it vouches for the memory its launches name (`Device::repeat`).
        unsafe { result::graph::launch(self.exec, shared.stream.cu_stream()) }
            .map_err(|e| shared.late("submitting a recorded step", e))
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        let s = &self.shared;
        s.context.record_err(s.context.bind_to_thread());
        s.context.record_err(s.stream.synchronize());
        // SAFETY: instantiated once, destroyed once, and not running any more.
        s.context.record_err(unsafe { result::graph::exec_destroy(self.exec) });
    }
}
