//! Who asks, and what a client says about where its request stands: the fields that all generation endpoints share.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};

use http::HeaderMap;
use http::header::AUTHORIZATION;

use super::fields::Fields;
use crate::error::RequestError;
use crate::validate::{PRIORITY_HEADER, PriorityClass, StandingParameters};

/// Names of the fields, for a dialect that has them in an object of their own.
pub(super) const FIELDS: [&str; 4] = ["priority", "user", "timeout", "cache_salt"];

/// What a request's headers say about its client.
#[derive(Debug, Default)]
pub(super) struct Caller {
    class: Option<PriorityClass>,
    /// Its key's account.
    account: Option<Arc<str>>,
}

impl Caller {
    /// Reads the headers.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, RequestError> {
        let class = match headers.get(PRIORITY_HEADER) {
            Some(value) => Some(PriorityClass::parse(&String::from_utf8_lossy(value.as_bytes()))?),
            None => None,
        };
        let key = headers.get(AUTHORIZATION).map(|value| value.as_bytes().trim_ascii());
        Ok(Self { class, account: key.and_then(|key| account("key", key)) })
    }

    /// Takes the fields. A key is known to be its owner's, and `user` is whatever a client likes to write, so the key
    /// is the account: nobody gets a second share by a second name.
    pub(super) fn take(self, fields: &mut Fields) -> Result<StandingParameters, RequestError> {
        let user: Option<String> = fields.take("user")?;
        Ok(StandingParameters {
            class: self.class,
            priority: fields.take("priority")?,
            account: self.account.or_else(|| account("user", user?.as_bytes())),
            timeout: fields.take("timeout")?,
            cache_salt: fields.take("cache_salt")?,
        })
    }
}

/// The name of an account, of the same length for all: only a hash is kept, and its key is that of the process, so that
/// neither keys nor people can be read from the router's memory or guessed from what it says.
fn account(kind: &str, name: &[u8]) -> Option<Arc<str>> {
    static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::new(), RandomState::new()]);
    if name.is_empty() {
        return None;
    }
    let [high, low] = KEYS.each_ref().map(|key| key.hash_one(name));
    Some(format!("{kind}:{high:016x}{low:016x}").into())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn account_of(key: Option<&str>, body: &str) -> Option<Arc<str>> {
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            headers.insert(AUTHORIZATION, HeaderValue::from_str(key).unwrap());
        }
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        Caller::of(&headers).unwrap().take(&mut fields).unwrap().account
    }

    #[test]
    fn a_key_is_the_account_and_without_one_the_user_is() {
        let key = account_of(Some("Bearer one"), "{}").unwrap();
        assert_eq!(account_of(Some("Bearer one"), r#"{"user":"x"}"#), Some(Arc::clone(&key)));
        assert_ne!(account_of(Some("Bearer two"), "{}"), Some(Arc::clone(&key)));
        let user = account_of(None, r#"{"user":"x"}"#).unwrap();
        assert_eq!(account_of(Some(" "), r#"{"user":"x"}"#), Some(Arc::clone(&user)));
        assert_ne!(account_of(None, r#"{"user":"y"}"#), Some(user));
        // Whoever writes another's key as a name does not get into its account.
        assert_ne!(account_of(None, r#"{"user":"Bearer one"}"#), Some(key));
        assert_eq!(account_of(None, r#"{"user":""}"#), None);
        assert_eq!(account_of(None, "{}"), None);
    }

    #[test]
    fn an_account_does_not_tell_its_key() {
        let account = account_of(Some("Bearer secret"), "{}").unwrap();
        assert!(!account.contains("secret"), "{account}");
        assert_eq!(
            account.len(),
            account_of(None, &format!(r#"{{"user":"{}"}}"#, "x".repeat(9999))).unwrap().len() - 1
        );
    }
}
