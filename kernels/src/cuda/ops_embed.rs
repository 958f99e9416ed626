//! Launchers of `embed.cu`.

use super::device::{Arg, Device, Memory};
use super::ops_elementwise::{flat, floats, holds, product};
use super::rows::{bytes_of, size};
use crate::backend::FloatType;
use crate::error::{KernelError, Result};
use crate::pack::words_for;

/// Token ids of a call.
#[derive(Clone, Copy)]
pub struct Ids<'a> {
    /// On the host, where they are checked.
    pub host: &'a [u32],
    /// u32 on the device, where they are there already.
    pub device: Option<&'a Memory>,
}

impl Ids<'_> {
    /// Runs `launch` with the ids on the device.
    fn on_device(&self, d: &Device, launch: impl FnOnce(&Memory) -> Result<()>) -> Result<()> {
        match self.device {
            Some(m) => holds("token ids", m, self.host.len(), 4).and_then(|()| launch(m)),
            None => launch(&d.upload(&bytes_of(self.host))?),
        }
    }
}

/// Every id is below `vocab`.
fn check_ids(d: &Device, ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= vocab) {
        None => Ok(()),
        Some(id) => {
            let why = format!("token id {id} is not below {vocab}");
            Err(KernelError::Unsupported { backend: d.name(), op: "embed", why })
        }
    }
}

/// `y[t] = scale · table[ids[t]]`, the table `[vocab, hidden]` floats, y `[ids.len(), hidden]`.
pub fn embed_dense(
    d: &Device,
    table: &Memory,
    dtype: FloatType,
    vocab: usize,
    hidden: usize,
    ids: Ids<'_>,
    scale: f32,
    y: &Memory,
) -> Result<()> {
    holds("embedding table", table, product("embedding table", vocab, hidden)?, dtype.size())?;
    let n = product("embeddings", ids.host.len(), hidden)?;
    floats("embeddings", y, n)?;
    check_ids(d, ids.host, vocab)?;
    if n == 0 {
        return Ok(());
    }
    size("embeddings", n)?;
    let dtype = match dtype {
        FloatType::F32 => 0,
        FloatType::F16 => 1,
        FloatType::Bf16 => 2,
    };
    let (tokens, hidden) = (Arg::I32(size("tokens", ids.host.len())?), Arg::I32(size("hidden width", hidden)?));
    ids.on_device(d, |memory| {
        let args = [Arg::In(table), Arg::In(memory), Arg::Out(y), tokens, hidden, Arg::I32(dtype), Arg::F32(scale)];
        d.launch("embed_dense", flat(n, 1)?, &args)
    })
}

/// A packed embedding table on the device, `[vocab, hidden]`, column groups of `group_cols`.
pub struct PackedTable<'a> {
    /// u32 `[vocab, ceil(hidden · bits / 32)]`, in the order of [`crate::pack`].
    pub words: &'a Memory,
    /// f32 `[vocab, hidden / group_cols]`.
    pub scales: &'a Memory,
    /// u8 `[vocab, hidden / group_cols]`, filled with the middle code when the scheme is symmetric.
    pub zeros: &'a Memory,
    /// Rows.
    pub vocab: usize,
    /// Columns.
    pub hidden: usize,
    /// Columns that share a scale; divides `hidden`.
    pub group_cols: usize,
    /// Bits of a code, 1 to 8.
    pub bits: u8,
}

/// `y[t] = scale · table[ids[t]]` dequantized, y `[ids.len(), hidden]`.
pub fn embed_packed(d: &Device, table: &PackedTable<'_>, ids: Ids<'_>, scale: f32, y: &Memory) -> Result<()> {
    let PackedTable { vocab, hidden, group_cols, bits, .. } = *table;
    if group_cols == 0 || !hidden.is_multiple_of(group_cols) {
        return Err(KernelError::NotDivisible { what: "hidden width", value: hidden, by: group_cols });
    }
    if !(1..=8).contains(&bits) {
        let why = format!("codes of {bits} bits");
        return Err(KernelError::Unsupported { backend: d.name(), op: "embed", why });
    }
    let groups = product("embedding scales", vocab, hidden / group_cols)?;
    holds("embedding words", table.words, product("embedding words", vocab, words_for(hidden, bits))?, 4)?;
    floats("embedding scales", table.scales, groups)?;
    holds("embedding zero points", table.zeros, groups, 1)?;
    let n = product("embeddings", ids.host.len(), hidden)?;
    floats("embeddings", y, n)?;
    check_ids(d, ids.host, vocab)?;
    if n == 0 {
        return Ok(());
    }
    size("embeddings", n)?;
    let sizes = [
        Arg::I32(size("tokens", ids.host.len())?),
        Arg::I32(size("hidden width", hidden)?),
        Arg::I32(size("group", group_cols)?),
        Arg::I32(i32::from(bits)),
        Arg::F32(scale),
    ];
    ids.on_device(d, |memory| {
        let mut args = vec![Arg::In(table.words), Arg::In(table.scales), Arg::In(table.zeros)];
        args.extend([Arg::In(memory), Arg::Out(y)]);
        args.extend(sizes);
        d.launch("embed_packed", flat(n, 1)?, &args)
    })
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::cuda::rows::floats_of;
    use crate::pack::pack_rows;

    /// Widths that do not divide 32 straddle words; the backend packs 4 and 8 only, the kernel takes all.
    #[test]
    fn every_code_width_unpacks() {
        let d = Device::emulated(1).unwrap();
        let (vocab, hidden, group_cols) = (3, 36, 12);
        for bits in 1..=8u8 {
            let max = ((1u16 << bits) - 1) as u8;
            let codes: Vec<u8> = (0..vocab * hidden).map(|i| (i * 89 + 7) as u8 & max).collect();
            let zeros: Vec<u8> = (0..vocab * 3).map(|i| (i * 5) as u8 & max).collect();
            let scales: Vec<f32> = (0..vocab * 3).map(|i| 0.1 + i as f32).collect();
            let words = d.upload(&bytes_of(&pack_rows(&codes, vocab, hidden, bits).unwrap())).unwrap();
            let (scales_memory, zeros_memory) = (d.upload(&bytes_of(&scales)).unwrap(), d.upload(&zeros).unwrap());
            let y = d.alloc(2 * hidden * 4).unwrap();
            let table = PackedTable {
                words: &words,
                scales: &scales_memory,
                zeros: &zeros_memory,
                vocab,
                hidden,
                group_cols,
                bits,
            };
            let ids = |host| Ids { host, device: None };
            embed_packed(&d, &table, ids(&[2, 1]), 1.5, &y).unwrap();
            let want =
                [2, 1].iter().flat_map(|id| (0..hidden).map(move |c| (id * hidden + c, id * 3 + c / group_cols)));
            let want: Vec<f32> = want
                .map(|(at, group)| (i32::from(codes[at]) - i32::from(zeros[group])) as f32 * scales[group] * 1.5)
                .collect();
            assert_eq!(floats_of(&d.read(&y, 0..2 * hidden * 4).unwrap()), want, "{bits} bits");
            assert!(embed_packed(&d, &table, ids(&[3]), 1.5, &y).is_err());
        }
    }
}
