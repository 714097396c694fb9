//! The loop that owns the scheduler: wait for something to happen, apply it, send what is to be computed next.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};

use super::event::Event;
use super::handle::Status;
use super::request::Failure;
use super::state::Scheduler;
use crate::metrics::{self, Stage};
use crate::shards::ShardGroup;

/// Runs until all handles and streams are dropped.
pub(crate) async fn run(
    mut scheduler: Scheduler,
    mut events: mpsc::UnboundedReceiver<Event>,
    mut shards: ShardGroup,
    status: Arc<watch::Sender<Status>>,
) {
    // Whatever ends this task, a panic included, the door must not stay open.
    let _closed = FailOnDrop(Arc::clone(&status));
    loop {
        // Shards that have failed have nothing more to say.
        let serving = scheduler.failure().is_none().then_some(&mut shards);
        let Some(event) = select(&mut events, serving, scheduler.next_deadline()).await else { return };
        let now = Instant::now();
        let answered = matches!(event, Event::StepDone(_));
        Stage::Apply.time(|| scheduler.apply(event, now));
        // All that happened meanwhile, so that requests that come together are planned together.
        while let Ok(event) = events.try_recv() {
            scheduler.apply(event, now);
        }
        send_steps(&mut scheduler, &mut shards, now);
        if answered {
            metrics::record_scheduling(now.elapsed());
        }
        Stage::Wake.time(|| scheduler.wake_readers());
        if answered {
            metrics::record_router_step();
        }
        if scheduler.is_idle() {
            metrics::record_idle();
        }
        metrics::set_scheduler_gauges(&scheduler.gauges());
        report_failure(&scheduler, &status);
    }
}

/// The next thing that happens; nothing when there is nobody left to whom something can happen. Cancel-safe.
async fn select(
    events: &mut mpsc::UnboundedReceiver<Event>,
    shards: Option<&mut ShardGroup>,
    deadline: Option<Instant>,
) -> Option<Event> {
    let Some(shards) = shards else { return events.recv().await };
    tokio::select! {
        event = events.recv() => event,
        answer = shards.next_answer() => Some(match answer {
            Ok(answer) => Event::StepDone(answer),
            Err(error) => Event::ShardsFailed(error.to_string()),
        }),
        () = until(deadline) => Some(Event::Tick),
    }
}

/// Resolves at the deadline; never without one.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn send_steps(scheduler: &mut Scheduler, shards: &mut ShardGroup, now: Instant) {
    while let Some(step) = Stage::Plan.time(|| scheduler.next_step(now)) {
        tracing::trace!(
            step = step.id,
            admitted = step.admit.len(),
            scheduled = step.schedule.len(),
            released = step.release.len(),
            "step"
        );
        if let Err(error) = shards.submit(&step) {
            scheduler.apply(Event::ShardsFailed(error.to_string()), now);
        }
    }
}

fn report_failure(scheduler: &Scheduler, status: &watch::Sender<Status>) {
    let Some(Failure::Shards(reason)) = scheduler.failure() else { return };
    let first = status.send_if_modified(|status| {
        let first = !matches!(status, Status::Failed(_));
        if first {
            *status = Status::Failed(reason.clone());
        }
        first
    });
    if first {
        tracing::error!(%reason, "the shards failed: all requests are ended, and no new ones are taken");
    }
}

struct FailOnDrop(Arc<watch::Sender<Status>>);

impl Drop for FailOnDrop {
    fn drop(&mut self) {
        self.0.send_if_modified(|status| {
            let running = !matches!(status, Status::Failed(_));
            if running {
                *status = Status::Failed("the scheduler stopped; see the server's log".to_owned());
            }
            running
        });
    }
}
