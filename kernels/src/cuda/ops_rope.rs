//! Launchers of `rope.cu`: rotary embedding and the append to the cache.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{flat, floats, holds, per_row, product};
use super::rows::{RowTable, size};
use crate::backend::{FloatType, Segment};
use crate::error::{KernelError, Result};

/// The two halves of a layer's cache on the device, `[slots, kv_heads, capacity, head_dim]` each.
#[derive(Clone, Copy)]
pub struct CacheView<'a> {
    /// Keys.
    pub keys: &'a Memory,
    /// Values.
    pub values: &'a Memory,
    /// Of both: f32 or bf16.
    pub dtype: FloatType,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Tokens a slot can hold.
    pub capacity: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl CacheView<'_> {
    /// Every row of `segments` lies inside.
    pub(super) fn check(&self, d: &Device, op: &'static str, segments: &[Segment]) -> Result<()> {
        let slot = product("cache", product("cache", self.kv_heads, self.capacity)?, self.head_dim)?;
        let slots = segments.iter().map(|s| s.slot.saturating_add(1)).max().unwrap_or(0);
        let n = product("cache", slot, slots)?;
        holds("cached keys", self.keys, n, self.dtype.size())?;
        holds("cached values", self.values, n, self.dtype.size())?;
        match segments.iter().find(|s| s.past.saturating_add(s.tokens) > self.capacity) {
            None => Ok(()),
            Some(s) => {
                let end = s.past.saturating_add(s.tokens);
                let why = format!("slot {} would reach token {end} of a cache of {}", s.slot, self.capacity);
                Err(KernelError::Unsupported { backend: d.name(), op, why })
            }
        }
    }
}

/// Rotates x `[tokens, heads · head_dim]` in place; `inv_freq` f32 `[rotated_half]` on the device.
pub fn rope(
    d: &Device,
    x: &Memory,
    inv_freq: &Memory,
    rows: &RowTable,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    rotated_half: usize,
    mscale: f32,
) -> Result<()> {
    let width = product("rope width", heads, head_dim)?;
    let n = product("rope input", tokens, width)?;
    floats("rope input", x, n)?;
    floats("rotary frequencies", inv_freq, rotated_half)?;
    floats("row positions", &rows.positions, tokens)?;
    if product("rotated width", rotated_half, 2)? > head_dim {
        return Err(KernelError::Length { what: "rotated width", expected: head_dim, found: rotated_half * 2 });
    }
    if n == 0 || rotated_half == 0 {
        return Ok(());
    }
    size("rope width", width)?;
    let args = [
        Arg::Out(x),
        Arg::In(inv_freq),
        Arg::In(&rows.positions),
        Arg::I32(size("tokens", tokens)?),
        Arg::I32(size("heads", heads)?),
        Arg::I32(size("head width", head_dim)?),
        Arg::I32(size("rotated width", rotated_half)?),
        Arg::F32(mscale),
    ];
    d.launch("rope", per_row(tokens, heads * rotated_half, 2 * rotated_half * 4)?, &args)
}

/// Copies k and v `[tokens, kv_heads · head_dim]` to the places `rows` names, rounded to nearest even where the cache is
/// bf16; `segments` are those `rows` was made of.
pub fn kv_append(
    d: &Device,
    cache: CacheView<'_>,
    k: &Memory,
    v: &Memory,
    rows: &RowTable,
    segments: &[Segment],
    tokens: usize,
) -> Result<()> {
    let n = product("keys", tokens, product("keys", cache.kv_heads, cache.head_dim)?)?;
    floats("keys", k, n)?;
    floats("values", v, n)?;
    floats("row positions", &rows.positions, tokens)?;
    floats("row slots", &rows.slots, tokens)?;
    cache.check(d, "kv_append", segments)?;
    if n == 0 {
        return Ok(());
    }
    size("keys", n)?;
    let args = [
        Arg::Out(cache.keys),
        Arg::Out(cache.values),
        Arg::In(k),
        Arg::In(v),
        Arg::In(&rows.slots),
        Arg::In(&rows.positions),
        Arg::I32(size("tokens", tokens)?),
        Arg::I32(size("key heads", cache.kv_heads)?),
        Arg::I32(size("head width", cache.head_dim)?),
        Arg::I32(size("cache capacity", cache.capacity)?),
    ];
    let kernel = match cache.dtype {
        FloatType::F32 => "kv_append",
        FloatType::Bf16 => "kv_append_half",
        FloatType::F16 => {
            let why = "a cache is f32 or bf16".to_string();
            return Err(KernelError::Unsupported { backend: d.name(), op: "kv_append", why });
        }
    };
    d.launch(kernel, flat(n, 1)?, &args)
}

/// [`rope`] of q `[tokens, heads · head_dim]` in place, and of k on its way into the cache, with v: [`kv_append`]. `slots`: of
/// the cache, whose size says whether it holds f32 or bf16.
pub fn rope_append(
    d: &Device,
    cache: CacheView<'_>,
    slots: usize,
    q: &Memory,
    k: &Memory,
    v: &Memory,
    inv_freq: &Memory,
    rows: &RowTable,
    tokens: usize,
    heads: usize,
    rotated_half: usize,
    mscale: f32,
) -> Result<()> {
    let (kv_heads, head_dim) = (cache.kv_heads, cache.head_dim);
    floats("rope input", q, product("rope input", tokens, product("rope input", heads, head_dim)?)?)?;
    let width = product("keys", kv_heads, head_dim)?;
    let n = product("keys", tokens, width)?;
    floats("keys", k, n)?;
    floats("values", v, n)?;
    floats("rotary frequencies", inv_freq, rotated_half)?;
    floats("row positions", &rows.positions, tokens)?;
    floats("row slots", &rows.slots, tokens)?;
    if product("rotated width", rotated_half, 2)? > head_dim {
        return Err(KernelError::Length { what: "rotated width", expected: head_dim, found: rotated_half * 2 });
    }
    let elements = product("cache", product("cache", slots, cache.capacity)?, width)?;
    let kernel = match (cache.keys.bytes() / elements.max(1), cache.values.bytes() / elements.max(1)) {
        (4, 4) => "rope_append",
        (2, 2) => "rope_append_half",
        _ => return Err(KernelError::Length { what: "cache", expected: elements, found: cache.keys.bytes() / 4 }),
    };
    if tokens == 0 {
        return Ok(());
    }
    let mut args = vec![Arg::Out(q), Arg::In(k), Arg::In(v), Arg::Out(cache.keys), Arg::Out(cache.values)];
    args.extend([Arg::In(inv_freq), Arg::In(&rows.slots), Arg::In(&rows.positions)]);
    let capacity = ("cache capacity", cache.capacity);
    let widths = [("heads", heads), ("key heads", kv_heads), ("head width", head_dim), ("rotated width", rotated_half)];
    for (what, n) in widths.into_iter().chain([capacity]) {
        args.push(Arg::I32(size(what, n)?));
    }
    args.push(Arg::F32(mscale));
    let [x, y, shared] = [tokens, (heads + kv_heads).div_ceil(4), 2 * rotated_half * 4].map(u32::try_from);
    let overflow = |_| KernelError::Overflow("grid");
    let (x, y, shared_bytes) = (x.map_err(overflow)?, y.map_err(overflow)?, shared.map_err(overflow)?);
    d.launch(kernel, Launch { grid: [x, y, 1], block: [128, 1, 1], shared_bytes }, &args)
}
