"""The program of a whole counterfactual is the engine's run; (slow) its file answers alike in every runtime at hand."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from counterlens.engine.config import Config
from counterlens.engine.core.whole_run import (
    CARD,
    MODEL,
    counterfactual_program,
    example_inputs,
    measure_whole,
    scale_names,
)
from counterlens.engine.core.whole_runs import NAME, STEPS, WholeSampler
from counterlens.engine.engine import Engine
from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.jobs import Job, seeded_noise
from counterlens.engine.images.files import as_saved, save_png
from counterlens.engine.multistep import SOLVERS, Levels
from counterlens.engine.packs import Pack
from counterlens.engine.portable.file import SALIENCY, CounterfactualFile, _noise, card_of
from counterlens.engine.portable.page import HOW, VERSION, web_runtime, write_page
from counterlens.engine.saliency.explain import pack_adapter
from counterlens.engine.saliency.one_file import export_saliency
from counterlens.export.program import run
from tests.tiny import LABELS, save_dit, save_ldm, save_stable_diffusion

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pack("digits", runtime="eager", device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"speed": "fast"},
        {"speed": "balanced", "mode": "audit", "solver": "unipc", "distance": "latent"},
        {"speed": "fast", "solver": "ddim", "guidance_start": 0.2, "guidance_end": 0.8, "guidance_every": 2},
        {"mode": "official", "steps": 6, "filter": "project"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_a_program_is_the_engines_run_bit_for_bit(engine: Engine, fields: dict[str, Any]) -> None:
    config = Config(**fields)
    images = Pack("digits").samples("test", count=4).images
    expected = engine.counterfactual(images, ["runner-up", "3", "runner-up", "runner-up"], config=config)
    inputs = {"image": images, "target": torch.tensor([-1, 3, -1, -1])}
    if engine.settings(config).noise == "random":
        inputs["noise"] = seeded_noise(engine.diffusion.latent_shape, expected.seeds, images)
    with engine.frozen(), torch.no_grad():
        got = run(counterfactual_program(engine, engine.settings(config)), inputs)
    done = torch.tensor([error is None for error in expected.errors])
    assert done.sum() >= 3
    assert torch.equal(got["counterfactual"][done], as_saved(expected.images)[done])
    assert torch.equal(got["prediction"][done], expected.prediction[done])
    assert torch.equal(got["resolved_target"], expected.target)
    torch.testing.assert_close(got["kept"][done], expected.kept_fraction[done], equal_nan=True, rtol=0, atol=0)


def test_scales_are_inputs_of_a_program_that_is_told_so(engine: Engine) -> None:
    config = Config(speed="fast", class_scale=4.0, distance_scale=0.2, angle=60.0)
    images = Pack("digits").samples("test", count=3).images
    expected = engine.counterfactual(images, config=config)
    settings = engine.settings(Config(speed="fast"))
    values = {name: torch.full((3,), getattr(engine.settings(config), name)) for name in scale_names(settings)}
    values["class_scale"][2] = torch.nan
    with engine.frozen(), torch.no_grad():
        program = counterfactual_program(engine, settings, scales=True)
        got = run(program, {"image": images, "target": torch.full((3,), -1), **values})
    torch.testing.assert_close(got["counterfactual"][:2], as_saved(expected.images)[:2], rtol=0, atol=1.5 / 255)
    assert got["prediction"].tolist() == [*expected.prediction[:2].tolist(), -1]
    without = engine.settings(Config(speed="fast", filter="off"))
    assert "angle" not in example_inputs(engine, without, 2, scales=True)


def test_images_and_targets_that_cannot_be_used_have_defined_answers(engine: Engine) -> None:
    images = Pack("digits").samples("test", count=4).images.clone()
    images[0, 0, 0, 0] = torch.nan
    images[1] *= 2
    settings = engine.settings(Config(speed="fast", steps=2))
    source = int(engine.probabilities(images[3:]).argmax())
    with engine.frozen(), torch.no_grad():
        got = run(
            counterfactual_program(engine, settings), {"image": images, "target": torch.tensor([-1, -1, 10, source])}
        )
    assert got["prediction"].tolist() == [-1, -1, -1, source]
    assert got["l1"].isnan().tolist() == [True, True, True, False]
    assert got["counterfactual"].isfinite().all()
    assert torch.equal(got["counterfactual"][3], as_saved(images[3]))  # nothing to change


def test_jobs_run_whole_in_batches_of_one_size(engine: Engine) -> None:
    seen = []

    def brighter(image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(image.shape[0])
        said = torch.where(target == 9, -1, target)
        return image + 0.1, target, image, target, said, image, image, torch.full((len(image), 7), 0.5)

    settings = engine.settings(Config(speed="fast"))
    sampler = WholeSampler(brighter, settings, 4, engine.diffusion.latent_shape)
    images = Pack("digits").samples("test", count=6).images
    ids = [sampler.submit(Job(image, 9 if i == 2 else i, 0, settings)) for i, image in enumerate(images)]
    assert sampler.cancel(ids[0])
    outcomes = sampler.tick()
    assert seen == [4, 4]
    assert [o.id for o in outcomes] == ids[1:]
    assert [o.error is None for o in outcomes] == [True, False, True, True, True]
    assert "NaN" in (outcomes[1].error or "")
    assert all(torch.equal(o.image, images[i] + 0.1) for i, o in enumerate(outcomes, 1) if o.image is not None)
    assert outcomes[0].kept == [0.5] * 7
    assert sampler.tick() == []


def test_a_whole_run_that_is_damaged_or_of_another_solver_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = Config(speed="fast"), tmp_path / MODEL
    file.write_bytes(b"a file")

    def opened() -> Engine:
        return Engine.from_pack("digits", config=config, store=tmp_path / "store", device="cpu")

    one = opened()
    settings = one.settings(config)
    (tmp_path / "store").mkdir()
    one.whole_runs.keep(settings, file, {})
    one.whole_runs.remember(settings, 1, {STEPS: 0.2, NAME: 0.1})
    assert opened().runtime_choice(1).runtime == NAME

    own = SOLVERS[settings.solver]
    with monkeypatch.context() as patched:  # the same name, other numbers
        rows = [(*row[:-1], row[-1] + 0.1) for row in own.rows(Levels([0.5, 0.9], [0.8, 0.4], [-0.5, 0.8]))]
        other = own._replace(rows=lambda levels: rows[:1] * levels.steps)
        patched.setitem(SOLVERS, settings.solver, other)
        assert opened().runtime_choice(1).runtime == "eager"

    measured = next((tmp_path / "store" / "measured").iterdir())
    times = measured.read_text()
    for damaged in ("[1]", '{"1": {"steps": 1}}', '{"1": 3}', "{"):
        measured.write_text(damaged)
        assert opened().runtime_choice(1).runtime == "eager"
    measured.write_text(times)
    assert opened().runtime_choice(1).runtime == NAME

    artefact = one.whole_runs.find(settings)
    assert artefact is not None
    artefact.file(MODEL).write_bytes(b"another")
    with pytest.warns(UserWarning, match="whole-run is not used: .*not the file that was built"):
        assert opened().runtime_choice(1).runtime == "eager"


def test_random_images_of_a_measurement_are_not_taken_for_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, config = Pack("digits"), Config(speed="fast", steps=2)
    one = Engine(pack.diffusion(), pack.classifier("clean"), config, store=tmp_path, device="cpu")
    one.slots = (1,)
    monkeypatch.setattr(one.whole_runs, "open", lambda settings: lambda *inputs: None)
    measure_whole(one, config)
    settings = one.settings(config)
    assert one.whole_runs.measurements(settings).keys() == {"1"}
    assert one.runners.real_images is None
    assert all(r.spec.images is None for r in one.runners.parts(settings).values())


def test_inputs_of_the_export(engine: Engine, tmp_path: Path) -> None:
    assert list(example_inputs(engine, engine.settings(Config(mode="official")), 2)) == ["image", "target", "noise"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        engine.export_counterfactual(tmp_path / "file" / "out", Config(speed="fast"))
    with pytest.raises(UsageError, match="a page shows one image at a time; take an open batch or 1, not 4"):
        engine.export_counterfactual(tmp_path / "out", Config(speed="fast"), batch=4, pages=[True])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / MODEL).write_text("somebody's")
    with pytest.raises(UsageError, match="none of this run's files and would be overwritten"):
        engine.export_counterfactual(tmp_path / "theirs", Config(speed="fast"))
    assert [p.name for p in (tmp_path / "theirs").iterdir() if p.name != ".lock"] == [MODEL]


def test_the_pages_runtime_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "onnxruntime-web-1.0.0.tgz"
    other.write_bytes(b"another")
    with pytest.raises(UsageError, match="its hash differs"):
        web_runtime(other)
    (tmp_path / "package.json").write_text('{"version": "1.29.0"}')
    with pytest.raises(UsageError, match=rf"holds version 1\.29\.0, the page is made for {VERSION}"):
        web_runtime(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        web_runtime(tmp_path / "none.tgz")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CounterlensError, match="npm is not installed here"):
        web_runtime(cache=tmp_path / "cache")
    assert "npm pack" in HOW


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    card = engine.export_counterfactual(folder, Config(speed="fast"))
    assert card["parity"]["predictions_equal"] >= 63 / 64
    assert card["parity"]["within_1_of_255"] >= 0.98
    assert card["bytes"] <= 11e6
    assert card["seconds"]["composing"] > 0
    with pytest.raises(UsageError, match='speed was "fast", is "balanced"'):
        engine.export_counterfactual(folder, Config(speed="balanced"))
    save_png(Pack("digits").samples("test", count=1).images[0], folder / "digit.png")
    return folder


@pytest.mark.slow
def test_the_exact_shortcut_audit_too(tmp_path: Path) -> None:
    engine = Engine.from_pack("digits", classifier="shortcut", runtime="eager", device="cpu")
    card = engine.export_counterfactual(tmp_path, Config(mode="audit", steps=12, gradient="exact"), batch=8)
    assert card["parity"]["predictions_equal"] >= 63 / 64
    assert card["inputs"][0]["shape"] == [8, 3, 32, 32]
    images = Pack("digits").samples("test", count=3).images
    answers = CounterfactualFile(tmp_path / MODEL).run(images.numpy())
    assert answers.errors == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sd v", "dit", "cin256"])
def test_other_generators(kind: str, tmp_path: Path) -> None:
    prediction = "v_prediction" if kind == "sd v" else "epsilon"
    save = {"dit": save_dit, "cin256": save_ldm}.get(kind, lambda folder: save_stable_diffusion(folder, prediction))
    model = save(tmp_path / "m")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
                                  torch.nn.Flatten(), torch.nn.Linear(32, len(LABELS)))  # fmt: skip
    config = Config(mode="official", steps=8, strength=0.5)
    engine = Engine.from_pretrained(model, network, config, labels=LABELS, runtime="eager")
    card = engine.export_counterfactual(tmp_path / "out", config, scales=True)
    assert card["parity"]["predictions_equal"] >= 63 / 64
    assert "random" in card["parity"]["images"]
    assert "warning" in card["parity"]
    opened = CounterfactualFile(tmp_path / "out" / MODEL, threads=1)
    assert opened.scales["class_scale"] == pytest.approx(engine.settings(config).class_scale)
    images = torch.rand((3, 3, engine.image_size, engine.image_size), generator=torch.Generator().manual_seed(1))
    noise = torch.from_numpy(np.stack([_noise(image, 0, opened.noise or []) for image in images.numpy()]))
    stronger = config.model_copy(update={"class_scale": 9.0, "angle": 80.0})
    with engine.frozen(), torch.no_grad():
        program = counterfactual_program(engine, engine.settings(stronger))
        expected = run(program, {"image": images, "target": torch.full((3,), -1), "noise": noise})
    answers = opened.run(images.numpy(), scales={"class_scale": 9.0, "angle": 80.0})
    assert answers.prediction.tolist() == expected["prediction"].tolist()
    assert np.abs(answers.counterfactual - expected["counterfactual"].numpy()).mean() < 0.5 / 255
    assert np.abs(answers.counterfactual - opened.run(images.numpy()).counterfactual).max() > 1.5 / 255


@pytest.mark.slow
def test_examples_answer_alike_in_python_and_node(whole: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    command = [sys.executable, EXAMPLES / "run.py", whole / MODEL, whole / "digit.png", "7", tmp_path / "python.png"]
    python = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    packages = ["onnxruntime-node@1.30.0", "pngjs@7"]
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--prefix", tmp_path, *packages]
    subprocess.run(npm, check=True, capture_output=True, timeout=300)
    shutil.copy(EXAMPLES / "run.mjs", tmp_path)
    command = ["node", tmp_path / "run.mjs", whole / MODEL, whole / "digit.png", "7", tmp_path / "node.png"]
    node = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {k: node[k] for k in ("from", "to", "now")} == {k: python[k] for k in ("from", "to", "now")}
    pictures = [np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in ("python", "node")]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    for name in ("run.py", "run.mjs"):
        assert len((EXAMPLES / name).read_text().splitlines()) <= 40


@pytest.mark.slow
def test_counterlens_runs_the_file_as_onnxruntime_does(whole: Path) -> None:
    opened = CounterfactualFile(whole / MODEL, threads=1)
    images = Pack("digits").samples("test", count=3).images.numpy()
    session = onnxruntime.InferenceSession(whole / MODEL, providers=["CPUExecutionProvider"])
    plain = session.run(["counterfactual"], {"image": images, "target": np.array([-1, -1, -1])})[0]
    assert abs(opened.run(images).counterfactual - plain).max() <= 1.5 / 255


@pytest.mark.slow
def test_auto_takes_the_file_where_it_was_measured_faster(engine: Engine, whole: Path, tmp_path: Path) -> None:
    config = Config(speed="fast")
    auto = Engine.from_pack("digits", config=config, store=tmp_path, device="cpu")
    assert auto.runtime_choice(1).runtime == "eager"
    settings = auto.settings(config)
    auto.whole_runs.keep(settings, whole / MODEL, {"predictions_equal": 1.0})
    assert auto.runtime_choice(1).runtime == "eager"  # there, and not measured
    measure_whole(auto, config)
    assert auto.whole_runs.measurements(settings).keys() >= {"1", "2", "4"}
    for slots in (2, 4):  # of three samples one is skipped
        auto.whole_runs.remember(settings, slots, {STEPS: 0.4, NAME: 0.1})
    auto.whole_runs.remember(settings, 8, {STEPS: 0.4, NAME: 0.5})
    assert auto.runtime_choice(3).runtime == NAME
    assert "steps 400.0 ms, whole-run 100.0 ms" in auto.runtime_choice(3).why
    assert auto.runtime_choice(7).runtime == "eager"

    images = Pack("digits").samples("test", count=3).images
    targets = ["runner-up", int(engine.probabilities(images[1:2]).argmax()), 7]
    by_steps = engine.counterfactual(images, targets, config=config)
    got = Engine.from_pack("digits", config=config, store=tmp_path, device="cpu").counterfactual(images, targets)
    assert [p["runtime"] for p in got.provenance] == [NAME] * 3
    assert got.errors == by_steps.errors
    assert torch.equal(got.flipped, by_steps.flipped)
    assert torch.equal(got.prediction, by_steps.prediction)
    assert (got.images - as_saved(by_steps.images)).abs().max() < 1.5 / 255
    assert (got.kept_fraction - by_steps.kept_fraction).abs().nan_to_num().max() < 0.02
    for options in ({"whole": False}, {"on_step": lambda *_: None}, {"budget_s": 100.0}):
        stepwise = auto.counterfactual(images, targets, **options)
        assert stepwise.provenance[0]["runtime"] == "eager"
        assert torch.equal(stepwise.images, by_steps.images)
    named = Engine.from_pack("digits", config=config, store=tmp_path, runtime="eager", device="cpu")
    assert torch.equal(named.counterfactual(images, targets).images, by_steps.images)
    other = auto.counterfactual(images, targets, config=[config, config, Config(speed="fast", class_scale=3.0)])
    assert other.provenance[0]["runtime"] == "eager"


# The page


@pytest.fixture(scope="module")
def page(whole: Path) -> Path:
    if CHROMIUM is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which fetches onnxruntime-web")
    from counterlens.engine.core.whole_run import page_card

    engine = Engine.from_pack("digits", runtime="eager", device="cpu")
    card = json.loads((whole / CARD).read_text()) | {"page": page_card(engine, VERSION) | {"saliency": True}}
    (whole / CARD).write_text(json.dumps(card))
    pack = Pack("digits")
    adapter = pack_adapter(pack, "clean", engine.classifier)
    evidence = export_saliency(adapter, whole / "map", baseline=pack.mean_colour, pack=pack)
    for name in (SALIENCY, card_of(SALIENCY)):
        shutil.copy(whole / "map" / name, whole)
    runtime, cards = web_runtime(), {CARD: card, card_of(SALIENCY): evidence}
    write_page(whole, cards, runtime, single=False)
    (single,) = write_page(whole, cards, runtime, single=True)
    assert single.stat().st_size <= 18e6
    return whole


@pytest.fixture
def served(page: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(page))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one file", "folder"])
def test_the_page_answers_offline_and_says_nothing_on_the_console(page: Path, served: str, kind: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    url = (page / "counterfactual.html").as_uri() if kind == "one file" else served
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 390, "height": 844}, offline=kind == "one file")
        tab = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(url)
        tab.wait_for_selector("body[data-answers]", timeout=60_000)
        first = tab.inner_text("#answer")
        tab.get_by_role("button", name="3", exact=True).press("Enter")  # the keyboard does
        tab.wait_for_selector("body[data-answers='2']", timeout=20_000)
        then = tab.inner_text("#answer")
        assert "says 3" in then or "still says" in then
        assert then != first
        tab.wait_for_selector("body[data-maps]", timeout=20_000)
        assert "make it 0" in tab.inner_text("#worth").replace("\u00a0", " ")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert said == []
    assert [u for u in asked if not u.startswith(("file:", "blob:", "data:", served))] == []
