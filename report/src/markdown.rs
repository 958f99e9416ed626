//! The short form, for a pull request or a model card.

use crate::Records;
use crate::format::{self as f, count, percent};
use crate::table::{Table, code_span, escape};
use crate::{view, view_accuracy, view_speed};

/// The report in Markdown: headline, size, drift, throughput and a line for each record.
pub fn markdown(r: &Records) -> String {
    let mut out = format!("# Quantization report: {}\n\n", escape(&view::model(r)));
    out += &format!("{}\n\n", escape(&view::scheme(r).join(" · ")));
    let missing = r.missing();
    if !missing.is_empty() {
        out += &format!("Missing here: {}.\n\n", missing.join(", "));
    }
    for notice in r.notices() {
        out += &format!("> **Note:** {}\n\n", escape(&notice));
    }
    let mut headline = Table::new(&["Figure", "#Value", "Detail"]);
    for tile in view::tiles(r) {
        let field = |name: &str| tile.get(name).and_then(|v| v.as_str()).unwrap_or_default();
        headline.row(vec![field("label").into(), field("value").into(), field("detail").into()]);
    }
    out += &headline.markdown();
    if let Some(table) = view::size_table(r) {
        let planned = view::size_source(r).is_some_and(|s| s.3);
        out += &format!("\n## Size{}\n\n{}", if planned { " (planned)" } else { "" }, table.markdown());
        out += "\nTensor data; 1 MB = 10⁶ bytes.\n";
    }
    if let Some(e) = &r.eval {
        out += "\n## Accuracy drift\n";
        if let Some(table) = view_accuracy::perplexity_table(e) {
            out += &format!("\n{}", table.markdown());
        }
        if let Some(k) = &e.kl {
            out += &format!("\n{}", view_accuracy::kl_table(k).markdown());
            out += &format!(
                "\nKL(float ‖ quantized) over the full vocabulary, {} tokens in {} windows of {}, from {} ({}). \
                 Top-1 agreement {}.\n",
                count(k.tokens),
                count(k.windows as u64),
                count(k.window as u64),
                escape(f::short_name(&k.source)),
                code_span(&f::short_hash(&k.source_sha256)),
                percent(k.top1_agreement.value, 4),
            );
        }
    }
    if let Some(q) = &r.quantize {
        let events: usize = q.layers.iter().map(|l| l.events.len()).sum();
        let worst = q.layers.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        out += &format!("\n## Layers\n\n{} linears quantized, {events} events.", q.layers.len());
        if let Some(l) = worst {
            out += &format!(" Largest relative error: {} at {}.", f::sig(l.relative_error, 3), code_span(&l.name));
        }
        out.push('\n');
    }
    if let Some(b) = &r.bench {
        out += &format!("\n## Throughput\n\n{}", view_speed::rate_table(b).markdown());
        out += &format!(
            "\n{}; measured read bandwidth {}. Range: slowest to fastest repetition.\n",
            escape(&view_speed::machine(&b.provenance)),
            view_speed::bandwidth(b)
        );
        if let Some(table) = view_speed::memory_table(b) {
            out += &format!("\n{}", table.markdown());
        }
    }
    out += "\n## Provenance\n\n";
    for (file, p) in r.provenance() {
        let commit = p.commit.as_deref().map_or(String::new(), |c| format!(" ({})", code_span(&f::short_hash(c))));
        out += &format!(
            "- {file}: {}{commit}, {}, model {} {}, seed {}, {}\n",
            escape(&p.tool),
            f::utc(p.unix_time),
            escape(f::short_name(&p.model)),
            code_span(&f::short_hash(&p.model_sha256)),
            p.seed,
            code_span(&p.command),
        );
    }
    if let Some(c) = r.quantize.as_ref().and_then(|q| q.calibration.as_ref()) {
        out += &format!(
            "- calibration: {}, {} windows of {} tokens, seed {}, {}\n",
            escape(&c.source),
            count(c.windows as u64),
            count(c.window_tokens as u64),
            c.seed,
            code_span(&f::short_hash(&c.windows_sha256)),
        );
    }
    out
}
