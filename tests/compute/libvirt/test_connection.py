"""Connections to libvirt that fail halfway, and a machine without free threads. Does not need libvirt."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from thrave.compute.errors import HypervisorUnavailable
from thrave.compute.libvirt import binding, domain_cache
from thrave.compute.libvirt import connection as hypervisor
from thrave.compute.libvirt.connection import DomainEvents, LibvirtConnection
from thrave.compute.libvirt.domain_cache import DomainCache, MetadataWriter
from thrave.concurrency import NoThreadError


class RefusedError(Exception):
    """Takes the place of libvirtError."""

    def get_error_message(self):
        return "no"


class Connection:
    """A connection that raises `fault` at the step `at`; open until it is closed."""

    def __init__(self, fault=None, at=""):
        self.fault, self.at, self.callbacks, self.is_open = fault, at, set(), True

    def setKeepAlive(self, *_options):  # noqa: N802 (libvirt's name)
        self._fail("keep alive")

    def domainEventRegisterAny(self, _domain, event, *_callback):  # noqa: N802 (libvirt's name)
        self._fail(f"event {len(self.callbacks)}")
        self.callbacks.add(event)
        return event

    def domainEventDeregisterAny(self, callback):  # noqa: N802 (libvirt's name)
        self.callbacks.remove(callback)

    def isAlive(self):  # noqa: N802 (libvirt's name)
        return self.is_open

    def close(self):
        self.is_open = False

    def _fail(self, moment):
        if self.at == moment:
            raise self.fault


@pytest.fixture
def coming(monkeypatch):
    """A list of the connections that libvirt returns in turn; errors in it are raised."""
    connections = []

    def connect(_uri):
        connection = connections.pop(0)
        if isinstance(connection, BaseException):
            raise connection
        return connection

    monkeypatch.setattr(hypervisor, "_start_event_loop", lambda _binding: None)
    monkeypatch.setattr(binding, "load", lambda: SimpleNamespace(open=connect, libvirtError=RefusedError))
    return connections


@pytest.mark.parametrize("fault", [RefusedError(), MemoryError(), OSError(errno.EMFILE, "too many files")], ids=repr)
@pytest.mark.parametrize("at", ["open", "keep alive", "event 0", "event 2"])
def test_failed_connection_is_closed_and_next_call_reconnects(coming, fault, at):
    failing, good = Connection(fault, at), Connection()
    coming.extend([fault if at == "open" else failing, good])
    asking = LibvirtConnection("simulated:///", DomainEvents())
    try:
        with asking.session() as connection:
            assert (at, type(fault)) == ("keep alive", RefusedError), "a driver may have no keepalive"
            assert connection is failing
            return
    except (HypervisorUnavailable, MemoryError, OSError):
        pass
    with asking.session() as connection:
        assert connection is good
    assert at == "open" or (failing.is_open, failing.callbacks) == (False, set())


def test_lost_connection_is_closed_later_if_no_thread_can_be_started(coming, monkeypatch):
    lost, good = Connection(), Connection()
    coming.extend([lost, good])
    asking = LibvirtConnection("simulated:///", DomainEvents())
    with asking.session():
        lost.isAlive = lambda: False
    with monkeypatch.context() as patched:
        patched.setattr(hypervisor, "Call", no_thread)
        with pytest.raises(NoThreadError), asking.session():
            pass
    with asking.session() as connection:
        assert connection is good
    assert not lost.is_open


@pytest.mark.parametrize(
    "error",
    [HypervisorUnavailable("i-00000000", "gone"), NoThreadError(errno.EAGAIN, "no thread"), MemoryError()],
    ids=repr,
)
def test_changed_domain_is_read_again_after_failure(coming, monkeypatch, error):
    def fail(*_look):
        raise error

    coming.append(Connection())
    events = DomainEvents()
    table = DomainCache(LibvirtConnection("simulated:///", events), events, MetadataWriter(Path()))
    monkeypatch.setattr(table, "_refresh_all", lambda _connection: None)
    table.list()
    table._disconnects, table._next_full_refresh = events.disconnects, float("inf")
    events.mark_changed({"changed"})
    with monkeypatch.context() as patched:
        patched.setattr(domain_cache, "Call", fail)
        with pytest.raises(type(error)):
            table.list()
    assert events.take_changed() == {"changed"}


def no_thread(*_call):
    raise NoThreadError(errno.EAGAIN, "no thread can be started")
