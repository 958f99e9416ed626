//! Host values on their way to the device: bytes of floats, and the slot and position of each row of a call.

use super::device::{Device, Memory};
use crate::backend::Segment;
use crate::error::{KernelError, Result};

/// Marks a row that no segment holds; kernels leave such rows alone.
pub const NO_SLOT: i32 = -1;

/// The little-endian bytes of 32-bit values.
pub trait Word: Copy {
    /// Four bytes.
    fn bytes(self) -> [u8; 4];
}

impl Word for f32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl Word for u32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

impl Word for i32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

/// Values as the device reads them.
pub fn bytes_of<T: Word>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|v| v.bytes()).collect()
}

/// Floats the device wrote.
pub fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Unsigned integers the device wrote.
pub fn words_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// A size as kernels take it.
pub fn size(what: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| KernelError::Overflow(what))
}

/// Slot and position of each of the `total` rows of a call, on the device.
pub struct RowTable {
    segments: Vec<Segment>,
    total: usize,
    horizon: Option<usize>,
    /// i32 `[total]`, [`NO_SLOT`] where no segment holds the row.
    pub slots: Memory,
    /// i32 `[total]`, [`NO_SLOT`] likewise.
    pub positions: Memory,
}

impl RowTable {
    /// Uploads the table; segments must lie within `total` rows.
    pub fn new(device: &Device, segments: &[Segment], total: usize) -> Result<Self> {
        let (mut slots, mut positions) = (vec![NO_SLOT; total], vec![NO_SLOT; total]);
        for s in segments {
            let slot = size("slot", s.slot)?;
            for i in 0..s.tokens {
                slots[s.row + i] = slot;
                positions[s.row + i] = size("position", s.past + i)?;
            }
        }
        let slots = device.upload(&bytes_of(&slots))?;
        let positions = device.upload(&bytes_of(&positions))?;
        Ok(Self { segments: segments.to_vec(), total, horizon: None, slots, positions })
    }

    /// Of a recorded step, one row a segment: `slots` and `positions` are written anew for each repetition, positions below
    /// `horizon`.
    pub fn of_step(segments: &[Segment], slots: Memory, positions: Memory, horizon: usize) -> Self {
        Self { segments: segments.to_vec(), total: segments.len(), horizon: Some(horizon), slots, positions }
    }

    /// Where launches must serve other positions than those of the segments: all below this.
    pub fn horizon(&self) -> Option<usize> {
        self.horizon
    }

    /// Rows of the call.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether this is the table of these arguments.
    pub fn is_of(&self, segments: &[Segment], total: usize) -> bool {
        self.total == total && self.segments == segments
    }
}
