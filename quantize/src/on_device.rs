//! A group of linears solved by a device that has solvers of its own ([`lowbit_kernels::solver`]).
//!
//! Integers only; other grids, targets corrected for drift and sweeps stay on the host, which gets the factor for them.

use lowbit_calibration::InputStats;
use lowbit_kernels::QuantizedMatrix;
use lowbit_kernels::backend::{Backend, Buffer};
use lowbit_kernels::error::check_len;
use lowbit_kernels::solver::{DampedHessian, GptqResult, GptqTask, Solver};

use crate::factor::{Factor, SolveError, factorize_with};
use crate::loss::Loss;
use crate::scale_search::{ScaleSearch, SolverOptions, check_finite, first_percent};

/// What a device holds while the linears of a group are solved: two matrices `[n, n]` of f32.
pub(crate) struct OnDevice<'a> {
    solver: &'a dyn Solver,
    /// The Hessian, upper triangle.
    h: Buffer,
    /// The factor in solving order.
    u: Buffer,
}

impl<'a> OnDevice<'a> {
    /// Factorizes: the first attempt on the device, unless it leaves that to the host.
    pub(crate) fn new(
        backend: &dyn Backend,
        solver: &'a dyn Solver,
        stats: &InputStats,
        opts: &SolverOptions,
    ) -> Result<(Factor, Self), SolveError> {
        let n = stats.n;
        let h = backend.upload(&stats.hessian)?;
        let mut made = None;
        let factor = factorize_with(&stats.hessian, n, opts, |first| {
            let hessian = DampedHessian { h: &h, n, perm: first.perm, diag: first.diag, damped: &first.damped };
            Ok(match solver.factor(&hessian)? {
                None => None,
                Some(Err(position)) => Some(Err(position)),
                Some(Ok(u)) => {
                    let values = backend.download(&u)?;
                    made = Some(u);
                    Some(Ok(values))
                }
            })
        })?;
        let u = match made {
            Some(u) => u,
            None => backend.upload(&factor.u)?,
        };
        Ok((factor, Self { solver, h, u }))
    }

    /// With a factor that another device, or the host, has made.
    pub(crate) fn from_factor(
        backend: &dyn Backend,
        solver: &'a dyn Solver,
        stats: &InputStats,
        factor: &Factor,
    ) -> Result<Self, SolveError> {
        Ok(Self { solver, h: backend.upload(&stats.hessian)?, u: backend.upload(&factor.u)? })
    }

    /// As [`crate::gptq::gptq_codes`].
    pub(crate) fn codes(
        &self,
        w: &[f32],
        out: usize,
        n: usize,
        factor: &Factor,
        opts: &SolverOptions,
    ) -> Result<QuantizedMatrix, SolveError> {
        opts.check()?;
        check_len("factor", n, factor.n)?;
        check_len("weight", out * n, w.len())?;
        check_finite("weight", w)?;
        let task = GptqTask {
            w,
            out_features: out,
            n,
            u: &self.u,
            perm: &factor.perm,
            diag: &factor.diag,
            scheme: opts.scheme,
            scale_type: opts.scale_type,
            first_percent: (opts.scale_search == ScaleSearch::Hessian).then(|| first_percent(opts.scheme.bits)),
            signed_scales: opts.signed_scales,
            min_zero: opts.min_zero,
            block: opts.block,
        };
        let GptqResult { codes, scales, zeros } = self.solver.gptq(&task)?;
        let groups = opts.scheme.groups(n)?;
        if let Some(i) = scales.iter().position(|s| !s.is_finite()) {
            return Err(SolveError::ScaleOverflow { row: i / groups, group: i % groups, value: scales[i] });
        }
        let (scheme, group_index) = (opts.scheme, None);
        Ok(QuantizedMatrix { scheme, out_features: out, in_features: n, codes, scales, zeros, group_index })
    }

    /// As [`crate::loss::proxy_loss`]; `None` where the device leaves it to the host.
    pub(crate) fn loss(&self, w: &[f32], q: &[f32], out: usize, n: usize) -> Result<Option<Loss>, SolveError> {
        let sums = self.solver.loss(w, q, &self.h, out, n)?;
        Ok(sums.map(|(proxy, reference)| Loss { proxy, reference }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lowbit_kernels::cuda::{Arithmetic, Device, EmulatorOptions, GpuBackend};
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::gptq::gptq_codes;
    use crate::loss::proxy_loss;
    use crate::solve::{Shared, solve_linear};

    fn device(arithmetic: Arithmetic) -> GpuBackend {
        GpuBackend::new(Arc::new(Device::emulated(2).unwrap())).with_arithmetic(arithmetic)
    }

    fn options(bits: u8, symmetric: bool, group: GroupSize, block: usize) -> SolverOptions {
        SolverOptions { block, ..SolverOptions::new(Scheme { bits, symmetric, group }, ScaleType::Bf16) }
    }

    /// Weights, and statistics of correlated inputs with uneven column norms and, where asked for, dead columns.
    fn problem(seed: u64, out: usize, n: usize, dead: &[usize]) -> (Vec<f32>, InputStats) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        let mut norms: Vec<f32> = (0..n).map(|_| rng.random_range(0.2f32..3.0)).collect();
        dead.iter().for_each(|c| norms[*c] = 0.0);
        let mut hessian = vec![0f32; n * n];
        for _ in 0..2 * n {
            let shared: f32 = rng.random_range(-1.0..1.0);
            let x: Vec<f32> = norms.iter().map(|s| s * (shared + rng.random_range(-1f32..1.0))).collect();
            for i in 0..n {
                for j in 0..n {
                    hessian[i * n + j] += x[i] * x[j] / n as f32;
                }
            }
        }
        (w, InputStats { n, hessian, drift: None, tokens: 2 * n as u64, abs_max: 6.0, blend: None })
    }

    #[test]
    fn one_factor_gives_the_hosts_codes_bit_for_bit() {
        let backend = device(Arithmetic::Reproducible);
        for (seed, (bits, symmetric, group, block, n)) in [
            (4, true, GroupSize::Cols(32), 128, 160),
            (4, false, GroupSize::Cols(40), 48, 200),
            (3, true, GroupSize::PerChannel, 128, 192),
            (2, false, GroupSize::Cols(64), 64, 64),
            (8, true, GroupSize::Cols(16), 128, 144),
        ]
        .into_iter()
        .enumerate()
        {
            let out = 70;
            let (w, stats) = problem(seed as u64, out, n, &[3, n - 1]);
            for (search, scale_type, signed) in [
                (ScaleSearch::Hessian, ScaleType::Bf16, true),
                (ScaleSearch::Hessian, ScaleType::F16, false),
                (ScaleSearch::MinMax, ScaleType::F32, true),
            ] {
                let opts = SolverOptions {
                    scale_search: search,
                    scale_type,
                    signed_scales: signed,
                    min_zero: u8::from(!symmetric),
                    ..options(bits, symmetric, group, block)
                };
                let factor = factorize(&stats.hessian, n, &opts).unwrap();
                let (own, solver) = OnDevice::new(&backend, &backend, &stats, &opts).unwrap();
                assert_eq!(own.u, factor.u, "the host's factor");
                let got = solver.codes(&w, out, n, &own, &opts).unwrap();
                let want = gptq_codes(&w, out, n, &factor, &opts).unwrap();
                assert_eq!(got, want, "{bits} bits, symmetric {symmetric}, {group:?}, {search:?}, {scale_type:?}");
                assert!(solver.loss(&w, &want.dequantize().unwrap(), out, n).unwrap().is_none());
            }
        }
    }

    #[test]
    fn the_devices_factor_is_the_hosts_to_rounding_and_so_are_codes_and_loss() {
        let backend = device(Arithmetic::Fast);
        // Less than a tile, a tile, and several with a part of one.
        for (seed, n) in [17, 64, 65, 200].into_iter().enumerate() {
            let out = 48;
            let dead: &[usize] = if n > 64 { &[5, 64] } else { &[] };
            let (w, stats) = problem(seed as u64, out, n, dead);
            let opts = options(4, true, GroupSize::PerChannel, 128);
            let host = factorize(&stats.hessian, n, &opts).unwrap();
            let (factor, solver) = OnDevice::new(&backend, &backend, &stats, &opts).unwrap();
            assert_eq!((&factor.perm, &factor.dead, factor.damp_frac), (&host.perm, &host.dead, host.damp_frac));
            assert!(factor.events.is_empty(), "{:?}", factor.events);
            let largest = host.u.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (i, (got, want)) in factor.u.iter().zip(&host.u).enumerate() {
                assert!((got - want).abs() <= 2e-4 * largest, "n={n} {},{}: {got} {want}", i / n, i % n);
                assert!(i % n >= i / n || *got == 0.0, "below the diagonal");
            }
            let got = solver.codes(&w, out, n, &factor, &opts).unwrap();
            let want = gptq_codes(&w, out, n, &host, &opts).unwrap();
            assert_eq!(got.scales, want.scales);
            let same = got.codes.iter().zip(&want.codes).filter(|(a, b)| a == b).count();
            assert!(same as f64 >= 0.99 * got.codes.len() as f64, "n={n}: {same} of {}", got.codes.len());
            let q = want.dequantize().unwrap();
            let (got, want) =
                (solver.loss(&w, &q, out, n).unwrap().unwrap(), proxy_loss(&w, &q, &stats.hessian, out, n));
            for (got, want) in [(got.proxy, want.proxy), (got.reference, want.reference)] {
                assert!((got - want).abs() <= 1e-4 * want, "n={n}: {got} {want}");
            }
        }
    }

    #[test]
    fn whole_linears_are_solved_on_the_device_as_on_the_host() {
        let (out, n) = (40, 96);
        let (w, stats) = problem(9, out, n, &[]);
        for sweeps in [0, 2] {
            let opts = SolverOptions { sweeps, ..options(4, true, GroupSize::Cols(32), 128) };
            let (host, loss) = solve_linear(&w, out, n, &Shared::new(&stats, &opts).unwrap(), &opts).unwrap();
            let exact = device(Arithmetic::Reproducible);
            let (same, same_loss) =
                solve_linear(&w, out, n, &Shared::on(&exact, &stats, &opts).unwrap(), &opts).unwrap();
            assert_eq!((same, same_loss), (host, loss));
            let fast = device(Arithmetic::Fast);
            let (_, near) = solve_linear(&w, out, n, &Shared::on(&fast, &stats, &opts).unwrap(), &opts).unwrap();
            assert!((near.proxy - loss.proxy).abs() <= 0.02 * loss.proxy, "{near:?} {loss:?}");
        }
    }

    #[test]
    fn what_a_device_cannot_factorize_the_host_retries_with_more_damping() {
        let n = 70;
        let mut hessian: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(i / n == i % n))).collect();
        (hessian[65 * n + 66], hessian[66 * n + 65]) = (1.05, 1.05);
        let stats = InputStats { n, hessian, drift: None, tokens: 9, abs_max: 1.0, blend: None };
        let opts = options(4, true, GroupSize::PerChannel, 128);
        let backend = device(Arithmetic::Fast);
        let (factor, _) = OnDevice::new(&backend, &backend, &stats, &opts).unwrap();
        let host = factorize(&stats.hessian, n, &opts).unwrap();
        assert!(!factor.events.is_empty());
        assert_eq!((&factor.events, factor.damp_frac, &factor.u), (&host.events, host.damp_frac, &host.u));
    }

    #[test]
    fn every_access_of_the_solvers_is_inside_their_memory_and_ordered() {
        let checked = EmulatorOptions { checked: true, seed: 3, ..EmulatorOptions::default() };
        let Ok(device) = Device::emulated_with(checked) else { return };
        let backend = GpuBackend::new(Arc::new(device));
        let (out, n) = (9, 130);
        let (w, stats) = problem(5, out, n, &[2]);
        let opts = options(4, false, GroupSize::Cols(26), 40);
        let shared = Shared::on(&backend, &stats, &opts).unwrap();
        let (q, loss) = solve_linear(&w, out, n, &shared, &opts).unwrap();
        q.validate().unwrap();
        assert!(loss.relative() < 0.1, "{loss:?}");
    }

    #[test]
    fn bad_weights_and_scales_are_refused_with_their_place() {
        let (out, n) = (3, 64);
        let (mut w, stats) = problem(2, out, n, &[]);
        let backend = device(Arithmetic::Fast);
        let opts = SolverOptions { scale_type: ScaleType::F16, ..options(4, true, GroupSize::Cols(32), 128) };
        let (factor, solver) = OnDevice::new(&backend, &backend, &stats, &opts).unwrap();
        w[n + 40] = 1e9;
        let e = solver.codes(&w, out, n, &factor, &opts).unwrap_err();
        assert!(matches!(e, SolveError::ScaleOverflow { row: 1, group: 1, .. }), "{e}");
        w[n + 40] = f32::NAN;
        let e = solver.codes(&w, out, n, &factor, &opts).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 104 }), "{e}");
    }
}
