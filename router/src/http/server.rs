//! Accepts connections and serves HTTP/1.1 on them.
//!
//! A loop of our own, because `axum::serve` waits forever for clients that send nothing or half a request: here the
//! number of connections and each wait for a client have a bound.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::metrics;

const PATIENCE: Patience = Patience { first_byte: Duration::from_secs(10), header: Duration::from_secs(30) };

/// Of a request's head; hyper answers more with 431.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Connections beside those of running requests: idle ones, probes, and clients that wait to be told 429.
const SPARE_CONNECTIONS: usize = 512;

/// After a failed `accept`, as when file descriptors have run out: closing connections give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound listener.
pub(crate) struct Server {
    listener: TcpListener,
    max_connections: usize,
    patience: Patience,
}

/// How long a client is waited for.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// From connecting to the first byte.
    first_byte: Duration,
    /// For a request's head; so long too may a connection be idle between two requests.
    header: Duration,
}

impl Server {
    /// Binds `address`. `max_requests`: requests that are served at once.
    pub(crate) async fn bind(address: SocketAddr, max_requests: usize) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let max_connections = max_requests.saturating_add(SPARE_CONNECTIONS).min(Semaphore::MAX_PERMITS);
        Ok(Self { listener, max_connections, patience: PATIENCE })
    }

    /// The address that was bound.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` is true; then finishes the answers that are under way, but takes no longer than `grace`.
    pub(crate) async fn serve(self, routes: Router, mut stop: watch::Receiver<bool>, grace: Duration) {
        let connections = Arc::new(Semaphore::new(self.max_connections));
        let graceful = GracefulShutdown::new();
        loop {
            // Taken before accepting: further clients wait in the listener's backlog.
            let permit = tokio::select! {
                permit = Arc::clone(&connections).acquire_owned() => permit.expect("the semaphore is never closed"),
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = Connection {
                stream,
                watcher: graceful.watcher(),
                stop: stop.clone(),
                patience: self.patience,
                _place: Place::new(permit),
            };
            tokio::spawn(connection.serve(routes.clone()));
        }
        drop(self.listener);
        if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
            tracing::warn!("closing connections whose clients have not read their answers");
        }
    }
}

/// One client.
struct Connection {
    stream: TcpStream,
    watcher: Watcher,
    stop: watch::Receiver<bool>,
    patience: Patience,
    /// Free again when the connection is over.
    _place: Place,
}

impl Connection {
    async fn serve(mut self, routes: Router) {
        // A token's frame should not wait for the next one.
        if self.stream.set_nodelay(true).is_err() || !self.has_begun().await {
            return;
        }
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.patience.header)
            .max_buf_size(MAX_HEADER_BYTES)
            .serve_connection(TokioIo::new(self.stream), TowerToHyperService::new(routes));
        if let Err(error) = self.watcher.watch(connection).await {
            // Clients go away all the time.
            tracing::debug!(%error, "a connection ended with an error");
        }
    }

    /// Whether the client has said something in time. hyper's timeout begins with the connection too, but is as long
    /// as a kept-alive one may be idle.
    async fn has_begun(&mut self) -> bool {
        tokio::select! {
            begun = tokio::time::timeout(self.patience.first_byte, self.stream.readable()) => matches!(begun, Ok(Ok(()))),
            _ = self.stop.wait_for(|stop| *stop) => false,
        }
    }
}

/// A place among the connections, counted in the metrics.
struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::record_connection_opened();
        Self { _permit: permit }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::record_connection_closed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::Notify;

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";

    const PATIENCE_OF_TESTS: Patience =
        Patience { first_byte: Duration::from_millis(50), header: Duration::from_millis(200) };

    struct Running {
        address: SocketAddr,
        stop: watch::Sender<bool>,
        server: tokio::task::JoinHandle<()>,
    }

    async fn run(routes: Router, max_connections: usize) -> Running {
        let mut server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0)), 1).await.unwrap();
        server.max_connections = max_connections;
        server.patience = PATIENCE_OF_TESTS;
        let address = server.address().unwrap();
        let (stop, stopped) = watch::channel(false);
        let server = tokio::spawn(server.serve(routes, stopped, Duration::from_secs(5)));
        Running { address, stop, server }
    }

    async fn connect(running: &Running, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// Up to the end of the connection.
    async fn rest(mut stream: TcpStream) -> String {
        let mut text = String::new();
        // A reset is an end as well.
        let _ = stream.read_to_string(&mut text).await;
        text
    }

    async fn until_body(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        while !text.ends_with("hello") {
            let mut byte = [0];
            assert_eq!(stream.read(&mut byte).await.unwrap(), 1, "the connection ended after {text:?}");
            text.push(char::from(byte[0]));
        }
        text
    }

    fn hello() -> Router {
        Router::new().route("/", get(async || "hello"))
    }

    #[tokio::test]
    async fn clients_that_say_nothing_or_half_a_request_are_let_go() {
        let running = run(hello(), 8).await;
        let started = Instant::now();
        assert_eq!(rest(connect(&running, b"").await).await, "");
        assert!(started.elapsed() >= PATIENCE_OF_TESTS.first_byte);
        let started = Instant::now();
        rest(connect(&running, b"GET / HTTP/1.1\r\nhost:").await).await;
        assert!(started.elapsed() >= PATIENCE_OF_TESTS.header);
    }

    #[tokio::test]
    async fn a_kept_alive_connection_is_served_again_and_let_go_when_idle() {
        let running = run(hello(), 8).await;
        let mut stream = connect(&running, REQUEST).await;
        until_body(&mut stream).await;
        stream.write_all(REQUEST).await.unwrap();
        until_body(&mut stream).await;
        assert_eq!(rest(stream).await, "");
    }

    #[tokio::test]
    async fn connections_beyond_the_most_wait_their_turn() {
        let running = run(hello(), 1).await;
        let mut first = connect(&running, REQUEST).await;
        until_body(&mut first).await;
        let mut second = connect(&running, REQUEST).await;
        let waiting = tokio::time::timeout(Duration::from_millis(50), until_body(&mut second)).await;
        assert!(waiting.is_err(), "the second connection was served beside the first");
        drop(first);
        until_body(&mut second).await;
    }

    #[tokio::test]
    async fn stopping_finishes_the_answers_that_are_under_way() {
        let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let handler = {
            let (asked, go) = (Arc::clone(&asked), Arc::clone(&go));
            async move || {
                asked.notify_one();
                go.notified().await;
                "hello"
            }
        };
        let running = run(Router::new().route("/", get(handler)), 8).await;
        let stream = connect(&running, REQUEST).await;
        asked.notified().await;
        let silent = connect(&running, b"").await;
        running.stop.send(true).unwrap();
        go.notify_one();
        assert!(rest(stream).await.ends_with("hello"));
        running.server.await.unwrap();
        assert_eq!(rest(silent).await, "");
        assert!(TcpStream::connect(running.address).await.is_err(), "the listener is still open");
    }

    #[tokio::test]
    async fn a_client_that_goes_away_cancels_its_request() {
        struct Dropped(Arc<AtomicBool>, Arc<Notify>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
                self.1.notify_one();
            }
        }
        let (dropped, asked, told) =
            (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()), Arc::new(Notify::new()));
        let handler = {
            let (dropped, asked, told) = (Arc::clone(&dropped), Arc::clone(&asked), Arc::clone(&told));
            async move || {
                let _guard = Dropped(dropped, told);
                asked.notify_one();
                std::future::pending::<&'static str>().await
            }
        };
        let running = run(Router::new().route("/", get(handler)), 8).await;
        let stream = connect(&running, REQUEST).await;
        asked.notified().await;
        assert!(!dropped.load(Ordering::SeqCst));
        drop(stream);
        told.notified().await;
        assert!(dropped.load(Ordering::SeqCst));
    }
}
