#!/usr/bin/env python
"""A page to try models on one's own pictures, in a browser on this machine."""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from sr_dist import signals, tiles, workers
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python launch/demo.py
  python launch/demo.py --checkpoint runs/quickstart runs/swift_srgan_x4 --port 8000

Then open the address that it prints. Drop a picture: it is enlarged, and shown beside what bicubic
makes of it, with a slider between the two; the result can be downloaded. Only this machine reaches
the page, unless --host says otherwise; nothing is sent anywhere. Needs pip install 'sr_dist[demo]'.
"""
_KEPT = 600  # seconds that a result can be downloaded
LEFT = ("bicubic", "LR, its pixels")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        type=Path,
        metavar="FILE_OR_RUN",
        help="models to choose from, as for launch/upscale.py (default: those of the package)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default 127.0.0.1: this machine alone; 0.0.0.0: all that reach "
        "it, without a password)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=4_000_000,
        metavar="N",
        help="refuse larger pictures (default 4000000)",
    )
    parser.add_argument(
        "--max-megabytes", type=int, default=20, metavar="N", help="of an upload (default 20)"
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=tiles.SIDE,
        metavar="N",
        help="see launch/upscale.py (default %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    workers.share_processors()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with exit_on_user_error():
        for name in ("max_pixels", "max_megabytes"):
            if getattr(arguments, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: expected 1 or more, found {getattr(arguments, name)}")
        if not 1 <= arguments.port <= 65535:
            raise UserError(f"--port: expected 1 to 65535, found {arguments.port}")
        tiles.check(arguments.tile)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        # gradio asks its own page whether it is there: no proxy is to stand in between.
        for name in ("no_proxy", "NO_PROXY"):
            others = [os.environ[name]] if os.environ.get(name) else []
            os.environ[name] = ",".join([*others, "localhost", "127.0.0.1", arguments.host])
        with signals.left_at_once():
            try:
                import gradio
            except ImportError:
                raise UserError("the demo needs gradio: pip install 'sr_dist[demo]'") from None
            models = load_models(arguments.checkpoint)
        with tempfile.TemporaryDirectory(prefix="sr_dist-demo-") as folder:
            page = build(gradio, models, Path(folder), arguments)
            try:
                page.launch(
                    server_name=arguments.host,
                    server_port=arguments.port,
                    max_file_size=arguments.max_megabytes * 10**6,
                    footer_links=[],
                    ssr_mode=False,
                    share=False,  # whatever the environment says
                    quiet=True,
                    prevent_thread_lock=True,
                )
            except OSError:  # whose text names options of gradio's
                raise UserError(
                    f"cannot listen at {arguments.host}, port {arguments.port}: the port is "
                    "taken or not allowed, or the host is not this machine; choose another "
                    "--port or --host"
                ) from None
            print(f"open {page.local_url}   (Ctrl-C ends it)", flush=True)
            page.block_thread()


def load_models(checkpoints):  # type: ignore[no-untyped-def]
    """(generator, description, bits) by the name that is shown."""
    import torch

    from sr_dist import evaluate, generators, upscale

    paths = checkpoints or [Path(name) for name in generators.shipped()]
    if not paths:
        raise UserError("the package holds no model; name one with --checkpoint")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for wanted, path in zip(generators.names(paths), paths, strict=True):
        generator, description = generators.load(path)
        name = evaluate.unused_name(wanted, found)
        bits = generators.bits_of(path) or 16
        found[name] = (upscale.prepare(generator, device), description, bits)
    return found


def build(gradio, models, folder, arguments):  # type: ignore[no-untyped-def]
    """The page."""
    import numpy as np

    from sr_dist import images, upscale

    def refuse(message):  # type: ignore[no-untyped-def]
        raise gradio.Error(message, duration=None, print_exception=False)

    def enlarge(path, name, left):  # type: ignore[no-untyped-def]
        if path is None:
            return None, None, ""
        generator, description, bits = models[name]
        scale, channels = description["scale"], description["channels"]
        try:
            pixels = images.pixels(Path(path))
            if pixels > arguments.max_pixels:
                refuse(
                    f"The picture has {pixels:,} pixels; at most {arguments.max_pixels:,} are "
                    "enlarged here (--max-pixels)."
                )
            lr = shown(images.decode_with_alpha(Path(path), bits)[0])
            result = upscale.upscale_any(
                generator,
                Path(path),
                scale=scale,
                channels=channels,
                tile=arguments.tile,
                bits=bits,
            )
        except images.PictureError as error:
            refuse(f"This file {error}.")
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > _KEPT:
                shutil.rmtree(old, ignore_errors=True)
        target = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(path).stem}_x{scale}.png"
        images.save(result, target, images.colour_profile(Path(path)))
        method = "bicubic" if left == LEFT[0] else "nearest"
        size = f"{lr.shape[1]}x{lr.shape[0]} → {result.shape[1]}x{result.shape[0]}"
        said = f"{size}. Left: {left}. Right: {name}."
        pair = (images.enlarge(lr, scale, method), shown(result[..., : min(3, result.shape[2])]))
        return pair, str(target), said

    def shown(picture):  # type: ignore[no-untyped-def]
        """RGB of a gray picture, or of one with an alpha channel behind its gray."""
        return np.repeat(picture[..., :1], 3, axis=2) if picture.shape[2] < 3 else picture

    names = list(models)
    with gradio.Blocks(title="sr_dist", delete_cache=(600, 3600)) as page:
        gradio.Markdown("# Super-resolution\nDrop a picture, and move the slider.")
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.File(
                    label="Picture", file_types=[*images.SUFFIXES], file_count="single"
                )
                model = gradio.Dropdown(names, value=names[0], label="Model")
                left = gradio.Radio(list(LEFT), value=LEFT[0], label="Left of the slider")
                download = gradio.DownloadButton("Download the result")
            with gradio.Column(scale=3):
                said = gradio.Markdown()
                slider = gradio.ImageSlider(
                    label="Result", format="png", type="numpy", interactive=False, max_height=900
                )
        for component in (picture, model, left):
            component.change(
                enlarge,
                [picture, model, left],
                [slider, download, said],
                api_visibility="private",
            )
    return page


if __name__ == "__main__":
    main()
