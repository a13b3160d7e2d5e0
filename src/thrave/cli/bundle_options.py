"""What the command lines of the bundle commands share: files that must exist, and whose signature is trusted."""

from __future__ import annotations

import os

import click

from thrave.cli.folders import FileMissingError
from thrave.cli.pem import CERTIFICATE, ED25519_PUBLIC_KEY


class ExistingPath(click.Path):
    """A path of the disk that must exist; exit code 3 if it does not."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if not os.path.lexists(value):
            raise FileMissingError(f"{os.fspath(value)} does not exist")
        return super().convert(value, param, ctx)


certificate_option = click.option(
    "--certificate",
    type=CERTIFICATE,
    metavar="SIGNER",
    help="Signer's certificate (PEM); the signature must hold for it.",
)
side_key_option = click.option(
    "--side-key", type=ED25519_PUBLIC_KEY, help="Ed25519 public key (PEM) that must have signed the side file."
)
