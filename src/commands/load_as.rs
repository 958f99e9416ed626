//! Load records as other tools print them: their definitions and their layout, from the same traces. Percentiles follow the tool's
//! rule: linear between neighbours (vLLM, aiperf), or the inverse distribution (GuideLLM), small samples or not.

use lowbit_bench::load::record::{LoadRecord, StageRecord};
use lowbit_bench::load::trace::RequestTrace;

use crate::args::ToolArg;

/// See the module.
pub fn as_tool(r: &LoadRecord, tool: ToolArg) -> String {
    let each = |f: fn(&StageRecord) -> String| r.stages.iter().map(f).collect::<Vec<_>>().join("\n\n");
    match tool {
        ToolArg::Vllm => each(vllm),
        ToolArg::Aiperf => each(aiperf),
        ToolArg::Guidellm => guidellm(&r.stages),
    }
}

/// The requests of a stage that count.
struct Counted<'a> {
    /// Whole answers.
    ok: Vec<&'a RequestTrace>,
    failed: Vec<&'a RequestTrace>,
    cancelled: Vec<&'a RequestTrace>,
}

impl<'a> Counted<'a> {
    fn of(s: &'a StageRecord) -> Self {
        let w = s.metrics.window;
        let inside = || s.requests.iter().filter(|t| (w.from_ns..w.to_ns).contains(&t.scheduled_ns));
        Self {
            ok: inside().filter(|t| t.ok()).collect(),
            failed: inside().filter(|t| t.outcome.failed()).collect(),
            cancelled: inside().filter(|t| !t.ok() && !t.outcome.failed()).collect(),
        }
    }

    fn each(&self, f: impl Fn(&RequestTrace) -> Option<f64>) -> Vec<f64> {
        self.ok.iter().filter_map(|t| f(t)).collect()
    }

    /// From sending to the first output, ms.
    fn ttft(&self) -> Vec<f64> {
        self.each(|t| Some(ms(t.first_ns()?, t.sent_ns)))
    }

    /// From sending to the end of the response, which vLLM's last event (usage) is part of, ms.
    fn whole(&self) -> Vec<f64> {
        self.each(|t| Some(ms(t.end_ns, t.sent_ns)))
    }

    /// From sending to the last output, ms.
    fn latency(&self) -> Vec<f64> {
        self.each(|t| Some(ms(t.last_ns().unwrap_or(t.end_ns), t.sent_ns)))
    }

    /// From the first output to the last, over tokens − 1, ms.
    fn per_token(&self) -> Vec<f64> {
        self.each(|t| (gaps(t) > 0.0).then(|| ms(t.last_ns().unwrap_or(0), t.first_ns().unwrap_or(0)) / gaps(t)))
    }

    /// Between neighbouring chunks, ms.
    fn chunks(&self) -> Vec<f64> {
        self.ok.iter().flat_map(|t| t.chunks_ns.windows(2).map(|w| ms(w[1], w[0]))).collect()
    }
}

fn ms(to: u64, from: u64) -> f64 {
    to.saturating_sub(from) as f64 * 1e-6
}

fn gaps(t: &RequestTrace) -> f64 {
    f64::from(t.output_tokens.saturating_sub(1))
}

fn input(t: &RequestTrace) -> f64 {
    f64::from(t.input_tokens.unwrap_or(0))
}

fn output(t: &RequestTrace) -> f64 {
    f64::from(t.output_tokens)
}

fn sum(of: &[&RequestTrace], f: impl Fn(&RequestTrace) -> f64) -> f64 {
    // An empty sum is −0.
    of.iter().map(|t| f(t)).sum::<f64>() + 0.0
}

/// The block `vllm bench serve` prints, line for line: scripts read it. Milliseconds: TTFT, TPOT, ITL, E2EL.
fn vllm(s: &StageRecord) -> String {
    let c = Counted::of(s);
    let rates = &s.metrics.rates;
    let mut out = vec![format!("{:=^50}", " Serving Benchmark Result ")];
    let mut line = |name: &str, value: String| out.push(format!("{name:<40} {value:<10}").trim_end().to_string());
    line("Successful requests:", c.ok.len().to_string());
    line("Failed requests:", c.failed.len().to_string());
    if let Some(streams) = s.streams {
        line("Maximum request concurrency:", streams.to_string());
    }
    if let Some(rate) = s.rate {
        line("Request rate configured (RPS):", format!("{rate:.2}"));
    }
    line("Benchmark duration (s):", format!("{:.2}", s.metrics.window.seconds()));
    line("Total input tokens:", format!("{:.0}", sum(&c.ok, input)));
    line("Total generated tokens:", format!("{:.0}", sum(&c.ok, output)));
    line("Request throughput (req/s):", format!("{:.2}", rates.requests_per_second));
    if let Some(slo) = &s.slo {
        line("Request goodput (req/s):", format!("{:.2}", slo.goodput_per_second));
    }
    line("Output token throughput (tok/s):", format!("{:.2}", rates.output_tokens_per_second));
    let (tokens, requests) = peaks(&c.ok);
    line("Peak output token throughput (tok/s):", format!("{tokens:.2}"));
    line("Peak concurrent requests:", format!("{requests:.2}"));
    line(
        "Total token throughput (tok/s):",
        format!("{:.2}", rates.output_tokens_per_second + rates.input_tokens_per_second),
    );
    let tpot = c.each(|t| (gaps(t) > 0.0).then(|| Some(ms(t.end_ns, t.first_ns()?) / gaps(t))).flatten());
    let heads = [
        ("TTFT", "Time to First Token", c.ttft()),
        ("TPOT", "Time per Output Token (excl. 1st token)", tpot),
        ("ITL", "Inter-token Latency", c.chunks()),
        ("E2EL", "End-to-end Latency", c.whole()),
    ];
    for (name, head, values) in heads.iter().filter(|h| !h.2.is_empty()) {
        out.push(format!("{head:-^50}"));
        let q = |q: f64| quantile(values, None, q, false);
        for (what, v) in [("Mean", mean(values)), ("Median", q(0.5)), ("P99", q(0.99))] {
            out.push(format!("{:<40} {v:<10.2}", format!("{what} {name} (ms):")).trim_end().to_string());
        }
    }
    out.push("=".repeat(50));
    out.join("\n")
}

/// Chunks that arrived, and requests in flight at any time, in the fullest second since the first request was sent.
fn peaks(ok: &[&RequestTrace]) -> (f64, f64) {
    const SECOND: u64 = 1_000_000_000;
    let Some(first) = ok.iter().map(|t| t.sent_ns).min() else { return (0.0, 0.0) };
    let second = |at: u64| at.saturating_sub(first) / SECOND;
    let mut seconds: Vec<u64> = ok.iter().flat_map(|t| t.chunks_ns.iter().map(|c| second(*c))).collect();
    seconds.sort_unstable();
    let tokens = seconds.chunk_by(|a, b| a == b).map(<[u64]>::len).max().unwrap_or(0);
    let mut steps: Vec<(u64, i64)> =
        ok.iter().flat_map(|t| [(second(t.sent_ns), 1), (second(t.end_ns) + 1, -1)]).collect();
    steps.sort_unstable();
    let (mut level, mut most) = (0i64, 0i64);
    for (_, change) in steps {
        level += change;
        most = most.max(level);
    }
    (tokens as f64, most as f64)
}

/// aiperf's table: from the start of sending, ITL = (latency − TTFT) / (tokens − 1), standard deviations of the whole population.
fn aiperf(s: &StageRecord) -> String {
    let c = Counted::of(s);
    let itl = c.per_token();
    let users: Vec<f64> = itl.iter().filter(|v| **v > 0.0).map(|v| 1e3 / v).collect();
    let spread: [(&str, Vec<f64>); 7] = [
        ("Time to First Token (ms)", c.ttft()),
        ("Time to Second Token (ms)", c.each(|t| Some(ms(*t.chunks_ns.get(1)?, t.first_ns()?)))),
        ("Request Latency (ms)", c.latency()),
        ("Inter Token Latency (ms)", itl),
        ("Output Token Throughput Per User\n(tokens/sec/user)", users),
        ("Output Sequence Length (tokens)", c.each(|t| Some(output(t)))),
        ("Input Sequence Length (tokens)", c.each(|t| t.input_tokens.map(f64::from))),
    ];
    let head = ["Metric", "avg", "min", "max", "p99", "p90", "p50", "std"];
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, values) in spread.iter().filter(|s| !s.1.is_empty()) {
        let m = mean(values);
        let sd = (values.iter().map(|v| (v - m).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        let q = |q: f64| quantile(values, None, q, false);
        let figures = [m, q(0.0), q(1.0), q(0.99), q(0.9), q(0.5), sd];
        rows.push(std::iter::once(name.to_string()).chain(figures.map(thousands)).collect());
    }
    // From the first request sent to the last answer.
    let from = c.ok.iter().map(|t| t.sent_ns).min().unwrap_or(0);
    let seconds = c.ok.iter().map(|t| ms(t.end_ns, from)).fold(0.0, f64::max) * 1e-3;
    let each_second = |n: f64| if seconds > 0.0 { n / seconds } else { 0.0 };
    for (name, v) in [
        ("Output Token Throughput (tokens/sec)", each_second(sum(&c.ok, output))),
        ("Request Throughput (requests/sec)", each_second(c.ok.len() as f64)),
        ("Request Count (requests)", c.ok.len() as f64),
    ] {
        let rest = (2..head.len()).map(|_| "N/A".to_string());
        rows.push([name.to_string(), thousands(v)].into_iter().chain(rest).collect());
    }
    boxed("NVIDIA AIPerf | LLM Metrics", &head, &rows)
}

/// `12345.6` as `12,345.60`.
fn thousands(v: f64) -> String {
    let text = format!("{v:.2}");
    let (whole, part) = text.split_once('.').unwrap_or((&text, "00"));
    let digits = whole.trim_start_matches('-');
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    format!("{}{out}.{part}", if v < 0.0 { "-" } else { "" })
}

/// A title over a table in lines, everything to the right; a cell may have several lines.
fn boxed(title: &str, head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |i: usize| rows.iter().filter_map(move |r| r.get(i)).flat_map(|c| c.lines());
    let widths: Vec<usize> = head
        .iter()
        .enumerate()
        .map(|(i, h)| cells(i).chain([*h]).map(|c| c.chars().count()).max().unwrap_or(0))
        .collect();
    let rule = |left: &str, line: &str, cross: &str, right: &str| {
        let parts: Vec<String> = widths.iter().map(|w| line.repeat(w + 2)).collect();
        format!("{left}{}{right}", parts.join(cross))
    };
    let line = |bar: &str, texts: &[&str]| {
        let parts: Vec<String> = texts.iter().zip(&widths).map(|(t, w)| format!(" {t:>w$} ")).collect();
        format!("{bar}{}{bar}", parts.join(bar))
    };
    let top = rule("┏", "━", "┳", "┓");
    let mut out = vec![format!("{title:^0$}", top.chars().count()).trim_end().to_string(), top, line("┃", head)];
    out.push(rule("┡", "━", "╇", "┩"));
    for row in rows {
        let height = row.iter().map(|c| c.lines().count()).max().unwrap_or(0);
        for n in 0..height {
            out.push(line("│", &row.iter().map(|c| c.lines().nth(n).unwrap_or("")).collect::<Vec<_>>()));
        }
    }
    out.push(rule("└", "─", "┴", "┘"));
    out.join("\n")
}

/// GuideLLM's tables: from the start of sending, ITL weighted by tokens − 1, TPOT with the first token. Of its tables the one of words
/// and characters is left out: a record holds no texts.
fn guidellm(stages: &[StageRecord]) -> String {
    let table = |title: &str, head: &[[&str; 3]], row: &dyn Fn(&StageRecord) -> Vec<String>| {
        let rows: Vec<Vec<String>> =
            stages.iter().map(|s| std::iter::once(s.profile.clone()).chain(row(s)).collect()).collect();
        let head: Vec<[&str; 3]> = std::iter::once(["Benchmark", "Strategy", ""]).chain(head.iter().copied()).collect();
        grouped(title, &head, &rows)
    };
    let both = |group: &'static str, name: &'static str| [[group, name, "Mdn"], [group, name, "p95"]];
    let each = |groups: &[(&'static str, &'static str)]| -> Vec<[&'static str; 3]> {
        groups.iter().flat_map(|(g, n)| both(g, n)).collect()
    };
    let pair = |values: &[f64], weights: Option<&[f64]>| {
        [0.5, 0.95].map(|q| if values.is_empty() { "--".into() } else { tenth(quantile(values, weights, q, true)) })
    };
    let total = |name| [["Input Tokens", name, "Tot"], ["Output Tokens", name, "Tot"]];
    let [comp, inc, err] = ["Comp", "Inc", "Err"].map(total);
    let mut run: Vec<[&str; 3]> = vec![["Timings", "Start", ""], ["Timings", "End", ""]];
    run.extend(["Dur", "Warm", "Cool"].map(|name| ["Timings", name, "Sec"]));
    run.extend([comp[0], inc[0], err[0], comp[1], inc[1], err[1]]);
    let summary = table("Run Summary Info", &run, &|s| {
        let (c, w) = (Counted::of(s), s.metrics.window);
        // A record says how long a stage took, not at what time of the day it began.
        let mut out = vec!["--".to_string(), "--".into()];
        out.extend([w.seconds(), w.from_ns as f64 * 1e-9, (s.seconds - w.to_ns as f64 * 1e-9).max(0.0)].map(tenth));
        let kinds = [&c.ok, &c.cancelled, &c.failed];
        out.extend(kinds.map(|k| tenth(sum(k, input))));
        out.extend(kinds.map(|k| tenth(sum(k, output))));
        out
    });
    let per_request =
        [("Input Tok", "Per Req"), ("Output Tok", "Per Req"), ("Total Tok", "Per Req"), ("Stream Iter", "Per Req")];
    let head: Vec<[&str; 3]> = [each(&per_request), each(&[("Output Tok", "Per Stream Iter")])].concat();
    let tokens = table("Request Token Statistics (Completed Requests)", &head, &|s| {
        let c = Counted::of(s);
        let chunks = |t: &RequestTrace| t.chunks_ns.len() as f64;
        [
            c.each(|t| Some(input(t))),
            c.each(|t| Some(output(t))),
            c.each(|t| Some(input(t) + output(t))),
            c.each(|t| Some(chunks(t))),
            c.each(|t| (chunks(t) > 0.0).then(|| output(t) / chunks(t))),
        ]
        .iter()
        .flat_map(|v| pair(v, None))
        .collect()
    });
    let head = each(&[("Request Latency", "Sec"), ("TTFT", "ms"), ("ITL", "ms"), ("TPOT", "ms")]);
    let latency = table("Request Latency Statistics (Completed Requests)", &head, &|s| {
        let c = Counted::of(s);
        let weights = c.each(|t| (gaps(t) > 0.0).then(|| gaps(t)));
        let incl = c.each(|t| Some(ms(t.last_ns()?, t.sent_ns) / output(t).max(1.0)));
        [
            pair(&c.whole().iter().map(|v| v * 1e-3).collect::<Vec<_>>(), None),
            pair(&c.ttft(), None),
            pair(&c.per_token(), Some(&weights)),
            pair(&incl, None),
        ]
        .concat()
    });
    let mut head = vec![["Requests", "Concurrency", "Mdn"], ["Requests", "Concurrency", "Mean"]];
    head.extend(["Requests", "Input Tokens", "Output Tokens", "Total Tokens"].map(|g| [g, "Per Sec", "Mean"]));
    let throughput = table("Server Throughput Statistics (All Requests)", &head, &|s| {
        let r = &s.metrics.rates;
        let levels: Vec<f64> = s.metrics.concurrency.iter().map(|c| c.1 as f64).collect();
        let median = if levels.is_empty() { "--".into() } else { tenth(quantile(&levels, None, 0.5, true)) };
        let total = r.input_tokens_per_second + r.output_tokens_per_second;
        let rest =
            [r.mean_concurrency, r.requests_per_second, r.input_tokens_per_second, r.output_tokens_per_second, total];
        std::iter::once(median).chain(rest.map(tenth)).collect()
    });
    [summary, tokens, latency, throughput].join("\n\n\n")
}

fn tenth(v: f64) -> String {
    format!("{v:.1}")
}

/// A table under three lines of heads; a head that its neighbours share, under the same head above, stands once over all of them.
fn grouped(title: &str, head: &[[&str; 3]], rows: &[Vec<String>]) -> String {
    let pad = |text: &str| if text.is_empty() { String::new() } else { format!(" {text} ") };
    let length = |text: &str| text.chars().count();
    let cells = |i: usize| rows.iter().filter_map(move |r| r.get(i)).map(|c| length(&pad(c)));
    let mut widths: Vec<usize> = (0..head.len()).map(|i| cells(i).max().unwrap_or(0)).collect();
    // Spans of each line of heads, as ranges of columns.
    let spans = |line: usize| {
        let mut out: Vec<std::ops::Range<usize>> = Vec::new();
        for (i, h) in head.iter().enumerate() {
            let same = |first: usize| {
                !h[line].is_empty()
                    && head[first][line] == h[line]
                    && (line == 0 || head[first][line - 1] == h[line - 1])
            };
            match out.last_mut().filter(|last| same(last.start)) {
                Some(last) => last.end = i + 1,
                None => out.push(i..i + 1),
            }
        }
        out
    };
    for line in 0..3 {
        for span in spans(line) {
            let wanted = length(&pad(head[span.start][line]));
            let missing = wanted.saturating_sub(widths[span.clone()].iter().sum());
            for (n, w) in widths[span.clone()].iter_mut().enumerate() {
                *w += missing / span.len() + usize::from(n < missing % span.len());
            }
        }
    }
    let rule = |c: &str| format!("|{}|", widths.iter().map(|w| c.repeat(*w)).collect::<Vec<_>>().join("|"));
    let mut out = vec![format!("ℹ {title}"), rule("=")];
    for line in 0..3 {
        let mut text = String::from("|");
        for span in spans(line) {
            let width: usize = widths[span.clone()].iter().sum();
            text += &format!("{:<width$}{}", pad(head[span.start][line]), "|".repeat(span.len()));
        }
        out.push(text);
    }
    out.push(rule("-"));
    for row in rows {
        let parts: Vec<String> = row.iter().zip(&widths).map(|(c, w)| format!("{:<w$}", pad(c))).collect();
        out.push(format!("|{}|", parts.join("|")));
    }
    out.push(rule("="));
    out.join("\n")
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / (values.len() as f64).max(1.0)
}

/// The `q` quantile of a sample that is not empty: linear between neighbours, or `inverse`, the first value at which the weights come
/// to `q` of all.
fn quantile(values: &[f64], weights: Option<&[f64]>, q: f64, inverse: bool) -> f64 {
    let weight = |i: usize| weights.and_then(|w| w.get(i)).copied().unwrap_or(1.0);
    let mut pairs: Vec<(f64, f64)> = values.iter().enumerate().map(|(i, v)| (*v, weight(i))).collect();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let at = |i: usize| pairs.get(i.min(pairs.len().saturating_sub(1))).map_or(0.0, |p| p.0);
    if !inverse {
        let place = q * pairs.len().saturating_sub(1) as f64;
        let low = place.floor() as usize;
        return at(low) + (at(low + 1) - at(low)) * place.fract();
    }
    let total: f64 = pairs.iter().map(|p| p.1).sum();
    let mut sum = 0.0;
    for (v, w) in &pairs {
        sum += w;
        if sum >= q * total - 1e-9 {
            return *v;
        }
    }
    at(pairs.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As GuideLLM 0.8 prints heads that share and heads that do not.
    #[test]
    fn heads_span_their_columns() {
        let head = [
            ["Benchmark", "Strategy", ""],
            ["Requests", "Concurrency", "Mdn"],
            ["Requests", "Concurrency", "Mean"],
            ["Requests", "Per Sec", "Mean"],
            ["Input Tokens", "Per Sec", "Mean"],
        ];
        let row = ["concurrent", "32.0", "32.0", "1.1", "1553.4"].map(String::from).to_vec();
        let want = "\
ℹ T
|============|=======|======|=========|==============|
| Benchmark  | Requests             ||| Input Tokens |
| Strategy   | Concurrency || Per Sec | Per Sec      |
|            | Mdn   | Mean | Mean                  ||
|------------|-------|------|---------|--------------|
| concurrent | 32.0  | 32.0 | 1.1     | 1553.4       |
|============|=======|======|=========|==============|";
        assert_eq!(grouped("T", &head, &[row]), want);
    }

    #[test]
    fn quantiles_and_numbers_by_hand() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], None, 0.75, false), 3.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], None, 0.5, true), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], Some(&[1.0, 1.0, 8.0]), 0.5, true), 4.0);
        assert_eq!([0.0, 999.994, 1234567.0, -1000.0].map(thousands), ["0.00", "999.99", "1,234,567.00", "-1,000.00"]);
    }
}
