"""The bundles of one folder whose names match a pattern: which are complete, and the removal of one of them.

A listing has the names and sizes of all files, so one bundle costs one further request, for its manifest. A removal
first writes a removal record, `PREFIX.removal.json`, with the names of the files. Files without a manifest could also
be those of a bundle that is being stored; the record shows that a removal was interrupted and must be finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from thrave.bundle.errors import DamagedError
from thrave.bundle.manifest_xml import MAX_MANIFEST_BYTES
from thrave.bundle.model import MANIFEST_SUFFIX, bound_side_filename, part_pattern, side_filename
from thrave.cli.folders import FileMissingError
from thrave.cli.locations import REMOVAL_SUFFIX, Location, read_manifest_file
from thrave.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from thrave.bundle.manifest import Manifest
    from thrave.bundle.verifier import Trust
    from thrave.cli.folders import WritableFolder

_FORMAT = "thrave-removal-1"
_PART = re.compile(r"(.+)\.part\.[0-9]+", re.DOTALL)
_BOUND_SIDE_FILE = re.compile(r"\.manifest\.[0-9a-f]{32}\.json")
_BATCH_SIZE = 1000  # files; S3's limit for one request
_READ_AHEAD = 8  # manifests that are read at once


@dataclass(frozen=True)
class SeriesBundle:
    """A complete bundle: its manifest is valid, and the folder has exactly the parts that it names."""

    prefix: str
    stored: datetime
    """When the manifest was written to this folder."""
    size: int
    """Bytes of the parts."""
    manifest_sha256: str
    parts: Sequence[str]
    side_files: Sequence[str]


@dataclass(frozen=True)
class SkippedBundle:
    """A manifest or removal record that stays as it is."""

    prefix: str
    reason: str
    is_damaged: bool
    """Whether an operator must act; False if the bundle is being changed."""


class Series:
    """The bundles of a folder whose prefixes match a pattern, as of one listing."""

    def __init__(self, folder: WritableFolder, pattern: str, trust: Trust) -> None:
        """List the folder. The pattern has `*`, `?` and `[…]` as in a shell, and distinguishes upper and lower case.

        Raises:
            FolderError: The folder cannot be listed.
        """
        self._folder = folder
        self._trust = trust
        start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        self._files = {file.name: file for file in folder.list_files(start)}
        self._parts: dict[str, set[str]] = {}
        for name in self._files:
            if match := _PART.fullmatch(name):
                self._parts.setdefault(match[1], set()).add(name)
        self.prefixes = self._with_suffix(MANIFEST_SUFFIX, pattern)
        self.interrupted = self._with_suffix(REMOVAL_SUFFIX, pattern)
        """Prefixes of the removals that were interrupted."""

    def _with_suffix(self, suffix: str, pattern: str) -> list[str]:
        prefixes = [name.removesuffix(suffix) for name in self._files if name.endswith(suffix)]
        return sorted(prefix for prefix in prefixes if prefix and fnmatchcase(prefix, pattern))

    def examine(self) -> tuple[list[SeriesBundle], list[SkippedBundle]]:
        """Read each manifest. Return the complete bundles, newest first, and those that are not."""
        with Pipeline(_READ_AHEAD) as pipeline:
            examined = [*pipeline.map(self._examine, self.prefixes, _READ_AHEAD)]
        bundles = [found for found in examined if isinstance(found, SeriesBundle)]
        # Several bundles can be stored within the resolution of the store's clock; dated names sort by date.
        bundles.sort(key=lambda bundle: (bundle.stored, bundle.prefix), reverse=True)
        return bundles, [found for found in examined if isinstance(found, SkippedBundle)]

    def _examine(self, prefix: str) -> SeriesBundle | SkippedBundle:
        from thrave.bundle.verifier import verify_manifest

        try:
            xml = read_manifest_file(self.location(prefix))
            manifest = verify_manifest(xml, None, self._trust).manifest
        except FileMissingError:
            return SkippedBundle(prefix, "its manifest was removed meanwhile", is_damaged=False)
        except DamagedError as error:
            return SkippedBundle(prefix, str(error), is_damaged=True)
        if problem := self._find_problem(prefix, manifest):
            return problem
        names = [part.filename for part in manifest.parts]
        sides = [name for name in (side_filename(prefix), bound_side_filename(prefix, xml)) if name in self._files]
        stored = self._files[prefix + MANIFEST_SUFFIX].modified
        digest = hashlib.sha256(xml).hexdigest()
        return SeriesBundle(prefix, stored, manifest.bundled_size, digest, names, sides)

    def _find_problem(self, prefix: str, manifest: Manifest) -> SkippedBundle | None:
        """Compare a manifest with the listing; return the first difference."""
        names, own = [part.filename for part in manifest.parts], part_pattern(prefix)
        if foreign := [name for name in names if not own.fullmatch(name)]:
            return SkippedBundle(
                prefix, f"its manifest names a file of another bundle: {foreign[0]!r}", is_damaged=True
            )
        if missing := [name for name in names if name not in self._files]:
            return SkippedBundle(prefix, f"incomplete: {missing[0]} is missing", is_damaged=True)
        if self._parts.get(prefix, set()).difference(names):
            reason = "has parts that its manifest does not name: a task is replacing it, or was interrupted"
            return SkippedBundle(prefix, reason, is_damaged=False)
        size = sum(self._files[name].size for name in names)
        if size != manifest.bundled_size:
            reason = f"its parts have {size} bytes, not {manifest.bundled_size}"
            return SkippedBundle(prefix, reason, is_damaged=True)
        return None

    def location(self, prefix: str) -> Location[WritableFolder]:
        """Return the location of a bundle of this folder."""
        return Location(self._folder, prefix + MANIFEST_SUFFIX)

    def remove(self, bundle: SeriesBundle) -> SkippedBundle | None:
        """Remove a bundle: record, manifest, parts, side files, record. Return why it was not removed.

        Nothing is removed if the manifest is no longer the one that was examined.
        """
        try:
            xml = read_manifest_file(self.location(bundle.prefix))
        except FileMissingError:
            xml = b""
        if hashlib.sha256(xml).hexdigest() != bundle.manifest_sha256:
            return SkippedBundle(bundle.prefix, "was replaced or removed meanwhile", is_damaged=False)
        filenames = [*bundle.parts, *bundle.side_files]
        record = bundle.prefix + REMOVAL_SUFFIX
        self._folder.write(record, json.dumps({"format": _FORMAT, "files": filenames}, indent=1).encode() + b"\n")
        self._folder.remove([bundle.prefix + MANIFEST_SUFFIX])
        self._remove_files(filenames, record)
        return None

    def finish_removal(self, prefix: str) -> SkippedBundle | None:
        """Finish an interrupted removal. Return why nothing was removed.

        Files that are newer than the record belong to another bundle and stay. If there is a manifest, only the record
        is removed: the manifest was not removed yet, or a bundle with this prefix was stored since.
        """
        record = prefix + REMOVAL_SUFFIX
        try:
            filenames = self._read_record(prefix, self._folder.read(record, MAX_MANIFEST_BYTES))
        except FileMissingError:
            return None
        except ValueError as error:
            return SkippedBundle(prefix, f"{record} is not a removal record: {error}", is_damaged=True)
        if self._folder.size(prefix + MANIFEST_SUFFIX) is not None:
            filenames = []
        started = self._files[record].modified
        old = [name for name in filenames if name in self._files and self._files[name].modified <= started]
        self._remove_files(old, record)
        return None

    @staticmethod
    def _read_record(prefix: str, data: bytes) -> list[str]:
        """Return the names in a removal record. Raises ValueError if it names anything but files of the bundle."""
        try:
            document = json.loads(data)
            names = [*document["files"]] if document["format"] == _FORMAT else None
        except (ValueError, RecursionError, LookupError, TypeError):
            names = None
        if names is None:
            raise ValueError(f"it is not a JSON document of the format {_FORMAT!r}")
        own = part_pattern(prefix)
        for name in names:
            is_own = isinstance(name, str) and (
                own.fullmatch(name)
                or name == side_filename(prefix)
                or (name.startswith(prefix) and _BOUND_SIDE_FILE.fullmatch(name.removeprefix(prefix)))
            )
            if not is_own:
                raise ValueError(f"it names a file of another bundle: {str(name)[:100]!r}")
        return names

    def _remove_files(self, filenames: Sequence[str], record: str) -> None:
        """Remove files in batches, and the record last."""
        for start in range(0, len(filenames), _BATCH_SIZE):
            self._folder.remove(filenames[start : start + _BATCH_SIZE])
        self._folder.remove([record])
