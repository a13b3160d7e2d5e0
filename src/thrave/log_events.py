"""The events of tasks and of the service in the log, as one table, and the function that logs them.

A line of this table is never counted as a repetition (`logs.py`): each stands for one event. Other log lines report
errors and retries of a component. `make docs` writes docs/reference/log-events.md from the table.
"""

from typing import Literal, NamedTuple

import structlog


class LogEvent(NamedTuple):
    """A row of the table."""

    level: Literal["info", "warning", "error"]
    fields: tuple[str, ...]
    text: str
    """When the line is written."""


CONTEXT_FIELDS: dict[str, str] = {
    "request_id": "The request to the API, as in its response.",
    "account_id": "The account that signed the request, or that owns the task.",
    "user": "Name of the account's user that signed the request; absent for the account's own key.",
    "access_key_id": "The access key that signed the request.",
    "remote": "Address of the client, or of the proxy in front of the service.",
    "bundle_id": "The task.",
    "instance_id": "The instance of the task.",
}
"""Fields that each line has which is written while a request is handled or a task runs."""

EVENTS: dict[str, LogEvent] = {
    "service started": LogEvent(
        "info",
        ("process", "version", "data_dir", "database", "store", "hypervisor", "host", "address"),
        "The process has started. `process`: `serve`, `api` or `agent`. `address`: URL of the API.",
    ),
    "monitoring started": LogEvent("info", ("address",), "The monitoring listener answers requests."),
    "task accepted": LogEvent(
        "info",
        ("bundle_id", "instance_id", "account_id", "host", "bucket", "prefix"),
        "BundleInstance has created a task. The other fields of the line say who has sent the request.",
    ),
    "task run started": LogEvent(
        "info",
        ("bundle_id", "instance_id", "account_id", "host", "run", "step"),
        "The host's agent runs the task from this step on. `run`: 1, and one more after each crash.",
    ),
    "task state changed": LogEvent("info", ("bundle_id", "state"), "The task has changed to this state."),
    "instance off": LogEvent(
        "info", ("bundle_id", "instance_id"), "The guest has powered off for the task; its downtime begins."
    ),
    "instance returned": LogEvent(
        "info",
        ("bundle_id", "downtime"),
        "The instance has the power state that its owner wants: its start was requested, unless its owner has stopped "
        "it. `downtime`: seconds for which it was off for this task.",
    ),
    "task cancelled": LogEvent(
        "info",
        ("bundle_id",),
        "CancelBundleTask was accepted. The other fields of the line say who has sent the request.",
    ),
    "task completed": LogEvent(
        "info",
        ("bundle_id", "instance_id", "account_id", "seconds", "volume_bytes", "stored_bytes", "rate", "downtime"),
        "The bundle is complete. `seconds`: since the request. `rate`: bytes of the volume per second.",
    ),
    "task failed": LogEvent(
        "warning",
        ("bundle_id", "instance_id", "account_id", "code", "message", "remedy", "seconds", "downtime"),
        "The task has failed or was cancelled. `remedy`: what to do about an error with this code.",
    ),
}  # fmt: skip
"""Every event, by its constant text in the log. A field without a value is absent."""

log = structlog.get_logger()


def log_event(name: str, **fields: object) -> None:
    """Log an event of the table, without the fields that are None.

    Logs nothing in a process without a log: a command shows its result on its own.
    """
    if structlog.is_configured():
        given = {field: value for field, value in fields.items() if value is not None}
        getattr(log, EVENTS[name].level)(name, **given)
