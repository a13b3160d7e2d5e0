"""`thrave task`: the bundle tasks of all accounts, for the operator, whether the service runs or not.

The commands read the service's database. Only `cancel` changes it, by the rules of CancelBundleTask.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from thrave.cli.error_output import ErrorReport, print_error
from thrave.cli.exit_codes import Exit, exit_code, remedy_of
from thrave.cli.identifiers import complete_id, find_account, find_task_id
from thrave.cli.options import Since, open_accounts, open_service, settings_option
from thrave.cli.output import output_option, print_result
from thrave.tasks.models import UNFINISHED, BundleTaskState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from thrave.config import Settings
    from thrave.tasks.queries import TaskQueries, TaskReport
    from thrave.tasks.repository import TaskRepository

_DEFAULT_LIMIT = 100
_MAX_WATCHED = 1000
_STATE = click.Choice([state.value for state in BundleTaskState])


@click.group()
def task() -> None:
    """Show and cancel the bundle tasks of all accounts.

    \b
    Example:
      thrave task list --state failed --since 2d
      thrave task show bun-0123456789abcdef0
    """


@task.command("list")
@click.option("--state", "states", type=_STATE, multiple=True, help="Tasks in this state. Repeatable.")
@click.option("--unfinished", is_flag=True, help="Tasks in any state but complete and failed.")
@click.option("--account", metavar="ACCOUNT", help="Tasks of this account: its id or name, or the start of its id.")
@click.option("--instance", "instance_id", metavar="i-…", help="Tasks of this instance: its id, or the start of it.")
@click.option("--host-id", metavar="ID", help="Tasks of this host.")
@click.option(
    "--since", type=Since(), metavar="TIME", help="Tasks requested since this time: 2h, 3d or 2026-11-23T19:00Z."
)
@click.option(
    "--limit", type=click.IntRange(1, 10000), default=_DEFAULT_LIMIT, show_default=True, help="Number of newest tasks."
)
@settings_option
@output_option
def list_(
    settings: Settings,
    *,
    states: tuple[str, ...],
    unfinished: bool,
    account: str | None,
    instance_id: str | None,
    host_id: str | None,
    since: datetime | None,
    limit: int,
    output: str,
) -> None:
    """List tasks, the newest last.

    \b
    Example:
      thrave task list
      thrave task list --unfinished --host-id kvm-17 --output json
    """
    from thrave.cli.task_output import task_document, task_table
    from thrave.tasks.queries import TaskFilter

    if account is not None:
        with open_accounts(settings) as accounts:
            account = find_account(accounts, account).account_id
    wanted = TaskFilter(
        states=frozenset(map(BundleTaskState, states)) | (UNFINISHED if unfinished else frozenset()),
        account_id=account,
        host=host_id,
        since=since,
    )
    with _open_queries(settings) as (queries, records):
        if instance_id is not None:
            wanted = replace(wanted, instance_id=_find_instance(queries, instance_id))
        found, now = queries.latest(wanted, limit=limit + 1), records.now()
    shown, more = found[-limit:], len(found) > limit
    print_result(output, {"tasks": [task_document(report) for report in shown], "more": more}, task_table(shown, now))
    if more:
        click.echo(f"Only the newest {limit} tasks are shown; see --limit.", err=True)


@task.command()
@click.argument("bundle_id", metavar="TASK_ID")
@settings_option
@output_option
def show(settings: Settings, bundle_id: str, output: str) -> None:
    """Show everything about the task with the id TASK_ID, or with an id that starts so.

    States with their times, stored parts, rate and runs. For a failed task also the reason, what to do, and objects
    that could not be removed from the bucket.

    \b
    Example:
      thrave task show bun-0123456789abcdef0

    Exit codes: 0 shown, however the task ended, 3 unknown task.
    """
    from thrave.cli.task_output import TaskDetails, details_document, details_text

    with _open_queries(settings) as (queries, records):
        bundle_id = find_task_id(queries, bundle_id)
        (report,) = queries.of([bundle_id])
        details = TaskDetails(report, records.history(bundle_id), records.now())
    print_result(output, details_document(details), details_text(details))


@task.command(short_help="Watch tasks until they end.")
@click.argument("bundle_ids", metavar="[TASK_ID]...", nargs=-1)
@settings_option
@output_option
def watch(settings: Settings, bundle_ids: tuple[str, ...], output: str) -> None:
    """Watch tasks until they end: those with the ids TASK_ID, or all unfinished tasks.

    Progress goes to stderr: bars on a terminal, otherwise a line for each change of state and each 10 %. The results
    are printed at the end. Ctrl-C ends the watch, not the tasks.

    \b
    Example:
      thrave task watch bun-0123456789abcdef0 && echo done

    Exit codes: 0 all are complete, 3 unknown task, 20 one failed, 21 none failed but one was cancelled.
    """
    from thrave.cli.task_output import task_document, task_table, watch_tasks

    with _open_queries(settings) as (queries, records):
        watched = [find_task_id(queries, one) for one in bundle_ids] or _unfinished(queries)
        if not watched:
            click.echo("There are no unfinished tasks to watch.", err=True)
        ended, now = watch_tasks(queries, watched), records.now()
    print_result(output, {"tasks": [task_document(report) for report in ended]}, task_table(ended, now))
    sys.exit(_worst_exit(ended))


@task.command(short_help="Cancel tasks, as CancelBundleTask does for their owners.")
@click.argument("bundle_ids", metavar="TASK_ID...", nargs=-1, required=True)
@settings_option
@output_option
def cancel(settings: Settings, bundle_ids: tuple[str, ...], output: str) -> None:
    """Cancel the tasks with the ids TASK_ID, as CancelBundleTask does for their owners.

    The host deletes the stored objects and starts the instance again. The task then ends as failed, with
    Client.Cancelled. A task that has not begun ends at once.

    \b
    Example:
      thrave task cancel bun-0123456789abcdef0

    Exit codes: 0 all are being cancelled, 3 unknown task, 4 a task has ended or is already being cancelled. The other
    tasks are cancelled anyway.
    """
    from thrave.cli.task_output import task_document
    from thrave.tasks.errors import BundleTaskError

    cancelled, codes = [], []
    with _open_queries(settings) as (queries, records):
        for bundle_id in [find_task_id(queries, one) for one in bundle_ids]:
            try:
                cancelled.append(_cancel(queries, records, bundle_id))
            except BundleTaskError as error:
                code = exit_code(error) or Exit.FAILED
                report = ErrorReport(code, f"{bundle_id}: {error}", remedy_of(error))
                print_error(report, as_json=output == "json")
                codes.append(code)
    text = "\n".join(f"{report.task.bundle_id} {report.task.state}" for report in cancelled)
    print_result(output, {"tasks": [task_document(report) for report in cancelled]}, text)
    sys.exit(codes[0] if codes else Exit.OK)


@contextmanager
def _open_queries(settings: Settings) -> Iterator[tuple[TaskQueries, TaskRepository]]:
    from thrave.tasks.queries import TaskQueries

    with open_service(settings) as components:
        records = components.records()
        yield TaskQueries(components.database, records), records


def _find_instance(queries: TaskQueries, word: str) -> str:
    return complete_id(word, queries.instance_ids_from(word, limit=10))


def _unfinished(queries: TaskQueries) -> list[str]:
    from thrave.tasks.queries import TaskFilter

    tasks = queries.latest(TaskFilter(states=UNFINISHED), limit=_MAX_WATCHED)
    return [report.task.bundle_id for report in tasks]


def _cancel(queries: TaskQueries, records: TaskRepository, bundle_id: str) -> TaskReport:
    """Cancel a task. Raises BundleTaskNotFound, or BundleTaskNotCancellable."""
    from thrave.tasks.errors import BundleTaskNotCancellable

    cancelled = records.cancel(bundle_id)
    (report,) = queries.of([bundle_id])
    if not cancelled:
        raise BundleTaskNotCancellable(report.task.state)
    records.add_event(bundle_id, "An operator cancelled the task.")
    return report


def _worst_exit(ended: Sequence[TaskReport]) -> Exit:
    """Exit code of a watch: a failure counts more than a cancellation."""
    from thrave.tasks.errors import TaskCancelled

    reasons = {report.task.error_code for report in ended if report.task.error_code}
    if reasons - {TaskCancelled().code}:
        return Exit.TASK_FAILED
    return Exit.TASK_CANCELLED if reasons else Exit.OK
