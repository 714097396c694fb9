//! `GET /v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::app::App;

/// The model that is served, and its adapters.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let info = app.serving_info();
    let model = |name: &str, parent: Option<&str>| {
        json!({
            "id": name,
            "object": "model",
            "created": app.started_at,
            "owned_by": "lamplighter",
            "parent": parent,
            "max_model_len": info.map(|info| info.max_total_tokens),
        })
    };
    let adapters = info.into_iter().flat_map(|info| &info.adapter_names);
    let adapters = adapters.map(|name| model(name, Some(&app.model_name)));
    let models: Vec<_> = std::iter::once(model(&app.model_name, None)).chain(adapters).collect();
    Json(json!({"object": "list", "data": models}))
}
