"""Simulated machines, their disks, and the hypervisor driver through which a host switches them.

A machine that runs writes to its disk, or to its overlay: each write changes every block of the disk, so that an image
with blocks of two moments is no state that the disk ever had.
"""

import hashlib
from contextlib import contextmanager
from pathlib import Path

from thrave.compute.base import Overlay
from thrave.compute.errors import (
    HypervisorUnavailable,
    IncorrectInstanceState,
    InstanceCommandFailed,
    InstanceLocked,
    InstanceNotFound,
    RootVolumeInUse,
)
from thrave.compute.instance import Instance, InstanceState, OffReason, VolumeFile
from thrave.compute.progress_timeout import report_progress
from thrave.volumes.base import Extent
from thrave.volumes.errors import VolumeUnreadableError
from thrave.write_guard import command_guard

BLOCK = 4096
UP = (InstanceState.PENDING, InstanceState.RUNNING)


class Machine:
    """A machine and its disk.

    Attributes:
        instance_id: EC2's id.
        content: The bytes of the disk.
        states: SHA-256 of each state that the disk has had, with the time from which it had it.
        is_on_overlay: Whether it writes to an overlay.
        generation: Counts starts, and everything else after which a hold is broken.
    """

    def __init__(self, world, instance_id, account_id, blocks):
        self._world = world
        self.instance_id = instance_id
        self.account_id = account_id
        self.path = Path(f"/simulated/{instance_id}.raw")
        self.content = bytearray(world.random.randbytes(blocks * BLOCK))
        self.states = {}
        self.is_on_overlay = False
        self.has_overlay = False
        self.overlay_content = None
        self.state = InstanceState.RUNNING
        self.off_reason = None
        self.generation = 0
        self.holder = None
        self.stop_at = 0
        self.lost_power = False
        self.launch_time = world.utc_now()
        self.wrote(0)

    def wrote(self, number):
        """The guest writes to every block."""
        target = self.overlay_content if self.is_on_overlay else self.content
        for start in range(0, len(target), BLOCK):
            target[start : start + 8] = number.to_bytes(8, "big")
        if not self.is_on_overlay:
            self.record_state()

    def record_state(self):
        self.states.setdefault(hashlib.sha256(self.content).hexdigest(), self._world.scheduler.now)

    def power_on(self):
        if self.state is InstanceState.TERMINATED:
            return
        self.state = InstanceState.RUNNING
        self.off_reason = None
        self.lost_power = False
        self.generation += not self.has_overlay
        self.is_on_overlay = self.has_overlay
        self.launch_time = self._world.utc_now()
        self.stop_at += 1
        self.wrote(self._world.next_number())

    def power_off(self, reason):
        if self.state in UP or self.state in {InstanceState.STOPPING, InstanceState.SHUTTING_DOWN}:
            self.wrote(self._world.next_number())
            self.state = (
                InstanceState.TERMINATED if self.state is InstanceState.SHUTTING_DOWN else InstanceState.STOPPED
            )
            self.off_reason = reason
            self.lost_power = reason is OffReason.LOST_POWER
            self.stop_at += 1

    def asked_to_stop(self, delay):
        """The guest powers off after some seconds; None: it ignores the request."""
        if delay is None:
            return
        asked = self.stop_at

        def power_off():
            if self.stop_at == asked:
                self._world.note(f"the guest of {self.instance_id} powers off")
                self.power_off(OffReason.SHUT_DOWN)

        self._world.scheduler.call_later(delay, power_off)

    def instance(self):
        return Instance(
            instance_id=self.instance_id,
            account_id=self.account_id,
            platform="windows",
            root_volume=VolumeFile(path=self.path),
            state=self.state,
            off_reason=self.off_reason if self.state is InstanceState.STOPPED else None,
            launch_time=self.launch_time,
        )


class SimulatedDriver:
    """`thrave.compute.base.HypervisorDriver` of one host. All hosts reach all machines."""

    def __init__(self, world):
        self._world = world
        self.overlays = SimulatedOverlays(world, self) if world.has_overlays else None

    def list(self, account_id=None, *, include=None):
        self.ask("list", "")
        found = [machine.instance() for machine in self._world.machines.values()]
        return [one for one in found if account_id in {None, one.account_id} and (include is None or include(one))]

    def get(self, instance_id):
        self.ask("get", instance_id)
        return self.machine(instance_id).instance()

    def get_owner(self, instance_id):
        return self.machine(instance_id).account_id

    def state(self, instance_id):
        self.ask("state", instance_id)
        return self.machine(instance_id).state

    def find_users(self, is_same, *, except_instance):
        return []

    def request_stop(self, instance_id):
        self.command("stop", instance_id)
        machine = self.machine(instance_id)
        if machine.state is InstanceState.TERMINATED:
            raise IncorrectInstanceState(instance_id, "it is terminated")
        if machine.state in UP:
            machine.asked_to_stop(self._world.stop_delay())

    def request_sysprep(self, instance_id, command):
        self.request_stop(instance_id)

    def terminate(self, instance_id):
        self.command("terminate", instance_id)
        machine = self.machine(instance_id)
        if machine.state is InstanceState.STOPPED:
            machine.state = InstanceState.TERMINATED
        elif machine.state is not InstanceState.TERMINATED:
            machine.state = InstanceState.SHUTTING_DOWN
            machine.asked_to_stop(self._world.stop_delay())

    def force_stop(self, instance_id):
        self.command("force stop", instance_id)
        self.machine(instance_id).power_off(OffReason.POWER_CUT)

    def start(self, instance_id):
        self.command("start", instance_id)
        machine = self.machine(instance_id)
        if machine.state is InstanceState.TERMINATED:
            raise IncorrectInstanceState(instance_id, "it is terminated")
        if machine.holder is not None:
            raise InstanceLocked(instance_id)
        if self._world.faults.occurs("hypervisor: start refused"):
            raise InstanceCommandFailed(instance_id, "startCommand", "failed", status=1)
        if machine.state is InstanceState.STOPPED:
            machine.power_on()
            self._world.note(f"{instance_id} is started")
        self._world.lose_answer("start", instance_id)

    @contextmanager
    def hold_stopped(self, instance_id):
        self.ask("hold", instance_id)
        machine = self.machine(instance_id)
        if machine.holder is not None:
            raise InstanceLocked(instance_id)
        process = self._world.scheduler.current.process
        machine.holder = hold = object()

        def release():
            if machine.holder is hold:
                machine.holder = None

        process.at_exit.append(release)
        try:
            yield Hold(self, machine, is_overlay=False)
        finally:
            release()
            process.at_exit.remove(release)

    def machine(self, instance_id):
        machine = self._world.machines.get(instance_id)
        if machine is None:
            raise InstanceNotFound(instance_id)
        return machine

    def ask(self, what, instance_id):
        """One question to the hypervisor."""
        world = self._world
        world.scheduler.check_alive()
        if world.scheduler.current is None:
            return
        if world.is_away("hypervisor") or world.faults.occurs("hypervisor: unavailable"):
            world.scheduler.sleep(0.1)
            raise HypervisorUnavailable(instance_id, "no connection")
        if world.faults.occurs("hypervisor: slow"):
            world.scheduler.sleep(world.random.choice([1.0, 20.0, 100.0]))
        else:
            world.scheduler.switch_point()

    def command(self, what, instance_id):
        """One command to the hypervisor."""
        self.ask(what, instance_id)
        command_guard.check()
        self._world.invariants.before_write(f"{what} {instance_id}")
        self._world.note(f"the hypervisor gets the command: {what} {instance_id}")


class Hold:
    """`thrave.compute.base.VolumeHold`."""

    def __init__(self, driver, machine, *, is_overlay):
        self._driver = driver
        self._machine = machine
        self._is_overlay = is_overlay
        self._generation = machine.generation

    def check(self):
        self._driver.ask("check", self._machine.instance_id)
        machine = self._machine
        is_safe = machine.has_overlay if self._is_overlay else machine.state not in UP
        if machine.state in {InstanceState.STOPPING, InstanceState.SHUTTING_DOWN} and not machine.has_overlay:
            is_safe = False
        if not is_safe or machine.generation != self._generation:
            raise RootVolumeInUse(machine.instance_id, "it was started")


class SimulatedOverlays:
    """`thrave.compute.base.Overlays`."""

    def __init__(self, world, driver):
        self._world = world
        self._driver = driver

    def plan(self, instance_id):
        self._driver.ask("plan", instance_id)
        machine = self._driver.machine(instance_id)
        return Overlay(VolumeFile(path=machine.path), machine.path.with_suffix(".overlay"))

    def attach(self, instance_id, overlay):
        self._driver.command("attach overlay", instance_id)
        machine = self._driver.machine(instance_id)
        if machine.has_overlay:
            return
        if machine.state is not InstanceState.STOPPED:
            raise IncorrectInstanceState(instance_id, "it is not off")
        machine.has_overlay = True
        machine.overlay_content = bytearray(machine.content)

    @contextmanager
    def hold_attached(self, instance_id, overlay):
        machine = self._driver.machine(instance_id)
        hold = Hold(self._driver, machine, is_overlay=True)
        hold.check()
        yield hold

    def has_lost_power(self, instance_id):
        self._driver.ask("power", instance_id)
        return self._driver.machine(instance_id).lost_power

    def merge(self, instance_id, overlay, pause):
        self._driver.command("merge overlay", instance_id)
        machine = self._driver.machine(instance_id)
        if not machine.has_overlay:
            return
        for _ in range(self._world.random.randrange(4)):
            report_progress(pause)
            pause(1.0)
            self._driver.ask("merge", instance_id)
        if machine.has_overlay:
            command_guard.check()
            self._world.invariants.before_write(f"merge {instance_id}")
            machine.content[:] = machine.overlay_content
            machine.has_overlay = machine.is_on_overlay = False
            machine.generation += 1
            machine.record_state()
            self._world.note(f"the overlay of {instance_id} is merged")


class SimulatedVolume:
    """`thrave.volumes.base.Volume`: the disk as it is at the moment of each read."""

    def __init__(self, world, machine):
        self._world = world
        self._machine = machine
        self.size = len(machine.content)

    def extents(self):
        return [Extent(0, self.size)]

    def prefetch(self, offset, length):
        pass

    def read_into(self, offset, buffer):
        world = self._world
        if world.faults.occurs("volume: unreadable"):
            raise VolumeUnreadableError(self._machine.path, "Input/output error", offset=offset)
        if world.faults.occurs("volume: hangs"):
            world.scheduler.sleep(world.random.choice([5.0, 100.0, 10_000.0]))
        world.scheduler.sleep(world.random.choice([0.0, 0.01, 1.0]))
        buffer[:] = self._machine.content[offset : offset + len(buffer)]

    def close(self):
        pass
