"""Secrets by reference: where a worker finds one, never what it is."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


class MissingSecret(LookupError):  # noqa: N818 (no fault of ours, so not an Error)
    """A secret is not where its reference says, on the machine that needs it."""


@dataclass(frozen=True)
class Secret:
    """A password, or a URL that holds one, named by where it is kept.

    Pipeline options are visible to anyone who sees the runner's dashboard. So they carry
    the reference, and the worker resolves it when it opens a connection.

    Args:
      reference: `env:NAME`, an environment variable, or `file:PATH`, a mounted file.

    Raises:
      ValueError: the reference is neither. It isn't shown: it may be the secret itself.

    Example:
      >>> Secret("env:ACTIVITY_DATABASE_URL")
      Secret(reference='env:ACTIVITY_DATABASE_URL')
    """

    reference: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"env:[A-Za-z_]\w*|file:[^\0]+", self.reference, re.ASCII):
            raise ValueError(
                "a secret is given as env:NAME or file:PATH, the environment variable or file "
                "that holds it; this is neither, and not shown, as it may be the secret itself"
            )

    def resolve(self) -> str:
        """Return the secret; a file's without the newline at its end.

        Raises:
          MissingSecret: the variable or file isn't there, can't be read, or is empty.
        """
        kind, _, name = self.reference.partition(":")
        secret = self._variable(name) if kind == "env" else self._file(name)
        if not secret:
            raise MissingSecret(f"the secret {self.reference} is empty")
        return secret

    def _variable(self, name: str) -> str:
        try:
            return os.environ[name]
        except KeyError:
            raise MissingSecret(
                f"the environment variable {name} is not set in this process: set it, exported, "
                "where the pipeline is started and on every worker"
            ) from None

    def _file(self, path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except OSError as error:
            raise MissingSecret(
                f"the secret file {path} can't be read ({error.strerror}): mount it where the "
                "pipeline is started and on every worker"
            ) from error
        except UnicodeDecodeError:  # its message would show some of the bytes
            raise MissingSecret(f"the secret file {path} is not UTF-8 text") from None
