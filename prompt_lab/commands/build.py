"""``prompt-lab tasks build``: make the few-shot files of many tasks, several at a time.

Tasks are downloaded and built side by side in threads, each on its own: one that fails is reported
at the end and the others are kept. A second run finds what is finished and makes the rest. How the
files of one task are made stands in `prompt_lab.data.build`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prompt_lab.data.build import Built
    from prompt_lab.data.tasks import Shots, Task

Sizes = tuple[list["Built"], list[str]]
"""The sets of a task that were built, and a line for each that failed."""

INTERRUPTED = 130
"""Exit status after an interrupt, as shells have it."""


def build_tasks(
    *,
    tasks: list[str],
    out: str,
    source: str = "hub",
    shots: list[str] | None = None,
    samples: list[str] = ["100", "13", "21", "42", "87"],  # noqa: B006 - read only
    sampling: Literal["crossfit", "stratified"] = "crossfit",
    apart_from: list[str] = [],  # noqa: B006 - read only
    workers: int = 4,
    overwrite: bool = False,
    lines: bool = False,
    task_file: str | None = None,
) -> int:
    """Build few-shot files in CrossFit's layout from the hub's data sets, or from your own rows.

    With the table's K and CrossFit's samples, the files are CrossFit's own, and their MD5 digests
    are compared with the published ones. A task that fails does not stop the others; what is
    finished is kept, and a second run makes the rest.

    Args:
        tasks: names of tasks; a set of a partition, such as mpt/cls_to_cls/target, stands for its
            tasks, and all for every task that has a source.
        out: data root to write to: one folder per task.
        source: hub for the Hugging Face hub; or a folder, with your own rows as
            <task>/<split>.jsonl (also json, csv, tsv, parquet), or with a copy of the hub's Parquet
            files as <data set>/<config>/<split>/.
        shots: K, one or more; all takes the whole data. The table's K if left out.
        samples: numbers of the samples; each seeds a shuffle.
        sampling: crossfit, K rows per label or per set; or stratified, K rows in all, in which
            labels keep their shares.
        apart_from: samples whose train and dev rows are not drawn again, so that the new samples
            share nothing but the test rows with them.
        workers: tasks to download and build at a time.
        overwrite: replace files that were built with other settings.
        lines: the source is a folder with <task>/train.tsv, test.tsv and perhaps dev.tsv that hold
            finished lines: no header, input, tab, answers. Train and dev are drawn from the pool of
            train.tsv and dev.tsv.
        task_file: YAML file with rows for your own tasks.

    Returns:
        0, or 1 if a task failed.

    Raises:
        FileNotFoundError: no such task file.
        OSError: the folder cannot be written to.
        ValueError: an unknown task, K or sample, or no worker.
    """
    from datasets import disable_progress_bars

    from prompt_lab.data.build import build_task

    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1")
    if lines and source == "hub":
        raise ValueError("lines are read from a folder: give it as source")
    chosen = _find(tasks, task_file)
    numbers = [_whole(text, "samples") for text in samples]
    seen = [_whole(text, "apart_from") for text in apart_from]
    if set(numbers) & set(seen):
        both = ", ".join(map(str, sorted(set(numbers) & set(seen))))
        raise ValueError(
            f"samples and apart_from both name {both}: a sample is not apart from itself"
        )
    sizes: list[Shots | None] = [None] if shots is None else [_shots(text) for text in shots]
    _make_writable(Path(out))
    disable_progress_bars()  # one bar for the tasks; downloads keep theirs
    build = partial(
        build_task,
        out=out,
        source=source,
        samples=list(dict.fromkeys(numbers)),
        sampling_law=sampling,
        apart_from=seen,
        overwrite=overwrite,
        has_lines=lines,
    )
    done: list[Built] = []
    failed: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_build_sizes, build, task, sizes): task.name for task in chosen}
        try:
            for job in _progress(jobs):
                built, errors = job.result()
                done += built
                failed += errors
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print(
                f"interrupted; {len(done)} of {len(jobs)} tasks are finished, run the command "
                "again for the rest",
                file=sys.stderr,
            )
            os._exit(INTERRUPTED)  # threads in a download would hold the process
    _report(done, failed, out)
    return int(bool(failed))


def _find(names: Sequence[str], task_file: str | None) -> list[Task]:
    """The tasks that the words name, each once, in their order."""
    from prompt_lab.data.partitions import expand_sets
    from prompt_lab.data.tasks import find_tasks, load_tasks

    if list(names) == ["all"]:
        return [task for task in load_tasks(task_file).values() if task.source is not None]
    return find_tasks(list(dict.fromkeys(expand_sets(names))), task_file)


def _build_sizes(build: partial[Built], task: Task, sizes: Sequence[Shots | None]) -> Sizes:
    """Build one task for every K; what was built, and why the others failed."""
    built, failed = [], []
    for size in sizes:
        try:
            built.append(build(task, shots=size))
        except (ValueError, OSError) as error:
            failed.append(_one_line(task.name, error))
    return built, list(dict.fromkeys(failed))


def _progress(jobs: dict[Future[Sizes], str]) -> Iterator[Future[Sizes]]:
    """The jobs as they finish, under a bar that names the last one."""
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="task", disable=None) as bar:
        for job in as_completed(jobs):
            bar.set_postfix_str(jobs[job])
            bar.update()
            yield job


def _report(done: Sequence[Built], failed: Sequence[str], out: str) -> None:
    """Print a line for each task that has something to say, and the sums."""
    for built in done:
        other = [name for name, same in built.published.items() if not same]
        if other:
            print(
                f"note: {built.task}: {len(other)} of {len(built.published)} files are not those "
                f"that CrossFit published ({other[0]} ...)"
            )
        for note in built.notes:
            print(f"note: {built.task}, K = {built.shots}: {note}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    files = sum(len(built.files) for built in done)
    fresh = sum(built.is_new for built in done)
    same = [match for built in done for match in built.published.values()]
    print(
        f"{len({built.task for built in done})} tasks, {files} files in {out}: {fresh} sets built "
        f"now, {len(done) - fresh} there before (a set is a task and a K)"
    )
    if same:
        print(f"{sum(same)} of {len(same)} digests that CrossFit published agree")
    if failed:
        tasks = {line.partition(":")[0] for line in failed}
        print(f"{len(tasks)} tasks failed; run the command again to try them once more")


def _one_line(task: str, error: Exception) -> str:
    """An error as one line that begins with the task."""
    text = " ".join(str(error).split())
    return text if text.startswith(task) else f"{task}: {text}"


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


def _shots(text: str) -> Shots:
    """K as a number, or "all"."""
    return "all" if text == "all" else _whole(text, "shots", "a whole number above 0, or all", 1)


def _whole(text: str, setting: str, allowed: str = "whole numbers from 0", least: int = 0) -> int:
    """A whole number from a word of the command."""
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{setting} has {text!r}; allowed: {allowed}")
    return int(text)
