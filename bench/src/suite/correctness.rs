//! The op table: every operation against the scalar reference, within a bound that follows from its arithmetic.
//!
//! Small enough that a race checker gets through in a minute. `kernels/tests` has the exhaustive table; this one is
//! what a machine without the sources runs.

use half::bf16;
use lowbit_kernels::activation::{InputCode, InputRule, InputScale};
use lowbit_kernels::backend::{Activation, AttentionShape, Backend, FloatType, HostWeight, Segment};
use lowbit_kernels::cpu::ScalarBackend;
use lowbit_kernels::draw::Draw;
use lowbit_kernels::{GroupSize, KernelError, Scheme};

use super::cost::tokens as token_count;
use super::data::{self, Noise};
use super::record::CorrectnessRow;

const EPS: f64 = f32::EPSILON as f64;

/// Most tokens of a product whose kernel may read activations in f32 where it might round them.
const CHOICE: usize = 64;

type Run = dyn Fn(&dyn Backend) -> Result<Vec<f32>, KernelError>;

/// One operation on given data.
pub struct Case {
    /// Operation.
    pub op: &'static str,
    /// Shapes and format.
    pub case: String,
    /// Largest absolute difference allowed.
    pub tolerance: f64,
    run: Box<Run>,
}

/// Runs `cases` on both backends.
pub fn check(backend: &dyn Backend, cases: &[Case], progress: &dyn Fn(&str)) -> Vec<CorrectnessRow> {
    let scalar = ScalarBackend::new();
    let row = |c: &Case| {
        progress(&format!("{} {}", c.op, c.case));
        let both = (c.run)(&scalar).and_then(|want| Ok((want, (c.run)(backend)?)));
        let (error, problem) = match both {
            Err(e) => (None, Some(e.to_string())),
            Ok((want, got)) if want.len() != got.len() => {
                (None, Some(format!("{} elements instead of {}", got.len(), want.len())))
            }
            Ok((want, got)) => match largest_difference(&got, &want) {
                Some(e) => (Some(e), None),
                None => (None, Some("an element is not a number".to_string())),
            },
        };
        let passed = error.is_some_and(|e| e <= c.tolerance);
        CorrectnessRow { op: c.op.into(), case: c.case.clone(), error, tolerance: c.tolerance, passed, problem }
    };
    cases.iter().map(row).collect()
}

/// `max |got − want|`; `None` when a difference is not finite.
fn largest_difference(got: &[f32], want: &[f32]) -> Option<f64> {
    let mut differences = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).abs());
    differences.try_fold(0.0, |m: f64, d| d.is_finite().then(|| m.max(d)))
}

/// How a tensor core reads the activations of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// With all their bits.
    F32,
    /// Rounded to bf16, half to even; kernels for few tokens may keep the f32.
    Bf16,
}

impl Activations {
    /// Bytes of a cached number, in heads as wide as the rows of the suite have them.
    pub fn cache_bytes(self) -> usize {
        if self == Activations::Bf16 { 2 } else { 4 }
    }
}

/// The table.
pub fn cases(activations: Activations) -> Vec<Case> {
    let mut list = linears(activations);
    codes(&mut list);
    embeddings(&mut list);
    list.extend(attentions(activations));
    rows(&mut list);
    elementwise(&mut list);
    scores(&mut list);
    list
}

fn add(
    list: &mut Vec<Case>,
    op: &'static str,
    case: String,
    tolerance: f64,
    run: impl Fn(&dyn Backend) -> Result<Vec<f32>, KernelError> + 'static,
) {
    list.push(Case { op, case, tolerance, run: Box::new(run) });
}

/// Formats by name: what kernels read as stored, and one that is widened at upload.
fn weight(name: &str, noise: &mut Noise, out: usize, cols: usize) -> HostWeight {
    let packed =
        |noise: &mut Noise, bits, symmetric, group| data::packed(noise, Scheme { bits, symmetric, group }, out, cols);
    match name {
        "f32" => data::dense(noise, FloatType::F32, out, cols),
        "f16" => data::dense(noise, FloatType::F16, out, cols),
        "w4-g128" => packed(noise, 4, true, GroupSize::Cols(128)),
        "w4-g64-asym" => packed(noise, 4, false, GroupSize::Cols(64)),
        "w8-g128" => packed(noise, 8, true, GroupSize::Cols(128)),
        "w8-channel" => packed(noise, 8, true, GroupSize::PerChannel),
        "w3-g64" => packed(noise, 3, true, GroupSize::Cols(64)),
        _ => data::dense(noise, FloatType::Bf16, out, cols),
    }
}

/// Products of every format. For rounded activations the reference gets them rounded, so the tolerance stays that of f32
/// sums; where a kernel may choose, they are given in bf16 from the start. Kernels may round packed weights to bf16 too:
/// there the scales are powers of two, so that it changes nothing.
pub fn linears(activations: Activations) -> Vec<Case> {
    let mut list = Vec::new();
    let mut one = |format: &'static str, out: usize, cols: usize, tokens: usize| {
        let (op, rounded) = match activations {
            Activations::F32 => ("linear", false),
            Activations::Bf16 => ("linear, bf16 activations", true),
        };
        // |x| ≤ 1 and |w| ≤ 1; an asymmetric sum passes through code·x and zero·x, each ≤ 1 a column too.
        let tolerance = 2.0 * EPS * cols as f64;
        add(&mut list, op, format!("{format} {out}x{cols}, {}", token_count(tokens)), tolerance, move |b| {
            let mut noise = Noise(1);
            let mut w = weight(format, &mut noise, out, cols);
            if let (HostWeight::Packed(p), true) = (&mut w, rounded) {
                p.scales.iter_mut().for_each(|s| *s = f32::from_bits(s.to_bits() & 0xff80_0000));
            }
            let w = b.upload_weight(&w)?;
            let mut x = noise.many(tokens * cols);
            if rounded && (tokens <= CHOICE || b.name() == "scalar") {
                x.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            }
            let (x, bias) = (b.upload(&x)?, b.upload(&noise.many(out))?);
            b.download(&b.linear(&x, &w, Some(&bias))?)
        });
    };
    for format in ["bf16", "f16", "f32", "w4-g128", "w4-g64-asym", "w8-g128", "w8-channel", "w3-g64"] {
        for tokens in [1, 4, 8, 9, 17, 65] {
            one(format, 70, 128, tokens);
        }
    }
    for format in ["bf16", "w4-g128", "w8-g128"] {
        one(format, 64, 4096, 1);
        one(format, 64, 4096, 16);
        one(format, 264, 1024, 130);
        one(format, 520, 1024, 300);
    }
    list
}

/// Products whose inputs are rounded to codes of eight bits, of weights of such codes. A device that multiplies integer codes gives the
/// reference's bits; the tolerance is that of one that multiplies rounded values in f32.
fn codes(list: &mut Vec<Case>) {
    let rule = |code, scale| InputRule { code, scale };
    for (name, rule) in [
        ("w8a8", rule(InputCode::Int8, InputScale::Token)),
        ("w8a8-static", rule(InputCode::Int8, InputScale::Stored(vec![0.007]))),
        ("fp8-dynamic", rule(InputCode::Fp8, InputScale::Token)),
        ("fp8-static", rule(InputCode::Fp8, InputScale::Stored(vec![0.002]))),
    ] {
        for (out, cols, tokens) in [(70, 144, 1), (70, 144, 9), (70, 144, 17), (70, 144, 65), (264, 1024, 130)] {
            // Of E4M3 a tensor core may keep 13 bits of the largest addend only.
            let lost = if rule.code == InputCode::Fp8 { 1.0 / 8192.0 } else { 0.0 };
            let tolerance = (2.0 * EPS + lost) * cols as f64;
            let rule = rule.clone();
            let case = format!("{name} {out}x{cols}, {}", token_count(tokens));
            add(list, "rounded_linears", case, tolerance, move |b| {
                let mut noise = Noise(15);
                let w = match rule.code {
                    InputCode::Fp8 => data::fp8(&mut noise, out, cols),
                    _ => weight("w8-channel", &mut noise, out, cols),
                };
                let w = b.upload_weight(&w)?;
                let (x, bias) = (b.upload(&noise.many(tokens * cols))?, b.upload(&noise.many(out))?);
                let made = b.rounded_linears(&x, &rule, &[(&w, Some(&bias))])?;
                Ok(made.iter().map(|y| b.download(y)).collect::<Result<Vec<_>, _>>()?.concat())
            });
        }
    }
}

fn embeddings(list: &mut Vec<Case>) {
    for format in ["bf16", "f16", "f32", "w4-g128", "w8-channel"] {
        add(list, "embed", format!("{format} 17x256"), 0.0, move |b| {
            let table = b.upload_weight(&weight(format, &mut Noise(4), 17, 256))?;
            b.download(&b.embed(&table, &[16, 0, 5, 5], 1.5)?)
        });
    }
}

/// Ragged prefill, continuation and decode over one cache; where activations are rounded, over queries, keys and values
/// that are bf16 already, so that a difference is that of the weights and the sums.
pub fn attentions(activations: Activations) -> Vec<Case> {
    let mut list = Vec::new();
    let variants = [
        ("plain", 8, 2, 128, None, None),
        ("no groups, odd width", 4, 4, 20, None, None),
        ("one key head", 4, 1, 64, None, None),
        ("window 10", 6, 2, 64, Some(10), None),
        ("window 70, cap 5", 6, 2, 64, Some(70), Some(5.0)),
    ];
    for (name, heads, kv_heads, head_dim, window, soft_cap) in variants {
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3, window, soft_cap };
        // Scores are below head_dim; their rounding enters the weights as a relative error.
        let exact = 4.0 * EPS * head_dim as f64;
        // A weight's rounding to bf16 is 2^-9 of it, and so is its part of a mean of values below 1.
        let (tolerance, note) = match activations {
            Activations::F32 => (exact, ""),
            Activations::Bf16 => (exact + 1.0 / 512.0, ", bf16"),
        };
        let case = format!("{heads}/{kv_heads} heads of {head_dim}, {name}{note}");
        add(&mut list, "kv_append, attention", case, tolerance, move |b| attend(b, &shape, activations));
    }
    list
}

fn attend(b: &dyn Backend, shape: &AttentionShape, activations: Activations) -> Result<Vec<f32>, KernelError> {
    let seg = |slot, row, tokens, past| Segment { slot, row, tokens, past };
    let calls = [
        (vec![seg(1, 0, 70, 0), seg(0, 70, 1, 0), seg(2, 71, 190, 0)], 261),
        (vec![seg(0, 0, 17, 1), seg(1, 17, 3, 70)], 20),
        (vec![seg(2, 0, 1, 190), seg(0, 1, 1, 18), seg(1, 2, 1, 73)], 3),
    ];
    let mut noise = Noise(5);
    let mut cache = b.kv_cache(3, 200, shape.kv_heads, shape.head_dim)?;
    let mut out = Vec::new();
    for (segments, rows) in calls {
        let mut fill = |heads: usize| {
            let mut x = noise.many(rows * heads * shape.head_dim);
            if activations == Activations::Bf16 {
                x.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            }
            b.upload(&x)
        };
        let (q, k, v) = (fill(shape.heads)?, fill(shape.kv_heads)?, fill(shape.kv_heads)?);
        b.kv_append(&mut cache, &k, &v, &segments)?;
        out.extend(b.download(&b.attention(&q, &cache, shape, &segments)?)?);
    }
    Ok(out)
}

/// Norm, rope, gathering, slicing, Hessian.
fn rows(list: &mut Vec<Case>) {
    for (tokens, width) in [(5, 15), (3, 192), (2, 4096)] {
        // |y| ≤ √width · |gain + 1|, relative error of a mean and a root.
        let tolerance = 2.0 * EPS * (width as f64).sqrt().max(16.0);
        add(list, "rms_norm", format!("{tokens}x{width}"), tolerance, move |b| {
            let mut noise = Noise(6);
            let (x, gain) = (b.upload(&noise.many(tokens * width))?, b.upload(&noise.many(width))?);
            b.download(&b.rms_norm(&x, &gain, width, 1e-5, 1.0)?)
        });
    }
    for (tokens, width) in [(5, 15), (2, 4096)] {
        // As rms_norm, of |x| ≤ 2; the sum itself is exact.
        let tolerance = 2.0 * EPS * (width as f64).sqrt().max(16.0);
        add(list, "add_rms_norm", format!("{tokens}x{width}"), tolerance, move |b| {
            let mut noise = Noise(6);
            let (mut x, y) = (b.upload(&noise.many(tokens * width))?, b.upload(&noise.many(tokens * width))?);
            let normed = b.add_rms_norm(&mut x, &y, &b.upload(&noise.many(width))?, width, 1e-5, 1.0)?;
            Ok([b.download(&x)?, b.download(&normed)?].concat())
        });
    }
    add(list, "rope_append", "3 and 1 heads of 64".into(), 4.0 * EPS * 64.0, |b| {
        let at = |slot, row, past| Segment { slot, row, tokens: 1, past };
        let segments = [at(1, 0, 40), at(0, 1, 0)];
        let inv_freq: Vec<f32> = (0..32).map(|i| 10_000f32.powf(-2.0 * i as f32 / 64.0)).collect();
        let mut noise = Noise(7);
        let mut fill = |heads: usize| b.upload(&noise.many(2 * heads * 64));
        let (mut q, mut k, v) = (fill(3)?, fill(1)?, fill(1)?);
        let mut cache = b.kv_cache(2, 48, 1, 64)?;
        b.rope_append(&mut cache, &mut q, &mut k, &v, 3, 64, &inv_freq, 1.1, &segments)?;
        let shape = AttentionShape { heads: 3, kv_heads: 1, head_dim: 64, scale: 0.3, window: Some(1), soft_cap: None };
        Ok([b.download(&q)?, b.download(&b.attention(&q, &cache, &shape, &segments)?)?].concat())
    });
    for rotated in [64usize, 32] {
        add(list, "rope", format!("6 rows, 3 heads of 64, {rotated} rotated"), 4.0 * EPS, move |b| {
            let segments =
                [Segment { slot: 0, row: 1, tokens: 3, past: 40 }, Segment { slot: 1, row: 4, tokens: 1, past: 0 }];
            let inv_freq: Vec<f32> =
                (0..rotated / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
            let mut x = b.upload(&Noise(7).many(6 * 3 * 64))?;
            b.rope(&mut x, 3, 64, &inv_freq, 1.1, &segments)?;
            b.download(&x)
        });
    }
    add(list, "gather_rows", "4 of 5x192".into(), 0.0, |b| {
        b.download(&b.gather_rows(&b.upload(&Noise(8).many(5 * 192))?, 192, &[4, 0, 2, 0])?)
    });
    for (code, scale) in [
        (InputCode::Int8, InputScale::Token),
        (InputCode::Fp8, InputScale::Group(64)),
        (InputCode::Fp4, InputScale::Local { global: 2688.0 }),
    ] {
        let rule = InputRule { code, scale };
        add(list, "quantize_input", format!("5x192, {code:?}"), 0.0, move |b| {
            b.download(&b.quantize_input(&b.upload(&Noise(8).many(5 * 192))?, 192, &rule)?)
        });
    }
    add(list, "slice_columns", "64..192 of 5x192".into(), 0.0, |b| {
        b.download(&b.slice_columns(&b.upload(&Noise(8).many(5 * 192))?, 192, 64..192)?)
    });
    for (n, tokens) in [(15, 1), (64, 16), (150, 33), (130, 257), (300, 200)] {
        // Partial sums stay below t + 1, so a rounding is below half an eps of that; t + 1 of them walk at random. What
        // lies below the diagonal must stay, and is compared too.
        let tolerance = EPS / 2.0 * (tokens as f64 + 1.0).powf(1.5);
        add(list, "hessian_update", format!("{n}x{n}, {}", token_count(tokens)), tolerance, move |b| {
            let mut noise = Noise(9);
            let (mut h, x) = (b.upload(&noise.many(n * n))?, b.upload(&noise.many(n * tokens))?);
            b.hessian_update(&mut h, &x, n)?;
            b.download(&h)
        });
    }
}

fn elementwise(list: &mut Vec<Case>) {
    const N: usize = 5003;
    let wide = || Noise(10).many(N).iter().map(|v| v * 20.0).collect::<Vec<_>>();
    for (name, act) in
        [("silu", Activation::Silu), ("gelu, tanh", Activation::GeluTanh), ("gelu, erf", Activation::Gelu)]
    {
        // |act(x)| ≤ 20, |up| ≤ 1.
        add(list, "activation_mul", name.into(), 4.0 * EPS * 20.0, move |b| {
            b.download(&b.activation_mul(&b.upload(&wide())?, &b.upload(&Noise(11).many(N))?, act)?)
        });
    }
    add(list, "add_assign", format!("{N}"), 0.0, move |b| {
        let mut x = b.upload(&wide())?;
        b.add_assign(&mut x, &b.upload(&Noise(11).many(N))?)?;
        b.download(&x)
    });
    add(list, "soft_cap", format!("{N}, cap 5"), 4.0 * EPS * 5.0, move |b| {
        let mut x = b.upload(&wide())?;
        b.soft_cap(&mut x, 5.0)?;
        b.download_range(&x, 7..N)
    });
    add(list, "abs_max", format!("{N}"), 0.0, move |b| Ok(vec![b.abs_max(&b.upload(&wide())?)?]));
    add(list, "abs_max", "a NaN counts as infinity".into(), 0.0, |b| {
        let seen = b.abs_max(&b.upload(&[0.5, f32::NAN, -2.0])?)?;
        Ok(vec![f32::from(u8::from(seen == f32::INFINITY))])
    });
}

fn scores(list: &mut Vec<Case>) {
    const VOCAB: usize = 5003;
    const ROWS: usize = 3;
    let logits = || {
        let mut l: Vec<f32> = Noise(12).many(VOCAB * ROWS).iter().map(|v| v * 30.0).collect();
        // A tie: the first counts.
        (l[100], l[4000]) = (40.0, 40.0);
        l
    };
    let targets = [3u32, 5002, 2500];
    // A difference of logits is up to 70; half its last place is 32 eps.
    add(list, "score", format!("{ROWS}x{VOCAB}, log-probability"), 60.0 * EPS, move |b| {
        Ok(b.score(&b.upload(&logits())?, VOCAB, &targets)?.iter().map(|s| s.log_prob).collect())
    });
    add(list, "score", format!("{ROWS}x{VOCAB}, top-1"), 0.0, move |b| {
        Ok(b.score(&b.upload(&logits())?, VOCAB, &targets)?.iter().map(|s| s.top1 as f32).collect())
    });
    for (top_k, top_p) in [(0, 1.0), (40, 0.9)] {
        // Arrivals that are equal to rounding are one pair in millions.
        add(list, "draw", format!("{ROWS}x{VOCAB}, top-k {top_k}, top-p {top_p}"), 0.0, move |b| {
            let draws: Vec<Draw> = (1..=ROWS as u64)
                .map(|key| Draw { temperature: 8.0, top_k, top_p, min_p: 0.0, key: key << 30 })
                .collect();
            Ok(b.draw(&b.upload(&logits())?, VOCAB, &draws)?.iter().map(|i| *i as f32).collect())
        });
    }
    add(list, "argmax", format!("{ROWS}x{VOCAB}, a tie"), 0.0, move |b| {
        Ok(b.argmax(&b.upload(&logits())?, VOCAB)?.iter().map(|i| *i as f32).collect())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_agrees_with_itself() {
        let rows = check(&ScalarBackend::new(), &cases(Activations::F32), &|_| ());
        let half = check(&ScalarBackend::new(), &linears(Activations::Bf16), &|_| ());
        let half_attention = check(&ScalarBackend::new(), &attentions(Activations::Bf16), &|_| ());
        for r in rows.iter().chain(&half).chain(&half_attention) {
            assert!(r.passed && r.error == Some(0.0), "{} {}: {:?} {:?}", r.op, r.case, r.error, r.problem);
        }
        let ops = [
            "linear",
            "rounded_linears",
            "embed",
            "rms_norm",
            "rope",
            "hessian_update",
            "score",
            "argmax",
            "draw",
            "add_assign",
            "abs_max",
        ];
        assert!(ops.iter().all(|op| rows.iter().any(|r| r.op == *op)));
    }

    #[test]
    fn what_is_wrong_or_not_a_number_does_not_pass() {
        assert_eq!(largest_difference(&[1.0, 2.5], &[1.0, 2.0]), Some(0.5));
        assert_eq!(largest_difference(&[f32::NAN, 1.0], &[0.0, 1.0]), None);
        assert_eq!(largest_difference(&[1.0, f32::INFINITY], &[1.0, f32::INFINITY]), None);
        let case = |tolerance, run: Box<Run>| Case { op: "op", case: String::new(), tolerance, run };
        let name_of = |b: &dyn Backend| if b.name() == "scalar" { 1.0 } else { 2.0 };
        let cases = [
            case(0.5, Box::new(move |b| Ok(vec![name_of(b)]))),
            case(1.0, Box::new(move |b| Ok(vec![name_of(b)]))),
            case(1.0, Box::new(move |b| Ok(vec![0.0; name_of(b) as usize]))),
            case(1.0, Box::new(|_| Err(KernelError::Overflow("a test")))),
        ];
        let rows = check(&lowbit_kernels::cpu::CpuBackend::new(), &cases, &|_| ());
        assert_eq!(rows.iter().map(|r| r.passed).collect::<Vec<_>>(), [false, true, false, false]);
        assert_eq!(rows[0].error, Some(1.0));
        assert!(rows[2].problem.is_some() && rows[3].problem.is_some());
    }
}
