"""A data directory: one service at a time, a database that is never begun anew, one key and identity, no open files."""

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
def begun(settings):
    """A data directory with an account."""
    begin(settings)
    return settings


def begin(settings):
    ground = open_components(settings)
    ground.accounts.create("alice")
    ground.database.dispose()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# One service at a time


def test_second_service_is_refused_and_names_the_first(data):
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


def test_commands_work_beside_a_service(data):
    with ForkedServer.running(data) as server:
        account, _ = server.account("alice")
        ground = open_components(Settings(data_dir=data))
        assert [found.account_id for found in ground.accounts.list()] == [account.account_id]
        ground.database.dispose()


def test_first_starts_at_once_make_one_database_key_and_identity(data):
    settings = Settings(data_dir=data)

    def start(number):
        ground = open_components(settings)
        ground.accounts.create(f"account-{number}")
        fingerprint = ground.service.fingerprint
        ground.database.dispose()
        return fingerprint

    with ThreadPoolExecutor(6) as pool:
        assert len({*pool.map(start, range(6))}) == 1
    ground = open_components(settings)
    assert len(ground.accounts.list()) == 6
    ground.database.dispose()


# A database that is lost


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
def test_service_stops_when_its_database_is_changed_by_others(data, change, capfd):
    server = ForkedServer.running(data, heartbeat_interval=0.2)
    with server as running:
        with sqlite3.connect(data / "thrave.db") as source, sqlite3.connect(data / "backup") as backup:
            source.backup(backup)  # an older state, as from before the start
            backup.execute("PRAGMA user_version = 0")
        source.close()
        backup.close()
        change(data / "thrave.db")
        # A coverage that is told of os._exit may crash first: then other threads of the process still run.
        assert running.process.wait(TIMEOUT) in {Exit.FAILED, -signal.SIGSEGV}
        assert (data / "thrave.db").exists() is (change is not delete)
        assert change is not empty or (data / "thrave.db").stat().st_size == 0
        running.process.stdout.close()
        running.process = None
    assert f"{data}/thrave.db was deleted or replaced" in capfd.readouterr().err


@pytest.mark.parametrize("change", [delete, replace])
def test_open_database_refuses_every_transaction_after_a_change(begun, change):
    database = open_engine(begun.database)
    with database.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
    change(begun.directory.database_file)
    with pytest.raises(DatabaseReplacedError, match=r"thrave\.db"), database.begin():
        pytest.fail("a transaction began")
    database.dispose()
    with pytest.raises(DatabaseReplacedError), database.connect():
        pytest.fail("a connection was made")
    assert begun.directory.database_file.exists() is (change is replace)


def test_change_within_a_transaction_refuses_its_commit(begun):
    database = open_engine(begun.database)
    connection = database.connect()
    connection.execute(sa.text("DELETE FROM access_key"))
    replace(begun.directory.database_file)
    with pytest.raises(DatabaseReplacedError):
        connection.commit()
    connection.close()
    database.dispose()


@pytest.mark.parametrize("change", [delete, empty])
@pytest.mark.parametrize("kept", ["vault.key", "service", "buckets"])
def test_lost_database_is_not_begun_anew(begun, change, kept):
    buckets = begun.directory.buckets
    (buckets / ".owners").mkdir(parents=True)
    (buckets / ".owners" / "bucket").write_text("123456789012\n")
    change(begun.directory.database_file)
    for name in {"vault.key", "service", "buckets"} - {kept}:
        path = begun.data_dir / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    before = files_of(begun.data_dir)
    with pytest.raises(DatabaseLostError, match=r"thrave\.db is missing or empty"):
        open_components(begun)
    assert files_of(begun.data_dir) == before


def test_missing_vault_key_is_not_replaced_by_a_new_one(begun):
    begun.directory.vault_key.unlink()
    with pytest.raises(VaultKeyError, match=r"vault\.key is missing"):
        open_components(begun)
    assert not begun.directory.vault_key.exists()


def test_vault_key_of_another_database_is_refused(begun, tmp_path):
    other = Settings(data_dir=tmp_path / "other")
    begin(other)
    shutil.copy2(other.directory.vault_key, begun.directory.vault_key)
    with pytest.raises(VaultKeyError, match="is not the key"):
        open_components(begun)


@pytest.mark.parametrize("lost", ["", "pk.pem", "cert.pem", "side-key.pem"])
def test_missing_service_identity_is_not_replaced_by_a_new_one(begun, lost):
    path = begun.directory.service / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(begun.data_dir)
    ground = open_components(begun)
    with pytest.raises(ServiceIdentityError):
        _ = ground.service
    ground.database.dispose()
    assert files_of(begun.data_dir) - {"thrave.db-shm", "thrave.db-wal"} == before - {"thrave.db-shm", "thrave.db-wal"}
    with pytest.raises(ServerError, match="identity"):
        ForkedServer(begun.directory).start()


@pytest.mark.parametrize("names", [("pk.pem", "cert.pem"), ("side-key.pem",)])
def test_other_service_identity_is_refused(begun, tmp_path, names):
    ServiceIdentity.open_or_create(tmp_path / "other")
    for name in names:
        shutil.copy2(tmp_path / "other" / name, begun.directory.service / name)
    ground = open_components(begun)
    with pytest.raises(ServiceIdentityError, match="another service identity"):
        _ = ground.service
    ground.database.dispose()


@pytest.mark.parametrize(("kind", "step"), [(Vault, "open_or_create"), (ServiceIdentity, "open_or_create"),
                                           (ServiceIdentity, "fingerprint"), (Vault, "encrypt")])  # fmt: skip
def test_first_start_that_was_cut_off_is_continued(settings, monkeypatch, kind, step):
    class CutOffError(BaseException):
        pass

    def cut_off(*_args, **_named):
        raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(kind, step, property(cut_off) if step == "fingerprint" else cut_off)
        with pytest.raises(CutOffError):
            open_components(settings)
    begin(settings)
    ground = open_components(settings)
    assert ground.service.fingerprint
    ground.database.dispose()


@pytest.mark.parametrize("broken", ["address", "plain-http", "certificate", "credentials", "open-credentials"])
def test_first_start_that_fails_for_a_setting_leaves_nothing(data, tmp_path, broken):
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


# Modes


def test_files_are_closed_to_others_whatever_the_umask(data, tmp_path):
    before = os.umask(0o022)
    try:
        data.mkdir(mode=0o755)
        with ForkedServer.running(data) as server:
            account, _ = server.account("alice")
            (tmp_path / "v.raw").write_bytes(bytes(4096))
            server.instance(account.account_id, tmp_path / "v.raw")
            server.client(server.account("bob")[1]).describe_instances()
            assert open_to_others(data) <= {"instances"}  # which this process has made, with its umask
    finally:
        os.umask(before)


def test_start_closes_what_was_open_to_others(begun):
    directory = begun.directory
    for folder in (directory.buckets / "bucket", directory.buckets / ".spool", directory.instances / ".locks"):
        folder.mkdir(parents=True)
    for path in (directory.root, *directory.root.rglob("*")):
        if path.name not in {"vault.key", "pk.pem", "side-key.pem", "cert.pem"}:
            path.chmod(0o755 if path.is_dir() else 0o644)
    ground = open_components(begun)
    assert open_to_others(directory.root) <= {"service/cert.pem"}
    ground.database.dispose()


def open_to_others(folder):
    return {
        str(path.relative_to(folder))
        for path in (folder, *folder.rglob("*"))
        if path.lstat().st_mode & 0o077 and not stat.S_ISLNK(path.lstat().st_mode)
    }


# Messages


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"text, and no database, longer than the header of one would be" * 4, "is not a SQLite database"),
     (None, "cannot be opened")],
)  # fmt: skip
def test_unusable_database_is_named_in_our_words(begun, content, says):
    file = begun.directory.database_file
    delete(file)
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DatabaseUnusableError, match=says) as error:
        open_components(begun)
    assert str(file) in str(error.value)
    assert "sqlite3." not in str(error.value)


def test_postgresql_that_does_not_answer_is_named_without_its_password():
    url = "postgresql://thrave:hunter2@127.0.0.1:1/thrave"
    with pytest.raises(sa.exc.OperationalError) as refusal:
        open_engine(url).connect()
    words = str(explain(refusal.value, url))
    assert words == "PostgreSQL at 127.0.0.1:1 does not answer. Start it, or check the setting database_url."


def test_parts_that_need_no_database_are_opened_before_it(data):
    ground = Components(Settings(data_dir=data))
    assert ground.instances.list() == []
    assert not data.exists()


def test_folder_lock_waits_for_its_holder(tmp_path):
    from thrave.files import locked_folder

    entered = threading.Event()

    def enter():
        with locked_folder(tmp_path):
            entered.set()

    with locked_folder(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.is_set()
    thread.join(TIMEOUT)
    assert entered.is_set()


def test_engine_of_a_library_refuses_the_services_database_after_a_change(begun):
    ended = []
    ground = Components(begun, replaced=ended.append)
    ground.open()
    library = sa.create_engine(begun.database)
    with library.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
    replace(begun.directory.database_file)
    with pytest.raises(DatabaseReplacedError), library.begin():
        pytest.fail("a transaction began")
    assert len(ended) == 1
    library.dispose()
    with pytest.raises(DatabaseReplacedError), library.connect():
        pytest.fail("a connection was made")
    ground.database.dispose()
