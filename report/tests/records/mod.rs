//! Synthetic records of one small model.

use std::collections::BTreeMap;

use lowbit_bench::capacity::plan::{CapacityRecord, PlanOptions, PlanRow};
use lowbit_bench::load::metrics::{Trim, Window, measure};
use lowbit_bench::load::openai::Endpoint;
use lowbit_bench::load::record::{ClientCheck, LoadRecord, StageRecord, TargetRecord};
use lowbit_bench::load::schedule::Arrivals;
use lowbit_bench::load::sim::{Queue, Service};
use lowbit_bench::record::{BenchRecord, BenchRow, LatencyRow, MemoryRow, SpeedUp};
use lowbit_bench::slo::{Slo, verdict};
use lowbit_bench::speculation::{Answer, SpeculationRecord, summarize};
use lowbit_checkpoint::provenance::Provenance;
use lowbit_eval::drift::blame::{Blame, Suspect, Unit};
use lowbit_eval::drift::free_running::FreeRunning;
use lowbit_eval::drift::tokens::{Choice, TokenView};
use lowbit_eval::record::{EvalRecord, Interval, ItemFile, KlRecord, PerplexityRecord};
use lowbit_eval::verdict::pairing::{Paired, Score, Series};
use lowbit_eval::verdict::record::{GateRecord, Threshold};
use lowbit_eval::verdict::{Policy, judge};
use lowbit_quantize::record::{CalibrationRecord, ComponentSize, LayerRecord, PlanRecord, QuantizeRecord};
use lowbit_report::{Records, Variant};
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
                input_scale: None,
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
        transforms: None,
        layers,
        experts: vec![],
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
        budget: None,
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
        seconds: None,
        probe_seconds: None,
        quantized_linears: 168,
        kept_linears: 1,
        experts: None,
        budget: None,
        notes: Vec::new(),
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
                parameters: 0,
                kv_element_bytes: 2,
                kv_bytes: 12_582_912,
                kv_tokens: 1024,
                peak_rss_bytes: Some(2_345_000_000),
            })
            .to_vec(),
        rounding: None,
        left: Vec::new(),
    }
}

fn token(word: &str, kl: f64) -> TokenView {
    let choice = |token: &str, probability| Choice { token: token.into(), probability };
    TokenView {
        window: 3,
        position: 211,
        context: "The committee met twice before the vote, and what it found there was\nnot what anybody had ".into(),
        token: word.into(),
        kl,
        reference_nll: 0.4,
        candidate_nll: 2.9,
        reference_choices: vec![choice(word, 0.67), choice(" hoped", 0.21), choice("\n", 0.04)],
        candidate_choices: vec![choice(" hoped", 0.71), choice(word, 0.055), choice(" been", 0.03)],
    }
}

/// Blame, tokens and texts written freely, as `lowbit eval` adds them.
pub fn with_views(mut e: EvalRecord) -> EvalRecord {
    let suspect = |i: usize| Suspect {
        module: format!("model.layers.{i}.mlp.down_proj"),
        kl: 0.0234 - 0.004 / (i + 1) as f64,
        regained: interval(0.004 / (i + 1) as f64, 0.0011),
        bytes: 5_700_000,
        per_megabyte: 0.0007 / (i + 1) as f64,
    };
    let suspects = (0..12).map(suspect).collect();
    e.blame = Some(Blame { unit: Unit::Linear, kl: 0.0234, windows: 4, window: 512, suspects });
    e.worst_tokens = vec![token(" expected", 3.4), token(" <b>said", 2.2), token("\n", 1.9)];
    e.free_running = Some(FreeRunning {
        prompts: 32,
        max_new_tokens: 64,
        first_divergent_mean: 21.4,
        first_divergent_median: 17.0,
        identical: 0.125,
        differing_mean: 0.61,
        length_ratio: 1.02,
        reference_loop_rate: 0.031,
        candidate_loop_rate: 0.062,
        pairs: vec![],
    });
    let file = |name: &str| Some(ItemFile { file: name.into(), sha256: "9".repeat(64), items: 4000 });
    e.items.candidate = file("eval.items.jsonl");
    e.items.reference = file("eval.reference.items.jsonl");
    e
}

/// The gate's own decision on made-up pairs: `lost` and `gained` of `n` items of two tasks.
pub fn gate(n: usize, lost: usize, gained: usize, max_kl: Option<f64>) -> GateRecord {
    let series = |name: &str, lost: usize, gained: usize| {
        let score = |i: usize| {
            let (reference, candidate) = match i {
                i if i < lost => (1.0, 0.0),
                i if i < lost + gained => (0.0, 1.0),
                i if i % 3 == 0 => (0.0, 0.0),
                _ => (1.0, 1.0),
            };
            Score { reference, candidate, cluster: i }
        };
        Series::new(name, "acc", (0..n).map(score).collect())
    };
    let paired = Paired {
        series: vec![series("arc_easy", lost, gained), series("hellaswag", gained, gained)],
        ..Paired::default()
    };
    let kl = Threshold::new("KL".into(), 0.0234, (0.0223, 0.0246), max_kl);
    let mut record = judge(&paired, &Policy { max_kl, ..Policy::default() }, vec![kl]);
    record.provenance = Provenance { device: "client".into(), ..provenance("gate", "./out/qwen2.5-0.5b-w4a16", 'b') };
    record.flips = serde_json::from_value(value!([
        {"task": "arc_easy", "doc": 17, "reference": 1.0, "candidate": 0.0, "gold": [2], "reference_choice": 2, "candidate_choice": 0, "moved": 1.93},
        {"task": "arc_easy", "doc": 4, "reference": 1.0, "candidate": 0.0, "gold": [1], "reference_choice": 1, "candidate_choice": 3, "moved": 0.41},
        {"task": "hellaswag", "doc": 9, "reference": 0.0, "candidate": 1.0, "gold": [0], "reference_choice": 3, "candidate_choice": 0, "moved": -0.22},
    ]))
    .unwrap();
    record
}

/// Three open-loop stages of a queue of four servers, `service` seconds a request.
pub fn load_record(service: f64) -> LoadRecord {
    let queue = Queue { servers: 4, service: Service::Exponential(service), tokens: 10, failures: 0.0 };
    let slo = Slo::parse("ttft_p95<=400").unwrap();
    let stage = |rate: f64| {
        let requests = queue.run(rate, Arrivals::Poisson, 3000, 1).unwrap();
        let window = Window { from_ns: 0, to_ns: requests.iter().map(|r| r.end_ns).max().unwrap() + 1 };
        let metrics = measure(&requests, window);
        let slo = Some(verdict::judge(&requests, window, metrics.rates.requests_per_second, &slo));
        StageRecord {
            profile: "poisson".into(),
            rate: Some(rate),
            streams: None,
            seconds: 1.0,
            stopped_by: "requests".into(),
            rejected: 0,
            saturation: None,
            client: ClientCheck {
                schedule_delay_p99_ms: 0.1,
                schedule_delay_max_ms: 0.2,
                cpu_frac: Some(0.1),
                connections: 64,
                resent: 0,
                invalid: vec![],
            },
            metrics,
            slo,
            requests,
        }
    };
    LoadRecord {
        schema: 1,
        provenance: Provenance { device: "client".into(), ..provenance("load", "", 'b') },
        target: TargetRecord {
            url: "http:".into(),
            endpoint: Endpoint::Chat,
            model: "qwen2.5-0.5b".into(),
            streaming: true,
            exact_output: true,
            server: None,
        },
        data: "chat".into(),
        trim: Trim::default(),
        stages: [0.2, 0.5, 0.8, 0.95].map(|part| stage(4.0 * part / service)).to_vec(),
        find_max: None,
        imported: None,
    }
}

pub fn capacity() -> CapacityRecord {
    let row = |name: &str, servers, dollars, infeasible: &[&str]| PlanRow {
        name: name.into(),
        rate: Some(32.0),
        rate_from: "find-max".into(),
        servers: Some(servers),
        dollars_per_hour: Some(3.5 * servers as f64),
        dollars_per_million_output: Some(dollars),
        ttft_p50_ms: Some(81.0),
        accuracy: Some(if infeasible.is_empty() { "pass" } else { "regression" }.into()),
        room: None,
        infeasible: infeasible.iter().map(|s| (*s).to_owned()).collect(),
    };
    CapacityRecord {
        schema: 1,
        provenance: Provenance { device: "client".into(), ..provenance("capacity", "", 'b') },
        options: PlanOptions {
            peak_rps: 120.0,
            gpu_hour: 3.5,
            gpus: 1,
            burst: 1.2,
            headroom: 0.8,
            spare: 1,
            slo: Some(Slo::parse("guidellm/chatbot").unwrap()),
        },
        variants: vec![row("w8", 7, 1.31, &[]), row("w4", 5, 0.94, &[]), row("w3", 4, 0.71, &["accuracy: regression"])],
        best: Some("w4".into()),
    }
}

/// The quantized model as a draft of the original: 60 % of the proposals accepted.
pub fn speculation() -> SpeculationRecord {
    let answer = |prompt: usize, plain: f64| Answer {
        prompt,
        plain_tokens_per_second: plain,
        tokens_per_second: 1.32 * plain,
        drafted: 100,
        accepted: 60,
        identical: true,
    };
    let of = Provenance {
        reference: Some("out/model".into()),
        reference_sha256: Some("b".repeat(64)),
        ..provenance("bench --draft", "Qwen/Qwen2.5-0.5B", 'a')
    };
    summarize(of, 4, 96, (0..4).map(|i| answer(i, 20.0 + i as f64)).collect(), 0).unwrap()
}

/// Everything that one directory may hold.
pub fn all() -> Records {
    Records {
        plan: Some(plan()),
        quantize: Some(quantize()),
        eval: Some(with_views(eval())),
        gate: Some(gate(4000, 60, 50, None)),
        bench: Some(bench()),
        loads: vec![(String::new(), load_record(0.1))],
        speculation: Some(speculation()),
        capacity: Some(capacity()),
    }
}

/// Three variants that differ in everything the page compares.
pub fn several() -> Vec<Variant> {
    let make = |name: &str, factor: f64, lost: usize, service: f64| {
        let mut r = all();
        r.loads = vec![(String::new(), load_record(service))];
        r.gate = Some(gate(4000, lost, 50, None));
        r.capacity = r.capacity.filter(|_| name == "w8");
        if let (Some(q), Some(e), Some(b)) = (&mut r.quantize, &mut r.eval, &mut r.bench) {
            q.scheme = format!("{name}a16-g128");
            for s in &mut q.sizes {
                s.after_bytes = (s.after_bytes as f64 * factor) as u64;
            }
            q.after_bytes = q.sizes.iter().map(|s| s.after_bytes).sum();
            if let Some(k) = &mut e.kl {
                k.mean /= factor.powi(3);
                k.mean_interval = interval(k.mean, k.mean / 20.0);
                k.percentiles.iter_mut().for_each(|p| p.1 /= factor.powi(3));
            }
            for row in b.rows.iter_mut().filter(|w| w.role == "candidate") {
                row.tokens_per_second /= factor;
                row.samples.iter_mut().for_each(|s| *s /= factor);
            }
            b.speed_ups.iter_mut().for_each(|s| s.ratio /= factor);
        }
        Variant { name: name.to_owned(), records: r }
    };
    vec![make("w8", 1.6, 50, 0.13), make("w4", 1.0, 60, 0.1), make("w3", 0.8, 260, 0.09)]
}
