//! Task files: YAML with `include` and `!function`, from disk or embedded.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value as Json};

use super::error::{Result, TaskError};
use super::shipped;

/// A value that stands for a Python function begins with this.
pub const FUNCTION: &str = "!function ";

/// Where a task file lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On disk.
    Disk(PathBuf),
    /// In the program, by its name among the shipped files.
    Shipped(&'static str),
}

impl Place {
    /// Path for messages.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Disk(path) => path.clone(),
            Self::Shipped(name) => Path::new("lowbit").join(name),
        }
    }

    /// Name of the folder it lies in.
    pub fn folder(&self) -> String {
        let path = self.path();
        path.parent().and_then(Path::file_name).map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    }

    fn read(&self) -> Result<String> {
        match self {
            Self::Disk(path) => lowbit_checkpoint::files::read_text(path)
                .map_err(|source| TaskError::Read { file: path.clone(), source }),
            Self::Shipped(name) => shipped::text(name)
                .map(str::to_owned)
                .ok_or_else(|| TaskError::File { file: self.path(), problem: "no such shipped file".into() }),
        }
    }

    /// The file that this one includes as `name`: beside it, or a shipped one.
    fn sibling(&self, name: &str) -> Self {
        match self {
            Self::Disk(path) => {
                let beside = path.parent().unwrap_or(Path::new("")).join(name);
                match shipped::find(name) {
                    Some(embedded) if !beside.exists() => Self::Shipped(embedded),
                    _ => Self::Disk(beside),
                }
            }
            Self::Shipped(_) => shipped::find(name).map_or_else(|| Self::Disk(PathBuf::from(name)), Self::Shipped),
        }
    }
}

/// `!function name` after a key or a dash, for which the YAML reader has no type.
static TAGGED: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?m)^([ \t]*(?:-[ \t]+)?(?:[^\s#:]+:[ \t]+)?)!function[ \t]+([\w./-]+)[ \t]*(#.*)?$").ok()
});

/// Reads a file and what it includes; keys of the file win over included ones.
pub fn load(place: &Place) -> Result<Map<String, Json>> {
    load_within(place, &mut Vec::new())
}

fn load_within(place: &Place, open: &mut Vec<PathBuf>) -> Result<Map<String, Json>> {
    let file = place.path();
    let wrong = |problem: String| TaskError::File { file: file.clone(), problem };
    if open.contains(&file) {
        return Err(wrong("includes itself".into()));
    }
    open.push(file.clone());
    let text = place.read()?;
    let plain = match TAGGED.as_ref() {
        Some(tagged) => tagged.replace_all(&text, format!("$1\"{FUNCTION}$2\"")).into_owned(),
        None => text,
    };
    let value: Json = serde_saphyr::from_str(&plain).map_err(|e| {
        let place = e.location().map_or(String::new(), |l| format!("line {}, column {}: ", l.line(), l.column()));
        let text = e.without_snippet().to_string();
        wrong(format!("{place}not valid YAML: {}", text.lines().next().unwrap_or_default()))
    })?;
    let Json::Object(mut own) = value else {
        return Err(wrong("expected the keys of a task, a group or a list of them".into()));
    };
    let mut merged = Map::new();
    let includes = match own.remove("include") {
        None => Vec::new(),
        Some(Json::Array(names)) => names,
        Some(one) => vec![one],
    };
    for name in includes {
        let Json::String(name) = name else {
            return Err(wrong(format!("`include`: expected a file name, found {name}")));
        };
        let mut included = load_within(&place.sibling(&name), open).map_err(|e| match e {
            TaskError::Read { file: missing, source } => {
                wrong(format!("`include: {name}`: cannot read {}: {source}", missing.display()))
            }
            other => other,
        })?;
        included.remove("task_list");
        merged.extend(included);
    }
    open.pop();
    merged.extend(own);
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn write(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn read(dir: &tempfile::TempDir, name: &str) -> Result<Map<String, Json>> {
        load(&Place::Disk(dir.path().join(name)))
    }

    #[test]
    fn include_is_overridden_and_functions_are_marked() {
        let dir = write(&[
            ("base.yaml", "task: base\ndoc_to_text: \"{{q}}\\nA:\"\nprocess_docs: !function utils.f # why\nn: 1.0\n"),
            ("own.yaml", "include: base.yaml\ntask: own\nlist:\n  - !function a.b\n  - \"no\"\n"),
        ]);
        let map = read(&dir, "own.yaml").unwrap();
        assert_eq!(
            Json::Object(map),
            json!({"task": "own", "doc_to_text": "{{q}}\nA:", "process_docs": "!function utils.f", "n": 1.0, "list": ["!function a.b", "no"]})
        );
    }

    #[test]
    fn errors_name_file_and_line() {
        let dir = write(&[
            ("bad.yaml", "task: x\ndoc_to_text: [1, 2\nother: 3\n"),
            ("loop.yaml", "include: loop.yaml\ntask: x\n"),
            ("list.yaml", "- 1\n"),
            ("gone.yaml", "include: nothing.yaml\n"),
        ]);
        for (name, text) in [
            ("bad.yaml", "not valid YAML"),
            ("bad.yaml", "line "),
            ("loop.yaml", "includes itself"),
            ("list.yaml", "expected the keys"),
            ("gone.yaml", "nothing.yaml"),
        ] {
            let error = read(&dir, name).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(name), "{name}: {error}");
        }
    }
}
