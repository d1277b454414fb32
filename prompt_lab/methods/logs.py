"""What a fit logs: its settings, its rates, the scores of an evaluation, and warnings of these."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from prompt_lab.core.optim import BankOptimizer
from prompt_lab.core.run import Run
from prompt_lab.core.text import some
from prompt_lab.data.sampling import bank_draw
from prompt_lab.files.results import append_curves, start_curves
from prompt_lab.methods.configs import flag_names
from prompt_lab.methods.identity import settings_of

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod


def log_settings(method: PromptMethod) -> None:
    """Tell the loggers the settings of model and data, by the names of the flags."""
    found = {f"model.{k}": v for k, v in flag_names(dict(method.hparams)).items()}
    found |= {k: v for k, v in settings_of(method).items() if k.startswith("data.")}
    for logger in method.trainer.loggers if method.trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):  # a sweep's own settings are locked
            known = logger.experiment.config
            new = {k: v for k, v in found.items() if k not in known}
            known.update(new, allow_val_change=True)
        else:
            logger.log_hyperparams(found)


def begin_curves(method: PromptMethod, scores: list[float]) -> None:
    """Begin ``curves.csv``, or go on with it, and add the scores of step 0 where there are some."""
    scores = method.shares.join(scores) if scores else []
    if method.trainer.is_global_zero and method.run_dir:
        method.run_dir.mkdir(parents=True, exist_ok=True)
        curves = method.run_dir / "curves.csv"
        start_curves(curves, method.trainer.global_step)
        scored = zip(method.all_runs, scores, strict=False)  # none, or one for each run
        append_curves(curves, ({"step": 0, "run": run.name, "dev": dev} for run, dev in scored))


def log_rates(method: PromptMethod) -> None:
    """Log the mean, lowest and highest learning rate of the live runs."""
    (optimizer,) = method.trainer.optimizers
    rates = [group["lr"] for group in optimizer.param_groups]
    if isinstance(optimizer, BankOptimizer) and not method.joint:
        factor = rates[0] / max(optimizer.learning_rates)
        rates = [method.runs[i].learning_rate * factor for i in method.progress.live]
    logged = {"lr": sum(rates) / len(rates), "lr/min": min(rates), "lr/max": max(rates)}
    method.log_dict(logged, rank_zero_only=False)


def log_evaluation(method: PromptMethod, scores: Tensor, lines: list[int]) -> None:
    """Log the spread of scores (R,) over runs, and the evaluated ones' lines of ``curves.csv``."""
    shares = method.shares
    if not method.over_ranks(method.loss_sum).isfinite().all():  # of runs that do not rest alone
        method.warn_once(
            "nan",
            f"the loss is not finite by step {method.trainer.global_step}; the best state so far "
            "is kept. A lower learning_rate, or clip, may help",
        )
    rows = method.curve_lines(method.mean_losses().tolist(), scores, lines)
    if shares.divided:  # those of all processes, in the order of the grid
        rows = shares.join_some(dict(zip(lines, rows, strict=True)))
    best = [x for x in shares.gather(method.keeper.score.tolist()) if x > -torch.inf]
    losses = [row["train_loss"] for row in rows if row.get("train_loss") is not None]
    logged = {"best/val_score": fmean(best) if best else float("nan")}
    logged["train/loss"] = sum(losses) / max(1, len(losses))
    if method.trains_a_bank and not method.joint:
        logged["runs_alive"] = float(method.count_live())
    method.log_dict(logged, prog_bar=True, rank_zero_only=False)

    spread: dict[str, list[float]] = defaultdict(list)
    of_tasks = [(method.runs[i].task, scores[i].item()) for i in lines]
    for task, score in shares.gather(of_tasks):
        if score == score:
            spread[task].append(score)
    more = method.logged(scores)
    for task, values in spread.items():
        more |= {f"dev/{task}/min": min(values), f"dev/{task}/max": max(values)}
        more[f"dev/{task}/mean"] = sum(values) / len(values)
    if method.joint and method.runs:
        more["dev/mean"] = scores.nanmean().item()
    if method.dev_loss:
        more["dev/loss"] = dev_loss(method, lines)
    method.log_dict(more, rank_zero_only=False)
    if method.trainer.is_global_zero and method.run_dir:
        append_curves(method.run_dir / "curves.csv", rows)


@torch.no_grad()
def dev_loss(method: PromptMethod, lines: list[int]) -> float:
    """Mean over runs of the mean loss of their dev rows."""
    data, total = method.datamodule, 0.0
    for i in lines:
        run = method.runs[i]
        rows = data.tokens(run.task, run.sample, "dev")
        whole = Run(run.task, run.sample, 0, 1.0, len(rows))  # one step reads every row once
        drawn = bank_draw([whole], {(run.task, run.sample): rows}, 0, data.layout, method.row_share)
        batch = drawn.batch(0, [0]).to(method.device)
        index = batch.prompt_index.new_full((len(batch),), i)
        batch = replace(batch, prompts=[i] * len(batch), prompt_index=index)
        count = method.num_virtual_tokens
        for part in method.backbone.micro_batches(batch, method.tokens_per_forward, count):
            prefix, part = method.prefix_of(method._prefixes, part)
            total += (method.backbone.row_losses(prefix, part) * part.weight).sum().item()
    summed = method.over_ranks(torch.tensor([total], device=method.device)).item()
    found = method.shares.gather([(summed, len(lines))])
    return sum(x for x, _ in found) / max(1, sum(n for _, n in found))


def warn_of_answers(method: PromptMethod, lines: list[int]) -> None:
    """Warn of runs that answer every dev row alike, and of prompts that do not move."""
    step, shares = method.trainer.global_step, method.shares
    constant = shares.gather([method.runs[i].name for i in method.evaluation.constant_runs()])
    if constant and step > method.total_steps // 4:
        method.warn_once(
            "constant",
            f"step {step}: the same answer to every dev row from {some(constant)}; the score "
            "is that of a constant. Try another learning_rate",
        )
    moved = method.moved()
    if idle := shares.gather([method.runs[i].name for i in lines if moved[i] < 1e-3]):
        method.warn_once(
            "still",
            f"step {step}: prompts within 0.1 % of their start: {some(idle)}. Soft prompts "
            "need large learning rates (0.3 is usual for T5)",
        )
