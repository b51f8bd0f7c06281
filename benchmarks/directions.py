"""What each loss term's gradient is good for, where the cascade begins: a step along it, and the loss of dev lists.

  python benchmarks/directions.py configs/small_student.py runs/small_student --dtype mixed

Reads what `ernie-jax ablate` left in the folder (or makes it). Gradients of the student are taken over batches of
training lists, without dropout, all at the configuration's temperatures. "norm" is that of their mean, "of a batch"
the mean of theirs: the nearer their ratio is to 1, the steadier the term. A slope is how fast -log p of the dev
lists' positives, by the dual-encoder and by late interaction, falls against the mean gradient made 1 long; behind it
its standard error over batches of dev lists. Dev lists are drawn as training lists are, from the student's best 30.
"""

import argparse
import dataclasses
import runpy
import sys
from pathlib import Path

import jax
import numpy as np

from ernie_jax import ablate, batches, columns, losses, mesh, recipe, scores, topk
from ernie_jax.config import Weights

TERMS = ("nll_de", "nll_li", "kl_li_de", "kl_ce_de", "kl_ce_li", "kl_attention")
MEASURED = {"nll_de": "dual-encoder", "nll_li": "late interaction"}
MINED = 30

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("config")
parser.add_argument("ablation", type=Path)
parser.add_argument("--batches", type=int, default=12, help="of training lists, and as many of dev lists")
parser.add_argument("--dtype", help="model.dtype, as the ablation had it; default: the configuration's")
chosen = parser.parse_args()
sys.path.insert(0, str(Path(chosen.config).parent))
full = runpy.run_path(chosen.config)["config"]
full = dataclasses.replace(full, model=dataclasses.replace(full.model, dtype=chosen.dtype or full.model.dtype))
full = dataclasses.replace(full, cascade=dataclasses.replace(full.cascade, residual=False))


def begun() -> tuple[recipe.Run, recipe.Begun]:
  """The run and what its cascade begins with, as `ablate` has it: links to shared stages."""
  row = ablate.Row("full", "loss", "full", full)
  base = ablate.begin(ablate.based(chosen.ablation, row), row)
  place = recipe.folder(chosen.ablation / "directions" / ablate.digest(full, "check"))
  ablate.link(base, full, place)
  current = dataclasses.replace(base, directory=place)
  return current, recipe.before_cascade(current)


def lists(current: recipe.Run, split: str, negatives: columns.Ragged, seed: int) -> list[scores.Batch]:
  """Batches of a split, as the cascade draws them."""
  texts, stage = recipe.texts_of(current, split, negatives), full.cascade
  layout = batches.layout(full.data, stage, jax.device_count(), texts, full.model.tied)
  drawn = batches.batches(texts, full.data, stage, seed, layout)
  return [mesh.shard(next(drawn), mesh.make()) for _ in range(chosen.batches)]


def gradients(params: scores.Params, term: str, drawn: list[scores.Batch]) -> np.ndarray:
  """[batches, parameters of the student]."""
  stage = dataclasses.replace(full.cascade, weights=Weights.only(**{term: 1.0}), final_weights=None, teacher="frozen")

  def loss(student, params, batch):
    made = scores.score({**params, "student": student}, batch, full.model, stage, None)
    return losses.terms(made, stage)[term]

  slope = jax.jit(lambda params, batch: jax.grad(loss)(params["student"], params, batch))
  flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
  return np.stack([flat(slope(params, batch)) for batch in drawn])


with jax.set_mesh(mesh.make()):
  current, start = begun()
  asked = current.encode(start.params, current.queries["dev"], "dev queries", late=False)
  passages = current.encode(start.params, current.passages, "passages", late=False)
  _, found = topk.top_k(asked.vectors, passages.vectors, MINED)
  training = lists(current, "train", start.negatives, seed=5)
  dev = lists(current, "dev", columns.ragged(found.tolist()), seed=6)
  params = mesh.whole(jax.tree.map(np.array, start.params), mesh.make())
  measured = {term: gradients(params, term, dev) for term in MEASURED}
  stage = full.cascade
  print(f"jax {jax.__version__}, {len(training)} batches of {stage.batch} lists, {stage.temperature}\n")
  columns_of = ["term", "norm", "of a batch", "cosine with nll_de", *(f"slope, {x}" for x in MEASURED.values())]
  print(f"| {' | '.join(columns_of)} |\n" + "|---" * len(columns_of) + "|")
  first = None
  for term in TERMS:
    every = gradients(params, term, training)
    norm = np.linalg.norm(every.mean(0))
    mean = every.mean(0) / norm
    first = mean if first is None else first
    slopes = [gradient @ mean for gradient in measured.values()]
    cells = [f"{norm:.2f}", f"{np.linalg.norm(every, axis=1).mean():.2f}", f"{first @ mean:.2f}"]
    cells += [f"{s.mean():.2f} ± {s.std(ddof=1) / len(s) ** 0.5:.2f}" for s in slopes]
    print(f"| {' | '.join([term, *cells])} |", flush=True)
