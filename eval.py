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
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from torch import nn

from common import (
    BatchNorm, CenterCrop, InputError, Parser, RunSettings, View, adamw, augment, average_gradients, backward, batches,
    check_batch, decode, gather, launch, load_encoder, load_splits, parameter_groups, precision_of, print0, promote,
    rank, save_file, set_lr, start, uniform, warmup_cosine, world, write_atomic,
)  # fmt: skip


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
def features(encoder, images, device, precision=torch.float32, workers=0, blocks=None, index=None):
    """Pooled features of a whole set, without augmentation: ([N, D], labels [N]), both on the device.

    With `blocks` (numbers from 1) those after each of these blocks, before the final norm: [N, blocks, D]. `index` [N]
    chooses images. Under torchrun each rank encodes its part and all get the whole.
    """
    encoder.eval()
    index = torch.arange(len(images)) if index is None else index
    share = math.ceil(len(index) / world())
    mine = index[torch.arange(rank() * share, (rank() + 1) * share) % len(index)]
    out, used = [], []
    for x, at in center_views(images, encoder.grid[0] * encoder.patch_size, device, workers, mine):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            tokens = encoder(augment(x), blocks=blocks)
            feature = torch.stack([encoder.pooled(t) for t in tokens], 1) if blocks else encoder.pooled(tokens)
        out.append(promote(feature))
        used.append(at)
    encoder.train()
    used = gather(torch.cat(used))[: len(index)]
    return gather(torch.cat(out))[: len(index)], images.labels.to(device)[used]


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


def knn_per_block(encoder, train, val, run, blocks=None, bank=100_000):
    """k-NN of the feature after each block (all of them, or `blocks`), before the final norm: MIM-Refiner's Figure 3b.

    k = 10 (C.4) on standardised features (the authors' code), against at most `bank` training images drawn at random, since
    N · blocks · D values are kept at once. Returns a list of accuracies in percent.
    """
    blocks = blocks or list(range(1, encoder.depth + 1))
    where = (run.device, run.precision, run.workers, blocks)
    drawn = uniform(("bank",), torch.arange(len(train)), 1)[:, 0].argsort()[:bank]
    (x, y), (test_x, test_y) = features(encoder, train, *where, drawn), features(encoder, val, *where)
    ks = (min(10, len(x)),)
    return [knn(x[:, b], y, test_x[:, b], test_y, ks, standardize=True)["knn"] for b in range(len(blocks))]


# ------------------------------------------------------------------------------------------------- linear probing

PROBE_LRS = tuple(i / 100 for i in range(10, 0, -1))  # Table 11: 0.1, 0.09, … 0.01


class Probes(nn.Module):
    """P linear classifiers behind one non-affine BatchNorm: [N, D] → [P, N, C]; weights normal(0.01), biases 0."""

    def __init__(self, probes, dim, classes, eps=1e-5):
        super().__init__()
        self.norm = BatchNorm(dim, affine=False, eps=eps)
        self.weight = nn.Parameter(torch.empty(probes, classes, dim).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(probes, classes))

    def forward(self, x):
        return self.norm(x) @ self.weight.transpose(1, 2) + self.bias[:, None]


def cached_batches(x, y, batch, epochs, seed=0):
    """Batches of cached features [N, D], shuffled every epoch; each rank gets its part."""
    n = batch // world()
    for epoch in range(epochs):
        order = uniform((seed, epoch, "order"), torch.arange(len(x)), 1)[:, 0].argsort().to(x.device)
        for first in range(rank() * n, len(x) // batch * batch, batch):
            rows = order[first : first + n]
            yield x[rows], y[rows]


@torch.no_grad()
def augmented_batches(encoder, images, batch, epochs, device, precision, workers, seed=0):
    """Features of random crops and flips (Table 11), one encoder pass a batch: yields ([n, D], labels [n])."""
    steps, views = epochs * (len(images) // batch), [View(encoder.grid[0] * encoder.patch_size, (0.08, 1.0))]
    for data in batches(images, views, batch, 0, steps, seed, device, workers, {}):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            feature = promote(encoder.pooled(encoder(augment(data.views[0]))))
        yield feature, data.labels


def probe(train, steps, warmup, classes, test_x, test_y, batch, lrs=PROBE_LRS):
    """MAE-CT's linear probe (A.3, Table 11): every learning rate of the sweep trained side by side on the same features.

    SGD with momentum 0.9, no weight decay, lr = base · batch / 256, warm-up and cosine. An update of plain SGD is
    proportional to lr, so each probe's rate is a weight of its loss. As in the paper, the best on the test set is
    reported.

    Args:
        train: iterable of `steps` batches ([n, D], labels [n]) of this rank: `cached_batches` or `augmented_batches`;
        warmup: steps; classes: their number; test_x [N, D], test_y [N]; batch: global batch size; lrs: base rates, at batch 256.
    Returns:
        {"probe": accuracy in percent, "lr": its base rate, "probe_by_lr"}, and the Probes.
    """
    torch.manual_seed(0)
    probes = Probes(len(lrs), test_x.shape[1], classes).to(test_x.device)
    peaks = torch.tensor(lrs, device=test_x.device) * batch / 256
    optimizer = torch.optim.SGD(probes.parameters(), lr=1.0, momentum=0.9)
    for step, (x, y) in enumerate(train):
        logits = probes(x)  # [P, n, C]
        losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(lrs)), reduction="none").view(len(lrs), -1).mean(1)
        (losses * peaks).sum().backward()
        average_gradients(probes.parameters())
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, warmup)
        optimizer.step()
        optimizer.zero_grad()
    probes.eval()
    with torch.no_grad():
        right = sum((probes(x).argmax(-1) == y).sum(1) for x, y in zip(test_x.split(4096), test_y.split(4096)))
    accuracy = (100 * right / len(test_x)).tolist()
    best = max(range(len(lrs)), key=accuracy.__getitem__)
    return {"probe": accuracy[best], "lr": lrs[best], "probe_by_lr": dict(zip(lrs, accuracy))}, probes


def cached_probe(x, y, test_x, test_y, epochs=50):
    """`probe` on features [N, D] that are computed once: 50 epochs, a tenth of them warm-up, batch 1024 or all."""
    batch = min(1024, len(x))
    steps = epochs * (len(x) // batch)
    classes = int(torch.cat([y, test_y]).max()) + 1
    return probe(cached_batches(x, y, batch, epochs), steps, steps // 10, classes, test_x, test_y, batch)[0]


# ---------------------------------------------------------------------------------------------------- fine-tuning


def finetune(encoder, train, val, blocks, epochs, lr, device, precision=torch.float32, workers=0, batch=1024, seed=0):
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
    classifier = nn.Linear(encoder.dim, len(train.classes)).to(device)
    nn.init.normal_(classifier.weight, std=2e-5)
    nn.init.zeros_(classifier.bias)
    groups = parameter_groups(nn.ModuleList([encoder, classifier]), lr * batch / 256, 0.05)
    optimizer = adamw(groups, betas=(0.9, 0.999))
    parameters = [p for group in groups for p in group["params"]]
    steps, views = round(epochs * (len(train) // batch)), [View(encoder.grid[0] * encoder.patch_size, (0.08, 1.0))]

    def encode(x, y):
        return (), F.cross_entropy(promote(classifier(encoder.pooled(encoder(x)))), y, reduction="none")

    for step, data in enumerate(batches(train, views, batch, 0, steps, seed, device, workers, {})):
        backward(encode, None, (augment(data.views[0]), data.labels), precision=precision)
        average_gradients(parameters)
        set_lr(optimizer, warmup_cosine(step, steps, steps / 10))
        optimizer.step()
        optimizer.zero_grad()
    x, y = features(encoder, val, device, precision, workers)
    with torch.no_grad():
        right = (classifier(x).argmax(1) == y).float().mean()
    return {"finetune": 100 * right.item(), "blocks": blocks}


# ------------------------------------------------------------------------------------------------------ clustering


def squared_distances(x, centres):
    """[N, D] and [R, K, D] → [R, N, K]."""
    return (x.square().sum(-1)[:, None] - 2 * x @ centres.transpose(1, 2) + centres.square().sum(-1)[:, None]).clamp(min=0)


@torch.no_grad()
def kmeans(x, k, runs=100, iterations=300, tolerance=1e-4, seed=0):
    """k-means (Lloyd) from k-means++ starts, many runs at once on the device.

    Iterations end when no run's centres move, in squared length, by more than tolerance · mean feature variance (scikit-
    learn's rule for each run). A cluster that loses all its points keeps its centre.

    Args:
        x [N, D]; k clusters.
    Returns:
        assignments [runs, N] and losses [runs] (sum of squared distances).
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    group = max(1, 2**26 // (len(x) * k))
    assignments, losses = [], []
    for first in range(0, runs, group):
        r = min(group, runs - first)
        centres = x[torch.randint(len(x), (r, 1), generator=generator, device=x.device)]  # [r, 1, D]
        nearest = squared_distances(x, centres)[..., 0]  # [r, N]
        for _ in range(k - 1):
            chosen = torch.multinomial(nearest.clamp(min=1e-30), 1, generator=generator)
            centres = torch.cat([centres, x[chosen]], 1)
            nearest = torch.minimum(nearest, squared_distances(x, x[chosen])[..., 0])
        for _ in range(iterations):
            assigned = squared_distances(x, centres).argmin(-1)  # [r, N]
            onehot = F.one_hot(assigned, k).to(x.dtype)  # [r, N, k]
            count = onehot.sum(1)[..., None]
            new = torch.where(count > 0, onehot.transpose(1, 2) @ x / count.clamp(min=1), centres)
            moved = (new - centres).square().sum((1, 2)).max()
            centres = new
            if moved <= tolerance * x.var(0).mean():
                break
        distance, assigned = squared_distances(x, centres).min(-1)
        assignments.append(assigned)
        losses.append(distance.sum(1))
    return torch.cat(assignments), torch.cat(losses)


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


def cluster(x, y, runs=100, normalization="standardize", seed=0):
    """k-means with as many clusters as classes; the run of the lowest loss is scored (MAE-CT B.3).

    Silhouette and Davies-Bouldin are those of the ground-truth classes, on the same features. The papers use scikit-
    learn's mini-batch k-means; this is the full one.

    Args:
        x [N, D], y [N]; normalization: "standardize" (MAE-CT) or "l2" (MIM-Refiner).
    Returns:
        dict of cluster_acc, nmi, ami, ari, silhouette (percent), davies_bouldin, loss, and the averages over runs
        (MAE-CT Table 20) under "average".
    """
    if normalization == "standardize":
        std, mean = torch.std_mean(x, 0, unbiased=False)
        x = (x - mean) / std.clamp(min=1e-12)
    else:
        x = F.normalize(x, dim=1)
    assigned, losses = kmeans(x, len(y.unique()), runs, seed=seed)
    every = [cluster_scores(y, a) for a in assigned]
    best = losses.argmin().item()
    average = {name: sum(s[name] for s in every) / len(every) for name in every[0]}
    of_classes = {"silhouette": silhouette(x, y), "davies_bouldin": davies_bouldin(x, y)}
    return every[best] | of_classes | {"loss": losses[best].item(), "average": average}


# ---------------------------------------------------------------------------------------------------------- main


def evaluate(encoder, train, val, run, normalization="standardize"):
    """The table that ends a training run: k-NN, linear probe (on cached, unaugmented features), clusters of the pooled
    feature. `run` gives device, precision and workers; `normalization` is that of `cluster`."""
    x, y = features(encoder, train, run.device, run.precision, run.workers)
    test_x, test_y = features(encoder, val, run.device, run.precision, run.workers)
    clusters = cluster(test_x, test_y, normalization=normalization)
    values = dict(knn=knn(x, y, test_x, test_y)["knn"], probe=cached_probe(x, y, test_x, test_y)["probe"])
    return values | {name: clusters[name] for name in ("cluster_acc", "nmi", "silhouette")}


def table(result):
    """Prints a protocol's numbers, one a line; nested dicts in one line."""
    for name, value in result.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k}: {v:.2f}" for k, v in value.items())
        print0(f"{name:>16}  {value:.2f}" if isinstance(value, float) else f"{name:>16}  {value}")


def run_knn(args, encoder, train, val, device, precision):
    """Subcommand knn; with --raw on the last block's output before the final norm."""
    raw = [encoder.depth] if args.raw else None
    sets = [features(encoder, images, device, precision, args.workers, raw) for images in (train, val)]
    (x, y), (test_x, test_y) = ((x.flatten(1), y) for x, y in sets)
    temperature = 0 if args.votes == "similarity" else 0.07
    return knn(x, y, test_x, test_y, ks=args.k, temperature=temperature, standardize=args.standardize)


def run_probe(args, encoder, train, val, device, precision):
    """Subcommand probe; writes probe.pt beside the encoder."""
    test = features(encoder, val, device, precision, args.workers)
    batch = min(args.batch, len(train))
    per_epoch = len(train) // batch
    if args.cached:
        stream = cached_batches(*features(encoder, train, device, precision, args.workers), batch, args.epochs)
    else:
        stream = augmented_batches(encoder, train, batch, args.epochs, device, precision, args.workers)
    warmup = args.epochs // 10 * per_epoch
    result, probes = probe(stream, args.epochs * per_epoch, warmup, len(train.classes), *test, batch)
    if rank() == 0:
        best = PROBE_LRS.index(result["lr"])
        head = dict(mean=probes.norm.running_mean, var=probes.norm.running_var, eps=probes.norm.eps)
        head |= dict(weight=probes.weight[best].detach(), bias=probes.bias[best].detach(), classes=train.classes)
        save_file(args.encoder.parent / "probe.pt", head)
    return result | {"cached": args.cached}


def run_cluster(args, encoder, train, val, device, precision):
    """Subcommand cluster, on the validation set."""
    return cluster(*features(encoder, val, device, precision, args.workers), args.runs, args.normalization)


def run_finetune(args, encoder, train, val, device, precision):
    """Subcommand finetune."""
    batch = min(args.batch, len(train))
    check_batch(RunSettings(data=args.data), train, batch)
    return finetune(encoder, train, val, args.blocks, args.epochs, args.lr, device, precision, args.workers, batch)


def main(argv):
    """Parses the subcommand, loads encoder and data, prints the result and writes PROTOCOL.json beside the encoder."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="protocol", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--encoder", type=Path, required=True, help="encoder file, ours or a public one")
    common.add_argument("--data", default="shapes", help="built-in set, folder with train/ and val/, or torchvision name")
    common.add_argument("--image_size", type=int, help="default: the encoder's")
    common.add_argument("--pool", choices=["cls", "mean"], help="default: the encoder's")
    common.add_argument("--precision", default="auto")
    common.add_argument("--workers", type=int, default=4)
    p = commands.add_parser("knn", parents=[common], help=knn.__doc__.splitlines()[0])
    p.add_argument("--k", type=int, nargs="+", default=[10])
    p.add_argument("--votes", choices=["exp", "similarity"], default="exp")
    p.add_argument("--standardize", action="store_true", help="as MIM-Refiner, with --raw")
    p.add_argument("--raw", action="store_true", help="the last block's output before the final norm")
    p.set_defaults(run=run_knn)
    p = commands.add_parser("probe", parents=[common], help=probe.__doc__.splitlines()[0])
    p.add_argument("--epochs", type=int, default=50)
    p.add_argument("--batch", type=int, default=1024)
    p.add_argument("--cached", action="store_true", help="one unaugmented pass instead of crops and flips")
    p.set_defaults(run=run_probe)
    p = commands.add_parser("cluster", parents=[common], help=cluster.__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=100)
    p.add_argument("--normalization", choices=["standardize", "l2"], default="standardize")
    p.set_defaults(run=run_cluster)
    p = commands.add_parser("finetune", parents=[common], help=finetune.__doc__.splitlines()[0])
    p.add_argument("--blocks", type=int, default=1, help="last blocks to tune; 0: the classifier alone")
    p.add_argument("--epochs", type=float, default=100, help="CMAE 4.2")
    p.add_argument("--lr", type=float, default=5e-4, help="at batch 256; CMAE 4.2: 2.5e-4 after 1600 epochs")
    p.add_argument("--batch", type=int, default=1024)
    p.set_defaults(run=run_finetune)
    args = parser.parse_args(argv)

    device = start()
    encoder = load_encoder(args.encoder, args.image_size)
    encoder.pool = args.pool or encoder.pool
    encoder.to(device).requires_grad_(False)
    train, val = load_splits(args.data, labels=True)
    if val is None:
        raise InputError(f"--data {args.data}: there is no val/ or test/ to evaluate on")
    result = args.run(args, encoder, train, val, device, precision_of(args.precision, device))
    table(result)
    if rank() == 0:
        setting = {k: str(v) for k, v in vars(args).items() if k != "run"}
        write_atomic(args.encoder.parent / f"{args.protocol}.json", json.dumps(setting | result, indent=1).encode())


if __name__ == "__main__":
    launch(main)
