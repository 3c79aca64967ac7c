"""CMAE: Contrastive Masked Autoencoders are Stronger Vision Learners (Huang et al., arXiv 2207.13532).

A masked autoencoder learns relations within an image, contrastive learning what sets images apart. CMAE does both at
once. An online encoder sees a quarter of the patches; a pixel decoder reconstructs the rest, and a second, feature
decoder completes the features, whose mean is drawn to the mean feature that a momentum encoder finds in the whole
image (Eq. 1-8). Both views are cut from one master crop, shifted by a few pixels ("pixel shifting"): after masking, two
random crops would have too little in common. Colours change for the momentum encoder alone. The online encoder is kept.

    python cmae.py                                                      # MAE and CMAE on built-in data, in minutes
    python cmae.py --data /path/to/imagenet --model vit_b16 --micro_batch 256    # one GPU
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

Tables and figures, by flags of this program, and by eval.py with --encoder and --data besides; · separates runs, | values.
Table 4 and Figure 4a are --epochs 300, fine-tuned with --lr 5e-4.
  Table 1        CMAE's is Table 2's, the others are quoted.
  Table 2        --epochs 800|1600 --stem patch|conv · eval.py finetune --recipe cmae; other rows are quoted
  Table 3        3a: eval.py segment --head upernet · CMAE*: eval.py segment --head upernet --layer_decay 0.75 --drop_path 0.2
                 · 3b: eval.py detect
  Table 4        4a: --epochs 300 --methods mae · --epochs 300 --random_crops --feature_depth 0
                 · --epochs 300 --feature_depth 0 · --epochs 300 · 4b: --epochs 300 --random_crops --no_color
                 · --epochs 300 --no_color · 4c: --epochs 300 --feature_depth 0|2|4
                 · --epochs 300 --share_decoder --feature_depth 2|4 · 4d: --epochs 300 --lambda_c 0.1|0.5|1|1.5|2
                 · 4e: --epochs 300 --target_mask_ratio 0|0.25|0.5|0.65|0.75 · the text: --epochs 300 --loss byol
                 · eval.py finetune --recipe cmae --lr 5e-4
  Figures 1, 3   Drawings.
  Figure 2       --epochs 300 · eval.py finetune --recipe cmae --lr 5e-4 · 800 and 1600 epochs are Table 2's.
  Figure 4       4a, whose values are in the picture alone: --epochs 300 --shift 0|16|32|64
                 · as the authors: --epochs 300 --shift 16 --margin 32
                 · 4b: eval.py finetune --recipe cmae, of MAE and of CMAE, and then: eval.py curve
                 --curves mae/finetune.json cmae/finetune.json
  Figure 5       5a, whose values are in the picture alone: eval.py finetune --recipe partial --blocks 1|4|12
                 · 0 blocks: eval.py probe --recipe lars --epochs 90 · 5b: --model vit_s16|vit_sw16|vit_b16|vit_l16
                 --methods mae|cmae · eval.py finetune --recipe cmae
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common import (
    BatchSize, Colour, Count, Fraction, FromMinusOne, Number, Positive, Ratio, Run, RunSettings, Share, Training, View,
    Whole, adamw, augment, backward, check_batch, check_masking, draw_rows, ema_update, frozen_copy, info_nce,
    init_encoder, launch, load_splits, mae_loss, mlp_head, need, new_decoder, new_encoder, normalize, open_run,
    parameter_groups, parse_settings, random_masking, reconstruction_rows, save_encoder, set_lr, some_crops, start_machine,
    to_bytes, uniform, warmup_cosine, without_gradient, world,
)  # fmt: skip
from eval import FineTuning, check_tuning, evaluate, finetune, recipe


@dataclass
class Settings(RunSettings):
    """Defaults are those of 4.1 for every size: ViT-S, ViT-B and ViT-L share one recipe (4.6)."""

    model: str = "vit_b16"  # 4.1; vit_s16, vit_l16 in 4.6, which prints no sizes: "small" in the authors' code is vit_sw16
    methods: Literal["cmae", "mae", "mae,cmae"] = "cmae"  # "mae" is the same loop without the contrastive part
    stem: Literal["patch", "conv"] = "patch"  # "conv": the hybrid convolutional ViT of 4.1, CMAE*
    pool: Literal["cls", "mean"] = "mean"  # of the finished encoder; Eq. 2 and 4 average the patches

    # optimisation: 4.1
    epochs: Positive = 1600  # 4.6; 300 in Section 4.4, 800 and 1600 in Table 2
    batch: BatchSize = 4096  # global: of all processes together
    lr: Positive = 1.5e-4  # learning rate at batch 256
    warmup_epochs: Number = 40  # epochs in which the learning rate rises
    weight_decay: Number = 0.05  # AdamW's, of all but biases and norms

    # masked autoencoder: 3.1, 3.3, "following MAE"
    mask_ratio: Ratio = 0.75  # authors' configs: 0.65
    mask_block: Count = 1  # side in patches of the blocks that are removed; authors' configs: 2
    norm_pix: bool = True  # targets are normalised patch by patch; 3.3
    decoder_dim: Count = 512  # width of the pixel decoder; He et al. Table 1b
    decoder_depth: Whole = 8  # blocks of the pixel decoder; He et al. Table 1a
    decoder_heads: Count = 16  # attention heads of the pixel decoder
    scale_min: Share = 0.2  # of the random crops' area; not printed, the authors' code

    # views: 3.2, Table 4b
    shift: Whole = 32  # pixels p, r_w, r_h in [0, p); Figure 4a varies it, 0 shifts nothing
    margin: FromMinusOne = -1  # of the master crop, pixels; −1: p, as 3.2 words it; the authors' is 32 for every p
    random_crops: bool = False  # two crops of their own instead of one master crop
    color: bool = True  # the target view changes its colours

    # contrast: 3.1, 3.3, Table 4
    feature_depth: Whole = 2  # blocks of the feature decoder, Table 4c; 0: the mean of the visible tokens, no decoder
    share_decoder: bool = False  # Table 4c: the feature decoder's blocks are the first ones of the pixel decoder
    target_mask_ratio: Ratio = 0.0  # share of the patches removed from the target's view; Table 4e
    loss: Literal["infonce", "byol"] = "infonce"  # contrast: InfoNCE, or BYOL's; Eq. 7, or 4.4
    temperature: Positive = 0.07  # of the contrast's softmax; Eq. 7
    lambda_c: Number = 1.0  # weight of L_c: Eq. 8, Table 4d; the authors' L_c has a factor 2 * temperature: 0.14 is theirs
    ema: Fraction = 0.996  # mu, the share of the target that stays at a step
    head_hidden: Count = 1536  # width of projector's and predictor's hidden layers; not printed, the authors' code
    head_dim: Count = 256  # width of the embeddings

    # fine-tuning of the last block, in the closing table: 4.5, He et al. A.1 and Table 9
    finetune_epochs: Positive = 100  # of the last block's fine-tuning, by which it is judged
    finetune_lr: Positive = 1e-3  # learning rate of that, at batch 256
    finetune_batch: Count = 1024  # global batch of that


# 3.2, "color transfer"; not printed, the authors' code
COLOUR = Colour(jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)

AUTHORS = dict(mask_ratio=0.65, mask_block=2, lambda_c=0.14, margin=32)  # their public configs
# The built-in run: small enough for minutes on two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, methods="mae,cmae", decoder_dim=64, decoder_depth=2, decoder_heads=4,
    epochs=8, batch=128, lr=2e-3, warmup_epochs=0.8, shift=8, margin=-1, head_hidden=512, head_dim=128, ema=0.975,
    finetune_epochs=4, finetune_lr=1e-2, finetune_batch=128,  # chosen on MAE's encoder alone
)  # fmt: skip


def presets(given):
    """Field values for the flags given: the built-in run."""
    row = AUTHORS if given.get("authors") else {}
    if given.get("data", "shapes") != "shapes":
        return row
    short = dict(epochs=1.6, warmup_epochs=0.4, finetune_epochs=1) if given.get("short") else {}
    return row | SHAPES | short


# ---------------------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """Encoder F_s, pixel decoder G_p, feature decoder G_f (or None), projector and predictor (Figure 3).

    F_s is a ViT with its width as `dim`, called with (images, ids_keep); both decoders are MAEDecoders.
    """

    def __init__(self, F_s, G_p, G_f=None, head_hidden=1536, head_dim=256):
        super().__init__()
        self.F_s = F_s
        self.G_p = G_p
        self.G_f = G_f
        self.projector = mlp_head(F_s.dim, head_hidden, head_dim, last_norm=False, eps=1e-6)
        self.predictor = mlp_head(head_dim, head_hidden, head_dim, last_norm=False, eps=1e-6)

    def feature(self, z_s, ids_restore):
        """Eq. 4: y_s [N, D] from the visible tokens z_s [N, 1 + K, D], completed by the feature decoder."""
        tokens = self.G_f(z_s, ids_restore) if self.G_f else z_s[:, 1:]
        return tokens.mean(1)


class Target(nn.Module):
    """Momentum encoder F_t and projector (3.1, 3.3): EMAs of the online ones, without gradient."""

    def __init__(self, online):
        super().__init__()
        self.F_t = frozen_copy(online.F_s)
        self.projector = frozen_copy(online.projector)

    def feature(self, x_t, ids_keep):
        """Eq. 2: z_t [N, D], the mean of the last block's patch tokens, before the final norm."""
        (tokens,) = self.F_t(x_t, ids_keep, blocks=[self.F_t.depth])
        return tokens[:, 1:].mean(1)

    def update(self, online, mu):
        """theta_t ← mu theta_t + (1 − mu) theta_s."""
        ema_update(self.F_t, online.F_s, mu)
        ema_update(self.projector, online.projector, mu)


def new_online(s):
    """The online side of the settings: the feature decoder ends in the encoder's width."""
    F_s = new_encoder(s, s.pool, stem=s.stem)
    G_p = new_decoder(F_s, s)
    G_f = new_decoder(F_s, s, depth=s.feature_depth, out=F_s.dim) if s.feature_depth else None
    if s.share_decoder:  # all but the last norm and the output, which have another width
        G_f.decoder_embed = G_p.decoder_embed
        G_f.mask_token = G_p.mask_token
        G_f.decoder_blocks = G_p.decoder_blocks[: s.feature_depth]
    return Online(F_s, G_p, G_f, s.head_hidden, s.head_dim)


# ---------------------------------------------------------------------------------------------------------- views


def pixel_shift(master, size, p, noise):
    """3.2: the online view [0 : w, 0 : h] and the target view [r_w : r_w + w, r_h : r_h + h] of a master crop.

    master [N, 3, S, S], S at least size + p − 1; noise [N, 2] in [0, 1), on the CPU, gives r_h and r_w in [0, p) for each
    sample.
    """
    r = (noise * p).long().tolist()
    I_t = torch.stack([x[:, r_h : r_h + size, r_w : r_w + size] for x, (r_h, r_w) in zip(master, r)])
    return master[:, :, :size, :size], I_t


def views_of(s):
    """What is cropped from each image: a master crop, or two crops (Table 4b)."""
    scale = (s.scale_min, 1.0)
    if s.random_crops:
        return [View(s.image_size, scale)] * 2
    return [View(s.image_size + (s.shift if s.margin < 0 else s.margin), scale)]


def make_views(data, s, key):
    """Standardised online and target views (x_s, x_t), both [N, 3, S, S]; colours on x_t alone."""
    if s.random_crops:
        I_s, I_t = data.views
    else:
        I_s, I_t = pixel_shift(data.views[0], s.image_size, s.shift, uniform((*key, "shift"), data.rows, 2))
    colour = COLOUR if s.color else None
    return augment(I_s), augment(I_t, colour, uniform((*key, "colour"), data.rows, 13))


def block_noise(key, rows, grid, block, device):
    """Noise of `random_masking` [N, L], alike within blocks of patches, so that it removes blocks (of one patch: patches).

    The number of removed patches is that of single ones: where it is no multiple of block², one block goes in part.
    """
    height, width = grid
    noise = uniform((*key, "mask"), rows, height // block, width // block, device=device)
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
    device = run.machine.device
    views = views_of(s) if lambda_c else [View(s.image_size, (s.scale_min, 1.0))]
    optimizer = adamw(parameter_groups(online, s.lr * s.batch / 256, s.weight_decay), zero=s.zero)  # 4.1
    state = dict(online=online, target=target, optimizer=optimizer)

    def target_feature(x_t, noise_t):
        ids_keep, _, _ = random_masking(noise_t, s.target_mask_ratio)  # at ratio 0 all of them
        return (target.feature(x_t, ids_keep),)

    def encode(x_s, noise_s, *z_t):
        ids_keep, ids_restore, mask = random_masking(noise_s, s.mask_ratio)
        z_s = F_s(x_s, ids_keep)  # Eq. 1, [N, 1 + K, D]
        yield (online.feature(z_s, ids_restore), *z_t) if lambda_c else ()
        yield mae_loss(online.G_p(z_s, ids_restore), x_s, mask, s.norm_pix)  # Eq. 3 and 5: L_r [N]

    def objective(y_s, z_t):
        y_p = online.predictor(online.projector(y_s))
        with torch.no_grad():
            z_p = target.projector(z_t)
        L_c = contrastive_loss(y_p, z_p, s.temperature, s.loss)
        return lambda_c * L_c, dict(contrast=L_c.detach())  # Eq. 8: `backward` adds L_r

    training = Training(run, method, state, len(images), s.batch, s.epochs)
    for data in training.batches(images, views):
        key = (s.seed, method, training.step)
        noise_s = block_noise(key, data.rows, F_s.grid, s.mask_block, device)
        if lambda_c:
            x_s, x_t = make_views(data, s, key)
            noise_t = uniform((*key, "target mask"), data.rows, math.prod(F_s.grid), device=device)
            z_t = without_gradient(target_feature, (x_t, noise_t), s.micro_batch, run.machine.precision)
        else:
            x_s, z_t = augment(data.views[0]), ()

        # in one piece: features, L_r = encode(*inputs); loss = objective(*features)[0] + L_r.mean(); loss.backward()
        inputs = (x_s, noise_s, *z_t)
        loss, aux = backward(encode, objective if lambda_c else None, inputs, s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup_epochs * training.per_epoch))
        taken, log = training.take_step(optimizer, loss, **(aux or {}))
        if taken and lambda_c:
            target.update(online, s.ema)
        training.log(log)
        training.save_if_due()


# ----------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def picture(path, online, images, s, machine):
    """Eight images: the master crop, the target view; the online view, what is seen of it, what is made of that."""
    key = (s.seed, "picture")
    data = some_crops(images, views_of(s), s.seed, machine)
    x_s, x_t = make_views(data, s, key)
    noise = block_noise(key, data.rows, online.F_s.grid, s.mask_block, machine.device)
    rows = [] if s.random_crops else [("master crop", data.views[0].cpu(), None)]
    rows.append(("target view", to_bytes(x_t), None))
    rows += reconstruction_rows(online.F_s, online.G_p, x_s, noise, s.mask_ratio, s.norm_pix)
    caption = "at one scale; the input is the online view: without random crops, the master crop's upper left"
    draw_rows(path, rows, caption=caption)


def last_block(s, dim):
    """FineTuning of the closing table for an encoder of width `dim`: the last block alone."""
    given = dict(blocks=1, epochs=s.finetune_epochs, lr=s.finetune_lr, batch=s.finetune_batch)
    return FineTuning(**recipe("shapes" if s.data == "shapes" else "partial", dim) | given)


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, machine, train, val (None without labels), {method: (Online, Target)}.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    need(s.mask_ratio, "--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    need(s.margin < 0 or s.margin >= s.shift - 1,
         f"--margin {s.margin}: a shift of up to {s.shift - 1} pixels leaves the master crop, choose as many")  # fmt: skip
    need(not s.share_decoder or 0 < s.feature_depth <= s.decoder_depth,
         f"--feature_depth {s.feature_depth}: with --share_decoder choose 1 to {s.decoder_depth}")  # fmt: skip
    machine = start_machine(s.precision, s.workers)
    models = {}
    for method in s.methods.split(","):
        torch.manual_seed(s.seed)  # both start alike
        online = new_online(s).to(machine.device)
        models[method] = online, Target(online)
    F_s = online.F_s
    side, _ = F_s.grid
    need(side % s.mask_block == 0, f"--mask_block {s.mask_block}: expected a divisor of the grid of {side} patches a side")
    check_masking(F_s.grid, s.mask_ratio, s.target_mask_ratio)
    train, val = load_splits(s.data, val=s.eval and not s.cost)
    check_batch(s, train, s.batch, s.epochs)
    if val:
        check_tuning(last_block(s, F_s.dim), F_s)
        need(s.finetune_batch <= len(train) and s.finetune_batch % world() == 0,
             f"--finetune_batch {s.finetune_batch}: the training set has {len(train)} images, "
             f"there are {world()} processes")  # fmt: skip
    return s, machine, train, val, models


def main(argv):
    """The methods of `--methods`, each with its evaluation where the data has labels, and the closing table."""
    s, machine, train, val, models = prepare(argv)
    run = open_run(s, machine)
    for method, (online, target) in models.items():
        last = method == list(models)[-1]
        path = run.folder / ("encoder.pt" if last else f"{method}.pt")
        if method in run.finished:  # before the run was resumed
            init_encoder(online.F_s, path)
        else:
            pretrain(run, method, online, target, train, s.lambda_c if method == "cmae" else 0.0)
            save_encoder(path, online.F_s)
        if val and method not in run.results:
            tuned, _ = finetune(online.F_s, train, val, Run(machine), last_block(s, online.F_s.dim))
            run.report(method, evaluate(online.F_s, train, val, machine) | dict(finetune=tuned["finetune"]))
    if not s.cost:
        picture(run.folder / "views.png", online, val or train, s, machine)
    run.close()


if __name__ == "__main__":
    launch(main)
