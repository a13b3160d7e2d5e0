"""What the front door leads to, and who comes through it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from thrave.buckets.base import ObjectStore
from thrave.compute.base import InstanceInventory
from thrave.compute.instance import Instance
from thrave.compute.power import PowerControl
from thrave.database import utc_now
from thrave.ec2.rate import RateLimit
from thrave.identity.accounts import Accounts, KeyCache, User
from thrave.tasks.task_service import BundleTaskService


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who signed a request.

    Attributes:
        account_id: Whose key it is.
        access_key_id: The key.
        user: Whose key it is, if it is not the account's own.
        endpoint: The host, and the port if one was given, that the request was sent to.
        source_ip: Where the request came from, as the server tells it; None if it cannot.
        secure_transport: Whether it came over TLS.
    """

    account_id: str
    access_key_id: str
    user: User | None = None
    endpoint: str = ""
    source_ip: str | None = None
    secure_transport: bool = False


def account_may_do_all(caller: Caller, _action: str, _resource: str) -> bool:
    """Allow every action to an account's own access key, as IAM does, and none to a user's."""
    return caller.user is None


@dataclass(frozen=True, kw_only=True)
class Door:
    """The rooms behind the front door, and the settings that change its answers.

    Attributes:
        accounts: Whose keys sign requests and upload policies.
        instances: What can be bundled.
        buckets: Where bundles go.
        tasks: The bundle tasks.
        power: Starts and restarts that no caller waits for.
        rate: How many requests of an account are answered.
        region: The one region that there is.
        any_platform: Bundle instances that are not Windows, too. EC2 does not.
        existing_bundle: Whether a request for a prefix under which the bucket has a bundle is refused.
        version_2: Whether signature version 2 is accepted.
        recent_keys: Keys of `accounts` that have just signed a request.
        may: Whether a caller may do an action, such as `ec2:BundleInstance`, on a resource (an ARN, or `NO_RESOURCE`).
        store_trouble: What is known to be wrong with the store, in words for a caller; None if nothing is.
        volume_trouble: Why the root volume of an instance cannot be bundled, in words for a caller; None if nothing is
            known.
        now: The clock.
    """

    accounts: Accounts
    instances: InstanceInventory
    buckets: ObjectStore
    tasks: BundleTaskService
    power: PowerControl
    rate: RateLimit
    region: str = "us-east-1"
    any_platform: bool = False
    existing_bundle: Literal["refuse", "replace"] = "refuse"
    version_2: bool = True
    recent_keys: KeyCache = field(default_factory=KeyCache)
    may: Callable[[Caller, str, str], bool] = account_may_do_all
    store_trouble: Callable[[], str | None] = lambda: None
    volume_trouble: Callable[[Instance], str | None] = lambda _instance: None
    now: Callable[[], datetime] = utc_now

    def charge(self, caller: Caller, units: int) -> None:
        """Charge a caller's account for what a request costs beyond a small one, in small requests.

        Raises:
            TooManyRequests: The account has used up its rate.
        """
        self.rate.take(caller.account_id, units)

    @property
    def zone(self) -> str:
        """The one availability zone of the region."""
        return f"{self.region}a"
