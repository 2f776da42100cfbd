"""The networks once more, as plain formulas over named weights, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def _conv(w: Weights, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    kernel = w[f"{name}.weight"]
    padding = (kernel.shape[-1] - 1) // 2
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, padding, groups=groups)


def _separable(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    x = _conv(w, f"{name}.depthwise", x, stride, groups=x.shape[1])
    return _conv(w, f"{name}.pointwise", x)


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def _head(w: Weights, x: Tensor) -> Tensor:
    side = int((w["classifier.2.weight"].shape[1] // x.shape[1]) ** 0.5)
    x = F.adaptive_avg_pool2d(x, side).flatten(1)
    x = F.linear(x, w["classifier.2.weight"], w["classifier.2.bias"])
    return F.linear(F.leaky_relu(x, 0.2), w["classifier.4.weight"], w["classifier.4.bias"])


def swift_srgan_generator(w: Weights, lr: Tensor, blocks: int, doublings: int) -> Tensor:
    first = F.prelu(_separable(w, "initial.cnn", lr), w["initial.act.weight"])
    x = first
    for n in range(blocks):
        y = _norm(w, f"residual.{n}.block1.bn", _separable(w, f"residual.{n}.block1.cnn", x))
        y = F.prelu(y, w[f"residual.{n}.block1.act.weight"])
        x = x + _norm(w, f"residual.{n}.block2.bn", _separable(w, f"residual.{n}.block2.cnn", y))
    x = first + _norm(w, "convblock.bn", _separable(w, "convblock.cnn", x))
    for n in range(doublings):
        x = F.pixel_shuffle(_separable(w, f"upsampler.{n}.conv", x), 2)
        x = F.prelu(x, w[f"upsampler.{n}.act.weight"])
    return (_separable(w, "final_conv", x).tanh() + 1) / 2


def srgan_generator(w: Weights, lr: Tensor, blocks: int, doublings: int) -> Tensor:
    first = F.prelu(_conv(w, "initial.0", lr), w["initial.1.weight"])
    x = first
    for n in range(blocks):
        y = _norm(w, f"residual.{n}.bn1", _conv(w, f"residual.{n}.conv1", x))
        y = _conv(w, f"residual.{n}.conv2", F.prelu(y, w[f"residual.{n}.act.weight"]))
        x = x + _norm(w, f"residual.{n}.bn2", y)
    x = first + _norm(w, "middle.1", _conv(w, "middle.0", x))
    for n in range(doublings):
        x = F.pixel_shuffle(_conv(w, f"upsampler.{n}.0", x), 2)
        x = F.prelu(x, w[f"upsampler.{n}.2.weight"])
    return (_conv(w, "final", x).tanh() + 1) / 2


def swift_srgan_discriminator(w: Weights, x: Tensor) -> Tensor:
    for n in range(8):
        x = _separable(w, f"blocks.{n}.cnn", x, 1 + n % 2)
        x = F.leaky_relu(_norm(w, f"blocks.{n}.bn", x) if n else x, 0.2)
    return _head(w, x)


def srgan_discriminator(w: Weights, x: Tensor) -> Tensor:
    place = 0
    for n in range(8):
        x = _conv(w, f"blocks.{place}", x, 1 + n % 2)
        x = F.leaky_relu(_norm(w, f"blocks.{place + 1}", x) if n else x, 0.2)
        place += 3 if n else 2
    return _head(w, x)


def unet_discriminator(w: Weights, x: Tensor) -> Tensor:
    def act(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)

    a = act(_conv(w, "first", x))
    b = act(F.conv2d(a, w["down.0.weight"], stride=2, padding=1))
    c = act(F.conv2d(b, w["down.1.weight"], stride=2, padding=1))
    d = act(F.conv2d(c, w["down.2.weight"], stride=2, padding=1))
    for name, skip in (("up.0", c), ("up.1", b), ("up.2", a)):
        d = F.interpolate(d, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        d = act(_conv(w, name, d)) + skip
    return _conv(w, "last.4", act(_conv(w, "last.2", act(_conv(w, "last.0", d)))))


DISCRIMINATORS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "swift_srgan": swift_srgan_discriminator,
    "srgan": srgan_discriminator,
    "unet": unet_discriminator,
}
GENERATORS = {"swift_srgan": swift_srgan_generator, "srgan": srgan_generator}
