"""Settings: every check names field, value and remedy."""

import dataclasses
from pathlib import Path

import pytest

from ernie_jax import config
from ernie_jax.config import UserError, Weights
from ernie_jax.verbs import load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: config.Data(name="jsonl"), "data.folder=''"),
    (lambda: config.Data(folder="x"), "data.folder='x'"),
    (lambda: config.Data(name="x"), "data.name='x'"),
    (lambda: config.Data(packages=()), "data.packages=()"),
    (lambda: config.Data(query_length=3), "data.query_length=3"),
    (lambda: config.Architecture(width=10, heads=3), "architecture.heads=3: must divide width=10"),
    (lambda: config.Architecture(layers=0), "architecture.layers=0"),
    (lambda: config.Architecture(dropout=1.0), "architecture.dropout=1.0"),
    (lambda: config.Model(late_width=0), "model.late_width=0"),
    (lambda: config.Model(dropout=-0.1), "model.dropout=-0.1"),
    (lambda: config.Model(share_encoder=True, teacher_start="x/y"), "model.teacher_start='x/y'"),
    (
      lambda: config.Model(share_encoder=True, teacher_scratch=config.Architecture()),
      "a shared encoder has no shape of its own",
    ),
    (lambda: Weights(nll_de=-1), "weights.nll_de=-1"),
    (lambda: Weights(nll_de=float("nan")), "weights.nll_de=nan"),
    (lambda: Weights.only(), "weights='all 0'"),
    (lambda: config.Temperatures(late=0), "temperature.late=0"),
    (lambda: config.Optimizer(learning_rate=0), "optimizer.learning_rate=0"),
    (lambda: config.Optimizer(warmup=2), "optimizer.warmup=2"),
    (lambda: config.Optimizer(clip=0), "optimizer.clip=0"),
    (lambda: config.Train(steps=-1, negatives=1), "steps=-1"),
    (lambda: config.Train(in_batch=3, negatives=1), "in_batch=3: must divide batch=64"),
    (lambda: config.Train(in_batch=1, weights=Weights.only(nll_de=1)), "in_batch=1: leaves no negative"),
    (lambda: config.Train(mlm_texts=("a",), weights=Weights.only(nll_de=1)), "mlm_texts=('a',): are read by"),
    (
      lambda: config.Train(negatives=1, teacher="uniform", weights=Weights.only(kl_ce_de=1, kl_listwise=1)),
      "weights.kl_listwise=1: trains nothing when the teacher is uniform",
    ),
    (lambda: config.Model(teacher_from_student=True, share_encoder=True), "model.teacher_from_student=True"),
    (lambda: config.Train(negatives=-1), "negatives=-1"),
    (lambda: config.Train(negatives=1, hardest=-1), "hardest=-1: must be 0 or more, or None for all"),
    (
      lambda: config.Train(negatives=1, residual=True, weights=Weights.only(nll_ce=1)),
      "residual=True: adds late interaction's scores, which no term",
    ),
    (lambda: config.Train(), "negatives=0: kl_ce_de, kl_ce_li, nll_ce"),
    (lambda: config.Train(weights=Weights.only(nll_li=1)), "late_pool='own'"),
    (lambda: config.Train(negatives=1, teacher="frozen"), "weights.nll_ce=1.0: trains nothing"),
    (lambda: config.Train(weights=Weights.only(nll_de=1), dual_pool="own"), "dual_pool='own'"),
    (lambda: config.Optimizer(weight_decay=float("nan")), "optimizer.weight_decay=nan"),
    (lambda: config.Optimizer(head_learning_rate=0), "optimizer.head_learning_rate=0"),
    (lambda: config.Optimizer(teacher_learning_rate=-1), "optimizer.teacher_learning_rate=-1"),
    (lambda: config.Config(seed=-1), "seed=-1"),
    (
      lambda: config.Config(
        model=config.Model(share_encoder=True),
        cascade=config.Train(negatives=1, teacher="frozen", weights=Weights.only(nll_de=1, kl_ce_de=1)),
      ),
      "cascade.teacher='frozen'",
    ),
    (lambda: config.Train(negatives=1, mlm_length=7), "mlm_length=7: needs at least 8 tokens"),
    (lambda: config.Train(negatives=1, mlm_rate=1.0), "mlm_rate=1.0"),
    (
      lambda: config.Config(interaction=config.Train(weights=Weights.only(mlm=1))),
      "interaction.weights.mlm=1: masked language modelling is for post-training",
    ),
    (
      lambda: config.Config(model=config.Model(tied=False), post=config.Train(weights=Weights.only(mlm=1))),
      "post.weights.mlm=1: trains the passages' encoder only",
    ),
    (lambda: config.Mine(first=3, last=2), "mine.first=3"),
    (lambda: config.Evaluate(cross_depth=0), "evaluate.cross_depth=0"),
  ],
)
def test_a_wrong_value_is_named_with_its_remedy(make, says):
  with pytest.raises(UserError) as error:
    make()
  assert says in str(error.value)
  assert "\n" not in str(error.value)


def test_weights_say_what_they_need():
  assert Weights.only(nll_de=1).needs_student
  assert not Weights.only(nll_de=1).needs_teacher
  assert not Weights.only(nll_ce=1).needs_student
  assert Weights.only(kl_attention=1).needs_teacher
  assert Weights.only(kl_attention=1).needs_late
  assert Weights.only(dualreg_query=1).needs_twin
  others = {"mlm", "nll_ce_fgm", "margin_mse", "kl_listwise", "kl_bidirectional", "virt"}
  assert Weights().active == {field.name for field in dataclasses.fields(Weights)} - others


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_holds_a_configuration(path):
  assert isinstance(load_config(str(path)), config.Config)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  config.write(tmp_path / "a", "one")
  config.write(tmp_path / "a", ["t", "wo"])
  assert (tmp_path / "a").read_bytes() == b"two"
  with pytest.raises(UserError, match="cannot be written"):
    config.write(tmp_path / "nowhere" / "a", b"x")
  assert [p.name for p in tmp_path.iterdir()] == ["a"]
