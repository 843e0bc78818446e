"""How do M residual streams carry one layer's input and output?

Hyper-connections (the backbone of Engram, paper section 2.4) in their static, manifold-constrained form: a sublayer f
reads `x = sum_m pre_m H_m` and writes `H <- R H + post f(x)`. R is a mixture of cyclic shifts, so it is doubly
stochastic exactly (for M = 2 these are all such matrices). Hence the mean over streams is an ordinary residual stream:
mixing leaves it alone and every write adds `mean(post) f(x)` to it, which is what makes the decomposition of the cache
exact.
"""

from __future__ import annotations

import torch
from torch import nn

from engram_interp.shapes import Float, Tensor

_READ_BIAS, _KEEP_BIAS = 2.0, 3.0  # at the start sublayer i reads mostly stream i mod M, and streams mostly stay apart


class StreamConnection(nn.Module):
    """The read, mix and write weights of one sublayer; parameter-free for M = 1."""

    def __init__(self, streams: int, sublayer: int) -> None:
        super().__init__()
        self.streams = streams
        if streams > 1:
            pre, mix = torch.zeros(streams), torch.zeros(streams)
            pre[sublayer % streams], mix[0] = _READ_BIAS, _KEEP_BIAS
            self.pre_logits = nn.Parameter(pre)
            self.post_logits = nn.Parameter(torch.zeros(streams))
            self.mix_logits = nn.Parameter(mix)
            shift = (torch.arange(streams)[:, None] - torch.arange(streams)) % streams
            self.shift: Tensor
            self.register_buffer("shift", shift, persistent=False)

    def pre(self) -> Float[Tensor, " M"]:
        """Weight of each stream in what the sublayer reads; sums to 1."""
        return self.pre_logits.softmax(0)

    def post(self) -> Float[Tensor, " M"]:
        """Weight of the sublayer's output in each stream, in (0, 2)."""
        return 2 * torch.sigmoid(self.post_logits)

    def mix(self) -> Float[Tensor, "M M"]:
        """R, the doubly stochastic mixing of the streams."""
        return self.mix_logits.softmax(0)[self.shift]

    def mean_post(self) -> Float[Tensor, ""] | float:
        """What one unit of sublayer output adds to the mean of the streams."""
        return self.post().mean() if self.streams > 1 else 1.0

    def read(self, hidden: Float[Tensor, "B T M D"]) -> Float[Tensor, "B T D"]:
        """x, the sublayer's input."""
        if self.streams == 1:
            return hidden.squeeze(2)
        pre = self.pre()
        return sum((hidden[:, :, m] * pre[m] for m in range(1, self.streams)), hidden[:, :, 0] * pre[0])

    def write(self, hidden: Float[Tensor, "B T M D"], out: Float[Tensor, "B T D"]) -> Float[Tensor, "B T M D"]:
        """R H + post f(x)."""
        if self.streams == 1:
            return hidden + out.unsqueeze(2)
        mix, post = self.mix(), self.post()
        rows = []
        for m in range(self.streams):
            row = out * post[m]
            for source in range(self.streams):
                row = row + hidden[:, :, source] * mix[m, source]
            rows.append(row)
        return torch.stack(rows, dim=2)
