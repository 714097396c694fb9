//! Sets of cores, as `--cores` and Linux's cpulist files write them, and what it means for a shard to have one.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use anyhow::anyhow;
use kernels::{BindError, MAX_CORES};
use serde::{Deserialize, Serialize};

use crate::config::ShardPlacement;

/// Cores (logical CPUs, by the numbers that Linux gives them). Their text is that of cpulist files: `0-15,32-47`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cores(BTreeSet<usize>);

/// Why a text is no set of cores.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoresError {
    /// It is written in another way.
    #[error("{0:?} is neither a core nor a range of cores: write them as in 0-15,32-47")]
    Form(String),
    /// A range has its ends the wrong way round.
    #[error("{0:?} ends before it begins: write the lower core first")]
    Backwards(String),
    /// No Linux has so many.
    #[error("{0:?} has a core above {max}, the highest that there can be", max = MAX_CORES - 1)]
    TooHigh(String),
}

impl Cores {
    /// Those that this process may use: its affinity mask.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn allowed() -> std::io::Result<Self> {
        Ok(kernels::allowed_cores()?.into_iter().collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Their numbers, ascending.
    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.0.iter().copied()
    }

    /// Those that are in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(&self.0 & &other.0)
    }
}

impl FromIterator<usize> for Cores {
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

impl FromStr for Cores {
    type Err = CoresError;

    /// Nothing at all is no core: the list of a NUMA node that has only memory.
    fn from_str(text: &str) -> Result<Self, CoresError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let mut cores = BTreeSet::new();
        for entry in text.split(',').map(str::trim) {
            // Digits alone: a number may otherwise have a sign.
            let number = |digits: &str| match digits.parse::<usize>() {
                _ if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                    Err(CoresError::Form(entry.to_owned()))
                }
                Ok(number) if number < MAX_CORES => Ok(number),
                _ => Err(CoresError::TooHigh(entry.to_owned())),
            };
            let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(CoresError::Backwards(entry.to_owned()));
            }
            cores.extend(first..=last);
        }
        Ok(Self(cores))
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.numbers().peekable();
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(f, "{separator}{first}")?;
            } else {
                write!(f, "{separator}{first}-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// Binds this process to the cores of its placement, where it has any, and decides how many threads it has there. To be called
/// before the process starts a thread: only those that come later are bound too.
///
/// # Errors
/// Where one of the cores does not exist, or may not be used.
pub(crate) fn bind(placement: &mut ShardPlacement) -> anyhow::Result<()> {
    let Some(cores) = &placement.cores else { return Ok(()) };
    // Asked for before, as afterwards the cores hide a quota that is not below their number.
    let quota = cpu_quota();
    kernels::bind_to_cores(&cores.numbers().collect::<Vec<_>>()).map_err(refusal)?;
    let num_threads = num_threads(cores.len(), quota, placement.world_size);
    placement.num_threads = placement.num_threads.or(Some(num_threads));
    Ok(())
}

fn refusal(error: BindError) -> anyhow::Error {
    match error {
        BindError::NotAllowed { core, allowed } => anyhow!(
            "--cores has core {core}, but this process may only use {}: give cores of these, or leave --cores out (where the \
             machine has core {core}, whoever started this process, or its container, holds it back)",
            allowed.into_iter().collect::<Cores>()
        ),
        BindError::Empty => anyhow!("--cores has no core: give some, as in 0-15,32-47, or leave it out"),
        BindError::System(source) => {
            anyhow!("the system does not bind this process to its --cores: {source}: leave --cores out")
        }
    }
}

/// Cores' worth of time that the container has, where that is less than the cores that this process may use.
fn cpu_quota() -> Option<usize> {
    let available = kernels::available_cores();
    kernels::allowed_cores().is_ok_and(|allowed| available < allowed.len()).then_some(available)
}

/// A thread for each core, but no more than this rank's share of the quota of all.
fn num_threads(num_cores: usize, quota: Option<usize>, world_size: usize) -> usize {
    quota.map_or(num_cores, |quota| num_cores.min(quota / world_size)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_linux_does() {
        let check = |text: &str, numbers: &[usize], written: &str| {
            let cores: Cores = text.parse().unwrap();
            assert_eq!(cores.numbers().collect::<Vec<_>>(), numbers, "{text:?}");
            assert_eq!(cores.to_string(), written, "{text:?}");
        };
        check("0\n", &[0], "0");
        check("0-3,8-9\n", &[0, 1, 2, 3, 8, 9], "0-3,8-9");
        check("0-1,16-17", &[0, 1, 16, 17], "0-1,16-17");
        check("5,3, 4,4-5", &[3, 4, 5], "3-5");
        check("0,2,4,8191", &[0, 2, 4, 8191], "0,2,4,8191");
        check("\n", &[], "");
        check("", &[], "");
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_part_that_is_wrong() {
        let check = |text: &str, error: fn(String) -> CoresError, entry: &str| {
            assert_eq!(text.parse::<Cores>(), Err(error(entry.to_owned())), "{text:?}");
        };
        check("all", CoresError::Form, "all");
        check("0-3,,8", CoresError::Form, "");
        check("0,", CoresError::Form, "");
        check("0-", CoresError::Form, "0-");
        check("-1", CoresError::Form, "-1");
        check("+1", CoresError::Form, "+1");
        check("0-3-5", CoresError::Form, "0-3-5");
        check("0-31:2/4", CoresError::Form, "0-31:2/4");
        check("0, 7-3", CoresError::Backwards, "7-3");
        check("0-99999999999", CoresError::TooHigh, "0-99999999999");
        check("99999999999999999999999", CoresError::TooHigh, "99999999999999999999999");
        check("8192", CoresError::TooHigh, "8192");
    }

    #[test]
    fn there_is_a_thread_for_each_core_but_no_more_than_the_quota_has_for_this_rank() {
        let check = |num_cores, quota, world_size, expected| {
            assert_eq!(num_threads(num_cores, quota, world_size), expected);
        };
        check(8, None, 2, 8);
        check(8, Some(12), 2, 6);
        check(8, Some(8), 1, 8);
        check(8, Some(4), 1, 4);
        check(2, Some(12), 2, 2);
        check(4, Some(3), 4, 1);
    }

    #[test]
    fn a_core_that_may_not_be_used_is_refused_with_those_that_may() {
        let error = refusal(BindError::NotAllowed { core: 9, allowed: vec![0, 1, 2, 5] }).to_string();
        for part in ["--cores has core 9", "may only use 0-2,5", "leave --cores out"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
