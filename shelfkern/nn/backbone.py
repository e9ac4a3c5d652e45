"""ResNet v1 backbones (He et al., arXiv 1512.03385), column 0 of a ShelfNet.

Parameter names are torchvision's, so its weights load unchanged. The real-time models of the paper
use leaky ReLU after the stem's and after each block's inner batch norms; `negative_slope` sets it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import activation

RESNET_STAGES = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x))."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, negative_slope: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = activation(negative_slope)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, negative_slope: float) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act = activation(negative_slope)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        name: one of `RESNET_STAGES`.
        width: channels of the stem and of the first stage's 3x3 convolutions (64 as published).
        negative_slope: of the leaky ReLU after inner batch norms; 0 is ReLU.
    """

    def __init__(self, name: str = "resnet18", width: int = 64, negative_slope: float = 0.0) -> None:
        super().__init__()
        if name not in RESNET_STAGES:
            raise ValueError(f"backbone is {name!r}, it may be one of {', '.join(RESNET_STAGES)}")
        kind, depths = RESNET_STAGES[name]
        block = BasicBlock if kind == "basic" else Bottleneck
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = activation(negative_slope)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = [width]
        for index, depth in enumerate(depths):
            stage_width, stride = width << index, 1 if index == 0 else 2
            blocks = [block(self.channels[-1], stage_width, stride, negative_slope)]
            out_channels = stage_width * block.expansion
            blocks += [block(out_channels, stage_width, 1, negative_slope) for _ in range(depth - 1)]
            setattr(self, f"layer{index + 1}", nn.Sequential(*blocks))
            self.channels.append(out_channels)

    @property
    def stages(self) -> list[nn.Module]:
        """The four stages, at strides 4, 8, 16 and 32."""
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution, its norm and activation: stride 2."""
        return self.act(self.bn1(self.conv1(x)))

    def pool(self, x: Tensor) -> Tensor:
        """Half the stem's rows and columns."""
        return self.maxpool(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features at strides 2, 4, 8, 16, 32 with `self.channels` channels."""
        features = [self.stem(x)]
        x = self.pool(features[0])
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def init_weights(module: nn.Module) -> None:
    """He initialisation (fan out) of every convolution, ones and zeros for norms, zeros for biases."""
    for m in module.modules():
        # On the meta device there is nothing to initialise, and trying to takes seconds of imports.
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and not m.weight.is_meta:
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
