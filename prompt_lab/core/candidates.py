"""Which of C candidate answers is likeliest, with as few decoder passes as that takes.

The score of an answer is the summed log-likelihood of its tokens, end token included, or their
mean. The first pass gives every candidate's first token. From then on each row follows candidates,
the likeliest alone, then those that can win still: their remaining tokens run at once, which makes
their scores exact and, along the tokens that others share with them (candidates form a trie), tells
more of those. What is known of a candidate bounds its score from above, since log-likelihoods only
fall; a row none of whose bounds reaches its best exact score is done. So where first tokens tell
the labels apart most rows take one more pass, and the choice is that of exhaustive scoring. How a
model runs tokens behind a row is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

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
tokens of each (b, t); returns the logits (b, t, V) behind them. Where several answers of a row may
run at once, a row is kept several times, one behind the other."""


def candidate_scores(
    first: Tensor,
    answers: Tensor,
    follow: Follow,
    pad_id: int,
    *,
    exhaustive: bool,
    mean: bool = False,
    at_once: int = 0,
) -> Tensor:
    """Scores of C answers for B rows, or upper bounds whose largest is exact: float32 (B, C).

    Args:
        first: logits (B, V) of the first token.
        answers: (C, T) token ids, padded on the right with ``IGNORE``.
        follow: runs the tokens of answers behind rows.
        pad_id: id that stands for padding.
        exhaustive: follow every candidate, so that every score is exact.
        mean: divide sums by the answers' tokens.
        at_once: run several answers of a row in one pass, as long as its tokens are no more.
    """
    lengths = (answers != IGNORE).sum(1)  # (C,)
    shared = (answers[:, None] == answers[None]).long().cumprod(2).sum(2)  # (C, C) leading tokens
    settles = (shared >= lengths - 1).float()  # (C, C) whether following one makes another exact
    # Following the longest candidate that goes through all of another settles that one, too.
    through = F.one_hot((settles * lengths[:, None]).argmax(0), len(answers)).float()  # (C, C)
    tokens = answers.masked_fill(answers == IGNORE, pad_id)
    scores = _picked(first, tokens[:, 0])  # (B, C), what is known so far
    starts = scores.clone()
    sizes = lengths if mean else torch.ones_like(lengths)  # (C,)
    exact = (lengths == 1).expand_as(scores).clone()
    rows, count = torch.arange(len(first), device=first.device), 0 if exhaustive else 1
    while True:
        bounds = scores / sizes
        best = bounds.masked_fill(~exact, -torch.inf).amax(1, keepdim=True)
        open_ = ~exact if exhaustive else ~exact & (bounds >= best)
        if not (left := int(open_.any(1).sum())):
            return bounds
        count = count or max(1, at_once // (left * (answers.shape[1] - 1)))
        order = bounds.clamp(min=torch.finfo(bounds.dtype).min).masked_fill(~open_, -torch.inf)
        top = order.topk(min(count, len(answers))).indices  # (B, count)
        picked = torch.zeros_like(open_).scatter(1, top, open_.gather(1, top)).float()
        followed = picked @ through  # (B, C)
        new, choice = followed.nonzero(as_tuple=True)  # (b,), row by row
        place = torch.zeros_like(lengths[:1]).expand(len(first)).clone()
        place[rows] = torch.arange(len(rows), device=rows.device)
        keep = None if torch.equal(new, rows) else place[new]
        rows, count = new, 0
        depths = int(lengths[choice].max())
        logits = follow(keep, tokens[choice, : depths - 1])
        told = shared[choice]  # (b, C) tokens that a candidate has in common with the choice
        total = starts[rows]
        for depth in range(1, depths):
            step = _picked(logits[:, depth - 1], tokens[:, depth])
            total = total + torch.where((told >= depth) & (lengths > depth), step, 0)
        scores.scatter_reduce_(0, rows[:, None].expand_as(total), total, "amin")
        exact |= followed @ settles > 0


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihoods (b, C) of C tokens under logits (b, V), at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_select(1, tokens) - logits.logsumexp(1, keepdim=True)
