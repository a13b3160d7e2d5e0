"""`thrave serve` (the whole service in one process), `thrave api` and `thrave agent` (the processes of a fleet)."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.exit_codes import Exit
from thrave.cli.options import DataFolder, ExistingPath, make_files_private, quick_imports, read_settings
from thrave.cli.output import output_option, print_result

if TYPE_CHECKING:
    from thrave.config import Settings


class _Log:
    """Format of the last log line, which is written without the logger."""

    json = False


_log = _Log()
DATA_DIR = click.option(
    "-d", "--data-dir", type=DataFolder(), metavar="DIR", help="Database, keys, instances and buckets."
)
LISTEN_ADDRESS = click.option("--listen-address", help="IP address or host name to listen on.  [default: 127.0.0.1]")
LISTEN_PORT = click.option(
    "-p", "--listen-port", type=int, help="TCP port to listen on; 0: any free port.  [default: 8773]"
)
LOG_FORMAT = click.option(
    "--log-format", type=click.Choice(["text", "json"]), help="Format of the log on stderr.  [default: text]"
)
CONFIG = click.option("--config", type=ExistingPath(dir_okay=False, path_type=Path), help="Settings file (TOML).")


@click.command(short_help="Run EC2 API and worker on one machine, in one process.")
@DATA_DIR
@LISTEN_ADDRESS
@LISTEN_PORT
@CONFIG
@LOG_FORMAT
@output_option
def serve(
    *,
    data_dir: Path | None,
    listen_address: str | None,
    listen_port: int | None,
    config: Path | None,
    log_format: str | None,
    output: str,
) -> None:
    """Run the service on one machine: EC2 API, worker and store in one process.

    Prints `listening on URL` when it accepts requests. SIGTERM stops it; a running bundle task resumes at the next
    start. Every setting can also be given in the environment (THRAVE_DATA_DIR, THRAVE_LISTEN_PORT, …) or in the
    --config file. On any address but loopback the settings tls_certificate_file and tls_key_file are required.

    \b
    Example:
      thrave serve --data-dir /var/lib/thrave --listen-port 8773
      aws --endpoint-url http://127.0.0.1:8773 ec2 describe-bundle-tasks

    Exit codes: 0 stopped, 1 the address, certificate, database or vault key cannot be used, 2 a setting is wrong, 3 the
    settings file does not exist, 4 another service uses the data directory, no permission, or plain HTTP on a public
    address, 30 the drain was ended while the service drained: start it again, 75 another process is now the agent of
    this host.
    """
    _stop_on_signals()
    make_files_private()
    settings = _load_settings(
        config, data_dir=data_dir, listen_address=listen_address, listen_port=listen_port, log_format=log_format
    )
    with quick_imports():
        from thrave import server

    server.serve(settings, lambda url: print_result(output, {"listening": url}, f"listening on {url}"))
    _end()


@click.command()
@DATA_DIR
@LISTEN_ADDRESS
@LISTEN_PORT
@CONFIG
@LOG_FORMAT
@output_option
def api(
    *,
    data_dir: Path | None,
    listen_address: str | None,
    listen_port: int | None,
    config: Path | None,
    log_format: str | None,
    output: str,
) -> None:
    """Run an API process of a fleet. Any number of them can run.

    The agents of the hosts (`thrave agent`) run the tasks. All processes share one PostgreSQL, the setting
    database_url. The data directory needs a copy of vault.key and service/ of the process that was started first.

    \b
    Example:
      THRAVE_DATABASE_URL=postgresql://thrave@db.example/thrave thrave api --data-dir /var/lib/thrave

    Exit codes: 0 stopped, 1 the address, certificate, database or vault key cannot be used, 2 a setting is wrong, 3 the
    settings file does not exist, 4 no permission, or plain HTTP on a public address.
    """
    _stop_on_signals()
    make_files_private()
    settings = _load_settings(
        config, data_dir=data_dir, listen_address=listen_address, listen_port=listen_port, log_format=log_format
    )
    _require_fleet(settings, "api")
    with quick_imports():
        from thrave import server

    server.serve_api(settings, lambda url: print_result(output, {"listening": url}, f"listening on {url}"))
    _end()


@click.command(short_help="Run the agent of a host, which runs its bundle tasks.")
@click.option("--host-id", help="ID of this hypervisor host. Required unless the setting host_id is set.")
@DATA_DIR
@CONFIG
@LOG_FORMAT
@output_option
def agent(host_id: str | None, data_dir: Path | None, config: Path | None, log_format: str | None, output: str) -> None:
    """Run the agent of a hypervisor host, which runs the host's bundle tasks. One agent runs on each host.

    Prints `working as ID` when it has started. SIGTERM stops it; a running bundle task resumes at the next start.
    After `thrave host drain ID` the agent finishes the tasks that it has begun, and exits. An agent that starts with
    the ID of a running agent replaces it, and the other agent exits.

    \b
    Example:
      THRAVE_DATABASE_URL=postgresql://thrave@db.example/thrave thrave agent --host-id kvm-17 -d /var/lib/thrave

    Exit codes: 0 stopped or drained, 1 the database or the vault key cannot be used, 2 a setting is wrong, 3
    the settings file does not exist, 4 no permission, 30 the drain was ended while the agent drained: start it again,
    75 another process is now the agent of this host, or another host has adopted its tasks.
    """
    _stop_on_signals()
    make_files_private()
    settings = _load_settings(config, data_dir=data_dir, host_id=host_id, log_format=log_format)
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


def _load_settings(config: Path | None, **given: object) -> Settings:
    settings = read_settings(config, **given)
    with quick_imports():
        from thrave.logs import configure_logs

    _log.json = settings.log_format == "json"
    configure_logs(settings.log_format)
    return settings


def _require_fleet(settings: Settings, command: str) -> None:
    """Raise click's UsageError without a database that all processes of a fleet share."""
    if settings.database_url is None:
        raise click.UsageError(
            f"thrave {command} is a process of a fleet and needs the setting database_url: "
            "postgresql://USER@HOST/NAME. On one machine run: thrave serve"
        )


def _stop_on_signals() -> None:
    """Exit on SIGTERM, SIGINT and SIGHUP, also during the start.

    While the server runs, uvicorn first finishes the current requests and then raises the signal again. SIGHUP stays
    ignored if it is ignored already (nohup).
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
    """Exit as if killed, so that every start recovers in the same way."""
    pid = os.getpid()
    line = f'{{"event": "stopped", "level": "info", "pid": {pid}}}' if _log.json else f"thrave: stopped (process {pid})"
    # Not through the logger: the signal may have interrupted it while it holds its lock. stderr may be closed.
    with suppress(OSError, RuntimeError, ValueError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
    os._exit(Exit.OK)
