"""Every bucket driver with the accounts of Alice and Bob, for the contract tests."""

import uuid
from dataclasses import dataclass, field

from support.servers import stores
from thrave.buckets.base import ObjectStore
from thrave.buckets.directory_store import DirectoryStore
from thrave.buckets.s3_store import KeyOwner, OwnerKeyStore, ServiceKeyStore

ALICE, BOB = "111111111111", "222222222222"
_KEYS = {ALICE: stores.ALICE, BOB: stores.BOB}
_KEY_OWNERS = {key.access_key_id: KeyOwner(account, key) for account, key in _KEYS.items()}


@dataclass
class Driver:
    """A driver on its store; `name` is the name of a bucket that does not exist and that Alice may create."""

    buckets: ObjectStore
    acl: str = "ec2-bundle-read"
    """The ACL that the store accepts in upload policies."""
    creates_buckets: bool = False
    """Whether the store creates a missing bucket for an object."""
    name: str = field(default_factory=lambda: f"alice-{uuid.uuid4().hex[:12]}")

    def of(self, account):
        return self.buckets.on_behalf_of(_KEYS[account].access_key_id)


def directory(folder):
    return Driver(DirectoryStore(folder))


def owners(store):
    """`upload_credentials = policy`: the store knows the accounts' keys."""
    return Driver(
        OwnerKeyStore(store.connection(credentials=None), _KEY_OWNERS.get), store.acl, store.name == "seaweedfs"
    )


def service(store):
    """`upload_credentials = service`: the store knows the service's key."""
    return Driver(ServiceKeyStore(store.connection()), store.acl, store.name == "seaweedfs")
