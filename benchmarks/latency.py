"""The vector of one query: our own dual-encoder beside its ONNX graph in ONNX Runtime, as a Markdown table.

  python benchmarks/latency.py runs/quickstart
  python benchmarks/latency.py runs/quickstart --queries FILE    (lines `id TAB query`; else the test split's)

Milliseconds from text to vector, and from tokens alone, query by query, the sides in turns. All have the same tokenizer
and template. ONNX Runtime's threads do not spin while they wait, as they would by default: they would take the cores
from the side that comes next. On a CPU ours has a thread for each core.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime

from ernie_jax import datasets, evaluate, graph, scores
from ernie_jax.search import Model
from ernie_jax.tokens import in_memory

THREADS = (1, 2)


def machine() -> str:
  info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
  name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
  load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
  return (
    f"{os.cpu_count()} cores of {name}, load {load}; jax {jax.__version__} on {jax.default_backend()}, "
    f"onnxruntime {onnxruntime.__version__}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run", type=Path, help="a finished run, or a model's folder")
  parser.add_argument("--queries", type=Path, help="lines `id TAB query`")
  parser.add_argument("--count", type=int, default=300, help="of queries")
  chosen = parser.parse_args()
  model = Model.load(chosen.run)
  template, student = model.template, model.student
  if chosen.queries:
    texts = list(evaluate.read_queries(chosen.queries).values())[: chosen.count]
  else:
    texts = list(datasets.load(template.data).queries["test"].texts[: chosen.count])

  def laid(text: str, length: int = 0):
    """Rows of one query, as long as it is unless told."""
    tokens = template.tokenizer.encode([text])[0]
    size = int(template.query_sizes(np.array([len(tokens)]))[0])
    return template.queries([template.query(tokens)], length or size)

  def feed(text: str) -> dict[str, np.ndarray]:
    rows = laid(text)
    own = {"input_ids": rows.tokens, "attention_mask": rows.segments > 0, "token_type_ids": rows.types}
    return {name: x.astype(np.int64) for name, x in own.items()}

  made = graph.dual(model.params["student"], model.settings, query=True).SerializeToString()

  def in_runtime(threads: int) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    return lambda own: session.run(None, own)[0]

  embed = jax.jit(lambda student, rows: scores.embed(student, model.settings, rows, None, True, late=False).vector)
  sides = {  # from a text to its tokens, laid out, and from these to the vector
    "ours, Model.encode": (
      lambda text: in_memory([text], template.tokenizer),
      lambda store: model.encode(store, query=True, late=False).vectors,
    ),
    "ours, the jitted function": (
      lambda text: laid(text, template.data.query_length),
      lambda rows: np.asarray(embed(student, rows)),
    ),
  }
  for threads in THREADS:
    sides[f"ONNX Runtime, {threads} thread{'s'[: threads - 1]}"] = (feed, in_runtime(threads))

  sizes = template.query_sizes(in_memory(texts, template.tokenizer).lengths)
  print(f"{len(texts)} queries of {sizes.min()} to {sizes.max()} tokens, median {np.median(sizes):.0f}; "
        f"a graph of {len(made) / 2**20:.0f} MiB\n{machine()}\n")  # fmt: skip
  # This also compiles.
  vectors = [np.concatenate([run(lay(text)) for text in texts]) for lay, run in sides.values()]
  difference = {side: np.abs(own - vectors[0]).max() for side, own in zip(sides, vectors)}
  if max(difference.values()) > 1e-4 * np.abs(vectors[0]).max():
    raise SystemExit(f"the vectors are not the same: {difference}")
  spent = {side: [] for side in sides}
  for text in texts:
    for side, (lay, run) in sides.items():
      begin = time.perf_counter()
      own = lay(text)
      ready = time.perf_counter()
      run(own)
      end = time.perf_counter()
      spent[side].append((end - begin, end - ready))
  print("| | text to vector, p50 | p90 | tokens to vector, p50 | p90 | largest difference |\n|---|---|---|---|---|---|")
  for side, seconds in spent.items():
    shown = 1000 * np.percentile(seconds, [50, 90], axis=0).T.ravel()
    print(f"| {side} | {' | '.join(f'{x:.2f} ms' for x in shown)} | {difference[side]:.1e} |")


if __name__ == "__main__":
  main()
