"""The blocks of a ShelfNet (arXiv 1811.11254, section 3.3), plain torch.nn.

Every block maps (N, C, H, W) tensors of any floating dtype and memory format to such tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def activation(negative_slope: float) -> nn.Module:
    """ReLU for a slope of 0, leaky ReLU otherwise."""
    return nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True)


class ConvBNAct(nn.Module):
    """act(bn(conv(x))): a convolution without bias, of stride 1, padded to keep the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, negative_slope: float) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation(negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class SharedBlock(nn.Module):
    """The shared-weights residual block S (paper 3.3): one 3x3 convolution used twice, two batch norms.

    h = dropout(act(bn1(conv(x)))), y = relu(bn2(conv(h)) + x).
    """

    def __init__(self, channels: int, dropout: float, negative_slope: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = activation(negative_slope)
        self.dropout = nn.Dropout2d(dropout)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.act(self.bn1(self.conv(x))))
        return F.relu(self.bn2(self.conv(h)) + x)


class EntryBlock(SharedBlock):
    """S(x) + x: the block through which the finest level enters a down column."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class AttentionRefinement(nn.Module):
    """ARM of the real-time models: features times a gate per channel.

    f = act(bn(conv3x3(x))), gate = sigmoid(bn(conv1x1(mean over H, W of f))), y = f * gate.
    """

    def __init__(self, in_channels: int, out_channels: int, negative_slope: float) -> None:
        super().__init__()
        self.features = ConvBNAct(in_channels, out_channels, 3, negative_slope)
        self.gate_conv = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.gate_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.gate_bn(self.gate_conv(pooled)))


class AttentionMerge(nn.Module):
    """Merge of the real-time models: act(bn(conv3x3(nearest_x2(ARM(x)) + skip)))."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, negative_slope: float) -> None:
        super().__init__()
        self.refine = AttentionRefinement(in_channels, out_channels, negative_slope)
        self.fuse = ConvBNAct(out_channels, out_channels, 3, negative_slope)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.fuse(F.interpolate(self.refine(x), scale_factor=2.0, mode="nearest") + skip)


class DeconvMerge(nn.Module):
    """Merge of ShelfNet50 and 101: S(deconv(x) + skip), a 3x3 transposed convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, negative_slope: float) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, 1, output_padding=1)
        self.block = SharedBlock(out_channels, dropout, negative_slope)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.deconv(x) + skip)


class Downsample(nn.Module):
    """relu(conv3x3 of stride 2, with bias): one level down inside a column."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class LinearHead(nn.Module):
    """Class scores of ShelfNet50 and 101: a 1x1 convolution with bias."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x)


class ConvHead(nn.Module):
    """Class scores of the real-time models: act(bn(conv3x3)), then a 3x3 convolution without bias."""

    def __init__(self, in_channels: int, width: int, num_classes: int, negative_slope: float) -> None:
        super().__init__()
        self.features = ConvBNAct(in_channels, width, 3, negative_slope)
        self.classify = nn.Conv2d(width, num_classes, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class BackboneHead(nn.Module):
    """Auxiliary scores of ShelfNet50 and 101, on the backbone's stride-16 features (training only)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = in_channels // 4
        self.features = ConvBNAct(in_channels, width, 3, negative_slope=0.0)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.dropout(self.features(x)))


class PresenceHead(nn.Module):
    """SE head of ShelfNet50 and 101: logits (N, classes) of each class being in the image."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x.amax((2, 3)))
