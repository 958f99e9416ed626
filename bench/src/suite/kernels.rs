//! Times of the table's rows, as shares of what the device can do.

use std::time::Instant;

use lowbit_kernels::backend::Backend;

use super::cost::{Format, Kernel};
use super::record::{Ceilings, KernelRow, Left};
use super::work::{Times, Weights, Work};
use super::{Row, SuiteOptions};
use crate::error::{BenchError, Result};
use crate::stats;

/// Sizes the ceilings are measured at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CeilingSizes {
    /// Elements of the copy and the addition.
    pub elements: usize,
    /// Tokens, rows and columns of the linear.
    pub linear: [usize; 3],
}

impl CeilingSizes {
    /// For a GPU, where small products do not fill the device; for a host, where large ones take minutes.
    pub fn for_device(name: &str) -> Self {
        let linear = if name == "cuda" { [4096, 8192, 8192] } else { [256, 4096, 4096] };
        Self { elements: 64 << 20, linear }
    }
}

/// Timed rows, and those left.
#[derive(Debug)]
pub struct Timed {
    /// In the order of the table.
    pub rows: Vec<KernelRow>,
    /// Failed, or after the time was up.
    pub left: Vec<Left>,
}

/// Measures the ceilings.
pub fn ceilings(
    backend: &dyn Backend,
    sizes: &CeilingSizes,
    options: &SuiteOptions,
    progress: &dyn Fn(&str),
) -> Result<Ceilings> {
    let [tokens, out, cols] = sizes.linear;
    let rate = |kernel: Kernel, amount: u64| -> Result<f64> {
        progress(&format!("ceiling: {} {}", kernel.op(), kernel.shape()));
        let mut weights = Weights::default();
        let times = Work::new(backend, &mut weights, &kernel, options)?.time(kernel.op(), options)?;
        Ok(amount as f64 * 1e9 / stats::median(&times.samples_ns)?)
    };
    let (copy, add) = (Kernel::Copy { n: sizes.elements }, Kernel::Add { n: sizes.elements });
    let linear = Kernel::Linear { format: Format::Bf16, out, cols, tokens };
    let copy_bytes_per_second = rate(copy, copy.bytes())?;
    let add_bytes_per_second = rate(add, add.bytes())?;
    Ok(Ceilings {
        copy_bytes_per_second,
        add_bytes_per_second,
        bytes_per_second: copy_bytes_per_second.max(add_bytes_per_second),
        flops_per_second: rate(linear, linear.flops())?,
        linear_shape: sizes.linear,
    })
}

/// Times `rows`. One that fails is recorded and the next is tried; none starts once `options.limit` has passed since
/// `start`.
pub fn run(
    backend: &dyn Backend,
    rows: &[Row],
    ceilings: &Ceilings,
    options: &SuiteOptions,
    start: Instant,
    progress: &dyn Fn(&str),
) -> Result<Timed> {
    if options.repetitions == 0 {
        return Err(BenchError::Zero("the number of repetitions"));
    }
    let mut timed = Timed { rows: Vec::new(), left: Vec::new() };
    let mut weights = Weights::default();
    for row in rows {
        let name = row.name();
        if options.limit.is_some_and(|l| start.elapsed() >= l) {
            timed.left.push(Left { row: name, reason: "the time was up".into(), failed: false });
            continue;
        }
        progress(&name);
        let times = Work::new(backend, &mut weights, &row.kernel, options).and_then(|mut w| w.time(&name, options));
        match times.and_then(|t| finish(row, t, ceilings)) {
            Ok(r) => timed.rows.push(r),
            Err(e) => timed.left.push(Left { row: name, reason: e.to_string(), failed: true }),
        }
    }
    Ok(timed)
}

fn finish(row: &Row, times: Times, ceilings: &Ceilings) -> Result<KernelRow> {
    let median_ns = stats::median(&times.samples_ns)?;
    let (bytes, flops) = (row.kernel.bytes(), row.kernel.flops());
    let bytes_per_second = bytes as f64 * 1e9 / median_ns;
    let flops_per_second = flops as f64 * 1e9 / median_ns;
    let bandwidth_frac = bytes_per_second / ceilings.bytes_per_second;
    let flops_frac = flops_per_second / ceilings.flops_per_second;
    Ok(KernelRow {
        model: row.model.into(),
        layers: row.layers.into(),
        op: row.kernel.op().into(),
        format: row.kernel.format(),
        shape: row.kernel.shape(),
        tokens: row.kernel.tokens(),
        bytes,
        flops,
        copies: times.copies,
        calls: times.calls,
        samples_ns: times.samples_ns,
        median_ns,
        bytes_per_second,
        flops_per_second,
        bandwidth_frac,
        flops_frac,
        ceiling_frac: bandwidth_frac.max(flops_frac),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use lowbit_kernels::cpu::ScalarBackend;
    use lowbit_kernels::cuda::{Device, GpuBackend};

    use super::*;

    fn quick() -> SuiteOptions {
        SuiteOptions { repetitions: 3, sample: Duration::from_micros(50), calls: 5, cold_bytes: 4096, limit: None }
    }

    fn small() -> Vec<Row> {
        let linear = |format, tokens| Kernel::Linear { format, out: 16, cols: 128, tokens };
        let attention =
            Kernel::AttentionDecode { batch: 2, context: 3, heads: 2, kv_heads: 1, head_dim: 8, element: 4 };
        let mut kernels = Format::ALL.map(|f| linear(f, 2)).to_vec();
        kernels.extend([Kernel::RmsNorm { tokens: 2, width: 8 }, attention, Kernel::Hessian { tokens: 2, n: 5 }]);
        kernels.into_iter().map(|kernel| Row { model: "m", layers: "l", kernel }).collect()
    }

    #[test]
    fn every_kind_of_row_is_timed() {
        let (b, sizes) = (ScalarBackend::new(), CeilingSizes { elements: 1000, linear: [2, 16, 16] });
        let c = ceilings(&b, &sizes, &quick(), &|_| ()).unwrap();
        assert_eq!(c.bytes_per_second, c.copy_bytes_per_second.max(c.add_bytes_per_second));
        let timed = run(&b, &small(), &c, &quick(), Instant::now(), &|_| ()).unwrap();
        assert_eq!((timed.rows.len(), timed.left.len()), (8, 0), "{:?}", timed.left);
        for r in &timed.rows {
            assert_eq!(r.samples_ns.len(), 3, "{}", r.op);
            assert!((1..=5).contains(&r.calls) && r.median_ns > 0.0, "{}", r.op);
            assert!((r.bytes_per_second * r.median_ns / 1e9 - r.bytes as f64).abs() < 1e-3 * r.bytes as f64);
            assert_eq!(r.ceiling_frac, r.bandwidth_frac.max(r.flops_frac));
        }
        // 4096 bytes of bf16 are there already; 2080 of w8 take two; 1056 of w4 take four.
        assert_eq!(timed.rows.iter().take(3).map(|r| r.copies).collect::<Vec<_>>(), [1, 2, 4]);
    }

    #[test]
    fn a_device_without_a_solver_says_so() {
        let b = ScalarBackend::new();
        let sizes = CeilingSizes { elements: 1000, linear: [2, 16, 16] };
        let c = ceilings(&b, &sizes, &quick(), &|_| ()).unwrap();
        let rows = [Kernel::Factor { n: 70 }, Kernel::Gptq { out: 3, n: 256 }].map(|kernel| Row {
            model: "m",
            layers: "l",
            kernel,
        });
        let timed = run(&b, &rows, &c, &quick(), Instant::now(), &|_| ()).unwrap();
        assert!(timed.left.len() == 2 && timed.left.iter().all(|l| l.failed), "{:?}", timed.left);
        let device = GpuBackend::new(Arc::new(Device::emulated(1).unwrap()));
        let timed = run(&device, &rows, &c, &quick(), Instant::now(), &|_| ()).unwrap();
        assert_eq!((timed.rows.len(), timed.left.len()), (2, 0), "{:?}", timed.left);
    }

    #[test]
    fn a_row_that_fails_and_rows_out_of_time_are_named() {
        let b = ScalarBackend::new();
        let c = Ceilings {
            copy_bytes_per_second: 1.0,
            add_bytes_per_second: 1.0,
            bytes_per_second: 1.0,
            flops_per_second: 1.0,
            linear_shape: [1; 3],
        };
        // Three query heads cannot share two key heads.
        let broken = Kernel::AttentionDecode { batch: 1, context: 2, heads: 3, kv_heads: 2, head_dim: 4, element: 4 };
        let mut rows = small();
        rows.insert(0, Row { model: "m", layers: "broken", kernel: broken });
        let timed = run(&b, &rows, &c, &quick(), Instant::now(), &|_| ()).unwrap();
        assert_eq!((timed.rows.len(), timed.left.len()), (8, 1));
        assert!(timed.left[0].failed && timed.left[0].row.contains("broken"), "{:?}", timed.left);
        let none = SuiteOptions { limit: Some(Duration::ZERO), ..quick() };
        let timed = run(&b, &rows, &c, &none, Instant::now(), &|_| ()).unwrap();
        assert_eq!((timed.rows.len(), timed.left.len()), (0, 9));
        assert!(timed.left.iter().all(|l| !l.failed));
        let never = SuiteOptions { repetitions: 0, ..quick() };
        assert!(run(&b, &rows, &c, &never, Instant::now(), &|_| ()).is_err());
    }
}
