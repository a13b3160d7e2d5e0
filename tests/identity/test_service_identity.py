"""The service identity is created once, is private, and is never replaced."""

from concurrent.futures import ProcessPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from thrave.identity.certificates import (
    CERTIFICATE_FILE,
    PRIVATE_KEY_FILE,
    SIDE_KEY_FILE,
    ServiceIdentity,
    new_certificate,
)
from thrave.identity.errors import ServiceIdentityError

FILES = {CERTIFICATE_FILE, PRIVATE_KEY_FILE, SIDE_KEY_FILE}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "service"


def test_identity_is_created_once_and_loaded_afterwards(directory):
    first = ServiceIdentity.open_or_create(directory)
    second = ServiceIdentity.open_or_create(directory)
    assert first.certificate == second.certificate
    assert first.private_key.private_numbers() == second.private_key.private_numbers()
    assert first.side_key.private_bytes_raw() == second.side_key.private_bytes_raw()
    assert first.certificate.public_key() == first.private_key.public_key()
    assert isinstance(first.side_key, ed25519.Ed25519PrivateKey)


def test_identity_files_are_readable_by_owner_only(directory):
    ServiceIdentity.open_or_create(directory)
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(FILES, 0o600)
    assert directory.stat().st_mode & 0o777 == 0o700


def _fingerprint(directory):
    identity = ServiceIdentity.open_or_create(directory)
    return identity.certificate.fingerprint(identity.certificate.signature_hash_algorithm)


def test_processes_that_start_together_share_one_identity(directory):
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_fingerprint, [directory] * 8))) == 1


def test_missing_private_key_is_not_replaced(directory):
    ServiceIdentity.open_or_create(directory)
    (directory / PRIVATE_KEY_FILE).unlink()
    with pytest.raises(ServiceIdentityError, match=r"pk\.pem is missing"):
        ServiceIdentity.open_or_create(directory)
    assert not (directory / PRIVATE_KEY_FILE).exists()


def test_load_rejects_key_that_does_not_match_certificate(directory):
    ServiceIdentity.open_or_create(directory)
    (directory / PRIVATE_KEY_FILE).write_text(new_certificate("other")[1])
    with pytest.raises(ServiceIdentityError, match="do not belong together"):
        ServiceIdentity.open_or_create(directory)


@pytest.mark.parametrize("name", [PRIVATE_KEY_FILE, SIDE_KEY_FILE])
def test_load_rejects_key_file_readable_by_others(directory, name):
    ServiceIdentity.open_or_create(directory)
    (directory / name).chmod(0o644)
    with pytest.raises(ServiceIdentityError, match="chmod 600"):
        ServiceIdentity.open_or_create(directory)


@pytest.mark.parametrize("name", sorted(FILES))
def test_load_rejects_file_with_other_content(directory, name):
    ServiceIdentity.open_or_create(directory)
    (directory / name).write_text("something else")
    with pytest.raises(ServiceIdentityError, match="cannot be used"):
        ServiceIdentity.open_or_create(directory)


def test_repr_shows_no_key(directory):
    assert "private" not in repr(ServiceIdentity.open_or_create(directory)).lower()
