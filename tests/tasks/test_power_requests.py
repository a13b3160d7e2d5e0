"""The last power request of an owner decides the final power state, for any order of requests, steps, faults and kills.

One simulated machine, one process without threads: each rule is one step of one component. The tests check that a
volume is never read while its machine runs, and the final state of the machine.
"""

from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from thrave.compute import power_records
from thrave.compute.base import Overlay
from thrave.compute.errors import (
    HypervisorUnavailable,
    IncorrectInstanceState,
    InstanceError,
    InstanceLocked,
    RootVolumeInUse,
    StateChangedError,
)
from thrave.compute.instance import TERMINATING, InstanceState, VolumeFile
from thrave.compute.power import UP_STATES, _InstanceWorker
from thrave.compute.power_records import PowerAction, PowerRecords, record_request
from thrave.concurrency import utc_now
from thrave.database import (
    bundle_task,
    bundle_task_event,
    host,
    instance,
    instance_power,
    metadata,
    open_in_memory,
)
from thrave.tasks.errors import TaskCancelled, TaskFailure
from thrave.tasks.housekeeping import PowerRecovery
from thrave.tasks.instance_power import InstancePower
from thrave.tasks.lease import LeaseExpiredError, RightLostError
from thrave.tasks.models import BundleRequest, BundleTaskState
from thrave.tasks.repository import TaskRepository
from thrave.vault import Vault

INSTANCE, HOST = "i-0123456789abcdef0", "here"
SHUTDOWN_TIMEOUT = 1e6  # seconds: no request of these tests times out


class Hypervisor:
    """A driver with one machine, whose guest follows a shutdown request when the test calls `follow_request`."""

    def __init__(self, *, on, started):
        self.on = on
        self._started = started
        self.pressed = self.terminated = self.held = self.is_unavailable = False
        self.overlays = self
        self.power_lost = False

    def follow_request(self):
        self.on = self.on and not self.pressed
        self.pressed = False

    def _check_connection(self):
        if self.is_unavailable:
            self.is_unavailable = False
            raise HypervisorUnavailable(INSTANCE, "there is no connection")

    def get(self, instance_id):
        return SimpleNamespace(instance_id=instance_id, state=self.state(instance_id))

    def state(self, _instance_id):
        self._check_connection()
        if self.terminated:
            return InstanceState.SHUTTING_DOWN if self.on else InstanceState.TERMINATED
        return InstanceState.RUNNING if self.on else InstanceState.STOPPED

    def request_stop(self, _instance_id):
        self._check_connection()
        self.pressed = self.on

    def terminate(self, _instance_id):
        self._check_connection()
        self.terminated, self.pressed = True, self.on

    def start(self, instance_id):
        self._check_connection()
        if self.held:
            raise InstanceLocked(instance_id)
        if self.terminated:
            raise StateChangedError(instance_id, InstanceState.TERMINATED)
        if not self.on:
            self.on, self.pressed, self.power_lost = True, False, False
            self._started()

    @contextmanager
    def hold_stopped(self, instance_id):
        assert not self.held
        self.held = True
        try:
            yield self
        finally:
            self.held = False

    def check(self):
        if self.state(INSTANCE) not in {InstanceState.STOPPED, *TERMINATING}:
            raise RootVolumeInUse(INSTANCE, "it runs")

    def has_lost_power(self, _instance_id):
        return self.power_lost


class FakeMonitor:
    """A monitor whose `pause` lets the guest follow a request."""

    def __init__(self, hypervisor):
        self._hypervisor = hypervisor

    def pause(self, _seconds):
        self._hypervisor.follow_request()

    def add_check(self, check):
        pass


class Power(RuleBasedStateMachine):
    """Rules for owner, background worker, task, power recovery and faults."""

    engine: sa.Engine
    records: TaskRepository

    @initialize(on=st.booleans())
    def begin(self, on):
        for table in (bundle_task_event, bundle_task, instance_power):
            with self.engine.begin() as connection:
                connection.execute(table.delete())
        self.hypervisor = Hypervisor(on=on, started=lambda: self.starts.append(self.wanted))
        self.starts = []
        self.wanted = "running" if on else "stopped"
        self.tasks = 0
        self.bundle_id = None
        self.reading = self.is_on_overlay = self.has_long_outage = False
        self._start_process()

    def _start_process(self):
        """Create the objects that a process has in memory."""
        self.power = PowerRecords(self.engine)
        self.work = _InstanceWorker(self.hypervisor, self.power, INSTANCE, SHUTDOWN_TIMEOUT, lambda: None)
        self.power_recovery = PowerRecovery(self.records, self.hypervisor, HOST)
        self.hold = ExitStack()
        self._resume_task()

    def _resume_task(self):
        if self.bundle_id is not None:
            task = self.records.get(self.bundle_id)
            self.task_power = InstancePower(
                self.hypervisor, self.records, task, shutdown_timeout=SHUTDOWN_TIMEOUT, shutdown_timeout_action="fail"
            )

    # The owner. The EC2 actions check the state and whether there is a task, but a task may start after that check.

    @rule(action=st.sampled_from([*PowerAction]))
    def request(self, action):
        try:
            before = self.power.add_request(INSTANCE, action)
        except StateChangedError:
            assert self.wanted == "terminated"
            return
        if before.request is not PowerAction.TERMINATE and not self.hypervisor.terminated:
            self.wanted = {"stop": "stopped", "terminate": "terminated"}.get(action, "running")

    # Faults.

    @rule()
    def guest_follows_request(self):
        self.hypervisor.follow_request()

    @rule()
    def hypervisor_is_unavailable(self):
        self.hypervisor.is_unavailable = True

    @rule()
    def process_is_killed(self):
        self.hypervisor.held = False
        self.reading = False
        self._start_process()

    @precondition(lambda self: self._is_free())
    @rule()
    def owner_shuts_down_inside_guest(self):
        self.hypervisor.on = self.hypervisor.pressed = False
        self.wanted = "terminated" if self.hypervisor.terminated else "stopped"

    @precondition(lambda self: self._is_free())
    @rule()
    def host_loses_its_power(self):
        self.hypervisor.on = self.hypervisor.pressed = False
        self.hypervisor.power_lost = True

    def _is_free(self):
        """Whether the machine runs on an overlay and no power change is pending."""
        record = self.power.get(INSTANCE)
        is_quiet = record.request is None and record.borrowed_by is None and not self.hypervisor.pressed
        return self.is_on_overlay and self.hypervisor.on and is_quiet and not self.records.power_recoveries(HOST)

    # The background worker, and power recovery.

    @rule()
    def run_worker(self):
        self.work.attempt()

    @rule()
    def run_power_recovery(self):
        self.power_recovery._retries.keep(())
        self.power_recovery.run_once()

    # The task, in the order of `workflow.py`. A step that fails or is interrupted is repeated.

    @rule(overlay=st.booleans())
    def run_task_step(self, overlay):
        if self.bundle_id is None:
            self._begin_task()
        elif self.reading:
            self.reading = False
            with self._step("put back"):
                self.hold.close()
        else:
            steps = {"stop": self._stop, "free": self._free, "read": self._read, "put back": self._put_back}
            if self.stage in steps:
                steps[self.stage](overlay)
            else:
                self.task_ends("complete")

    @rule(overlay=st.booleans())
    def run_two_task_steps(self, overlay):
        self.run_task_step(overlay)
        self.run_task_step(overlay)

    def _begin_task(self):
        self.tasks += 1
        self.bundle_id = f"bun-{self.tasks}"
        request = BundleRequest(
            account_id="1", owner_id="1", instance_id=INSTANCE, bucket="bucket", prefix="prefix", access_key_id="A",
            upload_policy="", upload_policy_signature="",
        )  # fmt: skip
        with self.engine.begin() as connection:
            self.records.add(connection, self.bundle_id, HOST, request)
        self.records.change_state(self.bundle_id, BundleTaskState.WAITING_FOR_SHUTDOWN)
        self.is_on_overlay = False
        self.stage = "stop"
        self._resume_task()

    def _stop(self, overlay):
        with self._step("free" if overlay else "read"):
            self.task_power.record_power_state()
            self.task_power.shut_down(FakeMonitor(self.hypervisor))

    def _free(self, _overlay):
        with self._step("put back"):
            if self.task_power.should_run():
                self.records.record_overlay(self.bundle_id, OVERLAY)
                self.is_on_overlay = True
                self.task_power.restore()

    def _read(self, _overlay):
        with self._step("read"), ExitStack() as hold:
            hold.enter_context(self.task_power.hold_stopped(FakeMonitor(self.hypervisor)))
            self.hold = hold.pop_all()
            self.reading = True

    def _put_back(self, _overlay):
        with self._step("end"):
            self.task_power.restore()

    @precondition(lambda self: self.bundle_id is not None and not self.reading)
    @rule(end=st.sampled_from(["complete", "fail", "cancel"]))
    def task_ends(self, end):
        if end == "cancel" and self.records.cancel(self.bundle_id):
            end = "fail"
        with self._step("end"):
            try:
                self.task_power.restore()
            except HypervisorUnavailable:  # the workflow repeats the step, for as long as `stall_timeout`
                if self.has_long_outage:
                    raise
                self.task_power.restore()
        self.records.record_overlay(self.bundle_id, None)
        if end == "complete" and self._is_power_recorded():
            for state in (BundleTaskState.BUNDLING, BundleTaskState.STORING):
                self.records.change_state(self.bundle_id, state)
            self.records.complete(self.bundle_id)
        else:
            self.records.fail(self.bundle_id, TaskCancelled())
        self.bundle_id = None
        self.is_on_overlay = False

    def _is_power_recorded(self):
        return self.records.get(self.bundle_id).run_after_task is not None

    @contextmanager
    def _step(self, then):
        """Run a step. After an error the step is repeated; otherwise the step `then` follows."""
        with suppress(InstanceError, TaskFailure):
            yield
            self.stage = then

    # Invariants.

    @invariant()
    def volume_is_not_read_while_machine_runs(self):
        assert not (getattr(self, "reading", False) and self.hypervisor.on)

    @invariant()
    def machine_is_started_only_if_wanted(self):
        assert {*getattr(self, "starts", ())} <= {"running"}

    def teardown(self):
        if not hasattr(self, "work"):
            return
        self.hypervisor.is_unavailable = False
        self.reading = False
        self.hold.close()
        if self.bundle_id is not None:
            self.task_ends("complete")
        for _ in range(8):
            self.hypervisor.is_unavailable = False
            self.hypervisor.follow_request()
            if self.power.list_pending():
                self.work.attempt()
            elif self.records.power_recoveries(HOST):
                self.run_power_recovery()
            else:
                break
        self.machine_is_started_only_if_wanted()
        state = self.hypervisor.state(INSTANCE)
        ends = {"running": UP_STATES, "stopped": {InstanceState.STOPPED}, "terminated": {InstanceState.TERMINATED}}
        assert state in ends[self.wanted]


OVERLAY = Overlay(volume=VolumeFile(path=Path("/volume")), overlay=Path("/overlay"))


def test_last_request_decides_final_power_state(play):
    """In any order. A failing example is not shrunk, since that would take minutes."""
    options = {"max_examples": 40, "stateful_step_count": 25, "deadline": None, "phases": [Phase.generate]}
    run_state_machine_as_test(play, settings=settings(**options, suppress_health_check=[*HealthCheck]))


@pytest.fixture
def play(engine, tmp_path):
    Power.engine = engine
    Power.records = TaskRepository(engine, Vault.open_or_create(tmp_path / "vault.key"))
    return Power


MOMENTS = 7  # before the task, and after each of its steps
HOW = [("none", False), ("none", True), ("process_is_killed", True), ("hypervisor_is_unavailable", True)]


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("end", ["complete", "cancel"])
def test_request_during_task_decides_final_power_state(play, overlay, end):
    """Every request at every moment, carried out at once or later, with and without a fault after it."""
    for on, action, moment, (fault, at_once) in product([True, False], PowerAction, range(MOMENTS), HOW):
        if not on and fault != "none":
            continue
        power = play()
        power.begin(on)
        for number in range(MOMENTS):
            if number == moment:
                power.request(action)
                if at_once:
                    power.run_worker()
                    power.guest_follows_request()
                getattr(power, fault, lambda: None)()
            if number == MOMENTS - 1 and power.bundle_id and not power.reading:
                power.task_ends(end)
            else:
                power.run_task_step(overlay)
            power.volume_is_not_read_while_machine_runs()
        power.teardown()


@pytest.mark.parametrize("is_again", [False, True])
@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
@pytest.mark.parametrize("is_unavailable", [False, True])
def test_guest_shut_down_on_its_overlay_stays_off(play, is_again, end, is_unavailable):
    power = play()
    power.begin(on=True)
    while not power.is_on_overlay:
        power.run_task_step(overlay=True)
    power.owner_shuts_down_inside_guest()
    if is_again:  # the step `run-on-overlay` is repeated after a crash
        power.process_is_killed()
        power._free(_overlay=True)
    power.hypervisor.is_unavailable = power.has_long_outage = is_unavailable
    power.task_ends(end)
    power.teardown()


@pytest.fixture
def engine():
    engine = open_in_memory()
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def records(engine, tmp_path):
    records = TaskRepository(engine, Vault.open_or_create(tmp_path / "vault.key"))
    request = BundleRequest(
        account_id="1", owner_id="1", instance_id=INSTANCE, bucket="bucket", prefix="prefix", access_key_id="A",
        upload_policy="", upload_policy_signature="",
    )  # fmt: skip
    with engine.begin() as connection:
        records.add(connection, "bun-1", HOST, request)
    return records


@pytest.mark.parametrize("is_made", ["before", "meanwhile"])
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(("action", "before"), [(PowerAction.START, "stopped"), (PowerAction.STOP, "running")])
def test_record_power_state_uses_concurrent_request(engine, records, action, before, is_done, is_made):
    power, hypervisor = PowerRecords(engine), Hypervisor(on=before == "running", started=lambda: None)
    state = hypervisor.state

    def overtaken(instance_id):
        hypervisor.state = state
        seen = state(instance_id)
        if is_made == "meanwhile":
            power.add_request(instance_id, action)
        if is_done:  # and carried out, before the task has recorded the state
            hypervisor.on = action is PowerAction.START
            assert power.finish_request(power.get(instance_id))
        return seen

    hypervisor.state = overtaken
    if is_made == "before":
        power.add_request(INSTANCE, action)
    task_power = InstancePower(
        hypervisor, records, records.get("bun-1"), shutdown_timeout=SHUTDOWN_TIMEOUT, shutdown_timeout_action="fail"
    )
    task_power.record_power_state()
    assert records.get("bun-1").run_after_task is (action is PowerAction.START)
    assert task_power.should_run() is (action is PowerAction.START)
    assert power.get(INSTANCE).borrowed_by == "bun-1"


def test_ended_task_leaves_borrowed_instance_to_power_recovery(records):
    hypervisor = Hypervisor(on=True, started=lambda: None)
    assert records.record_power_state("bun-1", running=True)
    hypervisor.on = False
    records.fail("bun-1", TaskFailure("Server.HostLost", "as `retire` says"))
    PowerRecovery(records, hypervisor, HOST).run_once()
    assert hypervisor.on
    assert not records.has_power_recovery(INSTANCE)


def test_expired_request_is_dropped_and_logged(engine, monkeypatch):
    power, hypervisor = PowerRecords(engine), Hypervisor(on=True, started=lambda: None)
    power.add_request(INSTANCE, PowerAction.STOP)
    monkeypatch.setattr(power_records, "MAX_REQUEST_AGE", timedelta(seconds=-1))
    with capture_logs() as logs:
        _InstanceWorker(hypervisor, power, INSTANCE, SHUTDOWN_TIMEOUT, lambda: None).attempt()
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("power request expired", "error")]
    assert not power.list_pending()
    assert power.get(INSTANCE).wanted == "stopped"
    assert hypervisor.on


@pytest.mark.parametrize("runs_on_an_overlay", [False, True])
@pytest.mark.parametrize("action", [PowerAction.STOP, PowerAction.START, PowerAction.REBOOT])
def test_request_does_not_expire_while_task_has_borrowed_instance(engine, records, action, runs_on_an_overlay):
    power, hypervisor = PowerRecords(engine), Hypervisor(on=True, started=lambda: None)
    records.record_power_state("bun-1", running=True)
    power.add_request(INSTANCE, action)
    with engine.begin() as connection:
        connection.execute(instance_power.update().values(request_time=utc_now() - timedelta(days=2)))
    hypervisor.on = runs_on_an_overlay
    work = _InstanceWorker(hypervisor, power, INSTANCE, SHUTDOWN_TIMEOUT, lambda: None)
    with capture_logs() as logs:
        assert work.attempt()
        assert power.get(INSTANCE).request is action
        InstancePower(
            hypervisor, records, records.get("bun-1"), shutdown_timeout=SHUTDOWN_TIMEOUT, shutdown_timeout_action="fail"
        ).restore()
        assert hypervisor.on is (runs_on_an_overlay or action is not PowerAction.STOP)
        records.fail("bun-1", TaskFailure("Server.InternalError", "it ended"))
        for _ in range(8):
            work.attempt()
            hypervisor.follow_request()
    assert not [entry for entry in logs if "power request" in entry["event"]]
    assert power.get(INSTANCE).request is None
    assert hypervisor.on is (action is not PowerAction.STOP)


def test_guest_gets_no_request_without_lease(engine):
    def refuse():
        raise LeaseExpiredError

    power, hypervisor = PowerRecords(engine), Hypervisor(on=True, started=lambda: None)
    power.add_request(INSTANCE, PowerAction.STOP)
    work = _InstanceWorker(hypervisor, power, INSTANCE, SHUTDOWN_TIMEOUT, refuse)
    assert work.attempt()
    assert not hypervisor.pressed
    assert [*power.list_pending()] == [INSTANCE]


def report_from(engine, reporter, *others):
    """Add hosts; the first one reports the instance."""
    row = {"state": "active", "lease": "x", "version": "1", "worker_concurrency": 1}
    times = {"start_time": utc_now(), "heartbeat_time": utc_now(), "heartbeat_interval": 5, "heartbeat_timeout": 60}
    reported = {
        "instance_id": INSTANCE,
        "account_id": "1",
        "state": "running",
        "document": {},
        "report_time": utc_now(),
    }
    with engine.begin() as connection:
        connection.execute(host.insert(), [{"host": name, **row, **times} for name in (reporter, *others)])
        connection.execute(instance.insert(), {**reported, "host": reporter})


def test_host_carries_out_requests_for_its_instances(engine):
    power_records_of = {name: PowerRecords(engine, name) for name in ("here", "there")}
    report_from(engine, *power_records_of)
    with engine.begin() as connection:
        record_request(connection, INSTANCE, PowerAction.STOP)
    assert {name: [*power.list_pending()] for name, power in power_records_of.items()} == {
        "here": [INSTANCE],
        "there": [],
    }
    with engine.begin() as connection:  # an adoption
        connection.execute(instance.update().values(host="there"))
    assert {name: [*power.list_pending()] for name, power in power_records_of.items()} == {
        "here": [],
        "there": [INSTANCE],
    }
    assert power_records_of["here"].get(INSTANCE).request is None


@pytest.mark.parametrize("loss", ["another host reports the instance", "another process has the lease"])
@pytest.mark.parametrize(
    "write",
    ["finish_request", "record_shutdown_request", "record_off", "drop_request", "expire_request", "withdraw_request"],
)
def test_host_without_instance_writes_no_power_record(engine, loss, write):
    report_from(engine, "here", "there")
    power = PowerRecords(engine, "here", host.c.lease == "x")
    before = power.add_request(INSTANCE, PowerAction.START)
    record = power.get(INSTANCE)
    with engine.begin() as connection:
        if loss == "another host reports the instance":
            connection.execute(instance.update().values(host="there"))
        else:
            connection.execute(host.update().values(lease="y"))
    getattr(power, write)(before if write == "withdraw_request" else record)
    assert PowerRecords(engine).get(INSTANCE) == record
    assert power.get(INSTANCE).request is None
    assert not power.list_pending()


@pytest.mark.parametrize("act", ["off", "cut", "sysprep", "restore"])
def test_task_of_another_host_sends_no_command(records, monkeypatch, act):
    def lost(bundle_id):
        raise RightLostError(bundle_id)

    hypervisor = Hypervisor(on=act != "restore", started=lambda: None)
    records.record_power_state("bun-1", running=True)
    monkeypatch.setattr(records, "require_lease", lost)
    task_power = InstancePower(
        hypervisor,
        records,
        records.get("bun-1"),
        shutdown_timeout=-1 if act == "cut" else SHUTDOWN_TIMEOUT,
        shutdown_timeout_action="power-off",
    )
    acts = {
        "restore": task_power.restore,
        "sysprep": lambda: task_power.run_sysprep(FakeMonitor(hypervisor), ["sysprep"]),
    }
    with pytest.raises(RightLostError):
        acts.get(act, lambda: task_power.shut_down(FakeMonitor(hypervisor)))()
    assert hypervisor.on is (act != "restore")
    assert not hypervisor.pressed


@pytest.mark.parametrize("command", ["request_stop", "force_stop", "request_sysprep"])
def test_termination_before_command_fails_task(records, command):
    hypervisor = Hypervisor(on=True, started=lambda: None)
    records.record_power_state("bun-1", running=True)

    def terminated(instance_id, *_arguments):
        hypervisor.terminated = True
        raise IncorrectInstanceState(instance_id, "it is shutting-down")

    setattr(hypervisor, command, terminated)
    shutdown_timeout = -1 if command == "force_stop" else SHUTDOWN_TIMEOUT
    task_power = InstancePower(
        hypervisor,
        records,
        records.get("bun-1"),
        shutdown_timeout=shutdown_timeout,
        shutdown_timeout_action="power-off",
    )
    act = partial(task_power.run_sysprep, command=["sysprep"]) if command == "request_sysprep" else task_power.shut_down
    with pytest.raises(TaskFailure) as caught:
        act(FakeMonitor(hypervisor))
    assert caught.value.code == "Client.InstanceTerminated"
