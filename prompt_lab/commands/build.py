"""The command ``prompt-lab tasks build``: the few-shot files of many tasks, several at a time.

Tasks are built side by side in threads, each by `prompt_lab.data.build`: one that fails is reported
at the end and the others are kept. A second run finds what is finished and makes the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prompt_lab.data.build import Built
    from prompt_lab.data.tasks import Shots, Task

INTERRUPTED = 130
"""Exit status after an interrupt, as shells have it."""


def build_tasks(
    *,
    tasks: list[str],
    out: str,
    source: str = "hub",
    shots: list[str] | None = None,
    samples: list[int] = [100, 13, 21, 42, 87],  # noqa: B006 - read only
    sampling: Literal["crossfit", "stratified"] = "crossfit",
    apart_from: list[int] = [],  # noqa: B006 - read only
    workers: int = 4,
    overwrite: bool = False,
    lines: bool = False,
    task_file: str | None = None,
) -> int:
    """Build few-shot files in CrossFit's layout from the hub's data sets, or from your own rows.

    With the table's K and CrossFit's samples, the files are CrossFit's own, and their MD5 digests
    are compared with the published ones. A task that fails does not stop the others; what is
    finished is kept, and a second run makes the rest. The exit status is 1 if a task failed.

    Args:
        tasks: names of tasks; a set of a partition, such as mpt/cls_to_cls/target, stands for its
            tasks, and all for every task that has a source.
        out: data root to write to, with one folder per task.
        source: hub for the Hugging Face hub; or a folder, with your own rows as
            <task>/<split>.jsonl (also json, csv, tsv, parquet), or with a copy of the hub's Parquet
            files as <data set>/<config>/<split>/.
        shots: K, one or more; all takes the whole data. The table's K if left out.
        samples: numbers of the samples; each seeds a shuffle.
        sampling: crossfit, K rows per label or per set; or stratified, K rows in all, in which
            labels keep their shares.
        apart_from: samples whose train and dev rows are not drawn again, so that the new samples
            share nothing but the test rows with them.
        workers: how many tasks to download and build at a time.
        overwrite: replace files that were built with other settings, or of other rows.
        lines: the source is a folder with <task>/train.tsv, test.tsv and perhaps dev.tsv that hold
            finished lines: no header, input, tab, answers. Train and dev are drawn from the pool of
            train.tsv and dev.tsv.
        task_file: YAML file with rows for your own tasks.
    """
    from datasets import disable_progress_bars

    from prompt_lab.data.build import build_task
    from prompt_lab.data.partitions import expand_sets
    from prompt_lab.data.tasks import find_tasks, load_tasks

    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1")
    if lines and source == "hub":
        raise ValueError("lines are read from a folder: give it as source")
    if tasks == ["all"]:
        chosen = [task for task in load_tasks(task_file).values() if task.source is not None]
    else:
        chosen = find_tasks(list(dict.fromkeys(expand_sets(tasks))), task_file)
    if min(*samples, *apart_from, 0) < 0:
        raise ValueError("a number of samples or apart_from is below 0: give whole numbers from 0")
    if both := sorted({*samples} & {*apart_from}):
        raise ValueError(
            f"samples and apart_from both name {', '.join(map(str, both))}: a sample is not apart "
            "from itself"
        )
    sizes: list[Shots | None] = [None] if shots is None else [read_shots(text) for text in shots]
    _make_writable(Path(out))
    disable_progress_bars()  # one bar for the tasks; downloads keep theirs
    build = partial(
        build_task,
        out=out,
        source=source,
        samples=list(dict.fromkeys(samples)),
        sampling_law=sampling,
        apart_from=apart_from,
        overwrite=overwrite,
        has_lines=lines,
    )
    done, failed = _build_all(chosen, sizes, build, workers)
    _report(done, failed, out)
    return int(bool(failed))


def _build_all(
    tasks: Sequence[Task],
    sizes: Sequence[Shots | None],
    build: Callable[..., Built],
    workers: int,
) -> tuple[list[Built], list[str]]:
    """Build every task for every K, several tasks at a time; what was made, and what failed why."""
    from tqdm import tqdm

    done: list[Built] = []
    failed: dict[str, None] = {}

    def build_sizes(task: Task) -> str:
        for size in sizes:
            try:
                done.append(build(task, shots=size))
            except (ValueError, OSError) as error:
                text = " ".join(str(error).split())
                failed[text if text.startswith(task.name) else f"{task.name}: {text}"] = None
        return task.name

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(tasks), unit="task", disable=None) as bar,
    ):
        try:
            for job in as_completed([pool.submit(build_sizes, task) for task in tasks]):
                bar.set_postfix_str(job.result())
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print(
                f"interrupted; {len({built.task for built in done})} of {len(tasks)} tasks are "
                "finished, run the command again for the rest",
                file=sys.stderr,
            )
            os._exit(INTERRUPTED)  # threads in a download would hold the process
    return done, list(failed)


def _report(done: Sequence[Built], failed: Sequence[str], out: str) -> None:
    for built in done:
        if other := [name for name, same in built.published.items() if not same]:
            print(
                f"note: {built.task}: {len(other)} of {len(built.published)} files are not those "
                f"that CrossFit published ({other[0]} ...)"
            )
        for note in built.notes:
            print(f"note: {built.task}, K = {built.shots}: {note}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    files, fresh = sum(len(built.files) for built in done), sum(built.is_new for built in done)
    print(
        f"{len({built.task for built in done})} tasks, {files} files in {out}: {fresh} sets built "
        f"now, {len(done) - fresh} there before and kept (a set is a task and a K)"
    )
    if same := [match for built in done for match in built.published.values()]:
        print(f"{sum(same)} of {len(same)} digests that CrossFit published agree")
    if failed:
        tasks = {line.partition(":")[0] for line in failed}
        print(f"{len(tasks)} tasks failed; once that is mended, the same command makes them")


def _make_writable(out: Path) -> None:
    """Make the folder, and try it, before anything is downloaded."""
    from prompt_lab.files.tensors import write_atomically

    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable.{os.getpid()}"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}; give another out") from None


def read_shots(text: str) -> Shots:
    """K as a flag gives it; a ``ValueError`` for what is neither a number above 0 nor all."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise ValueError(f"shots has {text!r}; allowed: a whole number above 0, or all")
    return "all" if text == "all" else int(text)
