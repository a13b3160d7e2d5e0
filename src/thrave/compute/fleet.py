"""Instances of a fleet in the database, so that the API needs no connection to a host.

`FleetInventory` is for API processes: it returns each instance as its host has reported it last, and records power
requests (`power_records.py`) for the host to carry out. `InstanceReporter` is for agents: it records what has changed.
An instance belongs to one host. Only this host reports it and runs its commands, until an operator lets another host
adopt it. Nothing here stops or starts a machine.
"""

from collections.abc import Iterable, Sequence

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.dialects import postgresql, sqlite

from thrave.compute.base import HypervisorDriver
from thrave.compute.description_files import from_document, to_document
from thrave.compute.errors import InstanceError, InstanceNotFound, InvalidDescriptionError
from thrave.compute.instance import Instance, InstanceState
from thrave.compute.power_records import PowerAction, record_request
from thrave.database import host as hosts
from thrave.database import instance as reported
from thrave.database import now

log = structlog.get_logger()


# The state that is shown after a request until the host reports the result, and the states in which that applies.
_REQUESTED_STATES = {
    PowerAction.STOP: (InstanceState.STOPPING, {InstanceState.PENDING, InstanceState.RUNNING}),
    PowerAction.START: (InstanceState.PENDING, {InstanceState.STOPPED}),
    PowerAction.TERMINATE: (InstanceState.SHUTTING_DOWN, {*InstanceState} - {InstanceState.TERMINATED}),
}


class FleetInventory:
    """The instances of all hosts. Implements `InstanceInventory` and `PowerControl`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def list(self, account_id: str | None = None) -> Sequence[Instance]:
        """See `InstanceInventory`."""
        of_account = sa.true() if account_id is None else reported.c.account_id == account_id
        with self._engine.connect() as connection:
            query = sa.select(reported.c.instance_id, reported.c.document).where(of_account)
            rows = connection.execute(query.order_by(reported.c.instance_id)).all()
        return [instance for row in rows if (instance := _read_or_log(row.instance_id, row.document))]

    def get(self, instance_id: str) -> Instance:
        """See `InstanceInventory`."""
        return _read(instance_id, self._row(instance_id).document)

    def get_owner(self, instance_id: str) -> str:
        """See `InstanceInventory`."""
        with self._engine.connect() as connection:
            query = sa.select(reported.c.account_id).where(reported.c.instance_id == instance_id)
            owner: str | None = connection.execute(query).scalar()
        if owner is None:
            raise InstanceNotFound(instance_id)
        return owner

    def request_stop(self, instance_id: str) -> None:
        """See `InstanceInventory`."""
        self._request(instance_id, PowerAction.STOP)

    def stop(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._request(instance_id, PowerAction.STOP, requester)

    def terminate(self, instance_id: str, requester: str | None = None) -> None:
        """See `InstanceInventory` and `PowerControl`."""
        self._request(instance_id, PowerAction.TERMINATE, requester)

    def start(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._request(instance_id, PowerAction.START, requester)

    def reboot(self, instance_id: str, requester: str | None = None) -> None:
        """See `PowerControl`."""
        self._request(instance_id, PowerAction.REBOOT, requester)

    def _row(self, instance_id: str) -> sa.Row[tuple[object, ...]]:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(reported).where(reported.c.instance_id == instance_id)).first()
        if row is None:
            raise InstanceNotFound(instance_id)
        return row

    def _request(self, instance_id: str, action: PowerAction, requester: str | None = None) -> None:
        with self._engine.begin() as connection:
            is_instance = reported.c.instance_id == instance_id
            # Locked, so that no report or adoption of the instance comes between the read and the update.
            row = connection.execute(sa.select(reported).where(is_instance).with_for_update()).first()
            if row is None:
                raise InstanceNotFound(instance_id)
            record_request(connection, instance_id, action, requester)
            state, from_states = _REQUESTED_STATES.get(action, (None, ()))
            if state is not None and row.state in from_states:
                shown = {**row.document, "state": state}
                connection.execute(reported.update().where(is_instance).values(state=state, document=shown))


def _read(instance_id: str, reported_document: object) -> Instance:
    """Return the instance that a host has reported.

    Raises:
        InvalidDescriptionError: An agent of another version has reported it, in another form.
    """
    try:
        return from_document(reported_document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise InvalidDescriptionError(instance_id, "its host's report", faults) from None


def _read_or_log(instance_id: str, reported_document: object) -> Instance | None:
    """As `_read`, but log an instance that cannot be read and return None, so that the others are listed."""
    try:
        return _read(instance_id, reported_document)
    except InvalidDescriptionError as error:
        log.warning("instance skipped", instance_id=instance_id, error=str(error))
        return None


class InstanceReporter:
    """Reports the instances of one host, for its agent.

    An instance belongs to the host that its description names, or else to the host that reports it first. It stays with
    this host until an operator lets another host adopt it: a report never changes a row of another host. The row of an
    instance that cannot be read does not change. The row is deleted when the instance no longer exists.
    """

    def __init__(
        self, engine: sa.Engine, driver: HypervisorDriver, host: str, has_lease: sa.ColumnElement[bool] | None = None
    ) -> None:
        """Report the instances of `host`.

        Args:
            engine: The database.
            driver: Of the instances of this machine. Several hosts may have the same instances.
            host: The host.
            has_lease: True of the host's row as long as this agent has the lease. Without the lease nothing is written.
        """
        self._engine = engine
        self._driver = driver
        self._host = host
        self._has_lease = sa.true() if has_lease is None else has_lease
        self._other_hosts: dict[str, str] = {}  # hosts of the instances that this machine has and another host reports

    def report(self) -> None:
        """Record what has changed since the last report of any process."""
        with self._engine.connect() as connection:
            own = sa.select(reported.c.instance_id, reported.c.document).where(reported.c.host == self._host)
            before = {row.instance_id: row.document for row in connection.execute(own)}
            self._other_hosts = self._find_other_hosts(connection, self._other_hosts)
        listed = self._driver.list(include=lambda one: one.instance_id in before or self._may_report(one))
        found = {one.instance_id: one for one in listed}
        documents = {instance_id: to_document(one) for instance_id, one in found.items()}
        changed = [one for instance_id, one in found.items() if before.get(instance_id) != documents[instance_id]]
        removed = {instance_id for instance_id in before.keys() - found.keys() if self._is_removed(instance_id)}
        if not changed and not removed:
            return
        with self._engine.begin() as connection:
            # Locked, so that no other process takes the lease before the transaction ends.
            lease = sa.select(hosts.c.host).where(hosts.c.host == self._host, self._has_lease)
            if connection.execute(lease.with_for_update(read=True)).first() is None:
                return  # the next heartbeat ends the process
            is_own = reported.c.host == self._host
            connection.execute(reported.delete().where(is_own, reported.c.instance_id.in_(removed)))
            for one in changed:
                row: dict[str, object] = {
                    "state": one.state,
                    "account_id": one.account_id,
                    "document": documents[one.instance_id],
                    "report_time": now(),
                }
                if one.instance_id in before:
                    is_instance = reported.c.instance_id == one.instance_id
                    connection.execute(reported.update().where(is_own, is_instance).values(**row))
                else:
                    self._add(connection, one, row)

    def _may_report(self, one: Instance) -> bool:
        """Whether an instance that this host does not report yet may become its own."""
        return one.host in {None, self._host} and one.instance_id not in self._other_hosts

    def _is_removed(self, instance_id: str) -> bool:
        """Whether an instance that was not listed no longer exists.

        `list` skips an instance whose description or domain cannot be read at the moment. Its row must stay: only the
        row has the host that has adopted the instance.
        """
        try:
            self._driver.get(instance_id)
        except InstanceNotFound:
            return True
        except InstanceError:
            return False
        return False

    def _find_other_hosts(self, connection: sa.Connection, instance_ids: Iterable[str]) -> dict[str, str]:
        """Return the hosts of those of these instances that other hosts report."""
        query = sa.select(reported.c.instance_id, reported.c.host).where(reported.c.host != self._host)
        ids = [*instance_ids]
        found = connection.execute(query.where(reported.c.instance_id.in_(ids))) if ids else ()
        return {row.instance_id: row.host for row in found}

    def _add(self, connection: sa.Connection, one: Instance, row: dict[str, object]) -> None:
        """Add the row of an instance. If another host has the instance, log that, and continue the report."""
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        new = insert(reported).values(instance_id=one.instance_id, host=self._host, **row).on_conflict_do_nothing()
        if connection.execute(new, execution_options={"preserve_rowcount": True}).rowcount:
            return
        other_hosts = self._find_other_hosts(connection, [one.instance_id])
        self._other_hosts |= other_hosts
        log.warning(
            "another host has this instance",
            instance_id=one.instance_id,
            host=self._host,
            other=other_hosts.get(one.instance_id),
        )
