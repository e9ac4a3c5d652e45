"""The authors' checkpoints, in and out, and what is said of checkpoints that do not fit."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from golden import fill
from torch.testing import assert_close

import shelfkern.nn
from shelfkern.nn import published


def assert_same_state(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def refused(model: torch.nn.Module, state: object, error: type[Exception] = RuntimeError, **options) -> str:
    """The one sentence with which a model refuses a state; the model stays as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as info:
        model.load_state_dict(state, **options)
    assert_same_state(model, before)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture
def filled(narrow, model_name):
    """A narrow model's authors' state with values of the fill rule, and the model."""
    model = narrow(model_name)
    shapes = {name: list(value.shape) for name, value in published.to_published(model).items()}
    return {name: fill.filled(name, shape) for name, shape in shapes.items()}, model


def test_writes_the_authors_names_and_shapes(model_name: str) -> None:
    state = published.to_published(getattr(shelfkern.nn, model_name)())
    assert {name: list(value.shape) for name, value in state.items()} == fill.published_shapes(model_name)


def test_wrappers_change_nothing(filled) -> None:
    state, model = filled
    model.load_state_dict(state)
    plain = copy.deepcopy(model.state_dict())
    prefixed = {f"module.{name}": value for name, value in state.items()}
    twice = {f"module.{name}": value for name, value in prefixed.items()}
    for wrapped in ({"state_dict": state, "epoch": 3}, prefixed, {"state_dict": prefixed}, twice):
        other = type(model)(model.config)
        other.load_state_dict(wrapped)
        assert_same_state(other, plain)


def test_adapt_touches_neither_model_nor_state(filled) -> None:
    state, model = filled
    names, before = list(state), copy.deepcopy(model.state_dict())
    values = {name: value.clone() for name, value in state.items()}
    own = published.adapt(state, model)
    assert own.keys() == model.state_dict().keys()
    assert list(state) == names and all(torch.equal(state[n], v) for n, v in values.items())
    assert_same_state(model, before)


def test_inplace_norms_scale_by_magnitude_plus_eps(narrow) -> None:
    model = narrow("shelfnet18_lw")
    state = published.to_published(model)
    state["backbone.layer1.0.bn2.weight"].fill_(-0.5)
    state["ladder.bottom.bn2.weight"].fill_(-0.5)
    model.load_state_dict(state)
    assert_close(model.backbone.layer1[0].bn2.weight.data, torch.full((8,), 0.50001), rtol=1e-7, atol=0)
    assert torch.equal(model.shelf.columns[1].bottom.bn2.weight.data, torch.full((24,), -0.5))


def test_plain_norms_keep_their_sign(narrow) -> None:
    model = narrow("shelfnet50")
    state = published.to_published(model)
    state["head.bn1.weight"].fill_(-0.5)
    model.load_state_dict(state)
    assert torch.equal(model.shelf.laterals[0].bn.weight.data, torch.full((4,), -0.5))


def test_absent_batch_counts_become_zero(narrow) -> None:
    model = narrow("shelfnet18_lw")
    state = published.to_published(model)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    model.load_state_dict(state)
    assert model.backbone.bn1.num_batches_tracked == 0
    assert published.to_published(model)["ladder.bottom.bn2.num_batches_tracked"] == 0


@torch.no_grad()
def test_round_trip_is_the_same_function(narrow, model_name: str) -> None:
    model = narrow(model_name).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight *= torch.where(torch.rand_like(module.weight) < 0.5, -1.0, 1.0)
    before = copy.deepcopy(model.state_dict())
    again = type(model)(model.config).double().eval()
    again.load_state_dict(published.to_published(model))
    assert_same_state(model, before)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(_flat(model.forward_heads(image)), _flat(again.forward_heads(image)), strict=True):
        assert_close(a, b, rtol=0, atol=1e-10 * a.std().item())


def _flat(out: shelfkern.nn.ShelfNetOutput) -> list[torch.Tensor]:
    return [out.scores, *out.aux] + ([] if out.presence is None else [out.presence])


def test_a_scale_too_small_for_the_authors_format_is_named(narrow) -> None:
    model = narrow("shelfnet18_lw")
    model.shelf.laterals[1].bn.weight.data[3] = -1e-6
    with pytest.raises(ValueError, match=r"^shelf\.laterals\.1\.bn\.weight has .* 1e-06, .* 1e-05$"):
        published.to_published(model)


def test_other_architectures_have_no_authors_format(narrow) -> None:
    with pytest.raises(ValueError, match="2 pairs"):
        published.to_published(narrow("shelfnet18_lw", pairs=3))


def test_heads_switched_off_are_left_out_both_ways(narrow) -> None:
    model = narrow("shelfnet50", aux=False, presence=False)
    state = published.to_published(model)
    assert not any(name.startswith(("auxlayer.", "head.selayer.")) for name in state)
    model.load_state_dict(state)
    with_heads = published.to_published(narrow("shelfnet50"))
    assert "auxlayer.conv5.0.weight" in refused(model, with_heads)
    model.load_state_dict(with_heads, strict=False)


def test_own_state_loads_and_keeps_torchs_result(narrow, model_name: str) -> None:
    model, other = narrow(model_name), narrow(model_name)
    result = model.load_state_dict(other.state_dict())
    assert result.missing_keys == [] and result.unexpected_keys == []
    part = OrderedDict(list(other.state_dict().items())[:5])
    result = model.load_state_dict({**part, "extra": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["extra"] and len(result.missing_keys) > 10


def test_partial_state_leaves_other_batch_counts(narrow) -> None:
    model = narrow("shelfnet18_lw")
    model.head.features.bn.num_batches_tracked.fill_(7)
    model.load_state_dict({"backbone.conv1.weight": model.backbone.conv1.weight.data}, strict=False)
    assert model.head.features.bn.num_batches_tracked == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loads_into_the_models_dtype(filled, dtype: torch.dtype) -> None:
    state, model = filled
    model.to(dtype).load_state_dict(state)
    expected = published.adapt(state, model)
    assert all(p.dtype == dtype for p in model.parameters())
    assert torch.equal(model.head.classify.weight, expected["head.classify.weight"].to(dtype))


def test_assign_takes_the_tensors_as_they_are(filled) -> None:
    state, model = filled
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(half, assign=True)
    assert {p.dtype for p in empty.parameters()} == {torch.float16}
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in empty.parameters())
    theirs = "head.final.weight" if "head.final.weight" in half else "conv_out.conv_out.weight"
    assert empty.head.classify.weight.data_ptr() == half[theirs].data_ptr()


def test_other_class_count(narrow, model_name: str) -> None:
    model = narrow(model_name, num_classes=5)
    sentence = "state_dict has 7 classes, the model 5; build it with num_classes=7"
    for state in (narrow(model_name, 7).state_dict(), published.to_published(narrow(model_name, 7))):
        assert refused(model, state) == sentence
        assert refused(model, state, strict=False) == sentence


def test_missing_and_unexpected(filled) -> None:
    state, model = filled
    conv = next(name for name in state if name.endswith("layer1.0.conv1.weight"))
    lacking = {name: value for name, value in state.items() if name != conv}
    lacks = "lacks 1 tensor of the model (backbone.layer1.0.conv1.weight)"
    assert refused(model, lacking) == f"state_dict {lacks}"
    extra = {f"extra.{i}": torch.zeros(1) for i in range(5)}
    has = "has 5 tensors that the model does not have (extra.0, extra.1, extra.2, ...)"
    assert refused(model, {**state, **extra}) == f"state_dict {has}"
    assert refused(model, {**lacking, **extra}) == f"state_dict {lacks} and {has}"
    assert "lacks" in refused(model, {})


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_shapes(narrow, strict: bool) -> None:
    model = narrow("shelfnet18_lw")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    state["backbone.conv1.weight"] = torch.zeros(8, 3, 3, 3)
    assert refused(model, state, strict=strict) == (
        "state_dict has 1 tensor of the wrong shape: "
        "backbone.conv1.weight is (8, 3, 3, 3) and must be (8, 3, 7, 7)"
    )


@pytest.mark.parametrize("a, b", [("shelfnet18_lw", "shelfnet34_lw"), ("shelfnet50", "shelfnet101"),
                                  ("shelfnet50", "shelfnet18_lw")])  # fmt: skip
def test_another_models_checkpoint(narrow, a: str, b: str) -> None:
    assert "does not have" in refused(narrow(a), published.to_published(narrow(b)))
    assert "lacks" in refused(narrow(b), published.to_published(narrow(a)))


def test_values_that_cannot_be_copied(narrow) -> None:
    model = narrow("shelfnet18_lw")
    name = "backbone.conv1.weight"
    state = {n: value + 1 for n, value in model.state_dict().items()}
    assert refused(model, {**state, name: 3}) == f"state_dict has {name} of type int, it must be a tensor"
    assert "meta" in refused(model, {**state, name: state[name].to("meta")}, strict=False)
    assert "torch.int8" in refused(model, {**state, name: state[name].to(torch.int8)}, assign=True)


@pytest.mark.parametrize("state", [None, [1, 2], "path.pth", {"state_dict": None}, {3: torch.zeros(1)}])
def test_not_a_mapping_of_names(narrow, state: object) -> None:
    assert "state_dict" in refused(narrow("shelfnet18_lw"), state, TypeError)


def test_one_tensor_under_two_names(filled) -> None:
    state, model = filled
    own = model.state_dict()
    theirs = next(name for name in state if name.endswith("decoder.bottom.conv1.weight"))
    both = {theirs: state[theirs], "shelf.columns.0.bottom.conv.weight": state[theirs]}
    assert "twice" in refused(model, {**own, **both})
