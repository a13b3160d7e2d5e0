"""A guest that writes to C: all the time is bundled, by way of the whole service, with each setting of `downtime`.

It is shut down for as long as its volume is read, or only until it runs on an overlay. Windows itself cannot run here;
what stands for it is tests/support/libvirt/guest.py.
"""

from dataclasses import dataclass

import pytest

from support.libvirt.guest_disk import OFF, GuestDisk
from support.libvirt.guest_domain import Domain
from support.libvirt.libvirt_service import Bundle, LibvirtService

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]


@dataclass
class Story:
    """What a guest went through, and what it was then."""

    domain: Domain
    bundle: Bundle
    notice: str
    """What the operator was told of the task."""
    drive: GuestDisk
    """C: in the bundle."""
    before: str
    """The boot that was shut down for it."""
    written_before: int
    again: str
    """The boot after it."""
    as_before: bool
    """Whether the domain was defined in the end as it had been, and had the same files."""
    on_overlay: bool = False
    written_meanwhile: int = 0


@pytest.fixture(scope="module")
def stories(libvirtd, guest, tmp_path_factory):
    """One story for each setting, each told when it is first asked for."""
    service, told = LibvirtService(tmp_path_factory.mktemp("service"), libvirtd), {}

    def story(downtime):
        if downtime not in told:
            domain = service.domain(downtime, guest).start()
            service.start(capture_mode=downtime)
            told[downtime] = tell(service, domain, meanwhile=downtime == "overlay")
            service.stop()
        return told[downtime]

    yield story
    service.stop()
    for tale in told.values():
        tale.domain.remove()


def tell(service, domain, *, meanwhile):
    before = domain.await_boot()
    written_before = domain.await_written(before)
    definition, files, sources = domain.definition(), domain.files(), domain.sources()
    bundle = service.bundle(domain)
    seen = {}
    if meanwhile:
        with service.standing_still(bundle):
            again = domain.await_boot(after=[before])
            seen = {"written_meanwhile": domain.await_written(again), "on_overlay": domain.sources() != sources}
    bundle.completed()
    as_before = (domain.definition(), domain.files()) == (definition, files)
    again = domain.await_boot(after=[before])
    as_before = as_before and domain.sources() == sources
    return Story(domain, bundle, bundle.notice(), bundle.drive(), before, written_before, again, as_before, **seen)


@pytest.fixture(params=["offline", "overlay"])
def story(request, stories):
    return stories(request.param)


def test_bundle_ends_with_last_line_before_shutdown(story):
    *numbers, last = story.drive.words(story.before)
    assert last == OFF
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert len(numbers) >= story.written_before
    assert story.drive.words(story.again) == []


def test_bundled_volume_is_clean_and_task_has_no_warning(story):
    assert story.drive.is_clean()
    assert story.notice == ""


def test_bundle_does_not_contain_second_disk(story):
    assert not story.drive.has_mark()
    assert story.bundle.opened().stat().st_size == story.domain.disk.stat().st_size


def test_guest_keeps_writing_after_bundling(story):
    assert story.as_before
    last = story.domain.await_written(story.again)
    assert story.domain.boots == [story.before, story.again]
    words = story.domain.look().words(story.again)
    assert words[:last] == [str(number + 1) for number in range(last)]


def test_writes_during_read_are_merged_into_volume(stories):
    story = stories("overlay")
    assert story.on_overlay
    words = story.domain.look().words(story.again)
    assert words[: story.written_meanwhile] == [str(number + 1) for number in range(story.written_meanwhile)]
    assert story.written_meanwhile >= 2


def test_guest_made_from_bundle_boots_with_its_data(stories, guest):
    story = stories("overlay")
    original = story.domain
    twin = Domain(
        original.host, "twin", original.folder / "twin", guest, original.account_id,
        root=story.bundle.opened(), boots_itself=True,
    ).start()  # fmt: skip
    try:
        boot = twin.await_boot()
        assert f"FIRST-BOOT {story.before}\n" in twin.said
        twin.await_written(boot)
        assert twin.look().words(story.before)[-1] == OFF
    finally:
        twin.remove()
