//! Where ranks meet outside of their devices: small messages from rank 0, and who is still there.

use std::path::PathBuf;
#[cfg(feature = "cuda")]
use std::time::Duration;

#[cfg(feature = "cuda")]
use super::{Communicator, SharedMemory, network::Network};
#[cfg(any(feature = "cuda", test))]
use crate::Result;

/// Where the ranks of a group find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeetingPlace {
    /// A file that all ranks of one host see; see [`SharedMemory`].
    File(PathBuf),
    /// Host and port where rank 0 listens, for ranks on several hosts. Whoever reaches the port can take a rank's place: it
    /// belongs into a private network.
    Address {
        /// Name or address of rank 0's host.
        host: String,
        /// Free on that host.
        port: u16,
    },
}

/// The ranks, met.
#[cfg(any(feature = "cuda", test))]
pub(super) trait Meeting: Send {
    /// Gives rank 0's `data` to all ranks.
    fn broadcast(&mut self, data: &mut [u32]) -> Result<()>;
    /// Who has gone, for another thread to ask now and then.
    fn absences(&self) -> Absences;
}

/// Says which rank has gone, where one has.
#[cfg(any(feature = "cuda", test))]
pub(super) type Absences = Box<dyn Fn() -> Option<String> + Send>;

#[cfg(feature = "cuda")]
impl MeetingPlace {
    /// Returns when all ranks are there, or with an error after `timeout`, which then holds for each message too.
    pub(super) fn join(&self, rank: usize, world_size: usize, timeout: Duration) -> Result<Box<dyn Meeting>> {
        Ok(match self {
            Self::File(path) => Box::new(SharedMemory::join(path, rank, world_size, timeout)?),
            Self::Address { host, port } => Box::new(Network::join(host, *port, rank, world_size, timeout)?),
        })
    }
}

#[cfg(feature = "cuda")]
impl Meeting for SharedMemory {
    fn broadcast(&mut self, data: &mut [u32]) -> Result<()> {
        Communicator::broadcast(self, data)
    }

    fn absences(&self) -> Absences {
        Box::new(self.absences())
    }
}
