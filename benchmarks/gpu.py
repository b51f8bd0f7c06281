"""The training step and encoding on a GPU beside PyTorch's and sentence-transformers', in one interleaved run.

  python benchmarks/gpu.py [--steps dual cascade] [--queries 64] [--passages 8]
  python benchmarks/gpu.py --layers 2 --width 64 --queries 4 --passages 2 --vocabulary 500        (a CPU: does it run?)

ERNIE-base's shape for student and cross-encoder, MS MARCO's lengths, random texts, bfloat16, no dropout. Ours has a row
for each text, or packed rows; PyTorch's is peers.py under autocast and `torch.compile`; sentence-transformers' loss is
on the dual-encoder alone. First losses, gradient norms and vectors must agree. MFU is of real tokens, over the peak of
a large product of random bfloat16 matrices on this machine (of ones it is faster). Memory is the most that was held, by
each framework's own count, of which ours covers all its sides before.
"""

import argparse
import importlib.util
import os
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too

import jax
import jax.numpy as jnp
import numpy as np
import steps

from ernie_jax import cost, mesh, scores
from ernie_jax.config import Architecture, Data, Model, Temperatures, Train, Weights

DATA = Data(query_length=32, passage_length=128)
TEMPERATURE = Temperatures(dual=0.05, late=0.5)
WEIGHTS = {"dual": Weights.only(nll_de=1), "cascade": Weights(dualreg_query=0, dualreg_passage=0)}
PACK = 256  # tokens of a packed row
SAME = 0.99  # least cosine between two sides' vectors of a passage, in bfloat16
AHEAD = 4  # steps given to the device before one is waited for: in training the next is given before one is read


def peak(size: int) -> float:
  """FLOP/s of a product of two bfloat16 matrices, the best of some."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  best = np.inf
  for _ in range(5):
    begin = time.perf_counter()
    for _ in range(8):
      found = product(x)
    found.block_until_ready()
    best = min(best, (time.perf_counter() - begin) / 8)
  return 2 * size**3 / best


def held(side: str) -> float:
  """GiB that the framework has held at once; nan where it does not say."""
  if side.startswith("ours"):
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", np.nan) / 2**30
  import torch

  return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else np.nan


def runner(side: str, model: Model, train: Train, a: Architecture, texts: steps.Texts, compiled: bool) -> Any:
  """The step on that side."""
  params = steps.parameters(model, a, a)
  if side.startswith("ours"):
    return steps.Runner(model, train, params, texts.batch(PACK if side == "ours, packed" else None))
  import peers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
  if side == "sentence-transformers":
    return peers.SentenceTransformers(params, train, texts.batch(), device, autocast=True)
  return peers.Runner(params, train, texts.batch(), device, autocast=True, compiled=compiled)


def encoders(model: Model, a: Architecture, texts: steps.Texts) -> dict[str, Any]:
  """Functions that encode all passages to vectors on the host, by side."""
  params = mesh.whole(steps.parameters(model, a, a), mesh.make(jax.devices()[:1]))
  embed = jax.jit(lambda params, rows: scores.embed(params["student"], model, rows, None, False, late=False).vector)
  packs = {"ours, padded": None, "ours, packed": PACK}
  made = {side: steps.rows(texts.passages, DATA.passage_length, pack) for side, pack in packs.items()}
  rows = jax.tree.map(jnp.asarray, made)
  found = {side: (lambda own=own: np.asarray(embed(params, own))) for side, own in rows.items()}
  if importlib.util.find_spec("torch"):
    import peers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bert = peers.bert(params["student"].encoder).to(device).eval()
    text = peers.Text(texts.batch().passages, (), device)

    def theirs() -> np.ndarray:
      with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        return (
          peers.mean(bert(text.tokens, text.mask, text.types).last_hidden_state.float(), text).float().cpu().numpy()
        )

    found["torch"] = theirs
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
  parser.add_argument("--rows", nargs="+", choices=("padded", "packed"), default=["padded", "packed"], help="ours")
  parser.add_argument("--queries", type=int, default=64)
  parser.add_argument("--passages", type=int, default=8, help="of a query")
  parser.add_argument("--layers", type=int, default=12)
  parser.add_argument("--width", type=int, default=768)
  parser.add_argument("--vocabulary", type=int, default=30522)
  parser.add_argument("--turns", type=int, default=10)
  parser.add_argument("--share", type=float, default=0.55, help="median length of a text, of the longest")
  parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
  chosen = parser.parse_args()
  special = (0, steps.CLS, steps.SEP)
  a = Architecture(
    chosen.vocabulary, chosen.width, chosen.layers, chosen.width // 64, 4 * chosen.width, special=special
  )
  model = Model(scan=False, late_width=None, pooling="mean", cosine=True, dropout=0.0, dtype="bfloat16")
  fastest = peak(8192 if jax.default_backend() == "gpu" else 512)
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {fastest / 1e12:.1f} TFLOP/s; {a.layers} layers of "
        f"{a.width}; {chosen.queries} queries x {chosen.passages} passages\n")  # fmt: skip
  theirs = [name for name in ("torch", "sentence_transformers") if importlib.util.find_spec(name)]
  print(
    "| step | side | ms | of the first | useful MFU | GiB | first loss | first gradient norm |\n" + "|---" * 8 + "|"
  )
  with jax.set_mesh(mesh.make(jax.devices()[:1])):
    for name in chosen.steps:
      train = Train(batch=chosen.queries, negatives=chosen.passages - 1, weights=WEIGHTS[name], temperature=TEMPERATURE)
      texts = steps.Texts(train, DATA, chosen.share, chosen.vocabulary)
      sides = [*(f"ours, {rows}" for rows in chosen.rows), *theirs[:1]]
      if name == "dual" and "sentence_transformers" in theirs:
        sides.append("sentence-transformers")
      runners, memory = {}, {}
      for side in sides:
        runners[side] = runner(side, model, train, a, texts, chosen.compile)
        runners[side]()  # compiles
        memory[side] = held(side)
      first = {side: (one.loss, one.norm) for side, one in runners.items()}
      steps.agree(first, ())
      for _ in range(chosen.turns + 2):
        for one in runners.values():
          one(AHEAD)
      useful = cost.flops(a, a, model, train, DATA, texts.shape()) * texts.real()
      base = np.median([wall for _, wall in runners[sides[0]].spent[3:]])
      for side, one in runners.items():
        wall = float(np.median([wall for _, wall in one.spent[3:]]))
        print(f"| {name} | {side} | {1e3 * wall:.1f} | {wall / base:.2f} | {useful / wall / fastest:.3f} | "
              f"{memory[side]:.2f} | {first[side][0]:.4f} | {first[side][1]:.4f} |", flush=True)  # fmt: skip
      del runners
    found = encoders(model, a, texts)
    vectors = {side: encode() for side, encode in found.items()}
    worst = np.min([(own * vectors["ours, padded"]).sum(1) for own in vectors.values()])
    print(f"\nencoding {len(texts.passages)} passages; smallest cosine between sides {worst:.4f}")
    if not worst >= SAME:  # nan is not either
      raise SystemExit(f"sides disagree: a cosine below {SAME}")
    for side, encode in found.items():
      spent = []
      for _ in range(chosen.turns):
        begin = time.perf_counter()
        encode()
        spent.append(time.perf_counter() - begin)
      print(f"{side}: {len(texts.passages) / np.median(spent):.0f} passages/s", flush=True)


if __name__ == "__main__":
  main()
