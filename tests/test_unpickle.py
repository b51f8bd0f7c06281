"""Arrays out of foreign files: what others wrote is read to the bit; hostile and damaged files end in one line."""

import collections
import contextlib
import copyreg
import io
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ernie_jax import unpickle
from ernie_jax.config import UserError

FIXTURES = Path(__file__).parent / "fixtures"
pytestmark = [
  pytest.mark.timeout(20),
  pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),  # in damaged strings
]


# ---- What is in the files --------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
  """Of every number type that a state dict may have, in both layouts, and of shapes at the edge."""
  rng = np.random.default_rng(0)
  plain = {
    str(np.dtype(kind)): rng.integers(0, 2 if kind == "?" else 100, (3, 4)).astype(kind) for kind in "?bhilBILdf"
  }
  return plain | {
    "half": rng.standard_normal((2, 5)).astype(np.float16),
    "fortran": np.asfortranarray(rng.standard_normal((4, 3, 2)).astype(np.float32)),
    "strided": rng.standard_normal((4, 6)).astype(np.float32)[::2, 1::2],
    "big-endian": rng.standard_normal((2, 2)).astype(">f4"),
    "big-endian half": rng.standard_normal((2, 2)).astype(">f2"),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "one byte": np.array([True]),
    "名": rng.standard_normal(300).astype(np.float32),
  }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Names in their order, shapes, number types (but the halves, which are float32) and every bit."""
  assert list(found) == list(expected)
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, strict=False)
    wide = np.dtype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind == "f" else x.dtype.newbyteorder("=")
    assert found[name].dtype == wide
    assert found[name].shape == x.shape
    assert type(found[name]) is np.ndarray


class Tensor:
  """As Paddle's: pickled as `tuple((name, ndarray))`."""

  def __init__(self, name: str, x: np.ndarray):
    self.name, self.x = name, x


def saved(obj, path: Path, protocol: int) -> Path:
  """As `paddle.save` does it: a table of reducers, for this file alone."""
  with open(path, "wb") as file:
    pickler = pickle.Pickler(file, protocol)
    pickler.dispatch_table = copyreg.dispatch_table | {Tensor: lambda tensor: (tuple, ((tensor.name, tensor.x),))}
    pickler.dump(obj)
  return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["arrays", "arrays and names", "tensors", "tuples", "ordered tensors"])
def test_what_paddle_saves_is_read_to_the_bit(tmp_path, protocol, form):
  expected = arrays()
  obj = {
    "arrays": expected,
    "arrays and names": expected | {"StructuredToParameterName@@": {name: f"linear_{name}.w_0" for name in expected}},
    "tensors": {name: Tensor(f"linear_{name}.w_0", x) for name, x in expected.items()},
    "tuples": {name: (f"linear_{name}.w_0", x) for name, x in expected.items()},
    "ordered tensors": collections.OrderedDict((name, Tensor(f"linear_{name}.w_0", x)) for name, x in expected.items()),
  }[form]
  path = saved(obj, tmp_path / "model.pdparams", protocol)
  assert_same(unpickle.paddle(path), expected)
  if form.startswith("arrays"):  # a file as pickle itself reads it
    assert list(pickle.loads(path.read_bytes())) == list(obj)


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_1_named_its_functions_otherwise(tmp_path, protocol):
  path = saved(arrays(), tmp_path / "model.pdparams", protocol)
  new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
  content = path.read_bytes()
  assert content.count(new) == 1
  if protocol == 4:  # a string with its length, in a frame with its length
    new, old = b"\x8c" + bytes([len(new)]) + new, b"\x8c" + bytes([len(old)]) + old
  path.write_bytes(content.replace(new, old))
  assert_same(unpickle.paddle(path), arrays())


@pytest.mark.parametrize("protocol", [2, 3])
def test_parameters_that_paddle_cut_are_put_together(tmp_path, protocol):
  whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  flat = whole.reshape(-1)
  obj = {
    "bias": np.ones(3, np.float32),
    "weight@@.0": flat[:10],
    "weight@@.1": flat[10:20],
    "weight@@.2": flat[20:],
    "UnpackBigParamInfor@@": {
      "weight": {"OriginShape": (2, 3, 4), "slices": ["weight@@.0", "weight@@.1", "weight@@.2"]}
    },
    "StructuredToParameterName@@": {},
  }
  path = saved(obj, tmp_path / "model.pdparams", protocol)
  assert_same(unpickle.paddle(path), {"bias": np.ones(3, np.float32), "weight": whole})


def test_paddles_uint16_is_a_bfloat16(tmp_path):
  exact = np.float32([1, -2.5, 0, 3e38, 2**-126, np.inf])  # no bits are lost but those of 3e38
  bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
  found = unpickle.paddle(saved({"x": bits}, tmp_path / "model.pdparams", 4))["x"]
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, exact, rtol=2**-7)
  np.testing.assert_array_equal(found[:3], exact[:3])
  swapped = unpickle.paddle(saved({"x": bits.astype(">u2")}, tmp_path / "model.pdparams", 4))["x"]
  np.testing.assert_array_equal(swapped, found)


def test_arrays_that_share_bytes_share_memory(tmp_path):
  """Halves too, which are made float32 once: 20,000 names of one array of 2 MB are not 80 GB."""
  half = np.ones(2**20, np.float16)
  found = unpickle.paddle(saved({str(i): half for i in range(20_000)}, tmp_path / "model.pdparams", 4))
  assert len(found) == 20_000
  assert np.shares_memory(found["0"], found["19999"])


@pytest.mark.parametrize("name", ["torch_zip.bin", "torch_legacy.bin"])
def test_what_pytorch_saves_is_read_to_the_bit(name):
  found, expected = unpickle.torch(FIXTURES / name), np.load(FIXTURES / "torch.npz")
  assert_same(found, {name: expected[name] for name in expected.files})
  assert np.shares_memory(found["plain"], found["transposed"])
  assert np.shares_memory(found["weight"], found["tied"])
  assert not found["transposed"].flags.c_contiguous


def test_the_fixtures_hold_what_they_are_for():
  with zipfile.ZipFile(FIXTURES / "torch_zip.bin") as archive:
    content = archive.read("torch_zip/data.pkl")
  for part in (b"_rebuild_parameter", b"_metadata", b"HalfStorage", b"BFloat16Storage", b"OrderedDict"):
    assert part in content
    assert part in (FIXTURES / "torch_legacy.bin").read_bytes()


# ---- Pickles by hand -------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
  raw = value.encode("utf-8", "surrogatepass")
  return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
  return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
  return f"c{module}\n{attribute}\n".encode()


def many(*values: bytes) -> bytes:
  """A tuple."""
  return b"(" + b"".join(values) + b"t"


def call(module: str, attribute: str, *args: bytes) -> bytes:
  return name(module, attribute) + many(*args) + b"R"


def table(**values: bytes) -> bytes:
  return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def pickled(body: bytes) -> bytes:
  return b"\x80\x02" + body + b"."


FALSE, TRUE, NONE = b"\x89", b"\x88", b"N"
SHAPE = many(number(2))
RAW = b"U\x08" + struct.pack("<2f", 1, 2)  # a string of 8 bytes, as Python 2 wrote them
PLAIN = many(number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0))


def dtype(kind: bytes = text("f4"), state: bytes = PLAIN) -> bytes:
  return call("numpy", "dtype", kind, number(0), number(1)) + state + b"b"


def array(shape: bytes = SHAPE, kind: bytes | None = None, raw=RAW, fortran=FALSE, version=1) -> bytes:
  empty = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), many(number(0)), b"U\x01b")
  return empty + many(number(version), shape, kind or dtype(), fortran, raw) + b"b"


def weights(value: bytes) -> bytes:
  """A .pdparams with one array of the name x."""
  return pickled(table(x=value))


def storage(kind: str = "FloatStorage", key: bytes = text("0"), count: int = 4) -> bytes:
  return many(text("storage"), name("torch", kind), key, text("cpu"), number(count)) + b"Q"


def tensor(own: bytes | None = None, offset: int = 0, shape=(2, 2), steps=(2, 1), more: bytes = b"") -> bytes:
  numbers = lambda values: many(*map(number, values))
  hooks = call("collections", "OrderedDict")
  own = own or storage()
  return call(
    "torch._utils", "_rebuild_tensor_v2", own, number(offset), numbers(shape), numbers(steps), FALSE, hooks, more
  )


def parameter(own: bytes) -> bytes:
  return call("torch._utils", "_rebuild_parameter", own, TRUE, call("collections", "OrderedDict"))


def archived(body: bytes, packed: str = "", method=zipfile.ZIP_DEFLATED, **files: bytes) -> bytes:
  """A checkpoint in the zip format, with one file compressed if it is named; storage 0 holds four numbers."""
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w") as archive:
    for file, raw in {"data.pkl": pickled(body), "data/0": struct.pack("<4f", 1, 2, 3, 4), **files}.items():
      archive.writestr(f"archive/{file}", raw, method if file == packed else zipfile.ZIP_STORED)
  return content.getvalue()


FOUR = struct.pack("<q4f", 4, 1, 2, 3, 4)
MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def legacy(body: bytes, magic=MAGIC, protocol=1001, little=TRUE, keys=b"]X\x01\0\0\x000a", storages=FOUR) -> bytes:
  """A checkpoint in the format before PyTorch 1.6."""
  heads = (magic, number(protocol), table(little_endian=little), body, keys)
  return b"".join(map(pickled, heads)) + storages


def variable(shape=(2, 3), kind=5, packed=False, raw: bytes | None = None, version=0, levels=(), more=b"") -> bytes:
  """A LoDTensor as Paddle 1.x writes it."""
  sizes = b"".join(map(varint, shape))
  dims = b"\x12" + varint(len(sizes)) + sizes if packed else b"".join(b"\x10" + varint(n) for n in shape)
  message = b"\x08" + varint(kind) + dims + more
  head = struct.pack("<IQ", version, len(levels)) + b"".join(struct.pack("<Q", len(x)) + x for x in levels)
  raw = np.arange(6, dtype=np.float32).tobytes() if raw is None else raw
  return head + struct.pack("<Ii", version, len(message)) + message + raw


def varint(value: int) -> bytes:
  value %= 2**64  # a negative one takes ten bytes
  parts = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
  return bytes([part | 128 for part in parts[:-1]] + parts[-1:])


@pytest.fixture
def at(tmp_path):
  """Writes a file and reads it."""

  def read(content: bytes, reader=unpickle.paddle) -> dict[str, np.ndarray]:
    (tmp_path / "file").write_bytes(content)
    return {"file": unpickle._variable(tmp_path / "file")} if reader is VARIABLE else reader(tmp_path / "file")

  return read


PADDLE, TORCH, VARIABLE = unpickle.paddle, unpickle.torch, unpickle.variables
GOOD = {
  "a pickle of Python 2": (PADDLE, weights(array())),
  "numpy's protocol 5": (PADDLE, weights(call("numpy.core.numeric", "_frombuffer", RAW, dtype(), SHAPE, text("C")))),
  "a memo at the highest place": (PADDLE, weights(array() + b"r\xff\xff\xff\xff")),
  "a zip": (TORCH, archived(table(x=tensor(shape=(2,), steps=(1,))))),
  "a zip of a little-endian machine": (
    TORCH,
    archived(table(x=tensor(shape=(2,), steps=(1,))), byteorder=b"little"),
  ),
  "a legacy file": (TORCH, legacy(table(x=tensor(shape=(2,), steps=(1,))))),
}


@pytest.mark.parametrize("case", GOOD)
def test_the_builders_of_hostile_files_build_good_ones_too(at, case):
  """So that what is refused below is refused for the one thing in which it differs."""
  reader, content = GOOD[case]
  assert_same(at(content, reader), {"x": np.float32([1, 2])})


def test_a_tensor_is_a_window_of_its_storage(at):
  x = np.float32([[1, 2], [3, 4]])
  steps = {(2, 1): x, (1, 2): x.T}
  for strides, expected in steps.items():
    np.testing.assert_array_equal(at(archived(table(x=tensor(steps=strides))), TORCH)["x"], expected)
  np.testing.assert_array_equal(at(archived(table(x=tensor(offset=1, shape=(3,), steps=(1,)))), TORCH)["x"], [2, 3, 4])
  np.testing.assert_array_equal(at(archived(table(x=tensor(shape=(2,), steps=(0,)))), TORCH)["x"], [1, 1])
  # An empty one may begin at the end, and the step of a single row means nothing.
  assert at(archived(table(x=tensor(offset=4, shape=(3, 0), steps=(1, 1)))), TORCH)["x"].shape == (3, 0)
  np.testing.assert_array_equal(at(archived(table(x=tensor(shape=(1, 4), steps=(99, 1)))), TORCH)["x"], [[1, 2, 3, 4]])


# ---- Variables of Paddle 1.x -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  ("number_", "kind"),
  [(0, "?"), (1, "<i2"), (2, "<i4"), (3, "<i8"), (4, "<f2"), (5, "<f4"), (6, "<f8"), (20, "u1"), (21, "i1")],
)
def test_a_variable_is_read_to_the_bit(at, number_, kind, packed):
  x = np.random.default_rng(0).integers(0, 2, (3, 1, 4)).astype(kind)
  assert_same(at(variable(x.shape, number_, packed, x.tobytes()), VARIABLE), {"file": x})


def test_variables_of_other_forms(at):
  expected = {"file": np.arange(6, dtype=np.float32).reshape(2, 3)}
  assert_same(at(variable(levels=(b"", b"12345678")), VARIABLE), expected)  # levels of detail are passed over
  bits = (expected["file"].view(np.uint32) >> 16).astype("<u2")
  assert_same(at(variable(kind=22, raw=bits.tobytes()), VARIABLE), expected)
  assert_same(at(variable((1,), raw=b"\0\0\x80?"), VARIABLE), {"file": np.ones(1, np.float32)})
  assert_same(at(variable((200, 300), raw=bytes(240_000)), VARIABLE), {"file": np.zeros((200, 300), np.float32)})


def test_variables_by_name(tmp_path):
  for which in ("encoder_layer_0_ffn_fc_0.w_0", "pos_embedding", "pos_embedding_moment1_0"):
    (tmp_path / which).write_bytes(variable())
  (tmp_path / "pos_embedding_moment1_0").write_bytes(b"never read")
  found = unpickle.variables(tmp_path, ["pos_embedding", "encoder_layer_0_ffn_fc_0.w_0"])
  assert list(found) == ["pos_embedding", "encoder_layer_0_ffn_fc_0.w_0"]
  with pytest.raises(UserError, match="moment1_0: "):
    unpickle.variables(tmp_path)
  (tmp_path / "pos_embedding_moment1_0").write_bytes(variable())
  assert list(unpickle.variables(tmp_path)) == sorted(path.name for path in tmp_path.iterdir())
  with pytest.raises(UserError, match="task_embedding: missing"):
    unpickle.variables(tmp_path, ["task_embedding"])
  with pytest.raises(UserError, match="nowhere: no such directory"):
    unpickle.variables(tmp_path / "nowhere")


# ---- Files that would run something ----------------------------------------------------------------------------------


def reduced(module: str, attribute: str, *args: str) -> bytes:
  return call(module, attribute, *map(text, args))


def attacks(marker: str) -> dict[str, bytes]:
  """Bodies of pickles that `pickle.load` obeys: each makes the file `marker`."""
  python = f"open({marker!r}, 'w').close()"
  shell = f"touch {marker}"
  short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()
  late = lambda module, attribute: short(module) + short(attribute) + b"\x93"
  inner = pickled(reduced("os", "system", shell))
  system, evil = name("os", "system"), reduced("os", "system", shell)
  path = call("pathlib", "PosixPath", text(marker))
  memmap = many(text(marker), text("uint8"), text("w+"), number(0), many(number(1)))
  import_os = reduced("builtins", "__import__", "os")
  return {
    "os.system": evil,
    "posix.system": reduced("posix", "system", shell),
    "builtins.eval": reduced("builtins", "eval", python),
    "builtins.exec": reduced("builtins", "exec", python),
    "eval by its name in Python 2": reduced("__builtin__", "eval", python),
    "getattr of an imported module": call("builtins", "getattr", import_os, text("system")) + many(text(shell)) + b"R",
    "subprocess.call": call("subprocess", "call", b"](" + text("touch") + text(marker) + b"e"),
    "subprocess.getoutput": reduced("subprocess", "getoutput", shell),
    "timeit.timeit": reduced("timeit", "timeit", "0", python),
    "cProfile.run": reduced("cProfile", "run", python),
    "builtins.open": reduced("builtins", "open", marker, "w"),
    "io.FileIO": reduced("_io", "FileIO", marker, "w"),
    "os.mkdir": reduced("os", "mkdir", marker),
    "pickle.loads of a second pickle": call("_pickle", "loads", b"B" + struct.pack("<I", len(inner)) + inner),
    "a partial function": call("functools", "partial", system, text(shell)) + b")R",
    "operator.methodcaller": call("operator", "methodcaller", text("touch")) + many(path) + b"R",
    "a dotted name": late("pathlib", "Path.touch") + many(path) + b"R",
    "STACK_GLOBAL": late("os", "system") + many(text(shell)) + b"R",
    "STACK_GLOBAL from the memo": text("os")
    + b"q\x00"
    + text("system")
    + b"q\x01h\x00h\x01\x93"
    + many(text(shell))
    + b"R",
    "INST": b"(" + text(shell) + b"ios\nsystem\n",
    "OBJ": b"(" + name("_io", "FileIO") + text(marker) + text("w") + b"o",
    "NEWOBJ": name("numpy", "memmap") + memmap + b"\x81",
    "NEWOBJ_EX": name("numpy", "memmap") + many(text(marker)) + table(mode=text("w+"), shape=many(number(1))) + b"\x92",
    "EXT1": b"\x82\xf0" + many(text(shell)) + b"R",
    "EXT4": b"\x84\xf0\x00\x00\x00" + many(text(shell)) + b"R",
    "BUILD of a __setstate__": call("types", "SimpleNamespace")
    + table(__setstate__=system)
    + b"b"
    + text(shell)
    + b"b",
    "DUP": system + b"2" + many(text(shell)) + b"R",
    "POP": evil + b"0N",
    "POP_MARK": b"(" + evil + b"1N",
    "PUT and GET as text": system + b"p0\n0g0\n" + many(text(shell)) + b"R",
    "a list of its own": b"(" + evil + b"l",
    "a set": b"\x8f(" + evil + b"\x90",
    "a value of a dict": table(x=evil),
    "a value beside an array": table(x=array(), y=evil),
    "a key of a dict": b"}" + evil + NONE + b"s",
    "Paddle's table of names": b"}(" + text("StructuredToParameterName@@") + evil + b"u",
    "in Paddle's (name, array)": table(x=call("builtins", "tuple", many(text("x"), evil))),
    "eval, as Paddle saves a LoDTensor": table(x=call("builtins", "eval", text(python))),
    "a list in an array of objects": table(x=array(many(number(1)), dtype(text("O8")), b"](" + evil + b"e")),
    "where an array's shape is": table(x=array(shape=many(evil))),
    "where an array's bytes are": b"](" + evil + b"e",
    "an attribute of an ordered dict": call("collections", "OrderedDict") + table(_metadata=evil) + b"b",
    "a name after a module's dot": late("os", "path.os.system") + many(text(shell)) + b"R",
  }


ATTACKS = list(attacks(""))


@pytest.fixture
def extension():
  """A number for os.system, as copyreg gives them out."""
  copyreg.add_extension("os", "system", 0xF0)
  yield
  copyreg.remove_extension("os", "system", 0xF0)


def refuse(path: Path, reader) -> str:
  """The one line with which a file is refused."""
  with pytest.raises(UserError) as error:
    reader(path)
  message = str(error.value)
  assert message.startswith(f"{path}: ")
  assert message.isprintable()
  assert len(message) < len(str(path)) + 250
  return message


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_pickle_would_run_is_run(tmp_path, monkeypatch, extension, attack):
  marker = tmp_path / "marker"
  body = attacks(str(marker))[attack]
  for protocol in (0, 2, 4, 5):
    (tmp_path / f"model.{protocol}").write_bytes((b"\x80" + bytes([protocol]) if protocol else b"") + body + b".")
    refuse(tmp_path / f"model.{protocol}", PADDLE)
  (tmp_path / "zip").write_bytes(archived(body))
  refuse(tmp_path / "zip", TORCH)
  for place in range(5):  # of the pickles of a legacy file
    heads = [MAGIC, number(1001), table(little_endian=TRUE), table(), b"]"]
    heads[place] = body
    (tmp_path / "legacy").write_bytes(b"".join(map(pickled, heads)))
    refuse(tmp_path / "legacy", TORCH)
  assert not marker.exists()
  for protocol in (b"\x80\x02", b"\x80\x04"):  # only the one knows Python 2's names, only the other dotted ones
    with contextlib.suppress(Exception):
      pickle.loads(protocol + body + b".", encoding="latin1")  # as Paddle does it
  assert marker.exists(), "the attack is none: pickle does not run it either"


# ---- Files that are damaged, or would take all memory or all time ----------------------------------------------------

# A tuple of a tuple twice, 33 times: a minute to hash, more to print, and neither can be interrupted.
NESTED = b")" + b"q\x00h\x00\x86" * 33
DEEP = b")" + b"\x85" * 200_000  # deeper than any recursion
LOOP = b"]q\x07h\x07a"  # a list that holds itself


def long(code: bytes, format_: str, length: int) -> bytes:
  """An opcode that says how long the bytes behind it are, of which there are three."""
  return weights(code + struct.pack(format_, length) + b"abc")


def state(kind: str, *rest: bytes) -> bytes:
  return dtype(text(kind), many(number(3), *rest))


def split(slices: bytes, shape: bytes = SHAPE, more: bytes = b"") -> bytes:
  """A .pdparams where `whole` is cut in parts."""
  parts = table(whole=table(OriginShape=shape, slices=slices))
  return pickled(table(a=array(), b=array(kind=dtype(text("i4"))), **{"UnpackBigParamInfor@@": parts}) + more)


def zipped(**files: bytes) -> bytes:
  return archived(table(x=tensor()), **files)


def same_sizes() -> bytes:
  """Of a compression that zipfile undoes without a limit; the sizes before and after it are made equal."""
  content = archived(table(x=tensor()), "data/0", zipfile.ZIP_BZIP2, **{"data/0": bytes(10**6)})
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    size = archive.getinfo("archive/data/0").compress_size
  return content.replace(struct.pack("<II", size, 10**6), struct.pack("<II", size, size))


def identity(*parts: bytes) -> bytes:
  return archived(table(x=tensor(many(*parts) + b"Q")))


def renamed(content: bytes, old: str, new: str) -> bytes:
  assert old.encode() in content
  return content.replace(old.encode(), new.encode())


ZIP = zipped()
LEGACY = legacy(table(x=tensor()))
GOOD_PADDLE = weights(array())
SIZES = struct.pack("<II", 16, 16)  # of data/0, in the zip file's directory and before it
NO = "no array|no tensor"

BAD = {
  # What is no pickle, or the half of one
  "an empty file": (PADDLE, b"", "empty"),
  "a text": (PADDLE, b"hello, world\n", "damaged"),
  "zeros": (PADDLE, bytes(1000), "unknown"),
  "a pickle cut in an array": (PADDLE, GOOD_PADDLE[:-40], "uint4"),
  "a pickle without its end": (PADDLE, GOOD_PADDLE[:-1], "STOP"),
  "a pickle of nothing": (PADDLE, pickled(b""), "STOP"),
  "a pickle of two values": (PADDLE, pickled(b"}}"), "STOP"),
  "a mark left open": (PADDLE, pickled(b"(}"), "STOP"),
  "a tuple without a mark": (PADDLE, pickled(b"Nt"), "damaged"),
  "items without a mark": (PADDLE, pickled(b"}u"), "damaged"),
  "a pair of one": (PADDLE, pickled(b"N\x86"), "damaged"),
  "a mark that ends a stack": (PADDLE, pickled(b"NN(\x86"), "damaged"),
  "an empty memo": (PADDLE, pickled(b"h\x05"), "damaged"),
  "a memo of nothing": (PADDLE, pickled(b"q\x05"), "damaged"),
  "a memo far away": (PADDLE, pickled(b"j\xff\xff\xff\xff"), "damaged"),
  "a string that is not UTF-8": (PADDLE, weights(b"X\x02\0\0\0\xff\xfe"), "decode"),
  "a global that is not UTF-8": (PADDLE, weights(b"c\xff\xfe\n\xff\n"), "ascii"),
  "an endless line": (PADDLE, weights(b"cos"), "newline"),
  "a number that is none": (PADDLE, weights(b"Iabc\n"), "invalid literal"),
  "a huge decimal": (PADDLE, weights(b"L" + b"9" * 100_000 + b"L\n"), "LONG|digits"),
  "a huge number": (PADDLE, weights(b"\x8b" + struct.pack("<i", 1000) + bytes(1000)), "LONG4"),
  "a number of negative length": (PADDLE, weights(b"\x8b\xff\xff\xff\xff"), "< 0"),
  # Lengths that the file has not
  "bytes of 2**40": (PADDLE, long(b"\x8e", "<Q", 2**40), "bytes8"),
  "bytes of 2**63": (PADDLE, long(b"\x8e", "<Q", 2**63), "bytes8"),
  "bytes of 2**32": (PADDLE, long(b"B", "<I", 2**32 - 1), "bytes4"),
  "a string of 2**62": (PADDLE, long(b"\x8d", "<Q", 2**62), "unicodestring8"),
  "a string of Python 2 of negative length": (PADDLE, long(b"T", "<i", -1), "< 0"),
  "a bytearray of 2**40": (PADDLE, long(b"\x96", "<Q", 2**40), "bytearray8"),
  "a frame of 2**60": (PADDLE, b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "no dict"),
  "a buffer out of the file": (PADDLE, weights(b"\x97"), "NEXT_BUFFER"),
  # Values that take all time or all memory
  "a million opcodes": (PADDLE, pickled(b"]" * 1_000_000), "opcodes"),
  "a name that takes for ever to be hashed": (PADDLE, pickled(b"}" + NESTED + b"Ns"), "no string"),
  "a value that takes for ever to be compared": (PADDLE, weights(NESTED), NO),
  "a shape that takes for ever": (PADDLE, weights(array(NESTED)), "size|shape"),
  "a number type that takes for ever": (PADDLE, weights(array(kind=NESTED)), "plain"),
  "a number type's name that takes for ever": (PADDLE, weights(array(kind=dtype(NESTED))), "plain"),
  "a number type's state that takes for ever": (PADDLE, weights(array(kind=dtype(state=NESTED))), "plain"),
  "bytes that take for ever": (PADDLE, weights(array(raw=NESTED)), "plain"),
  "parts that take for ever": (PADDLE, split(b"](" + NESTED + b"e"), "parts"),
  "a storage that takes for ever": (TORCH, archived(table(x=tensor(NESTED + b"Q"))), "persistent"),
  "a storage's key that takes for ever": (TORCH, archived(table(x=tensor(storage(key=NESTED)))), "persistent"),
  "a storage's view that takes for ever": (
    TORCH,
    identity(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4), NESTED),
    "persistent",
  ),
  "storages' keys that take for ever": (TORCH, legacy(table(x=tensor()), keys=b"](" + NESTED + b"e"), "storage"),
  "a magic number that takes for ever": (TORCH, legacy(table(x=tensor()), magic=NESTED), "no PyTorch"),
  "a value deeper than recursion": (PADDLE, weights(DEEP), NO),
  "a shape deeper than recursion": (PADDLE, weights(array(many(DEEP))), "size"),
  "names of names of names": (PADDLE, weights(b"".join([text("a")] * 9 + [b"\x86"] * 8)), NO),
  "a list that holds itself": (PADDLE, weights(LOOP), NO),
  "a file that is a list that holds itself": (PADDLE, pickled(LOOP), "no dict"),
  "a dict that holds itself": (PADDLE, pickled(b"}q\x07" + text("x") + b"h\x07s"), NO),
  "an array whose state is itself": (PADDLE, weights(array() + b"q\x07h\x07b"), NO),
  # Values of other kinds
  "a list": (PADDLE, pickled(b"](" + array() + b"e"), "no dict"),
  "one array": (PADDLE, pickled(array()), "no dict"),
  "nothing": (PADDLE, pickled(NONE), "no dict"),
  "a number": (PADDLE, weights(number(3)), NO),
  "a dict in the dict": (PADDLE, weights(table(y=array())), NO),
  "a name that is a number": (PADDLE, pickled(b"}" + number(1) + array() + b"s"), "no string"),
  "a name that is bytes": (PADDLE, pickled(b"}C\x01x" + array() + b"s"), "no string"),
  "a name that is nothing": (PADDLE, pickled(b"}" + NONE + array() + b"s"), "no string"),
  "a name given twice": (PADDLE, pickled(b"}(" + (text("x") + array()) * 2 + b"u"), "'x' is there twice"),
  "a name that no terminal shows": (PADDLE, pickled(b"}" + text("\ud800\n\x1b[2J\u202e") + NONE + b"s"), NO),
  "a name of 100,000 letters": (PADDLE, pickled(b"}" + text("x" * 100_000) + NONE + b"s"), NO),
  "a name without a value": (PADDLE, pickled(b"}(" + text("x") + b"u"), "SETITEMS"),
  "items of a list": (PADDLE, pickled(b"]" + text("x") + array() + b"s"), "SETITEM"),
  "items of a tuple": (PADDLE, pickled(b")" + text("x") + array() + b"s"), "SETITEM"),
  "an array appended to a dict": (PADDLE, pickled(b"}" + array() + b"a"), "APPEND"),
  "a call of a string": (PADDLE, weights(text("x") + b")R"), "REDUCE"),
  "a call of a call": (PADDLE, weights(dtype() + b")R"), "REDUCE"),
  "a call with a list": (PADDLE, weights(name("numpy", "dtype") + b"]R"), "REDUCE"),
  "a state of a string": (PADDLE, weights(text("x") + b"}b"), "BUILD"),
  "a name that is no string": (PADDLE, pickled(number(1) + number(2) + b"\x93"), "STACK_GLOBAL"),
  "a name of a module within a line": (PADDLE, weights(b"cnumpy dtype\nos system\n)R"), "names"),
  "a name that no terminal shows either": (PADDLE, weights(name("os\x1b[2J\r", "s" * 1000)), "names"),
  "a name alone": (PADDLE, weights(name("numpy", "ndarray")), NO),
  "numpy.ndarray itself called": (PADDLE, weights(call("numpy", "ndarray", SHAPE)), NO),
  "a number type for an array": (PADDLE, weights(dtype()), NO),
  "bytes for an array": (PADDLE, weights(call("_codecs", "encode", text("x"), text("latin1"))), NO),
  "an array without a state": (
    PADDLE,
    weights(call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), SHAPE, b"U\x01b")),
    NO,
  ),
  "an array in a (name, array) in a (name, array)": (
    PADDLE,
    weights(many(text("x"), many(text("x"), array()))),
    NO,
  ),
  "a PyTorch tensor for Paddle": (PADDLE, weights(tensor()), "names torch._utils._rebuild_tensor_v2"),
  # Arrays that are none
  "an array of objects": (PADDLE, weights(array(kind=dtype(text("O8")))), "plain"),
  "an array of objects as a list": (PADDLE, weights(array(kind=dtype(text("O")), raw=b"](NNe")), "plain"),
  "an array of raw memory": (PADDLE, weights(array(kind=dtype(text("V4")))), "plain"),
  "an array of text": (PADDLE, weights(array(kind=dtype(text("U1")))), "plain"),
  "an array of dates": (PADDLE, weights(array(kind=dtype(text("M8[ns]")))), "plain"),
  "an array of complex numbers": (PADDLE, weights(array(many(number(1)), dtype(text("c8")))), "plain"),
  "an array of records": (
    PADDLE,
    weights(array(kind=dtype(text("V4"), many(number(3), text("|"), NONE, many(text("a")), table(a=many(dtype()))))) ),
    "plain",
  ),
  "a number type with fields": (
    PADDLE,
    weights(
      array(kind=state("f4", text("<"), NONE, many(text("a")), table(), number(-1), number(-1), number(0)))
    ),
    "plain",
  ),
  "a number type by a comma": (PADDLE, weights(array(kind=dtype(text("f4,O")))), "plain"),
  "a number type that is a number": (PADDLE, weights(array(kind=dtype(number(4)))), "plain"),
  "a number type without a state": (PADDLE, weights(array(kind=call("numpy", "dtype", text("f4")))), "plain"),
  "a byte order of another letter": (
    PADDLE,
    weights(array(kind=state("f4", text("O,"), NONE, NONE, NONE, number(-1), number(-1), number(0)))),
    "plain",
  ),
  "fewer bytes than the shape says": (PADDLE, weights(array(many(number(3)))), "2 numbers"),
  "more bytes than the shape says": (PADDLE, weights(array(many(number(1)))), "2 numbers"),
  "half a number": (PADDLE, weights(array(raw=b"U\x07" + bytes(7))), "multiple"),
  "letters for bytes": (PADDLE, weights(array(raw=text("名" * 8))), "latin-1"),
  "bytes by another code": (
    PADDLE,
    weights(array(raw=call("_codecs", "encode", text("12345678"), text("utf-16")))),
    "plain",
  ),
  "a negative shape": (PADDLE, weights(array(many(number(-1), number(-2)))), "size"),
  "a shape that numpy would guess": (PADDLE, weights(array(many(number(-1)))), "size"),
  "a shape of 2**60": (PADDLE, weights(array(many(number(2**60)))), "size"),
  "a shape of 2**2000": (PADDLE, weights(array(many(number(2**2000)))), "size"),
  "a shape that overflows to 2": (PADDLE, weights(array(many(number(2**33), number(2**31 + 1)))), "shape"),
  "no numbers in a shape too large": (
    PADDLE,
    weights(array(many(number(0), number(2**40), number(2**40)), raw=b"U\x00")),
    "shape",
  ),
  "a shape of 33 dimensions": (PADDLE, weights(array(many(number(2), *[number(1)] * 32))), "shape"),
  "a shape that is a list": (PADDLE, weights(array(b"]" + number(2) + b"a")), "shape"),
  "a shape of fractions": (PADDLE, weights(array(many(b"G" + struct.pack(">d", 2)))), "size"),
  "a shape of truth values": (PADDLE, weights(array(many(number(2), TRUE))), "size"),
  "an array of another version": (PADDLE, weights(array(version=2)), NO),
  "a layout that is no truth value": (PADDLE, weights(array(fortran=text("F"))), NO),
  "a part that is used twice": (PADDLE, split(b"](" + text("a") * 2 + b"e"), "damaged"),
  "a part that is not there": (PADDLE, split(b"](" + text("c") + b"e"), "parts"),
  "no part": (PADDLE, split(b"]"), "parts"),
  "parts of two types": (PADDLE, split(b"](" + text("a") + text("b") + b"e", many(number(4))), "parts"),
  "parts of another shape": (PADDLE, split(b"](" + text("a") + b"e", many(number(3))), "2 numbers"),
  "parts that are no dict": (PADDLE, pickled(table(**{"UnpackBigParamInfor@@": text("x")})), "no dict"),
  # Files of PyTorch
  "a zip file cut": (TORCH, ZIP[:-30], "damaged"),
  "the beginning of a zip file": (TORCH, ZIP[:60], "damaged"),
  "a zip file without a pickle": (TORCH, renamed(ZIP, "data.pkl", "dada.pkl"), "no PyTorch"),
  "a zip file with two pickles": (
    TORCH,
    renamed(zipped(**{"data.pkk": b""}), "archive/data.pkk", "brchive/data.pkl"),
    "no PyTorch",
  ),
  "a zip file with a name twice": (TORCH, renamed(zipped(**{"data/1": b""}), "data/1", "data/0"), "twice"),
  "a zip file without a storage": (TORCH, renamed(ZIP, "data/0", "data/1"), "no item"),
  "a storage out of the archive": (TORCH, archived(table(x=tensor(storage(key=text("../../x"))))), "no item"),
  "a zip file whose sum is wrong": (TORCH, ZIP.replace(struct.pack("<4f", 1, 2, 3, 4), bytes(16)), "CRC"),
  "a zip file that is longer in its directory": (TORCH, ZIP.replace(SIZES, struct.pack("<II", 2**31, 2**31)), "longer"),
  "a compressed pickle": (TORCH, archived(table(x=tensor()), "data.pkl"), "'data.pkl' is compressed"),
  "a compressed storage": (TORCH, archived(table(x=tensor()), "data/0"), "'data/0' is compressed"),
  "a zip bomb": (TORCH, archived(table(x=tensor()), "data/0", **{"data/0": bytes(10**8)}), "'data/0' is compressed"),
  "a zip bomb that gives one size for two": (TORCH, same_sizes(), "'data/0' is compressed"),
  "a zip file of unlike sizes": (TORCH, ZIP.replace(SIZES, struct.pack("<II", 16, 17)), "compressed"),
  "a zip file that is encrypted": (
    TORCH,
    ZIP.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
    "damaged.*(encrypted|password)",
  ),
  "a big-endian machine": (TORCH, zipped(byteorder=b"big"), "big-endian"),
  "a byte order of a megabyte": (TORCH, zipped(byteorder=bytes(10**6)), "big-endian"),
  "a storage of fewer numbers": (TORCH, zipped(**{"data/0": bytes(12)}), "out of its storage"),
  "a storage of more numbers": (TORCH, zipped(**{"data/0": bytes(20)}), "out of its storage"),
  "a storage of half a number": (TORCH, zipped(**{"data/0": bytes(15)}), "multiple"),
  "a storage in two sizes": (
    TORCH,
    archived(table(x=tensor(), y=tensor(storage(count=3), shape=(3,), steps=(1,)))),
    "persistent",
  ),
  "a storage in two types": (TORCH, archived(table(x=tensor(), y=tensor(storage("IntStorage")))), "persistent"),
  "a storage of complex numbers": (TORCH, archived(table(x=tensor(storage("ComplexFloatStorage")))), "names"),
  "a storage without a type": (TORCH, archived(table(x=tensor(storage("UntypedStorage")))), "names"),
  "a storage whose key is a number": (TORCH, archived(table(x=tensor(storage(key=number(0))))), "persistent"),
  "a storage of negative size": (TORCH, archived(table(x=tensor(storage(count=-1)))), "size"),
  "a storage that is a module": (TORCH, identity(text("module"), text("a"), text("b"), text("c")), "persistent"),
  "a storage by its number": (TORCH, archived(table(x=tensor(number(0) + b"Q"))), "persistent"),
  "a storage by text": (TORCH, archived(table(x=b"P0\n")), "PERSID"),
  "a tensor that is too long": (TORCH, archived(table(x=tensor(shape=(5,), steps=(1,)))), "out of its storage"),
  "a tensor that steps too far": (TORCH, archived(table(x=tensor(steps=(3, 1)))), "out of its storage"),
  "a tensor that begins too late": (TORCH, archived(table(x=tensor(offset=1))), "out of its storage"),
  "a tensor that begins before": (TORCH, archived(table(x=tensor(offset=-1))), "place"),
  "a tensor that steps back": (TORCH, archived(table(x=tensor(offset=3, shape=(4,), steps=(-1,)))), "place"),
  "a tensor of 2**40 times one number": (
    TORCH,
    archived(table(x=tensor(shape=(2**20, 2**20), steps=(0, 0)))),
    "out of its storage",
  ),
  "a tensor whose steps overflow": (
    TORCH,
    archived(table(x=tensor(shape=(2, 2), steps=(2**62, 2**62)))),
    "place",
  ),
  "a tensor of fewer steps": (TORCH, archived(table(x=tensor(steps=(1,)))), "out of its storage"),
  "a tensor of negative shape": (TORCH, archived(table(x=tensor(shape=(-2, -2)))), "size"),
  "a tensor that is to be negated": (TORCH, archived(table(x=tensor(more=table(neg=TRUE)))), NO),
  "a tensor without a storage": (TORCH, archived(table(x=tensor(text("0")))), NO),
  "a sparse tensor": (TORCH, archived(table(x=call("torch._utils", "_rebuild_sparse_tensor"))), "names"),
  "a pickle within PyTorch's": (
    TORCH,
    archived(table(x=call("torch.storage", "_load_from_bytes", b"C\x01."))),
    "names torch.storage._load_from_bytes",
  ),
  "a numpy array for PyTorch": (TORCH, archived(table(x=array())), "names numpy.core.multiarray._reconstruct"),
  "a parameter of a parameter": (TORCH, archived(table(x=parameter(parameter(tensor())))), NO),
  "a pickle of Paddle for PyTorch": (TORCH, GOOD_PADDLE, "names"),
  "a legacy file of another magic number": (TORCH, legacy(table(x=tensor()), magic=number(1)), "no PyTorch"),
  "a legacy file of another protocol": (TORCH, legacy(table(x=tensor()), protocol=1002), "no PyTorch"),
  "a legacy file of a big-endian machine": (TORCH, legacy(table(x=tensor()), little=FALSE), "little-endian"),
  "a legacy file without keys": (TORCH, legacy(table(x=tensor()), keys=NONE), "no PyTorch"),
  "a legacy file of another key": (TORCH, legacy(table(x=tensor()), keys=b"]" + text("1") + b"a"), "storage"),
  "a legacy file that lacks a key": (TORCH, legacy(table(x=tensor()), keys=b"]"), "damaged"),
  "a legacy file cut in a storage": (TORCH, LEGACY[:-1], "multiple|storage"),
  "a legacy file cut in a size": (TORCH, LEGACY[:-20], "damaged"),
  "a legacy file cut in a pickle": (TORCH, LEGACY[:60], "newline"),
  "a legacy storage of another size": (TORCH, legacy(table(x=tensor()), storages=struct.pack("<q", 5)), "size"),
  "a legacy storage of negative size": (TORCH, legacy(table(x=tensor()), storages=struct.pack("<q", -1)), "size"),
  "a legacy storage of 2**47": (
    TORCH,
    legacy(table(x=tensor(storage(count=2**47))), storages=struct.pack("<q", 2**47)),
    "storage",
  ),
  # Variables of Paddle 1.x
  "an empty variable": (VARIABLE, b"", "empty"),
  "a variable cut in its head": (VARIABLE, variable()[:10], "damaged"),
  "a variable cut in its description": (VARIABLE, variable()[:25], "unpack"),
  "a variable cut in its numbers": (VARIABLE, variable()[:-1], "multiple"),
  "a variable of fewer numbers": (VARIABLE, variable(raw=bytes(20)), "5 numbers"),
  "a variable of more numbers": (VARIABLE, variable(raw=bytes(28)), "7 numbers"),
  "a variable of another version": (VARIABLE, variable(version=1), "no weight"),
  "a variable of 2**63 levels": (VARIABLE, struct.pack("<IQ", 0, 2**63), "damaged"),
  "a variable with a level of 2**62": (VARIABLE, struct.pack("<IQQ", 0, 1, 2**62), "damaged"),
  "a variable with a level of 2**63": (VARIABLE, struct.pack("<IQQ", 0, 1, 2**63), "damaged"),
  "a variable of no description": (VARIABLE, struct.pack("<IQIi", 0, 0, 0, 0), "no weight"),
  "a variable of a negative description": (VARIABLE, struct.pack("<IQIi", 0, 0, 0, -1), "no weight"),
  "a variable of a long description": (VARIABLE, struct.pack("<IQIi", 0, 0, 0, 2**31 - 1), "no weight"),
  "a variable of a type that is none": (VARIABLE, variable(kind=7), "type 7"),
  "a variable without a type": (VARIABLE, struct.pack("<IQIi", 0, 0, 0, 2) + b"\x10\x01", "type -1"),
  "a variable of an unknown dimension": (VARIABLE, variable((-1, 6)), "size"),
  "a variable of 2**62": (VARIABLE, variable((2**62,)), "size"),
  "a variable of another field": (VARIABLE, variable(more=b"\x1a\x00"), "more than a number type"),
  "a variable of an endless number": (VARIABLE, variable(more=b"\x10" + b"\xff" * 20), "64 bits"),
  "a variable of packed numbers beyond its end": (VARIABLE, variable(more=b"\x12\x7f\x01"), "unpack"),
  "a program of Paddle": (VARIABLE, b"\n\x9a\x01\x08\0\x10" + b"\xff" * 9 + b"\x01\x1a\x0c", "no weight|damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_that_says_why(tmp_path, case):
  reader, content, says = BAD[case]
  (tmp_path / "file").write_bytes(content)
  assert re.search(says, refuse(tmp_path / "file", unpickle._variable if reader is VARIABLE else reader))


def test_there_are_enough_of_them():
  assert len(ATTACKS) + len(BAD) > 50


def test_files_that_are_none(tmp_path):
  for reader in (PADDLE, TORCH):
    for path in (tmp_path, tmp_path / "nowhere"):
      assert "missing" in refuse(path, reader)


def test_what_is_named_is_said(tmp_path):
  for module, attribute in (("builtins", "eval"), ("os", "system"), ("torch.storage", "_load_from_bytes")):
    (tmp_path / "file").write_bytes(weights(call(module, attribute, text("x"))))
    assert f"file: names {module}.{attribute}, which is no array; " in refuse(tmp_path / "file", PADDLE)


def test_bad_files_take_no_memory(tmp_path):
  """All of them and the names that share one array, in a process that may take 300 MB more than numpy does."""
  for i, (reader, content, _) in enumerate(BAD.values()):
    (tmp_path / f"{i}.{reader.__name__}").write_bytes(content)
  half = np.ones(2**20, np.float16)
  saved({str(i): half for i in range(10_000)}, tmp_path / "shared.paddle", 4)
  code = """
import pathlib, resource, sys
from ernie_jax import unpickle
from ernie_jax.config import UserError
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
read = {".paddle": unpickle.paddle, ".torch": unpickle.torch, ".variables": unpickle._variable}
refused = 0
for path in pathlib.Path(sys.argv[1]).iterdir():
  try:
    read[path.suffix](path)
  except UserError:
    refused += 1
print(refused)
"""
  done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=20)
  assert (done.stdout, done.returncode) == (f"{len(BAD)}\n", 0), done.stderr


# ---- Files damaged by chance -----------------------------------------------------------------------------------------


def damaged(content: bytes, chance: random.Random) -> bytes:
  """With some bytes changed, or cut out, or twice, or with its end cut off."""
  raw = bytearray(content)
  for _ in range(chance.choice((1, 1, 2, 5))):
    place = chance.randrange(len(raw))
    match chance.randrange(5):
      case 0:
        raw[place] ^= 1 << chance.randrange(8)
      case 1:
        raw[place] = chance.randrange(256)
      case 2:
        del raw[place : place + chance.randrange(1, 9)]
      case 3:
        raw[place:place] = raw[place : place + chance.randrange(1, 99)]
      case 4:
        del raw[max(place, 1) :]
    raw = raw or bytearray(b".")
  return bytes(raw)


SMALL = {name: x[:2] if x.ndim else x for name, x in arrays().items()}
WHOLE = {
  "protocol 2": (PADDLE, pickle.dumps(SMALL, 2)),
  "protocol 4": (PADDLE, pickle.dumps(SMALL, 4)),
  "protocol 5": (PADDLE, pickle.dumps(SMALL, 5)),
  "zip": (TORCH, (FIXTURES / "torch_zip.bin").read_bytes()),
  "legacy": (TORCH, (FIXTURES / "torch_legacy.bin").read_bytes()),
  "zip by hand": (TORCH, archived(table(x=tensor(), y=tensor(shape=(4,), steps=(1,))))),
  "variable": (VARIABLE, variable()),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_file_damaged_by_chance_is_one_line_or_arrays(at, case):
  times = 300
  reader, content = WHOLE[case]
  expected = at(content, reader)
  messages = []
  for seed in range(times):
    try:
      found = at(damaged(content, random.Random(seed)), reader)
    except UserError as error:
      messages.append(str(error))
    else:
      assert all(type(x) is np.ndarray and x.dtype.kind in "fiub" for x in found.values())
      assert sum(x.nbytes for x in found.values()) <= 64 * (1 + sum(x.nbytes for x in expected.values()))
      assert all(len(x.tobytes()) == x.nbytes for x in found.values())  # every number is within memory
  assert len(messages) > times / 10
  assert all(message.isprintable() for message in messages)
