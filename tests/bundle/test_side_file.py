"""The side file: which keys certify it, and which changes of parts, manifest and side file it detects."""

import base64
import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.bundles.sample_bundles import SIDE_KEY, MemoryImage, bundle_of, certificate, private_key
from thrave.bundle import side_file as side_file_module
from thrave.bundle.errors import PartDamagedError, SideFileError
from thrave.bundle.opener import verify_bundle
from thrave.bundle.side_file import read_side_file, write_side_file
from thrave.bundle.verifier import CheckSubject

OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"other".ljust(32))


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(MemoryImage(bytes(range(256)) * 100), part_size=256)


def verify(bundle, side_file, **trust):
    return verify_bundle(bundle.manifest, bundle, side_file=side_file, **trust)


def side_key_check(verified):
    (check,) = [check for check in verified.checks if check.subject is CheckSubject.SIDE_KEY]
    return check.checked, check.detail


def test_signer_certificate_is_sufficient_to_trust_side_file(bundle):
    verified = verify(bundle, bundle.side_file, certificate=certificate("user"))
    assert side_key_check(verified) == (True, "certified by the signer of the manifest")


def test_known_side_key_is_sufficient_to_trust_side_file(bundle):
    verified = verify(bundle, bundle.side_file, side_key=SIDE_KEY.public_key())
    assert side_key_check(verified) == (True, "the given side key")


def test_side_key_without_certificate_is_reported_as_not_checked(bundle):
    checked, reason = side_key_check(verify(bundle, bundle.side_file))
    assert (checked, reason) == (False, "neither a side key nor a signer's certificate was given")


def test_unknown_side_key_is_rejected(bundle):
    with pytest.raises(SideFileError, match="another key"):
        verify(bundle, bundle.side_file, side_key=OTHER_KEY.public_key())


def test_known_side_key_requires_a_side_file(bundle):
    with pytest.raises(SideFileError, match="there is no side file"):
        verify(bundle, None, side_key=SIDE_KEY.public_key())


def test_side_key_not_certified_by_signer_is_rejected(bundle):
    forged = write_side_file(bundle.sealed, bundle.manifest, side_key=OTHER_KEY, signing_key=private_key("wrong"))
    with pytest.raises(SideFileError, match="not certified"):
        verify(bundle, forged, certificate=certificate("user"))


def test_side_file_detects_part_with_colliding_sha1(bundle):
    """A part with the SHA-1 of another part, made by a SHA-1 collision, has another SHA-256 than the side file."""
    parts = (dataclasses.replace(bundle.sealed.parts[0], sha256="0" * 64), *bundle.sealed.parts[1:])
    other = dataclasses.replace(bundle.sealed, parts=parts)
    side_file = write_side_file(other, bundle.manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    with pytest.raises(PartDamagedError, match="SHA-256"):
        verify(bundle, side_file)


@pytest.mark.parametrize("change", [lambda parts: parts[:-1], lambda parts: parts[::-1]])
def test_side_file_with_other_parts_than_manifest_is_rejected(bundle, change):
    other = dataclasses.replace(bundle.sealed, parts=change(bundle.sealed.parts))
    side_file = write_side_file(other, bundle.manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    with pytest.raises(SideFileError, match="other parts"):
        verify(bundle, side_file)


def scalar_paths(document, path=()):
    """Yield the path of each value in a JSON document that is not an object or array."""
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from scalar_paths(document[key], (*path, key))
    else:
        yield path


def with_value(document, path, value):
    copy = json.loads(json.dumps(document))
    container = copy
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    return json.dumps(copy).encode()


def other_value(value):
    if isinstance(value, int):
        return value + 1
    return ("B" if value[0] == "A" else "A") + value[1:]


def test_side_file_detects_any_changed_value(bundle):
    document = json.loads(bundle.side_file)
    for path in scalar_paths(document):
        value = document
        for key in path:
            value = value[key]
        for changed in (other_value(value), None, "", -1, [], {}, 1.5, True):
            with pytest.raises(SideFileError):
                verify(bundle, with_value(document, path, changed), certificate=certificate("user"))


def test_side_file_with_other_json_layout_is_accepted(bundle):
    document = json.loads(bundle.side_file)
    for data in (json.dumps(document), json.dumps(document, sort_keys=True, indent=7)):
        verify(bundle, data.encode(), certificate=certificate("user"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1, "a": 1}',
        b'{"contents": {}, "publicKey": "AAAA", "signature": "", "keySignature": ""}',
        b'{"contents": {}, "publicKey": "***"}',
        b'{"contents": 1e999}',
    ],
)
def test_read_side_file_rejects_invalid_data(data):
    with pytest.raises(SideFileError):
        read_side_file(data)


def test_signed_side_file_of_another_format_is_rejected(bundle):
    document = json.loads(bundle.side_file)
    document["contents"]["format"] = "thrave-side-file-9"
    signature = SIDE_KEY.sign(json.dumps(document["contents"], sort_keys=True, separators=(",", ":")).encode())
    document["signature"] = base64.b64encode(signature).decode()
    with pytest.raises(SideFileError, match="format"):
        read_side_file(json.dumps(document).encode())


def test_too_large_side_file_is_not_parsed(monkeypatch):
    monkeypatch.setattr(side_file_module, "MAX_SIDE_FILE_BYTES", 10)
    with pytest.raises(SideFileError, match="more than"):
        read_side_file(b"{" * 11)
