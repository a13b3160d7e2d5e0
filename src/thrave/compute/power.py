"""Switching an instance's power for somebody who does not wait, and for somebody who does.

`power_off` asks the guest until it is off. `PowerControl` is what a caller of EC2's can have done without waiting;
`PowerRequests` does it in the background. All work with any inventory, and none ever cuts the power.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from thrave.compute.errors import InstanceError, InstanceHeld
from thrave.compute.instance import GONE, InstanceState
from thrave.compute.instances import Instances
from thrave.concurrency import supervised

ASK_AGAIN = 5.0  # seconds; a guest that is still booting does not hear the first request to power off
LOOK_AGAIN = 0.2  # seconds
HELD_LOOK_AGAIN = 1.0  # seconds

log = logging.getLogger(__name__)


def power_off(
    instances: Instances,
    instance_id: str,
    *,
    grace: float,
    ask: Callable[[str], None] | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> InstanceState:
    """Ask the guest to power off, again and again, until it has or is gone.

    Args:
        instances: The inventory that has it.
        instance_id: The instance.
        grace: Seconds that the guest has.
        ask: Asks it; `instances.request_stop` if none is given.
        pause: Waits some seconds between two looks; may raise, to end it all.

    Returns:
        The state that it is in then: `stopped`, `shutting-down`, `terminated`, or any other if the time was up.

    Raises:
        InstanceError: As `Instances.state` and `Instances.request_stop`.
    """
    ask = ask or instances.request_stop
    given_up = time.monotonic() + grace
    asked_again = 0.0
    while (state := instances.state(instance_id)) not in {InstanceState.STOPPED, *GONE}:
        if time.monotonic() > given_up:
            break
        if time.monotonic() > asked_again:
            ask(instance_id)
            asked_again = time.monotonic() + ASK_AGAIN
        pause(LOOK_AGAIN)
    return state


class PowerControl(Protocol):
    """Starts and restarts instances for somebody who does not wait for it."""

    def start(self, instance_id: str) -> None:
        """Have the instance started, once nobody holds it any more."""

    def reboot(self, instance_id: str) -> None:
        """Have the guest power off and the instance started again. A guest that does not hear it runs on."""


class PowerRequests:
    """Starts and restarts that go on after whoever asked for them has been answered.

    One an instance at most: what is asked meanwhile is what is being done. What goes wrong is logged, and the
    instance's state tells the rest. They do not outlive the process: an instance whose restart was cut off stays off.

    Args:
        instances: The inventory.
        grace: Seconds that a guest has to power off.
    """

    def __init__(self, instances: Instances, *, grace: float) -> None:
        self._instances = instances
        self._grace = grace
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def start(self, instance_id: str) -> None:
        """Have the instance started, once nobody holds it any more."""
        self._begin("start", instance_id, self._start)

    def reboot(self, instance_id: str) -> None:
        """Have the guest power off and the instance started again. A guest that does not hear it runs on."""
        self._begin("reboot", instance_id, self._restart)

    def _begin(self, name: str, instance_id: str, work: Callable[[str], None]) -> None:
        with self._lock:
            if instance_id in self._busy:
                return
            self._busy.add(instance_id)
        supervised(
            f"{name} {instance_id}",
            lambda: self._do(name, instance_id, work),
            on_failure=lambda error: log.error("%s of %s failed", name, instance_id, exc_info=error),
        )

    def _do(self, name: str, instance_id: str, work: Callable[[str], None]) -> None:
        try:
            work(instance_id)
        except (InstanceError, OSError) as error:
            log.warning("%s of %s: %s", name, instance_id, error)
        finally:
            with self._lock:
                self._busy.discard(instance_id)

    def _restart(self, instance_id: str) -> None:
        state = power_off(self._instances, instance_id, grace=self._grace)
        if state is InstanceState.STOPPED:
            self._start(instance_id)
        elif state not in GONE:
            log.warning("reboot: %s did not power off within %.0f seconds", instance_id, self._grace)

    def _start(self, instance_id: str) -> None:
        while True:
            try:
                self._instances.start(instance_id)
            except InstanceHeld:
                time.sleep(HELD_LOOK_AGAIN)
            else:
                return
