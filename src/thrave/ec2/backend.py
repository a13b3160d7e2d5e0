"""How many requests of one account are answered: a token bucket for each, as AWS throttles the EC2 API.

A request takes a token, and more for what it costs beyond a small one; a bucket holds `burst` of them and is filled
again at `per_second`. Only requests whose signature was good are counted, so there are never more buckets than
accounts, whatever keys strangers invent.

Source: AWS, "Request throttling for the Amazon EC2 API", EC2 Developer Guide. There it is a bucket for each group of
actions; here it is one for all.

What the front door leads to, and who comes through it.

Who may do what at the door: an account's own key everything, a user's what the user's policies permit.

This joins what a request tells about itself to the decision of `thrave.identity.policies`. It costs the account's own
key nothing, and holds no rule of its own.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from thrave.buckets.base import ObjectStore
from thrave.compute.base import InstanceInventory
from thrave.compute.instance import Instance
from thrave.compute.power import PowerControl
from thrave.database import utc_now
from thrave.identity.accounts import Accounts, KeyCache, User
from thrave.identity.policies import is_allowed
from thrave.identity.policy_conditions import RequestContext, source_address
from thrave.identity.users import Users
from thrave.tasks.task_service import BundleTaskService


class TooManyRequests(Exception):
    """The account's bucket is empty."""


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """The buckets of all accounts. Safe to use from several threads.

    Args:
        per_second: Tokens that an account is given a second.
        burst: Tokens that an account can have at most.
        clock: Seconds, from anywhere.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    def take(self, account_id: str, tokens: int = 1) -> None:
        """Take tokens of an account's. If it has at least one it may owe the rest, which delays its next request.

        Raises:
            TooManyRequests: It has none left.
        """
        now = self._clock()
        with self._lock:
            bucket = self._buckets.setdefault(account_id, _Bucket(self._burst, now))
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_second)
            bucket.filled_at = now
            if bucket.tokens < 1:
                raise TooManyRequests
            bucket.tokens -= tokens


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
class Ec2Backend:
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


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """The permissions of accounts and users.

    Attributes:
        users: Whose policies decide.
        region: The service's, for the condition key `ec2:Region`; a signature's scope is the client's own choice.
    """

    users: Users
    region: str

    def may(self, caller: Caller, action: str, resource: str) -> bool:
        """Say whether a caller may do an action, such as `ec2:BundleInstance`, on a resource; see `Ec2Backend.may`."""
        if caller.user is None:
            return True
        context = RequestContext(
            region=self.region,
            source_ip=source_address(caller.source_ip),
            secure_transport=caller.secure_transport,
            current_time=utc_now(),
        )
        return is_allowed(self.users.statements(caller.user), action, resource, context)
