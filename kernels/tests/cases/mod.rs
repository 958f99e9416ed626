//! One test body an operation, for every backend: each compares a backend with the scalar reference.

use std::sync::Arc;

use half::{bf16, f16};
use lowbit_kernels::activation::{InputCode, InputRule, InputScale};
use lowbit_kernels::backend::{
    Activation, AttentionShape, Backend, Bytes, FloatType, HostWeight, PackedWeight, Segment,
};
use lowbit_kernels::cpu::ScalarBackend;
use lowbit_kernels::draw::{Draw, draw};
use lowbit_kernels::floats::{FloatCode, FloatScales, FloatWeight};
use lowbit_kernels::pack::pack_rows;
use lowbit_kernels::{GroupSize, KernelError, Scheme};

/// Sizes of linears: every combination is tested.
pub struct Sizes<'a> {
    /// Rows of x.
    pub tokens: &'a [usize],
    /// Input features.
    pub widths: &'a [usize],
    /// Output features.
    pub rows: &'a [usize],
}

/// Seeded numbers.
pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
    /// Uniform in [-1, 1).
    pub fn one(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(31) - 1.0
    }
    pub fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.one()).collect()
    }
}

/// NaN fails: the comparison is true only for numbers.
pub fn close(got: &[f32], want: &[f32], tol: f32, case: &str) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let diff = (g - w).abs();
        assert!(diff <= tol, "{case}: element {i}: {g} against {w}, off by {diff} > {tol}");
    }
}

pub fn linear(b: &dyn Backend, w: &HostWeight, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let handle = b.upload_weight(w).unwrap();
    let bias = bias.map(|v| b.upload(v).unwrap());
    let y = b.linear(&b.upload(x).unwrap(), &handle, bias.as_ref()).unwrap();
    b.download(&y).unwrap()
}

fn dense(noise: &mut Noise, dtype: FloatType, n: usize, k: usize) -> HostWeight {
    // One byte of padding in front: a mapped file promises no alignment.
    let mut raw = vec![0u8];
    for v in noise.many(n * k) {
        match dtype {
            FloatType::F32 => raw.extend(v.to_le_bytes()),
            FloatType::F16 => raw.extend(f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => raw.extend(bf16::from_f32(v).to_le_bytes()),
        }
    }
    let end = raw.len();
    let data = Bytes::new(Arc::new(raw), 1..end).unwrap();
    HostWeight::Dense { dtype, out_features: n, in_features: k, data }
}

fn packed(noise: &mut Noise, scheme: Scheme, n: usize, k: usize, shuffled: bool) -> HostWeight {
    let codes: Vec<u8> = (0..n * k).map(|_| noise.bits() as u8 & scheme.max_code()).collect();
    let words = pack_rows(&codes, n, k, scheme.bits).unwrap();
    let groups = scheme.groups(k).unwrap();
    // Signed scales are legal, so some are negative.
    let scales: Vec<f32> = noise.many(n * groups).iter().map(|s| s / f32::from(scheme.max_code())).collect();
    let zeros = (!scheme.symmetric).then(|| (0..n * groups).map(|_| noise.bits() as u8 & scheme.max_code()).collect());
    let group_index = shuffled.then(|| (0..k).map(|c| ((c * 7 + 3) % groups) as u32).collect());
    let words = Bytes::from_vec(words.iter().flat_map(|w| w.to_le_bytes()).collect());
    HostWeight::Packed(PackedWeight { scheme, out_features: n, in_features: k, words, scales, zeros, group_index })
}

fn schemes(k: usize) -> Vec<Scheme> {
    let mut list = Vec::new();
    for bits in [2, 3, 4, 8] {
        for symmetric in [true, false] {
            for group in [GroupSize::Cols(32), GroupSize::Cols(64), GroupSize::Cols(24), GroupSize::PerChannel] {
                let s = Scheme { bits, symmetric, group };
                if s.groups(k).is_ok() {
                    list.push(s);
                }
            }
        }
    }
    list
}

/// E4M3 with block scales of an edge, and the two-level and exponent scales of E2M1 where the width has whole groups.
fn floats(noise: &mut Noise, n: usize, k: usize) -> Vec<(String, HostWeight)> {
    let (mut list, mut some) = (Vec::new(), |len: usize, mask: u8| -> Bytes {
        Bytes::from_vec((0..len).map(|_| noise.bits() as u8 & mask).collect())
    });
    let mut add = |name: &str, code, codes: Bytes, scales| {
        let w = FloatWeight { code, out_features: n, in_features: k, codes, scales };
        list.push((name.to_string(), HostWeight::Float(w)));
    };
    for (name, rows, cols) in [("fp8-tensor", n, k), ("fp8-channel", 1, k), ("fp8-block", 16, 40)] {
        let cells = n.div_ceil(rows) * k.div_ceil(cols);
        let values = (0..cells).map(|i| (1.0 + i as f32 / cells as f32) / 1024.0).collect();
        // No NaN: bit 0 is never set.
        add(name, FloatCode::E4m3, some(n * k, 0xfe), FloatScales::Blocks { values, rows, cols });
    }
    if k.is_multiple_of(16) {
        let scales = FloatScales::Local { codes: some(n * k / 16, 0x3e), global: 12.0 };
        add("nvfp4", FloatCode::E2m1, some(n * k / 2, 0xff), scales);
    }
    if k.is_multiple_of(32) {
        let codes = Bytes::from_vec((0..n * k / 32).map(|i| 121 + (i % 4) as u8).collect());
        add("mxfp4", FloatCode::E2m1, some(n * k / 2, 0xff), FloatScales::Exponents { codes });
    }
    list
}

/// Every weight of a width, with its name: dense dtypes, float codes, then schemes with and without a shuffled group index.
pub fn weights(noise: &mut Noise, n: usize, k: usize) -> Vec<(String, HostWeight)> {
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    let mut list: Vec<_> = types.iter().map(|d| (format!("{d:?}"), dense(noise, *d, n, k))).collect();
    list.extend(floats(noise, n, k));
    for s in schemes(k) {
        for shuffled in [false, true] {
            list.push((format!("{} shuffled={shuffled}", s.full_name()), packed(noise, s, n, k, shuffled)));
        }
    }
    list
}

/// Rounding of inputs has the bits of its definition everywhere.
pub fn inputs_round_alike(backends: &[(String, &dyn Backend)]) {
    let mut noise = Noise(11);
    let rules = [
        (InputCode::Int8, InputScale::Token),
        (InputCode::Int8, InputScale::Stored(vec![0.01])),
        (InputCode::Int8, InputScale::Group(16)),
        (InputCode::Fp8, InputScale::Token),
        (InputCode::Fp4, InputScale::Token),
        (InputCode::Fp8, InputScale::Group(32)),
        (InputCode::Fp8, InputScale::Stored(vec![0.002, 0.001])),
        (InputCode::Fp4, InputScale::Local { global: 2688.0 }),
    ];
    for (code, scale) in rules {
        let rule = InputRule { code, scale };
        for t in [0, 1, 17, 50] {
            let x = noise.many(t * 64);
            let mut want = x.clone();
            rule.apply(&mut want, 64).unwrap();
            for (label, b) in backends {
                let y = b.quantize_input(&b.upload(&x).unwrap(), 64, &rule).unwrap();
                assert_eq!(b.download(&y).unwrap(), want, "{rule:?} t={t} {label}");
            }
            assert!(t == 0 || x != want, "{rule:?}");
        }
        for (_, b) in backends {
            assert!(b.quantize_input(&b.upload(&[0.0; 65]).unwrap(), 64, &rule).is_err());
        }
    }
}

/// Linears of every format agree at every size, with a bias.
pub fn linears_agree(backends: &[(String, &dyn Backend)], sizes: &Sizes<'_>, select: impl Fn(&str, usize) -> bool) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(1));
    for &k in sizes.widths {
        for &n in sizes.rows {
            for (name, w) in weights(&mut noise, n, k) {
                for &t in sizes.tokens {
                    let (x, bias) = (noise.many(t * k), noise.many(n));
                    if !select(&name, t) {
                        continue;
                    }
                    let want = linear(&scalar, &w, &x, Some(&bias));
                    // |x| ≤ 1 and |w| ≤ 1; an asymmetric sum passes through code·x and zero·x, each ≤ 1 a column too.
                    let tol = f32::EPSILON * 2.0 * k as f32;
                    for (label, b) in backends {
                        let got = linear(*b, &w, &x, Some(&bias));
                        close(&got, &want, tol, &format!("{name} t={t} k={k} n={n} {label}"));
                    }
                }
            }
        }
    }
}

/// A weight of bytes with a scale a row, and the rules of inputs that meet it: `w8a8`, its asymmetric form, and E4M3.
fn eight_bits(noise: &mut Noise, n: usize, k: usize) -> Vec<(String, HostWeight, Vec<InputRule>)> {
    let rules = |code, stored: f32| {
        [InputScale::Token, InputScale::Stored(vec![stored])].map(|scale| InputRule { code, scale }).to_vec()
    };
    let mut list = Vec::new();
    for symmetric in [true, false] {
        let scheme = Scheme { bits: 8, symmetric, group: GroupSize::PerChannel };
        list.push((scheme.full_name(), packed(noise, scheme, n, k, false), rules(InputCode::Int8, 0.007)));
    }
    let float = floats(noise, n, k).into_iter().filter(|(name, _)| ["fp8-tensor", "fp8-channel"].contains(&&**name));
    list.extend(float.map(|(name, w)| (name, w, rules(InputCode::Fp8, 0.002))));
    list
}

/// Products of inputs and weights that are both eight-bit codes. Where a backend multiplies the codes (`codes`), integers give the bits of
/// the reference, the exact sum scaled; else, and for E4M3, they agree to rounding. A token computes the same alone and in company, among
/// few tokens and among many; a NaN is its own row's.
pub fn rounded_linears_agree(backends: &[(String, &dyn Backend)], sizes: &Sizes<'_>, codes: bool) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(17));
    let run = |b: &dyn Backend, w: &HostWeight, x: &[f32], rule: &InputRule, bias: &[f32]| {
        let (handle, bias) = (b.upload_weight(w).unwrap(), b.upload(bias).unwrap());
        let weights = [(&handle, Some(&bias)), (&handle, None)];
        let made = b.rounded_linears(&b.upload(x).unwrap(), rule, &weights).unwrap();
        made.iter().map(|y| b.download(y).unwrap()).collect::<Vec<_>>()
    };
    for (&k, &n) in sizes.widths.iter().flat_map(|k| sizes.rows.iter().map(move |n| (k, n))) {
        for (name, w, rules) in eight_bits(&mut noise, n, k) {
            for (rule, &t) in rules.iter().flat_map(|r| sizes.tokens.iter().map(move |t| (r, t))) {
                let (mut x, bias) = (noise.many(t * k), noise.many(n));
                // A row of zeros has a scale too.
                if t > 1 {
                    x[..k].fill(0.0);
                }
                let want = run(&scalar, &w, &x, rule, &bias);
                for (label, b) in backends {
                    let case = format!("{name} {rule:?} t={t} k={k} n={n} {label}");
                    let got = run(*b, &w, &x, rule, &bias);
                    if codes && rule.code == InputCode::Int8 {
                        assert_eq!(got, want, "{case}");
                    }
                    // |x| and |w| are about 1; an asymmetric sum passes through code·x and zero·x. A tensor core's sum of E4M3 products
                    // may lose 2^-13 of its largest addend with each: not checked on a GPU yet.
                    let lost = if label == "cuda" && rule.code == InputCode::Fp8 { 1.0 / 8192.0 } else { 0.0 };
                    for (got, want) in got.iter().zip(&want) {
                        close(got, want, k as f32 * (2.0 * f32::EPSILON + lost), &case);
                    }
                    let last = run(*b, &w, &x[(t - 1) * k..], rule, &bias);
                    let exact = rule.code == InputCode::Int8 || t <= 32;
                    for (alone, all) in last.iter().zip(&got).filter(|_| codes && exact) {
                        assert_eq!(alone[..], all[(t - 1) * n..], "{case}: the last token alone");
                    }
                    let mut bad = x.clone();
                    bad[(t - 1) * k] = f32::NAN;
                    let bad = run(*b, &w, &bad, rule, &bias);
                    let (others, own) = bad[1].split_at((t - 1) * n);
                    assert_eq!(others, &got[1][..(t - 1) * n], "{case}: beside a NaN");
                    assert!(own.iter().all(|v| v.is_nan()), "{case}: a NaN");
                }
            }
        }
    }
}

/// Embeddings are the dequantized rows exactly; an id outside the table is an error.
pub fn embedding_is_exact(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(4));
    for (name, w) in weights(&mut noise, 17, 96) {
        let run = |b: &dyn Backend| {
            let table = b.upload_weight(&w).unwrap();
            assert!(
                matches!(b.embed(&table, &[3, 17], 1.0), Err(KernelError::Unsupported { op: "embed", .. })),
                "{name}"
            );
            b.download(&b.embed(&table, &[16, 0, 5, 5], 1.5).unwrap()).unwrap()
        };
        for (label, b) in backends {
            assert_eq!(run(*b), run(&scalar), "{name} {label}");
        }
    }
}

/// Segments of one call with its q, k and v.
type Call = (Vec<Segment>, Vec<f32>, Vec<f32>, Vec<f32>);

fn attend(b: &dyn Backend, shape: &AttentionShape, calls: &[Call]) -> Vec<f32> {
    let mut cache = b.kv_cache(3, 150, shape.kv_heads, shape.head_dim).unwrap();
    let mut out = Vec::new();
    for (segments, q, k, v) in calls {
        b.kv_append(&mut cache, &b.upload(k).unwrap(), &b.upload(v).unwrap(), segments).unwrap();
        let y = b.attention(&b.upload(q).unwrap(), &cache, shape, segments).unwrap();
        out.extend(b.download(&y).unwrap());
    }
    out
}

/// Attention over ragged batches, prefill, continuation and decode, with windows and caps.
pub fn attention_agrees(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(5));
    let seg = |slot, row, tokens, past| Segment { slot, row, tokens, past };
    // A ragged prefill, a continuation of several lengths, one decode step, a row that no segment holds.
    let plan = [
        (vec![seg(2, 0, 70, 0), seg(0, 70, 1, 0), seg(1, 71, 17, 0)], 88),
        (vec![seg(0, 0, 65, 1), seg(2, 65, 3, 70)], 68),
        (vec![seg(1, 0, 1, 17), seg(0, 1, 1, 66), seg(2, 2, 1, 73)], 3),
        (vec![seg(1, 0, 2, 18), seg(2, 3, 1, 74)], 4),
    ];
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (4, 4, 20), (4, 1, 32)] {
        for (window, soft_cap) in
            [(None, None), (Some(1), None), (Some(10), None), (Some(70), Some(5.0)), (None, Some(2.0))]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.7, window, soft_cap };
            let mut calls = Vec::new();
            for (segments, rows) in &plan {
                let mut fill = |h: usize| noise.many(rows * h * head_dim);
                calls.push((segments.clone(), fill(heads), fill(kv_heads), fill(kv_heads)));
            }
            let want = attend(&scalar, &shape, &calls);
            // Scores are below head_dim; their rounding enters the weights as a relative error.
            let tol = f32::EPSILON * 4.0 * head_dim as f32;
            for (label, b) in backends {
                close(&attend(*b, &shape, &calls), &want, tol, &format!("{shape:?} {label}"));
            }
        }
    }
}

/// A slot forked at any point and continued gives what a slot that went the same way alone gives, bit for bit, and
/// does not disturb the slot it came from.
pub fn forks_equal_running_alone(backends: &[(String, &dyn Backend)]) {
    let mut noise = Noise(10);
    let seg = |slot, tokens, past| vec![Segment { slot, row: 0, tokens, past }];
    for (kv_heads, head_dim, window) in [(3, 64, None), (2, 20, Some(30))] {
        let shape = AttentionShape { heads: 2 * kv_heads, kv_heads, head_dim, scale: 0.3, window, soft_cap: None };
        let mut rows = |n: usize| [2 * kv_heads, kv_heads, kv_heads].map(|heads| noise.many(n * heads * head_dim));
        let (start, left, right, more) = (rows(140), rows(9), rows(70), rows(1));
        for (label, b) in backends {
            let step = |cache: &mut _, [q, k, v]: &[Vec<f32>; 3], segments: &[Segment]| {
                b.kv_append(cache, &b.upload(k).unwrap(), &b.upload(v).unwrap(), segments).unwrap();
                b.download(&b.attention(&b.upload(q).unwrap(), cache, &shape, segments).unwrap()).unwrap()
            };
            let head = |at: usize| {
                [2, 1, 1]
                    .iter()
                    .zip(&start)
                    .map(|(g, x)| x[..at * g * kv_heads * head_dim].to_vec())
                    .collect::<Vec<_>>()
            };
            let new = || b.kv_cache(3, 256, kv_heads, head_dim).unwrap();
            for at in [1, 63, 64, 65, 128, 140] {
                let head: [Vec<f32>; 3] = head(at).try_into().unwrap();
                let mut forked = new();
                step(&mut forked, &start, &seg(0, 140, 0));
                b.kv_fork(&mut forked, 0, at, 2).unwrap();
                let mut alone = new();
                step(&mut alone, &head, &seg(1, at, 0));
                let case = format!("{label} at {at}, head of {head_dim}");
                // Both sides go on in turn from the shared page.
                assert_eq!(step(&mut forked, &left, &seg(2, 9, at)), step(&mut alone, &left, &seg(1, 9, at)), "{case}");
                step(&mut forked, &right, &seg(0, 70, 140));
                let want = step(&mut alone, &more, &seg(1, 1, at + 9));
                assert_eq!(step(&mut forked, &more, &seg(2, 1, at + 9)), want, "{case}");
                let mut first = new();
                step(&mut first, &start, &seg(0, 140, 0));
                step(&mut first, &right, &seg(0, 70, 140));
                assert_eq!(
                    step(&mut forked, &more, &seg(0, 1, 210)),
                    step(&mut first, &more, &seg(0, 1, 210)),
                    "{case}"
                );
            }
            let mut cache = new();
            assert!(b.kv_fork(&mut cache, 0, 10, 3).is_err() && b.kv_fork(&mut cache, 0, 257, 1).is_err(), "{label}");
            assert!(b.kv_release(&mut cache, 3).is_err(), "{label}");
        }
    }
}

/// Rotations of whole and half heads; rows outside the segments stay.
pub fn rope_agrees(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(6));
    let segments = [Segment { slot: 0, row: 1, tokens: 3, past: 40 }, Segment { slot: 1, row: 4, tokens: 1, past: 0 }];
    let (heads, head_dim, total) = (3, 64, 6);
    let x = noise.many(total * heads * head_dim);
    for rotated in [64, 32] {
        let inv_freq: Vec<f32> = (0..rotated / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
        let run = |b: &dyn Backend| {
            let mut q = b.upload(&x).unwrap();
            b.rope(&mut q, heads, head_dim, &inv_freq, 1.1, &segments).unwrap();
            b.download(&q).unwrap()
        };
        let want = run(&scalar);
        for (label, b) in backends {
            let got = run(*b);
            close(&got, &want, f32::EPSILON * 4.0, &format!("rope {label}"));
            let width = heads * head_dim;
            assert_eq!((&got[..width], &got[5 * width..]), (&x[..width], &x[5 * width..]), "{label}");
        }
    }
}

/// Norm, activations, soft cap, addition, gathering, slicing and the largest magnitude.
pub fn elementwise_agrees(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(6));
    let wide: Vec<f32> = noise.many(40_000).iter().map(|v| v * 20.0).collect();
    let (up, x, gain) = (noise.many(40_000), noise.many(5 * 192), noise.many(192));
    for (label, b) in backends {
        let both = |run: &dyn Fn(&dyn Backend) -> Vec<f32>, tol: f32, case: &str| {
            close(&run(*b), &run(&scalar), tol, &format!("{case} {label}"));
        };
        for width in [192, 15, 1] {
            let rows = x.len() / width;
            let norm = |b: &dyn Backend| {
                let (x, gain) = (b.upload(&x).unwrap(), b.upload(&gain[..width]).unwrap());
                b.download(&b.rms_norm(&x, &gain, width, 1e-5, 1.0).unwrap()).unwrap()
            };
            // |y| ≤ √width · |1 + gain|.
            both(&norm, f32::EPSILON * 32.0, "norm");
            let pick = [rows - 1, 0, rows / 2, 0];
            let gather =
                |b: &dyn Backend| b.download(&b.gather_rows(&b.upload(&x).unwrap(), width, &pick).unwrap()).unwrap();
            both(&gather, 0.0, "gather");
            let columns = |b: &dyn Backend| {
                let y = b.slice_columns(&b.upload(&x).unwrap(), width, width / 3..width).unwrap();
                b.download(&y).unwrap()
            };
            both(&columns, 0.0, "columns");
        }
        for act in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let run = |b: &dyn Backend| {
                b.download(&b.activation_mul(&b.upload(&wide).unwrap(), &b.upload(&up).unwrap(), act).unwrap()).unwrap()
            };
            both(&run, f32::EPSILON * 4.0 * 20.0, &format!("{act:?}"));
        }
        let cap = |b: &dyn Backend| {
            let mut v = b.upload(&wide).unwrap();
            b.soft_cap(&mut v, 5.0).unwrap();
            b.add_assign(&mut v, &b.upload(&up).unwrap()).unwrap();
            b.download_range(&v, 7..39_000).unwrap()
        };
        both(&cap, f32::EPSILON * 4.0 * 5.0, "cap and add");
        let largest = |v: &[f32]| b.abs_max(&b.upload(v).unwrap()).unwrap();
        let want = wide.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert_eq!(largest(&wide), want, "{label}");
        assert_eq!(largest(&[0.5, f32::NAN, -2.0]), f32::INFINITY, "{label}");
        assert_eq!(largest(&[]), 0.0, "{label}");
    }
}

/// Log-probabilities agree, ties take the first index, a target outside the vocabulary is an error.
pub fn scores_agree(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(7));
    let (vocab, t) = (5003, 9);
    let mut logits: Vec<f32> = noise.many(vocab * t).iter().map(|v| v * 30.0).collect();
    (logits[100], logits[4000]) = (40.0, 40.0);
    let targets: Vec<u32> = (0..t as u32).map(|i| i * 500).collect();
    let run = |b: &dyn Backend| {
        let l = b.upload(&logits).unwrap();
        let scores = b.score(&l, vocab, &targets).unwrap();
        assert_eq!(scores.iter().map(|s| s.top1).collect::<Vec<_>>(), b.argmax(&l, vocab).unwrap());
        assert!(b.score(&l, vocab, &[vocab as u32; 9]).is_err());
        scores
    };
    let want = run(&scalar);
    assert_eq!(want[0].top1, 100);
    for (label, b) in backends {
        for (g, w) in run(*b).iter().zip(&want) {
            assert_eq!(g.top1, w.top1, "{label}");
            // A difference of logits is up to 70; half its last place is 32 eps.
            close(&[g.log_prob], &[w.log_prob], f32::EPSILON * 60.0, label);
        }
    }
}

/// The Hessian grows in its upper triangle only.
pub fn hessian_adds_to_the_upper_triangle(backends: &[(String, &dyn Backend)], sizes: &[(usize, usize)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(8));
    for &(n, t) in sizes {
        let (start, x) = (noise.many(n * n), noise.many(n * t));
        let run = |b: &dyn Backend| {
            let mut h = b.upload(&start).unwrap();
            b.hessian_update(&mut h, &b.upload(&x).unwrap(), n).unwrap();
            b.download(&h).unwrap()
        };
        let want = run(&scalar);
        // Partial sums stay below t + 1, so a rounding is below half an eps of that; t + 1 of them walk at random.
        let tol = f32::EPSILON / 2.0 * ((t + 1) as f32).powf(1.5);
        for (label, b) in backends {
            let got = run(*b);
            close(&got, &want, tol, &format!("n={n} t={t} {label}"));
            assert!(
                (0..n).all(|i| got[i * n..i * n + i] == start[i * n..i * n + i]),
                "lower triangle touched, n={n} {label}"
            );
        }
    }
}

/// The sums over two streams and what prepares them; `sizes` are (m, n, tokens).
pub fn two_streams_agree(backends: &[(String, &dyn Backend)], sizes: &[(usize, usize, usize)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(10));
    for &(m, n, t) in sizes {
        let (start, x, y, factors) = (noise.many(m * n), noise.many(m * t), noise.many(n * t), noise.many(t));
        let run = |b: &dyn Backend| {
            let (mut h, mut left, right) = (b.upload(&start).unwrap(), b.upload(&x).unwrap(), b.upload(&y).unwrap());
            b.cross_update(&mut h, &left, &right, m, n).unwrap();
            let squares = b.mean_squares(&left, m).unwrap();
            b.scale_rows(&mut left, m, &factors).unwrap();
            let difference = b.subtract(&left, &b.upload(&x).unwrap()).unwrap();
            assert!(b.cross_update(&mut h, &left, &right, m + 1, n).is_err());
            assert!(b.scale_rows(&mut left, m, &factors[1..]).is_err());
            (b.download(&h).unwrap(), squares, b.download(&difference).unwrap())
        };
        let want = run(&scalar);
        // As for the Hessian; a split of f32 into bf16 terms loses no more than an eps of a product.
        let tol = f32::EPSILON * ((t + 1) as f32).powf(1.5);
        for (label, b) in backends {
            let (got, case) = (run(*b), format!("m={m} n={n} t={t} {label}"));
            close(&got.0, &want.0, tol, &case);
            close(&got.1, &want.1, f32::EPSILON, &case);
            close(&got.2, &want.2, 0.0, &case);
        }
    }
}

/// Handles of another backend and overlapping segments are errors.
pub fn foreign_handles_and_overlaps_are_refused(backends: &[(String, &dyn Backend)]) {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(9));
    let w = scalar.upload_weight(&dense(&mut noise, FloatType::F32, 4, 8)).unwrap();
    for (label, b) in backends {
        let x = b.upload(&noise.many(8)).unwrap();
        assert!(matches!(b.linear(&x, &w, None), Err(KernelError::ForeignHandle { what: "weight", .. })), "{label}");
        let twice = [Segment { slot: 0, row: 0, tokens: 2, past: 0 }, Segment { slot: 1, row: 1, tokens: 1, past: 0 }];
        let mut q = b.zeros(16).unwrap();
        assert!(b.rope(&mut q, 1, 8, &[1.0], 1.0, &twice).is_err(), "{label}");
        assert!(b.download_range(&q, 10..17).is_err(), "{label}");
    }
}

/// Tokens drawn where the logits are: those of the reference, but for arrivals that are equal to rounding.
pub fn draws_agree(backends: &[(String, &dyn Backend)]) {
    let (vocab, rows) = (1003, 8);
    let mut logits: Vec<f32> = Noise(8).many(vocab * rows).iter().map(|v| (v * 8.0).round() / 2.0).collect();
    // Rows with one candidate, with none, and with values no softmax has.
    logits[vocab..2 * vocab].fill(f32::NEG_INFINITY);
    logits[vocab + 700] = 3.0;
    logits[2 * vocab..3 * vocab].fill(f32::NEG_INFINITY);
    logits[3 * vocab + 5] = f32::INFINITY;
    let kept = |temperature, top_k, top_p, min_p| Draw { temperature, top_k, top_p, min_p, key: 0 };
    let (mut same, mut all) = (0, 0);
    for rule in [
        kept(0.0, 0, 1.0, 0.0),
        kept(1.0, 0, 1.0, 0.0),
        kept(0.7, 1, 1.0, 0.0),
        kept(1.5, 40, 1.0, 0.0),
        kept(1.0, 0, 0.3, 0.0),
        kept(2.0, 300, 0.8, 0.0),
        kept(1.0, 5000, 0.9, 0.2),
        kept(0.8, usize::MAX, 0.999, 0.01),
    ] {
        let draws: Vec<Draw> = (0..rows as u64).map(|r| Draw { key: 77 * r + 1, ..rule }).collect();
        let want: Vec<u32> = logits.chunks_exact(vocab).zip(&draws).map(|(row, d)| draw(row, d)).collect();
        for (label, b) in backends {
            let l = b.upload(&logits).unwrap();
            let got = b.draw(&l, vocab, &draws).unwrap();
            assert_eq!((got.len(), got[1], got[2], got[3]), (rows, 700, 0, 5), "{label} {rule:?}");
            assert!(got.iter().all(|t| (*t as usize) < vocab), "{label} {rule:?}");
            same += got.iter().zip(&want).filter(|(g, w)| g == w).count();
            all += rows;
            assert!(b.draw(&l, vocab, &draws[1..]).is_err(), "{label}");
        }
    }
    // What differs by rounding is one draw in a million; a filter that kept too much or too little would show in many.
    assert!(same + 1 >= all, "{same} of {all} draws");
}
