//! The driver's side of writing: a thread packs, writes and keeps what was solved while what comes next is calibrated and solved.
//!
//! From the first linear to the last table every call that changes files of the output is this thread's, in the order in which things
//! were made. So the bytes, and what is there when one of those calls fails or is the process's last, are what they would be if
//! each thing were written before the next one is begun. What can be in memory beside what is worked on is one thing that is written and
//! [`WAITING`] that wait: linears, not blocks, which with hundreds of experts would be large.
//!
//! Without data nothing but this and reading costs: what a run cannot do without is to read the floats once (2 bytes a weight of a bf16
//! model), to write the codes and scales once (some 0.52 bytes a weight at 4 bits with groups of 128), and to hash what it writes where
//! blocks are kept. Floats are asked for a block ahead; all threads widen, round and compare them, and pack integers and super-blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use lowbit_checkpoint::linear;
use lowbit_checkpoint::writer::CheckpointWriter;
use lowbit_kernels::activation::InputRule;
use lowbit_kernels::{KernelError, QuantizedWeight, ggml};

use super::Progress;
use crate::error::{QuantizeError, Result};
use crate::plan::{Plan, PlannedLinear};
use crate::record::{ExpertCoverage, LayerRecord};
use crate::resume::Chain;
use crate::solve::Solved;
use crate::transform::BlockFold;

/// Things that wait while another is written; whoever makes one more waits, too.
const WAITING: usize = 1;

/// A thing to write.
pub(super) enum Made {
    /// A solved linear.
    Linear(Box<MadeLinear>),
    /// A tensor as the output holds it.
    Tensor {
        /// Its name.
        name: String,
        /// Its bytes.
        data: Vec<u8>,
    },
    /// A block, all of whose tensors came before.
    Block {
        /// Its number.
        block: usize,
        /// Of its linears.
        records: Vec<LayerRecord>,
        /// How it was transformed, where it was.
        fold: Option<BlockFold>,
        /// What its experts saw, where it has some that were calibrated.
        experts: Option<ExpertCoverage>,
        /// Steps of progress that are done when it is kept.
        steps: u64,
    },
}

/// A solved linear and how its input is rounded.
pub(super) struct MadeLinear {
    /// What it was to become.
    pub(super) planned: PlannedLinear,
    /// What it became.
    pub(super) solved: Solved,
    /// Of its input, where that is rounded.
    pub(super) rule: Option<InputRule>,
}

/// Whether work is to end before it is done: the user asked for it, or what was made cannot be written.
#[derive(Clone)]
pub(super) struct Halt<'a> {
    stop: &'a AtomicBool,
    failed: Arc<AtomicBool>,
}

impl<'a> Halt<'a> {
    /// `stop` is the user's.
    pub(super) fn new(stop: &'a AtomicBool) -> Self {
        Self { stop, failed: Arc::new(AtomicBool::new(false)) }
    }

    /// An error where work is to end. Of a failed write it is not the error to tell: [`Output::beside`] has that.
    pub(super) fn check(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed) {
            true => Err(QuantizeError::Interrupted),
            false => Ok(()),
        }
    }
}

/// Where what is made is handed to the thread that writes. Dropped, it lets that thread end.
pub(super) struct Hand(SyncSender<Made>);

impl Hand {
    /// Hands a thing over; waits while [`WAITING`] others do. Fails when an earlier one could not be written, as [`Halt::check`] does.
    pub(super) fn give(&self, made: Made) -> Result<()> {
        self.0.send(made).map_err(|_| QuantizeError::Interrupted)
    }
}

/// The output: its writer and the keys of the blocks kept there.
pub(super) struct Output<'a> {
    /// Of the checkpoint.
    pub(super) writer: CheckpointWriter,
    /// Of the blocks.
    pub(super) chain: Chain,
    /// What is to be made.
    pub(super) plan: &'a Plan,
}

impl Output<'_> {
    /// Does `work` and writes beside it what it hands over. Returns when both have ended; all that was handed over is written then,
    /// up to the first thing that cannot be. Its error is returned before that of `work`, which was made later or follows from it.
    pub(super) fn beside<T>(
        &mut self,
        halt: &Halt,
        progress: &dyn Progress,
        work: impl FnOnce(Hand) -> Result<T>,
    ) -> Result<T> {
        let (hand, made) = sync_channel(WAITING);
        let failed = halt.failed.clone();
        thread::scope(|scope| {
            let writing = scope.spawn(move || {
                let written = made.into_iter().try_for_each(|one| self.write(one, progress));
                if written.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
                written
            });
            // A panic of `work` drops its end of the channel; the scope waits for the thread before the panic goes on.
            let worked = work(Hand(hand));
            match writing.join() {
                Ok(written) => written.and(worked),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Packs and writes one thing.
    pub(super) fn write(&mut self, made: Made, progress: &dyn Progress) -> Result<()> {
        match made {
            Made::Linear(l) => {
                for (name, data) in tensors(self.plan, &l.planned, &l.solved, l.rule.as_ref())? {
                    self.writer.write(&name, &data)?;
                }
            }
            Made::Tensor { name, data } => self.writer.write(&name, &data)?,
            Made::Block { block, records, fold, experts, steps } => {
                self.chain.keep(&mut self.writer, self.plan, block, &records, fold.as_ref(), experts.as_ref())?;
                progress.advance(steps);
            }
        }
        Ok(())
    }
}

/// A solved matrix as the output holds it: names and bytes.
fn tensors(
    plan: &Plan,
    l: &PlannedLinear,
    solved: &Solved,
    rule: Option<&InputRule>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let kernel = |source| QuantizeError::Kernel { module: l.module.clone(), source };
    let name = format!("{}.weight", l.module);
    match (&plan.gguf, l.ggml, solved) {
        (Some(layout), _, Solved::Blocks(b)) => Ok(vec![(name.clone(), layout.arrange(&name, b.bytes())?)]),
        (Some(layout), Some(kind), Solved::Codes(QuantizedWeight::Int(m))) => {
            let bytes = ggml::encode_codes(kind, m).map_err(kernel)?;
            Ok(vec![(name.clone(), layout.arrange(&name, bytes)?)])
        }
        (None, None, Solved::Codes(q)) => {
            let (layout, out, n) = (plan.layout, l.out_features, l.in_features);
            let declared = linear::declare(&l.module, l.scheme, layout, out, n).map_err(kernel)?;
            let bytes = linear::encode_weight(q, l.scheme, rule, layout).map_err(kernel)?;
            Ok(declared.into_iter().map(|d| d.name).zip(bytes).collect())
        }
        _ => {
            let format = plan.options.format_name();
            let why = format!("{} in {format}", l.scheme_name());
            Err(kernel(KernelError::Unsupported { backend: "quantize", op: "writing", why }))
        }
    }
}
