//! Patterns of an option (`--ignore`, `--module`), and which of them have matched a module.

use crate::error::{QuantizeError, Result};

struct Rule {
    text: String,
    /// `None` for an exact name.
    pattern: Option<regex::Regex>,
    used: bool,
}

/// The patterns of one option, in order.
pub(crate) struct Rules {
    option: &'static str,
    rules: Vec<Rule>,
}

impl Rules {
    /// Of the option `--option`: exact names, or `re:` patterns.
    pub(crate) fn new<'a>(option: &'static str, patterns: impl IntoIterator<Item = &'a String>) -> Result<Self> {
        let rules = patterns
            .into_iter()
            .map(|text| {
                let pattern = text.strip_prefix("re:").map(regex::Regex::new).transpose();
                let pattern = pattern.map_err(|e| QuantizeError::Plan {
                    summary: format!("--{option} {text}: {e}"),
                    offenders: vec![],
                    hint: None,
                })?;
                Ok(Rule { text: text.clone(), pattern, used: false })
            })
            .collect::<Result<_>>()?;
        Ok(Self { option, rules })
    }

    /// The first pattern that matches, by its place and text; all that match count as used.
    pub(crate) fn hit(&mut self, module: &str) -> Option<(usize, &str)> {
        let mut found = None;
        for (i, rule) in self.rules.iter_mut().enumerate() {
            if rule.pattern.as_ref().map_or(rule.text == module, |p| p.is_match(module)) {
                rule.used = true;
                found.get_or_insert(i);
            }
        }
        found.and_then(|i| Some((i, self.rules.get(i)?.text.as_str())))
    }

    /// Fails where patterns matched nothing; `hint` says how modules are named.
    pub(crate) fn refuse_unused(rules: &[&Rules], hint: String) -> Result<()> {
        let lines = rules.iter().flat_map(|r| {
            let unused = r.rules.iter().filter(|rule| !rule.used);
            unused.map(|rule| format!("--{} {} matches no linear", r.option, rule.text))
        });
        let offenders: Vec<String> = lines.collect();
        if offenders.is_empty() {
            return Ok(());
        }
        Err(QuantizeError::Plan { summary: "patterns that match nothing".into(), offenders, hint: Some(hint) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_match_counts_and_the_unused_are_named() {
        let patterns = ["re:.*q_proj".to_string(), "a.q_proj".into(), "b".into()];
        let mut rules = Rules::new("module", &patterns).unwrap();
        assert_eq!(rules.hit("a.q_proj"), Some((0, "re:.*q_proj")));
        assert_eq!(rules.hit("a.k_proj"), None);
        let e = Rules::refuse_unused(&[&rules], "hint".into()).unwrap_err().to_string();
        assert!(e.contains("--module b matches no linear") && !e.contains("a.q_proj"), "{e}");
        assert!(Rules::new("ignore", &["re:(".to_string()]).is_err());
    }
}
