"""How fast one core makes batches, and how many of their tokens are real: padded rows, and packed ones.

  python benchmarks/loader.py                                  (docstrings of the installed packages)
  python benchmarks/loader.py --name jsonl --folder DIR        (DIR as benchmarks/corpora.py writes it)

Lists of 8 from the token store; the vocabulary is built from the corpus. Packed queries stand in the rows of passages,
and count there. Beside the rates, what one H200 needs: model FLOPs of the cascade with an ERNIE-base student and
cross-encoder, at the 790 TFLOP/s that its matrix products reach.
"""

import argparse
import dataclasses
import itertools
import os
import time

import numpy as np

from ernie_jax import batches, columns, config, cost, datasets, tokens

PEAK = 790e12
BASE = config.Architecture(vocabulary=30522, width=768, layers=12, heads=12, inner=3072)


def measure(texts: batches.Texts, data: config.Data, train: config.Train, turns: int) -> list[str]:
  """A line of the table."""
  layout = batches.layout(data, train, 1, texts)
  iterator = batches.batches(texts, data, train, 0, layout)
  next(iterator)
  tally = {tower: np.zeros(2) for tower in layout.count}
  begin, spent = time.perf_counter(), time.process_time()
  for batch in itertools.islice(iterator, turns):
    for tower in tally:
      rows = getattr(batch, tower)
      tally[tower] += np.count_nonzero(rows.segments), rows.segments.size
  passages = turns * train.batch * (1 + train.negatives)
  rate, cpu = passages / (time.perf_counter() - begin), passages / (time.process_time() - spent)
  waiting = len(iterator.get_state()["waiting"])
  work = cost.flops(BASE, BASE, config.Model(), train, data, layout.rows(train.batch))
  need = PEAK / work * train.batch * (1 + train.negatives)
  share = lambda tower: f"{100 * tally[tower][0] / tally[tower][1]:5.1f}" if tower in tally else "-"
  shares = [share(tower) for tower in ("queries", "passages", "pairs")]
  unit = str(layout.unit) if layout.packed else "-"
  return [str(data.pack or "-"), unit, *shares, f"{rate:,.0f}", f"{cpu:,.0f}", f"{need:,.0f}", str(waiting)]


def bound(sizes: np.ndarray, length: int) -> int:
  """Rows that any packing of whole texts needs at least: L2 of Martello and Toth (1990)."""
  best = 0
  for small in range(length // 2 + 1):
    alone = sizes[sizes > length - small]  # nothing of at least `small` tokens fits beside these
    large = sizes[(sizes > length // 2) & (sizes <= length - small)]  # no two of these share a row
    rest = sizes[(sizes >= small) & (sizes <= length // 2)].sum() - (len(large) * length - large.sum())
    best = max(best, len(alone) + len(large) + max(0, -(-int(rest) // length)))
  return best


def limits(texts: batches.Texts, data: config.Data, packs: list[int]) -> None:
  """The largest share of real tokens that packing allows, and what first-fit reaches.

  Of 8,192 passages with their queries, or pairs, packed as one.
  """
  rng, size = np.random.default_rng(0), batches.sizes(texts, data, together=True)
  drawn = [size(i, batches.choose(texts, i, 7, rng)) for i in rng.integers(len(texts.queries), size=1024).tolist()]
  for pack, (tower, longest) in itertools.product(
    packs, (("passages", data.passage_length), ("pairs", data.pair_length))
  ):
    length, sizes = -(-longest // pack) * pack, np.concatenate([own[tower] for own in drawn])
    places = batches.first_fit(sizes, length, len(sizes))
    rows = places.max() // length + 1
    shares = [sizes.sum() / length / n for n in (bound(sizes, length), rows)]
    print(f"{tower} in rows of {length}: at most {shares[0]:.1%}, first-fit {shares[1]:.1%}", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", default="docstrings")
  parser.add_argument("--folder", default="")
  parser.add_argument("--vocabulary", type=int, default=30522)
  parser.add_argument("--batch", type=int, default=64, help="queries")
  parser.add_argument("--chunks", type=int, nargs="+", default=[64, 8], help="queries that are packed together")
  parser.add_argument("--turns", type=int, default=50)
  parser.add_argument("--packs", type=int, nargs="+", default=[128, 256, 512])
  chosen = parser.parse_args()
  data = config.Data(name=chosen.name, folder=chosen.folder)
  dataset = datasets.load(data)
  tokenizer = tokens.Tokenizer.train(dataset.corpus.passages, chosen.vocabulary)
  store = lambda split: tokens.store(dataset, split, tokenizer, data)
  queries = dataset.queries["train"]
  texts = batches.Texts(
    store("train"), store("corpus"), dataset.corpus.identity, queries.positives, queries.negatives, tokenizer
  )
  if not queries.negatives.lengths.any():  # as after mining: 30 passages each
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(texts.passages), size=30) for _ in range(len(texts.queries))]
    texts = dataclasses.replace(texts, negatives=columns.ragged(drawn))
  lengths = texts.passages.lengths + 2
  print(
    f"{len(lengths)} passages; tokens with [CLS] and [SEP]: mean {lengths.mean():.0f}, percentiles 50, 90, 99: "
    f"{np.percentile(lengths, [50, 90, 99]).round()}"
  )
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  head = ["row", "unit", "real % queries", "passages", "pairs", "passages/s", "a CPU second", "an H200", "waiting"]
  print(" | ".join(head))
  for pack, chunk in [(None, chosen.chunks[0]), *itertools.product(chosen.packs, chosen.chunks)]:
    own = dataclasses.replace(data, pack=pack)
    train = config.Train(batch=chosen.batch, negatives=7, chunk=chunk)
    print(" | ".join(measure(texts, own, train, chosen.turns)), flush=True)
  limits(texts, data, chosen.packs)


if __name__ == "__main__":
  main()
