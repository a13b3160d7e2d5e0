"""The page about installing and upgrading, pasted with two versions of Thrave: the newer one has a migration."""

import os
import re
import sys
from pathlib import Path

import pytest

from support.paste import blocks_of, kill_session, paste
from support.servers.stores import free_ports
from support.wheels import build_wheel, copy_source

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/howto/install-and-upgrade.md").read_text()
MIGRATION = '''"""A table more."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{newest}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table("of_the_newer_version", sa.Column("id", sa.Integer))
'''
OLD_VERSION_IS_REFUSED = """
pip install --quiet --no-deps --target old --no-index thrave=={version}
! PYTHONPATH=old python3 -m thrave task list > refused.txt 2>&1
"""
"""Pasted after the upgrade, before the backup is restored."""


def newer_version(folder):
    """Return a copy of the source with a newer version and a migration."""
    project = copy_source(folder) / "pyproject.toml"
    project.write_text(re.sub(r"^version = .*$", 'version = "9.0.0"', project.read_text(), flags=re.MULTILINE))
    migrations = folder / "src/thrave/migrations/versions"
    newest = max(migrations.glob("*.py")).name.partition("_")[0]
    (migrations / "9999_newer.py").write_text(MIGRATION.format(newest=newest))
    return folder


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_page_works_with_a_newer_version(tmp_path):
    wheels, folder = tmp_path / "wheels", tmp_path / "empty"
    folder.mkdir()
    version = build_wheel(copy_source(tmp_path / "source"), wheels).name.split("-")[1]
    newer = build_wheel(newer_version(tmp_path / "newer-source"), tmp_path / "newer")
    (port,) = free_ports(1)
    environment = {
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
        # The virtual environment of the page comes first; behind it are the AWS CLI and jq.
        "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}",
        "HOME": str(tmp_path / "home"),
        "PORT": str(port),
        "PIP_FIND_LINKS": f"{wheels} {os.environ.get('PIP_FIND_LINKS', '')}",
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
    blocks = blocks_of(PAGE)
    (upgrade,) = [number for number, block in enumerate(blocks) if "--upgrade" in block]
    blocks.insert(upgrade, f"mv {newer} {wheels}")  # it is released
    blocks.insert(upgrade + 2, OLD_VERSION_IS_REFUSED.format(version=version))
    pasted = paste(blocks, folder, environment, timeout=500)
    try:
        assert pasted.status == 0, pasted.output
    finally:
        kill_session(pasted.session)
    assert "thrave-9.0.0" in pasted.output
    assert f"thrave-{version}" in pasted.output.partition("thrave-9.0.0")[2]
    assert "was changed by a newer Thrave" in (folder / "refused.txt").read_text()
