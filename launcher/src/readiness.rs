//! Asking the children whether they are ready, in the order in which they become so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Between two looks at something that is not there yet: no user notices the delay, no core the work.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// For one answer of the router on the same machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// More than any answer that is read here; `/info` is 1 KiB.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// A router that serves.
#[derive(Debug)]
pub(crate) struct Ready {
    /// Where it can be reached from this machine.
    pub(crate) address: SocketAddr,
    pub(crate) info: Info,
}

/// The part of the router's `/info` that the launcher shows.
#[derive(Debug, Deserialize)]
pub(crate) struct Info {
    pub(crate) model_id: String,
    pub(crate) model_dtype: String,
    pub(crate) model_device_type: String,
    pub(crate) max_total_tokens: u64,
    pub(crate) max_batch_total_tokens: u64,
}

/// Waits until all shards listen.
pub(crate) async fn shards_listen(sockets: &[PathBuf]) {
    while !sockets.iter().all(|socket| socket.exists()) {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits until the router has bound its address, lives and is ready to serve.
pub(crate) async fn router_serves(address_file: &Path) -> Ready {
    let bound = poll(async || tokio::fs::read_to_string(address_file).await.ok()?.trim().parse().ok()).await;
    let address = reachable(bound);
    for path in ["/livez", "/readyz"] {
        poll(async || get(address, path).await).await;
    }
    let info = poll(async || serde_json::from_str(&get(address, "/info").await?).ok()).await;
    Ready { address, info }
}

async fn poll<T>(ask: impl AsyncFn() -> Option<T>) -> T {
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// An address that stands for all interfaces is reached over loopback.
fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

/// The body of a successful answer; `None` for any other.
async fn get(address: SocketAddr, path: &str) -> Option<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        // In HTTP/1.0 the end of the connection is the end of the body: nothing to parse.
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?;
        (status == "200").then(|| body.to_owned())
    };
    tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.ok()?
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Answers each request with the next of `answers`, and returns what was asked for.
    async fn serve(listener: TcpListener, answers: &[(&str, &str)]) -> Vec<String> {
        let mut asked = Vec::new();
        for (status, body) in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            asked.push(request.split(' ').nth(1).unwrap().to_owned());
            let answer = format!("HTTP/1.1 {status}\r\ncontent-type: text/plain\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        asked
    }

    #[tokio::test]
    async fn a_router_is_ready_when_it_says_so_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let address_file = directory.path().join("address");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        std::fs::write(&address_file, format!("0.0.0.0:{}\n", listener.local_addr().unwrap().port()))
            .unwrap();
        let info = r#"{"model_id":"tiny","model_dtype":"float32","model_device_type":"cpu","max_total_tokens":64,
                       "max_batch_total_tokens":4096,"version":"1"}"#;
        let answers =
            [("200 OK", ""), ("503 Service Unavailable", "loading"), ("200 OK", ""), ("200 OK", info)];
        let (ready, asked) = tokio::join!(router_serves(&address_file), serve(listener, &answers));
        assert_eq!(asked, ["/livez", "/readyz", "/readyz", "/info"]);
        assert!(ready.address.ip().is_loopback());
        assert_eq!(ready.info.max_batch_total_tokens, 4096);
    }

    #[tokio::test]
    async fn shards_are_waited_for_one_and_all() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = ["shard-0", "shard-1"].map(|name| directory.path().join(name));
        std::fs::write(&sockets[0], "").unwrap();
        let waiting = shards_listen(&sockets);
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(POLL_INTERVAL * 2, &mut waiting).await.is_err());
        std::fs::write(&sockets[1], "").unwrap();
        waiting.await;
    }
}
