"""What rounding a UNet's forward pass to fp8 costs in quality, emulated on a CPU: `python -m bench.fp8`.

Weights (a scale for each output channel) and activations (a scale for each tensor, from its own largest magnitude) of
every convolution and linear layer of the UNet go through float8_e4m3fn and back; sums stay in float32, as on a card,
and gradients pass straight through. The runs are those of the speed `fast` on validation digits, beside float32 and
float16; fp8 is kept only where flips and transfer are not inferior (`bench.pareto.not_inferior`).
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.measure import quality, two_targets
from bench.pareto import not_inferior
from bench.record import interval, say, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.images.files import as_saved
from counterlens.engine.packs import Pack

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(x: Tensor, kind: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    """x as `kind` holds it, with a scale over `dims` where that is fp8; gradients pass straight through."""
    if kind != torch.float8_e4m3fn:
        return x + (x.to(kind).to(x) - x).detach()
    largest = x.detach().abs().amax(dims, keepdim=True)
    scale = torch.where(largest == 0, 1.0, LARGEST / largest)
    return x + ((x * scale).to(kind).to(x) / scale - x).detach()


def emulated(unet: nn.Module, kind: torch.dtype) -> nn.Module:
    """A copy of a UNet whose convolutions and linear layers take and hold numbers of this type."""
    made = copy.deepcopy(unet)
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                module.weight.copy_(rounded(module.weight, kind, tuple(range(1, module.weight.ndim))))
            module.register_forward_pre_hook(
                lambda _, given: (rounded(given[0], kind, tuple(range(given[0].ndim))), *given[1:])
            )
    return made


@torch.no_grad()
def main(
    count: Annotated[int, typer.Option(help="Validation digits, each with two targets.")] = 40,
    speed: Annotated[str, typer.Option(help="exact, balanced or fast.")] = "fast",
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/fp8.json.")] = False,
) -> None:
    """Compare float32, float16 and fp8 forward passes of the UNet.

    Example: python -m bench.fp8 --record
    """
    torch.set_num_threads(1)
    pack = Pack("digits")
    judge = pack.classifier("judge")
    plain = Engine.from_pack("digits", runtime="eager", device="cpu")
    samples = pack.samples("validation", count=count, marker="random")
    images = samples.images.repeat_interleave(2, dim=0)
    targets = torch.stack(two_targets(plain, samples.images), 1).flatten()
    config: Any = Config(mode="realistic", speed=speed)  # type: ignore[arg-type]
    kinds = {"float32": None, "float16": torch.float16, "fp8": torch.float8_e4m3fn}
    rows: dict[str, Any] = {}
    values: dict[str, dict[str, Tensor]] = {}
    for name, kind in kinds.items():
        diffusion = pack.diffusion()
        if kind is not None:
            diffusion.denoiser = emulated(diffusion.denoiser, kind)
        engine = Engine(
            diffusion, plain.classifier, config, pack_settings=plain.pack_settings, speeds=plain.speeds,
            guidance_decoder=plain.guidance_decoder, runtime="eager", device="cpu",
        )  # fmt: skip
        made = engine.counterfactual(images, targets)
        found = quality(images, as_saved(made.images), targets, plain.classifier, judge)  # type: ignore[arg-type]
        values[name] = {k: v.double() for k, v in found.items()}
        rows[name] = {k: interval(v) for k, v in values[name].items()}
        if name != "float32":
            change = {k: interval(v - values["float32"][k]) for k, v in values[name].items()}
            rows[name] |= {"minus_float32": change, "not_inferior": not_inferior(change)}
        say(name, {k: round(v.mean().item(), 4) for k, v in values[name].items()}, rows[name].get("not_inferior"))
    if record:
        say(write_result("fp8", {"images": len(images), "split": "validation", "speed": speed, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
