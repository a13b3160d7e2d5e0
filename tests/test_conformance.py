"""The probes of docs/reference/conformance.md, on Thrave and on moto with `thrave.moto`, and its recorded results."""

import json
from pathlib import Path

import pytest

from support.conformance import doubles
from support.conformance.probes import PROBES, run_probe

RESULTS = json.loads((Path(__file__).parents[1] / "scripts" / "conformance.json").read_text())
COLUMNS = {double["name"]: double["results"] for double in RESULTS["doubles"]}


ONE_OF_EACH = [name if name == "opens" else pytest.param(name, marks=pytest.mark.sweep) for name in PROBES]


@pytest.fixture(scope="module")
def thrave(thrave_service):
    yield (double := doubles.Thrave.of(thrave_service))
    double.account.close()


@pytest.fixture(scope="module")
def moto_with_thrave(tmp_path_factory):
    with doubles.moto_with_thrave(tmp_path_factory.mktemp("moto")) as double:
        yield double


@pytest.mark.parametrize("probe", ONE_OF_EACH)
def test_thrave_does_what_the_page_says(probe, thrave):
    assert run_probe(PROBES[probe], thrave)._asdict() == COLUMNS["Thrave"][probe]


@pytest.mark.parametrize("probe", ONE_OF_EACH)
def test_moto_with_thrave_does_what_the_page_says(probe, moto_with_thrave):
    assert run_probe(PROBES[probe], moto_with_thrave)._asdict() == COLUMNS["moto with `thrave.moto`"][probe]


def test_page_has_every_probe_for_every_double():
    assert {name: [row.area, row.title] for name, row in PROBES.items()} == {
        name: [row["area"], row["title"]] for name, row in RESULTS["probes"].items()
    }
    assert all(list(results) == list(PROBES) for results in COLUMNS.values())
