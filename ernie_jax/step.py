"""State, optimizer and the one training step: pure, no input or output, one jitted program for CPU, GPU and pod."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from ernie_jax import config, losses, mesh, scores

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int, Key

MOST_SKIPPED = 10  # steps in a row without a finite gradient before training stops


@struct.dataclass
class State:
  """Everything that a step changes."""

  step: Int[Array, ""]
  params: scores.Params
  optimizer: optax.ApplyIfFiniteState


def init_params(
  model: config.Model, student: config.Architecture, teacher: config.Architecture, key: Key[Array, ""]
) -> scores.Params:
  """Random parameters of both; the teacher's architecture is the student's when they share the encoder."""
  keys = jax.random.split(key)
  return {
    "student": scores.Student(student, model, keys[0]),
    "teacher": scores.Teacher(student if model.share_encoder else teacher, model, keys[1]),
  }


def names(tree: Any) -> Any:
  """The tree with each leaf replaced by its name, such as `student.encoder.layers.query.kernel`."""

  def name(path, _):
    parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path]
    return ".".join(parts).removesuffix(".value")  # an nnx.Variable holds its array there

  return jax.tree_util.tree_map_with_path(name, tree)


def group(name: str, model: config.Model, weights: config.Weights) -> str:
  """Which learning rate a parameter has in this stage: `body`, `head` (no checkpoint brings it) or `frozen`."""
  teaching = weights.trains_teacher
  if name.startswith("masked."):
    return "head" if weights.mlm else "frozen"
  if name.startswith("teacher."):
    return "frozen" if not teaching else "head" if name.startswith("teacher.head.") else "body"
  if name.startswith("student.projection."):
    return "head" if weights.needs_late else "frozen"
  if name.startswith("student.reduction."):
    return "head" if weights.needs_dual else "frozen"
  alone = weights.mlm or (model.share_encoder and teaching)  # of passages, or the teacher's
  return "body" if weights.needs_student or (alone and name.startswith("student.encoder.")) else "frozen"


def decays(name: str) -> bool:
  """Weight decay leaves out norms and biases."""
  return not name.endswith(".bias") and "norm" not in name


def schedule(peak: float, train: config.Train) -> optax.Schedule:
  """Linear up to the peak over the first share of the steps, then linear down; no step has a rate of 0."""
  warm = round(train.optimizer.warmup * train.steps)

  def rate(n):
    up, down = (n + 1) / max(warm, 1), (train.steps - n) / max(train.steps - warm, 1)
    return peak * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

  return rate


def clip_by(most: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`, of a global norm that is given as `norm`."""

  def update(updates, state, params=None, *, norm, **_):
    return jax.tree.map(lambda x: x * jnp.minimum(1, most / norm), updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(model: config.Model, train: config.Train) -> optax.GradientTransformationExtraArgs:
  """AdamW with clipping by the global norm, which it is given; frozen parameters keep no moments."""
  o = train.optimizer
  adamw = lambda peak: optax.adamw(
    schedule(peak, train),
    weight_decay=o.weight_decay,
    mask=lambda tree: jax.tree.map(decays, names(tree)),
  )
  or_else = lambda rate, other: other if rate is None else rate
  teacher = or_else(o.teacher_learning_rate, o.learning_rate)
  rates = {"body": o.learning_rate, "head": or_else(o.head_learning_rate, o.learning_rate)}
  if o.teacher_learning_rate is not None:
    rates |= {"teacher body": teacher, "teacher head": or_else(o.head_learning_rate, teacher)}

  def label(name):
    found = group(name, model, train.on)
    return f"teacher {found}" if name.startswith("teacher.") and f"teacher {found}" in rates else found

  return optax.chain(
    clip_by(o.clip),
    optax.partition(
      {"frozen": optax.set_to_zero()} | {name: adamw(rate) for name, rate in rates.items()},
      lambda tree: jax.tree.map(label, names(tree)),
    ),
  )


def updated(
  optimizer: optax.GradientTransformationExtraArgs,
  gradient: scores.Params,
  norm: Float[Array, ""],
  state: optax.ApplyIfFiniteState,
  params: scores.Params,
) -> tuple[scores.Params, optax.ApplyIfFiniteState]:
  """Parameters and state after an update; where the gradient's norm is not finite, before it, and counted.

  `optax.apply_if_finite` and its like read the gradient three times, and write moments and parameters in loops of their
  own. A finite gradient of infinite norm, beyond 1e19, does not count here either.
  """
  finite = jnp.isfinite(norm)

  def move():
    updates, inner = optimizer.update(gradient, state.inner_state, params, norm=norm)
    return optax.apply_updates(params, updates), inner

  in_a_row = jnp.where(finite, 0, optax.safe_increment(state.notfinite_count))
  total = jnp.where(finite, state.total_notfinite, optax.safe_increment(state.total_notfinite))
  params, inner = jax.lax.cond(finite, move, lambda: (params, state.inner_state))
  return params, optax.ApplyIfFiniteState(in_a_row, finite, total, inner)


def shares(tree: scores.Params, model: config.Model, train: config.Train) -> scores.Params:
  """What each device updates: its share of each parameter, or of its gradient (ZeRO-1); the frozen ones stay whole."""
  own = lambda name, x: x if group(name, model, train.on) == "frozen" else mesh.split(x)
  return jax.tree.map(own, names(tree), tree)


def init_state(params: scores.Params, model: config.Model, train: config.Train) -> State:
  """The state at the start of a stage: given parameters, fresh optimizer."""
  optimizer = make_optimizer(model, train)

  @jax.jit
  def fresh(params):
    moments = optimizer.init(shares(params, model, train))
    return optax.ApplyIfFiniteState(jnp.zeros((), jnp.int32), jnp.array(True), jnp.zeros((), jnp.int32), moments)

  return State(mesh.replicate(jnp.zeros((), jnp.int32)), params, fresh(params))


def divides(train: config.Train, devices: int) -> None:
  """`UserError` with good sizes unless the batch divides over devices and chunks."""
  unit = devices * (train.chunk or 1)
  if train.batch % unit:
    good = " or ".join(str(max(1, train.batch // unit + i) * unit) for i in (0, 1) if train.batch // unit + i)
    split = f"{devices} devices" + (f" in chunks of {train.chunk} queries" if train.chunk else "")
    each, rest = divmod(train.batch, devices)
    fits = 0 if rest else scores.largest_part(each, train.chunk or 0)
    other = f", or chunk={fits}" if fits else ""
    raise config.UserError(f"batch={train.batch}: does not divide over {split}; use {good}{other}")


def less_memory(
  model: config.Model, train: config.Train, stage: str, devices: int, packed: bool
) -> tuple[list[str], list[str]]:
  """Flags of what would need less memory and is not in use yet.

  First those that a run may go on with, since they change results by rounding alone; then those of another run.
  """
  held, each = train.chunk is not None and not train.recompute, train.batch // devices
  smaller = 0 if held else scores.largest_part(each, (train.chunk or each) - 1)
  chunk = [f"--{stage}.chunk {smaller}"] * (smaller > 0)
  same = [f"--{stage}.recompute"] * held + ["--model.remat"] * (not model.remat)
  other = ["--model.dtype bfloat16"] * (model.dtype != "bfloat16") + [f"a smaller --{stage}.batch"] * (each > 1)
  if packed:  # a chunk's texts are packed together
    return same, chunk + other
  return chunk + same, other


def done(number: Int[Array, ""] | int, train: config.Train) -> Float[Array, ""] | float:
  """How far a stage is in a step: 0 in the first, number 0, and 1 in the last."""
  return number / max(train.steps - 1, 1)


def loss(
  params: scores.Params,
  batch: scores.Batch,
  model: config.Model,
  train: config.Train,
  key: Key[Array, ""] | None,
  done: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """The weighted sum and the unweighted terms of one batch; `done` is how far the stage is, from 0 to 1."""
  terms = losses.terms(scores.score(params, batch, model, train, key), train, done)
  if train.on.nll_ce_fgm:
    terms["nll_ce_fgm"] = fgm(params, batch, model, train, key, done)
  return losses.total(terms, train, done), terms


def gradient(
  params: scores.Params,
  batch: scores.Batch,
  model: config.Model,
  train: config.Train,
  key: Key[Array, ""] | None,
  done: Float[Array, ""] | float = 0.0,
) -> tuple[tuple[Float[Array, ""], dict[str, Float[Array, ""]]], scores.Params]:
  """`loss` and its gradient: of the cross-encoder first, where it has an encoder and a loss of its own and no other.

  So the activations of one encoder at a time are held, not of both.
  """
  if model.share_encoder or not train.teaches_first:
    return jax.value_and_grad(loss, has_aux=True)(params, batch, model, train, key, done)
  temperature = losses.scheduled(train.temperature, train.final_temperature, done)["cross"]
  weights = losses.scheduled(train.weights, train.final_weights, done)
  own = lambda logits, weight, temperature: weight * losses.nll(logits / temperature)
  made, first, batch = scores.taught(params, batch, train, key, own, weights["nll_ce"], temperature)

  def rest(others):
    terms = losses.terms(scores.score({**params, **others}, batch, model, train, key, made), train, done)
    return losses.total(terms, train, done), terms

  others = {name: one for name, one in params.items() if name != "teacher"}
  found, second = jax.value_and_grad(rest, has_aux=True)(others)
  return found, {**first, **second}


def fgm(
  params: scores.Params,
  batch: scores.Batch,
  model: config.Model,
  train: config.Train,
  key: Key[Array, ""] | None,
  done: Float[Array, ""] | float,
) -> Float[Array, ""]:
  """nll_ce where the cross-encoder's word embeddings are moved by `fgm_radius` along its gradient (Miyato et al. 2017).

  As RocketQA does it: one move of the whole table, which has the radius as its norm. The move is a constant. It is of
  the logit alone, also of a teacher that corrects late interaction.
  """
  alone = dataclasses.replace(
    train, weights=config.Weights.only(nll_ce=1), final_weights=None, measure_every=0, residual=False
  )
  tower = "student" if params["teacher"].encoder is None else "teacher"

  def at(move, params):
    moved = jax.tree.map(lambda x: x, params)
    word = moved[tower].encoder.word
    word.embedding = nnx.Param(word.embedding[...] + move)
    return losses.terms(scores.score(moved, batch, model, alone, key), alone, done)["nll_ce"]

  # Of constants: a gradient of this gradient, which is not asked for, is not there where cuDNN computes attention.
  slope = jax.grad(at)(jnp.zeros_like(params[tower].encoder.word.embedding[...]), jax.lax.stop_gradient(params))
  return at(jax.lax.stop_gradient(train.fgm_radius * scores.unit(slope.ravel()).reshape(slope.shape)), params)


def make_train_step(
  model: config.Model, train: config.Train
) -> Callable[[State, scores.Batch, Key[Array, ""]], tuple[State, dict[str, Float[Array, ""]]]]:
  """The jitted step (state, batch, key) -> (state, logs); the given state is donated.

  `key` stays the same over a stage: the step folds in its own number, so a restored state continues the same noise.
  Logs hold every term, `total`, `gradient_norm` (before clipping), `learning_rate`, and how many steps so far had a
  gradient that is not finite and so changed nothing: `skipped`, and `skipped_in_a_row` up to this one.
  """
  optimizer = make_optimizer(model, train)
  own = None if train.on.needs_student or train.on.mlm else train.optimizer.teacher_learning_rate
  rate = schedule(train.optimizer.learning_rate if own is None else own, train)

  def train_step(state, batch, key):
    key = jax.random.fold_in(key, state.step)
    (value, terms), slope = gradient(state.params, batch, model, train, key, done(state.step, train))
    slope, params = shares(slope, model, train), shares(state.params, model, train)
    norm = optax.tree.norm(slope)
    params, moments = updated(optimizer, slope, norm, state.optimizer, params)
    logs = terms | {
      "total": value,
      "gradient_norm": norm,
      "learning_rate": jnp.asarray(rate(state.step - state.optimizer.total_notfinite)),
      "skipped": moments.total_notfinite,
      "skipped_in_a_row": moments.notfinite_count,
    }
    return State(state.step + 1, jax.tree.map(mesh.replicate, params), moments), logs

  return jax.jit(train_step, donate_argnums=0, compiler_options=mesh.compiler_options())
