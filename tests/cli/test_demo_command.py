"""`thrave demo`: the result, and the printed commands that open the bundle without Thrave."""

import hashlib
import subprocess

import pytest

from support.required_programs import require

SIZE = 64 << 20


@pytest.fixture
def demo(tmp_path):
    return ("demo", "--size", SIZE, "--data-dir", tmp_path / "data")


def test_demo_prints_result_as_json(thrave_json, demo, tmp_path):
    result = thrave_json(*demo)
    image = tmp_path / "data" / f"{result['prefix']}.raw"
    assert (result["image"], result["size"]) == (str(image), SIZE)
    assert hashlib.sha256(image.read_bytes()).hexdigest() == result["sha256"]


def test_demo_prints_commands_that_open_bundle_with_openssl(thrave, demo, tmp_path):
    require("openssl", package="openssl")
    status, stdout, stderr = thrave(*demo)
    assert status == 0, stderr
    _, _, rest = stdout.partition("To open the bundle without Thrave")
    commands = [line for line in rest.splitlines() if line.startswith("    ")]
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", "\n".join(commands)], cwd=tmp_path, check=True, timeout=60)
    (image,) = tmp_path.glob("data/*.raw")
    assert (tmp_path / image.stem).read_bytes() == image.read_bytes()
