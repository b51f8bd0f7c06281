"""Exact search beside FAISS Flat on the same vectors, in turns; and its memory where the corpus lies on disk.

  python benchmarks/search.py
  python benchmarks/search.py --memory       (1,000,000 x 768 in a file, 1,000 queries, the best 1,000)

Vectors are clustered: each is one of some thousand centres with noise around it, of length 1.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ernie_jax import topk


def vectors(count: int, width: int, seed: int = 0, out: np.ndarray | None = None) -> np.ndarray:
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(9).standard_normal((4096, width), dtype=np.float32)
  made = np.empty((count, width), np.float32) if out is None else out
  for begin in range(0, count, 65536):
    part = centres[rng.integers(len(centres), size=min(65536, count - begin))]
    part += rng.standard_normal(part.shape, dtype=np.float32)
    made[begin : begin + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
  return made


def speed(count: int, width: int, queries: int, rounds: int) -> None:
  import faiss

  corpus, asked = vectors(count, width), vectors(queries, width, 1)
  flat = faiss.IndexFlatIP(width)
  flat.add(corpus)
  print(f"{count:,} x {width}, {queries} queries, {rounds} rounds; milliseconds a query")
  print(f"{'k':>5} {'ours':>8} {'FAISS':>8} {'ratio':>6}  {'ours, cpu':>9} {'FAISS, cpu':>10} {'ratio':>6}  same rows")
  for k in (10, 100, 1000):
    sides = {"ours": lambda k=k: topk.top_k(asked, corpus, k)[1], "theirs": lambda k=k: flat.search(asked, k)[1]}
    found = {side: run() for side, run in sides.items()}  # compiles
    spent = {side: np.zeros(2) for side in sides}
    for _ in range(rounds):
      for side, run in sides.items():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        spent[side] += time.perf_counter() - wall, time.process_time() - cpu
    a, b = (1000 * spent[side] / rounds / queries for side in sides)
    same = np.mean(found["ours"] == found["theirs"])
    print(f"{k:5} {a[0]:8.2f} {b[0]:8.2f} {b[0] / a[0]:6.2f}  {a[1]:9.2f} {b[1]:10.2f} {b[1] / a[1]:6.2f}  {same:.4f}",
          flush=True)  # fmt: skip


def resident() -> dict[str, float]:
  """GiB of this process: its own memory, and pages of files that it has read, which the system takes back at will."""
  lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
  return {name: int(lines[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile", "VmHWM")}


def memory(count: int, width: int, queries: int, k: int) -> None:
  with tempfile.TemporaryDirectory() as place:
    path = Path(place) / "vectors.npy"
    made = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    vectors(count, width, out=made)
    made.flush()
    del made
    corpus, asked = np.load(path, mmap_mode="r"), vectors(queries, width, 1)
    before = resident()
    start = time.perf_counter()
    topk.top_k(asked, corpus, k)
    after = resident()
    size = count * width * 4 / 2**30
    print(
      f"{count:,} x {width} ({size:.2f} GiB on disk), {queries} queries, k={k}: {time.perf_counter() - start:.1f} s"
    )
    print(f"largest resident set {after['VmHWM']:.2f} GiB, of it before the search {before['RssAnon']:.2f} GiB; "
          f"corpus + {after['VmHWM'] - size:.2f} GiB")  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--memory", action="store_true")
  parser.add_argument("--count", type=int, default=1_000_000)
  parser.add_argument("--queries", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=3)
  chosen = parser.parse_args()
  if chosen.memory:
    memory(chosen.count, 768, 1000, 1000)
  else:
    speed(chosen.count, 384, chosen.queries, chosen.rounds)


if __name__ == "__main__":
  main()
