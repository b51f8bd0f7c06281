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

if TYPE_CHECKING:
  from jaxtyping import Array, Float


def product(x: Float[Array, "n i"], w: Float[Array, "i o"], dtype: str = "float32") -> Float[Array, "n o"]:
  """x w, summed in float32, of operands in `dtype`; its gradient likewise, in the dtypes of `x` and `w`."""
  return x @ w if dtype == "float32" else _rounded(dtype, x, w)


def _summed(spec, dtype, x, y):
  return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(dtype, x, w):
  return _summed("ni,io->no", dtype, x, w)


def _forward(dtype, x, w):
  kept = x.astype(dtype), w.astype(dtype)  # half the memory
  return _rounded(dtype, *kept), (*kept, jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))


def _backward(dtype, kept, slope):
  x, w, like_x, like_w = kept
  of_x, of_w = _summed("no,io->ni", dtype, slope, w), _summed("ni,no->io", dtype, x, slope)
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
