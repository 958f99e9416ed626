//! Rows of a data set: JSON lines (also gzipped), JSON arrays, CSV and Parquet.

mod card;
mod columns;
mod csv;
mod find;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_checkpoint::hash::sha256_hex;
use serde_json::{Map, Value as Json};

use super::error::{Result, TaskError};

pub use find::{DataOptions, Hub, find};

/// One row and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Columns.
    pub values: Map<String, Json>,
    /// File.
    pub file: Arc<PathBuf>,
    /// Row from 1; the line for JSON lines.
    pub row: usize,
}

/// The rows of a split.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// In file order.
    pub rows: Vec<Row>,
    /// SHA-256 over the files' bytes.
    pub sha256: String,
    /// The files.
    pub files: Vec<PathBuf>,
}

/// Rows with their numbers.
type Numbered = Vec<(usize, Map<String, Json>)>;

/// Extensions that are read, in order of preference.
pub const EXTENSIONS: &[&str] = &["jsonl", "jsonl.gz", "json", "csv", "parquet"];

/// Reads the files of one split.
pub fn read(files: &[PathBuf]) -> Result<Rows> {
    let mut rows = Vec::new();
    let mut hashes = String::new();
    for file in files {
        let bytes =
            lowbit_checkpoint::files::read(file).map_err(|source| TaskError::Read { file: file.clone(), source })?;
        hashes.push_str(&sha256_hex(&bytes));
        let place = Arc::new(file.clone());
        let values = parse(file, bytes)?;
        rows.extend(values.into_iter().map(|(row, values)| Row { values, file: Arc::clone(&place), row }));
    }
    let sha256 = if files.len() == 1 { hashes } else { sha256_hex(hashes.as_bytes()) };
    Ok(Rows { rows, sha256, files: files.to_vec() })
}

fn parse(file: &Path, bytes: Vec<u8>) -> Result<Numbered> {
    let name = file.file_name().map_or_else(String::new, |n| n.to_string_lossy().to_ascii_lowercase());
    if let Some(inner) = name.strip_suffix(".gz") {
        let mut out = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut out)
            .map_err(|source| TaskError::Read { file: file.to_owned(), source })?;
        return parse_plain(file, inner, out);
    }
    parse_plain(file, &name, bytes)
}

fn parse_plain(file: &Path, name: &str, bytes: Vec<u8>) -> Result<Numbered> {
    let wrong = |row: usize, problem: String| TaskError::Data { file: file.to_owned(), row, problem };
    if name.ends_with(".parquet") {
        return columns::read(file);
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let row = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        wrong(row, "not UTF-8 text".into())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let object = |row: usize, value: Json| match value {
        Json::Object(map) => Ok((row, map)),
        other => Err(wrong(row, format!("expected an object with columns, found {other}"))),
    };
    if name.ends_with(".jsonl") || name.ends_with(".ndjson") {
        let mut out = Vec::new();
        for (i, line) in text.split('\n').enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let value = serde_json::from_str(line)
                .map_err(|e| wrong(i + 1, format!("not JSON (column {}): {e}", e.column())))?;
            out.push(object(i + 1, value)?);
        }
        Ok(out)
    } else if name.ends_with(".json") {
        let value: Json = match serde_json::from_str(text) {
            Ok(value) => value,
            // Lines of objects often go by this name, too.
            Err(e) => {
                let lines = text.lines().filter(|l| !l.trim().is_empty()).map(serde_json::from_str);
                let lines: std::result::Result<Vec<Json>, _> = lines.collect();
                Json::Array(lines.map_err(|_| wrong(e.line(), format!("not JSON: {e}")))?)
            }
        };
        let Json::Array(items) = value else {
            return Err(wrong(1, "expected an array of objects (one object a line is .jsonl)".into()));
        };
        items.into_iter().enumerate().map(|(i, v)| object(i + 1, v)).collect()
    } else if name.ends_with(".csv") {
        csv::parse(text).map_err(|(row, problem)| wrong(row, problem))
    } else {
        Err(wrong(1, format!("unknown extension; expected one of {}", EXTENSIONS.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn write(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    /// The same row, as a Parquet file.
    fn parquet() -> Vec<u8> {
        use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
        use parquet::file::writer::SerializedFileWriter;
        let schema = "message m { REQUIRED BYTE_ARRAY q (UTF8); REQUIRED INT64 n; }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("a, \"b\"")], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[1], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.into_inner().unwrap()
    }

    #[test]
    fn lines_of_objects_may_be_called_json() {
        let (_dir, path) = write("a.json", b"{\"n\": 1}\n{\"n\": 2}\n");
        let rows = read(&[path]).unwrap().rows;
        assert_eq!((rows.len(), &rows[1].values["n"], rows[1].row), (2, &json!(2), 2));
    }

    #[test]
    fn formats_give_the_same_rows() {
        let want = json!({"q": "a, \"b\"", "n": 1});
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, b"{\"q\": \"a, \\\"b\\\"\", \"n\": 1}\n").unwrap();
        for (name, bytes) in [
            ("a.jsonl", b"\n{\"q\": \"a, \\\"b\\\"\", \"n\": 1}\n".to_vec()),
            ("a.json", b"[{\"q\": \"a, \\\"b\\\"\", \"n\": 1}]".to_vec()),
            ("a.csv", b"q,n\n\"a, \"\"b\"\"\",1\n".to_vec()),
            ("a.jsonl.gz", gz.finish().unwrap()),
            ("a.parquet", parquet()),
        ] {
            let (_dir, path) = write(name, &bytes);
            let rows = read(&[path]).unwrap();
            assert_eq!(rows.rows.len(), 1, "{name}");
            assert_eq!(Json::Object(rows.rows[0].values.clone()), want, "{name}");
        }
    }

    #[test]
    fn errors_name_file_and_row() {
        for (name, bytes, says) in [
            ("a.jsonl", &b"{}\n{x}\n"[..], "a.jsonl: row 2: not JSON"),
            ("a.jsonl", b"{}\n\xff\n", "row 2: not UTF-8"),
            ("a.json", b"{}", "array of objects"),
            ("a.json", b"[1]", "row 1: expected an object"),
            ("a.csv", b"a,b\n1\n", "row 2: 1 field"),
            ("a.txt", b"x", "unknown extension"),
            ("a.parquet", b"x", "Parquet"),
        ] {
            let (_dir, path) = write(name, bytes);
            let error = read(&[path]).unwrap_err().to_string();
            assert!(error.contains(says), "{name}: {error}");
        }
    }
}
