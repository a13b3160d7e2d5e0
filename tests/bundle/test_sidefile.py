"""The side file: what it proves, to whom, and that it cannot be talked out of it."""

import base64
import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.bundles.sample_bundles import SIDE_KEY, MemoryImage, bundle_of, certificate, private_key
from thrave.bundle import side_file as sidefile
from thrave.bundle.errors import PartDamagedError, SideFileError
from thrave.bundle.opener import verify_bundle
from thrave.bundle.side_file import read_side_file, write_side_file
from thrave.bundle.verifier import CheckSubject

STRANGER = Ed25519PrivateKey.from_private_bytes(b"stranger".ljust(32))


@pytest.fixture(scope="module")
def bundle():
    return bundle_of(MemoryImage(bytes(range(256)) * 100), part_size=256)


def verify(bundle, side_file, **trust):
    return verify_bundle(bundle.manifest, bundle, side_file=side_file, **trust)


def side_key_check(verified):
    (check,) = [check for check in verified.checks if check.subject is CheckSubject.SIDE_KEY]
    return check.checked, check.detail


def test_the_signers_certificate_is_enough_to_trust_it(bundle):
    verified = verify(bundle, bundle.side_file, certificate=certificate("user"))
    assert side_key_check(verified) == (True, "the manifest's signer vouches for it")


def test_a_known_side_key_is_enough_to_trust_it(bundle):
    verified = verify(bundle, bundle.side_file, side_key=SIDE_KEY.public_key())
    assert side_key_check(verified) == (True, "it is the given one")


def test_without_either_its_key_is_reported_as_not_checked(bundle):
    checked, reason = side_key_check(verify(bundle, bundle.side_file))
    assert (checked, reason) == (False, "neither a side key nor a signer's certificate was given")


def test_another_side_key_than_the_known_one_is_refused(bundle):
    with pytest.raises(SideFileError, match="another key"):
        verify(bundle, bundle.side_file, side_key=STRANGER.public_key())


def test_whoever_knows_the_side_key_insists_on_a_side_file(bundle):
    with pytest.raises(SideFileError, match="there is no side file"):
        verify(bundle, None, side_key=SIDE_KEY.public_key())


def test_a_key_that_the_signer_does_not_vouch_for_is_refused(bundle):
    forged = write_side_file(bundle.sealed, bundle.manifest, side_key=STRANGER, signing_key=private_key("wrong"))
    with pytest.raises(SideFileError, match="vouch"):
        verify(bundle, forged, certificate=certificate("user"))


def test_it_finds_a_part_that_only_sha1_would_believe(bundle):
    """Somebody who can make SHA-1 collide cannot make SHA-256 collide: here the recorded SHA-256 differs."""
    parts = (dataclasses.replace(bundle.sealed.parts[0], sha256="0" * 64), *bundle.sealed.parts[1:])
    other = dataclasses.replace(bundle.sealed, parts=parts)
    side_file = write_side_file(other, bundle.manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    with pytest.raises(PartDamagedError, match="SHA-256"):
        verify(bundle, side_file)


@pytest.mark.parametrize("change", [lambda parts: parts[:-1], lambda parts: parts[::-1]])
def test_it_lists_exactly_the_parts_of_the_manifest(bundle, change):
    other = dataclasses.replace(bundle.sealed, parts=change(bundle.sealed.parts))
    side_file = write_side_file(other, bundle.manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
    with pytest.raises(SideFileError, match="other parts"):
        verify(bundle, side_file)


def scalars(document, path=()):
    """The paths of all values in a JSON document that are no containers."""
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from scalars(document[key], (*path, key))
    else:
        yield path


def with_value(document, path, value):
    copy = json.loads(json.dumps(document))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(copy).encode()


def other_value(value):
    if isinstance(value, int):
        return value + 1
    return ("B" if value[0] == "A" else "A") + value[1:]


def test_any_change_to_any_value_is_found(bundle):
    document = json.loads(bundle.side_file)
    for path in scalars(document):
        value = document
        for key in path:
            value = value[key]
        for changed in (other_value(value), None, "", -1, [], {}, 1.5, True):
            with pytest.raises(SideFileError):
                verify(bundle, with_value(document, path, changed), certificate=certificate("user"))


def test_its_layout_is_free(bundle):
    document = json.loads(bundle.side_file)
    for text in (json.dumps(document), json.dumps(document, sort_keys=True, indent=7)):
        verify(bundle, text.encode(), certificate=certificate("user"))


@pytest.mark.parametrize(
    "text",
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
def test_what_is_none_is_refused(text):
    with pytest.raises(SideFileError):
        read_side_file(text)


def test_one_of_another_format_is_refused_even_if_well_signed(bundle):
    document = json.loads(bundle.side_file)
    document["contents"]["format"] = "thrave-side-file-9"
    signature = SIDE_KEY.sign(json.dumps(document["contents"], sort_keys=True, separators=(",", ":")).encode())
    document["signature"] = base64.b64encode(signature).decode()
    with pytest.raises(SideFileError, match="format"):
        read_side_file(json.dumps(document).encode())


def test_one_that_is_too_large_is_not_even_parsed(monkeypatch):
    monkeypatch.setattr(sidefile, "MOST_BYTES", 10)
    with pytest.raises(SideFileError, match="more than"):
        read_side_file(b"{" * 11)
