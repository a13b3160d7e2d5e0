"""How PostgreSQL would answer the queries of a block: each is caught on its way, and explained.

A sequential scan of a table that grows with the number of tasks, instances or events is a fault: what it costs grows
with the table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

LARGE = 5000
"""Rows from which on a table is not to be read from one end to the other."""


@dataclass(frozen=True)
class Plan:
    """How one query is answered."""

    what: str
    query: str
    nodes: Sequence[str]
    """Each with its index or table, from the top."""
    scans: Sequence[str]
    """The large tables that it reads from one end to the other."""


class Caught:
    """Queries, each once, with the parameters that it came with first."""

    def __init__(self) -> None:
        self.queries: dict[str, tuple[str, Any]] = {}
        self.what = ""

    @contextmanager
    def during(self, what: str, *engines: sa.Engine) -> Iterator[None]:
        """Catch those that the block sends by these engines."""
        self.what = what
        for engine in engines:
            sa.event.listen(engine, "before_cursor_execute", self._catch)
        yield
        for engine in engines:
            sa.event.remove(engine, "before_cursor_execute", self._catch)

    def plans(self, connection: sa.Connection) -> list[Plan]:
        """How each would be answered."""
        return [_plan(connection, what, query, given) for query, (what, given) in self.queries.items()]

    def _catch(self, *event: Any) -> None:  # noqa: ANN401 (SQLAlchemy's `before_cursor_execute`)
        _connection, _cursor, query, given, _context, many = event
        if query.lstrip().startswith(("SELECT", "UPDATE", "DELETE", "INSERT", "WITH")):
            self.queries.setdefault(query, (self.what, given[0] if many else given))


def _plan(connection: sa.Connection, what: str, query: str, given: Any) -> Plan:  # noqa: ANN401 (the driver's)
    explained = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {query}", given).scalar_one()
    nodes = [*_nodes(explained[0]["Plan"])]
    scanned = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
    large = connection.execute(
        sa.text("SELECT relname FROM pg_class WHERE relname = ANY(:names) AND reltuples > :large ORDER BY relname"),
        {"names": [*scanned], "large": LARGE},
    )
    return Plan(what, " ".join(query.split()), [_told(node) for node in nodes], [*large.scalars()])


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _told(node: dict[str, Any]) -> str:
    of = node.get("Index Name") or node.get("Relation Name")
    return f"{node['Node Type']} {of}" if of else str(node["Node Type"])
