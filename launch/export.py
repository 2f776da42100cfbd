#!/usr/bin/env python
"""Write a trained model for use elsewhere, BatchNorm folded into the convolutions."""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from sr_dist import signals, workers
from sr_dist.errors import UserError, exit_on_user_error

EXAMPLE = """
examples:
  python launch/export.py --checkpoint runs/quickstart --format onnx --output model.onnx
  python launch/export.py --checkpoint runs/quickstart --format torch_export --output model.pt2
  python launch/export.py --checkpoint runs/quickstart --format safetensors --output my_model \\
      --license cc-by-4.0 --data "six photographs of scikit-image" --metrics results/metrics.json
  python launch/export.py --interpolate faithful.pth.tar sharp.pth.tar --alpha 0.7 \\
      --format safetensors --output between

onnx: input lr (batch, C, height, width) float32 in [0, 1], output sr; sizes are free. Needs
  pip install 'sr_dist[export]'
torch_export: torch.export.load(FILE).module() is a module; sizes are free.
safetensors: a folder with model.safetensors, config.json and README.md (a model card), as a
  Hugging Face repository holds them; or, where --output ends in .safetensors, that file alone. Both
  open with sr_dist.load(PATH) and are taken as --checkpoint.

The result is compared with the model before it appears (of onnx where onnxruntime is installed, and
said where it is not); one that differs is not written.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE_OR_RUN",
        help="a run's folder, a checkpoint's, a .pth.tar file, an exported model, a model of the "
        "package, or owner/name on Hugging Face",
    )
    source.add_argument(
        "--interpolate",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="two models of one architecture, each as a --checkpoint; needs --alpha",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="weight of B between A (0) and B (1), for --interpolate",
    )
    parser.add_argument(
        "--format", required=True, choices=("onnx", "torch_export", "safetensors"), help="see below"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the file or folder to write"
    )
    card = parser.add_argument_group("model card", "for the folder that safetensors writes")
    card.add_argument(
        "--license",
        metavar="NAME",
        help="of the weights, as Hugging Face names it (cc-by-4.0, mit)",
    )
    card.add_argument("--data", metavar="TEXT", help="what the model was trained on, in words")
    card.add_argument(
        "--metrics", type=Path, metavar="FILE", help="a metrics.json that launch/evaluate.py wrote"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    workers.share_processors()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    with exit_on_user_error():
        output, kind = arguments.output, arguments.format
        if (arguments.alpha is None) != (arguments.interpolate is None):
            raise UserError("--interpolate A B and --alpha X go together; one is missing")
        writes_card = kind == "safetensors" and output.suffix != ".safetensors"
        for name in ("license", "data", "metrics"):
            if getattr(arguments, name) is not None and not writes_card:
                raise UserError(
                    f"--{name} is for a model card; one is written by --format safetensors into a "
                    f"folder, not for {output}"
                )
        # Slow to import, so after what can be said without them.
        with signals.left_at_once():
            from sr_dist import export, generators, model_card

        export.check_output(output, kind)
        there = output.exists()
        paths = arguments.interpolate or [arguments.checkpoint]
        loaded = [generators.load(path) for path in paths]
        generator, description = loaded[0]
        if arguments.interpolate:
            generator = export.interpolate(*loaded, arguments.alpha)
        if kind == "onnx":
            difference = export.write_onnx(generator, description, output)
        elif kind == "torch_export":
            difference = export.write_torch_export(generator, description, output)
        else:
            metrics = arguments.metrics
            facts = model_card.Facts(
                title=output.resolve().name,
                sources=[
                    dataclasses.replace(export.find_source(path), name=name)
                    for path, name in zip(paths, generators.names(paths), strict=True)
                ],
                alpha=arguments.alpha,
                license=arguments.license,
                data=arguments.data,
                metrics=metrics and export.read_metrics(metrics, description["scale"]),
            )
            bits = generators.bits_of(paths[0])
            difference = export.write_safetensors(generator, description, output, facts, bits)
        instead = ", in place of what was there" if there else ""
        compared = "" if difference is None else f", differs from the model by {difference:.1e}"
        print(f"{output}: {description['name']}, x{description['scale']}{compared}{instead}")


if __name__ == "__main__":
    main()
