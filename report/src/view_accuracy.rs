//! What the page shows of drift: perplexity, KL, single tokens, texts written freely.

use lowbit_eval::drift::tokens::{Choice, TokenView};
use lowbit_eval::record::{EvalRecord, Interval, KlRecord};
use serde_json::{Value, json};

use crate::Variant;
use crate::chart_kl;
use crate::format::{self as f, NONE, count, interval, percent, sig};
use crate::table::{Cell, Table, code};

/// Positions shown.
const TOKENS: usize = 12;
/// Characters of text before a position.
const CONTEXT: usize = 90;

/// Perplexities with everything that makes them comparable; `None` of none.
pub(crate) fn perplexity_table(evals: &[(&str, &EvalRecord)]) -> Option<Table> {
    let mut t = Table::new(
        "Perplexity",
        &[
            "Variant",
            "Protocol",
            "#Float",
            "#Quantized [95 % CI]",
            "#Ratio [95 % CI]",
            "#Window",
            "#Windows",
            "#Tokens scored",
            "BOS",
            "Text",
            "SHA-256",
        ],
    );
    for (name, e) in evals {
        for p in &e.perplexities {
            t.row(vec![
                (*name).into(),
                p.protocol.as_str().into(),
                p.reference.map_or(NONE.to_owned(), |i| sig(i.value, 4)).into(),
                interval(&p.perplexity, 4).into(),
                p.ratio.map_or(NONE.to_owned(), |i| interval(&i, 4)).into(),
                count(p.window as u64).into(),
                count(p.windows as u64).into(),
                count(p.scored_tokens).into(),
                p.bos.as_str().into(),
                f::short_name(&p.source).into(),
                code(f::short_hash(&p.source_sha256), &p.source_sha256),
            ]);
        }
    }
    (!t.is_empty()).then(|| t.without_empty_columns())
}

/// Statistics of one record: name, value, unit.
fn statistics(k: &KlRecord) -> Vec<(&'static str, String, &'static str)> {
    const NATS: &str = "nats/token";
    let top = &k.top1_agreement;
    let agreement = Interval { value: top.value * 100.0, low: top.low * 100.0, high: top.high * 100.0 };
    let mut out = vec![
        ("KL mean [95 % CI]", interval(&Interval { value: k.mean, ..k.mean_interval }, 3), NATS),
        ("KL median", sig(k.median, 3), NATS),
        ("KL 99th percentile", sig(k.p99, 3), NATS),
        ("KL largest", sig(k.max, 3), NATS),
        ("Top-1 agreement [95 % CI]", interval(&agreement, 4), "% of tokens"),
        ("Δp of the true token, mean", sig(k.delta_p_mean * 100.0, 3), "percentage points"),
        ("Δp of the true token, root mean square", sig(k.delta_p_rms * 100.0, 3), "percentage points"),
        ("Correlation of per-token NLL", sig(k.nll_correlation, 4), ""),
        ("Perplexity on the same tokens, float", sig(k.reference_perplexity, 4), ""),
        ("Perplexity on the same tokens, quantized", sig(k.perplexity, 4), ""),
    ];
    // Records before schema 2 have none of these.
    if let Some(ten) = k.statistics.top_k.iter().find(|t| t.k == 10) {
        out.push(("KL the other way round, mean", sig(k.statistics.reverse_mean, 3), NATS));
        out.push(("Jensen–Shannon divergence, mean", sig(k.statistics.js_mean, 3), NATS));
        out.push(("Ten likeliest tokens in common", sig(ten.in_common * 100.0, 4), "%"));
        out.push(("First and second choice swapped", sig(k.statistics.margin.turned * 100.0, 3), "% of tokens"));
    }
    out
}

/// The statistics of the drift, a column for each variant; `None` of none.
pub(crate) fn kl_table(kls: &[(&str, &KlRecord)]) -> Option<Table> {
    let columns: Vec<Vec<_>> = kls.iter().map(|k| statistics(k.1)).collect();
    let longest = columns.iter().max_by_key(|c| c.len())?;
    let mut heads = vec!["Statistic".to_owned()];
    heads.extend(kls.iter().map(|k| if k.0.is_empty() { "#Value".to_owned() } else { format!("#{}", k.0) }));
    heads.push("Unit".to_owned());
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let mut t = Table::new("Statistics of the drift", &heads);
    for (name, _, unit) in longest {
        let mut row: Vec<Cell> = vec![(*name).into()];
        for column in &columns {
            row.push(column.iter().find(|s| s.0 == *name).map_or(NONE.into(), |s| s.1.clone().into()));
        }
        row.push((*unit).into());
        t.row(row);
    }
    Some(t)
}

fn percentile_table(kls: &[(&str, &KlRecord)]) -> Option<Table> {
    let longest = kls.iter().map(|k| &k.1.percentiles).max_by_key(|p| p.len())?;
    let mut heads = vec!["Percentile".to_owned()];
    for (name, _) in kls {
        let of = if name.is_empty() { String::new() } else { format!("{name}: ") };
        heads.extend([format!("#{of}KL, nats/token"), format!("#{of}Δp, percentage points")]);
    }
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let mut t = Table::new("Percentiles of KL and of the change of probability", &heads);
    for (label, _) in longest {
        let mut row: Vec<Cell> = vec![label.as_str().into()];
        for (_, k) in kls {
            let of = |list: &[(String, f64)], times: f64| -> Cell {
                list.iter().find(|p| p.0 == *label).map_or(NONE.into(), |p| sig(p.1 * times, 3).into())
            };
            row.extend([of(&k.percentiles, 1.0), of(&k.delta_p_percentiles, 100.0)]);
        }
        t.row(row);
    }
    Some(t)
}

/// KL where the float model was more and less sure.
fn confidence_table(k: &KlRecord) -> Option<Table> {
    let buckets: Vec<_> = k.statistics.by_confidence.iter().filter(|b| b.tokens > 0).collect();
    buckets.first()?;
    let mut t = Table::new(
        "KL by confidence of the float model",
        &["Probability of the float model's first choice", "#Tokens", "#Mean KL, nats/token", "#Same first choice"],
    );
    for b in buckets {
        t.row(vec![
            format!("{} – {}", sig(b.from, 2), sig(b.to, 2)).into(),
            count(b.tokens).into(),
            sig(b.kl_mean, 3).into(),
            percent(b.top1_agreement, 3).into(),
        ]);
    }
    Some(t)
}

/// The section on drift; null without a perplexity or KL.
pub(crate) fn drift(variants: &[Variant]) -> Value {
    let evals: Vec<(&str, &EvalRecord)> =
        variants.iter().filter_map(|v| Some((v.name.as_str(), v.records.eval.as_ref()?))).collect();
    let kls: Vec<(&str, &KlRecord)> = evals.iter().filter_map(|(n, e)| Some((*n, e.kl.as_ref()?))).collect();
    let perplexity = perplexity_table(&evals);
    if perplexity.is_none() && kls.is_empty() {
        return Value::Null;
    }
    let kl = kls.first().map(|(_, k)| {
        let lines: Vec<chart_kl::Line> = kls.iter().map(|(n, k)| (*n, k.percentiles.as_slice(), k.mean)).collect();
        let alone = kls.len() == 1;
        json!({
            "source": f::short_name(&k.source),
            "sha256": k.source_sha256,
            "hash": f::short_hash(&k.source_sha256),
            "scope": format!("{} tokens in {} windows of {}", count(k.tokens), count(k.windows as u64), count(k.window as u64)),
            "table": kl_table(&kls),
            "percentiles": percentile_table(&kls),
            "confidence": if alone { confidence_table(k) } else { None },
            "chart": chart_kl::percentiles(&lines),
        })
    });
    json!({ "perplexity": perplexity, "kl": kl })
}

/// Text as it is read: line ends as marks, no other control characters.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c == '\n' {
                '⏎'
            } else if c.is_control() {
                ' '
            } else {
                c
            }
        })
        .collect()
}

fn choices(list: &[Choice]) -> Vec<Value> {
    let one = |c: &Choice| {
        let width = (100.0 * c.probability.clamp(0.0, 1.0)).round();
        json!({ "token": visible(&c.token), "share": percent(c.probability, 2), "width": width })
    };
    list.iter().take(4).map(one).collect()
}

fn token(t: &TokenView) -> Value {
    let context = visible(&t.context);
    let start = context.char_indices().rev().nth(CONTEXT - 1).map_or(0, |c| c.0);
    json!({
        "before": context.get(start..).unwrap_or_default(),
        "cut": start > 0,
        "token": visible(&t.token),
        "place": format!("window {}, token {}", t.window, t.position),
        "kl": sig(t.kl, 3),
        "float": sig((-t.reference_nll).exp() * 100.0, 2),
        "quantized": sig((-t.candidate_nll).exp() * 100.0, 2),
        "reference": choices(&t.reference_choices),
        "candidate": choices(&t.candidate_choices),
    })
}

/// Where the models part most: one entry for each variant that has it.
pub(crate) fn tokens(variants: &[Variant]) -> Vec<Value> {
    let mut out = Vec::new();
    for v in variants {
        let Some(e) = &v.records.eval else { continue };
        if e.worst_tokens.is_empty() && e.free_running.is_none() {
            continue;
        }
        // With many variants fewer of each.
        let shown = (2 * TOKENS / variants.len()).clamp(3, TOKENS);
        let list: Vec<Value> = e.worst_tokens.iter().take(shown).map(token).collect();
        let free = e.free_running.as_ref().map(|r| {
            format!(
                "Both models wrote up to {} tokens from {} prompts: the first differing token is number {} on average (median {}), \
                 {} of tokens differ, {} of texts are the same to the end, the length ratio is {}, and {} → {} of texts end in a loop.",
                r.max_new_tokens,
                count(r.prompts as u64),
                sig(r.first_divergent_mean, 3),
                sig(r.first_divergent_median, 3),
                percent(r.differing_mean, 3),
                percent(r.identical, 3),
                sig(r.length_ratio, 3),
                percent(r.reference_loop_rate, 2),
                percent(r.candidate_loop_rate, 2)
            )
        });
        out.push(json!({ "name": v.name, "list": list, "free": free }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_context_is_cut_at_a_character() {
        let t = TokenView {
            window: 0,
            position: 1,
            context: "ä".repeat(200),
            token: "\n".into(),
            kl: 1.0,
            reference_nll: 0.0,
            candidate_nll: f64::NAN,
            reference_choices: vec![Choice { token: "a".into(), probability: f64::NAN }],
            candidate_choices: vec![],
        };
        let v = token(&t);
        assert_eq!((v["before"].as_str().map(|s| s.chars().count()), &v["cut"]), (Some(CONTEXT), &json!(true)));
        assert_eq!((v["token"].as_str(), v["quantized"].as_str()), (Some("⏎"), Some(NONE)));
    }
}
