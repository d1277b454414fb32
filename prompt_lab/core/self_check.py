"""Which way of running a model is exact: tried at loading, against plain prepending.

Models differ in positions, windows, masks and attention more than a list of names can tell. So two
rows of unequal length run behind a prompt, with every window lowered to 8 so that they reach
beyond it, in the attention and dtype of the fit: one by one and whole, as anyone would run them,
and in each way that is faster. Loss, the prompt's gradient, label scores and greedy tokens must
agree. The fastest way that passes is taken; a model that passes none is refused. Nothing is stored.

Layers of one kind are run alike, so the model stands there with its first layers alone, up to one
behind the first of each kind: what a layer hands on shows in the next. A model that fails so, or
does not run, is tried whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prompt_lab.core.batch import make_batch

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone

_WINDOW, _PROMPT, _NEW = 8, 3, 2
_LENGTHS = (9, 4)
_NUMBERS = ("layer_idx", "layer_id", "layer_number")

_known: dict[str, tuple[Any, bool]] = {}
"""What was found in this process, by config, dtype and attention."""


def choose_way(backbone: Backbone) -> None:
    """Let a backbone run its model in the fastest way that is exact.

    Raises:
        ValueError: no way is, with the differences.
    """
    model: Any = backbone.model
    runner: Any = backbone.runner
    attention = getattr(model.config, "_attn_implementation", None)
    sizes = backbone.specials, len(backbone.tokenizer)
    key = f"{model.config.to_json_string()} {model.dtype} {attention} {sizes}"
    if key in _known:
        runner.way, runner.pads_generation = _known[key]
        return
    with _low_windows(model), torch.random.fork_rng(devices=[]):
        wrong = [""]
        with suppress(Exception), _first_layers(model):  # a model may not run so
            wrong = _set_way(backbone)
        wrong = wrong and _set_way(backbone)
    if not wrong:
        _known[key] = runner.way, runner.pads_generation
        return
    raise ValueError(
        f"backbone {backbone.name!r} ({model.config.model_type}) gives other results behind keys "
        f"and values of prompts, or in batches, than with the prompt in front of each row "
        f"({'; '.join(wrong)}): take a model whose attention sees what stands in front, as it is"
    )


def _set_way(backbone: Backbone) -> list[str]:
    """Set the fastest way that is exact; where none is, what each gets wrong."""
    runner: Any = backbone.runner
    expected, wrong = _plain(backbone), []
    for way in runner.ways():
        for pads in (True, False):
            runner.way, runner.pads_generation = way, pads
            try:
                found = _difference(backbone, *expected)
            except Exception as error:  # whatever a model raises in a way that is not its own
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if not found:
                return []
            if not found.startswith("greedy"):
                break  # padding of generated rows does not matter
        wrong.append(f"{way}: {found}")
    return wrong


def _inputs(backbone: Backbone) -> tuple[Tensor, list[list[int]], list[int]]:
    """A prompt (N, D), the tokens of two rows, and of one answer."""
    draw = torch.Generator().manual_seed(0)
    special = {*backbone.specials.ends, backbone.specials.pad, backbone.specials.start}
    ids = [i for i in range(min(1000, backbone.vocabulary)) if i not in special]
    picked = [ids[i] for i in torch.randint(len(ids), (30,), generator=draw).tolist()]
    at = torch.tensor(picked[:_PROMPT], device=backbone.device)
    with torch.no_grad():
        prompt = backbone.embed(at).to(torch.promote_types(backbone.model.dtype, torch.float32))
    rows = [picked[_PROMPT : _PROMPT + _LENGTHS[0]], picked[15 : 15 + _LENGTHS[1]]]
    return prompt, rows, [*picked[22:24], backbone.specials.end]


def _plain(backbone: Backbone) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses (2,), gradient (N, D) and, row by row, logits (2, V) of the greedy tokens."""
    prompt, rows, answer = _inputs(backbone)
    prompt = prompt.requires_grad_()
    losses, firsts = [], []
    with torch.enable_grad():
        for row in rows:
            logits = _logits(backbone, prompt, row, answer)
            firsts.append(logits[0].detach())
            losses.append(-logits.log_softmax(-1)[range(len(answer)), answer].mean())
        total = torch.stack(losses)
        (gradient,) = torch.autograd.grad(total.sum(), prompt)
    greedy = []
    with torch.no_grad():
        for row, first in zip(rows, firsts, strict=True):
            token = int(first.argmax())
            greedy.append(_logits(backbone, prompt, row, [token, token]))
            if (greedy[-1][0] - first).abs().max() > 0.05 * first.abs().max():
                raise ValueError(
                    f"backbone {backbone.name!r} ({backbone.model.config.model_type}) predicts a "
                    "token from those that come after it, too, as encoders do: take a language "
                    "model"
                )
    return total.detach(), gradient, greedy


def _logits(backbone: Backbone, prompt: Tensor, row: list[int], answer: list[int]) -> Tensor:
    """Logits (T, V), at least float32, of an answer behind a row behind its prompt, run whole."""
    model, device = backbone.model, backbone.device
    text = row if backbone.is_encoder_decoder else row + answer[:-1]
    states = torch.cat([prompt.to(model.dtype), backbone.embed(torch.tensor(text, device=device))])
    settings: dict[str, Any] = {"use_cache": False}
    if backbone.is_encoder_decoder:
        known = [backbone.specials.start, *answer[:-1]]
        settings["decoder_input_ids"] = torch.tensor([known], device=device)
    logits = model(inputs_embeds=states[None], **settings).logits[0, -len(answer) :]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _difference(backbone: Backbone, losses: Tensor, gradient: Tensor, greedy: list[Tensor]) -> str:
    """What a way gets wrong, in words; empty where it is right."""
    half = backbone.model.dtype in (torch.bfloat16, torch.float16)
    loose, of_gradient = (0.05, 0.3) if half else (1e-4, 1e-3)
    prompt, rows, answer = _inputs(backbone)
    bank = prompt[None].requires_grad_()
    batch = make_batch(
        *(rows, [answer] * 2, [0, 0]),
        pad_id=backbone.pad_id,
        left_padded=not backbone.is_encoder_decoder,
    ).to(backbone.device)
    back = torch.tensor(batch.rows).argsort().tolist()
    makers = (backbone.prefix_for, lambda bank, batch: backbone.prefix(bank))
    for make in makers if backbone.packs else makers[1:]:
        with torch.enable_grad():
            own = backbone.row_losses(make(bank, batch), batch)
            (own_gradient,) = torch.autograd.grad(own.sum(), bank)
        own = own.detach()[back]
        far = (own - losses).abs().max() > loose * max(1.0, losses.abs().max().item())
        if far or not own.isfinite().all():
            return f"losses {own.tolist()} instead of {losses.tolist()}"
        gap = ((own_gradient[0] - gradient).norm() / gradient.norm()).item()
        if not gap <= of_gradient:
            return f"a gradient {gap:.2g} of its size off"
    with torch.no_grad():
        prefix = backbone.prefix(bank)
        tokens = torch.tensor([answer, [answer[0], answer[0], answer[0]]], device=backbone.device)
        scores = backbone.scores_of(prefix, batch, tokens)[back, 0]
        if (scores / -len(answer) - losses).abs().max() > loose * max(
            1.0, losses.abs().max().item()
        ):
            return f"scores {scores.tolist()} instead of {(-len(answer) * losses).tolist()}"
        made = backbone.generate_ids(prefix, batch, _NEW, 1)
    for at, ids in enumerate(made[row] for row in back):
        for step, token in enumerate(ids[:_NEW]):
            logits = greedy[at][step]
            if logits.max() - logits[token] > loose * max(1.0, logits.abs().max().item()):
                return f"greedy answers {ids} whose tokens are not the likeliest"
            if token != int(logits.argmax()):
                break  # a tie, within rounding; what follows differs
    return ""


@contextmanager
def _low_windows(model: Any) -> Iterator[None]:
    """Within it no window of a model is wider than a few positions."""
    holders = [model.config, model.config.get_text_config(), *model.modules()]
    before = [
        (holder, name, size)
        for holder in {id(holder): holder for holder in holders}.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(size := getattr(holder, name, None), int) and size > _WINDOW
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, _WINDOW)
        yield
    finally:
        for holder, name, size in before:
            setattr(holder, name, size)


@contextmanager
def _first_layers(model: Any) -> Iterator[None]:
    """Within it each list of layers ends one behind the first of each of its kinds."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [
        (holder, name, layers)
        for holder in model.modules()
        for name, layers in holder.named_children()
        if isinstance(layers, nn.ModuleList)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)
    ]
    try:
        for holder, name, layers in found:
            kinds = [_kind(layer) for layer in layers]
            setattr(holder, name, layers[: max(map(kinds.index, kinds), default=0) + 2])
        yield
    finally:
        for holder, name, layers in found:
            setattr(holder, name, layers)


def _kind(layer: nn.Module) -> str:
    """The modules and settings of a layer, apart from its number."""
    settings = [
        (name, value)
        for part in layer.modules()
        for name, value in vars(part).items()
        if isinstance(value, (int, float, str)) and name not in _NUMBERS
    ]
    return f"{layer} {settings}"
