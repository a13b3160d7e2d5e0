"""Disk images in QEMU's formats, made by qemu-img."""

import subprocess
from pathlib import Path

from support.components import require


def qemu_img(*words: object) -> str:
    """Run qemu-img, which must succeed; give what it printed."""
    program = require("qemu-img", package="qemu-utils")
    return subprocess.run([program, *map(str, words)], check=True, capture_output=True, text=True).stdout


def converted(raw: Path, image_format: str, *options: str) -> Path:
    """The same disk in another format, beside the raw image."""
    image = raw.with_suffix(f".{image_format}")
    qemu_img("convert", "-f", "raw", "-O", image_format, *options, raw, image)
    return image
