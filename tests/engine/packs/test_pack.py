"""The digits pack: its data, its checks, and that its parts do what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.exactness import one_step, whole_loop
from bench.quality import psnr
from counterlens.engine.config import Config
from counterlens.engine.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.images.files import as_saved
from counterlens.engine.packs import SPLITS, Pack
from counterlens.engine.packs.rendering import COLOURS, MARKER_SIZE, Marker, choose_markers, draw_markers, render


@pytest.fixture(scope="module")
def pack() -> Pack:
    return Pack("digits")


def test_splits_are_whole_and_separate(pack: Pack) -> None:
    split = pack.digits["split"]
    counts = [int((split == i).sum()) for i in range(3)]
    assert sum(counts) == len(split) == 1797
    assert counts[SPLITS.index("test")] >= 300
    for i in range(3):
        per_class = torch.bincount(pack.digits["label"][split == i].long(), minlength=10)
        assert per_class.min() > 0.8 * per_class.max()


def test_glyphs_are_scikit_learns(pack: Pack) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    data = datasets.load_digits()
    assert torch.equal(pack.digits["glyph"], torch.tensor(data.images).to(torch.uint8))
    assert pack.digits["label"].tolist() == data.target.tolist()


def test_every_file_is_in_the_manifest_and_small(pack: Pack) -> None:
    files = {p.relative_to(pack.folder).as_posix() for p in pack.folder.rglob("*") if p.is_file()}
    assert files == set(pack.manifest["files"]) | {"pack.json", "README.md"}
    assert sum((pack.folder / f).stat().st_size for f in files) <= 13_000_000
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]


def test_rendering_depends_on_glyph_and_seed_only(pack: Pack) -> None:
    glyphs = pack.digits["glyph"][:3]
    together = render(glyphs, [1, 2, 3])
    assert torch.equal(render(glyphs[1:2], [2]), together[1:2])
    assert not torch.equal(render(glyphs[1:2], [9]), together[1:2])
    assert together.min() >= 0
    assert together.max() <= 1
    with pytest.raises(ValueError, match="glyphs"):
        render(glyphs, [1])


def test_markers_follow_their_rules() -> None:
    labels, seeds = [2, 7] * 500, list(range(1000))
    matching = choose_markers(labels, seeds, "matching")
    assert {(label, m.corner) for label, m in zip(labels, matching, strict=True)} == {
        (2, "bottom-right"),
        (7, "top-left"),
    }
    conflicting = choose_markers(labels, seeds, "conflicting")
    assert all(a.corner != b.corner and a.colour == b.colour for a, b in zip(matching, conflicting, strict=True))
    assert choose_markers(labels, seeds, "none") == [None] * 1000
    random = choose_markers(labels, seeds, "random")
    share = [sum(m is not None for m in random[i::2]) / 500 for i in (0, 1)]
    assert all(0.43 < s < 0.57 for s in share)
    corners = [[m.corner == "top-left" for m in random[i::2] if m is not None] for i in (0, 1)]
    assert all(0.4 < sum(c) / len(c) < 0.6 for c in corners)


def test_a_marker_is_where_its_box_is() -> None:
    blank = torch.zeros(2, 3, 32, 32)
    marker = Marker("bottom-right", "blue")
    drawn = draw_markers(blank, [marker, None])
    assert blank.max() == 0
    rows, columns = marker.box
    assert torch.equal(drawn[0, :, rows, columns], torch.tensor(COLOURS["blue"]).reshape(3, 1, 1).expand(3, 5, 5))
    assert (drawn[0].sum(0) > 0).sum() == MARKER_SIZE**2
    assert drawn[0, :, 31].max() == 0
    assert drawn[1].max() == 0


def test_samples_do_not_depend_on_the_count(pack: Pack) -> None:
    few, many = (pack.samples("test", count=n, marker="random") for n in (12, 40))
    assert torch.equal(few.images, many.images[:12])
    assert few.labels[:10] == list(range(10))
    assert torch.equal(few.images, as_saved(few.images))
    with pytest.raises(UsageError, match=r"^count:"):
        pack.samples("test", count=10_000)
    with pytest.raises(UsageError, match=r"^split:"):
        pack.samples("holdout")
    with pytest.raises(UsageError, match=r"^marker:"):
        pack.samples("test", marker="blue")


def test_reconstruction(pack: Pack) -> None:
    diffusion = pack.diffusion()
    x = pack.samples("test", count=60, marker="random").images
    with torch.no_grad():
        back = as_saved(((diffusion.decode(diffusion.encode(x)) + 1) / 2).clamp(0, 1))
    assert psnr(x, back).mean() >= 36


def test_classifiers(pack: Pack) -> None:
    accuracy = {}
    for rule in ("random", "matching", "conflicting"):
        samples = pack.samples("test", marker=rule)
        labels = torch.tensor(samples.labels)
        for name in ("clean", "shortcut", "judge"):
            with torch.no_grad():
                predicted = pack.classifier(name).logits(samples.images).argmax(1)
            accuracy[name, rule] = (predicted == labels).double().mean().item()
    assert accuracy["clean", "random"] >= 0.97
    assert accuracy["judge", "random"] >= 0.98
    assert accuracy["shortcut", "conflicting"] <= accuracy["shortcut", "matching"] - 0.30


@pytest.mark.slow  # test_matrix.py does it with fewer samples
def test_one_step_equals_the_literal_baseline(pack: Pack) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        rows = one_step(pack, dtype, timesteps=(341,))
        assert len(rows) == 16
        for row in rows:
            assert row["worst"] <= tolerance, row
            assert row["left_out"] <= 0.05, row


@pytest.mark.slow
def test_whole_loop_equals_the_literal_baseline(pack: Pack) -> None:
    result = whole_loop(pack, count=2)  # python -m bench.exactness takes eight
    assert result["steps"] == 171
    assert result["worst"] <= 1e-6


def test_settings_are_complete(pack: Pack) -> None:
    settings = pack.manifest["settings"]
    assert settings["realistic"]["angle"] == 45
    assert settings["audit"] == settings["realistic"] | {"angle": 90}
    assert json.loads((Path(pack.folder) / "pack.json").read_text()) == pack.manifest


def test_the_tiny_decoder_is_small_listed_and_pulls_the_same_way(pack: Pack) -> None:
    path = Path(pack.folder) / "tiny-decoder" / "model.safetensors"
    assert path.stat().st_size <= 300_000
    assert {"tiny-decoder/config.json", "tiny-decoder/model.safetensors"} <= set(pack.manifest["files"])
    decoder, diffusion = pack.guidance_decoder(), pack.diffusion()
    assert decoder is not None
    classifier = pack.classifier("clean")
    x = pack.samples("validation", count=20).images
    with torch.no_grad():
        z = diffusion.encode(x)
        pulled = []
        for decode in (diffusion.decode, decoder.decode):
            image, pull = torch.func.vjp(decode, z)
            target = torch.arange(20) % 10
            v = torch.func.grad(lambda y, t=target: classifier.log_prob((y + 1) / 2, t).sum())(image)
            pulled.append(pull(v / v.abs().amax(dim=(1, 2, 3), keepdim=True))[0].flatten(1))
    assert torch.cosine_similarity(*pulled).mean() > 0.5


def test_speeds_change_how_and_never_what(pack: Pack) -> None:
    speeds = pack.manifest["speeds"]
    assert list(speeds) == ["exact", "balanced", "fast", "turbo"]
    for fields in speeds.values():
        assert not set(fields) & {"strength", "guidance_scale", "class_scale", "distance_scale", "angle", "filter"}
    engine = Engine.from_pack("digits", runtime="eager")
    samples = pack.samples("validation", count=24, marker="random")
    result = engine.counterfactual(samples.images, config=Config(speed="fast"))
    assert result.flipped.double().mean() >= 0.8
    assert result.l1.mean() < 0.1
