"""The networks: counts and shapes against the published table, torchvision's EfficientNet and TensorFlow's padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build_network
from torch import nn
from torchvision.models import efficientnet_b0

from micronet import Cosine, MBConv, convolution, initialize, scaled_channels


def test_b0_is_torchvisions_but_for_strides_projection_bias_and_head() -> None:
    def convolutions(network: nn.Module) -> list[tuple[object, ...]]:
        return [(m.weight.shape, m.groups) for m in network.modules() if isinstance(m, nn.Conv2d)]

    ours, theirs = build_network("efficientnet_b0"), efficientnet_b0()
    assert convolutions(ours) == convolutions(theirs)
    norms = [(m.eps, m.momentum) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [(1e-5, 0.01)] * 49
    strides = [m.stride[0] for m in ours.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert strides == [2, 2]  # 32 to 16 to 8 pixels
    assert sum(isinstance(m, nn.SiLU) for m in ours.modules()) == 49 - 16 + 16  # not after projections; in gates


def test_channels_round_to_eight_and_at_most_ten_percent_down() -> None:
    assert [scaled_channels(c, 1.2) for c in (32, 16, 24, 40, 80, 112, 192, 320, 1280)] == [
        40, 24, 32, 48, 96, 136, 232, 384, 1536,
    ]  # fmt: skip
    for channels in range(8, 400):
        for width in (0.1, 0.25, 0.8, 1.1):
            scaled = scaled_channels(channels, width)
            assert scaled % 8 == 0 and scaled >= 0.9 * channels * width and scaled < channels * width + 8


@pytest.mark.parametrize("kernel", [3, 5])
def test_strided_padding_is_tensorflows_same(kernel: int) -> None:
    """TensorFlow: pad = (ceil(H / s) - 1) s + k - H in all, the smaller half first."""
    layers = nn.Sequential(*convolution(4, 6, kernel, 2))
    x = torch.randn(2, 4, 32, 32)
    total = (16 - 1) * 2 + kernel - 32
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layers[-1].weight, stride=2)
    torch.testing.assert_close(layers(x), expected)
    assert (before, after) == ((0, 1) if kernel == 3 else (1, 2))


def test_initial_values() -> None:
    torch.manual_seed(0)
    network = build_network("efficientnet_b3")
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            k = module.kernel_size[0]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * module.out_channels)), rel=0.05)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)
    bound = 1 / math.sqrt(200)
    assert 0.99 * bound < network.embedding.weight.abs().max() <= bound
    torch.testing.assert_close(network.cosine.kernel.norm(dim=0), torch.ones(100))
    assert initialize(nn.SiLU()) is None


def test_cosines_are_cosines() -> None:
    layer = Cosine(200, 100)
    with torch.no_grad():
        layer.kernel.mul_(3)  # training does not keep the columns at unit length
    x = torch.randn(4, 200)
    expected = F.cosine_similarity(x[:, :, None].double(), layer.kernel[None].double(), dim=1)
    torch.testing.assert_close(layer(x), expected.float())
    assert torch.equal(layer(7 * x).argmax(1), layer(x).argmax(1))


def test_channels_last_all_the_way() -> None:
    network, last = build_network("efficientnet_ex", width=0.25, depth=0.25), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, x, y: last.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    network(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert last and all(last)


def test_autocast_keeps_cosines_in_float32() -> None:
    torch.manual_seed(0)
    network = build_network("efficientnet_ex", width=0.25, depth=0.25).eval()
    x = torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    assert low.dtype == torch.float32
    assert (low - network(x)).abs().max() < 0.05


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training: bool) -> None:
    network = build_network("efficientnet_b0", width=0.1, depth=0.1).train(training)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(compiled(x), network(x))


def test_stochastic_depth_leaves_out_blocks_per_image() -> None:
    torch.manual_seed(0)
    block = MBConv(16, 16, 6, 3, 1, 0.25)
    for parameter in block.parameters():
        nn.init.ones_(parameter)
    x = torch.randn(400, 16, 4, 4)
    kept = ((block(x) - x).abs().amax((1, 2, 3)) > 0).float()
    assert abs(kept.mean() - 0.75) < 0.08
    block.eval()
    assert ((block(x) - x).abs().amax((1, 2, 3)) > 0).all()
    assert not any("Stochastic" in type(m).__name__ for m in MBConv(16, 24, 6, 3, 1, 0.25).modules())  # no skip
