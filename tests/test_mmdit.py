"""Qwen-Image's transformer with routing: against diffusers' own forward, and a definition of DAR in float64."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import config as configuration
from eval.samplers import sample_ode
from models.cost import flops_per_image
from models.mmdit import MMDIT_MODELS, MMDiT, Prompted, RoutedQwenImage
from tests.test_routing import aggregate, assert_near, chunk_sums, layer_norm, source_set
from weights import load_trained

import diffusers  # after models: see its docstring
from torch.nn import functional as F

SIZES = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def random_weights(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def pair():
    """diffusers' model and ours, with the same random weights."""
    theirs = random_weights(diffusers.QwenImageTransformer2DModel(**SIZES))
    ours = RoutedQwenImage(**SIZES)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(rows=4, columns=6, masked=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, *size, generator=generator).to(dtype) for size in ((rows * columns, 16), (5, 12)))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    t = torch.tensor([0.25, 0.875], dtype=dtype)  # numbers that bf16 has: diffusers embeds 1000 t
    return x, text, mask, t, [[(1, rows, columns)]] * 2


# ---- residual ----


@pytest.mark.parametrize(
    "rows, columns, masked, dtype",
    [
        (4, 6, True, torch.float32),
        (2, 2, False, torch.float32),
        (7, 3, True, torch.bfloat16),
        (1, 9, False, torch.float32),
    ],
)
def test_residual_mode_is_diffusers_bit_for_bit_gradients_too(pair, rows, columns, masked, dtype):
    theirs, ours = (model.to(dtype) for model in pair)
    ours.add_routing(routing="residual", align_depth=(1, 3), align_dims=(5, 7), projector_dim=8)
    given = inputs(rows, columns, masked, dtype)
    outputs = [model(*given).sample for model in pair]
    assert torch.equal(*outputs) and outputs[0].std() > 0.1
    assert torch.equal(ours(*given, return_dict=False)[0], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    of_ours = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad is None) == (of_ours[name].grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, of_ours[name].grad), name
    projected = ours.velocity(*given)[1]
    assert [tuple(z.shape) for z in projected] == [(2, rows * columns, dim) for _ in (1, 3) for dim in (5, 7)]


# ---- routing ----


@pytest.mark.parametrize("chunk_size", [1, 6])
@pytest.mark.parametrize("query", ["static", "dynamic"])
def test_dense_dar_with_zero_queries_is_the_residual_function(pair, query, chunk_size):
    theirs, ours = pair
    ours.add_routing(query=query, chunk_size=chunk_size)
    expected, got = (model(*inputs()).sample for model in pair)
    assert (got - expected).square().mean().sqrt() < 1e-3 * expected.square().mean().sqrt()


@pytest.mark.parametrize("routing", ["dar", "attnres"])
def test_while_it_fades_in_every_routing_starts_as_the_residual_function(pair, routing):
    theirs, ours = pair
    ours.add_routing(routing=routing, chunk_size=4)
    random_weights(ours.router), random_weights(ours.text_router, 1)
    expected, routed = theirs(*inputs()).sample, ours(*inputs()).sample
    ours.gamma = 0.0
    assert (ours(*inputs()).sample - expected).square().mean().sqrt() < 1e-3 * expected.square().mean().sqrt()
    assert (routed - expected).square().mean().sqrt() > 0.05 * expected.square().mean().sqrt()


def by_definition(model, x, text, mask, t, shapes, query, sums):
    """The velocity by Eq. 5 to 7 with chunks of two sublayers, of which `sums`, or the last outputs, are sources."""
    e = model.time_text_embed(t, x)
    rotary = model.pos_embed(shapes, max_txt_seq_len=text.shape[1], device=x.device)
    v = [[model.img_in(x)], [model.txt_in(model.txt_norm(text))]]
    routers = model.router, model.text_router

    def read(stream, shift, scale):
        known = v[stream]
        aggregator = routers[stream].aggregators[len(known) - 1]
        sources = chunk_sums(known, 2) if sums else [known[i] for i in source_set(len(known), 6, 2)]
        q = {
            "static": lambda q: q,
            "timestep": lambda q: (q + e).unsqueeze(1),
            "dynamic": lambda q: sources[-1] @ q.T,
            "attnres": lambda q: q * math.sqrt(len(q)),  # which aggregate divides by
        }[query](aggregator.query)
        h = aggregate(sources, q, aggregator.norm_weight)[0]
        return layer_norm(h) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    for block in model.transformer_blocks:
        i, u = block.img_mod(e).chunk(6, -1), block.txt_mod(e).chunk(6, -1)
        a, b = block.attn(
            hidden_states=read(0, i[0], i[1]), encoder_hidden_states=read(1, u[0], u[1]),
            encoder_hidden_states_mask=mask, image_rotary_emb=rotary,
        )  # fmt: skip
        v[0].append(i[2].unsqueeze(1) * a)
        v[1].append(u[2].unsqueeze(1) * b)
        v[0].append(i[5].unsqueeze(1) * block.img_mlp(read(0, i[3], i[4])))
        if block is not model.transformer_blocks[-1]:
            v[1].append(u[5].unsqueeze(1) * block.txt_mlp(read(1, u[3], u[4])))
    scale, shift = model.norm_out.linear(F.silu(e)).chunk(2, -1)
    return model.proj_out(read(0, shift, scale))


@pytest.mark.parametrize(
    "query, summary",
    [("static", "last"), ("timestep", "last"), ("dynamic", "last"), ("dynamic", "sum"), ("attnres", "sum")],
)
def test_routing_against_its_definition_in_float64(pair, query, summary):
    model = pair[1]
    routing = dict(routing="attnres") if query == "attnres" else dict(query=query, chunk_summary=summary)
    model.add_routing(**routing, chunk_size=2)
    random_weights(model.router), random_weights(model.text_router, 1)
    x, text, mask, t, shapes = inputs(dtype=torch.float64)
    got = model.double()(x, text, mask, t, shapes).sample
    expected = by_definition(model, x, text, mask.bool(), t, shapes, query, summary == "sum")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    weights = {name: p for name, p in model.named_parameters() if name.startswith(("router", "text_r"))}
    found, wanted = (torch.autograd.grad(v.square().mean(), list(weights.values())) for v in (got, expected))
    for name, ours, theirs in zip(weights, found, wanted):
        assert_near(ours, theirs, name, 1e-6) if ".0." not in name else None  # the first state has one source
    assert len(weights) == 2 * (7 + 5) and sum(bool(gradient.any()) for gradient in wanted) >= 2 * (6 + 4)


def test_in_bf16_it_is_what_it_is_in_float32(pair):
    model = pair[1]
    model.add_routing(query="dynamic", chunk_size=2, align_depth=(2,), align_dims=(5,), projector_dim=8)
    random_weights(model.router), random_weights(model.text_router, 1)
    expected, (z,) = model.velocity(*inputs())
    half = RoutedQwenImage(**SIZES).bfloat16()
    half.add_routing(query="dynamic", chunk_size=2, align_depth=(2,), align_dims=(5,), projector_dim=8)
    half.load_state_dict(model.state_dict())
    got, (z_half,) = half.velocity(*inputs(dtype=torch.bfloat16))
    assert got.dtype == z_half.dtype == torch.bfloat16
    for a, b in ((got, expected), (z_half, z)):
        assert (a.float() - b).norm() < 0.1 * b.norm()


# ---- keeping and using ----


def test_what_was_added_is_saved_and_put_back(pair, tmp_path):
    theirs, ours = pair
    ours.add_routing(query="dynamic", chunk_size=3, align_depth=(2,), align_dims=(5,), projector_dim=8)
    random_weights(ours.router), random_weights(ours.text_router, 1)
    ours.gamma = 0.4
    theirs.save_pretrained(tmp_path / "published")
    ours.save_added(tmp_path / "dar.safetensors")
    with pytest.raises(ValueError, match="save_pretrained: the routing would be lost; use save_added"):
        ours.save_pretrained(tmp_path / "ours")
    again = RoutedQwenImage.from_pretrained(tmp_path / "published")
    again.load_added(tmp_path / "dar.safetensors")
    assert torch.equal(again(*inputs()).sample, ours(*inputs()).sample)
    assert (tmp_path / "dar.safetensors").stat().st_size < 0.3 * 4 * sum(p.numel() for p in ours.parameters())
    with pytest.raises(ValueError, match="was not written by save_added"):
        again.load_added(next((tmp_path / "published").glob("*.safetensors")))
    wide = RoutedQwenImage(**{**SIZES, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="dar.safetensors' does not fit this model"):
        wide.load_added(tmp_path / "dar.safetensors")
    deep = RoutedQwenImage(**{**SIZES, "num_layers": 4})
    deep.add_routing(chunk_size=2)
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model: .* names differ, such as router"):
        deep.load_added(tmp_path / "dar.safetensors")
    assert deep.state_dict().keys() == before.keys() and deep.added["chunk_size"] == 2 and deep.gamma == 1
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    random_weights(ours, 2)
    ours.save_added(tmp_path / "whole.safetensors", whole=True)
    again.load_added(tmp_path / "whole.safetensors")
    assert torch.equal(again(*inputs()).sample, ours(*inputs()).sample)


def test_a_pipeline_of_diffusers_draws_what_euler_steps_draw(pair, tmp_path):
    model = pair[1].eval()
    model.add_routing(chunk_size=4)
    random_weights(model.router), random_weights(model.text_router, 1)
    torch.manual_seed(0)
    sizes = dict(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    vae = diffusers.AutoencoderKLQwenImage(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **sizes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, model)
    text, noise = torch.randn(1, 5, 12), torch.randn(1, 16, 16)  # 4 x 4 tokens
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        prompt_embeds=text, prompt_embeds_mask=torch.ones(1, 5, dtype=torch.long), latents=noise, height=16, width=16,
        num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], true_cfg_scale=1.0, output_type="latent",
    ).images  # fmt: skip
    x = noise
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * model.velocity(x, text, None, torch.tensor([t]), [[(1, 4, 4)]])[0]
    torch.testing.assert_close(drawn.reshape(x.shape), x, rtol=1e-4, atol=1e-4)


def test_what_is_refused(pair):
    model = pair[1]
    for options, message in (
        ({"routing": "unet"}, "routing 'unet' is unknown; choose one of residual, dar, attnres"),
        ({"chunk_size": 7}, "chunk_size = 7 is not between 1 and the 6 sublayers"),
        ({"align_depth": (4,), "align_dims": (5,)}, r"align_depth = \(4,\) must name different blocks between 1 and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_routing(**options)
    assert not model.added and model.router is None
    for given in ({"guidance": torch.ones(2)}, {"attention_kwargs": {"scale": 0.5}}):
        with pytest.raises(ValueError, match="are not for this model"):
            model(*inputs(), **given)
    for variant in ("zero_cond_t", "use_additional_t_cond"):
        with pytest.raises(ValueError, match=f"{variant} = True"):
            RoutedQwenImage(**SIZES, **{variant: True})
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        model.enable_gradient_checkpointing()


# ---- MMDiT: captions in the place of labels ----

SMALL = dict(input_size=8, in_channels=4, hidden_size=32, depth=3, num_heads=2, text_tokens=5, text_width=12)


def captions():
    _, text, mask, _, _ = inputs()
    return torch.cat([text, mask.unsqueeze(-1)], dim=-1)


def small(theirs, **options):
    model = MMDiT(**SMALL, **options).eval()
    model.load_state_dict(theirs.state_dict(), strict=False)
    model.null_text.copy_(captions()[0].flip(0))
    return model


def packed_velocity(theirs, x, y, t):
    """diffusers' model on images, which its own pipeline cuts into patches and puts together."""
    pipe, (batch, channels, height, width) = diffusers.QwenImagePipeline, x.shape
    shapes = [[(1, height // 2, width // 2)]] * batch
    tokens = theirs(pipe._pack_latents(x, batch, channels, height, width), y[..., :-1], y[..., -1], t, shapes).sample
    return pipe._unpack_latents(tokens, height * 8, width * 8, 8)[:, :, 0]


def test_an_mmdit_is_diffusers_model_on_patches(pair):
    theirs, x, t = pair[0], torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.875])
    model = small(theirs)
    assert torch.equal(model(x, t, captions())[0], packed_velocity(theirs, x, captions(), t))
    added = model.state_dict().keys() - theirs.state_dict().keys()
    assert added == {"null_text"} and theirs.state_dict().keys() <= model.state_dict().keys()


def test_captions_are_dropped_in_training_alone(pair):
    model, x, t = small(pair[0], class_dropout_prob=0.3), torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.875])
    y, draws = captions(), torch.tensor([0.29, 0.31])
    dropped = torch.cat([model.null(1), y[1:]])
    expected = packed_velocity(pair[0], x, dropped, t)
    assert not torch.equal(expected, packed_velocity(pair[0], x, y, t))
    assert torch.equal(model.train()(x, t, y, draws)[0], expected)
    assert torch.equal(model.eval()(x, t, y, draws)[0], packed_velocity(pair[0], x, y, t))


@pytest.mark.parametrize("routing", ["residual", "dar", "attnres"])
def test_an_mmdit_starts_at_zero_and_recomputes_activations_alike(routing):
    """Every trainable weight has a gradient: DistributedDataParallel waits for them all."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        options = dict(
            routing=routing, align_depth=(2,), align_dims=(5,), projector_dim=8, checkpoint_activations=again
        )
        model, x, t = MMDiT(**SMALL, **options), torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.875])
        assert model(x, t, captions())[0].abs().max() == 0  # adaLN-Zero
        random_weights(model)
        velocity, (z,) = model(x, t, captions(), torch.tensor([0.0, 1.0]))
        (velocity.square().mean() + z.mean()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert z.shape == (2, 16, 5) and len(gradients[0]) > 40
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name]), name


@pytest.mark.parametrize("shard", ["10GB", "50KB"])
def test_published_weights_come_from_a_folder_of_diffusers_whole_or_sharded(pair, tmp_path, shard):
    theirs, x, t = pair[0], torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.875])
    theirs.save_pretrained(tmp_path / "published" / "transformer", max_shard_size=shard)
    assert (len(list(tmp_path.rglob("*.safetensors"))) > 1) == (shard == "50KB")
    model, known = load_trained(tmp_path / "published", name="Qwen-Image/2")
    model.input_size = 8
    assert torch.equal(model(x, t, captions())[0], packed_velocity(theirs, x, captions(), t)) and not known
    with pytest.raises(ValueError, match="nowhere"):
        load_trained(tmp_path / "nowhere", name="Qwen-Image/2")


def test_the_options_know_the_models_of_captions():
    assert configuration.NOT_SIT["model"] == tuple(MMDIT_MODELS)


def test_weights_that_are_not_whole_are_refused(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match="1 weights are not there, such as proj_out.bias"):
        load_trained(tmp_path, name="Qwen-Image/2")


def test_qwen_image_by_name_has_the_published_shapes():
    with torch.device("meta"):
        ours, theirs = MMDIT_MODELS["Qwen-Image/2"](), diffusers.QwenImageTransformer2DModel()
    assert {name: weight.shape for name, weight in ours.named_parameters()} == {
        name: weight.shape for name, weight in theirs.named_parameters()
    }
    assert ours.config.axes_dims_rope == theirs.config.axes_dims_rope


def test_flops_are_those_of_all_products():
    """2 m n k for a product of (m, k) with (k, n), of 16 image tokens with N of text, attention of both together."""
    T, N, D, P = 16, 5, 32, 8
    products = [(T, 16, D), (N, 12, D), (1, 256, D), (1, D, D), (1, D, 2 * D), (T, D, 16)]
    products += 3 * [(T + N, D, T + N), (T + N, T + N, D), *2 * [(1, D, 6 * D)]]
    for tokens, mlps in ((T, 3), (N, 2)):  # nobody reads the last one of the text
        products += 3 * [(tokens, D, 4 * D)] + mlps * [(tokens, D, 4 * D), (tokens, 4 * D, D)]
    products += [(T, D, P), (T, P, P), (T, P, 7)] + 7 * [(T, D, D)] + 5 * [(N, D, D)]  # projector, dynamic queries
    options = dict(routing="dar", query="dynamic", chunk_size=2, align_depth=(2,), align_dims=(7,), projector_dim=P)
    found = flops_per_image("Qwen-Image/2", SMALL | options)
    assert found == sum(2 * m * n * k for m, k, n in products)


def test_prompts_are_labels_whose_null_class_is_no_caption(pair):
    model, x, t = small(pair[0]), torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    prompted = Prompted(model, captions())
    y = torch.tensor([1, 0, prompted.num_classes])
    expected = model(x, t, torch.cat([captions().flip(0), model.null(1)]))[0]
    assert torch.equal(prompted(x, t, y)[0], expected) and prompted.null(2).tolist() == [2, 2]
    guided = sample_ode(prompted, x[:2], y[:2], num_steps=3, cfg_scale=2.0)
    text, null = captions().flip(0), model.null(2)
    z = x[:2].double()
    for now, after in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        v, v_0 = (model(z.float(), torch.full((2,), now), given)[0].double() for given in (text, null))
        z = z + (after - now) * (v_0 + 2 * (v - v_0))
    torch.testing.assert_close(guided, z, rtol=1e-4, atol=1e-4)
