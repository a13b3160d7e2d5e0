"""The rights that the how-tos give the service's user on root volumes, in the hands of a libvirt as Debian sets it up.

It runs guests as a user of their own, gives that user the images of a guest that is started, and takes them back when
it is off. The lines are the how-tos' own; a number stands for the user, whom nothing has to have made.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support.libvirt import libvirt_host
from support.libvirt.libvirt_test_driver import domain_xml
from support.required_programs import require, require_root, unavailable

pytestmark = pytest.mark.libvirt

HOWTOS = Path(__file__).parents[2] / "docs" / "howto"
THRAVE, QEMU = 64999, 64055
POOL, IMAGE = "/var/lib/libvirt/images", "win-web.qcow2"
DEBIANS = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
"""As the tests' own libvirtd, but for the user of guests and who owns their images: what Debian has."""


@pytest.fixture(scope="module")
def host():
    require_root("run guests and the service as two users")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libvirt_host, "_QEMU_CONF", DEBIANS)
        patch.setattr(libvirt_host, "_AS_ROOT", "")
        with libvirt_host.running_host() as host:
            host.folder.chmod(0o711)
            yield host


@pytest.fixture
def image(host, request):
    """An image as `virsh vol-create` makes it, in a folder as Debian's package does."""
    qemu_img = require("qemu-img", package="qemu-utils")
    pool = host.folder / f"pool-{request.node.name}"
    pool.mkdir(mode=0o711)
    image = pool / IMAGE
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    image.chmod(0o600)
    return image


def define(host, name, image):
    definition = host.folder / "domain.xml"
    definition.write_text(domain_xml(name, image, kind="qemu", image_format="qcow2"))
    host.virsh("define", definition)


def give_rights(howto, image):
    """Run the lines of a how-to that set ACLs."""
    setfacl = require("setfacl", package="acl")
    lines = re.findall(r"^    setfacl (.*)$", (HOWTOS / howto).read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.replace(POOL, str(image.parent)).replace("u:thrave:", f"u:{THRAVE}:"))
        done = subprocess.run([setfacl, *words], capture_output=True, text=True, check=False)
        if "not supported" in done.stderr:
            unavailable(f"no ACLs can be set in {image.parent}")
        assert done.returncode == 0, done.stderr


def as_thrave(*argv):
    """Whether a command succeeds as the service's user."""
    setpriv = ["setpriv", f"--reuid={THRAVE}", f"--regid={THRAVE}", "--clear-groups", "--bounding-set=-all"]
    return subprocess.run([*setpriv, *map(str, argv)], capture_output=True, check=False).returncode == 0


def can_read(image):
    return as_thrave("dd", f"if={image}", "of=/dev/null", "count=1")


def test_service_user_reads_an_image_of_a_running_or_stopped_guest(host, image):
    define(host, "win-web", image)
    assert not can_read(image)
    give_rights("bundle-libvirt-guests.md", image)
    seen = []
    for words in ((), ("start", "win-web"), ("destroy", "win-web")):
        host.virsh(*words or ["list"])
        seen.append((image.stat().st_uid, can_read(image)))
    assert seen == [(0, True), (QEMU, True), (0, True)]
    assert not as_thrave("touch", image)


def test_service_user_creates_and_merges_an_overlay_also_after_a_power_loss(host, image):
    give_rights("keep-guests-running.md", image)
    overlay = image.with_name(f".{IMAGE}.thrave.qcow2")
    assert as_thrave("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay)
    assert as_thrave("chmod", f"{image.stat().st_mode & 0o777:o}", overlay)  # as `overlay_files.create`
    define(host, "win-on-overlay", overlay)
    host.virsh("start", "win-on-overlay")
    host.lose_power()
    assert {image.stat().st_uid, overlay.stat().st_uid} == {QEMU}
    assert as_thrave("qemu-img", "commit", "-q", "-d", "-f", "qcow2", overlay)
    assert as_thrave("rm", overlay)
    host.power_on()
