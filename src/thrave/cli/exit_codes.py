"""The exit codes of the `thrave` command: one table, from which the docs' page is made.

A script that calls `thrave` reads these. A code, once given a meaning, keeps it; nothing here decides when a code is
used, that stands with the errors of each room (`cli/main.py` maps them).
"""

from enum import IntEnum


class Exit(IntEnum):
    """What the shell sees; `MEANING` says it in words."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    DAMAGED = 10
    WRONG_KEY = 11
    MISSING_COMPONENT = 12
    TASK_FAILED = 20
    TASK_CANCELLED = 21
    START_AGAIN = 30
    TAKEN_OVER = 75
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "Everything asked for was done.",
    Exit.FAILED: "It could not be done; the reason is on stderr.",
    Exit.USAGE: "The command line is wrong.",
    Exit.NOT_FOUND: "A file, account, instance, bundle task or bucket does not exist.",
    Exit.REFUSED: "A rule forbids it: wrong state, name taken, limit reached, not yours, or plain HTTP in the open.",
    Exit.DAMAGED: "The bundle is damaged or forged: a signature, digest, size or name does not hold.",
    Exit.WRONG_KEY: "The private key is not the one that the bundle was made for.",
    Exit.MISSING_COMPONENT: "A program or library that this needs is not installed; stderr names the package.",
    Exit.TASK_FAILED: "A bundle task that was watched has failed.",
    Exit.TASK_CANCELLED: "A bundle task that was watched was cancelled, and none failed.",
    Exit.START_AGAIN: "An operator has ended the drain of this host while its agent drained: start the agent again.",
    Exit.TAKEN_OVER: "Another process is this host's agent now, or another host has adopted its tasks.",
    Exit.INTERRUPTED: "Stopped by Ctrl-C.",
}

NO_RESTART = frozenset({Exit.USAGE, Exit.REFUSED, Exit.TAKEN_OVER})
"""After these a service manager must not start a service again, which would change nothing or take a host back."""
