//! The only place that knows HTTP, JSON and status codes. Routes and layers are read here from top to bottom; an
//! endpoint is a file, and does no more than translate.

mod app;
mod best_of;
mod caller;
mod chat_completions;
mod completions;
mod error;
mod fields;
mod generate;
mod grammar;
mod health;
mod info;
mod metrics_page;
mod models;
mod openai;
mod server;
mod sse;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

pub(crate) use app::{App, Serving};
use chat_completions::ChatCompletions;
use completions::Completions;
pub(crate) use server::Server;

/// All endpoints.
pub(crate) fn routes(app: Arc<App>) -> Router {
    Router::new()
        // OpenAI's API.
        .route("/v1/chat/completions", post(openai::endpoint::<ChatCompletions>))
        .route("/v1/completions", post(openai::endpoint::<Completions>))
        .route("/v1/models", get(models::models))
        // TGI's API.
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/", post(generate::root))
        .route("/info", get(info::info))
        // For operators.
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/metrics", get(metrics_page::metrics_page))
        .method_not_allowed_fallback(error::method_not_allowed)
        .fallback(error::not_found)
        .with_state(app)
        // A defect answers one request with 500, and takes nothing else down.
        .layer(CatchPanicLayer::custom(error::panicked))
}
