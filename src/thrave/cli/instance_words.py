"""How an instance is shown after something was done with it: in a line, or as EC2's document of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thrave.cli.output import emit

if TYPE_CHECKING:
    from thrave.compute.instance import Instance


def show(shown: Instance, output: str) -> None:
    """Print an instance: its id and state, or all of it but its commands."""
    from thrave.compute.descriptions import document

    emit(output, document(shown), f"{shown.instance_id} {shown.state}")
