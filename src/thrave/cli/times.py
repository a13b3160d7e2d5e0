"""Times as people write and read them: `2h`, `3d`, `2026-11-23T19:00Z`."""

import re
from datetime import UTC, datetime, timedelta

import click

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Since(click.ParamType[datetime]):
    """A point in time: an ISO 8601 date or time (UTC, unless it says otherwise), or how long ago it was."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Give the time, aware. Fails the command line if it is none."""
        text = str(value)
        try:
            return _ago(text) or _aware(datetime.fromisoformat(text))
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is no time; write 2h, 3d or 2026-11-23T19:00Z", param, ctx)


def span(time: timedelta) -> str:
    """How long something takes, for people: `0.4 s`, `42 s`, `7 min`, `3.5 h`, `12 d`."""
    seconds = max(time.total_seconds(), 0)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def _ago(text: str) -> datetime | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    return match and datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: float(match[1])})


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
