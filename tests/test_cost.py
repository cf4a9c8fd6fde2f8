"""What a network costs: the published figures to the unit, and every rule by hand."""

import json
import operator

import pytest
import torch
from conftest import invoke
from torch import Tensor, nn

from micronet import (
    Cosine,
    Operation,
    build_network,
    count_by_seed,
    count_officially,
    layer_costs,
    operations,
    total_cost,
)

PUBLISHED = {  # params, FLOPs, operations with a multiplication at 1/2 and at 1, score at 16 and at 32 bits [1]
    "efficientnet_ex": (2_793_064, 251_891_224, 382_885_052, 512_835_116, "0.074761", "0.12541"),
    "efficientnet_exx": (2_418_650, 232_355_234, 353_361_693, 473_373_028, "0.066818", "0.11139"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    (result,) = json.loads(invoke("score", name, "--rules", "seed", "--json").stdout)
    params, flops, ops, ops_32bit, score, score_32bit = PUBLISHED[name]
    assert (result["params"], result["flops"]) == (params, flops)
    assert (result["ops"], result["ops_32bit"]) == (ops, ops_32bit)
    assert (f"{result['score']:.6f}", f"{result['score_32bit']:.5f}") == (score, score_32bit)
    assert result["mults"] / 2 + result["adds"] == ops and result["mults"] + result["adds"] == ops_32bit
    assert (result["name"], result["rules"], result["top1"]) == (name, "seed", None)


def test_all_four_networks_without_arguments() -> None:
    results = json.loads(invoke("score", "--rules", "seed", "--json").stdout)
    params = {r["name"]: r["params"] for r in results}
    assert params == {
        "efficientnet_b0": 4_285_556,
        "efficientnet_b3": 11_027_240,
        "efficientnet_ex": 2_793_064,
        "efficientnet_exx": 2_418_650,
    }
    table = invoke("score").stdout
    assert all(f"{count:,}" in table for count in params.values())


RULES = [  # layer, input shape, and by hand: FLOPs, multiplications, additions
    (nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 4, 4), (128 * 27, 128 * 27, 128 * 26)),
    (nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False), (6, 4, 4), (96 * 25, 96 * 25, 96 * 24)),
    (nn.Conv2d(6, 2, 1), (6, 1, 1), (2 * 7, 2 * 6, 2 * 6)),
    (nn.BatchNorm2d(5), (5, 2, 2), (40, 40, 40)),
    (nn.SiLU(), (5, 2, 2), (0, 60, 20)),
    (nn.Sigmoid(), (5, 1, 1), (0, 10, 5)),
    (nn.AvgPool2d(8), (5, 8, 8), (320, 0, 320)),
    (nn.AdaptiveAvgPool2d(1), (5, 8, 8), (0, 0, 320)),
    (nn.Linear(7, 3), (7,), (21, 21, 18)),
    (Cosine(4, 3), (4,), (0, 4 * 4 + 3 * 4, 4 * 4 + 3 * 3)),
    (nn.ZeroPad2d(1), (5, 2, 2), (0, 0, 0)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), RULES, ids=lambda value: type(value).__name__)
def test_a_rule_of_the_seed_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    x = torch.randn(1, *shape)
    cost = count_by_seed(Operation("", layer, x.numel(), layer.eval()(x).numel(), False, False))
    assert (cost.flops, cost.mults, cost.adds) == expected
    assert cost.params == sum(p.numel() for p in layer.parameters()) and cost.mask_bits == 0


def pruned(layer: nn.Module, zeros: int) -> nn.Module:
    """Set so many of a layer's weights to zero and all others to one."""
    nn.init.ones_(layer.weight).flatten().data[:zeros] = 0
    return layer


# L = terms of an output, n = outputs; official-count.md's table, line by line
OFFICIAL = [  # operation, input shape, and by hand: values, multiplications, additions, bits of the mask
    (nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 4, 4), (216, 128 * 27, 128 * 26, 0)),
    (nn.Conv2d(6, 2, 1), (6, 1, 1), (14, 2 * 6, 2 * 6, 0)),
    (nn.Conv2d(6, 6, 5, padding=2, groups=6), (6, 4, 4), (156, 96 * 25, 96 * 25, 0)),
    (nn.Linear(7, 3), (7,), (24, 21, 21, 0)),
    (nn.Linear(7, 3, bias=False), (7,), (21, 21, 18, 0)),
    (pruned(nn.Linear(16, 4, bias=False), 48), (16,), (16, 16, 12, 64)),  # 3/4 sparse: a bit a position
    (pruned(nn.Linear(16, 4, bias=False), 2), (16,), (64, 64, 60, 0)),  # a mask would take more than 2 values do
    (pruned(nn.Conv2d(4, 4, 1, bias=False), 8), (4, 3, 3), (8, 72, 36, 16)),
    (nn.BatchNorm2d(5), (5, 2, 2), (10, 20, 20, 0)),  # nothing to fold it into
    (nn.ReLU(), (5, 2, 2), (0, 20, 0, 0)),
    (nn.SiLU(), (5, 2, 2), (0, 60, 20, 0)),
    (nn.Sigmoid(), (5, 1, 1), (0, 10, 5, 0)),
    (nn.AdaptiveAvgPool2d(1), (5, 8, 8), (0, 5, 63 * 5, 0)),
    (nn.AvgPool2d(8), (5, 8, 8), (0, 5, 63 * 5, 0)),
    (Cosine(4, 3), (4,), (12, 2 * 4 + 1 + 12, 3 + 9, 0)),
    (nn.ZeroPad2d(1), (5, 2, 2), (0, 0, 0, 0)),
    (operator.add, (5, 2, 2), (0, 0, 20, 0)),
    (operator.mul, (5, 2, 2), (0, 20, 0, 0)),
]


@pytest.mark.parametrize(("what", "shape", "expected"), OFFICIAL, ids=lambda value: type(value).__name__)
def test_an_official_rule_by_hand(what: object, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = torch.randn(1, *shape)
    output = what.eval()(x) if isinstance(what, nn.Module) else what(x, x)
    cost = count_officially(Operation("", what, x.numel(), output.numel(), False, False))
    assert (cost.params, cost.mults, cost.adds, cost.mask_bits) == expected
    assert cost.score == pytest.approx(
        (expected[0] / 2 + expected[3] / 32) / 36.5e6 + (cost.mults / 2 + cost.adds) / 10.49e9
    )


CHALLENGE = {  # values, multiplications, additions, score at 16 and at 32 bits
    "efficientnet_ex": (2_774_792, 255_091_769, 249_765_523, "0.073980", "0.124149"),
    "efficientnet_exx": (2_402_506, 235_407_959, 230_308_269, "0.066087", "0.110218"),
}


@pytest.mark.parametrize("name", CHALLENGE)
def test_the_official_count(name: str) -> None:
    (result,) = json.loads(invoke("score", name, "--rules", "official", "--json").stdout)
    found = result["params"], result["mults"], result["adds"], f"{result['score']:.6f}", f"{result['score_32bit']:.6f}"
    assert found == CHALLENGE[name] and result["rules"] == "official"


def test_both_counts_are_given_and_shown() -> None:
    results = json.loads(invoke("score", "--json").stdout)
    assert [(r["name"][13:], r["rules"]) for r in results] == [
        (name, rules) for name in ("b0", "b3", "ex", "exx") for rules in ("seed", "official")
    ]
    assert set(results[0]) == set(results[1]) and "mask_bits" in results[0]
    table = invoke("score").stdout
    assert "2,774,792" in table and "2,793,064" in table and "0.073980" in table and "0.074761" in table


class WideBlock(nn.Module):
    """A pre-activation block of WideResNet (arXiv 1605.07146)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.layers(h) + (x if isinstance(self.shortcut, nn.Identity) else self.shortcut(h))


def test_the_counter_proves_itself_on_the_baseline() -> None:
    """WideResNet-28-10 is the challenge's unit: 36.5 M parameters, 10.49 G operations at 32 bits."""
    blocks, channels = [], 16
    for outputs, stride in ((160, 1), (320, 2), (640, 2)):
        for i in range(4):
            blocks.append(WideBlock(channels, outputs, stride if i == 0 else 1))
            channels = outputs
    end = [nn.BatchNorm2d(640), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(640, 100)]
    cost = total_cost(
        layer_costs(nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, *end), "official").values()
    )
    assert cost.params / 36.5e6 == pytest.approx(1, abs=0.0015) and cost.ops_32bit / 10.49e9 == pytest.approx(
        1, abs=0.002
    )
    stage = 7 * 9 * 160 * 160 * 32 * 32  # multiply-accumulates of the inner convolutions, in every group the same
    first = 9 * 3 * 16 * 32 * 32 + (9 + 1) * 16 * 160 * 32 * 32
    assert cost.flops == first + 3 * stage + (9 + 1) * (160 * 320 * 16 * 16 + 320 * 640 * 8 * 8) + 640 * 100


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


@pytest.mark.parametrize("rules", ["seed", "official"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), "no rule to count GELU"),
        (Functional(), "no rule to count relu"),
        (Scaled(), "no rule to count scale outside a module"),
    ],
    ids=["module", "function", "parameter"],
)
def test_what_has_no_rule_is_an_error(network: nn.Module, message: str, rules: str) -> None:
    with pytest.raises(TypeError, match=message):
        layer_costs(network, rules)


def test_a_layer_that_runs_twice_is_stored_once() -> None:
    layer = nn.Conv2d(3, 3, 1)
    once, twice = (layer_costs(nn.Sequential(*[layer] * n), "official")["0"] for n in (1, 2))
    assert once.params == twice.params == 12 and twice.mults == 2 * once.mults == 2 * 9 * 32 * 32


def test_values_below_16_bits_have_no_rule() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        count_officially(Operation("", layer, 2, 2, False, False))


@pytest.mark.parametrize("width", [0.1, 0.25, 1.4])
@pytest.mark.parametrize("rules", ["seed", "official"])
def test_layers_add_up_and_leave_the_network_as_it_was(width: float, rules: str) -> None:
    network = build_network("efficientnet_b0", width=width, depth=0.25, stochastic_depth=0.2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cost = total_cost(layer_costs(network, rules).values())
    norms = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    biased = sum(len(b.layers[-2].weight) if b.has_skip else len(b.layers[-1].weight) for b in network.blocks)
    folded = 0 if rules == "seed" else norms + biased  # scale and shift become one bias, which the projection has
    assert cost.params == sum(p.numel() for p in network.parameters()) - folded
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert [o.layer for o in operations(network)].count("blocks.0.layers.0") == 1


def test_layers_are_shown() -> None:
    for result in json.loads(invoke("score", "efficientnet_ex", "--json", "--layers").stdout):
        for key in ("params", "flops", "mults", "adds"):
            assert sum(layer[key] for layer in result["layers"]) == result[key]
        assert sum(layer["score"] for layer in result["layers"]) == pytest.approx(result["score"])
    shown = invoke("score", "efficientnet_ex", "--layers").stdout
    assert all(layer["layer"] in shown for layer in result["layers"])


def test_the_board() -> None:
    shown = invoke("score", "efficientnet_exx", "--board").stdout
    names = [line.split()[0] for line in shown[shown.index("MicroNet Challenge") :].splitlines()[4:10]]
    assert names == ["RIAIR", "KAIST", "OSI", "MSUNet", "efficientnet_exx", "the"]
    result = invoke("score", "efficientnet_exx", "--board", "--rules", "seed")
    assert result.exit_code == 2 and result.output.count("\n") == 1


def test_what_is_no_network_is_refused() -> None:
    result = invoke("score", "resnet")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert 'error: "resnet": expected a network (efficientnet_b0, ' in result.stderr
