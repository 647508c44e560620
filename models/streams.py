"""What joins the sublayers of a model: residual addition, depth routing, or long skips.

A stream holds the states of one forward pass. `read(shift, scale)` returns what the next sublayer takes, LayerNorm and
adaLN of the state, and the state itself; `write(output)` takes what that sublayer gives, including its gate.

Shapes: B batch, T tokens, D width.
"""

import torch
from torch import nn

from kernels import autocast_dtype, modulated, resolve_backend, route, route_modulate, value_of
from models.dar import DepthRouter


class ResidualStream:
    """Residual addition: h_{l+1} = h_l + v_l, and h_1 = v_0. tokens: v_0 (B, T, D)."""

    def __init__(self, tokens: torch.Tensor):
        self.h = tokens

    def read(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """shift, scale: (B, D). Returns x and h_l, both (B, T, D)."""
        return modulated(self.h, shift, scale), self.h

    def write(self, output: torch.Tensor):
        self.h = self.h + output


class RoutedStream:
    """Depth routing by DAR or AttnRes (models/dar.py): h_l is a softmax over earlier outputs.

    tokens: v_0 (B, T, D); t_embedding: e(t) (B, D).
    """

    def __init__(self, router: DepthRouter, tokens: torch.Tensor, t_embedding: torch.Tensor):
        # Under autocast Triton reads half-precision sources. The other backends compute in float32 and would convert a
        # source for every aggregator that reads it, so there the sources stay float32.
        if resolve_backend(router.backend, tokens.device) == "triton":
            tokens = tokens.to(autocast_dtype(tokens))
        self.router, self.v, self.t_embedding = router, [tokens], t_embedding

    # Eq. 5
    def read(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """shift, scale: (B, D). Returns x and h_l, both (B, T, D)."""
        indices, query, norm_weight = self.router.aggregation(self.v, self.t_embedding)
        sources = [self.v[i] for i in indices]
        x, h, sources = route_modulate(sources, query, norm_weight, shift, scale, backend=self.router.backend)
        for i, source in zip(indices, sources):  # so that later readers' gradients are added up in the kernel
            self.v[i] = source
        return x, h

    def write(self, output: torch.Tensor):
        """v_l: the output of sublayer l, or with AttnRes the sum over its chunk so far."""
        begins = (len(self.v) - 1) % self.router.summed == 0
        output = output.to(value_of(self.v[0]).dtype)
        self.v.append(output if begins else value_of(self.v[-1]) + output)


class RetrofitStream(RoutedStream):
    """Routing that fades into a model trained with residual addition: h_l = (1 - gamma) m_l + gamma r_l.

    m_l is the mean of v_0 .. v_{l-1}, which a LayerNorm takes for their sum, the residual state; r_l is the routed
    state. With gamma = 0 a model keeps its function, whatever its router. This is ours; the paper does not say.
    """

    def __init__(self, router: DepthRouter, tokens: torch.Tensor, t_embedding: torch.Tensor, gamma: float):
        super().__init__(router, tokens, t_embedding)
        self.gamma, self.total, self.count = gamma, tokens, 1

    def read(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """shift, scale: (B, D). Returns x and h_l, both (B, T, D)."""
        indices, query, norm_weight = self.router.aggregation(self.v, self.t_embedding)
        routed = route([self.v[i] for i in indices], query, norm_weight, backend=self.router.backend)
        h = torch.lerp(self.total / self.count, routed.to(self.total.dtype), self.gamma)
        # A mean is smaller than its sum, and so must be the eps that its LayerNorm adds to the variance.
        eps = 1e-6 * ((1 - self.gamma) / self.count**2 + self.gamma)
        return modulated(h, shift, scale, eps), h

    def write(self, output: torch.Tensor):
        super().write(output)
        self.total, self.count = self.total + output, self.count + 1


class SkipStream(ResidualStream):
    """Residual addition with U-ViT's long skips (arXiv 2209.12152), which join mirrored blocks k and n + 1 - k of n.

    With s the state after block k, for k = 1 .. n / 2, block n + 1 - k reads a linear map of [h; s]:

        h <- h + W [h; s] + b

    W = 0 and b = 0 at first, so that training starts as the residual model; U-ViT draws the whole map at random. h is
    added outside W so that the stream stays float32 under autocast. An odd n has a middle block without skip; with
    an even n the innermost s is h itself.
    skips: linear maps (2 D) -> (D) from `long_skips`, in the order in which they are used.
    """

    def __init__(self, tokens: torch.Tensor, skips: nn.ModuleList, num_blocks: int):
        super().__init__(tokens)
        self.skips, self.num_blocks, self.reads, self.kept = skips, num_blocks, 0, []

    def read(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in residual addition. The returned state (B, T, D) is the one before it takes up a skip."""
        h, (k, of_mlp) = self.h, divmod(self.reads, 2)  # k blocks are done; of_mlp: the next block's MLP reads
        self.reads += 1
        first = self.num_blocks - len(self.skips)
        if not of_mlp and 1 <= k <= len(self.skips):
            self.kept.append(h)
        if not of_mlp and first <= k < self.num_blocks:
            self.write(self.skips[k - first](torch.cat([h, self.kept.pop()], dim=-1)))
        x, _ = super().read(shift, scale)
        return x, h


def joined(
    router: DepthRouter | None, tokens: torch.Tensor, t_embedding: torch.Tensor, gamma: float
) -> ResidualStream | RoutedStream:
    """The stream of a model with or without a router, faded in by gamma. tokens: (B, T, D); t_embedding: (B, D)."""
    if router is None:
        return ResidualStream(tokens)
    if gamma < 1:
        return RetrofitStream(router, tokens, t_embedding, gamma)
    return RoutedStream(router, tokens, t_embedding)


def long_skips(num_blocks: int, width: int) -> nn.ModuleList:
    """The maps W, b of a SkipStream, all zero."""
    skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_blocks // 2))
    for parameter in skips.parameters():
        nn.init.zeros_(parameter)
    return skips
