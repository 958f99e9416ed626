//! What is folded leaves the float model as it was.

// Used by the integration test as well, which needs more of it.
#[expect(dead_code)]
#[path = "../../tests/dense/mod.rs"]
mod dense;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::store::StoredTensor;
use lowbit_kernels::backend::FloatType;
use lowbit_model::block::LinearGroup;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::dense::{BLOCKS, FAMILIES, distance, logits, write};
use super::Transform;
use super::block::{FloatBlock, Rotations};
use super::rotation::Rotation;

const GROUPS: [LinearGroup; 4] = [LinearGroup::Attention, LinearGroup::Output, LinearGroup::Mlp, LinearGroup::Down];

/// Scales of six powers of two either way multiply and divide every weight and norm twice; each is one rounding of f32, and the
/// sums of 24 and 40 products through two blocks and a head have as many. 2^-24 · 100 is 6e-6.
const CLOSE: f64 = 2e-5;

fn block(ckpt: &Checkpoint, index: usize) -> FloatBlock<'_> {
    FloatBlock::read(ckpt, &format!("model.layers.{index}"), index).unwrap()
}

/// The model with random scales of these groups in every block.
fn scaled(ckpt: &Checkpoint, groups: &[LinearGroup]) -> Checkpoint {
    let mut rng = StdRng::seed_from_u64(4);
    let mut tensors = Vec::new();
    for index in 0..BLOCKS {
        let mut float = block(ckpt, index);
        for group in groups {
            let n = float.group(*group).first().unwrap().0.in_features;
            let free = float.free(*group, &vec![0.0; n]).len();
            let s: Vec<f32> = (0..free).map(|_| rng.random_range(-4f32..4.0).exp()).collect();
            float.scale(*group, &s).unwrap();
        }
        tensors.extend(float.tensors(&|_| true).unwrap());
    }
    ckpt.overlay(tensors)
}

#[test]
fn scales_fold_into_every_place_of_every_family() {
    for family in FAMILIES {
        let tmp = tempfile::tempdir().unwrap();
        let ckpt = write(tmp.path(), family, |_| {});
        let before = logits(&ckpt);
        for group in GROUPS {
            let d = distance(&logits(&scaled(&ckpt, &[group])), &before);
            assert!(d <= CLOSE, "{family} {group:?}: {d}");
        }
        let all = scaled(&ckpt, &GROUPS);
        let d = distance(&logits(&all), &before);
        assert!(d <= CLOSE, "{family}: {d}");
        // Something moved: without the norms the model is another.
        let norm = "model.layers.1.input_layernorm.weight";
        let undone = all.overlay([(norm.to_string(), ckpt.store.get(norm).unwrap().clone())]);
        let d = distance(&logits(&undone), &before);
        assert!(d > 0.01, "{family}: {d}");
    }
}

#[test]
fn norms_that_are_stored_in_sixteen_bits_change_the_scale_and_not_the_model() {
    for kind in [FloatType::Bf16, FloatType::F16] {
        for family in ["llama", "gemma3_text"] {
            let tmp = tempfile::tempdir().unwrap();
            let ckpt = write(tmp.path(), family, |_| {});
            let round = |(name, t): (&str, &StoredTensor)| {
                (name.to_string(), StoredTensor::floats(kind, t.shape.clone(), &t.to_f32().unwrap()))
            };
            let half = ckpt.overlay(ckpt.store.iter().map(round));
            let all = scaled(&half, &GROUPS);
            let stored = all.store.get("model.layers.0.input_layernorm.weight").unwrap();
            assert_eq!(stored.float_type(), Some(kind));
            let d = distance(&logits(&all), &logits(&half));
            assert!(d <= CLOSE, "{family} {kind:?}: {d}");
        }
    }
}

#[test]
fn rotated_heads_are_undone_by_o() {
    for family in FAMILIES {
        let tmp = tempfile::tempdir().unwrap();
        let ckpt = write(tmp.path(), family, |_| {});
        // The residual stream stays: rotating it takes embedding and head as well, which the integration tests do.
        let mut tensors = Vec::new();
        for index in 0..BLOCKS {
            let mut float = block(&ckpt, index);
            float.rotate(&Rotations { residual: Rotation::identity(24), values: Rotation::new(6, index as u32) });
            tensors.extend(float.tensors(&|_| true).unwrap());
        }
        let d = distance(&logits(&ckpt.overlay(tensors)), &logits(&ckpt));
        assert!(d <= CLOSE, "{family}: {d}");
    }
}

#[test]
fn names_are_read_and_written() {
    for name in ["rotate", "awq", "smoothquant=0.5", "smoothquant=0.85", "smoothquant=0", "smoothquant=1"] {
        assert_eq!(Transform::parse(name).map(Transform::name).as_deref(), Some(name));
    }
    assert_eq!(Transform::parse("smoothquant"), Some(Transform::SmoothQuant { alpha: 0.5 }));
    for bad in
        ["", "quarot", "awq=1", "rotate=2", "smoothquant=", "smoothquant=1.5", "smoothquant=-0.1", "smoothquant=NaN"]
    {
        assert_eq!(Transform::parse(bad), None, "{bad}");
    }
}
