"""Seals a volume into a bucket without a service: real records, real sealer, and a store whose calls a test can block.

As a program (`python -m support.service.upload_bench FOLDER DISK HELD…`) it seals a disk and blocks the upload of the
parts with these numbers until it is killed. As many parts are uploaded in parallel as numbers are given.
"""

import base64
import random
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from support.buckets.upload_policies import ACCESS_KEY_ID, SECRET
from support.bundles.sample_bundles import SIDE_KEY, manifest_of, private_key
from thrave.buckets.directory_store import DirectoryStore
from thrave.buckets.upload_policy import UploadPolicy
from thrave.bundle.base import DirectoryParts
from thrave.bundle.model import PART_SIZE, manifest_filename
from thrave.bundle.opener import open_bundle
from thrave.bundle.side_file import write_side_file
from thrave.config import DataDirectory
from thrave.database import migrate, open_engine
from thrave.tasks.models import BundleRequest, BundleTaskState
from thrave.tasks.monitor import TaskMonitor
from thrave.tasks.repository import TaskRepository
from thrave.tasks.task_objects import TaskObjects
from thrave.tasks.uploads import upload_volume
from thrave.testing import upload_policy
from thrave.vault import Vault
from thrave.volumes.raw import RawVolume

OWNER = "111111111111"
BUCKET = "alice-bucket"
PREFIX = "winami"
BUNDLE_ID = "bun-00000001"


def noise_disk(path, parts, seed=1):
    """Create a disk of `parts` parts. Its noise repeats at a distance greater than deflate's window."""
    noise = random.Random(seed).randbytes(1 << 16)
    with path.open("wb") as disk:
        for number in range(parts * PART_SIZE // len(noise) - 8):
            disk.write(number.to_bytes(8, "little") + noise[8:])
    return path


class BlockingStore:
    """A store whose calls a test can block. It records the keys of started and ended uploads."""

    def __init__(self, buckets):
        self._buckets = buckets
        self.started, self.ended = [], []
        self.most_at_once = 0
        self._lock = threading.Condition()
        self._blocked = {}
        self.before = lambda _what, _key: None

    def __getattr__(self, name):
        return getattr(self._buckets, name)

    def on_behalf_of(self, _access_key_id):
        return self

    def block(self, what, *endings):
        """Block the calls of one method (`put`, `head`, `delete`): for keys with these endings, or for all keys."""
        self._blocked[what] = endings or ("",)

    def release_all(self):
        with self._lock:
            self._blocked.clear()
            self._lock.notify_all()

    def wait_for(self, condition):
        with self._lock:
            assert self._lock.wait_for(condition, 60)

    def put(self, bucket, key, data, *, policy=None):
        with self._lock:
            self.started.append(key)
            self.most_at_once = max(self.most_at_once, len(self.started) - len(self.ended))
        try:
            self._pass("put", key)
            return self._buckets.put(bucket, key, data, policy=policy)
        finally:
            with self._lock:
                self.ended.append(key)
                self._lock.notify_all()

    def head(self, bucket, key):
        self._pass("head", key)
        return self._buckets.head(bucket, key)

    def delete(self, bucket, keys):
        self._pass("delete", "")
        self._buckets.delete(bucket, keys)

    def _pass(self, what, key):
        self.before(what, key)
        with self._lock:
            self._lock.notify_all()
            self._lock.wait_for(lambda: not key.endswith(self._blocked.get(what, ("\0",))))


class UploadBench:
    """A task in the state `bundling`, with its own database and bucket."""

    def __init__(self, folder, buckets, *, database_url=None, bundle_id=BUNDLE_ID):
        self.engine = open_engine(database_url or DataDirectory(folder).database)
        migrate(self.engine)
        self.records = TaskRepository(self.engine, Vault.open_or_create(folder / "vault.key"))
        self.bundle_id = bundle_id
        self.buckets = buckets
        if self.records.get(bundle_id) is None:
            self._add()
        self.journal = self.records.journal(bundle_id)

    def store(self, *, at_once=4, stall_timeout=60.0, retry_timeout=0.0, existing="refuse", **options):
        policy = UploadPolicy.parse_trusted(*self.records.stored_policy(self.bundle_id), ACCESS_KEY_ID)
        task = self.records.get(self.bundle_id)
        return TaskObjects(
            self.buckets,
            self.journal,
            task,
            policy,
            upload_concurrency=at_once,
            retry_timeout=retry_timeout,
            stall_timeout=stall_timeout,
            existing_bundle=existing,
            **options,
        )

    @contextmanager
    def monitor(self, stall_timeout=60.0):
        with TaskMonitor(self.records, self.bundle_id, stall_timeout=stall_timeout) as monitor:
            yield monitor

    def seal(self, volume, *, store=None, stall_timeout=60.0, **options):
        store = store or self.store(stall_timeout=stall_timeout, **options)
        with self.monitor(stall_timeout) as monitor:
            return upload_volume(volume, store, self.journal, monitor, compression="fast")

    def documents(self, sealed):
        """Record manifest and side file of a sealed bundle, as the workflow does, and return them."""
        manifest = manifest_of(sealed)
        side_file = write_side_file(sealed, manifest, side_key=SIDE_KEY, signing_key=private_key("user"))
        documents = {"manifest": manifest.decode(), "side_file": side_file.decode()}
        self.journal.record_documents(documents)
        return documents

    def finish(self, sealed, **options):
        """Verify the parts, and upload side file and manifest."""
        documents, store = self.documents(sealed), self.store(**options)
        self.records.change_state(self.bundle_id, BundleTaskState.STORING)
        with self.monitor() as monitor:
            store.verify_stored(documents, monitor)
            store.put_side_file(documents, monitor)
            store.put_manifest(documents, monitor, lambda: self.records.record_manifest_sent(self.bundle_id))

    def events(self):
        return [event.message for event in self.records.history(self.bundle_id) if event.message]

    def stored_keys(self):
        return sorted(self.buckets.list(BUCKET, ""))

    def close(self):
        self.engine.dispose()

    def _add(self):
        policy, signature = upload_policy(SECRET, BUCKET, PREFIX)
        request = BundleRequest(
            account_id=OWNER, owner_id=OWNER, instance_id=self.bundle_id, bucket=BUCKET, prefix=PREFIX,
            access_key_id=ACCESS_KEY_ID, upload_policy=base64.b64encode(policy).decode(),
            upload_policy_signature=signature,
        )  # fmt: skip
        with self.engine.begin() as connection:
            self.records.add(connection, self.bundle_id, "localhost", request)
        for state in (BundleTaskState.WAITING_FOR_SHUTDOWN, BundleTaskState.BUNDLING):
            assert self.records.change_state(self.bundle_id, state)


def directory(folder):
    buckets = DirectoryStore(folder / "buckets")
    buckets.create(BUCKET, OWNER)
    return BlockingStore(buckets)


def opened(folder, sealed, private_key):
    """Open a bundle of the directory store, and return the content of the image."""
    output = folder / "opened.raw"
    open_bundle(manifest_of(sealed), DirectoryParts(folder / "buckets" / BUCKET), private_key, output)
    return output.read_bytes()


def part(number):
    """Return the ending of a part's key."""
    return f".part.{number:02}"


MANIFEST = manifest_filename(PREFIX)


def main(folder, disk, *held):
    buckets = directory(Path(folder))
    buckets.block("put", *(part(int(number)) for number in held))
    UploadBench(Path(folder), buckets).seal(RawVolume(Path(disk)), at_once=len(held))


if __name__ == "__main__":
    main(*sys.argv[1:])
