"""Qwen-Image's MM-DiT (arXiv 2508.02324) with a choice of what joins its sublayers, as in models/sit.py.

Blocks and weights are diffusers' own. Image tokens and text tokens each have a stream and a router.

    model = RoutedQwenImage.from_pretrained("Qwen/Qwen-Image", subfolder="transformer")
    model.add_routing(routing="dar", query="timestep", chunk_size=4)      # the same function while model.gamma is 0
    model.save_added("dar.safetensors")                                   # and `load_added` puts it back

Such a model takes the place of the transformer in diffusers' pipelines.

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

from models.dar import AttnResRouter, DepthRouter
from models.projector import Projector, project
from models.streams import joined

ROUTINGS = ("residual", "dar", "attnres")
ADDED = ("image_router.", "text_router.", "projectors.")  # parameters that diffusers' model has not
PLAIN = ("align_depth", "added")  # and what else says how it is joined


class RoutedQwenImage(QwenImageTransformer2DModel):
    """diffusers' QwenImageTransformer2DModel. As loaded it is that model to the bit, but for its clipping in fp16.

    Blocks are not called whole, so what diffusers hangs on their calls is refused: checkpointing, offloading, plans of
    parallelism.
    """

    _supports_gradient_checkpointing = _supports_group_offloading = False
    _no_split_modules = _repeated_blocks = _cp_plan = _tp_plan = None

    @functools.wraps(QwenImageTransformer2DModel.__init__)  # diffusers reads the options of a config off the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("zero_cond_t", "use_additional_t_cond"):
            if self.config[name]:
                raise ValueError(f"{name} = True: that variant of Qwen-Image is not supported")
        self.image_router = self.text_router = None
        self.projectors, self.align_depth, self.added = nn.ModuleList(), (), {}
        self.gamma = 1.0  # how far routers have faded in (RetrofitStream)

    def add_routing(
        self, routing: str = "dar", query: str = "timestep", chunk_size: int = 4, chunk_summary: str = "last",
        route_backend: str = "auto", align_depth: tuple = (), align_dims: tuple = (), projector_dim: int = 2048,
    ):  # fmt: skip
        """Puts routers, and projectors of the image tokens after blocks align_depth, into the model.

        The arguments are those of SiT. The head has an aggregator of its own. Raises ValueError on invalid ones.
        """
        added = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        sublayers, width, blocks = 2 * len(self.transformer_blocks), self.inner_dim, len(self.transformer_blocks)
        if routing not in ROUTINGS:
            raise ValueError(f"routing {routing!r} is unknown; choose one of {', '.join(ROUTINGS)}")
        if align_dims and not (align_depth and all(1 <= k <= blocks for k in align_depth)):
            raise ValueError(f"align_depth = {align_depth} must name blocks between 1 and {blocks}")

        def router(count, final):
            size = count if chunk_size == sublayers else chunk_size  # one chunk of all, for the text too
            if routing == "attnres":
                return AttnResRouter(count, width, size, route_backend)
            return DepthRouter(count, width, query, size, final, route_backend, chunk_summary)

        image = text = None
        if routing != "residual":  # nobody reads the text after the last attention
            image, text = router(sublayers, "dedicated"), router(sublayers - 1, "shared")
        align_depth = tuple(align_depth) if align_dims else ()
        projectors = nn.ModuleList(Projector(width, projector_dim, dim) for _ in align_depth for dim in align_dims)
        self.image_router, self.text_router, self.projectors = image, text, projectors
        self.align_depth, self.added = align_depth, added
        for part in filter(None, (image, text, projectors)):
            part.to(self.proj_out.weight.device, self.proj_out.weight.dtype)

    def velocity(
        self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes
    ) -> tuple[torch.Tensor, list]:
        """hidden_states: packed latents (B, T, C); encoder_hidden_states: text (B, L, W), its mask (B, L) or None.

        timestep: (B) in [0, 1], 1 is noise; img_shapes: for each image a list of (frames, rows, columns), of tokens.
        Returns the velocity (B, T, C') and the projected image tokens, (B, T, dim) by depth and then by encoder.
        """
        image, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
        mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        t = self.time_text_embed(timestep.to(image.dtype), image)  # (B, D)
        rotary = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        image, text = (
            joined(router, tokens, t, self.gamma)
            for router, tokens in ((self.image_router, image), (self.text_router, text))
        )
        projected = []
        for k, block in enumerate(self.transformer_blocks):
            i, u = block.img_mod(t).chunk(6, dim=-1), block.txt_mod(t).chunk(6, dim=-1)  # shift, scale, gate, twice
            x, z = image.read(*i[:2])
            y, _ = text.read(*u[:2])
            projected += project(self.projectors, self.align_depth, z, k)
            x, y = block.attn(x, encoder_hidden_states=y, encoder_hidden_states_mask=mask, image_rotary_emb=rotary)
            image.write(i[2].unsqueeze(1) * x)
            text.write(u[2].unsqueeze(1) * y)
            x, _ = image.read(*i[3:5])
            image.write(i[5].unsqueeze(1) * block.img_mlp(x))
            if k + 1 < len(self.transformer_blocks):  # nobody reads the text after the last attention
                y, _ = text.read(*u[3:5])
                text.write(u[5].unsqueeze(1) * block.txt_mlp(y))
        scale, shift = self.norm_out.linear(self.norm_out.silu(t)).chunk(2, dim=1)
        x, z = image.read(shift, scale)
        projected += project(self.projectors, self.align_depth, z, len(self.transformer_blocks))
        return self.proj_out(x), projected

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

    def save_added(self, path: str | Path):
        """What `add_routing` has added, as safetensors: its arguments, the parameters, and gamma."""
        added = {name: value.contiguous() for name, value in self.state_dict().items() if name.startswith(ADDED)}
        save_file(added, path, metadata={"added": json.dumps(self.added | {"gamma": self.gamma})})

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
        before = {name: getattr(self, name) for name in ("image_router", "text_router", "projectors", *PLAIN)}
        try:
            gamma = known.pop("gamma")
            self.add_routing(**known)
            own = {name for name in self.state_dict() if name.startswith(ADDED)}
            if unfit := sorted(own.symmetric_difference(weights)):
                raise ValueError(f"{len(unfit)} names differ, such as {unfit[0]}")
            self.load_state_dict(weights, strict=False)
            self.gamma = gamma
        except (ValueError, RuntimeError) as error:
            for name, value in before.items():
                setattr(self, name, value)
            raise ValueError(f"{str(path)!r} does not fit this model: {error}") from None
