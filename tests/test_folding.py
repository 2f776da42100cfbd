from __future__ import annotations

import pytest
import torch
from torch import nn

from sr_dist import models
from sr_dist.models import folding
from tests.generators import FAMILIES, build, describe, difference


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("skip", ["none", "bicubic"])
def test_folded_generator_is_the_twin_without_norm(name: str, skip: str) -> None:
    description = describe(name, global_skip=skip, num_blocks=2)
    generator = build(description)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    folded = folding.fold_batch_norm(generator)
    assert not folded.training and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    twin = models.build_generator(**{**description, "norm": "none"})
    twin.load_state_dict(folded.state_dict(), strict=True)
    assert 0 < difference(generator, twin) < 1e-5
    assert 0 < difference(generator, folded) < 1e-5
    for key, value in generator.state_dict().items():
        assert torch.equal(value, before[key]), "the original is left as it is"
    trained = {key for key, p in folded.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in twin.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_is_exact_up_to_rounding(name: str) -> None:
    generator = build(describe(name, num_blocks=3)).double()
    folded = folding.fold_batch_norm(generator)
    lr = torch.rand(1, 3, 9, 11).double()
    values = {p.dtype for p in folded.parameters()}
    assert values == {torch.float64}
    # The output is cast to float32 before tanh; features are not.
    assert torch.allclose(folded(lr), generator(lr), rtol=0, atol=1e-7)
    features = generator.middle if name == "srgan" else generator.convblock
    twin = folded.middle if name == "srgan" else folded.convblock
    x = torch.randn(1, 8, 9, 11).double()
    assert torch.allclose(twin(x), features(x), rtol=1e-13, atol=1e-13)  # type: ignore[operator]


def test_folding_takes_a_generator_in_training_and_draws_no_random_numbers() -> None:
    generator = build(describe())
    expected = folding.fold_batch_norm(generator).state_dict()
    generator.train()
    state = torch.get_rng_state()
    folded = folding.fold_batch_norm(generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator.training and not folded.training
    assert all(torch.equal(value, expected[key]) for key, value in folded.state_dict().items())


def test_without_batch_norm_folding_copies() -> None:
    generator = build(describe(norm="none"))
    folded = folding.fold_batch_norm(generator)
    assert folded is not generator
    for one, other in zip(generator.parameters(), folded.parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
