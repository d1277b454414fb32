"""A report as blocks, written as HTML, Markdown or plain text.

Blocks are headings, paragraphs, tables and pictures. Tokens of any script stand in tables as they
are: escaped, and isolated where they are written from right to left. It knows nothing of what a
report is about. Left out: links, lists and nested tables.
"""

from __future__ import annotations

import html
import re
import string
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .2em .7em; text-align: left }
td { font-variant-numeric: tabular-nums }
bdi { white-space: pre-wrap }
small { color: #555 }
img { max-width: 100% }
"""


@dataclass(frozen=True)
class Token:
    """A token in a cell of a table.

    Attributes:
        text: the token, readable.
        is_strong: whether it is the initial one.
        score: its score, in digits; empty where there is none.
    """

    text: str
    is_strong: bool = False
    score: str = ""


@dataclass(frozen=True)
class Block:
    """A part of the report: a heading, a paragraph, a table or a picture.

    Attributes:
        kind: which of them; the number after "h" is the level of a heading.
        text: of a heading or paragraph; what a picture shows.
        header: of a table.
        rows: of a table.
        file: name of a picture.
    """

    kind: Literal["h1", "h2", "h3", "p", "table", "image"]
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | Token]] = ()
    file: str = ""


def as_html(blocks: Iterable[Block], title: str) -> str:
    """The report as one page of HTML, in UTF-8.

    Tokens are isolated, so that those written from right to left leave the rest in its order.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head>",
        "<body>",
    ]
    for block in blocks:
        if block.kind == "table":
            parts.append(_html_table(block))
        elif block.kind == "image":
            alt = html.escape(block.text)
            source = html.escape(block.file)
            parts.append(f'<p>{alt}</p>\n<p><img src="{source}" alt="{alt}"></p>')
        else:
            parts.append(f"<{block.kind}>{html.escape(block.text)}</{block.kind}>")
    return "\n".join([*parts, "</body>", "</html>", ""])


def _html_table(block: Block) -> str:
    """A table of HTML."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
    lines = ["<table>", f"<tr>{head}</tr>"]
    for row in block.rows:
        lines.append("<tr>" + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _html_cell(cell: str | Token) -> str:
    """Text or a token in a cell of HTML."""
    if isinstance(cell, str):
        return html.escape(cell)
    text = f"<bdi>{html.escape(cell.text)}</bdi>"
    text = f"<strong>{text}</strong>" if cell.is_strong else text
    return f"{text} <small>{cell.score}</small>" if cell.score else text


def as_markdown(blocks: Iterable[Block]) -> str:
    """The report as Markdown with tables (GitHub's), in UTF-8.

    All punctuation of tokens is escaped, and tokens written from right to left are isolated by
    U+2068 and U+2069.
    """
    parts = []
    for block in blocks:
        if block.kind == "table":
            parts.append(_markdown_table(block))
        elif block.kind == "image":
            parts.append(f"![{_escape(block.text)}]({block.file})")
        elif block.kind == "p":
            parts.append(_escape(block.text))
        else:
            parts.append(f"{'#' * int(block.kind[1])} {_escape(block.text)}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(block: Block) -> str:
    """A table of Markdown."""
    rows = [block.header, ["---"] * len(block.header), *block.rows]
    lines = []
    for at, row in enumerate(rows):
        cells = row if at == 1 else [_markdown_cell(cell) for cell in row]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _markdown_cell(cell: str | Token) -> str:
    """Text or a token in a cell of Markdown."""
    if isinstance(cell, str):
        return _escape(cell)
    text = re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", cell.text)
    if any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in cell.text):
        text = f"\u2068{text}\u2069"
    text = f"**{text}**" if cell.is_strong else text
    return f"{text} {cell.score}" if cell.score else text


def _escape(text: str) -> str:
    """Names and sentences that Markdown shows as they are."""
    return re.sub(r"[\\|`*_<>\[\]&~$#]", r"\\\g<0>", text)


def as_text(blocks: Iterable[Block]) -> str:
    """Headings, paragraphs and tables without tokens as plain text for a terminal."""
    parts = []
    for block in blocks:
        if block.kind == "table":
            rows = [block.header, *block.rows]
            widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
            padded = ((str(c).ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
            parts.append("\n".join("  ".join(row).rstrip() for row in padded))
        else:
            parts.append(textwrap.fill(block.text, 100))
    return "\n\n".join(parts) + "\n"
