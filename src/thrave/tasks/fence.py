"""One agent a host: whoever has lost its host's lease may write no more.

An agent that starts takes a new lease on its host, and with it what an earlier agent of that name may have left; an
operator who has another host adopt its tasks takes the lease away. Whoever finds its lease gone ends at once, as if
killed: nothing that it holds outlives it, and what it was doing goes on elsewhere. It never decides who should have it.
"""

import os
from dataclasses import dataclass
from typing import Never

import sqlalchemy as sa
import structlog

from thrave.database import bundle_task, host

LOST = 75  # the exit status (cli/exits.py): EX_TEMPFAIL of sysexits.h, since starting it again may be right

log = structlog.get_logger()


@dataclass(frozen=True)
class Fence:
    """An agent's right to work on the tasks of its host."""

    host: str
    lease: str

    def check(self, connection: sa.Connection, bundle_id: str) -> None:
        """See that the task is still ours, until the connection's transaction ends; else end the process."""
        query = (
            sa.select(bundle_task.c.bundle_id)
            .join(host, host.c.host == bundle_task.c.host)
            .where(bundle_task.c.bundle_id == bundle_id, self.holds)
            .with_for_update(read=True)
        )
        if connection.execute(query).first() is None:
            self.end()

    @property
    def holds(self) -> sa.ColumnElement[bool]:
        """True of this agent's host, for as long as it has the lease."""
        return sa.and_(host.c.host == self.host, host.c.lease == self.lease)

    def end(self) -> Never:
        """End the process: somebody else has the host now."""
        log.error("another agent has this host now", host=self.host)
        os._exit(LOST)
