//! What a step costs on machines of several kinds: straight lines through what is published or was measured.

use std::time::Duration;

use router::scheduler::simulation::Work;

/// A machine with a model on it. Times in microseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    /// Reading the weights, launching kernels, a round trip to the router.
    base: f64,
    /// A decode row: its part of the matrix products, and sampling.
    decode_row: f64,
    /// A key and value that a decode row reads.
    decode_kv_token: f64,
    /// A prompt token in the matrix products.
    prefill_token: f64,
    /// A prompt token that attends to another one.
    prefill_pair: f64,
    /// Tokens of KV cache.
    pub(crate) kv_cache_tokens: usize,
    pub(crate) max_prefill_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) steps_in_flight: usize,
}

/// 8 G parameters in bf16 on 4.8 TB/s and 990 TFLOP/s, of which four fifths and a half are reached; 128 KiB of keys and
/// values a token.
pub(crate) const H200_8B: Machine = Machine {
    name: "H200-like, 8B in bf16",
    base: 5000.0,
    decode_row: 8.0,
    decode_kv_token: 0.034,
    prefill_token: 32.0,
    prefill_pair: 0.001,
    kv_cache_tokens: 800_000,
    max_prefill_tokens: 4096,
    max_sequences: 256,
    steps_in_flight: 2,
};

/// The same model on 300 GB/s and 120 TFLOP/s, with 4 GiB left for the cache: a machine that is short of memory.
pub(crate) const L4_8B: Machine = Machine {
    name: "L4-like, 8B in bf16, short of memory",
    base: 55_000.0,
    decode_row: 60.0,
    decode_kv_token: 0.5,
    prefill_token: 270.0,
    prefill_pair: 0.008,
    kv_cache_tokens: 32_000,
    max_prefill_tokens: 1024,
    max_sequences: 128,
    steps_in_flight: 2,
};

/// What `make bench-serving` measured for the shape of SmolLM2-135M on two cores.
pub(crate) const CPU_135M: Machine = Machine {
    name: "two CPU cores, 135M in bf16",
    base: 10_000.0,
    decode_row: 700.0,
    decode_kv_token: 1.5,
    prefill_token: 1250.0,
    prefill_pair: 0.1,
    kv_cache_tokens: 64_000,
    max_prefill_tokens: 512,
    max_sequences: 64,
    steps_in_flight: 1,
};

impl Machine {
    /// How long a step takes.
    pub(crate) fn step_time(&self, work: &Work) -> Duration {
        if *work == Work::default() {
            // It only releases sequences.
            return Duration::from_micros(100);
        }
        let us = self.base
            + self.decode_row * work.decode_rows as f64
            + self.decode_kv_token * work.decode_kv_tokens as f64
            + self.prefill_token * work.prefill_tokens as f64
            + self.prefill_pair * work.prefill_pairs as f64;
        Duration::from_nanos((us * 1e3) as u64)
    }

    /// The parameters, for the report.
    pub(crate) fn describe(&self) -> String {
        format!(
            "{}: a step takes {} µs + {} µs a decode row + {} µs a token of its context + {} µs a prompt token + {} µs a \
             pair of prompt token and context token; {} tokens of cache, {} prompt tokens and {} sequences in a step, {} \
             in flight",
            self.name,
            self.base,
            self.decode_row,
            self.decode_kv_token,
            self.prefill_token,
            self.prefill_pair,
            self.kv_cache_tokens,
            self.max_prefill_tokens,
            self.max_sequences,
            self.steps_in_flight,
        )
    }
}
