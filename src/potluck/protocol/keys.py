"""Ed25519 keys (RFC 8032) as raw 32 bytes, their fingerprints and signatures.

Guarantee: only the holder of a key's private half can make a signature by it. No signature for one
purpose serves another, since the signed bytes start with the name of their purpose.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

KEY_BYTES = 32


def new_key() -> bytes:
    """Returns a private key from the system's randomness. Only its owner should be able to read
    it."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


@lru_cache(maxsize=64)
def public_key(private_key: bytes) -> bytes:
    """Returns the public half."""
    return _private(private_key).public_key().public_bytes_raw()


def fingerprint(public_key: bytes) -> str:
    """Returns the id of a key's owner: the first 16 bytes of its SHA-256, in hex.

    A device's id follows from its key: nobody can choose the id of another.
    """
    return hashlib.sha256(_sized(public_key, "public_key")).hexdigest()[:32]


def sign_bytes(private_key: bytes, data: bytes) -> bytes:
    """Returns the 64 bytes of a signature."""
    return _private(private_key).sign(data)


def is_signature(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Returns whether `signature` is that of `data` by the owner of `public_key`."""
    try:
        Ed25519PublicKey.from_public_bytes(_sized(public_key, "public_key")).verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=64)  # reading one costs as much as signing with it
def _private(key: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_sized(key, "private_key"))


def _sized(key: bytes, name: str) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{name} must be {KEY_BYTES} raw bytes, got len({name})={len(key)}. "
            "Decode it from hex first."
        )
    return key
