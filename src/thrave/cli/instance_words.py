"""How an instance is shown after something was done with it: in a line, or as EC2's document of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thrave.cli.output import emit, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thrave.compute.instance import Instance


def show(shown: Instance, output: str, warnings: Sequence[str] = ()) -> None:
    """Print an instance: its id and state, or all of it but its commands.

    Warnings go to stderr; with `--output json` they are a member of the document, so that both streams stay readable.
    """
    from thrave.compute.description_files import document

    said = document(shown) | ({"warnings": [*warnings]} if warnings else {})
    emit(output, said, f"{shown.instance_id} {shown.state}")
    if output == "text":
        for warning in warnings:
            click.echo(printable_lines(f"Warning: {warning}."), err=True)
