"""Settings: errors name the source and not the value; precedence; limits."""

import os
import subprocess
import sys

import pytest

from thrave.config import Settings, SettingsError, load_settings
from thrave.tasks.lease import LeaseTimer

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
        ("listen_port = 8773\nregion = us-east-1\n", "thrave.toml, line 2, column 10: not valid TOML"),
        ("listen_port = 1\nport = 2\n", "thrave.toml, line 2"),
        ('region = "us', "thrave.toml, line 1"),
        (b"listen_port = 1\n\xff\xfe", "thrave.toml, line 2: not UTF-8"),
        ('listen_port = 1\nregionn = "x"\n', "thrave.toml, line 2: regionn: unknown setting; did you mean region?"),
        ('\n"regionn" = "x"\n', "line 2: regionn"),
        ("[store]\nkind = 1\n", "thrave.toml, line 1: store: must be 'directory' or 's3'"),
        ("\n[[stores]]\nkind = 1\n", "line 2: stores: unknown setting; did you mean store?"),
        ('a = "xyz"\n', "line 1: a: unknown setting. See docs/reference/settings.md"),
        ('listen_port = "eighty"\n', "line 1: listen_port: must be a whole number"),
        ("listen_port = 70000\n", "line 1: listen_port: must be a whole number, 65535 or less"),
        ("listen_port = -1\n", "listen_port: must be a whole number, 0 or more"),
        ("heartbeat_interval = 0\n", "heartbeat_interval: must be a number, more than 0"),
        ("region = 5\n", "region: must be text in quotes"),
        ("data_dir = 5\n", "data_dir: must be a path in quotes"),
        ('sysprep_command = "one"\n', 'sysprep_command: must be a list of text: ["first", "second"]'),
        ("sysprep_command = [1]\n", "sysprep_command: must be a list of text"),
        ('compression = "faster"\n', "compression: must be 'fast' or 'small'"),
        ('skip_unused = "unused"\n', "skip_unused: must be true or false"),
        (f's3_secret_access_key = ["{SECRET}"]\n', "s3_secret_access_key: must be text in quotes"),
        (f'database_url = "postgres//x:{SECRET}@y/z"\n', "database_url: must be postgresql://USER@HOST/NAME"),
        ('database_url = "sqlite:////tmp/x"\n', "database_url: must be postgresql://USER@HOST/NAME"),
        ("a = " + "[" * 5000, "thrave.toml"),
        ("#" * 2**20 + "\n", "is not a settings file: it has more than 1048576 bytes"),
        ("heartbeat_interval = inf\n", "line 1: heartbeat_interval: must be a number, 1000000 or less"),
        ("heartbeat_interval = nan\n", "heartbeat_interval: must be a number, more than 0"),
        ("heartbeat_timeout = 1e300\n", "heartbeat_timeout: must be a number, 1000000 or less"),
        ("task_retention_days = 1e6\n", "task_retention_days: must be a number, 36500 or less"),
        (
            "worker_concurrency = 10000000000000000000000\n",
            "worker_concurrency: must be a whole number, 1000000 or less",
        ),
        ('data_dir = ""\n', "data_dir: must not be empty"),
        ('image_dirs = ["/a", ""]\n', "image_dirs: must not be empty"),
        ('listen_address = ""\n', "listen_address: must not be empty"),
        ('instance_dir = "\\u0000"\n', "instance_dir: must not contain a NUL character"),
        (f'database_url = "postgresql://u:{SECRET}@h:port/x"\n', "database_url: must be postgresql://USER@HOST:PORT/"),
        (f'database_url = "postgresql://u:{SECRET}@h:70000/x"\n', "invalid host or port"),
        (f'database_url = "postgresql://u:{SECRET}@[::1/x"\n', "invalid host or port"),
        (f's3_endpoint = "https://{"a" * 64}.example"\n', "s3_endpoint: the host is not a valid host name"),
    ],
)
def test_invalid_file_is_reported_with_file_and_line(refused, text, says):
    assert says in refused(text)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("THRAVE_UNCLEAN_VOLUMES", "refuse", "did you mean THRAVE_UNCLEAN_VOLUME?"),
        ("thrave_unclean_volumes", "refuse", "did you mean THRAVE_UNCLEAN_VOLUME?"),
        ("THRAVE_LISTEN_PORT", "eighty", "THRAVE_LISTEN_PORT: must be a whole number"),
        ("THRAVE_CAPTURE_MODE", "overlays", "THRAVE_CAPTURE_MODE: must be 'offline' or 'overlay'"),
        ("THRAVE_SYSPREP_COMMAND", "shutdown", "THRAVE_SYSPREP_COMMAND: must be a list as JSON"),
        ("THRAVE_DATA_DIR", "dat\udce4", "THRAVE_DATA_DIR: is not UTF-8"),
        ("THRAVE_X", "y", "THRAVE_X: unknown setting"),
    ],
)
def test_invalid_variable_is_reported_by_its_name(refused, variable, value, says):
    assert says in refused(environment={variable: value})


def test_invalid_option_is_reported_by_its_name(refused):
    assert refused(listen_port=70000).startswith("--listen-port: must be a whole number, 65535 or less")


def test_invalid_value_is_reported_also_if_another_takes_precedence(refused):
    assert "line 1: listen_port" in refused('listen_port = "eighty"\n', {"THRAVE_LISTEN_PORT": "1"}, listen_port=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_key_file": "key.pem"}, "tls_certificate_file and tls_key_file belong together"),
        ({"s3_access_key_id": "AKIA"}, "s3_access_key_id and s3_secret_access_key belong together"),
        ({"store": "s3", "upload_credentials": "service"}, "needs the service's own key"),
        ({"heartbeat_interval": 60.0}, "heartbeat_timeout = 60 must be at least 4 times heartbeat_interval = 60"),
        ({"heartbeat_timeout": 1.0}, "heartbeat_timeout = 1 must be at least 4 times heartbeat_interval = 5"),
        ({**FLEET, "s3_timeout": 31.0}, "heartbeat_timeout = 60 must be at least twice s3_timeout = 31"),
        (
            {"stall_timeout": 60.0, "s3_retry_timeout": 60.0},
            "stall_timeout = 60 must be more than s3_retry_timeout = 60",
        ),
        ({"s3_retry_timeout": 600.0}, "stall_timeout = 600 must be more than s3_retry_timeout = 600"),
    ],
)
def test_contradicting_settings_are_reported(refused, settings, says):
    assert says in refused(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        FLEET,
        {**FLEET, "heartbeat_interval": 0.5, "heartbeat_timeout": 2.0},
        {**FLEET, "s3_timeout": 30.0},
        {"s3_timeout": 90.0},  # one machine: no other host takes its tasks
        {"stall_timeout": 1.0},
        {"stall_timeout": 60.0, "s3_retry_timeout": 50.0},
    ],
)
def test_usable_times_are_accepted(settings):
    accepted = load_settings(None, **settings)
    assert accepted.s3_retry_timeout < accepted.stall_timeout
    assert accepted.s3_retry_timeout <= Settings().s3_retry_timeout


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heartbeat_interval": 15.0},
        {"heartbeat_interval": 15.0, "s3_timeout": 30.0},
        {"heartbeat_interval": 0.5, "heartbeat_timeout": 2.0},
        {"heartbeat_interval": 0.5, "heartbeat_timeout": 3.0},
        {"heartbeat_interval": 150.0, "heartbeat_timeout": 600.0, "s3_timeout": 300.0},
    ],
)
def test_one_lost_heartbeat_does_not_stop_uploads(settings):
    """After a heartbeat that was accepted a piece may still be sent when the second one after it is due."""
    accepted = load_settings(None, **FLEET, **settings)
    now = 0.0
    lease = LeaseTimer(accepted.heartbeat_timeout, lambda: now)
    now = 2 * accepted.heartbeat_interval
    lease.check(accepted.s3_send_timeout)


def test_command_line_precedes_environment_precedes_file(tmp_path, monkeypatch):
    file = tmp_path / "thrave.toml"
    file.write_text('listen_port = 1\nregion = "file"\nlisten_address = "file"\nsysprep_command = ["a", "b"]\n')
    monkeypatch.setenv("THRAVE_LISTEN_PORT", "2")
    monkeypatch.setenv("THRAVE_REGION", "environment")
    settings = load_settings(file, listen_port=3)
    assert (settings.listen_port, settings.region, settings.listen_address, settings.sysprep_command) == (
        3,
        "environment",
        "file",
        ("a", "b"),
    )


def test_list_in_the_environment_is_json(monkeypatch):
    monkeypatch.setenv("THRAVE_SYSPREP_COMMAND", '["shutdown", "/s"]')
    assert load_settings(None).sysprep_command == ("shutdown", "/s")


def test_variables_of_instance_commands_are_ignored(monkeypatch):
    monkeypatch.setenv("THRAVE_INSTANCE_ID", "i-0123456789abcdef0")
    assert load_settings(None) == Settings()


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_invalid_setting_is_reported_before_the_service_is_imported(command):
    code = (
        "import sys; from thrave.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in ('dbos', 'sqlalchemy', 'uvicorn', 'botocore') if name in sys.modules])"
    )
    environment = {**os.environ, "THRAVE_LISTEN_PORT": "eighty"}
    run = subprocess.run([sys.executable, "-c", code, command], env=environment, capture_output=True, text=True,
                         check=False, timeout=120)  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "[]\n"), run.stderr


def test_every_number_has_a_maximum(refused):
    """What date arithmetic and timers cannot take is refused with the setting's name, not later by them."""
    numbers = [name for name, field in Settings.model_fields.items() if field.annotation in {int, float}]
    assert len(numbers) > 10
    for name in numbers:
        assert f"line 1: {name}: must be " in refused(f"{name} = 1{'0' * 20}\n")


def test_list_in_the_environment_with_deep_nesting_is_refused(refused):
    assert "THRAVE_SYSPREP_COMMAND: must be a list as JSON" in refused(
        environment={"THRAVE_SYSPREP_COMMAND": "[" * 100_000}
    )


def test_empty_variable_is_refused(refused):
    """As a path it would be the working directory."""
    assert "THRAVE_DATA_DIR: must not be empty" in refused(environment={"THRAVE_DATA_DIR": ""})


def test_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "thrave.toml"
    file.write_bytes(b"\xef\xbb\xbflisten_port = 99\n")
    assert load_settings(file).listen_port == 99


def test_password_of_the_database_may_have_any_character(tmp_path):
    file = tmp_path / "thrave.toml"
    file.write_text('database_url = "postgresql://u:a/b#c?d@h:5433/x"\n')
    assert load_settings(file).database == "postgresql://u:a/b#c?d@h:5433/x"
