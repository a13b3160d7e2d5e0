"""`thrave demo` and `thrave demo-disk`: bundle a generated disk from start to end in about a minute."""

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
    from thrave.demo.tour import Task, TourResult


@click.command(short_help="Bundle a demo instance, open the bundle and compare.")
@click.option("--size", type=Size(), default="256MiB", show_default=True, help="The root disk's size.")
@click.option(
    "-d", "--data-dir", type=DataFolder(), metavar="DIR", envvar="THRAVE_DATA_DIR", default="thrave-demo",
    show_default=True, help="Directory of everything that the demo creates; kept afterwards.",
)  # fmt: skip
@output_option
def demo(size: int, data_dir: Path, output: str) -> None:
    """Bundle a Windows-like instance with boto3, then open the bundle and compare.

    Creates an account and an instance with a root disk and an ephemeral disk, starts the server on a free port, bundles
    with an unmodified boto3, verifies and opens the bundle, and prints the commands that do the same.

    \b
    Example:
      thrave demo --size 1GiB
    """
    from thrave.demo.tour import run_tour

    make_files_private()
    progress = _Progress(quiet=output == "json")
    result = run_tour(data_dir, size, progress.report_step, progress.report_task)
    print_result(output, result.document(), _summary(result))


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


class _Progress:
    """Reports the steps of the demo on stderr; stdout is for the result."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._state = ""
        self._start = monotonic()

    def report_step(self, step: str) -> None:
        """Print a line about a step."""
        if not self._quiet:
            click.echo(click.style("• ", fg="green") + step, err=True)

    def report_task(self, task: Task) -> None:
        """Print the state of the bundle task. On a terminal a line is updated until the state changes."""
        if self._quiet:
            return
        state, progress = task["State"], task.get("Progress", "")
        seconds = monotonic() - self._start
        line = f"    {seconds:6.1f} s  {state:<21} {progress:>4} {_bar(progress)}"
        if sys.stderr.isatty():
            click.echo(("\n" if state != self._state and self._state else "\r") + line, err=True, nl=False)
            if state in {"complete", "failed"}:
                click.echo(err=True)
        elif state != self._state:
            click.echo(line.rstrip(), err=True)
        self._state = state


def _bar(progress: str) -> str:
    blocks = int(progress.rstrip("%") or 0) // 4
    return "█" * blocks + "░" * (25 - blocks) if progress else ""


def _summary(result: TourResult) -> str:
    with_aws = "\n".join(f"    {line}" for line in result.aws_commands())
    with_openssl = "\n".join(f"    {line}" for line in result.openssl_commands())
    return f"""
The opened bundle equals the root disk: {format_size(result.size)}, SHA-256 {result.sha256}
The bucket contains {format_size(result.bundled_size)} in {result.parts} parts.
BundleInstance took {result.seconds:.1f} s until the state complete.
The instance is running again. Its second disk is not in the bundle.

The same with the AWS CLI:
{with_aws}

To open the bundle without Thrave, with openssl, gunzip and tar:
{with_openssl}

All files are in {result.data}:
the bucket in {result.bucket_folder}, the opened image in {result.image}"""
