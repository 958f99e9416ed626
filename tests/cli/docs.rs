//! Pages that are generated from the program or from records, and links that must lead somewhere.

use std::process::Command;

use super::{json, lowbit, ok, root, stderr};

/// The help of a command, or of the program.
pub fn help(args: &[&str]) -> String {
    let tmp = tempfile::tempdir().unwrap();
    String::from_utf8(ok(lowbit(tmp.path()).args(args).arg("--help")).stdout).unwrap()
}

/// The commands that the program's help lists.
pub fn commands(top: &str) -> Vec<&str> {
    let lines = top.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
    let names = lines.filter_map(|l| l.strip_prefix("  ")?.split(' ').next());
    let commands: Vec<&str> = names.filter(|w| !w.is_empty() && *w != "help").collect();
    assert!(commands.contains(&"quantize") && commands.len() > 15, "{commands:?}");
    commands
}

/// `docs/cli.md`: the help of every command, as it is printed.
#[test]
fn the_cli_reference_is_that_of_the_program() {
    let first = help(&[]);
    let commands = commands(&first);
    let mut page = String::from("# Command line\n\nGenerated from the program by `tests/cli/docs.rs`.\n");
    for (title, text) in [("lowbit".to_string(), first.clone())]
        .into_iter()
        .chain(commands.iter().map(|c| (format!("lowbit {c}"), help(&[c]))))
    {
        let text: Vec<&str> = text.lines().map(str::trim_end).collect();
        page += &format!("\n## {title}\n\n```text\n{}\n```\n", text.join("\n").trim_end());
    }
    let path = root().join("docs/cli.md");
    if std::env::var_os("INSTA_UPDATE").is_some_and(|v| v == "always") {
        std::fs::write(&path, &page).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == page, "docs/cli.md: INSTA_UPDATE=always cargo test --release --workspace --test integration docs");
}

/// What a page has between the marks of a generated block.
fn generated<'a>(page: &'a str, name: &str) -> &'a str {
    let mark = format!("<!-- generated: {name} -->\n");
    let (_, rest) = page.split_once(&mark).unwrap_or_else(|| panic!("no block {name}"));
    rest.split_once("<!-- end -->").unwrap_or_else(|| panic!("{name}: no end")).0
}

/// Pages and blocks that name a record (`Record: ...`) are what their script makes of it today.
#[test]
fn tables_of_measurements_are_those_of_their_records() {
    if ["python3", "jq"].iter().any(|c| !Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success())) {
        eprintln!("skipped: no python3 or no jq");
        return;
    }
    let mut seen = 0;
    for (page, block, script) in [
        ("docs/performance.md", None, "bench/peers/compare"),
        ("docs/accuracy.md", None, "bench/peers/accuracy"),
        ("docs/formats.md", Some("narrow-formats"), "checkpoint/judges/narrow_formats.py"),
        ("docs/formats.md", Some("judges"), "checkpoint/judges/judge"),
        ("docs/load.md", Some("load-check"), "bench/load-check"),
        ("docs/serve.md", Some("measure"), "serve/measure"),
        ("docs/serve.md", Some("clients-check"), "serve/clients-check"),
    ] {
        let Ok(text) = std::fs::read_to_string(root().join(page)) else { continue };
        let found = block.map_or(text.as_str(), |name| generated(&text, name));
        let records: Vec<&str> = found.split("Record: `").skip(1).filter_map(|rest| rest.split('`').next()).collect();
        if records.is_empty() {
            continue;
        }
        let mut c = super::script(script);
        let made = ok(c.arg("--render").args(&records).current_dir(root()).env("PYTHONDONTWRITEBYTECODE", "1"));
        assert!(String::from_utf8(made.stdout).unwrap() == found, "{page}: {script} --render {}", records.join(" "));
        seen += 1;
    }
    assert!(seen > 0, "no page names a record");
}

/// `docs/gpu-h100.md`: its comment names the command that makes what follows.
#[test]
fn the_gpus_figures_are_those_of_their_record() {
    let page = std::fs::read_to_string(root().join("docs/gpu-h100.md")).unwrap();
    let (head, figures) = page.split_once(" -->\n\n").unwrap();
    let command = head.split_once("<!-- Generated: lowbit ").unwrap().1.split(';').next().unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let made = ok(lowbit(tmp.path()).args(command.split(' ')));
    assert!(String::from_utf8(made.stdout).unwrap() == figures, "docs/gpu-h100.md: lowbit {command}");
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut pages = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    pages.extend(std::fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().path()));
    for page in pages.iter().filter(|p| p.extension().is_some_and(|e| e == "md")) {
        let text = std::fs::read_to_string(page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.contains(' ') {
                continue;
            }
            assert!(page.parent().unwrap().join(file).exists(), "{}: {link}", page.display());
        }
    }
}

/// Blocks of a page, by their language, in order.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let parts: Vec<&str> = text.split("```").collect();
    let of = |part: &&str| part.strip_prefix(language).and_then(|p| p.strip_prefix('\n')).map(str::to_string);
    parts.iter().skip(1).step_by(2).filter_map(of).collect()
}

/// The files and commands of `docs/extending.md`, followed to the letter.
#[test]
fn the_task_of_the_page_runs() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("capitals");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("capitals.yaml"), &blocks("docs/extending.md", "yaml")[0]).unwrap();
    std::fs::write(dir.join("capitals.jsonl"), &blocks("docs/extending.md", "json")[0]).unwrap();
    let commands = &blocks("docs/extending.md", "")[0];
    for line in commands.lines() {
        let args = line.strip_prefix("lowbit ").unwrap().split(' ');
        ok(lowbit(tmp.path()).args(["--device", "cpu"]).args(args).current_dir(tmp.path()));
    }
    assert_eq!(json(&tmp.path().join("capitals.json"))["tasks"]["capitals"]["n"], 2);
}

/// Files that the how-tos name are there.
#[test]
fn the_how_tos_name_files_that_exist() {
    let (mut files, mut folders) = (Vec::new(), vec![root()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name == "target" || name.starts_with('.') {
                continue;
            }
            if path.is_dir() { folders.push(path) } else { files.push(format!("/{}", path.display())) }
        }
    }
    let text = std::fs::read_to_string(root().join("docs/extending.md")).unwrap();
    let mut seen = 0;
    for name in text.split('`').skip(1).step_by(2) {
        let source = [".rs", ".py", ".cpp", ".md"].iter().any(|end| name.ends_with(end)) || name.ends_with("s.json");
        if !source || name.contains([' ', '\n', '*']) {
            continue;
        }
        assert!(files.iter().any(|f| f.ends_with(&format!("/{name}"))), "docs/extending.md: {name}");
        seen += 1;
    }
    assert!(seen > 40, "{seen}");
}

/// The files and commands of the README's own task, followed to the letter from an empty folder and an empty home, and once more with
/// rows enough for a verdict.
#[test]
fn the_gate_of_the_readme_runs() {
    for (copies, verdict) in [(1, 2), (300, 0)] {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("mine");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("mine.yaml"), &blocks("README.md", "yaml")[0]).unwrap();
        std::fs::write(dir.join("rows.jsonl"), blocks("README.md", "json")[0].repeat(copies)).unwrap();
        let commands = &blocks("README.md", "sh")[0];
        for line in commands.lines().filter(|l| !l.is_empty()) {
            let mut c = lowbit(tmp.path());
            c.env("HOME", tmp.path().join("home")).current_dir(tmp.path());
            let out = c.args(line.strip_prefix("lowbit ").unwrap().split(' ')).output().unwrap();
            let wanted = if line.starts_with("lowbit gate") { verdict } else { 0 };
            assert_eq!(out.status.code(), Some(wanted), "{line}: {}", stderr(&out));
            // What is beside the record, what comes next, and what the exit code means.
            let says = match (line.split(' ').nth(1), wanted) {
                (Some("eval"), _) => ".items.jsonl",
                (Some("quantize"), _) => "next: ",
                (_, 2) => "inconclusive (exit code 2)",
                _ => "",
            };
            assert!(stderr(&out).contains(says), "{line}: {}", stderr(&out));
        }
        let page = std::fs::read_to_string(tmp.path().join("ci/report.html")).unwrap();
        assert!(page.contains(if verdict == 0 { "Pass" } else { "Inconclusive" }));
        assert!(tmp.path().join("ci/gate.xml").exists() && tmp.path().join("baseline.items.jsonl").exists());
    }
}

/// Every command in a page is one that the program has, with options that it knows.
#[test]
fn commands_in_the_pages_are_known() {
    let mut seen = 0;
    let pages = ["start", "engines", "gate", "report", "serve", "load", "capacity", "endpoints", "shards"];
    for page in pages.iter().map(|p| format!("docs/{p}.md")).chain(["README.md".to_string()]) {
        for line in blocks(&page, "").join("\n").lines().filter_map(|l| l.strip_prefix("lowbit ")) {
            let line = line.split("  #").next().unwrap().split(" || ").next().unwrap();
            let mut words = line.split_whitespace();
            let command = words.next().unwrap();
            let help = help(&[command]);
            for option in words.filter(|w| w.starts_with('-')) {
                assert!(
                    [" ", ",", "\n"].iter().any(|end| help.contains(&format!("{option}{end}"))),
                    "{page}: {line}: {option}"
                );
                seen += 1;
            }
        }
    }
    assert!(seen > 60, "{seen}");
}

/// Cells of the rows of the table below a heading, and its columns' names first.
fn table(page: &str, heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let below = text.split(&format!("\n{heading}\n")).nth(1).unwrap_or_else(|| panic!("{page}: no {heading}"));
    let lines = below.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|'));
    let cells = |l: &str| l.trim_matches('|').split('|').map(|c| c.trim().to_string()).collect::<Vec<_>>();
    lines.filter(|l| !l.starts_with("|---")).map(cells).collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Names of the tests in a source.
fn tests_of(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let after = text.split("#[test]\n").skip(1);
    let names = after.filter_map(|rest| rest.split_once("fn ")?.1.split_once('(').map(|n| n.0.to_string()));
    names.collect()
}

/// Every fault says what is left, the exit code, and which tests hold that; every test of faults is in a row.
#[test]
fn each_fault_has_what_is_left_a_code_and_its_tests() {
    let codes: Vec<String> =
        table("README.md", "## Exit codes").into_iter().skip(1).map(|row| row[0].clone()).collect();
    let known: Vec<&str> = codes.iter().flat_map(|c| c.split(", ")).collect();
    assert_eq!(known, ["0", "1", "2", "3", "4", "130"]);
    let rows = table("docs/security.md", "## Faults");
    assert_eq!(rows[0], ["fault", "what is left", "exit code", "tests"]);
    let mut named = Vec::new();
    for row in &rows[1..] {
        let [fault, left, code, tests] = row.as_slice() else { panic!("{row:?}") };
        assert!(!fault.is_empty() && !left.is_empty(), "{row:?}");
        let numbers: Vec<&str> = code.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).collect();
        assert!(numbers.iter().all(|n| known.contains(n)), "{fault}: {code}");
        assert!(!numbers.is_empty() || code == "none (killed)" || code == "as without", "{fault}: {code}");
        let mut file = "";
        let before = named.len();
        for name in quoted(tests) {
            if name.ends_with(".rs") {
                file = name;
            } else {
                assert!(tests_of(file).iter().any(|t| t == name), "{fault}: no test {name} in {file}");
                named.push(name.to_string());
            }
        }
        assert!(named.len() > before, "{fault}: no test");
    }
    for test in tests_of("tests/cli/faults.rs") {
        assert!(named.contains(&test), "docs/security.md, Faults: no row names {test}");
    }
}
