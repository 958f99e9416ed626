//! Shape checks shared by both host backends: after these, slices cannot be indexed out of range.

use std::ops::Range;

use crate::backend::{AttentionShape, Buffer, KvBuffer, Segment};
use crate::error::{KernelError, Result, check_len};

/// The host storage of a buffer.
pub fn host<'a>(backend: &'static str, x: &'a Buffer) -> Result<&'a [f32]> {
    let data = x.memory.downcast_ref::<Vec<f32>>();
    data.map(Vec::as_slice).ok_or(KernelError::ForeignHandle { backend, what: "buffer" })
}

/// As [`host`], writable.
pub fn host_mut<'a>(backend: &'static str, x: &'a mut Buffer) -> Result<&'a mut [f32]> {
    let data = x.memory.downcast_mut::<Vec<f32>>();
    data.map(Vec::as_mut_slice).ok_or(KernelError::ForeignHandle { backend, what: "buffer" })
}

/// Wraps host storage.
pub fn buffer(data: Vec<f32>) -> Buffer {
    Buffer { len: data.len(), memory: Box::new(data) }
}

/// Rows of `width` in `len` elements.
pub fn rows(what: &'static str, len: usize, width: usize) -> Result<usize> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(KernelError::NotDivisible { what, value: len, by: width });
    }
    Ok(len / width)
}

/// `a · b`, or an error.
pub fn product(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or(KernelError::Overflow(what))
}

/// `index < bound`, or an error that names the place.
pub fn below(backend: &'static str, op: &'static str, what: &str, index: usize, bound: usize) -> Result<()> {
    if index < bound {
        return Ok(());
    }
    Err(KernelError::Unsupported { backend, op, why: format!("{what} {index} is not below {bound}") })
}

/// Segments lie within `total` rows and share none.
pub fn segments(backend: &'static str, op: &'static str, segments: &[Segment], total: usize) -> Result<()> {
    let mut spans: Vec<Range<usize>> = Vec::with_capacity(segments.len());
    for s in segments {
        let end = s.row.checked_add(s.tokens).ok_or(KernelError::Overflow("segment"))?;
        below(backend, op, "segment end", end, total + 1)?;
        if s.tokens > 0 {
            spans.push(s.row..end);
        }
    }
    spans.sort_by_key(|s| s.start);
    if spans.windows(2).any(|w| w[1].start < w[0].end) {
        return Err(KernelError::Unsupported { backend, op, why: "segments overlap".to_string() });
    }
    Ok(())
}

/// Segments address slots and tokens the cache has.
pub fn cached(backend: &'static str, op: &'static str, list: &[Segment], cache: &KvBuffer) -> Result<()> {
    for s in list {
        below(backend, op, "slot", s.slot, cache.slots)?;
        let end = s.past.checked_add(s.tokens).ok_or(KernelError::Overflow("segment"))?;
        below(backend, op, "cache position", end, cache.capacity + 1)?;
    }
    Ok(())
}

/// A fork lies within the cache.
pub fn fork(backend: &'static str, cache: &KvBuffer, from: usize, tokens: usize, to: usize) -> Result<()> {
    below(backend, "kv_fork", "slot", from.max(to), cache.slots)?;
    below(backend, "kv_fork", "tokens", tokens, cache.capacity + 1)
}

/// The shape is consistent and fits the cache's width.
pub fn shape(backend: &'static str, shape: &AttentionShape, kv_width: usize) -> Result<()> {
    let bad = |why: &str| Err(KernelError::Unsupported { backend, op: "attention", why: why.to_string() });
    if shape.kv_heads == 0 || shape.head_dim == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return bad("query heads are not a multiple of key heads, or a size is zero");
    }
    if shape.window == Some(0) {
        return bad("a window of zero masks every key");
    }
    check_len("cache width", product("cache width", shape.kv_heads, shape.head_dim)?, kv_width)
}

/// Position of each row, `None` where no segment holds it.
pub fn positions(list: &[Segment], total: usize) -> Vec<Option<usize>> {
    let mut out = vec![None; total];
    for s in list {
        for (i, p) in out[s.row..s.row + s.tokens].iter_mut().enumerate() {
            *p = Some(s.past + i);
        }
    }
    out
}

/// Rotary shape: heads divide rows, the rotated part fits a head. Returns the number of rows.
pub fn rotary(backend: &'static str, len: usize, heads: usize, head_dim: usize, half: usize) -> Result<usize> {
    below(backend, "rope", "rotated width", product("rotated width", half, 2)?, head_dim + 1)?;
    rows("rope input", len, product("row width", heads, head_dim)?)
}

/// Gathered rows `[rows.len(), width]`.
pub fn gather(backend: &'static str, x: &[f32], width: usize, which: &[usize]) -> Result<Vec<f32>> {
    let total = rows("gather input", x.len(), width)?;
    let mut out = Vec::with_capacity(which.len() * width);
    for r in which {
        below(backend, "gather_rows", "row", *r, total)?;
        out.extend_from_slice(&x[r * width..(r + 1) * width]);
    }
    Ok(out)
}

/// Columns `range` of every row.
pub fn columns(x: &[f32], width: usize, range: Range<usize>) -> Result<Vec<f32>> {
    rows("slice input", x.len(), width)?;
    if range.start > range.end || range.end > width {
        return Err(KernelError::Length { what: "column range", expected: width, found: range.end });
    }
    let mut out = Vec::with_capacity(x.len() / width * range.len());
    x.chunks_exact(width).for_each(|row| out.extend_from_slice(&row[range.clone()]));
    Ok(out)
}

/// Elements `range`.
pub fn part(x: &[f32], range: Range<usize>) -> Result<Vec<f32>> {
    let found = range.end;
    x.get(range).map(<[f32]>::to_vec).ok_or(KernelError::Length { what: "download range", expected: x.len(), found })
}

/// Every target is below `vocab`, one a row.
pub fn targets(backend: &'static str, len: usize, vocab: usize, targets: &[u32]) -> Result<()> {
    check_len("targets", rows("logits", len, vocab)?, targets.len())?;
    targets.iter().try_for_each(|t| below(backend, "score", "target", *t as usize, vocab))
}
