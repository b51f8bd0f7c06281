"""Arrays out of others' files: a `.pdparams`, a `pytorch_model.bin`, the variables of Paddle 1.x.

To unpickle a file is to run what it says. Nothing is run here: the standard library lists a pickle's opcodes, and a
small stack machine obeys the few that files of arrays hold. A name never becomes a function. A call is only written
down (`Call`), and read as an array once its bytes, its number type and its shape are found to fit.

float16 and bfloat16 become float32; float64, integers and truth values stay. Arrays may be read-only, and those that
share memory in the file share it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ernie_jax.config import UserError, first_line

BFLOAT16 = "bfloat16"
# What Paddle's pickles may name, and number types in them: Paddle has no uint16, and calls a bfloat16 so.
NUMPY_NAMES = """numpy.core.multiarray._reconstruct numpy.core.numeric._frombuffer numpy.ndarray numpy.dtype
  builtins.tuple builtins.bytes _codecs.encode collections.OrderedDict""".split()  # noqa: SIM905
NUMPY = {kind: kind for kind in ("b1", "i1", "i2", "i4", "i8", "u1", "u4", "u8", "f2", "f4", "f8")} | {"u2": BFLOAT16}
# What PyTorch's may name: a storage of numbers has their type in its name.
KINDS = dict(Bool="b1", Byte="u1", Char="i1", Short="i2", Int="i4", Long="i8", Half="f2", Float="f4", Double="f8")
STORAGES = {f"torch.{name}Storage": kind for name, kind in (KINDS | {"BFloat16": BFLOAT16}).items()}
TORCH_NAMES = [
  "torch._utils._rebuild_tensor_v2",
  "torch._utils._rebuild_parameter",
  "collections.OrderedDict",
  *STORAGES,
]
# Number types of Paddle 1.x, by their numbers in its framework.proto.
VARIABLES = {0: "b1", 1: "i2", 2: "i4", 3: "i8", 4: "f2", 5: "f4", 6: "f8", 20: "u1", 21: "i1", 22: BFLOAT16}

OPCODES = 1_000_000  # most that a pickle may hold: an array takes 35
LARGEST = 2**48  # numbers of an array, and steps within it
# Opcodes that push what they carry; those that push a constant; how many values others take (None: all since a mark).
CARRIED = """BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8
  SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8""".split()  # noqa: SIM905
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TAKEN = dict(EMPTY_TUPLE=0, TUPLE1=1, TUPLE2=2, TUPLE3=3, TUPLE=None, APPEND=1, APPENDS=None, SETITEM=2, SETITEMS=None)
TAKEN |= dict(STACK_GLOBAL=2, REDUCE=1, BUILD=1, BINPERSID=1)


@dataclasses.dataclass(eq=False, repr=False)
class Call:
  """A name in a pickle, what it was called with if it was, and the state it was given: written down, never obeyed."""

  name: str
  args: tuple | None = None
  state: Any = None


@dataclasses.dataclass(frozen=True)
class Storage:
  """`count` numbers of a PyTorch file, to which tensors point."""

  key: str
  kind: str
  count: int


def paddle(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a `.pdparams` file by name: a state dict as `paddle.save` of any version writes it.

  Raises `UserError`, as the other two do, for a file that is missing, damaged or holds anything but arrays.
  """
  known: dict[tuple[int, str, str], np.ndarray] = {}
  with _opened(path) as file:
    found = _decoded(file, NUMPY_NAMES, {})
    parts = found.pop("UnpackBigParamInfor@@", {}) if type(found) is dict else {}
    arrays = _each(found, lambda value: _numpy_array(value, known))
    # Paddle cuts arrays at 1 GiB for the protocols that end at 4 GiB. Each part is used once.
    return arrays | _each(parts, lambda value: _joined(value, arrays))


def torch(path: Path) -> dict[str, np.ndarray]:
  """The tensors of a `pytorch_model.bin` by name: a state dict in the zip format or in the one before PyTorch 1.6."""
  with _opened(path) as file:
    return _torch_zip(path) if file[:2] == b"PK" else _torch_legacy(file)


def variables(directory: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
  """The variables of a RocketQA or other Paddle 1.x checkpoint, a file each: those named, or every one there is.

  To name them saves time: an optimiser's variables lie next to the weights, twice as many.
  """
  if not directory.is_dir():
    raise UserError(f"{directory}: no such directory; name the folder of a Paddle 1.x checkpoint")
  there = sorted(path.name for path in directory.iterdir() if path.is_file())
  return {name: _variable(directory / name) for name in (there if names is None else names)}


# Files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
  """A file's bytes; whatever is wrong with them becomes one line."""
  remedy = "download it again from its publisher, or name a checkpoint that has a model.safetensors"
  if not path.is_file():
    raise UserError(f"{path}: missing, or no file; name a whole checkpoint")
  try:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
      yield content
  except ValueError as error:
    raise UserError(f"{path}: {first_line(error)}; {remedy}") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
  # LookupError: the stack, the memo, a zip file's names; RuntimeError, OverflowError: its encryption, its lengths.
  except (LookupError, EOFError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile) as error:
    raise UserError(f"{path}: damaged ({type(error).__name__}: {first_line(error)}); {remedy}") from error


def _torch_zip(path: Path) -> dict[str, np.ndarray]:
  """An archive NAME with NAME/data.pkl and a file NAME/data/KEY for each storage, none of them compressed."""
  storages: dict[str, Storage] = {}
  known: dict[str, np.ndarray] = {}
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or len(set(names)) != len(names):
      raise ValueError("no PyTorch checkpoint: a zip file without one data.pkl, or with a name twice")

    def content(name: str) -> bytes:
      info = archive.getinfo(roots[0] + name)
      if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= path.stat().st_size:
        raise ValueError(f"{name[:60]!r} is compressed, or longer than the file")
      return archive.read(info)

    def numbers(storage: Storage) -> np.ndarray:
      if storage.key not in known:
        known[storage.key] = _numbers(content(f"data/{storage.key}"), storage.kind)
      return known[storage.key]

    if roots[0] + "byteorder" in names and content("byteorder") != b"little":
      raise ValueError("written on a big-endian machine, which is not read")
    found = _decoded(io.BytesIO(content("data.pkl")), TORCH_NAMES, storages)
    return _each(found, lambda value: _tensor(value, numbers))


def _torch_legacy(file: mmap.mmap) -> dict[str, np.ndarray]:
  """Pickles of a magic number, the protocol, the machine, the state dict and the storages' keys; then the storages."""
  storages: dict[str, Storage] = {}
  known: dict[str, np.ndarray] = {}
  match [_decoded(file, TORCH_NAMES, storages) for _ in range(5)]:
    case [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, found, list(keys)]:
      pass
    case _:
      raise ValueError("no PyTorch checkpoint of a little-endian machine")
  for key in keys:
    if type(key) is not str or key not in storages:
      raise ValueError("has a storage to which no tensor points")
    kind, count = storages[key].kind, storages[key].count
    if struct.unpack("<q", file.read(8)) != (count,):
      raise ValueError(f"storage {key[:60]!r} has another size than its tensors say")
    known[key] = _numbers(file.read(count * (2 if kind == BFLOAT16 else np.dtype(kind).itemsize)), kind)
  return _each(found, lambda value: _tensor(value, lambda storage: known[storage.key]))


def _variable(path: Path) -> np.ndarray:
  """A LoDTensor: levels of detail, which no weight has, number type and shape as a protobuf message, the numbers."""
  with _opened(path) as file:
    version, levels = struct.unpack("<IQ", file.read(12))
    for _ in range(levels):
      file.read(*struct.unpack("<Q", file.read(8)))
    again, length = struct.unpack("<Ii", file.read(8))
    if version or again or not 0 < length <= 1024:
      raise ValueError("no weight as Paddle 1.x writes them")
    message, kind, shape = io.BytesIO(file.read(length)), -1, []
    while message.tell() < length:
      field, value = _varint(message), _varint(message)
      if field == 0x08:  # field 1, a number
        kind = value
      elif field == 0x10:  # field 2, a number, for each dimension
        shape.append(value)
      elif field == 0x12:  # field 2, numbers in so many bytes
        end = message.tell() + value
        while message.tell() < end:
          shape.append(_varint(message))
      else:
        raise ValueError("is described by more than a number type and a shape")
    if kind not in VARIABLES:
      raise ValueError(f"has numbers of Paddle's type {kind}, which is not read")
    return _shaped(_numbers(file.read(), VARIABLES[kind]), tuple(shape))


def _varint(message: io.BytesIO) -> int:
  value = 0
  for shift in range(0, 70, 7):
    (byte,) = message.read(1)  # ValueError at the end
    value |= (byte & 127) << shift
    if byte < 128:
      return value
  raise ValueError("is described by a number of more than 64 bits")


# The machine


def _decoded(file: Any, names: list[str], storages: dict[str, Storage]) -> Any:
  """What the next pickle of a file holds: plain values, lists and dicts, `Call`s of `names` and `Storage`s.

  The storages go into `storages` too. A value may hold itself, or one part a million times: nothing may walk it,
  compare it, print it or hash it as a whole.
  """
  stack: list[Any] = []
  marks: list[list[Any]] = []
  memo: dict[int, Any] = {}
  value: Any
  for number, (opcode, value, _) in enumerate(pickletools.genops(file)):
    if number == OPCODES:
      raise ValueError(f"has more than {OPCODES} pickle opcodes, as no weights need")
    items: list[Any] = []
    if opcode.name in TAKEN:
      count = TAKEN[opcode.name]
      if count is None:
        items, stack = stack, marks.pop()
      else:
        items = [stack.pop() for _ in range(count)][::-1]
    match opcode.name:
      case "PROTO" | "FRAME":
        pass
      case name if name in CARRIED:
        stack.append(value)
      case name if name in CONSTANTS:
        stack.append(CONSTANTS[name])
      case "EMPTY_LIST":
        stack.append([])
      case "EMPTY_DICT":
        stack.append({})
      case "MARK":
        marks.append(stack)
        stack = []
      case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
        stack.append(tuple(items))
      case "APPEND" | "APPENDS" if type(stack[-1]) is list:
        stack[-1].extend(items)
      case "SETITEM" | "SETITEMS" if type(stack[-1]) is dict and len(items) % 2 == 0:
        for key, item in zip(items[::2], items[1::2]):
          if type(key) is not str or key in stack[-1]:
            raise ValueError(f"{key[:60]!r} is there twice" if type(key) is str else "holds a name that is no string")
          stack[-1][key] = item
      case "MEMOIZE":
        memo[len(memo)] = stack[-1]
      case "BINPUT" | "LONG_BINPUT":
        memo[value] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[value])
      case "GLOBAL":
        stack.append(_named(value.replace(" ", ".", 1), names))
      case "STACK_GLOBAL" if type(items[0]) is str and type(items[1]) is str:
        stack.append(_named(".".join(items), names))
      case "REDUCE" if type(stack[-1]) is Call and stack[-1].args is None and type(items[0]) is tuple:
        function = stack.pop().name
        stack.append({} if function == "collections.OrderedDict" else Call(function, items[0]))
      case "BUILD" if type(stack[-1]) is dict:
        pass  # an ordered dict's attribute: the versions of PyTorch's modules
      case "BUILD" if type(stack[-1]) is Call:
        stack[-1].state = items[0]
      case "BINPERSID":
        stack.append(_storage(items[0], storages))
      case "STOP" if len(stack) == 1 and not marks:
        return stack[0]
      case name:
        raise ValueError(f"has the pickle opcode {name} where no file of arrays has it")


def _named(name: str, names: list[str]) -> Call:
  for now, before in (("numpy._core.", "numpy.core."), ("__builtin__.", "builtins.")):
    if name.startswith(now):
      name = before + name.removeprefix(now)
  if name not in names:
    raise ValueError(f"names {repr(name)[1:-1][:80]}, which is no array")
  return Call(name)


def _storage(identity: Any, storages: dict[str, Storage]) -> Storage:
  match identity:
    case ("storage", Call(name, None), str(key), str(), count, *view) if name in STORAGES and view in ([], [None]):
      _whole((count,))
      storage = storages.setdefault(key, Storage(key, STORAGES[name], count))
      if (storage.kind, storage.count) == (STORAGES[name], count):
        return storage
  raise ValueError("has a persistent id that is no storage of numbers")


# Arrays


def _each(found: Any, read: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
  """Every value of a pickled dict as an array, but Paddle's table of names."""
  if type(found) is not dict:
    raise ValueError("holds no dict of arrays")
  arrays = {}
  for name, value in found.items():
    try:
      if name != "StructuredToParameterName@@":
        arrays[name] = read(value)
    except ValueError as error:
      raise ValueError(f"{name[:60]!r}: {error}") from error
  return arrays


def _numpy_array(value: Any, known: dict[tuple[int, str, str], np.ndarray]) -> np.ndarray:
  """A numpy array, or Paddle's (name, array). `known`: numbers made once for all arrays that share their bytes."""
  match value:
    case Call("builtins.tuple", ((str(), inner),)) | (str(), inner):
      value = inner
  match value:
    case Call("numpy.core.multiarray._reconstruct", _, (1, shape, dtype, bool(fortran), raw)):
      layout = "F" if fortran else "C"
    case Call("numpy.core.numeric._frombuffer", (raw, dtype, shape, "C" | "F" as layout)):
      pass
    case _:
      raise ValueError("is no array, or no plain one")
  match dtype:
    case Call("numpy.dtype", (str(kind), *_), (_, "<" | ">" | "|" as order, None, None, None, -1, -1, 0)):
      kind = NUMPY.get(kind, "")
    case _:
      kind = ""
  match raw:
    case Call("_codecs.encode", (str(text), "latin1")):  # bytes, as Python 3 writes them for Python 2
      raw = text
    case Call("builtins.bytes", ()):
      raw = b""
  if not kind or type(raw) not in (bytes, bytearray, str):
    raise ValueError("is an array of other than plain numbers")
  which = id(raw), kind, order
  if which not in known:
    known[which] = _numbers(raw.encode("latin1") if isinstance(raw, str) else raw, kind, order)
  return _shaped(known[which], shape, layout)


def _joined(value: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
  """The array that is cut in parts, which are taken out of `arrays`."""
  match value:
    case {"OriginShape": shape, "slices": list(names)} if all(type(name) is str and name in arrays for name in names):
      pieces = [arrays.pop(name).reshape(-1) for name in names]
      if len({x.dtype for x in pieces}) == 1:
        return _shaped(np.concatenate(pieces), shape)
  raise ValueError("is in parts that do not fit")


def _tensor(value: Any, numbers: Callable[[Storage], np.ndarray]) -> np.ndarray:
  """A PyTorch tensor or parameter: a view of its storage's numbers, within them."""
  match value:
    case Call("torch._utils._rebuild_parameter", (inner, _, _)):
      value = inner
  match value:
    case Call("torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, tuple(steps), _, _)):
      flat, count = numbers(storage), _count(shape)
    case _:
      raise ValueError("is no tensor, or no plain one")
  _whole((offset, *steps))
  last = offset + sum((n - 1) * step for n, step in zip(shape, steps))
  if flat.size != storage.count or count > flat.size or (count and last >= flat.size) or len(shape) != len(steps):
    raise ValueError("is a tensor that reaches out of its storage")
  if not count:
    return np.zeros(shape, flat.dtype)
  width = flat.dtype.itemsize
  return np.ndarray(shape, flat.dtype, flat, offset * width, [step * width for step in steps])


def _numbers(raw: bytes | bytearray, kind: str, order: str = "<") -> np.ndarray:
  """[N] bytes as numbers of this machine."""
  if kind == BFLOAT16:  # the upper half of a float32
    return (np.frombuffer(raw, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
  x = np.frombuffer(raw, order + kind)
  return x.astype(np.float32 if kind == "f2" else x.dtype.newbyteorder("="), copy=False)


def _shaped(numbers: np.ndarray, shape: Any, layout: Any = "C") -> np.ndarray:
  if _count(shape) != numbers.size:
    raise ValueError(f"has {numbers.size} numbers for the shape {shape}")
  return numbers.reshape(shape, order=layout)


def _count(shape: Any) -> int:
  """How many numbers an array of a shape holds."""
  if type(shape) is not tuple or len(shape) > 32 or math.prod(max(n, 1) for n in _whole(shape)) >= LARGEST:
    raise ValueError("is of a shape that no array has")
  return math.prod(shape)


def _whole(values: tuple) -> tuple[int, ...]:
  if not all(type(n) is int and 0 <= n < LARGEST for n in values):
    raise ValueError("has a size or a place that is negative, too large or no whole number")
  return values
