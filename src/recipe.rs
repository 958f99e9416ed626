//! Recipes: the options of a quantization as a file. Ours are TOML, written beside every `quantize.json`; llm-compressor's YAML is read
//! where it maps.
//!
//! A recipe becomes arguments in front of the user's, so what is typed wins and both are checked by one parser.

mod llm_compressor;
mod table;

use std::ffi::OsString;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches};
use lowbit_checkpoint::provenance::Provenance;
use lowbit_kernels::LinearScheme;

use self::table::{MADE, OPTIONS};
use crate::args::{Cli, QuantOptions};

/// Options that say where work is kept or what is reported, not what is made.
const NOT_RECORDED: [&str; 2] = ["recipe", "offload"];

/// The command line of this process.
static TYPED: OnceLock<ArgMatches> = OnceLock::new();

/// Keeps what [`parse`] returned for [`record`].
pub fn remember(matches: ArgMatches) {
    let _ = TYPED.set(matches);
}

/// The recipe of this process's quantization, with the options a command filled in itself.
pub fn record(q: &QuantOptions, made: &Provenance, calibration: Option<&str>) -> Option<String> {
    let mut changed = vec![("samples", q.samples.to_string()), ("seq-len", q.seq_len.to_string())];
    changed.extend(q.calib.clone().map(|c| ("calib", c)));
    changed.extend(q.group_size.clone().map(|g| ("group-size", g)));
    TYPED.get().map(|typed| write(typed, &changed, made, calibration))
}

/// The parsed command line, with the recipe it names; the matches tell which options the quantization has.
pub fn parse(argv: Vec<OsString>) -> Result<(Cli, ArgMatches), ParseError> {
    let matches = Cli::command().try_get_matches_from(&argv)?;
    let (name, sub) = matches.subcommand().map_or(("", &matches), |(n, m)| (n, m));
    let Some(file) = sub.try_get_one::<std::path::PathBuf>("recipe").ok().flatten() else {
        let cli = Cli::from_arg_matches(&matches)?;
        return Ok((cli, matches));
    };
    let given = read(file).map_err(ParseError::Recipe)?;
    // Of two alternatives the typed one stands.
    let typed: Vec<String> = options()
        .get_arguments()
        .filter(|a| sub.value_source(a.get_id().as_str()) == Some(ValueSource::CommandLine))
        .filter_map(|a| a.get_long().map(str::to_string))
        .collect();
    let alternatives = ["bits", "size", "fit", "context"];
    let budget_typed = typed.iter().any(|t| alternatives.contains(&t.as_str()));
    // A scheme that fixes its groups takes none from the recipe.
    let scheme = sub.try_get_one::<String>("scheme").ok().flatten().filter(|_| typed.iter().any(|t| t == "scheme"));
    let fixes = scheme.is_some_and(|s| !LinearScheme::has_groups(s));
    let kept = given.into_iter().filter(|(k, _)| {
        !(typed.contains(k)
            || budget_typed && alternatives.contains(&k.as_str())
            || fixes && ["group-size", "asymmetric"].contains(&k.as_str()))
    });
    let from_recipe = kept.flat_map(|(k, values)| {
        let flag = OsString::from(format!("--{k}"));
        match values {
            None => vec![flag],
            Some(values) => values.into_iter().flat_map(|v| [flag.clone(), v.into()]).collect(),
        }
    });
    let at = argv.iter().skip(1).position(|a| a.to_str() == Some(name)).map_or(argv.len(), |i| i + 2);
    let mut whole: Vec<OsString> = argv.get(..at).unwrap_or_default().to_vec();
    whole.extend(from_recipe);
    whole.extend(argv.get(at..).unwrap_or_default().iter().cloned());
    let matches = Cli::command().try_get_matches_from(whole)?;
    let cli = Cli::from_arg_matches(&matches)?;
    Ok((cli, matches))
}

/// Why a command line was not understood.
pub enum ParseError {
    /// Clap says.
    Usage(clap::Error),
    /// The recipe.
    Recipe(anyhow::Error),
}

impl From<clap::Error> for ParseError {
    fn from(e: clap::Error) -> Self {
        ParseError::Usage(e)
    }
}

/// Options by their long names; `None` is a switch that is on.
type Given = Vec<(String, Option<Vec<String>>)>;

fn options() -> Command {
    QuantOptions::augment_args(Command::new("quantize"))
}

fn read(file: &Path) -> Result<Given> {
    let text = lowbit_checkpoint::files::read_text(file).with_context(|| format!("{}", file.display()))?;
    let yaml = file.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let given = if yaml { llm_compressor::read(&text) } else { table::read(&text, &is_switch) };
    given.with_context(|| format!("{}", file.display()))
}

/// Whether an option of a quantization is a switch; none where it is no option, or none of a recipe.
fn is_switch(key: &str) -> Option<bool> {
    let known = options();
    let arg = known.get_arguments().find(|a| a.get_long() == Some(key)).filter(|_| key != "recipe")?;
    Some(matches!(arg.get_action(), ArgAction::SetTrue))
}

/// The recipe of a run: every option as it stands, spelled out. `changed` are values that the command itself filled in.
fn write(matches: &ArgMatches, changed: &[(&str, String)], made: &Provenance, calibration: Option<&str>) -> String {
    let mut out = String::from(
        "# The options of a lowbit quantization. To run it again: lowbit quantize MODEL -o OUTPUT --recipe FILE\n",
    );
    out += &format!(
        "\n[{MADE}]\ntool = {}\nmodel = {}\nmodel-sha256 = {}\n",
        quoted(&made.tool),
        quoted(&made.model),
        quoted(&made.model_sha256)
    );
    if let Some(sha) = calibration {
        out += &format!("calibration-sha256 = {}\n", quoted(sha));
    }
    out += &format!("\n[{OPTIONS}]\n");
    let sub = matches.subcommand().map_or(matches, |(_, m)| m);
    for arg in options().get_arguments() {
        let (id, Some(long)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
        if NOT_RECORDED.contains(&id) {
            continue;
        }
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            out += &format!("{long} = {}\n", sub.try_get_one::<bool>(id).ok().flatten().copied().unwrap_or(false));
            continue;
        }
        let mut values: Vec<String> = sub
            .try_get_raw(id)
            .ok()
            .flatten()
            .map(|raw| raw.map(|v| v.to_string_lossy().into_owned()).collect())
            .unwrap_or_default();
        if let Some((_, v)) = changed.iter().find(|(name, _)| *name == long) {
            values = vec![v.clone()];
        }
        let several = matches!(arg.get_action(), ArgAction::Append);
        let list = values.iter().map(|v| quoted(v)).collect::<Vec<_>>().join(", ");
        match (several, values.is_empty()) {
            (_, true) => {}
            (true, _) => out += &format!("{long} = [{list}]\n"),
            _ => out += &format!("{long} = {list}\n"),
        }
    }
    out
}

/// A TOML text; JSON's escapes are among TOML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn quant(line: &str) -> QuantOptions {
        match parse(argv(line)) {
            Ok((Cli { command: crate::args::Command::Quantize(a), .. }, _)) => a.quant,
            Ok(_) => panic!("{line}"),
            Err(ParseError::Usage(e)) => panic!("{line}: {e}"),
            Err(ParseError::Recipe(e)) => panic!("{line}: {e:#}"),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("recipe.toml");
        let lines = [
            "lowbit quantize m -o out",
            "lowbit quantize m -o out --scheme w3a16 --method best --group-size 64 --asymmetric --calib a/b.jsonl --samples 7 --seed 3 \
             --ignore re:.*\\.down_proj --ignore x --head w8 --damp 0.02 --strict --shard-mb 9 --unsigned-scales",
            "lowbit quantize m -o out --bits 4.25 --candidates w4-g64,w8-g64 --embedding auto --head auto --calib c",
        ];
        for line in lines {
            let Ok((_, matches)) = parse(argv(line)) else { panic!("{line}") };
            let text = write(&matches, &[], &Provenance::default(), Some("abc"));
            std::fs::write(&file, &text).unwrap();
            let again = quant(&format!("lowbit quantize m -o out --recipe {}", file.display()));
            let mut wanted = quant(line);
            wanted.recipe = again.recipe.clone();
            assert_eq!(format!("{again:?}"), format!("{wanted:?}"), "{text}");
        }
        // What is typed wins.
        let typed =
            quant(&format!("lowbit quantize m -o out --recipe {} --size 1GB --candidates w3-g64", file.display()));
        assert_eq!((typed.budget.bits, typed.budget.size), (None, Some(1_000_000_000)));
        assert_eq!(typed.budget.candidates, ["w3-g64"]);
        std::fs::write(&file, "[quantize]\nscheme = \"w4a16\"\ngroup-size = \"64\"\nasymmetric = true\n").unwrap();
        let typed = quant(&format!("lowbit quantize m -o out --recipe {} --scheme nvfp4a16", file.display()));
        assert_eq!((typed.scheme.as_str(), typed.group_size, typed.asymmetric), ("nvfp4a16", None, false));
    }

    #[test]
    fn every_option_is_recorded() {
        let Ok((_, matches)) = parse(argv(
            "lowbit quantize m -o out --calib c --group-size 64 --seed 1 --ignore a --fit 1GB --context 8k --candidates w4-g64",
        )) else {
            panic!()
        };
        let text = write(&matches, &[("calib", "self".into())], &Provenance::default(), None);
        for arg in options().get_arguments() {
            let long = arg.get_long().unwrap();
            // Alternatives, of which one was given, and options without a value.
            let absent = ["bits", "size"].contains(&long) || NOT_RECORDED.contains(&arg.get_id().as_str());
            let optional = arg.get_default_values().is_empty()
                && matches.subcommand().unwrap().1.value_source(arg.get_id().as_str()).is_none();
            assert_eq!(text.contains(&format!("\n{long} = ")), !(absent || optional), "{long}: {text}");
        }
        assert!(text.contains("calib = \"self\""));
    }

    #[test]
    fn what_does_not_map_is_refused_by_name() {
        for (text, why) in [
            ("[quantize]\ncolour = 1", "`colour` is no option"),
            ("[quantize]\nrecipe = \"a\"", "`recipe` is no option"),
            ("[quantize]\nstrict = \"yes\"", "`strict` is true or false"),
            ("[quantize]\nignore = [true]", "`ignore`: a list holds"),
            ("[other]\n", "`other`"),
            ("", "[quantize]"),
            ("[quantize\n", "not valid TOML"),
        ] {
            let error = format!("{:#}", table::read(text, &is_switch).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }
}
