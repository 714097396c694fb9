//! What can go wrong with a request. The status and the body that a client gets for it: `http/error.rs`.

use crate::scheduler::{Failure, SubmitError};
use crate::text::chat_template::TemplateError;

/// Why a request has no answer. Messages are for the client: they name the field, the limit and what to do, and hold
/// nothing of the server's inside.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum RequestError {
    /// A field's value is out of its range, or of another type.
    #[error("{message}")]
    Invalid {
        /// The field, if it is one field.
        param: Option<&'static str>,
        /// Field, limit, remedy.
        message: String,
    },
    /// A field that other servers have, and this one does not have yet.
    #[error("{message}")]
    Unsupported {
        /// The field.
        param: &'static str,
        /// What to do without it.
        message: String,
    },
    /// Too many grammars wait to be compiled.
    #[error("{0}")]
    GrammarsBusy(String),
    /// The chat template did not accept the messages.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The body is not JSON.
    #[error("the body is not valid JSON: {0}")]
    MalformedJson(String),
    /// The body is something else by its own account.
    #[error("the content type must be application/json: send the header `content-type: application/json`")]
    ContentType,
    /// Too many bytes.
    #[error("the body is longer than {limit} bytes: shorten the prompt")]
    BodyTooLarge {
        /// In bytes.
        limit: usize,
    },
    /// The body did not come to its end.
    #[error("the body was not sent completely: {0}")]
    BodyIncomplete(&'static str),
    /// No such route.
    #[error("there is no {path}: the endpoints are listed in docs/http.md")]
    NotFound {
        /// As asked for.
        path: String,
    },
    /// No model and no adapter has that name.
    #[error("{message}")]
    ModelNotFound {
        /// The name, and those that there are.
        message: String,
    },
    /// The route has other methods.
    #[error("this endpoint does not answer {method}")]
    Method {
        /// As asked for.
        method: String,
    },
    /// The scheduler did not take the request.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The request was taken and ended without a result.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// A defect in the router.
    #[error("the server has a defect that this request met; its log has the details")]
    Internal,
}

impl RequestError {
    /// A value that is out of its range; the message names the field, the limit and what to do.
    pub(crate) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param), message: message.into() }
    }

    /// A field that is known and not served.
    pub(crate) fn unsupported(param: &'static str, message: impl Into<String>) -> Self {
        Self::Unsupported { param, message: message.into() }
    }
}
