"""Hard negatives: that denoised ones on the docstrings hold no passage with the query's summary; time and memory.

  ernie-jax mine runs/quickstart --last 30 --denoise 0.1 --margin None
  python benchmarks/mining.py check runs/quickstart negatives.trec
  python benchmarks/mining.py scale --folder /tmp/vectors --passages 1000000 --queries 2000 --last 200

`check` reads the summaries of passages from the source files again: not from the data set, whose positives they made.
Beside exact equality it counts, among all negatives, passages that the data set calls positive, and those whose text
has the query's words in it, one after the other. Exit code 1 if a passage of the sample has the query's summary.
`scale` mines on clustered unit vectors in a file; it reports the peak of the process without pages of that file.
"""

import argparse
import collections
import random
import resource
import threading
import time
from pathlib import Path

import numpy as np

from ernie_jax import collection, columns, config, datasets, evaluate, mining, topk
from ernie_jax.datasets import docstrings
from ernie_jax.search import Searcher

WIDTH = 384


def check(directory: Path, negatives: Path, count: int, seed: int) -> bool:
  searcher = Searcher(directory)
  data = datasets.load(searcher.data)
  print(f"docstrings {data.fingerprint}, {len(data.corpus.ids):,} passages, student {searcher.corpus.about['model']}")
  files = [file for package in searcher.data.packages for file in docstrings.sources(package)]
  docs = docstrings.name_docs(docstrings.parse(files)[0])
  summary = {doc.name: docstrings.normalise(docstrings.divide(doc.text)[0]) for doc in docs}
  queries = data.queries["train"]
  asked = dict(zip(queries.ids, map(docstrings.normalise, queries.texts)))
  positives = {query: own.keys() for query, own in data.qrels("train").items()}
  text = dict(zip(data.corpus.ids, data.corpus.texts))
  pairs = [(query, pid) for query, own in evaluate.read_run(negatives).items() for pid in own]
  same = lambda some: sum(summary[pid] == asked[query] for query, pid in some)
  said = set(asked.values())
  print(f"{sum(summary[pid] in said for pid in text):,} passages have a training query's summary")
  by_summary = collections.defaultdict(set)
  for pid in text:
    by_summary[summary[pid]].add(pid)
  unlabelled = [(query, pid) for query, own in positives.items() for pid in by_summary[asked[query]] - own]
  print(f"passages with a query's summary that are not its positives: {len(unlabelled)} {unlabelled[:5]}")
  sample = random.Random(seed).sample(pairs, count)
  print(f"of {len(sample)} sampled negatives, {same(sample)} have the query's normalised summary")
  print(f"of all {len(pairs):,}, {same(pairs)}; {sum(pid in positives[query] for query, pid in pairs)} are positives")
  inside = [(q, pid) for q, pid in pairs if f" {asked[q]} " in f" {docstrings.normalise(text[pid])} "]
  print(f"with the query's words in the passage's text: {len(inside)} of all {inside[:5]}")
  return not same(sample)


def scale(folder: Path, passages: int, queries: int, last: int, seed: int) -> None:
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(4096, WIDTH)).astype(np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  near = lambda count: unit(centres[rng.integers(len(centres), size=count)] + rng.normal(size=(count, WIDTH)))
  begins = collection.shards(passages)
  (folder / "vectors").mkdir(parents=True, exist_ok=True)
  files = [collection.shard(folder, "vectors", i) for i in range(len(begins) - 1)]
  for file, begin, end in zip(files, begins, begins[1:]):
    collection.save(file, near(end - begin).astype(np.float32))
  vectors, asked = collection.Shards(files, begins), near(queries).astype(np.float32)
  identity = np.arange(passages, dtype=np.int32)
  # The known positive is the passage that ranks first: it stands in the way.
  positives = columns.ragged(list(topk.top_k(asked, vectors, 1)[1].astype(np.int32)))
  with Anonymous() as memory:
    start = time.monotonic()
    settings, order = config.Mine(1, last), rng.permutation(passages)
    _, rows, dropped = mining.mine(asked, vectors, positives, identity, settings, rng, order=order)
    seconds = time.monotonic() - start
  assert (rows >= 0).all()
  rate = queries * passages / seconds
  print(f"{passages:,} passages of {WIDTH} numbers, {queries:,} queries, ranks 1 to {last}; dropped: {dict(dropped)}")
  print(f"{seconds:.1f} s: {queries / seconds:.0f} queries/s, {rate / 1e6:.0f} million scores/s")
  print(f"{2 * WIDTH * rate / 1e9:.0f} GFLOP/s; peak without file pages {memory.peak / 2**20:.0f} MiB")
  print(
    f"largest resident set, file pages included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
  )


class Anonymous:
  """The largest anonymous memory of this process, looked at ten times a second."""

  def __enter__(self) -> "Anonymous":
    self.peak, self.over = 0, threading.Event()
    self.thread = threading.Thread(target=self.look)
    self.thread.start()
    return self

  def look(self) -> None:
    while not self.over.wait(0.1):
      lines = Path("/proc/self/status").read_text().splitlines()
      self.peak = max(self.peak, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

  def __exit__(self, kind, value, trace) -> None:
    self.over.set()
    self.thread.join()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  verbs = parser.add_subparsers(required=True, dest="verb")
  own = verbs.add_parser("check")
  own.add_argument("directory", type=Path)
  own.add_argument("negatives", type=Path)
  own.add_argument("--count", type=int, default=100)
  own.add_argument("--seed", type=int, default=0)
  own = verbs.add_parser("scale")
  own.add_argument("--folder", type=Path, required=True)
  own.add_argument("--passages", type=int, default=1_000_000)
  own.add_argument("--queries", type=int, default=2000)
  own.add_argument("--last", type=int, default=200)
  own.add_argument("--seed", type=int, default=0)
  chosen = parser.parse_args()
  if chosen.verb == "scale":
    scale(chosen.folder, chosen.passages, chosen.queries, chosen.last, chosen.seed)
  elif not check(chosen.directory, chosen.negatives, chosen.count, chosen.seed):
    raise SystemExit(1)


if __name__ == "__main__":
  main()
