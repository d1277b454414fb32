"""What templates cannot say of a task: functions between the rows of the hub and its templates.

A row of the task table names one of them under ``prepare``. Each reads all rows of a split in their
order and yields rows with the columns that the templates name: it picks, joins, groups, shuffles or
leaves out. Rows are mappings in the schema of the data set on the hub; they are not changed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from prompt_lab.data.cleaning import clean

Row = dict[str, Any]
"""One row: column name to value, as the data set's Parquet files have it."""

_FLAT = str.maketrans(dict.fromkeys("\n\r\t", " "))

_TREC_COARSE = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")

_TREC_FINE = {
    "ABBR": "abb exp",
    "ENTY": "animal body color cremat currency dismed event food instru lang letter other plant "
    "product religion sport substance symbol techmeth termeq veh word",
    "DESC": "def desc manner reason",
    "HUM": "gr ind title desc",
    "LOC": "city country mount other state",
    "NUM": "code count date dist money ord other period perc speed temp volsize weight",
}

_LONG_PLOT = (
    "This article's plot summary may be too long or excessively detailed. Please help improve it "
    "by removing unnecessary details and making it more concise."
)


def kilt_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """The answers among a row's outputs (KILT), as a list."""
    for row in rows:
        yield {**row, "answers": [output["answer"] for output in row["output"]]}


def distinct_kilt_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """The answers among a row's outputs (KILT), each once; empty ones are left out."""
    for row in rows:
        yield {**row, "answers": _distinct(output["answer"] for output in row["output"])}


def distinct_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """The texts of SQuAD's answers, each once."""
    for row in rows:
        yield {**row, "answers": _distinct(row["answers"]["text"])}


def first_answer(rows: Iterable[Row]) -> Iterator[Row]:
    """The first of a row's answers."""
    for row in rows:
        yield {**row, "answer": row["answers"][0]}


def fill_cloze(rows: Iterable[Row]) -> Iterator[Row]:
    """The row's own template, filled with its subject and a mask (LAMA)."""
    for row in rows:
        text = row["template"].replace("[X]", row["sub_label"]).replace("[Y]", "[MASK]")
        yield {**row, "cloze": text}


def mask_number(rows: Iterable[Row]) -> Iterator[Row]:
    """``[MASK]`` for the ``<mask>`` of a sentence."""
    for row in rows:
        yield {**row, "sentence": row["sentence"].replace("<mask>", "[MASK]")}


def flatten_columns(rows: Iterable[Row]) -> Iterator[Row]:
    """A space for each line feed, carriage return and tab of every column of text."""
    for row in rows:
        yield {
            name: value.translate(_FLAT) if isinstance(value, str) else value
            for name, value in row.items()
        }


def written_breaks(rows: Iterable[Row]) -> Iterator[Row]:
    r"""A space for each written ``\n`` of a review: a backslash and an n, not a line feed."""
    for row in rows:
        yield {**row, "text": row["text"].replace("\\n", " ")}


def moving_entities(rows: Iterable[Row]) -> Iterator[Row]:
    """The sentences that tell of a motion, with what moves in them joined (LiMiT)."""
    for row in rows:
        if row["motion"] == "yes":
            moving = [entity["entity"] for entity in row["motion_entities"]]
            yield {**row, "entities": " [SEP] ".join(moving)}


def split_options(rows: Iterable[Row]) -> Iterator[Row]:
    """The five options that stand in one text: ``a ) 38 , b ) 27 ...`` (MathQA).

    They are cut at commas, as CrossFit cuts them, also where a comma stands inside of a number.
    Rows whose answer is then empty are left out.
    """
    for row in rows:
        first, *middle, last = row["options"].split(",")[:5]
        texts = [first[4:-1], *(text[5:-1] for text in middle), last[5:]]
        chosen = _choose(row, texts, _letter(row["correct"].upper()))
        if chosen["answer"]:
            yield chosen


def whole_scores(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows whose score is a whole number, as text."""
    for row in rows:
        if row["score"] % 1 == 0:
            yield {**row, "score": str(int(row["score"]))}


def drop_level_heading(rows: Iterable[Row]) -> Iterator[Row]:
    """Texts in one line, without the heading "Intermediate" that would tell the label."""
    for row in rows:
        text = row["text"].replace("\n", " ")
        yield {**row, "text": text.removeprefix("Intermediate  ")}


def labelled_choices(rows: Iterable[Row]) -> Iterator[Row]:
    """Choices with the letters that the data set gives them, and the text of the key."""
    for row in rows:
        marks, texts = row["choices"]["label"], row["choices"]["text"]
        joined = " ".join(f"({mark}) {text}" for mark, text in zip(marks, texts, strict=True))
        yield {**row, "options": joined, "answer": texts[marks.index(row["answerKey"])]}


def effect_choices(rows: Iterable[Row]) -> Iterator[Row]:
    """The ``choices`` as options, the text of the right one, and the steps joined (WIQA)."""
    for row in rows:
        chosen = _choose(row, row["choices"]["text"], _letter(row["answer_label_as_choice"]))
        yield {**chosen, "steps": " ".join(row["question_para_step"])}


def exam_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Options, answer, question and article in one line each (RACE)."""
    for row in flatten_columns(rows):
        texts = [text.translate(_FLAT) for text in row["options"]]
        yield _choose(row, texts, _letter(row["answer"]))


def ending_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Four endings as options, and the right one (SWAG)."""
    for row in rows:
        yield _choose(row, [row[f"ending{number}"] for number in range(4)], row["label"])


def cause_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Two choices as options, and the right one (COPA)."""
    for row in rows:
        yield _choose(row, [row["choice1"], row["choice2"]], row["label"])


def three_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Three answers as options, and the right one, whose number is text and counts from 1."""
    for row in rows:
        texts = [row["answerA"], row["answerB"], row["answerC"]]
        yield _choose(row, texts, int(row["label"]) - 1)


def two_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Two options, and the right one, whose number is text and counts from 1."""
    for row in rows:
        yield _choose(row, [row["option1"], row["option2"]], int(row["answer"]) - 1)


def tight_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Options without any space around their letters, and the right one (QuAIL)."""
    for row in rows:
        texts = row["answers"]
        listed = "".join(f"({chr(ord('A') + number)}){text}" for number, text in enumerate(texts))
        yield {**row, "options": listed, "answer": texts[row["correct_answer_id"]]}


def shuffle_options(rows: Iterable[Row]) -> Iterator[Row]:
    """The right answer shuffled among three others (SciQ); no row without supporting text.

    One stream of random numbers, seeded with 42, for each split.
    """
    random = np.random.RandomState(42)
    for row in rows:
        if row["support"]:
            names = ["distractor1", "distractor2", "distractor3", "correct_answer"]
            random.shuffle(names)
            yield {**row, "options": options([row[name] for name in names])}


def answer_in_question(rows: Iterable[Row]) -> Iterator[Row]:
    """The answer, cut out of a question that ends with its options (A) and (B)."""
    for row in rows:
        question = row["question"]
        first, second = question.find("(A)"), question.find("(B)")
        text = question[second + 4 :] if row["answer_index"] else question[first + 4 : second]
        yield {**row, "answer": text.removesuffix("or ").strip()}


def join_question(rows: Iterable[Row]) -> Iterator[Row]:
    """The words of a question as one text."""
    for row in rows:
        yield {**row, "question": " ".join(row["question"])}


def group_answers(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per question (MultiRC): all its answers as options, the right ones as one target.

    Line feeds, carriage returns and tabs become spaces, except in the target.
    """
    questions: dict[int, list[Row]] = {}
    for row in rows:
        questions.setdefault(row["idx"]["question"], []).append(row)
    for group in questions.values():
        right = [row["answer"] for row in group if row["label"] == 1]
        yield {
            "question": group[0]["question"].translate(_FLAT),
            "paragraph": group[0]["paragraph"].translate(_FLAT),
            "options": options([row["answer"].translate(_FLAT) for row in group]),
            "right": " [SEP] ".join(right) or "NO ANSWER!",
        }


def cite_context(rows: Iterable[Row]) -> Iterator[Row]:
    """Citation, citing text and section name as one cleaned text (SciCite)."""
    for row in rows:
        citation = row["string"][row["citeStart"] : row["citeEnd"]]
        yield {
            **row,
            "text": clean(f"{citation} [SEP] {row['string']} [SEP] {row['sectionName']}"),
        }


def table_in_line(rows: Iterable[Row]) -> Iterator[Row]:
    """`` [n] `` for each line feed of a table (TabFact)."""
    for row in rows:
        yield {**row, "table_text": row["table_text"].replace("\n", " [n] ")}


def question_types(rows: Iterable[Row]) -> Iterator[Row]:
    """The coarse and the fine label of a question as words (TREC).

    The hub's fine labels are pairs such as LOC:other. CrossFit has their second word only, so that
    three kinds of "other" are one, and two of "desc".
    """
    fine = [word for coarse in _TREC_COARSE for word in _TREC_FINE[coarse].split()]
    for row in rows:
        yield {**row, "coarse": _TREC_COARSE[row["coarse_label"]], "fine": fine[row["fine_label"]]}


def drop_empty_tweets(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows whose text is not empty when cleaned."""
    return (row for row in rows if clean(row["text"]))


def ask_tweet(rows: Iterable[Row]) -> Iterator[Row]:
    """Question and tweet as one cleaned text (TweetQA)."""
    for row in rows:
        text = clean(f"question: {row['Question']} context: {row['Tweet']}")
        yield {**row, "text": text}


def drop_partly_aligned(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows that have one of the two labels that CrossFit knows (WikiAuto)."""
    return (row for row in rows if row["alignment_label"] in (0, 1))


def box_in_line(rows: Iterable[Row]) -> Iterator[Row]:
    """Title and table of an article (WikiBio) as one text, which ends with a space."""
    for row in rows:
        table = row["input_text"]["table"]
        names, values = table["column_header"], table["content"]
        if len(names) == len(values):
            values = [value.strip().replace("\n", " ") for value in values]
            pairs = zip(names, values, strict=True)
            cells = "".join(f"{name}: {value} [n] " for name, value in pairs)
            yield {**row, "text": f"{row['input_text']['context'].strip()} [SEP] {cells}"}


def ask_yahoo(rows: Iterable[Row]) -> Iterator[Row]:
    """Title, content and best answer of a question as one cleaned text."""
    for row in rows:
        text = (
            f"question_title: {row['question_title']} [SEP] question_content: "
            f"{row['question_content']} [SEP] best_answer: {row['best_answer']}"
        )
        yield {**row, "text": clean(text)}


def single_acronym(rows: Iterable[Row]) -> Iterator[Row]:
    """Sentences with one acronym and one long form, both found by their tags; others are dropped.

    Tags of the words: 0 begins a long form, 1 an acronym; 2 and 3 continue them; 4 is neither.
    """
    for row in rows:
        tags = row["labels"]
        if tags.count(0) == 1 and tags.count(1) == 1:
            text = " ".join(row["tokens"])
            long, short = _span(row, 0, 2), _span(row, 1, 3)
            yield {**row, "text": text, "long": long, "acronym": short}


def marked_options(rows: Iterable[Row]) -> Iterator[Row]:
    """Options written ``A)21`` become ``(A) 21``; the answer is the text of the right one."""
    for row in rows:
        texts = row["options"]
        right = [text[2:] for text in texts if text[0] == row["correct"]]
        joined = " ".join(f"({text[:2]} {text[2:]}" for text in texts)
        yield {**row, "options": joined, "answer": right[-1]}


def draw_good_bad(rows: Iterable[Row]) -> Iterator[Row]:
    """The grammatical sentence first or second, as drawn; the label is its place."""
    return _draw_order(rows, "sentence_good", "sentence_bad")


def draw_more_less(rows: Iterable[Row]) -> Iterator[Row]:
    """The sentence that stereotypes more first or second, as drawn; the label is its place."""
    return _draw_order(rows, "sent_more", "sent_less")


def agreed_meaning(rows: Iterable[Row]) -> Iterator[Row]:
    """Answers whose meaning the annotators agreed on; the others have -1 for a label."""
    return (row for row in rows if row["goldstandard2"] != -1)


def choose_candidate_answer(rows: Iterable[Row]) -> Iterator[Row]:
    """Candidate answers with letters, and the one that the index names."""
    for row in rows:
        yield _choose(row, row["candidate_answers"], row["correct_answer_idx"])


def choose_candidate(rows: Iterable[Row]) -> Iterator[Row]:
    """The two nouns that a pronoun may stand for with letters, and the right one."""
    for row in rows:
        yield _choose(row, row["candidates"], row["label"])


def choose_ending(rows: Iterable[Row]) -> Iterator[Row]:
    """Endings with letters, and the right one; its index is written as text."""
    for row in rows:
        yield _choose(row, row["endings"], int(row["label"]))


def choose_numbered_answer(rows: Iterable[Row]) -> Iterator[Row]:
    """The columns answer0 to answer3 with letters, and the one that the label names."""
    for row in rows:
        yield _choose(row, [row[f"answer{number}"] for number in range(4)], row["label"])


def listed_choices(rows: Iterable[Row]) -> Iterator[Row]:
    """A list of choices with letters."""
    return ({**row, "options": options(row["choices"])} for row in rows)


def join_dialogue(rows: Iterable[Row]) -> Iterator[Row]:
    """The turns of a dialogue in one text, and the choices with letters."""
    for row in rows:
        yield {**row, "dialogue": " ".join(row["dialogue"]), "options": options(row["choice"])}


def group_concepts(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per set of concepts, with every sentence written for it as a reference."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["concept_set_idx"], []).append(row)
    for group in groups.values():
        concepts = ", ".join(group[0]["concepts"])
        yield {"concepts": concepts, "targets": [row["target"] for row in group]}


def join_words(rows: Iterable[Row]) -> Iterator[Row]:
    """The words of a domain name without spaces, in small letters."""
    return ({**row, "domain": row["example"].replace(" ", "").lower()} for row in rows)


def answered_questions(rows: Iterable[Row]) -> Iterator[Row]:
    """Questions with an answer in a plot that is no notice about its length; each answer once."""
    for row in rows:
        if not row["no_answer"] and not row["plot"].startswith(_LONG_PLOT):
            yield {**row, "answers": list(dict.fromkeys(row["answers"]))}


def join_title(rows: Iterable[Row]) -> Iterator[Row]:
    """Title and text of a question in one, to be cleaned together: the text is often empty."""
    return ({**row, "text": f"{row['title']} [SEP] {row['selftext']}"} for row in rows)


def group_utterances(rows: Iterable[Row]) -> Iterator[Row]:
    """One row per situation and feeling, with all utterances of its dialogues as references.

    The files write a comma as ``_comma_``; utterances with "hit:" are broken lines and dropped.
    """
    groups: dict[str, list[str]] = {}
    for row in rows:
        if "hit:" not in row["utterance"]:
            situation = f"{row['prompt'].replace('_comma_', ',')} [SEP] {row['context']}"
            utterance = row["utterance"].replace("_comma_", ",")
            groups.setdefault(situation, []).append(utterance.translate(_FLAT))
    for situation, utterances in groups.items():
        yield {"situation": situation, "utterances": utterances}


def collect_answer_names(rows: Iterable[Row]) -> Iterator[Row]:
    """The names of all answers of all parses, each once, in alphabetical order."""
    for row in rows:
        parses = row["Parses"]["Answers"]
        names = {name for parse in parses for answer in parse["AnswersName"] for name in answer}
        yield {**row, "answers": sorted(names)}


def clear_ratings(rows: Iterable[Row]) -> Iterator[Row]:
    """Ratings below 0.4 get label 0 and those above 0.6 label 1; rows between are dropped.

    The hub keeps ratings as float32, so that its 0.4 is dropped and its 0.6 kept.
    """
    for row in rows:
        if row["rating"] < 0.4 or row["rating"] > 0.6:
            yield {**row, "label": int(row["rating"] > 0.6)}


def hate_or_not(rows: Iterable[Row]) -> Iterator[Row]:
    """Sentences labelled as hate or not; those skipped or hateful only in context are dropped."""
    return (row for row in rows if row["label"] <= 1)


def majority_label(rows: Iterable[Row]) -> Iterator[Row]:
    """The words in one text, and the label that most annotators gave; ties are dropped."""
    for row in rows:
        (label, votes), *others = Counter(row["annotators"]["label"]).most_common(2)
        if not others or votes > others[0][1]:
            yield {**row, "text": " ".join(row["post_tokens"]), "label": label}


def labelled_claims(rows: Iterable[Row]) -> Iterator[Row]:
    """Claims with a label, each in one line; runs of spaces inside stay. No label is -1."""
    for row in rows:
        if row["label"] >= 0:
            yield {**row, "claim": row["claim"].strip().translate(_FLAT)}


def gold_paragraphs(rows: Iterable[Row]) -> Iterator[Row]:
    """The paragraphs that hold supporting facts, in one text; distracting ones are left out."""
    for row in rows:
        gold, context = row["supporting_facts"]["title"], row["context"]
        paragraphs = zip(context["title"], context["sentences"], strict=True)
        kept = ["".join(sentences) for title, sentences in paragraphs if title in gold]
        yield {**row, "context": " ".join(kept).strip()}


def unquote_question(rows: Iterable[Row]) -> Iterator[Row]:
    """Questions without the single quotes around them."""
    return ({**row, "question": row["question"].strip("'")} for row in rows)


def labelled(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows that have a label; -1 stands for none, as in snli where annotators did not agree."""
    return (row for row in rows if row["label"] != -1)


def spaced_squad(rows: Iterable[Row]) -> Iterator[Row]:
    """Question and context as T5 wrote SQuAD, and its distinct answers as ``references``."""
    for row in rows:
        answers = dict.fromkeys(map(_space, row["answers"]["text"]))
        yield {**row, **_spaced(row, "question", "context"), "references": list(answers)}


def spaced_drop(rows: Iterable[Row]) -> Iterator[Row]:
    """Question and passage as T5 wrote SQuAD, and the distinct spans as ``references``."""
    for row in rows:
        answers = dict.fromkeys(map(_space, row["answers_spans"]["spans"]))
        yield {**row, **_spaced(row, "question", "passage"), "references": list(answers)}


def spaced_cosmos(rows: Iterable[Row]) -> Iterator[Row]:
    """Texts of the input as T5 wrote SQuAD; ``answer`` is the right option as it was."""
    columns = ("question", "context", "answer0", "answer1", "answer2", "answer3")
    for row in rows:
        yield {**row, **_spaced(row, *columns), "answer": row[f"answer{row['label']}"]}


def spaced_race(rows: Iterable[Row]) -> Iterator[Row]:
    """Question, article and ``option0`` to ``option3`` as T5 wrote SQuAD."""
    for row in rows:
        options = {f"option{number}": _space(text) for number, text in enumerate(row["options"])}
        yield {**row, **_spaced(row, "question", "article"), **options}


def filled_blank(rows: Iterable[Row]) -> Iterator[Row]:
    """WinoGrande's sentence with both options in place of each blank: ``the cup / the shelf``."""
    for row in rows:
        both = f"{row['option1']} / {row['option2']}"
        yield {**row, "sentence": row["sentence"].replace("_", both)}


def lettered_endings(rows: Iterable[Row]) -> Iterator[Row]:
    """HellaSwag's endings as ``ending0`` to ``ending3``, and W, X, Y or Z as ``letter``."""
    for row in rows:
        endings = {f"ending{number}": text for number, text in enumerate(row["endings"])}
        yield {**row, **endings, "letter": "WXYZ"[int(row["label"])]}


def without_markup(rows: Iterable[Row]) -> Iterator[Row]:
    """MultiRC's texts without bold tags, and with a space for each line break tag."""
    columns = ("question", "answer", "paragraph")
    for row in rows:
        texts = {name: row[name].replace("<br>", " ") for name in columns}
        yield {**row, **{name: re.sub("</?b>", "", text) for name, text in texts.items()}}


def record_texts(rows: Iterable[Row]) -> Iterator[Row]:
    """ReCoRD as T5 wrote it: highlights as sentences of the passage, entities with commas."""
    for row in rows:
        ended = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
        passage = ended.replace("\n@highlight\n", ". ")
        yield {**row, "passage": passage, "entities": ", ".join(row["entities"])}


def marked_spans(rows: Iterable[Row]) -> Iterator[Row]:
    """WSC's text as T5 wrote it: the noun (span 1) between ``*``, the pronoun between ``#``."""
    for row in rows:
        first, second = row["span1_index"], row["span2_index"]
        text = _mark(row["text"], row["span1_text"], first, "*")
        moved = second + 2 if first < second else second  # by the two marks before it
        yield {**row, "text": _mark(text, row["span2_text"], moved, "#")}


def rounded_score(rows: Iterable[Row]) -> Iterator[Row]:
    """``score``: the similarity as T5 wrote STS-B, to the nearest 0.2 in 32 bits, "3.2".

    The similarity is the column ``agg_score`` (CxC) or else ``label`` (STS-B).
    """
    for row in rows:
        value = np.float32(row["agg_score"] if "agg_score" in row else row["label"])
        yield {**row, "score": f"{np.round(value * np.float32(5)) / 5:.1f}"}


def options(texts: Sequence[str]) -> str:
    """Answers to choose from, with letters: ``(A) red (B) blue``."""
    return " ".join(f"({chr(ord('A') + number)}) {text}" for number, text in enumerate(texts))


def _distinct(texts: Iterable[str]) -> list[str]:
    """The texts that are not empty, each once, in order; one empty text where there is none."""
    return list(dict.fromkeys(text for text in texts if text)) or [""]


def _choose(row: Row, texts: Sequence[str], number: int) -> Row:
    """The row with lettered ``options``, and as ``answer`` the text of that number."""
    return {**row, "options": options(texts), "answer": texts[number]}


def _letter(key: str) -> int:
    """Number of an answer from its letter: 0 for "A"."""
    return ord(key) - ord("A")


def _span(row: Row, first: int, inside: int) -> str:
    """The words from the one tagged `first` through those tagged `inside`."""
    tags = row["labels"]
    start = tags.index(first)
    stop = start + 1
    while stop < len(tags) and tags[stop] == inside:
        stop += 1
    return " ".join(row["tokens"][start:stop])


def _draw_order(rows: Iterable[Row], right: str, other: str) -> Iterator[Row]:
    """Two columns in an order drawn row by row with seed 42; label 0 where `right` comes first."""
    random = np.random.RandomState(42)
    for row in rows:
        label = 0 if random.random_sample() > 0.5 else 1
        first, second = (right, other) if label == 0 else (other, right)
        yield {**row, "sentence_1": row[first], "sentence_2": row[second], "label": label}


def _spaced(row: Row, *columns: str) -> Row:
    """Some columns of a row, their texts with spaces around punctuation."""
    return {name: _space(row[name]) for name in columns}


def _space(text: str) -> str:
    """A text with spaces around every sign but letters, digits, accents and underscores.

    T5 wrote SQuAD so (Raffel et al. 2020, `_pad_punctuation` in their code); one space for several.
    """
    signs = (
        sign if sign == "_" or unicodedata.category(sign)[0] in "LNM" else f" {sign} "
        for sign in text
    )
    return " ".join("".join(signs).split())


def _mark(text: str, span: str, index: int, sign: str) -> str:
    """The text with signs around the span that starts at a word; as it is, if none starts there."""
    words = re.match(rf"(?:\S+\s){{{index}}}", text)
    if words is None or not text.startswith(span, words.end()):
        return text
    start = words.end()
    return f"{text[:start]}{sign} {span} {sign}{text[start + len(span) :]}"
