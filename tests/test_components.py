"""The data directory: one service at a time, one database, vault key and identity, and no access for other users."""

import os
import shutil
import signal
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.service.forked_server import ForkedServer
from thrave.cli.exit_codes import Exit
from thrave.components import Components, DatabaseLostError, open_components
from thrave.config import Settings
from thrave.database import DatabaseReplacedError, DatabaseUnusableError, explain, open_engine, sa
from thrave.identity.certificates import ServiceIdentity
from thrave.identity.errors import ServiceIdentityError
from thrave.testing import ServerError
from thrave.vault import Vault, VaultKeyError

TIMEOUT = 120  # seconds


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def settings(data):
    return Settings(data_dir=data)


@pytest.fixture
def initialized(settings):
    """A data directory with an account."""
    initialize(settings)
    return settings


def initialize(settings):
    components = open_components(settings)
    components.accounts.create("alice")
    components.database.dispose()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# One service at a time


def test_second_service_reports_the_process_of_the_first(data):
    with ForkedServer.running(data) as first:
        with pytest.raises(
            ServerError, match=f"status {Exit.REFUSED.value}: .*process {first.process.pid} "
        ) as refusal:
            ForkedServer(first.data).start()
        assert first.url in str(refusal.value)
        assert first.process.poll() is None


def test_killed_service_releases_its_data_directory(data):
    with ForkedServer.running(data) as killed:
        killed.stop(signal.SIGKILL)
        with ForkedServer.running(data):
            pass


def test_components_open_while_a_service_runs(data):
    with ForkedServer.running(data) as server:
        account, _ = server.account("alice")
        components = open_components(Settings(data_dir=data))
        assert [found.account_id for found in components.accounts.list()] == [account.account_id]
        components.database.dispose()


def test_simultaneous_first_starts_create_one_database_key_and_identity(data):
    settings = Settings(data_dir=data)

    def start(number):
        components = open_components(settings)
        components.accounts.create(f"account-{number}")
        fingerprint = components.service.fingerprint
        components.database.dispose()
        return fingerprint

    with ThreadPoolExecutor(6) as pool:
        assert len({*pool.map(start, range(6))}) == 1
    components = open_components(settings)
    assert len(components.accounts.list()) == 6
    components.database.dispose()


# Lost databases


def delete(database):
    for path in database.parent.glob("thrave.db*"):
        path.unlink()


def replace(database):
    shutil.copy(database, database.with_name("new"))
    database.with_name("new").rename(database)


def overwrite(database):
    database.write_bytes(database.with_name("backup").read_bytes())


def empty(database):
    os.truncate(database, 0)


@pytest.mark.parametrize("change", [delete, replace, overwrite, empty])
def test_service_stops_when_its_database_is_replaced(data, change, capfd):
    server = ForkedServer.running(data, heartbeat_interval=0.2)
    with server as running:
        with sqlite3.connect(data / "thrave.db") as source, sqlite3.connect(data / "backup") as backup:
            source.backup(backup)  # an older state, from before the start
            backup.execute("PRAGMA user_version = 0")
        source.close()
        backup.close()
        change(data / "thrave.db")
        # Coverage, which handles os._exit, may crash first while other threads of the process still run.
        assert running.process.wait(TIMEOUT) in {Exit.FAILED, -signal.SIGSEGV}
        assert (data / "thrave.db").exists() is (change is not delete)
        assert change is not empty or (data / "thrave.db").stat().st_size == 0
        running.process.stdout.close()
        running.process = None
    assert f"{data}/thrave.db was deleted or replaced" in capfd.readouterr().err


@pytest.mark.parametrize("change", [delete, replace])
def test_open_database_refuses_transactions_after_a_replacement(initialized, change):
    database = open_engine(initialized.database)
    with database.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
    change(initialized.directory.database_file)
    with pytest.raises(DatabaseReplacedError, match=r"thrave\.db"), database.begin():
        pytest.fail("a transaction began")
    database.dispose()
    with pytest.raises(DatabaseReplacedError), database.connect():
        pytest.fail("a connection was made")
    assert initialized.directory.database_file.exists() is (change is replace)


def test_transaction_cannot_commit_after_a_replacement(initialized):
    database = open_engine(initialized.database)
    connection = database.connect()
    connection.execute(sa.text("DELETE FROM access_key"))
    replace(initialized.directory.database_file)
    with pytest.raises(DatabaseReplacedError):
        connection.commit()
    connection.close()
    database.dispose()


@pytest.mark.parametrize("change", [delete, empty])
@pytest.mark.parametrize("kept", ["vault.key", "service", "buckets"])
def test_lost_database_is_not_created_again(initialized, change, kept):
    buckets = initialized.directory.buckets
    (buckets / ".owners").mkdir(parents=True)
    (buckets / ".owners" / "bucket").write_text("123456789012\n")
    change(initialized.directory.database_file)
    for name in {"vault.key", "service", "buckets"} - {kept}:
        path = initialized.data_dir / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    before = files_of(initialized.data_dir)
    with pytest.raises(DatabaseLostError, match=r"thrave\.db is missing or empty"):
        open_components(initialized)
    assert files_of(initialized.data_dir) == before


def test_missing_vault_key_is_not_created_again(initialized):
    initialized.directory.vault_key.unlink()
    with pytest.raises(VaultKeyError, match=r"vault\.key is missing"):
        open_components(initialized)
    assert not initialized.directory.vault_key.exists()


def test_vault_key_of_another_database_is_refused(initialized, tmp_path):
    other = Settings(data_dir=tmp_path / "other")
    initialize(other)
    shutil.copy2(other.directory.vault_key, initialized.directory.vault_key)
    with pytest.raises(VaultKeyError, match="is not the key"):
        open_components(initialized)


@pytest.mark.parametrize("lost", ["", "pk.pem", "cert.pem", "side-key.pem"])
def test_missing_service_identity_is_not_created_again(initialized, lost):
    path = initialized.directory.service / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(initialized.data_dir)
    components = open_components(initialized)
    with pytest.raises(ServiceIdentityError):
        _ = components.service
    components.database.dispose()
    assert files_of(initialized.data_dir) - {"thrave.db-shm", "thrave.db-wal"} == before - {
        "thrave.db-shm",
        "thrave.db-wal",
    }
    with pytest.raises(ServerError, match="identity"):
        ForkedServer(initialized.directory).start()


@pytest.mark.parametrize("names", [("pk.pem", "cert.pem"), ("side-key.pem",)])
def test_service_identity_of_another_database_is_refused(initialized, tmp_path, names):
    ServiceIdentity.open_or_create(tmp_path / "other")
    for name in names:
        shutil.copy2(tmp_path / "other" / name, initialized.directory.service / name)
    components = open_components(initialized)
    with pytest.raises(ServiceIdentityError, match="another service identity"):
        _ = components.service
    components.database.dispose()


@pytest.mark.parametrize(("kind", "step"), [(Vault, "open_or_create"), (ServiceIdentity, "open_or_create"),
                                           (ServiceIdentity, "fingerprint"), (Vault, "encrypt")])  # fmt: skip
def test_interrupted_first_start_is_completed_by_the_next(settings, monkeypatch, kind, step):
    class InterruptedStart(BaseException):
        pass

    def interrupt(*_args, **_named):
        raise InterruptedStart

    with monkeypatch.context() as patch:
        patch.setattr(kind, step, property(interrupt) if step == "fingerprint" else interrupt)
        with pytest.raises(InterruptedStart):
            open_components(settings)
    initialize(settings)
    components = open_components(settings)
    assert components.service.fingerprint
    components.database.dispose()


@pytest.mark.parametrize("broken", ["address", "plain-http", "certificate", "credentials", "open-credentials"])
def test_first_start_with_a_wrong_setting_creates_nothing(data, tmp_path, broken):
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = A\naws_secret_access_key = B\n")
    credentials.chmod(0o644)
    s3 = {"store": "s3", "upload_credentials": "service", "s3_endpoint": "http://127.0.0.1:9"}
    settings = {
        "address": {"listen_address": "203.0.113.1"},
        "plain-http": {"listen_address": "0.0.0.0"},
        "certificate": {"tls_certificate_file": tmp_path / "no.pem", "tls_key_file": tmp_path / "no.pem"},
        "credentials": {**s3, "s3_credentials_file": tmp_path / "none"},
        "open-credentials": {**s3, "s3_credentials_file": credentials},
    }[broken]
    data.mkdir()
    with pytest.raises(ServerError), ForkedServer.running(data, **settings):
        pytest.fail("it started")
    assert files_of(data) == set()


# Permissions


def test_files_are_private_with_any_umask(data, tmp_path):
    before = os.umask(0o022)
    try:
        data.mkdir(mode=0o755)
        with ForkedServer.running(data) as server:
            account, _ = server.account("alice")
            (tmp_path / "v.raw").write_bytes(bytes(4096))
            server.instance(account.account_id, tmp_path / "v.raw")
            server.client(server.account("bob")[1]).describe_instances()
            assert accessible_to_others(data) <= {"instances"}  # created by this process with its umask
    finally:
        os.umask(before)


def test_start_restricts_access_to_existing_files(initialized):
    directory = initialized.directory
    for folder in (directory.buckets / "bucket", directory.buckets / ".spool", directory.instances / ".locks"):
        folder.mkdir(parents=True)
    for path in (directory.root, *directory.root.rglob("*")):
        if path.name not in {"vault.key", "pk.pem", "side-key.pem", "cert.pem"}:
            path.chmod(0o755 if path.is_dir() else 0o644)
    components = open_components(initialized)
    assert accessible_to_others(directory.root) <= {"service/cert.pem"}
    components.database.dispose()


def accessible_to_others(folder):
    return {
        str(path.relative_to(folder))
        for path in (folder, *folder.rglob("*"))
        if path.lstat().st_mode & 0o077 and not stat.S_ISLNK(path.lstat().st_mode)
    }


# Messages


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"text, and no database, longer than the header of one would be" * 4, "is not a SQLite database"),
     (None, "cannot be opened")],
)  # fmt: skip
def test_unusable_database_error_names_the_file(initialized, content, message):
    file = initialized.directory.database_file
    delete(file)
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DatabaseUnusableError, match=message) as error:
        open_components(initialized)
    assert str(file) in str(error.value)
    assert "sqlite3." not in str(error.value)


def test_unreachable_postgresql_error_has_no_password():
    url = "postgresql://thrave:hunter2@127.0.0.1:1/thrave"
    with pytest.raises(sa.exc.OperationalError) as refusal:
        open_engine(url).connect()
    message = str(explain(refusal.value, url))
    assert message == "PostgreSQL at 127.0.0.1:1 does not answer. Start it, or check the setting database_url."


def test_components_without_database_open_without_creating_it(data):
    components = Components(Settings(data_dir=data))
    assert components.instances.list() == []
    assert not data.exists()


def test_folder_lock_waits_for_its_release(tmp_path):
    from thrave.files import folder_lock

    entered = threading.Event()

    def enter():
        with folder_lock(tmp_path):
            entered.set()

    with folder_lock(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.is_set()
    thread.join(TIMEOUT)
    assert entered.is_set()


def test_engine_of_a_library_refuses_the_replaced_database(initialized):
    ended = []
    components = Components(initialized, on_replaced=ended.append)
    components.open()
    library = sa.create_engine(initialized.database)
    with library.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
    replace(initialized.directory.database_file)
    with pytest.raises(DatabaseReplacedError), library.begin():
        pytest.fail("a transaction began")
    assert len(ended) == 1
    library.dispose()
    with pytest.raises(DatabaseReplacedError), library.connect():
        pytest.fail("a connection was made")
    components.database.dispose()
