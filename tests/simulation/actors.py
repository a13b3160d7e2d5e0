"""Who acts in a world besides the agents: the owners of the instances, an operator, and everybody else."""

import base64
from dataclasses import replace
from datetime import timedelta

from simulation.engine import SimulatedQueue
from thrave.buckets.errors import BucketError, TransientError
from thrave.compute.errors import InstanceError, InstanceNotFound
from thrave.compute.fleet import FleetInventory
from thrave.compute.instance import InstanceState, OffReason
from thrave.concurrency import sleep
from thrave.database import is_unavailable
from thrave.tasks.created_buckets import BucketBusyError
from thrave.tasks.errors import BundleTaskError, HostError
from thrave.tasks.models import FINISHED, BundleRequest
from thrave.tasks.repository import TaskRepository
from thrave.tasks.task_service import BundleTaskService
from thrave.testing import upload_policy

PREFIXES = ("one", "two")
WANTED = {
    "stop": InstanceState.STOPPED,
    "start": InstanceState.RUNNING,
    "reboot": InstanceState.RUNNING,
    "terminate": InstanceState.TERMINATED,
}
_WEIGHTS = {"bundle": 10, "cancel": 3, "stop": 2, "start": 2, "reboot": 1, "terminate": 0.2}
_ATTEMPTS = 30  # of a client whose requests are answered `Unavailable`


class Owner:
    """An owner who sends requests through one API process."""

    def __init__(self, world):
        self._world = world
        self._remaining = world.random.choice([1, 2, 4, 8])
        self._account_id = world.fixture.account.account_id
        engine, vault = world.database.engine, world.fixture.vault
        self._instances = FleetInventory(engine)
        self._tasks = BundleTaskService(
            engine, TaskRepository(engine, vault), SimulatedQueue(world).enqueue, default_host=None,
            retention=timedelta(days=7), max_per_account=20,
        )  # fmt: skip

    def run(self):
        """Send some requests, with pauses. Called again in another process if this one is killed."""
        world = self._world
        while self._remaining:
            self._remaining -= 1
            sleep(world.random.choice([0.0, 0.5, 3.0, 20.0, 60.0]))
            self._send(
                world.random.choices([*_WEIGHTS], [*_WEIGHTS.values()])[0], world.random.choice([*world.machines])
            )
        world.owners_done += 1

    def _send(self, action, instance_id):
        for _ in range(_ATTEMPTS):
            try:
                self._request(action, instance_id)
            except InstanceNotFound:  # no agent has reported it yet
                sleep(2.0)
            except (BucketBusyError, TransientError):
                sleep(2.0)
            except (InstanceError, BundleTaskError, BucketError) as error:
                self._world.note(f"{action} {instance_id} is refused: {error}")
                return
            except Exception as error:
                if not is_unavailable(error):
                    raise
                sleep(2.0)
            else:
                self._world.count(f"owner: {action}")
                return

    def _request(self, action, instance_id):
        world = self._world
        if action == "bundle":
            self._bundle(instance_id)
        elif action == "cancel":
            self._cancel()
        else:
            world.wanted[instance_id] = None  # while two requests overlap, their order is not known
            getattr(self._instances, action)(instance_id)
            world.wanted[instance_id] = WANTED[action]
            world.note(f"{action} {instance_id} is accepted")

    def _bundle(self, instance_id):
        world = self._world
        prefix, key = world.random.choice(PREFIXES), world.fixture.key
        policy, signature = upload_policy(key.secret_access_key, world.store.bucket, prefix)
        request = BundleRequest(
            account_id=self._account_id, owner_id=self._account_id, instance_id=instance_id, bucket=world.store.bucket,
            prefix=prefix, access_key_id=key.access_key_id, upload_policy=base64.b64encode(policy).decode(),
            upload_policy_signature=signature,
        )  # fmt: skip
        task = self._create(request)
        world.note(f"bundle {instance_id} to {prefix}: {task.bundle_id}")

    def _create(self, request):
        """Create the bucket and the task as `thrave.ec2.bundle_actions.bundle_instance` does."""
        buckets, store, is_created = self._tasks.created_buckets, self._world.store, False
        try:
            with buckets.in_use(request.bucket):
                is_created = store.create(request.bucket, request.owner_id)
                return self._tasks.create(replace(request, created_bucket=is_created))
        except Exception:
            if is_created:
                buckets.remove(store, request.bucket, request.owner_id)
            raise

    def _cancel(self):
        tasks = [task for task in self._tasks.describe(self._account_id) if task.state not in FINISHED]
        if tasks:
            task = self._world.random.choice(tasks)
            self._tasks.cancel(self._account_id, task.bundle_id)
            self._world.note(f"cancel {task.bundle_id}")


_REASONS = {"shut down": OffReason.SHUT_DOWN, "crash": OffReason.CRASHED, "lose power": OffReason.LOST_POWER}


class Outsider:
    """Switches machines without Thrave; takes hypervisors and the database away; fills the store."""

    def __init__(self, world):
        self._world = world

    def run(self):
        """Act some times, with pauses."""
        world = self._world
        for _ in range(world.random.choice([2, 5, 10])):
            sleep(world.random.choice([1.0, 5.0, 20.0, 60.0]))
            if world.faults.occurs("outsider"):
                self._switch(world.random.choice([*world.machines.values()]))
            for what in ("hypervisor", "database"):
                if world.faults.occurs(f"{what}: away"):
                    world.take_away(what, world.random.choice([2.0, 30.0, 120.0, 300.0]))
            if world.faults.occurs("store: full"):
                world.store.is_full = not world.store.is_full
                world.note(f"the store is {'full' if world.store.is_full else 'no longer full'}")

    def _switch(self, machine):
        action = self._world.random.choice(["start", *_REASONS])
        self._world.note(f"somebody else: {action} {machine.instance_id}")
        if action == "start":
            machine.power_on()
        else:
            machine.power_off(_REASONS[action])
        self._world.wanted[machine.instance_id] = None


class Operator:
    """Drains and activates hosts, and has another host adopt the tasks of a lost one, or retires it."""

    def __init__(self, world, registry):
        self._world = world
        self._registry = registry

    def run(self):
        """Look at the hosts now and then, until the faults end."""
        random = self._world.random
        drains, retires = random.choice([0, 0, 1, 3]), random.random() < 0.3
        while self._world.faults.are_on:
            sleep(random.choice([10.0, 30.0, 60.0]))
            try:
                for host in self._registry.list():
                    others = [name for name in self._world.hosts if name != host.host]
                    if host.is_lost and retires and random.random() < 0.3:
                        self._do(self._registry.retire, host.host)
                    elif host.is_lost and others:
                        self._do(self._registry.adopt, host.host, by=random.choice(others))
                    elif drains and random.random() < 0.2:
                        drains -= 1
                        self._do(random.choice([self._registry.drain, self._registry.activate]), host.host)
            except Exception as error:
                if not is_unavailable(error):
                    raise

    def _do(self, action, host, **options):
        what = f"{action.__name__} {host} {' '.join(options.values())}"
        try:
            action(host, **options)
        except HostError as error:
            self._world.note(f"the operator: {what} is refused: {error}")
        else:
            self._world.note(f"the operator: {what}")
            self._world.count(f"operator: {action.__name__}")
