"""A folder of the package is a layer: imports inside it point only downward.

``LAYERS`` is the picture of the package; a module may import its own folder and those before it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import prompt_lab

ROOT = Path(prompt_lab.__file__).parent
LAYERS = ("sandbox", "core", "files", "data", "methods", "analysis", "commands", "__main__")
HEAVY = {
    "core": ("lightning", "pytorch_lightning", "datasets", "pandas"),
    "files": ("lightning", "pytorch_lightning", "datasets", "transformers"),
    "analysis": ("lightning", "pytorch_lightning", "datasets", "transformers"),
}
"""What the modules of a folder import, if at all, inside the functions that use it."""

Import = tuple[str, int, bool]
"""Full name of an imported module, line, and whether it is imported when the file is loaded."""


def modules() -> dict[str, Path]:
    """Every module of the package but its lazy ``__init__``, by its name below the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> list[Import]:
    """All imports of a file but those for type checkers only, at whatever depth."""
    package = ["prompt_lab", *path.relative_to(ROOT).parts[:-1]]
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), package, True))


def _walk(node: ast.AST, package: list[str], at_load: bool) -> Iterator[Import]:
    """Imports below a node of the syntax tree of a module of ``package``."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children: list[ast.AST] = [*node.orelse]
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, at_load) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        yield from ((name, node.lineno, at_load) for name in _sources(source, node.names))
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in children:
        yield from _walk(child, package, at_load and not inside)


def _sources(source: str, names: list[ast.alias]) -> list[str]:
    """The modules that ``from source import names`` reads: submodules where names are such."""
    if source != "prompt_lab":
        return [source]
    found = [prompt_lab._PUBLIC.get(alias.name, f"{source}.{alias.name}") for alias in names]
    return [name for name in found if name != "prompt_lab.__version__"]


def layer(name: str) -> int:
    """Layer of a module by its name below the package; a folder that is none is an error."""
    return LAYERS.index(name.split(".")[0])


def test_imports_point_only_downward() -> None:
    wrong = [
        f"{path}:{line}: {name} imports {source}"
        for name, path in modules().items()
        for source, line, _ in imports(path)
        if source.startswith("prompt_lab.")
        and layer(source.removeprefix("prompt_lab.")) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_lower_layers_load_no_heavy_library() -> None:
    wrong = [
        f"{path}:{line}: imports {source} at module level"
        for name, path in modules().items()
        for source, line, at_load in imports(path)
        if at_load and source.split(".")[0] in HEAVY.get(name.split(".")[0], ())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_every_form_of_import() -> None:
    """Guards the tests above: absolute, from, relative, inside functions; not for typing."""
    text = """
import prompt_lab.commands.fit
from prompt_lab import Backbone, __version__
from ..d import e
def f():
    import transformers
if TYPE_CHECKING:
    import hidden
"""
    found = [(name, load) for name, _, load in _walk(ast.parse(text), ["prompt_lab", "data"], True)]
    assert found == [
        *(("prompt_lab.commands.fit", True), ("prompt_lab.core.backbone", True)),
        *(("prompt_lab.d", True), ("transformers", False)),
    ]


def test_whatever_is_public_has_a_docstring_of_its_own_or_of_what_it_overrides():
    """A hook is explained once, by the parent or by Lightning; ruff would ask for it each time."""
    bare = []
    for name in modules():
        module = importlib.import_module(f"prompt_lab.{name}")
        own = [v for k, v in vars(module).items() if k[0] != "_"]
        own = [v for v in own if getattr(v, "__module__", "") == module.__name__]
        for made in filter(inspect.isclass, own):
            bare += [
                f"{made.__qualname__}.{key}"
                for key, value in vars(made).items()
                if key[0] != "_"
                and (inspect.isfunction(value) or isinstance(value, (property, classmethod)))
                and not inspect.getdoc(getattr(made, key))
            ]
        bare += [v.__qualname__ for v in own if callable(v) and not inspect.getdoc(v)]
    assert not bare
