"""Distils a trained model into one of 1, 2 or 4 steps, by distribution matching (DMD2, arXiv 2405.14867).

    python distill.py --teacher runs/digits/residual-none-seed0/last.pt --student-steps 4 --out runs/distilled
    torchrun --nproc_per_node=8 distill.py --teacher SiT-XL-2-256x256.pt --model SiT-XL/2 \\
        --autoencoder sd-vae-ft-ema --data data/imagenet256 --batch-size 512 --lr 2e-5 --critic-lr 2e-5 --out runs/xl-4

A step updates the critic `critic_steps` times, then the student once. Only a GAN and the evaluation read images. The
same command again resumes the run, bit for bit on a CPU. The folder is that of a training run, and `eval.sample` draws
from its last.pt. The student may have another routing than its teacher: --routing dar --retrofit-steps 1000.
"""

from dataclasses import replace

import torch

import config as configuration
from checkpoint import EMA
from dataset.inputs import Inputs
from distribution_matching import critic_loss, draw_samples, step_times, student_loss, training_sample
from eval.online import OnlineEvaluation
from models.cost import flops_per_image, held, trainable
from models.registry import constructor
from runtime import Use, derive_seed
from training import Run, Tally, launch
from weights import JOINS, load_into, load_teacher

ROUTING = ("routing", "query", "chunk_size", "chunk_summary")  # arguments of a model in which a student may differ


def main(argv=None):
    launch(Distiller, configuration.parse_distillation(argv))


class Distiller(Run):
    """One run: teacher, critic and student (`model`), and what trains them."""

    def __init__(self, config, ranks):
        with ranks.one_first():  # the hub may be asked
            loaded = load_teacher(config.teacher, config.model, config.route_backend)
        self.teacher, trained, self.teacher_arguments, self.content = loaded
        chosen = {name: value for name in ROUTING if (value := getattr(config, name))}
        self.arguments = self.teacher_arguments | chosen
        config = resolved(config, trained, self.arguments)
        super().__init__(config, ranks)
        # What inputs and evaluation need to know, in the words of the trainer.
        same = {name: value for name, value in vars(config).items() if name in configuration.FIELDS}
        seen = {"encoder": tuple(trained.get("encoder", configuration.Config.encoder))}  # none of them may judge
        seen["text_encoder"] = trained.get("content of text") or config.text_encoder
        self.inputs = Inputs(configuration.Config(**same | seen, decoder=trained.get("decoder", "")), ranks)
        if self.inputs.text and not trained:  # released weights do not say how large images are, and how long captions
            self.teacher.input_size, self.teacher.null_text = self.inputs.shape[1], self.inputs.data.null_text.float()
            known = self.inputs.model_arguments()
            known = {name: known[name] for name in ("input_size", "text_tokens")}
            self.teacher_arguments, self.arguments = self.teacher_arguments | known, self.arguments | known
        self.check_teacher(trained)

        self.teacher.align_depth = ()
        if not config.shard:  # before others share its weights
            self.place(self.teacher)
        self.times = step_times(config.student_steps, config.time_shift)
        self.labels = self.inputs.data.labels.to(self.device)
        self.model = self.copy_of_teacher(self.arguments, config.student_rank, JOINS)
        self.model.step_times = self.times
        self.critic = self.make_critic()
        self.ema = EMA(self.model, config.ema_decays)
        self.place(self.teacher, self.critic, self.model, *self.ema.models.values())
        self.critic_weights = torch.nn.ParameterList(w for w in self.critic.parameters() if w.requires_grad)
        self.flops = self.flops_of_step()
        self.wrapped = {"model": self.parallel(self.model), "critic": self.parallel(self.critic)}
        common = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, **common)
        self.critic_optimizer = torch.optim.AdamW(self.critic_weights, lr=config.critic_lr, **common)
        self.tally = Tally(self.device, ("loss", "critic_loss", "grad_norm", "critic_grad_norm"))
        self.parts = {"model": self.model, "emas": self.ema, "optimizer": self.optimizer}
        kept = self.critic_weights if config.critic_rank else self.critic
        self.parts |= {"critic": kept, "critic_optimizer": self.critic_optimizer, "tally": self.tally}
        if config.eval_every:
            self.evaluate = OnlineEvaluation(self.inputs.config, ranks, self.inputs, self.autocast)

    @staticmethod
    def outline(config) -> str:
        """What a run takes, by its options alone: on the meta device, from a residual teacher."""
        arguments = {name: value for name in ROUTING if (value := getattr(config, name))}
        make = constructor(config.model)
        with torch.device("meta"):
            teacher, student, critic = make(align_dims=()), make(**arguments, align_dims=()), make(align_dims=())
            for network, rank in ((student, config.student_rank), (critic, config.critic_rank)):
                if rank:
                    add_lora(network, rank, JOINS)
        line, numbers = sizes(config, student, critic, teacher)
        return line + held(*numbers, processes=8)

    # ---- networks ----

    def copy_of_teacher(self, arguments, rank, added):
        """A network with the teacher's weights, in eval mode: labels are never dropped here.

        rank: of its LoRA, or None. With one, the weights under it are frozen, and the teacher's own rather than copies.
        added: how the names begin of what is trained beside the LoRA.
        """
        torch.manual_seed(derive_seed(self.config.seed, Use.WEIGHTS))
        kept = {"route_backend": self.config.route_backend}
        kept["checkpoint_activations"] = self.config.checkpoint_activations
        try:
            model = constructor(self.config.model)(**arguments, **kept)
            weights = self.teacher.state_dict().items()  # projectors here are of a GAN
            weights = {name: value for name, value in weights if not name.startswith("projectors.")}
            load_into(model, weights)
        except ValueError as error:
            raise ValueError(
                f"routing = {self.config.routing!r}: {self.config.teacher} has routing = {self.teacher.routing!r}, and "
                f"does not fit such a student: {error}"
            ) from None
        model.gamma = self.teacher.gamma
        if rank:
            shared = {name: value for name, value in weights.items() if not name.startswith(added)}
            model.load_state_dict(shared, strict=False, assign=True)
            add_lora(model, rank, added)
        return model.eval() if self.config.shard else model.eval().to(self.device)

    def make_critic(self):
        """The critic, whose projector is the GAN's head."""
        config, arguments = self.config, self.teacher_arguments
        if config.gan_weight:
            middle, width = len(self.teacher.blocks) // 2, self.teacher.hidden_size
            arguments = arguments | {"align_depth": (max(1, middle),), "align_dims": (1,), "projector_dim": width}
        return self.copy_of_teacher(arguments, config.critic_rank, ("projectors.",))

    def check_teacher(self, trained):
        """Raises ValueError where the teacher cannot teach, or not on these data."""
        config, teacher, data = self.config, self.teacher, self.inputs.data
        size, wanted = (teacher.in_channels, *2 * (teacher.input_size,)), self.inputs.shape
        for fine, problem in (
            (trained.get("path", "linear") == "linear", "was trained on the cosine path, and only linear is supported"),
            (not trained.get("step_times"), "is a distilled model; give the one that it was distilled from"),
            (
                config.cfg_scale == 1 or trained.get("class_dropout_prob", 1) > 0,
                f"was trained without a null class, which cfg_scale = {config.cfg_scale} needs; give 1",
            ),
            (
                not self.inputs.text or self.teacher_arguments["text_width"] == data.null_text.shape[1] - 1,
                f"takes other captions than those of {config.data}; prepare them with the text encoder of the teacher",
            ),
            (
                self.inputs.text or teacher.num_classes == data.num_classes,
                f"has {self.teacher_arguments.get('num_classes')} classes and {config.data} has {data.num_classes}; "
                "give the --data of the teacher",
            ),
            (size == wanted, f"takes {size} and {config.data} by {config.autoencoder} gives {wanted}"),
        ):
            if not fine:
                raise ValueError(f"teacher = {config.teacher!r}: {problem}")

    def flops_of_step(self):
        """Of the matrix products of one step, for an image, with as many student steps as are made on average."""
        config = self.config
        student = flops_per_image(config.model, self.arguments)
        teacher = flops_per_image(config.model, self.teacher_arguments)
        sample, guided = student * (config.student_steps + 1) / 2, 2 if config.cfg_scale != 1 else 1
        # Frozen weights need no gradients.
        back, student_back = (1 if rank else 2 for rank in (config.critic_rank, config.student_rank))
        gan = (1 + back / 2) * teacher * (config.gan_weight > 0)  # backwards from the middle alone
        critic = sample + (1 + back) * teacher + 2 * gan
        return sample + student_back * student + (1 + guided) * teacher + gan + config.critic_steps * critic

    # ---- steps ----

    def open_folder(self):
        super().open_folder(step_times=list(self.times), **{"content of teacher": self.content})

    def train(self):
        if self.config.compile:
            self.critic.compile()
            self.teacher.compile()
        return super().train()

    def batches(self):
        return range(self.progress["step"], self.config.max_steps)

    def train_step(self, step):
        """critic_steps updates of the critic, then one of the student, on fresh samples each."""
        self.fade_in()
        config, critic_values = self.config, []
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number in range(config.critic_steps):
            draws = self.draw(step, number)
            values, taken = self.learn("critic", self.critic_losses, draws, self.critic_optimizer, self.critic_weights)
            critic_values.append(values)
            finite = finite & taken
        draws = self.draw(step, config.critic_steps)
        values, taken = self.learn("model", self.student_losses, draws, self.optimizer, self.ema.weights)
        self.critic_optimizer.zero_grad()  # a GAN's gradient has passed through the critic
        self.ema.update()
        # Each a loss and the norm of its gradient.
        values = torch.stack([values, torch.stack(critic_values).mean(0)], dim=1)
        self.tally.add(values.flatten(), finite & taken)

    def learn(self, name, losses_of, draws, optimizer, weights):
        """One update of a network. Returns its loss and the norm of its gradients (2), and whether it was taken."""
        loss = self.gradients(self.wrapped[name], lambda rows: losses_of(draws[rows]))
        grad_norm, taken = self.update(optimizer, weights, loss)
        return torch.cat([loss, grad_norm.view(1)]), taken

    def draw(self, step, number):
        """This process's share of the random numbers of an update, which follow from the seed for the global batch."""
        seed = derive_seed(self.config.seed, Use.STEP, step, number)
        shape = (self.config.batch_size, *self.inputs.shape)
        labels = self.captions if self.inputs.text else self.labels.__getitem__
        return draw_samples(labels, len(self.labels), shape, len(self.times), seed, self.device)[self.mine]

    def captions(self, images):
        """Those of training images (B), as the networks take them."""
        return self.inputs.data.conditions(images.cpu()).to(self.device)

    def critic_losses(self, draws):
        with self.autocast():
            with torch.no_grad():
                x = training_sample(self.model, self.model, self.times, draws)
            real = self.real_images(draws) if self.config.gan_weight else None
            return [critic_loss(self.wrapped["critic"], x, draws, real, self.config.gan_weight)]

    def student_losses(self, draws):
        with self.autocast():
            x = training_sample(self.model, self.wrapped["model"], self.times, draws)
            return [student_loss(self.teacher, self.critic, x, draws, self.config.cfg_scale, self.config.gan_weight)]

    def real_images(self, draws):
        """The training images whose labels the samples have, (B, C, H, W)."""
        batch = self.inputs.plain_data.__getitems__(draws.images.cpu())
        batch = {name: value.to(self.device) for name, value in batch.items()}
        return self.inputs.clean(batch, draws.noises[0])  # of another image, so as good as any for the posterior

    # ---- records ----

    def describe(self):
        """Print what the run is and what it takes."""
        config = self.config
        line, numbers = sizes(config, self.model, self.critic, self.teacher)
        taught = self.teacher_arguments.get("routing", "residual")
        routing = config.routing + f", fading in for {config.retrofit_steps} steps" * bool(config.retrofit_steps)
        guided = "" if config.cfg_scale == 1 else f", guided by {config.cfg_scale:g}"
        self.say(
            f"run        {config.out}, {config.max_steps} steps, each of {config.critic_steps} critic updates and one "
            f"student update\n"
            f"teacher    {config.teacher}, {config.model}, routing {taught}{guided}\n"
            f"student    routing {routing}; steps from t = {', '.join(f'{t:.3g}' for t in self.times)}\n"
            f"data       {'captions' if self.inputs.text else 'labels'} of {len(self.labels)} images in {config.data}"
            f"{', and these for the GAN' * (config.gan_weight > 0)}; {config.autoencoder}, "
            f"{' x '.join(map(str, self.inputs.shape))}\n"
            f"{line}compute    {self.flops / 1e9:.4g} GFLOP of matrix products for an image in a step\n"
            + self.resources(*numbers)
        )


def sizes(config, student, critic, teacher) -> tuple:
    """A line on the networks' parameters, and the numbers `kept`, `more` and `shared` that `held` takes."""
    student, critic, averages = trainable(student), trainable(critic), len(config.ema_decays)
    teacher = sum(weight.numel() for weight in teacher.parameters())  # it has no gradients
    line = f"parameters {student / 1e6:.2f} M student, {critic / 1e6:.2f} M critic, {teacher / 1e6:.2f} M teacher\n"
    kept = 3 * (student + critic) + averages * student  # weights and two moments
    # LoRAs and their averages have the teacher's frozen weights in common: one copy, but shards of their own.
    sharing = (1 + averages) * bool(config.student_rank) + bool(config.critic_rank)
    return line, (kept, student + critic + teacher, sharing * teacher)


def add_lora(network, rank, added):
    """Puts LoRA on the linear layers of a network's blocks, and freezes all else but names that start as in `added`.

    Afterwards its state_dict holds only what is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    inside = {id(part) for part in network.blocks.modules() if isinstance(part, torch.nn.Linear)}
    linear = [name for name, part in network.named_modules() if id(part) in inside and part.weight.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), network)
    for name, weight in network.named_parameters():
        weight.requires_grad_(weight.requires_grad or name.startswith(added))
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}

    def leave_out(module, state, prefix, metadata):
        for name in frozen:
            del state[prefix + name]

    def not_missed(module, keys):
        keys.missing_keys[:] = set(keys.missing_keys) - frozen

    network.register_state_dict_post_hook(leave_out)
    network.register_load_state_dict_post_hook(not_missed)


def resolved(config, trained, arguments):
    """The options with what the teacher says in place of what is empty. Raises ValueError where it does not say it."""
    said = {name: getattr(config, name) or trained.get(name, "") for name in ("model", "autoencoder", "data")}
    for name, value in said.items():
        if not value:
            raise ValueError(f"{name} = '': {config.teacher} is not of this trainer and does not say it; give --{name}")
    routing = {name: arguments.get(name, getattr(configuration.Config, name)) for name in ROUTING}
    return replace(config, **said, **routing)


if __name__ == "__main__":
    main()
