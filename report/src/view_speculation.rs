//! What the page shows of a draft: the quantized model proposes tokens, the original decides.

use lowbit_bench::speculation::SpeculationRecord;
use serde_json::{Value, json};

use crate::Variant;
use crate::format::{self as f, percent, sig};
use crate::table::Table;
use crate::view_speed::machine;

/// A row for each record.
pub(crate) fn table(records: &[(&str, &SpeculationRecord)]) -> Table {
    let mut t = Table::new(
        "Drafts",
        &[
            "Draft",
            "#Proposed at a time",
            "#Accepted",
            "#Tokens a pass",
            "#Alone, tokens/s",
            "#With the draft, tokens/s",
            "#Speed-up [95 % CI]",
            "Text",
        ],
    );
    for (name, r) in records {
        let draft = r.provenance.reference.as_deref().map_or("", f::short_name);
        t.row(vec![
            if name.is_empty() { draft.into() } else { (*name).into() },
            r.draft_tokens.to_string().into(),
            percent(r.acceptance_rate, 3).into(),
            sig(r.tokens_per_pass, 3).into(),
            sig(r.plain_tokens_per_second, 3).into(),
            sig(r.tokens_per_second, 3).into(),
            format!("{} [{}]", f::factor(r.ratio), f::range(r.low, r.high, 3)).into(),
            if r.identical { "✓ identical" } else { "✗ differs" }.into(),
        ]);
    }
    t
}

/// How it was measured.
pub(crate) fn terms(r: &SpeculationRecord) -> String {
    format!(
        "Greedy answers of {} tokens, one at a time, each with and without the draft: {} of each.",
        r.output_tokens,
        r.answers.len()
    )
}

/// The section on speculation; null without a record.
pub(crate) fn section(variants: &[Variant]) -> Value {
    let all: Vec<(&str, &SpeculationRecord)> =
        variants.iter().filter_map(|v| Some((v.name.as_str(), v.records.speculation.as_ref()?))).collect();
    let Some((_, first)) = all.first() else { return Value::Null };
    json!({
        "model": f::short_name(&first.provenance.model),
        "machine": machine(&first.provenance),
        "terms": terms(first),
        "table": table(&all),
    })
}
