"""Records the uploads of one task: its objects in the bucket, where sealing resumes, and the bundle that it replaces.

An object is claimed before it is sent (`claims.py`), so cleanup finds exactly what was sent. A part is recorded with
its digests, so no different part is sent with the same key. The stored parts are recorded together with the checkpoint
at the end of their unbroken run. The bundle's key is encrypted by the vault, and erased when the task ends
(`repository.py`). This module does not use the object store.
"""

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypedDict, cast

import sqlalchemy as sa

from thrave.bundle.model import BundleKey, Checkpoint, PartRecord, ResumePoint
from thrave.concurrency import random_hex
from thrave.database import bundle_part, bundle_task, now
from thrave.tasks import claims
from thrave.tasks.lease import HostLease
from thrave.tasks.store_calls import IN_FLIGHT
from thrave.vault import Vault

# Built once: building a query takes SQLAlchemy longer than running it takes SQLite.
_OBJECT = sa.and_(
    bundle_part.c.bucket == sa.bindparam("within"), bundle_part.c.key == sa.bindparam("named"),
    bundle_part.c.bundle_id == sa.bindparam("of"),
)  # fmt: skip
_SET_STORED = (
    bundle_part.update().where(_OBJECT).values(size=sa.bindparam("bytes"), etag=sa.bindparam("md5"), sender=None)
)
_SET_CHECKPOINT = (
    bundle_task.update()
    .where(bundle_task.c.bundle_id == sa.bindparam("of"))
    .values(checkpoint=sa.bindparam("point", type_=bundle_task.c.checkpoint.type))
)


class Documents(TypedDict):
    """Manifest and side file. They contain the key only as encrypted for the owner and for the service."""

    manifest: str
    side_file: str


@dataclass(frozen=True)
class EarlierBundle:
    """The bundle that a task found in its location, and that its own bundle replaces."""

    manifest: bytes
    """The object at the manifest's key; restored if the task fails."""
    keys: tuple[str, ...]
    """The keys of that bundle's other objects, which are deleted once the task's own manifest is stored."""
    is_replaced: bool = False
    """Whether the task's own manifest was verified in the bucket: from then on nothing is restored."""


class StoredObject(NamedTuple):
    """An object of the bundle that is in the bucket, or was in flight when it was recorded."""

    key: str
    size: int | None
    """Bytes; None while it is in flight."""
    etag: str | None = None
    """MD5 in hex, which `ObjectStore.put` has compared with the store's ETag; None if the store keeps none."""


class StoredDigest(NamedTuple):
    """The digests of a part that the store has accepted."""

    sha256: str
    """Of the part that was sent, in hex."""
    md5: str
    """Of the same bytes; `ObjectStore.put` has compared it with the store's ETag."""


class StoredBatch(NamedTuple):
    """Objects that were stored since the last record."""

    objects: Sequence[StoredObject] = ()
    checkpoint: Checkpoint | None = None
    """Where sealing can resume from now on; None if that has not changed."""


EMPTY_BATCH = StoredBatch()
"""Nothing was stored."""


class SentPart(NamedTuple):
    """A part that an earlier run has claimed, and perhaps sent."""

    record: PartRecord
    stored: bool
    """Whether it is recorded as stored."""


@dataclass(frozen=True)
class ResumeState:
    """Where an interrupted sealing resumes. With the same key it must produce the same parts."""

    bundle_key: BundleKey
    series: str = ""
    """Digits in the names of its parts; see `thrave.bundle.model.new_series`."""
    resume_point: ResumePoint | None = None
    """Where sealing resumes; None: at the start."""
    sent: Mapping[int, SentPart] = field(default_factory=dict)
    """The parts after that point that were claimed, by their indexes. They may be in the bucket, or arrive later."""

    @property
    def first_part(self) -> int:
        """The index of the first part that will be sealed."""
        return self.resume_point.checkpoint.parts if self.resume_point else 0


class UploadJournal:
    """The journal of one bundle task. An agent needs the right to write: see `HostLease.lock_task`."""

    def __init__(self, engine: sa.Engine, vault: Vault, bundle_id: str, lease: HostLease | None = None) -> None:
        """Open the journal of the task `bundle_id`; `vault` encrypts the bundle's key."""
        self._engine = engine
        self._vault = vault
        self._lease = lease
        self.bundle_id = bundle_id
        self._context = f"{bundle_id} secrets"
        self._sender = claims.THIS_PROCESS
        self._deletion = ""

    def start_sealing(self, bundle_key: BundleKey, series: str = "") -> None:
        """Record a new sealing: its key and IV, and the digits in the names of its parts. Nothing is stored yet."""
        encrypted = self._vault.encrypt(bundle_key.key + bundle_key.iv, context=self._context)
        with self._transaction() as connection:
            claims.renounce(connection, self.bundle_id)
            connection.execute(self._task().values(encrypted_bundle_key=encrypted, checkpoint=None, part_series=series))

    def is_only_task_at_location(self) -> bool:
        """Whether no other recorded task, of any account, has used this task's bucket and prefix."""
        other = bundle_task.alias()
        query = sa.select(sa.func.count()).select_from(
            bundle_task.join(
                other, sa.and_(other.c.bucket == bundle_task.c.bucket, other.c.prefix == bundle_task.c.prefix)
            )
        )
        with self._engine.connect() as connection:
            return connection.execute(query.where(bundle_task.c.bundle_id == self.bundle_id)).scalar_one() == 1

    def has_started(self) -> bool:
        """Whether a sealing of the task has started, so parts may have been sent."""
        query = sa.select(bundle_task.c.part_series).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one() is not None

    def resume_state(self) -> ResumeState | None:
        """Return where an earlier sealing of the task resumes; None if there is none."""
        query = sa.select(bundle_task.c.encrypted_bundle_key, bundle_task.c.part_series, bundle_task.c.checkpoint)
        rows = sa.select(bundle_part.c.part, bundle_part.c.size).where(self._sent, bundle_part.c.part.is_not(None))
        with self._engine.connect() as connection:
            encrypted, series, document = connection.execute(
                query.where(bundle_task.c.bundle_id == self.bundle_id)
            ).one()
            sent = [SentPart(PartRecord(**row.part), row.size is not None) for row in connection.execute(rows)]
        if encrypted is None:
            return None
        decrypted = self._vault.decrypt(encrypted, context=self._context)
        bundle_key = BundleKey(decrypted[:16], decrypted[16:])
        return _resume_state(bundle_key, series or "", document and Checkpoint.from_json(document), sent)

    def record_upload(self, key: str, part: PartRecord | None = None, stored: StoredBatch = EMPTY_BATCH) -> None:
        """Claim an object (a part, or another file) that is about to be sent, and record what was stored meanwhile.

        Raises:
            ObjectInUseError: The object is not free. Nothing was recorded.
        """
        with self._stored_transaction(stored) as connection:
            claims.claim(
                connection, self.bundle_id, key, sender=self._sender, busy=IN_FLIGHT.busy_keys(self._bucket), part=part
            )

    def check_free(self, key: str) -> None:
        """Check that an object could be claimed now. Raises ObjectInUseError."""
        bucket = self._bucket  # read before the transaction: a thread must not wait for a second connection
        with self._engine.connect() as connection:
            claims.check_free(connection, self.bundle_id, key, sender=self._sender, busy=IN_FLIGHT.busy_keys(bucket))

    def record_stored(self, stored: StoredBatch) -> None:
        """Record what was stored."""
        with self._stored_transaction(stored):
            pass

    def record_documents(self, documents: Documents) -> None:
        """Record manifest and side file: every part is stored."""
        with self._transaction() as connection:
            connection.execute(self._task().values(documents=documents))

    def documents(self) -> Documents | None:
        """Return manifest and side file; None until every part is stored."""
        query = sa.select(bundle_task.c.documents).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return cast("Documents | None", connection.execute(query).scalar_one())

    def stored_digests(self) -> dict[str, StoredDigest]:
        """Return the digests of the stored parts whose MD5 the driver has compared with the ETag, by their keys."""
        verified = sa.and_(self._sent, bundle_part.c.etag.is_not(None), bundle_part.c.part.is_not(None))
        query = sa.select(bundle_part.c.key, bundle_part.c.part, bundle_part.c.etag).where(verified)
        with self._engine.connect() as connection:
            rows = connection.execute(query)
            return {row.key: StoredDigest(row.part["sha256"], row.etag) for row in rows}

    def record_earlier(self, earlier: EarlierBundle | None) -> None:
        """Record the bundle that the task's own bundle replaces; None: there is none, or its cleanup has ended.

        Once it is replaced, its objects belong to this task, which deletes them.
        """
        document = None
        if earlier is not None:
            manifest = base64.b64encode(earlier.manifest).decode("ascii")
            document = {"manifest": manifest, "keys": [*earlier.keys], "isReplaced": earlier.is_replaced}
        bucket = self._bucket  # as in `check_free`
        with self._transaction() as connection:
            if earlier is not None and earlier.is_replaced:
                claims.claim_replaced(
                    connection, self.bundle_id, earlier.keys, sender=self._sender, busy=IN_FLIGHT.busy_keys(bucket)
                )
            connection.execute(self._task().values(earlier=document))

    def earlier(self) -> EarlierBundle | None:
        """Return the bundle that the task's own bundle replaces; None: there is none, or its cleanup has ended."""
        query = sa.select(bundle_task.c.earlier).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            document = connection.execute(query).scalar_one_or_none()
        if document is None:
            return None
        return EarlierBundle(base64.b64decode(document["manifest"]), tuple(document["keys"]), document["isReplaced"])

    def is_manifest_sent(self) -> bool:
        """Whether the task may have sent its manifest."""
        query = sa.select(bundle_task.c.manifest_sent).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return bool(connection.execute(query).scalar())

    def objects(self) -> list[StoredObject]:
        """Return every object that the task has stored, has started to send or has to delete, sorted by key."""
        return self._objects(bundle_part.c.state.in_(["sent", "unwanted"]))

    def orphaned_objects(self) -> list[StoredObject]:
        """Return every object that is to be deleted from the bucket, sorted by key."""
        return self._objects(bundle_part.c.state == "unwanted")

    def may_arrive_late(self, key: str) -> bool:
        """Whether a request for an object of the task may still reach the store, although nothing waits for it."""
        settling = bundle_part.c.settle_time > now()
        query = sa.select(bundle_part.c.key).where(self._mine, bundle_part.c.key == key, settling)
        with self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def start_deletion(self, unanswered: Collection[str] = (), *, everything: bool = True) -> Sequence[str]:
        """Claim the objects that are to be deleted, and return their keys.

        Args:
            unanswered: Keys for which a request of this process has no response.
            everything: Delete every object of the task; its sealing cannot be resumed then.
        """
        with self._transaction() as connection:
            if everything:
                claims.renounce(connection, self.bundle_id)
                connection.execute(self._task().values(encrypted_bundle_key=None, checkpoint=None))
            self._deletion = random_hex(8)
            return claims.claim_deletion(
                connection, self.bundle_id, sender=self._sender, deletion=self._deletion, unanswered=unanswered
            )

    def end_deletion(
        self, keys: Collection[str], *, unanswered: Collection[str] = (), busy: Collection[str] = ()
    ) -> None:
        """Record that a deletion has ended, and delete the records of these objects, which are not in the bucket.

        Args:
            keys: Of the objects.
            unanswered: Keys for which a request has no response. They stay recorded for a while, and are deleted once
                more.
            busy: Keys that requests of this process may still hit. They stay recorded.
        """
        with self._transaction() as connection:
            claims.end_deletion(
                connection,
                self.bundle_id,
                deletion=self._deletion,
                gone=keys,
                unanswered=unanswered,
                busy=busy,
            )

    def _objects(self, condition: sa.ColumnElement[bool]) -> list[StoredObject]:
        columns = bundle_part.c.key, bundle_part.c.size, bundle_part.c.etag
        query = sa.select(*columns).where(self._mine, condition).order_by(bundle_part.c.key)
        with self._engine.connect() as connection:
            return [StoredObject(*row) for row in connection.execute(query)]

    @cached_property
    def _bucket(self) -> str:
        query = sa.select(bundle_task.c.bucket).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            bucket: str = connection.execute(query).scalar_one()
        return bucket

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """A transaction that may write the task. Raises, or ends the process, as `HostLease.lock_task`."""
        with self._engine.begin() as connection:
            if self._lease is not None:
                self._lease.lock_task(connection, self.bundle_id)
            yield connection

    @contextmanager
    def _stored_transaction(self, stored: StoredBatch) -> Iterator[sa.Connection]:
        """A transaction as `_transaction`, which records what was stored.

        An earlier request to send one of these objects may have had no response, and may arrive later. This process
        keeps a list of such requests until the database has them: a task may fail before its results are recorded.
        """
        lost = IN_FLIGHT.unanswered_of(self._bucket, [each.key for each in stored.objects])
        with self._transaction() as connection:
            self._record_stored(connection, stored)
            claims.delay(connection, self.bundle_id, lost)
            yield connection
        IN_FLIGHT.clear_unanswered(self._bucket, lost)

    def _record_stored(self, connection: sa.Connection, stored: StoredBatch) -> None:
        if stored.objects:
            mine = {"of": self.bundle_id, "within": self._bucket}
            rows = [{**mine, "named": each.key, "bytes": each.size, "md5": each.etag} for each in stored.objects]
            connection.execute(_SET_STORED, rows)
        if stored.checkpoint is not None:
            connection.execute(_SET_CHECKPOINT, {"of": self.bundle_id, "point": stored.checkpoint.to_json()})

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        return bundle_part.c.bundle_id == self.bundle_id

    @property
    def _sent(self) -> sa.ColumnElement[bool]:
        return sa.and_(self._mine, bundle_part.c.state == "sent")

    def _task(self) -> sa.Update:
        return bundle_task.update().where(bundle_task.c.bundle_id == self.bundle_id)


def _resume_state(
    bundle_key: BundleKey, series: str, checkpoint: Checkpoint | None, sent: Sequence[SentPart]
) -> ResumeState:
    by_index = {part.record.index: part for part in sorted(sent, key=lambda part: part.record.index)}
    if checkpoint is None:
        return ResumeState(bundle_key, series, None, by_index)
    before = tuple(by_index.pop(index).record for index in range(checkpoint.parts))
    return ResumeState(bundle_key, series, ResumePoint(checkpoint, before), by_index)
