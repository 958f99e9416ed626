//! Bytes by component, a stacked bar for the float model and each variant.

use lowbit_quantize::record::ComponentSize;

use crate::format::{bytes, percent};
use crate::svg::{Scale, Svg, WIDTH, fit, legend, text_width};

fn class(name: &str, index: usize) -> String {
    const KNOWN: [&str; 6] = ["embedding", "attention", "mlp", "norms", "lm_head", "other"];
    const CLASSES: [&str; 6] = ["c1", "c2", "c3", "c5", "c6", "cx"];
    match KNOWN.iter().position(|k| *k == name) {
        Some(i) => CLASSES[i].to_owned(),
        None => format!("c{}", index % 8 + 1),
    }
}

/// One bar.
pub(crate) struct Bar {
    /// What it is of.
    pub label: String,
    /// Bytes by component.
    pub parts: Vec<(String, u64)>,
}

/// The float model by the first list, then a bar for each list.
pub(crate) fn bars(variants: &[(&str, &[ComponentSize])]) -> Vec<Bar> {
    let Some((_, first)) = variants.first() else { return Vec::new() };
    let of = |sizes: &[ComponentSize], after: bool| {
        let part = |s: &ComponentSize| if after { s.after_bytes } else { s.before_bytes };
        sizes.iter().map(|s| (s.component.clone(), part(s))).collect()
    };
    let mut out = vec![Bar { label: "float".to_owned(), parts: of(first, false) }];
    out.extend(variants.iter().map(|(name, sizes)| Bar {
        label: if name.is_empty() { "quantized".to_owned() } else { (*name).to_owned() },
        parts: of(sizes, true),
    }));
    out
}

/// The bars; `None` where there is nothing to draw.
pub(crate) fn sizes(bars: &[Bar]) -> Option<String> {
    let total = |b: &Bar| b.parts.iter().map(|p| p.1).sum::<u64>();
    let most = bars.iter().map(total).max().filter(|t| *t > 0)?;
    let mut components: Vec<&str> = Vec::new();
    for (name, _) in bars.iter().flat_map(|b| &b.parts) {
        if !components.contains(&name.as_str()) {
            components.push(name);
        }
    }
    let (unit, name) = if most >= 2_000_000_000 { (1e9, "GB") } else { (1e6, "MB") };
    let labels = bars.iter().map(|b| text_width(&b.label)).fold(0.0, f64::max).min(240.0);
    let (left, right) = (labels + 20.0, WIDTH - 84.0);
    let scale = Scale::linear(most as f64 / unit, left, right);
    let bottom = 14.0 + 44.0 * bars.len() as f64;
    let said: Vec<String> = bars.iter().map(|b| format!("{} {}", b.label, bytes(total(b)))).collect();
    let mut svg = Svg::new(bottom + 44.0, "Bytes of the weights by component", &format!("{}.", said.join(", ")));
    for (v, label) in scale.ticks() {
        let x = scale.at(v);
        svg.line("grid", (x, 8.0), (x, bottom));
        svg.text("tick", "middle", x, bottom + 16.0, &label);
    }
    svg.text("axis", "middle", (left + right) / 2.0, bottom + 38.0, &format!("weights, {name}"));
    for (row, bar) in bars.iter().enumerate() {
        let y = 14.0 + 44.0 * row as f64;
        svg.text("name", "end", left - 10.0, y + 22.0, &fit(&bar.label, labels));
        let all = total(bar);
        let mut sum = 0u64;
        for component in &components {
            let Some((_, part)) = bar.parts.iter().find(|p| p.0 == *component) else { continue };
            let (x0, x1) = (scale.at(sum as f64 / unit), scale.at((sum + part) as f64 / unit));
            sum += part;
            let gap = if x1 - x0 > 4.0 { 1.5 } else { 0.0 };
            let share = percent(*part as f64 / all.max(1) as f64, 3);
            let title = format!("{} {}: {} ({share})", bar.label, component.replace('_', " "), bytes(*part));
            let index = components.iter().position(|c| c == component).unwrap_or(0);
            svg.rect(&class(component, index), x0, y, x1 - x0 - gap, 34.0, &title);
        }
        svg.text("value", "start", scale.at(all as f64 / unit) + 6.0, y + 22.0, &bytes(all));
    }
    let entries: Vec<_> = components.iter().enumerate().map(|(i, c)| (1, class(c, i), c.replace('_', " "))).collect();
    Some(legend(&entries) + &svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_no_chart_and_labels_are_escaped() {
        assert!(sizes(&[]).is_none());
        assert!(sizes(&bars(&[("a", &[ComponentSize::default()])])).is_none());
        let one = ComponentSize { component: "mlp".into(), before_bytes: 4_000_000, after_bytes: 1_000_000 };
        let both = [("<b>", std::slice::from_ref(&one)), ("c", std::slice::from_ref(&one))];
        let text = sizes(&bars(&both)).unwrap();
        assert!(text.contains("&lt;b&gt;") && text.contains("4.00 MB") && text.matches("<rect").count() == 3);
    }
}
