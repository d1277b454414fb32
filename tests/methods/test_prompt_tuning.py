"""``PromptTuning`` under a Lightning trainer: bank against single runs, failures, what is kept.

The references are the same runs trained alone, the files on disk, and sums over bytes made here.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASKS, make_backbone, make_data, make_method, make_trainer
from lightning.pytorch import Callback

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.optim import OptimConfig
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.results import STARTS, Start, read_csv
from prompt_lab.methods.configs import BackboneConfig
from prompt_lab.methods.method import FAILED, FINISHED, STOPPED
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import InitConfig

Factory = Callable[..., Backbone]
Folders = Callable[[str], Path]

MIXED = ["glue-cola", "e2e_nlg_cleaned"]  # scored and generated
# Rates and an initial seed at which dev scores differ and rounding stays small: a prompt that 1e-7
# takes over a kink of T5's ReLU has a gradient that differs by 1e-2.
GRIDS = {
    "t5": ([0.003, 0.001], 5),
    "gpt2": ([0.03, 0.01], 0),
    "bloom": ([0.03, 0.01], 0),
}


class AskedRows(Callback):
    """Notes which runs have rows in each step and each evaluation."""

    def __init__(self) -> None:
        self.train: dict[int, set[int]] = {}
        self.dev: dict[int, set[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train[trainer.global_step] = set(batch.prompts)

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self.dev.setdefault(trainer.global_step, set()).update(batch.batch.prompts)


@pytest.fixture
def fit(backbone: Factory, fewshot_root: Path, tmp_path: Path) -> Callable[..., PromptTuning]:
    """Function that fits a bank on a tiny model and returns the method, its trainer attached."""

    def run(
        kind: str = "t5",
        tasks: list[str] = ["glue-sst2"],  # noqa: B006
        samples: list[int] = [13],  # noqa: B006
        model: Backbone | None = None,
        root: Path = fewshot_root,
        run_dir: Path | None = None,
        trainer: dict[str, Any] | None = None,
        **method: Any,
    ) -> PromptTuning:
        if run_dir is None:
            run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        made = make_method(model or backbone(kind), **method)
        trainer_ = make_trainer(run_dir, **(trainer or {}))
        trainer_.fit(made, datamodule=make_data(root, tasks, samples))
        return made

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


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_tokens_per_forward_bounds_memory_and_changes_no_result(fit, kind):
    """Reference: the same fit with all rows in one forward pass."""
    settings = {"kind": kind, "tasks": MIXED, "learning_rate": [0.01, 0.003], "batch_size": 3}
    settings["trainer"] = {"max_steps": 4, "val_check_interval": 2}
    whole, cut = fit(**settings), fit(**settings, tokens_per_forward=100)
    torch.testing.assert_close(cut.prompt, whole.prompt, rtol=0, atol=1e-5)
    assert cut.keeper.score.tolist() == whole.keeper.score.tolist()
    assert cut.keeper.step.tolist() == whole.keeper.step.tolist()


# ---- equality 5: the backbone is frozen ----------------------------------------------------------


def weights_digest(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e30, 3e38])
def test_a_run_that_diverges_stops_alone_and_says_so(fit, rate):
    """Reference: the bank without it."""
    trainer = {"max_steps": 9, "val_check_interval": 3}
    name = f"glue-sst2_13_seed0_lr{rate:g}_bs4"
    with pytest.warns(UserWarning, match=re.escape(f"not finite by step 3: {name};")):
        bank = fit(kind="gpt2", learning_rate=[0.03, rate, 0.01], trainer=trainer)
    without = fit(kind="gpt2", learning_rate=[0.03, 0.01], trainer=trainer)
    assert bank.status.tolist() == [FINISHED, FAILED, FINISHED]
    torch.testing.assert_close(bank.prompt[[0, 2]], without.prompt, rtol=0, atol=1e-6)
    torch.testing.assert_close(bank.best[[0, 2]], without.best, rtol=0, atol=1e-6)
    assert bank.keeper.score[[0, 2]].tolist() == without.keeper.score.tolist()
    assert read_csv(bank.run_dir / "curves.csv")[1]["status"] == "failed: loss not finite"
    (stored,) = PromptStore(bank.run_dir / "prompts").load([bank.runs[1].name])
    assert stored.status == "failed: loss not finite"
    assert stored.dev_score is None
    with pytest.warns(UserWarning, match="not finite by step 3"):
        alone = fit(kind="gpt2", learning_rate=rate, trainer=trainer)
    assert alone.keeper.step.tolist() == [-1]
    assert alone.best.equal(alone.init)
    alone.trainer.test(alone, datamodule=alone.datamodule, verbose=False)
    (row,) = read_csv(alone.run_dir / "results.csv")
    assert (row["status"], row["dev"]) == ("failed: loss not finite", "")


@pytest.fixture
def poisoned_store(fit, tmp_path) -> Path:
    """A store with a good prompt for sample 13 and one of NaN for sample 42."""
    source = fit(kind="gpt2", samples=[13, 42], trainer={"max_steps": 1, "val_check_interval": 1})
    prompts = source.best_prompts()
    prompts[1].prompt = torch.full_like(prompts[1].prompt, torch.nan)
    store = PromptStore(tmp_path / "poisoned")
    store.save(prompts)
    return store.folder


def test_a_run_that_starts_from_a_poisoned_prompt_fails_alone(fit, poisoned_store):
    """Reference: the bank of the other sample alone."""
    settings = {"init": InitConfig("file", path=str(poisoned_store))}
    with pytest.warns(UserWarning, match="not finite by step 3: glue-sst2_42"):
        bank = fit(kind="gpt2", samples=[13, 42], **settings)
    alone = fit(kind="gpt2", samples=[13], **settings)
    assert bank.status.tolist() == [FINISHED, FAILED]
    assert bank.keeper.step.tolist() == [alone.keeper.step.item(), -1]
    torch.testing.assert_close(bank.prompt[:1], alone.prompt, rtol=0, atol=1e-6)


def test_a_fit_of_failed_runs_alone_ends_early(fit, poisoned_store):
    with pytest.warns(UserWarning, match="not finite"):
        method = fit(kind="gpt2", samples=[42], init=InitConfig("file", path=str(poisoned_store)))
    assert method.trainer.global_step == 3


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


@pytest.fixture
def fitted(fit) -> PromptTuning:
    """Eight GPT-2 runs whose best steps differ, evaluated every 3 of 15 steps."""
    rates, seed = GRIDS["gpt2"]
    settings = {"learning_rate": rates, "batch_size": [3, 4], "init_seed": seed}
    settings["trainer"] = {"max_steps": 15, "val_check_interval": 3}
    return fit(kind="gpt2", tasks=MIXED, test_baselines=True, **settings)


def fresh(method: PromptTuning, fewshot_root: Path) -> tuple[PromptTuning, dict[str, Any]]:
    """The same method anew, with a trainer in the same run folder, as another process has it."""
    again = PromptTuning(**method.hparams)
    again.backbone = method.backbone
    trainer = make_trainer(method.run_dir, steps=15)
    return again, {"trainer": trainer, "data": make_data(fewshot_root, MIXED, [13])}


def test_the_stored_prompt_of_each_run_has_the_stored_dev_score(fitted, fewshot_root):
    """Reference: the best of each run's lines in ``curves.csv``, and an evaluation anew."""
    assert len(set(fitted.keeper.step.tolist())) > 1
    stored = PromptStore(fitted.run_dir / "prompts").load([run.name for run in fitted.runs])
    curves = read_csv(fitted.run_dir / "curves.csv")
    again, with_ = fresh(fitted, fewshot_root)
    with_["trainer"].validate(again, datamodule=with_["data"], verbose=False)
    scores = again.evaluation.scores().tolist()
    for prompt, score in zip(stored, scores, strict=True):
        lines = [row for row in curves if row["run"] == prompt.name]
        best = max(lines, key=lambda row: float(row["dev"]))  # max keeps the first of equals
        assert prompt.dev_score == score == float(best["dev"])
        assert prompt.steps == int(best["step"])


def test_prompts_of_another_length_and_missing_ones_are_refused(fitted, fewshot_root):
    again, with_ = fresh(fitted, fewshot_root)
    longer = PromptTuning(**{**again.hparams, "num_virtual_tokens": 7})
    longer.backbone = fitted.backbone
    with pytest.raises(ValueError, match=r"shape \(5, 32\), the config asks for \(7, 32\)"):
        with_["trainer"].test(longer, datamodule=with_["data"], verbose=False)
    gone = [fitted.runs[i].name for i in (1, 6)]
    for name in gone:
        (fitted.run_dir / "prompts" / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"2 of 8 prompts .*{gone[0]}, {gone[1]}"):
        with_["trainer"].test(again, datamodule=with_["data"], verbose=False)


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


# ---- checkpoints ---------------------------------------------------------------------------------


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


def test_a_state_that_does_not_fit_is_refused(fit):
    method = fit()
    state = method.state_dict()
    method.load_state_dict(state)
    for name in ("prompt", "keeper.score"):
        with pytest.raises(ValueError, match=rf"does not fit: missing \['{name}'\]"):
            method.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=r"unexpected \['other'\]"):
        method.load_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"prompt has shape \(1, 6, 32\) there and \(1, 5, 32\) here"
    ):
        method.load_state_dict({**state, "prompt": torch.zeros(1, 6, 32)})


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"precision": "bf16-true"}, "32-true with model.backbone.dtype bfloat16"),
        ({"precision": "16-true"}, "32-true with model.backbone.dtype bfloat16"),
        ({"gradient_clip_val": 1.0}, "model.optim.clip"),
        ({"accumulate_grad_batches": 2}, "model.batch_size"),
        ({"max_steps": -1}, "the fit has no end"),
    ],
)
def test_trainer_settings_that_would_change_the_result_are_refused(fit, settings, advice):
    with pytest.raises(ValueError, match=advice):
        fit(trainer=settings)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "bf16-mixed"), (torch.bfloat16, "32-true"), (torch.bfloat16, "bf16-mixed")],
)
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_low_precision_leaves_prompts_and_optimizer_in_float32(
    fit, backbone, kind, dtype, precision
):
    """Reference: the float32 fit; bfloat16 keeps 8 bits, so it is near, not equal."""
    method = fit(
        kind=kind, model=backbone(kind, dtype), trainer={"precision": precision}, learning_rate=0.01
    )
    plain = fit(kind=kind, learning_rate=0.01)
    assert method.backbone.model.dtype == dtype
    state = method.trainer.optimizers[0].state[method.prompt]
    assert {method.prompt.dtype, method.best.dtype, state["exp_avg"].dtype} == {torch.float32}
    assert method.prompt.isfinite().all()
    change, wanted = (m.prompt.detach() - m.init for m in (method, plain))
    assert torch.cosine_similarity(change.flatten(), wanted.flatten(), dim=0) > 0.8


def test_the_backbone_config_loads_weights_in_its_dtype(model_folder: Folders):
    loaded = BackboneConfig(str(model_folder("gpt2")), dtype="bfloat16").load()
    assert loaded.model.dtype == torch.bfloat16


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
    plain, changed = fit(), fit(**settings)
    assert changed.prompt.isfinite().all()
    assert changed.moved()[0] > 1e-4
    assert not torch.allclose(plain.prompt, changed.prompt, atol=1e-5)


# ---- warnings ------------------------------------------------------------------------------------


def test_prompts_that_answer_alike_are_told(fit):
    with pytest.warns(UserWarning, match="the same answer to every dev row from glue-sst2_13"):
        fit(learning_rate=0.003)


def test_prompts_that_do_not_move_are_told(fit):
    with pytest.warns(UserWarning, match=r"within 0\.1 % of their start: glue-sst2_13.*lr1e-06"):
        fit(learning_rate=[0.03, 1e-6])


def test_initial_prompts_off_the_scale_of_embeddings_are_told(fit):
    with pytest.warns(UserWarning, match="times the standard deviation of the backbone's"):
        fit(init=InitConfig("normal", std=10.0))


def test_a_healthy_fit_warns_of_nothing(fit):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(kind="llama", tasks=["e2e_nlg_cleaned"], learning_rate=0.03)
    texts = [str(warning.message) for warning in told]
    for text in ("same answer", "of their start", "standard deviation", "not finite"):
        assert not [found for found in texts if text in found]


# ---- memory and speed ---------------------------------------------------------------------------


def test_micro_batches_are_halved_when_memory_runs_out(
    fit: Callable[..., PromptTuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass of more than 60 tokens fails; reference: a fit that starts with what fits."""
    from prompt_lab.methods import method as module

    plain, asked = module.bank_gradient, []

    def small(backbone, prompts, batch, tokens, smoothing):
        asked.append(tokens)
        if tokens > 60:
            raise torch.OutOfMemoryError("out of memory")
        return plain(backbone, prompts, batch, tokens, smoothing)

    settings = {"kind": "gpt2", "learning_rate": [0.1, 0.03]}
    monkeypatch.setattr(module, "bank_gradient", small)
    with pytest.warns(UserWarning, match=r"tokens_per_forward is 50 from step 0 on"):
        found = fit(**settings, tokens_per_forward=200)
    assert asked[:4] == [200, 100, 50, 50]
    expected = fit(**settings, tokens_per_forward=50)
    assert torch.equal(found.best, expected.best)
    monkeypatch.setattr(module, "bank_gradient", lambda *_: small(*_[:3], 61, 0.0))
    with pytest.raises(ValueError, match="memory runs out with a single row in a forward pass"):
        fit(**settings, tokens_per_forward=200)


def test_an_evaluation_batch_too_large_for_memory_is_halved(
    fit: Callable[..., PromptTuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit("gpt2", tasks=MIXED)
    for verb in ("choose", "generate"):
        plain = getattr(Backbone, verb)

        def small(self, prefix, batch, *rest, plain=plain):
            if len(batch) > 5:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
            return plain(self, prefix, batch, *rest)

        monkeypatch.setattr(Backbone, verb, small)
    found = fit("gpt2", tasks=MIXED)
    assert torch.equal(found.best, expected.best)
    assert found.evaluation.predictions == expected.evaluation.predictions
    monkeypatch.setattr(Backbone, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit("gpt2")


def test_gradient_checkpointing_trains_the_same_prompt(
    fit: Callable[..., PromptTuning], model_folder: Folders
) -> None:
    made = {}
    for checkpointing in (False, True):
        config = BackboneConfig(str(model_folder("llama")), gradient_checkpointing=checkpointing)
        made[checkpointing] = fit("llama", model=config.load()).best
    assert torch.equal(made[False], made[True])
    with pytest.raises(ValueError, match="do not go together"):
        BackboneConfig(gradient_checkpointing=True, compile=True).load()


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
