"""Opening detects damaged files before the image gets its name, and then leaves no file.

With the signer's certificate and the side file every change is detected. Without them the format cannot detect some
changes; `UNSIGNED_BY_DESIGN` and `DETECTED_BY_SIGNATURE_ONLY` list these changes.
"""

import dataclasses
import threading
from random import Random

import pytest

from support.bundles.bundle_damage import PART_DAMAGES, damaged_manifests
from support.bundles.sample_bundles import MemoryImage, bundle_of, certificate, private_key
from thrave.bundle.errors import DamagedError, PartDamagedError, PartMissingError, WrongKeyError
from thrave.bundle.opener import open_bundle

PART = 4096


@pytest.fixture(scope="module")
def bundle():
    bundle = bundle_of(MemoryImage(Random(1).randbytes(10_000) + bytes(6384)), part_size=PART)
    assert len(bundle.parts) == 3
    return bundle


@pytest.fixture(autouse=True)
def no_thread_remains():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("bundle-")] == []


def open_with_all_checks(bundle, output):
    trust = {"certificate": certificate("user"), "side_file": bundle.side_file}
    return open_bundle(bundle.manifest, bundle, private_key("user"), output, **trust)


def open_with_key_only(bundle, output):
    return open_bundle(bundle.manifest, bundle, private_key("user"), output)


def with_parts(bundle, **changed):
    names = list(bundle.parts)
    replaced = {names[int(index.removeprefix("part"))]: data for index, data in changed.items()}
    return dataclasses.replace(bundle, parts={**bundle.parts, **replaced})


@pytest.mark.parametrize("open_damaged", [open_with_all_checks, open_with_key_only])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("damage", PART_DAMAGES)
def test_open_detects_damaged_part(bundle, tmp_path, open_damaged, index, damage):
    name = list(bundle.parts)[index]
    damaged = with_parts(bundle, **{f"part{index}": PART_DAMAGES[damage](bundle.parts[name])})
    with pytest.raises(PartDamagedError, match=name):
        open_damaged(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("open_damaged", [open_with_all_checks, open_with_key_only])
@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_open_detects_swapped_and_repeated_parts(bundle, tmp_path, open_damaged, first, second):
    data = list(bundle.parts.values())
    swapped = with_parts(bundle, **{f"part{first}": data[second], f"part{second}": data[first]})
    repeated = with_parts(bundle, **{f"part{second}": data[first]})
    for damaged in (swapped, repeated):
        with pytest.raises(PartDamagedError):
            open_damaged(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", range(3))
def test_open_names_missing_part(bundle, tmp_path, index):
    name = list(bundle.parts)[index]
    damaged = dataclasses.replace(bundle, parts={n: data for n, data in bundle.parts.items() if n != name})
    with pytest.raises(PartMissingError, match=name):
        open_with_all_checks(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


def undetected_changes(bundle, open_damaged, folder):
    """Return the names of the changes to the manifest that opening does not detect."""
    undetected = set()
    for name, text in damaged_manifests(bundle.manifest.decode()):
        damaged = dataclasses.replace(bundle, manifest=text.encode())
        try:
            open_damaged(damaged, folder / "image").output.unlink()
            undetected.add(name)
        except (DamagedError, WrongKeyError, PartMissingError):
            assert list(folder.iterdir()) == [], name
    return undetected


def test_open_with_all_checks_detects_any_change_to_manifest(bundle, tmp_path):
    assert undetected_changes(bundle, open_with_all_checks, tmp_path) == set()


def test_side_file_alone_detects_any_change_to_manifest(bundle, tmp_path):
    def open_with_side_file(damaged, output):
        return open_bundle(damaged.manifest, damaged, private_key("user"), output, side_file=damaged.side_file)

    assert undetected_changes(bundle, open_with_side_file, tmp_path) == set()


CHANGES = ("change first of", "change middle of", "change last of")
TEXT_CHANGES = (*CHANGES, "truncate", "extend", "empty")


def all_pairs(changes, fields):
    return {f"{change} {field}" for change in changes for field in fields}


UNSIGNED_BY_DESIGN = (
    all_pairs((*TEXT_CHANGES, "drop"), ("bundler/name", "bundler/version", "bundler/release"))
    | {"drop bundler"}
    | {"swap bundler/name with bundler/version", "swap bundler/version with bundler/release"}
    | {"swap version with bundler", "swap bundler with machine_configuration", "swap image with signature"}
    | {"swap machine_configuration with image"}
)
"""Changes that the signature does not cover: the bundler, and the order of elements outside the two signed ones."""

DETECTED_BY_SIGNATURE_ONLY = (
    all_pairs(("truncate", "extend", *CHANGES), ("image/name", "image/user", "image/type"))
    | all_pairs(("empty", "drop"), ("image/user", "image/type"))
    | all_pairs((*TEXT_CHANGES, "drop"), ("machine_configuration/architecture",))
    | {"drop machine_configuration"}
    | all_pairs((*CHANGES, "empty", "drop"), ("image/ec2_encrypted_key", "image/ec2_encrypted_iv", "signature"))
    | all_pairs(("drop attribute of",), ("image/digest", "image/ec2_encrypted_key", "image/user_encrypted_key"))
    | {"drop attribute of image/parts/part/digest"}
)
"""Changes that only a signature detects: labels that opening does not use, and the key slot of the other reader."""


def test_signature_detects_all_but_unsigned_changes(bundle, tmp_path):
    def open_with_certificate(damaged, output):
        return open_bundle(damaged.manifest, damaged, private_key("user"), output, certificate=certificate("user"))

    assert undetected_changes(bundle, open_with_certificate, tmp_path) == UNSIGNED_BY_DESIGN


def test_open_with_key_only_misses_label_and_order_changes(bundle, tmp_path):
    undetected = undetected_changes(bundle, open_with_key_only, tmp_path)
    swaps = {name for name in undetected if name.startswith("swap ")}
    assert undetected - swaps == (UNSIGNED_BY_DESIGN | DETECTED_BY_SIGNATURE_ONLY) - swaps
