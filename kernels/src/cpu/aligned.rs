//! Memory that starts on a cache line, so that no load of a register touches two.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: zero bytes are bytes.
unsafe impl Zeroable for Line {}
// SAFETY: bytes without padding (size and alignment are 64), for which every value will do.
unsafe impl Pod for Line {}

/// A slice of numbers on the heap, the first of them at a multiple of 64 bytes.
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let lines = vec![Line([0; 64]); (len * size_of::<T>()).div_ceil(size_of::<Line>())];
        Self { lines, len, of: PhantomData }
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_line() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut a = Aligned::<f32>::zeros(len);
            assert_eq!((a.len(), a.as_ptr() as usize % 64), (len, 0));
            a.fill(1.0);
            assert!(a.iter().all(|v| *v == 1.0));
        }
    }
}
