"""Linear layers by their other product: the same numbers, and only where they were asked for."""

from __future__ import annotations

import pytest
import torch
from test_local import ask, close, law, tiny
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from collm.models import narrow
from collm.models.local import LocalModel


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "pays", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (9, 24), (1, 3, 24), (2, 2, 24), (24,), (0, 24)])
def test_both_products_agree(shape: tuple[int, ...], bias: bool, on_amd: None) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    expected = layer(x)
    narrow.prepare(layer)
    with narrow.narrow_products():
        found = layer(x)
        rough = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert found.shape == expected.shape and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(rough.float(), expected, atol=0.1)


def test_outside_a_layer_is_what_it_was(on_amd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is shared with training and with transformers' own `generate`, which must not notice."""
    layer, calls = nn.Linear(24, 40), []
    narrow.prepare(layer)
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: calls.append(1) or real(*given))
    layer(torch.randn(2, 24))
    with pytest.raises(KeyboardInterrupt), narrow.narrow_products():
        layer(torch.randn(2, 24))
        raise KeyboardInterrupt
    layer(torch.randn(2, 24))
    assert len(calls) == 2
    assert isinstance(layer, nn.Linear) and list(layer.state_dict()) == ["weight", "bias"]


def test_weights_of_another_kind_are_left_alone(on_amd: None) -> None:
    class Quantised(nn.Parameter):
        pass

    layer = nn.Linear(24, 40)
    layer.weight = Quantised(layer.weight.detach())
    narrow.prepare(layer)
    assert type(layer) is nn.Linear


def test_a_model_answers_alike(on_amd: None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("qwen2")
    queries = [ask(tuple(range(3, 3 + n)), min(n, 2)) for n in (1, 5, 9)]
    with torch.inference_mode():
        expected = [network(torch.tensor([query.view.token_ids])).logits[0, -1, :320] for query in queries]
    model = LocalModel(network, tiny_tokenizer)
    assert isinstance(network.get_submodule("model.layers.0.mlp.up_proj"), narrow.NarrowLinear)
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    for query, found, logits in zip(queries, model.predict(queries), expected, strict=True):
        [recomputed] = plain.predict([query])
        assert all(close(a, b) for a, b in zip(found, recomputed, strict=True))
        assert torch.allclose(law(found[-1]), logits.log_softmax(dim=-1), atol=2e-4)
