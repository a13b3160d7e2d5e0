"""The place of a bundle in a bucket, and what its manifest says of it.

Whatever is in a bucket may have been written by anybody: a manifest is only asked which objects are its bundle's own,
and only names that every bundle of this name has are accepted.
"""

from collections.abc import Collection
from dataclasses import dataclass

from thrave.buckets.base import ObjectStore, split_prefix
from thrave.buckets.errors import NoSuchBucket, NoSuchKey
from thrave.bundle.errors import BundleError
from thrave.bundle.manifest import read_manifest
from thrave.bundle.manifest_xml import MAX_MANIFEST_BYTES
from thrave.bundle.model import bound_side_filename, manifest_filename, part_pattern, side_filename
from thrave.bundle.side_file import MAX_SIDE_FILE_BYTES, Digest, read_side_file
from thrave.tasks.errors import TaskFailure
from thrave.tasks.models import BundleTask

SMALLEST_MANIFEST = 256
"""Bytes. A smaller object is no manifest: the key alone has as many. ElasticFox tests a bucket with one of 20 bytes."""


@dataclass(frozen=True)
class BundleLocation:
    """A bucket, a folder in it that is empty or ends in `/`, and the name of the bundle."""

    bucket: str
    folder: str
    name: str

    @classmethod
    def of(cls, task: BundleTask) -> "BundleLocation":
        """Return the place of a task's bundle."""
        return cls(task.bucket, *split_prefix(task.prefix))

    @property
    def manifest_key(self) -> str:
        """The key of the manifest."""
        return self.folder + manifest_filename(self.name)

    def read_manifest(self, buckets: ObjectStore) -> bytes | None:
        """Return what is at the manifest's key, whatever it is; None if there is no object.

        Raises:
            BucketError: The store refuses it.
            TaskFailure: It is too large for a manifest.
        """
        head = buckets.head(self.bucket, self.manifest_key)
        if head is None:
            return None
        if head.size > MAX_MANIFEST_BYTES:
            raise TaskFailure(
                "Client.PrefixInUse",
                f"The bucket has '{self.manifest_key}' of {head.size} bytes, which is no manifest. Remove it, or "
                "choose another prefix.",
            )
        try:
            return buckets.get_range(self.bucket, self.manifest_key, 0, MAX_MANIFEST_BYTES) if head.size else b""
        except (NoSuchKey, NoSuchBucket):
            return None

    def has_bundle(self, buckets: ObjectStore) -> bool:
        """Whether an object of the size of a manifest is at the manifest's key. Raises BucketError."""
        head = buckets.head(self.bucket, self.manifest_key)
        return head is not None and head.size >= SMALLEST_MANIFEST

    def part_keys(self, manifest: bytes) -> tuple[str, ...]:
        """Return the keys of the parts that a manifest names; none if it is no manifest.

        Names that no bundle of this name has are left out.
        """
        try:
            parts = read_manifest(manifest).parts
        except BundleError:
            return ()
        own = part_pattern(self.name)
        return tuple(self.folder + part.filename for part in parts if own.fullmatch(part.filename))

    def keys_in_use(self, buckets: ObjectStore, manifest: bytes, keys: Collection[str]) -> set[str]:
        """Return which of these keys belong to the bundle whose manifest is in the bucket, so must not be deleted.

        A side file of the usual name may be another bundle's: it is read.

        Raises:
            BucketError: The store refuses it.
        """
        bound, plain = (
            self.folder + name for name in (bound_side_filename(self.name, manifest), side_filename(self.name))
        )
        in_use = {self.manifest_key, bound, *self.part_keys(manifest)}
        if plain in keys and self._describes(buckets, plain, manifest):
            in_use.add(plain)
        return in_use.intersection(keys)

    def _describes(self, buckets: ObjectStore, key: str, manifest: bytes) -> bool:
        try:
            side_file = read_side_file(buckets.get_range(self.bucket, key, 0, MAX_SIDE_FILE_BYTES))
        except (NoSuchKey, NoSuchBucket, BundleError):
            return False
        return side_file.manifest == Digest.of(manifest)

    def keys_of(self, manifest: bytes) -> tuple[str, ...]:
        """Return the keys of the objects of a bundle besides its manifest: its parts, and the names of a side file."""
        sides = side_filename(self.name), bound_side_filename(self.name, manifest)
        return (*self.part_keys(manifest), *(self.folder + side for side in sides))
