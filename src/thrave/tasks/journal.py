"""What a task has in the bucket, what it replaces there, and where its sealing goes on after a crash.

An object is claimed before it is sent (`claims.py`), so that cleanup finds exactly what was sent. A part is recorded
with its digests, so that it is never sent again as another; what is stored, together with the checkpoint at the end of
its unbroken run, so that nothing that is stored is ever sent again. The bundle's key is kept only as the vault sealed
it, and erased with the end of the task (`records.py`). Nothing here touches a bucket.
"""

import base64
import secrets as random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypedDict, cast

import sqlalchemy as sa

from thrave.bundle.model import BundleKey, Checkpoint, PartRecord, ResumePoint
from thrave.database import bundle_part, bundle_task
from thrave.tasks import claims
from thrave.tasks.lease import Fence
from thrave.tasks.store_calls import IN_FLIGHT
from thrave.vault import Vault

# Queries of every part are written once: SQLAlchemy takes longer to put one together than SQLite to answer it.
_OBJECT = sa.and_(
    bundle_part.c.bucket == sa.bindparam("within"), bundle_part.c.key == sa.bindparam("named"),
    bundle_part.c.bundle_id == sa.bindparam("of"),
)  # fmt: skip
_IS_STORED = bundle_part.update().where(_OBJECT).values(size=sa.bindparam("bytes"), etag=sa.bindparam("md5"), run=None)
_GOES_ON_AT = (
    bundle_task.update()
    .where(bundle_task.c.bundle_id == sa.bindparam("of"))
    .values(checkpoint=sa.bindparam("point", type_=bundle_task.c.checkpoint.type))
)


class Documents(TypedDict):
    """The two files that make parts a bundle. They hold the key only as encrypted to the owner and to the service."""

    manifest: str
    side_file: str


@dataclass(frozen=True)
class EarlierBundle:
    """What a task found in its place: the bundle that its own one replaces."""

    manifest: bytes
    """What was at the manifest's key, to be put back if the task fails."""
    keys: tuple[str, ...]
    """The other objects of that bundle, to be removed once the task's own manifest is stored."""
    is_replaced: bool = False
    """Whether the task's own manifest was proved to be stored: from then on nothing is put back."""


class StoredObject(NamedTuple):
    """An object of the bundle that is in the bucket, or was on its way there when it was written down."""

    key: str
    size: int | None
    """Bytes; None while it is in flight."""
    etag: str | None = None
    """MD5 in hex, as the store proved to have it; None where it keeps none."""


class StoredDigest(NamedTuple):
    """What the store proved to have when it took an object."""

    sha256: str
    """Of the part that was sent, in hex."""
    md5: str
    """Of the same bytes; the store's ETag was equal to it."""


class StoredBatch(NamedTuple):
    """What the bucket has taken since it was last asked."""

    objects: Sequence[StoredObject] = ()
    checkpoint: Checkpoint | None = None
    """Where sealing can go on from now on; None if that has not changed."""


EMPTY_BATCH = StoredBatch()
"""Nothing was taken."""


class SentPart(NamedTuple):
    """A part that was sent before."""

    record: PartRecord
    stored: bool
    """Whether the bucket has taken it."""


@dataclass(frozen=True)
class ResumeState:
    """What a sealing that was cut off has left. With the same key the same parts must come out."""

    bundle_key: BundleKey
    series: str = ""
    """Digits in the names of its parts; see `thrave.bundle.model.new_series`."""
    resume_point: ResumePoint | None = None
    """Where it goes on; None: at its beginning."""
    sent: Mapping[int, SentPart] = field(default_factory=dict)
    """What was sent beyond that, by the parts' indexes."""

    @property
    def first_part(self) -> int:
        """The index of the first part that will come out."""
        return self.resume_point.checkpoint.parts if self.resume_point else 0


class UploadJournal:
    """The journal of one bundle task. An agent writes it only while it may: see `Fence.claim`."""

    def __init__(self, engine: sa.Engine, vault: Vault, bundle_id: str, fence: Fence | None = None) -> None:
        """Keep the journal of the task `bundle_id`; `vault` keeps its key unreadable in the database."""
        self._engine = engine
        self._vault = vault
        self._fence = fence
        self.bundle_id = bundle_id
        self._context = f"{bundle_id} secrets"
        self._run = claims.THIS_PROCESS
        self._deletion = ""

    def start_sealing(self, secrets: BundleKey, series: str = "") -> None:
        """Begin a sealing with this key and IV, and these digits in the names of its parts; nothing is stored yet."""
        sealed = self._vault.seal(secrets.key + secrets.iv, context=self._context)
        with self._transaction() as connection:
            claims.renounce(connection, self.bundle_id)
            connection.execute(self._task().values(encrypted_bundle_key=sealed, checkpoint=None, part_series=series))

    def is_only_task_at_location(self) -> bool:
        """Whether no other task that is known, of any account, has had this task's bucket and prefix."""
        other = bundle_task.alias()
        query = sa.select(sa.func.count()).select_from(
            bundle_task.join(
                other, sa.and_(other.c.bucket == bundle_task.c.bucket, other.c.prefix == bundle_task.c.prefix)
            )
        )
        with self._engine.connect() as connection:
            return connection.execute(query.where(bundle_task.c.bundle_id == self.bundle_id)).scalar_one() == 1

    def has_started(self) -> bool:
        """Whether a sealing of the task has begun: it may have sent parts."""
        query = sa.select(bundle_task.c.part_series).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one() is not None

    def resume_state(self) -> ResumeState | None:
        """What a sealing that was begun before has left; None if none was."""
        query = sa.select(bundle_task.c.encrypted_bundle_key, bundle_task.c.part_series, bundle_task.c.checkpoint)
        rows = sa.select(bundle_part.c.part, bundle_part.c.size).where(self._sent, bundle_part.c.part.is_not(None))
        with self._engine.connect() as connection:
            sealed, series, document = connection.execute(query.where(bundle_task.c.bundle_id == self.bundle_id)).one()
            sent = [SentPart(PartRecord(**row.part), row.size is not None) for row in connection.execute(rows)]
        if sealed is None:
            return None
        opened = self._vault.unseal(sealed, context=self._context)
        secrets = BundleKey(opened[:16], opened[16:])
        return _left(secrets, series or "", document and Checkpoint.from_json(document), sent)

    def record_upload(self, key: str, part: PartRecord | None = None, stored: StoredBatch = EMPTY_BATCH) -> None:
        """Claim an object, perhaps a part, that is about to be sent, and record what has been stored meanwhile.

        Raises:
            ObjectInUseError: It is not free. Nothing was recorded.
        """
        with self._stored_transaction(stored) as connection:
            claims.claim(
                connection, self.bundle_id, key, run=self._run, busy=IN_FLIGHT.busy_keys(self._bucket), part=part
            )

    def check_free(self, key: str) -> None:
        """Check that an object could be claimed now. Raises ObjectInUseError."""
        with self._engine.connect() as connection:
            claims.check_free(connection, self.bundle_id, key, run=self._run, busy=IN_FLIGHT.busy_keys(self._bucket))

    def record_stored(self, stored: StoredBatch) -> None:
        """Write down what the bucket has taken."""
        with self._stored_transaction(stored):
            pass

    def record_documents(self, documents: Documents) -> None:
        """Write down that every part is stored: only the two files that make them a bundle are wanting."""
        with self._transaction() as connection:
            connection.execute(self._task().values(documents=documents))

    def documents(self) -> Documents | None:
        """The two files, if every part is stored."""
        query = sa.select(bundle_task.c.documents).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return cast("Documents | None", connection.execute(query).scalar_one())

    def stored_digests(self) -> dict[str, StoredDigest]:
        """The parts whose MD5 the store proved when it took them, by their keys."""
        proved = sa.and_(self._sent, bundle_part.c.etag.is_not(None), bundle_part.c.part.is_not(None))
        query = sa.select(bundle_part.c.key, bundle_part.c.part, bundle_part.c.etag).where(proved)
        with self._engine.connect() as connection:
            rows = connection.execute(query)
            return {row.key: StoredDigest(row.part["sha256"], row.etag) for row in rows}

    def record_earlier(self, earlier: EarlierBundle | None) -> None:
        """Record the bundle that the task's own one replaces; None: there is none, or nothing is to be done about it.

        Once it is replaced its objects are the task's, to be deleted.
        """
        document = None
        if earlier is not None:
            manifest = base64.b64encode(earlier.manifest).decode("ascii")
            document = {"manifest": manifest, "keys": [*earlier.keys], "isReplaced": earlier.is_replaced}
        with self._transaction() as connection:
            if earlier is not None and earlier.is_replaced:
                claims.claim_replaced(
                    connection, self.bundle_id, earlier.keys, run=self._run, busy=IN_FLIGHT.busy_keys(self._bucket)
                )
            connection.execute(self._task().values(earlier=document))

    def earlier(self) -> EarlierBundle | None:
        """The bundle that the task's own one replaces, as far as something is to be done about it."""
        query = sa.select(bundle_task.c.earlier).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            document = connection.execute(query).scalar_one_or_none()
        if document is None:
            return None
        return EarlierBundle(base64.b64decode(document["manifest"]), tuple(document["keys"]), document["isReplaced"])

    def objects(self) -> list[StoredObject]:
        """Every object that the task has stored or begun to send, or has to delete, in the order of their keys."""
        return self._objects(bundle_part.c.state.in_(["sent", "unwanted"]))

    def orphaned_objects(self) -> list[StoredObject]:
        """Every object that is to be deleted from the bucket, in the order of their keys."""
        return self._objects(bundle_part.c.state == "unwanted")

    def start_deletion(self, unanswered: Collection[str] = (), *, everything: bool = True) -> Sequence[str]:
        """Claim the objects that are to be deleted, and return their keys.

        Args:
            everything: Every object of the task is to be deleted; no sealing can be resumed.
            unanswered: Keys of objects that this process has sent requests about, which nobody has answered.
        """
        with self._transaction() as connection:
            if everything:
                claims.renounce(connection, self.bundle_id)
                connection.execute(self._task().values(encrypted_bundle_key=None, checkpoint=None))
            self._deletion = random.token_hex(8)
            return claims.claim_deletion(
                connection, self.bundle_id, run=self._run, deletion=self._deletion, unanswered=unanswered
            )

    def end_deletion(
        self, keys: Collection[str], *, unanswered: Collection[str] = (), busy: Collection[str] = ()
    ) -> None:
        """Record that a deletion has ended, and delete the records of these objects, which are not in the bucket.

        Args:
            keys: Of the objects.
            unanswered: Keys of which a request has not been answered. They stay recorded for a while, and are deleted
                once more.
            busy: Keys of which requests are under way in this process. They stay recorded.
        """
        with self._transaction() as connection:
            ended = claims.end_deletion
            ended(connection, self.bundle_id, deletion=self._deletion, gone=keys, unanswered=unanswered, busy=busy)

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
        """A transaction of whoever may write the task. Ends as `Fence.claim` if this process may not."""
        with self._engine.begin() as connection:
            if self._fence is not None:
                self._fence.claim(connection, self.bundle_id)
            yield connection

    @contextmanager
    def _stored_transaction(self, stored: StoredBatch) -> Iterator[sa.Connection]:
        """A transaction as `_owned`, which writes down what the bucket has taken.

        An attempt to send one of these objects may not have been answered, and may arrive later. This process keeps a
        list of such attempts until the database has them: a task may fail before its results are written down.
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
            connection.execute(_IS_STORED, rows)
        if stored.checkpoint is not None:
            connection.execute(_GOES_ON_AT, {"of": self.bundle_id, "point": stored.checkpoint.to_json()})

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        return bundle_part.c.bundle_id == self.bundle_id

    @property
    def _sent(self) -> sa.ColumnElement[bool]:
        return sa.and_(self._mine, bundle_part.c.state == "sent")

    def _task(self) -> sa.Update:
        return bundle_task.update().where(bundle_task.c.bundle_id == self.bundle_id)


def _left(secrets: BundleKey, series: str, checkpoint: Checkpoint | None, sent: Sequence[SentPart]) -> ResumeState:
    by_index = {part.record.index: part for part in sorted(sent, key=lambda part: part.record.index)}
    if checkpoint is None:
        return ResumeState(secrets, series, None, by_index)
    before = tuple(by_index.pop(index).record for index in range(checkpoint.parts))
    return ResumeState(secrets, series, ResumePoint(checkpoint, before), by_index)
