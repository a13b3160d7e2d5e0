"""Power recovery: an error of one instance does not delay the others."""

from types import SimpleNamespace

import pytest

from thrave.concurrency import NoThreadError, start_thread
from thrave.tasks import housekeeping
from thrave.tasks.housekeeping import PowerRecovery
from thrave.tasks.lease import LeaseExpiredError, RightLostError

TASKS = [SimpleNamespace(bundle_id=f"bun-{number}", instance_id=f"i-{number}") for number in range(3)]


class OwnRecords:
    """Three tasks of this host. A method that the test names raises for the first two of them."""

    def __init__(self, *, method, error):
        self._method, self._error = method, error

    def unmerged_overlays(self, _host):
        return TASKS

    def in_progress(self, instance_id):
        self._fail("in_progress", instance_id)

    def require_lease(self, bundle_id):
        self._fail("require_lease", bundle_id)

    def _fail(self, method, name):
        if method == self._method and not name.endswith("2"):
            raise self._error


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("require_lease", RightLostError("bun-0")),
        ("in_progress", OSError("the database is away")),
        ("check", LeaseExpiredError()),
        ("merge_within", NoThreadError("no thread can be started")),
    ],
)
def test_merge_overlays_continues_after_error(monkeypatch, method, error):
    merged, checks = [], iter([error, error, None])

    class Merging:
        def __init__(self, _instances, _records, task, *, check):
            self._task = task

        def merge_with_timeout(self, _seconds):
            if method == "merge_within" and self._task is not TASKS[2]:
                raise error
            merged.append(self._task.instance_id)

    def check():
        if method == "check" and (raised := next(checks)) is not None:
            raise raised

    monkeypatch.setattr(housekeeping, "RootOverlay", Merging)
    PowerRecovery(OwnRecords(method=method, error=error), None, "host-a", check=check).merge_overlays()
    assert merged == ["i-2"]


def test_run_once_continues_if_no_thread_is_available(monkeypatch):
    recovered, refused = [], []

    def refuse_at_first(*args, **options):
        if len(refused) < 2:
            refused.append(True)
            raise NoThreadError("no thread can be started")
        return start_thread(*args, **options)

    records = SimpleNamespace(power_recoveries=lambda _host: TASKS, moved_power_recoveries=lambda _host: [])
    power_recovery = PowerRecovery(records, None, "host-a")
    monkeypatch.setattr(housekeeping, "start_thread", refuse_at_first)
    monkeypatch.setattr(power_recovery, "_recover", lambda task: recovered.append(task.instance_id))
    power_recovery.run_once()
    assert recovered == ["i-2"]
    recovered.clear()
    power_recovery.run_once()
    assert sorted(recovered) == ["i-0", "i-1", "i-2"]
