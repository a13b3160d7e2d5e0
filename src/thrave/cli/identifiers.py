"""Which account, instance, task or access key a word on the command line means: an id, a name, or the start of an id.

An id counts before a name, and a name before the start of an id. The start has at least `_MIN_LENGTH` characters and
must fit one id only. Hosts are not here: an operator chooses their ids, and the start of one is often another's id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from thrave.compute.base import InstanceInventory
    from thrave.identity.accounts import Account, Accounts
    from thrave.tasks.queries import TaskQueries

_MIN_LENGTH = 6  # characters, such as `i-0123`: a variable of a script that is empty fits nothing
_MAX_SHOWN = 5


def find_account(accounts: Accounts, word: str) -> Account:
    """Return the account with this id, name or start of its id. Raises NoSuchEntity, or click's UsageError."""
    listed = {found.account_id: found for found in accounts.list()}
    if named := [found for found in listed.values() if found.name == word and word not in listed]:
        return named[0]
    return accounts.get(complete_id(word, listed))


def find_instance_id(instances: InstanceInventory, word: str) -> str:
    """Return the id of the instance with this id, tag `Name` or start of its id; the word itself if none fits.

    Raises:
        click.UsageError: Several instances fit.
    """
    listed = {found.instance_id: found.tags.get("Name") for found in instances.list()}
    if word in listed:
        return word
    named = [instance_id for instance_id, name in listed.items() if name == word]
    if len(named) > 1:
        raise _ambiguous(word, named)
    return named[0] if named else complete_id(word, listed)


def find_task_id(queries: TaskQueries, word: str) -> str:
    """Return the id of the task with this id or start of its id; the word itself if none fits.

    Raises:
        click.UsageError: Several tasks fit.
    """
    return complete_id(word, queries.ids_from(word, limit=_MAX_SHOWN + 1) if len(word) >= _MIN_LENGTH else ())


def find_key_id(accounts: Accounts, word: str) -> str:
    """Return the id of the access key with this id or start of its id; the word itself if none fits.

    Raises:
        click.UsageError: Several keys fit.
    """
    return complete_id(word, accounts.key_ids())


def complete_id(word: str, ids: Iterable[str]) -> str:
    """Return the id that is the word, or that begins with it; the word itself if none does.

    Raises:
        click.UsageError: Several ids begin with the word.
    """
    found = sorted(one for one in ids if one.startswith(word))
    if word in found or len(word) < _MIN_LENGTH or not found:
        return word
    if len(found) > 1:
        raise _ambiguous(word, found)
    return found[0]


def _ambiguous(word: str, ids: list[str]) -> click.UsageError:
    more = ", …" if len(ids) > _MAX_SHOWN else ""
    return click.UsageError(f"{word!r} is ambiguous: {', '.join(ids[:_MAX_SHOWN])}{more}. Pass the whole id.")
