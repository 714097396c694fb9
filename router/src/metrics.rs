//! Every metric's name, in one place, with what it means. Names that TGI has keep its name and meaning, so that its
//! dashboards go on working; the others begin with `lamplighter_`. Durations are in seconds.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

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
    // Counters exist from the start, so that a rate over them has a beginning.
    for name in [PREEMPTIONS, PROMPT_TOKENS, GENERATED_TOKENS] {
        counter!(name).increment(0);
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
    /// Blocks that there are.
    pub(crate) blocks_total: usize,
}

/// Sets the gauges of the scheduler.
pub(crate) fn set_scheduler_gauges(gauges: &SchedulerGauges) {
    gauge!(QUEUE_SIZE).set(gauges.queued as f64);
    gauge!(RUNNING_SEQUENCES).set(gauges.running as f64);
    gauge!(KV_BLOCKS_USED).set(gauges.blocks_used as f64);
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

/// A token was given to its reader.
pub(crate) fn record_generated_token() {
    counter!(GENERATED_TOKENS).increment(1);
}

/// A sequence gave its blocks back.
pub(crate) fn record_preemption() {
    counter!(PREEMPTIONS).increment(1);
}
