"""The same blocks, trained by this library's fused ops: less is kept for the gradient, in fewer passes.

Each is its plain block by another class: same parameters, same names, and in eval mode the plain block's own
forward. `fuse_for_training` changes the classes of a model's blocks in place.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from ..ops.bn_act_dropout import bn_act_dropout
from ..ops.conv_train import conv_train
from ..ops.shared_block_train import shared_block_train
from .backbone import BasicBlock, Bottleneck, ResNet
from .blocks import BackboneHead, ConvBNAct, EntryBlock, SharedBlock

Model = TypeVar("Model", bound=nn.Module)


class _Fused(nn.Module):
    """In train mode `fused`, otherwise the plain block's forward."""

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


class FusedBackboneHead(_Fused, BackboneHead):
    def fused(self, x: Tensor) -> Tensor:
        features = self.features
        return self.classify(
            norm_act(conv_train(x, features.conv), features.bn, features.act, dropout=self.dropout)
        )


class FusedBasicBlock(_Fused, BasicBlock):
    def fused(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_act(conv_train(x, self.conv1), self.bn1, self.act)
        return norm_act(conv_train(x, self.conv2), self.bn2, self.relu, shortcut)


class FusedBottleneck(_Fused, Bottleneck):
    def fused(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_act(self.conv1(x), self.bn1, self.act)
        x = norm_act(conv_train(x, self.conv2), self.bn2, self.act)
        return norm_act(self.conv3(x), self.bn3, self.relu, shortcut)


class FusedResNet(ResNet):
    def stem(self, x: Tensor) -> Tensor:
        return norm_act(self.conv1(x), self.bn1, self.act) if self.training else super().stem(x)


# Of every plain block the one that trains fused. By exact type: a subclass may compute something else.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ConvBNAct: FusedConvBNAct,
    SharedBlock: FusedSharedBlock,
    EntryBlock: FusedEntryBlock,
    BackboneHead: FusedBackboneHead,
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
}
PLAIN = {fused: plain for plain, fused in FUSED.items()}


def fuse_for_training(model: Model) -> Model:
    """Makes a model's blocks train by fused ops, in place, and returns it.

    Parameters, state dict and all that eval mode gives stay as they are; in train mode results and gradients
    are the same up to rounding, and one seed drops the same channels. What has no fused form is left as it
    is: blocks of other types or with other activations, norms that are no BatchNorm2d, such as SyncBatchNorm,
    or in eval mode, dtypes without a kernel. Hooks of the norms, activations and dropouts inside blocks are
    not called in train mode.

    Args:
        model: a ShelfNet, or any module that holds blocks of this package, before it is compiled.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, it must be a torch.nn.Module")
    for module in model.modules():
        if type(module) in FUSED and _has_known_activations(module):
            module.__class__ = FUSED[type(module)]
    return model


def _has_known_activations(block: nn.Module) -> bool:
    acts = (module for name, module in block.named_modules() if name.endswith("act"))
    return all(
        type(act) is nn.ReLU or (type(act) is nn.LeakyReLU and 0 <= act.negative_slope <= 1) for act in acts
    )


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's exact type; of one that trains fused, the plain block's."""
    return PLAIN.get(type(module), type(module))


def norm_act(
    x: Tensor,
    bn: nn.Module,
    act: nn.Module,
    residual: Tensor | None = None,
    dropout: nn.Dropout2d | None = None,
) -> Tensor:
    """dropout(act(bn(x) + residual)), as one op."""
    p = 0.0 if dropout is None else _probability(dropout)
    return bn_act_dropout(x, bn, residual, slope=_slope(act), p=p)


def _slope(act: nn.Module) -> float:
    return act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0


def _probability(dropout: nn.Dropout2d) -> float:
    return dropout.p if dropout.training else 0.0
