"""Passages encoded a second, beside sentence-transformers with the same weights: two processes that take turns.

  python benchmarks/encode.py [--dtype mixed]        (needs `pip install -e .[interop]`)

all-MiniLM-L6-v2, mean pooling, theirs in float32, ours in `--dtype`, the passages of docstrings in their own order,
from text to vector: both tokenise and sort by length themselves. Each process encodes the same block in turn, while the
other one waits. Seconds of the processor count beside the wall clock's: on shared cores they are the steadier.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ernie_jax import config, hub, pretrained


def passages(count: int) -> list[str]:
  from ernie_jax import datasets

  return datasets.load(config.Data()).corpus.passages[:count]


def ours(directory: Path, length: int, dtype: Any):
  import jax

  from ernie_jax import mesh, retrieval, step, templates, tokens

  checkpoint = pretrained.load(directory, "")
  tokenizer = tokens.Tokenizer.load(directory)
  model = config.Model(pooling="mean", cosine=True, late_width=None, scan=False, dtype=dtype)
  shapes = (checkpoint.architecture,) * 2
  params, _ = pretrained.assign(step.init_params(model, *shapes, jax.random.key(0)), checkpoint, None)
  template = templates.Template(tokenizer, config.Data(passage_length=length))

  def encode(texts: list[str]) -> np.ndarray:
    store = tokens.in_memory(texts, tokenizer)
    with jax.set_mesh(mesh.make()):
      found = retrieval.encode(params["student"], model, store, template, query=False, late=False, progress="")
    return found.vectors

  return encode


def theirs(directory: Path, length: int):
  from sentence_transformers import SentenceTransformer, models

  body = models.Transformer(str(directory), max_seq_length=length)
  parts = [body, models.Pooling(body.get_word_embedding_dimension(), "mean"), models.Normalize()]
  return SentenceTransformer(modules=parts, device="cpu").encode


def work(side: str, directory: Path, length: int, dtype: Any, count: int, block: int, out: Path) -> None:
  """Encodes a block whenever a line comes in, and says the seconds: wall clock, processor."""
  encode = ours(directory, length, dtype) if side == "ours" else theirs(directory, length)
  texts = passages(count)
  encode(texts[:block])  # compiles, and fills caches
  np.save(out / f"{side}.npy", encode(texts[:256]))
  print("ready", flush=True)
  for line in sys.stdin:
    begin = int(line)
    wall, cpu = time.perf_counter(), time.process_time()
    encode(texts[begin : begin + block])
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
  parser.add_argument("--passages", type=int, default=2048)
  parser.add_argument("--block", type=int, default=512)
  parser.add_argument("--dtype", choices=config.PRODUCTS, default="float32")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
  chosen = parser.parse_args()
  directory, _ = hub.locate(hub.MINILM, Path(config.Data().cache).expanduser())
  if chosen.side:
    return work(chosen.side, directory, chosen.lengths[0], chosen.dtype, chosen.passages, chosen.block, chosen.out)
  count = len(passages(chosen.passages))  # prepared before both read it
  print(f"{'tokens':>6}  {'ours /s':>8} {'theirs /s':>9} {'ratio':>6}  {'ours /cpu s':>11} {'theirs /cpu s':>13} "
        f"{'ratio':>6}  {'largest difference':>18}")  # fmt: skip
  for length in chosen.lengths:
    with tempfile.TemporaryDirectory() as out:
      command = [sys.executable, __file__, "--lengths", str(length), "--out", out, "--passages", str(count)]
      command += ["--block", str(chosen.block), "--dtype", chosen.dtype, "--side"]
      pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
      sides = {side: subprocess.Popen([*command, side], **pipes) for side in ("ours", "theirs")}
      for child in sides.values():
        while (line := child.stdout.readline()) and line != "ready\n":
          pass
      spent = {side: np.zeros(2) for side in sides}
      blocks = range(0, count - chosen.block + 1, chosen.block)
      for begin in blocks:
        for side, child in sides.items():
          child.stdin.write(f"{begin}\n")
          child.stdin.flush()
          spent[side] += [float(x) for x in child.stdout.readline().split()]
      for child in sides.values():
        child.stdin.close()
        child.wait()
      difference = np.abs(np.load(f"{out}/ours.npy") - np.load(f"{out}/theirs.npy")).max()
    done = len(blocks) * chosen.block
    a, b = (done / spent[side] for side in ("ours", "theirs"))
    print(f"{length:6}  {a[0]:8.1f} {b[0]:9.1f} {a[0] / b[0]:6.2f}  {a[1]:11.1f} {b[1]:13.1f} {a[1] / b[1]:6.2f}  "
          f"{difference:18.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
  main()
