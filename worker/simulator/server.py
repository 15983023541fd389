"""The HTTP server of the simulator: Starlette on uvicorn."""

import asyncio
import json
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from datetime import UTC, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import uvicorn
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from worker.simulator.dialects import V1, V2, Dialect, PlatformError, in_chinese
from worker.simulator.faults import Endpoint, Fault, FaultPlan
from worker.simulator.platform import Platform
from worker.simulator.writings import Writing, rewrite

_MAX_REQUESTS = 100_000
# Faults that do not replace the execution of the request.
_ACTING = {"slow_drip", "no_uuid", "refuse", *get_args(Writing)}
_FAULTS = TypeAdapter(list[Fault])
_DEVICES = TypeAdapter(dict[str, str])


class _Clock(BaseModel):
    model_config = ConfigDict(extra="forbid")

    offset_s: float


class Simulator:
    """A OneNET simulator that listens on a local port.

    Args:
        platform: the platform's rules and its cached commands.
        faults: the faults to inject.
        latency_s: delay before each answer, in seconds.
        host: the address to listen on.
        port: the port to listen on; 0 chooses a free one, which is kept across restarts of the server.
        tls: files of a certificate and its private key, to serve HTTPS; None: HTTP.
    """

    def __init__(
        self,
        platform: Platform,
        faults: FaultPlan,
        *,
        latency_s: float = 0,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.platform = platform
        self.faults = faults
        self.on_fault: Callable[[], object] = lambda: None  # called for each injected fault
        self.requests: deque[dict[str, Any]] = deque(maxlen=_MAX_REQUESTS)
        self._latency_s = latency_s
        self._tls = tls
        self._socket: socket.socket | None = _listen(host, port)
        self.host, self.port = self._socket.getsockname()[:2]
        self._app = Starlette(
            routes=[
                *self._routes(V1),
                *self._routes(V2),
                Route("/control/faults", self._control_faults, methods=["GET", "PUT"]),
                Route("/control/devices", self._control_devices, methods=["GET", "PUT"]),
                Route("/control/clock", self._control_clock, methods=["GET", "PUT"]),
                Route("/control/commands", self._control_commands),
                Route("/control/requests", self._control_requests),
            ]
        )
        self._server: uvicorn.Server | None = None
        self._refuse_s: float | None = None
        self._is_stopping = False

    def _routes(self, dialect: Dialect) -> list[Route]:
        history, cancel = f"{dialect.prefix}/offline/history", f"{dialect.prefix}/offline/cancel"
        return [
            Route(f"{dialect.prefix}/execute/offline", partial(self._execute, dialect), methods=["POST"]),
            Route(history, partial(self._history, dialect)),
            Route(f"{history}/{{uuid}}", partial(self._detail, dialect)),
            Route(f"{history}/{{uuid}}/piecewise", partial(self._log, dialect)),
            Route(f"{cancel}/all", partial(self._cancel_all, dialect), methods=["PUT"]),
            Route(f"{cancel}/all/", partial(self._cancel_all, dialect), methods=["PUT"]),  # as one client writes it
            Route(f"{cancel}/{{uuid}}", partial(self._cancel, dialect), methods=["PUT"]),
        ]

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    async def serve(self) -> None:
        """Serve until SIGINT or SIGTERM, or until ``stop``."""
        certificate, key = self._tls or (None, None)
        while True:
            config = uvicorn.Config(
                self._with_date,
                interface="asgi3",  # not to be guessed from a bound method
                date_header=False,  # ``_with_date`` sends that of the platform's clock
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
            self._server = uvicorn.Server(config)
            if self._is_stopping:
                self._server.should_exit = True  # ``stop`` was called before this server existed
            sock = self._socket or _listen(self.host, self.port)
            self._socket = None
            await self._server.serve(sockets=[sock])
            if self._refuse_s is None or self._is_stopping:
                return
            await asyncio.sleep(self._refuse_s)
            self._refuse_s = None

    def stop(self) -> None:
        """End ``serve`` and abort its open requests. Thread-safe."""
        self._is_stopping = True
        if self._server is not None:
            self._server.should_exit = True
            self._server.force_exit = True

    async def _with_date(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_date(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = format_datetime(self.platform.clock().astimezone(UTC), usegmt=True)
                message["headers"] = [*message["headers"], (b"date", date.encode())]
            await send(message)

        await self._app(scope, receive, with_date)

    async def _execute(self, dialect: Dialect, request: Request) -> Response:
        query = dict(request.query_params)
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response()  # the client is gone; an incomplete request is not cached
        self.requests.append(
            {
                "client": request.scope["client"],
                "received_at": self.platform.now().isoformat(),
                "path": request.url.path,
                "query": query,
                "headers": dict(request.headers),
                "body": body.decode("utf-8", "replace"),
            }
        )

        def cache() -> dict[str, object]:
            return {"uuid": self.platform.execute(query, body, request.headers.get("content-type")).uuid}

        return await self._answer(dialect, request, "execute", cache)

    async def _history(self, dialect: Dialect, request: Request) -> Response:
        query = dict(request.query_params)
        return await self._answer(dialect, request, "history", lambda: self.platform.history(query))

    async def _detail(self, dialect: Dialect, request: Request) -> Response:
        imei, uuid = _command(request)
        return await self._answer(dialect, request, "history", lambda: self.platform.detail(imei, uuid))

    async def _log(self, dialect: Dialect, request: Request) -> Response:
        imei, uuid = _command(request)
        return await self._answer(dialect, request, "history", lambda: self.platform.log(imei, uuid))

    async def _cancel(self, dialect: Dialect, request: Request) -> Response:
        imei, uuid = _command(request)
        return self._act(dialect, request, lambda: self.platform.cancel(imei, uuid))[0]

    async def _cancel_all(self, dialect: Dialect, request: Request) -> Response:
        imei = request.query_params.get("imei", "")
        return self._act(dialect, request, lambda: self.platform.cancel_all(imei))[0]

    def _act(
        self, dialect: Dialect, request: Request, act: Callable[[], object], writing: Writing | None = None
    ) -> tuple[Response, bool]:
        """Execute a request; returns the platform's answer and whether the request was carried out."""
        try:
            self.platform.check_rate()
            self.platform.check_authentication(request.headers, dialect)
            data = act()
        except PlatformError as exc:
            return JSONResponse(dialect.refusal(exc, self.platform.errors, self.platform.queue_errno)), False
        return JSONResponse(dialect.success(data if writing is None else rewrite(writing, data))), True

    async def _answer(
        self, dialect: Dialect, request: Request, endpoint: Endpoint, act: Callable[[], object]
    ) -> Response:
        """Execute a request and answer it, or inject a fault."""
        fault = self.faults.draw(request.query_params.get("imei"), endpoint)
        if fault is not None:
            self.on_fault()
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        if fault is not None and fault.kind == "late_caching":
            await asyncio.sleep(fault.seconds)
        acts = fault is None or fault.kind.endswith(("after_caching", "late_caching")) or fault.kind in _ACTING
        answer: Response | None = None
        if acts:
            answer, is_done = self._act(dialect, request, act, None if fault is None else fault.writing)
            if not is_done:
                return answer
        if fault is not None:
            answer = await self._fail(dialect, request, fault, answer)
        assert answer is not None  # every kind of fault that skips the execution sets one
        return answer

    async def _fail(self, dialect: Dialect, request: Request, fault: Fault, answer: Response | None) -> Response | None:
        match fault.kind.removesuffix("_after_caching"):
            case "refuse":
                self._refuse_for(fault.seconds)
            case "hang":
                await asyncio.sleep(fault.seconds)
                answer = Response(status_code=504)
            case "drop":
                self._drop(request)
                answer = Response()  # never sent: the connection is closed
            case "error_500" | "error_503" as kind:
                answer = Response("upstream failed", status_code=int(kind[-3:]))
            case "too_many_requests":
                answer = Response(status_code=429, headers={"Retry-After": f"{fault.seconds:.0f}"})
            case "too_many_requests_date":
                until = (self.platform.clock() + timedelta(seconds=fault.seconds)).astimezone(UTC)
                answer = Response(status_code=429, headers={"Retry-After": format_datetime(until, usegmt=True)})
            case "errno":
                answer = JSONResponse(dialect.failure(fault.errno, fault.error))
            case "errno_in_chinese":
                answer = JSONResponse(dialect.failure(fault.errno, in_chinese(fault.errno)))
            case "garbage":
                answer = Response(b"\x00<html>not the platform", media_type="text/html")
            case "no_uuid":
                answer = JSONResponse(dialect.success())
            case "redirect":
                answer = RedirectResponse(str(request.url), status_code=307)
            case "not_found":
                answer = Response("no such page", status_code=404)
            case "slow_drip" if answer is not None:
                answer = StreamingResponse(_drip(bytes(answer.body), fault.seconds), media_type="application/json")
        return answer

    def _drop(self, request: Request) -> None:
        """Reset the connection of a request, unless the client has closed it."""
        assert self._server is not None  # the request was received by it
        for connection in self._server.server_state.connections:
            if connection.transport.get_extra_info("peername")[:2] == request.scope["client"]:
                connection.transport.abort()

    def _refuse_for(self, seconds: float) -> None:
        """Refuse connections for a while by stopping the server. Requests in progress are answered first."""
        self._refuse_s = seconds
        assert self._server is not None  # the request was received by it
        self._server.should_exit = True

    async def _control_faults(self, request: Request) -> Response:
        if request.method == "PUT":
            try:
                self.faults.replace(_FAULTS.validate_json(await request.body()))
            except ValidationError as exc:
                return Response(exc.json(include_url=False), status_code=422, media_type="application/json")
        return Response(_FAULTS.dump_json(self.faults.current()), media_type="application/json")

    async def _control_devices(self, request: Request) -> Response:
        if request.method == "PUT":
            try:
                self.platform.replace_devices(_DEVICES.validate_json(await request.body()))
            except ValidationError as exc:
                return Response(exc.json(include_url=False), status_code=422, media_type="application/json")
            except ValueError as exc:
                return Response(str(exc), status_code=422)
        return JSONResponse(dict(self.platform.devices))

    async def _control_clock(self, request: Request) -> Response:
        if request.method == "PUT":
            try:
                self.platform.clock_offset_s = _Clock.model_validate_json(await request.body()).offset_s
            except ValidationError as exc:
                return Response(exc.json(include_url=False), status_code=422, media_type="application/json")
        return JSONResponse({"offset_s": self.platform.clock_offset_s, "now": self.platform.clock().isoformat()})

    async def _control_commands(self, request: Request) -> Response:
        imei = request.query_params.get("imei")
        self.platform.advance()
        found = [command for command in self.platform.commands if imei in {None, command.query["imei"]}]
        shown = [asdict(command) | {"args": command.args} for command in found]
        return Response(json.dumps(shown, default=str), media_type="application/json")

    async def _control_requests(self, _request: Request) -> Response:
        return JSONResponse(list(self.requests))


def _listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(2048)  # connections are accepted into the backlog from here on
    return sock


def _command(request: Request) -> tuple[str, str]:
    return request.query_params.get("imei", ""), request.path_params["uuid"]


async def _drip(body: bytes, seconds: float) -> AsyncIterator[bytes]:
    for byte in body:
        yield bytes([byte])
        await asyncio.sleep(seconds)
