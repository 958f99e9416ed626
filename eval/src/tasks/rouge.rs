//! ROUGE-L (Lin 2004): the longest common subsequence of words, as an F measure with equal weight of precision and
//! recall. Words are runs of letters and digits in lower case, without stemming.

/// Words of a text.
pub fn words(text: &str) -> Vec<String> {
    text.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// F measure of `found` against `wanted`, 0 to 1.
pub fn rouge_l(wanted: &str, found: &str) -> f64 {
    let (wanted, found) = (words(wanted), words(found));
    let common = common_subsequence(&wanted, &found) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / found.len() as f64, common / wanted.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut corner = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { corner + 1 } else { above.max(row[j]) };
            corner = above;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // The example of the paper: "police killed the gunman" against two candidates.
        let reference = "police killed the gunman";
        assert!((rouge_l(reference, "police kill the gunman") - 0.75).abs() < 1e-12);
        assert!((rouge_l(reference, "the gunman kill police") - 0.5).abs() < 1e-12);
        assert_eq!(rouge_l("", "a"), 0.0);
        assert_eq!(rouge_l("A, b!", "a b"), 1.0);
    }
}
