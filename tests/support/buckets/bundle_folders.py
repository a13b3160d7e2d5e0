"""Folders with bundles, on disk and in stores, without the commands under test."""

import uuid
from pathlib import Path

from support.servers.stores import ALICE, Store
from thrave.buckets.s3_objects import S3ObjectClient
from thrave.buckets.s3_store import KeyOwner, OwnerKeyStore

ACCOUNT = "111111111111"


class DiskPlace:
    """A folder on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = str(path)

    def put(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.path.iterdir()} if self.path.exists() else {}


class BucketPlace:
    """A folder in a new bucket of Alice's."""

    def __init__(self, store: Store) -> None:
        self._objects = S3ObjectClient(store.connection(ALICE))
        self._bucket = f"alice-{uuid.uuid4().hex[:12]}"
        self.address = f"s3://{self._bucket}/2026/nightly"
        owner = OwnerKeyStore(store.connection(None), lambda _: KeyOwner(ACCOUNT, ALICE))
        owner.on_behalf_of(ALICE.access_key_id).create(self._bucket, ACCOUNT)

    def put(self, name: str, data: bytes) -> None:
        self._objects.put(self._bucket, self._key(name), data)

    def remove(self, name: str) -> None:
        self._objects.delete(self._bucket, [self._key(name)])

    def files(self) -> dict[str, bytes]:
        keys = self._objects.list(self._bucket, self._key(""))
        return {key.removeprefix(self._key("")): self._objects.get(self._bucket, key) for key in keys}

    @staticmethod
    def _key(name: str) -> str:
        return f"2026/nightly/{name}"
