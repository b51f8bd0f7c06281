"""Products and activations as hardware likes them: how each is rounded, how far it is from the exact one.

Parameters are float32. Where products are of bfloat16 (`model.dtype`), both operands are rounded to it and what they
give is summed in float32, in the two products of the gradient too. All matrix units work so; that of a CPU (AMX) is
used by XLA for a float32 result alone. What differs between platforms is where a result is rounded and how it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

if TYPE_CHECKING:
  from jaxtyping import Array, Float


Heads = Literal["written", "read"]


def affine(
  x: Float[Array, "*n i"],
  w: Float[Array, "i o"],
  bias: Float[Array, "o"] | None,
  dtype: str = "float32",
  heads: Heads | None = None,
) -> Float[Array, "*n o"]:
  """x w + bias, of operands rounded to `dtype` and summed in float32 or wider; the result has the dtype of `x`.

  The two products of the gradient are made likewise; the bias' is a sum, on a TPU of what is rounded unless `heads` is
  "written". An NVIDIA GPU's product of bfloat16 that gives bfloat16 is rounded before the bias too. `heads` says that
  the result is written for heads of attention, or x read from them, and so a TPU's layout.
  """
  return _affine(dtype, heads, x, w, bias)


def _rounded(dtype, *operands):
  return operands if dtype == "float32" else tuple(x.astype(dtype) for x in operands)


def summed(spec, dtype, x, y):
  """An einsum of two operands rounded to `dtype` ("float32": as they are), summed in float32 or wider."""
  wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
  return jnp.einsum(spec, *_rounded(dtype, x, y), preferred_element_type=wide)


@jax.jit  # outside of a compiled program only a whole array on a device can be asked for a layout
def _turned(x):
  """The transpose, moved in memory: a CPU's fast products of bfloat16 read rows; the others take twice the time."""
  return with_layout_constraint(x.T, Layout((0, 1)))


def _product(dtype, heads, x, w, bias=None, io="io", out=None):
  """x w + bias, in the dtype `out` or that of `x`; "oi" for the transpose of w.

  With `heads` a TPU has its tokens innermost.
  """
  out = out or x.dtype
  ways = _on_gpu(_at_once, dtype, out) | ({"tpu": _tokens_last} if heads and dtype != "float32" else {})
  ways = {platform: partial(way, dtype, io, out) for platform, way in ways.items()}
  return _by_platform(partial(_plain, dtype, io, out), ways, x, w, bias)


def _on_gpu(way, *dtypes):
  """For `_by_platform`: another way where all is bfloat16."""
  return {"cuda": way} if all(jnp.dtype(dtype) == jnp.bfloat16 for dtype in dtypes) else {}


def _by_platform(default, ways, *given):
  return jax.lax.platform_dependent(*given, default=default, **ways) if ways else default(*given)


def _plain(dtype, io, out, x, w, bias):
  y = summed(f"...i,{io}->...o", dtype, x, w)
  return (y if bias is None else y + bias).astype(out)


def _at_once(dtype, io, out, x, w, bias):
  """What `_plain` gives, but rounded before the bias too: what a GPU's product writes, it rounds.

  Where the sum in float32 is asked for, that is what it writes, for another kernel to read and round.
  """
  y = jnp.einsum(f"...i,{io}->...o", *_rounded(dtype, x, w), preferred_element_type=out)
  return y if bias is None else (y + bias).astype(out)


def _tokens_last(dtype, io, out, x, w, bias):
  """What `_plain` gives, in the layout that attention's products by head read: a TPU copies the plain one into it.

  Without the barrier the compiler turns the product back.
  """
  before = _before(x)
  y = summed(f"{before}i,{io}->{before[:-1]}o{before[-1]}", dtype, x, w)
  return jax.lax.optimization_barrier((y if bias is None else y + bias[:, None]).astype(out)).swapaxes(-1, -2)


def _before(x):
  """A letter for each axis but the last."""
  return "abcdefgh"[: x.ndim - 1]


def _of_weight(dtype, x, slope):
  """[i, o], summed over everything before."""
  letters = _before(x)
  whole = partial(summed, f"{letters}i,{letters}o->io", dtype)
  if dtype == "float32":
    return whole(x, slope)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  rows = lambda x, slope: summed("in,no->io", dtype, _turned(flat(x)), flat(slope))
  return jax.lax.platform_dependent(x, slope, cpu=rows, default=whole)


def _total(slope):
  """[o], summed over everything before."""
  return _wide(slope).sum(tuple(range(slope.ndim - 1)))


def _of_bias(dtype, slope):
  if dtype == "float32":
    return _total(slope)
  return jax.lax.platform_dependent(slope, tpu=partial(_by_ones, dtype), default=_total)


def _by_ones(dtype, slope):
  """The sum by a TPU's matrix unit, for a third of its cycles; of ones that it sees the compiler makes a sum again."""
  ones = jax.lax.optimization_barrier(jnp.ones((8, *slope.shape[:-1]), dtype))  # as many rows as a tile has
  return summed(f"z{_before(slope)},{_before(slope)}o->zo", dtype, ones, slope)[0]


def as_held(x):
  """The array; where it is bfloat16, so in memory.

  A compiler that sees bfloat16 made and read in float32 leaves the rounding to whoever reads: each then reads twice the
  memory and rounds again. A barrier forbids that; where nothing was rounded it would only keep loops apart.
  """
  return jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x


def _like(*operands):
  """Nothing but their dtypes, kept for a gradient."""
  return tuple(jnp.zeros((0,), x.dtype) for x in operands)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _affine(dtype, heads, x, w, bias):
  return _product(dtype, heads == "written", x, w, bias)


def _affine_forward(dtype, heads, x, w, bias):
  kept = _rounded(dtype, x, w)  # half the memory
  return _affine(dtype, heads, x, w, bias), (*kept, _like(x, w), None if bias is None else _like(bias))


def _affine_backward(dtype, heads, kept, slope):
  x, w, (like_x, like_w), like_bias = kept
  of_x = _product(dtype, heads == "read", slope, w, io="oi").astype(like_x.dtype)
  # With the tokens innermost a sum over them is part of the operation before it.
  of_bias = _of_bias("float32" if heads == "written" else dtype, slope)
  of_bias = None if like_bias is None else of_bias.astype(like_bias[0].dtype)
  return of_x, _of_weight(dtype, x, slope).astype(like_w.dtype), of_bias


_affine.defvjp(_affine_forward, _affine_backward)


class Linear(nnx.Linear):
  """x W + b, of operands in `dtype` (None: float32); the result has the dtype of the input."""

  @property
  def rounds_to(self) -> str:
    return jnp.dtype(self.dtype or "float32").name

  def __call__(self, inputs: Float[Array, "*n i"], heads: Heads | None = None) -> Float[Array, "*n o"]:
    bias = None if self.bias is None else self.bias[...]
    return affine(inputs, self.kernel[...], bias, self.rounds_to, heads)


# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erfc(z) = t (a1 + t (a2 + ...)) exp(-z^2) with
# t = 1 / (1 + p z), for z >= 0, off by 1.5e-7 at most.
ERFC_P = 0.3275911
ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _normal(x: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
  """The standard normal distribution's function, and its density, from one exponential."""
  bell = jnp.exp(-0.5 * jnp.square(x))
  t = 1 / (1 + (ERFC_P * np.sqrt(0.5)) * jnp.abs(x))
  tail = ERFC[-1]
  for a in ERFC[-2::-1]:
    tail = a + t * tail
  tail = 0.5 * t * tail * bell
  return jnp.where(x > 0, 1 - tail, tail), np.sqrt(0.5 / np.pi) * bell


@jax.custom_vjp
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """x Phi(x) (Hendrycks and Gimpel 2016), in float32 or wider: within 3e-7 max(|x|, 1), its slope within 4e-7.

  `jax.nn.gelu(approximate=False)` evaluates erfc by two rational functions and an exponential, and in its gradient
  another exponential: a step on a CPU takes a tenth longer with it.
  """
  wide = _wide(x)
  return (wide * _normal(wide)[0]).astype(x.dtype)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _gelu_backward(x, slope):
  wide = _wide(x)
  below, density = _normal(wide)
  return (((below + wide * density) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _gelu_and_slope(x):
  below, density = _normal(x)
  return x * below, below + x * density


def _relu_and_slope(x):
  return jax.nn.relu(x), (x > 0).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"gelu": gelu, "relu": jax.nn.relu}
_WITH_SLOPE = {"gelu": _gelu_and_slope, "relu": _relu_and_slope}


def feed_forward(x: Float[Array, "*n h"], up: Linear, down: Linear, activation: str) -> Float[Array, "*n h"]:
  """down(activation(up(x))) (Vaswani et al. 2017, section 3.3), in the dtype of `x`.

  Between the products it is in float32 or wider; on a GPU, of bfloat16, it is of what was rounded. For the gradient the
  activation's value and slope are kept in the products' dtype, so that the way back takes one multiplication, in the
  product before it, and no exponential. A GPU keeps what was before the activation instead of its slope.
  """
  assert up.bias is not None
  assert down.bias is not None
  return _feed(up.rounds_to, activation, x, up.kernel[...], up.bias[...], down.kernel[...], down.bias[...])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed(dtype, activation, x, up, up_bias, down, down_bias):
  return _feed_forward(dtype, activation, x, up, up_bias, down, down_bias)[0]


def _feed_forward(dtype, activation, x, up, up_bias, down, down_bias):
  like, (kept, up, down) = _like(x, up, up_bias, down, down_bias), _rounded(dtype, x, up, down)
  ways = _on_gpu(partial(_inner_and_before, dtype, activation), dtype, x.dtype)
  inner, slope = _by_platform(partial(_inner_and_slope, dtype, activation), ways, kept, up, up_bias)
  out = _product(dtype, None, inner, down, down_bias, out=x.dtype)
  return out, (kept, inner, slope, up, up_bias, down, like)


def _inner_and_slope(dtype, activation, x, up, bias):
  inner, slope = _rounded(dtype, *_WITH_SLOPE[activation](summed("...i,io->...o", dtype, x, up) + bias))
  return as_held(inner), jax.lax.optimization_barrier(slope)  # else it is made again from what comes before it


def _inner_and_before(dtype, activation, x, up, bias):
  """As on a GPU, whose product writes what is before bias and activation in any case."""
  before = _at_once(dtype, "io", dtype, x, up, None)
  # The barrier: else what value and slope have in common is written too, in float32.
  return ACTIVATIONS[activation](before + bias).astype(dtype), jax.lax.optimization_barrier(before)


def _times_slope(dtype, slope_out, down, slope, _):
  return summed("...o,io->...i", dtype, slope_out, down) * _wide(slope)


def _times_slope_of(dtype, activation, slope_out, down, before, bias):
  wide = _wide(_at_once(dtype, "oi", dtype, slope_out, down, None))
  return wide * _WITH_SLOPE[activation](before + bias)[1]


def _feed_backward(dtype, activation, held, slope_out):
  x, inner, slope, up, up_bias, down, like = held
  ways = _on_gpu(partial(_times_slope_of, dtype, activation), dtype, like[0].dtype)
  wide = _by_platform(partial(_times_slope, dtype), ways, slope_out, down, slope, up_bias)
  (of_before,) = jax.lax.optimization_barrier(_rounded(dtype, wide))  # in the product's loop, not in its readers'
  # A TPU sums in that loop too, what was not rounded yet; others would keep that for it.
  in_loop, later = lambda wide, _: _total(wide), lambda _, rounded: _total(rounded)
  found = (
    _product(dtype, None, of_before, up, io="oi", out=like[0].dtype),
    _of_weight(dtype, x, of_before),
    jax.lax.platform_dependent(wide, of_before, tpu=in_loop, default=later),
    _of_weight(dtype, inner, slope_out),
    _of_bias(dtype, slope_out),
  )
  return tuple(one.astype(its.dtype) for one, its in zip(found, like))


_feed.defvjp(_feed_forward, _feed_backward)


def layer_norm(
  x: Float[Array, "*n h"], scale: Float[Array, "h"], bias: Float[Array, "h"], epsilon: float
) -> Float[Array, "*n h"]:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016), in float32 or wider, as its result is.

  The variance is that of the differences: E[x^2] - E[x]^2 loses digits. Of a row in bfloat16 it is E[x^2] - E[x]^2, in
  one reading: it loses a hundredth, at most, of what rounding the row lost, up to 100 standard deviations from 0. The
  gradient, in closed form, takes both its means over a row at once; derived by operation it reads its operands twice.
  """
  return _norm(x, scale, bias, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x, scale, bias, epsilon):
  return _norm_forward(x, scale, bias, epsilon)[0]


def _norm_forward(x, scale, bias, epsilon):
  wide = _wide(x)
  mean = wide.mean(-1, keepdims=True)
  if x.dtype == jnp.bfloat16:
    square = jnp.square(mean)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - square, 2**-22 * square)  # its error, at most
  else:
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
  rate = jax.lax.rsqrt(variance + epsilon)
  return (wide - mean) * rate * scale + bias, (x, mean, rate, scale, bias)


def _norm_backward(_, kept, slope):
  x, mean, rate, scale, bias = kept
  normal, rows = (_wide(x) - mean) * rate, tuple(range(slope.ndim - 1))
  inner = slope * scale
  along = normal * (inner * normal).mean(-1, keepdims=True)
  of_x = rate * (inner - inner.mean(-1, keepdims=True) - along)
  of_scale, of_bias = (slope * normal).sum(rows), slope.sum(rows)
  # A GPU's kernel that has read a row writes it in float32, unless it must round.
  of_x = _by_platform(lambda x: x, _on_gpu(as_held, x.dtype), of_x.astype(x.dtype))
  return of_x, of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nnx.LayerNorm):
  """`layer_norm` of the last axis; the result is float32 or wider."""

  def __call__(self, x: Float[Array, "*n h"], *, mask: None = None) -> Float[Array, "*n h"]:  # type: ignore[override]
    assert self.scale is not None
    assert self.bias is not None
    return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
