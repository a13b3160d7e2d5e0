"""A task that was under way when an earlier release was stopped: this one, on the same data, brings it to its end."""

import base64
import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

import thrave.database
from support.bundles.open_check import opened_sha256
from support.disks.raw_disk import make_disk
from thrave.buckets.directory import DirectoryBuckets
from thrave.compute.instance import InstanceState
from thrave.config import DataDirectory
from thrave.database import open_engine, utc_now
from thrave.identity.keys import AccessKey
from thrave.testing import ThraveServer, upload_policy
from thrave.vault import Vault

MIGRATIONS = Path(thrave.database.__file__).parent / "migrations"
BEFORE_THE_FLEET = "0002"
ACCOUNT = "123456789012"
KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
BUNDLE = "bun-0123456789abcdef0"


def insert(connection, table, **row):
    names, places = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})"), row)


def write_data_of_before(data, instance_id, state):
    """A database as the release before had it, with a task under way; the engine has forgotten about it."""
    vault = Vault.open_or_create(data.vault_key)
    now = datetime.now(UTC).isoformat(" ")[:26]
    policy, signature = upload_policy(SECRET, "bucket", "winami")
    grant = json.dumps([base64.b64encode(policy).decode(), signature]).encode()
    engine = open_engine(data.database)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, BEFORE_THE_FLEET)
        insert(connection, "account", account_id=ACCOUNT, name="alice", create_date=now)
        sealed = vault.seal(SECRET.encode(), context=f"access key {KEY} of account {ACCOUNT}")
        insert(connection, "access_key", access_key_id=KEY, account_id=ACCOUNT, sealed_secret=sealed, status="Active",
               create_date=now)  # fmt: skip
        insert(connection, "bundle_task", bundle_id=BUNDLE, account_id=ACCOUNT, owner_id=ACCOUNT,
               instance_id=instance_id, host="localhost", state=state, start_time=now, update_time=now,
               bucket="bucket", prefix="winami", access_key_id=KEY, was_running=None if state == "pending" else True,
               sealed_grant=vault.seal(grant, context=BUNDLE))  # fmt: skip
    engine.dispose()


@pytest.mark.parametrize(("state", "was"), [("pending", "running"), ("bundling", "stopped"), ("storing", "running")])
def test_a_task_that_an_earlier_release_has_left_is_brought_to_its_end(tmp_path, state, was):
    server = ThraveServer(DataDirectory(tmp_path / "thrave"))
    server.data.root.mkdir(mode=0o700)
    disk = make_disk(tmp_path / "root.raw", 3 << 20)
    instance = server.instance(ACCOUNT, disk, state=InstanceState(was))
    DirectoryBuckets(server.data.buckets).create("bucket", ACCOUNT)
    write_data_of_before(server.data, instance.instance_id, state)
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
