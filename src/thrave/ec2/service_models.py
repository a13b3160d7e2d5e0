"""The services that we answer for, as botocore describes them: their operations, shapes, and API versions.

The service models that ship with botocore are the only description of a request or a response in this house;
no shape is typed by hand. One is loaded when it is first asked for, and once. This module never decides which
operations are answered: that is the table `thrave.ec2.actions.ACTIONS`.
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
    """A service of AWS's.

    Attributes:
        name: botocore's and the signatures'.
        oldest_version: The first API version whose clients are answered.
    """

    name: str
    oldest_version: str

    @cached_property
    def model(self) -> ServiceModel:
        """The newest that botocore has. The first look reads it from disk (EC2's: about 0.2 s)."""
        return ServiceModel(create_loader().load_service_model(self.name, "service-2"), self.name)

    @property
    def newest_version(self) -> str:
        """The API version that the model describes; no client is known to send a later one."""
        return str(self.model.api_version)

    def operation(self, name: str) -> OperationModel:
        """Return the model of one operation, such as `BundleInstance`.

        Raises:
            botocore.model.OperationNotFoundError: The model has no operation of that name.
        """
        return self.model.operation_model(name)

    def is_known_version(self, version: str) -> bool:
        """Say whether a client's `Version` names an API that our answers fit: from the oldest to the model's own.

        EC2 has kept the members we read and write unchanged since 2008, so only the namespace of the answer differs.
        """
        good = bool(_VERSION.fullmatch(version)) and _is_date(version)
        return good and self.oldest_version <= version <= self.newest_version


# BundleInstance appeared in the API of 2008-08-08; clients of that year already sent versions of its spring.
EC2 = Service("ec2", "2008-01-01")
# The one version that STS has ever had.
STS = Service("sts", "2011-06-15")

SERVICES = (EC2, STS)


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
