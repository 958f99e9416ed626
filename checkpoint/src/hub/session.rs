//! One repository: what the hub lists, what the cache holds, and safe downloads from one to the other.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::silence::{Sign, heard, is_silence};
use super::{HubOptions, HubProgress, is_safe};
use crate::error::{CheckpointError, Result};

const ATTEMPTS: u32 = 3;

/// One repository at one revision.
pub(super) struct Session<'a> {
    spec: &'a str,
    id: String,
    pub(super) part: String,
    pub(super) revision: String,
    kind: RepoType,
    options: &'a HubOptions,
    cache: Cache,
    api: Api,
}

impl<'a> Session<'a> {
    pub(super) fn new(spec: &'a str, kind: RepoType, options: &'a HubOptions) -> Result<Self> {
        let (path, revision) = spec.split_once('@').unwrap_or((spec, "main"));
        let parts: Vec<&str> = path.splitn(3, '/').collect();
        let (id, part) = match parts.as_slice() {
            [org, name, rest] => (format!("{org}/{name}"), rest.to_string()),
            _ => (path.to_string(), String::new()),
        };
        let id_ok = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let part_ok = part.is_empty() || (matches!(kind, RepoType::Dataset) && is_safe(&part));
        let fail = |problem: &str| CheckpointError::Hub {
            repo: spec.to_string(),
            problem: problem.to_string(),
            hint: Some("write it as org/name or org/name@revision, or give the path of a folder".into()),
        };
        if !is_safe(&id) || !id.chars().all(id_ok) || !part_ok {
            return Err(fail("not the name of a repository"));
        }
        if !is_safe(revision) || revision.contains(char::is_whitespace) {
            return Err(fail("not a revision"));
        }
        let api = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_progress(false)
            .with_user_agent("lowbit", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| fail(&error.to_string()))?;
        let (revision, cache) = (revision.to_string(), Cache::new(options.cache_dir.clone()));
        Ok(Self { spec, id, part, revision, kind, options, cache, api })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), self.kind, revision.to_string())
    }

    pub(super) fn cache_repo(&self, revision: &str) -> CacheRepo {
        self.cache.repo(self.repo(revision))
    }

    pub(super) fn fail(&self, problem: &str, hint: &str) -> CheckpointError {
        CheckpointError::Hub { repo: self.spec.into(), problem: problem.into(), hint: Some(hint.into()) }
    }

    pub(super) fn not_cached(&self, problem: &str) -> CheckpointError {
        let hint = format!(
            "run once with a network and without HF_HUB_OFFLINE, or set HF_HOME to the cache that has it (now {})",
            self.options.cache_dir.display()
        );
        self.fail(&format!("offline, and {problem}"), &hint)
    }

    /// The snapshot folder that the cache has for the revision.
    pub(super) fn cached(&self) -> Result<PathBuf> {
        let repo = self.cache_repo(&self.revision);
        let root = self.options.cache_dir.join(self.repo(&self.revision).folder_name());
        let named = std::fs::read_to_string(root.join("refs").join(&self.revision)).ok();
        let sha = named.map_or_else(|| self.revision.clone(), |text| text.trim().to_string());
        let dir = repo.pointer_path(&sha);
        let found = is_safe(&sha) && dir.is_dir();
        if found { Ok(dir) } else { Err(self.not_cached(&format!("revision {} is not in the cache", self.revision))) }
    }

    /// Commit and file names of the revision.
    pub(super) fn list(&self) -> Result<(String, Vec<String>)> {
        let mut attempt = 1;
        let info = loop {
            let repo = self.api.repo(self.repo(&self.revision));
            match heard(self.options.silence, move |_| repo.info(), &mut |_| ()) {
                Ok(info) => break info,
                Err(error) if attempt == ATTEMPTS || !may_pass(&error) => return Err(self.explain(&error, None)),
                Err(error) => pause(&error, attempt),
            }
            attempt += 1;
        };
        let names: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let sha_ok = !info.sha.is_empty() && info.sha.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !sha_ok || !names.iter().all(|name| is_safe(name)) {
            return Err(self.fail("the hub's answer names an impossible commit or file", "check HF_ENDPOINT"));
        }
        Ok((info.sha, names))
    }

    /// Notes that the revision is this commit, once all its files are here.
    pub(super) fn remember(&self, sha: &str) -> Result<()> {
        let written = self.cache_repo(&self.revision).create_ref(sha);
        written.map_err(|source| CheckpointError::Io { file: self.options.cache_dir.clone(), source })
    }

    pub(super) fn fetch<'n>(
        &self,
        sha: &str,
        names: impl Iterator<Item = &'n String>,
        progress: &dyn HubProgress,
    ) -> Result<()> {
        let cache = self.cache_repo(sha);
        for name in names {
            let pointer = cache.pointer_path(sha).join(name);
            // A file appears in a snapshot only when complete, and a commit's files never change.
            if !pointer.exists() {
                self.fetch_one(&cache, sha, name, &pointer, progress)?;
            }
        }
        Ok(())
    }

    fn fetch_one(
        &self,
        cache: &CacheRepo,
        sha: &str,
        name: &str,
        pointer: &Path,
        progress: &dyn HubProgress,
    ) -> Result<()> {
        let watch = Watch { inner: progress, started: Cell::new(false), told: Cell::new(0), seen: Cell::new(0) };
        let mut attempt = 1;
        let error = loop {
            let (api, remote) = (self.api.clone(), self.api.repo(self.repo(sha)));
            let url = remote.url(name);
            let outcome = heard(self.options.silence, move |_| api.metadata(&url), &mut |_| ()).and_then(|meta| {
                let ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                let etag = meta.etag().strip_prefix("W/").unwrap_or(meta.etag());
                if meta.commit_hash() != sha || etag.is_empty() || !etag.chars().all(ok) {
                    return Err(ApiError::InvalidHeader("x-repo-commit or etag"));
                }
                let blob = cache.blob_path(meta.etag());
                // A link to nothing would be in the way of the new one.
                if pointer.is_symlink() {
                    std::fs::remove_file(pointer)?;
                }
                let part = blob.with_extension("part");
                if std::fs::metadata(&part).is_ok_and(|part| part.len() >= meta.size() as u64) {
                    std::fs::remove_file(&part)?;
                }
                let file = name.to_string();
                heard(self.options.silence, move |signs| remote.download_with_progress(&file, signs), &mut |sign| {
                    watch.see(name, sign)
                })?;
                Ok((meta, blob))
            });
            let error = match outcome {
                Ok((meta, blob)) => {
                    let Some(problem) = wrong_content(&blob, meta.size() as u64, meta.etag())? else {
                        progress.finish();
                        return Ok(());
                    };
                    for file in [pointer, &blob] {
                        std::fs::remove_file(file)
                            .map_err(|source| CheckpointError::Io { file: file.into(), source })?;
                    }
                    ApiError::IoError(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, problem))
                }
                Err(error) => error,
            };
            if attempt == ATTEMPTS || !may_pass(&error) {
                break error;
            }
            pause(&error, attempt);
            attempt += 1;
        };
        Err(self.explain(&error, Some(name)))
    }

    /// What went wrong and what to do about it.
    fn explain(&self, error: &ApiError, file: Option<&str>) -> CheckpointError {
        let what = file.map_or_else(|| "the repository".to_string(), |file| format!("file {file}"));
        let page = format!("{}/{}", self.options.endpoint, self.repo(&self.revision).url());
        match status(error) {
            Some(code @ (401 | 403)) => {
                let (who, hint) = match &self.options.token {
                    Some(_) => ("with this token", "check that the token in HF_TOKEN may read it"),
                    None => {
                        ("without a token", "check the name's spelling; where it is gated or private, set HF_TOKEN")
                    }
                };
                let hint = format!("{hint}, and accept the conditions on {page}");
                self.fail(&format!("access to {what} was refused {who} (HTTP {code})"), &hint)
            }
            Some(404) => {
                let main = self.api.repo(self.repo("main"));
                let listed = || heard(self.options.silence, move |_| main.info(), &mut |_| ()).is_ok();
                let known = || self.revision != "main" && listed();
                if file.is_none() && known() {
                    let problem = format!("unknown revision `{}` (HTTP 404)", self.revision);
                    return self.fail(&problem, "give a branch, a tag or a full commit hash, or leave @revision away");
                }
                self.fail(&format!("{what} was not found (HTTP 404)"), &format!("check the name's spelling on {page}"))
            }
            Some(429) => self.fail("too many requests (HTTP 429)", "wait some minutes, or set HF_TOKEN"),
            Some(code) => self.fail(&format!("the hub answered HTTP {code} for {what}"), "try again later"),
            None => {
                let hint = "check the network, the free disk space and HF_ENDPOINT, and run it again (what is here is \
                            kept); HF_HUB_OFFLINE=1 uses the cache alone";
                self.fail(&format!("cannot fetch {what} from {}: {error}", self.options.endpoint), hint)
            }
        }
    }
}

/// Whether another attempt may fare better: a refusal stays one, a busy hub or a cut connection does not.
fn may_pass(error: &ApiError) -> bool {
    let refused = |code: u16| (400..500).contains(&code) && ![408, 416, 429].contains(&code);
    !matches!(error, ApiError::InvalidHeader(_)) && !is_silence(error) && !status(error).is_some_and(refused)
}

/// Waits before the next attempt, longer for a hub that asked for fewer requests.
fn pause(error: &ApiError, attempt: u32) {
    let step = if status(error) == Some(429) { 1000 } else { 250 };
    std::thread::sleep(Duration::from_millis(step) * attempt);
}

/// The HTTP status in an error: the HTTP client's type is not ours to name, its text is.
fn status(error: &ApiError) -> Option<u16> {
    let ApiError::RequestError(inner) = error else {
        return None;
    };
    inner.to_string().strip_prefix("http status: ")?.trim().parse().ok()
}

/// Why a downloaded file is not what the hub announced. Large files are announced by their SHA-256.
fn wrong_content(blob: &Path, size: u64, etag: &str) -> Result<Option<String>> {
    let found = std::fs::metadata(blob).map_err(|source| CheckpointError::Io { file: blob.into(), source })?.len();
    if found != size {
        return Ok(Some(format!("{found} of {size} bytes arrived")));
    }
    let is_sha256 = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    let differs = is_sha256 && !crate::hash::sha256_file(blob)?.eq_ignore_ascii_case(etag);
    Ok(differs.then(|| "the content does not match its SHA-256".to_string()))
}

/// Passes on progress without counting twice what a second attempt fetches again.
struct Watch<'a> {
    inner: &'a dyn HubProgress,
    started: Cell<bool>,
    told: Cell<u64>,
    seen: Cell<u64>,
}

impl Watch<'_> {
    fn see(&self, file: &str, sign: Sign) {
        match sign {
            Sign::Begun(size) => {
                self.seen.set(0);
                if !self.started.replace(true) {
                    self.inner.start(file, size as u64);
                }
            }
            Sign::Bytes(size) => {
                let seen = self.seen.get() + size as u64;
                self.seen.set(seen);
                if seen > self.told.get() {
                    self.inner.advance(seen - self.told.replace(seen));
                }
            }
        }
    }
}
