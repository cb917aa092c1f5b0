"""The networks that counterfactual metrics of the literature look through: what each is given, and where it is from.

An entry's `prepare` is the convention of the code that published numbers come from; the network itself is a file of the
user's (`runtime.encoders.open_encoder`), or any function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..models.preprocessing import resampling_matrix


@dataclass(frozen=True)
class Encoder:
    """A network of the literature.

    Attributes:
        name: of the option `--encoder NAME=FILE`.
        about: which network.
        takes: what its file is given, [B, 3, h, w] float32. gives: what it returns.
        source: where its weights are.
        prepare: from images [B, 3, H, W] in [0, 1], RGB, to that.
    """

    name: str
    about: str
    takes: str
    gives: str
    source: str
    prepare: Callable[[Tensor], Tensor]


def inception(images: Tensor) -> Tensor:
    """As pytorch-fid: bilinear to 299x299 without antialiasing, then [-1, 1]."""
    return 2 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) - 1


def vggface2(images: Tensor) -> Tensor:
    """As VGGFace2's models: Pillow's bilinear to 224x224 in 8 bits, BGR from 0 to 255, less the data's mean colour."""
    rows, columns = (resampling_matrix(side, 224).to(images) for side in images.shape[2:])
    levels = 255 * images
    for resized in (lambda x: x @ columns.T, lambda x: rows @ x):  # Pillow rounds after each
        levels = resized(levels).add(0.5).floor().clamp(0, 255)
    mean = images.new_tensor([91.4953, 103.8827, 131.0912]).view(3, 1, 1)  # of blue, green and red
    return levels[:, [2, 1, 0]] - mean


def imagenet(images: Tensor) -> Tensor:
    """ImageNet's mean and deviation, at the images' own size."""
    mean, deviation = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / deviation


def signed(images: Tensor) -> Tensor:
    """[-1, 1], at the images' own size."""
    return 2 * images - 1


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder(
            "inception", "FID's Inception-v3, last pooling", "299x299, [-1, 1]", "[B, 2048]",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            inception,
        ),
        Encoder(
            "vggface2", "ResNet-50 trained on MS1M and tuned on VGGFace2 (resnet50_ft), last pooling",
            "224x224, BGR, 0 to 255 less the mean", "[B, 2048]",
            "https://github.com/cydonia999/VGGFace2-pytorch "
            "(https://drive.google.com/open?id=1A94PAAnwk6L7hXdBXLFosB_s0SzEhAFU)", vggface2,
        ),
        Encoder(
            "simsiam", "ResNet-50 of SimSiam (100 epochs, batches of 256) with its projector",
            "the images' own size, ImageNet's mean and deviation", "[B, 2048]",
            "https://dl.fbaipublicfiles.com/simsiam/models/100ep-256bs/pretrain/checkpoint_0099.pth.tar", imagenet,
        ),
        Encoder(
            "oracle", "oracle of CelebA's 40 attributes", "the images' own size, [-1, 1]", "[B, 40] probabilities",
            "CelebA-HQ: checkpoints_oracle_attribute.tar.gz of https://github.com/valeoai/STEEX/releases; "
            "CelebA: https://huggingface.co/guillaumejs2403/DiME", signed,
        ),
        Encoder(
            "lpips", "LPIPS with VGG-16", "two batches of the images' own size, [-1, 1]", "[B]",
            "pip install lpips torchvision: lpips.LPIPS(net='vgg')", signed,
        ),
    )
}  # fmt: skip
