"""Evaluation of an encoder: one function per protocol, each a subcommand.

    python eval.py knn     --encoder runs/001/encoder.pt --data /path/to/imagenet
    python eval.py probe   --encoder runs/001/encoder.pt --data /path/to/imagenet        (writes probe.pt beside it)
    python eval.py cluster --encoder runs/001/encoder.pt --data /path/to/imagenet
    python eval.py finetune --encoder runs/001/encoder.pt --data /path/to/imagenet --blocks 1
    torchrun --nproc_per_node 8 eval.py knn --encoder mae_vit_large.pth --data /path/to/imagenet

Encoders are files written here or public ones (common.read_encoder). Every protocol prints a table and writes it as JSON
beside the encoder. What a protocol's text leaves open stands in its function's docstring.
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from torch import nn

from common import (
    LARS, BatchNorm, CenterCrop, InputError, Parser, RunSettings, View, adamw, augment, average_gradients, backward,
    batches,
    check_batch, decode, draw_matrix, gather, launch, load_encoder, load_file, load_splits, load_state, parameter_groups, precision_of,
    print0, promote, rank, save_encoder, save_file, set_lr, start, uniform, warmup_cosine, world, write_atomic,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- one pass over the data


@dataclass
class Machine:
    """What a protocol runs on: `run` in all that follows. A common.Run has the same fields."""

    device: torch.device
    precision: torch.dtype = torch.float32  # of autocast
    workers: int = 0  # decoding processes


def autocast(run):
    return torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32)


def progress(items, total, what):
    """Yields the items; a line on the terminal says how many of `total` are done and how long the rest takes."""
    begin = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if sys.stdout.isatty() and (now - shown > 0.5 or done == total):
            shown, left = now, (now - begin) / done * (total - done)
            print0(f"{what} {done}/{total}  {int(left // 60)}:{int(left % 60):02d} left ", end="\n" if done == total else "\r")


def splits(args):
    """(training, validation images) of --data, both with labels."""
    train, val = load_splits(args.data, labels=True)
    if val is None:
        raise InputError(f"--data {args.data}: there is no val/ or test/ to evaluate on")
    return train, val


def listed(images, path):
    """Indices of the images that a file names, one a line: SimCLRv2's 1 % and 10 % of ImageNet, MSN's 1, 2 or 5 images a
    class. A line is a file's name or the end of its path (n01440764/n01440764_10026.JPEG).

    Raises:
        InputError: no such list, an image set without files, or a line that names none or several.
    """
    if images.files is None:
        raise InputError(f"{path}: a list of files needs a folder of files as --data")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such list of files")
    lines, found = Path(path).read_text().split(), {}
    files = [os.fsdecode(f).split("/") for f in images.files]
    depths = {line.count("/") + 1 for line in lines}
    for i, parts in enumerate(files):
        for depth in depths:
            found.setdefault("/".join(parts[-depth:]), []).append(i)
    for line in lines:
        if len(found.get(line, [])) != 1:
            raise InputError(f"{path}: {line} names {len(found.get(line, []))} images of the training set, expected one")
    return torch.tensor([found[line][0] for line in lines])


def drawn(labels, shots=None, fraction=None, seed=0):
    """Indices of images drawn at random, `shots` of every class or a `fraction` of it, in the order of the set.

    Raises:
        InputError: a class that has fewer.
    """
    order = uniform((seed, "drawn"), torch.arange(len(labels)), 1)[:, 0].argsort(stable=True)
    kept = []
    for c in labels.unique().tolist():
        of_class = order[labels[order] == c]
        wanted = shots or max(1, round(fraction * len(of_class)))
        if wanted > len(of_class):
            raise InputError(f"{wanted} images a class are wanted, but class {c} has {len(of_class)}")
        kept.append(of_class[:wanted])
    return torch.cat(kept).sort().values


def of_classes(images, path):
    """The images of the classes that a file names, one a line (MAE-CT's ImageNet-Dogs15, MIM-Refiner's 53 food classes)."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such list of classes")
    names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    unknown = [name for name in names if name not in images.classes]
    if unknown or len(set(names)) < 2:
        what = f"{unknown[0]!r} is no class" if unknown else "fewer than two classes"
        raise InputError(f"{path}: {what}; the data has {', '.join(map(str, images.classes[:5]))}, …")
    numbers = torch.tensor([images.classes.index(name) for name in names])
    return images.subset(torch.isin(images.labels, numbers).nonzero()[:, 0], names)


def center_views(images, size, device, workers, index, batch=256):
    """Yields (evaluation crops uint8 [n, 3, size, size], their indices [n]) of images `index`, in order; an unreadable
    image is replaced by another, whose index it then has."""
    if images.pixels is not None and images.pixels.shape[2:] == (size, size):
        for part in index.split(batch):
            yield images.pixels[part].to(device), part.to(device)
        return
    keys = [[(0, i) for i in part.tolist()] for part in index.split(batch)]
    for views, used in decode(images, keys, CenterCrop(size), device, workers, {}):
        yield views[0], used


@torch.no_grad()
def outputs(function, images, size, run, index=None, what="images encoded"):
    """A function of every image, unaugmented, in one pass: ([N, …], at least float32; labels [N]), both on the device.

    `function` maps standardised center crops [n, 3, size, size] to [n, …]; `index` [N] chooses images. Under torchrun each
    rank computes its part and all get the whole. An unreadable image counts as the next readable one.
    """
    index = torch.arange(len(images)) if index is None else index
    share = math.ceil(len(index) / world())
    mine = index[torch.arange(rank() * share, (rank() + 1) * share) % len(index)]
    out, used = [], []
    views = center_views(images, size, run.device, run.workers, mine)
    for x, at in progress(views, math.ceil(share / 256), f"batches of {what}"):
        with autocast(run):
            out.append(promote(function(augment(x))))
        used.append(at)
    used = gather(torch.cat(used))[: len(index)]
    return gather(torch.cat(out))[: len(index)], images.labels.to(run.device)[used]


def pool_tokens(tokens, pool):
    """Tokens […, 1 + L, D] → […, D] of [CLS] ("cls") or of the patches' mean ("mean"), or […, 2D] of "both"."""
    cls, mean = tokens[..., 0, :], tokens[..., 1:, :].mean(-2)
    return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], -1)}[pool]


def pooled(encoder, x, blocks=None, pool=None):
    """Features of standardised images x [n, 3, S, S].

    Args:
        blocks: None: after the final norm, [n, F]; or numbers from 1: after these blocks, before the final norm,
            [n, blocks, F].
        pool: "cls", "mean" (of the patch tokens), or "both" side by side (F = 2D); None: the encoder's own.
    """
    tokens = encoder(x, blocks=blocks)
    tokens = torch.stack(tokens, 1) if blocks else tokens  # [n, (blocks,) 1 + L, D]
    return pool_tokens(tokens, pool or encoder.pool)


def last_blocks(encoder, count):
    """Numbers of the last `count` blocks.

    Raises:
        InputError: the encoder has fewer.
    """
    if not 1 <= count <= encoder.depth:
        raise InputError(f"the last {count} blocks are wanted, but the encoder has {encoder.depth}: choose 1 or more of them")
    return list(range(encoder.depth - count + 1, encoder.depth + 1))


def features(encoder, images, run, blocks=None, pool=None, index=None):
    """Features of a whole set, as of `pooled`: ([N, (blocks,) F], labels [N])."""
    return outputs(lambda x: pooled(encoder, x, blocks, pool), images, encoder.config["image_size"], run, index)


class Classifier(nn.Module):
    """An encoder and a linear classifier on its feature: standardised images [N, 3, S, S] → logits [N, C].

    What probe.pt (without the encoder) and finetuned.pt (with it) hold. The feature is that of `pooled`, blocks side by
    side; `norm` is a probe's non-affine BatchNorm, or nothing.
    """

    def __init__(self, encoder, classes, blocks=None, pool=None, norm=None):
        super().__init__()
        self.encoder, self.classes, self.blocks, self.pool = encoder, list(classes), blocks, pool or encoder.pool
        self.norm = norm or nn.Identity()
        self.head = nn.Linear(encoder.dim * len(blocks or [0]) * (1 + (self.pool == "both")), len(self.classes))

    def forward(self, x):
        return self.head(self.norm(promote(pooled(self.encoder, x, self.blocks, self.pool).flatten(1))))

    def save(self, path, with_encoder):
        """{"classifier": …}; `with_encoder` besides all that encoder.pt has."""
        parts = {f"{p}.{k}": v for p in ("norm", "head") for k, v in getattr(self, p).state_dict().items()}
        content = dict(state=parts, classes=self.classes, blocks=self.blocks, pool=self.pool, eps=getattr(self.norm, "eps", None))
        if with_encoder:
            save_encoder(path, self.encoder, classifier=content)
        else:
            save_file(path, dict(classifier=content))


def load_classifier(path, encoder):
    """A Classifier from finetuned.pt, which has an encoder of its own, or from probe.pt and its `encoder`.

    Raises:
        InputError: the file holds no classifier, or one of another encoder.
    """
    content = load_file(path)
    if not isinstance(content, dict) or "classifier" not in content:
        raise InputError(f"{path} holds no classifier: `eval.py probe` writes probe.pt, `eval.py finetune` finetuned.pt")
    own, how = "model" in content, content["classifier"]
    encoder = load_encoder(path).to(encoder.cls_token.device) if own else encoder
    norm = None if how["eps"] is None else BatchNorm(how["state"]["norm.running_mean"].shape[-1], affine=False, eps=how["eps"])
    classifier = Classifier(encoder, how["classes"], how["blocks"], how["pool"], norm).to(encoder.cls_token.device)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | how["state"]
    load_state(classifier, state, str(path))
    return classifier.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- k-NN


@torch.no_grad()
def nearest(train_x, test_x, k, chunk=65536):
    """The k most similar rows of train_x [N, D] for each row of test_x [n, D]: (similarities, indices), both [n, k].

    The training set is visited in chunks, so that similarities take n · chunk values at a time.
    """
    best, where = test_x.new_full((len(test_x), 0), 0), torch.empty(len(test_x), 0, dtype=torch.long, device=test_x.device)
    for first in range(0, len(train_x), chunk):
        similarity = test_x @ train_x[first : first + chunk].T
        value, index = similarity.topk(min(k, similarity.shape[1]), 1)
        best, where = torch.cat([best, value], 1), torch.cat([where, index + first], 1)
        best, order = best.topk(min(k, best.shape[1]), 1)
        where = where.gather(1, order)
    return best, where


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, ks=(10,), temperature=0.07, standardize=False):
    """Weighted k-NN on cosine similarity (MAE-CT A.3; Wu et al. 2018; DINO): accuracy in percent.

    Votes weigh exp(similarity / temperature), DINO's protocol; temperature=0 weighs them by the similarity itself, as the
    texts of MAE-CT and MIM-Refiner (C.4) say. `standardize` first subtracts the training mean and divides by the training
    deviation (MIM-Refiner's code). Under torchrun each rank classifies its part of the test set.

    Args:
        train_x [N, D], train_y [N], test_x [n, D], test_y [n]; ks: neighbours, all from one search.
    Returns:
        {"knn": best accuracy, "k": its k, "knn_by_k": {k: accuracy}}.
    Raises:
        InputError: a k larger than the training set.
    """
    if max(ks) > len(train_x):
        raise InputError(f"k = {max(ks)} is larger than the training set of {len(train_x)}")
    if standardize:
        std, mean = torch.std_mean(train_x, 0)
        train_x, test_x = (train_x - mean) / (std + 1e-6), (test_x - mean) / (std + 1e-6)
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    classes = int(max(train_y.max(), test_y.max())) + 1
    right = torch.zeros(len(ks), dtype=torch.long, device=test_x.device)
    for rows in torch.arange(len(test_x))[rank() :: world()].split(1024):
        similarity, index = nearest(train_x, test_x[rows], max(ks))
        weight = torch.exp((similarity - similarity[:, :1]) / temperature) if temperature else similarity
        for i, k in enumerate(ks):
            votes = similarity.new_zeros(len(rows), classes).scatter_add_(1, train_y[index[:, :k]], weight[:, :k])
            right[i] += (votes.argmax(1) == test_y[rows]).sum()
    right = gather(right[None]).sum(0)
    by_k = {k: 100 * r / len(test_x) for k, r in zip(ks, right.tolist())}
    best = max(by_k, key=by_k.get)
    return {"knn": by_k[best], "k": best, "knn_by_k": by_k}


def knn_per_block(encoder, train, val, run, blocks=None, bank=100_000, **how):
    """k-NN of the feature after each block (all of them, or `blocks`), before the final norm: MIM-Refiner's Figure 3b.

    k = 10 (C.4) on standardised features (the authors' code), or as `how` tells `knn`, against at most `bank` training
    images drawn at random, since N · blocks · D values are kept at once. Returns a list of accuracies in percent.
    """
    blocks = blocks or list(range(1, encoder.depth + 1))
    drawn = uniform(("bank",), torch.arange(len(train)), 1)[:, 0].argsort()[:bank]
    x, y = features(encoder, train, run, blocks, index=drawn)
    test_x, test_y = features(encoder, val, run, blocks)
    how = dict(ks=(min(10, len(x)),), standardize=True) | how
    return [knn(x[:, b], y, test_x[:, b], test_y, **how)["knn"] for b in range(len(blocks))]


def run_knn(args, encoder, run):
    """Subcommand knn. Several blocks, or with --raw the last, are taken before the final norm, as in MIM-Refiner's
    code: C.10 is `--last 4 --standardize`, Figure 3b `--per_block --standardize`."""
    if args.per_block and args.last > 1:
        raise InputError(f"--per_block takes each block by itself: leave out --last {args.last}")
    blocks = last_blocks(encoder, args.last) if args.last != 1 or args.raw else None
    how = dict(ks=args.k, temperature=0 if args.votes == "similarity" else 0.07, standardize=args.standardize)
    train, val = splits(args)
    if args.per_block:
        return {"knn_per_block": knn_per_block(encoder, train, val, run, **how)}
    (x, y), (test_x, test_y) = (features(encoder, images, run, blocks) for images in (train, val))
    return knn(x.flatten(1), y, test_x.flatten(1), test_y, **how)


# ------------------------------------------------------------------------------------------------- linear probing

PROBE_LRS = tuple(i / 100 for i in range(10, 0, -1))  # MAE-CT, Table 11: 0.1, 0.09, … 0.01
DINOV2_LRS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class ProbeRecipe:
    """How probes are trained; all with momentum 0.9, no weight decay, linear warm-up, cosine to 0, random crops."""

    epochs: int
    batch: int
    warmup_epochs: int
    lrs: tuple  # at batch 256, all of them at once
    flip: bool = True
    lars: bool = False
    grid: tuple = None  # of features: (last blocks, pooling), None for the encoder's own


PROBE_RECIPES = {
    # MAE-CT, Table 11
    "mae_ct": ProbeRecipe(epochs=50, batch=1024, warmup_epochs=5, lrs=PROBE_LRS),
    # MIM-Refiner C.3, DINOv2's grid: 52 probes. Batch and warm-up are those of the authors' code
    "dinov2": ProbeRecipe(50, 1024, 5, DINOV2_LRS, grid=((1, None), (1, "both"), (4, None), (4, "both"))),
    # MIM-Refiner C.8, what is left of it for many classes (iNat18), in the authors' code
    "dinov2_reduced": ProbeRecipe(50, 1024, 5, DINOV2_LRS[3:7], grid=((4, None), (4, "both"))),
    # CAN, Table 11, after MAE (which has 90 epochs); no flip is listed
    "lars": ProbeRecipe(epochs=100, batch=16384, warmup_epochs=10, lrs=(0.1,), flip=False, lars=True),
    # ViC-MAE, Table 9; no flip is listed
    "vicmae": ProbeRecipe(epochs=90, batch=4096, warmup_epochs=10, lrs=(0.1,), flip=False),
}


class Probes(nn.Module):
    """P linear classifiers behind one non-affine BatchNorm: [N, D] → [P, N, C]; weights normal(0.01), biases 0."""

    def __init__(self, probes, dim, classes, eps=1e-5):
        super().__init__()
        self.norm = BatchNorm(dim, affine=False, eps=eps)
        self.weight = nn.Parameter(torch.empty(probes, classes, dim).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(probes, classes))

    def forward(self, x):
        logits = F.linear(self.norm(x), self.weight.flatten(0, 1), self.bias.flatten())  # one product, not P
        return logits.unflatten(1, self.bias.shape).transpose(0, 1)

    def classifier(self, encoder, classes, number, blocks=None, pool=None):
        """Probe `number` as a Classifier."""
        classifier = Classifier(encoder, classes, blocks, pool, self.norm)
        classifier.head.weight.data, classifier.head.bias.data = self.weight.data[number], self.bias.data[number]
        return classifier


def cached_batches(x, y, batch, epochs, seed=0):
    """Batches of cached features [N, D], shuffled every epoch; each rank gets its part."""
    n = batch // world()
    for epoch in range(epochs):
        order = uniform((seed, epoch, "order"), torch.arange(len(x)), 1)[:, 0].argsort().to(x.device)
        for first in range(rank() * n, len(x) // batch * batch, batch):
            rows = order[first : first + n]
            yield x[rows], y[rows]


@torch.no_grad()
def augmented_batches(function, images, size, batch, epochs, run, seed=0, flip=True):
    """A function of random crops [n, 3, size, size] and flips (Table 11), say the encoder's features: yields ([n, …],
    labels [n])."""
    steps = epochs * (len(images) // batch)
    views = batches(images, [View(size, (0.08, 1.0), flip)], batch, 0, steps, seed, run.device, run.workers, {})
    for data in progress(views, steps, "steps"):
        with autocast(run):
            out = promote(function(augment(data.views[0])))
        yield out, data.labels


def probe(train, steps, warmup, classes, test_x, test_y, batch, lrs=PROBE_LRS, sets=None, lars=False):
    """Linear probes of one or several feature sets, every learning rate of a sweep, trained side by side on the same
    batches (MAE-CT A.3, Table 11; MIM-Refiner C.3). As in the papers, the best on the test set is reported.

    SGD or LARS with momentum 0.9, no weight decay, lr = base · batch / 256, warm-up and cosine. An update of plain SGD
    is proportional to lr, so each probe's rate is a weight of its loss. LARS cancels such weights: there every rate has
    `Probes` of its own.

    Args:
        train: iterable of `steps` batches ([n, D], labels [n]) of this rank: `cached_batches` or `augmented_batches`;
        warmup: steps; classes: their number; test_x [N, D], test_y [N]; batch: global batch size; lrs: base rates, at
        batch 256; sets: {name: width} of the feature sets that stand side by side in D.
    Returns:
        {"probe": accuracy in percent, "lr": its base rate, "probe_by_lr": of its feature set}, for several feature sets
        also {"features": its name, "probe_by_features": the best of each}; the best's Probes and its number in them.
    """
    torch.manual_seed(0)
    sets = sets or {"": test_x.shape[1]}
    together = 1 if lars else len(lrs)
    repeat = len(lrs) // together
    heads = nn.ModuleList(Probes(together, width, classes) for width in sets.values() for _ in range(repeat))
    heads.to(test_x.device)
    rates = [lr * batch / 256 for _ in sets for lr in lrs]  # as in the result of `logits`

    def logits(x):  # [sets · lrs, n, C]
        parts = [part for part in x.split(list(sets.values()), 1) for _ in range(repeat)]
        return torch.cat([head(part) for head, part in zip(heads, parts)])

    if lars:
        groups = [dict(params=[head.weight], peak_lr=rate) for head, rate in zip(heads, rates)]
        groups += [dict(params=[head.bias], peak_lr=rate, trust=0) for head, rate in zip(heads, rates)]
        optimizer, weights = LARS(groups), test_x.new_ones(len(rates))
    else:
        groups = [dict(params=list(heads.parameters()), peak_lr=1.0)]
        optimizer, weights = torch.optim.SGD(groups, lr=1.0, momentum=0.9), test_x.new_tensor(rates)
    for step, (x, y) in enumerate(train):
        losses = F.cross_entropy(logits(x).flatten(0, 1), y.repeat(len(rates)), reduction="none")
        (losses.view(len(rates), -1).mean(1) * weights).sum().backward()
        average_gradients(heads.parameters())
        set_lr(optimizer, warmup_cosine(step, steps, warmup))
        optimizer.step()
        optimizer.zero_grad()
    heads.eval()
    with torch.no_grad():
        right = sum((logits(x).argmax(-1) == y).sum(1) for x, y in zip(test_x.split(1024), test_y.split(1024)))
    accuracy = (100 * right / len(test_x)).tolist()
    best = max(range(len(rates)), key=accuracy.__getitem__)
    by_set = {name: dict(zip(lrs, accuracy[i * len(lrs) :])) for i, name in enumerate(sets)}
    name = list(sets)[best // len(lrs)]
    result = {"probe": accuracy[best], "lr": lrs[best % len(lrs)], "probe_by_lr": by_set[name]}
    if len(sets) > 1:
        result |= {"features": name, "probe_by_features": {n: max(found.values()) for n, found in by_set.items()}}
    head, number = divmod(best, together)
    return result, heads[head], number


def cached_probe(x, y, test_x, test_y, epochs=50):
    """`probe` on features [N, D] that are computed once: 50 epochs, a tenth of them warm-up, batch 1024 or all."""
    batch = min(1024, len(x))
    steps = epochs * (len(x) // batch)
    classes = int(torch.cat([y, test_y]).max()) + 1
    return probe(cached_batches(x, y, batch, epochs), steps, steps // 10, classes, test_x, test_y, batch)[0]


def feature_sets(encoder, x, sets):
    """Features of standardised images x [n, 3, S, S] for each (last blocks, pooling) of `sets`, side by side: [n, F].

    The last block alone is taken after the final norm, several are taken before it (MIM-Refiner's code; DINOv2's
    passes each of them through the final norm). "both" pools each of several blocks (DINOv2: the last one's patches).
    """
    tokens, found = encoder(x, blocks=last_blocks(encoder, max(last for last, _ in sets))), []
    for last, pool in sets:
        of_blocks = torch.stack(tokens[-last:], 1) if last > 1 else encoder.norm(tokens[-1])  # [n, (last,) 1 + L, D]
        found.append(pool_tokens(of_blocks, pool).flatten(1))
    return torch.cat(found, 1)


def linear_probe(encoder, train, val, run, recipe="mae_ct", epochs=None, batch=None, last=1, pool=None, cached=False):
    """`probe` with a recipe, on random crops, or `cached`: on features of unaugmented images, computed once.

    Args:
        encoder: a frozen ViT; train, val: labelled Images; recipe: of PROBE_RECIPES; epochs, batch: others than its own
        (a batch is at most the training set). last, pool: the feature, by default the encoder's own: last blocks side
        by side, "cls", "mean" or "both" (MAE-CT Table 15). Recipes with a grid try its features instead.
    Returns:
        (result of `probe` and the recipe, the best probe as a Classifier).
    Raises:
        InputError: fewer blocks than are wanted; a batch or epochs that cannot be.
    """
    how = PROBE_RECIPES[recipe]
    epochs = how.epochs if epochs is None else epochs
    batch = min(how.batch if batch is None else batch, len(train))
    check_batch(RunSettings(), train, batch)
    if epochs < 1:
        raise InputError(f"--epochs {epochs}: choose at least 1")
    sets = [(n, p or pool or encoder.pool) for n, p in how.grid or [(last, pool)]]
    names = [f"{p} of " + (f"the last {n} blocks" if n > 1 else "the last block") for n, p in sets]
    last_blocks(encoder, max(n for n, _ in sets))  # are there as many?
    widths = {name: encoder.dim * n * (1 + (p == "both")) for name, (n, p) in zip(names, sets)}
    size, steps = encoder.config["image_size"], epochs * (len(train) // batch)
    function = functools.partial(feature_sets, encoder, sets=sets)
    test = outputs(function, val, size, run)
    if cached:
        stream = cached_batches(*outputs(function, train, size, run), batch, epochs)
    else:
        stream = augmented_batches(function, train, size, batch, epochs, run, flip=how.flip)
    warmup = round(steps * how.warmup_epochs / how.epochs)
    result, probes, number = probe(stream, steps, warmup, len(train.classes), *test, batch, how.lrs, widths, how.lars)
    result = {"features": names[0]} | result
    n, p = sets[names.index(result["features"])]
    classifier = probes.classifier(encoder, train.classes, number, last_blocks(encoder, n) if n > 1 else None, p)
    return result | dict(recipe=recipe, epochs=epochs, batch=batch, cached=cached), classifier


def run_probe(args, encoder, run):
    """Subcommand probe; writes the best probe as probe.pt beside the encoder."""
    if PROBE_RECIPES[args.recipe].grid and (args.last != 1 or args.both):
        raise InputError(f"--recipe {args.recipe} tries features of its own: leave out --last and --both")
    pool = "both" if args.both else None
    how = (args.recipe, args.epochs, args.batch, args.last, pool, args.cached)
    result, classifier = linear_probe(encoder, *splits(args), run, *how)
    if rank() == 0:
        classifier.save(args.encoder.parent / "probe.pt", False)
    return result


# ----------------------------------------------------------------------------------------------------------- few labels


def minimise(function, w, convexity, tolerance=1e-3, memory=10, iterations=1000):
    """L-BFGS (Nocedal & Wright 2006, Algorithm 7.5) for a convex function, (value, gradient) = function(w): returns w.

    A step is bisected until the slope along it has fallen, but not far below 0; early ones may be long. Ends where the
    value is certain to be within `tolerance` of the least one (or rounding forbids progress): if the second derivatives
    are nowhere below `convexity`, the distance is at most |gradient|² / (2 · convexity).
    """
    value, gradient = function(w)
    pairs = []  # the last changes of w and of the gradient, and the inverse of their product
    dot = lambda a, b: (a * b).sum().item()
    for _ in range(iterations):
        if dot(gradient, gradient) <= 2 * convexity * tolerance * value:
            break
        direction, along = gradient.clone(), []
        for s, y, r in reversed(pairs):
            along.append(r * dot(s, direction))
            direction -= along[-1] * y
        direction *= 1 / (pairs[-1][2] * dot(y, y)) if pairs else 1 / math.sqrt(dot(gradient, gradient))
        for s, y, r in pairs:
            direction += s * (along.pop() - r * dot(y, direction))
        slope = dot(gradient, direction)
        step, low, high = 1.0, 0.0, math.inf
        for _ in range(30):
            new = w - step * direction
            new_value, new_gradient = function(new)
            ahead = dot(new_gradient, direction)  # the slope there: of a convex function it tells more than its value
            if 0.9 * slope >= ahead >= -0.5 * slope:
                break
            low, high = (step, high) if ahead > 0 else (low, step)
            step = 4 * step if high == math.inf else (low + high) / 2
        s, y = new - w, new_gradient - gradient
        if dot(s, y) <= 0:
            break
        pairs = [*pairs, (s, y, 1 / dot(s, y))][-memory:]
        w, value, gradient = new, new_value, new_gradient
    return w


def logistic_regression(x, y, classes, penalties, tolerance=1e-3):
    """Multinomial logistic regression without intercept: for each penalty the W [D, C] that minimises
    mean cross-entropy(x W, y) + penalty / 2 · |W|². Each starts from the solution of the next larger penalty and is within
    `tolerance` of the least value.

    x [N, D], y [N]; scikit-learn's C is 1 / (penalty · N). Returns {penalty: W}.
    """
    solutions, w = {}, x.new_zeros(x.shape[1], classes)
    for penalty in sorted(penalties, reverse=True):

        def loss(w):
            logits = x @ w  # [N, C]
            logits = logits - logits.gather(1, y[:, None])  # so that a loss near 0 does not cancel
            log_sum = logits.logsumexp(1, keepdim=True)
            value = log_sum.mean() + penalty / 2 * w.square().sum()
            error = (logits - log_sum).exp_().scatter_add_(1, y[:, None], torch.full_like(log_sum, -1))  # p − onehot
            return value.item(), torch.addmm(w, x.T, error, beta=penalty, alpha=1 / len(x))

        w = solutions[penalty] = minimise(loss, w, penalty, tolerance)
    return solutions


def linear_fewshot(x, y, classes, steps=2500, lr=0.01, batch=512, seed=0):
    """CAN's few-shot classifier (its appendix C): W [D, C] of a linear layer, learning rate 0.01, 2500 steps.

    What it refers to (Dosovitskiy et al. 2021, Table 4) has SGD with momentum 0.9, batch 512, cosine, gradients clipped to
    1. Chosen: features of unaugmented images, no warm-up, a start at 0, no bias.
    """
    w = x.new_zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr, momentum=0.9)
    for step in range(steps):
        rows = (uniform((seed, step, "fewshot"), torch.arange(min(batch, len(x))), 1)[:, 0] * len(x)).long().to(x.device)
        optimizer.zero_grad()
        F.cross_entropy(x[rows] @ w, y[rows]).backward()
        nn.utils.clip_grad_norm_([w], 1.0)
        optimizer.param_groups[0]["lr"] = lr * warmup_cosine(step, steps, 0)
        optimizer.step()
    return w.detach()


def lowshot(x, y, test_x, test_y, splits, penalty=0.00025, recipe="logistic"):
    """A linear classifier from a few labels a class, mean accuracy in percent over several splits.

    "logistic": L2-regularised logistic regression, without intercept (MAE-CT A.3, MIM-Refiner C.5, both after MSN): its
    penalty is 0.00025 / N, training features are centred and L2-normalised, test features are taken as they are (the
    authors' code). "can": `linear_fewshot`.

    Args:
        x [N, D], y [N]: of all training images; test_x [n, D], test_y [n]; splits: index tensors into x.
    Returns:
        {"lowshot": mean accuracy, "std" over splits, "by_split"}.
    """
    accuracy, classes = [], int(max(y.max(), test_y.max())) + 1
    for split in splits:
        few, labels = x[split], y[split]
        if recipe == "logistic":
            few = F.normalize(few - few.mean(1, keepdim=True), dim=1)
            (w,) = logistic_regression(few, labels, classes, [penalty / len(few)]).values()
        else:
            w = linear_fewshot(few, labels, classes)
        accuracy.append(100 * ((test_x @ w).argmax(1) == test_y).float().mean().item())
    return {"lowshot": float(np.mean(accuracy)), "std": float(np.std(accuracy)), "by_split": accuracy}


def run_lowshot(args, encoder, run):
    """Subcommand lowshot: one result for each number of shots, or one for all the lists."""
    train, val = splits(args)
    draws = {shots: [drawn(train.labels, shots, seed=seed) for seed in range(args.splits)] for shots in args.shots}
    if args.lists:
        draws = {"lists": [listed(train, path) for path in args.lists]}
    needed = torch.cat([split for of in draws.values() for split in of]).unique()
    blocks = [encoder.depth] if args.raw else None
    (x, y), (test_x, test_y) = features(encoder, train, run, blocks, index=needed), features(encoder, val, run, blocks)
    place = torch.empty(len(train), dtype=torch.long)
    place[needed] = torch.arange(len(needed))
    sets = (x.flatten(1), y, test_x.flatten(1), test_y)
    return {str(n): lowshot(*sets, [place[split] for split in of], recipe=args.recipe) for n, of in draws.items()}


# ---------------------------------------------------------------------------------------------------- fine-tuning


def finetune(encoder, train, val, run, blocks, epochs, lr, batch=1024, seed=0):
    """Partial fine-tuning (He et al. 2022, 4.3; CMAE 4.5): the last `blocks` blocks, the final norm and a linear
    classifier on the pooled feature are trained, everything below is frozen. 0 blocks: the classifier alone.

    From He et al.'s Table 9: AdamW (betas 0.9, 0.999), weight decay 0.05, lr = base · batch / 256, a tenth of the steps
    linear warm-up (there 5 epochs), then cosine; crops of 0.08-1 of the area and flips. The classifier starts at
    normal(2e-5). None of the table's other regularisation: no layer-wise decay, mixup, cutmix, drop path, RandAugment.

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: labelled Images; lr: base rate, at batch 256; batch: global.
    Returns:
        {"finetune": accuracy on val in percent after the last epoch, "blocks"}.
    Raises:
        InputError: more blocks than the encoder has.
    """
    if not 0 <= blocks <= encoder.depth:
        raise InputError(f"--blocks {blocks}: expected 0 to {encoder.depth}, the encoder's blocks")
    encoder = copy.deepcopy(encoder)
    encoder.freeze(encoder.depth - blocks)
    torch.manual_seed(seed)
    classifier = nn.Linear(encoder.dim, len(train.classes)).to(run.device)
    nn.init.normal_(classifier.weight, std=2e-5)
    nn.init.zeros_(classifier.bias)
    groups = parameter_groups(nn.ModuleList([encoder, classifier]), lr * batch / 256, 0.05)
    optimizer = adamw(groups, betas=(0.9, 0.999))
    parameters = [p for group in groups for p in group["params"]]
    steps, views = round(epochs * (len(train) // batch)), [View(encoder.config["image_size"], (0.08, 1.0))]

    def encode(x, y):
        return (), F.cross_entropy(promote(classifier(encoder.pooled(encoder(x)))), y, reduction="none")

    for step, data in enumerate(batches(train, views, batch, 0, steps, seed, run.device, run.workers, {})):
        backward(encode, None, (augment(data.views[0]), data.labels), precision=run.precision)
        average_gradients(parameters)
        set_lr(optimizer, warmup_cosine(step, steps, steps / 10))
        optimizer.step()
        optimizer.zero_grad()
    x, y = features(encoder, val, run)
    with torch.no_grad():
        right = (classifier(x).argmax(1) == y).float().mean()
    return {"finetune": 100 * right.item(), "blocks": blocks}


def run_finetune(args, encoder, run):
    """Subcommand finetune."""
    train, val = splits(args)
    batch = min(args.batch, len(train))
    check_batch(RunSettings(data=args.data), train, batch)
    return finetune(encoder, train, val, run, args.blocks, args.epochs, args.lr, batch)


# ------------------------------------------------------------------------------------------------------ clustering


def kmeans_plus_plus(x, k, runs, precision, seed):
    """Indices [runs, k] of starting points, for all runs at once: greedy k-means++ (Arthur & Vassilvitskii 2007), where
    the best of 2 + log k candidates becomes the next centre (scikit-learn's rule)."""
    every, trials = torch.arange(runs, device=x.device), 2 + int(math.log(k))
    low, squares = x.to(precision), x.square().sum(1)

    def distances(i):  # squared ones from points i [runs, t] to all: [runs, t, N]
        i = i.flatten()
        return (squares - 2 * (low[i] @ low.T).to(x.dtype) + squares[i][:, None]).clamp_(min=0).view(runs, -1, len(x))

    chosen = (uniform((seed, "k-means++"), every, 1) * len(x)).long()
    nearest = distances(chosen)[:, 0]  # [runs, N]
    for step in range(1, k):
        total = nearest.cumsum(1)
        dice = uniform((seed, "k-means++", step), every, trials) * total[:, -1:]
        candidates = torch.searchsorted(total, dice.to(total)).clamp_(max=len(x) - 1)  # with the odds of their distances
        to_nearest = torch.minimum(distances(candidates), nearest[:, None])  # [runs, trials, N]
        best = to_nearest.sum(-1).argmin(1)
        nearest = to_nearest[every, best]
        chosen = torch.cat([chosen, candidates[every, best][:, None]], 1)
    return chosen


@torch.no_grad()
def kmeans(x, k, runs=100, iterations=300, tolerance=1e-4, seed=0, precision=torch.float32):
    """k-means (Lloyd) from k-means++ starts.

    Points go to their centres in `precision` until the centres stand still, from then on in x's own type until they do so
    there. They stand still when they moved, in squared length, by no more than tolerance · mean feature variance
    (scikit-learn's rule). A cluster that loses all its points keeps its centre. Under torchrun each rank has its part of
    the runs.

    Args:
        x [N, D]; k clusters.
    Returns:
        assignments [runs, N] and losses [runs] (sum of squared distances).
    """
    x = x - x.mean(0)  # what is rounded should be small
    low, tolerance = x.to(precision), tolerance * x.var(0, unbiased=False).mean()
    share = math.ceil(runs / world())
    starts = kmeans_plus_plus(x, k, runs, precision, seed)
    starts = starts[torch.arange(rank() * share, (rank() + 1) * share) % runs]
    assignments, losses = [], []
    for start in progress(starts, share, "k-means runs"):
        centres, points = x[start], low
        for _ in range(iterations):
            half = centres.square().sum(1) / 2
            assigned = (half - points @ centres.to(points.dtype).T).min(1).indices  # the least |c|² / 2 − x·c
            count = torch.bincount(assigned, minlength=k)
            means = F.embedding_bag(assigned.argsort(), x, count.cumsum(0) - count, mode="mean")
            means = torch.where(count[:, None] > 0, means, centres)
            moved, centres = (means - centres).square().sum(), means
            if moved <= tolerance:
                if points is x:
                    break
                points = x
        nearest = (centres.square().sum(1) / 2 - x @ centres.T).min(1)
        assignments.append(nearest.indices)
        losses.append((2 * nearest.values + x.square().sum(1)).double().sum())
    return gather(torch.stack(assignments))[:runs], gather(torch.stack(losses))[:runs].to(x.dtype)


def contingency(truth, assigned):
    """Counts [classes, clusters] from two integer vectors."""
    classes, clusters = int(truth.max()) + 1, int(assigned.max()) + 1
    return torch.bincount(truth * clusters + assigned, minlength=classes * clusters).view(classes, clusters).cpu().numpy()


def cluster_scores(truth, assigned):
    """Agreement of clusters with classes (MAE-CT B.3), all in percent.

    cluster_acc: accuracy under the best one-to-one matching (Hungarian); nmi, ami: normalised and adjusted mutual
    information (arithmetic mean of the entropies); ari: adjusted Rand index.
    """
    table = contingency(truth, assigned).astype(np.float64)
    n, a, b = table.sum(), table.sum(1), table.sum(0)
    rows, columns = linear_sum_assignment(-table)
    a, b = a[a > 0], b[b > 0]
    entropy_a, entropy_b = -(a / n * np.log(a / n)).sum(), -(b / n * np.log(b / n)).sum()
    i, j = table.nonzero()
    joint = table[i, j] / n
    mutual = (joint * np.log(joint * n * n / (table.sum(1)[i] * table.sum(0)[j]))).sum()
    mean_entropy = (entropy_a + entropy_b) / 2
    expected = expected_mutual_information(a, b)
    pairs = lambda v: (v * (v - 1) / 2).sum()
    by_chance = pairs(a) * pairs(b) / pairs(n)
    rand = (pairs(table) - by_chance) / ((pairs(a) + pairs(b)) / 2 - by_chance)
    scores = {
        "cluster_acc": table[rows, columns].sum() / n,
        "nmi": mutual / mean_entropy,
        "ami": (mutual - expected) / (mean_entropy - expected),
        "ari": rand,
    }
    return {name: 100 * float(value) for name, value in scores.items()}


def expected_mutual_information(a, b):
    """Mean mutual information of two random partitions with class sizes a and b (Vinh et al. 2010, Eq. 24a)."""
    n, total = a.sum(), 0.0
    log = lambda v: gammaln(v + 1)  # log v!
    b, times_b = np.unique(b, return_counts=True)  # classes and clusters of one size share their terms
    for size, times in zip(*np.unique(a, return_counts=True)):
        nij = np.arange(1, int(min(size, b.max())) + 1)[:, None]  # [m, 1] against b [C]
        low, high = np.maximum(1, size + b - n), np.minimum(size, b)
        valid = (nij >= low) & (nij <= high)
        with np.errstate(invalid="ignore"):
            weight = np.exp(log(size) + log(b) + log(n - size) + log(n - b) - log(n) - log(nij) - log(size - nij)
                            - log(b - nij) - log(n - size - b + nij))  # fmt: skip
            term = nij / n * np.log(n * nij / (size * b)) * weight
        total += times * (np.where(valid, term, 0) * times_b).sum()
    return total


@torch.no_grad()
def silhouette(x, y, chunk=1024):
    """Mean silhouette coefficient of the classes y (Rousseeuw 1987), in percent; classes of one sample count 0."""
    onehot = F.one_hot(y).to(x.dtype)
    size = onehot.sum(0)
    scores = []
    for part, label in zip(x.split(chunk), y.split(chunk)):
        sums = torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist") @ onehot  # [n, C]
        own = label[:, None]
        inside = sums.gather(1, own)[:, 0] / (size[label] - 1).clamp(min=1)
        mean = (sums / size).masked_fill(size == 0, math.inf).scatter(1, own, math.inf)
        outside = mean.min(1).values
        scores.append(((outside - inside) / torch.maximum(inside, outside)).where(size[label] > 1, 0))
    return 100 * torch.cat(scores).mean().item()


@torch.no_grad()
def davies_bouldin(x, y):
    """Davies-Bouldin index of the classes y (1979): 0 is best; classes without samples do not count."""
    y = y.unique(return_inverse=True)[1]
    onehot = F.one_hot(y).to(x.dtype)
    centres = onehot.T @ x / onehot.sum(0)[:, None]
    spread = onehot.T @ (x - centres[y]).norm(dim=1) / onehot.sum(0)
    ratio = (spread[:, None] + spread) / torch.cdist(centres, centres).fill_diagonal_(math.inf)
    return ratio.max(1).values.mean().item()


def cluster(x, y, runs=100, normalization="standardize", seed=0, precision=torch.float32):
    """k-means with as many clusters as classes; the run of the lowest loss is scored (MAE-CT B.3, MIM-Refiner C.12).

    Silhouette and Davies-Bouldin are those of the ground-truth classes, on the same features. The papers use scikit-
    learn's mini-batch k-means; this is the full one.

    Args:
        x [N, D], y [N]; normalization: "standardize" (MAE-CT) or "l2" (MIM-Refiner); precision: see `kmeans`.
    Returns:
        (dict of cluster_acc, nmi, ami, ari, silhouette (percent), davies_bouldin, loss, and the averages over runs
        (MAE-CT Tables 20, 22) under "average"; the confusion matrix [classes, clusters], clusters in the order of the
        classes that they are matched with).
    """
    if normalization == "standardize":
        std, mean = torch.std_mean(x, 0, unbiased=False)
        x = (x - mean) / std.clamp(min=1e-12)
    else:
        x = F.normalize(x, dim=1)
    y = y.unique(return_inverse=True)[1]
    assigned, losses = kmeans(x, int(y.max()) + 1, runs, seed=seed, precision=precision)
    every = [cluster_scores(y, a) for a in assigned]
    best = losses.argmin().item()
    average = {name: sum(s[name] for s in every) / len(every) for name in every[0]}
    of_classes = {"silhouette": silhouette(x, y), "davies_bouldin": davies_bouldin(x, y)}
    confusion = contingency(y, assigned[best])
    confusion = confusion[:, linear_sum_assignment(-confusion)[1]]
    return every[best] | of_classes | {"loss": losses[best].item(), "average": average}, confusion


def run_cluster(args, encoder, run):
    """Subcommand cluster, on the validation set or some classes of it; draws the best run's confusion matrix."""
    images = splits(args)[1]
    if args.classes:
        images = of_classes(images, args.classes)
    result, confusion = cluster(*features(encoder, images, run), args.runs, args.normalization, precision=run.precision)
    if rank() == 0:
        draw_matrix(args.encoder.parent / "confusion.png", confusion, images.classes)
    return result


# --------------------------------------------------------------------------------------------------- retrieval and maps


# --------------------------------------------------------------------------------------------------- what features hold


# ---------------------------------------------------------------------------------------------- robustness and transfer


# --------------------------------------------------------------------------------------------------------- segmentation


# ---------------------------------------------------------------------------------------------------------------- video


# ---------------------------------------------------------------------------------------------------------- main


def evaluate(encoder, train, val, run, normalization="standardize"):
    """The table that ends a training run: k-NN, linear probe (on cached, unaugmented features), clusters of the pooled
    feature. `normalization` is that of `cluster`."""
    (x, y), (test_x, test_y) = (features(encoder, images, run) for images in (train, val))
    clusters, _ = cluster(test_x, test_y, normalization=normalization, precision=run.precision)
    values = dict(knn=knn(x, y, test_x, test_y)["knn"], probe=cached_probe(x, y, test_x, test_y)["probe"])
    return values | {name: clusters[name] for name in ("cluster_acc", "nmi", "silhouette")}


def shown(value):
    """A number, a list or a dict of numbers as text."""
    if isinstance(value, dict):
        return "  ".join(f"{k}: {shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table(result):
    """Prints a protocol's numbers, one a line; lists and dicts in one line."""
    for name, value in result.items():
        print0(f"{name:>16}  {shown(value)}")


def main(argv):
    """Parses the subcommand, loads the encoder, prints the result and writes PROTOCOL.json beside the encoder."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="protocol", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--encoder", type=Path, required=True, help="encoder file, ours or a public one")
    every.add_argument("--data", default="shapes", help="built-in set, folder with train/ and val/, or torchvision name")
    every.add_argument("--image_size", type=int, help="default: the encoder's")
    every.add_argument("--pool", choices=["cls", "mean"], help="default: the encoder's")
    every.add_argument("--precision", default="auto")
    every.add_argument("--workers", type=int, default=4)

    def command(run, protocol):
        name = run.__name__.removeprefix("run_")
        p = commands.add_parser(name, parents=[every], help=protocol.__doc__.splitlines()[0])
        p.set_defaults(run=run)
        return p.add_argument

    flag = command(run_knn, knn)
    flag("--k", type=int, nargs="+", default=[10])
    flag("--votes", choices=["exp", "similarity"], default="exp")
    flag("--standardize", action="store_true", help="as MIM-Refiner, with --raw")
    flag("--raw", action="store_true", help="the last block's output before the final norm")
    flag("--last", type=int, default=1, help="last blocks side by side, before the final norm (C.10: 4)")
    flag("--per_block", action="store_true", help="of each block's output, before the final norm")
    flag = command(run_probe, linear_probe)
    flag("--recipe", choices=list(PROBE_RECIPES), default="mae_ct", help="dinov2: 52 probes; lars: as CAN and MAE")
    flag("--epochs", type=int, help="default: the recipe's")
    flag("--batch", type=int, help="default: the recipe's")
    flag("--last", type=int, default=1, help="last blocks side by side, several before the final norm")
    flag("--both", action="store_true", help="[CLS] and the patches' mean side by side (MAE-CT Table 15)")
    flag("--cached", action="store_true", help="one unaugmented pass instead of crops and flips")
    flag = command(run_lowshot, lowshot)
    flag("--shots", type=int, nargs="+", default=[1, 2, 5], help="labels a class; CAN: 1 5 10 25")
    flag("--splits", type=int, default=3, help="draws of each number of shots")
    flag("--lists", type=Path, nargs="+", help="instead: files that name the labelled images, one split each")
    flag("--recipe", choices=["logistic", "can"], default="logistic", help="can: with --image_size 384")
    flag("--raw", action="store_true", help="the last block's output before the final norm, as MIM-Refiner")
    flag = command(run_cluster, cluster)
    flag("--runs", type=int, default=100)
    flag("--normalization", choices=["standardize", "l2"], default="standardize")
    flag("--classes", type=Path, help="file that names the classes to cluster, one a line")
    flag = command(run_finetune, finetune)
    flag("--blocks", type=int, default=1, help="last blocks to tune; 0: the classifier alone")
    flag("--epochs", type=float, default=100, help="CMAE 4.2")
    flag("--lr", type=float, default=5e-4, help="at batch 256; CMAE 4.2: 2.5e-4 after 1600 epochs")
    flag("--batch", type=int, default=1024)
    args = parser.parse_args(argv)

    device = start()
    encoder = load_encoder(args.encoder, args.image_size)
    encoder.pool = args.pool or encoder.pool
    encoder.to(device).requires_grad_(False)
    result = args.run(args, encoder, Machine(device, precision_of(args.precision, device), args.workers))
    table(result)
    if rank() == 0:
        setting = {k: str(v) for k, v in vars(args).items() if k != "run"}
        write_atomic(args.encoder.parent / f"{args.protocol}.json", json.dumps(setting | result, indent=1).encode())


if __name__ == "__main__":
    launch(main)
