"""Writes the pages of docs/reference that are generated from tables, help texts and docstrings in the code.

    python scripts/make_docs.py            writes all pages
    python scripts/make_docs.py --check    reports pages that are out of date

Do not edit these pages. python_api.py writes the page of the Python API.
"""

import ast
import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
from pydantic_core import PydanticUndefined
from python_api import python_api

from thrave.buckets.errors import KINDS, TABLE, Kind
from thrave.cli.exit_codes import MEANING
from thrave.cli.main import COMMANDS, thrave
from thrave.config import Settings
from thrave.doctor.check_table import CHECKS, CLEAN_UP
from thrave.ec2.errors import ERRORS
from thrave.identity.policies import ELEMENTS, MAX_CHARACTERS, STATEMENT_ELEMENTS
from thrave.identity.policy_conditions import KEYS, OPERATORS
from thrave.log_events import CONTEXT_FIELDS, EVENTS
from thrave.tasks.errors import ERROR_CODES
from thrave.tasks.failpoints import FAILPOINTS
from thrave.tasks.models import (
    FIRST_STEP,
    FIRST_UNDO_STEP,
    FORWARD_STEPS,
    HOST_STATES,
    HOST_TRANSITIONS,
    STEP_TRANSITIONS,
    STEPS_UNTIL_STORED,
    TASK_TRANSITIONS,
    UNDO_STEPS,
    HostState,
    Step,
    StepDescription,
)
from thrave.testing.faults import FAULTS, OBJECTS, STATES
from thrave.volumes.image_rules import FINDINGS, REFERENCES, ImageRule

SOURCE = Path(__file__).parents[1] / "src" / "thrave"
_OTHER_FOLDERS = ("volumes", "bundle", "buckets", "doctor", "cli", "demo", "host_files", "moto")
CONFORMANCE_RESULTS = Path(__file__).with_name("conformance.json")
CONFORMANCE_SOURCES = Path(__file__).with_name("conformance_sources.toml")
JSON_FIELDS = Path(__file__).parent / "json_output.toml"
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
MADE = "<!-- Made by `make docs` from {source}. Do not edit. -->\n\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    lines = [[*header], ["---"] * len([*header]), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _default(value: object) -> str:
    """A default as in the TOML file."""
    if value is PydanticUndefined:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings() -> str:
    """Every setting with its name in the environment, its type, default and meaning."""
    rows = [
        (f"`{name}`", f"`THRAVE_{name.upper()}`", _default(field.default),
         field.description)
        for name, field in Settings.model_fields.items()
    ]  # fmt: skip
    return (
        "# Settings\n\nFrom the command line, else the environment, else the TOML file given with `--config`.\n\n"
        + table(("in the file", "in the environment", "default", "meaning"), rows)
    )


def exit_codes() -> str:
    """Exit codes of the command."""
    return (
        "# Exit codes of the `thrave` command\n\nStable: within a major version a code keeps its meaning and no code is"
        " removed. New codes can be added, so treat an unknown code as a failure. The help of a command lists its"
        " codes ([commands](commands.md)).\n\n"
        + table(
            ("code", "name", "meaning"), ((int(code), f"`{code.name}`", meaning) for code, meaning in MEANING.items())
        )
    )


def ec2_errors() -> str:
    """Errors of the EC2 API."""
    rows = ((f"`{code}`", kind.status, kind.cause, kind.message, kind.source) for code, kind in ERRORS.items())
    return "# Errors of the EC2 API\n\n" + table(("code", "HTTP", "when", "message", "source"), rows)


def task_errors() -> str:
    """Error codes of bundle tasks."""
    rows = ((f"`{code}`", cause.meaning, cause.remedy) for code, cause in ERROR_CODES.items())
    return (
        "# Error codes of bundle tasks\n\n`DescribeBundleTasks` returns them as `BundleTaskError.Code`, with a message"
        " for the case.\n\n" + table(("code", "what happened", "what to do"), rows)
    )


def doctor() -> str:
    """Checks of `thrave doctor`."""
    rows = (
        (check.area, check.name, check.tries, "yes" if check.optional else "", check.remedy)
        for check in (*CHECKS, CLEAN_UP)
    )
    return (
        "# What `thrave doctor` checks\n\nIn this order. The outcome of a check that does not succeed is `failed`, or"
        " `warning` if tasks can do without it.\n\n"
        + table(("of the", "check", "what is checked", "optional", "what to do"), rows)
    )


def store_errors() -> str:
    """Errors of stores, with who must act."""
    header = ("code or status", "who must act", "meaning", "what to do")
    codes, statuses = [], []
    for key, row in TABLE.items():
        rows = codes if isinstance(key, str) and not key.endswith("xx") else statuses
        rows.append((f"`{key}`", row.kind.value, row.meaning, row.remedy))
    return STORE_ERRORS.format(
        kinds=table(("who must act", "who that is"), ((f"`{kind}`", KINDS[kind]) for kind in Kind)),
        codes=table(header, codes),
        statuses=table(header, statuses),
    )


STORE_ERRORS = """\
# Errors of object stores

Thrave decides by S3's code, else by the HTTP status, else by the first digit of the status. A request with a
`transient` error is retried: by a task for `s3_retry_timeout` seconds, by `BundleInstance` for 5, by a command for 60
(twice, if the server has never responded). `Retry-After` is observed within that time. All other errors are final.

{kinds}
## Codes

Codes that no store sends, such as `ConnectionRefused`, are Thrave's own.

{codes}
## Statuses of other codes

{statuses}"""


DISK_IMAGES = """\
# Metadata of disk images

An image file can refer to other files, and its metadata can say that it is not a whole disk or is damaged. Thrave reads
the metadata before QEMU opens the file, and decides: `accept`; `warn`, which is accepted and reported in the task's
warning or by `thrave bundle`; `refuse`. A finding that a running machine causes counts once the machine is off.

A file that an image refers to must be in the real folder of the image that is bundled, in one of the `image_dirs`
(`thrave bundle --image-dir`), or in a folder below. Links are followed once, and their target counts. QEMU gets open
files and never a name. At the end every file is compared with its state at the start: size, times of change (also that
of its inode, which cannot be set back), and whether its name still refers to the same file. A block device has no such
times. The kernel's count of writes is compared, which does not include writes by another host or through another
device.

A file that another running machine writes to is not read, whatever name that machine uses for it. A file that
both machines only read, such as a template below their overlays, is allowed.

## Files that an image can refer to

{references}
## Findings in the metadata of an image

{findings}"""


def disk_images() -> str:
    """Properties of disk images that are checked before QEMU opens them."""
    header = ("format", "metadata", "where", "decision", "message")

    def rows(rules: Iterable[ImageRule]) -> Iterable[Iterable[object]]:
        for rule in rules:
            yield rule.format, rule.name, rule.where, f"`{rule.decision}`", rule.reason

    return DISK_IMAGES.format(references=table(header, rows(REFERENCES)), findings=table(header, rows(FINDINGS)))


def failpoints() -> str:
    """Failpoints of a task, with what happens after a crash there."""
    rows = ((f"`{name}`", row.action, row.after_crash) for name, row in FAILPOINTS.items())
    return (
        "# Failpoints\n\nEach write of a bundle task to the database, the bucket or the hypervisor has a name. With"
        ' the setting `failpoint = "part-stored, before"` or `"part-stored, after"` the service kills itself before or'
        ' after that write; with `"part-stored, after, 3"` after the third one. `scripts/kill_sweep.py` does this for'
        " each name.\n\n" + table(("name", "what is done there", "after a crash there"), rows)
    )


def test_faults() -> str:
    """Faults that a test can inject into ThraveService."""
    rows = (
        (
            f"`{name}`",
            ", ".join(f"`{option}={value!r}`" for option, value in row.options.items()),
            row.effect,
            row.result,
        )
        for name, row in FAULTS.items()
    )
    return (
        "# Faults that a test can inject\n\n`@pytest.mark.thrave_fault(NAME, OPTION=VALUE, …)` injects one into the"
        " service of a test, and so does `thrave_service.inject`. Several faults can be combined; the first one that"
        " applies to a call is injected. [How to use them](../howto/test-your-code.md#inject-a-fault).\n\n"
        "- `times`: how often the fault is injected; 0: always. `after`: how many calls are skipped first.\n"
        "- `action`: an action of the EC2 API, such as `BundleInstance`; empty: every action.\n"
        "- `code`: [of the EC2 API](ec2-errors.md) or [of bundle tasks](task-errors.md).\n"
        f"- `state`: {', '.join(f'`{state}`' for state in STATES)}.\n"
        f"- `object`: {', '.join(f'`{kind}`' for kind in OBJECTS)}.\n\n"
        + table(("fault", "options, with their defaults", "what the service does", "what a client sees"), rows)
    )


CONFORMANCE = """\
# Test doubles of EC2

What test doubles do with the bundle calls and with instance-store images. `make conformance` ran the same probes on
each of them, with boto3, on {date}. A probe looks at effects: objects in the bucket, the bytes of an opened bundle, the
power of the instance, and what is refused. The form of a response proves nothing: an empty body has it, too.

Thrave runs as `thrave.testing.ThraveService` and adds instances by its own API: it has no RunInstances and no images.

{results}
{notes}
If a double cannot make a bundle, its bucket gets one that was made elsewhere, for the probes of images. ministack
starts a container for an instance of a registered image; this machine had no container engine.

## Other doubles

As described in their sources, read on {read}. None of them was run.

{others}"""


def conformance() -> str:
    """What test doubles of EC2 do with bundle tasks and instance-store images."""
    found, sources = json.loads(CONFORMANCE_RESULTS.read_text()), tomllib.loads(CONFORMANCE_SOURCES.read_text())
    doubles = found["doubles"]
    reasons = list(
        dict.fromkeys(
            result["detail"] for double in doubles for result in double["results"].values() if result["detail"]
        )
    )

    def cell(result: Mapping[str, str | bool]) -> str:
        return "yes" if result["is_ok"] else f"no ({reasons.index(str(result['detail'])) + 1})"

    rows = (
        (probe["area"], probe["title"], *(cell(double["results"][name]) for double in doubles))
        for name, probe in found["probes"].items()
    )
    header = ("of the", "behaviour", *(f"{double['name']} {double['version']}" for double in doubles))
    return CONFORMANCE.format(
        date=found["date"],
        results=table(header, rows),
        notes="".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1)),
        read=sources["date"],
        others=table(
            ("double", "source", "bundle tasks and instance-store images"),
            ((double["name"], double["source"], double["found"]) for double in sources["doubles"]),
        ),
    )


def states() -> str:
    """States and steps of a bundle task, as diagrams and tables."""
    names = "\n".join(f'    state "{state}" as {state.name}' for state in TASK_TRANSITIONS)
    edges = "\n".join(
        f"    {state.name} --> {after.name}" for state, follow in TASK_TRANSITIONS.items() for after in sorted(follow)
    )
    rows = (
        (f"`{state}`", ", ".join(f"`{after}`" for after in sorted(follow)) or "nothing")
        for state, follow in TASK_TRANSITIONS.items()
    )
    return (
        f"# States of a bundle task\n\n```mermaid\nstateDiagram-v2\n{names}\n    [*] --> PENDING\n{edges}\n```\n\n"
        + table(("state", "next states"), rows)
        + STEPS_OF_A_TASK.format(diagram=_steps_diagram(), forward=_steps(FORWARD_STEPS), undo=_steps(UNDO_STEPS))
    )


def _steps_diagram() -> str:
    names = [f'    state "{step}" as {step.name}' for step in Step]
    edges = [f"    {step.name} --> {after.name}" for step in Step if (after := STEP_TRANSITIONS.get(step)) is not None]
    failures = [
        f"    {step.name} --> {FIRST_UNDO_STEP.name}: {'' if step is Step.START else 'fails, or '}is cancelled"
        for step in FORWARD_STEPS
        if step in STEPS_UNTIL_STORED
    ]
    ends = [f"    [*] --> {FIRST_STEP.name}", "    COMPLETE --> [*]: complete", "    FAIL --> [*]: failed"]
    return "\n".join(["```mermaid", "stateDiagram-v2", *names, *ends[:1], *edges, *failures, *ends[1:], "```", ""])


def _steps(steps: Mapping[Step, StepDescription]) -> str:
    rows = ((f"`{step}`", row.action, row.on_failure) for step, row in steps.items())
    return table(("step", "what it does", "if it fails permanently"), rows)


STEPS_OF_A_TASK = """
# Steps of a bundle task

The task's row names the next step. A step that was interrupted by a crash is repeated.

{diagram}
{forward}
After the transaction that records a failure or a cancellation, the task has only these steps:

{undo}"""


def host_states() -> str:
    """States of a host, as a diagram and a table."""
    names = "\n".join(f'    state "{state}" as {state.name}' for state in HostState)
    edges = "\n".join(
        f"    {before.name} --> {after.name}: {event.value.replace('`', '')}"
        for event, moves in HOST_TRANSITIONS.items()
        for before, after in moves.items()
        if before is not after
    )
    rows = (
        (f"`{state}`", HOST_STATES[state], *(_after(moves.get(state)) for moves in HOST_TRANSITIONS.values()))
        for state in HostState
    )
    return (
        "# States of a fleet's host\n\nAn empty cell means that the state does not allow the event: the command is"
        " refused with exit code 4. An active or draining host that has sent no heartbeat for its `heartbeat_timeout`"
        " seconds, by the database's clock, is shown as `lost`.\n\n"
        f"```mermaid\nstateDiagram-v2\n{names}\n    [*] --> ACTIVE\n{edges}\n```\n\n"
        + table(("state", "meaning", *(f"after: {event}" for event in HOST_TRANSITIONS)), rows)
    )


def _after(state: HostState | None) -> str:
    return "" if state is None else f"`{state}`"


POLICIES = """\
# Policies of users

The part of IAM's JSON policy language that Thrave evaluates. A policy with any other element is rejected, with the
reason, when it is stored. A user is allowed to do what one statement allows and no statement denies. The account itself
is allowed to do everything; its own access keys belong to no user.

All policies of a user together have at most {characters:,} characters, not counting white space.

## The document

{document}
## A statement

{statement}
Actions have EC2's names (`ec2:BundleInstance`). There is one more: `s3:PutObject`, for the user whose key signs an
upload policy; its resources are the bundle's objects (`arn:aws:s3:::BUCKET/PREFIX*`). `sts:GetCallerIdentity` needs no
permission. Actions of other services in a policy have no effect. Unknown names of actions have no effect either;
`thrave account user policy put` warns about them.

## Condition keys

{keys}
## Condition operators

All except `Null` can have the suffix `IfExists`: the condition then also holds if the request has no value for the
key. Several values of one key are joined by OR, everything else by AND.

{operators}"""


def log_events() -> str:
    """Events of tasks and of the service in the log."""
    rows = (
        (f"`{name}`", row.level, ", ".join(f"`{field}`" for field in row.fields), row.text)
        for name, row in EVENTS.items()
    )
    return LOG_EVENTS.format(
        context=table(("field", "meaning"), ((f"`{name}`", meaning) for name, meaning in CONTEXT_FIELDS.items())),
        events=table(("event", "level", "fields", "when"), rows),
    )


LOG_EVENTS = """\
# Events in the log

The processes of the service log to stderr, with `--log-format text` for people or `json` for programs. In JSON each
line is an object with `event`, `level`, `timestamp` and the fields below. Sizes are in bytes, times in seconds. A field
without a value is absent. No line has a secret.

Each of these lines is one event. Other lines report errors and retries; repetitions of those are counted.

{events}
A line that is written while a request is handled or a task runs has these fields too:

{context}"""


def policies() -> str:
    """The supported part of IAM's policy language."""
    header = ("element", "meaning")
    return POLICIES.format(
        characters=MAX_CHARACTERS,
        document=table(header, ((f"`{name}`", meaning) for name, meaning in ELEMENTS.items())),
        statement=table(header, ((f"`{name}`", meaning) for name, meaning in STATEMENT_ELEMENTS.items())),
        keys=table(("key", "type", "value"), ((f"`{name}`", key.type, key.meaning) for name, key in KEYS.items())),
        operators=table(
            ("operator", "type", "the request's value is"),
            ((f"`{name}`", kind.type, kind.meaning) for name, kind in OPERATORS.items()),
        ),
    )


def commands() -> str:
    """The help of every command."""
    context = click.Context(thrave, info_name="thrave")
    pages = []
    for name in COMMANDS:
        command = thrave.get_command(context, name)
        assert command is not None
        pages += list(_help(command, f"thrave {name}"))
    return COMMANDS_PAGE + "\n".join(pages)


COMMANDS_PAGE = """\
# The `thrave` command

Stable, for scripts: names of commands and options, [exit codes](exit-codes.md), and the fields of
[`--output json`](json-output.md). Within a major version none of them is removed or renamed. Not stable: tables,
messages and progress for people, and their order. JSON is printed on stdout, everything else on stderr.

"""


JSON_PAGE = """\
# Fields of `--output json`

Each command prints one JSON document on stdout. Stable: within a major version no field is removed or renamed, and the
meaning of a field does not change. Fields can be added, so ignore unknown ones. The order of fields is not stable.

Sizes are in bytes, times in ISO 8601 and UTC. `name[]` is a list. A field marked "optional" can be absent. Every other
field is present; it can be null if its text says so. The fields below a null or empty value are absent.

If a command fails, the last line of stderr is a JSON document with the field `error`: the object
[error](#the-object-error). Warnings, progress and log lines can come before it. Stdout then has no document, except of
commands that report a failed check or task (`thrave doctor`, `thrave task watch`, `thrave task cancel`).

"""


def json_output() -> str:
    """The fields of the JSON document of every command."""
    documents = tomllib.loads(JSON_FIELDS.read_text())
    pages = [_json_section(f"The object `{name}`", fields) for name, fields in documents["objects"].items()]
    pages += [_json_section(f"thrave {name}", fields) for name, fields in documents["commands"].items()]
    return JSON_PAGE + "\n".join(pages)


def _json_section(title: str, fields: Mapping[str, str | list[str]]) -> str:
    rows = []
    for name, meaning in fields.items():
        references = [text.removeprefix("@") for text in ([meaning] if isinstance(meaning, str) else meaning)]
        links = " and of the ".join(f"[{text}](#the-object-{text.replace(' ', '-')})" for text in references)
        if name == "*":
            rows.append(("…", f"The fields of the {links}."))
        elif isinstance(meaning, str) and meaning.startswith("@"):
            rows.append((f"`{name}`", f"The object {links}." if "[]" not in name else f"List of the object {links}."))
        else:
            optional = "Optional. " if name.endswith("?") else ""
            rows.append((f"`{name.removesuffix('?').removesuffix('{}')}`", f"{optional}{meaning}"))
    return f"## {title}\n\n" + table(("field", "meaning"), rows)


def _help(command: click.Command, name: str) -> Iterable[str]:
    parent = click.Context(thrave, info_name="thrave", max_content_width=100, terminal_width=100)
    context = click.Context(command, info_name=name.removeprefix("thrave "), parent=parent)
    yield f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            child = command.get_command(context, sub)
            assert child is not None
            yield from _help(child, f"{name} {sub}")


def modules() -> str:
    """Every module with the first line of its docstring."""
    pages = []
    for folder in ["", "ec2", "ec2/protocol", "identity", "tasks", "compute", "compute/libvirt", *_OTHER_FOLDERS]:
        files = sorted(path for path in (SOURCE / folder).glob("*.py") if path.name != "__main__.py")
        rows = [(f"`{path.name}`", _first_line(path)) for path in files if path.name != "__init__.py"]
        title = f"{folder}/" if folder else "thrave/"
        pages.append(
            f"## {title}\n\n{_first_line(SOURCE / folder / '__init__.py')}\n\n{table(('module', 'what it has'), rows)}"
        )
    return "# Modules\n\nHow they work together: [ARCHITECTURE.md](../../ARCHITECTURE.md).\n\n" + "\n".join(pages)


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    return docstring.split("\n\n")[0].replace("\n", " ")


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "settings.md": ("src/thrave/config.py", settings),
    "exit-codes.md": ("src/thrave/cli/exit_codes.py", exit_codes),
    "ec2-errors.md": ("src/thrave/ec2/errors.py", ec2_errors),
    "task-errors.md": ("src/thrave/tasks/errors.py", task_errors),
    "store-errors.md": ("src/thrave/buckets/errors.py", store_errors),
    "doctor.md": ("src/thrave/doctor/check_table.py", doctor),
    "failpoints.md": ("src/thrave/tasks/failpoints.py", failpoints),
    "conformance.md": ("scripts/conformance.json and conformance_sources.toml", conformance),
    "test-faults.md": ("src/thrave/testing/faults.py", test_faults),
    "disk-images.md": ("src/thrave/volumes/image_rules.py", disk_images),
    "task-states.md": ("src/thrave/tasks/models.py", states),
    "host-states.md": ("src/thrave/tasks/models.py", host_states),
    "log-events.md": ("src/thrave/log_events.py", log_events),
    "policies.md": ("src/thrave/identity/policies.py and conditions.py", policies),
    "modules.md": ("the docstrings of src/thrave", modules),
    "commands.md": ("the help of the commands", commands),
    "json-output.md": ("scripts/json_output.toml", json_output),
    "python-api.md": ("the docstrings of thrave.bundle, thrave.testing and thrave.pytest_plugin", python_api),
}


def main() -> int:
    """Write or compare the pages; return the number of pages that are out of date."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, (source, make) in PAGES.items():
        page, path = MADE.format(source=source) + make().rstrip() + "\n", REFERENCE / name
        if check and (not path.exists() or path.read_text() != page):
            stale.append(name)
        elif not check:
            path.write_text(page)
    for name in stale:
        print(f"docs/reference/{name} is out of date; run `make docs`")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
