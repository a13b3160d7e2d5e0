"""Our element in a domain's metadata, changed while others may be changing it too: one change after the other.

It is written into the running domain and into what it is started from the next time, so that both say the same. Between
processes a lock file keeps the changes apart; a person with an editor is not kept apart.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from thrave.compute import libvirt_binding
from thrave.compute.domain_metadata import KEY, NAMESPACE, Record, read_record, write_record
from thrave.compute.domain_xml import DomainFaultError, read_definition
from thrave.compute.errors import InstanceHeld, InvalidDescriptionError
from thrave.compute.libvirt_binding import Domain
from thrave.compute.libvirt_numbers import METADATA_ELEMENT, Affect, XmlFlag
from thrave.compute.locks import LOCK_TIMEOUT, locked

_TRIES = 3  # a domain may go on or off between two questions


class DomainRecords:
    """The records of a host's domains.

    Args:
        lock_folder: Where lock files stand.
    """

    def __init__(self, lock_folder: Path) -> None:
        self._lock_folder = lock_folder

    def alone(self, instance_id: str) -> AbstractContextManager[None]:
        """Change nothing for the length of the block but by whoever has this lock.

        Waits for the lock. Raises InstanceHeld if somebody has it for longer than a change takes.
        """
        return self._locked(instance_id, "change", wait=True)

    def merging(self, instance_id: str) -> AbstractContextManager[None]:
        """Merge an instance's overlay for the length of the block, as the only one. Raises InstanceHeld if one does."""
        return self._locked(instance_id, "merge", wait=False)

    @contextmanager
    def _locked(self, instance_id: str, purpose: str, *, wait: bool) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._lock_folder / f"{instance_id}.{purpose}", wait=wait))
            except BlockingIOError:
                raise InstanceHeld(instance_id, waited=LOCK_TIMEOUT if wait else 0.0) from None
            yield

    def change(self, domain: Domain, instance_id: str, change: Callable[[Record], Record]) -> None:
        """Write what `change` makes of the record that is there; where there is none, nothing.

        Raises:
            InvalidDescriptionError: What is there cannot be read.
            libvirtError: libvirt refuses.
        """
        with self.alone(instance_id):
            before = record_of(domain, instance_id)
            after = before and change(before)
            if after != before:
                _write(domain, after)

    def replace(self, domain: Domain, instance_id: str, record: Record | None) -> None:
        """Write a record, or remove it, whatever stands there. Raises libvirtError."""
        with self.alone(instance_id):
            _write(domain, record)


def record_of(domain: Domain, instance_id: str) -> Record | None:
    """What a domain's metadata say now. Raises as `DomainRecords.change`."""
    with understood(domain, instance_id):
        return read_record(read_definition(domain.XMLDesc(XmlFlag.INACTIVE if domain.isPersistent() else 0)).metadata)


@contextmanager
def understood(domain: Domain, instance_id: str) -> Iterator[None]:
    """Raise InvalidDescriptionError with what cannot be understood of a domain in the block."""
    try:
        yield
    except DomainFaultError as fault:
        raise InvalidDescriptionError(instance_id, f"the domain {domain.name()}", [str(fault)]) from None


def _write(domain: Domain, record: Record | None) -> None:
    text = None if record is None else write_record(record)
    for attempt in range(_TRIES):
        affected = _affected(domain)
        try:
            domain.setMetadata(METADATA_ELEMENT, text, KEY, NAMESPACE, affected)
        except libvirt_binding.load().libvirtError:
            if attempt == _TRIES - 1 or _affected(domain) == affected:
                raise
        else:
            return


def _affected(domain: Domain) -> Affect:
    live = Affect.LIVE if domain.isActive() else Affect(0)
    return live | (Affect.CONFIG if domain.isPersistent() else Affect(0))
