"""A fleet's instances, as the hosts' agents have reported them: what the API answers from, without asking any host.

`FleetInventory` is the API's side: an instance is what its host said last, and what a caller wants of its power is
recorded (`power_records.py`) for the host to do. `InstanceReporter` is the host's side: it writes down what has
changed.
An instance include to one host, which alone reports it and runs its commands, until an operator has another host adopt
it. Nothing here stops or starts a machine.
"""

from collections.abc import Iterable, Sequence

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.dialects import postgresql, sqlite

from thrave.compute.base import HypervisorDriver
from thrave.compute.description_files import document, from_document
from thrave.compute.errors import InstanceError, InstanceNotFound, InvalidDescriptionError
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.power_records import PowerAction, record_request
from thrave.database import host as hosts
from thrave.database import instance as reported
from thrave.database import now

log = structlog.get_logger()


# How an instance is shown from the request on, until its host reports what has become of it; and from which states.
_BECOMES = {
    PowerAction.STOP: (InstanceState.STOPPING, {InstanceState.PENDING, InstanceState.RUNNING}),
    PowerAction.START: (InstanceState.PENDING, {InstanceState.STOPPED}),
    PowerAction.TERMINATE: (InstanceState.SHUTTING_DOWN, {*InstanceState} - {InstanceState.TERMINATED}),
}


class FleetInventory:
    """The instances of all hosts. An `InstanceInventory`, and a `PowerControl`."""

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

    def get_owner(self, instance_id: str) -> str:
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


class InstanceReporter:
    """What one host's agent tells of its instances.

    An instance whose description names a host is that host's; another one is the host's that reports it first. In both
    cases it stays so until an operator has another host adopt it: a report never changes a row of another host. The row
    of an instance that cannot be read stays as it is; it is deleted once the instance does not exist any more.
    """

    def __init__(
        self, engine: sa.Engine, instances: HypervisorDriver, host: str, holds: sa.ColumnElement[bool] | None = None
    ) -> None:
        """Report the `instances` of `host`.

        Args:
            engine: The database.
            instances: All that this machine knows; hosts may share them.
            host: The host.
            holds: True of the host's row for as long as this agent has the lease; without it nothing is written.
        """
        self._engine = engine
        self._instances = instances
        self._host = host
        self._holds = sa.true() if holds is None else holds
        self._elsewhere: dict[str, str] = {}  # instances that are known here, and the hosts that have them

    def report(self) -> None:
        """Write down what has changed since the last report, whoever made it."""
        with self._engine.connect() as connection:
            before = {row.instance_id: row.document for row in connection.execute(self._mine())}
            self._elsewhere = self._owners(connection, self._elsewhere)
        listed = self._instances.list(include=lambda one: one.instance_id in before or self._may_have(one))
        found = {one.instance_id: one for one in listed}
        documents = {instance_id: document(one) for instance_id, one in found.items()}
        changed = [one for instance_id, one in found.items() if before.get(instance_id) != documents[instance_id]]
        gone = {instance_id for instance_id in before.keys() - found.keys() if self._is_gone(instance_id)}
        if not changed and not gone:
            return
        with self._engine.begin() as connection:
            if connection.execute(self._lease).first() is None:
                return  # the next heartbeat ends the process
            mine = reported.c.host == self._host
            connection.execute(reported.delete().where(mine, reported.c.instance_id.in_(gone)))
            for one in changed:
                row: dict[str, object] = {
                    "state": one.state,
                    "account_id": one.account_id,
                    "document": documents[one.instance_id],
                    "report_time": now(),
                }
                if one.instance_id in before:
                    its = reported.c.instance_id == one.instance_id
                    connection.execute(reported.update().where(mine, its).values(**row))
                else:
                    self._add(connection, one, row)

    def _mine(self) -> sa.Select[tuple[str, object]]:
        return sa.select(reported.c.instance_id, reported.c.document).where(reported.c.host == self._host)

    @property
    def _lease(self) -> sa.Select[tuple[str]]:
        """The host, which nobody fences off until the transaction ends."""
        return sa.select(hosts.c.host).where(hosts.c.host == self._host, self._holds).with_for_update(read=True)

    def _may_have(self, one: Instance) -> bool:
        """Whether an instance that is not reported by this host may become its own."""
        return one.host in {None, self._host} and one.instance_id not in self._elsewhere

    def _is_gone(self, instance_id: str) -> bool:
        """Whether an instance that was not listed does not exist any more.

        `list` leaves out an instance whose description or domain cannot be read at the moment. Its row has to stay: the
        row alone says which host has adopted the instance.
        """
        try:
            self._instances.get(instance_id)
        except InstanceNotFound:
            return True
        except InstanceError:
            return False
        return False

    def _owners(self, connection: sa.Connection, instance_ids: Iterable[str]) -> dict[str, str]:
        """Which of these instances other hosts have, and which hosts."""
        query = sa.select(reported.c.instance_id, reported.c.host).where(reported.c.host != self._host)
        some = [*instance_ids]
        found = connection.execute(query.where(reported.c.instance_id.in_(some))) if some else ()
        return {row.instance_id: row.host for row in found}

    def _add(self, connection: sa.Connection, one: Instance, row: dict[str, object]) -> None:
        """Add the row of an instance; one that another host has is skipped, and nothing else of the report is."""
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        new = insert(reported).values(instance_id=one.instance_id, host=self._host, **row).on_conflict_do_nothing()
        if connection.execute(new, execution_options={"preserve_rowcount": True}).rowcount:
            return
        owners = self._owners(connection, [one.instance_id])
        self._elsewhere |= owners
        log.warning(
            "another host has this instance",
            instance_id=one.instance_id,
            host=self._host,
            other=owners.get(one.instance_id),
        )
