"""Evaluation of an encoder: every protocol of the five papers, one function and one subcommand each.

    python eval.py knn --encoder runs/001/encoder.pt --data /path/to/imagenet
    python eval.py probe --encoder runs/001/encoder.pt --data /path/to/imagenet --recipe dinov2     (writes probe.pt)
    python eval.py robust --encoder runs/001/encoder.pt --sets /path/to/imagenet-r                  (reads probe.pt)
    torchrun --nproc_per_node 8 eval.py finetune --encoder mae_pretrain_vit_large.pth --data /path/to/imagenet

    classification   knn · probe · lowshot · finetune · transfer · robust · video
    structure        cluster · retrieve · embed · segment
    analysis         blocks · invariance · colorhist · stats

Encoders are files written here or public ones (common.read_encoder). Every protocol prints a table and writes it, with its
settings, as PROTOCOL.json beside encoder.pt, or as mae_PROTOCOL.json beside mae.pt; `run` is the Machine it runs on. What
a protocol's text leaves open stands in its function's docstring.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.special import betaincinv, gammaln
from scipy.stats import rankdata
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from common import (
    BatchNorm, CenterCrop, Images, InputError, LARS, MAEDecoder, MEAN, MOTIONS, Parser, RunSettings,
    SUFFIXES, View, adamw, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, augment, autocast,
    average_gradients, backward, batches, blend, channels, check_batch, check_numbers, comments, crop_box, decode,
    draw, draw_curves, draw_matrix, draw_points, drop_path, gather, launch, load_encoder, load_file, load_images,
    load_splits, load_state, load_videos, load_voc2007, mae_loss, parameter_groups, precision_of, print0, promote,
    random_masking, rank, read_json, save_encoder, save_file, set_lr, shuffled, standardise, start, to_bytes, uniform,
    unstandardise, warmup_cosine, workers_of, world, write_atomic,
)  # fmt: skip


# --------------------------------------------------------------------------------------------- one pass over the data


@dataclass
class Machine:
    """What a protocol runs on: `run` in all that follows. A common.Run has the same fields."""

    device: torch.device
    precision: torch.dtype = torch.float32  # of autocast
    workers: int = 0  # decoding processes


def progress(items, total, what):
    """Yields the items; a line on the terminal says how many of `total` are done and how long the rest takes."""
    begin = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if sys.stdout.isatty() and (now - shown > 0.5 or done == total):
            shown, left = now, (now - begin) / done * (total - done)
            left = f"{int(left // 60)}:{int(left % 60):02d} left "
            print0(f"{what} {done}/{total}  {left}", end="\n" if done == total else "\r")


def splits(args):
    """(training, validation images) of --data, both with labels."""
    train, val = load_splits(args.data, labels=True)
    if val is None:
        raise InputError(f"--data {args.data}: there is no val/ or test/ to evaluate on")
    return train, val


def beside(encoder, name):
    """Where a result of an encoder file goes: `name` beside encoder.pt; mae_`name` beside mae.pt, and so on."""
    return encoder.with_name(name if encoder.stem == "encoder" else f"{encoder.stem}_{name}")


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
    lines, found = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()], {}
    files = [os.fsdecode(f).split("/") for f in images.files]
    depths = {line.count("/") + 1 for line in lines}
    for i, parts in enumerate(files):
        for depth in depths:
            found.setdefault("/".join(parts[-depth:]), []).append(i)
    if not lines:
        raise InputError(f"{path}: the list names no image")
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
    number = {str(c): i for i, c in enumerate(images.classes)}
    unknown = [name for name in names if name not in number]
    if unknown or len(set(names)) < 2:
        what = f"{unknown[0]!r} is no class" if unknown else "fewer than two classes"
        raise InputError(f"{path}: {what}; the data has {', '.join(map(str, images.classes[:5]))}, …")
    numbers = [number[name] for name in names]
    kept = torch.isin(images.labels, torch.tensor(numbers)).nonzero()[:, 0]
    return images.subset(kept, [images.classes[i] for i in numbers])


def divided(batch, images, pairs=False):
    """A batch that nobody chose: at most the set, and so that all processes have as much, or as many pairs."""
    share = (1 + pairs) * world()
    return min(batch, len(images)) // share * share


def center_views(images, size, device, workers, index, batch=256):
    """Yields (evaluation crops uint8 [n, 3, size, size], their indices [n]) of images `index`, in order; an unreadable
    image is replaced by another, whose index it then has."""
    if images.pixels is not None and images.pixels.shape[2:] == (size, size):
        for part in index.split(batch):
            yield images.pixels[part].to(device), part.to(device)
        return
    order = ((0, part) for part in index.split(batch))
    for views, used in decode(images, order, CenterCrop(size), device, workers, {}):
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
        with autocast(run.device, run.precision):
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


def fingerprint(encoder):
    """A number that tells encoders apart by their weights, whatever image size they were loaded for."""
    number = 0
    for name, weight in encoder.state_dict().items():
        if name != "pos_embed":
            number = zlib.crc32(weight.cpu().contiguous().numpy(), number)
    return number


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
        feature = promote(pooled(self.encoder, x, self.blocks, self.pool).flatten(1))
        with torch.autocast(x.device.type, enabled=False):  # logits as those that the probe was chosen by
            return self.head(self.norm(feature))

    def save(self, path, with_encoder):
        """{"classifier": …}; `with_encoder` besides all that encoder.pt has."""
        parts = {f"{p}.{k}": v for p in ("norm", "head") for k, v in getattr(self, p).state_dict().items()}
        content = dict(state=parts, classes=self.classes, blocks=self.blocks, pool=self.pool)
        content["eps"] = getattr(self.norm, "eps", None)
        if with_encoder:
            save_encoder(path, self.encoder, classifier=content)
        else:
            save_file(path, dict(classifier=content | dict(encoder=fingerprint(self.encoder))))


def load_classifier(path, encoder, image_size=None):
    """A Classifier from finetuned.pt, which has an encoder of its own (for `image_size`, if one is wanted), or from
    probe.pt and its `encoder`.

    Raises:
        InputError: the file holds no classifier, or one of another encoder.
    """
    content = load_file(path)
    if not isinstance(content, dict) or "classifier" not in content:
        raise InputError(f"{path} holds no classifier: `eval.py probe` writes probe.pt, `eval.py finetune` finetuned.pt")
    own, how = "model" in content, content["classifier"]
    if not own and how.get("encoder") != fingerprint(encoder):
        raise InputError(f"{path} is the probe of another encoder: run `eval.py probe` with this one, or name its own file")
    encoder = load_encoder(path, image_size).to(encoder.cls_token.device) if own else encoder
    norm = None
    if how["eps"] is not None:
        norm = BatchNorm(*how["state"]["norm.running_mean"].shape, affine=False, eps=how["eps"])
    classifier = Classifier(encoder, how["classes"], how["blocks"], how["pool"], norm).to(encoder.cls_token.device)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | how["state"]
    load_state(classifier, state, str(path))
    return classifier.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------------- k-NN


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
    index = uniform(("bank",), torch.arange(len(train)), 1)[:, 0].argsort()[:bank]
    x, y = features(encoder, train, run, blocks, index=index)
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


# ----------------------------------------------------------------------------------------------------- linear probing

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
    # CAN, Table 11, after MAE (which has 90 epochs); no flip is listed. Of the patches' mean (C): --pool mean
    "lars": ProbeRecipe(epochs=100, batch=16384, warmup_epochs=10, lrs=(0.1,), flip=False, lars=True),
    # ViC-MAE, Table 9 (its Section 5: 100 epochs); no flip is listed
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
    for _, rows in shuffled(len(x), batch, 0, epochs * (len(x) // batch), seed):
        rows = rows.to(x.device)
        yield x[rows], y[rows]


@torch.no_grad()
def augmented_batches(function, images, size, batch, epochs, run, seed=0, flip=True):
    """A function of random crops [n, 3, size, size] and flips (Table 11), say the encoder's features: yields ([n, …],
    labels [n])."""
    steps = epochs * (len(images) // batch)
    views = batches(images, [View(size, (0.08, 1.0), flip)], batch, 0, steps, seed, run.device, run.workers, {})
    for data in progress(views, steps, "steps"):
        with autocast(run.device, run.precision):  # in pieces: on CPUs faster by 40 % (fewer page faults), and less memory
            out = torch.cat([promote(function(augment(x))) for x in data.views[0].split(256)])
        yield out, data.labels


def cross_entropy(logits, y):
    """Of probes side by side: logits [P, n, C], labels [n] → [P]."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(len(logits), -1).mean(1)


def accuracy(logits, y):
    """In percent: logits [N, C], labels [N]."""
    return 100 * (logits.argmax(1) == y).sum().item() / len(y)


def probe(train, steps, warmup, classes, test_x, test_y, batch, lrs=PROBE_LRS, sets=None, lars=False,
          loss=cross_entropy, score=accuracy):  # fmt: skip
    """Linear probes of one or several feature sets, every learning rate of a sweep, trained side by side on the same
    batches (MAE-CT A.3, Table 11; MIM-Refiner C.3). As in the papers, the best on the test set is reported.

    SGD or LARS with momentum 0.9, no weight decay, lr = base · batch / 256, warm-up and cosine. An update of plain SGD
    is proportional to lr, so each probe's rate is a weight of its loss. LARS cancels such weights: there every rate has
    `Probes` of its own.

    Args:
        train: iterable of `steps` batches ([n, D], labels [n]) of this rank: `cached_batches` or `augmented_batches`;
        warmup: steps; classes: their number; test_x [N, D], test_y [N]; batch: global batch size; lrs: base rates, at
        batch 256; sets: {name: width} of the feature sets that stand side by side in D; loss, score: other than
        cross-entropy and accuracy, for other than one label an image.
    Returns:
        {"probe": score in percent, "lr": its base rate, "probe_by_lr": of its feature set}, for several feature sets
        also {"features": its name, "probe_by_features": the best of each}; the best's Probes and its number in them.
    """
    torch.manual_seed(0)
    sets = sets or {"": test_x.shape[1]}
    together = 1 if lars else len(lrs)
    repeat = len(lrs) // together
    heads = nn.ModuleList(Probes(together, width, classes) for width in sets.values() for _ in range(repeat))
    heads.to(test_x.device)
    rates = [lr * batch / 256 for _ in sets for lr in lrs]  # as in the result of `logits`

    apart = lambda x: [part for part in x.split(list(sets.values()), 1) for _ in range(repeat)]  # one for each of `heads`
    logits = lambda x: torch.cat([head(part) for head, part in zip(heads, apart(x))])  # [sets · lrs, n, C]

    if lars:
        groups = [dict(params=[head.weight], peak_lr=rate) for head, rate in zip(heads, rates)]
        groups += [dict(params=[head.bias], peak_lr=rate, trust=0) for head, rate in zip(heads, rates)]
        optimizer, weights = LARS(groups), test_x.new_ones(len(rates))
    else:
        groups = [dict(params=list(heads.parameters()), peak_lr=1.0)]
        optimizer, weights = torch.optim.SGD(groups, lr=1.0, momentum=0.9), test_x.new_tensor(rates)
    for step, (x, y) in enumerate(train):
        (loss(logits(x), y) * weights).sum().backward()
        average_gradients(heads.parameters())
        set_lr(optimizer, warmup_cosine(step, steps, warmup))
        optimizer.step()
        optimizer.zero_grad()
    heads.eval()
    with torch.no_grad():
        scores = []
        for head, part in zip(heads, apart(test_x)):
            normed = head.norm(part)
            scores += [score(normed @ w.T + b, test_y) for w, b in zip(head.weight, head.bias)]
    best = max(range(len(rates)), key=scores.__getitem__)
    by_set = {name: dict(zip(lrs, scores[i * len(lrs) :])) for i, name in enumerate(sets)}
    name = list(sets)[best // len(lrs)]
    result = {"probe": scores[best], "lr": lrs[best % len(lrs)], "probe_by_lr": by_set[name]}
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


def linear_probe(encoder, train, val, run, recipe="mae_ct", epochs=None, batch=None, last=1, pool=None, cached=False,
                 **other):  # fmt: skip
    """`probe` with a recipe, on random crops, or `cached`: on features of unaugmented images, computed once.

    Args:
        encoder: a frozen ViT; train, val: labelled Images; recipe: of PROBE_RECIPES; epochs, batch: others than its own
        (which is at most the training set). last, pool: the feature, by default the encoder's own: last blocks side by
        side, "cls", "mean" or "both" (MAE-CT Table 15); recipes with a grid try its features instead. other: of `probe`.
    Returns:
        (result of `probe` and the recipe, the best probe as a Classifier).
    Raises:
        InputError: fewer blocks than are wanted; a batch or epochs that cannot be.
    """
    how = PROBE_RECIPES[recipe]
    epochs = how.epochs if epochs is None else epochs
    batch = divided(how.batch, train) if batch is None else batch
    check_batch(RunSettings(), train, batch, epochs)
    if epochs < 1:
        raise InputError(f"--epochs {epochs}: choose at least 1")
    sets = [(n, p or pool or encoder.pool) for n, p in how.grid or [(last, pool)]]
    names = [f"{p} of " + (f"the last {n} blocks" if n > 1 else "the last block") for n, p in sets]
    last_blocks(encoder, max(n for n, _ in sets))  # are there as many?
    widths = {name: encoder.dim * n * (1 + (p == "both")) for name, (n, p) in zip(names, sets)}
    size, steps = encoder.config["image_size"], epochs * (len(train) // batch)
    function = partial(feature_sets, encoder, sets=sets)
    test = outputs(function, val, size, run)
    if cached:
        stream = cached_batches(*outputs(function, train, size, run), batch, epochs)
    else:
        stream = augmented_batches(function, train, size, batch, epochs, run, flip=how.flip)
    warmup = round(steps * how.warmup_epochs / how.epochs)
    result, probes, number = probe(stream, steps, warmup, len(train.classes), *test, batch, how.lrs, widths, how.lars,
                                   **other)  # fmt: skip
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
        classifier.save(beside(args.encoder, "probe.pt"), False)
    return result


# --------------------------------------------------------------------------------------------------------- few labels


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
    if args.lists:
        draws = {"lists": [listed(train, path) for path in args.lists]}
    else:
        draws = {shots: [drawn(train.labels, shots, seed=seed) for seed in range(args.splits)] for shots in args.shots}
    needed = torch.cat([split for of in draws.values() for split in of]).unique()
    blocks = [encoder.depth] if args.raw else None
    (x, y), (test_x, test_y) = features(encoder, train, run, blocks, index=needed), features(encoder, val, run, blocks)
    place = torch.empty(len(train), dtype=torch.long)
    place[needed] = torch.arange(len(needed))
    sets = (x.flatten(1), y, test_x.flatten(1), test_y)
    return {str(n): lowshot(*sets, [place[split] for split in of], recipe=args.recipe) for n, of in draws.items()}


# -------------------------------------------------------------------------------------------------------- fine-tuning


@dataclass
class FineTuning:
    """Settings of fine-tuning. The defaults are MAE's for a ViT-B (He et al. 2022, Table 9), which MAE-CT A.3,
    MIM-Refiner C.9 and CMAE 4.2 refer to; `recipe` changes what other tables and sizes change."""

    blocks: int = -1  # last blocks that are tuned; all of them, or -1: stem and [CLS] too; 0: the classifier alone
    epochs: float = 100
    warmup: float = 0.05  # share of the steps: 5 epochs
    batch: int = 1024  # of all processes
    lr: float = 1e-3  # at batch 256
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    randaugment: int = 2  # layers; 0: none
    magnitude: float = 9.0  # of 10
    mixup: float = 0.8  # alpha of the beta distribution; 0: none
    cutmix: float = 1.0  # likewise
    mix_prob: float = 1.0  # share of the pairs that are mixed: the authors' code
    switch_prob: float = 0.5  # of these, the share of CutMix where both are on: the authors' code
    erasing: float = 0.25  # probability: the authors' code
    micro_batch: int = 0  # samples of one process at a time; 0: all
    seed: int = 0


CROP_FLIP = dict(randaugment=0, mixup=0.0, cutmix=0.0, erasing=0.0)
RECIPES = ["mae", "lowshot", "crop_flip", "inat18", "can", "cmae", "partial", "vicmae", "vicmae_subset", "shapes"]


def recipe(name, dim):
    """What a recipe changes of FineTuning's defaults for an encoder of width `dim`, as a dict.

        mae            MAE-CT A.3: drop path 0.1 / 0.2 / 0.3 for B / L / H; MIM-Refiner C.9 and He et al.: 0.1 / 0.1 / 0.2
        lowshot        10 % of ImageNet's labels: MAE-CT Table 12
        crop_flip      1 % and 10 % of the labels for MAE-CT: A.3 (--lr 1e-2 for MAE's ViT-H)
        inat18         5 and 10 labels a class: MIM-Refiner C.6, Table 12; without its resizing to 256 before the crop
        can            CAN Table 10
        cmae           CMAE 4.2, "mixup, cutmix, drop path, etc.": MAE's; --lr 5e-4 after 300 epochs of pre-training
        partial        CMAE 4.5, after He et al. A.1: Table 9, but the best of 50, 100, 200 epochs for each --blocks
        vicmae         ViC-MAE Table 8; Table 1
        vicmae_subset  5 to 100 % of ImageNet: ViC-MAE Table 10
        shapes         the built-in images in a minute or two: chosen on MAE's encoder

    Optimiser and schedule are MAE's; what a table of low-shot fine-tuning does not list is off. MAE-CT's Table 14:
    --recipe mae --label_smoothing 0 --mixup 0 --cutmix 0 --erasing 0 --randaugment 0, then one after the other back on.
    """
    large = dict(epochs=50, warmup=0.1) if dim >= 1024 else {}  # ViT-L and larger: 5 of 50 epochs
    drop_path, he = (0.1, 0.1) if dim < 1024 else (0.2, 0.1) if dim < 1280 else (0.3, 0.2)  # MAE-CT's, He et al.'s
    size_decay = 0.75 if large else 0.65
    lowshot = CROP_FLIP | large | dict(batch=512, layer_decay=size_decay)
    return {
        "mae": large | dict(drop_path=drop_path),
        "lowshot": lowshot | dict(lr=3e-5, drop_path=0.0, randaugment=2),
        "crop_flip": lowshot | dict(lr=1e-3, drop_path=drop_path),
        "inat18": CROP_FLIP | dict(epochs=50, warmup=0.1, batch=256, drop_path=0.0),
        "can": dict(lr=5e-4, weight_decay=0.005, layer_decay=0.65, mixup=0.0, cutmix=0.0),
        "cmae": dict(lr=2.5e-4, drop_path=he),
        "partial": large | dict(blocks=1, drop_path=he),
        "vicmae": dict(cutmix=0.0, erasing=0.0),
        "vicmae_subset": CROP_FLIP,
        "shapes": CROP_FLIP | dict(epochs=4, warmup=0.1, batch=128, lr=8e-3),
    }[name]


def sharpness(x, factor):
    """torchvision's adjust_sharpness with a factor per sample: x [N, 3, H, W] in [0, 1], factor [N]."""
    return blend(x, v2.adjust_sharpness(x, 0.0), factor)


def warp(x, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """uint8 squares [N, 3, S, S] whose pixel at (u, v) is x's at (a u + b v + c, d u + e v + f), bilinear; u and v span
    [-1, 1], the coefficients are [N] or numbers. What lies outside is ImageNet's mean: 0 once standardised."""
    one = torch.ones(len(x), device=x.device)
    matrix = torch.stack([one * m for m in (a, b, c, d, e, f)], 1).view(-1, 2, 3)
    mean = channels(MEAN, x.device, torch.float32) * 255
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return (F.grid_sample(x - mean, grid, align_corners=False) + mean).round().byte()


def enhance(operation):
    """One of the blending operations at a factor from 0.1 to 1.9."""
    return lambda x, m: (operation(x / 255, (1 + 0.9 * m).clamp(min=0.1)) * 255).round().byte()


def rotate(x, m):
    """Rotation by up to 30 degrees."""
    angle = math.pi / 6 * m
    return warp(x, angle.cos(), -angle.sin(), 0.0, angle.sin(), angle.cos())


def posterize(x, m):
    """Keeps the 4 highest bits, or fewer down to none."""
    removed = 4 + (4 * m.abs()).int().view(-1, 1, 1, 1)
    return (x.int() >> removed << removed).byte()


def solarize(x, m):
    """Inverts values from a threshold of 256 (none) down to 0."""
    return torch.where(x < 256 - (256 * m.abs()).int().view(-1, 1, 1, 1), x, 255 - x)


def solarize_add(x, m):
    """Adds up to 110 to values below 128."""
    return torch.where(x < 128, x + (110 * m.abs()).byte().view(-1, 1, 1, 1), x)


# The operations of RandAugment, of uint8 images [N, 3, S, S] and their strengths m [N] in [-1, 1]; where a sign means
# nothing, |m| counts. Those of MAE's code (timm's "increasing" list).
RAND_AUGMENT = {
    "autocontrast": lambda x, m: v2.autocontrast(x),
    "equalize": lambda x, m: v2.equalize(x),
    "invert": lambda x, m: 255 - x,
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": enhance(adjust_saturation),
    "contrast": enhance(adjust_contrast),
    "brightness": enhance(adjust_brightness),
    "sharpness": enhance(sharpness),
    "shear_x": lambda x, m: warp(x, b=0.3 * m, c=0.3 * m),  # the upper left corner stays
    "shear_y": lambda x, m: warp(x, d=0.3 * m, f=0.3 * m),
    "translate_x": lambda x, m: warp(x, c=0.9 * m),  # 0.45 of the side, which is 2
    "translate_y": lambda x, m: warp(x, f=0.9 * m),
}


def gaussian(u):
    """Standard normal numbers from uniform ones of `uniform`, at most 5.4 deviations off."""
    return torch.special.ndtri(u.clamp(min=2**-25))


def rand_augment(x, noise, magnitude=9.0):
    """RandAugment (Cubuk et al. 2020) as in MAE's code: timm's rand-m9-mstd0.5-inc1.

    In each layer every image gets one of RAND_AUGMENT with probability 0.5, at a strength of normal(magnitude, 0.5) / 10
    within [0, 1] and of either sign.

    Args:
        x: uint8 [N, 3, S, S]; noise: [N, layers, 4] in [0, 1), on the CPU, where it is known which image gets what.
    """
    x = x.clone()
    for choice, sign, amount, applied in noise.permute(1, 2, 0):
        m = (magnitude + 0.5 * gaussian(amount)).clamp(0, 10) / 10 * torch.where(sign < 0.5, -1, 1)
        choice = (choice * len(RAND_AUGMENT)).long().masked_fill(applied >= 0.5, -1)
        for i, operation in enumerate(RAND_AUGMENT.values()):
            rows = (choice == i).nonzero()[:, 0]
            if len(rows):
                at = rows.to(x.device, non_blocking=True)
                x[at] = operation(x[at], m[rows].to(x.device, non_blocking=True))
    return x


def random_erasing(x, noise, pixels, probability):
    """Random erasing (Zhong et al. 2020), mode "pixel": a box of normal noise in some images.

    Its area is uniform in (0.02, 1/3) of the image, the logarithm of its aspect ratio in (log 0.3, -log 0.3); the first
    of ten tries that is smaller than the image is taken.

    Args:
        x: standardised [N, 3, S, S]; noise: [N, 23] in [0, 1), on the CPU; pixels: a function from row numbers [n], on
        the CPU, to their noise [n, 3, S, S] in [0, 1); probability: of erasing.
    """
    size, log = x.shape[-1], math.log(0.3)
    area = size**2 * (0.02 + (1 / 3 - 0.02) * noise[:, :10])
    ratio = torch.exp(log - 2 * log * noise[:, 10:20])
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [N, 10]
    fits = (h < size) & (w < size)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)  # [N, 1]
    top, left = (noise[:, 21:22] * (size - h + 1)).floor(), (noise[:, 22:] * (size - w + 1)).floor()
    at = torch.arange(size)
    inside = ((at >= top) & (at < top + h))[:, :, None] & ((at >= left) & (at < left + w))[:, None]  # [N, S, S]
    rows = ((noise[:, 20] < probability) & fits.any(1)).nonzero()[:, 0]
    if len(rows):
        erased, inside = rows.to(x.device), inside[rows, None].to(x.device)
        x[erased] = torch.where(inside, gaussian(pixels(rows)).to(x), x[erased])
    return x


def mix(x, target, noise, s):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of neighbours: the images in rows 2i and 2i + 1 of the global
    batch are mixed with each other, so that none crosses from one process to another.

    Args:
        x: [N, 3, S, S], N even; target: [N, C]; noise: [N, 5] in [0, 1), on the CPU, alike in both rows of a pair;
        s: FineTuning.
    Returns:
        lam · x + (1 - lam) · neighbour, lam ~ Beta(alpha, alpha) the same for both; or x with a box of the neighbour,
        whose share of the area is 1 - lam where it does not reach over the edge; and the targets mixed by the shares.
    """
    u, size = noise.double(), x.shape[-1]
    cut = u[:, 0] < (s.switch_prob if s.mixup and s.cutmix else float(s.cutmix > 0))
    alpha = np.where(cut, s.cutmix, s.mixup)
    lam = torch.from_numpy(betaincinv(alpha, alpha, u[:, 1].numpy()))  # the beta distribution's inverse
    u, cut, lam = (v.to(x.device) for v in (u, cut, lam))
    side = (size * (1 - lam).sqrt()).floor()
    start = (u[:, 2:4] * size).floor() - (side // 2)[:, None]  # the box's middle is anywhere in the image
    at = torch.arange(size, device=x.device)
    rows, columns = ((at >= v[:, None]) & (at < (v + side)[:, None]) for v in start.T)  # [N, S] each
    box = rows[:, :, None] & columns[:, None]
    own = torch.where(cut[:, None, None], (~box).double(), lam[:, None, None])  # [N, S, S]: weight of the own pixel
    own = torch.where((u[:, 4] < s.mix_prob)[:, None, None], own, 1.0).to(x)
    neighbour = torch.arange(len(x), device=x.device) ^ 1
    own, share = own[:, None], own.mean((1, 2))[:, None]
    return own * x + (1 - own) * x[neighbour], share * target + (1 - share) * target[neighbour]


def regularized(stream, classes, s):
    """Batches of `batches` as fine-tuning sees them: yields (x standardised [n, 3, S, S], targets [n, classes], rows [n])."""
    for step, data in enumerate(stream):
        noise = lambda name, *shape: uniform((s.seed, step, name), data.rows, *shape)
        x, target = data.views[0], F.one_hot(data.labels, classes)
        if s.randaugment:
            x = rand_augment(x, noise("randaugment", s.randaugment, 4), s.magnitude)
        x = augment(x)
        target = target.to(x)
        if s.erasing:
            pixels = lambda at: uniform((s.seed, step, "erased"), data.rows[at], *x.shape[1:], device=x.device)
            x = random_erasing(x, noise("erasing", 23), pixels, s.erasing)
        if s.mixup or s.cutmix:
            x, target = mix(x, target, uniform((s.seed, step, "mix"), data.rows // 2, 5), s)
        yield x, target, data.rows


def check_tuning(s, encoder):
    """Raises InputError for settings of fine-tuning that cannot work."""
    if not -1 <= s.blocks <= encoder.depth:
        raise InputError(f"--blocks {s.blocks}: expected 0 to {encoder.depth}, the encoder's blocks, or -1 for all of it")
    if s.epochs <= 0 or s.lr <= 0:
        raise InputError(f"--epochs {s.epochs} --lr {s.lr}: choose numbers above 0")
    for name in ("warmup", "drop_path", "label_smoothing", "mix_prob", "switch_prob", "erasing"):
        if not 0 <= getattr(s, name) <= 1 - (name == "drop_path") * 1e-6:
            raise InputError(f"--{name} {getattr(s, name)}: choose a number from 0 to 1, a drop path below it")
    if min(s.randaugment, s.mixup, s.cutmix, s.weight_decay) < 0:
        raise InputError("--randaugment, --mixup, --cutmix and --weight_decay: choose 0 or more")
    if not 0 <= s.magnitude <= 10 or not 0 < s.layer_decay <= 1:
        raise InputError(f"--magnitude {s.magnitude} --layer_decay {s.layer_decay}: choose up to 10 and above 0, up to 1")
    if (s.mixup or s.cutmix) and s.batch // world() % 2:
        raise InputError(f"--batch {s.batch}: Mixup and CutMix pair images, so a process's batch must be even")


def tune(classifier, feature, stream, steps, per_epoch, accuracy, s, run):
    """The loop of fine-tuning (He et al. Table 9): AdamW with betas 0.9 and 0.999, lr · batch / 256, linear warm-up, cosine
    to 0, layer-wise decay and drop path in the encoder, cross-entropy with smoothed labels. No EMA.

    Args:
        classifier: has `encoder`, `head` and what else is new; feature: (x, drop) -> [n, D], what the head reads;
        stream: `steps` batches of (x [n, …], targets [n, C], rows [n]); accuracy: () -> percent on val; s: FineTuning.
    Returns:
        {"finetune": accuracy after the last epoch, "finetune_by_epoch": [accuracy, …]} (CMAE Figure 4b).
    """
    encoder, new = classifier.encoder, nn.ModuleList(m for name, m in classifier.named_children() if name != "encoder")
    peak = s.lr * s.batch / 256
    groups = parameter_groups(encoder, peak, s.weight_decay, s.layer_decay) + parameter_groups(new, peak, s.weight_decay)
    optimizer, by_epoch = adamw(groups, betas=(0.9, 0.999)), []
    parameters = [p for group in groups for p in group["params"]]

    def encode(x, target, drop):
        logits = promote(classifier.head(feature(x, drop)))
        return (), F.cross_entropy(logits, target, reduction="none", label_smoothing=s.label_smoothing)

    for step, (x, target, rows) in enumerate(progress(stream, steps, "steps")):
        drop = None
        if s.drop_path:
            drop = drop_path(s.drop_path, uniform((s.seed, step, "drop"), rows, encoder.depth, 2, device=x.device))
        backward(encode, None, (x, target, drop), s.micro_batch, run.precision)
        average_gradients(parameters)
        set_lr(optimizer, warmup_cosine(step, steps, steps * s.warmup))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            by_epoch.append(accuracy())
            print0(f"epoch {len(by_epoch)}: {by_epoch[-1]:.2f}")
    return {"finetune": by_epoch[-1], "finetune_by_epoch": by_epoch}


def finetune(encoder, train, val, run, s):
    """Fine-tuning of an encoder (He et al. 2022, A.1; MAE-CT A.3), of its last `s.blocks` blocks with the final norm (He et
    al. 4.3; CMAE 4.5), or, with 0 blocks, of the classifier alone.

    The classifier is linear on the encoder's own pooled feature (MAE's code: patch mean under a norm of its own) and
    starts at normal(2e-5). Crops of 0.08-1 of the area, flips, then what `s` asks for.

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: labelled Images; s: FineTuning.
    Returns:
        what `tune` returns and {"blocks"}; the Classifier after the last epoch.
    Raises:
        InputError: settings that cannot work, such as more blocks than the encoder has.
    """
    check_tuning(s, encoder)
    encoder, size = copy.deepcopy(encoder), encoder.config["image_size"]
    encoder.freeze(encoder.depth - s.blocks if s.blocks >= 0 else 0)
    torch.manual_seed(s.seed)
    classifier = Classifier(encoder, train.classes).to(run.device)
    nn.init.normal_(classifier.head.weight, std=2e-5)
    nn.init.zeros_(classifier.head.bias)
    per_epoch = len(train) // s.batch
    steps = max(1, round(s.epochs * per_epoch))
    stream = batches(train, [View(size, (0.08, 1.0))], s.batch, 0, steps, s.seed, run.device, run.workers, {})
    stream = regularized(stream, len(train.classes), s)

    def accuracy():
        logits, y = outputs(classifier, val, size, run)
        return 100 * (logits.argmax(1) == y).float().mean().item()

    feature = lambda x, drop: encoder.pooled(encoder(x, drop=drop))
    result = tune(classifier, feature, stream, steps, per_epoch, accuracy, s, run)
    return result | {"blocks": s.blocks}, classifier


def given_settings(args, train, base):
    """FineTuning from a recipe's dict and the flags that were given; a recipe's batch is at most the set."""
    names = [f.name for f in dataclasses.fields(FineTuning)]
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    s = FineTuning(**base | given)
    if "batch" not in given:
        s.batch = divided(s.batch, train, pairs=True)
    check_batch(RunSettings(data=args.data, micro_batch=s.micro_batch), train, s.batch, s.epochs)
    vars(args).update(dataclasses.asdict(s))  # for the JSON
    return s


def run_finetune(args, encoder, run):
    """Subcommand finetune; writes finetuned.pt, the classifier after the last epoch, beside the encoder."""
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise InputError(f"--fraction {args.fraction}: expected more than 0 and at most 1")
    if args.fraction and args.list:
        raise InputError("--fraction and --list: choose one")
    train, val = splits(args)
    if args.list:
        train = train.subset(listed(train, args.list))
    elif args.fraction:
        train = train.subset(drawn(train.labels, fraction=args.fraction, seed=args.seed or 0))
    args.recipe = args.recipe or ("shapes" if args.data == "shapes" else "mae")
    s = given_settings(args, train, recipe(args.recipe, encoder.dim))
    result, classifier = finetune(encoder, train, val, run, s)
    if rank() == 0:
        classifier.save(beside(args.encoder, "finetuned.pt"), with_encoder=True)
    return {"images": len(train)} | result


# --------------------------------------------------------------------------------------------------------- clustering


def kmeans_plus_plus(x, k, runs, precision, seed):
    """Indices [runs, k] of starting points, for all runs at once: greedy k-means++ (Arthur & Vassilvitskii 2007), where
    the best of 2 + log k candidates becomes the next centre (scikit-learn's rule)."""
    every, trials = torch.arange(runs, device=x.device), 2 + int(math.log(k))
    low, squares = x.to(precision), x.square().sum(1)

    def distances(i):  # squared ones from points i [runs, t] to all: [runs, t, N]
        i = i.flatten()
        products = (low[i] @ low.T).to(x.dtype)
        return products.mul_(-2).add_(squares).add_(squares[i][:, None]).clamp_(min=0).view(runs, -1, len(x))

    chosen = (uniform((seed, "k-means++"), every, 1) * len(x)).long()
    nearest = distances(chosen)[:, 0]  # [runs, N]
    for step in range(1, k):
        total = nearest.cumsum(1)
        dice = uniform((seed, "k-means++", step), every, trials) * total[:, -1:]
        candidates = torch.searchsorted(total, dice.to(total)).clamp_(max=len(x) - 1)  # with the odds of their distances
        to_nearest = distances(candidates)  # [runs, trials, N]
        torch.minimum(to_nearest, nearest[:, None], out=to_nearest)
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
    for chosen in progress(starts, share, "k-means runs"):
        centres, points = x[chosen], low
        for _ in range(iterations):
            half = centres.square().sum(1) / 2
            least = (half - points @ centres.to(points.dtype).T).min(1)  # |c|² / 2 − x·c
            assigned = least.indices
            count = torch.bincount(assigned, minlength=k)
            means = F.embedding_bag(assigned.argsort(), x, count.cumsum(0) - count, mode="mean")
            means = torch.where(count[:, None] > 0, means, centres)
            moved, centres = (means - centres).square().sum(), means
            if moved <= tolerance:
                if points is x:
                    break
                points = x
        if moved > 0 or points is not x:  # else these are the nearest
            least = (centres.square().sum(1) / 2 - x @ centres.T).min(1)
        assignments.append(least.indices)
        losses.append((2 * least.values + x.square().sum(1)).double().sum())
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
        draw_matrix(beside(args.encoder, "confusion.png"), confusion, images.classes)
    return result


# ------------------------------------------------------------------------------------------------- retrieval and maps


def draw_neighbours(path, images, size, index, caption, labels=None):
    """A picture grid: each row of `index` [R, K] is a row of images; where labels [R] are given, those of the row's class
    are framed green, others red."""
    rows = []
    for r, row in enumerate(index.cpu()):
        views = [v for v, _ in center_views(images, size, torch.device("cpu"), 0, row)]
        frames = None if labels is None else ["green" if images.labels[i] == labels[r] else "red" for i in row]
        rows.append((caption(r), torch.cat(views), frames))
    draw(path, rows)


def run_retrieve(args, encoder, run):
    """The nearest neighbours of some samples (MAE-CT Figure 11), and of the centres of k-means clusters (Figures 5, 10),
    as pictures; the share of neighbours of the same class where there are labels.

    Features are L2-normalised for the former, standardised for the latter. A cluster's class is that of most of its
    samples. Chosen: samples drawn at random, the largest clusters.
    """
    train, val = load_splits(args.data, labels=bool(args.classes))
    images, size = val or train, encoder.config["image_size"]
    if args.classes:
        images = of_classes(images, args.classes)
    labelled, k = bool(images.classes), args.clusters or max(2, len(images.classes))
    if max(args.neighbours, k) >= len(images):
        raise InputError(f"{args.neighbours} neighbours, {k} clusters: the data has {len(images)} images, choose fewer")
    x, y = features(encoder, images, run)
    unit = F.normalize(x, dim=1)
    queries = uniform((0, "queries"), torch.arange(len(x)), 1)[:, 0].argsort()[: args.samples].to(x.device)
    similarity = (unit[queries] @ unit.T).scatter(1, queries[:, None], math.inf)  # the sample itself comes first
    index = similarity.topk(args.neighbours + 1, 1).indices
    caption = lambda r: str(images.classes[y[queries[r]]]) if labelled else f"image {queries[r]}"
    if rank() == 0:
        draw_neighbours(beside(args.encoder, "neighbours.png"), images, size, index, caption, y[queries] if labelled else None)
    result = dict(neighbours=100 * (y[index[:, 1:]] == y[queries, None]).float().mean().item()) if labelled else {}

    std, mean = torch.std_mean(x, 0, unbiased=False)
    x = (x - mean) / std.clamp(min=1e-12)
    assigned, losses = kmeans(x, k, precision=run.precision)
    assigned = assigned[losses.argmin()]
    largest = torch.bincount(assigned).argsort(descending=True)[: args.samples]
    centres = torch.stack([x[assigned == c].mean(0) for c in largest])
    index = torch.cdist(centres, x).topk(args.neighbours, 1, largest=False).indices
    of_cluster = torch.stack([y[assigned == c].mode().values for c in largest])
    caption = lambda r: f"cluster {r + 1}" + (f": {images.classes[of_cluster[r]]}" if labelled else "")
    if rank() == 0:
        draw_neighbours(beside(args.encoder, "clusters.png"), images, size, index, caption, of_cluster if labelled else None)
    return result | (dict(of_centres=100 * (y[index] == of_cluster[:, None]).float().mean().item()) if labelled else {})


def embed(x):
    """Features in two dimensions: UMAP with its default parameters (MIM-Refiner C.12) if it is installed, else the first
    two principal components, each with its largest weight positive.

    x [N, D]; returns ([N, 2], what was used).
    """
    try:
        from umap import UMAP

        return torch.from_numpy(UMAP(random_state=0).fit_transform(x.cpu().numpy())), "UMAP"
    except ImportError:
        centred = x - x.mean(0)
        _, singular, v = torch.linalg.svd(centred, full_matrices=False)
        signs = v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
        share = 100 * (singular[:2].square().sum() / singular.square().sum()).item()
        return centred @ (signs * v[:2]).T, f"PCA ({share:.1f} % of the variance); for UMAP: pip install umap-learn"


def run_embed(args, encoder, run):
    """Subcommand embed: a picture of L2-normalised features in two dimensions, coloured by class (MAE-CT Figures 1, 4, 8;
    MIM-Refiner Figure 5), with their silhouette."""
    images = splits(args)[1]
    if args.classes:
        images = of_classes(images, args.classes)
    x, y = features(encoder, images, run)
    x = F.normalize(x, dim=1)
    points, how = embed(x)
    if rank() == 0:
        draw_points(beside(args.encoder, "embed.png"), points.cpu(), y.cpu(), images.classes)
    return dict(embedding=how, silhouette=silhouette(x, y))


# ------------------------------------------------------------------------------------------------- what features hold


def reconstruction_per_block(encoder, train, val, run, epochs=20, batch=4096, lr=1.5e-4, dim=512, heads=16, seed=0):
    """Loss of an MAE decoder of two blocks after every block of the frozen encoder (MIM-Refiner C.2, Figures 3d and 6).

    As in training from scratch (75 % masked, AdamW, lr · batch / 256, weight decay 0.05, crops of 0.2-1), but for 20
    epochs, 5 of them warm-up (a quarter). All decoders learn side by side from one encoder pass a batch. Chosen: they read
    a block's output before any norm; losses are those of center crops of `val`, all under one mask.

    Returns:
        list of losses (normalised patches), block 1 first.
    """
    torch.manual_seed(seed)
    blocks = list(range(1, encoder.depth + 1))
    new = lambda: MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, dim, 2, heads)
    decoders = nn.ModuleList(new() for _ in blocks).to(run.device)
    optimizer = adamw(parameter_groups(decoders, lr * batch / 256, 0.05))
    steps = round(epochs * (len(train) // batch))

    def losses(x, noise):
        """Yields the losses [n] of one block's decoder after the other."""
        ids_keep, ids_restore, mask = random_masking(noise, 0.75)
        with torch.no_grad(), autocast(run.device, run.precision):
            every = encoder(x, ids_keep, blocks=blocks)
        for decoder, tokens in zip(decoders, every):
            with autocast(run.device, run.precision):
                loss = mae_loss(decoder(tokens, ids_restore), x, mask)
            yield loss

    views, patches = [View(encoder.config["image_size"], (0.2, 1.0))], math.prod(encoder.grid)
    stream = batches(train, views, batch, 0, steps, seed, run.device, run.workers, {})
    for step, data in enumerate(progress(stream, steps, "steps")):
        noise = uniform((seed, "blocks", step), data.rows, patches, device=run.device)
        for loss in losses(augment(data.views[0]), noise):
            loss.mean().backward()  # at once, which frees what this decoder has kept for it
        average_gradients(decoders.parameters())
        set_lr(optimizer, warmup_cosine(step, steps, steps / 4))
        optimizer.step()
        optimizer.zero_grad()
    one_mask = uniform((seed, "blocks"), torch.zeros(1, dtype=torch.long), patches, device=run.device)
    every = lambda x: torch.stack(list(losses(x, one_mask.expand(len(x), -1))), 1)  # [n, B]
    found, _ = outputs(every, val, encoder.config["image_size"], run)
    return found.mean(0).tolist()


def run_blocks(args, encoder, run):
    """Subcommand blocks: k-NN and reconstruction loss of every block, and both as improvements from one block to the next,
    over the largest change (MIM-Refiner Figures 3b, 3d, 6); a picture of the improvements. C.2 divides by the "maximum
    delta", which would turn all signs where every block is worse than the one before."""
    train, val = splits(args)
    how = dict(epochs=20, batch=4096, lr=1.5e-4, dim=512, heads=16)
    if args.data == "shapes":
        how = dict(epochs=8, batch=256, lr=2e-3, dim=64, heads=4)
    how |= {name: vars(args)[name] for name in how if vars(args)[name] is not None}
    if args.batch is None:
        how["batch"] = divided(how["batch"], train)
    check_batch(RunSettings(data=args.data), train, how["batch"], how["epochs"])
    vars(args).update(how)  # for the JSON
    result = dict(knn=knn_per_block(encoder, train, val, run))
    result["reconstruction"] = reconstruction_per_block(encoder, train, val, run, **how)
    curves = {}
    for name, sign in (("knn", 1), ("reconstruction", -1)):
        change = sign * np.diff(result[name])
        result[f"{name}_improvement"] = (change / max(np.abs(change).max(), 1e-12)).tolist()
        curves[name] = (list(range(2, encoder.depth + 1)), result[f"{name}_improvement"])
    if rank() == 0:
        draw_curves(beside(args.encoder, "blocks.png"), curves, "block", "relative improvement")
    return result


def effective_invariance(p, p_t):
    """Of probabilities [N, C] of images and of their changed versions: √(p̂ p̂_t) of the predicted classes where these
    agree, else 0: [N] (MAE-CT 4.4, after Deng et al. 2022)."""
    (p, c), (p_t, c_t) = p.max(-1), p_t.max(-1)
    return (p * p_t).sqrt() * (c == c_t)


CHANGES = {  # of images in [0, 1]; Table 6 names the operations, their amounts are chosen
    "rotation": [partial(torch.rot90, k=k, dims=(2, 3)) for k in (1, 2, 3)],
    "colour": [
        lambda x, f=f, amount=amount: f(x, torch.full((len(x),), amount, device=x.device))
        for f, amounts in (
            (adjust_brightness, (0.5, 1.5)),
            (adjust_contrast, (0.5, 1.5)),
            (adjust_saturation, (0.5, 1.5)),
            (adjust_hue, (-0.25, 0.25)),
        )
        for amount in amounts
    ],
}


def invariance(classifier, images, run):
    """Average effective invariance of a linear classifier to rotations by 90, 180, 270 degrees and to changes of brightness,
    contrast, saturation (by factors 0.5 and 1.5) and hue (by a quarter turn either way): MAE-CT Table 6.

    Returns:
        {"rotation", "colour"}: means over images and changes, between 0 and 1.
    """

    def changed(x):
        pixels, p = unstandardise(x), classifier(x).softmax(-1)
        predict = lambda f: classifier(standardise(f(pixels))).softmax(-1)
        every = [effective_invariance(p, predict(f)) for fs in CHANGES.values() for f in fs]
        return torch.stack(every, 1)  # [n, changes]

    found = outputs(changed, images, classifier.encoder.config["image_size"], run)[0].mean(0)
    return {name: part.mean().item() for name, part in zip(CHANGES, found.split([len(fs) for fs in CHANGES.values()]))}


def run_invariance(args, encoder, run):
    """Subcommand invariance, on the validation set."""
    classifier = load_classifier(args.classifier or beside(args.encoder, "probe.pt"), encoder, args.image_size)
    train, val = load_splits(args.data)
    return invariance(classifier, val or train, run)


def histograms(x, bins=64):
    """Colour histograms of standardised images [n, 3, H, W]: each channel's shares of 64 bins, [n, 192] (MAE-CT A.4)."""
    level = (unstandardise(x) * 255).round().long() * bins // 256
    counts = x.new_zeros(len(x), 3, bins).scatter_add_(2, level.flatten(2), torch.ones_like(x).flatten(2))
    return (counts / math.prod(x.shape[2:])).flatten(1)


def colorhist(encoder, train, val, run, epochs=10, batch=1024, lr=0.1, seed=0):
    """Histogram prediction error: how badly linear probes tell an image's colour histogram from [CLS] after each block
    (MAE-CT A.4, Figure 3).

    One probe a block, side by side: BatchNorm without weights, 192 outputs, L1 loss, otherwise as Table 11 with 10 epochs,
    one of them warm-up, and a rate of 0.1 (at batch 256). The histogram is that of the very crop the encoder sees.

    Returns:
        list of errors in percent of those of a uniform prediction, on center crops of `val`; block 1 first.
    """
    torch.manual_seed(seed)
    blocks, size = list(range(1, encoder.depth + 1)), encoder.config["image_size"]
    norm = BatchNorm(len(blocks), encoder.dim, affine=False).to(run.device)
    weight = nn.Parameter(torch.empty(len(blocks), encoder.dim, 192, device=run.device).normal_(std=0.01))
    bias = nn.Parameter(torch.zeros(len(blocks), 1, 192, device=run.device))
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)

    def tell(x):  # [n, B, D] → [B, n, 192]
        with torch.autocast(x.device.type, enabled=False):
            return norm(x.transpose(0, 1)) @ weight + bias

    see = lambda x: torch.cat([promote(pooled(encoder, x, blocks, "cls")).flatten(1), histograms(x)], 1)
    steps = epochs * (len(train) // batch)
    for step, (seen, _) in enumerate(augmented_batches(see, train, size, batch, epochs, run, seed)):
        x, truth = seen[:, :-192].unflatten(1, (len(blocks), -1)), seen[:, -192:]
        (tell(x) - truth).abs().mean((1, 2)).sum().backward()
        average_gradients([weight, bias])
        optimizer.param_groups[0]["lr"] = lr * batch / 256 * warmup_cosine(step, steps, steps / epochs)
        optimizer.step()
        optimizer.zero_grad()
    norm.eval()

    def errors(x):
        told, truth = tell(promote(pooled(encoder, x, blocks, "cls"))), histograms(x)
        return torch.cat([(told - truth).abs().mean(2), (1 / 64 - truth).abs().mean(1)[None]]).T  # [n, B + 1]

    found = outputs(errors, val, size, run)[0].mean(0)
    return (100 * found[:-1] / found[-1]).tolist()


def run_colorhist(args, encoder, run):
    """Subcommand colorhist, with a picture of the error by block."""
    train, val = load_splits(args.data)
    if val is None:
        raise InputError(f"--data {args.data}: there is no val/ or test/ with class folders to evaluate on")
    if args.batch is None:
        args.batch = divided(64 if args.data == "shapes" else 1024, train)
    check_batch(RunSettings(data=args.data), train, args.batch, args.epochs)
    errors = colorhist(encoder, train, val, run, args.epochs, args.batch, args.lr)
    if rank() == 0:
        curve = {"histogram prediction error": (list(range(1, encoder.depth + 1)), errors)}
        draw_curves(beside(args.encoder, "colorhist.png"), curve, "block", "% of a uniform guess")
    return dict(colorhist=errors, last=errors[-1])


def run_stats(args, encoder, run):
    """Averages over features of the mean and of the variance of [CLS], after the last block and after the final norm
    (MIM-Refiner Table 14 does not say which)."""
    train, val = load_splits(args.data)

    def both(x):
        (tokens,) = encoder(x, blocks=[encoder.depth])
        return torch.stack([tokens[:, 0], encoder.norm(tokens)[:, 0]], 1)  # [n, 2, D]

    x, _ = outputs(both, val or train, encoder.config["image_size"], run)
    var, mean = torch.var_mean(x, 0)
    return {
        name: dict(mean=mean[i].mean().item(), variance=var[i].mean().item())
        for i, name in enumerate(("last_block", "final_norm"))
    }


# -------------------------------------------------------------------------------------------- robustness and transfer


def matched(folders, classes, mapping=None):
    """Which classes each folder of images stands for: [folders, classes] bool.

    A folder has the name of a class, or `mapping` {folder: class or list of classes} says what it holds; with a mapping
    other folders count for nothing (ObjectNet shares 113 of its 313 classes with ImageNet). Where all folders are numbers
    that name no class (ImageNet-V2's 0 … 999) they are positions in the sorted list of classes.

    Raises:
        InputError: a folder that stands for no class, or a class of the mapping that the classifier does not have.
    """
    number = {str(c): i for i, c in enumerate(classes)}
    if mapping is None and all(f.isdecimal() and f not in number for f in folders):
        number = {str(i): i for i in range(len(classes))}
    held = torch.zeros(len(folders), len(classes), dtype=torch.bool)
    for i, folder in enumerate(folders):
        names = (mapping or {}).get(folder, folder if folder in number else [])
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or name not in number:
                raise InputError(f"the mapping says {folder}: {name!r}, which is no class of the classifier")
            held[i, number[name]] = True
    unknown = [folder for folder, row in zip(folders, held) if not row.any()]
    if unknown and (mapping is None or len(unknown) == len(folders)):
        has = ", ".join(map(str, classes[:3]))
        raise InputError(f"folder {unknown[0]} is no class of the classifier ({has}, …): say what it holds by --mapping FILE")
    if unknown:
        print0(f"{len(unknown)} of {len(folders)} folders hold none of the classes and are left out ({unknown[0]}, …)")
    return held


def real_labels(images, content, classes, path):
    """ImageNet-ReaL's answers: [N, classes] bool of the labels that count as right for each validation image.

    `content` is a list of lists of class numbers in the order of the file names (reassessed-imagenet's real.json), or
    {file name: list}.

    Raises:
        InputError: a list of another length, a file without an entry, or a label that is no class number.
    """
    names = None if images.files is None else [os.path.basename(os.fsdecode(file)) for file in images.files]
    if isinstance(content, list):
        if len(content) != len(images):
            raise InputError(f"{path} has labels of {len(content)} images, the validation set has {len(images)}")
        order = range(len(images)) if names is None else sorted(range(len(images)), key=names.__getitem__)
        lists = dict(zip(order, content))
    else:
        missing = next((n for n in names or ["an image without a file"] if n not in content), None)
        if missing:
            raise InputError(f"{path} has no labels for {missing}")
        lists = {i: content[name] for i, name in enumerate(names)}
    right = torch.zeros(len(images), len(classes), dtype=torch.bool)
    for i, numbers in lists.items():
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if not isinstance(number, int) or not 0 <= number < len(classes):
                raise InputError(f"{path}: expected lists of numbers from 0 to {len(classes) - 1}, found {number!r}")
            right[i, number] = True
    return right


def robust(classifier, images, right, run, among=None):
    """Top-1 accuracy of a trained classifier on other images of its classes (MAE-CT B.2, Table 17; CAN 4.4, Figure 5).

    Args:
        classifier: a Classifier; right [N, C] bool: the classes that count as right for each image; images without any
            are skipped; among [C] bool: predictions are made among these classes only. The papers are silent; among the
            classes of the set is how the authors of ImageNet-R and -A measure, and the same for ObjectNet; for
            ImageNet-V2, -Sketch and ReaL it is no restriction. (The red border of ObjectNet's images is not cut off here.)
    Returns:
        {"accuracy": percent, "images": how many count, "classes": how many are predicted among}.
    Raises:
        InputError: no image has a class.
    """
    kept = right.any(1).nonzero()[:, 0]
    if not len(kept):
        raise InputError("none of the images has a label that counts")
    among = torch.ones(right.shape[1], dtype=torch.bool) if among is None else among
    images = dataclasses.replace(images.subset(kept), labels=right[kept])
    logits, right = outputs(classifier, images, classifier.encoder.config["image_size"], run)
    predicted = logits.masked_fill(~among.to(run.device), -math.inf).argmax(1, keepdim=True)
    return {
        "accuracy": 100 * right.gather(1, predicted).double().mean().item(),
        "images": len(right),
        "classes": int(among.sum()),
    }


def class_folders(path):
    """The images of a folder of class folders; of its val/ or test/ where it has one; or a built-in or torchvision set's
    validation images."""
    if not Path(path).is_dir() or any((Path(path) / n).is_dir() for n in ("val", "test")):
        return load_images(path, "val")
    try:
        found = torchvision.datasets.ImageFolder(path)
    except OSError as e:
        raise InputError(f"{path}: expected one folder of images per class ({e})") from e
    files, labels = zip(*found.samples)
    return Images(torch.tensor(labels), found.classes, files=np.array([os.fsencode(file) for file in files]))


def run_robust(args, encoder, run):
    """Subcommand robust, on each folder of --sets (or --data) and, with --real, on the validation images of --data."""
    classifier = load_classifier(args.classifier or beside(args.encoder, "probe.pt"), encoder, args.image_size)
    mapping, result = args.mapping and read_json(args.mapping, "expected {folder: class or list of classes}"), {}
    for name in args.sets or [args.data]:
        images = class_folders(name)
        held = matched(images.classes, classifier.classes, mapping)
        result[name] = robust(classifier, images, held[images.labels], run, held.any(0))
    if args.real:
        images = load_images(args.data, "val", labels=False)
        content = read_json(args.real, "expected ReaL's lists of class numbers", (list, dict))
        right = real_labels(images, content, classifier.classes, args.real)
        result["ReaL"] = robust(classifier, images, right, run)
    return result


def several_labels(logits, y):
    """Loss of probes side by side where images have several labels: sigmoid and binary cross-entropy, summed over classes.

    logits [P, n, C]; y [n, C] is 1, 0, or −1 where it does not count. Returns [P].
    """
    losses = F.binary_cross_entropy_with_logits(logits, y.clamp(min=0).to(logits).expand_as(logits), reduction="none")
    return (losses * (y >= 0)).sum(2).mean(1)


def mean_average_precision(logits, y):
    """VOC2007's own measure in percent, as ViC-MAE's predecessors report it (the paper itself is silent): the mean over
    classes of the 11-point interpolated average precision (Everingham et al. 2010).

    logits [N, C]; y [N, C] is 1, 0, or −1 where an image does not count for the class ("difficult"). A class that no image
    has does not count.
    """
    values = []
    for score, label in zip(logits.T, y.T):
        label = label[label >= 0][score[label >= 0].argsort(descending=True, stable=True)].double()
        if label.any():
            found = label.cumsum(0)
            recall, precision = found / found[-1], found / torch.arange(1, len(label) + 1, device=y.device)
            values.append(sum(precision[recall >= t / 10].max().item() for t in range(11)) / 11)
    return 100 * sum(values) / len(values)


def mean_per_class(logits, y):
    """Accuracy in percent, every class of y [N] counting the same; logits [N, C]."""
    right = (logits.argmax(1) == y).double()
    return 100 * torch.stack([right[y == c].mean() for c in y.unique()]).mean().item()


def transfer(encoder, train, val, run):
    """Linear probing of another data set (MIM-Refiner C.8, Table 8; ViC-MAE Table 3), by DINOv2's grid on cached,
    unaugmented features; batch 256: chosen.

    Returns accuracies in percent: {"accuracy", "mean per class"}, or {"mAP"} where images have several labels. Table 8
    reports accuracy. ViC-MAE leaves its metrics open; its predecessors (Kornblith et al. 2019, Table 1) take the mean per
    class for Aircraft, Pets, Caltech101 and Flowers, and VOC2007's mAP.
    """
    several = dict(loss=several_labels, score=mean_average_precision) if train.labels.ndim == 2 else {}
    result, classifier = linear_probe(encoder, train, val, run, "dinov2", batch=divided(256, train), cached=True, **several)
    if several:
        return {"mAP": result["probe"]}
    logits, y = outputs(classifier, val, encoder.config["image_size"], run)
    return {"accuracy": result["probe"], "mean per class": mean_per_class(logits, y)}


def average_rank(values):
    """Average over data sets of each encoder's rank among the encoders, 1 is best (MIM-Refiner Table 8); values
    [encoders, sets]. Encoders that tie share the mean of their ranks."""
    return rankdata(-np.asarray(values), axis=0).mean(1).tolist()


def run_transfer(args, encoder, run):
    """Subcommand transfer, on each of --sets (or --data), for the encoder and those that it is compared --against."""
    paths, sets = [str(args.encoder), *args.against], args.sets or [args.data]
    if len(set(paths)) < len(paths) or len(set(sets)) < len(sets):
        raise InputError("an encoder or a data set is named twice")
    others = [load_encoder(path, args.image_size) for path in args.against]
    loaded = []
    for name in sets:
        voc = name.lower() == "voc2007"
        loaded.append([load_voc2007(s) for s in ("train", "val")] if voc else splits(argparse.Namespace(data=name)))
    result, values = {}, []
    for path, encoder in zip(paths, [encoder, *others]):
        encoder.pool = args.pool or encoder.pool
        encoder.to(run.device).requires_grad_(False)
        scores = {name: transfer(encoder, train, val, run) for name, (train, val) in zip(sets, loaded)}
        result[path] = {f"{name} {metric}": v for name, found in scores.items() for metric, v in found.items()}
        values.append([next(iter(found.values())) for found in scores.values()])
    for path, average in zip(paths, average_rank(values)):
        result[path]["rank"] = average
    return result


# ------------------------------------------------------------------------------------------------------- segmentation

SEGMENT_LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # C.8: a reduced grid; this is the authors' code's


@dataclass
class Annotated(Images):
    """Images with a label map each, as ADE20K keeps them: class + 1 for every pixel, 0 where it counts nowhere."""

    maps: torch.Tensor | np.ndarray = None  # [N, H, W] uint8, or [N] names of files as bytes

    def open_map(self, i):
        """Label map i as a PIL image, of the size of image i."""
        if isinstance(self.maps, torch.Tensor):
            return Image.fromarray(self.maps[i].numpy())
        return Image.open(os.fsdecode(self.maps[i]))


def load_annotated(data, split, classes=150):
    """A split of "shapes" (class 0 is the background, class c + 1 the objects of class c) or of a folder of ADE20K's
    layout: images/training/NAME.jpg with annotations/training/NAME.png, and the same for validation.

    Raises:
        InputError: a folder is missing or empty, or an image has no label map.
    """
    if data == "shapes":
        images = load_images(data, split)
        maps = 1 + torch.where(images.masks, 1 + images.labels[:, None, None], 0).byte()
        return Annotated(images.labels, ["background", *images.classes], pixels=images.pixels, maps=maps)
    split = {"train": "training", "val": "validation"}[split]
    folders = [Path(data) / part / split for part in ("images", "annotations")]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--data {data}: there is no {folder}; give `shapes` or a folder of ADE20K's layout, "
                             "images/ and annotations/ with training/ and validation/ in each")  # fmt: skip
    files, maps = (sorted(f for f in os.listdir(folder) if Path(f).suffix.lower() in SUFFIXES) for folder in folders)
    if not files:
        raise InputError(f"--data {data}: no images in {folders[0]}")
    wanted = [Path(f).stem + ".png" for f in files]
    missing = sorted(set(wanted) - set(maps))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"--data {data}: no label map {folders[1] / missing[0]}{more}; every image needs one")
    files, maps = (np.array([os.fsencode(at / f) for f in names]) for at, names in zip(folders, (files, wanted)))
    return Annotated(torch.full((len(files),), -1), list(range(1, classes + 1)), files=files, maps=maps)


@dataclass
class AnnotatedCrop:
    """Cuts an image and its label map alike, uint8 [3, size, size] and [size, size]: a random crop and flip as a probe's
    (C.3), or with `seed` None C.7's evaluation crop, the shorter edge to `size` and the central square. Labels are those
    of the nearest pixels.

    A label map of another size, with colours or with a number that is no class makes the image unreadable: another takes
    its place, and its name is printed.
    """

    size: int
    seed: int = None

    def __call__(self, images, epoch, index):
        pair = [images.open(index), images.open_map(index)]
        if pair[0].size != pair[1].size or len(pair[1].getbands()) > 1:
            raise ValueError(f"its label map is {pair[1].size} {pair[1].mode}, expected {pair[0].size} in one channel")
        modes = InterpolationMode.BICUBIC, InterpolationMode.NEAREST
        if self.seed is None:
            pair = [v2.center_crop(v2.resize(x, [self.size], mode), [self.size] * 2) for x, mode in zip(pair, modes)]
        else:
            dice = random.Random(repr((self.seed, epoch, index)))
            box = crop_box(dice, pair[0].height, pair[0].width, (0.08, 1.0))
            pair = [v2.resized_crop(x, *box, [self.size] * 2, mode) for x, mode in zip(pair, modes)]
            if dice.random() < 0.5:
                pair = [v2.horizontal_flip(x) for x in pair]
        image, labels = map(np.array, pair)
        if labels.max() > len(images.classes):
            raise ValueError(f"its label map has {labels.max()}, expected 0 to {len(images.classes)}")
        return [torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(labels.astype(np.uint8))]


def annotated_batches(images, order, crop, run):
    """Yields (standardised images [n, 3, S, S], classes [n, S, S], −1 where a pixel counts nowhere)."""
    workers = run.workers if images.pixels is None else 0
    for (x, labels), _ in decode(images, order, crop, run.device, workers, {}):
        yield augment(x), labels.long() - 1


def pixel_logits(logits, grid, size):
    """Logits of patches [P, n · L, C] of the grid, upsampled (bilinear, as two matrix products) to pixels
    [P, n, size, size, C]."""
    rows, columns = (F.interpolate(torch.eye(side).to(logits)[None], size, mode="linear")[0].T for side in grid)
    logits = columns @ logits.unflatten(1, (-1, *grid))  # [P, n, h, size, C]
    return (rows @ logits.flatten(3)).unflatten(3, (size, -1))


def mean_iou(confusion):
    """Mean intersection over union, in percent, from counts of pixels [..., classes, predicted classes]. A class that is
    nowhere, neither in truth nor in prediction, is left out of the mean."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 100 * (hits / (confusion.sum(-1) + confusion.sum(-2) - hits)).nanmean(-1)


def segment(encoder, train, val, run, epochs=50, batch=16, lrs=SEGMENT_LRS, seed=0):
    """Semantic segmentation by a linear classifier of frozen patch features (MIM-Refiner C.7, ADE20K in Table 4).

    The tokens of a patch after the last, 5th last, 9th last and 13th last block, as far as there are, side by side; a
    non-affine BatchNorm, a linear layer, its logits upsampled to pixels, cross-entropy. All crops have the encoder's
    size (224). C.8 and C.3: SGD with momentum 0.9, 50 epochs, random resized crops and flips, a sweep of
    learning rates (base · batch / 256) of which the best on the validation set is reported. Left open there and taken
    from the authors' code: no weight decay, tokens before the final norm, batch 16, a tenth of the steps warm-up, then
    cosine. Chosen: bilinear upsampling (theirs: nearest), classes that are nowhere left out of the mean.

    Args:
        encoder: a frozen ViT; train, val: Annotated; batch: global; lrs: base rates, at batch 256.
    Returns:
        {"miou": in percent, of one confusion matrix of all validation pixels, "lr", "miou_by_lr", "blocks"}, and a function
        of standardised images [n, 3, S, S] that gives the best classifier's classes [n, S, S].
    """
    size, classes = encoder.config["image_size"], len(train.classes)
    blocks = [b for b in range(encoder.depth, encoder.depth - 13, -4) if b > 0]
    steps = epochs * (len(train) // batch)
    torch.manual_seed(seed)
    probes = Probes(len(lrs), encoder.dim * len(blocks), classes).to(run.device)
    peaks = torch.tensor(lrs, device=run.device) * batch / 256
    optimizer = torch.optim.SGD(probes.parameters(), lr=1.0, momentum=0.9)  # a probe's rate is a weight of its loss

    def logits(x):
        with torch.no_grad(), autocast(run.device, run.precision):
            tokens = torch.cat(encoder(x, blocks=blocks), -1)[:, 1:]  # [n, L, blocks · D]
        return pixel_logits(probes(promote(tokens).flatten(0, 1)), encoder.grid, size)

    stream = annotated_batches(train, shuffled(len(train), batch, 0, steps, seed), AnnotatedCrop(size, seed), run)
    for step, (x, labels) in enumerate(progress(stream, steps, "steps")):
        counted = gather((labels >= 0).sum()[None]).sum().clamp(min=1)  # pixels of the global batch
        losses = [F.cross_entropy(one.movedim(-1, 1), labels, ignore_index=-1, reduction="sum") for one in logits(x)]
        (torch.stack(losses) @ peaks * world() / counted).backward()
        average_gradients(probes.parameters())
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, steps // 10)
        optimizer.step()
        optimizer.zero_grad()

    probes.eval()
    confusion = torch.zeros(len(lrs), classes * classes, dtype=torch.long, device=run.device)
    mine = [(0, part) for part in torch.arange(rank(), len(val), world()).split(16) if len(part)]
    stream = annotated_batches(val, mine, AnnotatedCrop(size), run)
    with torch.no_grad():
        for x, labels in progress(stream, len(mine), "batches segmented"):
            counted = labels >= 0
            for one, table in zip(logits(x), confusion):
                table += torch.bincount((labels * classes + one.argmax(-1))[counted], minlength=classes * classes)
    by_lr = mean_iou(gather(confusion[None]).sum(0).unflatten(1, (classes, classes))).tolist()
    best = max(range(len(lrs)), key=by_lr.__getitem__)
    result = {"miou": by_lr[best], "lr": lrs[best], "miou_by_lr": dict(zip(lrs, by_lr)), "blocks": blocks}
    return result, lambda x: logits(x)[best].argmax(-1)


def map_colours(maps):
    """Label maps [n, H, W] in PASCAL VOC's colours, uint8 [n, 3, H, W]: bits 0, 3, 6 of a number are the highest bits of
    red, 1, 4, 7 those of green, 2, 5, 8 those of blue. 0 is black."""
    bits = maps[..., None] >> torch.arange(9, device=maps.device) & 1
    weights = torch.tensor([128, 64, 32], device=maps.device)
    return (bits.unflatten(-1, (3, 3)).mT * weights).sum(-1).movedim(-1, 1).byte().cpu()


def run_segment(args, encoder, run):
    """Subcommand segment; draws the first validation images, their labels and what is predicted, in VOC's colours."""
    train, val = (load_annotated(args.data, split) for split in ("train", "val"))
    args.batch = divided(16, train) if args.batch is None else args.batch
    args.epochs = args.epochs or (4 if args.data == "shapes" else 50)
    check_batch(RunSettings(data=args.data), train, args.batch, args.epochs)
    result, predict = segment(encoder, train, val, run, args.epochs, args.batch)
    first = [(0, torch.arange(min(8, len(val))))]
    ((x, labels),) = annotated_batches(val, first, AnnotatedCrop(encoder.config["image_size"]), run)
    with torch.no_grad():
        maps = {"labels": labels, "predictions": predict(x)}
    if rank() == 0:
        rows = [("images", to_bytes(x), None), *((name, map_colours(y + 1), None) for name, y in maps.items())]
        draw(beside(args.encoder, "segment.png"), rows, side=96)
    return result


# -------------------------------------------------------------------------------------------------------------- video

# How a 2-D ViT sees a clip, how clips are drawn and what regularises the fine-tuning, ViC-MAE does not say: all of it is
# chosen here. From the paper are multi-view testing (Section 4) and, for the optimiser, Table 8.


@dataclass
class Clips:
    """Cuts clips of `frames` frames, uint8 [frames, 3, size, size], from a video: called in the workers.

    Frame t of T is that at (t + offset) / T of the video. In training the offset, the crop (0.5-1 of the area, as in
    ViC-MAE's pre-training) and the flip are one for the whole clip, drawn by (seed, epoch, index). At test time there are
    `temporal` offsets, evenly spread, and for each `spatial` squares along the longer side.
    """

    frames: int
    size: int
    temporal: int = 0  # 0: one random clip
    spatial: int = 1
    seed: int = 0

    def __call__(self, videos, epoch, index):
        length, read = videos.open_clip(index)
        dice = random.Random(repr((self.seed, epoch, index)))
        offsets = [(k + 0.5) / self.temporal for k in range(self.temporal)] or [dice.random()]
        views = []
        for offset in offsets:
            pictures = [read(int((t + offset) * length / self.frames)).convert("RGB") for t in range(self.frames)]
            w, h = pictures[0].size
            if self.temporal:
                side, places = min(w, h), torch.linspace(0, 1, self.spatial) if self.spatial > 1 else torch.tensor([0.5])
                boxes = [(round((h - side) * p), round((w - side) * p), side, side) for p in places.tolist()]
            else:
                boxes = [crop_box(dice, h, w, (0.5, 1.0))]
            for top, left, h, w in boxes:
                cut = [p.resize((self.size,) * 2, Image.Resampling.BICUBIC, (left, top, left + w, top + h)) for p in pictures]
                views.append(torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in cut]))
        if not self.temporal and dice.random() < 0.5:
            views = [v.flip(-1) for v in views]
        return views


def standardized(clips):
    """uint8 [N, T, 3, S, S] -> standardised, alike."""
    return augment(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


class ClipClassifier(nn.Module):
    """An encoder and a linear classifier of clips: standardised [N, T, 3, S, S] -> logits [N, C].

    how: "frames": the mean of the frames' features; "joint": the patch tokens of all frames in one sequence behind one
    [CLS], with a learned embedding a frame that starts at zero.
    """

    def __init__(self, encoder, classes, frames, how):
        super().__init__()
        self.encoder, self.how, self.head = encoder, how, nn.Linear(encoder.dim, classes)
        if how == "joint":
            self.time = nn.Embedding(frames, encoder.dim)
            nn.init.zeros_(self.time.weight)

    def feature(self, x, drop=None):
        n, t = x.shape[:2]
        if self.how == "frames":
            drop = None if drop is None else drop.repeat_interleave(t, 0)
            return self.encoder.pooled(self.encoder(x.flatten(0, 1), drop=drop)).unflatten(0, (n, t)).mean(1)
        tokens = self.encoder.embed(x.flatten(0, 1)).unflatten(0, (n, t))  # [N, T, 1 + L, D]
        patches = tokens[:, :, 1:] + self.time.weight[:, None]
        tokens = torch.cat([tokens[:, 0, :1], patches.flatten(1, 2)], 1)  # [N, 1 + T · L, D]
        for i, block in enumerate(self.encoder.stack()):
            tokens = block(tokens, None if drop is None else drop[:, i])
        return self.encoder.pooled(self.encoder.norm(tokens))

    def forward(self, x):
        feature = promote(self.feature(x))
        with torch.autocast(x.device.type, enabled=False):
            return self.head(feature)


@torch.no_grad()
def multi_view(classifier, videos, cut, run, batch=32):
    """Accuracy in percent of the average of all views' probabilities (ViC-MAE Section 4, "K x 3")."""
    share = math.ceil(len(videos) / world())
    mine = (rank() * share + torch.arange(share)) % len(videos)
    order, right = [(0, part) for part in mine.split(batch)], []
    stream = decode(videos, order, cut, run.device, run.workers, {})
    for views, used in progress(stream, len(order), "batches of videos"):
        with autocast(run.device, run.precision):
            probabilities = sum(classifier(standardized(v)).softmax(1) for v in views)  # [n, C]
        right.append(probabilities.argmax(1) == videos.labels.to(run.device)[used])
    return 100 * gather(torch.cat(right))[: len(videos)].float().mean().item()


def video(encoder, train, val, run, s, frames=4, how="joint", temporal=7, spatial=3):
    """Fine-tuning on videos, or with s.blocks = 0 a probe, and multi-view testing (ViC-MAE Section 4).

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: labelled Videos; s: FineTuning, of which the augmentation of
        images is not used; frames, how: of `Clips` and `ClipClassifier`; temporal, spatial: views at test time.
    Returns:
        what `tune` returns, by the central view; "video", the accuracy of all views in percent.
    """
    check_tuning(s, encoder)
    if min(frames, temporal, spatial) < 1:
        raise InputError(f"--frames {frames} --temporal {temporal} --spatial {spatial}: choose at least 1 of each")
    encoder, size = copy.deepcopy(encoder), encoder.config["image_size"]
    encoder.freeze(encoder.depth - s.blocks if s.blocks >= 0 else 0)
    torch.manual_seed(s.seed)
    classifier = ClipClassifier(encoder, len(train.classes), frames, how).to(run.device)
    nn.init.normal_(classifier.head.weight, std=2e-5)
    nn.init.zeros_(classifier.head.bias)
    if how == "joint":
        classifier.time.requires_grad_(s.blocks != 0)  # else every block would compute gradients
    per_epoch, n = len(train) // s.batch, s.batch // world()
    steps, rows = max(1, round(s.epochs * per_epoch)), torch.arange(n) + rank() * n

    order = shuffled(len(train), s.batch, 0, steps, s.seed)
    labels = F.one_hot(train.labels, len(train.classes)).float().to(run.device)
    stream = decode(train, order, Clips(frames, size, seed=s.seed), run.device, run.workers, {})
    stream = ((standardized(views[0]), labels[index], rows) for views, index in stream)
    central = lambda: multi_view(classifier, val, Clips(frames, size, 1), run)
    result = tune(classifier, classifier.feature, stream, steps, per_epoch, central, s, run)
    return {"video": multi_view(classifier, val, Clips(frames, size, temporal, spatial), run)} | result


def run_video(args, encoder, run):
    """Subcommand video."""
    args.data = "moving_shapes" if args.data == "shapes" else args.data  # the built-in videos
    sets = load_splits(args.data, labels=True, load=load_videos)
    if sets[1] is None:
        raise InputError(f"--data {args.data}: expected labelled videos, train/CLASS/VIDEO and val/CLASS/VIDEO")
    if args.label == "motion":
        if sets[0].motions is None:
            raise InputError(f"--label motion: --data {args.data} has no second label, moving_shapes has")
        sets = [dataclasses.replace(v, labels=v.motions, classes=MOTIONS) for v in sets]
    built_in = dict(epochs=4, warmup=0.1, batch=32, lr=8e-3) if args.data == "moving_shapes" else {}  # chosen
    s = given_settings(args, sets[0], recipe("vicmae_subset", encoder.dim) | built_in)
    args.temporal, args.spatial = (own if own is not None else default for own, default in zip(
        (args.temporal, args.spatial), (3, 1) if built_in else (7, 3)))  # fmt: skip
    return video(encoder, *sets, run, s, args.frames, args.how, args.temporal, args.spatial)


# --------------------------------------------------------------------------------------------------------------- main


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


def command_line():
    """The parser: a subcommand for each protocol, with its flags; `run` is its function."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="protocol", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--encoder", type=Path, required=True, help="encoder file, ours or a public one")
    every.add_argument("--data", default="shapes", help="built-in set, folder with train/ and val/, or torchvision name")
    every.add_argument("--image_size", type=int, help="default: the encoder's")
    every.add_argument("--pool", choices=["cls", "mean"], help="default: the encoder's")
    every.add_argument("--precision", default="auto")
    every.add_argument("--workers", type=int, default=-1, help="default: one for each core, at most 12")

    def command(run, protocol):
        text = " ".join(protocol.__doc__.split("\n\n")[0].split()).replace("%", "%%")
        p = commands.add_parser(run.__name__.removeprefix("run_"), parents=[every], help=text, description=text)
        p.set_defaults(run=run)
        return p.add_argument

    meaning = comments(FineTuning)
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
    flag("--recipe", choices=RECIPES, help="default mae; shapes for the built-in images")
    flag("--fraction", type=float, help="share of the training images, drawn class by class")
    flag("--list", help="file with names of training images, one a line")
    for field in dataclasses.fields(FineTuning):
        flag(f"--{field.name}", type=field.type, help=f"[the recipe's, or {field.default}] {meaning.get(field.name, '')}")
    flag = command(run_retrieve, run_retrieve)
    flag("--samples", type=int, default=8, help="rows of either picture")
    flag("--neighbours", type=int, default=10)
    flag("--clusters", type=int, default=0, help="of k-means; default: the number of classes")
    flag("--classes", type=Path, help="file that names the classes to search, one a line")
    flag = command(run_embed, embed)
    flag("--classes", type=Path, help="file that names the classes to show, one a line")
    flag = command(run_blocks, reconstruction_per_block)
    flag("--epochs", type=float, help="default 20, on the built-in images 8")
    flag("--batch", type=int, help="default 4096, built-in 256")
    flag("--lr", type=float, help="at batch 256; default 1.5e-4, built-in 2e-3")
    flag("--dim", type=int, help="of the decoders; default 512, built-in 64")
    flag("--heads", type=int, help="of the decoders; default 16, built-in 4")
    flag = command(run_invariance, invariance)
    flag("--classifier", type=Path, help="probe.pt or finetuned.pt; default: probe.pt beside the encoder")
    flag = command(run_colorhist, colorhist)
    flag("--epochs", type=int, default=10)
    flag("--batch", type=int, help="default 1024, on the built-in images 64")
    flag("--lr", type=float, default=0.1, help="at batch 256")
    command(run_stats, run_stats)
    flag = command(run_segment, segment)
    flag("--epochs", type=int, help="default: 50, on the built-in images 4")
    flag("--batch", type=int, help="default 16")
    flag = command(run_robust, robust)
    flag("--classifier", type=Path, help="probe.pt or finetuned.pt; default: probe.pt beside the encoder")
    flag("--sets", nargs="+", metavar="FOLDER", help="instead of --data: folders with one folder of images per class")
    flag("--mapping", type=Path, help="JSON {folder: class or list of classes}")
    flag("--real", type=Path, help="ReaL labels of --data's validation images, JSON")
    flag = command(run_transfer, transfer)
    flag("--against", nargs="+", default=[], metavar="FILE", help="other encoders, for the average rank")
    flag("--sets", nargs="+", metavar="SET", help="several instead of --data; also voc2007")
    flag = command(run_video, video)
    flag("--how", choices=["frames", "joint"], default="joint")
    flag("--label", choices=["class", "motion"], default="class", help="motion: the second label of moving_shapes")
    flag("--frames", type=int, default=4, help="of a clip")
    flag("--temporal", type=int, help="temporal views at test time; default 7 (Section 4), moving_shapes 3")
    flag("--spatial", type=int, help="spatial views of each; default 3, moving_shapes 1: its videos are square")
    for field in dataclasses.fields(FineTuning):
        if field.name not in ("randaugment", "magnitude", "mixup", "cutmix", "mix_prob", "switch_prob", "erasing"):
            text = f"[Table 8's; moving_shapes has its own] {meaning.get(field.name, '')}"
            flag(f"--{field.name}", type=field.type, help=text)
    return parser


def main(argv):
    """Parses the subcommand, loads the encoder, prints the result and writes PROTOCOL.json beside the encoder."""
    args = check_numbers(command_line().parse_args(argv))
    device = start()
    encoder = load_encoder(args.encoder, args.image_size)
    encoder.pool = args.pool or encoder.pool
    encoder.to(device).requires_grad_(False)
    result = args.run(args, encoder, Machine(device, precision_of(args.precision, device), workers_of(args.workers)))
    table(result)
    if rank() == 0:
        content = dict(settings={k: v for k, v in vars(args).items() if k != "run"}) | result
        content = json.dumps(content, indent=1, default=str)  # paths as text
        write_atomic(beside(args.encoder, f"{args.protocol}.json"), content.encode())


if __name__ == "__main__":
    launch(main)
