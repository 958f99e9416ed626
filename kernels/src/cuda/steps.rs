//! Decode steps as recordings: the launches of a step of so many rows are kept once and repeated with other tokens.
//!
//! Token ids, slots and positions lie in device memory of a fixed place and are all that changes from step to step; they
//! are brought there by one small copy. A recording serves any rows whose positions stay below its horizon: attention is
//! launched for as many parts of the cache as that takes, and parts beyond a row's own end at once.
//!
//! The first step of a form runs as usual, so that every kernel is loaded and every allocation made; the second is
//! recorded. Activations come from the recorder's own memory, which recordings of all forms share.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use super::GpuBackend;
use super::device::{Memory, Recording};
use super::rows::{NO_SLOT, RowTable, bytes_of, size};
use crate::backend::{Backend, Buffer, Segment, Steps};
use crate::error::{KernelError, Result};

/// Recordings kept; the one unused for longest makes room.
const MOST: usize = 64;

/// Horizons are multiples of this, and of an eighth of the next power of two: at most a fifth of the parts is idle.
const HORIZON: usize = 256;

/// Keys a row of `tokens` tokens in all is launched for.
pub(super) fn horizon(tokens: usize) -> usize {
    let step = tokens.checked_next_power_of_two().map_or(HORIZON, |p| (p / 8).max(HORIZON));
    tokens.next_multiple_of(step)
}

/// What has to hold of ids, slots and positions: a recording does not look at them on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub ids: usize,
    pub slots: usize,
    pub positions: usize,
}

/// The inputs of the step under way.
pub(super) struct StepInputs {
    pub ids: Vec<u32>,
    /// u32 `[rows]`.
    pub ids_memory: Memory,
    pub table: Arc<RowTable>,
    bounds: Mutex<Bounds>,
}

impl StepInputs {
    /// An operation takes ids, slots and positions below these only.
    pub fn limit(&self, ids: usize, slots: usize, positions: usize) {
        let mut b = self.bounds.lock().unwrap_or_else(PoisonError::into_inner);
        let (ids, slots, positions) = (b.ids.min(ids), b.slots.min(slots), b.positions.min(positions));
        *b = Bounds { ids, slots, positions };
    }

    fn bounds(&self) -> Bounds {
        *self.bounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows, and the keys they are launched for.
type Form = (usize, usize);

struct Kept {
    recording: Recording,
    result: Arc<Buffer>,
    bounds: Bounds,
    used: u64,
}

/// See [`Steps`].
pub(super) struct GpuSteps {
    backend: GpuBackend,
    /// u32 `[3, rows]` by rows: ids, slots, positions.
    inputs: HashMap<usize, Memory>,
    /// Forms that ran once.
    warm: Vec<Form>,
    kept: HashMap<Form, Kept>,
    /// The step between `begin` and `finish`, and whether it is being recorded.
    now: Option<(Form, bool)>,
    clock: u64,
}

impl GpuSteps {
    /// On a recorder of the backend's device.
    pub fn new(from: &GpuBackend) -> Result<Self> {
        let device = Arc::new(from.device().recorder()?);
        let backend = GpuBackend::new(device).with_arithmetic(from.arithmetic());
        let (inputs, kept) = (HashMap::new(), HashMap::new());
        Ok(Self { backend, inputs, warm: Vec::new(), kept, now: None, clock: 0 })
    }

    fn refuse<T>(&self, why: String) -> Result<T> {
        Err(KernelError::Unsupported { backend: self.backend.name(), op: "steps", why })
    }

    /// Slots and positions by row: one token a segment, every row once.
    fn places(&self, ids: &[u32], segments: &[Segment]) -> Result<[Vec<i32>; 2]> {
        let (mut slots, mut positions) = (vec![NO_SLOT; ids.len()], vec![NO_SLOT; ids.len()]);
        for s in segments {
            match slots.get_mut(s.row).zip(positions.get_mut(s.row)) {
                Some((slot, position)) if s.tokens == 1 && *slot == NO_SLOT => {
                    (*slot, *position) = (size("slot", s.slot)?, size("position", s.past)?);
                }
                _ => return self.refuse("rows of a step are one token of a segment each".to_string()),
            }
        }
        if segments.len() != ids.len() || ids.is_empty() {
            return self.refuse(format!("{} segments for {} tokens", segments.len(), ids.len()));
        }
        Ok([slots, positions])
    }

    fn check(&self, bounds: &Bounds, ids: &[u32], segments: &[Segment]) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= bounds.ids) {
            return self.refuse(format!("token id {id} is not below {}", bounds.ids));
        }
        match segments.iter().find(|s| s.slot >= bounds.slots || s.past >= bounds.positions) {
            None => Ok(()),
            Some(s) => self.refuse(format!(
                "slot {} at {} is outside a cache of {} slots of {}",
                s.slot, s.past, bounds.slots, bounds.positions
            )),
        }
    }

    fn make_room(&mut self) {
        if self.kept.len() >= MOST
            && let Some(form) = self.kept.iter().min_by_key(|(_, k)| k.used).map(|(f, _)| *f)
        {
            self.kept.remove(&form);
        }
    }
}

impl Steps for GpuSteps {
    fn backend(&self) -> &dyn Backend {
        &self.backend
    }

    fn begin(&mut self, ids: &[u32], segments: &[Segment]) -> Result<Option<Arc<Buffer>>> {
        if self.now.is_some() {
            return self.refuse("a step is under way".to_string());
        }
        let [slots, positions] = self.places(ids, segments)?;
        let rows = ids.len();
        let longest = segments.iter().map(|s| s.past.saturating_add(1)).max().unwrap_or(1);
        let form = (rows, horizon(longest));
        if let Some(k) = self.kept.get(&form) {
            self.check(&k.bounds, ids, segments)?;
        }
        let device = self.backend.device().clone();
        let memory = match self.inputs.entry(rows) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(device.alloc(rows * 3 * 4)?),
        };
        device.stage(memory, &[bytes_of(ids), bytes_of(&slots), bytes_of(&positions)].concat())?;
        self.clock += 1;
        if let Some(k) = self.kept.get_mut(&form) {
            k.used = self.clock;
            device.repeat(&k.recording)?;
            return Ok(Some(k.result.clone()));
        }
        let third = |i: usize| memory.part(i * rows * 4..(i + 1) * rows * 4);
        let table = RowTable::of_step(segments, third(1)?, third(2)?, form.1);
        let bounds = Mutex::new(Bounds { ids: usize::MAX, slots: usize::MAX, positions: form.1 });
        let inputs = StepInputs { ids: ids.to_vec(), ids_memory: third(0)?, table: Arc::new(table), bounds };
        let recording = self.warm.contains(&form);
        if recording {
            self.make_room();
            device.record()?;
        }
        self.backend.set_step(Some(Arc::new(inputs)));
        self.now = Some((form, recording));
        Ok(None)
    }

    fn finish(&mut self, result: Buffer) -> Result<Arc<Buffer>> {
        let step = self.backend.set_step(None);
        let (Some((form, recording)), Some(step)) = (self.now.take(), step) else {
            return self.refuse("no step is under way".to_string());
        };
        let result = Arc::new(result);
        if recording {
            let device = self.backend.device();
            let recording = device.recorded()?;
            device.repeat(&recording)?;
            let (bounds, used) = (step.bounds(), self.clock);
            self.kept.insert(form, Kept { recording, result: result.clone(), bounds, used });
        } else {
            self.warm.push(form);
        }
        Ok(result)
    }

    fn abandon(&mut self) {
        self.backend.set_step(None);
        if let Some((_, true)) = self.now.take() {
            // What was kept of the step is dropped; that it cannot be ended says no more than the step's own error.
            let _ = self.backend.device().recorded();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn horizons_are_close_above() {
        assert_eq!([1, 256, 257, 1024, 1025].map(horizon), [256, 256, 512, 1024, 1280]);
        assert_eq!([2048, 2049, 5000].map(horizon), [2048, 2560, 5120]);
        for tokens in 1..10_000 {
            let h = horizon(tokens);
            assert!(h >= tokens && h - tokens < HORIZON.max(tokens / 4 + 1), "{tokens} {h}");
        }
    }
}
