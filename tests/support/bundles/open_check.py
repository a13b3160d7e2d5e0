"""Opens bundles of a test server with all checks, and returns the SHA-256 of the image."""

import hashlib
from pathlib import Path

from thrave.bundle.base import DirectoryParts
from thrave.bundle.model import bound_side_filename, manifest_filename, side_filename
from thrave.bundle.opener import open_bundle
from thrave.identity.certificates import CERTIFICATE_FILE, PRIVATE_KEY_FILE, load_certificate, load_private_key
from thrave.testing import ThraveServer


def opened_sha256(server: ThraveServer, bucket: str, prefix: str, output: Path) -> str:
    """Open a bundle in a bucket with the service's key and all checks; return the SHA-256 of the image."""
    return opened_folder_sha256(server, server.data.buckets / bucket, prefix, output)


def opened_folder_sha256(server: ThraveServer, folder: Path, prefix: str, output: Path) -> str:
    """Open a bundle in a local folder with the service's key and all checks; return the SHA-256 of the image."""
    manifest = (folder / manifest_filename(prefix)).read_bytes()
    bound = folder / bound_side_filename(prefix, manifest)
    open_bundle(
        manifest,
        DirectoryParts(folder),
        load_private_key((server.data.service / PRIVATE_KEY_FILE).read_bytes()),
        output,
        certificate=load_certificate((server.data.service / CERTIFICATE_FILE).read_bytes()),
        side_file=(bound if bound.exists() else folder / side_filename(prefix)).read_bytes(),
    )
    return hashlib.sha256(output.read_bytes()).hexdigest()
