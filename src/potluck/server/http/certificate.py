"""The server's certificate: its own, made at the first start and pinned by devices, or another's.

A certificate of our own is never renewed: a device pins the bytes whose SHA-256 came with its
invitation, whatever their authority, name or date. It is an ECDSA P-256 key, which every TLS
library takes. Guarantee: nobody without `tls.key` can intercept the traffic between a device and
the server.
"""

from __future__ import annotations

import datetime
import hashlib
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from potluck.core import RunError
from potluck.core.atomic_files import PRIVATE, write_whole

_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)  # a device's clock may be years behind
_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # "no expiry", RFC 5280


def ensure_certificate(certificate: Path, private_key: Path) -> None:
    """Makes a self-signed certificate, unless it is there."""
    if certificate.exists() and private_key.exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "potluck server")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("potluck.invalid")]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    write_whole(private_key, key.private_bytes(serialization.Encoding.PEM, form, plain), PRIVATE)
    write_whole(certificate, made.public_bytes(serialization.Encoding.PEM), PRIVATE)


def check_pair(certificate: Path, private_key: Path) -> None:
    """Refuses a certificate and a key that the server cannot use.

    Raises:
        RunError: they do not belong together, or are none.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key, _no_word)
    except FileNotFoundError:
        raise RunError(f"the private key must be a file, got {str(private_key)!r}.") from None
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or str(error)
        raise RunError(
            f"{private_key} must hold the private key of {certificate}, in PEM and without a "
            f"password, got {reason!r}. Name the two that belong together."
        ) from None


def certificate_names(certificate: Path) -> set[str]:
    """Returns the hosts that a certificate is for, in lower case; `*.` stands for one label."""
    found = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
    try:
        names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = names.get_values_for_type(x509.IPAddress)
    return {n.lower() for n in names.get_values_for_type(x509.DNSName)} | set(map(str, addresses))


def _no_word() -> str:
    raise ValueError("a password")  # or OpenSSL would ask for one at the terminal


def certificate_fingerprint(certificate: Path) -> str:
    """Returns the SHA-256 of the first certificate of a PEM file, as DER, in hex.

    Raises:
        RunError: there is none.
    """
    try:
        text = certificate.read_text()
        end = "-----END CERTIFICATE-----"
        der = ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN") : text.index(end) + len(end)])
    except OSError as error:
        raise RunError(f"{certificate} must be readable, got {error.strerror!r}.") from None
    except ValueError:
        raise RunError(f"{certificate} must hold a certificate in PEM, got none.") from None
    return hashlib.sha256(der).hexdigest()
