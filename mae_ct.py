"""MAE-CT: Contrastive Tuning, A Little Help to Make Masked Autoencoders Forget (Lehner et al., arXiv 2304.10520).

A masked autoencoder remembers everything in an image, the background too. MAE-CT makes it forget, in three stages:
  mae   pre-train a masked autoencoder (or start from a public one with --init)
  head  train an NNCLR head (projector, predictor, queue) on the frozen encoder, until its space is well structured
  ct    tune the upper half of the encoder with that head: the embedding of one view is replaced by one of its k nearest
        neighbours in the queue, and the other view's prediction is drawn to it (Algorithm 1, Eq. 1-2)
No augmentation but crop and flip is needed; the neighbours are the augmentation.

    python mae_ct.py                                                    # all of it on built-in data, in minutes
    torchrun --nproc_per_node 8 mae_ct.py --data /path/to/imagenet --model vit_l16 --micro_batch 128
    torchrun --nproc_per_node 8 mae_ct.py --data /path/to/imagenet --model vit_l16 \
        --init mae_pretrain_vit_large.pth --stages head,ct
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 mae_ct.py --data ... --model vit_h16 \
        --micro_batch 32

Easy to get wrong:
  - BatchNorm statistics are those of one view over all ranks, never of both views together (A.2).
  - The queue is written after the optimizer's step, with the first view's z alone, on every rank the same (Algorithm 1).
  - A queue older than an epoch holds the sample itself: its own embedding is excluded from its neighbours.
  - Rows of the logits are neighbours (no gradient), columns are predictions of all ranks, gathered with gradient.
  - z comes from an EMA of the projector, p from the projector itself; the EMA's BatchNorm buffers are copied.
  - lr = base * batch * views / 256 with two views in stage ct (A.1) and, in the authors' code, in stage head; one in mae.
  - ViT-B/16 averages its patch tokens, the larger models use [CLS] (A.2). What is kept is the EMA of the encoder.

Tables and figures, by flags of this program, and by eval.py with --encoder and --data besides; · separates runs, | values.
Their own MAE is A.1's: --mae_views 2 besides. One MAE serves many runs: --stages head,ct --init mae.pt besides.
  Table 1        --model vit_b16|vit_l16 --no_aug|--aug · --model vit_h14 --init mae_pretrain_vit_huge.pth --stages head,ct
                 --no_aug|--aug · eval.py probe
  Tables 2, 16   also of H/16: --model vit_h16 --no_aug|--aug · eval.py knn · eval.py probe
                 · 1, 2, 5 shots: eval.py lowshot --lists LIST LIST LIST
                 · MAE's 1, 2, 5 shots: eval.py finetune --recipe crop_flip --lists LIST LIST LIST
                 · 1 and 10 % of MAE-CT: eval.py finetune --recipe crop_flip --lists LIST
                 · 1 % of MAE-CT_aug's B, L: eval.py finetune --recipe lowshot --randaugment 0 --lists LIST
                 · 10 % of these: eval.py finetune --recipe lowshot --lists LIST
                 · 1 % of MAE, whose rate is not said, and of MAE-CT_aug's H: eval.py finetune --recipe crop_flip --lists LIST
                 · of MAE's H: eval.py finetune --recipe crop_flip --lr 1e-2 --lists LIST
                 · 10 % of MAE, and of MAE-CT_aug's H: eval.py finetune --recipe mae --lists LIST
  Table 3        eval.py cluster; MAE's B/16 has [CLS] here (B.3): eval.py cluster --pool cls
  Table 4        --k 1 · --k 1 --ct_mask_ratio 0.75 · --k 1 --no_nn_lookup · --k 1 --stages ct --init mae.pt · eval.py probe
                 · eval.py knn; its first row is Table 13's with k = 1, so are those of Tables 7 and 8
  Table 5        of batches that the GPU holds: --cost --model vit_b16|vit_l16|vit_h16|vit_h14 --no_aug|--aug
  Table 6        eval.py probe, and of what that wrote: eval.py invariance
  Table 7        --k 1 --stages combined · --k 1 --stages combined,ct --no_detach|--detach · --k 1 --stages combined,head,ct
                 · the same from the files of a combined stage, attached or detached: --k 1 --stages ct --init mae.pt
                 --head head.pt · --k 1 --stages head,ct --init mae.pt
  Table 8        --k 1 · --k 1 --stages head,ct --init mae_pretrain_vit_large.pth · eval.py probe · eval.py knn
  Tables 9, 10   The presets TABLE_9 and TABLE_10.
  Tables 11, 12  The recipes of eval.py's probe and finetune, mae_ct and lowshot.
  Table 13       --k 1 --epochs 10|20|30 · --k 1 --frozen 18|12|9|6 · --k 1 --ema 0|0.999|0.9999 · --k 1|10|20|30
                 · --k 1 --temperature 0.15|0.2|0.25 · --k 1 --projector_ema 0|0.99|0.995|0.999
  Table 14       --oracle · eval.py probe · below, each row with one flag less, from the left: eval.py finetune --recipe mae
                 --label_smoothing 0 --mixup 0 --cutmix 0 --erasing 0 --randaugment 0
  Table 15       eval.py probe --last 1|2|4|6 · eval.py probe --both
  Table 17       --k 1|10|20|30 · --aug · eval.py probe, and of what that wrote: eval.py robust --sets FOLDER
  Table 18       The numbers of Table 2, and of their own MAE, beside others', quoted.
  Tables 19-22   eval.py cluster · eval.py cluster --classes LIST; either tells the best and the average of 100 runs;
                 MAE's B/16 as in Table 3
  Figures 1, 4, 8   eval.py embed --classes LIST · accuracies below 4 and 8: eval.py cluster --classes LIST
  Figure 2       A drawing.
  Figure 3       eval.py colorhist
  Figures 5, 10  eval.py retrieve --classes LIST · eval.py retrieve --classes LIST --samples 15
  Figure 6       --cost --model vit_b16|vit_l16|vit_h16 --no_aug|--aug; A.1 has 4 GPUs and batches of 2048, 1024, 512 in
                 stage mae, half of that in ct; Table 2's accuracies against these hours: eval.py curve
                 --curves MAE=b/probe.json,l/probe.json --y probe --at 448 792
  Figure 7       eval.py finetune --recipe mae, and the runs of Table 2 with fewer labels:
                 eval.py curve --curves MAE=1/finetune.json,10/finetune.json --y finetune --x images
  Figure 9       eval.py cluster --classes LIST
  Figure 11      eval.py retrieve
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common import (
    BYOL, VIT_SIZES, BatchSize, Count, Fraction, Number, Positive, Queue, Ratio, RunSettings, Share, Training, View, Whole,
    adamw, augment, augment_views, backward, check_batch, check_masking, draw_rows, ema_update, frozen_copy, info_nce, launch,
    load_encoder, load_file, load_splits, load_state, mae_loss, mlp_head, model_size, need, new_decoder, new_encoder,
    normalize, open_run, parameter_groups, parse_settings, pretrain_mae, random_masking, reconstruction_rows,
    save_encoder, save_file, set_lr, start_machine, tell_proportions, uniform, warmup_cosine, without_gradient,
)  # fmt: skip
from eval import center_views, evaluate, features


@dataclass
class Settings(RunSettings):
    """Defaults are ViT-L/16's; `presets` holds what differs for other models."""

    model: str = "vit_l16"
    stages: str = "mae,head,ct"  # any of them in this order; `combined` instead of `mae` for Section 4.5
    head: str = ""  # head.pt of another run, for --stages ct without stage head

    # MAE pre-training: 4.1, A.1; what the paper leaves to He et al. 2022 is from their Table 8
    mae_epochs: Positive = 1600  # of MAE pre-training; 4.1
    mae_batch: Count = 4096  # global: of all processes together, in stage mae; He et al. Table 8
    mae_lr: Positive = 1.5e-4  # learning rate of stage mae, at batch 256; 4.1; the authors' code counts the views too: 3e-4
    mae_warmup_epochs: Number = 40  # epochs in which that rises; He et al. Table 8
    mae_views: Count = 1  # crops of an image; 2: A.1's, 800 epochs of batch 1024 (H: 512), the authors' warm-up of 20
    mask_ratio: Ratio = 0.75  # share of the patches that is removed; 4.1
    norm_pix: bool = True  # targets are normalised patch by patch: 4.1, "normalize pixels"
    decoder_dim: Count = 512  # width of the pixel decoder; He et al. Table 1b
    decoder_depth: Whole = 8  # blocks of the pixel decoder; He et al. Table 1a
    decoder_heads: Count = 16  # attention heads of the pixel decoder

    # both contrastive stages: Algorithm 1, Table 9, A.2
    batch: BatchSize = 1024  # global: of all processes together, in stages head and ct
    warmup: Fraction = 0.2  # share of the steps in which the rates rise
    scale_min: Share = 0.08  # of the random crops' area; not printed, the authors' code
    pool: Literal["cls", "mean"] = "cls"  # feature of an image: [CLS], or the patches' mean; A.2
    queue: Count = 65536  # embeddings that the queue holds
    projector_hidden: Count = 2048  # width of the projector's hidden layers
    predictor_hidden: Count = 4096  # width of the predictor's hidden layer
    head_dim: Count = 256  # width of the embeddings
    head_weight_decay: Number = 1e-5  # of projector and predictor
    nn_lookup: bool = True  # Table 4: without it, z itself is the positive
    stop_gradient: bool = False  # without the lookup: none through z, in stage ct to the encoder; theirs let it through

    # stage head: 4.1, A.2
    head_epochs: Positive = 20  # of stage head
    head_lr: Positive = 1e-4  # of stage head, times the two views as in the authors' code; A.1 counts them in stage ct alone
    head_temperature: Positive = 0.15  # of stage head

    # stage ct: Table 9
    epochs: Positive = 20  # of stage ct
    lr: Positive = 1e-4  # learning rate of the encoder in stage ct at batch 256, before the layer decay
    layer_decay: Share = 0.65  # factor of the rate from a block to the one below
    weight_decay: Number = 0.05  # AdamW's, of all but biases and norms
    frozen: Whole = 12  # lower blocks that stay as they are
    ema: Fraction = 0.9999  # share of the encoder's average that stays at a step
    ct_head_lr: Positive = 1e-4  # learning rate of the head in stage ct, at batch 256
    temperature: Positive = 0.2  # of the softmax in stage ct
    k: Count = 20  # nearest neighbours, of which one is drawn; MAE-CT_aug's ViT-H: 30 in Table 10, 20 in the authors' code
    projector_ema: Fraction = 0.99  # share of it that stays at a step
    ct_mask_ratio: Ratio = 0.0  # share of the patches removed in stage ct; Table 4: 0.75
    aug: bool = False  # MAE-CT_aug: Table 10 and BYOL's augmentations
    oracle: bool = False  # B.2: neighbours of the same class only, 30 epochs

    # combined pre-training: 4.5
    combined_weight: Number = 0.001  # lambda, the weight of the NNCLR loss
    detach: bool = False  # a stop-gradient before the head: "detached pre-training"


# Tables 9 and 10: Base, Large and Huge, whatever the patch size
TABLE_9 = {
    "b": dict(frozen=6, temperature=0.15, pool="mean"),
    "l": dict(frozen=12),
    "h": dict(epochs=30, batch=512, frozen=16, temperature=0.3, projector_ema=0.995),
}
TABLE_10 = {
    "b": dict(epochs=80, ct_head_lr=5e-4, temperature=0.15, k=10),
    "l": dict(epochs=40, ct_head_lr=5e-4, temperature=0.15, k=10),
    "h": dict(epochs=40, ct_head_lr=5e-4, temperature=0.35, k=30),
}
# The authors' code: A.1's MAE of two views, which count in its lr too; k of MAE-CT_aug's ViT-H
AUTHORS = dict(mae_lr=3e-4)
# The built-in run: small enough for minutes on two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, pool="mean", decoder_dim=64, decoder_depth=2, decoder_heads=4,
    mae_epochs=8, mae_batch=256, mae_lr=2e-3, mae_warmup_epochs=0.8,
    batch=256, queue=1638, projector_hidden=512, predictor_hidden=512, head_dim=128, scale_min=0.15,
    head_epochs=3.2, head_lr=2e-3,
    epochs=5.6, lr=2e-3, ct_head_lr=1e-3, layer_decay=0.8, frozen=2, ema=0.925, temperature=0.15,
)  # fmt: skip


def presets(given):
    """Field values for the flags given: the model's columns of Tables 9 and 10, the built-in run, A.1, B.2."""
    size, _ = model_size(given.get("model", "vit_l16"))
    row = {}
    if size in TABLE_9:
        row |= TABLE_9[size]
    elif size in VIT_SIZES:
        row |= dict(frozen=VIT_SIZES[size][1] // 2)  # the lower half too
    if given.get("aug"):
        row |= TABLE_10.get(size, TABLE_10["l"])
    authors = given.get("authors")
    if authors:
        row |= AUTHORS if given.get("mae_views", 2) == 2 else {}
        if size == "h":
            row |= dict(k=20)
    if given.get("mae_views", authors and 2) == 2 or "combined" in given.get("stages", ""):
        row |= dict(mae_views=2, mae_epochs=800, mae_warmup_epochs=20, mae_batch=512 if size == "h" else 1024)
    if given.get("oracle"):
        row |= dict(epochs=30)
    if given.get("data", "shapes") == "shapes":  # whatever the variant, in the built-in run's own length
        row |= SHAPES
        if given.get("short"):
            row |= dict(mae_epochs=3.2, mae_warmup_epochs=0.4, head_epochs=0.8, epochs=1.2)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class NNCLRHead(nn.Module):
    """Projector g, predictor h, EMA projector g_m and queue Q (Figure 2, A.2, Algorithm 1); `dim` is the encoder's width."""

    def __init__(self, dim, projector_hidden=2048, predictor_hidden=4096, head_dim=256, queue=65536):
        super().__init__()
        self.g = mlp_head(dim, projector_hidden, projector_hidden, head_dim, last_norm=True)
        self.h = mlp_head(head_dim, predictor_hidden, head_dim, last_norm=False)
        self.g_m = frozen_copy(self.g)
        self.Q = Queue(queue, head_dim)

    def loss(self, y1, y2, index, labels, dice, temperature, k, nn_lookup=True, oracle=False, stop_gradient=False):
        """The symmetrised InfoNCE loss of Algorithm 1 (Eq. 1-2).

        y1, y2 [N, D]: features of two views; index, labels [N]; dice [N, 2] in [0, 1) for the top-k sampling. Without
        nn_lookup z takes the place of its neighbour, with its gradient to y, but not to g_m, unless stop_gradient.

        Returns:
            loss (scalar), and a dict: z1 [N, head_dim] for the queue, and nn_accuracy, the share of nearest neighbours of
            the sample's class (of meaning where there are labels).
        """
        p1 = normalize(self.h(self.g(y1)))  # predictor path; BatchNorm per view
        p2 = normalize(self.h(self.g(y2)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not nn_lookup and not stop_gradient):
            z1 = normalize(self.g_m(y1))  # NN path
            z2 = normalize(self.g_m(y2))
        at1 = self.Q.lookup(z1, index, k, dice[:, 0])
        nn_accuracy = (self.Q.labels[at1] == labels).float().mean()
        if oracle:
            at1 = self.Q.lookup(z1, index, k, dice[:, 0], labels)
        at2 = self.Q.lookup(z2, index, k, dice[:, 1], labels if oracle else None)
        nn1, nn2 = z1, z2
        if nn_lookup:
            nn1, nn2 = self.Q.embeddings[at1], self.Q.embeddings[at2]
        loss = info_nce(nn1, p2, temperature) / 2 + info_nce(nn2, p1, temperature) / 2
        return loss, dict(z1=z1, nn_accuracy=nn_accuracy)


# ---------------------------------------------------------------------------------------------------------- loops


def contrastive(run, stage, f, head, images, *, epochs, lr, head_lr, frozen, temperature, k, projector_ema):
    """Algorithm 1. Stage "head" is the same with all blocks frozen, k = 1 and no EMA in the projector (A.2).

    Returns:
        f_m, the EMA of the encoder; f itself where all blocks are frozen.
    """
    s = run.settings
    f.freeze(frozen)
    f_m = frozen_copy(f) if frozen < f.depth else f
    scale = s.batch * 2 / 256  # batch size x views / 256: A.1 for stage ct, the code for head too
    groups = parameter_groups(head, head_lr * scale, s.head_weight_decay)
    groups += parameter_groups(f, lr * scale, s.weight_decay, s.layer_decay)
    optimizer = adamw(groups, zero=s.zero)
    views = [View(s.image_size, (s.scale_min, 1.0))] * 2
    colours = BYOL if s.aug else [None, None]
    mask_ratio = s.ct_mask_ratio if stage == "ct" else 0
    oracle = s.oracle and stage == "ct"

    def both(x1, x2, noise):  # views as images, or as `lower` leaves them
        ids_keep = random_masking(torch.cat(noise.unbind(1)), mask_ratio)[0] if mask_ratio else None
        return torch.cat([x1, x2]), ids_keep

    def lower(*views):
        return f(*both(*views), blocks=[frozen])[0].chunk(2)  # each [N, 1 + K, D]

    def encode(*views):
        return f.pooled(f(*both(*views))).chunk(2), None  # y1, y2 [N, D]

    state = dict(encoder=f, ema=f_m, head=head, optimizer=optimizer)
    training = Training(run, stage, state, len(images), s.batch, epochs)
    if frozen < f.depth:
        tell_proportions(training, s.ema, s.queue)
    for data in training.batches(images, views):
        key = (s.seed, stage, training.step)
        x1, x2 = augment_views(data.views, colours, uniform((*key, "colour"), data.rows, 2, 13))
        noise = uniform((*key, "mask"), data.rows, 2, math.prod(f.grid), device=x1.device)
        dice = uniform((*key, "dice"), data.rows, 2, device=x1.device)

        def objective(y1, y2):
            return head.loss(
                y1, y2, data.index, data.labels, dice, temperature, k, s.nn_lookup, oracle, s.stop_gradient
            )

        if frozen:
            x1, x2 = without_gradient(lower, (x1, x2, noise), s.micro_batch, run.machine.precision)
        # in one piece: loss, aux = objective(*encode(x1, x2, noise)[0]); loss.backward()
        loss, aux = backward(encode, objective, (x1, x2, noise), s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup * training.total))
        measured = dict(nn_accuracy=aux["nn_accuracy"]) if images.classes else {}
        taken, log = training.take_step(optimizer, loss, **measured)
        if taken:
            head.Q.push(aux["z1"], data.index, data.labels)
            ema_update(f_m, f, s.ema)
            ema_update(head.g_m, head.g, projector_ema)
        training.log(log)
        training.save_if_due()
    return f_m


def combined_pretraining(run, f, decoder, head, images):
    """Section 4.5: L = L_MAE + lambda * L_NNCLR on two masked views; `detach` stops the head's gradient at the encoder."""
    s = run.settings
    f.freeze(0)
    lr = s.mae_lr * s.mae_batch / 256  # the head's too; its rate, temperature and weight decay are chosen, 4.5 names none
    groups = parameter_groups(nn.ModuleList([f, decoder]), lr, s.weight_decay)
    groups += parameter_groups(head, lr, s.head_weight_decay)
    optimizer = adamw(groups, zero=s.zero)

    def encode(x1, x2, noise):
        x = torch.cat([x1, x2])
        ids_keep, ids_restore, mask = random_masking(torch.cat(noise.unbind(1)), s.mask_ratio)
        tokens = f(x, ids_keep)
        yield f.pooled(tokens.detach() if s.detach else tokens).chunk(2)
        loss1, loss2 = mae_loss(decoder(tokens, ids_restore), x, mask, s.norm_pix).chunk(2)
        yield (loss1 + loss2) / 2

    state = dict(encoder=f, decoder=decoder, head=head, optimizer=optimizer)
    training = Training(run, "combined", state, len(images), s.mae_batch, s.mae_epochs)
    for data in training.batches(images, [View(s.image_size)] * 2):
        key = (s.seed, "combined", training.step)
        x1, x2 = map(augment, data.views)
        noise = uniform((*key, "mask"), data.rows, 2, math.prod(f.grid), device=x1.device)
        dice = uniform((*key, "dice"), data.rows, 2, device=x1.device)

        def objective(y1, y2):
            loss, aux = head.loss(
                y1, y2, data.index, data.labels, dice, s.head_temperature, 1, s.nn_lookup, stop_gradient=s.stop_gradient
            )
            return s.combined_weight * loss, aux | dict(nnclr=loss.detach())

        # in one piece: y, mae = encode(x1, x2, noise); loss, aux = objective(*y); (loss + mae.mean()).backward()
        loss, aux = backward(encode, objective, (x1, x2, noise), s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.mae_warmup_epochs * training.per_epoch))
        measured = dict(nn_accuracy=aux["nn_accuracy"]) if images.classes else {}
        taken, log = training.take_step(optimizer, loss, nnclr=aux["nnclr"], **measured)
        if taken:
            head.Q.push(aux["z1"], data.index, data.labels)
            ema_update(head.g_m, head.g, 0.0)
        training.log(log)
        training.save_if_due()


# ----------------------------------------------------------------------------------------------------------- main


def picture_reconstruction(path, encoder, decoder, images, s, machine):
    """Eight images, what the encoder sees of them, and the decoder's reconstruction."""
    pictures, index = next(center_views(images, s.image_size, machine, torch.arange(len(images))[:8]))
    noise = uniform((s.seed, "picture"), index, math.prod(encoder.grid))
    draw_rows(path, reconstruction_rows(encoder, decoder, augment(pictures), noise, s.mask_ratio, s.norm_pix))


def picture_retrieval(path, before, after, images, s, machine):
    """Figure 11: queries of six classes and their nearest neighbours, by features [N, D] before and after tuning; frames
    say which are of the query's class."""
    y = images.labels.tolist()
    rows = []
    for c, name in enumerate(images.classes[:6]):
        query = y.index(c)
        for model, x in (("MAE", normalize(before)), ("MAE-CT", normalize(after))):
            nearest = (x @ x[query]).topk(min(9, len(x))).indices.cpu()  # the query itself comes first
            pictures, _ = next(center_views(images, s.image_size, machine, nearest))
            frames = ["query"] + ["same class" if y[i] == c else "another class" for i in nearest[1:]]
            rows.append((f"{model}: {name}", pictures.cpu(), frames))
    draw_rows(path, rows, caption="nearest images by the cosine similarity of their features, from left to right")


def new_head(encoder, s):
    """The NNCLRHead of the settings."""
    return NNCLRHead(encoder.dim, s.projector_hidden, s.predictor_hidden, s.head_dim, s.queue)


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, machine, train, val (None without labels), encoder, decoder, head.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    need(re.fullmatch("(mae|combined)(,head)?(,ct)?|head(,ct)?|ct", s.stages),
         f"--stages {s.stages}: choose from mae (or combined), head, ct, in this order")  # fmt: skip
    pretraining = "mae" in s.stages or "combined" in s.stages
    need(pretraining or s.init, f"--stages {s.stages} starts from a trained encoder: give it with --init FILE")
    need(s.mask_ratio, "--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    machine = start_machine(s.precision, s.workers)
    torch.manual_seed(s.seed)
    encoder = new_encoder(s, s.pool)
    check_masking(encoder.grid, s.mask_ratio, s.ct_mask_ratio)
    decoder = new_decoder(encoder, s)
    head = new_head(encoder, s)
    if s.head:
        load_state(head, load_file(s.head), s.head)
    need(s.k <= s.queue, f"--k {s.k}: expected no more than the queue of {s.queue}")
    need("ct" not in s.stages or s.frozen < encoder.depth,
         f"--frozen {s.frozen}: {s.model} has {encoder.depth} blocks, and Table 9 freezes half of them")  # fmt: skip
    train, val = load_splits(s.data, labels=s.oracle, val=s.eval and not s.cost)
    if pretraining:
        check_batch(s, train, s.mae_batch, s.mae_epochs)
    if "head" in s.stages:
        check_batch(s, train, s.batch, s.head_epochs)
    if "ct" in s.stages:
        check_batch(s, train, s.batch, s.epochs)
    need(s.batch <= s.queue or s.stages in ("mae", "combined"), f"--batch {s.batch} is larger than the queue of {s.queue}")
    for model in (encoder, decoder, head):
        model.to(machine.device)
    return s, machine, train, val, encoder, decoder, head


def main(argv):
    """The stages of `--stages`, an evaluation before and after tuning where the data has labels, the closing table."""
    s, machine, train, val, encoder, decoder, head = prepare(argv)
    run = open_run(s, machine)
    untuned = run.folder / "mae.pt"

    if "mae" in s.stages:
        pretrain_mae(run, encoder, decoder, train, s.mae_views, s.mask_ratio, s.norm_pix)
    if "combined" in s.stages:
        combined_pretraining(run, encoder, decoder, head, train)
    before = next((stage for stage in ("combined", "mae") if stage in s.stages), "init")
    if not untuned.exists():
        save_encoder(untuned, encoder)
        if before in s.stages and not s.cost:
            picture_reconstruction(run.folder / "reconstruction.png", encoder, decoder, val or train, s, machine)
    if val and before not in run.results:
        run.report(before, evaluate(encoder, train, val, machine))

    if "head" in s.stages:
        if "combined" in s.stages:  # --stages combined,ct is the paper's CT_skip
            torch.manual_seed(s.seed)
            head = new_head(encoder, s).to(machine.device)
        contrastive(run, "head", encoder, head, train, epochs=s.head_epochs, lr=0.0, head_lr=s.head_lr,
                    frozen=encoder.depth, temperature=s.head_temperature, k=1, projector_ema=0.0)  # fmt: skip
    has_head = "head" in s.stages or "combined" in s.stages
    if has_head and not (run.folder / "head.pt").exists():
        save_file(run.folder / "head.pt", head.state_dict())
    if "ct" in s.stages:
        encoder = contrastive(run, "ct", encoder, head, train, epochs=s.epochs, lr=s.lr, head_lr=s.ct_head_lr,
                              frozen=s.frozen, temperature=s.temperature, k=s.k, projector_ema=s.projector_ema)  # fmt: skip
        if val and "mae_ct" not in run.results:
            run.report("mae_ct", evaluate(encoder, train, val, machine))
    save_encoder(run.folder / "encoder.pt", encoder)
    if val and "ct" in s.stages:
        x_before, _ = features(load_encoder(untuned).to(machine.device), val, machine)
        x_after, _ = features(encoder, val, machine)
        picture_retrieval(run.folder / "retrieval.png", x_before, x_after, val, s, machine)
    run.close()


if __name__ == "__main__":
    launch(main)
