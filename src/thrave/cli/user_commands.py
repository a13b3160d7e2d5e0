"""`thrave account user`: users below an account, what each may do, and their access keys.

A user may do nothing until a policy says so. A policy that is not fully understood is refused, with the reason, and the
one that it was to replace stays.
"""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING

import click

from thrave.cli.options import open_identity, settings_option
from thrave.cli.output import key_document, key_documents, output_option, print_result, secrets_as_text, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from thrave.config import Settings

_account = click.argument("account_id", metavar="ACCOUNT")
_user = click.argument("user_name", metavar="USER")
_policy = click.argument("policy_name", metavar="POLICY")


def _of_user(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what each has that is about one user: ACCOUNT and USER, the settings and `--output`."""
    return _account(_user(settings_option(output_option(command))))


@click.group()
def user() -> None:
    """Users below an account, who may do what their policies allow. ACCOUNT is an account's id.

    \b
    Example:
      thrave account user create 123456789012 bob
      thrave account user policy put 123456789012 bob look look.json
      thrave account user key create 123456789012 bob
    """


@user.command()
@_of_user
def create(settings: Settings, account_id: str, user_name: str, output: str) -> None:
    """Create a user, who may do nothing yet and has no access key.

    \b
    Example:
      thrave account user create 123456789012 bob
    """
    with open_identity(settings) as (_, users):
        new = users.create(account_id, user_name)
    document = {"accountId": account_id, "userName": new.user_name, "userId": new.user_id, "arn": new.arn}
    print_result(output, {**document}, f"created {new.arn}")


@user.command("list")
@_account
@settings_option
@output_option
def list_(settings: Settings, account_id: str, output: str) -> None:
    """List the users of an account, with the names of their policies and their access keys.

    \b
    Example:
      thrave account user list 123456789012 --output json
    """
    with open_identity(settings) as (accounts, users):
        accounts.get(account_id)
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
        (found.user_name, " ".join(policies), " ".join(key.access_key_id for key in keys))
        for found, policies, keys in listed
    ]
    print_result(output, {"users": documents}, table(("USER", "POLICIES", "ACCESS KEYS"), rows))


@user.command()
@_of_user
def delete(settings: Settings, account_id: str, user_name: str, output: str) -> None:
    """Delete a user with all access keys and policies.

    \b
    Example:
      thrave account user delete 123456789012 bob
    """
    with open_identity(settings) as (_, users):
        users.delete(account_id, user_name)
    print_result(output, {"accountId": account_id, "userName": user_name}, f"deleted {user_name}")


@user.group()
def policy() -> None:
    """Policies of a user, in IAM's JSON language.

    \b
    Example:
      thrave account user policy put 123456789012 bob look look.json
    """


@policy.command("put")
@_of_user
@_policy
@click.argument("file", type=click.File("rb"), metavar="FILE")
def put_policy(
    settings: Settings, *, account_id: str, user_name: str, policy_name: str, file: IO[bytes], output: str
) -> None:
    """Give a user the policy in FILE (`-` is stdin) under the name POLICY, in place of one of that name.

    \b
    Example:
      thrave account user policy put 123456789012 bob look look.json
    """
    document = file.read().decode("utf-8-sig", errors="replace")  # editors on Windows begin a file with a mark
    with open_identity(settings) as (_, users):
        users.put_policy(account_id, user_name, policy_name, document)
    _warn_of_unknown_actions(document)
    print_result(
        output, {"userName": user_name, "policyName": policy_name}, f"{user_name} has the policy {policy_name}"
    )


def _warn_of_unknown_actions(document: str) -> None:
    from thrave.ec2.service_models import EC2
    from thrave.identity.policies import unmatched_actions

    for action in unmatched_actions(document, EC2.name, EC2.model.operation_names):
        click.echo(f'thrave: warning: EC2 has no action "{action}"; that part of the policy means nothing', err=True)


@policy.command("delete")
@_of_user
@_policy
def delete_policy(settings: Settings, account_id: str, user_name: str, policy_name: str, output: str) -> None:
    """Take a policy of a user away.

    \b
    Example:
      thrave account user policy delete 123456789012 bob look
    """
    with open_identity(settings) as (_, users):
        users.delete_policy(account_id, user_name, policy_name)
    print_result(output, {"userName": user_name, "policyName": policy_name}, f"deleted {policy_name}")


@policy.command("list")
@_of_user
def list_policies(settings: Settings, account_id: str, user_name: str, output: str) -> None:
    """List the names of a user's policies.

    \b
    Example:
      thrave account user policy list 123456789012 bob
    """
    with open_identity(settings) as (_, users):
        names = [*users.policies(account_id, user_name)]
    print_result(output, {"userName": user_name, "policyNames": names}, "\n".join(names))


@policy.command("show")
@_of_user
@_policy
def show_policy(settings: Settings, account_id: str, user_name: str, policy_name: str, output: str) -> None:
    """Show a policy of a user, as it was given.

    \b
    Example:
      thrave account user policy show 123456789012 bob look
    """
    with open_identity(settings) as (_, users):
        text = users.policy(account_id, user_name, policy_name)
    document = {"userName": user_name, "policyName": policy_name, "policyDocument": json.loads(text)}
    print_result(output, document, text)


@user.group()
def key() -> None:
    """Access keys of a user: two at most, so that one can be replaced while the other works.

    \b
    Example:
      thrave account user key create 123456789012 bob
    """


@key.command("create")
@_of_user
def create_key(settings: Settings, account_id: str, user_name: str, output: str) -> None:
    """Give a user another access key, shown once.

    \b
    Example:
      thrave account user key create 123456789012 bob
    """
    with open_identity(settings) as (accounts, users):
        found = users.get(account_id, user_name)
        made = accounts.create_key(account_id, found)
    document = {"accountId": account_id, "userName": found.user_name, **key_document(made)}
    print_result(output, {**document}, secrets_as_text(document))


@key.command("delete")
@click.argument("access_key_id", metavar="KEY")
@settings_option
@output_option
def delete_key(settings: Settings, access_key_id: str, output: str) -> None:
    """Delete the access key with the id KEY; requests that it signs are refused within a second.

    \b
    Example:
      thrave account user key delete AKIAIOSFODNN7EXAMPLE
    """
    with open_identity(settings) as (accounts, _):
        accounts.delete_key(access_key_id)
    print_result(output, {"accessKeyId": access_key_id}, f"deleted {access_key_id}")
