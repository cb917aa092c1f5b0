"""The papers' table of counterfactuals, of files that `counterlens counterfactual` wrote; called by bench/photos.sh.

    python -m bench.photos_table MODEL CLASSIFIER OUT/*/ [--encoder FOLDER]

`counterlens quality` prints whole tables of papers, through the papers' own networks. This one takes any backbone, and
says what only photographs have. For each folder: flips, closeness (L1, L2), COUT; LPIPS where the package and its
weights are there; with an encoder (a Hugging Face backbone, such as DINO) S3, FID and split FID over its features. Of
photographs: how many restored ones still flip, and for how many files the classifier's own pipeline says another label.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from counterlens.engine import Engine
from counterlens.engine.cli.made import Reader, read_results
from counterlens.engine.errors import CounterlensError
from counterlens.engine.metrics import counterfactual_quality, fid, sfid
from counterlens.engine.models.preprocessing import from_processor
from counterlens.engine.models.processors import padding_of

from .record import say


def _encoder(folder: Path, size: int) -> Any:
    """From images [B, 3, size, size] in [0, 1] to a backbone's class token [B, D]."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    preprocessing = from_processor(transformers.AutoImageProcessor.from_pretrained(folder), size)

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(preprocessing(images)).last_hidden_state[:, 0]
        return out

    return features


def measure(engine: Engine, folder: Path, encoder: Any) -> dict[str, Any]:
    """One row of the table: the measures of a folder's finished counterfactuals, with 95 % intervals.

    Raises:
        CounterlensError: it holds none.
    """
    results = read_results(folder)
    made = [m for m in results.made if m.line["fit"] != "native"]
    done = [m.line for m in made]
    out: dict[str, Any] = {
        "done": len(done), "without": results.without,
        "own_label_differs": sum(line["own_prediction"] != line["source"] for line in done if "own_prediction" in line),
    }  # fmt: skip
    if not done:
        raise CounterlensError(f"{folder}: no finished counterfactual of square images")
    reader = Reader(results, colour=padding_of(engine.classifier))
    before, after = (torch.stack(part) for part in zip(*map(reader.pair, made), strict=True))
    targets = [engine.labels.index(line["target"]) for line in done]
    lpips = "alex" if find_spec("lpips") and find_spec("torchvision") else None
    with engine.frozen():
        quality = counterfactual_quality(
            engine.classifier, before.to(engine.device), after.to(engine.device),
            torch.tensor(targets, device=engine.device), encoder=encoder, lpips=lpips, batch_size=16,
        )  # fmt: skip
    out |= {name: [found.mean, found.low, found.high] for name, found in quality.summary().items()}
    if encoder is not None and len(done) >= 4:
        out |= {"fid": fid(before, after, encoder), "sfid": sfid(before, after, encoder)}
    flips = [line for line in done if line["flipped"] and "restored_flipped" in line]
    if flips:
        out["restored_flips"] = sum(line["restored_flipped"] for line in flips) / len(flips)
    return out


def main(
    model: Annotated[str, typer.Argument(help="As for --model.")],
    classifier: Annotated[str, typer.Argument(help="As for --classifier.")],
    folders: Annotated[list[Path], typer.Argument(help="What `counterlens counterfactual` wrote, one a setting.")],
    encoder: Annotated[Path | None, typer.Option(help="Backbone for S3, FID and split FID.")] = None,
    labels: Annotated[str | None, typer.Option(help="As for --labels.")] = None,
    image_size: Annotated[int | None, typer.Option(help="As for --image-size.")] = None,
) -> None:
    """Print the table as JSON, one row a folder, and what it says for people."""
    given: dict[str, Any] = {} if labels is None else {"labels": labels.split(",")}
    engine = Engine.from_pretrained(model, classifier, image_size=image_size, **given)
    features = None if encoder is None else _encoder(encoder, engine.image_size)
    rows = {folder.name: measure(engine, folder, features) for folder in folders}
    for name, row in rows.items():
        said = ", ".join(f"{k} {v[0]:.3f}" if isinstance(v, list) else f"{k} {v}" for k, v in row.items())
        say(f"{name}: {said}")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
