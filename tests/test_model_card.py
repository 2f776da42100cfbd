from __future__ import annotations

from typing import Any

import yaml

from sr_dist import model_card
from tests.generators import describe


def header_of(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(header)
    return values


def test_card_says_what_is_known_and_calls_unknown_what_is_not() -> None:
    facts = model_card.Facts("small", [model_card.Source("netG_2x")])
    card = model_card.write(describe(), 1234, facts)
    assert header_of(card) == {
        "license": "unknown",
        "library_name": "sr_dist",
        "pipeline_tag": "image-to-image",
        "tags": ["super-resolution", "swift_srgan", "sr_dist"],
    }
    assert "Enlarges colour pictures 2 times. swift_srgan with 1,234 parameters." in card
    assert 'sr_dist.load("small")' in card
    assert "- norm: batch, folded into the convolutions" in card
    for line in (
        "What it was trained on: unknown.",
        "How well it does is unknown: no measurement was given.",
        "Of the weights: unknown.",
        *("- steps: unknown", "- commit: unknown", "- recipe: unknown"),
    ):
        assert line in card.splitlines() or line in card, line


def test_card_holds_data_protocol_numbers_and_recipe() -> None:
    protocol = {"colour": "y", "border": 4, "data_range": 255, "ssim": "gaussian 11, sigma 1.5"}
    results = [
        {"name": "bicubic", "psnr": 28.43, "ssim": 0.8111},
        {"name": "a|b\n# x", "psnr": 30.0, "ssim": 0.86, "lpips": 0.13},
    ]
    metrics = {"scale": 4, "protocol": protocol, "images": 5, "results": results}
    recipe = {
        "data": {"train": "/home/somebody/secret/shards", "crop_size": 96},
        "optimizer": {"generator": {"learning_rate": 1e-4}},
        "tracking": {"log_every_steps": 20},
    }
    meta = {"step": 624, "images_seen": 4992, "world_size": 2, "versions": {"torch": "2.14.1"}}
    facts = model_card.Facts(
        "x4",
        [model_card.Source("run", recipe, meta)],
        license="cc-by-4.0: really\nmit",
        data="Six photographs\n# of mine",
        metrics=metrics,
    )
    card = model_card.write(describe(channels=1, scale=4, norm="none"), 5, facts)
    assert header_of(card)["license"] == "cc-by-4.0: really\nmit", "quoted: no second key"
    lines = card.splitlines()
    assert "Six photographs # of mine" in lines and "# x" not in lines
    assert "gray pictures 4 times" in card and "- norm: none" in lines
    assert "border 4, data_range 255, ssim gaussian 11, sigma 1.5." in card
    assert "Means over 5 pictures" in card
    table = lines.index("| | psnr | ssim | lpips |")
    assert lines[table + 1 : table + 4] == [
        "|---|---|---|---|",
        "| bicubic | 28.43 | 0.8111 | unknown |",
        "| a\\|b # x | 30.0 | 0.86 | 0.13 |",
    ]
    assert {"- steps: 624", "- crops seen: 4992", "- processes: 2", "- torch: 2.14.1"} <= set(lines)
    held = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert held == {
        "data": {"train": "shards", "crop_size": 96},
        "optimizer": {"generator": {"learning_rate": 1e-4}},
    }
    assert "somebody" not in card


def test_card_of_an_interpolation_names_both() -> None:
    sources = [model_card.Source("faithful"), model_card.Source("sharp")]
    card = model_card.write(describe(), 5, model_card.Facts("x", sources, alpha=0.3))
    assert "Interpolated: 0.7 of the weights of faithful and 0.3 of those of sharp." in card


def test_card_of_what_was_made_of_exported_models_quotes_theirs() -> None:
    facts = model_card.Facts("faithful", [model_card.Source("a")], data="Photographs | of mine.")
    ours = model_card.write(describe(), 5, facts)
    theirs = "---\nlicense: mit\n---\n# A model\n\nOf somebody else."
    sources = [model_card.Source("faithful", card=ours), model_card.Source("sharp", card=theirs)]
    card = model_card.write(describe(), 5, model_card.Facts("x", sources, alpha=0.3))
    text = card.partition("those of sharp.\n\n")[2].partition("\n## Licence")[0]
    lines = text.splitlines()
    assert lines[:4] == ["The card of faithful says:", "", "> ## Data", ">"]
    assert "> Photographs | of mine." in lines and "> - steps: unknown" in lines
    theirs = ["> # A model", ">", "> Of somebody else."]
    assert lines[-5:] == ["The card of sharp says:", "", *theirs]
    assert "license: mit" not in card and "license: unknown" in card
    for said in ("What it was trained on", "Of the weights"):
        assert f"\n{said}: see the cards under Training.\n" in card
