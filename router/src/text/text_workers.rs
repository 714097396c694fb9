//! Templating and tokenizing long prompts takes milliseconds: it is done beside the threads that serve connections, by
//! a few workers at a time and with a bounded queue.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Two prompts at a time: more would take the cores from the shard on small machines.
const WORKERS: usize = 2;

/// Runs work on text, `WORKERS` pieces at a time.
#[derive(Clone)]
pub(crate) struct TextWorkers {
    places: Arc<Semaphore>,
    workers: Arc<Semaphore>,
}

/// Too many requests are waiting for their prompts to be tokenized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueFull;

impl TextWorkers {
    /// `max_waiting`: most pieces of work, waiting and running.
    pub(crate) fn new(max_waiting: usize) -> Self {
        let places = max_waiting.min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)), workers: Arc::new(Semaphore::new(WORKERS)) }
    }

    /// Runs `work`, which must not wait for anything. A panic in it goes on here.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, QueueFull> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| QueueFull)?;
        let worker = Arc::clone(&self.workers).acquire_owned().await.expect("the semaphore is never closed");
        let task = tokio::task::spawn_blocking(move || {
            // Held until the work is done, also when nobody waits for it any more.
            let _held = (place, worker);
            work()
        });
        match task.await {
            Ok(result) => Ok(result),
            // It is cancelled only when the process ends, and this with it.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_beyond_the_queue_is_refused_at_once() {
        let workers = TextWorkers::new(1);
        let (release, released) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let workers = workers.clone();
            async move { workers.run(move || released.recv().is_ok()).await }
        });
        while workers.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(workers.run(|| ()).await, Err(QueueFull));
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(workers.run(|| 7).await, Ok(7));
    }
}
