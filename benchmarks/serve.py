"""1,000 requests from 16 clients to `ernie-jax serve` over a run's folder: errors and times, as a Markdown table.

python benchmarks/serve.py runs/quickstart

Of 20 requests 9 are dual, 6 bm25, 3 late, 1 cross and 1 match. Each has a query of its own, eight words of some
passage: no answer is one that the service kept. A time is the client's, from request to the last byte, with the wait
for the others' requests; what stands beside it is the time that the searcher took.
"""

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np

from ernie_jax import collection

REQUESTS, CLIENTS = 1000, 16
MIXTURE = ["dual"] * 9 + ["bm25"] * 6 + ["late"] * 3 + ["cross", "match"]

folder = Path(sys.argv[1])
rng = random.Random(0)
described = folder / "model" / "model.json"  # of a run; else the folder is a collection
own = folder / json.loads(described.read_text())["about"]["corpus"] if described.is_file() else folder
texts = collection.load(own).passages.texts


def request(i: int) -> tuple[str, str]:
  """Kind and path of a request."""
  kind = MIXTURE[i % len(MIXTURE)]
  row = rng.randrange(len(texts))
  words = texts[row].replace("\0", " ").split()
  begin = rng.randrange(max(1, len(words) - 8))
  query = f"{' '.join(words[begin : begin + 8])[:400]} {i}"
  if kind == "match":
    return kind, "/api/match?" + urllib.parse.urlencode({"q": query, "row": row})
  return kind, "/api/search?" + urllib.parse.urlencode({"q": query, "how": kind, "k": 10})


requests = [request(i) for i in range(REQUESTS)]
rng.shuffle(requests)
todo = iter(requests)
turn = threading.Lock()
done: list[tuple[str, int, float, float]] = []  # kind, status, seconds of the client and of the searcher


def client(host: str) -> None:
  connection = http.client.HTTPConnection(host, timeout=120)
  while True:
    with turn:
      kind, path = next(todo, ("", ""))
    if not kind:
      return
    begin = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    seconds = time.perf_counter() - begin
    own = json.loads(content)["seconds"] if answer.status == 200 else 0.0
    done.append((kind, answer.status, seconds, own))


with subprocess.Popen(
  [sys.executable, "-m", "ernie_jax", "serve", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True
) as service:
  assert service.stdout
  said = next(line for line in service.stdout if "http://" in line)
  host = said.split("http://")[1].strip()
  print(said.strip(), file=sys.stderr)
  begin = time.perf_counter()
  clients = [threading.Thread(target=client, args=(host,)) for _ in range(CLIENTS)]
  for one in clients:
    one.start()
  for one in clients:
    one.join()
  wall = time.perf_counter() - begin
  service.send_signal(signal.SIGINT)

print("| kind | requests | errors | p50 | p95 | p99 | longest | searcher's p50 |\n|---|---|---|---|---|---|---|---|")
for kind in [*dict.fromkeys(MIXTURE), "all"]:
  own = [row for row in done if kind in (row[0], "all")]
  errors = sum(status != 200 for _, status, _, _ in own)
  times = [*np.percentile([seconds for _, _, seconds, _ in own], [50, 95, 99, 100])]
  times.append(np.median([seconds for _, _, _, seconds in own]))
  print(f"| {kind} | {len(own)} | {errors} | {' | '.join(f'{seconds:.3f} s' for seconds in times)} |")
lost = REQUESTS - len(done)
print(f"\n{REQUESTS / wall:.1f} requests a second, {wall:.0f} s in all; {lost} without an answer")
sys.exit(lost + sum(status != 200 for _, status, _, _ in done) > 0)
