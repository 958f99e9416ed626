//! Numbers for people: 3 to 4 significant digits, SI units (1 MB = 10⁶ bytes).

use lowbit_eval::record::Interval;

/// What stands where a number is missing or not finite.
pub(crate) const NONE: &str = "–";

/// `value` to `digits` significant digits; scientific outside 10⁻⁴ to 10⁶.
pub(crate) fn sig(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = digits.max(1);
    // Rounding first decides the exponent, so that 9.9996 becomes 10.00 and not 10.000.
    let rounded = format!("{:.*e}", digits - 1, value);
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((rounded.as_str(), "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        return format!("{} × 10{}", mantissa.replace('-', "−"), superscript(exponent));
    }
    let decimals = usize::try_from(digits as i32 - 1 - exponent).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    let (sign, body) = match text.strip_prefix('-') {
        Some(body) => ("−", body),
        None => ("", text.as_str()),
    };
    let (whole, fraction) = body.split_once('.').unwrap_or((body, ""));
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{sign}{}{point}{fraction}", group(whole))
}

fn superscript(exponent: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    exponent
        .to_string()
        .chars()
        .map(|c| match c.to_digit(10) {
            Some(d) => DIGITS.get(d as usize).copied().unwrap_or(c),
            None => '⁻',
        })
        .collect()
}

/// Commas between thousands.
fn group(digits: &str) -> String {
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A whole number, grouped.
pub(crate) fn count(value: u64) -> String {
    group(&value.to_string())
}

/// Bytes in SI units: kB = 10³, MB = 10⁶, GB = 10⁹.
pub(crate) fn bytes(value: u64) -> String {
    let v = value as f64;
    match value {
        0..1_000 => format!("{value} B"),
        1_000..1_000_000 => format!("{} kB", sig(v / 1e3, 3)),
        1_000_000..1_000_000_000 => format!("{} MB", sig(v / 1e6, 3)),
        1_000_000_000..1_000_000_000_000 => format!("{} GB", sig(v / 1e9, 3)),
        _ => format!("{} TB", sig(v / 1e12, 3)),
    }
}

/// A fraction as a percentage with `digits` significant digits.
pub(crate) fn percent(fraction: f64, digits: usize) -> String {
    if fraction.is_finite() { format!("{} %", sig(fraction * 100.0, digits)) } else { NONE.to_owned() }
}

/// A factor, `2.13×`.
pub(crate) fn factor(value: f64) -> String {
    if value.is_finite() { format!("{}×", sig(value, 3)) } else { NONE.to_owned() }
}

/// How much smaller `after` is, in words.
pub(crate) fn shrink(before: u64, after: u64) -> String {
    if before == 0 || after == 0 {
        return NONE.to_owned();
    }
    let ratio = before as f64 / after as f64;
    if ratio >= 1.0 { format!("{} smaller", factor(ratio)) } else { format!("{} larger", factor(1.0 / ratio)) }
}

/// `low – high`.
pub(crate) fn range(low: f64, high: f64, digits: usize) -> String {
    // The largest numbers stand for ends that the data leave open.
    let end =
        |x: f64| if x.abs() == f64::MAX { if x < 0.0 { "−∞" } else { "∞" }.to_owned() } else { sig(x, digits) };
    if low.is_finite() && high.is_finite() { format!("{} – {}", end(low), end(high)) } else { NONE.to_owned() }
}

/// `value [low – high]`.
pub(crate) fn interval(i: &Interval, digits: usize) -> String {
    if i.low.is_finite() && i.high.is_finite() {
        format!("{} [{}]", sig(i.value, digits), range(i.low, i.high, digits))
    } else {
        sig(i.value, digits)
    }
}

/// Seconds, as minutes and hours where that reads better.
pub(crate) fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return NONE.to_owned();
    }
    if value < 120.0 {
        return format!("{} s", sig(value, 3));
    }
    let whole = value.round() as u64;
    if whole < 7200 {
        format!("{} min {} s", whole / 60, whole % 60)
    } else {
        format!("{} h {} min", whole / 3600, whole % 3600 / 60)
    }
}

/// Seconds since the epoch as `2026-01-31 12:00:00 UTC` (proleptic Gregorian).
pub fn utc(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    // Civil-from-days, eras of 400 years starting on 1 March.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest % 3600 / 60, rest % 60)
}

/// The first twelve characters of a hash.
pub(crate) fn short_hash(hash: &str) -> String {
    hash.chars().take(12).collect()
}

/// A model's name for headings: the last component of a local path, a hub id as it is.
pub(crate) fn short_name(name: &str) -> &str {
    if name.starts_with(['/', '.', '~']) {
        name.trim_end_matches('/').rsplit('/').next().filter(|s| !s.is_empty()).unwrap_or(name)
    } else {
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn significant_digits() {
        assert_eq!(sig(9.9996, 4), "10.00");
        assert_eq!(sig(0.012_345, 3), "0.0123");
        assert_eq!(sig(12_345.6, 3), "12,346");
        assert_eq!(sig(-1.5, 2), "−1.5");
        assert_eq!(sig(1.234e-6, 3), "1.23 × 10⁻⁶");
        assert_eq!(sig(f64::NAN, 3), NONE);
        assert_eq!(sig(f64::INFINITY, 3), NONE);
        assert_eq!(sig(0.0, 3), "0");
    }

    #[test]
    fn units_and_dates() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(988_097_824), "988 MB");
        assert_eq!(bytes(1_234_000_000), "1.23 GB");
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_767_225_599), "2025-12-31 23:59:59 UTC");
        assert_eq!(seconds(3725.0), "62 min 5 s");
        assert_eq!(shrink(400, 100), "4.00× smaller");
        assert_eq!(short_name("/data/models/qwen/"), "qwen");
        assert_eq!(short_name("Qwen/Qwen2.5-0.5B"), "Qwen/Qwen2.5-0.5B");
        assert_eq!(percent(0.975, 3), "97.5 %");
    }
}
