"""ViC-MAE: Visual Representation Learning from Unlabeled Video using Contrastive Masked Autoencoders (Hernandez et al.,
arXiv 2303.12001).

Two distant frames of a video show the same things from elsewhere and later: the augmentation that contrast needs. ViC-MAE
  samples two frames, one from either half of the video, and masks each by a mask of its own,
  reconstructs the removed patches of the first (Eq. 6), and
  pools the local features that learn to reconstruct into one feature of the frame, which is to be like the other frame's
  and unlike those of other videos (Eq. 7); this loss joins when the local features are good, at a quarter of the training.
The encoder is one for single images; what it learned from videos is judged on images.

    python vicmae.py                                                    # MAE on frames and ViC-MAE on built-in videos
    torchrun --nproc_per_node 8 vicmae.py --data /path/to/kinetics --images /path/to/imagenet
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 vicmae.py --data /path/to/kinetics

Easy to get wrong:
  - The feature that is contrasted is the pooled patches, not [CLS], which ViC-MAE neither contrasts nor reconstructs.
  - Both branches share encoder and projector, and both get the gradient: there is no momentum encoder, no stop-gradient.
  - The projector ends in a ReLU (A); vectors of unit length with no negative entry are never more than at right angles.
  - Only the first frame is reconstructed (Eq. 6). Crop (0.5-1) and flip are all the augmentation (Table 7).
  - Negatives are both frames of the other videos of all ranks: 2N - 2, gathered with gradient.
  - Distant sampling takes one frame from each half; a gap takes the second within so many frames after the first.

Tables and figures, by flags of this program, and by eval.py with --encoder and --data besides; · separates runs, | values.
Trained on Kinetics-400 or Moments in Time; Top-5 is printed beside Top-1. The feature is the patches' mean; the paper's is
[CLS] (A): eval.py's --pool cls.
  Table 1        --methods mae|vicmae · ImageNet: eval.py finetune --recipe vicmae
                 · from scratch, by a recipe that is chosen: eval.py finetune --recipe vicmae --scratch vit_b16 --layer_decay 1
                 · Kinetics: eval.py video; TubeViT is quoted
  Table 2        --methods simsiam|vicreg|vicmae · eval.py probe --recipe vicmae
  Table 3        --methods mae|vicmae · eval.py transfer --sets food101 cifar10 cifar100 sun397 fgvcaircraft voc2007 dtd
                 oxfordiiitpet caltech101 flowers102; Birdsnap and Cars are folders
  Table 4        --gap 0|2|4|8|-1 · eval.py probe --recipe vicmae
  Table 5        --pooling gem|max|mean · eval.py probe --recipe vicmae
  Table 6        --color --crop_min 1 --no_flip · --no_color|--color · eval.py probe --recipe vicmae
  Table 7        The settings.
  Tables 8, 9    The recipes vicmae of eval.py's finetune and probe; its video has Table 8's without augmentation.
  Table 10       --methods simsiam|vicreg|vicmae
                 · eval.py finetune --recipe vicmae_subset --fraction 0.05|0.1|0.25|0.5|0.75|1
  Figures 1, 2   Drawings.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from common import (
    BatchNorm, BatchSize, Colour, Count, FromMinusOne, Number, Positive, Ratio, RunSettings, Share, Stills, Training,
    View, Whole, adamw, augment, backward, check_batch, check_masking, draw_rows, gather, init_encoder,
    init_weights, launch, load_splits, load_videos, mae_loss, mlp_head, need, new_decoder, new_encoder, normalize,
    nt_xent, open_run, parameter_groups, parse_settings, print0, promote, random_masking, reconstruction_rows,
    save_encoder, set_lr, some_crops, start_machine, uniform, warmup_cosine,
)  # fmt: skip
from eval import cached_probe, evaluate, features, knn


@dataclass
class Settings(RunSettings):
    """Defaults are those of Table 7, for ViT-B/16."""

    data: str = "moving_shapes"  # or a folder of videos, see common.load_videos
    images: str = ""  # labelled images on which the encoder is evaluated: video-to-image transfer
    model: str = "vit_b16"
    methods: str = "vicmae"  # trained one after the other; also mae, and Table 2's simsiam and vicreg

    epochs: Positive = 800  # over the training images
    batch: BatchSize = 4096  # global: of all processes together; Section 4 says 512
    lr: Positive = 1.5e-4  # learning rate at batch 256
    weight_decay: Number = 0.05  # AdamW's, of all but biases and norms
    warmup_epochs: Number = 40  # in which the learning rate rises
    crop_min: Share = 0.5  # area of the random crops, up to 1; 1: the largest central square. Each frame has its own
    flip: bool = True  # half of the frames are mirrored, each for itself, as in the later code; the paper is silent
    contrast_weight: Number = 0.025  # lambda, the weight of the contrast
    mask_weight: Number = 1.0  # weight of L_MASK
    contrast_from: Number = 200  # epoch from which lambda counts

    gap: FromMinusOne = -1  # frames between those of a pair, Table 4; 0 is the same frame twice, -1 distant sampling
    pooling: Literal["mean", "max", "gem"] = "mean"  # of the patches: Omega, Table 5
    color: bool = False  # the target's frame changes its colours: Table 6
    authors_color: bool = False  # instead: the colours of the later code, of both frames
    temperature: Positive = 0.1  # not printed; the authors' later code
    authors_projector: bool = False  # the later code's, see Branch
    reconstruct_both: bool = False  # the authors' later code; Eq. 6 has the first frame alone
    mask_ratio: Ratio = 0.75  # not printed; MAE's; the later code: 0.5
    norm_pix: bool = True  # targets are normalised patch by patch; He et al. 2022
    decoder_dim: Count = 512  # width of the pixel decoder
    decoder_depth: Whole = 8  # its blocks
    decoder_heads: Count = 16  # its attention heads


# The built-in run: small enough for minutes on two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, methods="mae,vicmae", images="shapes", decoder_dim=64, decoder_depth=2,
    decoder_heads=4, epochs=32, batch=200, lr=2e-3, warmup_epochs=3.2, contrast_from=8, contrast_weight=0.1,
)  # fmt: skip

# The authors' later code, where it is not this paper's; λ counts from the start. Not here: its BatchNorm is each GPU's own,
# and so is its count of samples, by which those at one's place on other GPUs are positives too
AUTHORS = dict(
    mask_ratio=0.5, reconstruct_both=True, contrast_weight=0.03, mask_weight=0.97, contrast_from=0, crop_min=0.08,
    authors_color=True, authors_projector=True,
)  # fmt: skip

# Table 6: jitter, gray and blur, whose strengths are not printed: chosen
COLOURS = Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)
# The later code's of the two frames
AUTHORS_COLOURS = [replace(COLOURS, p_blur=1.0), replace(COLOURS, p_blur=0.0, p_solarize=0.2)]


def presets(given):
    """Field values for the flags given: the built-in run; under --cost the step of the later epochs."""
    row = AUTHORS if given.get("authors") else {}
    if given.get("data", "moving_shapes") == "moving_shapes":
        row = row | SHAPES
        if given.get("short"):
            row |= dict(epochs=8, warmup_epochs=0.8, contrast_from=2)
    if given.get("cost"):
        row = row | dict(contrast_from=0)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class Branch(nn.Module):
    """Global pooling Omega and projector of a frame; predictor P and target T are this one module (3.1, 3.3).

    The projector is the appendix's: a linear layer to twice the width, then twice Linear-BatchNorm-ReLU. MAE + SimSiam adds
    a linear layer back to the encoder's width, where Eq. 2 compares.

    Args:
        dim: the encoder's width; pooling: mean, max, gem or cls; last: width of a last linear layer, or 0.
        authors: the later code's projector instead, of widths 4096, 4096, 128, with xavier-uniform weights.
    """

    def __init__(self, dim, pooling, last=0, authors=False):
        super().__init__()
        self.pooling = pooling
        if pooling == "gem":
            self.power = nn.Parameter(torch.tensor([3.0]))
        wide = 2 * dim
        if authors:
            first = [nn.Linear(dim, 4096), BatchNorm(4096), nn.ReLU()]
            second = [nn.Linear(4096, 4096), BatchNorm(4096), nn.ReLU()]
            layers = [*first, *second, nn.Linear(4096, 128)]
        else:
            layers = [nn.Linear(dim, wide, bias=False), *mlp_head(wide, wide, wide, last_norm=True), nn.ReLU()]
        if last:
            layers.append(nn.Linear(wide, last, bias=False))
        self.projector = nn.Sequential(*layers)
        if authors:
            self.projector.apply(init_weights)

    def pool(self, tokens):
        """Omega (Table 5): tokens [N, 1 + K, D] → [N, D]."""
        cls, patches = tokens[:, 0], tokens[:, 1:]
        if self.pooling == "cls":
            return cls
        if self.pooling == "max":
            return patches.amax(1)
        if self.pooling == "gem":
            return generalized_mean(patches, self.power)
        return patches.mean(1)

    def forward(self, y):
        """Pooled features [N, D] → unit vectors."""
        return normalize(self.projector(y))


def generalized_mean(x, power):
    """(mean x^p)^(1/p) over the K tokens [N, K, D] (Radenović et al. 2018): p = 1 is the mean, p → ∞ the maximum."""
    with torch.autocast(x.device.type, enabled=False):
        x = promote(x).clamp(min=1e-6)
        top = x.amax(1, keepdim=True)  # so that no power overflows
        return ((x / top) ** power).mean(1) ** (1 / power) * top[:, 0]


def models(s, method):
    """Encoder, decoder and branch of a method, alike for all methods of a seed."""
    torch.manual_seed(s.seed)
    encoder = new_encoder(s, "mean")
    decoder = new_decoder(encoder, s)
    pooling = "cls" if method in ("simsiam", "vicreg") else s.pooling
    last = encoder.dim if method == "simsiam" else 0
    return encoder, decoder, Branch(encoder.dim, pooling, last, s.authors_projector and method == "vicmae")


# --------------------------------------------------------------------------------------------------------- losses


def simsiam(p_i, z_i, p_j, z_j):
    """Eq. 2, both ways: ||p_i − z_j||² = 2 (1 − p_i · z_j), averaged over this rank's rows; no gradient to z.

    p, z [N, D] of unit length: projected [CLS] of the frames i and j, and [CLS] itself.
    """
    i_to_j = 2 - 2 * (p_i * z_j.detach()).sum(1)
    j_to_i = 2 - 2 * (p_j * z_i.detach()).sum(1)
    return (i_to_j + j_to_i).mean() / 2


def vicreg(p, z, gamma=1.0, epsilon=1e-4, invariance=25.0, variance=25.0, covariance=1.0):
    """Eq. 3-5 over the global batch: p, z [N, d] of this rank, gathered from all with gradient.

    gamma is Eq. 3's target of the standard deviation; the weights (lambda, mu, nu of Eq. 5) and epsilon are VICReg's own.
    """

    def v(x):  # Eq. 3
        return (gamma - (x.var(0) + epsilon).sqrt()).relu().mean()

    def c(x):  # Eq. 4
        centred = x - x.mean(0)
        cov = centred.T @ centred / (len(x) - 1)
        return (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]

    p, z = gather(p), gather(z)
    with torch.autocast(p.device.type, enabled=False):
        distance = (p - z).square().sum(1).mean()
        return invariance * distance + variance * (v(p) + v(z)) + covariance * (c(p) + c(z))


# ----------------------------------------------------------------------------------------------------------- loop


def pretrain(run, method, f, decoder, branch, videos):
    """L = L_MASK + lambda · L_NEG (3.3), or with one of 3.2's losses in its place; "mae" is MAE on random frames."""
    s = run.settings
    device = run.machine.device
    pair = method != "mae"
    if not pair:
        videos = replace(videos, gap=0)  # one frame, from anywhere
    views = [View(s.image_size, (s.crop_min, 1.0), s.flip)] * (2 if pair else 1)
    colours = AUTHORS_COLOURS if s.authors_color else [None, COLOURS if s.color else None]
    peak = s.lr * s.batch / 256  # A
    groups = parameter_groups(nn.ModuleList([f, decoder, branch]), peak, s.weight_decay)
    optimizer = adamw(groups, zero=s.zero)  # Table 7's momenta
    state = dict(encoder=f, decoder=decoder, branch=branch, optimizer=optimizer)

    def encode(x, noise):
        """Frames [N, F, 3, S, S], noise [N, F, L] → the pooled features of the F frames; then the loss of Eq. 6 [N]."""
        n, frames = x.shape[:2]
        x = x.flatten(0, 1)  # a video's frames side by side
        ids_keep, ids_restore, mask = random_masking(noise.flatten(0, 1), s.mask_ratio)
        tokens = f(x, ids_keep)  # [N · F, 1 + K, D]
        yield branch.pool(tokens).unflatten(0, (n, frames)).unbind(1)
        step = 1 if s.reconstruct_both else frames  # every frame, or the first of each video
        loss = mae_loss(decoder(tokens[::step], ids_restore[::step]), x[::step], mask[::step], s.norm_pix)
        yield s.mask_weight * loss.view(n, -1).mean(1)

    def objective(y_i, y_j):
        p_i, p_j = branch(y_i), branch(y_j)  # BatchNorm over one frame of each video
        if method == "simsiam":
            loss = simsiam(p_i, normalize(y_i), p_j, normalize(y_j))
        elif method == "vicreg":
            loss = vicreg(p_i, p_j)
        else:
            loss = nt_xent(p_i, p_j, s.temperature)  # Eq. 7
        return s.contrast_weight * loss, dict(contrast=loss.detach())  # `backward` adds L_MASK

    training = Training(run, method, state, len(videos), s.batch, s.epochs)
    for data in training.batches(videos, views):
        key = (s.seed, method, training.step)
        contrasts = pair and s.contrast_weight > 0 and training.epoch >= s.contrast_from  # Table 7's schedule
        x = [augment(data.views[0], colours[0], uniform((*key, "first colour"), data.rows, 13))]
        if contrasts or pair and s.reconstruct_both:
            x.append(augment(data.views[1], colours[1], uniform((*key, "colour"), data.rows, 13)))
        noise = uniform((*key, "mask"), data.rows, 2, math.prod(f.grid), device=device)[:, : len(x)]

        # in one piece: y, L_MASK = encode(*inputs); loss = objective(*y)[0] + L_MASK.mean(); loss.backward()
        inputs = (torch.stack(x, 1), noise)
        loss, aux = backward(encode, objective if contrasts else None, inputs, s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup_epochs * training.per_epoch))
        _, log = training.take_step(optimizer, loss, **(aux or {}))
        training.log(log)
        training.save_if_due()


# ----------------------------------------------------------------------------------------------------------- main


def report(run, name, encoder, images, videos, frames=4):
    """Video-to-image transfer, by mean-pooled patches (`knn`, `probe`, …) and by [CLS]; linear probes of videos, by the
    mean of some frames' features, on the object and on its motion. Into results.json under `name`."""
    machine = run.machine
    values = {}
    if images:
        train, val = images
        values = evaluate(encoder, train, val, machine)
        sets = *features(encoder, train, machine, pool="cls"), *features(encoder, val, machine, pool="cls")
        values["knn_cls"] = knn(*sets)["knn"]
        values["probe_cls"] = cached_probe(*sets)["probe"]
    if videos:
        (x, y), (test_x, test_y) = (features(encoder, Stills(v, frames), machine) for v in videos)
        x, test_x = (t.unflatten(0, (-1, frames)).mean(1) for t in (x, test_x))
        values["video_object"] = cached_probe(x, y[::frames], test_x, test_y[::frames])["probe"]
        if videos[0].motions is not None:
            y, test_y = (v.motions.to(x.device) for v in videos)
            values["video_motion"] = cached_probe(x, y, test_x, test_y)["probe"]
    if values:
        run.report(name, values)


@torch.no_grad()
def picture_pairs(path, encoder, decoder, videos, run):
    """Eight pairs of frames, first i, then j: each, what the encoder sees of it, the decoder's reconstruction."""
    s = run.settings
    views = [View(s.image_size, (1.0, 1.0), flip=False)] * 2
    data = some_crops(videos, views, s.seed, run.machine)
    noise = uniform((s.seed, "picture"), data.rows, 2, math.prod(encoder.grid), device=run.machine.device)
    rows = []
    for view, n in zip(data.views, noise.unbind(1)):
        rows += reconstruction_rows(encoder, decoder, augment(view), n, s.mask_ratio, s.norm_pix)
    draw_rows(path, rows, caption="three rows of frames i, then three of frames j of the same videos")


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, machine, training videos, (training, validation) videos and images to evaluate on, or None.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    methods = s.methods.split(",")
    need(len({"mae", "simsiam", "vicreg", "vicmae"} & set(methods)) == len(methods),
         f"--methods {s.methods}: choose some of mae,simsiam,vicreg,vicmae")  # fmt: skip
    need(s.mask_ratio, "--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    need(s.contrast_from < s.epochs or methods == ["mae"],
         f"--contrast_from {s.contrast_from:g} leaves no epoch of {s.epochs:g} to the contrast: choose fewer")  # fmt: skip
    machine = start_machine(s.precision, s.workers)
    encoder, _, _ = models(s, methods[0])
    check_masking(encoder.grid, s.mask_ratio)
    judged = s.eval and not s.cost
    train, val = load_splits(s.data, val=judged, load=load_videos, gap=s.gap)
    check_batch(s, train, s.batch, s.epochs)
    images = None
    if s.images and judged:
        images = load_splits(s.images, labels=True)
        need(images[1], f"--images {s.images}: there is no val/, validation/ or test/ to evaluate on")
    return s, machine, train, (train, val) if val else None, images


def main(argv):
    """Each method's training, evaluation and picture, and the closing table."""
    s, machine, train, videos, images = prepare(argv)
    run = open_run(s, machine)
    if s.eval and not (images or videos or s.cost):
        print0("nothing will be evaluated: --images names labelled images, or the videos need labels and a val/ folder")
    for method in s.methods.split(","):
        encoder, decoder, branch = (m.to(machine.device) for m in models(s, method))
        path = run.folder / f"{method}.pt"
        if method in run.finished:  # before the run was resumed
            init_encoder(encoder, path)
        else:
            pretrain(run, method, encoder, decoder, branch, train)
            if not s.cost:
                save_encoder(path, encoder)
                picture_pairs(path.with_suffix(".png"), encoder, decoder, train, run)
        if method not in run.results and not s.cost:
            report(run, method, encoder, images, videos)
    save_encoder(run.folder / "encoder.pt", encoder)  # the last method's
    run.close()


if __name__ == "__main__":
    launch(main)
