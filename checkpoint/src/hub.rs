//! Checkpoints and data sets from a hub into the standard cache, and from the cache alone when offline.

mod session;
mod silence;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::RepoType;

use crate::chat_template::read_json;
use crate::error::{CheckpointError, Result};
use session::Session;

const INDEX: &str = "model.safetensors.index.json";
/// What a data set says of itself.
const CARD: &str = "README.md";

/// Told about downloads while they run.
pub trait HubProgress: Sync {
    /// A file of so many bytes starts.
    fn start(&self, file: &str, bytes: u64);
    /// So many more bytes of it are here.
    fn advance(&self, bytes: u64);
    /// It is complete and checked.
    fn finish(&self);
}

impl HubProgress for () {
    fn start(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn finish(&self) {}
}

/// Where the hub is, who asks, and where downloads are kept.
#[derive(Clone)]
pub struct HubOptions {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Access token, sent with each request.
    pub token: Option<String>,
    /// Use nothing but the cache.
    pub offline: bool,
    /// Cache folder (`$HF_HOME/hub`).
    pub cache_dir: PathBuf,
    /// How long the hub may say nothing, in a listing as within a file, before that is an error.
    pub silence: Duration,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(secret)"))
            .field("offline", &self.offline)
            .field("cache_dir", &self.cache_dir)
            .field("silence", &self.silence)
            .finish()
    }
}

impl HubOptions {
    /// Options from the variables that Hugging Face's own tools read: `HF_ENDPOINT`, `HF_TOKEN` (or the
    /// file `HF_TOKEN_PATH`, or `$HF_HOME/token`), `HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_HOME`, and
    /// `HF_HUB_DOWNLOAD_TIMEOUT`: seconds of silence, 60 unless given.
    pub fn from_env_map(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |key: &str| get(key).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let home = get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let user = || get("HOME").or_else(|| get("USERPROFILE")).unwrap_or_default();
            let cache = get("XDG_CACHE_HOME").map(PathBuf::from);
            cache.unwrap_or_else(|| Path::new(&user()).join(".cache")).join("huggingface")
        });
        let token_file = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let saved = || std::fs::read_to_string(token_file).ok();
        let yes = |v: String| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str());
        let seconds = get("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse().ok()).filter(|s| *s > 0.0);
        let seconds = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: get("HF_TOKEN").or_else(saved).map(|t| t.trim().to_string()).filter(|t| !t.is_empty()),
            offline: get("HF_HUB_OFFLINE").or_else(|| get("TRANSFORMERS_OFFLINE")).is_some_and(yes),
            cache_dir: get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            silence: seconds.unwrap_or(Duration::from_secs(60)),
        }
    }
}

/// Fetches a model named `org/name[@revision]` and returns the folder with its files: configuration,
/// tokenizer, other small files and the safetensors weights. Files already in the cache are not
/// fetched again; weights in other formats never are.
pub fn resolve(model: &str, options: &HubOptions, progress: &dyn HubProgress) -> Result<PathBuf> {
    let session = Session::new(model, RepoType::Model, options)?;
    if options.offline {
        let dir = session.cached()?;
        return match missing_of_model(&dir)? {
            None => Ok(dir),
            Some(file) => Err(session.not_cached(&format!("{file} is not in the cache"))),
        };
    }
    let (sha, names) = session.list()?;
    let has = |name: &str| names.iter().any(|n| n == name);
    if !has("config.json") {
        return Err(session.fail("the repository has no config.json", "name a repository that holds a model"));
    }
    session.fetch(&sha, names.iter().filter(|name| is_small(name)), progress)?;
    let dir = session.cache_repo(&session.revision).pointer_path(&sha);
    let weights = if has(INDEX) {
        shards_of(&dir)?
    } else if has("model.safetensors") {
        vec!["model.safetensors".to_string()]
    } else {
        let at_root = |n: &&String| n.ends_with(".safetensors") && !n.contains('/');
        names.iter().filter(at_root).cloned().collect()
    };
    if weights.is_empty() {
        return Err(CheckpointError::Unsupported {
            what: format!("{model}: the repository has no safetensors weights"),
            hint: Some("look for a repository of the same model with *.safetensors files".into()),
        });
    }
    if let Some(absent) = weights.iter().find(|name| !has(name)) {
        let problem = format!("{INDEX} names {absent}, which the repository does not have");
        return Err(session.fail(&problem, "tell the owner of the repository"));
    }
    session.fetch(&sha, weights.iter(), progress)?;
    session.remember(&sha)?;
    Ok(dir)
}

/// Fetches the `.jsonl`, `.parquet` and `.txt` files of a data set named
/// `[datasets/]org/name[/file or folder][@revision]`, and returns the folder with its files, or the
/// named file or folder in it.
pub fn resolve_dataset(spec: &str, options: &HubOptions, progress: &dyn HubProgress) -> Result<PathBuf> {
    let session = Session::new(spec.strip_prefix("datasets/").unwrap_or(spec), RepoType::Dataset, options)?;
    let part = Path::new(&session.part);
    if options.offline {
        let found = session.cached()?.join(part);
        return if found.exists() { Ok(found) } else { Err(session.not_cached("the data is not in the cache")) };
    }
    let (sha, names) = session.list()?;
    let is_data = |n: &&String| [".jsonl", ".parquet", ".txt"].iter().any(|end| n.ends_with(end));
    let wanted: Vec<&String> = names.iter().filter(is_data).filter(|n| Path::new(n).starts_with(part)).collect();
    if wanted.is_empty() {
        return Err(session.fail(
            &format!("no .jsonl, .parquet or .txt file under `{}`", session.part),
            "look at the data set's files on the hub and name a folder or file: datasets/org/name/folder",
        ));
    }
    session.fetch(&sha, wanted.into_iter(), progress)?;
    session.remember(&sha)?;
    Ok(session.cache_repo(&session.revision).pointer_path(&sha).join(part))
}

/// Chooses files of a data set by the names of all and the text of its card.
pub type Choice<'a> = &'a dyn Fn(&[String], Option<&str>) -> Vec<String>;

/// Fetches the files of a data set named `org/name[@revision]` that are chosen, and returns their paths: none where none is. The card
/// (`README.md`) is fetched for the choice. Offline the choice is among the files of the cache.
pub fn resolve_chosen(
    spec: &str,
    options: &HubOptions,
    progress: &dyn HubProgress,
    choice: Choice<'_>,
) -> Result<Vec<PathBuf>> {
    let session = Session::new(spec, RepoType::Dataset, options)?;
    let choose = |dir: &Path, names: &[String]| {
        let card = crate::files::read_text(&dir.join(CARD)).ok();
        let mut chosen = choice(names, card.as_deref());
        chosen.retain(|c| names.contains(c));
        chosen
    };
    if options.offline {
        let dir = session.cached()?;
        let mut names = Vec::new();
        names_below(&dir, "", &mut names).map_err(|source| CheckpointError::Io { file: dir.clone(), source })?;
        return Ok(choose(&dir, &names).iter().map(|name| dir.join(name)).collect());
    }
    let (sha, names) = session.list()?;
    let dir = session.cache_repo(&session.revision).pointer_path(&sha);
    session.fetch(&sha, names.iter().filter(|n| *n == CARD), progress)?;
    let chosen = choose(&dir, &names);
    session.fetch(&sha, chosen.iter(), progress)?;
    session.remember(&sha)?;
    Ok(chosen.iter().map(|name| dir.join(name)).collect())
}

/// Files of a snapshot, relative to it.
fn names_below(dir: &Path, prefix: &str, out: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            names_below(&entry.path(), &format!("{name}/"), out)?;
        } else {
            out.push(name);
        }
    }
    Ok(())
}

/// Configuration, tokenizer, templates, licence: what belongs to a model besides its weights.
fn is_small(name: &str) -> bool {
    let kept = [".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"];
    let plain = ["LICENSE", "LICENCE", "NOTICE"].contains(&name);
    !name.contains('/')
        && (plain || kept.iter().any(|end| name.ends_with(end)))
        && (name == INDEX || !name.ends_with(".index.json"))
}

fn shards_of(dir: &Path) -> Result<Vec<String>> {
    let file = dir.join(INDEX);
    let index = read_json(&file)?.unwrap_or_default();
    let map = index.get("weight_map").and_then(serde_json::Value::as_object);
    let names = map.into_iter().flat_map(|map| map.values()).filter_map(serde_json::Value::as_str);
    let mut names: Vec<String> = names.map(str::to_string).collect();
    names.sort();
    names.dedup();
    if names.is_empty() || !names.iter().all(|name| is_safe(name)) {
        return Err(CheckpointError::Invalid {
            file,
            problem: "weight_map names no files, or files outside the folder".into(),
            hint: None,
        });
    }
    Ok(names)
}

/// The first file without which a cached model is incomplete.
fn missing_of_model(dir: &Path) -> Result<Option<String>> {
    let mut needed = vec!["config.json".to_string()];
    if dir.join(INDEX).exists() {
        needed.extend(shards_of(dir)?);
    } else {
        let any = std::fs::read_dir(dir).is_ok_and(|mut entries| {
            entries
                .any(|e| e.is_ok_and(|e| e.path().extension().is_some_and(|x| x == "safetensors") && e.path().exists()))
        });
        needed.extend((!any).then(|| "model.safetensors".to_string()));
    }
    Ok(needed.into_iter().find(|name| !dir.join(name).exists()))
}

/// A relative path that stays where it is put.
fn is_safe(name: &str) -> bool {
    let odd = |c: char| c.is_control() || "\\:?#%*\"<>|".contains(c);
    let part_ok = |part: &str| !part.is_empty() && part != "." && part != "..";
    !name.contains(odd) && name.split('/').all(part_ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_follow_the_usual_variables() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from_file\n").unwrap();
        let text = home.path().to_str().unwrap().to_string();
        let options = HubOptions::from_env_map(|key| match key {
            "HF_HOME" => Some(text.clone()),
            "HF_ENDPOINT" => Some("http://mirror/".into()),
            "HF_HUB_OFFLINE" => Some("1".into()),
            "HF_HUB_DOWNLOAD_TIMEOUT" => Some("2.5".into()),
            _ => None,
        });
        assert_eq!((options.endpoint.as_str(), options.token.as_deref()), ("http://mirror", Some("from_file")));
        assert_eq!(options.silence, Duration::from_millis(2500));
        assert!(options.offline && options.cache_dir == home.path().join("hub"));
        let plain = HubOptions::from_env_map(|key| (key == "HOME").then(|| "/home/x".into()));
        assert_eq!(plain.cache_dir, Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!(plain.silence, Duration::from_secs(60));
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), ("https://huggingface.co", None, false));
    }
}
