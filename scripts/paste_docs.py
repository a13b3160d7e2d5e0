"""Pastes the README and every how-to into new directories of a new Debian, as an ordinary user.

    scripts/fresh-debian bookworm user python3 -u scripts/paste_docs.py [PAGE...]     as root

Standard library only, because nothing else is installed there. The user's sudo must ask for no password. PAGE is a
file name without `.md`; without one, every page is pasted.

Thrave comes from a wheel of this checkout, where a reader's pip asks an index. The README's section "Install" is
pasted once. Each page gets a copy of that virtual environment, the how-tos without the AWS CLI. The install commands
of a page are executed as they stand. What they have installed is removed before a page that names other packages.
Prints the terminal of each page, and at the end a table.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.paste import (  # noqa: E402
    CONTAINER_PAGES,
    HOST_PAGES,
    Pasted,
    blocks_of,
    install_commands,
    kill_session,
    paste,
    running,
)

README = ROOT / "README.md"
TIMEOUT = 900.0  # seconds for a page
ENDING_TIMEOUT = 60.0  # seconds until the servers of a page have ended
VENV = "thrave-venv"
"""Name of the virtual environment in the README."""


class Result(NamedTuple):
    """The result of a page: `ok`, `failed` or `not pasted`, with the reason of the latter two."""

    page: str
    outcome: str
    seconds: float
    reason: str = ""


def main(names: list[str]) -> int:
    """Paste the pages; return 1 if one failed."""
    pages = [README, *sorted((ROOT / "docs" / "howto").glob("*.md"))]
    if unknown := set(names) - {page.stem for page in pages}:
        print(f"no such page: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    home = Path.home() / "reader"
    home.mkdir()
    prepare_debian()
    # LANG is empty, as in a new Debian without a locale.
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "USER": os.environ.get("USER", ""), "LANG": ""}
    for name in ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "PIP_CERT"):
        if name in os.environ:
            environment[name] = os.environ[name]
    results = [install_as_in_readme(home, environment)]
    if results[0].outcome == "ok":
        installed, clean = "", debian_packages()
        # Pages that name the same packages follow each other.
        for page in sorted((page for page in pages if not names or page.stem in names), key=apt_commands):
            if apt_commands(page) != installed:
                remove(debian_packages() - clean)
                installed = apt_commands(page)
            results.append(result_of(page, home, environment))
    width = max(len(result.page) for result in results)
    print("\n\n# Results\n")
    for result in results:
        print(f"{result.page:{width}}  {result.outcome:10}  {result.seconds:5.0f} s  {result.reason}".rstrip())
    return 1 if any(result.outcome == "failed" for result in results) else 0


def prepare_debian() -> None:
    """Let apt ask no question, because the commands of the pages are executed as they stand, and not sync its files."""
    settings = b'APT::Get::Assume-Yes "true";\nDpkg::Use-Pty "false";\n'
    sudo("tee", "/etc/apt/apt.conf.d/90paste-docs", stdin=settings)
    sudo("tee", "/etc/dpkg/dpkg.cfg.d/paste-docs", stdin=b"force-unsafe-io\n")
    sudo("debconf-set-selections", stdin=b"debconf debconf/frontend select Noninteractive\n")
    sudo("apt-get", "-q", "update")


def install_as_in_readme(home: Path, environment: dict[str, str]) -> Result:
    """Paste the README's section Install; pip finds a wheel of this checkout."""
    heading("README: Install")
    started = time.monotonic()
    before = README.read_text().partition("\n## Install\n")[2].partition("\n## ")[0].partition("```")[0]
    for command in re.findall(r"`(sudo apt-get install [^`]*)`", before):
        execute(command, home, environment)
    builder, wheels = home.parent / "builder", home.parent / "wheels"
    execute(f"python3 -m venv {builder} && {builder}/bin/pip wheel -q --no-deps -w {wheels} {ROOT}", home, environment)
    environment["PIP_FIND_LINKS"] = str(wheels)
    blocks = [block for block in blocks_of(README.read_text()) if f"-m venv {VENV}" in block]
    pasted = paste(blocks, home, environment, timeout=TIMEOUT)
    print(pasted.output)
    if pasted.status:
        return Result("README: Install", "failed", time.monotonic() - started, f"exit status {pasted.status}")
    (home / VENV).rename(home / "pristine")
    return Result("README: Install", "ok", time.monotonic() - started)


def result_of(page: Path, home: Path, environment: Mapping[str, str]) -> Result:
    """Install what a page asks for, and paste its blocks into a new directory."""
    if page.stem in HOST_PAGES:
        return Result(page.stem, "not pasted", 0, "needs a host with systemd and libvirt; tests/docs pastes this page")
    if page.stem in CONTAINER_PAGES:
        return Result(
            page.stem, "not pasted", 0, "needs Podman and an image registry; tests/packaging pastes this page"
        )
    heading(page.stem)
    started = time.monotonic()
    text = page.read_text()
    venv = home / VENV
    subprocess.run(["cp", "-al", home / "pristine", venv], check=True)
    activated = {**environment, "PATH": f"{venv / 'bin'}:{environment['PATH']}", "VIRTUAL_ENV": str(venv)}
    folder = home / page.stem
    folder.mkdir()
    try:
        if page != README:  # its AWS CLI; the other pages name Debian's, which is older
            execute("pip uninstall -q -y awscli", home, activated)
        for command in install_commands(text):
            execute(command, home, activated)
        pasted = paste(blocks_of(text, without=["Install"]), folder, activated, timeout=TIMEOUT)
        print(pasted.output)
        reason = problem_of(pasted)
        kill_session(pasted.session)
    except subprocess.CalledProcessError as error:
        reason = f"`{error.cmd}` exited with {error.returncode}"
    finally:
        shutil.rmtree(venv)
        shutil.rmtree(folder)
    return Result(page.stem, "failed" if reason else "ok", time.monotonic() - started, reason)


def problem_of(pasted: Pasted) -> str:
    """Return what is wrong with a pasted page; empty if nothing is."""
    if pasted.status:
        return f"exit status {pasted.status} after {pasted.blocks} blocks"
    deadline = time.monotonic() + ENDING_TIMEOUT
    while processes := running(pasted.session):
        if time.monotonic() > deadline:
            return f"{len(processes)} processes did not end"
        time.sleep(0.2)
    return ""


def apt_commands(page: Path) -> str:
    """Return the commands with which a page installs Debian's packages."""
    return "; ".join(command for command in install_commands(page.read_text()) if command.startswith("sudo"))


def remove(packages: set[str]) -> None:
    """Remove Debian packages, so that the next page cannot use them."""
    if packages:
        sudo("apt-get", "-q", "purge", *sorted(packages))


def debian_packages() -> set[str]:
    """Return the installed packages."""
    command = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Package}\n"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line[3:].strip() for line in listed.splitlines() if line.startswith("ii")}


def execute(command: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Execute a command of a page, and print it first."""
    print(f"$ {command}", flush=True)
    subprocess.run(command, shell=True, check=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL)


def sudo(*command: str, stdin: bytes = b"") -> None:
    """Execute a command as root."""
    subprocess.run(["sudo", *command], check=True, input=stdin, stdout=subprocess.DEVNULL)


def heading(title: str) -> None:
    """Begin the output of a page."""
    print(f"\n\n# {title}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
