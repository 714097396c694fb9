//! How much memory this process may still take.

use std::path::Path;

/// How a hierarchy of control groups tells what memory a group may take.
struct Hierarchy {
    /// Its name in /proc/self/cgroup: between the colons.
    controllers: &'static str,
    root: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// In the group's `memory.stat`: pages of files that the system takes back first; they count as used, but do not stand in
    /// the way.
    inactive_files: &'static str,
}

/// Of cgroup v2, then of v1. A machine has one of them.
const HIERARCHIES: [Hierarchy; 2] = [
    Hierarchy {
        controllers: "",
        root: "/sys/fs/cgroup",
        limit: "memory.max",
        usage: "memory.current",
        inactive_files: "inactive_file",
    },
    Hierarchy {
        controllers: "memory",
        root: "/sys/fs/cgroup/memory",
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
        inactive_files: "total_inactive_file",
    },
];

/// Bytes that can be taken without swapping or being killed: the system's estimate, or what is left under the limit of
/// the control group (a container's limit) where that is less. None where the system does not tell.
pub(super) fn available_bytes() -> Option<u64> {
    let system = read("/proc/meminfo").and_then(|text| mem_available_bytes(&text));
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let group = HIERARCHIES.iter().find_map(|hierarchy| {
        let group = hierarchy.own_group(&groups)?;
        // Inside a container the group's own directory is mounted as the root.
        [format!("{}{group}", hierarchy.root), hierarchy.root.to_owned()]
            .iter()
            .find_map(|dir| hierarchy.left_in_group(Path::new(dir)))
    });
    system.into_iter().chain(group).min()
}

impl Hierarchy {
    /// This process's group, of a text like /proc/self/cgroup.
    fn own_group<'a>(&self, groups: &'a str) -> Option<&'a str> {
        let in_this = |line: &'a str| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            (controllers == self.controllers).then_some(group)
        };
        groups.lines().find_map(in_this)
    }

    fn left_in_group(&self, dir: &Path) -> Option<u64> {
        let bytes = |name| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        let (limit, used) = (bytes(self.limit)?, bytes(self.usage)?);
        let stat = std::fs::read_to_string(dir.join("memory.stat")).ok()?;
        let inactive =
            stat.lines().find_map(|line| line.strip_prefix(self.inactive_files)?.strip_prefix(' '));
        let inactive = inactive.and_then(|value| value.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(inactive)))
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// `MemAvailable` of /proc/meminfo.
fn mem_available_bytes(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
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

    const V2: &Hierarchy = &HIERARCHIES[0];
    const V1: &Hierarchy = &HIERARCHIES[1];

    #[test]
    fn the_group_is_found_in_both_versions_of_control_groups() {
        let (both, v2) = ("12:cpu:/a\n4:memory:/b/c\n0::/\n", "0::/system.slice/x.service\n");
        assert_eq!(V2.own_group(v2), Some("/system.slice/x.service"));
        assert_eq!(V1.own_group(v2), None);
        assert_eq!(V1.own_group(both), Some("/b/c"));
        assert_eq!(V2.own_group("12:cpu:/a\n"), None);
    }

    #[test]
    fn file_pages_that_can_be_taken_back_do_not_count_as_used() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "memory.stat",
            "anon 300\nfile 400\ninactive_file 250\ntotal_inactive_file 350\nactive_file 150\n",
        );
        for (hierarchy, left) in [(V2, 550), (V1, 650)] {
            write(hierarchy.limit, "1000\n");
            write(hierarchy.usage, "700\n");
            assert_eq!(hierarchy.left_in_group(dir.path()), Some(left));
        }
        write(V2.limit, "max\n");
        assert_eq!(V2.left_in_group(dir.path()), None);
        // Without a limit, v1 has one that is beyond all memory.
        write(V1.limit, "9223372036854771712\n");
        assert_eq!(V1.left_in_group(dir.path()), Some(9_223_372_036_854_771_712 - 350));
    }
}
