import pytest
import torch
from torch import nn

from shelfkern.engine.fold import fold_batch_norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_convolution_then_batch_norm(affine, bias):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6, eps=0.1, affine=affine).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.01, 2)
    if affine:
        bn.weight.data.normal_()
        bn.bias.data.normal_()
    conv_bias = torch.randn(6) if bias else None
    z = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    scale, shift = fold_batch_norm(bn, conv_bias)
    truth = bn.double()(z + (conv_bias.double()[:, None, None] if bias else 0))
    torch.testing.assert_close(scale[:, None, None] * z + shift[:, None, None], truth, rtol=1e-6, atol=1e-6)


def test_needs_running_statistics():
    with pytest.raises(TypeError, match="it must be a batch norm that tracks running statistics"):
        fold_batch_norm(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(TypeError, match="bn is Identity"):
        fold_batch_norm(nn.Identity())
