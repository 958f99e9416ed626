//! The attention kernels where the shared case table does not reach: wide heads, many parts, rows of no sequence, and
//! results that do not depend on the batch.
#![cfg(feature = "emulated")]

#[allow(dead_code, reason = "the case table is shared by several tests")]
mod cases;

use std::sync::Arc;

use cases::{Noise, close};
use half::bf16;
use lowbit_kernels::KernelError;
use lowbit_kernels::backend::{AttentionShape, Backend, KvBuffer, Segment};
use lowbit_kernels::cpu::ScalarBackend;
use lowbit_kernels::cuda::{Arithmetic, Device, EmulatorOptions, GpuBackend};

fn emulated(options: EmulatorOptions) -> GpuBackend {
    GpuBackend::new(Arc::new(Device::emulated_with(options).unwrap()))
}

fn plain() -> GpuBackend {
    emulated(EmulatorOptions { threads: 2, ..EmulatorOptions::default() })
}

fn seg(slot: usize, row: usize, tokens: usize, past: usize) -> Segment {
    Segment { slot, row, tokens, past }
}

/// A cache of two slots, the first `lengths` tokens of each filled.
fn filled(b: &dyn Backend, shape: &AttentionShape, lengths: [usize; 2]) -> KvBuffer {
    filled_with(b, shape, lengths, |x| x)
}

fn filled_with(b: &dyn Backend, shape: &AttentionShape, lengths: [usize; 2], as_kept: fn(f32) -> f32) -> KvBuffer {
    let mut cache = b.kv_cache(2, lengths[0].max(lengths[1]), shape.kv_heads, shape.head_dim).unwrap();
    let mut noise = Noise(11);
    for (slot, tokens) in lengths.into_iter().enumerate() {
        let mut some =
            || -> Vec<f32> { noise.many(tokens * shape.kv_heads * shape.head_dim).into_iter().map(as_kept).collect() };
        let (k, v) = (b.upload(&some()).unwrap(), b.upload(&some()).unwrap());
        b.kv_append(&mut cache, &k, &v, &[seg(slot, 0, tokens, 0)]).unwrap();
    }
    cache
}

fn attend(b: &dyn Backend, shape: &AttentionShape, cache: &KvBuffer, q: &[f32], segments: &[Segment]) -> Vec<f32> {
    b.download(&b.attention(&b.upload(q).unwrap(), cache, shape, segments).unwrap()).unwrap()
}

fn shapes() -> Vec<AttentionShape> {
    let mut list = Vec::new();
    for (heads, kv_heads, head_dim) in
        [(2, 2, 4), (3, 1, 20), (10, 1, 64), (4, 2, 80), (2, 1, 128), (2, 1, 132), (2, 1, 256)]
    {
        for (window, soft_cap) in [(None, None), (Some(100), None), (Some(130), Some(3.0)), (Some(usize::MAX), None)] {
            let scale = 2.0 / (head_dim as f32).sqrt();
            list.push(AttentionShape { heads, kv_heads, head_dim, scale, window, soft_cap });
        }
    }
    list
}

fn agrees(b: &dyn Backend, shape: &AttentionShape, lengths: [usize; 2]) {
    let scalar = ScalarBackend::new();
    let (mine, theirs) = (filled(b, shape, lengths), filled(&scalar, shape, lengths));
    let [long, short] = lengths;
    // Decode at several lengths with a row of no sequence between; then a ragged mix that ends inside a tile.
    let decode = (vec![seg(0, 0, 1, long - 1), seg(1, 2, 1, short - 1)], 3);
    let mixed = (vec![seg(1, 1, 3, 0), seg(0, 4, 66, long - 66), seg(1, 70, 2, short - 2)], 73);
    for (segments, rows) in [decode, mixed] {
        let q = Noise(12).many(rows * shape.heads * shape.head_dim);
        let got = attend(b, shape, &mine, &q, &segments);
        let want = attend(&scalar, shape, &theirs, &q, &segments);
        // Scores are below 2·√d; their rounding enters the weights as a relative error.
        let tol = f32::EPSILON * 4.0 * shape.head_dim as f32;
        close(&got, &want, tol, &format!("{shape:?} {rows} rows"));
    }
}

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The shapes that have a 16-bit cache, with groups of every size the kernels tell apart.
fn half_shapes() -> Vec<AttentionShape> {
    let mut list = Vec::new();
    for (heads, kv_heads, head_dim) in [(2, 1, 64), (10, 1, 64), (4, 2, 128), (8, 1, 128)] {
        for (window, soft_cap, sign) in [(None, None, 1.0), (Some(100), None, 1.0), (Some(130), Some(3.0), -1.0)] {
            let scale = sign * 2.0 / (head_dim as f32).sqrt();
            list.push(AttentionShape { heads, kv_heads, head_dim, scale, window, soft_cap });
        }
    }
    list
}

/// Against the scalar backend over the keys, values (and in prefill queries) as they were rounded.
fn half_agrees(b: &GpuBackend, shape: &AttentionShape, lengths: [usize; 2]) {
    let scalar = ScalarBackend::new();
    let (mine, theirs) = (filled(b, shape, lengths), filled_with(&scalar, shape, lengths, rounded));
    let [long, short] = lengths;
    let decode = (vec![seg(0, 0, 1, long - 1), seg(1, 2, 1, short - 1)], 3);
    let mixed = (vec![seg(1, 1, 3, 0), seg(0, 4, 126, long - 126), seg(1, 130, 2, short - 2)], 133);
    let q = Noise(12).many(133 * shape.heads * shape.head_dim);
    for ((segments, rows), is_prefill) in [(decode, false), (mixed, true)] {
        let q = &q[..rows * shape.heads * shape.head_dim];
        let got = attend(b, shape, &mine, q, &segments);
        let as_read: Vec<f32> = q.iter().map(|x| if is_prefill { rounded(*x) } else { *x }).collect();
        let want = attend(&scalar, shape, &theirs, &as_read, &segments);
        // A weight's rounding to bf16 is 2^-9 of it, and so is its part of a mean of values below 1; two terms hold 2^-17,
        // of weights and of queries, whose scores are below 2·√d.
        let tol = if is_prefill { 1.0 / 512.0 } else { 2f32.powi(-17) * 2.0 * (shape.head_dim as f32).sqrt() };
        close(&got, &want, tol, &format!("{shape:?} {rows} rows"));
    }
}

#[test]
fn a_half_cache_agrees_with_the_reference_on_rounded_keys_and_values() {
    let b = plain().with_arithmetic(Arithmetic::Half);
    for shape in half_shapes() {
        half_agrees(&b, &shape, [300, 129]);
        half_agrees(&b, &shape, [1100, 129]);
        half_agrees(&b, &shape, [130, 5]);
    }
}

#[test]
fn a_half_cache_changes_what_is_kept_and_nothing_for_other_widths() {
    let (whole, half) = (plain(), plain().with_arithmetic(Arithmetic::Half));
    for (head_dim, same) in [(64, false), (80, true)] {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim, scale: 0.1, window: None, soft_cap: None };
        let q = Noise(15).many(2 * head_dim);
        let [a, b] = [&whole, &half].map(|b| attend(b, &shape, &filled(b, &shape, [70, 5]), &q, &[seg(0, 0, 1, 69)]));
        assert_eq!(a == b, same, "{head_dim}");
    }
}

#[test]
fn a_forked_half_cache_continues() {
    let b = plain().with_arithmetic(Arithmetic::Half);
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.2, window: None, soft_cap: None };
    let mut cache = filled(&b, &shape, [90, 7]);
    let q = Noise(16).many(256);
    let want = attend(&b, &shape, &cache, &q, &[seg(0, 0, 1, 79)]);
    b.kv_fork(&mut cache, 0, 80, 1).unwrap();
    assert_eq!(attend(&b, &shape, &cache, &q, &[seg(1, 0, 1, 79)]), want);
}

#[test]
fn checked_half_kernels_touch_only_their_own_memory() {
    let options = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
    let Ok(device) = Device::emulated_with(options) else { return };
    let b = GpuBackend::new(Arc::new(device)).with_arithmetic(Arithmetic::Half);
    for shape in half_shapes().iter().filter(|s| s.heads != 10) {
        half_agrees(&b, shape, [140, 5]);
    }
}

#[test]
fn wide_heads_and_many_parts_agree() {
    let b = plain();
    for shape in shapes() {
        agrees(&b, &shape, [300, 129]);
        agrees(&b, &shape, [128, 5]);
    }
}

#[test]
fn checked_kernels_touch_only_their_own_memory() {
    let options = EmulatorOptions { checked: true, seed: 3, ..EmulatorOptions::default() };
    let Ok(device) = Device::emulated_with(options) else { return };
    let b = GpuBackend::new(Arc::new(device));
    for shape in shapes().iter().filter(|s| s.window != Some(usize::MAX)) {
        agrees(&b, shape, [140, 5]);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    alone_or_not(&plain(), &shapes());
    alone_or_not(&plain().with_arithmetic(Arithmetic::Half), &half_shapes());
}

fn alone_or_not(b: &dyn Backend, shapes: &[AttentionShape]) {
    for shape in shapes.iter().copied() {
        let cache = filled(b, &shape, [300, 129]);
        let width = shape.heads * shape.head_dim;
        let q = Noise(13).many(100 * width);
        let one = |row: usize, tokens: usize| &q[row * width..(row + tokens) * width];
        // One part alone, three beside a longer neighbour.
        let pair = attend(b, &shape, &cache, one(0, 2), &[seg(0, 0, 1, 299), seg(1, 1, 1, 60)]);
        assert_eq!(pair[width..], attend(b, &shape, &cache, one(1, 1), &[seg(1, 0, 1, 60)]), "{shape:?}");
        assert_eq!(pair[..width], attend(b, &shape, &cache, one(0, 1), &[seg(0, 0, 1, 299)]), "{shape:?}");
        // The same segment at the start of a call and in the middle of a tile.
        let alone = attend(b, &shape, &cache, one(37, 63), &[seg(0, 0, 63, 237)]);
        let beside = attend(b, &shape, &cache, &q, &[seg(1, 0, 37, 90), seg(0, 37, 63, 237)]);
        assert_eq!(beside[37 * width..], alone, "{shape:?}");
    }
}

#[test]
fn a_broken_query_stays_visible_and_alone() {
    let b = plain();
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 8, scale: 1.0, window: None, soft_cap: None };
    let cache = filled(&b, &shape, [300, 10]);
    for segments in [vec![seg(0, 0, 1, 299), seg(1, 1, 1, 9)], vec![seg(0, 0, 2, 298)]] {
        let mut q = Noise(14).many(2 * 16);
        q[3] = f32::NAN;
        let y = attend(&b, &shape, &cache, &q, &segments);
        assert!(y[..8].iter().all(|v| v.is_nan()), "{segments:?}");
        assert!(y[8..].iter().all(|v| v.is_finite()), "{segments:?}");
    }
}

#[test]
fn heads_the_kernels_cannot_hold_are_refused() {
    let b = plain();
    for head_dim in [6, 260] {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim, scale: 1.0, window: None, soft_cap: None };
        let cache = b.kv_cache(1, 4, 1, head_dim).unwrap();
        let q = b.zeros(head_dim).unwrap();
        let e = b.attention(&q, &cache, &shape, &[seg(0, 0, 1, 0)]).err();
        assert!(matches!(e, Some(KernelError::Unsupported { op: "attention", .. })), "{head_dim}");
    }
}
