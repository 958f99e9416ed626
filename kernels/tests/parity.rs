//! The CPU backend against the scalar reference, at every instruction set this machine has.

use half::{bf16, f16};
use lowbit_kernels::backend::{
    Activation, AttentionShape, Backend, Bytes, FloatType, HostWeight, PackedWeight, Segment,
};
use lowbit_kernels::cpu::{CpuBackend, Level, ScalarBackend};
use lowbit_kernels::pack::pack_rows;
use lowbit_kernels::{GroupSize, KernelError, Scheme};

const TOKENS: [usize; 7] = [1, 2, 3, 15, 16, 17, 64];
const WIDTHS: [usize; 4] = [32, 64, 96, 576];
const ROWS: [usize; 4] = [1, 15, 17, 64];

struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
    /// Uniform in [-1, 1).
    fn one(&mut self) -> f32 {
        self.bits() as f32 / 2f32.powi(31) - 1.0
    }
    fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.one()).collect()
    }
}

fn backends() -> Vec<CpuBackend> {
    let mut list: Vec<CpuBackend> = [Level::Portable, Level::Avx2, Level::Avx512].map(CpuBackend::with_level).into();
    list.dedup_by_key(|b| b.level());
    list
}

/// NaN fails: the comparison is true only for numbers.
fn close(got: &[f32], want: &[f32], tol: f32, case: &str) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let diff = (g - w).abs();
        assert!(diff <= tol, "{case}: element {i}: {g} against {w}, off by {diff} > {tol}");
    }
}

fn linear(b: &dyn Backend, w: &HostWeight, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
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
    let data = Bytes::new(std::sync::Arc::new(raw), 1..end).unwrap();
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

/// Every weight of a width, with its name: dense dtypes, then schemes with and without a shuffled group index.
fn weights(noise: &mut Noise, n: usize, k: usize) -> Vec<(String, HostWeight)> {
    let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
    let mut list: Vec<_> = types.iter().map(|d| (format!("{d:?}"), dense(noise, *d, n, k))).collect();
    for s in schemes(k) {
        for shuffled in [false, true] {
            list.push((format!("{} shuffled={shuffled}", s.full_name()), packed(noise, s, n, k, shuffled)));
        }
    }
    list
}

#[test]
fn linear_agrees_for_every_format_and_shape() {
    let (scalar, cpus) = (ScalarBackend::new(), backends());
    let mut noise = Noise(1);
    for k in WIDTHS {
        for n in ROWS {
            for (name, w) in weights(&mut noise, n, k) {
                for t in TOKENS {
                    let (x, bias) = (noise.many(t * k), noise.many(n));
                    let want = linear(&scalar, &w, &x, Some(&bias));
                    // |x| ≤ 1 and |w| ≤ 1; an asymmetric sum passes through code·x and zero·x, each ≤ 1 a column too.
                    let tol = f32::EPSILON * 2.0 * k as f32;
                    for cpu in &cpus {
                        let got = linear(cpu, &w, &x, Some(&bias));
                        close(&got, &want, tol, &format!("{name} t={t} k={k} n={n} {:?}", cpu.level()));
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_scores_the_same_alone_and_beside_three_others() {
    let mut noise = Noise(2);
    let (n, k) = (70, 96);
    for cpu in backends() {
        for (name, w) in weights(&mut noise, n, k)
            .into_iter()
            .filter(|(_, w)| !matches!(w, HostWeight::Packed(p) if p.group_index.is_some()))
        {
            if name.contains("g24") {
                continue; // goes through panels, where agreement is to rounding
            }
            let x = noise.many(4 * k);
            let together = linear(&cpu, &w, &x, None);
            for t in 1..4 {
                assert_eq!(linear(&cpu, &w, &x[..t * k], None), together[..t * n], "{name} t={t}");
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let mut noise = Noise(3);
    let (n, k) = (700, 576);
    let cpu = CpuBackend::new();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for (name, w) in weights(&mut noise, n, k) {
        for t in [1, 3, 33] {
            let x = noise.many(t * k);
            let one = pool(1).install(|| linear(&cpu, &w, &x, None));
            assert_eq!(one, pool(3).install(|| linear(&cpu, &w, &x, None)), "{name} t={t}");
        }
    }
}

#[test]
fn embedding_is_exact_and_refuses_unknown_ids() {
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
        for cpu in backends() {
            assert_eq!(run(&cpu), run(&scalar), "{name}");
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

#[test]
fn attention_agrees_for_ragged_batches_windows_and_caps() {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(5));
    let seg = |slot, row, tokens, past| Segment { slot, row, tokens, past };
    // A ragged prefill, a continuation of several lengths, one decode step.
    let plan = [
        (vec![seg(2, 0, 70, 0), seg(0, 70, 1, 0), seg(1, 71, 17, 0)], 88),
        (vec![seg(0, 0, 65, 1), seg(2, 65, 3, 70)], 68),
        (vec![seg(1, 0, 1, 17), seg(0, 1, 1, 66), seg(2, 2, 1, 73)], 3),
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
            for cpu in backends() {
                close(&attend(&cpu, &shape, &calls), &want, tol, &format!("{shape:?} {:?}", cpu.level()));
            }
        }
    }
}

#[test]
fn rope_norm_and_activations_agree() {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(6));
    let segments = [Segment { slot: 0, row: 1, tokens: 3, past: 40 }, Segment { slot: 1, row: 4, tokens: 1, past: 0 }];
    let (heads, head_dim, total) = (3, 64, 5);
    let x = noise.many(total * heads * head_dim);
    let wide: Vec<f32> = noise.many(40_000).iter().map(|v| v * 20.0).collect();
    let up = noise.many(40_000);
    let gain = noise.many(192);
    for rotated in [64, 32] {
        let inv_freq: Vec<f32> = (0..rotated / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
        let run = |b: &dyn Backend| {
            let mut q = b.upload(&x).unwrap();
            b.rope(&mut q, heads, head_dim, &inv_freq, 1.1, &segments).unwrap();
            b.download(&q).unwrap()
        };
        backends().iter().for_each(|cpu| close(&run(cpu), &run(&scalar), f32::EPSILON * 4.0, "rope"));
    }
    let norm = |b: &dyn Backend| {
        b.download(&b.rms_norm(&b.upload(&x).unwrap(), &b.upload(&gain).unwrap(), 192, 1e-5, 1.0).unwrap()).unwrap()
    };
    for cpu in backends() {
        close(&norm(&cpu), &norm(&scalar), f32::EPSILON * 32.0, "norm");
        for act in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            let run = |b: &dyn Backend| {
                b.download(&b.activation_mul(&b.upload(&wide).unwrap(), &b.upload(&up).unwrap(), act).unwrap()).unwrap()
            };
            close(&run(&cpu), &run(&scalar), f32::EPSILON * 4.0 * 20.0, &format!("{act:?}"));
        }
        let cap = |b: &dyn Backend| {
            let mut v = b.upload(&wide).unwrap();
            b.soft_cap(&mut v, 5.0).unwrap();
            b.add_assign(&mut v, &b.upload(&up).unwrap()).unwrap();
            b.download(&v).unwrap()
        };
        assert_eq!(cap(&cpu), cap(&scalar));
    }
}

#[test]
fn scores_agree_and_ties_take_the_first_index() {
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
    for cpu in backends() {
        for (g, w) in run(&cpu).iter().zip(&want) {
            assert_eq!(g.top1, w.top1);
            close(&[g.log_prob], &[w.log_prob], f32::EPSILON * 60.0, "log probability");
        }
    }
}

#[test]
fn hessian_adds_to_the_upper_triangle_only() {
    let (scalar, mut noise) = (ScalarBackend::new(), Noise(8));
    for (n, t) in [(1, 3), (64, 1), (150, 33), (576, 17)] {
        let (start, x) = (noise.many(n * n), noise.many(n * t));
        let run = |b: &dyn Backend| {
            let mut h = b.upload(&start).unwrap();
            b.hessian_update(&mut h, &b.upload(&x).unwrap(), n).unwrap();
            b.download(&h).unwrap()
        };
        for cpu in backends() {
            let got = run(&cpu);
            close(&got, &run(&scalar), f32::EPSILON * (t + 1) as f32, &format!("n={n} t={t}"));
            assert!((0..n).all(|i| got[i * n..i * n + i] == start[i * n..i * n + i]), "lower triangle touched, n={n}");
        }
    }
}

#[test]
fn foreign_weights_and_overlapping_segments_are_refused() {
    let (scalar, cpu, mut noise) = (ScalarBackend::new(), CpuBackend::new(), Noise(9));
    let w = scalar.upload_weight(&dense(&mut noise, FloatType::F32, 4, 8)).unwrap();
    let x = cpu.upload(&noise.many(8)).unwrap();
    assert!(matches!(cpu.linear(&x, &w, None), Err(KernelError::ForeignHandle { what: "weight", .. })));
    let twice = [Segment { slot: 0, row: 0, tokens: 2, past: 0 }, Segment { slot: 1, row: 1, tokens: 1, past: 0 }];
    let mut q = cpu.zeros(16).unwrap();
    assert!(cpu.rope(&mut q, 1, 8, &[1.0], 1.0, &twice).is_err());
}
