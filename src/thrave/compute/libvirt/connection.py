"""The connection to libvirt: connects when needed, reconnects after a loss, and records events of domains.

Any thread may use the connection, and no call waits for ever: connecting has a timeout, and keepalive messages detect a
daemon that has died or hangs, which ends every call with an error. The next call connects again; nothing has to be
restarted after a restart of libvirtd. One thread of the process runs libvirt's event loop, which also sends the
keepalive messages. Callbacks only record an event, since the event loop must not wait for a response of libvirt. Events
are lost while there is no connection; `disconnects` counts how often that was so.
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
from thrave.concurrency import (
    Call,
    CallTimeoutError,
    RunningThread,
    monotonic,
    new_condition,
    new_lock,
    start_repeating,
    utc_now,
)


@dataclass(frozen=True)
class DomainHistory:
    """Events of a domain since this process has received events.

    Attributes:
        starts: Number of starts.
        jobs: Number of events of block jobs (ready, completed, failed, cancelled) by target of the disk.
        started: Time of the last start.
        stopped: Why the domain has stopped since then, a `StoppedDetail`; None: it has not.
    """

    starts: int = 0
    jobs: Mapping[str, int] = field(default_factory=dict)
    started: datetime | None = None
    stopped: int | None = None


class DomainEvents:
    """Records events of domains. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = new_condition()
        self._histories: dict[str, DomainHistory] = defaultdict(DomainHistory)
        self._changed: set[str] = set()
        self._disconnects = 1  # there is no connection yet

    @property
    def disconnects(self) -> int:
        """How often there was no connection. Events may be missing since the last time."""
        return self._disconnects

    def record_disconnect(self) -> None:
        """Record that there is no connection."""
        with self._lock:
            self._disconnects += 1

    def history(self, uuid: str) -> DomainHistory:
        """Return the events of a domain."""
        with self._lock:
            return self._histories.get(uuid, DomainHistory())

    def wait_for_start(self, uuid: str, starts: int, timeout: float) -> datetime | None:
        """Wait for the event of the start that follows `starts` starts; return its time, or None after the timeout."""
        with self._lock:
            self._lock.wait_for(lambda: self._histories[uuid].starts > starts, timeout)
            return self._histories[uuid].started if self._histories[uuid].starts > starts else None

    def take_changed(self) -> set[str]:
        """Return the UUIDs of the domains with events since the last call."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def mark_changed(self, uuids: set[str]) -> None:
        """Add domains to the result of the next `take_changed`, as if they had events."""
        with self._lock:
            self._changed |= uuids

    def on_lifecycle(self, _connection: Connection, domain: Domain, event: int, detail: int, _opaque: object) -> None:
        """Record a lifecycle event."""
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
        """Record an event of a block job."""
        uuid = domain.UUIDString()
        with self._lock:
            self._changed.add(uuid)
            jobs = self._histories[uuid].jobs
            self._histories[uuid] = replace(self._histories[uuid], jobs={**jobs, disk: jobs.get(disk, 0) + 1})

    def on_metadata_change(
        self, _connection: Connection, domain: Domain, _kind: int, _namespace: str, _opaque: object
    ) -> None:
        """Record that a domain's metadata have changed."""
        with self._lock:
            self._changed.add(domain.UUIDString())


CONNECT_TIMEOUT = 30.0  # seconds
MAX_PENDING_CONNECTS = 4  # abandoned attempts to connect; each has a thread
KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 5, 3  # seconds, and how many responses may be missing


_KEEPALIVE_TIMEOUT = float(
    KEEPALIVE_INTERVAL * (KEEPALIVE_COUNT + 1)
)  # seconds without response after which a connection is lost
_CLOSE_TIMEOUT = 1.0  # seconds
_MAX_MESSAGE = 300  # characters of libvirt's message in an error

log = logging.getLogger(__name__)


_starting = new_lock()


_event_loop: RunningThread | None = None


class LibvirtConnection:
    """A connection to one libvirt daemon.

    Args:
        uri: libvirt's connection URI.
        events: Records the events of the domains.
    """

    def __init__(self, uri: str, events: DomainEvents) -> None:
        self._uri = uri
        self._events = events
        self._lock = new_lock()
        self._connection: Connection | None = None
        self._opening: Call[_Opened] | None = None
        self._pending: list[Call[_Opened]] = []
        self._callbacks: list[int] = []

    @contextmanager
    def session(self, instance_id: str = "") -> Iterator[Connection]:
        """Yield the connection, and translate libvirt's errors in the block.

        Args:
            instance_id: For the errors.

        Raises:
            HypervisorUnavailable: There is no connection, or it was lost in the block.
            InstanceNotFound: There is no such domain.
            HypervisorError: libvirt refuses; with its message.
        """
        binding = libvirt_binding.load()
        connection = self._connect(binding, instance_id)
        started_at = monotonic()
        try:
            yield connection
        except binding.libvirtError as error:
            translated = self._translate(cast("LibvirtError", error), connection, instance_id)
            if isinstance(translated, HypervisorUnavailable):
                translated.waited = min(monotonic() - started_at, _KEEPALIVE_TIMEOUT)
            raise translated from error

    def close(self) -> None:
        """Close the connection. The next call connects again."""
        with self._lock:
            self._disconnect()

    def _connect(self, binding: LibvirtBinding, instance_id: str) -> Connection:
        with self._lock:
            if self._connection is not None and _is_alive(binding, self._connection):
                return self._connection
            self._disconnect()
            opening = self._opening = self._opening or self._start_opening(binding, instance_id)
        started_at = monotonic()
        try:
            opened = opening.result(CONNECT_TIMEOUT)
        except CallTimeoutError:
            self._abandon(opening)
            raise HypervisorUnavailable(
                instance_id,
                f"{self._uri} has not responded within {CONNECT_TIMEOUT:.0f} seconds",
                waited=CONNECT_TIMEOUT,
            ) from None
        except binding.libvirtError as error:
            self._finish_opening(opening, None)
            raise HypervisorUnavailable(
                instance_id,
                f"no connection to {self._uri}: {_message(cast('LibvirtError', error))}",
                waited=monotonic() - started_at,
            ) from error
        except BaseException:
            if not opening.is_running:  # it failed with any error: the next call connects again
                self._finish_opening(opening, None)
            raise
        self._finish_opening(opening, opened)
        return opened.connection

    def _start_opening(self, binding: LibvirtBinding, instance_id: str) -> "Call[_Opened]":
        """Connect in another thread, since an attempt without response cannot be interrupted."""
        self._pending = [call for call in self._pending if call.is_running]
        if len(self._pending) >= MAX_PENDING_CONNECTS:
            raise HypervisorUnavailable(
                instance_id, f"{self._uri} does not respond: {len(self._pending)} attempts to connect are waiting"
            )
        _start_event_loop(binding)
        return Call("libvirt open", lambda: self._open(binding))

    def _open(self, binding: LibvirtBinding) -> "_Opened":
        opened = _Opened(binding.open(self._uri), [])
        try:
            with suppress(binding.libvirtError):  # a driver within this process needs no keepalive
                opened.connection.setKeepAlive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT)
            self._register_callbacks(opened)
        except BaseException:
            _close(opened)
            raise
        return opened

    def _abandon(self, opening: "Call[_Opened]") -> None:
        """Let the next call connect again, and close this connection if the attempt succeeds later."""
        with self._lock:
            if self._opening is not opening:
                return
            self._opening = None
            self._pending.append(opening)
        opening.add_done_callback(lambda: _close(opening.result(0)))

    def _register_callbacks(self, opened: "_Opened") -> None:
        register, events, add = opened.connection.domainEventRegisterAny, self._events, opened.callbacks.append
        add(register(None, EventKind.LIFECYCLE, events.on_lifecycle, None))
        add(register(None, EventKind.BLOCK_JOB_2, events.on_block_job, None))
        add(register(None, EventKind.METADATA_CHANGE, events.on_metadata_change, None))

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
        # Closing may hang, so another thread does it. If no thread can be started, the next call tries again.
        closing = Call("libvirt close", lambda: _close(opened))
        self._connection, self._callbacks = None, []
        closing.wait(_CLOSE_TIMEOUT)

    def _translate(self, error: LibvirtError, connection: Connection, instance_id: str) -> Exception:
        message = _message(error)
        if error.get_error_code() == NO_DOMAIN:
            return InstanceNotFound(instance_id) if instance_id else HypervisorError(instance_id, message)
        if not _is_alive(libvirt_binding.load(), connection):
            return HypervisorUnavailable(instance_id, f"the connection to {self._uri} is lost: {message}")
        return HypervisorError(instance_id, message)


class _Opened(NamedTuple):
    connection: Connection
    callbacks: list[int]
    """Ids of the registered callbacks."""


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
    """Return libvirt's message in one line."""
    return " ".join((error.get_error_message() or "no reason given").split())[:_MAX_MESSAGE]


def _start_event_loop(binding: LibvirtBinding) -> None:
    """Start libvirt's event loop once in this process. It must run before the first connection is opened."""
    global _event_loop  # noqa: PLW0603 (libvirt has one loop for each process)
    with _starting:
        if _event_loop is None:
            binding.registerErrorHandler(lambda _context, _error: None, None)  # instead of printing each error
            binding.virEventRegisterDefaultImpl()
            _event_loop = start_repeating(
                "libvirt events",
                1.0,
                lambda: _run_event_loop(binding),
                on_failure=lambda error: log.warning("libvirt event loop failed, restarting: %s", error),
            )


def _run_event_loop(binding: LibvirtBinding) -> None:
    while True:
        binding.virEventRunDefaultImpl()
