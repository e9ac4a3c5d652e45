from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from shelfkern.normalisation import Normalisation


@pytest.mark.parametrize("shape", [(256, 3), (2, 128, 3), (2, 2, 64, 3)])
def test_normalise_against_float64(shape: tuple[int, ...]) -> None:
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1).reshape(shape)
    exact = (pixels / np.float64(255) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = Normalisation()(pixels)
    assert found.dtype == np.float32
    assert_allclose(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("field", ["mean", "std"])
@pytest.mark.parametrize("value", [(), (1.0, 2.0), (1, 2, 3, 4), (1, "2", 3)])
def test_refuses_what_is_not_three_numbers(field: str, value: tuple) -> None:
    with pytest.raises(ValueError, match=f"normalisation has the {field} .*it must be three "):
        Normalisation(**{field: value})


@pytest.mark.parametrize("value", [(1, 0, 1), (1, -1, 1), (1, float("nan"), 1)])
def test_refuses_deviations_that_are_not_positive(value: tuple) -> None:
    with pytest.raises(ValueError, match="normalisation has the std"):
        Normalisation(std=value)
