"""Every prior is the image of a standard normal."""

import numpy as np
import pytest
import torch
from scipy import stats

from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap, from_normal

REFERENCES = {
    "Normal(1, 0.5)": stats.norm(1, 0.5),
    "Uniform(-1, 3)": stats.uniform(-1, 4),
    "LogNormal(2, 0.4)": stats.lognorm(0.4, scale=2),
    "TruncatedNormal(1, 0.5, 0.05, 10)": stats.truncnorm(-1.9, 18, 1, 0.5),
    "TruncatedNormal(0.5, 0.5, 0.2, 1)": stats.truncnorm(-0.6, 1, 0.5, 0.5),
}


@pytest.mark.parametrize("text", REFERENCES)
def test_quantiles(text: str) -> None:
    w = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = REFERENCES[text].ppf(stats.norm.cdf(w.numpy()))
    np.testing.assert_allclose(from_normal(parse_prior(text), w).numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("text", REFERENCES)
def test_gradients(text: str) -> None:
    w = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: from_normal(parse_prior(text), x), w)


def test_fixed_parameters_take_no_unknown() -> None:
    priors = PriorMap({"gamma": parse_prior(2.0), "theta_E": parse_prior("Normal(1, 0.1)")})
    values = priors(torch.tensor([[1.0], [-1.0]]))
    assert priors.free == ["theta_E"]
    assert values["gamma"].tolist() == [2.0, 2.0]
    assert values["theta_E"].tolist() == pytest.approx([1.1, 0.9])
