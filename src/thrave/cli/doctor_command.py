"""`thrave doctor`: checks everything that a bundle task needs, before any instance is shut down."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.options import settings_option
from thrave.cli.output import output_option, print_result, printable, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thrave.config import Settings
    from thrave.doctor.checks import Finding


@click.command(short_help="Check what a bundle task needs: database, store and host.")
@click.option(
    "--access-key-id",
    metavar="ID",
    help="Access key for the bucket checks with upload_credentials = policy. The store must know it, too.  "
    "[default: the newest key of the service]",
)
@click.option(
    "--bucket",
    metavar="NAME",
    help="Bucket for test objects; created and removed again if it does not exist.  [default: a new one]",
)
@settings_option
@output_option
def doctor(settings: Settings, access_key_id: str | None, bucket: str | None, output: str) -> None:
    """Check everything that a bundle task needs: database, store and host.

    Uses the settings of `thrave serve`, and can run at the same time. Stores objects of a few bytes under a prefix of
    their own and removes them. A check that tasks can do without has the outcome `warning` if it fails. Prints no
    secrets.

    \b
    Example:
      thrave doctor --config thrave.toml
      thrave doctor --config thrave.toml --output json | jq '.checks[] | select(.outcome == "failed")'

    Exit codes: 0 no check failed, 1 a check failed, 2 a setting is wrong.
    """
    from thrave.doctor.check_context import CheckContext
    from thrave.doctor.check_table import run_all
    from thrave.doctor.checks import Outcome

    with closing(CheckContext(settings, access_key_id=access_key_id, bucket=bucket)) as context:
        findings = run_all(context)
    print_result(output, {"checks": [_document(finding) for finding in findings]}, _text(findings))
    failed = [finding.check.name for finding in findings if finding.outcome is Outcome.FAILED]
    if failed:
        click.echo(f"thrave: failed: {', '.join(failed)}", err=True)
        sys.exit(Exit.FAILED)


def _document(finding: Finding) -> dict[str, object]:
    check = finding.check
    return {
        "area": check.area,
        "check": check.name,
        "tries": check.tries,
        "outcome": finding.outcome,
        "detail": finding.detail,
        "remedy": check.remedy if _is_wrong(finding) else None,
    }


def _text(findings: Sequence[Finding]) -> str:
    rows: list[tuple[str, ...]] = [
        (one.check.area, one.check.name, one.outcome.value, printable(one.detail)) for one in findings
    ]
    wrong = [f"{one.check.name}: {one.check.remedy}" for one in findings if _is_wrong(one)]
    shown = table(("AREA", "CHECK", "OUTCOME", "DETAIL"), rows)
    return "\n".join([shown, *(["", "What to do:", *(f"  {line}" for line in wrong)] if wrong else [])])


def _is_wrong(finding: Finding) -> bool:
    from thrave.doctor.checks import Outcome

    return finding.outcome in {Outcome.FAILED, Outcome.WARNING}
