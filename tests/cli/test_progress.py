"""The progress bar: percent, current rate, remaining time."""

import re
import threading

import pytest

from thrave.cli import progress
from thrave.cli.progress import ProgressBar, Rate, progress_bar

MB = 1_000_000


class Clock:
    """Replaces the clock, so that no test waits."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock.monotonic)
    return clock


def lines(capsys):
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([], 0),
        ([(0, 0)], 0),
        ([(0, 0), (0, 5)], 0),
        ([(0, 0), (2, 10)], 5),
        ([(0, 0), (1, 100), (2, 110), (3, 120), (4, 130), (5, 140), (6, 150), (7, 160)], 10),
        ([(0, 0), (1, 100), (60, 159)], 1),
    ],
    ids=["nothing", "one", "no time", "two", "what is long ago does not count", "a long silence counts"],
)
def test_rate_covers_last_seconds(points, rate):
    found = Rate(5)
    for now, done in points:
        found.add(now, done)
    assert found.per_second == rate


def test_bar_without_terminal_writes_line_for_each_tenth(clock, capsys):
    bar = ProgressBar("opening", 100 * MB)
    for second in range(1, 11):
        clock.now += 1
        bar.update(10 * second * MB)
    said = lines(capsys)
    assert said[0] == "opening 10% 10 MB/s, 9 s left"
    assert said[-1] == "opening 100% 10 MB/s"
    assert len(said) == 10


def test_bar_shows_current_rate_after_slowdown(clock, capsys):
    bar = ProgressBar("opening", 1000 * MB)
    clock.now += 2
    bar.update(500 * MB)
    for second in range(1, 101):
        clock.now += 1
        bar.update((500 + second) * MB)
    assert lines(capsys)[-1] == "opening 60% 1 MB/s, 400 s left"


def test_bar_is_silent_for_short_work(clock, capsys):
    with progress_bar("opening", 100) as bar:
        clock.now += 0.9
        bar.update(100)
    assert lines(capsys) == []


def test_bar_stays_between_last_value_and_end(clock, capsys):
    bar = ProgressBar("opening", 100)
    for done in (50, 20, 60, 500):
        clock.now += 2
        bar.update(done)
    percents = [int(re.search(r"(\d+)%", line)[1]) for line in lines(capsys)]
    assert percents == [50, 60, 100]


def test_bar_follows_progress_function(clock, capsys):
    asked = threading.Event()

    def half_done():
        clock.now += 2
        asked.set()
        return 0.5

    with progress_bar("sealing", 100) as bar, bar.following(half_done):
        assert asked.wait(30)
    assert lines(capsys)[0].startswith("sealing 50%")
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_bar_accepts_total_of_zero(clock, capsys):
    bar = ProgressBar("opening", 0)
    clock.now += 2
    bar.update(0)
    assert lines(capsys) == []


def test_bar_is_drawn_on_terminal(clock, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("opening", 100 * MB) as bar:
        clock.now += 2
        bar.update(50 * MB)
        clock.now += 2
        bar.update(100 * MB)
    assert "opening" in capsys.readouterr().err
