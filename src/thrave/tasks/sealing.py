"""A volume sealed into a bucket, part by part, also across crashes.

What a crash cut off goes on at the end of the last part that is stored, with the same key, if the disk is proved to be
the same. If it is not, everything begins again with another key: the same key and IV never see two states of a disk.
"""

from contextlib import closing

import structlog

from thrave.bundle.errors import ResumeError
from thrave.bundle.sealed import Sealed
from thrave.bundle.sealing import Sealing
from thrave.bundle.secrets import BundleSecrets
from thrave.bundle.zlibs import Level
from thrave.tasks.crash_points import durable
from thrave.tasks.journal import Journal
from thrave.tasks.storing import BundleStore
from thrave.tasks.watch import Watch
from thrave.volumes.volume import Volume

log = structlog.get_logger()


class VolumeSealer:
    """Seals one task's volume into its bucket."""

    def __init__(self, store: BundleStore, journal: Journal, level: Level) -> None:
        """Send parts to `store`, compressed at `level`; keep in `journal` what going on takes."""
        self._store = store
        self._journal = journal
        self._level = level

    def seal(self, volume: Volume, watch: Watch) -> Sealed:
        """Have every part in the bucket. Raises what reading the volume and storing the parts raise."""
        return self._go_on(volume, watch) or self._begin(volume, watch)

    def _go_on(self, volume: Volume, watch: Watch) -> Sealed | None:
        """Finish what a crash cut off; None if there is nothing, or the disk is another one now."""
        left = self._journal.cut_off()
        if left is None:
            return None
        secrets, cut_off = left
        log.info("sealing goes on", bundle_id=self._journal.bundle_id, parts=cut_off.checkpoint.parts)
        try:
            return self._send(
                Sealing(volume, self._store.name, secrets=secrets, level=self._level, cut_off=cut_off), watch
            )
        except ResumeError as reason:
            log.warning("sealing begins again", bundle_id=self._journal.bundle_id, reason=str(reason))
            return None

    def _begin(self, volume: Volume, watch: Watch) -> Sealed:
        self._store.remove()  # parts of a sealing that cannot go on are of no use: their key is not used again
        secrets = BundleSecrets.generate()
        with durable("sealing begun"):
            self._journal.begin(secrets)
        return self._send(Sealing(volume, self._store.name, secrets=secrets, level=self._level), watch)

    def _send(self, sealing: Sealing, watch: Watch) -> Sealed:
        watch.over(sealing)
        with closing(sealing.parts()) as parts:
            for part in parts:
                self._store.put_part(part)
        return sealing.sealed
