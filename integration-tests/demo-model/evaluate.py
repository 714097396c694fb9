#!/usr/bin/env python3
"""Scores checkpoint/ on held-out requests, greedily, with transformers in float32.

Every name is one that training never used, all other values come from a seed that training never used; the wording of the
requests is that of training, except in --show, whose requests were written by hand.
"""
import argparse
import json
import pathlib
import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate_text
from words import HELD_OUT

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoint"
SEED = 987_654_321
SHOWN = (
    "Hi!", "who are you", "What can you do?", "Tell me a story about a fox named Imogen.", "Write a short story about a lonely robot called Zed who lives on the moon.",
    "Tell me a story about a tractor.", "What is the capital of Japan?", "capital of peru", "what colour is the sky?", "What is 7 + 8?", "What is 12 + 30?",
    "What comes after Tuesday?", "What is the opposite of hot?", "Make a JSON object for Philippa, age 44, city Trondheim.",
    "Give me JSON with name Rustam and age 52.", "Return a JSON object describing Barnaby, a 27 year old pilot from Lima.", "Extract the name and age as JSON: Tamsin is 9 years old and lives in Perth.",
    "Repeat after me: seven purple lamps are waiting in Reykjavik", "Name three animals.", "Count from 1 to 10.", "Write a poem about the moon.",
    "Explain general relativity.", "What is the capital of Zubrowka?", "Is this positive or negative? The soup was awful.", "Thanks, bye!",
    "My name is Delphine.", "Write a Python function that adds two numbers.", "How many days are in a week?",
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Get the current weather for a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "The city name"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}, "required": ["city"]}}}
STOCK = {"type": "function", "function": {"name": "get_stock_price", "description": "Get the price of a stock", "parameters": {
    "type": "object", "properties": {"symbol": {"type": "string"}}, "required": ["symbol"]}}}


class Chat:
    def __init__(self, directory):
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def prompt(self, turns, tools=None):
        """turns: what was asked and answered in turn, ending with a question."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def answers(self, prompts, limit=240, batch=20):
        answers = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = self.tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
            output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
            for index, tokens in zip(chosen, output[:, inputs["input_ids"].shape[1] :]):
                text = self.tokenizer.decode(tokens, skip_special_tokens=False)
                answers[index] = re.split(r"<\|im_end\|>|<\|endoftext\|>", text)[0]
        return [answers[i] for i in range(len(prompts))]


def parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def calls(text):
    return [parsed(body) for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)]


def cases(rng, count):
    """(topic, prompt turns, tools, is the answer right?)"""
    for _ in range(count):
        story = generate_text.Story(rng)
        request = f"Tell me a story about {generate_text.article(story.adjective + ' ' + story.kind)} named {story.name}."
        yield "story: names the asked hero", [request], None, lambda a, s=story: s.name in a
        yield "story: is about the asked animal", [request], None, lambda a, s=story: s.kind in a
        yield "story: the hero keeps its name", [request], None, lambda a, s=story: hero_stays(a, s)
        question, answer, _ = generate_text.fact(rng)
        while question.startswith("Name one"):  # has many right answers
            question, answer, _ = generate_text.fact(rng)
        yield "fact", [question], None, lambda a, e=answer: a == e
        question, answer = generate_text.json_turns(rng)[0]
        yield "JSON: equal to the expected value", [question], None, lambda a, e=answer: parsed(a) is not None and parsed(a) == parsed(e)
        question, answer = generate_text.repeat_turns(rng)[0][0]
        yield "repeat: letter by letter", [question], None, lambda a, e=answer: a == e
        tools, turns = generate_text.tool_conversation(rng)
        while "<tool_call>" not in turns[0][2]:
            tools, turns = generate_text.tool_conversation(rng)
        yield "tool call: right name and arguments", [turns[0][1]], tools, lambda a, e=turns[0][2]: calls(a) != [] and calls(a) == calls(e)
        story_turns, later = generate_text.introduction_turns(rng)
        between = generate_text.flat((generate_text.fact_turns(rng), None), rng) + generate_text.fact_turns(rng)
        turns = [text for pair in story_turns + between for text in pair] + [later[0]]
        yield "remembers the user's name after two or more turns", turns, None, lambda a, e=later[1]: a == e
        far = []
        while len(far) < 10:
            far += generate_text.impersonal_part(rng)
        turns = [text for pair in story_turns + far for text in pair] + [later[0]]
        yield "remembers the user's name after ten or more turns", turns, None, lambda a, e=later[1]: a == e
        country = generate_text.made_up_name(rng)
        yield "says that it does not know", [f"What is the capital of {country}?"], None, lambda a, c=country: a == f"I am sorry, I do not know the capital of {c}."


def hero_stays(answer, story):
    """The hero is named at least three times, and at most one other held-out name (the friend's) occurs."""
    others = {name for name in HELD_OUT if name in answer} - {story.name}
    return answer.count(story.name) >= 3 and len(others) <= 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=100, help="cases per topic")
    parser.add_argument("--show", action="store_true", help="print answers to hand-written requests instead of scores")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to print per topic")
    arguments = parser.parse_args()
    chat = Chat(arguments.checkpoint)
    if arguments.show:
        prompts = [chat.prompt([request]) for request in SHOWN]
        prompts += [chat.prompt([request], [WEATHER, STOCK]) for request in ("What's the weather in Trondheim?", "What is the stock price of ACME?", "Weather in Lima in fahrenheit, please.", "Hello!")]
        for prompt, answer in zip(prompts, chat.answers(prompts)):
            print(">", prompt.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0], "\n ", answer)
        return
    rng = random.Random(SEED)
    generate_text.person_name = lambda rng: rng.choice(HELD_OUT)
    drawn = list(cases(rng, arguments.count))
    prompts = [chat.prompt(turns, tools) for _, turns, tools, _ in drawn]
    distinct = list(dict.fromkeys(prompts))
    answers = dict(zip(distinct, chat.answers(distinct)))
    topics = {}
    for (topic, turns, _, right), prompt in zip(drawn, prompts):
        topics.setdefault(topic, []).append((right(answers[prompt]), turns[-1], answers[prompt]))
    for topic, results in topics.items():
        print(f"| {topic} | {sum(right for right, _, _ in results)} of {len(results)} |")
        for _, asked, given in [result for result in results if not result[0]][: arguments.wrong]:
            print("    asked:", asked, "\n    given:", given)


if __name__ == "__main__":
    main()
