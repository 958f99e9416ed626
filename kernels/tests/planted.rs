//! Kernels with a planted fault each (`src/emulator/planted.cu`): the emulator names every one, and only those.
#![cfg(feature = "emulated")]

use half::bf16;
use lowbit_kernels::KernelError;
use lowbit_kernels::cuda::device::{Arg, Device, EmulatorOptions, Launch, Memory};
use lowbit_kernels::minifloat::e4m3;

/// Not a multiple of four: the end of the buffers is not at a guard page.
const N: usize = 101;

fn device(checked: bool, seed: u64) -> Device {
    Device::emulated_with(EmulatorOptions { threads: 2, checked, seed, ..EmulatorOptions::default() }).unwrap()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(d: &Device, m: &Memory) -> Vec<f32> {
    let raw = d.read(m, 0..m.bytes()).unwrap();
    raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn launch_of(blocks: u32) -> Launch {
    Launch { grid: [blocks, 1, 1], block: [128, 1, 1], shared_bytes: 1024 }
}

/// y after `kernel(x, y, n)`, with `n` elements each.
fn run(d: &Device, kernel: &'static str, blocks: u32, n: usize) -> Result<Vec<f32>, KernelError> {
    let x: Vec<f32> = (0..n).map(|i| i as f32 + 0.5).collect();
    let (x, y) = (d.upload(&bytes(&x))?, d.alloc(n * 4)?);
    d.launch(kernel, launch_of(blocks), &[Arg::In(&x), Arg::Out(&y), Arg::I32(n as i32)])?;
    Ok(floats(d, &y))
}

/// The kernel is refused, by name, for the reason.
fn caught(d: &Device, kernel: &'static str, blocks: u32, n: usize, reason: &str) {
    let error = run(d, kernel, blocks, n).unwrap_err();
    assert!(matches!(error, KernelError::Launch { kernel: k, .. } if k == kernel), "{error}");
    let text = error.to_string();
    assert!(text.contains(kernel) && text.contains(reason), "expected `{reason}` in: {text}");
}

#[test]
fn a_clean_kernel_passes() {
    for checked in [false, true] {
        for seed in 0..4 {
            let y = run(&device(checked, seed), "planted_clean", 1, N).unwrap();
            assert!(y.iter().enumerate().all(|(i, v)| *v == (N - 1 - i) as f32 + 0.5), "checked {checked}: {y:?}");
        }
    }
}

/// Plain launches: faults at guard pages (sizes that end there), stray writes, barriers, warp operations, stacks.
#[test]
fn plain_launches_catch() {
    for seed in 0..3 {
        let d = device(false, seed);
        caught(&d, "planted_read_past_end", 1, 100, "out of bounds: a read of argument 0 of 400 bytes, 0 bytes past");
        caught(&d, "planted_write_past_end", 1, 100, "out of bounds: a write to argument 1 of 400 bytes, 0 bytes past");
        caught(&d, "planted_write_past_end", 1, N, "out of bounds: a write beside argument 1");
        caught(&d, "planted_write_beside", 1, N, "out of bounds: a write beside argument 1");
        caught(&d, "planted_divergent_barrier", 1, N, "divergent barrier");
        caught(&d, "planted_two_barriers", 1, N, "divergent barrier: threads wait at __syncthreads of lines");
        caught(&d, "planted_mask", 1, N, "a warp operation");
        caught(&d, "planted_shared_overrun", 1, N, "a write past the end of a shared array");
        caught(&d, "planted_stack", 1, N, "stack overflow");
        // A fault leaves nothing behind.
        run(&d, "planted_clean", 1, N).unwrap();
    }
}

/// Checked launches: the same and races, bounds to the byte, with the thread at fault.
#[test]
fn checked_launches_catch() {
    for seed in 0..3 {
        let d = device(true, seed);
        caught(&d, "planted_read_past_end", 1, N, "thread (100,0,0): out of bounds: a read of argument 0 of 404 bytes");
        caught(&d, "planted_write_past_end", 1, N, "thread (101,0,0): out of bounds: a write to argument 1");
        caught(
            &d,
            "planted_write_beside",
            1,
            N,
            "(0,0,0): out of bounds: a write to argument 1 of 404 bytes, 4 bytes b",
        );
        caught(&d, "planted_write_input", 1, N, "read-only argument: a write to argument 0");
        caught(&d, "planted_race", 1, N, "race: a");
        caught(&d, "planted_race_global", 1, N, "race: a");
        caught(&d, "planted_race_of_blocks", 2, N, "race: a write of argument 1 of 404 bytes, at byte 0");
        caught(&d, "planted_missing_fence", 2, N, "race: a read of argument 1 of 404 bytes, at byte 4 is not ordered");
        run(&d, "planted_last_block", 2, N).unwrap();
        caught(&d, "planted_missing_wait", 1, N, "in flight: a read of dynamic shared memory of 1024 bytes, at byte");
        caught(&d, "planted_divergent_barrier", 1, N, "divergent barrier");
        caught(&d, "planted_two_barriers", 1, N, "divergent barrier");
        caught(&d, "planted_shared_overrun", 1, N, "a write to a shared array of 512 bytes, 0 bytes past its end");
        run(&d, "planted_race_of_blocks", 1, N).unwrap();
        run(&d, "planted_clean", 1, N).unwrap();
    }
}

/// A race by its result: with another order of the threads the sum differs, without any check.
#[test]
fn a_race_shows_under_another_schedule() {
    let y: Vec<Vec<f32>> = (0..3).map(|seed| run(&device(false, seed), "planted_race_global", 1, N).unwrap()).collect();
    assert!(y[0] != y[1] || y[0] != y[2]);
}

#[test]
fn data_in_flight_is_nan() {
    let y = run(&device(false, 0), "planted_missing_wait", 1, N).unwrap();
    assert!(y.iter().all(|v| v.is_nan()), "{y:?}");
}

#[test]
fn a_null_pointer_is_an_error() {
    for checked in [false, true] {
        let d = device(checked, 0);
        let y = d.alloc(N * 4).unwrap();
        let args = [Arg::Null, Arg::Out(&y), Arg::I32(N as i32)];
        let error = d.launch("planted_null", launch_of(1), &args).unwrap_err().to_string();
        assert!(error.contains("planted_null") && error.contains("null"), "{error}");
    }
}

#[test]
fn launches_are_checked_against_the_kernel() {
    let d = device(false, 0);
    let m = d.alloc(N * 4).unwrap();
    let refused = |kernel, l: Launch, args: &[Arg<'_>]| d.launch(kernel, l, args).unwrap_err().to_string();
    let three = [Arg::In(&m), Arg::Out(&m), Arg::I32(0)];
    assert!(refused("no_such", launch_of(1), &three).contains("no such kernel"));
    assert!(refused("planted_clean", launch_of(1), &three[..2]).contains("(ppi), was given (pp)"));
    let float = [Arg::In(&m), Arg::Out(&m), Arg::F32(0.0)];
    assert!(refused("planted_clean", launch_of(1), &float).contains("(ppi), was given (ppf)"));
    assert!(refused("planted_clean", launch_of(0), &three).contains("an empty launch"));
    let wide = Launch { block: [2048, 1, 1], ..launch_of(1) };
    assert!(refused("planted_clean", wide, &three).contains("more blocks or threads"));
    let greedy = Launch { shared_bytes: 1 << 20, ..launch_of(1) };
    assert!(refused("planted_clean", greedy, &three).contains("more shared memory"));
    assert!(Device::emulated(0).is_err());
}

/// mma against wgmma against a sum in f64; neither fault nor race.
#[test]
fn a_fragment_is_transposed() {
    let d = device(true, 2);
    let words =
        |at: fn(u16, u16) -> u16| -> Vec<u8> { (0..64u16).flat_map(|e| at(e / 8, e % 8).to_le_bytes()).collect() };
    let (x, y) = (d.upload(&words(|r, c| r * 100 + c)).unwrap(), d.alloc(128).unwrap());
    d.launch("planted_transpose", launch_of(1), &[Arg::In(&x), Arg::Out(&y)]).unwrap();
    assert_eq!(d.read(&y, 0..128).unwrap(), words(|r, c| c * 100 + r));
}

#[test]
fn matrix_instructions_agree() {
    const M: usize = 64;
    let value = |i: usize, j: usize, k: usize| bf16::from_f32(((i * 7 + j * k) % 17) as f32 / 16.0 - 0.5);
    let matrix = |k: usize| (0..M * M).map(|e| value(e / M, e % M, k)).collect::<Vec<bf16>>();
    let (a, b) = (matrix(3), matrix(5));
    let raw = |m: &[bf16]| m.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    for checked in [false, true] {
        let d = device(checked, 1);
        let (da, db) = (d.upload(&raw(&a)).unwrap(), d.upload(&raw(&b)).unwrap());
        let (c, y) = (d.alloc(M * M * 4).unwrap(), d.alloc(4).unwrap());
        let l = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared_bytes: 2 * 64 * 128 };
        d.launch("planted_matrix", l, &[Arg::In(&da), Arg::In(&db), Arg::Out(&c), Arg::Out(&y)]).unwrap();
        for (e, got) in floats(&d, &c).iter().enumerate() {
            let products = (0..M).map(|k| f64::from(a[e / M * M + k].to_f32()) * f64::from(b[e % M * M + k].to_f32()));
            let want: f64 = products.sum();
            assert!((f64::from(*got) - want).abs() <= 1e-5, "element {e}: {got} against {want}");
        }
        assert!(floats(&d, &y)[0] <= 1e-5);
    }
}

/// Fragments of bytes, every element of them told apart: exact as integers, in f32 as E4M3.
#[test]
fn products_of_bytes_agree_with_the_host() {
    let byte = |seed: usize| move |i: usize| ((i * 37 + seed) * 7919 % 241) as u8;
    // 0x7f and 0xff are no numbers in E4M3.
    let number = |b: u8| if b & 0x7f == 0x7f { b & 0x3f } else { b };
    let (a, b): (Vec<u8>, Vec<u8>) =
        ((0..16 * 32).map(byte(1)).map(number).collect(), (0..8 * 32).map(byte(2)).map(number).collect());
    let (whole, real): (Vec<i32>, Vec<f32>) = ((0..128).map(|i| i * 7 - 300).collect(), vec![0.25; 128]);
    for checked in [false, true] {
        let d = device(checked, 1);
        let (da, db) = (d.upload(&a).unwrap(), d.upload(&b).unwrap());
        let raw = whole.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let (c, f) = (d.upload(&raw).unwrap(), d.upload(&bytes(&real)).unwrap());
        let args = [Arg::In(&da), Arg::In(&db), Arg::Out(&c), Arg::Out(&f)];
        d.launch("planted_matrix_bytes", launch_of(1), &args).unwrap();
        let integers = d.read(&c, 0..c.bytes()).unwrap();
        for (e, (got, float)) in integers.as_chunks::<4>().0.iter().zip(floats(&d, &f)).enumerate() {
            let (a, b) = (&a[e / 8 * 32..][..32], &b[e % 8 * 32..][..32]);
            let sum: i32 = a.iter().zip(b).map(|(a, b)| i32::from(*a as i8) * i32::from(*b as i8)).sum();
            assert_eq!(i32::from_le_bytes(*got), whole[e] + sum, "element {e}");
            let products = a.iter().zip(b).map(|(a, b)| f64::from(e4m3(*a)) * f64::from(e4m3(*b)));
            let (sum, size) = products.fold((0.25, 0.25), |(s, m): (f64, f64), p| (s + p, m + p.abs()));
            assert!(
                (f64::from(float) - sum).abs() <= size * 32.0 * f64::from(f32::EPSILON),
                "element {e}: {float} {sum}"
            );
        }
    }
}

#[test]
fn wide_warpgroup_products_agree_with_the_host() {
    const K: usize = 64;
    let value = |seed: usize| move |i: usize| bf16::from_f32(((i * 37 + seed) * 7919 % 401) as f32 / 200.0 - 1.0);
    let (a, b): (Vec<_>, Vec<_>) = ((0..64 * K).map(value(1)).collect(), (0..256 * K).map(value(2)).collect());
    let raw = |v: &[bf16]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    for checked in [false, true] {
        let d = device(checked, 1);
        let (da, db) = (d.upload(&raw(&a)).unwrap(), d.upload(&raw(&b)).unwrap());
        let (c, y) = (d.alloc(64 * 256 * 4).unwrap(), d.alloc(8).unwrap());
        let l = Launch { grid: [1, 1, 1], block: [128, 1, 1], shared_bytes: (64 + 256) * 128 };
        d.launch("planted_matrix_wide", l, &[Arg::In(&da), Arg::In(&db), Arg::Out(&c), Arg::Out(&y)]).unwrap();
        for (e, got) in floats(&d, &c).iter().enumerate() {
            let (row, column) = (e / 256, e % 256);
            let want: f64 =
                (0..K).map(|k| f64::from(a[row * K + k].to_f32()) * f64::from(b[column * K + k].to_f32())).sum();
            assert!((f64::from(*got) - want).abs() <= 1e-5, "element {e}: {got} against {want}");
        }
        assert!(floats(&d, &y).iter().all(|off| *off <= 1e-5), "{:?}", floats(&d, &y));
    }
}

#[test]
fn memory_is_checked_on_the_host_side() {
    let d = device(false, 0);
    let mut m = d.upload(&[1, 2, 3, 4, 5]).unwrap();
    d.write(&mut m, 1, &[9, 8]).unwrap();
    assert_eq!(d.read(&m, 0..5).unwrap(), [1, 9, 8, 4, 5]);
    assert!(d.write(&mut m, 4, &[0, 0]).is_err() && d.read(&m, 2..6).is_err());
    assert_eq!(d.alloc_zeroed(3).unwrap().bytes(), 3);
    assert_eq!(d.read(&d.alloc_zeroed(3).unwrap(), 0..3).unwrap(), [0; 3]);
    assert_eq!(d.read(&d.alloc(0).unwrap(), 0..0).unwrap(), []);
}

/// Blocks on several OS threads, launches from several host threads, the first block at fault reported.
#[test]
fn threads_change_nothing() {
    let results: Vec<Result<Vec<f32>, String>> = [1, 2, 5]
        .into_iter()
        .flat_map(|threads| {
            let d = &Device::emulated(threads).unwrap();
            let at = |kernel| run(d, kernel, 7, 100).map_err(|e| e.to_string());
            std::thread::scope(|s| {
                let hosts: Vec<_> = (0..4).map(|_| s.spawn(move || at("planted_read_past_end"))).collect();
                hosts.into_iter().map(|h| h.join().unwrap()).collect::<Vec<_>>()
            })
        })
        .collect();
    assert!(results.iter().all(|r| r.is_err() && *r == results[0]), "{results:?}");
}
