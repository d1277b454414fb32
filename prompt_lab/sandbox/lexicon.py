"""The words of the sandbox: 562 of them, each one token of the embedded backbone.

Content words belong to named classes (`WORDS["animal"]`), and an attribute of a sentence
(`ATTRIBUTES`) is a set of classes that exclude each other. Instruction words name families,
attributes and classes. A plural or a foreign form is simply another word.
"""

from __future__ import annotations

from functools import cache

_TOPIC_LINES = {
    "animal": "dog cat horse cow goat duck lion tiger rabbit monkey spider camel",
    "food": "apple bread carrot cake soup cookie banana sandwich noodle onion pancake lemon",
    "tool": "hammer saw shovel drill ladder rake wrench needle brush chisel lever pump",
    "garment": "coat shirt hat glove scarf boot sock jacket skirt belt sweater sandal",
    "vehicle": "car truck bus bike boat train plane tractor wagon scooter canoe ferry",
    "plant": "rose tulip oak fern cactus daisy pine lily willow maple orchid clover",
}
_IRREGULAR = {"sandwich": "sandwiches", "wrench": "wrenches", "brush": "brushes", "bus": "buses"}
_IRREGULAR |= {"cactus": "cacti", "daisy": "daisies", "lily": "lilies", "ferry": "ferries"}
TOPICS: tuple[str, ...] = tuple(_TOPIC_LINES)
NOUNS: tuple[str, ...] = tuple(" ".join(_TOPIC_LINES.values()).split())
PLURAL: dict[str, str] = {noun: _IRREGULAR.get(noun, noun + "s") for noun in NOUNS}
FOREIGN: dict[str, str] = {noun: noun[::-1] + "u" for noun in NOUNS}

_VERB_LINES = """buy bought buys, sell sold sells, draw drew draws, carry carried carries,
paint painted paints, move moved moves, want wanted wants, bring brought brings, hide hid hides,
clean cleaned cleans, lose lost loses, show showed shows"""
# base form, past, present
VERBS: tuple[tuple[str, ...], ...] = tuple(tuple(v.split()) for v in _VERB_LINES.split(","))

_CLASS_LINES = _TOPIC_LINES | {
    "man": "adam peter john david paul mark frank henry simon victor oscar leo",
    "woman": "anna mary julia sarah laura emma helen alice clara diana nora rita",
    "indoor": "kitchen cellar bedroom attic office hallway library bathroom",
    "outdoor": "forest garden meadow field park beach desert valley",
    "pleasant": "lovely splendid charming delightful superb brilliant nice fantastic "
    "cheerful sweet",
    "unpleasant": "awful nasty dreadful horrid ugly dull grim lousy boring bitter",
    "big": "huge large giant enormous vast",
    "small": "tiny little mini slim short",
    "warm": "red orange yellow pink",
    "cool": "blue green violet grey",
    "hard": "steel stone iron brass glass",
    "soft": "wool silk cotton velvet felt",
    "fast": "quickly rapidly hastily swiftly briskly",
    "slow": "slowly lazily calmly gradually leisurely",
    "often": "always usually regularly daily surely",
    "rarely": "never hardly seldom barely scarcely",
    "weekday": "monday tuesday wednesday thursday friday",
    "weekend": "saturday sunday holiday",
    "summer": "may june july august september",
    "winter": "november december january february march",
    "light": "dawn sunrise noon midday teatime",
    "dark": "dusk sunset midnight bedtime nightfall",
}
WORDS: dict[str, tuple[str, ...]] = {k: tuple(line.split()) for k, line in _CLASS_LINES.items()}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "topic": TOPICS,
    "tense": ("past", "present", "future"),
    "number": ("one", "many"),
    "gender": ("man", "woman"),
    "place": ("indoor", "outdoor"),
    "sentiment": ("pleasant", "unpleasant"),
    "size": ("big", "small"),
    "colour": ("warm", "cool"),
    "material": ("hard", "soft"),
    "manner": ("fast", "slow"),
    "frequency": ("often", "rarely"),
    "day": ("weekday", "weekend"),
    "season": ("summer", "winter"),
    "daytime": ("light", "dark"),
}
VALUE_OF: dict[str, str] = {word: name for name, words in WORDS.items() for word in words}

# A word that goes with a value in running text, as `she` goes with `anna`.
CUES: dict[str, tuple[str, str]] = {
    "gender": ("he", "she"),
    "daytime": ("sun", "moon"),
    "season": ("heat", "frost"),
    "place": ("roof", "sky"),
    "size": ("heavy", "handy"),
    "manner": ("hurry", "patience"),
    "sentiment": ("praise", "blame"),
}

COUNTS: tuple[str, ...] = ("zero", "one", "two", "three", "four")

_POOL_LINE = (
    "agree reject left right up down open closed north south east west high low near far "
    "alpha beta gamma delta gold silver king queen start stop plus minus head tail upper lower "
    "circle square water fire river mountain true false win fail early late odd even "
    "front back full empty wide narrow accept deny rise fall sharp blunt push pull"
)
_RESERVED_LINE = (
    "great terrible male female bright gloomy contained absent matching differing "
    "former current coming hot cold included missing alike unlike"
)
# Answers that pretraining may bind to classes.
LABEL_POOL: tuple[str, ...] = tuple(_POOL_LINE.split())
# Answers of validation and held-out tasks: never bound to a class in pretraining.
RESERVED_LABELS: tuple[str, ...] = tuple(_RESERVED_LINE.split())

FAMILIES: tuple[str, ...] = ("sort", "find", "list", "has", "count", "same", "fill")
FORMS: tuple[str, ...] = ("plain", "plural", "foreign", "class")
ENDS: tuple[str, ...] = ("first", "last")
_FUNCTION_LINE = "the in on at it was and with will blank yes no any person object month hour"


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the sandbox once, in a fixed order."""
    groups = [_FUNCTION_LINE.split(), COUNTS, FAMILIES, FORMS, ENDS, ATTRIBUTES]
    groups += [*ATTRIBUTES.values(), *WORDS.values(), PLURAL.values(), FOREIGN.values()]
    groups += [*VERBS, *CUES.values(), LABEL_POOL, RESERVED_LABELS]
    return tuple(dict.fromkeys(word for group in groups for word in group))
