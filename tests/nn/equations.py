"""The four published networks written once more, as equations over the authors' tensor names.

Nothing here comes from the package: torch's functions, a state dict `p`, and the columns of the paper
(X1 .. X4 = level X in columns 1 to 4). Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def conv(p: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight, p.get(f"{name}.bias"), stride, weight.shape[2] // 2)


def plain_norm(p: State, name: str, x: Tensor) -> Tensor:
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"])


def inplace_norm(p: State, name: str, x: Tensor) -> Tensor:
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, p[f"{name}.weight"].abs() + 1e-5, p[f"{name}.bias"])


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.01)


def resize(x: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)


def resnet(p: State, root: str, x: Tensor, norm, act) -> list[Tensor]:
    """Features at strides 4, 8, 16, 32."""
    x = F.max_pool2d(act(norm(p, f"{root}bn1", conv(p, f"{root}conv1", x, 2))), 3, 2, 1)
    features = []
    for stage in range(1, 5):
        index = 0
        while f"{root}layer{stage}.{index}.conv1.weight" in p:
            stride = 2 if stage > 1 and index == 0 else 1
            x = residual(p, f"{root}layer{stage}.{index}.", x, stride, norm, act)
            index += 1
        features.append(x)
    return features


def residual(p: State, block: str, x: Tensor, stride: int, norm, act) -> Tensor:
    def conv_norm(i: int, y: Tensor, s: int = 1) -> Tensor:
        return norm(p, f"{block}bn{i}", conv(p, f"{block}conv{i}", y, s))

    if f"{block}conv3.weight" in p:
        y = conv_norm(3, act(conv_norm(2, act(conv_norm(1, x)), stride)))
    else:
        y = conv_norm(2, act(conv_norm(1, x, stride)))
    if f"{block}downsample.0.weight" in p:
        x = norm(p, f"{block}downsample.1", conv(p, f"{block}downsample.0", x, stride))
    return F.relu(y + x)


def shelfnet_50(p: State, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, presence logits, auxiliary scores of ShelfNet50 and 101."""

    def s(name: str, x: Tensor) -> Tensor:
        h = F.relu(plain_norm(p, f"{name}.bn1", conv(p, f"{name}.conv1", x)))
        return F.relu(plain_norm(p, f"{name}.bn2", conv(p, f"{name}.conv1", h)) + x)

    def lateral(i: int, x: Tensor) -> Tensor:
        return F.relu(plain_norm(p, f"head.bn{i}", conv(p, f"head.conv{i}", x)))

    def m(column: str, i: int, x: Tensor, skip: Tensor) -> Tensor:
        name = f"head.{column}.up_conv_list.{i}"
        up = F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], 2, 1, output_padding=1)
        return s(f"head.{column}.up_dense_list.{i}", up + skip)

    def down(i: int, x: Tensor) -> Tensor:
        return F.relu(conv(p, f"head.ladder.down_conv_list.{i}", x, 2))

    a0, b0, c0, d0 = resnet(p, "pretrained.", image, plain_norm, F.relu)
    a1, b1, c1, d1 = lateral(1, a0), lateral(2, b0), lateral(3, c0), lateral(4, d0)
    d2 = s("head.decoder.bottom", d1)
    c2 = m("decoder", 0, d2, c1)
    b2 = m("decoder", 1, c2, b1)
    a2 = m("decoder", 2, b2, a1)
    a3 = s("head.ladder.down_module_list.0", s("head.ladder.inconv", a2) + a2)
    b3 = s("head.ladder.down_module_list.1", down(0, a3) + b2)
    c3 = s("head.ladder.down_module_list.2", down(1, b3) + c2)
    d3 = s("head.ladder.bottom", down(2, c3))
    d4 = d3
    c4 = m("ladder", 0, d4, c3)
    b4 = m("ladder", 1, c4, b3)
    a4 = m("ladder", 2, b4, a3)

    presence = F.linear(d4.amax((2, 3)), p["head.selayer.weight"], p["head.selayer.bias"])
    h = F.relu(plain_norm(p, "auxlayer.conv5.1", conv(p, "auxlayer.conv5.0", c0)))
    aux = conv(p, "auxlayer.conv5.4", h)
    return resize(conv(p, "head.final", a4), image), presence, resize(aux, image)


def shelfnet_lw(p: State, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and the auxiliary scores at strides 16 and 32 of ShelfNet18-lw and 34-lw."""

    def conv_norm_act(name: str, x: Tensor) -> Tensor:
        return leaky(inplace_norm(p, f"{name}.bn", conv(p, f"{name}.conv", x)))

    def s(name: str, x: Tensor) -> Tensor:
        h = leaky(inplace_norm(p, f"{name}.bn1", conv(p, f"{name}.conv1", x)))
        return F.relu(plain_norm(p, f"{name}.bn2", conv(p, f"{name}.conv1", h)) + x)

    def lateral(i: int, x: Tensor) -> Tensor:
        return conv_norm_act(f"trans{i}", x) if f"trans{i}.conv.weight" in p else x

    def m(column: str, i: int, x: Tensor, skip: Tensor) -> Tensor:
        arm = f"{column}.up_conv_list.{i}"
        f = conv_norm_act(f"{arm}.conv", x)
        pooled = conv(p, f"{arm}.conv_atten", f.mean((2, 3), keepdim=True))
        gated = f * torch.sigmoid(inplace_norm(p, f"{arm}.bn_atten", pooled))
        up = gated.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return conv_norm_act(f"{column}.up_dense_list.{i}", up + skip)

    def down(i: int, x: Tensor) -> Tensor:
        return F.relu(conv(p, f"ladder.down_conv_list.{i}", x, 2))

    def head(name: str, x: Tensor) -> Tensor:
        return resize(conv(p, f"{name}.conv_out", conv_norm_act(f"{name}.conv", x)), image)

    _, b0, c0, d0 = resnet(p, "backbone.", image, inplace_norm, leaky)
    b1, c1, d1 = lateral(1, b0), lateral(2, c0), lateral(3, d0)
    d2 = s("decoder.bottom", d1)
    c2 = m("decoder", 0, d2, c1)
    b2 = m("decoder", 1, c2, b1)
    b3 = s("ladder.down_module_list.0", s("ladder.inconv", b2) + b2)
    c3 = s("ladder.down_module_list.1", down(0, b3) + c2)
    d3 = s("ladder.bottom", down(1, c3))
    d4 = d3
    c4 = m("ladder", 0, d4, c3)
    b4 = m("ladder", 1, c4, b3)
    return head("conv_out", b4), head("conv_out16", c4), head("conv_out32", d4)
