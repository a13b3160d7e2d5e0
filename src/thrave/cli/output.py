"""Output of the commands: text for people, or one JSON document for programs; formats of sizes, times and tables.

JSON goes to stdout with EC2's names in camelCase (`accountId`, `instanceId`). It is stable: members are only added,
so a reader must ignore unknown ones. Nothing else goes to stdout; progress and errors go to stderr. Names, tags,
manifests and messages of libraries may come from an attacker, so every unprintable character (control characters,
bidirectional overrides, lone surrogates) is escaped here, in text and in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from thrave.bundle.manifest import Manifest
    from thrave.bundle.verifier import VerifyResult
    from thrave.compute.instance import Instance
    from thrave.identity.accounts import AccessKey


_LABELS = {
    "accountId": "Account",
    "name": "Name",
    "userName": "User",
    "accessKeyId": "Access key",
    "secretAccessKey": "Secret access key",
    "certificateFile": "Certificate",
    "privateKeyFile": "Private key",
}


def key_document(key: AccessKey) -> dict[str, str]:
    """JSON of a new access key with its secret, which is not shown again."""
    return {"accessKeyId": key.access_key_id, "secretAccessKey": key.secret_access_key}


def key_documents(keys: Sequence[AccessKey]) -> list[dict[str, object]]:
    """JSON of access keys without their secrets."""
    return [{"accessKeyId": key.access_key_id, "status": key.status, "createDate": key.create_date} for key in keys]


def key_ids(keys: Sequence[AccessKey]) -> str:
    """Ids of access keys, for a cell of a table."""
    return " ".join(key.access_key_id for key in keys)


def print_new_secret(output: str, document: Mapping[str, str]) -> None:
    """Print a document that contains a new secret access key."""
    lines = [f"{label + ':':<20}{document[name]}" for name, label in _LABELS.items() if name in document]
    print_result(output, {**document}, "\n".join([*lines, "", "The secret access key is not shown again."]))


Json = dict[str, object] | list[object]
_Command = TypeVar("_Command", bound=Callable[..., object])


def output_option(command: _Command) -> _Command:
    """Add `--output json|text` to a command; its function receives `output`, the first argument of `print_result`."""
    return click.option(
        "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
        help="Text for people, or JSON for programs.",
    )(command)  # fmt: skip


def print_result(output: str, document: Json, text: str, *, err: bool = False) -> None:
    """Print the result of a command on stdout.

    Args:
        output: `json` or `text`, from `output_option`.
        document: The result as JSON; datetimes are written as ISO 8601, paths as text.
        text: The result for people, without a final newline.
        err: Print on stderr, because the command writes data to stdout.
    """
    if output == "json":
        document_text = json.dumps(document, indent=2, default=_plain, ensure_ascii=False)
        click.echo(escape_json(document_text), err=err)
    else:
        click.echo(printable_lines(text), err=err)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Format rows as columns, each as wide as its widest cell."""
    header, *rows = (tuple(map(printable, row)) for row in [header, *rows])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Escape characters that a terminal could interpret, and line ends."""
    return printable_lines(text).replace("\n", "\\u000a")


def printable_lines(text: str) -> str:
    """Escape characters that a terminal could interpret, but keep line ends."""
    return _escaped(text, lambda letter: f"\\u{ord(letter):04x}" if letter < "\U00010000" else f"\\U{ord(letter):08x}")


def escape_json(text: str) -> str:
    """Escape the same characters in a JSON document, which stays the same document."""
    return _escaped(text, _json_escape)


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    return "".join(letter if letter.isprintable() or letter == "\n" else escape(letter) for letter in text)


def _json_escape(letter: str) -> str:
    return json.dumps(letter)[1:-1] if letter != "\x7f" else "\\u007f"


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return str(value)


def print_instance(instance: Instance, output: str, warnings: Sequence[str] = ()) -> None:
    """Print an instance: its id and state as text, or everything but its commands as JSON.

    Warnings go to stderr. With `--output json` they are a member of the document instead.
    """
    from thrave.compute.description_files import to_document

    result = to_document(instance) | ({"warnings": [*warnings]} if warnings else {})
    print_result(output, result, f"{instance.instance_id} {instance.state}")
    if output == "text":
        from thrave.cli.error_output import print_warning

        for warning in warnings:
            print_warning(f"{warning}.")


SIZE_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def format_size(size: int) -> str:
    """Format a number of bytes, in powers of 1024."""
    if size < 1024:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def manifest_document(manifest: Manifest) -> dict[str, object]:
    """The content of a manifest as JSON."""
    return {
        "name": manifest.name,
        "accountId": manifest.user,
        "type": manifest.type,
        "architecture": manifest.architecture,
        "version": manifest.version,
        "bundler": str(manifest.bundler),
        "size": manifest.size,
        "bundledSize": manifest.bundled_size,
        "digest": manifest.digest,
        "signed": manifest.is_signed,
        "kernelId": manifest.kernel_id,
        "ramdiskId": manifest.ramdisk_id,
        "productCodes": list(manifest.product_codes),
        "ancestry": list(manifest.ancestry),
        "blockDevices": [{"virtual": virtual, "device": device} for virtual, device in manifest.block_devices],
        "parts": [{"index": part.index, "filename": part.filename, "sha1": part.sha1} for part in manifest.parts],
    }


def manifest_text(manifest: Manifest) -> str:
    """The content of a manifest as a table, without the keys and with at most 20 parts."""
    document = manifest_document(manifest)
    rows: list[tuple[str, ...]]
    rows = [
        (name, printable(str(value)))
        for name, value in document.items()
        if value is not None and not isinstance(value, list)
    ]
    rows += [("productCodes", printable(code)) for code in manifest.product_codes]
    rows += [("ancestry", printable(ami)) for ami in manifest.ancestry]
    rows += [("blockDevice", printable(f"{virtual} = {device}")) for virtual, device in manifest.block_devices]
    rows += [(f"part {part.index}", f"{printable(part.filename)}  SHA-1 {part.sha1}") for part in manifest.parts[:20]]
    if len(manifest.parts) > 20:
        rows.append(("…", f"and {len(manifest.parts) - 20} more parts (--output json lists all)"))
    return table(("FIELD", "VALUE (not verified)"), rows)


def verified_document(verified: VerifyResult) -> dict[str, object]:
    """The results of all checks and the manifest, as JSON."""
    checks = [{"subject": check.subject, "checked": check.checked, "detail": check.detail} for check in verified.checks]
    return {"checks": checks, **manifest_document(verified.manifest)}


def verified_text(verified: VerifyResult) -> str:
    """The results of all checks as a table."""
    result: Mapping[bool, str] = {True: "ok", False: "NOT CHECKED"}
    rows: list[tuple[str, ...]] = [(check.subject, result[check.checked], check.detail) for check in verified.checks]
    return table(("CHECK", "RESULT", "DETAIL"), rows)


TIME_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def format_duration(time: timedelta) -> str:
    """Format a duration: `0.4 s`, `42 s`, `7 min`, `3.5 h`, `12 d`."""
    seconds = max(time.total_seconds(), 0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"
