"""The unknowns in which chains of a learned source move: the same target, in which images hold still."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lenspipe.config import Config, load_config
from lenspipe.fit import map_search
from lenspipe.fit.following import Following
from lenspipe.fit.model import LensModel
from lenspipe.image.simulator import Optics
from lenspipe.prior_map import PriorMap
from lenspipe.source.learned import LearnedSource
from tests.lenses import lens_batch
from tests.unit.test_sources import made

KINDS = ("gaussian", "flow", "residual")  # of learned sources


def following(kind: str, **priors: object) -> tuple[Following, Tensor]:
    """Made at the maxima of three lenses, and unknowns about those."""
    config = load_config({"priors": priors}) if priors else Config()
    model = LensModel(lens_batch(), PriorMap(config.priors.expressions()), made(kind), Optics()).straight()
    generator = torch.Generator().manual_seed(2)
    w = 0.3 * torch.randn(3, model.size, generator=generator, dtype=torch.float64)
    w, _, _ = map_search.climb(model, w, 1.0, 10)
    step = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    return Following.at(model, w, model.hessian(w)), w + 0.1 * step


@pytest.fixture(params=KINDS, scope="module")
def made_at(request: pytest.FixtureRequest) -> tuple[Following, Tensor]:
    return following(str(request.param))


def test_it_is_the_same_target(made_at: tuple[Following, Tensor]) -> None:
    """There and back; equal log densities and volumes; the gradient and the Hessian are those of the change."""
    chains, w = made_at
    x = chains.to_following(w)
    assert float((x - w).abs().max()) > 1e-3
    torch.testing.assert_close(chains.from_following(x), w)
    value, gradient = chains.value_and_gradient(x)
    own_value, own_gradient = chains.model.value_and_gradient(w)
    torch.testing.assert_close(value, own_value)
    jacobian = torch.stack([changed(chains, x, lens) for lens in range(3)])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, (jacobian.mT @ own_gradient[..., None])[..., 0])
    torch.testing.assert_close(chains.hessian(x), jacobian.mT @ chains.model.hessian(w) @ jacobian)


def changed(chains: Following, x: Tensor, lens: int) -> Tensor:
    """dw / dx [size, size] of one lens."""
    rows = torch.tensor([lens])
    return torch.autograd.functional.jacobian(lambda at: chains.from_following(at[None], rows)[0], x[lens])


def test_lenses_do_not_know_of_each_other(made_at: tuple[Following, Tensor]) -> None:
    """Some of them, in any order and more than once, as chains are."""
    chains, w = made_at
    x, rows = chains.to_following(w), torch.tensor([2, 0, 2])
    for one, other in zip(chains.value_and_gradient(x), chains.take(rows).value_and_gradient(x[rows]), strict=True):
        torch.testing.assert_close(one[rows], other)
    for one, other in zip(chains.value_and_gradient(x), chains.value_and_gradient(x[rows], rows), strict=True):
        torch.testing.assert_close(one[rows], other)


@pytest.mark.parametrize("kind", KINDS)
def test_images_hold_still_where_latents_move(kind: str) -> None:
    """The further, the more the field and the place can undo; what is left is a part of what it was."""
    chains, w = following(kind)
    source = chains.model.source
    assert isinstance(source, LearnedSource)
    first = w.shape[1] - source.size
    step = torch.zeros_like(w)
    step[:, first : first + source.latents] = 0.3
    x = chains.to_following(w)
    at = chains.model.residuals(w)
    alone = (chains.model.residuals(w + step) - at).square().sum((1, 2))
    followed = (chains.model.residuals(chains.from_following(x + step)) - at).square().sum((1, 2))
    assert (followed < 0.8 * alone).all(), followed / alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_frame_stays_whatever_its_size(kind: str) -> None:
    """Where all is undone, so is the move of the frame: also of one larger than at the maximum."""
    chains, w = following(kind)
    w[:, chains.model.priors.free.index("source_size")] += torch.tensor([0.0, 1.0, 2.0])
    chains = replace(chains, answer=torch.eye(len(chains.columns)).double().expand_as(chains.answer))
    source = chains.model.source
    assert isinstance(source, LearnedSource)
    first = w.shape[1] - source.size
    step = torch.zeros_like(w)
    step[:, first : first + source.latents] = 0.3
    moved = chains.from_following(chains.to_following(w) + step)
    before, alone, after = (chains.model.source_frame(at) for at in (w, w + step, moved))
    assert float((alone - before).abs().amax(1).min()) > 1e-3
    torch.testing.assert_close(after, before)


def test_a_place_that_is_given_does_not_move() -> None:
    """Nor one whose coordinate is fixed: the other follows."""
    chains, w = following("residual", source_x=0.1)
    x = chains.to_following(w)
    names = chains.model.priors.free
    assert "source_x" not in names
    moved = [name for name, by in zip(names, (x - w).abs().amax(0), strict=False) if float(by) > 0]
    assert moved == ["source_y"]
    torch.testing.assert_close(chains.value_and_gradient(x)[0], chains.model.log_density(w))


def test_nothing_need_follow() -> None:
    """Without a residual field, and the place of the source fixed, unknowns are the model's own."""
    chains, w = following("gaussian", source_x=0.1, source_y="TruncatedNormal(0, 0.1, -0.5, 0.5)")
    torch.testing.assert_close(chains.to_following(w), w)
    torch.testing.assert_close(chains.value_and_gradient(w)[1], chains.model.value_and_gradient(w)[1])
