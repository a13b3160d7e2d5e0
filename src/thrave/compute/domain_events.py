"""What libvirt has told of its domains: which have changed since somebody looked, and how often each was started.

Events are written down and nothing more: they come in libvirt's event loop, which must not wait for answers of
libvirt's. Who wants to know asks here, and then libvirt. What happens while there is no connection is never told:
`lost` counts the times that there was none, so that whoever counts events knows that the count is not whole.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from thrave.compute.libvirt_binding import Connection, Domain
from thrave.compute.libvirt_numbers import Lifecycle


@dataclass(frozen=True)
class Told:
    """What has been told of a domain since this process has listened.

    Attributes:
        starts: How often it was started.
        jobs: By a disk's target, how often a job on it has come to something: caught up, done, failed, cancelled.
        started: When it was last started.
        stopped: Why it has stopped since, a `StoppedDetail`.
    """

    starts: int = 0
    jobs: Mapping[str, int] = field(default_factory=dict)
    started: datetime | None = None
    stopped: int | None = None


class DomainEvents:
    """A book of events; any thread may read it."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._told: dict[str, Told] = defaultdict(Told)
        self._changed: set[str] = set()
        self._lost = 1  # there is no connection yet

    @property
    def lost(self) -> int:
        """How often there was no connection; from each time on nothing that was known before counts."""
        return self._lost

    def lose(self) -> None:
        """Note that there is no connection."""
        with self._lock:
            self._lost += 1

    def of(self, uuid: str) -> Told:
        """What has been told of a domain."""
        with self._lock:
            return self._told.get(uuid, Told())

    def await_start(self, uuid: str, starts: int, seconds: float) -> datetime | None:
        """When a domain that was started so often was started again; None if that is not told within some seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._told[uuid].starts > starts, seconds)
            return self._told[uuid].started if self._told[uuid].starts > starts else None

    def take_changed(self) -> set[str]:
        """The UUIDs of the domains of which something was told since this was last asked."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def change(self, uuids: set[str]) -> None:
        """Note that domains have to be looked at again, whether anything is told of them or not."""
        with self._lock:
            self._changed |= uuids

    def lifecycle(self, _connection: Connection, domain: Domain, event: int, detail: int, _opaque: object) -> None:
        """Write down a lifecycle event."""
        uuid = domain.UUIDString()
        with self._lock:
            self._changed.add(uuid)
            told = self._told[uuid]
            if event == Lifecycle.STARTED:
                now = datetime.now(UTC)
                self._told[uuid] = replace(told, starts=told.starts + 1, started=now, stopped=None)
                self._lock.notify_all()
            elif event == Lifecycle.STOPPED:
                self._told[uuid] = replace(told, stopped=detail)

    def block_job(
        self, _connection: Connection, domain: Domain, disk: str, _kind: int, _status: int, _opaque: object
    ) -> None:
        """Write down that a job on a disk has come to something."""
        uuid = domain.UUIDString()
        with self._lock:
            self._changed.add(uuid)
            jobs = self._told[uuid].jobs
            self._told[uuid] = replace(self._told[uuid], jobs={**jobs, disk: jobs.get(disk, 0) + 1})

    def metadata(self, _connection: Connection, domain: Domain, _kind: int, _namespace: str, _opaque: object) -> None:
        """Write down that what is said of a domain has changed."""
        with self._lock:
            self._changed.add(domain.UUIDString())
