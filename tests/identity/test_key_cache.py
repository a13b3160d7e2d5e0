"""The cache of access keys: its time and size."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from support.manual_clock import ManualClock
from thrave.identity.accounts import AccessKey, KeyCache

KEY = AccessKey(
    access_key_id="AKIAIOSFODNN7EXAMPLE",
    secret_access_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    account_id="123456789012",
    status="Active",
    create_date=datetime(2026, 1, 1, tzinfo=UTC),
)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def cache(clock):
    return KeyCache(clock, max_keys=3)


def test_cache_does_not_return_unknown_key(cache):
    assert cache.find(KEY.access_key_id) is None


def test_cache_returns_key_for_less_than_a_second_despite_use(cache, clock):
    for _ in range(9):
        cache.add(KEY)
        assert cache.find(KEY.access_key_id) is KEY
        clock.now += 0.1
    assert cache.find(KEY.access_key_id) is None


def test_cache_returns_key_that_was_stored_last(cache, clock):
    cache.add(KEY)
    clock.now += 1
    changed = replace(KEY, account_id="210987654321")
    cache.add(changed)
    assert cache.find(KEY.access_key_id) is changed


def test_full_cache_drops_oldest_key(cache):
    keys = [replace(KEY, access_key_id=f"AKIA{number}") for number in range(4)]
    for key in keys:
        cache.add(key)
    assert [cache.find(key.access_key_id) for key in keys] == [None, *keys[1:]]


def test_key_stored_again_is_no_longer_the_oldest(cache, clock):
    keys = [replace(KEY, access_key_id=f"AKIA{number}") for number in range(4)]
    cache.add(keys[0])
    clock.now += 1
    for key in (keys[1], keys[0], keys[2], keys[3]):
        cache.add(key)
    assert cache.find("AKIA0") is keys[0]
    assert cache.find("AKIA1") is None
