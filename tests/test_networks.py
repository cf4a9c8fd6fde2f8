"""Networks by the published table, torchvision's EfficientNet and TensorFlow's padding; losses by formulas in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_network
from torch import nn
from torchvision.models import efficientnet_b0

from micronet import (
    Conv2dSame, Cosine, GlobalAverage, MBConv, WideDepthwise, initialize, margin_loss, project_gated, refined_loss,
    scaled_channels,
)  # fmt: skip


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


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_tensorflows_same_and_gradients_are_autograds(kernel: int, stride: int, groups: int) -> None:
    """TensorFlow: pad = (ceil(H / s) - 1) s + k - H in all, the smaller half first. Autograd's gradients in float64."""
    layer = Conv2dSame(32, 32, kernel, stride, groups)
    x = torch.randn(3, 32, 12, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    total = (12 // stride - 1) * stride + kernel - 12
    before, after = total // 2, total - total // 2
    assert stride == 1 or (before, after) == ((0, 1) if kernel == 3 else (1, 2))
    exact, weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    expected = F.conv2d(F.pad(exact, (before, after) * 2), weight, stride=stride, groups=groups)
    upon = torch.randn_like(expected)
    outputs = layer(x)
    outputs.backward(upon.float())
    expected.backward(upon)
    for ours, theirs in ((outputs, expected), (x.grad, exact.grad), (layer.weight.grad, weight.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # as a teacher
        torch.testing.assert_close(layer(x), outputs)


def test_wide_depthwise_weights_have_their_own_gradient_on_a_cpu() -> None:
    """Which is left to torch in bf16, and where a program is exported."""
    layer, x = Conv2dSame(16, 16, 5, 1, 16), torch.randn(2, 16, 8, 8)
    assert "WideDepthwise" in type(layer(x).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(x)
    assert outputs.dtype == torch.bfloat16 and "Convolution" in type(outputs.grad_fn).__name__
    frozen, biased = (Conv2dSame(16, 16, 5, 1, 16) for _ in "12")
    frozen.weight.requires_grad_(False)
    biased.bias = nn.Parameter(torch.ones(16))
    for other in (frozen, biased, Conv2dSame(16, 16, 5, 1, 2)):
        assert "Convolution" in type(other(x.requires_grad_()).grad_fn).__name__
    torch.testing.assert_close(biased(x), F.conv2d(x, biased.weight, biased.bias, padding=2, groups=16))
    with torch.no_grad():
        assert layer(x).grad_fn is None
    outputs.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    exported = torch.export.export(Conv2dSame(16, 16, 5, 2, 16).eval(), (x,))
    assert sum(n.target is torch.ops.aten.conv2d.default for n in exported.graph.nodes) == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (5, 8), (2, 2)])
def test_the_gradient_of_wide_weights_is_right_for_maps_of_any_size(size: tuple[int, int], stride: int) -> None:
    """By finite differences in float64, of maps and weights."""
    maps, weights = torch.randn(2, 3, *size, dtype=torch.double), torch.randn(3, 1, 5, 5, dtype=torch.double)
    inputs = maps.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: WideDepthwise.apply(x, weight, stride), inputs)


@pytest.mark.parametrize(("outputs", "side", "few"), [(8, 8, True), (16, 8, False), (16, 12, True)])
def test_gates_in_the_weights_are_gates_before_them(
    outputs: int, side: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of a block in training against its layers one after the other, in float64."""
    asked = []
    monkeypatch.setattr("micronet.project_gated", lambda *args: asked.append(1) or project_gated(*args))
    block = MBConv(8, outputs, 6, 3, 1, 0.0).double().train()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    found = []
    for run in (block, block.layers):
        block.apply(lambda module: module.reset_running_stats() if isinstance(module, nn.BatchNorm2d) else None)
        x = torch.randn(3, 8, side // 2, side * 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = run(x) - (x if run is block and block.has_skip else 0)
        upon = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        inputs = [x, *block.parameters()]
        found.append([y, *torch.autograd.grad(y, inputs, upon), *(buffer.clone() for buffer in block.buffers())])
        assert y.is_contiguous(memory_format=torch.channels_last) and bool(asked) is few
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    block.eval()(x)
    assert len(asked) == few  # not as a teacher


def test_global_average_is_the_mean_and_so_is_its_gradient() -> None:
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    for module in (GlobalAverage().train(), GlobalAverage().eval()):
        torch.testing.assert_close(module(x), x.mean((2, 3), keepdim=True))
        (gradient,) = torch.autograd.grad((module(x) * torch.arange(6.0).view(2, 3, 1, 1)).sum(), x)
        torch.testing.assert_close(gradient, (torch.arange(6.0) / 24).view(2, 3, 1, 1).expand_as(x))


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
    network, last, form = build_network("efficientnet_ex", width=0.25, depth=0.25), [], torch.channels_last
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda m, x, y: last.append(y.is_contiguous(memory_format=form)))
    network(torch.randn(2, 3, 32, 32).contiguous(memory_format=form))
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


@pytest.fixture
def cosines() -> torch.Tensor:
    return torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("scale", "margin"), [(5.0, 0.0), (30.0, 0.35), (8.0, 0.1)])
def test_additive_margin_softmax(cosines: torch.Tensor, scale: float, margin: float) -> None:
    labels = torch.tensor([0, 3, 9, 2, 2, 5])
    c, losses = cosines.double().numpy(), []
    for row, y in zip(c, labels.tolist()):
        true = np.exp(scale * (row[y] - margin))
        others = sum(np.exp(scale * row[j]) for j in range(10) if j != y)
        losses.append(-np.log(true / (true + others)))
    assert margin_loss(cosines, labels, scale, margin).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_refined_labels(cosines: torch.Tensor) -> None:
    teacher = cosines.flip(1)
    s, t = 5 * cosines.double().numpy(), 5 * teacher.double().numpy()
    p = np.exp(t) / np.exp(t).sum(1, keepdims=True)
    log_q = s - np.log(np.exp(s).sum(1, keepdims=True))
    assert refined_loss(cosines, teacher, 5.0).item() == pytest.approx(-(p * log_q).sum(1).mean(), rel=1e-5)
