"""Eight virtual CPU devices for the tests of the mesh; every annotated shape checked in every call."""

import atexit
import importlib.metadata
import os
import shutil
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with Ctrl-C ignored
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little. Without LLVM's optimisation compiling takes half the time, and without XLA's
# newer code for fusions 40 % of that. A flag that jaxlib does not know, as 0.11.2 the second, would end the process.
FAST = " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FAST

# Many tests compile the same program: in one process or another, the first compiles it and the others read it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="ernie-jax-tests-")
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax

jax.config.update("jax_num_cpu_devices", int(os.environ.get("TESTS_DEVICES", "8")))

import dataclasses
import functools
import inspect
import typing

import beartype
import flax.nnx  # noqa: F401 (loaded before TYPE_CHECKING is set, for it looks at it too)
import jaxtyping
import numpy as np
import optax  # noqa: F401
import pytest

# Shapes in signatures are imported for type checkers only. Here they are imported for real, and checked in every call.
typing.TYPE_CHECKING = True
from ernie_jax import encoder, kernels, losses, scores, step

typing.TYPE_CHECKING = False
for module in (kernels, encoder, scores, losses, step):
  for name, function in inspect.getmembers(module, inspect.isfunction):
    if function.__module__ == module.__name__:
      setattr(module, name, jaxtyping.jaxtyped(function, typechecker=beartype.beartype))

from ernie_jax import config
from ernie_jax.encoder import Rows

WORDS = [  # of texts for a real tokenizer
  "quick",
  "brown",
  "foxes",
  "jump",
  "over",
  "lazy",
  "dogs",
  "while",
  "birds",
  "sing",
  "old",
  "songs",
  "of",
  "rain",
]
SPECIAL = (1, 2)
TINY = config.Architecture(vocabulary=50, width=16, layers=3, heads=2, inner=32, positions=64, special=SPECIAL)


class Ids:
  """What rows need of a tokenizer."""

  pad, cls, sep, mask = 0, 1, 2, 3


def make_rows(
  rng: np.random.Generator, parts: list[list[np.ndarray]], length: int, shift: int = 0, pack: tuple[int, int] = (0, 0)
) -> Rows:
  """[1] part [2] part [2] and padding, as `templates.rows` lays texts out; `shift` adds padding columns.

  Packed with `pack=(units, length)`: the texts are so many units, in rows of that length.
  """
  from ernie_jax import batches, templates

  units, wide = pack
  if not units:
    return templates.rows(parts, length + shift, Ids)
  sizes = np.array([1 + sum(len(part) + 1 for part in own) for own in parts])
  each, count = len(parts) // units, len(parts) // units - 1
  places = np.concatenate([batches.first_fit(own, wide, count) for own in np.split(sizes, units)])
  order = rng.permutation(count)  # packed rows in any order
  places = order[places // wide] * wide + places % wide
  assert each > count
  return templates.rows(parts, wide, Ids, places=places, units=units, count=count, longest=length)


def make_batch(
  seed: int = 0, b: int = 8, k: int = 3, lq: int = 6, lp: int = 9, pad: int = 0, units: int = 0, together: bool = False
) -> scores.Batch:
  """A random batch with hard negatives, where some queries know further positives in the pool.

  `pad` adds padding; with `units`, the same texts are packed in so many units, in rows of 2 to 3 texts; `together`,
  queries stand in the rows of passages.
  """
  rng = np.random.default_rng(seed)
  text = lambda longest: rng.integers(3, 50, rng.integers(1, longest - 1)).astype(np.int32)
  queries, passages = [text(lq) for _ in range(b)], [text(lp) for _ in range(b * k)]
  known = np.full((b, 2), -1, np.int32)
  known[:, 0] = np.arange(b) * k
  known[1::2, 1] = known[1::2, 0] - 1  # the last negative of the query before is another positive of this one
  batch = scores.Batch(
    queries=make_rows(rng, [[q] for q in queries], lq, pad, (units, 3 * lq)),
    passages=make_rows(rng, [[p] for p in passages], lp, pad, (units, 2 * lp)),
    pairs=make_rows(rng, [[queries[i // k], p] for i, p in enumerate(passages)], lq + lp - 1, 2 * pad, (units, 32)),
    texts=np.arange(b * k, dtype=np.int32),
    known=known,
  )
  if together:
    p, q = make_together(passages, queries, 2 * lp, units, lp, lq)
    batch = dataclasses.replace(batch, queries=q, passages=p)
  return jax.tree.map(jax.numpy.asarray, batch)


def make_together(passages, queries, wide: int, units: int, lp: int, lq: int) -> tuple[Rows, Rows]:
  """Passages and queries packed in the same rows of so many units."""
  from ernie_jax import batches, templates

  sizes = [np.array([len(text) + 2 for text in texts]) for texts in (passages, queries)]
  each = [np.split(own, units) for own in sizes]
  count = len(passages) // units
  places = [batches.first_fit(np.concatenate(own), wide, count) for own in zip(*each, strict=True)]
  apart = [np.split(own, [len(passages) // units]) for own in places]
  p, q = (np.concatenate(own) for own in zip(*apart, strict=True))
  laid = {"units": units, "count": count}
  return templates.beside(
    templates.rows([[x] for x in passages], wide, Ids, places=p, longest=lp, **laid),
    templates.rows([[x] for x in queries], wide, Ids, places=q, longest=lq, **laid),
  )


SLOW = ("test_recipe", "test_train", "test_step", "test_ablate", "test_checkpoints")


def pytest_collection_modifyitems(items):
  """The slowest files first: with a file to a worker, one that comes last would run alone."""
  items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def tiny_params():
  """(model, parameters) with every part there is, dropout on."""
  model = config.Model(late_width=8, scan=True)
  return model, step.init_params(model, TINY, TINY, jax.random.key(0))


def shared(make_train_step):
  """It, but a run that continues, or that only saves and measures at other steps, gets the program that is there."""
  made = functools.cache(make_train_step)
  plain = lambda stage: dataclasses.replace(stage, checkpoint_every=1, measure_every=0, keep=1)
  return lambda model, stage: made(model, plain(stage))


def distance(tree, other) -> float:
  """Largest difference of two trees, relative to the largest entry of each leaf (or 1e-3 of the largest of all)."""
  leaves = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)]
  floor = 1e-3 * max(np.abs(y).max() for _, y in leaves)
  return max(float(np.abs(x - y).max() / max(np.abs(y).max(), floor)) for x, y in leaves)
