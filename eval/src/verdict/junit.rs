//! JUnit XML: a test case for the pool, each task and each threshold.

use super::decide::Verdict;
use super::record::{Endpoint, GateRecord, count, pp};

/// The record as a JUnit report. A regression is a failure; a pool or threshold without a verdict is an error, a task without one of
/// its own is fine.
pub fn junit(r: &GateRecord) -> String {
    let mut cases = Vec::new();
    if let Some(p) = &r.pool {
        cases.push(case("pool", p.verdict, &describe(p), true));
    }
    for t in &r.tasks {
        cases.push(case(&t.name, t.verdict, &describe(t), false));
    }
    for t in &r.thresholds {
        let limit = t.limit.map_or(String::new(), |l| format!(", limit {l}"));
        let text = format!("{:.5} [{:.5}, {:.5}]{limit}", t.value, t.interval.0, t.interval.1);
        cases.push(case(&t.name, t.verdict.unwrap_or(Verdict::Pass), &text, t.verdict.is_some()));
    }
    let number = |tag: &str| cases.iter().filter(|c| c.contains(tag)).count();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n<testsuite name=\"lowbit gate\" tests=\"{}\" failures=\"{}\" errors=\"{}\">\n<properties><property name=\"verdict\" value=\"{}\"/></properties>\n{}\n</testsuite>\n</testsuites>\n",
        cases.len(),
        number("<failure "),
        number("<error "),
        r.verdict.name(),
        cases.join("\n")
    )
}

fn describe(e: &Endpoint) -> String {
    format!(
        "{}: {:.4} → {:.4}, loss {} [{}, {}] in {} items, {} lost, {} gained, p(loss) = {:.3e}",
        e.metric,
        e.reference,
        e.candidate,
        pp(e.loss),
        pp(e.interval.0),
        pp(e.interval.1),
        count(e.n),
        e.losses,
        e.gains,
        e.p_loss
    )
}

fn case(name: &str, verdict: Verdict, text: &str, decides: bool) -> String {
    let (name, text) = (escape(name), escape(text));
    let inside = match verdict {
        Verdict::Regression => format!("<failure type=\"regression\" message=\"{text}\"/>"),
        Verdict::Inconclusive if decides => format!("<error type=\"inconclusive\" message=\"{text}\"/>"),
        _ => format!("<system-out>{text}</system-out>"),
    };
    format!("<testcase classname=\"lowbit.gate\" name=\"{name}\">{inside}</testcase>")
}

/// Text in an attribute or an element; control characters, which XML has no way to write, become spaces.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::record::Threshold;

    #[test]
    fn failures_errors_and_names() {
        let thresholds = vec![
            Threshold::new("KL <a> & \"b\"".into(), 0.5, (0.4, 0.6), Some(0.1)),
            Threshold::new("p".into(), 1.0, (0.9, 1.2), Some(1.1)),
            Threshold::new("q".into(), 1.0, (0.9, 1.2), None),
        ];
        let xml = junit(&GateRecord { thresholds, ..GateRecord::default() });
        assert!(xml.contains("tests=\"3\" failures=\"1\" errors=\"1\""), "{xml}");
        assert!(xml.contains("name=\"KL &lt;a&gt; &amp; &quot;b&quot;\"><failure type=\"regression\""), "{xml}");
    }
}
