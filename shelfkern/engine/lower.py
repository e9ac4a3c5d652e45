"""From modules to a plan: each block type has its own fused form. No tracing.

A module is lowered by its exact type, since a subclass may compute something else; the fused training blocks
are, in eval mode, equivalent to their plain base classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import blocks, shelf
from ..nn.backbone import BasicBlock, Bottleneck, ResNet
from ..nn.fused import plain_type
from ..nn.shelfnet import ShelfNet
from . import plan as p
from .fold import fold_batch_norm


class Lowering:
    """Collects steps while the modules are walked in the order of their forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[p.Step] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._count = 0

    def value(self, channels: int, stride: int | None) -> p.Value:
        """A new value, numbered in the order of creation."""
        self._count += 1
        return p.Value(self._count - 1, channels, stride)

    def name(self, module: nn.Module) -> str:
        """Dotted name of a module inside the model."""
        return self._names[module]

    def emit(self, step: p.Step) -> p.Value:
        """Appends a step; returns its output."""
        self.steps.append(step)
        return step.output

    def lower(self, module: nn.Module, *inputs: Any) -> Any:
        """Lowers a module by its type.

        Raises:
            TypeError: its type has no fused form.
        """
        self.expect(module, *_RULES)
        return _RULES[plain_type(module)](self, module, *inputs)

    def expect(self, module: nn.Module, *types: type[nn.Module]) -> None:
        """Raises TypeError unless the module's type is exactly one of these."""
        if plain_type(module) not in types:
            kind = type(module).__qualname__
            raise TypeError(f"model has a {kind} at {self.name(module)!r}, which has no fused form")

    def expect_geometry(self, module: nn.Module, **needed: Any) -> None:
        """Raises TypeError unless attributes of a convolution or a pool are as the fused form has them."""
        for attribute, value in needed.items():
            found = getattr(module, attribute)
            if found != value:
                kind, name = type(module).__qualname__, self.name(module)
                has = f"model has a {kind} at {name!r} whose {attribute} is {found!r}"
                raise TypeError(f"{has}, which has no fused form: it must be {value!r}")

    def expect_conv(self, conv: nn.Conv2d, stride: int, kernel: int) -> None:
        """Raises TypeError unless it is a plain convolution that pads half its kernel."""
        self.expect(conv, nn.Conv2d)
        size = dict(kernel_size=(kernel, kernel), stride=(stride, stride), padding=(kernel // 2,) * 2)
        self.expect_geometry(conv, **size, dilation=(1, 1), groups=1, padding_mode="zeros")

    def conv(
        self,
        conv: nn.Conv2d,
        bn: nn.Module | None,
        act: nn.Module | p.Activation,
        x: p.Value | None,
        residual: p.Value | None = None,
        skip: p.Value | None = None,
    ) -> p.Value:
        """act(bn(conv(x)) + residual) + skip."""
        stride = conv.stride[0]
        self.expect_conv(conv, stride, conv.kernel_size[0])
        scale, shift = _affine(conv, bn)
        inputs = tuple(v for v in (x, residual, skip) if v is not None)
        source_stride = 1 if x is None or x.stride is None else x.stride
        return self.emit(
            p.Conv(
                self.name(conv),
                inputs,
                self.value(conv.out_channels, source_stride * stride),
                _float(conv.weight),
                scale,
                shift,
                stride,
                _activation(act),
                residual is not None,
                skip is not None,
            )
        )


def lower(model: ShelfNet) -> p.Plan:
    """The plan of a ShelfNet's scores in eval mode, before the final resize.

    Raises:
        TypeError: a module has no fused form or has hooks, or blocks do not fit each other.
    """
    _refuse_hooks(model)
    lowering = Lowering(model)
    lowering.expect(model, ShelfNet)
    features = lowering.lower(model.backbone, model.config.levels)
    levels = lowering.lower(model.shelf, features)
    lowering.lower(model.head, levels[0])
    plan = p.Plan(tuple(lowering.steps), model.config.num_classes, model.config.extents)
    try:
        plan.check()
    except ValueError as error:
        raise TypeError(f"model has no fused form, its blocks do not fit each other: {error}") from error
    return plan


def _refuse_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise TypeError(
                f"model has forward hooks at {name!r}, which a plan cannot run: remove them first"
            )


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)


def _affine(conv: nn.Conv2d, bn: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    if bn is not None:
        return fold_batch_norm(bn, conv.bias)
    return None, None if conv.bias is None else _float(conv.bias)


def _activation(act: nn.Module | p.Activation) -> p.Activation:
    if isinstance(act, p.Activation):
        return act
    if type(act) is nn.ReLU:
        return p.Activation(0.0)
    if type(act) is nn.LeakyReLU:
        return p.Activation(act.negative_slope)
    raise TypeError(f"model has the activation {act}, it may be ReLU or LeakyReLU")


NONE, RELU = p.Activation(None), p.Activation(0.0)


def _resnet(lowering: Lowering, module: ResNet, levels: int) -> list[p.Value]:
    """Features of the last `levels` strides."""
    pool = module.maxpool
    lowering.expect(pool, nn.MaxPool2d)
    lowering.expect_geometry(pool, kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)
    if levels == 5:
        first = lowering.conv(module.conv1, module.bn1, module.act, None)
        pooled = p.MaxPool(lowering.name(module.maxpool), (first,), lowering.value(first.channels, 4))
        features = [first]
        x = lowering.emit(pooled)
    else:
        features = []
        x = _stem(lowering, module)
    for stage in module.stages:
        for block in stage.children():
            x = lowering.lower(block, x)
        features.append(x)
    return features[-levels:]


def _stem(lowering: Lowering, module: ResNet) -> p.Value:
    lowering.expect_conv(module.conv1, 2, 7)
    scale, shift = fold_batch_norm(module.bn1)
    output = lowering.value(module.conv1.out_channels, 4)
    name = lowering.name(module.conv1)
    return lowering.emit(
        p.Stem(name, (), output, _float(module.conv1.weight), scale, shift, _activation(module.act))
    )


def _shortcut(lowering: Lowering, block: BasicBlock | Bottleneck, x: p.Value) -> p.Value:
    if block.downsample is None:
        return x
    conv, bn = block.downsample
    return lowering.conv(cast(nn.Conv2d, conv), bn, NONE, x)


def _basic_block(lowering: Lowering, block: BasicBlock, x: p.Value) -> p.Value:
    shortcut = _shortcut(lowering, block, x)
    h = lowering.conv(block.conv1, block.bn1, block.act, x)
    return lowering.conv(block.conv2, block.bn2, block.relu, h, shortcut)


def _bottleneck(lowering: Lowering, block: Bottleneck, x: p.Value) -> p.Value:
    shortcut = _shortcut(lowering, block, x)
    h = lowering.conv(block.conv1, block.bn1, block.act, x)
    h = lowering.conv(block.conv2, block.bn2, block.act, h)
    return lowering.conv(block.conv3, block.bn3, block.relu, h, shortcut)


def _conv_bn_act(lowering: Lowering, block: blocks.ConvBNAct, x: p.Value) -> p.Value:
    return lowering.conv(block.conv, block.bn, block.act, x)


def _shared_block(lowering: Lowering, block: blocks.SharedBlock, x: p.Value) -> p.Value:
    lowering.expect_conv(block.conv, 1, 3)
    scale1, shift1 = fold_batch_norm(block.bn1, block.conv.bias)
    scale2, shift2 = fold_batch_norm(block.bn2, block.conv.bias)
    step = p.SharedBlockStep(
        lowering.name(block),
        (x,),
        lowering.value(x.channels, x.stride),
        _float(block.conv.weight),
        scale1,
        shift1,
        scale2,
        shift2,
        _activation(block.act),
        lowering.value(x.channels, x.stride),
        skip=plain_type(block) is blocks.EntryBlock,
    )
    return lowering.emit(step)


def _attention_refinement(
    lowering: Lowering, block: blocks.AttentionRefinement, x: p.Value
) -> tuple[p.Value, p.Value]:
    """The features and their gate: the merge multiplies them while it upsamples."""
    x = lowering.lower(block.features, x)
    lowering.expect_conv(block.gate_conv, 1, 1)
    scale, shift = fold_batch_norm(block.gate_bn)
    weight = _float(block.gate_conv.weight).flatten(1)
    gate = lowering.value(x.channels, None)
    name = lowering.name(block.gate_conv)
    return x, lowering.emit(p.AttentionGate(name, (x,), gate, weight, scale, shift))


def _attention_merge(lowering: Lowering, block: blocks.AttentionMerge, x: p.Value, skip: p.Value) -> p.Value:
    x, gate = lowering.lower(block.refine, x)
    merged = lowering.value(skip.channels, skip.stride)
    x = lowering.emit(p.UpsampleAdd(lowering.name(block), (x, skip, gate), merged))
    return lowering.lower(block.fuse, x)


def _deconv_merge(lowering: Lowering, block: blocks.DeconvMerge, x: p.Value, skip: p.Value) -> p.Value:
    deconv = block.deconv
    lowering.expect(deconv, nn.ConvTranspose2d)
    size = dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), dilation=(1, 1))
    lowering.expect_geometry(deconv, **size, groups=1)
    merged = lowering.value(skip.channels, skip.stride)
    name = lowering.name(deconv)
    bias = deconv.weight.new_zeros(deconv.out_channels) if deconv.bias is None else deconv.bias
    step = p.DeconvAdd(name, (x, skip), merged, _float(deconv.weight), _float(bias))
    return lowering.lower(block.block, lowering.emit(step))


def _downsample(
    lowering: Lowering, block: blocks.Downsample, x: p.Value, skip: p.Value | None = None
) -> p.Value:
    return lowering.conv(block.conv, None, RELU, x, skip=skip)


def _up_column(lowering: Lowering, column: shelf.UpColumn, levels: list[p.Value]) -> list[p.Value]:
    x = levels[-1] if column.bottom is None else lowering.lower(column.bottom, levels[-1])
    out = [x]
    for merge, skip in zip(column.merges, levels[-2::-1], strict=True):
        x = lowering.lower(merge, x, skip)
        out.append(x)
    return out[::-1]


def _down_column(lowering: Lowering, column: shelf.DownColumn, levels: list[p.Value]) -> list[p.Value]:
    x = lowering.lower(column.blocks[0], lowering.lower(column.entry, levels[0]))
    out = [x]
    for block, down, skip in zip(column.blocks[1:], column.downs[:-1], levels[1:-1], strict=True):
        x = lowering.lower(block, lowering.lower(down, x, skip))
        out.append(x)
    out.append(lowering.lower(column.bottom, lowering.lower(column.downs[-1], x)))
    return out


def _shelf(lowering: Lowering, module: shelf.Shelf, features: list[p.Value]) -> list[p.Value]:
    levels = features
    if module.laterals is not None:
        pairs = zip(module.laterals, features, strict=True)
        levels = [lowering.lower(lateral, x) for lateral, x in pairs]
    for column in module.columns:
        levels = lowering.lower(column, levels)
    return levels


def _linear_head(lowering: Lowering, head: blocks.LinearHead, x: p.Value) -> p.Value:
    return lowering.conv(head.classify, None, NONE, x)


def _conv_head(lowering: Lowering, head: blocks.ConvHead, x: p.Value) -> p.Value:
    return lowering.conv(head.classify, None, NONE, lowering.lower(head.features, x))


_RULES: dict[type[nn.Module], Callable[..., Any]] = {
    ResNet: _resnet,
    BasicBlock: _basic_block,
    Bottleneck: _bottleneck,
    blocks.ConvBNAct: _conv_bn_act,
    blocks.SharedBlock: _shared_block,
    blocks.EntryBlock: _shared_block,
    blocks.AttentionRefinement: _attention_refinement,
    blocks.AttentionMerge: _attention_merge,
    blocks.DeconvMerge: _deconv_merge,
    blocks.Downsample: _downsample,
    blocks.LinearHead: _linear_head,
    blocks.ConvHead: _conv_head,
    shelf.UpColumn: _up_column,
    shelf.DownColumn: _down_column,
    shelf.Shelf: _shelf,
}
