"""An instance's commands: environment, results, failures and timeouts."""

import os
import sys

import psutil
import pytest

from support.eventually import eventually
from thrave.compute.commands import STATE_NAMES
from thrave.compute.directory_driver import DirectoryDriver
from thrave.compute.errors import IncorrectInstanceState, InstanceCommandFailed
from thrave.compute.instance import InstanceState, OffReason


def python(code, *words):
    return (sys.executable, "-c", code, *map(str, words))


def test_command_runs_without_shell(instances, added, tmp_path):
    words = ["$(touch x)", "; touch x", "`touch x`", "a b", "*", ""]
    seen = tmp_path / "seen"
    code = "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]))"
    instance_id = added(stop_command=python(code, seen, *words))
    instances.request_stop(instance_id)
    assert seen.read_text() == repr(words)


def test_command_gets_environment_and_instance_id(instances, added, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///system")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    seen = tmp_path / "seen"
    names = ["LIBVIRT_DEFAULT_URI", "THRAVE_INSTANCE_ID", "LC_ALL"]
    code = f"import os, sys; open(sys.argv[1], 'w').write(' '.join(os.environ[name] for name in {names}))"
    instance_id = added(stop_command=python(code, seen))
    instances.request_stop(instance_id)
    assert seen.read_text() == f"qemu:///system {instance_id} C"


@pytest.mark.parametrize("word", [*STATE_NAMES, "Shut Off\n\n", "  running "])
def test_state_command_prints_state(instances, added, word):
    instance_id = added(state_command=("printf", "%s", word))
    assert instances.state(instance_id) is STATE_NAMES[word.strip().lower()]


@pytest.mark.parametrize(
    ("printed", "state", "reason"),
    [
        ("shut off (shutdown)\n\n", InstanceState.STOPPED, OffReason.SHUT_DOWN),  # virsh domstate --reason
        ("shut off (destroyed)", InstanceState.STOPPED, OffReason.POWER_CUT),
        ("shut off (crashed)", InstanceState.STOPPED, OffReason.CRASHED),
        ("shut off (saved)", InstanceState.STOPPED, OffReason.SAVED),
        ("shut off (migrated)", InstanceState.STOPPED, OffReason.MIGRATED),
        ("shut off (failed)", InstanceState.STOPPED, OffReason.UNKNOWN),
        ("shut off (from snapshot)", InstanceState.STOPPED, OffReason.SHUT_DOWN),
        ("shut off (daemon)", InstanceState.STOPPED, OffReason.LOST_POWER),
        ("shut off (unknown)", InstanceState.STOPPED, OffReason.UNKNOWN),
        ("stopped (lost-power)", InstanceState.STOPPED, OffReason.LOST_POWER),
        ("Stopped (Shut-Down)", InstanceState.STOPPED, OffReason.SHUT_DOWN),
        ("stopped", InstanceState.STOPPED, None),
        ("running (booted)", InstanceState.RUNNING, None),
        ("paused (starting up)", InstanceState.RUNNING, None),
    ],
)
def test_state_command_may_print_reason(instances, added, printed, state, reason):
    instance = instances.get(added(state_command=("printf", "%s", printed)))
    assert (instance.state, instance.off_reason) == (state, reason)


def test_state_command_with_unknown_reason_is_refused(instances, added):
    instance_id = added(state_command=("printf", "%s", "stopped (on holiday)"))
    with pytest.raises(InstanceCommandFailed, match="printed the reason 'on holiday', none of: shut-down"):
        instances.get(instance_id)


def test_start_removes_recorded_reason(instances, added):
    instance_id = added(state="stopped", off_reason=OffReason.CRASHED)
    assert instances.get(instance_id).off_reason is OffReason.CRASHED
    instances.start(instance_id)
    assert instances.get(instance_id).off_reason is None


@pytest.mark.parametrize("word", ["", "crashed", "no state", "running\nrunning", "x" * 100_000])
def test_state_command_with_unknown_state_is_refused(instances, added, word):
    instance_id = added(state_command=python(f"print({word!r})"))
    with pytest.raises(InstanceCommandFailed, match=r"stateCommand of .* printed"):
        instances.state(instance_id)


def test_paused_machine_counts_as_running():
    assert all(STATE_NAMES[word] is InstanceState.RUNNING for word in ("paused", "pmsuspended", "idle"))


def test_list_repolls_recorded_state_if_state_command_fails(instances, added, caplog):
    instance_id = added(state_command=("false",))
    (found,) = instances.list()
    assert (found.instance_id, found.state) == (instance_id, InstanceState.RUNNING)
    assert "stateCommand" in caplog.text


FAILING = python("import sys; print('noise'); print('first', file=sys.stderr); sys.exit('domain is not running')")


def test_failure_has_status_and_last_line(instances, added):
    instance_id = added(state="stopped", start_command=FAILING)
    with pytest.raises(InstanceCommandFailed) as caught:
        instances.start(instance_id)
    assert str(caught.value) == f"the startCommand of {instance_id} ended with 1: domain is not running"
    assert (caught.value.command, caught.value.status) == ("startCommand", 1)


def test_failed_stop_command_keeps_instance_running(instances, added):
    instance_id = added(stop_command=FAILING)
    with pytest.raises(InstanceCommandFailed, match=r"stopCommand .* ended with 1: domain is not running"):
        instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_failure_of_slow_stop_command_is_raised_at_next_poll(instances, added):
    instance_id = added(stop_command=python("import time, sys; time.sleep(1); sys.exit('too late')"))
    instances.request_stop(instance_id)
    with pytest.raises(InstanceCommandFailed, match="too late"):
        eventually(lambda: instances.state(instance_id) is not InstanceState.STOPPING)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_request_stop_does_not_wait_for_machine(instances, added, tmp_path):
    gate = tmp_path / "gate"
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"
    instance_id = added(stop_command=python(code, gate))
    instances.request_stop(instance_id)
    instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPING
    gate.touch()
    assert eventually(lambda: instances.state(instance_id) is InstanceState.STOPPED)


def test_start_kills_running_stop_command(instances, added, tmp_path):
    pid = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    instance_id = added(stop_command=python(code, pid), start_command=("true",))
    instances.request_stop(instance_id)
    assert eventually(lambda: pid.exists() and pid.read_text())
    instances.start(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING
    assert not psutil.pid_exists(int(pid.read_text()))


def test_instance_left_stopping_by_dead_process_can_be_stopped(instances, added):
    instance_id = added(stop_command=("true",), state="stopping")
    assert instances.state(instance_id) is InstanceState.STOPPING
    instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.STOPPED


def test_command_is_killed_with_children_after_timeout(root, added, tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '60']);"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(60)"
    )
    instance_id = added(state="stopped", start_command=python(code, pids))
    with pytest.raises(InstanceCommandFailed, match="took more than 2 seconds and was killed"):
        DirectoryDriver(root, command_timeout=2.0).start(instance_id)
    assert eventually(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_start_does_not_wait_for_child_of_command(instances, added, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys; guest = subprocess.Popen(['sleep', '30']);open(sys.argv[1], 'w').write(str(guest.pid))"
    )
    instance_id = added(state="stopped", start_command=python(code, pid))
    instances.start(instance_id)
    guest = psutil.Process(int(pid.read_text()))
    assert guest.is_running()
    guest.kill()


def test_command_may_print_much(instances, added):
    noise = "import sys\nfor _ in range(200): print('x' * 10000); print('y' * 10000, file=sys.stderr)\nsys.exit(3)"
    instance_id = added(state="stopped", start_command=python(noise))
    with pytest.raises(InstanceCommandFailed, match="ended with 3") as caught:
        instances.start(instance_id)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("program", ["/nowhere/virsh", "no-such-program", os.devnull])
def test_program_that_cannot_be_run_is_named(instances, added, program):
    instance_id = added(stop_command=(program, "shutdown"))
    with pytest.raises(InstanceCommandFailed, match=f"stopCommand of {instance_id} cannot be run: {program}: "):
        instances.request_stop(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


@pytest.mark.parametrize("state", ["terminated", "shutting-down"])
def test_terminated_instance_is_neither_stopped_nor_started(instances, added, state):
    instance_id = added(state=state)
    for request in (instances.request_stop, instances.start):
        with pytest.raises(IncorrectInstanceState, match=f"is {state}"):
            request(instance_id)


@pytest.mark.parametrize("with_state_command", [False, True])
def test_terminate_shows_shutting_down_until_machine_is_off(instances, added, machine, tmp_path, with_state_command):
    gate = tmp_path / "gate"
    code = (
        "import os, subprocess, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "subprocess.run(sys.argv[2:], check=True)"
    )
    commands = {**machine.commands, "stop_command": python(code, gate, *machine.commands["stop_command"])}
    if not with_state_command:
        del commands["state_command"]
    instance_id = added(**commands)
    instances.terminate(instance_id)
    instances.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.SHUTTING_DOWN
    with pytest.raises(IncorrectInstanceState, match="is shutting-down"):
        instances.start(instance_id)
    gate.touch()
    assert eventually(lambda: instances.state(instance_id) is InstanceState.TERMINATED)
    machine.state.unlink()
    assert instances.state(instance_id) is InstanceState.TERMINATED


def test_terminate_with_failed_stop_command_keeps_instance_running(instances, added):
    instance_id = added(stop_command=FAILING)
    with pytest.raises(InstanceCommandFailed, match="domain is not running"):
        instances.terminate(instance_id)
    assert instances.state(instance_id) is InstanceState.RUNNING


def test_instance_with_only_state_command_can_neither_stop_nor_start(instances, added):
    running, stopped = added(state_command=("echo", "running")), added(state_command=("echo", "stopped"))
    for request in (instances.request_stop, instances.terminate):
        with pytest.raises(IncorrectInstanceState, match="has no stopCommand"):
            request(running)
    with pytest.raises(IncorrectInstanceState, match="has no startCommand"):
        instances.start(stopped)
    instances.start(running)
    instances.request_stop(stopped)


def test_start_waits_while_machine_shuts_down(instances, added, machine, tmp_path):
    machine.state.write_text("in shutdown")
    polls = tmp_path / "polls"
    code = (
        "import os, sys; state, polls = sys.argv[1:]; open(polls, 'a').write('x');"
        "os.path.getsize(polls) == 3 and open(state, 'w').write('shut off'); print(open(state).read())"
    )
    instance_id = added(**machine.commands | {"state_command": python(code, machine.state, polls)})
    instances.start(instance_id)
    assert machine.state.read_text().strip() == "running"
