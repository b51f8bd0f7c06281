"""Time of the training step with padded and with packed rows, side by side in one interleaved run.

  python benchmarks/packing.py                                  (docstrings of the installed packages)
  python benchmarks/packing.py --name jsonl --folder DIR        (DIR as benchmarks/corpora.py writes it)

The cascade without DualReg, random weights of the given shape, lists of 4. Loss and gradients are the same (tests).
Process time counts all cores: on a shared CPU it varies less than wall time.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from ernie_jax import batches, columns, config, datasets, mesh, step, tokens


class Runner:
  """A step and its data."""

  def __init__(self, texts: batches.Texts, data: config.Data, train: config.Train, a: config.Architecture):
    model = config.Model(dropout=0.0, scan=False, scratch=a)
    self.layout = batches.layout(data, train, 1, texts)
    self.iterator = batches.batches(texts, data, train, 0, self.layout)
    params = step.init_params(model, a, a, jax.random.key(0))
    self.state = step.init_state(mesh.whole(params, mesh.make()), model, train)
    self.step, self.spent = step.make_train_step(model, train), []

  def __call__(self) -> None:
    batch = mesh.shard(next(self.iterator), mesh.make())
    cpu, wall = time.process_time(), time.perf_counter()
    self.state, logs = self.step(self.state, batch, jax.random.key(0))
    float(logs["total"])
    self.spent.append((time.process_time() - cpu, time.perf_counter() - wall))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", default="docstrings")
  parser.add_argument("--folder", default="")
  parser.add_argument("--lengths", type=int, nargs=2, default=[32, 128], help="of queries and passages")
  parser.add_argument("--packs", type=int, nargs="+", default=[128, 256])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--turns", type=int, default=8)
  chosen = parser.parse_args()
  data = config.Data(
    name=chosen.name, folder=chosen.folder, query_length=chosen.lengths[0], passage_length=chosen.lengths[1]
  )
  dataset = datasets.load(data)
  tokenizer = tokens.Tokenizer.train(dataset.corpus.passages, 30522)
  store = lambda split: tokens.store(dataset, split, tokenizer, data)
  queries, none = dataset.queries["train"], columns.ragged([np.zeros(0, int)] * len(dataset.queries["train"].ids))
  texts = batches.Texts(store("train"), store("corpus"), dataset.corpus.identity, queries.positives, none, tokenizer)
  a = config.Architecture(
    len(tokenizer), chosen.width, chosen.layers, chosen.width // 32, 4 * chosen.width, special=tokenizer.special
  )
  train = config.Train(
    batch=chosen.batch, negatives=3, weights=dataclasses.replace(config.Weights(), dualreg_query=0, dualreg_passage=0)
  )
  with jax.set_mesh(mesh.make(jax.devices()[:1])):
    runners = {pack: Runner(texts, dataclasses.replace(data, pack=pack), train, a) for pack in (None, *chosen.packs)}
    for _ in range(chosen.turns + 1):
      for runner in runners.values():
        runner()
  print("row | rows of passages | rows of pairs | tokens computed | CPU s a step (median) | ratio | wall s | ratio")
  base = None
  for pack, runner in runners.items():
    runner.iterator.close()
    rows = runner.layout.rows(train.batch)
    spent = np.median(runner.spent[1:], axis=0)  # the first turn compiles
    base = spent if base is None else base
    shapes = [f"{rows[tower][0]} x {rows[tower][1]}" for tower in ("passages", "pairs")]
    tokens_ = sum(n * length for n, length in rows.values())
    line = [str(pack or "-"), *shapes, f"{tokens_:,}"]
    line += [x for now, then in zip(spent, base) for x in (f"{now:.2f}", f"{now / then:.2f}")]
    print(" | ".join(line), flush=True)


if __name__ == "__main__":
  main()
