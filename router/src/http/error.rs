//! The one table from errors to status codes and bodies, in OpenAI's and in TGI's form.

use std::any::Any;

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::header::RETRY_AFTER;
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::error::RequestError;
use crate::metrics;
use crate::scheduler::{Failure, SubmitError};

/// An error of an endpoint under `/v1`.
#[derive(Debug)]
pub(super) struct OpenAiError(pub(super) RequestError);

/// An error of the other endpoints.
#[derive(Debug)]
pub(super) struct TgiError(pub(super) RequestError);

impl From<RequestError> for OpenAiError {
    fn from(error: RequestError) -> Self {
        Self(error)
    }
}

impl From<RequestError> for TgiError {
    fn from(error: RequestError) -> Self {
        Self(error)
    }
}

/// How an error is told.
struct Row {
    /// Under `/v1`.
    openai_status: StatusCode,
    /// OpenAI's `type`.
    openai_type: &'static str,
    /// OpenAI's `code`.
    code: Option<&'static str>,
    /// Elsewhere.
    tgi_status: StatusCode,
    /// TGI's `error_type`.
    tgi_type: &'static str,
    /// Label of `tgi_request_failure`.
    metric: &'static str,
}

fn row(error: &RequestError) -> Row {
    use StatusCode as S;
    const INVALID: &str = "invalid_request_error";
    let row = |openai_status, openai_type, code, tgi_status, tgi_type, metric| Row {
        openai_status,
        openai_type,
        code,
        tgi_status,
        tgi_type,
        metric,
    };
    let same = |status, openai_type, code, tgi_type, metric| {
        row(status, openai_type, code, status, tgi_type, metric)
    };
    #[rustfmt::skip]
    let row = match error {
        RequestError::Invalid { .. } => row(S::BAD_REQUEST, INVALID, None, S::UNPROCESSABLE_ENTITY, "validation", "validation"),
        RequestError::Template(_) => row(S::BAD_REQUEST, INVALID, Some("template_error"), S::UNPROCESSABLE_ENTITY, "template_error", "template"),
        RequestError::Unsupported { .. } => same(S::UNPROCESSABLE_ENTITY, INVALID, Some("unsupported_parameter"), "validation", "validation"),
        RequestError::MalformedJson(_) => same(S::BAD_REQUEST, INVALID, Some("malformed_json"), "validation", "validation"),
        RequestError::ContentType => same(S::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_media_type"), "validation", "validation"),
        RequestError::BodyTooLarge { .. } => same(S::PAYLOAD_TOO_LARGE, INVALID, Some("payload_too_large"), "validation", "validation"),
        RequestError::BodyIncomplete(_) => same(S::REQUEST_TIMEOUT, INVALID, Some("incomplete_body"), "validation", "validation"),
        RequestError::NotFound { .. } => same(S::NOT_FOUND, INVALID, Some("not_found"), "not_found", "validation"),
        RequestError::ModelNotFound { .. } => same(S::NOT_FOUND, INVALID, Some("model_not_found"), "validation", "validation"),
        RequestError::Method { .. } => same(S::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), "method_not_allowed", "validation"),
        RequestError::Submit(SubmitError::Overloaded { .. }) | RequestError::GrammarsBusy(_) => same(S::TOO_MANY_REQUESTS, "rate_limit_error", Some("overloaded"), "overloaded", "overloaded"),
        RequestError::Submit(SubmitError::Draining) | RequestError::Failed(Failure::ShuttingDown) => same(S::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down"), "shutting_down", "unavailable"),
        RequestError::Submit(SubmitError::Unavailable) => same(S::SERVICE_UNAVAILABLE, "server_error", Some("not_ready"), "not_ready", "unavailable"),
        // Whose limit it was, the client's or the server's, makes no difference: the server was too slow for it. 408
        // would say that the client was.
        RequestError::Failed(Failure::QueueTimeout { .. }) => same(S::SERVICE_UNAVAILABLE, "server_error", Some("queue_timeout"), "overloaded", "timeout"),
        RequestError::Failed(Failure::Timeout { .. }) => same(S::GATEWAY_TIMEOUT, "server_error", Some("timeout"), "timeout", "timeout"),
        RequestError::Failed(Failure::OutOfMemory) => same(S::SERVICE_UNAVAILABLE, "server_error", Some("out_of_memory"), "overloaded", "out_of_memory"),
        RequestError::Failed(Failure::Shards(_) | Failure::InvalidLogits | Failure::Grammar(_)) => row(S::INTERNAL_SERVER_ERROR, "server_error", Some("generation_failed"), S::FAILED_DEPENDENCY, "generation", "generation"),
        RequestError::Internal => same(S::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"), "internal", "generation"),
    };
    row
}

/// Seconds after which to try again: a running request may have ended, or another replica taken over.
fn retry_after(status: StatusCode) -> Option<HeaderValue> {
    match status {
        StatusCode::TOO_MANY_REQUESTS => Some(HeaderValue::from_static("1")),
        StatusCode::SERVICE_UNAVAILABLE => Some(HeaderValue::from_static("5")),
        _ => None,
    }
}

/// `{"error":{...}}` as OpenAI's.
pub(super) fn openai_body(error: &RequestError) -> Value {
    let row = row(error);
    let param = match error {
        RequestError::Invalid { param, .. } => *param,
        RequestError::Unsupported { param, .. } => Some(*param),
        RequestError::ModelNotFound { .. } => Some("model"),
        _ => None,
    };
    json!({"error": {"message": error.to_string(), "type": row.openai_type, "param": param, "code": row.code}})
}

/// `{"error":...,"error_type":...}` as TGI's, with its prefixes.
pub(super) fn tgi_body(error: &RequestError) -> Value {
    let row = row(error);
    let text = match error {
        RequestError::Template(_) => format!("Template error: {error}"),
        RequestError::Submit(SubmitError::Overloaded { .. })
        | RequestError::GrammarsBusy(_)
        | RequestError::Failed(Failure::OutOfMemory) => format!("Model is overloaded: {error}"),
        RequestError::Failed(Failure::Shards(_) | Failure::InvalidLogits | Failure::Grammar(_)) => {
            format!("Request failed during generation: {error}")
        }
        _ if row.tgi_type == "validation" => format!("Input validation error: {error}"),
        _ => error.to_string(),
    };
    json!({"error": text, "error_type": row.tgi_type})
}

/// Counts an error that a client of a generation endpoint gets.
pub(super) fn record(error: &RequestError) {
    metrics::record_request_failure(row(error).metric);
}

impl IntoResponse for OpenAiError {
    fn into_response(self) -> Response {
        response(row(&self.0).openai_status, openai_body(&self.0))
    }
}

impl IntoResponse for TgiError {
    fn into_response(self) -> Response {
        response(row(&self.0).tgi_status, tgi_body(&self.0))
    }
}

fn response(status: StatusCode, body: Value) -> Response {
    let mut response = (status, Json(body)).into_response();
    if let Some(seconds) = retry_after(status) {
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    response
}

/// In the form of the API to which the path belongs.
fn for_path(path: &str, error: RequestError) -> Response {
    if path.starts_with("/v1/") {
        OpenAiError(error).into_response()
    } else {
        TgiError(error).into_response()
    }
}

/// The answer to a path without a route.
pub(super) async fn not_found(request: Request) -> Response {
    let path: String = request.uri().path().chars().take(200).collect();
    for_path(&path.clone(), RequestError::NotFound { path })
}

/// The answer to a method that a route does not have.
pub(super) async fn method_not_allowed(request: Request) -> Response {
    for_path(request.uri().path(), RequestError::Method { method: request.method().to_string() })
}

/// The answer to a request in which the router panicked.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the layer asks for")]
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message =
        panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!(panic = message.unwrap_or("without a message"), "a request met a defect of the router");
    // The path is gone here; OpenAI's form is the one that clients of both kinds can show.
    OpenAiError(RequestError::Internal).into_response()
}
