//! `convert.json`: what a folder's weights were before they were converted. Dense weights do not show how few bits they once had.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::chat_template::read_json;
use crate::error::{CheckpointError, Result};

/// Its name, beside the weights.
pub const FILE: &str = "convert.json";

/// Format of the record.
pub const SCHEMA: u32 = 1;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConvertRecord {
    /// Format of this record.
    #[serde(deserialize_with = "crate::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// `lowbit 0.1.0`.
    pub tool: String,
    /// Name of the file or folder that was converted, without its path.
    pub source: String,
    /// Fewest bits of a quantized weight there, and before where that was converted too; none where all were floats.
    pub bits: Option<u32>,
}

impl ConvertRecord {
    /// Of a source with weights of so many bits.
    pub fn new(source: &Path, bits: Option<u32>) -> Self {
        Self {
            schema: SCHEMA,
            tool: concat!("lowbit ", env!("CARGO_PKG_VERSION")).into(),
            source: source.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            bits,
        }
    }

    /// The record of a folder; `None` where nobody converted it. Fails where the file is no such record.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let Some(found) = read_json(&path)? else { return Ok(None) };
        serde_json::from_value(found).map(Some).map_err(|e| {
            CheckpointError::invalid_hint(
                &path,
                format!("not a record of `lowbit convert`: {e}"),
                "convert the model again, or remove the file",
            )
        })
    }

    /// As a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        format!("{:#}\n", serde_json::json!(self)).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ConvertRecord::read(dir.path()).unwrap(), None);
        let record = ConvertRecord::new(Path::new("/a/b/model.Q4_0.gguf"), Some(4));
        assert_eq!(record.source, "model.Q4_0.gguf");
        std::fs::write(dir.path().join(FILE), record.to_bytes()).unwrap();
        assert_eq!(ConvertRecord::read(dir.path()).unwrap(), Some(record));
        for (text, why) in [(r#"{"bits": 4}"#, "missing field"), (r#"{"schema": 9}"#, "newer lowbit")] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let said = ConvertRecord::read(dir.path()).unwrap_err().to_string();
            assert!(said.contains(FILE) && said.contains(why), "{said}");
        }
    }
}
