"""How many requests of one account are answered: a token bucket for each, as AWS throttles the EC2 API.

A request takes a token, and more for what it costs beyond a small one; a bucket holds `burst` of them and is filled
again at `per_second`. Only requests whose signature was good are counted, so there are never more buckets than
accounts, whatever keys strangers invent.

Source: AWS, "Request throttling for the Amazon EC2 API", EC2 Developer Guide. There it is a bucket for each group of
actions; here it is one for all.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


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
