"""CAN: A Simple, Efficient and Scalable Contrastive Masked Autoencoder Framework (Mishra et al., arXiv 2210.16870).

Three tasks share one symmetric step, without momentum encoder or multi-crop. Two views of an image get Gaussian noise,
lose half of their patches and go through encoder and decoder:
  C  contrast     the mean-pooled visible patches of both views are drawn together, against the batch (InfoNCE, 3.2)
  A  autoencoder  the decoder reconstructs the removed patches (3.3)
  N  noise        on the kept patches, where MAE throws the decoder's output away, it predicts the noise (3.4)
The paper's baselines are the same step with other settings: SimCLR has the first task alone, MAE the second.

    python can.py                                                  # CAN, SimCLR and MAE on built-in data, in minutes
    torchrun --nproc_per_node 8 can.py --data /path/to/imagenet --model vit_l16
    torchrun --nproc_per_node 8 can.py --data /path/to/imagenet --model vit_l16 --methods simclr
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 \
        can.py --data /path/to/uncurated --model vit_l16 --epoch_images 1281167

Easy to get wrong:
  - Negatives exclude both views of the sample itself: 2n - 2 of them over all ranks, gathered with gradient (3.2).
  - The two views of an image have masks, noise and noise levels of their own; exactly T/2 patches stay (3.1).
  - L_rec counts removed patches, its target is the clean view; L_denoise counts kept ones, its target is sigma e.
  - The norms of 3.3 and 3.4 are means over pixels (Table 4's magnitudes), of standardised, not patch-normalised, ones.
  - The level embedding is added at the encoder's width, before the decoder, to mask tokens too (3.4).
  - Features are means of patch tokens, without [CLS]; BatchNorm momentum 0.9 is JAX's, PyTorch's 0.1.
  - Loss weights sum to 1, so a weight set to 0 goes to the other losses (3.5).
"""

import copy
import math
import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import (
    Colour, InputError, MAEDecoder, Run, RunSettings, View, adamw, augment, backward, build_vit, check_batch,
    check_masking, draw, init_encoder, init_weights, launch, load_splits, mlp_head, normalize, normalize_patches,
    nt_xent, parameter_groups, parse_settings, patchify, promote, random_masking, rank, save_encoder, start, to_bytes,
    uniform, unpatchify, warmup_cosine,
)  # fmt: skip
from eval import center_views, evaluate


@dataclass
class Settings(RunSettings):
    """Defaults are CAN's with ViT-L/16 on ImageNet; `presets` holds what differs."""

    model: str = "vit_l16"
    methods: str = "can"  # can, simclr, mae, or several of them, one after the other

    # what distinguishes the methods (METHODS) and their ablations
    lambda_infonce: float = 0.03  # Section 5, Figure 7 left
    lam: float = 0.7  # lambda of 3.5; not printed (Figure 7 right is flat): chosen, the ratio of the authors' code
    mask_ratio: float = 0.5  # 3.1
    sigma_max: float = 0.05  # Section 5, Figure 7 middle; in units of standardised pixels
    level_embedding: bool = True  # 3.4; Table 1's "+noise, +loss" is without
    views: int = 2  # 3.1
    strength: float = 1.0  # of SimCLR's colours, Table 6; 0: crop and flip alone
    scale_min: float = 0.08  # of the random crops' area (Chen et al. 2020)

    # losses
    temperature: float = 0.1  # 3.2
    norm_pix: bool = False  # reconstruct patches normalised one by one; Table 4's L_rec of 0.17 is not of such
    noisy_target: bool = False  # reconstruct the noisy view, as the authors' code
    projector_hidden: int = 4096  # Appendix C, projection head architecture
    projector_dim: int = 128  # the same
    decoder_dim: int = 512  # Appendix C, decoder architecture
    decoder_depth: int = 8
    decoder_heads: int = 16

    # optimisation: Table 6
    epochs: float = 800  # Table 3
    epoch_images: int = 0  # images an epoch is counted in; 0: those of the data. 4.1, JFT-300M: 1281167
    batch: int = 4096
    lr: float = 1.25e-4  # at batch 256; the views do not count
    weight_decay: float = 0.1
    warmup_epochs: float = 40


# Table 6 (ImageNet), Table 7 (JFT-300M): CAN and SimCLR
TABLE_6 = {"b": dict(lr=2.5e-4, weight_decay=0.05, epochs=1600), "l": dict(lr=1.25e-4, weight_decay=0.1)}
TABLE_7 = {"b": dict(lr=2.5e-4, weight_decay=0.05, epochs=800), "l": dict(lr=3.125e-5, weight_decay=0.05, epochs=5000)}
# Tables 8 and 9: MAE. Of the augmentation they list, the text's "as He et al." keeps crop and flip
TABLE_8, TABLE_9 = dict(lr=1.5e-4, weight_decay=0.05), dict(lr=3.75e-5, weight_decay=0.05)
METHODS = {
    "can": dict(),
    "simclr": dict(lambda_infonce=1.0, mask_ratio=0.0, sigma_max=0.0),  # full views, no noise, no decoder
    "mae": dict(lambda_infonce=0.0, lam=1.0, mask_ratio=0.75, sigma_max=0.0, views=1, strength=0.0, scale_min=0.2),
}
# The built-in run: small enough for two CPU cores, the same recipe for all methods. In so few steps the paper's
# lambda_InfoNCE teaches no contrast, and hue is half of these classes' identity: more of it and weaker colours
SHAPES = dict(
    model="vit_nano8", image_size=48, decoder_dim=64, decoder_depth=2, decoder_heads=4, projector_hidden=512,
    epochs=6, batch=64, lr=2e-3, weight_decay=0.05, warmup_epochs=1, lambda_infonce=0.3, strength=0.4,
)  # fmt: skip


def row_of(method, data):
    """What a method changes; in the built-in run all of them see as many views."""
    return METHODS.get(method, {}) | (dict(views=2) if data == "shapes" else {})


def presets(given):
    """Field values for the flags given: Tables 6-9, the method, the built-in run."""
    size = re.match(r"vit_(2b|\D+)|", given.get("model", "vit_l16"))[1]
    uncurated = given.get("epoch_images", 0) > 0  # JFT-300M and its like
    row = dict((TABLE_7 if uncurated else TABLE_6).get(size, {}))
    if given.get("methods") == "mae":
        row |= TABLE_9 if uncurated else TABLE_8
    if (data := given.get("data", "shapes")) == "shapes":
        row |= SHAPES | dict(methods="can,simclr,mae")
        if given.get("short"):
            row |= dict(epochs=2, warmup_epochs=0.5)
    return row | row_of(given.get("methods"), data)


# ---------------------------------------------------------------------------------------------------------- model


def loss_weights(s):
    """3.5: lambda_InfoNCE, lambda_rec, lambda_denoise, which sum to 1."""
    rest = 1 - s.lambda_infonce
    return s.lambda_infonce, rest * s.lam, rest * (1 - s.lam)


class LevelEmbedding(nn.Module):
    """3.4: sinusoidal embedding of the noise level, then a 2-layer MLP with ReLU of constant width d: [N] → p [N, d].

    sigma_max is 1000 in the sinusoids' unit (chosen, as diffusion's time steps): unscaled, all levels would look alike.
    """

    def __init__(self, dim, sigma_max):
        super().__init__()
        self.dim, self.unit = dim, sigma_max / 1000
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.mlp.apply(init_weights)

    def forward(self, sigma):
        omega = 10000 ** -torch.arange(0, 1, 2 / self.dim, device=sigma.device, dtype=sigma.dtype)  # [d/2]
        angles = sigma[:, None] / self.unit * omega
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


def patch_loss(chosen, target, x_hat):
    """3.3 and 3.4: squared error [N], mean over pixels, then over the patches chosen [N, T] (0 or 1).

    target, x_hat [N, T, p·p·3]. Every sample has as many, so the mean over samples is the loss of the batch.
    """
    error = (promote(x_hat) - target).square().mean(-1)  # [N, T]
    return (error * chosen).sum(1) / chosen.sum(1).clamp(min=1)


class CAN(nn.Module):
    """Encoder f, decoder, level embedding, projector (Figure 2); what only losses of weight 0 would need is None."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.lambda_infonce, self.lambda_rec, self.lambda_denoise = loss_weights(s)
        self.f = build_vit(s.model, s.image_size, pool="mean")
        self.f.checkpoint_blocks = s.checkpoint_blocks
        d, decodes = self.f.dim, self.lambda_infonce < 1
        sizes = self.f.grid, self.f.patch_size, d, s.decoder_dim, s.decoder_depth, s.decoder_heads
        self.decoder = MAEDecoder(*sizes) if decodes else None
        self.level = LevelEmbedding(d, s.sigma_max) if decodes and s.level_embedding and s.sigma_max else None
        widths = d, s.projector_hidden, s.projector_hidden, s.projector_dim
        self.projector = mlp_head(*widths, last_norm=False) if self.lambda_infonce else None

    def decode(self, z, ids_restore, sigma):
        """z [N, 1 + T', d] and sigma [N] → x_hat [N, T, p·p·3]; 3.4: z_t ← z_t + p for t = 1 … T."""
        return self.decoder(z, ids_restore, self.level(sigma) if self.level else None)

    def encode(self, x, noise, sigma, e):
        """What a sample contributes to the losses by itself.

        x [N, V, 3, S, S] views, noise [N, V, T] uniform (the masks), sigma [N, V], e like x.

        Returns:
            y [N, V, d] pooled patches, L_rec [N] and L_denoise [N], means over the views.
        """
        v = x.shape[1]
        x, noise, sigma, e = (t.flatten(0, 1) for t in (x, noise, sigma, e))  # all views as one batch (3.1)
        e = sigma[:, None, None, None] * e
        ids_keep, ids_restore, M = random_masking(noise, self.s.mask_ratio)  # M [N·V, T], 1 = removed
        z = self.f(x + e, ids_keep)  # [N·V, 1 + T', d]
        y = self.f.pooled(z).unflatten(0, (-1, v))
        if not self.decoder:
            return y, *y.new_zeros(2, len(y))
        x_hat = self.decode(z, ids_restore, sigma)  # [N·V, T, p·p·3]
        target = patchify(x + e if self.s.noisy_target else x, self.f.patch_size)
        rec = patch_loss(M, normalize_patches(target) if self.s.norm_pix else target, x_hat)  # 3.3
        denoise = patch_loss(1 - M, patchify(e, self.f.patch_size), x_hat)  # 3.4
        return y, rec.view(-1, v).mean(1), denoise.view(-1, v).mean(1)

    def objective(self, y, rec, denoise):
        """3.5: L_CAN of the whole batch (its part on this rank), and a dict of the losses that have a weight."""
        infonce = 0 * y.mean()
        if self.projector:
            u = normalize(self.projector(y.flatten(0, 1))).unflatten(0, (-1, 2))  # BatchNorm over both views together
            infonce = nt_xent(u[:, 0], u[:, 1], self.s.temperature)  # 3.2
        losses = dict(infonce=infonce, rec=rec.mean(), denoise=denoise.mean())
        weights = self.lambda_infonce, self.lambda_rec, self.lambda_denoise
        total = sum(w * loss for w, loss in zip(weights, losses.values()))
        return total, {name: loss.detach() for (name, loss), w in zip(losses.items(), weights) if w}


def gaussian(key, rows, *shape, device):
    """Keyed numbers of N(0, 1), [len(rows), *shape] (Box and Muller 1958): r cos and r sin of r² = −2 log(1 − u)."""
    size = math.prod(shape)
    u, turn = uniform(key, rows, 2, (size + 1) // 2, device=device).unbind(1)
    r, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * turn
    return torch.cat([r * angle.cos(), r * angle.sin()], 1)[:, :size].unflatten(1, shape)


def simclr_colours(strength):
    """Chen et al. 2020, Table 6: jitter (0.8, 0.8, 0.8, 0.2) · strength, grayscale, blur; None at strength 0."""
    jitter = tuple(strength * j for j in (0.8, 0.8, 0.8, 0.2))
    return Colour(jitter=jitter, p_jitter=0.8, p_gray=0.2, p_blur=0.5) if strength else None


# ----------------------------------------------------------------------------------------------------------- loop


def pretrain(run, stage, model, images, s):
    """The one loop: CAN, SimCLR and MAE by `s`."""
    optimizer = adamw(parameter_groups(model, s.lr * s.batch / 256, s.weight_decay), zero=s.zero)
    colours, views = simclr_colours(s.strength), [View(s.image_size, (s.scale_min, 1.0))] * s.views
    per_epoch = (s.epoch_images or len(images)) // s.batch  # steps
    epochs = s.epochs * per_epoch / (len(images) // s.batch)

    for data in run.steps(stage, images, views, s.batch, epochs, dict(model=model, optimizer=optimizer)):
        key = (s.seed, stage, run.step)
        colour = uniform((*key, "colour"), data.rows, s.views, 13, device="cpu")
        x = torch.stack([augment(v, colours, n) for v, n in zip(data.views, colour.unbind(1))], 1)  # [N, V, 3, S, S]
        noise = uniform((*key, "mask"), data.rows, s.views, math.prod(model.f.grid), device=run.device)  # [N, V, T]
        sigma = s.sigma_max * uniform((*key, "sigma"), data.rows, s.views, device=run.device).to(x)  # [N, V], U[0, max]

        def encode(x, noise, sigma, rows):
            e = torch.zeros_like(x)
            if s.sigma_max:  # drawn here: a large batch's noise never stands in memory at once
                e = gaussian((*key, "noise"), rows, *x.shape[1:], device=x.device).to(x)
            return model.encode(x, noise, sigma, e), None

        loss, log = backward(encode, model.objective, (x, noise, sigma, data.rows), s.micro_batch, run.precision)
        run.optimize(optimizer, loss, log, warmup_cosine(run.step, run.total, s.warmup_epochs * per_epoch))


def multiply_adds(model):
    """Multiply-adds per image of a step, forward and backward, counted in a step of two images."""
    s, n = model.s, 2
    model = copy.deepcopy(model)  # its gradients and BatchNorm statistics are thrown away
    x = torch.zeros(n, s.views, 3, s.image_size, s.image_size, device=model.f.cls_token.device)
    noise, sigma = x.new_zeros(n, s.views, math.prod(model.f.grid)), x.new_zeros(n, s.views)
    with FlopCounterMode(display=False) as counter:
        model.objective(*model.encode(x, noise, sigma, x))[0].backward()
    return counter.get_total_flops() / 2 / n  # the counter gives FLOPs


# ----------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def picture(path, model, images, device):
    """Eight images, what the encoder sees of them, the reconstruction, and true and predicted noise of kept patches."""
    s, p = model.s, model.f.patch_size
    picks = torch.arange(min(8, len(images)))
    x = augment(next(center_views(images, s.image_size, device, 0, picks))[0])  # [N, 3, S, S]
    key, rows = (s.seed, "picture"), picks.to(device)
    ids_keep, ids_restore, M = random_masking(uniform((*key, "mask"), rows, math.prod(model.f.grid)), s.mask_ratio)
    sigma = torch.full((len(x),), s.sigma_max, device=device)
    e = s.sigma_max * gaussian((*key, "noise"), rows, *x.shape[1:], device=device)
    x_hat, M = promote(model.decode(model.f(x + e, ids_keep), ids_restore, sigma)), M[..., None]
    target, seen, noise = (patchify(t, p) for t in (x, x + e, e))
    var, mean = torch.var_mean(target, -1, keepdim=True)
    restored = x_hat * (var + 1e-6).sqrt() + mean if s.norm_pix else x_hat
    rows = {"input": target, f"{s.mask_ratio:.0%} removed, noise {s.sigma_max:g}": seen * (1 - M),
            "reconstruction (kept: input)": target * (1 - M) + restored * M}  # fmt: skip
    if model.lambda_denoise and s.sigma_max:
        gain = (1 - M) / s.sigma_max / 2
        rows |= {"true noise": noise * gain, "predicted noise": x_hat * gain}
    draw(path, [(caption, to_bytes(unpatchify(t, p, *x.shape[-2:])), None) for caption, t in rows.items()])


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, device, train, val (None without labels), {method: (its settings, its model on the CPU)}.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    methods = s.methods.split(",")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise InputError(f"--methods {s.methods}: choose can, simclr, mae, or several of them joined by commas")
    usual = vars(Settings()) | (SHAPES if s.data == "shapes" else {})
    own = {name for row in METHODS.values() for name in row if getattr(s, name) != usual[name]}
    if len(methods) > 1 and own:
        raise InputError(f"--{min(own)} belongs to one method: name it instead of --methods {s.methods}")
    device, parts = start(), {}
    for method in methods:
        mine = replace(s, **row_of(method, s.data)) if len(methods) > 1 else s
        weights = loss_weights(mine)
        if mine.views not in (1, 2) or weights[0] and mine.views == 1:
            raise InputError(f"--views {mine.views}: choose 2, or 1 for mae: contrast is between two")
        if not weights[0] and not (weights[1] and mine.mask_ratio) and not (weights[2] and mine.sigma_max):
            given = f"--lambda_infonce {mine.lambda_infonce:g} --lam {mine.lam:g} --mask_ratio {mine.mask_ratio:g}"
            raise InputError(f"{given} --sigma_max {mine.sigma_max:g}: no loss is left to learn from")
        torch.manual_seed(s.seed)
        model = CAN(mine)
        check_masking(model.f.grid, mine.mask_ratio)
        if s.init:
            init_encoder(model.f, s.init)
        parts[method] = mine, model
    train, val = load_splits(s.data, val=not s.cost)
    if s.epoch_images and s.epoch_images < s.batch:
        raise InputError(f"--epoch_images {s.epoch_images} is less than the batch of {s.batch}")
    check_batch(s, train, s.batch, s.epochs * (s.epoch_images or len(train)) / len(train))
    return s, device, train, val, parts


def main(argv):
    """The methods of `--methods` one after the other; the closing table where the data has labels."""
    s, device, train, val, parts = prepare(argv)
    run = Run(s, device)
    for method in list(parts):
        mine, model = parts.pop(method)  # freed after its stage
        if method in run.finished:  # before the run was resumed: files and row are there
            continue
        pretrain(run, method, model.to(device), train, mine)
        if s.cost:
            continue
        if rank() == 0:
            for name in [method] + ["encoder"] * s.methods.startswith(method):
                save_encoder(run.folder / f"{name}.pt", model.f)
            if model.decoder:
                picture(run.folder / f"{method}.png", model, val or train, device)
        if val and method not in run.results:
            run.report(method, evaluate(model.f, train, val, run) | {"madds/M": multiply_adds(model) / 1e6})
    run.close()


if __name__ == "__main__":
    launch(main)
