//! Attention with the heads of real models: of a prompt, which multiplies, and of a step of many sequences, which reads their caches.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use lowbit_kernels::backend::{AttentionShape, Backend, KvBuffer, Segment};
use lowbit_kernels::cpu::CpuBackend;
use lowbit_kernels::random::normals;

use crate::{COLD_BYTES, Ceilings, case};

/// Model, heads of queries, heads of keys and values, width of a head.
const HEADS: [(&str, usize, usize, usize); 3] =
    [("smollm2-135m", 9, 3, 64), ("llama-3.2-1b", 32, 8, 64), ("llama-3.1-8b", 32, 8, 128)];

/// Tokens of the prompt.
const PROMPT: usize = 512;
/// Tokens a sequence holds when its step comes, the step's own included.
const DEPTH: usize = 1024;

/// `slots` sequences of `tokens` random keys and values.
fn filled(cpu: &CpuBackend, slots: usize, tokens: usize, shape: &AttentionShape) -> KvBuffer {
    let mut cache = cpu.kv_cache(slots, tokens, shape.kv_heads, shape.head_dim).expect("a cache");
    let rows = |seed| cpu.upload(&normals(tokens * shape.kv_heads * shape.head_dim, 1.0, seed)).expect("rows");
    let (k, v) = (rows(1), rows(2));
    for slot in 0..slots {
        let all = [Segment { slot, row: 0, tokens, past: 0 }];
        cpu.kv_append(&mut cache, &k, &v, &all).expect("room for all tokens");
    }
    cache
}

/// All of them.
pub fn cases(c: &mut Criterion, cpu: &CpuBackend, ceilings: &Ceilings) {
    for (model, heads, kv_heads, head_dim) in HEADS {
        let scale = (head_dim as f32).sqrt().recip();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, soft_cap: None };
        let q = cpu.upload(&normals(PROMPT * heads * head_dim, 1.0, 3)).expect("queries");
        let cache = filled(cpu, 1, PROMPT, &shape);
        let prompt = [Segment { slot: 0, row: 0, tokens: PROMPT, past: 0 }];
        // A query meets the keys up to its own; each pair is two products a column, with the key and with the value.
        let pairs = heads * PROMPT * (PROMPT + 1) / 2;
        let operations = (4 * pairs * head_dim) as f64;
        let name = format!("attention/prompt{PROMPT}/{model}");
        let work = Throughput::Elements(operations as u64);
        case(c, &name, work, operations, (ceilings.f32, "f32"), &mut || {
            black_box(cpu.attention(&q, &cache, &shape, &prompt).expect("a prompt's attention"));
        });

        let one = 2 * DEPTH * kv_heads * head_dim * cpu.kv_element_bytes(head_dim);
        let slots = (COLD_BYTES / one).clamp(1, 256);
        let q = cpu.upload(&normals(slots * heads * head_dim, 1.0, 4)).expect("queries");
        let cache = filled(cpu, slots, DEPTH, &shape);
        let step: Vec<Segment> =
            (0..slots).map(|slot| Segment { slot, row: slot, tokens: 1, past: DEPTH - 1 }).collect();
        let bytes = (slots * one) as f64;
        let decode = cpu.decode_phase().expect("the CPU has a decode phase");
        let name = format!("attention/step-at-{DEPTH}/{model}/{slots}");
        case(c, &name, Throughput::Bytes(bytes as u64), bytes, (ceilings.bytes, "read bandwidth"), &mut || {
            black_box(decode.attention(&q, &cache, &shape, &step).expect("a step's attention"));
        });
    }
}
