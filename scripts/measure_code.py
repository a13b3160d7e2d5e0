"""Prints figures about the size and structure of the code in `src/thrave`.

    python scripts/measure_code.py [ROOT]          counts: modules, lines, names, comments
    python scripts/measure_code.py [ROOT] --run    also: what one BundleInstance executes; takes half a minute

ROOT is the root of a checkout, by default of this one. Another commit can be measured through `git worktree`: nothing
is imported from ROOT, and names of its modules are not needed. `--run` starts `thrave serve` from ROOT with this
Python, which needs the dependencies of both commits and boto3.

`--run` describes one running instance without commands, whose root volume is a raw disk of 24 MiB, in a new data
directory: directory store, SQLite. Then an unmodified boto3 sends one BundleInstance. `sys.setprofile` records every
function of Thrave that is called, in every thread of the service:

- The request is what the event loop calls until the response has arrived, and what it hands to other threads.
- The task is what DBOS calls as a workflow, and what that hands to other threads.
- All other threads do housekeeping and are not counted. Neither is code that runs while a module is imported.

A call into another file is a call of a function whose file is not that of its nearest caller in Thrave. The figures
of the task vary a little from run to run with the timing of its threads.
"""

import argparse
import ast
import base64
import hashlib
import hmac
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

CONVENTIONAL = {"errors", "base", "__init__"}
"""Names that several modules may have."""

MARK = re.compile(r"#\s*(?:noqa|type:\s*ignore|fmt:|pragma:)")
"""A comment that is for a tool."""

SMALL_MODULE = 60  # lines
SMALL_FUNCTION = 5  # lines
DISK_SIZE = 24 << 20  # bytes
TASK_TIMEOUT = 120  # seconds
REGION = "us-east-1"

Definition = ast.FunctionDef | ast.AsyncFunctionDef
Figures = Iterator[tuple[str, object]]


@dataclass(frozen=True)
class Module:
    """One module of the package.

    Attributes:
        name: As `thrave.bundle.manifest`; a package has the name of its folder.
        path: Relative to `src`.
        source: Its text.
    """

    name: str
    path: Path
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.source)

    @property
    def lines(self) -> int:
        """Number of lines."""
        return len(self.source.splitlines())

    @property
    def short_name(self) -> str:
        """Name of the file without its ending."""
        return self.path.stem

    @cached_property
    def comments(self) -> list[tuple[str, bool]]:
        """Each comment, and whether it has its line for itself."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return [
            (token.string, not token.line[: token.start[1]].strip())
            for token in tokens
            if token.type == tokenize.COMMENT
        ]

    @cached_property
    def functions(self) -> list[Definition]:
        """Every function and method, nested ones included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Definition)]

    def docstring_lines(self) -> int:
        """Lines of the docstrings of the module, its classes and functions."""
        definitions = (node for node in ast.walk(self.tree) if isinstance(node, ast.Module | ast.ClassDef | Definition))
        return sum(length(node.body[0]) for node in definitions if ast.get_docstring(node) is not None)

    def imports(self, names: set[str]) -> set[str]:
        """The modules among `names` that this one imports, also in functions and for types."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                # `from package import module` imports the module, any other name comes from `package` itself.
                for alias in node.names:
                    member = f"{node.module}.{alias.name}"
                    found.add(member if member in names else node.module)
        return found & names - {self.name}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="of the checkout")
    parser.add_argument("--run", action="store_true", help="record one BundleInstance")
    parser.add_argument("--files", action="store_true", help="with --run: list the executed files")
    options = parser.parse_args()
    source = options.root.resolve() / "src"
    show(count(read_modules(source)))
    if options.run:
        calls = record_bundle_instance(source)
        show(count_calls(calls))
        if options.files:
            list_files(calls)


def show(figures: Figures) -> None:
    """Print a line for each figure."""
    for name, value in figures:
        print(f"{name:64} {value:,}" if isinstance(value, int) else f"{name:64} {value}", flush=True)


def read_modules(source: Path) -> list[Module]:
    """Read every module of the package below `source`."""
    modules = []
    for path in sorted((source / "thrave").rglob("*.py")):
        relative = path.relative_to(source)
        parts = relative.parent.parts if path.stem == "__init__" else relative.with_suffix("").parts
        modules.append(Module(".".join(parts), relative, path.read_text()))
    return modules


def count(modules: Sequence[Module]) -> Figures:
    """Count what the source says."""
    lines = sum(module.lines for module in modules)
    sizes = [module.lines for module in modules if module.short_name != "__init__"]
    yield "modules", len(modules)
    yield "lines", lines
    yield "lines of a module without __init__: mean / median", f"{statistics.mean(sizes):.0f} / {middle(sizes):.0f}"
    yield f"modules below {SMALL_MODULE} lines, without __init__", sum(size < SMALL_MODULE for size in sizes)
    yield "modules with a single importer", sum(number == 1 for number in count_importers(modules).values())
    yield from count_functions(modules)
    yield from count_text(modules, lines)
    yield from count_names(modules)
    threads = [len(re.findall(r"\bthreading\.Thread\(", module.source)) for module in modules if is_measured(module)]
    yield "threading.Thread( outside concurrency.py", f"{sum(threads)} in {sum(map(bool, threads))} modules"


def is_measured(module: Module) -> bool:
    """Whether a module is to leave threads to `concurrency.py`."""
    return module.short_name != "concurrency"


def count_importers(modules: Sequence[Module]) -> Counter[str]:
    """For each module, how many others import it; packages are not counted."""
    names = {module.name for module in modules if module.short_name != "__init__"}
    return Counter(imported for module in modules for imported in module.imports(names))


def count_functions(modules: Sequence[Module]) -> Figures:
    """Count functions, and private ones that are used at a single place of their module."""
    functions = [(module, function) for module in modules for function in module.functions]
    private = [(module, function) for module, function in functions if is_private(function.name)]
    uses = {module.name: count_uses(module) for module in modules}
    once = [function for module, function in private if uses[module.name][function.name] == 1]
    short = [function for function in once if length(function) <= SMALL_FUNCTION]
    lengths = [length(function) for _, function in functions]
    yield "functions: public / private", f"{len(functions) - len(private):,} / {len(private):,}"
    yield "lines of a function: median", int(middle(lengths))
    yield "functions above 40 lines", sum(number > 40 for number in lengths)
    yield "private functions used at one place", f"{len(once)} = {share(len(once), len(private))}"
    yield f"... of at most {SMALL_FUNCTION} lines", len(short)


def count_uses(module: Module) -> Counter[str]:
    """How often each name is used in a module: read, called, or passed on."""
    return Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


def count_text(modules: Sequence[Module], lines: int) -> Figures:
    """Count comments, docstrings and marks for the linter."""
    comments = [comment for module in modules for comment in module.comments]
    marks = [text for text, _ in comments if MARK.match(text)]
    alone = sum(is_alone for text, is_alone in comments if text not in marks)
    ends = len(comments) - len(marks) - alone
    docstrings = sum(module.docstring_lines() for module in modules)
    noqa = [text for text in marks if "noqa" in text]
    yield "lines that are only a comment", f"{alone} = {share(alone, lines, 1)}"
    yield "lines that end with a comment", f"{ends} = {share(ends, lines, 1)}"
    yield "docstring lines", f"{docstrings:,} = {share(docstrings, lines)}"
    yield "noqa marks (N818 alone)", f"{len(noqa)} ({sum('N818' in mark for mark in noqa)})"


def count_names(modules: Sequence[Module]) -> Figures:
    """Count names that several modules or several public classes have."""
    for title, free in (("", {"__init__"}), (", without conventional names", CONVENTIONAL)):
        names = Counter(module.short_name for module in modules if module.short_name not in free)
        yield f"modules that share a name{title}", format_shared(names)
    classes = Counter(
        node.name
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and not is_private(node.name)
    )
    yield "public classes that share a name", format_shared(classes)


def format_shared(names: Counter[str]) -> str:
    """How many have a name that another has, too, and how many names that are."""
    shared = {name: number for name, number in names.items() if number > 1}
    return f"{sum(shared.values())} ({len(shared)} names)"


def is_private(name: str) -> bool:
    """Whether a name is private; special methods are not."""
    return name.startswith("_") and not name.endswith("__")


def length(node: ast.stmt | ast.expr) -> int:
    """Lines of a node, for a function without its decorators."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def middle(numbers: Sequence[int]) -> float:
    """The median; 0 of nothing."""
    return statistics.median(numbers) if numbers else 0


def share(part: int, whole: int, digits: int = 0) -> str:
    """A share in per cent."""
    return f"{part / whole:.{digits}%}" if whole else "0%"


# What follows records one BundleInstance.

RECORDER = Path(__file__).with_name("call_recorder.py")
"""Python imports a module named `sitecustomize` when it starts: this one, in the service."""


@dataclass(frozen=True)
class Call:
    """One call of a function of Thrave.

    Attributes:
        thread: Which thread made it.
        purpose: `request` or `task`.
        caller: File of the nearest caller in Thrave; `-` if there is none.
        file: File of the function.
    """

    thread: int
    purpose: str
    caller: str
    file: str


def record_bundle_instance(source: Path) -> list[Call]:
    """Run the service from `source`, send one BundleInstance, and return the calls of its request and its task."""
    with tempfile.TemporaryDirectory(prefix="thrave-measure-") as name:
        folder = Path(name)
        shutil.copy(RECORDER, folder / "sitecustomize.py")
        output = folder / "calls"
        thrave = Thrave(source, folder)
        disk = folder / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20) * (DISK_SIZE >> 20))
        account = thrave.run("account", "create", "alice")
        instance = thrave.run(
            "instance", "add", "--account", account["accountId"], "--platform", "windows", "--root-volume", str(disk)
        )
        server, url = thrave.serve(output)
        try:
            sent, answered = bundle(url, account, instance["instanceId"])
        finally:
            server.terminate()
            server.wait(TASK_TIMEOUT)
        return read_calls(output, sent, answered)


class Thrave:
    """The command of one checkout, with a data directory of its own."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._command = [sys.executable, "-m", "thrave"]
        self._folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("THRAVE_")}
        self._environment = {**clean, "PYTHONPATH": str(source), "MEASURE_SOURCE": str(source)}
        # The options have had other names in other commits.
        text = subprocess.check_output([*self._command, "serve", "--help"], env=self._environment, text=True)
        self._data = [find_option(r"--data[a-z-]*", text), str(folder / "data")]
        self._port = [find_option(r"--(?:listen-)?port\b", text), "0"]

    def run(self, *words: str) -> dict[str, Any]:
        """Run a command and return its JSON."""
        command = [*self._command, *words, *self._data, "--output", "json"]
        answer: dict[str, Any] = json.loads(subprocess.check_output(command, env=self._environment))
        return answer

    def serve(self, output: Path) -> "tuple[subprocess.Popen[str], str]":
        """Start the service with the recorder; return it and its URL."""
        environment = {
            **self._environment,
            "PYTHONPATH": f"{self._folder}{os.pathsep}{self._environment['PYTHONPATH']}",
            "MEASURE_OUTPUT": str(output),
        }
        command, log = [*self._command, "serve", *self._data, *self._port], self._folder / "log"
        with log.open("wb") as errors:
            server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert server.stdout is not None
        url = re.search(r"https?://\S+", server.stdout.readline())
        if url is None:
            sys.exit(f"thrave serve did not start: {log.read_text()}")
        return server, url[0]


def find_option(pattern: str, text: str) -> str:
    """The first option in a command's help that matches."""
    found = re.search(pattern, text)
    if found is None:
        sys.exit(f"`thrave serve --help` shows no option like {pattern}")
    return found[0]


def bundle(url: str, account: dict[str, Any], instance_id: str) -> tuple[int, int]:
    """Send BundleInstance and wait until the task is complete; return when it was sent and answered, in ns."""
    import boto3  # noqa: PLC0415 (only --run needs it)

    ec2 = boto3.client(
        "ec2",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=account["accessKeyId"],
        aws_secret_access_key=account["secretAccessKey"],
    )
    storage = {"S3": {"AWSAccessKeyId": account["accessKeyId"], "Bucket": "measured", "Prefix": "disk"}}
    policy, signature = sign_policy(account["secretAccessKey"], "measured", "disk")
    storage["S3"] |= {"UploadPolicy": policy, "UploadPolicySignature": signature}
    sent = time.monotonic_ns()
    bundle_id = ec2.bundle_instance(InstanceId=instance_id, Storage=storage)["BundleTask"]["BundleId"]
    answered = time.monotonic_ns()
    deadline = time.monotonic() + TASK_TIMEOUT
    while time.monotonic() < deadline:
        (task,) = ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
        if task["State"] == "complete":
            time.sleep(1)  # for the end of the workflow, after the state is set
            return sent, answered
        if task["State"] == "failed":
            break
        time.sleep(0.5)
    sys.exit(f"the task is not complete: {task}")


def sign_policy(secret: str, bucket: str, prefix: str) -> tuple[bytes, str]:
    """An upload policy, and its signature as aws-cli makes it."""
    expiration = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = [{"bucket": bucket}, {"acl": "ec2-bundle-read"}, ["starts-with", "$key", prefix]]
    policy = json.dumps({"expiration": expiration, "conditions": conditions}).encode()
    digest = hmac.new(secret.encode(), base64.b64encode(policy), hashlib.sha1).digest()
    return policy, base64.b64encode(digest).decode()


def read_calls(output: Path, sent: int, answered: int) -> list[Call]:
    """The calls of the task, and those of the request that was sent and answered at these times."""
    calls = []
    for line in output.read_text().splitlines():
        at, thread, purpose, caller, file = line.split("\t")
        if purpose == "task" or sent <= int(at) <= answered:
            calls.append(Call(int(thread), purpose, caller, file))
    return calls


def count_calls(calls: Sequence[Call]) -> Figures:
    """Count executed files, and calls into another file."""
    files = files_by_purpose(calls)
    numbers = [len(files["request"]), len(files["task"]), len(files["request"] | files["task"])]
    yield "files executed by the request / by the task / by both", " / ".join(map(str, numbers))
    for purpose in ("request", "task"):
        moves = Counter(
            call.thread for call in calls if call.purpose == purpose and call.caller not in {"-", call.file}
        )
        text = f"{sum(moves.values())} ({max(moves.values(), default=0)} in its busiest thread)"
        yield f"calls of the {purpose} into another file", text


def files_by_purpose(calls: Sequence[Call]) -> dict[str, set[str]]:
    """The executed files of the request and of the task."""
    files: dict[str, set[str]] = defaultdict(set)
    for call in calls:
        files[call.purpose].add(call.file)
    return files


def list_files(calls: Sequence[Call]) -> None:
    """Print which files the request and the task have executed."""
    for purpose, files in files_by_purpose(calls).items():
        print(f"\n{purpose}:", *sorted(files), sep="\n  ")


if __name__ == "__main__":
    main()
