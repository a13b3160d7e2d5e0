"""Drivers of the clients: small programs in the client's language that perform one action.

All have the same command line, and read access key and region from the environment, as the AWS tools do:

    DRIVER bundle   ENDPOINT INSTANCE BUCKET PREFIX POLICY SIGNATURE    {"id": …, "state": …}
    DRIVER dry-run  ENDPOINT INSTANCE BUCKET PREFIX POLICY SIGNATURE    {"error": "DryRunOperation"}
    DRIVER describe ENDPOINT PREFIX                                     {"tasks": [{"id": …, "state": …}, …]}
    DRIVER wait     ENDPOINT BUNDLE-ID                                  {"id": …, "state": …}
    DRIVER cancel   ENDPOINT BUNDLE-ID                                  {"id": …, "state": …}
    DRIVER version  ENDPOINT                                            {"version": …}

POLICY is the JSON of the upload policy. A client that creates or signs the policy itself ignores SIGNATURE. `describe`
filters by `s3-prefix`. The result is one JSON object on stdout. For an error of the service the result is
{"error": code}, with the code that the client reports. After any other error the driver prints a message and fails.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clients.kits import Command
from thrave.identity.accounts import AccessKey
from thrave.testing import REGION

TIMEOUT = 90  # seconds
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Driver:
    """A driver that is ready to run, for one endpoint and access key."""

    command: Command
    endpoint: str
    key: AccessKey
    home: str

    def __call__(self, action: str, *arguments: str) -> Mapping[str, Any]:
        """Perform an action; return the driver's result."""
        done = subprocess.run(
            [*self.command.arguments, action, self.endpoint, *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, f"{action}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def _environment(self) -> dict[str, str]:
        """Return an environment without the AWS settings of the account that runs the tests."""
        return {
            "PATH": SYSTEM_PATH,
            "HOME": self.home,
            "AWS_ACCESS_KEY_ID": self.key.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.key.secret_access_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.command.environment,
        }
