"""CAN: A Simple, Efficient and Scalable Contrastive Masked Autoencoder Framework (Mishra et al., arXiv 2210.16870).

Three tasks share one symmetric step, without momentum encoder or multi-crop. Two views of an image get Gaussian noise,
lose half of their patches and go through encoder and decoder:
  C  contrast     the mean-pooled visible patches of both views are drawn together, against the batch (InfoNCE, 3.2)
  A  autoencoder  the decoder reconstructs the removed patches (3.3)
  N  noise        on the kept patches, where MAE throws the decoder's output away, it predicts the noise (3.4)
The paper's baselines are the same step with other settings: SimCLR has the first task alone, MAE the second.

    python can.py                                                  # CAN, SimCLR and MAE on built-in data, in minutes
    torchrun --nproc_per_node 8 can.py --data /path/to/imagenet --model vit_l16 --micro_batch 128
    torchrun --nproc_per_node 8 can.py --data /path/to/imagenet --model vit_l16 --micro_batch 64 --methods simclr
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 \
        can.py --data /path/to/uncurated --model vit_l16 --micro_batch 128 --epoch_images 1281167

Easy to get wrong:
  - Negatives exclude both views of the sample itself: 2n - 2 of them over all ranks, gathered with gradient (3.2).
  - The two views of an image have masks, noise and noise levels of their own; exactly T/2 patches stay (3.1).
  - L_rec counts removed patches, its target is the clean view; L_denoise counts kept ones, its target is sigma e.
  - The norms of 3.3 and 3.4 are means over pixels (Table 4's magnitudes), of standardised, not patch-normalised, ones.
  - The level embedding is added at the encoder's width, before the decoder, to mask tokens too (3.4).
  - Features are means of patch tokens, without [CLS]; BatchNorm momentum 0.9 is JAX's, PyTorch's 0.1.
  - Loss weights sum to 1, so a weight set to 0 goes to the other losses (3.5).

Tables and figures, by flags of this program, and by eval.py with --encoder and --data besides; · separates runs, | values.
JFT-300M, here any images, is --epoch_images 1281167; Section 5's ablations are --model vit_b16 --epochs 100.
  Figure 1       --epoch_images 1281167 --epochs 5000 --methods can|simclr|mae, and Table 2's · --cost --methods can|simclr|mae
                 · eval.py probe --recipe lars · eval.py finetune --recipe can
  Figures 2, 3   Drawings.
  Table 1        --model vit_b16 --epochs 100 --lam 1 --sigma_max 0 · --model vit_b16 --epochs 100 --lam 1 --no_level_embedding
                 · --model vit_b16 --epochs 100 --no_level_embedding|--level_embedding · eval.py probe --recipe lars
  Table 2        --epoch_images 1281167 --epochs 800|1600|3000|5000
                 · --epoch_images 1281167 --methods simclr --epochs 800|1600|5000
                 · --epoch_images 1281167 --methods mae --epochs 1600|5000
                 · --epoch_images 1281167 --model vit_b16 --methods can|simclr
                 · eval.py probe --recipe lars; other rows are quoted
  Table 3        --model vit_b16 --epochs 800|1600 · --methods can|simclr|mae · eval.py finetune --recipe can
                 · eval.py probe --recipe lars · from scratch, by a recipe that is chosen: eval.py finetune --recipe can
                 --scratch vit_b16 --layer_decay 1; other rows are quoted
  Table 4        --model vit_b16 --epochs 100 --mask_ratio 0.5 --methods simclr|mae|can, whose last losses are in log.jsonl
  Table 5        --model vit_b16 --epochs 100 --lambda_infonce 0 · --model vit_b16 --epochs 100 --lam 0
                 · --model vit_b16 --epochs 100 --lam 1 --sigma_max 0 · --model vit_b16 --epochs 100
                 · eval.py probe --recipe lars
  Tables 6-9     The presets TABLE_6 to TABLE_9.
  Tables 10, 11  The recipes of eval.py's finetune and probe, can and lars.
  Figures 4, 10-14, 16   eval.py lowshot --recipe can --shots 1 5 10 25 --image_size 384, of Table 2's models, 14 of Table 3's,
                 16 of Figure 15's
  Figures 5, 8, 9, 15    eval.py finetune --recipe can, and of what that wrote:
                 eval.py robust --classifier finetuned.pt --sets FOLDER · eval.py robust --classifier finetuned.pt --real FILE
                 · 15: --epoch_images 1281167 --epochs 800 · 9, ViT-B: --epoch_images 1281167 --model vit_b16
                 · 9, from scratch with Mixup: eval.py finetune --recipe can --scratch vit_b16 --layer_decay 1 --mixup 0.8; its
                 PyramidAT is adversarial training with labels (Herrmann et al. 2022), no part of CAN, and not here
  Figure 6       the values are in the picture alone; --model vit_b16 --epochs 100 --mask_ratio 0|0.5|0.75 --methods can|simclr
                 · --epoch_images 1281167 --model vit_b16 --mask_ratio 0|0.5|0.75 --methods can|simclr
  Figure 7       likewise; --model vit_b16 --epochs 100 --lambda_infonce 0.01|0.03|0.1
                 · --model vit_b16 --epochs 100 --sigma_max 0|0.05|0.1 · --model vit_b16 --epochs 100 --lam 0.3|0.5|0.7
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import (
    BatchSize, Colour, Count, Fraction, Number, Positive, Ratio, RunSettings, Share, Training, View, Whole, adamw,
    augment, augment_views, backward, check_batch, check_masking, draw_rows, init_encoder, init_weights, launch, load_splits,
    mlp_head, model_size, need, new_decoder, new_encoder, normal, normalize, normalize_patches, nt_xent,
    open_run, parameter_groups, parse_settings, patch_loss, patchify, promote, random_masking, save_encoder, set_lr,
    start_machine, to_bytes, uniform, unnormalize_patches, unpatchify, warmup_cosine,
)  # fmt: skip
from eval import center_views, evaluate


@dataclass
class Settings(RunSettings):
    """Defaults are CAN's with ViT-L/16 on ImageNet; `presets` holds what differs."""

    model: str = "vit_l16"
    methods: str = "can"  # can, simclr, mae, or several of them, one after the other

    # what distinguishes the methods (METHODS) and their ablations
    lambda_infonce: Fraction = 0.03  # weight of the contrast; Section 5, Figure 7 left
    lam: Fraction = 0.7  # lambda of 3.5; not printed (Figure 7 right is flat): chosen, the ratio of the authors' code
    mask_ratio: Ratio = 0.5  # 3.1; the authors' code: 0.75
    sigma_max: Number = 0.05  # largest noise, in standardised pixels; Section 5, Figure 7 middle; the authors' code: 0.1
    level_embedding: bool = True  # of the noise, 3.4; Table 1's "+noise, +loss" is without. Not printed: number, unit
    views: Count = 2  # crops of an image; 3.1
    strength: Fraction = 1.0  # of SimCLR's colours, Table 6; 0: crop and flip alone; the authors' code: 0.5
    scale_min: Share = 0.08  # of the random crops' area (Chen et al. 2020); the authors' code: 0.2
    bilinear: bool = False  # resize crops so, as the authors' code, instead of bicubically

    # losses
    temperature: Positive = 0.1  # of the contrast's softmax; 3.2
    norm_pix: bool = False  # reconstruct patches normalised one by one; Table 4's L_rec of 0.17 is not of such
    noisy_target: bool = False  # reconstruct the noisy view, as the authors' code; 3.4 can be read so
    authors_model: bool = False  # head, pooling and level embedding of their code, see CAN
    projector_hidden: Count = 4096  # Appendix C, projection head architecture
    projector_dim: Count = 128  # width of the embeddings, the same
    decoder_dim: Count = 512  # Appendix C, decoder architecture
    decoder_depth: Whole = 8  # blocks of the pixel decoder
    decoder_heads: Count = 16  # attention heads of the pixel decoder

    # optimisation: Table 6
    epochs: Positive = 800  # over the training images; Table 3
    epoch_images: Whole = 0  # images an epoch is counted in; 0: those of the data. 4.1, JFT-300M: 1281167
    batch: BatchSize = 4096  # global: of all processes together
    lr: Positive = 1.25e-4  # learning rate at batch 256; the views do not count
    weight_decay: Number = 0.1  # AdamW's, of all but biases and norms
    warmup_epochs: Number = 40  # epochs in which the learning rate rises


# Table 6 (ImageNet), Table 7 (JFT-300M): CAN and SimCLR
TABLE_6 = {"b": dict(lr=2.5e-4, weight_decay=0.05, epochs=1600), "l": dict(lr=1.25e-4, weight_decay=0.1)}
TABLE_7 = {"b": dict(lr=2.5e-4, weight_decay=0.05, epochs=800), "l": dict(lr=3.125e-5, weight_decay=0.05, epochs=5000)}
# Tables 8 and 9: MAE. Of the augmentation they list, C keeps He et al.'s: crop and flip
TABLE_8 = dict(lr=1.5e-4, weight_decay=0.05)
TABLE_9 = dict(lr=3.75e-5, weight_decay=0.05)
METHODS = {
    "can": dict(),
    "simclr": dict(lambda_infonce=1.0, mask_ratio=0.0, sigma_max=0.0),  # full views, no noise, no decoder
    "mae": dict(lambda_infonce=0.0, lam=1.0, mask_ratio=0.75, sigma_max=0.0, views=1, strength=0.0, scale_min=0.2),
}
# The authors' port to PyTorch. Not here: its negatives are those of one GPU
AUTHORS = dict(
    mask_ratio=0.75, sigma_max=0.1, strength=0.5, scale_min=0.2, bilinear=True, noisy_target=True, authors_model=True,
)  # fmt: skip
# The built-in run: small enough for minutes on two CPU cores, the same recipe for all methods. In so few steps the paper's
# lambda_InfoNCE teaches no contrast, and hue is half of these classes' identity: more of it and weaker colours
SHAPES = dict(
    model="vit_nano8", image_size=48, methods="can,simclr,mae", decoder_dim=64, decoder_depth=2, decoder_heads=4,
    projector_hidden=512, epochs=2.4, batch=64, lr=2e-3, weight_decay=0.05, warmup_epochs=0.4, lambda_infonce=0.3, strength=0.4,
)  # fmt: skip


def method_row(method, data):
    """What a method changes; in the built-in run all of them see as many views."""
    row = METHODS.get(method, {})
    return row | dict(views=2) if data == "shapes" else row


def presets(given):
    """Field values for the flags given: Tables 6-9, the built-in run, the method."""
    data = given.get("data", "shapes")
    size, _ = model_size(given.get("model", "vit_l16"))
    uncurated = given.get("epoch_images", 0) > 0  # JFT-300M and its like
    row = dict((TABLE_7 if uncurated else TABLE_6).get(size, {}))
    if given.get("methods") == "mae":
        row |= TABLE_9 if uncurated else TABLE_8
    if given.get("authors"):
        row |= AUTHORS
    if data == "shapes":
        row |= SHAPES
        if given.get("short"):
            row |= dict(epochs=0.8, warmup_epochs=0.2)
    methods = (row | given).get("methods", "can")
    for name in METHODS["mae"]:  # these are all that a method may set
        fault = f"--{name} belongs to one method: name it instead of --methods {methods}"
        need(name not in given or "," not in methods, fault)
    mixed = "mae" in methods and "," in methods and data not in ("shapes", "random")
    fault = f"--methods {methods}: MAE has a --lr and --weight_decay of its own (Tables 8, 9): run it alone, or give both"
    need(not mixed or {"lr", "weight_decay"} <= given.keys(), fault)
    return row | method_row(methods, data)


# ---------------------------------------------------------------------------------------------------------- model


def loss_weights(lambda_infonce, lam):
    """3.5: lambda_InfoNCE, lambda_rec, lambda_denoise, which sum to 1."""
    rest = 1 - lambda_infonce
    return dict(infonce=lambda_infonce, rec=rest * lam, denoise=rest * (1 - lam))


class LevelEmbedding(nn.Module):
    """3.4: sinusoidal embedding of the noise level, then a 2-layer MLP with ReLU of constant width d: [N] → p [N, d].

    sigma_max is 1000 in the sinusoids' unit (chosen, as diffusion's time steps): unscaled, all levels would look alike.
    That is what `authors` does, with 128 sinusoids whose last wavelength is 10000, not the one before it.
    """

    def __init__(self, dim, sigma_max, authors=False):
        super().__init__()
        self.dim = dim
        self.authors = authors
        self.unit = 1 if authors else sigma_max / 1000
        self.mlp = nn.Sequential(nn.Linear(128 if authors else dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.mlp.apply(init_weights)

    def forward(self, sigma):
        like = dict(device=sigma.device, dtype=sigma.dtype)
        exponents = torch.arange(0, 1, 2 / self.dim, **like)[: self.dim // 2]  # rounding may give one more
        if self.authors:
            exponents = torch.linspace(0, 1, 64, **like)
        angles = sigma[:, None] / self.unit * 10000**-exponents
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class CAN(nn.Module):
    """Encoder f, decoder, level embedding, projector (Figure 2); what only losses of weight 0 would need is None.

    Args:
        encoder: a ViT with its `dim`, `patch_size` and `pooled`, called with (images, ids_keep).
        decoder: an MAEDecoder; None where lambda_infonce is 1.
        sigma_max: the level embedding's largest level; 0: no such embedding.
        authors_model: as the authors' code: a head of one hidden layer of width d without BatchNorm, of the mean of all
            tokens; the level is added to [CLS] and kept patches alone.
    """

    def __init__(self, encoder, decoder, lambda_infonce=0.03, lam=0.7, mask_ratio=0.5, sigma_max=0.05, temperature=0.1,
                 projector_hidden=4096, projector_dim=128, norm_pix=False, noisy_target=False,
                 authors_model=False):  # fmt: skip
        super().__init__()
        self.weights = loss_weights(lambda_infonce, lam)
        self.mask_ratio = mask_ratio
        self.temperature = temperature
        self.norm_pix = norm_pix
        self.noisy_target = noisy_target
        self.authors_model = authors_model
        self.f = encoder
        self.decoder = decoder
        self.level = self.projector = None
        d = encoder.dim
        if decoder and sigma_max:
            self.level = LevelEmbedding(d, sigma_max, authors_model)
        if lambda_infonce and authors_model:
            self.projector = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, projector_dim)).apply(init_weights)
        elif lambda_infonce:
            self.projector = mlp_head(d, projector_hidden, projector_hidden, projector_dim, last_norm=False)

    def decode(self, z, ids_restore, sigma):
        """z [N, 1 + T', d] and sigma [N] → x_hat [N, T, p·p·3]; 3.4: z_t ← z_t + p for t = 1 … T."""
        p = self.level(sigma) if self.level else None
        if self.authors_model and self.level:
            z, p = z + p[:, None], None
        return self.decoder(z, ids_restore, p)

    def encode(self, x, noise, sigma, e):
        """What a sample contributes to the losses by itself, one after the other.

        x [N, V, 3, S, S] views, noise [N, V, T] uniform (the masks), sigma [N, V], e like x.

        Yields:
            y [N, V, d] pooled patches, L_rec [N] and L_denoise [N], means over the views.
        """
        v = x.shape[1]
        x, noise, sigma, e = (t.flatten(0, 1) for t in (x, noise, sigma, e))  # all views as one batch (3.1)
        e = sigma[:, None, None, None] * e
        ids_keep, ids_restore, M = random_masking(noise, self.mask_ratio)  # M [N·V, T], 1 = removed
        z = self.f(x + e, ids_keep)  # [N·V, 1 + T', d]
        y = z.mean(1) if self.authors_model else self.f.pooled(z)
        yield y.unflatten(0, (-1, v))
        if not self.decoder:
            yield from z.new_zeros(2, len(z) // v)
            return
        x_hat = self.decode(z, ids_restore, sigma)  # [N·V, T, p·p·3]
        p = self.f.patch_size
        target = patchify(x + e if self.noisy_target else x, p)
        if self.norm_pix:
            target = normalize_patches(target)
        yield patch_loss(M, target, x_hat).view(-1, v).mean(1)  # 3.3
        yield patch_loss(1 - M, patchify(e, p), x_hat).view(-1, v).mean(1)  # 3.4

    def objective(self, y):
        """What the whole batch adds to L_CAN (3.5), its part on this rank, and a dict of L_InfoNCE."""
        u = normalize(self.projector(y.flatten(0, 1))).unflatten(0, (-1, 2))  # BatchNorm over both views together
        infonce = nt_xent(u[:, 0], u[:, 1], self.temperature)  # 3.2
        return self.weights["infonce"] * infonce, dict(infonce=infonce.detach())


def new_model(s):
    """CAN by its settings, on the CPU; one seed gives all methods the same encoder."""
    torch.manual_seed(s.seed)
    encoder = new_encoder(s, "mean")
    decoder = new_decoder(encoder, s) if s.lambda_infonce < 1 else None
    return CAN(
        encoder, decoder, s.lambda_infonce, s.lam, s.mask_ratio, s.level_embedding * s.sigma_max, s.temperature,
        s.projector_hidden, s.projector_dim, s.norm_pix, s.noisy_target, s.authors_model,
    )  # fmt: skip


def simclr_colours(strength):
    """Table 6, as Chen et al. 2020: jitter (0.8, 0.8, 0.8, 0.2) · strength, grayscale, blur; None at strength 0."""
    jitter = tuple(strength * j for j in (0.8, 0.8, 0.8, 0.2))
    return Colour(jitter=jitter, p_jitter=0.8, p_gray=0.2, p_blur=0.5) if strength else None


# ----------------------------------------------------------------------------------------------------------- loop


def pretrain(run, method, model, images, s):
    """The one loop: CAN, SimCLR and MAE by `s`."""
    device = run.machine.device
    patches = math.prod(model.f.grid)
    colours = simclr_colours(s.strength)
    views = [View(s.image_size, (s.scale_min, 1.0), bilinear=s.bilinear)] * s.views
    optimizer = adamw(parameter_groups(model, s.lr * s.batch / 256, s.weight_decay), zero=s.zero)
    state = dict(model=model, optimizer=optimizer)
    per_epoch = (s.epoch_images or len(images)) // s.batch  # steps
    epochs = s.epochs * per_epoch / (len(images) // s.batch)
    training = Training(run, method, state, len(images), s.batch, epochs)

    for data in training.batches(images, views):
        key = (s.seed, method, training.step)
        colour = uniform((*key, "colour"), data.rows, s.views, 13)
        x = torch.stack(augment_views(data.views, [colours] * s.views, colour), 1)  # [N, V, 3, S, S]
        noise = uniform((*key, "mask"), data.rows, s.views, patches, device=device)  # [N, V, T]
        sigma = s.sigma_max * uniform((*key, "sigma"), data.rows, s.views, device=device).to(x)  # [N, V], U[0, max]

        measured = []  # L_rec and L_denoise of every sample, for the log

        def encode(x, noise, sigma, rows):
            e = torch.zeros_like(x)
            if s.sigma_max:  # drawn here: a large batch's noise never stands in memory at once
                e = normal((*key, "noise"), rows, *x.shape[1:], device=device).to(x)
            encoded = model.encode(x, noise, sigma, e)
            yield (next(encoded),)
            rec, denoise = encoded
            measured.append(torch.stack([rec, denoise]).detach())
            yield model.weights["rec"] * rec + model.weights["denoise"] * denoise  # 3.5, without L_InfoNCE

        # in one piece: y, L = encode(*inputs); loss = model.objective(*y)[0] + L.mean(); loss.backward()
        inputs = (x, noise, sigma, data.rows)
        objective = model.objective if model.projector else None
        loss, losses = backward(encode, objective, inputs, s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup_epochs * per_epoch))
        rec, denoise = torch.cat(measured, 1).mean(1)
        losses = dict(losses or {}, rec=rec, denoise=denoise)
        _, log = training.take_step(optimizer, loss, **{name: v for name, v in losses.items() if model.weights[name]})
        training.log(log)
        training.save_if_due()


def multiply_adds(model, views=2):
    """Multiply-adds per image of a step, forward and backward, counted in a step of two images."""
    n = 2
    model = copy.deepcopy(model)  # its gradients and BatchNorm statistics are thrown away
    side = model.f.config["image_size"]
    x = torch.zeros(n, views, 3, side, side, device=model.f.cls_token.device)
    noise = x.new_zeros(n, views, math.prod(model.f.grid))
    with FlopCounterMode(display=False) as counter:
        y, rec, denoise = model.encode(x, noise, noise[..., 0], x)
        loss = (rec + denoise).mean()
        if model.projector:
            loss = loss + model.objective(y)[0]
        loss.backward()
    return counter.get_total_flops() / 2 / n  # the counter gives FLOPs


# ----------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def picture(path, model, images, s, machine):
    """Eight images, what the encoder sees of them, the reconstruction, and true and predicted noise of kept patches."""
    p = model.f.patch_size
    index = torch.arange(min(8, len(images)))
    crops, rows = next(center_views(images, s.image_size, machine, index))
    x = augment(crops)  # [N, 3, S, S]
    e = s.sigma_max * normal((s.seed, "picture", "noise"), rows, *x.shape[1:])
    noise = uniform((s.seed, "picture", "mask"), rows, math.prod(model.f.grid))
    ids_keep, ids_restore, M = random_masking(noise, s.mask_ratio)
    sigma = torch.full_like(x[:, 0, 0, 0], s.sigma_max)
    x_hat = promote(model.decode(model.f(x + e, ids_keep), ids_restore, sigma))

    kept = 1 - M[..., None]
    target = patchify(x, p)
    restored = unnormalize_patches(x_hat, target) if s.norm_pix else x_hat
    patches = {
        "input": target,
        f"{100 * s.mask_ratio:.0f} % removed, noise {s.sigma_max:g}": patchify(x + e, p) * kept,
        "reconstruction (kept: input)": target * kept + restored * (1 - kept),
    }
    if s.lam < 1 and s.sigma_max:
        gain = kept / s.sigma_max / 2
        patches |= {"true noise / (2 sigma)": patchify(e, p) * gain, "predicted noise / (2 sigma)": x_hat * gain}
    pictures = {caption: to_bytes(unpatchify(t, p, *x.shape[-2:])) for caption, t in patches.items()}
    draw_rows(path, [(caption, shown, None) for caption, shown in pictures.items()])


def check_losses(s):
    """An error where a method has nothing to learn from, or one view to contrast."""
    contrasts = s.lambda_infonce > 0
    reconstructs = s.lam * s.mask_ratio > 0
    denoises = (1 - s.lam) * s.sigma_max > 0
    need(s.views == 2 or s.views == 1 and not contrasts, f"--views {s.views}: choose 2, or 1 for mae: contrast is between two")
    need(contrasts or reconstructs or denoises,
         f"--lambda_infonce {s.lambda_infonce:g} --lam {s.lam:g} --mask_ratio {s.mask_ratio:g} --sigma_max {s.sigma_max:g}: "
         "no loss is left to learn from")  # fmt: skip


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, machine, train, val (None without labels), {method: (its settings, its model on the CPU)}.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    methods = s.methods.split(",")
    need(len(METHODS.keys() & methods) == len(methods),
         f"--methods {s.methods}: choose can, simclr, mae, or several of them joined by commas")  # fmt: skip
    machine = start_machine(s.precision, s.workers)
    parts = {}
    for method in methods:
        own = replace(s, **method_row(method, s.data)) if len(methods) > 1 else s
        check_losses(own)
        model = new_model(own)
        check_masking(model.f.grid, own.mask_ratio)
        parts[method] = own, model
    train, val = load_splits(s.data, val=s.eval and not s.cost)
    epoch_images = s.epoch_images or len(train)
    check_batch(s, train, s.batch, s.epochs * epoch_images / len(train))
    need(epoch_images >= s.batch, f"--epoch_images {epoch_images} is less than the batch of {s.batch}")
    return s, machine, train, val, parts


def main(argv):
    """The methods of `--methods` one after the other; the closing table where the data has labels."""
    s, machine, train, val, parts = prepare(argv)
    run = open_run(s, machine)
    for method in list(parts):
        own, model = parts.pop(method)  # freed after its stage
        model.to(machine.device)
        path = run.folder / f"{method}.pt"
        if method in run.finished:  # before the run was resumed
            init_encoder(model.f, path)
        else:
            pretrain(run, method, model, train, own)
            if not s.cost:
                save_encoder(path, model.f)
                if s.methods.startswith(method):
                    save_encoder(run.folder / "encoder.pt", model.f)
                if model.decoder:
                    picture(path.with_suffix(".png"), model, val or train, own, machine)
        if val and method not in run.results:
            madds = multiply_adds(model, own.views) / 1e6
            run.report(method, evaluate(model.f, train, val, machine) | {"madds/M": madds})
    run.close()


if __name__ == "__main__":
    launch(main)
