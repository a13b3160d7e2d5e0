"""The `thrave` command: the list of its commands, and how an error becomes an exit code.

Each command lives in a module of its own that is imported when the command is run, so that `thrave --help` is quick.
An error that a room foresaw is one line on stderr and a code from `cli/exits.py`, never a traceback.
"""

import importlib
import sys

import click

from thrave.cli.exits import Exit

# command -> module and attribute. The order is the order of `thrave --help`.
COMMANDS: dict[str, str] = {
    "demo": "thrave.cli.demo:demo",
    "demo-disk": "thrave.cli.demo:demo_disk",
    "doctor": "thrave.cli.doctor:doctor",
    "serve": "thrave.cli.serve:serve",
    "api": "thrave.cli.serve:api",
    "agent": "thrave.cli.serve:agent",
    "account": "thrave.cli.accounts:account",
    "instance": "thrave.cli.instances:instance",
    "task": "thrave.cli.tasks:task",
    "host": "thrave.cli.hosts:host",
    "bundle": "thrave.cli.bundles:bundle",
    "open": "thrave.cli.opening:open_",
    "verify": "thrave.cli.opening:verify",
    "show": "thrave.cli.opening:show",
    "copy": "thrave.cli.copying:copy",
    "delete": "thrave.cli.deleting:delete",
    "migrate": "thrave.cli.migrating:migrate",
}

# The errors that the rooms foresee, by name so that none is imported before it can have been raised; the first
# that fits decides.
EXITS: tuple[tuple[str, Exit], ...] = (
    ("thrave.bundle.errors:WrongKeyError", Exit.WRONG_KEY),
    ("thrave.bundle.errors:DamagedError", Exit.DAMAGED),
    ("thrave.bundle.errors:PartMissingError", Exit.NOT_FOUND),
    ("thrave.bundle.errors:NamingError", Exit.USAGE),
    ("thrave.bundle.errors:BundleError", Exit.FAILED),
    ("thrave.cli.folders:FileMissingError", Exit.NOT_FOUND),
    ("thrave.cli.folders:FolderRefusedError", Exit.REFUSED),
    ("thrave.cli.folders:FolderError", Exit.FAILED),
    ("thrave.identity.errors:NoSuchEntity", Exit.NOT_FOUND),
    ("thrave.identity.errors:EntityAlreadyExists", Exit.REFUSED),
    ("thrave.identity.errors:LimitExceeded", Exit.REFUSED),
    ("thrave.identity.errors:IdentityError", Exit.FAILED),
    ("thrave.vault:VaultError", Exit.FAILED),
    ("thrave.tasks.requests:BundleTaskNotFound", Exit.NOT_FOUND),
    ("thrave.tasks.requests:BundleTaskError", Exit.REFUSED),
    ("thrave.tasks.hosts:NoSuchHost", Exit.NOT_FOUND),
    ("thrave.tasks.hosts:HostError", Exit.REFUSED),
    ("sqlalchemy.exc:OperationalError", Exit.FAILED),
    ("thrave.buckets.errors:BucketError", Exit.FAILED),
    ("thrave.compute.errors:InstanceNotFound", Exit.NOT_FOUND),
    ("thrave.compute.errors:InstanceCommandFailed", Exit.FAILED),
    ("thrave.compute.errors:InvalidDescriptionError", Exit.FAILED),
    ("thrave.compute.errors:ComponentMissingError", Exit.MISSING_COMPONENT),
    ("thrave.compute.errors:HypervisorError", Exit.FAILED),
    ("thrave.compute.errors:InstanceError", Exit.REFUSED),
    ("thrave.volumes.errors:ComponentMissingError", Exit.MISSING_COMPONENT),
    ("thrave.volumes.errors:VolumeError", Exit.FAILED),
    ("thrave.listening:PlainHttpRefused", Exit.REFUSED),
    ("thrave.listening:ListeningError", Exit.FAILED),
    ("thrave.demo.disk:DemoDiskError", Exit.USAGE),
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
def thrave() -> None:
    """EC2's BundleInstance for your own hypervisors and any S3-compatible bucket.

    \b
    Example:
      thrave demo            see the whole of it work on real data
      thrave serve           answer boto3, the AWS CLI and other EC2 clients
    """


def main() -> None:
    """Run the command line and leave with one of the codes of `Exit`."""
    try:
        thrave.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(Exit.INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        click.echo(f"thrave: {error}", err=True)
        sys.exit(code)


def exit_code(error: Exception) -> Exit | None:
    """The code for an error that a room foresaw, None for one that nobody did."""
    for name, code in EXITS:
        module, _, attribute = name.partition(":")
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], attribute)):
            return code
    return None
