from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from sr_dist import losses
from sr_dist.errors import UserError


def test_pixel_losses_by_hand() -> None:
    sr, hr = torch.tensor([[[[0.0, 0.5]]]]), torch.tensor([[[[1.0, 0.3]]]])
    assert losses.pixel_loss("mse")(sr, hr).item() == pytest.approx((1 + 0.04) / 2)
    assert losses.pixel_loss("l1")(sr, hr).item() == pytest.approx((1 + 0.2) / 2)


def test_total_variation_by_hand() -> None:
    x = torch.tensor([[[[0.0, 0.1], [0.4, 0.9]]]])
    down, across = (0.4, 0.8), (0.1, 0.5)
    assert losses.total_variation(x, "l1").item() == pytest.approx(sum(down) / 2 + sum(across) / 2)
    squares = sum(v * v for v in down) / 2 + sum(v * v for v in across) / 2
    assert losses.total_variation(x, "l2").item() == pytest.approx(2 * squares)


def test_total_variation_l2_is_the_published_sum() -> None:
    x = torch.rand(3, 3, 6, 7, dtype=torch.float64)
    n, c, h, w = x.shape
    down = (x[:, :, 1:] - x[:, :, :-1]).square().sum() / (c * (h - 1) * w)
    across = (x[..., 1:] - x[..., :-1]).square().sum() / (c * h * (w - 1))
    assert losses.total_variation(x, "l2").item() == pytest.approx((2 * (down + across) / n).item())


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0], [0.0]]), torch.tensor([[-1.0], [3.0]])

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    d_fake = (sigmoid(-1) + sigmoid(3)) / 2
    d_real = (sigmoid(2) + 0.5) / 2
    assert losses.generator_adversarial(fake, "linear").item() == pytest.approx(1 - d_fake)
    assert losses.discriminator_adversarial(real, fake, "linear").item() == pytest.approx(
        1 - d_real + d_fake
    )
    bce_g = -(math.log(sigmoid(-1)) + math.log(sigmoid(3))) / 2
    assert losses.generator_adversarial(fake, "bce").item() == pytest.approx(bce_g, rel=1e-5)
    bce_d = -(math.log(sigmoid(2)) + math.log(0.5)) / 2
    bce_d -= (math.log(1 - sigmoid(-1)) + math.log(1 - sigmoid(3))) / 2
    assert losses.discriminator_adversarial(real, fake, "bce").item() == pytest.approx(
        bce_d, rel=1e-5
    )


class Squaring(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)


@pytest.mark.parametrize("normalize", [True, False])
def test_content_loss_by_hand(normalize: bool) -> None:
    content = losses.ContentLoss(Squaring(), normalize=normalize)
    sr, hr = torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.3)
    differences = []
    for weight, mean, std in ((1, 0.485, 0.229), (2, 0.456, 0.224), (3, 0.406, 0.225)):
        if not normalize:
            mean, std = 0, 1
        differences.append(weight * (((0.5 - mean) / std) ** 2 - ((0.3 - mean) / std) ** 2))
    expected = sum(d * d for d in differences) / 3
    assert content(sr, hr).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", ["auto", "file"])
def test_content_weights_are_the_given_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    torch.manual_seed(7)
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    if weights == "auto":
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    else:
        weights = str(tmp_path / "weights.pth")
        torch.save(state, weights)
    features = losses.mobilenet_v2_features(weights)
    for name, value in features.state_dict().items():
        assert torch.equal(value, state[f"features.{name}"]), name


def test_content_loss_of_gray_pictures_and_its_gradient() -> None:
    content = losses.ContentLoss(losses.mobilenet_v2_features("none"), normalize=True)
    sr = torch.rand(1, 1, 64, 64, requires_grad=True)
    content.train()
    assert not any(module.training for module in content.modules()), "always in evaluation mode"
    content(sr, torch.rand(1, 1, 64, 64)).backward()
    assert sr.grad is not None and sr.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in content.parameters())


def test_content_weights_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.pth does not exist; expected auto, none, or a file"):
        losses.mobilenet_v2_features(str(tmp_path / "none.pth"))
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="weights.pth cannot be read as weights: it is damaged"):
        losses.mobilenet_v2_features(str(path))
    torch.save([1], path)
    with pytest.raises(UserError, match="holds no state dict of torchvision's mobilenet_v2"):
        losses.mobilenet_v2_features(str(path))
    torch.save({"features.0.0.weight": torch.zeros(1)}, path)
    message = r"loss.content.weights: .*features.0.0.weight has shape \(1,\), the model's has"
    with pytest.raises(UserError, match=message):
        losses.mobilenet_v2_features(str(path))


def test_content_weights_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        losses.mobilenet_v2_features("auto")
    for expected in (
        "https://download.pytorch.org/models/mobilenet_v2",
        str(tmp_path),
        "loss.content.weights=FILE",
        "loss.content.weight=0",
    ):
        assert expected in str(caught.value)


def test_content_weights_of_an_offline_file(shared: Path) -> None:
    features = losses.mobilenet_v2_features(str(shared / "weights" / "mobilenet_v2_imagenet.pth"))
    assert features(torch.rand(1, 3, 64, 64)).shape == (1, 1280, 2, 2)
