"""Sees an instance through a power-off that it was asked for and that is no longer wanted.

A guest hears the power button when it likes. If its task is cancelled or fails before it has, the instance still runs
then and there is nothing to start; a minute later it powers off. The caretaker looks after such instances for as long
as the guest might still obey, and starts them. It leaves one alone whose next task has begun, and stops none.
"""

import threading
import time

import structlog

from thrave.compute.errors import InstanceError
from thrave.compute.instance import GONE, InstanceState
from thrave.compute.instances import Instances
from thrave.database import utc_now
from thrave.tasks.records import Records
from thrave.tasks.task import BundleTask

INTERVAL = 1.0  # seconds

log = structlog.get_logger()


class Caretaker:
    """Looks after the instances of one host, in a thread of its own."""

    def __init__(self, records: Records, instances: Instances, host: str) -> None:
        """Look after what the tasks of `host` have left."""
        self._records = records
        self._instances = instances
        self._host = host
        self._thread = threading.Thread(target=self._work, name="caretaker", daemon=True)

    def start(self) -> None:
        """Begin. It ends with the process."""
        self._thread.start()

    def look(self) -> None:
        """Look once at each instance that is looked after, and start those that have powered off."""
        for task in self._records.looked_after(self._host):
            try:
                over = self._see_to(task)
            except InstanceError as error:
                log.warning("an instance cannot be seen to", instance_id=task.instance_id, reason=str(error))
                over = False
            if over or (task.look_after_until and task.look_after_until < utc_now()):
                self._records.look_after(task.bundle_id, None)

    def _see_to(self, task: BundleTask) -> bool:
        if self._records.in_progress(task.instance_id):
            return False
        state = self._instances.state(task.instance_id)
        if state is InstanceState.STOPPED and task.was_running:
            log.info("an instance powered off after its task had ended", instance_id=task.instance_id)
            self._instances.start(task.instance_id)
        return state is InstanceState.STOPPED or state in GONE

    def _work(self) -> None:
        while True:
            time.sleep(INTERVAL)
            try:
                self.look()
            except Exception:  # it must not end: the database may be back at the next look
                log.exception("the caretaker stumbled")
