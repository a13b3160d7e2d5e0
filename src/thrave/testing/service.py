"""`ThraveService`: a service for all tests of a session, with accounts, faults and a clock that a test controls."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from typing import Any, ClassVar

from thrave import programs
from thrave.concurrency import random_hex
from thrave.identity.accounts import AccessKey, Account
from thrave.testing.account import ServiceAccount
from thrave.testing.command_pipe import CommandPipe
from thrave.testing.server import ComponentMissingError, ThraveServer

_SETTING = "THRAVE_"

# Quick failures for tests. Tasks that a test holds occupy a worker each.
_DEFAULTS = {"s3_retry_timeout": 1, "shutdown_timeout": 10, "worker_concurrency": 20}


@dataclass
class ThraveService(ThraveServer):
    """A Thrave service with a store in memory, in a process of its own. One is enough for all tests.

    The store is moto's S3 in the same process; `s3_url` is its URL. Requests have no time limit: their signatures may
    have any date. All other settings and checks are those of `thrave serve`.
    """

    command: ClassVar[str] = "test service"

    s3_url: str = ""
    commands: CommandPipe = field(init=False, repr=False)
    """For `ServiceAccount` and `ServiceClock`."""

    def start(self) -> None:
        """Start the service and wait until it accepts requests.

        Raises:
            ComponentMissingError: moto or boto3 is not installed.
            ServerError: The service did not start.
        """
        if missing := [name for name in ("boto3", "moto", "flask", "flask_cors") if find_spec(name) is None]:
            raise ComponentMissingError(f"{missing[0]} is not installed: pip install 'thrave[testing]'")
        super().start()
        assert self.process is not None
        self.commands = CommandPipe(self.process, lambda: "".join(self._log).strip())
        self.s3_url = self.commands.send("s3_url")

    def _launch(self, _arguments: Sequence[str], environment: Mapping[str, str], stderr: int) -> programs.ServerProcess:
        given = {
            name.removeprefix(_SETTING).lower(): value
            for name, value in self.environment.items()
            if name.startswith(_SETTING)
        }
        settings = json.dumps({**_DEFAULTS, **given, "listen_port": 0})
        program = [sys.executable, "-m", "thrave.testing.service_process", str(self.data.root), settings]
        return programs.start_server(program, environment, stderr=stderr, has_input=True)

    def account(self, name: str, certificate: str | None = None) -> tuple[Account, AccessKey]:
        """Create an account and its first access key; `certificate` is PEM."""
        created = self.commands.send("new_account", name, certificate)
        account, key = ({**created[part]} for part in ("account", "key"))
        for part in (account, key):
            part["create_date"] = datetime.fromisoformat(part["create_date"])
        return Account(**account), AccessKey(**key)

    def new_account(self, name: str | None = None) -> ServiceAccount:
        """Create an account with an access key.

        Args:
            name: Not the name of an existing account. None: a new name.
        """
        account, key = self.account(name or f"test-{random_hex(8)}")
        return ServiceAccount(self, account.account_id, key)

    def client(self, key: AccessKey, service: str = "ec2", **options: Any) -> Any:  # noqa: ANN401 (boto3 ships no types)
        """Return an unmodified boto3 client for EC2, `s3` or `sts`; `options` are those of `boto3.client`."""
        given = {"endpoint_url": self.s3_url} if service == "s3" else {}
        return super().client(key, service, **{**given, **options})

    def inject(self, fault: str, **options: object) -> None:
        """Inject a fault, until `reset`.

        Args:
            fault: A name of the table of faults (docs/reference/test-faults.md).
            options: Those of the fault.

        Raises:
            ValueError: Unknown fault or option.
        """
        self.commands.send("inject", fault, options)

    def fault_counts(self) -> dict[str, int]:
        """Return how often each fault was injected since the last `reset`, by name."""
        return {str(name): int(count) for name, count in self.commands.send("fault_counts").items()}

    def reset(self) -> None:
        """Remove all faults, let tasks and uploads continue, and start the clock again."""
        self.commands.send("reset")
