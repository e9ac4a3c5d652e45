"""The blocks trained with fused ops, which take fewer passes over memory and save less for the gradient.

Each fused block is a subclass of its plain block, with the same parameters and names; in eval mode it runs
the plain block's forward. `fuse_for_training` changes the classes of a model's blocks in place.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.bn_act_conv_train import bn_act_conv_train
from ..ops.bn_act_dropout import bn_act_dropout
from ..ops.conv_train import conv_train
from ..ops.max_pool_train import max_pool_train
from ..ops.shared_block_train import shared_block_train
from .backbone import BasicBlock, Bottleneck, ResNet
from .blocks import (
    BackboneHead,
    ConvBNAct,
    ConvHead,
    DeconvMerge,
    Downsample,
    EntryBlock,
    LinearHead,
    SharedBlock,
)

Model = TypeVar("Model", bound=nn.Module)


class _Fused(nn.Module):
    """Runs `fused` in train mode, and the plain block's forward in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.training else super().forward(x)

    def fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FusedConvBNAct(_Fused, ConvBNAct):
    def fused(self, x: Tensor) -> Tensor:
        return norm_act(conv_train(x, self.conv), self.bn, self.act)


class FusedSharedBlock(_Fused, SharedBlock):
    skip = False

    def fused(self, x: Tensor) -> Tensor:
        slope, p = _slope(self.act), _probability(self.dropout)
        return shared_block_train(x, self.conv, self.bn1, self.bn2, slope=slope, p=p, skip=self.skip)


class FusedEntryBlock(_Fused, EntryBlock):
    skip = True
    fused = FusedSharedBlock.fused


class FusedDownsample(_Fused, Downsample):
    def fused(self, x: Tensor) -> Tensor:
        return F.relu(conv_train(x, self.conv))


class FusedDeconvMerge(DeconvMerge):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x, skip)
        return self.block(conv_train(x, self.deconv) + skip)


class FusedLinearHead(_Fused, LinearHead):
    def fused(self, x: Tensor) -> Tensor:
        return conv_train(x, self.classify)


class FusedConvHead(_Fused, ConvHead):
    dropout: nn.Dropout2d | None = None

    def fused(self, x: Tensor) -> Tensor:
        conv, bn, act = self.features.conv, self.features.bn, self.features.act
        return norm_act_conv(conv_train(x, conv), bn, act, self.classify, self.dropout)


class FusedBackboneHead(_Fused, BackboneHead):
    fused = FusedConvHead.fused


class FusedBasicBlock(_Fused, BasicBlock):
    def fused(self, x: Tensor) -> Tensor:
        shortcut = _shortcut(x, self.downsample)
        x = norm_act_conv(conv_train(x, self.conv1), self.bn1, self.act, self.conv2)
        return norm_act(x, self.bn2, self.relu, shortcut)


class FusedBottleneck(_Fused, Bottleneck):
    def fused(self, x: Tensor) -> Tensor:
        shortcut = _shortcut(x, self.downsample)
        x = norm_act_conv(conv_train(x, self.conv1), self.bn1, self.act, self.conv2)
        x = norm_act_conv(x, self.bn2, self.act, self.conv3)
        return norm_act(x, self.bn3, self.relu, shortcut)


class FusedResNet(ResNet):
    def stem(self, x: Tensor) -> Tensor:
        return norm_act(conv_train(x, self.conv1), self.bn1, self.act) if self.training else super().stem(x)

    def pool(self, x: Tensor) -> Tensor:
        return max_pool_train(x, self.maxpool) if self.training else super().pool(x)


# The fused class of each plain block. By exact type: a subclass may compute something else.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ConvBNAct: FusedConvBNAct,
    SharedBlock: FusedSharedBlock,
    EntryBlock: FusedEntryBlock,
    Downsample: FusedDownsample,
    DeconvMerge: FusedDeconvMerge,
    LinearHead: FusedLinearHead,
    ConvHead: FusedConvHead,
    BackboneHead: FusedBackboneHead,
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
}
PLAIN = {fused: plain for plain, fused in FUSED.items()}


def fuse_for_training(model: Model) -> Model:
    """Makes a model's blocks train with fused ops, in place, and returns the model.

    Parameters, the state dict and all results in eval mode stay the same. In train mode outputs and gradients
    are the same up to rounding, and dropout drops the same channels for the same seed. Anything without a
    fused version is left unchanged: blocks of other types, with other activations or dropout, or with hooks
    on modules inside them, such as pruning's; norms other than BatchNorm2d (such as SyncBatchNorm) or frozen
    in eval mode; and dtypes without a kernel. Hooks added later to modules inside fused blocks are not called
    in train mode.

    Args:
        model: a ShelfNet, or any module that contains blocks of this package; call this before
            torch.compile.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, it must be a torch.nn.Module")
    for module in model.modules():
        if type(module) in FUSED and _has_known_parts(module):
            module.__class__ = FUSED[type(module)]
    return model


def _has_known_parts(block: nn.Module) -> bool:
    if isinstance(block, (ConvHead, BackboneHead)) and plain_type(block.features) is not ConvBNAct:
        return False
    # A ResNet's own parts are those of its stem: the others are called as they are.
    parts = block.named_children() if isinstance(block, ResNet) else block.named_modules()
    inner = {name: part for name, part in parts if part is not block}
    if isinstance(block, ResNet):
        inner = {name: part for name, part in inner.items() if not name.startswith("layer")}
    return all(_is_known(name.rpartition(".")[2], part) for name, part in inner.items())


def _is_known(name: str, part: nn.Module) -> bool:
    """Whether a part is what its block's fused form computes, and is not watched."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    if any(hooks):
        return False
    if name == "act" and type(part) is nn.LeakyReLU:
        return 0 <= part.negative_slope <= 1
    kinds = {"act": nn.ReLU, "relu": nn.ReLU, "dropout": nn.Dropout2d}
    return name not in kinds or type(part) is kinds[name]


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's exact type; for a fused block, the type of its plain block."""
    return PLAIN.get(type(module), type(module))


def norm_act(
    x: Tensor,
    bn: nn.Module,
    act: nn.Module,
    residual: Tensor | None = None,
) -> Tensor:
    """act(bn(x) + residual), as one op."""
    return bn_act_dropout(x, bn, residual, slope=_slope(act))


def norm_act_conv(
    x: Tensor,
    bn: nn.Module,
    act: nn.Module,
    conv: nn.Module,
    dropout: nn.Dropout2d | None = None,
) -> Tensor:
    """conv(dropout(act(bn(x)))), as one op."""
    p = 0.0 if dropout is None else _probability(dropout)
    return bn_act_conv_train(x, bn, conv, slope=_slope(act), p=p)


def _shortcut(x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    if downsample is None:
        return x
    conv, *norms = downsample
    x = conv_train(x, conv)
    for norm in norms:
        x = bn_act_dropout(x, norm, slope=None)
    return x


def _slope(act: nn.Module) -> float:
    return act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0


def _probability(dropout: nn.Dropout2d) -> float:
    return dropout.p if dropout.training else 0.0
