"""What a task has in the bucket, and where its sealing goes on after a crash.

An object is written down before it is sent, so that clean-up finds exactly what was sent; a part, when it is stored,
together with the checkpoint at its end, so that nothing that is stored is ever sealed or sent again. The bundle's key
is kept only as the vault sealed it, and erased with the end of the task (`records.py`). Nothing here touches a bucket.
"""

from dataclasses import asdict
from typing import NamedTuple, TypedDict, cast

import sqlalchemy as sa

from thrave.bundle.checkpoint import Checkpoint
from thrave.bundle.sealed import CutOff, Part, SealedPart
from thrave.bundle.secrets import BundleSecrets
from thrave.database import bundle_part, bundle_task
from thrave.tasks.fence import Fence
from thrave.vault import Vault


class Documents(TypedDict):
    """The two files that make parts a bundle. They hold the key only as encrypted to the owner and to the service."""

    manifest: str
    side_file: str


class StoredObject(NamedTuple):
    """An object of the bundle that is in the bucket, or was on its way there when it was written down."""

    key: str
    size: int | None
    """Bytes; None while it is in flight."""


class Journal:
    """The journal of one bundle task."""

    def __init__(self, engine: sa.Engine, vault: Vault, bundle_id: str, fence: Fence | None = None) -> None:
        """Keep the journal of the task `bundle_id`; `vault` keeps its key unreadable in the database."""
        self._engine = engine
        self._vault = vault
        self._fence = fence
        self.bundle_id = bundle_id
        self._context = f"{bundle_id} secrets"

    def begin(self, secrets: BundleSecrets) -> None:
        """Begin a sealing with this key and IV; nothing is stored of it yet."""
        sealed = self._vault.seal(secrets.key + secrets.iv, context=self._context)
        with self._engine.begin() as connection:
            connection.execute(self._task().values(sealed_secrets=sealed, checkpoint=None))

    def cut_off(self) -> tuple[BundleSecrets, CutOff] | None:
        """Where a sealing that was begun before can go on, and with what; None if none can."""
        query = sa.select(bundle_task.c.sealed_secrets, bundle_task.c.checkpoint)
        with self._engine.connect() as connection:
            sealed, document = connection.execute(query.where(bundle_task.c.bundle_id == self.bundle_id)).one()
            rows = connection.execute(sa.select(bundle_part.c.part).where(*self._mine(bundle_part.c.part.is_not(None))))
            parts = sorted((SealedPart(**row.part) for row in rows), key=lambda part: part.index)
        if document is None:
            return None
        opened = self._vault.unseal(sealed, context=self._context)
        checkpoint = Checkpoint.from_json(document)
        return BundleSecrets(opened[:16], opened[16:]), CutOff(checkpoint, tuple(parts[: checkpoint.parts]))

    def sending(self, key: str) -> None:
        """Write down that an object is about to be sent; if the task is somebody else's now, the process ends."""
        with self._engine.begin() as connection:
            if self._fence is not None:
                self._fence.check(connection, self.bundle_id)
            connection.execute(bundle_part.delete().where(*self._mine(bundle_part.c.key == key)))
            connection.execute(bundle_part.insert(), {"bundle_id": self.bundle_id, "key": key})

    def stored(self, key: str, size: int) -> None:
        """Write down that the bucket has taken an object of `size` bytes."""
        with self._engine.begin() as connection:
            connection.execute(self._object(key).values(size=size))

    def stored_part(self, key: str, part: Part) -> None:
        """Write down that the bucket has taken a part, and that sealing can go on from its end."""
        with self._engine.begin() as connection:
            connection.execute(self._object(key).values(size=part.size, part=asdict(part.record)))
            if part.checkpoint is not None:
                connection.execute(self._task().values(checkpoint=part.checkpoint.to_json()))

    def conclude(self, documents: Documents) -> None:
        """Write down that every part is stored: only the two files that make them a bundle are wanting."""
        with self._engine.begin() as connection:
            connection.execute(self._task().values(documents=documents))

    def documents(self) -> Documents | None:
        """The two files, if every part is stored."""
        query = sa.select(bundle_task.c.documents).where(bundle_task.c.bundle_id == self.bundle_id)
        with self._engine.connect() as connection:
            return cast("Documents | None", connection.execute(query).scalar_one())

    def objects(self) -> list[StoredObject]:
        """Every object that the task has stored or begun to send, in the order of their keys."""
        query = sa.select(bundle_part.c.key, bundle_part.c.size).where(*self._mine()).order_by(bundle_part.c.key)
        with self._engine.connect() as connection:
            return [StoredObject(*row) for row in connection.execute(query)]

    def forget(self) -> None:
        """Strike everything out: no object is in the bucket any more, and no sealing can go on."""
        with self._engine.begin() as connection:
            connection.execute(bundle_part.delete().where(*self._mine()))
            connection.execute(self._task().values(sealed_secrets=None, checkpoint=None))

    def _mine(self, *conditions: sa.ColumnElement[bool]) -> tuple[sa.ColumnElement[bool], ...]:
        return bundle_part.c.bundle_id == self.bundle_id, *conditions

    def _object(self, key: str) -> sa.Update:
        return bundle_part.update().where(*self._mine(bundle_part.c.key == key))

    def _task(self) -> sa.Update:
        return bundle_task.update().where(bundle_task.c.bundle_id == self.bundle_id)
