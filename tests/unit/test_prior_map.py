"""Every prior is the image of a standard normal; parameters may be fixed, free or shared."""

import math

import numpy as np
import pytest
import torch
from pyro import distributions
from scipy import stats

from lenspipe.prior_expression import parse_prior, shared
from lenspipe.prior_map import PriorMap, from_normal
from lenspipe.pyro_prior import QUANTILES

REFERENCES = {
    "Normal(1, 0.5)": stats.norm(1, 0.5),
    "Uniform(-1, 3)": stats.uniform(-1, 4),
    "LogNormal(2, 0.4)": stats.lognorm(0.4, scale=2),
    "TruncatedNormal(1, 0.5, 0.05, 10)": stats.truncnorm(-1.9, 18, 1, 0.5),
    "TruncatedNormal(0.5, 0.5, 0.2, 1)": stats.truncnorm(-0.6, 1, 0.5, 0.5),
    "Normal(loc=1, scale=0.5)": stats.norm(1, 0.5),
    "LogNormal(loc=1, scale=0.5)": stats.lognorm(0.5, scale=np.e),
}
PYROS = {
    "Cauchy(1, 0.5)": stats.cauchy(1, 0.5),
    "Exponential(2)": stats.expon(scale=0.5),
    "GeneralizedPareto(1, 0.5, 0.3)": stats.genpareto(0.3, 1, 0.5),
    "GeneralizedPareto(1, 0.5, -0.3)": stats.genpareto(-0.3, 1, 0.5),
    "GeneralizedPareto(1, scale=0.5, concentration=0)": stats.expon(1, 0.5),
    "Gumbel(1, 0.5)": stats.gumbel_r(1, 0.5),
    "HalfCauchy(0.5)": stats.halfcauchy(0, 0.5),
    "Kumaraswamy(1, 3)": stats.beta(1, 3),
    "Laplace(1, 0.5)": stats.laplace(1, 0.5),
    "Logistic(1, 0.5)": stats.logistic(1, 0.5),
    "Pareto(0.5, 3)": stats.pareto(3, scale=0.5),
    "SkewLogistic(1, 0.5, 2)": stats.genlogistic(2, 1, 0.5),
    "SoftLaplace(1, 0.5)": stats.hypsecant(1, 0.5),
    "Weibull(0.5, 2)": stats.weibull_min(2, scale=0.5),
}


@pytest.mark.parametrize("text", REFERENCES)
def test_quantiles(text: str) -> None:
    w = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = REFERENCES[text].ppf(stats.norm.cdf(w.numpy()))
    np.testing.assert_allclose(from_normal(parse_prior(text), w).numpy(), expected, rtol=1e-8, atol=1e-8)


def test_every_one_of_pyros_has_its_reference() -> None:
    assert {text.partition("(")[0] for text in PYROS} == set(QUANTILES)


@pytest.mark.parametrize("text", PYROS)
def test_quantiles_of_pyros(text: str) -> None:
    """In both tails, counted from the nearer one, to scipy's own accuracy there."""
    w = torch.linspace(-8, 8, 161, dtype=torch.float64)
    below, above = stats.norm.cdf(w.numpy()), stats.norm.sf(w.numpy())
    lower, upper = PYROS[text].ppf(below), PYROS[text].isf(above)
    if text.startswith("SoftLaplace"):  # scipy's isf of it is ppf(1 - above)
        upper = 2 - lower[::-1]
    if text.startswith("SkewLogistic"):  # so is that of this; solved by hand
        upper = 1 - 0.5 * np.log(np.expm1(-np.log1p(-above) / 2))
    expected = np.where(w.numpy() < 0, lower, upper)
    np.testing.assert_allclose(from_normal(parse_prior(text), w).numpy(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_are_those_of_pyro(name: str) -> None:
    """The same distribution with the same arguments in the same order, where its inverse CDF is exact enough."""
    kind = getattr(distributions, name)
    numbers = dict(zip(kind.arg_constraints, (1.3, 0.6, 0.4), strict=False))
    text = f"{name}({', '.join(f'{argument}={value}' for argument, value in numbers.items())})"
    w = torch.linspace(-3, 3, 31, dtype=torch.float64)
    pyros = kind(**{argument: torch.tensor(value, dtype=torch.float64) for argument, value in numbers.items()})
    torch.testing.assert_close(from_normal(parse_prior(text), w), pyros.icdf(torch.special.ndtr(w)))


@pytest.mark.parametrize("text", [*REFERENCES, *PYROS, "ContinuousBernoulli(0.3)"])
def test_gradients(text: str) -> None:
    """In reverse and forward mode, in a batch of directions and in both tails."""
    prior = parse_prior(text)
    w = torch.tensor([-3.0, -0.5, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: from_normal(prior, x), w, check_forward_ad=True)
    far = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(from_normal(prior, far).sum(), far)
    jvp = torch.func.vmap(lambda d: torch.func.jvp(lambda x: from_normal(prior, x), (far,), (d,))[1])
    torch.testing.assert_close(jvp(torch.eye(3).double()), torch.diag(slope))
    assert bool((slope > 0).all())


@pytest.mark.parametrize("text", ["HalfNormal(0.5)", "HalfNormal(scale=0.5)"])
def test_a_half_normal_is_folded(text: str) -> None:
    """Linear on either side of 0, with the slope of the upper side there; drawn from, it is what scipy calls so."""
    prior = parse_prior(text)
    w = torch.tensor([-3.0, -0.5, 0.0, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    values = from_normal(prior, w)
    assert values.tolist() == pytest.approx([1.5, 0.25, 0.0, 0.05, 1.0])
    (slope,) = torch.autograd.grad(values.sum(), w)
    assert slope.tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]
    drawn = from_normal(prior, torch.randn(20_000, generator=torch.Generator().manual_seed(1)))
    assert stats.kstest(drawn.numpy(), stats.halfnorm(0, 0.5).cdf).pvalue > 1e-4
    priors = PriorMap({"gamma": parse_prior(2.0), "theta_E": parse_prior("Normal(1, 0.1)"), "source_flux": prior})
    assert (priors.free, priors.folded) == (["theta_E", "source_flux"], [1])


TRUNCATED = {
    "gamma": "TruncatedNormal(2, 0.2, 1.3, 2.7)",
    "e1": "Normal(0, 0.1)",
    "q": "TruncatedNormal(1, 0.2, 0.5, 1)",
}


def test_a_truncated_normal_is_linear_in_straight_unknowns() -> None:
    """There and back, its volume by autograd, its walls where its ends are, and no value outside of these."""
    priors = PriorMap({name: parse_prior(text) for name, text in TRUNCATED.items()})
    straight = priors.straight()
    w = torch.tensor([[-3.0, 0.5, 2.0], [0.0, -1.0, 0.0], [4.5, 0.0, -5.0]], dtype=torch.float64)
    x = priors.to_straight(w)
    torch.testing.assert_close(straight.values(x), priors.values(w))
    torch.testing.assert_close(
        x, (priors.values(w) - torch.tensor([2, 0, 1.0])) / torch.tensor([0.2, 0.1, 0.2]).double()
    )
    back, log_volume = priors.from_straight(x)
    torch.testing.assert_close(back, w)
    of_x = torch.func.vmap(torch.func.jacrev(lambda at: priors.from_straight(at[None])[0][0]))(x)
    constant = math.log(stats.norm.cdf(3.5) - stats.norm.cdf(-3.5)) + math.log(0.5 - stats.norm.cdf(-2.5))
    torch.testing.assert_close(log_volume - constant, torch.logdet(of_x))
    ends = {}
    for column, side, offset in straight.walls:
        ends[column, side] = float(straight.values(torch.full((1, 3), -side * offset).double())[0, column])
    assert ends == {(0, 1.0): 1.3, (0, -1.0): 2.7, (2, 1.0): 0.5, (2, -1.0): 1.0}
    assert all(float(wall.distance(x).min()) > 0 for wall in straight.walls)
    beyond = straight.values(torch.tensor([[-3.5001, 0.0, 0.0001]]))
    assert beyond[0, [0, 2]].tolist() == pytest.approx([1.3, 1.0])
    at_the_ends = priors.from_straight(torch.tensor([[-3.5, 0.0, 0.0]]).double())
    assert all(bool(torch.isfinite(found).all()) for found in at_the_ends)
    assert PriorMap({"e1": parse_prior("Normal(0, 0.1)")}).straight().walls == []


def test_fixed_parameters_take_no_unknown() -> None:
    priors = PriorMap({"gamma": parse_prior(2.0), "theta_E": parse_prior("Normal(1, 0.1)")})
    values = priors(torch.tensor([[1.0], [-1.0]]))
    assert priors.free == ["theta_E"]
    assert values["gamma"].tolist() == [2.0, 2.0]
    assert values["theta_E"].tolist() == pytest.approx([1.1, 0.9])


def test_shared_parameters_take_no_unknown() -> None:
    texts = {"bulge_phi": "phi", "center_x": "Normal(0, 1)", "halo_center_x": "bulge_center_x"}
    priors = PriorMap({name: parse_prior(text) for name, text in (texts | {"bulge_center_x": "center_x"}).items()})
    assert priors.free == ["center_x"]
    assert priors.shared == {"bulge_phi": "phi", "halo_center_x": "center_x", "bulge_center_x": "center_x"}
    assert list(priors(torch.zeros(2, 1))) == ["center_x"]


def test_a_chain_that_comes_back_to_itself() -> None:
    with pytest.raises(ValueError, match="a = b = c = b: share each other's value"):
        shared({name: parse_prior(other) for name, other in {"a": "b", "b": "c", "c": "b"}.items()})


def test_position_angles_differ_as_directions_do() -> None:
    """phi + pi is phi again, where a prior reaches that far; an unknown that is no angle, or bounded, differs as is."""
    texts = {"phi": "Normal(0.3, 2)", "q": "0.8", "gamma": "Normal(2, 2)", "halo_phi": "Uniform(-1.5, 1.5)"}
    prior_map = PriorMap({name: parse_prior(text) for name, text in texts.items()})
    assert prior_map.free == ["phi", "gamma", "halo_phi"]
    turn = math.pi / 2  # of phi, in its standard deviations
    offset = torch.tensor([[turn + 0.1, turn, turn], [-3 * turn, 0.1, 0.0], [0.4 * turn, 0.0, 0.0]])
    expected = torch.tensor([[0.1, turn, turn], [0.0, 0.1, 0.0], [0.4 * turn, 0.0, 0.0]])
    torch.testing.assert_close(prior_map.offset(offset), expected, rtol=0, atol=1e-6)
    both = prior_map(torch.tensor([[0.2, 0.0, 0.0], [0.2 + turn, 0.0, 0.0]]))["phi"]
    assert float(both[1] - both[0]) == pytest.approx(math.pi)
    by_keywords = PriorMap({"phi": parse_prior("Normal(loc=0, scale=2)")})
    torch.testing.assert_close(by_keywords.offset(offset[:, :1]), offset[:, :1])
