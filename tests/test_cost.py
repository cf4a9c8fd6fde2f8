"""What a network costs: the published figures to the unit, and every rule by hand."""

import json

import pytest
import torch
from conftest import invoke
from torch import nn

from micronet import Cosine, build_network, count_layer, layer_costs, total_cost

PUBLISHED = {  # params, FLOPs, operations with a multiplication at 1/2 and at 1, score at 16 and at 32 bits [1]
    "efficientnet_ex": (2_793_064, 251_891_224, 382_885_052, 512_835_116, "0.074761", "0.12541"),
    "efficientnet_exx": (2_418_650, 232_355_234, 353_361_693, 473_373_028, "0.066818", "0.11139"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    (result,) = json.loads(invoke("score", name, "--json").stdout)
    params, flops, ops, ops_32bit, score, score_32bit = PUBLISHED[name]
    assert (result["params"], result["flops"]) == (params, flops)
    assert (result["ops"], result["ops_32bit"]) == (ops, ops_32bit)
    assert (f"{result['score']:.6f}", f"{result['score_32bit']:.5f}") == (score, score_32bit)
    assert result["mults"] / 2 + result["adds"] == ops and result["mults"] + result["adds"] == ops_32bit
    assert (result["name"], result["rules"], result["top1"]) == (name, "seed", None)


def test_all_four_networks_without_arguments() -> None:
    results = json.loads(invoke("score", "--json").stdout)
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
def test_a_rule_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    x = torch.randn(1, *shape)
    assert count_layer(layer.eval(), x, layer(x)) == expected


def test_an_unknown_layer_is_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
    with pytest.raises(TypeError, match="no rule to count GELU"):
        layer_costs(network)


def test_layers_add_up_and_leave_the_network_as_it_was() -> None:
    network = build_network("efficientnet_b0", width=0.25, depth=0.25, stochastic_depth=0.2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rows = layer_costs(network)
    assert total_cost(rows).params == sum(p.numel() for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_layers_are_shown() -> None:
    (result,) = json.loads(invoke("score", "efficientnet_ex", "--json", "--layers").stdout)
    for key in ("params", "flops", "mults", "adds"):
        assert sum(layer[key] for layer in result["layers"]) == result[key]
    shown = invoke("score", "efficientnet_ex", "--layers").stdout
    assert all(layer["layer"] in shown for layer in result["layers"])


def test_what_is_no_network_is_refused() -> None:
    result = invoke("score", "resnet")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert 'error: "resnet": expected a network (efficientnet_b0, ' in result.stderr
