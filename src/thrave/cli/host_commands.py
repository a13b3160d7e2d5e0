"""`thrave host`: the hosts of a fleet, on any machine with access to the database and the vault key.

Commands write to the database only; the host's agent reads the change at its next heartbeat. No command powers a host
off.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from thrave.cli.options import confirm_deletion, open_service, settings_option, yes_option
from thrave.cli.output import format_duration, output_option, print_result, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thrave.components import Components
    from thrave.config import Settings
    from thrave.tasks.hosts import HostStatus
    from thrave.tasks.queries import TaskReport

_MAX_TASKS_SHOWN = 100

_name = click.argument("name", metavar="HOST")
_powered_off = click.option(
    "--powered-off", is_flag=True, help="Confirm that the host is off, although it sent a heartbeat a moment ago."
)


@click.group(short_help="Manage the hosts of a fleet: drain, adopt, retire.")
def host() -> None:
    """Manage the hosts of a fleet: drain, adopt the tasks of a lost host, retire.

    \b
    Example:
      thrave host list
      thrave host drain kvm-17
    """


@host.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List the hosts with their last heartbeat and their tasks.

    An active or draining host is shown as lost if its last heartbeat is older than its setting heartbeat_timeout.

    \b
    Example:
      thrave host list --output json
    """
    with _open_components(settings) as components:
        listed = _listed(components)
    header = ("HOST", "STATE", "LAST HEARTBEAT", "WORKING ON", "WAITING", "INSTANCES", "VERSION")
    print_result(
        output,
        {"hosts": [_document(one) for one in listed]},
        table(header, [_row(one) for one in listed]),
    )


@host.command()
@_name
@settings_option
@output_option
def show(settings: Settings, name: str, output: str) -> None:
    """Show a host and its unfinished tasks.

    \b
    Example:
      thrave host show kvm-17
    """
    from thrave.cli.task_output import task_document, task_table

    with _open_components(settings) as components:
        found, tasks = _find(components, name), _unfinished(components, name)
    rows: list[tuple[str, ...]] = [
        ("state", _state(found)),
        ("adopted by", found.adopted_by or "-"),
        (
            "last heartbeat",
            (
                f"{format_duration(found.silence)} ago; every {found.heartbeat_interval:g} s, "
                f"lost after {found.heartbeat_timeout:g}"
            ),
        ),
        ("agent", f"Thrave {found.version}, for {format_duration(found.now - found.start_time)}"),
        ("tasks", f"{found.working} running, {found.waiting} waiting; at most {found.worker_concurrency} at once"),
        ("instances", str(found.instances)),
    ]
    text = table(("HOST", found.host), rows) + ("\n\n" + task_table(tasks, found.now) if tasks else "")
    print_result(output, {**_document(found), "tasks": [task_document(task) for task in tasks]}, text)


@host.command(short_help="Let a host finish its tasks and start no other.")
@_name
@settings_option
@output_option
def drain(settings: Settings, name: str, output: str) -> None:
    """Drain a host: it finishes the tasks that it has begun and starts no other; then its agent exits.

    The agent also finishes requested power changes, starts instances that a task has stopped, and merges overlays.
    Tasks that have not begun wait for this host. An agent that is started meanwhile drains, too. `thrave host activate`
    ends the drain.

    \b
    Example:
      thrave host drain kvm-17 && thrave host show kvm-17

    Exit codes: 0 the drain has started, 3 unknown host, 4 another host has adopted its tasks.
    """
    with _open_components(settings) as components:
        state = components.hosts.drain(name)
    print_result(output, {"host": name, "state": state}, f"{name} is {state}")


@host.command()
@_name
@settings_option
@output_option
def activate(settings: Settings, name: str, output: str) -> None:
    """End the drain of a host, so that it runs tasks again. Start its agent afterwards, if the agent has exited.

    An agent that still drains finishes the drain and exits with code 30; the systemd units then start it again.

    \b
    Example:
      thrave host activate kvm-17

    Exit codes: 0 the host runs tasks, 3 unknown host, 4 another host has adopted its tasks.
    """
    with _open_components(settings) as components:
        state = components.hosts.activate(name)
    print_result(output, {"host": name, "state": state}, f"{name} is {state}")


@host.command()
@click.argument("lost", metavar="HOST")
@click.option("--by", "name", metavar="OTHER_HOST", required=True, help="Host that resumes the tasks.")
@_powered_off
@settings_option
@output_option
def adopt(settings: Settings, lost: str, *, name: str, powered_off: bool, output: str) -> None:
    """Let OTHER_HOST resume the tasks of the lost host HOST. It must have access to the storage of HOST.

    The instances of HOST then belong to OTHER_HOST. The agent of HOST can no longer write to the database: if it still
    runs, it exits at its next write. First make sure that HOST runs no guest on the shared storage.

    \b
    Example:
      thrave host adopt kvm-17 --by kvm-18

    OTHER_HOST must be active and send heartbeats. Tasks can also go back to the host that they were adopted from.

    Exit codes: 0 done, 3 unknown host, 4 HOST sends heartbeats, or OTHER_HOST cannot adopt.
    """
    with _open_components(settings) as components:
        tasks = components.hosts.adopt(lost, by=name, powered_off=powered_off)
    text = f"{name} has adopted the tasks of {lost}"
    print_result(output, {"host": name, "lost": lost, "bundleIds": [*tasks]}, _with_tasks(text, tasks))


@host.command()
@_name
@_powered_off
@yes_option
@settings_option
@output_option
def retire(settings: Settings, name: str, *, powered_off: bool, yes: bool, output: str) -> None:
    """Remove a host and its instances for good. Its unfinished tasks fail with Server.HostLost.

    \b
    Example:
      thrave host retire kvm-17

    Exit codes: 0 done, 3 unknown host, 4 the host sends heartbeats.
    """
    with _open_components(settings) as components:
        _find(components, name)
        confirm_deletion(f"the host {name} and its instances from the service; its unfinished tasks fail", yes=yes)
        tasks = components.hosts.retire(name, powered_off=powered_off)
    print_result(output, {"host": name, "bundleIds": [*tasks]}, _with_tasks(f"{name} is retired", tasks))


@contextmanager
def _open_components(settings: Settings) -> Iterator[Components]:
    with open_service(settings) as components:
        try:
            yield components
        finally:
            components.queues.close()


def _listed(components: Components) -> list[HostStatus]:
    """The hosts. On a single machine no agent reports its instances, so they are counted here."""
    listed, settings = components.hosts.list(), components.settings
    if settings.database_url is not None:
        return [*listed]
    count = len(components.instances.list())
    return [one._replace(instances=count) if one.host == settings.host_id else one for one in listed]


def _find(components: Components, name: str) -> HostStatus:
    from thrave.tasks.errors import NoSuchHost

    for found in _listed(components):
        if found.host == name:
            return found
    raise NoSuchHost(name)


def _unfinished(components: Components, name: str) -> list[TaskReport]:
    from thrave.tasks.models import UNFINISHED
    from thrave.tasks.queries import TaskFilter, TaskQueries

    wanted = TaskFilter(host=name, states=UNFINISHED)
    return TaskQueries(components.database, components.records()).latest(wanted, limit=_MAX_TASKS_SHOWN)


def _document(host: HostStatus) -> dict[str, object]:
    return {
        "host": host.host,
        "state": host.state,
        "lost": host.is_lost,
        "heartbeatTime": host.heartbeat_time,
        "heartbeatInterval": host.heartbeat_interval,
        "heartbeatTimeout": host.heartbeat_timeout,
        "adoptedBy": host.adopted_by,
        "startTime": host.start_time,
        "version": host.version,
        "workerConcurrency": host.worker_concurrency,
        "tasksBegun": host.working,
        "tasksWaiting": host.waiting,
        "instances": host.instances,
    }


def _row(host: HostStatus) -> tuple[str, ...]:
    counts = (str(number) for number in (host.working, host.waiting, host.instances))
    return (host.host, _state(host), f"{format_duration(host.silence)} ago", *counts, host.version)


def _state(host: HostStatus) -> str:
    return f"{host.state}, lost" if host.is_lost else host.state


def _with_tasks(text: str, tasks: Sequence[str]) -> str:
    return "\n".join([f"{text}; tasks: {len(tasks)}", *tasks])
