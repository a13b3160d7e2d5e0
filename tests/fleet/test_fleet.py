"""API processes and agents on one PostgreSQL: a task runs where the disk is, and resumes on the host that adopts it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import sqlalchemy as sa

from support.disks.raw_disk import make_disk
from support.eventually import eventually, one_of
from support.service.bundle_tasks import await_task, describe_task
from thrave.compute.instance import InstanceState
from thrave.concurrency import utc_now
from thrave.tasks.hosts import HostState
from thrave.tasks.lease import EXIT_LEASE_LOST

pytestmark = pytest.mark.postgres
MIB = 1 << 20


def add_instance(fleet, account, ec2, root, size=MIB, **details):
    """Add an instance to the folder of the agents, and wait until an agent has reported it."""
    instance = fleet.first.instance(account.account_id, make_disk(root, size), **details)
    eventually(lambda: instance.instance_id in instance_ids(ec2))
    return instance.instance_id


def instance_ids(ec2):
    reservations = ec2.describe_instances()["Reservations"]
    return [instance["InstanceId"] for reservation in reservations for instance in reservation["Instances"]]


def state_of(ec2, instance_id):
    (reservation,) = ec2.describe_instances(InstanceIds=[instance_id])["Reservations"]
    return reservation["Instances"][0]["State"]["Name"]


def await_state(ec2, instance_id, state):
    eventually(lambda: state_of(ec2, instance_id), f"{instance_id} is {state}", until=one_of(state))


def await_progress(ec2, bundle_id):
    """Wait until a part of the volume has been read."""
    eventually(lambda: describe_task(ec2, bundle_id).get("Progress"), until=lambda share: share not in {None, "0%"})


def bundle(fleet, key, ec2, instance_id, prefix="winami"):
    storage = fleet.first.storage(key, "alices-bucket", prefix)
    return ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]["BundleId"]


def ended_after_loss_of_lease(agent):
    """Return whether it ended because another process has its lease. Coverage may crash when it handles os._exit."""
    return agent.wait(timeout=60) in {EXIT_LEASE_LOST, -signal.SIGSEGV}


def test_task_created_by_one_api_process_is_shown_by_another(fleet, alice, tmp_path):
    account, key = alice
    fleet.agent("host-a")
    other = fleet.api("api-2").client(key)
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw")
    task = await_task(other, bundle(fleet, key, ec2, instance_id))
    assert task["State"] == "complete", task
    assert (fleet.first.data.buckets / "alices-bucket" / "winami.manifest.xml").exists()


def test_api_responds_without_agents(fleet, alice, tmp_path):
    account, key = alice
    agent = fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw")
    agent.kill()
    agent.wait()
    bundle_id = bundle(fleet, key, ec2, instance_id)
    assert describe_task(ec2, bundle_id)["State"] == "pending"
    ec2.cancel_bundle_task(BundleId=bundle_id)
    assert describe_task(ec2, bundle_id)["BundleTaskError"]["Code"] == "Client.Cancelled"


def readiness(url):
    """Return the status of `/readyz`, and the components that cannot be used."""
    try:
        with urllib.request.urlopen(f"{url}/readyz") as response:
            return response.status, []
    except urllib.error.HTTPError as error:
        with error:
            components = json.load(error)["components"]
            return error.code, [name for name, health in components.items() if health["state"] != "ok"]


def test_agent_and_api_process_report_components_that_they_cannot_use(fleet):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as store:
        port, closed = listener.getsockname()[1], store.getsockname()[1]
    key = {"s3_access_key_id": "AKIA", "s3_secret_access_key": "secret", "upload_credentials": "service"}
    fleet.agent("host-a", monitoring_port=port, store="s3", s3_endpoint=f"http://127.0.0.1:{closed}", **key)
    eventually(lambda: readiness(f"http://127.0.0.1:{port}"), until=one_of((503, ["store"])))
    eventually(lambda: readiness(fleet.first.url), until=one_of((200, [])))


def test_power_requests_are_carried_out_by_host(fleet, alice, tmp_path):
    account, key = alice
    fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw")
    (change,) = ec2.stop_instances(InstanceIds=[instance_id])["StoppingInstances"]
    assert change["CurrentState"]["Name"] == "stopping"
    await_state(ec2, instance_id, "stopped")
    ec2.start_instances(InstanceIds=[instance_id])
    await_state(ec2, instance_id, "running")
    ec2.terminate_instances(InstanceIds=[instance_id])
    await_state(ec2, instance_id, "terminated")


def test_second_agent_of_host_ends_first(fleet):
    first = fleet.agent("host-a")
    second = fleet.agent("host-a")
    assert ended_after_loss_of_lease(first)
    assert second.poll() is None


@pytest.mark.parametrize(
    ("missing", "other", "message"),
    [
        ("vault.key", None, "vault.key is missing"),
        ("vault.key", b"another key, which has 32 bytes.", "is not the key"),
        ("service", None, "identity in"),
        ("service/side-key.pem", None, "identity in"),
    ],
)
def test_process_without_key_or_identity_of_fleet_is_refused(fleet, missing, other, message):
    unrelated = fleet.data("unrelated")
    path = unrelated.root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if other is not None:
        path.write_bytes(other)
        path.chmod(0o600)
    before = sorted(unrelated.root.rglob("*"))
    refusal = fleet.thrave("agent", "--host-id", "host-b", data=unrelated.root)
    assert (refusal.returncode, message in refusal.stderr) == (1, True), refusal.stderr
    assert sorted(unrelated.root.rglob("*")) == before
    hosts = json.loads(fleet.thrave("host", "list", "--output", "json").stdout)["hosts"]
    assert "host-b" not in {host["host"] for host in hosts}


def test_command_uses_database_of_settings_file(fleet, tmp_path):
    fleet.agent("host-a")
    file = tmp_path / "fleet.toml"
    file.write_text(f"database_url = {json.dumps(fleet.settings['database_url'])}\n")
    command = [sys.executable, "-m", "thrave", "host", "list", "--config", file, "--data-dir", fleet.first.data.root]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "host-a" in listed.stdout


def test_agent_without_host_id_is_refused(tmp_path):
    command = [sys.executable, "-m", "thrave", "agent", "--data-dir", tmp_path / "data"]
    environment = {**os.environ, "THRAVE_DATABASE_URL": "postgresql://thrave@127.0.0.1:1/thrave"}
    refusal = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (refusal.returncode, "--host-id ID" in refusal.stderr) == (2, True)


@pytest.mark.parametrize("command", ["api", "agent"])
def test_process_without_database_url_is_refused(tmp_path, command):
    command = [sys.executable, "-m", "thrave", command, "--data-dir", tmp_path / "data"]
    refusal = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (refusal.returncode, "database_url" in refusal.stderr) == (2, True)
    assert not (tmp_path / "data").exists()


def test_task_of_lost_host_resumes_on_adopting_host(fleet, alice, tmp_path):
    account, key = alice
    lost = fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw", 300 * MIB)
    fleet.agent("host-b")
    bundle_id = bundle(fleet, key, ec2, instance_id)
    await_progress(ec2, bundle_id)
    lost.send_signal(signal.SIGSTOP)
    fleet.adopt("host-a", by="host-b")
    lost.send_signal(signal.SIGCONT)
    assert ended_after_loss_of_lease(lost)
    task = await_task(ec2, bundle_id)
    assert task["State"] == "complete", task
    await_state(ec2, instance_id, "running")


def test_drained_host_finishes_started_tasks_only(fleet, alice, tmp_path):
    account, key = alice
    agent = fleet.agent("host-a", worker_concurrency=1)
    ec2 = fleet.first.client(key)
    started = add_instance(fleet, account, ec2, tmp_path / "started.raw", 200 * MIB)
    waiting = add_instance(fleet, account, ec2, tmp_path / "waiting.raw")
    first = bundle(fleet, key, ec2, started)
    await_task(ec2, first, "bundling")
    second = bundle(fleet, key, ec2, waiting, "waiting")
    with fleet.components() as components:
        components.hosts.drain("host-a")
        for _ in range(2):  # its heartbeats continue, or the host would count as lost
            now = utc_now()
            eventually(lambda now=now: components.hosts.list()[0].heartbeat_time > now)
        assert agent.wait(timeout=60) == 0
        assert [host.state for host in components.hosts.list()] == [HostState.DRAINED]
        assert describe_task(ec2, first)["State"] == "complete"
        assert fleet.agent("host-a").wait(timeout=60) == 0  # an upgrade in the meantime does not end the drain
        assert [host.state for host in components.hosts.list()] == [HostState.DRAINED]
        assert describe_task(ec2, second)["State"] == "pending"
        components.hosts.activate("host-a")
    fleet.agent("host-a")
    assert await_task(ec2, second)["State"] == "complete"


def test_tasks_of_retired_host_fail_with_code(fleet, alice, tmp_path):
    account, key = alice
    agent = fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw")
    agent.kill()
    agent.wait()
    bundle_id = bundle(fleet, key, ec2, instance_id)
    with fleet.components() as components:
        assert components.hosts.retire("host-a", powered_off=True) == [bundle_id]
    assert describe_task(ec2, bundle_id)["BundleTaskError"]["Code"] == "Server.HostLost"
    assert instance_ids(ec2) == []


def test_task_survives_restart_of_database(fleet, postgres, alice, tmp_path):
    account, key = alice
    fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw", 300 * MIB)
    bundle_id = bundle(fleet, key, ec2, instance_id)
    await_progress(ec2, bundle_id)
    postgres.kill()
    time.sleep(2)
    postgres.start()
    task = await_task(ec2, bundle_id)
    assert task["State"] == "complete", task
    await_state(ec2, instance_id, "running")


def test_task_of_earlier_version_is_finished(fleet, alice, tmp_path):
    account, key = alice
    agent = fleet.agent("host-a")
    ec2 = fleet.first.client(key)
    instance_id = add_instance(fleet, account, ec2, tmp_path / "root.raw", 200 * MIB)
    bundle_id = bundle(fleet, key, ec2, instance_id)
    await_progress(ec2, bundle_id)
    agent.kill()
    agent.wait()
    with fleet.components() as components, components.database.begin() as connection:
        connection.execute(sa.text("UPDATE dbos.workflow_status SET application_version = 'bundle-1'"))
    fleet.agent("host-a")
    task = await_task(ec2, bundle_id)
    assert task["State"] == "complete", task
    assert fleet.first.instances.state(instance_id) is InstanceState.RUNNING
