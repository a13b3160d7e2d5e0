"""Compares JSON documents of the `thrave` command with the documented fields (scripts/json_output.toml)."""

import tomllib
from pathlib import Path

TABLE = tomllib.loads((Path(__file__).parents[2] / "scripts" / "json_output.toml").read_text())
COMMANDS = TABLE["commands"]


def documented_fields(fields, path=""):
    """Yield (path, is_optional) of each documented field, with the fields of the objects that it refers to."""
    for name, meaning in fields.items():
        if name == "*":
            for reference in [meaning] if isinstance(meaning, str) else meaning:
                yield from documented_fields(TABLE["objects"][reference.removeprefix("@")], path)
        elif meaning.startswith("@"):
            yield from documented_fields(TABLE["objects"][meaning.removeprefix("@")], f"{path}{name}.")
        else:
            yield path + name.removesuffix("?"), name.endswith("?")


def printed_fields(value, path=""):
    """Yield (path, is_empty) of each value in a document; `is_empty` for null and for an empty list or object."""
    if isinstance(value, dict) and value:
        for name, member in value.items():
            yield from printed_fields(member, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for item in value:
            yield from printed_fields(item, f"{path}[]")
    else:
        yield path, value is None or value in ([], {})


def find_command(words):
    """Return the documented command that a command line begins with, or None."""
    words = [str(word) for word in words]
    return next((" ".join(words[:count]) for count in (4, 3, 2, 1) if " ".join(words[:count]) in COMMANDS), None)


def find_differences(command, document):
    """Return a line for each printed field that is not documented, and for each documented one that is missing."""
    return _differences(COMMANDS[command], document)


def find_error_differences(document):
    """Return the same for the document of an error."""
    return _differences({"error": "@error"}, document)


def _differences(fields, document):
    documented = dict(documented_fields(fields))
    printed = dict(printed_fields(document))
    empty = {path for path, is_empty in printed.items() if is_empty}
    free = tuple(path.removesuffix("{}") for path in documented if path.endswith("{}"))

    def is_below_empty(path):
        return any(path.startswith((f"{parent}.", f"{parent}[]")) for parent in empty)

    unknown = [
        path
        for path in printed
        if path not in documented
        and not (path in empty and any(known.startswith((f"{path}.", f"{path}[]")) for known in documented))
        and not path.startswith(free)
    ]
    missing = [
        path
        for path, is_optional in documented.items()
        if not is_optional and path not in printed and not is_below_empty(path) and not path.endswith("{}")
    ]
    return [f"{path}: not documented" for path in unknown] + [f"{path}: missing" for path in missing]
