from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sr_dist import models
from sr_dist.models import cpu, gpu, swift_srgan


def pixels(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def gradients(output: Tensor, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a sum with random weights, by everything that the output depends on."""
    torch.manual_seed(2)
    weights = torch.randn(output.shape)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), [x, *parameters.values()])
    return dict(zip(("x", *parameters), found, strict=True))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("size", [(2, 5, 12, 10), (1, 8, 9, 31)])
def test_a_separable_convolution_to_few_channels(outputs: int, size: tuple[int, ...]) -> None:
    """Value bit for bit, gradients to rounding."""
    torch.manual_seed(0)
    plain = swift_srgan.SeparableConv(size[1], outputs, 9).double()
    x = pixels(*size).double().requires_grad_()
    ours = cpu.separable_to_few(x, plain.depthwise, plain.pointwise)
    assert torch.equal(ours, plain(x))
    expected, found = gradients(plain(x), plain, x), gradients(ours, plain, x)
    assert len(found) == 5
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("size", [(2, 5, 12, 10), (1, 8, 9, 31)])
def test_a_separable_convolution_plane_by_plane(
    size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form for GPUs: filters that PyTorch must not take for channels-last ones."""
    torch.manual_seed(0)
    plain = swift_srgan.SeparableConv(size[1], 3, 9).double().to(memory_format=torch.channels_last)
    x = pixels(*size).double().requires_grad_()
    strides, convolve = [], F.conv2d

    def watched(x: Tensor, weight: Tensor, *others: Any, **more: Any) -> Tensor:
        strides.append((x.stride(), weight.stride()))
        return convolve(x, weight, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", watched)
        ours = gpu.separable(x, plain.depthwise, plain.pointwise)
    _, channels, height, width = size
    of_x, of_weight = strides[0]
    assert of_x == (channels * height * width, height * width, width, 1)
    assert of_weight == (81, 81, 9, 1)
    assert torch.allclose(ours, plain(x), rtol=1e-12, atol=1e-12)
    expected, found = gradients(plain(x), plain, x), gradients(ours, plain, x)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-10), name
        assert name == "x" or found[name].stride() == plain.get_parameter(name).stride()


def test_a_convolution_that_enlarges() -> None:
    torch.manual_seed(0)
    pointwise = nn.Conv2d(6, 20, 1).double()
    x = pixels(2, 6, 5, 7).double().requires_grad_()
    plain, ours = nn.PixelShuffle(2)(pointwise(x)), cpu.enlarge(x, pointwise)
    assert ours.shape == (2, 5, 10, 14) and ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    expected, found = gradients(plain, pointwise, x), gradients(ours, pointwise, x)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-10), name


def test_the_generator_takes_them_and_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    generator = models.build_generator(
        "swift_srgan", scale=4, channels=3, num_channels=8, num_blocks=2, global_skip="bicubic"
    ).to(memory_format=torch.channels_last)
    nn.init.normal_(generator.final_conv.pointwise.weight, std=0.1)
    lr = torch.rand(2, 3, 12, 12).to(memory_format=torch.channels_last)
    used = [p for p in generator.parameters() if p.requires_grad]
    called = []
    for name in ("enlarge", "separable_to_few"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, f=real, n=name: called.append(n) or f(*a))
    ours = torch.autograd.grad(generator(lr).square().sum(), used)
    assert called == ["enlarge", "enlarge", "separable_to_few"]
    with torch.no_grad():
        generator.eval()(lr)
    assert called[3:] == ["enlarge", "enlarge"], "no gradient, nothing to save"
    generator.train()
    monkeypatch.setattr(cpu, "suits", lambda x: False)
    plain = torch.autograd.grad(generator(lr).square().sum(), used)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_where_they_do_not_suit() -> None:
    x = pixels(1, 4, 6, 6)
    assert cpu.suits(x)
    assert not cpu.suits(x.contiguous()) and not cpu.suits(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.suits(x)
