//! Files of rows as JSON objects.

use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use lowbit_checkpoint::guard::guarded;

use crate::load::error::{LoadError, Result};

/// Rows with their places (`line 3`, `row 7`).
pub type Objects = Vec<(String, Map<String, Value>)>;

/// Files of these forms are read from a folder.
const FORMS: [&str; 6] = ["jsonl", "ndjson", "json", "csv", "parquet", "txt"];

/// Reads `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt`; of a folder all such files, in the order of their names.
pub fn read_objects(path: &Path) -> Result<Objects> {
    if path.is_dir() {
        let mut files = Vec::new();
        collect(path, &mut files)?;
        files.sort();
        let mut rows = Vec::new();
        for file in &files {
            let inside = file.strip_prefix(path).unwrap_or(file).display().to_string();
            rows.extend(read_objects(file)?.into_iter().map(|(place, o)| (format!("{inside}, {place}"), o)));
        }
        return Ok(rows);
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let text = || {
        lowbit_checkpoint::files::read_text(path).map_err(|source| LoadError::Io { path: path.to_path_buf(), source })
    };
    let bad = |place: String, why: String| LoadError::Row { path: path.to_path_buf(), place, why };
    let object = |place: String, v: Value| match v {
        Value::Object(map) => Ok((place, map)),
        _ => Err(bad(place, "expected an object".into())),
    };
    match extension.as_str() {
        "jsonl" | "ndjson" => {
            let text = text()?;
            let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
            lines
                .map(|(i, line)| {
                    let place = format!("line {}", i + 1);
                    let value = serde_json::from_str(line).map_err(|e| bad(place.clone(), e.to_string()))?;
                    object(place, value)
                })
                .collect()
        }
        "json" => {
            let value: Value = serde_json::from_str(&text()?).map_err(|e| bad("document".into(), e.to_string()))?;
            let Value::Array(rows) = value else {
                return Err(bad("document".into(), "expected an array of objects".into()));
            };
            rows.into_iter().enumerate().map(|(i, v)| object(format!("row {}", i + 1), v)).collect()
        }
        "txt" => {
            let text = text()?;
            let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
            Ok(lines
                .map(|(i, l)| (format!("line {}", i + 1), Map::from_iter([("prompt".to_string(), l.into())])))
                .collect())
        }
        "csv" => {
            let mut rows = csv(&text()?)
                .map_err(|line| bad(format!("line {line}"), "a quote is never closed".into()))?
                .into_iter();
            let Some((_, header)) = rows.next() else { return Ok(Vec::new()) };
            rows.map(|(line, cells)| {
                if cells.len() != header.len() {
                    return Err(bad(
                        format!("line {line}"),
                        format!("expected {} cells, found {}", header.len(), cells.len()),
                    ));
                }
                let named = header.iter().cloned().zip(cells.into_iter().map(Value::from));
                Ok((format!("line {line}"), named.collect()))
            })
            .collect()
        }
        "parquet" => {
            let rows = || {
                let file = lowbit_checkpoint::files::open(path)
                    .map_err(|source| LoadError::Io { path: path.to_path_buf(), source })?;
                let reader = SerializedFileReader::new(file).map_err(|e| bad("file".into(), e.to_string()))?;
                let rows = reader.get_row_iter(None).map_err(|e| bad("file".into(), e.to_string()))?;
                rows.enumerate()
                    .map(|(i, row)| {
                        let place = format!("row {}", i + 1);
                        let row = row.map_err(|e| bad(place.clone(), e.to_string()))?;
                        object(
                            place,
                            Value::Object(row.get_column_iter().map(|(n, f)| (n.clone(), json_of(f))).collect()),
                        )
                    })
                    .collect()
            };
            guarded("parquet", rows).unwrap_or_else(|e| Err(bad("file".into(), e)))
        }
        _ => Err(LoadError::option(
            path.display().to_string(),
            "not a form we read",
            ".jsonl, .json, .csv, .parquet or .txt",
        )),
    }
}

/// Every file of a form we read, in the folder and below it.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let io = |source| LoadError::Io { path: dir.to_path_buf(), source };
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            collect(&path, files)?;
        } else if FORMS.contains(&extension.as_str()) && !hidden {
            files.push(path);
        }
    }
    Ok(())
}

/// A Parquet value as JSON; bytes and dates, which no row of ours needs, become null.
fn json_of(field: &Field) -> Value {
    match field {
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) => (*v).into(),
        Field::Long(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float(v) => (*v).into(),
        Field::Double(v) => (*v).into(),
        Field::Str(v) => v.as_str().into(),
        Field::Group(row) => Value::Object(row.get_column_iter().map(|(n, f)| (n.clone(), json_of(f))).collect()),
        Field::ListInternal(list) => list.elements().iter().map(json_of).collect(),
        _ => Value::Null,
    }
}

/// Rows with the line each begins at, counted from 1 (RFC 4180). The error is the line of an open quote.
fn csv(text: &str) -> std::result::Result<Vec<(usize, Vec<String>)>, usize> {
    let (mut rows, mut row, mut cell) = (Vec::new(), Vec::new(), String::new());
    let (mut quoted, mut line, mut begun) = (false, 1, 1);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                cell.push('"');
            }
            '"' if quoted || cell.is_empty() => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut cell)),
            '\r' if !quoted && chars.peek() == Some(&'\n') => {}
            '\n' => {
                line += 1;
                if quoted {
                    cell.push(c);
                } else {
                    row.push(std::mem::take(&mut cell));
                    if row.len() > 1 || row.iter().any(|c| !c.is_empty()) {
                        rows.push((begun, std::mem::take(&mut row)));
                    }
                    row.clear();
                    begun = line;
                }
            }
            c => cell.push(c),
        }
    }
    if quoted {
        return Err(begun);
    }
    if !cell.is_empty() || !row.is_empty() {
        row.push(cell);
        rows.push((begun, row));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_with_quotes_and_newlines() {
        let rows = csv("prompt,n\r\n\"a, \"\"b\"\"\nc\",3\n\nplain,4").unwrap();
        assert_eq!(rows[1], (2, vec!["a, \"b\"\nc".to_string(), "3".into()]));
        assert_eq!(rows[2], (5, vec!["plain".to_string(), "4".into()]));
        assert_eq!(csv("a\n\"b"), Err(2));
    }

    #[test]
    fn files_name_the_place_of_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            read_objects(&path)
        };
        assert_eq!(file("a.jsonl", "{\"prompt\":1}\n\n{}\n").unwrap()[1].0, "line 3");
        assert!(file("b.jsonl", "{}\n[1]").unwrap_err().to_string().contains("line 2: expected an object"));
        assert!(file("c.csv", "a,b\n1\n").unwrap_err().to_string().contains("line 2: expected 2 cells, found 1"));
        assert_eq!(file("d.txt", "one\ntwo\n").unwrap().len(), 2);
        assert!(file("e.doc", "").is_err());
        // A folder: files in order, those of other forms and hidden ones left out.
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("more")).unwrap();
        for (name, text) in [
            ("b.txt", "three"),
            ("a.jsonl", "{\"prompt\": \"one\"}\n{\"prompt\": \"two\"}"),
            ("README.md", "no"),
            (".x.txt", "no"),
            ("more/c.txt", "four"),
        ] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let rows = read_objects(folder.path()).unwrap();
        let places: Vec<&str> = rows.iter().map(|r| r.0.as_str()).collect();
        assert_eq!(places, ["a.jsonl, line 1", "a.jsonl, line 2", "b.txt, line 1", "more/c.txt, line 1"]);
    }
}
