"""The page and what it asks for, on 127.0.0.1 alone."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import socket
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import resources
from typing import Any

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .decisions import Decision, Decisions
from .folder import Folder

EXPORT = "reviewed"  # the button's folder, inside the reviewed one: a request names no path
_TEXT, _SNIPPET = 20_000, 600  # characters of a sample and of a neighbour that are shown
_BODY = 4_096  # bytes of the longest request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass
class Guard:
    """Lets a request through that names this server, comes from its page, and carries its token.

    Another page in the same browser fails the check of Origin, a name that was made to point here that of Host, and
    another user of the machine that of the token.

    Attributes:
        app: what is guarded.
        token: in the query of the page's address, and then in a cookie.
        port: of this server.
    """

    app: ASGIApp
    token: str
    port: int
    cookie: str = field(init=False)

    def __post_init__(self) -> None:
        self.cookie = f"dataopt-review-{self.port}"  # browsers keep one jar for all ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        opened = request.url.path == "/" and self._right(request.query_params.get("token"))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                if opened:
                    cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append((b"set-cookie", cookie.encode()))
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        refusal = self._refusal(request, opened)
        answer = PlainTextResponse(refusal, 403) if refusal else self.app
        opened = opened and not refusal
        await answer(scope, receive, send_marked)

    def _refusal(self, request: Request, opened: bool) -> str | None:
        hosts = [f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")]
        asked, origins = request.headers.getlist("host"), request.headers.getlist("origin")
        if len(asked) != 1 or asked[0] not in hosts:
            return "This server answers to 127.0.0.1 alone."
        if any(origin != f"http://{asked[0]}" for origin in origins) or (request.method == "POST" and not origins):
            return "This request does not come from the review page."
        if not (opened or self._right(request.cookies.get(self.cookie))):
            return "Open the address that dataopt review printed; it carries the key to this page."
        return None

    def _right(self, token: str | None) -> bool:
        return token is not None and secrets.compare_digest(token.encode(), self.token.encode())


@dataclass(frozen=True)
class Page:
    """The handlers. They run in the event loop, one after the other, so that none sees half of a decision."""

    folder: Folder
    decisions: Decisions
    exporting: asyncio.Lock = field(default_factory=asyncio.Lock)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index),
            *(Route(f"/{name}", self.static) for name in _STATIC),
            Route("/state", self.state),
            Route("/items/{row:int}", self.item),
            Route("/media/{row:int}", self.media),
            Route("/decide", self.decide, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/export", self.export, methods=["POST"]),
        ]

    async def index(self, request: Request) -> Response:
        template = jinja2.Environment(autoescape=True).from_string(_file("page.html"))
        record = self.folder.record
        shown = {"name": self.folder.name, "rows": record["rows"], "suspects": len(self.folder.suspects)}
        return Response(template.render(shown), media_type="text/html")

    async def static(self, request: Request) -> Response:
        name = request.url.path[1:]
        return Response(_file(name), media_type=_STATIC[name])

    async def state(self, request: Request) -> Response:
        folder = self.folder
        return JSONResponse(
            {
                "rows": folder.suspects.tolist(),
                "kinds": folder.kinds.tolist(),
                "names": folder.label_names,
                "modality": folder.record["modality"],
                "total": folder.record["rows"],
                "decisions": [_short(d) for d in self.decisions.all().values()],
            }
        )

    async def item(self, request: Request) -> Response:
        row = self._suspect(request.path_params["row"])
        decision = self.decisions.get(row)
        return JSONResponse(describe(self.folder, row) | {"decision": _short(decision) if decision else None})

    async def media(self, request: Request) -> Response:
        row = request.path_params["row"]
        content = self.folder.items.media(row)
        if content is None:
            raise HTTPException(404, f"row {row} has no image or sound that is shown")
        return Response(content, media_type=self.folder.items.media_type(row))

    async def decide(self, request: Request) -> Response:
        asked = await _body(request)
        row, action, label = (asked.get(key) for key in ("row", "action", "label"))
        if type(row) is not int or type(action) is not str or not (label is None or type(label) is int):
            raise HTTPException(400, "a decision is a row, an action and, to relabel, a label")
        if label is not None and not 0 <= label < len(self.folder.label_names):
            raise HTTPException(400, f"label {label} is none of the {len(self.folder.label_names)}")
        row = self._suspect(row)
        return JSONResponse(_short(self.decisions.decide(row, self.folder.given(row), action, label)))

    async def undo(self, request: Request) -> Response:
        await _body(request)
        row = self.decisions.undo()
        decision = None if row is None else self.decisions.get(row)
        return JSONResponse({"row": row, "decision": _short(decision) if decision else None})

    async def export(self, request: Request) -> Response:
        await _body(request)
        from .export import export  # datasets takes its time

        async with self.exporting:
            record, suspects, out = self.folder.record, len(self.folder.suspects), self.folder.path / EXPORT
            done = await run_in_threadpool(export, record, self.decisions.all(), suspects, out)
        return JSONResponse(asdict(done) | {"folder": str(done.folder), "message": f"Wrote {done}."})

    def _suspect(self, row: int) -> int:
        if row not in self._suspects:
            raise HTTPException(404, f"row {row} is no suspect")
        return row

    @cached_property
    def _suspects(self) -> frozenset[int]:
        return frozenset(self.folder.suspects.tolist())


_STATIC = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}


def application(folder: Folder, decisions: Decisions, token: str, port: int) -> Guard:
    """The ASGI application behind its :class:`Guard`."""
    handlers: Any = {HTTPException: _refused, ValueError: _refused, OSError: _refused}
    return Guard(Starlette(routes=Page(folder, decisions).routes(), exception_handlers=handlers), token, port)


def serve(folder: Folder, decisions: Decisions, port: int) -> None:
    """Print the page's address and serve it until interrupted.

    Args:
        port: 0 takes a free one.

    Raises:
        ValueError: the port is in use, or not allowed.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as e:
        raise ValueError(f"port {port} cannot be used ({e}); give another with --port, or 0 for a free one") from e
    with listener:
        port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
        config = uvicorn.Config(
            application(folder, decisions, token, port),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        print(f"{len(folder.suspects):,} suspects among {folder.record['rows']:,} rows of {folder.name}")
        print(f"Review them at http://127.0.0.1:{port}/?token={token}")
        print("Decisions are saved as you make them; Ctrl+C ends the server.", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print(f"\n{len(decisions.all()):,} of {len(folder.suspects):,} decided.")


def describe(folder: Folder, row: int) -> dict[str, Any]:
    """All that the page shows about a suspect, as JSON can hold it."""
    score = folder.scores.loc[row]
    near = folder.relations.of(row)
    spread = folder.map.of(row)
    nearest = int(score["nearest_neighbor"])
    text, cut = _clip(folder.items.text(row), _TEXT)
    return {
        "row": row,
        "given": int(score["given_label"]),
        "suggested": int(score["predicted_label"]),
        "noisiness": _number(score["relation_noisiness"]),
        "noisiness_rank": _number(score["relation_noisiness_rank"]),
        "loss": _number(score["loss"]),
        "loss_rank": _number(score["loss_rank"]),
        "label_score": _number(score["label_score"]),
        "outlier_score": _number(score["outlier_score"]),
        "near_duplicate_score": _number(score["near_duplicate_score"]),
        "nearest": _neighbour(folder, nearest) if nearest in folder.scores.index and nearest != row else None,
        "text": text,
        "cut": cut,
        "media": folder.items.media_type(row) is not None,
        "neighbours": [
            _neighbour(folder, int(other)) | {"value": _number(value), "similarity": _number(similarity)}
            for other, value, similarity in near[["neighbour", "value", "similarity"]].itertuples(index=False)
        ],
        "map": [
            [other, label, *map(_number, values)]
            for other, label, *values in zip(
                spread["neighbour"].tolist(),
                folder.scores["given_label"].loc[spread["neighbour"]].tolist(),
                *(spread[name].tolist() for name in ("mean", "std", "last")),
                strict=True,
            )
        ],
    }


def _neighbour(folder: Folder, row: int) -> dict[str, Any]:
    text, cut = _clip(folder.items.text(row), _SNIPPET)
    media = folder.items.media_type(row) is not None
    return {"row": row, "label": folder.given(row), "text": text, "cut": cut, "media": media}


def _clip(text: str | None, most: int) -> tuple[str | None, bool]:
    return (text, False) if text is None or len(text) <= most else (text[:most], True)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _short(decision: Decision) -> dict[str, Any]:
    return {"row": decision.row, "action": decision.action, "label": decision.label, "time": decision.time}


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. A form of another page cannot send this type."""
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(415, "send application/json")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _BODY:
            raise HTTPException(413, f"send at most {_BODY} bytes")
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, "send a JSON object") from e
    if not isinstance(asked, dict):
        raise HTTPException(400, "send a JSON object")
    return asked


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": (str(error).strip() or type(error).__name__).splitlines()[0]}, 409)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
