//! Parquet rows as JSON.

use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value as Json;

use super::super::error::{Result, TaskError};
use super::Numbered;

/// All rows, numbered from 1. Bytes are taken as UTF-8; dates and times become text.
pub(super) fn read(file: &Path) -> Result<Numbered> {
    let failed = |problem| Err(TaskError::Data { file: file.to_owned(), row: 1, problem });
    lowbit_checkpoint::guard::guarded("parquet", || read_rows(file)).unwrap_or_else(failed)
}

fn read_rows(file: &Path) -> Result<Numbered> {
    let wrong = |row: usize, e: &dyn std::fmt::Display| TaskError::Data {
        file: file.to_owned(),
        row,
        problem: format!("not readable as Parquet: {e}"),
    };
    let opened =
        lowbit_checkpoint::files::open(file).map_err(|source| TaskError::Read { file: file.to_owned(), source })?;
    let reader = SerializedFileReader::new(opened).map_err(|e| wrong(1, &e))?;
    let mut out = Vec::new();
    for (i, row) in reader.get_row_iter(None).map_err(|e| wrong(1, &e))?.enumerate() {
        let columns = row.map_err(|e| wrong(i + 1, &e))?.into_columns();
        out.push((i + 1, columns.into_iter().map(|(name, field)| (name, value(field))).collect()));
    }
    Ok(out)
}

fn value(field: Field) -> Json {
    match field {
        Field::Null => Json::Null,
        Field::Bool(b) => b.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float(x) => f64::from(x).into(),
        Field::Double(x) => x.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned().into(),
        Field::Group(row) => row.into_columns().into_iter().map(|(name, f)| (name, value(f))).collect(),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => map
            .entries()
            .iter()
            .map(|(k, v)| (super::super::python::json_to_str(&value(k.clone())), value(v.clone())))
            .collect(),
        other => other.to_string().into(),
    }
}
