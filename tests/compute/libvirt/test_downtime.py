"""A guest that writes to C: all the time is bundled through the whole service, in each `capture_mode`.

The guest is off while its volume is read, or only until it runs on an overlay. Windows cannot run here;
tests/support/libvirt/guest.py takes its place.
"""

from dataclasses import dataclass

import pytest

from support.libvirt.guest_disk import OFF, GuestDisk
from support.libvirt.guest_domain import Domain
from support.libvirt.libvirt_service import Bundle, LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]


@dataclass
class Record:
    """What happened to a guest, and the result."""

    domain: Domain
    bundle: Bundle
    warning: str
    """The warning of the task."""
    drive: GuestDisk
    """C: in the bundle."""
    before: str
    """Id of the boot that was shut down for the bundle."""
    written_before: int
    again: str
    """Id of the boot after the bundle."""
    as_before: bool
    """Whether the domain has the same definition and files as before."""
    on_overlay: bool = False
    written_meanwhile: int = 0


@pytest.fixture(scope="module")
def records(libvirtd, guest, tmp_path_factory):
    """Return a function that bundles a guest once for each mode, and returns the record."""
    service, records_by_mode = LibvirtService(tmp_path_factory.mktemp("service"), libvirtd), {}

    def record(capture_mode):
        if capture_mode not in records_by_mode:
            domain = service.domain(capture_mode, guest).start()
            service.start(capture_mode=capture_mode)
            records_by_mode[capture_mode] = bundle_guest(service, domain, meanwhile=capture_mode == "overlay")
            service.stop()
        return records_by_mode[capture_mode]

    yield record
    service.stop()
    for made in records_by_mode.values():
        made.domain.remove()


def bundle_guest(service, domain, *, meanwhile):
    before = domain.await_boot()
    written_before = domain.await_written(before)
    definition, files, sources = domain.definition(), domain.files(), domain.sources()
    bundle = service.bundle(domain)
    seen = {}
    if meanwhile:
        with service.paused_during_read(bundle):
            again = domain.await_boot(after=[before])
            seen = {"written_meanwhile": domain.await_written(again), "on_overlay": domain.sources() != sources}
    bundle.completed()
    as_before = (domain.definition(), domain.files()) == (definition, files)
    again = domain.await_boot(after=[before])
    as_before = as_before and domain.sources() == sources
    return Record(domain, bundle, bundle.warning(), bundle.drive(), before, written_before, again, as_before, **seen)


@pytest.fixture(params=["offline", "overlay"])
def record(request, records):
    return records(request.param)


def test_bundle_ends_with_last_line_before_shutdown(record):
    *numbers, last = record.drive.words(record.before)
    assert last == OFF
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert len(numbers) >= record.written_before
    assert record.drive.words(record.again) == []


def test_bundled_volume_is_clean_and_task_has_no_warning(record):
    assert record.drive.is_clean()
    assert record.warning == ""


def test_bundle_does_not_contain_second_disk(record):
    assert not record.drive.has_mark()
    assert record.bundle.opened().stat().st_size == record.domain.disk.stat().st_size


def test_guest_keeps_writing_after_bundling(record):
    assert record.as_before
    last = record.domain.await_written(record.again)
    assert record.domain.boots == [record.before, record.again]
    words = record.domain.read_disk().words(record.again)
    assert words[:last] == [str(number + 1) for number in range(last)]


def test_writes_during_read_are_merged_into_volume(records):
    record = records("overlay")
    assert record.on_overlay
    words = record.domain.read_disk().words(record.again)
    assert words[: record.written_meanwhile] == [str(number + 1) for number in range(record.written_meanwhile)]
    assert record.written_meanwhile >= 2


def test_guest_made_from_bundle_boots_with_its_data(records, guest):
    record = records("overlay")
    original = record.domain
    twin = Domain(
        original.host, "twin", original.folder / "twin", guest, original.account_id,
        root=record.bundle.opened(), boots_itself=True,
    ).start()  # fmt: skip
    try:
        boot = twin.await_boot()
        assert f"FIRST-BOOT {record.before}\n" in twin.output
        twin.await_written(boot)
        assert twin.read_disk().words(record.before)[-1] == OFF
    finally:
        twin.remove()
