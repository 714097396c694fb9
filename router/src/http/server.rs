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
use tokio::sync::{Semaphore, watch};

use crate::metrics;

/// A client that has connected says something within this time.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(10);

/// A request's head comes within this time; so long too may a connection be idle between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

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
}

impl Server {
    /// Binds `address`. `max_requests`: requests that are served at once.
    pub(crate) async fn bind(address: SocketAddr, max_requests: usize) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let max_connections = max_requests.saturating_add(SPARE_CONNECTIONS).min(Semaphore::MAX_PERMITS);
        Ok(Self { listener, max_connections })
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
            let (routes, watcher) = (routes.clone(), graceful.watcher());
            let (gauge, max_connections) = (Arc::clone(&connections), self.max_connections);
            metrics::set_http_connections(max_connections - connections.available_permits());
            tokio::spawn(async move {
                serve_connection(stream, routes, watcher).await;
                drop(permit);
                metrics::set_http_connections(max_connections - gauge.available_permits());
            });
        }
        drop(self.listener);
        if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
            tracing::warn!("closing connections whose clients have not read their answers");
        }
    }
}

async fn serve_connection(stream: TcpStream, routes: Router, watcher: Watcher) {
    // A token's frame should not wait for the next one.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    // hyper's header timeout begins here too, but is as long as a kept-alive connection may be idle.
    match tokio::time::timeout(FIRST_BYTE_TIMEOUT, stream.readable()).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) | Err(_) => return,
    }
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    if let Err(error) = watcher.watch(connection).await {
        // Clients go away all the time.
        tracing::debug!(%error, "a connection ended with an error");
    }
}
