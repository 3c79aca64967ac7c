"""MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations (Alkin et al., arXiv 2402.10093).

The last blocks of a masked image model help its small decoder, so its best features lie in the middle. MIM-Refiner tunes
them with an ensemble of instance discrimination (ID) heads, one behind each of the later blocks, in three stages:
  mae     a masked autoencoder, unless a trained encoder is given with --init (as in the paper: MAE or data2vec 2.0)
  heads   train all ID heads (projector, predictor, queue) on the frozen encoder
  refine  train encoder and heads; the loss of a head is Nearest Neighbor Alignment (Eq. 1-2) of the views of a multi-crop:
          an anchor is drawn to the nearest neighbour of its positive, and pushed from the other samples as they are
What is kept is an EMA of the encoder, which the training itself never uses.

    python mim_refiner.py                                               # all of it on built-in data, in minutes
    torchrun --nproc_per_node 8 mim_refiner.py --data /path/to/imagenet --model vit_l16 --init mae_pretrain_vit_large.pth \
        --micro_batch 32
    torchrun --nproc_per_node 8 mim_refiner.py --data /path/to/imagenet --model vit_l16 --mim data2vec2 --init stripped.pt
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 mim_refiner.py --data ... \
        --model vit_h14 --init mae_pretrain_vit_huge.pth --micro_batch 8

Easy to get wrong:
  - Every view but the positive's own is an anchor: 2 * 1 global and 2 * 10 local, 22 pairs of views, all with equal weight.
  - The positive is NN(z) of a global view, the negatives are z itself, without gradient; the anchor p has the gradient.
  - One BatchNorm batch for all 12 views of both resolutions and all ranks, not one for each view as in MAE-CT.
  - Heads read [CLS] of raw block outputs; only the last block's goes through the final norm of a pre-norm ViT first.
  - There is no EMA projector: the queue is looked up and fed with projections of the head in training, view 0's alone.
  - Queues pass from stage heads to stage refine. The lookup is top-1 in the former, one of the 20 nearest in the latter.
  - lr = base * batch / 256 (authors' code): the 12 views do not count.
  - Local crops see the full grid's position table, interpolated.
  - k-NN takes the feature before the final norm, standardised (authors' code); a linear probe the one behind it.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from common import (
    BYOL, VIT_SIZES, BatchNorm, Colour, InputError, MAEDecoder, Queue, Run, RunSettings, View, adamw, augment, backward,
    build_vit, check_batch, check_masking, draw_curves, ema_update, frozen_copy, gather, init_encoder, launch,
    load_splits, normalize, parameter_groups, parse_settings, pretrain_mae, print0, promote, rank, save_encoder, start,
    uniform, warmup_cosine,
)  # fmt: skip
from eval import evaluate, knn_per_block


@dataclass
class Settings(RunSettings):
    """Defaults are those of an MAE ViT-L/16; `presets` holds what differs for other models."""

    model: str = "vit_l16"
    mim: str = "mae"  # the masked image model that is refined: mae (pre-norm blocks) or data2vec2 (post-norm)

    # heads: B.2, and the authors' code for what it leaves open
    heads: int = 8  # behind the last blocks, one each: 8 (L, 2B) or 12 (H), A.1; Table 1a
    head_blocks: str = ""  # any other set of blocks, counted from 1: "20,24" or "17-24" (Tables 1b, 6)
    projector_hidden: int = 2048
    predictor_hidden: int = 4096
    head_dim: int = 256
    queue: int = 65536
    authors_head: bool = False  # Linear-BN-GELU; B.2 lists GELU before BatchNorm

    # refinement: Table 10
    epochs: float = 30  # MAE L, H; 20 for MAE 2B and data2vec 2.0
    batch: int = 1024  # 512 for H and 2B
    lr: float = 4e-4  # at batch 256
    warmup_epochs: float = 4
    layer_decay: float = 0.65
    frozen: int = 0  # lower blocks; 6 for 2B
    weight_decay: float = 0.05
    ema: float = 0.9999  # of the encoder
    head_weight_decay: float = 1e-5
    temperature: float = 0.2  # 0.3 for H, 0.35 for 2B
    k: int = 20  # the neighbour is one of them at random
    global_scale_min: float = 0.25  # area of the 2 global views; that of local views lies below
    local_views: int = 10  # 0: no multi-crop (Table 1f)
    local_size: int = 96  # pixels; 98 for patches of 14
    local_scale_min: float = 0.05
    color: bool = True  # A.2: --no_color for crop and flip alone, half the epochs

    # head initialisation: B.3, all else as above
    head_epochs: float = 20
    head_lr: float = 2e-4

    # ablations
    swap_negatives: bool = False  # Table 1e: NNCLR, negatives too are nearest neighbours
    authors_loss: bool = False  # softmax over predictions of a fixed neighbour, as in the authors' code
    schedule: str = "constant"  # Table 1c, C.11: uniform_decay, staggered_decay, staggered_step, one_hot

    # MAE pre-training, where no encoder is given: He et al. 2022, Table 8
    mae_epochs: float = 1600
    mae_batch: int = 4096
    mae_lr: float = 1.5e-4
    mae_warmup_epochs: float = 40
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    knn_every: int = 5  # epochs between k-NN of the heads' blocks with a tenth of the data (Appendix E)


# Table 10: Large, Huge and 2B, whatever the patch size
TABLE_10 = {
    "l": dict(heads=8),
    "h": dict(heads=12, batch=512, temperature=0.3),
    "2b": dict(heads=8, epochs=20, batch=512, temperature=0.35, frozen=6),
}
# The built-in run: small enough for two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, decoder_dim=64, decoder_depth=2, decoder_heads=4,
    mae_epochs=20, mae_batch=256, mae_lr=2e-3, mae_warmup_epochs=2,
    heads=4, projector_hidden=256, predictor_hidden=512, head_dim=128, queue=4096,
    batch=256, head_epochs=3, head_lr=2e-3, warmup_epochs=1, epochs=8, lr=2e-3, layer_decay=0.8, ema=0.97,
    local_views=4, local_size=24, knn_every=2,
)  # fmt: skip

GLOBAL_COLOURS = BYOL  # Table 10: "see BYOL"
LOCAL_COLOURS = Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)  # the authors' code


def presets(given):
    """Field values for the flags given: the model's columns of Table 10, the built-in run, A.2."""
    size, patch = re.match(r"(?:vit_(2b|\D+)(\d*))?", given.get("model", "vit_l16")).groups()
    row = dict(TABLE_10.get(size) or dict(heads=VIT_SIZES.get(size, (0, 24))[1] // 3))  # other sizes: the last third
    if given.get("mim") == "data2vec2":
        row |= dict(epochs=20)
    if patch == "14":
        row |= dict(local_size=98)
    if given.get("data", "shapes") == "shapes":
        row |= SHAPES
        if given.get("short"):
            row |= dict(mae_epochs=8, mae_warmup_epochs=1, head_epochs=1, epochs=3)
    if not given.get("color", True):
        row |= dict(epochs=row.get("epochs", Settings.epochs) / 2)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class HeadLinear(nn.Module):
    """H linear layers side by side, [H, N, in] → [H, N, out], as one batched matrix product; xavier-uniform, biases 0."""

    def __init__(self, heads, dim_in, dim_out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim_out, dim_in))
        self.bias = nn.Parameter(torch.zeros(heads, dim_out)) if bias else None
        for w in self.weight:
            nn.init.xavier_uniform_(w)

    def forward(self, x):
        x = x @ self.weight.mT
        return x if self.bias is None else x + self.bias[:, None]


def head_mlp(heads, *dims, batch_norm_first):
    """Linear-GELU-BatchNorm, …, Linear-BatchNorm for H heads at once (B.2); dims are widths from input to output."""
    layers = []
    for i, o in zip(dims, dims[1:-1]):
        between = [nn.GELU(), BatchNorm(heads, o)]
        layers += [HeadLinear(heads, i, o), *(reversed(between) if batch_norm_first else between)]
    return nn.Sequential(*layers, HeadLinear(heads, *dims[-2:], bias=False), BatchNorm(heads, dims[-1]))


class IDHeads(nn.Module):
    """Projectors, predictors and queues of H heads (B.2) as one module: a step has as many collectives for 8 as for 1."""

    def __init__(self, heads, dim, s):
        super().__init__()
        first = s.authors_head
        hidden = s.projector_hidden
        self.projector = head_mlp(heads, dim, hidden, hidden, s.head_dim, batch_norm_first=first)
        self.predictor = head_mlp(heads, s.head_dim, s.predictor_hidden, s.head_dim, batch_norm_first=first)
        self.Q = Queue(s.queue, heads, s.head_dim)

    def loss(self, y, index, labels, dice, s, k):
        """The NNA loss of each head, averaged over the pairs of views.

        y [N, V, H, D]: features of all views, the 2 global ones first; index, labels [N]; dice [N, 2] in [0, 1) for the
        top-k sampling, common to the heads; s: Settings; k neighbours to choose from.

        Returns:
            losses [H], and a dict: z [H, N, d] of view 0 for the queue, and nn_accuracy [H], the share of neighbours that
            are of the sample's class (Appendix E; of meaning where there are labels).
        """
        n, views = y.shape[:2]
        projected = self.projector(y.flatten(0, 1).transpose(0, 1))  # [H, N · V, d], one BatchNorm batch
        p = normalize(self.predictor(projected)).unflatten(1, (n, views))  # [H, N, V, d]
        z = normalize(projected.detach()).unflatten(1, (n, views))[:, :, :2].flatten(1, 2)  # [H, N · 2, d]
        at = self.Q.lookup(z, index.repeat_interleave(2), k, dice.flatten().expand(len(z), -1))  # Eq. 2: [H, N · 2]
        nn_z = self.Q.embeddings.gather(1, at[..., None].expand_as(z))
        nn_accuracy = (self.Q.labels[at] == labels.repeat_interleave(2)).float().mean(1)
        z, nn_z = z.unflatten(1, (n, 2)), nn_z.unflatten(1, (n, 2))
        losses = nearest_neighbor_alignment(p, z, nn_z, s.temperature, s.swap_negatives, s.authors_loss)
        return losses, dict(z=z[:, :, 0], nn_accuracy=nn_accuracy)


# ----------------------------------------------------------------------------------------------------------- loss


def nearest_neighbor_alignment(p, z, nn_z, temperature, swap_negatives=False, authors_loss=False):
    """Eq. 1 for all pairs (i, j ≠ i) of a global view i and another view j:

        −log( e^{NN(z_in)·p_jn/τ} / ( e^{NN(z_in)·p_jn/τ} + Σ_{m≠n} e^{SG(z_im)·p_jn/τ} ) ),  m over the global batch.

    All rows have unit length. With `swap_negatives` NN(z_im) takes the place of z_im (NNCLR). With `authors_loss` the sum
    goes over predictions of other samples instead, e^{SG(z_in)·p_jm/τ}, with their gradient.

    Args:
        p [H, N, V, d]: predictions of this rank's samples, with gradient, the two global views first.
        z, nn_z [H, N, 2, d]: projections of the global views and their nearest neighbours, without gradient.
    Returns:
        losses [H], averaged over this rank's samples and the 2 · (V − 1) pairs.
    """
    n = p.shape[1]
    own = (torch.arange(n, device=p.device) + rank() * n).view(1, n, 1, 1)
    everyone = lambda x: gather(x.transpose(0, 1)).transpose(0, 1)  # samples of all ranks: [H, M, …]
    but = lambda x, i: torch.cat([x[:, :, :i], x[:, :, i + 1 :]], 2)  # all views but one
    with torch.autocast(p.device.type, enabled=False):
        p, negatives = promote(p), promote(nn_z if swap_negatives else z)
        columns = everyone(p if authors_loss else negatives)
        losses = []
        for i in (0, 1):
            if authors_loss:
                logits = torch.einsum("hnd,hmvd->hnvm", negatives[:, :, i], but(columns, i))
            else:
                logits = torch.einsum("hnvd,hmd->hnvm", but(p, i), columns[:, :, i])
            positive = (but(p, i) * nn_z[:, :, i, None]).sum(-1, keepdim=True)  # [H, N, V − 1, 1]
            logits = logits.scatter(-1, own.expand_as(positive), positive) / temperature
            losses.append((logits.logsumexp(-1, keepdim=True) - positive / temperature).mean((1, 2, 3)))
    return (losses[0] + losses[1]) / 2


def _fall(progress, begin):
    """1, and from `begin` on half a cosine down to 0 at the end of the training."""
    return 0.5 * (1 + math.cos(math.pi * max(0.0, progress - begin) / (1 - begin)))


# Table 1c, C.11: a head's weight at a fraction t of the training. Of 20 epochs, the turns of the 7 heads below the last
# begin at epochs 4, 6, … 16, and a turn lasts two; other lengths and numbers of heads in proportion.
SCHEDULES = {
    "constant": lambda t, turn, next_turn: 1.0,
    "uniform_decay": lambda t, turn, next_turn: _fall(t, 0.2),
    "staggered_decay": lambda t, turn, next_turn: _fall(t, turn),
    "staggered_step": lambda t, turn, next_turn: float(t < turn),
    "one_hot": lambda t, turn, next_turn: 0.1 if t < turn else float(t < next_turn),
}


def head_weights(schedule, progress, heads):
    """Loss weights of the heads, a list, at a fraction `progress` of the training; the last block's is 1 throughout."""
    turn = lambda h: 0.2 + 0.6 * h / max(heads - 2, 1)
    return [SCHEDULES[schedule](progress, turn(h), turn(h + 1)) for h in range(heads - 1)] + [1.0]


# ----------------------------------------------------------------------------------------------------------- loop


def contrast(run, stage, f, heads, blocks, images, val, *, epochs, lr, frozen, k):
    """Stage "refine"; stage "heads" is the same with all blocks frozen and k = 1 (B.3).

    f: the encoder; blocks: those with a head, numbers from 1 in rising order, the last block among them.

    Returns:
        the EMA of the encoder.
    """
    s = run.settings
    f.freeze(frozen)
    tuned = frozen < f.depth
    ema = frozen_copy(f) if tuned else f
    peak = lr * s.batch / 256
    groups = parameter_groups(heads, peak, s.head_weight_decay) + parameter_groups(f, peak, s.weight_decay, s.layer_decay)
    optimizer = adamw(groups, zero=s.zero)  # beta 0.9, 0.95 (Table 10)
    views = [View(s.image_size, (s.global_scale_min, 1.0))] * 2
    views += [View(s.local_size, (s.local_scale_min, s.global_scale_min))] * s.local_views
    colours = GLOBAL_COLOURS + [LOCAL_COLOURS] * s.local_views if s.color else [None] * len(views)

    def cls_tokens(x):
        """Views of one resolution [N, V, 3, S, S] → [CLS] behind each head's block [N, V, H, D]."""
        y = torch.stack([tokens[:, 0] for tokens in f(x.flatten(0, 1), blocks=blocks)], 1)
        y = torch.cat([y[:, :-1], f.norm(y[:, -1:])], 1)  # the last block's alone
        return y.unflatten(0, x.shape[:2])

    def encode(*resolutions):
        return (torch.cat([cls_tokens(x) for x in resolutions], 1),), None

    for data in run.steps(stage, images, views, s.batch, epochs, dict(encoder=f, ema=ema, heads=heads, optimizer=optimizer)):
        key = (s.seed, stage, run.step)
        noise = uniform((*key, "colour"), data.rows, len(views), 13)
        x = [augment(v, c, n) for v, c, n in zip(data.views, colours, noise.unbind(1))]
        resolutions = [torch.stack(r, 1) for r in (x[:2], x[2:]) if r]  # global [N, 2, 3, S, S], local [N, 10, 3, s, s]
        dice = uniform((*key, "dice"), data.rows, 2, device=run.device)
        weights = head_weights(s.schedule if tuned else "constant", run.step / run.total, len(blocks))

        def objective(y):
            losses, aux = heads.loss(y, data.index, data.labels, dice, s, k)
            return sum(w * loss for w, loss in zip(weights, losses)), aux | dict(losses=losses.detach())

        loss, aux = backward(encode, objective, tuple(resolutions), s.micro_batch, run.precision)
        log = dict(losses=aux["losses"])
        if images.classes:
            log["nn_accuracy"] = aux["nn_accuracy"]
        if val and tuned and (run.step + 1) % (s.knn_every * run.per_epoch) == 0:
            log["knn"] = torch.tensor(knn_per_block(f, images, val, run, blocks, max(1000, len(images) // 10)))
        factor = warmup_cosine(run.step, run.total, s.warmup_epochs * run.per_epoch, 1e-6 / peak)
        if run.optimize(optimizer, loss, log, factor):
            heads.Q.push(aux["z"], data.index, data.labels)
            if tuned:
                ema_update(ema, f, s.ema)
    return ema


# ----------------------------------------------------------------------------------------------------------- main


def report(run, name, encoder, train, val):
    """k-NN of every block (Figure 3b), and of the last against the whole training set; linear probe; clusters of
    L2-normalised [CLS] (C.12). Into results.json under `name`."""
    per_block = knn_per_block(encoder, train, val, run)
    print0(f"{name}: k-NN per block " + "  ".join(f"{b}: {v:.1f}" for b, v in enumerate(per_block, 1)))
    (last,) = knn_per_block(encoder, train, val, run, [encoder.depth], bank=len(train))
    values = evaluate(encoder, train, val, run, normalization="l2") | dict(knn=last, knn_per_block=per_block)
    run.report(name, values)


def blocks_of(s, depth):
    """Numbers of the blocks with a head, from 1: those of --head_blocks, or the last `heads`."""
    if not s.head_blocks:
        return list(range(depth + 1 - s.heads, depth + 1))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", s.head_blocks):
        raise InputError(f"--head_blocks {s.head_blocks}: write numbers and ranges, such as 20,24 or 17-24")
    ends = [[int(n) for n in part.split("-")] for part in s.head_blocks.split(",")]
    return [b for part in ends for b in range(part[0], part[-1] + 1)]


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, device, train, val (None without labels), encoder, decoder (None with --init), heads, their blocks.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    if s.mim not in ("mae", "data2vec2"):
        raise InputError(f"--mim {s.mim}: choose mae or data2vec2")
    if s.mim == "data2vec2" and not s.init and not s.cost:
        raise InputError("--mim data2vec2 refines a trained encoder: give it with --init FILE")
    if s.schedule not in SCHEDULES:
        raise InputError(f"--schedule {s.schedule}: choose from {', '.join(SCHEDULES)}")
    if not s.local_scale_min < s.global_scale_min < 1:
        raise InputError(f"--local_scale_min {s.local_scale_min:g} and --global_scale_min {s.global_scale_min:g}: "
                         "rising fractions of the area are expected")  # fmt: skip
    device = start()
    torch.manual_seed(s.seed)
    encoder = build_vit(s.model, s.image_size, "cls", post_norm=s.mim == "data2vec2")
    encoder.checkpoint_blocks = s.checkpoint_blocks
    if s.init:
        init_encoder(encoder, s.init)
    if s.local_views and s.local_size % encoder.patch_size:
        raise InputError(f"--local_size {s.local_size} is not divisible by the patch size {encoder.patch_size}")
    blocks = blocks_of(s, encoder.depth)
    if sorted(set(blocks)) != blocks or blocks[0] < 1 or blocks[-1] != encoder.depth:
        raise InputError(f"heads behind blocks {blocks}: expected rising numbers from 1 to the last block, {encoder.depth}")
    if s.frozen >= encoder.depth:
        raise InputError(f"--frozen {s.frozen}: {s.model} has {encoder.depth} blocks, nothing would be tuned")
    if s.k > s.queue:
        raise InputError(f"--k {s.k}: expected no more than the queue of {s.queue}")
    decoder = None
    if not s.init:
        check_masking(encoder.grid, 0.75)
        decoder = MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, s.decoder_dim, s.decoder_depth, s.decoder_heads)
        decoder.to(device)
    heads = IDHeads(len(blocks), encoder.dim, s)
    train, val = load_splits(s.data, val=not s.cost)
    for batch, epochs in [(s.mae_batch, s.mae_epochs)] * (not s.init) + [(s.batch, s.head_epochs), (s.batch, s.epochs)]:
        check_batch(s, train, batch, epochs)
    if s.batch > s.queue:
        raise InputError(f"--batch {s.batch} is larger than the queue of {s.queue}")
    return s, device, train, val, encoder.to(device), decoder, heads.to(device), blocks


def main(argv):
    """The three stages, an evaluation before and after where the data has labels, the closing table."""
    s, device, train, val, encoder, decoder, heads, blocks = prepare(argv)
    run = Run(s, device)

    if decoder:
        pretrain_mae(run, encoder, decoder, train, epochs=s.mae_epochs, batch=s.mae_batch, lr=s.mae_lr,
                     warmup_epochs=s.mae_warmup_epochs)  # fmt: skip
        if rank() == 0 and not s.cost and not (run.folder / "mae.pt").exists():
            save_encoder(run.folder / "mae.pt", encoder)
    if val and s.mim not in run.results:
        report(run, s.mim, encoder, train, val)

    both = (encoder, heads, blocks, train, val)
    contrast(run, "heads", *both, epochs=s.head_epochs, lr=s.head_lr, frozen=encoder.depth, k=1)
    encoder = contrast(run, "refine", *both, epochs=s.epochs, lr=s.lr, frozen=s.frozen, k=s.k)
    if rank() == 0 and not s.cost:
        save_encoder(run.folder / "encoder.pt", encoder)
    if val and "mim_refiner" not in run.results:
        report(run, "mim_refiner", encoder, train, val)
    if val and rank() == 0:
        depth = range(1, encoder.depth + 1)
        curves = {name: (depth, row["knn_per_block"]) for name, row in run.results.items()}
        draw_curves(run.folder / "knn_per_block.png", curves, "block", "k-NN / %")
    run.close()


if __name__ == "__main__":
    launch(main)
