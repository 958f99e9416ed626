//! A slot copied to another in the contiguous cache, through the host: rare beside the tokens it saves.

use super::device::{Device, Memory};
use super::ops_elementwise::product;
use crate::error::Result;

/// `[slots, kv_heads, capacity, head_dim]`.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens a slot can hold.
    pub capacity: usize,
    /// Bytes of an element.
    pub element: usize,
}

/// Copies the first `tokens` rows of every head of slot `from` to slot `to`; both lie inside the cache.
pub fn copy_rows(d: &Device, half: &mut Memory, shape: Shape, from: usize, tokens: usize, to: usize) -> Result<()> {
    if from == to || tokens == 0 {
        return Ok(());
    }
    let row = product("head", shape.head_dim, shape.element)?;
    let head = product("cache", shape.capacity, row)?;
    for h in 0..shape.kv_heads {
        let place = |slot: usize| product("cache", product("cache", slot, shape.kv_heads)? + h, head);
        let start = place(from)?;
        let bytes = d.read(half, start..start + tokens * row)?;
        d.write(half, place(to)?, &bytes)?;
    }
    Ok(())
}
