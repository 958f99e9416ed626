//! Loading by several threads, and the first step over what was loaded.

use std::sync::Arc;

use lowbit_checkpoint::ModelConfig;
use lowbit_kernels::backend::{Backend, Buffer, Segment, WeightHandle};
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_model::source::Source;
use lowbit_model::synthetic::{Synthetic, parse_format};
use lowbit_model::{KvCache, Model, ModelError};

fn tiny() -> Synthetic {
    Synthetic::new("tiny", parse_format("w4a16-g32").unwrap(), parse_format("w8a16-channel").unwrap(), 1).unwrap()
}

/// No weight of a block can be read.
struct Broken(Synthetic);

impl Source for Broken {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn prefix(&self) -> Result<&str, ModelError> {
        self.0.prefix()
    }

    fn weight(&self, b: &dyn Backend, module: &str, out: usize, n: usize) -> Result<WeightHandle, ModelError> {
        match module.contains("layers.") {
            true => Err(ModelError::Argument(format!("no {module}"))),
            false => self.0.weight(b, module, out, n),
        }
    }

    fn bias(&self, module: &str, out: usize) -> Result<Option<Vec<f32>>, ModelError> {
        self.0.bias(module, out)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        self.0.vector(name, len)
    }
}

#[test]
fn of_several_broken_blocks_the_first_is_told() {
    let backends: [Arc<dyn Backend>; 2] = [Arc::new(CpuBackend::new()), Arc::new(ScalarBackend::new())];
    assert_eq!(backends.each_ref().map(|b| b.uploads_in_parallel()), [true, false]);
    for backend in backends {
        let error = Model::load(&Broken(tiny()), backend).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|e| e.contains("no model.layers.0.self_attn.q_proj")), "{error:?}");
    }
}

#[test]
fn short_prompts_have_decodes_arithmetic_and_longer_ones_prefills() {
    let model = Model::load(&tiny(), Arc::new(CpuBackend::new())).unwrap();
    let most = model.backend().short_prompt();
    let bits = |run: &dyn Fn(&mut KvCache) -> Buffer| -> Vec<u32> {
        let mut cache = model.new_cache(1, most + 1).unwrap();
        let hidden = run(&mut cache);
        model.backend().download(&hidden).unwrap().iter().map(|v| v.to_bits()).collect()
    };
    for n in [1, most, most + 1] {
        let ids: Vec<u32> = (0..n as u32).map(|i| 7 * i + 3).collect();
        let all = [Segment { slot: 0, row: 0, tokens: n, past: 0 }];
        let prompt = bits(&|c| model.forward_prompt(&ids, &all, c).unwrap());
        let decode = bits(&|c| model.forward_decode(&ids, &all, c).unwrap());
        let prefill = bits(&|c| model.forward(&ids, &all, c).unwrap());
        assert_ne!(decode, prefill, "nothing would show which was taken");
        assert_eq!(prompt, if n <= most { decode } else { prefill }, "{n} tokens");
    }
}
