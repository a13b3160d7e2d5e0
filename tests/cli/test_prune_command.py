"""`thrave prune`, on the disk and in a real store."""

import json
import os
from functools import partial
from itertools import count

import pytest

from support.buckets.bundle_folders import BucketPlace, DiskPlace
from support.bundles.sample_bundles import VECTORS, MemoryImage, bundle_of
from support.servers.stores import ALICE
from thrave.cli.folders import FolderError, LocalFolder
from thrave.cli.remote_folders import S3Folder
from thrave.components import open_components
from thrave.config import load_settings
from thrave.tasks.models import BundleRequest

FAILED, USAGE, NOT_FOUND, DAMAGED = 1, 2, 3, 10
KEYS = VECTORS / "keys"
NEIGHBOURS = ("web-3.part.0.bak", "web", "website-1.manifest.xml", "web-2", "notes.txt")
LAST_YEAR, IN_A_HUNDRED_YEARS = "2025-01-01", "2126-01-01"


@pytest.fixture(scope="module")
def series():
    """Files of four bundles, the oldest first; the second has no side file, as those of old tools."""
    bundles = {}
    for number in range(1, 5):
        prefix = f"web-{number}"
        made = bundle_of(MemoryImage(bytes([number]) * 5000 + bytes(range(256)) * 8), prefix, part_size=256)
        sides = {} if number == 2 else {f"{prefix}.manifest.json": made.side_file}
        bundles[prefix] = {**made.parts, **sides, f"{prefix}.manifest.xml": made.manifest}
    return bundles


@pytest.fixture(params=["disk", pytest.param("seaweedfs", marks=pytest.mark.s3)])
def new_place(request, tmp_path, monkeypatch):
    """Creates folders of one kind."""
    monkeypatch.chdir(tmp_path)  # a folder without a data directory
    if request.param == "disk":
        numbers = count()
        return lambda: DiskPlace(tmp_path / f"place{next(numbers)}")
    store = request.getfixturevalue(request.param)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": store.url,
        "AWS_ACCESS_KEY_ID": ALICE.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ALICE.secret_access_key,
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
    }.items():
        monkeypatch.setenv(name, value)
    return partial(BucketPlace, store)


@pytest.fixture
def place(new_place, series):
    """A folder with the four bundles, and with files that are not theirs."""
    place = new_place()
    fill(place, series)
    for name in NEIGHBOURS:
        place.put(name, b"mine")
    return place


def fill(place, series):
    """Store the bundles in order, each with its manifest last; on the disk they are a day apart."""
    for number, files in enumerate(series.values()):
        for name, data in files.items():
            place.put(name, data)
            if isinstance(place, DiskPlace):
                os.utime(place.path / name, (1_000_000_000 + number * 86400,) * 2)


def prefixes(bundles):
    """Prefixes of the bundles in a document."""
    return [bundle["manifest"].rpartition("/")[2].removesuffix(".manifest.xml") for bundle in bundles]


def remaining(place):
    """Prefixes of the manifests in a place."""
    return sorted(name.removesuffix(".manifest.xml") for name in place.files() if name.endswith(".manifest.xml"))


def test_prune_keeps_newest_bundles_and_all_other_files(thrave_json, place, series):
    before = place.files()
    dry = thrave_json("prune", "--yes", place.address, "--name", "web-*", "--keep", 2, "--dry-run")
    assert place.files() == before
    done = thrave_json("prune", "--yes", place.address, "--name", "web-*", "--keep", 2)
    assert prefixes(dry["removed"]) == prefixes(done["removed"]) == ["web-1", "web-2"]
    assert (prefixes(done["kept"]), done["tasksChecked"], dry["dryRun"]) == (["web-4", "web-3"], False, True)
    assert place.files() == {**series["web-3"], **series["web-4"], **dict.fromkeys(NEIGHBOURS, b"mine")}


def test_prune_never_removes_newest_bundle(thrave_json, place):
    done = thrave_json("prune", "--yes", place.address, "--name", "web-*", "--older-than", IN_A_HUNDRED_YEARS)
    assert (prefixes(done["removed"]), prefixes(done["kept"])) == (["web-1", "web-2", "web-3"], ["web-4"])


def test_prune_by_age_and_number_needs_both(thrave_json, new_place, series, tmp_path):
    place = new_place()
    fill(place, series)
    assert (
        thrave_json("prune", "--yes", place.address, "--name", "web-*", "--older-than", "2001-01-01")["removed"] == []
    )
    if isinstance(place, DiskPlace):  # stored from 2001-09-09 to 2001-09-12
        done = thrave_json(
            "prune", "--yes", place.address, "--name", "web-*", "--keep", 1, "--older-than", "2001-09-10T12:00Z"
        )
        assert prefixes(done["removed"]) == ["web-1", "web-2"]
    done = thrave_json(
        "prune", "--yes", place.address, "--name", "web-*", "--keep", 4, "--older-than", IN_A_HUNDRED_YEARS
    )
    assert done["removed"] == []


def test_prune_counts_only_bundles_that_match(thrave_json, place):
    done = thrave_json("prune", "--yes", place.address, "--name", "web-[12]", "--keep", 1)
    assert (prefixes(done["removed"]), remaining(place)) == (["web-1"], ["web-2", "web-3", "web-4", "website-1"])


@pytest.mark.parametrize("damage", ["missing part", "other size", "not a manifest", "part too many", "other signer"])
def test_prune_neither_counts_nor_removes_other_than_complete_bundles(thrave, new_place, series, damage):
    place = new_place()
    fill(place, series)
    for prefix in ("web-1", "web-4"):
        part = max(name for name in series[prefix] if ".part." in name)
        if damage == "missing part":
            place.remove(part)
        elif damage == "other size":
            place.put(part, series[prefix][part] + b"x")
        elif damage == "not a manifest":
            place.put(f"{prefix}.manifest.xml", b"<manifest>")
        elif damage == "part too many":
            place.put(f"{prefix}.part.999999999999", b"of a task that is replacing the bundle")
    signer = KEYS / ("cloud-cert.pem" if damage == "other signer" else "user-cert.pem")
    before = place.files()
    words = (
        "prune",
        "--yes",
        place.address,
        "--name",
        "web-*",
        "--keep",
        1,
        "--certificate",
        signer,
        "--output",
        "json",
    )
    status, stdout, stderr = thrave(*words)
    if damage == "other signer":
        assert place.files() == before
        return
    document = json.loads(stdout)
    assert status == (0 if damage == "part too many" else DAMAGED)
    assert (prefixes(document["removed"]), prefixes(document["kept"])) == (["web-2"], ["web-3"])
    assert prefixes(document["skipped"]) == ["web-1", "web-4"]
    assert stderr.count("not removed") == 2
    gone = series["web-2"].keys()
    assert place.files() == {name: data for name, data in before.items() if name not in gone}


def test_prune_interrupted_at_each_change_is_finished_by_the_same_command(thrave, new_place, series, monkeypatch):
    """Each run fails at a later change of the folder, until one has no further change to fail at."""
    for allowed in count():
        place = new_place()
        fill(place, series)
        words = ("prune", "--yes", place.address, "--name", "web-*", "--keep", 2)
        with monkeypatch.context() as patch:
            changes = count()
            for kind in (LocalFolder, S3Folder):
                for name in ("write", "remove"):
                    patch.setattr(kind, name, failing_after(getattr(kind, name), changes, allowed))
            status, _, stderr = thrave(*words)
        assert status in {0, FAILED}, stderr
        assert {"web-3", "web-4"} <= set(remaining(place))
        assert thrave(*words)[0] == 0
        assert place.files() == {**series["web-3"], **series["web-4"]}, f"after change {allowed}"
        if status == 0:
            assert allowed > 6
            return


def failing_after(change, changes, allowed):
    """Return a method that fails once `allowed` changes were made."""

    def called(*arguments):
        if next(changes) >= allowed:
            raise FolderError("the power is out")
        return change(*arguments)

    return called


def interrupt(thrave, place, monkeypatch):
    """Interrupt the removal of `web-1` after its manifest."""
    with monkeypatch.context() as patch:
        changes = count()
        for kind in (LocalFolder, S3Folder):
            for name in ("write", "remove"):
                patch.setattr(kind, name, failing_after(getattr(kind, name), changes, 2))
        assert thrave("prune", "--yes", place.address, "--name", "web-*", "--keep", 3)[0] == FAILED
    assert "web-1.removal.json" in place.files()
    assert "web-1.manifest.xml" not in place.files()


def test_prune_does_not_finish_removal_of_files_that_are_newer(thrave, thrave_json, tmp_path, series, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = DiskPlace(tmp_path / "place")  # the times of objects in a bucket cannot be set
    fill(place, series)
    interrupt(thrave, place, monkeypatch)
    new = sorted(name for name in series["web-1"] if ".part." in name)[:2]
    for name in new:
        os.utime(place.path / name, (4_000_000_000,) * 2)
    done = thrave_json("prune", "--yes", place.address, "--name", "web-*", "--keep", 3)
    assert prefixes({"manifest": manifest} for manifest in done["finishedRemovals"]) == ["web-1"]
    assert sorted(name for name in place.files() if name.startswith("web-1")) == new


def test_copy_to_interrupted_removal_is_not_removed(thrave, thrave_json, new_place, place, series, monkeypatch):
    original = new_place()
    fill(original, series)
    interrupt(thrave, place, monkeypatch)
    thrave_json("copy", f"{original.address}/web-1.manifest.xml", place.address)
    assert thrave_json("prune", "--yes", place.address, "--name", "web-*", "--keep", 4)["finishedRemovals"] == []
    assert series["web-1"].items() <= place.files().items()


@pytest.mark.parametrize("record", [
    b"", b"[]", b"[" * 100_000, b'{"format": "other", "files": []}', b'{"format": "thrave-removal-1", "files": 1}',
    b'{"format": "thrave-removal-1", "files": ["web-2.part.0"]}',
    b'{"format": "thrave-removal-1", "files": ["../web-1.part.0"]}',
    b'{"format": "thrave-removal-1", "files": ["web-1.manifest.xml"]}',
    b'{"format": "thrave-removal-1", "files": [{"web-1.part.0": 1}]}',
])  # fmt: skip
def test_prune_refuses_forged_removal_record(thrave, tmp_path, monkeypatch, series, record):
    monkeypatch.chdir(tmp_path)
    place = DiskPlace(tmp_path / "place")
    fill(place, series)
    place.put("web-1.removal.json", record)
    before = place.files()
    status, _, stderr = thrave("prune", "--yes", place.address, "--name", "web-*", "--keep", 4)
    assert (status, "web-1.removal.json is not a removal record" in stderr) == (DAMAGED, True)
    assert place.files() == before


def test_prune_keeps_bundle_of_unfinished_task(thrave_json, tmp_path, series, monkeypatch):
    data = tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    account = thrave_json("account", "create", "alice", "--data-dir", data)["accountId"]
    place = DiskPlace(data / "buckets" / "golden" / "nightly")
    fill(place, series)
    components = open_components(load_settings(None, data_dir=data))
    with components.database.begin() as connection:
        request = BundleRequest(
            account_id=account, owner_id=account, instance_id="i-1", bucket="golden", prefix="nightly/web-1",
            access_key_id="AKIA", upload_policy="policy", upload_policy_signature="signature",
        )  # fmt: skip
        components.records().add(connection, "bun-1", "localhost", request)
    words = (
        "prune",
        "--yes",
        f"{data}/buckets/golden/../golden/nightly",
        "--name",
        "web-*",
        "--keep",
        2,
        "--data-dir",
        data,
    )
    done = thrave_json(*words)
    assert (done["tasksChecked"], prefixes(done["removed"]), prefixes(done["skipped"])) == (True, ["web-2"], ["web-1"])
    assert "bun-1" in done["skipped"][0]["reason"]
    assert remaining(place) == ["web-1", "web-3", "web-4"]
    with components.database.begin() as connection:
        connection.exec_driver_sql("UPDATE bundle_task SET state = 'complete'")
    components.database.dispose()
    assert prefixes(thrave_json(*words)["removed"]) == ["web-1"]


def test_prune_reads_one_manifest_for_each_bundle(thrave_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place, made = DiskPlace(tmp_path / "place"), {}
    for number in range(30):
        bundle = bundle_of(MemoryImage(bytes(range(256)) * 8), f"web-{number:02}", part_size=256)
        made[f"web-{number:02}"] = {**bundle.parts, f"web-{number:02}.manifest.xml": bundle.manifest}
    fill(place, made)
    calls = {"read": 0, "size": 0, "list_files": 0}
    for name in calls:
        monkeypatch.setattr(LocalFolder, name, counting(getattr(LocalFolder, name), calls, name))
    done = thrave_json("prune", "--yes", place.address, "--name", "web-*", "--keep", 28)
    assert prefixes(done["removed"]) == ["web-00", "web-01"]
    assert calls == {"read": 32, "size": 0, "list_files": 1}


def counting(method, calls, name):
    """Return a method that counts its calls."""

    def called(*arguments):
        calls[name] += 1
        return method(*arguments)

    return called


def test_prune_reports_that_nothing_matches(thrave, new_place):
    place = new_place()
    place.put("web-1.part.0", b"")
    status, _, stderr = thrave("prune", "--yes", place.address, "--name", "web-*", "--keep", 1)
    assert (status, "no bundle" in stderr) == (NOT_FOUND, True)


@pytest.mark.parametrize("words", [
    ("place", "--name", "web-*"), ("place", "--keep", "1"), ("place", "--name", "web-*", "--keep", "0"),
    ("place", "--name", "web-*", "--older-than", "soon"), ("https://127.0.0.1/", "--name", "web-*", "--keep", "1"),
    ("place", "--name", "web-*", "--keep", "1", "--data-dir", "no-service"),
])  # fmt: skip
def test_prune_refuses_wrong_command_line(thrave, tmp_path, monkeypatch, series, words):
    monkeypatch.chdir(tmp_path)
    fill(DiskPlace(tmp_path / "place"), series)
    assert thrave("prune", *words)[0] == USAGE
    assert remaining(DiskPlace(tmp_path / "place")) == sorted(series)
