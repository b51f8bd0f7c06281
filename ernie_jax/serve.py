"""A search service: a JSON API and one page, over anything that searches as `search.Searcher` does.

  GET /                                      the page: four rankings side by side, and how two texts match, by token
  GET /api/about                             the index: model, corpus, number of passages
  GET /api/search?q=...&how=dual&k=10        one ranking of the k best passages: bm25, dual, late, cross or hybrid
  GET /api/match?q=...&row=123               similarities of the query's tokens and a passage's

Everything else is refused with a 4xx, and the reason is JSON, {"error": "..."} (a wrong Host: in words). The searcher
runs in one thread, for it is not thread-safe; a bounded number of requests wait for it, each no longer than a bounded
time, then it is a 503.
"""

# Annotations are not postponed here: FastAPI reads those of the routes, whose names are local, as fastapi's import is.

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import ipaddress
import json
import re
import socket
import time
import unicodedata
import urllib.parse
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ernie_jax.config import UserError

if TYPE_CHECKING:
  import uvicorn
  from fastapi import FastAPI

  from ernie_jax.search import Searcher

LONGEST = 512  # characters of a query
MOST = 100  # passages of an answer
PLACES = 32  # requests that wait for the searcher
PATIENCE = 30.0  # seconds that a request waits
CONNECTIONS = 256  # open at once
GRACE = 20  # seconds at the end in which clients may fetch their last answers
KEPT = 512  # answers kept: going back shows them at once
DEPTH = {"late": 100, "cross": 30}  # passages that are ranked again; a cross-encoder reads each together with the query

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")  # names of this machine in the Host header

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/icon.svg": "icon.svg"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
  "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-cache",
}


class Guard:
  """Around the application: headers that keep others' scripts and frames out, on every answer."""

  def __init__(self, app: Any):
    self.app = app

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    async def guarded(message: Any) -> None:
      if message["type"] == "http.response.start":
        headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        message = {**message, "headers": [*message["headers"], *headers]}
      await send(message)

    await self.app(scope, receive, guarded)


class Line:
  """One thread, and a bounded number of requests that wait for it, first come, first served."""

  def __init__(self, places: int, patience: float):
    self.places, self.patience, self.waiting = places, patience, 0
    self.closed = False
    self.free = asyncio.Lock()
    self.thread = concurrent.futures.ThreadPoolExecutor(1, "searcher")

  @contextlib.asynccontextmanager
  async def turn(self) -> AsyncIterator[None]:
    """Waits until the thread is the caller's. Raises `Busy` if the line is full or closed, or the wait too long."""
    if self.waiting >= self.places:
      raise Busy("too many requests are waiting")
    self.waiting += 1
    try:
      async with asyncio.timeout(self.patience):
        await self.free.acquire()
    except TimeoutError:
      raise Busy(f"no answer within {self.patience:g} seconds") from None
    finally:
      self.waiting -= 1
    try:
      if self.closed:
        raise Busy("the service is about to end")
      yield
    finally:
      self.free.release()

  async def run(self, work: Callable[[], bytes]) -> bytes:
    """Runs it in the thread; only in one's turn."""
    return await asyncio.get_running_loop().run_in_executor(self.thread, work)

  def close(self) -> None:
    """Nobody's turn comes any more."""
    self.closed = True


class Busy(Exception):
  """The service has more to do than it can: the client is to come again."""


def strict(query: str) -> None:
  """Raises `ValueError` for the part of a URL after `?` if it is not what a browser would write.

  Lenient parsers take the last of two equal names, put U+FFFD for bytes that are not UTF-8 and let a bare % stand.
  """
  if re.search(r"%(?![0-9a-fA-F]{2})", query):
    raise ValueError("a % that no two hexadecimal digits follow; write %25")
  try:
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="strict") if query else []
  except UnicodeDecodeError:
    raise ValueError("the percent-encoded text is not UTF-8") from None
  names = [name for name, _ in pairs]
  if len(set(names)) < len(names):
    raise ValueError("a parameter is given twice")


def plain(text: str) -> str:
  """A query on one line, without white space around it. Raises `ValueError` if it is none."""
  text = " ".join(text.split())
  if not 1 <= len(text) <= LONGEST:
    raise ValueError(f"has {len(text)} characters; 1 to {LONGEST} are possible")
  if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
    raise ValueError("holds control characters")
  return text


def app(
  searcher: "Searcher",
  hosts: Sequence[str] = LOOPBACK,
  examples: Sequence[str] = (),
  places: int = PLACES,
  patience: float = PATIENCE,
) -> "FastAPI":
  """The service; `places` requests wait for the searcher, for `patience` seconds at most.

  `examples` are queries that the page suggests.

  `hosts`: the names it answers to, ["*"] for all. A page from elsewhere can give its own name a loopback address, and
  the browser then takes this service for that page's: only the Host header tells.
  """
  import fastapi
  import pydantic
  from fastapi import HTTPException, Query, Request, Response
  from fastapi.exceptions import RequestValidationError
  from starlette.exceptions import HTTPException as Refusal  # what the router raises: FastAPI's is a subclass
  from starlette.middleware.trustedhost import TrustedHostMiddleware

  count = searcher.about["passages"]
  text = Annotated[str, pydantic.AfterValidator(plain)]

  class Search(pydantic.BaseModel, extra="forbid"):
    q: text
    how: Literal["bm25", "dual", "late", "cross", "hybrid"] = "dual"
    k: int = pydantic.Field(10, ge=1, le=MOST)

  class Match(pydantic.BaseModel, extra="forbid"):
    q: text
    row: int = pydantic.Field(ge=0, lt=count)

  def well_formed(request: Request) -> None:
    try:
      strict(request.url.query)
    except ValueError as error:
      raise HTTPException(400, str(error)) from None

  line = Line(places, patience)
  kept: OrderedDict[tuple, bytes] = OrderedDict()
  checked = [fastapi.Depends(well_formed)]
  # FastAPI's own pages of documentation load scripts from elsewhere: there is no openapi.json, and so none of them.
  api = fastapi.FastAPI(openapi_url=None, redirect_slashes=False)
  api.state.line = line
  api.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
  api.add_middleware(Guard)

  async def answer(request: Request, key: tuple, work: Callable[[], dict[str, Any]]) -> Response:
    """A kept answer, or what the searcher's thread makes; whoever hung up meanwhile costs nothing."""

    def timed() -> bytes:
      begin = time.perf_counter()
      found = work()
      return json.dumps({**found, "seconds": round(time.perf_counter() - begin, 4)}, allow_nan=False).encode()

    if key not in kept:
      async with line.turn():
        if key not in kept and not await request.is_disconnected():
          kept[key] = await line.run(timed)
    if key not in kept:
      raise Busy("the client has gone")
    kept.move_to_end(key)
    content = kept[key]
    while len(kept) > KEPT:
      kept.popitem(last=False)
    return Response(content, media_type="application/json")

  @api.get("/api/about")
  async def about() -> Any:
    return {**searcher.about, "examples": examples}

  @api.get("/api/search", dependencies=checked)
  async def search(request: Request, asked: Annotated[Search, Query()]) -> Response:
    def work() -> dict[str, Any]:
      depth = max(asked.k, DEPTH.get(asked.how, MOST))
      hits = searcher.search([asked.q], asked.k, asked.how, depth)[0]
      return {**asked.model_dump(), "hits": [dataclasses.asdict(hit) for hit in hits]}

    return await answer(request, ("search", asked.how, asked.k, asked.q), work)

  @api.get("/api/match", dependencies=checked)
  async def match(request: Request, asked: Annotated[Match, Query()]) -> Response:
    def work() -> dict[str, Any]:
      found = searcher.match(asked.q, asked.row)
      similarity = [[round(float(x), 4) for x in row] for row in found.similarity]
      shown = {"query": found.query, "passage": found.passage, "similarity": similarity, "score": found.score}
      return {**asked.model_dump(), **shown}

    return await answer(request, ("match", asked.row, asked.q), work)

  def file(name: str) -> Callable[[], Response]:
    content, kind = (PAGE / name).read_bytes(), KINDS[Path(name).suffix]
    return lambda: Response(content, media_type=kind)

  for path, name in FILES.items():
    api.get(path)(file(name))

  def error(status: int, says: str, headers: Any = None) -> Response:
    return Response(json.dumps({"error": says}), status, headers, "application/json")

  @api.exception_handler(Refusal)
  async def refused(_: Request, problem: Refusal) -> Response:
    return error(problem.status_code, problem.detail, problem.headers)

  @api.exception_handler(RequestValidationError)
  async def wrong(_: Request, problem: RequestValidationError) -> Response:
    first = problem.errors()[0]
    says = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return error(400, f"{first['loc'][-1]}: {says}")

  @api.exception_handler(UserError)
  async def impossible(_: Request, problem: UserError) -> Response:
    return error(400, str(problem))

  @api.exception_handler(Busy)
  async def busy(_: Request, problem: Busy) -> Response:
    return error(503, f"{problem}; try again", {"Retry-After": "2"})

  @api.exception_handler(Exception)
  async def failed(_: Request, problem: Exception) -> Response:
    return error(500, "the search failed; the service's own output says why")

  return api


def names(host: str) -> list[str]:
  """The Host headers that a service listening on `host` answers to: any, unless only this machine reaches it."""
  try:
    loopback = ipaddress.ip_address(host).is_loopback
  except ValueError:
    loopback = host == "localhost"
  return [*LOOPBACK, host] if loopback else ["*"]


def examples(searcher: "Searcher") -> list[str]:
  """At most three queries for a corpus: first sentences of its passages, if they are short."""
  count = searcher.about["passages"]
  texts = (searcher.hit(row, 0.0).text for row in sorted({count * i // 60 for i in range(60)}))
  firsts = (re.split(r"(?<=[.!?])\s|(?<=[。！？])|\n", text.strip())[0] for text in texts)
  whole = [first[:-1] for first in firsts if re.fullmatch(r"[^:]{15,50}[.!?。！？]", first)]
  return list(dict.fromkeys(whole))[:3]


def warm(searcher: "Searcher") -> None:
  """Compiles what the page asks for, for short queries and for long ones: the first would wait for it."""
  for query in ("warm", "warm " * (LONGEST // 5)):
    for how in ("bm25", "dual", "late", "cross"):
      if how == "cross" and not searcher.model.crosses:
        continue
      searcher.search([query], MOST if how == "dual" else 10, how, DEPTH.get(how, MOST))
    searcher.match(query, 0)


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens; port 0 takes a free one. Raises `UserError` where that cannot be."""
  if not 0 <= port <= 65535:
    raise UserError(f"--port {port}: must be 0 to 65535; 0 takes a free one")
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)
  except (OSError, UnicodeError) as problem:
    why = str(getattr(problem, "strerror", None) or problem).partition(" (while")[0]  # the address stands here already
    raise UserError(f"--host {host} --port {port}: {why}; choose another, --port 0 takes a free one") from problem


def address(host: str, own: socket.socket) -> str:
  """Where a browser finds a socket."""
  return f"http://{f'[{host}]' if ':' in host else host}:{own.getsockname()[1]}"


def server(api: "FastAPI") -> "uvicorn.Server":
  """What answers on a socket: `server(api).run([listen(...)])`, until Ctrl-C or SIGTERM, which it then hands on.

  It ends in order: the request at work is answered, those that wait are sent away.
  """
  import uvicorn

  class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
      api.state.line.close()
      await super().shutdown(sockets)

  settings = uvicorn.Config(
    api,
    http="h11",  # its limit on a request's head is uvicorn's: 64 KiB
    ws="none",
    log_config=None,
    access_log=False,
    server_header=False,
    proxy_headers=False,
    limit_concurrency=CONNECTIONS,
    timeout_graceful_shutdown=GRACE,
  )
  return Server(settings)
