//! Whether a plan fits the disk and the memory, before hours of work.

use std::path::Path;

use lowbit_checkpoint::CheckpointError;

use crate::error::{QuantizeError, Result};

/// Fails where the disk of `output` has less room than `needed` bytes of tensors.
pub(crate) fn check_disk(output: &Path, needed: u64) -> Result<()> {
    let mut dir = output;
    while !dir.exists() {
        match dir.parent() {
            Some(p) if !p.as_os_str().is_empty() => dir = p,
            _ => {
                dir = Path::new(".");
                break;
            }
        }
    }
    let stat = rustix::fs::statvfs(dir).map_err(|e| CheckpointError::io(dir, e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // Headers, tokenizer and records come on top of the tensors.
    let wanted = needed.saturating_add(16 << 20);
    if free < wanted {
        return Err(QuantizeError::Plan {
            summary: format!(
                "{}: the output needs {} MB, the disk has {} MB free",
                output.display(),
                wanted / 1_000_000,
                free / 1_000_000
            ),
            offenders: vec![],
            hint: Some("free some space or choose an output on another disk".into()),
        });
    }
    Ok(())
}

/// Fails where the process may not take the plan's memory: the system would end it in the middle of the work.
pub(crate) fn check_memory(needed: u64, offloaded: bool) -> Result<()> {
    let Some(free) = available_memory(|path| std::fs::read_to_string(path).ok()).filter(|free| *free < needed) else {
        return Ok(());
    };
    let hint = match offloaded {
        true => "use a machine with more memory",
        false => "lower --samples or --seq-len, or keep activations on disk with --offload DIR",
    };
    Err(QuantizeError::Plan {
        summary: format!("the plan needs about {} MB of memory, {} MB are free", needed / 1_000_000, free / 1_000_000),
        offenders: vec![],
        hint: Some(hint.into()),
    })
}

/// Bytes that may still be taken: of the machine with its swap, and of the control group. `None` where the system does not say.
fn available_memory(read: impl Fn(&str) -> Option<String>) -> Option<u64> {
    let info = read("/proc/meminfo")?;
    let of = |key: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(key))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()?.checked_mul(1024)
    };
    let machine = of("MemAvailable:")?.saturating_add(of("SwapFree:").unwrap_or(0));
    let group = read("/proc/self/cgroup").and_then(|text| {
        let path = text.lines().find_map(|l| l.strip_prefix("0::"))?.trim_end_matches('/').to_string();
        let number = |file: &str| read(&format!("/sys/fs/cgroup{path}/{file}"))?.trim().parse::<u64>().ok();
        // Pages of files count as used and are given back on demand.
        let files = read(&format!("/sys/fs/cgroup{path}/memory.stat"))
            .and_then(|s| s.lines().find_map(|l| l.strip_prefix("file ")?.parse::<u64>().ok()))
            .unwrap_or(0);
        Some(number("memory.max")?.saturating_sub(number("memory.current")?.saturating_sub(files)))
    });
    Some(group.map_or(machine, |g| g.min(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_of_machine_and_group_counts() {
        let files = |group: &'static str, max: &'static str| {
            move |path: &str| {
                let text = match path {
                    "/proc/meminfo" => "MemTotal: 9 kB\nMemAvailable:   4000 kB\nSwapFree: 96 kB\n",
                    "/proc/self/cgroup" => group,
                    "/sys/fs/cgroup/a/memory.max" => max,
                    "/sys/fs/cgroup/a/memory.current" => "1500000\n",
                    "/sys/fs/cgroup/a/memory.stat" => "anon 1\nfile 500000\n",
                    _ => return None,
                };
                Some(text.to_string())
            }
        };
        assert_eq!(available_memory(files("", "")), Some(4096 * 1024));
        assert_eq!(available_memory(files("0::/a\n", "3000000\n")), Some(2_000_000));
        assert_eq!(available_memory(files("0::/a\n", "max\n")), Some(4096 * 1024));
        assert_eq!(available_memory(|_| None), None);
        assert!(check_memory(0, false).is_ok());
        let error = check_memory(u64::MAX, false).unwrap_err().to_string();
        assert!(error.contains("of memory"), "{error}");
    }
}
