"""Reference model for tests/tasks/test_reference_model.py: the allowed states of one instance and its bundle tasks.

It has no knowledge of the implementation, only what the documentation promises to callers.
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
"""For each state, the states that a client may see later; a client may miss some."""

DISTURBANCE_ERRORS = {
    "Client.InstanceTerminated",
    "Server.InstanceError",
    "Server.InstanceNotStarted",
    "Server.VolumeError",
}


@dataclass
class ModelTask:
    """A bundle task as of its last response."""

    bundle_id: str
    prefix: str
    disturbed: bool
    """Whether another client stopped, started or removed the instance during the task. Then the task may fail, and the
    instance may be on or off."""
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
        """Return the codes with which the task may fail."""
        return ({"Client.Cancelled"} if self.cancelled else set()) | (DISTURBANCE_ERRORS if self.disturbed else set())


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
        """The task that had not ended in its last response."""
        return next((task for task in self.tasks if not task.has_ended), None)

    def bundled(self, bundle_id, prefix, *, disturbed):
        self.tasks.append(ModelTask(bundle_id, prefix, disturbed))

    def refusals(self):
        """Return the codes with which BundleInstance may be refused. It must be refused if the instance was removed."""
        if not self.is_there:
            return {"InvalidInstanceID.NotFound"}
        return {"BundlingInProgress"} if self.unfinished else set()

    def disturb(self):
        """Record that another client has changed the instance."""
        if self.unfinished:
            self.unfinished.disturbed = True

    def see_power(self, runs):
        """Check the instance's power while no task is unfinished, and record it."""
        last = self.tasks[-1] if self.tasks else None
        assert (last and last.disturbed) or runs == self.runs, f"runs: {runs}, but ran before: {self.runs}"
        self.runs = runs
