//! Bytes: weights, KV cache, the process.

use lowbit_model::Model;

use crate::Contender;
use crate::error::{BenchError, Result};
use crate::record::MemoryRow;

/// Bytes of keys and values of one token in all layers.
pub fn kv_bytes_per_token(model: &Model) -> Result<u64> {
    let config = model.config();
    let element = model.backend().kv_element_bytes(config.head_dim);
    kv_bytes(config.num_layers as u64, config.num_kv_heads as u64, config.head_dim as u64, element as u64)
}

fn kv_bytes(layers: u64, kv_heads: u64, head_dim: u64, element: u64) -> Result<u64> {
    [layers, kv_heads, head_dim, element]
        .iter()
        .try_fold(2u64, |product, &n| product.checked_mul(n))
        .ok_or(BenchError::Overflow("the KV cache"))
}

/// Bytes of weights and KV one decode step of `batch` sequences reads, on average over `steps` steps from a cache of
/// `depth` tokens each: step i attends to depth + i + 1 tokens. Weights are read once for all sequences.
pub fn bytes_per_decode_step(model: &Model, batch: usize, depth: usize, steps: usize) -> Result<u64> {
    step_bytes(model.decode_weight_bytes(batch), kv_bytes_per_token(model)?, batch, depth, steps)
}

/// Flops of the maths of a prompt of `tokens`: every linear of the blocks that it goes through for each token, the head for the last, and two
/// products of causal attention, a multiplication and an addition each.
pub fn flops_of_prefill(model: &Model, tokens: usize) -> Result<u64> {
    let c = model.config();
    let (blocks, head) = model.active_elements();
    let pairs = tokens as u128 * (tokens as u128 + 1) / 2;
    let widths = c.latent.as_ref().map_or(2 * c.head_dim, |l| l.key() + l.value);
    let attention = pairs * (c.num_layers * c.num_heads * widths) as u128;
    let flops = 2 * (u128::from(blocks) * tokens as u128 + u128::from(head) + attention);
    u64::try_from(flops).map_err(|_| BenchError::Overflow("the flops of a prompt"))
}

fn step_bytes(weights: u64, kv_per_token: u64, batch: usize, depth: usize, steps: usize) -> Result<u64> {
    let overflow = BenchError::Overflow("the bytes of a decode step");
    let twice_average = 2 * depth as u64 + steps as u64 + 1;
    let kv = kv_per_token.checked_mul(batch as u64).and_then(|b| b.checked_mul(twice_average)).map(|b| b / 2);
    kv.and_then(|kv| kv.checked_add(weights)).ok_or(overflow)
}

/// A row for every contender, the cache sized for one sequence of `kv_tokens`.
pub fn rows(contenders: &[Contender], kv_tokens: usize) -> Result<Vec<MemoryRow>> {
    let peak_rss_bytes = peak_rss_bytes();
    contenders
        .iter()
        .map(|c| {
            let per_token = kv_bytes_per_token(c.model)?;
            Ok(MemoryRow {
                role: c.role.to_string(),
                model: c.name.to_string(),
                weight_bytes: c.model.weight_bytes(),
                parameters: c.model.parameters(),
                kv_element_bytes: c.model.backend().kv_element_bytes(c.model.config().head_dim),
                kv_bytes: per_token.checked_mul(kv_tokens as u64).ok_or(BenchError::Overflow("the KV cache"))?,
                kv_tokens,
                peak_rss_bytes,
            })
        })
        .collect()
}

/// Peak resident memory of this process; `None` where `/proc` does not say.
pub fn peak_rss_bytes() -> Option<u64> {
    parse_peak(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn parse_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_is_read_from_status() {
        assert_eq!(parse_peak("VmPeak:\t  10 kB\nVmHWM:\t    2048 kB\n"), Some(2048 * 1024));
        assert_eq!(parse_peak("VmPeak:\t  10 kB\n"), None);
        assert_eq!(peak_rss_bytes().is_some(), cfg!(target_os = "linux"));
    }

    #[test]
    fn a_step_reads_weights_once_and_half_the_final_cache() {
        assert_eq!(kv_bytes(2, 3, 4, 2).unwrap(), 2 * 2 * 3 * 4 * 2);
        // Steps see 1, 2 and 3 tokens: 2 on average, in each of 5 sequences.
        assert_eq!(step_bytes(1000, 10, 5, 0, 3).unwrap(), 1000 + 10 * 2 * 5);
        assert_eq!(step_bytes(1000, 10, 5, 100, 3).unwrap(), 1000 + 10 * 102 * 5);
        assert!(step_bytes(1, u64::MAX, 2, 0, 3).is_err());
    }
}
