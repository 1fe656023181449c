"""The key of hashes that a stranger mustn't compute."""

import hashlib
from dataclasses import dataclass

from beam_pipelines.model.secret import MissingSecret, Secret

MIN_KEY_BYTES = 16


@dataclass(frozen=True)
class HashKey:
    """A key of hashes, named by where it is kept.

    What it decides lies in state and in stores, so all processes, now and after a restart,
    need the same one. It travels as a reference with a fingerprint: each process resolves
    the one and checks the other.

    Args:
      secret: Where the key is found.
      fingerprint: 8 hex digits that tell it from other keys, and don't lead back to it.
    """

    secret: Secret
    fingerprint: str

    @classmethod
    def look_up(cls, reference: str) -> "HashKey":
        """Look at the key in this process.

        Args:
          reference: env:NAME or file:PATH.

        Raises:
          MissingSecret: there is no key.
          ValueError: the reference is none, or the key is shorter than 16 bytes.
        """
        secret = Secret(reference)
        return cls(secret, _fingerprint(_derived(secret)))

    def resolve(self) -> bytes:
        """Return 32 bytes made of the key.

        Raises:
          MissingSecret: the key isn't in this process, or is another one.
          ValueError: it is too short.
        """
        key = _derived(self.secret)
        if _fingerprint(key) != self.fingerprint:
            raise MissingSecret(
                f"{self.secret.reference} holds a key of fingerprint {_fingerprint(key)} in this "
                f"process, and the pipeline was started with {self.fingerprint}: give all of them "
                "the same key"
            )
        return key


def key_of(hash_key: HashKey | None) -> bytes:
    """Return the bytes of a key, or none of no key."""
    return b"" if hash_key is None else hash_key.resolve()


def _derived(secret: Secret) -> bytes:
    text = secret.resolve().encode()
    if len(text) < MIN_KEY_BYTES:
        raise ValueError(
            f"the key in {secret.reference} has {len(text)} bytes, fewer than {MIN_KEY_BYTES}: a "
            "short one can be guessed. Make one with: openssl rand -hex 32"
        )
    return hashlib.blake2b(text, digest_size=32, person=b"hash_key").digest()


def _fingerprint(key: bytes) -> str:
    return hashlib.blake2b(b"fingerprint", digest_size=4, key=key).hexdigest()
