"""`thrave copy`, `delete`, `migrate`, `open`, `verify` and `show`, on the disk and in real stores."""

import re
from functools import partial
from itertools import count

import pytest

from support.buckets.bundle_folders import BucketPlace, DiskPlace
from support.bundles.sample_bundles import VECTORS, MemoryImage, bundle_of, private_key
from support.servers.stores import ALICE
from thrave.bundle.manifest import read_manifest
from thrave.bundle.manifest_xml import sign
from thrave.bundle.verifier import Sample
from thrave.cli.folders import FolderError, LocalFolder
from thrave.cli.remote_folders import S3Folder

FAILED, USAGE, NOT_FOUND, REFUSED, DAMAGED, WRONG_KEY = 1, 2, 3, 4, 10, 11
KEYS = VECTORS / "keys"
SIGNER = ("--certificate", KEYS / "user-cert.pem")
IMAGE = bytes(range(256)) * 100
NEIGHBOURS = ("winami.part.0.bak", "winami2.part.0", "winami.part.x", "winami2.manifest.xml", "notes.txt")
PLACES = ["disk", pytest.param("seaweedfs", marks=pytest.mark.s3)]


@pytest.fixture(scope="module")
def made():
    return bundle_of(MemoryImage(IMAGE), "winami", part_size=256)


@pytest.fixture(scope="module")
def files(made):
    return {**made.parts, "winami.manifest.json": made.side_file, "winami.manifest.xml": made.manifest}


@pytest.fixture(params=PLACES)
def new_place(request, tmp_path, monkeypatch):
    """Creates locations of one kind."""
    if request.param == "disk":
        names = iter("abcdef")
        return lambda: DiskPlace(tmp_path / next(names))
    store = request.getfixturevalue(request.param)
    aws_settings(monkeypatch, store, tmp_path)
    return partial(BucketPlace, store)


def aws_settings(monkeypatch, store, folder):
    """Settings of the AWS tools; hides the settings of the account that runs the tests."""
    settings = {
        "AWS_ENDPOINT_URL_S3": store.url,
        "AWS_ACCESS_KEY_ID": ALICE.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ALICE.secret_access_key,
        "AWS_CONFIG_FILE": str(folder / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def place(new_place, files):
    """A location with the bundle."""
    place = new_place()
    for name, data in files.items():
        place.put(name, data)
    return place


@pytest.fixture
def address(place):
    return f"{place.address}/winami.manifest.xml"


def forged(made, pattern, new):
    """Return the manifest with a replaced text, signed by the user."""
    unsigned = re.sub(pattern, new, made.manifest[: made.manifest.index(b"<signature>")])
    return unsigned + f"<signature>{sign(unsigned, private_key('user')).hex()}</signature></manifest>".encode()


def test_open_verify_and_show_read_every_location(thrave_json, address, made, tmp_path):
    opened = thrave_json("open", address, *SIGNER, "--key", KEYS / "cloud-pk.pem", "-o", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == IMAGE
    assert opened["manifest"] == address
    checks = thrave_json("verify", address, *SIGNER, "--key", KEYS / "user-pk.pem")["checks"]
    assert all(check["checked"] for check in checks)
    assert len(thrave_json("show", address)["parts"]) == len(made.parts)


def test_open_reports_missing_side_file(thrave_json, place, address):
    place.remove("winami.manifest.json")
    checks = {check["subject"]: check["checked"] for check in thrave_json("verify", address)["checks"]}
    assert (checks["sideFile"], checks["partDigests"]) == (False, True)


def test_verify_sample_is_repeatable_with_reported_seed(thrave, thrave_json, place, address, made):
    command = ("verify", address, *SIGNER, "--sample", "20%")
    (digests,) = [check for check in thrave_json(*command)["checks"] if check["subject"] == "partDigests"]
    seed = re.search(r"seed (\d+)", digests["detail"])[1]
    assert not digests["checked"]
    assert thrave(*command, "--seed", seed)[0] == 0
    last = max(made.parts)
    place.put(last, made.parts[last][:-1] + b"x")
    with_it, without_it = (seed_of_a_sample(made, last, drawn=drawn) for drawn in (True, False))
    assert thrave(*command, "--seed", with_it)[0] == DAMAGED
    assert thrave(*command, "--seed", without_it)[0] == 0
    place.remove(last)
    assert thrave(*command, "--seed", without_it)[0] == NOT_FOUND


def seed_of_a_sample(made, filename, *, drawn):
    """Return a seed whose 20 % sample contains a part, or does not contain it."""
    manifest = read_manifest(made.manifest)
    samples = ((seed, {part.filename for part in Sample(20, seed).choose(manifest)}) for seed in count())
    return next(seed for seed, names in samples if (filename in names) is drawn)


@pytest.mark.parametrize("percent", ["0%", "101%", "-1", "many", "5%%"])
def test_verify_rejects_invalid_sample(thrave, tmp_path, percent):
    status, _, stderr = thrave("verify", VECTORS / "go_ami_tools" / "tiny.manifest.xml", "--sample", percent)
    assert (status, "Invalid percentage" in stderr or "such option" in stderr) == (USAGE, True)


def test_verify_rejects_sample_with_key(thrave):
    manifest = VECTORS / "go_ami_tools" / "tiny.manifest.xml"
    status, _, stderr = thrave("verify", manifest, "--sample", "5%", "--key", KEYS / "user-pk.pem")
    assert (status, "--sample is not possible" in stderr) == (USAGE, True)


def test_copy_copies_identical_files(thrave_json, new_place, address, files):
    there = new_place()
    copied = thrave_json("copy", address, there.address, *SIGNER)
    assert there.files() == files
    assert (copied["source"], copied["manifest"]) == (address, f"{there.address}/winami.manifest.xml")
    assert copied["partsSent"] == len(files) - 2
    assert all(check["checked"] for check in copied["checks"])


def test_copy_to_store_and_back_keeps_bundle(thrave_json, new_place, files, tmp_path):
    here, there, back = DiskPlace(tmp_path / "here"), new_place(), DiskPlace(tmp_path / "back")
    for name, data in files.items():
        here.put(name, data)
    thrave_json("copy", f"{here.address}/winami.manifest.xml", f"{there.address}/winami.manifest.xml")
    thrave_json("copy", f"{there.address}/winami.manifest.xml", f"{back.address}/")
    assert back.files() == files


def test_copy_resumes_after_interruption(thrave, thrave_json, new_place, place, address, made, files):
    gone = max(made.parts)
    place.remove(gone)
    there = new_place()
    assert thrave("copy", address, there.address)[0] == NOT_FOUND
    assert "winami.manifest.xml" not in there.files()
    place.put(gone, made.parts[gone])
    wrong = min(made.parts)
    there.put(wrong, made.parts[wrong][:-1] + b"x")
    assert thrave_json("copy", address, there.address)["partsSent"] == 2
    assert there.files() == files
    assert thrave_json("copy", address, there.address)["partsSent"] == 0


def test_copy_does_not_replace_other_bundle(thrave, new_place, address, made):
    there = new_place()
    there.put("winami.manifest.xml", made.manifest + b" ")
    status, _, stderr = thrave("copy", address, there.address)
    assert (status, "another bundle" in stderr) == (REFUSED, True)
    assert [*there.files()] == ["winami.manifest.xml"]


def test_copy_refuses_other_file_name(thrave, new_place, address):
    there = new_place()
    status, _, stderr = thrave("copy", address, f"{there.address}/other.manifest.xml")
    assert (status, "signed manifest" in stderr) == (USAGE, True)
    assert there.files() == {}


def test_copy_of_damaged_bundle_writes_no_manifest(thrave, new_place, place, address, made):
    wrong = max(made.parts)
    place.put(wrong, made.parts[wrong][:-1] + b"x")
    there = new_place()
    assert thrave("copy", address, there.address)[0] == DAMAGED
    assert "winami.manifest.xml" not in there.files()
    assert wrong not in there.files()


@pytest.mark.parametrize("command", ["copy", "delete"])
def test_copy_and_delete_refuse_manifest_with_other_file_names(thrave, place, address, made, tmp_path, command):
    place.remove("winami.manifest.json")
    place.put(
        "winami.manifest.xml",
        forged(
            made,
            rb"<filename>winami\.part\.\d+",
            b"<filename>notes.txt",
        ),
    )
    place.put("notes.txt", b"mine")
    before = place.files()
    words = ("copy", address, tmp_path / "there") if command == "copy" else ("delete", "--yes", address)
    status, _, stderr = thrave(*words)
    assert (status, "Traceback" in stderr) == (DAMAGED, False)
    assert place.files() == before
    assert not (tmp_path / "there").exists()


def test_delete_removes_only_one_bundle(thrave_json, place, address, files):
    for name in NEIGHBOURS:
        place.put(name, b"mine")
    dry = thrave_json("delete", "--yes", address, *SIGNER, "--dry-run")
    assert place.files() == {**files, **dict.fromkeys(NEIGHBOURS, b"mine")}
    done = thrave_json("delete", "--yes", address, *SIGNER)
    assert place.files() == dict.fromkeys(NEIGHBOURS, b"mine")
    assert dry["files"] == done["files"]
    assert (dry["removed"], done["removed"], len(done["files"])) == (False, True, len(files))


def renamed(made, middle, series=b""):
    """Return the files of the bundle with other part names, signed by the user."""
    ending = middle + b".part." + series
    xml = forged(made, rb"<filename>winami\.part\.", b"<filename>winami" + ending)
    parts = {name.replace(".part.", ending.decode()): data for name, data in made.parts.items()}
    return {**parts, "winami.manifest.xml": xml}


def test_parts_with_series_are_verified_copied_and_deleted(thrave_json, new_place, made, tmp_path):
    place, there = new_place(), new_place()
    files = renamed(made, b"", b"652105670941")
    for name, data in {**files, **dict.fromkeys(NEIGHBOURS, b"mine")}.items():
        place.put(name, data)
    address = f"{place.address}/winami.manifest.xml"
    thrave_json("open", address, *SIGNER, "--key", KEYS / "user-pk.pem", "-o", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == IMAGE
    thrave_json("verify", address, *SIGNER, "--sample", "10%")
    thrave_json("copy", address, there.address, *SIGNER)
    assert there.files() == files
    thrave_json(*migration(f"{there.address}/winami.manifest.xml"))
    thrave_json("delete", "--yes", address, *SIGNER)
    assert place.files() == dict.fromkeys(NEIGHBOURS, b"mine")


@pytest.mark.parametrize("command", ["copy", "delete"])
@pytest.mark.parametrize("middle", [b".server", b".a.b", b".k3f9", b"2", b"..", b".server/x", b""])
def test_copy_and_delete_refuse_parts_of_other_bundle(thrave, new_place, made, tmp_path, command, middle):
    """`winami.server` is another bundle. In the second case only some parts of `winami` have other names."""
    place = new_place()
    files = renamed(made, middle)
    if not middle:
        first = min(made.parts)
        other = first.replace("winami", "winami.x")
        files["winami.manifest.xml"] = forged(made, f"<filename>{first}<".encode(), f"<filename>{other}<".encode())
        files[other] = files[first]
    for name, data in files.items():
        if "/" not in name:
            place.put(name, data)
    place.put("winami.server.manifest.xml", made.manifest)
    before = place.files()
    address = f"{place.address}/winami.manifest.xml"
    words = ("copy", address, tmp_path / "there") if command == "copy" else ("delete", "--yes", address)
    status, _, stderr = thrave(*words)
    assert (status, "Traceback" in stderr) == (DAMAGED, False)
    assert place.files() == before
    assert not (tmp_path / "there").exists()


def test_delete_resumes_after_interruption(thrave, thrave_json, place, address, made):
    place.remove("winami.manifest.xml")
    place.remove(min(made.parts))
    thrave_json("delete", "--yes", address, *SIGNER)
    assert place.files() == {}
    assert thrave("delete", "--yes", address)[0] == NOT_FOUND


@pytest.mark.parametrize("manifest_is_there", [True, False])
def test_delete_refuses_other_signer(thrave, place, address, manifest_is_there):
    if not manifest_is_there:
        place.remove("winami.manifest.xml")
    before = place.files()
    assert thrave("delete", "--yes", address, "--certificate", KEYS / "cloud-cert.pem")[0] == DAMAGED
    assert place.files() == before


def migration(address, *more):
    return (
        "migrate", address, *SIGNER, "--key", KEYS / "user-pk.pem", "--signing-key", KEYS / "user-pk.pem",
        "--service-certificate", KEYS / "user-cert.pem", *more,
    )  # fmt: skip


def test_migrate_encrypts_for_new_service_and_keeps_parts(thrave, thrave_json, place, address, made):
    """The service's certificate is `cloud` before and `user` afterwards."""
    migrated = thrave_json(*migration(address, "--account", "999999999999"))
    assert migrated == {"manifest": address, "sideFile": address.replace(".xml", ".json")}
    checks = thrave_json("verify", address, *SIGNER, "--key", KEYS / "user-pk.pem")
    assert all(check["checked"] for check in checks["checks"])
    assert checks["accountId"] == "999999999999"
    assert {name: data for name, data in place.files().items() if ".part." in name} == made.parts
    assert thrave("verify", address, "--key", KEYS / "cloud-pk.pem")[0] == WRONG_KEY


def test_migrate_to_other_folder_replaces_nothing(thrave, thrave_json, new_place, place, address, files):
    there = new_place()
    thrave_json(*migration(address, "--to", there.address))
    assert place.files() == files
    assert there.files().keys() == {"winami.manifest.xml", "winami.manifest.json"}
    assert thrave(*migration(address, "--to", place.address))[0] == REFUSED
    assert place.files() == files


def test_migrate_restores_bundle_after_failed_write(thrave, place, address, monkeypatch):
    before = place.files()
    for kind in (LocalFolder, S3Folder):
        monkeypatch.setattr(kind, "write", fails_once(kind.write, FolderError("the disk is full")))
    status, _, stderr = thrave(*migration(address))
    assert (status, "full" in stderr) == (FAILED, True)
    assert place.files() == before


def fails_once(function, error):
    """Return a function that fails at its first call."""
    failures = iter([error])

    def called(*arguments):
        for failure in failures:
            raise failure
        return function(*arguments)

    return called


def test_migrate_refuses_invalid_bundle(thrave, place, address, made):
    place.put("winami.manifest.xml", made.manifest.replace(b"123456789012", b"999999999999"))
    before = place.files()
    assert thrave(*migration(address))[0] == DAMAGED
    assert place.files() == before


def test_migrate_reports_missing_side_file(thrave, place, address):
    place.remove("winami.manifest.json")
    status, stdout, _ = thrave(*migration(address))
    assert (status, "no side file" in stdout) == (0, True)
    assert "winami.manifest.json" not in place.files()


@pytest.mark.rgw
def test_commands_work_on_strict_store(thrave_json, rgw, files, tmp_path, monkeypatch):
    aws_settings(monkeypatch, rgw, tmp_path)
    here, there = DiskPlace(tmp_path / "here"), BucketPlace(rgw)
    for name, data in files.items():
        here.put(name, data)
    address = f"{there.address}/winami.manifest.xml"
    assert thrave_json("copy", f"{here.address}/winami.manifest.xml", there.address)["manifest"] == address
    thrave_json("verify", address, "--sample", "10%")
    thrave_json(*migration(address))
    thrave_json("open", address, *SIGNER, "--key", KEYS / "user-pk.pem", "-o", tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == IMAGE
    thrave_json("delete", "--yes", address)
    assert there.files() == {}
