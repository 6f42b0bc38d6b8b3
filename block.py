"""The transformer block, with and without its feed-forward network, and the dense control.

    MoIE(x) = SPL_2( relu( SPL_1(x) ) )         D -> f·D -> D    Mixture of Infinite Experts
    x = x + DynSIHA(norm(x))
    x = x + MoIE(norm(x))                       only with the FFN; with f = 0 neither it nor its norm is built

Symbols   D width, f the hidden width of the FFN over D (ffn_factor), T tokens.
Weights   DynSIHA 12·D², MoIE 6f·D², and two thirds of these with tied gates. A standard block (nn.Linear, 4x
          FFN) has 4·D² + 8·D² = 12·D²: as many as the block without FFN and, gates tied, as that with f = 1.
Cost      A block with the FFN costs 1 + 6f / (12 + 2T/D) times one without; gates tied, 1 + 4f / (8 + 2T/D).
Source    MoIE is the FFN of Tiny-ONN; pre-norm: Xiong et al. 2020, arXiv:2002.04745.
Copy      this file, dynsiha.py and spl.py.
Run       python block.py
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dynsiha import DynSIHA, rotary
from spl import SparseProtoLinear, bench, forward_backward


class MoIE(nn.Module):
    """(..., D) -> (..., D): two SPLs around a relu. With `norm` the second one's input is normalized: an
    SPL's match shrinks with its input, its cost does not, so where relu leaves little no neuron fires. It
    lowered no loss."""

    def __init__(self, d_model, d_ffn, norm=False, linear=SparseProtoLinear):
        super().__init__()
        self.up, self.down = linear(d_model, d_ffn), linear(d_ffn, d_model)
        self.norm = nn.RMSNorm(d_ffn, elementwise_affine=False) if norm else nn.Identity()

    def forward(self, x):
        return self.down(self.norm(F.relu(self.up(x))))


class DenseFFN(nn.Module):
    """(..., D) -> (..., D): the standard two-layer GELU network."""

    def __init__(self, d_model, d_ffn):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """(B, T, D) -> (B, T, D). ffn_factor = 0 leaves the FFN out; dense=True builds the nn.Linear control;
    tied_gate is SparseProtoLinear's."""

    def __init__(self, d_model, n_head, ffn_factor=0, dense=False, dropout=0.0, moie_norm=False,
                 tied_gate=False):
        super().__init__()
        self.ffn_factor, self.dropout = ffn_factor, dropout
        self.attn_norm = nn.RMSNorm(d_model)
        linear = nn.Linear if dense else partial(SparseProtoLinear, tied_gate=tied_gate)
        self.attn = DynSIHA(d_model, n_head, linear)
        if ffn_factor:
            self.ffn_norm = nn.RMSNorm(d_model)
            d_ffn = ffn_factor * d_model
            self.ffn = DenseFFN(d_model, d_ffn) if dense else MoIE(d_model, d_ffn, moie_norm, linear)

    def forward(self, x, rope, cache=None, mask=None):
        x = x + F.dropout(self.attn(self.attn_norm(x), rope, cache, mask), self.dropout, self.training)
        if self.ffn_factor:
            x = x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)
        return x


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, D, H, calls = (64, 256, 8, 10) if device == "cuda" else (4, 256, 8, 1)
    print(f"Block at B={B} D={D} on {device}, forward and backward: what leaving out the FFN saves")
    print(f"{'T':>6} {'f':>3} {'weights':>9} {'without':>9} {'with':>9} {'speed-up':>9} {'formula':>8} "
          f"{'control':>11}")
    for T in (256, 1024):
        rope = rotary(torch.arange(T, device=device).expand(B, T)[..., None], D // H)
        x = torch.randn(B, T, D, device=device, requires_grad=True)
        blocks = {f: Block(D, H, f).to(device) for f in (0, 1, 2, 4)}
        blocks["dense"] = Block(D, H, 4, dense=True).to(device)
        t = bench({f: forward_backward(lambda x, b=b: b(x, rope), x) for f, b in blocks.items()}, calls=calls)
        for f in (1, 2, 4):
            print(f"{T:6} {f:3} {12 + 6 * f:6}·D² {1000 * t[0]:6.1f} ms {1000 * t[f]:6.1f} ms "
                  f"{t[f] / t[0]:8.2f}x {1 + 6 * f / (12 + 2 * T / D):7.2f}x {1000 * t['dense']:8.1f} ms")
        assert blocks[0](x, rope).shape == x.shape
