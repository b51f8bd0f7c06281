"""ERNIE-Search's two models at their released sizes, of random weights, read from files: ours beside float64.

  python benchmarks/parity.py        (3 GB of disk, 8 GB of memory)

The dual-encoder is ERNIE 2.0 base, the cross-encoder ERNIE 2.0 large, both in PaddleNLP's files under the names that
they were released with; nothing but their values is made up. Each is read in a process of its own, which tells its
seconds and its peak of memory and scores texts of 32 and 128 tokens; the reference is the documented model in NumPy.
The last column is the control: the reference with the epsilon that the configuration says, which is another model.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import released

NAMES = {
  "dual": ("ernie-search-base-dual-encoder-marco-en", released.ERNIE_2_BASE),
  "cross": ("ernie-search-large-cross-encoder-marco-en", released.ERNIE_2_LARGE),
}
LENGTHS = {"query": 32, "passage": 128}
COUNT = 3  # queries, and passages


def weights(kind: str) -> released.Weights:
  """Embeddings of the deviation that models begin with, and kernels of a trained one's."""
  _, shape = NAMES[kind]
  found = released.encoder(shape, 0, embedding=0.02, kernel=0.05)
  return found | released.linear("classifier", shape.width, 2 if kind == "dual" else 1, 1, kernel=0.05)


def write(kind: str, folder: Path) -> Path:
  """The model's folder."""
  name, shape = NAMES[kind]
  inside = ("embeddings.", "encoder.", "pooler.")
  arrays = {("ernie." if own.startswith(inside) else "") + own: x for own, x in weights(kind).items()}
  vocabulary = [*released.SPECIAL, *(f"w{i}" for i in range(shape.vocabulary - len(released.SPECIAL)))]
  return released.paddlenlp(folder / name, arrays, released.settings(shape), vocabulary)


def texts() -> dict[str, list[tuple[list[int], list[int]]]]:
  """Tokens and types of queries, of passages with titles, and of all their pairs."""
  rng = np.random.default_rng(2)
  words = lambda count: rng.integers(5, released.ERNIE_2_BASE.vocabulary, (COUNT, count)).tolist()
  cls, sep = (released.SPECIAL.index(token) for token in ("[CLS]", "[SEP]"))
  join = lambda a, b: ([cls, *a, sep, *b, sep], [0] * (len(a) + 2) + [1] * (len(b) + 1))
  queries, titles, bodies = words(30), words(5), words(120)
  return {
    "query": [([cls, *q, sep], [0] * 32) for q in queries],
    "passage": [join(t, b) for t, b in zip(titles, bodies)],
    "pair": [join(q, t + b) for q in queries for t, b in zip(titles, bodies)],
  }


def peak() -> float:
  """GiB of memory that this process has held at once."""
  lines = Path("/proc/self/status").read_text().splitlines()  # getrusage tells the parent's, where that held more
  return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def work(kind: str, folder: Path, output: Path) -> None:
  """Reads a model by the import path and scores the texts."""
  import jax

  from ernie_jax import config, hub, pretrained, scores, step, tokens
  from ernie_jax.encoder import Rows

  before, start = peak(), time.perf_counter()
  found = pretrained.load(*hub.locate(str(folder), folder), teacher=kind == "cross")
  read, held = time.perf_counter() - start, peak()
  a = found.read_with(tokens.Tokenizer.load(found.directory))
  model = config.Model(share_encoder=True, **found.model)
  params, _ = pretrained.assign(step.init_params(model, a, a, jax.random.key(0)), found, found)
  jax.block_until_ready(params)
  about = {"read": read, "params": time.perf_counter() - start, "before": before, "held": held, "peak": peak()}
  about |= {"notes": found.notes, "epsilon": a.epsilon}

  def rows(own) -> Rows:
    ids, types = (np.array([text[i] for text in own], np.int32) for i in (0, 1))
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return Rows(ids, np.ones_like(ids), places, types)

  if kind == "cross":
    logits = jax.jit(lambda params, rows: scores.cross(params, rows, None, leads=True)[0])
    arrays = {"pair": np.asarray(logits(params, rows(texts()["pair"])))}
  else:
    vector = jax.jit(lambda student, rows: scores.embed(student, model, rows, None, False, late=False).vector)
    arrays = {own: np.asarray(vector(params["student"], rows(texts()[own]))) for own in LENGTHS}
  np.savez(output, about=json.dumps(about), **arrays)


def compare(what: str, found: np.ndarray, exact: np.ndarray, other: np.ndarray) -> None:
  difference, size = np.abs(found - exact).max(), np.abs(exact).max()
  spread = exact.std()
  print(f"{what:30} {size:10.3f} {spread:10.3f} {difference:12.1e} {difference / size:12.1e} "
        f"{np.abs(other - exact).max():20.1e}", flush=True)  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
  chosen = parser.parse_args()
  if chosen.side:
    kind, folder, output = chosen.side
    return work(kind, Path(folder), Path(output))
  lines = Path("/proc/cpuinfo").read_text().splitlines()
  model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
  print(f"{model}, {os.cpu_count()} processors, {memory:.0f} GiB, Python {platform.python_version()}\n")
  found = {}
  with tempfile.TemporaryDirectory() as place:
    print(f"{'':6} {'file GiB':>8} {'read s':>7} {'and as parameters s':>19} {'peak GiB: begin':>15} {'read':>5} "
          f"{'parameters':>10}", flush=True)  # fmt: skip
    for kind in NAMES:
      folder = write(kind, Path(place))
      size = (folder / "model_state.pdparams").stat().st_size / 2**30
      output = Path(place) / f"{kind}.npz"
      subprocess.run([sys.executable, __file__, "--side", kind, str(folder), str(output)], check=True)
      found[kind] = dict(np.load(output))
      about = json.loads(str(found[kind]["about"]))
      print(f"{kind:6} {size:8.2f} {about['read']:7.1f} {about['params']:19.1f} {about['before']:15.2f} "
            f"{about['held']:5.2f} {about['peak']:10.2f}   epsilon {about['epsilon']:g}; {'; '.join(about['notes'])}",
            flush=True)  # fmt: skip
  print(f"\n{'':30} {'largest':>10} {'deviation':>10} {'difference':>12} {'relative':>12} {'with epsilon 1e-12':>20}")
  own, shape = weights("dual"), NAMES["dual"][1]
  exact = {part: [released.dual(own, shape, texts()[part], e) for e in (1e-5, 1e-12)] for part in LENGTHS}
  for part, length in LENGTHS.items():
    compare(f"{part} vectors, {length} tokens", found["dual"][part], *exact[part])
  q, p = found["dual"]["query"], found["dual"]["passage"]
  compare("dot products", q @ p.T, *(a @ b.T for a, b in zip(exact["query"], exact["passage"])))
  own, shape = weights("cross"), NAMES["cross"][1]
  logits = [released.cross(own, shape, texts()["pair"], pooler=True, epsilon=e)[:, 0] for e in (1e-5, 1e-12)]
  compare(f"logits, {len(texts()['pair'][0][0])} tokens", found["cross"]["pair"], *logits)


if __name__ == "__main__":
  main()
