//! Plain aligned tables and human numbers for the terminal.

/// Columns of a terminal: no table is wider, whatever the terminal, so that records of runs read alike.
const WIDTH: usize = 80;
/// Between two columns.
const GAP: usize = 2;

/// Aligns columns; the first is left, the others right. A table that is too wide breaks its cells into lines at their spaces,
/// as few cells as will do, and where that does not help becomes a block for each row.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    let all: Vec<&[String]> = std::iter::once(header.as_slice()).chain(rows.iter().map(Vec::as_slice)).collect();
    let column = |i: usize| all.iter().filter_map(move |r| r.get(i)).map(String::as_str);
    // Least width of a column whose cells have so many lines.
    let width = |i: usize, lines: usize| -> usize {
        let natural = column(i).map(|c| c.chars().count()).max().unwrap_or(0);
        let least = column(i).flat_map(words).map(|w| w.chars().count()).max().unwrap_or(0);
        (least..natural).find(|w| column(i).all(|c| wrapped(c, *w).len() <= lines)).unwrap_or(natural)
    };
    let gaps = GAP * header.len().saturating_sub(1);
    let mut lines = vec![1; header.len()];
    let mut widths: Vec<usize> = (0..header.len()).map(|i| width(i, 1)).collect();
    while widths.iter().sum::<usize>() + gaps > WIDTH {
        // Few lines before many; names of rows last; heads before bodies, prose before figures; then what saves most.
        let saving = |i: usize| widths[i] - width(i, lines[i] + 1);
        let head = |i: usize| {
            let most = |w: usize| column(i).skip(1).map(|c| wrapped(c, w).len()).max();
            most(widths[i]) == most(width(i, lines[i] + 1))
        };
        let prose = |i: usize| column(i).skip(1).all(|c| !c.contains(|d: char| d.is_ascii_digit()));
        let next = (0..widths.len())
            .filter(|&i| saving(i) > 0)
            .max_by_key(|&i| (std::cmp::Reverse(lines[i]), i > 0, head(i), prose(i), saving(i)));
        let Some(i) = next else { return blocks(&header, rows) };
        lines[i] += 1;
        widths[i] = width(i, lines[i]);
    }
    all.iter().map(|r| row(r, &widths)).collect::<Vec<_>>().join("\n")
}

/// A line for each row, however long: for lists that scripts search.
pub fn listing(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    let all: Vec<&[String]> = std::iter::once(header.as_slice()).chain(rows.iter().map(Vec::as_slice)).collect();
    let width = |i: usize| all.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    all.iter().map(|r| row(r, &widths)).collect::<Vec<_>>().join("\n")
}

/// Split at spaces, but not inside brackets: an interval stays whole.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    text.split(move |c: char| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ' ' && depth == 0
    })
}

/// One row, as many lines as its longest cell needs.
fn row(cells: &[String], widths: &[usize]) -> String {
    let columns: Vec<Vec<String>> = cells.iter().zip(widths).map(|(c, w)| wrapped(c, *w)).collect();
    let height = columns.iter().map(Vec::len).max().unwrap_or(1);
    let line = |n: usize| -> String {
        let parts: Vec<String> = columns
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(i, (lines, w))| {
                let text = lines.get(n).map_or("", String::as_str);
                if i == 0 { format!("{text:<w$}") } else { format!("{text:>w$}") }
            })
            .collect();
        parts.join(&" ".repeat(GAP)).trim_end().to_string()
    };
    (0..height).map(line).collect::<Vec<_>>().join("\n")
}

/// Broken at spaces.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    if text.chars().count() <= width {
        return vec![text.to_string()];
    }
    let mut out = vec![String::new()];
    for word in words(text) {
        let last = out.last_mut().filter(|l| l.is_empty() || l.chars().count() + 1 + word.chars().count() <= width);
        match last {
            Some(l) if l.is_empty() => l.push_str(word),
            Some(l) => {
                l.push(' ');
                l.push_str(word);
            }
            None => out.push(word.to_string()),
        }
    }
    out
}

/// A row as its first cell with the others named below it.
fn blocks(header: &[String], rows: &[Vec<String>]) -> String {
    let named = |r: &Vec<String>| -> String {
        let mut out = vec![r.first().cloned().unwrap_or_default()];
        out.extend(header.iter().zip(r).skip(1).map(|(h, c)| match h.as_str() {
            "" => format!("  {c}"),
            h => format!("  {h}: {c}"),
        }));
        out.join("\n")
    };
    rows.iter().map(named).collect::<Vec<_>>().join("\n")
}

/// Bytes in MB (10^6).
pub fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(row: &[&str]) -> Vec<String> {
        row.iter().map(|c| c.to_string()).collect()
    }

    #[test]
    fn no_table_is_wider_than_a_terminal() {
        let narrow = table(&["a", "b"], &[cells(&["x", "10"]), cells(&["long", "9"])]);
        assert_eq!(narrow, "a      b\nx     10\nlong   9");
        let wide = [
            "words",
            "acc",
            "3,719",
            "0.2110",
            "0.2099",
            "+0.11 pp [-0.21 pp, +0.43 pp]",
            "60/56",
            "2.52e-1",
            "0.45 pp",
            "pass",
        ];
        let header =
            ["", "metric", "items", "reference", "candidate", "loss [95 %]", "lost/gained", "p(loss)", "finds", ""];
        let text = table(&header, &[cells(&wide)]);
        assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
        for cell in wide.iter().flat_map(|c| words(c)) {
            assert!(text.contains(cell), "{cell}: {text}");
        }
        // Prose gives way, once, and an interval stays whole.
        let compared = ["concurrent 2 ttft p50", "12.08", "12.08", "1.000 [0.911, 1.099]", "no difference shown"];
        let text = table(&["", "before, ms", "after, ms", "ratio [95 % CI]", ""], &[cells(&compared)]);
        assert!(text.contains("1.000 [0.911, 1.099]  no difference\n") && text.lines().count() == 4, "{text}");
        assert_eq!(listing(&["", "", "", "", ""], &[cells(&compared)]).lines().count(), 2);
        // One word that no break makes narrower.
        let path = "p".repeat(70);
        let text = table(&["file", "bytes", "what"], &[cells(&[&path, "123456789", "weights"])]);
        assert_eq!(text, format!("{path}\n  bytes: 123456789\n  what: weights"));
    }
}
