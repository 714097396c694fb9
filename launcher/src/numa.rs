//! Which cores each shard has, where this host's memory is in several parts (NUMA nodes), each nearer to some cores than to
//! others.
//!
//! A shard that stays on one node has its share of the weights and of keys and values there, as memory is taken from the node of
//! the core that touches it first.

use std::ops::Range;
use std::path::Path;

use shard::Cores;

/// Where Linux describes cores and NUMA nodes.
const SYSTEM: &str = "/sys/devices/system";

/// The cores that the launcher may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostCores {
    /// How many, or less where the container's CPU quota is.
    pub(crate) available: usize,
    /// Those of each NUMA node that has any; the two halves of a physical core stand side by side. With one node, or where the
    /// system does not tell them apart, it may be empty.
    pub(crate) by_numa_node: Vec<Vec<usize>>,
}

impl HostCores {
    /// Finds out.
    pub(crate) fn read() -> Self {
        let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let by_numa_node = Cores::allowed()
            .map(|allowed| by_numa_node(Path::new(SYSTEM), &allowed))
            .inspect_err(|error| tracing::debug!("the system does not say which cores may be used: {error}"))
            .unwrap_or_default();
        Self { available, by_numa_node }
    }

    /// The cores of each of the shards of this host, or `None` where they are better left to the system: on one node, for a
    /// shard alone (which needs the cores and the memory of all nodes), and where there is not a core for each.
    ///
    /// The smallest share is as large as can be without one that spans nodes, since all shards wait for the slowest: nodes that
    /// are alike get shards as evenly as possible, and one of which hardly a core may be used gets none. Where there are more
    /// nodes than shards, shards have whole nodes, consecutive ones, which are often near each other.
    pub(crate) fn deal(&self, num_shards: usize) -> Option<Vec<Cores>> {
        let nodes = &self.by_numa_node;
        let num_cores: usize = nodes.iter().map(Vec::len).sum();
        if nodes.len() < 2 || num_shards < 2 || num_shards > num_cores {
            return None;
        }
        if num_shards < nodes.len() {
            let whole_nodes = |shard| nodes[part(nodes.len(), num_shards, shard)].iter().flatten();
            return Some((0..num_shards).map(|shard| whole_nodes(shard).copied().collect()).collect());
        }
        let shares = nodes.iter().zip(shards_of_nodes(nodes, num_shards)).flat_map(|(node, num_shards)| {
            (0..num_shards).map(move |shard| node[part(node.len(), num_shards, shard)].iter().copied())
        });
        Some(shares.map(Cores::from_iter).collect())
    }
}

/// How many shards each node has: one after the other goes where it has the most cores beside those that are there
/// already (D'Hondt's method, which makes the smallest share as large as can be).
fn shards_of_nodes(nodes: &[Vec<usize>], num_shards: usize) -> Vec<usize> {
    let mut counts = vec![0; nodes.len()];
    for _ in 0..num_shards {
        // a / b > c / d is a * d > c * b. The first of those that are alike.
        let best = (0..nodes.len()).reduce(|best, node| {
            let more = nodes[node].len() * (counts[best] + 1) > nodes[best].len() * (counts[node] + 1);
            if more { node } else { best }
        });
        if let Some(best) = best {
            counts[best] += 1;
        }
    }
    counts
}

/// Which of `num_items` are the `index`th of `num_parts` parts that differ by at most one.
fn part(num_items: usize, num_parts: usize, index: usize) -> Range<usize> {
    index * num_items / num_parts..(index + 1) * num_items / num_parts
}

/// The `allowed` cores of each NUMA node below `system`. One node where the nodes do not have all of them: then what is
/// described is not this machine as this process sees it.
fn by_numa_node(system: &Path, allowed: &Cores) -> Vec<Vec<usize>> {
    let nodes: Vec<Vec<usize>> = numa_nodes(system)
        .iter()
        .map(|node| siblings_together(system, &node.intersection(allowed)))
        .filter(|node| !node.is_empty())
        .collect();
    let num_cores: usize = nodes.iter().map(Vec::len).sum();
    if num_cores == allowed.len() { nodes } else { vec![siblings_together(system, allowed)] }
}

/// The cores of all NUMA nodes, in the order of their numbers; none where the system does not know nodes.
fn numa_nodes(system: &Path) -> Vec<Cores> {
    let mut nodes: Vec<(usize, Cores)> = std::fs::read_dir(system.join("node"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some((number, read_cpulist(&entry.path().join("cpulist"))?))
        })
        .collect();
    nodes.sort_unstable_by_key(|(number, _)| *number);
    nodes.into_iter().map(|(_, cores)| cores).collect()
}

/// Hyperthreads of one physical core side by side: two shards that had one each would slow each other down. Linux often numbers
/// the second ones after all first ones.
fn siblings_together(system: &Path, cores: &Cores) -> Vec<usize> {
    let physical = |core: usize| {
        let siblings = system.join(format!("cpu/cpu{core}/topology/thread_siblings_list"));
        read_cpulist(&siblings).and_then(|siblings| siblings.numbers().next()).unwrap_or(core)
    };
    let mut numbers: Vec<usize> = cores.numbers().collect();
    numbers.sort_by_cached_key(|&core| (physical(core), core));
    numbers
}

fn read_cpulist(path: &Path) -> Option<Cores> {
    std::fs::read_to_string(path).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// What Linux says of a machine with these nodes; `second`: how much higher the number of a core's second hyperthread is.
    fn machine(nodes: &[&str], second: Option<usize>) -> TempDir {
        let system = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = system.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        };
        write("node/online".to_owned(), "0-1");
        for (number, cores) in nodes.iter().enumerate() {
            write(format!("node/node{number}/cpulist"), cores);
            for core in cores.parse::<Cores>().unwrap().numbers() {
                let siblings = second.map_or(core.to_string(), |second| {
                    format!("{0},{1}", core % second, core % second + second)
                });
                write(format!("cpu/cpu{core}/topology/thread_siblings_list"), &siblings);
            }
        }
        system
    }

    /// Each shard's cores, as a cpulist.
    fn deal(system: &TempDir, allowed: &str, num_shards: usize) -> Option<Vec<String>> {
        let by_numa_node = by_numa_node(system.path(), &allowed.parse().unwrap());
        let dealt = HostCores { available: 1, by_numa_node }.deal(num_shards)?;
        Some(dealt.iter().map(Cores::to_string).collect())
    }

    #[track_caller]
    fn check(nodes: &[&str], num_shards: usize, expected: &[&str]) {
        let allowed = nodes.join(",");
        assert_eq!(deal(&machine(nodes, None), &allowed, num_shards).unwrap(), expected, "{nodes:?}");
    }

    const TWO_NODES: [&str; 2] = ["0-7", "8-15"];

    #[test]
    fn shards_are_dealt_over_nodes_and_a_nodes_cores_over_its_shards() {
        check(&TWO_NODES, 2, &["0-7", "8-15"]);
        check(&TWO_NODES, 3, &["0-3", "4-7", "8-15"]);
        check(&TWO_NODES, 4, &["0-3", "4-7", "8-11", "12-15"]);
        check(&TWO_NODES, 6, &["0-1", "2-4", "5-7", "8-9", "10-12", "13-15"]);
        check(&["0-1", "2-3"], 4, &["0", "1", "2", "3"]);
    }

    #[test]
    fn shards_have_whole_nodes_that_follow_each_other_where_there_are_more_nodes() {
        check(&["0-3", "4-7", "8-11", "12-15"], 2, &["0-7", "8-15"]);
        check(&["0-3", "4-7", "8-11"], 2, &["0-3", "4-11"]);
        // Nodes whose numbers alternate, as some firmware has it.
        check(&["0,4,8", "1,5,9", "2,6,10", "3,7,11"], 2, &["0-1,4-5,8-9", "2-3,6-7,10-11"]);
    }

    #[test]
    fn on_one_node_or_alone_or_without_a_core_each_shards_are_left_to_the_system() {
        let left = |nodes: &[&str], allowed, num_shards| {
            assert_eq!(
                deal(&machine(nodes, None), allowed, num_shards),
                None,
                "{nodes:?} {allowed} {num_shards}"
            );
        };
        left(&["0-15"], "0-15", 2);
        left(&[], "0-15", 2);
        left(&TWO_NODES, "0-15", 1);
        left(&TWO_NODES, "0-15", 17);
        left(&TWO_NODES, "0-7", 2);
        left(&["0-15", ""], "0-15", 2);
    }

    #[test]
    fn hyperthreads_of_one_core_stay_together() {
        let system = machine(&["0-7,16-23", "8-15,24-31"], Some(16));
        let of = |num_shards| deal(&system, "0-31", num_shards).unwrap();
        assert_eq!(of(2), ["0-7,16-23", "8-15,24-31"]);
        assert_eq!(of(4), ["0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"]);
        assert_eq!(of(3), ["0-3,16-19", "4-7,20-23", "8-15,24-31"]);
    }

    #[test]
    fn only_cores_that_may_be_used_are_dealt() {
        let system = machine(&TWO_NODES, None);
        let of = |allowed, num_shards| deal(&system, allowed, num_shards).unwrap();
        assert_eq!(of("2-5,8-15", 2), ["2-5", "8-15"]);
        assert_eq!(of("2-5,8-15", 3), ["2-5", "8-11", "12-15"]);
        // The first node's one core would hold up all the others.
        assert_eq!(of("7-15", 2), ["8-11", "12-15"]);
        assert_eq!(of("7-8", 2), ["7", "8"]);
    }

    #[test]
    fn nodes_are_in_the_order_of_their_numbers() {
        let cores: Vec<String> = (0..12).map(|core| core.to_string()).collect();
        let nodes: Vec<&str> = cores.iter().map(String::as_str).collect();
        check(&nodes, 12, &nodes);
    }

    #[test]
    fn cores_on_no_node_mean_that_nodes_are_not_known() {
        let system = machine(&TWO_NODES, None);
        assert_eq!(deal(&system, "0-17", 2), None);
        std::fs::write(system.path().join("node/node1/cpulist"), "eight to fifteen\n").unwrap();
        assert_eq!(deal(&system, "0-15", 2), None);
    }

    #[test]
    fn no_core_is_dealt_twice_and_shares_of_like_nodes_leave_none_out() {
        for num_shards in 2..=32 {
            let system = machine(&["0-7,16-23", "8-15,24-31"], Some(16));
            let by_numa_node = by_numa_node(system.path(), &"0-31".parse().unwrap());
            let dealt = HostCores { available: 32, by_numa_node }.deal(num_shards).unwrap();
            assert_eq!(dealt.len(), num_shards);
            assert!(dealt.iter().all(|cores| !cores.is_empty()), "{num_shards}: {dealt:?}");
            let mut all: Vec<usize> = dealt.iter().flat_map(Cores::numbers).collect();
            all.sort_unstable();
            assert_eq!(all, (0..32).collect::<Vec<_>>(), "{num_shards}");
        }
    }
}
