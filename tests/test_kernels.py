"""Products and activations against float64, and what bfloat16 rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfc

from ernie_jax.kernels import LayerNorm, Linear, gelu, layer_norm, product

POINTS = np.concatenate([np.linspace(-14, 14, 400_001), [0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4]])


def test_gelu_is_within_the_stated_distance_of_the_exact_one():
  x = POINTS.astype(np.float32)
  wide = x.astype(np.float64)
  below, density = erfc(-wide / np.sqrt(2)) / 2, np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
  value, slope = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(x))
  relative = np.maximum(np.abs(wide), 1)  # float32 has 6e-8 of the value itself
  assert np.max(np.abs(value - wide * below) / relative) < 3e-7
  assert np.max(np.abs(slope - (below + wide * density))) < 4e-7


def test_gelu_of_bfloat16_is_the_exact_one_rounded():
  """Where it is not tiny its own error is far below half a unit of the last place: nearly all are rounded alike."""
  x = jnp.asarray(np.linspace(-8, 8, 20_001), jnp.bfloat16)
  exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(jnp.bfloat16)
  found = gelu(x)
  assert found.dtype == jnp.bfloat16
  large = np.abs(np.asarray(exact, np.float32)) > 1e-3
  assert np.mean(np.asarray(found != exact)[large]) < 2e-3
  np.testing.assert_allclose(found.astype(jnp.float32), exact.astype(jnp.float32), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 16, 1), (40, 24, 8)])
def test_a_rounded_product_sums_rounded_operands_in_float32_and_so_does_its_gradient(size):
  n, i, o = size
  rng = np.random.default_rng(0)
  x, w, slope = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, i), (i, o), (n, o)))
  rounded = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), np.float64)
  value, back = jax.vjp(lambda x, w: product(x, w, "bfloat16"), x, w)
  of_x, of_w = back(slope)
  near = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  near(value, rounded(x) @ rounded(w))
  near(of_x, rounded(slope) @ rounded(w).T)
  near(of_w, rounded(x).T @ rounded(slope))
  assert value.dtype == of_x.dtype == of_w.dtype == jnp.float32
  half = jax.vjp(lambda x: product(x, w, "bfloat16"), jnp.asarray(x, jnp.bfloat16))[1](slope)[0]
  assert half.dtype == jnp.bfloat16


def test_a_linear_layer_gives_what_it_got():
  from flax import nnx

  layer = Linear(16, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), dtype)
    assert layer(x).dtype == dtype
    exact = x.astype(jnp.float32) @ layer.kernel[...] + layer.bias[...]
    np.testing.assert_allclose(layer(x).astype(jnp.float32), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("middle", "within"), [(0.0, 2e-6), (30.0, 4e-5), (1000.0, 2e-3)])
def test_layer_norm_and_its_gradient_are_those_of_float64(middle, within):
  """Rows far from 0 lose what float32 loses of `x - mean`, and no more: E[x^2] - E[x]^2 would lose its square."""
  rng = np.random.default_rng(0)
  x, slope = middle + rng.normal(size=(40, 96)).astype(np.float32), rng.normal(size=(40, 96)).astype(np.float32)
  scale, bias = (rng.normal(size=96).astype(np.float32) for _ in range(2))
  found, back = jax.vjp(lambda *given: layer_norm(*given, 1e-12), *map(jnp.asarray, (x, scale, bias)))

  def plain(x, scale, bias):
    apart = x - x.mean(-1, keepdims=True)
    return apart / jnp.sqrt((apart**2).mean(-1, keepdims=True) + 1e-12) * scale + bias

  with jax.enable_x64(True):
    exact, exact_back = jax.vjp(plain, *(jnp.asarray(a, jnp.float64) for a in (x, scale, bias)))
    expected = [np.asarray(one) for one in (exact, *exact_back(jnp.asarray(slope, jnp.float64)))]
  for one, other in zip([found, *back(jnp.asarray(slope))], expected):
    assert one.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(one) - other)) < within * np.max(np.abs(other))


def test_layer_norm_of_bfloat16_is_computed_in_float32():
  from flax import nnx

  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.bfloat16)
  own = LayerNorm(64, epsilon=1e-5, rngs=nnx.Rngs(0))
  theirs = nnx.LayerNorm(64, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(own(x), theirs(x), rtol=1e-6, atol=1e-6)
  slope = jax.grad(lambda x: jnp.sum(own(x) * jnp.arange(64)))(x)
  assert (own(x).dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)
  expected = jax.grad(lambda x: jnp.sum(theirs(x) * jnp.arange(64)))(x)
  np.testing.assert_allclose(slope.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7, atol=2**-7)
