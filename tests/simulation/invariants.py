"""What must hold, at each step or at the end of a run."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from simulation.machines import UP
from thrave import concurrency
from thrave.bundle.errors import BundleError, PartMissingError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.model import bound_side_filename, manifest_filename, side_filename
from thrave.bundle.opener import open_bundle
from thrave.compute.instance import InstanceState

INVARIANTS = {
    "complete": "A complete task has a bundle that opens to a state that the disk had. From then on the prefix has a "
    "bundle with all its objects at any time, and in the end that of the last complete task.",
    "one task": "An instance, and a bucket and prefix, have at most one unfinished task.",
    "lease": "A host that has lost its lease changes nothing in the store and commands nothing to the hypervisor.",
    "progress": "The progress of a task does not decrease within a state.",
    "start": "No error of the hypervisor fails a task whose parts are all stored.",
    "end": "Once the faults have ended, every task ends. A failed task has a code, which is no internal error.",
    "power": "An instance ends in the state that its owner asked for last.",
    "bucket": "A bucket is removed only while no task needs it. One that was created for a task does not remain empty.",
    "orphans": "In the end the bucket has the objects of complete bundles only, and no overlay or lock remains.",
}

_TASKS = (
    "SELECT bundle_id, state, progress, prefix, instance_id, next_step, error_code, created_bucket FROM bundle_task"
)
_HYPERVISOR_ERRORS = {"Server.InstanceError", "Server.InstanceNotStarted"}


class Invariants:
    """Checks the invariants of one run.

    Attributes:
        violations: What does not hold; the run ends with the first.
        bucket_creator: The task for which the bucket was created, if it was recorded.
    """

    def __init__(self, world):
        self._world = world
        self.violations = []
        self.bucket_creator = None
        self.allows_two_in_one_place = False
        self._seen = {}  # state, progress and next step of each task
        self._complete = set()  # tasks
        self._newest = {}  # by prefix: the objects of the bundle that was completed last

    def violate(self, invariant, text):
        assert invariant in INVARIANTS
        self._world.note(f"VIOLATION of '{invariant}': {text}")
        self.violations.append(f"{invariant}: {text}")

    # At each step

    def after_commit(self):
        """Check the rows of the tasks."""
        unfinished = []
        for bundle_id, state, progress, prefix, instance_id, step, code, created in self._world.database.rows(_TASKS):
            self._world.counts[f"state {state}"] += 1
            if state not in {"complete", "failed"}:
                unfinished.append(instance_id)
                if not self.allows_two_in_one_place:
                    unfinished.append(prefix)
            if created and bundle_id not in self._seen:
                self.bucket_creator = bundle_id
            last_state, last_progress, last_step = self._seen.get(bundle_id, (None, None, None))
            self._seen[bundle_id] = state, progress, step
            if state == last_state and (progress or 0) < (last_progress or 0):
                self.violate("progress", f"of {bundle_id} in {state} from {last_progress} to {progress}")
            if last_step == "start" and step == "undo-start" and code in _HYPERVISOR_ERRORS:
                self.violate("start", f"{bundle_id} fails with {code}")
            if state == "complete" and bundle_id not in self._complete:
                self._check_complete(bundle_id, prefix, instance_id)
        if len(set(unfinished)) != len(unfinished):
            self.violate("one task", f"unfinished tasks: {unfinished}")

    def before_change(self, key, content):
        """Check a change of an object. `content`: None if it is deleted."""
        objects, prefix = self._world.store.objects, key.partition(".")[0]
        if prefix not in self._newest or content == objects.get(key):
            return
        if key == manifest_filename(prefix):
            # A task that fails after it has sent its manifest may have replaced that of a complete one for a while.
            is_whole = content is not None and {*bundle_keys({**objects, key: content}, prefix)} <= objects.keys()
        else:
            is_whole = key not in bundle_keys(objects, prefix)
        if not is_whole:
            self.violate("complete", f"{key} is {'deleted' if content is None else 'overwritten'}")

    def before_bucket_removal(self):
        """Check that no task needs the bucket, which is empty."""
        users = self._world.database.rows(
            "SELECT bundle_id FROM bundle_task WHERE state NOT IN ('complete', 'failed') AND error_code IS NULL"
        )
        if users:
            self.violate("bucket", f"it is removed while {users} need it")

    def before_write(self, what):
        """Check that the current process may change something that others see."""
        process = self._world.scheduler.current.process
        acquired = process.memory.get("lease")
        if acquired is None:
            return
        found = self._world.database.rows("SELECT lease FROM host WHERE host = ?", process.host)
        if not found or found[0][0] != acquired:
            self.violate("lease", f"{process}: {what}")

    def _check_complete(self, bundle_id, prefix, instance_id):
        self._complete.add(bundle_id)
        self._world.count("complete")
        objects, identity = self._world.store.objects, self._world.fixture.identity
        keys = bundle_keys(objects, prefix)
        try:
            digest = _image_digest(objects, keys, identity)
        except (BundleError, KeyError) as error:
            self.violate("complete", f"the bundle of {bundle_id} does not open: {error!r}")
            return
        if digest not in self._world.machines[instance_id].states:
            self.violate("complete", f"the bundle of {bundle_id} is no state that the disk of {instance_id} ever had")
        self._newest[prefix] = {key: objects[key] for key in keys}

    # At the end

    def check_end(self):
        """Check what must hold once nothing is left to do."""
        self._check_tasks()
        self._check_objects()
        for machine in self._world.machines.values():
            self._check_machine(machine)

    def orphans(self):
        """Return the objects in the store that belong to no bundle."""
        objects, named = self._world.store.objects, set()
        for prefix in {key.partition(".")[0] for key in objects}:
            named |= {*bundle_keys(objects, prefix)}
        return sorted(objects.keys() - named)

    def _check_tasks(self):
        rows = self._world.database.rows
        query = "SELECT bundle_id, state, next_step, host FROM bundle_task WHERE state NOT IN ('complete', 'failed')"
        if unfinished := rows(query):
            self.violate("end", f"unfinished: {unfinished}")
        if without_code := rows("SELECT bundle_id FROM bundle_task WHERE state = 'failed' AND error_code IS NULL"):
            self.violate("end", f"failed without a code: {without_code}")
        for (code,) in rows("SELECT error_code FROM bundle_task WHERE state = 'failed'"):
            self._world.count(f"code {code}")
            if code == "Server.InternalError":
                self.violate("end", "a task failed with an internal error")

    def _check_objects(self):
        store = self._world.store
        if store.has_bucket and not store.objects and self.bucket_creator:
            self.violate("bucket", f"it was created for {self.bucket_creator}, and remains empty")
        if orphans := self.orphans():
            self.violate("orphans", f"objects: {orphans}")
        for prefix, expected in self._newest.items():
            differ = [key for key, content in expected.items() if self._world.store.objects.get(key) != content]
            if differ:
                self.violate("complete", f"the bundle that was completed last under {prefix} has changed: {differ}")

    def _check_machine(self, machine):
        instance_id = machine.instance_id
        if machine.has_overlay or machine.holder is not None:
            self.violate("orphans", f"{instance_id} has an overlay or a lock")
        wanted = self._world.wanted[instance_id]
        state = InstanceState.RUNNING if machine.state in UP else machine.state
        # A request for a terminated instance has no effect.
        if wanted is not None and state not in {wanted, InstanceState.TERMINATED}:
            self.violate("power", f"{instance_id} is {state}, wanted is {wanted}")


class _Parts:
    def __init__(self, objects):
        self._objects = objects

    def read(self, filename):
        if filename not in self._objects:
            raise PartMissingError(filename, "not in the bucket")
        return self._objects[filename]


def bundle_keys(objects, prefix):
    """Return the keys of a bundle as its manifest names them, the manifest first; none if there is no manifest."""
    manifest = objects.get(manifest_filename(prefix))
    if manifest is None:
        return []
    bound = bound_side_filename(prefix, manifest)
    side_file = bound if bound in objects else side_filename(prefix)
    return [manifest_filename(prefix), side_file, *(part.filename for part in read_manifest(manifest).parts)]


def _image_digest(objects, keys, identity):
    """Open a bundle with every check, and return the SHA-256 of its image."""
    if not keys:
        raise KeyError("there is no manifest")
    before = concurrency.use_system(concurrency.System())  # real threads: the order does not matter here
    try:
        with TemporaryDirectory(dir="/dev/shm") as folder:
            image = Path(folder) / "image"
            open_bundle(
                objects[keys[0]], _Parts(objects), identity.private_key, image, certificate=identity.certificate,
                side_file=objects[keys[1]],
            )  # fmt: skip
            return hashlib.sha256(image.read_bytes()).hexdigest()
    finally:
        concurrency.use_system(before)
