//! Errors as gRPC status: the one table.

use tonic::{Code, Status};

use crate::engine::EngineGone;
use crate::error::Error;

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::InvalidArgument { .. } => Code::InvalidArgument,
            Error::NotWarmedUp => Code::FailedPrecondition,
            Error::RunRefused => Code::Aborted,
            Error::OutOfMemory(_) => Code::ResourceExhausted,
            Error::RanksDisagree { .. } | Error::Compute(_) => Code::Internal,
        };
        Status::new(code, error.to_string())
    }
}

impl From<EngineGone> for Status {
    fn from(_: EngineGone) -> Self {
        Status::unavailable("the shard is ending: its log says why")
    }
}

/// What is answered while the model is being loaded.
pub(super) fn loading() -> Status {
    Status::unavailable("the model is being loaded: ask grpc.health.v1.Health until it is SERVING")
}
