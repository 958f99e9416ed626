//! Synthetic records of one small model.

use std::collections::BTreeMap;

use lowbit_bench::record::{BenchRecord, BenchRow, LatencyRow, MemoryRow, SpeedUp};
use lowbit_checkpoint::provenance::Provenance;
use lowbit_eval::record::{EvalRecord, Interval, KlRecord, PerplexityRecord};
use lowbit_quantize::record::{CalibrationRecord, ComponentSize, LayerRecord, PlanRecord, QuantizeRecord};
use lowbit_report::Records;
use serde_json::json as value;

fn provenance(command: &str, model: &str, hash: char) -> Provenance {
    Provenance {
        tool: "lowbit 0.1.0".into(),
        commit: Some("0123456789abcdef".into()),
        command: format!("lowbit {command} Qwen/Qwen2.5-0.5B --scheme w4a16-g128"),
        unix_time: 1_767_225_599,
        model: model.into(),
        model_sha256: hash.to_string().repeat(64),
        reference: (hash == 'b').then(|| "Qwen/Qwen2.5-0.5B".into()),
        reference_sha256: (hash == 'b').then(|| "a".repeat(64)),
        device: "cpu-avx2".into(),
        cpu: "AMD EPYC 7B13".into(),
        kernels: None,
        gpu: None,
        threads: 2,
        dtype: "f32".into(),
        seed: 7,
        options: BTreeMap::from([("group_size".into(), value!(128)), ("scheme".into(), value!("w4a16-g128"))]),
    }
}

fn size(component: &str, before: u64, after: u64) -> ComponentSize {
    ComponentSize { component: component.into(), before_bytes: before, after_bytes: after }
}

fn interval(value: f64, by: f64) -> Interval {
    Interval { value, low: value - by, high: value + by }
}

pub fn quantize() -> QuantizeRecord {
    let kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let mut layers = Vec::new();
    for block in 0..24 {
        for (k, kind) in kinds.iter().enumerate() {
            let part = if k < 4 { "self_attn" } else { "mlp" };
            let wave = 1.0 + 0.5 * ((block * 7 + k * 3) as f64).sin();
            layers.push(LayerRecord {
                name: format!("model.layers.{block}.{part}.{kind}"),
                block: Some(block),
                out_features: 896,
                in_features: if k == 6 { 4864 } else { 896 },
                scheme: "w4a16-g128-asym".into(),
                method: "gptq".into(),
                proxy_loss: 0.3 * wave,
                relative_error: [0.0012, 0.0009, 0.004, 0.011, 0.006, 0.007, 0.016][k] * wave,
                seconds: 0.4,
                tokens: 262_144,
                input_abs_max: 31.5,
                dead_columns: 0,
                damp_frac: 0.01,
                events: if block == 3 && k == 6 {
                    vec!["damping raised to 0.1 after a failed Cholesky".into()]
                } else {
                    vec![]
                },
            });
        }
    }
    QuantizeRecord {
        schema: 1,
        provenance: provenance("quantize", "Qwen/Qwen2.5-0.5B", 'a'),
        scheme: "w4a16-g128-asym".into(),
        method: "gptq".into(),
        format: "compressed-tensors".into(),
        options: BTreeMap::from([("damp".into(), value!(0.01)), ("act_order".into(), value!(true))]),
        calibration: Some(CalibrationRecord {
            source: "c4-validation.txt".into(),
            windows_sha256: "c".repeat(64),
            windows: 128,
            window_tokens: 2048,
            tokens: 262_144,
            seed: 7,
        }),
        layers,
        sizes: vec![
            size("embedding", 272_269_312, 272_269_312),
            size("attention", 95_000_000, 26_000_000),
            size("mlp", 626_000_000, 168_000_000),
            size("norms", 89_600, 89_600),
        ],
        before_bytes: 993_358_912,
        after_bytes: 466_358_912,
        seconds: 754.0,
        stage_seconds: BTreeMap::from([("calibrate".into(), 401.0), ("solve".into(), 340.2)]),
        peak_rss_bytes: Some(3_210_000_000),
    }
}

pub fn plan() -> PlanRecord {
    let q = quantize();
    PlanRecord {
        schema: 1,
        provenance: provenance("plan", "Qwen/Qwen2.5-0.5B", 'a'),
        tensors: vec![],
        sizes: q.sizes,
        before_bytes: q.before_bytes,
        after_bytes: q.after_bytes,
        peak_memory_bytes: 3_000_000_000,
        quantized_linears: 168,
        kept_linears: 1,
    }
}

pub fn eval() -> EvalRecord {
    let labels = ["0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9"];
    let values = [1e-7, 4e-6, 8e-5, 3e-4, 0.0016, 0.0071, 0.021, 0.052, 0.089, 0.24, 0.77];
    let row = |protocol: &str, window, a: f64, b: f64| PerplexityRecord {
        protocol: protocol.into(),
        source: "/data/wikitext-2-raw/wiki.test.raw".into(),
        source_sha256: "d".repeat(64),
        window,
        windows: 146,
        scored_tokens: 298_862,
        bos: "none".into(),
        perplexity: interval(b, 0.21),
        reference: Some(interval(a, 0.2)),
        ratio: Some(interval(b / a, 0.0021)),
        window_nll: vec![2.5; 4],
        reference_window_nll: vec![2.4; 4],
    };
    EvalRecord {
        schema: 1,
        provenance: provenance("eval", "./out/qwen2.5-0.5b-w4a16", 'b'),
        perplexity: Some(13.71),
        perplexities: vec![row("gptq-2048", 2048, 13.07, 13.71), row("llama.cpp-512", 512, 16.92, 17.85)],
        kl: Some(KlRecord {
            source: "/data/wikitext-2-raw/wiki.test.raw".into(),
            source_sha256: "d".repeat(64),
            window: 512,
            windows: 64,
            tokens: 16_384,
            mean: 0.02345,
            mean_interval: interval(0.02345, 0.0011),
            median: 0.0071,
            percentiles: labels.iter().map(|l| (*l).to_owned()).zip(values).collect(),
            p99: 0.24,
            max: 3.4,
            min: -1e-9,
            top1_agreement: interval(0.9312, 0.0041),
            delta_p_mean: -0.0051,
            delta_p_rms: 0.0412,
            delta_p_percentiles: labels.iter().map(|l| (*l).to_owned()).zip(values.map(|v| v - 0.01)).collect(),
            nll_correlation: 0.9981,
            perplexity: 17.85,
            reference_perplexity: 16.92,
            statistics: Default::default(),
            window_means: vec![0.02; 64],
        }),
        seconds: 91.4,
        ..EvalRecord::default()
    }
}

pub fn bench() -> BenchRecord {
    let mut rows = Vec::new();
    for (test, batch, fast, slow) in [("pp512", 1, 312.4, 298.1), ("tg128", 1, 41.6, 19.5), ("tg128", 4, 98.2, 61.0)] {
        for (role, rate) in [("candidate", fast), ("reference", slow)] {
            rows.push(BenchRow {
                role: role.into(),
                model: "qwen".into(),
                test: test.into(),
                batch,
                tokens_per_second: rate,
                samples: vec![rate * 0.96, rate, rate * 1.03],
                samples_ns: vec![1, 2, 3],
                bytes_per_step: 466_358_912,
                roofline_frac: test.starts_with("tg").then_some(rate / 60.0),
                flops: None,
                flops_frac: None,
            });
        }
    }
    let up = |test: &str, batch, ratio: f64| SpeedUp {
        model: "qwen".into(),
        test: test.into(),
        batch,
        ratio,
        low: ratio - 0.04,
        high: ratio + 0.05,
    };
    let both = ["candidate", "reference"];
    BenchRecord {
        schema: 1,
        provenance: provenance("bench", "./out/qwen2.5-0.5b-w4a16", 'b'),
        bandwidth_bytes_per_second: 21.3e9,
        ceilings: None,
        rows,
        speed_ups: vec![up("pp512", 1, 1.048), up("tg128", 4, 1.61), up("tg128", 1, 2.133)],
        latency: both
            .map(|role| LatencyRow {
                role: role.into(),
                prompt_tokens: 512,
                output_tokens: 128,
                ttft_ms: [1642.0, 1701.2, 1733.9],
                itl_token_ms: [24.04, 25.9, 31.3],
            })
            .to_vec(),
        memory: both
            .map(|role| MemoryRow {
                role: role.into(),
                model: "qwen".into(),
                weight_bytes: 466_358_912,
                kv_bytes: 12_582_912,
                kv_tokens: 1024,
                peak_rss_bytes: Some(2_345_000_000),
            })
            .to_vec(),
        left: Vec::new(),
    }
}

pub fn all() -> Records {
    Records { plan: Some(plan()), quantize: Some(quantize()), eval: Some(eval()), bench: Some(bench()) }
}
