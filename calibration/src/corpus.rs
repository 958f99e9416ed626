//! Texts out of the file formats calibration data comes in.
//!
//! | file | text |
//! |---|---|
//! | `.txt`, `.raw` | the whole file is one text |
//! | `.jsonl` | one object a line |
//! | `.json` | an array of the same objects |
//! | `.parquet` | the string column `text`, one text a row |
//!
//! An object gives its `text`; else its `messages` (`role`, `content`) or its ShareGPT `conversations` (`from`,
//! `value`) through the model's chat template. Empty texts are kept: they count when texts are joined.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_checkpoint::chat_template::{ChatTemplate, Message};
use parquet::basic::Type as PhysicalType;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::Value;

use crate::error::{CalibrationError, Result};

/// Where calibration text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// One file of a format above.
    File(PathBuf),
    /// A directory of such files.
    Directory(PathBuf),
    /// A data set on the hub, `owner/name` or `owner/name/file`, without `datasets/`: the caller resolves it to a path.
    Hub(String),
    /// The model writes its own calibration text.
    SelfGenerated,
}

#[derive(Clone, Copy)]
enum Format {
    Text,
    Lines,
    Array,
    Parquet,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "txt" | "raw" => Some(Self::Text),
            "jsonl" => Some(Self::Lines),
            "json" => Some(Self::Array),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

impl Source {
    /// Reads a `--calib` value. An existing path wins; `self` (or `self-generated`) is the model's own text;
    /// `datasets/owner/name`, `hf://datasets/owner/name` and `owner/name` are hub ids.
    pub fn parse(given: &str) -> Result<Self> {
        let unknown = |why| CalibrationError::UnknownSource { given: given.to_string(), why };
        if matches!(given, "self" | "self-generated") {
            return Ok(Self::SelfGenerated);
        }
        let path = Path::new(given);
        if path.is_dir() {
            return Ok(Self::Directory(path.to_path_buf()));
        }
        if path.is_file() {
            Format::of(path).ok_or_else(|| unknown("its file name extension is not one we read"))?;
            return Ok(Self::File(path.to_path_buf()));
        }
        let id = given.strip_prefix("hf://").unwrap_or(given);
        let (id, marked) = match id.strip_prefix("datasets/") {
            Some(rest) => (rest, true),
            None => (id, false),
        };
        let parts = id.split('/').collect::<Vec<_>>();
        let named = |p: &str| {
            let plain = p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            plain && p.chars().any(|c| c.is_ascii_alphanumeric())
        };
        if parts.len() < 2 || !parts.iter().all(|p| named(p)) {
            return Err(unknown("there is no such file and it is not a data set id"));
        }
        if !marked && (parts.len() > 2 || Format::of(path).is_some()) {
            return Err(unknown("there is no such file"));
        }
        Ok(Self::Hub(id.to_string()))
    }
}

/// Every text of a file or directory, in file order.
///
/// A directory is read recursively in name order, hidden entries and data set cards (`dataset_infos.json`, ...) left
/// out; where some files have `train` in their path below it, only those are read.
pub fn load_texts(path: &Path, template: Option<&ChatTemplate>) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    if path.is_dir() {
        for file in corpus_files(path)? {
            load_file(&file, template, &mut texts)?;
        }
    } else {
        load_file(path, template, &mut texts)?;
    }
    if texts.iter().all(|t| t.trim().is_empty()) {
        return Err(CalibrationError::NoText(path.to_path_buf()));
    }
    Ok(texts)
}

fn io(path: &Path, source: std::io::Error) -> CalibrationError {
    CalibrationError::Io { path: path.to_path_buf(), source }
}

fn record(path: &Path, place: String, why: impl Into<String>) -> CalibrationError {
    CalibrationError::Record { path: path.to_path_buf(), place, why: why.into() }
}

fn corpus_files(root: &Path) -> Result<Vec<PathBuf>> {
    const CARDS: [&str; 4] = ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"];
    let mut files = Vec::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).map_err(|e| io(&directory, e))? {
            let entry = entry.map_err(|e| io(&directory, e))?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            // A linked directory could lead back here; linked files are how hub caches are laid out.
            let is_directory = entry.file_type().map_err(|e| io(&path, e))?.is_dir();
            if name.starts_with('.') || CARDS.contains(&&*name) {
                continue;
            } else if is_directory {
                pending.push(path);
            } else if path.is_file() && Format::of(&path).is_some() {
                files.push(path);
            }
        }
    }
    files.sort();
    let train = |p: &PathBuf| p.strip_prefix(root).is_ok_and(|p| p.to_string_lossy().to_lowercase().contains("train"));
    if files.iter().any(train) {
        files.retain(train);
    }
    Ok(files)
}

fn load_file(path: &Path, template: Option<&ChatTemplate>, texts: &mut Vec<String>) -> Result<()> {
    match Format::of(path) {
        Some(Format::Text) => {
            texts.push(utf8(path, &lowbit_checkpoint::files::read(path).map_err(|e| io(path, e))?)?.to_string())
        }
        Some(Format::Lines) => {
            let bytes = lowbit_checkpoint::files::read(path).map_err(|e| io(path, e))?;
            for (i, line) in utf8(path, &bytes)?.lines().enumerate() {
                if !line.trim().is_empty() {
                    let place = format!("line {}", i + 1);
                    let value = serde_json::from_str::<Value>(line).map_err(|e| {
                        record(path, place.clone(), format!("not a JSON object (column {}): {e}", e.column()))
                    })?;
                    texts.push(text_of(path, place, value, template)?);
                }
            }
        }
        Some(Format::Array) => {
            let bytes = lowbit_checkpoint::files::read(path).map_err(|e| io(path, e))?;
            let items = serde_json::from_str::<Vec<Value>>(utf8(path, &bytes)?).map_err(|e| {
                record(path, format!("line {}", e.line()), format!("not an array of JSON objects: {e}"))
            })?;
            for (i, value) in items.into_iter().enumerate() {
                texts.push(text_of(path, format!("item {}", i + 1), value, template)?);
            }
        }
        Some(Format::Parquet) => lowbit_checkpoint::guard::guarded("parquet", || load_parquet(path, texts))
            .unwrap_or_else(|problem| Err(record(path, "file".into(), problem)))?,
        None => {
            let why = "its file name extension is not one we read";
            return Err(CalibrationError::UnknownSource { given: path.display().to_string(), why });
        }
    }
    Ok(())
}

/// The bytes as text, without a byte order mark; the error names the first bad line.
fn utf8<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        record(path, format!("line {line}"), "not UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

fn load_parquet(path: &Path, texts: &mut Vec<String>) -> Result<()> {
    let parquet = |source| CalibrationError::Parquet { path: path.to_path_buf(), source };
    let reader =
        SerializedFileReader::new(lowbit_checkpoint::files::open(path).map_err(|e| io(path, e))?).map_err(parquet)?;
    let schema = reader.metadata().file_metadata().schema();
    let column = schema
        .get_fields()
        .iter()
        .find(|f| f.name() == "text" && f.is_primitive() && f.get_physical_type() == PhysicalType::BYTE_ARRAY)
        .ok_or_else(|| {
            let names = schema.get_fields().iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
            record(path, "schema".to_string(), format!("no string column `text` (columns: {names})"))
        })?;
    let only_text =
        Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]).build().map_err(parquet)?;
    for (i, row) in RowIter::from_file(Some(only_text), &reader).map_err(parquet)?.enumerate() {
        for (_, field) in row.map_err(parquet)?.into_columns() {
            let place = || format!("row {}", i + 1);
            match field {
                Field::Str(text) => texts.push(text),
                Field::Bytes(bytes) => {
                    let text = std::str::from_utf8(bytes.data()).map_err(|_| record(path, place(), "not UTF-8"))?;
                    texts.push(text.to_string());
                }
                Field::Null => {}
                other => return Err(record(path, place(), format!("`text` is not a string: {other}"))),
            }
        }
    }
    Ok(())
}

fn text_of(path: &Path, place: String, mut value: Value, template: Option<&ChatTemplate>) -> Result<String> {
    if let Some(Value::String(text)) = value.get_mut("text") {
        return Ok(std::mem::take(text));
    }
    let messages = match messages_of(&value) {
        Ok(messages) => messages,
        Err(why) => return Err(record(path, place, why)),
    };
    let Some(template) = template else {
        return Err(CalibrationError::NeedsTemplate { path: path.to_path_buf(), place });
    };
    template.render(&messages, false).map_err(|e| CalibrationError::Template {
        path: path.to_path_buf(),
        place,
        source: Box::new(e),
    })
}

/// The turns of a chat record. ShareGPT conversations cut out of longer ones start with an assistant turn, which chat
/// templates refuse: such leading turns are dropped.
fn messages_of(value: &Value) -> std::result::Result<Vec<Message>, String> {
    let (turns, role_key, content_key) = match (value.get("messages"), value.get("conversations")) {
        (Some(Value::Array(turns)), _) => (turns, "role", "content"),
        (_, Some(Value::Array(turns))) => (turns, "from", "value"),
        _ => {
            return Err(format!(
                "expected an object with `text`, `messages` or `conversations`, found {}",
                found(value)
            ));
        }
    };
    let mut messages = Vec::with_capacity(turns.len());
    for (i, turn) in turns.iter().enumerate() {
        let field = |key: &str| turn.get(key).ok_or_else(|| format!("turn {} has no `{key}`", i + 1));
        let role = field(role_key)?.as_str().ok_or_else(|| format!("turn {}: `{role_key}` is not a string", i + 1))?;
        let content =
            content_text(field(content_key)?).ok_or_else(|| format!("turn {}: `{content_key}` is not text", i + 1))?;
        let role = if role_key == "role" { role } else { share_gpt_role(role)? };
        if role_key == "from" && role == "assistant" && messages.is_empty() {
            continue;
        }
        messages.push(Message { role: role.to_string(), content });
    }
    if messages.is_empty() { Err("the conversation has no turns".to_string()) } else { Ok(messages) }
}

/// What a record is that holds no text: its fields, or else its type.
fn found(value: &Value) -> String {
    match value {
        Value::Object(fields) if fields.is_empty() => "an empty one".to_string(),
        Value::Object(fields) => fields.keys().take(8).map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", "),
        Value::Array(_) => "a list".to_string(),
        Value::String(_) => "a string".to_string(),
        Value::Number(_) => "a number".to_string(),
        Value::Bool(_) => "true or false".to_string(),
        Value::Null => "null".to_string(),
    }
}

/// A string, or the `text` parts of a list of typed parts.
fn content_text(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(|p| p.get("text")?.as_str()).collect::<Option<String>>(),
        _ => None,
    }
}

fn share_gpt_role(from: &str) -> std::result::Result<&'static str, String> {
    match from {
        "human" | "user" => Ok("user"),
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => Ok("assistant"),
        "system" => Ok("system"),
        "tool" | "function" | "function_response" | "observation" => Ok("tool"),
        other => Err(format!("unknown speaker `{other}`: expected human, gpt, system or tool")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    #[test]
    fn sources_are_told_apart() {
        let (dir, path) = write("a.jsonl", b"");
        assert_eq!(Source::parse(path.to_str().unwrap()).unwrap(), Source::File(path.clone()));
        let directory = dir.path().to_path_buf();
        assert_eq!(Source::parse(directory.to_str().unwrap()).unwrap(), Source::Directory(directory));
        assert_eq!(Source::parse("hf://datasets/a/b").unwrap(), Source::Hub("a/b".to_string()));
        assert_eq!(Source::parse("allenai/c4").unwrap(), Source::Hub("allenai/c4".to_string()));
        assert_eq!(Source::parse("self").unwrap(), Source::SelfGenerated);
        for bad in ["no/such.jsonl", "/no/such", "../x", "nothing", ""] {
            assert!(Source::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lines_keep_order_and_errors_name_the_line() {
        let (_dir, path) = write("a.jsonl", b"{\"text\": \"one\"}\n\n{\"text\": \"\"}\n");
        assert_eq!(load_texts(&path, None).unwrap(), ["one", ""]);
        let (_dir, path) = write("a.jsonl", b"{\"text\": \"one\"}\n{\"txt\": 1}\n");
        let error = load_texts(&path, None).unwrap_err().to_string();
        assert!(error.contains("a.jsonl, line 2: ") && error.ends_with("found `txt`"), "{error}");
        let (_dir, path) = write("a.txt", b"one\n\xff");
        let error = load_texts(&path, None).unwrap_err().to_string();
        assert!(error.contains("a.txt, line 2: not UTF-8"), "{error}");
    }

    #[test]
    fn share_gpt_becomes_messages() {
        let value = serde_json::json!({"conversations": [
            {"from": "gpt", "value": "dropped"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"}]});
        let messages = messages_of(&value).unwrap();
        let turns = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect::<Vec<_>>();
        assert_eq!(turns, [("user", "a"), ("assistant", "b")]);
        assert!(share_gpt_role("narrator").is_err());
    }
}
