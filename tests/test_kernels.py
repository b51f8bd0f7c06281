"""Products and activations against float64, and what bfloat16 rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfc

from ernie_jax import kernels
from ernie_jax.kernels import LayerNorm, Linear, affine, feed_forward, gelu, layer_norm

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
  x, w, bias, slope = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, i), (i, o), (o,), (n, o)))
  value, back = jax.vjp(lambda *given: affine(*given, "bfloat16"), x, w, bias)
  of_x, of_w, of_bias = back(slope)
  near = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  near(value, rounded(x) @ rounded(w) + np.asarray(bias, np.float64))
  near(of_x, rounded(slope) @ rounded(w).T)
  near(of_w, rounded(x).T @ rounded(slope))
  near(of_bias, np.asarray(slope, np.float64).sum(0))
  assert value.dtype == of_x.dtype == of_w.dtype == of_bias.dtype == jnp.float32
  near(kernels._by_ones("bfloat16", slope.reshape(1, n, o)), rounded(slope).sum(0))  # those of a TPU
  few = lambda a: jnp.asarray(rounded(a), jnp.float32)  # a CPU has no such product of bfloat16
  near(kernels._tokens_last("float32", "io", "float32", few(x).reshape(1, n, i), few(w), bias)[0], value)
  halves = few(x)[: n // 2 * 2].reshape(2, -1, i)
  near(kernels._tokens_last("float32", "io", "float32", halves, few(w), bias), value[: n // 2 * 2].reshape(2, -1, o))
  for heads in ("written", "read"):
    same, back = jax.vjp(lambda *given, heads=heads: affine(*given, "bfloat16", heads), x, w, bias)
    for one, other in zip((same, *back(slope)), (value, of_x, of_w, of_bias), strict=True):
      near(one, other)
  near(kernels._tokens_last("float32", "oi", "float32", few(slope), few(w), None), of_x)
  batched = jax.vjp(lambda *given: affine(*given, "bfloat16"), x.reshape(1, n, i), w, bias)
  for one, other in zip((batched[0], *batched[1](slope.reshape(1, n, o))), (value, of_x, of_w, of_bias)):
    near(one.reshape(other.shape), other)
  half, back = jax.vjp(lambda x: affine(x, w, None, "bfloat16"), jnp.asarray(x, jnp.bfloat16))
  assert half.dtype == back(slope.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def rounded(a):
  """As bfloat16 has it, in float64."""
  return np.asarray(jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), np.float64)


def layers(dtype=None):
  from flax import nnx

  up, down = Linear(16, 64, dtype=dtype, rngs=nnx.Rngs(0)), Linear(64, 16, dtype=dtype, rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  up.bias, down.bias = (nnx.Param(jnp.asarray(rng.normal(size=n), jnp.float32)) for n in (64, 16))
  up.kernel[...], down.kernel[...] = 4 * up.kernel[...], 4 * down.kernel[...]
  return up, down, jnp.asarray(rng.normal(size=(5, 3, 16)), jnp.float32)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_feed_forward_network_and_its_gradient_are_those_of_float64(activation):
  from scipy.special import erf

  up, down, x = layers()
  value, back = jax.vjp(lambda x, up, down: feed_forward(x, up, down, activation), x, up, down)
  slope = np.random.default_rng(1).normal(size=value.shape)
  of_x, of_up, of_down = back(jnp.asarray(slope, jnp.float32))
  wide = lambda a: np.asarray(a, np.float64)
  flat = wide(x).reshape(-1, 16)
  before = flat @ wide(up.kernel[...]) + wide(up.bias[...])
  if activation == "gelu":
    below = (1 + erf(before / np.sqrt(2))) / 2
    inner, rate = before * below, below + before * np.exp(-(before**2) / 2) / np.sqrt(2 * np.pi)
  else:
    inner, rate = np.maximum(before, 0), before > 0
  outer = slope.reshape(-1, 16)
  of_before = outer @ wide(down.kernel[...]).T * rate
  near = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
  near(value.reshape(-1, 16), inner @ wide(down.kernel[...]) + wide(down.bias[...]))
  near(of_x.reshape(-1, 16), of_before @ wide(up.kernel[...]).T)
  near(of_up.kernel[...], flat.T @ of_before)
  near(of_up.bias[...], of_before.sum(0))
  near(of_down.kernel[...], inner.T @ outer)
  near(of_down.bias[...], outer.sum(0))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
  """Takes what is for an NVIDIA GPU, where there is something."""

  def pick(*given, default, cuda=None, **others):
    return (cuda or default)(*given)

  monkeypatch.setattr(jax.lax, "platform_dependent", pick)


def test_a_gpu_s_feed_forward_network_and_linear_layer_of_bfloat16_are_near_float64_s(as_on_a_gpu):
  """Each value and slope within a few roundings, on average, as below; where the stream is float32, as elsewhere."""
  keeps_rounded(jnp.float32, 0)
  keeps_rounded(jnp.bfloat16, 8e-3)
  rng = np.random.default_rng(0)
  x, w, bias, slope = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((40, 24), (24, 8), (8,), (40, 8)))
  half = lambda a: a.astype(jnp.bfloat16)
  value, back = jax.vjp(lambda *given: affine(*given, "bfloat16"), half(x), w, bias)
  of_x, of_w, of_bias = back(half(slope))
  assert (value.dtype, of_x.dtype, of_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  for found, expected in [
    (value, rounded(x) @ rounded(w) + np.asarray(bias)),
    (of_x, rounded(slope) @ rounded(w).T),
    (of_w, rounded(x).T @ rounded(slope)),
    (of_bias, rounded(slope).sum(0)),
  ]:
    assert np.mean(np.abs(np.asarray(found, np.float64) - expected)) < 4e-3 * np.mean(np.abs(expected))


@pytest.mark.parametrize("stream", [jnp.float32, jnp.bfloat16])
def test_a_rounded_feed_forward_network_keeps_value_and_slope_rounded(stream):
  """What is between the products is rounded once: to what the second one reads, and to what the gradient reads."""
  keeps_rounded(stream, 4e-3)


def keeps_rounded(stream, within):
  """The theorem; `within` is for a stream of bfloat16."""
  up, down, x = layers(jnp.bfloat16)
  x = x.astype(stream)
  value, back = jax.vjp(lambda x, up, down: feed_forward(x, up, down, "gelu"), x, up, down)
  slope = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), stream)
  of_x, of_up, of_down = back(slope)
  assert value.dtype == of_x.dtype == stream
  flat, outer, w, v = (rounded(a).reshape(-1, a.shape[-1]) for a in (x, slope, up.kernel[...], down.kernel[...]))
  before = jnp.asarray(flat @ w + np.asarray(up.bias[...]), jnp.float32)
  inner, rate = rounded(gelu(before)), rounded(jax.vmap(jax.vmap(jax.grad(gelu)))(before))
  # On average: a value on the edge between two of bfloat16's may fall to either side. Of float32's stream nothing else
  # is rounded; unrounded values or slopes are off by 50 times as much.
  few = 2e-4 if stream == jnp.float32 else within

  def near(found, expected):
    assert np.mean(np.abs(np.asarray(found, np.float64) - expected)) < few * np.mean(np.abs(expected))

  near(value.reshape(-1, 16), inner @ v + np.asarray(down.bias[...]))
  of_before = rounded(outer @ v.T * rate)
  near(of_x.reshape(-1, 16), of_before @ w.T)
  near(of_up.kernel[...], flat.T @ of_before)
  near(of_up.bias[...], of_before.sum(0))
  near(of_down.kernel[...], inner.T @ outer)
  near(of_down.bias[...], np.asarray(slope, np.float64).sum((0, 1)))
  assert of_up.kernel[...].dtype == of_up.bias[...].dtype == jnp.float32


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


@pytest.mark.parametrize("middle", [0.0, 10.0, 30.0, 100.0])
def test_layer_norm_of_bfloat16_loses_less_than_the_rounding_of_its_rows_did(middle):
  """Against float64, of the rounded rows: a hundredth, at most, of what rounding them has moved."""
  rows = middle + np.random.default_rng(0).normal(size=(40, 768))
  rounded = jnp.asarray(rows, jnp.bfloat16)
  ones, zeros = jnp.ones(768), jnp.zeros(768)

  def exact(x):
    apart = x - x.mean(-1, keepdims=True)
    return apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-12)

  moved = np.abs(exact(rows) - exact(np.asarray(rounded, np.float64))).max()
  lost = np.abs(layer_norm(rounded, ones, zeros, 1e-12) - exact(np.asarray(rounded, np.float64))).max()
  assert lost < 0.01 * moved
  alike = jnp.full((1, 768), middle, jnp.bfloat16)
  for row in (alike, alike.at[0, 5].multiply(1 + 2**-7)):  # the next number: differences are all but lost in squares
    apart = np.abs(layer_norm(row, ones, zeros, 1e-12)).max()
    assert apart < 1.01 * 767**0.5  # one of 768 apart from the others is that many standard deviations


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


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_what_a_gpu_is_given_instead_is_the_same(activation):
  """In float32: its products and the activation between two of them, forward and back."""
  rng = np.random.default_rng(0)
  draw = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
  x, up, bias, down, slope_out = draw(5, 8), draw(8, 12), draw(12), draw(12, 8), draw(5, 8)
  near = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  near(kernels._at_once("float32", "io", "float32", x, up, bias), affine(x, up, bias))
  near(kernels._at_once("float32", "oi", "float32", x, down, None), x @ down.T)
  inner, slope = kernels._inner_and_slope("float32", activation, x, up, bias)
  same, before = kernels._inner_and_before("float32", activation, x, up, bias)
  near(same, inner)
  back = kernels._times_slope("float32", slope_out, down, slope, bias)
  near(kernels._times_slope_of("float32", activation, slope_out, down, before, bias), back)
