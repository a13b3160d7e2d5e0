"""A client's driver: a small program in the client's own language that does one action with it.

All have one command line, and take the access key and the region from the environment as AWS's own programs do:

    DRIVER bundle   ENDPOINT INSTANCE BUCKET PREFIX POLICY SIGNATURE    {"id": …, "state": …}
    DRIVER dry-run  ENDPOINT INSTANCE BUCKET PREFIX POLICY SIGNATURE    {"error": "DryRunOperation"}
    DRIVER describe ENDPOINT PREFIX                                     {"tasks": [{"id": …, "state": …}, …]}
    DRIVER wait     ENDPOINT BUNDLE-ID                                  {"id": …, "state": …}
    DRIVER cancel   ENDPOINT BUNDLE-ID                                  {"id": …, "state": …}
    DRIVER version  ENDPOINT                                            {"version": …}

POLICY is the upload policy's JSON; a client that signs it itself (or makes it) lets SIGNATURE be. `describe` filters by
`s3-prefix`. The answer is one JSON object on standard output. An error of the service is an answer too, with the code
as the client gives it: {"error": code}. Anything else that goes wrong ends the driver with its own words and a status.
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
        """Do an action; give the driver's answer."""
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
        """Nothing of ours: whoever runs the tests may have credentials and settings for AWS."""
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
