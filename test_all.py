"""Every claim of this project as a test.  Run: pytest -q test_all.py"""

import copy
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch is imported: tiny runs are faster on one thread

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_arc
from block import Block
from dynsiha import DynSIHA, double_attention, rotary, rotate
from model import (END, IGNORE, INVERSE, NL, SEP, START, Config, Transformer, advance, collate, decode_grid,
                   encode_grid, encode_prompt, encode_views, evaluate, pair_tokens, pi_score, positions,
                   sample_losses, show_attention, task_loss, unpadded, view_grid)
from spl import (Muon, SparseProtoLinear, mas_normalize, mas_reference, orthogonalize, routing_loss,
                 spl_reference)
from train_arc import InputError, Pair, Task, parse

HERE = Path(train_arc.__file__).parent
ARC1, ARC2 = HERE / "data/arc-agi-1", HERE / "data/arc-agi-2"
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ helpers
def random_spl(D_in=8, D_out=12, dtype=torch.float64, device="cpu", **options):
    """An SPL with random gates and biases, so that every term of the formula matters."""
    layer = SparseProtoLinear(D_in, D_out, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.to(device, dtype)


def weights(layer):
    """W_mu, b_mu, W_p and W_g, also of a layer without a bias or with a tied gate."""
    mu_bias = layer.mu_weight.new_zeros(layer.out_features) if layer.mu_bias is None else layer.mu_bias
    gate_weight = -layer.proto_weight if layer.gate_weight is None else layer.gate_weight
    return layer.mu_weight, mu_bias, layer.proto_weight, gate_weight


def line(B, T):
    """Positions 0..T-1 on one axis, (B, T, 1)."""
    return torch.arange(T).expand(B, T)[..., None]


def small_model(**options):
    """A Transformer that answers: what starts at 0, such as its head, is random."""
    model = Transformer(Config(**{"n_task": 3, "d_model": 16, "n_head": 2, "n_layer": 1} | options)).double()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p)
    return model


def put(text, folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_set(folder, tasks, github=False):
    """tasks {split: {id: (train pairs, test pairs)}} on disk, as Kaggle has them or as GitHub has."""
    for split, entries in tasks.items():
        challenges, solutions = {}, {}
        for name, parts in entries.items():
            shown, asked = ([{"input": x, "output": y} for x, y in part] for part in parts)
            challenges[name] = {"train": shown, "test": [{"input": pair["input"]} for pair in asked]}
            solutions[name] = [pair["output"] for pair in asked]
            if github:
                put(json.dumps({"train": shown, "test": asked, "name": name}), folder, f"{split}/{name}.json")
        if not github:
            put(json.dumps(challenges), folder, f"arc-agi_{split}_challenges.json")
            put(json.dumps(solutions), folder, f"arc-agi_{split}_solutions.json")
    return folder


def one_task_set(folder, github=False):
    """Two tasks, turn and mirror; the evaluation task asks for one of its own demonstrations: memory is enough."""
    grids = np.random.default_rng(0).integers(0, 10, (8, 3, 3))
    mirror = [(g.tolist(), g[:, ::-1].tolist()) for g in grids[:4]]
    turn = [(g.tolist(), g.T.tolist()) for g in grids[4:]]
    tasks = {"training": {"turn": (turn[:3], turn[3:])}, "evaluation": {"mirror": (mirror, mirror[:1])}}
    return write_set(folder, tasks, github)


# Flags of a tiny run; of one without answers; and of one that learns one_task_set well enough to answer.
SMALL = ["--ffn-factor", "0", "--device", "cpu", "--d-model", "32", "--n-head", "2", "--n-layer", "2",
         "--batch-tokens", "512", "--no-compile", "--heldout"]
FAST = ["--no-score", "--steps", "12"]
LEARNT = ["--steps", "200", "--lr", "1e-2", "--no-permute-colours", "--max-tokens", "40", "--batch-tokens", "128"]


def flags(*words):
    """The flags of a run as the script parses them."""
    return parse(["--device", "cpu", *map(str, words)])


def train(data, out, *words):
    """Runs the script in this process -> the weights that it saved."""
    train_arc.main([*SMALL, "--data", str(data), "--out", str(out), *map(str, words)])
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_log(out):
    return np.genfromtxt(Path(out) / "log.csv", delimiter=",", names=True)


def script(*words, launcher=(sys.executable, HERE / "train_arc.py"), **options):
    """The script as a process of its own, when it has ended."""
    return subprocess.run([str(word) for word in (*launcher, *words)], capture_output=True, text=True, **options)


TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train_arc.py"


# ------------------------------------------------------------------------------------------ spl
@pytest.mark.parametrize("bias, tied", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("D_out", [12, 1])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (2, 0, 8)])
def test_an_spl_equals_the_literal_formula_its_gradients_too(shape, D_out, bias, tied):
    layer, x = random_spl(8, D_out, bias=bias, tied_gate=tied), torch.randn(shape, dtype=torch.float64)
    y, logits, M = spl_reference(x, *weights(layer))
    torch.testing.assert_close((layer(x), layer.route(x)), (y, (logits, M)))
    ours, literal = (torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (layer(x), y))
    torch.testing.assert_close(ours, literal)
    assert y.shape == shape[:-1] + (D_out,)


def test_mas_ignores_scale_and_equals_the_formula_its_gradient_too():
    z = torch.tensor([[2., 2., -2., 1.], [-3., -3., 1., 0.], [0.5, -1., 0.25, 0.]], requires_grad=True)
    g = torch.randn(3, 4)
    for mas in (mas_normalize, mas_reference):
        assert mas(torch.tensor([2., -4., 1.])).tolist() == [0.5, 0, 0.25]
    torch.testing.assert_close(mas_normalize(37.5 * z), mas_reference(z))
    ours, theirs = (torch.autograd.grad(mas(z), z, g)[0] for mas in (mas_normalize, mas_reference))
    torch.testing.assert_close(ours, theirs)


def test_a_tied_gate_leaves_a_reglus_gate_over_a_scale_of_each_row():
    V = torch.randn(50, 9, dtype=torch.float64)
    V[0], V[1] = V[0].abs(), -V[1].abs()
    best, worst = (F.relu(z).amax(-1, keepdim=True) for z in (V, -V))
    scale = torch.maximum(best, worst + worst / torch.maximum(best, worst))
    torch.testing.assert_close(mas_reference(V - mas_reference(-V)), F.relu(V) / scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_zero_and_small_rows_and_half_precision_stay_finite(device, dtype, tied):
    layer, x = SparseProtoLinear(8, 12, True, device, dtype, tied), torch.randn(6, 8, device=device, dtype=dtype)
    x[::2] = 0
    x[1] *= 1e-3
    y = layer(x.requires_grad_())
    y.float().square().sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and not y[::2].any() and y[1::2].any()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_compiled_spl_under_autocast_is_close_to_the_literal_formula_its_gradients_too(device, tied):
    """A maximum compared with its own rounding gave NaN here."""
    layer = random_spl(64, 64, torch.float32, device, tied_gate=tied)
    x, g = torch.randn(2, 33, 64, device=device)
    exact = spl_reference(x, *weights(layer))[0]
    expected = torch.autograd.grad(exact, layer.parameters(), g)
    with torch.autocast(device, torch.bfloat16):
        y = torch.compile(layer, fullgraph=True)(x)
    y.backward(g.bfloat16())
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.05 * exact.norm()
    for (name, p), reference in zip(layer.named_parameters(), expected):
        assert (p.grad - reference).norm() < 0.25 * reference.norm(), name  # without the maximum's share: about 1


def test_an_spl_is_built_copied_and_exported_as_nn_linear_is():
    layer, x = SparseProtoLinear(8, 4, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close((copy.deepcopy(layer)(x), exported(x)), (layer(x), layer(x)))
    assert SparseProtoLinear(8, 4, device="meta")(x.to("meta").float()).shape == (2, 3, 4)


def test_an_spl_passes_gradcheck_twice_and_torch_func_differentiates_it_as_the_literal_formula():
    layer, x = random_spl(4, 5), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    names = "mu_weight", "mu_bias", "proto_weight", "gate_weight"

    def ours(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    def derivatives(f):
        return torch.func.vmap(torch.func.jacrev(f, (0, 1, 2, 3, 4)), (0, None, None, None, None))(x, *weights(layer))
    torch.testing.assert_close(derivatives(ours), derivatives(lambda *values: spl_reference(*values)[0]))
    assert torch.autograd.gradcheck(ours, (x, *weights(layer)))
    assert torch.autograd.gradgradcheck(ours, (x, *weights(layer)))


def test_a_fresh_layer_fires_nearly_half_of_its_neurons_and_computes_at_twice_the_usual_scale():
    layer, x = SparseProtoLinear(256, 256), torch.randn(500, 256)
    fires = layer.route(x)[1] > 0
    assert 0.43 < fires.float().mean() < 0.48 and (F.linear(x, layer.gate_weight)[fires] > 0).any()     # some pay
    assert 1.9 < F.linear(x, layer.mu_weight, layer.mu_bias).std() < 2.1 and not layer.mu_bias.any()


def test_the_routing_loss_equals_its_formula_and_reaches_proto_and_gate_alone():
    """Two tokens are padding and count in nothing, whatever stands there; one of the others fires no neuron."""
    layer, x, real = random_spl(4, 6), torch.randn(2, 5, 4, dtype=torch.float64), torch.ones(2, 5)
    real[1, 3:], x[0, 0] = 0, 0
    y = layer(x.requires_grad_())
    y.retain_grad()
    (y * y.detach().cos() * real[..., None]).sum().backward()              # so the gradient of y is its cosine
    y.grad[1, 3:] = 5
    tokens = torch.cat((x[0], x[1, :3])).detach()                          # the real ones: (8, 4)
    Y_out, _, M = spl_reference(tokens, *weights(layer))
    dY_comp = Y_out.cos() * M
    k = (dY_comp.T @ tokens).norm(dim=1)
    worth = Y_out.norm(dim=0) * dY_comp.norm(dim=0)
    G = worth / worth.max() / (k / k.max() + 0.01)
    p, q = M / M.sum(1, keepdim=True).clamp_min(1e-9), (G / G.sum()).expand_as(M)
    divergence = sum(torch.xlogy(d, d / ((p + q) / 2)).sum(1) for d in (p, q)) / 2
    loss = routing_loss(layer, x, y, real)
    torch.testing.assert_close(loss.double(), divergence.mean(), rtol=1e-5, atol=0)
    layer.zero_grad()
    x.grad = None
    loss.backward()
    assert x.grad is layer.mu_weight.grad is layer.mu_bias.grad is None
    assert all(p.grad.any() and p.grad.isfinite().all() for p in (layer.proto_weight, layer.gate_weight))


@pytest.mark.parametrize("device", DEVICES)
def test_muon_makes_updates_orthogonal(device):
    """All singular values between 0.6 and 1.3, and the singular vectors kept: x times the result is symmetric."""
    U, _, V = torch.linalg.svd(torch.randn(3, 16, 24), full_matrices=False)
    x = ((U * torch.linspace(0.1, 1, 16)) @ V).to(device)
    y = orthogonalize(x).float()
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.3
    product = x @ y.mT
    assert (product - product.mT).norm() < 0.05 * product.norm()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_muon_on_stacks_equals_a_loop_over_matrices_written_out(shape):
    matrices = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(3)]
    expected = [p.detach().clone() for p in matrices]
    optimizer, state = Muon([{"params": matrices}], lr=0.1, weight_decay=0.2), [[0, 0] for _ in matrices]
    for _ in range(4):
        for n, p in enumerate(matrices):
            p.grad = g = torch.randn(shape, dtype=torch.float64)
            m = state[n][0] = 0.95 * state[n][0] + 0.05 * g
            x = 0.05 * g + 0.95 * m
            x = x / x.norm()
            for _ in range(5):
                A = x @ x.T
                x = 3.4445 * x - 4.7750 * A @ x + 2.0315 * A @ A @ x
            rows = state[n][1] = 0.95 * state[n][1] + 0.05 * (x ** 2).mean(1, keepdim=True)
            update = x / rows.sqrt()
            update = update * x.norm() / update.norm() * 0.2 * 6 ** 0.5
            expected[n] = expected[n] * (1 - 0.1 * 0.2) - 0.1 * update
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in matrices], expected)


# ------------------------------------------------------------------------------------------ dynsiha, block
def test_dynsiha_and_its_double_attention_equal_the_formula_head_by_head_and_token_by_token():
    layer, x, rope = DynSIHA(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64), rotary(line(2, 5), 4)
    spls = {name: spl_reference(x, *weights(getattr(layer, name))) for name in "qkv"}
    q, k, v = (Y_out.view(2, 5, 3, 4).transpose(1, 2) for Y_out, _, _ in spls.values())      # (B, H, T, h)
    q, k = rotate(q, *rope), rotate(k, *rope)
    attended, y = torch.zeros(2, 3, 5, 5, dtype=x.dtype), torch.zeros_like(q)
    for row, head, t in itertools.product(range(2), range(3), range(5)):
        past = row, head, slice(t + 1)
        attended[row, head, t, :t + 1] = (k[past] @ q[row, head, t] / math.sqrt(4)).softmax(0)
        y[row, head, t] = attended[row, head, t, :t + 1] @ v[past]
    spls["o"] = spl_reference(y.transpose(1, 2).reshape(2, 5, 12), *weights(layer.o))
    masks = {name: M for name, (_, _, M) in spls.items()}
    torch.testing.assert_close((layer(x, rope), double_attention(layer, x, rope)), (spls["o"][0], (masks, attended)))
    with pytest.raises(ValueError, match="9 must be n_head 3 times an even head width"):
        DynSIHA(9, 3)


def test_the_model_is_causal():
    model, tokens, zero = small_model(n_layer=2), torch.randint(14, (2, 9)), torch.zeros(2).long()
    changed = torch.cat((tokens[:, :5], (tokens[:, 5:] + 1) % 14), dim=1)
    a, b = (model(sequence, zero, zero) for sequence in (tokens, changed))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()


def test_rotary_deals_pairs_to_the_axes_in_turn_and_scores_feel_differences_of_position_alone():
    """16 pairs over three axes: 6, 5 and 5, each axis with the frequencies 1 down to about 1/100."""
    a, b, shift = torch.tensor([[[[1, 2, 3]]], [[[1, 9, 1]]], [[[5, 2, 1]]]])
    cos, sin = rotary(a, 32)
    angles = [(1, 2, 3)[pair % 3] / 100 ** (pair // 3 * 3 / 16) for pair in range(16)]
    torch.testing.assert_close(torch.atan2(sin, cos).flatten(), torch.tensor(angles))
    q, k = torch.randn(2, 1, 1, 1, 32)
    there = (rotate(q, *rotary(a + shift, 32)) * rotate(k, *rotary(b + shift, 32))).sum()
    torch.testing.assert_close((rotate(q, cos, sin) * rotate(k, *rotary(b, 32))).sum(), there)


@pytest.mark.parametrize("f, dense, norm", [(0, False, False), (2, False, False), (2, False, True),
                                            (4, True, False), (0, True, False)])
def test_a_block_adds_attention_and_ffn_of_its_normalized_input(f, dense, norm):
    """The FFN is two SPLs around a relu, or the dense control's GELU network; without it nothing of it is built."""
    x, rope = torch.randn(2, 5, 8, dtype=torch.float64), rotary(line(2, 5), 4)
    block = Block(8, 2, f, dense, moie_norm=norm).double()
    for p in block.parameters():
        nn.init.normal_(p)
    y = x + block.attn(block.attn_norm(x), rope)
    if f and dense:
        hidden = block.ffn.up(block.ffn_norm(y))
        y = y + block.ffn.down(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    elif f:
        hidden = block.ffn.up(block.ffn_norm(y)).clamp(min=0)
        if norm:
            hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-15).sqrt()
        y = y + block.ffn.down(hidden)
    torch.testing.assert_close(block(x, rope), y)
    assert hasattr(block, "ffn") == hasattr(block, "ffn_norm") == (f > 0)


def test_a_block_has_12_D2_weights_as_the_dense_control_and_6_f_D2_more_with_an_ffn():
    def matrices(*options):
        return sum(p.numel() for p in Block(*options).parameters() if p.ndim == 2) / options[0] ** 2
    assert matrices(16, 2) == matrices(48, 2, 4, True) == 12
    assert [matrices(16, 2, f) for f in (1, 2, 4)] == [18, 24, 36]
    model = Transformer(Config(n_task=1000, d_model=16, n_head=2, n_layer=3, ffn_factor=0))
    assert model.n_params() == 3 * (12 * 16 * 16 + 4 * 16 + 16) + 16 + 14 * 16         # biases and norms counted


def test_dropout_cuts_both_branches_in_training_alone():
    block, x, rope = Block(16, 2, 4, dense=True, dropout=1.0), torch.randn(1, 5, 16), rotary(line(1, 5), 8)
    assert torch.equal(block(x, rope), x) and not torch.equal(block.eval()(x, rope), x)


# ------------------------------------------------------------------------------------------ model
def test_every_training_grid_of_arc1_survives_tokens_and_back():
    for task in train_arc.read_tasks(ARC1, "training", solved=True).values():
        for grid in itertools.chain(*task.train, *task.test):
            assert decode_grid(np.array([*encode_grid(grid), END, 5, END])) == grid.tolist()


@pytest.mark.parametrize("tokens", [
    [], [1, 2, 11], [13], [11, 13], [1, 11, 1, 2, 11, 13], [1, 2, 11, 1, 11, 13], [1, 10, 11, 13],
    [1, 2, 11, 3, 13], [1, 11, 11, 13], [1] * 31 + [11, 13], [1, 11] * 31 + [13]])
def test_output_that_is_no_grid_is_dropped(tokens):
    assert decode_grid(np.array(tokens, dtype=np.int64)) is None


def test_a_pair_is_encoded_in_eight_views_each_of_which_is_undone():
    x, y = np.arange(6).reshape(2, 3), np.array([[7, 8]])
    samples, turned = encode_views(5, x, y), [START, 2, 5, NL, 1, 4, NL, 0, 3, NL, SEP]
    assert samples[1].tokens.tolist() == [*turned, 8, NL, 7, NL] and samples[1].n_prompt == 11
    assert encode_views(5, x)[1].tokens.tolist() == turned and view_grid(x, 4).tolist() == x.T.tolist()
    assert [sample[:2] for sample in samples] == [(5, view) for view in range(8)]
    assert all(np.array_equal(view_grid(view_grid(x, view), INVERSE[view]), x) for view in range(8))
    assert pair_tokens(x, y) == 16 == max(len(sample.tokens) for sample in samples) + 1
    assert pair_tokens(np.ones((1, 9)), np.ones((9, 1))) == 31       # both lie, or both stand


def test_positions_in_parallel_equal_positions_step_by_step_and_by_hand():
    hand = torch.tensor([[START, 5, 5, NL, 5, NL, SEP, 7, NL, END]])
    rows, columns, roles = [0, 0, 0, 0, 1, 1, 2, 0, 0, 1], [0, 0, 1, 2, 0, 1, 0, 0, 1, 0], [0] * 7 + [1] * 3
    assert positions(hand)[0].T.tolist() == [rows, columns, roles]
    tokens, now = torch.randint(14, (50, 40)), torch.zeros(50, 3, dtype=torch.long)
    tokens[:, 0] = START
    for t, expected in enumerate(positions(tokens).unbind(1)):
        assert torch.equal(now, expected), f"token {t}"
        now = advance(tokens[:, t], now)


@pytest.mark.parametrize("device", DEVICES)
def test_labels_are_shifted_once_and_outputs_only(device):
    """The target at t is token t + 1 of the output, <end> the last; prompt and padding have none."""
    x, y, z = np.array([[1, 2]], np.uint8), np.array([[3], [4]], np.uint8), np.array([[7]], np.uint8)
    tokens, task, view, targets = collate([encode_views(5, x, y)[0], encode_views(6, x, z)[2]], device)
    assert tokens[:, :9].tolist() == [[START, 1, 2, NL, SEP, 3, NL, 4, NL], [START, 2, 1, NL, SEP, 7, NL, END, END]]
    assert targets[:, :9].tolist() == [[IGNORE] * 4 + [3, NL, 4, NL, END], [IGNORE] * 4 + [7, NL, END] + [IGNORE] * 2]
    assert task.tolist() == [5, 6] and view.tolist() == [0, 2] and tokens.shape == targets.shape
    assert tokens.shape[1] == (16 if device == "cuda" else 9) and (targets[:, 9:] == IGNORE).all()


def test_the_model_is_the_sum_of_its_embeddings_then_blocks_norm_and_head():
    model, tokens = small_model(n_layer=2), torch.randint(14, (2, 6))
    task, view, rope = torch.tensor([2, 1]), torch.tensor([3, 7]), rotary(positions(tokens), 8)
    x = model.token.weight[tokens] + model.task.weight[task][:, None] + model.view.weight[view][:, None]
    y = model.norm(model.blocks[1](model.blocks[0](x, rope), rope)) @ model.head.weight.T
    torch.testing.assert_close(model(tokens, task, view), y)
    assert not Transformer(model.config)(tokens, task, view).any()              # a fresh one predicts all alike


@pytest.mark.parametrize("options", [{"ffn_factor": 0}, {"ffn_factor": 1}, {"dense": True, "ffn_factor": 2},
                                     {"dense": True, "ffn_factor": 0}])
def test_every_row_of_the_blocks_learns_within_twenty_steps_and_the_dense_block_starts_as_the_identity(options):
    """One is not enough: a gate is heard only where its neuron fires and pays, or has the highest cost of all."""
    model, task = Transformer(Config(n_task=40, d_model=32, n_head=2, n_layer=2, **options)), torch.arange(40)
    x, rope = torch.randn(2, 5, 32), rotary(line(2, 5), 16)
    assert all(torch.equal(block(x, rope), x) == model.config.dense for block in model.blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for _ in range(20):                                                 # gradients add up
        tokens, targets = torch.randint(14, (2, 40, 20))
        task_loss(model, tokens, task, task % 8, targets).backward()
        optimizer.step()
    assert all(p.grad.any(-1).all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, base, error", [("float32", torch.float64, 1e-12), ("bfloat16", torch.float32, 0.05)])
def test_cached_decoding_gives_the_full_forwards_tokens_and_logits(device, dtype, base, error):
    """Prompts of different lengths in one batch; more columns than decoding reads at first."""
    model, new = small_model(d_model=32, n_layer=2, dtype=dtype).to(device, base).eval(), 70
    tokens, lengths = torch.randint(10, (3, 9), device=device), torch.tensor([4, 9, 6], device=device)
    tokens[:, 0] = START
    task, view = torch.arange(3, device=device), torch.tensor([5, 0, 2], device=device)
    out, logits = model.generate(tokens, lengths, task, view, new, -1, math.inf, return_logits=True)
    assert torch.equal(out, logits.argmax(-1)) and out.shape == (3, new)
    for row, length in enumerate(lengths.tolist()):
        sequence = torch.cat((tokens[row, :length], out[row]))[None]
        full = model(sequence, task[row:row + 1], view[row:row + 1])[0, length - 1:-1]
        assert (logits[row] - full).norm() < error * full.norm()


@pytest.mark.parametrize("token", [3, NL])
def test_a_row_that_leaves_the_30_by_30_format_ends_and_stays_ended(token):
    """A model that repeats one token makes one long row, or one long column; the second prompt is in its grid."""
    model, zero = Transformer(Config(d_model=16)).eval(), torch.zeros(2, dtype=torch.long)
    model.head = nn.Linear(16, 14)
    model.head.bias.data[token] = 100
    prompts, lengths = torch.tensor([encode_prompt(np.ones((2, 2), int))] * 2), torch.tensor([8, 5])
    assert model.generate(prompts, lengths, zero, zero, 900).tolist() == [[token] * 32, [token] * 31 + [END]]


def test_losses_are_minus_log_the_probability_of_each_target_and_evaluating_drops_nothing_out():
    model, task, view = small_model(dropout=0.5).eval(), torch.tensor([0, 2]), torch.tensor([1, 4])
    batch = torch.randint(14, (2, 4)), task, view, torch.tensor([[IGNORE, 4, 11, 13], [IGNORE, 7, 13, IGNORE]])
    logp = model(*batch[:3]).log_softmax(-1).float()
    rows = torch.stack([-logp[0, 1, 4] - logp[0, 2, 11] - logp[0, 3, 13], -logp[1, 1, 7] - logp[1, 2, 13]])
    torch.testing.assert_close((sample_losses(model, *batch), task_loss(model, *batch)), (rows, rows.sum()))
    assert evaluate(model.train(), [batch])["loss"] == pytest.approx(rows.sum().item() / 5) and model.training


def test_monitors_of_hand_made_tensors_are_means_over_all_batches():
    """Three targets under known logits; a Q of which the first, second or no neuron fires; two unequal batches."""
    model = Transformer(Config(d_model=2, n_head=1, n_layer=1, ffn_factor=0)).eval()
    model.token.weight.data[:3] = torch.tensor([[1., -1.], [-1., 1.], [-1., -1.]])     # of unit root mean square
    q, model.head = model.blocks[0].attn.q, nn.Linear(2, 14)
    for p in (model.task.weight, model.view.weight, q.gate_weight, model.head.weight, model.head.bias):
        nn.init.zeros_(p)
    nn.init.eye_(q.proto_weight)                                   # Q's match is its input, and nothing costs
    model.head.bias.data[4] = 3
    tokens, zero = torch.tensor([[[0, 1, 2, 2]], [[2, 0, 1, 2]]]), torch.zeros(1, dtype=torch.long)
    targets = torch.tensor([[[4, IGNORE, IGNORE, IGNORE]], [[IGNORE, 4, 5, IGNORE]]])
    found = evaluate(model, [(tokens[i], zero, zero, targets[i]) for i in (0, 1)])
    p = model.head.bias.softmax(0)
    assert found["tokens"] == pytest.approx(2 / 3) and found["grids"] == 0.5
    assert found["loss"] == pytest.approx((-2 * p[4].log() - p[5].log()).item() / 3)
    assert found["entropy"] == pytest.approx(-(p * p.log()).sum().item())
    assert found["active blocks.0.attn.q"] == pytest.approx(3 / 8)       # of four tokens times two neurons
    assert found["failed blocks.0.attn.q"] == pytest.approx(1 / 4)
    assert found["active"] == pytest.approx(np.mean([found[f"active blocks.0.attn.{part}"] for part in "qkvo"]))
    assert pi_score(0.6, 1.2, 0.3) == pytest.approx(math.exp(-(0.5 * 0.6 / 1.2 + 0.5 * 0.3)))
    assert not model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_as_the_script_compiles_them_have_the_same_gradients_and_are_not_compiled_anew_for_a_shape(device):
    model = small_model(d_model=32, n_layer=2, ffn_factor=0).float().to(device)
    pairs = [Pair([], encode_views(0, np.full((n, n + 2), n), np.full((n, n), 1))) for n in range(1, 7)]
    groups = [collate([pair.views[0] for pair in pairs[i:j]], device) for i, j in ((0, 4), (3, 6), (2, 4))]

    def gradients(batch):
        model.zero_grad()
        task_loss(model, *batch).backward()
        return [p.grad.clone() for p in model.parameters()]
    eager = [gradients(batch) for batch in groups]
    torch._dynamo.reset()
    train_arc.compile_blocks(flags("--no-ffn", "--device", device), model, pairs, 0, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close([gradients(batch) for batch in groups], eager, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------ the design study's claims
def count_flops(run, *inputs):
    # The counter knows no CPU flash kernel, so the attention runs as plain products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("f, dense", [(0, False), (2, False), (4, True)])
def test_model_flops_equal_torchs_counter(f, dense):
    model, tokens, zero = small_model(ffn_factor=f, dense=dense), torch.randint(14, (3, 40)), torch.zeros(3).long()
    assert count_flops(model, tokens, zero, zero) == tokens.numel() * model.flops_per_token(40)


def test_routing_is_two_thirds_of_an_spl_so_an_spl_without_its_main_path_would_be_1_5_times_as_fast():
    layer, x = SparseProtoLinear(64, 64), torch.randn(10, 64)
    whole = count_flops(layer, x)
    assert whole == 3 * count_flops(nn.Linear(64, 64), x) == 1.5 * count_flops(layer.route, x)


@pytest.mark.parametrize("f, share", [(1, 1 / 3), (2, 1 / 2), (4, 2 / 3)])
def test_the_ffn_is_a_third_half_or_two_thirds_of_a_block_at_most(f, share):
    """6f/(12 + 6f + 2T/D), of T = 0 the bound; so removing it cannot save an order of magnitude below f = 18."""
    D, T = 32, 16
    x, rope = torch.randn(1, T, D), rotary(line(1, T), D // 2)
    alone, both = (count_flops(Block(D, 2, factor), x, rope) for factor in (0, f))
    attention = 2 * 2 * T * T * D                                  # the counter sees no causal half
    assert (both - alone) / (both - attention) == pytest.approx(share)
    assert (both - alone) / both == pytest.approx(6 * f / (12 + 6 * f + 2 * T / D)) and both / alone < 1 + f / 2


def test_dynsiha_is_two_spls_deep_not_eight():
    model, zero = small_model(), torch.zeros(1, dtype=torch.long)
    with model.watch() as seen:
        model(torch.randint(14, (1, 4)), zero, zero)
    q, k, v = (seen[f"blocks.0.attn.{name}"] for name in "qkv")
    assert q[1] is k[1] is v[1]                    # they read the same input, none another's output


def test_one_spl_output_computes_xor():
    x, (gate, w) = torch.tensor([[0., 0.], [0., 1.], [1., 0.], [1., 1.]]), torch.tensor([[[0., 0.]], [[1., 1.]]])
    assert spl_reference(x, -w, torch.tensor([2.]), w, gate)[0].flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_relu_of_spl_is_not_a_relu_mlp_for_it_bends_between_its_corners(seed):
    """Along a line on which no neuron switches, a relu network is straight and relu(SPL) is not: it is rational."""
    torch.manual_seed(seed)
    layer, mlp = random_spl(6, 5), nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 5)).double()
    start, step = torch.randn(2, 200, 1, 6, dtype=torch.float64)
    path = start + 1e-3 * torch.arange(3)[:, None] * step                              # 200 lines of three points
    (logits, M), cost = layer.route(path), path @ layer.gate_weight.T
    peaks = [z.abs() == z.abs().amax(-1, keepdim=True) for z in (logits, cost)]
    switches = {layer: torch.cat((M > 0, cost > 0, *peaks), -1), mlp: mlp[0](path) > 0}
    bends = []
    for f, on in switches.items():
        y = f(path[(on == on[:, :1]).flatten(1).all(1)]).relu()                        # where nothing switches
        bends.append((y[:, 0] - 2 * y[:, 1] + y[:, 2]).abs()[(y > 0).all(1)])          # and the relu is on
    assert min(map(len, bends)) > 100 and bends[0].median() > 1e-8 and bends[1].max() < 1e-13


# ------------------------------------------------------------------------------------------ data: sets, leaks
TASK = '{"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}'


def made(*numbers):
    """A different pair for each number below 100."""
    return [([[n // 10, n % 10]], [[n % 10], [n // 10]]) for n in numbers]


def spelled(sample):
    """The (input, output) that the tokens of a Sample spell, turned back, as lists."""
    parts = sample.tokens[1:sample.n_prompt - 1], sample.tokens[sample.n_prompt:]
    return tuple(view_grid(np.array(decode_grid([*part, END])), INVERSE[sample.view]).tolist() for part in parts)


def test_every_layout_reads_the_same(tmp_path):
    """Kaggle's files, GitHub's folders, a folder of folders of task files, as ConceptARC has them, and one file."""
    tasks = {"training": {"a": (made(1, 2), made(3))}, "evaluation": {"b": (made(4, 5), made(6, 7))}}
    kaggle, github = write_set(tmp_path / "kaggle", tasks), write_set(tmp_path / "github", tasks, github=True)
    shutil.copytree(github / "evaluation", tmp_path / "plain/concept")
    folders = kaggle, github, tmp_path / "plain", tmp_path / "plain/concept/b.json"
    for folder, solved in itertools.product(folders, (False, True)):
        (name, task), = train_arc.read_tasks(folder, "evaluation", solved).items()
        pairs = [[(x.tolist(), None if y is None else y.tolist()) for x, y in part] for part in task]
        assert (name, *pairs) == ("b", made(4, 5), made(6, 7) if solved else [(x, None) for x, _ in made(6, 7)])
    assert all(train_arc.read_tasks(folder, "training") == {} for folder in folders[2:])
    shutil.copytree(github, tmp_path / "mac/data")
    put("a shadow", tmp_path / "mac/__MACOSX/data/training", "._a.json")
    for folder in (kaggle, github, tmp_path / "mac"):               # in an archive, below a folder of its name
        archive = shutil.make_archive(tmp_path / "x", "zip", tmp_path, folder.name)
        assert list(train_arc.read_extra(archive)[0]) == ["a", "b"]


def test_hidden_files_are_skipped_and_the_others_read_in_the_order_of_names(tmp_path):
    """The order of the file system would make a copy of the data another run."""
    numbers = [str(n) for n in np.random.default_rng(0).permutation(range(10, 40))]
    put("{}", tmp_path, "other/z.json", "data/a.json", *(f"data/{n}/deep/{n}.json" for n in numbers))
    put("no task", tmp_path / "data", "._x.json", "__MACOSX/._x.json", "10/.ipynb_checkpoints/10.json", "notes.txt")
    (tmp_path / "data/link").symlink_to(tmp_path / "other")
    assert list(train_arc.read_raw(tmp_path / "data", "evaluation")) == [*sorted(numbers), "a", "z"]


@pytest.mark.parametrize("part, instead, fault", [
    *((TASK, text, "not JSON") for text in ("{", "\xff", "[" * 10**5)), (TASK, "[]", "a list; expected an object"),
    ('{"input": [[3]]}', "4", "task t: 'int'"), ('{"input": [[3]]}', "", "task t: 1 train pairs and 0 tests"),
    ('{"input": [[1]], "output": [[2]]}', "", "task t: 0 train pairs and 1 tests; expected one or more"),
    *((word, "other", f"task t: no '{word}'") for word in ("train", "test", "input", "output")),
    *(("[[3]]", grid, f"task t: {grid[:40]} is no grid; expected rows of one width, 1 to 30 each way") for grid in
      ("[]", "[[]]", "[[1], [1, 2]]", "[[1], 2]", "3", r'"a\nb"', str([[1]] * 31), str([[1] * 31]))),
    *(("[[3]]", f"[[1, {cell}]]", f"task t: a cell is {cell}; expected an integer from 0 to 9")
      for cell in ("10", "-1", "1.0", "true", "null", "[1]"))], ids=lambda value: value[:20])
def test_bad_tasks_are_named_in_one_line(tmp_path, part, instead, fault):
    (file := tmp_path / "t.json").write_bytes(TASK.replace(part, instead, 1).encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(f"{file}: {fault}")) as e:
        train_arc.read_tasks(tmp_path, "evaluation")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("files, words, fault", [
    ((), (), "--data .*: no arc-agi_evaluation_challenges.json and no task"),
    (("t.json", "a/t.json"), (), "/t.json: task t is in .*/a/t.json, too"),
    (("data/training/t.json",), (), "its tasks are in .*/data; name that"),
    (("evaluation/t.json",), ("--max-tokens", 5), "no pair of at most 5 tokens; raise --max-tokens"),
    (("evaluation/t.json",), ("--extra", HERE / "data/none"), "--extra .*none: no tasks there"),
    (("evaluation/t.json", "x/tasks/t.json"), ("--extra", "x"), "t.json: a dict; expected a list of pairs")])
def test_bad_sets_are_named(tmp_path, monkeypatch, files, words, fault):
    put(TASK, tmp_path, *files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=fault):
        train_arc.load_data(flags("--data", tmp_path, *words))


@pytest.mark.parametrize("kind, fault", [(zipfile.ZIP_STORED, "Bad CRC-32"), (zipfile.ZIP_DEFLATED, "decompressing")])
def test_a_broken_zip_is_named(tmp_path, kind, fault):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", kind) as file:
        file.writestr("tasks/t.json", 20 * TASK)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[50:60] = 10 * b"x"                                          # in the packed text
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=f"x.zip: cannot be unpacked: .*{fault}"):
        train_arc.read_extra(tmp_path / "x.zip")


def test_a_fault_within_a_zip_names_the_zip(tmp_path):
    for file, fault in ("tasks/t.json", "/tasks/t.json: a dict; expected a list"), ("t.txt", ": no tasks there"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr(file, TASK)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path}/x.zip{fault}")):
            train_arc.read_extra(tmp_path / "x.zip")


def test_nothing_to_train_on_is_an_evaluation_test_pair():
    """Though training/40853293 is evaluation/070dd51e under another id, and ARC-2 has 346 tasks that ARC-1 lacks."""
    words = "--max-tokens", 1863, "--batch-tokens", 1863, "--generated", 5, "--extra", ARC2, HERE / "data/re-arc.zip"
    names, pairs, _ = train_arc.load_data(flags("--data", ARC1, *words))
    evaluation = train_arc.read_tasks(ARC1, "evaluation", solved=True)
    trained = [(names[pair.views[0].task], *spelled(pair.views[0])) for pair in pairs]
    asked = [(x.tolist(), y.tolist()) for task in evaluation.values() for x, y in task.test]
    assert len(names) == 800 + 346 and len(asked) == 419 and len(pairs) > 6500      # 399 tasks have generated ones
    assert not {str((x, y)) for _, x, y in trained} & {str(pair) for pair in asked}
    assert not {str(x) for name, x, _ in trained if name not in evaluation} & {str(x) for x, _ in asked}
    assert Counter(name for name, _, _ in trained)["40853293"] <= 2                 # the twin has none


def test_tasks_that_leak_an_asked_one_are_dropped(tmp_path):
    write_set(tmp_path, {"evaluation": {"asked": (made(1, 2), made(3))}, "training": {
        "asked": (made(5), made(6)), "renamed": (made(2, 1), made(6)), "test input": (made(5), made(3)),
        "demonstrated": (made(5, 3), made(6)), "shares a pair": (made(1), made(6)),
        "of another shape": ([([[0], [3]], [[1]])], made(6))}})
    others, asked = (train_arc.read_tasks(tmp_path, split, solved=True) for split in ("training", "evaluation"))
    assert list(train_arc.without_leaks(others, asked)) == ["shares a pair", "of another shape"]


@pytest.mark.parametrize("words", [["--heldout"], []])
def test_what_is_trained_on_and_what_is_held_out(tmp_path, words):
    """`leaky` loses the pair that shows an asked input, and its tests. `both` is an asked task, whose outputs the
    training file knows, as Kaggle's test file repeats some. `long` is too long but for its test, as are two pairs of
    `fine`. The tasks whose tests are neither asked nor held out are shown every second epoch."""
    both, long = (made(21, 22), made(23)), [([[1] * 9], [[1] * 30])]
    data = write_set(tmp_path / "data", {
        "test": {"both": both, "asked": (made(7, 2), made(2))},
        "training": {"leaky": (made(1, 2, 3), made(4)), "both": both, "long": (long, made(12)),
                     "fine": (made(5) + long, made(6) + long)}})
    extra = write_set(tmp_path / "extra", {"training": {"fine": (made(8), made(9)), "c": (made(10), made(11)),
                                                        **({"fine's test": (made(17, 6), made(18))} if words else {})},
                                           "evaluation": {"d": (made(13), made(14)), "e": (made(2, 15), made(16))}})
    names, pairs, heldout = train_arc.load_data(flags(
        "--data", data, "--split", "test", "--repeat", 2, "--max-tokens", 30, "--extra", extra, *words))
    shown = {"leaky": [1, 3], "both": [21, 22]} | ({} if words else {"long": [12]})
    shown |= {"fine": [5] if words else [5, 6], "asked": [7, 2], "c": [10, 11], "d": [13, 14]}
    trained, often = [(name, *made(n)[0]) for name in shown for n in shown[name]], {"both", "asked"}
    for view in range(8):
        samples = [pair.views[view] for pair in pairs]
        assert [(names[sample.task], *spelled(sample)) for sample in samples] == trained
    assert [(names[sample.task], *spelled(sample)) for sample in heldout] == ([("fine", *made(6)[0])] if words else [])
    often |= {"fine"} if words else set()
    assert all(pair.every == (1 if names[pair.views[0].task] in often else 2) for pair in pairs)
    assert names == [*shown] and {sample.view for sample in heldout} <= {0}     # unturned, and in true colours


@pytest.mark.parametrize("zipped", [False, True])
def test_generated_pairs_reach_training_tasks_that_are_not_held_out_and_no_asked_one(tmp_path, zipped):
    """`twin` is the asked task under another id. Of the others, b and d stand for the asked ones."""
    training = {name: (made(n), made(n + 50)) for n, name in enumerate("abcd", 1)} | {"twin": (made(9, 8), made(6))}
    data = write_set(tmp_path / "data", {"training": training, "evaluation": {"asked": (made(8, 9), made(7))}})
    for n, name in enumerate([*training, "asked", "other"], 10):
        pairs = [{"input": x, "output": y} for x, y in made(n, 7, n + 10, n + 20)]      # 7 is an asked input
        put(json.dumps(pairs), tmp_path / "re_arc/tasks", f"{name}.json")
    extra = shutil.make_archive(tmp_path / "re_arc", "zip", tmp_path, "re_arc") if zipped else tmp_path / "re_arc"
    words = "--data", data, "--extra", extra, "--generated", 3, "--repeat", 2
    names, pairs, heldout = train_arc.load_data(flags(*words, "--heldout"))
    shown = {"a": [1, 51, 10, 20], "b": [2], "c": [3, 53, 12, 22], "d": [4], "twin": [9, 8], "asked": [8, 9]}
    trained = [(names[pair.views[0].task], *spelled(pair.views[0])) for pair in pairs]
    assert trained == [(name, *made(n)[0]) for name in shown for n in shown[name]]
    assert [(names[sample.task], *spelled(sample)) for sample in heldout] == [
        ("b", *made(52)[0]), ("d", *made(54)[0])]
    assert [pair.every for pair in pairs] == [2] * 4 + [1] + [2] * 4 + [1] + [2] * 2 + [1] * 2
    assert len(train_arc.load_data(flags(*words))[1]) == 4 * 4 + 2 + 2
    more = write_set(tmp_path / "more", {"training": {"other": (made(60), made(61))}})
    for order in (more, extra), (extra, more):          # a task that is an extra itself gets none, either way
        names, pairs, _ = train_arc.load_data(flags("--data", data, "--extra", *order))
        assert Counter(names[pair.views[0].task] for pair in pairs)["other"] == 2


# ------------------------------------------------------------------------------------------ batches: colours, epochs
def test_black_and_the_colours_that_only_outputs_show_stay():
    """'Mark with red' would contradict itself; a colour that a test input shows is free, and so are unused ones."""
    task = Task([(np.array([[0, 1]]), np.array([[2, 1, 3]]))], [(np.array([[3, 0]]), None)])
    assert train_arc.free_colours(task, True) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert train_arc.free_colours(task, False) == []


def test_parts_are_of_similar_lengths_and_as_many_as_the_budget_holds_when_padded():
    assert train_arc.split_by_budget([5, 1, 4, 2, 9, 2, 3, 7], 8) == [[1, 3, 5], [6, 2], [0], [7], [4]]


def epochs(pairs, n, budget, seed=0, world=1):
    """The batches of the first n epochs, a list for each."""
    stream = train_arc.batches(pairs, Namespace(seed=seed, batch_tokens=budget), world)
    plan = itertools.groupby(stream, lambda item: item[0])
    return [[batch for _, batch in epoch] for _, epoch in itertools.islice(plan, n)]


@pytest.mark.parametrize("world, n", [(1, 4), (2, 5), (3, 5)])
def test_an_epoch_shows_each_pair_once_in_any_view_and_colouring_and_its_batches_suffice(world, n):
    """Each process gets a sample, the longest is never alone, and targets follow the recoloured output."""
    sides = [(1, 2), (3, 3), (2, 4), (4, 1), (3, 3)][:n]
    grids = [np.arange(1, 1 + h * w).reshape(h, w) for h, w in sides]   # no two cells of a grid are alike
    pairs = [Pair([*range(1, 10)] if i < 3 else [], encode_views(i, x, x[::-1])) for i, x in enumerate(grids)]
    budget, seen = world * len(pairs[1].views[0].tokens), []
    for batch in itertools.chain(*(plan := epochs(pairs, 200, budget, world=world))):
        tokens, task, _, targets = collate(batch, "cpu")
        assert len(batch) >= (max(2, world) if 1 in task else world)
        assert (len(batch) - max(1, world - 1)) * tokens.shape[1] <= budget     # the last few join those before
        for row, sample in enumerate(batch):
            start, end = sample.n_prompt, len(sample.tokens)
            assert targets[row, start - 1:end].tolist() == [*tokens[row, start:end].tolist(), END]
            true, shown = (np.ravel(sum(spelled(it), [])) for it in (pairs[sample.task].views[0], sample))
            assert len(set(zip(true, shown))) == len(set(true)) == len(set(shown)) and 0 not in shown
            seen.append((sample.task, sample.view, *shown))
    assert all(sorted(sample.task for batch in epoch for sample in batch) == [*range(n)] for epoch in plan)
    views = Counter(view for i, view, *_ in seen if i == 1)
    assert len(views) == 8 and min(views.values()) > 8
    colourings = [len({tuple(shown) for i, _, *shown in seen if i == task}) for task in (1, 3)]
    assert colourings[0] > 190 and colourings[1] == 1                   # the colours of the last are not free


def test_every_third_epoch_shows_a_pair_of_the_others():
    pairs = [Pair([], encode_views(n, np.ones((1, 1), int)), 1 if n < 2 else 3) for n in range(6)]
    plan = [sorted(sample.task for batch in epoch for sample in batch) for epoch in epochs(pairs, 3, 100)]
    assert plan == [[0, 1, 3], [0, 1, 2, 5], [0, 1, 4]]


def test_the_stream_follows_from_the_seed_and_the_epoch():
    """Partners and the order of batches are drawn anew for each epoch; the same seed gives the same tokens."""
    grids = [np.ones((n % 3 + 1, n % 3 + 1), int) for n in range(36)]           # square: as long in every view
    pairs = [Pair([*range(1, 10)], encode_views(n, x, x)) for n, x in enumerate(grids)]
    first, again, other = (epochs(pairs, 2, 52, seed) for seed in (0, 0, 1))
    assert str(first) == str(again)
    partners = [{frozenset(sample.task for sample in batch) for batch in plan} for plan in first + other]
    lengths = [[len(batch[0].tokens) for batch in plan] for plan in first + other]
    for i, j in itertools.combinations(range(4), 2):
        assert len(partners[i] & partners[j]) < 4 and lengths[i] != lengths[j] and lengths[i] != sorted(lengths[i])


# ------------------------------------------------------------------------------------------ answers: decoded, scored
TWO = [[0, 1, 2], [3, 4, 5]], [[7], [1], [8]]
FILLER, A, B, C = [[0]], [[1]], [[2, 2]], [[3]]


class Echo(Transformer):
    """Answers a prompt with its own grid, for at most `most` prompts at once; notes (task, view, tokens of the
    grid) of each in `asked`, and in `modes` whether it was training when it was called."""

    def __init__(self, most=10**9):
        super().__init__(Config(n_task=4, d_model=16, n_head=2, n_layer=1))
        self.most, self.asked, self.modes = most, [], set()
        self.register_forward_pre_hook(lambda model, _: model.modes.add(model.training))

    def generate(self, tokens, lengths, task, view, longest):
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.modes.add(self.training)
        grids = [tuple(row[1:n - 1]) for row, n in zip(tokens.tolist(), lengths)]
        self.asked += zip(task.tolist(), view.tolist(), grids)
        return F.pad(tokens[:, 1:].masked_fill(tokens[:, 1:] == SEP, END), (0, 1), value=END)[:, :longest]


def questions_of(*grids, free=range(1, 10)):
    return {n: train_arc.Question([*free], encode_views(n, np.array(x))) for n, x in enumerate(grids)}


@pytest.mark.parametrize("free, tables, most", [(range(1, 10), 3, 48), (range(1, 10), 3, 5), ((), 1, 1)])
def test_answers_are_turned_and_coloured_back_from_8_views_in_each_colouring(free, tables, most):
    """Out of memory halves the batch and loses none. No question's colours depend on the others: two processes,
    each with every second question, answer as one does."""
    model, alone, questions, c = Echo(most), Echo(), questions_of(*TWO, free=free), flags("--colour-votes", 3)
    assert train_arc.propose(model, questions, c, 0) == {0: [TWO[0]], 1: [TWO[1]]}
    assert Counter(asked[:2] for asked in model.asked) == {(n, view): tables for n in (0, 1) for view in range(8)}
    true = {(n, v, tuple(encode_grid(view_grid(np.array(TWO[n]), v)))) for n in (0, 1) for v in range(8)}
    assert true <= set(model.asked) and len(set(model.asked)) == 16 * tables
    assert train_arc.propose(alone, {1: questions[1]}, c, 0) == {1: [TWO[1]]}
    assert sorted(alone.asked) == sorted(asked for asked in model.asked if asked[0] == 1)
    with pytest.raises(torch.OutOfMemoryError):
        train_arc.propose(Echo(most=0), questions, c, 0)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(monkeypatch, budget):
    """An output of 12 tokens fits into 20 after a prompt of 2 cells and not after one of 8, in whatever batch."""
    model, output = Echo(), torch.tensor([*encode_grid(np.ones((1, 10), int)), END])
    model.generate = lambda tokens, lengths, task, view, longest: output[:longest].expand(len(tokens), -1)
    monkeypatch.setattr(train_arc, "decode_tokens", lambda model: budget)
    found = train_arc.propose(model, questions_of([[1, 1]], [[1] * 8], free=()), flags("--max-tokens", 20), 0)
    assert sorted(found[0]) == [[[1]] * 10, [[1] * 10]] and found[1] == []


@pytest.mark.parametrize("device", DEVICES)
def test_the_likeliest_output_comes_first(monkeypatch, device):
    """By the mean over 8 views of its log-probability, read token by token, each output by itself."""
    monkeypatch.setattr(train_arc, "RANK_TOKENS", 100)                  # several batches
    model, rng = small_model().to(device), np.random.default_rng(0)
    for table in (model.token, model.task, model.view):
        nn.init.normal_(table.weight)                                   # so that task and view matter
    outputs = [rng.integers(10, size=(1, 2)).tolist() for _ in range(4)] + [[[1], [2]]]

    def log_probability(n, output, view):
        prompt = encode_prompt(view_grid(np.array(TWO[n]), view))
        answer = [*encode_grid(view_grid(np.array(output), view)), END]
        inputs = (torch.tensor(part, device=device) for part in ([prompt + answer], [n], [view]))
        logp = model(*inputs)[0].log_softmax(-1)
        return sum(logp[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
    with torch.inference_mode():
        found = train_arc.rank_outputs(model, questions_of(*TWO, [[1]]), {0: outputs, 1: outputs, 2: []}, 0)
        for n in (0, 1):
            mean = [np.mean([log_probability(n, output, view) for view in range(8)]) for output in outputs]
            assert found[n] == [outputs[i] for i in np.argsort(mean)[::-1]]
    assert found[2] == []


def test_the_two_likeliest_outputs_are_submitted_and_scored_and_fillers_submitted_alone(tmp_path):
    """The score is the mean over a task's known outputs, then over the tasks that have one, tried or not."""
    outputs = {"first": [A], "second": [A], "third": [A], "half": [A, A], "unknown": [A, None], "black": [FILLER],
               "one": [FILLER], "none": [FILLER], "untried": [FILLER], "not asked": [None]}
    tasks = {name: Task([], [(None, y and np.array(y)) for y in grids]) for name, grids in outputs.items()}
    answers = {("first", 0): [A], ("second", 0): [B, A], ("third", 0): [B, C, A], ("half", 1): [A],
               ("unknown", 0): [A], ("black", 0): [FILLER], ("one", 0): [B], ("none", 0): []}
    assert train_arc.score(answers, tasks) == {
        "pass@1": pytest.approx(3.5 / 9), "pass@2": pytest.approx(4.5 / 9), "solved": 4, "tasks": 9}
    assert train_arc.score({}, {"not asked": tasks["not asked"]}) == {}
    train_arc.write_submission(tmp_path / "submission.json", tasks, answers)
    submission = train_arc.read_json(tmp_path / "submission.json")
    assert submission.keys() == tasks.keys() and submission["third"] == [{"attempt_1": B, "attempt_2": C}]
    assert submission["half"] == [{"attempt_1": FILLER, "attempt_2": FILLER}, {"attempt_1": A, "attempt_2": FILLER}]


@pytest.mark.parametrize("output, words, tasks, said", [
    ("[[[4, 3]]]", [], 3, "pass@2 33.33%"), *((none, [], 2, "pass@2 50.00%") for none in ("[[]]", "[null]", "null")),
    ("[[[4, 3]]]", ["--split", "test"], 0, "test: no solutions in .*, so the submission cannot be scored here")])
def test_untried_tasks_are_wrong_and_unknown_outputs_do_not_count(tmp_path, capsys, output, words, tasks, said):
    """A model that repeats its input is right about one task and wrong about one; a third is too long for it."""
    entries = {"right": (made(5), [([[1, 2]], [[1, 2]])]), "wrong": (made(6), [([[3, 4]], [[4, 3]])]),
               "long": (made(7), [([[1] * 30], A)])}
    write_set(tmp_path, {"training": {"x": (made(1), made(2))}, "evaluation": entries, "test": entries})
    (tmp_path / "arc-agi_test_solutions.json").unlink()
    file, model = tmp_path / "arc-agi_evaluation_solutions.json", Echo()
    file.write_text(file.read_text().replace("[[[4, 3]]]", output))
    c = flags("--data", tmp_path, "--max-tokens", 30, "--show", 2, "--no-permute-colours", *words)
    c.out = tmp_path
    result, shown = train_arc.solve(c, model, ["x", *entries]), capsys.readouterr().out
    scores = {"pass@1": 1 / tasks, "pass@2": 1 / tasks, "solved": 1, "tasks": tasks} if tasks else {}
    assert result == scores | {"tried": 2} and model.modes == {False}   # no dropout
    assert Counter(asked[:2] for asked in model.asked) == {(n, view): 1 for n in (1, 2) for view in range(8)}
    submission = train_arc.read_json(tmp_path / "submission.json")
    assert [submission[name][0]["attempt_1"] for name in entries] == [[[1, 2]], [[3, 4]], FILLER]
    mark = ", right" if scores else ""                                  # an output that is unknown gives none
    assert f"right test 0: input\n1 2\nattempt{mark}\n1 2\noutput\n" in shown and "wrong test 0: input" in shown
    assert re.search(said, shown)
    file.write_text(file.read_text().replace(output, "[[[4, 3]], [[4, 3]]]"))
    if scores:                                                          # the answers are on disk before the fault
        with pytest.raises(InputError, match="solutions.json: task wrong: 2 outputs for 1 test inputs"):
            train_arc.solve(c, model, ["x", *entries])


# ------------------------------------------------------------------------------------------ runs: training
def literal_run(data, clip, *words):
    """The weights of a run, the (loss, gradient norm) of each step, and its last look at the held-out pairs."""
    c = flags(*SMALL, "--data", data, *words)
    names, pairs, heldout = train_arc.load_data(c)
    torch.manual_seed(c.seed)
    model = Transformer(Config(n_task=len(names), d_model=32, n_head=2, n_layer=2, ffn_factor=0,
                               tied_gate=c.tied_gate, dropout=c.dropout))
    maps = [p for name, p in model.named_parameters() if c.muon_lr and "mu_weight" in name]
    decayed = [p for p in model.blocks.parameters() if p.ndim == 2 and id(p) not in map(id, maps)]
    others = [p for p in model.parameters() if id(p) not in map(id, decayed + maps)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw, history = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True), []
    optimizers = [(adamw, c.lr)]
    if maps:
        optimizers.append((Muon([{"params": maps}], 0, weight_decay=0.1), c.muon_lr))
    routing = [p for name, p in model.named_parameters() if c.sars and ("proto" in name or "gate" in name)]
    task = [p for p in model.parameters() if id(p) not in map(id, routing)]
    for step, (_, batch) in zip(range(c.steps), train_arc.batches(pairs, c)):
        torch.manual_seed((c.seed << 32) + step)
        *inputs, targets = collate(batch, "cpu")
        with model.watch() as seen:
            loss = task_loss(model, *inputs, targets) / (targets != IGNORE).sum()
        loss.backward()
        if c.sars:
            route_loss = sum(routing_loss(*layer, unpadded(targets)) for layer in seen.values()) / len(seen)
            for p, gradient in zip(routing, torch.autograd.grad(route_loss, routing)):
                p.grad = gradient
        for stream in (routing, task):
            norm = nn.utils.clip_grad_norm_(stream, clip)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / c.steps / 0.2, 1, (1 - step / c.steps) / 0.5)
            optimizer.step()
        model.zero_grad()
        history.append((loss.item(), norm.item()))
    return model.state_dict(), history, evaluate(model, [collate(heldout, "cpu")])


@pytest.mark.parametrize("more", [["--muon-lr", "0"], ["--muon-lr", "1e-2", "--no-tied-gate"],
                                  ["--muon-lr", "0", "--sars"], ["--muon-lr", "0", "--sars", "--no-tied-gate"]])
def test_a_run_equals_a_loop_written_out(tmp_path, monkeypatch, more):
    """Here compiling changes no function; the warm-up that it brings must leave no trace."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(train_arc, "LOG_EVERY", 1)
    monkeypatch.setattr(train_arc, "WARMUP", 0.2)
    monkeypatch.setattr(train_arc, "CLIP", 0.02)            # below the routing loss's small gradients, too
    data, small = one_task_set(tmp_path / "data"), ["--batch-tokens", "30", "--max-tokens", "30", "--compile"]
    words = [*FAST, *small, "--dropout", "0.1", "--lr", "2e-2", "--seed", "3", *more]
    saved, (expected, history, found) = train(data, tmp_path / "out", *words), literal_run(data, 0.02, *words)
    log = read_log(tmp_path / "out")
    assert equal(saved, expected) and list(zip(log["loss"], log["grad_norm"])) == history
    for name in ("loss", "grids", "active"):
        assert log[f"heldout_{name}"][-1] == pytest.approx(found[name])


def test_the_arms_of_a_comparison_train_on_the_same_batches(tmp_path, monkeypatch):
    given, data = [], one_task_set(tmp_path / "data")
    monkeypatch.setattr(train_arc, "collate", lambda samples, device: given[-1].append(
        [(s.task, s.view, s.tokens.tobytes()) for s in samples]) or collate(samples, device))
    for n, arm in enumerate(([], ["--ffn-factor", "1"], ["--dense", "--ffn-factor", "4"], ["--n-layer", "3"])):
        given.append([])
        train(data, tmp_path / str(n), *FAST, *arm)
    assert len(given[0]) == 1 + 12 and given[0] == given[1] == given[2] == given[3]         # 1 is held out


@pytest.mark.parametrize("github, word", [(False, "--no-heldout"), (True, "--heldout")])
def test_outputs_that_are_asked_for_reach_neither_training_nor_answers(tmp_path, github, word):
    """With a broken one weights, monitors and submission are the same to the bit; scoring alone meets the fault."""
    clean, broken = (one_task_set(tmp_path / name, github) for name in ("clean", "broken"))
    put("not even JSON", broken, "arc-agi_sample.json")                 # of no use, so not opened
    file = broken / ("evaluation/mirror.json" if github else "arc-agi_evaluation_solutions.json")
    file.write_text(re.sub(r"\d(\D*)$", r"10\1", file.read_text()))     # the last number: a cell of that output
    words = [*LEARNT, "--steps", "100", word]
    train(clean, tmp_path / "a", *words)
    with pytest.raises(InputError, match=re.escape(f"{file}: task mirror: a cell is 10")):
        train(broken, tmp_path / "b", *words)
    assert equal(*(train_arc.load_checkpoint(tmp_path / run)["model"] for run in "ab"))
    a, b = (read_log(tmp_path / run) for run in "ab")
    assert all(np.array_equal(a[name], b[name], True) for name in a.dtype.names[7:])
    a, b = (train_arc.read_json(tmp_path / run / "submission.json") for run in "ab")
    assert a == b and a["mirror"][0]["attempt_1"] != [[0]]              # an answer, not the filler


def signal_in_step(monkeypatch, step, number=signal.SIGINT):
    """The signal comes while the loss of this step is computed; later runs are left alone."""
    steps = itertools.count(1)

    def interrupted(*inputs):
        if next(steps) == step:
            signal.raise_signal(number)
        return task_loss(*inputs)
    monkeypatch.setattr(train_arc, "task_loss", interrupted)


def saved_step(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["step"]


def resume(out, *words):
    """Goes on with a run -> the weights at its end."""
    train_arc.main(["--resume", str(out), *map(str, words)])
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("number, at", [(signal.SIGINT, 9), (signal.SIGTERM, 1), (signal.SIGHUP, 4)])
def test_a_stopped_run_goes_on_to_the_same_weights_and_with_nothing_else(tmp_path, monkeypatch, number, at):
    monkeypatch.setattr(train_arc, "LOG_EVERY", 5)
    words = [*FAST, "--dropout", "0.1", "--muon-lr", "4e-3"]
    data, out = one_task_set(tmp_path / "data"), tmp_path / "stopped"
    whole, handler = train(data, tmp_path / "whole", *words), signal.getsignal(number)
    signal_in_step(monkeypatch, at, number)
    assert train_arc.main([*SMALL, *words, "--data", str(data), "--out", str(out)]) == 130
    assert saved_step(out) == at and not (out / "result.json").exists() and signal.getsignal(number) == handler
    with pytest.raises(InputError, match="stopped: is there already"):                   # no run overwrites another
        train(data, out, *words)
    more = write_set(tmp_path / "more", {"training": {"more": (made(1, 2), made(3))}})
    for word, value, fault in (("--extra", more, "other pairs than those"), ("--d-model", 16, "model has 32"),
                               ("--ffn-factor", 1, "model has 0"), ("--n-layer", 3, "model has 2"),
                               ("--out", tmp_path / "other", "a run stays in its folder")):
        with pytest.raises(InputError, match=fault):
            resume(out, word, value)
    assert equal(resume(out, "--data", data.rename(tmp_path / "moved")), whole)
    begun = train_arc.read_json(out / "config.json")["begun"]
    assert [run["command"][0] for run in begun] == [SMALL[0], "--resume"]
    with pytest.raises(InputError, match="its budget is used up"):
        resume(out)
    result = train_arc.read_json(out / "result.json")
    (out / "result.json").unlink()                              # as if killed after the last step
    assert equal(resume(out), whole) and train_arc.read_json(out / "result.json") == result
    assert parse(["--minutes", "5"], {"steps": 12}).steps == 0                          # another budget, given anew
    assert read_log(out)["step"].tolist() == sorted({5, 10, 12, at})        # each once, the last as well


def test_held_out_pairs_are_looked_at_about_25_times_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(train_arc, "LOG_EVERY", 1)
    train(one_task_set(tmp_path / "data"), tmp_path / "out", "--steps", 100, "--no-score")
    log = read_log(tmp_path / "out")
    looks = log["step"][np.isfinite(log["heldout_loss"])]
    assert 20 <= len(looks) <= 30 and looks[-1] == 100 and np.diff(looks).max() <= 5


def test_a_checkpoint_of_a_gpu_is_answered_without_one_but_not_trained(learnt, tmp_path, monkeypatch):
    monkeypatch.setattr(train_arc, "DEVICES", ["cpu"])
    state = torch.load(learnt[1] / "checkpoint.pt", weights_only=True)
    state["flags"] |= {"device": "cuda", "data": str(learnt[0])}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert train_arc.main(["--eval", str(tmp_path), "--out", str(tmp_path / "out")]) is None
    other = one_task_set(tmp_path / "data")
    with pytest.raises(InputError, match="data: no task that the model was trained on; --init answers new ones"):
        train_arc.main(["--eval", str(tmp_path), "--data", str(other), "--out", str(tmp_path / "two")])
    assert not (tmp_path / "two").exists()
    with pytest.raises(InputError, match="--device cuda: expected one of"):
        resume(tmp_path)


def test_a_checkpoint_that_does_not_fit_the_code_is_named_by_all_that_read_it(learnt, tmp_path):
    """As one of another revision may be."""
    state = torch.load(learnt[1] / "checkpoint.pt", weights_only=True)
    state["flags"] |= {"data": str(learnt[0])}
    weight = state["model"].pop("head.weight")
    torch.save(state, tmp_path / "checkpoint.pt")
    for use in (lambda run: train_arc.main(["--eval", run, "--out", f"{run}/out"]), resume, show_attention):
        with pytest.raises(InputError, match=f"{tmp_path}: its checkpoint does not fit: .*Missing key.*head.weight"):
            use(str(tmp_path))
    state["model"]["head.weight"] = weight
    state["optimizers"][0]["param_groups"].pop()
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=f"{tmp_path}: its checkpoint does not fit: .*number of parameter groups"):
        resume(tmp_path)


def test_the_result_is_on_disk_before_the_answers_and_not_while_the_run_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(train_arc, "solve", lambda *_: train_arc.refuse("no answers today"))
    with pytest.raises(InputError, match="no answers today"):
        train(one_task_set(tmp_path / "data"), out, "--steps", 12)
    assert train_arc.read_json(out / "result.json")["steps"] == 12
    signal_in_step(monkeypatch, 2)
    resume(out, "--steps", 16, "--no-score", "--lr", "1e-4")
    assert read_log(out)["lr"][-1] == pytest.approx(1e-4 * 3 / 8)           # step 14 of 16
    assert saved_step(out) == 14 and not (out / "result.json").exists()


def test_a_signal_during_the_last_look_at_the_model_stops_the_run_as_well(tmp_path, monkeypatch):
    def look(*batches):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*batches)
    monkeypatch.setattr(train_arc, "evaluate", look)
    words = "--steps", "1", "--data", str(one_task_set(tmp_path / "data")), "--out", str(tmp_path / "out")
    assert train_arc.main([*SMALL, *words]) == 130 and saved_step(tmp_path / "out") == 1


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """nohup starts a run so, to outlive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in_step(monkeypatch, 3, signal.SIGHUP)
    train(one_task_set(tmp_path / "data"), tmp_path / "out", *FAST)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and saved_step(tmp_path / "out") == 12


@pytest.mark.parametrize("n", [1, 6])
def test_a_run_that_dies_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, n):
    """One that cannot be replaced leaves the one before; a kill or a power cut may leave anything of the log."""
    data, out, real, writes = one_task_set(tmp_path / "data"), tmp_path / "out", os.replace, itertools.count()

    def replace(source, target):
        if target.suffix == ".pt" and next(writes) == n:
            raise OSError("the disk is gone")
        real(source, target)
    monkeypatch.setattr(train_arc, "SAVE_MINUTES", 0)
    monkeypatch.setattr(train_arc, "LOG_EVERY", 1)
    monkeypatch.setattr(train_arc.os, "replace", replace)
    with pytest.raises(InputError, match="checkpoint.pt: cannot be written: the disk is gone"):
        train(data, out, *FAST)
    assert saved_step(out) == n - 1 and not list(out.glob("*.tmp"))
    (out / "log.csv").write_bytes(b"step,epoch\n2,0\n99,1" + bytes(50))
    assert equal(resume(out), train(data, tmp_path / "whole", *FAST)) and read_log(out)["step"][-1] == 12


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """From step 7 on; noticed where the next log is due."""
    factors = itertools.chain([1] * 6, itertools.repeat(math.nan))
    monkeypatch.setattr(train_arc, "LOG_EVERY", 3)
    monkeypatch.setattr(train_arc, "SAVE_MINUTES", 0)
    monkeypatch.setattr(train_arc, "task_loss", lambda *inputs: task_loss(*inputs) * next(factors))
    with pytest.raises(InputError, match="^step 9: loss nan, gradient norm nan, .*checkpoint is kept$"):
        train(one_task_set(tmp_path / "data"), tmp_path / "out", *FAST)
    assert saved_step(tmp_path / "out") == 6


# ------------------------------------------------------------------------------------------ runs: checkpoints, faults
@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """(data, finished run) of a model that knows its task, named as the demo's, by heart: two questions."""
    mirror = [(g.tolist(), g[:, ::-1].tolist()) for g in np.random.default_rng(0).integers(0, 10, (4, 3, 3))]
    tasks = {"training": {}, "evaluation": {"0d3d703e": (mirror, mirror[:2])}}
    data, out = write_set(tmp_path_factory.mktemp("data"), tasks), tmp_path_factory.mktemp("runs") / "learnt"
    train(data, out, *LEARNT, "--steps", "500")
    return data, out


def test_a_new_run_begins_with_all_weights_of_another_but_its_tasks(learnt, tmp_path):
    """Its size comes with them; the flags of its training do not."""
    data, steps = one_task_set(tmp_path / "data"), ["--steps", "1", "--lr", "1e-7", "--no-score", "--no-compile"]
    words = ["--init", str(learnt[1]), "--device", "cpu"]
    train_arc.main([*words, *steps, "--data", str(data), "--out", str(tmp_path / "out")])
    old, new = map(train_arc.load_checkpoint, (learnt[1], tmp_path / "out"))
    assert (new["step"], new["flags"]["d_model"]) == (1, 32) and new["flags"]["lr"] == 1e-7
    assert new["flags"]["batch_tokens"] == train_arc.CPU["batch_tokens"]
    assert new["names"] == ["turn", "mirror"] and new["model"].pop("task.weight").shape == (2, 32)
    for name, weight in new["model"].items():
        torch.testing.assert_close(weight, old["model"][name], atol=1e-6, rtol=0)
    assert train_arc.read_start({"init": learnt[1]})[1]["extra"] == []    # on a GPU, too
    resume(tmp_path / "out", "--steps", 2)                              # from here a run like any other
    assert saved_step(tmp_path / "out") == 2
    train_arc.main(["--eval", str(tmp_path / "out"), "--out", str(tmp_path / "answers")])
    assert (tmp_path / "answers" / "submission.json").exists()
    with pytest.raises(InputError, match="--d-model 64: the checkpoint's model has 32"):
        train_arc.main([*words, "--d-model", "64"])
    with pytest.raises(InputError, match="not allowed with argument"):
        train_arc.main([*words, "--resume", str(learnt[1])])
    with pytest.raises(InputError, match="trained on task 0d3d703e, perhaps on its tests"):
        train_arc.main([*words, "--data", str(learnt[0])])


def test_a_model_that_overfits_one_task_answers_exactly_and_again_with_one_process_or_two(learnt, tmp_path):
    data, out = learnt
    words = ["--eval", str(out), "--out"]
    train_arc.main([*words, str(tmp_path / "one")])
    run = script(*words, tmp_path / "two", launcher=TORCHRUN)
    assert run.returncode == 0, run.stderr
    solution = train_arc.read_json(data / "arc-agi_evaluation_solutions.json")["0d3d703e"]
    for folder in (out, tmp_path / "one", tmp_path / "two"):
        submission, result = (train_arc.read_json(folder / file) for file in ("submission.json", "result.json"))
        assert [entry["attempt_1"] for entry in submission["0d3d703e"]] == solution
        assert result["pass@1"] == result["solved"] == 1 and result["tried"] == 2
        assert (folder / "submission.json").read_bytes() == (out / "submission.json").read_bytes()


def test_a_checkpoint_that_is_none_is_refused_and_not_executed(learnt, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    whole = torch.load(learnt[1] / "checkpoint.pt", weights_only=True)
    lacking = {name: value for name, value in whole.items() if name != "flags"}
    for content, fault in ((whole | {"model": Evil()}, "Weights only"), (lacking, "KeyError: 'flags'"),
                           (whole | {"shape": {"depth": 1}}, "TypeError: .*'depth'")):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(InputError, match=f"checkpoint.pt: .*{fault}.*; expected the folder of a run"):
            resume(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_presets_reach_the_flags_and_a_flag_wins(monkeypatch):
    monkeypatch.setattr(train_arc, "DEVICES", ["cpu", "cuda"])
    presets = ("cpu", train_arc.CPU, train_arc.CPU_DENSE), ("cuda", train_arc.CUDA, train_arc.CUDA_DENSE)
    for device, preset, control in presets:
        c, dense = parse(["--device", device]), parse(["--device", device, "--dense"])
        assert preset.items() <= vars(c).items() and (c.arm, c.ffn_factor) == ("ffn", 1)
        assert control.items() <= vars(dense).items() and (dense.arm, dense.ffn_factor) == ("dense", 4)
        assert dense.lr < c.lr or dense.muon_lr < c.muon_lr             # rates of its own
        assert parse(["--device", device, "--dense", "--lr", "0.5", "--ffn-factor", "2"]).lr == 0.5
        assert parse(["--device", device, "--dense", "--no-ffn"]).arm == "dense-no-ffn"


@pytest.mark.parametrize("words, fault", [
    ("--d-model 30", "--d-model 30: expected a multiple of 4"), ("--lr nan", "--lr nan: expected 1e-07 or more"),
    ("--steps -5", "--steps -5"), ("--lr fast", "--lr"), ("--dropout 1", "--dropout 1"), ("--speed 3", "--speed"),
    ("--batch-tokens 100", "--batch-tokens 100: expected --max-tokens 150"), ("--moie-norm --no-ffn", "--moie-norm"),
    ("--no-ffn --ffn-factor 2", "--ffn-factor: not allowed with argument --no-ffn"),
    *((f"--dense {word}", "leave out --sars") for word in ("--sars", "--moie-norm", "--tied-gate")),
    ("--resume nowhere", "nowhere"), ("--data nowhere", "nowhere"),
    ("--compare nowhere", "nowhere: not a finished run")])
def test_bad_flags_are_named_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, words, fault):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(fault)) as e:
        train_arc.main(["--device", "cpu", "--steps", "1", "--no-compile", "--no-score", *words.split()])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_run_with_one_line_and_its_files_stay(tmp_path):
    out, limit = tmp_path / "out", (20000, 20000)       # bytes: no file may grow beyond, as on a full disk
    train(one_task_set(tmp_path / "data"), out, *FAST)
    before = [(out / file).read_bytes() for file in ("checkpoint.pt", "log.csv")]
    run = script("--resume", out, "--steps", 14, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert run.returncode == 2 and re.fullmatch("error: .*checkpoint.pt: cannot be written: .*\n", run.stderr)
    assert [(out / file).read_bytes() for file in ("checkpoint.pt", "log.csv")] == before


def test_a_run_goes_on_without_a_compiler_and_a_terminal_for_its_letters(tmp_path):
    data, out, cache = one_task_set(tmp_path / "data"), tmp_path / "Läufe", str(tmp_path / "cache")
    environment = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONIOENCODING": "ascii"}
    run = script(*SMALL, *FAST, "--compile", "--data", data, "--out", out, env=environment)
    assert "torch.compile does not work here, going on without it: " in run.stdout and "L\\xe4ufe" in run.stdout
    assert run.returncode == 0 and (out / "result.json").exists(), run.stderr


def test_a_cache_folder_that_cannot_be_made_ends_in_one_line(tmp_path):
    """Torch's optimizers need it, too, so that there is no going on without it."""
    data = one_task_set(tmp_path / "data")
    put("a file", tmp_path, "file")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file/cache")}
    run = script(*SMALL, *FAST, "--compile", "--data", data, "--out", tmp_path / "out", env=environment)
    assert run.returncode == 2 and re.fullmatch("error: .*Not a directory: .*file/cache'\n", run.stderr), run.stderr


def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    """Their shares differ in size: the loss is the mean over all targets, not over processes."""
    data, words = one_task_set(tmp_path / "data"), [*FAST, "--batch-tokens", "300"]
    train(data, tmp_path / "one", *words)
    run = script(*SMALL, *words, "--data", data, "--out", tmp_path / "two", launcher=TORCHRUN)
    assert run.returncode == 0 and run.stdout.count("heldout pairs: loss") == 1, run.stderr
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for name in ("loss", "grad_norm", "heldout_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads")
def test_the_process_group_takes_its_threads_with_it():
    """One still there when Python ends can abort the process, the finished run and all."""
    code = """if True:
        import glob, time, train_arc
        from pathlib import Path
        train_arc.dist.init_process_group("gloo", store=train_arc.dist.HashStore(), rank=0, world_size=1)
        train_arc.torch.compiler.set_stance("default")      # loads what would hold the group
        names = lambda: [Path(comm).read_text() for comm in glob.glob("/proc/self/task/*/comm") if Path(comm).exists()]
        threads = lambda: sum("gloo" in name for name in names())
        print(threads())
        train_arc.dist.destroy_process_group()
        end = time.time() + 10
        while threads() and time.time() < end:              # the system takes a moment to forget them
            time.sleep(0.1)
        print(threads())"""
    before, after = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True).split()
    assert int(before) > 0 == int(after)


def test_sars_refuses_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--sars: needs one process"):
        flags("--sars")
    flags("--sars", "--eval", "FILE", "--max-tokens", 1863)             # limits of training do not hold for answers


def test_all_processes_take_the_clock_and_the_stop_of_the_first(monkeypatch):
    """One that stopped by itself would leave the others waiting for its gradient."""
    first = torch.tensor([0.5, 1], dtype=torch.float64)
    monkeypatch.setattr(train_arc.dist, "broadcast", lambda shared, source: shared.copy_(first))
    assert train_arc.progress(Namespace(steps=8), {"step": 5}, [], 2) == (0.5, True)


def finished_run(folder, seed, losses):
    """A folder as a run leaves it: a look at the held-out pairs every 10 s, a line without one in between."""
    lines = [f"{n},{10 * n},{2 * loss},{loss}\n{n},{10 * n + 5},{3 * loss},\n" for n, loss in enumerate(losses, 1)]
    put("step,seconds,loss,heldout_loss\n" + "".join(lines), folder, "log.csv")
    put(json.dumps({"seed": seed}), folder, "config.json")
    result = {"heldout_loss": losses[-1], "heldout_grids": 0.25, "parameters": 100, "steps": 50, "seconds": 120}
    put(json.dumps(result | {"pass@2": seed / 10}), folder, "result.json")


def test_the_comparison_prints_means_deviations_and_the_paired_difference(tmp_path, capsys):
    """Differences -0.1, 0 and -0.05: mean -0.05, s.d. 0.05, and t = 4.30 for two degrees of freedom."""
    for n, (a, b) in enumerate(((0.5, 0.4), (0.6, 0.6), (0.7, 0.65))):
        finished_run(tmp_path / f"a-seed{n}", n, [0.9, a])
        finished_run(tmp_path / f"b-seed{n}", n, [0.7, b, b])
    train_arc.main(["--compare", *map(str, sorted(tmp_path.iterdir()))])
    header, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert header == ["mean +- s.d.", "a, n = 3", "b, n = 3"]
    table = {name: (a, b) for name, a, b in rows}
    assert table["heldout_loss"] == ("0.6 +- 0.1", "0.55 +- 0.13")
    assert table["heldout_loss at 20 s"][1] == "0.55 +- 0.13"
    assert table["seconds"] == ("120 +- 0", "120 +- 0") and table["seconds to 0.700"][1] == "10 +- 0"
    assert table["steps to 0.700"] == ("2 +- 0", "1 +- 0")
    assert table["pass@2"][0] == "0.1 +- 0.1" and table["training loss"][0] == "1.8 +- 0.3"
    gaps = [b for name, _, b in rows if name == "minus a, paired by seed, 95%"]
    assert gaps == [f"-0.0500 +- {4.30 * 0.05 / math.sqrt(3):.4f}", "+0.0000 +- 0.0000",
                    f"-0.1500 +- {4.30 * 0.15 / math.sqrt(3):.4f}"]
    finished_run(tmp_path / "again" / "a-seed0", 0, [0.5])
    finished_run(short := tmp_path / "short-seed0", 0, [0.5])
    put("step,seconds,loss,heldout_loss\n1,10,1,0.5", short, "log.csv")     # so short that it has one line
    train_arc.main(["--compare", str(short)])
    put("{}", short, "config.json")
    with pytest.raises(InputError, match="short-seed0: not a finished run with held-out pairs: 'seed'"):
        train_arc.main(["--compare", str(short)])
    with pytest.raises(InputError, match="again.*a second run of this arm with seed 0"):
        train_arc.main(["--compare", str(tmp_path / "a-seed0"), str(tmp_path / "again" / "a-seed0")])


# ------------------------------------------------------------------------------------------ the project
DEMO = """if True:
    import itertools, runpy, sys, time, torch, spl
    randn = torch.randn
    torch.randn = lambda rows, *shape, **options: randn(min(rows, 64), *shape, **options)
    time.perf_counter = itertools.count(0, 9).__next__          # what is measured is over at once
    spl.bench = lambda runs, **_: dict.fromkeys(runs, 1.0)
    runpy.run_path(sys.argv.pop(1), run_name="__main__")"""


@pytest.mark.parametrize("name, trained", [("spl", 0), ("dynsiha", 0), ("block", 0), ("model", 0), ("model", 1)])
def test_each_concept_file_runs_alone_with_the_files_that_it_names(learnt, tmp_path, name, trained):
    """model.py with a run of the script's, and without one."""
    head = re.search(r"Copy +(.*)", (HERE / f"{name}.py").read_text())[1]
    for file in {f"{name}.py", *re.findall(r"\w+\.py", head)}:
        shutil.copy(HERE / file, tmp_path)
    words = [learnt[1]] if trained else []
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": ""}
    run = script(f"{name}.py", *words, launcher=(sys.executable, "-c", DEMO), cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 2 and all(str(word) in run.stdout for word in words)


def test_the_readmes_example_runs_as_it_stands_and_its_optimizers_train_the_layer():
    block, = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    exec(block, scope := {})
    torch.manual_seed(0)
    torch.randn(2, 10, 64)
    before = SparseProtoLinear(64, 128).parameters()
    assert all(not torch.equal(p, old) for p, old in zip(scope["layer"].parameters(), before, strict=True))
    assert scope["y"].shape == (2, 10, 64)


def compared(capsys, folder, *arms):
    """The rows that --compare prints of these arms' runs in a folder of results/."""
    folders = [run for arm in arms for run in sorted((HERE / "results" / folder).glob(f"{arm}-seed*"))]
    train_arc.main(["--compare", *map(str, folders)])
    return capsys.readouterr().out.splitlines()


def test_the_table_of_the_comparison_is_what_the_logs_give(capsys):
    rows = compared(capsys, "compare", "no-ffn-6", "moie", "moie-norm", "no-ffn", "dense")
    text = (HERE / "results/README.md").read_text()
    table = text.split("compare/{no-ffn-6,moie,moie-norm,no-ffn,dense}-seed*")[1].split("\n\n")[1].splitlines()
    assert len(table) == 10 and set(table) <= set(rows)


@pytest.mark.parametrize("folder, first, arm, loss, grids, training", [
    ("compare", "no-ffn-6", "moie", "+0.025 ± 0.012", "−1.6 ± 1.1", "+0.017 ± 0.013"),
    ("compare", "no-ffn-6-usual", "moie", "+0.035 ± 0.016", "−1.4 ± 1.5", "+0.022 ± 0.016"),
    ("compare", "no-ffn-6", "moie-zero", "+0.034 ± 0.016", "−2.5 ± 1.5", "+0.019 ± 0.013"),
    ("compare", "tied-no-ffn-6", "tied-moie", "+0.016 ± 0.016", "−0.9 ± 1.7", "+0.021 ± 0.012"),
    ("compare", "no-ffn-8", "moie-f2", "+0.050 ± 0.025", "−1.0 ± 4.5", None),
    ("compare", "no-ffn", "moie", "+0.013 ± 0.025", "+0.4 ± 1.6", None),
    ("compare", "no-ffn", "dense", "−0.016 ± 0.018", "+2.7 ± 1.3", "−0.045 ± 0.010"),
    ("compare", "tied-no-ffn-6", "dense", "+0.010 ± 0.025", "+0.1 ± 2.2", "−0.007 ± 0.014"),
    ("compare", "no-ffn-6-usual", "tied-no-ffn-6", "+0.003 ± 0.012", "+0.7 ± 1.6", None),
    ("compare", "tied-no-ffn-6", "dense-no-ffn-12", "−0.003 ± 0.014", "−2.4 ± 1.8", "−0.022 ± 0.010"),
    ("compare", "tied-no-ffn-6", "dense-no-ffn-12-best", "−0.013 ± 0.011", "+0.3 ± 1.5", "−0.049 ± 0.009"),
    ("parts", "full", "tied", "−0.028 ± 0.018", "+1.7 ± 1.2", None)])
def test_the_verdicts_intervals_are_what_the_logs_give(folder, first, arm, loss, grids, training, capsys):
    """results/README.md puts some signs into words, so only the sizes are looked up there."""
    cells = [row.split("|")[-2] for row in compared(capsys, folder, first, arm) if "paired by seed" in row]
    verdict, details = ((HERE / file).read_text() for file in ("README.md", "results/README.md"))
    for cell, text, scale, off in zip(cells, (loss, grids, training), (1, 100, 1), (5e-4, 5e-2, 5e-4), strict=True):
        if text:
            printed = [scale * float(number) for number in cell.split("+-")]
            stated = [float(number) for number in text.replace("−", "-").split("±")]
            assert text[1:] in details and stated == pytest.approx(printed, abs=off + 1e-9)    # half its last digit
    assert loss in verdict and grids in verdict


def test_the_figure_that_chose_the_tied_gate_is_what_the_answers_give():
    lines = (HERE / "results/recipe/h100-18min/readings.csv").read_text().splitlines()
    rows = {name: np.array(values, dtype=float) for name, *values in (line.split(",") for line in lines)}
    gaps = 100 * (rows["tied10 in two attempts"] - rows["base in two attempts"])
    text = f"{gaps.mean():.1f} ± {1.96 * gaps.std(ddof=1) / len(gaps)**0.5:.1f}"
    assert len(gaps) == 209 and all(text in (HERE / file).read_text() for file in ("README.md", "results/README.md"))


def test_the_commands_of_the_readme_parse_and_name_files_that_exist():
    block, = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    found = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert ["pytest", "-q", "test_all.py"] in found and "pytest -q test_all.py" in (HERE / ".ci/run").read_text()
    assert any("train_arc.py" in words for words in found)
    for words in found:
        assert all((HERE / word).exists() for word in words if re.fullmatch(r"[\w./-]+\.(py|txt)", word)), words
        if "train_arc.py" in words and not {"--help", "--resume", "--eval", "--init", "--compare"} & set(words):
            c = parse(words[words.index("train_arc.py") + 1:])
            assert all((HERE / folder).exists() for folder in (c.data, *c.extra)), words
