"""A report of results: its sections, and the one writer of ``report.md`` and ``report.html``."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.curves import adaptation_section, codes_section
from prompt_lab.analysis.sections import (
    Section,
    dimension_sections,
    gains_section,
    lines_section,
    scores_section,
    sets_sections,
    task_section,
    tests_section,
)
from prompt_lab.analysis.tables import SUMS, relate, task_scores
from prompt_lab.analysis.vectors import vector_sections
from prompt_lab.files.tensors import write_atomically

_HTML = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 1.5px solid #555 }
td { font-variant-numeric: tabular-nums }
p { max-width: 50em; color: #444 }
img { max-width: 100%; display: block; margin: 1em 0 }
</style></head><body>
<h1>TITLE</h1>"""


def make_report(
    runs: pd.DataFrame,
    references: Sequence[str] = (),
    partition: Mapping[str, Iterable[str]] | None = None,
) -> list[Section]:
    """All sections that the runs, as `tables.read_lines` gives them, have something for.

    ``references`` are lines to compare with; tests of each task are against the first.
    ``partition`` has tasks by the name of their set.

    Raises:
        ValueError: a reference that is no line, or is several on one task; a K that is none.
    """
    known = runs["line"].unique()
    if missing := [name for name in references if name not in known]:
        raise ValueError(f"no reference {missing[0]!r} among the lines {', '.join(known)}")
    compared = runs[~runs["variant"].isin(SUMS)]
    scores = task_scores(compared)
    ratios = [relate(scores, name) for name in references]
    sets = {"ontology": scores["ontology"].str.split("/").str[0]}
    if partition is not None:
        names = {task: name for name, tasks in partition.items() for task in tasks}
        sets["partition"] = scores["task"].map(names).fillna("in no set")
    sections = [lines_section(runs), scores_section(compared, scores)]
    sections += [gains_section(compared, table) for table in ratios]
    for kind, of_kind in sets.items():
        if of_kind.nunique() > 1 or kind == "partition":
            sections += sets_sections(kind, scores, of_kind, ratios)
    sections += dimension_sections(scores, ratios)
    sections += [*task_section(compared), *tests_section(compared, references[:1])]
    sections += [*adaptation_section(compared), *codes_section(compared)]
    return [*sections, *vector_sections(runs)]


def check_folder(out: str) -> Path:
    """The folder of a report; a ``NotADirectoryError`` where it is a file."""
    if Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"--out {out} is a file: name a folder")
    return Path(out)


def write_report(sections: Sequence[Section], folder: Path, title: str = "Results") -> list[Path]:
    """Write ``report.md`` and ``report.html``, which it returns, and the tables and figures."""
    text, page = [f"# {title}"], [_HTML.replace("TITLE", html.escape(title))]
    for section in sections:
        table = section.table.to_csv(index=False, lineterminator="\n")
        write_atomically(folder / f"{section.name}.csv", table.encode())
        text += [f"## {section.title}", section.legend, markdown(section.shown)]
        page += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.legend)}</p>"]
        page.append(_html_table(section.shown))
        for name, figure in section.figures.items():
            plots.save_figure(figure, folder / name)
            text.append(f"![{name}]({name}.png)")
            width = round(110 * figure.get_size_inches()[0])
            page.append(f'<img src="{name}.png" alt="{name}" width="{width}">')
    reports = {"report.md": "\n\n".join(text), "report.html": "\n".join([*page, "</body></html>"])}
    for name, content in reports.items():
        write_atomically(folder / name, f"{content}\n".encode())
    return [folder / name for name in reports]


def markdown(shown: pd.DataFrame) -> str:
    """A table of text in GitHub's Markdown, aligned as plain text too."""
    cells = shown.astype(str).map(_whole).rename(columns=_whole)
    return cells.to_markdown(index=False, disable_numparse=True)


def _whole(cell: str) -> str:
    return re.sub(r"(\\.)|\|", lambda found: found[1] or r"\|", cell)


def _html_table(shown: pd.DataFrame) -> str:
    cells = shown.astype(str).map(html.escape).rename(columns=html.escape)
    cells = cells.map(lambda cell: re.sub(r"\*\*((?:\\.|[^\\])+?)\*\*", r"<b>\1</b>", cell))
    cells = cells.map(lambda cell: re.sub(r"\\([^\w\s]|_)", r"\1", cell))
    return cells.to_html(index=False, escape=False, border=0)
