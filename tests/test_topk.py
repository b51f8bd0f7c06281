"""Exact search equals brute force in float64, in rows and order, ties included."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from ernie_jax import topk
from ernie_jax.config import UserError


def brute_force(queries, vectors, k, order=None):
  """The definition: every product in float64, then every row by (score, order)."""
  wide = queries.astype(np.float64), vectors.astype(np.float64)
  scores = np.array([[sum(q * p) for p in wide[1]] for q in wide[0]])
  order = np.arange(len(vectors)) if order is None else order
  rows = np.array([sorted(range(len(vectors)), key=lambda i: (-line[i], order[i]))[:k] for line in scores])
  return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("tile", [None, 1, 7, 64, 4096])
@pytest.mark.parametrize("k", [1, 10, 300, 700])
def test_equals_brute_force_where_most_scores_are_tied(k, tile):
  rng = np.random.default_rng(k)
  vectors, queries = (rng.integers(-1, 2, (n, 4)).astype(np.float32) for n in (600, 5))
  order = rng.permutation(600)
  for tie in (None, order):
    scores, rows = topk.top_k(queries, vectors, k, order=tie, tile=tile)
    expected = brute_force(queries, vectors, k, tie)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float64_decides_where_float32_cannot(dtype):
  """Scores that differ by less than float32 can tell, a hundred of them around place k."""
  rng = np.random.default_rng(0)
  base = rng.standard_normal(64)
  vectors = (base + 1e-4 * rng.standard_normal((500, 64))).astype(dtype)
  queries = (1000 * base + rng.standard_normal((3, 64))).astype(np.float32)
  scores, rows = topk.top_k(queries, vectors, 50)
  expected = brute_force(queries, vectors, 50)
  np.testing.assert_array_equal(rows, expected[1])
  np.testing.assert_allclose(scores, expected[0], rtol=1e-7)
  narrow = np.argsort(-(queries @ vectors.T.astype(np.float32)), axis=1, kind="stable")[:, :50]
  assert (narrow != rows).any()  # so float32 alone would have failed


def test_more_candidates_are_taken_until_the_result_is_certain(monkeypatch):
  """As many equal vectors as there are: the first by `order` are found, wherever they stand."""
  asked = []
  found = topk.candidates
  monkeypatch.setattr(topk, "candidates", lambda *args: asked.append(args[2]) or found(*args))
  vectors = np.ones((2000, 8), np.float32)
  order = np.arange(2000)[::-1]
  _, rows = topk.top_k(np.ones((1, 8), np.float32), vectors, 5, order=order)
  assert rows.tolist() == [[1999, 1998, 1997, 1996, 1995]]
  assert asked == [37, 148, 592, 2000]


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_changes_nothing(devices):
  """Real devices are of a process of their own: their number is fixed when JAX starts."""
  code = f"""
    import jax, numpy as np, sys
    sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
    from test_topk import brute_force
    from ernie_jax import topk
    assert jax.device_count() == {devices}
    rng = np.random.default_rng(1)
    for make in (lambda n: rng.integers(-1, 2, (n, 4)), lambda n: rng.standard_normal((n, 16))):
      vectors, queries = (make(n).astype(np.float32) for n in (531, 3))
      order = rng.permutation(531)
      for tile in (None, 5, 128):
        for k in (1, 100):
          scores, rows = topk.top_k(queries, vectors, k, order=order, tile=tile)
          np.testing.assert_array_equal(rows, brute_force(queries, vectors, k, order)[1])
  """
  flags = f"--xla_force_host_platform_device_count={devices}"
  subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={"XLA_FLAGS": flags, **_environment()}, check=True)


def _environment():
  import os

  return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def test_trec_order_puts_the_largest_id_first():
  assert topk.trec_order(["b", "10", "9", "a"]).tolist() == [0, 3, 2, 1]


def test_approximate_search_is_exact_where_there_is_no_such_operation():
  rng = np.random.default_rng(2)
  vectors, queries = (rng.standard_normal((n, 16)).astype(np.float32) for n in (3000, 4))
  scores, rows = topk.top_k(queries, vectors, 20, recall=0.9, tile=256)
  assert jax.default_backend() == "cpu"
  np.testing.assert_array_equal(rows, brute_force(queries, vectors, 20)[1])
  np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, 1), rtol=1e-5, atol=1e-5)


def test_nothing_asked_nothing_found_and_what_is_not_finite_is_told():
  vectors = np.ones((3, 2), np.float32)
  assert topk.top_k(np.zeros((0, 2)), vectors, 5)[1].shape == (0, 3)
  assert topk.top_k(np.ones((2, 2)), vectors[:0], 5)[1].shape == (2, 0)
  with pytest.raises(UserError, match="query"):
    topk.top_k(np.full((1, 2), np.nan), vectors, 1)
  vectors[1, 1] = np.inf
  with pytest.raises(UserError, match="passage"):
    topk.top_k(np.ones((1, 2)), vectors, 1)
