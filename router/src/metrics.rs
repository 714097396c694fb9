//! Every metric's name, in one place, with what it means. Names that TGI has keep its name and meaning, so that its
//! dashboards go on working; the others begin with `lamplighter_`. Durations are in seconds.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{
    Counter, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Requests that wait for their first step, or for another one after a preemption.
pub(crate) const QUEUE_SIZE: &str = "tgi_queue_size";
/// Sequences computed in the last step.
pub(crate) const BATCH_CURRENT_SIZE: &str = "tgi_batch_current_size";
/// Steps sent to the shards, by `method`: `prefill` where a prompt's chunk is in it, else `decode`.
pub(crate) const BATCH_INFERENCE_COUNT: &str = "tgi_batch_inference_count";
/// Of these, answered.
pub(crate) const BATCH_INFERENCE_SUCCESS: &str = "tgi_batch_inference_success";
/// Of these, lost with the shards.
pub(crate) const BATCH_INFERENCE_FAILURE: &str = "tgi_batch_inference_failure";
/// From sending a step to its answer.
pub(crate) const BATCH_INFERENCE_DURATION: &str = "tgi_batch_inference_duration";
/// Of this, in the model.
pub(crate) const BATCH_FORWARD_DURATION: &str = "tgi_batch_forward_duration";
/// Of this, in choosing tokens.
pub(crate) const BATCH_SAMPLING_DURATION: &str = "lamplighter_batch_sampling_duration";
/// From an answer to the next step, in the router.
pub(crate) const BATCH_SCHEDULING_DURATION: &str = "lamplighter_batch_scheduling_duration";
/// Tokens computed in a step, by `kind`: `decode` rows and `prefill` chunks.
pub(crate) const BATCH_TOKENS: &str = "lamplighter_batch_tokens";
/// From submission to the first step.
pub(crate) const REQUEST_QUEUE_DURATION: &str = "tgi_request_queue_duration";
/// Sequences that hold KV blocks.
pub(crate) const RUNNING_SEQUENCES: &str = "lamplighter_running_sequences";
/// KV blocks held by sequences.
pub(crate) const KV_BLOCKS_USED: &str = "lamplighter_kv_blocks_used";
/// KV blocks that there are.
pub(crate) const KV_BLOCKS_TOTAL: &str = "lamplighter_kv_blocks_total";
/// Sequences that gave their blocks back to older ones and are computed again.
pub(crate) const PREEMPTIONS: &str = "lamplighter_preemptions";
/// Prompt tokens of the requests that were started.
pub(crate) const PROMPT_TOKENS: &str = "lamplighter_prompt_tokens";
/// Tokens given to readers.
pub(crate) const GENERATED_TOKENS: &str = "lamplighter_generated_tokens";

/// Of the prompt tokens, those whose keys and values came from the prefix cache.
pub(crate) const PREFIX_CACHE_HIT_TOKENS: &str = "lamplighter_prefix_cache_hit_tokens";
/// KV blocks that no sequence holds and whose content may be used again.
pub(crate) const KV_BLOCKS_CACHED: &str = "lamplighter_kv_blocks_cached";
/// Cached KV blocks that were given to other content.
pub(crate) const PREFIX_CACHE_EVICTIONS: &str = "lamplighter_prefix_cache_evicted_blocks";
/// Requests whose time was over, by `where`: `queue` (nothing was computed) or `running`.
pub(crate) const REQUEST_TIMEOUTS: &str = "lamplighter_request_timeouts";
/// Most prompt tokens of the next step, where `--target-itl-ms` sets it.
pub(crate) const PREFILL_BUDGET: &str = "lamplighter_prefill_budget_tokens";
/// The router's own work for a step, by `stage`; see [`Stage`].
pub(crate) const ROUTER_STEP_DURATION: &str = "lamplighter_router_step_duration";

/// From a request's grammar to one that is compiled, refused or known already.
pub(crate) const GRAMMAR_COMPILE_DURATION: &str = "lamplighter_grammar_compile_duration";
/// Computing the mask of one token, on average over a step's.
pub(crate) const GRAMMAR_MASK_DURATION: &str = "lamplighter_grammar_mask_duration";
/// What a step with masks waited for them: what the model's time did not hide.
pub(crate) const GRAMMAR_MASK_WAIT_DURATION: &str = "lamplighter_grammar_mask_wait_duration";

/// Tells the recorder what the scheduler's metrics mean. Call once it is installed.
pub(crate) fn describe_scheduler() {
    describe_gauge!(QUEUE_SIZE, "requests waiting for a step");
    describe_gauge!(BATCH_CURRENT_SIZE, "sequences in the last step");
    describe_counter!(
        BATCH_INFERENCE_COUNT,
        "steps sent to the shards, by method (prefill: with a prompt's chunk)"
    );
    describe_counter!(BATCH_INFERENCE_SUCCESS, "steps answered, by method");
    describe_counter!(BATCH_INFERENCE_FAILURE, "steps lost with the shards, by method");
    describe_histogram!(
        BATCH_INFERENCE_DURATION,
        Unit::Seconds,
        "from sending a step to its answer, by method"
    );
    describe_histogram!(BATCH_FORWARD_DURATION, Unit::Seconds, "time of a step in the model, by method");
    describe_histogram!(
        BATCH_SAMPLING_DURATION,
        Unit::Seconds,
        "time of a step in choosing tokens, by method"
    );
    describe_histogram!(
        BATCH_SCHEDULING_DURATION,
        Unit::Seconds,
        "from an answer to the next step, in the router"
    );
    describe_histogram!(BATCH_TOKENS, "tokens computed in a step, by kind");
    describe_histogram!(REQUEST_QUEUE_DURATION, Unit::Seconds, "from submission to the first step");
    describe_gauge!(RUNNING_SEQUENCES, "sequences that hold KV blocks");
    describe_gauge!(KV_BLOCKS_USED, "KV blocks held by sequences");
    describe_gauge!(KV_BLOCKS_TOTAL, "KV blocks that there are");
    describe_counter!(
        PREEMPTIONS,
        "sequences that gave their KV blocks back to older ones and are computed again"
    );
    describe_counter!(PROMPT_TOKENS, "prompt tokens of the requests that were started");
    describe_counter!(GENERATED_TOKENS, "tokens given to readers");
    describe_counter!(
        PREFIX_CACHE_HIT_TOKENS,
        "prompt tokens whose keys and values came from the prefix cache, not computed again"
    );
    describe_gauge!(KV_BLOCKS_CACHED, "KV blocks that no sequence holds and whose content may be used again");
    describe_counter!(PREFIX_CACHE_EVICTIONS, "cached KV blocks that were given to other content");
    describe_counter!(
        REQUEST_TIMEOUTS,
        "requests whose time was over, by where (queue: nothing was computed, running)"
    );
    describe_gauge!(PREFILL_BUDGET, "most prompt tokens of the next step, where --target-itl-ms sets it");
    describe_histogram!(
        ROUTER_STEP_DURATION,
        Unit::Seconds,
        "the router's own work for a step, by stage (plan, encode, decode, apply, wake, detokenize, sse)"
    );
    describe_histogram!(
        GRAMMAR_COMPILE_DURATION,
        Unit::Seconds,
        "from a request's grammar to one that is compiled, refused or known already"
    );
    describe_histogram!(
        GRAMMAR_MASK_DURATION,
        Unit::Seconds,
        "computing the mask of one token, on average over a step's"
    );
    describe_histogram!(
        GRAMMAR_MASK_WAIT_DURATION,
        Unit::Seconds,
        "what a step with masks waited for them, beyond the model's time"
    );
    // Counters exist from the start, so that a rate over them has a beginning.
    for name in
        [PREEMPTIONS, PROMPT_TOKENS, GENERATED_TOKENS, PREFIX_CACHE_HIT_TOKENS, PREFIX_CACHE_EVICTIONS]
    {
        counter!(name).increment(0);
    }
    for place in ["queue", "running"] {
        counter!(REQUEST_TIMEOUTS, "where" => place).increment(0);
    }
}

/// The scheduler's state after an event.
pub(crate) struct SchedulerGauges {
    /// Requests in the queue.
    pub(crate) queued: usize,
    /// Sequences that hold blocks.
    pub(crate) running: usize,
    /// Blocks that they hold.
    pub(crate) blocks_used: usize,
    /// Blocks that nobody holds, and may be used again.
    pub(crate) blocks_cached: usize,
    /// Blocks that there are.
    pub(crate) blocks_total: usize,
}

/// Sets the gauges of the scheduler.
pub(crate) fn set_scheduler_gauges(gauges: &SchedulerGauges) {
    gauge!(QUEUE_SIZE).set(gauges.queued as f64);
    gauge!(RUNNING_SEQUENCES).set(gauges.running as f64);
    gauge!(KV_BLOCKS_USED).set(gauges.blocks_used as f64);
    gauge!(KV_BLOCKS_CACHED).set(gauges.blocks_cached as f64);
    gauge!(KV_BLOCKS_TOTAL).set(gauges.blocks_total as f64);
}

/// What kind of work a step holds: the label `method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepMethod {
    /// A chunk of a prompt, and perhaps decode rows.
    Prefill,
    /// Decode rows only.
    Decode,
}

impl StepMethod {
    fn label(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// A step goes to the shards.
pub(crate) fn record_step_sent(
    method: StepMethod,
    sequences: usize,
    decode_tokens: usize,
    prefill_tokens: usize,
) {
    counter!(BATCH_INFERENCE_COUNT, "method" => method.label()).increment(1);
    gauge!(BATCH_CURRENT_SIZE).set(sequences as f64);
    if decode_tokens > 0 {
        histogram!(BATCH_TOKENS, "kind" => "decode").record(decode_tokens as f64);
    }
    if prefill_tokens > 0 {
        histogram!(BATCH_TOKENS, "kind" => "prefill").record(prefill_tokens as f64);
    }
}

/// The times of an answered step.
pub(crate) struct StepDurations {
    /// From sending to the answer.
    pub(crate) total: Duration,
    /// In the model.
    pub(crate) forward: Duration,
    /// In choosing tokens.
    pub(crate) sampling: Duration,
}

/// A step was answered.
pub(crate) fn record_step_done(method: StepMethod, durations: &StepDurations) {
    let method = method.label();
    counter!(BATCH_INFERENCE_SUCCESS, "method" => method).increment(1);
    histogram!(BATCH_INFERENCE_DURATION, "method" => method).record(durations.total);
    histogram!(BATCH_FORWARD_DURATION, "method" => method).record(durations.forward);
    histogram!(BATCH_SAMPLING_DURATION, "method" => method).record(durations.sampling);
}

/// Nothing is being computed.
pub(crate) fn record_idle() {
    gauge!(BATCH_CURRENT_SIZE).set(0.0);
}

/// A step was lost with the shards.
pub(crate) fn record_step_failed(method: StepMethod) {
    counter!(BATCH_INFERENCE_FAILURE, "method" => method.label()).increment(1);
}

/// Time in the router between an answer and the next step.
pub(crate) fn record_scheduling(duration: Duration) {
    histogram!(BATCH_SCHEDULING_DURATION).record(duration);
}

/// A request left the queue for the first time.
pub(crate) fn record_request_started(queue_time: Duration, prompt_tokens: usize) {
    histogram!(REQUEST_QUEUE_DURATION).record(queue_time);
    counter!(PROMPT_TOKENS).increment(prompt_tokens as u64);
}

/// Tokens were given to their reader.
pub(crate) fn record_generated_tokens(tokens: usize) {
    // Looked up once: this is called for each token.
    static COUNTER: LazyLock<Counter> = LazyLock::new(|| counter!(GENERATED_TOKENS));
    COUNTER.increment(tokens as u64);
}

/// A request began with so many tokens of its prompt from the prefix cache.
pub(crate) fn record_prefix_cache_hit(tokens: usize) {
    counter!(PREFIX_CACHE_HIT_TOKENS).increment(tokens as u64);
}

/// Cached blocks were given to other content.
pub(crate) fn record_prefix_cache_evictions(blocks: usize) {
    counter!(PREFIX_CACHE_EVICTIONS).increment(blocks as u64);
}

/// How many prompt tokens the next step may compute to hold the inter-token latency that is asked for.
pub(crate) fn set_prefill_budget(tokens: usize) {
    gauge!(PREFILL_BUDGET).set(tokens as f64);
}

/// A request's time was over before its first step.
pub(crate) fn record_queue_timeout() {
    counter!(REQUEST_TIMEOUTS, "where" => "queue").increment(1);
}

/// A request's time was over while it was running.
pub(crate) fn record_running_timeout() {
    counter!(REQUEST_TIMEOUTS, "where" => "running").increment(1);
}

/// A part of the router's own work for a step: the label `stage`.
///
/// The time is that of the clock: where other programs want the same core, it includes their turns. The work of
/// tokens is done by their connections' tasks, so it is summed up and recorded with the answer that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Choosing the rows of the next step.
    Plan,
    /// A step to its message and the message to bytes, for each rank.
    Encode,
    /// The bytes of an answer's message, of each rank, to an answer.
    Decode,
    /// What follows from an answer: sequences advance, tokens are put where their readers find them.
    Apply,
    /// Telling those readers, once the next step is on its way.
    Wake,
    /// Tokens to text, stop strings included.
    Detokenize,
    /// Text to frames of server-sent events.
    Sse,
}

impl Stage {
    const ALL: [Self; 7] =
        [Self::Plan, Self::Encode, Self::Decode, Self::Apply, Self::Wake, Self::Detokenize, Self::Sse];

    fn label(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Encode => "encode",
            Self::Decode => "decode",
            Self::Apply => "apply",
            Self::Wake => "wake",
            Self::Detokenize => "detokenize",
            Self::Sse => "sse",
        }
    }

    /// Adds what was done from `since` until now.
    pub(crate) fn done(self, since: Instant) {
        let nanos = since.elapsed().as_nanos() as u64;
        STAGE_NANOS[self as usize].fetch_add(nanos, Ordering::Relaxed);
    }

    /// Does `work`, and adds how long it took.
    pub(crate) fn time<T>(self, work: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        let result = work();
        self.done(since);
        result
    }
}

/// Work since the last step, by stage. Each only grows until it is taken, so no order between them is needed.
static STAGE_NANOS: [AtomicU64; Stage::ALL.len()] = [const { AtomicU64::new(0) }; Stage::ALL.len()];

/// Records the router's work since this was called last. To be called once for each answered step.
pub(crate) fn record_router_step() {
    static HISTOGRAMS: LazyLock<[Histogram; Stage::ALL.len()]> =
        LazyLock::new(|| Stage::ALL.map(|stage| histogram!(ROUTER_STEP_DURATION, "stage" => stage.label())));
    for (nanos, histogram) in STAGE_NANOS.iter().zip(&*HISTOGRAMS) {
        histogram.record(Duration::from_nanos(nanos.swap(0, Ordering::Relaxed)));
    }
}

/// A grammar was checked and compiled, or found where it had been.
pub(crate) fn record_grammar(duration: Duration) {
    histogram!(GRAMMAR_COMPILE_DURATION).record(duration);
}

/// Masks were applied in a step: what one took on average, and how long the step waited for them.
pub(crate) fn record_masks(mean: Duration, waiting: Duration) {
    histogram!(GRAMMAR_MASK_DURATION).record(mean);
    histogram!(GRAMMAR_MASK_WAIT_DURATION).record(waiting);
}

/// A sequence gave its blocks back.
pub(crate) fn record_preemption() {
    counter!(PREEMPTIONS).increment(1);
}

/// Generation requests received, refused ones included.
pub(crate) const REQUEST_COUNT: &str = "tgi_request_count";
/// Sequences that came to their end.
pub(crate) const REQUEST_SUCCESS: &str = "tgi_request_success";
/// Requests without a result, by `err`: `overloaded`, `validation`, `template`, `generation`, `out_of_memory`, `timeout`,
/// `unavailable`, `dropped` (the client went away).
pub(crate) const REQUEST_FAILURE: &str = "tgi_request_failure";
/// From a request's arrival to its sequence's end.
pub(crate) const REQUEST_DURATION: &str = "tgi_request_duration";
/// Of this, in checking, templating and tokenizing.
pub(crate) const REQUEST_VALIDATION_DURATION: &str = "tgi_request_validation_duration";
/// Of this, from the first step to the end.
pub(crate) const REQUEST_INFERENCE_DURATION: &str = "tgi_request_inference_duration";
/// The inference duration divided by the generated tokens.
pub(crate) const REQUEST_MEAN_TIME_PER_TOKEN: &str = "tgi_request_mean_time_per_token_duration";
/// Prompt tokens of a sequence.
pub(crate) const REQUEST_INPUT_LENGTH: &str = "tgi_request_input_length";
/// Generated tokens of a sequence.
pub(crate) const REQUEST_GENERATED_TOKENS: &str = "tgi_request_generated_tokens";
/// Most tokens that a sequence was allowed to generate.
pub(crate) const REQUEST_MAX_NEW_TOKENS: &str = "tgi_request_max_new_tokens";
/// From a request's arrival to its first token (TTFT).
pub(crate) const TIME_TO_FIRST_TOKEN: &str = "lamplighter_time_to_first_token_duration";
/// From a token to the next one (ITL), as the shards give them.
pub(crate) const INTER_TOKEN_LATENCY: &str = "lamplighter_inter_token_latency_duration";
/// Open HTTP connections.
pub(crate) const HTTP_CONNECTIONS: &str = "lamplighter_http_connections";

const FAILURES: [&str; 8] = [
    "overloaded",
    "validation",
    "template",
    "generation",
    "out_of_memory",
    "timeout",
    "unavailable",
    "dropped",
];

/// Installs the recorder that `/metrics` renders, with the buckets of each histogram. Once for a process.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    // TGI's: 0.15 ms to some 146 s, each half as long again as the one before.
    let durations: Vec<f64> = (0..35).map(|n| 1.5e-4 * 1.5f64.powi(n)).collect();
    // The router's share of a step and masks are far shorter: 1 us to some 66 ms.
    let router_durations: Vec<f64> = (0..17).map(|n| 1e-6 * f64::from(1u32 << n)).collect();
    let counts: Vec<f64> = (0..=20).map(|n| f64::from(1u32 << n)).collect();
    let handle = PrometheusBuilder::new()
        .set_buckets(&counts)?
        .set_buckets_for_metric(Matcher::Suffix("_duration".to_owned()), &durations)?
        .set_buckets_for_metric(Matcher::Full(ROUTER_STEP_DURATION.to_owned()), &router_durations)?
        .set_buckets_for_metric(Matcher::Full(GRAMMAR_MASK_DURATION.to_owned()), &router_durations)?
        .set_buckets_for_metric(Matcher::Full(GRAMMAR_MASK_WAIT_DURATION.to_owned()), &router_durations)?
        .install_recorder()?;
    describe_scheduler();
    describe_http();
    Ok(handle)
}

fn describe_http() {
    describe_counter!(REQUEST_COUNT, "generation requests received, refused ones included");
    describe_counter!(REQUEST_SUCCESS, "sequences that came to their end");
    describe_counter!(REQUEST_FAILURE, "requests without a result, by err (dropped: the client went away)");
    describe_histogram!(REQUEST_DURATION, Unit::Seconds, "from a request's arrival to its sequence's end");
    describe_histogram!(
        REQUEST_VALIDATION_DURATION,
        Unit::Seconds,
        "checking, templating and tokenizing a request"
    );
    describe_histogram!(REQUEST_INFERENCE_DURATION, Unit::Seconds, "from a sequence's first step to its end");
    describe_histogram!(REQUEST_MEAN_TIME_PER_TOKEN, Unit::Seconds, "inference duration by generated tokens");
    describe_histogram!(REQUEST_INPUT_LENGTH, "prompt tokens of a sequence");
    describe_histogram!(REQUEST_GENERATED_TOKENS, "generated tokens of a sequence");
    describe_histogram!(REQUEST_MAX_NEW_TOKENS, "most tokens that a sequence was allowed to generate");
    describe_histogram!(
        TIME_TO_FIRST_TOKEN,
        Unit::Seconds,
        "from a request's arrival to its first token (TTFT)"
    );
    describe_histogram!(INTER_TOKEN_LATENCY, Unit::Seconds, "from a sequence's token to its next one (ITL)");
    describe_gauge!(HTTP_CONNECTIONS, "open HTTP connections");
    for name in [REQUEST_COUNT, REQUEST_SUCCESS] {
        counter!(name).increment(0);
    }
    for err in FAILURES {
        counter!(REQUEST_FAILURE, "err" => err).increment(0);
    }
}

/// A generation request came in.
pub(crate) fn record_request() {
    counter!(REQUEST_COUNT).increment(1);
}

/// A request ended without a result; `err` is one of `FAILURES`.
pub(crate) fn record_request_failure(err: &'static str) {
    debug_assert!(FAILURES.contains(&err), "{err} is not one of the label's values");
    counter!(REQUEST_FAILURE, "err" => err).increment(1);
}

/// A request was checked, and found valid.
pub(crate) fn record_validation(duration: Duration) {
    histogram!(REQUEST_VALIDATION_DURATION).record(duration);
}

/// A sequence was submitted.
pub(crate) fn record_sequence_submitted(prompt_tokens: usize, max_new_tokens: u32) {
    histogram!(REQUEST_INPUT_LENGTH).record(prompt_tokens as f64);
    histogram!(REQUEST_MAX_NEW_TOKENS).record(f64::from(max_new_tokens));
}

/// What a sequence took.
pub(crate) struct SequenceDone {
    /// From the request's arrival.
    pub(crate) total: Duration,
    /// From the first step.
    pub(crate) inference: Duration,
    /// Tokens given.
    pub(crate) generated_tokens: u32,
}

/// A sequence came to its end.
pub(crate) fn record_sequence_done(done: &SequenceDone) {
    counter!(REQUEST_SUCCESS).increment(1);
    histogram!(REQUEST_DURATION).record(done.total);
    histogram!(REQUEST_INFERENCE_DURATION).record(done.inference);
    histogram!(REQUEST_GENERATED_TOKENS).record(f64::from(done.generated_tokens));
    histogram!(REQUEST_MEAN_TIME_PER_TOKEN).record(done.inference / done.generated_tokens.max(1));
}

/// A sequence's reader went away before its end.
pub(crate) fn record_sequence_dropped() {
    record_request_failure("dropped");
}

/// A sequence's first token, so long after the request's arrival.
pub(crate) fn record_first_token(since_arrival: Duration) {
    histogram!(TIME_TO_FIRST_TOKEN).record(since_arrival);
}

/// A sequence's next token, so long after the one before.
pub(crate) fn record_next_token(since_last: Duration) {
    // Looked up once: this is called for each token.
    static HISTOGRAM: LazyLock<Histogram> = LazyLock::new(|| histogram!(INTER_TOKEN_LATENCY));
    HISTOGRAM.record(since_last);
}

/// A client has connected.
pub(crate) fn record_connection_opened() {
    gauge!(HTTP_CONNECTIONS).increment(1.0);
}

/// A client's connection is over.
pub(crate) fn record_connection_closed() {
    gauge!(HTTP_CONNECTIONS).decrement(1.0);
}
