"""`thrave instance` with instances that files describe."""

import json

import pytest

from support.disks.qemu_images import qemu_img
from thrave.components import open_components
from thrave.config import Settings


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def account_id(thrave_json, data):
    return thrave_json("account", "create", "alice", "--data-dir", data)["accountId"]


@pytest.fixture
def add(account_id, data, disk):
    """Returns the arguments of a command that adds an instance."""

    def words(*more):
        return [
            "instance", "add", "--account", account_id, "--platform", "windows", "--root-volume", disk,
            "--data-dir", data, *more,
        ]  # fmt: skip

    return words


@pytest.fixture
def instance_id(thrave_json, add):
    return thrave_json(*add())["instanceId"]


def test_add_prints_instance_with_names_of_ec2(thrave_json, add, account_id, disk):
    shown = thrave_json(*add("--id", "i-0123456789abcdef0"))
    assert shown.pop("launchTime").endswith("Z")
    assert shown == {
        "instanceId": "i-0123456789abcdef0",
        "accountId": account_id,
        "platform": "windows",
        "architecture": "x86_64",
        "rootDeviceType": "instance-store",
        "rootDeviceName": "/dev/sda1",
        "rootVolume": {"path": str(disk), "format": "raw", "deviceName": "/dev/sda1", "secretFile": None},
        "volumes": [],
        "state": "running",
        "offReason": None,
        "tags": {},
    }


def test_linux_instance_has_no_platform(thrave_json, account_id, data, disk):
    words = ("--account", account_id, "--platform", "linux", "--root-volume", disk, "--data-dir", data)
    assert thrave_json("instance", "add", *words)["platform"] is None


def test_add_stores_every_option(thrave_json, add, data, tmp_path):
    others = [tmp_path / "d.raw", tmp_path / "e.raw"]
    for other in others:
        other.touch()
    shown = thrave_json(
        *add("--format", "qcow2", "--volume", others[0], "--volume", others[1], "--root-device-type", "ebs"),
        "--state", "stopped", "--stop-command", "virsh shutdown 'my win'", "--start-command", "virsh start win",
        "--state-command", "echo stopped",
    )  # fmt: skip
    assert (shown["rootVolume"]["format"], shown["rootDeviceType"], shown["state"]) == ("qcow2", "ebs", "stopped")
    assert [(volume["path"], volume["deviceName"]) for volume in shown["volumes"]] == [
        (str(others[0]), "xvdb"),
        (str(others[1]), "xvdc"),
    ]
    file = json.loads((data / "instances" / f"{shown['instanceId']}.json").read_text())
    assert file["stopCommand"] == ["virsh", "shutdown", "my win"]
    assert file["startCommand"] == ["virsh", "start", "win"]
    assert file["stateCommand"] == ["echo", "stopped"]


def test_add_stores_tags(thrave_json, add, data):
    shown = thrave_json(*add("--tag", "Name=web 1", "--tag", "sum=1=1", "--tag", "cost_center="))
    assert shown["tags"] == {"Name": "web 1", "sum": "1=1", "cost_center": ""}
    file = json.loads((data / "instances" / f"{shown['instanceId']}.json").read_text())
    assert file["tags"] == shown["tags"]


def test_add_stores_path_of_secret_file(thrave_json, add, disk, tmp_path, monkeypatch):
    qemu_img("create", "-f", "qcow2", disk, "1M")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passphrase").write_text("secret")
    shown = thrave_json(*add("--format", "qcow2", "--secret-file", "passphrase"))
    assert shown["rootVolume"]["secretFile"] == str(tmp_path / "passphrase")


@pytest.mark.parametrize(
    ("is_really", "said", "advice"),
    [
        ("qcow2", "raw", "Pass --format qcow2"),
        ("vpc", "raw", "Pass --format vpc"),
        ("vmdk", "qcow2", "Pass --format vmdk"),
        ("raw", "qcow2", "For a raw disk pass --format raw"),
        ("vdi", "raw", "qemu-img convert"),
    ],
)
def test_add_refuses_wrong_image_format(thrave, add, data, disk, is_really, said, advice):
    qemu_img("create", "-f", is_really, *(("-o", "subformat=fixed") if is_really == "vpc" else ()), disk, "1M")
    status, stdout, stderr = thrave(*add("--format", said))
    assert (status, stdout, advice in stderr) == (2, "", True)
    assert not list((data / "instances").glob("*.json"))


def test_add_accepts_raw_disk_that_the_guest_has_encrypted(thrave, add, disk):
    disk.write_bytes(b"LUKS\xba\xbe\0\1".ljust(4096, b"\0"))
    status, _, stderr = thrave(*add())
    assert (status, "warning" in stderr) == (0, False)


def test_add_warns_about_image_that_cannot_be_bundled(thrave, add, disk):
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/hostname", "-F", "raw", disk, "1M")
    status, _, stderr = thrave(*add("--format", "qcow2"))
    assert status == 0
    assert "warning: the instance cannot be bundled: cannot read /etc/hostname" in stderr


@pytest.mark.parametrize("how", ["the same name", "hard link", "symbolic link", "file of its chain", "its other disk"])
def test_add_warns_about_disk_of_other_running_instance(thrave, thrave_json, add, disk, tmp_path, how):
    others = ("--volume", disk) if how == "its other disk" else ()
    first = thrave_json(*add(*others))["instanceId"]
    second = tmp_path / "second.img"
    options = ["--state", "stopped"]
    match how:
        case "hard link":
            second.hardlink_to(disk)
        case "symbolic link":
            second.symlink_to(disk)
        case "file of its chain":
            qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "raw", second)
            options += ["--format", "qcow2"]
        case _:
            second = disk
    words = [second if word == disk else word for word in add(*options)]
    status, _, stderr = thrave(*words)
    assert (status, f"is also a disk of the instance {first}" in stderr) == (0, True)
    thrave_json("instance", "stop", first, "--data-dir", words[words.index("--data-dir") + 1])
    status, _, stderr = thrave(*words)
    assert (status, first in stderr) == (0, False)


def test_add_prints_warnings_in_json(thrave, thrave_json, add, disk):
    first = thrave_json(*add())["instanceId"]
    status, stdout, stderr = thrave(*add("--state", "stopped"), "--output", "json")
    (warning,) = json.loads(stdout)["warnings"]
    assert (status, first in warning, "warning" in stderr) == (0, True, False)


def test_add_accepts_template_below_two_overlays(thrave_json, add, disk, tmp_path):
    for name in ("one.qcow2", "two.qcow2"):
        overlay = tmp_path / name
        qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
        thrave_json(*[overlay if word == disk else word for word in add("--format", "qcow2")])


def test_add_resolves_relative_path(thrave_json, add, disk, monkeypatch):
    monkeypatch.chdir(disk.parent)
    words = [disk.name if word == disk else word for word in add()]
    assert thrave_json(*words)["rootVolume"]["path"] == str(disk)


def test_data_directory_can_be_set_in_environment(thrave_json, add, data, monkeypatch):
    monkeypatch.setenv("THRAVE_DATA_DIR", str(data))
    words = [word for word in add() if word not in {"--data-dir", data}]
    instance_id = thrave_json(*words)["instanceId"]
    assert [found["instanceId"] for found in thrave_json("instance", "list")["instances"]] == [instance_id]


def test_list_prints_instances_as_text_and_json(thrave, thrave_json, instance_id, data):
    assert [found["instanceId"] for found in thrave_json("instance", "list", "--data-dir", data)["instances"]] == [
        instance_id
    ]
    _, text, _ = thrave("instance", "list", "--data-dir", data)
    header, row = text.splitlines()
    assert header.split() == ["INSTANCE", "ACCOUNT", "STATE", "PLATFORM", "ROOT", "DEVICE", "ROOT", "VOLUME"]
    assert row.split()[0] == instance_id


def test_list_without_instances_is_empty(thrave_json, data):
    thrave_json("account", "create", "alice", "--data-dir", data)
    assert thrave_json("instance", "list", "--data-dir", data) == {"instances": []}


def test_list_reports_invalid_description_on_stderr(thrave_json, instance_id, data, caplog):
    (data / "instances" / "i-00000000.json").write_text("{")
    assert len(thrave_json("instance", "list", "--data-dir", data)["instances"]) == 1
    assert "i-00000000.json" in caplog.text


def test_stop_start_and_remove_instance(thrave_json, thrave, instance_id, data, disk):
    assert thrave_json("instance", "stop", instance_id, "--data-dir", data)["state"] == "stopped"
    assert thrave_json("instance", "stop", instance_id, "--data-dir", data)["state"] == "stopped"
    assert thrave_json("instance", "start", instance_id, "--data-dir", data)["state"] == "running"
    assert thrave("instance", "stop", instance_id, "--data-dir", data)[1] == f"{instance_id} stopped\n"
    assert thrave_json("instance", "remove", "--yes", instance_id, "--data-dir", data) == {"instanceId": instance_id}
    assert thrave_json("instance", "list", "--data-dir", data) == {"instances": []}
    assert disk.exists()


def test_instance_is_found_by_name_and_start_of_id(thrave, thrave_json, add, data):
    for instance_id in ("i-0123456789abcdef0", "i-0123456789abcdef1"):
        thrave_json(*add("--id", instance_id, "--tag", "Name=web"))
    status, _, stderr = thrave("instance", "show", "web", "--data-dir", data)
    assert (status, "'web' is ambiguous: i-0123456789abcdef0, i-0123456789abcdef1." in stderr) == (2, True)
    thrave_json(*add("--id", "i-abcdef0123456789a", "--tag", "Name=db"))
    for word in ("db", "i-abcd"):
        shown = thrave_json("instance", "show", word, "--data-dir", data)
        assert shown["instanceId"] == "i-abcdef0123456789a"
    for word in ("i-0123", "i-abc", ""):
        assert thrave("instance", "remove", "--yes", word, "--data-dir", data)[0] in {2, 3}
    assert len(thrave_json("instance", "list", "--data-dir", data)["instances"]) == 3


def test_stop_waits_until_instance_is_off(thrave_json, add, data):
    instance_id = thrave_json(*add("--stop-command", "sleep 1"))["instanceId"]
    assert thrave_json("instance", "stop", instance_id, "--data-dir", data)["state"] == "stopped"


def test_stop_fails_after_timeout(thrave, thrave_json, add, data):
    commands = ("--stop-command", "true", "--state-command", "echo running")
    instance_id = thrave_json(*add(*commands))["instanceId"]
    status, _, stderr = thrave("instance", "stop", instance_id, "--timeout", "1", "--data-dir", data)
    assert status == 1
    assert f"{instance_id} did not power off within 1 seconds" in stderr


def test_start_refuses_locked_instance(thrave, instance_id, data):
    from thrave.compute.directory_driver import DirectoryDriver

    with DirectoryDriver(data / "instances").hold_stopped(instance_id):
        status, _, stderr = thrave("instance", "start", instance_id, "--data-dir", data)
    assert status == 4
    assert f"{instance_id} is locked" in stderr


def test_stop_reports_failed_command(thrave, thrave_json, add, data):
    instance_id = thrave_json(*add("--stop-command", "ls /nowhere"))["instanceId"]
    status, _, stderr = thrave("instance", "stop", instance_id, "--data-dir", data)
    assert status == 1
    assert "No such file or directory" in stderr


@pytest.mark.parametrize("command", ["start", "stop", "remove"])
def test_unknown_instance_is_not_found(thrave, account_id, data, command):
    status, stdout, stderr = thrave("instance", command, "i-0123456789abcdef0", "--data-dir", data)
    assert (status, stdout) == (3, "")
    assert stderr == "thrave: there is no instance 'i-0123456789abcdef0'. `thrave instance list` lists the instances.\n"


@pytest.mark.parametrize(
    ("more", "expected", "message"),
    [
        (["--account", "000000000000"], 3, "000000000000"),
        (["--platform", "beos"], 2, "beos"),
        (["--format", "vdi"], 2, "'vdi' is not one of raw, qcow2"),
        (["--root-volume", "/nowhere/win.raw"], 3, "/nowhere/win.raw does not exist"),
        (["--volume", "/nowhere/d.raw"], 3, "/nowhere/d.raw does not exist"),
        (["--volume", "/dev/null"] * 26, 2, "at most 25"),
        (["--id", "i-1"], 1, "instanceId"),
        (["--root-device-type", "floppy"], 2, "floppy"),
        (["--state", "pending"], 2, "pending"),
        (["--stop-command", "virsh 'shutdown"], 2, "No closing quotation"),
        (["--start-command", "  "], 2, "is empty"),
        (["--tag", "Name"], 2, "'Name' is not KEY=VALUE"),
        (["--tag", "Name=a", "--tag", "Name=b"], 2, "the tag 'Name' is given twice"),
        (["--tag", "aws:name=x"], 2, "which AWS reserves"),
        (["--tag", f"Name={'x' * 257}"], 2, "more than 256 characters"),
    ],
)
def test_add_rejects_invalid_options(thrave, add, data, more, expected, message):
    status, stdout, stderr = thrave(*add(*more))
    assert (status, stdout) == (expected, "")
    assert message in stderr
    assert "Traceback" not in stderr
    assert not [*(data / "instances").glob("*.json")] if (data / "instances").exists() else True


def test_add_refuses_existing_id(thrave, add, instance_id):
    status, _, stderr = thrave(*add("--id", instance_id))
    assert status == 4
    assert f"already an instance {instance_id}" in stderr


def test_add_refuses_libvirt_service(thrave, add, instance_id, data, monkeypatch):
    monkeypatch.setenv("THRAVE_HYPERVISOR", "libvirt")
    for words in (add(), ("instance", "remove", "--yes", instance_id, "--data-dir", data)):
        status, _, stderr = thrave(*words)
        assert (status, "thrave instance adopt" in stderr) == (2, True)
    assert [path.stem for path in (data / "instances").glob("*.json")] == [instance_id]


def test_adopt_refuses_directory_service(thrave, account_id, data):
    for words in (("adopt", "win", "--account", account_id), ("disown", "--yes", "i-0123456789abcdef0")):
        status, _, stderr = thrave("instance", *words, "--data-dir", data)
        assert (status, "hypervisor = " in stderr) == (2, True)


@pytest.mark.parametrize("command", ["", "add", "adopt", "disown", "list", "remove", "start", "stop"])
def test_instance_help_has_example(thrave, command):
    status, stdout, _ = thrave("instance", *command.split(), "--help")
    assert status == 0
    assert "Example:\n" in stdout
    assert f"thrave instance {command}".strip() in stdout


def test_instance_dir_of_settings_is_used(thrave, thrave_json, account_id, data, disk, tmp_path):
    (tmp_path / "thrave.toml").write_text(
        f"data_dir = {json.dumps(str(data))}\ninstance_dir = {json.dumps(str(tmp_path / 'shared'))}\n"
    )
    words = (
        "--account",
        account_id,
        "--platform",
        "windows",
        "--root-volume",
        disk,
        "--config",
        tmp_path / "thrave.toml",
    )
    added = thrave_json("instance", "add", *words)["instanceId"]
    assert [path.stem for path in (tmp_path / "shared").glob("*.json")] == [added]
    assert thrave_json("instance", "list", "--data-dir", data)["instances"] == []


def test_add_accepts_account_name(thrave_json, thrave, data, disk, account_id):
    (account,) = thrave_json("account", "list", "--data-dir", data)["accounts"]
    words = ["instance", "add", "--platform", "windows", "--root-volume", disk, "--data-dir", data]
    assert thrave_json(*words, "--account", account["name"])["accountId"] == account_id
    assert thrave(*words, "--account", "nobody")[0] == 3


def test_show_prints_volumes(thrave, thrave_json, data, instance_id, disk):
    _, stdout, _ = thrave("instance", "show", instance_id, "--data-dir", data)
    assert f"root volume  {disk} (raw)" in stdout
    shown = thrave_json("instance", "show", instance_id, "--data-dir", data)
    assert [shown] == thrave_json("instance", "list", "--data-dir", data)["instances"]
    assert thrave("instance", "show", "i-00000000", "--data-dir", data)[0] == 3


def test_host_list_counts_instances_of_single_machine(thrave_json, data, instance_id):
    components = open_components(Settings(data_dir=data))
    components.hosts.acquire_lease("localhost", worker_concurrency=1)
    components.queues.close()
    components.database.dispose()
    (host,) = thrave_json("host", "list", "--data-dir", data)["hosts"]
    assert (host["instances"], instance_id[:2]) == (1, "i-")


def test_task_watch_without_task_prints_message(thrave, data, account_id):
    status, _, stderr = thrave("task", "watch", "--data-dir", data)
    assert (status, stderr) == (0, "There are no unfinished tasks to watch.\n")


@pytest.fixture
def in_a_fleet(postgres, monkeypatch, tmp_path):
    monkeypatch.setenv("THRAVE_DATABASE_URL", postgres.new_database())
    monkeypatch.setenv("THRAVE_INSTANCE_DIR", str(tmp_path / "shared"))


@pytest.mark.postgres
def test_add_in_fleet_requires_host(in_a_fleet, thrave, add, monkeypatch, tmp_path):
    def host_of_new(*more):
        status, stdout, stderr = thrave(*add(*more, "--output", "json"))
        assert status == 0, stderr
        return json.loads((tmp_path / "shared" / f"{json.loads(stdout)['instanceId']}.json").read_text())["host"]

    status, _, stderr = thrave(*add())
    assert (status, "--host-id" in stderr) == (2, True)
    assert host_of_new("--host-id", "kvm-1") == "kvm-1"
    (tmp_path / "data" / "host_id").write_text("kvm-2\n")  # as an agent does when it starts
    assert host_of_new() == "kvm-2"
    monkeypatch.setenv("THRAVE_HOST_ID", "kvm-3")
    assert host_of_new() == "kvm-3"
