//! The stream of steps to a rank, with the time that protobuf takes counted as the router's own work.

use http::uri::PathAndQuery;
use proto::client::MAX_MESSAGE_BYTES;
use proto::v1;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::metrics::Stage;

/// Opens the stream: `Run` of `shard.proto`, as the generated client does it, but for the codec.
pub(super) async fn run(
    channel: Channel,
    steps: ReceiverStream<v1::StepRequest>,
) -> Result<Response<Streaming<v1::StepResponse>>, Status> {
    let mut client = Grpc::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = format!("/{}/Run", v1::shard_server::SERVICE_NAME);
    let path = PathAndQuery::try_from(path).expect("a service's name is a valid path");
    client.streaming(Request::new(steps), path, StepCodec).await
}

struct StepCodec;

impl Codec for StepCodec {
    type Encode = v1::StepRequest;
    type Decode = v1::StepResponse;
    type Encoder = TimedEncoder;
    type Decoder = TimedDecoder;

    fn encoder(&mut self) -> TimedEncoder {
        TimedEncoder(ProstCodec::<v1::StepRequest, v1::StepResponse>::default().encoder())
    }

    fn decoder(&mut self) -> TimedDecoder {
        TimedDecoder(ProstCodec::<v1::StepRequest, v1::StepResponse>::default().decoder())
    }
}

struct TimedEncoder(ProstEncoder<v1::StepRequest>);

impl Encoder for TimedEncoder {
    type Item = v1::StepRequest;
    type Error = Status;

    fn encode(&mut self, step: v1::StepRequest, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        Stage::Encode.time(|| self.0.encode(step, buffer))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

struct TimedDecoder(ProstDecoder<v1::StepResponse>);

impl Decoder for TimedDecoder {
    type Item = v1::StepResponse;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<v1::StepResponse>, Status> {
        Stage::Decode.time(|| self.0.decode(buffer))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}
