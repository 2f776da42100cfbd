from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sr_dist import images, models, tensors
from tests import plain_networks
from tests.generators import build, describe

FAMILIES = ("swift_srgan", "srgan")


def small(name: str = "swift_srgan", **changes: object) -> nn.Module:
    arguments = {"scale": 4, "channels": 3, "num_channels": 8, "num_blocks": 2, **changes}
    return models.build_generator(name, **arguments).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "scale", "parameters"),
    [("swift_srgan", 4, 201_209), ("swift_srgan", 2, 183_865), ("srgan", 4, 1_547_350)],
)
def test_generator_has_the_published_number_of_parameters(
    name: str, scale: int, parameters: int
) -> None:
    generator = models.build_generator(name, scale=scale, channels=3)
    assert models.count_parameters(generator) == parameters


def test_discriminator_has_the_published_number_of_parameters() -> None:
    linear = models.build_discriminator("swift_srgan", channels=3)
    assert models.count_parameters(linear) == 19_413_279
    gap = models.build_discriminator("swift_srgan", channels=3, head="gap")
    assert models.count_parameters(gap) == 19_413_279 - 35 * 512 * 1024


def test_names_are_the_published_ones() -> None:
    names = set(models.build_generator("swift_srgan", scale=4, channels=3).state_dict())
    assert {
        "initial.cnn.depthwise.weight",
        "initial.act.weight",
        "residual.0.block1.cnn.pointwise.weight",
        "residual.15.block2.bn.running_mean",
        "residual.15.block2.act.weight",
        "convblock.cnn.depthwise.weight",
        "upsampler.1.conv.depthwise.weight",
        "final_conv.pointwise.bias",
    } <= names
    names = set(models.build_discriminator("swift_srgan", channels=3).state_dict())
    assert {"blocks.7.cnn.depthwise.weight", "classifier.2.weight", "classifier.4.bias"} <= names
    assert "blocks.0.bn.weight" not in names


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("global_skip", ["none", "bicubic"])
def test_sizes_also_for_odd_pictures(
    name: str, scale: int, channels: int, global_skip: str
) -> None:
    generator = small(name, scale=scale, channels=channels, global_skip=global_skip)
    sr = generator(torch.rand(2, channels, 7, 13))
    assert sr.shape == (2, channels, 7 * scale, 13 * scale)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_without_skip_is_a_picture(name: str) -> None:
    sr = small(name)(torch.rand(1, 3, 9, 9) * 20 - 10)
    assert 0 <= sr.min() and sr.max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_bicubic_skip_starts_as_pillows_bicubic(name: str, picture: images.Picture) -> None:
    generator = small(name, global_skip="bicubic")
    sr = tensors.to_pictures(generator(tensors.to_float(tensors.to_batch([picture]))))[0]
    difference = sr.astype(int) - images.enlarge(picture, 4, "bicubic").astype(int)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reach_is_how_far_an_output_pixel_looks(name: str, scale: int) -> None:
    generator = small(name, scale=scale, num_blocks=2)
    reach = sum(models.reach(generator))
    lr = torch.rand(1, 3, 2 * reach + 9, 5, requires_grad=True)
    sr = generator(lr)
    row = scale * (reach + 2)  # an output row well inside
    sr[..., row, :].sum().backward()
    assert lr.grad is not None
    touched = lr.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    own = reach + 2
    furthest = max(own - int(touched.min()), int(touched.max()) - own)
    assert furthest <= reach <= furthest + 1


def test_weights_that_no_forward_uses_are_not_trained() -> None:
    generator = small()
    generator.train()
    generator(torch.rand(2, 3, 8, 8)).sum().backward()
    for name, parameter in generator.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = [p for p in generator.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 3 * 8  # two blocks' and the last block's PReLU


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [2, 8])
def test_generators_compute_what_the_papers_say(name: str, scale: int) -> None:
    description = describe(name, scale=scale, num_blocks=3)
    generator = build(description)
    lr = torch.rand(2, 3, 9, 14)
    doublings = scale.bit_length() - 1
    expected = plain_networks.GENERATORS[name](generator.state_dict(), lr, 3, doublings)
    assert expected.std() > 0.1
    torch.testing.assert_close(generator(lr), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [("swift_srgan", "initial.cnn.pointwise.weight"), ("srgan", "initial.0.weight")],
)
def test_weights_that_tell_the_size_are_named_where_they_cannot(name: str, key: str) -> None:
    state = build(describe(name, num_blocks=1)).state_dict()
    for value, said in (
        (torch.zeros(5), f"{key} has shape (5,); expected that of a convolution"),
        (torch.zeros(2, 3), f"{key} has shape (2, 3); expected"),
        ("text", f"{key} is no tensor but str"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            models.infer_generator({**state, key: value})
    del state[key]
    with pytest.raises(ValueError, match=f"{key}"):
        models.infer_generator(state)


@pytest.mark.parametrize("head", ["linear", "gap"])
@pytest.mark.parametrize("name", [*FAMILIES, "unet"])
def test_discriminators_compute_what_the_papers_say(name: str, head: str) -> None:
    torch.manual_seed(0)
    discriminator = models.build_discriminator(name, channels=3, head=head)
    pictures = torch.rand(2, 3, 44, 36)
    discriminator(torch.rand(4, 3, 44, 36))  # moves the statistics
    discriminator.eval()
    weights = dict(discriminator.state_dict())
    for module_name, module in discriminator.named_modules():  # as spectral norm leaves them
        if isinstance(module, nn.Conv2d):
            weights[f"{module_name}.weight"] = module.weight
    expected = plain_networks.DISCRIMINATORS[name](weights, pictures)
    torch.testing.assert_close(discriminator(pictures), expected, rtol=1e-4, atol=1e-5)
    known = [key for key in weights if key.endswith(".bias")]
    normed = {"swift_srgan": 1 + 1 + 7 + 2, "srgan": 1 + 7 + 2, "unet": 2}
    assert len(known) == normed[name], "no bias where a BatchNorm follows"


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_none_has_no_buffers(name: str) -> None:
    assert not list(small(name, norm="none").buffers())
    assert list(small(name, norm="batch").buffers())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", ["linear", "gap"])
@pytest.mark.parametrize("side", [32, 40, 96])
def test_discriminator_gives_a_logit_for_crops_from_32(name: str, head: str, side: int) -> None:
    discriminator = models.build_discriminator(name, channels=3, head=head)
    logits = discriminator(torch.rand(3, 3, side, side))
    assert logits.shape == (3, 1)


@pytest.mark.parametrize("side", [32, 39, 96])
def test_unet_gives_a_logit_for_every_pixel(side: int) -> None:
    discriminator = models.build_discriminator("unet", channels=1).eval()
    pictures = torch.rand(2, 1, side, side)
    logits = discriminator(pictures)
    assert logits.shape == pictures.shape
    changed = pictures.clone()
    changed[1] = 1 - changed[1]
    assert torch.equal(discriminator(changed)[0], logits[0]), "no statistics over the batch"
    assert not torch.equal(discriminator(changed)[1], logits[1])


def test_unet_has_the_number_of_parameters_of_its_layers() -> None:
    number = 9 * 3 * 64 + 64 + 16 * (64 * 128 + 128 * 256 + 256 * 512)
    number += 9 * (512 * 256 + 256 * 128 + 128 * 64) + 2 * 9 * 64 * 64 + 9 * 64 + 1
    assert models.count_parameters(models.build_discriminator("unet", channels=3)) == number


@pytest.mark.parametrize("name", [*FAMILIES, "unet"])
def test_spectral_norm_bounds_every_layer(name: str) -> None:
    """That of the unet, which needs no option, all but the first and the last."""
    torch.manual_seed(0)
    discriminator = models.build_discriminator(
        name, channels=3, head="gap", spectral_norm=name != "unet"
    )
    layers = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) >= 10
    if name == "unet":
        layers = layers[1:-1]
    for _ in range(30):  # each forward in training mode is a step of the power iteration
        discriminator(torch.rand(2, 3, 32, 32))
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
        assert float(largest) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_infer_reads_the_arguments_off_a_state_dict(name: str, scale: int, norm: str) -> None:
    arguments = {
        "name": name,
        "scale": scale,
        "channels": 1,
        "num_channels": 8,
        "num_blocks": 3,
        "norm": norm,
        "global_skip": "none",
    }
    generator = models.build_generator(**arguments)  # type: ignore[arg-type]
    assert models.infer_generator(generator.state_dict()) == arguments


def test_infer_refuses_another_network() -> None:
    with pytest.raises(ValueError, match="no generator known here"):
        models.infer_generator({"conv.weight": torch.zeros(1)})


def test_authors_checkpoint_fits_to_the_last_name(shared: Path) -> None:
    path = shared / "weights" / "swift_srgan_4x.pth.tar"
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    generator = models.build_generator(**models.infer_generator(state))
    generator.load_state_dict(state, strict=True)
    assert sum(value.numel() for value in generator.state_dict().values()) == 205_466
