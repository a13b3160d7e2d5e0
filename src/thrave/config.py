"""Every setting, typed, in one place; and where things lie in the data directory.

A setting is taken from the command line, else from the environment (`THRAVE_` and its name in capitals), else from the
TOML file given with `--config`, else from its default here. Each of these is checked by itself, so that a wrong value
is reported with the place where it stands, also if another one takes precedence. The docs' page of settings is
generated from this table. Nothing else in Thrave reads the environment, and nothing here opens or creates anything.
"""

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

_PREFIX = "THRAVE_"
_NO_SETTINGS = {"THRAVE_INSTANCE_ID"}
"""Variables that Thrave gives to an instance's commands, which may call it again."""


class SettingsError(Exception):
    """A setting has no such name, cannot have that value, or contradicts another; the message says which and where."""


def _check_database_url(url: SecretStr) -> SecretStr:
    if not re.match(r"postgres(ql)?://[^/]", url.get_secret_value()):
        raise ValueError("must be postgresql://USER@HOST/NAME")
    import sqlalchemy as sa  # noqa: PLC0415 (whoever has no such setting need not wait for it)

    try:
        port = sa.make_url(url.get_secret_value()).port
    except (ValueError, sa.exc.ArgumentError):
        port = 0
    if port is not None and not 1 <= port <= 65535:
        raise ValueError("must be postgresql://USER@HOST:PORT/NAME; its host or port cannot be read")
    return SecretStr(re.sub("^postgres:", "postgresql:", url.get_secret_value()))


_LARGEST_FILE = 1024 * 1024  # bytes of a file of settings
_MOST_NUMBER = 1_000_000
"""Of any number: in seconds 11 days, which every timer of the system takes, and date arithmetic too."""

_MOST = {"days": 36_500, "second": 10**9, "burst": 10**9}
"""Of numbers whose setting's name ends with that word."""

_HEARTBEATS = 4
"""Heartbeats in `host_lost_after`: one may be late or lost. The host does not count as lost, and goes on to upload."""

_CHECKS_OF_A_TASK = 16  # requests at the same time that look at its objects or delete them
_CONNECTIONS_OF_THE_SERVICE = 32  # to the store: cleanup, and the bucket of a task that a client asks for
_FILES_OF_A_TASK = 16  # its volume, its pipes
_FILES_OF_THE_SERVICE = 64
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?")


def normal_endpoint(url: str) -> str:
    """Bring the URL of a server into its one normal form: `https://s3.example.com`, `http://[::1]:8333`.

    Scheme and host are in lower case, an international host name is in its ASCII form, an IPv6 address is compressed
    and in brackets, the port is absent if it is the scheme's default, and nothing follows.

    Args:
        url: May have white space around it, capitals, a default port, a dot after the host, and slashes at its end.

    Raises:
        ValueError: It is no such URL; the message does not repeat it.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("write it as https://HOST or https://HOST:PORT") from None
    if any(character.isspace() or not character.isprintable() for character in url.strip()):
        raise ValueError("it may have no white space and no control characters in it")
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ValueError("write it as https://HOST or http://HOST, with :PORT if it is not the default")
    if "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ValueError("it has a host and a port only: no user, no path, no query")
    if port == 0:
        raise ValueError("a port is 1 to 65535")
    default = port is None or port == _DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{_normal_host(host)}{'' if default else f':{port}'}"


def _normal_host(host: str) -> str:
    if ":" in host:
        try:
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        except ValueError:
            raise ValueError("its host is no IPv6 address") from None
    try:
        name = host.removesuffix(".").encode("ascii" if host.isascii() else "idna").decode().lower()
    except UnicodeError:
        raise ValueError("its host is no host name") from None
    # A longer label or name is none in the DNS, and the resolver's codec refuses it (RFC 1035, 2.3.4).
    if not _HOST_NAME.fullmatch(name) or not all(1 <= len(label) <= 63 for label in name.split(".")) or len(name) > 253:
        raise ValueError("its host is no host name")
    return name


@dataclass(frozen=True)
class DataDirectory:
    """Where the service keeps what. Copy the whole folder to back it up; guard it as you would a private key."""

    root: Path

    @property
    def database(self) -> str:
        """The URL of the database of one machine: accounts, tasks and the engine's own tables, in SQLite."""
        return f"sqlite:///{self.database_file.absolute()}"

    @property
    def database_file(self) -> Path:
        """The file of that database. SQLite keeps two more beside it: `thrave.db-wal` and `thrave.db-shm`."""
        return self.root / "thrave.db"

    @property
    def lock(self) -> Path:
        """Held by the service that runs on the database of this directory; has its process id and address."""
        return self.root / "thrave.lock"

    @property
    def host_name(self) -> Path:
        """The name of the host that an agent of a fleet was last started for; a line of text."""
        return self.root / "host_name"

    @property
    def vault_key(self) -> Path:
        """The key that seals every secret in the database."""
        return self.root / "vault.key"

    @property
    def service(self) -> Path:
        """The service's own certificate and keys."""
        return self.root / "service"

    @property
    def instances(self) -> Path:
        """Instances described by files, one JSON file each."""
        return self.root / "instances"

    @property
    def locks(self) -> Path:
        """What holds libvirt's domains off while their volumes are read; empty files."""
        return self.root / "locks"

    @property
    def buckets(self) -> Path:
        """Bucket directories: `buckets/BUCKET/KEY`."""
        return self.root / "buckets"


class Settings(BaseModel):
    """What an operator may set. Times are in seconds unless the name says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    data: Path = Field(Path("thrave-data"), description="Where the service keeps its database, keys and buckets.")
    database_url: Annotated[SecretStr, AfterValidator(_check_database_url)] | None = Field(
        None, description="A fleet's PostgreSQL, as `postgresql://USER@HOST/NAME`; by default SQLite in `data`."
    )
    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: int = Field(8773, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    tls_certificate: Path | None = Field(
        None, description="The server's certificate, PEM, with its intermediates. With `tls_key`: speak TLS."
    )
    tls_key: Path | None = Field(None, description="The certificate's private key, PEM, not encrypted.")
    plain_http: Literal["loopback", "anywhere"] = Field(
        "loopback", description="Where plain HTTP may be spoken: `anywhere` is for a proxy in front that speaks TLS."
    )
    connections: int = Field(
        500, ge=1, description="Open connections; one more is closed at once. Each takes a file of the process's limit."
    )
    request_timeout: float = Field(
        30.0, gt=0, description="Seconds that a client has to send a request, and as many to take its answer."
    )
    requests_per_second: float = Field(
        1000.0, gt=0, description="Requests of one account that are answered for long; more: `RequestLimitExceeded`."
    )
    request_burst: int = Field(5000, ge=1, description="Requests of one account that are answered at once.")
    signature_version_2: Literal["accept", "refuse"] = Field(
        "accept",
        description="Whether requests may be signed by signature version 2, as clients of 2013 and before do it; "
        "`refuse`: version 4 only.",
    )
    tasks_per_account: int = Field(
        20, ge=1, description="Unfinished bundle tasks that an account may have; more: `ResourceLimitExceeded`."
    )
    region: str = Field("us-east-1", description="The region's name in answers; requests may be signed for any.")
    host_name: str = Field(
        "localhost",
        description="This hypervisor host's name, different for each host of a fleet. Tasks and instances belong to "
        "it: do not change it while any runs.",
    )
    instances: Path | None = Field(
        None, description="Where instances are described; by default a folder in `data`. Hosts may share one."
    )
    hypervisor: Literal["directory", "libvirt"] = Field(
        "directory",
        description="Where instances are: described by files, or the domains that libvirt has and "
        "`thrave instance adopt` has been given.",
    )
    libvirt_uri: str = Field("qemu:///system", description="Which libvirt: a local one.")
    downtime: Literal["whole", "overlay"] = Field(
        "whole",
        description="For how long an instance is off: until its root volume is read, or until a copy-on-write overlay "
        "is over it, a few seconds. `overlay` needs libvirt.",
    )
    sysprep: tuple[str, ...] = Field(
        (), description="A command that prepares a guest for being copied and powers it off; its agent runs it."
    )
    image_directories: tuple[Path, ...] = Field(
        (),
        description="Where files may lie that a root volume's image refers to (a backing file, a parent, extents), "
        "besides the image's own folder; folders below are included.",
    )
    unclean_volume: Literal["report", "refuse"] = Field(
        "report",
        description="When a volume on the root disk is hibernated, was not unmounted or cannot be checked, or the "
        "guest did not shut down: the task says so, or fails.",
    )
    existing_bundle: Literal["refuse", "replace"] = Field(
        "refuse",
        description="When the bucket has a bundle under the prefix: `refuse` rejects the request; `replace` stores the "
        "new bundle beside it under other names, and removes the old one when the new one is complete.",
    )
    heartbeat: float = Field(
        5.0, gt=0, description="Seconds between two heartbeats of a host; at most a quarter of `host_lost_after`."
    )
    host_lost_after: float = Field(
        60.0,
        gt=0,
        description="Seconds without a heartbeat after which another host may adopt a host's tasks. At least four "
        "times `heartbeat`; in a fleet at least twice `s3_timeout`, if that is set.",
    )
    drain_timeout: float = Field(
        3600.0,
        gt=0,
        description="Seconds that a draining host has to finish what it has begun: tasks, requests to start or stop an "
        "instance, and what tasks have left to be started or merged.",
    )
    tasks_at_once: int = Field(2, ge=1, description="Bundle tasks that this host works on at the same time.")
    shutdown_grace: float = Field(
        600.0, gt=0, description="Seconds that a guest has to power off; it is asked again and again."
    )
    shutdown_timeout_action: Literal["fail", "power-off"] = Field(
        "fail", description="When they are over: the task fails and the instance stays up, or its power is cut."
    )
    uploads_at_once: int = Field(
        4,
        ge=1,
        description="Parts of a bundle that are sent at the same time: 10 MiB of memory each, and so much is "
        "sent again after a crash.",
    )
    stall_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds without a byte read or a part stored after which a bundle task fails. More than "
        "`s3_patience`.",
    )
    task_retention_days: float = Field(7.0, gt=0, description="Days that a finished task is still described.")
    platforms: Literal["windows", "any"] = Field(
        "windows", description="Whose instances may be bundled: EC2's rule is Windows only."
    )
    level: Literal["fast", "small"] = Field(
        "fast", description="Compression: at the disk's speed, or a few percent smaller at a quarter of it."
    )
    skip: Literal["nothing", "unused"] = Field(
        "nothing", description="What is left out of a bundle: nothing, or what the volume's NTFS does not use."
    )
    store: Literal["directory", "s3"] = Field(
        "directory", description="Where bundles go: folders in `data`, or an S3-compatible store."
    )
    upload: Literal["policy", "service"] = Field(
        "policy",
        description="By whose right an S3 store is written to: the caller's upload policy, signed with an access key "
        "that the store knows too; or the service's own key, which does what the policy allows.",
    )
    s3_endpoint: Annotated[str, AfterValidator(normal_endpoint)] | None = Field(
        None,
        description="The store's URL, a host and perhaps a port: `https://s3.example.com`; by default AWS's own of "
        "`s3_region`.",
    )
    s3_region: str = Field("us-east-1", description="The store's region.")
    s3_addressing: Literal["path", "virtual"] = Field(
        "path", description="Where the store wants a bucket's name: in the URL's path, or before its host name."
    )
    s3_ca: Path | None = Field(
        None, description="Certificates (PEM) of who vouches for the store's, instead of the system's."
    )
    s3_proxy: SecretStr | None = Field(
        None,
        description="The URL of a proxy to the store: `http://USER:PASSWORD@HOST:PORT`; special characters of user and "
        "password percent-encoded.",
    )
    s3_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds after which a connection on which nothing moves is cut; a request must be sent within "
        "twenty times as long, and its response received within as long again. "
        "In a fleet each piece of a request must be sent within a third of `host_lost_after`.",
    )
    s3_patience: float = Field(
        120.0,
        ge=0,
        description="Seconds for which a task repeats a request while the store fails. Less than `stall_timeout`; by "
        "default 120, or half of `stall_timeout` if that is less.",
    )
    s3_credentials: Path | None = Field(
        None,
        description="The service's own key for the store: a file as `~/.aws/credentials`, mode 0600. A changed file "
        "takes effect without a restart.",
    )
    s3_access_key_id: str | None = Field(None, description="The same, with `s3_secret_access_key`.")
    s3_secret_access_key: SecretStr | None = Field(None, description="See `s3_access_key_id`.")
    s3_session_token: SecretStr | None = Field(None, description="With temporary credentials.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or for programs.")
    crash_at: str | None = Field(
        None, description="For tests: the process kills itself at this crash point, as `part stored, after`."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_patience(cls, values: Any) -> Any:  # noqa: ANN401 (pydantic's own type)
        """Let a short `stall_timeout` lower the default of `s3_patience`: an operator who sets the one gets both."""
        if isinstance(values, dict) and isinstance(stall := values.get("stall_timeout"), int | float):
            return {"s3_patience": min(cls.model_fields["s3_patience"].default, stall / 2), **values}
        return values

    @model_validator(mode="after")
    def _has_usable_times(self) -> Self:
        """Refuse times with which a host that works counts as lost, or works on after it was given up."""
        if self.host_lost_after < _HEARTBEATS * self.heartbeat:
            raise ValueError(
                f"host_lost_after = {self.host_lost_after:g} must be at least {_HEARTBEATS} times heartbeat = "
                f"{self.heartbeat:g}: otherwise a host that works counts as lost"
            )
        attempt_is_set = "s3_timeout" in self.model_fields_set
        if self.database_url is not None and attempt_is_set and self.host_lost_after < 2 * self.s3_timeout:
            raise ValueError(
                f"host_lost_after = {self.host_lost_after:g} must be at least twice s3_timeout = {self.s3_timeout:g}: "
                "otherwise a request to the store may last longer than the host's right to send it"
            )
        if self.stall_timeout <= self.s3_patience:
            raise ValueError(
                f"stall_timeout = {self.stall_timeout:g} must be more than s3_patience = {self.s3_patience:g}: "
                "otherwise a task fails while its requests to the store are still being repeated"
            )
        return self

    @model_validator(mode="after")
    def _has_both_or_none(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or none")
        return self

    @model_validator(mode="after")
    def _has_a_key_for_the_store(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key belong together: give both or none")
        keyless = self.s3_credentials is None and self.s3_access_key_id is None
        if self.store == "s3" and self.upload == "service" and keyless:
            raise ValueError("upload = service needs the service's key: s3_credentials")
        return self

    @property
    def s3_send_timeout(self) -> float:
        """Seconds for a connection, and for each piece of a request: in a fleet they end before the host's lease does.

        A response may take `s3_timeout`: nothing is written while it is awaited.

        Of the lease (`tasks/lease.py`) enough remains for two heartbeats: one that is lost stops no upload.
        """
        return self.s3_timeout if self.database_url is None else min(self.s3_timeout, self.host_lost_after / 3)

    @property
    def database(self) -> str:
        """The database's URL, as SQLAlchemy takes it. May hold a password."""
        if self.database_url is None:
            return self.directory.database
        return self.database_url.get_secret_value()

    @property
    def directory(self) -> DataDirectory:
        """Where things lie in `data`."""
        return DataDirectory(self.data)

    @property
    def known_host_name(self) -> str | None:
        """The name of the fleet's host that this data directory belongs to; None if it was never said."""
        if "host_name" in self.model_fields_set:
            return self.host_name
        try:
            return self.directory.host_name.read_text("utf-8").strip() or None
        except FileNotFoundError:
            return None

    @property
    def open_files(self) -> int:
        """Files that a process may have open with these settings."""
        of_tasks = self.tasks_at_once * _FILES_OF_A_TASK
        return self.connections + self.store_connections + of_tasks + _FILES_OF_THE_SERVICE

    @property
    def store_connections(self) -> int:
        """Connections to the store: enough that no request of a task waits for another one's to end."""
        return self.tasks_at_once * (self.uploads_at_once + _CHECKS_OF_A_TASK) + _CONNECTIONS_OF_THE_SERVICE

    @property
    def instance_folder(self) -> Path:
        """Where instances are described."""
        return self.instances or self.directory.instances

    @property
    def task_retention(self) -> timedelta:
        """How long a finished task is still described."""
        return timedelta(days=self.task_retention_days)


def load_settings(file: Path | None, **given: object) -> Settings:
    """Read the settings.

    Args:
        file: The TOML file given with `--config`, if any.
        given: What the command line says; None counts as not said.

    Raises:
        SettingsError: The file cannot be read, or a setting has no such name, cannot have that value, or contradicts
            another one.
    """
    options = {name: value for name, value in given.items() if value is not None}
    merged: dict[str, object] = {}
    for values, place in (
        *([_read_file(file)] if file else []),
        (_read_environment(), lambda name: f"{_PREFIX}{name.upper()}"),
        (options, lambda name: f"--{'host' if name == 'host_name' else name.replace('_', '-')}"),
    ):
        merged |= dict(_checked(values, place))
    try:
        return Settings(**merged)
    except ValidationError as error:  # of the validators of Settings, whose words are ours
        faults = [str(detail.get("ctx", {}).get("error", detail["msg"])) for detail in error.errors()]
        raise SettingsError("; ".join(faults)) from None


_Place = Callable[[str], str]
"""Says where a setting of that name was given."""


def _read_file(file: Path) -> tuple[Mapping[str, object], _Place]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise SettingsError(f"{file} is no file of settings: it has more than {_LARGEST_FILE} bytes")
        text = content.decode("utf-8-sig")  # editors on Windows write a byte order mark
    except OSError as error:
        raise SettingsError(f"cannot read the settings in {file}: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{file}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+), column (\d+)", str(error))
        where = f"line {found[1]}, column {found[2]}" if found else f"line {text.count(chr(10)) + 1} (the end)"
        raise SettingsError(
            f"{file}, {where}: not valid TOML. Text needs quotes, a number none: "
            'region = "us-east-1", port = 8773. Each name may be given once.'
        ) from None
    except RecursionError:
        raise SettingsError(f"{file}: nested too deeply") from None
    return values, lambda name: f"{file}, line {_line_of(name, text)}: {name}"


def _line_of(name: str, text: str) -> int:
    """The line that gives a value to a name, or begins a table with it."""
    quoted = re.escape(name)
    found = re.search(rf"""^[ \t]*(\[+[ \t]*)?["']?{quoted}["']?[ \t]*[=.\]]""", text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else 1


def _read_environment() -> dict[str, object]:
    values: dict[str, object] = {}
    for variable, text in os.environ.items():
        if not variable.upper().startswith(_PREFIX) or variable in _NO_SETTINGS:
            continue
        name = variable[len(_PREFIX) :].lower()
        field = Settings.model_fields.get(name)
        values[name] = _listed(variable, text) if field and get_origin(field.annotation) is tuple else text
    return values


def _listed(variable: str, text: str) -> object:
    """Read the list that a variable holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SettingsError(f'{variable}: must be a list as JSON: ["first", "second"]') from None


def _checked(values: Mapping[str, object], place: _Place) -> Iterator[tuple[str, object]]:
    """Each setting with its value as it is kept. Raises SettingsError for the first that is wrong."""
    for name, value in values.items():
        field = Settings.model_fields.get(name)
        if field is None:
            raise SettingsError(f"{place(name)}: there is no such setting{_closest(name, place)}")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path) and (fault := _fault_of_text(str(text))):
                raise SettingsError(f"{place(name)}: {fault}")
        try:
            checked = _adapter(field).validate_python(value)
        except ValidationError as error:
            raise SettingsError(f"{place(name)}: {_fault(field, error)}") from None
        most = _MOST.get(name.rpartition("_")[2], _MOST_NUMBER)
        if isinstance(checked, int | float) and not checked <= most:
            raise SettingsError(f"{place(name)}: must be {_wanted(field)}, {most} or less")
        yield name, checked


def _fault_of_text(text: str) -> str | None:
    """What is wrong with any text or path that the system gets: it ends C's strings, or means another folder."""
    if not text:
        return "must not be empty. Leave the setting out to have its default."
    if "\0" in text:
        return "must not have a NUL character"
    if not _is_utf8(text):
        return "is not UTF-8. Thrave takes names and paths in UTF-8 only."
    return None


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = field.annotation
    return TypeAdapter(Annotated[kind, *field.metadata] if field.metadata else kind)


def _closest(name: str, place: _Place) -> str:
    closest = difflib.get_close_matches(name, Settings.model_fields, n=1)
    if not closest:
        return ". docs/reference/settings.md lists all."
    suggested = place(closest[0]) if place(closest[0]).startswith((_PREFIX, "--")) else closest[0]
    return f"; did you mean {suggested}?"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _fault(field: FieldInfo, error: ValidationError) -> str:
    """What is wrong with a setting's value, without the value: it may be a secret."""
    detail = error.errors(include_input=False)[0]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    for one_of, words in _EXPECTED.items():
        if detail["type"].startswith(one_of):
            return words.format(**detail.get("ctx", {}), wanted=_wanted(field))
    return f"must be {_wanted(field)}"


_EXPECTED = {
    "greater_than_equal": "must be {wanted}, {ge} or more",
    "greater_than": "must be {wanted}, more than {gt}",
    "less_than_equal": "must be {wanted}, {le} or less",
    "less_than": "must be {wanted}, less than {lt}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must have the form {pattern}",
}
_WANTED = {int: "a whole number", float: "a number", str: "text in quotes", SecretStr: "text in quotes",
           Path: "a path in quotes", bool: "true or false", tuple: 'a list of text: ["first", "second"]'}  # fmt: skip


def _wanted(field: FieldInfo) -> str:
    """Name the type of a setting."""
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [get_args(kind)[0] for kind in kinds if get_origin(kind) is Annotated]
    if any(get_origin(kind) is Literal for kind in kinds):
        choices = next(get_args(kind) for kind in kinds if get_origin(kind) is Literal)
        return " or ".join(map(repr, choices))
    for kind in kinds:
        if words := _WANTED.get(get_origin(kind) or kind):
            return words
    return "another value"
