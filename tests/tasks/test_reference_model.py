"""Calls, crashes and power changes by other clients, in any order: responses show only states that the model allows.

Hypothesis draws the orders, from a seed that is in the test's name and can be set as THRAVE_SEED. The server is
a real one, killed with SIGKILL and started again on its data. After each step, its responses are checked against
`tests/support/crashes/reference_model.py`; once every task has ended, the bucket and the instances are checked too.
Each order is drawn before the speed of the server is known: a rule that is not possible at its moment does nothing.
"""

import hashlib
import os
import signal
import time
from itertools import count

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from support.bundles.open_check import opened_sha256
from support.crashes.reference_model import ModelInstance
from support.disks.raw_disk import make_disk
from support.eventually import eventually
from support.service.forked_server import ForkedServer
from thrave.compute.errors import InstanceError
from thrave.compute.instance import InstanceState
from thrave.config import DataDirectory

SEED = int(os.environ.get("THRAVE_SEED", "20080808"))
BUCKET = "machine"
MIB = 1 << 20
EITHER = st.integers(0, 1)  # of the two instances


class RestartableServer:
    """A server that may be stopped, and the state that is shared by all orders."""

    def __init__(self, folder):
        self.folder = folder
        self.server = ForkedServer(DataDirectory(folder / "thrave"))
        self.account, self.key = self.server.account("alice")
        self.prefixes = (f"prefix-{number}" for number in count())
        self._ec2 = None

    def ec2(self):
        """Return a client of the server; start the server if it is stopped."""
        if self._ec2 is None:
            self.server.start()
            self._ec2 = self.server.client(self.key)
        return self._ec2

    def kill(self):
        if self._ec2 is not None:
            self.server.stop(signal.SIGKILL)
            self._ec2 = None

    def new_instance(self, disk_seed):
        disk = make_disk(self.folder / f"{disk_seed}.raw", (1 + disk_seed % 4) * MIB, seed=disk_seed)
        instance = self.server.instance(self.account.account_id, disk)
        return ModelInstance(instance.instance_id, hashlib.sha256(disk.read_bytes()).hexdigest())

    def objects(self, prefix):
        folder = self.server.data.buckets / BUCKET
        return [path for path in folder.glob("*") if path.name.startswith(f"{prefix}.")]

    def runs(self, instance_id):
        return self.server.instances.state(instance_id) is InstanceState.RUNNING


class Machine(RuleBasedStateMachine):
    """The rules: two instances of one account, and what can happen to them."""

    service: RestartableServer
    seeds = count(1)

    def __init__(self):
        super().__init__()
        self.instances = [self.service.new_instance(next(self.seeds)) for _ in range(2)]
        for which in range(2):
            self.bundle(which)

    @rule(which=EITHER)
    def bundle(self, which):
        instance, prefix = self.instances[which], next(self.service.prefixes)
        ec2 = self.service.ec2()
        self.describe()
        self.look_at_power(instance)
        before, allowed = instance.unfinished, instance.refusals()
        storage = self.service.server.storage(self.service.key, BUCKET, prefix)
        answer, refusal = asked(ec2.bundle_instance, InstanceId=instance.instance_id, Storage=storage)
        if refusal:
            assert refusal["Code"] in allowed
            assert refusal["Code"] != "BundlingInProgress" or before.bundle_id in refusal["Message"]
        else:
            self.describe()
            assert instance.is_there
            assert instance.unfinished is None, "a second task was created"
            instance.bundled(answer["BundleTask"]["BundleId"], prefix, disturbed=bool(before and before.disturbed))

    @rule(which=EITHER)
    def cancel(self, which):
        if not self.instances[which].tasks:
            return
        task = self.instances[which].tasks[-1]
        _, refusal = asked(self.service.ec2().cancel_bundle_task, BundleId=task.bundle_id)
        if refusal:
            self.describe()
            assert refusal["Code"] == "IncorrectState"
            assert task.has_ended or task.cancelled
        else:
            assert not task.has_ended
            task.cancelled = True

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4]))
    def let_time_pass(self, seconds):
        time.sleep(seconds)

    @rule()
    def crash(self):
        self.service.kill()

    @rule(which=EITHER)
    def stop(self, which):
        self.disturb(which, self.service.server.instances.request_stop, runs=False)

    @rule(which=EITHER)
    def start(self, which):
        self.disturb(which, self.service.server.instances.start, runs=True)

    @rule(which=EITHER, sure=st.sampled_from([True, False, False]))
    def remove(self, which, sure):
        if sure and self.disturb(which, self.service.server.instances.remove, runs=False):
            self.instances[which].is_there = False

    def disturb(self, which, what, *, runs):
        """Another client stops, starts or removes an instance; it may be refused only during a task."""
        instance = self.instances[which]
        instance.disturb()
        try:
            what(instance.instance_id)
        except InstanceError:
            assert instance.unfinished or not instance.is_there
            return False
        instance.runs = runs
        return True

    @invariant()
    def describe(self):
        tasks = {task.bundle_id: task for instance in self.instances for task in instance.tasks}
        if self.service._ec2 is None or not tasks:
            return
        shown = self.service.ec2().describe_bundle_tasks(BundleIds=[*tasks])["BundleTasks"]
        assert {task["BundleId"] for task in shown} == tasks.keys()
        for each in shown:
            tasks[each["BundleId"]].see(each)
        for instance in self.instances:
            assert sum(not task.has_ended for task in instance.tasks) <= 1

    def teardown(self):
        self.service.ec2()

        def unfinished():
            self.describe()
            return [instance.unfinished for instance in self.instances if instance.unfinished]

        eventually(unfinished, "every task ends", until=lambda tasks: not tasks)
        for instance in self.instances:
            self.check_outcome(instance)

    def check_outcome(self, instance):
        for task in instance.tasks:
            if task.state == "failed":
                assert self.service.objects(task.prefix) == []
            else:
                image = self.service.folder / "opened.raw"
                assert opened_sha256(self.service.server, BUCKET, task.prefix, image) == instance.sha256
        self.look_at_power(instance)

    def look_at_power(self, instance):
        if instance.is_there and not instance.unfinished:
            instance.see_power(self.service.runs(instance.instance_id))


def asked(call, **parameters):
    """Return the response and None, or None and the code and message of the error."""
    try:
        return call(**parameters), None
    except ClientError as error:
        return None, error.response["Error"]


@pytest.mark.sweep
@pytest.mark.parametrize("drawn_from", [SEED])
def test_service_shows_only_states_of_the_model(tmp_path, drawn_from, capfd):
    class Here(Machine):
        service = RestartableServer(tmp_path)

    run = settings(
        max_examples=10,
        stateful_step_count=14,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the server's timing is not reproducible, so a failure would not shrink
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(drawn_from)(Here), settings=run)
    finally:
        Here.service.kill()
    log = capfd.readouterr().err
    assert "[error" not in log, log
