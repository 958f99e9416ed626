//! Before any run: does it fit, how many requests at once, and how fast could it be at best.
//!
//! All rates are ceilings: memory read once a step at the sheet's bandwidth, products at its dense rate. Real engines reach
//! half to four fifths of it; measure before you buy.

use serde::Serialize;

use crate::capacity::gpus::Gpu;
use crate::capacity::shape::ModelShape;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SchemeCost {
    /// Name.
    pub name: &'static str,
    /// Bits of a block's weight, scales included. Embedding and head stay bf16.
    pub bits: f64,
    /// Products run at the FP8 rate.
    pub fp8: bool,
}

/// bf16; 8-bit codes with a bf16 scale per channel (no bits to speak of); 4 bits with a bf16 scale per 128 columns.
pub const SCHEMES: &[SchemeCost] = &[
    SchemeCost { name: "bf16", bits: 16.0, fp8: false },
    SchemeCost { name: "fp8", bits: 8.0, fp8: true },
    SchemeCost { name: "w8a16", bits: 8.0, fp8: false },
    SchemeCost { name: "w4a16", bits: 4.125, fp8: false },
];

/// The load and the room.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EstimateOptions {
    /// Prompt tokens.
    pub input: u64,
    /// Output tokens.
    pub output: u64,
    /// GPUs that share the weights (tensor parallel; their traffic is not counted).
    pub gpus: u64,
    /// Share of the memory an engine may use.
    pub utilization: f64,
    /// Activations, graphs and fragments, bytes a GPU.
    pub workspace_bytes: f64,
    /// Bytes of a key or value.
    pub kv_bytes: f64,
}

impl Default for EstimateOptions {
    fn default() -> Self {
        Self { input: 512, output: 256, gpus: 1, utilization: 0.9, workspace_bytes: 2e9, kv_bytes: 2.0 }
    }
}

/// One scheme on one card.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Scheme.
    pub scheme: &'static str,
    /// Weights, bytes.
    pub weight_bytes: f64,
    /// Left for keys and values; negative when the weights do not fit.
    pub kv_room_bytes: f64,
    /// At least one request of full length fits.
    pub fits: bool,
    /// Requests of full length at once.
    pub concurrency: u64,
    /// Tokens a second of one stream, at best.
    pub decode_one: f64,
    /// Output tokens a second at full concurrency, at best.
    pub decode_full: f64,
    /// Time of a decode step at full concurrency: ITL at best, ms.
    pub itl_ms: f64,
    /// Prefill of one prompt alone: TTFT at best, ms.
    pub ttft_ms: f64,
    /// Requests a second when prefill and decode share the card, at best.
    pub requests_per_second: f64,
}

/// What weights leave for keys and values on so many cards; negative when they do not fit.
pub fn kv_room_bytes(gpu: &Gpu, weight_bytes: f64, o: &EstimateOptions) -> f64 {
    let gpus = o.gpus.max(1) as f64;
    gpu.memory_bytes as f64 * gpus * o.utilization - weight_bytes - o.workspace_bytes * gpus
}

/// Every scheme of `schemes`.
pub fn estimate(shape: &ModelShape, gpu: &Gpu, schemes: &[SchemeCost], o: &EstimateOptions) -> Vec<Estimate> {
    let gpus = o.gpus.max(1) as f64;
    let bandwidth = gpu.bandwidth * gpus;
    let kv = shape.kv_bytes_per_token(o.kv_bytes);
    schemes
        .iter()
        .map(|s| {
            let linears = shape.linear_params() as f64 * s.bits / 8.0;
            let rest = (shape.params() - shape.linear_params()) as f64 * 2.0;
            let weight_bytes = linears + rest;
            // An embedding is looked up, not read: a step reads the linears and the head.
            let head = (shape.vocab * shape.hidden) as f64 * 2.0;
            let room = kv_room_bytes(gpu, weight_bytes, o);
            let length = (o.input + o.output).max(1) as f64;
            let concurrency = (room / (kv * length)).floor().max(0.0) as u64;
            let flops = gpus * if s.fp8 && gpu.fp8_flops > 0.0 { gpu.fp8_flops } else { gpu.bf16_flops };
            let per_token = 2.0 * (shape.linear_params() + shape.vocab * shape.hidden) as f64;
            // Half the answer is there on average.
            let context = o.input as f64 + o.output as f64 / 2.0;
            let step =
                |batch: f64| ((linears + head + batch * kv * context) / bandwidth).max(batch * per_token / flops);
            // Scores and values: 4 · heads · head_dim a pair of tokens, half of the pairs being causal.
            let pairs = (o.input * o.input) as f64 / 2.0;
            let attention = 4.0 * pairs * (shape.layers * shape.heads * shape.head_dim) as f64;
            let prefill = ((2.0 * shape.linear_params() as f64 * o.input as f64 + attention) / flops)
                .max((linears + head) / bandwidth);
            let batch = concurrency.max(1) as f64;
            let fits = concurrency > 0;
            let busy = prefill + o.output as f64 * step(batch) / batch;
            let when = |v: f64| if fits { v } else { 0.0 };
            Estimate {
                scheme: s.name,
                weight_bytes,
                kv_room_bytes: room,
                fits,
                concurrency,
                decode_one: when(1.0 / step(1.0)),
                decode_full: when(batch / step(batch)),
                itl_ms: when(step(batch) * 1e3),
                ttft_ms: when(prefill * 1e3),
                requests_per_second: when(1.0 / busy),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_and_seventy_billion_on_one_h200() {
        let (gpu, o) = (Gpu::find("H200").unwrap(), EstimateOptions::default());
        let of = |name: &str| estimate(&ModelShape::known(name).unwrap(), gpu, SCHEMES, &o);
        let (small, large) = (of("8b"), of("70b"));
        assert!(small.iter().all(|e| e.fits));
        // 70.55 G weights of 2 bytes are 141.1 GB, over 126.9 − 2; at 8 bits 72.6 GB, at 4.125 bits 39.5 GB fit.
        assert_eq!(large.iter().map(|e| e.fits).collect::<Vec<_>>(), [false, true, true, true]);
        assert!(
            (large[0].weight_bytes / 141.1e9 - 1.0).abs() < 1e-3 && (large[3].weight_bytes / 39.5e9 - 1.0).abs() < 5e-3,
            "{large:?}"
        );
        // By hand: (126.9 − 2 − 16.06) GB / (131,072 bytes · 768 tokens).
        assert_eq!(small[0].concurrency, ((0.9 * 141e9 - 2e9 - small[0].weight_bytes) / (131_072.0 * 768.0)) as u64);
        assert_eq!(large[0].decode_one, 0.0);
        assert!(large[3].concurrency > large[1].concurrency && large[3].decode_one > large[1].decode_one);
    }
}
