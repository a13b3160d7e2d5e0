"""Users, their keys and policies, on a real database."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from thrave.database import access_key as access_key_table
from thrave.database import iam_user, user_policy
from thrave.identity.errors import (
    EntityAlreadyExists,
    LimitExceeded,
    MalformedPolicyDocument,
    NoSuchEntity,
    ValidationError,
)
from thrave.identity.users import Users
from thrave.vault import DecryptError

LOOK = json.dumps({"Statement": {"Effect": "Allow", "Action": "ec2:Describe*", "Resource": "*"}}, indent=2)
NOTHING = json.dumps({"Statement": {"Effect": "Deny", "Action": "*", "Resource": "*"}})


@pytest.fixture
def users(engine):
    return Users(engine)


@pytest.fixture
def acme(accounts):
    """The id of an account."""
    return accounts.create("acme")[0].account_id


def test_create_stores_user_without_keys_and_policies(users, accounts, acme):
    user = users.create(acme, "Bob")
    assert re.fullmatch(r"AIDA[A-Z2-7]{16}", user.user_id)
    assert user.arn == f"arn:aws:iam::{acme}:user/Bob"
    assert users.get(acme, "bob") == user
    assert users.list(acme) == [user]
    assert users.policies(acme, "Bob") == {}
    assert users.statements(user) == ()
    assert accounts.list_keys(acme, user) == []


def test_create_rejects_name_in_use_regardless_of_case(users, accounts, acme):
    users.create(acme, "bob")
    with pytest.raises(EntityAlreadyExists, match="BOB"):
        users.create(acme, "BOB")
    other = accounts.create("other")[0].account_id
    users.create(other, "bob")
    assert [len(users.list(account_id)) for account_id in (acme, other)] == [1, 1]


def test_create_in_parallel_creates_one_user_per_name(users, acme):
    def create(_):
        try:
            return users.create(acme, "bob")
        except EntityAlreadyExists:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert len([user for user in pool.map(create, range(8)) if user]) == 1


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b", "a\n", "ä", "a\0b", "$(touch x)"])
def test_create_rejects_name_that_iam_rejects(users, acme, name):
    with pytest.raises(ValidationError):
        users.create(acme, name)
    with pytest.raises(ValidationError):
        users.put_policy(acme, "bob", name * 2, LOOK)  # of a policy: twice as long
    assert users.list(acme) == []


def test_missing_user_key_or_policy_raises_error(users, acme):
    for lookup in (users.get, users.delete, users.policies):
        with pytest.raises(NoSuchEntity, match="bob"):
            lookup(acme, "bob")
    with pytest.raises(NoSuchEntity, match="bob"):
        users.put_policy(acme, "bob", "look", LOOK)
    with pytest.raises(NoSuchEntity, match="account"):
        users.create("123456789012", "bob")
    users.create(acme, "bob")
    with pytest.raises(NoSuchEntity, match="look"):
        users.delete_policy(acme, "bob", "look")


def test_find_key_distinguishes_user_key_from_account_key(users, accounts, acme):
    bob = users.create(acme, "bob")
    (own,) = accounts.list_keys(acme)
    key = accounts.create_key(acme, bob)
    assert (key.account_id, key.user, own.user) == (acme, bob, None)
    assert accounts.find_key(key.access_key_id) == key
    assert accounts.list_keys(acme) == [own]
    assert accounts.list_keys(acme, bob) == [key]


def test_create_key_allows_two_keys_per_user_in_addition_to_the_accounts(users, accounts, acme):
    bob = users.create(acme, "bob")
    accounts.create_key(acme)
    keys = [accounts.create_key(acme, bob), accounts.create_key(acme, bob)]
    with pytest.raises(LimitExceeded, match="AccessKeysPerUser: 2"):
        accounts.create_key(acme, bob)
    assert accounts.list_keys(acme, bob) == keys


def test_delete_removes_user_with_keys_and_policies(users, accounts, acme, engine):
    bob = users.create(acme, "bob")
    key = accounts.create_key(acme, bob)
    users.put_policy(acme, "bob", "look", LOOK)
    users.delete(acme, "bob")
    assert accounts.find_key(key.access_key_id) is None
    with engine.connect() as connection:
        assert connection.execute(sa.select(user_policy)).all() == []
    with pytest.raises(NoSuchEntity, match="deleted"):
        accounts.create_key(acme, bob)
    assert users.statements(users.create(acme, "bob")) == ()
    assert len(accounts.list_keys(acme)) == 1


def test_key_moved_to_another_user_cannot_be_decrypted(users, accounts, acme, engine):
    key = accounts.create_key(acme, users.create(acme, "bob"))
    alice = users.create(acme, "alice")
    for user_id in (None, alice.user_id):
        with engine.begin() as connection:
            by_id = access_key_table.c.access_key_id == key.access_key_id
            connection.execute(sa.update(access_key_table).where(by_id).values(user_id=user_id))
        with pytest.raises(DecryptError):
            accounts.find_key(key.access_key_id)


def test_put_policy_stores_text_unchanged_and_replaces_by_name(users, acme):
    users.create(acme, "bob")
    users.put_policy(acme, "bob", "look", LOOK)
    assert users.policies(acme, "BOB") == {"look": LOOK}
    users.put_policy(acme, "bob", "look", NOTHING)
    users.put_policy(acme, "bob", "and-more", LOOK)
    assert users.policies(acme, "bob") == {"and-more": LOOK, "look": NOTHING}
    users.delete_policy(acme, "bob", "look")
    assert users.policies(acme, "bob") == {"and-more": LOOK}


def test_put_policy_rejects_unsupported_policy_without_change(users, acme):
    users.create(acme, "bob")
    users.put_policy(acme, "bob", "look", LOOK)
    before = users.get(acme, "bob")
    with pytest.raises(MalformedPolicyDocument):
        users.put_policy(acme, "bob", "look", LOOK.replace("Allow", "allow"))
    assert users.policies(acme, "bob") == {"look": LOOK}
    assert users.get(acme, "bob") == before


def test_put_policy_limits_all_policies_to_2048_characters_without_white_space(users, acme):
    users.create(acme, "bob")
    users.put_policy(acme, "bob", "look", LOOK + " " * 5000)
    long = json.dumps({"Statement": {"Effect": "Allow", "Action": "ec2:" + "A" * 1950, "Resource": "*"}})
    with pytest.raises(LimitExceeded, match="2048 bytes exceeded for user bob"):
        users.put_policy(acme, "bob", "long", long)
    assert [*users.policies(acme, "bob")] == ["look"]
    users.put_policy(acme, "bob", "look", long)


def test_policy_change_takes_effect_at_next_key_lookup(users, accounts, acme, engine):
    key = accounts.create_key(acme, users.create(acme, "bob"))
    elsewhere = Users(engine)

    def statements():
        return elsewhere.statements(accounts.find_key(key.access_key_id).user)

    seen = [statements()]
    for change in (
        lambda: users.put_policy(acme, "bob", "look", LOOK),
        lambda: users.put_policy(acme, "bob", "look", NOTHING),
        lambda: users.delete_policy(acme, "bob", "look"),
    ):
        change()
        seen.append(statements())
    assert [[each.effect for each in one] for one in seen] == [[], ["Allow"], ["Deny"], []]


def test_policies_are_compiled_once_per_version(users, acme):
    users.create(acme, "bob")
    users.put_policy(acme, "bob", "look", LOOK)
    bob = users.get(acme, "bob")
    assert users.statements(bob) is users.statements(users.get(acme, "bob"))


def test_unsupported_stored_policies_allow_nothing(users, acme, engine):
    users.create(acme, "bob")
    users.put_policy(acme, "bob", "look", LOOK)
    users.put_policy(acme, "bob", "odd", NOTHING)
    with engine.begin() as connection:
        odd = user_policy.c.policy_name == "odd"
        connection.execute(sa.update(user_policy).where(odd).values(document=NOTHING.replace("Deny", "Refuse")))
    assert users.statements(users.get(acme, "bob")) == ()


def test_user_table_has_no_secret(users, accounts, acme, engine, tmp_path):
    key = accounts.create_key(acme, users.create(acme, "bob"))
    with engine.connect() as connection:
        assert connection.execute(sa.select(iam_user.c.user_name)).all() == [("bob",)]
    engine.dispose()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("thrave.db*"))
    assert key.secret_access_key.encode() not in stored
