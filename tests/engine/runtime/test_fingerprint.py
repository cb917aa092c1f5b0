"""Everything that decides the numbers of a compiled step is in its key, and nothing else: equal models are equal."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from counterlens.engine.config import StepOptions
from counterlens.engine.models.image_classifiers import wrap_classifier
from counterlens.engine.models.tiny import LatentResolutionDecoder, TinyDecoder
from counterlens.engine.packs.architectures import StridedClassifier
from counterlens.engine.runtime.artefacts import key_of
from counterlens.engine.runtime.fingerprint import fingerprint
from counterlens.engine.runtime.spec import Spec

LABELS = [str(i) for i in range(10)]


class Net(nn.Module):
    """A classifier of 16x16 pixels; everything a test changes is given."""

    def __init__(self, act: Any = None, temperature: Any = 1.0, size: int = 3, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.temperature = act or nn.ReLU(), temperature
        self.conv, self.head = nn.Conv2d(3, 8, size, padding=size // 2), nn.Linear(8, 10)
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3))) * self.temperature


class Other(Net):
    """The same weights and attributes, another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).amax((2, 3))) * self.temperature


def closure(power: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.relu() ** power


def with_default(x: Tensor, power: float = 2.0) -> Tensor:
    return x.relu() ** power


def other_default(power: float) -> Callable[..., Tensor]:
    function = copy.copy(with_default)
    return functools.partial(function, power=power)


class Activation:
    """A callable object, as transformers' are."""

    __slots__ = ("slope",)

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


def hooked(register: str, by: float) -> Net:
    net = Net()
    getattr(net.conv, register)(lambda m, x, out=None: by * (x[0] if out is None else out))
    return net


def patched(by: float) -> Net:
    net = Net()
    net.head.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight) * by, net.head)
    return net


def normed(name: str) -> Net:
    net = Net()
    kinds = {"weight": nn.utils.parametrizations.weight_norm, "spectral": nn.utils.parametrizations.spectral_norm}
    kinds[name](net.conv)
    return net


class Clamp(nn.Module):
    """A parametrization of the user's own."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, w: Tensor) -> Tensor:
        return w.clamp(-self.most, self.most)


def clamped(most: float) -> Net:
    net = Net()
    nn.utils.parametrize.register_parametrization(net.conv, "weight", Clamp(most))
    return net


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "slope": (lambda: Net(nn.LeakyReLU(0.1)), lambda: Net(nn.LeakyReLU(0.2))),
    "kind of activation": (lambda: Net(nn.ReLU()), lambda: Net(nn.SiLU())),
    "approximation": (lambda: Net(nn.GELU()), lambda: Net(nn.GELU("tanh"))),
    "negative slope of a function": (lambda: Net(closure(1.0)), lambda: Net(closure(2.0))),
    "function of torch": (lambda: Net(torch.relu), lambda: Net(torch.tanh)),
    "lambda": (lambda: Net(lambda x: x.relu()), lambda: Net(lambda x: x.sigmoid())),
    "number in a lambda": (lambda: Net(lambda x: x.relu() * 2), lambda: Net(lambda x: x.relu() * 3)),
    "keyword of a partial": (lambda: Net(other_default(1.0)), lambda: Net(other_default(2.0))),
    "slot of an object": (lambda: Net(Activation(0.1)), lambda: Net(Activation(0.2))),
    "bound method": (lambda: Net(Activation(0.1).__call__), lambda: Net(Activation(0.3).__call__)),
    "plain number": (lambda: Net(temperature=1.0), lambda: Net(temperature=2.0)),
    "plain tensor": (lambda: Net(temperature=torch.tensor(1.0)), lambda: Net(temperature=torch.tensor(2.0))),
    "tensors in a list": (lambda: Net(extra=[torch.ones(2)]), lambda: Net(extra=[torch.zeros(2)])),
    "string": (lambda: Net(pooling="mean"), lambda: Net(pooling="max")),
    "dict": (lambda: Net(options={"a": 1}), lambda: Net(options={"a": 2})),
    "padding": (lambda: nn.Conv2d(3, 8, 3, padding=1), lambda: nn.Conv2d(3, 8, 3, padding=2)),
    "padding mode": (lambda: nn.Conv2d(3, 8, 3), lambda: nn.Conv2d(3, 8, 3, padding_mode="circular")),
    "stride": (lambda: nn.Conv2d(3, 8, 3), lambda: nn.Conv2d(3, 8, 3, stride=2)),
    "upsampling": (lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "scale factor": (lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=3)),
    "eps": (lambda: nn.BatchNorm2d(8), lambda: nn.BatchNorm2d(8, eps=1e-3)),
    "groups of a norm": (lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(4, 8)),
    "ceil mode": (lambda: nn.AvgPool2d(3), lambda: nn.AvgPool2d(3, ceil_mode=True)),
    "forward of a subclass": (Net, Other),
    "forward of an instance": (lambda: patched(1.0), lambda: patched(2.0)),
    "forward hook": (Net, lambda: hooked("register_forward_hook", 1.0)),
    "number in a hook": (lambda: hooked("register_forward_hook", 1.0), lambda: hooked("register_forward_hook", 2.0)),
    "pre-hook": (Net, lambda: hooked("register_forward_pre_hook", 1.0)),
    "parametrization": (lambda: normed("weight"), lambda: normed("spectral")),
    "number in a parametrization": (lambda: clamped(1.0), lambda: clamped(0.5)),
    "order of parts": (lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), lambda: nn.Sequential(nn.Tanh(), nn.ReLU())),
    "tied weights": (
        lambda: nn.Sequential(*[nn.Linear(3, 3, bias=False)] * 2),
        lambda: nn.Sequential(*(copy.deepcopy(nn.Linear(3, 3, bias=False)) for _ in range(2))),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_weights_do_not_tell_changes_it(name: str) -> None:
    prints = [[fingerprint(m, hashed=[m]) for m in (make(), make())] for make in CHANGES[name]]
    assert prints[0][0] == prints[0][1], "equal models"
    assert prints[1][0] == prints[1][1], "equal models"
    assert prints[0][0] != prints[1][0]


PREPROCESSING: dict[str, dict[str, Any]] = {
    "mean": {"mean": (0.5, 0.4, 0.3)},
    "std": {"std": (0.5, 0.4, 0.3)},
    "resize": {"resize": 24, "crop": 16},
    "crop": {"resize": 32, "crop": 16},
    "interpolation": {"resize": 24, "crop": 16, "interpolation": "bicubic"},
}


def diffusion_changes() -> dict[str, Callable[[Any], None]]:
    def alphas(d: Any) -> None:
        d.alphas_cumprod = d.alphas_cumprod**1.1

    def scaling(d: Any) -> None:
        d.vae.register_to_config(scaling_factor=d.vae.config.scaling_factor * 2)

    def null(d: Any) -> None:
        d.null_class = 0

    def classes(d: Any) -> None:
        d.classes = d.classes.flip(0)

    def new_attribute(d: Any) -> None:
        d.latents_mean = torch.full((1, 4, 1, 1), 0.1)

    def prediction(d: Any) -> None:
        d.prediction = "v_prediction"

    def unet_config(d: Any) -> None:
        d.unet.register_to_config(flip_sin_to_cos=not d.unet.config.flip_sin_to_cos)

    def labels(d: Any) -> None:
        d.labels = d.labels[::-1]

    def code(d: Any) -> None:
        inner = d.predict_noise
        d.predict_noise = lambda z, t, c: -inner(z, t, c)

    changes = (alphas, scaling, null, classes, new_attribute, prediction, unet_config, labels, code)
    return {change.__name__: change for change in changes}


@pytest.mark.parametrize("name", diffusion_changes())
def test_the_step_of_another_diffusion_model_has_another_key(tiny: Any, name: str) -> None:
    diffusion, classifier = tiny
    other = copy.deepcopy(diffusion)
    assert key_of(Spec(diffusion, classifier), "onnx") == key_of(Spec(other, classifier), "onnx")
    diffusion_changes()[name](other)
    for what in ("guided-step", "unet", "vae-decoder"):
        assert Spec(diffusion, classifier, what=what).key("onnx") != Spec(other, classifier, what=what).key("onnx")


def test_the_step_of_another_preprocessing_has_another_key(tiny: Any) -> None:
    net = Net().eval()
    keys = [
        str(Spec(tiny[0], wrap_classifier(net, tiny[0].labels, image_size=16, **options)).key("onnx"))
        for options in ({}, *PREPROCESSING.values(), {"output": "sigmoid"})
    ]
    assert len(set(keys)) == len(keys)


def test_the_guidance_decoder_is_in_the_key(tiny: Any) -> None:
    torch.manual_seed(0)
    module = LatentResolutionDecoder(4, 8, 1, 4)
    other = copy.deepcopy(module)
    other.factor = 2
    with_tiny = StepOptions(guidance_decoder="tiny")
    specs = [
        Spec(*tiny),
        *(Spec(*tiny, options=with_tiny, decoder=TinyDecoder(m, "small", 4)) for m in (module, other)),
    ]
    latent = StepOptions(guidance_decoder="tiny", distance="latent")
    specs.append(Spec(*tiny, options=latent, decoder=TinyDecoder(module, "small", 4)))
    assert len({str(s.key("onnx")) for s in specs}) == 4


def test_what_decides_nothing_is_not_in_it() -> None:
    net = Net().eval()
    before = fingerprint(net, hashed=[net])
    with torch.no_grad():
        net(torch.rand(1, 3, 16, 16))
    net.train().requires_grad_(False)
    assert fingerprint(net, hashed=[net]) == before
    assert fingerprint(copy.deepcopy(net), hashed=[net]) != before  # its weights are not those that were hashed
    unet = UNet2DConditionModel.from_config(
        {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8,
         "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": 4}
    )  # fmt: skip
    here = fingerprint(unet, hashed=[unet])
    unet.register_to_config(_name_or_path="/another/folder")
    assert fingerprint(unet, hashed=[unet]) == here


def test_the_code_of_a_packs_classifier_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands beside the pack, outside of what `code_version` hashes."""
    net = StridedClassifier(width=8)
    before = fingerprint(net, hashed=[net])
    monkeypatch.setattr(StridedClassifier, "forward", lambda self, image: self.head(self.features(image).mean((2, 3))))
    assert fingerprint(net, hashed=[net]) != before


def test_copying_a_model_of_ones_own_class_leaves_it_alone() -> None:
    class Own(nn.Module):
        pass

    net = Own()
    before = fingerprint(net, hashed=[net])
    copied = copy.deepcopy(net)
    assert fingerprint(net, hashed=[net]) == fingerprint(copied, hashed=[copied]) == before


def test_locks_cycles_and_shared_objects() -> None:
    def make() -> Net:
        net = Net(lock=threading.Lock(), random=torch.Generator(), names={"b", "a", "c"})
        net.parent = [net]
        return net

    first, second = make(), make()
    assert fingerprint(first, hashed=[first]) == fingerprint(second, hashed=[second])


USER = """
import functools, torch
from torch import nn
from mine_helpers import Block, scale
LEVEL = {level}
def helper(x):
    return scale(x) * LEVEL
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.names = Block(), {{"x", "y", "zz"}}
        self.act = lambda x: x.relu()
    @torch.no_grad()
    def watched(self, x):
        return x + {inner}
    def forward(self, x):
        return self.act(helper(self.block(x)))
"""
HELPERS = """
from torch import nn
class Base(nn.Module):
    def forward(self, x):
        return x + {base}
class Block(Base):
    pass
def scale(x):
    def inner(y):
        return y * {factor}
    return inner(x)
"""
RUN = """
import importlib, json, os, sys
import counterlens.engine.runtime.fingerprint as fingerprint

for folder in json.loads(sys.argv[1]):
    if not os.fork():  # torch and the package are there, and nothing of the user's
        sys.path.insert(0, folder)
        net = importlib.import_module("mine").Net()
        print(fingerprint.fingerprint(net, hashed=[net]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def printed(folders: list[Path], seed: str) -> list[str]:
    """What is said of the user's files in each folder, by a process of its own for each."""
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps([*map(str, folders)])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_is_the_same_in_every_process_and_follows_the_users_own_files(tmp_path: Path) -> None:
    folders = []
    for changed in ("nothing", "nothing, elsewhere", "level", "inner", "base", "factor"):
        numbers = {name: 1 + (name == changed) for name in ("level", "inner", "base", "factor")}
        folders.append(tmp_path / changed)
        folders[-1].mkdir()
        (folders[-1] / "mine.py").write_text(USER.format(**numbers))
        (folders[-1] / "mine_helpers.py").write_text(HELPERS.format(**numbers))
    first, elsewhere, *others = printed(folders, seed="0")
    assert printed(folders[:1], seed="7") == [first]
    assert elsewhere == first
    assert len({first, *others}) == 5
