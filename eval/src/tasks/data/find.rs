//! Which files hold a task's split: named in the task file, below `--data`, or on the hub.

use std::path::{Path, PathBuf};

use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::hub::Choice;

use super::super::config::TaskConfig;
use super::super::error::{Result, TaskError};
use super::{EXTENSIONS, card};

/// Fetches those files of a data set of the hub (`org/name`, with `@revision` where it is not the main one) that are chosen.
pub type Hub<'a> = &'a dyn Fn(&str, Choice<'_>) -> std::result::Result<Vec<PathBuf>, CheckpointError>;

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

/// The files that hold the split, fetched: those of the configuration, else those of the hub's own copy in Parquet (of data sets that a
/// script would make, the only files there are), else whatever is named by the split.
fn on_hub(config: &TaskConfig, split: &str, path: &str, hub: Hub<'_>) -> Result<Vec<PathBuf>> {
    let failed = |e: CheckpointError| {
        let mut error = no_data(config, split, e.to_string(), &[]);
        if let (TaskError::NoData { hint, .. }, Some(of_hub)) = (&mut error, e.hint()) {
            *hint = format!("{of_hub}; or {hint}");
        }
        error
    };
    let name = config.dataset_name.as_deref();
    let own =
        hub(path, &|names: &[String], text: Option<&str>| card::choose(names, text, name, split)).map_err(failed)?;
    if !own.is_empty() {
        return Ok(own);
    }
    // Most data sets have that branch, and where one has not, that is no failure.
    let copy = hub(&format!("{path}@refs/convert/parquet"), &|names: &[String], _: Option<&str>| {
        card::converted(names, name, split)
    });
    let copy = copy.unwrap_or_default();
    if !copy.is_empty() {
        return Ok(copy);
    }
    let named = hub(path, &|names: &[String], _: Option<&str>| card::by_split(names, split)).map_err(failed)?;
    if named.is_empty() {
        let of = name.map_or(String::new(), |n| format!(" in its configuration `{n}`"));
        return Err(no_data(config, split, format!("{path} has no file of this split{of}"), &[]));
    }
    Ok(named)
}
