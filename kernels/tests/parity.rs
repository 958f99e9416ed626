//! The CPU backend against the scalar reference, at every instruction set this machine has.

mod cases;

use cases::{Noise, Sizes};
use lowbit_kernels::backend::{AttentionShape, Backend, KvFormat, Segment};
use lowbit_kernels::cpu::{CpuBackend, Level, ScalarBackend};

const SIZES: Sizes<'_> =
    Sizes { tokens: &[1, 2, 3, 15, 16, 17, 64], widths: &[32, 64, 96, 576], rows: &[1, 15, 17, 64] };

fn backends() -> Vec<CpuBackend> {
    let mut list: Vec<CpuBackend> = [Level::Portable, Level::Avx2, Level::Avx512, Level::Vnni]
        .map(|l| CpuBackend::with_level(l).exact(true))
        .into();
    list.dedup_by_key(|b| b.level());
    list
}

/// Runs a check on every instruction set of this machine.
fn each(check: impl Fn(&[(String, &dyn Backend)])) {
    let backends = backends();
    let list: Vec<(String, &dyn Backend)> =
        backends.iter().map(|b| (format!("{:?}", b.level()), b as &dyn Backend)).collect();
    check(&list);
}

#[test]
fn linear_agrees_for_every_format_and_shape() {
    each(|list| cases::linears_agree(list, &SIZES, |_, _| true));
}

#[test]
fn inputs_round_alike() {
    each(cases::inputs_round_alike);
}

#[test]
fn products_of_rounded_inputs_agree() {
    each(|list| {
        cases::rounded_linears_agree(list, &Sizes { tokens: &[1, 17], widths: &[32, 208], rows: &[17] }, false);
    });
}

#[test]
fn a_token_scores_the_same_alone_and_beside_others_in_both_phases() {
    let mut noise = Noise(2);
    let (n, k) = (70, 96);
    let rounded = [Level::Portable, Level::Avx2, Level::Avx512, Level::Vnni].map(CpuBackend::with_level);
    for cpu in backends().into_iter().chain(rounded) {
        let decode = cpu.decode_phase().unwrap();
        for (name, w) in cases::weights(&mut noise, n, k) {
            let x = noise.many(19 * k);
            for b in [&cpu as &dyn Backend, decode] {
                let together = cases::linear(b, &w, &x, None);
                for t in [1, 2, 4, 5, 8, 11, 16] {
                    assert_eq!(cases::linear(b, &w, &x[..t * k], None), together[..t * n], "{name} t={t}");
                }
            }
        }
    }
}

#[test]
fn the_decode_phase_agrees_with_the_reference() {
    for cpu in backends() {
        let list = [(format!("{:?} decode", cpu.level()), cpu.decode_phase().unwrap())];
        cases::linears_agree(&list, &SIZES, |_, _| true);
    }
}

/// Fixed point: |Δ| ≤ half a step of either factor a column (values of both within ±1, so norms of a block within √32, and the weight's
/// step a power of two), on top of the reference's own rounding.
#[test]
fn prefill_in_fixed_point_is_near_the_reference_and_equal_on_every_instruction_set() {
    let mut noise = Noise(6);
    let scalar = ScalarBackend::new();
    let levels = [Level::Portable, Level::Avx2, Level::Avx512, Level::Vnni].map(CpuBackend::with_level);
    for (n, k) in [(1, 32), (70, 96), (130, 576)] {
        for (name, w) in cases::weights(&mut noise, n, k) {
            for t in [1, 3, 9] {
                let x = noise.many(t * k);
                let want = cases::linear(&scalar, &w, &x, None);
                let first = cases::linear(&levels[0], &w, &x, None);
                let step = 1.5 * 32f32.sqrt() / 46330.0 + 2.0 * f32::EPSILON;
                for (a, b) in first.iter().zip(&want) {
                    assert!((a - b).abs() <= k as f32 * step, "{name} t={t}: {a} {b}");
                }
                // Widths without whole blocks in their groups keep f32, whose portable form has no fused addition; so do f32 weights.
                let blocks = ["-g32", "-g64", "Bf16", "F16"].iter().any(|kind| name.contains(kind));
                if blocks && !name.contains("shuffled=true") {
                    for cpu in &levels[1..] {
                        assert_eq!(cases::linear(cpu, &w, &x, None), first, "{name} t={t} {:?}", cpu.level());
                    }
                }
            }
        }
    }
}

/// Decode of packed weights rounds activations: |Δ| ≤ max |x| / 32638 a column of |w| ≤ 1, on top of the reference's own rounding.
#[test]
fn rounded_decode_is_near_the_reference_and_equal_on_every_instruction_set() {
    let mut noise = Noise(5);
    let scalar = ScalarBackend::new();
    let levels = [Level::Portable, Level::Avx2, Level::Avx512, Level::Vnni].map(CpuBackend::with_level);
    for (n, k) in [(1, 32), (70, 96), (130, 576)] {
        for (name, w) in cases::weights(&mut noise, n, k) {
            if !name.starts_with('w') {
                continue; // floats are not rounded
            }
            for t in [1, 3, 9] {
                let x = noise.many(t * k);
                let want = cases::linear(&scalar, &w, &x, None);
                let first = cases::linear(levels[0].decode_phase().unwrap(), &w, &x, None);
                for (a, b) in first.iter().zip(&want) {
                    assert!((a - b).abs() <= k as f32 * (1.0 / 32638.0 + 2.0 * f32::EPSILON), "{name} t={t}: {a} {b}");
                }
                for cpu in &levels[1..] {
                    let same = cases::linear(cpu.decode_phase().unwrap(), &w, &x, None);
                    // Widths without a loop of their own keep prefill's arithmetic, whose portable form has no fused addition.
                    if name.contains("-g32") || name.contains("-g64") || k == 32 {
                        assert_eq!(same, first, "{name} t={t} {:?}", cpu.level());
                    }
                }
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
    for (name, w) in cases::weights(&mut noise, n, k) {
        for t in [1, 3, 33] {
            let x = noise.many(t * k);
            let one = pool(1).install(|| cases::linear(&cpu, &w, &x, None));
            assert_eq!(one, pool(3).install(|| cases::linear(&cpu, &w, &x, None)), "{name} t={t}");
            let decode = |threads| {
                let cpu = pool(threads).install(CpuBackend::new);
                cases::linear(cpu.decode_phase().unwrap(), &w, &x, None)
            };
            assert_eq!(decode(1), decode(3), "{name} t={t} decode");
        }
    }
}

#[test]
fn embedding_is_exact_and_refuses_unknown_ids() {
    each(cases::embedding_is_exact);
}

#[test]
fn attention_agrees_for_ragged_batches_windows_and_caps() {
    each(cases::attention_agrees);
}

#[test]
fn forks_equal_running_alone() {
    each(cases::forks_equal_running_alone);
}

#[test]
fn pages_are_shared_by_forks_and_freed_with_their_last_slot() {
    let (cpu, mut noise) = (CpuBackend::new(), Noise(11));
    let mut cache = cpu.kv_cache(3, 1000, 2, 8).unwrap();
    let rows = cpu.upload(&noise.many(200 * 16)).unwrap();
    let pages = |cache: &_| cpu.kv_usage(cache).pages;
    assert_eq!((pages(&cache), cpu.kv_usage(&cache).page_tokens), (0, 64));
    cpu.kv_append(&mut cache, &rows, &rows, &[Segment { slot: 0, row: 0, tokens: 200, past: 0 }]).unwrap();
    assert_eq!(pages(&cache), 4);
    cpu.kv_fork(&mut cache, 0, 128, 1).unwrap();
    assert_eq!(pages(&cache), 4);
    cpu.kv_fork(&mut cache, 0, 130, 2).unwrap();
    assert_eq!(pages(&cache), 5);
    cpu.kv_release(&mut cache, 0).unwrap();
    assert_eq!(pages(&cache), 3);
    cpu.kv_fork(&mut cache, 2, 64, 2).unwrap();
    assert_eq!(pages(&cache), 2);
    assert!(cpu.kv_fork(&mut cache, 0, 1, 2).is_err(), "a released slot holds nothing");
    (1..3).for_each(|slot| cpu.kv_release(&mut cache, slot).unwrap());
    assert_eq!(pages(&cache), 0);
}

#[test]
fn rope_agrees() {
    each(cases::rope_agrees);
}

#[test]
fn elementwise_operations_agree() {
    each(cases::elementwise_agrees);
}

#[test]
fn tokens_are_drawn_alike() {
    each(cases::draws_agree);
}

#[test]
fn scores_agree_and_ties_take_the_first_index() {
    each(cases::scores_agree);
}

#[test]
fn two_streams_agree() {
    each(|list| cases::two_streams_agree(list, &[(1, 3, 2), (64, 40, 1), (150, 33, 70), (200, 576, 17)]));
}

#[test]
fn hessian_adds_to_the_upper_triangle_only() {
    each(|list| cases::hessian_adds_to_the_upper_triangle(list, &[(1, 3), (64, 1), (150, 33), (576, 17)]));
}

#[test]
fn foreign_handles_and_overlapping_segments_are_refused() {
    each(cases::foreign_handles_and_overlaps_are_refused);
}

/// A cache in eight bits is attended like a float cache that holds the rounded numbers, bit for bit: in both phases, over pages, after a
/// fork, on every instruction set.
#[test]
fn a_cache_in_eight_bits_is_a_float_cache_of_rounded_numbers() {
    // The nearest of all e4m3 numbers, the even one of two.
    let sizes: Vec<f32> = (0..0x7f)
        .map(|c| match (c / 8, (c % 8) as f32 / 8.0) {
            (0, m) => m * 2f32.powi(-6),
            (e, m) => (1.0 + m) * 2f32.powi(e - 7),
        })
        .collect();
    let e4m3 = |v: f32| {
        let far = |c: usize| (f64::from(sizes[c]) - f64::from(v.abs())).abs();
        let nearest = (0..sizes.len()).min_by(|a, b| far(*a).total_cmp(&far(*b)).then((a % 2).cmp(&(b % 2)))).unwrap();
        sizes[nearest].copysign(v)
    };
    cache_of_rounded_numbers(KvFormat::Int8, 127.0, &|v: f32| v.round_ties_even());
    cache_of_rounded_numbers(KvFormat::Fp8, 448.0, &e4m3);
}

fn cache_of_rounded_numbers(format: KvFormat, most: f32, nearest: &dyn Fn(f32) -> f32) {
    let mut noise = Noise(21);
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 20, scale: 0.3, window: None, soft_cap: None };
    let (width, tokens) = (shape.kv_heads * shape.head_dim, 131);
    let (q, k, v) = (noise.many(tokens * 80), noise.many(tokens * width), noise.many(tokens * width));
    let round = |x: &[f32]| -> Vec<f32> {
        let row = |r: &[f32]| {
            let scale = r.iter().fold(0f32, |m, v| m.max(v.abs())) / most;
            r.iter().map(|v| nearest(v / scale) * scale).collect::<Vec<f32>>()
        };
        x.chunks_exact(shape.head_dim).flat_map(row).collect()
    };
    // All tokens but the last as a prompt, then a fork, then the last in decode.
    let run = |b: &CpuBackend, k: &[f32], v: &[f32]| {
        let up = |x: &[f32]| b.upload(x).unwrap();
        let mut cache = b.kv_cache(2, 200, shape.kv_heads, shape.head_dim).unwrap();
        let prompt = [Segment { slot: 0, row: 0, tokens: tokens - 1, past: 0 }];
        let (last, from) = ([Segment { slot: 1, row: 0, tokens: 1, past: tokens - 1 }], (tokens - 1) * width);
        b.kv_append(&mut cache, &up(&k[..from]), &up(&v[..from]), &prompt).unwrap();
        let first = b.attention(&up(&q[..(tokens - 1) * 80]), &cache, &shape, &prompt).unwrap();
        b.kv_fork(&mut cache, 0, tokens - 1, 1).unwrap();
        let d = b.decode_phase().unwrap();
        d.kv_append(&mut cache, &up(&k[from..]), &up(&v[from..]), &last).unwrap();
        let second = d.attention(&up(&q[(tokens - 1) * 80..]), &cache, &shape, &last).unwrap();
        [b.download(&first).unwrap(), b.download(&second).unwrap()].concat()
    };
    for float in backends() {
        let eight = CpuBackend::with_level(float.level()).exact(true).with_kv(format);
        let (got, want) = (run(&eight, &k, &v), run(&float, &round(&k), &round(&v)));
        assert_eq!(got, want, "{format:?} {:?}", float.level());
        assert_ne!(got, run(&float, &k, &v), "rounding does something");
        assert_eq!((eight.kv_element_bytes(20), float.kv_element_bytes(20)), (1, 4));
    }
}
