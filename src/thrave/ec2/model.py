"""EC2 as botocore describes it: which operations there are, their shapes, and the API versions we speak.

The service model that ships with botocore is the only description of a request or a response in this house;
no shape is typed by hand. It is loaded when it is first asked for, and once. This module never decides which
operations are answered: that is the table `thrave.ec2.actions.ACTIONS`.
"""

import re
from datetime import date
from functools import cache

from botocore.loaders import create_loader
from botocore.model import OperationModel, ServiceModel

# BundleInstance appeared in the API of 2008-08-08; clients of that year already sent versions of its spring.
OLDEST_VERSION = "2008-01-01"
_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@cache
def service_model() -> ServiceModel:
    """Return botocore's newest model of EC2. The first call reads it from disk (about 0.2 s)."""
    return ServiceModel(create_loader().load_service_model("ec2", "service-2"), "ec2")


@cache
def operation(name: str) -> OperationModel:
    """Return the model of one operation, such as `BundleInstance`.

    Raises:
        botocore.model.OperationNotFoundError: The model has no operation of that name.
    """
    return service_model().operation_model(name)


@cache
def newest_version() -> str:
    """Return the API version that the model describes; no EC2 client is known to send a later one."""
    return str(service_model().api_version)


def is_known_version(version: str) -> bool:
    """Say whether a client's `Version` names an API that our answers fit: from 2008 to the model's own.

    EC2 has kept the members we read and write unchanged since then, so only the namespace of the answer differs.
    """
    return bool(_VERSION.fullmatch(version)) and _is_date(version) and OLDEST_VERSION <= version <= newest_version()


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
