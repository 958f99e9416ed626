//! Quantizing mixtures of experts: tiny random models of every family through plan, calibration, writing and verifying.

#[path = "../../model/tests/experts/released.rs"]
mod released;
#[path = "../../model/tests/experts/weights.rs"]
mod weights;

// They write their checkpoints with it.
use safetensors as _;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lowbit_calibration::Windows;
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat};
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::{Buffer, Segment};
use lowbit_kernels::cpu::CpuBackend;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, LinearScheme, Scheme};
use lowbit_model::Model;
use lowbit_quantize::gguf::GgufChoice;
use lowbit_quantize::record::QuantizeRecord;
use lowbit_quantize::verify::verify;
use lowbit_quantize::{Method, QuantizeError, QuantizeOptions, Resume, Silent, budget, plan, quantize};
use serde_json::{Value, json};
use weights::Tensor;

/// Expert that hardly any token is routed to.
const STARVED: usize = 3;

/// Tokens an expert of these models needs: as many as the wider of its inputs has columns.
fn needed(json: &Value) -> u64 {
    match json["model_type"].as_str() {
        Some("mixtral") => 48,
        Some("gpt_oss") => 64,
        _ => 32,
    }
}

fn options(method: Method) -> QuantizeOptions {
    QuantizeOptions { method, ..QuantizeOptions::new(Scheme::parse("w4a16", GroupSize::Cols(8), true).unwrap()) }
}

fn windows() -> Windows {
    let mut x = 1u32;
    let mut token = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        x >> 26
    };
    Windows::new((0..16).map(|_| (0..24).map(|_| token()).collect()).collect(), "random", 0)
}

/// A checkpoint in which hardly a token goes to expert [`STARVED`] (DeepSeek-V3 and gpt-oss: none).
fn original(dir: &Path, family: &str) -> Value {
    let json = weights::config_of(family);
    weights::write(dir, &json, &tensors(&json));
    json
}

/// Column 0 of the residual stream starts at 8 for every token, which after the norm is some 5; the others' logits differ by 1.2, and this
/// pulls the expert's down by 3. Biases of the choice pull it by more.
fn tensors(json: &Value) -> Vec<(String, Tensor)> {
    let mut tensors = weights::tensors(json);
    for (name, t) in &mut tensors {
        let n = t.shape.last().copied().unwrap_or(1);
        if name.ends_with("embed_tokens.weight") {
            t.values.iter_mut().step_by(n).for_each(|v| *v = 8.0);
        } else if name.ends_with("gate.weight") && t.shape[0] > 1 {
            t.values.iter_mut().step_by(n).for_each(|v| *v = 0.0);
            t.values[STARVED * n] = -0.6;
        } else if name.ends_with("e_score_correction_bias") {
            t.values[STARVED] = -10.0;
        } else if name.ends_with("router.bias") {
            t.values[STARVED] = -30.0;
        }
    }
    tensors
}

fn run(from: &Path, to: &Path, options: &QuantizeOptions) -> Result<(QuantizeRecord, u64), QuantizeError> {
    let ckpt = Checkpoint::open(from).unwrap().with_floats().unwrap();
    let windows = windows();
    let made = plan::make(&ckpt, options, None, windows.token_count())?;
    let windows = options.needs_data().then_some(&windows);
    let resume = Resume { identity: "test".into(), fresh: false };
    let (outcome, writer) =
        quantize(&ckpt, &[&CpuBackend::new()], &made, windows, to, false, &resume, &Silent, &AtomicBool::new(false))?;
    writer.finish()?;
    let record = QuantizeRecord {
        schema: 1,
        provenance: Provenance::default(),
        scheme: options.scheme.full_name(),
        method: options.method.name().into(),
        format: options.format.name().into(),
        options: BTreeMap::new(),
        calibration: outcome.calibration,
        transforms: outcome.transforms,
        layers: outcome.layers,
        experts: outcome.experts,
        sizes: made.record.sizes.clone(),
        before_bytes: made.record.before_bytes,
        after_bytes: made.record.after_bytes,
        seconds: 0.0,
        stage_seconds: outcome.stage_seconds,
        peak_rss_bytes: None,
        budget: None,
    };
    Ok((record, made.record.after_bytes))
}

/// Tokens of each expert of block `block` in the model itself.
fn routed(dir: &Path, json: &Value, block: usize, count: usize) -> Vec<u64> {
    let model = Model::load(&Checkpoint::open(dir).unwrap(), Arc::new(CpuBackend::new())).unwrap();
    let mixtral = json["model_type"] == "mixtral";
    let (mlp, gate) = if mixtral { ("block_sparse_moe", "w1") } else { ("mlp", "gate_proj") };
    let hidden = json["hidden_size"].as_u64().unwrap();
    let mut tokens = vec![0; count];
    for w in windows().tokens {
        let mut cache = model.new_cache(1, w.len()).unwrap();
        let segments = [Segment { slot: 0, row: 0, tokens: w.len(), past: 0 }];
        let mut tap = |name: &str, x: &Buffer| {
            for (e, sum) in tokens.iter_mut().enumerate() {
                if name == format!("model.layers.{block}.{mlp}.experts.{e}.{gate}") {
                    *sum += x.len as u64 / hidden;
                }
            }
            Ok(())
        };
        model.forward_tapped(&w, &segments, &mut cache, &mut tap).unwrap();
    }
    tokens
}

fn logits(dir: &Path) -> Vec<f32> {
    let model = Model::load(&Checkpoint::open(dir).unwrap(), Arc::new(CpuBackend::new())).unwrap();
    model.logits_of(&windows().tokens[0]).unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (d, n) = a.iter().zip(b).fold((0.0, 0.0), |(d, n), (a, b)| (d + square(a - b), n + square(*b)));
    (d / n).sqrt()
}

#[test]
fn every_expert_is_calibrated_and_the_starved_are_reported() {
    for family in ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"] {
        let tmp = tempfile::tempdir().unwrap();
        let (from, to) = (tmp.path().join("from"), tmp.path().join("to"));
        let json = original(&from, family);
        let config = Checkpoint::open(&from).unwrap().config;
        let experts = config.experts.clone().unwrap();
        // Nothing before the first sparse block is quantized, so that its routing is that of the model itself.
        let all = ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|down)_proj"];
        let dense = !experts.sparse.iter().all(|s| *s);
        let ignore = all[..1 + usize::from(dense)].iter().map(|s| s.to_string()).collect();
        let (record, after) = run(&from, &to, &QuantizeOptions { ignore, ..options(Method::Gptq) }).unwrap();

        let total = windows().token_count() as u64;
        let sparse: Vec<usize> = (0..config.num_layers).filter(|i| experts.sparse[*i]).collect();
        assert_eq!(record.experts.iter().map(|e| e.block).collect::<Vec<_>>(), sparse, "{family}");
        assert_eq!(record.experts[0].tokens, routed(&from, &json, sparse[0], experts.count), "{family}");
        let first = &record.experts[0];
        assert!(first.tokens[STARVED] < first.needed, "{family}: {:?}", first.tokens);
        let mut events = 0;
        for c in &record.experts {
            assert_eq!(c.tokens.iter().sum::<u64>(), total * experts.per_token as u64, "{family}");
            assert_eq!((c.needed, c.min), (needed(&json), *c.tokens.iter().min().unwrap()), "{family}");
            assert_eq!(c.starved, c.tokens.iter().filter(|n| **n < c.needed).count(), "{family}");
            assert_eq!(c.dead, c.tokens.iter().filter(|n| **n == 0).count(), "{family}");
            assert!(!matches!(family, "deepseek_v3" | "gpt_oss") || c.tokens[STARVED] == 0);
            for (e, n) in c.tokens.iter().enumerate() {
                let of = format!("model.layers.{}.{}.experts.{e}.", c.block, experts.names.mlp);
                let records: Vec<_> = record.layers.iter().filter(|l| l.name.starts_with(&of)).collect();
                assert_eq!(records.len(), 3, "{family} {of}");
                for l in records {
                    assert_eq!(l.tokens, *n, "{family} {}", l.name);
                    let said = l.events.iter().any(|e| e.contains(&format!("expert: {n} of the {} tokens", c.needed)));
                    assert_eq!(said, *n < c.needed, "{family} {}: {:?}", l.name, l.events);
                    events += usize::from(said);
                }
            }
        }
        assert!(events > 0, "{family}");

        let (ckpt, source) = (Checkpoint::open(&to).unwrap(), Checkpoint::open(&from).unwrap());
        let done = verify(&ckpt, Some(&record), Some(&source)).unwrap();
        assert!(done.packed_linears >= 3 * experts.count * sparse.len(), "{family}: {done:?}");
        assert_eq!(ckpt.store.iter().map(|(_, t)| t.data.as_slice().len() as u64).sum::<u64>(), after, "{family}");
        let ignored = &ckpt.quantization.as_ref().unwrap().ignore;
        for block in &sparse {
            let router = format!("model.layers.{block}.{}.{}", experts.names.mlp, experts.names.router);
            assert!(ignored.contains(&router) && ckpt.has_weight(&router), "{family}: {ignored:?}");
            let expert = format!("model.layers.{block}.{}.experts.0.{}", experts.names.mlp, experts.names.down);
            assert!(ckpt.store.find(&format!("{expert}.weight_packed")).is_some(), "{family}");
        }
        let gate = format!("model.layers.{}.mlp.shared_expert_gate", sparse[0]);
        assert_eq!(ignored.contains(&gate), family == "qwen2_moe");
        // Four bits in groups of eight change a weight by some 7 % of its group's largest; a few layers add up, and a token that goes to
        // another expert differs by more.
        let d = distance(&logits(&to), &logits(&from));
        assert!(d > 0.0 && d < 0.5, "{family}: {d}");
    }
}

#[test]
fn passes_over_the_experts_and_offloading_change_no_byte() {
    for (family, method) in [("deepseek_v3", Method::Best), ("qwen2_moe", Method::Fast)] {
        let tmp = tempfile::tempdir().unwrap();
        let from = tmp.path().join("from");
        original(&from, family);
        let at = |name: &str, options: &QuantizeOptions| {
            let to = tmp.path().join(name);
            let (record, _) = run(&from, &to, options).unwrap();
            assert!(record.layers.iter().all(|l| l.proxy_loss.is_finite() && l.relative_error < 0.5), "{family}");
            std::fs::read(to.join("model.safetensors")).unwrap()
        };
        let whole = at("whole", &options(method));
        let one = QuantizeOptions { expert_bytes: 1, offload: Some(tmp.path().join("disk")), ..options(method) };
        assert!(whole == at("one by one", &one), "{family}");
        let d = distance(&logits(&tmp.path().join("whole")), &logits(&from));
        assert!(d > 0.0 && d < 0.5, "{family}: {d}");
    }
}

/// Experts in other layouts and number formats: written, verified, and read back as a model; or refused by name.
#[test]
fn experts_in_every_format() {
    let tmp = tempfile::tempdir().unwrap();
    let scheme = |name: &str| LinearScheme::parse(name, GroupSize::Cols(8), true).unwrap();
    let of = |name: &str, method, format| QuantizeOptions { method, format, ..QuantizeOptions::new(scheme(name)) };
    use Method::{Best, Gptq, Rtn};
    use PackFormat::{Awq, CompressedTensors, GptqV2};
    for family in ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let from = tmp.path().join(family);
        original(&from, family);
        let source = Checkpoint::open(&from).unwrap();
        let float = logits(&from);
        for (name, method, format) in [
            ("w4a16", Best, GptqV2),
            ("w4a16", Gptq, Awq),
            ("fp8-dynamic", Gptq, CompressedTensors),
            ("fp8-static", Rtn, CompressedTensors),
            ("w8a8-static", Gptq, CompressedTensors),
            ("nvfp4", Gptq, CompressedTensors),
        ] {
            let what = format!("{family} {name} {}", format.name());
            let to = tmp.path().join(&what);
            let (record, after) = match run(&from, &to, &of(name, method, format)) {
                Ok(done) => done,
                // Widths of these tiny models that are no whole words or groups, and layouts that gpt-oss has not.
                Err(QuantizeError::Plan { summary, offenders, hint }) => {
                    assert!(!offenders.is_empty() && hint.is_some(), "{what}: {summary}");
                    continue;
                }
                Err(e) => panic!("{what}: {e}"),
            };
            let ckpt = Checkpoint::open(&to).unwrap();
            verify(&ckpt, Some(&record), Some(&source)).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(ckpt.store.iter().map(|(_, t)| t.data.as_slice().len() as u64).sum::<u64>(), after, "{what}");
            let stored = name.ends_with("static") || name == "nvfp4";
            for l in record.layers.iter().filter(|l| l.block.is_some()) {
                // A starved expert's input has the layer's scale, and says so where anything of it comes from the data.
                assert_eq!(l.input_scale.is_some_and(|s| s > 0.0), stored, "{what}: {}", l.name);
            }
            let said = record.layers.iter().flat_map(|l| &l.events).any(|e| e.contains("expert"));
            assert!(said, "{what}");
            // Tiny models, of which a token that goes to another expert is a large part; unrelated logits are 1.4 apart.
            let d = distance(&logits(&to), &float);
            assert!(d > 0.0 && d < if family == "gpt_oss" { 1.0 } else { 0.8 }, "{what}: {d}");
        }
        // One scale for the set that engines hold as one matrix.
        if family == "mixtral" {
            let ckpt = Checkpoint::open(&tmp.path().join("mixtral nvfp4 compressed-tensors")).unwrap();
            let global = |w: &str| {
                let name = format!("model.layers.0.block_sparse_moe.experts.0.{w}.weight_global_scale");
                ckpt.store.vector(&name, 1).unwrap()[0]
            };
            assert_eq!(global("w1"), global("w3"));
        }
        let gguf = Some(GgufChoice { kind: GgmlType::Q4_0, embedding: None, head: None });
        let error = run(&from, &tmp.path().join("no"), &QuantizeOptions { gguf, ..options(Gptq) }).unwrap_err();
        assert!(error.to_string().contains("cannot be written as GGUF"), "{error}");
        let kv = Some(KvScheme { code: InputCode::Fp8, per_head: false });
        let cached = QuantizeOptions { kv, ..options(Rtn) };
        match run(&from, &tmp.path().join(format!("{family} cache")), &cached) {
            Ok((record, _)) => {
                let ckpt = Checkpoint::open(&tmp.path().join(format!("{family} cache"))).unwrap();
                verify(&ckpt, Some(&record), Some(&source)).unwrap();
                assert!(ckpt.kv_rules("model.layers.0.self_attn").unwrap().is_some() && source.config.latent.is_none());
                // Rounding takes nothing of an expert from the data.
                assert!(record.layers.iter().all(|l| l.events.is_empty()), "{family}");
            }
            Err(e) => assert!(e.to_string().contains("latent attention") && source.config.latent.is_some(), "{e}"),
        }
    }
}

/// What is kept of gpt-oss, and what its experts are called: as llm-compressor writes them.
#[test]
fn gpt_oss_keeps_router_biases_and_sinks() {
    let tmp = tempfile::tempdir().unwrap();
    let (from, to) = (tmp.path().join("from"), tmp.path().join("to"));
    let json = original(&from, "gpt_oss");
    run(&from, &to, &options(Method::Fast)).unwrap();
    let ckpt = Checkpoint::open(&to).unwrap();
    let bits = |name: &str| ckpt.store.get(name).unwrap().to_f32().unwrap();
    let written = std::fs::read(to.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&written).unwrap();
    assert!(file.names().iter().all(|n| !n.contains("gate_up_proj") && !n.contains(".mlp.gate.")));
    for (name, t) in tensors(&json) {
        let Some((block, of_all)) = name.split_once(".mlp.experts.") else {
            if !name.contains("self_attn") || name.ends_with(".bias") || name.ends_with(".sinks") {
                assert_eq!(bits(&name), t.values, "{name}");
            }
            continue;
        };
        let Some(stem) = of_all.strip_suffix("_bias") else { continue };
        // Of gate and up the bias of the one are the even elements, of the other the odd ones.
        let parts: &[&str] = if stem == "down_proj" { &["down_proj"] } else { &["gate_proj", "up_proj"] };
        let row = t.shape[1];
        for (e, row) in t.values.chunks(row).enumerate() {
            for (p, part) in parts.iter().enumerate() {
                let module = format!("{block}.mlp.experts.{e}.{part}");
                let own: Vec<f32> = row.iter().skip(p).step_by(parts.len()).copied().collect();
                assert_eq!(bits(&format!("{module}.bias")), own, "{module}");
                assert!(ckpt.store.find(&format!("{module}.weight_packed")).is_some(), "{module}");
            }
        }
    }
}

#[test]
fn released_gpt_oss_is_quantized_from_the_floats_of_its_codes() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    let json = weights::config_of("gpt_oss");
    released::write(&at("released"), json.clone(), tensors(&json));
    let released = Checkpoint::open(&at("released")).unwrap();
    let stored = released.store.iter().map(|(_, t)| t.data.size() as u64).sum::<u64>();
    let source = released.with_floats().unwrap();
    // The same weights as floats, in the tensors that transformers has for them.
    let mut floats = tensors(&json);
    for (name, t) in &mut floats {
        let Some((block, module)) = name.split_once(".mlp.experts.").filter(|(_, m)| m.ends_with("_proj")) else {
            continue;
        };
        let [experts, inner, out] = t.shape[..] else { panic!("{name}") };
        let parts: &[&str] = if module == "down_proj" { &["down_proj"] } else { &["gate_proj", "up_proj"] };
        for (e, (p, part)) in (0..experts).flat_map(|e| parts.iter().enumerate().map(move |part| (e, part))) {
            let matrix = source.store.get(&format!("{block}.mlp.experts.{e}.{part}.weight")).unwrap().to_f32().unwrap();
            for (r, row) in matrix.chunks(inner).enumerate() {
                for (c, v) in row.iter().enumerate() {
                    t.values[(e * inner + c) * out + r * parts.len() + p] = *v;
                }
            }
        }
    }
    weights::write(&at("floats"), &json, &floats);
    // A block afresh has its own of what is made when it is read, and shares the rest.
    let block = source.afresh("model.layers.1.").unwrap();
    let place = |c: &Checkpoint, layer: usize| {
        let name = format!("model.layers.{layer}.mlp.experts.0.down_proj.weight");
        c.store.get(&name).unwrap().data.as_slice().as_ptr()
    };
    assert_ne!(place(&block, 1), place(&source, 1));
    assert_eq!(place(&block, 2), place(&source, 2));
    assert!(source.afresh("lm_head.").is_none());
    let rtn = options(Method::Rtn);
    let (of_codes, _) = run(&at("released"), &at("a"), &rtn).unwrap();
    let (of_floats, _) = run(&at("floats"), &at("b"), &rtn).unwrap();
    let [a, b] = ["a", "b"].map(|name| std::fs::read(at(name).join("model.safetensors")).unwrap());
    assert!(a == b);
    // What it was before is what its files hold.
    assert_eq!(of_codes.before_bytes, stored);
    assert!(of_floats.before_bytes > 2 * stored, "{} {stored}", of_floats.before_bytes);

    let w8 = LinearScheme::parse("w8a16", GroupSize::Cols(8), true).unwrap();
    let (record, _) =
        run(&at("released"), &at("w8"), &QuantizeOptions { method: Method::Gptq, ..QuantizeOptions::new(w8) }).unwrap();
    assert!(record.experts.len() == 3 && record.experts.iter().all(|c| c.tokens[STARVED] == 0 && c.dead > 0));
    let ckpt = Checkpoint::open(&at("w8")).unwrap();
    assert!(verify(&ckpt, Some(&record), Some(&source)).unwrap().packed_linears >= 3 * 8 * 3);
    // Eight bits in groups of eight change a weight by 0.4 % of its group's largest. Where that tips the choice of an expert, a position
    // becomes another: single ones were measured to move by 0.03, 0.09, 0.7 and 3.6. A mean or a largest distance would bound these
    // choices; the median bounds what rounding does, as more than half of the positions keep their experts.
    let (quantized, float, vocab) = (logits(&at("w8")), logits(&at("released")), source.config.vocab_size);
    let mut each: Vec<f64> = quantized.chunks(vocab).zip(float.chunks(vocab)).map(|(a, b)| distance(a, b)).collect();
    each.sort_by(f64::total_cmp);
    assert!(each[0] > 0.0 && each[each.len() / 2] < 0.05, "{each:?}");

    let refused = |ckpt: &Checkpoint, options: &QuantizeOptions| match plan::make(ckpt, options, None, 384) {
        Err(e @ QuantizeError::Plan { .. }) => e.to_string(),
        Ok(_) => panic!("accepted"),
        Err(e) => panic!("{e}"),
    };
    let kept = QuantizeOptions { ignore: vec!["re:.*experts.*".into()], ..options(Method::Gptq) };
    let error = refused(&source, &kept);
    assert!(error.contains("stay floats") && error.contains("block 2: experts ignored"), "{error}");
    let error = refused(&source, &QuantizeOptions { format: PackFormat::GptqV2, ..options(Method::Gptq) });
    assert!(error.contains("other names") && error.contains("gpt_oss in gptq_v2"), "{error}");
    // Codes of lowbit's own making are no release.
    let mx = LinearScheme::parse("mxfp4a16", GroupSize::Cols(32), true).unwrap();
    let (record, _) =
        run(&at("released"), &at("mx"), &QuantizeOptions { method: Method::Rtn, ..QuantizeOptions::new(mx) }).unwrap();
    let again = Checkpoint::open(&at("mx")).unwrap().with_floats().unwrap();
    verify(&again, Some(&record), Some(&source)).unwrap();
    assert!(refused(&again, &rtn).contains("quantized already"));
}

#[test]
fn strict_takes_no_starved_expert() {
    let tmp = tempfile::tempdir().unwrap();
    let from = tmp.path().join("from");
    original(&from, "deepseek_v3");
    let strict = QuantizeOptions { strict: true, ..options(Method::Gptq) };
    let error = run(&from, &tmp.path().join("to"), &strict).unwrap_err();
    assert!(matches!(error, QuantizeError::Strict { .. }), "{error}");
    assert!(!tmp.path().join("to").exists());
    // Rounding asks for no data, so nothing starves.
    let (record, _) =
        run(&from, &tmp.path().join("rtn"), &QuantizeOptions { strict: true, ..options(Method::Rtn) }).unwrap();
    assert!(record.experts.is_empty());
}

#[test]
fn the_plan_states_what_experts_cost_and_refuses_half_a_block() {
    let tmp = tempfile::tempdir().unwrap();
    original(tmp.path(), "qwen3_moe");
    let ckpt = Checkpoint::open(tmp.path()).unwrap();
    let made = plan::make(&ckpt, &options(Method::Gptq), None, 384).unwrap();
    let experts = made.record.experts.unwrap();
    assert_eq!((experts.experts, experts.at_once, experts.passes, experts.tokens_needed), (16, 16, 1, 32));
    // Gate and up: 32² f32 an expert, which is more than twice down's 16².
    assert_eq!(experts.hessian_bytes, 16 * 32 * 32 * 4);
    let few = QuantizeOptions { expert_bytes: 3 * 32 * 32 * 4, ..options(Method::Gptq) };
    let made = plan::make(&ckpt, &few, None, 384).unwrap();
    assert_eq!(made.record.experts.map(|e| (e.at_once, e.passes)), Some((3, 6)));
    let router = made.record.tensors.iter().find(|t| t.name == "model.layers.1.mlp.gate.weight").unwrap();
    assert_eq!((router.action.as_str(), router.before_bytes), ("keep", router.after_bytes));
    let all: Vec<&str> = made.record.sizes.iter().map(|s| s.component.as_str()).collect();
    assert!(all.contains(&"experts"), "{all:?}");

    let refused = |options: &QuantizeOptions| match plan::make(&ckpt, options, None, 384) {
        Err(QuantizeError::Plan { summary, offenders, .. }) => json!([summary, offenders]).to_string(),
        Ok(_) => panic!("accepted"),
        Err(e) => panic!("{e}"),
    };
    let one = QuantizeOptions { ignore: vec![r"re:.*layers\.1\..*experts\.7\..*".into()], ..options(Method::Gptq) };
    let error = refused(&one);
    assert!(error.contains("block 1, experts: 3 of 48 ignored"), "{error}");
    let error = refused(&options(Method::Round));
    assert!(error.contains("gradient of a whole block") && error.contains("`qwen3_moe`: experts"), "{error}");
    let scheme = Scheme::parse("w4a16", GroupSize::Cols(32), true).unwrap();
    let error = refused(&QuantizeOptions { scheme: scheme.into(), ..options(Method::Gptq) });
    assert!(error.contains("mlp.experts.*.down_proj in 2 of 4 blocks: in = 16"), "{error}");
    // All experts have one scheme, which may be another than the rest's.
    let w8 = LinearScheme::parse("w8a16", GroupSize::Cols(8), true).unwrap();
    let module = |pattern: &str| {
        let modules = vec![(pattern.to_string(), w8)];
        QuantizeOptions { modules, ..options(Method::Gptq) }
    };
    let error = refused(&module(r"re:.*layers\.1\..*experts\.7\..*"));
    assert!(error.contains("a set must have one scheme") && error.contains("experts.7.gate_proj"), "{error}");
    let made = plan::make(&ckpt, &module("re:.*experts.*"), None, 384).unwrap();
    assert!(made.linears.iter().all(|l| (l.scheme == w8) == l.module.contains(".experts.")));
}

#[test]
fn a_budget_is_refused_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    for family in ["mixtral", "deepseek_v3"] {
        let dir = tmp.path().join(family);
        original(&dir, family);
        match budget::outline(&Checkpoint::open(&dir).unwrap(), &options(Method::Gptq)) {
            Err(QuantizeError::Plan { summary, hint, .. }) => {
                assert!(summary.contains("experts") && summary.contains(family), "{summary}");
                assert!(hint.is_some_and(|h| h.contains("--scheme")));
            }
            Ok(_) => panic!("accepted"),
            Err(e) => panic!("{e}"),
        }
    }
}
