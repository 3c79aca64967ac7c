"""MAE-CT: Contrastive Tuning, A Little Help to Make Masked Autoencoders Forget (Lehner et al., arXiv 2304.10520).

A masked autoencoder remembers everything in an image, the background too. MAE-CT makes it forget, in three stages:
  mae   pre-train a masked autoencoder (or start from a public one with --init)
  head  train an NNCLR head (projector, predictor, queue) on the frozen encoder, until its space is well structured
  ct    tune the upper half of the encoder with that head: the embedding of one view is replaced by one of its k nearest
        neighbours in the queue, and the other view's prediction is drawn to it (Algorithm 1, Eq. 1-2)
No augmentation but crop and flip is needed; the neighbours are the augmentation.

    python mae_ct.py                                                    # all of it on built-in data, in minutes
    torchrun --nproc_per_node 8 mae_ct.py --data /path/to/imagenet --model vit_l16
    torchrun --nproc_per_node 8 mae_ct.py --data /path/to/imagenet --model vit_l16 \
        --init mae_pretrain_vit_large.pth --stages head,ct
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29400 mae_ct.py --data ... --model vit_h16

Easy to get wrong:
  - BatchNorm statistics are those of one view over all ranks, never of both views together (A.2).
  - The queue is written after the optimizer's step, with the first view's z alone, on every rank the same (Algorithm 1).
  - A queue older than an epoch holds the sample itself: its own embedding is excluded from its neighbours.
  - Rows of the logits are neighbours (no gradient), columns are predictions of all ranks, gathered with gradient.
  - z comes from an EMA of the projector, p from the projector itself; the EMA's BatchNorm buffers are copied.
  - lr = base * batch * views / 256 with two views in stages head and ct (A.1), one in mae.
  - ViT-B/16 averages its patch tokens, the larger models use [CLS] (A.2). What is kept is the EMA of the encoder.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from common import (
    BYOL, VIT_SIZES, InputError, MAEDecoder, Queue, Run, RunSettings, View, adamw, augment, backward, build_vit,
    check_batch, check_masking, draw, ema_update, frozen_copy, info_nce, init_encoder, launch, load_encoder, load_file,
    load_splits, load_state, mae_loss, mlp_head, normalize, parameter_groups, parse_settings, pretrain_mae, rank,
    random_masking, reconstruct, save_encoder, save_file, start, to_bytes, uniform, warmup_cosine,
)  # fmt: skip
from eval import center_views, evaluate, features


@dataclass
class Settings(RunSettings):
    """Defaults are ViT-L/16's; `presets` holds what differs for other models."""

    model: str = "vit_l16"
    stages: str = "mae,head,ct"  # any of them in this order; `combined` instead of `mae` for Section 4.5
    head: str = ""  # head.pt of another run, for --stages ct without stage head

    # MAE pre-training: 4.1, A.1; what the paper leaves to He et al. 2022 is from their Table 8
    mae_epochs: float = 1600  # 4.1
    mae_batch: int = 4096  # He et al. Table 8
    mae_lr: float = 1.5e-4  # 4.1
    mae_warmup_epochs: float = 40  # He et al. Table 8
    mae_views: int = 1  # 2 for the re-implementation of A.1, which then has 800 epochs and a batch of 1024 (H: 512)
    mask_ratio: float = 0.75  # 4.1
    norm_pix: bool = True  # 4.1, "normalize pixels"
    decoder_dim: int = 512  # He et al. Table 1b
    decoder_depth: int = 8  # He et al. Table 1a
    decoder_heads: int = 16

    # both contrastive stages: Algorithm 1, Table 9, A.2
    batch: int = 1024
    warmup: float = 0.2  # fraction of the steps
    scale_min: float = 0.08  # of the random crops' area; not printed, the authors' code
    pool: str = "cls"  # A.2
    queue: int = 65536
    projector_hidden: int = 2048
    predictor_hidden: int = 4096
    head_dim: int = 256
    head_weight_decay: float = 1e-5
    nn_lookup: bool = True  # Table 4: without it, z itself is the positive

    # stage head: 4.1, A.2
    head_epochs: float = 20
    head_lr: float = 1e-4
    head_temperature: float = 0.15

    # stage ct: Table 9
    epochs: float = 20
    lr: float = 1e-4
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    frozen: int = 12  # lower blocks
    ema: float = 0.9999  # of the encoder
    ct_head_lr: float = 1e-4
    temperature: float = 0.2
    k: int = 20
    projector_ema: float = 0.99
    ct_mask_ratio: float = 0.0  # Table 4: 0.75
    aug: bool = False  # MAE-CT_aug: Table 10 and BYOL's augmentations
    oracle: bool = False  # B.2: neighbours of the same class only, 30 epochs

    # combined pre-training: 4.5
    combined_weight: float = 0.001  # lambda
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
# The built-in run: small enough for two CPU cores
SHAPES = dict(
    model="vit_nano8", image_size=48, pool="mean", decoder_dim=64, decoder_depth=2, decoder_heads=4,
    mae_epochs=20, mae_batch=256, mae_lr=2e-3, mae_warmup_epochs=2,
    batch=256, queue=4096, projector_hidden=512, predictor_hidden=512, head_dim=128, scale_min=0.15,
    head_epochs=8, head_lr=2e-3,
    epochs=14, lr=2e-3, ct_head_lr=1e-3, layer_decay=0.8, frozen=2, ema=0.97, temperature=0.15,
)  # fmt: skip


def presets(given):
    """Field values for the flags given: the model's columns of Tables 9 and 10, the built-in run, A.1, B.2."""
    size = re.match(r"vit_(2b|\D+)|", given.get("model", "vit_l16"))[1]
    row = dict(TABLE_9.get(size) or dict(frozen=VIT_SIZES.get(size, (0, 0))[1] // 2))  # other sizes: the lower half too
    if given.get("aug"):
        row |= TABLE_10.get(size, TABLE_10["l"])
    if given.get("mae_views") == 2 or "combined" in given.get("stages", ""):
        row |= dict(mae_views=2, mae_epochs=800, mae_warmup_epochs=20, mae_batch=512 if size == "h" else 1024)
    if given.get("oracle"):
        row |= dict(epochs=30)
    if given.get("data", "shapes") == "shapes":  # whatever the variant, in the built-in run's own length
        row |= SHAPES
        if given.get("short"):
            row |= dict(mae_epochs=8, mae_warmup_epochs=1, head_epochs=2, epochs=3)
    return row


# ---------------------------------------------------------------------------------------------------------- model


class NNCLRHead(nn.Module):
    """Projector g, predictor h, EMA projector g_m and queue Q (Figure 2, A.2, Algorithm 1)."""

    def __init__(self, dim, s):
        super().__init__()
        self.g = mlp_head(dim, s.projector_hidden, s.projector_hidden, s.head_dim, last_norm=True)
        self.h = mlp_head(s.head_dim, s.predictor_hidden, s.head_dim, last_norm=False)
        self.g_m = frozen_copy(self.g)
        self.Q = Queue(s.queue, s.head_dim)

    def loss(self, y1, y2, index, labels, dice, temperature, k, nn_lookup=True, oracle=False):
        """The symmetrised InfoNCE loss of Algorithm 1 (Eq. 1-2).

        y1, y2 [N, D]: features of two views; index, labels [N]; dice [N, 2] in [0, 1) for the top-k sampling.

        Returns:
            loss (scalar), and a dict: z1 [N, head_dim] for the queue, and nn_accuracy, the share of neighbours of the
            sample's class (of meaning where there are labels).
        """
        p1, p2 = normalize(self.h(self.g(y1))), normalize(self.h(self.g(y2)))  # predictor path, BatchNorm per view
        with torch.no_grad():
            z1, z2 = normalize(self.g_m(y1)), normalize(self.g_m(y2))  # NN path
            of_class = labels if oracle else None
            at1 = self.Q.lookup(z1, index, k, dice[:, 0], of_class)
            at2 = self.Q.lookup(z2, index, k, dice[:, 1], of_class)
            nn1, nn2 = self.Q.embeddings[at1], self.Q.embeddings[at2]
            nn_accuracy = (self.Q.labels[at1] == labels).float().mean()
        if not nn_lookup:
            nn1, nn2 = z1, z2
        loss = info_nce(nn1, p2, temperature) / 2 + info_nce(nn2, p1, temperature) / 2
        return loss, dict(z1=z1, nn_accuracy=nn_accuracy)


# ---------------------------------------------------------------------------------------------------------- loops


def contrastive(run, stage, f, head, images, *, epochs, lr, head_lr, frozen, temperature, k, projector_ema):
    """Algorithm 1. Stage "head" is the same with all blocks frozen, k = 1 and no EMA in the projector (A.2).

    Returns:
        f_m, the EMA of the encoder.
    """
    s = run.settings
    f.freeze(frozen)
    tuned = frozen < f.depth
    f_m = frozen_copy(f) if tuned else f
    scale = s.batch * 2 / 256  # A.1: batch size x views / 256
    groups = parameter_groups(head, head_lr * scale, s.head_weight_decay)
    groups += parameter_groups(f, lr * scale, s.weight_decay, s.layer_decay)
    optimizer = adamw(groups, zero=s.zero)
    views = [View(s.image_size, (s.scale_min, 1.0))] * 2
    oracle, masked = (s.oracle, s.ct_mask_ratio) if stage == "ct" else (False, 0)
    patches = f.grid[0] * f.grid[1]

    def encode(x1, x2, ids1, ids2):
        ids = torch.cat([ids1, ids2]) if masked else None
        return f.pooled(f(torch.cat([x1, x2]), ids)).chunk(2), None  # y1, y2

    for data in run.steps(stage, images, views, s.batch, epochs, dict(encoder=f, ema=f_m, head=head, optimizer=optimizer)):
        key = (s.seed, stage, run.step)
        if s.aug:
            noise = uniform((*key, "colour"), data.rows, 2, 13)
            x1, x2 = (augment(x, colour, n) for x, colour, n in zip(data.views, BYOL, noise.unbind(1)))
        else:
            x1, x2 = map(augment, data.views)
        ids1 = ids2 = None
        if masked:
            noise = uniform((*key, "mask"), data.rows, 2, patches, device=run.device)
            ids1, ids2 = (random_masking(n, masked)[0] for n in noise.unbind(1))
        dice = uniform((*key, "dice"), data.rows, 2, device=run.device)

        def objective(y1, y2):
            return head.loss(y1, y2, data.index, data.labels, dice, temperature, k, s.nn_lookup, oracle)

        loss, aux = backward(encode, objective, (x1, x2, ids1, ids2), s.micro_batch, run.precision)
        factor = warmup_cosine(run.step, run.total, s.warmup * run.total)
        log = dict(nn_accuracy=aux["nn_accuracy"]) if images.classes else {}
        if run.optimize(optimizer, loss, log, factor):
            head.Q.push(aux["z1"], data.index, data.labels)
            ema_update(head.g_m, head.g, projector_ema)
            if tuned:
                ema_update(f_m, f, s.ema)
    return f_m


def combined_pretraining(run, f, decoder, head, images):
    """Section 4.5: L = L_MAE + lambda * L_NNCLR on two masked views; `detach` stops the head's gradient at the encoder."""
    s = run.settings
    f.freeze(0)
    groups = parameter_groups(nn.ModuleList([f, decoder, head]), s.mae_lr * s.mae_batch / 256, s.weight_decay)
    optimizer = adamw(groups, zero=s.zero)
    state = dict(encoder=f, decoder=decoder, head=head, optimizer=optimizer)

    def encode(x, noise):
        x, noise = x.flatten(0, 1), noise.flatten(0, 1)  # [N * 2, ...], a sample's views side by side
        ids_keep, ids_restore, mask = random_masking(noise, s.mask_ratio)
        tokens = f(x, ids_keep)
        loss = mae_loss(decoder(tokens, ids_restore), x, mask, s.norm_pix)
        y = f.pooled(tokens.detach() if s.detach else tokens).unflatten(0, (-1, 2))
        return (y[:, 0], y[:, 1]), loss.view(-1, 2).mean(1)

    for data in run.steps("combined", images, [View(s.image_size)] * 2, s.mae_batch, s.mae_epochs, state):
        x = torch.stack([augment(v) for v in data.views], 1)  # [N, 2, 3, S, S]
        key = (s.seed, "combined", run.step)
        noise = uniform((*key, "mask"), data.rows, 2, f.grid[0] * f.grid[1], device=run.device)
        dice = uniform((*key, "dice"), data.rows, 2, device=run.device)

        def objective(y1, y2):
            loss, aux = head.loss(y1, y2, data.index, data.labels, dice, s.head_temperature, 1, s.nn_lookup)
            return s.combined_weight * loss, aux | dict(nnclr=loss.detach())

        loss, aux = backward(encode, objective, (x, noise), s.micro_batch, run.precision)
        factor = warmup_cosine(run.step, run.total, s.mae_warmup_epochs * run.per_epoch)
        log = dict(nnclr=aux["nnclr"]) | (dict(nn_accuracy=aux["nn_accuracy"]) if images.classes else {})
        if run.optimize(optimizer, loss, log, factor):
            head.Q.push(aux["z1"], data.index, data.labels)
            ema_update(head.g_m, head.g, 0.0)


# ----------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def picture_reconstruction(path, encoder, decoder, images, s, device):
    """Eight images, what the encoder sees of them, and the decoder's reconstruction."""
    picks = torch.arange(min(8, len(images)))
    x = augment(next(center_views(images, s.image_size, device, 0, picks))[0])
    noise = uniform((s.seed, "picture"), picks.to(device), encoder.grid[0] * encoder.grid[1])
    masked, restored = reconstruct(encoder, decoder, x, noise, s.mask_ratio, s.norm_pix)
    rows = [("input", x), (f"{s.mask_ratio:.0%} removed", masked), ("reconstruction", restored)]
    draw(path, [(caption, to_bytes(v), None) for caption, v in rows])


@torch.no_grad()
def picture_retrieval(path, before, after, y, images, s, device, queries=6, neighbours=8):
    """Figure 11: queries and their nearest neighbours before and after tuning; green frames are the query's class."""
    rows = []
    for q in [(y == c).nonzero()[0].item() for c in range(min(queries, len(images.classes)))]:
        for name, x in (("MAE", before), ("MAE-CT", after)):
            x = torch.nn.functional.normalize(x, dim=1)
            found = (x @ x[q]).topk(neighbours + 1).indices.cpu()  # the query itself comes first
            pictures, _ = next(center_views(images, s.image_size, device, 0, found))
            pictures = pictures.cpu()
            frames = ["black"] + ["limegreen" if y[f] == y[q] else "red" for f in found[1:]]
            rows.append((f"{name}: {images.classes[y[q]]}", pictures, frames))
    draw(path, rows)


def prepare(argv):
    """Everything that can be wrong with the input is found here, before the run folder is made.

    Returns:
        settings, device, train, val (None without labels), stages, encoder, decoder, head.
    """
    s = parse_settings(Settings, presets, argv, __doc__)
    stages = s.stages.split(",")
    if stages != [x for x in ("mae", "combined", "head", "ct") if x in stages] or stages[:2] == ["mae", "combined"]:
        raise InputError(f"--stages {s.stages}: choose from mae (or combined), head, ct, in this order")
    if not {"mae", "combined"} & set(stages) and not s.init:
        raise InputError(f"--stages {s.stages} starts from a trained encoder: give it with --init FILE")
    if s.pool not in ("cls", "mean"):
        raise InputError(f"--pool {s.pool}: choose cls or mean")
    if not s.mask_ratio:
        raise InputError("--mask_ratio 0 leaves nothing to reconstruct: choose a number above 0, below 1")
    device = start()
    torch.manual_seed(s.seed)
    encoder = build_vit(s.model, s.image_size, s.pool)
    encoder.checkpoint_blocks = s.checkpoint_blocks
    check_masking(encoder.grid, s.mask_ratio, s.ct_mask_ratio)
    if s.init:
        init_encoder(encoder, s.init)
    decoder = MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, s.decoder_dim, s.decoder_depth, s.decoder_heads)
    head = NNCLRHead(encoder.dim, s)
    if s.head:
        load_state(head, load_file(s.head), s.head)
    if s.k > s.queue:
        raise InputError(f"--k {s.k}: expected no more than the queue of {s.queue}")
    if "ct" in stages and s.frozen >= encoder.depth:
        raise InputError(f"--frozen {s.frozen}: {s.model} has {encoder.depth} blocks, and Table 9 freezes half of them")
    train, val = load_splits(s.data, labels=s.oracle, val=not s.cost)
    mae, head_init, ct = (s.mae_batch, s.mae_epochs), (s.batch, s.head_epochs), (s.batch, s.epochs)
    for name, size in dict(mae=mae, combined=mae, head=head_init, ct=ct).items():
        if name in stages:
            check_batch(s, train, *size)
    if s.batch > s.queue and {"head", "ct"} & set(stages):
        raise InputError(f"--batch {s.batch} is larger than the queue of {s.queue}")
    return s, device, train, val, stages, encoder.to(device), decoder.to(device), head.to(device)


def main(argv):
    """The stages of `--stages`, an evaluation before and after tuning where the data has labels, the closing table."""
    s, device, train, val, stages, encoder, decoder, head = prepare(argv)
    run = Run(s, device)
    first = run.folder / "mae.pt"  # the encoder before tuning

    if "mae" in stages:
        pretrain_mae(run, encoder, decoder, train, epochs=s.mae_epochs, batch=s.mae_batch, lr=s.mae_lr, views=s.mae_views,
                     warmup_epochs=s.mae_warmup_epochs, mask_ratio=s.mask_ratio, norm_pix=s.norm_pix)  # fmt: skip
    if "combined" in stages:
        combined_pretraining(run, encoder, decoder, head, train)
    if rank() == 0 and not first.exists():
        save_encoder(first, encoder)
        if {"mae", "combined"} & set(stages) and not s.cost:
            picture_reconstruction(run.folder / "reconstruction.png", encoder, decoder, val or train, s, device)
    before = "combined" if "combined" in stages else "mae"
    if val and before not in run.results:
        run.report(before, evaluate(encoder, train, val, run))

    if "head" in stages:
        if "combined" in stages:  # a new head; --stages combined,ct is the paper's CT_skip
            torch.manual_seed(s.seed)
            head = NNCLRHead(encoder.dim, s).to(device)
        contrastive(run, "head", encoder, head, train, epochs=s.head_epochs, lr=0.0, head_lr=s.head_lr,
                    frozen=encoder.depth, temperature=s.head_temperature, k=1, projector_ema=0.0)  # fmt: skip
        if rank() == 0 and not (run.folder / "head.pt").exists():
            save_file(run.folder / "head.pt", head.state_dict())
    if "ct" in stages:
        encoder = contrastive(run, "ct", encoder, head, train, epochs=s.epochs, lr=s.lr, head_lr=s.ct_head_lr,
                              frozen=s.frozen, temperature=s.temperature, k=s.k, projector_ema=s.projector_ema)  # fmt: skip
        if val and "mae_ct" not in run.results:
            run.report("mae_ct", evaluate(encoder, train, val, run))
    if rank() == 0:
        save_encoder(run.folder / "encoder.pt", encoder)
    if val and "ct" in stages:
        untuned = load_encoder(first).to(device)
        x = [features(e, val, run)[0] for e in (untuned, encoder)]
        if rank() == 0:
            picture_retrieval(run.folder / "retrieval.png", *x, val.labels, val, s, device)
    run.close()


if __name__ == "__main__":
    launch(main)
