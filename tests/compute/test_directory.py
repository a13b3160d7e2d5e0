"""Instances in a folder: files that people write, and commands that do not do as they should."""

import errno
import json
import re
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrave.compute import description_files
from thrave.compute.description_files import DescriptionFiles
from thrave.compute.directory_driver import DirectoryDriver, new_instance_id
from thrave.compute.errors import (
    InstanceAlreadyExists,
    InstanceCommandFailed,
    InstanceNotFound,
    InvalidDescriptionError,
    RootVolumeInUse,
)
from thrave.compute.instance import InstanceState, OffReason, VolumeFile
from thrave.files import file_lock
from thrave.write_guard import start_guard

ID = "i-0123456789abcdef0"


def file_of(root, instance_id):
    return root / f"{instance_id}.json"


def edit(root, instance_id, **changes):
    path = file_of(root, instance_id)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_ids_are_as_ec2_gives_them():
    ids = {new_instance_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"i-[0-9a-f]{17}", made) for made in ids)


def test_an_id_of_eight_digits_is_taken(instances, added):
    assert instances.get(added(instance_id="i-1234abcd")).instance_id == "i-1234abcd"


def test_the_file_is_made_for_people(added, root, disk):
    added(instance_id=ID, state_command=("virsh", "domstate", "win"))
    text = file_of(root, ID).read_text()
    assert text.startswith('{\n  "instanceId": "i-0123456789abcdef0",\n  "accountId": "123456789012",\n')
    written = json.loads(text)
    assert written["rootVolume"] == {"path": str(disk), "format": "raw", "deviceName": "/dev/sda1"}
    assert written["stateCommand"] == ["virsh", "domstate", "win"]
    assert "stopCommand" not in written


def test_a_file_written_by_hand_needs_only_what_has_no_default(instances, root, disk):
    root.mkdir()
    file_of(root, ID).write_text(
        json.dumps({"instanceId": ID, "accountId": "123456789012", "rootVolume": {"path": str(disk)}})
    )
    found = instances.get(ID)
    assert (found.platform, found.root_device_type, found.state) == (None, "instance-store", InstanceState.RUNNING)


def test_a_file_edited_by_hand_counts_at_once(instances, added, root):
    added(instance_id=ID)
    edit(root, ID, state="stopped", platform=None)
    assert (instances.state(ID), instances.get(ID).platform) == (InstanceState.STOPPED, None)


def test_what_was_written_by_hand_outlives_a_change_of_state(instances, added, root):
    added(instance_id=ID)
    edit(root, ID, architecture="arm64")
    instances.request_stop(ID)
    assert instances.get(ID).architecture == "arm64"


FAULTS = {
    "instanceId": ("i-0123456789abcdef1", "instanceId: is not i-0123456789abcdef0"),
    "accountId": ("12345", "accountId: String should match"),
    "platform": ("linux", "platform: Input should be 'windows'"),
    "rootDeviceType": ("floppy", "rootDeviceType: Input should be 'instance-store' or 'ebs'"),
    "state": ("off", "state: Input should be 'pending', 'running'"),
    "launchTime": ("2026-11-23T10:00:00", "launchTime: Input should have timezone info"),
    "rootVolume": ({"path": "win.raw"}, r"rootVolume\.path: Value error, must be an absolute path"),
    "volumes": ([{"path": "/x", "fromat": "raw"}], r"volumes\.0\.fromat: Unexpected keyword"),
    "stopCommand": ("virsh shutdown win", "stopCommand: Input should be a valid array"),
    "startCommand": ([], "startCommand: Tuple should have at least 1 item"),
    "stopComand": (["true"], "stopComand: Unexpected keyword"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_refused_under_the_name_of_the_fault(instances, added, root, name):
    added(instance_id=ID)
    value, message = FAULTS[name]
    edit(root, ID, **{name: value})
    with pytest.raises(InvalidDescriptionError, match=rf"{ID}\.json does not describe an instance: {message}"):
        instances.get(ID)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"instanceId": "i-0123456789abcdef0"}'])
def test_a_broken_file_hides_no_other_instance_and_is_reported(instances, added, root, caplog, content):
    good = added()
    file_of(root, ID).write_bytes(content)
    assert [found.instance_id for found in instances.list()] == [good]
    assert f"{ID}.json" in caplog.text
    (error,) = instances.list_errors()
    assert f"{ID}.json" in str(error)


def test_a_file_that_may_not_be_read_is_reported(instances, added, root):
    added()
    file_of(root, ID).mkdir()
    (error,) = instances.list_errors()
    assert "Is a directory" in str(error)


def test_files_of_other_names_are_nobodys_business(instances, added, root):
    added()
    (root / "README.json").write_text("hello")
    (root / "i-0123456789abcdef0.json~").write_text("hello")
    assert len(instances.list()) == 1
    assert instances.list_errors() == []


@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_content_of_a_file_is_unforeseen(content):
    with pytest.raises(InvalidDescriptionError):
        description_files.read(ID, content, "it")


COMMANDS = st.none() | st.lists(st.text(max_size=20), min_size=1, max_size=4).map(tuple)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    commands=st.lists(
        st.none() | st.lists(st.text(max_size=20), min_size=1, max_size=4).map(tuple), min_size=3, max_size=3
    ),
    state=st.sampled_from(InstanceState),
    name=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20),
)
def test_what_is_written_is_read_again(described, commands, state, name):
    written = described(
        stop_command=commands[0],
        start_command=commands[1],
        state_command=commands[2],
        state=state,
        root_device_name=name,
    )
    assert description_files.read(written.instance_id, description_files.write(written), "it") == written


def test_an_id_can_be_taken_once(instances, added, described):
    added(instance_id=ID)
    with pytest.raises(InstanceAlreadyExists):
        instances.add(described(instance_id=ID, account_id="210987654321"))
    assert instances.get(ID).account_id == "123456789012"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_id": "i-123"}, "instanceId"),
        ({"account_id": "alice"}, "accountId"),
        ({"root_volume": VolumeFile(path="/nowhere/win.raw")}, "rootVolume: /nowhere/win.raw: No such file"),
        ({"root_volume": VolumeFile(path="/tmp")}, "neither a regular file nor a block device"),
        ({"root_volume": VolumeFile(path="/dev/null")}, "neither a regular file nor a block device"),
        ({"volumes": (VolumeFile(path="/nowhere/d.raw"),)}, "volumes: /nowhere/d.raw: No such file"),
        ({"stop_command": ()}, "stopCommand"),
    ],
)
def test_what_is_no_instance_is_not_added(instances, described, root, changes, message):
    changes = {
        name: VolumeFile(path=type(root)(value.path)) if isinstance(value, VolumeFile) else value
        for name, value in changes.items()
    }
    if "volumes" in changes:
        changes["volumes"] = tuple(VolumeFile(path=type(root)(volume.path)) for volume in changes["volumes"])
    with pytest.raises(InvalidDescriptionError, match=message):
        instances.add(described(**changes))
    assert instances.list() == []


def test_a_change_that_is_being_written_does_not_bring_a_removed_instance_back(instances, added, root):
    instance_id = added()
    with file_lock(root / ".locks" / f"{instance_id}.change", wait=True):
        removal = threading.Thread(target=instances.remove, args=(instance_id,))
        removal.start()
        removal.join(0.2)
        assert removal.is_alive()
    removal.join()
    with pytest.raises(InstanceNotFound):
        instances.get(instance_id)


STARTS_ONCE = ("sh", "-c", 'test ! -e "$0" && touch "$0" || { echo already active >&2; exit 1; }')


class Died(BaseException):
    """As far as the file can tell, the process was killed."""


@pytest.mark.parametrize("event", [Died(), OSError(errno.ENOSPC, "no space")])
def test_a_machine_whose_start_was_not_recorded_is_never_read(instances, added, root, tmp_path, monkeypatch, event):
    instance_id = added(state="stopped", start_command=(*STARTS_ONCE, str(tmp_path / "machine")))
    change = DescriptionFiles.change

    def cut_off(self, of, state, **details):
        if state is InstanceState.RUNNING:
            raise event
        change(self, of, state, **details)

    with monkeypatch.context() as patched:
        patched.setattr(DescriptionFiles, "change", cut_off)
        with pytest.raises(type(event)):
            instances.start(instance_id)
    instances = DirectoryDriver(root)  # after a restart
    for _ in range(2):
        assert instances.state(instance_id) is InstanceState.PENDING
        with instances.hold_stopped(instance_id) as hold, pytest.raises(RootVolumeInUse):
            hold.check()
        with pytest.raises(InstanceCommandFailed, match="already active"):
            instances.start(instance_id)
    (tmp_path / "machine").unlink()  # it was shut down from inside
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


@pytest.mark.parametrize(
    ("command", "state"),
    [
        (("false",), InstanceState.STOPPED),
        (("/nowhere/virsh",), InstanceState.STOPPED),
        (("sleep", "60"), InstanceState.PENDING),  # it was killed, and may have started the machine before
    ],
)
def test_a_start_that_has_certainly_failed_leaves_the_instance_as_it_was(root, added, instances, command, state):
    instance_id = added(state="stopped", off_reason=OffReason.CRASHED, start_command=command)
    with pytest.raises(InstanceCommandFailed):
        DirectoryDriver(root, command_seconds=0.5 if command[0] == "sleep" else 20.0).start(instance_id)
    found = instances.get(instance_id)
    assert (found.state, found.off_reason) == (state, OffReason.CRASHED if state is InstanceState.STOPPED else None)


def test_a_start_that_was_not_allowed_in_the_end_leaves_the_instance_as_it_was(instances, added):
    instance_id, answers = added(state="stopped", start_command=("false",)), [None]
    with pytest.raises(IndexError), start_guard.using(answers.pop):
        instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
