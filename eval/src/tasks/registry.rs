//! Names to tasks: shipped files, the user's folders and files, groups and tags.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::aggregate::{GroupMetric, Scores, group_scores};
use super::config::{self, TaskConfig, distance};
use super::data::DataOptions;
use super::error::{Result, TaskError};
use super::shipped;
use super::task::Task;
use super::yaml::{self, Place};

/// All known tasks and groups; a task's keys are checked when it is loaded.
#[derive(Debug, Default)]
pub struct Registry {
    tasks: BTreeMap<String, (Place, Map<String, Json>)>,
    groups: BTreeMap<String, Group>,
    tags: BTreeMap<String, Vec<String>>,
}

/// A group's file.
#[derive(Clone, Debug)]
struct Group {
    members: Vec<(String, Map<String, Json>)>,
    metrics: Vec<GroupMetric>,
}

/// Tasks to run, and the groups asked for.
#[derive(Debug, Default)]
pub struct Suite {
    /// Ready to render, each once.
    pub tasks: Vec<Task>,
    pub(super) groups: Vec<SuiteGroup>,
}

#[derive(Debug)]
pub(super) struct SuiteGroup {
    pub(super) name: String,
    metrics: Vec<GroupMetric>,
    /// Labels of its tasks.
    pub(super) members: Vec<String>,
}

/// A task to be loaded: name, shots asked for, keys that override the file's.
type Wanted = (String, Option<usize>, Map<String, Json>);

impl Registry {
    /// The shipped tasks.
    pub fn shipped() -> Result<Self> {
        let mut out = Self::default();
        for name in shipped::names() {
            out.add(Place::Shipped(name), false)?;
        }
        Ok(out)
    }

    /// Adds every `.yaml` file below a folder; its names win over those known.
    pub fn add_folder(&mut self, dir: &Path) -> Result<()> {
        let mut files = Vec::new();
        yaml_files(dir, &mut files).map_err(|source| TaskError::Read { file: dir.to_owned(), source })?;
        files.sort();
        files.into_iter().try_for_each(|f| self.add(Place::Disk(f), false).map(|_| ()))
    }

    /// Adds a file; returns the names it defines. A file that defines nothing is only for others to include, and an error
    /// where it is `named` by the user.
    fn add(&mut self, place: Place, named: bool) -> Result<Vec<String>> {
        let mut map = yaml::load(&place)?;
        let wrong = |problem: String| TaskError::File { file: place.path(), problem };
        if let Some(name) = map.get("group").and_then(Json::as_str).map(str::to_owned) {
            let mut nested = Vec::new();
            let group = group(&map, &mut nested).map_err(|p| wrong(format!("group `{name}`: {p}")))?;
            self.groups.extend(nested);
            self.groups.insert(name.clone(), group);
            return Ok(vec![name]);
        }
        let entries: Vec<Map<String, Json>> = match map.remove("task_list") {
            None if map.contains_key("task") => vec![map],
            None if named => return Err(wrong("defines no `task`, `task_list` or `group`".into())),
            None => return Ok(Vec::new()),
            Some(Json::Array(list)) => {
                let merged = list.into_iter().map(|entry| {
                    let Json::Object(own) = entry else {
                        return Err(wrong("`task_list`: expected the keys of tasks".into()));
                    };
                    let mut all = map.clone();
                    all.extend(own);
                    Ok(all)
                });
                merged.collect::<Result<_>>()?
            }
            Some(_) => return Err(wrong("`task_list`: expected a list".into())),
        };
        let mut names = Vec::new();
        for entry in entries {
            let Some(name) = entry.get("task").and_then(Json::as_str).map(str::to_owned) else {
                return Err(wrong("`task`: expected a name".into()));
            };
            let tags = match entry.get("tag") {
                Some(Json::String(tag)) => vec![tag.clone()],
                Some(Json::Array(tags)) => tags.iter().filter_map(Json::as_str).map(str::to_owned).collect(),
                _ => Vec::new(),
            };
            for tag in tags {
                let members = self.tags.entry(tag).or_default();
                if !members.contains(&name) {
                    members.push(name.clone());
                }
            }
            self.tasks.insert(name.clone(), (place.clone(), entry));
            names.push(name);
        }
        Ok(names)
    }

    /// Names of tasks, groups and tags.
    pub fn names(&self) -> BTreeSet<&str> {
        let all = self.tasks.keys().chain(self.groups.keys()).chain(self.tags.keys());
        all.map(String::as_str).collect()
    }

    /// Loads what `specs` name: a task, group, tag, pattern with `*`, or path of a task file, each with `:shots` at most.
    pub fn load(&mut self, specs: &[String], data: &DataOptions<'_>) -> Result<Suite> {
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut groups = Vec::new();
        for spec in specs {
            let (name, shots) = match spec.rsplit_once(':') {
                Some((name, shots)) if !shots.is_empty() && shots.bytes().all(|b| b.is_ascii_digit()) => {
                    let n = shots.parse().map_err(|_| self.unknown(spec))?;
                    (name, Some(n))
                }
                _ => (spec.as_str(), None),
            };
            let names = if name.ends_with(".yaml") || name.ends_with(".yml") {
                self.add(Place::Disk(PathBuf::from(name)), true)?
            } else if name.contains('*') {
                let hits: Vec<String> = self.tasks.keys().filter(|t| matches(name, t)).cloned().collect();
                if hits.is_empty() {
                    return Err(self.unknown(name));
                }
                hits
            } else {
                vec![name.to_owned()]
            };
            for name in names {
                self.expand(&name, shots, &Map::new(), &mut wanted, &mut groups, &mut Vec::new())?;
            }
        }
        let mut tasks: Vec<Task> = Vec::new();
        for (name, shots, overrides) in wanted {
            let label = label(&name, shots);
            if tasks.iter().all(|t| t.label != label) {
                tasks.push(Task::load(self.config(&name, &overrides)?, shots, label, data)?);
            }
        }
        Ok(Suite { tasks, groups })
    }

    fn config(&self, name: &str, overrides: &Map<String, Json>) -> Result<TaskConfig> {
        let (place, map) = self.tasks.get(name).ok_or_else(|| self.unknown(name))?;
        let mut map = map.clone();
        map.extend(overrides.clone());
        config::parse(place, &map)
    }

    /// Follows groups and tags down to tasks; returns the labels of those.
    fn expand(
        &self,
        name: &str,
        shots: Option<usize>,
        overrides: &Map<String, Json>,
        wanted: &mut Vec<Wanted>,
        groups: &mut Vec<SuiteGroup>,
        open: &mut Vec<String>,
    ) -> Result<Vec<String>> {
        if self.tasks.contains_key(name) {
            wanted.push((name.to_owned(), shots, overrides.clone()));
            return Ok(vec![label(name, shots)]);
        }
        let none = Map::new();
        let members: Vec<(&str, &Map<String, Json>)> = match (self.groups.get(name), self.tags.get(name)) {
            (Some(group), _) => group.members.iter().map(|(m, o)| (m.as_str(), o)).collect(),
            (None, Some(tag)) => tag.iter().map(|t| (t.as_str(), &none)).collect(),
            (None, None) => return Err(self.unknown(name)),
        };
        if open.iter().any(|o| o == name) {
            return Err(TaskError::Unknown { name: name.into(), hint: "this group contains itself".into() });
        }
        open.push(name.to_owned());
        let at = groups.len();
        let mut labels = Vec::new();
        for (member, own) in members {
            let mut all = overrides.clone();
            all.extend(own.clone());
            labels.extend(self.expand(member, shots, &all, wanted, groups, open)?);
        }
        open.pop();
        if let Some(group) = self.groups.get(name)
            && groups.iter().all(|g| g.name != name)
        {
            // Before its subgroups, as they are printed.
            groups
                .insert(at, SuiteGroup { name: name.into(), metrics: group.metrics.clone(), members: labels.clone() });
        }
        Ok(labels)
    }

    fn unknown(&self, name: &str) -> TaskError {
        let mut near: Vec<&str> = self.names().into_iter().collect();
        near.sort_by_key(|n| (distance(n, name), *n));
        near.truncate(3);
        TaskError::Unknown {
            name: name.into(),
            hint: format!(
                "the nearest names are {}; a task file of your own is given by its path, or its folder with --include",
                near.join(", ")
            ),
        }
    }
}

impl Suite {
    /// Names and scores of the groups asked for, from the scores of their tasks by label.
    pub fn groups(&self, scores: &BTreeMap<String, Scores>) -> Vec<(String, Scores)> {
        self.groups
            .iter()
            .map(|g| {
                let parts: Vec<&Scores> = g.members.iter().filter_map(|m| scores.get(m)).collect();
                (g.name.clone(), group_scores(&g.metrics, &parts))
            })
            .collect()
    }
}

fn label(name: &str, shots: Option<usize>) -> String {
    shots.map_or_else(|| name.to_owned(), |n| format!("{name}:{n}"))
}

/// Whether a name fits a pattern of parts between `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn yaml_files(dir: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            yaml_files(&path, out)?;
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            out.push(path);
        }
    }
    Ok(())
}

/// A group; those written out inside it are put into `nested`, by their names.
fn group(map: &Map<String, Json>, nested: &mut Vec<(String, Group)>) -> std::result::Result<Group, String> {
    let known = ["group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"];
    if let Some(key) = map.keys().find(|k| !known.contains(&k.as_str())) {
        return Err(format!("unknown key `{key}`; there are {}", known.join(", ")));
    }
    let list = match map.get("task") {
        Some(Json::Array(list)) => list.clone(),
        Some(one @ Json::String(_)) => vec![one.clone()],
        _ => return Err("`task`: expected a list of tasks".into()),
    };
    let mut members = Vec::new();
    for member in list {
        match member {
            Json::String(name) => members.push((name, Map::new())),
            Json::Object(keys) if keys.contains_key("group") => {
                let name = keys.get("group").and_then(Json::as_str).ok_or("`group`: expected a name")?.to_owned();
                let own = group(&keys, nested).map_err(|p| format!("group `{name}`: {p}"))?;
                nested.push((name.clone(), own));
                members.push((name, Map::new()));
            }
            Json::Object(mut keys) => match keys.remove("task") {
                Some(Json::String(name)) => members.push((name, keys)),
                _ => return Err("a member with keys of its own needs its `task`".into()),
            },
            other => return Err(format!("`task`: expected names, found {other}")),
        }
    }
    let listed = match map.get("aggregate_metric_list") {
        None | Some(Json::Null) => Vec::new(),
        Some(Json::Array(list)) => list.clone(),
        Some(one) => vec![one.clone()],
    };
    let mut metrics = Vec::new();
    for entry in listed {
        let metric = entry.get("metric").and_then(Json::as_str).ok_or("an aggregate needs its `metric`")?;
        if entry.get("aggregation").is_some_and(|a| a != "mean") {
            return Err("groups aggregate by `mean`".into());
        }
        let filters = match entry.get("filter_list") {
            None | Some(Json::Null) => None,
            Some(Json::String(one)) => Some(vec![one.clone()]),
            Some(Json::Array(list)) => Some(list.iter().filter_map(Json::as_str).map(str::to_owned).collect()),
            Some(other) => return Err(format!("`filter_list`: expected names, found {other}")),
        };
        let weight_by_size = entry.get("weight_by_size").is_none_or(|w| w != &Json::Bool(false));
        metrics.push(GroupMetric { metric: metric.into(), filters, weight_by_size });
    }
    Ok(Group { members, metrics })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_shipped_parses() {
        let r = Registry::shipped().unwrap();
        for (name, (place, map)) in &r.tasks {
            let config = config::parse(place, map).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(config.unscored, None, "{name}");
        }
        assert_eq!(r.tasks.keys().filter(|t| t.starts_with("mmlu_")).count(), 57);
        for name in [
            "hellaswag",
            "arc_easy",
            "arc_challenge",
            "piqa",
            "winogrande",
            "openbookqa",
            "boolq",
            "copa",
            "commonsense_qa",
            "lambada_openai",
            "mmlu",
            "mmlu_stem",
            "truthfulqa_mc1",
            "truthfulqa_mc2",
            "gsm8k",
            "wikitext",
            "ai2_arc",
        ] {
            assert!(r.names().contains(name), "{name}");
        }
        let (mut wanted, mut groups) = (Vec::new(), Vec::new());
        r.expand("mmlu", Some(5), &Map::new(), &mut wanted, &mut groups, &mut Vec::new()).unwrap();
        assert_eq!((wanted.len(), groups.len(), groups[0].members.len()), (57, 5, 57));
        assert_eq!(groups[0].name, "mmlu");
        assert_eq!(groups[1].members.len(), 19);
    }

    #[test]
    fn groups_may_be_written_inside_groups() {
        let dir = tempfile::tempdir().unwrap();
        let all = "group: all\ntask:\n  - piqa\n  - group: science\n    task:\n      - arc_easy\n      - {task: arc_challenge, num_fewshot: 3}\n    aggregate_metric_list:\n      - metric: acc\n";
        std::fs::write(dir.path().join("all.yaml"), all).unwrap();
        let mut r = Registry::shipped().unwrap();
        r.add_folder(dir.path()).unwrap();
        let (mut wanted, mut groups) = (Vec::new(), Vec::new());
        let labels = r.expand("all", None, &Map::new(), &mut wanted, &mut groups, &mut Vec::new()).unwrap();
        assert_eq!(labels, ["piqa", "arc_easy", "arc_challenge"]);
        assert_eq!(wanted[2].2.get("num_fewshot"), Some(&Json::from(3)));
        let named: Vec<(&str, usize, usize)> =
            groups.iter().map(|g| (g.name.as_str(), g.members.len(), g.metrics.len())).collect();
        assert_eq!(named, [("all", 3, 0), ("science", 2, 1)]);
        std::fs::write(dir.path().join("all.yaml"), "group: all\ntask:\n  - group: inner\n    tasks: [piqa]\n")
            .unwrap();
        let e = r.add_folder(dir.path()).unwrap_err().to_string();
        assert!(e.contains("group `all`: group `inner`: unknown key `tasks`"), "{e}");
    }

    #[test]
    fn unknown_names_get_a_hint() {
        let e =
            Registry::shipped().unwrap().load(&["arc_hard".into()], &DataOptions::default()).unwrap_err().to_string();
        assert!(e.contains("unknown task `arc_hard`") && e.contains("arc_easy"), "{e}");
    }

    #[test]
    fn patterns() {
        assert!(matches("mmlu_*", "mmlu_anatomy") && matches("*a*y", "anatomy") && matches("a*", "a"));
        assert!(!matches("mmlu_*", "piqa") && !matches("a*b*c", "acb") && !matches("*x", "xy"));
    }
}
