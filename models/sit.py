"""SiT (arXiv 2401.08740) with a choice of what joins its sublayers: residual addition, or DAR (arXiv 2605.20708).

Two baselines beside them: Attention Residuals (arXiv 2603.15031), and U-ViT's long skips (arXiv 2209.12152).
In residual mode parameter names and shapes are those of the published SiT and REPA checkpoints.

Shapes: B batch, C channels, H = W input size, T tokens, D width.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.dar import head_aggregator, make_router
from models.projector import PROJECTORS, ConvProjector, Projector, project, xavier
from models.streams import ResidualStream, RoutedStream, SkipStream, joined, long_skips

ROUTINGS = ("residual", "dar", "attnres", "unet")
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
MAX_PERIOD = 10_000


class SiT(nn.Module):
    """Velocity network v(x, t, y) of SiT, with projections of its tokens for REPA.

    input_size, in_channels: the (C, H, W) input. patch_size must divide input_size.
    hidden_size D, depth (blocks), num_heads, mlp_ratio, qk_norm: the transformer.
    num_classes: labels are 0 .. num_classes - 1; the null class of classifier-free guidance is num_classes.
    class_dropout_prob: how often training replaces the label by the null class.
    routing: "residual", "dar" (models/dar.py), or a baseline: "attnres" (`make_router`), "unet" (`SkipStream`).
    query, chunk_summary and final_aggregator belong to "dar", chunk_size and route_backend to "dar" and "attnres".
    final_aggregator: "auto" is "shared" with alignment and "dedicated" without (DAR, Appendix C.3).
    route_backend: "auto", "torch", "triton" or "cpu" (`kernels.route`).
    align_depth: 1-based block numbers; the state after block k is projected, which with DAR and AttnRes is z_k, the
        aggregate passed on to block k + 1 (DAR, Section 3), and with long skips the stream before a skip is added.
        align_dims: one width per encoder; () builds no projector.
    projector: "mlp", whose hidden width is projector_dim, or "conv" (models/projector.py).
    checkpoint_activations: recompute every sublayer in the backward pass instead of keeping what it needs. States and
        sources are kept; values and gradients are the same.
    Raises ValueError on invalid arguments.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        routing: str = "residual",
        query: str = "timestep",
        chunk_size: int = 4,
        chunk_summary: str = "last",
        final_aggregator: str = "auto",
        route_backend: str = "auto",
        align_depth: int | tuple = (8,),
        align_dims: tuple = (768,),
        projector: str = "mlp",
        projector_dim: int = 2048,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        align_depth = (align_depth,) if isinstance(align_depth, int) else tuple(sorted(align_depth))
        blocks = set(range(1, depth + 1))
        for fine, problem in (
            (input_size % patch_size == 0, f"input_size = {input_size} is not a multiple of patch_size = {patch_size}"),
            (
                hidden_size % num_heads == 0 and hidden_size % 4 == 0,
                f"hidden_size = {hidden_size} must be a multiple of num_heads = {num_heads} and of 4",
            ),
            (routing in ROUTINGS, f"routing {routing!r} is unknown; choose one of {', '.join(ROUTINGS)}"),
            (projector in PROJECTORS, f"projector {projector!r} is unknown; choose one of {', '.join(PROJECTORS)}"),
            (0 <= class_dropout_prob < 1, f"class_dropout_prob = {class_dropout_prob} is not in [0, 1)"),
            (
                not align_dims or align_depth and len(blocks & set(align_depth)) == len(align_depth),
                f"align_depth = {align_depth} must name different blocks between 1 and depth = {depth}, for the "
                f"projectors of align_dims = {tuple(align_dims)}",
            ),
        ):
            if not fine:
                raise ValueError(problem)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size = hidden_size
        self.num_classes, self.checkpoint_activations, self.routing = num_classes, checkpoint_activations, routing
        self.align_depth = align_depth if align_dims else ()
        self.gamma = 1.0  # how far a router has faded in (RetrofitStream)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, grid), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()
        # After the rest, so that for one seed every arm of a comparison starts from the same blocks.
        final = head_aggregator(final_aggregator, align_dims)
        self.router = make_router(
            routing, 2 * depth, hidden_size, query, chunk_size, final, route_backend, chunk_summary
        )
        if routing == "dar" and query == "timestep":  # so that the first aggregation is a plain mean
            nn.init.zeros_(self.t_embedder.mlp[2].weight)
            nn.init.zeros_(self.t_embedder.mlp[2].bias)
        self.projectors = nn.ModuleList(
            ConvProjector(hidden_size, grid, dim) if projector == "conv" else Projector(hidden_size, projector_dim, dim)
            for _ in align_depth
            for dim in align_dims
        )
        self.projectors.apply(xavier)
        self.skips = long_skips(depth if routing == "unet" else 0, hidden_size)
        self.step_times = ()  # where the steps of a distilled model start (distill.py)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        label_draw: torch.Tensor | None = None,
        make_stream: Callable | None = None,
    ) -> tuple[torch.Tensor, list]:
        """Velocity at x_t, and the projected tokens.

        x: (B, C, H, W); t: (B) in [0, 1], 1 is noise; y: (B) integer labels, num_classes for none.
        label_draw: (B) uniform numbers in [0, 1) that decide which labels training drops; drawn here if None.
        make_stream: builds what joins the sublayers, in place of `self.stream`.
        Returns the velocity (B, C, H, W) and a list of (B, T, dim), by depth and then by encoder.
        """
        # PatchEmbed returns a transposed view; contiguous once, here, rather than in every state.
        tokens = (self.x_embedder(x) + self.pos_embed).contiguous()  # (B, T, D)
        e = self.t_embedder(t)  # (B, D)
        c = e + self.y_embedder(y, label_draw)  # (B, D)

        stream = (make_stream or self.stream)(tokens, e)
        projected = []
        for k, block in enumerate(self.blocks):
            (shift_1, scale_1, gate_1), (shift_2, scale_2, gate_2) = block.modulation(c)
            x, z = stream.read(shift_1, scale_1)  # z_k, the state after k blocks
            projected += project(self.projectors, self.align_depth, z, k)
            stream.write(self.gated(gate_1, block.attn, x))
            x, _ = stream.read(shift_2, scale_2)
            stream.write(self.gated(gate_2, block.mlp, x))
        x, z = stream.read(*self.final_layer.modulation(c))
        projected += project(self.projectors, self.align_depth, z, len(self.blocks))
        return self.unpatchify(self.final_layer.linear(x)), projected

    def null(self, count: int) -> torch.Tensor:
        """What stands for no label, so many times: (count)."""
        return torch.full((count,), self.num_classes, device=self.pos_embed.device)

    def stream(self, tokens: torch.Tensor, e: torch.Tensor) -> ResidualStream | RoutedStream:
        """What joins the sublayers in one forward pass. tokens: (B, T, D); e: the timestep embedding (B, D)."""
        if self.routing == "unet":
            return SkipStream(tokens, self.skips, len(self.blocks))
        return joined(self.router, tokens, e, self.gamma)

    def gated(self, gate, sublayer, x):
        """gate (B, 1, D) * sublayer(x), (B, T, D): what `checkpoint_activations` recomputes."""

        def run(gate, x):
            return gate * sublayer(x)

        if self.checkpoint_activations and torch.is_grad_enabled():
            # There is no dropout, hence no random state to restore.
            return checkpoint(run, gate, x, use_reentrant=False, preserve_rng_state=False)
        return run(gate, x)

    def unpatchify(self, x):
        """(B, T, p * p * C) -> (B, C, H, W)."""
        p, g = self.patch_size, self.input_size // self.patch_size
        x = x.reshape(-1, g, g, p, p, self.in_channels)  # (B, g, g, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, g * p, g * p)

    def initialize_weights(self):
        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: every sublayer and the head start at exactly zero.
        for layer in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """The two sublayers of a DiT block, and the adaLN layer that says how each is read and gated."""

    def __init__(self, width, num_heads, mlp_ratio, qk_norm):
        super().__init__()
        self.attn = Attention(width, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, c):
        """c (B, D) -> for attention and for the MLP: shift and scale (B, D), gate (B, 1, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        return (shift_1, scale_1, gate_1.unsqueeze(1)), (shift_2, scale_2, gate_2.unsqueeze(1))


class FinalLayer(nn.Module):
    """adaLN of the last state, and a linear map from tokens to patches: (B, T, D) -> (B, T, p * p * C)."""

    def __init__(self, width, patch_size, channels):
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, c):
        """c (B, D) -> shift and scale (B, D)."""
        return self.adaLN_modulation(c).chunk(2, dim=-1)


class TimestepEmbedder(nn.Module):
    """t (B) in [0, 1], unscaled -> e(t) (B, D): 128 cosines, 128 sines, then a two-layer MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        t, half = t.to(self.mlp[0].weight.dtype), FREQUENCIES // 2
        frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
        angles = t[:, None] * frequencies  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Labels (B) -> (B, D). The one place where labels are dropped for classifier-free guidance."""

    def __init__(self, num_classes, width, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, width)  # the last row is the null class

    def forward(self, labels, draw=None):
        if self.training and self.dropout_prob > 0:
            draw = torch.rand(labels.shape, device=labels.device) if draw is None else draw
            labels = torch.where(draw < self.dropout_prob, self.num_classes, labels)
        return self.embedding_table(labels)


def sincos_positions(width, grid):
    """Fixed 2-D sine-cosine position embedding (1, grid * grid, width), column coordinate first, as in MAE and DiT."""
    frequencies = MAX_PERIOD ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * frequencies  # (grid, width / 4), float64
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float().unsqueeze(0)


# Depth, width, heads. Plus is the control in DAR's Table 1: XL, widened to the parameters of XL with dynamic queries.
SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Plus": (28, 1216, 16)}
SIT_MODELS = {
    f"SiT-{name}/{patch}": partial(SiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for name, (depth, width, heads) in SIT_SIZES.items()
    for patch in (1, 2, 4, 8)
}
