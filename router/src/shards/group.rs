//! Steps out to all ranks, answers of all ranks together.

use std::collections::VecDeque;
use std::time::Duration;

use proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::connect::{ShardError, rpc_error};
use super::{from_proto, to_proto};
use crate::metrics::Stage;
use crate::scheduler::{Step, StepAnswer};

/// All ranks, each with an open stream of steps. Dropping it ends the streams, and with them all sequences.
#[derive(Debug)]
pub(crate) struct ShardGroup {
    steps: Vec<mpsc::Sender<v1::StepRequest>>,
    answers: mpsc::Receiver<(usize, Result<v1::StepResponse, ShardError>)>,
    /// Steps that not all ranks have answered, oldest first.
    in_flight: VecDeque<InFlight>,
    step_deadline: Duration,
    vocab_size: usize,
    /// One task for each rank; they end with the group.
    _readers: JoinSet<()>,
}

/// A rank's stream of steps.
pub(super) struct Rank {
    pub(super) steps: mpsc::Sender<v1::StepRequest>,
    pub(super) responses: Streaming<v1::StepResponse>,
}

#[derive(Debug)]
struct InFlight {
    step: u64,
    /// When the ranks could begin with it.
    since: Instant,
    /// In order of rank.
    responses: Vec<Option<v1::StepResponse>>,
}

impl ShardGroup {
    pub(super) fn new(
        ranks: Vec<Rank>,
        steps_in_flight: usize,
        vocab_size: usize,
        step_deadline: Duration,
    ) -> Self {
        // Room for all that may be on the way and for the end of each stream: readers do not wait.
        let (answered, answers) = mpsc::channel(ranks.len() * (steps_in_flight + 1));
        let mut readers = JoinSet::new();
        let mut steps = Vec::with_capacity(ranks.len());
        for (rank, Rank { steps: sender, responses }) in ranks.into_iter().enumerate() {
            steps.push(sender);
            readers.spawn(read(rank, responses, answered.clone()));
        }
        Self { steps, answers, in_flight: VecDeque::new(), step_deadline, vocab_size, _readers: readers }
    }

    /// Sends a step to all ranks. Never waits: the scheduler keeps to the number of steps in flight.
    pub(crate) fn submit(&mut self, step: &Step) -> Result<(), ShardError> {
        let message = Stage::Encode.time(|| to_proto::step(step));
        for (rank, steps) in self.steps.iter().enumerate() {
            steps.try_send(message.clone()).map_err(|error| match error {
                mpsc::error::TrySendError::Closed(_) => ShardError::Ended { rank },
                mpsc::error::TrySendError::Full(_) => {
                    ShardError::Answer { rank, reason: "it answers steps that it has not taken".to_owned() }
                }
            })?;
        }
        let responses = vec![None; self.steps.len()];
        self.in_flight.push_back(InFlight { step: step.id, since: Instant::now(), responses });
        Ok(())
    }

    /// The answer to the oldest step in flight, once all ranks have given it; or what is wrong with a rank, also while
    /// no step is in flight. Cancel-safe.
    pub(crate) async fn next_answer(&mut self) -> Result<StepAnswer, ShardError> {
        loop {
            if let Some(answer) = self.take_complete()? {
                return Ok(answer);
            }
            let (rank, response) = self.receive().await?;
            self.put(rank, response?)?;
        }
    }

    /// A deadline that a test can wait for.
    #[cfg(test)]
    pub(super) fn set_step_deadline(&mut self, step_deadline: Duration) {
        self.step_deadline = step_deadline;
    }

    /// The oldest step, if all ranks have answered it.
    fn take_complete(&mut self) -> Result<Option<StepAnswer>, ShardError> {
        let Some(oldest) = self.in_flight.front_mut() else { return Ok(None) };
        if oldest.responses.iter().any(Option::is_none) {
            return Ok(None);
        }
        let mut responses = std::mem::take(&mut oldest.responses).into_iter().flatten();
        self.in_flight.pop_front();
        if let Some(next) = self.in_flight.front_mut() {
            next.since = Instant::now();
        }
        let Some(mut first) = responses.next() else { return Ok(None) };
        for other in responses {
            // The group is as slow as its slowest rank.
            first.forward_us = first.forward_us.max(other.forward_us);
            first.sample_us = first.sample_us.max(other.sample_us);
        }
        Stage::Decode
            .time(|| from_proto::step_answer(&first, self.vocab_size))
            .map(Some)
            .map_err(|error| ShardError::Answer { rank: 0, reason: error.to_string() })
    }

    /// The next message of any rank, within the deadline of the oldest step.
    async fn receive(&mut self) -> Result<(usize, Result<v1::StepResponse, ShardError>), ShardError> {
        let ended = ShardError::Ended { rank: 0 };
        let Some(oldest) = self.in_flight.front() else {
            return self.answers.recv().await.ok_or(ended);
        };
        match timeout_at(oldest.since + self.step_deadline, self.answers.recv()).await {
            Ok(message) => message.ok_or(ended),
            Err(_) => Err(ShardError::Deadline {
                rank: oldest.responses.iter().position(Option::is_none).unwrap_or_default(),
                method: "Run",
                seconds: self.step_deadline.as_secs(),
            }),
        }
    }

    /// Puts a rank's answer to the step that is its next.
    fn put(&mut self, rank: usize, response: v1::StepResponse) -> Result<(), ShardError> {
        let due = self.in_flight.iter_mut().find_map(|step| {
            let place = step.responses.get_mut(rank).filter(|place| place.is_none())?;
            Some((step.step, place))
        });
        match due {
            Some((step, place)) if step == response.step_id => {
                *place = Some(response);
                Ok(())
            }
            due => {
                let due = due
                    .map_or_else(|| "nothing was due".to_owned(), |(step, _)| format!("step {step} was due"));
                Err(ShardError::Answer {
                    rank,
                    reason: format!("it answered step {} where {due}", response.step_id),
                })
            }
        }
    }
}

/// Forwards what a rank says, up to the end of its stream.
async fn read(
    rank: usize,
    mut responses: Streaming<v1::StepResponse>,
    answered: mpsc::Sender<(usize, Result<v1::StepResponse, ShardError>)>,
) {
    loop {
        let message = match responses.message().await {
            Ok(Some(response)) => Ok(response),
            Ok(None) => Err(ShardError::Ended { rank }),
            Err(status) => Err(rpc_error(rank, "Run", &status)),
        };
        let last = message.is_err();
        if answered.send((rank, message)).await.is_err() || last {
            return;
        }
    }
}
