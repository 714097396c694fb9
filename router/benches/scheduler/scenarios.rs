//! The traces that are played, and what is told of them.

use router::scheduler::Standing;

use crate::machine::{CPU_135M, H200_8B, L4_8B, Machine};
use crate::report;
use crate::trace::{self, Session};
use crate::virtual_time::{self, Policy};

const POLICIES: [Policy; 3] = [Policy::FirstCome, Policy::WithoutCache, Policy::Lamplighter];

/// Plays everything and prints it.
pub(crate) fn run() {
    println!("## In virtual time\n\n{}", trace::describe());
    loads(&H200_8B, &[4.0, 8.0, 12.0, 16.0], 60.0);
    loads(&L4_8B, &[0.2, 0.4, 0.6, 0.8], 300.0);
    loads(&CPU_135M, &[0.1, 0.2, 0.3, 0.4], 600.0);
    classes("Batch work beside conversations", &H200_8B, &batch_beside_chat());
    classes("One tenant floods, another one converses", &H200_8B, &two_tenants());
    classes("Long documents among conversations", &H200_8B, &long_documents());
}

/// Conversations at several loads.
fn loads(machine: &Machine, rates: &[f64], seconds: f64) {
    println!("\n### Conversations on: {}\n\n{}.\n\n{}", machine.name, machine.describe(), report::HEADER);
    for &rate in rates {
        let sessions = trace::chat(7, rate, seconds, "all", &Standing::default());
        for policy in POLICIES {
            let outcome = virtual_time::play(machine, &sessions, policy);
            let requests = sessions.iter().map(|session| session.turns.len()).sum::<usize>();
            let load = format!("{rate} conversations/s, {requests} requests");
            println!("{}", report::line(&load, policy, &outcome));
        }
    }
}

/// One trace, told by classes.
fn classes(title: &str, machine: &Machine, sessions: &[Session]) {
    println!("\n### {title}, on: {}\n\n{}", machine.name, report::CLASS_HEADER);
    let outcomes = POLICIES.map(|policy| (policy, virtual_time::play(machine, sessions, policy)));
    for class in outcomes[0].1.classes.keys() {
        for (policy, outcome) in &outcomes {
            println!("{}", report::class_line(class, *policy, &outcome.classes[class]));
        }
    }
}

/// People converse; after ten seconds somebody drops 2000 requests that nobody waits for.
fn batch_beside_chat() -> Vec<Session> {
    let standing = |priority| Standing { priority, ..Standing::default() };
    let interactive = standing(Standing::PRIORITY_INTERACTIVE);
    let mut sessions = trace::chat(11, 6.0, 60.0, "interactive", &interactive);
    sessions.extend(trace::flood(12, 2000, 10.0, "batch", &standing(Standing::PRIORITY_BATCH)));
    sessions
}

/// Two with the same rights: one of them sends 2000 requests at once.
fn two_tenants() -> Vec<Session> {
    let mut sessions = trace::chat(21, 6.0, 60.0, "converses", &trace::account("a"));
    sessions.extend(trace::flood(22, 2000, 10.0, "floods", &trace::account("b")));
    sessions
}

/// One request in thirty has some 12000 tokens.
fn long_documents() -> Vec<Session> {
    let mut sessions = trace::chat(31, 6.0, 60.0, "conversation", &Standing::default());
    sessions.extend(trace::documents(32, 0.5, 60.0, "document"));
    sessions
}
