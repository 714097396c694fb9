"""`huggingface_hub.InferenceClient` against a running server: huggingface_client.py URL"""

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


def main() -> None:
    for check in (check_chat, check_text_generation):
        check(sys.argv[1])
        print(check.__name__, "ok")


main()
