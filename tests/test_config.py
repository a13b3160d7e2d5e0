"""Settings: each wrong one is named with the place where it stands, in our words, and none of its value is shown."""

import os
import subprocess
import sys

import pytest

from thrave.config import Settings, SettingsError, load_settings
from thrave.tasks.lease import Lease

SECRET = "hunter2-hunter2"
FLEET = {"database_url": "postgresql://thrave@db.example/thrave"}
LIBRARIES = ("pydantic", "validation error", "tomllib", "Traceback", "type=", "input_value")


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Gives the message for settings in a file, in the environment, and on the command line."""

    def refuse(text=None, environment=None, **options):
        file = tmp_path / "thrave.toml"
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError) as error:
            load_settings(file if text is not None else None, **options)
        message = str(error.value)
        assert not any(word in message for word in LIBRARIES), message
        assert SECRET not in message
        return message

    return refuse


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port = 8773\nregion = us-east-1\n", "thrave.toml, line 2, column 10: not valid TOML"),
        ("port = 1\nport = 2\n", "thrave.toml, line 2"),
        ('region = "us', "thrave.toml, line 1"),
        (b"port = 1\n\xff\xfe", "thrave.toml, line 2: not UTF-8"),
        ('port = 1\nregionn = "x"\n', "thrave.toml, line 2: regionn: there is no such setting; did you mean region?"),
        ('\n"regionn" = "x"\n', "line 2: regionn"),
        ("[store]\nkind = 1\n", "thrave.toml, line 1: store: must be 'directory' or 's3'"),
        ("\n[[stores]]\nkind = 1\n", "line 2: stores: there is no such setting; did you mean store?"),
        ('a = "xyz"\n', "line 1: a: there is no such setting. docs/reference/settings.md lists all"),
        ('port = "eighty"\n', "line 1: port: must be a whole number"),
        ("port = 70000\n", "line 1: port: must be a whole number, 65535 or less"),
        ("port = -1\n", "port: must be a whole number, 0 or more"),
        ("heartbeat = 0\n", "heartbeat: must be a number, more than 0"),
        ("region = 5\n", "region: must be text in quotes"),
        ("data = 5\n", "data: must be a path in quotes"),
        ('sysprep = "one"\n', 'sysprep: must be a list of text: ["first", "second"]'),
        ("sysprep = [1]\n", "sysprep: must be a list of text"),
        ('level = "faster"\n', "level: must be 'fast' or 'small'"),
        (f's3_secret_access_key = ["{SECRET}"]\n', "s3_secret_access_key: must be text in quotes"),
        (f'database_url = "postgres//x:{SECRET}@y/z"\n', "database_url: must be postgresql://USER@HOST/NAME"),
        ('database_url = "sqlite:////tmp/x"\n', "database_url: must be postgresql://USER@HOST/NAME"),
        ("a = " + "[" * 5000, "thrave.toml"),
        ("#" * 2**20 + "\n", "is no file of settings: it has more than 1048576 bytes"),
        ("heartbeat = inf\n", "line 1: heartbeat: must be a number, 1000000 or less"),
        ("heartbeat = nan\n", "heartbeat: must be a number, more than 0"),
        ("host_lost_after = 1e300\n", "host_lost_after: must be a number, 1000000 or less"),
        ("task_retention_days = 1e6\n", "task_retention_days: must be a number, 36500 or less"),
        ("tasks_at_once = 10000000000000000000000\n", "tasks_at_once: must be a whole number, 1000000 or less"),
        ('data = ""\n', "data: must not be empty"),
        ('image_directories = ["/a", ""]\n', "image_directories: must not be empty"),
        ('host = ""\n', "host: must not be empty"),
        ('instances = "\\u0000"\n', "instances: must not have a NUL character"),
        (f'database_url = "postgresql://u:{SECRET}@h:port/x"\n', "database_url: must be postgresql://USER@HOST:PORT/"),
        (f'database_url = "postgresql://u:{SECRET}@h:70000/x"\n', "its host or port cannot be read"),
        (f'database_url = "postgresql://u:{SECRET}@[::1/x"\n', "its host or port cannot be read"),
        (f's3_endpoint = "https://{"a" * 64}.example"\n', "s3_endpoint: its host is no host name"),
    ],
)
def test_wrong_file_is_reported_with_file_and_line(refused, text, says):
    assert says in refused(text)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("THRAVE_UNCLEAN_VOLUMES", "refuse", "did you mean THRAVE_UNCLEAN_VOLUME?"),
        ("thrave_unclean_volumes", "refuse", "did you mean THRAVE_UNCLEAN_VOLUME?"),
        ("THRAVE_PORT", "eighty", "THRAVE_PORT: must be a whole number"),
        ("THRAVE_DOWNTIME", "overlays", "THRAVE_DOWNTIME: must be 'whole' or 'overlay'"),
        ("THRAVE_SYSPREP", "shutdown", "THRAVE_SYSPREP: must be a list as JSON"),
        ("THRAVE_DATA", "dat\udce4", "THRAVE_DATA: is not UTF-8"),
        ("THRAVE_X", "y", "THRAVE_X: there is no such setting"),
    ],
)
def test_wrong_variable_is_reported_by_its_name(refused, variable, value, says):
    assert says in refused(environment={variable: value})


def test_wrong_option_is_reported_by_its_name(refused):
    assert refused(port=70000).startswith("--port: must be a whole number, 65535 or less")


def test_wrong_value_is_reported_although_another_takes_precedence(refused):
    assert "line 1: port" in refused('port = "eighty"\n', {"THRAVE_PORT": "1"}, port=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_key": "key.pem"}, "tls_certificate and tls_key belong together"),
        ({"s3_access_key_id": "AKIA"}, "s3_access_key_id and s3_secret_access_key belong together"),
        ({"store": "s3", "upload": "service"}, "needs the service's key"),
        ({"heartbeat": 60.0}, "host_lost_after = 60 must be at least 4 times heartbeat = 60"),
        ({"host_lost_after": 1.0}, "host_lost_after = 1 must be at least 4 times heartbeat = 5"),
        ({**FLEET, "s3_timeout": 31.0}, "host_lost_after = 60 must be at least twice s3_timeout = 31"),
        ({"stall_timeout": 60.0, "s3_patience": 60.0}, "stall_timeout = 60 must be more than s3_patience = 60"),
        ({"s3_patience": 600.0}, "stall_timeout = 600 must be more than s3_patience = 600"),
    ],
)
def test_contradicting_settings_are_reported(refused, settings, says):
    assert says in refused(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        FLEET,
        {**FLEET, "heartbeat": 0.5, "host_lost_after": 2.0},
        {**FLEET, "s3_timeout": 30.0},
        {"s3_timeout": 90.0},  # one machine: no other host takes its tasks
        {"stall_timeout": 1.0},
        {"stall_timeout": 60.0, "s3_patience": 50.0},
    ],
)
def test_usable_times_are_accepted(settings):
    accepted = load_settings(None, **settings)
    assert accepted.s3_patience < accepted.stall_timeout
    assert accepted.s3_patience <= Settings().s3_patience


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heartbeat": 15.0},
        {"heartbeat": 15.0, "s3_timeout": 30.0},
        {"heartbeat": 0.5, "host_lost_after": 2.0},
        {"heartbeat": 0.5, "host_lost_after": 3.0},
        {"heartbeat": 150.0, "host_lost_after": 600.0, "s3_timeout": 300.0},
    ],
)
def test_one_lost_heartbeat_stops_no_upload(settings):
    """After a heartbeat that was accepted a piece may still be sent when the second one after it is due."""
    accepted = load_settings(None, **FLEET, **settings)
    now = 0.0
    lease = Lease(accepted.host_lost_after, lambda: now)
    now = 2 * accepted.heartbeat
    lease.check(accepted.s3_send_timeout)


def test_command_line_precedes_environment_precedes_file(tmp_path, monkeypatch):
    file = tmp_path / "thrave.toml"
    file.write_text('port = 1\nregion = "file"\nhost = "file"\nsysprep = ["a", "b"]\n')
    monkeypatch.setenv("THRAVE_PORT", "2")
    monkeypatch.setenv("THRAVE_REGION", "environment")
    settings = load_settings(file, port=3)
    assert (settings.port, settings.region, settings.host, settings.sysprep) == (3, "environment", "file", ("a", "b"))


def test_list_in_the_environment_is_json(monkeypatch):
    monkeypatch.setenv("THRAVE_SYSPREP", '["shutdown", "/s"]')
    assert load_settings(None).sysprep == ("shutdown", "/s")


def test_variable_of_an_instances_command_is_no_setting(monkeypatch):
    monkeypatch.setenv("THRAVE_INSTANCE_ID", "i-0123456789abcdef0")
    assert load_settings(None) == Settings()


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_wrong_setting_is_reported_before_the_service_is_imported(command):
    code = (
        "import sys; from thrave.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in ('dbos', 'sqlalchemy', 'uvicorn', 'botocore') if name in sys.modules])"
    )
    environment = {**os.environ, "THRAVE_PORT": "eighty"}
    run = subprocess.run([sys.executable, "-c", code, command], env=environment, capture_output=True, text=True,
                         check=False, timeout=120)  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "[]\n"), run.stderr


def test_every_number_has_an_end(refused):
    """What date arithmetic and timers cannot take is refused with the setting's name, not later by them."""
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in {int, float}]
    assert len(numbers) > 10
    for name in numbers:
        assert f"line 1: {name}: must be " in refused(f"{name} = 1{'0' * 20}\n")


def test_a_list_in_the_environment_that_is_nested_too_deeply_is_refused(refused):
    assert "THRAVE_SYSPREP: must be a list as JSON" in refused(environment={"THRAVE_SYSPREP": "[" * 100_000})


def test_an_empty_variable_is_refused(refused):
    """As a path it would be the working directory."""
    assert "THRAVE_DATA: must not be empty" in refused(environment={"THRAVE_DATA": ""})


def test_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "thrave.toml"
    file.write_bytes(b"\xef\xbb\xbfport = 99\n")
    assert load_settings(file).port == 99


def test_password_of_the_database_may_have_any_character(tmp_path):
    file = tmp_path / "thrave.toml"
    file.write_text('database_url = "postgresql://u:a/b#c?d@h:5433/x"\n')
    assert load_settings(file).database == "postgresql://u:a/b#c?d@h:5433/x"
