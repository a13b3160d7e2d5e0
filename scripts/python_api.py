"""Writes docs/reference/python-api.md from signatures and docstrings in the source, for make_docs.py."""

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import thrave.bundle
import thrave.pytest_plugin
import thrave.testing

PAGE = """\
# Python API

Stable: within a major version no name on this page is removed or renamed, and no parameter becomes required. All other
modules of the package are private and can change.

| module | use |
| --- | --- |
| [`thrave.bundle`](#thravebundle) | seal disk images into bundles; verify and open bundles |
| [`thrave.testing`](#thravetesting) | run a real service in the tests of other projects |
| [pytest fixtures](#pytest-fixtures) | the same; a test gets a fixture as a parameter of this name |

"""
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\n((?:    .*\n|\n)+)", re.MULTILINE)


class Definition(NamedTuple):
    """A class, function or assignment in a source file."""

    node: ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign
    docstring: str


def find_definitions(body: list[ast.stmt]) -> Iterator[tuple[str, Definition]]:
    """Yield name and definition of each class, function and assigned name in the body of a module or class.

    The docstring of an assignment is the string that follows it.
    """
    for number, node in enumerate(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, Definition(node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            following = body[number + 1] if number + 1 < len(body) else None
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docstring = inspect.cleandoc(text)
                case _:
                    docstring = ""
            if isinstance(target, ast.Name):
                yield target.id, Definition(node, docstring)


def to_markdown(docstring: str) -> str:
    """Convert a Google docstring: sections become lists, `::` blocks become code blocks."""

    def section(match: re.Match[str]) -> str:
        if match[1] in {"Returns", "Yields"}:
            return f"{match[1]}: {' '.join(match[2].split())}\n\n"
        return f"{match[1]}:\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in _items(match[2])) + "\n\n"

    return SECTION.sub(section, docstring + "\n").replace("::\n", ":\n").rstrip()


def signature(function: ast.FunctionDef, name: str, *, skip_first: bool) -> str:
    """Return a function's signature as source code, with one parameter in a line if it is long."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults += arguments.defaults
    pairs = [*zip(positional, defaults, strict=True)][1 if skip_first else 0 :]
    parameters = [_parameter(argument, default) for argument, default in pairs]
    if arguments.vararg or arguments.kwonlyargs:
        parameters.append(f"*{_parameter(arguments.vararg, None) if arguments.vararg else ''}")
    parameters += map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        parameters.append(f"**{_parameter(arguments.kwarg, None)}")
    result = "" if function.returns is None or function.name == "__init__" else f" -> {ast.unparse(function.returns)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg if argument.annotation is None else f"{argument.arg}: {ast.unparse(argument.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def code(text: str) -> str:
    """Return a block of Python code in Markdown, with the formatter's quotes."""
    quoted = re.sub(r"'([^'\"]*)'", r'"\1"', text)
    return f"```python\n{quoted}\n```\n\n"


def describe_function(name: str, definition: Definition, *, is_method: bool = False) -> str:
    """Describe a function or method: signature and docstring."""
    node = definition.node
    assert isinstance(node, ast.FunctionDef)
    is_static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    skip_first = is_method and not is_static
    return code(signature(node, name, skip_first=skip_first)) + to_markdown(definition.docstring) + "\n\n"


def describe_class(name: str, definition: Definition) -> str:
    """Describe a class: constructor, docstring, attributes with their types, and public methods."""
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    members = dict(find_definitions(node.body))
    text = ""
    if (init := members.get("__init__")) is not None:
        text += describe_function(name, Definition(init.node, ""), is_method=True)
    docstring, comments = _split_attributes(definition.docstring)
    text += to_markdown(docstring) + "\n\n"
    if init is not None and init.docstring:
        text += to_markdown(init.docstring) + "\n\n"
    bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in {"NamedTuple", "Protocol"}]
    if bases:
        text += f"Base class: {', '.join(f'`{base}`' for base in bases)}.\n\n"
    attributes, methods = [], ""
    for member, found in members.items():
        if member.startswith("_"):
            continue
        comment = comments.get(member) or " ".join(found.docstring.split())
        match found.node:
            case ast.AnnAssign(annotation=annotation):
                attributes.append((f"{member}: {ast.unparse(annotation)}", comment))
            case ast.Assign(value=value):
                attributes.append((f"{member} = {ast.unparse(value)}", comment))
            case ast.FunctionDef(decorator_list=marks, returns=ast.expr() as returns) if {"property"} & {
                *map(ast.unparse, marks)
            }:
                attributes.append((f"{member}: {ast.unparse(returns)}", comment))
            case ast.FunctionDef():
                methods += describe_function(f"{name}.{member}", found, is_method=True)
    lines = [f"- `{attribute}`" + (f": {comment}" if comment else "") for attribute, comment in attributes]
    return text + ("\n".join(lines) + "\n\n" if lines else "") + methods


def _split_attributes(docstring: str) -> tuple[str, dict[str, str]]:
    """Return a docstring without its section of attributes, and the texts of this section."""
    match = next((match for match in SECTION.finditer(docstring + "\n") if match[1] == "Attributes"), None)
    if match is None:
        return docstring, {}
    return docstring.replace(match[0].rstrip(), ""), dict(_items(match[2]))


def _items(section: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each `name: text` in a section; other lines continue the text before them."""
    lines = inspect.cleandoc(section).split("\n")
    starts = [number for number, line in enumerate(lines) if re.match(r"\*{0,2}[\w.]+: ", line)]
    for start, end in pairwise([*starts, len(lines)]):
        name, _, text = " ".join(" ".join(lines[start:end]).split()).partition(": ")
        yield name, text


def describe(name: str, definition: Definition) -> str:
    """Describe one public name under a heading."""
    node = definition.node
    if isinstance(node, ast.FunctionDef):
        text = describe_function(name, definition)
    elif isinstance(node, ast.ClassDef):
        text = describe_class(name, definition)
    else:
        assert node.value is not None
        text = code(f"{name} = {ast.unparse(node.value)}") + to_markdown(definition.docstring) + "\n\n"
    return f"### {name}\n\n{text.rstrip()}\n\n"


def exceptions_table(definitions: dict[str, Definition]) -> str:
    """Return the table of exceptions with their base classes."""
    rows = ["### Exceptions\n", "| exception | base class | meaning |", "| --- | --- | --- |"]
    for name, definition in definitions.items():
        assert isinstance(definition.node, ast.ClassDef)
        bases = ", ".join(f"`{ast.unparse(base)}`" for base in definition.node.bases)
        rows.append(f"| `{name}` | {bases} | {' '.join(definition.docstring.split())} |")
    return "\n".join(rows) + "\n\n"


def describe_module(title: str, docstring: str, names: list[str], files: list[Path]) -> str:
    """Describe the public names of a module, which are defined in `files`: functions first, exceptions last."""
    found: dict[str, Definition] = {}
    for file in files:
        found.update(find_definitions(ast.parse(file.read_text()).body))
    public = {name: found[name] for name in names}
    functions = {name: item for name, item in public.items() if isinstance(item.node, ast.FunctionDef)}
    exceptions = {
        name: item for name, item in public.items() if isinstance(item.node, ast.ClassDef) and name.endswith("Error")
    }
    others = {name: item for name, item in public.items() if name not in {*functions, *exceptions}}
    page = f"## {title}\n\n{to_markdown(docstring)}\n\n"
    page += "".join(describe(name, item) for name, item in {**functions, **others}.items())
    return page + (exceptions_table(exceptions) if exceptions else "")


def python_api() -> str:
    """Return the page of the Python API."""
    folder = Path(thrave.bundle.__file__).parent
    bundle_files = [folder / f"{module}.py" for module in thrave.bundle._MODULES]  # noqa: SLF001 (where the names are defined)
    testing_files = sorted(Path(thrave.testing.__file__).parent.glob("*.py"))
    plugin = Path(thrave.pytest_plugin.__file__)
    fixtures = [
        name
        for name, item in find_definitions(ast.parse(plugin.read_text()).body)
        if isinstance(item.node, ast.FunctionDef)
        and any(ast.unparse(mark).startswith("pytest.fixture") for mark in item.node.decorator_list)
    ]
    return (
        PAGE
        + describe_module(
            "thrave.bundle", inspect.getdoc(thrave.bundle) or "", list(thrave.bundle.__all__), bundle_files
        )
        + describe_module("thrave.testing", inspect.getdoc(thrave.testing) or "", thrave.testing.__all__, testing_files)
        + describe_module("pytest fixtures", inspect.getdoc(thrave.pytest_plugin) or "", fixtures, [plugin])
    )
