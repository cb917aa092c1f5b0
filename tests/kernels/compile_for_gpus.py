"""Compile every Triton kernel for GPUs that need not be there, and read registers and spills from ptxas.

Run as a program, without TRITON_INTERPRET: `python tests/kernels/compile_for_gpus.py 80 90 100` prints a JSON list.
Further arguments choose kernels by their labels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from counterlens.kernels.consensus import triton as consensus
from counterlens.kernels.curve import triton as curve
from counterlens.kernels.guided_update import triton as guided
from counterlens.kernels.perturb import triton as perturb

LATENTS = ("z", "eps_uncond", "eps_cond", "grad_class", "grad_distance", "z_prev", "z0", "score", "reference")
LATENTS += ("filtered",)
FLOAT32 = ("kept_fraction", "partials", "limits", "mean", "std", "probability", "insertion", "deletion", "thresholds")
IMAGES = ("image", "baseline", "out", "grad", "grad_image", "logits")
NUMBERS = ("guidance", "class_scale", "distance_scale", "cos_limit", "tan_limit", "sharpness")
TENSORS = {"T_ALPHAS": True, "T_PREV": True} | dict.fromkeys(
    ("T_GUIDANCE", "T_CLASS", "T_DISTANCE", "T_COS", "T_TAN"), False
)


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], int]]:
    """Label, kernel, constants, types that differ from the rule, warps: as the launching code chooses them."""
    for mode, code in consensus.MODE_CODES.items():
        for dtype in ("fp16", "bf16", "fp32") if mode == "zero" else ("fp32",):
            types = dict.fromkeys(LATENTS, f"*{dtype}")
            tile = {"D": 4, "D_PAD": 4, "CHUNK": 1, "MODE": code}
            limits = types | {"cos_limit": "*fp32", "tan_limit": "*fp32"}
            if mode == "global":
                yield f"consensus global {dtype}", consensus.global_kernel, {"BLOCK": 1024}, limits, 8
            else:
                yield f"consensus {mode} {dtype}", consensus.filter_kernel, tile | {"BLOCK": 512}, limits, 4
            for channels in (4, 16):
                wide = tile | {"D": channels, "D_PAD": channels}
                label = f"guided_update {mode} {dtype} {channels} channels"
                one = wide | TENSORS | {"BLOCK": guided.ONE_LAUNCH // channels}
                yield f"{label}, one launch", guided.one_launch_kernel, one, types, 8
                if mode == "global":
                    continue
                block = wide | {"BLOCK": guided.BLOCK_ELEMENTS // channels}
                few = {name: TENSORS[name] for name in ("T_ALPHAS", "T_COS", "T_TAN")}
                yield f"{label}, phase 1", guided.measure_kernel, block | few, types, 8
                yield f"{label}, phase 2", guided.apply_kernel, block | TENSORS | {"BLOCKS_PAD": 128}, types, 8
    for dtype in ("fp16", "bf16", "fp32"):
        types = dict.fromkeys(IMAGES, f"*{dtype}")
        common = {"NORMALISE": True, "BLOCK": perturb.BLOCK}
        sides = common | {"ABOVE": True, "BELOW": True}
        yield f"perturb value {dtype}", perturb.perturb_kernel, sides, types | {"key": "*fp32"}, 4
        yield f"perturb rank {dtype}", perturb.perturb_kernel, sides, types | {"key": "*i32", "limits": "*i32"}, 4
        soft = types | {"saliency": "*fp32", "grad_saliency": "*fp32", "thresholds": "i32"}
        yield f"soft_perturb {dtype}", perturb.soft_kernel, common, soft, 4
        backward = common | {"IMAGE": True, "BLOCK": perturb.BACKWARD_BLOCK}
        yield f"soft_perturb backward {dtype}", perturb.soft_backward_kernel, backward, soft, 4
        for k in (16, 128):
            tile = {"K_PAD": k, "BLOCK": curve.TILE // k}
            yield f"curve_scores {dtype} {k} thresholds", curve.curve_kernel, tile, types | {"targets": "*i64"}, 8


def signature(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, str]:
    """The type of every argument; what nothing is said about is a size or a stride."""
    rule = dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(NUMBERS, "fp32")
    rule |= {"alphas": "*fp32", "alphas_prev": "*fp32", "kept": "*i8"}
    if kernel is perturb.perturb_kernel:
        rule["thresholds"] = "i32"
    rule |= types
    return {name: "constexpr" if name in constants else rule.get(name, "i32") for name in kernel.arg_names}


def compile_one(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, cc: int) -> dict[str, Any]:
    source = ASTSource(fn=kernel, signature=signature(kernel, constants, types), constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", cc, 32), options={"num_warps": warps}).asm["ptx"]
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if cc >= 100 else "ptxas")
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None
    assert len(spills) == 2, report
    return {"target": target[1], "registers": int(registers[1]), "spilled_bytes": sum(spills), "warps": warps}


def main() -> None:
    targets = [int(word) for word in sys.argv[1:] if word.isdigit()]
    labels = [word for word in sys.argv[1:] if not word.isdigit()]
    rows = [
        {"kernel": label, **compile_one(kernel, constants, types, warps, cc)}
        for cc in targets
        for label, kernel, constants, types, warps in variants()
        if not labels or label in labels
    ]
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
