"""The states of a fleet's hosts. Everything that decides which state may follow which stands in this file.

A host is `active` while it takes tasks. An operator drains it: it finishes what it has begun and takes no more, also
if its agent is started anew meanwhile, until an operator makes it active again. A host whose tasks another host has
adopted is `fenced`: its agent has lost its lease, and it is active again when an agent is started on it.

This module changes nothing by itself: `hosts.py` applies the table to the database, by compare-and-set.
"""

from enum import StrEnum


class HostState(StrEnum):
    """What a host is there for."""

    ACTIVE = "active"
    DRAINING = "draining"
    DRAINED = "drained"
    FENCED = "fenced"


class HostEvent(StrEnum):
    """What changes the state of a host."""

    AGENT_STARTS = "its agent starts"
    DRAIN = "`thrave host drain`"
    AGENT_HAS_DRAINED = "its agent has finished what was begun"
    ACTIVATE = "`thrave host activate`"
    TAKE_AWAY = "`thrave host adopt` or `retire`"


_S = HostState

MEANING: dict[HostState, str] = {
    _S.ACTIVE: "It takes tasks.",
    _S.DRAINING: "It finishes what it has begun, and takes no more. Its agent ends then.",
    _S.DRAINED: "Its agent has ended, as it was asked to. What it had not begun waits for it.",
    _S.FENCED: "Another host has adopted its tasks. Its agent may do nothing more until it is started anew.",
}

MOVES: dict[HostEvent, dict[HostState, HostState]] = {
    HostEvent.AGENT_STARTS: {
        _S.ACTIVE: _S.ACTIVE,
        _S.DRAINING: _S.DRAINING,
        _S.DRAINED: _S.DRAINING,
        _S.FENCED: _S.ACTIVE,
    },
    HostEvent.DRAIN: {_S.ACTIVE: _S.DRAINING, _S.DRAINING: _S.DRAINING, _S.DRAINED: _S.DRAINED},
    HostEvent.AGENT_HAS_DRAINED: {_S.DRAINING: _S.DRAINED, _S.DRAINED: _S.DRAINED},
    HostEvent.ACTIVATE: {_S.ACTIVE: _S.ACTIVE, _S.DRAINING: _S.ACTIVE, _S.DRAINED: _S.ACTIVE},
    HostEvent.TAKE_AWAY: dict.fromkeys(_S, _S.FENCED),
}
"""For each event the state after it, by the state before it. An event that has no such entry is refused."""

WITH_AN_AGENT = frozenset({_S.ACTIVE, _S.DRAINING})
"""The states in which a host should send heartbeats."""
