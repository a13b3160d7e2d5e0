"""The `thrave` command: the list of its commands, and how an error becomes an exit code.

Each command lives in a module of its own that is imported when the command is run, so that `thrave --help` is quick.
An error is one line on stderr and a code from `cli/exit_codes.py`. The traceback of an unexpected one goes to a file,
or to
stderr with `--debug`.
"""

import errno
import importlib
import io
import os
import sys
import tempfile
import traceback
from contextlib import suppress
from difflib import get_close_matches

import click

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
    "bundle": "thrave.cli.bundle_command:bundle",
    "open": "thrave.cli.open_commands:open_",
    "verify": "thrave.cli.open_commands:verify",
    "show": "thrave.cli.open_commands:show",
    "copy": "thrave.cli.manage_commands:copy",
    "delete": "thrave.cli.manage_commands:delete",
    "migrate": "thrave.cli.manage_commands:migrate",
    "help": "thrave.cli.main:help_",
}

# What takes something away or stops something is never suggested for a misspelled name.
HARMFUL = {"adopt", "cancel", "delete", "disown", "drain", "migrate", "remove", "retire", "stop"}

# Expected errors, by name so that none is imported before it can have been raised; the first that fits decides.
EXITS: tuple[tuple[str, Exit], ...] = (
    ("thrave.bundle.errors:WrongKeyError", Exit.WRONG_KEY),
    ("thrave.bundle.errors:DamagedError", Exit.DAMAGED),
    ("thrave.bundle.errors:PartMissingError", Exit.NOT_FOUND),
    ("thrave.bundle.errors:NamingError", Exit.USAGE),
    ("thrave.bundle.errors:OutputExistsError", Exit.REFUSED),
    ("thrave.bundle.errors:BundleError", Exit.FAILED),
    ("thrave.cli.folders:FileMissingError", Exit.NOT_FOUND),
    ("thrave.cli.folders:FolderRefusedError", Exit.REFUSED),
    ("thrave.cli.folders:FolderError", Exit.FAILED),
    ("thrave.identity.errors:NoSuchEntity", Exit.NOT_FOUND),
    ("thrave.identity.errors:EntityAlreadyExists", Exit.REFUSED),
    ("thrave.identity.errors:LimitExceeded", Exit.REFUSED),
    ("thrave.identity.errors:IdentityError", Exit.FAILED),
    ("thrave.vault:VaultError", Exit.FAILED),
    ("thrave.tasks.errors:BundleTaskNotFound", Exit.NOT_FOUND),
    ("thrave.tasks.errors:BundleTaskError", Exit.REFUSED),
    ("thrave.tasks.errors:NoSuchHost", Exit.NOT_FOUND),
    ("thrave.tasks.errors:HostError", Exit.REFUSED),
    ("thrave.config:SettingsError", Exit.USAGE),
    ("thrave.files:OpenToOthersError", Exit.FAILED),
    ("thrave.database:DatabaseUnusableError", Exit.FAILED),
    ("thrave.components:DataDirectoryInUseError", Exit.REFUSED),
    ("thrave.components:DataDirectoryError", Exit.FAILED),
    ("thrave.buckets.errors:BucketError", Exit.FAILED),
    ("thrave.compute.errors:InstanceNotFound", Exit.NOT_FOUND),
    ("thrave.compute.errors:InstanceCommandFailed", Exit.FAILED),
    ("thrave.compute.errors:InvalidDescriptionError", Exit.FAILED),
    ("thrave.compute.errors:LibraryNotInstalled", Exit.MISSING_COMPONENT),
    ("thrave.compute.errors:HypervisorError", Exit.FAILED),
    ("thrave.compute.errors:InstanceError", Exit.REFUSED),
    ("thrave.volumes.errors:ToolNotInstalled", Exit.MISSING_COMPONENT),
    ("thrave.volumes.errors:VolumeError", Exit.FAILED),
    ("thrave.http_server:PlainHttpNotAllowed", Exit.REFUSED),
    ("thrave.http_server:ListeningError", Exit.FAILED),
    ("thrave.demo.disk:DemoDiskError", Exit.USAGE),
    ("thrave.demo.tour:DemoError", Exit.FAILED),
    ("thrave.testing:ServerError", Exit.FAILED),
    ("thrave.testing:ComponentMissingError", Exit.MISSING_COMPONENT),
)


class _Commands(click.Group):
    """A group whose commands are imported when they are wanted."""

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
    """EC2's BundleInstance for your own hypervisors and any S3-compatible bucket.

    \b
    Example:
      thrave demo            see the whole of it work on real data
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
    """Run the command line and leave with one of the codes of `Exit`."""
    _use_utf8()
    words = sys.argv[1:]
    try:
        _check_utf8(words)
        thrave.main(standalone_mode=False)
    except click.exceptions.NoSuchCommand as error:
        _fail(_without_harm(error))
    except click.ClickException as error:
        _fail(error)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:  # `| head` has ended; the interpreter must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)
    except Exception as error:  # noqa: BLE001 (whatever it is, a user gets one line)
        if "--debug" in words[:1]:
            traceback.print_exc()
        code = exit_code(error)
        if code is not None:
            text = str(error)
        elif isinstance(error, OSError) and (told := _os_error(error)):
            code, text = told
        else:
            code, text = Exit.FAILED, _unexpected(error, words)
        click.echo(f"thrave: {printable_lines(text)}", err=True)
        sys.exit(code)


def _fail(error: click.ClickException) -> None:
    said = io.StringIO()
    error.show(said)
    click.echo(printable_lines(said.getvalue()), nl=False, err=True)
    sys.exit(error.exit_code)


def _without_harm(error: click.exceptions.NoSuchCommand) -> click.ClickException:
    """The same error, suggesting the closest commands, but none that does harm if it is run instead."""
    context = error.ctx
    if context is None or not isinstance(context.command, click.Group):
        return error
    harmless = [name for name in context.command.list_commands(context) if name not in HARMFUL]
    closest = get_close_matches(error.command_name, harmless, n=1)
    suggestion = f" Did you mean {closest[0]!r}?" if closest else f" Commands: {', '.join(harmless)}."
    return click.UsageError(f"No such command {error.command_name!r}.{suggestion}", ctx=context)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where a locale asks for another encoding of names.

    Names of files are bytes. Python would read those of the command line in the locale's encoding, and could not hand
    some of them to libraries and databases, which take UTF-8.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        from thrave import programs

        programs.restart({"PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _check_utf8(words: list[str]) -> None:
    """Refuse names that are not UTF-8, whichever command they are for. Raises click's UsageError."""
    for word in words:
        if not _is_utf8(word):
            raise click.UsageError(
                f"{word!r} is not UTF-8. Thrave takes names and paths in UTF-8 only; rename the file."
            )
    with suppress(OSError):  # a working directory that was removed is for whoever needs it to complain of
        folder = os.getcwd()  # noqa: PTH109 (Path.cwd says no more)
        if not _is_utf8(folder):
            raise click.UsageError(f"the working directory {folder!r} is not UTF-8. Change to another one.")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _os_error(error: OSError) -> tuple[Exit, str] | None:
    """The code and the words of a refusal by the operating system; None if it does not say what was refused."""
    if error.errno is None:
        return None
    reason = os.strerror(error.errno)
    if error.filename is None:
        return (Exit.FAILED, f"{reason}. Make room.") if error.errno == errno.ENOSPC else None
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    if isinstance(error, FileNotFoundError):
        return Exit.NOT_FOUND, f"{name} does not exist"
    if isinstance(error, PermissionError):
        from thrave.files import user

        return (
            Exit.FAILED,
            f"{name}: {reason.lower()} for user {user()}. Check the owner and mode of it and its folder.",
        )
    return Exit.FAILED, f"{name}: {reason.lower()}"


def _unexpected(error: Exception, words: list[str]) -> str:
    """Keep the traceback of an error that nobody expected in a file; say where it is.

    Libraries' messages are not for users, and may hold what is secret, so the file is this user's alone.
    """
    command = next((word for word in words if word in COMMANDS), "")
    said = f"unexpected error in `thrave {command}` ({type(error).__name__})"
    try:
        descriptor, path = tempfile.mkstemp(prefix="thrave-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return f"{said}. `thrave --debug {command} …` prints the details."
    return f"{said}. The details are in {path}; please report them."


def exit_code(error: Exception) -> Exit | None:
    """The code for an error that a room foresaw, None for one that nobody did."""
    for name, code in EXITS:
        module, _, attribute = name.partition(":")
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], attribute)):
            return code
    return None
