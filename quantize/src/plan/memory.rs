//! Peak resident memory of a run on the CPU: what is alive at once, term by term, in each of its phases. The largest phase counts.
//!
//! | phase | alive |
//! |---|---|
//! | copying | a tensor of the original, mapped |
//! | without data | a linear: its floats, its codes, the original's bytes, mapped; the codes and packed bytes of those that are written |
//! | embedding the windows | the table, mapped; the residual stream of every token, once a stream |
//! | forward through a stage | that, what the stage leaves to the next, the sums of its input, what a chunk needs meanwhile |
//! | solving a group | the same without the chunk; the sums, the factor and the triangle it is made of, or the factor and a linear |
//! | learning a block | inputs and targets of all tokens, a step's activations with their gradients, the weights four times |
//! | rounding a table | as a linear without data |
//!
//! On a GPU a part of this is in its memory. What the process and the allocator hold beside it is measured, not known: three constants.

use std::collections::BTreeMap;

use lowbit_calibration::sequential::CHUNK_TOKENS;
use lowbit_checkpoint::{Checkpoint, ModelConfig};
use lowbit_kernels::WeightFormat;
use lowbit_model::block::LinearGroup;

use super::{PlannedLinear, QuantizeOptions};
use crate::experts::expert_plan;
use crate::scale_search::ScaleSearch;
use crate::transform::transform_bytes;

/// Bytes of an f32.
const F32: u64 = 4;
/// The process without the model: the program's pages, the allocator, headers, hashing.
const PROCESS: u64 = 18_000_000;
/// What calibrating adds to that: the tokenizer, threads with the panels of their products, more of the program.
const CALIBRATING: u64 = 14_000_000;
/// What the allocator keeps of freed buffers: twice its largest threshold for mapping one of its own (glibc: 32 MiB).
const KEPT: u64 = 64 << 20;
/// Tokens of a step of learned rounding: eight windows of the usual length.
const LEARNED_TOKENS: u64 = 8 * 512;
/// More tokens than any run has, and few enough for products of widths, streams and bytes.
const MOST_TOKENS: u64 = 1 << 40;

/// Bytes that quantizing `linears` of `ckpt` with `tokens` of calibration holds at its peak.
pub(crate) fn peak_memory(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    linears: &[PlannedLinear],
    tokens: usize,
) -> u64 {
    let c = &ckpt.config;
    let process = PROCESS + transform_bytes(c, options);
    let stored =
        |l: &PlannedLinear| ckpt.store.find(&format!("{}.weight", l.source)).map_or(0, |t| t.data.size() as u64);
    let round = |l: &PlannedLinear| rounding(l) + stored(l);
    let largest = |blocks: bool| linears.iter().filter(|l| l.block.is_some() == blocks).map(round).max().unwrap_or(0);
    let (blocks, others) = mapped(ckpt);
    let around = largest(false).max(others);
    if !options.needs_data() {
        return process + around.max(largest(true));
    }
    let run = Run::new(c, options, tokens);
    let start = others + run.carried(0);
    let block = if run.learned { run.learning(c) } else { run.block(c, options, linears) };
    process + CALIBRATING + around.max(start).max(blocks + block)
}

/// Bytes of the largest block, which is mapped while it is worked on, and of the largest tensor outside of them.
fn mapped(ckpt: &Checkpoint) -> (u64, u64) {
    let (mut blocks, mut others) = (BTreeMap::<&str, u64>::new(), 0);
    for (name, t) in ckpt.store.iter() {
        let size = t.data.size() as u64;
        match name.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.')) {
            Some((block, _)) => *blocks.entry(block).or_default() += size,
            None => others = size.max(others),
        }
    }
    (blocks.into_values().max().unwrap_or(0), others)
}

fn elements(l: &PlannedLinear) -> u64 {
    l.out_features as u64 * l.in_features as u64
}

/// A linear that is written and one that waits for it while the next is worked on: their codes, of a byte, and the packed bytes of the one,
/// which are no more.
fn written(elements: u64) -> u64 {
    3 * elements
}

/// A linear that is rounded on its own, beside the original's bytes: floats and codes, and what is written meanwhile. There is no Hessian. Where a global scale is shared, the set's other floats are looked at, one linear at a time.
fn rounding(l: &PlannedLinear) -> u64 {
    let set = l.scheme.weight == WeightFormat::Nvfp4 && l.group.is_some();
    elements(l) * (F32 + 1 + if set { F32 } else { 0 }) + written(elements(l))
}

/// What the terms of a calibrated run are made of.
struct Run {
    hidden: u64,
    /// Width of the dense MLP.
    wide: u64,
    /// Widths of queries, and of keys or values.
    heads: [u64; 2],
    /// Experts a token, and their width; zero without experts.
    routed: [u64; 2],
    /// Tokens whose activations are in memory.
    tokens: u64,
    /// Of them in a chunk.
    chunk: u64,
    /// Activations are on disk.
    offload: bool,
    /// The float model runs beside the quantized one.
    float: bool,
    weighted: bool,
    /// Linears are solved under a Hessian.
    solves: bool,
    /// The damped Hessian is held beside its factor: for sweeps, or a search by blocks.
    damped: bool,
    learned: bool,
}

impl Run {
    fn new(c: &ModelConfig, options: &QuantizeOptions, tokens: usize) -> Self {
        let recipe = options.method.recipe();
        let all = (tokens as u64).min(MOST_TOKENS);
        // Of a smaller chunk, rows wait for the usual number to be summed together.
        let chunk = all.clamp(1, options.chunk_tokens.max(CHUNK_TOKENS) as u64);
        // A method that looks at whole blocks has all tokens in memory whatever is on disk.
        let offload = options.offload.is_some() && !recipe.learned;
        let query = c.latent.as_ref().map_or(c.head_dim, |l| l.value.max(c.head_dim));
        Self {
            hidden: c.hidden_size as u64,
            wide: c.intermediate_size as u64,
            heads: [(c.num_heads * query) as u64, (c.num_kv_heads * c.head_dim) as u64],
            routed: c.experts.as_ref().map_or([0, 0], |e| [e.per_token as u64, e.intermediate_size as u64]),
            tokens: if offload { chunk } else { all },
            chunk,
            offload,
            float: recipe.float_stream(),
            weighted: recipe.token_weights,
            solves: options.method.calibrated(),
            damped: recipe.sweeps > 0 || options.scale_search == ScaleSearch::Blocks,
            learned: recipe.learned,
        }
    }

    /// The residual stream, and what a stage of `width` leaves to the next, once a stream.
    fn carried(&self, width: u64) -> u64 {
        (1 + u64::from(self.float)) * self.tokens * (self.hidden + width) * F32
    }

    /// The largest phase of a block: the forward pass to a group's sums, or solving a linear of the group.
    fn block(&self, c: &ModelConfig, options: &QuantizeOptions, linears: &[PlannedLinear]) -> u64 {
        let sparse = |l: &PlannedLinear| l.block.is_some_and(|b| c.experts_of(b).is_some());
        let grouped = || linears.iter().filter_map(|l| Some((l, l.group?)));
        let most = grouped().map(|(l, group)| self.passing(l, group)).max().unwrap_or(self.chunk * self.hidden * F32);
        let kept = self.kept(most);
        // The sums of all experts of a batch, those of the whole layer, and who goes where.
        let batch = expert_plan(c, options).map_or(0, |e| e.hessian_bytes_at_once);
        let layer = self.hidden * self.hidden * F32 * (1 + u64::from(self.float));
        let experts = batch + layer + self.tokens * self.routed[0] * 8;
        let phases = grouped().map(|(l, group)| {
            let held = match group {
                LinearGroup::Output => l.in_features as u64,
                // Beside experts it is computed once more.
                LinearGroup::Down if !sparse(l) => l.in_features as u64,
                _ => 0,
            };
            let around = if matches!(group, LinearGroup::Expert(_) | LinearGroup::ExpertDown(_)) { experts } else { 0 };
            let sums = self.sums(l, group);
            // They are brought to the host before the device's go.
            let solving = self.solving(l, group).max(2 * sums) + kept;
            self.carried(held) + around + solving.max(sums + self.passing(l, group))
        });
        // Without a linear to quantize, for scales of keys and values alone, the streams go through nevertheless.
        let phase = phases.max().unwrap_or(self.carried(self.wide) + most + kept);
        // A chunk on its way to a file and back: its bytes, its values, and the buffer.
        let files = if self.offload { 3 * self.chunk * self.hidden.max(self.wide).max(self.heads[0]) * F32 } else { 0 };
        // What takes the place of the block's linears, at most a byte a weight.
        let mut replaced = BTreeMap::<usize, u64>::new();
        linears
            .iter()
            .filter_map(|l| Some((l.block?, elements(l))))
            .for_each(|(b, n)| *replaced.entry(b).or_default() += n);
        let writing = linears.iter().map(|l| written(elements(l))).max().unwrap_or(0);
        phase + files + writing + replaced.into_values().max().unwrap_or(0)
    }

    /// The sums of a group's input: its Hessian, and with a float stream the drift of the input and, where the output is added to the
    /// residual stream, of that.
    fn sums(&self, l: &PlannedLinear, group: LinearGroup) -> u64 {
        let n = l.in_features as u64;
        let residual = matches!(group, LinearGroup::Output | LinearGroup::Down);
        let drift = if self.float { n * n + if residual { elements(l) } else { 0 } } else { 0 };
        (n * n + drift) * F32
    }

    /// What a chunk needs on its way to a group's sums.
    fn passing(&self, l: &PlannedLinear, group: LinearGroup) -> u64 {
        let (h, n, [q, kv]) = (self.hidden, l.in_features as u64, self.heads);
        let forward = match group {
            // The norm's output and o's, queries, what is attended, keys and values with their cache.
            LinearGroup::Attention | LinearGroup::Query | LinearGroup::KeyValue | LinearGroup::Output => {
                2 * h + 2 * q + 4 * kv
            }
            LinearGroup::Mlp | LinearGroup::Down => h + 2 * self.wide,
            LinearGroup::Expert(_) | LinearGroup::ExpertDown(_) => self.routed[0] * (h + 2 * self.routed[1]),
        };
        // The columns rounded to 16 bits, a weighted copy, and of the float stream the difference and its columns.
        let adding = n * (2 + if self.weighted { F32 } else { 0 } + if self.float { F32 + 2 } else { 0 });
        // With two streams, what one pass through the block frees is not what the sums take.
        self.chunk * if self.float { forward * F32 + adding } else { (forward * F32).max(adding) }
    }

    /// What the allocator keeps of the chunks' buffers: what one chunk needs, and after some chunks, between what they leave, a part of it
    /// once more: measured, between nothing and three quarters.
    fn kept(&self, passing: u64) -> u64 {
        let two = 2 * self.chunk;
        passing.min(KEPT) * self.tokens.clamp(two, 5 * self.chunk / 2) / two
    }

    /// Solving one linear beside its group's sums.
    fn solving(&self, l: &PlannedLinear, group: LinearGroup) -> u64 {
        let (square, sums) = ((l.in_features as u64).pow(2) * F32, self.sums(l, group));
        // Floats, codes, and the floats that the codes stand for, which the loss compares.
        let weights = elements(l) * (F32 + 1 + F32);
        if !self.solves {
            return sums + weights;
        }
        // A triangle and its inverse, which is the factor.
        let factorizing = 2 * square;
        // The factor, and what sweeps read; with a float stream the corrected target.
        let damped = if self.damped { square } else { 0 };
        let target = if self.float { elements(l) * F32 } else { 0 };
        sums + factorizing.max(square + damped + weights + target)
    }

    /// Learning a block: both streams; inputs and targets of all tokens; weights, rounded weights, gradients and offsets; and a step's
    /// activations with their gradients.
    fn learning(&self, c: &ModelConfig) -> u64 {
        let (h, m, [q, kv]) = (self.hidden, c.intermediate_size as u64, self.heads);
        let weights = 2 * h * (q + kv) + 3 * h * m;
        let activations = self.tokens.min(LEARNED_TOKENS) * (9 * h + 4 * q + 6 * kv + 6 * m);
        self.carried(0) + F32 * (2 * self.tokens * h + 4 * weights + activations)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lowbit_kernels::{GroupSize, Scheme};

    use super::*;
    use crate::plan::{Method, make};

    /// Hidden and intermediate width of the demo.
    const H: u64 = 256;
    const M: u64 = 768;

    fn demo() -> Checkpoint {
        Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/demo")).unwrap()
    }

    fn options(method: Method) -> QuantizeOptions {
        let scheme = Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(64) };
        QuantizeOptions { method, ..QuantizeOptions::new(scheme) }
    }

    fn peak(options: &QuantizeOptions, tokens: usize) -> u64 {
        make(&demo(), options, None, tokens).unwrap().record.peak_memory_bytes
    }

    /// The run, and sums and solving of down.
    fn down(method: Method) -> (Run, u64, u64) {
        let (ckpt, options) = (demo(), options(method));
        let plan = make(&ckpt, &options, None, 4096).unwrap();
        let run = Run::new(&ckpt.config, &options, 4096);
        let l = plan.linears.iter().find(|l| l.group == Some(LinearGroup::Down)).unwrap();
        let (sums, solving) = (run.sums(l, LinearGroup::Down), run.solving(l, LinearGroup::Down));
        (run, sums, solving)
    }

    #[test]
    fn rounding_to_nearest_holds_a_linear_and_no_hessian() {
        // Floats, codes, what is written meanwhile, and the original's two bytes: more than the bytes of a table, which is copied. Tokens do not count.
        for method in [Method::Rtn, Method::Hqq] {
            assert_eq!(peak(&options(method), 1 << 20), PROCESS + H * M * 10);
        }
        let tables = QuantizeOptions { head_w8: true, ..options(Method::Rtn) };
        assert_eq!(peak(&tables, 0), PROCESS + 2048 * H * 10);
    }

    #[test]
    fn gptq_holds_the_hessian_and_its_factor() {
        let (run, sums, solving) = down(Method::Gptq);
        assert_eq!((run.float, run.damped), (false, false));
        assert_eq!(sums, 4 * M * M);
        // The triangle that is inverted is larger than what a linear of these rows needs.
        assert_eq!(solving, sums + 2 * 4 * M * M);
        assert!(peak(&options(Method::Gptq), 1) > peak(&options(Method::Rtn), 1) + sums);
    }

    #[test]
    fn fast_adds_the_damped_hessian_and_best_the_drift_and_its_target() {
        let (run, sums, solving) = down(Method::Fast);
        assert_eq!((run.float, run.damped, run.weighted), (false, true, true));
        assert_eq!((sums, solving), (4 * M * M, sums + 2 * 4 * M * M + 9 * H * M));
        let (run, sums, solving) = down(Method::Best);
        assert_eq!((run.float, run.damped, run.weighted), (true, true, true));
        assert_eq!(sums, 4 * (2 * M * M + H * M));
        assert_eq!(solving, sums + 2 * 4 * M * M + 13 * H * M);
    }

    #[test]
    fn activations_count_by_token_and_stream_unless_they_are_on_disk() {
        let more = |options: &QuantizeOptions| peak(options, 32768) - peak(options, 16384);
        assert_eq!(more(&options(Method::Gptq)), 16384 * 4 * (H + M));
        assert_eq!(more(&options(Method::Best)), 2 * 16384 * 4 * (H + M));
        let offload = Some("activations".into());
        assert_eq!(more(&QuantizeOptions { offload, ..options(Method::Best) }), 0);
        // Nor do more tokens than there are bytes end in an overflow.
        assert!(peak(&options(Method::Best), usize::MAX) > peak(&options(Method::Best), 1 << 30));
    }
}
