//! Pages that are generated from the program, and links that must lead somewhere.

use super::{lowbit, ok, root};

/// `docs/cli.md`: the help of every command, as it is printed.
#[test]
fn the_cli_reference_is_that_of_the_program() {
    let tmp = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| String::from_utf8(ok(lowbit(tmp.path()).args(args).arg("--help")).stdout).unwrap();
    let first = help(&[]);
    let commands: Vec<&str> = first
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.strip_prefix("  ")?.split(' ').next().filter(|w| !w.is_empty() && *w != "help"))
        .collect();
    assert!(commands.contains(&"quantize") && commands.len() > 15, "{commands:?}");
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
