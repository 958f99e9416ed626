//! Models of known shapes with random weights, one resident at a time: what a card does with a model of that size.
//!
//! Formats are measured one after the other, so the machine's drift between two is in their ratio; on a card at steady
//! clocks it is small, and repetitions show it.

use std::sync::Arc;

use lowbit_kernels::backend::Backend;
use lowbit_kernels::random::RandomFormat;
use lowbit_model::Model;
use lowbit_model::synthetic::{Synthetic, format_name};

use crate::error::Result;
use crate::rates::{self, Test};
use crate::record::BenchRow;
use crate::suite::Left;
use crate::{BenchOptions, BenchOutput, Contender, Limits, memory};

/// Which models.
#[derive(Clone, Debug)]
pub struct SyntheticOptions {
    /// One of [`lowbit_model::synthetic::SHAPES`].
    pub shape: String,
    /// Formats of the blocks' linears; the first is the reference.
    pub formats: Vec<RandomFormat>,
    /// Format of the head.
    pub head: RandomFormat,
}

impl SyntheticOptions {
    /// `llama-3.1-8b w4a16-g128, head bf16`.
    pub fn model_name(&self, format: RandomFormat) -> String {
        format!("{} {}, head {}", self.shape, format_name(format), format_name(self.head))
    }
}

/// Measures every format. A model or test that fails is in `left`, and the next is tried.
pub fn run(
    backend: &Arc<dyn Backend>,
    wanted: &SyntheticOptions,
    options: &BenchOptions,
    limits: &Limits,
    progress: &dyn Fn(&str),
) -> Result<BenchOutput> {
    options.check(wanted.formats.len() > 1)?;
    limits.check()?;
    let mut out = BenchOutput { rows: vec![], speed_ups: vec![], latency: vec![], memory: vec![], left: Vec::new() };
    for (i, &format) in wanted.formats.iter().enumerate() {
        let name = wanted.model_name(format);
        progress(&format!("making {name}"));
        let source = Synthetic::new(&wanted.shape, format, wanted.head, options.seed as u32)?;
        let model = match Model::load(&source, backend.clone()) {
            Ok(model) => model,
            Err(e) => {
                out.left.push(Left { row: name, reason: e.to_string(), failed: true });
                continue;
            }
        };
        let role = if i == 0 { "reference" } else { "candidate" };
        let contender = [Contender { role, name: &name, model: &model }];
        for test in Test::all(options) {
            match rates::measure_test(&contender, test, options, limits, progress) {
                Ok(rows) => out.rows.extend(rows),
                Err(e) => {
                    let row = format!("{name}: {} batch {}", test.name(), test.batch());
                    out.left.push(Left { row, reason: e.to_string(), failed: true });
                }
            }
        }
        out.memory.extend(memory::rows(&contender, options.kv_tokens())?);
    }
    let (references, candidates): (Vec<&BenchRow>, Vec<_>) = out.rows.iter().partition(|r| r.role == "reference");
    for row in candidates {
        if let Some(reference) = references.iter().find(|r| (&r.test, r.batch) == (&row.test, row.batch)) {
            out.speed_ups.push(rates::speed_up(row, reference, options.seed)?);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::cpu::CpuBackend;
    use lowbit_model::synthetic::parse_format;

    use super::*;

    #[test]
    fn every_format_and_batch_has_a_row_and_a_ratio() {
        let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new());
        let format = |name| parse_format(name).unwrap();
        let wanted = SyntheticOptions {
            shape: "tiny".to_string(),
            formats: vec![format("bf16"), format("w4a16-g100"), format("w4a16-g64")],
            head: format("w8a16-channel"),
        };
        let options = BenchOptions {
            prompt: 5,
            generate: 2,
            depth: 7,
            batches: vec![1, 3],
            repetitions: 2,
            latency_output: 0,
            ..BenchOptions::default()
        };
        let limits = Limits { bytes_per_second: 1e9, flops_per_second: Some(1e9) };
        let out = run(&backend, &wanted, &options, &limits, &|_| ()).unwrap();
        // Groups of 100 do not divide 128 columns.
        assert_eq!(out.left.len(), 1);
        assert!(out.left[0].row.contains("w4a16-g100"), "{:?}", out.left);
        let tests: Vec<_> = out.rows.iter().map(|r| (r.role.as_str(), r.test.as_str(), r.batch)).collect();
        let of = |role| [(role, "pp5", 1), (role, "tg2 @ d7", 1), (role, "tg2 @ d7", 3)];
        assert_eq!(tests, [of("reference"), of("candidate")].concat());
        assert_eq!(out.speed_ups.len(), 3);
        // Two layers: q and o 128x128, k and v 64x128, three of 256x128; the head 512x128 with a scale a row.
        let blocks = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128);
        let kv = |batch: u64| 2 * 2 * 64 * 4 * batch * (2 * 7 + 3) / 2;
        assert_eq!(out.rows[1].bytes_per_step, blocks * 2 + 512 * 128 + 512 * 2 + kv(1));
        assert_eq!(out.rows[5].bytes_per_step, blocks / 2 + blocks / 64 * 2 + 512 * 128 + 512 * 2 + kv(3));
        let flops = 2 * (blocks * 5 + 512 * 128 + 2 * 15 * 2 * 128);
        assert_eq!((out.rows[0].flops, out.rows[0].roofline_frac), (Some(flops), None));
        assert!(out.rows[0].flops_frac.unwrap() > 0.0 && out.rows[1].flops_frac.is_none());
    }
}
