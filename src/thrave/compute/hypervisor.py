"""The connection to libvirt: made when it is first needed, and again when it was lost; its errors in our words.

Any thread may ask. Nothing waits for ever: libvirt has so long to take the connection, and is asked for a sign of
life from then on, so that a daemon that has died or hangs ends every question with an error. The next question
connects again; nothing here has to be started anew when libvirtd is. Whoever is told of a domain's events is told by
one thread of this process, which libvirt needs also for those signs of life.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, cast

from thrave.compute import libvirt_binding
from thrave.compute.domain_events import DomainEvents
from thrave.compute.errors import HypervisorError, HypervisorGoneError, InstanceNotFound
from thrave.compute.libvirt_binding import Binding, Connection, LibvirtError
from thrave.compute.libvirt_numbers import NO_DOMAIN, Event
from thrave.concurrency import Background, Call, CallTimeoutError, repeat

CONNECT_SECONDS = 30.0
MAX_SILENT = 4  # attempts to connect that are not answered; each has a thread
ALIVE_INTERVAL, ALIVE_COUNT = 5, 3  # seconds, and how many signs of life may be missing
_SILENCE = float(ALIVE_INTERVAL * (ALIVE_COUNT + 1))  # seconds after which a silent connection is taken for lost
_CLOSE_SECONDS = 1.0
_WORDS = 300  # characters of libvirt's that go into a message

log = logging.getLogger(__name__)

_starting = threading.Lock()
_event_loop: Background | None = None


class Hypervisor:
    """One libvirt.

    Args:
        uri: Which, in libvirt's words.
        events: Where events go.
    """

    def __init__(self, uri: str, events: DomainEvents) -> None:
        self._uri = uri
        self._events = events
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._coming: Call[_Opened] | None = None
        self._silent: list[Call[_Opened]] = []
        self._listening: list[int] = []

    @contextmanager
    def asked(self, instance_id: str = "") -> Iterator[Connection]:
        """The connection, for the length of some questions; what libvirt says against them is an error of ours.

        Args:
            instance_id: Whom they are about.

        Raises:
            HypervisorGoneError: There is no connection, or it was lost meanwhile.
            InstanceNotFound: There is no such domain.
            HypervisorError: libvirt refuses, in its words.
        """
        binding = libvirt_binding.load()
        connection = self._connected(binding, instance_id)
        began = time.monotonic()
        try:
            yield connection
        except binding.libvirtError as error:
            translated = self._translated(cast("LibvirtError", error), connection, instance_id)
            if isinstance(translated, HypervisorGoneError):
                translated.waited = min(time.monotonic() - began, _SILENCE)
            raise translated from error

    def close(self) -> None:
        """Let go of the connection. A question that comes later connects again."""
        with self._lock:
            self._drop()

    def _connected(self, binding: Binding, instance_id: str) -> Connection:
        with self._lock:
            if self._connection is not None and _is_alive(binding, self._connection):
                return self._connection
            self._drop()
            coming = self._coming = self._coming or self._begin(binding, instance_id)
        began = time.monotonic()
        try:
            opened = coming.result(CONNECT_SECONDS)
        except CallTimeoutError:
            self._abandon(coming)
            raise HypervisorGoneError(
                instance_id,
                f"{self._uri} has not answered within {CONNECT_SECONDS:.0f} seconds",
                waited=CONNECT_SECONDS,
            ) from None
        except binding.libvirtError as error:
            self._arrived(coming, None)
            raise HypervisorGoneError(
                instance_id,
                f"no connection to {self._uri}: {_words(cast('LibvirtError', error))}",
                waited=time.monotonic() - began,
            ) from error
        except BaseException:
            if not coming.is_running:  # it failed, in whatever way: the next question connects anew
                self._arrived(coming, None)
            raise
        self._arrived(coming, opened)
        return opened.connection

    def _begin(self, binding: Binding, instance_id: str) -> "Call[_Opened]":
        """Connect in a thread of its own: nothing ends a connecting that is not answered."""
        self._silent = [call for call in self._silent if call.is_running]
        if len(self._silent) >= MAX_SILENT:
            raise HypervisorGoneError(instance_id, f"{self._uri} does not answer: {len(self._silent)} attempts wait")
        _run_events(binding)
        return Call("libvirt open", lambda: self._open(binding))

    def _open(self, binding: Binding) -> "_Opened":
        opened = _Opened(binding.open(self._uri), [])
        try:
            with suppress(binding.libvirtError):  # a driver within this process needs no signs of life
                opened.connection.setKeepAlive(ALIVE_INTERVAL, ALIVE_COUNT)
            self._listen(opened)
        except BaseException:
            _close(opened)
            raise
        return opened

    def _abandon(self, coming: "Call[_Opened]") -> None:
        """Have the next question connect anew, and this connection closed if it comes after all."""
        with self._lock:
            if self._coming is not coming:
                return
            self._coming = None
            self._silent.append(coming)
        coming.when_ended(lambda: _close(coming.result(0)))

    def _listen(self, opened: "_Opened") -> None:
        ask, events, add = opened.connection.domainEventRegisterAny, self._events, opened.listening.append
        add(ask(None, Event.LIFECYCLE, events.lifecycle, None))
        add(ask(None, Event.BLOCK_JOB_2, events.block_job, None))
        add(ask(None, Event.METADATA_CHANGE, events.metadata, None))

    def _arrived(self, coming: "Call[_Opened]", opened: "_Opened | None") -> None:
        with self._lock:
            if self._coming is not coming:
                return
            self._coming = None
            if opened is not None:
                self._connection, self._listening = opened.connection, opened.listening

    def _drop(self) -> None:
        if self._connection is None:
            return
        self._events.lose()
        opened = _Opened(self._connection, self._listening)
        # Nobody waits for the goodbye to a daemon that may hang. Without a thread for it, the next question drops it.
        closing = Call("libvirt close", lambda: _close(opened))
        self._connection, self._listening = None, []
        closing.wait(_CLOSE_SECONDS)

    def _translated(self, error: LibvirtError, connection: Connection, instance_id: str) -> Exception:
        words = _words(error)
        if error.get_error_code() == NO_DOMAIN:
            return InstanceNotFound(instance_id) if instance_id else HypervisorError(instance_id, words)
        if not _is_alive(libvirt_binding.load(), connection):
            return HypervisorGoneError(instance_id, f"the connection to {self._uri} is lost: {words}")
        return HypervisorError(instance_id, words)


class _Opened(NamedTuple):
    connection: Connection
    listening: list[int]
    """The callbacks that are told of events."""


def _close(opened: _Opened) -> None:
    gone = libvirt_binding.load().libvirtError
    for callback in opened.listening:
        with suppress(gone):
            opened.connection.domainEventDeregisterAny(callback)
    with suppress(gone):
        opened.connection.close()


def _is_alive(binding: Binding, connection: Connection) -> bool:
    try:
        return bool(connection.isAlive())
    except binding.libvirtError:
        return False


def _words(error: LibvirtError) -> str:
    """What libvirt says, in one line."""
    return " ".join((error.get_error_message() or "it does not say why").split())[:_WORDS]


def _run_events(binding: Binding) -> None:
    """Have libvirt's event loop run in this process, once; it must be there before the first connection is."""
    global _event_loop  # noqa: PLW0603 (libvirt has one loop a process)
    with _starting:
        if _event_loop is None:
            binding.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised, not printed
            binding.virEventRegisterDefaultImpl()
            _event_loop = repeat(
                "libvirt events",
                1.0,
                lambda: _turn(binding),
                on_failure=lambda error: log.warning("libvirt's event loop has stumbled: %s", error),
            )


def _turn(binding: Binding) -> None:
    while True:
        binding.virEventRunDefaultImpl()
