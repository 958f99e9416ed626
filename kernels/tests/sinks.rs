//! What gpt-oss asks beside the usual operations: attention with sinks, and its clamped activation. The scalar backend is right by hand,
//! the fast one is right by it, in both phases.

use lowbit_kernels::backend::{AttentionShape, Backend, Buffer, Segment};
use lowbit_kernels::cpu::{CpuBackend, Level, ScalarBackend};
use lowbit_kernels::random::normals;

/// Attention of `segments` over a cache that holds `held` tokens of random keys and values in each of two slots.
fn attend(
    store: &dyn Backend,
    phase: &dyn Backend,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    held: usize,
    segments: &[Segment],
) -> Vec<f32> {
    let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut cache = store.kv_cache(2, held, shape.kv_heads, shape.head_dim).unwrap();
    let up = |n: usize, seed: u32| store.upload(&normals(n, 1.0, seed)).unwrap();
    for slot in 0..2 {
        let (k, v) = (up(held * kv_width, 1 + slot), up(held * kv_width, 3 + slot));
        let all = [Segment { slot: slot as usize, row: 0, tokens: held, past: 0 }];
        store.kv_append(&mut cache, &k, &v, &all).unwrap();
    }
    let rows: usize = segments.iter().map(|s| s.tokens).sum();
    let q: Buffer = up(rows * width, 9);
    let y = match sinks {
        Some(sinks) => phase.attention_with_sinks(&q, &cache, shape, sinks, segments),
        None => phase.attention(&q, &cache, shape, segments),
    };
    store.download(&y.unwrap()).unwrap()
}

fn close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        // Sums of at most 200 terms in f32, and exponentials that differ by two units in the last place.
        assert!((g - w).abs() <= 1e-5 * w.abs().max(1.0), "{what}, element {i}: {g}, expected {w}");
    }
}

#[test]
fn a_sink_takes_its_share_of_the_softmax() {
    let b = ScalarBackend::new();
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 2, scale: 0.5, window: None, soft_cap: None };
    let mut cache = b.kv_cache(1, 2, 1, 2).unwrap();
    let rows = |x: &[f32]| b.upload(x).unwrap();
    let both = [Segment { slot: 0, row: 0, tokens: 2, past: 0 }];
    b.kv_append(&mut cache, &rows(&[2.0, 0.0, 0.0, 2.0]), &rows(&[8.0, 4.0, 0.0, -4.0]), &both).unwrap();
    // Scores are q · k / 2: ln 3 with the first key, 0 with the second. Sinks of ln 2 and of ln 4: weights of 3/6 and 1/6, of 3/8 and 1/8.
    let q = rows(&[3f32.ln(), 0.0, 3f32.ln(), 0.0]);
    let last = [Segment { slot: 0, row: 0, tokens: 1, past: 1 }];
    let y = b.attention_with_sinks(&q, &cache, &shape, &[2f32.ln(), 4f32.ln()], &last).unwrap();
    close(&b.download(&y).unwrap(), &[4.0, 4.0 / 3.0, 3.0, 1.0], "by hand");
    assert!(b.attention_with_sinks(&q, &cache, &shape, &[0.0], &last).is_err(), "a sink for every head");
}

#[test]
fn both_phases_agree_with_the_reference() {
    let scalar = ScalarBackend::new();
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        let cpu = CpuBackend::with_level(level);
        for (heads, kv_heads, head_dim, window) in
            [(4, 2, 8, None), (6, 1, 20, Some(5)), (8, 8, 64, Some(128)), (3, 3, 33, Some(1))]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3, window, soft_cap: None };
            let sinks: Vec<f32> = (0..heads).map(|h| h as f32 - 1.5).collect();
            let prompt =
                [Segment { slot: 1, row: 0, tokens: 70, past: 130 }, Segment { slot: 0, row: 70, tokens: 3, past: 0 }];
            let want = attend(&scalar, &scalar, &shape, Some(&sinks), 200, &prompt);
            let what = format!("{level:?}, {shape:?}");
            for (phase, name) in [(&cpu as &dyn Backend, "prefill"), (cpu.decode_phase().unwrap(), "decode")] {
                let got = attend(&cpu, phase, &shape, Some(&sinks), 200, &prompt);
                close(&got, &want, &format!("{name}, {what}"));
                // A sink that weighs nothing changes no bit.
                let none = vec![f32::NEG_INFINITY; heads];
                assert_eq!(
                    attend(&cpu, phase, &shape, Some(&none), 200, &prompt),
                    attend(&cpu, phase, &shape, None, 200, &prompt),
                    "{name}, {what}"
                );
            }
        }
    }
}

#[test]
fn the_clamped_activation_by_hand_and_alike_everywhere() {
    let gate = [0.0, 1.0, -1.0, 9.0, -9.0, 100.0, f32::NAN];
    let up = [3.0, 0.5, -0.5, 100.0, -100.0, -7.5, 1.0];
    let want = |g: f64, u: f64| g / (1.0 + (-1.702 * g).exp()) * (u + 1.0);
    let by_hand = [0.0, want(1.0, 0.5), want(-1.0, -0.5), want(7.0, 7.0), want(-9.0, -7.0), want(7.0, -7.0)];
    let long: Vec<f32> = normals(70_000, 5.0, 7);
    let backends: [&dyn Backend; 2] = [&ScalarBackend::new(), &CpuBackend::new()];
    let run = |b: &dyn Backend, gate: &[f32], up: &[f32]| {
        let y = b.clamped_swiglu(&b.upload(gate).unwrap(), &b.upload(up).unwrap(), 1.702, 7.0).unwrap();
        b.download(&y).unwrap()
    };
    for b in backends {
        let y = run(b, &gate, &up);
        for (got, want) in y.iter().zip(by_hand) {
            assert!(
                (f64::from(*got) - want).abs() <= 1e-6 * (1.0 + want.abs()),
                "{}: {got}, expected {want}",
                b.name()
            );
        }
        assert!(y[6].is_nan(), "{}", b.name());
        assert!(b.clamped_swiglu(&b.upload(&gate).unwrap(), &b.upload(&up[1..]).unwrap(), 1.702, 7.0).is_err());
    }
    let [scalar, cpu] = backends.map(|b| run(b, &long, &long[..]));
    close(&cpu, &scalar, "many elements");
}
