"""`--tag KEY=VALUE`: what an operator puts on an instance. EC2's limits are checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., object])


def tags_option(command: _Command) -> _Command:
    """Give a command `--tag`; its function receives `tags`, a dict."""
    return click.option(
        "--tag", "tags", multiple=True, metavar="KEY=VALUE", callback=_read,
        help="A tag, as DescribeInstances shows it and filters by it; may be given again for another key.",
    )(command)  # fmt: skip


def _read(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    from thrave.compute.instance import validate_tags

    tags: dict[str, str] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise click.BadParameter(f"{one!r} is not KEY=VALUE")
        if key in tags:
            raise click.BadParameter(f"the tag {key!r} is given twice")
        tags[key] = value
    try:
        return validate_tags(tags)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
