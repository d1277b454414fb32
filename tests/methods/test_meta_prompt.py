"""``MetaPrompt`` under a Lightning trainer: its steps against naive loops, failures, what is kept.

The references are unrolled graphs, one episode and one row at a time, prompt tuning from the same
start, and the files on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make_backbone
from lightning.pytorch import Callback
from tiny_fits import TOKENS, fit_in, loaded, run_test

from prompt_lab.commands import fit as cli
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import BankObjective, renumber
from prompt_lab.core.batch import Batch
from prompt_lab.core.forward import twice_differentiable
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.core.optim import OptimConfig
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.data.sampling import Episodes
from prompt_lab.files.prompts import load_prompt
from prompt_lab.files.results import read_csv
from prompt_lab.methods.configs import BackboneConfig
from prompt_lab.methods.evaluation import Evaluation
from prompt_lab.methods.meta_prompt import AdaptationConfig, MetaPrompt
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.methods.starts import InitConfig

SOURCES = ["glue-sst2", "glue-cola", "e2e_nlg_cleaned"]
HELD_OUT = ["emotion", "glue-cola"]
ONE_STEP = {"steps": 1, "every": 1}


class Watch(Callback):
    """Notes the items of every meta-batch, and gradients and prompts around every step."""

    def __init__(self) -> None:
        self.keys: list[list[tuple[str, int]]] = []
        self.gradients: list[torch.Tensor] = []
        self.rate_gradients: list[torch.Tensor] = []
        self.prompts: list[torch.Tensor] = []
        self.moments: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.keys.append(batch.keys)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(pl_module.prompt.grad.clone())
        if pl_module.log_rate is not None:
            self.rate_gradients.append(pl_module.log_rate.grad.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.prompts.append(pl_module.prompt.detach().clone())
        state = trainer.optimizers[0].state[pl_module.prompt]  # empty before the first step
        moments = [state[name].flatten() for name in sorted(state)]
        self.moments.append(torch.cat([torch.zeros(0), *moments]))


@cache
def gentle(kind: str) -> Backbone:
    """A tiny backbone on which inner loops go smoothly; do not change it.

    T5's attention is not scaled, so under the wide weights of conftest its loss is so sharp that
    rounding alone turns gradients; a third of them is in the range of the other models.
    """
    model = make_backbone(kind)
    if kind in ("t5", "mt5"):
        for weight in model.parameters():
            weight.data.mul_(1 / 3 if weight.dim() > 1 else 1)
    return model


@pytest.fixture
def fit(fewshot_root: Path, tmp_path: Path) -> Callable[..., MetaPrompt]:
    """Function that learns a prompt on a tiny model and returns the method, trainer attached."""

    def run(
        kind: str = "gpt2",
        tasks: list[str] = SOURCES,
        samples: list[int] = [13],  # noqa: B006
        model: Backbone | None = None,
        trainer: dict[str, Any] | None = None,
        watch: Watch | None = None,
        **settings: Any,
    ) -> MetaPrompt:
        given = {"num_virtual_tokens": TOKENS, "episodes": 2, "support_size": 2, "query_size": 3}
        given |= {"inner": InnerConfig(steps=2, learning_rate=0.1), "learning_rate": 0.1}
        method = MetaPrompt(**{**given, "optim": OptimConfig("sgd"), **settings})
        of_trainer = {"steps": 3, "every": 3, **(trainer or {})}
        of_trainer["callbacks"] = [] if watch is None else [watch]
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        method = loaded(method, model or gentle(kind))
        return fit_in(folder, method, fewshot_root, tasks, samples, **of_trainer)

    return run


def validated(trainer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Settings of a fit of four steps with two validation tasks, evaluated after every second."""
    wanted = {"tasks": [*SOURCES, "emotion"], "validation_tasks": HELD_OUT}
    wanted["adaptation"] = AdaptationConfig(2, 0.1, 4)
    return {**wanted, "trainer": {"steps": 4, "every": 2, **(trainer or {})}, **more}


def curves(method: MetaPrompt) -> list[dict[str, str]]:
    """The lines of ``curves.csv``."""
    return read_csv(method.run_dir / "curves.csv")


# ---- a step equals a naive loop over episodes ----------------------------------------------------


def naive_loss(model: Backbone, prompt: torch.Tensor, batch: Batch, episode: int) -> torch.Tensor:
    """Mean loss of an episode's rows, one row after another, under its prompt (N, D)."""
    rows = [row for row, prompt_ in enumerate(batch.prompts) if prompt_ == episode]
    losses = [
        model.loss(prompt[None], renumber(batch.slice(row, row + 1), [episode])) for row in rows
    ]
    return torch.cat(losses).mean()


def naive_episode(
    method: MetaPrompt, start: torch.Tensor, rate: torch.Tensor, episodes: Episodes, episode: int
) -> torch.Tensor:
    """What the algorithm minimises on an episode: a graph from the start (N, D) and the rate."""
    model, algorithm = method.backbone, method.algorithm
    assert model is not None
    if algorithm == "multitask":
        parts = [*episodes.support, episodes.query]
        counts = [part.prompts.count(episode) for part in parts]
        sums = [
            naive_loss(model, start, p, episode) * n for p, n in zip(parts, counts, strict=True)
        ]
        return sum(sums) / sum(counts)
    adapted = start
    for support in episodes.support:
        loss = naive_loss(model, adapted, support, episode)
        (gradient,) = torch.autograd.grad(loss, adapted, create_graph=algorithm == "maml")
        adapted = adapted - rate * gradient
    if algorithm == "reptile":  # its gradient is the way back
        return ((start.detach() - adapted.detach()) * start).sum()
    return naive_loss(model, adapted, episodes.query, episode)


def naive_step(method: MetaPrompt, episodes: Episodes) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the mean over episodes: of the prompt (1, N, D) and of the rate's logarithm."""
    width = TOKENS if method.inner.learned == "per_token" else 1
    log_rate = torch.full((width, 1), method.inner.learning_rate).log().requires_grad_()
    start = method.init[0].clone().requires_grad_()
    with twice_differentiable():
        losses = [
            naive_episode(method, start, log_rate.exp(), episodes, i)
            for i in range(len(episodes.keys))
        ]
        mean = torch.stack(losses).mean()
        of_prompt, of_rate = torch.autograd.grad(mean, [start, log_rate], allow_unused=True)
    return of_prompt[None], torch.zeros(1) if of_rate is None else of_rate.T


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    """Norm of the difference is a small share of the norm."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    assert (found - expected).norm() <= share * expected.norm()


@pytest.mark.parametrize("kind", ["mt5", "gpt2"])
@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "multitask"])
def test_a_step_is_that_of_a_naive_loop_over_episodes(fit, kind, algorithm):
    """Reference: an unrolled graph for each episode, and the outer step of plain SGD."""
    watch = Watch()
    settings = {"algorithm": algorithm, "episodes": 3, "learning_rate": 1.0}
    method = fit(kind, **settings, watch=watch, trainer=ONE_STEP)
    expected, _ = naive_step(method, method.datamodule.draw.batch(0, range(len(method.runs))))
    assert_near(watch.gradients[0], expected)
    torch.testing.assert_close(method.prompt, method.init - expected, rtol=1e-5, atol=1e-6)


def test_multi_task_learning_reads_the_rows_of_maml_and_reptile_those_of_support(fit, monkeypatch):
    """Two steps of two episodes of 2 x 2 support and 3 query rows; counted where gradients are."""
    read: dict[str, list[list[tuple[int, int]]]] = {}
    plain = BankObjective.gradient

    def count(self, prompts):
        read[algorithm].append(sorted(zip(self.batch.prompts, self.batch.rows, strict=True)))
        return plain(self, prompts)

    monkeypatch.setattr(BankObjective, "gradient", count)
    for algorithm in ("maml", "fomaml", "multitask", "reptile"):
        read[algorithm] = []
        fit(algorithm=algorithm, trainer={"steps": 2, "every": 2})
    assert [len(rows) for rows in read["maml"]] == 2 * [4, 4, 6]
    assert read["multitask"] == read["fomaml"] == read["maml"]
    assert read["reptile"] == [read["maml"][part] for part in (0, 1, 3, 4)]


@pytest.mark.parametrize("learned", ["shared", "per_token"])
@pytest.mark.parametrize("algorithm", ["maml", "fomaml"])
def test_the_learned_inner_rate_takes_the_step_of_the_naive_loop(fit, algorithm, learned):
    """Reference: the gradient of the rate's logarithm through the unrolled graph."""
    watch = Watch()
    inner = InnerConfig(2, learning_rate=0.1, learned=learned)
    settings = {"algorithm": algorithm, "inner": inner, "learning_rate": 0.5, "rate_factor": 0.4}
    method = fit(**settings, watch=watch, trainer=ONE_STEP)
    of_prompt, of_rate = naive_step(
        method, method.datamodule.draw.batch(0, range(len(method.runs)))
    )
    assert_near(watch.gradients[0], of_prompt)
    assert_near(watch.rate_gradients[0], of_rate)
    torch.testing.assert_close(method.log_rate, -0.5 * 0.4 * of_rate, rtol=1e-5, atol=1e-6)
    rate = (0.1 * method.log_rate.detach().exp()).T
    torch.testing.assert_close(method.rate.expand(len(rate), 1), rate)


def test_accumulated_meta_batches_are_one_of_all_their_episodes(fit):
    """Reference: four episodes at once, on the same items in the same order."""
    settings: dict[str, Any] = {"optim": OptimConfig("adamw"), "samples": [13, 42]}
    one, two = Watch(), Watch()
    whole = fit(episodes=4, watch=one, **settings)
    trainer = {"accumulate_grad_batches": 2, "every": 2}
    parts = fit(episodes=2, trainer=trainer, watch=two, **settings)
    assert [two.keys[at] + two.keys[at + 1] for at in (0, 2, 4)] == one.keys
    assert parts.trainer.global_step == whole.trainer.global_step == 3
    torch.testing.assert_close(parts.prompt, whole.prompt, rtol=0, atol=1e-5)
    for own, other in zip(two.gradients, one.gradients, strict=True):
        assert_near(own, other, 1e-4)  # the second step starts from another rounding
    assert [row["step"] for row in read_csv(parts.run_dir / "curves.csv")] == ["1", "2", "3"]


def test_the_trainer_clips_the_meta_gradient(fit):
    """Reference: the length of an SGD step, the learning rate times the clip."""
    trainer = {**ONE_STEP, "gradient_clip_val": 1e-2}
    method = fit(learning_rate=0.5, trainer=trainer)
    step = (method.prompt - method.init).norm().item()
    assert step == pytest.approx(0.5 * 1e-2, rel=1e-3)


# ---- validation and files ------------------------------------------------------------------------


def test_without_adaptation_dev_is_the_score_of_the_prompt_itself(fit, fewshot_root):
    """Reference: the likeliest label of each row by the backbone, and accuracy by hand."""
    settings = validated(
        tasks=["glue-cola", "emotion", "glue-sst2"], validation_tasks=["glue-sst2"]
    )
    settings |= {"adaptation": AdaptationConfig(steps=0), "samples": [13, 42]}
    method = fit(**settings, learning_rate=1.0, optim=OptimConfig("adamw"))
    labels = ["negative", "positive"]
    for run, found in enumerate(method.keeper.dev.tolist()):
        rows = method.datamodule.splits["glue-sst2", [13, 42][run]]["dev"]
        batch = method.backbone.batch(rows.inputs)
        chosen = method.backbone.score(method.best, batch, labels).argmax(1).tolist()
        right = [
            labels[choice] == rows.references[row][0]
            for choice, row in zip(chosen, batch.rows, strict=True)
        ]
        assert found == sum(right) / len(right)
    assert all(row["moved"] == "0" or float(row["moved"]) == 0 for row in curves(method))


@pytest.mark.parametrize("kind", ["mt5", "gpt2"])
def test_adaptation_is_prompt_tuning_from_the_learned_prompt(fit, fewshot_root, tmp_path, kind):
    """Reference: ``PromptTuning`` with the prompt's file as its start."""
    optim = OptimConfig("adamw", schedule="linear", warmup_steps=2)
    settings = validated(adaptation=AdaptationConfig(4, 0.05, 3, optim), samples=[13, 42])
    method = fit(kind, **settings)
    init = InitConfig("file", path=str(method.prompt_path))
    given = {"num_virtual_tokens": TOKENS, "learning_rate": 0.05, "batch_size": 3, "optim": optim}
    tuned = loaded(PromptTuning(init=init, **given), gentle(kind))
    fit_in(tmp_path / "tuned", tuned, fewshot_root, HELD_OUT, [13, 42], steps=4, every=4)
    assert [run.task for run in tuned.runs] == [run.task for run in method.runs]
    adapted, _ = method.adapt(method.best)
    torch.testing.assert_close(adapted, tuned.prompt.detach(), rtol=0, atol=1e-5)
    assert method.keeper.dev.tolist() == pytest.approx(tuned.keeper.score.tolist())
    assert (tuned.prompt - tuned.init).norm() > 0.1


def test_the_prompt_of_the_best_mean_is_kept_and_of_equal_ones_the_first(fit, monkeypatch):
    """Reference: means .3, .3 again, .35, .35 again; NaN counts as the worst."""
    table = [[0.2, 0.4], [0.5, 0.1], [0.6, 0.1], [0.1, 0.6], [0.9, float("nan")]]
    left = iter(table)
    monkeypatch.setattr(
        Evaluation, "scores", lambda _: torch.tensor(next(left), dtype=torch.float64)
    )
    watch = Watch()
    method = fit(**validated({"steps": 5, "every": 1}, watch=watch))
    assert method.keeper.step.item() == 3
    assert method.keeper.score.item() == pytest.approx(0.35)
    assert method.keeper.dev.tolist() == table[2]
    assert [row["best_step"] for row in curves(method)[::2]] == ["1", "1", "3", "3", "3"]
    saved = load_prompt(method.prompt_path)
    assert saved.prompt.equal(watch.prompts[2][0])
    assert not saved.prompt.equal(watch.prompts[4][0])
    assert (saved.steps, saved.dev_score) == (3, pytest.approx(0.35))


def test_without_validation_tasks_the_last_prompt_is_kept_and_test_has_nothing_to_do(fit):
    method = fit(trainer={"steps": 4, "every": 2})
    assert [(row["step"], row["run"], row["dev"]) for row in curves(method)] == [
        ("2", "maml", ""),
        ("4", "maml", ""),
    ]
    assert all(float(row["moved"]) > 0 and float(row["train_loss"]) > 0 for row in curves(method))
    saved = load_prompt(method.prompt_path)
    assert saved.prompt.equal(method.prompt.detach()[0])
    assert (saved.steps, saved.dev_score, saved.status) == (4, None, "finished")
    with pytest.raises(ValueError, match=r"nothing to score without model\.validation_tasks"):
        method.trainer.test(method, datamodule=method.datamodule)
    with pytest.raises(ValueError, match="nothing to score without"):
        method.trainer.validate(method, datamodule=method.datamodule)


def test_results_and_the_file_say_where_the_prompt_comes_from_and_prompts_start_there(
    fit, fewshot_root, tmp_path
):
    method = fit(**validated(), optim=OptimConfig("adamw"))
    run_test(method.run_dir, method, method.datamodule)
    rows = read_csv(method.run_dir / "results.csv")
    assert [(row["task"], row["variant"]) for row in rows] == [(t, "adapted") for t in HELD_OUT]
    assert {(row["start"], row["start_of"]) for row in rows} == {("meta", "2 tasks")}
    assert {row["best_step"] for row in rows} == {str(method.keeper.step.item())}
    for row in rows:
        stored = load_prompt(method.run_dir / row["prompt_file"], method.backbone)
        assert stored.init.equal(method.best[0])
        assert stored.dev_score == float(row["dev"])
    saved = load_prompt(method.prompt_path, method.backbone)
    assert (saved.role, saved.source_set) == ("meta", "2 tasks")
    assert saved.source_tasks == ["glue-sst2", "e2e_nlg_cleaned"]
    assert saved.prompt.equal(method.best[0])
    assert saved.init.equal(method.init[0])
    init = InitConfig("file", path=str(method.prompt_path))

    def tune(tasks: list[str]) -> PromptTuning:
        tuned = PromptTuning(init=init, num_virtual_tokens=TOKENS)
        return fit_in(tmp_path / "tuned", loaded(tuned, method.backbone), fewshot_root, tasks)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tuned = tune(["emotion"])
    assert not [w for w in told if "was learned on" in str(w.message)]
    assert tuned.init[0].equal(saved.prompt)
    run_test(tuned.run_dir, tuned, tuned.datamodule)
    (row,) = read_csv(tuned.run_dir / "results.csv")
    assert (row["start"], row["start_of"]) == ("meta", "2 tasks")
    assert row["start_file"] == str(method.prompt_path)
    with pytest.warns(UserWarning, match="learned on glue-sst2, tuned here"):
        tune(["glue-sst2", "emotion"])


SET = "sandbox/12_to_4/source"


@pytest.mark.parametrize(
    ("tasks", "settings", "name"),
    [
        ([SET], {}, SET),
        ([SET], {"validation_tasks": ["sandbox-season"]}, f"11 of {SET}"),
        ([SET, "sandbox-gender"], {}, "13 tasks"),
        (["sandbox-season", "sandbox-size"], {"algorithm": "reptile"}, "2 tasks"),
        ([SET], {"source_name": "mine"}, "mine"),
    ],
)
def test_a_prompt_names_its_source_tasks_as_they_were_named(
    tmp_path, monkeypatch, tasks, settings, name
):
    data = CrossFitDataModule(tasks)
    method = MetaPrompt(**settings)
    monkeypatch.setattr(MetaPrompt, "datamodule", data)
    method.keys = [(task, 100) for task in method._sources(data)]
    assert method.source_set == name
    assert method.source_tasks == [t for t in data.tasks if t not in method.validation_tasks]


# ---- divergence ----------------------------------------------------------------------------------


def break_steps(
    monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], what: str = "gradient"
) -> None:
    """Let the meta-gradients of some meta-batches be NaN."""
    plain = MetaPrompt.meta_gradient

    def broken(self, episodes, rate):
        found = plain(self, episodes, rate)
        if bad(self.trainer.fit_loop.epoch_loop.batch_idx):
            setattr(found, what, getattr(found, what) + torch.nan)
        return found

    monkeypatch.setattr(MetaPrompt, "meta_gradient", broken)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("what", ["gradient", "rate_gradient"])
def test_a_step_with_a_bad_part_is_skipped_whole_and_training_goes_on(
    fit, monkeypatch, what, batches
):
    """Reference: prompt and moments before the step, bit for bit."""
    break_steps(monkeypatch, lambda batch: batch == 2, what)
    watch = Watch()
    settings = {"optim": OptimConfig("adamw"), "watch": watch}
    settings["inner"] = InnerConfig(2, learning_rate=0.1, learned="shared")
    trainer = {"steps": 4, "every": 2 * batches, "accumulate_grad_batches": batches}
    with pytest.warns(UserWarning, match=r"skipped 1 of the steps since .*, 1 in all"):
        method = fit(**settings, trainer=trainer)
    last = 2 if batches == 1 else 3  # of the skipped step
    assert watch.prompts[last].equal(watch.prompts[1])
    assert watch.moments[last].equal(watch.moments[1])
    assert not watch.prompts[last + batches].equal(watch.prompts[last])
    assert method.log_rate.isfinite().all()
    assert [row["skipped"] for row in curves(method)] == [str(batches - 1), "1"]
    assert all(float(row["train_loss"]) > 0 for row in curves(method))
    assert load_prompt(method.prompt_path).status == "finished"


@pytest.mark.filterwarnings("ignore:step 4.*skipped")
@pytest.mark.filterwarnings("ignore:step 8.*skipped")
@pytest.mark.parametrize("every", [4, 20])
@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_fit_that_never_takes_a_step_ends_with_a_reason(fit, algorithm, every):
    """However often it evaluates: the initial prompt is not a learned one."""
    watch = Watch()
    trainer = {"steps": 20, "every": every}
    inner = InnerConfig(2, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"last 10 steps.*inner\.learning_rate 1e\+30"):
        fit(algorithm=algorithm, inner=inner, trainer=trainer, watch=watch)
    assert len(watch.gradients) == 10
    assert all(gradient.count_nonzero() == 0 for gradient in watch.gradients)
    assert all(prompt.equal(watch.prompts[0]) for prompt in watch.prompts)


def test_a_fit_that_diverges_later_keeps_its_best_prompt(fit, monkeypatch):
    break_steps(monkeypatch, lambda step: step >= 4)
    settings = validated({"steps": 60, "every": 3})
    with pytest.warns(UserWarning, match=r"step 20: the last 16 steps .* of step \d+ is"):
        method = fit(**settings)
    assert method.trainer.global_step == 20
    saved = load_prompt(method.prompt_path)
    assert saved.status == "stopped: diverged"
    assert saved.prompt.equal(method.best[0])
    assert saved.prompt.isfinite().all()
    assert curves(method)[-1]["skipped"] == "16"


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"algorithm": "anil"}, "'anil'; allowed: maml, fomaml, reptile, multitask"),
        ({"depth": -1}, r"model\.depth is -1 for maml.*0 or more"),
        ({"depth": 1, "algorithm": "fomaml"}, r"model\.depth is 1 for fomaml: it is of maml"),
        ({"inner": {"learned": "shared"}, "algorithm": "reptile"}, "reptile has no query loss"),
        (
            {"backbone": {"attention": "flash_attention_2"}},
            "attention flash_attention_2, .*: use sdpa",
        ),
        ({"backbone": {"compile": True}}, "compile True and .* no compile"),
        ({"backbone": {"dtype": "bfloat16"}}, "dtype bfloat16, .* float32, or model.algorithm"),
        ({"adaptation": {"steps": -1}}, r"model\.adaptation\.steps is -1: give 0 or more"),
        ({"adaptation": {"batch_size": 0}}, "adaptation.batch_size is 0"),
        ({"validation_tasks": ["sandbox/none"]}, "sandbox/none"),
        ({"support_size": 13}, r"support_size 13 .*glue-sst2 13 \(12 train rows\).*lower them"),
        ({"query_size": 13}, r"query_size 13: glue-sst2 13 \(12 dev rows\).*lower them"),
        ({"target_tasks": ["glue-cola"]}, r"glue-cola: in data\.tasks and in model\.target_tasks"),
        ({"validation_tasks": ["emotion"]}, r"has emotion, which data\.tasks has not"),
        ({"validation_tasks": SOURCES}, "validation_tasks has every task of data.tasks"),
        ({"trainer": {"accumulate_grad_batches": 2}}, r"interval 3 counts meta-batches.*\(2\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fit, settings, reason):
    with pytest.raises(ValueError, match=reason):
        fit(**settings)


# ---- precision, memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile", "multitask"])
def test_weights_in_bfloat16_serve_first_order_algorithms(fit, algorithm):
    model = make_backbone("gpt2", torch.bfloat16)
    backbone = BackboneConfig(dtype="bfloat16")
    method = fit(model=model, backbone=backbone, algorithm=algorithm)
    assert method.prompt.dtype == torch.float32
    assert method.prompt.isfinite().all()
    assert not method.prompt.equal(method.init)


@pytest.mark.parametrize("kind", ["mt5", "bart", "gpt2", "bloom"])
def test_bf16_autocast_keeps_the_direction_of_mamls_gradient(fit, kind):
    """Reference: float32, on one step with a moderate inner rate."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        watch = Watch()
        settings = {"episodes": 4, "inner": InnerConfig(3, learning_rate=0.1), "watch": watch}
        method = fit(kind, **settings, trainer={**ONE_STEP, "precision": precision})
        assert method.prompt.dtype == torch.float32
        found.append(watch.gradients[0].flatten())
    assert torch.cosine_similarity(*found, dim=0) > 0.98
    assert not found[0].equal(found[1])


# ---- what is logged and said ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "second"),
    [
        ({"algorithm": "maml"}, True),
        ({"algorithm": "maml", "depth": 1}, True),
        ({"algorithm": "maml", "depth": 0}, False),
        ({"algorithm": "fomaml"}, False),
        ({"algorithm": "reptile"}, False),
        ({"algorithm": "multitask"}, False),
    ],
)
def test_the_share_of_the_second_order_is_logged(fit, settings, second):
    """It is what MAML adds; the other algorithms, and MAML without depth, add nothing."""
    method = fit(**settings, trainer={"steps": 2, "every": 2})
    seen = {k: float(v) for k, v in method.trainer.callback_metrics.items()}
    assert (seen["meta/second_order"] > 0) == second
    assert (seen["meta/inner_moved"] > 0) == (settings["algorithm"] != "multitask")
    assert seen["meta/moved"] > 0
    assert seen["meta/skipped"] == 0
    assert seen["meta/inner_learning_rate"] == pytest.approx(0.1)
    (row,) = curves(method)
    assert float(row["second_order"]) == pytest.approx(seen["meta/second_order"])
    assert float(row["train_loss"]) == pytest.approx(seen["train/loss"])
    assert float(row["inner_moved"]) == pytest.approx(seen["meta/inner_moved"])


def test_an_inner_loop_that_stands_still_is_told(fit):
    with pytest.warns(UserWarning, match="maml is hardly different from multi-task learning"):
        fit(inner=InnerConfig(2, learning_rate=3e-5))


def test_an_inner_loop_that_makes_it_worse_is_told(fit, monkeypatch):
    """With all rows of a task in each inner step its loss falls; here it is told backwards."""
    plain = MetaPrompt.meta_gradient

    def backwards(self, episodes, rate):
        found = plain(self, episodes, rate)
        found.support_losses = found.support_losses.flip(0)
        return found

    monkeypatch.setattr(MetaPrompt, "meta_gradient", backwards)
    with pytest.warns(UserWarning, match=r"in (83|100)% of the episodes the support loss rose"):
        fit(algorithm="fomaml", inner=InnerConfig(2, learning_rate=0.5), support_size=12)


def test_a_healthy_fit_warns_of_nothing(fit):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(**validated(inner=InnerConfig(2, learning_rate=0.5), support_size=12))
    texts = [str(warning.message) for warning in told]
    for text in ("hardly different", "loss rose", "skipped", "nothing to do"):
        assert not [found for found in texts if text in found]


def test_the_shipped_config_fits_and_tests_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")  # taken back after the fit
    config = CONFIGS / "meta" / "sandbox.yaml"
    short = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.logger=false"]
    short += ["--model.adaptation.steps=1", "--trainer.accelerator=cpu", "--data.samples=[100]"]
    given = ["--config", str(config), *short, f"--run_dir={tmp_path}"]
    with pytest.raises(SystemExit, match="0"):
        cli.run(["fit", *given, "--dry_run"])
    assert "validation_tasks: sandbox-season" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert cli.run(["fit", *given, "--test_after_fit"]) == 0
    saved = load_prompt(tmp_path / "prompt.safetensors")
    assert (saved.source_set, saved.steps) == ("10 of sandbox/12_to_4/source", 1)
    assert len(saved.source_tasks) == 10
    rows = read_csv(tmp_path / "results.csv")
    assert [(row["task"], row["method"], row["variant"]) for row in rows] == [
        ("sandbox-season", "MetaPrompt", "adapted"),
        ("sandbox-has-garment", "MetaPrompt", "adapted"),
    ]
    assert all(row["test"] and row["dev"] for row in rows)


def test_an_inner_loop_that_runs_far_away_ends_the_fit_though_its_loss_is_finite(fit):
    """A T5's norm makes a huge prompt vanish, so that the loss says nothing."""
    with pytest.raises(ValueError, match="the inner loop ran far away"):
        fit("t5", inner=InnerConfig(2, learning_rate=1e6), trainer={"steps": 10, "every": 10})
