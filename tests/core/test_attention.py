"""Heads of attention: found in every layout, whatever the weights are, and taken out with equal outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Attention, Call, FewerHeads, find_attentions, places_of, row_of, without_heads
from lightning_sparse.core.attention import why_they_stay
from lightning_sparse.export import remove_dead
from tests.helpers.attention import Fused, Separate, attend

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Torch(nn.Module):
    """Torch's own, alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


LAYOUTS = {
    "separate": (Separate(), 4, {"ask": [0, 1, 2], "match": [0, 1, 2], "carry": [0, 1, 2]}),
    "grouped": (Separate(2), 2, {"ask": [0, 1, 2, 3, 4, 5], "match": [0, 1, 2], "carry": [0, 1, 2]}),
    "fused": (Fused(), 4, {"qkv": [0, 1, 2, 12, 13, 14, 24, 25, 26]}),
    "interleaved": (Fused(True), 4, {"qkv": list(range(9))}),
    "torch": (Torch(), 4, {"attention": [0, 1, 2]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero", [False, True])
def test_heads_are_found_in_every_layout(layout: str, zero: bool) -> None:
    net, heads, first = LAYOUTS[layout]
    with torch.no_grad():
        before = [p.clone() for p in net.parameters()]
        for parameter in net.parameters():
            if zero:
                parameter.zero_()
    (attention,) = find_attentions(net, [Call((X,))]).attentions
    assert attention.heads == heads
    assert {name: [*rows[0]] for name, rows in attention.rows.items()} == first
    assert [len(columns) for columns in attention.columns] == [12 // heads] * heads
    assert net.training
    with torch.no_grad():
        for parameter, old in zip(net.parameters(), before, strict=True):
            parameter.copy_(old)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_a_model_whose_heads_are_zero(layout: str) -> None:
    net, heads, _ = LAYOUTS[layout]
    zeroed, smaller = copy.deepcopy(net).eval(), copy.deepcopy(net).eval()
    (attention,) = find_attentions(net, [Call((X,))]).attentions
    gone = [0, heads - 1][: heads - 1]
    with torch.no_grad():
        for head in gone:
            for name, row in places_of(zeroed, attention)[head]:
                row_of(zeroed, name, row).zero_()
    kept, _ = without_heads(smaller, attention, gone)
    torch.testing.assert_close(smaller(X), zeroed(X))
    share = len(gone) / heads
    inputs = kept[attention.out].inputs
    assert inputs is not None
    assert len(inputs) == 12 - 12 * share
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())
    assert not torch.allclose(smaller(X), net.eval()(X))


class Mixed(nn.Module):
    """A norm over all heads, so that each column depends on everything."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = Separate(), nn.LayerNorm(12), nn.Linear(12, 12)
        self.inner.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(self.inner(x)))
        return out


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(12, 8), nn.GLU(), nn.Linear(4, 8)),
        nn.Sequential(nn.Linear(12, 5), nn.GroupNorm(5, 5), nn.Linear(12, 5))[:2],
        Mixed(),
    ],
)
def test_what_is_no_attention_is_not_taken_for_one(net: nn.Module) -> None:
    assert not find_attentions(net, [Call((X,))]).attentions


def test_groups_of_a_norm_are_no_heads() -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3))
    assert not find_attentions(net, [Call((X[:, 0],))]).attentions


def test_heads_that_all_share_a_key_stay_together() -> None:
    found = find_attentions(Separate(4), [Call((X,))])
    assert not found.attentions
    assert found.obstacles == {"out": "all heads share a projection"}


def test_weights_of_two_layers_are_left_alone() -> None:
    net = nn.Sequential(Separate(), Separate())
    net[1].ask.weight = net[0].ask.weight
    assert set(find_attentions(net, [Call((X,))]).obstacles) == {"0.out", "1.out"}


class Watched(Separate):
    """Another layer reads the values too."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        value = self.carry(x)
        out: Tensor = self.out(attend(self.ask(x), self.match(x), value, 3)) + self.side(value)
        return out


def test_heads_that_another_layer_reads_are_left_alone() -> None:
    assert not find_attentions(Watched(), [Call((X,))]).attentions


def test_one_head_stays_where_all_are_dead() -> None:
    pytest.importorskip("torch_pruning")
    net = Separate().eval()
    for layer in (net.ask, net.match, net.carry):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    smaller, removal = remove_dead(net, X)
    assert removal.heads == {"": 3}
    torch.testing.assert_close(smaller(X), net(X))


class Repeated(nn.Module):
    """Calls one attention twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Separate()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.block(x))
        return out


def test_an_attention_that_is_called_twice_is_one() -> None:
    (attention,) = find_attentions(Repeated(), [Call((X,))]).attentions
    assert (attention.out, attention.heads) == ("block.out", 4)


class Picky(Separate):
    """Looks at what its layers return."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.equal(self.ask(x), nn.functional.linear(x, self.ask.weight, self.ask.bias)):
            raise RuntimeError("not mine")
        return super().forward(x)


def test_a_network_that_does_not_run_while_it_is_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Picky cannot be traced for attention heads \(not mine\); write structure="):
        find_attentions(Picky(), [Call((X,))])


def test_channels_are_removed_where_heads_cannot_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")

    def find(model: nn.Module, calls: Any) -> Any:
        raise ValueError("cannot be traced")

    monkeypatch.setattr("lightning_sparse.export.removal.find_attentions", find)
    net = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net[0].weight.data[:2] = 0
    smaller, removal = remove_dead(net, X)
    assert removal.removed == {"0": 2}
    assert removal.refused == {"Sequential": "cannot be traced"}
    torch.testing.assert_close(smaller(X), net(X))


def test_an_attention_says_where_it_is() -> None:
    found = find_attentions(nn.Sequential(Separate(), Fused()), [Call((X,))]).attentions
    assert [(one.name, one.out) for one in found] == [("0", "0.out"), ("1", "1.out")]
    assert isinstance(found[0], Attention)


# ---- torch's own --------------------------------------------------------------------------------------------------------


def both(heads: list[int], **kwargs: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Torch's own with some heads at zero, and the same without these heads."""
    torch.manual_seed(1)
    holder = nn.ModuleDict({"a": nn.MultiheadAttention(12, 4, **kwargs)})
    whole: Any = holder["a"]
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn_like(parameter))
    rows = [range(3 * head, 3 * head + 3) for head in range(4)]
    attention = Attention("a", {"a": rows}, "a.out_proj", rows)
    with torch.no_grad():
        for head in heads:
            for name, row in places_of(holder, attention)[head]:
                row_of(holder, name, row).zero_()
    smaller = copy.deepcopy(holder)
    without_heads(smaller, attention, heads)
    cut: Any = smaller["a"]
    assert isinstance(cut, FewerHeads)
    assert cut.num_heads == 4 - len(heads)
    return whole.eval(), cut.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim", [None, 12, 6])
def test_fewer_heads_are_called_as_torchs_own(batch_first: bool, bias: bool, kdim: int | None) -> None:
    whole, cut = both([1, 3], batch_first=batch_first, bias=bias, kdim=kdim, vdim=7 if kdim == 6 else None)
    q, k, v = torch.randn(2, 4, 12), torch.randn(2, 6, kdim or 12), torch.randn(2, 6, 7 if kdim == 6 else 12)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    banned = torch.zeros(4, 6, dtype=torch.bool)
    banned[0, 1] = True
    whole, cut, q, k, v = whole.double(), cut.double(), q.double(), k.double(), v.double()
    additive = torch.randn(4, 6).double(), torch.randn(2, 6).double()
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": banned},
        {"attn_mask": additive[0], "key_padding_mask": additive[1]},
        {"attn_mask": banned, "key_padding_mask": padding},
    ):
        for need in (True, False):
            expected, found = whole(q, k, v, need_weights=need, **masks), cut(q, k, v, need_weights=need, **masks)
            torch.testing.assert_close(found[0], expected[0])
            assert (found[1] is None) == (not need)
    expected, found = (one(q, k, v, average_attn_weights=False)[1] for one in (whole, cut))
    torch.testing.assert_close(found, expected[:, [0, 2]])


def test_fewer_heads_without_a_batch_and_with_a_mask_for_each_head() -> None:
    whole, cut = both([0])
    x = torch.randn(5, 12)
    for need in (True, False):
        torch.testing.assert_close(cut(x, x, x, need_weights=need)[0], whole(x, x, x, need_weights=need)[0])
    assert cut(x, x, x)[1].shape == (5, 5)
    mask = torch.randn(4, 5, 5)
    torch.testing.assert_close(cut(x, x, x, attn_mask=mask[1:])[0], whole(x, x, x, attn_mask=mask)[0])


def test_fewer_heads_drop_out_in_training() -> None:
    _, cut = both([0], dropout=0.5)
    x = torch.randn(5, 12)
    assert torch.equal(cut(x, x, x)[0], cut(x, x, x)[0])
    cut.train()
    for need in (True, False):
        assert not torch.equal(cut(x, x, x, need_weights=need)[0], cut(x, x, x, need_weights=need)[0])


@pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_a_key_of_its_own_stays(kwargs: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="adds a key and a value of its own"):
        FewerHeads.of(nn.MultiheadAttention(12, 4, **kwargs))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_torch_go_on_with_fewer_heads(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    names = list(net.state_dict())
    found = find_attentions(net, [Call((X,))]).attentions
    assert [one.name for one in found] == ["layers.0.self_attn", "layers.1.self_attn"]
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for attention in found:
        with torch.no_grad():
            for name, row in places_of(net, attention)[2]:
                row_of(net, name, row).zero_()
    with torch.no_grad():
        expected = net(X), net(X, src_key_padding_mask=padding)
        for attention in found:
            without_heads(net, attention, [2])
        torch.testing.assert_close(net(X), expected[0])
        torch.testing.assert_close(net(X, src_key_padding_mask=padding)[0], expected[1][0])
    assert list(net.state_dict()) == names


class Sloped(nn.Module):
    """A slope for each head, cut to the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.out = 4, nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("slopes", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) - self.slopes[: self.num_heads, None, None] * torch.arange(float(x.shape[1]))
        out: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def test_heads_stay_if_only_the_last_one_could_leave() -> None:
    torch.manual_seed(0)
    net, calls = Sloped(), [Call.of(X)]
    found = find_attentions(net, calls).attentions
    assert len(found) == 1
    assert why_they_stay(net, calls, found) == "with fewer heads the model returns something else"


def test_an_attention_with_two_names_is_replaced_under_both() -> None:
    torch.manual_seed(0)
    net = Torch().eval()
    net.again = nn.ModuleList([net.attention])
    with torch.no_grad():
        net.attention.in_proj_weight.view(3, 4, 3, 12)[:, 0] = 0
    smaller, removal = remove_dead(net, X)
    assert removal.heads == {"attention": 1}
    assert smaller.again[0] is smaller.attention
    assert isinstance(smaller.attention, FewerHeads)
    torch.testing.assert_close(smaller(X), net(X))
