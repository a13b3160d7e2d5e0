"""The files in .github: valid YAML with the parts that GitHub requires. They were not run here."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
FILES = sorted(GITHUB.rglob("*.yml"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path):
    # A plain `on` is a boolean in YAML 1.1.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()}


def steps():
    return [(path.stem, step) for path in WORKFLOWS for job in load(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_a_yaml_mapping(path):
    assert load(path)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_few_permissions_and_a_time_limit(path):
    workflow = load(path)
    assert {"name", "on", "jobs"} <= {*workflow}
    assert workflow["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())


def test_each_action_has_a_version():
    used = [step["uses"] for _, step in steps() if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@v\d+(\.\d+)*", action)] == []


def test_each_command_of_make_is_a_target():
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    named = {
        target for _, step in steps() for target in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.MULTILINE)
    }
    assert named
    assert named <= targets


def test_quick_tests_run_on_each_python_of_the_package():
    pythons = {*load(GITHUB / "workflows/checks.yml")["jobs"]["fast"]["strategy"]["matrix"]["python"]}
    prefix = "Programming Language :: Python :: 3."
    assert {f"3.{line.removeprefix(prefix)}" for line in PROJECT["classifiers"] if line.startswith(prefix)} <= pythons


def test_only_the_job_that_publishes_may_do_so():
    jobs = load(GITHUB / "workflows/release.yml")["jobs"]
    publishing = [
        name for name, job in jobs.items() if any("pypi-publish" in step.get("uses", "") for step in job["steps"])
    ]
    assert publishing == ["publish"]
    assert jobs["publish"]["environment"] == "pypi"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in (GITHUB / "workflows/release.yml").read_text().replace("No password", "")


def test_changelog_has_a_section_for_the_version():
    assert re.search(rf"^## {re.escape(PROJECT['version'])} - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
