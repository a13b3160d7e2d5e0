"""Every setting, with its type, default and meaning; and the paths in the data directory.

Sources in order of precedence: the command line, the environment (`THRAVE_` and the name in capitals), the TOML file
given with `--config`, the default. Each source is validated separately: an invalid value is reported with its source,
even if a source of higher precedence overrides it. `make docs` writes docs/reference/settings.md from this table. No
other module of Thrave reads the environment. This module opens and creates nothing but reads the settings file.
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
_NOT_SETTINGS = {"THRAVE_INSTANCE_ID"}
"""Variables that Thrave passes to an instance's commands. Such a command may call Thrave again."""


class SettingsError(Exception):
    """A setting is unknown, invalid, or conflicts with another one. The message names the setting and its source."""


def _check_database_url(url: SecretStr) -> SecretStr:
    if not re.match(r"postgres(ql)?://[^/]", url.get_secret_value()):
        raise ValueError("must be postgresql://USER@HOST/NAME")
    import sqlalchemy as sa  # noqa: PLC0415 (slow to import; needed only with this setting)

    try:
        port = sa.make_url(url.get_secret_value()).port
    except (ValueError, sa.exc.ArgumentError):
        port = 0
    if port is not None and not 1 <= port <= 65535:
        raise ValueError("must be postgresql://USER@HOST:PORT/NAME; invalid host or port")
    return SecretStr(re.sub("^postgres:", "postgresql:", url.get_secret_value()))


_MAX_FILE_SIZE = 1024 * 1024  # bytes of a settings file
_MAX_NUMBER = 1_000_000
"""Largest value of a number. In seconds 11 days: all timers of the system and date arithmetic accept it."""

_MAX_NUMBERS = {"days": 36_500, "second": 10**9, "burst": 10**9}
"""Largest value of a number, by the last word of the setting's name."""

_HEARTBEATS = 4
"""Heartbeats within `heartbeat_timeout`. One may be late or lost: the host still counts as alive and uploads."""

_CHECKS_OF_A_TASK = 16  # concurrent requests of one task that check or delete its objects
_CONNECTIONS_OF_THE_SERVICE = 32  # to the store: cleanup, and bucket checks of API requests
_FILES_OF_A_TASK = 16  # its volume, its pipes
_FILES_OF_THE_SERVICE = 64
MAX_MONITORING_CONNECTIONS = 20
"""Maximum number of connections to the monitoring listener."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?")


def normal_endpoint(url: str) -> str:
    """Return the normal form of a server's URL: `https://s3.example.com`, `http://[::1]:8333`.

    Scheme and host are in lower case. An international host name is in its ASCII form. An IPv6 address is compressed
    and in brackets. A default port is omitted. There is no path.

    Args:
        url: May have white space around it, capitals, a default port, a dot after the host, and slashes at its end.

    Raises:
        ValueError: Invalid URL. The message does not repeat the URL.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("write it as https://HOST or https://HOST:PORT") from None
    if any(character.isspace() or not character.isprintable() for character in url.strip()):
        raise ValueError("must not contain white space or control characters")
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ValueError("write it as https://HOST or http://HOST, with :PORT if it is not the default")
    if "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ValueError("must have a host and a port only: no user, no path, no query")
    if port == 0:
        raise ValueError("the port must be 1 to 65535")
    default = port is None or port == _DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{_normal_host(host)}{'' if default else f':{port}'}"


def _normal_host(host: str) -> str:
    if ":" in host:
        try:
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        except ValueError:
            raise ValueError("the host is not a valid IPv6 address") from None
    try:
        name = host.removesuffix(".").encode("ascii" if host.isascii() else "idna").decode().lower()
    except UnicodeError:
        raise ValueError("the host is not a valid host name") from None
    # The resolver's codec rejects longer labels and names, which DNS does not allow either (RFC 1035, 2.3.4).
    if not _HOST_NAME.fullmatch(name) or not all(1 <= len(label) <= 63 for label in name.split(".")) or len(name) > 253:
        raise ValueError("the host is not a valid host name")
    return name


@dataclass(frozen=True)
class DataDirectory:
    """Paths in the data directory. Copy the whole directory to back it up; protect it like a private key."""

    root: Path

    @property
    def database(self) -> str:
        """URL of the SQLite database of a single machine: accounts, tasks and the engine's own tables."""
        return f"sqlite:///{self.database_file.absolute()}"

    @property
    def database_file(self) -> Path:
        """File of that database. SQLite keeps two more next to it: `thrave.db-wal` and `thrave.db-shm`."""
        return self.root / "thrave.db"

    @property
    def lock(self) -> Path:
        """Lock file of the service that runs on the database of this directory. Holds its process id and address."""
        return self.root / "thrave.lock"

    @property
    def host_id(self) -> Path:
        """Host ID with which an agent of a fleet was last started; one line of text."""
        return self.root / "host_id"

    @property
    def vault_key(self) -> Path:
        """Key that encrypts every secret in the database."""
        return self.root / "vault.key"

    @property
    def service(self) -> Path:
        """The service's own certificate and keys."""
        return self.root / "service"

    @property
    def instances(self) -> Path:
        """Instances described by files: one JSON file per instance."""
        return self.root / "instances"

    @property
    def locks(self) -> Path:
        """Lock files of libvirt domains whose volume is being read; empty files."""
        return self.root / "locks"

    @property
    def buckets(self) -> Path:
        """Bucket directories: `buckets/BUCKET/KEY`."""
        return self.root / "buckets"


class Settings(BaseModel):
    """All settings of an operator. Times are in seconds unless the name says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    data_dir: Path = Field(Path("thrave-data"), description="Directory of the database, keys, instances and buckets.")
    database_url: Annotated[SecretStr, AfterValidator(_check_database_url)] | None = Field(
        None,
        description="PostgreSQL database of a fleet, as `postgresql://USER@HOST/NAME`. Default: SQLite in `data_dir`.",
    )
    listen_address: str = Field("127.0.0.1", description="IP address or host name to listen on.")
    listen_port: int = Field(8773, ge=0, le=65535, description="TCP port to listen on. 0: any free port.")
    tls_certificate_file: Path | None = Field(
        None, description="Server certificate with its intermediates, PEM. Together with `tls_key_file`: enables TLS."
    )
    tls_key_file: Path | None = Field(None, description="Private key of the certificate, PEM, not encrypted.")
    plain_http: Literal["loopback", "anywhere"] = Field(
        "loopback",
        description="Addresses on which HTTP without TLS is allowed. `anywhere`: for use behind a proxy that "
        "terminates TLS.",
    )
    max_connections: int = Field(
        500,
        ge=1,
        description="Maximum number of client connections; more are closed immediately. Each uses one file descriptor.",
    )
    request_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds for a client to send a request. The same time applies to receiving the response.",
    )
    max_requests_per_second: float = Field(
        1000.0,
        gt=0,
        description="Maximum sustained request rate of one account. Further requests get `RequestLimitExceeded`.",
    )
    max_request_burst: int = Field(5000, ge=1, description="Maximum number of requests of one account in a burst.")
    signature_version_2: Literal["accept", "refuse"] = Field(
        "accept",
        description="Whether requests may use signature version 2, as clients of 2013 and before do. "
        "`refuse`: version 4 only.",
    )
    max_tasks_per_account: int = Field(
        20,
        ge=1,
        description="Maximum number of unfinished bundle tasks of one account. Further requests get "
        "`ResourceLimitExceeded`.",
    )
    region: str = Field(
        "us-east-1", description="Name of the region in responses. Requests may be signed for any region."
    )
    host_id: str = Field(
        "localhost",
        description="ID of this hypervisor host, unique in a fleet. Tasks and instances belong to a host: do not "
        "change the ID while tasks are unfinished.",
    )
    instance_dir: Path | None = Field(
        None,
        description="Directory of the files that describe instances. Default: `instances` in `data_dir`. Hosts may "
        "share one.",
    )
    hypervisor: Literal["directory", "libvirt"] = Field(
        "directory",
        description="Source of instances. `directory`: JSON files in `instance_dir`. `libvirt`: libvirt domains that "
        "were registered with `thrave instance adopt`.",
    )
    libvirt_uri: str = Field("qemu:///system", description="Connection URI of libvirt, on this machine.")
    capture_mode: Literal["offline", "overlay"] = Field(
        "offline",
        description="How a root volume is read. `offline`: the instance is off until the volume is read. `overlay`: "
        "the instance is off for a few seconds, then runs on a copy-on-write overlay. `overlay` needs libvirt.",
    )
    sysprep_command: tuple[str, ...] = Field(
        (),
        description="Command that prepares a guest for copying and powers it off. The guest agent runs it instead of "
        "a shutdown.",
    )
    image_dirs: tuple[Path, ...] = Field(
        (),
        description="Directories, with their subdirectories, of files that a disk image may refer to: a backing file, "
        "a parent, extents. The image's own directory is always allowed.",
    )
    unclean_volume: Literal["report", "refuse"] = Field(
        "report",
        description="Action if a volume on the root disk is hibernated, was not unmounted or cannot be checked, or if "
        "the guest did not shut down. `report`: add a warning to the task. `refuse`: fail the task.",
    )
    existing_bundle: Literal["refuse", "replace"] = Field(
        "refuse",
        description="Action if the bucket has a bundle under the prefix. `refuse`: reject the request. `replace`: "
        "store the new bundle under other names, and delete the old bundle once the new one is complete.",
    )
    heartbeat_interval: float = Field(
        5.0,
        gt=0,
        description="Seconds between heartbeats of a host. At most a quarter of `heartbeat_timeout`.",
    )
    heartbeat_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds without a heartbeat after which another host may adopt a host's tasks. At least four "
        "times `heartbeat_interval`. In a fleet at least twice `s3_timeout`, if that is set.",
    )
    drain_timeout: float = Field(
        3600.0,
        gt=0,
        description="Seconds for a draining host to finish its running tasks, accepted power requests, and instances "
        "that ended tasks left to be started or merged.",
    )
    worker_concurrency: int = Field(2, ge=1, description="Number of bundle tasks that this host runs concurrently.")
    shutdown_timeout: float = Field(
        600.0, gt=0, description="Seconds to wait for a guest to power off. The request is repeated."
    )
    shutdown_timeout_action: Literal["fail", "power-off"] = Field(
        "fail",
        description="Action when `shutdown_timeout` ends. `fail`: fail the task, leave the instance running. "
        "`power-off`: cut the power of the instance.",
    )
    upload_concurrency: int = Field(
        4,
        ge=1,
        description="Number of parts that one task uploads concurrently. Each uses 10 MiB of memory, and is sent again "
        "after a crash.",
    )
    stall_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds without progress (no byte read, no part stored) after which a bundle task fails. Must "
        "exceed `s3_retry_timeout`.",
    )
    task_retention_days: float = Field(
        7.0, gt=0, description="Days for which `DescribeBundleTasks` returns an ended task."
    )
    platforms: Literal["windows", "any"] = Field(
        "windows", description="Platforms of instances that may be bundled. EC2 allows Windows only."
    )
    compression: Literal["fast", "small"] = Field(
        "fast",
        description="Compression. `fast`: at the speed of the disk. `small`: a few percent smaller, at a quarter of "
        "that speed.",
    )
    skip_unused: bool = Field(
        default=False, description="Whether a bundle leaves out clusters that the NTFS file systems do not use."
    )
    store: Literal["directory", "s3"] = Field(
        "directory",
        description="Object store of bundles. `directory`: directories in `data_dir`. `s3`: an S3-compatible store.",
    )
    upload_credentials: Literal["policy", "service"] = Field(
        "policy",
        description="Credentials of uploads to an S3 store. `policy`: the caller's upload policy, signed with an "
        "access key that the store knows too. `service`: the service's own key; the service enforces the policy.",
    )
    s3_endpoint: Annotated[str, AfterValidator(normal_endpoint)] | None = Field(
        None,
        description="URL of the store, with a host and optionally a port: `https://s3.example.com`. Default: the AWS "
        "endpoint of `s3_region`.",
    )
    s3_region: str = Field("us-east-1", description="Region of the store.")
    s3_addressing_style: Literal["path", "virtual"] = Field(
        "path",
        description="Position of the bucket name in URLs. `path`: in the path. `virtual`: in front of the host name.",
    )
    s3_ca_file: Path | None = Field(None, description="CA certificates for the store, PEM, instead of the system's.")
    s3_proxy: SecretStr | None = Field(
        None,
        description="URL of an HTTP proxy to the store: `http://USER:PASSWORD@HOST:PORT`. Special characters of user "
        "and password must be percent-encoded.",
    )
    s3_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds without a byte sent or received after which a connection is closed. A request must be "
        "sent within twenty times as long, and its response received within as long again. "
        "In a fleet each piece of a request must be sent within a third of `heartbeat_timeout`.",
    )
    s3_retry_timeout: float = Field(
        120.0,
        ge=0,
        description="Seconds for which a task retries a request while the store fails. Less than `stall_timeout`. "
        "Default: 120, or half of `stall_timeout` if that is less.",
    )
    s3_credentials_file: Path | None = Field(
        None,
        description="File with the service's own key for the store, in the format of `~/.aws/credentials`, mode 0600. "
        "A changed file takes effect without a restart.",
    )
    s3_access_key_id: str | None = Field(
        None,
        description="Access key ID of the service for the store, with `s3_secret_access_key`. Alternative to "
        "`s3_credentials_file`.",
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret key of `s3_access_key_id`.")
    s3_session_token: SecretStr | None = Field(None, description="Session token of temporary credentials.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Format of log lines. `text`: for people. `json`: for programs."
    )
    monitoring_address: str = Field(
        "127.0.0.1",
        description="IP address or host name of the monitoring listener. It uses plain HTTP without authentication: on "
        "another address than loopback, any client that can reach it can read names of hosts and IDs of instances.",
    )
    monitoring_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port of the monitoring listener, with `/healthz` and `/readyz`. 0: any free port. Default: no "
        "listener.",
    )
    failpoint: str | None = Field(
        None, description="For tests: the process kills itself at this failpoint, for example `part-stored, after`."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_retry_timeout(cls, values: Any) -> Any:  # noqa: ANN401 (pydantic's own type)
        """Lower the default of `s3_retry_timeout` below a short `stall_timeout`, so that one setting is enough."""
        if isinstance(values, dict) and isinstance(stall := values.get("stall_timeout"), int | float):
            return {"s3_retry_timeout": min(cls.model_fields["s3_retry_timeout"].default, stall / 2), **values}
        return values

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        """Reject times with which a live host would lose its lease, or write after another host adopted its tasks."""
        if self.heartbeat_timeout < _HEARTBEATS * self.heartbeat_interval:
            raise ValueError(
                f"heartbeat_timeout = {self.heartbeat_timeout:g} must be at least {_HEARTBEATS} times "
                f"heartbeat_interval = {self.heartbeat_interval:g}: otherwise a live host counts as lost"
            )
        has_s3_timeout = "s3_timeout" in self.model_fields_set
        if self.database_url is not None and has_s3_timeout and self.heartbeat_timeout < 2 * self.s3_timeout:
            raise ValueError(
                f"heartbeat_timeout = {self.heartbeat_timeout:g} must be at least twice s3_timeout = "
                f"{self.s3_timeout:g}: otherwise a request to the store may outlast the host's lease"
            )
        if self.stall_timeout <= self.s3_retry_timeout:
            raise ValueError(
                f"stall_timeout = {self.stall_timeout:g} must be more than s3_retry_timeout = "
                f"{self.s3_retry_timeout:g}: otherwise a task fails while it still retries its requests to the store"
            )
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file belong together: set both or none")
        return self

    @model_validator(mode="after")
    def _check_s3_credentials(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key belong together: set both or none")
        has_no_key = self.s3_credentials_file is None and self.s3_access_key_id is None
        if self.store == "s3" and self.upload_credentials == "service" and has_no_key:
            raise ValueError("upload_credentials = service needs the service's own key: set s3_credentials_file")
        return self

    @property
    def s3_send_timeout(self) -> float:
        """Seconds for a connection and for each piece of a request. In a fleet it ends before the host's lease does.

        A response may take `s3_timeout`: nothing is written meanwhile.

        The rest of the lease (`tasks/lease.py`) is enough for two heartbeats: one lost heartbeat stops no upload.
        """
        return self.s3_timeout if self.database_url is None else min(self.s3_timeout, self.heartbeat_timeout / 3)

    @property
    def database(self) -> str:
        """URL of the database for SQLAlchemy. May hold a password."""
        if self.database_url is None:
            return self.directory.database
        return self.database_url.get_secret_value()

    @property
    def directory(self) -> DataDirectory:
        """Paths in `data_dir`."""
        return DataDirectory(self.data_dir)

    @property
    def known_host_id(self) -> str | None:
        """ID of the fleet's host that this data directory belongs to; None if it was never set."""
        if "host_id" in self.model_fields_set:
            return self.host_id
        try:
            return self.directory.host_id.read_text("utf-8").strip() or None
        except FileNotFoundError:
            return None

    @property
    def max_open_files(self) -> int:
        """Largest number of files that a process opens with these settings."""
        of_tasks = self.worker_concurrency * _FILES_OF_A_TASK
        of_monitoring = 0 if self.monitoring_port is None else MAX_MONITORING_CONNECTIONS
        return self.max_connections + self.max_store_connections + of_tasks + of_monitoring + _FILES_OF_THE_SERVICE

    @property
    def max_store_connections(self) -> int:
        """Connections to the store: enough that no request of a task waits for a free connection."""
        return self.worker_concurrency * (self.upload_concurrency + _CHECKS_OF_A_TASK) + _CONNECTIONS_OF_THE_SERVICE

    @property
    def effective_instance_dir(self) -> Path:
        """Directory of the files that describe instances."""
        return self.instance_dir or self.directory.instances

    @property
    def task_retention(self) -> timedelta:
        """Time for which an ended task is described."""
        return timedelta(days=self.task_retention_days)


def load_settings(file: Path | None, **options: object) -> Settings:
    """Read and validate the settings.

    Args:
        file: The TOML file given with `--config`, if any.
        options: Values from the command line; None counts as not given.

    Raises:
        SettingsError: The file cannot be read, or a setting is unknown, invalid, or conflicts with another one.
    """
    given = {name: value for name, value in options.items() if value is not None}
    merged: dict[str, object] = {}
    for values, source_of in (
        *([_read_file(file)] if file else []),
        (_read_environment(), lambda name: f"{_PREFIX}{name.upper()}"),
        (given, lambda name: f"--{name.replace('_', '-')}"),
    ):
        merged |= dict(_validate(values, source_of))
    try:
        return Settings(**merged)
    except ValidationError as error:  # only from the validators of Settings; the messages are ours
        messages = [str(detail.get("ctx", {}).get("error", detail["msg"])) for detail in error.errors()]
        raise SettingsError("; ".join(messages)) from None


_SourceOf = Callable[[str], str]
"""Returns the source of the setting with that name, for messages."""


def _read_file(file: Path) -> tuple[Mapping[str, object], _SourceOf]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_SIZE + 1)
        if len(content) > _MAX_FILE_SIZE:
            raise SettingsError(f"{file} is not a settings file: it has more than {_MAX_FILE_SIZE} bytes")
        text = content.decode("utf-8-sig")  # editors on Windows write a byte order mark
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {file}: {os.strerror(error.errno or 0)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{file}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+), column (\d+)", str(error))
        where = f"line {found[1]}, column {found[2]}" if found else f"line {text.count(chr(10)) + 1} (the end)"
        raise SettingsError(
            f"{file}, {where}: not valid TOML. Text needs quotes, numbers do not: "
            'region = "us-east-1", listen_port = 8773. Each name may occur once.'
        ) from None
    except RecursionError:
        raise SettingsError(f"{file}: nested too deeply") from None
    return values, lambda name: f"{file}, line {_line_of(name, text)}: {name}"


def _line_of(name: str, text: str) -> int:
    """Return the number of the line that sets a name, or that opens a table with that name."""
    quoted = re.escape(name)
    found = re.search(rf"""^[ \t]*(\[+[ \t]*)?["']?{quoted}["']?[ \t]*[=.\]]""", text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else 1


def _read_environment() -> dict[str, object]:
    values: dict[str, object] = {}
    for variable, text in os.environ.items():
        if not variable.upper().startswith(_PREFIX) or variable in _NOT_SETTINGS:
            continue
        name = variable[len(_PREFIX) :].lower()
        field = Settings.model_fields.get(name)
        values[name] = _parse_list(variable, text) if field and get_origin(field.annotation) is tuple else text
    return values


def _parse_list(variable: str, text: str) -> object:
    """Parse a list, which an environment variable holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SettingsError(f'{variable}: must be a list as JSON: ["first", "second"]') from None


def _validate(values: Mapping[str, object], source_of: _SourceOf) -> Iterator[tuple[str, object]]:
    """Yield each setting with its validated value. Raises SettingsError for the first invalid one."""
    for name, value in values.items():
        field = Settings.model_fields.get(name)
        if field is None:
            raise SettingsError(f"{source_of(name)}: unknown setting{_suggestion(name, source_of)}")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str | Path) and (message := _text_error(str(text))):
                raise SettingsError(f"{source_of(name)}: {message}")
        try:
            validated = _adapter(field).validate_python(value)
        except ValidationError as error:
            raise SettingsError(f"{source_of(name)}: {_value_error(field, error)}") from None
        largest = _MAX_NUMBERS.get(name.rpartition("_")[2], _MAX_NUMBER)
        if isinstance(validated, int | float) and not validated <= largest:  # also NaN
            raise SettingsError(f"{source_of(name)}: must be {_type_name(field)}, {largest} or less")
        yield name, validated


def _text_error(text: str) -> str | None:
    """Return what is wrong with a text or path, if anything.

    The system would cut it at a NUL; an empty path would be the working directory.
    """
    if not text:
        return "must not be empty. Remove the setting to use its default."
    if "\0" in text:
        return "must not contain a NUL character"
    if not _is_utf8(text):
        return "is not UTF-8. Thrave accepts names and paths in UTF-8 only."
    return None


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = field.annotation
    return TypeAdapter(Annotated[kind, *field.metadata] if field.metadata else kind)


def _suggestion(name: str, source_of: _SourceOf) -> str:
    closest = difflib.get_close_matches(name, Settings.model_fields, n=1)
    if not closest:
        return ". See docs/reference/settings.md."
    suggested = source_of(closest[0])
    return f"; did you mean {suggested if suggested.startswith((_PREFIX, '--')) else closest[0]}?"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _value_error(field: FieldInfo, error: ValidationError) -> str:
    """Return what is wrong with a value, without the value: it may be a secret."""
    detail = error.errors(include_input=False)[0]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    for prefix, template in _MESSAGES.items():
        if detail["type"].startswith(prefix):
            return template.format(**detail.get("ctx", {}), type=_type_name(field))
    return f"must be {_type_name(field)}"


_MESSAGES = {
    "greater_than_equal": "must be {type}, {ge} or more",
    "greater_than": "must be {type}, more than {gt}",
    "less_than_equal": "must be {type}, {le} or less",
    "less_than": "must be {type}, less than {lt}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must have the form {pattern}",
}
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text in quotes", SecretStr: "text in quotes",
               Path: "a path in quotes", bool: "true or false",
               tuple: 'a list of text: ["first", "second"]'}  # fmt: skip


def _type_name(field: FieldInfo) -> str:
    """Describe the type of a setting."""
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [get_args(kind)[0] for kind in kinds if get_origin(kind) is Annotated]
    if any(get_origin(kind) is Literal for kind in kinds):
        choices = next(get_args(kind) for kind in kinds if get_origin(kind) is Literal)
        return " or ".join(map(repr, choices))
    for kind in kinds:
        if name := _TYPE_NAMES.get(get_origin(kind) or kind):
            return name
    return "another value"
