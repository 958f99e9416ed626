//! What a shell and a terminal get: completions, man pages, no colour where none is wanted.

use super::{lowbit, names, ok};

fn text(args: &[&str]) -> String {
    let tmp = tempfile::tempdir().unwrap();
    String::from_utf8(ok(lowbit(tmp.path()).args(args)).stdout).unwrap()
}

#[test]
fn completions_know_commands_and_options() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = text(&["completions", shell]);
        for word in ["quantize", "max-kl", "asymmetric"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    // Bash reads its script, and offers what begins so.
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("lowbit.bash");
    std::fs::write(&file, text(&["completions", "bash"])).unwrap();
    let line = format!(
        "source {}; COMP_WORDS=(lowbit ga); COMP_CWORD=1; _lowbit lowbit ga lowbit; echo \"${{COMPREPLY[@]}}\"",
        file.display()
    );
    match std::process::Command::new("bash").args(["-c", &line]).output() {
        Ok(out) => assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "gate", "{out:?}"),
        Err(_) => eprintln!("skipped: no bash"),
    }
}

#[test]
fn man_pages_are_written_once() {
    let page = text(&["man"]);
    assert!(page.starts_with(".ie") && page.contains(".TH lowbit 1"), "{page}");
    assert!(page.contains("lowbit run demo \\-o out") || page.contains("lowbit run demo -o out"), "{page}");
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("man1");
    let write = |more: &[&str]| lowbit(tmp.path()).args(["man", "-o"]).arg(&dir).args(more).output().unwrap();
    assert!(write(&[]).status.success());
    let pages = names(&dir);
    for page in ["lowbit.1", "lowbit-run.1", "lowbit-gate.1"] {
        assert!(pages.contains(&page.to_owned()), "{pages:?}");
    }
    assert!(!pages.iter().any(|p| p.contains("suite") || p.contains("help")), "{pages:?}");
    assert!(std::fs::read_to_string(dir.join("lowbit-run.1")).unwrap().contains("max"));
    assert_eq!((write(&[]).status.code(), write(&["--force"]).status.code()), (Some(3), Some(0)));
}

#[test]
fn colour_is_for_who_wants_it() {
    let tmp = tempfile::tempdir().unwrap();
    let help = |vars: &[(&str, &str)]| {
        let mut c = lowbit(tmp.path());
        c.arg("--help").env_remove("NO_COLOR").envs(vars.iter().copied());
        String::from_utf8(ok(&mut c).stdout).unwrap()
    };
    assert!(!help(&[]).contains('\x1b'), "a pipe gets none");
    assert!(
        help(&[("CLICOLOR_FORCE", "1")]).contains('\x1b'),
        "what is forced is there, so its absence says something"
    );
    assert!(!help(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]).contains('\x1b'));
}
