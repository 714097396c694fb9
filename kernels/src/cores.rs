//! The cores of this machine that this process runs on: logical CPUs, by the numbers that Linux gives them.

use std::ffi::c_ulong;
use std::io;
use std::sync::OnceLock;

/// Numbers of cores are below this: no Linux is built for more (`NR_CPUS` of x86-64).
pub const MAX_CORES: usize = 8192;

const BITS: usize = c_ulong::BITS as usize;

/// A bit for each core. `cpu_set_t` itself has 1024, and the system refuses to write its mask into that where it has more cores.
type Mask = [c_ulong; MAX_CORES / BITS];

/// What [`available_cores`] was before [`bind_to_cores`].
static BEFORE_BINDING: OnceLock<usize> = OnceLock::new();

/// Why a thread was not bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The core does not exist, or the thread may not use it.
    #[error("core {core} is not one of those that this process may use")]
    NotAllowed {
        /// The first of them.
        core: usize,
        /// Those that it may use, ascending.
        allowed: Vec<usize>,
    },
    /// There would be nothing to run on.
    #[error("there are no cores to bind to")]
    Empty,
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Cores that this process may use: its affinity and, in a container, its CPU quota (the standard library reads those of both
/// versions of cgroups); at least one.
pub fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// [`available_cores`] of all ranks on this host together, where each is bound to some of them.
pub(crate) fn available_cores_of_all_ranks() -> usize {
    BEFORE_BINDING.get().copied().unwrap_or_else(available_cores)
}

/// The cores that the calling thread may run on (its affinity mask), ascending.
///
/// # Errors
/// Where the system does not say.
pub fn allowed_cores() -> io::Result<Vec<usize>> {
    let mut mask: Mask = [0; _];
    // SAFETY: the pointer is to `size_of::<Mask>()` bytes that this function owns, which is the size that the system is told;
    // it writes at most so many, and any bits are a mask. Thread 0 is the calling one.
    let outcome = unsafe { libc::sched_getaffinity(0, size_of::<Mask>(), mask.as_mut_ptr().cast()) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((0..MAX_CORES).filter(|core| mask[core / BITS] >> (core % BITS) & 1 == 1).collect())
}

/// Binds the calling thread to `cores`: it runs on these alone from now on, as do the threads that it starts from now on. Threads
/// that run already are left where they are, so a process calls this before it starts any. Memory is taken from the NUMA node
/// of the core that first touches it, so what a bound thread touches first lies near it.
///
/// # Errors
/// Where one of the cores does not exist or is not among [`allowed_cores`], where there are none, or where the system refuses.
/// Then nothing has changed.
pub fn bind_to_cores(cores: &[usize]) -> Result<(), BindError> {
    // The system would leave them out without a word, or allow what whoever started this process did not.
    let allowed = allowed_cores()?;
    if let Some(&core) = cores.iter().find(|core| allowed.binary_search(core).is_err()) {
        return Err(BindError::NotAllowed { core, allowed });
    }
    if cores.is_empty() {
        return Err(BindError::Empty);
    }
    let mut mask: Mask = [0; _];
    for core in cores {
        mask[core / BITS] |= 1 << (core % BITS);
    }
    BEFORE_BINDING.get_or_init(available_cores);
    // SAFETY: the pointer is to `size_of::<Mask>()` bytes that live as long as the call, which is the size that the system is told;
    // it only reads them. Thread 0 is the calling one.
    let outcome = unsafe { libc::sched_setaffinity(0, size_of::<Mask>(), mask.as_ptr().cast()) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error().into()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// On a thread of its own, which ends: the test's other threads stay where they are.
    fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    #[test]
    fn a_bound_thread_and_those_that_it_starts_run_on_its_cores_alone() {
        let before = allowed_cores().unwrap();
        let last = *before.last().unwrap();
        let (bound, inherited, available) = on_a_thread(|| {
            bind_to_cores(&[last]).unwrap();
            (allowed_cores().unwrap(), on_a_thread(|| allowed_cores().unwrap()), available_cores())
        });
        assert_eq!((bound, inherited, available), (vec![last], vec![last], 1));
        assert_eq!(allowed_cores().unwrap(), before);
    }

    #[test]
    fn ranks_with_cores_of_their_own_still_know_how_many_there_are_together() {
        let before = available_cores();
        let together = on_a_thread(|| {
            bind_to_cores(&allowed_cores().unwrap()[..1]).unwrap();
            available_cores_of_all_ranks()
        });
        assert_eq!(together, before);
    }

    #[test]
    fn cores_that_may_not_be_used_are_named_and_nothing_changes() {
        let before = allowed_cores().unwrap();
        on_a_thread(|| {
            for unknown in [MAX_CORES - 1, MAX_CORES, usize::MAX] {
                let error = bind_to_cores(&[before[0], unknown]).unwrap_err();
                let BindError::NotAllowed { core, allowed } = error else { panic!("{error}") };
                assert_eq!((core, &allowed), (unknown, &before));
            }
            assert!(matches!(bind_to_cores(&[]), Err(BindError::Empty)));
            assert_eq!(allowed_cores().unwrap(), before);
        });
    }

    #[test]
    fn a_core_that_the_thread_has_given_up_is_not_taken_back() {
        let before = allowed_cores().unwrap();
        let [first, .., last] = before[..] else { return };
        on_a_thread(|| {
            bind_to_cores(&[first]).unwrap();
            let error = bind_to_cores(&[last]).unwrap_err();
            assert!(matches!(error, BindError::NotAllowed { core, .. } if core == last), "{error}");
        });
    }
}
