"""What the EC2 actions use: the backend's parts and settings, the caller, permissions, and the rate limit.

The backend is passed to every action. The actions are in `bundle_actions`, `instance_actions` and `region_actions`.
`app.handle_request` checks the rate limit and the permission before it runs an action.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from thrave.buckets.base import ObjectStore
from thrave.compute.base import InstanceInventory
from thrave.compute.instance import Instance
from thrave.compute.power import PowerControl
from thrave.concurrency import monotonic, new_lock, utc_now
from thrave.ec2.protocol import Parameters
from thrave.health import HealthCache
from thrave.identity.accounts import Accounts, KeyCache, User
from thrave.identity.policies import is_allowed
from thrave.identity.policy_conditions import RequestContext, source_address
from thrave.identity.users import Users
from thrave.tasks.task_service import BundleTaskService


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The account or user that signed a request.

    Attributes:
        account_id: The account of the access key.
        access_key_id: The access key.
        user: The user of the access key; None for the account's own key.
        endpoint: Host, and port if one was given, to which the request was sent.
        source_ip: Address of the client as the server reports it; None if unknown.
        secure_transport: Whether the request came over TLS.
    """

    account_id: str
    access_key_id: str
    user: User | None = None
    endpoint: str = ""
    source_ip: str | None = None
    secure_transport: bool = False


class TooManyRequests(Exception):
    """The account has no tokens left."""


@dataclass
class _TokenBucket:
    tokens: float
    updated_at: float


class RateLimit:
    """A token bucket for each account, as AWS throttles the EC2 API. Thread-safe.

    A request takes one token, and more for a large response. Only requests with a valid signature are counted, so there
    are never more buckets than accounts.

    Source: AWS, "Request throttling for the Amazon EC2 API", EC2 Developer Guide. AWS has a bucket for each group of
    actions; this class has one for all actions.

    Args:
        per_second: Tokens that each account receives per second.
        burst: Maximum number of tokens of an account.
        clock: Monotonic time in seconds.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, _TokenBucket] = {}
        self._lock = new_lock()

    def take(self, account_id: str, tokens: int = 1) -> None:
        """Take tokens from an account's bucket.

        One remaining token is enough: the number may become negative, which delays the account's next request.

        Raises:
            TooManyRequests: Less than one token remains.
        """
        now = self._clock()
        with self._lock:
            bucket = self._buckets.setdefault(account_id, _TokenBucket(self._burst, now))
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.updated_at) * self._per_second)
            bucket.updated_at = now
            if bucket.tokens < 1:
                raise TooManyRequests
            bucket.tokens -= tokens


def allow_account_keys(caller: Caller, _action: str, _resource: str) -> bool:
    """Allow every action to an account's own access key, as IAM does, and no action to a user."""
    return caller.user is None


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """Decides with the users' policies.

    Attributes:
        users: Users and their policies.
        region: The service's region, for the condition key `ec2:Region`. The region in a signature's scope is the
            client's choice and is not used.
    """

    users: Users
    region: str

    def is_allowed(self, caller: Caller, action: str, resource: str) -> bool:
        """Return whether a caller may do an action on a resource, with the rules of `thrave.identity.policies`.

        Args:
            caller: The policies are those of `user`; the address and TLS are for their conditions.
            action: For example `ec2:BundleInstance`.
            resource: An ARN, or `NO_RESOURCE`.
        """
        if caller.user is None:
            return True
        context = RequestContext(
            region=self.region,
            source_ip=source_address(caller.source_ip),
            secure_transport=caller.secure_transport,
            current_time=utc_now(),
        )
        return is_allowed(self.users.statements(caller.user), action, resource, context)


AroundAction = Callable[[str, Parameters], AbstractContextManager[None]]
"""Returns a context manager around an action, by the action's name and parameters. It may raise EC2Error."""


def do_nothing(_action: str, _parameters: Parameters) -> AbstractContextManager[None]:
    """Change nothing around an action."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Ec2Backend:
    """What the EC2 actions use, and the settings that change responses.

    Attributes:
        accounts: Accounts and the access keys that sign requests and upload policies.
        instances: Instances of this service.
        buckets: The object store for bundles.
        tasks: Bundle tasks.
        power: Starts, stops, reboots and terminates instances in the background.
        rate: Rate limit of each account.
        region: The only region.
        any_platform: Whether instances other than Windows can be bundled. EC2 bundles Windows only.
        existing_bundle: What to do with a request whose prefix already has a bundle.
        allow_signature_v2: Whether signature version 2 is accepted.
        key_cache: Keys of `accounts` that signed a request recently.
        is_allowed: Whether a caller may do an action on a resource; the service uses `Permissions.is_allowed`
            (set in `server.py`). The default refuses every user.
        health: Last results of the background probes.
        find_volume_problem: Returns why the root volume of an instance cannot be bundled, as a message for callers;
            None if no problem is known.
        now: Current time.
        check_request_time: Whether requests must be new. A test double whose clock a test sets accepts every time.
        around_action: A test double injects faults with it.
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
    allow_signature_v2: bool = True
    key_cache: KeyCache = field(default_factory=KeyCache)
    is_allowed: Callable[[Caller, str, str], bool] = allow_account_keys
    health: HealthCache = field(default_factory=HealthCache)
    find_volume_problem: Callable[[Instance], str | None] = lambda _instance: None
    now: Callable[[], datetime] = utc_now
    check_request_time: bool = True
    around_action: AroundAction = do_nothing

    def charge(self, caller: Caller, units: int) -> None:
        """Charge a caller's account for the cost of a request beyond the first unit.

        Args:
            caller: Who pays.
            units: Number of small requests that cost the same.

        Raises:
            TooManyRequests: The account has used up its rate.
        """
        self.rate.take(caller.account_id, units)

    @property
    def zone(self) -> str:
        """The only availability zone of the region."""
        return f"{self.region}a"
