"""`thrave serve`: the whole service in one process; `thrave api` and `thrave agent`: the same for a fleet."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.options import DataFolder, make_files_private, quick_imports, read_settings
from thrave.cli.output import output_option, print_result

if TYPE_CHECKING:
    from thrave.config import Settings


class _Log:
    """How the last line of the log is written."""

    json = False


_log = _Log()
DATA_DIR = click.option(
    "-d", "--data-dir", type=DataFolder(), metavar="DIR", help="Database, keys, instances and buckets."
)
LISTEN_ADDRESS = click.option("--listen-address", help="IP address or host name to listen on.  [default: 127.0.0.1]")
LISTEN_PORT = click.option(
    "-p", "--listen-port", type=int, help="TCP port to listen on; 0: any free port.  [default: 8773]"
)
CONFIG = click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings, as TOML."
)


@click.command()
@DATA_DIR
@LISTEN_ADDRESS
@LISTEN_PORT
@CONFIG
@output_option
def serve(
    data_dir: Path | None, listen_address: str | None, listen_port: int | None, config: Path | None, output: str
) -> None:
    """Answer EC2 clients: API, worker and store in one process.

    Prints `listening on URL` once it answers. SIGTERM stops it; a bundle task under way goes on at the next start.
    Every setting may also be given in the environment (THRAVE_DATA_DIR, THRAVE_LISTEN_PORT, …) or in the --config file.
    On any address but loopback the settings tls_certificate_file and tls_key_file are required.

    \b
    Example:
      thrave serve --data-dir /var/lib/thrave --listen-port 8773
      aws --endpoint-url http://127.0.0.1:8773 ec2 describe-bundle-tasks

    Exit codes: 0 stopped, 1 the address, certificate, database or vault's key cannot be used, 2 a setting is wrong, 4 a
    service runs on the data directory already, or it would be plain HTTP where others can read it, 30 the drain was
    ended while the service drained: start it again, 75 another process is this host's agent now.
    """
    _stop_on_signals()
    make_files_private()
    settings = _settings(config, data_dir=data_dir, listen_address=listen_address, listen_port=listen_port)
    with quick_imports():
        from thrave import server

    server.serve(settings, lambda url: print_result(output, {"listening": url}, f"listening on {url}"))
    _end()


@click.command()
@DATA_DIR
@LISTEN_ADDRESS
@LISTEN_PORT
@CONFIG
@output_option
def api(
    data_dir: Path | None, listen_address: str | None, listen_port: int | None, config: Path | None, output: str
) -> None:
    """Answer EC2 clients for a fleet; any number of these may run.

    The hosts' agents (`thrave agent`) do the tasks. All share one PostgreSQL, the setting database_url. The data
    directory needs a copy of vault.key and service/ of the process that was started first.

    \b
    Example:
      THRAVE_DATABASE_URL=postgresql://thrave@db.example/thrave thrave api --data-dir /var/lib/thrave

    Exit codes: 0 stopped, 1 the address, certificate, database or vault's key cannot be used, 2 a setting is wrong, 4
    it would be plain HTTP where others can read it.
    """
    _stop_on_signals()
    make_files_private()
    settings = _settings(config, data_dir=data_dir, listen_address=listen_address, listen_port=listen_port)
    _require_fleet(settings, "api")
    with quick_imports():
        from thrave import server

    server.serve_api(settings, lambda url: print_result(output, {"listening": url}, f"listening on {url}"))
    _end()


@click.command()
@click.option("--host-id", help="ID of this hypervisor host. Required unless the setting host_id is set.")
@DATA_DIR
@CONFIG
@output_option
def agent(host_id: str | None, data_dir: Path | None, config: Path | None, output: str) -> None:
    """Do the bundle tasks of a hypervisor host; one of these runs on each.

    Prints `working as NAME` once it does. SIGTERM stops it; a bundle task under way goes on at the next start. `thrave
    host drain NAME` has it finish what it has begun, and end. An agent that is started under the name of another one
    takes its place, and the other one ends.

    \b
    Example:
      THRAVE_DATABASE_URL=postgresql://thrave@db.example/thrave thrave agent --host-id kvm-17 -d /var/lib/thrave

    Exit codes: 0 stopped or drained, 1 the database or the vault's key cannot be used, 2 a setting is wrong, 30 the
    drain was ended while the agent drained: start it again, 75 another process is this host's agent now, or another
    host has adopted its tasks.
    """
    _stop_on_signals()
    make_files_private()
    settings = _settings(config, data_dir=data_dir, host_id=host_id)
    _require_fleet(settings, "agent")
    if "host_id" not in settings.model_fields_set:
        raise click.UsageError(
            "thrave agent needs the ID of its host: pass --host-id ID, or set host_id. An agent that ran without an ID "
            "used localhost."
        )
    with quick_imports():
        from thrave import server

    server.run_agent(
        settings, lambda: print_result(output, {"working": settings.host_id}, f"working as {settings.host_id}")
    )
    _end()


def _settings(config: Path | None, **given: object) -> Settings:
    settings = read_settings(config, **given)
    with quick_imports():
        from thrave.logs import configure_logs

    _log.json = settings.log_format == "json"
    configure_logs(settings.log_format)
    return settings


def _require_fleet(settings: Settings, command: str) -> None:
    """Raise click's UsageError without the database that a fleet's processes share."""
    if settings.database_url is None:
        raise click.UsageError(
            f"thrave {command} is a process of a fleet and needs the setting database_url: "
            "postgresql://USER@HOST/NAME. On one machine run: thrave serve"
        )


def _stop_on_signals() -> None:
    """End at SIGTERM, SIGINT and SIGHUP, at any moment of the start.

    While the server runs, uvicorn answers the requests under way first; then it raises the signal again. SIGHUP is left
    alone where it is ignored already (nohup).
    """
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hang_up)


def _hang_up(_number: int, _frame: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def _stop(_number: int, _frame: object) -> None:
    _end()


def _end() -> None:
    """End as if killed: there is one way to come back."""
    pid = os.getpid()
    line = f'{{"event": "stopped", "level": "info", "pid": {pid}}}' if _log.json else f"thrave: stopped (process {pid})"
    # A signal may have interrupted the logger, whose lock must not be waited for here. Or nobody reads any more.
    with suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
    os._exit(Exit.OK)
