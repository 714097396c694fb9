#!/usr/bin/env python3
"""Writes the text that the demo model learns from: conversations and short texts, all made here, none copied.

Everything is drawn from one seeded generator, so a seed and a number name a conversation for ever:
    generate_text.py --seed 7 --count 5         prints five conversations as the model sees them

A model of a few million parameters can learn the form of such text by heart. What it must not learn by heart are the
values: so names, places, numbers and even tool names are often made-up syllables, and the right answer is to copy them.
Names in HELD_OUT never occur here; evaluate.py asks about them.
"""
import argparse
import json
import random
import re

from words import *  # noqa: F403 - word lists only


class Grammar:
    """Expands `[this|that]` to one of the choices and `{slot}` to its value, innermost first."""

    CHOICE = re.compile(r"\[([^\[\]]*)\]")
    SLOT = re.compile(r"\{(\w+)\}")

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, text, **slots):
        while (match := self.CHOICE.search(text)) is not None:
            chosen = self.rng.choice(match.group(1).split("|"))
            text = text[: match.start()] + chosen + text[match.end() :]
        return self.SLOT.sub(lambda match: str(slots[match.group(1)]), text)


KEPT_CAPITAL = {"I", "I'm", "I'd", *NAMES, *CITIES, *DAYS, *MONTHS, *(word for pair in CAPITALS for word in pair)}


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text):
    return text[:1].upper() + text[1:]


def made_up_word(rng, syllables=None):
    count = syllables or rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)) + rng.choice(CODAS)
    return word if len(word) > 2 else word + rng.choice("nrstl")


def made_up_name(rng):
    while True:
        name = capital(made_up_word(rng, rng.choice((1, 2, 2, 3))))
        if name not in HELD_OUT:
            return name


def person_name(rng):
    return made_up_name(rng) if rng.random() < 0.45 else rng.choice(NAMES)


def city_name(rng):
    return made_up_name(rng) if rng.random() < 0.4 else rng.choice(CITIES)


def noun(rng):
    return made_up_word(rng) if rng.random() < 0.3 else rng.choice(OBJECTS + ANIMALS)


def number(rng):
    return rng.choice((rng.randint(0, 20), rng.randint(1, 99), rng.randint(1, 99), rng.randint(100, 9999)))


def join(items, last="and"):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" {last} " + items[-1]


def as_typed(rng, text):
    """People do not always write the capital or the full stop."""
    if rng.random() < 0.12 and text.split()[0].rstrip(",.:!?") not in KEPT_CAPITAL:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12 and text[-1] in ".?!":
        text = text[:-1]
    return text


# --- stories ------------------------------------------------------------------------------------------------------

OPENINGS = (
    "Once upon a time, there was {a_hero} [named|called] {N} who lived {in_place}.",
    "Once upon a time, {in_place}, there lived {a_hero} [named|called] {N}.",
    "{N} was {a_hero}. {He} lived {in_place}.",
    "There once was {a_hero} [named|called] {N}. {He} lived {in_place}.",
    "{A_hero} [named|called] {N} lived {in_place}.",
    "Long ago, {in_place}, there was {a_hero} [named|called] {N}.",
)
HABITS = (
    "Every [morning|evening|day], {N} [went for a walk|sang a little song|looked at the sky|drank a cup of tea|waved to the sun|swept the floor|fed the birds].",
    "{N} loved [the rain|the sun|music|warm bread|quiet evenings|long walks|funny songs|the smell of flowers].",
    "The {kind} was very {adj}, and everyone knew {N}.",
    "Nobody was as {adj} as {N} the {kind}.",
    "",
    "",
)
TREASURES = (
    "{N} had {a_obj} and [took it everywhere|loved it very much|kept it under the bed|was very proud of it].",
    "[The best thing|The dearest thing|What] {N} had was {a_obj}.",
    "{He} owned {a_obj}, and it was {his} favourite thing.",
)
PLOTS = (
    # lost and found
    "One [day|morning], {N} lost {his} {obj}. {He} looked [under the bed|behind the door|in the kitchen] and [in the garden|under the table|behind the old tree], but it was not there. \"Where is my {obj}?\" [cried|said|asked] {N}. Then {F} the {f} came along. \"I saw a {obj} [near the river|on the hill|by the old bridge|under the bench],\" said {F}. They [ran|went|walked] there together, and there it was! \"Thank you, {F}!\" said {N}.",
    # found and given back
    "One [day|afternoon], {N} found {a_obj} [on the road|in the grass|by the water|under a tree]. \"[Who has lost this|Whose is this]?\" said the {kind}. {N} asked [the neighbours|everyone in the street|the old miller], but nobody knew. At last {N} met {F} the {f}, who was crying. \"I have lost my {obj},\" said {F}. {N} [smiled|laughed] and gave it back. {F} was so [happy|glad] that {he_f} danced.",
    # the storm
    "One [night|evening], a great storm came. The wind [blew|howled] and the rain fell on the roof. {N} [heard a knock at the door|heard a small voice outside]. It was {F} the {f}, all wet and cold. \"Please let me in,\" said {F}. \"Of course,\" said {N}, and [made some hot soup|lit a fire|found a warm blanket]. They [told stories|played games|sang songs] until the storm was over. In the morning the sun was shining again.",
    # a new skill
    "One day, {N} wanted to learn to {skill}. At first it was [very hard|not easy at all]. {He} tried once, and it went wrong. {He} tried again, and it went wrong again. \"[Do not give up|Try once more|Keep going],\" said {F} the {f}. So {N} [practised every day|tried every morning]. After [a week|a month|seven days], the {kind} could {skill} better than anyone. \"You see?\" said {F}. \"[Practice helps|You only had to keep trying].\"",
    # baking
    "One [day|morning], {N} baked a big {baked}. It smelled so good that {F} the {f} came to the window. \"[May I have a piece|Is that {baked}]?\" asked {F}. {N} thought for a moment. There was not much, but sharing is better than eating alone. \"Come in,\" said the {kind}. They ate the {baked} together, and it was the best {baked} of [the year|their lives].",
    # lonely
    "But {N} was lonely, because {he} had no friends. One day, {he} met {F}, {a_f}. {F} was [sitting on a stone|looking at the clouds|counting leaves]. \"[Would you like to play|Shall we be friends]?\" asked {N}. \"Yes, I would like that,\" said {F}. They [played hide and seek|built a tower of stones|ran through the grass] all day long. After that, {N} was never lonely again.",
    # a seed
    "One [spring|day in spring], {N} planted a small seed. {He} gave it water every day. The first week, nothing happened. \"[Be patient|You must wait],\" said {F} the {f}. The second week, a green leaf came out of the ground. In summer there was a tall {plant}, and all the [neighbours|children|birds] came to see it. {N} was very proud.",
    # a journey
    "One day, {N} found an old map. It showed the way to {goal}. {N} packed [some bread|an apple|a bottle of water] and asked {F} the {f} to come along. They walked [over the hills|through a dark wood|along the river] and crossed [a small bridge|a wide field|a cold stream]. In the evening they came to {goal}. There they found {a_obj}. \"This is the best day ever,\" said {N}.",
    # a race
    "One day, there was a great race. {F} the {f} said, \"I am much faster than you.\" {N} said nothing and [tied {his} shoes|smiled|took a deep breath]. {F} ran fast, but soon {he_f} [was tired|fell asleep under a tree|stopped to eat]. {N} went slowly and never stopped. In the end the {kind} was first. \"Slow and steady,\" said {N}, and {F} [laughed|had to laugh too].",
    # the lamp
    "But {N} was afraid of the dark. Every night, {he} hid under the blanket. One evening, {F} the {f} brought a little lamp. \"[Light this when you are afraid|This lamp will keep you company],\" said {F}. {N} lit the lamp, and the whole room was [golden|warm and bright]. The shadows were only [a chair and a coat|the old tree at the window]. From then on, the {kind} was not afraid any more.",
    # stuck
    "One day, {N} heard a cry for help. It was {F} the {f}, who was stuck in [a deep hole|the mud|a thorny bush]. {N} pulled and pulled, but {he} was not strong enough. Then {he} had an idea. {He} [fetched a long rope|called all the neighbours|found a strong branch]. One, two, three, and {F} was free! \"You are a true friend, {N},\" said {F}.",
    # building
    "One day, {N} wanted to build a {build}. {He} collected [wood and nails|sticks and stones|boards and rope]. {F} the {f} came to help. They worked [all day|for three days|from morning to evening]. When the {build} was ready, they painted it {colour}. \"It is the most beautiful {build} in the world,\" said {F}. And {N} thought so too.",
    # the birthday
    "Soon it was {F}'s birthday, and {N} wanted to find a present for {F} the {f}. {He} looked in [the shop|the market|every drawer], but nothing was right. So {N} made {a_obj} with {his} own hands. {F} opened the box and [laughed with joy|could not believe it]. \"{A_obj}! This is just what I wanted,\" said {F}. They ate {food} until it was dark.",
    # a wish
    "One night, {N} saw a falling star and made a wish. \"I wish for {a_obj},\" whispered the {kind}. In the morning, {a_obj} lay [in front of the door|on the window sill|beside the bed]. {N} could not believe it. {He} showed it to {F} the {f}. \"Now we can play together,\" said {F}. And {N} knew that a friend was even better than a wish.",
)
ENDINGS = (
    "From that day on, {N} and {F} were best friends.",
    "That night, {N} slept well and dreamed about {the_place}.",
    "And they lived happily {in_place}.",
    "And if {N} the {kind} has not moved away, {he} still lives {in_place}.",
    "{N} never forgot that day.",
    "And so the {adj} {kind} was happy. The end.",
    "The end.",
    "That is the story of {N}, the {adj} {kind}.",
)
LINKS = (
    "The next day, {N} [woke up early|got up with the sun].",
    "A few days later, {N} had another adventure.",
    "Some time passed, and {N} the {kind} was happy.",
    "After that, {N} and {F} had a good rest.",
)
STORY_REQUESTS = (
    "[Tell me|Write|Write me|Please tell me|Make up|Can you tell me|I would like] a [|short |little |nice ]story about {topic}{end}",
    "[Tell|Write] a [|short |little ]story about {topic}{end}",
    "[I want to hear|Give me] a [|short ]story about {topic}{end}",
    "[Story|A story] about {topic}, please{end}",
)


class Story:
    """A hero, a friend and a place; whatever the request names is used, the rest is drawn."""

    def __init__(self, rng):
        self.rng, self.grammar = rng, Grammar(rng)
        animal = rng.random() < 0.75
        self.kind = (made_up_word(rng) if rng.random() < 0.12 else rng.choice(ANIMALS)) if animal else rng.choice(PEOPLE)
        self.name = person_name(rng)
        self.adjective = rng.choice(ADJECTIVES)
        self.friend_kind = rng.choice([a for a in ANIMALS + PEOPLE if a != self.kind])
        self.friend = person_name(rng)
        while self.friend == self.name:
            self.friend = person_name(rng)
        self.object = made_up_word(rng) if rng.random() < 0.1 else rng.choice(OBJECTS)
        self.object_adjective = rng.choice(OBJECT_ADJECTIVES)
        self.place = rng.choice(PLACES) if rng.random() < 0.7 else "in " + city_name(rng)
        self.she = self.kind in ("girl", "woman", "queen", "princess", "grandmother") or (
            self.kind not in ("boy", "man", "king", "prince", "grandfather") and rng.random() < 0.5)
        self.wants = {}

    def slots(self):
        obj = f"{self.object_adjective} {self.object}"
        preposition, _, place = self.place.partition(" ")
        del preposition
        hero = f"{self.adjective} {self.kind}"
        return {
            "N": self.name, "F": self.friend, "f": self.friend_kind, "a_f": article(self.friend_kind),
            "kind": self.kind, "adj": self.adjective, "a_hero": article(hero), "A_hero": capital(article(hero)),
            "obj": obj, "a_obj": article(obj), "A_obj": capital(article(obj)), "in_place": self.place, "the_place": place,
            "he": "she" if self.she else "he", "He": "She" if self.she else "He", "his": "her" if self.she else "his",
            "he_f": "she" if self.friend_kind in ("girl", "woman", "queen", "princess", "grandmother") else "he",
            "skill": self.rng.choice(SKILLS), "food": self.rng.choice(FOODS), "baked": self.rng.choice(BAKED),
            "plant": self.rng.choice(PLANTS), "goal": self.rng.choice(GOALS), "build": self.rng.choice(BUILDS),
            "colour": self.rng.choice(COLOURS),
        }

    def request(self):
        """A user's request that names some of the parts."""
        rng, grammar = self.rng, self.grammar
        use_adjective = rng.random() < 0.4
        topic = article(f"{self.adjective} {self.kind}" if use_adjective else self.kind)
        shape = rng.random()
        if shape < 0.62:
            topic += grammar(" [named|called|named|whose name is] {N}", N=self.name)
        elif shape < 0.72:
            topic = f"{self.name} the {self.kind}"
        elif shape < 0.77:
            topic = self.name
        if rng.random() < 0.22:
            topic += grammar(" [who lives|living|that lives] {p}", p=self.place)
        if rng.random() < 0.22:
            topic += grammar(" [with|and] {o}", o=article(f"{self.object_adjective} {self.object}"))
            self.wants["object"] = True
        elif rng.random() < 0.18:
            topic += grammar(" [and|and a friend named] {F}", F=self.friend) if rng.random() < 0.5 else (
                f" and {self.friend} the {self.friend_kind}")
        return as_typed(rng, grammar(rng.choice(STORY_REQUESTS), topic=topic, end=rng.choice((".", ".", "", "!"))))

    def text(self, plots=1, paragraphs=False):
        rng, grammar, slots = self.rng, self.grammar, self.slots()
        parts = [rng.choice(OPENINGS)]
        parts.append(rng.choice(HABITS))
        chosen = rng.sample(PLOTS, plots)
        if self.wants.get("object"):
            parts.append(rng.choice(TREASURES))
        sections = [parts]
        for index, plot in enumerate(chosen):
            if index:
                sections.append([rng.choice(LINKS)])
            sections[-1].append(plot)
        sections[-1].append(rng.choice(ENDINGS))
        gap = "\n\n" if paragraphs else " "
        return gap.join(" ".join(grammar(part, **slots) for part in section if part) for section in sections)

    def question(self):
        """A question about the story just told, and its answer."""
        name, kind = self.name, self.kind
        return self.rng.choice((
            (f"What was the name of the {kind}?", f"The {kind} was named {name}."),
            (f"What was the {kind}'s name?", f"The {kind}'s name was {name}."),
            ("Who was the story about?", f"The story was about {name}, {article(self.adjective + ' ' + kind)}."),
            (f"What animal was {name}?" if kind in ANIMALS else f"Who was {name}?", f"{name} was {article(kind)}."),
            (f"Where did {name} live?", f"{name} lived {self.place}."),
            (f"Was {name} {self.adjective}?", f"Yes, {name} was a very {self.adjective} {kind}."),
            (f"Did you like {name}?", f"Yes, I like {name}. A {self.adjective} {kind} is good company."),
        ))


def story_turns(rng):
    story = Story(rng)
    shape = rng.random()
    if shape < 0.07:
        request = Grammar(rng)("[Tell me a story|Please tell me a story|Can you tell me a story|A story, please|Tell me something|Tell me a bedtime story|Write a story]") + rng.choice((".", "!", "?", ""))
        turns = [(as_typed(rng, request), story.text())]
    elif shape < 0.13:
        request = story.request()
        request = re.sub(r"\b(short |little |nice )?story", "long story", request, count=1)
        turns = [(request, story.text(plots=rng.choice((2, 3)), paragraphs=True))]
    else:
        turns = [(story.request(), story.text())]
    while rng.random() < 0.3 and len(turns) < 4:
        question, answer = story.question()
        if question not in [q for q, _ in turns]:
            turns.append((as_typed(rng, question), answer))
    if rng.random() < 0.12:
        other = Story(rng)
        turns.append((as_typed(rng, Grammar(rng)("[Now|And now|Next] [tell me one|one|a story] about {k} named {n}.", k=article(other.kind), n=other.name)), other.text()))
    return turns


def poem_turns(rng):
    thing = noun(rng) if rng.random() < 0.6 else rng.choice(ANIMALS)
    grammar = Grammar(rng)
    poem = grammar(rng.choice(POEMS), thing=thing, Thing=capital(thing), a_thing=article(thing), A_thing=capital(article(thing)))
    return [(as_typed(rng, grammar("[Write|Tell me|Write me|Make] a [|short |little ]poem about {t}.", t=article(thing))), poem)]


# --- facts --------------------------------------------------------------------------------------------------------

def fact(rng):
    """A question, the full answer, and the answer in a word or two."""
    grammar = Grammar(rng)
    return rng.choices(FACT_MAKERS, weights=[w for _, w in FACT_WEIGHTS])[0](rng, grammar)


def capital_fact(rng, grammar):
    country, city = rng.choice(CAPITALS)
    if rng.random() < 0.12:
        return grammar("[Which country has the capital {c}|{c} is the capital of which country]?", c=city), f"{city} is the capital of {country}.", country
    question = grammar("[What is the capital of {x}|What's the capital of {x}|Which city is the capital of {x}|Do you know the capital of {x}|Tell me the capital of {x}|What is the capital city of {x}|{x}: what is its capital|Capital of {x}|The capital of {x} is]?", x=country)
    if rng.random() < 0.08:
        question = question.lower()
    return question, f"The capital of {country} is {city}.", city


def colour_fact(rng, grammar):
    thing, colour = rng.choice(THING_COLOURS)
    return grammar("[What colour is {t}|What color is {t}|Which colour is {t}|Which colour does {t} have|Tell me the colour of {t}]?", t=thing), f"{capital(thing)} is {colour}.", colour


def opposite_fact(rng, grammar):
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    return grammar("[What is the opposite of {w}|What's the opposite of {w}|What is the opposite of \"{w}\"|Tell me the opposite of {w}|Opposite of {w}|The opposite of {w}]?", w=word), f"The opposite of {word} is {other}.", other


def sound_fact(rng, grammar):
    animal, sound = rng.choice(SOUNDS)
    return grammar("[What does {a} say|What sound does {a} make|Which sound does {a} make|How does {a} sound]?", a=article(animal)), f"{capital(article(animal))} says {sound}.", sound


def young_fact(rng, grammar):
    animal, young = rng.choice(YOUNG)
    return grammar("[What is a baby {a} called|What do you call a baby {a}|What is a young {a} called]?", a=animal), f"A baby {animal} is called {article(young)}.", young


def legs_fact(rng, grammar):
    animal, legs = rng.choice(LEGS)
    return grammar("[How many legs does {a} have|How many legs has {a}|Number of legs of {a}]?", a=article(animal)), f"{capital(article(animal))} has {legs} legs.", legs


def sequence_fact(rng, grammar):
    kind, items = rng.choice((("day", DAYS), ("month", MONTHS)))
    index = rng.randrange(len(items))
    shape = rng.random()
    if shape < 0.5:
        item, after = items[index], items[(index + 1) % len(items)]
        return grammar("[What {k} comes after {x}|Which {k} comes after {x}|What comes after {x}|Which {k} follows {x}|What is the {k} after {x}]?", k=kind, x=item), f"{after} comes after {item}.", after
    if shape < 0.8:
        item, before = items[index], items[index - 1]
        return grammar("[What {k} comes before {x}|Which {k} comes before {x}|What comes before {x}|What is the {k} before {x}]?", k=kind, x=item), f"{before} comes before {item}.", before
    ordinal = ORDINALS[index]
    of = "week" if kind == "day" else "year"
    return grammar("[What is|Which is|Tell me] the {o} {k} of the {of}?", o=ordinal, k=kind, of=of), f"The {ordinal} {kind} of the {of} is {items[index]}.", items[index]


def count_fact(rng, grammar):
    what, where, count = rng.choice(COUNTS)
    return grammar("[How many {w} are there in {x}|How many {w} are in {x}|How many {w} does {x} have|Tell me how many {w} are in {x}]?", w=what, x=where), f"There are {count} {what} in {where}.", count


def animal_kind_fact(rng, grammar):
    category, members = rng.choice(list(CATEGORIES.items()))
    if category in ("days", "months"):
        return sequence_fact(rng, grammar)
    member = rng.choice(members)
    singular = SINGULARS[category]
    if rng.random() < 0.6:
        return grammar("[Is {m} {s}|Would you say that {m} is {s}]?", m=member if category in ("colours", "cities", "countries", "planets", "seasons") else article(member), s=article(singular)), grammar("Yes, {m} is {s}.", m=member if category in ("colours", "cities", "countries", "planets", "seasons") else article(member), s=article(singular)), "Yes"
    return f"Name one {singular}.", f"{capital(article(member) if category not in ('colours', 'cities', 'countries', 'planets', 'seasons') else member)} is {article(singular)}.", member


def arithmetic_fact(rng, grammar):
    shape = rng.random()
    if shape < 0.62:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        sign, word, result = "+", "plus", a + b
    elif shape < 0.86:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        a, b = max(a, b), min(a, b)
        sign, word, result = "-", "minus", a - b
    else:
        a, b = rng.randint(1, 5), rng.randint(1, 5)
        sign, word, result = "*", "times", a * b
    how = rng.random()
    if how < 0.55:
        expression = f"{a} {sign} {b}" if rng.random() < 0.85 else f"{a}{sign}{b}"
        answer = f"{a} {sign} {b} = {result}" + rng.choice((".",) * 1)
    else:
        expression = f"{a} {word} {b}"
        answer = f"{a} {word} {b} is {result}."
    question = grammar("[What is {e}?|What's {e}?|How much is {e}?|Calculate {e}.|Compute {e}.|{e} = ?|What does {e} make?|Please calculate {e}.|{e}]", e=expression)
    return question, answer, str(result)


def bigger_fact(rng, grammar):
    a, b = rng.sample(range(0, 21), 2)
    if rng.random() < 0.6:
        return grammar("[Which is bigger, {a} or {b}|Which number is larger, {a} or {b}|What is more, {a} or {b}]?", a=a, b=b), f"{max(a, b)} is bigger than {min(a, b)}.", str(max(a, b))
    return grammar("[Which is smaller, {a} or {b}|Which number is smaller, {a} or {b}|What is less, {a} or {b}]?", a=a, b=b), f"{min(a, b)} is smaller than {max(a, b)}.", str(min(a, b))


FACT_WEIGHTS = (
    (capital_fact, 5), (colour_fact, 3), (opposite_fact, 4), (sound_fact, 2), (young_fact, 2), (legs_fact, 2),
    (sequence_fact, 3), (count_fact, 2), (animal_kind_fact, 2), (arithmetic_fact, 7), (bigger_fact, 1.5),
)
FACT_MAKERS = [maker for maker, _ in FACT_WEIGHTS]


def fact_turns(rng):
    question, answer, short = fact(rng)
    if rng.random() < 0.1:
        form = rng.choice(("Answer with one word: {q}", "{q} Answer with one word.", "{q} Just the answer, please.", "In one word: {q}"))
        return [(form.format(q=question), short)]
    return [(as_typed(rng, question), answer)]


def list_turns(rng):
    category, members = rng.choice(list(CATEGORIES.items()))
    grammar = Grammar(rng)
    if category in ("days", "months", "seasons", "planets") and rng.random() < 0.5:
        of = {"days": "days of the week", "months": "months of the year", "seasons": "seasons", "planets": "planets"}[category]
        return [(as_typed(rng, grammar("[Name|List|Tell me|What are] [all |]the {of}.", of=of)), "\n".join(f"{i}. {m}" for i, m in enumerate(members, 1)))]
    count = rng.randint(2, min(6, len(members)))
    chosen = rng.sample(members, count)
    if category in ("days", "months"):
        start = rng.randrange(len(members) - count + 1)
        chosen = members[start : start + count]
    request = grammar("[Name|List|Give me|Tell me|Can you name] {n} {c}", n=rng.choice((count, NUMBER_WORDS[count])), c=category)
    if rng.random() < 0.3:
        form = rng.choice((" as a JSON list", " in a JSON array", " as a JSON array"))
        return [(as_typed(rng, request + form + "."), json.dumps(chosen))]
    if rng.random() < 0.25:
        return [(as_typed(rng, request + grammar(" [in one line|separated by commas].")), ", ".join(chosen))]
    return [(as_typed(rng, request + "."), "\n".join(f"{i}. {m}" for i, m in enumerate(chosen, 1)))]


def count_turns(rng):
    start = rng.choice((1, 1, 1, rng.randint(0, 10)))
    end = start + rng.randint(2, 19)
    if end > 20:
        end = 20
    if rng.random() < 0.2:
        return [(as_typed(rng, f"Count down from {end} to {start}."), ", ".join(str(n) for n in range(end, start - 1, -1)))]
    request = Grammar(rng)("[Count from {a} to {b}.|Please count from {a} to {b}.|Can you count from {a} to {b}?|Write the numbers from {a} to {b}.]", a=start, b=end)
    return [(as_typed(rng, request), ", ".join(str(n) for n in range(start, end + 1)))]


def sentiment_turns(rng):
    good = rng.random() < 0.5
    text = Grammar(rng)(rng.choice(SENTIMENT_FRAMES), what=rng.choice(REVIEWED), how=rng.choice(GOOD_WORDS if good else BAD_WORDS))
    request = rng.choice(SENTIMENT_REQUESTS).format(text=text)
    return [(request, "positive" if good else "negative")]


# --- talk ---------------------------------------------------------------------------------------------------------

def talk_turns(rng):
    grammar = Grammar(rng)
    requests, answers, _ = rng.choices(TALK, weights=[weight for _, _, weight in TALK])[0]
    return [(as_typed(rng, grammar(rng.choice(requests))), grammar(rng.choice(answers)))]


def unknown_turns(rng):
    grammar = Grammar(rng)
    shape = rng.random()
    if shape < 0.25:
        country = made_up_name(rng)
        question = grammar("[What is the capital of {x}|Which city is the capital of {x}|Do you know the capital of {x}]?", x=country)
        return [(as_typed(rng, question), f"I am sorry, I do not know the capital of {country}.")]
    if shape < 0.7:
        topic = rng.choice(TOPICS) if rng.random() < 0.6 else f"{rng.choice(('', 'the ', 'the history of ', 'the meaning of '))}{made_up_word(rng)}"
        question = grammar("[Explain {t}.|What do you know about {t}?|Tell me about {t}.|What is {t}?|How does {t} work?|Why is {t} important?|Can you explain {t}?|Describe {t}.|Write an essay about {t}.]", t=topic)
        return [(as_typed(rng, question), grammar("I am sorry, I do not know [anything|much] about {t}. [I am only a small demo model.|I can tell a story, answer a simple question or fill in JSON.|I am a very small model.]", t=topic))]
    if shape < 0.8:
        name = f"{person_name(rng)} {made_up_name(rng)}"
        return [(as_typed(rng, grammar("[Who is {n}|Who was {n}|Do you know {n}|Tell me about {n}]?", n=name)), f"I am sorry, I do not know who {name} is.")]
    question = grammar(rng.choice(UNKNOWN_QUESTIONS), n=person_name(rng), c=city_name(rng), w=made_up_word(rng))
    return [(as_typed(rng, question), grammar(rng.choice(UNKNOWN_ANSWERS)))]


def introduction_turns(rng):
    grammar = Grammar(rng)
    name = person_name(rng)
    turns = [(grammar("[Hi, I'm {n}.|Hello, I am {n}.|My name is {n}.|Hello! My name is {n}.|Hi! I am {n}.|I am {n}, and who are you?|Hi, my name is {n}|Call me {n}.]", n=name),
              grammar("[Hello, {n}!|Hi, {n}!|Nice to meet you, {n}!] [I am Lamplighter's demo model.|I am Lamplighter's demo model. How can I help you?|How can I help you?]", n=name))]
    return turns, (grammar("[What is my name?|What's my name?|Do you remember my name?|Who am I?|What am I called?|Can you say my name?]"), f"Your name is {name}.")


FACTS_ABOUT_ME = (
    ("favourite colour", lambda rng: rng.choice(COLOURS)), ("favourite animal", lambda rng: f"the {rng.choice(ANIMALS)}"),
    ("favourite number", lambda rng: number(rng)), ("favourite food", lambda rng: rng.choice(FOODS)),
    ("dog's name", person_name), ("cat's name", person_name), ("sister's name", person_name), ("brother's name", person_name),
    ("city", city_name), ("job", lambda rng: rng.choice(JOBS)), ("code", lambda rng: rng.randint(100, 9999)),
    ("secret word", made_up_word), ("password", made_up_word), ("friend's name", person_name), ("favourite city", city_name),
    ("lucky number", lambda rng: number(rng)), ("teacher's name", person_name),
)


def memory_turns(rng):
    """Something the user says, and a later question about it."""
    grammar = Grammar(rng)
    what, draw = rng.choice(FACTS_ABOUT_ME)
    value = draw(rng)
    shown = what.replace("favourite", rng.choice(("favourite", "favorite")))
    told = grammar("[My {w} is {v}.|Remember that my {w} is {v}.|Please remember: my {w} is {v}.|I want you to know that my {w} is {v}.]", w=shown, v=value)
    reply = grammar("[I will remember that your {w} is {v}.|Thank you. Your {w} is {v}.|Good to know! Your {w} is {v}.|All right, your {w} is {v}.]", w=what, v=value)
    asked = grammar("[What is my {w}?|What's my {w}?|Do you remember my {w}?|Tell me my {w}.|What did I say my {w} was?]", w=shown)
    return [(told, reply)], (asked, f"Your {what} is {value}.")


def sentence(rng):
    """A sentence to be repeated: known words in any order, so that it cannot be guessed."""
    grammar = Grammar(rng)
    shape = rng.random()
    if shape < 0.25:
        return " ".join(noun(rng) if rng.random() < 0.6 else rng.choice(ADJECTIVES + COLOURS) for _ in range(rng.randint(1, 7)))
    if shape < 0.4:
        return " ".join(made_up_word(rng) for _ in range(rng.randint(1, 5)))
    if shape < 0.5:
        return " ".join(str(number(rng)) for _ in range(rng.randint(1, 6)))
    if shape < 0.6:
        return " ".join(person_name(rng) for _ in range(rng.randint(1, 5)))
    frames = (
        "{n} [saw|likes|found|lost|bought|painted|has] {c} {a} {o}{s}", "The {adj} {k} [lives|works|sleeps|sings] in {city}{s}",
        "[I like|We have|They want|You need] {num} {a} {o2}{s}", "{n} and {n2} went to {city} [on {day}|by train|yesterday]{s}",
        "{n} is {num} years old and lives in {city}{s}", "Please [bring|give|send] the {a} {o} to {n}{s}",
        "The {o} is {colour}, and the {k} is {adj}{s}", "[Good morning|Hello|Goodbye|Thank you], {n}{s}",
    )
    return grammar(rng.choice(frames), n=person_name(rng), n2=person_name(rng), c=rng.choice(("a", "one", "the")), a=rng.choice(OBJECT_ADJECTIVES), o=noun(rng),
                   o2=noun(rng) + "s", adj=rng.choice(ADJECTIVES), k=rng.choice(ANIMALS + PEOPLE), city=city_name(rng), num=number(rng),
                   day=rng.choice(DAYS), colour=rng.choice(COLOURS), s=rng.choice((".", ".", "!", "")))


def repeat_turns(rng):
    grammar = Grammar(rng)
    text = sentence(rng)
    shape = rng.random()
    if shape < 0.62:
        request = rng.choice(("Repeat after me: {t}", "Repeat: {t}", "Say: {t}", "Please repeat: {t}", "Repeat this: {t}", "Repeat this sentence: {t}",
                              "Say \"{t}\"", "Repeat \"{t}\"", "Echo: {t}", "Copy this text: {t}", "Can you repeat this? {t}", "Say exactly this: {t}", "Please say \"{t}\".", "Write \"{t}\"")).format(t=text)
        turns = [(request, text)]
    elif shape < 0.72:
        word = rng.choice((made_up_word(rng), noun(rng), person_name(rng)))
        times = rng.randint(2, 5)
        turns = [(grammar("[Say|Write|Repeat] [the word |]{w} {t} times.", w=word, t=NUMBER_WORDS[times]), " ".join([word] * times))]
    elif shape < 0.9:
        words = [noun(rng) for _ in range(rng.randint(3, 6))] if rng.random() < 0.6 else [person_name(rng) for _ in range(rng.randint(3, 5))]
        which = rng.choice(("first", "last", "second"))
        word = words[{"first": 0, "last": -1, "second": 1}[which]]
        turns = [(f"What is the {which} word? {' '.join(words)}" if rng.random() < 0.5 else f"Tell me the {which} word of this: {', '.join(words)}", f"The {which} word is {word}.")]
    else:
        words = [noun(rng) for _ in range(rng.randint(2, 5))]
        turns = [(f"Turn this into a JSON list: {join(words)}" if rng.random() < 0.6 else f"Write {join(words)} as a JSON array.", json.dumps(words))]
    later = (grammar("[What did I just say?|What did I say?|What was my last message?|Can you repeat what I said?]"), f"You said: {turns[0][0]}")
    return turns, later


# --- JSON ---------------------------------------------------------------------------------------------------------

def json_fields(rng):
    """Ordered (key, value, how to say it) triples."""
    if rng.random() < 0.15:
        keys = rng.sample(KEYS, rng.randint(1, 4)) if rng.random() < 0.5 else [made_up_word(rng) for _ in range(rng.randint(1, 4))]
        values = [rng.choice((number(rng), person_name(rng), noun(rng), rng.random() < 0.5)) for _ in keys]
        return [(k, v, f"{k} {json.dumps(v) if isinstance(v, bool) else v}") for k, v in zip(dict.fromkeys(keys), values)]
    name, age, city = person_name(rng), rng.randint(2, 99), city_name(rng)
    sets = {
        "person": [("name", name, name), ("age", age, rng.choice((f"age {age}", f"{age} years old", f"aged {age}"))),
                   ("city", city, rng.choice((f"from {city}", f"who lives in {city}", f"city {city}", f"living in {city}")))],
        "pet": [("name", name, name), ("animal", (a := rng.choice(ANIMALS)), rng.choice((article(a), f"animal {a}", f"the {a}"))),
                ("colour", (c := rng.choice(COLOURS)), rng.choice((f"colour {c}", f"which is {c}", c)))],
        "item": [("item", (o := noun(rng)), rng.choice((article(o), f"item {o}"))), ("quantity", (q := rng.randint(1, 99)), f"quantity {q}"),
                 ("price", (p := rng.randint(1, 999)), rng.choice((f"price {p}", f"at a price of {p}")))],
        "book": [("title", (t := f"The {capital(rng.choice(ADJECTIVES))} {capital(noun(rng))}"), rng.choice((t, f"title {t}"))),
                 ("author", (w := f"{person_name(rng)} {made_up_name(rng)}"), rng.choice((f"by {w}", f"author {w}"))), ("year", (y := rng.randint(1800, 2025)), rng.choice((f"year {y}", f"from {y}")))],
        "trip": [("from", (f := city_name(rng)), f"from {f}"), ("to", (t2 := city_name(rng)), f"to {t2}"), ("day", (d := rng.choice(DAYS)), f"on {d}")],
    }
    kind = rng.choices(list(sets), weights=(5, 2, 2, 1, 1))[0]
    fields = sets[kind]
    if kind == "person":
        if rng.random() < 0.35:
            job = rng.choice(JOBS)
            fields.append(("job", job, rng.choice((f"job {job}", f"who works as {article(job)}", f"works as {article(job)}"))))
        if rng.random() < 0.2:
            colour = rng.choice(COLOURS)
            fields.append(("colour", colour, f"favourite colour {colour}"))
        if rng.random() < 0.12:
            active = rng.random() < 0.5
            fields.append(("active", active, "active" if active else "not active"))
    if rng.random() < 0.3:
        fields = fields[: rng.randint(1, len(fields))]
    return fields


JSON_TYPES = {str: "string", int: "integer", bool: "boolean"}


def object_schema(fields):
    return {"type": "object", "properties": {k: {"type": JSON_TYPES[type(v)]} for k, v, _ in fields}, "required": [k for k, _, _ in fields]}


def json_text(rng, value):
    """JSON as different serializers write it: spaces or none, keys as given or sorted."""
    style = rng.random()
    if style < 0.6:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=style > 0.8)


def json_turns(rng):
    grammar = Grammar(rng)
    if rng.random() < 0.08:
        people = [(person_name(rng), rng.randint(1, 99)) for _ in range(rng.randint(2, 4))]
        told = join([f"{n} is {a}" for n, a in people])
        return [(grammar("[Make a JSON list of these people: {t}.|{t}. Write this as a JSON list with name and age.]", t=told), json.dumps([{"name": n, "age": a} for n, a in people]))]
    fields = json_fields(rng)
    value = {k: v for k, v, _ in fields}
    keys = [k for k, _, _ in fields]
    said = ", ".join(s for _, _, s in fields)
    shape = rng.random()
    compact = False
    if shape < 0.3:
        request = grammar("[Make|Create|Write|Give me|Return|I need] a JSON object for {s}.", s=said)
    elif shape < 0.42:
        shown = [f"{k}={json.dumps(v) if isinstance(v, bool) else v}" if rng.random() < 0.5 else f"{k}: {json.dumps(v) if isinstance(v, bool) else v}" for k, v in value.items()]
        request = grammar("[Make|Write|Return|Create] [JSON|a JSON object] with {s}.", s=", ".join(shown))
    elif shape < 0.56 and keys[:3] == ["name", "age", "city"]:
        told = grammar("[{n} is {a} years old and lives in {c}.|{n}, {a}, lives in {c}.|My name is {n}, I am {a} and I live in {c}.|{n} lives in {c} and is {a} years old.|I met {n} from {c}, who is {a}.]", n=value["name"], a=value["age"], c=value["city"])
        value = {k: value[k] for k in rng.choice((["name", "age", "city"], ["name", "age", "city"], ["name", "city"], ["name", "age"], ["city", "name", "age"]))}
        request = grammar("[Extract the {k} as JSON: {t}|{t} Write this as JSON with the keys {k}.|{t} Extract {k} as JSON.|Fill in JSON with {k}: {t}|{t} Give me the {k} as JSON.]", k=join(list(value)), t=told)
    elif shape < 0.6:
        job = rng.choice(JOBS)
        value = {"name": person_name(rng), "age": rng.randint(2, 99), "job": job, "city": city_name(rng)}
        request = grammar("[Make|Return|Create|Write|Give me] a JSON object [describing|about|for] {n}, a {a} year old {j} from {c}.", n=value["name"], a=value["age"], j=job, c=value["city"])
    elif shape < 0.68:
        request = grammar("[Fill in this JSON schema|Answer with JSON for this schema|Return JSON that matches this schema|Use this JSON schema]: {j} [Data|Text|The data]: {s}", j=json_text(rng, object_schema(fields)), s=said)
        if rng.random() < 0.3:
            request = f"{capital(said)}. Answer with JSON for this schema: {json_text(rng, object_schema(fields))}"
    elif shape < 0.78:
        request = grammar("[{S}. JSON, please.|{S} as JSON|JSON for {s}|{s} as a JSON object, please.|Convert to JSON: {s}|Write this as JSON: {s}]", s=said, S=capital(said))
    elif shape < 0.86:
        compact = True
        request = grammar("[Make|Write] [a compact JSON object|compact JSON|JSON without spaces] for {s}.", s=said)
    else:
        request = grammar("[Make|Write|Create] a JSON object with the keys {k} for {s}.", k=join(keys), s=said)
    answer = json.dumps(value, separators=(",", ":")) if compact else json.dumps(value)
    turns = [(request, answer)]
    if rng.random() < 0.15:
        key = rng.choice(list(value))
        shown = json.dumps(value[key]) if isinstance(value[key], bool) else value[key]
        turns.append((f"What is the {key}?", f"The {key} is {shown}."))
    if rng.random() < 0.12 and "name" in value and len(turns) == 1:
        other = person_name(rng)
        turns.append((grammar("[Now change the name to {n}.|Change the name to {n}.|Now the same for {n}.]", n=other), json.dumps({**value, "name": other})))
    return turns


# --- tools --------------------------------------------------------------------------------------------------------

class Tool:
    def __init__(self, name, description, parameters, required):
        self.name, self.description, self.parameters, self.required = name, description, parameters, required

    def definition(self):
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": {
            "type": "object", "properties": self.parameters, "required": self.required}}}


class Use:
    """One tool with a request that needs it: the call it should cause, what comes back and what is said about it."""

    def __init__(self, tool, request, arguments, result, answer, family):
        self.tool, self.request, self.arguments, self.result, self.answer, self.family = tool, request, arguments, result, answer, family


def parameter(rng, kind, description=None, **more):
    schema = {"type": kind, **more}
    if description and rng.random() < 0.5:
        schema["description"] = description
    return schema


def weather_use(rng, g):
    p, city = g("[city|city|location|place|town]"), city_name(rng)
    properties, arguments = {p: parameter(rng, "string", f"The {p}")}, {p: city}
    request = g("[What is the weather in {c}?|What's the weather like in {c}?|How is the weather in {c}?|Weather in {c}, please.|Is it raining in {c}?|Tell me the weather in {c}.|Do I need an umbrella in {c}?|What is the weather in {c} today?]", c=city)
    if rng.random() < 0.35:
        unit_name = g("[unit|units]")
        properties[unit_name] = parameter(rng, "string", None, enum=["celsius", "fahrenheit"])
        if rng.random() < 0.7:
            unit = rng.choice(("celsius", "fahrenheit"))
            arguments[unit_name] = unit
            request = g("[What is the weather in {c} in {u}?|Tell me the temperature in {c} in {u}.|Weather in {c} in {u}, please.]", c=city, u=capital(unit) if rng.random() < 0.5 else unit)
    degrees, sky = rng.randint(-10, 35), rng.choice(("sunny", "rainy", "cloudy", "windy", "foggy"))
    tool = Tool(g("[get_weather|get_weather|weather|get_current_weather|current_weather|fetch_weather|weather_lookup]"), g("[Get|Gets|Look up|Returns] the [current |]weather [of a city|for a {p}|in a place].", p=p), properties, [p])
    return Use(tool, request, arguments, {p: city, "temperature": degrees, "condition": sky} if rng.random() < 0.6 else f"{degrees} degrees, {sky}", f"It is {sky} in {city}, with {degrees} degrees.", "weather")


def time_use(rng, g):
    p, city = g("[city|timezone|location|place]"), city_name(rng)
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    tool = Tool(g("[get_time|current_time|get_current_time|clock|time_in_city]"), g("[Get|Gets|Returns] the [current |local |]time in a city."), {p: parameter(rng, "string", f"The {p}")}, [p])
    return Use(tool, g("[What time is it in {c}?|What is the time in {c}?|Tell me the time in {c}.|How late is it in {c}?|Current time in {c}?]", c=city), {p: city}, {"time": clock}, f"It is {clock} in {city}.", "time")


def email_use(rng, g):
    to, text = g("[to|recipient|name]"), g("[text|body|message|content]")
    name, content = person_name(rng), sentence(rng)
    tool = Tool(g("[send_email|send_message|send_mail|message|notify|send_sms]"), g("[Send|Sends] a message to [a person|somebody]."), {to: parameter(rng, "string", "Who gets it"), text: parameter(rng, "string", "What to say")}, [to, text])
    return Use(tool, g("[Send a message to {n}: {t}|Write to {n}: {t}|Tell {n}: {t}|Send {n} this message: {t}|Message {n}: {t}]", n=name, t=content), {to: name, text: content}, g("[sent|ok]") if rng.random() < 0.6 else {"status": "sent"}, f"I have sent the message to {name}.", "message")


def reminder_use(rng, g):
    what, when = g("[task|text|title|what]"), g("[day|date|when]")
    task = g("[buy|find|paint|sell|clean|fetch] {o}", o=article(noun(rng)))
    day = rng.choice(DAYS)
    tool = Tool(g("[set_reminder|add_reminder|create_reminder|remind|add_task]"), g("[Set|Sets|Adds] a reminder."), {what: parameter(rng, "string"), when: parameter(rng, "string", "A day of the week")}, [what, when])
    return Use(tool, g("[Remind me to {t} on {d}.|Set a reminder for {d}: {t}|On {d}, remind me to {t}.|Please remind me on {d} to {t}.]", t=task, d=day), {what: task, when: day}, {"ok": True}, f"I will remind you to {task} on {day}.", "reminder")


def add_use(rng, g):
    a, b = g("[a b|x y|first second|left right]").split()
    x, y = number(rng), number(rng)
    word, names, sign = rng.choice((("add", "add|sum|add_numbers|plus", "+"), ("multiply", "multiply|times|product|multiply_numbers", "*"), ("subtract", "subtract|minus|difference", "-")))
    result = {"+": x + y, "*": x * y, "-": x - y}[sign]
    spoken = {"+": "[What is {x} + {y}?|Add {x} and {y}.|What is {x} plus {y}?|Calculate {x} + {y}.]", "*": "[What is {x} * {y}?|Multiply {x} by {y}.|What is {x} times {y}?|Multiply {x} and {y}.]", "-": "[What is {x} - {y}?|What is {x} minus {y}?|Calculate {x} - {y}.]"}[sign]
    tool = Tool(g(f"[{names}]"), g("[{W}|{W}s] two numbers.", W=capital(word)), {a: parameter(rng, g("[integer|number]")), b: parameter(rng, "integer")}, [a, b])
    return Use(tool, g(spoken, x=x, y=y), {a: x, b: y}, str(result) if rng.random() < 0.5 else {"result": result}, f"{x} {sign} {y} = {result}.", word)


def calculator_use(rng, g):
    p = g("[expression|formula|input]")
    expression = f"{number(rng)} {rng.choice('+-*/')} {number(rng)}"
    result = rng.randint(1, 9999)
    tool = Tool(g("[calculator|calculate|evaluate|compute]"), g("[Evaluate|Evaluates|Computes] an arithmetic expression."), {p: parameter(rng, "string")}, [p])
    return Use(tool, g("[What is {e}?|Calculate {e}.|Compute {e}.|How much is {e}?|Please work out {e}.]", e=expression), {p: expression}, str(result), f"{expression} = {result}.", "calculator")


def search_use(rng, g):
    p = g("[query|query|q|term|text|topic]")
    what = rng.choice((rng.choice(TOPICS), made_up_word(rng), f"{rng.choice(OBJECT_ADJECTIVES)} {noun(rng)}s", person_name(rng)))
    properties, arguments = {p: parameter(rng, "string", "What to look for")}, {p: what}
    request = g("[Search for {t}.|Look up {t}.|Search the web for {t}.|Find something about {t}.|Please search for {t}.|Google {t}.]", t=what)
    if rng.random() < 0.3:
        limit, count = g("[limit|max_results|count|n]"), rng.randint(1, 20)
        properties[limit] = parameter(rng, "integer")
        if rng.random() < 0.7:
            arguments[limit] = count
            request = g("[Search for {t} and give me {k} results.|Find {k} results about {t}.|Look up {t}, {k} results.]", t=what, k=count)
    found = rng.randint(1, 99)
    tool = Tool(g("[search|web_search|search_web|lookup|find|search_documents]"), g("[Search|Searches] the [web|library|documents|internet]."), properties, [p])
    return Use(tool, request, arguments, {"found": found}, f"I found {found} results about {what}.", "search")


def play_use(rng, g):
    p = g("[song|title|track|name]")
    title = f"{capital(rng.choice(ADJECTIVES))} {capital(noun(rng))}"
    tool = Tool(g("[play_music|play_song|play|start_music]"), g("[Play|Plays] a song."), {p: parameter(rng, "string")}, [p])
    return Use(tool, g("[Play {t}.|Please play {t}.|I want to hear {t}.|Play the song {t}.|Can you play {t}?]", t=title), {p: title}, {"status": "playing"} if rng.random() < 0.5 else "playing", f"Now playing {title}.", "music")


def light_use(rng, g):
    room_name, state = g("[room|where|location]"), g("[on|state|enabled]")
    room, on = rng.choice(ROOMS), rng.random() < 0.5
    tool = Tool(g("[set_light|switch_light|light|turn_light]"), g("[Switch|Switches|Turns] a light on or off."), {room_name: parameter(rng, "string"), state: parameter(rng, "boolean")}, [room_name, state])
    word = "on" if on else "off"
    return Use(tool, g("[Turn {w} the light in the {r}.|Switch the {r} light {w}.|Light {w} in the {r}, please.|Turn the light in the {r} {w}.]", w=word, r=room), {room_name: room, state: on}, {"ok": True}, f"The light in the {room} is {word}.", "light")


def order_use(rng, g):
    item_name, count_name = g("[item|product|article|thing]"), g("[quantity|count|amount|number]")
    item, count = noun(rng), rng.randint(2, 99)
    tool = Tool(g("[order|order_item|buy|place_order|purchase]"), g("[Order|Orders|Buys] something from the shop."), {item_name: parameter(rng, "string"), count_name: parameter(rng, "integer", "How many")}, [item_name, count_name])
    return Use(tool, g("[Order {k} {i}s.|Buy {k} {i}s, please.|I need {k} {i}s, please order them.|Please order {k} {i}s.]", k=count, i=item), {item_name: item, count_name: count}, {"order": (n := number(rng))}, f"I have ordered {count} {item}s. The order number is {n}.", "order")


def trip_use(rng, g):
    a, b = g("[from to|origin destination|start end|from_city to_city]").split()
    x, y = city_name(rng), city_name(rng)
    what = g("[train|flight|bus]")
    price = rng.randint(10, 900)
    tool = Tool(g("[book_{w}|find_{w}|search_{w}s|{w}_ticket]", w=what), g("[Book|Find|Finds] a {w} between two cities.", w=what), {a: parameter(rng, "string"), b: parameter(rng, "string")}, [a, b])
    return Use(tool, g("[Find a {w} from {x} to {y}.|Book a {w} from {x} to {y}.|I need a {w} from {x} to {y}.|Is there a {w} from {x} to {y}?]", w=what, x=x, y=y), {a: x, b: y}, {"price": price}, f"There is a {what} from {x} to {y} for {price} euros.", what)


def translate_use(rng, g):
    text_name, language_name = g("[text|phrase|input]"), g("[language|target|to]")
    text, language = sentence(rng), rng.choice(LANGUAGES)
    tool = Tool(g("[translate|translate_text|translator]"), g("[Translate|Translates] a text."), {text_name: parameter(rng, "string"), language_name: parameter(rng, "string", "The language to translate to")}, [text_name, language_name])
    result = " ".join(made_up_word(rng) for _ in range(rng.randint(1, 4)))
    return Use(tool, g("[Translate \"{t}\" to {l}.|Translate to {l}: {t}|How do you say \"{t}\" in {l}?|Please translate \"{t}\" into {l}.]", t=text, l=language), {text_name: text, language_name: language}, result, f"In {language}: {result}", "translate")


def user_use(rng, g):
    p = g("[user_id|id|user|customer_id]")
    value = number(rng)
    what, draw = rng.choice((("name", person_name), ("city", city_name), ("age", lambda r: r.randint(1, 99))))
    tool = Tool(g("[get_user|lookup_user|find_customer|user_info]"), g("[Get|Gets|Look up] a user by number."), {p: parameter(rng, "integer")}, [p])
    result = draw(rng)
    return Use(tool, g("[What is the {w} of user {v}?|Get user {v} and tell me the {w}.|Look up the {w} of user {v}.|Tell me the {w} of customer {v}.]", w=what, v=value), {p: value}, {"id": value, what: result}, f"The {what} of user {value} is {result}.", "user")


def made_up_use(rng, g):
    """A tool about something that does not exist: only the definition can say what to do."""
    thing = made_up_word(rng)
    if rng.random() < 0.5:
        thing = " ".join(rng.choice((made_up_word(rng), rng.choice(OBJECTS), rng.choice(KEYS))) for _ in range(rng.choice((1, 2, 2))))
    verb = g("[get|get|find|read|check|compute|fetch|lookup]")
    name = f"{verb}_{thing.replace(' ', '_')}"
    parameters, arguments, parts = {}, {}, []
    kinds = rng.sample(("city", "name", "number", "object"), rng.choice((1, 1, 2)))
    for kind in kinds:
        key = {"city": "city", "name": "name", "number": "number", "object": "item"}[kind]
        if rng.random() < 0.5:
            key = rng.choice(KEYS) if rng.random() < 0.4 else made_up_word(rng)
        value = {"city": city_name, "name": person_name, "number": number, "object": noun}[kind](rng)
        if key in arguments:
            continue
        parameters[key] = parameter(rng, "integer" if kind == "number" else "string", f"The {key}")
        arguments[key] = value
        parts.append((key, value))
    if rng.random() < 0.5:
        said = join([f"{k} {v}" for k, v in parts])
        request = g("[{V} the {t} for {s}.|What is the {t} for {s}?|Call {n} with {s}.|Use {n} with {s}.|I need the {t} for {s}.]", V=capital(verb), t=thing, s=said, n=name)
    else:
        said = join([str(v) for _, v in parts])
        request = g("[What is the {t} of {s}?|{V} the {t} of {s}.|Tell me the {t} of {s}.|Please {v} the {t} for {s}.]", V=capital(verb), v=verb, t=thing, s=said)
    result = rng.choice((number(rng), made_up_word(rng), rng.choice(COLOURS)))
    tool = Tool(name, g("[Returns the {t}.|{V} the {t} of something.|{V} {t}.]", V=capital(verb), t=thing), parameters, list(parameters))
    return Use(tool, request, arguments, str(result) if rng.random() < 0.4 else {"result": result}, f"The {thing} is {result}.", thing)


USES = (weather_use, time_use, email_use, reminder_use, add_use, calculator_use, search_use, play_use, light_use, order_use, trip_use, translate_use, user_use)


def draw_use(rng):
    grammar = Grammar(rng)
    shape = rng.random()
    if shape < 0.3:
        return made_up_use(rng, grammar)
    if shape < 0.45:
        return weather_use(rng, grammar)
    return rng.choice(USES)(rng, grammar)


def call_text(use):
    return "<tool_call>\n" + json.dumps({"name": use.tool.name, "arguments": use.arguments}, ensure_ascii=False) + "\n</tool_call>"


def tool_conversation(rng):
    use = draw_use(rng)
    others = []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        other = draw_use(rng)
        clash = {"add", "calculator", "multiply", "subtract"}
        if other.family != use.family and not {other.family, use.family} <= clash and other.tool.name != use.tool.name:
            others.append(other)
    uses = [use, *others]
    rng.shuffle(uses)
    tools = [u.tool.definition() for u in uses]
    turns = []
    if rng.random() < 0.25:
        # Small talk before the call. Facts only if no tool is there to compute them.
        computing = {"add", "calculator", "multiply", "subtract"} & {u.family for u in uses}
        opening = talk_turns if computing else rng.choice((talk_turns, fact_turns))
        turns = [("turn", q, a) for q, a in opening(rng)]
    rest = rng.random()
    if rest < 0.1:
        # The tools do not fit: a plain answer.
        maker = rng.choice((talk_turns, story_turns if rng.random() < 0.3 else talk_turns, unknown_turns, capital_turns))
        turns += [("turn", q, a) for q, a in maker(rng)[:1]]
    elif rest < 0.17 and use.family in ("weather", "time"):
        city = city_name(rng)
        key = next(iter(use.arguments))
        first = {key: use.arguments[key]}
        both = [{"name": use.tool.name, "arguments": first}, {"name": use.tool.name, "arguments": {key: city}}]
        what = "weather" if use.family == "weather" else "time"
        text = "\n".join("<tool_call>\n" + json.dumps(c, ensure_ascii=False) + "\n</tool_call>" for c in both)
        turns.append(("turn", f"What is the {what} in {first[key]} and {city}?", text))
    else:
        turns.append(("turn", use.request, call_text(use)))
        if rng.random() < 0.45:
            turns.append(("result", use.result, use.answer))
            if rng.random() < 0.25 and others:
                turns.append(("turn", others[0].request, call_text(others[0])))
            elif rng.random() < 0.15:
                turns.append(("turn", "Thank you!", "You are welcome!"))
    return tools, turns


def capital_turns(rng):
    question, answer, _ = capital_fact(rng, Grammar(rng))
    return [(question, answer)]


# --- conversations ------------------------------------------------------------------------------------------------

def flat(turns_and_later, rng):
    """A memory exercise whose question comes at once, or after something else."""
    turns, later = turns_and_later
    between = []
    while rng.random() < 0.25 and len(between) < 3:
        between += rng.choice((fact_turns, talk_turns, json_turns))(rng)[:1]
    if later and rng.random() < 0.8:
        return turns + between + [later]
    return turns


def repeat_flat(rng):
    turns, later = repeat_turns(rng)
    return turns + [later] if rng.random() < 0.15 else turns


# Stories are ten times as long as the rest, so a twelfth of the parts is still a quarter of the text; what is short and has to
# be exact (facts, JSON, repeating) needs the many examples.
PARTS = (
    (story_turns, 8), (fact_turns, 32), (json_turns, 20), (repeat_flat, 20), (talk_turns, 8), (unknown_turns, 5),
    (lambda rng: flat(introduction_turns(rng), rng), 5), (lambda rng: flat(memory_turns(rng), rng), 6),
    (list_turns, 4), (count_turns, 2.5), (sentiment_turns, 1.5), (poem_turns, 1),
)


def part(rng):
    return rng.choices([maker for maker, _ in PARTS], weights=[w for _, w in PARTS])[0](rng)


def impersonal_part(rng):
    return rng.choice((story_turns, fact_turns, fact_turns, json_turns, list_turns, talk_turns, unknown_turns))(rng)


def conversation(rng, long):
    """One conversation: (system text or None, tools or None, turns)."""
    system = rng.choice(SYSTEMS) if rng.random() < 0.25 else None
    if not long and rng.random() < 0.28:
        tools, turns = tool_conversation(rng)
        return system, tools, turns
    if not long and rng.random() < 0.04:
        name = person_name(rng)
        told = Grammar(rng)("[The user's name is {n}.|You are talking to {n}.|The name of the user is {n}.]", n=name)
        _, (asked, answered) = introduction_turns(rng)
        answered = f"Your name is {name}."
        return (system + " " if system else "") + told, None, [("turn", q, a) for q, a in [*talk_turns(rng), (asked, answered)]]
    if long or rng.random() < 0.3:
        # Several subjects in one conversation, perhaps held together by something to remember. What lies between does
        # not speak of the user, so that there is one right answer at the end.
        parts, later = rng.choice((introduction_turns, memory_turns))(rng)
        if rng.random() < 0.4:
            parts, later = part(rng), None
        for _ in range(rng.randint(4, 14) if long else rng.choice((1, 1, 1, 2, 2, 3, 5))):
            parts = parts + (part(rng) if later is None else impersonal_part(rng))
        if later:
            parts = parts + [later]
    else:
        parts = part(rng)
    return system, None, [("turn", q, a) for q, a in parts]


def plain_text(rng):
    """Text without roles, for the completions endpoint."""
    shape = rng.random()
    if shape < 0.7:
        return Story(rng).text(plots=rng.choice((1, 1, 2)), paragraphs=rng.random() < 0.5)
    if shape < 0.9:
        return " ".join(fact(rng)[1] for _ in range(rng.randint(2, 8)))
    return ", ".join(str(n) for n in range(1, rng.randint(5, 21)))


def segments(rng, long):
    """The text of one document as (text, is it to be learnt) pairs, exactly as the chat template renders it."""
    if not long and rng.random() < 0.03:
        yield plain_text(rng), True
        return
    system, tools, turns = conversation(rng, long)
    head = ""
    if tools:
        spaced = rng.random()
        shown = "\n".join(json.dumps(t, ensure_ascii=False) if spaced < 0.55 else json.dumps(t, ensure_ascii=False, separators=(",", ":"), sort_keys=spaced > 0.75) for t in tools)
        head = (system + "\n\n" if system else "") + TOOLS_HEAD + shown + TOOLS_TAIL
    elif system:
        head = system
    if head:
        yield f"<|im_start|>system\n{head}<|im_end|>\n", False
    for role, asked, answered in turns:
        if role == "result":
            asked = asked if isinstance(asked, str) else json_text(rng, asked)
            yield f"<|im_start|>tool\n<tool_response>\n{asked}\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False
        else:
            yield f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", False
        yield f"{answered}<|im_end|>", True
        yield "\n", False


TOOLS_HEAD = "# Tools\n\nYou can call these functions:\n<tools>\n"
TOOLS_TAIL = "\n</tools>\n\nTo call a function, answer with its name and arguments as JSON:\n<tool_call>\n{\"name\": \"function name\", \"arguments\": {}}\n</tool_call>"


def document(seed, index, long=False):
    return list(segments(random.Random(f"{seed}/{index}/{long}"), long))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5)
    arguments = parser.parse_args()
    for index in range(arguments.count):
        print("".join(text for text, _ in document(arguments.seed, index)))
        print("-" * 100)


if __name__ == "__main__":
    main()
