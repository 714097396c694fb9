"""`huggingface_hub.InferenceClient` against a running server: huggingface_client.py URL"""

import json
import os
import sys

# Where nobody listens: what is not sent to the server under test fails at once.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

from huggingface_hub import InferenceClient  # noqa: E402

MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]


def check_chat(url: str) -> None:
    client = InferenceClient(base_url=url)
    answer = client.chat_completion(MESSAGES, temperature=0.0, max_tokens=40)
    assert answer.choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat_completion(MESSAGES, temperature=0.0, max_tokens=40, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == answer.choices[0].message.content


def check_text_generation(url: str) -> None:
    client = InferenceClient(model=url)
    text = client.text_generation("Once upon a time", max_new_tokens=12)
    assert text.startswith("Once upon a time") and len(text) > len("Once upon a time")
    answer = client.text_generation("Once upon a time", max_new_tokens=12, details=True, decoder_input_details=True)
    assert answer.generated_text == text
    assert answer.details.finish_reason in ("length", "eos_token")
    assert len(answer.details.tokens) == answer.details.generated_tokens <= 12
    assert len(answer.details.prefill) > 2
    events = list(client.text_generation("Once upon a time", max_new_tokens=12, details=True, stream=True))
    assert events[-1].generated_text == text
    assert events[-1].details.generated_tokens == len(events)


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "cat"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


def check_grammars(url: str) -> None:
    client = InferenceClient(model=url)
    request = dict(max_new_tokens=60, do_sample=True, seed=5)
    grammar = {"type": "json", "value": SCHEMA}
    text = client.text_generation("A fox is", grammar=grammar, return_full_text=False, **request)
    animal = json.loads(text)
    assert list(animal) == ["animal", "legs"] and animal["animal"] in ("fox", "cat"), text
    pieces = client.text_generation("A fox is", grammar=grammar, stream=True, **request)
    assert "".join(pieces) == text
    grammar = {"type": "regex", "value": "[0-9]{3}-[a-f]{2}"}
    text = client.text_generation("A fox is", grammar=grammar, return_full_text=False, **request)
    assert len(text) == 6 and text[:3].isdigit() and text[3] == "-", text
    chat = InferenceClient(base_url=url)
    response_format = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    answer = chat.chat_completion(MESSAGES, max_tokens=60, seed=5, response_format=response_format)
    assert list(json.loads(answer.choices[0].message.content)) == ["animal", "legs"]


def main() -> None:
    for check in (check_chat, check_text_generation, check_grammars):
        check(sys.argv[1])
        print(check.__name__, "ok")


main()
