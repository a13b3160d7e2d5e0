"""A task whose workflow is missing in the task queue: the service enqueues it again and completes it."""

import base64
import json
from datetime import UTC, datetime
from hashlib import sha256

import pytest
import sqlalchemy as sa

from support.bundles.open_check import opened_sha256
from support.disks.raw_disk import make_disk
from thrave.buckets.directory_store import DirectoryStore
from thrave.compute.instance import InstanceState
from thrave.concurrency import utc_now
from thrave.config import DataDirectory
from thrave.database import migrate, open_engine
from thrave.identity.accounts import AccessKey
from thrave.testing import ThraveServer, upload_policy
from thrave.vault import Vault

ACCOUNT = "123456789012"
KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
BUNDLE = "bun-0123456789abcdef0"


def insert(connection, table, **row):
    names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})"), row)


def write_task(data, instance_id, state):
    """Write a database with an unfinished task and without the tables of the engine."""
    vault = Vault.open_or_create(data.vault_key)
    now = datetime.now(UTC).isoformat(" ")[:26]
    policy, signature = upload_policy(SECRET, "bucket", "winami")
    grant = json.dumps([base64.b64encode(policy).decode(), signature]).encode()
    engine = open_engine(data.database)
    migrate(engine)
    with engine.begin() as connection:
        insert(connection, "account", account_id=ACCOUNT, name="alice", create_date=now)
        sealed = vault.encrypt(SECRET.encode(), context=f"access key {KEY} of account {ACCOUNT}")
        insert(connection, "access_key", access_key_id=KEY, account_id=ACCOUNT, encrypted_secret=sealed,
               status="Active", create_date=now)  # fmt: skip
        insert(connection, "bundle_task", bundle_id=BUNDLE, account_id=ACCOUNT, owner_id=ACCOUNT,
               instance_id=instance_id, host="localhost", state=state, start_time=now, update_time=now,
               bucket="bucket", prefix="winami", access_key_id=KEY, run_after_task=None if state == "pending" else True,
               next_step="stop" if state == "pending" else "seal", runs=0, manifest_sent=False,
               encrypted_policy=vault.encrypt(grant, context=BUNDLE))  # fmt: skip
        if state != "pending":
            insert(connection, "instance_power", instance_id=instance_id, wanted="running", version=1, asked=False,
                   borrowed_by=BUNDLE)  # fmt: skip
    engine.dispose()


@pytest.mark.parametrize(("state", "was"), [("pending", "running"), ("bundling", "stopped"), ("bundling", "running")])
def test_requeue_lost_completes_task_without_workflow(tmp_path, state, was):
    server = ThraveServer(DataDirectory(tmp_path / "thrave"))
    server.data.root.mkdir(mode=0o700)
    disk = make_disk(tmp_path / "root.raw", 3 << 20)
    instance = server.instance(ACCOUNT, disk, state=InstanceState(was))
    DirectoryStore(server.data.buckets).create("bucket", ACCOUNT)
    write_task(server.data, instance.instance_id, state)
    server.start()
    try:
        key = AccessKey(
            access_key_id=KEY, secret_access_key=SECRET, account_id=ACCOUNT, status="Active", create_date=utc_now()
        )
        ec2 = server.client(key)
        waiter = ec2.get_waiter("bundle_task_complete")
        waiter.wait(BundleIds=[BUNDLE], WaiterConfig={"Delay": 1, "MaxAttempts": 100})
    finally:
        server.stop()
    assert opened_sha256(server, "bucket", "winami", tmp_path / "opened.raw") == sha256(disk.read_bytes()).hexdigest()
    assert server.instances.state(instance.instance_id) is InstanceState.RUNNING
