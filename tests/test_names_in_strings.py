"""Names in strings and documents: each must exist, so that a rename cannot leave an old name.

Covers dotted names of Thrave, paths of the project's files, and the attributes that tests replace with
`monkeypatch.setattr(module, "name", ...)`. Not covered: expressions that only a run of the test can resolve.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "scripts", "benchmarks", "docs", "packaging", ".ci")
SUFFIXES = {".py", ".md", ".toml", ".service", ".conf", ".sh", ".js", ""}
FILES = sorted(
    file
    for files in [ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in FOLDERS)]
    for file in files
    if file.is_file() and file.suffix in SUFFIXES and "data" not in file.parts and not file.name.startswith(".")
    if file.name != "test_measure_code.py"  # has the source of a small package that is also named thrave
)

DOTTED = re.compile(r"(?<![\w./@-])thrave(?:\.[A-Za-z_]\w*)+")
# `thrave.toml` and the like are files, hosts or keys; importing `thrave.__main__` runs the command.
NOT_MODULES = {
    "__main__",
    "conf",
    "credentials",
    "db",
    "dev",
    "lock",
    "md",
    "qcow2",
    "rules",
    "service",
    "test",
    "toml",
}
PATH = re.compile(
    r"(?<![\w./-])(?:(?:src/thrave|tests|scripts|benchmarks|docs|packaging)/[\w./-]*\w|(?:\w+/)+test_\w+\.py)"
)
FOREIGN_PATHS = {"docs/interop/qcow2.txt", "tests/functional/ec2/test_bundle_instance.py"}  # in QEMU and in boto
MISSING = object()


def get_attribute(found: Any, attributes: list[str]) -> Any:
    """Return an attribute or submodule of a module or class, or MISSING; `attributes` are the names on the way."""
    for attribute in attributes:
        parent = found
        found = getattr(parent, attribute, MISSING)
        if found is MISSING and isinstance(parent, ModuleType):
            name = f"{parent.__name__}.{attribute}"
            if not hasattr(parent, "__path__") or find_spec(name) is None:
                return MISSING
            found = importlib.import_module(name)
        if found is MISSING:
            return MISSING
    return found


def find_strings(tree: ast.Module) -> Iterator[str]:
    """Yield each string literal; of an f-string the text before its first expression, up to the last dot."""
    in_f_strings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            in_f_strings.update(node.values)
            if isinstance(node.values[0], ast.Constant):
                yield node.values[0].value.rpartition(".")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in in_f_strings:
            yield node.value


def find_imported(tree: ast.Module) -> dict[str, tuple[str, list[str]]]:
    """Return origins of imported names, as {"retry": ("thrave", ["retry"])} for `from thrave import retry`.

    A name that is also a parameter or a variable somewhere in the file is left out.
    """
    imported: dict[str, tuple[str, list[str]]] = {}
    variables = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                module = name.name if name.asname else name.name.partition(".")[0]
                imported[name.asname or module] = module, []
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.update({name.asname or name.name: (node.module, [name.name]) for name in node.names})
        elif isinstance(node, ast.arg):
            variables.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            variables.add(node.id)
    return {name: origin for name, origin in imported.items() if name not in variables}


def find_replaced(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield module and attributes of each `monkeypatch.setattr(imported.x, "y", ...)`: ("thrave.retry", ["x", "y"])."""
    imported = find_imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="setattr" | "delattr"), args=[target, ast.Constant(value=str(name)), *_]
            ) if not any(option.arg == "raising" for option in node.keywords):
                attributes = [name]
                while isinstance(target, ast.Attribute):
                    attributes.insert(0, target.attr)
                    target = target.value
                if isinstance(target, ast.Name) and target.id in imported:
                    module, first = imported[target.id]
                    yield module, [*first, *attributes]


def is_file_or_folder(path: str) -> bool:
    """Return whether a path exists; paths of tests may begin below `tests/`."""
    return path in FOREIGN_PATHS or (ROOT / path).exists() or (ROOT / "tests" / path).exists()


def find_stale_names(text: str, *, is_python: bool) -> list[str]:
    """Return the dotted names, paths and replaced attributes in `text` that do not exist."""
    stale = [path for path in PATH.findall(text) if not is_file_or_folder(path)]
    texts = [text]
    if is_python:
        tree = ast.parse(text)
        texts = list(find_strings(tree))
        stale += [
            ".".join([module, *attributes])
            for module, attributes in find_replaced(tree)
            if module.partition(".")[0] == "thrave"
            and get_attribute(importlib.import_module(module), attributes) is MISSING
        ]
    for dotted in {name for text in texts for name in DOTTED.findall(text)}:
        first, *attributes = dotted.split(".")
        if attributes[0] not in NOT_MODULES and get_attribute(importlib.import_module(first), attributes) is MISSING:
            stale.append(dotted)
    return stale


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_each_name_in_a_string_exists(file):
    assert find_stale_names(file.read_text(), is_python=file.suffix == ".py") == []


def test_files_are_found():
    assert len(FILES) > 400


# The names are put together, so that this file has none that does not exist.
@pytest.mark.parametrize(
    ("text", "stale"),
    [
        ("NAME = 'thrave.tasks.{}'", "thrave.tasks.{}"),
        ("NAME = f'thrave.bundle.{}.{{stage}}'", "thrave.bundle.{}"),
        ("# see src/thrave/{}", "src/thrave/{}"),
        ("import thrave\nmonkeypatch.setattr(thrave, '{}', 1)", "thrave.{}"),
        ("from thrave.tasks import monitor\nmonkeypatch.setattr(monitor, '{}', 1)", "thrave.tasks.monitor.{}"),
        (
            "from thrave.tasks import monitor as m\npatch.setattr(m.structlog, '{}', 1)",
            "thrave.tasks.monitor.structlog.{}",
        ),
        ("from thrave.config import Settings\npatch.setattr(Settings, '{}', 1)", "thrave.config.Settings.{}"),
    ],
)
def test_find_stale_names_finds_name(text, stale):
    assert find_stale_names(text.format("gone"), is_python=True) == [stale.format("gone")]


@pytest.mark.parametrize(
    "text",
    [
        "'thrave.toml thrave.tasks thrave.tasks.monitor.TaskMonitor src/thrave/tasks'",
        "from thrave.tasks import monitor\nmonkeypatch.setattr(monitor, 'CHECK_TIMEOUT', 1)",
        "from thrave.tasks import monitor\nmonkeypatch.setattr(monitor, 'new', 1, raising=False)",
        "from thrave.tasks import monitor\ndef test(monitor): monkeypatch.setattr(monitor, 'new', 1)",
    ],
)
def test_find_stale_names_accepts_existing_and_unknown(text):
    assert find_stale_names(text, is_python=True) == []
