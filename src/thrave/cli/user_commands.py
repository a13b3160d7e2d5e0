"""`thrave account user`: users of an account, their policies and access keys.

A user may do only what a policy allows. A policy with an element that Thrave does not support is refused with the
reason, and the existing policy stays.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import click

from thrave.cli.error_output import print_warning
from thrave.cli.identifiers import find_account
from thrave.cli.options import confirm_deletion, delete_access_key, open_identity, settings_option, yes_option
from thrave.cli.output import (
    key_document,
    key_documents,
    key_ids,
    output_option,
    print_new_secret,
    print_result,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thrave.config import Settings
    from thrave.identity.accounts import Accounts
    from thrave.identity.users import Users

_account = click.argument("account", metavar="ACCOUNT")
_user = click.argument("user_name", metavar="USER")
_policy = click.argument("policy_name", metavar="POLICY")


def _of_user(command: Callable[..., None]) -> Callable[..., None]:
    """Add the parameters of each command about one user: ACCOUNT, USER, the settings and `--output`."""
    return _account(_user(settings_option(output_option(command))))


@contextmanager
def _open_users(settings: Settings, account: str) -> Iterator[tuple[Accounts, Users, str]]:
    """Open accounts and users; also return the id of the account that `account` means."""
    with open_identity(settings) as (accounts, users):
        yield accounts, users, find_account(accounts, account).account_id


@click.group()
def user() -> None:
    """Manage the users of an account. A user may do what its policies allow. ACCOUNT is the id or name of an account.

    \b
    Example:
      thrave account user create 123456789012 bob
      thrave account user policy put 123456789012 bob read-only policy.json
      thrave account user key create 123456789012 bob
    """


@user.command()
@_of_user
def create(settings: Settings, account: str, user_name: str, output: str) -> None:
    """Create a user without permissions and without an access key.

    \b
    Example:
      thrave account user create 123456789012 bob
    """
    with _open_users(settings, account) as (_, users, account_id):
        new = users.create(account_id, user_name)
    document = {"accountId": account_id, "userName": new.user_name, "userId": new.user_id, "arn": new.arn}
    print_result(output, {**document}, f"created {new.arn}")


@user.command("list", short_help="List users with their policies and access keys.")
@_account
@settings_option
@output_option
def list_(settings: Settings, account: str, output: str) -> None:
    """List the users of an account with their policy names and access keys.

    \b
    Example:
      thrave account user list 123456789012 --output json
    """
    with _open_users(settings, account) as (accounts, users, account_id):
        listed = [
            (found, [*users.policies(account_id, found.user_name)], accounts.list_keys(account_id, found))
            for found in users.list(account_id)
        ]
    documents: list[dict[str, object]] = [
        {
            "userName": found.user_name,
            "userId": found.user_id,
            "arn": found.arn,
            "createDate": found.create_date,
            "policies": policies,
            "accessKeys": key_documents(keys),
        }
        for found, policies, keys in listed
    ]
    rows: list[tuple[str, ...]] = [
        (found.user_name, " ".join(policies), key_ids(keys)) for found, policies, keys in listed
    ]
    print_result(output, {"users": documents}, table(("USER", "POLICIES", "ACCESS KEYS"), rows))


@user.command()
@_of_user
@yes_option
def delete(settings: Settings, *, account: str, user_name: str, yes: bool, output: str) -> None:
    """Delete a user with all its access keys and policies.

    \b
    Example:
      thrave account user delete 123456789012 bob
    """
    with _open_users(settings, account) as (_, users, account_id):
        found = users.get(account_id, user_name)
        confirm_deletion(f"the user {found.arn} with its access keys and policies", yes=yes)
        users.delete(account_id, user_name)
    print_result(output, {"accountId": account_id, "userName": user_name}, f"deleted {user_name}")


@user.group()
def policy() -> None:
    """Manage the policies of a user, in the JSON language of IAM.

    \b
    Example:
      thrave account user policy put 123456789012 bob read-only policy.json
    """


@policy.command("put", short_help="Store a policy for a user; replaces one of that name.")
@_of_user
@_policy
@click.argument("file", type=click.File("rb"), metavar="FILE")
def put_policy(
    settings: Settings, *, account: str, user_name: str, policy_name: str, file: IO[bytes], output: str
) -> None:
    """Store the policy in FILE (`-` is stdin) for a user under the name POLICY. Replaces a policy of that name.

    \b
    Example:
      thrave account user policy put 123456789012 bob read-only policy.json
    """
    document = file.read().decode("utf-8-sig", errors="replace")  # editors on Windows write a byte order mark
    with _open_users(settings, account) as (_, users, account_id):
        users.put_policy(account_id, user_name, policy_name, document)
    _warn_about_unknown_actions(document)
    print_result(
        output, {"userName": user_name, "policyName": policy_name}, f"{user_name} has the policy {policy_name}"
    )


def _warn_about_unknown_actions(document: str) -> None:
    from thrave.ec2.service_models import EC2
    from thrave.identity.policies import unmatched_actions

    for action in unmatched_actions(document, EC2.name, EC2.model.operation_names):
        print_warning(f'EC2 has no action "{action}"; this part of the policy has no effect')


@policy.command("delete")
@_of_user
@_policy
@yes_option
def delete_policy(
    settings: Settings, *, account: str, user_name: str, policy_name: str, yes: bool, output: str
) -> None:
    """Delete a policy of a user.

    \b
    Example:
      thrave account user policy delete 123456789012 bob read-only
    """
    with _open_users(settings, account) as (_, users, account_id):
        users.policy(account_id, user_name, policy_name)
        confirm_deletion(f"the policy {policy_name} of user {user_name}", yes=yes)
        users.delete_policy(account_id, user_name, policy_name)
    print_result(output, {"userName": user_name, "policyName": policy_name}, f"deleted {policy_name}")


@policy.command("list")
@_of_user
def list_policies(settings: Settings, account: str, user_name: str, output: str) -> None:
    """List the names of a user's policies.

    \b
    Example:
      thrave account user policy list 123456789012 bob
    """
    with _open_users(settings, account) as (_, users, account_id):
        names = [*users.policies(account_id, user_name)]
    print_result(output, {"userName": user_name, "policyNames": names}, "\n".join(names))


@policy.command("show")
@_of_user
@_policy
def show_policy(settings: Settings, account: str, user_name: str, policy_name: str, output: str) -> None:
    """Show a policy of a user exactly as it was stored.

    \b
    Example:
      thrave account user policy show 123456789012 bob read-only
    """
    with _open_users(settings, account) as (_, users, account_id):
        text = users.policy(account_id, user_name, policy_name)
    document = {"userName": user_name, "policyName": policy_name, "policyDocument": json.loads(text)}
    print_result(output, document, text)


@user.group()
def key() -> None:
    """Manage the access keys of a user. Two at most, so that one can be replaced while the other works.

    \b
    Example:
      thrave account user key create 123456789012 bob
    """


@key.command("create")
@_of_user
def create_key(settings: Settings, account: str, user_name: str, output: str) -> None:
    """Create an access key for a user. The secret is shown once.

    \b
    Example:
      thrave account user key create 123456789012 bob
    """
    with _open_users(settings, account) as (accounts, users, account_id):
        found = users.get(account_id, user_name)
        new_key = accounts.create_key(account_id, found)
    document = {"accountId": account_id, "userName": found.user_name, **key_document(new_key)}
    print_new_secret(output, document)


@key.command("delete")
@click.argument("access_key_id", metavar="KEY")
@yes_option
@settings_option
@output_option
def delete_key(settings: Settings, *, access_key_id: str, yes: bool, output: str) -> None:
    """Delete the access key with the id KEY. Requests that it signs are refused within one second.

    \b
    Example:
      thrave account user key delete AKIAIOSFODNN7EXAMPLE
    """
    delete_access_key(settings, access_key_id, output, yes=yes)
