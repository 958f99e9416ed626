//! What a judge said: read strictly, or not at all.

/// Which of two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preference {
    /// The one read first.
    First,
    /// The other.
    Second,
    /// Neither.
    Tie,
}

/// What follows `label:` in the last line that begins with it, decoration aside.
fn last<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let bare = |c: char| c.is_whitespace() || "*_#`>[](){}\"'".contains(c);
    text.lines().rev().find_map(|line| {
        let line = line.trim_matches(bare);
        let head = line.get(..label.len()).filter(|h| h.eq_ignore_ascii_case(label))?;
        let rest = line.get(head.len()..)?.trim_start_matches(bare).strip_prefix(':')?;
        Some(rest.trim_matches(bare).trim_end_matches('.').trim_matches(bare))
    })
}

/// `Grade: 4` or `Grade: 4/5`, a whole number on the scale.
pub(super) fn grade(text: &str, low: i64, high: i64) -> Option<i64> {
    let found = last(text, "grade")?;
    let number = match found.split_once('/') {
        Some((number, of)) if of.trim().parse() == Ok(high) => number.trim(),
        Some(_) => return None,
        None => found,
    };
    number.parse().ok().filter(|n| (low..=high).contains(n))
}

/// `Verdict: A`, `B` or `TIE`.
pub(super) fn preference(text: &str) -> Option<Preference> {
    let found = last(text, "verdict")?.to_ascii_lowercase();
    match found.as_str() {
        "a" | "answer a" | "answer_a" => Some(Preference::First),
        "b" | "answer b" | "answer_b" => Some(Preference::Second),
        "tie" | "a tie" | "equal" => Some(Preference::Tie),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grades() {
        for (text, want) in [
            ("Good.\nGrade: 4", Some(4)),
            ("The answer says \"Grade: 5\".\n**Grade:** 2.", Some(2)),
            ("grade: 3/5\n", Some(3)),
            ("Grade: [[1]]", Some(1)),
            ("Grade: 3/10", None),
            ("Grade: 6", None),
            ("Grade: 3.5", None),
            ("Grade: four", None),
            ("I would give it a 4.", None),
            ("", None),
            // The last word counts, though it cannot be read.
            ("Grade: 4\nGrade: none", None),
        ] {
            assert_eq!(grade(text, 1, 5), want, "{text}");
        }
        assert_eq!(grade("Grade: -1", -2, 2), Some(-1));
    }

    #[test]
    fn preferences() {
        for (text, want) in [
            ("…\nVerdict: A", Some(Preference::First)),
            ("**Verdict: B**", Some(Preference::Second)),
            ("Verdict: [[A]]", Some(Preference::First)),
            ("verdict: Tie.", Some(Preference::Tie)),
            ("Verdict: A or B", None),
            ("A is better", None),
            ("é", None),
        ] {
            assert_eq!(preference(text), want, "{text}");
        }
    }
}
