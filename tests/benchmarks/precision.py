"""How near bfloat16 and float16 come to float32: gradients of prompts, and scores after training.

    python tests/benchmarks/precision.py [--parts gradients quality] [--threads 2]
                                         [--out FILE.jsonl] [--quick]

prints a JSON line per row and then both tables. On a CPU only; models on real tasks need
PROMPT_LAB_TEST_DATA, a folder with ``crossfit/`` and ``models/stories260K/``.

Gradients: loss and gradient of one prompt on one batch, on random models of five architectures and
on two trained ones, there at an initial prompt and at one that was tuned for some steps. Every way
of rounding runs the same rows under the same float32 prompt; the reference is float32, and float64
shows how far that is off itself. float16 runs also with losses of a 4096th, as at the end of a
training that fits its rows: their gradients are near the smallest numbers that float16 has.

Quality: whole fits by ``prompt-lab fit``, equal but for the rounding. The same fit in float32 with
its steps cut into other micro-batches shows what rounding to float32 alone does to scores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from models import TINY, Size, make_backbone, make_model, make_prompts, our_batch
from pairs import Settings, in_own_process, line
from steps import make_groups
from torch import Tensor

from prompt_lab import vocabulary_prompt
from prompt_lab.commands.fit import run as command_line
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient
from prompt_lab.core.batch import Batch, default_tokens_per_forward
from prompt_lab.files.results import read_csv
from prompt_lab.sandbox import rows as sandbox_rows

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("PROMPT_LAB_TEST_DATA")
RANDOM = {"t5": "T5", "bart": "BART", "gpt2": "GPT-2", "bloom": "BLOOM", "llama": "Llama"}
SIZE = Size(4, 256, 4, 32_000)
TRAINED = ("sandbox", "stories260K")
VIRTUAL_TOKENS, ROWS, LENGTHS = 20, 8, (15, 40)
SEEDS, BATCHES = 3, 2  # of a random model; a trained one sees as many batches
TUNING_STEPS = 100

Point = tuple[Backbone, Tensor, Batch]
"""A float32 backbone, a prompt (1, N, D), and rows."""


@dataclass(frozen=True)
class Way:
    """How a step is rounded.

    Attributes:
        dtype: of the frozen weights.
        autocast: dtype of autocast, or none.
        share: what losses are multiplied by.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    share: float = 1.0


WAYS = {
    "float64": Way(torch.float64),
    "bfloat16 weights": Way(torch.bfloat16),
    "bf16-mixed": Way(torch.float32, torch.bfloat16),
    "float16 weights": Way(torch.float16),
    "float16 weights, losses / 4096": Way(torch.float16, share=1 / 4096),
}

BF16 = {
    "bfloat16 weights": ["--model.backbone.dtype=bfloat16"],
    "bf16-mixed": ["--trainer.precision=bf16-mixed"],
}
PLAIN = {"float32": [], "float32, other micro-batches": ["--model.tokens_per_forward=512"]}
FITS = {
    "sandbox": PLAIN | BF16,
    "stories260K": PLAIN | BF16 | {"float16 weights": ["--model.backbone.dtype=float16"]},
}
STORIES_TASKS = ("glue-sst2", "yelp_review_full")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Agreement of bfloat16 and float16 with float32.")
    parts = {"gradients": gradients, "quality": quality}
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="file to which the JSON lines are added")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check the script")
    options = parser.parse_args()
    settings = Settings(threads=options.threads, quick=options.quick)
    if DATA is None:
        print("PROMPT_LAB_TEST_DATA is not set: stories260K is left out", file=sys.stderr)
    tables = []
    for part in options.parts:
        lines = []
        for found in parts[part](settings):
            lines.append(line("precision", part, found, settings))
            text = json.dumps(lines[-1])
            print(text, flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(f"{text}\n")
        tables.append(gradient_table(lines) if part == "gradients" else quality_table(lines))
    print("\n" + "\n\n".join(tables))


def trained() -> list[str]:
    """The trained models that are at hand."""
    return [name for name in TRAINED if name == "sandbox" or DATA is not None]


# ---- gradients -----------------------------------------------------------------------------------


def gradients(settings: Settings) -> Iterator[dict[str, Any]]:
    """Every model under every way of rounding."""
    for name in (*RANDOM, *trained()):
        yield from in_own_process("cpu", gradients_of, name, settings)


def gradients_of(name: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows of one model."""
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    cases = random_points(name, settings) if name in RANDOM else trained_points(name, settings)
    found = []
    for case, points in cases.items():
        references = [loss_and_gradient(*point, Way(torch.float32)) for point in points]
        for way in WAYS:
            try:
                made = [loss_and_gradient(*point, WAYS[way]) for point in points]
            except ValueError as error:  # the backbone's own word on float16
                found.append({"model": case, "way": way, "refused": str(error)})
                continue
            pairs = zip(made, references, strict=True)
            agreed = [agreement(*one, *reference) for one, reference in pairs]
            found.append({"model": case, "way": way, **spread(agreed)})
    return found


def random_points(kind: str, settings: Settings) -> dict[str, list[Point]]:
    """Random models of several seeds, each with a few batches."""
    points = []
    seeds, batches = (1, 1) if settings.quick else (SEEDS, BATCHES)
    for seed in range(seeds):
        backbone = make_backbone(random_model(kind, TINY if settings.quick else SIZE, seed))
        prompt = make_prompts(backbone, 1, VIRTUAL_TOKENS, seed)
        groups = make_groups(backbone, batches, ROWS, LENGTHS)
        points += [(backbone, prompt, our_batch(backbone, [group])) for group in groups]
    return {f"{RANDOM[kind]}-like": points}


def random_model(kind: str, size: Size, seed: int) -> Any:
    """A random model, BART too."""
    if kind != "bart":
        return make_model(kind, size, seed=seed)
    both = {"layers": size.layers, "attention_heads": size.heads, "ffn_dim": 4 * size.width}
    settings: dict[str, Any] = {"vocab_size": size.vocabulary, "d_model": size.width}
    settings |= {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in both.items()}
    torch.manual_seed(seed)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**settings)).eval()


def trained_points(name: str, settings: Settings) -> dict[str, list[Point]]:
    """A trained model with rows of a real task, at the initial prompt and at a tuned one."""
    backbone = Backbone.load(name if name == "sandbox" else f"{DATA}/models/{name}")
    rows = task_rows(name)
    count, steps = (1, 2) if settings.quick else (SEEDS * BATCHES, TUNING_STEPS)

    def batch(step: int) -> Batch:
        """The rows of a step, in turn."""
        at = [(step * ROWS + i) % len(rows) for i in range(ROWS)]
        inputs, targets = zip(*(rows[i] for i in at), strict=True)
        made = backbone.batch(inputs, targets, max_input_length=96)
        return replace(made, weight=torch.full_like(made.weight, 1 / ROWS))

    start = vocabulary_prompt(backbone, VIRTUAL_TOKENS, seed=0)[None]
    bank = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([bank], lr=0.3)
    for step in range(steps):
        _, bank.grad = bank_gradient(backbone, bank, batch(step), 2048)
        optimizer.step()
    prompts = {"initial prompt": start, f"after {steps} steps": bank.detach()}
    return {
        f"{name}, {when}": [(backbone, prompt, batch(step)) for step in range(count)]
        for when, prompt in prompts.items()
    }


def task_rows(name: str) -> list[tuple[str, str]]:
    """Training rows of a task with two labels."""
    if name == "sandbox":
        return sandbox_rows("sandbox-sst", 100, "train")
    path = Path(f"{DATA}/crossfit/glue-sst2/glue-sst2_16_100_train.tsv")
    lines = [text.split("\t") for text in path.read_text(encoding="utf-8").splitlines()]
    return [(text, label) for text, label, *_ in lines]


def loss_and_gradient(
    backbone: Backbone, prompt: Tensor, batch: Batch, way: Way
) -> tuple[Tensor, Tensor]:
    """Loss () and gradient (N * D,) in float64, as a step of training makes them."""
    model = copy.deepcopy(backbone.model).to(way.dtype)
    rounded = Backbone(model, backbone.tokenizer, backbone.name)
    dtype = torch.promote_types(way.dtype, torch.float32)
    batch = replace(batch, weight=(batch.weight * way.share).to(dtype))
    with torch.autocast(
        "cpu", way.autocast or torch.bfloat16, way.autocast is not None, cache_enabled=False
    ):
        tokens = default_tokens_per_forward(backbone.device)
        losses, gradient = bank_gradient(rounded, prompt.to(dtype), batch, tokens)
    return losses.sum().double() / way.share, gradient.flatten().double() / way.share


def agreement(
    loss: Tensor, gradient: Tensor, true_loss: Tensor, true_gradient: Tensor
) -> dict[str, float]:
    """Relative differences of loss and gradient, and the cosine of the gradients."""
    return {
        "loss": ((loss - true_loss).abs() / true_loss.abs()).item(),
        "cosine": torch.cosine_similarity(gradient, true_gradient, dim=0).item(),
        "gradient": ((gradient - true_gradient).norm() / true_gradient.norm()).item(),
    }


def spread(agreed: list[dict[str, float]]) -> dict[str, Any]:
    """Median and worst of each number; a loss or gradient that is not finite is the worst."""
    found: dict[str, Any] = {"points": len(agreed)}
    for name in ("loss", "cosine", "gradient"):
        worst = -1.0 if name == "cosine" else math.inf
        values = [one[name] if math.isfinite(one[name]) else worst for one in agreed]
        end = min(values) if name == "cosine" else max(values)
        found[name] = {"median": statistics.median(values), "worst": end}
    return found


def gradient_table(lines: Iterable[dict[str, Any]]) -> str:
    """The agreement as a Markdown table, median and worst."""
    rows = [
        "| model | way | loss: relative difference | gradient: cosine | gradient: relative error |",
        "|---|---|---|---|---|",
    ]
    for found in lines:
        cells = ["refused", "-", "-"]
        if "refused" not in found:
            loss, cosine, gradient = (found[name] for name in ("loss", "cosine", "gradient"))
            cells = [f"{loss['median']:.1e} ({loss['worst']:.1e})"]
            cells += [f"{cosine['median']:.5f} ({cosine['worst']:.5f})"]
            cells += [f"{gradient['median']:.1e} ({gradient['worst']:.1e})"]
        rows.append(f"| {found['model']} | {found['way']} | {' | '.join(cells)} |")
    return "\n".join(rows)


# ---- quality -------------------------------------------------------------------------------------


def quality(settings: Settings) -> Iterator[dict[str, Any]]:
    """Fits of every trained model, one row per task."""
    for name in trained():
        for way, flags in FITS[name].items():
            with tempfile.TemporaryDirectory() as folder:
                words = [*fit_words(name, settings), *flags, f"--run_dir={folder}"]
                seconds = in_own_process("cpu", fit, words, settings.threads)
                for found in task_scores(Path(folder)):
                    yield {"model": name, "way": way, **found, "cpu_seconds": seconds}


def fit_words(name: str, settings: Settings) -> list[str]:
    """The settings that all fits of a model share."""
    words = ["--model.test_baselines=false", "--model.init_seed=[0,1,2]"]
    if name == "sandbox":
        config = "quickstart.yaml"
        quick = ["--data.tasks=[sandbox-sst]"]
    else:
        config = "prompt_tuning/stories260K.yaml"
        words += [f"--model.backbone.name={DATA}/models/{name}", f"--data.root={DATA}/crossfit"]
        words += [f"--data.tasks=[{','.join(STORIES_TASKS)}]", "--data.samples=[100]"]
        words += ["--trainer.max_steps=100"]
        quick = ["--data.tasks=[yelp_review_full]"]
    if settings.quick:
        words += [*quick, "--model.init_seed=[0,1]", "--model.num_virtual_tokens=2"]
        words += ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
        words += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    return ["fit", f"--config={ROOT / 'configs' / config}", *words]


def fit(words: list[str], threads: int) -> float:
    """CPU seconds of a fit and its test, which other programs hardly add to; it prints nothing.

    Raises:
        RuntimeError: it ended with an error.
    """
    torch.set_num_threads(threads)
    start, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = command_line(words)
    if status:
        raise RuntimeError(f"prompt-lab {' '.join(words)} failed: {said.getvalue()[-2000:]}")
    return time.process_time() - start


def task_scores(folder: Path) -> Iterator[dict[str, Any]]:
    """Test and dev scores and last training losses of each task's runs, in the order of seeds."""
    results, curves = (read_csv(folder / name) for name in ("results.csv", "curves.csv"))
    losses = {row["run"]: float(row["train_loss"]) for row in curves}  # the last evaluation's
    for task in dict.fromkeys(row["task"] for row in results):
        rows = [row for row in results if row["task"] == task]
        yield {
            "task": task,
            "metric": rows[0]["metric"],
            "seeds": [int(row["init_seed"]) for row in rows],
            "test": [float(row["test"]) for row in rows],
            "dev": [float(row["dev"]) for row in rows],
            "train_loss": [losses[Path(row["prompt_file"]).stem] for row in rows],
        }


def quality_table(lines: Iterable[dict[str, Any]]) -> str:
    """Scores as a Markdown table, mean and standard deviation over the seeds."""
    rows = [
        "| model, task | metric | way | test | dev | last training loss | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in lines:
        means = [mean_and_deviation(found[name]) for name in ("test", "dev", "train_loss")]
        cells = [f"{found['model']}, {found['task']}", found["metric"], found["way"], *means]
        rows.append(f"| {' | '.join(cells)} | {found['cpu_seconds']:.0f} |")
    return "\n".join(rows)


def mean_and_deviation(values: list[float]) -> str:
    """Mean ± standard deviation (ddof 1)."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
