"""Sizes as people write them: `256MiB`, `10 GB`, `1048576`."""

import re

import click

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


class Size(click.ParamType[int]):
    """A number of bytes with an optional unit; K, M, G, T and KiB… are powers of 1024, KB… of 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Give the bytes. Fails the command line if it is not a size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size; write 256MiB, 10GB or a number of bytes", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


def words(size: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    if size < 1024:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"
