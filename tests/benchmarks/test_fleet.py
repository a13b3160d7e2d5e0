"""The fleet benchmark: it runs, and finds queries that read a whole table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from thrave.database import open_engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = [pytest.mark.postgres, pytest.mark.sweep]


def test_fleet_benchmark_runs_and_stores_results(postgres, tmp_path):
    fleet = [sys.executable, BENCHMARKS / "fleet.py", "--quick", "--results", tmp_path]
    subprocess.run(fleet, check=True, stdout=subprocess.DEVNULL)
    kept = json.loads((tmp_path / "fleet-quick.json").read_text())
    assert [point["rows"] for point in kept["points"]] == kept["scale"]["rows"]
    for point in kept["points"]:
        assert {"create", "run a task", "Describe one", "heartbeat", "report"} <= point["figures"].keys()
        assert all(0 < figure["p50_ms"] <= figure["p99_ms"] for figure in point["figures"].values())
    assert kept["points"][0]["figures"]["create"]["calls"] == kept["scale"]["rows"][0]
    assert kept["bytes_per_task"]["public.bundle_task"] > 0
    assert kept["bytes_per_task"]["dbos.workflow_status"] > 0
    assert kept["idle"]["connections"] > 0
    assert {"create", "run a task", "heartbeat", "thrave host list"} <= {plan["what"] for plan in kept["plans"]}


def test_query_recorder_finds_sequential_scan_of_large_table(postgres, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from fleet_measures import LARGE, QueryRecorder

    engine = open_engine(postgres.new_database())
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE task (id integer PRIMARY KEY, name text)"))
        many = sa.text("INSERT INTO task SELECT n, md5(n::text) FROM generate_series(0, :last) AS n")
        connection.execute(many, {"last": LARGE})
        connection.execute(sa.text("ANALYZE task"))
        recorder = QueryRecorder()
        for column, value in (("id", 7), ("name", "seven")):
            with recorder.during(column, engine):
                connection.execute(sa.text(f"SELECT id FROM task WHERE {column} = :it"), {"it": value})
        by_id, by_name = recorder.plans(connection)
    engine.dispose()
    assert (by_id.what, by_id.scans) == ("id", [])
    assert (by_name.what, by_name.scans) == ("name", ["task"])
