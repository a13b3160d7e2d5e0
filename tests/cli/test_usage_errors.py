"""Mistakes in calls of the bundle commands: exit code, and one line with the remedy."""

import re
import shutil

import pytest

from support.bundles.sample_bundles import VECTORS, MemoryImage, bundle_of

FAILED, USAGE, NOT_FOUND, DAMAGED, WRONG_KEY = 1, 2, 3, 10, 11
KEYS = VECTORS / "keys"
TWO_PARTS = VECTORS / "ec2-ami-tools-1.5.3-dense-2-parts"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a bundle `small.img`, keys and a disk in it."""
    shutil.copytree(TWO_PARTS, tmp_path / "here")
    shutil.copytree(KEYS, tmp_path / "here", dirs_exist_ok=True)
    (tmp_path / "here" / "disk.raw").write_bytes(b"disk" * 1024)
    (tmp_path / "here" / "empty").mkdir()
    (tmp_path / "here" / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


OPEN = "open small.img.manifest.xml --key user-pk.pem -o out"
BUNDLE = (
    "bundle disk.raw --prefix p --to new --account 123456789012 --user-certificate user-cert.pem"
    " --service-certificate cloud-cert.pem --signing-key user-pk.pem"
)
SIGNED = f"{OPEN} --certificate user-cert.pem"
MISTAKES = [
    (OPEN.replace("small.img", "none"), NOT_FOUND, "none.manifest.xml does not exist"),
    (OPEN.replace("small.img.manifest.xml", "empty"), USAGE, "Pass the manifest: empty/PREFIX.manifest.xml"),
    (
        OPEN.replace("manifest.xml", "part.0"),
        DAMAGED,
        "a part of a bundle, not its manifest. Pass small.img.manifest.xml.",
    ),
    (OPEN.replace("user-pk", "none"), NOT_FOUND, "none.pem does not exist"),
    (OPEN.replace("user-pk", "user-cert"), USAGE, "user-cert.pem: this is a certificate. Pass its key."),
    (OPEN.replace("user-pk.pem", "disk.raw"), USAGE, "disk.raw: "),
    (OPEN.replace("user-pk.pem", "empty"), USAGE, "cannot read empty: Is a directory"),
    (OPEN.replace("user-pk", "wrong-pk"), WRONG_KEY, "this bundle was not encrypted for this private key"),
    (SIGNED.replace("user-cert", "none"), NOT_FOUND, "none.pem does not exist"),
    (SIGNED.replace("user-cert", "user-pk"), USAGE, "user-pk.pem: this is a private key. Pass its certificate."),
    (SIGNED.replace("user-cert", "cloud-cert"), DAMAGED, "was changed, or another key than this certificate's"),
    ("verify none.manifest.xml", NOT_FOUND, "none.manifest.xml does not exist"),
    ("show none.manifest.xml", NOT_FOUND, "none.manifest.xml does not exist"),
    ("show small.img.part.1", DAMAGED, "Pass small.img.manifest.xml."),
    ("copy none.manifest.xml there", NOT_FOUND, "none.manifest.xml does not exist"),
    ("delete none.manifest.xml", NOT_FOUND, "none.manifest.xml"),
    (BUNDLE.replace("disk.raw", "none.raw"), NOT_FOUND, "none.raw does not exist"),
    (BUNDLE.replace("user-cert.pem", "none.pem"), NOT_FOUND, "none.pem does not exist"),
    (BUNDLE.replace("user-cert.pem", "user-pk.pem"), USAGE, "this is a private key"),
    (OPEN.replace("-o out", "-o circle"), FAILED, "circle: its symbolic links form a loop"),
    (OPEN.replace("-o out", "--format qcow2 -o circle/out"), FAILED, "its symbolic links form a loop"),
    (f"{OPEN} --side-key disk.raw", USAGE, "disk.raw: not an Ed25519 key in PEM form"),
    (f"{OPEN} --side-key user-pk.pem", USAGE, "user-pk.pem: not an Ed25519 key in PEM form"),
    (f"show https://{'a' * 64}.example/p.manifest.xml", USAGE, "the host is not a valid host name"),
    (f"{BUNDLE} --secret-file none", NOT_FOUND, "none does not exist"),
]


@pytest.mark.parametrize(("words", "code", "said"), MISTAKES)
def test_mistake_has_exit_code_and_remedy(thrave, folder, words, code, said):
    before = sorted(folder.rglob("*"))
    status, stdout, stderr = thrave(*words.split())
    assert (status, stdout, said in stderr) == (code, "", True), stderr
    assert "Traceback" not in stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("folder")
def test_open_names_missing_part(thrave, folder):
    (folder / "small.img.part.1").unlink()
    status, _, stderr = thrave(*OPEN.split())
    assert (status, "'small.img.part.1' cannot be read: small.img.part.1 does not exist" in stderr) == (NOT_FOUND, True)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("key", ["user-pk.pem", "cloud-pk.pem", "wrong-pk.pem"])
def test_bundle_warns_about_unrelated_signing_key(thrave, key):
    status, _, stderr = thrave(*BUNDLE.replace("--signing-key user-pk.pem", f"--signing-key {key}").split())
    assert (status, "belongs to neither certificate" in stderr) == (0, key == "wrong-pk.pem")


REFUSED = ["my image", "a$b", "a;b", "~home", "-opt", "a*b", "%41", "a:b", "n" * 101, ".hid", "a/b", "é", "a&b", ""]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("prefix", REFUSED)
def test_bundle_refuses_unportable_prefix(thrave, folder, prefix):
    words = [word for word in BUNDLE.split() if word not in {"--prefix", "p"}]
    assert thrave(*words, f"--prefix={prefix}")[0] == USAGE
    assert not (folder / "new").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("prefix", ["my image", "-opt", "a*b", "n" * 101])
def test_any_name_accepts_unportable_prefix(thrave, folder, prefix):
    words = [word for word in BUNDLE.split() if word not in {"--prefix", "p"}]
    assert thrave(*words, f"--prefix={prefix}", "--any-name")[0] == 0
    opened = thrave("open", folder / "new" / f"{prefix}.manifest.xml", "--key", "user-pk.pem", "-o", "out")
    assert opened[0] == 0
    assert (folder / "out").read_bytes() == (folder / "disk.raw").read_bytes()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["open", "verify"])
@pytest.mark.parametrize(
    ("key", "is_changed", "checked", "detail"),
    [
        ("user", False, True, "made with the private key that was given"),
        ("user", True, False, "the signer is unknown, or the manifest was changed"),
        ("cloud", False, False, "the signer is unknown, or the manifest was changed"),
    ],
)
def test_open_verifies_signature_with_own_key(thrave_json, thrave, folder, command, key, is_changed, checked, detail):
    manifest = folder / "small.img.manifest.xml"
    if is_changed:
        manifest.write_bytes(manifest.read_bytes().replace(b"</parts>", b"</parts><x/>"))
    words = [command, manifest, "--key", f"{key}-pk.pem", *(["-o", "out"] if command == "open" else [])]
    (check,) = [check for check in thrave_json(*words)["checks"] if check["subject"] == "signature"]
    assert (check["checked"], detail in check["detail"]) == (checked, True)
    _, stdout, _ = thrave(*words, *(["--force"] if command == "open" else []))
    assert ("--certificate" in stdout) is not checked
    signer = ("--certificate", "user-cert.pem")
    assert thrave(*words, *signer, *(["--force"] if command == "open" else []))[0] == (DAMAGED if is_changed else 0)


def test_open_refuses_side_file_of_other_signer(thrave, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from support.bundles.sample_bundles import private_key
    from thrave.bundle.side_file import write_side_file

    made = bundle_of(MemoryImage(b"data" * 128))
    other_key = Ed25519PrivateKey.generate()
    forged = write_side_file(made.sealed, made.manifest, side_key=other_key, signing_key=private_key("wrong"))
    for name, data in {**made.parts, "disk.manifest.xml": made.manifest, "disk.manifest.json": forged}.items():
        (tmp_path / name).write_bytes(data)
    words = ("verify", tmp_path / "disk.manifest.xml", "--key")
    assert thrave(*words, KEYS / "user-pk.pem")[0] == DAMAGED
    assert thrave(*words, KEYS / "cloud-pk.pem")[0] == 0


def test_show_prints_every_field_and_escapes_names(thrave, tmp_path):
    xml = (TWO_PARTS / "small.img.manifest.xml").read_text()
    xml = xml.replace("</type>", "</type><ancestry><ancestor_ami_id>ami-0a0b0c0d</ancestor_ami_id></ancestry>")
    xml = re.sub("<filename>small.img.part.0", "<filename>a\u202eb\x9b31m", xml)
    (tmp_path / "x.manifest.xml").write_text(xml)
    _, stdout, _ = thrave("show", tmp_path / "x.manifest.xml")
    for text in ("ABC,DEF", "ephemeral0 = sdb", "root = /dev/sda1", "ami-0a0b0c0d", r"a\u202eb\u009b31m"):
        assert text in stdout
    assert all(letter.isprintable() or letter == "\n" for letter in stdout)
