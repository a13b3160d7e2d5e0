"""The benchmark of downtime with a small disk."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.libvirt, pytest.mark.sweep]


def test_downtime_benchmark_measures_both_modes_and_stores_results(libvirtd, guest, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import downtime

    monkeypatch.setattr(downtime, "running_host", lambda: nullcontext(libvirtd))
    downtime.main(["--quick", "--inputs", str(tmp_path / "inputs"), "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "downtime-quick.json").read_text())
    assert [(point["mode"], point["data"]) for point in kept["points"]] == [
        ("overlay", 32 << 20),
        ("offline", 32 << 20),
    ]
    for point in kept["points"]:
        (down,) = point["rounds"]
        assert 0 < down["started"] < down["ready"]
    assert kept["points"][1]["rounds"][0]["started"] < kept["points"][1]["rounds"][0]["task"]
