"""`thrave prune`: remove the old bundles of a series, such as the nightly bundles of one instance."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.folders import FileMissingError, WritableFolder
from thrave.cli.interrupts import clean_up_on_signals
from thrave.cli.locations import Address, writable_folder
from thrave.cli.options import Since, certificate_option, confirm_deletion, open_service, settings_option, yes_option
from thrave.cli.output import format_size, output_option, print_result, printable_lines, table
from thrave.cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from cryptography.x509 import Certificate

    from thrave.cli.bundle_series import Series, SeriesBundle, SkippedBundle
    from thrave.config import Settings

    FindTask = Callable[[str], str | None] | None
    """Returns the id of the unfinished task with a prefix in the folder; None if tasks are not checked."""


@click.command(short_help="Remove the old bundles of a series.")
@settings_option
@click.argument("address", type=Address(lambda address: (address, writable_folder(address))), metavar="FOLDER")
@click.option(
    "--name", "pattern", required=True, metavar="PATTERN",
    help="Prefixes of the bundles of the series, as in a shell: 'win-web-*'.",
)  # fmt: skip
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Keep the N newest complete bundles.  [default: 1]")
@click.option(
    "--older-than", type=Since(), metavar="AGE", help="Remove only bundles stored before this: 30d, 2026-11-01."
)
@certificate_option
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@yes_option
@output_option
@clean_up_on_signals
def prune(
    settings: Settings,
    *,
    address: tuple[str, WritableFolder],
    pattern: str,
    keep: int | None,
    older_than: datetime | None,
    certificate: Certificate | None,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Remove the old bundles of a series in FOLDER, on the disk or in a bucket (s3://BUCKET/FOLDER).

    A series is the bundles in this folder whose prefixes match --name. Give --keep, --older-than or both: a bundle is
    removed if it is not one of the N newest and, with --older-than, was stored before that time. The time of a bundle
    is that of its manifest in this folder. The newest complete bundle is never removed.

    Only a complete bundle counts or is removed: its manifest is valid, and the folder has the parts that it names, with
    the right size in total. With --certificate only bundles of this signer count. A bundle of an unfinished task is not
    removed; for this check run the command with the settings of the service. Each other bundle is reported and stays.

    If the command is interrupted, run it again to finish the removal.

    \b
    Example:
      thrave prune s3://my-bucket/nightly --name 'win-web-*' --keep 7 --older-than 30d --yes

    Exit codes: 0 done, 1 a file cannot be reached or removed, 2 wrong command line, 3 no bundle or interrupted removal
    matches, 4 access denied, 10 done, but a bundle that matches is damaged or incomplete.
    """
    from thrave.bundle.verifier import Trust
    from thrave.cli.bundle_series import Series

    if keep is None and older_than is None:
        raise click.UsageError("pass --keep, --older-than or both")
    place, folder = address
    series = Series(folder, pattern, Trust(certificate))
    if not series.prefixes and not series.interrupted:
        raise FileMissingError(f"no bundle in {place} matches {pattern!r}")
    if not dry_run:
        confirm_deletion(f"the old bundles {pattern!r} in {place} (--dry-run lists them)", yes=yes)
    with _task_check(settings, place) as find_task:
        finished, unfinished = _finish_removals(series, find_task, dry_run=dry_run)
        bundles, skipped = series.examine()
        old = [bundle for bundle in bundles[keep or 1 :] if older_than is None or bundle.stored < older_than]
        removed, in_use = _remove(series, old, find_task, dry_run=dry_run)
    skipped = [*unfinished, *skipped, *in_use]
    kept = [bundle for bundle in bundles if bundle not in removed and bundle.prefix not in {s.prefix for s in in_use}]
    document: dict[str, object] = {
        "folder": place,
        "dryRun": dry_run,
        "tasksChecked": find_task is not None,
        "removed": [_document(series, bundle) for bundle in removed],
        "kept": [_document(series, bundle) for bundle in kept],
        "skipped": [{"manifest": series.location(one.prefix), "reason": one.reason} for one in skipped],
        "finishedRemovals": [series.location(prefix) for prefix in finished],
    }
    print_result(output, document, _text(series, removed, kept, finished, dry_run=dry_run))
    for one in skipped:
        click.echo(printable_lines(f"thrave: not removed: {series.location(one.prefix)}: {one.reason}"), err=True)
    if any(one.is_damaged for one in skipped):
        sys.exit(Exit.DAMAGED)


@contextmanager
def _task_check(settings: Settings, place: str) -> Iterator[FindTask]:
    """Return a function that finds the unfinished task with a prefix in the folder; None without a service."""
    directory = settings.directory
    exists = directory.vault_key.exists() or directory.database_file.exists()
    if not exists and "data_dir" not in settings.model_fields_set:
        yield None
        return
    with open_service(settings) as components:
        records, location = components.records(), _service_location(settings, place)

        def find(prefix: str) -> str | None:
            task = location and records.in_progress_at(location[0], location[1] + prefix)
            return task.bundle_id if task else None

        yield find


def _service_location(settings: Settings, place: str) -> tuple[str, str] | None:
    """Return bucket and folder of a place in the service's store; None if it is elsewhere."""
    if settings.store == "s3":
        scheme, _, rest = place.partition("://")
        bucket, _, folder = rest.partition("/")
        return (bucket, f"{folder.strip('/')}/" if folder.strip("/") else "") if scheme == "s3" else None
    if "://" in place:
        return None
    try:
        bucket, *folders = Path(place).resolve().relative_to(settings.directory.buckets.resolve()).parts
    except ValueError:
        return None
    return bucket, "".join(f"{folder}/" for folder in folders)


def _reason_to_keep(prefix: str, find_task: FindTask) -> str | None:
    """Return why a complete bundle must not be removed; None if it may be removed. The only place for such rules."""
    task = find_task and find_task(prefix)
    return f"task {task} has not ended" if task else None


def _finish_removals(series: Series, find_task: FindTask, *, dry_run: bool) -> tuple[list[str], list[SkippedBundle]]:
    """Finish the interrupted removals; return the prefixes, and those that could not be finished."""
    from thrave.cli.bundle_series import SkippedBundle

    finished, unfinished = [], []
    for prefix in series.interrupted:
        if reason := _reason_to_keep(prefix, find_task):
            unfinished.append(SkippedBundle(prefix, reason, is_damaged=False))
        elif not dry_run and (problem := series.finish_removal(prefix)):
            unfinished.append(problem)
        else:
            finished.append(prefix)
    return finished, unfinished


def _remove(
    series: Series, old: Sequence[SeriesBundle], find_task: FindTask, *, dry_run: bool
) -> tuple[list[SeriesBundle], list[SkippedBundle]]:
    """Remove bundles, the oldest first; return them, and those that are in use."""
    from thrave.cli.bundle_series import SkippedBundle

    removed, in_use = [], []
    with nullcontext() if dry_run else progress_bar("removing", len(old)) as bar:
        for count, bundle in enumerate(reversed(old), start=1):
            problem = None
            if reason := _reason_to_keep(bundle.prefix, find_task):
                problem = SkippedBundle(bundle.prefix, reason, is_damaged=False)
            elif not dry_run:
                problem = series.remove(bundle)
            if problem is None:
                removed.append(bundle)
            else:
                in_use.append(problem)
            if bar is not None:
                bar.update(count)
    return removed, in_use


def _document(series: Series, bundle: SeriesBundle) -> dict[str, object]:
    return {
        "manifest": series.location(bundle.prefix),
        "storeTime": bundle.stored,
        "bundledSize": bundle.size,
        "parts": len(bundle.parts),
    }


def _text(
    series: Series, removed: Sequence[SeriesBundle], kept: Sequence[SeriesBundle], finished: Sequence[str],
    *, dry_run: bool,
) -> str:  # fmt: skip
    action = "would be removed" if dry_run else "removed"
    finish = "would be finished" if dry_run else "finished"
    rows: list[tuple[str, ...]] = [(finish, "", "", f"removal of {series.location(prefix)}") for prefix in finished]
    for result, bundles in ((action, removed), ("kept", kept)):
        rows += [
            (
                result,
                f"{bundle.stored:%Y-%m-%dT%H:%M:%SZ}",
                format_size(bundle.size),
                str(series.location(bundle.prefix)),
            )
            for bundle in bundles
        ]
    freed = format_size(sum(bundle.size for bundle in removed))
    return f"{table(('RESULT', 'STORED', 'SIZE', 'BUNDLE'), rows)}\n\n{action}: {len(removed)} bundles, {freed}"
