"""Reading the compiler: cycles, loops, collectives, memory; and planning a slice where libtpu is installed."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, make_batch

from ernie_jax import batches, mesh, plan, step
from ernie_jax.__main__ import main
from ernie_jax.config import Architecture, Config, Data, Model, Train, UserError, Weights
from ernie_jax.plan import Collective

# Forms copied from what libtpu 0.0.42 and XLA's CPU compiler write, cut short.
HLO = """HloModule jit_train_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused_part.1 (p: bf16[32,768]) -> bf16[512,768] {
  ROOT %all-gather.1 = bf16[512,768]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%fused_part.2 (p: bf16[32,768]) -> bf16[512,768] {
  ROOT %all-gather.2 = bf16[512,768]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(11), metadata={op_name="while/cond/lt"}
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = bf16[512,768] fusion(%p), kind=kCustom, calls=%fused_part.1, backend_config={"estimated_cycles":"100"}
  %all-reduce.1 = (f32[8,4]{1,0:T(8,128)}, bf16[2]{0}) all-reduce(%x, %y), channel_id=3, to_apply=%add
}

%inner_condition (s: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %j), direction=LT
}

%inner (s: s32[]) -> s32[] {
  %fusion.2 = s32[] fusion(%s), calls=%add, backend_config={"estimated_cycles":"1"}
}

%wrapped (p: f32[8]) -> f32[2] {
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), channel_id=4, dimensions={0}, to_apply=%add
}

%cheap (p: f32[]) -> f32[] {
  %copy = f32[] copy(%p), backend_config={"estimated_cycles":"5"}
}

%dear (p: f32[]) -> f32[] {
  %copy.2 = f32[] copy(%p), backend_config={"estimated_cycles":"50"}
}

ENTRY %main.1_spmd (param: f32[8]) -> f32[] {
  %while.1 = (s32[], f32[4]) while(%tuple), condition=%condition, body=%body, metadata={op_name="while"}
  %while.2 = s32[] while(%zero), condition=%inner_condition, body=%inner, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %fusion.3 = bf16[512,768] fusion(%p), calls=%fused_part.2, backend_config={"estimated_cycles":"1000"}
  %async = ((f32[8]), f32[2], u32[]) async-start(%param), calls=%wrapped
  %done = f32[2] async-done(%async)
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%z), channel_id=5, dimensions={0}
  %agd = f32[8,4]{1,0} all-gather-done(%ag)
  %cp = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%v), channel_id=6
  %choice = f32[] conditional(%p, %a, %b), true_computation=%cheap, false_computation=%dear
}
"""


def test_cycles_are_those_of_loops_times_their_turns_and_of_the_dearest_branch():
  assert plan.total_cycles(*plan.computations(HLO)) == 11 * 100 + 3 * 1 + 1000 + 50


def test_cycles_by_source_line():
  here = plan.HERE
  frames = f"""
FileNames
1 "{here}/step.py"
2 "/somewhere/jax/nn.py"
3 "{here}/losses.py"

FunctionNames
1 "loss"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=10 end_line=12 column=3 end_column=3}}
2 {{file_name_id=3 function_name_id=1 line=20 end_line=20 column=3 end_column=3}}
3 {{file_name_id=2 function_name_id=1 line=30 end_line=30 column=3 end_column=3}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=3 parent_frame_id=2}}
4 {{file_location_id=3 parent_frame_id=4}}

"""
  assert plan.sources(frames) == {"1": "step.py:10", "2": "losses.py:20", "3": "losses.py:20", "4": "nn.py:30"}
  marked = HLO
  for part, name, frame in (("fused_part.2", "add", 1), ("fused_part.1", "dot", 3)):
    metadata = f'metadata={{op_name="{name}" stack_frame_id={frame}}}'
    marked = marked.replace(f"calls=%{part},", f"calls=%{part}, {metadata},")
  told = plan.operations(*plan.computations(marked), plan.sources(frames))
  assert told == [("losses.py:20", "dot", 1100), ("step.py:10", "add", 1000), ("the compiler", "copy", 53)]
  assert sum(operation.cycles for operation in told) == plan.total_cycles(*plan.computations(HLO))


def test_collectives_in_every_form():
  found = plan.collectives(*plan.computations(HLO), chips=4)
  assert sorted(found) == sorted(
    [
      Collective("all-reduce", 8 * 4 * 4 + 2 * 2, 11),
      Collective("all-gather", 512 * 768 * 2, 1),  # in parts, of which the rarest runs once
      Collective("all-gather", 8 * 4 * 4, 1),
      Collective("reduce-scatter", 4 * 2 * 4, 1),
      Collective("collective-permute", 16 * 4 + 4, 1),
    ]
  )


def test_a_reduction_of_which_each_takes_a_part_is_no_all_reduce():
  hlo = """%all-reduce-scatter (input: f32[8,4]) -> f32[2,4] {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%input), channel_id=4, to_apply=%add
}

ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  %fusion.1 = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""
  assert plan.collectives(*plan.computations(hlo), chips=4) == [Collective("reduce-scatter", 8 * 4 * 4, 1)]


@pytest.mark.parametrize(
  ("shape", "size"),
  [("f32[]", 4), ("pred[3]{0}", 3), ("(bf16[2,3], /*index=1*/u32[2]{0:S(4)})", 20), ("f8e4m3fn[8]", 8), ("s4[8]", 4)],
)
def test_bytes_of_a_shape(shape, size):
  assert plan.size(shape) == size


@pytest.mark.parametrize(
  ("kind", "expected"),
  [("all-reduce", 2 * 0.75), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("all-to-all", 0.75)],
)
def test_a_ring_sends_what_the_others_lack(kind, expected):
  assert plan.seconds(Collective(kind, 50, 2), 4, 100) == pytest.approx(expected)
  assert plan.seconds(Collective("collective-permute", 50, 2), 4, 100) == 1


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    ("Ran out of memory in memory space hbm. Used 25.06G of 15.75G hbm. Exceeded by 9.31G.", (25.06, 15.75)),
    ("the total memory required for HLO temporaries (149.06G) exceeds available HBM (15.75G).", (149.06, 15.75)),
  ],
)
def test_the_compilers_complaint_is_understood(message, expected):
  assert plan.out_of_memory(f"RESOURCE_EXHAUSTED: {message}") == tuple(x * 2**30 for x in expected)


def test_other_complaints_are_not_taken_for_memory():
  assert plan.out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize(
  "name", ["v5e", "v5e:", "v5e:4", "v5e:4x4x4", "v5e:32x32", "v5e:0x4", "v5e:3x4", "v5p:4x4", "v4:2x2x2", "x"]
)
def test_a_slice_that_no_tpu_has(name):
  with pytest.raises(UserError, match="good ones are v5e:4x4"):
    plan.slice_of(name)


def test_the_slices_of_a_sweep_have_16_to_256_chips():
  for name, family in plan.FAMILIES.items():
    assert [plan.slice_of(f"{name}:{sides}") for sides in family.slices] == [16, 32, 64, 128, 256]


def test_a_real_step_names_its_collectives():
  """8 virtual devices: each gradient is summed; passage vectors, and parameters where they divide, are gathered."""
  model, train = Model(late_width=8), Train(batch=8, negatives=2)
  with jax.set_mesh(mesh.make()):
    params = jax.eval_shape(lambda key: step.init_params(model, TINY, TINY, key), jax.random.key(0))
    settings = Config(
      data=Data(query_length=6, passage_length=9), model=dataclasses.replace(model, scratch=TINY), cascade=train
    )
    state, batch, key = plan.arguments(settings, train, mesh.make())
    hlo = step.make_train_step(model, train).lower(state, batch, key).compile().as_text()
  like = jax.tree.map(lambda x: x.shape[1:], make_batch(k=3))
  assert jax.tree.map(lambda x: x.shape[1:], batch.replace(known=None)) == like.replace(known=None)
  found = plan.collectives(*plan.computations(hlo), chips=8)
  summed = sum(c.bytes * c.times for c in found if c.kind == "all-reduce")
  gradient = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  assert gradient <= summed < 2 * gradient  # the student may be summed once for queries and once for passages
  gathered = sum(c.bytes * c.times for c in found if c.kind == "all-gather")
  spread = [x for x in jax.tree.leaves(params) if any(n % 8 == 0 for n in x.shape)]
  least = sum(x.size * x.dtype.itemsize for x in spread) + 24 * TINY.width * 4
  assert least <= gathered < 1.1 * least


@pytest.mark.parametrize("pairs", [False, True])
def test_a_step_of_post_training_has_the_shapes_of_its_batches(pairs):
  """Masked rows and, with terms that compare, packed pairs; and the head's parameters."""
  data = Data(query_length=6, passage_length=9, pack=32)
  weights = Weights.only(mlm=1, nll_de=1) if pairs else Weights.only(mlm=1)
  train = Train(batch=16, chunk=2, weights=weights, mlm_length=16, late_pool="global")
  settings = Config(data=data, model=Model(late_width=8, scratch=TINY), post=train)
  with jax.set_mesh(mesh.make()):
    state, batch, _ = plan.arguments(settings, train, mesh.make())
    _, terms = jax.eval_shape(lambda *given: step.loss(*given, settings.model, train, None), state.params, batch)
  assert batch.masked.rows.tokens.shape == (16, 16)
  assert batch.masked.rows.starts is None
  assert batch.masked.places.shape == batch.masked.tokens.shape == (16, 2)
  assert (batch.queries is not None) == (batch.known is not None) == pairs
  assert state.params["masked"].bias.shape == (TINY.vocabulary,)
  assert set(terms) == weights.active


def test_packed_rows_are_as_many_as_texts_of_such_lengths_need():
  """512 passages of 79 tokens on average; without lengths, each may be as long as a row."""
  settings, train = Config(data=Data(pack=128)), Train(batch=64, negatives=7)
  one = mesh.make(jax.devices()[:1])
  layouts = (None, batches.layout(settings.data, train, 1, plan.typical(11, 80)))
  with jax.set_mesh(one):
    rows = [plan.arguments(settings, train, one, own)[1].passages.tokens.shape for own in layouts]
  assert rows[0] == (512 + 16, 128)  # and four queries of 32 in a row
  assert rows[1][1] == 128
  assert 512 * 79 / 128 < rows[1][0] < 1.1 * 512 * 79 / 128
  few = dataclasses.replace(train, batch=22), 1, plan.typical(10.6, 80)
  apart, together = (batches.layout(settings.data, *few, tied=tied) for tied in (False, True))
  assert apart.count["queries"] == 2  # 233 tokens on average: two rows are enough for nearly all
  # Beside passages there is room for nearly all of them.
  assert together.count["passages"] < apart.count["passages"] + apart.count["queries"]
  lengths = plan.typical(11, 80).passages.lengths
  np.testing.assert_allclose(lengths.mean() + 2, 80, rtol=0.02)
  np.testing.assert_allclose(np.percentile(lengths, 99), 2.3 * 78, rtol=0.05)  # gamma of shape 5


def test_bytes_held_count_one_share():
  with jax.set_mesh(mesh.make()):
    _, batch, _ = plan.arguments(Config(), Train(batch=64, negatives=1), mesh.make())
  assert plan.held(batch.texts) == 64 * 2 * 4 / 8


def test_a_plan_reads_no_checkpoint():
  with pytest.raises(UserError, match=r"model\.scratch"):
    plan.architectures(Model(start="a/b"))
  with pytest.raises(UserError, match=r"model\.teacher_scratch"):
    plan.architectures(Model(teacher_start="a/b"))
  own = Architecture(width=512)
  assert plan.architectures(Model()) == (Architecture(), Architecture())
  assert plan.architectures(Model(teacher_scratch=own)) == (Architecture(), own)
  assert plan.architectures(Model(start="a/b", scratch=own, teacher_scratch=Architecture())) == (own, own)


SMALL = Config(
  data=Data(query_length=8, passage_length=16),
  model=Model(scratch=dataclasses.replace(TINY, layers=1, dropout=0.0, attention_dropout=0.0), late_width=None),
  cascade=Train(batch=16, negatives=1, weights=Weights.only(nll_de=1, nll_ce=1)),
)


def test_a_batch_that_does_not_divide():
  with pytest.raises(UserError, match=r"batch=16: does not divide over 64 devices; use 64"):
    plan.plan(SMALL, "cascade", "v5e:8x8")


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e .\[tpu\]"):
    plan.devices("v5e:4x4")


def made(name: str, cycles: int, batch: int = 16) -> plan.Plan:
  train = dataclasses.replace(SMALL.cascade, batch=batch)
  gather = Collective("all-gather", 16 * 10**9, 1)
  return plan.Plan("cascade", name, plan.slice_of(name), train, {"parameters": 2**30}, 1e15, cycles, [gather], [])


def test_the_table():
  shown = made("v5e:4x4", 3 * 10**8)
  text = plan.table(shown)
  assert shown.computing == pytest.approx(0.2)
  assert shown.communicating == pytest.approx(15 / 200)
  assert shown.mfu == pytest.approx(1e15 / (0.275 * 16 * 197e12))
  assert "not a measurement" in text
  assert "1.00 GiB of 15.75: fits" in text
  assert "all-gather" in text
  assert "27.3% of the step" in text
  assert f"{16 / 0.275:.0f} queries/s" in text
  assert max(map(len, text.splitlines())) <= 120


def test_a_sweep_holds_the_batch_of_a_chip(monkeypatch):
  def fake(settings, stage, name, texts):
    if name == "v5e:8x8":
      raise plan.DoesNotFit("v5e:8x8: the cascade step needs 20.00 of 15.75 GiB on each chip; try less")
    return made(name, 3 * 10**8 if name == "v5e:4x4" else 6 * 10**8, settings.cascade.batch)

  monkeypatch.setattr(plan, "plan", fake)
  lines = list(plan.sweep(dataclasses.replace(SMALL), "cascade", "v5e:4x4"))
  assert [line.split()[:3] for line in lines[1:]] == [
    ["v5e:4x4", "16", "16"],
    ["v5e:4x8", "32", "32"],
    ["v5e:8x8", "64", "64"],
    ["v5e:8x16", "128", "128"],
    ["v5e:16x16", "256", "256"],
  ]
  assert lines[1].endswith("100.0%")
  assert "does not fit: the cascade step needs 20.00 of 15.75 GiB on each chip" in lines[3]
  assert float(lines[5].split()[-1].rstrip("%")) < 60


def test_the_verb(monkeypatch, capsys, tmp_path):
  file = tmp_path / "c.py"
  file.write_text("from ernie_jax.config import Config\nconfig = Config()\n")
  seen = []
  monkeypatch.setattr(
    plan,
    "plan",
    lambda settings, stage, name, texts: seen.append(texts) or made(name, 3 * 10**8, settings.cascade.batch),
  )
  assert main(["plan", str(file), "--topology", "v5e:4x4", "--cascade.batch", "32"]) == 0
  assert "cascade step of 32 queries x 2 passages" in capsys.readouterr().out
  assert main(["plan", str(file), "--topology", "v5e:4x4", "--data.pack", "128", "--tokens", "11", "80"]) == 0
  assert seen[0] is None
  assert round(seen[1].queries.lengths.mean()) == 9
  assert main(["plan", str(file), "--tokens", "11", "80"]) == 2
  assert "set --data.pack too" in capsys.readouterr().err
  assert main(["plan", str(file), "--tokens", "2", "80"]) == 2
  assert "--tokens (2, 80): a text has 3 tokens at least" in capsys.readouterr().err
  assert main(["plan"]) == 2
  assert "plan: name a configuration file first" in capsys.readouterr().err


def test_a_small_step_on_sixteen_chips():
  pytest.importorskip("libtpu")
  told = plan.plan(SMALL, "cascade", "v5e:4x4")
  assert told.cycles > 0
  assert {c.kind for c in told.collectives} >= {"all-reduce"}
  assert 1 <= told.memory["optimizer state"] / (2 * told.memory["parameters"] / 16) < 1.1  # a share of both moments
  assert 0 < sum(told.memory.values()) < 2**30
  assert "fits" in plan.table(told)


def test_too_large_a_model_is_one_line():
  pytest.importorskip("libtpu")
  model = dataclasses.replace(SMALL.model, scratch=dataclasses.replace(SMALL.model.scratch, vocabulary=2**28))
  with pytest.raises(plan.DoesNotFit, match=r"needs \d+.\d+ of 15.75 GiB on each chip .*; try --.*, or more chips$"):
    plan.plan(dataclasses.replace(SMALL, model=model), "cascade", "v5e:4x4")


def test_a_slice_that_the_compiler_refuses(monkeypatch):
  def refuse(**_):
    raise RuntimeError("INVALID_ARGUMENT: no such layout")

  monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(plan.topologies, "get_topology_desc", refuse)
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setenv(name, "")
  with pytest.raises(UserError, match="no such layout; good ones are"):
    plan.devices("v5e:4x4")
