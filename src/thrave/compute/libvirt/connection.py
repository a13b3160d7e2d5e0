"""What libvirt has told of its domains: which have changed since somebody looked, and how often each was started.

Events are written down and nothing more: they come in libvirt's event loop, which must not wait for answers of
libvirt's. Who wants to know asks here, and then libvirt. What happens while there is no connection is never told:
`lost` counts the times that there was none, so that whoever counts events knows that the count is not whole.

The connection to libvirt: made when it is first needed, and again when it was lost; its errors in our words.

Any thread may ask. Nothing waits for ever: libvirt has so long to take the connection, and is asked for a sign of
life from then on, so that a daemon that has died or hangs ends every question with an error. The next question
connects again; nothing here has to be started anew when libvirtd is. Whoever is told of a domain's events is told by
one thread of this process, which libvirt needs also for those signs of life.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple, cast

from thrave.compute.errors import HypervisorError, HypervisorUnavailable, InstanceNotFound
from thrave.compute.libvirt import binding as libvirt_binding
from thrave.compute.libvirt.binding import (
    NO_DOMAIN,
    Connection,
    Domain,
    EventKind,
    LibvirtBinding,
    LibvirtError,
    Lifecycle,
)
from thrave.concurrency import Background, Call, CallTimeoutError, monotonic, new_condition, new_lock, repeat, utc_now


@dataclass(frozen=True)
class DomainHistory:
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
        self._lock = new_condition()
        self._histories: dict[str, DomainHistory] = defaultdict(DomainHistory)
        self._changed: set[str] = set()
        self._disconnects = 1  # there is no connection yet

    @property
    def disconnects(self) -> int:
        """How often there was no connection; from each time on nothing that was known before counts."""
        return self._disconnects

    def record_disconnect(self) -> None:
        """Note that there is no connection."""
        with self._lock:
            self._disconnects += 1

    def history(self, uuid: str) -> DomainHistory:
        """What has been told of a domain."""
        with self._lock:
            return self._histories.get(uuid, DomainHistory())

    def wait_for_start(self, uuid: str, starts: int, seconds: float) -> datetime | None:
        """When a domain that was started so often was started again; None if that is not told within some seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._histories[uuid].starts > starts, seconds)
            return self._histories[uuid].started if self._histories[uuid].starts > starts else None

    def take_changed(self) -> set[str]:
        """The UUIDs of the domains of which something was told since this was last asked."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def mark_changed(self, uuids: set[str]) -> None:
        """Note that domains have to be looked at again, whether anything is told of them or not."""
        with self._lock:
            self._changed |= uuids

    def on_lifecycle(self, _connection: Connection, domain: Domain, event: int, detail: int, _opaque: object) -> None:
        """Write down a lifecycle event."""
        uuid = domain.UUIDString()
        with self._lock:
            self._changed.add(uuid)
            history = self._histories[uuid]
            if event == Lifecycle.STARTED:
                now = utc_now()
                self._histories[uuid] = replace(history, starts=history.starts + 1, started=now, stopped=None)
                self._lock.notify_all()
            elif event == Lifecycle.STOPPED:
                self._histories[uuid] = replace(history, stopped=detail)

    def on_block_job(
        self, _connection: Connection, domain: Domain, disk: str, _kind: int, _status: int, _opaque: object
    ) -> None:
        """Write down that a job on a disk has come to something."""
        uuid = domain.UUIDString()
        with self._lock:
            self._changed.add(uuid)
            jobs = self._histories[uuid].jobs
            self._histories[uuid] = replace(self._histories[uuid], jobs={**jobs, disk: jobs.get(disk, 0) + 1})

    def on_metadata_change(
        self, _connection: Connection, domain: Domain, _kind: int, _namespace: str, _opaque: object
    ) -> None:
        """Write down that what is said of a domain has changed."""
        with self._lock:
            self._changed.add(domain.UUIDString())


CONNECT_SECONDS = 30.0


MAX_UNANSWERED = 4  # attempts to connect that are not answered; each has a thread


ALIVE_INTERVAL, ALIVE_COUNT = 5, 3  # seconds, and how many signs of life may be missing


_KEEPALIVE_TIMEOUT = float(
    ALIVE_INTERVAL * (ALIVE_COUNT + 1)
)  # seconds after which a silent connection is taken for lost


_CLOSE_SECONDS = 1.0


_MAX_MESSAGE = 300  # characters of libvirt's that go into a message


log = logging.getLogger(__name__)


_starting = new_lock()


_event_loop: Background | None = None


class LibvirtConnection:
    """One libvirt.

    Args:
        uri: Which, in libvirt's words.
        events: Where events go.
    """

    def __init__(self, uri: str, events: DomainEvents) -> None:
        self._uri = uri
        self._events = events
        self._lock = new_lock()
        self._connection: Connection | None = None
        self._opening: Call[_Opened] | None = None
        self._unanswered: list[Call[_Opened]] = []
        self._callbacks: list[int] = []

    @contextmanager
    def session(self, instance_id: str = "") -> Iterator[Connection]:
        """The connection, for the length of some questions; what libvirt says against them is an error of ours.

        Args:
            instance_id: Whom they are about.

        Raises:
            HypervisorGoneError: There is no connection, or it was lost meanwhile.
            InstanceNotFound: There is no such domain.
            HypervisorError: libvirt refuses, in its words.
        """
        binding = libvirt_binding.load()
        connection = self._connect(binding, instance_id)
        began = monotonic()
        try:
            yield connection
        except binding.libvirtError as error:
            translated = self._translate(cast("LibvirtError", error), connection, instance_id)
            if isinstance(translated, HypervisorUnavailable):
                translated.waited = min(monotonic() - began, _KEEPALIVE_TIMEOUT)
            raise translated from error

    def close(self) -> None:
        """Let go of the connection. A question that comes later connects again."""
        with self._lock:
            self._disconnect()

    def _connect(self, binding: LibvirtBinding, instance_id: str) -> Connection:
        with self._lock:
            if self._connection is not None and _is_alive(binding, self._connection):
                return self._connection
            self._disconnect()
            opening = self._opening = self._opening or self._start_opening(binding, instance_id)
        began = monotonic()
        try:
            opened = opening.result(CONNECT_SECONDS)
        except CallTimeoutError:
            self._abandon(opening)
            raise HypervisorUnavailable(
                instance_id,
                f"{self._uri} has not responded within {CONNECT_SECONDS:.0f} seconds",
                waited=CONNECT_SECONDS,
            ) from None
        except binding.libvirtError as error:
            self._finish_opening(opening, None)
            raise HypervisorUnavailable(
                instance_id,
                f"no connection to {self._uri}: {_message(cast('LibvirtError', error))}",
                waited=monotonic() - began,
            ) from error
        except BaseException:
            if not opening.is_running:  # it failed, in whatever way: the next question connects anew
                self._finish_opening(opening, None)
            raise
        self._finish_opening(opening, opened)
        return opened.connection

    def _start_opening(self, binding: LibvirtBinding, instance_id: str) -> "Call[_Opened]":
        """Connect in a thread of its own: nothing ends a connecting that is not answered."""
        self._unanswered = [call for call in self._unanswered if call.is_running]
        if len(self._unanswered) >= MAX_UNANSWERED:
            raise HypervisorUnavailable(
                instance_id, f"{self._uri} does not answer: {len(self._unanswered)} attempts wait"
            )
        _start_event_loop(binding)
        return Call("libvirt open", lambda: self._open(binding))

    def _open(self, binding: LibvirtBinding) -> "_Opened":
        opened = _Opened(binding.open(self._uri), [])
        try:
            with suppress(binding.libvirtError):  # a driver within this process needs no signs of life
                opened.connection.setKeepAlive(ALIVE_INTERVAL, ALIVE_COUNT)
            self._register_callbacks(opened)
        except BaseException:
            _close(opened)
            raise
        return opened

    def _abandon(self, opening: "Call[_Opened]") -> None:
        """Have the next question connect anew, and this connection closed if it comes after all."""
        with self._lock:
            if self._opening is not opening:
                return
            self._opening = None
            self._unanswered.append(opening)
        opening.when_ended(lambda: _close(opening.result(0)))

    def _register_callbacks(self, opened: "_Opened") -> None:
        ask, events, add = opened.connection.domainEventRegisterAny, self._events, opened.callbacks.append
        add(ask(None, EventKind.LIFECYCLE, events.on_lifecycle, None))
        add(ask(None, EventKind.BLOCK_JOB_2, events.on_block_job, None))
        add(ask(None, EventKind.METADATA_CHANGE, events.on_metadata_change, None))

    def _finish_opening(self, opening: "Call[_Opened]", opened: "_Opened | None") -> None:
        with self._lock:
            if self._opening is not opening:
                return
            self._opening = None
            if opened is not None:
                self._connection, self._callbacks = opened.connection, opened.callbacks

    def _disconnect(self) -> None:
        if self._connection is None:
            return
        self._events.record_disconnect()
        opened = _Opened(self._connection, self._callbacks)
        # Nobody waits for the goodbye to a daemon that may hang. Without a thread for it, the next question drops it.
        closing = Call("libvirt close", lambda: _close(opened))
        self._connection, self._callbacks = None, []
        closing.wait(_CLOSE_SECONDS)

    def _translate(self, error: LibvirtError, connection: Connection, instance_id: str) -> Exception:
        words = _message(error)
        if error.get_error_code() == NO_DOMAIN:
            return InstanceNotFound(instance_id) if instance_id else HypervisorError(instance_id, words)
        if not _is_alive(libvirt_binding.load(), connection):
            return HypervisorUnavailable(instance_id, f"the connection to {self._uri} is lost: {words}")
        return HypervisorError(instance_id, words)


class _Opened(NamedTuple):
    connection: Connection
    callbacks: list[int]
    """The callbacks that are told of events."""


def _close(opened: _Opened) -> None:
    libvirt_error = libvirt_binding.load().libvirtError
    for callback in opened.callbacks:
        with suppress(libvirt_error):
            opened.connection.domainEventDeregisterAny(callback)
    with suppress(libvirt_error):
        opened.connection.close()


def _is_alive(binding: LibvirtBinding, connection: Connection) -> bool:
    try:
        return bool(connection.isAlive())
    except binding.libvirtError:
        return False


def _message(error: LibvirtError) -> str:
    """What libvirt says, in one line."""
    return " ".join((error.get_error_message() or "it does not say why").split())[:_MAX_MESSAGE]


def _start_event_loop(binding: LibvirtBinding) -> None:
    """Have libvirt's event loop run in this process, once; it must be there before the first connection is."""
    global _event_loop  # noqa: PLW0603 (libvirt has one loop a process)
    with _starting:
        if _event_loop is None:
            binding.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised, not printed
            binding.virEventRegisterDefaultImpl()
            _event_loop = repeat(
                "libvirt events",
                1.0,
                lambda: _run_event_loop(binding),
                on_failure=lambda error: log.warning("libvirt's event loop has stumbled: %s", error),
            )


def _run_event_loop(binding: LibvirtBinding) -> None:
    while True:
        binding.virEventRunDefaultImpl()
