"""The public names of thrave.bundle, and the example in its docstring."""

import textwrap

import pytest

from support.bundles.sample_bundles import MemoryImage, certificate, private_key
from thrave import bundle


def test_docstring_example_seals_and_opens_image(tmp_path):
    example = textwrap.dedent(bundle.__doc__.partition("::\n")[2])
    content = bytes(range(256)) * 1000
    names = {
        **{name: getattr(bundle, name) for name in bundle.__all__},
        "image": MemoryImage(content),
        "folder": tmp_path,
        "certificate": certificate("user"),
        "private_key": private_key("user"),
    }
    exec(example, names)
    assert (tmp_path / "winami.img").read_bytes() == content


def test_each_exported_name_has_one_module():
    exports = [name for names in bundle._MODULES.values() for name in names]
    assert sorted(exports) == sorted(bundle.__all__)


def test_bundle_package_has_no_other_attributes():
    with pytest.raises(AttributeError, match="no attribute 'Seeler'"):
        _ = bundle.Seeler
