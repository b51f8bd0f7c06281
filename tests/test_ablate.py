"""The ablation: what its rows change, what they share, and that its numbers are those of runs and of arithmetic."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import shared

from ernie_jax import ablate, columns, evaluate, recipe, step
from ernie_jax.__main__ import main
from ernie_jax.config import Config, Mine, Model, Temperatures, UserError, Weights

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")
FULL = Config(mine=Mine(margin=0.0))
cascade = lambda *terms: {f"cascade.weights.{term}": [1.0, 0.0] for term in terms}
CE = ("kl_ce_li", "kl_ce_de", "kl_attention")
STAGES = ("interaction", "mine", "warmup", "check", "denoise")


# ---- Rows


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("full", {}),
    *((f"no_{term}", cascade(term)) for term in (*CE, "kl_li_de", "nll_de", "nll_li")),
    ("no_kl_ce_li_li_de", cascade("kl_ce_li", "kl_li_de")),
    ("no_kl_ce_li_ce_de", cascade("kl_ce_li", "kl_ce_de")),
    ("no_kl_li_de_ce_de", cascade("kl_li_de", "kl_ce_de")),
    ("no_kl_ce_li_attention", cascade("kl_ce_li", "kl_attention")),
    ("no_kl_ce", cascade(*CE)),
    ("no_kl", cascade(*CE, "kl_li_de")),
    ("no_nll_ce", cascade("nll_ce") | {"cascade.teacher": ["joint", "frozen"]}),
    ("de_only", cascade("nll_ce", "nll_li", *CE, "kl_li_de")),
    ("no_teacher", cascade("nll_ce", *CE)),
    ("uniform_teacher", cascade("nll_ce") | {"cascade.teacher": ["joint", "uniform"]}),
    ("stage_1", {"cascade.steps": [1000, 0]}),
    ("no_id", {"interaction.steps": [1000, 0]}),
    ("no_id_in_cascade", cascade("nll_li", "kl_li_de")),
    (
      "no_dualreg",
      {f"{s}.weights.dualreg_{x}": [1.0, 0.0] for s in ("interaction", "cascade") for x in ("query", "passage")},
    ),
    ("no_cross_batch", {"interaction.in_batch": [None, 8], "cascade.in_batch": [None, 1]}),
    ("no_denoising", {"mine.margin": [0.0, None]}),
  ],
)
def test_a_row_differs_from_full_in_the_named_fields_and_no_others(name, changes):
  rows, _ = ablate.grid(FULL, [name], {})
  assert {row.name: row.changes(FULL) for row in rows} == {"full": {}, name: changes}


def test_a_schedule_loses_the_term_at_both_ends():
  full = dataclasses.replace(FULL, cascade=dataclasses.replace(FULL.cascade, final_weights=Weights(kl_ce_li=3.0)))
  rows, _ = ablate.grid(full, ["no_kl_ce_li"], {})
  assert rows[1].changes(full) == cascade("kl_ce_li") | {"cascade.final_weights.kl_ce_li": [3.0, 0.0]}


@pytest.mark.parametrize(
  ("full", "name", "why"),
  [
    (Config(), "no_denoising", "is the full configuration"),
    (Config(interaction=dataclasses.replace(FULL.interaction, steps=0)), "no_id", "is the full configuration"),
    (Config(model=Model(share_encoder=True)), "no_nll_ce", "share_encoder=False"),
  ],
)
def test_a_row_that_changes_nothing_or_cannot_be_is_left_out_and_says_why(full, name, why):
  rows, left_out = ablate.grid(full, [name], {})
  assert [row.name for row in rows] == ["full"]
  assert why in left_out[name]


def test_groups_hold_every_row_once_and_own_rows_follow():
  own = {"short": dataclasses.replace(FULL, seed=1)}
  rows, left_out = ablate.grid(FULL, ablate.GROUPS, own)
  assert [row.name for row in rows] == [*(name for name, *_ in ablate.ROWS if name not in left_out), "short"]
  assert len(left_out) < 3
  usual, _ = ablate.grid(FULL, ablate.USUAL, own)
  assert {row.group for row in usual} == {"loss", "controls"}


@pytest.mark.parametrize(
  ("names", "own", "says"),
  [
    (["ful"], {}, "--rows ful: no such row; known are full, no_kl_ce_li, "),
    ([], {"de_only": FULL}, r"rows\['de_only'\]: is taken"),
    ([], {"a/b": FULL}, r"rows\['a/b'\]: is taken, or no name of a folder"),
    ([], {"other": Config(data=dataclasses.replace(FULL.data, query_length=8))}, "the same queries"),
  ],
)
def test_a_wrong_row_is_refused(names, own, says):
  with pytest.raises(UserError, match=says):
    ablate.grid(FULL, names, own)


@pytest.mark.parametrize(
  ("changed", "stages"),
  [
    ({"seed": 1}, ("prepare", *STAGES)),
    ({"model": Model(cosine=True)}, ("prepare", *STAGES)),
    ({"interaction": dataclasses.replace(FULL.interaction, steps=5)}, STAGES),
    ({"mine": Mine(margin=0.0, last=20)}, STAGES[1:]),
    ({"warmup": dataclasses.replace(FULL.warmup, steps=5)}, STAGES[2:]),
    ({"mine": Mine(margin=1.0)}, ("denoise",)),
    ({"mine": Mine(margin=0.0, refresh=10)}, ()),
    ({"cascade": dataclasses.replace(FULL.cascade, steps=5)}, ()),
    ({"cascade": dataclasses.replace(FULL.cascade, residual=True)}, ("check",)),
    ({"cascade": dataclasses.replace(FULL.cascade, temperature=Temperatures(late=0.3))}, ("check",)),
    ({"cascade": dataclasses.replace(FULL.cascade, negatives=FULL.cascade.negatives + 1)}, ("check",)),
  ],
)
def test_a_stage_is_another_one_from_the_first_that_reads_what_differs(changed, stages):
  other = dataclasses.replace(FULL, **changed)
  different = [s for s in ("prepare", *STAGES) if ablate.digest(FULL, s) != ablate.digest(other, s)]
  assert tuple(different) == stages


# ---- The table


def values(*own: float) -> dict[str, ablate.Values]:
  """Of three queries, the same for both systems; R@20 is half of all other measures."""
  queries = dict(zip("abc", own))
  half = {query: value / 2 for query, value in queries.items()}
  return {system: dict.fromkeys(evaluate.MEASURES, queries) | {"R@20": half} for system in ablate.SYSTEMS}


def test_mean_deviation_and_p_are_those_computed_by_hand():
  full = {"0": values(0.0, 0.5, 0.25), "1": values(0.5, 0.0, 0.25)}  # means 0.25, 0.25; over seeds 0.25 each
  row = {"0": values(1.0, 0.5, 0.0), "7": values(1.0, 1.0, 1.0)}  # means 0.5, 1; over seeds 1, 0.75, 0.5
  found = ablate.compared(row, full)
  for system in ablate.SYSTEMS:
    assert [found["seeds"][seed][system]["MRR@10"] for seed in row] == [0.5, 1.0]
    assert (found["mean"][system]["MRR@10"], found["mean"][system]["R@20"]) == (0.75, 0.375)
    assert found["deviation"][system]["MRR@10"] == pytest.approx(0.125**0.5)  # ((1/4)^2 + (1/4)^2) / (2 - 1)
    assert list(found["minus_full"][system]) == ["MRR@10", "R@20"]
    for minus, scale in zip(found["minus_full"][system].values(), (1, 0.5)):
      assert minus["difference"] == pytest.approx(scale * 0.5)  # of 0.75, 0.5, 0.25
      assert minus["p"] == pytest.approx(2 / 8)  # of all signs, only all + is as large, and all - as small
      assert scale * 0.25 <= minus["low"] < scale * 0.5 < minus["high"] <= scale * 0.75
  alone = ablate.compared(full, full)
  assert alone["minus_full"] is None
  assert alone["deviation"]["dual"]["MRR@10"] == 0
  assert ablate.compared({"0": values(1, 1, 1)}, full)["deviation"] is None


# ---- Runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:  # rows and seeds with the same loss share a compiled step
    patch.setattr(step, "make_train_step", shared(step.make_train_step))
    yield tmp_path_factory.mktemp("ablate")


@pytest.fixture(scope="module")
def flags(place):
  """The tiny recipe, with few steps, on texts of random words; a query is two words of its passage."""
  rng = np.random.default_rng(0)
  words = np.array([f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "prst"])
  texts = [rng.choice(words, 12, replace=False) for _ in range(120)]
  data = recipe.folder(place / "data")
  lines = [json.dumps({"id": f"p{i}", "text": " ".join(text)}) for i, text in enumerate(texts)]
  (data / "corpus.jsonl").write_text("\n".join(lines))
  for n, split in enumerate(("train", "dev", "test")):
    of = [{"id": f"{split}{i}", "text": " ".join(texts[i][:2]), "positives": [f"p{i}"]} for i in range(n, 120, 3)]
    (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, of)))
  steps = {"interaction": 3, "warmup": 2, "cascade": 3}
  own = ["--data.name", "jsonl", "--data.folder", str(data), "--data.cache", str(place / "cache"), "--mine.margin", "0"]
  own += [x for name, n in steps.items() for x in (f"--{name}.steps", str(n), f"--{name}.batch", "8")]
  own += ["--interaction.measure-every", "0", "--mine.last", "10", "--model.scratch.width", "16", "--data.pack", "None"]
  return [TINY, *own, "--cascade.weights.dualreg-query", "0", "--cascade.weights.dualreg-passage", "0"]


ROWS = ["de_only", "stage_1", "no_denoising"]


@pytest.fixture(scope="module")
def done(place, flags):
  """An ablation, its rows asked for in two calls, the second with another seed."""
  command = ["ablate", *flags, "--output", str(place / "ablation")]
  assert main([*command, "--seeds", "0", "--rows", "de_only"]) == 0
  before = json.loads((place / "ablation" / "ablation.json").read_text())
  assert [row["name"] for row in before["rows"]] == ["bm25", "zero_shot", "full", "de_only"]
  command += ["--seeds", "0", "1", "--rows", *ROWS]
  assert main(command) == 0
  return place / "ablation", command


def table(directory):
  return json.loads((directory / "ablation.json").read_text())


def test_full_is_the_run_bit_for_bit(done, flags, place):
  directory, _ = done
  assert main(["run", *flags, "--output", str(place / "run")]) == 0
  results = json.loads((place / "run" / "metrics.json").read_text())
  rows = {row["name"]: row for row in table(directory)["rows"]}
  assert rows["full"]["seeds"]["0"] == results["stages"]["cascade"]
  assert rows["bm25"]["mean"]["dual"] == pytest.approx(results["bm25"])
  for name in ("dual.cascade", "late.cascade"):
    own, other = ((path / "runs" / f"test.{name}.trec").read_bytes() for path in (directory / "full/0", place / "run"))
    assert own == other
  student = json.loads((directory / "full" / "0" / "evaluate" / "manifest.json").read_text())["student"]
  assert student == json.loads((place / "run" / "encode" / "collection.json").read_text())["model"]
  # The start of the cascade is the run's first student.
  for system, metrics in results["stages"]["interaction"].items():
    assert rows["stage_1"]["seeds"]["0"][system] == pytest.approx(metrics)


def test_stages_before_the_difference_are_computed_once(done):
  directory, _ = done
  (base,) = (directory / "shared").iterdir()
  stages = sorted(path.parent.name.split("-")[0] for path in base.glob("*/manifest.json"))
  assert stages == ["baselines", "check", "denoise", "interaction", "mine", "prepare", "warmup"]
  runs = sorted(str(path.parent.parent.relative_to(directory)) for path in directory.glob("*/*/evaluate/manifest.json"))
  seeds = {"full": "01", "de_only": "01", "no_denoising": "01", "stage_1": "0"}
  assert runs == sorted(f"{row}/{seed}" for row, own in seeds.items() for seed in own)
  for run in runs:
    assert (directory / run / "warmup").resolve() == (directory / "full" / "0" / "warmup").resolve()
    assert not (directory / run / "encode").exists()
    assert not (directory / run / "cascade" / "checkpoints").exists()
  assert not (directory / "no_denoising" / "0" / "denoise").exists()
  digests = [json.loads((directory / run / "evaluate" / "manifest.json").read_text())["student"] for run in runs]
  assert len(set(digests)) == len(runs)


def test_the_table_is_the_arithmetic_of_its_runs(done):
  directory, _ = done
  found = table(directory)
  assert found["seeds"] == [0, 1]
  qrels = evaluate.read_qrels(directory / "full" / "0" / "prepare" / "qrels.test.trec")
  for row in found["rows"][2:]:
    for system in ablate.SYSTEMS:
      runs = [directory / folder / "runs" / f"test.{system}.cascade.trec" for folder in row["folders"].values()]
      for measure in ablate.SHOWN:
        each = [evaluate.metrics(evaluate.read_run(path), qrels)[measure] for path in runs]
        assert [seed[system][measure] for seed in row["seeds"].values()] == pytest.approx(each)
        assert row["mean"][system][measure] == pytest.approx(np.mean(each))
        if len(each) > 1:
          assert row["deviation"][system][measure] == pytest.approx(np.std(each, ddof=1))
        if row["minus_full"]:
          full = found["rows"][2]["mean"][system][measure]
          assert row["minus_full"][system][measure]["difference"] == pytest.approx(np.mean(each) - full)


def test_the_csv_holds_the_numbers_of_the_json(done):
  directory, _ = done
  rows = table(directory)["rows"]
  lines = list(csv.DictReader((directory / "ablation.csv").read_text().splitlines()))
  assert [line["name"] for line in lines] == [row["name"] for row in rows]
  against = [column for column in lines[0] if "minus_full" in column]
  kinds = ("difference", "low", "high", "p")
  assert against == [f"{s}.{m}.minus_full.{k}" for s in ("dual", "late") for m in ("MRR@10", "R@20") for k in kinds]
  count = 0
  for line, row in zip(lines, rows):
    assert line["seeds"].split() == [*row["folders"]]
    for column, cell in [(column, cell) for column, cell in line.items() if "." in column]:
      system, measure, *_, kind = column.split(".")
      minus = (row["minus_full"] or {}).get(system, {}).get(measure, {})
      value = minus.get(kind) if "minus_full" in column else (row[kind] or {}).get(system, {}).get(measure)
      assert (float(cell) if cell else None) == value
      count += value is not None
  assert count > 50


def test_the_markdown_and_the_plot_show_every_row(done):
  directory, _ = done
  text, picture = ((directory / f"ablation.{kind}").read_text() for kind in ("md", "svg"))
  for row in table(directory)["rows"]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row['label']} |"))
    assert line.startswith(f"| {row['label']} | {row['mean']['dual']['MRR@10']:.3f}")
    if row["minus_full"] and row["folders"]:
      each = [row["minus_full"][s][m] for s in ("dual", "late") for m in ("MRR@10", "R@20")]
      assert line.endswith("".join(f"| {one['difference']:+.3f} ({one['p']:.4f}) " for one in each) + "|")
    assert f"<!-- {row['label']} -->" in picture  # what Matplotlib calls a text that it draws as paths


def test_a_continued_ablation_makes_the_same_table(done, capsys):
  directory, command = done
  before = {path.name: path.read_bytes() for path in directory.glob("ablation.*")}
  shutil.rmtree(directory / "no_denoising" / "1")
  assert main(command) == 0
  assert capsys.readouterr().err.count("cascade took") == 1
  assert {path.name: path.read_bytes() for path in directory.glob("ablation.*")} == before


def test_what_another_process_is_at_is_left_to_it(done, tmp_path, capsys):
  directory, command = done
  before = {path.name: path.read_bytes() for path in directory.glob("ablation.*")}
  shutil.rmtree(directory / "no_denoising" / "1")
  with columns.locked(directory / "no_denoising" / "1.lock"):
    assert main(command) == 0
  said = capsys.readouterr()
  assert "row no_denoising, seed 1: another process is at it" in said.err
  assert "cascade took" not in said.err
  folders = {row["name"]: list(row["folders"]) for row in table(directory)["rows"]}
  assert (folders["no_denoising"], folders["de_only"]) == (["0"], ["0", "1"])
  assert main(command) == 0  # now nobody is
  assert {path.name: path.read_bytes() for path in directory.glob("ablation.*")} == before

  shutil.move(directory / "full", tmp_path / "full")
  with (
    columns.locked(recipe.folder(directory / "full") / "0.lock"),
    columns.locked(directory / "full" / "1.lock"),
  ):
    assert main(command) == 0
  assert "no table yet: another process is measuring the row full" in capsys.readouterr().out
  shutil.rmtree(directory / "full")
  shutil.move(tmp_path / "full", directory / "full")
  assert {path.name: path.read_bytes() for path in directory.glob("ablation.*")} == before


def test_another_configuration_in_the_same_folder_is_refused(done, flags, capsys):
  directory, command = done
  for words, says in [
    ([*command, "--cascade.steps", "4"], "holds a run with cascade.steps=3, not 4"),
    ([*command, "--rows", "nothing"], "--rows nothing: no such row"),
    ([*command, "--seeds", "-1"], "seed=-1"),
    (["run", *flags, "--output", str(directory)], "holds files but no run"),
    ([*command, "--output", str(directory / "full" / "0")], "holds files but no ablation"),
  ]:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_own_rows_come_from_the_configuration_file(tmp_path, capsys):
  (tmp_path / "c.py").write_text("from ernie_jax.config import *\nconfig = Config()\nrows = {'x': 3}")
  assert main(["ablate", str(tmp_path / "c.py"), "--output", str(tmp_path / "out")]) == 2
  assert "its `rows` must be {'name': Config(...), ...}" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["c.py"]
