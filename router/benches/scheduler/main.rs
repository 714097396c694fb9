//! How well requests are scheduled, and what the router itself costs:
//!
//! `make bench-scheduler` (or `make bench-scheduler ARGS="simulation queue router"`)
//!
//! - `simulation`: traces of conversations, played in virtual time against the scheduler's own state machine and a shard
//!   that only says how long a step takes; beside it the same trace strictly first come, first served, and with
//!   Lamplighter's order but no cache. The same figures in every run.
//! - `queue`: what a step, a submission and a cancellation cost the scheduler while thousands wait.
//! - `router`: a real router in its own process, a shard that answers without computing, and clients over HTTP; processor
//!   time is the router's alone.
#![expect(clippy::print_stdout, reason = "a benchmark's report")]

mod http_client;
mod machine;
mod null_shard;
mod processor_time;
mod queue_cost;
mod random;
mod report;
mod router_alone;
mod router_process;
mod scenarios;
mod trace;
mod virtual_time;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|role| role == router_process::ROLE) {
        return router_process::serve();
    }
    let wants = |part: &str| {
        let mut parts = arguments.iter().filter(|argument| !argument.starts_with("--")).peekable();
        parts.peek().is_none() || parts.any(|argument| argument == part)
    };
    if wants("simulation") {
        scenarios::run();
    }
    if wants("queue") {
        queue_cost::run();
    }
    if wants("router") {
        router_alone::run()?;
    }
    Ok(())
}
