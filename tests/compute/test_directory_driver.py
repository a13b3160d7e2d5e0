"""The directory driver: files that operators write, and commands that fail."""

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
from thrave.write_guard import command_guard

ID = "i-0123456789abcdef0"


def file_of(root, instance_id):
    return root / f"{instance_id}.json"


def edit(root, instance_id, **changes):
    path = file_of(root, instance_id)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_new_instance_id_has_ec2_form():
    ids = {new_instance_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"i-[0-9a-f]{17}", new) for new in ids)


def test_add_accepts_id_of_eight_digits(instances, added):
    assert instances.get(added(instance_id="i-1234abcd")).instance_id == "i-1234abcd"


def test_add_writes_readable_file(added, root, disk):
    added(instance_id=ID, state_command=("virsh", "domstate", "win"))
    text = file_of(root, ID).read_text()
    assert text.startswith('{\n  "instanceId": "i-0123456789abcdef0",\n  "accountId": "123456789012",\n')
    written = json.loads(text)
    assert written["rootVolume"] == {"path": str(disk), "format": "raw", "deviceName": "/dev/sda1"}
    assert written["stateCommand"] == ["virsh", "domstate", "win"]
    assert "stopCommand" not in written


def test_file_needs_only_fields_without_default(instances, root, disk):
    root.mkdir()
    file_of(root, ID).write_text(
        json.dumps({"instanceId": ID, "accountId": "123456789012", "rootVolume": {"path": str(disk)}})
    )
    found = instances.get(ID)
    assert (found.platform, found.root_device_type, found.state) == (None, "instance-store", InstanceState.RUNNING)


def test_edited_file_is_used_at_once(instances, added, root):
    added(instance_id=ID)
    edit(root, ID, state="stopped", platform=None)
    assert (instances.state(ID), instances.get(ID).platform) == (InstanceState.STOPPED, None)


def test_change_of_state_keeps_edited_fields(instances, added, root):
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
def test_get_names_faulty_field(instances, added, root, name):
    added(instance_id=ID)
    value, message = FAULTS[name]
    edit(root, ID, **{name: value})
    with pytest.raises(InvalidDescriptionError, match=rf"{ID}\.json does not describe an instance: {message}"):
        instances.get(ID)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"instanceId": "i-0123456789abcdef0"}'])
def test_list_skips_broken_file_and_logs_it(instances, added, root, caplog, content):
    good = added()
    file_of(root, ID).write_bytes(content)
    assert [found.instance_id for found in instances.list()] == [good]
    assert f"{ID}.json" in caplog.text
    (error,) = instances.list_errors()
    assert f"{ID}.json" in str(error)


def test_list_errors_has_unreadable_file(instances, added, root):
    added()
    file_of(root, ID).mkdir()
    (error,) = instances.list_errors()
    assert "Is a directory" in str(error)


def test_list_ignores_files_of_other_names(instances, added, root):
    added()
    (root / "README.json").write_text("hello")
    (root / "i-0123456789abcdef0.json~").write_text("hello")
    assert len(instances.list()) == 1
    assert instances.list_errors() == []


@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_parse_description_refuses_any_invalid_content(content):
    with pytest.raises(InvalidDescriptionError):
        description_files.parse_description(ID, content, "it")


COMMANDS = st.none() | st.lists(st.text(max_size=20), min_size=1, max_size=4).map(tuple)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    commands=st.lists(
        st.none() | st.lists(st.text(max_size=20), min_size=1, max_size=4).map(tuple), min_size=3, max_size=3
    ),
    state=st.sampled_from(InstanceState),
    name=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20),
)
def test_parse_description_returns_formatted_description(described, commands, state, name):
    written = described(
        stop_command=commands[0],
        start_command=commands[1],
        state_command=commands[2],
        state=state,
        root_device_name=name,
    )
    assert (
        description_files.parse_description(written.instance_id, description_files.format_description(written), "it")
        == written
    )


def test_add_refuses_existing_id(instances, added, described):
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
def test_add_refuses_invalid_instance(instances, described, root, changes, message):
    changes = {
        name: VolumeFile(path=type(root)(value.path)) if isinstance(value, VolumeFile) else value
        for name, value in changes.items()
    }
    if "volumes" in changes:
        changes["volumes"] = tuple(VolumeFile(path=type(root)(volume.path)) for volume in changes["volumes"])
    with pytest.raises(InvalidDescriptionError, match=message):
        instances.add(described(**changes))
    assert instances.list() == []


def test_remove_waits_for_change_in_progress(instances, added, root):
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


class ProcessKilled(BaseException):
    """Ends the start as if the process was killed."""


@pytest.mark.parametrize("event", [ProcessKilled(), OSError(errno.ENOSPC, "no space")])
def test_interrupted_start_prevents_reading_of_volume(instances, added, root, tmp_path, monkeypatch, event):
    instance_id = added(state="stopped", start_command=(*STARTS_ONCE, str(tmp_path / "machine")))
    change_state = DescriptionFiles.change_state

    def interrupt(self, instance_id, state, **options):
        if state is InstanceState.RUNNING:
            raise event
        change_state(self, instance_id, state, **options)

    with monkeypatch.context() as patched:
        patched.setattr(DescriptionFiles, "change_state", interrupt)
        with pytest.raises(type(event)):
            instances.start(instance_id)
    instances = DirectoryDriver(root)  # after a restart
    for _ in range(2):
        assert instances.state(instance_id) is InstanceState.PENDING
        with instances.hold_stopped(instance_id) as hold, pytest.raises(RootVolumeInUse):
            hold.check()
        with pytest.raises(InstanceCommandFailed, match="already active"):
            instances.start(instance_id)
    (tmp_path / "machine").unlink()  # shut down by its guest
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


@pytest.mark.parametrize(
    ("command", "state"),
    [
        (("false",), InstanceState.STOPPED),
        (("/nowhere/virsh",), InstanceState.STOPPED),
        (("sleep", "60"), InstanceState.PENDING),  # killed at the timeout: the machine may have been started
    ],
)
def test_failed_start_restores_recorded_state(root, added, instances, command, state):
    instance_id = added(state="stopped", off_reason=OffReason.CRASHED, start_command=command)
    with pytest.raises(InstanceCommandFailed):
        DirectoryDriver(root, command_timeout=0.5 if command[0] == "sleep" else 20.0).start(instance_id)
    found = instances.get(instance_id)
    assert (found.state, found.off_reason) == (state, OffReason.CRASHED if state is InstanceState.STOPPED else None)


def test_start_refused_by_guard_restores_recorded_state(instances, added):
    instance_id, checks = added(state="stopped", start_command=("false",)), [None]
    with pytest.raises(IndexError), command_guard.using(checks.pop):
        instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED
