"""CMAE: Contrastive Masked Autoencoders are Stronger Vision Learners (Huang et al., arXiv 2207.13532).

A masked autoencoder learns relations within an image, contrastive learning what sets images apart. CMAE does both at
once. An online encoder sees a quarter of the patches; a pixel decoder reconstructs the rest, and a second, feature
decoder completes the features, whose mean is drawn to the mean feature that a momentum encoder finds in the whole
image (Eq. 1-8). Both views are cut from one master crop, shifted by a few pixels ("pixel shifting"): after masking, two
random crops would have too little in common. Colours change for the momentum encoder alone. The online encoder is kept.

    python cmae.py                                                      # MAE and CMAE on built-in data, in minutes
    python cmae.py --data /path/to/imagenet --model vit_b16             # one GPU
    torchrun --nproc_per_node 8 cmae.py --data /path/to/imagenet --model vit_b16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 cmae.py --data ...

Easy to get wrong:
  - The shift r lies in [0, p): with p = 32 it is at most 31, and the master crop is 32 pixels larger than a view (3.2).
  - Colours touch the target view alone, never what is reconstructed; the flip is the master crop's, so of both views.
  - The target feature is the mean of the last block's patch tokens: no [CLS], no final norm (authors' code).
  - The feature decoder ends in the encoder's width, whatever the patch size, and its mean runs over all tokens (Eq. 4),
    visible ones included.
  - Predictor online only. No gradient enters the target side, whose projector is an EMA too; there BatchNorm
    normalises by the batch at hand like online, so its running statistics are never used.
  - Rows of the logits are predictions of this rank, columns the keys of all ranks, in one direction only (Eq. 7).
  - lr = base * batch / 256 (4.1): two views do not double it. Shift, masks and colours are drawn for each sample.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from common import (
    Colour, InputError, MAEDecoder, Run, RunSettings, View, adamw, augment, backward, batches, build_vit,
    check_batch, check_masking, draw, ema_update, frozen_copy, info_nce, init_encoder, launch, load_splits, mae_loss,
    mlp_head, normalize, parameter_groups, parse_settings, random_masking, rank, reconstruct, save_encoder, start,
    to_bytes, uniform, warmup_cosine, world,
)  # fmt: skip
from eval import FineTuning, check_tuning, evaluate, finetune, recipe


@dataclass
class Settings(RunSettings):
    """Defaults are those of 4.1 for every size: ViT-S, ViT-B and ViT-L share one recipe (4.6)."""

    model: str = "vit_b16"  # 4.1; vit_s16 and vit_l16 in 4.6
    methods: str = "cmae"  # "mae" is the same loop without the contrastive part; "mae,cmae" is both, one after the other
    stem: str = "patch"  # "conv": the hybrid convolutional ViT of 4.1, CMAE*
    pool: str = "mean"  # of the finished encoder; Eq. 2 and 4 average the patches

    # optimisation: 4.1
    epochs: float = 1600  # 4.6; 300 in Section 4.4, 800 and 1600 in Table 2
    batch: int = 4096
    lr: float = 1.5e-4  # at batch 256
    warmup_epochs: float = 40
    weight_decay: float = 0.05

    # masked autoencoder: 3.1, 3.3, "following MAE"
    mask_ratio: float = 0.75  # authors' configs: 0.65
    mask_block: int = 1  # patches; authors' configs: 2, that is, blocks of 2 x 2 patches
    norm_pix: bool = True  # 3.3
    decoder_dim: int = 512  # He et al. Table 1b
    decoder_depth: int = 8  # He et al. Table 1a
    decoder_heads: int = 16
    scale_min: float = 0.2  # of the random crops' area; not printed, the authors' code

    # views: 3.2, Table 4b
    shift: int = 32  # p: r_w, r_h in [0, p); Figure 4a varies it, 0 shifts nothing
    random_crops: bool = False  # two crops of their own instead of one master crop
    color: bool = True  # of the target view

    # contrast: 3.1, 3.3, Table 4
    feature_depth: int = 2  # blocks of the feature decoder, Table 4c; 0: the mean of the visible tokens, no decoder
    share_decoder: bool = False  # Table 4c: the feature decoder's blocks are the first ones of the pixel decoder
    target_mask_ratio: float = 0.0  # Table 4e
    loss: str = "infonce"  # Eq. 7, or "byol" (4.4)
    temperature: float = 0.07  # Eq. 7
    lambda_c: float = 1.0  # Eq. 8, Table 4d; the authors' code has 2 * temperature = 0.14 more in L_c: 0.14 is theirs
    ema: float = 0.996  # mu
    head_hidden: int = 1536  # not printed, the authors' code
    head_dim: int = 256

    # fine-tuning of the last block, in the closing table: 4.5, He et al. A.1 and Table 9
    finetune_epochs: float = 100
    finetune_lr: float = 1e-3  # at batch 256
    finetune_batch: int = 1024


# 3.2, "color transfer"; not printed, the authors' code
COLOUR = Colour(jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)

# The built-in run: small enough for two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, methods="mae,cmae", decoder_dim=64, decoder_depth=2, decoder_heads=4,
    epochs=20, batch=128, lr=2e-3, warmup_epochs=2, shift=8, head_hidden=512, head_dim=128, ema=0.99,
    finetune_epochs=4, finetune_lr=1e-2, finetune_batch=128,  # chosen on MAE's encoder alone
)  # fmt: skip


def presets(given):
    """Field values for the flags given: the built-in run."""
    row = dict(SHAPES) if given.get("data", "shapes") == "shapes" else {}
    if row and given.get("short"):
        row |= dict(epochs=4, warmup_epochs=1, finetune_epochs=1)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """Encoder F_s, pixel decoder G_p, feature decoder G_f, projector and predictor (Figure 3)."""

    def __init__(self, s):
        super().__init__()
        self.F_s = build_vit(s.model, s.image_size, s.pool, stem=s.stem)
        grid, p, dim = self.F_s.grid, self.F_s.patch_size, self.F_s.dim
        self.G_p = MAEDecoder(grid, p, dim, s.decoder_dim, s.decoder_depth, s.decoder_heads)
        self.G_f = None
        if s.feature_depth:
            self.G_f = MAEDecoder(grid, p, dim, s.decoder_dim, s.feature_depth, s.decoder_heads, out=dim)
        if s.share_decoder:  # all but the last norm and the output, which have another width
            self.G_f.decoder_embed, self.G_f.mask_token = self.G_p.decoder_embed, self.G_p.mask_token
            self.G_f.decoder_blocks = self.G_p.decoder_blocks[: s.feature_depth]
        self.projector = mlp_head(dim, s.head_hidden, s.head_dim, last_norm=False, eps=1e-6)
        self.predictor = mlp_head(s.head_dim, s.head_hidden, s.head_dim, last_norm=False, eps=1e-6)

    def feature(self, z_s, ids_restore):
        """Eq. 4: y_s [N, D] from the visible tokens z_s [N, 1 + K, D], completed by the feature decoder."""
        return (z_s[:, 1:] if self.G_f is None else self.G_f(z_s, ids_restore)).mean(1)


class Target(nn.Module):
    """Momentum encoder F_t and projector (3.1, 3.3): EMAs of the online ones, without gradient."""

    def __init__(self, online):
        super().__init__()
        self.F_t, self.projector = frozen_copy(online.F_s), frozen_copy(online.projector)

    def feature(self, x_t, ids_keep):
        """Eq. 2: z_t [N, D], the mean of the last block's patch tokens, before the final norm."""
        return self.F_t(x_t, ids_keep, blocks=[self.F_t.depth])[0][:, 1:].mean(1)

    def update(self, online, mu):
        """theta_t ← mu theta_t + (1 − mu) theta_s."""
        ema_update(self.F_t, online.F_s, mu)
        ema_update(self.projector, online.projector, mu)


# ---------------------------------------------------------------------------------------------------------- views


def pixel_shift(master, size, p, noise):
    """3.2: the online view [0 : w, 0 : h] and the target view [r_w : r_w + w, r_h : r_h + h] of a master crop.

    master [N, 3, size + p, size + p]; noise [N, 2] in [0, 1) gives r_h and r_w in [0, p) for each sample.
    """
    at = (noise * p).long()[..., None] + torch.arange(size, device=noise.device)  # [N, 2, size]: rows, columns
    sample = torch.arange(len(master), device=master.device)[:, None, None]
    I_t = master[sample, :, at[:, 0, :, None], at[:, 1, None, :]]  # [N, size, size, 3]
    return master[:, :, :size, :size], I_t.permute(0, 3, 1, 2)


def views_of(s):
    """What is cropped from each image: a master crop, or two crops (Table 4b)."""
    scale = (s.scale_min, 1.0)
    return [View(s.image_size, scale)] * 2 if s.random_crops else [View(s.image_size + s.shift, scale)]


def make_views(data, s, key, device):
    """Standardised online and target views (x_s, x_t), both [N, 3, S, S]; colours on x_t alone."""
    if s.random_crops:
        I_s, I_t = data.views
    else:
        noise = uniform((*key, "shift"), data.rows, 2, device=device)
        I_s, I_t = pixel_shift(data.views[0], s.image_size, s.shift, noise)
    return augment(I_s), augment(I_t, COLOUR if s.color else None, uniform((*key, "colour"), data.rows, 13))


def block_noise(noise, grid, block):
    """Uniform noise [N, L / block²] → [N, L], alike within blocks of patches, so that `random_masking` removes blocks.

    The number of removed patches is that of single ones: where it is no multiple of block², one block goes in part.
    """
    noise = noise.unflatten(1, (grid[0] // block, grid[1] // block))
    return noise.repeat_interleave(block, 1).repeat_interleave(block, 2).flatten(1)


# ----------------------------------------------------------------------------------------------------------- loss


def contrastive_loss(y_p, z_p, temperature, loss="infonce"):
    """L_c from predictions y_p and keys z_p, both [N, head_dim].

    "infonce" is Eq. 6-7: the positive is the same image's key, negatives are the keys of the other images of all ranks.
    "byol" (4.4) is 2 − 2 rho+, without negatives.
    """
    y_p, z_p = normalize(y_p), normalize(z_p)
    if loss == "byol":
        return (2 - 2 * (y_p * z_p).sum(1)).mean()
    return info_nce(y_p, z_p, temperature)


# ----------------------------------------------------------------------------------------------------------- loop


def pretrain(run, method, online, target, images, lambda_c):
    """Section 3. With lambda_c = 0 it is MAE: one crop an image, and the target side is never computed."""
    s, F_s = run.settings, online.F_s
    views = views_of(s) if lambda_c else [View(s.image_size, (s.scale_min, 1.0))]
    patches = math.prod(F_s.grid)
    optimizer = adamw(parameter_groups(online, s.lr * s.batch / 256, s.weight_decay), zero=s.zero)  # 4.1
    state = dict(online=online, target=target, optimizer=optimizer)

    def encode(x_s, x_t, noise_s, noise_t):
        ids_keep, ids_restore, mask = random_masking(noise_s, s.mask_ratio)
        z_s = F_s(x_s, ids_keep)  # Eq. 1, [N, 1 + K, D]
        L_r = mae_loss(online.G_p(z_s, ids_restore), x_s, mask, s.norm_pix)  # Eq. 3 and 5, [N]
        if not lambda_c:
            return (), L_r
        ids_t = random_masking(noise_t, s.target_mask_ratio)[0]  # at ratio 0 all of them
        return (online.feature(z_s, ids_restore), target.feature(x_t, ids_t)), L_r

    def objective(y_s, z_t):
        y_p = online.predictor(online.projector(y_s))
        with torch.no_grad():
            z_p = target.projector(z_t)
        L_c = contrastive_loss(y_p, z_p, s.temperature, s.loss)
        return lambda_c * L_c, dict(contrast=L_c.detach())  # Eq. 8: `backward` adds L_r

    for data in run.steps(method, images, views, s.batch, s.epochs, state):
        key = (s.seed, method, run.step)
        noise = uniform((*key, "mask"), data.rows, patches // s.mask_block**2, device=run.device)
        noise_s = block_noise(noise, F_s.grid, s.mask_block)
        if lambda_c:
            x_s, x_t = make_views(data, s, key, run.device)
            noise_t = uniform((*key, "target mask"), data.rows, patches, device=run.device)
        else:
            x_s, x_t, noise_t = augment(data.views[0]), None, None
        inputs = (x_s, x_t, noise_s, noise_t)
        loss, log = backward(encode, objective if lambda_c else None, inputs, s.micro_batch, run.precision)
        if run.optimize(optimizer, loss, log, warmup_cosine(run.step, run.total, s.warmup_epochs * run.per_epoch)):
            if lambda_c:
                target.update(online, s.ema)


# ----------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def picture(path, online, images, s, device):
    """Eight images: the master crop, both views, what the online encoder sees, the pixel decoder's reconstruction."""
    n, key = min(8, len(images) // world()) * world(), (s.seed, "picture")  # of which this rank has its part
    data = next(batches(images, views_of(s), n, 0, 1, s.seed, device, 0, {}))
    x_s, x_t = make_views(data, s, key, device)
    noise = uniform((*key, "mask"), data.rows, math.prod(online.F_s.grid) // s.mask_block**2, device=device)
    noise = block_noise(noise, online.F_s.grid, s.mask_block)
    masked, restored = reconstruct(online.F_s, online.G_p, x_s, noise, s.mask_ratio, s.norm_pix)
    rows = [] if s.random_crops else [(f"master crop, {s.shift} pixels larger", data.views[0].cpu(), None)]
    rows += [("online view", to_bytes(x_s), None), ("target view", to_bytes(x_t), None)]
    rows += [(f"{s.mask_ratio:.0%} removed", to_bytes(masked), None), ("reconstruction", to_bytes(restored), None)]
    draw(path, rows)


def last_block(s, dim):
    """FineTuning of the closing table for an encoder of width `dim`: the last block alone."""
    given = dict(blocks=1, epochs=s.finetune_epochs, lr=s.finetune_lr, batch=s.finetune_batch)
    return FineTuning(**recipe("shapes" if s.data == "shapes" else "partial", dim) | given)


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, device, train, val (None without labels), {method: (Online, Target)}.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    methods = s.methods.split(",")
    if not s.methods or methods != [x for x in ("mae", "cmae") if x in methods]:
        raise InputError(f"--methods {s.methods}: choose mae, cmae or mae,cmae")
    for name, choices in dict(stem=("patch", "conv"), pool=("cls", "mean"), loss=("infonce", "byol")).items():
        if getattr(s, name) not in choices:
            raise InputError(f"--{name} {getattr(s, name)}: choose {' or '.join(choices)}")
    if not s.mask_ratio:
        raise InputError("--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    if s.share_decoder and not 0 < s.feature_depth <= s.decoder_depth:
        raise InputError(f"--feature_depth {s.feature_depth}: with --share_decoder choose 1 to {s.decoder_depth}")
    device = start()
    models = {}
    for method in methods:
        torch.manual_seed(s.seed)  # both start alike
        online = Online(s)
        online.F_s.checkpoint_blocks = s.checkpoint_blocks
        if s.init:
            init_encoder(online.F_s, s.init)
        models[method] = [m.to(device) for m in (online, Target(online))]
    side = online.F_s.grid[0]
    if side % s.mask_block:
        raise InputError(f"--mask_block {s.mask_block}: expected a divisor of the grid of {side} patches a side")
    check_masking((side, side), s.mask_ratio, s.target_mask_ratio)
    train, val = load_splits(s.data, val=not s.cost)
    check_batch(s, train, s.batch, s.epochs)
    if val:
        check_tuning(last_block(s, online.F_s.dim), online.F_s)
        if s.finetune_batch > len(train) or s.finetune_batch % world():
            what = f"the training set has {len(train)} images, there are {world()} processes"
            raise InputError(f"--finetune_batch {s.finetune_batch}: {what}")
    return s, device, train, val, models


def main(argv):
    """The methods of `--methods`, each with its evaluation where the data has labels, and the closing table."""
    s, device, train, val, models = prepare(argv)
    run = Run(s, device)
    for method, (online, target) in models.items():
        pretrain(run, method, online, target, train, s.lambda_c if method == "cmae" else 0.0)
        file = run.folder / ("encoder.pt" if method == list(models)[-1] else f"{method}.pt")
        if rank() == 0 and not file.exists():
            save_encoder(file, online.F_s)
        if val and method not in run.results:
            tuned, _ = finetune(online.F_s, train, val, run, last_block(s, online.F_s.dim))
            run.report(method, evaluate(online.F_s, train, val, run) | dict(finetune=tuned["finetune"]))
    if rank() == 0 and not s.cost:
        picture(run.folder / "views.png", online, val or train, s, device)
    run.close()


if __name__ == "__main__":
    launch(main)
