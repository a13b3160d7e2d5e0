"""The benchmark program: it runs, checks its results, and measures what it says."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_bench_runs_and_stores_results(tmp_path):
    options = ["--quick", "--only", "empty", "--inputs", tmp_path / "inputs", "--results", tmp_path]
    # The benchmark counts bytes written to a disk. Coverage in subprocesses writes its data there, and Python writes
    # compiled modules when they are imported for the first time.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    plain["PYTHONDONTWRITEBYTECODE"] = "1"
    bench = [sys.executable, BENCHMARKS / "bench.py", *options]
    subprocess.run(bench, check=True, stdout=subprocess.DEVNULL, env=plain)
    kept = json.loads((tmp_path / "quick.json").read_text())
    (contest,) = kept["contests"]
    (row,) = contest["rows"]
    (run,) = row["runs"]
    assert (contest["name"], row["name"]) == ("empty", "thrave")
    assert run["cpu"] > 0
    assert run["memory"] > 0
    assert 0 < run["size"] < 1 << 20
    assert run["written"] == 0
    assert {target["contest"] for target in kept["targets"]} == {"empty"}


@pytest.mark.skipif(shutil.which("igzip") is None, reason="igzip is not installed")
def test_run_checked_refuses_result_that_is_not_the_disk(tmp_path):
    from bench import run_checked
    from contenders import ShellBundle, Workspace, WrongOutputError
    from disks import Disk, DiskFolder

    disk = Disk("disk", lambda path, _folder: path.write_bytes(b"right" * 1000), 0)
    space = Workspace(DiskFolder(tmp_path / "disks"), tmp_path)
    right = ShellBundle("right", disk, ("gzip", "-1"))
    assert run_checked(right, space).size > 0
    wrong = ShellBundle("wrong", disk, ("sh", "-c", "sed s/right/wrong/ | gzip -1"))
    with pytest.raises(WrongOutputError):
        run_checked(wrong, space)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("program", "d7d70c3484ece40a"),
        ("random", "093b13e9819a533c"),
        ("text", "1894ff42e221e0dc"),
        ("zeros", "3fb3661f659e89fe"),
    ],
)
def test_realistic_contents_are_the_same_on_every_machine(kind, digest):
    from disks import RealisticContents

    content = b"".join(RealisticContents(1).chunks("file", kind, 1_500_000))
    assert len(content) == 1_500_000
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_are_equal_compares_disks_with_holes_completely(tmp_path):
    from disks import are_equal, stored_bytes

    one, other = tmp_path / "one", tmp_path / "other"
    for disk in (one, other):
        with disk.open("wb") as file:
            file.truncate(1 << 40)
    assert are_equal(one, other)
    with other.open("rb+") as file:
        file.seek(1 << 39)
        file.write(b"x")
    assert not are_equal(one, other)
    assert not are_equal(other, one)
    assert stored_bytes(one) == 0 < stored_bytes(other) < 1 << 20


def test_run_counts_bytes_written_to_a_disk_but_not_to_tmpfs(tmp_path):
    from harness import TMPFS, Step, run

    if subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip() == "tmpfs":
        pytest.skip("temporary files are on tmpfs here")

    def written(folder):
        target = folder / "thrave-bench-test"
        try:
            return run([Step([["dd", "if=/dev/zero", f"of={target}", "bs=1M", "count=3"]])]).written
        finally:
            target.unlink()

    assert written(tmp_path) >= 3 << 20
    assert written(TMPFS) == 0


def test_run_reports_which_program_failed_and_why():
    from harness import ProgramFailedError, Step, run

    with pytest.raises(ProgramFailedError, match=r"'tar'.*nowhere"):
        run([Step([["tar", "-c", "/nowhere"], ["cat"]])])


def test_judge_targets_met_missed_and_not_measured():
    from contests import judge
    from harness import Result, Row, Run

    rows = [Row("thrave open", 1, [Run(10, 1)]), Row("openssl | gzip -d | tar", 1, [Run(34, 1)])]
    slower = [rows[0], Row("openssl | gzip -d | tar", 1, [Run(32, 1), Run(20, 1), Run(99, 1)])]
    rows, slower = ([*some, Row("inflating alone", 1, [Run(8, 8)])] for some in (rows, slower))
    (met,), (missed,), (not_run,) = (
        list(judge([Result("open", "", "", some, "no disk")])) for some in (rows, slower, ())
    )
    assert (met.is_met, missed.is_met, not_run.is_met) == (True, False, None)
    assert (met.limit, missed.limit, not_run.limit) == ("", "one thread that only inflates: 4", "")


def test_kept_in_memory_maps_data_but_not_holes(tmp_path):
    from disks import kept_in_memory

    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.seek(1 << 30)
        file.write(b"x" * (1 << 20))
    with kept_in_memory([disk]):
        mapped = [line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if str(disk) in line]
        (resident,) = re.findall(r"Rss: +(\d+) kB", mapped[0])
    assert 1024 <= int(resident) < 8192


def test_bench_resumes_after_interruption(tmp_path, monkeypatch, capsys):
    import bench
    from harness import Result, Row, Run, save_results

    (empty,) = (contest for contest in bench.CONTESTS if contest.name == "empty")
    save_results(tmp_path / "unfinished.json", [Result("empty", "", "then", [Row("thrave", 0, [Run(1, 1)])])], [])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--results", str(tmp_path)])
    (result,) = bench._run_contests([empty], bench._parse_options())
    assert result.when == "then"
    assert "complete before" in capsys.readouterr().out
    assert not (tmp_path / "unfinished.json").exists()


READ_AS_ORDINARY_USER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from harness import Usage
if os.getuid() == 0:
    os.setuid(65534)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
assert Usage.of(child).cpu >= 0
"""


def test_usage_of_ended_process_is_readable_for_ordinary_user():
    subprocess.run([sys.executable, "-c", READ_AS_ORDINARY_USER, str(BENCHMARKS)], check=True)
