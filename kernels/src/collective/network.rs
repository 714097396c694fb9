//! Ranks on several hosts, meeting at rank 0's port: for what is small and rare, not for tensors.
//!
//! Each rank keeps a connection to rank 0. A process that ends closes its connections, and a host that goes silent is found
//! by keep-alive probes; rank 0 learns of any rank's end so, the others of rank 0's.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::SLICE;
use super::meeting::{Absences, Meeting};
use crate::{Error, Result};

/// "lamp", then the version of this protocol.
const MAGIC: u32 = 0x6c61_1001;
/// After so long without a sign, a peer's host is asked for one; so often; then the connection is broken.
const KEEP_ALIVE: (Duration, u32) = (Duration::from_secs(5), 4);

/// Connections of a rank: rank 0's to all others in their order, another's to rank 0.
pub(super) struct Network {
    connections: Vec<Connection>,
    rank: usize,
    /// Why the group is broken, if it is.
    broken: Option<String>,
}

struct Connection {
    stream: TcpStream,
    peer: usize,
}

impl Network {
    pub(super) fn join(
        host: &str,
        port: u16,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let connections = if rank == 0 {
            accept_all(port, world_size, deadline)
        } else {
            connect(host, port, rank, world_size, deadline).map(|connection| vec![connection])
        };
        let connections = connections.map_err(Error::Collective)?;
        let mut group = Self { connections, rank, broken: None };
        for Connection { stream, .. } in &group.connections {
            let set =
                stream.set_read_timeout(Some(timeout)).and_then(|()| stream.set_write_timeout(Some(timeout)));
            set.map_err(|source| Error::Io { context: "preparing a rank's connection".into(), source })?;
        }
        // Rank 0 answers when all are there.
        group.broadcast(&mut [MAGIC])?;
        Ok(group)
    }

    fn exchange(&mut self, data: &mut [u32]) -> Result<(), String> {
        let is_source = self.rank == 0;
        for Connection { stream, peer } in &mut self.connections {
            let silent =
                |error| format!("rank {peer} is gone or silent ({error}): see its log, restart the group");
            if is_source {
                let words = std::iter::once(data.len() as u32).chain(data.iter().copied());
                let message: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                stream.write_all(&message).map_err(silent)?;
            } else {
                let len = read_word(stream).map_err(silent)?;
                if len as usize != data.len() {
                    return Err(format!(
                        "rank {peer} sent {len} words where {} were expected: all ranks must run the same version on the same \
                         steps",
                        data.len()
                    ));
                }
                let mut bytes = vec![0; 4 * data.len()];
                stream.read_exact(&mut bytes).map_err(silent)?;
                for (word, bytes) in data.iter_mut().zip(bytes.chunks_exact(4)) {
                    *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
        }
        Ok(())
    }
}

impl Meeting for Network {
    fn broadcast(&mut self, data: &mut [u32]) -> Result<()> {
        if self.broken.is_none() {
            self.broken = self.exchange(data).err();
        }
        self.broken.clone().map_or(Ok(()), |message| Err(Error::Collective(message)))
    }

    fn absences(&self) -> Absences {
        // Handles of their own: those of this group may be closed first.
        let streams: Vec<Option<TcpStream>> =
            self.connections.iter().map(|one| one.stream.try_clone().ok()).collect();
        let peers: Vec<usize> = self.connections.iter().map(|one| one.peer).collect();
        Box::new(move || {
            let gone = streams.iter().zip(&peers).find(|(stream, _)| stream.as_ref().is_none_or(is_closed));
            gone.map(|(_, peer)| format!("rank {peer} has closed its connection"))
        })
    }
}

/// Rank 0: waits for all others.
fn accept_all(port: u16, world_size: usize, deadline: Instant) -> Result<Vec<Connection>, String> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        .or_else(|_| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))))
        .map_err(|error| format!("rank 0 cannot listen on port {port}: {error}"))?;
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    let mut found: Vec<Option<TcpStream>> = (1..world_size).map(|_| None).collect();
    while let Some(missing) = found.iter().position(Option::is_none) {
        match listener.accept() {
            // A stranger, or a rank of another group, is let go.
            Ok((stream, _)) => {
                if let Some((rank, stream)) = greet(stream, world_size) {
                    found[rank - 1] = Some(stream);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if Instant::now() >= deadline {
                    return Err(format!(
                        "rank {} of {world_size} did not come to port {port}: see its log, and start all ranks with the same \
                         master address, port and number of ranks",
                        missing + 1
                    ));
                }
                std::thread::sleep(SLICE / 10);
            }
            Err(error) => return Err(format!("rank 0 cannot accept connections on port {port}: {error}")),
        }
    }
    let found = found.into_iter().flatten().enumerate();
    Ok(found.map(|(index, stream)| Connection { stream, peer: index + 1 }).collect())
}

/// Which rank this is; none for who does not belong here.
fn greet(mut stream: TcpStream, world_size: usize) -> Option<(usize, TcpStream)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    prepare(&stream).ok()?;
    let hello = [(); 3].map(|()| read_word(&mut stream).ok());
    let [Some(MAGIC), Some(rank), Some(size)] = hello else { return None };
    (size as usize == world_size && (1..world_size as u32).contains(&rank)).then_some((rank as usize, stream))
}

/// Another rank: goes to rank 0, which may not be there yet.
fn connect(
    host: &str,
    port: u16,
    rank: usize,
    world_size: usize,
    deadline: Instant,
) -> Result<Connection, String> {
    let attempt = || -> std::io::Result<TcpStream> {
        let mut last = std::io::Error::new(ErrorKind::NotFound, "it has no address");
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    loop {
        let met = attempt().and_then(|mut stream| {
            prepare(&stream)?;
            let hello = [MAGIC, rank as u32, world_size as u32];
            stream.write_all(&hello.map(u32::to_le_bytes).concat())?;
            Ok(stream)
        });
        match met {
            Ok(stream) => return Ok(Connection { stream, peer: 0 }),
            Err(error) if Instant::now() >= deadline => {
                return Err(format!(
                    "rank {rank} cannot reach rank 0 at {host}:{port} ({error}): see its log, and start all ranks with the same \
                     master address and port"
                ));
            }
            Err(_) => std::thread::sleep(SLICE),
        }
    }
}

fn read_word(stream: &mut TcpStream) -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Sends at once what is written, and notices a host that is no longer there.
fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (every, times) = (KEEP_ALIVE.0.as_secs() as libc::c_int, KEEP_ALIVE.1 as libc::c_int);
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, every),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, every),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, times),
    ];
    for (level, option, value) in options {
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: an open socket, and an option that is one integer.
        let answer =
            unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size) };
        if answer != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether the other side has gone, without waiting and without taking what it has sent.
fn is_closed(stream: &TcpStream) -> bool {
    let mut byte = 0_u8;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: an open socket and room for one byte.
    match unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, flags) } {
        0 => true,
        -1 => {
            !matches!(std::io::Error::last_os_error().kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a free port").port()
    }

    /// Runs all ranks at once, each on a thread.
    fn group<T: Send>(world_size: usize, port: u16, run: impl Fn(usize, Network) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size)
                .map(|rank| {
                    let run = &run;
                    scope.spawn(move || {
                        let network = Network::join("localhost", port, rank, world_size, TIMEOUT);
                        run(rank, network.expect("all ranks come"))
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        })
    }

    #[test]
    fn all_ranks_get_what_rank_0_says() {
        let said = group(4, free_port(), |rank, mut network| {
            let mut data: Vec<u32> = (0..1000).map(|i| i * 3 + rank as u32).collect();
            network.broadcast(&mut data).map(|()| data)
        });
        let expected: Vec<u32> = (0..1000).map(|i| i * 3).collect();
        assert!(said.iter().all(|data| data.as_ref().is_ok_and(|data| *data == expected)));
    }

    #[test]
    fn strangers_do_not_take_a_place() {
        let port = free_port();
        let said = std::thread::scope(|scope| {
            let stranger = scope.spawn(move || {
                // As a health check or a scanner would.
                for _ in 0..50 {
                    if let Ok(mut stream) = TcpStream::connect(("localhost", port)) {
                        let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
                        return;
                    }
                    std::thread::yield_now();
                }
            });
            let said = group(3, port, |_, mut network| {
                let mut data = [7];
                network.broadcast(&mut data).map(|()| data[0])
            });
            stranger.join().expect("no panic");
            said
        });
        assert!(said.iter().all(|word| word.as_ref().is_ok_and(|word| *word == 7)));
    }

    #[test]
    fn a_rank_that_has_gone_is_named() {
        let seen = group(3, free_port(), |rank, network| {
            let absences = network.absences();
            let began = Instant::now();
            let mut gone = None;
            // Rank 2 leaves at once, the others when they have seen it, or its consequence.
            while rank != 2 && gone.is_none() && began.elapsed() < TIMEOUT {
                gone = absences();
            }
            gone
        });
        assert_eq!(seen[1].as_deref(), Some("rank 0 has closed its connection"));
        assert_eq!(seen[0].as_deref(), Some("rank 2 has closed its connection"));
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let short = Duration::from_millis(30);
        let error = Network::join("localhost", free_port(), 0, 2, short).err().expect("nobody comes");
        assert!(error.to_string().starts_with("rank 1 of 2 did not come to port"), "{error}");
        let error = Network::join("localhost", free_port(), 1, 2, short).err().expect("nobody is there");
        assert!(error.to_string().starts_with("rank 1 cannot reach rank 0 at localhost:"), "{error}");
    }

    #[test]
    fn ranks_that_drift_apart_are_told_so() {
        let said = group(2, free_port(), |rank, mut network| {
            network.broadcast(&mut vec![0; 1 + rank]).map_err(|error| error.to_string())
        });
        let message = said[1].as_ref().expect_err("another length");
        assert!(message.starts_with("rank 0 sent 1 words where 2 were expected"), "{message}");
    }
}
