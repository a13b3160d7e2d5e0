"""ARCHITECTURE.md names only modules and definitions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "thrave"
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
NAMED = sorted(set(re.findall(r"`([a-z0-9_/]+\.py)(?:: ([A-Za-z_.]+))?`", TEXT)))


def definitions(node, prefix=""):
    """Yield names of all classes and functions below a node, qualified by their class: `Sealer.parts`."""
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_architecture_names_existing_definitions(module, name):
    path = (ROOT if module.startswith("tests/") else SOURCE) / module
    assert path.is_file()
    assert not name or name in set(definitions(ast.parse(path.read_text())))


def test_architecture_names_many_modules():
    assert len(NAMED) > 40
