//! `GET /v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::app::App;

/// The one model that is served.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({
        "object": "list",
        "data": [{
            "id": app.model_name,
            "object": "model",
            "created": app.started_at,
            "owned_by": "lamplighter",
            "max_model_len": app.serving_info().map(|info| info.max_total_tokens),
        }],
    }))
}
