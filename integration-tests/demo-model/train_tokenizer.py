#!/usr/bin/env python3
"""Trains the demo model's tokenizer (byte-level BPE) on the generated text and writes it to checkpoint/."""
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from generate_text import document

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
VOCAB_SIZE = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Text like any other, but one token each, so that a tool call has a beginning and an end the model cannot misspell.
MARKERS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_response>", "</tool_response>")
# A word in small letters takes the space before it along, as in other tokenizers. A capitalized word does not: a name is
# then the same tokens after a space, a quote or a line break, and copying one is a lookup. Digits are single for the same
# reason.
SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{Ll}+|\p{Lu}\p{L}*|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s"
TRAINING_SEED, DOCUMENTS = 1000, 30_000


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKERS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    texts = ("".join(text for text, _ in document(TRAINING_SEED, index)) for index in range(DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()

    CHECKPOINT.mkdir(exist_ok=True)
    tokenizer.save(str(CHECKPOINT / "tokenizer.json"), pretty=False)
    template = (pathlib.Path(__file__).parent / "chat_template.jinja").read_text()
    (CHECKPOINT / "chat_template.jinja").write_text(template)
    added = {
        str(token_id): {"content": token.content, "lstrip": False, "normalized": False, "rstrip": False,
                        "single_word": False, "special": token.special}
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>"],
        "bos_token": "<|endoftext|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (CHECKPOINT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
