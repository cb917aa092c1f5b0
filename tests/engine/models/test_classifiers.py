"""Classifiers from folders and modules: the same numbers as their own libraries, left as they were, refused clearly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.guidance.pullback import pullback
from counterlens.engine.models.files import read_tensors
from counterlens.engine.models.image_classifiers import open_classifier, wrap_classifier
from counterlens.engine.models.preprocessing import Preprocessing
from counterlens.engine.models.protocols import probabilities
from tests import tiny

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
SIZE = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("classifiers")
    saves = {"resnet": tiny.save_resnet, "vit": tiny.save_vit, "dino": tiny.save_dino, "clip": tiny.save_clip,
             "siglip": tiny.save_siglip}  # fmt: skip
    return {name: save(base / name) for name, save in saves.items()}


def pictures(count: int = 3) -> tuple[Tensor, list[Image.Image]]:
    """Smooth 8-bit images as tensors and as Pillow's."""
    # away from 0 and 1, where the processors clip what bicubic filters overshoot
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    x = nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1).mul(255).round()
    images = [Image.fromarray(i.permute(1, 2, 0).numpy().astype(np.uint8)) for i in x]
    return x / 255, images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box"])
@pytest.mark.parametrize("resize", [20, 47])
def test_resize_is_pillows(interpolation: str, resize: int) -> None:
    x, _ = pictures(1)
    made = Preprocessing(SIZE, resize=resize, crop=18, interpolation=interpolation)(x)[0]
    start = (resize - 18) // 2
    for channel, plane in zip(made, x[0], strict=True):
        resized = Image.fromarray(plane.numpy()).resize((resize, resize), Image.Resampling[interpolation.upper()])
        expected = torch.from_numpy(np.array(resized))[start : start + 18, start : start + 18]
        torch.testing.assert_close(channel, expected, rtol=1e-4, atol=1e-5)


def test_same_size_only_crops_and_normalises() -> None:
    x, _ = pictures()
    made = Preprocessing(SIZE, crop=30, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))(x)
    torch.testing.assert_close(made[:, 2], (x[:, 2, 1:31, 1:31] - 0.3) / 4)
    for wrong in ({"crop": 40}, {"mean": (0, 0)}, {"std": (1, 0, 1)}, {"interpolation": "sinc"}, {"resize": 0}):
        with pytest.raises(UsageError):
            Preprocessing(SIZE, **wrong)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_image_classification_folders_agree_with_transformers(folders, name: str) -> None:
    x, images = pictures()
    classifier = open_classifier(folders[name], image_size=SIZE)
    assert classifier.labels == tiny.LABELS
    processor = transformers.AutoImageProcessor.from_pretrained(folders[name])
    model = transformers.AutoModelForImageClassification.from_pretrained(folders[name]).eval()
    pixels = processor(images, return_tensors="pt").pixel_values
    ours = classifier.module.preprocessing(x)
    assert (ours - pixels).abs().max() < 3 / 255 / 0.22  # the processor rounds and clips to 8 bits, then normalises
    assert (ours - pixels).abs().mean() < 0.5 / 255 / 0.22
    torch.testing.assert_close(classifier.logits(x), model(ours).logits)
    p = probabilities(classifier, x)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    torch.testing.assert_close(classifier.log_prob(x, torch.tensor([1, 2, 3])).exp(), p[torch.arange(3), [1, 2, 3]])


def test_clip_is_softmax_of_100_cosines(folders) -> None:
    x, _ = pictures()
    classifier = open_classifier(folders["clip"], image_size=SIZE, labels=tiny.LABELS, prompts="pets")
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["clip"])
    prompts = [f"a photo of a {label}, a type of pet." for label in tiny.LABELS]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=classifier.module.preprocessing(x))
        logits = classifier.logits(x)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-4, atol=1e-3)
    cosine = expected.image_embeds @ expected.text_embeds.T
    torch.testing.assert_close(probabilities(classifier, x), (100 * cosine).softmax(1), rtol=1e-2, atol=1e-4)


def test_siglip_is_a_sigmoid_of_its_own(folders) -> None:
    x, _ = pictures()
    classifier = open_classifier(folders["siglip"], image_size=SIZE, labels=tiny.LABELS)
    model = transformers.SiglipModel.from_pretrained(folders["siglip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["siglip"])
    prompts = [f"a photo of a {label}." for label in tiny.LABELS]
    tokens = tokenizer(prompts, padding="max_length", max_length=48, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=tokens.input_ids, pixel_values=classifier.module.preprocessing(x)).logits_per_image
        torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-4, atol=1e-4)
        target = torch.tensor([4, 5, 6])
        torch.testing.assert_close(classifier.log_prob(x, target), expected.sigmoid()[torch.arange(3), target].log())
    assert classifier.link == "sigmoid"


@pytest.mark.parametrize("times", [1, 2, 4, 5])
def test_linear_heads_on_dino(tmp_path: Path, times: int) -> None:
    folder = tiny.save_dino(tmp_path / "dino", times)
    x, _ = pictures()
    head = folder / "head.safetensors"
    classifier = open_classifier(folder, image_size=SIZE, labels=tiny.LABELS, head=head)
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(classifier.module.preprocessing(x), output_hidden_states=True)
        last = [model.layernorm(h) for h in out.hidden_states[-4:]] if times > 3 else [out.last_hidden_state]
        parts = [h[:, 0] for h in last]
        if times in (2, 5):
            parts.append(out.last_hidden_state[:, 1:].mean(1))
        tensors = read_tensors(head)
        expected = torch.cat(parts, 1) @ tensors["linear.weight"].T + tensors["linear.bias"]
        torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-4, atol=1e-4)


def test_binary_logit_is_binary_cross_entropy(tmp_path: Path) -> None:
    folder = tiny.save_resnet(tmp_path / "young", labels=1)
    classifier = open_classifier(folder, image_size=SIZE, labels=["old", "young"])
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x, _ = pictures()
    y = torch.tensor([0, 1, 1])
    with torch.no_grad():
        logit = model(classifier.module.preprocessing(x)).logits[:, 0]
        expected = -nn.functional.binary_cross_entropy_with_logits(logit, y.float(), reduction="none")
        torch.testing.assert_close(classifier.log_prob(x, y), expected)
        torch.testing.assert_close(probabilities(classifier, x)[:, 1], logit.sigmoid())
    assert open_classifier(folder, image_size=SIZE).labels == ["not LABEL_0", "LABEL_0"]


def test_multi_label_models_use_sigmoids(tmp_path: Path) -> None:
    folder = tiny.save_resnet(tmp_path / "many")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    assert open_classifier(folder, image_size=SIZE).link == "sigmoid"


class Plain(nn.Module):
    """A user's own module: dropout, batch normalisation, left in training mode, one frozen layer, a hook."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.calls = 0
        self.conv.weight.requires_grad_(False)
        self.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean(dim=(2, 3))))


def test_a_users_module_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    module = Plain().train()
    module.head.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    grads = [p.requires_grad for p in module.parameters()]
    hooks = list(module._forward_hooks.values())
    classifier = wrap_classifier(module, tiny.LABELS, image_size=SIZE, resize=24)
    assert module.calls == 1
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == grads
    assert list(module._forward_hooks.values()) == hooks
    assert all(p.grad is None for p in module.parameters())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert classifier.labels == tiny.LABELS


@pytest.mark.parametrize("name", ["resnet", "vit", "dino", "clip", "siglip"])
def test_gradients_can_be_traced(folders, name: str) -> None:
    own = {} if name in ("resnet", "vit") else {"labels": tiny.LABELS}
    head = {"head": folders["dino"] / "head.safetensors"} if name == "dino" else {}
    classifier = open_classifier(folders[name], image_size=SIZE, **own, **head)

    def gradient(x: Tensor, target: Tensor) -> Tensor:
        value, pull = pullback(lambda x: classifier.log_prob(x, target), x)
        return pull(torch.ones_like(value))

    x, _ = pictures()
    graph = make_fx(gradient)(x, torch.tensor([1, 2, 3]))
    arguments = (x.flip(0), torch.tensor([9, 0, 4]))
    torch.testing.assert_close(graph(*arguments), gradient(*arguments), rtol=1e-3, atol=1e-5)
    leaf = arguments[0].clone().requires_grad_()
    expected = torch.autograd.grad(classifier.log_prob(leaf, arguments[1]).sum(), leaf)[0]
    torch.testing.assert_close(graph(*arguments), expected, rtol=1e-3, atol=1e-5)


class Breaks(nn.Module):
    """Ends the gradient in a chosen way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, Plain()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            x = x.detach()
        elif self.how == "uint8":
            x = (x * 255).to(torch.uint8).float() / 255
        elif self.how == "round":
            x = torch.round(x * 255) / 255
        elif self.how == "numpy":
            x = torch.from_numpy(x.numpy() * 2)
        elif self.how == "no_grad":
            with torch.no_grad():
                return self.inner(x)
        return self.inner(x)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("detach", r"ends at detach \(test_classifiers\.py, line \d+\)"),
        ("uint8", r"ends at to \(test_classifiers\.py"),
        ("round", r"zero everywhere; round \(test_classifiers\.py"),
        ("numpy", r"not differentiable: .*numpy"),
        ("no_grad", r"ends at .*under torch\.no_grad"),
    ],
)
def test_what_breaks_the_gradient_is_named(how: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^classifier: .*{words}"):
        wrap_classifier(Breaks(how), tiny.LABELS, image_size=SIZE)


def test_modules_that_do_not_fit_are_refused() -> None:
    for labels, module, words in [
        (["a", "b"], Plain(), r"^labels: 2 names for 10 logits"),
        (
            tiny.LABELS,
            nn.Sequential(nn.Flatten(), nn.Linear(300, 10)),
            r"^classifier: fails on an image.*preprocessing",
        ),
        (tiny.LABELS, nn.Identity(), r"^classifier: expected logits \[B, 10\], got \[1, 3, 32, 32\]"),
    ]:
        with pytest.raises(UsageError, match=words):
            wrap_classifier(module, labels, image_size=SIZE)
    mixed = Plain()
    mixed.head.half()
    with pytest.raises(UsageError, match="mix float16 and float32"):
        wrap_classifier(mixed, tiny.LABELS, image_size=SIZE)
    with pytest.raises(UsageError, match=r"^output:"):
        wrap_classifier(Plain(), tiny.LABELS, image_size=SIZE, output="logits")


class Returns(nn.Module):
    """What modules return instead of logits."""

    def __init__(self, how: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.how, self.inner = how, Plain()

    def forward(self, x: Tensor) -> object:
        return self.how(self.inner(x))


@pytest.mark.parametrize(
    ("how", "output", "words"),
    [
        (lambda x: x.softmax(1), "softmax", r"^classifier: .*probabilities .*leave the last softmax out"),
        (lambda x: x.double().softmax(1).float(), "softmax", r"^classifier: .*probabilities"),
        (lambda x: {"logits": x.softmax(1)}, "softmax", r"^classifier: .*probabilities"),
        (lambda x: x.sigmoid(), "sigmoid", r"^classifier: .*ends in a sigmoid.*leave the last sigmoid out"),
        (lambda x: x[:, :1].sigmoid(), "binary", r"^classifier: .*probabilities"),
        (lambda x: (x, x), "softmax", r"returns a tuple of \[1, 10\], \[1, 10\].*model\(x\)\[0\]"),
        (lambda x: [x], "softmax", r"returns a list of \[1, 10\]"),
        (lambda x: {"scores": x}, "softmax", r"returns a dict of 'scores'.*model\(x\)\['scores'\]"),
        (lambda x: None, "softmax", r"returns a NoneType"),
        (lambda x: (x, {"features": x}), "softmax", r"returns a tuple of \[1, 10\], dict"),
    ],
)
def test_what_is_no_logits_is_said(how: Callable[[Tensor], object], output: str, words: str) -> None:
    labels = ["no", "yes"] if output == "binary" else tiny.LABELS
    with pytest.raises(UsageError, match=words) as caught:
        wrap_classifier(Returns(how), labels, image_size=SIZE, output=output)
    assert "preprocessing" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how", [lambda x: x, lambda x: {"logits": x}, lambda x: x.log_softmax(1), lambda x: x.abs() / 1e3]
)
def test_logits_are_taken_wherever_they_are_named(how: Callable[[Tensor], object]) -> None:
    """Small positive logits are logits too."""
    assert wrap_classifier(Returns(how), tiny.LABELS, image_size=SIZE).labels == tiny.LABELS


def test_folders_that_do_not_fit_are_refused(folders, tmp_path: Path) -> None:
    for options, words in [
        ({"name": folders["clip"]}, r"^labels: CLIPModel is zero-shot"),
        ({"name": folders["dino"]}, r"^head: Dinov2Model has no classes"),
        ({"name": folders["dino"], "head": folders["dino"] / "head.safetensors"}, r"^labels: .*give 10 names"),
        ({"name": folders["vit"], "head": folders["dino"] / "head.safetensors"}, r"^head: .*of its own"),
        ({"name": folders["vit"], "labels": ["a"]}, r"^labels: 1 names for 10 logits"),
        ({"name": folders["clip"], "labels": ["a"], "prompts": "no place"}, r"^prompts:"),
        ({"name": folders["clip"], "labels": ["very " * 60]}, r"^prompts: the longest has \d+ tokens"),
        ({"name": tmp_path / "none"}, r"^classifier: .*neither a folder nor a hub id"),
    ]:
        with pytest.raises(UsageError, match=words):
            open_classifier(image_size=SIZE, **options)
    save_file({"weight": torch.zeros(10, 17), "bias": torch.zeros(10)}, tmp_path / "head.safetensors")
    with pytest.raises(UsageError, match=r"^head: 17 inputs are not 1, 2, 4 or 5 times the backbone's 16"):
        open_classifier(folders["dino"], image_size=SIZE, labels=tiny.LABELS, head=tmp_path / "head.safetensors")
    folder = tiny.save_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CounterlensError, match=r"preprocessor_config\.json"):
        open_classifier(folder, image_size=SIZE)
    tiny.save_processor(folder, "PerceiverImageProcessor", size={"height": 24, "width": 24})
    with pytest.raises(UsageError, match=r"^preprocessing: .*does more than"):
        open_classifier(folder, image_size=SIZE)


def test_torchvision_model_from_a_file(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision (the extra `torchvision`)")
    torch.manual_seed(0)
    module = models.get_model("resnet18", num_classes=10)
    save_file(module.state_dict(), tmp_path / "resnet18.safetensors")
    weights = tmp_path / "resnet18.safetensors"
    classifier = open_classifier("torchvision:resnet18", image_size=SIZE, labels=tiny.LABELS, weights=weights)
    x, _ = pictures()
    pixels = classifier.module.preprocessing(x)
    assert pixels.shape[2:] == (224, 224)
    torch.testing.assert_close(classifier.logits(x), classifier.module.module.eval()(pixels))
    with pytest.raises(UsageError, match="no model 'resnet0'"):
        open_classifier("torchvision:resnet0", image_size=SIZE)


def test_timm_model_from_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm (the extra `timm`)")
    module = timm.create_model("resnet10t", num_classes=10)
    save_file(module.state_dict(), tmp_path / "timm.safetensors")
    weights = tmp_path / "timm.safetensors"
    classifier = open_classifier("timm:resnet10t", image_size=SIZE, labels=tiny.LABELS, weights=weights)
    assert classifier.logits(pictures()[0]).shape == (3, 10)
    with pytest.raises(UsageError, match=r"^labels:"):
        open_classifier("timm:resnet10t", image_size=SIZE)


def test_temperature_of_clip_is_read_from_the_model(folders) -> None:
    classifier = open_classifier(folders["clip"], image_size=SIZE, labels=["a", "b"])
    assert math.isclose(classifier.module.scale, 100, rel_tol=1e-3)
