"""Every claim of this project as a test.  Run: pytest -q test_all.py"""

import itertools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import spl
import train_arc
from block import Block, MoIE
from dynsiha import DynSIHA, rotary, rotate
from model import SEP, START, Config, Transformer, advance, evaluate, pi_score, positions, task_loss, unpadded
from spl import SparseProtoLinear, goodness, jsd, mas_normalize, mas_reference, routing_loss, spl_reference

HERE = Path(__file__).parent
ARC1, ARC2 = HERE / "data/arc-agi-1", HERE / "data/arc-agi-2"
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SHAPES = [(8,), (5, 8), (2, 3, 8)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_spl(D_in=8, D_out=12, dtype=torch.float64, device="cpu"):
    """An SPL with random gates and biases, so that every term of the formula matters."""
    layer = SparseProtoLinear(D_in, D_out)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.to(device, dtype)


def weights(layer):
    return layer.mu_weight, layer.mu_bias, layer.proto_weight, layer.gate_weight


def matrices(module):
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


# ---------------------------------------------------------------------------------------------- spl.py
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_spl_equals_the_literal_formula(shape):
    layer, x = random_spl(), torch.randn(shape, dtype=torch.float64)
    y, logits, mask = spl_reference(x, *weights(layer))
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.route(x), (logits, mask))
    assert layer(x).shape == shape[:-1] + (12,)


def test_mas_and_its_gradient_equal_the_formula_through_autograd():
    z = torch.randn(50, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(50, 9, dtype=torch.float64)
    torch.testing.assert_close(mas_normalize(z), mas_reference(z))
    ours, = torch.autograd.grad(mas_normalize(z), z, g)
    theirs, = torch.autograd.grad(mas_reference(z), z, g)
    torch.testing.assert_close(ours, theirs)


def test_spl_passes_gradcheck():
    layer, x = random_spl(4, 5), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *params):
        return torch.func.functional_call(layer, dict(zip(names, params)), (x,))
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_every_parameter_learns_at_init_and_after_ten_steps(tmp_path):
    """Within an epoch of ARC every row of every matrix gets a gradient, gate rows included: no neuron's cost is dead.

    One batch is not enough: a gate is heard only where its neuron fires and pays, or has the highest cost of all.
    """
    _, run, _ = train_arc.parse(["--no-ffn", "--device", "cpu", "--data", str(ARC1), "--out", str(tmp_path)])
    names, pairs, _ = train_arc.load_data(run, torch.device("cpu"))
    model = Transformer(Config(n_task=len(names), d_model=64, n_head=1, n_layer=2, ffn_factor=0))
    nn.init.normal_(model.head.weight, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def backward(batch):
        *inputs, targets = train_arc.collate(batch, torch.device("cpu"))
        task_loss(model, *inputs, targets).backward()

    stream = train_arc.batches(pairs, run)
    for moment in ("at init", "after ten steps"):
        model.zero_grad()
        for _, batch in itertools.takewhile(lambda item: item[0] == 0, train_arc.batches(pairs, run)):
            backward(batch)
        for name, p in model.named_parameters():
            dead = (p.grad.reshape(len(p), -1).abs().sum(1) == 0).nonzero().flatten().tolist()
            assert dead == ([train_arc.END] if name == "token.weight" else []), f"{moment}: rows {dead} of {name}"
        for _ in range(10):
            model.zero_grad()
            backward(next(stream)[1])
            optimizer.step()


def test_a_zero_gate_is_dead():
    layer = SparseProtoLinear(8, 8)
    nn.init.zeros_(layer.gate_weight)
    layer(torch.randn(5, 8)).square().sum().backward()
    assert layer.gate_weight.grad.abs().sum() == 0 and layer.proto_weight.grad.abs().sum() > 0


def test_mas_lies_in_0_1_and_ignores_positive_scale():
    z = torch.randn(100, 7, dtype=torch.float64)
    m = mas_normalize(z)
    assert m.min() == 0 and m.max() == 1
    torch.testing.assert_close(mas_normalize(37.5 * z), m)
    assert not torch.allclose(mas_normalize(-z), m)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_half_precision_stay_finite(device, dtype):
    layer = random_spl(dtype=dtype, device=device)
    nn.init.zeros_(layer.mu_bias)
    x = torch.randn(6, 8, device=device, dtype=dtype)
    x[::2] = 0
    x.requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and not y[::2].any() and y[1::2].any()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_spl_under_autocast_and_compile(device, compiled):
    """Close to the literal formula, gradients too: a maximum compared with its own rounding gave NaN here."""
    layer = random_spl(64, 64, torch.float32, device)
    x = torch.randn(33, 64, device=device)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    g = torch.randn(33, 64, device=device)
    exact = spl_reference(x, *weights(layer))[0]
    expected = torch.autograd.grad(exact, layer.parameters(), g)
    with torch.autocast(device, torch.bfloat16):
        y = run(x)
    y.backward(g.bfloat16())
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.05 * exact.norm()
    for (name, p), reference in zip(layer.named_parameters(), expected):
        assert (p.grad - reference).norm() < 0.25 * reference.norm(), name    # without the maximum's share: about 1


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 0, 4)])
def test_a_single_output_feature_is_on_or_off(shape):
    layer = random_spl(4, 1)
    x = torch.randn(shape, dtype=torch.float64)
    assert layer(x).shape == shape[:-1] + (1,) and layer.route(x)[1].unique().tolist() in ([], [0], [1], [0, 1])


def test_spl_is_homogeneous_only_without_bias_and_gate():
    layer, x = random_spl(), torch.randn(20, 8, dtype=torch.float64)
    assert not torch.allclose(layer(3 * x), 3 * layer(x))
    nn.init.zeros_(layer.mu_bias)
    assert not torch.allclose(layer(3 * x), 3 * layer(x))
    nn.init.zeros_(layer.gate_weight)
    torch.testing.assert_close(layer(3 * x), 3 * layer(x))


def test_one_spl_output_computes_xor():
    layer = SparseProtoLinear(2, 1)
    for p, value in zip(weights(layer), ([[-1., -1.]], [2.], [[1., 1.]], [[0., 0.]])):
        p.data = torch.tensor(value)
    y = layer(torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]]))
    assert y.flatten().tolist() == [0, 1, 1, 0]


# ---------------------------------------------------------------------------------------------- spl.py: SARS
def test_goodness_of_two_neurons():
    """mas(e)·mas(r) = (1, .5)·(.25, 1) = (.25, .5), so worth (.5, 1) against costs (.5, 1)."""
    worth = goodness(torch.tensor([2., 1.]), torch.tensor([1., 4.]), torch.tensor([1., 2.]), eps=0.1)
    torch.testing.assert_close(worth, torch.tensor([0.5 / 0.6, 1 / 1.1]))


def test_jsd_is_0_for_equal_ln_2_for_disjoint_symmetric_and_finite_at_zeros():
    p, q = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1)
    zeros, first, second = torch.tensor([[0., 0., 0.], [1., 0., 0.], [0., .5, .5]], dtype=torch.float64)
    torch.testing.assert_close(jsd(p, p), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(jsd(p, q), jsd(q, p))
    assert (jsd(p, q) > 0).all() and abs(jsd(first, second) - math.log(2)) < 1e-12
    assert abs(jsd(zeros, first) - math.log(2) / 2) < 1e-12 and jsd(zeros, zeros) == 0
    for r in (zeros, first):
        r.requires_grad_()
        assert torch.autograd.grad(jsd(r, second), r)[0].isfinite().all()


def routed(layer, x, real):
    """The routing loss of `layer` after the backward pass of a task loss on its output."""
    y = layer(x)
    y.retain_grad()
    (y * y.detach().cos() * real[..., None]).sum().backward()
    return routing_loss(layer, x, y, real)


def test_the_routing_loss_reaches_proto_and_gate_alone():
    layer, x = random_spl(), torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    loss = routed(layer, x, torch.ones(3, 6))
    layer.zero_grad()
    x.grad = None
    loss.backward()
    assert 0 < loss < math.log(2) and x.grad is None
    assert layer.mu_weight.grad is None and layer.mu_bias.grad is None
    assert layer.proto_weight.grad.abs().sum() > 0 and layer.gate_weight.grad.abs().sum() > 0


def test_padding_counts_in_no_part_of_the_routing_loss():
    """Whatever stands in the padding, and whatever gradient, the loss is that of the tokens before it."""
    layer, x = random_spl(), torch.randn(1, 6, 8, dtype=torch.float64)
    alone = routed(layer, x[:, :4], torch.ones(1, 4))
    layer.zero_grad()
    real = torch.tensor([[1, 1, 1, 1, 0, 0]])
    y = layer(x)
    y.retain_grad()
    (y * y.detach().cos() * real[..., None]).sum().backward()
    y.grad[:, 4:] = 5
    torch.testing.assert_close(routing_loss(layer, x, y, real), alone)


def test_a_layer_whose_mask_is_zero_fails_and_gets_no_routing_gradient():
    model = Transformer(Config(d_model=8, n_head=2, n_layer=1, ffn_factor=0)).double()
    layer = model.blocks[0].attn.q
    nn.init.zeros_(layer.proto_weight)
    nn.init.zeros_(layer.gate_weight)
    zero = torch.zeros(2, dtype=torch.long)
    tokens = torch.randint(10, (2, 5))
    found = evaluate(model, [(tokens, zero, zero, tokens)])
    assert found["failed blocks.0.attn.q"] == 1 and found["active blocks.0.attn.q"] == 0
    assert found["failed blocks.0.attn.k"] == 0 and found["failed"] == 0.25
    loss = routed(layer, torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 5))
    loss.backward()
    assert loss == 0 and not layer.proto_weight.grad.any() and not layer.gate_weight.grad.any()


@pytest.mark.parametrize("cut", ["routing_loss", "task_loss"])
def test_sars_has_two_streams_that_do_not_mix(tmp_path, monkeypatch, cut):
    """Without its own loss a stream's weights stand still, exactly, while the other loss moves the rest."""
    real = getattr(train_arc, cut)
    monkeypatch.setattr(train_arc, cut, lambda *arguments: 0 * real(*arguments))
    monkeypatch.setattr(spl, "goodness", lambda e, r, k: torch.arange(1., len(e) + 1))     # one that needs no task loss
    data, flags = one_task_set(tmp_path / "data"), [*FAST, "--sars", "--weight-decay", "0"]
    start = train(data, tmp_path / "start", *flags, "--steps", "1", "--lr", "1e-7")
    end = train(data, tmp_path / "end", *flags, "--steps", "5", "--lr", "1e-2")
    for name in start:
        routing = "proto" in name or "gate" in name
        change = (start[name] - end[name]).abs().max()
        assert change < 1e-5 if routing == (cut == "routing_loss") else change > 1e-3, name


def test_sars_under_autocast_and_compile(tmp_path):
    """The same losses compiled as eager; bfloat16 close to float32."""
    data, logs = one_task_set(tmp_path / "data"), {}
    for name, flags in (("eager", []), ("compiled", ["--compile"]), ("bfloat16", ["--dtype", "bfloat16"])):
        train(data, tmp_path / name, *FAST, "--sars", "--steps", "6", "--lr", "1e-3", *flags)
        logs[name] = np.genfromtxt(tmp_path / name / "log.csv", delimiter=",", names=True)
    for name, rtol in (("compiled", 1e-3), ("bfloat16", 0.05)):
        for column in ("loss", "route_loss", "active"):
            np.testing.assert_allclose(logs["eager"][column], logs[name][column], rtol=rtol)


# ---------------------------------------------------------------------------------------------- monitors
def test_monitors_of_hand_made_tensors():
    """Four scored tokens under known logits; a Q of two neurons of which the first, the second and none fires."""
    assert abs(pi_score(0.6, 1.2, 0.3) - math.exp(-(0.5 * 0.6 / 1.2 + 0.5 * 0.3))) < 1e-12
    model = Transformer(Config(d_model=2, n_head=1, n_layer=1, ffn_factor=0))
    targets, zero = torch.tensor([[4, 4, -100, -100], [-100, 4, 5, -100]]), torch.zeros(2, dtype=torch.long)
    assert unpadded(targets).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    logits = torch.zeros(2, 4, 14)
    logits[..., 4] = 3.0
    model.head.forward = lambda x: logits
    inputs = torch.tensor([[1., -1.], [-1., 1.], [-1., -1.]])
    model.blocks[0].attn_norm.forward = lambda x: inputs[torch.tensor([[0, 1, 2, 2], [2, 0, 1, 2]])]
    q = model.blocks[0].attn.q
    nn.init.eye_(q.proto_weight)                                   # the match is x itself, and nothing costs
    nn.init.zeros_(q.gate_weight)
    found, p = evaluate(model, [(targets.clamp(min=0), zero, zero, targets)]), logits[0, 0].softmax(-1)
    assert found["tokens"] == 0.75 and found["grids"] == 0.5
    assert abs(found["loss"] - (-3 * p[4].log() - p[5].log()).item() / 4) < 1e-6
    assert abs(found["entropy"] + (p * p.log()).sum().item()) < 1e-6
    assert found["active blocks.0.attn.q"] == pytest.approx(4 / 10)      # of five tokens times two neurons
    assert found["failed blocks.0.attn.q"] == pytest.approx(1 / 5)


# ---------------------------------------------------------------------------------------------- dynsiha.py
def line(B, T, device="cpu"):
    """Positions 0..T-1 on one axis, (B, T, 1)."""
    return torch.arange(T, device=device).expand(B, T)[..., None]


def test_dynsiha_equals_its_formula_head_by_head_and_token_by_token():
    layer, x, H, h = DynSIHA(12, 3).double(), torch.randn(1, 5, 12, dtype=torch.float64), 3, 4
    rope = rotary(line(1, 5), h)
    q, k, v = (spl_reference(x[0], *weights(f))[0] for f in (layer.q, layer.k, layer.v))        # (T, D)
    q, k = (rotate(z.view(5, H, h).transpose(0, 1)[None], *rope)[0].transpose(0, 1).reshape(5, 12) for z in (q, k))
    y = torch.zeros(5, 12, dtype=torch.float64)
    for head in range(H):
        part = slice(head * h, (head + 1) * h)
        for t in range(5):
            scores = torch.stack([q[t, part] @ k[s, part] / math.sqrt(h) for s in range(t + 1)])
            y[t, part] = scores.softmax(0) @ v[:t + 1, part]
    torch.testing.assert_close(layer(x, rope)[0], spl_reference(y, *weights(layer.o))[0])


def test_moie_is_two_spls_around_a_relu():
    ffn, x = MoIE(8, 16).double(), torch.randn(7, 8, dtype=torch.float64)
    hidden = spl_reference(x, *weights(ffn.up))[0].clamp(min=0)
    torch.testing.assert_close(ffn(x), spl_reference(hidden, *weights(ffn.down))[0])


@pytest.mark.parametrize("linear", [SparseProtoLinear, nn.Linear])
def test_dynsiha_is_causal(linear):
    layer, x = DynSIHA(16, 2, linear), torch.randn(2, 9, 16)
    rope = rotary(line(2, 9), 8)
    changed = x.clone()
    changed[:, 5:] = torch.randn(2, 4, 16)
    a, b = layer(x, rope), layer(changed, rope)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])


def test_rotary_scores_depend_on_position_differences_alone():
    q, k, h = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24), 24
    pos_q, pos_k, shift = torch.tensor([[[3, 7, 0]]]), torch.tensor([[[1, 9, 1]]]), torch.tensor([[[5, 2, 1]]])

    def score(a, b):
        return (rotate(q, *rotary(a, h)) * rotate(k, *rotary(b, h))).sum()
    torch.testing.assert_close(score(pos_q, pos_k), score(pos_q + shift, pos_k + shift))
    for axis in range(3):
        moved = pos_k.clone()
        moved[..., axis] += 1
        assert not torch.allclose(score(pos_q, pos_k), score(pos_q, moved)), f"axis {axis} does not count"


def test_rotary_deals_channel_pairs_evenly():
    for axis, share in enumerate((6, 5, 5)):                       # 16 pairs over three axes
        pos = torch.zeros(1, 1, 3, dtype=torch.long)
        pos[..., axis] = 1
        assert (rotary(pos, 32)[1] != 0).sum() == share


@pytest.mark.parametrize("device", DEVICES)
def test_cached_decoding_gives_the_full_forwards_tokens_and_logits(device):
    """Prompts of different lengths, in one batch and alone, against the prefix computed anew for every token."""
    model = Transformer(Config(n_task=3, d_model=32, n_head=2, n_layer=2)).to(device, torch.float64).eval()
    nn.init.normal_(model.head.weight)
    lengths, new = torch.tensor([4, 9, 6], device=device), 70       # more columns than decoding reads at first
    tokens = torch.randint(10, (3, 9), device=device)
    tokens[:, 0] = START
    task, view = torch.arange(3, device=device), torch.tensor([5, 0, 2], device=device)
    out, logits = model.generate(tokens, lengths, task, view, new, -1, math.inf, return_logits=True)
    for row in range(3):
        sequence = tokens[row:row + 1, :lengths[row]]
        for i in range(new):
            full = model(sequence, task[row:row + 1], view[row:row + 1])[:, -1]
            torch.testing.assert_close(logits[row, i], full[0])
            assert full.argmax(-1) == out[row, i]
            sequence = torch.cat((sequence, out[row, i].view(1, 1)), 1)


def generated():
    """A random model's answer to random prompts, as a function of the options of `generate`."""
    model = Transformer(Config(d_model=16, n_head=2, n_layer=1)).eval()
    nn.init.normal_(model.head.weight)
    tokens, zero = torch.randint(10, (6, 5)), torch.zeros(6, dtype=torch.long)
    return lambda **options: model.generate(tokens, zero + 5, zero, zero, 40, **options)


def test_a_row_that_has_ended_stays_ended():
    generate = generated()
    free = generate(end=-1, limit=1000)
    end = int(free[0, 2])
    out = generate(end=end, limit=1000)
    for row, reference in zip(out, free):
        first = (reference == end).nonzero()[0].item() if (reference == end).any() else len(reference)
        assert torch.equal(row[:first], reference[:first][:len(row)]) and (row[first:] == end).all()


def test_a_row_that_leaves_the_30_by_30_format_ends():
    """A model that repeats one colour makes one long row; it is cut where <nl> would be overdue."""
    model = Transformer(Config(d_model=16, n_head=2, n_layer=1)).eval()
    model.forward = lambda tokens, *_: F.one_hot(torch.full_like(tokens, 3), 14).float()
    prompt = torch.tensor([train_arc.encode_prompt(np.ones((2, 2), np.uint8))])
    zero = torch.zeros(1, dtype=torch.long)
    assert model.generate(prompt, zero + 8, zero, zero, 900).tolist() == [[3] * 32]


# ---------------------------------------------------------------------------------------------- block.py, model.py
@pytest.mark.parametrize("D", [16, 48])
def test_weights_12_D2_without_ffn_as_many_as_the_dense_control_and_6_f_D2_more_with(D):
    plain, dense = Block(D, 2), Block(D, 2, 4 * D, dense=True)
    assert matrices(plain) == matrices(dense) == 12 * D * D
    assert not hasattr(plain, "ffn") and not hasattr(plain, "ffn_norm")
    for f in (1, 2, 4):
        assert matrices(Block(D, 2, f * D)) - matrices(plain) == matrices(MoIE(D, f * D)) == 6 * f * D * D


# ---- claims of the design study, by count ----
def flops(run, *inputs):
    # the counter knows no CPU flash kernel, so the attention runs as plain products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(*inputs)
    return counter.get_total_flops()


def test_routing_is_two_thirds_of_an_spl_so_skipping_masked_neurons_saves_at_most_half():
    """Computing only a share s of the main path is 3/(2 + s) times cheaper: 1.5x where nothing at all fires."""
    layer, x = SparseProtoLinear(64, 64), torch.randn(10, 64)
    routing = torch.cat((layer.proto_weight, layer.gate_weight))
    assert flops(layer, x) == 3 * flops(nn.Linear(64, 64), x) and flops(F.linear, x, routing) == 2 * flops(layer, x) / 3
    for s in (0.25, 0.5):
        sparse = flops(F.linear, x, routing) + flops(F.linear, x, layer.mu_weight[:int(64 * s)])
        assert flops(layer, x) / sparse == 3 / (2 + s) < 1.5


@pytest.mark.parametrize("f, share", [(1, 1 / 3), (2, 1 / 2), (4, 2 / 3)])
def test_the_ffn_is_a_third_half_or_two_thirds_of_a_block_at_most(f, share):
    """6f/(12 + 6f + 2T/D), of T = 0 the bound; so removing it cannot save an order of magnitude below f = 18."""
    D, T = 32, 16
    x, rope = torch.randn(1, T, D), rotary(line(1, T), D // 2)
    alone, both = (flops(Block(D, 2, d_ffn), x, rope) for d_ffn in (0, f * D))
    attention = 2 * 2 * T * T * D                                  # the counter sees no causal half
    assert (both - alone) / (both - attention) == pytest.approx(share)
    assert (both - alone) / both == pytest.approx(6 * f / (12 + 6 * f + 2 * T / D)) and both / alone < 1 + f / 2


def test_relu_of_spl_is_not_a_two_layer_mlp_for_it_bends_between_its_corners():
    """Along a line on which no neuron switches, a relu network is straight and an SPL is not: it is rational."""
    layer, start, step = random_spl(6, 5), *torch.randn(2, 6, dtype=torch.float64)
    path = start + 1e-3 * torch.arange(3)[:, None] * step
    mlp = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 5)).double()
    bend = {name: (y[0] - 2 * y[1] + y[2]).abs().max() for name, y in (("mlp", mlp(path)), ("spl", layer(path)))}
    assert torch.equal(layer.route(path)[1][0] > 0, layer.route(path)[1][2] > 0)
    assert bend["mlp"] < 1e-12 and bend["spl"] > 1e-9


def test_dynsiha_is_two_spls_deep_not_eight():
    """Q, K and V read the same input, none another's output; only O comes after them."""
    layer, x = DynSIHA(8, 2), torch.randn(1, 4, 8)
    outputs = {}
    for name in "qkvo":
        getattr(layer, name).register_forward_hook(lambda m, i, y, name=name: outputs.update({name: y}))
    layer(x, rotary(line(1, 4), 4))
    reads = {(name, other) for name in "qkvo" for other in "qkvo" if name != other and torch.autograd.grad(
        outputs[name].sum(), getattr(layer, other).mu_weight, retain_graph=True, allow_unused=True)[0] is not None}
    assert reads == {("o", "q"), ("o", "k"), ("o", "v")}


@pytest.mark.parametrize("config", [Config(ffn_factor=f) for f in (0, 1, 2)] + [Config(dense=True)])
def test_model_flops_equal_torchs_counter(config):
    model, B, T = Transformer(config), 3, 40
    tokens, zero = torch.randint(14, (B, T)), torch.zeros(B, dtype=torch.long)
    assert flops(model, tokens, zero, zero) == B * T * model.flops_per_token(T)


def test_parameters_are_counted_without_embeddings():
    model = Transformer(Config(n_task=1000, d_model=16, n_head=2, n_layer=3, ffn_factor=0))
    vectors = 3 * (4 * 16 + 16) + 16                               # biases and norms
    assert model.n_params() == 3 * 12 * 16 * 16 + 14 * 16 + vectors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dense", [False, True])
def test_blocks_compile_whole_and_not_anew_for_each_shape(device, dense):
    model = Transformer(Config(d_model=32, n_head=2, n_layer=3, dense=dense)).to(device)
    nn.init.normal_(model.head.weight)
    inputs = []
    for B, T in ((4, 20), (6, 31), (3, 44), (5, 17)):
        tokens = torch.randint(14, (B, T), device=device)
        zero = torch.zeros(B, dtype=torch.long, device=device)
        inputs.append((tokens, zero, zero))
    eager = [model(*i) for i in inputs]
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, expected in zip(inputs, eager):
            torch.testing.assert_close(model(*i), expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- train_arc.py: grids
@pytest.fixture(scope="session")
def arc1():
    """(tasks, solutions) of ARC-1 by split."""
    return {split: (tasks := train_arc.read_tasks(ARC1, split), train_arc.read_solutions(ARC1, split, tasks))
            for split in ("training", "evaluation")}


def all_grids(arc1):
    for tasks, solutions in arc1.values():
        for name, task in tasks.items():
            yield from [grid for pair in task.train for grid in pair] + task.test + solutions[name]


def test_arc1_is_read_whole(arc1):
    (training, known), (evaluation, asked) = arc1["training"], arc1["evaluation"]
    assert (len(training), len(evaluation)) == (400, 400)
    assert (sum(map(len, known.values())), sum(map(len, asked.values()))) == (416, 419)
    assert [sum(len(task.train) for task in tasks.values()) for tasks in (training, evaluation)] == [1302, 1363]


def test_every_grid_of_arc1_survives_tokens_and_back(arc1):
    for grid in all_grids(arc1):
        assert np.array_equal(train_arc.decode_grid(train_arc.encode_grid(grid, train_arc.END)), grid)


def test_every_view_is_undone_and_the_eight_differ():
    grid = np.arange(6).reshape(2, 3)
    views = [train_arc.view_grid(grid, v) for v in range(8)]
    assert len({(v.shape, v.tobytes()) for v in views}) == 8
    for v in range(8):
        assert np.array_equal(train_arc.view_grid(views[v], train_arc.INVERSE[v]), grid)


def test_colour_permutations_keep_0_the_grammar_and_the_fixed_and_round_trip():
    free = np.zeros((500, 10), bool)
    free[:, [1, 2, 5, 9]] = True
    tables = train_arc.colour_permutations(free, np.random.default_rng(0))
    fixed = [0, 3, 4, 6, 7, 8, 10, 11, 12, 13]
    assert (tables[:, fixed] == fixed).all() and (np.sort(tables, 1) == np.arange(14)).all()
    assert len({row.tobytes() for row in tables}) == 24                              # all 4! occur
    tokens = np.arange(14)
    assert (np.argsort(tables[7])[tables[7][tokens]] == tokens).all()


def test_colours_that_only_outputs_show_stay():
    task = train_arc.Task([(np.array([[0, 1]]), np.array([[2, 1]]))], [np.array([[3, 0]])])
    assert train_arc.free_colours(task).tolist() == [False, True, False] + [True] * 7
    assert not train_arc.free_colours(task, permute=False).any()


@pytest.mark.parametrize("tokens", [
    [], [1, 2, 11], [13], [11, 13], [1, 2, 13], [1, 11, 1, 2, 11, 13], [1, 2, 11, 1, 11, 13], [1, 10, 11, 13],
    [1, 12, 11, 13], [1, 2, 11, 3, 13], [1] * 31 + [11, 13], [1, 11] * 31 + [13]])
def test_output_that_is_no_grid_is_dropped(tokens):
    assert train_arc.decode_grid(np.array(tokens, dtype=np.int64)) is None


def test_positions_in_parallel_equal_positions_step_by_step():
    x, y = np.ones((3, 2), np.uint8), np.ones((2, 4), np.uint8)
    sequence = train_arc.encode_prompt(x) + train_arc.encode_grid(y, train_arc.END)
    other = train_arc.encode_prompt(y) + train_arc.encode_grid(x, train_arc.END)
    tokens = torch.from_numpy(np.stack((sequence, np.pad(other, (0, len(sequence) - len(other)))))).long()
    whole = positions(tokens)
    now = torch.zeros(2, 3, dtype=torch.long)
    for t in range(tokens.shape[1]):
        assert torch.equal(whole[:, t], now), f"token {t}"
        now = advance(tokens[:, t], now)
    anything = torch.randint(14, (50, 40))
    anything[:, 0] = START
    whole, now = positions(anything), torch.zeros(50, 3, dtype=torch.long)
    for t in range(40):
        assert torch.equal(whole[:, t], now)
        now = advance(anything[:, t], now)


def test_positions_count_rows_columns_and_roles():
    x, y = np.ones((3, 2), np.uint8), np.ones((2, 4), np.uint8)
    sequence = train_arc.encode_prompt(x) + train_arc.encode_grid(y, train_arc.END)
    whole = positions(torch.tensor([sequence]))
    assert whole[0, 1].tolist() == [0, 0, 0] and whole[0, 11].tolist() == [0, 0, 1]    # the first cells of both grids
    assert whole[0, 10].tolist() == [3, 0, 0] and whole[0, -1].tolist() == [2, 0, 1]   # <sep>, <end>


def tiny_pairs():
    grids = [np.full((h, w), h, np.uint8) for h, w in ((1, 2), (3, 3), (2, 5), (4, 1))]
    return [train_arc.Pair(n, np.arange(10) > 0, train_arc.in_views(x, x.T)) for n, x in enumerate(grids)]


def test_labels_are_shifted_once_and_outputs_only():
    """The target at t is token t + 1 of the output, <end> included; prompt and padding have none."""
    same = np.arange(14, dtype=np.uint8)
    samples = [train_arc.Sample(n, 0, same, *pair.views[0]) for n, pair in enumerate(tiny_pairs()[:2])]
    tokens, task, view, targets = train_arc.collate(samples, torch.device("cpu"))
    assert tokens[0, :9].tolist() == [10, 1, 1, 11, 12, 1, 11, 1, 11]
    assert targets[0, :9].tolist() == [-100] * 4 + [1, 11, 1, 11, 13]
    assert (targets[0, 9:] == -100).all() and task.tolist() == [0, 1] and view.tolist() == [0, 0]
    scored = targets[1] != -100
    assert torch.equal(targets[1, :-1][scored[:-1]], tokens[1, 1:][scored[:-1]]) and targets[1, -1] == train_arc.END
    assert scored.sum() == 3 * 4 + 1


def test_an_epoch_shows_each_pair_once_in_budgeted_batches():
    for seed in range(20):
        plan = train_arc.plan_epoch(tiny_pairs(), 40, np.random.default_rng(seed))
        assert sorted(sample.task for batch in plan for sample in batch) == [0, 1, 2, 3]
        for batch in plan:
            tokens = train_arc.collate(batch, torch.device("cpu"))[0]
            assert tokens.numel() <= 40 + tokens.shape[1]          # a lone last pair joins the batch before
            assert len(batch) > 1 or len(plan) == 1 or tokens.shape[1] > 20


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [train_arc.rate(used, 0.1, 0.5) for used in (0, 0.05, 0.1, 0.5, 0.75, 1, 1.1)]
    assert rates == [0, 0.5, 1, 1, 0.5, 0, 0] and train_arc.rate(0, 0, 0) == 1


def test_an_epoch_of_arc_wastes_under_5_percent_on_padding():
    _, run, _ = train_arc.parse(["--device", "cpu", "--data", str(ARC1)])
    _, pairs, _ = train_arc.load_data(run, torch.device("cpu"))
    plan = train_arc.plan_epoch(pairs, run.batch_tokens, np.random.default_rng(0))
    lengths = [np.array([len(sample.prompt) + len(sample.answer) - 1 for sample in batch]) for batch in plan]
    assert sum(length.sum() for length in lengths) > 0.95 * sum(len(length) * length.max() for length in lengths)


def test_the_arms_of_a_comparison_see_the_same_data(tmp_path):
    """Same seed: the same pairs, views and colours in the same order, with and without FFN, dense, and deeper."""
    streams = []
    for flags in (["--no-ffn"], ["--ffn"], ["--dense"], ["--no-ffn", "--n-layer", "6"]):
        _, run, _ = train_arc.parse([*flags, "--device", "cpu", "--data", str(ARC1), "--seed", "3"])
        _, pairs, _ = train_arc.load_data(run, torch.device("cpu"))
        stream = itertools.islice(train_arc.batches(pairs, run), 300)
        streams.append([[part.tobytes() for part in map(np.array, sample)] for _, batch in stream for sample in batch])
    assert streams[0] == streams[1] == streams[2] == streams[3]


# ---------------------------------------------------------------------------------------------- train_arc.py: scores
A, B, C = [[1]], [[2, 2]], [[3], [3]]


def test_the_likeliest_output_comes_first():
    """Against every output by itself, read token by token, in every view."""
    model = Transformer(Config(n_task=3, d_model=16, n_head=2, n_layer=1)).double().eval()
    nn.init.normal_(model.head.weight)
    prompts = np.arange(6).reshape(2, 3), np.array([[7], [1]])
    questions = {n: train_arc.Pair(n + 1, np.arange(10) > 0, train_arc.in_views(x, train_arc.UNKNOWN))
                 for n, x in enumerate(prompts)}
    outputs = [tuple(map(tuple, np.random.default_rng(n).integers(10, size=(1 + n % 3, 2)))) for n in range(6)]

    def log_probability(n, output):
        total = 0
        for v in range(8):
            prompt = train_arc.encode_prompt(train_arc.view_grid(prompts[n], v))
            answer = train_arc.encode_grid(train_arc.view_grid(np.array(output), v), train_arc.END)
            logits = model(torch.tensor([prompt + answer]), torch.tensor([n + 1]), torch.tensor([v]))[0]
            total += sum(logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(answer))
        return total.item()
    proposed = [(n, output) for output in outputs for n in (0, 1)]
    run = train_arc.Run(device="cpu", max_tokens=40, batch_tokens=100)
    found = train_arc.likeliest(model, questions, proposed, run)
    for n in (0, 1):
        order = sorted(outputs, key=lambda output: log_probability(n, output), reverse=True)
        assert found[n] == [[list(row) for row in output] for output in order]
    assert train_arc.likeliest(model, questions, [], run) == {0: [], 1: []}


def test_the_two_likeliest_outputs_are_the_attempts(tmp_path, monkeypatch):
    folder = one_task_set(tmp_path / "data")
    run = train_arc.Run(device="cpu", data=str(folder), out=str(tmp_path))
    monkeypatch.setattr(train_arc, "propose", lambda *_: [])
    for outputs, expected in ([A, B, C], attempts(A, B)), ([B], attempts(B, [[0]])), ([], attempts([[0]], [[0]])):
        monkeypatch.setattr(train_arc, "likeliest", lambda model, questions, *_: dict.fromkeys(questions, outputs))
        train_arc.solve(run, nn.Identity(), list(train_arc.read_tasks(folder, "evaluation")))
        submission = json.loads((tmp_path / "submission.json").read_text())
        assert all(entry == expected for entries in submission.values() for entry in entries)


def attempts(first, second):
    return {"attempt_1": first, "attempt_2": second}


def test_score_by_the_arc_prizes_rule():
    """Task p: both outputs, one of them second; q: one of two; r: wrong; s: missing."""
    outputs = {"p": [A, B], "q": [A, C], "r": [B], "s": [A]}
    solutions = {name: [np.array(grid) for grid in grids] for name, grids in outputs.items()}
    submission = {"p": [attempts(A, C), attempts(C, B)], "q": [attempts(A, A), attempts(A, B)],
                  "r": [attempts([[2], [2]], A)]}
    (pass1, pass2), solved = train_arc.score(submission, solutions)
    assert (pass1, pass2, solved) == ((0.5 + 0.5) / 4, (1 + 0.5) / 4, 1)


# ---------------------------------------------------------------------------------------------- train_arc.py: leaks
def test_no_pair_to_train_on_is_an_evaluation_test_pair(arc1, tmp_path):
    """Not even with --no-heldout, where training/40853293 is evaluation/070dd51e under another id."""
    flags = ["--no-heldout", "--device", "cpu", "--max-tokens", "1863", "--batch-tokens", "2048", "--data", str(ARC1)]
    _, run, _ = train_arc.parse(flags)
    pairs = train_arc.load_data(run, torch.device("cpu"))[1]
    seen = {tuple(np.concatenate(pair.views[0])) for pair in pairs}
    tasks, solutions = arc1["evaluation"]
    asked = [tuple(train_arc.encode_prompt(x) + train_arc.encode_grid(y, train_arc.END))
             for name, task in tasks.items() for x, y in zip(task.test, solutions[name])]
    assert len(seen) > 3000 and not seen & set(asked)


def test_extra_tasks_never_leak_the_evaluation_split(arc1):
    """ARC-1 lacks the ids of 233 + 114 tasks of ARC-2; one of these is its evaluation task under another id."""
    training, evaluation = arc1["training"][0], arc1["evaluation"][0]
    kept = [train_arc.without_leaks(train_arc.read_tasks(ARC2, split), evaluation, training)
            for split in ("training", "evaluation")]
    assert [len(k) for k in kept] == [233, 113] and "db695cfb" not in kept[1]

    name, task = next(iter(evaluation.items()))
    renamed = {"id": task, "shuffled": train_arc.Task(task.train[::-1], [np.zeros((1, 1), np.uint8)]),
               "asked": train_arc.Task([(task.test[0], task.test[0])], task.test)}
    assert name not in renamed and train_arc.without_leaks(renamed, evaluation, {}) == {}


def test_repeat_shows_the_asked_tasks_more_often_and_no_other(tmp_path):
    folder, shown = one_task_set(tmp_path), []
    for repeat in (1, 3):
        run = train_arc.Run(device="cpu", data=str(folder), repeat=repeat)
        names, pairs, _ = train_arc.load_data(run, torch.device("cpu"))
        shown.append(Counter(names[pair.task] for pair in pairs))
    asked = train_arc.read_tasks(folder, "evaluation")
    assert shown[1] == {name: n * (3 if name in asked else 1) for name, n in shown[0].items()} != shown[0]


def write_set(folder, tasks, poison=0, github=False):
    """tasks {split: {id: (train pairs, test pairs)}} on disk; poison is added to evaluation's test outputs."""
    for split, entries in tasks.items():
        challenges, solutions = {}, {}
        for name, (train, test) in entries.items():
            extra = poison if split == "evaluation" else 0
            solutions[name] = [((np.array(y) + extra) % 10).tolist() for _, y in test]
            challenges[name] = {"train": [{"input": x, "output": y} for x, y in train],
                                "test": [{"input": x} for x, _ in test]}
            if github:
                (folder / split).mkdir(parents=True, exist_ok=True)
                task = challenges[name] | {"name": name}
                for pair, output in zip(task["test"], solutions[name]):
                    pair["output"] = output
                (folder / split / f"{name}.json").write_text(json.dumps(task))
        if not github:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"arc-agi_{split}_challenges.json").write_text(json.dumps(challenges))
            (folder / f"arc-agi_{split}_solutions.json").write_text(json.dumps(solutions))
    return folder


def one_task_set(folder, **options):
    """Two tasks, turn and mirror; the evaluation task asks for one of its own demonstrations: memory is enough."""
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 10, (8, 3, 3))
    mirror = [(g.tolist(), g[:, ::-1].tolist()) for g in grids[:4]]
    turn = [(g.tolist(), g.T.tolist()) for g in grids[4:]]
    tasks = {"training": {"turn": (turn[:3], turn[3:])}, "evaluation": {"mirror": (mirror, mirror[:1])}}
    return write_set(folder, tasks, **options)


SMALL = ["--no-ffn", "--device", "cpu", "--d-model", "32", "--n-head", "2", "--n-layer", "2", "--batch-tokens", "512"]


FAST = ["--device", "cpu", "--no-compile", "--no-score", "--log-every", "2"]


# enough for answers of their own, on one_task_set
LEARNT = ["--steps", "200", "--lr", "1e-2", "--no-permute-colours", "--max-tokens", "40", "--batch-tokens", "128"]


def train(data, out, *flags):
    train_arc.main([*SMALL, "--data", str(data), "--out", str(out), *flags])
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_answers_are_turned_and_coloured_back():
    """A model that repeats its prompt's grid answers with the grid itself, in every view and colour table, so
    that there is one output, once."""
    model, asked = Transformer(Config(n_task=2)), Counter()

    def repeat(tokens, lengths, task, view, most):
        asked.update(zip(task.tolist(), view.tolist()))
        return tokens[:, 1:].where(tokens[:, 1:] != SEP, train_arc.END)
    model.generate = repeat
    run = train_arc.Run(device="cpu", colour_votes=3, decode_tokens=300)
    grids = [np.arange(6).reshape(2, 3), np.array([[7], [1]])]
    free = np.arange(10) > 0
    questions = {n: train_arc.Pair(n, free, train_arc.in_views(x, train_arc.UNKNOWN)) for n, x in enumerate(grids)}
    assert train_arc.propose(model, questions, run) == [
        (n, tuple(map(tuple, grid.tolist()))) for n, grid in enumerate(grids)]
    assert asked == {(n, view): 3 for n in (0, 1) for view in range(8)}
    asked.clear()
    train_arc.propose(model, questions, train_arc.Run(device="cpu", permute_colours=False))     # the tables are one
    assert asked == {(n, view): 1 for n in (0, 1) for view in range(8)}


def test_processes_share_the_jobs_and_each_gets_every_result_in_order(monkeypatch):
    jobs, shares, parts = [31, 5, 17, 8, 26, 12, 9, 4], [], []

    def square(part):
        parts.append(part)
        return [job ** 2 for job in part]
    for rank in (1, 0):                                             # the last to run has what both found
        monkeypatch.setattr(train_arc, "gather", lambda found, world: shares.append(found) or shares)
        try:
            results = train_arc.share_out(square, jobs, jobs, 40, "", rank, 2)
        except KeyError:
            assert rank == 1                                        # alone, it lacks the other's
    assert results == [job ** 2 for job in jobs] and list(map(len, shares)) == [4, 4]
    assert parts == [[31], [17], [5, 9], [26], [4, 8, 12]]          # the longest first, each within 40, padded


@pytest.mark.parametrize("decode_tokens", [1, 10**6])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(decode_tokens):
    """An output of 12 tokens fits into 20 after a prompt of 2 cells and not after one of 8, in whatever batch."""
    model, run = Transformer(Config(n_task=2)), train_arc.Run(device="cpu", max_tokens=20, decode_tokens=decode_tokens)
    output = train_arc.encode_grid(np.ones((1, 10), np.uint8), train_arc.END)
    model.generate = lambda tokens, lengths, task, view, most: torch.tensor([output[:most]] * len(tokens))
    questions = {size: train_arc.Pair(0, np.arange(10) > 0, train_arc.in_views(
        np.ones((1, size), np.uint8), train_arc.UNKNOWN)) for size in (2, 8)}
    assert {size for size, _ in train_arc.propose(model, questions, run)} == {2}


@pytest.mark.parametrize("github", [False, True])
def test_evaluation_solutions_never_reach_training(tmp_path, github):
    """With every evaluation solution poisoned, training is bit-identical, and so is the submission."""
    clean = train(one_task_set(tmp_path / "clean", github=github), tmp_path / "a", *LEARNT)
    poisoned = train(one_task_set(tmp_path / "poisoned", poison=3, github=github), tmp_path / "b", *LEARNT)
    assert equal(clean, poisoned)
    a, b = (json.loads((tmp_path / run / "submission.json").read_text()) for run in "ab")
    assert a == b and a["mirror"][0]["attempt_1"] != [[0]]          # an answer, not the filler


def test_same_seed_same_weights_other_seed_others(tmp_path):
    data = one_task_set(tmp_path / "data")
    flags = "--steps", "12", "--no-score", "--dropout", "0.1", "--seed"
    runs = [train(data, tmp_path / f"{i}", *flags, seed) for i, seed in enumerate("112")]
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


@pytest.mark.parametrize("number, at", [(signal.SIGINT, 9), (signal.SIGTERM, 1)])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch, number, at):
    """Stopped by Ctrl-C or SIGTERM after 9 or 1 of 25 steps and resumed: bit-identical, no step twice in the log."""
    data = one_task_set(tmp_path / "data")
    flags = *FAST, "--steps", "25", "--dropout", "0.1"
    whole, real = train(data, tmp_path / "whole", *flags), train_arc.task_loss
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(number)
        return real(*arguments)
    monkeypatch.setattr(train_arc, "task_loss", interrupted)
    stopped = train(data, tmp_path / "stopped", *flags)
    with pytest.raises(train_arc.DataError, match="is not empty; .* --resume"):
        train_arc.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "stopped")])
    assert len(calls) == at and not equal(whole, stopped)
    train_arc.main(["--resume", str(tmp_path / "stopped")])
    assert equal(whole, torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)["model"])
    steps = [line.split(",")[0] for line in (tmp_path / "stopped/log.csv").read_text().splitlines()]
    assert steps == ["step"] + [str(step) for step in (*range(2, 25, 2), 25)]


def script(*words, launcher=(sys.executable,), **options):
    command = [*launcher, HERE / "train_arc.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), **pipes, **options)


def test_runs_killed_at_random_moments_end_with_the_same_weights(tmp_path):
    """kill -9 while a checkpoint is written at every second step, resumed until done, against a run left alone."""
    data, flags = one_task_set(tmp_path / "data"), [*FAST, "--steps", "400", "--save-minutes", "0", "--dropout", "0.1"]
    whole, out = train(data, tmp_path / "whole", *flags), tmp_path / "killed"
    rng, kills = np.random.default_rng(0), 0
    run = script(*SMALL, *flags, "--data", data, "--out", out)
    while not (out / "result.json").exists():
        while run.poll() is None and not (out / "log.csv").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        if kills < 4:
            run.kill()
            kills += 1
        run.communicate()
        if not (out / "result.json").exists():
            run = script("--resume", out)
            time.sleep(3)
    assert kills > 1 and equal(whole, torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    assert steps == ["step"] + [str(step) for step in range(2, 401, 2)]


TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"


def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    """gloo on the CPU: loss, gradient norm and held-out loss at every step, to rounding; one process writes."""
    flags = [*FAST, "--steps", "20"]
    train(ARC1, tmp_path / "one", *flags)
    run = script(*SMALL, *flags, "--data", ARC1, "--out", tmp_path / "two", launcher=TORCHRUN)
    output, error = run.communicate()
    assert run.returncode == 0, error
    assert output.count("held-out: loss") == 1
    one, two = (np.genfromtxt(tmp_path / name / "log.csv", delimiter=",", names=True) for name in ("one", "two"))
    for column in ("step", "loss", "grad_norm", "heldout_loss"):
        np.testing.assert_allclose(one[column], two[column], rtol=1e-3)


def test_two_processes_answer_as_one(tmp_path):
    train(one_task_set(tmp_path / "data"), tmp_path / "one", *LEARNT)
    run = script("--eval", tmp_path / "one/checkpoint.pt", "--out", tmp_path / "two", launcher=TORCHRUN)
    _, error = run.communicate()
    assert run.returncode == 0, error
    one, two = ((tmp_path / name / "submission.json").read_text() for name in ("one", "two"))
    assert one == two and json.loads(one)["mirror"][0]["attempt_2"] != [[0]]


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads")
def test_the_process_group_takes_its_threads_with_it():
    """One still there when Python ends can abort the process, the finished run and all."""
    code = """if True:
        import os, train_arc
        train_arc.dist.init_process_group("gloo", store=train_arc.dist.HashStore(), rank=0, world_size=1)
        train_arc.torch.compiler.set_stance("default")      # loads what would hold the group
        threads = lambda: sum("gloo" in open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task"))
        print(threads())
        train_arc.dist.destroy_process_group()
        print(threads())"""
    before, after = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True).split()
    assert int(before) > 0 == int(after)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = train_arc.task_loss, []

    def broken(*arguments):
        calls.append(1)
        return real(*arguments) * (math.nan if len(calls) > 12 else 1)
    monkeypatch.setattr(train_arc, "task_loss", broken)
    with pytest.raises(train_arc.DataError, match=r"step 14: loss nan, gradient norm nan, learning rate 0.00"):
        train(one_task_set(tmp_path / "data"), tmp_path / "out", *FAST, "--steps", "50", "--save-minutes", "0")
    state = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert state["step"] == 12 and all(p.isfinite().all() for p in state["model"].values())


def test_a_full_disk_or_a_folder_that_cannot_be_is_one_line_and_earlier_files_stay(tmp_path):
    data, out = one_task_set(tmp_path / "data"), tmp_path / "out"
    train(data, out, *FAST, "--steps", "10")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full():                                         # no file may grow beyond 20 kB, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    for words, options in ((["--resume", out], {"preexec_fn": full}),
                           ([*SMALL, *FAST, "--data", data, "--out", out / "config.json/x"], {})):
        run = script(*words, **options)
        _, error = run.communicate()
        assert run.returncode == 2 and error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_saved_model_is_scored_and_shown_as_its_run_was(tmp_path, capsys):
    """--eval answers what the run answered; --show draws input, target and attempts, in plain digits without a
    terminal; a checkpoint of another shape is refused."""
    data, out = one_task_set(tmp_path / "data"), tmp_path / "out"
    train(data, out, "--device", "cpu", "--no-compile", *LEARNT)
    capsys.readouterr()
    again = ["--eval", str(out / "checkpoint.pt"), "--out", str(tmp_path / "again"), "--show", "2"]
    train_arc.main(again)
    shown = capsys.readouterr().out
    assert (tmp_path / "again/submission.json").read_bytes() == (out / "submission.json").read_bytes()
    target = json.loads((data / "arc-agi_evaluation_solutions.json").read_text())["mirror"][0]
    assert re.search("mirror test 0\ninput   target  attempt 1 (wrong|missing) +attempt 2 (wrong|missing)\n", shown)
    assert "\033" not in shown and json.loads((tmp_path / "again/config.json").read_text())["command"] == again
    assert all(" ".join(map(str, row)) in shown for row in target)
    with pytest.raises(train_arc.DataError, match="not empty"):
        train_arc.main(again)
    with pytest.raises(train_arc.DataError, match="another shape.*size mismatch"):
        train_arc.main([*again[:2], "--out", str(tmp_path / "other"), "--d-model", "64"])


def test_the_comparison_runs_every_arm_resumes_and_prints_one_table(tmp_path, capsys):
    """A run made by hand counts, a stopped one goes on, and a second call trains nothing."""
    data, out = one_task_set(tmp_path / "data"), tmp_path / "ab"
    flags = [*SMALL[1:], *FAST, "--data", str(data), "--steps", "4"]
    train_arc.main(["--no-ffn", *flags, "--out", str(out / "no-ffn-seed0")])
    (out / "no-ffn-seed0/result.json").unlink()
    tables = []
    for _ in range(2):
        train_arc.main(["--ab", "--seeds", "1", *flags, "--out", str(out)])
        tables.append((out / "table.md").read_text())
    lines = tables[0].splitlines()
    assert tables[0] == tables[1] and [line.split(" | ")[0] for line in lines[2:]] == [
        "| no-ffn", "| ffn", "| dense", "| no-ffn-deep"]
    arms = "no-ffn", "ffn", "dense", "no-ffn-deep"
    runs = [json.loads((out / f"{arm}-seed0/config.json").read_text()) for arm in arms]
    assert [(run["ffn"], run["dense"], run["n_layer"]) for run in runs] == [
        (False, False, 2), (True, False, 2), (True, True, 2), (False, False, 3)]
    assert runs[0]["lr"] == runs[1]["lr"] == 5 * runs[2]["lr"]
    with pytest.raises(train_arc.DataError, match="no-ffn-seed0: a run with another --steps"):
        train_arc.main(["--ab", "--seeds", "1", *flags[:-1], "5", "--out", str(out)])


def test_drawings_colour_every_cell_and_wrap_to_the_terminal():
    grids = [("one", [[0, 9]]), ("two", [[5], [6]])]
    assert train_arc.draw(grids, False, 80) == "one   two\n0 9   5\n      6\n"
    assert train_arc.draw(grids, False, 9) == "one\n0 9\n\ntwo\n5\n6\n"
    coloured = train_arc.draw(grids, True, 80)
    bare = [line.rstrip() for line in re.sub(r"\033\[[0-9;]*m", "", coloured).splitlines()]
    assert coloured.count("\033[48;5;") == 4 and bare == train_arc.draw(grids, False, 80).splitlines()


def test_every_layout_reads_the_same_and_a_test_set_without_solutions_is_answered(tmp_path, capsys):
    """Kaggle's files, GitHub's folders, a plain folder of tasks (ConceptARC); Kaggle's test set has no solutions."""
    kaggle, github = one_task_set(tmp_path / "kaggle"), one_task_set(tmp_path / "github", github=True)
    (tmp_path / "plain/concept").mkdir(parents=True)
    shutil.copy(github / "evaluation/mirror.json", tmp_path / "plain/concept/mirror1.json")
    plain = tmp_path / "plain"
    read = [repr(list(train_arc.read_tasks(folder, "evaluation").values())) for folder in (kaggle, github, plain)]
    assert read[0] == read[1] == read[2] and train_arc.read_tasks(plain, "training") == {}
    for folder, name in ((kaggle, "mirror"), (github, "mirror"), (tmp_path / "plain", "mirror1")):
        tasks = train_arc.read_tasks(folder, "evaluation")
        output = train_arc.read_solutions(folder, "evaluation", tasks)[name][0]
        assert np.array_equal(output, tasks[name].train[0][1])
    (kaggle / "arc-agi_evaluation_challenges.json").rename(kaggle / "arc-agi_test_challenges.json")
    train(kaggle, tmp_path / "out", "--split", "test", "--steps", "4", "--no-compile", "--show", "1")
    assert "cannot be scored" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out/submission.json").read_text())) == ["mirror"]


@pytest.mark.parametrize("change, fault", [
    (lambda s: s.pop("t"), "task t: no 't'"),
    (lambda s: s["t"].pop(), "task t: attempts: 1 entries; expected a list of 2"),
    (lambda s: s["t"][1].pop("attempt_2"), "task t: attempts: 1 attempt_2: no 'attempt_2'"),
    (lambda s: s["t"][0].update(attempt_1=[[10]]), "task t: attempts: 0 attempt_1: a cell is 10")])
def test_a_submission_is_read_strictly(tmp_path, change, fault):
    submission = {"t": [{"attempt_1": [[1]], "attempt_2": [[2]]} for _ in range(2)]}
    tasks, file = {"t": train_arc.Task([], [None, None])}, tmp_path / "submission.json"
    file.write_text(json.dumps(submission))
    assert train_arc.read_submission(file, tasks) == submission
    change(submission)
    file.write_text(json.dumps(submission | {"other": 1}))
    with pytest.raises(train_arc.DataError, match="submission.json") as e:
        train_arc.read_submission(file, tasks)
    assert fault in str(e.value)


def test_the_comparison_is_refused_under_torchrun(monkeypatch):
    """Its runs would inherit the rank: each process would start them all."""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(train_arc.DataError, match="--ab: .* leave out torchrun"):
        train_arc.main(["--ab", "--device", "cpu"])


def test_scores_equal_a_scorer_written_from_the_rule():
    """The ARC Prize: an output counts if either attempt equals it; a task's score is the mean over its outputs."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        solutions = {f"t{n}": [rng.integers(0, 2, (1, 2)) for _ in range(rng.integers(1, 4))] for n in range(10)}
        submission = {name: [{key: rng.integers(0, 2, (1, 2)).tolist() for key in train_arc.ATTEMPTS} for _ in outputs]
                      for name, outputs in solutions.items()}
        firsts, scores, whole = [], [], 0
        for name, outputs in solutions.items():
            correct = [output.tolist() in (given["attempt_1"], given["attempt_2"])
                       for output, given in zip(outputs, submission[name])]
            scores.append(sum(correct) / len(correct))
            firsts.append(np.mean([output.tolist() == given["attempt_1"]
                                   for output, given in zip(outputs, submission[name])]))
            whole += all(correct)
        (pass1, pass2), solved = train_arc.score(submission, solutions)
        assert abs(pass1 - np.mean(firsts)) < 1e-12 and abs(pass2 - np.mean(scores)) < 1e-12 and solved == whole


def test_the_model_overfits_one_task_and_decodes_its_output_exactly(tmp_path, capsys):
    flags = "--steps", "500", "--no-permute-colours", "--lr", "1e-2", "--max-tokens", "40", "--batch-tokens", "128"
    train(one_task_set(tmp_path / "data"), tmp_path / "out", *flags)
    assert "pass@1 100.00%, pass@2 100.00%" in capsys.readouterr().out
    answer = json.loads((tmp_path / "out/submission.json").read_text())
    solution = json.loads((tmp_path / "data/arc-agi_evaluation_solutions.json").read_text())
    assert answer["mirror"][0]["attempt_1"] == solution["mirror"][0]


# ---------------------------------------------------------------------------------------------- train_arc.py: bad input
GOOD = {"t": {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}}


def task_with(cell):
    return json.dumps(GOOD).replace("[[3]]", cell)


@pytest.mark.parametrize("text, fault", [
    ("{", "not JSON"), (json.dumps(GOOD)[:-9], "not JSON"), ("[" * 100000, "not JSON"), ("\udcff", "not JSON"),
    ("[]", "list; expected a dict"), ("{}", "0 entries; expected a dict"),
    ('{"t": []}', "task t: list; expected a dict"), ('{"t": {"test": []}}', "task t: no 'train'"),
    ('{"t": {"train": [], "test": []}}', "task t: train: 0 entries; expected a list of at least one"),
    (json.dumps(GOOD).replace("output", "out"), "task t: train: 0 output: no 'output'"),
    (json.dumps(GOOD).replace("input", "in", 1), "task t: train: 0 input: no 'input'"),
    (json.dumps(GOOD).replace("test", "tests"), "task t: no 'test'"),
    (task_with("[]"), "test: 0 input: 0 entries"), (task_with("[[]]"), "test: 0 input: 0 entries"),
    (task_with("[[1], [1, 2]]"), "2 rows of widths [1, 2]"), (task_with(json.dumps([[1]] * 31)), "31 rows"),
    (task_with(json.dumps([[1] * 31])), "widths [31]"), (task_with("3"), "int; expected a list"),
    *((task_with(f"[[1, {cell}]]"), f"a cell is {cell}; expected an integer from 0 to 9")
      for cell in ("10", "-1", "1.5", '"3"', "true", "null", "NaN", "[1]", "[[[[1]]]]"))])
def test_bad_tasks_are_named(tmp_path, text, fault):
    file = tmp_path / "arc-agi_training_challenges.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(train_arc.DataError, match=re.escape(str(file))) as e:
        train_arc.read_tasks(tmp_path, "training")
    assert fault in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, fault", [
    ('{"other": [[[1]]]}', "task t: solutions: NoneType; expected a list of 1"),
    ('{"t": [[[1]], [[1]]]}', "task t: solutions: 2 entries; expected a list of 1"),
    ('{"t": [[[11]]]}', "task t: solutions: 0: a cell is 11"), ("", "not JSON")])
def test_bad_solutions_are_named(tmp_path, text, fault):
    (tmp_path / "arc-agi_training_challenges.json").write_text(json.dumps(GOOD))
    (tmp_path / "arc-agi_training_solutions.json").write_text(text)
    with pytest.raises(train_arc.DataError, match="arc-agi_training_solutions.json") as e:
        train_arc.read_solutions(tmp_path, "training", train_arc.read_tasks(tmp_path, "training"))
    assert fault in str(e.value)


def test_bad_sets_are_named(tmp_path):
    """An empty folder, one id in two files or two splits, a training split without solutions."""
    run = train_arc.Run(data=str(tmp_path), device="cpu")

    def fault():
        with pytest.raises(train_arc.DataError, match=re.escape(str(tmp_path))) as e:
            train_arc.load_data(run, torch.device("cpu"))
        return str(e.value)
    assert "no evaluation tasks" in fault()
    (tmp_path / "a").mkdir()
    for file in ("t.json", "a/t.json"):
        (tmp_path / file).write_text(json.dumps(GOOD["t"]))
    assert "task t is in" in fault()
    for split in ("training", "evaluation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "t.json").write_text(json.dumps(GOOD["t"]))
    assert "task t is in both splits" in fault()
    shutil.copytree(tmp_path / "training", tmp_path / "up/data/training")
    with pytest.raises(train_arc.DataError, match="tasks are in .*up/data; name that$"):
        train_arc.read_tasks(tmp_path / "up", "evaluation")
    (tmp_path / "evaluation/t.json").rename(tmp_path / "evaluation/u.json")
    assert "the training split has no solutions" in fault()


@pytest.mark.parametrize("flags, fault", [
    (["--d-model", "30"], "--d-model 30"), (["--minutes", "0"], "--minutes 0"), (["--lr", "-1"], "--lr -1"),
    (["--lr", "nan"], "--lr nan"),
    (["--steps", "-5"], "--steps -5"), (["--device", "abacus"], "--device abacus"),
    (["--dtype", "int8"], "--dtype int8"),
    (["--dropout", "1"], "--dropout 1"), (["--dense", "--no-ffn"], "--dense --no-ffn"),
    (["--data", "nowhere"], "nowhere"), (["--resume", "nowhere"], "nowhere"), (["--eval", "nowhere"], "nowhere"),
    (["--lr", "fast"], "--lr"), (["--speed", "3"], "--speed"), (["--eval", "x", "--resume", "y"], "not allowed with"),
    (["--batch-tokens", "100"], "--batch-tokens 100: expected at least --max-tokens"), (["--split", "x"], "--split x"),
    (["--extra", "no", "--data", str(ARC1)], "no: no tasks"),
    (["--sars", "--dense"], "--sars"), (["--ab", "--dense"], "--ab --dense"),
    (["--out", str(HERE / "data")], "is not empty"), (["--resume", "x", "--lr", "1"], "no other flag"),
    (["--max-tokens", "3", "--data", str(ARC1)], "--max-tokens")])
def test_bad_flags_end_with_one_line_and_status_2(tmp_path, flags, fault):
    run = subprocess.run([sys.executable, HERE / "train_arc.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and fault in run.stderr and run.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_no_checkpoint_is_refused_and_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    for content in (None, b"", b"PK\x03\x04 truncated"):
        if content is not None:
            (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(train_arc.DataError, match="checkpoint.pt"):
            train_arc.parse(["--resume", str(tmp_path)])
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- the project
@pytest.mark.parametrize("name", ["spl", "dynsiha", "block", "model"])
def test_each_concept_file_runs_alone_with_the_files_it_declares(tmp_path, name):
    text = (HERE / f"{name}.py").read_text()
    files = {f"{name}.py", *re.findall(r"\w+\.py", re.search(r"Copy +(.*)", text)[1])}
    for file in files:
        shutil.copy(HERE / file, tmp_path)
    run = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 3


def test_the_readmes_commands_exist_and_parse(monkeypatch, tmp_path):
    text = (HERE / "README.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    files = {file for line in commands for file in re.findall(r"[\w./-]+\.(?:py|txt)", line)}
    assert "pytest -q test_all.py" in commands and "pytest -q test_all.py" in (HERE / ".ci/run").read_text()
    assert {"train_arc.py", "test_all.py", "requirements.txt"} <= files
    assert all((HERE / file).exists() for file in files)
    monkeypatch.chdir(HERE)
    for line in commands:
        for flags in re.findall(r"python train_arc\.py([^#&|]*)", line):
            if not {"--help", "--resume", "--eval"} & set(flags.split()) and "cuda" not in flags:
                train_arc.parse(flags.split() + ["--out", str(tmp_path / "unused")])
