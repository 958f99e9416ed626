//! The short form, for a pull request or a model card.

use lowbit_eval::verdict::decide::Verdict;

use crate::format::{self as f, count, percent};
use crate::table::{Table, code_span, escape};
use crate::{
    Variant, output, view, view_accuracy, view_compare, view_layers, view_serving, view_size, view_speculation,
    view_speed, view_verdict,
};

/// The report in Markdown: verdict, numbers, tasks, drift, size, throughput and a line for each record.
pub fn markdown(variants: &[Variant]) -> String {
    let header = view::header(variants);
    let text = |key: &str| header.get(key).and_then(|v| v.as_str()).unwrap_or_default();
    let mut out = format!("# Quantization report: {}\n\n", escape(text("model")));
    let schemes = header.get("scheme").and_then(|v| v.as_array()).map(Vec::as_slice).unwrap_or_default();
    let schemes: Vec<&str> = schemes.iter().filter_map(|s| s.as_str()).collect();
    out += &format!("{}\n", escape(&schemes.join(" · ")));
    for notice in output::notices(variants) {
        out += &format!("\n> **Note:** {}\n", escape(&notice));
    }
    for v in variants {
        out += &verdict(v);
    }
    match variants {
        [only] => single(only, &mut out),
        several => {
            out += &format!("\n{}", view_compare::table(several).markdown());
            for v in several {
                tasks(v, &mut out);
            }
        }
    }
    for c in variants.iter().filter_map(|v| v.records.capacity.as_ref()) {
        out += &format!("\n## Capacity\n\n{}\n", escape(&view_serving::capacity_terms(c)));
        out += &format!("\n{}", view_serving::capacity_table(c).markdown());
    }
    out += "\n## Provenance\n\n";
    for v in variants {
        provenance(v, &mut out);
    }
    out
}

fn verdict(v: &Variant) -> String {
    let banner = view_verdict::banner(v);
    let text = |key: &str| banner.get(key).and_then(|v| v.as_str()).unwrap_or_default();
    let mark = match v.records.gate.as_ref().map(|g| g.verdict) {
        Some(Verdict::Pass) => "✅",
        Some(Verdict::Regression) => "❌",
        Some(Verdict::Inconclusive) => "❔",
        None => "➖",
    };
    let name = if v.name.is_empty() { String::new() } else { format!("{}: ", escape(&v.name)) };
    let mut out = format!("\n**{mark} {name}{}.** {}", text("word"), escape(text("reason")));
    if !text("terms").is_empty() {
        out += &format!(" Judged with {}.", escape(text("terms")));
    }
    if !text("command").is_empty() {
        out += &format!(" For a verdict: {}", code_span(text("command")));
    }
    out.push('\n');
    out
}

fn tasks(v: &Variant, out: &mut String) {
    let r = &v.records;
    let judged = r.gate.as_ref().and_then(view_verdict::gate_table);
    let limits = r.gate.as_ref().and_then(view_verdict::limits_table);
    let scores = r.eval.as_ref().filter(|_| judged.is_none()).and_then(view_verdict::scores_table);
    if judged.is_none() && limits.is_none() && scores.is_none() {
        return;
    }
    let name = if v.name.is_empty() { String::new() } else { format!(", {}", escape(&v.name)) };
    *out += &format!("\n## Tasks{name}\n");
    for table in [judged, limits, scores].into_iter().flatten() {
        *out += &format!("\n{}", table.markdown());
    }
}

fn single(v: &Variant, out: &mut String) {
    let r = &v.records;
    let numbers = view::numbers(r);
    if !numbers.is_empty() {
        let mut headline = Table::new("", &["Figure", "#Value", "Detail"]);
        for number in numbers {
            let field = |name: &str| number.get(name).and_then(|v| v.as_str()).unwrap_or_default();
            headline.row(vec![field("label").into(), field("value").into(), field("detail").into()]);
        }
        *out += &format!("\n{}", headline.markdown());
    }
    tasks(v, out);
    if let Some(e) = &r.eval {
        let perplexity = view_accuracy::perplexity_table(&[("", e)]);
        if perplexity.is_some() || e.kl.is_some() {
            *out += "\n## Drift\n";
        }
        if let Some(table) = perplexity {
            *out += &format!("\n{}", table.markdown());
        }
        if let Some(k) = &e.kl {
            if let Some(table) = view_accuracy::kl_table(&[("", k)]) {
                *out += &format!("\n{}", table.markdown());
            }
            *out += &format!(
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
    if let Some(table) = view_size::table(r) {
        let planned = view::size_source(r).is_some_and(|s| s.3);
        *out += &format!("\n## Size{}\n\n{}", if planned { " (planned)" } else { "" }, table.markdown());
        *out += "\nTensor data; 1 MB = 10⁶ bytes.\n";
    }
    if let Some(q) = &r.quantize {
        let events: usize = q.layers.iter().map(|l| l.events.len()).sum();
        let worst = q.layers.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
        *out += &format!("\n## Layers\n\n{} linears quantized, {events} events.", q.layers.len());
        if let Some(l) = worst {
            *out += &format!(" Largest relative error: {} at {}.", f::sig(l.relative_error, 3), code_span(&l.name));
        }
        out.push('\n');
        if let Some(table) = view_layers::coverage(q) {
            *out += &format!("\nCalibration tokens of experts:\n\n{}", table.markdown());
        }
    }
    if let Some(b) = &r.bench {
        *out += &format!("\n## Throughput\n\n{}", view_speed::rate_table(b).without_empty_columns().markdown());
        *out += &format!(
            "\n{}; measured read bandwidth {}. Range: slowest to fastest repetition.\n",
            escape(&view_speed::machine(&b.provenance)),
            view_speed::bandwidth(b)
        );
        if let Some(table) = view_speed::memory_table(b) {
            *out += &format!("\n{}", table.without_empty_columns().markdown());
        }
    }
    if !r.loads.is_empty() {
        let table = view_serving::load_table(&view_serving::loads_of(r));
        *out += &format!("\n## Serving load\n\n{}\nLatencies in ms, from the scheduled start.\n", table.markdown());
    }
    if let Some(s) = &r.speculation {
        *out += &format!("\n## Speculative decoding\n\n{}", view_speculation::table(&[("", s)]).markdown());
        let (model, machine) = (f::short_name(&s.provenance.model), view_speed::machine(&s.provenance));
        *out += &format!("\nThe draft proposes tokens for {}. {}", escape(model), view_speculation::terms(s));
        *out += &format!(" {}.\n", escape(&machine));
    }
}

fn provenance(v: &Variant, out: &mut String) {
    let r = &v.records;
    for (file, p) in r.provenance() {
        let name = if v.name.is_empty() { String::new() } else { format!("{}, ", escape(&v.name)) };
        let commit = p.commit.as_deref().map_or(String::new(), |c| format!(" ({})", code_span(&f::short_hash(c))));
        *out += &format!("- {name}{file}: {}{commit}, {}", escape(&p.tool), f::utc(p.unix_time));
        if !p.model.is_empty() {
            *out +=
                &format!(", model {} {}", escape(f::short_name(&p.model)), code_span(&f::short_hash(&p.model_sha256)));
        }
        *out += &format!(", seed {}, {}\n", p.seed, code_span(&p.command));
    }
    if let Some(c) = r.quantize.as_ref().and_then(|q| q.calibration.as_ref()) {
        *out += &format!(
            "- calibration: {}, {} windows of {} tokens, seed {}, {}\n",
            escape(&c.source),
            count(c.windows as u64),
            count(c.window_tokens as u64),
            c.seed,
            code_span(&f::short_hash(&c.windows_sha256)),
        );
    }
}
