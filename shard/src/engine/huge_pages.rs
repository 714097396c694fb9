//! Weights that are used as they lie in files move to huge pages, beside serving.

use std::time::Instant;

use super::memory;
use crate::weights::MappedWeights;

/// Share of the available memory that weights and keys and values may take together where weights are moved; the rest is for
/// others, and for the page cache, which keeps the files.
const MEMORY_SHARE: f64 = 0.8;

/// Begins to move weights, on a thread of its own, where huge pages are to be had and memory suffices for `world_size` ranks like
/// this one, each with a KV cache of so many bytes.
pub(super) fn begin_to_move(mapped: MappedWeights, kv_cache_bytes: u64, world_size: usize) {
    let bytes = mapped.size_in_bytes();
    if bytes == 0 || !kernels::mmap::can_move_to_huge_pages() {
        return;
    }
    if !fits(bytes + kv_cache_bytes, world_size, memory::available_bytes()) {
        tracing::debug!(
            bytes,
            "weights stay in the files' pages: there is no memory for copies in huge pages"
        );
        return;
    }
    let run = move || {
        let started = Instant::now();
        match mapped.move_to_huge_pages() {
            Ok(0) => {}
            Ok(bytes) => {
                let (mib, seconds) = (bytes >> 20, started.elapsed().as_secs_f64());
                tracing::info!(mib, seconds, "weights moved to huge pages");
            }
            Err(error) => tracing::warn!(%error, "weights stay in the files' pages, in part"),
        }
    };
    // Where the system refuses a thread, nothing is moved.
    if let Err(error) = std::thread::Builder::new().name("huge-pages".to_owned()).spawn(run) {
        tracing::warn!(%error, "weights stay in the files' pages");
    }
}

fn fits(bytes_per_rank: u64, world_size: usize, available_bytes: Option<u64>) -> bool {
    let wanted = bytes_per_rank as f64 * world_size as f64;
    available_bytes.is_some_and(|available| wanted <= available as f64 * MEMORY_SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_moved_only_where_all_ranks_memory_suffices() {
        assert!(fits(40, 1, Some(50)));
        assert!(!fits(41, 1, Some(50)));
        assert!(!fits(40, 2, Some(99)));
        assert!(fits(40, 2, Some(100)));
        assert!(!fits(1, 1, None), "where the system does not tell, nothing is taken");
    }
}
