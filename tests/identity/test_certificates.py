"""Accepted certificates and private keys, and new ones."""

import contextlib
import datetime as dt
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from thrave.identity.certificates import load_certificate, load_private_key, new_certificate
from thrave.identity.errors import MalformedCertificate, MalformedPrivateKey

PEM = serialization.Encoding.PEM
PKCS1 = serialization.PrivateFormat.TraditionalOpenSSL
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()


def _rsa_key(bits):
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def _certificate(key, common_name="alice"):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    long_ago = dt.datetime(2006, 1, 1, tzinfo=dt.UTC)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, long_ago, long_ago + dt.timedelta(days=365))
    return builder.sign(key, algorithm).public_bytes(PEM)


def test_new_certificate_matches_its_key_and_is_rsa_2048():
    certificate_pem, key_pem = new_certificate("alice")
    certificate, key = load_certificate(certificate_pem), load_private_key(key_pem)
    assert certificate.public_key() == key.public_key()
    assert key.key_size == 2048
    assert certificate.subject.rfc4514_string() == "CN=alice"


def test_openssl_verifies_new_self_signed_certificate(tmp_path):
    certificate = tmp_path / "cert.pem"
    certificate.write_text(new_certificate("alice")[0])
    verify = ["openssl", "verify", "-CAfile", certificate, certificate]
    assert subprocess.run(verify, capture_output=True, check=True, text=True).stdout.endswith("OK\n")


@pytest.mark.parametrize("bits", [1024, 2048, 4096])
def test_load_accepts_old_new_and_expired_rsa_certificates(bits):
    key = _rsa_key(bits)
    assert load_certificate(_certificate(key)).public_key() == key.public_key()


@pytest.mark.parametrize("form", [PKCS1, PKCS8])
def test_load_private_key_accepts_pkcs1_and_pkcs8(form):
    key = _rsa_key(1024)
    assert load_private_key(key.private_bytes(PEM, form, PLAIN)).private_numbers() == key.private_numbers()


OTHER_KEYS = [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()]


@pytest.mark.parametrize("key", OTHER_KEYS, ids=["ECDSA", "Ed25519"])
def test_load_rejects_key_that_is_not_rsa(key):
    with pytest.raises(MalformedCertificate, match="not RSA"):
        load_certificate(_certificate(key))
    with pytest.raises(MalformedPrivateKey, match="not RSA"):
        load_private_key(key.private_bytes(PEM, PKCS8, PLAIN))


def test_load_rejects_key_below_1024_bits():
    words = "req -x509 -newkey rsa:512 -nodes -subj /CN=short -keyout - -outform PEM"
    pem = subprocess.run(["openssl", *words.split()], capture_output=True, check=True).stdout
    with pytest.raises(MalformedPrivateKey, match="512 bits; it must have 1024 to 16384"):
        load_private_key(pem)
    with pytest.raises(MalformedCertificate, match="512 bits; it must have 1024 to 16384"):
        load_certificate(pem)


def test_load_private_key_error_says_how_to_remove_a_passphrase():
    locked = _rsa_key(1024).private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"passphrase"))
    with pytest.raises(MalformedPrivateKey, match="openssl pkey"):
        load_private_key(locked)


NOT_PEM = ["", "hello", "-----BEGIN CERTIFICATE-----", "\0", "ä" * 10, "x" * 1_000_000]


@pytest.mark.parametrize("pem", NOT_PEM, ids=range(len(NOT_PEM)))
def test_load_rejects_text_that_is_not_pem(pem):
    with pytest.raises(MalformedCertificate):
        load_certificate(pem)
    with pytest.raises(MalformedPrivateKey):
        load_private_key(pem)


def test_load_distinguishes_certificate_and_private_key():
    certificate, key = new_certificate("alice")
    with pytest.raises(MalformedCertificate):
        load_certificate(key)
    with pytest.raises(MalformedPrivateKey):
        load_private_key(certificate)


@pytest.mark.filterwarnings("ignore")  # cryptography warns of defects that it accepts
@given(position=st.integers(0, 600), value=st.characters(codec="ascii"))
def test_load_damaged_certificate_raises_only_malformed_certificate(damaged, position, value):
    pem = damaged[:position] + value + damaged[position + 1 :]
    with contextlib.suppress(MalformedCertificate):
        load_certificate(pem)


@pytest.fixture(scope="module")
def damaged():
    return new_certificate("alice")[0]
