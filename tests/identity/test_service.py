"""The service's identity is made once, kept safe, and never quietly replaced."""

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


def test_the_identity_is_made_once_and_read_back(directory):
    first = ServiceIdentity.open_or_create(directory)
    second = ServiceIdentity.open_or_create(directory)
    assert first.certificate == second.certificate
    assert first.private_key.private_numbers() == second.private_key.private_numbers()
    assert first.side_key.private_bytes_raw() == second.side_key.private_bytes_raw()
    assert first.certificate.public_key() == first.private_key.public_key()
    assert isinstance(first.side_key, ed25519.Ed25519PrivateKey)


def test_its_files_are_for_the_owner_alone(directory):
    ServiceIdentity.open_or_create(directory)
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(FILES, 0o600)
    assert directory.stat().st_mode & 0o777 == 0o700


def _fingerprint(directory):
    identity = ServiceIdentity.open_or_create(directory)
    return identity.certificate.fingerprint(identity.certificate.signature_hash_algorithm)


def test_processes_that_make_it_at_the_same_time_share_one_identity(directory):
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_fingerprint, [directory] * 8))) == 1


def test_a_lost_private_key_is_not_replaced_by_a_new_one(directory):
    ServiceIdentity.open_or_create(directory)
    (directory / PRIVATE_KEY_FILE).unlink()
    with pytest.raises(ServiceIdentityError, match=r"pk\.pem is missing"):
        ServiceIdentity.open_or_create(directory)
    assert not (directory / PRIVATE_KEY_FILE).exists()


def test_a_key_that_does_not_fit_the_certificate_is_refused(directory):
    ServiceIdentity.open_or_create(directory)
    (directory / PRIVATE_KEY_FILE).write_text(new_certificate("other")[1])
    with pytest.raises(ServiceIdentityError, match="do not belong together"):
        ServiceIdentity.open_or_create(directory)


@pytest.mark.parametrize("name", [PRIVATE_KEY_FILE, SIDE_KEY_FILE])
def test_a_key_file_that_others_may_read_is_refused(directory, name):
    ServiceIdentity.open_or_create(directory)
    (directory / name).chmod(0o644)
    with pytest.raises(ServiceIdentityError, match="chmod 600"):
        ServiceIdentity.open_or_create(directory)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_with_something_else_in_it_is_refused(directory, name):
    ServiceIdentity.open_or_create(directory)
    (directory / name).write_text("something else")
    with pytest.raises(ServiceIdentityError, match="cannot be used"):
        ServiceIdentity.open_or_create(directory)


def test_its_repr_shows_no_key(directory):
    assert "private" not in repr(ServiceIdentity.open_or_create(directory)).lower()
