"""One real service for all clients; writes their results as JSON for `scripts/make_clients_table.py`."""

import json
import os
from pathlib import Path

import pytest

from clients.clients import CLIENTS
from clients.driving import Driver
from clients.relay import relaying
from clients.world import World
from support.service.forked_server import ForkedServer

TABLE = "THRAVE_CLIENTS_TABLE"
"""Environment variable with the path of the results."""
VERSIONS = pytest.StashKey[dict[str, str]]()
OUTCOMES = pytest.StashKey[dict[str, dict[str, str]]]()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    with ForkedServer.running(folder / "thrave", worker_concurrency=4) as server:
        world = World(server, folder)
        yield world
        world.ec2.close()


@pytest.fixture(scope="session")
def relay(world):
    with relaying(world.server.url) as relay:
        yield relay


@pytest.fixture(scope="session")
def client(request):
    return request.param


@pytest.fixture(scope="session")
def driver(client, world, relay, tmp_path_factory, request):
    driver = Driver(client.kit.prepare(), relay.url, world.key, str(tmp_path_factory.mktemp("home")))
    request.config.stash[VERSIONS][client.name] = driver("version")["version"]
    return driver


def pytest_configure(config):
    config.stash[VERSIONS], config.stash[OUTCOMES] = {}, {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "action" in given and (report.when == "call" or not report.passed):
        item.config.stash[OUTCOMES].setdefault(given["client"].name, {})[given["action"]] = report.outcome
    return report


def pytest_sessionfinish(session):
    if path := os.environ.get(TABLE):
        stash = session.config.stash
        Path(path).write_text(json.dumps([row(client, stash) for client in CLIENTS], indent=2) + "\n")


def row(client, stash):
    return {
        "client": client.name,
        "version": stash[VERSIONS].get(client.name),
        "api_version": client.api_version,
        "signature": client.signature,
        "method": client.method,
        "signs_policy": client.signs_policy,
        "outcomes": stash[OUTCOMES].get(client.name, {}),
        "cannot": dict(client.cannot),
    }
