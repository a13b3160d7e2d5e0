"""What the bundle commands answer: JSON in EC2's camelCase, and text for people.

It only puts data into words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thrave.cli.output import printable, table
from thrave.cli.sizes import words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from thrave.bundle.manifest import Manifest
    from thrave.bundle.model import SealedBundle
    from thrave.bundle.verifier import VerifyResult
    from thrave.cli.bundle_folder import BundleFolder


def sealed_document(folder: BundleFolder, sealed: SealedBundle, warnings: Sequence[str]) -> dict[str, object]:
    """A new bundle as JSON, with what the image says of itself that one should know."""
    return {
        "manifest": folder.manifest,
        "sideFile": folder.side_file,
        "prefix": sealed.prefix,
        "size": sealed.size,
        "bundledSize": sealed.bundled_size,
        "digest": sealed.digest,
        "warnings": list(warnings),
        "parts": [
            {
                "index": part.index,
                "filename": part.filename,
                "size": part.size,
                "sha1": part.sha1,
                "sha256": part.sha256,
            }
            for part in sealed.parts
        ],
    }


def sealed_text(folder: BundleFolder, sealed: SealedBundle) -> str:
    """A new bundle in two lines."""
    share = 100 * sealed.bundled_size / sealed.size
    return (
        f"{words(sealed.size)} sealed into {len(sealed.parts)} parts of {words(sealed.bundled_size)} ({share:.0f} %)\n"
        f"{folder.manifest}"
    )


def manifest_document(manifest: Manifest) -> dict[str, object]:
    """What a manifest says, as JSON."""
    return {
        "name": manifest.name,
        "accountId": manifest.user,
        "type": manifest.type,
        "architecture": manifest.architecture,
        "version": manifest.version,
        "bundler": str(manifest.bundler),
        "size": manifest.size,
        "bundledSize": manifest.bundled_size,
        "digest": manifest.digest,
        "signed": manifest.is_signed,
        "kernelId": manifest.kernel_id,
        "ramdiskId": manifest.ramdisk_id,
        "productCodes": list(manifest.product_codes),
        "ancestry": list(manifest.ancestry),
        "blockDevices": [{"virtual": virtual, "device": device} for virtual, device in manifest.block_devices],
        "parts": [{"index": part.index, "filename": part.filename, "sha1": part.sha1} for part in manifest.parts],
    }


def manifest_text(manifest: Manifest) -> str:
    """What a manifest says, as a table: all of it but the keys, and the names of 20 parts at most."""
    said = manifest_document(manifest)
    rows: list[tuple[str, ...]]
    rows = [
        (name, printable(str(value)))
        for name, value in said.items()
        if value is not None and not isinstance(value, list)
    ]
    rows += [("productCodes", printable(code)) for code in manifest.product_codes]
    rows += [("ancestry", printable(ami)) for ami in manifest.ancestry]
    rows += [("blockDevice", printable(f"{virtual} = {device}")) for virtual, device in manifest.block_devices]
    rows += [(f"part {part.index}", f"{printable(part.filename)}  SHA-1 {part.sha1}") for part in manifest.parts[:20]]
    if len(manifest.parts) > 20:
        rows.append(("…", f"and {len(manifest.parts) - 20} more parts (--output json lists all)"))
    return table(("WHAT", "THE MANIFEST SAYS (nothing is checked)"), rows)


def verified_document(verified: VerifyResult) -> dict[str, object]:
    """What a reader has checked, and the manifest it read, as JSON."""
    checks = [{"subject": check.subject, "checked": check.checked, "detail": check.detail} for check in verified.checks]
    return {"checks": checks, **manifest_document(verified.manifest)}


def verified_text(verified: VerifyResult) -> str:
    """What a reader has checked and could not check, as a table."""
    answer: Mapping[bool, str] = {True: "holds", False: "NOT CHECKED"}
    rows: list[tuple[str, ...]] = [(check.subject, answer[check.checked], check.detail) for check in verified.checks]
    return table(("CHECK", "RESULT", "DETAIL"), rows)
