//! Variants side by side: a line for each, and the chart of quality, latency and cost.

use lowbit_bench::capacity::plan::PlanRow;
use lowbit_bench::record::BenchRow;

use crate::chart_speed::spread;
use crate::chart_triangle::{Axes, Point, triangle};
use crate::format::{self as f, NONE, bytes, interval, sig};
use crate::table::Table;
use crate::view::{lead, size_source};
use crate::{Records, Variant, view_verdict};

/// What a plan of any of the directories says of a variant.
fn planned<'a>(v: &Variant, all: &'a [Variant]) -> Option<&'a PlanRow> {
    let own = |row: &&PlanRow| row.name == v.name || row.name.starts_with(&format!("{} (", v.name));
    all.iter().filter_map(|a| a.records.capacity.as_ref()).flat_map(|c| &c.variants).find(own)
}

/// Name, verdict and figures of each variant.
pub(crate) fn table(variants: &[Variant]) -> Table {
    let mut t = Table::new(
        "The variants",
        &[
            "Variant",
            "Verdict",
            "Scheme",
            "#Size (smaller by)",
            "#Mean KL, nats/token [95 % CI]",
            "#Perplexity ratio [95 % CI]",
            "#Loss, pp [95 % CI]",
            "#Decode speed-up [95 % CI]",
            "#$ per million output tokens",
        ],
    );
    for v in variants {
        let r = &v.records;
        let e = r.eval.as_ref();
        let size = size_source(r).filter(|s| s.1 > 0 && s.2 > 0);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned()).into();
        let kl = e.and_then(|e| e.kl.as_ref());
        t.row(vec![
            v.name.as_str().into(),
            view_verdict::name(r).into(),
            or_none(r.quantize.as_ref().map(|q| format!("{} {}", q.scheme, q.method))),
            or_none(size.map(|s| format!("{} ({})", bytes(s.2), f::factor(s.1 as f64 / s.2 as f64)))),
            or_none(
                kl.map(|k| format!("{} [{}]", sig(k.mean, 3), f::range(k.mean_interval.low, k.mean_interval.high, 3))),
            ),
            or_none(e.and_then(|e| e.perplexities.iter().find_map(|p| p.ratio)).map(|i| interval(&i, 4))),
            or_none(view_verdict::pooled(r)),
            or_none(lead(r).map(|s| format!("{} [{}]", f::factor(s.ratio), f::range(s.low, s.high, 3)))),
            or_none(planned(v, variants).and_then(|p| p.dollars_per_million_output).map(|d| sig(d, 3))),
        ]);
    }
    t.without_empty_columns().wrapping()
}

/// A decode row: the smallest batch of the first test.
fn decode<'a>(r: &'a Records, role: &str) -> Option<&'a BenchRow> {
    let rows = r.bench.as_ref()?.rows.iter();
    rows.filter(|w| w.role == role && w.test.starts_with("tg") && w.tokens_per_second > 0.0).min_by_key(|w| w.batch)
}

/// Milliseconds a token: median, fastest, slowest.
fn per_token(row: &BenchRow) -> (f64, f64, f64) {
    let ms = |rate: f64| 1000.0 * row.batch.max(1) as f64 / rate;
    let (slow, fast) = spread(&row.samples).unwrap_or((row.tokens_per_second, row.tokens_per_second));
    (ms(row.tokens_per_second), ms(fast), ms(slow))
}

/// A kind of loss.
enum Loss {
    Kl,
    Accuracy,
    Perplexity,
}

impl Loss {
    fn axis(&self) -> &'static str {
        match self {
            Self::Kl => "mean KL, nats/token",
            Self::Accuracy => "loss of accuracy, percentage points",
            Self::Perplexity => "perplexity ratio − 1, %",
        }
    }

    fn of(&self, r: &Records) -> Option<(f64, f64, f64)> {
        match self {
            Self::Kl => {
                let k = r.eval.as_ref()?.kl.as_ref()?;
                Some((k.mean, k.mean_interval.low, k.mean_interval.high))
            }
            Self::Accuracy => {
                let p = r.gate.as_ref()?.pool.as_ref()?;
                Some((100.0 * p.loss, 100.0 * p.interval.0, 100.0 * p.interval.1))
            }
            Self::Perplexity => {
                let i = r.eval.as_ref()?.perplexities.iter().find_map(|p| p.ratio)?;
                Some(((i.value - 1.0) * 100.0, (i.low - 1.0) * 100.0, (i.high - 1.0) * 100.0))
            }
        }
    }
}

/// The chart, with the float model at no loss; `None` where fewer than two models have all three figures.
pub(crate) fn chart(variants: &[Variant]) -> Option<String> {
    let kinds = [Loss::Kl, Loss::Accuracy, Loss::Perplexity];
    let having = |l: &Loss| variants.iter().filter(|v| l.of(&v.records).is_some()).count();
    // The first among those that most variants have.
    let loss = kinds.iter().rev().max_by_key(|l| having(l)).filter(|l| having(l) > 0)?;
    let priced = variants.iter().all(|v| planned(v, variants).is_some_and(|p| p.dollars_per_million_output.is_some()));
    let alone = variants.len() == 1;
    let mut points: Vec<Point> = variants
        .iter()
        .filter_map(|v| {
            let (_, _, after, _) = size_source(&v.records)?;
            let dollars = planned(v, variants).and_then(|p| p.dollars_per_million_output).filter(|_| priced && !alone);
            Some(Point {
                name: if v.name.is_empty() { "quantized".to_owned() } else { v.name.clone() },
                latency: per_token(decode(&v.records, "candidate")?),
                loss: loss.of(&v.records)?,
                cost: dollars.unwrap_or(after as f64),
                cost_text: dollars.map_or_else(|| bytes(after), |d| format!("{} $/M tokens", sig(d, 3))),
                float: false,
            })
        })
        .collect();
    let float = variants.iter().find_map(|v| Some((size_source(&v.records)?.1, decode(&v.records, "reference")?)));
    if let Some((before, row)) = float.filter(|_| alone || !priced) {
        points.push(Point {
            name: "float".to_owned(),
            latency: per_token(row),
            loss: (0.0, 0.0, 0.0),
            cost: before as f64,
            cost_text: bytes(before),
            float: true,
        });
    }
    let cost = if priced && !alone { "$ per million output tokens" } else { "bytes of weights" };
    triangle(
        &points,
        &Axes { latency: "decoding, ms/token".to_owned(), loss: loss.axis().to_owned(), cost: cost.to_owned() },
    )
}

/// What the areas of the chart are.
pub(crate) fn chart_note() -> &'static str {
    "Further down is closer to the float model, further left is faster, smaller is cheaper. The area of a disc is the size of the weights, \
     or the price of a million output tokens where every variant has one; whiskers are the 95 % interval of the loss, and the fastest \
     and slowest repetition."
}
