"""Distils a trained model into one of 1, 2 or 4 steps, by distribution matching (DMD2, arXiv 2405.14867).

    python distill.py --teacher runs/digits/residual-none-seed0/last.pt --student-steps 4 --out runs/distilled
    torchrun --nproc_per_node=8 distill.py --teacher SiT-XL-2-256x256.pt --model SiT-XL/2 \\
        --autoencoder sd-vae-ft-ema --data data/imagenet256 --batch-size 512 --lr 2e-5 --critic-lr 2e-5 --out runs/xl-4

A step updates the critic `critic_steps` times, then the student once. Only a GAN and the evaluation read images. The
same command again resumes the run, bit for bit on a CPU. The folder is that of a training run, and `eval.sample` draws
from its last.pt. The student may have another routing than its teacher: --routing dar --retrofit-steps 1000.
"""

import json
from dataclasses import replace

import torch

import config as configuration
from checkpoint import EMA, load_published, load_trained, released_arguments
from dataset.inputs import Inputs
from distribution_matching import critic_loss, draw_samples, step_times, student_loss, training_sample
from eval.online import OnlineEvaluation
from models.cost import flops_per_image, parameters_by_part
from models.sit import SIT_MODELS
from runtime import Tally, Use, derive_seed, fingerprint
from training import Run, launch

ROUTING = ("routing", "query", "chunk_size", "chunk_summary")  # arguments of SiT in which a student may differ


def main(argv=None):
    launch(Distiller, configuration.parse_distillation(argv))


class Distiller(Run):
    """One run: teacher, critic and student (`model`), and what trains them."""

    def __init__(self, config, ranks):
        with ranks.one_first():  # the hub may be asked
            self.teacher, trained = load_trained(config.teacher, name=config.model, route_backend=config.route_backend)
        known = trained.get("arguments") or released_arguments(self.teacher.state_dict(), config.model)
        self.teacher_arguments = without_projectors(known)
        chosen = {name: value for name in ROUTING if (value := getattr(config, name))}
        self.arguments = self.teacher_arguments | chosen
        config = resolved(config, trained, self.arguments)
        super().__init__(config, ranks)
        # What inputs and evaluation need to know, in the words of the trainer.
        same = {name: value for name, value in vars(config).items() if name in configuration.FIELDS}
        seen = {"encoder": tuple(trained.get("encoder", configuration.Config.encoder))}  # none of them may judge
        self.inputs = Inputs(configuration.Config(**same, **seen, decoder=trained.get("decoder", "")), ranks)
        self.check_teacher(trained)

        self.teacher.align_depth, self.times = (), step_times(config.student_steps, config.time_shift)
        self.labels = self.inputs.data.labels.to(self.device)
        self.model = self.copy_of_teacher(self.arguments)
        self.model.step_times = self.times
        self.ema = EMA(self.model, config.ema_decays)
        self.place(self.model, *self.ema.models.values())
        self.content = fingerprint(self.teacher, json.dumps(self.teacher_arguments, sort_keys=True))
        self.teacher_size = sum(weight.numel() for weight in self.teacher.parameters())
        self.critic, self.critic_weights = self.make_critic()
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

    # ---- networks ----

    def copy_of_teacher(self, arguments):
        """A network with the teacher's weights, in eval mode: labels are never dropped here."""
        torch.manual_seed(derive_seed(self.config.seed, Use.WEIGHTS))
        kept = {"route_backend": self.config.route_backend}
        kept["checkpoint_activations"] = self.config.checkpoint_activations
        try:
            model = SIT_MODELS[self.config.model](**arguments, **kept)
            weights = self.teacher.state_dict().items()  # projectors here are of a GAN
            load_published(model, {name: value for name, value in weights if not name.startswith("projectors.")})
        except ValueError as error:
            raise ValueError(
                f"routing = {self.config.routing!r}: {self.config.teacher} has routing = {self.teacher.routing!r}, and "
                f"does not fit such a student: {error}"
            ) from None
        model.gamma = self.teacher.gamma
        return model.eval()

    def make_critic(self):
        """The critic, whose projector is the GAN's head, and what it trains of it. Moves the teacher to the device."""
        config, arguments = self.config, self.teacher_arguments
        if config.gan_weight:
            middle, width = len(self.teacher.blocks) // 2, self.teacher.pos_embed.shape[-1]
            arguments = arguments | {"align_depth": max(1, middle), "align_dims": (1,), "projector_dim": width}
        critic = self.copy_of_teacher(arguments)
        if config.critic_rank:
            from peft import LoraConfig, get_peft_model  # takes seconds

            adapted = [name for name, part in critic.blocks.named_modules() if isinstance(part, torch.nn.Linear)]
            adapted = [f"blocks.{name}" for name in adapted]
            lora = LoraConfig(r=config.critic_rank, lora_alpha=config.critic_rank, target_modules=adapted)
            critic = get_peft_model(critic, lora)
            critic.projectors.requires_grad_(True)
            self.teacher = WithoutLora(critic)
        else:
            self.place(self.teacher)
        self.place(critic)
        return critic, torch.nn.ParameterList(weight for weight in critic.parameters() if weight.requires_grad)

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
                teacher.num_classes == data.num_classes,
                f"has {teacher.num_classes} classes and {config.data} has {data.num_classes}; give the --data of the "
                "teacher",
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
        back = 1 if config.critic_rank else 2  # frozen weights need no gradients
        gan = (1 + back / 2) * teacher * (config.gan_weight > 0)  # backwards from the middle alone
        critic = sample + (1 + back) * teacher + 2 * gan
        return sample + 2 * student + (1 + guided) * teacher + gan + config.critic_steps * critic

    # ---- steps ----

    def open_folder(self):
        super().open_folder(step_times=list(self.times), **{"content of teacher": self.content})

    def train(self):
        if self.config.compile:
            self.critic.compile()
            if not self.config.critic_rank:
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
        return draw_samples(self.labels, shape, len(self.times), seed)[self.mine]

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
        student, critic = (sum(parameters_by_part(network).values()) for network in (self.model, self.critic_weights))
        teacher = self.teacher_size  # it has no gradients
        kept, averages = 3 * (student + critic), len(config.ema_decays) * student  # weights and two moments
        taught = self.teacher_arguments.get("routing", "residual")
        routing = config.routing + f", fading in for {config.retrofit_steps} steps" * bool(config.retrofit_steps)
        guided = "" if config.cfg_scale == 1 else f", guided by {config.cfg_scale:g}"
        self.say(
            f"run        {config.out}, {config.max_steps} steps, each of {config.critic_steps} critic updates and one "
            f"student update\n"
            f"teacher    {config.teacher}, {config.model}, routing {taught}{guided}\n"
            f"student    routing {routing}; steps from t = {', '.join(f'{t:.3g}' for t in self.times)}\n"
            f"data       labels of {len(self.labels)} images in {config.data}"
            f"{', and these for the GAN' * (config.gan_weight > 0)}; {config.autoencoder}, "
            f"{' x '.join(map(str, self.inputs.shape))}\n"
            f"parameters {student / 1e6:.2f} M student, {critic / 1e6:.2f} M critic, {teacher / 1e6:.2f} M teacher\n"
            f"compute    {self.flops / 1e9:.4g} GFLOP of matrix products for an image in a step\n"
            + self.resources(kept + averages, student + critic + teacher)
        )


class WithoutLora:
    """A network without what peft has put into it: called as it was before."""

    def __init__(self, adapted):
        self.adapted, self.num_classes = adapted, adapted.num_classes

    def __call__(self, *inputs):
        with self.adapted.disable_adapter():
            return self.adapted(*inputs)


def without_projectors(arguments):
    """The arguments of the same SiT, of which nothing is aligned any more."""
    final = arguments.get("final_aggregator", "auto")
    if final == "auto" and arguments.get("routing") == "dar":  # what it was, whatever projectors come and go
        final = "shared" if arguments["align_dims"] else "dedicated"
    return arguments | {"final_aggregator": final, "align_dims": ()}


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
