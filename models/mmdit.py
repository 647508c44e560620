"""Qwen-Image's MM-DiT (arXiv 2508.02324) with a choice of what joins its sublayers, as in models/sit.py.

Blocks and weights are diffusers' own. Image tokens and text tokens each have a stream and a router.

    model = RoutedQwenImage.from_pretrained("Qwen/Qwen-Image", subfolder="transformer")
    model.add_routing(routing="dar", query="timestep", chunk_size=4)      # the same function while model.gamma is 0
    model.save_added("dar.safetensors")                                   # and `load_added` puts it back

Such a model takes the place of the transformer in diffusers' pipelines. `MMDiT` is one that is called as a SiT is, with
a caption in place of a label; this is what the trainers train.

Shapes: B batch, T image tokens, L text tokens, D width, C channels of a token, W width of the text encoder.
"""

import functools
import json
from pathlib import Path

import safetensors
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.dar import head_aggregator, make_router
from models.projector import Projector, project, xavier
from models.streams import joined

ROUTINGS = ("residual", "dar", "attnres")
ADDED = ("router.", "text_router.", "projectors.")  # parameters that diffusers' model has not


def refuse_variants(config):
    """Raises ValueError where the same weights would mean another function."""
    for name in ("zero_cond_t", "use_additional_t_cond"):
        if config[name]:
            raise ValueError(f"{name} = True: that variant of Qwen-Image is not supported")


def rotary_axes(head: int) -> tuple | None:
    """Rotary dimensions of frames, rows and columns: an eighth for frames, as Qwen-Image's 16, 56, 56, and all even."""
    frames = next((n for n in range(-(-head // 16) * 2, head, 2) if (head - n) % 4 == 0), None)
    return frames and (frames, (head - frames) // 2, (head - frames) // 2)


class RoutedQwenImage(QwenImageTransformer2DModel):
    """diffusers' QwenImageTransformer2DModel. Freshly loaded it computes the same bits, but does not clip in fp16.

    Blocks are not called whole, so what diffusers hangs on their calls is refused: checkpointing, offloading, plans of
    parallelism.
    """

    _supports_gradient_checkpointing = _supports_group_offloading = False
    _no_split_modules = _repeated_blocks = _cp_plan = _tp_plan = None

    @functools.wraps(QwenImageTransformer2DModel.__init__)  # diffusers reads the options of a config off the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_variants(self.config)
        self.router = self.text_router = None
        self.projectors, self.align_depth, self.added = nn.ModuleList(), (), {}
        self.checkpoint_activations = False  # recompute the sublayers in the backward pass, as in SiT
        self.gamma = 1.0  # how far routers have faded in (RetrofitStream)

    def add_routing(
        self, routing: str = "dar", query: str = "timestep", chunk_size: int = 4, chunk_summary: str = "last",
        route_backend: str = "auto", align_depth: tuple = (), align_dims: tuple = (), projector_dim: int = 2048,
        final_aggregator: str = "dedicated",
    ):  # fmt: skip
        """Puts routers, and projectors of the image tokens after blocks align_depth, into the model.

        The arguments are those of SiT. Raises ValueError on invalid ones.
        """
        added = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        sublayers, width, blocks = 2 * len(self.transformer_blocks), self.inner_dim, len(self.transformer_blocks)
        if routing not in ROUTINGS:
            raise ValueError(f"routing {routing!r} is unknown; choose one of {', '.join(ROUTINGS)}")
        fitting = set(range(1, blocks + 1)) & set(align_depth)
        if align_dims and not (fitting and len(fitting) == len(align_depth)):
            raise ValueError(f"align_depth = {align_depth} must name different blocks between 1 and {blocks}")

        def router(count):
            size = count if chunk_size == sublayers else chunk_size  # one chunk of all, for the text too
            return make_router(routing, count, width, query, size, final_aggregator, route_backend, chunk_summary)

        image, text = router(sublayers), router(sublayers - 1)
        if text:  # nobody reads the text after the last attention
            text.aggregators = text.aggregators[: sublayers - 1]
        align_depth = tuple(align_depth) if align_dims else ()
        projectors = nn.ModuleList(Projector(width, projector_dim, dim) for _ in align_depth for dim in align_dims)
        self.router, self.text_router, self.projectors = image, text, projectors
        self.align_depth, self.added = align_depth, added
        for part in filter(None, (image, text, projectors)):
            part.to(self.proj_out.weight.device, self.proj_out.weight.dtype)

    def velocity(
        self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes, make_stream=None
    ) -> tuple[torch.Tensor, list]:
        """hidden_states: packed latents (B, T, C); encoder_hidden_states: text (B, L, W), its mask (B, L) or None.

        timestep: (B) in [0, 1], 1 is noise; img_shapes: for each image a list of (frames, rows, columns), of tokens.
        make_stream: builds what joins the sublayers of the image tokens, in place of `self.stream`.
        Returns the velocity (B, T, C') and the projected image tokens, (B, T, dim) by depth and then by encoder.
        """
        # Under autocast, states and timestep stay in the precision of the inputs, as in SiT.
        image = self.img_in(hidden_states).to(hidden_states.dtype)
        text = self.txt_in(self.txt_norm(encoder_hidden_states)).to(hidden_states.dtype)
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        t = self.time_text_embed(timestep.to(image.dtype), image)  # (B, D)
        rotary = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        image, text = (make_stream or self.stream)(image, t), joined(self.text_router, text, t, self.gamma)
        projected = []
        for k, block in enumerate(self.transformer_blocks):
            i, u = block.img_mod(t).chunk(6, dim=-1), block.txt_mod(t).chunk(6, dim=-1)  # shift, scale, gate, twice
            x, z = image.read(*i[:2])
            y, _ = text.read(*u[:2])
            projected += project(self.projectors, self.align_depth, z, k)
            attend = functools.partial(block.attn, encoder_hidden_states_mask=mask, image_rotary_emb=rotary)
            x, y = self.run(attend, x, y)
            image.write(i[2].unsqueeze(1) * x)
            x, _ = image.read(*i[3:5])
            image.write(i[5].unsqueeze(1) * self.run(block.img_mlp, x))
            if k + 1 < len(self.transformer_blocks):  # nobody reads the text after the last attention
                text.write(u[2].unsqueeze(1) * y)
                y, _ = text.read(*u[3:5])
                text.write(u[5].unsqueeze(1) * self.run(block.txt_mlp, y))
        scale, shift = self.norm_out.linear(self.norm_out.silu(t)).chunk(2, dim=1)
        x, z = image.read(shift, scale)
        projected += project(self.projectors, self.align_depth, z, len(self.transformer_blocks))
        return self.proj_out(x), projected

    def stream(self, tokens: torch.Tensor, e: torch.Tensor):
        """What joins the sublayers of the image tokens (B, T, D) in one forward pass. e: the timestep embedding."""
        return joined(self.router, tokens, e, self.gamma)

    def run(self, sublayer, *inputs):
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(sublayer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return sublayer(*inputs)

    def forward(
        self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, timestep=None,
        img_shapes=None, guidance=None, attention_kwargs=None, return_dict=True,
    ):  # fmt: skip
        """What diffusers' pipelines call. Raises ValueError on guidance and attention_kwargs, which are not for it."""
        if guidance is not None or attention_kwargs:
            raise ValueError("guidance and attention_kwargs are not for this model; leave them out of the pipeline")
        output, _ = self.velocity(
            hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def save_added(self, path: str | Path, whole: bool = False):
        """What `add_routing` has added, as safetensors: its arguments, the parameters, and gamma.

        whole: with all other weights, for training that has changed them too.
        """
        names = [name for name, _ in self.named_parameters() if whole or name.startswith(ADDED)]
        weights = self.state_dict()
        weights = {name: weights[name].contiguous() for name in names}
        save_file(weights, path, metadata={"added": json.dumps(self.added | {"gamma": self.gamma})})

    def save_pretrained(self, *args, **kwargs):
        """diffusers would drop what has been added when it loads this again. Raises ValueError then."""
        if self.added:
            raise ValueError("save_pretrained: the routing would be lost; use save_added, and the published weights")
        super().save_pretrained(*args, **kwargs)

    def load_added(self, path: str | Path):
        """Puts into the model what `save_added` wrote. Raises ValueError, and changes nothing, if it does not fit."""
        with safetensors.safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("added")
            if known is None:
                raise ValueError(f"{str(path)!r} was not written by save_added")
            known, weights = json.loads(known), {name: file.get_tensor(name) for name in file.keys()}
        before = {name: getattr(self, name) for name in ("router", "text_router", "projectors", "align_depth", "added")}
        try:
            gamma = known.pop("gamma")
            self.add_routing(**known)
            own = dict(self.named_parameters()).keys()
            added = {name for name in own if name.startswith(ADDED)}
            if unfit := sorted((added - weights.keys()) | (weights.keys() - own)):
                raise ValueError(f"{len(unfit)} names differ, such as {unfit[0]}")
            self.load_state_dict(weights, strict=False)
            self.gamma = gamma
        except (ValueError, RuntimeError) as error:
            for name, value in before.items():
                setattr(self, name, value)
            raise ValueError(f"{str(path)!r} does not fit this model: {error}") from None


class MMDiT(RoutedQwenImage):
    """Velocity network v(x, t, text) of the same blocks and weights, with the call and the arguments of SiT.

    text_tokens L, text_width W: of a caption; the others as in SiT, whose `qk_norm` is always on here.
    Starts as SiT does, adaLN-Zero and all, where no weights are loaded. `null_text` (L, W + 1) is the caption of
    classifier-free guidance, zero until the data's is put there.
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=24, num_heads=24, text_tokens=77,
        text_width=768, class_dropout_prob=0.1, routing="residual", query="timestep", chunk_size=4,
        chunk_summary="last", final_aggregator="auto", route_backend="auto", align_depth=(8,), align_dims=(),
        projector_dim=2048, checkpoint_activations=False,
    ):  # fmt: skip
        head = hidden_size // num_heads
        axes = rotary_axes(head)
        for fine, problem in (
            (input_size % patch_size == 0, f"input_size = {input_size} is not a multiple of patch_size = {patch_size}"),
            (
                hidden_size % num_heads == 0 and axes,
                f"hidden_size / num_heads = {hidden_size} / {num_heads} must be a whole even number above 4",
            ),
            (0 <= class_dropout_prob < 1, f"class_dropout_prob = {class_dropout_prob} is not in [0, 1)"),
        ):
            if not fine:
                raise ValueError(problem)
        super().__init__(
            patch_size, in_channels * patch_size**2, in_channels, depth, head, num_heads, text_width,
            axes_dims_rope=axes,
        )  # fmt: skip
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.class_dropout_prob, self.hidden_size, self.routing = class_dropout_prob, hidden_size, routing
        self.step_times = ()
        self.register_buffer("null_text", torch.zeros(text_tokens, text_width + 1))
        self.initialize_weights(zero_embedding=routing == "dar" and query == "timestep")
        self.add_routing(
            routing, query, chunk_size, chunk_summary, route_backend, align_depth, align_dims, projector_dim,
            head_aggregator(final_aggregator, align_dims),
        )  # fmt: skip
        self.projectors.apply(xavier)
        self.checkpoint_activations = checkpoint_activations
        last = self.blocks[-1]  # nobody reads the text after its attention, and DDP would wait for these gradients
        for unused in (last.attn.add_q_proj, last.attn.norm_added_q, last.attn.to_add_out, last.txt_mlp):
            unused.requires_grad_(False)

    def forward(self, x, t, y, label_draw=None, make_stream=None) -> tuple[torch.Tensor, list]:
        """As SiT's, but for y (B, L, W + 1): the text encoder's tokens, and in the last channel 1, or 0 for padding."""
        if self.training and self.class_dropout_prob > 0:
            draw = torch.rand(len(y), device=y.device) if label_draw is None else label_draw
            y = torch.where((draw < self.class_dropout_prob).view(-1, 1, 1), self.null_text, y.to(self.null_text))
        p, g = self.patch_size, self.input_size // self.patch_size
        patches = x.unflatten(2, (g, p)).unflatten(4, (g, p))  # (B, C, g, p, g, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C * p * p)
        velocity, projected = self.velocity(
            patches, y[..., :-1].to(x.dtype), y[..., -1] > 0.5, t, [[(1, g, g)]] * len(x), make_stream
        )
        velocity = velocity.unflatten(2, (self.in_channels, p, p)).unflatten(1, (g, g))  # (B, g, g, C, p, p)
        return velocity.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), projected

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer_blocks

    def null(self, count: int) -> torch.Tensor:
        """What stands for no caption, so many times: (count, L, W + 1)."""
        return self.null_text.expand(count, -1, -1)

    def initialize_weights(self, zero_embedding: bool):
        """As SiT: Xavier, and zeros where adaLN-Zero and timestep queries want them."""
        self.apply(xavier)
        embedder = self.time_text_embed.timestep_embedder
        for layer in (embedder.linear_1, embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (
            *(part[1] for block in self.blocks for part in (block.img_mod, block.txt_mod)),
            self.norm_out.linear,
            self.proj_out,
            *[embedder.linear_2] * zero_embedding,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class Prompted(nn.Module):
    """A model of captions as one of labels 0 .. P - 1, which stand for P prompts. prompts: (P, L, W + 1)."""

    def __init__(self, model: MMDiT, prompts: torch.Tensor):
        super().__init__()
        self.model, self.num_classes, self.step_times = model, len(prompts), model.step_times
        self.in_channels, self.input_size = model.in_channels, model.input_size
        self.register_buffer("prompts", torch.cat([prompts, model.null(1).to(prompts)]))

    def forward(self, x, t, y):
        return self.model(x, t, self.prompts[y])

    def null(self, count: int) -> torch.Tensor:
        return torch.full((count,), self.num_classes, device=self.prompts.device)


def weights_of_diffusers(source: str | Path) -> dict:
    """The weights of Qwen-Image's transformer in a folder of diffusers or a hub name; {} where there is no such.

    Raises ValueError where an MMDiT with these weights would be another function.
    """
    for subfolder in ("transformer", None):
        try:
            options = {"subfolder": subfolder, "output_loading_info": True}
            model, found = QwenImageTransformer2DModel.from_pretrained(source, **options)
        except (OSError, ValueError):  # what diffusers raises where it finds nothing, or finds something else
            continue
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{source}: {len(missing)} weights are not there, such as {missing[0]}")
        refuse_variants(model.config)
        axes, expected = tuple(model.config.axes_dims_rope), rotary_axes(model.config.attention_head_dim)
        if axes != expected:
            raise ValueError(f"axes_dims_rope = {axes}: only {expected} is supported for heads of this width")
        return model.state_dict()
    return {}


# Depth, width, heads. B is REPA's, for MS-COCO.
MMDIT_SIZES = {"B": (24, 768, 24)}
MMDIT_MODELS = {
    f"MMDiT-{name}/{patch}": functools.partial(MMDiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for name, (depth, width, heads) in MMDIT_SIZES.items()
    for patch in (1, 2, 4)
}
MMDIT_MODELS["Qwen-Image/2"] = functools.partial(
    MMDiT, input_size=128, in_channels=16, hidden_size=3072, depth=60, num_heads=24, text_tokens=512, text_width=3584
)
