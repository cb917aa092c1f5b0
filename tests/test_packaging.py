"""Hazards of the folder layout, and that the training recipe resumes to the same weights."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_kernels_folder_does_not_disturb_other_libraries() -> None:
    """transformers and diffusers look for a package `kernels` and find our folder when the root is on the path."""
    pytest.importorskip("transformers", reason="needs transformers")
    code = "import diffusers, transformers; from diffusers import UNet2DModel; from transformers import CLIPTextModel"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("package", ["engine", "engine.images", "engine.metrics", "engine.saliency", "export"])
def test_public_names_are_what_they_say_whatever_was_imported_before(package: str) -> None:
    """A module of a function's name would take the function's place in its package as soon as it is imported."""
    home = importlib.import_module(f"counterlens.{package}")
    for module in pkgutil.iter_modules(home.__path__):
        if not module.name.startswith("_") and not module.ispkg:
            importlib.import_module(f"counterlens.{package}.{module.name}")
    assert home.__all__
    for name in home.__all__:
        assert not isinstance(getattr(home, name), ModuleType), name


def test_files_named_in_comments_are_there() -> None:
    named = re.compile(
        r"\b(?:tests|bench(?!/results)|engine|export|kernels|docs)/[\w/.-]+\.(?:py|md|json|png|html|cpp)\b"
    )
    sources = [p for part in ("engine", "export", "kernels", "bench", "tests") for p in (ROOT / part).rglob("*")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources
        if path.suffix in (".py", ".cpp", ".h", ".md")
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_engine_attributes_are_lazy() -> None:
    import counterlens.engine as engine

    assert engine.Engine.__name__ == "Engine"
    with pytest.raises(AttributeError, match="no attribute"):
        engine.Motor  # noqa: B018


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Interrupted after two of four steps and run again: the same weights as without the interruption."""
    pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")
    from rich.progress import Progress

    from counterlens.engine.packs import train

    class Stop(Exception):
        pass

    def run(folder: Path, fail_at: int | None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)

        def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
            if step == fail_at:
                raise Stop
            return model(torch.randn(8, 4, generator=train._batch_generator(0, "try", step))).square().mean()

        with Progress(disable=True) as progress:
            return train._run_stage("try", 4, model, 0.1, loss_of, folder, progress).state_dict()

    train_seconds = train.CHECKPOINT_SECONDS
    train.CHECKPOINT_SECONDS = 0
    try:
        whole = run(tmp_path / "whole", None)
        with pytest.raises(Stop):
            run(tmp_path / "cut", 2)
        resumed = run(tmp_path / "cut", None)
    finally:
        train.CHECKPOINT_SECONDS = train_seconds
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


@pytest.mark.slow
def test_recipe_makes_a_pack_that_opens(tmp_path: Path) -> None:
    """The whole recipe with two steps a stage: an untrained pack, but a valid one."""
    pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")
    from rich.progress import Progress

    from counterlens.engine import Engine
    from counterlens.engine.packs import Pack, train

    with Progress(disable=True) as progress:
        folder = train.train(tmp_path, 0, dict.fromkeys(train.STEPS, 2), 1, progress)
    shipped = Pack("digits")
    for name, value in Pack(str(folder)).digits.items():
        assert torch.equal(value, shipped.digits[name])
    engine = Engine.from_pack(str(folder))
    result = engine.counterfactual(shipped.samples("test", count=2).images)
    assert result.images.isfinite().all()


BENCHMARKS = [path.stem for path in sorted((ROOT / "bench").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_can_be_started(name: str) -> None:
    """What it imports is there."""
    module = importlib.import_module(f"bench.{name}")
    assert module.main if hasattr(module, "main") else module.app
