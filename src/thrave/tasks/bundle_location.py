"""The location of a bundle in a bucket, and the keys of its objects.

Any client may have written the objects of a bucket. So a manifest in the bucket is used only for the names of its
bundle's objects, and only names that a bundle in this location can have are accepted.
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

MIN_MANIFEST_SIZE = 256
"""Bytes. A smaller object is no manifest: the encrypted key alone has 256. ElasticFox tests a bucket with an object of
20 bytes."""


@dataclass(frozen=True)
class BundleLocation:
    """A bucket, a folder in it (empty, or with a `/` at its end), and the name of a bundle."""

    bucket: str
    folder: str
    name: str

    @classmethod
    def of(cls, task: BundleTask) -> "BundleLocation":
        """Return the location of a task's bundle."""
        return cls(task.bucket, *split_prefix(task.prefix))

    @property
    def manifest_key(self) -> str:
        """The key of the manifest."""
        return self.folder + manifest_filename(self.name)

    def read_manifest(self, buckets: ObjectStore) -> bytes | None:
        """Return the content of the object at the manifest's key; None if there is no object.

        Raises:
            BucketError: The store refuses the request.
            TaskFailure: The object is too large for a manifest.
        """
        head = buckets.head(self.bucket, self.manifest_key)
        if head is None:
            return None
        if head.size > MAX_MANIFEST_BYTES:
            raise TaskFailure(
                "Client.PrefixInUse",
                f"The bucket has '{self.manifest_key}' of {head.size} bytes, which is no manifest. Delete it, or "
                "choose another prefix.",
            )
        try:
            return buckets.get_range(self.bucket, self.manifest_key, 0, MAX_MANIFEST_BYTES) if head.size else b""
        except (NoSuchKey, NoSuchBucket):
            return None

    def has_bundle(self, buckets: ObjectStore) -> bool:
        """Whether the object at the manifest's key is large enough for a manifest. Raises BucketError."""
        head = buckets.head(self.bucket, self.manifest_key)
        return head is not None and head.size >= MIN_MANIFEST_SIZE

    def part_keys(self, manifest: bytes) -> tuple[str, ...]:
        """Return the keys of a manifest's parts; none if it is no manifest. Foreign file names are ignored."""
        try:
            parts = read_manifest(manifest).parts
        except BundleError:
            return ()
        own = part_pattern(self.name)
        return tuple(self.folder + part.filename for part in parts if own.fullmatch(part.filename))

    def keys_in_use(self, buckets: ObjectStore, manifest: bytes, keys: Collection[str]) -> set[str]:
        """Return the keys that must not be deleted, since they belong to the bundle of this manifest.

        A side file with the usual name may belong to another bundle, so it is read.

        Raises:
            BucketError: The store refuses a request.
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
        """Return the keys of a bundle's other objects: its parts and the possible names of its side file."""
        sides = side_filename(self.name), bound_side_filename(self.name, manifest)
        return (*self.part_keys(manifest), *(self.folder + side for side in sides))
