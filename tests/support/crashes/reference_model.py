"""Reference model for tests/tasks/test_reference_model.py: the allowed states of one instance and its bundle tasks.

It knows nothing of how Thrave does it: what EC2's callers were promised stands here in as few words as can be.
"""

from dataclasses import dataclass, field

LATER = {
    "pending": {"waiting-for-shutdown", "bundling", "storing", "complete", "cancelling", "failed"},
    "waiting-for-shutdown": {"bundling", "storing", "complete", "cancelling", "failed"},
    "bundling": {"storing", "complete", "cancelling", "failed"},
    "storing": {"complete", "cancelling", "failed"},
    "cancelling": {"failed"},
    "complete": set(),
    "failed": set(),
}
"""State to those that may be seen after it, by somebody who does not see every one."""

OF_DISTURBANCE = {
    "Client.InstanceTerminated",
    "Server.InstanceError",
    "Server.InstanceNotStarted",
    "Server.VolumeError",
}


@dataclass
class ModelTask:
    """A bundle task, as it was last seen."""

    bundle_id: str
    prefix: str
    disturbed: bool
    """Somebody else has stopped, started or removed the instance meanwhile: it may fail, and leave it either way."""
    state: str = "pending"
    progress: int = 0
    cancelled: bool = False
    shown: dict = field(default_factory=dict)

    @property
    def has_ended(self):
        return not LATER[self.state]

    def see(self, shown):
        """Compare what DescribeBundleTasks shows with what it may show now."""
        state, progress = shown["State"], int(shown.get("Progress", "0%").removesuffix("%"))
        assert state == self.state or state in LATER[self.state], f"{self.state}, then {state}"
        assert state != self.state or progress >= self.progress, f"{self.progress}, then {progress}% in {state}"
        assert not self.has_ended or shown == self.shown, f"a task that had ended changed: {self.shown}, then {shown}"
        assert state != "complete" or not self.cancelled, "a task that was cancelled is complete"
        assert state != "failed" or shown["BundleTaskError"]["Code"] in self.reasons(), shown
        self.state, self.progress, self.shown = state, progress, shown

    def reasons(self):
        """The codes with which it may fail."""
        return ({"Client.Cancelled"} if self.cancelled else set()) | (OF_DISTURBANCE if self.disturbed else set())


@dataclass
class ModelInstance:
    """An instance and its tasks, the oldest first."""

    instance_id: str
    sha256: str
    runs: bool = True
    is_there: bool = True
    tasks: list = field(default_factory=list)

    @property
    def unfinished(self):
        """The task that had not ended when it was last seen."""
        return next((task for task in self.tasks if not task.has_ended), None)

    def bundled(self, bundle_id, prefix, *, disturbed):
        self.tasks.append(ModelTask(bundle_id, prefix, disturbed))

    def refusals(self):
        """The codes with which BundleInstance may be refused; it must be if the instance is gone."""
        if not self.is_there:
            return {"InvalidInstanceID.NotFound"}
        return {"BundlingInProgress"} if self.unfinished else set()

    def disturb(self):
        """Somebody else does something to the instance."""
        if self.unfinished:
            self.unfinished.disturbed = True

    def see_power(self, runs):
        """Compare the instance's power, when no task is unfinished, with what it may be; take note of it."""
        last = self.tasks[-1] if self.tasks else None
        assert (last and last.disturbed) or runs == self.runs, f"runs: {runs}, but ran before: {self.runs}"
        self.runs = runs
