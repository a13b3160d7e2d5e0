"""The page of clients has the clients and versions of the current table."""

from pathlib import Path

from clients.clients import CLIENTS
from clients.kits import Npm, PyPI

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "clients.md"


def test_page_has_clients_of_table_with_fetched_versions():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [client.name for client in CLIENTS]
    for client, (_, version, api_version, signature, method, *_) in zip(CLIENTS, rows, strict=True):
        assert (api_version, signature, method) == (client.api_version, client.signature, client.method)
        if isinstance(client.kit, (PyPI, Npm)):
            assert client.kit.requirement.endswith((f"=={version}", f"@{version}"))
