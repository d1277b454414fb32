"""The command ``prompt-lab report``: tables and figures of the results of tests."""

from __future__ import annotations

from pathlib import Path


def report_command(
    results: list[str],
    *,
    out: str,
    reference: list[str] | None = None,
    partition: str | None = None,
) -> list[Path]:
    """Compare fits: one report with tables and figures, from their results.csv files.

    A line of the tables is a folder of yours, plain=runs/plain; without a name it has that of the
    folder. Within a line learning rates and batch sizes are chosen by dev, seeds and samples are
    averaged; K, intrinsic dimension and start are axes. Anything else that differs within a line
    stops the report. Writes report.md, report.html, a CSV file for each table, and figures as PNG
    and SVG.

    Args:
        results: folders of fits, or folders of such, as NAME=FOLDER or FOLDER.
        out: folder for the report.
        reference: names of lines to compare with: E_rel, relative gains, and tests (against the
            first; without a reference, tests are of the two lines that dev puts first).
        partition: name of a partition, such as ipt/random, for means over its sets.

    Raises:
        FileNotFoundError, ValueError, NotADirectoryError: what lacks or is wrong, in a sentence.
    """
    from prompt_lab.analysis.report import make_report
    from prompt_lab.analysis.sections import check_folder, markdown, write_report
    from prompt_lab.analysis.tables import read_lines
    from prompt_lab.data.partitions import partition as find_partition

    folder = check_folder(out)
    sets = None
    if partition is not None:
        found = find_partition(partition)
        sets = {name: getattr(found, name) for name in ("source", "dev", "target")}
    sections = make_report(read_lines(_places(results)), reference or (), sets)
    files = write_report(sections, folder)
    for section in sections[:2]:
        print(f"{section.title}\n\n{markdown(section.shown)}\n")
    return files


def _places(words: list[str]) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for word in words:
        name, sign, folder = word.partition("=")
        if not sign or Path(word).exists():
            path = Path(word)
            name, folder = (path.parent if path.is_file() else path).resolve().name, word
        if name in places:
            raise ValueError(
                f"two lines are named {name} ({places[name]}, {folder}): give names, as in "
                f"one={places[name]} other={folder}"
            )
        places[name] = Path(folder)
    return places
