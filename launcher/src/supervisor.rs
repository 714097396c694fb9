//! The one owner of the child processes: starts them in order, announces when all serve, and ends them in order.
//!
//! A loop over `select` (wait for the next event) and `apply` (act on it). Shards are started first and stopped last,
//! so that the router never lacks what it depends on. A child that dies takes the others with it: a tensor-parallel
//! group cannot go on without one rank, and the router cannot serve without shards.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};
use tracing::{error, info, warn};

use crate::config::Span;
use crate::nodes::{NodeEvent, Nodes};
use crate::output::Output;
use crate::process::{Exit, Process};
use crate::readiness::{self, Ready};

/// What the router is given beyond the time for its requests: to close connections and end.
const ROUTER_STOP_MARGIN: Duration = Duration::from_secs(5);

/// What the shards are given to end once the router is gone: they have no work left.
const SHARDS_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long deaths are collected before they are told. A process's sockets close before its end can be seen, so a router
/// that gives up because its shard crashed may be seen to end first; the cause is to be told with it.
const DEATHS_WINDOW: Duration = Duration::from_millis(500);

/// What the others are given once a child has died: nothing can be finished without it.
const FAILURE_STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two signs of life while a model loads.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// All processes of a launch.
pub(crate) struct Group {
    /// In order of rank.
    pub(crate) shards: Vec<Member>,
    /// Each shard's socket; it exists when the shard listens.
    pub(crate) sockets: Vec<PathBuf>,
    /// On node 0 only.
    pub(crate) router: Option<Member>,
    /// Where the router writes the address that it bound.
    pub(crate) address_file: PathBuf,
    /// What the router gives its running requests when it is asked to end.
    pub(crate) drain_timeout: Duration,
    /// The hosts, of which these are one's.
    pub(crate) span: Span,
}

/// A process that is to be started.
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) command: Command,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was asked to end, and all requests had their time.
    Stopped,
    /// A child died, or had to be killed.
    Failed,
}

/// SIGTERM and SIGINT, as they come.
pub(crate) fn termination_signals() -> std::io::Result<mpsc::Receiver<Signal>> {
    // The second one already means "at once"; a third has nothing to add.
    let (sender, receiver) = mpsc::channel(2);
    for (kind, name) in
        [(SignalKind::terminate(), Signal::SIGTERM), (SignalKind::interrupt(), Signal::SIGINT)]
    {
        let mut stream = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(
            async move { while stream.recv().await.is_some() && sender.send(name).await.is_ok() {} },
        );
    }
    Ok(receiver)
}

/// The owner of the child processes.
pub(crate) struct Supervisor {
    phase: Phase,
    outcome: Outcome,
    started: Instant,
    running: BTreeMap<String, Process>,
    router: Option<Member>,
    /// None where another node has it.
    router_name: Option<String>,
    span: Span,
    nodes: Nodes,
    address_file: PathBuf,
    drain_timeout: Duration,
    output: Output,
    exit_sender: mpsc::Sender<Exit>,
    exits: mpsc::Receiver<Exit>,
    signals: mpsc::Receiver<Signal>,
    progress: Interval,
}

enum Phase {
    /// Waiting for the shards, then for the router.
    Starting {
        waits_for: &'static str,
        step: Pin<Box<dyn Future<Output = Event>>>,
    },
    Serving,
    /// A child died; others may have died of the same cause.
    Dying {
        exits: Vec<Exit>,
        deadline: Instant,
    },
    /// The router finishes its requests, here or on node 0.
    Draining {
        deadline: Instant,
    },
    /// All that still run have been asked to end.
    Stopping {
        deadline: Instant,
    },
    /// All that still run have been killed.
    Killing,
}

enum Event {
    ShardsListen,
    RouterServes(Ready),
    StillStarting,
    Exited(Exit),
    AskedToStop(Signal),
    Elsewhere(NodeEvent),
    DeadlinePassed,
}

impl Supervisor {
    /// Starts the shards. Each of `signals` asks it to end. To be called within an async runtime, on the thread that
    /// [`Process::spawn`] asks for.
    pub(crate) fn start(
        group: Group,
        nodes: Nodes,
        signals: mpsc::Receiver<Signal>,
        output: Output,
    ) -> anyhow::Result<Self> {
        let Group { shards, sockets, router, address_file, drain_timeout, span } = group;
        let (exit_sender, exits) = mpsc::channel(shards.len() + 1);
        let started = Instant::now();
        let mut progress = interval_at(started + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let phase = if router.is_some() {
            Phase::Starting {
                waits_for: "the shards to load the model",
                step: Box::pin(async move {
                    readiness::shards_listen(&sockets).await;
                    Event::ShardsListen
                }),
            }
        } else {
            Phase::Starting { waits_for: "node 0 to serve", step: Box::pin(std::future::pending()) }
        };
        let mut supervisor = Self {
            phase,
            outcome: Outcome::Stopped,
            started,
            running: BTreeMap::new(),
            router_name: router.as_ref().map(|router| router.name.clone()),
            router,
            span,
            nodes,
            address_file,
            drain_timeout,
            output,
            exit_sender,
            exits,
            signals,
            progress,
        };
        info!(shards = shards.len(), "starting");
        for shard in shards {
            supervisor.spawn(shard)?;
        }
        Ok(supervisor)
    }

    /// Runs until no child is left.
    pub(crate) async fn run(mut self) -> anyhow::Result<Outcome> {
        while !self.running.is_empty() {
            let event = self.select().await;
            self.apply(event).await?;
        }
        self.report_deaths();
        match self.outcome {
            Outcome::Stopped => info!("stopped"),
            Outcome::Failed => error!("stopped after a failure"),
        }
        self.nodes.part().await;
        Ok(self.outcome)
    }

    async fn select(&mut self) -> Event {
        let Self { phase, exits, signals, progress, nodes, .. } = self;
        let (mut step, deadline) = match phase {
            Phase::Starting { step, .. } => (Some(step), None),
            Phase::Dying { deadline, .. } | Phase::Draining { deadline } | Phase::Stopping { deadline } => {
                (None, Some(*deadline))
            }
            Phase::Serving | Phase::Killing => (None, None),
        };
        let is_starting = step.is_some();
        let step = async {
            match step.as_mut() {
                Some(step) => step.await,
                None => std::future::pending().await,
            }
        };
        let deadline = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // A death is told before anything that follows from it.
            biased;
            Some(exit) = exits.recv() => Event::Exited(exit),
            Some(signal) = signals.recv() => Event::AskedToStop(signal),
            event = nodes.next() => Event::Elsewhere(event),
            event = step => event,
            () = deadline => Event::DeadlinePassed,
            _ = progress.tick(), if is_starting => Event::StillStarting,
        }
    }

    async fn apply(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::ShardsListen => self.start_router()?,
            Event::RouterServes(ready) => {
                self.phase = Phase::Serving;
                self.announce(&ready).await;
                self.nodes.tell_serving();
            }
            Event::Elsewhere(event) => self.elsewhere(event),
            Event::StillStarting => {
                if let Phase::Starting { waits_for, .. } = self.phase {
                    info!(seconds = self.started.elapsed().as_secs(), "waiting for {waits_for}");
                }
            }
            Event::Exited(exit) => self.one_exited(exit),
            Event::AskedToStop(signal) => self.stop(signal),
            Event::DeadlinePassed => match self.phase {
                Phase::Dying { .. } => {
                    self.report_deaths();
                    self.stop_all(FAILURE_STOP_TIMEOUT);
                }
                _ => self.kill("did not end in time and was killed"),
            },
        }
        Ok(())
    }

    /// What another node tells, or its end.
    fn elsewhere(&mut self, event: NodeEvent) {
        let is_underway =
            matches!(self.phase, Phase::Starting { .. } | Phase::Serving | Phase::Draining { .. });
        match event {
            NodeEvent::Serving => {
                if let Phase::Starting { .. } = self.phase {
                    self.phase = Phase::Serving;
                    self.announce_node();
                }
            }
            NodeEvent::Leaving(node) => {
                if let Phase::Starting { .. } | Phase::Serving = self.phase {
                    info!("{node} was asked to end, and nothing can go on without it");
                    self.stop(Signal::SIGTERM);
                }
            }
            NodeEvent::Stop if is_underway => self.stop_all(SHARDS_STOP_TIMEOUT),
            NodeEvent::Lost(message) if is_underway => {
                error!("{message}");
                self.begin_dying(Vec::new());
            }
            // All end here already.
            NodeEvent::Stop | NodeEvent::Lost(_) => {}
        }
    }

    fn start_router(&mut self) -> anyhow::Result<()> {
        let address_file = self.address_file.clone();
        self.phase = Phase::Starting {
            waits_for: "the router to be ready",
            step: Box::pin(async move { Event::RouterServes(readiness::router_serves(&address_file).await) }),
        };
        self.router.take().map_or(Ok(()), |router| self.spawn(router))
    }

    fn spawn(&mut self, member: Member) -> anyhow::Result<()> {
        let Member { name, command } = member;
        let process = Process::spawn(&name, command, self.output.clone(), self.exit_sender.clone())
            .with_context(|| format!("{name} cannot be started"))?;
        self.running.insert(name, process);
        Ok(())
    }

    fn one_exited(&mut self, exit: Exit) {
        self.running.remove(&exit.name);
        match &mut self.phase {
            Phase::Draining { .. } if Some(&exit.name) == self.router_name.as_ref() => {
                if !exit.status.success() {
                    self.outcome = Outcome::Failed;
                    warn!("{} ended with {} while it was finishing its requests", exit.name, exit.status);
                }
                self.stop_all(SHARDS_STOP_TIMEOUT);
            }
            Phase::Starting { .. } | Phase::Serving | Phase::Draining { .. } => self.begin_dying(vec![exit]),
            Phase::Dying { exits, .. } => exits.push(exit),
            Phase::Stopping { .. } | Phase::Killing => {}
        }
    }

    fn begin_dying(&mut self, exits: Vec<Exit>) {
        self.outcome = Outcome::Failed;
        self.phase = Phase::Dying { exits, deadline: Instant::now() + DEATHS_WINDOW };
        self.nodes.tell_failed();
    }

    /// Tells who died: shards before the router, which dies of theirs.
    fn report_deaths(&mut self) {
        if let Phase::Dying { exits, .. } = &mut self.phase {
            exits.sort_by_key(|exit| Some(&exit.name) == self.router_name.as_ref());
            exits.drain(..).for_each(|exit| report_death(&exit));
        }
    }

    fn stop(&mut self, signal: Signal) {
        match self.phase {
            Phase::Starting { .. } | Phase::Serving => {
                let router = self.router_name.as_ref().and_then(|name| self.running.get(name));
                if let Some(router) = router {
                    info!(seconds_max = self.drain_timeout.as_secs(), "{signal}: finishing running requests");
                    router.signal(Signal::SIGTERM);
                    let deadline = Instant::now() + self.drain_timeout + ROUTER_STOP_MARGIN;
                    self.phase = Phase::Draining { deadline };
                } else if self.router_name.is_none() && matches!(self.phase, Phase::Serving) {
                    let seconds_max = self.drain_timeout.as_secs();
                    info!(seconds_max, "{signal}: node 0 is finishing running requests");
                    self.nodes.tell_leaving();
                    // Its router and its shards have their time before it says that all end.
                    let deadline =
                        Instant::now() + self.drain_timeout + ROUTER_STOP_MARGIN + SHARDS_STOP_TIMEOUT;
                    self.phase = Phase::Draining { deadline };
                } else {
                    info!("{signal} before the start was complete");
                    if self.router_name.is_none() {
                        self.nodes.tell_leaving();
                    }
                    self.stop_all(SHARDS_STOP_TIMEOUT);
                }
            }
            Phase::Dying { .. } => {
                self.report_deaths();
                self.stop_all(FAILURE_STOP_TIMEOUT);
            }
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Killing => {
                self.kill("is killed at the second signal");
            }
        }
    }

    fn stop_all(&mut self, timeout: Duration) {
        if self.router_name.is_some() && self.outcome == Outcome::Stopped {
            self.nodes.tell_stop();
        }
        self.signal_all(Signal::SIGTERM);
        self.phase = Phase::Stopping { deadline: Instant::now() + timeout };
    }

    fn kill(&mut self, why: &str) {
        for name in self.running.keys() {
            warn!("{name} {why}");
        }
        self.outcome = Outcome::Failed;
        self.signal_all(Signal::SIGKILL);
        self.phase = Phase::Killing;
    }

    fn signal_all(&self, signal: Signal) {
        for process in self.running.values() {
            process.signal(signal);
        }
    }

    fn announce_node(&self) {
        let Span { num_nodes, node_rank, num_shard, master_addr, .. } = &self.span;
        let ranks = self.span.ranks();
        info!(
            "node {node_rank} of {num_nodes} serves, with shards {} to {} of {num_shard}; requests go to node 0 at {}",
            ranks.start,
            ranks.end.saturating_sub(1),
            master_addr.as_deref().unwrap_or_default()
        );
    }

    async fn announce(&self, ready: &Ready) {
        let Ready { address, info } = ready;
        let seconds = self.started.elapsed().as_secs_f32();
        let readiness::Info { model_id, model_dtype, model_device_type, .. } = info;
        let text = format!(
            r#"
Connected: Lamplighter serves {model_id} at http://{address} (started in {seconds:.1} s)
  model     {model_id}, {model_dtype} on {model_device_type}
  KV cache  {kv_tokens} tokens for all sequences together, {total_tokens} at most in one
  try it    curl http://{address}/v1/chat/completions -H 'Content-Type: application/json' \
              -d '{{"model":"{model_id}","messages":[{{"role":"user","content":"Tell me a story about a fox."}}],"stream":true}}'
"#,
            kv_tokens = info.max_batch_total_tokens,
            total_tokens = info.max_total_tokens,
        );
        let fields = json!({
            "level": "INFO",
            "message": "Connected",
            "url": format!("http://{address}"),
            "model_id": model_id,
            "model_dtype": model_dtype,
            "model_device_type": model_device_type,
            "max_batch_total_tokens": info.max_batch_total_tokens,
            "max_total_tokens": info.max_total_tokens,
            "start_time_s": seconds,
        });
        self.output.block(&text, &fields).await;
    }
}

fn report_death(exit: &Exit) {
    let Exit { name, status, last_lines } = exit;
    if last_lines.is_empty() {
        error!("{name} died ({status}) without a word");
    } else {
        error!("{name} died ({status}); its last lines:\n    {}", last_lines.join("\n    "));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::output::Recorded;

    const INFO: &str = r#"{"model_id":"tiny","model_dtype":"float32","model_device_type":"cpu",
                           "max_total_tokens":64,"max_batch_total_tokens":4096}"#;

    /// A launch of shell scripts. `$DIR` in them is a directory with the sockets and the router's address.
    struct Launch {
        shard: &'static str,
        router: &'static str,
        /// What is sent once all serve.
        signals: &'static [Signal],
        drain_timeout: Duration,
    }

    const WELL_BEHAVED: Launch = Launch {
        shard: "touch $DIR/shard-0; exec sleep 1000",
        router: "cp $DIR/listening $DIR/address; exec sleep 1000",
        signals: &[],
        drain_timeout: Duration::from_secs(30),
    };

    async fn launch(launch: Launch) -> (Outcome, String) {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        std::fs::write(directory.path().join("listening"), listener.local_addr().unwrap().to_string())
            .unwrap();
        tokio::spawn(answer_with_info(listener));
        let group = Group {
            shards: vec![member("shard-0", launch.shard, directory.path())],
            sockets: vec![directory.path().join("shard-0")],
            router: Some(member("router", launch.router, directory.path())),
            address_file: directory.path().join("address"),
            drain_timeout: launch.drain_timeout,
            span: Span {
                num_nodes: 1,
                node_rank: 0,
                num_shard: 1,
                master_addr: None,
                master_port: 29500,
                shard_port: 29600,
            },
        };
        let recorded = Recorded::default();
        let (output, writer) = Output::start(false, recorded.clone());
        let (sender, signals) = mpsc::channel(launch.signals.len().max(1));
        let supervisor = Supervisor::start(group, Nodes::none(), signals, output.clone()).unwrap();
        let until_served = recorded.clone();
        tokio::spawn(async move {
            while !until_served.text().contains("Connected") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            for &signal in launch.signals {
                sender.send(signal).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        let outcome = supervisor.run().await.unwrap();
        tokio::task::spawn_blocking(move || output.finish(writer)).await.unwrap();
        (outcome, recorded.text())
    }

    fn member(name: &str, script: &str, directory: &Path) -> Member {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).env("DIR", directory);
        Member { name: name.to_owned(), command }
    }

    async fn answer_with_info(listener: TcpListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n\r\n{INFO}").as_bytes()).await;
        }
    }

    #[tokio::test]
    async fn a_signal_ends_the_router_then_the_shards_and_is_a_success() {
        let router =
            "trap 'echo drained; exit 0' TERM; cp $DIR/listening $DIR/address; while :; do sleep 0.05; done";
        let shard = "trap 'echo released; exit 0' TERM; touch $DIR/shard-0; while :; do sleep 0.05; done";
        let (outcome, text) =
            launch(Launch { router, shard, signals: &[Signal::SIGTERM], ..WELL_BEHAVED }).await;
        assert_eq!(outcome, Outcome::Stopped, "{text}");
        let drained = text.find("router   | drained").unwrap();
        let released = text.find("shard-0  | released").unwrap();
        assert!(drained < released, "{text}");
    }

    #[tokio::test]
    async fn the_ready_block_is_printed_once_with_what_one_needs() {
        let (_, text) = launch(Launch { signals: &[Signal::SIGINT], ..WELL_BEHAVED }).await;
        assert_eq!(text.matches("Connected").count(), 1);
        assert!(text.contains("curl http://127.0.0.1:") && text.contains("4096 tokens"), "{text}");
    }

    #[tokio::test]
    async fn a_shard_that_dies_takes_the_others_with_it() {
        let shard = "touch $DIR/shard-0; while ! test -e $DIR/address; do sleep 0.02; done; exit 3";
        let (outcome, _) = launch(Launch { shard, ..WELL_BEHAVED }).await;
        assert_eq!(outcome, Outcome::Failed);
    }

    #[tokio::test]
    async fn a_shard_that_dies_before_it_listens_ends_the_start() {
        let (outcome, text) = launch(Launch { shard: "echo no such file; exit 1", ..WELL_BEHAVED }).await;
        assert_eq!(outcome, Outcome::Failed);
        assert!(text.contains("shard-0  | no such file"), "{text}");
    }

    #[tokio::test]
    async fn a_router_that_does_not_end_is_killed_at_the_second_signal() {
        let router = "trap '' TERM; cp $DIR/listening $DIR/address; while :; do sleep 0.05; done";
        let signals = &[Signal::SIGTERM, Signal::SIGTERM];
        let (outcome, _) = launch(Launch { router, signals, ..WELL_BEHAVED }).await;
        assert_eq!(outcome, Outcome::Failed);
    }
}
