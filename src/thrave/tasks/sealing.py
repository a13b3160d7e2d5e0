"""A volume sealed into a bucket, part by part, also across crashes.

What a crash cut off goes on with the same key at the end of the parts that are stored, if the disk is proved to be the
same: by the digest of all that lies before, and by those of every part that was sent beyond. If it is not, everything
begins again with another key: the same key and IV never see two states of a disk.
"""

import structlog

from thrave.bundle.errors import ResumeError
from thrave.bundle.gzip_stream import Compression
from thrave.bundle.model import BundleKey, SealedBundle, new_series
from thrave.bundle.sealer import Sealer
from thrave.tasks.crash_points import durable
from thrave.tasks.journal import Journal, Left
from thrave.tasks.storing import BundleStore
from thrave.tasks.watch import Watch
from thrave.volumes.base import Volume, WatchedVolume

log = structlog.get_logger()


class VolumeSealer:
    """Seals one task's volume into its bucket."""

    def __init__(self, store: BundleStore, journal: Journal, compression: Compression) -> None:
        """Send parts to `store`, with this compression; keep in `journal` what going on takes."""
        self._store = store
        self._journal = journal
        self._compression = compression

    def seal(self, volume: Volume, watch: Watch) -> SealedBundle:
        """Have every part in the bucket. Raises what reading the volume and storing the parts raise."""
        return self._go_on(volume, watch) or self._begin(volume, watch)

    def _go_on(self, volume: Volume, watch: Watch) -> SealedBundle | None:
        """Finish what a crash cut off; None if there is nothing, or the disk is another one now."""
        left = self._journal.left()
        if left is None:
            return None
        watch.tell(f"Sealing goes on after {left.first} parts; {_number_stored(left)} beyond them are stored.")
        try:
            return self._send(left, volume, watch)
        except ResumeError as reason:
            watch.tell(f"Sealing begins again with another key: {reason}.")
            return None

    def _begin(self, volume: Volume, watch: Watch) -> SealedBundle:
        """Start with another key, and names that no other sealing has used.

        A request of an earlier sealing that is still under way, in this process or in a proxy, hits none of its parts.
        """
        self._store.remove()  # parts of a sealing that cannot be resumed are of no use: their key is not used again
        self._store.check_place(watch)
        secrets, series = BundleKey.generate(), "" if self._store.is_unused(watch) else new_series()
        with durable("sealing begun"):
            self._journal.begin(secrets, series)
        return self._send(Left(secrets, series), volume, watch)

    def _send(self, left: Left, volume: Volume, watch: Watch) -> SealedBundle:
        sealing = Sealer(
            WatchedVolume(volume, watch.moved),
            self._store.name,
            secrets=left.secrets,
            compression=self._compression,
            cut_off=left.cut_off,
            series=left.series,
        )
        self._store.put_parts(sealing, left, watch)
        return sealing.sealed


def _number_stored(left: Left) -> int:
    return sum(part.stored for part in left.sent.values())
