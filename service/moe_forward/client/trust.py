"""Whom a client trusts, and what it shows of itself: API keys from files, and TLS."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import httpx

Verify = bool | str | os.PathLike[str] | ssl.SSLContext
Cert = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]


def read_api_key(path: str | os.PathLike[str]) -> str:
    """Return the first key of a file: KEY, or NAME:KEY as in the service's own api_keys_file.

    Raises: ValueError naming the file when it cannot be read or has none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"cannot read the API key of {os.fspath(path)}: {reason}") from None  # never show its bytes
    for line in text.splitlines():
        entry = line.strip()
        if entry and not entry.startswith("#"):
            name, colon, key = entry.partition(":")
            return key if colon else name
    raise ValueError(f"{os.fspath(path)} has no API key: expected a line with KEY or NAME:KEY")


def tls_settings(verify: Verify, cert: Cert | None) -> ssl.SSLContext | bool:
    """Return the `verify` of httpx, which does not take files any more.

    verify: True trusts the usual authorities; a file or folder of PEM certificates, or a context, trusts those; False
        trusts everybody, which lets whoever is in between read and change everything.
    cert: PEM file with the client's own certificate chain and key, or one file of each.
    Raises: ValueError naming the argument and the file.
    """
    if isinstance(verify, bool) and cert is None:
        return verify
    context = verify if isinstance(verify, ssl.SSLContext) else _trusting(verify)
    if cert is not None:
        files = (cert, None) if isinstance(cert, str | os.PathLike) else cert
        try:
            context.load_cert_chain(*files)
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(f"cert: {cert!r} is no PEM certificate with its key: {error}") from error
    return context


def _trusting(verify: bool | str | os.PathLike[str]) -> ssl.SSLContext:
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify)
    try:
        if Path(verify).is_dir():
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        raise ValueError(f"verify: {os.fspath(verify)} has no PEM certificates to trust: {error}") from error
