"""Times of `--since`, and the format of durations."""

from datetime import UTC, datetime, timedelta

import click
import pytest

from thrave.cli.options import Since
from thrave.cli.output import format_duration


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-23", datetime(2026, 11, 23, tzinfo=UTC)),
        ("2026-11-23T19:00", datetime(2026, 11, 23, 19, tzinfo=UTC)),
        ("2026-11-23T19:00Z", datetime(2026, 11, 23, 19, tzinfo=UTC)),
        ("2026-11-23T19:00+01:00", datetime(2026, 11, 23, 18, tzinfo=UTC)),
    ],
)
def test_since_without_offset_is_utc(text, time):
    assert Since().convert(text, None, None) == time


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("1.5d", timedelta(days=1.5)),
    ],
)
def test_since_accepts_age(text, ago):
    before = datetime.now(UTC) - ago
    assert before <= Since().convert(text, None, None) <= datetime.now(UTC) - ago


@pytest.mark.parametrize("text", ["", "h", "2w", "-2h", "yesterday", "2026-13-01", "99999999999d", "٢h"])
def test_since_rejects_invalid_time(text):
    with pytest.raises(click.BadParameter, match="Examples: 2h"):
        Since().convert(text, None, None)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0.0 s"), (0.44, "0.4 s"), (9.9, "9.9 s"), (42, "42 s"), (119, "119 s"), (420, "7 min"), (7200, "2.0 h"),
        (12600, "3.5 h"), (172800, "2 d"),
    ],
)  # fmt: skip
def test_format_duration_chooses_unit(seconds, said):
    assert format_duration(timedelta(seconds=seconds)) == said
