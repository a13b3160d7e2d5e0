"""Errors of all commands: exit codes, messages without traceback or library text, suggestions, escaped output."""

import builtins
import importlib
import inspect
import json
import os
import pkgutil
import random
import subprocess
import sys
from pathlib import Path

import click
import pytest

import thrave as thrave_package
from thrave.cli.exit_codes import EXITS, Exit, exit_code
from thrave.cli.main import COMMANDS, HARMFUL
from thrave.cli.main import thrave as group
from thrave.cli.output import print_result, printable, table

TIMEOUT = 120  # seconds
SECRET = "hunter2-hunter2"


def commands(found=group, words=()):
    """Yield (words, command) of every command."""
    context = click.Context(found)
    for name in found.list_commands(context):
        command = found.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


KINDS = [kind for kind in vars(builtins).values()
         if inspect.isclass(kind) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | Warning)
         and kind not in {BrokenPipeError, BaseException} and not kind.__name__.endswith("Group")]  # fmt: skip


def an_exception(words):
    """Return a random exception class of Python; always the same for the same command."""
    return random.Random(" ".join(words)).choice(KINDS)


def test_exit_code_of_each_error_in_table():
    """The table imports no module; here all modules are imported, so each name must resolve."""
    for module in pkgutil.walk_packages(thrave_package.__path__, "thrave."):
        if not module.name.startswith(("thrave.__main__", "thrave.migrations")):
            importlib.import_module(module.name)
    for get_class, code in EXITS:
        error_class = get_class()
        assert issubclass(error_class, Exception)
        assert exit_code(error_class.__new__(error_class)) == code


@pytest.mark.parametrize(("words", "command"), [*commands()], ids=[" ".join(words) for words, _ in commands()])
def test_unexpected_error_is_one_line_with_path_of_details(thrave, monkeypatch, tmp_path, words, command):
    kind = an_exception(words)

    def fail(_context):
        raise kind(SECRET)

    monkeypatch.setattr(command, "invoke", fail)
    monkeypatch.setattr(command, "params", [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, stdout, stderr = thrave(*words)
    assert (status, stdout) == (Exit.FAILED, "")
    (line,) = stderr.splitlines()
    assert line.startswith(f"thrave: unexpected error in `thrave {words[0]}` ({kind.__name__})")
    assert SECRET not in line
    (details,) = tmp_path.glob("thrave-error-*")
    assert str(details) in line
    assert details.stat().st_mode & 0o777 == 0o600
    assert "Traceback" in details.read_text()


def test_debug_prints_traceback(thrave, monkeypatch):
    def fail(words):
        raise KeyError("x")

    monkeypatch.setattr(group.get_command(click.Context(group), "help"), "callback", fail)
    status, _, stderr = thrave("--debug", "help")
    assert (status, "Traceback" in stderr) == (Exit.FAILED, True)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (PermissionError(13, "x", "/data/thrave.db"), Exit.REFUSED, "/data/thrave.db: permission denied for user "),
        (FileNotFoundError(2, "x", "/no/file"), Exit.NOT_FOUND, "/no/file does not exist"),
        (OSError(30, "x", b"/data"), Exit.FAILED, "/data: read-only file system"),
        (OSError(28, "x"), Exit.FAILED, "No space left on device. Free some space on the file system."),
    ],
)
def test_os_error_names_path(thrave, monkeypatch, error, status, says):
    def fail(words):
        raise error

    monkeypatch.setattr(group.get_command(click.Context(group), "help"), "callback", fail)
    assert thrave("help")[0] == status
    assert says in thrave("help")[2]


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        (["sevre"], "serve"), (["acount"], "account"), (["instance", "shwo"], "show"), (["account", "crate"], "create"),
        (["account", "user", "lst"], "list"), (["instance", "remvoe"], None), (["tsk"], "task"),
        (["task", "cancl"], None), (["host", "retre"], None), (["delet"], None),
    ],
)  # fmt: skip
def test_unknown_command_suggests_closest_harmless_one(thrave, words, suggested):
    status, _, stderr = thrave(*words)
    assert status == Exit.USAGE
    assert (f"Did you mean {suggested!r}?" in stderr) is (suggested is not None)
    assert not any(f"'{name}'" in stderr for name in HARMFUL)


def test_help_command_prints_help(thrave):
    assert thrave("help", "instance", "show")[1].startswith("Usage: thrave instance show")
    assert {*COMMANDS} - {"help"} <= {*thrave("help")[1].split()}


@pytest.mark.parametrize(
    "words",
    [
        ["account", "list"],
        ["host", "list"],
        ["task", "list"],
        ["instance", "list"],
        *(["instance", name, "i-0123456789abcdef0"] for name in ("show", "remove", "start", "stop")),
    ],
)
def test_missing_data_directory_is_reported_and_not_created(thrave, tmp_path, words):
    status, stdout, stderr = thrave(*words, "--data-dir", tmp_path / "goood")
    assert (status, stdout, f"No data directory at {tmp_path}/goood" in stderr) == (Exit.USAGE, "", True)
    assert not (tmp_path / "goood").exists()


def run(*words, **environment):
    return subprocess.run([sys.executable, "-m", "thrave", *words], env={**os.environ, **environment},
                          capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT)  # fmt: skip


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"},
                                    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])  # fmt: skip
def test_path_in_utf8_works_under_any_locale(tmp_path, locale):
    folder = tmp_path / "datä-日本"
    created = run("account", "create", "alice", "--data-dir", str(folder), **locale)
    assert created.returncode == 0, created.stderr
    assert (folder / "vault.key").exists()
    assert "alice" in run("account", "list", "--data-dir", str(folder)).stdout


@pytest.mark.parametrize("words", [["serve"], ["account", "create", "alice"], ["instance", "list"], ["doctor"]])
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_path_that_is_not_utf8_is_refused(tmp_path, words, locale):
    refused = run(*words, "--data-dir", os.fsdecode(bytes(tmp_path) + b"/dat\xe4"), **locale)
    assert (refused.returncode, "is not UTF-8" in refused.stderr) == (Exit.USAGE, True), refused.stderr
    assert [*tmp_path.iterdir()] == []


def test_working_directory_that_is_not_utf8_is_refused(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/dat\xe4"))
    folder.mkdir()
    refused = subprocess.run([sys.executable, "-m", "thrave", "account", "list"], cwd=folder, check=False,
                             capture_output=True, text=True, timeout=TIMEOUT)  # fmt: skip
    assert (refused.returncode, "is not UTF-8" in refused.stderr) == (Exit.USAGE, True)


UNSAFE = "a\x1b]0;x\x07b\u202ec\u009bd\x7fe\u2066f\ud800g\u200bh\U000e0001i\rj\u2028k"


@pytest.mark.parametrize("output", ["text", "json"])
def test_output_escapes_unsafe_characters(capsys, output):
    print_result(output, {"name": UNSAFE, "ä": "日本"}, f"name {UNSAFE} 日本")
    shown = capsys.readouterr().out
    assert "日本" in shown
    assert [letter for letter in shown if not (letter.isprintable() or letter == "\n")] == []
    if output == "json":
        assert json.loads(shown)["name"] == UNSAFE


def test_table_cell_is_one_line():
    assert len(table(("A", "B"), [("x\ny", UNSAFE)]).splitlines()) == 2
    assert printable("a\nb") == "a\\u000ab"


def test_error_escapes_unsafe_characters(thrave, tmp_path):
    _, _, stderr = thrave("show", tmp_path / "\x1b]0;x\x07\u202e")
    assert stderr
    assert [letter for letter in stderr if not (letter.isprintable() or letter == "\n")] == []
    _, _, stderr = thrave("\x1b[31m\u202e")
    assert [letter for letter in stderr if not (letter.isprintable() or letter == "\n")] == []


@pytest.mark.parametrize("words", ["account create alice", "serve --listen-port 0", "task list", "demo"])
def test_empty_data_directory_is_refused(thrave, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    status, _, stderr = thrave(*words.split(), "--data-dir", "")
    assert status == Exit.USAGE
    assert "must not be empty" in stderr
    assert not [*tmp_path.iterdir()]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("words", ["account create alice", "serve --listen-port 0"])
def test_shared_folder_is_refused_as_data_directory(tmp_path, words):
    """Thrave would remove the access of other users."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    result = run(*words.split(), "--data-dir", shared)
    assert result.returncode == Exit.FAILED
    assert f"{shared} is a folder that all users share" in result.stderr
    assert not [*shared.iterdir()]
    assert shared.stat().st_mode & 0o7777 == 0o1777
