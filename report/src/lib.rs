//! Joins the records of a quantized model into one self-contained report.
//!
//! [`load`] reads `plan.json`, `quantize.json`, `eval.json` and `bench.json` of a directory, as far
//! as they exist; [`html`], [`markdown`] and [`json`] render them; [`write`] does all of that and
//! puts `report.html`, `report.md` and `report.json` next to the records.
//!
//! [`gpu`] makes the tables of `docs/gpu.md` from a record of `bench/gpu-suite`.
//!
//! The page fetches nothing: styles and charts are inline, and a content security policy forbids
//! the rest. Whatever comes from a record is escaped.

#![warn(missing_docs)]

mod chart;
mod chart_speed;
mod format;
pub mod gpu;
mod load;
mod markdown;
mod output;
mod svg;
mod table;
mod view;
mod view_accuracy;
mod view_speed;

pub use load::{Records, ReportError, load};
pub use markdown::markdown;
pub use output::{html, json, write};
