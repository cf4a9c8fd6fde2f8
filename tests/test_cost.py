"""What a network costs: the published figures to the unit, and every rule by hand."""

import json
import operator
import re
from collections.abc import Callable

import micronet
import pytest
import torch
from conftest import build_network, invoke, refused
from torch import Tensor, nn

from micronet import (
    NETWORKS, Cosine, Operation, count_by_seed, count_eight_bits, count_officially, fold_network, layer_costs,
    operations, total_cost,
)  # fmt: skip

FIGURES = {  # params, operations with a multiplication at 1/2 and at 1, score at 16 and at 32 bits
    ("efficientnet_ex", "seed"): (2_793_064, 382_885_052, 512_835_116, "0.074761", "0.12541"),  # published [1]
    ("efficientnet_exx", "seed"): (2_418_650, 353_361_693, 473_373_028, "0.066818", "0.11139"),
    ("efficientnet_ex", "official"): (2_774_792, 377_311_407.5, 504_857_292, "0.073980", "0.12415"),
    ("efficientnet_exx", "official"): (2_402_506, 348_012_248.5, 465_716_228, "0.066087", "0.11022"),
}


def test_figures_of_all_networks_by_both_rules() -> None:
    results = {(r["name"], r["rules"]): r for r in json.loads(invoke("score", "--json", "--layers").stdout)}
    assert list(results) == [(name, rules) for name in NETWORKS for rules in ("seed", "official")]
    for r in results.values():
        for key in ("params", "flops", "mults", "adds"):
            assert sum(layer[key] for layer in r["layers"]) == r[key]
        assert sum(layer["score"] for layer in r["layers"]) == pytest.approx(r["score"])
    for which, expected in FIGURES.items():
        r = results[which]
        assert (r["params"], r["ops"], r["ops_32bit"], f"{r['score']:.6f}", f"{r['score_32bit']:.5f}") == expected
        assert (r["mults"] / 2 + r["adds"], r["mults"] + r["adds"]) == expected[1:3]
        assert r["mask_bits"] == 0 and r["top1"] is None
    published = {"b0": ("params", 4_285_556), "b3": ("params", 11_027_240)}
    published |= {"ex": ("flops", 251_891_224), "exx": ("flops", 232_355_234)}
    for name, (key, value) in published.items():
        assert results[f"efficientnet_{name}", "seed"][key] == value


def pruned(layer: nn.Module, zeros: int) -> nn.Module:
    """Set so many of a layer's weights to zero and all others to one."""
    nn.init.ones_(layer.weight).flatten().data[:zeros] = 0
    return layer


# Operation, input shape, and by hand: FLOPs, multiplications and additions by the authors' rules;
# values, multiplications, additions and bits of the mask by the challenge's.
RULES = [
    (nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 4, 4), (3456, 3456, 128 * 26), (216, 128 * 27, 128 * 26, 0)),
    (nn.Conv2d(6, 2, 1), (6, 1, 1), (2 * 7, 2 * 6, 2 * 6), (14, 2 * 6, 2 * 6, 0)),
    (nn.Conv2d(6, 6, 5, padding=2, groups=6), (6, 4, 4), (96 * 26, 96 * 25, 96 * 25), (156, 96 * 25, 96 * 25, 0)),
    (nn.Linear(7, 3), (7,), (21, 21, 18), (24, 21, 21, 0)),
    (nn.Linear(7, 3, bias=False), (7,), (21, 21, 18), (21, 21, 18, 0)),
    (pruned(nn.Linear(16, 4, bias=False), 48), (16,), None, (16, 16, 12, 64)),  # 3/4 sparse: a bit a position
    (pruned(nn.Linear(16, 4, bias=False), 2), (16,), None, (64, 64, 60, 0)),  # a mask would take more than 2 values do
    (pruned(nn.Conv2d(4, 4, 1, bias=False), 8), (4, 3, 3), None, (8, 72, 36, 16)),
    (nn.BatchNorm2d(5), (5, 2, 2), (40, 40, 40), (10, 20, 20, 0)),  # nothing to fold it into
    (nn.ReLU(), (5, 2, 2), None, (0, 20, 0, 0)),
    (nn.SiLU(), (5, 2, 2), (0, 60, 20), (0, 60, 20, 0)),
    (nn.Sigmoid(), (5, 1, 1), (0, 10, 5), (0, 10, 5, 0)),
    (nn.AvgPool2d(8), (5, 8, 8), (320, 0, 320), (0, 5, 63 * 5, 0)),
    (nn.AdaptiveAvgPool2d(1), (5, 8, 8), (0, 0, 320), (0, 5, 63 * 5, 0)),
    (Cosine(4, 3), (4,), (0, 4 * 4 + 3 * 4, 4 * 4 + 3 * 3), (12, 2 * 4 + 1 + 12, 3 + 9, 0)),
    (operator.add, (5, 2, 2), (0, 0, 0), (0, 0, 20, 0)),
    (operator.mul, (5, 2, 2), (0, 0, 0), (0, 20, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "shape", "by_seed", "officially"), RULES, ids=lambda value: type(value).__name__)
def test_a_rule_by_hand(what: object, shape: tuple[int, ...], by_seed: object, officially: tuple[int, ...]) -> None:
    x, is_module = torch.randn(1, *shape), isinstance(what, nn.Module)
    outputs = (what.eval()(x) if is_module else what(x, x)).numel()
    operation = Operation("", what, x.numel(), outputs, False, False)
    cost = count_officially(operation)
    assert (cost.params, cost.mults, cost.adds, cost.mask_bits) == officially
    values = officially[0] / 2 + officially[3] / 32
    assert cost.score == pytest.approx(values / 36.5e6 + (cost.mults / 2 + cost.adds) / 10.49e9)
    if by_seed:
        cost = count_by_seed(operation)
        assert (cost.flops, cost.mults, cost.adds, cost.mask_bits) == (*by_seed, 0)
        assert cost.params == (sum(p.numel() for p in what.parameters()) if is_module else 0)


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
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, *end)
    cost = total_cost(layer_costs(network, "official").values())
    assert cost.params / 36.5e6 == pytest.approx(1, abs=0.0015)
    assert cost.ops_32bit / 10.49e9 == pytest.approx(1, abs=0.002)
    stage = 7 * 9 * 160 * 160 * 32 * 32  # multiply-accumulates of the inner convolutions, in every group the same
    first = 9 * 3 * 16 * 32 * 32 + (9 + 1) * 16 * 160 * 32 * 32
    assert cost.flops == first + 3 * stage + (9 + 1) * (160 * 320 * 16 * 16 + 320 * 640 * 8 * 8) + 640 * 100


class Beyond(nn.Module):
    """A convolution, and what is no module after it."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.scale, self.after = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1)), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.layer(x))


UNRULED = {
    "GELU": nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()),
    "relu": Beyond(lambda self, x: torch.relu(x)),
    "scale outside a module": Beyond(lambda self, x: x * self.scale),
}


@pytest.mark.parametrize("rules", ["seed", "official"])
@pytest.mark.parametrize("what", UNRULED)
def test_what_has_no_rule_is_an_error(what: str, rules: str) -> None:
    with pytest.raises(TypeError, match=f"no rule to count {what}"):
        layer_costs(UNRULED[what], rules)


def test_a_layer_that_runs_twice_is_stored_once() -> None:
    layer = nn.Conv2d(3, 3, 1)
    once, twice = (layer_costs(nn.Sequential(*[layer] * n), "official")["0"] for n in (1, 2))
    assert once.params == twice.params == 12 and twice.mults == 2 * once.mults == 2 * 9 * 32 * 32


def eight_bits(layer: nn.Module, weight: list[list[int]], bias: list[int]) -> nn.Module:
    weights = torch.tensor(weight, dtype=torch.int8).view_as(layer.weight), torch.tensor(bias, dtype=torch.int32)
    layer.weight, layer.bias = (nn.Parameter(each, requires_grad=False) for each in weights)
    return layer


@pytest.mark.parametrize(("what", "inputs", "outputs", "by_hand"), [
    # 10 x 10 places, a sum at most 255 * 5 + 9 = 1284: 11 bits and a sign; 6 values, 2 biases, 2 scales; 5 bytes more
    (eight_bits(nn.Conv2d(3, 2, 1), [[1, -3, 1], [2, 2, 1]], [9, -9]), 300, 200,
     (8, 600, 600, 600, 0, 6 + 8 + 8 + 5, 150 + 200 + 600, 150 + 200 + 600 * 12 / 32)),
    # one of 16 is stored with a mask: 1 + 2 bytes, not 16; 255 + 1: 9 bits and a sign
    (eight_bits(nn.Linear(16, 1), [[0] * 15 + [-1]], [1]), 16, 1,
     (2, 1, 1, 1, 16, 1 + 2 + 4 + 4 + 5, 0.25 + 1 + 1, 0.25 + 1 + 10 / 32)),
    # 15 of 16 are not: 16 bytes; 255 * 15 = 3825: 12 bits and a sign
    (eight_bits(nn.Linear(16, 1), [[0] + [1] * 15], [0]), 16, 1,
     (17, 16, 16, 16, 0, 16 + 4 + 4 + 5, 4 + 1 + 16, 4 + 1 + 16 * 13 / 32)),
    # four values of 8 bits, none negative: 1020, 10 bits
    (nn.AdaptiveAvgPool2d(1), 8, 2, (0, 0, 2, 6, 0, 5, 0.5 + 2 + 6, 0.5 + 2 + 6 * 10 / 32)),
    (nn.SiLU(), 8, 8, (0, 0, 24, 8, 0, 5, 6 + 8 + 2, 6 + 8 + 2)),
    (nn.Flatten(), 8, 8, (0, 0, 0, 0, 0, 0, 0, 0)),
])  # fmt: skip
def test_eight_bits_by_hand(what: nn.Module, inputs: int, outputs: int, by_hand: tuple[float, ...]) -> None:
    assert tuple(count_eight_bits(Operation("", what, inputs, outputs, False, False))) == by_hand


def test_at_eight_bits_what_runs_again_is_not_stored_again() -> None:
    layer = eight_bits(nn.Conv2d(3, 2, 1), [[1, -3, 1], [2, 2, 1]], [9, -9])
    once, again = (count_eight_bits(Operation("", layer, 300, 200, False, seen)) for seen in (False, True))
    assert again == once._replace(params=0, bytes=5)  # the scale and the zero point of what it returns


def test_a_score_at_eight_bits_by_hand() -> None:
    """36.5 M words and 10.49 G operations are 1 each; so are twice the narrow ones."""
    cost = micronet.EightBitCost(0, 0, 0, 0, 0, 4 * 36.5e6, 10.49e9, 10.49e9 / 2)
    assert (cost.score, cost.score_narrow) == (2, 1.5)


def test_exx_at_eight_bits_scores_what_its_quarters_come_to() -> None:
    """0.0156 for 2.28 M bytes and 0.0276 for a quarter of 235 M and 230 M whole operations; the rest are scales."""
    network = fold_network(build_network("efficientnet_exx").eval())
    found = operations(network)
    for layer in (o.what for o in found if isinstance(o.what, nn.Conv2d | nn.Linear)):
        eight_bits(layer, torch.full_like(layer.weight, 3).tolist(), [0] * len(layer.weight))
    cost = total_cost(micronet.by_layer(found, count_eight_bits).values())
    exact = total_cost(layer_costs(fold_network(build_network("efficientnet_exx").eval()), "official").values())
    assert cost[:4] == exact[:4] and cost.score == pytest.approx(0.0444, abs=3e-4) and cost.score_narrow < cost.score


@pytest.mark.parametrize("width", [0.1, 1.4])
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


def test_layers_and_the_board_stand_below_the_scores() -> None:
    shown = invoke("score", "efficientnet_exx", "--layers", "--board").stdout
    titles = [line.split()[0] for line in shown.splitlines() if re.match("(Cost|Layers|The) ", line)]
    assert titles == ["Cost", "Cost", "Layers", "Layers", "The"]
    (row,) = (line.split() for line in shown.splitlines() if line.startswith(" ►"))
    assert row == ["►", "efficientnet_exx", "0.0661", "-", "counted", "here"]  # of the two counts the official one


@pytest.mark.parametrize(("arguments", "message"), [
    ("resnet", '"resnet": expected a network (efficientnet_b0, '),
    ("--board --rules seed", "--board: the challenge's entries are scored by its own rules"),
    ("--board --json", "--board: is a table: expected without --json"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(arguments: str, message: str) -> None:
    assert refused(invoke("score", *arguments.split()), f"error: {message}")
