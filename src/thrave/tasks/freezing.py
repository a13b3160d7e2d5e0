"""A root volume that stands still while its instance runs, as one bundle task handles it.

Once the instance has been stopped, its root volume gets a copy-on-write overlay, and the instance is started on that;
what is sealed is the volume below, which nothing writes to. In the end the overlay is merged into the volume. What is
planned is written down first, so that whatever is killed, the overlay is found again and merged. Where an overlay
cannot be had, the instance stays off until its volume has been read, and its owner is told why.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from thrave.compute.base import HypervisorDriver, Overlay, Overlays
from thrave.compute.errors import HypervisorError, OverlayNotSupported
from thrave.compute.instance import Instance
from thrave.compute.start_check import start_allowed_by
from thrave.compute.timeouts import ProgressPause
from thrave.concurrency import Call, CallTimeoutError
from thrave.tasks.crash_points import durable
from thrave.tasks.patience import patiently
from thrave.tasks.records import Records
from thrave.tasks.task import BundleTask
from thrave.tasks.watch import Watch

ABANDON_AFTER = 10.0  # seconds after which a merge that does not end by itself is abandoned
STALL_TIMEOUT = 600.0  # seconds for which a merge may make no progress
CHECK_PATIENCE = 60.0  # seconds that a hypervisor may be away when it is to say that nobody wrote to a volume


class Freezer:
    """Freezes the root volume of a task's instance, and thaws it."""

    def __init__(
        self,
        instances: HypervisorDriver,
        records: Records,
        task: BundleTask,
        *,
        stall_timeout: float = STALL_TIMEOUT,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Freeze the root volume of the task's instance; a merge may stand still for `stall_timeout` seconds.

        `check` is called before each command to the hypervisor, and raises if this process may not give any.
        """
        self._instances = instances
        self._records = records
        self._task = task
        self._stall_timeout = stall_timeout
        self._check = check

    @property
    def frozen(self) -> Overlay | None:
        """What was frozen for the task, or is just going to be; None from when it has been merged."""
        return self._records.frozen(self._task.bundle_id)

    def freeze(self) -> None:
        """Put an overlay over the root volume of the instance, which is off; if it can have none, tell its owner."""
        frozen = self.frozen or self._plan()
        if frozen is not None:
            with durable("root volume frozen"), start_allowed_by(self._check):
                self._overlays.freeze(self._task.instance_id, frozen)

    @contextmanager
    def held(self, frozen: Overlay, watch: Watch) -> Iterator[Instance]:
        """The instance, on its overlay, so that nothing writes to the volume.

        Raises RootVolumeInUse if it is found in another place, before the block, during it or after it.
        """
        with self._overlays.hold(self._task.instance_id, frozen) as hold:
            hold.check()
            watch.guard(hold.check)
            yield self._instances.get(self._task.instance_id)
            patiently(hold.check, CHECK_PATIENCE, pause=watch.pause)

    def merge(self, pause: Callable[[float], object]) -> None:
        """Have the instance go on without the overlay, if there is one; also an earlier task's.

        Raises:
            InstanceError: The hypervisor refuses, or nothing moves; the instance runs on, and it may be tried again.
            Exception: What `pause` raises; what was begun may go on by itself.
        """
        for bundle_id, frozen in self._records.frozen_of(self._task.instance_id):
            with durable("overlay merged"), start_allowed_by(self._check):
                pause_while_moving = ProgressPause(self._task.instance_id, pause, self._stall_timeout)
                self._overlays.merge(self._task.instance_id, frozen, pause_while_moving)
            self._records.note_frozen(bundle_id, None)

    def merge_within(self, seconds: float) -> None:
        """The same, where nobody watches. Raises InstanceError also if it takes longer than so many seconds."""
        late = HypervisorError(self._task.instance_id, f"the overlay is not merged after {seconds:.0f} seconds")
        given_up = time.monotonic() + seconds

        def pause(between_looks: float) -> None:
            if time.monotonic() > given_up:
                raise late
            time.sleep(between_looks)

        try:  # a hypervisor that hangs is abandoned; if it goes on, `pause` ends what is left
            Call("merge", lambda: self.merge(pause)).result(seconds + ABANDON_AFTER)
        except CallTimeoutError:
            raise late from None

    def _plan(self) -> Overlay | None:
        try:
            frozen = self._planned()
        except OverlayNotSupported as reason:
            self._records.notice(
                self._task.bundle_id, f"The instance is off until its root volume has been read: {reason}."
            )
            return None
        with durable("overlay noted"):
            self._records.note_frozen(self._task.bundle_id, frozen)
        return frozen

    def _planned(self) -> Overlay:
        if self._instances.overlays is None:
            raise OverlayNotSupported(self._task.instance_id, "its hypervisor has no overlays")
        return self._instances.overlays.plan(self._task.instance_id)

    @property
    def _overlays(self) -> Overlays:
        overlays = self._instances.overlays
        if overlays is None:
            raise HypervisorError(self._task.instance_id, "the hypervisor that the settings name has no overlays")
        return overlays
