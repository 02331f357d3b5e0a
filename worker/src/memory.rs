//! How much memory this process may still take: the smaller of what the machine has and what the cgroup allows.

use std::fs::read_to_string;

/// Assumed where neither can be read (not Linux, or a locked-down sandbox).
const UNKNOWN_BYTES: u64 = 4 << 30;

/// Bytes that are available.
pub fn available_bytes() -> u64 {
    let read = |path: &str| read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| meminfo_available(&text));
    let cgroup = read("/sys/fs/cgroup/memory.max").zip(read("/sys/fs/cgroup/memory.current"));
    let cgroup = cgroup.and_then(|(max, current)| cgroup_available(&max, &current));
    machine.into_iter().chain(cgroup).min().unwrap_or(UNKNOWN_BYTES)
}

/// `MemAvailable` of `/proc/meminfo`.
fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// What a version 2 cgroup has left; `None` without a limit ("max").
fn cgroup_available(max: &str, current: &str) -> Option<u64> {
    let max = max.trim().parse::<u64>().ok()?;
    let current = current.trim().parse::<u64>().ok()?;
    Some(max.saturating_sub(current))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
        assert_eq!(cgroup_available("1000\n", "400\n"), Some(600));
        assert_eq!(cgroup_available("1000\n", "4000\n"), Some(0));
        assert_eq!(cgroup_available("max\n", "400\n"), None);
    }
}
