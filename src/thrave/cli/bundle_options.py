"""What the commands on bundles have in common on their command lines: whose signature is believed."""

from __future__ import annotations

import click

from thrave.cli.pem import CERTIFICATE, ED25519_PUBLIC_KEY

certificate_option = click.option(
    "--certificate",
    type=CERTIFICATE,
    metavar="SIGNER",
    help="Signer's certificate (PEM); the signature must hold for it.",
)
side_key_option = click.option(
    "--side-key", type=ED25519_PUBLIC_KEY, help="Ed25519 public key (PEM) that must have signed the side file."
)
