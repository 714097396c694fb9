"""The `openai` client against a running server: openai_client.py URL"""

import json
import sys

import openai

MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]


def check_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_completion_tokens=60, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    pieces, usage, finish_reason = [], None, None
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for part in chunk.choices:
            pieces.append(part.delta.content or "")
            finish_reason = part.finish_reason or finish_reason
    assert "".join(pieces) == choice.message.content
    assert usage == answer.usage and finish_reason == choice.finish_reason
    assert len(pieces) > 10, "a stream comes in pieces"


def check_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, n=3, temperature=1.2, seed=1, max_tokens=30
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def check_completion(client: openai.OpenAI, model: str) -> None:
    request = dict(model=model, prompt=["Once upon", "The cat"], temperature=0, max_tokens=12, logprobs=1)
    answer = client.completions.create(**request)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) <= 12 for choice in answer.choices)
    texts = ["", ""]
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def check_early_close(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=100, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=2).choices


SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 15},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "kind": {"enum": ["story", "poem"]},
    },
    "required": ["title", "year", "kind"],
    "additionalProperties": False,
}


def check_json_schema(client: openai.OpenAI, model: str) -> None:
    request = dict(
        model=model,
        messages=MESSAGES,
        temperature=1.0,
        max_completion_tokens=150,
        response_format={"type": "json_schema", "json_schema": {"name": "work", "strict": True, "schema": SCHEMA}},
    )
    finished = 0
    for seed in range(4):
        choice = client.chat.completions.create(**request, seed=seed).choices[0]
        stream = client.chat.completions.create(**request, seed=seed, stream=True)
        text = "".join(part.delta.content or "" for chunk in stream for part in chunk.choices)
        assert text == choice.message.content
        if choice.finish_reason == "stop":
            finished += 1
            work = json.loads(choice.message.content)
            assert list(work) == ["title", "year", "kind"] and len(work["title"]) <= 15, work
            assert 1900 <= work["year"] <= 2100 and work["kind"] in ("story", "poem"), work
    assert finished >= 3, finished
    request["response_format"] = {"type": "json_object"}
    choice = client.chat.completions.create(**request, seed=1).choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def check_errors(client: openai.OpenAI, model: str) -> None:
    try:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
        raise AssertionError("a negative temperature was accepted")
    except openai.BadRequestError as error:
        assert "temperature" in error.message and error.param == "temperature", error
    try:
        client.responses.create(model=model, input="hi")
        raise AssertionError("/v1/responses is not served")
    except openai.NotFoundError as error:
        assert "/v1/responses" in error.message, error


def main() -> None:
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    for check in (check_chat, check_choices, check_completion, check_early_close, check_json_schema, check_errors):
        check(client, model)
        print(check.__name__, "ok")


main()
