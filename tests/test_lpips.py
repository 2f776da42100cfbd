from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from sr_dist import images, lpips, tensors
from sr_dist.errors import UserError

torchmetrics_lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def test_agrees_with_torchmetrics(
    backbone: Path, picture: images.Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torchvision.models.squeezenet1_1(weights=None)
    network.load_state_dict(torch.load(backbone, weights_only=True))
    monkeypatch.setattr(
        torchmetrics_lpips, "_get_tv_model_features", lambda *_, **__: network.features
    )
    theirs = torchmetrics_lpips._LPIPS(net="squeeze")
    ours = lpips.build(backbone, CPU)
    random = np.random.default_rng(0)
    for strength in (3, 30):
        noisy = (picture + random.normal(0, strength, picture.shape)).clip(0, 255)
        noisy = noisy.round().astype(np.uint8)
        pair = [tensors.to_float(tensors.to_batch([p])) for p in (noisy, picture)]
        expected = theirs(*pair, normalize=True).item()
        assert ours(noisy, picture) == pytest.approx(expected, rel=1e-4)
        assert expected > 1e-4
    assert ours(picture, picture) == 0
    gray = picture[..., :1].copy()
    assert ours(gray, 255 - gray) == pytest.approx(
        ours(gray.repeat(3, axis=2), (255 - gray).repeat(3, axis=2))
    )


def test_pictures_that_are_too_small(backbone: Path) -> None:
    distance = lpips.build(backbone, CPU)
    random = np.random.default_rng(0)
    least, small = (random.integers(0, 256, (side, 40, 3), np.uint8) for side in (17, 16))
    assert distance(least, least[::-1].copy()) > 0
    with pytest.raises(UserError, match="a picture has 40x16 pixels; LPIPS needs 17 on each side"):
        distance(small, small)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with pytest.raises(UserError, match="cannot read .*x.pth: No such file"):
        lpips.build(path, CPU)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"x.pth: 0.weight has shape \(1,\)"):
        lpips.build(path, CPU)
