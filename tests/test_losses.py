"""Loss terms on hand-written score matrices: closed forms and symmetries (METHOD: what must hold)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax import config, losses
from ernie_jax.scores import Scores

KEY = jax.random.key(0)
ALL = config.Train(batch=4, negatives=2, late_pool="global")


def random_scores(seed: int = 0, b: int = 4, k: int = 3) -> Scores:
  keys = iter(jax.random.split(jax.random.key(seed), 16))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  pool = lambda: normal(b, 1 + b * k).at[:, 2].set(-jnp.inf)
  return Scores(
    cross=normal(b, k),
    dual=normal(b, k),
    dual_pool=pool(),
    late=normal(b, k),
    late_pool=pool(),
    twins=(normal(b, b * k), normal(b, b * k)),
    attention=jax.nn.softmax(normal(b, k, 5, 7)),
    matches=normal(b, k, 5, 7),
    query_content=jax.random.bernoulli(next(keys), 0.7, (b, 5)).at[:, 0].set(True),
    passage_content=jax.random.bernoulli(next(keys), 0.7, (b, k, 7)).at[:, :, 0].set(True),
  )


def test_nll_of_equal_scores_is_log_of_the_candidates():
  np.testing.assert_allclose(losses.nll(jnp.zeros((2, 8))), np.log(8), rtol=1e-6)


def test_nll_closed_form():
  # p(positive) = e^2 / (e^2 + e^0 + e^1)
  expected = -np.log(np.exp(2) / (np.exp(2) + 1 + np.exp(1)))
  np.testing.assert_allclose(losses.nll(jnp.array([[2.0, 0.0, 1.0]])), expected, rtol=1e-6)


def test_masked_candidates_do_not_count():
  scores = jnp.array([[2.0, 0.0, 1.0]])
  masked = jnp.array([[2.0, -jnp.inf, 0.0, 1.0]])
  np.testing.assert_allclose(losses.nll(masked), losses.nll(scores), rtol=1e-6)
  np.testing.assert_allclose(losses.kl(masked, masked + 1.0), 0.0, atol=1e-6)
  other = jnp.array([[1.0, -jnp.inf, 3.0, 1.0]])
  keep = jnp.array([0, 2, 3])
  np.testing.assert_allclose(losses.kl(masked, other), losses.kl(masked[:, keep], other[:, keep]), rtol=1e-6)


def test_kl_closed_form():
  p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
  expected = np.sum(p * np.log(p / q))
  np.testing.assert_allclose(losses.kl(jnp.log(p), jnp.log(q)), expected, rtol=1e-5)
  both = (expected + np.sum(q * np.log(q / p))) / 2
  np.testing.assert_allclose(losses.symmetric_kl(jnp.log(p), jnp.log(q)), both, rtol=1e-5)


def test_kl_of_a_distribution_with_itself_is_0_and_so_is_its_gradient():
  scores = jax.random.normal(KEY, (4, 5))
  np.testing.assert_allclose(losses.kl(scores, scores), 0, atol=1e-6)
  gradient = jax.grad(lambda s: losses.kl(scores, s).sum())(scores)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_gradient_of_kl_to_the_student_is_q_minus_p():
  teacher, student = jax.random.normal(KEY, (2, 4, 5))
  gradient = jax.grad(lambda s: losses.kl(teacher, s).sum())(student)
  np.testing.assert_allclose(gradient, jax.nn.softmax(student) - jax.nn.softmax(teacher), atol=1e-6)


def test_symmetric_kl_is_symmetric_with_gradient_on_both_sides():
  a, b = jax.random.normal(KEY, (2, 4, 5))
  np.testing.assert_allclose(losses.symmetric_kl(a, b), losses.symmetric_kl(b, a), rtol=1e-6)
  left, right = jax.grad(lambda a, b: losses.symmetric_kl(a, b).sum(), argnums=(0, 1))(a, b)
  assert jnp.abs(left).max() > 1e-3
  assert jnp.abs(right).max() > 1e-3


@pytest.mark.parametrize(
  ("term", "teacher"),
  [
    ("kl_ce_li", "cross"),
    ("kl_ce_de", "cross"),
    ("kl_li_de", "late_pool"),
    ("kl_li_de", "late"),
    ("kl_attention", "attention"),
  ],
)
def test_no_gradient_reaches_a_teacher(term, teacher):
  scores, train = random_scores(), dataclasses.replace(ALL, late_pool="own" if teacher == "late" else "global")

  def value(x):
    return losses.terms(scores.replace(**{teacher: x}), train)[term]

  gradient = jax.grad(value)(getattr(scores, teacher))
  assert float(jnp.abs(gradient).max()) == 0.0


def test_every_student_side_has_a_finite_gradient():
  scores = random_scores()
  fields = ["cross", "dual", "dual_pool", "late", "late_pool", "twins", "matches"]

  def total(values):
    return losses.total(losses.terms(scores.replace(**values), ALL), ALL)

  gradients = jax.grad(total)({name: getattr(scores, name) for name in fields})
  for name, gradient in gradients.items():
    for leaf in jax.tree.leaves(gradient):
      assert jnp.isfinite(leaf).all(), name
      assert jnp.abs(leaf).max() > 0, name


def test_adding_a_constant_to_all_scores_of_a_query_changes_nothing():
  """Of a passage, to all queries' scores of it, in `dualreg_passage`, whose softmax is over queries."""
  scores, keys = random_scores(), jax.random.split(KEY)
  layers = (4, 3, 2, 5, 7)
  scores = scores.replace(
    attentions=jax.nn.softmax(jax.random.normal(keys[0], layers)), products=jax.random.normal(keys[1], layers)
  )
  train = dataclasses.replace(ALL, weights=config.Weights(margin_mse=1, kl_listwise=1, kl_bidirectional=1, virt=1))
  shift = jnp.array([[3.0], [-2.0], [0.5], [100.0]])
  moved = {n: getattr(scores, n) + shift for n in ("cross", "dual", "dual_pool", "late", "late_pool")}
  moved["matches"] = scores.matches + shift[:, :, None, None]
  moved["products"] = scores.products + shift[:, :, None, None, None]
  moved["twins"] = (scores.twins[0] + shift, scores.twins[1] - 2 * shift)
  before = losses.terms(scores, train)
  after = losses.terms(scores.replace(**moved), train)
  assert float(jnp.abs(after.pop("dualreg_passage") - before["dualreg_passage"])) > 1
  each = 3.0 * jnp.arange(12)
  turned = scores.replace(twins=(scores.twins[0] + each, scores.twins[1] - 2 * each))
  after["dualreg_passage"] = losses.terms(turned, train)["dualreg_passage"]
  assert set(after) == set(before) == train.weights.active
  for name in before:
    np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_dualreg_passage_is_dualreg_query_of_the_transpose():
  scores = random_scores()
  turned = scores.replace(twins=tuple(s.T for s in scores.twins))
  a, b = losses.terms(scores, ALL), losses.terms(turned, ALL)
  np.testing.assert_allclose(a["dualreg_passage"], b["dualreg_query"], rtol=1e-6)
  np.testing.assert_allclose(a["dualreg_query"], b["dualreg_passage"], rtol=1e-6)


def test_dualreg_of_equal_twins_is_0():
  scores = random_scores()
  terms = losses.terms(scores.replace(twins=(scores.twins[0],) * 2), ALL)
  np.testing.assert_allclose([terms["dualreg_query"], terms["dualreg_passage"]], 0, atol=1e-6)


def test_attention_kl_equals_loops():
  scores = random_scores()
  tau = 0.3
  got = losses.attention_kl(
    scores.attention, scores.matches, scores.query_content, scores.passage_content, temperature=tau
  )
  b, k, lq, _ = scores.matches.shape
  for i in range(b):
    values = []
    for j in range(k):
      real = np.flatnonzero(scores.passage_content[i, j])
      for t in range(lq):
        if scores.query_content[i, t]:
          p = np.asarray(scores.attention[i, j, t], np.float64)[real]
          q = np.exp(np.asarray(scores.matches[i, j, t], np.float64)[real] / tau)
          p, q = p / p.sum(), q / q.sum()
          values.append(np.sum(p * np.log(p / q)))
    np.testing.assert_allclose(got[i], np.mean(values), rtol=1e-4)


def test_attention_kl_is_0_when_late_interaction_matches_as_the_cross_encoder_attends():
  scores = random_scores()
  same = jnp.log(scores.attention) * 0.3
  got = losses.attention_kl(scores.attention, same, scores.query_content, scores.passage_content, 0.3)
  np.testing.assert_allclose(got, 0, atol=1e-6)


def test_attention_kl_without_real_tokens_is_0_with_a_finite_gradient():
  scores = random_scores()
  none = jnp.zeros_like(scores.passage_content)
  value = lambda m: losses.attention_kl(scores.attention, m, scores.query_content, none, 1.0).sum()
  assert float(value(scores.matches)) == 0.0
  assert jnp.isfinite(jax.grad(value)(scores.matches)).all()


def test_margin_mse_closed_form():
  teacher, student = jnp.array([[5.0, 1.0, 3.0]]), jnp.array([[2.0, 1.0, 2.5]])
  np.testing.assert_allclose(losses.margin_mse(teacher, student), ((4 - 1) ** 2 + (2 + 0.5) ** 2) / 2, rtol=1e-6)
  np.testing.assert_allclose(losses.margin_mse(teacher, teacher + 7), 0, atol=1e-6)
  assert float(jnp.abs(jax.grad(lambda t: losses.margin_mse(t, student).sum())(teacher)).max()) == 0


def test_listwise_kl_is_kl_whose_teacher_learns():
  teacher, student = jax.random.normal(KEY, (2, 4, 5))
  np.testing.assert_allclose(losses.kl_listwise(teacher, student), losses.kl(teacher, student), rtol=1e-6)
  mine, theirs = jax.grad(lambda t, s: losses.kl_listwise(t, s).sum(), argnums=(0, 1))(teacher, student)
  np.testing.assert_allclose(theirs, jax.nn.softmax(student) - jax.nn.softmax(teacher), atol=1e-6)
  # d/dt_i of sum p log(p / q) is p_i (log(p_i / q_i) - KL)
  p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
  expected = p * (jnp.log(p / q) - losses.kl(teacher, student)[:, None])
  np.testing.assert_allclose(mine, expected, atol=1e-6)


def test_bidirectional_kl_is_the_sum_of_both_directions():
  scores = random_scores()
  train = config.Train(batch=4, negatives=2, weights=config.Weights.only(kl_bidirectional=1))
  both = losses.kl(scores.cross, scores.dual) + losses.kl(scores.dual, scores.cross)
  np.testing.assert_allclose(losses.terms(scores, train)["kl_bidirectional"], both.mean(), rtol=1e-6)


def test_a_residual_teacher_is_one_whose_logit_has_late_interaction_added():
  """And its own loss sends no gradient to late interaction; a uniform teacher stays uniform."""
  scores, t = random_scores(), config.Temperatures(cross=2.0, late=0.5)
  train = dataclasses.replace(ALL, temperature=t)
  residual = dataclasses.replace(train, residual=True)
  found = losses.terms(scores, residual)
  added = scores.replace(cross=scores.cross + t.cross / t.late * scores.late)
  for name, expected in losses.terms(added, train).items():
    np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
  moved = jax.grad(lambda late: losses.terms(scores.replace(late=late), residual)["nll_ce"])(scores.late)
  assert float(jnp.abs(moved).max()) == 0
  taught = config.Weights.only(nll_li=1, kl_ce_li=1)
  uniform = dataclasses.replace(train, weights=taught, teacher="uniform")
  same = scores.replace(cross=0 * scores.cross)
  assert losses.terms(same, uniform) == losses.terms(same, dataclasses.replace(uniform, residual=True))


def test_virt_equals_loops():
  scores = random_scores()
  keys = jax.random.split(KEY)
  shape = (4, 3, 2, 5, 7)  # two layers
  attentions, products = jax.nn.softmax(jax.random.normal(keys[0], shape)), jax.random.normal(keys[1], shape)
  got = losses.virt(attentions, products, scores.query_content, scores.passage_content)
  for i in range(4):
    values = []
    for j in range(3):
      real = np.flatnonzero(scores.passage_content[i, j])
      for layer in range(2):
        for t in np.flatnonzero(scores.query_content[i]):
          p = np.asarray(attentions[i, j, layer, t], np.float64)[real]
          q = np.exp(np.asarray(products[i, j, layer, t], np.float64)[real])
          values.append(np.sum((p / p.sum() - q / q.sum()) ** 2))
    np.testing.assert_allclose(got[i], np.mean(values), rtol=1e-4)
  same = losses.virt(jax.nn.softmax(products), products, scores.query_content, scores.passage_content)
  np.testing.assert_allclose(same, 0, atol=1e-6)
  reads = jax.grad(lambda a: losses.virt(a, products, scores.query_content, scores.passage_content).sum())(attentions)
  assert float(jnp.abs(reads).max()) == 0


@pytest.mark.parametrize("name", ["dual", "late", "cross"])
def test_temperature_divides_scores(name):
  scores = random_scores()
  train = config.Train(batch=4, negatives=2, late_pool="global", temperature=config.Temperatures(**{name: 0.25}))
  fields = {"dual": ["dual", "dual_pool"], "late": ["late", "late_pool"], "cross": ["cross"]}[name]
  moved = {field: getattr(scores, field) * 4 for field in fields}
  if name == "dual":
    moved["twins"] = tuple(s * 4 for s in scores.twins)
  a, b = losses.terms(scores, train), losses.terms(scores.replace(**moved), ALL)
  for term in a:
    np.testing.assert_allclose(a[term], b[term], rtol=1e-5, err_msg=term)


def test_total_is_the_weighted_sum_and_a_term_of_weight_0_is_not_there():
  train = config.Train(batch=4, negatives=2, weights=config.Weights.only(nll_de=2.0, kl_ce_de=0.5))
  terms = losses.terms(random_scores(), train)
  assert set(terms) == {"nll_de", "kl_ce_de"}
  np.testing.assert_allclose(losses.total(terms, train), 2 * terms["nll_de"] + 0.5 * terms["kl_ce_de"], rtol=1e-6)


@pytest.mark.parametrize(
  ("done", "dual", "weights"), [(0.0, 2, (1, 2, 0)), (0.5, 1.25, (2, 1, 2)), (1.0, 0.5, (3, 0, 4))]
)
def test_weights_and_temperatures_go_linearly_to_their_last_values(done, dual, weights):
  scores, only = random_scores(), config.Weights.only
  train = config.Train(
    batch=4,
    negatives=2,
    weights=only(nll_de=1, kl_li_de=2),
    final_weights=only(nll_de=3, nll_li=4),
    temperature=config.Temperatures(dual=2.0),
    final_temperature=config.Temperatures(dual=0.5),
  )
  now = config.Train(batch=4, negatives=2, weights=train.on, temperature=config.Temperatures(dual=dual))
  terms, expected = losses.terms(scores, train, done), losses.terms(scores, now)
  assert set(terms) == {"nll_de", "kl_li_de", "nll_li"}
  for name in terms:
    np.testing.assert_allclose(terms[name], expected[name], rtol=1e-6, err_msg=name)
  value = sum(weight * terms[name] for weight, name in zip(weights, ("nll_de", "kl_li_de", "nll_li")))
  np.testing.assert_allclose(losses.total(terms, train, done), value, rtol=1e-6)


def test_own_pools_compare_own_lists():
  train = config.Train(batch=4, negatives=2, dual_pool="own", late_pool="own")
  scores = random_scores()
  terms = losses.terms(scores, train)
  np.testing.assert_allclose(terms["nll_de"], losses.nll(scores.dual).mean(), rtol=1e-6)
  np.testing.assert_allclose(terms["nll_li"], losses.nll(scores.late).mean(), rtol=1e-6)
  np.testing.assert_allclose(terms["kl_li_de"], losses.kl(scores.late, scores.dual).mean(), rtol=1e-6)
