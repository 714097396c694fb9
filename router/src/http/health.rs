//! `GET /livez`, `/readyz`, `/startupz`, and TGI's `/health`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use super::app::{App, Readiness};

/// The process answers: restarting it would win nothing.
pub(super) async fn livez() -> Response {
    (StatusCode::OK, Json(json!({"status": "alive"}))).into_response()
}

/// Whether requests should be sent here.
pub(super) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let readiness = app.readiness();
    let status = if readiness == Readiness::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(status, &readiness)
}

/// Whether the start is over.
pub(super) async fn startupz(State(app): State<Arc<App>>) -> Response {
    let readiness = app.readiness();
    let starting = matches!(readiness, Readiness::Starting(_));
    answer(if starting { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, &readiness)
}

/// As TGI: without a body when all is well.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    if app.readiness() == Readiness::Ready {
        return StatusCode::OK.into_response();
    }
    let body = json!({"error": "unhealthy", "error_type": "healthcheck"});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

fn answer(status: StatusCode, readiness: &Readiness) -> Response {
    let (word, reason) = match readiness {
        Readiness::Starting(reason) => ("starting", Some((*reason).to_owned())),
        Readiness::Ready => ("ready", None),
        Readiness::Draining => {
            ("draining", Some("the server is shutting down and finishes running requests".to_owned()))
        }
        Readiness::Failed(reason) => ("failed", Some(reason.clone())),
    };
    (status, Json(json!({"status": word, "reason": reason}))).into_response()
}
