"""Whatever happens to a bundle's files is found before the image gets its name, and leaves nothing behind.

With the signer's certificate and the side file every change is found. The format alone, without them, cannot notice
some: the table of those is here too, so that nobody believes it can.
"""

import dataclasses
import threading
from random import Random

import pytest

from support.bundles.bundle_damage import TO_A_PART, damages
from support.bundles.sample_bundles import MemoryImage, bundle_of, certificate, private_key
from thrave.bundle.errors import DamagedError, PartDamagedError, PartMissingError, WrongKeyError
from thrave.bundle.opener import open_bundle

PART = 4096


@pytest.fixture(scope="module")
def bundle():
    made = bundle_of(MemoryImage(Random(1).randbytes(10_000) + bytes(6384)), part_size=PART)
    assert len(made.parts) == 3
    return made


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("bundle-")] == []


def open_with_everything(bundle, output):
    trust = {"certificate": certificate("user"), "side_file": bundle.side_file}
    return open_bundle(bundle.manifest, bundle, private_key("user"), output, **trust)


def open_with_nothing_but_the_key(bundle, output):
    return open_bundle(bundle.manifest, bundle, private_key("user"), output)


def with_parts(bundle, **changed):
    names = list(bundle.parts)
    replaced = {names[int(index.removeprefix("part"))]: data for index, data in changed.items()}
    return dataclasses.replace(bundle, parts={**bundle.parts, **replaced})


@pytest.mark.parametrize("open_damaged", [open_with_everything, open_with_nothing_but_the_key])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("damage", TO_A_PART)
def test_verify_detects_any_change_to_a_part(bundle, tmp_path, open_damaged, index, damage):
    name = list(bundle.parts)[index]
    damaged = with_parts(bundle, **{f"part{index}": TO_A_PART[damage](bundle.parts[name])})
    with pytest.raises(PartDamagedError, match=name):
        open_damaged(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("open_damaged", [open_with_everything, open_with_nothing_but_the_key])
@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 2)])
def test_verify_detects_swapped_and_repeated_parts(bundle, tmp_path, open_damaged, first, second):
    data = list(bundle.parts.values())
    swapped = with_parts(bundle, **{f"part{first}": data[second], f"part{second}": data[first]})
    repeated = with_parts(bundle, **{f"part{second}": data[first]})
    for damaged in (swapped, repeated):
        with pytest.raises(PartDamagedError):
            open_damaged(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", range(3))
def test_verify_names_missing_part(bundle, tmp_path, index):
    name = list(bundle.parts)[index]
    damaged = dataclasses.replace(bundle, parts={n: data for n, data in bundle.parts.items() if n != name})
    with pytest.raises(PartMissingError, match=name):
        open_with_everything(damaged, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


def unnoticed(bundle, open_damaged, folder):
    """What could be done to the manifest without anybody noticing."""
    missed = set()
    for name, text in damages(bundle.manifest.decode()):
        damaged = dataclasses.replace(bundle, manifest=text.encode())
        try:
            open_damaged(damaged, folder / "image").output.unlink()
            missed.add(name)
        except (DamagedError, WrongKeyError, PartMissingError):
            assert list(folder.iterdir()) == [], name
    return missed


def test_verify_detects_any_change_to_the_manifest(bundle, tmp_path):
    assert unnoticed(bundle, open_with_everything, tmp_path) == set()


def test_side_file_alone_detects_any_change_to_the_manifest(bundle, tmp_path):
    def open_with_side_file(damaged, output):
        return open_bundle(damaged.manifest, damaged, private_key("user"), output, side_file=damaged.side_file)

    assert unnoticed(bundle, open_with_side_file, tmp_path) == set()


CHANGES = ("change first of", "change middle of", "change last of")
TEXT_CHANGES = (*CHANGES, "truncate", "extend", "empty")


def each(changes, fields):
    return {f"{change} {field}" for change in changes for field in fields}


UNSIGNED_BY_DESIGN = (
    each((*TEXT_CHANGES, "drop"), ("bundler/name", "bundler/version", "bundler/release"))
    | {"drop bundler"}
    | {"swap bundler/name with bundler/version", "swap bundler/version with bundler/release"}
    | {"swap version with bundler", "swap bundler with machine_configuration", "swap image with signature"}
    | {"swap machine_configuration with image"}
)
"""What the signature does not cover: who the bundler was, and the order of what is outside the two elements."""

NEEDS_A_SIGNATURE = (
    each(("truncate", "extend", *CHANGES), ("image/name", "image/user", "image/type"))
    | each(("empty", "drop"), ("image/user", "image/type"))
    | each((*TEXT_CHANGES, "drop"), ("machine_configuration/architecture",))
    | {"drop machine_configuration"}
    | each((*CHANGES, "empty", "drop"), ("image/ec2_encrypted_key", "image/ec2_encrypted_iv", "signature"))
    | each(("drop attribute of",), ("image/digest", "image/ec2_encrypted_key", "image/user_encrypted_key"))
    | {"drop attribute of image/parts/part/digest"}
)
"""What only a signature protects: labels that opening does not need, and the slot of the other reader."""


def test_signature_detects_any_change_that_it_covers(bundle, tmp_path):
    def open_with_certificate(damaged, output):
        return open_bundle(damaged.manifest, damaged, private_key("user"), output, certificate=certificate("user"))

    assert unnoticed(bundle, open_with_certificate, tmp_path) == UNSIGNED_BY_DESIGN


def test_labels_and_order_are_unprotected_without_signature_and_side_file(bundle, tmp_path):
    missed = unnoticed(bundle, open_with_nothing_but_the_key, tmp_path)
    swaps = {name for name in missed if name.startswith("swap ")}
    assert missed - swaps == (UNSIGNED_BY_DESIGN | NEEDS_A_SIGNATURE) - swaps
