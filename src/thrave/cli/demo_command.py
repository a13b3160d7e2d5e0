"""`thrave demo`: the whole of Thrave at work on real data, in a minute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.options import DataFolder, Size, make_files_private
from thrave.cli.output import format_size, output_option, print_result
from thrave.concurrency import monotonic

if TYPE_CHECKING:
    from thrave.demo.tour import Task, Tour


@click.command()
@click.option("--size", type=Size(), default="256MiB", show_default=True, help="The root disk's size.")
@click.option(
    "-d", "--data-dir", type=DataFolder(), metavar="DIR", envvar="THRAVE_DATA_DIR", default="thrave-demo",
    show_default=True, help="Directory of everything that the demo creates; kept afterwards.",
)  # fmt: skip
@output_option
def demo(size: int, data_dir: Path, output: str) -> None:
    """Bundle a Windows-like instance with boto3, then open the bundle and compare.

    Makes an account, an instance with a root disk and an ephemeral one, starts the server on a free port, bundles
    through an unmodified boto3, verifies and opens the bundle, and says how to do the same by hand.

    \b
    Example:
      thrave demo --size 1GiB
    """
    from thrave.demo.tour import tour

    make_files_private()
    story = _Story(quiet=output == "json")
    result = tour(data_dir, size, story.tell, story.show)
    print_result(output, result.document(), _farewell(result))


class FileExists(click.ClickException):
    """The file to create exists."""

    exit_code = Exit.REFUSED


@click.command("demo-disk")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", type=Size(), default="64MiB", show_default=True, help="The disk's size, 64MiB at least.")
@output_option
def demo_disk(file: Path, size: int, output: str) -> None:
    """Create a Windows-like root disk to try Thrave with.

    A raw image with a partition table and one NTFS volume. It holds files, deleted files and holes, and does not boot.
    An existing FILE is never overwritten.

    \b
    Example:
      thrave demo-disk disk.raw
    """
    from thrave.demo.disk import make_demo_disk

    if file.exists():
        raise FileExists(f"{file} exists. Remove it, or name another file.")
    made = make_demo_disk(file, size)
    document = {"path": str(file), "size": made.size, "volumeSize": made.volume_size}
    print_result(
        output, document, f"{file}: {format_size(made.size)}, with an NTFS volume of {format_size(made.volume_size)}"
    )


class _Story:
    """What the demo says while it goes on, on stderr; stdout is for the result."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._state = ""
        self._begun = monotonic()

    def tell(self, words_: str) -> None:
        """Begin a line of the story."""
        if not self._quiet:
            click.echo(click.style("• ", fg="green") + words_, err=True)

    def show(self, task: Task) -> None:
        """Show a look at the task: each state on a line of its own, its progress growing in place."""
        if self._quiet:
            return
        state, progress = task["State"], task.get("Progress", "")
        seconds = monotonic() - self._begun
        line = f"    {seconds:6.1f} s  {state:<21} {progress:>4} {_bar(progress)}"
        if sys.stderr.isatty():
            click.echo(("\n" if state != self._state and self._state else "\r") + line, err=True, nl=False)
            if state in {"complete", "failed"}:
                click.echo(err=True)
        elif state != self._state:
            click.echo(line.rstrip(), err=True)
        self._state = state


def _bar(progress: str) -> str:
    tenths = int(progress.rstrip("%") or 0) // 4
    return "█" * tenths + "░" * (25 - tenths) if progress else ""


def _farewell(result: Tour) -> str:
    by_hand = "\n".join(f"    {line}" for line in result.by_hand())
    without_thrave = "\n".join(f"    {line}" for line in result.without_thrave())
    return f"""
The bundle opens to the root disk, byte for byte: {format_size(result.size)}, SHA-256 {result.sha256}
In the bucket: {format_size(result.bundled_size)} in {result.parts} parts.
From BundleInstance to complete it took {result.seconds:.1f} s.
The instance is running again; its second disk is not in the bundle.

The same by hand, with the AWS CLI:
{by_hand}

And without Thrave, with openssl, gunzip and tar:
{without_thrave}

Everything lies in {result.data}:
the bucket in {result.bucket_folder}, the opened image in {result.image}"""
