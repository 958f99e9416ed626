//! Whether a candidate lost accuracy against its reference: a statement with an error rate.
//!
//! ```text
//! items of both models ─► pairing (same prompts, or refused) ─► evidence (one table a task, one of all) ─► decide ─► record
//! ```
//!
//! The question is one of non-inferiority: the candidate **passes** where its loss is shown to be smaller than a margin, it is
//! a **regression** where its loss is shown to be larger, and **inconclusive** otherwise, with the number of items that would
//! decide it. Losses are shares of items, positive where the candidate is worse.

pub mod continuous;
pub mod decide;
pub mod evidence;
pub mod holm;
pub mod junit;
pub mod markdown;
pub mod mcnemar;
pub mod normal;
pub mod paired;
pub mod pairing;
pub mod permutation;
pub mod power;
pub mod record;
pub mod sequential;
pub mod simulate;
pub mod sizes;

pub use decide::{Levels, Policy, Verdict, judge};
pub use evidence::Evidence;
pub use pairing::{Paired, PairingOptions, pair};
pub use record::GateRecord;
pub use sequential::Look;
pub use sizes::Sizes;
