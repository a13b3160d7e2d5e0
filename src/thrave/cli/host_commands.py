"""`thrave host`: the hosts of a fleet, for the operator, on any machine that has the database and the vault's key.

It talks to no agent: what it writes into the database the host's agent finds at its next heartbeat. Nothing here
powers a host off.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from thrave.cli.options import open_service, settings_option
from thrave.cli.output import format_duration, output_option, print_result, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thrave.components import Components
    from thrave.config import Settings
    from thrave.tasks.hosts import HostStatus
    from thrave.tasks.queries import TaskReport

_TASKS_SHOWN = 100

_name = click.argument("name", metavar="HOST")
_powered_off = click.option(
    "--powered-off", is_flag=True, help="You know that it is off, though it sent a heartbeat a moment ago."
)


@click.group()
def host() -> None:
    """Hosts of a fleet: who works, who is lost, and who goes on in whose place.

    \b
    Example:
      thrave host list
      thrave host drain kvm-17
    """


@host.command("list")
@settings_option
@output_option
def list_(settings: Settings, output: str) -> None:
    """List the hosts by name, with their last heartbeat and what they do.

    An active or draining host that has been silent for longer than its own setting heartbeat_timeout is shown as lost.

    \b
    Example:
      thrave host list --output json
    """
    with _ground(settings) as ground:
        listed = _listed(ground)
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
    """Show a host, and its tasks that have not ended.

    \b
    Example:
      thrave host show kvm-17
    """
    from thrave.cli.task_output import task_document, task_table

    with _ground(settings) as ground:
        found, tasks = _find(ground, name), _unfinished(ground, name)
    facts: list[tuple[str, ...]] = [
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
        ("tasks", f"{found.working} begun, {found.waiting} waiting; {found.worker_concurrency} at once"),
        ("instances", str(found.instances)),
    ]
    text = table(("HOST", found.host), facts) + ("\n\n" + task_table(tasks, found.now) if tasks else "")
    print_result(output, {**_document(found), "tasks": [task_document(seen) for seen in tasks]}, text)


@host.command()
@_name
@settings_option
@output_option
def drain(settings: Settings, name: str, output: str) -> None:
    """Have a host finish the tasks that it has begun and take no more; then its agent ends.

    It also carries out what was asked of its instances' power, starts instances that a task has left off, and merges
    overlays. What it had not begun waits for it. An agent that is started meanwhile drains as well: `thrave host
    activate` ends the drain.

    \b
    Example:
      thrave host drain kvm-17 && thrave host show kvm-17

    Exit codes: 0 it will, 3 there is no such host, 4 another host has adopted its tasks.
    """
    with _ground(settings) as ground:
        state = ground.hosts.drain(name)
    print_result(output, {"host": name, "state": state}, f"{name} is {state}")


@host.command()
@_name
@settings_option
@output_option
def activate(settings: Settings, name: str, output: str) -> None:
    """End the drain of a host, so that it takes tasks again. Then start its agent, if that has ended.

    An agent that still drains finishes its drain and ends with exit code 30, on which the systemd units start it again.

    \b
    Example:
      thrave host activate kvm-17

    Exit codes: 0 it takes tasks, 3 there is no such host, 4 another host has adopted its tasks.
    """
    with _ground(settings) as ground:
        state = ground.hosts.activate(name)
    print_result(output, {"host": name, "state": state}, f"{name} is {state}")


@host.command()
@click.argument("lost", metavar="LOST")
@click.option("--by", "name", metavar="HOST", required=True, help="The host that goes on with its tasks.")
@_powered_off
@settings_option
@output_option
def adopt(settings: Settings, lost: str, *, name: str, powered_off: bool, output: str) -> None:
    """Have a host go on with the tasks of the host LOST, whose storage it reaches.

    The instances of LOST are its own from then on. The agent of LOST can write nothing any more: if it still lives, it
    ends as soon as it tries. See that LOST runs no guest on the shared storage before you do this.

    \b
    Example:
      thrave host adopt kvm-17 --by kvm-18

    The other host must be active and send heartbeats. Tasks can also go back to the host that they were adopted from.

    Exit codes: 0 done, 3 there is no such host, 4 LOST sends heartbeats, or the other host cannot adopt.
    """
    with _ground(settings) as ground:
        tasks = ground.hosts.adopt(lost, by=name, powered_off=powered_off)
    said = f"{name} goes on in the place of {lost}"
    print_result(output, {"host": name, "lost": lost, "bundleIds": [*tasks]}, _with_tasks(said, tasks))


@host.command()
@_name
@_powered_off
@settings_option
@output_option
def retire(settings: Settings, name: str, *, powered_off: bool, output: str) -> None:
    """Give a host up for good, with its instances; its tasks that have not ended fail with Server.HostLost.

    \b
    Example:
      thrave host retire kvm-17

    Exit codes: 0 done, 3 there is no such host, 4 it sends heartbeats.
    """
    with _ground(settings) as ground:
        tasks = ground.hosts.retire(name, powered_off=powered_off)
    print_result(output, {"host": name, "bundleIds": [*tasks]}, _with_tasks(f"{name} is retired", tasks))


@contextmanager
def _ground(settings: Settings) -> Iterator[Components]:
    with open_service(settings) as ground:
        try:
            yield ground
        finally:
            ground.queues.close()


def _listed(ground: Components) -> list[HostStatus]:
    """The hosts. On a single machine no agent reports instances, so they are counted here."""
    listed, settings = ground.hosts.list(), ground.settings
    if settings.database_url is not None:
        return [*listed]
    here = len(ground.instances.list())
    return [one._replace(instances=here) if one.host == settings.host_id else one for one in listed]


def _find(ground: Components, name: str) -> HostStatus:
    from thrave.tasks.errors import NoSuchHost

    for found in _listed(ground):
        if found.host == name:
            return found
    raise NoSuchHost(name)


def _unfinished(ground: Components, name: str) -> list[TaskReport]:
    from thrave.tasks.models import UNFINISHED
    from thrave.tasks.queries import TaskFilter, TaskQueries

    wanted = TaskFilter(host=name, states=UNFINISHED)
    return TaskQueries(ground.database, ground.records()).latest(wanted, limit=_TASKS_SHOWN)


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


def _with_tasks(said: str, tasks: Sequence[str]) -> str:
    return "\n".join([f"{said}; tasks: {len(tasks)}", *tasks])
