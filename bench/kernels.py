"""Kernels against eager torch and against the hardware: `python -m bench.kernels --op perturb --json`."""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bench.record import environment, time_calls, write_result
from counterlens.kernels.consensus import consensus_filter
from counterlens.kernels.curve import curve_scores
from counterlens.kernels.guided_update import guided_update
from counterlens.kernels.perturb import perturb, soft_perturb

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROUNDS = 3  # contenders take turns, so that a busy machine disturbs all of them alike


def take_turns(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 in seconds of each contender: per quantile, the median over the rounds."""
    rounds = [{name: measure(call, seconds / ROUNDS) for name, call in contenders.items()} for _ in range(ROUNDS)]
    return {
        name: {q: sorted(r[name][q] for r in rounds)[ROUNDS // 2] for q in ("p20", "p50", "p80")} for name in contenders
    }


def measure(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """p20, p50 and p80 of one call, in seconds."""
    if not CUDA:
        return time_calls(call, seconds=seconds, least=5)
    from triton.testing import do_bench

    times = do_bench(call, rep=int(seconds * 1000), quantiles=[0.2, 0.5, 0.8])
    return dict(zip(("p20", "p50", "p80"), (t / 1000 for t in times), strict=True))


def in_graph(call: Callable[[], object], launches: int = 100) -> Callable[[], object]:
    """A CUDA graph of so many calls."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    return graph.replay


def on_device(contenders: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The same calls; on a GPU recorded as graphs, so that a time is the device's and none of Python's."""
    return {name: in_graph(call, 1) for name, call in contenders.items()} if CUDA else contenders


def memcpy(target: Tensor, source: Tensor, threads: int) -> Callable[[], object]:
    """The C library's memcpy of one buffer in equal parts, or the device's copy."""
    if CUDA:
        return lambda: target.copy_(source)
    function = ctypes.CDLL(None).memcpy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_void_p
    pool = ThreadPoolExecutor(threads)
    part = target.numel() * target.element_size() // threads

    def copy_part(i: int) -> None:
        function(target.data_ptr() + i * part, source.data_ptr() + i * part, part)

    return lambda: list(pool.map(copy_part, range(threads)))


def eager_guided_update(
    z: Tensor, eps_uncond: Tensor, eps_cond: Tensor, grad_class: Tensor, grad_distance: Tensor,
    abar: Tensor, abar_prev: Tensor, scales: tuple[float, float, float], cos_limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formula as one would write it in eager torch: chunk size 1, mode zero, alphas [B, 1, 1, 1]."""

    def scaled(x: Tensor, dim: Sequence[int]) -> tuple[Tensor, Tensor]:
        largest = x.abs().amax(dim, keepdim=True)
        unit = x / torch.where(largest == 0, 1.0, largest)
        return unit, largest

    def rescale(x: Tensor, length: Tensor) -> Tensor:
        unit, _ = scaled(x, (1, 2, 3))
        norm = unit.square().sum((1, 2, 3), keepdim=True).sqrt()
        return unit * (length / torch.where(norm == 0, 1.0, norm))

    noise_level = (1 - abar).sqrt()
    direction = eps_cond - eps_uncond
    score = -noise_level * grad_class
    (s, _), (r, _) = scaled(score, (1,)), scaled(direction, (1,))
    cos = (s * r).sum(1) / (s.square().sum(1) * r.square().sum(1)).sqrt()
    drop = (cos < cos_limit) | (cos <= -1)
    score = torch.where(drop[:, None], 0.0, score)
    unit, largest = scaled(direction, (1, 2, 3))
    length = largest * unit.square().sum((1, 2, 3), keepdim=True).sqrt()
    guidance, class_scale, distance_scale = scales
    towards = class_scale * rescale(score, length) + distance_scale * rescale(noise_level * grad_distance, length)
    eps = eps_uncond + guidance * towards
    z0 = (z - noise_level * eps) / abar.sqrt()
    return abar_prev.sqrt() * z0 + (1 - abar_prev).sqrt() * eps, z0, (~drop).float().mean((1, 2))


def bench_guided_update(seconds: float) -> dict[str, Any]:
    shape = (8, 4, 32, 32) if CUDA else (16, 4, 32, 32)
    latents = [torch.randn(shape, device=DEVICE) for _ in range(5)]
    abar, abar_prev = (torch.full((shape[0],), v, device=DEVICE) for v in (0.5, 0.52))
    scales = {"guidance_scale": 3.0, "class_scale": 2.3, "distance_scale": 0.3}
    cos_limit = 0.5**0.5

    def ours() -> object:
        return guided_update(*latents, abar, abar_prev, **scales, angle_deg=45.0)

    def eager() -> object:
        alphas = (x[:, None, None, None] for x in (abar, abar_prev))
        return eager_guided_update(*latents, *alphas, (3.0, 2.3, 0.3), cos_limit)

    def reference() -> object:
        return guided_update(*latents, abar, abar_prev, **scales, angle_deg=45.0, backend="reference")

    contenders: dict[str, Callable[[], object]] = {"ours": ours, "eager": eager, "reference": reference}
    per_call = 1
    if CUDA:
        contenders = {name: in_graph(call) for name, call in (contenders | {"empty": empty_kernel}).items()}
        per_call = 100
    times = take_turns(contenders, seconds)
    bytes_moved = 7 * latents[0].numel() * 4
    result = {"shape": shape, "dtype": "float32", "calls_per_sample": per_call, "seconds": times, "bytes": bytes_moved}
    result["speedup_over_eager"] = times["eager"]["p50"] / times["ours"]["p50"]
    result["bytes_per_second"] = bytes_moved * per_call / times["ours"]["p50"]
    if CUDA:
        result["microseconds_per_launch"] = times["ours"]["p50"] / per_call * 1e6
        result["times_an_empty_kernel"] = times["ours"]["p50"] / times["empty"]["p50"]
    return result


def empty_kernel() -> None:
    """A kernel that does nothing."""
    from bench.empty_kernel import nothing

    nothing[(8,)](num_warps=16)


def bench_perturb(seconds: float) -> dict[str, Any]:
    n, k, dtype = (32, 20, torch.float16) if CUDA else (16, 20, torch.float32)
    image = torch.rand(n, 3, 224, 224, device=DEVICE, dtype=dtype)
    saliency = torch.rand(n, 224, 224, device=DEVICE)
    thresholds = torch.linspace(0.5, 1, k, device=DEVICE)
    out = torch.zeros(n, 2, k, 3, 224, 224, device=DEVICE, dtype=dtype)
    source = torch.rand_like(out)

    def ours() -> object:
        return perturb(image, 0.5, saliency, thresholds, out=out)

    def eager() -> object:
        shown = (saliency[:, None] >= thresholds[:, None, None])[:, :, None]
        x, b = image[:, None], torch.full((), 0.5, dtype=dtype, device=DEVICE)
        torch.where(shown, x, b, out=out[:, 0])
        return torch.where(shown, b, x, out=out[:, 1])

    copy = memcpy(out, source, torch.get_num_threads())
    contenders = {"ours": ours, "memcpy": copy, "fill": lambda: out.fill_(1.0), "eager": eager}
    times = take_turns(on_device(contenders), seconds)
    if CUDA:
        times["ours, called from Python"] = measure(ours, seconds / ROUNDS)
    written = out.numel() * out.element_size()
    moved = written + image.numel() * image.element_size() + saliency.numel() * 4
    rate, copy_rate = moved / times["ours"]["p50"], 2 * written / times["memcpy"]["p50"]
    return {
        "shape": [n, 2, k, 3, 224, 224], "dtype": str(dtype), "seconds": times, "bytes": moved,
        "bytes_per_second": rate, "memcpy_bytes_per_second": copy_rate, "share_of_memcpy": rate / copy_rate,
        "fill_bytes_per_second": written / times["fill"]["p50"],
        "share_of_fill": rate / (written / times["fill"]["p50"]),
        "speedup_over_eager": times["eager"]["p50"] / times["ours"]["p50"],
        "note": "memcpy counts bytes read and bytes written; fill (torch) counts bytes written",
    }  # fmt: skip


def bench_soft_perturb(seconds: float) -> dict[str, Any]:
    n, k, side = (16, 8, 224) if CUDA else (16, 8, 64)
    image = torch.rand(n, 3, side, side, device=DEVICE)
    saliency = torch.rand(n, side, side, device=DEVICE, requires_grad=True)
    thresholds = torch.linspace(0.5, 1, k, device=DEVICE)
    results = {
        name: soft_perturb(image, 0.5, saliency, thresholds, temperature=0.1, backend=backend)
        for name, backend in (("ours", "auto"), ("eager", "reference"))
    }
    grad = torch.randn_like(results["ours"])
    source = torch.rand_like(grad)

    def forward(backend: str) -> Callable[[], object]:
        return lambda: soft_perturb(image, 0.5, saliency.detach(), thresholds, temperature=0.1, backend=backend)

    hidden, rows = torch.full((), 0.5, device=DEVICE).expand_as(image), thresholds.expand(n, -1).contiguous()
    numbers = (0.1, [], [], False, "triton")

    def alone() -> object:
        """The backward kernel without autograd, whose stream is another one than the graph's."""
        return torch.ops.counterlens.soft_perturb_backward(grad, image, hidden, saliency.detach(), rows, *numbers)

    def backward(result: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(result, saliency, grad, retain_graph=True)

    contenders = {
        "ours": alone if CUDA else backward(results["ours"]),
        "forward": forward("auto"),
        "eager_forward": forward("reference"),
        "memcpy": memcpy(torch.zeros_like(grad), source, torch.get_num_threads()),
    }
    times = take_turns(on_device(contenders) | {"eager": backward(results["eager"])}, seconds)
    if CUDA:
        times["ours, called from Python"] = measure(backward(results["ours"]), seconds / ROUNDS)
    moved = 4 * (grad.numel() + image.numel() + 2 * saliency.numel())
    rate, copy_rate = moved / times["ours"]["p50"], 8 * grad.numel() / times["memcpy"]["p50"]
    return {
        "shape": list(grad.shape), "dtype": "float32", "pass": "backward, saliency only", "seconds": times,
        "bytes": moved, "bytes_per_second": rate, "memcpy_bytes_per_second": copy_rate,
        "share_of_memcpy": rate / copy_rate, "speedup_over_eager": times["eager"]["p50"] / times["ours"]["p50"],
    }  # fmt: skip


def bench_consensus(seconds: float) -> dict[str, Any]:
    score, reference = torch.randn(2, 16, 4, 64, 64, device=DEVICE)
    times = take_turns(
        {
            "ours": lambda: consensus_filter(score, reference, 45.0),
            "eager": lambda: consensus_filter(score, reference, 45.0, backend="reference"),
        },
        seconds,
    )
    moved = 3 * 4 * score.numel() + 16 * 64 * 64
    return {
        "shape": list(score.shape), "dtype": "float32", "seconds": times, "bytes": moved,
        "bytes_per_second": moved / times["ours"]["p50"],
        "speedup_over_eager": times["eager"]["p50"] / times["ours"]["p50"],
    }  # fmt: skip


def bench_curve(seconds: float) -> dict[str, Any]:
    logits, targets = torch.randn(16, 2, 16, 1000, device=DEVICE), torch.randint(0, 1000, (16,), device=DEVICE)
    thresholds = torch.linspace(0.5, 1, 16, device=DEVICE)
    times = take_turns(
        {
            "ours": lambda: curve_scores(logits, targets, thresholds),
            "eager": lambda: curve_scores(logits, targets, thresholds, backend="reference"),
        },
        seconds,
    )
    moved = 4 * logits.numel()
    return {
        "shape": list(logits.shape), "dtype": "float32", "seconds": times, "bytes": moved,
        "bytes_per_second": moved / times["ours"]["p50"],
        "speedup_over_eager": times["eager"]["p50"] / times["ours"]["p50"],
    }  # fmt: skip


def tune(seconds: float) -> dict[str, Any]:
    """Share of the copy that perturb and soft_perturb's backward reach, by the block and warps of a program."""
    if not CUDA:
        raise SystemExit("bench.kernels: --tune needs a CUDA device")
    from counterlens.kernels.perturb import triton as launches

    tuned = {"perturb": ("BLOCK", "WARPS", bench_perturb),
             "soft_perturb": ("BACKWARD_BLOCK", "BACKWARD_WARPS", bench_soft_perturb)}  # fmt: skip
    out: dict[str, Any] = {}
    for name, (block, warps, run) in tuned.items():
        before = getattr(launches, block), getattr(launches, warps)
        for candidate in launches.CANDIDATES:
            for field, value in zip((block, warps), candidate, strict=True):
                setattr(launches, field, value)
            out[f"{name}, {candidate}"] = round(run(seconds / 5)["share_of_memcpy"], 3)
        setattr(launches, block, before[0])
        setattr(launches, warps, before[1])
    return out


OPERATIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "consensus": bench_consensus,
    "guided_update": bench_guided_update,
    "perturb": bench_perturb,
    "soft_perturb": bench_soft_perturb,
    "curve": bench_curve,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=[*OPERATIONS, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print the whole record")
    parser.add_argument("--record", action="store_true", help="write bench/results/kernels-OP-cpu.json (or -cuda)")
    parser.add_argument("--tune", action="store_true", help="blocks and warps of the perturbation kernels; needs a GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per contender")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tune:
        with torch.inference_mode(False):
            print(json.dumps(tune(arguments.seconds), indent=1))
        return
    with torch.inference_mode(False):
        for name in OPERATIONS if arguments.op == "all" else [arguments.op]:
            result = {"op": name, **OPERATIONS[name](arguments.seconds)}
            if arguments.record:
                write_result(f"kernels-{name}-{DEVICE.type}", result)
            if arguments.json:
                print(json.dumps({"environment": environment(), **result}, indent=1))
            else:
                print(name, {key: round(v, 3) for key, v in result.items() if isinstance(v, float)})


if __name__ == "__main__":
    main()
