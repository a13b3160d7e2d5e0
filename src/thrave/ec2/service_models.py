"""botocore's models of the supported services: operations, shapes and API versions.

They are the only description of requests and responses in Thrave. Each is loaded once, when it is first used. Which
operations are supported is decided by the table `thrave.ec2.actions.ACTIONS`.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property

from botocore.loaders import create_loader
from botocore.model import OperationModel, ServiceModel

_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Service:
    """A service of AWS.

    Attributes:
        name: Name in botocore and in signatures.
        oldest_version: The first supported API version.
    """

    name: str
    oldest_version: str

    @cached_property
    def model(self) -> ServiceModel:
        """The newest model in botocore. The first use reads it from disk (EC2's in about 0.2 s)."""
        return ServiceModel(create_loader().load_service_model(self.name, "service-2"), self.name)

    @property
    def newest_version(self) -> str:
        """The API version of the model. No client is known to send a later one."""
        return str(self.model.api_version)

    def operation(self, name: str) -> OperationModel:
        """Return the model of one operation, such as `BundleInstance`.

        Raises:
            botocore.model.OperationNotFoundError: The model has no operation of that name.
        """
        return self.model.operation_model(name)

    def is_known_version(self, version: str) -> bool:
        """Whether a client's `Version` is supported: a date from the oldest version to that of the model.

        EC2 has not changed the supported members since 2008, so only the namespace of the response differs.
        """
        if not _VERSION.fullmatch(version):
            return False
        try:
            date.fromisoformat(version)
        except ValueError:
            return False
        return self.oldest_version <= version <= self.newest_version


# BundleInstance is new in version 2008-08-08; clients of that year also sent versions of that spring.
EC2 = Service("ec2", "2008-01-01")
# STS has only this version.
STS = Service("sts", "2011-06-15")

SERVICES = (EC2, STS)
