//! What templates expect of Python.

use minijinja::Error;
use minijinja::value::{Kwargs, Value};

/// `tojson` as `transformers` has it: not escaped for HTML.
pub(super) fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    super::limits::writable(value)?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    super::limits::indentable(value, indent.as_ref())?;
    let json = minijinja::filters::tojson(
        value,
        indent.filter(|value| !value.is_none()),
        Kwargs::from_iter([] as [(String, Value); 0]),
    )?;
    let json = json.to_string();
    let mut out = String::with_capacity(json.len());
    let mut rest = json.as_str();
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let plain = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')]
            .into_iter()
            .find_map(|(code, plain)| Some((plain, escape.strip_prefix(code)?)));
        if let Some((plain, after)) = plain {
            out.push(plain);
            rest = after;
        } else {
            // An escape is a backslash and one ASCII character at least.
            let (escape, after) = escape.split_at_checked(2).unwrap_or((escape, ""));
            out.push_str(escape);
            rest = after;
        }
    }
    out.push_str(rest);
    Ok(Value::from(out))
}

/// The part of `strftime` that templates use, in UTC; unknown codes stay as they are.
pub(super) fn strftime(format: &str, unix_time: u64) -> String {
    const MONTHS: &str = "January February March April May June July August September October November December";
    const DAYS: &str = "Thursday Friday Saturday Sunday Monday Tuesday Wednesday";
    let nth = |names: &'static str, n: u64| names.split(' ').nth(n as usize).unwrap_or_default();
    let (days, seconds) = (unix_time / 86_400, unix_time % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Howard Hinnant's civil_from_days, for days since 1970-01-01.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let in_year = if month > 2 { of_year + 60 + u64::from(leap(year)) } else { of_year - 305 };
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (month_name, day_name) = (nth(MONTHS, month - 1), nth(DAYS, days % 7));
    let short = |name: &'static str| name.get(..3).unwrap_or(name);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = chars.next();
        let (padded, code) = if code == Some('-') { (false, chars.next()) } else { (true, code) };
        let two = |n: u64| {
            if padded { format!("{n:02}") } else { n.to_string() }
        };
        out.push_str(&match code {
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('m') => two(month),
            Some('y') => two(year % 100),
            Some('Y') => year.to_string(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('j') => {
                if padded {
                    format!("{in_year:03}")
                } else {
                    in_year.to_string()
                }
            }
            Some('b') => short(month_name).into(),
            Some('B') => month_name.into(),
            Some('a') => short(day_name).into(),
            Some('A') => day_name.into(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('%') => "%".into(),
            Some(other) => format!("%{other}"),
            None => "%".into(),
        });
    }
    out
}
