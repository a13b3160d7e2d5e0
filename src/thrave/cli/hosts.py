"""`thrave host`: the hosts of a fleet, for the operator, on any machine that has the database and the vault's key.

It talks to no agent: what it writes into the database the host's agent finds at its next sign of life. Nothing here
powers a host off.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import click

from thrave.cli.output import emit, output_option, table
from thrave.cli.service import open_service, settings_option
from thrave.cli.times import span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from thrave.config import Settings
    from thrave.ground import Ground
    from thrave.tasks.hosts import FleetHost
    from thrave.tasks.overview import SeenTask

_TASKS_SHOWN = 100

_name = click.argument("name", metavar="HOST")
_powered_off = click.option(
    "--powered-off", is_flag=True, help="You know that it is off, though it gave a sign of life a moment ago."
)


class _Look(NamedTuple):
    """When hosts are looked at, and how long they may be silent."""

    now: datetime
    lost_after: timedelta

    def silence(self, host: FleetHost) -> timedelta:
        return self.now - host.heartbeat_time

    def is_lost(self, host: FleetHost) -> bool:
        """Whether it should give signs of life, and gives none."""
        return host.is_lost(self.now, self.lost_after)


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
    """List the hosts by name, with their last sign of life and what they do.

    An active or draining host that has been silent for longer than the setting host_lost_after is shown as lost.

    \b
    Example:
      thrave host list --output json
    """
    with _ground(settings) as ground:
        listed = _listed(ground)
        look = _look(settings)
    header = ("HOST", "STATE", "LAST SIGN", "WORKING ON", "WAITING", "INSTANCES", "VERSION")
    emit(
        output,
        {"hosts": [_document(one, look) for one in listed]},
        table(header, [_row(one, look) for one in listed]),
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
    from thrave.cli.task_words import task_document, task_table

    with _ground(settings) as ground:
        found, tasks = _find(ground, name), _unfinished(ground, name)
        look = _look(settings)
    facts: list[tuple[str, ...]] = [
        ("state", _state(found, look)),
        ("last sign", f"{span(look.silence(found))} ago"),
        ("agent", f"Thrave {found.version}, for {span(look.now - found.start_time)}"),
        ("tasks", f"{found.working} begun, {found.waiting} waiting; {found.tasks_at_once} at once"),
        ("instances", str(found.instances)),
    ]
    text = table(("HOST", found.host), facts) + ("\n\n" + task_table(tasks, look.now) if tasks else "")
    emit(output, {**_document(found, look), "tasks": [task_document(seen) for seen in tasks]}, text)


@host.command()
@_name
@settings_option
@output_option
def drain(settings: Settings, name: str, output: str) -> None:
    """Have a host finish the tasks that it has begun and take no more; then its agent ends.

    What it had not begun waits for it. It is active again when its agent is started again.

    \b
    Example:
      thrave host drain kvm-17 && thrave host show kvm-17

    Exit codes: 0 it will, 3 there is no such host.
    """
    with _ground(settings) as ground:
        ground.hosts.drain(name)
    emit(output, {"host": name, "state": "draining"}, f"{name} is draining")


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

    Exit codes: 0 done, 3 there is no such host, 4 LOST gives signs of life.
    """
    with _ground(settings) as ground:
        tasks = ground.hosts.adopt(lost, by=name, powered_off=powered_off)
    said = f"{name} goes on in the place of {lost}"
    emit(output, {"host": name, "lost": lost, "bundleIds": [*tasks]}, _with_tasks(said, tasks))


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

    Exit codes: 0 done, 3 there is no such host, 4 it gives signs of life.
    """
    with _ground(settings) as ground:
        tasks = ground.hosts.retire(name, powered_off=powered_off)
    emit(output, {"host": name, "bundleIds": [*tasks]}, _with_tasks(f"{name} is retired", tasks))


@contextmanager
def _ground(settings: Settings) -> Iterator[Ground]:
    with open_service(settings) as ground:
        try:
            yield ground
        finally:
            ground.queues.close()


def _listed(ground: Ground) -> list[FleetHost]:
    """The hosts. On a single machine no agent reports instances, so they are counted here."""
    listed, settings = ground.hosts.list(), ground.settings
    if settings.database_url is not None:
        return [*listed]
    here = len(ground.instances.list())
    return [one._replace(instances=here) if one.host == settings.host_name else one for one in listed]


def _find(ground: Ground, name: str) -> FleetHost:
    from thrave.tasks.hosts import NoSuchHost

    for found in _listed(ground):
        if found.host == name:
            return found
    raise NoSuchHost(name)


def _unfinished(ground: Ground, name: str) -> list[SeenTask]:
    from thrave.tasks.overview import Overview, Wanted
    from thrave.tasks.states import UNFINISHED

    wanted = Wanted(host=name, states=UNFINISHED)
    return Overview(ground.database, ground.records()).latest(wanted, limit=_TASKS_SHOWN)


def _look(settings: Settings) -> _Look:
    from thrave.database import utc_now

    return _Look(utc_now(), timedelta(seconds=settings.host_lost_after))


def _document(host: FleetHost, look: _Look) -> dict[str, object]:
    return {
        "host": host.host,
        "state": host.state,
        "lost": look.is_lost(host),
        "heartbeatTime": host.heartbeat_time,
        "startTime": host.start_time,
        "version": host.version,
        "tasksAtOnce": host.tasks_at_once,
        "tasksBegun": host.working,
        "tasksWaiting": host.waiting,
        "instances": host.instances,
    }


def _row(host: FleetHost, look: _Look) -> tuple[str, ...]:
    counts = (str(number) for number in (host.working, host.waiting, host.instances))
    return (host.host, _state(host, look), f"{span(look.silence(host))} ago", *counts, host.version)


def _state(host: FleetHost, look: _Look) -> str:
    return f"{host.state}, lost" if look.is_lost(host) else host.state


def _with_tasks(said: str, tasks: Sequence[str]) -> str:
    return "\n".join([f"{said}; tasks: {len(tasks)}", *tasks])
