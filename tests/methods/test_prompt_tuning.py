"""``PromptTuning``: a bank against single runs, failures, what is kept; and tuning in a subspace.

The references are the same runs trained alone, the files on disk, and sums over bytes made here.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASKS, make_backbone, make_method
from lightning.pytorch import Callback
from tiny_fits import DIM, TOKENS, fit_in, make_subspace, run_test

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.optim import OptimConfig
from prompt_lab.core.subspace import Subspace
from prompt_lab.files.peft import load_checkpoint
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.results import STARTS, Start, read_csv
from prompt_lab.methods.method import FAILED, FINISHED, STOPPED
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import InitConfig, SubspaceConfig

MIXED = ["glue-cola", "e2e_nlg_cleaned"]  # scored and generated
# Rates and an initial seed at which dev scores differ and rounding stays small: a prompt that 1e-7
# takes over a kink of T5's ReLU has a gradient that differs by 1e-2.
GRIDS = {
    "t5": ([0.003, 0.001], 5),
    "gpt2": ([0.03, 0.01], 0),
    "bloom": ([0.03, 0.01], 0),
}


@pytest.fixture
def fit(backbone, fewshot_root: Path, tmp_path: Path) -> Callable[..., PromptTuning]:
    """Function that fits a bank on a tiny model and returns the method, its trainer attached."""

    def run(
        kind: str = "gpt2",
        model: Backbone | None = None,
        root: Path = fewshot_root,
        run_dir: Path | None = None,
        trainer: dict[str, Any] | None = None,
        **method: Any,
    ) -> PromptTuning:
        of_fit = ("tasks", "samples", "ckpt")
        given = {name: method.pop(name) for name in of_fit if name in method} | (trainer or {})
        folder = run_dir or tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return fit_in(folder, make_method(model or backbone(kind), **method), root, **given)

    return run


# ---- equality 1: a bank follows its single runs --------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
def test_a_bank_of_runs_follows_the_separate_single_runs(fit, kind):
    """Reference: each run of the grid trained alone; 30 float32 steps."""
    rates, seed = GRIDS[kind]
    settings = {"kind": kind, "patience": 4, "init_seed": seed}
    settings["trainer"] = {"max_steps": 30, "val_check_interval": 3}
    bank = fit(tasks=MIXED, learning_rate=rates, batch_size=[3, 4], **settings)
    assert len(bank.runs) == 8
    assert {STOPPED, FINISHED} >= set(bank.status.tolist())
    assert len(set(bank.keeper.step.tolist())) > 1  # else it would show little
    assert min(bank.moved()) > 1e-3
    for i, run in enumerate(bank.runs):
        rate, rows = run.learning_rate, run.batch_size
        alone = fit(tasks=[run.task], learning_rate=rate, batch_size=rows, **settings)
        assert alone.runs == [run]
        assert alone.status.item() == bank.status[i]
        assert alone.keeper.step.item() == bank.keeper.step[i]
        assert alone.keeper.score.item() == bank.keeper.score[i]
        torch.testing.assert_close(bank.prompt[i], alone.prompt[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(bank.best[i], alone.best[0], rtol=0, atol=1e-5)


class AskedRows(Callback):
    """Notes which runs have rows in each step and each evaluation."""

    def __init__(self) -> None:
        self.train: dict[int, set[int]] = {}
        self.dev: dict[int, set[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train[trainer.global_step] = set(batch.prompts)

    def on_validation_batch_start(self, trainer, pl_module, batch, *_):
        self.dev.setdefault(trainer.global_step, set()).update(batch.batch.prompts)


def test_runs_that_have_stopped_ask_for_no_rows(fit):
    """Reference: the runs that ``curves.csv`` calls training after each evaluation."""
    asked = AskedRows()
    rates, seed = GRIDS["bloom"]
    trainer = {"max_steps": 30, "val_check_interval": 3, "callbacks": [asked]}
    settings = {"learning_rate": rates, "batch_size": [3, 4], "init_seed": seed, "patience": 3}
    bank = fit(kind="bloom", tasks=MIXED, trainer=trainer, **settings)
    place = {run.name: i for i, run in enumerate(bank.runs)}
    live = {step: set(place.values()) for step in range(3)}
    evaluated: dict[int, set[int]] = {}
    for row in read_csv(bank.run_dir / "curves.csv"):
        step, i = int(row["step"]), place[row["run"]]
        evaluated.setdefault(step, set()).add(i)
        for later in range(step, step + 3):
            live.setdefault(later, set())
            if row["status"] == "training":
                live[later].add(i)
    sizes = {len(runs) for runs in live.values()}
    assert len(sizes) > 2  # runs stop at different times
    assert asked.train == {step: runs for step, runs in live.items() if runs}
    assert asked.dev == evaluated


# ---- failures ------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_alone_and_says_so(fit):
    """Reference: the bank without it."""
    rate = 1e30
    trainer = {"max_steps": 9, "val_check_interval": 3}
    name = f"glue-sst2_13_seed0_lr{rate:g}_bs4"
    with pytest.warns(UserWarning, match=re.escape(f"not finite by step 3: {name};")):
        bank = fit(learning_rate=[0.03, rate, 0.01], trainer=trainer)
    without = fit(learning_rate=[0.03, 0.01], trainer=trainer)
    assert bank.status.tolist() == [FINISHED, FAILED, FINISHED]
    torch.testing.assert_close(bank.prompt[[0, 2]], without.prompt, rtol=0, atol=1e-6)
    torch.testing.assert_close(bank.best[[0, 2]], without.best, rtol=0, atol=1e-6)
    assert bank.keeper.score[[0, 2]].tolist() == without.keeper.score.tolist()
    assert read_csv(bank.run_dir / "curves.csv")[1]["status"] == "failed: loss not finite"
    (stored,) = PromptStore(bank.run_dir / "prompts").load([bank.runs[1].name])
    assert stored.status == "failed: loss not finite"
    assert stored.dev_score is None
    with pytest.warns(UserWarning, match="not finite by step 3"):
        alone = fit(learning_rate=rate, trainer=trainer)
    assert alone.keeper.step.tolist() == [-1]
    assert alone.best.equal(alone.init)
    alone.trainer.test(alone, datamodule=alone.datamodule, verbose=False)
    (row,) = read_csv(alone.run_dir / "results.csv")
    assert (row["status"], row["dev"]) == ("failed: loss not finite", "")


def test_a_run_that_starts_from_a_poisoned_prompt_fails_alone_and_alone_ends_early(fit, tmp_path):
    """Reference: the bank of the other sample alone."""
    prompts = fit(samples=[13, 42], trainer={"steps": 1, "every": 1}).best_prompts()
    prompts[1].prompt = torch.full_like(prompts[1].prompt, torch.nan)
    PromptStore(tmp_path / "poisoned").save(prompts)
    settings = {"init": InitConfig("file", path=str(tmp_path / "poisoned"))}
    with pytest.warns(UserWarning, match="not finite by step 3: glue-sst2_42"):
        bank = fit(samples=[13, 42], **settings)
    alone = fit(samples=[13], **settings)
    assert bank.status.tolist() == [FINISHED, FAILED]
    assert bank.keeper.step.tolist() == [alone.keeper.step.item(), -1]
    torch.testing.assert_close(bank.prompt[:1], alone.prompt, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="not finite"):
        assert fit(samples=[42], **settings).trainer.global_step == 3


# ---- what is kept --------------------------------------------------------------------------------


def test_fast_dev_run_writes_nothing_though_a_folder_is_named(fit, tmp_path):
    method = fit(trainer={"fast_dev_run": 2})
    data = method.datamodule
    method.trainer.test(method, datamodule=data, verbose=False)
    assert method.run_dir is None
    assert not list(tmp_path.iterdir())
    again = make_method(method.backbone)
    with pytest.raises(ValueError, match=r"trainer\.fast_dev_run has no run folder to read"):
        method.trainer.test(again, datamodule=data, verbose=False)


def test_the_stored_prompt_of_each_run_has_the_stored_dev_score(fit):
    """Eight runs whose best steps differ; reference: the best lines of ``curves.csv``, and anew.

    Prompts of another length, and missing ones, are refused.
    """
    rates, seed = GRIDS["gpt2"]
    settings = {"learning_rate": rates, "batch_size": [3, 4], "init_seed": seed}
    fitted = fit(tasks=MIXED, trainer={"steps": 15, "every": 3}, **settings)
    assert len(set(fitted.keeper.step.tolist())) > 1
    stored = fitted.store.load([run.name for run in fitted.runs])
    curves = read_csv(fitted.run_dir / "curves.csv")
    again = make_method(fitted.backbone, **settings)
    tool = fitted.trainer
    tool.validate(again, datamodule=fitted.datamodule, verbose=False)
    for prompt, score in zip(stored, again.evaluation.scores().tolist(), strict=True):
        lines = [row for row in curves if row["run"] == prompt.name]
        best = max(lines, key=lambda row: float(row["dev"]))  # max keeps the first of equals
        assert prompt.dev_score == score == float(best["dev"])
        assert prompt.steps == int(best["step"])
    longer = make_method(fitted.backbone, num_virtual_tokens=7, **settings)
    with pytest.raises(ValueError, match=r"shape \(5, 32\), the config asks for \(7, 32\)"):
        tool.test(longer, datamodule=fitted.datamodule, verbose=False)
    gone = [fitted.runs[i].name for i in (1, 6)]
    for name in gone:
        fitted.store.path(name).unlink()
    again = make_method(fitted.backbone, **settings)
    with pytest.raises(FileNotFoundError, match=rf"2 of 8 prompts .*{gone[0]}, {gone[1]}"):
        tool.test(again, datamodule=fitted.datamodule, verbose=False)


def test_test_rows_play_no_part_in_training_and_choosing(fit, fewshot_root, tmp_path):
    """Reference: the same fit with other test files."""
    other = tmp_path / "other"
    shutil.copytree(fewshot_root, other)
    for path in other.glob("*/*_test.tsv"):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        answers = [row[1] for row in rows]
        moved = [f"changed {row[0]}\t{new}\n" for row, new in zip(rows, answers[1:], strict=False)]
        path.write_text("".join(moved))
    settings = {"kind": "llama", "tasks": MIXED, "learning_rate": [0.03, 0.01]}
    first, second = fit(**settings), fit(**settings, root=other)
    assert first.best.equal(second.best)
    assert first.prompt.equal(second.prompt)
    assert (first.run_dir / "curves.csv").read_bytes() == (
        second.run_dir / "curves.csv"
    ).read_bytes()


def test_a_checkpoint_holds_no_backbone_and_stays_small(fit, tmp_path):
    """Reference: 5 times the bytes of the prompts, 64 KB, and 256 bytes per run."""
    method = fit(
        kind="gpt2",
        tasks=list(TASKS),
        samples=[13, 42],
        num_virtual_tokens=40,
        init_seed=[0, 1, 2],
        learning_rate=[0.03, 0.02],
        batch_size=1,
        trainer={"max_steps": 1, "val_check_interval": 1},
    )
    assert len(method.runs) == 48
    path = tmp_path / "last.ckpt"
    method.trainer.save_checkpoint(path)
    prompts = method.prompt.numel() * 4
    assert path.stat().st_size <= 5 * prompts + 64 * 1024 + 256 * len(method.runs)
    saved = torch.load(path, weights_only=True)
    assert {"prompt", "init", "keeper.kept_bank"} <= set(saved["state_dict"])
    assert not [name for name in saved["state_dict"] if name.startswith("backbone")]


# ---- settings and warnings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"optim": OptimConfig("adafactor")},
        {"optim": OptimConfig(schedule="linear", warmup_steps=2, clip=0.1, weight_decay=0.01)},
    ],
    ids=["label smoothing", "adafactor", "schedule and clip"],
)
def test_training_settings_reach_the_training(fit, settings):
    """Reference: the fit without the setting, which ends elsewhere."""
    plain, changed = fit("t5"), fit("t5", **settings)
    assert changed.prompt.isfinite().all()
    assert changed.moved()[0] > 1e-4
    assert not torch.allclose(plain.prompt, changed.prompt, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"learning_rate": 0.003}, "the same answer to every dev row from glue-sst2_13"),
        ({"learning_rate": [0.03, 1e-6]}, r"within 0\.1 % of their start: glue-sst2_13.*lr1e-06"),
        (
            {"init": InitConfig("normal", std=10.0)},
            "times the standard deviation of the",
        ),
    ],
)
def test_prompts_that_answer_alike_stand_still_or_start_off_the_scale_are_told(fit, settings, told):
    with pytest.warns(UserWarning, match=told):
        fit("t5", **settings)


def test_a_healthy_fit_warns_of_nothing(fit):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(kind="llama", tasks=["e2e_nlg_cleaned"], learning_rate=0.03)
    texts = [str(warning.message) for warning in told]
    for text in ("same answer", "of their start", "standard deviation", "not finite"):
        assert not [found for found in texts if text in found]


# ---- transfer, and prompts of chosen steps -------------------------------------------------------


def test_a_bank_of_transfers_follows_single_fits_from_each_source(fit, fewshot_root, tmp_path):
    """Reference: one fit per target and source, from the file of that source's prompt."""
    model = make_backbone("t5")
    fit(model=model, tasks=["glue-sst2", "emotion"], init_seed=[0, 1], run_dir=tmp_path / "sources")
    store = tmp_path / "sources" / "prompts"
    targets = ["glue-sst2", "emotion"]
    transfer = {"name": "file", "path": str(store), "source_tasks": ["emotion", "glue-sst2"]}
    bank = fit(model=model, tasks=targets, init_seed=[0, 1], init=transfer)
    assert len(bank.runs) == 8
    for i, run in enumerate(bank.runs):
        path = store / f"{run.source}_13_seed{run.init_seed}_lr0.03_bs4.safetensors"
        alone = fit(model=model, tasks=[run.task], init={"name": "file", "path": str(path)})
        assert bank.starts[i] == alone.starts[0]
        start = Start("prompt", run.source, run.init_seed, str(path))
        assert bank.starts[i] == start
        assert torch.equal(bank.init[i], alone.init[0])
        torch.testing.assert_close(bank.trained[i], alone.trained[0], rtol=1e-5, atol=1e-5)
    kept = PromptStore(Path(bank.trainer.default_root_dir) / "prompts").index()
    starts = dict(zip([run.name for run in bank.runs], bank.starts, strict=True))
    for row in kept:
        assert Start(**{name: row[name] for name in STARTS}) == starts[row["name"]]


def test_the_prompts_of_chosen_steps_are_kept_with_their_dev_scores(fit, tmp_path):
    """Step 3 of six equals the last step of a fit of three under a constant schedule."""
    whole = fit(run_dir=tmp_path / "whole", init_seed=[0, 1], save_steps=[3])
    half = fit(init_seed=[0, 1], trainer={"steps": 3})
    store = PromptStore(tmp_path / "whole" / "steps" / "3")
    kept = store.load([run.name for run in whole.runs], whole.backbone)
    assert [prompt.steps for prompt in kept] == [3, 3]
    assert torch.equal(torch.stack([prompt.prompt for prompt in kept]), half.trained.detach())
    assert [prompt.dev_score for prompt in kept] == half.keeper.score.tolist()
    assert sorted(path.name for path in (tmp_path / "whole" / "steps").iterdir()) == ["3"]


@pytest.mark.parametrize("steps", [[4], [0], [9]])
def test_steps_that_are_not_evaluated_cannot_be_kept(fit, steps):
    with pytest.raises(ValueError, match=r"model.save_steps has \d, where nothing is evaluated"):
        fit(save_steps=steps)


# ---- in a subspace -------------------------------------------------------------------------------


@pytest.fixture
def codes(fit, backbone, tmp_path) -> Callable[..., PromptTuning]:
    """Function that tunes codes in the subspace of a file; settings as for ``fit``."""
    path = make_subspace(tmp_path / "subspace.safetensors", backbone("gpt2"))
    given = {"subspace": SubspaceConfig(str(path), std=0.5), "learning_rate": 0.1}
    return lambda **settings: fit(**{**given, **settings})


def test_only_the_codes_change_and_files_hold_them(codes, backbone, tmp_path):
    method = codes(learning_rate=[0.1, 0.01])
    subspace = method.subspace
    before = SubspaceConfig(str(tmp_path / "subspace.safetensors")).load(backbone("gpt2"), TOKENS)
    assert [tuple(p.shape) for p in method.parameters() if p.requires_grad] == [(2, DIM)]
    for own, other in zip(subspace.parameters(), before.parameters(), strict=True):
        assert own.equal(other)
    torch.testing.assert_close(method.best, subspace.back_project(method.keeper["code"]))
    assert (method.bank() - method.init).abs().max() > 1e-4
    saved = method.store.load([run.name for run in method.runs], backbone("gpt2"))
    torch.testing.assert_close(torch.stack([one.code for one in saved]), method.keeper["code"])
    assert (saved[0].start, saved[0].start_seed) == ("codes", saved[0].init_seed)
    run_test(method.run_dir, method, method.datamodule)
    rows = read_csv(method.run_dir / "results.csv")
    assert {(row["variant"], row["intrinsic_dim"]) for row in rows} == {("subspace", str(DIM))}


def test_the_gradient_of_a_code_is_autograds_through_the_map(codes):
    """Reference: the loss of all rows under the decoded prompts, differentiated in one graph."""
    method = codes(init_seed=[0, 1], trainer={"max_steps": 3})
    batch = method.datamodule.draw.batch(0, [0, 1])
    method.zero_grad()
    method.status.zero_()
    method.active.fill_(True)
    method.training_step(batch, 0).backward()
    code = method.code.detach().requires_grad_()
    losses = method.backbone.loss(method.subspace.back_project(code), batch) * batch.weight
    (expected,) = torch.autograd.grad(losses.sum(), code)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(method.code.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_prompts_and_needs_its_subspace_which_is_hashed_once(
    codes, tmp_path, monkeypatch
):
    """However many checkpoints it writes: the map may have hundreds of megabytes."""
    hashed = []

    def digest(module: Any) -> str:
        hashed.append(type(module))
        return "a1"

    monkeypatch.setattr("prompt_lab.methods.prompt_tuning.weights_digest", digest)
    method = codes()
    for name in ("a.ckpt", "b.ckpt"):
        method.trainer.save_checkpoint(tmp_path / name)
    assert hashed == [Subspace]
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not any(name.startswith("subspace.") for name in saved["state_dict"])
    (prompt,) = load_checkpoint(tmp_path / "a.ckpt")
    assert prompt.prompt.shape == (TOKENS, method.backbone.hidden_size)
    monkeypatch.undo()
    random = SubspaceConfig("random", intrinsic_dim=DIM)
    with pytest.raises(ValueError, match=r"is of subspace a1, the settings give [0-9a-f]{12}"):
        codes(ckpt=tmp_path / "a.ckpt", subspace=random)


def test_a_random_subspace_is_a_function_of_its_seed(codes):
    first, again, other = (
        codes(subspace=SubspaceConfig("random", intrinsic_dim=4, seed=seed)) for seed in (1, 1, 2)
    )
    assert first.variant == "random_subspace"
    assert torch.equal(first.best, again.best)
    assert not torch.equal(first.init, other.init)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"path": "random"}, "give a dimension for a random subspace, and none for a file"),
        ({"path": "x", "intrinsic_dim": 3}, "path is 'x' and model.subspace.intrinsic_dim is 3"),
        ({"path": "random", "intrinsic_dim": 0}, "intrinsic_dim is 0: give at least 1"),
        ({"path": "missing.safetensors"}, "no subspace file"),
    ],
)
def test_subspaces_that_make_no_sense_are_refused(fit, settings, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        fit(subspace=SubspaceConfig(**settings))


def test_a_subspace_of_another_backbone_or_number_of_tokens_is_refused(codes, backbone):
    with pytest.raises(ValueError, match="5 virtual tokens, but num_virtual_tokens is 6"):
        codes(num_virtual_tokens=6)
    with pytest.raises(ValueError, match="made for backbone"):
        codes(model=backbone("bart"))
