//! Where a request stands among others, in whose account, for how long, and with whom it shares cached prefixes.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, MAX_TIMEOUT};
use crate::error::RequestError;
use crate::scheduler::{CacheNamespace, Standing};

/// Least and greatest `priority`. Bounded, so that ageing lets everyone in some day.
const PRIORITIES: std::ops::RangeInclusive<i64> = -1000..=1000;

/// Each request keeps its salt, and so does each part of the cache that is shared under it.
const MAX_SALT_BYTES: usize = 256;

/// The header that names a class of priority.
pub(crate) const PRIORITY_HEADER: &str = "x-request-priority";

/// Classes of priority that have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PriorityClass {
    /// Someone waits for each token.
    Interactive,
    /// Nothing special.
    Default,
    /// Nobody waits.
    Batch,
}

/// As the client gave them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct StandingParameters {
    /// From the header.
    pub(crate) class: Option<PriorityClass>,
    /// From the body.
    pub(crate) priority: Option<i64>,
    /// Whom the tokens are charged to.
    pub(crate) account: Option<Arc<str>>,
    /// Longest time from submission to the end, in seconds.
    pub(crate) timeout: Option<f64>,
    /// Only requests with the same one share cached prefixes.
    pub(crate) cache_salt: Option<String>,
}

impl PriorityClass {
    /// The class that a header names.
    pub(crate) fn parse(name: &str) -> Result<Self, RequestError> {
        match name.trim() {
            "interactive" => Ok(Self::Interactive),
            "default" => Ok(Self::Default),
            "batch" => Ok(Self::Batch),
            other => {
                let given: String = other.chars().take(64).collect();
                let message = format!(
                    "the header `{PRIORITY_HEADER}` must be `interactive`, `default` or `batch`. Given: {given:?}"
                );
                Err(RequestError::invalid(PRIORITY_HEADER, message))
            }
        }
    }

    fn priority(self) -> i32 {
        match self {
            Self::Interactive => Standing::PRIORITY_INTERACTIVE,
            Self::Default => Standing::PRIORITY_DEFAULT,
            Self::Batch => Standing::PRIORITY_BATCH,
        }
    }
}

impl StandingParameters {
    /// Checks each range. `longest`: what the server gives a request at most.
    pub(super) fn check(self, longest: Option<Duration>) -> Result<(Standing, CacheNamespace), RequestError> {
        let priority = self.priority()?;
        let timeout = match (self.asked_timeout()?, longest) {
            (Some(asked), Some(longest)) => Some(asked.min(longest)),
            (asked, longest) => asked.or(longest),
        };
        let salt = self.cache_salt.map(checked_salt).transpose()?;
        let standing = Standing { priority, account: self.account, timeout };
        Ok((standing, CacheNamespace { adapter: None, salt }))
    }

    fn priority(&self) -> Result<i32, RequestError> {
        let of_class = self.class.map(PriorityClass::priority);
        let Some(given) = self.priority else {
            return Ok(of_class.unwrap_or(Standing::PRIORITY_DEFAULT));
        };
        if !PRIORITIES.contains(&given) {
            let (least, greatest) = (PRIORITIES.start(), PRIORITIES.end());
            let message =
                format!("`priority` must be >= {least} and <= {greatest} (lower goes first). Given: {given}");
            return Err(RequestError::invalid("priority", message));
        }
        match of_class {
            Some(class) if i64::from(class) != given => {
                let message = format!(
                    "`priority` is {given}, but the header `{PRIORITY_HEADER}` means {class}: send one of them only"
                );
                Err(RequestError::invalid("priority", message))
            }
            _ => Ok(given as i32),
        }
    }

    fn asked_timeout(&self) -> Result<Option<Duration>, RequestError> {
        let Some(seconds) = self.timeout else { return Ok(None) };
        config::timeout(seconds).map(Some).ok_or_else(|| {
            let most = MAX_TIMEOUT.as_secs();
            let message =
                format!("`timeout` must be a number of seconds, > 0 and <= {most}. Given: {seconds}");
            RequestError::invalid("timeout", message)
        })
    }
}

fn checked_salt(salt: String) -> Result<Arc<str>, RequestError> {
    let bytes = salt.len();
    if (1..=MAX_SALT_BYTES).contains(&bytes) {
        return Ok(salt.into());
    }
    let message =
        format!("`cache_salt` must have at least 1 and at most {MAX_SALT_BYTES} bytes. Given: {bytes}");
    Err(RequestError::invalid("cache_salt", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Option<Duration> = Some(Duration::from_secs(30));

    fn standing(parameters: StandingParameters) -> Standing {
        parameters.check(SERVER).unwrap().0
    }

    fn error(parameters: StandingParameters) -> String {
        parameters.check(SERVER).unwrap_err().to_string()
    }

    #[test]
    fn nothing_said_is_the_default_priority_within_the_servers_time() {
        let (standing, namespace) = StandingParameters::default().check(SERVER).unwrap();
        assert_eq!(standing, Standing { priority: 0, account: None, timeout: SERVER });
        assert_eq!(namespace, CacheNamespace::default());
        assert_eq!(StandingParameters::default().check(None).unwrap().0.timeout, None);
    }

    #[test]
    fn a_class_is_a_number_and_both_may_say_the_same() {
        let check = |class, given: Option<i64>, expected: i32| {
            let parameters = StandingParameters { class, priority: given, ..Default::default() };
            assert_eq!(standing(parameters).priority, expected);
        };
        check(Some(PriorityClass::Interactive), None, -100);
        check(Some(PriorityClass::Default), None, 0);
        check(Some(PriorityClass::Batch), Some(100), 100);
        check(None, Some(-1000), -1000);
        check(None, Some(7), 7);
    }

    #[test]
    fn priorities_that_contradict_each_other_or_the_range_are_refused() {
        let class = Some(PriorityClass::Batch);
        let message = error(StandingParameters { class, priority: Some(-100), ..Default::default() });
        assert!(message.contains("-100") && message.contains("means 100"), "{message}");
        for given in [-1001, 1001, i64::MAX] {
            let message = error(StandingParameters { priority: Some(given), ..Default::default() });
            assert!(message.contains(&given.to_string()) && message.contains("<= 1000"), "{message}");
        }
        let message = PriorityClass::parse("urgent").unwrap_err().to_string();
        assert!(
            ["`interactive`", "`default`", "`batch`"].iter().all(|name| message.contains(name)),
            "{message}"
        );
    }

    #[test]
    fn the_shorter_of_both_times_counts() {
        let check = |asked: f64, expected: u64| {
            let timeout = standing(StandingParameters { timeout: Some(asked), ..Default::default() }).timeout;
            assert_eq!(timeout, Some(Duration::from_millis(expected)));
        };
        check(0.25, 250);
        check(40.0, 30_000);
        for asked in [0.0, -1.0, 86_401.0, f64::INFINITY, f64::NAN] {
            let message = error(StandingParameters { timeout: Some(asked), ..Default::default() });
            assert!(message.contains("`timeout`") && message.contains("86400"), "{message}");
        }
    }

    #[test]
    fn salts_are_kept_apart_and_bounded() {
        let salted =
            |salt: &str| StandingParameters { cache_salt: Some(salt.to_owned()), ..Default::default() };
        assert_eq!(salted("a").check(None).unwrap().1.salt.as_deref(), Some("a"));
        for salt in [String::new(), "x".repeat(257)] {
            assert!(error(salted(&salt)).contains("at most 256 bytes"));
        }
    }
}
