"""`thrave serve`: the whole service in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thrave.cli.exits import Exit
from thrave.cli.output import emit, output_option

if TYPE_CHECKING:
    from thrave.config import Settings


@click.command()
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Where the service keeps everything.")
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="The port to listen on; 0 takes a free one.  [default: 8773]")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings, as TOML.")
@output_option
def serve(data: Path | None, host: str | None, port: int | None, config: Path | None, output: str) -> None:
    """Answer EC2 clients: API, worker and store in one process.

    Prints `listening on URL` once it answers. SIGTERM stops it; a bundle task under way goes on at the next start.
    Every setting may also be given in the environment (THRAVE_DATA, THRAVE_PORT, …) or in the --config file. On any
    address but loopback the settings tls_certificate and tls_key are needed.

    \b
    Example:
      thrave serve --data /var/lib/thrave --port 8773
      aws --endpoint-url http://127.0.0.1:8773 ec2 describe-bundle-tasks

    Exit codes: 0 stopped, 1 the address or certificate cannot be used, 2 a setting is wrong, 4 it would be plain HTTP
    where others can read it.
    """
    from pydantic import ValidationError

    from thrave.config import load_settings

    try:
        settings = load_settings(config, data=data, host=host, port=port)
    except ValidationError as error:
        raise click.UsageError(str(error)) from None
    _run(settings, output)


def _run(settings: Settings, output: str) -> None:
    from thrave import endpoint
    from thrave.logs import configure_logs

    configure_logs(settings.log_format)
    endpoint.serve(settings, lambda url: emit(output, {"listening": url}, f"listening on {url}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Exit.OK)
