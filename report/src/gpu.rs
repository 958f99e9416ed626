//! The record of `bench/gpu-suite`, and the tables of `docs/gpu.md` made from it.

use std::io::ErrorKind;
use std::path::Path;

use lowbit_bench::record::{BenchRecord, SpeedUp};
use lowbit_bench::suite::{Format, KernelRow, SuiteRecord};
use lowbit_eval::record::EvalRecord;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ReportError;
use crate::format::{self as f, NONE, count, factor, percent, sig};
use crate::load::read;
use crate::table::{Cell, Table, code, escape};

/// One stage of the script.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// What was done.
    pub name: String,
    /// Exit status; 124 where the time was up; none where it was skipped.
    pub status: Option<i32>,
    /// How long it took.
    pub seconds: f64,
    /// Why it was skipped, or the last line of what failed.
    pub note: String,
}

/// A product timed in torch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TorchRow {
    /// `outxin`, as in the suite's rows.
    pub shape: String,
    /// Tokens.
    pub tokens: usize,
    /// Weight format: `bf16`.
    pub format: String,
    /// Nanoseconds a call.
    pub median_ns: f64,
}

/// Format of the record that is written and read.
pub const SCHEMA: u32 = 1;

/// Everything one call of the script left.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GpuRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// `2026-01-31`.
    pub date: String,
    /// Product name.
    pub gpu: String,
    /// What `nvidia-smi` said: driver, memory, clocks, power limit.
    pub nvidia_smi: String,
    /// Stages in their order.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// The op table.
    #[serde(default)]
    pub correctness: Option<SuiteRecord>,
    /// The timed rows.
    #[serde(default)]
    pub kernels: Option<SuiteRecord>,
    /// `eval.json` of the demo, quantized and evaluated on the device.
    #[serde(default)]
    pub eval_device: Option<EvalRecord>,
    /// The same on the CPU.
    #[serde(default)]
    pub eval_cpu: Option<EvalRecord>,
    /// `lowbit bench demo` on the device.
    #[serde(default)]
    pub bench: Option<BenchRecord>,
    /// `lowbit bench --synthetic` on the device, one record a call.
    #[serde(default)]
    pub synthetic: Vec<BenchRecord>,
    /// Version of torch and its rows, where it was there.
    #[serde(default)]
    pub torch_version: String,
    /// Timed products.
    #[serde(default)]
    pub torch: Vec<TorchRow>,
}

impl GpuRecord {
    /// Reads a record of the script, or one of `lowbit suite` alone.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let value: serde_json::Value = there(path)?;
        if value.get("stages").is_some() {
            return there(path);
        }
        let suite: SuiteRecord = there(path)?;
        let gpu = suite.provenance.gpu.clone().unwrap_or_else(|| suite.provenance.device.clone());
        let date = f::utc(suite.provenance.unix_time).chars().take(10).collect();
        let (correctness, kernels) = (Some(suite.clone()), Some(suite));
        Ok(Self { schema: SCHEMA, date, gpu, correctness, kernels, ..Self::default() })
    }
}

fn there<T: DeserializeOwned>(path: &Path) -> Result<T, ReportError> {
    let missing = || ReportError::Io { path: path.to_owned(), source: ErrorKind::NotFound.into() };
    read(path.to_owned())?.ok_or_else(missing)
}

/// The tables, without a title.
pub fn markdown(r: &GpuRecord) -> String {
    let mut out = format!("Measured on {}, {}", escape(&r.gpu), escape(&r.date));
    if let Some(p) = r.kernels.as_ref().or(r.correctness.as_ref()).map(|s| &s.provenance) {
        out += &format!(", {}", escape(&p.tool));
        if let Some(c) = &p.commit {
            out += &format!(" ({})", escape(&f::short_hash(c)));
        }
    }
    out += ".\n";
    if !r.nvidia_smi.is_empty() {
        out += &format!("nvidia-smi: {}.\n", escape(&r.nvidia_smi));
    }
    stages(r, &mut out);
    correctness(r, &mut out);
    if let Some(k) = &r.kernels {
        kernels(r, k, &mut out);
    }
    if let Some(b) = &r.bench {
        out += "\n### Demo model\n\n";
        let mut t = Table::new("", &["Test", "#Batch", "#Tokens/s"]);
        for row in &b.rows {
            t.row(vec![row.test.as_str().into(), count(row.batch as u64).into(), sig(row.tokens_per_second, 3).into()]);
        }
        out += &t.markdown();
    }
    r.synthetic.iter().for_each(|b| synthetic(b, &mut out));
    out
}

/// Rates of models of known shapes with random weights, and their ratios to the first format.
fn synthetic(b: &BenchRecord, out: &mut String) {
    let Some(first) = b.rows.first() else { return };
    let shape = first.model.split(' ').next().unwrap_or_default();
    *out += &format!("\n### {}, random weights\n\n", escape(shape));
    let columns = ["Model", "Test", "#Batch", "#Tokens/s", "#× first", "#Of bandwidth", "#Of large linear"];
    let mut t = Table::new("", &columns);
    let share = |v: Option<f64>| v.map_or(NONE.to_string(), |v| percent(v, 0));
    for row in &b.rows {
        let of_row = |s: &&SpeedUp| s.model == row.model && s.test == row.test && s.batch == row.batch;
        let ratio = b.speed_ups.iter().find(of_row).map_or(NONE.to_string(), |s| factor(s.ratio));
        t.row(vec![
            row.model.as_str().into(),
            row.test.as_str().into(),
            count(row.batch as u64).into(),
            sig(row.tokens_per_second, 4).into(),
            ratio.into(),
            share(row.roofline_frac).into(),
            share(row.flops_frac).into(),
        ]);
    }
    *out += &t.markdown();
    for l in &b.left {
        *out += &format!("\nNot measured: {}: {}.\n", escape(&l.row), escape(&l.reason));
    }
}

fn stages(r: &GpuRecord, out: &mut String) {
    if r.stages.is_empty() {
        return;
    }
    let mut t = Table::new("", &["Stage", "Result", "#Time", "Note"]);
    for s in &r.stages {
        let result = match s.status {
            None => "skipped".to_string(),
            Some(0) => "ok".to_string(),
            Some(124) => "the time was up".to_string(),
            Some(n) => format!("failed ({n})"),
        };
        t.row(vec![s.name.as_str().into(), result.into(), f::seconds(s.seconds).into(), s.note.as_str().into()]);
    }
    *out += &format!("\n### Stages\n\n{}", t.markdown());
}

fn correctness(r: &GpuRecord, out: &mut String) {
    let perplexity = |e: &Option<EvalRecord>| Some(e.as_ref()?.perplexities.first()?.perplexity.value);
    let parity = perplexity(&r.eval_device).zip(perplexity(&r.eval_cpu));
    let rows = r.correctness.as_ref().map_or(&[][..], |s| &s.correctness);
    if rows.is_empty() && parity.is_none() {
        return;
    }
    *out += "\n### Correctness\n\n";
    if !rows.is_empty() {
        let passed = rows.iter().filter(|r| r.passed).count();
        *out += &format!("{passed} of {} operations agree with the scalar reference.\n", rows.len());
        let mut t = Table::new("", &["Operation", "Case", "#Error", "#Tolerance"]);
        for row in rows.iter().filter(|r| !r.passed) {
            let error = row.error.map_or_else(|| row.problem.clone().unwrap_or_default(), |e| sig(e, 3));
            t.row(vec![row.op.as_str().into(), row.case.as_str().into(), error.into(), sig(row.tolerance, 3).into()]);
        }
        if passed < rows.len() {
            *out += &format!("\n{}", t.markdown());
        }
    }
    if let Some((device, cpu)) = parity {
        let off = percent(device / cpu - 1.0, 2);
        *out += &format!(
            "The demo, quantized and evaluated on the device: perplexity {} against {} on the CPU ({off}).\n",
            sig(device, 6),
            sig(cpu, 6)
        );
    }
}

fn kernels(r: &GpuRecord, s: &SuiteRecord, out: &mut String) {
    if let Some(c) = &s.ceilings {
        let [tokens, rows, cols] = c.linear_shape;
        *out += &format!(
            "\n### Ceilings of this run\n\nCopy {}, addition {}; our bf16 linear of {tokens} tokens by {rows}x{cols} {}.\n",
            bandwidth(c.copy_bytes_per_second),
            bandwidth(c.add_bytes_per_second),
            flops(c.flops_per_second)
        );
    }
    linears(r, &s.kernels, out);
    let mut t =
        Table::new("", &["Operation", "Model", "Shape", "#Tokens", "#Time", "#Bandwidth", "#Flops", "#Of ceiling"]);
    let others: Vec<_> = s.kernels.iter().filter(|r| r.format.is_none()).collect();
    for row in &others {
        t.row(vec![
            code(row.op.clone(), ""),
            row.model.as_str().into(),
            row.shape.as_str().into(),
            count(row.tokens as u64).into(),
            micros(row.median_ns).into(),
            bandwidth(row.bytes_per_second).into(),
            flops(row.flops_per_second).into(),
            percent(row.ceiling_frac, 3).into(),
        ]);
    }
    if !others.is_empty() {
        *out += &format!("\n### Other operations\n\n{}", t.markdown());
    }
    if !s.left.is_empty() {
        let failed = s.left.iter().filter(|l| l.failed).count();
        *out += &format!("\n{} rows were not timed: {failed} failed, the rest ran out of time.\n", s.left.len());
        for l in s.left.iter().filter(|l| l.failed) {
            *out += &format!("- {}: {}\n", escape(&l.row), escape(&l.reason));
        }
    }
}

/// A line for each weight and format, a column for each number of tokens.
fn linears(r: &GpuRecord, rows: &[KernelRow], out: &mut String) {
    let linears: Vec<_> = rows.iter().filter_map(|r| Some((r, r.format?))).collect();
    let mut tokens: Vec<usize> = linears.iter().map(|l| l.0.tokens).collect();
    tokens.sort_unstable();
    tokens.dedup();
    if tokens.is_empty() {
        return;
    }
    let mut heads = vec!["Model".to_string(), "Layers".into(), "Shape".into(), "Weights".into()];
    heads.extend(tokens.iter().map(|t| format!("#{t}")));
    let mut table = Table::new("", &heads.iter().map(String::as_str).collect::<Vec<_>>());
    let mut done: Vec<(&str, &str, Format)> = Vec::new();
    for &(row, format) in &linears {
        let key = (row.model.as_str(), row.layers.as_str(), format);
        if done.contains(&key) {
            continue;
        }
        let find = |format: Format, t: usize| {
            let same = |r: &KernelRow| r.model == row.model && r.layers == row.layers && r.tokens == t;
            linears.iter().find(|(r, f)| *f == format && same(r)).map(|l| l.0)
        };
        let lead = |weights: &str| -> Vec<Cell> {
            vec![row.model.as_str().into(), row.layers.as_str().into(), row.shape.as_str().into(), weights.into()]
        };
        let torch =
            |t: usize| r.torch.iter().find(|p| p.shape == row.shape && p.tokens == t && p.format == format.name());
        if tokens.iter().any(|t| torch(*t).is_some()) {
            let mut cells = lead(&format!("{}, torch", format.name()));
            cells.extend(tokens.iter().map(|t| Cell::from(torch(*t).map_or(NONE.into(), |p| micros(p.median_ns)))));
            table.row(cells);
        }
        let mut cells = lead(format.name());
        cells.extend(
            tokens.iter().map(|&t| Cell::from(find(format, t).map_or(NONE.into(), |r| cell(r, find(Format::Bf16, t))))),
        );
        table.row(cells);
        done.push(key);
    }
    *out += &format!("\n### Linears by tokens\n\n{}", table.markdown());
    *out += "\nTime of a call; share of the nearer ceiling of this run; speed-up over our bf16 at the same tokens.\n";
    if !r.torch_version.is_empty() {
        *out += &format!("torch {}: bf16 activations and results, where ours are f32.\n", escape(&r.torch_version));
    }
}

fn cell(row: &KernelRow, bf16: Option<&KernelRow>) -> String {
    let time = format!("{} · {}", micros(row.median_ns), percent(row.ceiling_frac, 2));
    match bf16.filter(|_| row.format != Some(Format::Bf16)) {
        Some(b) => format!("{time} · {}", factor(b.median_ns / row.median_ns)),
        None => time,
    }
}

fn micros(ns: f64) -> String {
    format!("{} µs", sig(ns / 1e3, 3))
}

fn bandwidth(bytes_per_second: f64) -> String {
    format!("{} GB/s", sig(bytes_per_second / 1e9, 3))
}

fn flops(per_second: f64) -> String {
    format!("{} TFLOP/s", sig(per_second / 1e12, 3))
}

#[cfg(test)]
mod tests {
    use lowbit_bench::record::BenchRow;
    use lowbit_bench::suite::{Ceilings, CorrectnessRow, Left};

    use super::*;

    fn row(format: Option<Format>, tokens: usize, median_ns: f64) -> KernelRow {
        KernelRow {
            model: "m".into(),
            layers: "q, o".into(),
            op: if format.is_some() { "linear".into() } else { "rms_norm".into() },
            format,
            shape: "8x4".into(),
            tokens,
            bytes: 1000,
            flops: 10,
            copies: 1,
            calls: 1,
            samples_ns: vec![median_ns],
            median_ns,
            bytes_per_second: 1e12 / median_ns,
            flops_per_second: 1e10 / median_ns,
            bandwidth_frac: 0.5,
            flops_frac: 0.1,
            ceiling_frac: 0.5,
        }
    }

    fn record() -> GpuRecord {
        let wrong = |passed, error, problem: Option<&str>| CorrectnessRow {
            op: "linear".into(),
            case: "w4".into(),
            error,
            tolerance: 0.5,
            passed,
            problem: problem.map(str::to_string),
        };
        let suite = SuiteRecord {
            schema: 1,
            provenance: Default::default(),
            correctness: vec![wrong(true, Some(0.0), None), wrong(false, None, Some("no such kernel"))],
            ceilings: Some(Ceilings {
                copy_bytes_per_second: 2e12,
                add_bytes_per_second: 1e12,
                bytes_per_second: 2e12,
                flops_per_second: 1e14,
                linear_shape: [1, 2, 3],
            }),
            kernels: vec![
                row(Some(Format::Bf16), 1, 3000.0),
                row(Some(Format::Bf16), 16, 4000.0),
                row(Some(Format::W4a16), 1, 1000.0),
                row(None, 1, 5000.0),
            ],
            left: vec![Left { row: "last".into(), reason: "out of memory".into(), failed: true }],
            seconds: 1.0,
        };
        let stage = |name: &str, status| Stage { name: name.into(), status, seconds: 1.0, note: String::new() };
        GpuRecord {
            schema: 1,
            gpu: "H100".into(),
            stages: vec![stage("memcheck", None), stage("kernels", Some(124))],
            correctness: Some(suite.clone()),
            kernels: Some(suite),
            synthetic: vec![synthetic()],
            torch: [("bf16", 2000.0), ("w4a16-g128", 500.0)]
                .map(|(format, median_ns)| TorchRow {
                    shape: "8x4".into(),
                    tokens: 16,
                    format: format.into(),
                    median_ns,
                })
                .to_vec(),
            ..GpuRecord::default()
        }
    }

    /// Two formats of one shape, decode only.
    fn synthetic() -> BenchRecord {
        let row = |model: &str, tokens_per_second| BenchRow {
            role: "candidate".into(),
            model: model.into(),
            test: "tg32 @ d1024".into(),
            batch: 16,
            tokens_per_second,
            samples: vec![tokens_per_second],
            samples_ns: vec![1],
            bytes_per_step: 1,
            roofline_frac: Some(0.5),
            flops: None,
            flops_frac: None,
        };
        let (model, test) = ("shape w4a16-g128".to_string(), "tg32 @ d1024".to_string());
        BenchRecord {
            schema: 1,
            provenance: Default::default(),
            bandwidth_bytes_per_second: 1e12,
            ceilings: None,
            rows: vec![row("shape bf16", 100.0), row("shape w4a16-g128", 250.0)],
            speed_ups: vec![SpeedUp { model, test, batch: 16, ratio: 2.5, low: 2.4, high: 2.6 }],
            latency: Vec::new(),
            memory: Vec::new(),
            rounding: None,
            left: vec![Left { row: "shape f32".into(), reason: "does not fit".into(), failed: false }],
        }
    }

    #[test]
    fn the_tables_hold_what_was_measured() {
        let text = markdown(&record());
        for wanted in [
            "| memcheck | skipped |",
            "| kernels | the time was up |",
            "1 of 2 operations agree",
            "no such kernel",
            "| Model | Layers | Shape | Weights | 1 | 16 |",
            "| bf16, torch | – | 2.00 µs |",
            "| w4a16-g128, torch | – |",
            "| bf16 | 3.00 µs · 50 % | 4.00 µs · 50 % |",
            "| w4a16-g128 | 1.00 µs · 50 % · 3.00× | – |",
            "- last: out of memory",
            "### shape, random weights",
            "| shape bf16 | tg32 \\@ d1024 | 16 | 100.0 | – | 50 % | – |",
            "| shape w4a16-g128 | tg32 \\@ d1024 | 16 | 250.0 | 2.50× | 50 % | – |",
            "Not measured: shape f32: does not fit.",
        ] {
            assert!(text.contains(wanted), "no `{wanted}` in:\n{text}");
        }
    }

    #[test]
    fn a_record_of_the_suite_alone_is_read_too() {
        let tmp = tempfile::tempdir().unwrap();
        let (whole, alone) = (tmp.path().join("whole.json"), tmp.path().join("alone.json"));
        let r = record();
        std::fs::write(&whole, serde_json::to_vec(&r).unwrap()).unwrap();
        std::fs::write(&alone, serde_json::to_vec(&r.kernels).unwrap()).unwrap();
        assert_eq!(GpuRecord::read(&whole).unwrap().stages.len(), 2);
        let read = GpuRecord::read(&alone).unwrap();
        assert_eq!((read.stages.len(), read.kernels.unwrap().kernels.len()), (0, 4));
        std::fs::write(&alone, "{}").unwrap();
        assert!(GpuRecord::read(&alone).unwrap_err().to_string().contains("alone.json"));
    }
}
