//! Learned rounding on the demo model: its graph is the model's, and what it learns lowers a block's error.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use lowbit_calibration::sequential::advance;
use lowbit_calibration::{WholeBlock, Windows};
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::quant_config::KvScheme;
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::{Backend, Segment};
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::{GroupSize, LinearScheme, ScaleType, Scheme};
use lowbit_model::Embedding;
use lowbit_model::block::Block;
use lowbit_quantize::learned::graph::{Graph, LINEARS, Weights};
use lowbit_quantize::learned::rounding::Rounding;
use lowbit_quantize::learned::{Learnable, learn};
use lowbit_quantize::scale_search::SolverOptions;
use lowbit_quantize::{Method, QuantizeError, QuantizeOptions, Resume, Silent, plan, quantize};

const TOKENS: usize = 24;

fn demo() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"))
}

/// Windows of [`TOKENS`] tokens.
fn windows(count: usize) -> Vec<Vec<u32>> {
    let mut x = 1u32;
    let mut token = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 16) % 2000
    };
    (0..count).map(|_| (0..TOKENS).map(|_| token()).collect()).collect()
}

/// Block 0, its original weights, and what goes in and comes out on `count` windows.
fn first_block(b: &dyn Backend, count: usize) -> (Graph, Vec<Vec<f32>>, WholeBlock) {
    let ckpt = Checkpoint::open(&demo()).unwrap();
    let block = Block::load(&ckpt, b, "model.layers.0", 0).unwrap();
    let ids = windows(count).concat();
    let x = Embedding::load(&ckpt, b).unwrap().apply(b, &ids).unwrap();
    let segments: Vec<Segment> =
        (0..count).map(|slot| Segment { slot, row: slot * TOKENS, tokens: TOKENS, past: 0 }).collect();
    let inputs = b.download(&x).unwrap();
    let targets = b.download(&advance(b, &block, x, &segments, TOKENS).unwrap()).unwrap();
    let windows = (0..count).map(|i| i * TOKENS..(i + 1) * TOKENS).collect();
    let data = WholeBlock { inputs, targets, width: block.hidden_size(), windows };
    let of = |module: &str| ckpt.store.get(&format!("{module}.weight")).unwrap().to_f32().unwrap();
    let weights = block.linears.iter().map(|l| of(&l.module)).collect();
    (Graph::load(&ckpt, "model.layers.0", &block).unwrap(), weights, data)
}

#[test]
fn the_graph_is_the_models() {
    let (graph, weights, data) = first_block(&ScalarBackend::new(), 2);
    let w: Weights<'_> = std::array::from_fn(|i| weights[i].as_slice());
    let y = graph.forward(&w, &data.inputs, &[TOKENS, TOKENS]).y;
    let largest = data.targets.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (i, (found, wanted)) in y.iter().zip(&data.targets).enumerate() {
        // Sums of a few hundred products in f32, in another order.
        assert!((found - wanted).abs() <= 1e-4 * largest, "{i}: {found} {wanted}");
    }
    assert_eq!(y.len(), data.targets.len());
}

#[test]
fn learning_lowers_the_error_of_the_blocks_output() {
    let (graph, weights, data) = first_block(&CpuBackend::new(), 8);
    let scheme = Scheme { bits: 3, symmetric: true, group: GroupSize::Cols(64) };
    let opts = SolverOptions::new(scheme, ScaleType::Bf16);
    let start = || -> [Learnable; LINEARS] {
        std::array::from_fn(|i| {
            let ((out, n), w) = (graph.dims[i], weights[i].clone());
            // One linear that stays as it is.
            if i == 1 {
                Learnable::Kept(w)
            } else {
                Learnable::Rounded(Box::new(Rounding::new(w, out, n, &opts).unwrap()))
            }
        })
    };
    let mut linears = start();
    let mut calls = 0;
    let mut check = || {
        calls += 1;
        Ok::<(), ()>(())
    };
    let found = learn(&graph, &mut linears, &data, 16, &mut check).unwrap();
    assert!(found.is_better() && found.learned < 0.9 * found.nearest, "{found:?}");
    assert!(calls >= 16);
    // One step of the largest rate only unsettles: what stands is then rounding to nearest.
    let mut linears = start();
    let found = learn(&graph, &mut linears, &data, 1, &mut || Ok::<(), ()>(())).unwrap();
    if !found.is_better() {
        for (linear, fresh) in linears.iter().zip(&start()) {
            if let (Learnable::Rounded(a), Learnable::Rounded(b)) = (linear, fresh) {
                assert_eq!(a.matrix(), b.matrix());
            }
        }
    }
    // Interrupted, it says so.
    assert_eq!(learn(&graph, &mut start(), &data, 4, &mut || Err("stop")).unwrap_err(), "stop");
}

fn options() -> QuantizeOptions {
    let scheme = Scheme::parse("w4a16", GroupSize::Cols(64), true).unwrap();
    QuantizeOptions { method: Method::Round, learn_steps: 2, ..QuantizeOptions::new(scheme) }
}

#[test]
fn a_whole_model_is_written_and_recorded() {
    let tmp = tempfile::tempdir().unwrap();
    let ckpt = Checkpoint::open(&demo()).unwrap();
    let windows = Windows::new(windows(3), "random", 0);
    // A linear that is left alone stands in the block as it is.
    let options = QuantizeOptions { ignore: vec!["re:.*o_proj".into()], ..options() };
    let made = plan::make(&ckpt, &options, None, windows.token_count()).unwrap();
    let resume = Resume { identity: "test".into(), fresh: false };
    let to = tmp.path().join("to");
    let stop = AtomicBool::new(false);
    let (outcome, writer) =
        quantize(&ckpt, &[&CpuBackend::new()], &made, Some(&windows), &to, false, &resume, &Silent, &stop).unwrap();
    writer.finish().unwrap();
    assert_eq!(outcome.layers.len(), 4 * 6);
    for l in &outcome.layers {
        assert!(l.method == "round" && l.tokens == 3 * TOKENS as u64, "{l:?}");
        assert!(l.relative_error > 0.0 && l.relative_error < 0.05, "{l:?}");
    }
    assert_eq!(made.options.to_map()["learn_steps"], 2);
    lowbit_quantize::verify::verify(&Checkpoint::open(&to).unwrap(), None, Some(&ckpt)).unwrap();
}

#[test]
fn what_has_no_gradient_is_refused() {
    let ckpt = Checkpoint::open(&demo()).unwrap();
    let refused = |options: &QuantizeOptions| match plan::make(&ckpt, options, None, 72) {
        Err(QuantizeError::Plan { summary, .. }) => summary,
        Ok(_) => panic!("accepted"),
        Err(e) => panic!("{e}"),
    };
    let float = LinearScheme::parse("nvfp4a16", GroupSize::Cols(64), true).unwrap();
    assert!(refused(&QuantizeOptions { scheme: float, ..options() }).contains("integer codes"));
    let inputs = LinearScheme::parse("w8a8", GroupSize::Cols(64), true).unwrap();
    assert!(refused(&QuantizeOptions { scheme: inputs, ..options() }).contains("round their inputs"));
    let kv = Some(KvScheme { code: InputCode::Fp8, per_head: false });
    assert!(refused(&QuantizeOptions { kv, ..options() }).contains("keys and values"));
    // What it holds is more than rounding to nearest holds, and in the plan.
    let peak = |method| {
        let made = plan::make(&ckpt, &QuantizeOptions { method, ..options() }, None, 1 << 16).unwrap();
        made.record.peak_memory_bytes
    };
    assert!(peak(Method::Round) > peak(Method::Rtn));
}
