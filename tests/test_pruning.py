"""Stages that start from another network and prune: what goes, that it stays away, and that going on changes no bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, build_network, invoke, refused
from safetensors.torch import load_file
from torch import Tensor, nn

import micronet
from micronet import Stage, load_checkpoint, load_network, load_stages, prune, read_metadata, sparsity_at

PRUNED = (
    TINY
    + """
[stage.sparse]
network = "ex"
teacher = "first"
start = "second"
sparsity = 0.6
prune_epochs = 2
epochs = 4
lr = { schedule = "cosine", peak = 0.02 }
"""
)


def weights_of(network: nn.Module) -> list[Tensor]:
    """Return the weights of convolutions and linear layers."""
    return [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def share(network: nn.Module) -> tuple[int, int]:
    """Return how many weights but the stem's are zero, and how many there are."""
    weights = weights_of(network)[1:]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@pytest.fixture(scope="module")
def sparse(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of `trained` and one that prunes the second, trained to its end."""
    folder = tmp_path_factory.mktemp("sparse")
    shutil.copytree(trained / "ckpt", folder / "ckpt")
    (folder / "stages.toml").write_text(PRUNED)
    result = invoke("run-stage", "sparse", "--stages", folder / "stages.toml", "--ckpt", folder / "ckpt")
    assert result.exit_code == 0, result.output
    assert "starts from: second, " in result.output and "pruned: 60 % of the weights, over 2 epochs" in result.output
    return folder


def test_lamp_by_hand() -> None:
    """Each value's square over the sum of the squares in its layer that are not smaller."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 4, 1), nn.Linear(3, 1))
    first = network[0].weight.detach().clone()
    # squares 1, 4, 9, 16: 1/30, 4/29, 9/25, 1; squares 100, 400, 400: 100/900, 400/800 and, the last of equals, 1
    network[1].weight.data = torch.tensor([-1.0, 2.0, -3.0, 4.0]).view(4, 1, 1, 1)
    network[2].weight.data = torch.tensor([[20.0, -10.0, -20.0]])
    order = [(1, 0), (2, 1), (1, 1), (1, 2), (2, 0)]  # of layer and place
    for n in range(1, 6):
        weights, masks = prune(network, n / 7)
        gone = {(1 + layer, int(i)) for layer, m in enumerate(masks) for i in (m.flatten() == 0).nonzero()}
        assert gone == set(order[:n])
        assert all(torch.equal(w, w * m) for w, m in zip(weights, masks))
    assert torch.equal(network[0].weight, first) and share(network) == (5, 7)
    assert prune(network, 0.0) == ([], [])


def test_a_layer_without_a_weight_left_breaks_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(network[1].weight)
    nn.init.ones_(network[2].weight)
    weights, masks = prune(network, 10 / 16)
    assert share(network) == (10, 16) and not masks[0].any() and all(w.isfinite().all() for w in weights)
    assert prune(network, 0.01)[1][1].sum() == 6  # a share that comes to no weight prunes none


def test_the_last_weight_goes_no_later_than_asked() -> None:
    """The largest weight of every layer has rank 1: among them the first ones go, not all."""
    network = nn.Sequential(*[nn.Conv2d(1, 2, 1) for _ in range(5)])
    prune(network, 6 / 8)
    assert share(network) == (6, 8) and [int((w != 0).sum()) for w in weights_of(network)] == [2, 0, 0, 1, 1]
    prune(network, 2 / 8)  # fewer than are zero already
    weights, masks = prune(network, 2 / 8)
    assert share(network) == (6, 8) and all(torch.equal(w != 0, m != 0) for w, m in zip(weights, masks))


def test_a_folded_classifier_answers_in_float32_whatever_the_precision() -> None:
    network = micronet.build_network(Stage("s", network="efficientnet_ex", width=0.1, depth=0.1, sparsity=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network.eval()(torch.randn(2, 3, 32, 32))
    assert outputs.dtype == torch.float32 and not torch.equal(outputs, outputs.bfloat16().float())


def test_many_stages_are_checked_in_no_time(write: Callable[..., Path]) -> None:
    """Each taught by the one before it, which it also starts from: 2^300 ways."""
    text = TINY.replace("[stage.second]\n", "[stage.s0]\n").replace('teacher = "first"', "")
    for n in range(1, 300):
        text += f'[stage.s{n}]\nnetwork = "ex"\nteacher = "s{n - 1}"\nstart = "s{n - 1}"\n'
    stages = load_stages(write(text))
    assert micronet.with_parents(stages, ["s299"])[-1].name == "s299" and len(stages) == 301


def test_lamp_against_its_formula_in_another_order() -> None:
    torch.manual_seed(0)
    network = build_network("efficientnet_ex", width=0.1, depth=0.1)
    before = [w.double() for w in weights_of(network)[1:]]
    scores = [torch.stack([x**2 / (w[w.abs() >= x.abs()] ** 2).sum() for x in w.flatten()]) for w in before[:4]]
    prune(network, 0.37)
    zeros, values = share(network)
    assert zeros == round(0.37 * values)
    kept = [w != 0 for w in weights_of(network)[1:]]
    pairs = [(s[~k.flatten()], s[k.flatten()]) for s, k in zip(scores, kept)]
    gone, left = (torch.cat(side) for side in zip(*pairs))
    assert gone.max() < left.min()  # one threshold for all layers


def test_the_share_rises_by_the_cubic_schedule() -> None:
    stage = Stage("s", network="efficientnet_ex", sparsity=0.8, prune_epochs=4, epochs=9)
    rising = [0.8 * (1 - 27 / 64), 0.8 * (1 - 8 / 64), 0.8 * (1 - 1 / 64)]
    assert [sparsity_at(stage, epoch) for epoch in range(1, 10)] == pytest.approx(rising + [0.8] * 6)
    assert sparsity_at(Stage("s", network="efficientnet_ex"), 1) == 0


def test_a_pruned_stage_ends_at_its_sparsity_and_starts_from_another(sparse: Path, trained: Path) -> None:
    folder = sparse / "ckpt" / "sparse"
    tensors, about = load_checkpoint(folder / "best.safetensors")
    network = load_network(folder)
    zeros, values = share(network)
    assert zeros == round(0.6 * values) and about.best.epoch >= 2
    assert isinstance(network.cosine, nn.Identity) and network.embedding.weight.shape == (10, 128)
    assert all((t > 0).all() for name, t in tensors.items() if name.endswith("running_var"))
    start = load_checkpoint(trained / "ckpt" / "second" / "best.safetensors")[1]
    assert about.start.identity == ("second", start.tensors) and about.teacher.stage == "first"
    assert "ex, 60 % zero" in invoke("show", "--ckpt", sparse / "ckpt").output
    assert json.loads(invoke("show", "--ckpt", sparse / "ckpt", "--json").output)[-1]["sparsity"] == 0.6
    steps = {int(t) for name, t in load_file(folder / "last.safetensors").items() if name.endswith("tracked")}
    assert steps == {3 * 6}  # of epochs 2, the last that pruned, to 4
    early, late = (load_file(folder / f"{name}.safetensors") for name in ("previous", "last"))
    places = [name for name, t in early.items() if t.ndim > 1 and not name.startswith("momentum.")]
    assert all(torch.equal(early[name] == 0, late[name] == 0) for name in places)  # of epochs 3 and 4
    assert any(not torch.equal(early[name], late[name]) for name in places)


def test_weights_come_from_the_start(trained: Path, tmp_path: Path) -> None:
    """With a rate of next to nothing the network stays the one that it started from, its statistics made anew."""
    third = '[stage.third]\nnetwork = "ex"\nstart = "second"\n'
    (tmp_path / "stages.toml").write_text(TINY.replace("[[2, 0.02], [3, 0.002]]", "[[3, 1e-30]]") + third)
    shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    result = invoke("run-stage", "third", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path / "ckpt")
    assert result.exit_code == 0, result.output
    ours, theirs = (load_checkpoint(tmp_path / "ckpt" / name / "best.safetensors")[0] for name in ("third", "second"))
    for name in ours.keys() - {name for name in ours if name.endswith("tracked")}:
        assert torch.equal(ours[name], theirs[name]) == ("running" not in name)


def test_a_folded_classifier_answers_in_cosines(trained: Path) -> None:
    network = load_network(trained / "ckpt" / "second")
    pixels = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        cosines = network(micronet.normalize(pixels.float() / 255))
        folded = micronet.fold_classifier(network, micronet.embedding_length(network, pixels))
        answers = folded(micronet.normalize(pixels.float() / 255))
    assert torch.equal(answers.argmax(1), cosines.argmax(1))
    assert 0.9 < (answers.norm() / cosines.norm()).item() < 1.1
    assert micronet.embedding_length(folded, pixels) == 1
    stage = replace(read_metadata(trained / "ckpt" / "second").stage, sparsity=1e-9)
    images = micronet.Images(pixels, torch.zeros(100, dtype=torch.int64), [])
    start = load_network(trained / "ckpt" / "second")
    run = micronet.new_run(stage, micronet.open_accelerator(), images, images, start)
    with torch.no_grad():
        torch.testing.assert_close(run.student.eval()(micronet.normalize(pixels.float() / 255)), answers)


def test_a_start_is_refused_as_a_teacher_is(sparse: Path, tmp_path: Path) -> None:
    """An export, a stage that is not finished, a file of another width, none: a chain says so before it trains."""
    ckpt = shutil.copytree(sparse / "ckpt", tmp_path / "ckpt")
    invoke("export", ckpt / "second", tmp_path / "out.safetensors", "--data", tmp_path)
    shutil.copy(ckpt / "second" / "previous.safetensors", ckpt / "second" / "last.safetensors")
    (ckpt / "own").mkdir()
    shutil.copy(ckpt / "first" / "best.safetensors", ckpt / "own" / "best.safetensors")
    for start, width, code, words in (
        (tmp_path / "out.safetensors", 0.1, 2, "is exported, with no cosines"),
        ("second", 0.1, 2, "its start second is not finished"),
        (ckpt / "sparse", 0.2, 3, "width = 0.1: expected 0.2, as stage own has it"),
        (tmp_path / "none.safetensors", 0.1, 2, "is not there: expected a checkpoint, seen from /"),
    ):
        text = PRUNED + f'[stage.own]\nnetwork = "ex"\nstart = "{start}"\nsparsity = 0.6\nwidth = {width}\n'
        (tmp_path / "stages.toml").write_text(text)
        shutil.rmtree(ckpt / "own", ignore_errors=True)
        for command in ["run-stage"] if start == "second" else ["run-stage", "chain --dry-run"]:
            result = invoke(*command.split(), "own", "--stages", tmp_path / "stages.toml", "--ckpt", ckpt)
            assert refused(result, words, code=code)


def test_a_start_that_the_stage_does_not_name_contradicts(sparse: Path) -> None:
    about = read_metadata(sparse / "ckpt" / "sparse")
    for wrong in (replace(about, start=None), replace(about, stage=replace(about.stage, start=None))):
        with pytest.raises(ValueError, match="parents contradicts"):
            wrong.check()
    with pytest.raises(ValueError, match="best contradicts"):
        replace(about, best=micronet.tested_at(about.history[0])).check()


def test_a_pruned_stage_goes_on_to_the_same_bits_without_its_start(sparse: Path, tmp_path: Path) -> None:
    """From the state of epoch 1, in the middle of pruning, and of epoch 3."""
    whole = load_file(sparse / "ckpt" / "sparse" / "last.safetensors")
    shutil.copytree(sparse / "ckpt" / "first", tmp_path / "ckpt" / "first")
    shutil.copytree(sparse / "ckpt" / "second", tmp_path / "ckpt" / "second")
    command = ("run-stage", "sparse", "--stages", sparse / "stages.toml", "--ckpt", tmp_path / "ckpt")

    class Enough(Exception):
        pass

    def stop(folder: Path, stage: Stage, run: micronet.Run, save: Callable[..., None] = micronet.save_epoch) -> None:
        save(folder, stage, run)
        if len(run.history) in (1, 3) and len(run.history) not in stopped:
            stopped.append(len(run.history))
            raise Enough

    stopped: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micronet, "save_epoch", stop)
        for _ in range(2):
            with pytest.raises(Enough):
                invoke(*command)
            shutil.rmtree(tmp_path / "ckpt" / "second", ignore_errors=True)
        assert invoke(*command).exit_code == 0 and stopped == [1, 3]
    again = load_file(tmp_path / "ckpt" / "sparse" / "last.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_best_epoch_is_none_of_a_denser_network(sparse: Path) -> None:
    """The first epoch, denser, is made the most accurate."""
    stage = load_stages(sparse / "stages.toml")["sparse"]
    accelerator = micronet.open_accelerator()
    train, test = (micronet.load_images(stage, Path("data"), part) for part in ("train", "test"))
    run = micronet.new_run(stage, accelerator, train, test)
    run.teacher = build_network("efficientnet_b0", 10, 0.1, 0.1).eval()
    accuracies = iter([90.0, 10.0, 5.0, 20.0])
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micronet, "accuracy", lambda *_: (next(accuracies), 100.0, 1.0))
        for name in ("reset_statistics", "debias_statistics"):  # each epoch that prunes begins and ends with one
            note = lambda network, name=name, real=getattr(micronet, name): (
                calls.append((name, len(run.history))) or real(network)
            )  # noqa: E501, E731
            patch.setattr(micronet, name, note)
        done = [e.best.epoch for e in micronet.train_stage(stage, run) if isinstance(e, micronet.EpochDone)]
    assert done == [1, 2, 2, 4]
    assert calls == [(f"{name}_statistics", done) for done in (0, 1) for name in ("reset", "debias")]


def test_a_pruned_network_starts_none_that_is_denser(sparse: Path, tmp_path: Path) -> None:
    for sparsity, code in ((0.5, 2), (0.6, 0)):
        text = PRUNED + f'[stage.denser]\nnetwork = "ex"\nstart = "sparse"\nsparsity = {sparsity}\n'
        (tmp_path / "stages.toml").write_text(text)
        result = invoke("chain", "--stages", tmp_path / "stages.toml", "--ckpt", sparse / "ckpt", "--dry-run")
        assert result.exit_code == code, result.output
        assert code == 0 or "sparsity = 0.5: expected that of its start sparse, 0.6 or more" in result.output
    text = text.replace('start = "sparse"', f'start = "{sparse / "ckpt" / "sparse"}"').replace("= 0.6\n", "= 0.5\n")
    (tmp_path / "stages.toml").write_text(text)
    command = ("run-stage", "denser", "--stages", tmp_path / "stages.toml", "--ckpt", sparse / "ckpt")
    words = "sparse/best.safetensors: sparsity = 0.6: expected 0.5 or less, as stage denser has it"
    assert refused(invoke(*command), words, code=3)


def test_a_chain_trains_the_start_first_and_not_again(sparse: Path, tmp_path: Path) -> None:
    """What a stage starts from is needed until it has kept an epoch, its teacher until its end."""
    stages = load_stages(sparse / "stages.toml")

    def chain() -> list[str]:
        return [kept.stage.name for kept in micronet.kept_chain(stages, ["sparse"], tmp_path, anew=False)]

    assert chain() == ["first", "second", "sparse"]
    folder = tmp_path / "sparse"
    folder.mkdir()
    shutil.copy(sparse / "ckpt" / "sparse" / "previous.safetensors", folder / "last.safetensors")
    assert chain() == ["first", "sparse"]
    command = ("chain", "sparse", "--stages", sparse / "stages.toml", "--ckpt", tmp_path, "--dry-run")
    assert invoke(*command).exit_code == 0
    shutil.copy(sparse / "ckpt" / "sparse" / "last.safetensors", folder / "last.safetensors")
    assert chain() == ["sparse"]


def odd() -> dict[str, Tensor]:
    """Weights of sizes that are no multiples of 8; sparse, dense, all zero, and a bias, which is never packed."""
    first, empty = torch.zeros(3, 7), torch.zeros(5, 5)
    first[0, 0], first[1, 1], first[2, 6] = 1.0, -2.0, 3.0
    return {"first": first, "dense": torch.ones(3, 3), "empty": empty, "bias": torch.zeros(9)}


@pytest.mark.parametrize(
    ("dtype", "sparse", "dense"), [(torch.half, 15, 16), (torch.float, 15, 16), (torch.int8, 14, 15)]
)
def test_what_is_stored_by_hand(dtype: torch.dtype, sparse: int, dense: int) -> None:
    """16 values of b bits and a mask of 16: less than 16 b where v values stay with v b + 16 < 16 b."""
    weight = torch.zeros(2, 8, dtype=dtype)
    for values in range(17):
        weight.flatten()[:values] = 1
        bits = 8 if dtype == torch.int8 else 16
        assert micronet.stored(weight) == ((values, 16) if bits * values + 16 < bits * 16 else (16, 0))
    assert bits * (sparse - 1) + 16 < bits * 16 <= bits * dense + 16


def test_packed_by_hand() -> None:
    """The highest bit of a mask's first byte is the first position; 21 positions take three bytes."""
    packed = micronet.pack({name: tensor.half() for name, tensor in odd().items()})
    assert packed.keys() == {"first", "first.mask", "dense", "empty", "empty.mask", "bias"}
    assert packed["first"].tolist() == [1, -2, 3] and packed["first.mask"].tolist() == [0b10000000, 0b10000000, 0b1000]
    assert packed["empty"].numel() == 0 and packed["empty.mask"].tolist() == [0] * 4
    dense = micronet.unpack(Path("x"), packed, odd())
    assert dense.keys() == odd().keys() and all(torch.equal(dense[name].float(), odd()[name]) for name in dense)


DAMAGE = {
    "a value less": lambda p: p | {"first": p["first"][:2]},
    "a mask of nothing": lambda p: p | {"ghost.mask": p["first.mask"]},
    "a bit more": lambda p: p | {"first.mask": p["first.mask"] | 1},
    "a bit past the end": lambda p: p | {"first.mask": torch.tensor([128, 128, 1], dtype=torch.uint8)},
    "a byte more": lambda p: p | {"first.mask": nn.functional.pad(p["first.mask"], (0, 1))},
    "another type": lambda p: p | {"first.mask": p["first.mask"].int()},
    "values with a shape": lambda p: p | {"first": p["first"][:, None]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_masks_that_do_not_match_are_refused(damage: str) -> None:
    packed = micronet.pack({name: tensor.half() for name, tensor in odd().items()})
    network = nn.Module()
    network.state_dict = odd
    words = "ghost.mask is not in this network" if "nothing" in damage else "first does not match its mask"
    with pytest.raises(micronet.Refused, match=f"x: {words}"):
        micronet.fill_network(Path("x"), network, micronet.unpack(Path("x"), DAMAGE[damage](packed), odd()))


def test_counted_bytes_are_stored_and_read_again(sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.safetensors"
    result = invoke("export", sparse / "ckpt" / "sparse", out, "--data", tmp_path, "--json", "--card")
    (result,) = json.loads(result.output)
    stored = load_file(out)
    assert sum(t.numel() * t.itemsize for t in stored.values()) == result["counted_bytes"] < 2 * result["bytes"]
    assert result["agree"] >= 0.98 * result["images"] and result["bytes"] == out.stat().st_size
    before, after = (share(load_network(path)) for path in (sparse / "ckpt" / "sparse", out))
    assert before == after
    assert "pruned: 60 % of the weights, over 2 epochs" in (tmp_path / "README.md").read_text()
    (scored,) = json.loads(invoke("score", out, "--rules", "official", "--json").output)
    assert 2 * scored["params"] + scored["mask_bits"] / 8 == result["counted_bytes"]


def test_eight_bits_are_packed_and_predict_nearly_the_same(sparse: Path, tmp_path: Path) -> None:
    """Weights by channel, activations by what they are on training images; the same bytes every time."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    outs = [tmp_path / f"{n}.onnx" for n in range(2)]
    said = [json.loads(invoke("export", sparse / "ckpt" / "sparse", o, "--bits", 8, "--json").output)[0] for o in outs]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    result, graph = said[0], onnx.load(outs[0]).graph
    stored = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    assert result["bytes"] == outs[0].stat().st_size and len(result["milliseconds"]) == 2 and result["score"] is None
    assert result["agree"] >= 0.8 * result["images"]
    kinds = {node.op_type for node in graph.node}
    assert {s.shape for s in stored if s.dtype == "float32"} > {(), (48,)}  # scales of activations, and of channels
    assert {"QuantizeLinear", "DequantizeLinear", "Unpack"} <= kinds and not any(w.dtype == "float16" for w in stored)
    weights = [stored[i] for i, each in enumerate(graph.initializer) if each.data_type == onnx.TensorProto.INT8]
    scored = json.loads(invoke("score", outs[0], "--json").output)
    assert [each["rules"] for each in scored] == ["official"] and scored[0]["bytes"] == result["counted_bytes"]
    assert scored[0]["params"] > 0.9 * sum(len(w) for w in weights if w.ndim == 1) and scored[0]["score"] is None
    network, about = micronet.open_network(outs[0])
    assert about.exported.bits == 8 and about.exported.top1 == result["top1"]
    images = micronet.normalize(micronet.synthetic_images(20, False).pixels.float() / 255)  # which it is scaled for
    with torch.no_grad():
        exact = micronet.fold_network(load_network(sparse / "ckpt" / "sparse"))(images)
    assert (network(images) - exact).norm() < 0.3 * exact.norm()  # 0.23: means over tens of 40 images cut off more


def test_a_far_value_does_not_make_steps_coarse() -> None:
    """A range is the mean of ten images' ranges: here 99 of 100 are from 100 to 150 and one is from 100 to 255.

    All-zero weights leave their channel's bias as it is; onnxruntime's own step for it is that of the input.
    """
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pixels = torch.randint(100, 151, (1000, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[0, 0, 0, 0] = 255
    network = micronet.fold_network(build_network("efficientnet_ex", 10, 0.12, 0.2))
    nn.init.zeros_(network.stem[0].weight[:2]), nn.init.constant_(network.stem[0].bias, 0.00123)
    graph = micronet.quantized(micronet.to_onnx(network).SerializeToString(), pixels).graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    first = next(node for node in graph.node if node.input[0] == "images")
    red, blue = (1 - 0.4914) / 0.2470, (150 / 255 - 0.4465) / 0.2616
    most, least = 0.99 * blue + 0.01 * red, (100 / 255 - 0.4914) / 0.2470
    assert held[first.input[1]] == pytest.approx((most - least) / 255, rel=1e-5)
    made = {node.output[0]: node for node in graph.node}
    bias = made[next(node for node in graph.node if node.op_type == "Conv").input[2]].input
    assert held[bias[0]] * held[bias[1]] == pytest.approx([0.00123] * 8, rel=0.01)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_bias_of_zeros_is_exported(bits: int, sparse: Path, tmp_path: Path) -> None:
    """torch leaves such biases out of an ONNX graph: here a gate's, the stem's (16 bits hold no 1e-9), the last."""
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    tensors, about = load_checkpoint(micronet.best_path(sparse / "ckpt" / "sparse"))
    for name in ("blocks.0.layers.3.1.bias", "stem.1.bias", "stem.1.running_mean", "embedding.bias"):
        tensors[name] = torch.full_like(tensors[name], 1e-9 if "stem" in name else 0.0)
    micronet.save_checkpoint(tmp_path / "zeros.safetensors", tensors, about)
    out = tmp_path / "zeros.onnx"
    (result,) = json.loads(invoke("export", tmp_path / "zeros.safetensors", out, "--bits", bits, "--json").output)
    (scored,) = json.loads(invoke("score", out, "--rules", "official", "--json").output)
    assert scored["bytes"] == result["counted_bytes"] and result["agree"] >= 0.8 * result["images"]


def test_an_onnx_file_is_counted_as_what_it_was_exported_from(sparse: Path, tmp_path: Path) -> None:
    """With the file's own weights; one whose metadata are of another network is refused, and 8 bits have one count."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    outs = [tmp_path / f"sparse.{ending}" for ending in ("safetensors", "onnx")]
    for out in outs:
        assert invoke("export", sparse / "ckpt" / "sparse", out, "--data", tmp_path).exit_code == 0
    counted = [json.loads(invoke("score", out, "--json", "--layers").stdout) for out in outs]
    assert len(counted[0]) == 2 and counted[0][1]["mask_bits"] > 0
    assert [r | {"name": ""} for r in counted[0]] == [r | {"name": ""} for r in counted[1]]
    eight = tmp_path / "eight.onnx"
    invoke("export", sparse / "ckpt" / "sparse", eight, "--bits", 8)
    for source, change in (
        (outs[1], {"stage": {"width": 1.5}}),
        (outs[1], {"exported": {"bits": 8}}),
        (eight, {"exported": {"bits": 16}}),
    ):
        model = onnx.load(source)
        (held,) = model.metadata_props
        about = json.loads(held.value)
        for key, table in change.items():
            about[key] |= table
        held.value = json.dumps(about)
        onnx.save(model, tmp_path / "forged.onnx")
        forged = invoke("score", tmp_path / "forged.onnx")
        assert refused(forged, "forged.onnx: its metadata are of another network", code=3)
    again = invoke("export", eight, tmp_path / "again.onnx")
    assert refused(again, "eight.onnx: expected a checkpoint or .safetensors")
    assert refused(invoke("score", eight, "--rules", "seed"), "eight.onnx: the authors have no count for 8 bits")


@pytest.mark.parametrize(("out", "bits"), [("x.safetensors", 8), ("x.pt2", 8), ("x.onnx", 4)])
def test_bits_are_16_or_8_in_an_onnx(out: str, bits: int, sparse: Path, tmp_path: Path) -> None:
    result = invoke("export", sparse / "ckpt" / "sparse", tmp_path / out, "--bits", bits)
    assert refused(result, f"--bits {bits}: expected 16, or 8 for a name that ends in .onnx")


@pytest.mark.parametrize(("bits", "overhead"), [(16, 9_000), (8, 30_000)])
def test_onnx_runs_the_graph_and_the_bits_of_the_dense_one(
    bits: int, overhead: int, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What packing and shortening take out, a runtime puts in again when it loads the file."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    graphs, outputs = [], []
    pixels = torch.randn(5, 3, 32, 32)
    for name in ("packed", "dense"):
        out, run = tmp_path / f"{name}.onnx", tmp_path / f"{name}.run.onnx"
        result = invoke("export", sparse / "ckpt" / "sparse", out, "--bits", bits, "--json")
        monkeypatch.setattr(micronet, "pack_onnx", lambda model, bits: None)
        monkeypatch.setattr(micronet, "shorten", lambda model: None)
        (said,) = json.loads(result.output)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(run), 3
        session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"images": pixels.numpy()})[0])
        graphs.append([(node.op_type, len(node.input)) for node in onnx.load(run).graph.node])
        onnx.checker.check_model(onnx.load(out), full_check=True)
        assert name == "dense" or said["bytes"] == out.stat().st_size < said["counted_bytes"] + overhead
    assert graphs[0] == graphs[1] and (outputs[0] == outputs[1]).all()
    assert (tmp_path / "packed.onnx").stat().st_size < 0.4 * (tmp_path / "dense.onnx").stat().st_size


@pytest.mark.parametrize("bits", [16, 8])
def test_sparse_weights_are_unpacked_where_a_mask_ends_within_a_byte(bits: int) -> None:
    """21 and 16 positions behind one mask of five bytes; what is dense stays as it is at 8 bits."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    kind = {16: onnx.TensorProto.FLOAT, 8: onnx.TensorProto.INT8}[bits]
    weights = {"a": torch.zeros(3, 7), "b": torch.zeros(4, 4), "c": torch.ones(2, 2), "d": torch.ones(3)}
    weights["a"].flatten()[[0, 8, 20]] = torch.tensor([1.0, -2.0, 3.0])
    weights["b"][3, 3] = 5
    held = {name: weight.float() if bits == 16 else weight.char() for name, weight in weights.items()}
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}.out"]) for name in weights]
    outs = [onnx.helper.make_tensor_value_info(f"{name}.out", kind, weight.shape) for name, weight in weights.items()]
    tensors = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in held.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], outs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    micronet.pack_onnx(model, bits)
    kept = {each.name: onnx.numpy_helper.to_array(each).tolist() for each in model.graph.initializer}
    assert kept["values"] == [1, -2, 3, 5, 0] and kept["mask"] == [0b10000000, 0b10000000, 0b1000, 0, 0b1000]
    assert kept.get("rest.16") == ([1.0] * 7 if bits == 16 else None) and ("c" in kept) == (bits == 8)
    run = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    assert all((found == held[name].numpy()).all() for name, found in zip(weights, run))


def test_the_stages_for_the_board_score_what_they_are_called() -> None:
    """With the weights that they begin with; those of fast.toml are its own."""
    stages, fast = (load_stages(ROOT / f"{name}.toml") for name in ("tiny", "fast"))
    assert {name: stages[name] for name in ("b3", "exx")} == {name: fast[name] for name in ("b3", "exx")}
    pruned = [stage for stage in stages.values() if stage.sparsity]
    assert len(pruned) == 6
    for stage in pruned:
        torch.manual_seed(0)
        network = micronet.build_network(stage)
        prune(network, stage.sparsity)
        cost = micronet.total_cost(micronet.layer_costs(micronet.fold_network(network.eval()), "official").values())
        assert cost.score == pytest.approx(int(stage.name.split("_")[1]) / 10_000, abs=5e-5)


@pytest.mark.parametrize(("bits", "score", "ops"), [(16, 0.0123, "25"), (8, 0.0101, "40")])
def test_a_card_tells_bits_and_counts_what_they_earn(bits: int, score: float | None, ops: str) -> None:
    """A scored network; at 8 bits the free 16 are lost."""
    tested = micronet.Tested(3, 70.0, 90.0)
    stage = Stage("s", network="efficientnet_ex", sparsity=0.8, prune_epochs=2, epochs=3)
    start = micronet.Parent("x", "wide", "0", tested)
    about = micronet.Metadata(stage, (), 3, tested, tested, start=start, images={"test": "0"})
    cost = micronet.Cost(10, 20, 30, 10) if bits == 16 else micronet.EightBitCost(10, 20, 30, 10, 0, 18, 40, 35)
    result = {"bits": bits, "score": score, "top1": 69.5, "images": 100, "on": "test images", "bytes": 77}
    card = micronet.model_card(Path("x.onnx"), about, 1.5, cost, result)
    assert f"| MicroNet score | {score:.4f} |" in card and f"| bits of a weight | {bits} |" in card
    half = {16: "a multiplication of 16 bits counting half", 8: "one of 8 bits counting a quarter"}[bits]
    assert f"| operations, {half} | {ops} |" in card and "of 100 test images of epoch 3, the last" in card
    assert "images of cifar100, begun with the weights of wide (70.00 %), pruned: 80 % of the weights, over 2" in card
