//! How many KV blocks there are.

use kernels::MemoryUse;
use proto::v1::WarmupRequest;

use super::memory;
use crate::error::Error;

/// Share of the available memory that KV caches of all ranks take where the router does not say how much it wants: most
/// of a CPU's memory belongs to the page cache, which holds the weights, and to other programs.
const DEFAULT_MEMORY_SHARE: f64 = 0.25;

/// Of a GPU's memory that is left for what its driver and libraries take later.
const RESERVED_BYTES: usize = 512 << 20;
/// What a recorded step takes at most, of some hundred kernels.
const GRAPH_BYTES: usize = 4 << 20;

/// What the size of a KV cache follows from.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheNeeds {
    pub(super) block_size: usize,
    /// Of one token, on this rank.
    pub(super) bytes_per_token: usize,
    /// They share the memory.
    pub(super) world_size: usize,
}

impl CacheNeeds {
    /// Blocks of this rank's cache for a request that has been validated.
    pub(super) fn num_blocks(&self, request: &WarmupRequest) -> Result<usize, Error> {
        self.num_blocks_in(request, memory::available_bytes())
    }

    fn num_blocks_in(&self, request: &WarmupRequest, available_bytes: Option<u64>) -> Result<usize, Error> {
        // Where the system does not tell, nothing can be measured and only what is asked for is taken.
        let own_share = available_bytes.map(|bytes| bytes / self.world_size as u64);
        self.num_blocks_of(request, own_share, DEFAULT_MEMORY_SHARE)
    }

    /// The same on a GPU, whose memory belongs to this rank alone. `memory`: beside weights and workspace.
    pub(super) fn num_blocks_on_gpu(
        &self,
        request: &WarmupRequest,
        memory: MemoryUse,
        fraction: f64,
        num_graphs: usize,
    ) -> Result<usize, Error> {
        let reserve =
            RESERVED_BYTES.min(memory.free_bytes / 8) + num_graphs * GRAPH_BYTES.min(memory.free_bytes >> 10);
        let bytes = (memory.free_bytes.saturating_sub(reserve) as f64 * fraction) as u64;
        self.num_blocks_of(request, Some(bytes), 1.0)
    }

    /// `own_share`: bytes that this rank may take; `share`: how much of it where the router does not say what it wants.
    fn num_blocks_of(
        &self,
        request: &WarmupRequest,
        own_share: Option<u64>,
        share: f64,
    ) -> Result<usize, Error> {
        let block_bytes = (self.block_size * self.bytes_per_token) as u64;
        let blocks_per_sequence = u64::from(request.max_total_tokens).div_ceil(self.block_size as u64);
        let num_blocks = if let Some(tokens) = request.kv_cache_tokens {
            let wanted = tokens.div_ceil(self.block_size as u64);
            let fitting = own_share.map_or(u64::MAX, |bytes| bytes / block_bytes);
            if wanted > fitting {
                return Err(out_of_memory("kv_cache_tokens", tokens, wanted * block_bytes, own_share));
            }
            wanted
        } else {
            let useful = blocks_per_sequence * u64::from(request.max_step_sequences);
            let fitting = own_share.map_or(u64::MAX, |bytes| (bytes as f64 * share) as u64 / block_bytes);
            // Less than one sequence of `max_total_tokens` is for the router to judge: it may serve shorter ones.
            if fitting == 0 {
                return Err(Error::OutOfMemory(format!(
                    "not even one KV block of {} tokens ({} MiB) fits the memory given to this rank: give the process \
                     more memory, or stop what else uses it",
                    self.block_size,
                    block_bytes >> 20,
                )));
            }
            useful.min(fitting)
        };
        // Slots, block * block_size + place, are 32 bits wide.
        Ok(num_blocks.min(u64::from(u32::MAX) / self.block_size as u64) as usize)
    }
}

fn out_of_memory(field: &str, tokens: u64, needed_bytes: u64, given_bytes: Option<u64>) -> Error {
    let mib = |bytes: u64| bytes >> 20;
    Error::OutOfMemory(format!(
        "{field} is {tokens}, whose keys and values take {} MiB, but {} MiB of memory are to be had for this rank: \
         lower {field}, or give the process more memory",
        mib(needed_bytes),
        mib(given_bytes.unwrap_or(0)),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: CacheNeeds = CacheNeeds { block_size: 32, bytes_per_token: 1 << 10, world_size: 2 };
    const BLOCK_BYTES: u64 = 32 << 10;

    fn num_blocks(kv_cache_tokens: Option<u64>, available_bytes: Option<u64>) -> Result<usize, String> {
        let request = WarmupRequest {
            max_step_tokens: 64,
            max_step_sequences: 4,
            max_total_tokens: 100,
            kv_cache_tokens,
        };
        NEEDS.num_blocks_in(&request, available_bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn the_router_gets_the_tokens_it_wants_if_they_fit_beside_the_other_ranks() {
        assert_eq!(num_blocks(Some(1000), None), Ok(32));
        assert_eq!(num_blocks(Some(1024), Some(2 * 32 * BLOCK_BYTES)), Ok(32));
        let message = num_blocks(Some(1025), Some(2 * 32 * BLOCK_BYTES)).unwrap_err();
        assert!(message.starts_with("kv_cache_tokens is 1025"), "{message}");
    }

    #[test]
    fn without_a_wish_a_quarter_of_the_memory_is_shared_by_the_ranks() {
        assert_eq!(num_blocks(None, Some(2 * 4 * 10 * BLOCK_BYTES)), Ok(10));
        let message = num_blocks(None, Some(2 * 3 * BLOCK_BYTES)).unwrap_err();
        assert!(message.starts_with("not even one KV block of 32 tokens"), "{message}");
    }

    #[test]
    fn a_cache_smaller_than_one_full_sequence_is_given_and_left_to_the_router() {
        // A sequence of 100 tokens takes four blocks.
        assert_eq!(num_blocks(None, Some(2 * 4 * 3 * BLOCK_BYTES)), Ok(3));
    }

    #[test]
    fn a_gpus_cache_takes_the_fraction_of_what_is_free_beside_a_reserve() {
        let request = WarmupRequest {
            max_step_tokens: 64,
            max_step_sequences: 1 << 20,
            max_total_tokens: 100,
            kv_cache_tokens: None,
        };
        let memory = MemoryUse { free_bytes: 80 << 30, total_bytes: 96 << 30 };
        let blocks = |fraction, graphs| NEEDS.num_blocks_on_gpu(&request, memory, fraction, graphs).unwrap();
        let all = ((80 << 30) - (512 << 20)) / BLOCK_BYTES as usize;
        assert_eq!(blocks(1.0, 0), all);
        assert_eq!(blocks(0.5, 0), all / 2);
        assert_eq!(blocks(1.0, 36), all - (36 * (4 << 20)) / BLOCK_BYTES as usize);
    }

    #[test]
    fn no_more_is_taken_than_a_full_step_can_use() {
        // Four sequences of 100 tokens in blocks of 32.
        assert_eq!(num_blocks(None, Some(1 << 40)), Ok(16));
        assert_eq!(num_blocks(None, None), Ok(16));
    }
}
