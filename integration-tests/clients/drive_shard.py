"""Drives one shard by hand, with nothing but what the shard itself tells: drive_shard.py unix:/path/to/shard-0

No generated code: the messages come from server reflection. Prints what it finds as one JSON object: services, health, info, the
KV cache after warmup, and the tokens that follow --ids, each the most likely one, with its log-probability.

Warmup allocates the shard's KV cache anew, so do not point this at a shard that a router is using. How to read the
answers: docs/how-to/debug-a-shard.md.
"""

import argparse
import json

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "lamplighter.shard.v1.Shard"
SEQUENCE_ID = 1

# grpcio sends a socket's path as the name of the host, with characters that HTTP/2 libraries refuse in names (RST_STREAM with
# PROTOCOL_ERROR). Any proper name will do.
CHANNEL_OPTIONS = [("grpc.default_authority", "localhost")]


class Shard:
    """The unary methods of the shard service; requests and answers are dicts with the field names of shard.proto."""

    def __init__(self, channel: grpc.Channel, timeout_s: float) -> None:
        self.channel = channel
        self.timeout_s = timeout_s
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.service = DescriptorPool(self.database).FindServiceByName(SERVICE)

    def services(self) -> list[str]:
        return sorted(self.database.get_services())

    def call(self, method_name: str, **fields) -> dict:
        method = self.service.methods_by_name[method_name]
        request_class = message_factory.GetMessageClass(method.input_type)
        answer_class = message_factory.GetMessageClass(method.output_type)
        send = self.channel.unary_unary(
            f"/{SERVICE}/{method_name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=answer_class.FromString,
        )
        answer = send(json_format.ParseDict(fields, request_class()), timeout=self.timeout_s)
        return json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )


def check_health(channel: grpc.Channel, timeout_s: float) -> dict[str, str]:
    stub = health_pb2_grpc.HealthStub(channel)
    statuses = {}
    for service in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        statuses[service] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return statuses


def new_sequence(token_ids: list[int], max_new_tokens: int) -> dict:
    return {
        "sequence_id": SEQUENCE_ID,
        "token_ids": token_ids,
        "prompt_tokens": len(token_ids),
        "sampling": {"temperature": 0, "top_p": 1, "typical_p": 1, "repetition_penalty": 1},
        "stopping": {"max_new_tokens": max_new_tokens},
        "top_n_tokens": 2,
    }


def generate(shard: Shard, token_ids: list[int], max_new_tokens: int, block_size: int) -> dict:
    """What a router does for one sequence: schedules its tokens and gives it blocks as it grows."""
    tokens, finish_reason = [], "FINISH_REASON_UNSPECIFIED"
    computed, num_blocks = 0, 0
    while finish_reason == "FINISH_REASON_UNSPECIFIED":
        num_tokens = len(token_ids) if computed == 0 else 1
        needed = -(-(computed + num_tokens) // block_size)
        scheduled = {
            "sequence_id": SEQUENCE_ID,
            "num_tokens": num_tokens,
            "append_block_ids": list(range(num_blocks, needed)),
        }
        admit = [new_sequence(token_ids, max_new_tokens)] if computed == 0 else []
        answer = shard.call("Step", step_id=len(tokens) + 1, admit=admit, schedule=[scheduled])
        (output,) = answer["outputs"]
        tokens += output["tokens"]
        finish_reason = output["finish_reason"]
        computed, num_blocks = computed + num_tokens, needed
    shard.call("Step", step_id=len(tokens) + 1, release_sequence_ids=[SEQUENCE_ID])
    return {"tokens": tokens, "finish_reason": finish_reason}


def drive(arguments: argparse.Namespace) -> dict:
    with grpc.insecure_channel(arguments.address, options=CHANNEL_OPTIONS) as channel:
        report = {"health": check_health(channel, arguments.timeout)}
        shard = Shard(channel, arguments.timeout)
        report["services"] = shard.services()
        report["info"] = info = shard.call("Info")
        # Just enough for the one sequence.
        total_tokens = len(arguments.ids) + arguments.tokens
        report["warmup"] = shard.call(
            "Warmup",
            max_step_tokens=len(arguments.ids),
            max_step_sequences=1,
            max_total_tokens=total_tokens,
            kv_cache_tokens=total_tokens,
        )
        report |= generate(shard, arguments.ids, arguments.tokens, info["block_size_tokens"])
    return report


def ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("address", help="unix:/path/to/socket, or host:port")
    parser.add_argument("--ids", type=ids, default=[3, 4, 5], help="token ids of the prompt, with commas between")
    parser.add_argument("--tokens", type=int, default=8, help="how many tokens to generate at most")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for each call")
    print(json.dumps(drive(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
