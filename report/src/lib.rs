//! Joins the records of a quantized model into one self-contained report.
//!
//! [`load`] reads the records of a run directory, as far as they exist, and [`load_all`] those of several, to be compared;
//! [`html`], [`markdown`] and [`json`] render them; [`write()`] does all of that and puts `report.html`, `report.md` and
//! `report.json` next to the records or elsewhere. The verdict comes first, then three numbers, then what they rest on; what there
//! is no record of has no section. The same records give the same bytes.
//!
//! [`gpu`] makes the tables of `docs/gpu.md` from a record of `bench/gpu-suite`.
//!
//! The page fetches nothing: styles and charts are inline, and a content security policy forbids
//! the rest. Whatever comes from a record is escaped.

mod chart_kl;
mod chart_layers;
mod chart_lines;
mod chart_size;
mod chart_speed;
mod chart_tasks;
mod chart_triangle;
mod format;
pub mod gpu;
mod load;
mod markdown;
mod output;
mod svg;
mod table;
mod view;
mod view_accuracy;
mod view_compare;
mod view_layers;
mod view_provenance;
mod view_serving;
mod view_size;
mod view_speculation;
mod view_speed;
mod view_verdict;

pub use format::utc;
pub use load::{Records, ReportError, Variant, load, load_all};
pub use markdown::markdown;
pub use output::{html, json, write};
