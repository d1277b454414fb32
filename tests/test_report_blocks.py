"""Reports as HTML and Markdown: tokens of any script, and names with marks."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from prompt_lab.analysis.interpret_tokens import readable
from prompt_lab.analysis.report_blocks import Block, Token, as_html, as_markdown

NASTY = {
    "pipe": "a|b",
    "backtick": "`x`",
    "stars": "**bold** _it_ ~~no~~",
    "html": "<b>&amp;</b>",
    "link": "[a](http://b.c) www.d.e @f #1",
    "backslash": "\\n",
    "newline": "a\nb\r\t",
    "arabic": "تناقض",
    "hebrew": "שלום!",
    "indic": "ि",
    "han": "准确",
    "override": "a\u202eb",
    "quote": "\"'",
    "dollar": "$x$",
}


class Cells(HTMLParser):
    """Texts of the cells of all tables, and sources of all pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[str] = []
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "td":
            self.cells.append("")
        self._is_cell = self._is_cell or tag == "td"
        self.images += [value or "" for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells[-1] += data


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("is_strong", [False, True])
def test_a_token_of_any_script_is_one_cell_that_shows_it_as_it_is(name, is_strong):
    """Reference: a parser of HTML, and one of Markdown."""
    markdown_it = pytest.importorskip("markdown_it")
    shown = readable(NASTY[name], False)
    table = Block("table", header=("a", "b", "c"), rows=[["1", Token(shown, is_strong), "2"]])
    assert Cells(as_html([table], "title")).cells == ["1", shown, "2"]
    made = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = made.render(as_markdown([table]))
    cells = [cell.strip("\u2068\u2069") for cell in Cells(page).cells]
    assert cells == ["1", shown, "2"]
    assert ("<strong>" in page) == is_strong


def test_names_with_marks_stay_whole_in_markdown():
    markdown_it = pytest.importorskip("markdown_it")
    name = "tweet_eval-hate_100|x<y>*z*"
    page = markdown_it.MarkdownIt("commonmark").render(as_markdown([Block("p", name)]))
    assert page == f"<p>{name.replace('<', '&lt;').replace('>', '&gt;')}</p>\n"
