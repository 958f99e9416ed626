//! Products, attention and the solver of the CPU backend on real layer shapes: how long, and how near to what this machine can do.
//!
//! `cargo bench -p lowbit-bench --bench cpu [-- FILTER]`. The ceilings are measured first, in the same run: reading memory, multiplying
//! in f32 and in sixteen-bit fixed point out of registers. Decode of one token reads each weight once, so its rows count bytes; that of a
//! batch, prefill and the Hessian multiply, so theirs count operations (two a product); attention and the solver are in `cases/`. After
//! each of criterion's own lines comes the share of the ceiling, and for a batch its time against one token's.

#![expect(clippy::print_stdout, reason = "a benchmark's output is what it prints")]

#[path = "cases/attention.rs"]
mod attention;
#[path = "cases/solver.rs"]
mod solver;

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use lowbit_kernels::backend::{Backend, FloatType, WeightHandle};
use lowbit_kernels::cpu::{CpuBackend, peak_products, read_bandwidth};
use lowbit_kernels::random::{RandomFormat, RandomWeight, normals};
use lowbit_kernels::{GroupSize, Scheme};

/// Name, rows and columns of a linear.
type Linear = (&'static str, usize, usize);

/// Models, with their groups and the linears of a block.
const SHAPES: [(&str, usize, [Linear; 4]); 3] = [
    ("smollm2-135m", 64, [("qkv", 960, 576), ("o", 576, 576), ("gate-up", 3072, 576), ("down", 576, 1536)]),
    ("llama-3.2-1b", 128, [("qkv", 3072, 2048), ("o", 2048, 2048), ("gate-up", 16384, 2048), ("down", 2048, 8192)]),
    ("llama-3.1-8b", 128, [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate-up", 28672, 4096), ("down", 4096, 14336)]),
];

/// Tokens of a prompt's product.
const PROMPT: usize = 128;
/// Tokens of a decode step: streams that a server answers together.
const BATCHES: [usize; 3] = [8, 16, 32];
/// More than any last-level cache: copies of a weight are read in turn until they fill it.
const COLD_BYTES: usize = 256 << 20;

struct Ceilings {
    bytes: f64,
    f32: f64,
    fixed: f64,
}

/// Runs one case and prints its share of `ceiling`, both in units a second. Returns the best time in seconds, infinite where the case was
/// not asked for.
fn case(
    c: &mut Criterion,
    name: &str,
    work: Throughput,
    units: f64,
    ceiling: (f64, &str),
    run: &mut dyn FnMut(),
) -> f64 {
    let best = Cell::new(f64::INFINITY);
    let mut group = c.benchmark_group(name);
    group
        .throughput(work)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    group.bench_function("", |b| {
        b.iter_custom(|n| {
            let start = Instant::now();
            for _ in 0..n {
                run();
            }
            let took = start.elapsed();
            best.set(best.get().min(took.as_secs_f64() / n as f64));
            took
        });
    });
    group.finish();
    if best.get().is_finite() {
        println!("{name:<44} {:>5.1} % of {}", 100.0 * units / best.get() / ceiling.0, ceiling.1);
    }
    best.get()
}

fn weights(cpu: &CpuBackend, format: RandomFormat, out: usize, n: usize, copies: usize) -> Vec<WeightHandle> {
    let one = |seed| RandomWeight { format, out_features: out, in_features: n, deviation: 0.02, seed };
    (0..copies as u32).map(|seed| cpu.random_weight(&one(seed)).expect("a weight of a known shape")).collect()
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let peak = peak_products(threads);
    let ceilings = Ceilings { bytes: read_bandwidth(threads), f32: 2.0 * peak.f32, fixed: 2.0 * peak.fixed };
    println!(
        "{threads} threads: read {:.1} GB/s, f32 {:.0} GFLOP/s, fixed point {:.0} GOP/s",
        ceilings.bytes / 1e9,
        ceilings.f32 / 1e9,
        ceilings.fixed / 1e9
    );
    let cpu = CpuBackend::new();
    let exact = CpuBackend::new().exact(true);
    for (model, group, linears) in SHAPES {
        let packed = |bits| RandomFormat::Packed(Scheme { bits, symmetric: true, group: GroupSize::Cols(group) });
        let formats = [
            ("bf16", RandomFormat::Dense(FloatType::Bf16)),
            ("w8a16", packed(8)),
            ("w4a16", packed(4)),
            ("w2a16", packed(2)),
        ];
        for (linear, out, n) in linears {
            let x = cpu.upload(&normals(n, 1.0, 1)).expect("a row");
            for (format, kind) in formats {
                let one = weights(&cpu, kind, out, n, 1);
                let bytes = one.first().map_or(1, |w| w.stored_bytes);
                let many = weights(&cpu, kind, out, n, (COLD_BYTES / bytes).clamp(1, 512));
                let decode = cpu.decode_phase().expect("the CPU has a decode phase");
                let mut turn = many.iter().cycle();
                let mut run = || {
                    let w = turn.next().expect("a cycle has no end");
                    black_box(decode.linear(&x, w, None).expect("a product"));
                };
                let name = format!("decode/{model}/{linear}/{format}");
                let one = case(
                    &mut criterion,
                    &name,
                    Throughput::Bytes(bytes as u64),
                    bytes as f64,
                    (ceilings.bytes, "read bandwidth"),
                    &mut run,
                );
                for t in BATCHES {
                    let x = cpu.upload(&normals(t * n, 1.0, 4)).expect("rows");
                    let operations = 2.0 * (t * out * n) as f64;
                    // Dense weights meet activations in f32 there.
                    let ceiling = match kind {
                        RandomFormat::Dense(_) => (ceilings.f32, "f32"),
                        _ => (ceilings.fixed, "fixed point"),
                    };
                    let name = format!("decode/{model}/{linear}/{format}/batch{t}");
                    let work = Throughput::Elements(operations as u64);
                    let batch = case(&mut criterion, &name, work, operations, ceiling, &mut || {
                        let w = turn.next().expect("a cycle has no end");
                        black_box(decode.linear(&x, w, None).expect("a product"));
                    });
                    if one.is_finite() && batch.is_finite() {
                        println!("{name:<44} {:>5.2} times the time of one token", batch / one);
                    }
                }
            }
            let x = cpu.upload(&normals(PROMPT * n, 1.0, 2)).expect("rows");
            let operations = 2.0 * (PROMPT * out * n) as f64;
            for (format, kind) in [formats[0], formats[2]] {
                for (backend, how, ceiling) in
                    [(&cpu, "fixed", (ceilings.fixed, "fixed point")), (&exact, "f32", (ceilings.f32, "f32"))]
                {
                    let w = weights(&cpu, kind, out, n, 1);
                    let Some(w) = w.first() else { continue };
                    let name = format!("prompt{PROMPT}/{model}/{linear}/{format}/{how}");
                    let work = Throughput::Elements(operations as u64);
                    case(&mut criterion, &name, work, operations, ceiling, &mut || {
                        black_box(backend.linear(&x, w, None).expect("a product"));
                    });
                }
            }
        }
        // The Hessian of the widest input that a block of this model has: half of the full product's operations.
        let n = linears.iter().map(|l| l.2).max().unwrap_or(0);
        let t = 512;
        let x = cpu.upload(&normals(t * n, 1.0, 3)).expect("rows");
        let operations = (t * n * (n + 1)) as f64;
        for (backend, how, ceiling) in
            [(&cpu, "fixed", (ceilings.fixed, "fixed point")), (&exact, "f32", (ceilings.f32, "f32"))]
        {
            let mut h = cpu.zeros(n * n).expect("a Hessian");
            let name = format!("hessian{t}/{model}/{n}/{how}");
            case(&mut criterion, &name, Throughput::Elements(operations as u64), operations, ceiling, &mut || {
                backend.hessian_update(&mut h, &x, n).expect("a sum");
            });
        }
    }
    attention::cases(&mut criterion, &cpu, &ceilings);
    solver::cases(&mut criterion, &cpu, &ceilings);
    criterion.final_summary();
}
