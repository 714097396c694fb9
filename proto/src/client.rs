//! Connecting to a shard.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::v1::shard_client::ShardClient;

/// Steps of a long prompt carry its ids: 1 Mi tokens of up to 5 bytes each, and some room.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// How often a shard on another host is asked for a sign of life, and how long it may take: a host that is switched off closes
/// no connection.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Where a shard listens: `unix:/path/to/socket`, a bare path, or `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// A shard on another host.
    Tcp(Uri),
}

/// An address that is neither a path nor a URI.
#[derive(Debug, thiserror::Error)]
#[error("{given:?} is not a shard address: give a socket path or http://host:port")]
pub struct InvalidAddress {
    given: String,
}

impl FromStr for ShardAddress {
    type Err = InvalidAddress;
    fn from_str(given: &str) -> Result<Self, InvalidAddress> {
        if given.starts_with("http://") {
            return given.parse().map(Self::Tcp).map_err(|_| InvalidAddress { given: given.to_owned() });
        }
        let path = given.strip_prefix("unix:").unwrap_or(given);
        if path.is_empty() {
            return Err(InvalidAddress { given: given.to_owned() });
        }
        Ok(Self::Unix(PathBuf::from(path)))
    }
}

impl std::fmt::Display for ShardAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(uri) => uri.fmt(f),
        }
    }
}

/// Opens a channel to a shard, waiting no longer than `timeout`.
pub async fn connect(address: &ShardAddress, timeout: Duration) -> Result<Channel, tonic::transport::Error> {
    match address {
        ShardAddress::Tcp(uri) => {
            Endpoint::from(uri.clone())
                .connect_timeout(timeout)
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .keep_alive_while_idle(true)
                .connect()
                .await
        }
        ShardAddress::Unix(path) => {
            let path = path.clone();
            // The URI is only the `:authority` header of the requests; the connector ignores it.
            Endpoint::from_static("http://shard.local")
                .connect_timeout(timeout)
                .connect_with_connector(tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
                }))
                .await
        }
    }
}

/// A client of the shard service on `channel`, with room for the longest messages.
pub fn shard_client(channel: Channel) -> ShardClient<Channel> {
    ShardClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_paths_or_http_uris() {
        let check = |given: &str, expected: &str| {
            let address: ShardAddress = given.parse().unwrap();
            assert_eq!(address.to_string(), expected);
        };
        check("/run/shard-0", "unix:/run/shard-0");
        check("unix:/run/shard-0", "unix:/run/shard-0");
        check("http://10.0.0.1:4000", "http://10.0.0.1:4000/");
        assert!("".parse::<ShardAddress>().is_err());
    }
}
