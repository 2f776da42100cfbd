from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
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
    charbonnier = (math.sqrt(1 + 1e-6) + math.sqrt(0.04 + 1e-6)) / 2
    assert losses.pixel_loss("charbonnier")(sr, hr).item() == pytest.approx(charbonnier)
    assert losses.pixel_loss("charbonnier")(hr, hr).item() == pytest.approx(1e-3)


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


def test_other_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0], [0.0]]), torch.tensor([[-1.0], [3.0]])

    def discriminator(kind: str, smoothing: float = 0.0) -> float:
        return losses.discriminator_adversarial(real, fake, kind, smoothing).item()

    def generator(kind: str) -> float:
        return losses.generator_adversarial(fake, kind, real).item()

    def entropy(logit: float, target: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    assert generator("least_squares") == pytest.approx((4 + 4) / 2 / 2)
    assert discriminator("least_squares") == pytest.approx(((1 + 1) / 2 + (1 + 9) / 2) / 2)
    smoothed = ((1.1**2 + 0.9**2) / 2 + 5) / 2
    assert discriminator("least_squares", 0.1) == pytest.approx(smoothed)
    assert generator("hinge") == pytest.approx(-1)
    assert discriminator("hinge") == pytest.approx((0 + 1) / 2 + (0 + 4) / 2)
    # the mean of both `real` and `fake` is 1
    against = (entropy(1, 1) + entropy(-1, 1)) / 2, (entropy(-2, 0) + entropy(2, 0)) / 2
    assert discriminator("relativistic_average") == pytest.approx(sum(against) / 2, rel=1e-5)
    reverse = (entropy(1, 0) + entropy(-1, 0)) / 2, (entropy(-2, 1) + entropy(2, 1)) / 2
    assert generator("relativistic_average") == pytest.approx(sum(reverse) / 2, rel=1e-5)
    smoothed = (entropy(2, 0.9) + entropy(0, 0.9)) / 2 + (entropy(-1, 0) + entropy(3, 0)) / 2
    assert discriminator("bce", 0.1) == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.parametrize(
    "kind", ["linear", "bce", "least_squares", "hinge", "relativistic_average"]
)
def test_a_score_per_pixel_counts_as_many_scores(kind: str) -> None:
    real, fake = torch.randn(2, 1, 3, 5), torch.randn(2, 1, 3, 5)
    flat = (real.reshape(-1, 1), fake.reshape(-1, 1))
    assert losses.discriminator_adversarial(real, fake, kind).item() == pytest.approx(
        losses.discriminator_adversarial(*flat, kind).item(), rel=1e-5
    )
    assert losses.generator_adversarial(fake, kind, real).item() == pytest.approx(
        losses.generator_adversarial(flat[1], kind, flat[0]).item(), rel=1e-5
    )


class Squaring(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x * x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)]


@pytest.mark.parametrize("distance", ["mse", "l1"])
@pytest.mark.parametrize("normalize", [True, False])
def test_content_loss_by_hand(normalize: bool, distance: str) -> None:
    content = losses.ContentLoss(Squaring(), normalize=normalize, distance=distance)
    sr, hr = torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.3)
    differences = []
    for weight, mean, std in ((1, 0.485, 0.229), (2, 0.456, 0.224), (3, 0.406, 0.225)):
        if not normalize:
            mean, std = 0, 1
        differences.append(weight * (((0.5 - mean) / std) ** 2 - ((0.3 - mean) / std) ** 2))
    power = {"mse": 2, "l1": 1}[distance]
    expected = sum(abs(d) ** power for d in differences) / 3
    assert content(sr, hr).item() == pytest.approx(expected, rel=1e-4)


def test_content_loss_is_the_mean_over_its_layers() -> None:
    sr, hr = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)

    def distance(*layers: str) -> float:
        torch.manual_seed(0)
        features = losses.content_features("mobilenet_v2", "none", layers)
        return losses.ContentLoss(features, normalize=True, distance="l1")(sr, hr).item()

    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None).features.eval()
    prepared = [(x - torch.tensor(losses._IMAGENET_MEAN).view(3, 1, 1)) for x in (sr, hr)]
    prepared = [x / torch.tensor(losses._IMAGENET_STD).view(3, 1, 1) for x in prepared]
    by_hand = {
        layer: (network[: layer + 1](prepared[0]) - network[: layer + 1](prepared[1])).abs().mean()
        for layer in (3, 18)
    }
    assert distance() == distance("18") == pytest.approx(by_hand[18].item(), rel=1e-5)
    assert distance("3", "18") == pytest.approx((by_hand[3] + by_hand[18]).item() / 2, rel=1e-5)
    with pytest.raises(UserError, match="mobilenet_v2 has no layer '19'; it has 0 to 18"):
        distance("19")


def test_vgg_maps_are_those_before_activation_by_srgans_scale() -> None:
    torch.manual_seed(0)
    features = losses.content_features("vgg19", "none", ("conv1_2", "conv5_4"))
    torch.manual_seed(0)
    sequence = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    x = torch.rand(1, 3, 32, 32)
    shallow, deep = features(x)
    (default,) = losses.content_features("vgg19", "none").places
    assert default == 34, "conv5_4, SRGAN's"
    assert isinstance(sequence[34], nn.Conv2d) and len(sequence) == 37
    assert shallow.shape == (1, 64, 32, 32) and deep.shape == (1, 512, 2, 2)
    assert (shallow < 0).any() and (deep < 0).any(), "before activation"
    torch.testing.assert_close(shallow * 12.75, sequence[:3](x))
    torch.testing.assert_close(deep * 12.75, sequence[:35](x))
    with pytest.raises(UserError, match="vgg19 has no layer '34'; it has conv1_1 to conv5_4"):
        losses.content_features("vgg19", "none", ("34",))


@pytest.mark.parametrize("network", ["mobilenet_v2", "vgg19"])
@pytest.mark.parametrize("weights", ["auto", "file"])
def test_content_weights_are_the_given_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, network: str
) -> None:
    torch.manual_seed(7)
    if network == "vgg19":
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
        state = {f"features.{name}": value for name, value in layers.state_dict().items()}
        state["classifier.0.weight"] = torch.zeros(1)
    else:
        state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    if weights == "auto":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    else:
        weights = str(tmp_path / "weights.pth")
        torch.save(state, weights)
    features = losses.content_features(network, weights)
    for name, value in features.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_random_features_are_said_loudly(caplog: pytest.LogCaptureFixture) -> None:
    losses.content_features("mobilenet_v2", "none")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "features of RANDOM weights: for tests only" in caplog.text


def test_content_loss_of_gray_pictures_and_its_gradient() -> None:
    content = losses.ContentLoss(
        losses.content_features("mobilenet_v2", "none"), normalize=True, distance="mse"
    )
    sr = torch.rand(1, 1, 64, 64, requires_grad=True)
    content.train()
    assert not any(module.training for module in content.modules()), "always in evaluation mode"
    content(sr, torch.rand(1, 1, 64, 64)).backward()
    assert sr.grad is not None and sr.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in content.parameters())


def test_content_weights_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.pth does not exist; expected auto, none, or a file"):
        losses.content_features("mobilenet_v2", str(tmp_path / "none.pth"))
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="weights.pth cannot be read as weights: it is damaged"):
        losses.content_features("mobilenet_v2", str(path))
    torch.save([1], path)
    with pytest.raises(UserError, match="holds no state dict of torchvision's mobilenet_v2"):
        losses.content_features("mobilenet_v2", str(path))
    torch.save({"features.0.0.weight": torch.zeros(1)}, path)
    message = r"loss.content.weights: .*features.0.0.weight has shape \(1,\), the model's has"
    with pytest.raises(UserError, match=message):
        losses.content_features("mobilenet_v2", str(path))


def test_content_weights_are_downloaded_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of one machine share a cache, and so one download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    target = tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth"
    downloads = []

    def download(*_: object, **__: object) -> dict[str, torch.Tensor]:
        if not target.is_file():
            downloads.append(1)
            time.sleep(0.2)
            target.write_bytes(b"")
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: losses.content_features("mobilenet_v2", "auto"), range(4)):
            pass
    assert downloads == [1]


@pytest.mark.parametrize(
    ("network", "file"),
    [("mobilenet_v2", "mobilenet_v2-b0353104.pth"), ("vgg19", "vgg19-dcbb9e9d.pth")],
)
def test_content_weights_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, file: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        losses.content_features(network, "auto")
    for expected in (
        f"https://download.pytorch.org/models/{file}",
        str(tmp_path / "hub" / "checkpoints" / file),
        "loss.content.weights=FILE",
        "loss.content.weight=0",
    ):
        assert expected in str(caught.value)


def test_content_weights_of_an_offline_file(shared: Path) -> None:
    features = losses.content_features(
        "mobilenet_v2", str(shared / "weights" / "mobilenet_v2_imagenet.pth")
    )
    assert [maps.shape for maps in features(torch.rand(1, 3, 64, 64))] == [(1, 1280, 2, 2)]
