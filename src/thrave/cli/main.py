"""The `thrave` command: the table of its commands, and what happens with their errors.

A command's module is imported when the command runs, so that `thrave --help` is quick. An error is printed by
`cli/error_output.py`, with an exit code of `cli/exit_codes.py`. The traceback of an unexpected error is written to a
file, or to stderr with `--debug`.
"""

import importlib
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import click

from thrave.cli.error_output import ErrorReport, describe, print_error, wants_json
from thrave.cli.exit_codes import Exit
from thrave.cli.output import printable_lines

# command -> module and attribute. The order is the order of `thrave --help`.
COMMANDS: dict[str, str] = {
    "demo": "thrave.cli.demo_command:demo",
    "demo-disk": "thrave.cli.demo_command:demo_disk",
    "doctor": "thrave.cli.doctor_command:doctor",
    "serve": "thrave.cli.server_commands:serve",
    "api": "thrave.cli.server_commands:api",
    "agent": "thrave.cli.server_commands:agent",
    "account": "thrave.cli.account_commands:account",
    "instance": "thrave.cli.instance_commands:instance",
    "task": "thrave.cli.task_commands:task",
    "host": "thrave.cli.host_commands:host",
    "host-files": "thrave.cli.host_files_command:host_files",
    "bundle": "thrave.cli.bundle_command:bundle",
    "open": "thrave.cli.open_commands:open_",
    "verify": "thrave.cli.open_commands:verify",
    "show": "thrave.cli.open_commands:show",
    "copy": "thrave.cli.manage_commands:copy",
    "delete": "thrave.cli.manage_commands:delete",
    "prune": "thrave.cli.prune_command:prune",
    "migrate": "thrave.cli.manage_commands:migrate",
    "help": "thrave.cli.main:help_",
}

# Commands that delete or stop something are never suggested for a misspelled name.
HARMFUL = {"adopt", "cancel", "delete", "disown", "drain", "migrate", "prune", "remove", "retire", "stop"}


class _Commands(click.Group):
    """A group that imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="thrave")
@click.option("--debug", is_flag=True, help="Print the traceback of an unexpected error.")
def thrave(*, debug: bool) -> None:
    """EC2's BundleInstance API for KVM hosts and S3-compatible stores.

    \b
    Example:
      thrave demo            bundle a demo disk from start to end
      thrave serve           answer boto3, the AWS CLI and other EC2 clients
    """


@click.command("help", hidden=True)
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
def help_(words: tuple[str, ...]) -> None:
    """Show the help of a command.

    \b
    Example:
      thrave help instance add
    """
    thrave.main([*words, "--help"], standalone_mode=False)


def main() -> None:
    """Run the command line and exit with one of the codes of `Exit`."""
    _use_utf8()
    arguments = sys.argv[1:]
    try:
        _check_utf8(arguments)
        thrave.main(standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:  # `| head` has exited; the interpreter must not write the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)
    except Exception as error:  # noqa: BLE001 (for any error a user gets one line)
        sys.exit(_report(error, arguments))


def _report(error: Exception, arguments: list[str]) -> int:
    """Print an error, and return the exit code."""
    if "--debug" in arguments[:1]:
        traceback.print_exc()
    if isinstance(error, click.exceptions.NoArgsIsHelpError):  # a group without a command prints its help
        click.echo(printable_lines(error.format_message()), err=True)
        return error.exit_code
    if isinstance(error, click.exceptions.NoSuchCommand):
        error = _suggest_harmless(error)
    report = describe(error) or ErrorReport(Exit.FAILED, *_report_unexpected(error, arguments))
    print_error(report, as_json=wants_json(arguments))
    return report.exit_code


def _suggest_harmless(error: click.exceptions.NoSuchCommand) -> click.ClickException:
    """Return the same error with the closest command as a suggestion, but none of `HARMFUL`."""
    context = error.ctx
    if context is None or not isinstance(context.command, click.Group):
        return error
    harmless = [name for name in context.command.list_commands(context) if name not in HARMFUL]
    closest = get_close_matches(error.command_name, harmless, n=1)
    suggestion = f" Did you mean {closest[0]!r}?" if closest else f" Commands: {', '.join(harmless)}."
    return click.UsageError(f"No such command {error.command_name!r}.{suggestion}", ctx=context)


def _use_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding of file names.

    File names are bytes. Python would decode arguments in the locale's encoding, and could not pass some of them to
    libraries and databases, which take UTF-8.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        from thrave import programs

        programs.restart({"PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _check_utf8(arguments: list[str]) -> None:
    """Raise click's UsageError for an argument or a working directory that is not UTF-8."""
    for argument in arguments:
        if not _is_utf8(argument):
            raise click.UsageError(
                f"{argument!r} is not UTF-8. Thrave accepts names and paths in UTF-8 only. Rename the file."
            )
    with suppress(OSError):  # the working directory was removed: commands that need it fail later
        folder = str(Path.cwd())
        if not _is_utf8(folder):
            raise click.UsageError(f"the working directory {folder!r} is not UTF-8. Change to another one.")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _report_unexpected(error: Exception, arguments: list[str]) -> tuple[str, str]:
    """Write the traceback of an unexpected error to a file; return a message, and a remedy with the path.

    Messages of libraries may contain secrets, so only this user can read the file.
    """
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    message = f"unexpected error in `thrave {command}` ({type(error).__name__})"
    try:
        descriptor, path = tempfile.mkstemp(prefix="thrave-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return message, f"`thrave --debug {command} …` prints the details."
    return message, f"The details are in {path}; please report them."
