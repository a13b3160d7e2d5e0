"""No wait of the service is without an end: each has a timeout, or a reason here why it ends."""

import ast
from pathlib import Path

import thrave

ROOT = Path(thrave.__file__).parent
POSITION_OF_TIMEOUT = {
    "wait": 0, "join": 0, "get": 0, "result": 0, "exception": 0, "communicate": 1, "wait_for": 1, "acquire": 1,
}  # fmt: skip
TIMEOUTS = {"timeout", "within", "blocking"}

PIPELINE = "the end of the pipeline closes its queues and wakes each wait for a job"
WITHOUT = {
    ("agent.py", "self._has_ended.wait()"): "the agent's main thread; signals end it",
    ("server.py", "agent.wait()"): "the same, and a thread that waits for nothing else",
    ("pipeline.py", "self._unused.get()"): PIPELINE,
    ("pipeline.py", "self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)"): PIPELINE,
    ("pipeline.py", "self._changed.wait_for(lambda: self._closed or self._items)"): PIPELINE,
    ("pipeline.py", "self._job_ended.wait_for(lambda: job.is_done or self._stopped)"): PIPELINE,
    ("pipeline.py", "jobs.get()"): PIPELINE,
    ("pipeline.py", "queue.get()"): PIPELINE,
    ("pipeline.py", "self.acquire()"): PIPELINE,
    ("compute/timeouts.py", "_given_up.get()"): "a context variable",
    ("write_guard.py", "self._current.get()"): "a context variable",
    ("http_server.py", "_PEER.get()"): "a context variable",
    ("demo/tour.py", "waiter.wait(**ids, WaiterConfig={'Delay': 1, 'MaxAttempts': WAIT_TIMEOUT})"): "boto3's own limit",
    ("testing/memory_store.py", "self._released.wait()"): "the end of each test releases it",
    ("testing/task_gate.py", "self._changed.wait()"): "the end of each test lets every task go",
    ("files.py", "fcntl.flock(descriptor, fcntl.LOCK_EX)"): "a start of the service, or a file that nobody else has",
}


def test_every_wait_has_a_timeout_or_a_reason_why_it_ends():
    found = {
        (path.relative_to(ROOT).as_posix(), ast.unparse(call))
        for path in ROOT.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and is_without_timeout(call)
    }
    assert found - WITHOUT.keys() == set(), "give it a timeout, or say here why it ends"
    assert WITHOUT.keys() - found == set(), "it is not there any more"


def is_without_timeout(call):
    name = call.func.attr
    if name == "flock":
        return "LOCK_NB" not in ast.unparse(call) and "LOCK_UN" not in ast.unparse(call)
    if name == "get" and call.args:  # of a mapping
        return False
    if name == "join" and call.args:  # of strings
        return False
    if name not in POSITION_OF_TIMEOUT:
        return False
    return len(call.args) <= POSITION_OF_TIMEOUT[name] and not any(word.arg in TIMEOUTS for word in call.keywords)
