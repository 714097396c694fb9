//! How much memory this process may still take.

use std::path::Path;

/// Bytes that can be taken without swapping or being killed: the system's estimate, or what is left under the limit of
/// the control group (a container's limit) where that is less. None where the system does not tell.
pub(super) fn available_bytes() -> Option<u64> {
    let system = read("/proc/meminfo").and_then(|text| mem_available_bytes(&text));
    let group = read("/proc/self/cgroup").as_deref().and_then(own_group).and_then(|group| {
        // Inside a container the group's own directory is mounted as the root.
        ["/sys/fs/cgroup".to_owned() + group, "/sys/fs/cgroup".to_owned()]
            .iter()
            .find_map(|dir| left_in_group(dir))
    });
    system.into_iter().chain(group).min()
}

fn left_in_group(dir: &str) -> Option<u64> {
    let dir = Path::new(dir);
    let limit = std::fs::read_to_string(dir.join("memory.max")).ok()?.trim().parse::<u64>().ok()?;
    let used = std::fs::read_to_string(dir.join("memory.current")).ok()?.trim().parse::<u64>().ok()?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).ok()?;
    Some(limit.saturating_sub(used.saturating_sub(inactive_file_bytes(&stat))))
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// `MemAvailable` of /proc/meminfo.
fn mem_available_bytes(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// This process's group in the one hierarchy of cgroup v2.
fn own_group(cgroup: &str) -> Option<&str> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Pages of files that the system takes back first: they count as used, but do not stand in the way.
fn inactive_file_bytes(stat: &str) -> u64 {
    let value = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal:       24675432 kB\nMemFree:  100 kB\nMemAvailable:   22000000 kB\n";
        assert_eq!(mem_available_bytes(text), Some(22_000_000 * 1024));
        assert_eq!(mem_available_bytes("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn the_group_is_that_of_cgroup_v2() {
        assert_eq!(own_group("12:cpu:/a\n0::/system.slice/x.service\n"), Some("/system.slice/x.service"));
        assert_eq!(own_group("12:cpu:/a\n"), None);
    }

    #[test]
    fn file_pages_that_can_be_taken_back_do_not_count_as_used() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("memory.max", "1000\n");
        write("memory.current", "700\n");
        write("memory.stat", "anon 300\nfile 400\ninactive_file 250\nactive_file 150\n");
        assert_eq!(left_in_group(dir.path().to_str().unwrap()), Some(550));
        write("memory.max", "max\n");
        assert_eq!(left_in_group(dir.path().to_str().unwrap()), None);
    }
}
