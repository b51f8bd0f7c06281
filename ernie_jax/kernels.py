"""Products and activations as hardware likes them: how each is rounded, how far it is from the exact one.

Parameters are float32. Where products are of bfloat16 (`model.dtype`), both operands are rounded to it and what they
give is summed in float32, in the two products of the gradient too. All matrix units work so; that of a CPU (AMX) is
used by XLA for a float32 result alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

if TYPE_CHECKING:
  from jaxtyping import Array, Float


def product(x: Float[Array, "n i"], w: Float[Array, "i o"], dtype: str = "float32") -> Float[Array, "n o"]:
  """x w, summed in float32, of operands in `dtype`; its gradient likewise, in the dtypes of `x` and `w`."""
  return x @ w if dtype == "float32" else _rounded(dtype, x, w)


def _summed(spec, dtype, x, y):
  return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


@jax.jit  # outside of a compiled program only a whole array on a device can be asked for a layout
def _turned(x):
  """The transpose, moved in memory: a CPU's fast products of bfloat16 read rows; the others take twice the time."""
  return with_layout_constraint(x.T, Layout((0, 1)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(dtype, x, w):
  return _summed("ni,io->no", dtype, x, w)


def _forward(dtype, x, w):
  kept = x.astype(dtype), w.astype(dtype)  # half the memory
  return _rounded(dtype, *kept), (*kept, jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))


def _backward(dtype, kept, slope):
  x, w, like_x, like_w = kept
  of_x = _summed("no,io->ni", dtype, slope, w)
  rows = lambda x, slope: _summed("in,no->io", dtype, _turned(x), slope)
  of_w = jax.lax.platform_dependent(x, slope, cpu=rows, default=partial(_summed, "ni,no->io", dtype))
  return of_x.astype(like_x.dtype), of_w.astype(like_w.dtype)


_rounded.defvjp(_forward, _backward)


class Linear(nnx.Linear):
  """x W + b, of operands in `dtype` (None: float32); the result has the dtype of the input."""

  def __call__(self, inputs: Float[Array, "*n i"], out_sharding: None = None) -> Float[Array, "*n o"]:
    dtype, kernel = jnp.dtype(self.dtype or "float32").name, self.kernel[...]
    y = product(inputs.reshape(-1, kernel.shape[0]), kernel, dtype).reshape(*inputs.shape[:-1], kernel.shape[1])
    return (y if self.bias is None else y + self.bias[...]).astype(inputs.dtype)


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


def layer_norm(
  x: Float[Array, "*n h"], scale: Float[Array, "h"], bias: Float[Array, "h"], epsilon: float
) -> Float[Array, "*n h"]:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016), in float32 or wider, as its result is.

  The variance is that of the differences: E[x^2] - E[x]^2 loses digits. The gradient, in closed form, takes both its
  means over a row at once; derived operation by operation it reads its operands twice.
  """
  return _norm(x, scale, bias, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x, scale, bias, epsilon):
  return _norm_forward(x, scale, bias, epsilon)[0]


def _norm_forward(x, scale, bias, epsilon):
  wide = _wide(x)
  mean = wide.mean(-1, keepdims=True)
  rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
  return (wide - mean) * rate * scale + bias, (x, mean, rate, scale, bias)


def _norm_backward(_, kept, slope):
  x, mean, rate, scale, bias = kept
  normal, rows = (_wide(x) - mean) * rate, tuple(range(slope.ndim - 1))
  inner = slope * scale
  along = normal * (inner * normal).mean(-1, keepdims=True)
  of_x = rate * (inner - inner.mean(-1, keepdims=True) - along)
  of_scale, of_bias = (slope * normal).sum(rows), slope.sum(rows)
  return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_norm.defvjp(_norm_forward, _norm_backward)


class LayerNorm(nnx.LayerNorm):
  """`layer_norm` of the last axis; the result is float32 or wider."""

  def __call__(self, x: Float[Array, "*n h"], *, mask: None = None) -> Float[Array, "*n h"]:  # type: ignore[override]
    assert self.scale is not None
    assert self.bias is not None
    return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)
