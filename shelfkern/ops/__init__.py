"""The fused ops, one file each. In every file: reference, can-run check, kernel, registered op, public op."""

from ._backends import BACKENDS, KERNELS
from .attention_gate import attention_gate, attention_gate_native, attention_gate_reference
from .bn_act_conv_train import bn_act_conv_train
from .bn_act_dropout import bn_act_dropout, bn_act_dropout_native, bn_act_dropout_reference
from .conv_bn_act import PackedConv, conv_bn_act, conv_bn_act_native, conv_bn_act_reference, pack_conv
from .conv_train import conv_train
from .deconv_add import deconv_add, deconv_add_native, deconv_add_reference, pack_deconv
from .max_pool_train import max_pool_train
from .quantize import quantize, quantize_reference, quantize_weight
from .shared_block import shared_block, shared_block_native, shared_block_reference
from .shared_block_train import shared_block_train, shared_block_train_reference
from .stem import stem, stem_native, stem_reference
from .upsample_add import upsample_add, upsample_add_native, upsample_add_reference
from .upsample_argmax import upsample_argmax, upsample_argmax_native, upsample_argmax_reference
from .upsample_bilinear import upsample_bilinear, upsample_bilinear_native, upsample_bilinear_reference
from .upsample_cross_entropy import Ohem, upsample_cross_entropy, upsample_cross_entropy_reference
from .upsample_softmax_sum import (
    upsample_softmax_sum,
    upsample_softmax_sum_native,
    upsample_softmax_sum_reference,
)

NAMES = tuple(KERNELS)

__all__ = [
    "BACKENDS",
    "KERNELS",
    "NAMES",
    "Ohem",
    "PackedConv",
    "attention_gate",
    "attention_gate_native",
    "attention_gate_reference",
    "bn_act_conv_train",
    "bn_act_dropout",
    "bn_act_dropout_native",
    "bn_act_dropout_reference",
    "conv_bn_act",
    "conv_bn_act_native",
    "conv_bn_act_reference",
    "conv_train",
    "deconv_add",
    "deconv_add_native",
    "deconv_add_reference",
    "max_pool_train",
    "pack_conv",
    "pack_deconv",
    "quantize",
    "quantize_reference",
    "quantize_weight",
    "shared_block",
    "shared_block_native",
    "shared_block_reference",
    "shared_block_train",
    "shared_block_train_reference",
    "stem",
    "stem_native",
    "stem_reference",
    "upsample_add",
    "upsample_add_native",
    "upsample_add_reference",
    "upsample_argmax",
    "upsample_argmax_native",
    "upsample_argmax_reference",
    "upsample_bilinear",
    "upsample_bilinear_native",
    "upsample_bilinear_reference",
    "upsample_cross_entropy",
    "upsample_cross_entropy_reference",
    "upsample_softmax_sum",
    "upsample_softmax_sum_native",
    "upsample_softmax_sum_reference",
]
