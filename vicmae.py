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
  - Only the first frame is reconstructed (Eq. 6). Crop (0.5-1) and flip are all the augmentation (Table 6).
  - Negatives are both frames of the other videos of all ranks: 2N - 2, gathered with gradient.
  - Distant sampling takes one frame from each half; a gap takes the second within so many frames after the first.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from common import (
    BatchNorm, Colour, InputError, MAEDecoder, Run, RunSettings, View, adamw, augment, backward, batches, build_vit,
    check_batch, check_masking, draw, gather, init_encoder, launch, load_splits, load_videos, mae_loss, normalize,
    nt_xent, parameter_groups, parse_settings, print0, promote, random_masking, rank, reconstruct, save_encoder, start,
    to_bytes, uniform, warmup_cosine, world,
)  # fmt: skip
from eval import cached_probe, evaluate, features, knn


@dataclass
class Settings(RunSettings):
    """Defaults are those of Table 7, for ViT-B/16."""

    data: str = "moving_shapes"  # or a folder of videos, see common.load_videos
    images: str = ""  # labelled images on which the encoder is evaluated: video-to-image transfer
    model: str = "vit_b16"
    methods: str = "vicmae"  # trained one after the other; also mae, and Table 2's simsiam and vicreg

    epochs: float = 800
    batch: int = 4096
    lr: float = 1.5e-4  # at batch 256
    weight_decay: float = 0.05
    warmup_epochs: float = 40
    crop_min: float = 0.5  # area of the random crops, up to 1
    flip: bool = True
    contrast_weight: float = 0.025  # lambda
    contrast_from: float = 200  # epoch from which lambda counts

    gap: int = -1  # Table 4: frames; 0 is the same frame twice, -1 distant sampling
    pooling: str = "mean"  # Omega, Table 5: mean, max, gem
    color: bool = False  # Table 6: colours of the target's frame
    temperature: float = 0.1  # not printed; the authors' later code
    projector_last: bool = False  # a last linear layer behind the projector's ReLU
    reconstruct_both: bool = False  # the authors' later code; Eq. 6 has the first frame alone
    mask_ratio: float = 0.75  # not printed; MAE's
    norm_pix: bool = True  # He et al. 2022
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16


# The built-in run: small enough for two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, methods="mae,vicmae", images="shapes", decoder_dim=64, decoder_depth=2,
    decoder_heads=4, epochs=80, batch=200, lr=2e-3, warmup_epochs=8, contrast_from=20, contrast_weight=0.1,
)  # fmt: skip

# Table 6: jitter, gray and blur, whose strengths are not printed: chosen
COLOURS = Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)


def presets(given):
    """Field values for the flags given: the built-in run; under --cost the step of the later epochs."""
    row = dict(SHAPES) if given.get("data", "moving_shapes") == "moving_shapes" else {}
    if row and given.get("short"):
        row |= dict(epochs=20, warmup_epochs=2, contrast_from=5)
    if given.get("cost"):
        row |= dict(contrast_from=0)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class Branch(nn.Module):
    """Global pooling Omega and projector of a frame; predictor P and target T are this one module (3.1, 3.3).

    The projector is the appendix's: a linear layer to twice the width, then twice Linear-BatchNorm-ReLU. MAE + SimSiam adds
    a linear layer back to the encoder's width, where Eq. 2 compares.

    Args:
        dim: the encoder's width; pooling: mean, max, gem or cls; last: width of a last linear layer, or 0.
    """

    def __init__(self, dim, pooling, last=0):
        super().__init__()
        self.pooling = pooling
        if pooling == "gem":
            self.power = nn.Parameter(torch.tensor([3.0]))
        layers = [nn.Linear(dim, 2 * dim, bias=False)]
        for _ in range(2):
            layers += [nn.Linear(2 * dim, 2 * dim, bias=False), BatchNorm(2 * dim), nn.ReLU()]
        if last:
            layers.append(nn.Linear(2 * dim, last, bias=False))
        self.projector = nn.Sequential(*layers)

    def pool(self, tokens):
        """Omega (Table 5): tokens [N, 1 + K, D] → [N, D]."""
        cls, patches = tokens[:, 0], tokens[:, 1:]
        if self.pooling == "cls":
            return cls
        if self.pooling == "max":
            return patches.amax(1)
        return generalized_mean(patches, self.power) if self.pooling == "gem" else patches.mean(1)

    def forward(self, y):
        """Pooled features [N, D] → unit vectors."""
        return normalize(self.projector(y))


def generalized_mean(x, power):
    """(mean x^p)^(1/p) over the K tokens [N, K, D] (Radenović et al. 2018): p = 1 is the mean, p → ∞ the maximum."""
    with torch.autocast(x.device.type, enabled=False):
        x = promote(x).clamp(min=1e-6)
        top = x.amax(1, keepdim=True)  # so that no power overflows
        return ((x / top) ** power).mean(1) ** (1 / power) * top[:, 0]


# --------------------------------------------------------------------------------------------------------- losses


def simsiam(p_i, z_i, p_j, z_j):
    """Eq. 2, both ways: ||p_i − z_j||² = 2 (1 − p_i · z_j), averaged over this rank's rows; no gradient to z.

    p, z [N, D] of unit length: projected [CLS] of the frames i and j, and [CLS] itself.
    """
    distance = lambda p, z: 2 - 2 * (p * z.detach()).sum(1)
    return (distance(p_i, z_j) + distance(p_j, z_i)).mean() / 2


def vicreg(p, z, gamma=1.0, epsilon=1e-4, invariance=25.0, variance=25.0, covariance=1.0):
    """Eq. 3-5 over the global batch: p, z [N, d] of this rank, gathered from all with gradient.

    gamma is Eq. 3's target of the standard deviation; the weights (lambda, mu, nu of Eq. 5) and epsilon are VICReg's own.
    """
    p, z = gather(p), gather(z)
    v = lambda x: (gamma - (x.var(0) + epsilon).sqrt()).relu().mean()  # Eq. 3

    def c(x):  # Eq. 4
        centred = x - x.mean(0)
        cov = centred.T @ centred / (len(x) - 1)
        return (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]

    with torch.autocast(p.device.type, enabled=False):
        distance = (p - z).square().sum(1).mean()
        return invariance * distance + variance * (v(p) + v(z)) + covariance * (c(p) + c(z))


# ----------------------------------------------------------------------------------------------------------- loop


def pretrain(run, method, f, decoder, branch, videos):
    """L = L_MASK + lambda · L_NEG (3.3), or with one of 3.2's losses in its place; "mae" is MAE on random frames."""
    s = run.settings
    peak = s.lr * s.batch / 256  # A
    groups = parameter_groups(nn.ModuleList([f, decoder, branch]), peak, s.weight_decay)
    optimizer = adamw(groups, zero=s.zero)  # Table 7's momenta
    state = dict(encoder=f, decoder=decoder, branch=branch, optimizer=optimizer)
    patches = math.prod(f.grid)

    def encode(x, noise):
        """Frames [N, F, 3, S, S], noise [N, F, L] → the pooled features of the F frames, the loss of Eq. 6 [N]."""
        n, frames = x.shape[:2]
        x = x.flatten(0, 1)  # a video's frames side by side
        ids_keep, ids_restore, mask = random_masking(noise.flatten(0, 1), s.mask_ratio)
        tokens = f(x, ids_keep)  # [N · F, 1 + K, D]
        first = slice(None, None, 1 if s.reconstruct_both else frames)  # the first frame of each video
        loss = mae_loss(decoder(tokens[first], ids_restore[first]), x[first], mask[first], s.norm_pix)
        return branch.pool(tokens).unflatten(0, (n, frames)).unbind(1), loss.view(n, -1).mean(1)

    def contrast(y_i, y_j):
        p_i, p_j = branch(y_i), branch(y_j)  # BatchNorm over one frame of each video
        if method == "simsiam":
            return simsiam(p_i, normalize(y_i), p_j, normalize(y_j))
        return vicreg(p_i, p_j) if method == "vicreg" else nt_xent(p_i, p_j, s.temperature)  # Eq. 7

    videos = replace(videos, gap=0) if method == "mae" else videos  # one frame, from anywhere
    views = [View(s.image_size, (s.crop_min, 1.0), s.flip)] * (1 if method == "mae" else 2)
    for data in run.steps(method, videos, views, s.batch, s.epochs, state):
        key = (s.seed, method, run.step)
        weight = 0.0 if method == "mae" or run.epoch < s.contrast_from else s.contrast_weight  # Table 7's schedule
        x = [augment(data.views[0])]
        if method != "mae" and (weight or s.reconstruct_both):
            x.append(augment(data.views[1], COLOURS if s.color else None, uniform((*key, "colour"), data.rows, 13)))
        noise = uniform((*key, "mask"), data.rows, 2, patches, device=run.device)[:, : len(x)]

        def objective(y_i, y_j):
            loss = contrast(y_i, y_j)
            return weight * loss, loss.detach()

        inputs = (torch.stack(x, 1), noise)
        loss, negative = backward(encode, objective if weight else None, inputs, s.micro_batch, run.precision)
        factor = warmup_cosine(run.step, run.total, s.warmup_epochs * run.per_epoch)
        run.optimize(optimizer, loss, dict(contrast=negative) if weight else {}, factor)


# ----------------------------------------------------------------------------------------------------------- main


def report(run, name, encoder, images, videos, frames=4):
    """Video-to-image transfer, by mean-pooled patches (`knn`, `probe`, …) and by [CLS]; linear probes of videos, by the
    mean of some frames' features, on the object and on its motion. Into results.json under `name`."""
    values = {}
    if images:
        values = evaluate(encoder, *images, run)
        sets = [t for split in images for t in features(encoder, split, run, pool="cls")]
        values |= dict(knn_cls=knn(*sets)["knn"], probe_cls=cached_probe(*sets)["probe"])
    if videos:
        sets = [features(encoder, v.stills(frames), run) for v in videos]
        x, test_x = (x.unflatten(0, (-1, frames)).mean(1) for x, _ in sets)
        values["video_object"] = cached_probe(x, sets[0][1][::frames], test_x, sets[1][1][::frames])["probe"]
        if videos[0].motions is not None:
            motions = [v.motions.to(run.device) for v in videos]
            values["video_motion"] = cached_probe(x, motions[0], test_x, motions[1])["probe"]
    if values:
        run.report(name, values)


@torch.no_grad()
def picture_pairs(path, encoder, decoder, videos, run):
    """Eight pairs of frames, what the encoder sees of them, and the decoder's reconstructions."""
    s, views = run.settings, [View(run.settings.image_size, (1.0, 1.0), flip=False)] * 2
    count = min(8, len(videos) // world()) * world()  # this rank's part of it is drawn
    data = next(batches(videos, views, count, 0, 1, s.seed, run.device, 0, run.skipped))
    noise = uniform((s.seed, "picture"), data.rows, 2, math.prod(encoder.grid), device=run.device)
    rows = []
    for frame, view, n in zip("ij", data.views, noise.unbind(1)):
        x = augment(view)
        masked, restored = reconstruct(encoder, decoder, x, n, s.mask_ratio, s.norm_pix)
        rows += [(f"frame {frame}", x), (f"{s.mask_ratio:.0%} removed", masked), ("reconstruction", restored)]
    draw(path, [(caption, to_bytes(v), None) for caption, v in rows])


def models(s, method):
    """Encoder, decoder and branch of a method, alike for all methods of a seed."""
    torch.manual_seed(s.seed)
    encoder = build_vit(s.model, s.image_size, "mean")
    encoder.checkpoint_blocks = s.checkpoint_blocks
    if s.init:
        init_encoder(encoder, s.init)
    decoder = MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, s.decoder_dim, s.decoder_depth, s.decoder_heads)
    if method == "simsiam":
        return encoder, decoder, Branch(encoder.dim, "cls", last=encoder.dim)
    pooling = "cls" if method == "vicreg" else s.pooling
    return encoder, decoder, Branch(encoder.dim, pooling, last=2 * encoder.dim if s.projector_last else 0)


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, device, training videos, (training, validation) videos and images to evaluate on, or None.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    methods = s.methods.split(",")
    if not set(methods) <= {"mae", "simsiam", "vicreg", "vicmae"} or len(set(methods)) < len(methods):
        raise InputError(f"--methods {s.methods}: choose some of mae,simsiam,vicreg,vicmae")
    if s.pooling not in ("mean", "max", "gem"):
        raise InputError(f"--pooling {s.pooling}: choose mean, max or gem")
    if not s.mask_ratio:
        raise InputError("--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    if s.contrast_from >= s.epochs and methods != ["mae"]:
        raise InputError(f"--contrast_from {s.contrast_from:g} leaves no epoch of {s.epochs:g} to the contrast: choose fewer")
    device = start()
    check_masking(models(s, methods[0])[0].grid, s.mask_ratio)
    train, val = load_splits(s.data, val=not s.cost, load=load_videos)
    train.gap = s.gap
    check_batch(s, train, s.batch, s.epochs)
    images = None
    if s.images and not s.cost:
        images = load_splits(s.images, labels=True)
        if images[1] is None:
            raise InputError(f"--images {s.images}: there is no val/ or test/ to evaluate on")
    return s, device, train, (train, val) if val else None, images


def main(argv):
    """Each method's training, evaluation and picture, and the closing table."""
    s, device, train, videos, images = prepare(argv)
    run = Run(s, device)
    if not images and not videos and not s.cost:
        print0("nothing will be evaluated: --images names labelled images, or the videos need labels and a val/ folder")
    for method in s.methods.split(","):
        encoder, decoder, branch = (m.to(device) for m in models(s, method))
        path, done = run.folder / f"{method}.pt", method in run.finished
        pretrain(run, method, encoder, decoder, branch, train)
        if done:  # in the run that is resumed
            init_encoder(encoder, path)
        elif rank() == 0 and not s.cost:
            save_encoder(path, encoder)
            picture_pairs(run.folder / f"{method}.png", encoder, decoder, train, run)
        if method not in run.results and not s.cost:
            report(run, method, encoder, images, videos)
    if rank() == 0:
        save_encoder(run.folder / "encoder.pt", encoder)  # the last method's
    run.close()


if __name__ == "__main__":
    launch(main)
