"""Which of C candidate answers is likeliest, with as few decoder passes as that takes.

The score of an answer is the summed log-likelihood of its tokens, end token included, or their
mean. The first pass gives every candidate's first token. From then on each row follows one
candidate at a time: its remaining tokens run at once, which makes its score exact and, along the
tokens that others share with it (candidates form a trie), tells more of theirs. What is known of a
candidate bounds its score from above, since log-likelihoods only fall; a row whose largest bound is
exact is done. So where first tokens tell the labels apart most rows take one more pass, and the
choice is that of exhaustive scoring. How a model runs tokens behind a row is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from prompt_lab.core.batch import IGNORE

LabelScore = Literal["sum", "mean"]
"""What the score of an answer is of the log-likelihoods of its tokens."""


def check_label_score(label_score: str, is_generated: bool = False, where: str = "") -> None:
    """Refuse (``ValueError``) another score, and a mean where no label is scored.

    ``where`` stands in front of the name of the setting.
    """
    if label_score not in get_args(LabelScore):
        allowed = ", ".join(get_args(LabelScore))
        raise ValueError(f"{where}label_score is {label_score!r}; allowed: {allowed}")
    if label_score == "mean" and is_generated:
        raise ValueError(
            f"{where}label_score mean is of labels that are scored, but answers are generated: "
            "give labels to choose among, or leave it out"
        )


Follow = Callable[[Tensor | None, Tensor], Tensor]
"""Takes the rows to keep (b,), places among those kept so far or None for all, and up to T - 1
tokens of each (b, t); returns the logits (b, t, V) behind them."""


def candidate_scores(
    first: Tensor,
    answers: Tensor,
    follow: Follow,
    pad_id: int,
    *,
    exhaustive: bool,
    mean: bool = False,
) -> Tensor:
    """Scores of C answers for B rows, or upper bounds whose largest is exact: float32 (B, C).

    Args:
        first: logits (B, V) of the first token.
        answers: (C, T) token ids, padded on the right with ``IGNORE``.
        follow: runs the tokens of one answer per row.
        pad_id: id that stands for padding.
        exhaustive: follow every candidate, so that every score is exact.
        mean: divide sums by the answers' tokens.
    """
    lengths = (answers != IGNORE).sum(1)  # (C,)
    shared = (answers[:, None] == answers[None]).long().cumprod(2).sum(2)  # (C, C) leading tokens
    # Following the longest candidate that goes through all of another settles that one, too.
    through = torch.where(shared >= lengths - 1, lengths[:, None], 0).argmax(0)  # (C,)
    tokens = answers.masked_fill(answers == IGNORE, pad_id)
    scores = _picked(first, tokens[:, 0])  # (B, C), what is known so far
    starts = scores.clone()
    sizes = lengths if mean else torch.ones_like(lengths)  # (C,)
    exact = (lengths == 1).expand_as(scores).clone()
    rows = torch.arange(len(first), device=first.device)
    while True:
        choice = _next_choice(scores[rows] / sizes, exact[rows], exhaustive)  # (b,), -1 for none
        keep = (choice >= 0).nonzero().squeeze(1)
        if len(keep) == 0:
            return scores / sizes
        all_stay = len(keep) == len(rows)
        rows, choice = rows[keep], through[choice[keep]]
        depths = int(lengths[choice].max())
        logits = follow(None if all_stay else keep, tokens[choice, : depths - 1])
        told = shared[choice]  # (b, C) tokens that a candidate has in common with the choice
        total = starts[rows]
        for depth in range(1, depths):
            step = _picked(logits[:, depth - 1], tokens[:, depth])
            total = total + torch.where((told >= depth) & (lengths > depth), step, 0)
        scores[rows] = torch.minimum(scores[rows], total)
        exact[rows] |= told >= lengths - 1


def _next_choice(scores: Tensor, exact: Tensor, exhaustive: bool) -> Tensor:
    """The candidate that each row follows next (b,), or -1 for a row that is done."""
    choice = exact.int().argmin(1) if exhaustive else scores.argmax(1)
    return choice.masked_fill(exact.gather(1, choice[:, None]).squeeze(1), -1)


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihoods (b, C) of C tokens under logits (b, V), at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_select(1, tokens) - logits.logsumexp(1, keepdim=True)
