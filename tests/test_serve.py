"""The service: answers are the searcher's, everything out of bounds is a 4xx, and the page works in a browser."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ernie_jax import checkpoints, collection, columns, config, serve, step, templates, tokens
from ernie_jax.__main__ import main
from ernie_jax.search import Searcher

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@contextlib.contextmanager
def serving(searcher, **settings) -> Iterator[int]:
  """The port of a real server."""
  with serve.listen("127.0.0.1", 0) as own:
    server = serve.server(serve.app(searcher, **settings))
    thread = threading.Thread(target=server.run, args=([own],))
    port = own.getsockname()[1]
    thread.start()
    try:
      yield port
    finally:
      server.should_exit = True
      thread.join()


def get(port: int, path: str, method: str = "GET", **headers: str) -> SimpleNamespace:
  """An answer: status, headers, and content, read as JSON if it is."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  with contextlib.closing(connection):
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    known = answer.headers.get_content_type() == "application/json"
    return SimpleNamespace(
      status=answer.status, headers=answer.headers, content=json.loads(content) if known else content
    )


def api(verb: str, **parameters) -> str:
  return f"/api/{verb}?{urllib.parse.urlencode(parameters)}"


HOSTILE = "<img src=x onerror=\"window.hacked = 1\"> & 'quotes' </script><script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A finished run with an untrained model, of a corpus with a hostile passage."""
  directory = tmp_path_factory.mktemp("run")
  words = ["thread", "queue", "file", "line", "read", "matrix", "solve", "lock", "array", "sort", "date", "parse"]
  rng = np.random.default_rng(0)
  text = lambda: " ".join(rng.choice(words, rng.integers(5, 30)))
  corpus = [{"id": f"p{i}", "title": f"{words[i % 12]}.Name{i}", "text": text()} for i in range(40)]
  corpus[7] = {"id": "p7", "title": HOSTILE, "text": f"hostile thread {HOSTILE}"}
  corpus[8] = {"id": "p8", "title": "", "text": "thread without a title, and a \0, a \ud7ff, Ünïcode and 中文"}
  texts = [columns.passage(row["title"], row["text"]) for row in corpus]
  data = config.Data(name="jsonl", folder="in", query_length=12, passage_length=24)
  tokenizer = tokens.Tokenizer.train(texts, 200)
  shape = config.Architecture(
    vocabulary=len(tokenizer), width=16, layers=1, heads=2, inner=32, positions=64, special=tokenizer.special
  )
  model = config.Model(scratch=shape, late_width=8)
  params = step.init_params(model, shape, shape, jax.random.key(0))
  about = {"student": "interaction", "corpus": "encode", "fingerprint": "0f" * 8, "data": dataclasses.asdict(data)}
  checkpoints.save_model(directory / "model", params, model, about)
  tokenizer.save(directory / "model" / "tokenizer")
  collection.write_texts(directory, *([row[name] for row in corpus] for name in ("id", "title", "text")), "0f" * 8)
  store, template = columns.ragged(tokenizer.encode(texts)), templates.Template(tokenizer, data)
  collection.write(directory / "encode", params["student"], model, store, template, "..", "0f" * 8, late="16")
  return directory


@pytest.fixture(scope="module")
def searcher(folder):
  return Searcher(folder)


@pytest.fixture(scope="module")
def port(searcher):
  with serving(searcher) as port:
    yield port


class Slow:
  """Searches when it is let; notes what it was asked, and how many at once."""

  about = {"passages": 3}

  def __init__(self):
    self.let, self.asked, self.inside, self.most = threading.Event(), [], 0, 0

  def search(self, queries, k, how, depth):
    self.inside += 1
    self.most = max(self.most, self.inside)
    self.asked += queries
    self.let.wait(20)
    self.inside -= 1
    return [[] for _ in queries]


def until(condition) -> None:
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.005)


# Answers


@pytest.mark.parametrize("how", ["bm25", "dual", "late", "cross", "hybrid"])
def test_an_answer_is_the_searchers(how, searcher, port):
  query = "thread safe queue"
  found = get(port, api("search", q="  thread   safe\tqueue ", how=how, k=5))
  (expected,) = searcher.search([query], 5, how, serve.DEPTH.get(how, serve.MOST))
  assert found.status == 200
  assert found.content.pop("seconds") >= 0
  hits = json.loads(json.dumps([dataclasses.asdict(hit) for hit in expected]))
  assert found.content == {"q": query, "how": how, "k": 5, "hits": hits}
  assert hits


def test_matches_are_the_searchers(searcher, port):
  found = get(port, api("match", q="read a line", row=7)).content
  expected = searcher.match("read a line", 7)
  assert (found["query"], found["passage"]) == (expected.query, expected.passage)
  np.testing.assert_allclose(found["similarity"], expected.similarity, atol=5.1e-5)
  assert found["score"] == pytest.approx(sum(map(max, found["similarity"])), abs=1e-3)


def test_about(searcher, port):
  assert get(port, "/api/about").content == json.loads(json.dumps({**searcher.about, "examples": []}))


def test_examples_are_short_first_sentences():
  texts = [
    "Pads an array with zeros. More.",
    "Too short. Then more.",
    "A sentence that is longer than fifty characters is no example of a query. x",
    "Names of sys.path are no ends! Here",
    "这是一个关于数组填充的简单例子句子。更多",
    "Pads an array with zeros.",
    "a fourth whole sentence.",
  ]
  corpus = SimpleNamespace(about={"passages": 7}, hit=lambda row, _: SimpleNamespace(text=texts[row]))
  firsts = ["Pads an array with zeros", "Names of sys.path are no ends", "这是一个关于数组填充的简单例子句子"]
  assert serve.examples(corpus) == firsts


def test_many_clients_get_what_one_gets(port):
  """16 at once; one searches at a time, and nobody gets another's answer."""
  queries = [f"{a} {b}" for a in ("thread", "file", "matrix", "date") for b in ("queue", "read", "solve", "parse")]
  ask = lambda query: get(port, api("search", q=query, how="bm25")).content
  with ThreadPoolExecutor(16) as clients:
    together = list(clients.map(ask, queries * 2))
  for query, one, again in zip(queries, together, together[16:]):
    assert one["q"] == again["q"] == query
    assert one["hits"] == again["hits"] == ask(query)["hits"]


# Bounds


@pytest.mark.parametrize(
  ("path", "says"),
  [
    (api("search"), "q: Field required"),
    (api("search", q=""), "q: has 0 characters; 1 to 512"),
    (api("search", q=" \t "), "q: has 0 characters"),
    (api("search", q="a" * 513), "q: has 513 characters; 1 to 512 are possible"),
    (api("search", q="a\0b"), "q: holds control characters"),
    (api("search", q="a\x1b[31m"), "q: holds control characters"),
    ("/api/search?q=%ED%A0%80", "not UTF-8"),  # a lone surrogate
    ("/api/search?q=caf%E9", "not UTF-8"),
    ("/api/search?q=100%", "write %25"),
    ("/api/search?q=a&q=b", "given twice"),
    (api("search", q="a", how="magic"), "how: Input should be 'bm25', 'dual', 'late', 'cross' or 'hybrid'"),
    (api("search", q="a", k=0), "k: "),
    (api("search", q="a", k=101), "k: "),
    (api("search", q="a", k="1e9"), "k: "),
    (api("search", q="a", k="NaN"), "k: "),
    (api("search", q="a", k="9" * 5000), "k: "),
    (api("search", q="a", depth=5), "depth: unknown parameter"),
    (api("match", q="a"), "row: Field required"),
    (api("match", q="a", row=-1), "row: "),
    (api("match", q="a", row=40), "row: "),
    (api("match", q="a", row="1.5"), "row: "),
    (api("match", q="a", row=1, k=3), "k: unknown parameter"),
  ],
)
def test_what_is_out_of_bounds_is_refused_with_the_reason(path, says, port):
  found = get(port, path)
  assert found.status == 400
  assert found.content.keys() == {"error"}
  assert says in found.content["error"]


def test_the_bounds_themselves_are_allowed(port):
  assert len(get(port, api("search", q="a" * 512, k=100)).content["hits"]) == 40
  assert get(port, api("search", q="😀" * 512, how="bm25")).status == 200
  assert len(get(port, api("match", q="a", row=39)).content["query"]) >= 2


@pytest.mark.parametrize(
  "query",
  [HOSTILE, "' OR 1=1; --", "{{7*7}}${7*7}", "../../etc/passwd", "[SEP] [MASK] [PAD]", "\u202eevil\u200b", "中文"],
)
def test_hostile_queries_are_texts(query, port):
  for how in ("bm25", "dual", "cross"):
    assert get(port, api("search", q=query, how=how, k=1)).content["q"] == query
  assert get(port, api("match", q=query, row=7)).status == 200


@pytest.mark.parametrize(
  "path",
  [
    "/../setup.cfg",
    "/%2e%2e/setup.cfg",
    "/page/../serve.py",
    "/page.js/..%2f..%2fserve.py",
    "/docs",
    "/openapi.json",
    "//",
    "/api/",
  ],
)
def test_there_are_no_other_files(path, port):
  found = get(port, path)
  assert (found.status, found.content) == (404, {"error": "Not Found"})


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(method, port):
  found = get(port, api("search", q="a"), method)
  assert (found.status, found.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.", ""])
def test_another_name_for_this_address_is_refused(host, port):
  assert get(port, "/api/about", Host=host).status == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_this_machines_own_names_are_known(host, port):
  assert get(port, "/api/about", Host=host).status == 200


def test_which_names_an_address_has():
  for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
    assert host in serve.names(host)
    assert "*" not in serve.names(host)
  for host in ("0.0.0.0", "192.168.0.7", "::", "example.org"):
    assert serve.names(host) == ["*"]


def raw(port: int, content: bytes) -> bytes:
  """What comes back for bytes that are no HTTP client's."""
  with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
    with contextlib.suppress(ConnectionError):  # it hangs up while we still send
      connection.sendall(content)
    answer = b""
    with contextlib.suppress(ConnectionError):
      while part := connection.recv(65536):
        answer += part
  return answer


@pytest.mark.parametrize(
  "content",
  [
    b"GET /api/search?q=%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 2**20),
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"a" * 2**20),
    b"GET /api/search?q=\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/search?q=a\0b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1048576\r\n\r\n"
    + b"a" * 2**20,
  ],
)
def test_what_is_no_request_gets_a_4xx(content, port, caplog):
  assert re.match(rb"HTTP/1.1 4\d\d ", raw(port, content))
  assert "Traceback" not in caplog.text
  assert get(port, "/api/about").status == 200


def test_every_answer_keeps_other_sites_out(port):
  for path in ("/", "/page.js", "/api/about", api("search", q="a", k=1), api("search"), "/nowhere"):
    headers = get(port, path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_loads_nothing_from_elsewhere():
  for file in serve.PAGE.iterdir():
    content = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", content), file


# Load


def test_beyond_the_line_it_is_a_503():
  slow = Slow()
  with serving(slow, places=2) as port, ThreadPoolExecutor(8) as clients:
    first = clients.submit(get, port, api("search", q="first"))
    until(lambda: slow.asked)
    waiting = [clients.submit(get, port, api("search", q=f"waiting {i}")) for i in range(6)]
    until(lambda: sum(one.done() for one in waiting) == 4)
    assert get(port, "/api/about").status == 200  # meanwhile the service answers
    refused = [one.result() for one in waiting if one.done()]
    slow.let.set()
    for answer in refused:
      assert (answer.status, answer.content) == (503, {"error": "too many requests are waiting; try again"})
      assert int(answer.headers["Retry-After"]) > 0
    assert sorted(one.result().status for one in [first, *waiting]) == [200] * 3 + [503] * 4
  assert len(slow.asked) == 3
  assert slow.most == 1


def test_who_waits_too_long_gets_a_503():
  slow = Slow()
  with serving(slow, patience=0.2) as port, ThreadPoolExecutor(2) as clients:
    first = clients.submit(get, port, api("search", q="first"))
    until(lambda: slow.asked)
    late = get(port, api("search", q="late"))
    assert (late.status, late.content["error"]) == (503, "no answer within 0.2 seconds; try again")
    slow.let.set()
    assert first.result().status == 200
  assert slow.asked == ["first"]


def test_who_hangs_up_costs_no_search():
  slow = Slow()
  with serving(slow) as port, ThreadPoolExecutor(2) as clients:
    first = clients.submit(get, port, api("search", q="first"))
    until(lambda: slow.asked)
    with socket.create_connection(("127.0.0.1", port)) as connection:
      connection.sendall(b"GET /api/search?q=gone HTTP/1.1\r\nHost: localhost\r\n\r\n")
      time.sleep(0.2)
    last = clients.submit(get, port, api("search", q="last"))
    time.sleep(0.2)
    slow.let.set()
    assert (first.result().status, last.result().status) == (200, 200)
  assert slow.asked == ["first", "last"]


def test_an_answer_is_kept_and_the_oldest_forgotten(monkeypatch):
  monkeypatch.setattr(serve, "KEPT", 2)
  slow = Slow()
  slow.let.set()
  with serving(slow) as port:
    for query in ("a", "b", "a", "c", "a", "b"):
      get(port, api("search", q=query))
  assert slow.asked == ["a", "b", "c", "b"]


def test_at_the_end_who_works_is_answered_and_who_waits_is_sent_away():
  slow = Slow()
  with ThreadPoolExecutor(2) as clients:
    with serving(slow) as port:
      first = clients.submit(get, port, api("search", q="first"))
      until(lambda: slow.asked)
      second = clients.submit(get, port, api("search", q="second"))
      time.sleep(0.2)
      threading.Timer(0.5, slow.let.set).start()
    assert (first.result().status, second.result().status) == (200, 503)
  assert slow.asked == ["first"]


def test_an_error_of_the_searcher_is_told_without_its_words(caplog):
  class Broken(Slow):
    def search(self, *_):
      raise ValueError("/home/secret")

  class Wrong(Slow):
    def search(self, *_):
      raise config.UserError("no token vectors here")

  with serving(Broken()) as port:
    found = get(port, api("search", q="a"))
    assert (found.status, "secret" in found.content["error"]) == (500, False)
  assert "/home/secret" in caplog.text
  with serving(Wrong()) as port:
    found = get(port, api("search", q="a"))
    assert (found.status, found.content) == (400, {"error": "no token vectors here"})


# The command


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = str(taken.getsockname()[1])
    assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use; choose another" in capsys.readouterr().err
  for flags, says in ((["--port", "70000"], "--port 70000"), (["--host", "no.such.host.invalid"], "--host no.such")):
    assert main(["serve", str(tmp_path), *flags]) == 2
    assert says in capsys.readouterr().err
  assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 2
  assert "nowhere" in capsys.readouterr().err
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  assert main(["serve", str(tmp_path)]) == 2
  assert capsys.readouterr().err == "ernie-jax: serve: uvicorn is not installed; pip install 'ernie-jax[serve]'\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_and_ends_in_order(folder, number):
  command = [sys.executable, "-m", "ernie_jax", "serve", str(folder), "--port", "0"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
    said = service.stdout.readline()
    port = int(re.fullmatch(r"40 passages at http://127.0.0.1:(\d+)\n", said)[1])
    assert len(get(port, api("search", q="thread", how="cross", k=3)).content["hits"]) == 3
    service.send_signal(number)
    out, err = service.communicate(timeout=60)
  assert (service.returncode, out) == (128 + number, "")
  assert err.splitlines()[-1] == "ernie-jax: interrupted; give the same command again"
  assert "Traceback" not in err


# The page

FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
  found = (shutil.which(name) for name in ("chromium", "google-chrome", "chromium-browser"))
  path = os.environ.get("CHROMIUM") or next(filter(None, found), None)
  if path is None:
    pytest.skip("no Chromium is installed, and CHROMIUM names none")
  with playwright.sync_playwright() as running:
    browser = running.chromium.launch(executable_path=path, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def page(browser, port):
  """A page at the start; whatever it says on its console is an error."""
  page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
  said, elsewhere = [], []
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.on("request", lambda request: elsewhere.append(request.url) if f":{port}/" not in request.url else None)
  page.goto("/")
  yield page
  assert page.evaluate("window.hacked") is None
  assert not said
  assert not elsewhere
  page.close()


def rows(page, how: str) -> list[int]:
  return [int(card.get_attribute("data-row")) for card in page.query_selector_all(f"#{how} .hit")]


def ask(page, query: str) -> None:
  page.fill("#query", query)
  page.keyboard.press("Enter")
  for how in ("bm25", "dual", "late", "cross"):
    page.wait_for_selector(f"#{how} .hit")


def test_a_query_fills_four_rankings(page, port):
  ask(page, "thread queue")
  for how in ("bm25", "dual", "late", "cross"):
    hits = get(port, api("search", q="thread queue", how=how)).content["hits"]
    assert rows(page, how) == [hit["row"] for hit in hits]
    assert page.locator(f"#{how} .hit h3").all_text_contents() == [hit["title"] for hit in hits if hit["title"]]
    assert page.locator(f"#{how} .took").text_content()
  assert page.url.endswith("/?q=thread+queue")
  dual = [hit["row"] for hit in get(port, api("search", q="thread queue", k=100)).content["hits"]]
  moves = page.locator("#cross .move").all_text_contents()
  for i, (row, move) in enumerate(zip(rows(page, "cross"), moves, strict=True)):
    up = dual.index(row) - i
    assert move == (f"↑{up}" if up > 0 else f"↓{-up}" if up else "=")
  row = rows(page, "dual")[0]
  page.hover(f"#dual .hit[data-row='{row}']")
  same = page.locator(".hit.same")
  assert same.count() == sum(row in rows(page, how) for how in ("bm25", "dual", "late", "cross"))


def test_a_passage_opens_with_its_heat_map_and_back_closes_it(page, port):
  ask(page, "thread queue")
  row = rows(page, "late")[0]
  page.focus(f"#late .hit[data-row='{row}']")
  page.keyboard.press("Enter")
  page.wait_for_selector(".heat td.best")
  found = get(port, api("match", q="thread queue", row=row)).content
  cells = page.locator(".heat tbody td")
  assert cells.count() == len(found["query"]) * len(found["passage"])
  best = page.locator(".heat td.best").evaluate_all("cells => cells.map(cell => [cell.dataset.i, cell.dataset.j])")
  assert sorted([int(i), int(j)] for i, j in best) == [
    [i, int(np.argmax(s))] for i, s in enumerate(found["similarity"])
  ]
  page.hover(".heat td.best >> nth=0")
  assert f"{max(found['similarity'][0]):.3f}" in page.text_content("#tip").replace("−", "-")
  assert f"{found['score']:.3f}" in page.text_content(".sums tfoot").replace("−", "-")
  assert page.url.endswith(f"/?q=thread+queue&row={row}")
  page.go_back()
  page.wait_for_selector("#panel", state="hidden")
  assert page.url.endswith("/?q=thread+queue")
  page.go_back()
  page.wait_for_selector("#intro")
  page.go_forward()
  page.wait_for_selector("#cross .hit")
  assert page.input_value("#query") == "thread queue"


def test_a_shared_address_shows_the_same(page):
  page.goto("/?q=file+line&row=3")
  page.wait_for_selector(".heat td.best")
  assert page.input_value("#query") == "file line"
  page.keyboard.press("Escape")
  page.wait_for_selector("#panel", state="hidden")
  assert page.url.endswith("/?q=file+line")


def test_hostile_texts_are_shown_as_text(page, searcher):
  ask(page, "hostile thread")
  page.wait_for_selector("#bm25 .hit[data-row='7']")
  assert page.text_content("#bm25 .hit[data-row='7'] h3") == HOSTILE
  page.click("#bm25 .hit[data-row='7']")
  page.wait_for_selector(".heat td.best")
  assert page.text_content("#panel-title") == HOSTILE
  assert page.text_content(".passage") == f"{HOSTILE}\nhostile thread {HOSTILE}"  # the whole text, tinted or not
  page.goto(f"/?{urllib.parse.urlencode({'q': HOSTILE})}")
  page.wait_for_selector("#cross .hit")
  assert page.input_value("#query") == HOSTILE
  assert not page.locator("main img, main script, #panel img").count()


@pytest.mark.parametrize("row", [0, 7, 8, 13, 39])
def test_tokens_are_tinted_where_they_stand(page, port, row):
  """Tokens have lost case, accents and spaces; each is found in the text that it came of, and that stays whole."""
  page.goto(f"/?q=thread+Name{row}+hostile&row={row}")
  page.wait_for_selector("#cross .hit")
  page.wait_for_selector(".heat td.best")
  found = get(port, api("match", q=f"thread Name{row} hostile", row=row)).content
  spans = page.locator(".passage .token").evaluate_all(
    "spans => spans.map(s => [Number(s.dataset.token), s.textContent])"
  )
  plain = lambda text: "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
  shown: dict[int, str] = {}
  for i, text in spans:
    shown[i] = shown.get(i, "") + text
  assert list(shown) == sorted(shown)
  for i, token in enumerate(found["passage"]):
    if not re.fullmatch(r"\[\w+\]", token) and (i in shown or token != ":"):  # the template's, after a title
      assert plain(shown[i]) == token.removeprefix("##")


def test_a_word_of_no_passage_is_an_empty_ranking(page):
  page.fill("#query", "zzzz")
  page.keyboard.press("Enter")
  page.wait_for_selector("#bm25 .note")
  assert page.text_content("#bm25 .note") == "No passage has a word of this query."


def test_an_error_is_shown_and_can_be_tried_again(browser):
  slow = Slow()
  with serving(slow, places=0) as port:
    page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
    page.goto("/?q=a")
    for how in ("bm25", "dual", "late", "cross"):
      page.wait_for_selector(f"#{how} .note.bad")
    assert page.text_content("#dual .note p") == "Too many requests are waiting; try again."
    page.close()
