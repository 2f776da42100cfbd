"""One HTTP request: through proxies and redirects, its answer checked, its body as it arrives."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from sr_dist import __version__
from sr_dist.errors import UserError

# Stores often serve pictures as bytes of no stated kind; decoding then tells.
PICTURES = ("image/", "application/octet-stream", "binary/octet-stream")
ARCHIVES = ("application/", "binary/")
JSON = ("application/json",)
USER_AGENT = f"sr_dist/{__version__} (gathers pictures for training super-resolution)"
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_BUSY = (429, 503)  # meant for all that is asked of the host
_MOVED = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10


@dataclasses.dataclass(frozen=True)
class Options:
    workers: int = 8  # requests at once
    per_host: int = 4  # of them, to one host
    attempts: int = 5  # that bring a file no further
    timeout: float = 30.0  # seconds to connect, and from one piece of an answer to the next
    backoff: float = 1.0  # seconds before the second attempt; doubles with each
    longest_wait: float = 600.0  # seconds that a host may ask to be left alone
    least_rate: float = 1000.0  # bytes per second
    max_bytes: int = 200 * 10**6  # of one file
    media_types: tuple[str, ...] = PICTURES


class Fault(Exception):
    """Why something could not be had; `reason` goes without the address.

    `passing`: another attempt may succeed. `wait`: seconds that the server asks for before it.
    `busy`: it concerns all that is asked of the host. `unreachable`: there was no answer at all.
    """

    def __init__(
        self,
        reason: str,
        *,
        passing: bool = False,
        status: int = 0,
        wait: float | None = None,
        unreachable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        self.status = status
        self.wait = wait
        self.busy = status in _BUSY
        self.unreachable = unreachable


def problem_of(address: str) -> str:
    """What is wrong with an address, or nothing: only http and https are fetched."""
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname
        _ = parts.port  # raises as well
    except ValueError as error:
        return f"is no address ({error})"
    if parts.scheme not in ("http", "https"):
        kind = f"{parts.scheme}: addresses are refused" if parts.scheme else "is no address"
        return f"{kind}; expected http:// or https://"
    return "" if host else "names no host"


def pieces(response: Any, options: Options) -> Iterator[bytes]:
    """The body of an answer as it arrives.

    Raises:
        Fault: it breaks off, stalls, or is slower than `options.least_rate`.
    """
    exceptions = _library().exceptions
    began, size = time.monotonic(), 0
    while True:
        try:
            piece: bytes = response.read1(2**16, decode_content=False)
        except exceptions.TimeoutError:
            raise Fault(f"sent nothing for {options.timeout:g} s", passing=True) from None
        except (exceptions.HTTPError, OSError) as error:
            raise Fault(f"broke off ({_short(error)})", passing=True) from None
        if not piece:
            return
        size += len(piece)
        elapsed = time.monotonic() - began
        if elapsed > options.timeout and size < options.least_rate * elapsed:
            raise Fault(f"sends less than {options.least_rate:g} bytes/s", passing=True)
        yield piece


def _short(error: BaseException) -> str:
    """What an exception of urllib3 says, without the connection it starts with."""
    cause = error.args[-1] if error.args else ""
    text = re.sub(r"^\w+\(host=.*?\): ", "", str(cause))
    return text or type(error).__name__


def _proxy_of(address: str) -> str:
    """The proxy that http_proxy, https_proxy and no_proxy ask for, or nothing."""
    parts = urllib.parse.urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _library() -> Any:
    try:
        import urllib3
    except ImportError:
        raise UserError(
            "downloading needs the package urllib3, which is not installed: "
            "pip install 'sr_dist[sources]'"
        ) from None
    return urllib3


class Client:
    """Connections that are kept and that threads share.

    Raises:
        UserError: urllib3 is not installed.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._urllib3 = _library()
        self._managers: dict[str, Any] = {}  # by proxy
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def ask(
        self, address: str, headers: Mapping[str, str], redirects: int = _MOST_REDIRECTS
    ) -> Iterator[Any]:
        """The answer to a GET, open for `pieces`; its status is 200, 206 or 416.

        Raises:
            Fault: no answer, another status, a media type that is not wanted, a compressed body, or
                more than `redirects` redirects.
        """
        response = self._follow(address, headers, redirects)
        try:
            self._check(response)
            yield response
        finally:
            response.close()  # one that was read to its end has given its connection back before

    def _follow(self, address: str, headers: Mapping[str, str], redirects: int) -> Any:
        for _ in range(redirects + 1):
            response = self._get(address, headers)
            target = response.headers.get("Location")
            if response.status not in _MOVED or not target:
                return response
            response.close()
            try:
                address = urllib.parse.urljoin(address, target)
            except ValueError:
                address = target
            if problem := problem_of(address):
                raise Fault(f"leads to {target!r}: {problem}")
        if redirects:
            raise Fault(f"leads on and on: more than {redirects} redirects")
        raise Fault(f"leads to {target!r}; it is not followed there", status=response.status)

    def _get(self, address: str, headers: Mapping[str, str]) -> Any:
        exceptions = self._urllib3.exceptions
        # Of a compressed body, length and parts would be those of the compressed bytes.
        sent = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
        try:
            return self._manager(address).request(
                "GET", address, headers=sent, preload_content=False, redirect=False, retries=False
            )
        except exceptions.SSLError as error:
            lasting = "CERTIFICATE" in str(error).upper()
            raise Fault(f"has no sound TLS ({_short(error)})", passing=not lasting) from None
        except exceptions.NewConnectionError as error:  # a kind of TimeoutError
            reason = f"cannot be reached ({_short(error)})"
            raise Fault(reason, passing=True, unreachable=True) from None
        except exceptions.TimeoutError:
            reason = f"gave no answer for {self._options.timeout:g} s"
            raise Fault(reason, passing=True, unreachable=True) from None
        except ValueError:  # of urllib3, of an encoding, of a header
            raise Fault("is no address that can be asked") from None
        except (exceptions.HTTPError, OSError) as error:
            reason = f"broke off before an answer ({_short(error)})"
            raise Fault(reason, passing=True, unreachable=True) from None

    def _check(self, response: Any) -> None:
        status = int(response.status)
        if status == 416:
            return
        if status not in (200, 206):
            reason = f"answers with status {status} {response.reason or ''}".rstrip()
            wait = self._wait_asked(response)
            raise Fault(reason, passing=status in _PASSING, status=status, wait=wait)
        # Owners say so where they do not want what they show to be trained on.
        if re.search(r"\bno(image)?ai\b", response.headers.get("X-Robots-Tag", "").lower()):
            raise Fault("asks not to be used for training (X-Robots-Tag)")
        found = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if found and not found.startswith(self._options.media_types):
            wanted = " or ".join(self._options.media_types)
            raise Fault(f"is of type {found}; expected {wanted}")
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise Fault(f"is sent compressed ({encoding}), which was not asked for")

    def _wait_asked(self, response: Any) -> float | None:
        try:
            wait = self._urllib3.Retry().get_retry_after(response)
        except self._urllib3.exceptions.InvalidHeader:
            return None
        return None if wait is None else float(wait)

    def _manager(self, address: str) -> Any:
        proxy = _proxy_of(address)
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._connect(proxy)
            return self._managers[proxy]

    def _connect(self, proxy: str) -> Any:
        timeout = self._urllib3.Timeout(connect=self._options.timeout, read=self._options.timeout)
        settings = {"num_pools": 32, "maxsize": self._options.per_host, "timeout": timeout}
        if not proxy:
            return self._urllib3.PoolManager(**settings)
        user = self._urllib3.util.parse_url(proxy).auth
        sent = self._urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(user or "") or None)
        return self._urllib3.ProxyManager(proxy, proxy_headers=sent, **settings)
