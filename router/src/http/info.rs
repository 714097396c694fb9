//! `GET /info`: what is served, and within which limits.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::app::{App, Readiness};

/// TGI's fields, and what it leaves out. Facts that only the shards know are null until they are ready.
pub(super) async fn info(State(app): State<Arc<App>>) -> Json<Value> {
    let status = match app.readiness() {
        Readiness::Starting(_) => "starting",
        Readiness::Ready => "ready",
        Readiness::Draining => "draining",
        Readiness::Failed(_) => "failed",
    };
    let info = app.serving_info();
    Json(json!({
        "model_id": app.model_name,
        "model_sha": null,
        "model_pipeline_tag": "text-generation",
        "model_dtype": info.map(|info| info.dtype.to_string()),
        "model_device_type": info.map(|info| info.device.to_string()),
        "max_concurrent_requests": app.config.max_concurrent_requests,
        "max_best_of": app.config.max_best_of,
        "max_stop_sequences": 4,
        "max_input_tokens": info.map(|info| info.max_input_tokens),
        "max_total_tokens": info.map(|info| info.max_total_tokens),
        "max_batch_prefill_tokens": info.map(|info| info.max_batch_prefill_tokens),
        "max_batch_total_tokens": info.map(|info| info.kv_cache_tokens),
        "max_batch_size": info.map(|info| info.max_batch_size),
        "kv_cache_tokens": info.map(|info| info.kv_cache_tokens),
        "prefix_caching": app.config.prefix_caching,
        "priority_ageing_ms": app.config.priority_ageing_ms,
        "request_timeout": app.config.request_timeout,
        "kv_block_size": info.map(|info| info.block_size),
        "num_shards": info.map(|info| info.num_shards),
        "num_parameters": info.map(|info| info.num_parameters),
        "weight_bytes": info.map(|info| info.weight_bytes),
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "lamplighter",
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
        "status": status,
    }))
}
