//! Who made a record, from what, on which machine.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

/// Reads the `schema` of a record of which this program knows the versions up to `NEWEST`. Older ones lack fields, which have defaults; a
/// newer one may say what this program would not understand.
pub fn known_schema<'de, D: Deserializer<'de>, const NEWEST: u32>(from: D) -> Result<u32, D::Error> {
    match u32::deserialize(from)? {
        found if found > NEWEST => {
            Err(D::Error::custom(format!("written by a newer lowbit: schema {found}, this one reads up to {NEWEST}")))
        }
        found => Ok(found),
    }
}

/// Provenance every record carries.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Provenance {
    /// `lowbit 0.1.0`.
    pub tool: String,
    /// Commit of the build when known.
    pub commit: Option<String>,
    /// The full command line or library call.
    pub command: String,
    /// Seconds since the epoch, UTC.
    pub unix_time: u64,
    /// Name of the model as given.
    pub model: String,
    /// SHA-256 over the model's weight files and config (see [`crate::hash`]).
    pub model_sha256: String,
    /// Name of the reference model where there is one.
    pub reference: Option<String>,
    /// Its SHA-256.
    pub reference_sha256: Option<String>,
    /// Backend name.
    pub device: String,
    /// CPU model string.
    pub cpu: String,
    /// GPU name where one was used.
    pub gpu: Option<String>,
    /// On a GPU or its emulation: the order of sums (`fast`, `reproducible`) and what was compiled by whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernels: Option<String>,
    /// Threads used.
    pub threads: usize,
    /// Activation dtype.
    pub dtype: String,
    /// Seed.
    pub seed: u64,
    /// Every option, spelled out.
    pub options: BTreeMap<String, serde_json::Value>,
}
