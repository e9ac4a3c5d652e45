"""`shelfkern export`: a model as ONNX, for other runtimes."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import click
import torch

from ..files import replacing
from ..nn import ShelfNet
from .options import MODEL_HELP, MODELS, WEIGHTS_HELP, open_model, tell_licence


def write_onnx(model: ShelfNet, path: Path) -> None:
    """Writes an eval-mode model: `images` (N, 3, H, W) to `scores` (N, classes, H, W), float32.

    N, H and W are free, H and W from 32; images are normalised as for the model. The file is replaced in
    one step.
    """
    # Not a multiple of 32 and no size twice, so that nothing is taken for a constant.
    example = torch.zeros(2, 3, 70, 97)
    free = torch.export.Dim
    shapes = {"x": {0: free("n", min=1), 2: free("h", min=33), 3: free("w", min=33)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["scores"],
            verbose=False,
        )
    assert program is not None  # as dynamo=True promises
    with replacing(path) as temporary:
        program.save(temporary)


@click.command(short_help="Export a model to ONNX.")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--weights", default="camvid", show_default=True, help=WEIGHTS_HELP)
@click.option("--model", type=click.Choice(MODELS), help=MODEL_HELP)
def export(path: Path, weights: str, model: str | None) -> None:
    """Exports a model to PATH as ONNX, for any batch and image size.

    The graph takes normalised float images (N, 3, H, W) and returns scores (N, classes, H, W). It needs
    the extra `export`.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"export needs {' and '.join(missing)}: pip install 'shelfkern[export]'")
    if not path.parent.is_dir():
        raise click.ClickException(f"PATH {path} cannot be written: {path.parent} is not a folder")
    # It warns of torchvision's absence.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        write_onnx(open_model(weights, model), path)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error}") from error
    click.echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    tell_licence(weights)
