import pytest
import torch
from torch import nn

from lightning_sparse.core import describe, find_targets, select_targets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.split = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.rnn = nn.LSTM(8, 4)
        self.head = nn.Linear(8, 10)


def names(*patterns: str) -> list[str]:
    return [target.name for target in find_targets(Net(), patterns or ("*",))]


DEFAULT = [
    "conv.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "split.q_proj_weight",
    "split.k_proj_weight",
    "split.v_proj_weight",
    "split.out_proj.weight",
    "layers.0.weight",
    "layers.1.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "head.weight",
]


def test_default_is_what_layers_multiply_by() -> None:
    assert names() == DEFAULT


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layers.*"], ["layers.0.weight", "layers.1.weight"]),
        (["layers.0"], ["layers.0.weight"]),
        (["layers.0.weight", "head"], ["layers.0.weight", "head.weight"]),
        (["re:^(conv|head)\\."], ["conv.weight", "head.weight"]),
        (["type:Conv1d"], ["conv.weight"]),
        (["type:_ConvNd"], ["conv.weight", "up.weight"]),
        (["type:Embedding"], ["embed.weight"]),
        (["type:LSTM"], ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ([":first", ":last"], ["conv.weight", "head.weight"]),
        (["!:last", "!re:attention|split|up|rnn", "!conv"], ["layers.0.weight", "layers.1.weight"]),
        (["layers.*", "!layers.1"], ["layers.0.weight"]),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    assert names(*patterns) == expected


def test_every_parameter_gets_a_reason() -> None:
    reasons = {c.name: c.reason for c in describe(Net(), ["*", "!head"])}
    assert len(reasons) == len(list(Net().parameters()))
    assert reasons["head.weight"] == "excluded by '!head'"
    assert reasons["conv.weight"] == "included by '*'"
    assert reasons["conv.bias"] == reasons["norm.weight"] == "a bias or a vector"
    assert reasons["embed.weight"] == "Embedding, which only 'type:Embedding' chooses"
    assert reasons["split.bias_k"] == "a bias or a vector"


def test_the_table_prints() -> None:
    lines = str(describe(Net(), ["layers"])).splitlines()
    assert len(lines) == 1 + len(list(Net().parameters()))
    assert lines[0].split() == ["parameter", "layer", "shape", "why"]
    assert "x  layers.0.weight" in "\n".join(lines)
    assert next(line for line in lines if "head.weight" in line).endswith("no pattern includes it")


def test_transposed_convolutions_count_outputs_second() -> None:
    target = next(t for t in find_targets(Net()) if t.name == "up.weight")
    assert (target.output_dim, target.input_dim, target.groups) == (1, 0, 2)


def test_tied_weights_appear_once_and_embeddings_protect() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    net["b"].weight = net["a"].weight
    net["head"].weight = net["embed"].weight
    assert [t.name for t in find_targets(net)] == ["a.weight"]
    assert [t.name for t in find_targets(net, ["b"])] == ["a.weight"]
    net = nn.ModuleDict({"head": nn.Linear(4, 5), "embed": nn.Embedding(5, 4)})
    net["embed"].weight = net["head"].weight
    assert {c.name: c.reason for c in describe(net)}["head.weight"].startswith("shared with Embedding")


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("layer.0", "'layer.0' matches nothing in the model; did you mean 'layers.0'"),
        ("!heads", "'!heads' matches nothing in the model; did you mean 'head'"),
        ("type:Linaer", "did you mean 'Linear'"),
        ("decoder", "'decoder' matches nothing in the model; write such as "),
        ("re:(", "not a regular expression"),
        (":end", "the ends of the network are ':first' and ':last'"),
    ],
)
def test_patterns_that_match_nothing(pattern: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"targets") as error:
        names(pattern)
    assert sentence in str(error.value)


def test_nothing_chosen() -> None:
    with pytest.raises(ValueError, match="chooses no weight of BatchNorm1d"):
        find_targets(nn.BatchNorm1d(3))


def half_frozen() -> nn.ModuleDict:
    net = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    net["backbone"].requires_grad_(False)
    return net


@pytest.mark.parametrize("patterns", [["*"], ["!head.bias"], ["*", "head"], ["re:weight"], ["type:Linear"]])
def test_frozen_weights_are_left_out(patterns: list[str]) -> None:
    selection = select_targets(half_frozen(), patterns)
    assert [target.name for target in selection.targets] == ["head.weight"]
    assert [*selection.frozen] == ["backbone.0.weight", "backbone.1.weight"]
    reasons = {candidate.name: candidate.reason for candidate in describe(half_frozen(), patterns)}
    assert reasons["backbone.0.weight"] == "frozen (requires_grad=False)"
    assert len(find_targets(half_frozen(), patterns, frozen=True)) == 3


def test_frozen_weights_that_are_named_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'backbone' chooses nothing that can be used: 'backbone.0.weight' \(Lin"):
        find_targets(half_frozen(), ["backbone", "head"])
    with pytest.raises(ValueError, match="'\\*' chooses nothing that can be used"):
        find_targets(half_frozen().requires_grad_(False))


def test_infinite_lazy_and_computed_weights() -> None:
    with pytest.raises(ValueError, match="'0.weight': without a shape yet"):
        find_targets(nn.Sequential(nn.LazyLinear(2)))
    net = half_frozen()
    nn.init.constant_(net["head"].weight, torch.inf)
    with pytest.raises(ValueError, match=r"'head.weight': not finite"):
        find_targets(net, ["head"])
    wrapped = nn.Sequential(nn.Linear(2, 2), torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"layer '1' \(ParametrizedLinear\) is computed by a para.* targets=\['!1'\]"):
        find_targets(wrapped)
    assert [t.name for t in find_targets(wrapped, ["!1.*"])] == ["0.weight"]
    pruned = nn.Sequential(nn.Linear(2, 2))
    torch.nn.utils.prune.identity(pruned[0], "weight")
    with pytest.raises(ValueError, match="layer '0' .* is computed by a hook"):
        find_targets(pruned)
