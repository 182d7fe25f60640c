"""Bytes of files at an address (https, s3, gs) through fsspec, with every way it can fail turned into a plain reason."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Optional
from urllib.parse import unquote, urlsplit, urlunsplit

from data.errors import InputError

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
SHOWN = ("https", "http", "s3", "gs")
BLOCK_BYTES = 1 << 20
RANGE_BYTES = 8 << 20  # of one request to a store that is not read as a stream
# Statuses that say "later": all others between 400 and 499 will not change by asking again.
LATER = frozenset({408, 416, 425, 429})


_inherited: list[Any] = []


class FetchError(Exception):
    """`reason` is safe to show: it holds no address and no text from the server. `lasting`: trying again cannot help.

    `passing`: it may be otherwise at the next start of a run, in minutes; unless given, when it is not lasting.
    """

    def __init__(self, reason: str, lasting: bool = False, passing: Optional[bool] = None) -> None:
        super().__init__(reason)
        self.reason, self.lasting = reason, lasting
        self.passing = not lasting if passing is None else passing


class Address:
    """The folder of a shard set at an address, with its credentials apart from what is shown. Safe to pickle."""

    def __init__(self, location: str, timeout_seconds: float) -> None:
        """Raises InputError for an unknown kind of address; what is wrong with it later is a FetchError."""
        try:
            parts = urlsplit(location)
            host = parts.hostname or ""
            host = f"[{host}]" if ":" in host else host
            netloc = (
                host + (f":{parts.port}" if parts.port else "") if parts.scheme.startswith("http") else parts.netloc
            )
        except ValueError:
            raise InputError("location: this is no address; write https://HOST/FOLDER or s3://BUCKET/FOLDER") from None
        if parts.scheme not in PACKAGES:
            raise InputError(
                f"location: {parts.scheme}:// is unknown; allowed are {', '.join(SHOWN)}, or a local folder"
            )
        netloc = netloc.rpartition("@")[2]
        self.scheme, self.query, self.timeout_seconds = parts.scheme, parts.query, timeout_seconds
        self.base = urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))
        self.headers = {"Accept-Encoding": "identity"}
        if parts.scheme.startswith("http") and parts.username is not None:
            # A header of each request and not of the session: aiohttp takes it off when it is sent to another host.
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Authorization"] = "Basic " + base64.b64encode(secret).decode()
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def where(self, name: str) -> str:
        """The address of a file as errors show it: without user, password and query."""
        return f"{self.base}/{name}" if name else self.base

    def stream(self, name: str, position: int, size: int) -> Iterator[bytes]:
        """The bytes of a file from `position` on, at most until `size` + 1 (one too many tells that it is too long).

        Raises FetchError; a stream that ends early just ends.
        """
        store = self._store()
        url = self.where(name) + (f"?{self.query}" if self.query else "")
        try:
            if self.scheme.startswith("http"):
                yield from self._http(store, url, position, size)
            else:
                yield from _ranges(store, url, position, size)
        except FetchError:
            raise
        except Exception as error:  # stores of all kinds raise what they like; nothing of it may end a run unexplained
            raise _fetch_error(error, self.timeout_seconds) from None

    def _http(self, store: Any, url: str, position: int, size: int) -> Iterator[bytes]:
        from fsspec.asyn import sync
        from fsspec.implementations.http import HTTPStreamFile

        headers = self.headers | ({"Range": f"bytes={position}-"} if position else {})
        session = sync(store.loop, store.set_session)
        response = HTTPStreamFile(store, url, loop=store.loop, session=session, headers=headers)
        try:
            skip = position if response.r.status != HTTPStatus.PARTIAL_CONTENT else 0  # a server may ignore the range
            if (
                position
                and not skip
                and not response.r.headers.get("Content-Range", "").startswith(f"bytes {position}-")
            ):
                raise FetchError("the server sent another range than it was asked for")
            left = size + 1 - position
            while left > 0:
                block = response.read(BLOCK_BYTES)
                if not block:
                    return
                dropped = min(skip, len(block))
                skip -= dropped
                block = block[dropped : dropped + left]
                left -= len(block)
                yield block
        finally:
            response.close()

    def _store(self) -> Any:
        """The fsspec file system of this process: its connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            # Letting go of a parent's would close its connections through a loop that does not run here.
            _inherited.append(self._opened)

            options: dict[str, Any] = {}
            if self.scheme.startswith("http"):
                try:
                    from aiohttp import ClientTimeout
                except ImportError as error:
                    raise _missing(self.scheme) from error

                wait = self.timeout_seconds
                timeout = ClientTimeout(total=None, connect=wait, sock_connect=wait, sock_read=wait)
                options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
                logging.getLogger("fsspec.http").setLevel(logging.INFO)  # below that it writes whole addresses
            elif self.scheme == "s3":
                wait = self.timeout_seconds
                options = {
                    "config_kwargs": {"connect_timeout": wait, "read_timeout": wait, "retries": {"max_attempts": 1}}
                }
            elif self.scheme in ("gs", "gcs"):
                options = {"timeout": self.timeout_seconds}
            try:
                store = fsspec.filesystem(self.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
            except ImportError as error:
                raise _missing(self.scheme) from error
            self._opened = os.getpid(), store
        return self._opened[1]


def _missing(scheme: str) -> InputError:
    package = PACKAGES[scheme]
    return InputError(
        f"location: {scheme}:// needs the package {package}, which is not installed: pip install {package}"
    )


def _ranges(store: Any, url: str, position: int, size: int) -> Iterator[bytes]:
    end = min(store.info(url)["size"], size + 1)
    while position < end:
        block = store.cat_file(url, start=position, end=min(position + RANGE_BYTES, end))
        if not block:
            return
        position += len(block)
        yield block


def _fetch_error(error: Exception, timeout_seconds: float) -> FetchError:
    """What an exception of a store means. Its own text is not shown: it may hold the address, keys, or what a server sent."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 300 <= status <= 599:
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        return FetchError(f"HTTP {status} {phrase}".strip(), lasting=status < 500 and status not in LATER)
    if isinstance(error, FileNotFoundError):
        return FetchError("there is no such file", lasting=True)
    if isinstance(error, PermissionError):
        return FetchError("access is denied: the credentials are missing or wrong", lasting=True)
    if isinstance(error, TimeoutError):  # of asyncio, aiohttp and fsspec alike
        return FetchError(f"no byte for {timeout_seconds:g} s")
    kind = type(error).__name__
    if "Certificate" in kind or "InvalidURL" in kind:
        return FetchError(
            "the certificate of the server is not valid" if "Cert" in kind else "no valid address", lasting=True
        )
    if "Credentials" in kind:
        return FetchError("no credentials were found for this store", lasting=True)
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:
        return FetchError(os.strerror(number))
    return FetchError(f"the connection broke ({kind})")
