//! The launchers of a model that is split over several hosts: how they find each other, start together and end together.
//!
//! Node 0 listens at the port behind `--master-port`; each other node comes there, says which shards it has and where they will
//! listen, and is told to start when all are there. Its connection stays: over it goes that all serve, that a node was asked to
//! end, and that all end; and where it breaks, or nothing comes for too long, a node is lost, and nothing can go on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep, timeout};
use tracing::{info, warn};

use crate::config::Span;

/// Between two signs of life on a connection, and how long none may come: a host that is switched off closes nothing.
const ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Between two tries to reach node 0, which may be started later.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// For a stranger at the port to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// For the last message to leave.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two lines about who is waited for.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// More than any message has.
const MESSAGE_BYTES_MAX: u64 = 4096;

/// Messages that wait to be sent; a node sends a few in its life.
const MESSAGES_MAX: usize = 8;

/// What launchers say to each other, a JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// To node 0: who comes.
    Hello(Hello),
    /// From node 0: all are there.
    Start,
    /// From node 0: this node cannot be one of the group.
    Refused(String),
    Alive,
    /// From node 0: all shards are warmed up, and requests are answered.
    Serving,
    /// To node 0: this node was asked to end.
    Leaving,
    /// From node 0: no request is left, and all end.
    Stop,
    /// Something died.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Hello {
    version: String,
    node_rank: usize,
    num_nodes: usize,
    num_shard: usize,
    shard_port: u16,
}

/// What happens on the other nodes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NodeEvent {
    /// Requests are answered.
    Serving,
    /// A node was asked to end.
    Leaving(String),
    /// All are to end.
    Stop,
    /// A node is not there any more, or has failed.
    Lost(String),
}

/// The other nodes, connected: all of them to node 0, node 0 alone to the others.
pub(crate) struct Nodes {
    events: mpsc::Receiver<NodeEvent>,
    /// Keeps `events` open where there are no other nodes.
    _sender: mpsc::Sender<NodeEvent>,
    links: Vec<mpsc::Sender<Message>>,
    writers: JoinSet<()>,
    readers: JoinSet<()>,
    /// Where the shards of nodes 1, 2, ... listen, in order of rank; known to node 0.
    pub(crate) shard_addresses: Vec<SocketAddr>,
    /// The address of this host by which it reaches node 0; known to the others.
    pub(crate) own_address: Option<IpAddr>,
}

struct Link {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    peer: String,
}

impl Nodes {
    /// Where all shards are on one host.
    pub(crate) fn none() -> Self {
        let (sender, events) = mpsc::channel(1);
        Self {
            events,
            _sender: sender,
            links: Vec::new(),
            writers: JoinSet::new(),
            readers: JoinSet::new(),
            shard_addresses: Vec::new(),
            own_address: None,
        }
    }

    /// Meets the others, and returns when all are there.
    pub(crate) async fn meet(span: &Span) -> anyhow::Result<Self> {
        if span.num_nodes == 1 {
            return Ok(Self::none());
        }
        if span.node_rank == 0 { gather(span).await } else { join(span).await }
    }

    fn of(links: Vec<Link>) -> Self {
        let (sender, events) = mpsc::channel(MESSAGES_MAX * links.len());
        let mut this = Self { events, _sender: sender.clone(), ..Self::none() };
        for Link { reader, writer, peer } in links {
            let (messages, to_send) = mpsc::channel(MESSAGES_MAX);
            this.links.push(messages);
            this.writers.spawn(write_all(writer, to_send));
            this.readers.spawn(read_all(reader, peer, sender.clone(), SILENCE_MAX));
        }
        this
    }

    /// The next event. Cancel-safe.
    pub(crate) async fn next(&mut self) -> NodeEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// Tells the other nodes that all serve.
    pub(crate) fn tell_serving(&self) {
        self.tell(&Message::Serving);
    }

    /// Tells node 0 that this node was asked to end.
    pub(crate) fn tell_leaving(&self) {
        self.tell(&Message::Leaving);
    }

    /// Tells the other nodes to end.
    pub(crate) fn tell_stop(&self) {
        self.tell(&Message::Stop);
    }

    /// Tells the other nodes that something here has died.
    pub(crate) fn tell_failed(&self) {
        self.tell(&Message::Failed);
    }

    fn tell(&self, message: &Message) {
        for link in &self.links {
            // A link that is full or closed is one that will be told lost.
            let _ = link.try_send(message.clone());
        }
    }

    /// Closes the connections when all that was told has left.
    pub(crate) async fn part(mut self) {
        self.links.clear();
        let all_written = async { while self.writers.join_next().await.is_some() {} };
        let _ = timeout(FAREWELL_TIMEOUT, all_written).await;
    }
}

/// Node 0: waits for all others.
async fn gather(span: &Span) -> anyhow::Result<Nodes> {
    let port = span.launcher_port();
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => listener,
        // Where there is no IPv6.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await.with_context(|| {
            format!("node 0 cannot listen at port {port}, the one behind --master-port: choose another")
        })?,
    };
    let mut found: Vec<Option<(Link, SocketAddr)>> = (1..span.num_nodes).map(|_| None).collect();
    let mut greetings = JoinSet::new();
    let start = Instant::now() + PROGRESS_INTERVAL;
    let mut progress = interval_at(start, PROGRESS_INTERVAL);
    info!(num_nodes = span.num_nodes, port, "waiting for the other nodes");
    while found.iter().any(Option::is_none) {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.with_context(|| format!("accepting nodes at port {port}"))?;
                greetings.spawn(greet(stream, span.clone()));
            }
            Some(greeted) = greetings.join_next() => {
                if let Ok(Some((node_rank, link, shards))) = greeted {
                    info!("{} is there", link.peer);
                    if let Some((before, _)) = found[node_rank - 1].replace((link, shards)) {
                        warn!("{} came twice: the first one is let go", before.peer);
                    }
                }
            }
            _ = progress.tick() => {
                let missing = (1..).zip(&found).filter(|(_, link)| link.is_none()).map(|(rank, _)| rank);
                let missing: Vec<usize> = missing.collect();
                info!("waiting for nodes {missing:?}: each is started with --node-rank, and reaches this host at port {port}");
            }
        }
    }
    let (mut links, mut shard_addresses) = (Vec::new(), Vec::new());
    for (mut link, first) in found.into_iter().flatten() {
        send(&mut link.writer, &Message::Start)
            .await
            .with_context(|| format!("{} has gone before all were there", link.peer))?;
        let ports = (0..span.shards_per_node()).map(|index| first.port() + index as u16);
        shard_addresses.extend(ports.map(|port| SocketAddr::new(first.ip(), port)));
        links.push(link);
    }
    Ok(Nodes { shard_addresses, ..Nodes::of(links) })
}

/// Who is it? A stranger is let go; a node that cannot be one of the group is told why.
async fn greet(stream: TcpStream, span: Span) -> Option<(usize, Link, SocketAddr)> {
    let address = stream.peer_addr().ok()?.ip().to_canonical();
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let message = timeout(GREETING_TIMEOUT, receive(&mut reader)).await.ok()??;
    let Message::Hello(hello) = message else { return None };
    if let Err(reason) = check(&hello, &span) {
        warn!("a node at {address} is refused: {reason}");
        let _ = send(&mut writer, &Message::Refused(reason)).await;
        return None;
    }
    let peer = format!("node {} at {address}", hello.node_rank);
    Some((hello.node_rank, Link { reader, writer, peer }, SocketAddr::new(address, hello.shard_port)))
}

fn check(hello: &Hello, span: &Span) -> Result<(), String> {
    let Hello { version, node_rank, num_nodes, num_shard, shard_port } = hello;
    let own_version = env!("CARGO_PKG_VERSION");
    if version != own_version {
        return Err(format!("it runs version {version}, node 0 {own_version}: run the same on all nodes"));
    }
    if (*num_nodes, *num_shard) != (span.num_nodes, span.num_shard) {
        return Err(format!(
            "it was started with --num-nodes {num_nodes} and --num-shard {num_shard}, node 0 with {} and {}: give all nodes \
             the same",
            span.num_nodes, span.num_shard
        ));
    }
    if !(1..*num_nodes).contains(node_rank) {
        return Err(format!("its --node-rank is {node_rank}, and node 0 waits for 1 to {}", num_nodes - 1));
    }
    if usize::from(*shard_port) + span.shards_per_node() > usize::from(u16::MAX) + 1 {
        return Err(format!(
            "there are not {} ports from its --shard-port {shard_port} on",
            span.shards_per_node()
        ));
    }
    Ok(())
}

/// Another node: reaches node 0, again and again while it is not there, and waits for the others.
async fn join(span: &Span) -> anyhow::Result<Nodes> {
    let (host, port) = (span.master_addr.as_deref().unwrap_or("localhost"), span.launcher_port());
    let stream = reach(host, port).await;
    let own_address = stream.local_addr().context("the address of this host")?.ip().to_canonical();
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let peer = format!("node 0 at {host}");
    let hello = Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node_rank: span.node_rank,
        num_nodes: span.num_nodes,
        num_shard: span.num_shard,
        shard_port: span.shard_port,
    };
    send(&mut writer, &Message::Hello(hello)).await.with_context(|| format!("{peer} has gone"))?;
    info!("{peer} is there; waiting for the others");
    match receive(&mut reader).await {
        Some(Message::Start) => {}
        Some(Message::Refused(reason)) => bail!("{peer} refuses this node: {reason}"),
        _ => bail!(
            "{peer} has gone before all nodes were there, or another came with --node-rank {}: see its log",
            span.node_rank
        ),
    }
    Ok(Nodes { own_address: Some(own_address), ..Nodes::of(vec![Link { reader, writer, peer }]) })
}

async fn reach(host: &str, port: u16) -> TcpStream {
    let mut told = Instant::now();
    loop {
        match TcpStream::connect((host, port)).await {
            Ok(stream) => return stream,
            Err(error) if told.elapsed() >= PROGRESS_INTERVAL => {
                told = Instant::now();
                info!(%error, "waiting for node 0 at {host}, port {port} (--master-addr; the port behind --master-port)");
            }
            Err(_) => {}
        }
        sleep(RETRY_INTERVAL).await;
    }
}

async fn write_all(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<Message>) {
    let mut alive = interval(ALIVE_INTERVAL);
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = messages.recv() => match message {
                Some(message) => message,
                None => break,
            },
            _ = alive.tick() => Message::Alive,
        };
        // The reader finds out as well, and says so.
        if send(&mut writer, &message).await.is_err() {
            return;
        }
    }
    let _ = writer.shutdown().await;
}

/// Until the link ends, which is told.
async fn read_all(
    mut reader: BufReader<OwnedReadHalf>,
    peer: String,
    events: mpsc::Sender<NodeEvent>,
    silence_max: Duration,
) {
    loop {
        let event = match timeout(silence_max, receive(&mut reader)).await {
            Ok(Some(Message::Alive)) => continue,
            Ok(Some(Message::Serving)) => NodeEvent::Serving,
            Ok(Some(Message::Leaving)) => NodeEvent::Leaving(peer.clone()),
            Ok(Some(Message::Stop)) => NodeEvent::Stop,
            Ok(Some(Message::Failed)) => NodeEvent::Lost(format!("{peer} has failed: see its log")),
            Ok(Some(message)) => NodeEvent::Lost(format!("{peer} says {message:?} out of turn")),
            Ok(None) => NodeEvent::Lost(format!("{peer} is gone: see its log")),
            Err(_) => {
                NodeEvent::Lost(format!("{peer} has been silent for {silence_max:?}: is its host running?"))
            }
        };
        let is_last = matches!(event, NodeEvent::Stop | NodeEvent::Lost(_));
        if events.send(event).await.is_err() || is_last {
            return;
        }
    }
}

async fn send(writer: &mut OwnedWriteHalf, message: &Message) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

/// None where the connection has ended, or what came is no message.
async fn receive(reader: &mut BufReader<OwnedReadHalf>) -> Option<Message> {
    let mut line = Vec::new();
    reader.take(MESSAGE_BYTES_MAX).read_until(b'\n', &mut line).await.ok()?;
    serde_json::from_slice(&line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(node_rank: usize, master_port: u16) -> Span {
        Span {
            num_nodes: 3,
            node_rank,
            num_shard: 6,
            master_addr: Some("127.0.0.1".to_owned()),
            master_port,
            shard_port: 29_600 + 10 * node_rank as u16,
        }
    }

    /// A port whose next one is free too, as far as one can know.
    async fn free_port() -> u16 {
        loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).await.is_ok() {
                return port;
            }
        }
    }

    async fn all(port: u16) -> [Nodes; 3] {
        let [first, second, third] = [span(0, port), span(1, port), span(2, port)];
        // Out of order, and node 0 last.
        let (third, second, first) = tokio::join!(Nodes::meet(&third), Nodes::meet(&second), async {
            sleep(RETRY_INTERVAL / 4).await;
            Nodes::meet(&first).await
        });
        [first.unwrap(), second.unwrap(), third.unwrap()]
    }

    #[tokio::test]
    async fn nodes_meet_in_any_order_and_node_0_learns_where_all_shards_listen() {
        let [first, second, third] = all(free_port().await).await;
        let ports: Vec<String> = first.shard_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["127.0.0.1:29610", "127.0.0.1:29611", "127.0.0.1:29620", "127.0.0.1:29621"]);
        assert_eq!(second.own_address, Some(IpAddr::from([127, 0, 0, 1])));
        assert!(third.shard_addresses.is_empty());
    }

    #[tokio::test]
    async fn what_one_tells_the_others_hear_and_the_end_of_one_is_an_event() {
        let [mut first, mut second, mut third] = all(free_port().await).await;
        first.tell_serving();
        for node in [&mut second, &mut third] {
            assert_eq!(node.next().await, NodeEvent::Serving);
        }
        second.tell_leaving();
        assert_eq!(first.next().await, NodeEvent::Leaving("node 1 at 127.0.0.1".to_owned()));
        drop(third);
        assert_eq!(
            first.next().await,
            NodeEvent::Lost("node 2 at 127.0.0.1 is gone: see its log".to_owned())
        );
        first.tell_stop();
        first.part().await;
        assert_eq!(second.next().await, NodeEvent::Stop);
    }

    #[tokio::test]
    async fn a_host_that_says_nothing_any_more_is_lost() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mut silent, accepted) =
            tokio::try_join!(TcpStream::connect(address), listener.accept()).unwrap();
        let reader = BufReader::new(accepted.0.into_split().0);
        let (sender, mut events) = mpsc::channel(2);
        silent.write_all(b"\"alive\"\n\"serving\"\n").await.unwrap();
        read_all(reader, "node 0 at host0".to_owned(), sender, Duration::from_millis(40)).await;
        assert_eq!(events.recv().await, Some(NodeEvent::Serving));
        let lost = "node 0 at host0 has been silent for 40ms: is its host running?".to_owned();
        assert_eq!(events.recv().await, Some(NodeEvent::Lost(lost)));
        drop(silent);
    }

    #[tokio::test]
    async fn a_node_that_was_started_for_another_group_is_refused_with_the_reason() {
        let port = free_port().await;
        let first = span(0, port);
        let gathering = tokio::spawn(async move { Nodes::meet(&first).await });
        let refused = async |span: Span| Nodes::meet(&span).await.err().expect("refused").to_string();
        let message = refused(Span { num_shard: 3, ..span(1, port) }).await;
        assert!(message.contains("--num-shard 3, node 0 with 3 and 6"), "{message}");
        let message = refused(Span { shard_port: u16::MAX, ..span(1, port) }).await;
        assert!(message.contains("not 2 ports from its --shard-port 65535"), "{message}");
        gathering.abort();
    }
}
