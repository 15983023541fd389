"""A platform that harms who asks it: it never stops answering, or answers with as much as it can."""

import itertools
import json
import threading
from collections import Counter
from contextlib import suppress
from datetime import datetime
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4
from zoneinfo import ZoneInfo

_MIB = 1024 * 1024
_ALMOST_TOO_LARGE = 250_000  # the worker reads at most 256 KiB of an answer
_PER_PAGE = 100
_ITEM_BYTES = _ALMOST_TOO_LARGE // _PER_PAGE - 300  # what an item has besides
# As objects of a program, tables within tables take 36 times as much as the JSON of them.
_DEEP = '{"":' * 60 + "0" + "}" * 60
_TABLES = json.loads(f"[{','.join([_DEEP] * (_ALMOST_TOO_LARGE // len(_DEEP) - 5))}]")
_FEW_TABLES = _TABLES[:150]  # as many as the worker reads of an answer
_SLOW_S = 8.0  # within the deadline of a search
_CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"


class Harm(Enum):
    """What the platform does to those who ask about a device; from ENDLESS_HISTORY on, in the device's history."""

    HOLD = auto()
    LARGE_ANSWER = auto()
    LARGE_UUID = auto()
    TABLES = auto()
    ENDLESS_HISTORY = auto()
    ENDLESS_PAGE = auto()
    ENDLESS_REDIRECT = auto()
    LARGE_DETAILS = auto()
    LARGE_UUIDS = auto()
    TABLES_IN_PAGES = auto()
    TABLES_IN_DETAILS = auto()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections made at once


class HostilePlatform:
    """A server on loopback. It caches the commands of devices that ``harms`` does not name.

    Attributes:
        harms: what is done, by the device's IMEI.
        cached: how often each command was cached, by its args.
        harmed: how often each kind of harm was done to its end, or until the client had enough.
    """

    def __init__(self) -> None:
        self.harms: dict[str, Harm] = {}
        self.cached: Counter[str] = Counter()
        self.harmed: Counter[Harm] = Counter()
        self.is_over = threading.Event()
        self._entries: dict[str, dict[str, Any]] = {}
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="hostile-platform")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        platform = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                query = dict(parse_qsl(urlsplit(self.path).query))
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                platform.execute(self, query, body)

            def do_GET(self) -> None:
                address = urlsplit(self.path)
                platform.history(self, address.path, dict(parse_qsl(address.query)))

            def log_message(self, *_arguments: object) -> None:
                """Write nothing."""

        return Handler

    def execute(self, request: BaseHTTPRequestHandler, query: dict[str, str], body: dict[str, str]) -> None:
        """Answer an Execute."""
        match harm := self.harms.get(query["imei"]):
            case None:
                self.cached[body["args"]] += 1
                _answer(request, {"uuid": str(uuid4())})
            case Harm.HOLD:
                self.is_over.wait()
            case Harm.LARGE_ANSWER:
                self._stream(request, harm, 64 * _MIB)
            case Harm.LARGE_UUID:
                self._done(harm, lambda: _answer(request, {"uuid": "u" * _ALMOST_TOO_LARGE}))
            case Harm.TABLES:
                self._done(harm, lambda: _answer(request, {"more": self._tables(harm)}))
            case _:  # the answer is lost: the history has to be read
                self._entries[query["imei"]] = _entry(query, body)
                request.close_connection = True

    def history(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> None:
        """Answer a read of a device's history, or of one of its entries."""
        harm = self.harms.get(query["imei"])
        if harm is None or query["imei"] not in self._entries:  # it has cached nothing
            _answer(request, {"total_count": 0, "items": []})
            return
        entry = self._entries[query["imei"]]
        is_detail = not path.endswith("/history")
        match harm:
            case Harm.ENDLESS_PAGE:
                self._stream(request, harm, None)
            case Harm.ENDLESS_REDIRECT:
                self._stream(request, harm, None, status=302)
            case Harm.ENDLESS_HISTORY:
                items = [_item(entry) | {"send_status": "s" * _ITEM_BYTES} for _ in range(_PER_PAGE)]
                self._done(harm, lambda: _answer(request, {"total_count": 10**9, "items": items}))
            case Harm.LARGE_UUIDS:
                items = [_item(entry) | {"cmd_uuid": "u" * _ALMOST_TOO_LARGE}]
                self._done(harm, lambda: _answer(request, {"total_count": 1, "items": items}))
            case Harm.TABLES_IN_PAGES:  # which is none
                page = {"total_count": "?", "items": [], "more": self._tables(harm)}
                self._done(harm, lambda: _answer(request, page))
            case Harm.TABLES_IN_DETAILS if is_detail:
                if self.harmed[harm] % 2:
                    self.is_over.wait(_SLOW_S)  # meanwhile the worker may hold the former ones
                self._done(harm, lambda: _answer(request, entry | {"content": _FEW_TABLES}))
            case _ if is_detail:
                self._done(harm, lambda: _answer(request, entry | {"content": {"args": "a" * _ALMOST_TOO_LARGE}}))
            case _:
                items = [_item(entry, number) for number in range(_PER_PAGE)] if query.get("page", "1") == "1" else []
                _answer(request, {"total_count": _PER_PAGE, "items": items})

    def _tables(self, harm: Harm) -> Any:
        return _TABLES if self.harmed[harm] % 2 else _FEW_TABLES

    def _done(self, harm: Harm, answer: Any) -> None:
        answer()
        self.harmed[harm] += 1

    def _stream(self, request: BaseHTTPRequestHandler, harm: Harm, size: int | None, status: int = 200) -> None:
        """Send a body of a size; None: one without an end."""
        request.close_connection = True
        with suppress(OSError):
            request.send_response(status)
            request.send_header("Location", "/")
            request.send_header("Content-Type", "application/json")
            if size is None:
                request.send_header("Transfer-Encoding", "chunked")
                request.end_headers()
                while not self.is_over.is_set():
                    request.wfile.write(_CHUNK)
            else:
                request.send_header("Content-Length", str(size))
                request.end_headers()
                for _ in range(size // _MIB):
                    request.wfile.write(b" " * _MIB)
        self.harmed[harm] += 1


def _answer(request: BaseHTTPRequestHandler, data: dict[str, Any]) -> None:
    body = json.dumps({"errno": 0, "error": "succ", "data": data}, separators=(",", ":")).encode()
    with suppress(OSError):  # the client has had enough
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


def _entry(query: dict[str, str], body: dict[str, str]) -> dict[str, Any]:
    """Return a command as the platform shows it when it is asked for this one."""
    now = datetime.now(ZoneInfo("Asia/Shanghai")).strftime("%Y-%m-%d %H:%M:%S")
    expires = query["expired_time"].replace("T", " ")
    times = {"create_time": now, "valid_time": now, "expired_time": expires}
    return {"type": "EXECUTE", "trigger_msg": 7, "send_status": 1, **times, "args": query, "content": body}


_numbers = itertools.count()


def _item(entry: dict[str, Any], number: int | None = None) -> dict[str, Any]:
    """Return a command as the list shows it, under another uuid each time; with a number, under the same."""
    device = entry["args"]["imei"][-8:]
    shown = {name: value for name, value in entry.items() if name not in {"args", "content"}}
    return shown | {"cmd_uuid": f"{device}-0000-4000-8000-{next(_numbers) if number is None else number:012}"}
