"""The API server: pods, the exec websocket, the watch, access reviews. Its errors become ours here.

The only module that knows ``kubernetes_asyncio``, of which configuration and credentials are used: its generated models
cost 35 MiB and drop fields newer than they are, and its websocket client loses the Status and the body of a refusal.
"""

import asyncio
import asyncio.sslproto
import contextlib
import importlib.util
import json
import os
import re
import socket
import ssl
import sys
import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from session_proxy import remotecommand
from session_proxy.errors import (
    ConfigError,
    ExecStartError,
    KubeError,
    KubeForbiddenError,
    KubeNotFoundError,
    KubeTimeoutError,
    KubeUnauthorizedError,
    KubeUnavailableError,
)
from session_proxy.workspace import Pod, Target

REQUEST_SECONDS = 10.0
"""For one answer of the API server, connecting included."""

UPGRADE_SECONDS = 20.0
"""For the upgrade: the API server answers once the kubelet and the runtime have."""

CLOSE_SECONDS = 1.0
"""For the websocket's closing handshake, which has no end of its own while data keeps arriving."""

RETRY_SECONDS = 2.0
"""``Retry-After`` when the API server is away."""

TLS_CLOSE_SECONDS = 0.1
"""For TLS connections to say goodbye when the client is closed."""

MAX_RESPONSE_BYTES = 16 << 20
"""Largest answer read; etcd objects end at 1.5 MiB, and lists are asked for in small pages."""

MAX_ERROR_BYTES = 65_536
"""How much of a refused upgrade's body is read."""

MAX_MESSAGE_BYTES = 1 << 20
"""Largest websocket message; the API server sends at most 32 KiB and a byte."""

RECEIVE_BUFFER_BYTES = 262_144
"""The kernel's buffer of one connection to the API server (Linux doubles it). A smaller one shuts the TCP window after
every read, and then both ends wake up for each piece."""

LIST_LIMIT = 20
"""Pods a page: one is expected, and some that are terminating."""

LIST_PAGES = 10
"""Pages read, since a second live pod may be on any of them."""

WATCH_SECONDS = 300
"""After which the API server ends a watch and it is begun anew."""

READ_AHEAD_BYTES = 65_536
"""aiohttp stops reading an exec connection that has twice as much unread; half a megabyte a stream would be its own
choice. It has no setting for this, so the constant of its websocket client is set; the memory tests notice if that
ever stops to work."""

aiohttp.client.DEFAULT_CHUNK_SIZE = READ_AHEAD_BYTES  # type: ignore[attr-defined]

TLS_READ_BYTES = 131_072
"""The most that one read from a TLS connection brings in, and what asyncio allocates for each 16 KiB record in it.
Its own choice, twice that, costs every stalled stream more and makes malloc fault pages in anew with every read. There
is no setting for this either."""

asyncio.sslproto.SSLProtocol.max_size = TLS_READ_BYTES

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

CallObserver = Callable[[str, str, int, float], None]
"""Is told of each call: verb, resource, HTTP status (0: none came), seconds."""


def _import_config() -> types.ModuleType:
    """Import kubernetes_asyncio.config without the generated client, which would double the sidecar's memory.

    The package's own ``__init__`` files import everything; empty stand-ins for these two let the submodules that hold
    configuration and credentials be imported as they are.
    """
    if "kubernetes_asyncio" not in sys.modules:
        spec = importlib.util.find_spec("kubernetes_asyncio")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("kubernetes_asyncio is not installed")
        root = Path(next(iter(spec.submodule_search_locations)))
        for name, path in (("kubernetes_asyncio", root), ("kubernetes_asyncio.client", root / "client")):
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
        configuration = importlib.import_module("kubernetes_asyncio.client.configuration")
        client: Any = sys.modules["kubernetes_asyncio.client"]
        client.Configuration = configuration.Configuration
        client.ApiClient = None  # named by annotations and helpers that are not used
    return importlib.import_module("kubernetes_asyncio.config")


@dataclass(slots=True)
class Credentials:
    """Where the API server is and how to speak to it. ``reload`` reads everything again, the token above all."""

    configuration: Any
    namespace: str | None
    reload: Callable[[], Awaitable[None]]


async def load_credentials(environ: Mapping[str, str]) -> Credentials:
    """In-cluster when KUBERNETES_SERVICE_HOST is set, else the file KUBECONFIG (or ~/.kube/config).

    Raises ConfigError.
    """
    config = _import_config()
    configuration = sys.modules["kubernetes_asyncio.client"].Configuration()
    namespace: str | None = None
    if environ.get("KUBERNETES_SERVICE_HOST"):

        async def load() -> None:
            config.load_incluster_config(client_configuration=configuration)

        where = "the service account's files"
        namespace = _own_namespace()
    else:
        path = environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")  # noqa: ASYNC240, PTH111 (once, at start)

        async def load() -> None:
            await config.load_kube_config(config_file=path, client_configuration=configuration)

        where = f"KUBECONFIG ({path})"
        with contextlib.suppress(Exception):
            _, context = config.list_kube_config_contexts(config_file=path)
            namespace = context["context"].get("namespace")
    try:
        await load()
    except Exception as error:
        raise ConfigError([f"{where} cannot be used: {type(error).__name__}: {error}"]) from error
    return Credentials(configuration, namespace, load)


def _own_namespace() -> str | None:
    try:
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


class _UpgradeRefusedError(Exception):
    """The answer to an upgrade was not 101."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class _UpgradeBrokenError(aiohttp.ClientError):
    """The connection broke after the upgrade was sent."""


async def _keep_refusal(
    request: aiohttp.ClientRequest, handler: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
) -> aiohttp.ClientResponse:
    """Client middleware: read the body of a refused upgrade, which aiohttp's own error leaves out."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return await handler(request)
    try:
        response = await handler(request)
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise  # it never left
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        # aiohttp sends a GET again when the connection broke, and this one may have started a command.
        raise _UpgradeBrokenError(f"{type(error).__name__}: {error}") from error
    if response.status != 101:  # noqa: PLR2004
        body = await _read_up_to(response, MAX_ERROR_BYTES)
        response.close()
        raise _UpgradeRefusedError(response.status, body)
    return response


async def _read_up_to(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read the body, however many pieces it comes in, as far as the limit."""
    data = bytearray()
    while len(data) < limit and (more := await response.content.read(limit - len(data))):
        data += more
    return bytes(data)


class KubeClient:
    """One connection pool to one API server; REST and websocket share it, so that an exec reuses a kept connection."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        namespace: str,
        selector: str | None = None,
        pod: str | None = None,
        on_call: CallObserver = lambda *_: None,
    ) -> None:
        self.namespace = namespace
        self._credentials = credentials
        self._selector = selector
        self._pod = pod
        self._on_call = on_call
        configuration = credentials.configuration
        self._base = URL(str(configuration.host).rstrip("/"), encoded=True)
        self._tls_name: str | None = configuration.tls_server_name
        self._proxy: str | None = configuration.proxy
        self._session = aiohttp.ClientSession(
            # No limit: slots bound the execs, and a kill must never wait for a connection.
            connector=aiohttp.TCPConnector(
                limit=0, ssl=_tls(configuration), keepalive_timeout=60, socket_factory=_socket
            ),
            middlewares=(_keep_refusal,),
            headers={"User-Agent": "session-proxy"},
            # No trust_env: it would send REST and websocket through different proxy variables.
            trust_env=False,
            auto_decompress=True,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
        # aiohttp returns before the TLS transports have ended (its documentation, "Graceful shutdown").
        await asyncio.sleep(TLS_CLOSE_SECONDS)

    # --- pods -----------------------------------------------------------------------------------------------------

    async def find_pods(self) -> Sequence[Pod]:
        """Return the pods that the selector matches, or the one pod named, as they are now."""
        if self._pod is not None:
            try:
                return [await self.read_pod(self._pod)]
            except KubeNotFoundError:
                return []
        query = {"labelSelector": self._selector or "", "limit": str(LIST_LIMIT)}
        found: list[Pod] = []
        for _ in range(LIST_PAGES):
            answer = await self._json("GET", self._pods(), query, verb="list", resource="pods")
            items, metadata = answer.get("items"), answer.get("metadata")
            # A list leaves out what each item is.
            found += [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
            more = metadata.get("continue") if isinstance(metadata, dict) else None
            if not more:
                return found
            query["continue"] = str(more)
        raise KubeUnavailableError(f"more than {LIST_LIMIT * LIST_PAGES} pods match", retry_after=RETRY_SECONDS)

    async def read_pod(self, name: str) -> Pod:
        """Return one pod as it is now. Raises KubeNotFoundError."""
        return await self._json("GET", self._pods(name), {}, verb="get", resource="pods")

    async def watch_pod(self, name: str) -> AsyncGenerator[Pod | None, None]:
        """Yield the pod as it is now and at each change, None when it is gone, until the connection ends."""
        try:
            pod = await self.read_pod(name)
        except KubeNotFoundError:
            yield None
            return
        yield pod
        metadata = pod.get("metadata")
        version = metadata.get("resourceVersion", "") if isinstance(metadata, dict) else ""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": str(version),
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        timeout = aiohttp.ClientTimeout(sock_connect=REQUEST_SECONDS, sock_read=WATCH_SECONDS + REQUEST_SECONDS)
        async with self._request("GET", self._pods(), query, "watch", "pods", timeout=timeout) as response:
            async for event in _watch_events(response):
                match event.get("type"):
                    case "ADDED" | "MODIFIED" if isinstance(event.get("object"), dict):
                        yield event["object"]
                    case "DELETED":
                        yield None
                    case "ERROR":
                        return  # most likely 410: begin anew with a fresh read

    async def can_i(self, verb: str, subresource: str = "") -> bool:
        """Ask whether RBAC allows ``verb`` on pods (or a subresource of them) in the namespace."""
        attributes = {"namespace": self.namespace, "verb": verb, "group": "", "resource": "pods"}
        if subresource:
            attributes["subresource"] = subresource
        if self._pod is not None:
            attributes["name"] = self._pod  # the watch names it in its field selector
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = await self._json("POST", path, {}, verb="create", resource="selfsubjectaccessreviews", body=body)
        status = answer.get("status")
        return isinstance(status, dict) and status.get("allowed") is True

    # --- any object -----------------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, Mapping[str, Any]]:
        """Return HTTP status and object (or Status) of what the API server answers, in at most REQUEST_SECONDS.

        A 401 reads the token again, once. Raises KubeError when there is no answer, none in JSON, or a second 401.
        """
        request = f"{method} {path}"
        data = None if body is None else json.dumps(body).encode()
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                status, answer = await self._exchange(method, path, query or {}, data, content_type)
                if status == 401:  # noqa: PLR2004 (answered before anything was done)
                    await self._reload()
                    status, answer = await self._exchange(method, path, query or {}, data, content_type)
        except TimeoutError:
            raise KubeTimeoutError(f"the API server did not answer {request} in {REQUEST_SECONDS:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise _unreachable(error) from None
        if status == 401:  # noqa: PLR2004
            raise KubeUnauthorizedError("the API server does not accept the credential, also not read anew")
        try:
            decoded = json.loads(answer)
        except (ValueError, RecursionError):
            decoded = None
        if not isinstance(decoded, dict):
            raise KubeUnavailableError(f"the API server answered {request} with HTTP {status} and no JSON object")
        return status, decoded

    async def _exchange(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None, content_type: str
    ) -> tuple[int, bytes]:
        async with self._session.request(
            method,
            self._url(path, query),
            data=data,
            headers={"Accept": "application/json", "Content-Type": content_type, **await self._headers()},
            allow_redirects=False,
            server_hostname=self._tls_name,
            proxy=self._proxy,
        ) as response:
            answer = await _read_up_to(response, MAX_RESPONSE_BYTES + 1)
            if len(answer) > MAX_RESPONSE_BYTES:
                raise KubeUnavailableError(f"the answer to {method} {path} is over {MAX_RESPONSE_BYTES} bytes")
            return response.status, answer

    # --- exec -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open_exec(
        self, target: Target, argv: Sequence[str], *, stdin: bool, half_close: bool = False
    ) -> AsyncIterator["WebSocketStream"]:
        """Open a pods/exec websocket; leaving the context closes it in bounded time.

        Raises KubeError, and ExecStartError when the container cannot be exec'd into.
        """
        query = [
            ("container", target.container),
            ("stdin", "true" if stdin else "false"),
            ("stdout", "true"),
            ("stderr", "true"),
            ("tty", "false"),
            *(("command", argument) for argument in argv),
        ]
        subprotocols = (remotecommand.V5,) if half_close else remotecommand.SUBPROTOCOLS
        stream = await self._upgrade(self._pods(target.pod, "exec"), query, subprotocols)
        try:
            yield stream
        finally:
            await stream.close()

    async def _upgrade(self, path: str, query: list[tuple[str, str]], subprotocols: Sequence[str]) -> "WebSocketStream":
        url = self._url(path, query)
        started = time.monotonic()
        status = 0
        try:
            async with asyncio.timeout(UPGRADE_SECONDS):
                for attempt in (1, 2):
                    try:
                        websocket = await self._session.ws_connect(
                            url,
                            protocols=subprotocols,
                            headers=await self._headers(),
                            server_hostname=self._tls_name,
                            proxy=self._proxy,
                            autoping=False,
                            autoclose=False,
                            max_msg_size=MAX_MESSAGE_BYTES,
                            decode_text=False,
                        )
                    except _UpgradeRefusedError as refusal:
                        status = refusal.status
                        # A 401 is answered before anything could run, so this one thing is tried again.
                        if status != 401 or attempt == 2:  # noqa: PLR2004
                            raise _upgrade_error(refusal, subprotocols) from None
                        await self._reload()
                    else:
                        status = 101
                        break
        except TimeoutError:
            raise KubeTimeoutError(f"the API server did not answer the exec upgrade in {UPGRADE_SECONDS:g} s") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise _unreachable(error) from None
        finally:
            self._on_call("get", "pods/exec", status, time.monotonic() - started)
        if websocket.protocol not in subprotocols:
            await WebSocketStream(websocket, "").close()
            raise KubeUnavailableError(
                f"the API server chose none of {', '.join(subprotocols)}", retry_after=RETRY_SECONDS
            )
        return WebSocketStream(websocket, websocket.protocol or "")

    # --- requests -------------------------------------------------------------------------------------------------

    def _pods(self, name: str = "", subresource: str = "") -> str:
        parts = ["/api/v1/namespaces", self.namespace, "pods", *(part for part in (name, subresource) if part)]
        return "/".join(parts)

    def _url(self, path: str, query: Mapping[str, str] | Sequence[tuple[str, str]]) -> URL:
        return URL(f"{self._base}{path}", encoded=True).with_query(query)

    async def _headers(self) -> dict[str, str]:
        configuration = self._credentials.configuration
        try:
            token = await configuration.get_api_key_with_prefix("BearerToken")
        except Exception:  # noqa: BLE001 (a file that is not there, or empty; a plugin of a kubeconfig that fails)
            # It was time to read it again, and it cannot be: the last one may still do, and if not, a 401 says so.
            token = configuration.api_key.get("BearerToken")
        return {"Authorization": token.strip()} if token else {}

    async def _reload(self) -> None:
        with contextlib.suppress(Exception):
            await self._credentials.reload()

    async def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        verb: str,
        resource: str,
        body: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        async with self._request(method, path, query, verb, resource, timeout=timeout, body=body) as response:
            try:
                answer = json.loads(await _read_up_to(response, MAX_RESPONSE_BYTES))
            except (aiohttp.ClientError, OSError) as error:
                raise _unreachable(error) from None
            except TimeoutError:
                raise KubeTimeoutError(
                    f"the API server did not answer {verb} {resource} in {REQUEST_SECONDS:g} s"
                ) from None
            except (ValueError, RecursionError):
                raise KubeUnavailableError(
                    f"the API server's answer to {verb} {resource} is not JSON", retry_after=RETRY_SECONDS
                ) from None
            if not isinstance(answer, dict):
                raise KubeUnavailableError(
                    f"the API server's answer to {verb} {resource} is not an object", retry_after=RETRY_SECONDS
                )
            return answer

    @contextlib.asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        verb: str,
        resource: str,
        *,
        timeout: aiohttp.ClientTimeout,
        body: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Yield a 2xx response. Everything else is raised as KubeError. A 401 reads the token again, once."""
        url = self._url(path, query)
        for attempt in (1, 2):
            started = time.monotonic()
            status = 0
            try:
                response = await self._session.request(
                    method,
                    url,
                    json=body,
                    headers={"Accept": "application/json", **await self._headers()},
                    timeout=timeout,
                    allow_redirects=False,
                    server_hostname=self._tls_name,
                    proxy=self._proxy,
                )
                status = response.status
                if status >= 300:  # noqa: PLR2004
                    refusal = await _read_up_to(response, MAX_ERROR_BYTES)
                    response.close()
            except TimeoutError:
                raise KubeTimeoutError(f"the API server did not answer {verb} {resource} in time") from None
            except (aiohttp.ClientError, OSError, ssl.SSLError) as error:
                raise _unreachable(error) from None
            finally:
                self._on_call(verb, resource, status, time.monotonic() - started)
            if status < 300:  # noqa: PLR2004
                async with response:
                    yield response
                return
            if status != 401 or attempt == 2:  # noqa: PLR2004
                raise _error(status, refusal, verb, resource)
            await self._reload()


class WebSocketStream:
    """An open pods/exec websocket (``stream.ExecStream``)."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse[bool], subprotocol: str) -> None:
        self.subprotocol = subprotocol
        self._websocket = websocket
        self._heard = time.monotonic()
        self._closed = False

    async def receive(self) -> bytes | None:
        """Return the next message; pings are answered and pongs noted on the way."""
        while True:
            message = await self._websocket.receive()
            kind = message.type
            self._heard = time.monotonic()
            if kind is aiohttp.WSMsgType.BINARY or kind is aiohttp.WSMsgType.TEXT:
                data: bytes = message.data
                return data
            if kind is aiohttp.WSMsgType.PING:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await self._websocket.pong(message.data)
            elif kind is not aiohttp.WSMsgType.PONG:
                return None

    async def send(self, message: bytes) -> None:
        """Send one binary message."""
        try:
            await self._websocket.send_bytes(message)
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(error) from None

    async def ping(self) -> None:
        """Send a ping."""
        try:
            await self._websocket.ping()
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(error) from None

    def heard_seconds_ago(self) -> float:
        """Return the seconds since anything was received."""
        return time.monotonic() - self._heard

    async def close(self) -> None:
        """Say goodbye for at most CLOSE_SECONDS, then drop the connection."""
        task = asyncio.current_task()
        try:
            if task is None or not task.cancelling():  # one that is being cancelled has no time left
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._websocket.close()
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass
        finally:
            transport = self._websocket.get_extra_info("transport")
            if transport is not None:
                transport.abort()


def _socket(address: Any) -> socket.socket:
    """Make the socket of a connection to the API server; its kernel buffer bounds what one read brings in."""
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    return sock


def _tls(configuration: Any) -> ssl.SSLContext | bool:
    if not str(configuration.host).startswith("https:"):
        return True
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    # Cluster CAs rarely carry the key identifiers that X.509 strictness (Python 3.13) demands; client-go wants none.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _watch_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    buffer = b""
    try:
        async for data in response.content.iter_any():
            buffer += data
            while (end := buffer.find(b"\n")) >= 0:
                line, buffer = buffer[:end], buffer[end + 1 :]
                event = json.loads(line) if line.strip() else {}
                if isinstance(event, dict):
                    yield event
            if len(buffer) > MAX_RESPONSE_BYTES:
                raise KubeUnavailableError("a watch event without end", retry_after=RETRY_SECONDS)
    except TimeoutError:
        return
    except (aiohttp.ClientError, OSError) as error:
        raise _unreachable(error) from None
    except (ValueError, RecursionError):
        raise KubeUnavailableError("a watch event that is not JSON", retry_after=RETRY_SECONDS) from None


def _unreachable(error: BaseException) -> KubeError:
    if isinstance(error, TimeoutError):
        return KubeTimeoutError("the API server did not answer in time")
    name = type(error).__name__
    # The text of these errors names hosts and causes, never headers or tokens.
    return KubeUnavailableError(f"the API server cannot be reached: {name}: {error}"[:300], retry_after=RETRY_SECONDS)


_DENIED = re.compile(r'cannot (\w+) resource "([\w/]+)"')


def _status(body: bytes) -> Mapping[str, Any] | None:
    """Return the body when it is a Kubernetes Status."""
    try:
        status = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) and status.get("kind") == "Status" else None


def _error(code: int, body: bytes, verb: str, resource: str) -> KubeError:
    status = _status(body)
    message = str((status or {}).get("message") or f"HTTP {code}")[:500]
    match code:
        case 401:
            return KubeUnauthorizedError("the API server does not accept the credential, also not read anew")
        case 403 if status is not None:
            # The API server knows best which verb it missed: the exec websocket is "get", and from 1.35 "create", too.
            if match := _DENIED.search(message):
                verb, resource = match.groups()
            return KubeForbiddenError(
                f"RBAC does not allow {verb} {resource}: {message}", extra={"verb": verb, "resource": resource}
            )
        case 404:
            return KubeNotFoundError(message, retry_after=RETRY_SECONDS)
        case 504:
            return KubeTimeoutError(f"{verb} {resource}: {message}")
    return KubeUnavailableError(f"{verb} {resource}: HTTP {code}: {message}", retry_after=RETRY_SECONDS)


def _upgrade_error(refusal: _UpgradeRefusedError, subprotocols: Sequence[str]) -> Exception:
    """Classify the answer to an upgrade that is not 101. A 403 without a Status is no word of RBAC."""
    status = _status(refusal.body)
    message = str((status or {}).get("message") or refusal.body.decode(errors="replace"))[:500].strip()
    if refusal.status == 403 and status is None:  # noqa: PLR2004
        if remotecommand.V4 not in subprotocols:
            return ExecStartError(
                "start_failed",
                "this API server has no v5.channel.k8s.io, without which WRAPPER=none cannot end standard input",
            )
        return KubeUnavailableError(
            "the exec upgrade was answered with 403 and no Status: not RBAC, but something that does not speak "
            f"{' or '.join(subprotocols)}",
            retry_after=RETRY_SECONDS,
        )
    if refusal.status in (400, 500) and remotecommand.start_failure(message) == "container_not_found":
        return ExecStartError("container_not_found", message)
    return _error(refusal.status, refusal.body, "get", "pods/exec")
