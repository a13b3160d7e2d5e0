"""A bundle task as others see it, what happened to it, and the request that makes one.

Plain data; nothing here touches the database.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from thrave.tasks.states import BundleTaskState
from thrave.tasks.steps import Step


@dataclass(frozen=True, kw_only=True)
class BundleRequest:
    """What BundleInstance asks for, after every check that can be made at request time has passed."""

    account_id: str
    """The caller's account."""
    owner_id: str
    """The account of `access_key_id`: the owner of the bucket, whose key signed the upload policy."""
    instance_id: str
    bucket: str
    prefix: str
    access_key_id: str
    upload_policy: str = field(repr=False)
    """The base64 text that was signed: of a policy that came encoded twice, the layer that the signature is over."""
    upload_policy_signature: str = field(repr=False)
    made_bucket: bool = False
    """Whether the request created the bucket."""


@dataclass(frozen=True, kw_only=True)
class BundleTask:
    """One bundle task, as DescribeBundleTasks shows it. Times are aware and in UTC."""

    bundle_id: str
    account_id: str
    owner_id: str
    instance_id: str
    host: str
    state: BundleTaskState
    next_step: Step
    """What its host does next; a step that undoes once it fails or is cancelled."""
    progress: int | None
    """Percent within `bundling`, and again within `storing`; None before."""
    start_time: datetime
    update_time: datetime
    bucket: str
    prefix: str
    access_key_id: str
    made_bucket: bool | None
    """Whether the request created the bucket, and the bucket is to be removed if the task fails."""
    was_running: bool | None
    """Whether the instance ran before the task touched it; None until that is known."""
    power_recovery_until: datetime | None
    """Until when the guest may still power off for this task though it has ended; None if it will not."""
    error_code: str | None
    """Why it fails, or has failed: recorded before anything is undone, so also of a task that has not ended."""
    error_message: str | None
    warning: str | None
    """Warnings for the owner of a task that continued."""
    volume_size: int | None
    """Bytes of the root volume; None until it has been opened."""
    attempts: int
    """How often a host took it up: once, and again after each crash. The number of its last run."""


class Event(NamedTuple):
    """Something that happened to a task."""

    time: datetime
    """Aware, in UTC."""
    state: BundleTaskState
    """The state that it had then."""
    message: str | None
    """What happened in that state; None: it came into it."""
