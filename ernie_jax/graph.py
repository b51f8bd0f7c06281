"""The three scorers as ONNX graphs: for runtimes without JAX, at any batch size and any length.

Inputs are what a tokenizer gives, int64 [batch, length]: `input_ids`, `attention_mask` (1; 0 for tokens that are not
read: padding), `token_type_ids`. Weights lie in the graph; they and the output are float32, whatever `model.dtype`. A
text of more tokens than there are positions is an error of the runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ernie_jax import config
from ernie_jax.config import UserError
from ernie_jax.encoder import Encoder, Layer
from ernie_jax.scores import Params, Student, Teacher, dual_width, late_width

if TYPE_CHECKING:
  import onnx
  from flax import nnx

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 17  # the first with LayerNormalization: ONNX Runtime has it since 1.12
FORMAT = 8  # of the file, as old as the opset: `onnx` would write its own newest, which older runtimes refuse
MOST = 2**31 - 2**20  # bytes of weights: protobuf's largest message, less the nodes


class Graph:
  """Nodes and weights in the making. A tensor is its name."""

  def __init__(self) -> None:
    try:
      import onnx
    except ImportError as error:
      raise UserError(f"onnx: {error.name} is not installed; pip install 'ernie-jax[onnx]'") from error
    self.onnx = onnx
    opset = onnx.helper.make_opsetid("", OPSET)
    self.model = onnx.ModelProto(ir_version=FORMAT, producer_name="ernie-jax", opset_import=[opset])
    self.graph = self.model.graph  # filled in place: a list of weights would be a second copy of them

  def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
    """A node; its output."""
    output = f"{kind}_{len(self.graph.node)}"
    self.graph.node.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
    return output

  def weight(self, array: Any, name: str = "") -> str:
    """Integers stay such, all else is float32."""
    array = np.asarray(array)
    kind = np.int64 if array.dtype.kind == "i" else np.float32
    name = name or f"constant_{len(self.graph.initializer)}"
    self.graph.initializer.append(self.onnx.numpy_helper.from_array(np.asarray(array, kind, order="C"), name))
    return name

  def close(self, name: str, *shape: str | int) -> onnx.ModelProto:
    """The graph, whose output is that of the last node, under this name."""
    self.graph.name = name
    self.graph.node[-1].output[:] = [name]
    info, kinds = self.onnx.helper.make_tensor_value_info, self.onnx.TensorProto
    self.graph.input.extend(info(each, kinds.INT64, ["batch", "length"]) for each in INPUTS)
    self.graph.output.append(info(name, kinds.FLOAT, shape))
    return self.model


def dual(student: Student, model: config.Model, *, query: bool = False) -> onnx.ModelProto:
  """Dual-encoder vectors: `vector` [batch, H], or as wide as `model.dual_width`; of length 1 with `model.cosine`.

  `query` takes the queries' encoder where they have one. `UserError` if `onnx` is missing or the weights are too large.
  """
  encoder = tower(student, query)
  fits(encoder, student.reduction)
  g = Graph()
  alone = model.pooling == "cls"
  hidden = encoded(g, encoder, leads=alone)
  one = g.weight([1])
  if alone:
    vector = g.op("Squeeze", hidden, one)
  else:
    read = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=g.onnx.TensorProto.FLOAT), g.weight([2]))
    summed, count = (g.op("ReduceSum", x, one, keepdims=0) for x in (g.op("Mul", hidden, read), read))
    vector = g.op("Div", summed, count)
  if student.reduction is not None:
    vector = dense(g, vector, "reduction", student.reduction)
  if model.cosine:
    vector = unit(g, vector)
  return g.close("vector", "batch", dual_width(student))


def late(student: Student, *, query: bool = False) -> onnx.ModelProto:
  """Late interaction's token vectors: `vectors` [batch, length, D], of length 1. Errors as for `dual`.

  Tokens that are not read have vectors too: MaxSim must leave padding out, of passages before the maximum (a vector of
  zeros would win over negative similarities), of queries before the sum. The [MASK] tokens of `data.augment` are such
  tokens that count: give them `attention_mask` 0, and sum over them.
  """
  encoder = tower(student, query)
  fits(encoder, student.projection)
  g = Graph()
  hidden = encoded(g, encoder, leads=False)
  if student.projection is not None:
    hidden = dense(g, hidden, "projection", student.projection)
  unit(g, hidden)
  return g.close("vectors", "batch", "length", late_width(student))


def cross(params: Params) -> onnx.ModelProto:
  """The cross-encoder: `logits` [batch], of rows [CLS] query [SEP] passage [SEP] with the passage of type 1.

  Errors as for `dual`.
  """
  teacher: Teacher = params["teacher"]
  encoder = params["student"].encoder if teacher.encoder is None else teacher.encoder
  fits(encoder, teacher.pooler, teacher.head)
  g = Graph()
  hidden = encoded(g, encoder, leads=True)
  if teacher.pooler is not None:
    hidden = g.op("Tanh", dense(g, hidden, "pooler", teacher.pooler))
  g.op("Squeeze", dense(g, hidden, "head", teacher.head), g.weight([1, 2]))
  return g.close("logits", "batch")


def tower(student: Student, query: bool) -> Encoder:
  return student.query_encoder if query and student.query_encoder is not None else student.encoder


def fits(*parts: nnx.Module | None) -> None:
  """`UserError` if the weights of these take more than a file may hold."""
  size = 4 * sum(x.size for x in jax.tree.leaves(parts))
  if size > MOST:
    raise UserError(f"onnx: {size / 1e9:.2f} GB of weights, a file holds {MOST / 1e9:.2f}; export a smaller encoder")


def encoded(g: Graph, encoder: Encoder, *, leads: bool) -> str:
  """Hidden states of the last layer [batch, length, H]; with `leads` those of the first tokens alone, [batch, 1, H].

  In the form in which BERT is usually exported: ONNX Runtime's offline optimiser knows it, and on a CPU no other one
  (query, key and value as one product, the scale within the weights, Gemm) was faster than by a few percent.
  """
  a = encoder.architecture
  words = g.op("Gather", g.weight(encoder.word.embedding, "word"), "input_ids")
  kinds = np.asarray(encoder.type.embedding)
  if encoder.task is not None:
    kinds = kinds + np.asarray(encoder.task.embedding)[0]
  x = g.op("Add", words, g.op("Gather", g.weight(kinds, "type"), "token_type_ids"))
  # A slice ends with the table, so the sum with a longer text fails. Looking positions up would not fail everywhere: on
  # a GPU, Gather answers 0 for a row that is not there.
  zero = g.weight([0])
  length = g.op("Shape", "input_ids", start=1)
  positions = g.op("Slice", g.weight(encoder.position.embedding, "position"), zero, length, zero)
  x = norm(g, g.op("Add", x, positions), "norm", encoder.norm, a)
  read = g.op("Unsqueeze", g.op("Unsqueeze", "attention_mask", g.weight([1])), g.weight([2]))
  read = g.op("Cast", read, to=g.onnx.TensorProto.FLOAT)
  mask = g.op("Mul", g.op("Sub", g.weight(1.0), read), g.weight(np.finfo(np.float32).min))
  stacks = jax.tree.map(np.asarray, encoder.layers)
  for i in range(a.layers):
    own = jax.tree.map(lambda stack: stack[i], stacks)
    x = layer(g, x, mask, f"layers.{i}", own, leads=leads and i == a.layers - 1)
  return x


def layer(g: Graph, x: str, mask: str, name: str, own: Layer, *, leads: bool) -> str:
  """As `encoder.Layer`. `mask` is added to the attention's logits."""
  a = own.architecture
  size = a.width // a.heads
  heads = g.weight([0, 0, a.heads, size])  # 0: as it was

  def part(x: str, which: str, *order: int) -> str:
    return g.op("Transpose", g.op("Reshape", dense(g, x, f"{name}.{which}", getattr(own, which)), heads), perm=order)

  key, value = part(x, "key", 0, 2, 3, 1), part(x, "value", 0, 2, 1, 3)
  if leads:
    x = g.op("Slice", x, g.weight([0]), g.weight([1]), g.weight([1]))
  logits = g.op("Div", g.op("MatMul", part(x, "query", 0, 2, 1, 3), key), g.weight(size**0.5))
  attention = g.op("Softmax", g.op("Add", logits, mask), axis=-1)
  mixed = g.op("Transpose", g.op("MatMul", attention, value), perm=(0, 2, 1, 3))
  mixed = dense(g, g.op("Reshape", mixed, g.weight([0, 0, a.width])), f"{name}.output", own.output)
  x = norm(g, g.op("Add", mixed, x), f"{name}.attention_norm", own.attention_norm, a)
  inner = dense(g, x, f"{name}.up", own.up)
  inner = g.op("Relu", inner) if a.activation == "relu" else gelu(g, inner)
  inner = dense(g, inner, f"{name}.down", own.down)
  return norm(g, g.op("Add", inner, x), f"{name}.output_norm", own.output_norm, a)


def dense(g: Graph, x: str, name: str, linear: nnx.Linear) -> str:
  x = g.op("MatMul", x, g.weight(linear.kernel, f"{name}.kernel"))
  return x if linear.bias is None else g.op("Add", x, g.weight(linear.bias, f"{name}.bias"))


def norm(g: Graph, x: str, name: str, own: nnx.LayerNorm, a: config.Architecture) -> str:
  scale, bias = g.weight(own.scale, f"{name}.scale"), g.weight(own.bias, f"{name}.bias")
  return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=a.epsilon)


def gelu(g: Graph, x: str) -> str:
  """The exact one, in the form that runtimes know and replace by one operation: x (1 + erf(x / sqrt 2)) / 2."""
  grown = g.op("Add", g.op("Erf", g.op("Div", x, g.weight(2**0.5))), g.weight(1.0))
  return g.op("Mul", g.op("Mul", x, grown), g.weight(0.5))


def unit(g: Graph, x: str) -> str:
  """As `scores.unit`."""
  return g.op("Div", x, g.op("Max", g.op("ReduceL2", x, axes=[-1], keepdims=1), g.weight(1e-12)))
