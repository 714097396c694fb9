//! Lamplighter's shard: owns tensors, computes tokens, knows no text.
//!
//! A step comes in through [`service`] as a `proto::v1::StepRequest`, goes as a command to the one thread of [`engine`],
//! which makes it a [`decoder::ForwardInput`], runs the [`decoder`] and lets `sampling` choose a token from each
//! row of logits. [`models`] makes a decoder from a model directory, with tensors from [`weights`].

mod config;
mod cores;
pub mod decoder;
mod device;
pub mod engine;
mod error;
pub mod models;
mod quantization;
mod sampling;
pub mod service;
mod telemetry;
pub mod weights;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

pub use config::{
    DeviceChoice, Dtype, KvCacheDtype, LoraAdapter, LoraAdapters, Quantization, ShardConfig, ShardPlacement,
};
pub use cores::{Cores, CoresError};
pub use device::{default_num_shards, resolve_device, visible_gpus, why_no_gpu};
pub use error::Error;

/// Serves one rank of a model until SIGTERM (or, unless supervised, SIGINT), which is success, or until it cannot go
/// on, which is an error: whoever started this process ends the other ranks and starts the group anew.
pub fn run(config: ShardConfig, mut placement: ShardPlacement) -> anyhow::Result<()> {
    telemetry::init(&placement)?;
    // Before any thread is there, so that all of them are bound.
    cores::bind(&mut placement)?;
    // One thread is enough for messages: the work is done on the engine's threads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let shutdown = termination(placement.supervised)?;
        service::serve(config, placement, shutdown).await
    });
    // A step that is being computed is not waited for: nobody is there to take its answer.
    runtime.shutdown_background();
    outcome
}

/// Completes when this process is asked to end.
fn termination(supervised: bool) -> anyhow::Result<impl Future<Output = ()>> {
    let handler = |kind| signal(kind).context("installing a signal handler");
    let (mut terminate, mut interrupt) =
        (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                // A terminal sends SIGINT to the launcher too, which lets requests finish before it ends its shards.
                _ = interrupt.recv() => if !supervised { break },
            }
        }
    })
}
