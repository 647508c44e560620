"""SiT (arXiv 2401.08740) with a choice of what joins its sublayers: residual addition, or DAR (arXiv 2605.20708).

Two baselines beside them: Attention Residuals (arXiv 2603.15031), and U-ViT's long skips (arXiv 2209.12152).
In residual mode parameter names and shapes are those of the published SiT and REPA checkpoints.

Shapes: B batch, C channels, H = W input size, T tokens, D width.
"""

import math

import numpy as np
import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.dar import FINAL_AGGREGATORS, QUERIES, AttnResRouter, DepthRouter, RoutedStream
from models.projector import PROJECTORS, ConvProjector, Projector

ROUTINGS = ("residual", "dar", "attnres", "unet")
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
MAX_PERIOD = 10_000


class SiT(nn.Module):
    """Velocity network v(x, t, y) of SiT, with projections of its tokens for REPA.

    input_size, in_channels: the (C, H, W) input. patch_size must divide input_size.
    hidden_size D, depth (blocks), num_heads, mlp_ratio, qk_norm: the transformer.
    num_classes: labels are 0 .. num_classes - 1; the null class of classifier-free guidance is num_classes.
    class_dropout_prob: how often training replaces the label by the null class.
    routing: "residual", "dar" (models/dar.py), or a baseline: "attnres" (`AttnResRouter`), "unet" (`SkipStream`).
    query and final_aggregator belong to "dar", chunk_size and route_backend to "dar" and "attnres".
    final_aggregator: "auto" is "shared" with alignment and "dedicated" without (DAR, Appendix C.3).
    route_backend: "auto", "torch" or "triton" (`kernels.route`).
    align_depth: 1-based block numbers; the state after block k is projected, which with DAR and AttnRes is z_k, the
        aggregate passed on to block k + 1 (DAR, Section 3), and with long skips the stream before it takes up one.
        align_dims: one width per encoder; () builds no projector.
    projector: "mlp", whose hidden width is projector_dim, or "conv" (models/projector.py).
    checkpoint_activations: recompute every sublayer in the backward pass instead of keeping what it needs. States and
        sources are kept; values and gradients are the same.
    Raises ValueError on any value outside what is said here.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000,
        class_dropout_prob=0.1,
        qk_norm=False,
        routing="residual",
        query="timestep",
        chunk_size=4,
        final_aggregator="auto",
        route_backend="auto",
        align_depth=(8,),
        align_dims=(768,),
        projector="mlp",
        projector_dim=2048,
        checkpoint_activations=False,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size = {input_size} is not a multiple of patch_size = {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size = {hidden_size} must be a multiple of num_heads = {num_heads} and of 4")
        for name, value, known in (
            ("routing", routing, ROUTINGS),
            ("query", query, QUERIES),
            ("final_aggregator", final_aggregator, ("auto", *FINAL_AGGREGATORS)),
            ("projector", projector, PROJECTORS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob = {class_dropout_prob} is not in [0, 1)")
        align_depth = (align_depth,) if isinstance(align_depth, int) else tuple(sorted(align_depth))
        if align_dims and (
            not align_depth or len(set(align_depth)) < len(align_depth) or not all(1 <= k <= depth for k in align_depth)
        ):
            raise ValueError(
                f"align_depth = {align_depth} must name different blocks between 1 and depth = {depth}, "
                f"for the projectors of align_dims = {tuple(align_dims)}"
            )

        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.checkpoint_activations, self.routing = num_classes, checkpoint_activations, routing
        self.align_depth, self.num_encoders = align_depth, len(align_dims)  # without encoders nothing is projected

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, grid), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()
        # After the rest, so that for one seed every arm of a comparison starts from the same backbone.
        self.router = None
        if routing == "dar":
            if final_aggregator == "auto":
                final_aggregator = "shared" if align_dims else "dedicated"
            self.router = DepthRouter(2 * depth, hidden_size, query, chunk_size, final_aggregator, route_backend)
            if query == "timestep":  # so that the first aggregation is a plain mean
                nn.init.zeros_(self.t_embedder.mlp[2].weight)
                nn.init.zeros_(self.t_embedder.mlp[2].bias)
        elif routing == "attnres":
            self.router = AttnResRouter(2 * depth, hidden_size, chunk_size, route_backend)
        self.projectors = nn.ModuleList(
            ConvProjector(hidden_size, grid, dim) if projector == "conv" else Projector(hidden_size, projector_dim, dim)
            for _ in align_depth
            for dim in align_dims
        )
        self.projectors.apply(_xavier)
        self.skips = nn.ModuleList(
            nn.Linear(2 * hidden_size, hidden_size) for _ in range(depth // 2 if routing == "unet" else 0)
        )
        for parameter in self.skips.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x, t, y, label_draw=None):
        """Velocity at x_t, and the projected tokens.

        x: (B, C, H, W); t: (B) in [0, 1], 1 is noise; y: (B) integer labels, num_classes for none.
        label_draw: (B) uniform numbers in [0, 1) that decide which labels training drops; drawn here if None.
        Returns the velocity (B, C, H, W) and a list of (B, T, dim), by depth and then by encoder.
        """
        # The convolution leaves D before T in memory, and every state would inherit that.
        tokens = (self.x_embedder(x) + self.pos_embed).contiguous()  # (B, T, D)
        e = self.t_embedder(t)  # (B, D)
        c = e + self.y_embedder(y, label_draw)  # (B, D)

        stream = (
            RoutedStream(self.router, tokens, e)
            if self.router
            else SkipStream(tokens, self.skips, len(self.blocks))
            if self.skips
            else ResidualStream(tokens)
        )
        aligned = []
        for k, block in enumerate(self.blocks):
            (shift_1, scale_1, gate_1), (shift_2, scale_2, gate_2) = block.modulation(c)
            x, z = stream.read(shift_1, scale_1)  # z_k, the state after k blocks
            aligned += self.project(z, k)
            stream.write(self.gated(gate_1, block.attn, x))
            x, _ = stream.read(shift_2, scale_2)
            stream.write(self.gated(gate_2, block.mlp, x))
        x, z = stream.read(*self.final_layer.modulation(c))
        aligned += self.project(z, len(self.blocks))
        return self.unpatchify(self.final_layer.linear(x)), aligned

    def gated(self, gate, sublayer, x):
        """gate (B, 1, D) * sublayer(x), (B, T, D): what `checkpoint_activations` recomputes."""

        def run(gate, x):
            return gate * sublayer(x)

        if self.checkpoint_activations and torch.is_grad_enabled():
            # There is no dropout, hence no random state to restore.
            return checkpoint(run, gate, x, use_reentrant=False, preserve_rng_state=False)
        return run(gate, x)

    def project(self, z, k):
        """The state after block k as the encoders' tokens, one per encoder; [] where nothing is aligned."""
        if k not in self.align_depth:
            return []
        first = self.align_depth.index(k) * self.num_encoders
        return [projector(z) for projector in self.projectors[first : first + self.num_encoders]]

    def unpatchify(self, x):
        """(B, T, p * p * C) -> (B, C, H, W)."""
        p, g = self.patch_size, self.input_size // self.patch_size
        x = x.reshape(-1, g, g, p, p, self.in_channels)  # (B, g, g, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, g * p, g * p)

    def initialize_weights(self):
        self.apply(_xavier)
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


class ResidualStream:
    """The states of one forward pass with residual addition: h_{l+1} = h_l + v_l, and h_1 = v_0."""

    def __init__(self, tokens):
        self.h = tokens

    def read(self, shift, scale):
        """LayerNorm and adaLN (shift, scale: (B, D)) of the state, and the state: both (B, T, D)."""
        x = F.layer_norm(self.h, self.h.shape[-1:], eps=1e-6)
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1), self.h

    def write(self, output):
        self.h = self.h + output


class SkipStream(ResidualStream):
    """Residual addition with U-ViT's long skips (arXiv 2209.12152), which join mirrored blocks k and n + 1 - k of n.

    With s the state after block k, for k = 1 .. n / 2, what block n + 1 - k reads is a linear map of [h; s]:

        h <- h + W [h; s] + b

    W = 0 and b = 0 at first, the identity on h and nothing of s, so that training starts as the residual model; U-ViT
    draws the whole map at random. The identity stands apart so that autocast keeps the stream in float32. An odd n has
    a middle block without skip; with an even n the innermost s is h itself.
    skips: linear maps (2 D) -> (D), in the order in which they are used.
    """

    def __init__(self, tokens, skips, num_blocks):
        super().__init__(tokens)
        self.skips, self.num_blocks, self.reads, self.kept = skips, num_blocks, 0, []

    def read(self, shift, scale):
        """As in residual addition, but that the state (B, T, D) is the one before it takes up a skip."""
        h, (k, of_mlp) = self.h, divmod(self.reads, 2)  # after k blocks, unless the MLP reads it
        self.reads += 1
        first = self.num_blocks - len(self.skips)
        if not of_mlp and 1 <= k <= len(self.skips):
            self.kept.append(h)
        if not of_mlp and first <= k < self.num_blocks:
            self.write(self.skips[k - first](torch.cat([h, self.kept.pop()], dim=-1)))
        x, _ = super().read(shift, scale)
        return x, h


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


def _xavier(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def load_published(model, state_dict):
    """Load SiT's or REPA's released weights, or our own, into a model of the same size.

    Three things may differ and are mended. Released SiT models predict a variance beside the velocity, of which the
    velocity half is kept, and by which they are known: their time runs from noise to data and is turned round.
    Projectors that only one side has are left out: the model's keep their initial values.
    Weights without routers and skips, of residual routing, leave those of the model as they are. A timestep query
    w + e(t) then starts with the e(t) of those weights instead of zero, so that aggregation is no plain mean at first.
    Returns the names of parameters that were not loaded and of weights that were not used.
    Raises ValueError that names the missing, unknown (such as routers, if the model has none) or differently shaped.
    """
    own = model.state_dict()
    state_dict = dict(state_dict)
    reverse = len(state_dict.get("final_layer.linear.bias", ())) == 2 * len(own["final_layer.linear.bias"])
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in state_dict and len(state_dict[name]) == 2 * len(own[name]):
            both = state_dict[name].unflatten(0, (model.patch_size**2, 2, model.in_channels))
            state_dict[name] = both[:, 0].flatten(0, 1)  # (p * p * C, ...)
    missing = sorted(own.keys() - state_dict.keys())
    unused = sorted(state_dict.keys() - own.keys())
    joined = any(name.startswith(("router.", "skips.")) for name in state_dict)
    optional = ("projectors.",) if joined else ("projectors.", "router.", "skips.")
    problems = [f"missing {name}" for name in missing if not name.startswith(optional)]
    problems += [f"unknown {name}" for name in unused if not name.startswith("projectors.")]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state_dict.keys())
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(state_dict, strict=False)
    if reverse:
        _reverse_time(model)
    return missing, unused


@torch.no_grad()
def _reverse_time(model):
    """v(x, t) becomes -v(x, 1 - t), by cos f(1 - t) = cos f cos ft + sin f sin ft, sin f(1 - t) = sin f cos ft - ..."""
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(0, 1, 2 / FREQUENCIES, dtype=torch.float64))
    embedding, head = model.t_embedder.mlp[0].weight, model.final_layer.linear
    of_cos, of_sin = embedding.double().chunk(2, dim=1)  # (D, 128) each
    cos, sin = frequencies.cos(), frequencies.sin()
    embedding.copy_(torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1))
    head.weight.neg_()
    head.bias.neg_()


def parameters_by_part(model):
    """Trainable parameters by part, of those that a SiT has: embedders, blocks, head, router, projectors, skips."""
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.partition(".")[0]
            part = "embedders" if module.endswith("_embedder") else "head" if module == "final_layer" else module
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def flops_per_image(model):
    """Floating-point operations of one forward pass of a SiT for one image, two per multiply-add.

    Matrix products (dynamic queries and long skips included, and projectors where states are aligned) and attention.
    Elementwise work is left out, and with it norms, softmax and the routing's sums over sources. A training step takes
    about three times as many, or four with `checkpoint_activations`.
    """

    def weights(*modules):
        return sum(w.numel() for module in modules for w in module.parameters() if w.ndim > 1)

    _, tokens, width = model.pos_embed.shape
    per_image = weights(
        model.t_embedder, model.final_layer.adaLN_modulation, *(block.adaLN_modulation for block in model.blocks)
    )
    per_token = weights(
        model.x_embedder,
        model.final_layer.linear,
        model.skips,
        *(model.projectors if model.align_depth else ()),
        *(sublayer for block in model.blocks for sublayer in (block.attn, block.mlp)),
    )
    per_token += len(model.blocks) * 2 * tokens * width  # scores, and the sum that they weight
    if model.router and model.router.aggregators[0].kind == "dynamic":
        per_token += len(model.router.plan) * width * width  # a shared one serves twice
    return 2 * (per_image + tokens * per_token)


def kept_for_backward(model, *inputs):
    """Bytes that autograd keeps for the backward pass of model(*inputs), without the model's own parameters.

    Each storage counts once and whole. Inputs count where the backward pass needs them, and so do the copies of
    weights that autocast makes, which do not grow with the batch. Runs the forward pass: in the caller's mode and
    autocast, and with draws from PyTorch's generator where the model makes any.
    """
    kept = set()

    def pack(tensor):
        kept.add(tensor.untyped_storage())  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for storage in kept - {p.untyped_storage() for p in model.parameters()})


def _sized(depth, hidden_size, num_heads, patch_size):
    def build(**kwargs):
        return SiT(
            **{"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size, **kwargs}
        )

    return build


# Depth, width, heads. Plus is the control in DAR's Table 1: XL, widened to the parameters of XL with dynamic queries.
SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Plus": (28, 1216, 16)}
SIT_MODELS = {f"SiT-{name}/{patch}": _sized(*size, patch) for name, size in SIT_SIZES.items() for patch in (2, 4, 8)}
