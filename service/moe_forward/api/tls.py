"""TLS of the HTTP port: one context for uvicorn, whose certificates follow their files without a restart."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_forward.api.watched import Watched
from moe_forward.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. certificate: chain, the server's own first. key: not encrypted. client_ca: None asks nobody."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


def load(files: TlsFiles) -> ssl.SSLContext:
    """Make the context of a server: TLS 1.2 or newer, clients' certificates required where `client_ca` is given.

    Raises: ConfigError naming the file and what is wrong with it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_chain(context, files.certificate, files.key)
    if files.client_ca is not None:
        _require_clients(context, files.client_ca)
    return context


class LiveContext(ssl.SSLContext):
    """A context whose every new connection has the certificates that the files hold now.

    `load_cert_chain` on a living context would renew the server's certificate only: trust once given to a client CA
    cannot be taken back from it. So each change makes a new context, and connections are handed to the newest. Files
    that do not fit together, as in the middle of a renewal, are logged and leave the context as it is.

    files: what to follow. clock: seconds.
    Raises: ConfigError when the files cannot be used at the start.
    """

    _files: TlsFiles
    _watched: Watched
    _current: ssl.SSLContext

    def __new__(cls, files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> LiveContext:
        """ssl.SSLContext takes its protocol here."""
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        self._files = files
        self._watched = Watched([path for path in (files.certificate, files.key, files.client_ca) if path], clock)
        self._current = load(files)
        return self

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> None:
        """Leave what `__new__` made: ssl.SSLContext has nothing to do here."""

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """Start a connection, as asyncio and uvloop do for each."""
        self._renew()
        return self._current.wrap_bio(*arguments, **options)

    def _renew(self) -> None:
        if not self._watched.changed():
            return
        try:
            self._current = load(self._files)
        except ConfigError as error:
            log.error("%s; new connections get the certificate from before", error)
        else:
            log.info("tls_certificate_file %s: read again", self._files.certificate)


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _check_pem("tls_certificate_file", certificate, "BEGIN CERTIFICATE")
    _check_pem("tls_key_file", key, "PRIVATE KEY")
    try:
        context.load_cert_chain(certificate, key, lambda: _refuse_password(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls_key_file {key} is not the key of {certificate}") from error
        raise ConfigError(f"tls_certificate_file {certificate} with tls_key_file {key}: {error}") from error


def _require_clients(context: ssl.SSLContext, client_ca: Path) -> None:
    _check_pem("tls_client_ca_file", client_ca, "BEGIN CERTIFICATE")
    try:
        context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise ConfigError(f"tls_client_ca_file {client_ca}: {error}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _check_pem(name: str, path: Path, block: str) -> None:
    """Say what OpenSSL leaves out: which of the files it is."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} {path}: {error.strerror}") from error
    if f"{block}-----".encode() not in text:
        raise ConfigError(f"{name} {path}: expected PEM with {block}, found none")


def _refuse_password(path: Path) -> str:
    raise ConfigError(f"tls_key_file {path} is encrypted: expected a key without a password")
