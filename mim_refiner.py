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
    torchrun --nproc_per_node 8 mim_refiner.py --data /path/to/imagenet --model vit_l16 --mim data2vec2 --init stripped.pt \
        --micro_batch 32
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

Tables and figures, by flags of this program, and by eval.py with --encoder and --data besides; · separates runs, | values.
Public models are refined: --init FILE besides. Tables 1, 6 and 7 have data2vec 2.0: --mim data2vec2 too. Fine-tuning leaves
6 blocks of the 2B frozen as well (B.3): eval.py's --blocks 18.
  Table 1        1a: --heads 1|2|4|8|12
                 · 1b: --head_blocks 20,24|16,20,24|15,18,21,24|18,20,22,24|17-24
                 · 1c: --schedule constant|uniform_decay|staggered_decay|staggered_step|one_hot · 1d: --frozen 0|6|12
                 · 1e: --swap_negatives · 1f: --local_views 0 --global_scale_min 0.08 · --color|--no_color
                 · eval.py knn --raw --standardize · eval.py lowshot --lists LIST LIST LIST --raw
  Table 2        --model vit_l16|vit_h14|vit_2b14 · --mim data2vec2 --init FILE --model vit_l16|vit_h14
                 · eval.py lowshot --lists LIST LIST LIST --raw · MIM models' 1, 2, 5 shots as in the authors' code, where L has
                 a batch of 250, the larger 125: eval.py finetune --recipe mim_refiner_1 --lr 1e-4 --weight_decay 0.05
                 --batch 250|125 --lists LIST LIST LIST
                 · 1 and 10 %: eval.py finetune --recipe mim_refiner_1|mim_refiner_10 --lists LIST
                 · MIM models' 1 %, rates by hand (1e-4 to 1e-2) and a batch of 128 for the larger in the authors' code:
                 eval.py finetune --recipe mim_refiner_1 --lr 1e-3 --weight_decay 0.05 --batch 512|128 --lists LIST
                 · L's 10 %: eval.py finetune --recipe mae --drop_path 0.1 --batch 512 --positions --lists LIST
                 · eval.py probe --recipe dinov2 --best_epoch · eval.py knn --raw --standardize, whose k is tuned for MIM
                 models (C.4)
  Tables 3, 9    eval.py cluster --normalization l2
  Table 4        iNat18: eval.py finetune --recipe inat18 --shots 5|10 --splits 3
                 · eval.py probe --recipe dinov2_reduced --best_epoch --shots 1 --splits 3
                 · eval.py probe --recipe dinov2_reduced --best_epoch · VTAB: Table 8 · ADE20K: eval.py segment
  Table 5        L/16: eval.py finetune --recipe mae --drop_path 0.1 · H/14: eval.py finetune --recipe mae --drop_path 0.2
                 · the authors' code: eval.py finetune --recipe mae --positions
  Table 6        6a is 1b · 6b: --model vit_h14 --head_blocks
                 22,24,26,28,30,32|16,18,20,22,24,26,28,30,32|20-32
  Table 7        --model vit_h14 --color|--no_color, evaluated as Table 2
  Table 8        eval.py transfer --sets caltech101 cifar100 dtd flowers102 oxfordiiitpet sun397 svhn --against FILE
  Table 10       The presets.
  Table 11       eval.py lowshot --lists LIST LIST LIST --raw --image_size 224|518; DINOv2's own g/14 is not read here
  Table 12       The recipe inat18 of eval.py's finetune.
  Table 13       eval.py knn --raw --standardize · eval.py knn --last 4 --standardize
  Table 14       eval.py stats
  Figures 1, 2   Table 2's numbers, and hours and FLOPs, of smaller batches on one GPU, since pieces are encoded twice:
                 --cost --model vit_l16|vit_h14|vit_2b14
  Figure 3       3a: counts of parameters · 3b: eval.py knn --per_block --standardize · 3c, whose task is not said:
                 eval.py probe --block 20 · eval.py lowshot --block 20 --shots 1 · 3d and Figure 6: eval.py blocks
  Figures 4, 8   Drawings.
  Figure 5       eval.py embed --classes LIST · eval.py cluster --normalization l2 --classes LIST
  Figure 7       `head_weights`, of Table 1c.
  Appendix E     --temperatures 0.1,0.2,0.3 · --knn_every 5, both into log.jsonl
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common import (
    BYOL, VIT_SIZES, BatchNorm, BatchSize, Colour, Count, Fraction, Number, Positive, Queue, RunSettings, Share, Training,
    View, Whole, adamw, augment_views, backward, check_batch, check_masking, draw_curves, ema_update, frozen_copy, gather,
    launch, load_splits, model_size, need, new_decoder, new_encoder, normalize, open_run, parameter_groups,
    parse_settings, pretrain_mae, print0, promote, rank, save_encoder, set_lr, start_machine, tell_proportions, uniform,
    warmup_cosine, without_gradient,
)  # fmt: skip
from eval import KNN_BANK, evaluate, knn_per_block


@dataclass
class Settings(RunSettings):
    """Defaults are those of an MAE ViT-L/16; `presets` holds what differs for other models."""

    model: str = "vit_l16"
    mim: Literal["mae", "data2vec2"] = "mae"  # the masked image model that is refined: pre-norm blocks, or post-norm

    # heads: B.2, and the authors' code for what it leaves open
    heads: Count = 8  # behind the last blocks, one each: 8 (L, 2B) or 12 (H), A.1; Table 1a. Table 6 has 13 for H
    head_blocks: str = ""  # any other set of blocks, counted from 1: "20,24" or "17-24" (Tables 1b, 6)
    projector_hidden: Count = 2048  # width of the projector's hidden layers
    predictor_hidden: Count = 4096  # width of the predictor's hidden layer
    head_dim: Count = 256  # width of the embeddings
    queue: Count = 65536  # embeddings that the queue holds
    authors_head: bool = False  # Linear-BN-GELU, as the authors' code; B.2 lists GELU before BatchNorm

    # refinement: Table 10
    epochs: Positive = 30  # MAE L, H; 20 for MAE 2B and data2vec 2.0
    batch: BatchSize = 1024  # global: of all processes together; 512 for H and 2B
    lr: Positive = 4e-4  # learning rate at batch 256, as in the authors' code; the table does not say so
    warmup_epochs: Number = 4  # in which the learning rate rises
    layer_decay: Share = 0.65  # factor of the rate from a block to the one below
    frozen: Whole = 0  # lower blocks that stay as they are; 6 for 2B
    weight_decay: Number = 0.05  # AdamW's, of all but biases and norms
    ema: Fraction = 0.9999  # share of the encoder's average that stays at a step
    head_weight_decay: Number = 1e-5  # of projector and predictor
    temperature: Positive = 0.2  # of NNA's softmax; 0.3 for H, 0.35 for 2B
    k: Count = 20  # the neighbour is one of them at random
    global_scale_min: Share = 0.25  # area of the 2 global views; that of local views lies below
    local_views: Whole = 10  # 0: no multi-crop (Table 1f, with --global_scale_min 0.08)
    local_size: Count = 96  # side of the local views in pixels; 98 for patches of 14
    local_scale_min: Share = 0.05  # least share of the area in a local view
    color: bool = True  # A.2: --no_color for crop and flip alone, half the epochs

    # head initialisation: B.3, all else as above
    head_epochs: Positive = 20  # of stage head
    head_lr: Positive = 2e-4  # learning rate of stage head at batch 256

    # ablations
    temperatures: str = ""  # Appendix E: heads of these, 0.1,0.2,0.3, side by side behind the last block; stage heads alone
    swap_negatives: bool = False  # Table 1e: NNCLR, negatives too are nearest neighbours
    authors_loss: bool = False  # softmax over predictions of a fixed neighbour, as in the authors' code
    authors_pairs: bool = False  # the pairs of views of their code, see `anchors_of`
    schedule: Literal["constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot"] = "constant"  # weights, 1c

    # MAE pre-training, where no encoder is given: He et al. 2022, Table 8
    mae_epochs: Positive = 1600  # of MAE pre-training
    mae_batch: Count = 4096  # global: of all processes together, in stage mae
    mae_lr: Positive = 1.5e-4  # learning rate of MAE pre-training at batch 256
    mae_warmup_epochs: Number = 40  # epochs in which that rises
    decoder_dim: Count = 512  # width of the pixel decoder
    decoder_depth: Whole = 8  # blocks of the pixel decoder
    decoder_heads: Count = 16  # attention heads of the pixel decoder

    knn_every: Count = 5  # epochs between k-NN of the heads' blocks with a tenth of the data (Appendix E)


# Table 10: Large, Huge and 2B, whatever the patch size
TABLE_10 = {
    "l": dict(heads=8),
    "h": dict(heads=12, batch=512, temperature=0.3),
    "2b": dict(heads=8, epochs=20, batch=512, temperature=0.35, frozen=6),
}
# The built-in run: small enough for minutes on two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, decoder_dim=64, decoder_depth=2, decoder_heads=4,
    mae_epochs=8, mae_batch=256, mae_lr=2e-3, mae_warmup_epochs=0.8,
    heads=4, projector_hidden=256, predictor_hidden=512, head_dim=128, queue=1638,
    batch=256, head_epochs=1.2, head_lr=2e-3, warmup_epochs=0.4, epochs=3.2, lr=2e-3, layer_decay=0.8, ema=0.925,
    local_views=4, local_size=24, knn_every=1,
)  # fmt: skip

AUTHORS = dict(authors_head=True, authors_loss=True, authors_pairs=True)
LOCAL_COLOURS = Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)  # the authors' code


def presets(given):
    """Field values for the flags given: the model's columns of Table 10, the built-in run, A.2."""
    size, patch = model_size(given.get("model", "vit_l16"))
    row = {}
    if size in TABLE_10:
        row |= TABLE_10[size]
    elif size in VIT_SIZES:
        row |= dict(heads=VIT_SIZES[size][1] // 3)  # the last third
    if given.get("mim") == "data2vec2":
        row |= dict(epochs=20)
    if patch == 14:
        row |= dict(local_size=98)
    if given.get("data", "shapes") == "shapes":
        row |= SHAPES
        if given.get("short"):
            row |= dict(mae_epochs=3.2, mae_warmup_epochs=0.4, head_epochs=0.4, epochs=1.2)
    if given.get("authors"):
        row |= AUTHORS
    if not given.get("color", True):
        row |= dict(epochs=row.get("epochs", Settings.epochs) / 2)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class HeadLinear(nn.Module):
    """H linear layers side by side, [H, N, in] → [H, N, out], as one batched matrix product; xavier-uniform. They have no
    bias, as in the authors' code: in B.2's order of GELU and BatchNorm one would not be idle, but B.2 is silent."""

    def __init__(self, heads, dim_in, dim_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim_out, dim_in))
        for w in self.weight:
            nn.init.xavier_uniform_(w)

    def forward(self, x):
        return x @ self.weight.mT


def head_mlp(heads, *dims, batch_norm_first=False):
    """Linear-GELU-BatchNorm, …, Linear-BatchNorm for H heads at once (B.2); dims are widths from input to output."""
    layers = []
    for i, o in zip(dims, dims[1:-1]):
        between = [nn.GELU(), BatchNorm(heads, o)]
        if batch_norm_first:
            between.reverse()
        layers += [HeadLinear(heads, i, o), *between]
    return nn.Sequential(*layers, HeadLinear(heads, *dims[-2:]), BatchNorm(heads, dims[-1]))


class IDHeads(nn.Module):
    """Projectors, predictors and queues of H heads (B.2) as one module: a step has as many collectives for 8 as for 1.
    `dim` is the encoder's width; `authors_head` puts BatchNorm before GELU."""

    def __init__(self, heads, dim, projector_hidden=2048, predictor_hidden=4096, head_dim=256, queue=65536,
                 authors_head=False):  # fmt: skip
        super().__init__()
        self.projector = head_mlp(heads, dim, projector_hidden, projector_hidden, head_dim, batch_norm_first=authors_head)
        self.predictor = head_mlp(heads, head_dim, predictor_hidden, head_dim, batch_norm_first=authors_head)
        self.Q = Queue(queue, heads, head_dim)

    def loss(self, y, index, labels, dice, temperature, k, **how):
        """The NNA loss of each head, averaged over the pairs of views.

        y [N, V, H, D]: features of all views, the 2 global ones first; index, labels [N]; dice [N, 2] in [0, 1) for the
        top-k sampling, common to the heads; k neighbours to choose from; temperature and how as of
        `nearest_neighbor_alignment`.

        Returns:
            losses [H], and a dict: z [H, N, d] of view 0 for the queue, the detached losses, and nn_accuracy [H], the share
            of neighbours that are of the sample's class (Appendix E; of meaning where there are labels).
        """
        n, views = y.shape[:2]
        projected = self.projector(y.flatten(0, 1).transpose(0, 1))  # [H, N · V, d], one BatchNorm batch
        p = normalize(self.predictor(projected)).unflatten(1, (n, views))  # [H, N, V, d]
        z = normalize(projected.detach()).unflatten(1, (n, views))[:, :, :2]  # [H, N, 2, d]
        dice = dice.flatten().expand(len(z), -1)
        at = self.Q.lookup(z.flatten(1, 2), index.repeat_interleave(2), k, dice).unflatten(1, (n, 2))  # Eq. 2: [H, N, 2]
        nn_z = torch.stack([entries[a] for entries, a in zip(self.Q.embeddings, at)])  # [H, N, 2, d]
        losses = nearest_neighbor_alignment(p, z, nn_z, temperature, **how)
        nn_accuracy = (self.Q.labels[at] == labels[:, None]).float().mean((1, 2))
        return losses, dict(z=z[:, :, 0], losses=losses.detach(), nn_accuracy=nn_accuracy)


# ----------------------------------------------------------------------------------------------------------- loss


def nearest_neighbor_alignment(p, z, nn_z, temperature, *, swap_negatives=False, authors_loss=False,
                               authors_pairs=False):  # fmt: skip
    """Eq. 1 for all pairs (i, j ≠ i) of a global view i and another view j:

        −log( e^{NN(z_in)·p_jn/τ} / ( e^{NN(z_in)·p_jn/τ} + Σ_{m≠n} e^{SG(z_im)·p_jn/τ} ) ),  m over the global batch.

    All rows have unit length. With `swap_negatives` NN(z_im) takes the place of z_im (NNCLR). With `authors_loss` the sum
    goes over predictions of other samples instead, e^{SG(z_in)·p_jm/τ}, with their gradient. `authors_pairs`: `anchors_of`.

    Args:
        p [H, N, V, d]: predictions of this rank's samples, with gradient, the two global views first.
        z, nn_z [H, N, 2, d]: projections of the global views and their nearest neighbours, without gradient.
        temperature: a number, or [H, 1, 1, 1].
    Returns:
        losses [H], averaged over this rank's samples and the 2 · (V − 1) pairs.
    """
    n = p.shape[1]
    own = (torch.arange(n, device=p.device) + rank() * n).view(1, n, 1, 1)
    loss = 0
    with torch.autocast(p.device.type, enabled=False):
        p = promote(p) / temperature
        z = promote(nn_z if swap_negatives else z)
        others = (p if authors_loss else z).transpose(0, 1)
        others = gather(others).transpose(0, 1)  # the samples m of all ranks: [H, M, …]
        for i in (0, 1):
            views = anchors_of(i, p.shape[2], authors_pairs)
            anchors = p[:, :, views]  # p_j: [H, N, V − 1, d]
            if authors_loss:
                logits = torch.einsum("hnd,hmvd->hnvm", z[:, :, i], others[:, :, views])
            else:
                logits = torch.einsum("hnvd,hmd->hnvm", anchors, others[:, :, i])
            positive = (anchors * nn_z[:, :, i, None]).sum(-1, keepdim=True)  # [H, N, V − 1, 1]
            logits = logits.scatter(-1, own.expand_as(positive), positive)
            loss = loss + (logits.logsumexp(-1, keepdim=True) - positive).mean((1, 2, 3)) / 2
    return loss


def anchors_of(i, views, authors_pairs=False):
    """The V − 1 views j whose positive is global view i: all but i.

    In the authors' code the local views are counted from 0, where the global ones are: view i itself is among them, the
    other global view is twice, and the last two local ones have no loss.
    """
    if authors_pairs:
        return [1 - i, *range(views - 2)]
    return [j for j in range(views) if j != i]


def head_weight(schedule, t, begin, end):
    """A head's loss weight at a fraction t of the training (Table 1c, C.11), its turn being from `begin` to `end`."""
    if schedule == "constant":
        return 1.0
    if schedule == "staggered_step":
        return float(t < end)
    if schedule == "one_hot":  # weights as in the authors' configs, the paper has a figure
        return 0.1 if t < begin else float(t < end)
    fall = 0.2 if schedule == "uniform_decay" else end
    return 0.5 * (1 + math.cos(math.pi * max(0.0, t - fall) / (1 - fall)))  # from there on half a cosine down to 0


def head_weights(schedule, progress, heads):
    """Loss weights of the heads, a list, the lowest block's first, at a fraction `progress` of the training; the last
    block's is 1 throughout.

    Of 20 epochs, the turns of the 7 heads below the last end at epochs 4, 6, … 16, each begins where the one before ends;
    other lengths and numbers of heads in proportion.
    """
    ends = [0.2 + 0.6 * h / max(heads - 2, 1) for h in range(heads - 1)]
    turns = zip([0.0, *ends], ends)
    return [head_weight(schedule, progress, begin, end) for begin, end in turns] + [1.0]


# ----------------------------------------------------------------------------------------------------------- loop


def views_of(s):
    """The views of an image, 2 global ones and then the local ones, and their colours (Table 10: "see BYOL")."""
    views = [View(s.image_size, (s.global_scale_min, 1.0))] * 2
    views += [View(s.local_size, (s.local_scale_min, s.global_scale_min))] * s.local_views
    return views, [*BYOL, *[LOCAL_COLOURS] * s.local_views] if s.color else [None] * len(views)


def contrast(run, stage, f, heads, blocks, images, val, temperature, *, epochs, lr, frozen, k):
    """Stage "refine"; stage "heads" is the same with all blocks frozen and k = 1 (B.3).

    f: the encoder; blocks: those with a head, numbers from 1 in rising order, the last block among them; temperature: of
    all heads, or [H, 1, 1, 1]. Returns the EMA of the encoder, f itself where all blocks are frozen.
    """
    s = run.settings
    tuned = frozen < f.depth
    f.freeze(frozen, embed_norm=not tuned)  # that of data2vec 2.0 keeps training: authors' code
    ema = frozen_copy(f) if tuned else f
    peak = lr * s.batch / 256
    groups = parameter_groups(heads, peak, s.head_weight_decay)
    groups += parameter_groups(f, peak, s.weight_decay, s.layer_decay)
    optimizer = adamw(groups, zero=s.zero)  # beta 0.9, 0.95 (Table 10)
    views, colours = views_of(s)

    def lower(*resolutions):  # [N, V, 1 + L, D] each
        return [f(x.flatten(0, 1), blocks=[f.frozen])[0].unflatten(0, x.shape[:2]) for x in resolutions]

    def encode(*resolutions):
        y = []
        for x in resolutions:  # [N, V, 3, S, S], or as `lower` leaves it
            cls = [tokens[:, 0] for tokens in f(x.flatten(0, 1), blocks=blocks)]
            cls = [f.norm(c) if b == f.depth else c for b, c in zip(blocks, cls)]  # the last block's alone
            y.append(torch.stack(cls, 1).unflatten(0, x.shape[:2]))  # [N, V, H, D]
        return (torch.cat(y, 1),), None

    state = dict(encoder=f, ema=ema, heads=heads, optimizer=optimizer)
    training = Training(run, stage, state, len(images), s.batch, epochs)
    if tuned:
        tell_proportions(training, s.ema, s.queue)
    for data in training.batches(images, views):
        key = (s.seed, stage, training.step)
        x = augment_views(data.views, colours, uniform((*key, "colour"), data.rows, len(views), 13))
        resolutions = tuple(torch.stack(r, 1) for r in (x[:2], x[2:]) if r)  # the global views, the local ones
        dice = uniform((*key, "dice"), data.rows, 2, device=run.machine.device)
        weights = head_weights(s.schedule if tuned else "constant", training.step / training.total, len(blocks))

        def objective(y):
            how = dict(swap_negatives=s.swap_negatives, authors_loss=s.authors_loss, authors_pairs=s.authors_pairs)
            losses, aux = heads.loss(y, data.index, data.labels, dice, temperature, k, **how)
            return sum(weight * loss for weight, loss in zip(weights, losses)), aux

        if 0 < f.frozen < blocks[0]:
            resolutions = without_gradient(lower, resolutions, s.micro_batch, run.machine.precision)
        # in one piece: loss, aux = objective(*encode(*resolutions)[0]); loss.backward()
        loss, aux = backward(encode, objective, resolutions, s.micro_batch, run.machine.precision)
        measured = dict(losses=aux["losses"])
        measured |= dict(nn_accuracy=aux["nn_accuracy"]) if images.classes else {}
        if val and tuned and (training.step + 1) % (s.knn_every * training.per_epoch) == 0:
            bank = max(1000, len(images) // 10)
            measured["knn"] = torch.tensor(knn_per_block(f, images, val, run.machine, blocks, bank))
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup_epochs * training.per_epoch, 1e-6 / peak))
        taken, log = training.take_step(optimizer, loss, **measured)
        if taken:
            heads.Q.push(aux["z"], data.index, data.labels)
            ema_update(ema, f, s.ema)
        training.log(log)
        training.save_if_due()
    return ema


# ----------------------------------------------------------------------------------------------------------- main


def report(run, name, encoder, train, val):
    """k-NN of every block (Figure 3b), and of the last against the whole training set; linear probe; clusters of
    L2-normalised [CLS] (C.12). Into results.json under `name`."""
    if not val or name in run.results:
        return
    per_block = knn_per_block(encoder, train, val, run.machine)
    print0(f"{name}: k-NN per block " + "  ".join(f"{b}: {v:.1f}" for b, v in enumerate(per_block, 1)))
    last = per_block[-1]
    if len(train) > KNN_BANK:
        (last,) = knn_per_block(encoder, train, val, run.machine, [encoder.depth], bank=len(train))
    values = evaluate(encoder, train, val, run.machine, normalization="l2")
    run.report(name, values | dict(knn=last, knn_per_block=per_block))


def blocks_of(s, depth):
    """Numbers of the blocks with a head, from 1: those of --head_blocks, or the last `heads`; the last for each of
    --temperatures."""
    if s.temperatures:
        number = r"\d*\.?\d*[1-9]\d*"  # above 0
        need(re.fullmatch(f"{number}(,{number})*", s.temperatures),
             f"--temperatures {s.temperatures}: write numbers above 0, such as 0.1,0.2,0.3")  # fmt: skip
        return [depth] * len(s.temperatures.split(","))
    if not s.head_blocks:
        blocks = list(range(depth + 1 - s.heads, depth + 1))
    else:
        need(re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", s.head_blocks),
             f"--head_blocks {s.head_blocks}: write numbers and ranges, such as 20,24 or 17-24")  # fmt: skip
        blocks = []
        for part in s.head_blocks.split(","):
            ends = part.split("-")
            blocks += range(int(ends[0]), int(ends[-1]) + 1)
    rising = blocks == sorted(set(blocks))
    need(rising and blocks[-1:] == [depth] and blocks[0] > 0,
         f"heads behind blocks {blocks}: expected rising numbers from 1 to the last block, {depth}")  # fmt: skip
    return blocks


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, machine, train, val (None without labels), encoder, decoder (None with --init), heads, their blocks.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    need(s.mim == "mae" or s.init or s.cost, "--mim data2vec2 refines a trained encoder: give it with --init FILE")
    need(s.local_scale_min < s.global_scale_min < 1,
         f"--local_scale_min {s.local_scale_min:g} and --global_scale_min {s.global_scale_min:g}: "
         "rising fractions of the area are expected")  # fmt: skip
    need(s.k <= s.queue, f"--k {s.k}: expected no more than the queue of {s.queue}")
    machine = start_machine(s.precision, s.workers)
    torch.manual_seed(s.seed)
    encoder = new_encoder(s, post_norm=s.mim == "data2vec2")
    need(not s.local_views or s.local_size % encoder.patch_size == 0,
         f"--local_size {s.local_size} is not divisible by the patch size {encoder.patch_size}")  # fmt: skip
    blocks = blocks_of(s, encoder.depth)
    need(s.frozen < encoder.depth, f"--frozen {s.frozen}: {s.model} has {encoder.depth} blocks, nothing would be tuned")
    decoder = None
    if not s.init:
        check_masking(encoder.grid, 0.75)
        decoder = new_decoder(encoder, s).to(machine.device)
    heads = IDHeads(len(blocks), encoder.dim, s.projector_hidden, s.predictor_hidden, s.head_dim, s.queue, s.authors_head)
    train, val = load_splits(s.data, val=s.eval and not s.cost)
    if decoder:
        check_batch(s, train, s.mae_batch, s.mae_epochs)
    need(s.warmup_epochs <= s.head_epochs, f"--warmup_epochs {s.warmup_epochs:g} outlasts --head_epochs {s.head_epochs:g}")
    check_batch(s, train, s.batch, s.head_epochs)
    check_batch(s, train, s.batch, s.epochs)
    need(s.batch <= s.queue, f"--batch {s.batch} is larger than the queue of {s.queue}")
    return s, machine, train, val, encoder.to(machine.device), decoder, heads.to(machine.device), blocks


def main(argv):
    """The three stages, an evaluation before and after where the data has labels, the closing table."""
    s, machine, train, val, encoder, decoder, heads, blocks = prepare(argv)
    run = open_run(s, machine)

    if decoder:
        pretrain_mae(run, encoder, decoder, train)
        if not s.cost and not (run.folder / "mae.pt").exists():
            save_encoder(run.folder / "mae.pt", encoder)
    report(run, s.mim if decoder else "init", encoder, train, val)

    temperature = s.temperature
    if s.temperatures:
        of_heads = [float(t) for t in s.temperatures.split(",")]
        temperature = torch.tensor(of_heads, device=machine.device).view(-1, 1, 1, 1)
    both = (encoder, heads, blocks, train, val, temperature)
    contrast(run, "heads", *both, epochs=s.head_epochs, lr=s.head_lr, frozen=encoder.depth, k=1)
    if s.temperatures:  # to compare: losses and nn_accuracy of each in log.jsonl
        return run.close()
    encoder = contrast(run, "refine", *both, epochs=s.epochs, lr=s.lr, frozen=s.frozen, k=s.k)
    if not s.cost:
        save_encoder(run.folder / "encoder.pt", encoder)
    report(run, "mim_refiner", encoder, train, val)
    if val:
        depth = range(1, encoder.depth + 1)
        curves = {name: (depth, row["knn_per_block"]) for name, row in run.results.items()}
        draw_curves(run.folder / "knn_per_block.png", curves, "block", "k-NN accuracy / %", marked={"a head": blocks})
    run.close()


if __name__ == "__main__":
    launch(main)
