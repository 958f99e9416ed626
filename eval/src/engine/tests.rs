use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::hash::model_sha256;
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};

use super::*;
use crate::cache::Cache;
use crate::scorer::Scorer;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")
}

fn load(dir: &Path, backend: Arc<dyn Backend>) -> (Model, Tokenizer) {
    let ckpt = Checkpoint::open(dir).unwrap();
    (Model::load(&ckpt, backend).unwrap(), Tokenizer::load(dir).unwrap())
}

fn request(doc: usize, idx: usize, kind: RequestKind) -> Request {
    Request { task: "t".into(), doc, idx, kind }
}

/// Questions with a common beginning, choices of one and of several tokens, a rolled text, text to write.
fn requests() -> Vec<Request> {
    let shots = "The mill stood by the river. The miller had three sons, and the youngest had a cat.\n\n".repeat(2);
    let mut all = Vec::new();
    for (doc, question) in
        ["The old king", "A ship came", "In the deep wood there lived", "The old kin"].iter().enumerate()
    {
        let context = if doc < 2 { format!("{shots}{question}") } else { question.to_string() };
        for (idx, choice) in [" was", " went home to the sea", " was old", " w"].iter().enumerate() {
            let kind = RequestKind::LogLikelihood { context: context.clone(), continuation: choice.to_string() };
            all.push(request(doc, idx, kind));
        }
    }
    all.push(request(4, 0, RequestKind::Rolling { text: shots.repeat(3) }));
    all.push(request(5, 0, RequestKind::Rolling { text: String::new() }));
    for (doc, until) in [vec![], vec![".".to_owned()], vec![]].into_iter().enumerate() {
        let context = format!("{shots}Once upon a time{}", " and".repeat(doc));
        let (do_sample, temperature) = (doc == 2, 0.8);
        all.push(request(
            6 + doc,
            0,
            RequestKind::Generate {
                context,
                until,
                max_new_tokens: 8,
                temperature,
                do_sample,
                messages: vec![],
                tools: vec![],
            },
        ));
    }
    all
}

fn options(batch_tokens: usize, slots: usize) -> EngineOptions {
    let limits = Limits { batch_tokens, slots, cache_tokens: 1 << 16 };
    EngineOptions { max_length: Some(96), limits, ..EngineOptions::default() }
}

fn run(model: &Model, codec: &Tokenizer, requests: &[Request], o: EngineOptions) -> Outcome {
    Engine::new(model, None, codec, o).unwrap().run(requests, &mut NoStore, &mut |_, _| ()).unwrap()
}

/// The engine's sums against one plain forward pass a request.
#[test]
fn scores_are_those_of_a_plain_forward_pass() {
    let (model, codec) = load(&demo(), Arc::new(ScalarBackend::new()));
    let requests = requests();
    let found = run(&model, &codec, &requests, options(64, 8));
    let encoder = RequestEncoder::new(&codec, BosRule::Tokenizer, 96).unwrap();
    for (i, r) in requests.iter().enumerate() {
        let Encoded::Scored(pieces) = encoder.encode(i, r).unwrap() else { continue };
        let (mut sum, mut greedy) = (0.0, true);
        for p in pieces {
            let ids: Vec<u32> = p.ids[..=p.first].iter().chain(&p.targets).copied().collect();
            for (s, t) in model.score(&ids, p.first + 1..ids.len()).unwrap().iter().zip(&p.targets) {
                sum += f64::from(s.log_prob);
                greedy &= s.top1 == *t;
            }
        }
        match &found.answers[i].response {
            Response::LogLikelihood { log_prob, greedy: g } => {
                assert!((log_prob - sum).abs() < 1e-4, "{i}: {log_prob} {sum}");
                assert_eq!(*g, greedy);
            }
            Response::Rolling { log_prob } => assert!((log_prob - sum).abs() < 1e-3, "{i}: {log_prob} {sum}"),
            other => panic!("{other:?}"),
        }
    }
    // Sharing: less than the tokens asked for.
    assert!(found.work.computed_tokens * 3 < found.work.asked_tokens * 2, "{:?}", found.work);
    assert!(found.work.forks > 0);
}

/// Other budgets, slots and orders: not a bit changes. The scalar backend's order of additions is fixed by definition, so there
/// the engine itself is tested; the CPU backend has to keep it in every batch.
#[test]
fn budgets_and_order_change_no_bit() {
    let backends: [Arc<dyn Backend>; 2] = [Arc::new(ScalarBackend::new()), Arc::new(CpuBackend::new())];
    for backend in backends {
        let name = backend.name();
        let (model, codec) = load(&demo(), backend);
        let requests = requests();
        let expected = run(&model, &codec, &requests, options(1024, 64));
        for (batch, slots) in [(7, 1), (33, 3)] {
            let found = run(&model, &codec, &requests, options(batch, slots));
            assert_eq!(found.answers, expected.answers, "{name}: {batch} tokens, {slots} slots");
        }
        let few: Vec<usize> = vec![18, 9, 0, 3];
        let reordered: Vec<Request> = few.iter().map(|&i| requests[i].clone()).collect();
        let found = run(&model, &codec, &reordered, options(50, 5));
        assert!(found.answers.iter().eq(few.iter().map(|&i| &expected.answers[i])), "{name}: fewer, in another order");
    }
}

#[test]
fn a_model_beside_itself_does_not_drift() {
    let (model, codec) = load(&demo(), Arc::new(CpuBackend::new()));
    let engine = Engine::new(&model, Some(&model), &codec, options(256, 16)).unwrap();
    let found = engine.run(&requests(), &mut NoStore, &mut |_, _| ()).unwrap();
    let mut rows = 0;
    for a in &found.answers {
        assert_eq!(a.reference.as_ref(), Some(&a.response));
        for (_, d) in &a.drift {
            rows += 1;
            assert!(d.kl <= 1e-7 && d.reverse_kl <= 1e-7 && d.js <= 1e-7 && d.same_order == 10, "{d:?}");
        }
    }
    assert!(rows > 100);
    // The four choices of a question share their first position.
    assert_eq!(found.answers[0].drift[0].0, found.answers[1].drift[0].0);
    assert_ne!(found.answers[0].drift[0].0, found.answers[4].drift[0].0);
}

/// Answers come from the store when identity and request agree, and from nothing else.
#[test]
fn one_changed_weight_byte_misses() {
    let dir = tempfile::tempdir().unwrap();
    let (model_dir, cache_dir) = (dir.path().join("model"), dir.path().join("cache"));
    std::fs::create_dir(&model_dir).unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, model_dir.join(from.file_name().unwrap())).unwrap();
    }
    let requests: Vec<Request> = requests().into_iter().take(6).collect();
    let restored = |o: EngineOptions| {
        let (model, codec) = load(&model_dir, Arc::new(CpuBackend::new()));
        let engine = Engine::new(&model, None, &codec, o).unwrap();
        let sha = model_sha256(&model_dir).unwrap();
        let weights = Weights { candidate: &sha, reference: None, tokenizer: codec.sha256(), precision: "f32" };
        let mut cache = Cache::open(&cache_dir, &engine.identity(&weights)).unwrap();
        engine.run(&requests, &mut cache, &mut |_, _| ()).unwrap().restored
    };
    assert_eq!(restored(options(64, 4)), 0);
    assert_eq!(restored(options(32, 2)), 6);
    assert_eq!(restored(EngineOptions { max_length: Some(97), ..options(64, 4) }), 0);
    let weights = model_dir.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    assert_eq!(restored(options(64, 4)), 0);
}
