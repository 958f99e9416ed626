//! Which files hold a task's split: named in the task file, below `--data`, or on the hub.

use std::path::{Path, PathBuf};

use super::super::config::TaskConfig;
use super::super::error::{Result, TaskError};
use super::EXTENSIONS;

/// Fetches a data set of the hub (`org/name` or `org/name/folder`) and returns its folder.
pub type Hub<'a> = &'a dyn Fn(&str) -> std::result::Result<PathBuf, lowbit_checkpoint::CheckpointError>;

/// Where data may come from.
#[derive(Clone, Copy, Default)]
pub struct DataOptions<'a> {
    /// Folder with local data; nothing else is looked at where it is given.
    pub dir: Option<&'a Path>,
    /// The hub.
    pub hub: Option<Hub<'a>>,
}

/// The files of a split of a task.
pub fn find(config: &TaskConfig, split: &str, options: &DataOptions<'_>) -> Result<Vec<PathBuf>> {
    if let Some(files) = config.data_files.get(split) {
        let base = config.file.parent().unwrap_or(Path::new(""));
        return files
            .iter()
            .map(|f| {
                let near: Vec<PathBuf> = [Some(base), options.dir].into_iter().flatten().map(|d| d.join(f)).collect();
                near.iter()
                    .find(|p| p.is_file())
                    .cloned()
                    .ok_or_else(|| no_data(config, split, format!("no file {f}"), &near))
            })
            .collect();
    }
    if let Some(dir) = options.dir {
        return below(config, split, dir);
    }
    let Some(path) = config.dataset_path.as_deref().filter(|p| p.contains('/')) else {
        return Err(no_data(config, split, "the task names neither files nor a hub data set".into(), &[]));
    };
    let Some(hub) = options.hub else {
        return Err(no_data(config, split, format!("{path} lies on the hub"), &[]));
    };
    on_hub(config, split, path, hub)
}

fn no_data(config: &TaskConfig, split: &str, problem: String, tried: &[PathBuf]) -> TaskError {
    let mut problem = problem;
    if !tried.is_empty() {
        let list: Vec<String> = tried.iter().map(|p| p.display().to_string()).collect();
        problem = format!("{problem} (tried {})", list.join(", "));
    }
    let hint = "give --data DIR with the files, or `dataset_kwargs: {data_files: ...}` in the task file".into();
    TaskError::NoData { task: config.task.clone(), split: split.into(), problem, hint }
}

fn below(config: &TaskConfig, split: &str, dir: &Path) -> Result<Vec<PathBuf>> {
    let mut stems: Vec<String> = config.local.iter().map(|l| l.replace("{split}", split)).collect();
    if stems.is_empty() {
        stems.push(format!("{}/{split}", config.task));
        if let Some(path) = &config.dataset_path {
            let name = path.rsplit('/').next().unwrap_or(path);
            stems.extend(config.dataset_name.iter().map(|c| format!("{name}/{c}/{split}")));
            stems.push(format!("{name}/{split}"));
        }
        stems.push(split.to_owned());
    }
    let with = |stem: &String, ext: &&str| dir.join(format!("{stem}.{ext}"));
    for stem in &stems {
        if let Some(found) = EXTENSIONS.iter().map(|e| with(stem, e)).find(|p| p.is_file()) {
            return Ok(vec![found]);
        }
    }
    let tried: Vec<PathBuf> = stems.iter().map(|s| dir.join(format!("{s}.jsonl"))).collect();
    Err(no_data(config, split, format!("{} has no such file", dir.display()), &tried))
}

/// Data sets on the hub keep a configuration in a folder of its name, or all in `data`, with the split at the start of
/// the file's name or as a folder.
fn on_hub(config: &TaskConfig, split: &str, path: &str, hub: Hub<'_>) -> Result<Vec<PathBuf>> {
    let failed = |e: lowbit_checkpoint::CheckpointError| no_data(config, split, e.to_string(), &[]);
    let name = config.dataset_name.as_deref().filter(|n| *n != "default");
    let named = name.map(|n| hub(&format!("{path}/{n}")));
    let root = match named {
        Some(Ok(found)) => found,
        // No folder of that name, or no such data set: the second try tells which.
        Some(Err(_)) | None => hub(path).map_err(failed)?,
    };
    let mut files = Vec::new();
    walk(&root, &mut files).map_err(|source| TaskError::Read { file: root.clone(), source })?;
    files.sort();
    let of_split = |p: &PathBuf| {
        let inner = p.strip_prefix(&root).unwrap_or(p);
        inner.components().any(|c| {
            let part = c.as_os_str().to_string_lossy();
            part.strip_prefix(split).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.', '_']))
        })
    };
    let of_name = |p: &PathBuf| name.is_none_or(|n| p.components().any(|c| c.as_os_str() == n));
    let mut found: Vec<PathBuf> = files.iter().filter(|p| of_split(p) && of_name(p)).cloned().collect();
    if found.is_empty() {
        found = files.iter().filter(|p| of_split(p)).cloned().collect();
    }
    if found.is_empty() {
        return Err(no_data(config, split, format!("{path} has no file of this split"), &files));
    }
    Ok(found)
}

fn walk(dir: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if dir.is_file() {
        out.push(dir.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, out)?;
        } else if EXTENSIONS.iter().any(|e| path.to_string_lossy().ends_with(&format!(".{e}"))) {
            out.push(path);
        }
    }
    Ok(())
}
