//! The GPU backend against the scalar reference: on the emulated device, and on a GPU where there is one.
#![cfg(all(feature = "emulated", feature = "cuda"))]
#![allow(clippy::print_stderr, reason = "says that a check was skipped")]

mod cases;

use std::sync::{Arc, OnceLock};

use cases::{Noise, Sizes};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cuda::{Arithmetic, Device, DeviceOptions, EmulatorOptions, GpuBackend};

const SIZES: Sizes<'_> =
    Sizes { tokens: &[1, 2, 3, 8, 9, 15, 16, 17, 64], widths: &[32, 64, 96, 256], rows: &[1, 15, 17, 64] };

fn emulated(options: EmulatorOptions) -> GpuBackend {
    GpuBackend::new(Arc::new(Device::emulated_with(options).unwrap()))
}

/// The GPU of this machine, opened once.
fn gpu() -> Option<&'static GpuBackend> {
    static GPU: OnceLock<Option<GpuBackend>> = OnceLock::new();
    GPU.get_or_init(|| {
        let options = DeviceOptions {
            nvrtc: std::env::var_os("LOWBIT_NVRTC").map(Into::into),
            cache_dir: std::env::temp_dir().join("lowbit-test-cubins"),
            search: std::env::var_os("CUDA_HOME").map(Into::into).into_iter().collect(),
        };
        match Device::cuda(0, &options) {
            Ok(device) => Some(GpuBackend::new(Arc::new(device))),
            Err(e) => {
                eprintln!("skipped on a GPU: {e}");
                None
            }
        }
    })
    .as_ref()
}

/// Runs a check on every device of this machine.
fn each(check: impl Fn(&[(String, &dyn Backend)])) {
    let emulated = emulated(EmulatorOptions { threads: 2, ..EmulatorOptions::default() });
    let mut list: Vec<(String, &dyn Backend)> = vec![("emulated".to_string(), &emulated)];
    if let Some(gpu) = gpu() {
        list.push(("cuda".to_string(), gpu));
    }
    check(&list);
}

#[test]
fn linear_agrees_for_every_format_and_shape() {
    // What is widened to f32 at upload (float codes, 2 and 3 bits, a shuffled index, groups of 24) is one weight to the kernels:
    // the smallest and the largest tile of each path will do.
    let widened = |name: &str| {
        ["w2", "w3", "fp8", "nvfp4", "mxfp4"].iter().any(|s| name.starts_with(s))
            || name.contains("shuffled=true")
            || name.contains("g24")
    };
    each(|list| cases::linears_agree(list, &SIZES, |name, t| !widened(name) || [1, 17].contains(&t)));
}

#[test]
fn inputs_round_alike() {
    each(cases::inputs_round_alike);
}

#[test]
fn products_of_codes_have_the_bits_of_the_reference() {
    // Every kernel: up to 8, 16 and 32 tokens, and more; a step of columns begun, whole steps and a part; tiles begun and two of them.
    let sizes = Sizes { tokens: &[1, 8, 9, 17, 33, 65], widths: &[16, 208], rows: &[17, 130] };
    each(|list| cases::rounded_linears_agree(list, &sizes, true));
    // Widths that are no multiple of 16 are rounded and widened.
    each(|list| cases::rounded_linears_agree(list, &Sizes { tokens: &[3], widths: &[40], rows: &[5] }, false));
}

#[test]
fn reproducible_products_of_rounded_inputs_are_the_cpus() {
    let gpu = emulated(EmulatorOptions { threads: 2, ..EmulatorOptions::default() });
    let gpu = gpu.with_arithmetic(Arithmetic::Reproducible);
    let list: [(String, &dyn Backend); 1] = [("reproducible".to_string(), &gpu)];
    cases::rounded_linears_agree(&list, &Sizes { tokens: &[3], widths: &[64], rows: &[17] }, false);
}

#[test]
fn a_token_scores_the_same_alone_and_in_a_batch() {
    let (mut noise, n, k) = (Noise(2), 70, 96);
    for (name, w) in cases::weights(&mut noise, n, k) {
        let x = noise.many(64 * k);
        each(|list| {
            for (label, b) in list {
                let run = |tokens: usize| cases::linear(*b, &w, &x[..tokens * k], None);
                // Up to eight tokens, up to 32, and more go through different kernels.
                let (few, many, wide) = (run(8), run(32), run(64));
                [1, 3].iter().for_each(|t| assert_eq!(run(*t), few[..t * n], "{name} {label} t={t}"));
                [9, 17].iter().for_each(|t| assert_eq!(run(*t), many[..t * n], "{name} {label} t={t}"));
                [33, 50].iter().for_each(|t| assert_eq!(run(*t), wide[..t * n], "{name} {label} t={t}"));
            }
        });
    }
}

#[test]
fn neither_threads_nor_their_order_change_a_result() {
    let (mut noise, n, k, t) = (Noise(3), 70, 96, 17);
    let one = emulated(EmulatorOptions::default());
    let other = emulated(EmulatorOptions { threads: 3, seed: 7, ..EmulatorOptions::default() });
    for (name, w) in cases::weights(&mut noise, n, k) {
        let x = noise.many(t * k);
        for t in [1, t] {
            let x = &x[..t * k];
            assert_eq!(cases::linear(&one, &w, x, None), cases::linear(&other, &w, x, None), "{name} t={t}");
        }
    }
}

#[test]
fn checked_kernels_touch_only_their_own_memory() {
    let options = EmulatorOptions { checked: true, ..EmulatorOptions::default() };
    let checked = match Device::emulated_with(options) {
        Ok(device) => GpuBackend::new(Arc::new(device)),
        Err(e) => return eprintln!("skipped: {e}"),
    };
    let list: [(String, &dyn Backend); 1] = [("checked".to_string(), &checked)];
    let sizes = Sizes { tokens: &[1, 8, 17], widths: &[96], rows: &[17] };
    cases::linears_agree(&list, &sizes, |name, _| !name.contains("shuffled=true"));
    let codes = Sizes { tokens: &[8, 33], widths: &[208], rows: &[17] };
    cases::rounded_linears_agree(&list, &codes, true);
    cases::embedding_is_exact(&list);
    cases::rope_agrees(&list);
    cases::scores_agree(&list);
    cases::draws_agree(&list);
    cases::hessian_adds_to_the_upper_triangle(&list, &[(70, 17)]);
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
fn rope_agrees() {
    each(cases::rope_agrees);
}

#[test]
fn elementwise_operations_agree() {
    each(cases::elementwise_agrees);
}

#[test]
fn scores_agree_and_ties_take_the_first_index() {
    each(cases::scores_agree);
}

#[test]
fn tokens_are_drawn_alike() {
    each(cases::draws_agree);
}

#[test]
fn two_streams_agree() {
    each(|list| cases::two_streams_agree(list, &[(1, 3, 2), (70, 40, 33)]));
}

#[test]
fn hessian_adds_to_the_upper_triangle_only() {
    each(|list| cases::hessian_adds_to_the_upper_triangle(list, &[(1, 3), (15, 1), (64, 16), (150, 33), (96, 130)]));
}

#[test]
fn foreign_handles_and_overlapping_segments_are_refused() {
    each(cases::foreign_handles_and_overlaps_are_refused);
}

#[test]
fn nothing_in_gives_nothing_out() {
    each(|list| {
        for (label, b) in list {
            let none = b.upload(&[]).unwrap();
            let empty = |y: lowbit_kernels::backend::Buffer| assert!(b.download(&y).unwrap().is_empty(), "{label}");
            empty(b.gather_rows(&b.zeros(6).unwrap(), 3, &[]).unwrap());
            empty(b.slice_columns(&b.zeros(6).unwrap(), 3, 1..1).unwrap());
            empty(b.rms_norm(&none, &b.zeros(3).unwrap(), 3, 1e-5, 0.0).unwrap());
            assert!(b.argmax(&none, 3).unwrap().is_empty(), "{label}");
            assert!(b.score(&none, 3, &[]).unwrap().is_empty(), "{label}");
        }
    });
}
