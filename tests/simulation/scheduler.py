"""Runs simulated threads one at a time, in an order that a seed decides, on a simulated clock.

A simulated thread is a greenlet. At each operation on a lock, condition, event or clock (`SimulatedSystem`), and at
each call into the simulated store, hypervisor and database, the scheduler may run another thread. The clock moves only
when no thread can run: then it jumps to the next timer. So a run of the same seed makes the same switches, and an hour
of simulated time costs what its events cost.

Each thread belongs to a simulated process. A crash of a process ends its threads wherever they are; nothing that they
do afterwards while they unwind reaches the simulated world (`Scheduler.check_alive`).
"""

import heapq
from collections import Counter, deque
from itertools import count

from greenlet import getcurrent, greenlet

from thrave.concurrency import System

EPOCH = 1_800_000_000.0
"""Seconds since 1970 at the beginning of each run."""


class ProcessKilled(BaseException):
    """The process of this thread was killed."""


class TooManySwitches(Exception):
    """The run has made more switches than a run can need."""


class Process:
    """A simulated process: threads that share memory and end together.

    Attributes:
        name: Shown in traces.
        host: Name of its host, if it is an agent.
        can_crash: Whether the seed may kill it.
        clock_error: Seconds by which its host's clock is ahead of the database server's.
        drift: Seconds that its host's monotonic clock gains in a second.
        memory: What would be a global variable of the process, by name.
    """

    def __init__(self, name, host="", *, can_crash=False, clock_error=0.0, drift=0.0):
        self.name = name
        self.host = host
        self.can_crash = can_crash
        self.clock_error = clock_error
        self.drift = drift
        self.is_alive = True
        self.memory = {}
        self.threads = set()
        self.at_exit = []

    def __repr__(self):
        return self.name


class Thread:
    """A simulated thread, with the methods that the product uses of `threading.Thread`."""

    def __init__(self, scheduler, process, name, run):
        self.name = name
        self.process = process
        self._scheduler = scheduler
        self._run = run
        self.greenlet = greenlet(self._main, scheduler.hub)
        self.is_over = False
        self.timed_out = False
        self.wakeup = 0  # number of the timer that may wake it; older ones are void
        self.waiters = None  # the queue in which it waits
        self.priority = scheduler.random.random()
        self.joiners = deque()

    def _main(self):
        try:
            self._run()
        except ProcessKilled:
            pass
        finally:
            self.is_over = True
            self.process.threads.discard(self)
            for joiner in self.joiners:
                self._scheduler.make_ready(joiner)
        return self._scheduler.hub

    def is_alive(self):
        return not self.is_over

    def join(self, timeout=None):
        if not self.is_over:
            self._scheduler.wait_in(self.joiners, timeout)


class Scheduler:
    """See the module.

    Args:
        random: Decides every switch.
        switch_probability: Of running another thread where one may run, between 0 and 1.
        pause_probability: Of stopping a thread for a while where another one may run.
    """

    def __init__(self, random, switch_probability=1.0, pause_probability=0.0, max_switches=400_000):
        self.random = random
        self.now = 0.0
        self.hub = getcurrent()
        self.current = None
        self.switches = 0
        self.counts = Counter()
        self.crash_in = None
        """Switches after which the process that runs then is killed; None: never."""
        self.on_crash = lambda process, why: None
        self.on_process_switch = lambda process: None
        self._switch_probability = switch_probability
        self._pause_probability = pause_probability
        self._has_priorities = random.random() < 0.5
        self._max_switches = max_switches
        self._ready = []
        self._timers = []
        self._numbers = count(1)
        self._process = None
        self.processes = []

    # Called by the world

    def start(self, process, name, run):
        """Start a thread of a process."""
        thread = Thread(self, process, name, run)
        if process not in self.processes:
            self.processes.append(process)
        process.threads.add(thread)
        self._ready.append(thread)
        return thread

    def call_later(self, seconds, action):
        """Call `action` from the hub after some seconds."""
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), None, action))

    def kill(self, process, why):
        """Kill a process: end its threads where they are. A thread may kill its own process."""
        if not process.is_alive:
            return
        process.is_alive = False
        self.counts[f"crash: {why}"] += 1
        for action in process.at_exit:
            action()
        mine = self.current if self.current in process.threads else None
        for thread in [*process.threads]:
            if thread is not mine:
                self._unwind(thread)
        self.on_crash(process, why)
        if mine is not None:
            raise ProcessKilled

    def discard(self, process):
        """End all threads of a process at the end of a run."""
        process.is_alive = False
        for thread in [*process.threads]:
            self._unwind(thread)

    def run(self, until, deadline):
        """Run threads until `until()` is true, or to the time `deadline`; return whether it is true."""
        while not until():
            if self._ready:
                self._resume(self._next_thread())
            elif self._timers and self._timers[0][0] <= deadline:
                self._next_timer()
            else:
                self.now = max(self.now, deadline)
                return until()
        return True

    def _next_thread(self):
        """Choose the next thread: any one, or in runs with priorities the one with the highest.

        With priorities that seldom change, one thread gets far ahead of another one. A choice between equals would
        need many lucky throws in a row for that. Source: Burckhardt et al., A Randomized Scheduler with Probabilistic
        Guarantees of Finding Bugs, ASPLOS 2010.
        """
        ready = self._ready
        if self._has_priorities:
            index = max(range(len(ready)), key=lambda each: ready[each].priority)
            if self.random.random() < 0.02:
                ready[index].priority = self.random.random()
        else:
            index = self.random.randrange(len(ready))
        return ready.pop(index)

    def _next_timer(self):
        when, number, thread, action = heapq.heappop(self._timers)
        if thread is None:
            self.now = max(self.now, when)
            action()
        elif thread.wakeup == number and not thread.is_over and thread.process.is_alive:
            self.now = max(self.now, when)
            thread.timed_out = True
            if thread.waiters is not None:
                thread.waiters.remove(thread)
            self._wake(thread)

    def _resume(self, thread):
        if thread.is_over or not thread.process.is_alive:
            return
        self.switches += 1
        if self.switches > self._max_switches:
            raise TooManySwitches(f"{self.switches} switches at {self.now:.1f} s")
        if self.crash_in is not None and thread.process.can_crash:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.crash_in = None
                self.kill(thread.process, "at a switch")
                return
        if thread.process is not self._process:
            self._process = thread.process
            self.on_process_switch(thread.process)
        self.current = thread
        try:
            thread.greenlet.switch()
        finally:
            self.current = None

    def _unwind(self, thread):
        """End a thread of a killed process. What it does meanwhile raises ProcessKilled again."""
        before, self.current = self.current, thread
        try:
            for _ in range(100):
                if thread.greenlet.dead:
                    break
                thread.greenlet.parent = getcurrent()
                thread.greenlet.throw(ProcessKilled)
        except ProcessKilled:
            pass
        finally:
            self.current = before
            thread.is_over = True
            thread.process.threads.discard(thread)

    # Called by simulated threads

    def check_alive(self):
        """Raise ProcessKilled in a thread whose process was killed."""
        if self.current is not None and not self.current.process.is_alive:
            raise ProcessKilled

    def switch_point(self):
        """Let another thread run, if the seed says so; or stop this one for a while, as a busy machine does."""
        self.check_alive()
        if self.current is None:
            return
        if self._pause_probability and self.random.random() < self._pause_probability:
            self.sleep(self.random.choice([0.001, 0.1, 5.0]))
            return
        may_switch = self._ready or self.crash_in is not None
        if may_switch and (self._has_priorities or self.random.random() < self._switch_probability):
            self._ready.append(self.current)
            self._leave()

    def sleep(self, seconds):
        """Wait in the current thread. 0 seconds let any other thread run first, or none."""
        if seconds > 0:
            self.wait_in(None, seconds)
        else:
            self.check_alive()
            self._ready.append(self.current)
            self._leave()

    def wait_in(self, waiters, timeout=None):
        """Wait until `make_ready` wakes this thread; return False after `timeout` seconds."""
        self.check_alive()
        thread = self.current
        if thread is None:
            raise RuntimeError("only a simulated thread can wait")
        thread.timed_out = False
        thread.waiters = waiters
        if waiters is not None:
            waiters.append(thread)
        if timeout is not None:
            thread.wakeup = next(self._numbers)
            heapq.heappush(self._timers, (self.now + timeout, thread.wakeup, thread, None))
        try:
            self._leave()
        except BaseException:
            if waiters is not None and thread in waiters:
                waiters.remove(thread)
            raise
        return not thread.timed_out

    def make_ready(self, thread):
        """Wake a thread that waits, and that its caller has removed from its queue."""
        self._wake(thread)

    def _wake(self, thread):
        thread.wakeup = 0
        thread.waiters = None
        if not thread.is_over and thread.process.is_alive:
            self._ready.append(thread)

    def _leave(self):
        self.hub.switch()
        self.check_alive()


class SimulatedLock:
    """A lock that is not reentrant."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._is_held = False
        self._waiters = deque()

    def acquire(self, *, blocking=True, timeout=-1):
        self._scheduler.switch_point()
        if self._scheduler.current is None and self._is_held:
            raise RuntimeError("the hub cannot wait for a lock")
        while self._is_held:
            if not blocking or not self._scheduler.wait_in(self._waiters, None if timeout < 0 else timeout):
                return False
        self._is_held = True
        return True

    def release(self):
        self._is_held = False
        if self._waiters:
            self._scheduler.make_ready(self._waiters.popleft())

    def locked(self):
        return self._is_held

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


class SimulatedCondition:
    """A condition with a lock of its own."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._lock = SimulatedLock(scheduler)
        self._waiters = deque()

    def __enter__(self):
        return self._lock.__enter__()

    def __exit__(self, *_):
        self._lock.release()

    def wait(self, timeout=None):
        self._lock.release()
        try:
            return self._scheduler.wait_in(self._waiters, timeout)
        finally:
            self._lock.acquire()

    def wait_for(self, predicate, timeout=None):
        end = None if timeout is None else self._scheduler.now + timeout
        while not (result := predicate()):
            remaining = None if end is None else end - self._scheduler.now
            if remaining is not None and remaining <= 0:
                return predicate()
            self.wait(remaining)
        return result

    def notify(self, n=1):
        for _ in range(min(n, len(self._waiters))):
            self._scheduler.make_ready(self._waiters.popleft())

    def notify_all(self):
        self.notify(len(self._waiters))


class SimulatedEvent:
    """An event."""

    def __init__(self, scheduler):
        self._scheduler = scheduler
        self._is_set = False
        self._waiters = deque()

    def is_set(self):
        return self._is_set

    def set(self):
        self._is_set = True
        while self._waiters:
            self._scheduler.make_ready(self._waiters.popleft())

    def clear(self):
        self._is_set = False

    def wait(self, timeout=None):
        if self._is_set:
            self._scheduler.switch_point()
            return True
        self._scheduler.wait_in(self._waiters, timeout)
        return self._is_set


class SimulatedSemaphore:
    """A bounded semaphore."""

    def __init__(self, scheduler, value):
        self._scheduler = scheduler
        self._value = value
        self._waiters = deque()

    def acquire(self, *, blocking=True, timeout=None):
        self._scheduler.switch_point()
        while not self._value:
            if not blocking or not self._scheduler.wait_in(self._waiters, timeout):
                return False
        self._value -= 1
        return True

    def release(self):
        self._value += 1
        if self._waiters:
            self._scheduler.make_ready(self._waiters.popleft())

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


class SimulatedSystem(System):
    """`thrave.concurrency.System` on a scheduler."""

    def __init__(self, scheduler):
        self._scheduler = scheduler

    def start_thread(self, name, run):
        self._scheduler.check_alive()
        process = self._scheduler.current.process
        thread = self._scheduler.start(process, name, run)
        self._scheduler.switch_point()  # the new thread may end before its starter does anything else
        return thread

    def lock(self):
        return SimulatedLock(self._scheduler)

    def event(self):
        return SimulatedEvent(self._scheduler)

    def condition(self):
        return SimulatedCondition(self._scheduler)

    def semaphore(self, value):
        return SimulatedSemaphore(self._scheduler, value)

    def sleep(self, seconds):
        self._scheduler.sleep(seconds)

    def monotonic(self):
        current = self._scheduler.current
        return self._scheduler.now * (1 + (current.process.drift if current else 0.0)) + 1000.0

    def boot_time(self):
        return self.monotonic()

    def wall_time(self):
        current = self._scheduler.current
        return EPOCH + self._scheduler.now + (current.process.clock_error if current else 0.0)

    def random_bytes(self, count):
        return self._scheduler.random.randbytes(count)

    def random_below(self, limit):
        return self._scheduler.random.randrange(limit)
