//! Which files of a hub data set hold a split: by the `configs` of its card, by names of folders and files, or, of the hub's own
//! Parquet copy, by its layout.

use serde_json::Value as Json;

use super::EXTENSIONS;

/// The files of a split, as the card says or as folders are named; none where the data set has no such configuration.
pub(super) fn choose(names: &[String], card: Option<&str>, config: Option<&str>, split: &str) -> Vec<String> {
    let front = card.and_then(front_matter);
    match front.and_then(|f| by_card(&f, names, config, split)) {
        Some(files) => files,
        None => by_folder(names, config, split),
    }
}

/// The same of the branch `refs/convert/parquet`: `config/split/0000.parquet`, earlier `config/name-split.parquet`.
pub(super) fn converted(names: &[String], config: Option<&str>, split: &str) -> Vec<String> {
    let first = |n: &String| n.split_once('/').map(|p| p.0.to_owned());
    let mut folders: Vec<String> = names.iter().filter_map(first).collect();
    folders.sort();
    folders.dedup();
    let wanted = match (config, folders.as_slice()) {
        (Some(name), _) => name,
        (None, [only]) => only.as_str(),
        (None, _) => "default",
    };
    let of_split = |n: &&String| {
        let rest = n.strip_prefix(wanted).and_then(|r| r.strip_prefix('/'));
        rest.is_some_and(|r| match r.split_once('/') {
            Some((folder, _)) => folder == split,
            None => begins(r, split) || r.contains(&format!("-{split}.")) || r.contains(&format!("-{split}-")),
        })
    };
    readable(names.iter().filter(of_split).cloned().collect())
}

/// Files with the split in a folder's name or at the start of their own.
pub(super) fn by_split(names: &[String], split: &str) -> Vec<String> {
    let found = names.iter().filter(|n| n.split('/').any(|part| begins(part, split)));
    readable(found.cloned().collect())
}

/// The split, alone or before a mark.
fn begins(part: &str, split: &str) -> bool {
    part.strip_prefix(split).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.', '_']))
}

/// Of several formats of the same data one is enough: the one that is read best.
fn readable(names: Vec<String>) -> Vec<String> {
    let of = |ext: &&str| -> Vec<String> {
        let mut found: Vec<String> = names.iter().filter(|n| n.ends_with(&format!(".{ext}"))).cloned().collect();
        found.sort();
        found
    };
    EXTENSIONS.iter().map(of).find(|found| !found.is_empty()).unwrap_or_default()
}

fn by_folder(names: &[String], config: Option<&str>, split: &str) -> Vec<String> {
    let Some(config) = config else { return by_split(names, split) };
    let inside: Vec<String> = names.iter().filter(|n| n.split('/').any(|part| part == config)).cloned().collect();
    let found = by_split(&inside, split);
    // `default` is what a data set without configurations has.
    if found.is_empty() && config == "default" { by_split(names, split) } else { found }
}

/// The YAML between the two `---` at the start of a card.
fn front_matter(card: &str) -> Option<Json> {
    let card = card.replace("\r\n", "\n");
    let inside = card.trim_start_matches('\u{feff}').strip_prefix("---\n")?;
    let (yaml, _) = inside.split_once("\n---")?;
    serde_saphyr::from_str(yaml).ok()
}

/// By `configs`: none where the card lists no such configuration.
fn by_card(front: &Json, names: &[String], config: Option<&str>, split: &str) -> Option<Vec<String>> {
    let configs = front.get("configs")?.as_array()?;
    let named = |name: &str| configs.iter().find(|c| c.get("config_name").and_then(Json::as_str) == Some(name));
    let own = match config {
        Some(name) => named(name),
        None => configs
            .iter()
            .find(|c| c.get("default") == Some(&Json::Bool(true)))
            .or_else(|| named("default"))
            .or_else(|| configs.first().filter(|_| configs.len() == 1)),
    }?;
    let folder = own.get("data_dir").and_then(Json::as_str).map(|d| d.trim_matches('/')).filter(|d| !d.is_empty());
    let below: Vec<String> = match folder {
        Some(d) => names.iter().filter(|n| n.strip_prefix(d).is_some_and(|r| r.starts_with('/'))).cloned().collect(),
        None => names.to_vec(),
    };
    let Some(files) = own.get("data_files") else { return Some(by_split(&below, split)) };
    let matching = |patterns: &[String]| -> Vec<String> {
        let at = |p: &String| folder.map_or_else(|| p.clone(), |d| format!("{d}/{p}"));
        let patterns: Vec<String> = patterns.iter().map(|p| at(&p.trim_start_matches("./").to_owned())).collect();
        readable(below.iter().filter(|n| patterns.iter().any(|p| matches(p, n))).cloned().collect())
    };
    let entries: Vec<(Option<&str>, Vec<String>)> = match files {
        Json::Object(map) => map.iter().map(|(split, paths)| (Some(split.as_str()), strings(paths))).collect(),
        Json::Array(list) => list
            .iter()
            .map(|entry| match entry.get("path") {
                Some(path) => (entry.get("split").and_then(Json::as_str), strings(path)),
                None => (None, strings(entry)),
            })
            .collect(),
        one => vec![(None, strings(one))],
    };
    if entries.iter().any(|e| e.0.is_some()) {
        let of_split = entries.iter().filter(|e| e.0 == Some(split));
        let patterns: Vec<String> = of_split.flat_map(|e| e.1.clone()).collect();
        return Some(matching(&patterns));
    }
    // Files without splits: by their names, or all of them are for training.
    let all = matching(&entries.into_iter().flat_map(|e| e.1).collect::<Vec<_>>());
    let found = by_split(&all, split);
    Some(if found.is_empty() && split == "train" { all } else { found })
}

fn strings(value: &Json) -> Vec<String> {
    match value {
        Json::String(one) => vec![one.clone()],
        Json::Array(list) => list.iter().filter_map(Json::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// Whether a path fits a pattern: `*` and `?` within a part, `**` for any number of parts.
fn matches(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<&str>, Vec<&str>) = (pattern.split('/').collect(), path.split('/').collect());
    parts_match(&pattern, &path)
}

fn parts_match(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((&"**", rest)), _) => {
            parts_match(rest, path) || path.split_first().is_some_and(|(_, after)| parts_match(pattern, after))
        }
        (Some((first, rest)), Some((part, after))) => part_matches(first, part) && parts_match(rest, after),
        _ => false,
    }
}

fn part_matches(pattern: &str, part: &str) -> bool {
    let (pattern, part): (Vec<char>, Vec<char>) = (pattern.chars().collect(), part.chars().collect());
    let (mut p, mut i) = (0, 0);
    // Where the last `*` stood, and how much it took so far.
    let mut star: Option<(usize, usize)> = None;
    while i < part.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, i));
                p += 1;
            }
            Some(c) if *c == '?' || *c == part[i] => {
                p += 1;
                i += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, i) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn patterns_of_paths() {
        for (pattern, path, fits) in [
            ("data/train-*", "data/train-00000-of-00002.parquet", true),
            ("data/*", "data/a/b.csv", false),
            ("**/*.csv", "a/b/c.csv", true),
            ("**/*.csv", "c.csv", true),
            ("en/**", "en/x/y.json", true),
            ("a?.json", "ab.json", true),
            ("*a*b", "xaab", true),
            ("*a*b", "xaac", false),
            ("train.csv", "train.csv.gz", false),
        ] {
            assert_eq!(matches(pattern, path), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn the_card_says_which_files() {
        let files =
            names(&["README.md", "main/test.csv", "main/train.csv", "old/test-1.jsonl", "extra/q.json", "x.zip"]);
        let card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: test\n    path: main/t*t.csv\n  - split: train\n    path: [main/train.csv]\n- config_name: old\n  data_files: old/*\n- config_name: extra\n  data_dir: extra\n  data_files: '*.json'\n---\nText.\n";
        let found = |config: Option<&str>, split: &str| choose(&files, Some(card), config, split);
        assert_eq!(found(None, "test"), ["main/test.csv"]);
        assert_eq!(found(Some("main"), "train"), ["main/train.csv"]);
        assert_eq!(found(Some("old"), "test"), ["old/test-1.jsonl"]);
        assert_eq!(found(Some("extra"), "train"), ["extra/q.json"]);
        assert!(found(Some("extra"), "test").is_empty() && found(Some("other"), "test").is_empty());
    }

    #[test]
    fn folders_and_names_where_there_is_no_card() {
        let files = names(&["a/test.jsonl", "a/test.csv", "b/test-00000.parquet", "default/test.json", "trainer.csv"]);
        assert_eq!(choose(&files, None, Some("a"), "test"), ["a/test.jsonl"]);
        assert_eq!(choose(&files, Some("no front matter"), Some("b"), "test"), ["b/test-00000.parquet"]);
        assert_eq!(choose(&files, None, Some("default"), "test"), ["default/test.json"]);
        assert_eq!(choose(&names(&["test.csv"]), None, Some("default"), "test"), ["test.csv"]);
        assert!(choose(&files, None, Some("c"), "test").is_empty() && choose(&files, None, None, "train").is_empty());
    }

    #[test]
    fn the_hubs_own_parquet() {
        let files = names(&["main/test/0000.parquet", "main/train/0000.parquet", "socratic/test/0000.parquet"]);
        assert_eq!(converted(&files, Some("main"), "test"), ["main/test/0000.parquet"]);
        assert!(converted(&files, None, "test").is_empty());
        let older = names(&["plain/piqa-validation.parquet", "plain/piqa-test.parquet"]);
        assert_eq!(converted(&older, None, "validation"), ["plain/piqa-validation.parquet"]);
    }
}
