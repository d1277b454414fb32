"""What all methods share, under a bare Lightning Trainer: one suite over one tiny fit of each."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import make_backbone, make_data, make_method
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.plugins import MixedPrecision
from test_readme import example
from tiny_fits import FITS, make_files

import prompt_lab
from prompt_lab.core.batch import Batch
from prompt_lab.data.datamodule import PromptDataModule, RowsDataModule
from prompt_lab.data.sampling import EvaluationBatch
from prompt_lab.files.results import read_csv
from prompt_lab.methods.checks import check_settings
from prompt_lab.methods.configs import BackboneConfig
from prompt_lab.methods.evaluation import Way, answers
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.prompt_tuning import PromptTuning

TASKS = ["glue-cola", "e2e_nlg_cleaned", "emotion"]


def decomposed(folder: Path) -> PromptMethod:
    """The README's method of one's own."""
    found: dict[str, Any] = {"__name__": "own_method"}
    exec(example("DecomposedPrompts"), found)
    kind = found["DecomposedPrompts"]
    kind.__module__ = "own_method"
    own = sys.modules["own_method"] = types.ModuleType("own_method")
    own.DecomposedPrompts = kind  # where load_from_checkpoint looks for it
    method = kind(rank=2, num_virtual_tokens=5, learning_rate=[0.1, 0.03], batch_size=3)
    method.backbone = make_backbone("gpt2")
    return method


def prompts(folder: Path) -> PromptMethod:
    """Nine runs of prompts."""
    given = {"learning_rate": [0.1, 0.03, 0.01], "batch_size": 3, "patience": 2}
    return make_method(make_backbone("gpt2"), **given)


METHODS: dict[str, tuple[Callable[..., PromptMethod], list[str]]] = {
    "prompts": (prompts, TASKS),
    **{name: FITS[name] for name in ("codes", "subspaces", "four episodes", "attempt")},
    **{name: FITS[name] for name in ("fine-tuning", "adapter map", "adapter codes")},
    "decomposed": (decomposed, ["glue-cola", "emotion"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, a subspace and a map that methods start from."""
    folder = tmp_path_factory.mktemp("made") / "files"
    make_files(folder)
    return folder


def trainer(folder: Path, steps: int = 6, **settings: Any) -> pl.Trainer:
    """A Trainer as anyone makes one, quiet; only the budget is given."""
    given = {"max_steps": steps, "enable_progress_bar": False, "enable_model_summary": False}
    given |= {"accelerator": "cpu", "default_root_dir": folder, "logger": False}
    return pl.Trainer(**{**given, "enable_checkpointing": False, **settings})


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, files, fewshot_root, tmp_path_factory) -> dict[str, Any]:
    """A fit and test of a method, with a checkpoint of step 4, and the bytes of the backbone."""
    make, tasks = METHODS[request.param]
    folder = tmp_path_factory.mktemp("fit")

    def made() -> PromptMethod:
        method = make(files)
        method.test_baselines = isinstance(method, PromptTuning)
        return method

    method, data = made(), make_data(fewshot_root, tasks, [13])
    before = _digest(method)
    saved = callbacks.ModelCheckpoint(folder / "ckpt", "{step}", every_n_train_steps=4)
    tool = trainer(folder, val_check_interval=2, enable_checkpointing=True, callbacks=[saved])
    method.run_dir = folder / "run"
    tool.fit(method, datamodule=data)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    tool.test(method, datamodule=data, verbose=False)
    return {
        "name": request.param,
        "make": made,
        "data": lambda: make_data(fewshot_root, tasks, [13]),
        "method": method,
        "folder": folder,
        "before": before,
        "ckpt": next(iter((folder / "ckpt").glob("step=4*.ckpt"))),
        "bytes": {f: (folder / "run" / f).read_bytes() for f in RESULTS},
        "state": state,
    }


RESULTS = ("results.csv", "predictions.jsonl", "curves.csv")


def _digest(method: PromptMethod) -> str:
    digest = hashlib.sha256()
    for name, weight in method.backbone.named_parameters():
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


def without_time(content: bytes) -> list[dict[str, str]]:
    """The rows of a results table but for the clock."""
    lines = content.decode().splitlines()
    return [re.sub(r"\b\d+\.\d+,(finished|stopped)", r",\1", line) for line in lines]


def test_the_backbone_keeps_its_bytes_and_only_what_is_trained_is_optimised(fitted):
    method = fitted["method"]
    if fitted["name"] != "fine-tuning":
        assert _digest(method) == fitted["before"]
        frozen = {id(weight) for weight in method.backbone.parameters()}
        for optimizer in method.trainer.fit_loop.epoch_loop.trainer.optimizers:
            held = {id(w) for group in optimizer.param_groups for w in group["params"]}
            assert not held & frozen


def test_a_checkpoint_holds_no_backbone_and_resumes_to_the_bit(fitted, tmp_path):
    saved = torch.load(fitted["ckpt"], weights_only=True)
    if fitted["name"] != "fine-tuning":
        assert not [name for name in saved["state_dict"] if name.startswith("backbone")]
    method = fitted["make"]()
    method.run_dir = tmp_path / "run"
    made = trainer(tmp_path, val_check_interval=2)
    made.fit(method, datamodule=fitted["data"](), ckpt_path=fitted["ckpt"], weights_only=True)
    for name, value in fitted["state"].items():
        if name != "adapted":
            assert method.state_dict()[name].nan_to_num().equal(value.nan_to_num()), name
    made.test(method, datamodule=fitted["data"](), verbose=False)
    results = (tmp_path / "run" / "results.csv").read_bytes()
    assert without_time(results) == without_time(fitted["bytes"]["results.csv"])


def test_a_test_from_the_folder_in_another_place_is_the_one_after_the_fit(fitted, tmp_path):
    shutil.copytree(fitted["folder"] / "run", tmp_path / "moved")
    (tmp_path / "moved" / "results.csv").unlink()
    method = fitted["make"]()
    method.run_dir = tmp_path / "moved"
    trainer(tmp_path).test(method, datamodule=fitted["data"](), verbose=False)
    for name in ("results.csv", "predictions.jsonl"):
        assert (tmp_path / "moved" / name).read_bytes() == fitted["bytes"][name]


def test_load_from_checkpoint_gives_the_class_with_what_it_trained(fitted, tmp_path):
    """Reference: a resumed method, which is told the backbone and the data."""
    kind, patch = type(fitted["method"]), pytest.MonkeyPatch()
    patch.setattr(
        "prompt_lab.methods.method.BackboneConfig.load", lambda self: fitted["make"]().backbone
    )
    loaded = PromptMethod.load_from_checkpoint(fitted["ckpt"])
    patch.undo()
    assert type(loaded).__name__ == kind.__name__
    assert loaded.runs == fitted["method"].runs
    saved = torch.load(fitted["ckpt"], weights_only=True)["state_dict"]
    for name, value in saved.items():
        assert loaded.state_dict()[name].nan_to_num().equal(value.nan_to_num()), name
    loaded.run_dir = tmp_path / "run"
    made = trainer(tmp_path)
    made.test(loaded, datamodule=fitted["data"](), verbose=False)
    assert len(read_csv(tmp_path / "run" / "results.csv"))


def test_every_prediction_has_its_line_of_results(fitted):
    """By variant and run where a line names the run's file, else by variant and task."""
    rows = read_csv(fitted["folder"] / "run" / "results.csv")
    stems = {(row["variant"], Path(row["prompt_file"]).stem) for row in rows if row["prompt_file"]}
    lines = [json.loads(line) for line in fitted["bytes"]["predictions.jsonl"].splitlines()]
    told = {(row["variant"], row["task"]) for row in rows}
    assert {(line["variant"], line["task"]) for line in lines} <= told
    of_runs = {variant for variant, _ in stems}
    assert {(x["variant"], x["run"]) for x in lines if x["variant"] in of_runs} == stems


@pytest.mark.parametrize("change", ["data", "backbone"])
def test_a_checkpoint_of_other_data_or_weights_is_refused_with_both_sides(
    fitted, fewshot_root, tmp_path, change
):
    method, data = fitted["make"](), fitted["data"]()
    if change == "data":
        data = make_data(fewshot_root, [*data.tasks], [42])
        if fitted["name"] in ("subspaces", "attempt"):  # whose sources are of sample 13
            return
    elif fitted["name"] in ("codes", "subspaces", "attempt", "adapter codes"):
        return  # whose files are refused before
    else:
        method.backbone.digest = "0" * 64
    told = r"is of (runs|items) \d+ \(.*13|is of backbone [0-9a-f]{12}"
    with pytest.raises(ValueError, match=rf"the checkpoint ({told}).*, the settings give"):
        trainer(tmp_path).fit(method, datamodule=data, ckpt_path=fitted["ckpt"], weights_only=True)


def test_a_state_that_does_not_fit_is_refused(fitted):
    method = fitted["method"]
    state = method.state_dict()
    method.load_state_dict(state)
    with pytest.raises(ValueError, match=r"does not fit: missing \['keeper\.score'\]"):
        method.load_state_dict({k: v for k, v in state.items() if k != "keeper.score"})
    with pytest.raises(ValueError, match=r"unexpected \['other'\]"):
        method.load_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"keeper\.score has shape \(99,\) there and \(\d"):
        method.load_state_dict({**state, "keeper.score": torch.zeros(99)})


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"method": "os.path"}, "is the checkpoint of os.path; a method of one's own is imported"),
        (
            {"method": "prompt_lab.methods.none.Backbone"},
            r"is the checkpoint of prompt_lab\.methods",
        ),
        ({"state_dict": {}}, "is the checkpoint of no method of prompt_lab"),
        ([1], "is the checkpoint of no method of prompt_lab"),
    ],
)
def test_a_checkpoint_does_not_say_what_to_import(tmp_path, saved, told):
    torch.save(saved, tmp_path / "a.ckpt")
    before = {*sys.modules}
    with pytest.raises(ValueError, match=told):
        PromptMethod.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not [name for name in {*sys.modules} - before if "prompt_lab" not in name]


def test_rows_too_large_for_memory_are_halved_when_their_prompts_are_gone():
    """Reference: what each row alone answers; the first prefix is let go before the halves run."""
    backbone, seen = make_backbone("gpt2"), []
    bank = torch.randn(1, 3, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    batch = backbone.batch(["a dog", "the sea", "yes", "a cat"])

    def prefix_of(rows: Batch) -> tuple[Any, Batch]:
        if seen:
            assert seen[0]() is None
        prefix = backbone.prefix(bank)
        seen.append(weakref.ref(prefix[0]))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return prefix, rows

    step, way = EvaluationBatch("t", batch, 3), Way(["yes", "no"], None, 1)
    with torch.no_grad():
        found = answers(backbone, prefix_of, step, way)
        alone = [
            way.labels[backbone.choose(bank, batch.slice(i, i + 1), way.labels)[0]]
            for i in range(4)
        ]
    assert found == alone
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "place", "at"),
    [
        ("prompts", "prompt_lab.methods.method.bank_gradient", 3),
        ("four episodes", "prompt_lab.core.bank.bank_product", 4),
    ],
)
def test_micro_batches_are_halved_when_memory_runs_out(
    files, fewshot_root, tmp_path, monkeypatch, name, place, at
):
    """Passes of more than 60 tokens fail; reference: a fit that starts with what fits."""
    make, tasks = METHODS[name]
    module, _, function = place.rpartition(".")
    plain, asked, most = getattr(sys.modules[module], function), [], 60

    def small(*given: Any) -> Any:
        asked.append(given[at])
        if given[at] > most:
            raise torch.OutOfMemoryError("out of memory")
        return plain(*given)

    def fit(tokens: int) -> PromptMethod:
        method = make(files)
        method._tokens_per_forward = tokens
        data = make_data(fewshot_root, tasks, [13])
        trainer(tmp_path, steps=2, limit_val_batches=0).fit(method, datamodule=data)
        return method

    monkeypatch.setattr(place, small)
    with pytest.warns(UserWarning, match=r"tokens_per_forward is 50 from step 0 on"):
        found = fit(200)
    assert asked[:4] == [200, 100, 50, 50]
    assert found.prompt.equal(fit(50).prompt)
    most = 0
    with pytest.raises(ValueError, match="memory runs out with a single row in a forward pass"):
        fit(200)


@pytest.mark.parametrize("way", ["tokens_per_forward", "gradient_checkpointing"])
@pytest.mark.parametrize("name", ["prompts", "subspaces", "four episodes", "fine-tuning"])
def test_what_saves_memory_changes_no_result(files, fewshot_root, tmp_path, name, way):
    """Reference: all rows in one forward pass, and the plain backward passes."""
    made, (make, tasks) = [], METHODS[name]
    for saves in (False, True):
        method = make(files)
        if name == "fine-tuning":  # since Adam magnifies rounding
            method.backbone = make_backbone("t5", torch.float64)
        if saves and way == "tokens_per_forward":
            method._tokens_per_forward = 100
        elif saves:
            method.backbone.recompute_layers()
        data = make_data(fewshot_root, tasks, [13])
        trainer(tmp_path, steps=4).fit(method, datamodule=data)
        made.append(method)
    exact = way == "gradient_checkpointing" and name != "four episodes"
    for one, other in zip(*(method.parameters() for method in made), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one, other, rtol=0, atol=0 if exact else 1e-5)
    assert made[0].keeper.score.equal(made[1].keeper.score)
    with pytest.raises(ValueError, match="do not go together"):
        BackboneConfig(gradient_checkpointing=True, compile=True).load()


@pytest.mark.parametrize("name", ["codes", "adapter codes", "decomposed"])
def test_a_bank_of_other_parameters_follows_the_separate_single_runs(
    files, fewshot_root, tmp_path, name
):
    """Reference: each of the runs alone; of prompts see ``test_prompt_tuning.py``."""
    make, tasks = METHODS[name]

    def fit(tasks: list[str], **settings: Any) -> Any:
        method = make(files)
        vars(method).update(settings)
        made = trainer(tmp_path, val_check_interval=3)
        made.fit(method, datamodule=make_data(fewshot_root, tasks, [13]))
        return method

    bank = fit(tasks)
    for i, run in enumerate(bank.runs):
        one = {"init_seeds": [run.init_seed], "learning_rates": [run.learning_rate]}
        alone = fit([run.task], **one)
        torch.testing.assert_close(bank.bank()[i], alone.bank()[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(bank.init[i], alone.init[0])
        assert bank.keeper.step[i] == alone.keeper.step[0]


@pytest.mark.parametrize(
    ("name", "wrong", "right", "told"),
    [
        ("warmup", (-0.1, 1.1, float("nan")), (0.0, 1.0), "a share of the steps, 0 to 1"),
        ("clip", (0.0, -1.0, float("nan")), (0.1, None), "a positive norm, or null for none"),
        ("learning_rate", (0.0, float("nan")), (0.1, [0.1, 0.2]), "a positive number"),
        ("label_smoothing", (-0.1, 1.0), (0.0, 0.5), "0 up to below 1"),
        ("patience", (0,), (1, None), "at least 1, or null"),
        ("batch_size", (0,), (1,), "at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_whichever_method_has_them(name, wrong, right, told):
    for value in right:
        check_settings({name: value})
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^model\.{name} is .*: give {told}$"):
            check_settings({name: value})


def test_groups_of_settings_are_told_by_their_fields_where_they_are_a_word():
    with pytest.raises(TypeError, match=r"'gpt2' is no BackboneConfig: .* any of name, dtype"):
        PromptTuning(backbone="gpt2")
    with pytest.raises(TypeError, match=r"'normal' is no InitConfig: .* any of name, vocab_size"):
        PromptTuning(init="normal")


def test_predict_answers_the_test_rows_as_the_test_did(fitted):
    method = fitted["method"]
    found = trainer(fitted["folder"]).predict(method, datamodule=fitted["data"]())
    rows = [row for batch in found for row in batch]
    assert {*rows[0]} == {"run", "task", "sample", "row", "answer"}
    assert len(rows) == 12 * len(method.evaluated)


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": 2},
        {"limit_val_batches": 1, "num_sanity_val_steps": 2},
        {"limit_train_batches": 3, "max_steps": -1, "max_epochs": 2},
        {"max_steps": -1, "max_epochs": 1},
        {"max_steps": 5, "val_check_interval": 3},
        {"limit_val_batches": 0},
    ],
    ids=lambda given: " ".join(given),
)
def test_any_trainer_runs_it(files, fewshot_root, tmp_path, settings):
    """Every method in turn, under settings that Lightning's users give."""
    for make, tasks in METHODS.values():
        method, data = make(files), make_data(fewshot_root, tasks, [13])
        made = trainer(tmp_path / make.__name__, **settings)
        made.fit(method, datamodule=data)
        if settings.get("fast_dev_run"):
            assert method.run_dir is None
            assert not (tmp_path / make.__name__).exists()
            continue
        assert method.run_dir.parent.name == "prompt_lab_runs"
        curves = read_csv(method.run_dir / "curves.csv")
        if settings.get("limit_val_batches") != 0:
            assert int(curves[-1]["step"]) == made.global_step  # the last step is evaluated
        made.test(method, datamodule=data, verbose=False)
        assert read_csv(method.run_dir / "results.csv")


def test_building_does_not_depend_on_the_default_device(fitted):
    method, data = fitted["make"](), fitted["data"]()
    data.setup()
    method.trainer = trainer(fitted["folder"])
    method.trainer.datamodule = data
    method.backbone = method.load_backbone()
    data.connect(method.backbone)
    with torch.device("meta"), torch.device("cpu"):
        method.take(data)
    assert {value.device.type for value in method.state_dict().values()} == {"cpu"}


def test_another_fit_on_other_data_takes_fresh_runs(files, fewshot_root, tmp_path):
    method = prompts(files)
    trainer(tmp_path).fit(method, datamodule=make_data(fewshot_root, ["glue-cola"], [13]))
    first = method.runs
    trainer(tmp_path).fit(method, datamodule=make_data(fewshot_root, ["emotion"], [13]))
    assert {run.task for run in first} == {"glue-cola"}
    assert {run.task for run in method.runs} == {"emotion"}
    before = method.prompt.detach().clone()
    trainer(tmp_path).fit(method, datamodule=make_data(fewshot_root, ["emotion"], [13]))
    assert not method.prompt.equal(before)  # the same runs go on
    assert method.keeper.is_filled


def test_tests_with_another_data_module_match_runs_by_task_and_sample(
    fitted, fewshot_root, tmp_path
):
    method = fitted["method"]
    if fitted["name"] in ("four episodes", "fine-tuning"):
        return
    one, other = method.runs[-1].task, "glue-sst2"
    made = trainer(tmp_path)
    method.run_dir = tmp_path / "run"
    if fitted["name"] == "subspaces":
        return  # its unseen tasks are settings
    made.test(method, datamodule=make_data(fewshot_root, [one], [13]), verbose=False)
    rows = read_csv(tmp_path / "run" / "results.csv")
    assert {row["task"] for row in rows} == {one}
    if fitted["name"] != "attempt":
        with pytest.raises(ValueError, match=r"no run was trained for glue-sst2 \(sample 13\)"):
            made.test(method, datamodule=make_data(fewshot_root, [other], [13]), verbose=False)


def test_plain_loaders_are_refused_in_a_sentence(files, tmp_path):
    rows = torch.utils.data.DataLoader(range(3))
    with pytest.raises(ValueError, match="pass datamodule= a CrossFitDataModule, a RowsData"):
        trainer(tmp_path).fit(prompts(files), rows, rows)


@pytest.mark.parametrize(
    "kind",
    ["csv", "tensorboard", "wandb", "bare", "none"],
)
def test_loggers_get_settings_losses_and_scores(files, fewshot_root, tmp_path, kind, monkeypatch):
    """Under the names of the flags, and outputs lie beside those of CSV and TensorBoard."""
    monkeypatch.setenv("WANDB_MODE", "offline")

    class Bare(loggers.Logger):
        """One without a folder of its own."""

        name, version = "bare", 0

        def __init__(self) -> None:
            self.seen: dict[str, list[Any]] = {}

        def log_metrics(self, metrics, step=None):
            for name, value in metrics.items():
                self.seen.setdefault(name, []).append((step, value))

        def log_hyperparams(self, params, *args, **kwargs):
            self.seen["settings"] = params

    made = {
        "csv": lambda: loggers.CSVLogger(tmp_path),
        "tensorboard": lambda: loggers.TensorBoardLogger(tmp_path),
        "wandb": lambda: loggers.WandbLogger(save_dir=tmp_path, offline=True),
        "bare": Bare,
        "none": lambda: False,
    }[kind]()
    method = prompts(files)
    method.dev_loss = True
    tool = trainer(tmp_path, logger=made, log_every_n_steps=1, val_check_interval=3)
    tool.fit(method, datamodule=make_data(fewshot_root, ["glue-cola"], [13]))
    assert (method.run_dir / "curves.csv").is_file()
    if kind in ("csv", "tensorboard"):
        assert method.run_dir == Path(made.log_dir)
    if kind == "tensorboard":
        assert [*Path(made.log_dir).glob("events.out.*")]
        assert "model.optim.name: adamw" in (Path(made.log_dir) / "hparams.yaml").read_text()
    if kind == "bare":
        assert made.seen["settings"]["model.optim.name"] == "adamw"
        assert made.seen["settings"]["model.backbone.name"] == "sandbox"
        assert made.seen["settings"]["data.tasks"] == ["glue-cola"]
        assert len(made.seen["train/loss"]) >= 6
        for name in ("dev/loss", "dev/glue-cola/mean", "best/val_score", "lr", "lr/min", "lr/max"):
            assert name in made.seen, name
        assert made.seen["lr/max"][0][1] == pytest.approx(0.1)
    if kind == "wandb":
        assert made.experiment.config["model.optim.name"] == "adamw"
        made.experiment.finish()


def test_the_loss_on_dev_is_the_mean_over_rows_and_runs(files, fewshot_root, tmp_path):
    """Reference: one row after another."""
    method = prompts(files)
    method.dev_loss = True
    made = trainer(tmp_path, steps=2, val_check_interval=2)
    made.fit(method, datamodule=make_data(fewshot_root, ["glue-cola"], [13]))
    split = method.datamodule.splits["glue-cola", 13]["dev"]
    backbone, losses = method.backbone, []
    for prompt in method.bank().detach():
        for text, references in zip(split.inputs, split.references, strict=True):
            batch = backbone.batch([text], [references[0]])
            losses.append(backbone.loss(prompt[None], batch).item())
    found = made.callback_metrics["dev/loss"].item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_callbacks_work_by_their_effect(files, fewshot_root, tmp_path):
    method, data = prompts(files), make_data(fewshot_root, ["glue-cola"], [13])
    best = callbacks.ModelCheckpoint(
        tmp_path / "best", monitor="best/val_score", mode="max", auto_insert_metric_name=False
    )
    rates = callbacks.LearningRateMonitor("step")
    stop = callbacks.EarlyStopping("best/val_score", patience=1, mode="max")
    seen: list[int] = []
    watch = callbacks.LambdaCallback(
        on_train_batch_end=lambda *given: seen.append(given[0].global_step)
    )
    logger = loggers.CSVLogger(tmp_path)
    made = trainer(
        tmp_path,
        steps=40,
        val_check_interval=2,
        logger=logger,
        enable_checkpointing=True,
        callbacks=[best, rates, stop, watch, callbacks.Timer(), callbacks.ModelSummary()],
        log_every_n_steps=1,
    )
    made.fit(method, datamodule=data)
    assert seen == [*range(1, made.global_step + 1)]
    assert made.global_step < 40  # EarlyStopping ended it
    assert Path(best.best_model_path).is_file()
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["state_dict"]["keeper.score"].equal(method.keeper.score)
    assert int(read_csv(method.run_dir / "curves.csv")[-1]["step"]) == made.global_step
    assert (method.run_dir / "prompts").is_dir()


REFUSED_CALLBACKS = [
    callbacks.StochasticWeightAveraging(0.1),
    callbacks.BackboneFinetuning(),
    callbacks.ModelPruning("l1_unstructured"),
    callbacks.LearningRateFinder(),
    callbacks.BatchSizeFinder(),
    callbacks.EMAWeightAveraging(),
    callbacks.GradientAccumulationScheduler({0: 2}),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"callbacks": [one]}, f"the callback {type(one).__name__} does not go with")
        for one in REFUSED_CALLBACKS
    ),
    ({"accumulate_grad_batches": 2}, "set model.batch_size"),
    ({"gradient_clip_val": 1.0}, "model.optim.clip"),
    ({"precision": "bf16-true"}, "32-true with model.backbone.dtype bfloat16"),
    ({"precision": "16-true"}, "32-true with model.backbone.dtype bfloat16"),
    # on a CPU Lightning makes bf16-mixed of the word, but not of the plugin itself
    ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, "16-mixed would round .*: use bf16-mixed"),
    ({"max_steps": -1, "max_epochs": -1}, "the fit has no end"),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED)
def test_trainers_that_would_change_the_result_are_refused(
    files, fewshot_root, tmp_path, settings, told
):
    """By every method, but that MetaPrompt, whose prompt is one, may be clipped and accumulated."""
    of_banks = "callbacks" in settings or "model.optim" in told or "batch_size" in told
    for name in ["prompts"] if of_banks else METHODS:
        make, tasks = METHODS[name]
        data, tool = make_data(fewshot_root, tasks, [13]), trainer(tmp_path, **settings)
        with pytest.raises(ValueError, match=told):
            tool.fit(make(files), datamodule=data)


def test_data_of_ones_own(files, tmp_path):
    """A dict of pairs, and a data module with rows of its own, give the same fit."""
    rows = {s: [(f"{s} row {i}", ["yes", "no"][i % 2]) for i in range(6)] for s in SPLIT_NAMES}

    class Mine(PromptDataModule):
        def rows(self, task, sample, split):
            return rows[split]

    pairs = RowsDataModule({"mine": rows}, labels={"mine": ["yes", "no"]})
    found = []
    for data in (pairs, Mine([*pairs.tasks.values()])):
        method = prompts(files)
        trainer(tmp_path).fit(method, datamodule=data)
        found.append(method.prompt.detach())
    assert torch.equal(*found)


SPLIT_NAMES = ("train", "dev", "test")


def test_public_names_are_there():
    assert {"MetaPrompt", "VectorArithmetic", "Attempt", "Backbone", "Prompt"} < {
        *prompt_lab.__all__
    }
    assert all(getattr(prompt_lab, name) is not None for name in prompt_lab.__all__)
