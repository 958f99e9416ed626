//! Writing beside the work: the folder is the one that writing in its stead makes, and whoever works hears of an error.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_kernels::{GroupSize, Scheme};

use super::output::{Halt, Made, MadeLinear, Output};
use super::{Progress, Silent, first_not_finite, read_dense};
use crate::error::{QuantizeError, Result};
use crate::plan::{self, Method, Plan, QuantizeOptions};
use crate::record::LayerRecord;
use crate::resume::{Chain, Resume, linears_of};
use crate::solve::round_any;

/// Blocks that are made.
const BLOCKS: usize = 2;

#[derive(Default)]
struct Steps(AtomicU64);

impl Progress for Steps {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    fn detail(&self, _: &str) {}
}

fn demo() -> Checkpoint {
    Checkpoint::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"))).unwrap()
}

fn planned(ckpt: &Checkpoint) -> Plan {
    let scheme = Scheme::parse("w4a16", GroupSize::Cols(64), true).unwrap();
    let options = QuantizeOptions { method: Method::Rtn, ..QuantizeOptions::new(scheme) };
    plan::make(ckpt, &options, None, 0).unwrap()
}

fn output<'a>(target: &Path, plan: &'a Plan) -> Output<'a> {
    let chain = Chain::start(&Resume { identity: "test".into(), fresh: false }, plan, None);
    let key = chain.key().unwrap().to_string();
    let writer = CheckpointWriter::resume(target, plan.declared.clone(), 1 << 20, false, &key, false).unwrap();
    Output { writer, chain, plan }
}

fn made(ckpt: &Checkpoint, plan: &Plan) -> Vec<Made> {
    let mut all = Vec::new();
    for block in 0..BLOCKS {
        let mut records = Vec::new();
        for l in linears_of(plan, block) {
            let (out, n) = (l.out_features, l.in_features);
            let w = read_dense(ckpt, &l.source, out, n).unwrap();
            let opts = plan.options.solver(l.scheme, plan.layout.scales);
            let solved = round_any(&w, out, n, l.wanted(), 0.0, &opts).unwrap();
            records.push(LayerRecord { name: l.module.clone(), block: Some(block), ..LayerRecord::default() });
            all.push(Made::Linear(Box::new(MadeLinear { planned: l.clone(), solved, rule: None })));
        }
        all.push(Made::Block { block, records, fold: None, experts: None, steps: 1 });
    }
    all
}

/// Shards and kept blocks of an unfinished output.
fn contents(output: &Output<'_>) -> BTreeMap<String, Vec<u8>> {
    let folder = output.writer.unfinished().0;
    let entries = [folder.to_path_buf(), folder.join(".journal")].map(|f| std::fs::read_dir(f).unwrap());
    let paths = entries.into_iter().flatten().map(|e| e.unwrap().path());
    let wanted = paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors" || e == "json"));
    wanted.map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap())).collect()
}

#[test]
fn beside_the_work_the_same_is_written() {
    let (tmp, ckpt) = (tempfile::tempdir().unwrap(), demo());
    let plan = planned(&ckpt);
    let mut one_by_one = output(&tmp.path().join("a"), &plan);
    for one in made(&ckpt, &plan) {
        one_by_one.write(one, &Silent).unwrap();
    }
    let mut beside = output(&tmp.path().join("b"), &plan);
    let (stop, steps) = (AtomicBool::new(false), Steps::default());
    let all = made(&ckpt, &plan);
    let count = all.len();
    let given = beside.beside(&Halt::new(&stop), &steps, |hand| {
        all.into_iter().try_for_each(|one| hand.give(one))?;
        Ok(count)
    });
    assert_eq!(given.unwrap(), count);
    assert_eq!(steps.0.load(Ordering::Relaxed), BLOCKS as u64);
    let (found, wanted) = (contents(&beside), contents(&one_by_one));
    assert!(wanted.contains_key("block-00001.json"), "{:?}", wanted.keys());
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (name, bytes) in wanted {
        assert!(found[&name] == bytes, "{name}");
    }
}

#[test]
fn what_cannot_be_written_ends_the_work_and_is_what_is_told() {
    let (tmp, ckpt) = (tempfile::tempdir().unwrap(), demo());
    let plan = planned(&ckpt);
    let mut output = output(&tmp.path().join("a"), &plan);
    let stop = AtomicBool::new(false);
    let halt = Halt::new(&stop);
    let tensor = || Made::Tensor { name: "nothing".into(), data: vec![1] };
    let told = output.beside(&halt, &Silent, |hand| -> Result<()> {
        hand.give(tensor())?;
        // Heard of without handing over more.
        let began = Instant::now();
        while halt.check().is_ok() {
            assert!(began.elapsed() < Duration::from_secs(60), "never heard of");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(hand.give(tensor()), Err(QuantizeError::Interrupted)));
        Err(QuantizeError::no_data("the work", "another"))
    });
    let told = told.unwrap_err().to_string();
    assert!(told.contains("tensor `nothing` was never declared"), "{told}");
}

#[test]
fn what_was_handed_over_is_written_when_the_work_is_stopped_or_panics() {
    let (tmp, ckpt) = (tempfile::tempdir().unwrap(), demo());
    let plan = planned(&ckpt);
    let (stop, steps) = (AtomicBool::new(false), Steps::default());
    let halt = Halt::new(&stop);
    let mut one = output(&tmp.path().join("a"), &plan);
    let all = made(&ckpt, &plan);
    let stopped = one.beside(&halt, &steps, |hand| {
        all.into_iter().try_for_each(|one| hand.give(one))?;
        stop.store(true, Ordering::Relaxed);
        halt.check()
    });
    assert!(matches!(stopped, Err(QuantizeError::Interrupted)));
    assert_eq!((steps.0.load(Ordering::Relaxed), one.writer.unfinished().1), (BLOCKS as u64, BLOCKS));

    let mut one = output(&tmp.path().join("b"), &plan);
    let all = made(&ckpt, &plan);
    let work = || {
        one.beside(&halt, &Silent, |hand| -> Result<()> {
            all.into_iter().try_for_each(|one| hand.give(one))?;
            panic!("in the work");
        })
    };
    assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
    assert_eq!(one.writer.unfinished().1, BLOCKS);
}

#[test]
fn all_threads_find_the_first_place_that_one_finds() {
    use lowbit_checkpoint::store::StoredTensor;
    use lowbit_kernels::backend::FloatType;
    let mut values: Vec<f32> = (0..super::PART * 2 + 7).map(|i| i as f32 / 1024.0).collect();
    for kind in [FloatType::F32, FloatType::Bf16] {
        let tensor = |values: &[f32]| StoredTensor::floats(kind, vec![values.len()], values);
        let t = tensor(&values);
        assert_eq!(super::widened(&t), t.to_f32());
        assert_eq!(first_not_finite(&t), None);
        let last = values.len() - 1;
        for at in [last, super::PART, super::PART - 1] {
            let kept = std::mem::replace(&mut values[at], f32::INFINITY);
            assert_eq!(first_not_finite(&tensor(&values)), Some((at, f32::INFINITY)));
            values[last] = f32::INFINITY;
            assert_eq!(first_not_finite(&tensor(&values)), Some((at, f32::INFINITY)));
            values[last] = 1.0;
            values[at] = kept;
        }
    }
}
