//! Tables.

use std::time::Duration;

use crate::virtual_time::{Latencies, Outcome, Policy};

/// Columns of a policy's line.
pub(crate) const HEADER: &str = "| load | scheduler | TTFT mean, ms | TTFT p50 | TTFT p99 | ITL p50, ms | ITL p99 | tokens/s | preempted | from the cache |\n\
     |---|---|---|---|---|---|---|---|---|---|";

/// Columns of a class's line.
pub(crate) const CLASS_HEADER: &str = "| who | scheduler | requests | TTFT mean, ms | TTFT p50 | TTFT p99 | ITL p50, ms | ITL p99 | done after, s |\n\
     |---|---|---|---|---|---|---|---|---|";

/// All requests of a trace.
pub(crate) fn line(load: &str, policy: Policy, outcome: &Outcome) -> String {
    let mut all = Latencies::default();
    for class in outcome.classes.values() {
        all.first_token.extend(&class.first_token);
        all.between_tokens.extend(&class.between_tokens);
        all.tokens += class.tokens;
    }
    format!(
        "| {load} | {} | {} | {} | {:.0} | {} | {:.1} % |",
        name(policy),
        first_token(&all),
        between_tokens(&all),
        all.tokens as f64 / outcome.elapsed.as_secs_f64(),
        outcome.preemptions,
        100.0 * outcome.cached_tokens as f64 / outcome.prompt_tokens.max(1) as f64,
    )
}

/// The requests of one class.
pub(crate) fn class_line(class: &str, policy: Policy, latencies: &Latencies) -> String {
    format!(
        "| {class} | {} | {} | {} | {} | {:.1} |",
        name(policy),
        latencies.first_token.len(),
        first_token(latencies),
        between_tokens(latencies),
        latencies.end.as_secs_f64(),
    )
}

fn name(policy: Policy) -> &'static str {
    match policy {
        Policy::FirstCome => "first come, first served",
        Policy::WithoutCache => "Lamplighter without its cache",
        Policy::Lamplighter => "Lamplighter",
    }
}

fn first_token(latencies: &Latencies) -> String {
    let times = sorted(&latencies.first_token);
    let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
    format!("{mean:.0} | {:.0} | {:.0}", quantile(&times, 0.5), quantile(&times, 0.99))
}

fn between_tokens(latencies: &Latencies) -> String {
    let times = sorted(&latencies.between_tokens);
    format!("{:.1} | {:.1}", quantile(&times, 0.5), quantile(&times, 0.99))
}

/// In milliseconds.
fn sorted(times: &[Duration]) -> Vec<f64> {
    let mut times = times.iter().map(|time| time.as_secs_f64() * 1e3).collect::<Vec<_>>();
    times.sort_by(f64::total_cmp);
    times
}

fn quantile(sorted: &[f64], quantile: f64) -> f64 {
    let index = (sorted.len() as f64 * quantile) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}
