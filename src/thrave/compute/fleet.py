"""A fleet's instances, as the hosts' agents have reported them: what the API answers from, without asking any host.

`ReportedInstances` is the API's side: an instance is what its host said last, and what a caller wants of its power is
written down for the host to do. `InstanceReports` is the host's side: it writes down what has changed, and takes what
is to be done. An instance belongs to the host that reported it first, until an operator has another host adopt it.
Nothing here stops or starts a machine.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from thrave.compute.descriptions import document, from_document
from thrave.compute.errors import InstanceNotFound, InvalidDescriptionError
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.instances import Instances
from thrave.database import instance as reported
from thrave.database import power_request, utc_now

log = structlog.get_logger()


class PowerAction(StrEnum):
    """What can be asked of an instance's power, in EC2's words."""

    STOP = "stop"
    START = "start"
    REBOOT = "reboot"
    TERMINATE = "terminate"


# How an instance is shown from the request on, until its host reports what has become of it.
_BECOMES = {
    PowerAction.STOP: InstanceState.STOPPING,
    PowerAction.START: InstanceState.PENDING,
    PowerAction.TERMINATE: InstanceState.SHUTTING_DOWN,
}


class PowerRequest(NamedTuple):
    """Something that a caller wants of an instance's power."""

    request_id: int
    instance_id: str
    action: PowerAction


class ReportedInstances:
    """The instances of all hosts. An `Inventory`, and a `PowerControl`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def list(self, account_id: str | None = None) -> Sequence[Instance]:
        """See Inventory."""
        mine = sa.true() if account_id is None else reported.c.account_id == account_id
        with self._engine.connect() as connection:
            query = sa.select(reported.c.instance_id, reported.c.document).where(mine)
            rows = connection.execute(query.order_by(reported.c.instance_id)).all()
        return [instance for row in rows if (instance := _readable(row.instance_id, row.document))]

    def get(self, instance_id: str) -> Instance:
        """See Inventory."""
        return _read(instance_id, self._row(instance_id).document)

    def owner_of(self, instance_id: str) -> str:
        """See Inventory."""
        with self._engine.connect() as connection:
            query = sa.select(reported.c.account_id).where(reported.c.instance_id == instance_id)
            owner: str | None = connection.execute(query).scalar()
        if owner is None:
            raise InstanceNotFound(instance_id)
        return owner

    def host_of(self, instance_id: str) -> str:
        """The host that has the instance's disks. Raises InstanceNotFound."""
        name: str = self._row(instance_id).host
        return name

    def request_stop(self, instance_id: str) -> None:
        """See Inventory."""
        self._ask(instance_id, PowerAction.STOP)

    def terminate(self, instance_id: str) -> None:
        """See Inventory."""
        self._ask(instance_id, PowerAction.TERMINATE)

    def start(self, instance_id: str) -> None:
        """See PowerControl."""
        self._ask(instance_id, PowerAction.START)

    def reboot(self, instance_id: str) -> None:
        """See PowerControl."""
        self._ask(instance_id, PowerAction.REBOOT)

    def _row(self, instance_id: str) -> sa.Row[tuple[object, ...]]:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(reported).where(reported.c.instance_id == instance_id)).first()
        if row is None:
            raise InstanceNotFound(instance_id)
        return row

    def _ask(self, instance_id: str, action: PowerAction) -> None:
        row = self._row(instance_id)
        request = {"host": row.host, "instance_id": instance_id, "action": action, "request_time": utc_now()}
        with self._engine.begin() as connection:
            connection.execute(power_request.insert(), request)
            if (state := _BECOMES.get(action)) and row.state not in {state, InstanceState.TERMINATED}:
                shown = {**row.document, "state": state}
                mine = reported.update().where(reported.c.instance_id == instance_id)
                connection.execute(mine.values(state=state, document=shown))


def _read(instance_id: str, reported_document: object) -> Instance:
    """The instance that a host has reported.

    Raises:
        InvalidDescriptionError: Another version of the agent has, which describes it otherwise.
    """
    try:
        return from_document(reported_document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise InvalidDescriptionError(instance_id, "its host's report", faults) from None


def _readable(instance_id: str, reported_document: object) -> Instance | None:
    """The same; None if it cannot be read, which is logged and hides no other."""
    try:
        return _read(instance_id, reported_document)
    except InvalidDescriptionError as error:
        log.warning("instance left out", instance_id=instance_id, error=str(error))
        return None


class InstanceReports:
    """What one host's agent tells of its instances, and is told to do with them."""

    def __init__(self, engine: sa.Engine, instances: Instances, host: str) -> None:
        """Report the `instances` of `host`."""
        self._engine = engine
        self._instances = instances
        self._host = host

    def report(self) -> None:
        """Write down what has changed since the last report, whoever made it."""
        found = {instance.instance_id: instance for instance in self._instances.list()}
        documents = {instance_id: document(instance) for instance_id, instance in found.items()}
        with self._engine.begin() as connection:
            before = {row.instance_id: row.document for row in connection.execute(self._mine())}
            for instance_id in before.keys() - documents.keys():
                connection.execute(reported.delete().where(reported.c.instance_id == instance_id))
            for instance_id, changed in documents.items():
                if before.get(instance_id) != changed:
                    self._write(connection, found[instance_id], changed, new=instance_id not in before)

    def take_requests(self) -> Iterator[PowerRequest]:
        """What is to be done, the oldest first; each is struck out once it has been done."""
        query = sa.select(power_request.c.request_id, power_request.c.instance_id, power_request.c.action)
        mine = query.where(power_request.c.host == self._host).order_by(power_request.c.request_id)
        with self._engine.connect() as connection:
            waiting = [PowerRequest(*row) for row in connection.execute(mine)]
        for request in waiting:
            yield request._replace(action=PowerAction(request.action))
            with self._engine.begin() as connection:
                connection.execute(power_request.delete().where(power_request.c.request_id == request.request_id))

    def _mine(self) -> sa.Select[tuple[str, object]]:
        return sa.select(reported.c.instance_id, reported.c.document).where(reported.c.host == self._host)

    def _write(self, connection: sa.Connection, instance: Instance, changed: dict[str, object], *, new: bool) -> None:
        values = {"state": instance.state, "account_id": instance.account_id, "document": changed}
        row = {**values, "report_time": utc_now()}
        if not new:
            connection.execute(reported.update().where(reported.c.instance_id == instance.instance_id).values(**row))
            return
        taken = sa.select(reported.c.host).where(reported.c.instance_id == instance.instance_id)
        if (other := connection.execute(taken).scalar()) is None:
            connection.execute(reported.insert(), {"instance_id": instance.instance_id, "host": self._host, **row})
        else:
            log.debug("another host has this instance", instance_id=instance.instance_id, host=other)
