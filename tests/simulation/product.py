"""Puts the product on the simulation: replaces what it takes from the operating system and what it talks to.

The product's code above `thrave.concurrency` runs unchanged. Replaced are its edges: the hypervisor driver, the object
store, the engine, the root volume, and the end of a process.
"""

import hashlib
import logging
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import SimpleNamespace

import structlog

import thrave.agent
import thrave.database
from simulation.database import AdvisoryLock
from simulation.engine import SimulatedWorker
from simulation.machines import SimulatedVolume
from simulation.scheduler import SimulatedSystem
from thrave import concurrency
from thrave.agent import Agent
from thrave.bundle import sealer
from thrave.bundle.sealer import Sealer
from thrave.compute import power, timeouts
from thrave.tasks import (
    claims,
    created_buckets,
    engine,
    failpoints,
    hosts,
    housekeeping,
    instance_power,
    journal,
    lease,
    monitor,
    object_removal,
    repository,
    root_volume,
    store_calls,
    task_objects,
    workflow,
)
from thrave.volumes.errors import VolumeChangedError
from thrave.volumes.formats import VolumeMetadata

PART_SIZE = 64 * 1024
CHUNK = 32 * 1024
"""Small parts and chunks, so that a small disk has several."""

# Global variables of the product that belong to one process: exchanged when a thread of another process runs.
PROCESS_STATE = {
    "in flight": (
        store_calls.InFlightObjects,
        [(module, "IN_FLIGHT") for module in (store_calls, housekeeping, task_objects, object_removal, journal)],
    ),
    "running": (engine.RunningTasks, [(module, "RUNNING") for module in (engine, hosts, workflow)]),
    "process id": (lambda: concurrency.random_hex(8), [(claims, "THIS_PROCESS")]),
    "power locks": (dict, [(power, "_power_locks")]),
    "abandoned": (Counter, [(timeouts, "_abandoned")]),
}

# Longer periods of background jobs, in seconds, where only the number of runs matters, and a shorter limit: each run
# costs real time.
PERIODS = [
    *((module, "RECOVER_FOR", timedelta(minutes=30)) for module in (repository, housekeeping, instance_power)),
    (monitor, "INTERVAL", 1.0),
    (monitor, "CHECK_INTERVAL", 2.0),
    (thrave.agent, "REPORT_INTERVAL", 30.0),
    (thrave.agent, "POWER_INTERVAL", 30.0),
    (thrave.agent, "REQUEUE_INTERVAL", 60.0),
    (thrave.agent, "DRAIN_INTERVAL", 5.0),
    (housekeeping, "POWER_RECOVERY_INTERVAL", 30.0),
    (housekeeping, "OBJECT_CLEANUP_INTERVAL", 120.0),
]


@contextmanager
def on_simulation(world):
    """Run the product of this block in a world."""
    with ExitStack() as stack:

        def replace(owner, name, value):
            before = vars(owner)[name] if name in vars(owner) else getattr(owner, name)  # a property as itself
            stack.callback(setattr, owner, name, before)
            setattr(owner, name, value)

        stack.callback(concurrency.use_system, concurrency.use_system(SimulatedSystem(world.scheduler)))
        if world.reintroduced is not None:
            world.reintroduced(replace, world)
        for module, name, value in PERIODS:
            replace(module, name, value)
        _replace_edges(replace, world)
        _replace_process_state(replace, world.scheduler)
        yield


def _replace_edges(replace, world):
    def exit_process(_status):
        world.scheduler.kill(world.scheduler.current.process, "lease lost")

    def new_worker(_database_url, host, *, worker_concurrency):
        return SimulatedWorker(world, host, worker_concurrency)

    def read_metadata(*_arguments, **_options):
        return VolumeMetadata(frozenset(), frozenset(), ())

    @contextmanager
    def open_volume(path, _format, **_options):
        machine = next(one for one in world.machines.values() if one.path == path)
        before = hashlib.sha256(machine.content).digest()
        yield SimulatedVolume(world, machine)
        if hashlib.sha256(machine.content).digest() != before:
            raise VolumeChangedError(path, "its content")

    replace(failpoints, "_crash", SimpleNamespace(place="simulated", reach=world.reach_failpoint))
    replace(created_buckets, "_LOCKS", [AdvisoryLock(world.scheduler)])
    replace(thrave.database, "utc_now", world.utc_now)  # the clock of the database server
    replace(thrave.agent, "TaskWorker", new_worker)
    replace(Agent, "_save_host_id", lambda self: None)
    replace(lease, "os", SimpleNamespace(_exit=exit_process))
    replace(workflow, "open_volume", open_volume)
    replace(workflow, "find_unclean", lambda volume: [])
    replace(root_volume, "read_metadata", read_metadata)
    replace(sealer, "CHUNK", CHUNK)
    replace(sealer, "_PIECE", CHUNK)
    replace(Sealer.__init__, "__kwdefaults__", {**Sealer.__init__.__kwdefaults__, "part_size": PART_SIZE, "workers": 2})


def _replace_process_state(replace, scheduler):
    for _factory, places in PROCESS_STATE.values():
        for module, name in places:
            replace(module, name, getattr(module, name))

    def enter(process):
        for name, (factory, places) in PROCESS_STATE.items():
            if name not in process.memory:
                process.memory[name] = factory()
            for module, variable in places:
                setattr(module, variable, process.memory[name])

    scheduler.on_process_switch = enter


def silence_logs():
    """Drop the product's log."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def trace_logs(world):
    """Put the product's log into the trace of a world."""

    def to_trace(_logger, level, event):
        error = event.pop("exc_info", None)
        # The account is created before the world has its seed, so its random id differs between runs.
        fields = " ".join(f"{name}={value}" for name, value in event.items() if name not in {"event", "account_id"})
        world.note(f"{level}: {event['event']} {fields} {'' if error is None else repr(error)}")
        raise structlog.DropEvent

    structlog.configure(processors=[to_trace], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
