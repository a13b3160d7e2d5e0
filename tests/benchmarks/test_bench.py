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


def test_the_benchmark_runs_and_keeps_its_figures(tmp_path):
    options = ["--quick", "--only", "empty", "--inputs", tmp_path / "inputs", "--results", tmp_path]
    # A coverage that follows into subprocesses writes its data to the disk, which the benchmark would find.
    # So is what Python compiles when it is run for the first time.
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
    assert {bar["contest"] for bar in kept["bars"]} == {"empty"}


@pytest.mark.skipif(shutil.which("igzip") is None, reason="igzip is not installed")
def test_a_result_that_is_not_the_disk_never_counts(tmp_path):
    from bench import _checked_run
    from contenders import WrongOutputError, shell_sealing

    disk = tmp_path / "disk"
    disk.write_bytes(b"right" * 1000)
    honest = shell_sealing("honest", disk, 5000, "gzip", "-1")
    assert _checked_run(honest, tmp_path).size > 0
    liar = shell_sealing("liar", disk, 5000, "sh", "-c", "sed s/right/wrong/ | gzip -1")
    with pytest.raises(WrongOutputError):
        _checked_run(liar, tmp_path)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("program", "d7d70c3484ece40a"),
        ("random", "093b13e9819a533c"),
        ("text", "1894ff42e221e0dc"),
        ("zeros", "3fb3661f659e89fe"),
    ],
)
def test_a_seed_gives_the_same_bytes_on_every_machine(kind, digest):
    from contents import Contents

    content = b"".join(Contents(1).pieces("file", kind, 1_500_000))
    assert len(content) == 1_500_000
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_disks_with_holes_are_compared_in_full(tmp_path):
    from extents import are_equal, stored_bytes

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


def test_what_is_written_to_a_disk_is_counted_and_tmpfs_is_not(tmp_path):
    from measure import TMPFS, Step, run

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


def test_a_pipeline_says_which_program_failed_and_why():
    from measure import ProgramFailedError, Step, run

    with pytest.raises(ProgramFailedError, match=r"'tar'.*nowhere"):
        run([Step([["tar", "-c", "/nowhere"], ["cat"]])])


def test_bars_are_met_missed_or_not_measured():
    from measure import Run
    from records import Result, judged
    from rows import Row

    rows = [Row("thrave open", 1, [Run(10, 1)]), Row("openssl | gzip -d | tar", 1, [Run(34, 1)])]
    slower = [rows[0], Row("openssl | gzip -d | tar", 1, [Run(32, 1), Run(20, 1), Run(99, 1)])]
    rows, slower = ([*some, Row("inflating alone", 1, [Run(8, 8)])] for some in (rows, slower))
    (met,), (missed,), (not_held,) = (
        list(judged([Result("open", "", "", some, "no disk")])) for some in (rows, slower, ())
    )
    assert (met.met, missed.met, not_held.met) == (True, False, None)
    assert (met.limit, missed.limit, not_held.limit) == ("", "one thread that only inflates: 4", "")


def test_a_disk_is_in_memory_as_long_as_a_contest_is_held_and_its_holes_are_not(tmp_path):
    from pagecache import kept_in_memory

    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.seek(1 << 30)
        file.write(b"x" * (1 << 20))
    with kept_in_memory([disk]):
        mapped = [line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if str(disk) in line]
        (resident,) = re.findall(r"Rss: +(\d+) kB", mapped[0])
    assert 1024 <= int(resident) < 8192


def test_a_benchmark_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    import bench
    from measure import Run
    from records import Result, save
    from rows import Row

    (empty,) = (contest for contest in bench.CONTESTS if contest.name == "empty")
    save(tmp_path / "unfinished.json", [Result("empty", "", "then", [Row("thrave", 0, [Run(1, 1)])])], {})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--results", str(tmp_path)])
    (result,) = bench._hold_all([empty], bench._options())
    assert result.when == "then"
    assert "held before" in capsys.readouterr().out
    assert not (tmp_path / "unfinished.json").exists()


AN_ORDINARY_USER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from measure import Usage
if os.getuid() == 0:
    os.setuid(65534)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
assert Usage.of(child).cpu >= 0
"""


def test_an_ordinary_user_can_read_the_usage_of_a_process_that_has_ended():
    subprocess.run([sys.executable, "-c", AN_ORDINARY_USER, str(BENCHMARKS)], check=True)
