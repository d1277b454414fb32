"""What a report is made of: sections, numbers as text, and the one writer of reports."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.statistics import LEVEL
from prompt_lab.analysis.tables import group_rank
from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@dataclass
class Section:
    """A part of a report: a table, what its numbers are, and figures.

    ``shown`` is the table as people read it, in Markdown: ``**`` is bold, and a backslash stands
    before a mark that is meant as such (`literal`).
    """

    name: str  # of its CSV file
    title: str
    legend: str
    table: pd.DataFrame  # unrounded numbers, a row for each thing
    shown: pd.DataFrame
    figures: dict[str, Figure] = field(default_factory=dict)  # by the names of their files


# ---- numbers as text -----------------------------------------------------------------------------


def number(value: float, sign: str = "", digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:{sign}.{digits}f}"


def counted(count: float, what: str) -> str:
    """A count with its noun, ``2 tasks``."""
    return f"{count:g} {what}" + ("" if count == 1 else "s")


def literal(text: str) -> str:
    """A text that stays as it is in a table of Markdown, whatever marks it holds."""
    return re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", text)


def plus_minus(
    means: Sequence[float] | pd.Series,
    stds: Sequence[float] | pd.Series,
    digits: int = 3,
    sign: str = "",
) -> list[str]:
    """Means with their standard deviations, where these are known."""
    return [
        number(x, sign, digits) + ("" if pd.isna(x + y) else f" ± {y:.{digits}f}")
        for x, y in zip(means, stds, strict=True)
    ]


def intervals(low: pd.Series, high: pd.Series, sign: str = "", digits: int = 3) -> list[str]:
    """Both ends of intervals."""
    ends = zip(low, high, strict=True)
    texts = [[number(x, sign, digits) for x in both] for both in ends]
    return ["–" if "–" in both else " to ".join(both) for both in texts]


def p_values(values: pd.Series) -> list[str]:
    """p-values, with a star up to `LEVEL`."""
    texts = ["–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in values]
    return [f"{x} *" if p <= LEVEL else x for x, p in zip(texts, values, strict=True)]


def bold_best(texts: Sequence[str], values: pd.Series) -> list[str]:
    """The texts, those of the highest value bold; none where there is nothing to be better than."""
    known = values.dropna()
    if known.nunique() < 2:
        return [*texts]
    return [f"**{x}**" if y == known.max() else x for x, y in zip(texts, values, strict=True)]


def span(values: pd.Series) -> str:
    """The least and the most of some numbers."""
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def file_name(words: object) -> str:
    """Words as a part of a file name."""
    return "_".join(re.findall(r"\w+", str(words)))


def pages(
    stem: str, table: pd.DataFrame, value: str, looks: plots.Looks, note: str, **style: Any
) -> dict[str, Figure]:
    """Figures of dots, with as many tasks as a page takes, in order of ontology and name."""
    if not len(table):
        return {}
    ranks = {row.task: group_rank(row.ontology) for row in table.itertuples()}
    tasks = sorted(ranks, key=lambda task: (ranks[task], task))
    table = table.assign(at=table["task"].map(tasks.index)).sort_values("at", kind="stable")
    parts = table["at"] // plots.places_on_page(table["label"].nunique())
    name = stem if parts.nunique() == 1 else stem + "-{}"
    return {
        name.format(at + 1): plots.dots(part, value, looks, note, **style)
        for at, part in table.groupby(parts)
    }


# ---- files ---------------------------------------------------------------------------------------


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
