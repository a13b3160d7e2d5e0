"""A fleet's instances, as the hosts' agents have reported them: what the API answers from, without asking any host.

`ReportedInstances` is the API's side: an instance is what its host said last, and what a caller wants of its power is
recorded (`power_records.py`) for the host to do. `InstanceReports` is the host's side: it writes down what has changed.
An instance belongs to the host that reported it first, until an operator has another host adopt it. Nothing here stops
or starts a machine.
"""

from collections.abc import Sequence

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from thrave.compute.descriptions import document, from_document
from thrave.compute.errors import InstanceNotFound, InvalidDescriptionError
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.instances import Instances
from thrave.compute.power_records import PowerAction, record_request
from thrave.database import instance as reported
from thrave.database import utc_now

log = structlog.get_logger()


# How an instance is shown from the request on, until its host reports what has become of it; and from which states.
_BECOMES = {
    PowerAction.STOP: (InstanceState.STOPPING, {InstanceState.PENDING, InstanceState.RUNNING}),
    PowerAction.START: (InstanceState.PENDING, {InstanceState.STOPPED}),
    PowerAction.TERMINATE: (InstanceState.SHUTTING_DOWN, {*InstanceState} - {InstanceState.TERMINATED}),
}


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

    def stop(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._ask(instance_id, PowerAction.STOP, by)

    def terminate(self, instance_id: str, by: str | None = None) -> None:
        """See Inventory, and PowerControl."""
        self._ask(instance_id, PowerAction.TERMINATE, by)

    def start(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._ask(instance_id, PowerAction.START, by)

    def reboot(self, instance_id: str, by: str | None = None) -> None:
        """See PowerControl."""
        self._ask(instance_id, PowerAction.REBOOT, by)

    def _row(self, instance_id: str) -> sa.Row[tuple[object, ...]]:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(reported).where(reported.c.instance_id == instance_id)).first()
        if row is None:
            raise InstanceNotFound(instance_id)
        return row

    def _ask(self, instance_id: str, action: PowerAction, by: str | None = None) -> None:
        with self._engine.begin() as connection:
            mine = reported.c.instance_id == instance_id
            # Locked, so that a report or an adoption of the instance comes before or after, and not in between.
            row = connection.execute(sa.select(reported).where(mine).with_for_update()).first()
            if row is None:
                raise InstanceNotFound(instance_id)
            record_request(connection, instance_id, action, by)
            becomes, possible = _BECOMES.get(action, (None, ()))
            if becomes is not None and row.state in possible:
                shown = {**row.document, "state": becomes}
                connection.execute(reported.update().where(mine).values(state=becomes, document=shown))


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
    """What one host's agent tells of its instances."""

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
