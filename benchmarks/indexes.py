"""Indexes over an encoded corpus beside exact search: time and size of each, and how many of the top 10 are the same.

  ernie-jax encode runs/quickstart --output encoded
  ernie-jax encode runs/quickstart --texts test --output queries
  python benchmarks/indexes.py encoded queries

Unlike the recall that `ernie-jax index` prints, which asks for passages, these are real queries.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ernie_jax import collection, index, topk


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("encoded", type=Path)
  parser.add_argument("queries", type=Path)
  chosen = parser.parse_args()
  corpus, asked = collection.load(chosen.encoded), collection.load(chosen.queries).vectors[:]
  p = corpus.passages
  content = index.Content(corpus.vectors, p.ids, p.titles, p.texts, {k: corpus.about[k] for k in ("model", "corpus")})
  exact = topk.top_k(asked, corpus.vectors, 10)[1]
  print(f"{len(corpus.vectors):,} passages, {len(asked)} queries, top 10")
  print(f"{'index':12} {'build s':>8} {'ms/query':>9} {'parameter':>10} {'same passages':>14} {'same order':>11}")
  with tempfile.TemporaryDirectory() as place:
    for name in ("flat", "hnsw", "ivfpq", f"milvus:{place}/lite.db"):
      start = time.perf_counter()
      built = index.build(name, Path(place), content)
      took = time.perf_counter() - start
      built.search(asked, 10)
      start = time.perf_counter()
      found = built.search(asked, 10)[1]
      each = 1000 * (time.perf_counter() - start) / len(asked)
      same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist())])
      shown = f"{built.parameter} {built.about['setting']}" if built.parameter else "-"
      print(f"{name.split(':')[0]:12} {took:8.1f} {each:9.2f} {shown:>10} {same:14.4f} {np.mean(found == exact):11.4f}",
            flush=True)  # fmt: skip


if __name__ == "__main__":
  main()
