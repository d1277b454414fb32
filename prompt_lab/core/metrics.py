"""The seven task metrics of the CrossFit gym, scored for a whole bank of prompts at once.

Variant `crossfit` follows the definitions of CrossFit (Ye et al., 2021), surprises included;
`corrected` mends those. Scores are fractions, not percentages. Predictions are stripped first.

| metric | `crossfit` | `corrected` |
| --- | --- | --- |
| ACC | equal to a reference, letter case aside | the same |
| EM | equal to a reference after `normalise_answer` | the same |
| QA-F1 | F1 of shared words; two empty answers give 0 | they give 1 |
| Rouge-L | on distinct words, see `rouge_l` | the standard ROUGE-L |
| Classification-F1 | each wrong string is one more class | gold classes only |
| Matthew-Correlation | all but "acceptable" is negative | a wrong answer is the other label |
| Pearson-Correlation | NaN for a non-number or a constant | a number, see `pearson` |

The first reference is the gold answer of the last three; the others take the best over all
references. Left out: stemming, ROUGE-1 and ROUGE-2, row weights, rows scored more than once.
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from prompt_lab.core.metric_names import LABEL_METRICS, METRICS, ROW_METRICS

VARIANTS = ("crossfit", "corrected")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")


def normalise_answer(text: str) -> str:
    """Lower-case `text`, drop ASCII punctuation and English articles, and collapse white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if `prediction` equals a reference after `normalise_answer`, else 0.0."""
    answer = normalise_answer(prediction)
    return float(any(answer == normalise_answer(reference) for reference in references))


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the stripped `prediction` equals a reference, letter case aside, else 0.0."""
    answer = prediction.strip().lower()
    return float(any(answer == reference.lower() for reference in references))


def qa_f1(prediction: str, references: Sequence[str], variant: str = "crossfit") -> float:
    """F1 of the words that normalised answer and reference share, best over references (SQuAD).

    If both are empty after normalising, the score is 0 in `crossfit` and 1 in `corrected`.
    """
    _check_variant(variant)
    answer = normalise_answer(prediction).split()
    both_empty = 1.0 if variant == "corrected" else 0.0
    return max(
        (_word_f1(answer, normalise_answer(r).split(), both_empty) for r in references), default=0.0
    )


def _word_f1(answer: list[str], gold: list[str], both_empty: float) -> float:
    """F1 of two lists of words as bags."""
    if not answer and not gold:
        return both_empty
    shared = sum((Counter(answer) & Counter(gold)).values())
    return 2 * shared / (len(answer) + len(gold))


def rouge_l(prediction: str, references: Sequence[str], variant: str = "crossfit") -> float:
    """ROUGE-L F-measure, best over references.

    `crossfit` equals `rouge` 1.0.0 at summary level: sentences end at ".", words keep their case
    and count once; the match is the union over sentence pairs of the words in one longest common
    subsequence; F = 2PR / (P + R + 1e-8). An answer of nothing but punctuation scores 0, and so
    does a reference without a sentence, such as "." or "", where `rouge` raises.

    `corrected` is the ROUGE-L of Lin (2004): F1 of the longest common subsequence over lower-cased
    runs of a-z and 0-9, no stemming. A text without such a run scores 0.
    """
    _check_variant(variant)
    prediction = prediction.strip()
    if variant == "corrected":
        answer = _ROUGE_WORD.findall(prediction.lower())
        return max(
            (_lcs_f1(answer, _ROUGE_WORD.findall(r.lower())) for r in references), default=0.0
        )
    if not prediction.translate(_PUNCTUATION):
        return 0.0
    sentences = _sentences(prediction)
    return max((_distinct_word_rouge(sentences, _sentences(r)) for r in references), default=0.0)


def _lcs_f1(answer: list[str], gold: list[str]) -> float:
    """F1 of the longest common subsequence of two lists of words."""
    if not answer or not gold:
        return 0.0
    length = len(answer) - _lcs_rows(gold, answer)[-1].bit_count()
    return 2 * length / (len(answer) + len(gold))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space holds one empty word, as in `rouge` 1.0.0."""
    return [part.split() or [""] for part in text.split(".") if part]


def _distinct_word_rouge(answer: list[list[str]], gold: list[list[str]]) -> float:
    """Summary-level ROUGE-L of `rouge` 1.0.0 from sentences of words; 0 without a gold sentence."""
    if not answer or not gold:
        return 0.0
    shared = set().union(*(_lcs_words(g, a) for g in gold for a in answer))
    precision = len(shared) / len(set().union(*answer))
    recall = len(shared) / len(set().union(*gold))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _lcs_rows(x: list[str], y: list[str]) -> list[int]:
    """Table of common subsequence lengths of `x` and `y`, one bit vector per row (Hyyrö, 2004).

    The first i words of `x` and j of `y` share j minus the ones in the low j bits of row i.
    """
    full = (1 << len(y)) - 1
    places: dict[str, int] = {}
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    rows = [full]
    for word in x:
        match = rows[-1] & places.get(word, 0)
        rows.append(((rows[-1] + match) | (rows[-1] - match)) & full)
    return rows


def _lcs_words(x: list[str], y: list[str]) -> set[str]:
    """Distinct words of one longest common subsequence; ties go as in `rouge` 1.0.0."""
    rows = _lcs_rows(x, y)

    def length(i: int, j: int) -> int:
        """Length of a longest common subsequence of the first i and the first j words."""
        return j - (rows[i] & ((1 << j) - 1)).bit_count()

    i, j, words = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.add(x[i])
        elif length(i - 1, j) > length(i, j - 1):
            i -= 1
        else:
            j -= 1
    return words


def number(prediction: str) -> float:
    """The number that `prediction` spells, as `float` reads it, or NaN."""
    try:
        return float(prediction.strip())
    except ValueError:
        return math.nan


def classification_f1(
    codes: np.ndarray, gold: np.ndarray, num_labels: int, variant: str = "crossfit"
) -> np.ndarray:
    """Macro F1 of R prompts (metric Classification-F1).

    `crossfit` averages over every class that occurs as gold or prediction, so each different junk
    string is a class with F1 0 (scikit-learn's default). `corrected` averages over the gold
    classes alone: any other prediction costs recall only.

    Args:
        codes: (R, n) 1 + index of a known label, or a negative number for each junk string.
        gold: (n,) codes of the gold labels, all known.
        num_labels: number of known labels.
        variant: `crossfit` or `corrected`.

    Returns:
        Scores (R,).
    """

    def count(mask: np.ndarray) -> np.ndarray:
        """Cells of `mask` per prompt and known label, (R, num_labels)."""
        cells = np.nonzero(mask)[0] * num_labels + codes[mask] - 1
        return np.bincount(cells, minlength=len(codes) * num_labels).reshape(-1, num_labels)

    support = np.bincount(gold - 1, minlength=num_labels)
    both = count(codes > 0) + support
    f1 = 2 * count(codes == gold) / np.maximum(both, 1)
    if variant == "corrected":
        return f1[:, support > 0].mean(1)
    junk = np.sort(np.minimum(codes, 0), axis=1)
    first_of_kind = (junk[:, 1:] != junk[:, :-1]) & (junk[:, 1:] < 0)
    return f1.sum(1) / ((both > 0).sum(1) + (junk[:, 0] < 0) + first_of_kind.sum(1))


def matthews(predicted: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Matthews correlation (R,) of booleans (R, n) with gold (n,); 0 where a side is constant."""
    predicted, gold = predicted.astype(np.float64), gold.astype(np.float64)
    n, p, g = len(gold), predicted.sum(1), gold.sum()
    spread = p * (n - p) * g * (n - g)
    covariance = n * (predicted @ gold) - p * g
    return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)


def pearson(values: np.ndarray, gold: np.ndarray, variant: str = "crossfit") -> np.ndarray:
    """Pearson correlation (R,) of numbers (R, n) with gold (n,) (metric Pearson-Correlation).

    `crossfit` is NaN if a prediction is not finite or a side is constant. In `corrected` such a
    prediction counts as the mean of the gold values, and a constant side gives 0. (A score over
    the finite rows alone could be raised by answering only the easy ones.)
    """
    if variant == "corrected":
        values = np.where(np.isfinite(values), values, gold.mean())
    with np.errstate(all="ignore"):
        score = np.clip((_unit(values) * _unit(gold[None])).sum(1), -1, 1)
    return np.nan_to_num(score, nan=0.0) if variant == "corrected" else score


def _unit(rows: np.ndarray) -> np.ndarray:
    """Each row centred and scaled to length 1; NaN if constant.

    Dividing by the largest number first keeps big ones finite and makes constants exactly 1.
    """
    rows = rows / np.abs(rows).max(1, keepdims=True)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class BankMetric(Metric):
    """One metric of R prompts over the same n rows of one task.

    State: `cells` (R, n), the score or number of each prediction in float64, or for metrics on
    labels its code in int64 (1 + index of a known label, else a negative hash of the string);
    `seen` (R, n), how often each was given. One rank writes each cell, once, so sums over ranks
    are exact, whatever their shares. Use `update` and `compute`; `forward` has no meaning here.

    Args:
        metric: one of `METRICS`.
        num_prompts: R.
        references: accepted answers of each of the n rows, the gold answer first.
        labels: closed label list; needed by metrics on labels in variant `corrected`.
        variant: `crossfit` or `corrected`.
        settings: those of `torchmetrics.Metric`, such as `sync_on_compute`.

    Raises:
        ValueError: for an unknown metric or variant, or unusable references or labels.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    cells: Tensor
    seen: Tensor

    def __init__(
        self,
        metric: str,
        num_prompts: int,
        references: list[list[str]],
        labels: Sequence[str] | None = None,
        variant: str = "crossfit",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        _check_inputs(metric, num_prompts, references, labels, variant)
        self.metric, self.variant, self.references = metric, variant, references
        on_labels = metric in LABEL_METRICS
        known = dict.fromkeys([*(labels or ()), *(r[0] for r in references)]) if on_labels else ()
        self._codes = {label: 1 + i for i, label in enumerate(known)}
        shape, dtype = (num_prompts, len(references)), torch.int64 if on_labels else torch.float64
        self.add_state("cells", torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, prompt_index: Sequence[int], row_index: Sequence[int], predictions: Sequence[str]
    ) -> None:
        """Take the predictions of B (prompt, row) pairs, in any order; B may be 0.

        Args:
            prompt_index: (B,) prompt of each prediction, 0 to R - 1.
            row_index: (B,) row of each prediction, 0 to n - 1.
            predictions: B strings.

        Raises:
            ValueError: for unequal lengths or an index out of range.
        """
        prompts = torch.as_tensor(prompt_index, dtype=torch.int64, device="cpu")
        rows = torch.as_tensor(row_index, dtype=torch.int64, device="cpu")
        lengths = (len(prompts), len(rows), len(predictions))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{lengths} prompts, rows and predictions were given; give equally many of each."
            )
        _check_range("prompt_index", prompts, self.cells.shape[0])
        _check_range("row_index", rows, self.cells.shape[1])
        cell = functools.cache(self._cell)
        found = [cell(row, text) for row, text in zip(rows.tolist(), predictions, strict=True)]
        place = (prompts.to(self.cells.device), rows.to(self.cells.device))
        self.cells.index_put_(place, self.cells.new_tensor(found), accumulate=True)
        self.seen.index_put_(place, torch.ones_like(place[0]), accumulate=True)

    def compute(self) -> Tensor:
        """Scores (R,) in float64 over the rows that were given; NaN for a prompt without any.

        Raises:
            ValueError: for a row that was given twice.
        """
        seen = self.seen.cpu().numpy()
        _check_seen(seen)
        self._rows_seen = torch.as_tensor((seen > 0).sum(1))
        cells, scores = self.cells.cpu().numpy(), np.full(len(seen), math.nan)
        kinds, of = np.unique(seen.astype(bool), axis=0, return_inverse=True)
        for kind, rows in enumerate(kinds):
            own = np.flatnonzero(of.reshape(-1) == kind)
            if rows.any():
                scores[own] = self._scores(cells[own][:, rows], np.flatnonzero(rows))
        return torch.as_tensor(scores, device=self.seen.device)

    @property
    def rows_seen(self) -> Tensor:
        """(R,) how many rows each prompt was given, of all processes once scores are computed."""
        return self._rows_seen if self._computed is not None else (self.seen > 0).sum(1)

    def _cell(self, row: int, text: str) -> float:
        """What is kept of one prediction: its code, its number or its score."""
        if self.metric in LABEL_METRICS:
            return self._code(text.strip())
        if self.metric == "Pearson-Correlation":
            return number(text)
        references = self.references[row]
        if self.metric == "QA-F1":
            return qa_f1(text, references, self.variant)
        if self.metric == "Rouge-L":
            return rouge_l(text, references, self.variant)
        return (accuracy if self.metric == "ACC" else exact_match)(text, references)

    def _code(self, text: str) -> int:
        """Code of a known label, or a negative hash that is the same in every process."""
        if text in self._codes:
            return self._codes[text]
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return -1 - (int.from_bytes(digest, "big") >> 1)

    def _scores(self, cells: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores of prompts whose cells (prompts, m) are of the rows (m,)."""
        answers = [self.references[row][0] for row in rows]
        if self.metric == "Pearson-Correlation":
            return pearson(cells, np.array([number(a) for a in answers]), self.variant)
        if self.metric in ROW_METRICS:
            return cells.mean(1)
        gold = np.array([self._code(answer) for answer in answers])
        if self.metric == "Classification-F1":
            return classification_f1(cells, gold, len(self._codes), self.variant)
        if self.variant == "crossfit":
            positive = self._code("acceptable")
            return matthews(cells == positive, gold == positive)
        return matthews((cells == gold) == (gold == 1), gold == 1)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Keep the shape (R,), which torchmetrics would squeeze to () for one prompt."""
        wrapped = super()._wrap_compute(compute)
        return functools.wraps(compute)(lambda: wrapped().reshape(-1))


def chance_score(
    metric: str,
    labels: Sequence[str] | None,
    references: list[list[str]],
    variant: str = "crossfit",
    seed: int = 0,
    draws: int = 200,
) -> float:
    """Mean over `draws` of the score of labels drawn uniformly; NaN without a closed label list."""
    if not labels:
        return math.nan
    # Every rank scores all rows by itself, so there is nothing to sum.
    scorer = BankMetric(metric, draws, references, labels, variant, sync_on_compute=False)
    prompts, rows = np.indices((draws, len(references))).reshape(2, -1)
    choice = np.random.default_rng(seed).integers(len(labels), size=len(rows))
    scorer.update(prompts.tolist(), rows.tolist(), [labels[int(i)] for i in choice])
    return scorer.compute().mean().item()


def majority_score(
    metric: str,
    train_targets: Sequence[str],
    references: list[list[str]],
    labels: Sequence[str] | None = None,
    variant: str = "crossfit",
) -> float:
    """Score of always giving the most frequent train target; ties take the first when sorted."""
    if not train_targets:
        raise ValueError("No train targets were given; give at least one.")
    counts = Counter(train_targets)
    answer = min(counts, key=lambda target: (-counts[target], target))
    scorer = BankMetric(metric, 1, references, labels, variant, sync_on_compute=False)
    n = len(references)
    scorer.update([0] * n, range(n), [answer] * n)
    return scorer.compute().item()


def _require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _check_variant(variant: str) -> None:
    """Refuse a variant that does not exist."""
    _require(variant in VARIANTS, f"Variant {variant!r} is unknown; use one of {VARIANTS}.")


def _check_inputs(
    metric: str,
    num_prompts: int,
    references: list[list[str]],
    labels: Sequence[str] | None,
    variant: str,
) -> None:
    """Refuse arguments that `BankMetric` cannot score with."""
    _require(metric in METRICS, f"Metric {metric!r} is unknown; use one of {METRICS}.")
    _check_variant(variant)
    _require(num_prompts > 0, f"num_prompts is {num_prompts}; give at least 1.")
    _require(len(references) > 0, "No rows of references were given; give at least one.")
    for i, row in enumerate(references):
        usable = bool(row) and not isinstance(row, str)
        _require(usable, f"References of row {i} are {row!r}; give a list of one or more answers.")
        if metric == "Pearson-Correlation":
            finite = math.isfinite(number(row[0]))
            _require(finite, f"Gold answer {row[0]!r} of row {i} must be a number for {metric}.")
    if metric in LABEL_METRICS and variant == "corrected":
        _check_labels(metric, {row[0] for row in references}, set(labels or ()))


def _check_labels(metric: str, gold: set[str], labels: set[str]) -> None:
    """Refuse labels that the corrected form of a metric on labels cannot use."""
    where = f"{metric} in variant 'corrected'"
    _require(len(labels) > 0, f"{where} needs the task's labels; none were given.")
    two = metric != "Matthew-Correlation" or len(labels) == 2
    _require(two, f"{where} needs two labels; {sorted(labels)} were given.")
    outside = sorted(gold - labels)
    _require(not outside, f"Gold answers {outside[:3]} are none of the task's labels; add them.")


def _check_range(name: str, index: Tensor, size: int) -> None:
    """Refuse indices outside 0 to `size` - 1."""
    for bad in index[(index < 0) | (index >= size)].tolist():
        raise ValueError(f"{name} holds {bad}; allowed are 0 to {size - 1}.")


def _check_seen(seen: np.ndarray) -> None:
    """Refuse rows given twice."""
    for prompt, row in np.argwhere(seen > 1):
        raise ValueError(f"Row {row} of prompt {prompt} was given twice; give each once per reset.")
