"""Are counterfactuals bit for bit what an earlier commit made?

`python -m bench.identity --against REV` runs the same 20 test digits, modes, speeds and classifiers, alone and 16 at a
time, with both trees on this machine and as many threads, and compares every pixel array.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.record import say, write_result
from counterlens.engine import Config, Engine
from counterlens.engine.packs import Pack

ROOT = Path(__file__).resolve().parent.parent
CLASSIFIERS, MODES, SPEEDS = ("clean", "shortcut"), ("realistic", "audit"), ("exact", "balanced", "fast")
ALONE = 3  # images of an exact run that are also run alone: each takes seconds


def counterfactuals(count: int) -> dict[str, Tensor]:
    """Pixel arrays [n, 3, H, W] by classifier, mode, speed and batch."""
    images = Pack("digits").samples("test", count=count).images
    out = {}
    for classifier in CLASSIFIERS:
        engine = Engine.from_pack("digits", classifier=classifier, runtime="eager", device="cpu")
        for mode, speed in itertools.product(MODES, SPEEDS):
            config = Config(mode=mode, speed=speed)
            alone = images[:ALONE] if speed == "exact" else images
            name = f"{classifier} {mode} {speed}"
            say(name)
            out[f"{name} batch 16"] = engine.counterfactual(images, config=config).images
            one_by_one = [engine.counterfactual(image[None], config=config).images for image in alone]
            out[f"{name} batch 1"] = torch.cat(one_by_one)
    return out


def of_commit(revision: str, count: int, folder: Path) -> dict[str, Tensor]:
    """What the tree of `revision` makes, in a process of its own, with this installation's compiled kernels."""
    tree, package = folder / "tree", folder / "path" / "counterlens"
    subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(tree)], check=True)
    subprocess.run(["git", "checkout", "-q", revision], cwd=tree, check=True)
    kernels = ["kernels/*.cpp", "kernels/*/*.cpp", "kernels/*.h", "CMakeLists.txt"]
    changed = subprocess.run(["git", "diff", "--quiet", revision, "HEAD", "--", *kernels], cwd=ROOT)
    if changed.returncode:
        raise SystemExit(
            f"the CPU kernels' sources differ from those of {revision}: install that commit beside this one"
        )
    package.mkdir(parents=True)
    for part in ("engine", "export", "kernels"):
        (package / part).symlink_to(tree / part)
    import counterlens.kernels._cpu

    for built in Path(counterlens.kernels._cpu.__file__).parent.glob("_cpu*.so"):
        shutil.copy(built, tree / "kernels")
    shutil.copy(Path(__file__), tree / "bench" / "identity.py")
    path = folder / "pixels.safetensors"
    command = [sys.executable, "-m", "bench.identity", "--count", str(count), "--save", str(path)]
    environment = os.environ | {
        "PYTHONPATH": f"{package.parent}:{tree}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    where = [sys.executable, "-c", "import counterlens.engine; print(counterlens.engine.__file__)"]
    said = subprocess.run(where, cwd=tree, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(said).resolve().is_relative_to(tree.resolve()):  # as in an editable installation
        raise SystemExit(f"{said} would run in place of {revision}'s own; install this project without -e")
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return load_file(path)


def differences(new: dict[str, Tensor], old: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row per array: how many samples differ in any bit, and by how much at the most."""
    return [
        {
            "what": name,
            "samples": len(images),
            "differing": int((images != old[name]).flatten(1).any(1).sum()),
            "largest": (images - old[name]).abs().max().item(),
        }
        for name, images in new.items()
    ]


def main(
    against: Annotated[str, typer.Option(help="A commit to compare with.")] = "",
    count: Annotated[int, typer.Option(help="Test digits.")] = 20,
    save: Annotated[Path | None, typer.Option(help="Only write this tree's arrays into a file.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/identity.json.")] = False,
) -> None:
    """Compare this tree's counterfactuals with an earlier commit's; exit code 1 if any bit differs."""
    if not against and save is None:
        raise typer.BadParameter("name a commit with --against, or a file with --save")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    new = counterfactuals(count)
    if save is not None:
        save_file({name: images.contiguous() for name, images in new.items()}, save)
    if not against:
        return
    with tempfile.TemporaryDirectory() as folder:
        say(f"the same with {against}")
        rows = differences(new, of_commit(against, count, Path(folder)))
    for row in rows:
        print(f"{row['what']}: {row['differing']} of {row['samples']} differ, by at most {row['largest']:.3g}")
    if record:
        write_result("identity", {"against": against, "rows": rows})
    raise typer.Exit(int(any(row["differing"] for row in rows)))


if __name__ == "__main__":
    typer.run(main)
