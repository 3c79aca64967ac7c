"""Evaluation of an encoder: every protocol of the five papers, one function and one subcommand each.

    python eval.py knn --encoder runs/001/encoder.pt --data /path/to/imagenet
    python eval.py probe --encoder runs/001/encoder.pt --data /path/to/imagenet --recipe dinov2     (writes probe.pt)
    python eval.py robust --encoder runs/001/encoder.pt --sets /path/to/imagenet-r                  (reads probe.pt)
    torchrun --nproc_per_node 8 eval.py finetune --encoder mae_pretrain_vit_large.pth --data /path/to/imagenet

Encoders are files written here or public ones (common.read_encoder). Every protocol prints a table and writes it, with its
settings, as PROTOCOL.json beside encoder.pt, or as mae_PROTOCOL.json beside mae.pt. Those that train for long (probe,
finetune, segment, detect, video) keep checkpoints in the folder PROTOCOL.run until then: what was stopped goes on with
--resume. What a protocol's text leaves open stands in its function's docstring.

Tables and figures. All but curve take --encoder FILE --data DATA too; LIST is a published list of images or of classes.

    knn                                                 MAE-CT Tables 2, 4, 7, 8, 13, 16, 18
    knn --raw --standardize                             MIM-Refiner Tables 1, 2, 6, 7, 13
    knn --per_block --standardize                       MIM-Refiner Figure 3b
    knn --last 4 --standardize                          MIM-Refiner Table 13
    probe                                               MAE-CT Tables 1, 2, 4, 7, 8, 13, 14, 16, 18
    probe --last 2                                      MAE-CT Table 15; its last column: --both
    probe --recipe dinov2 --best_epoch                  MIM-Refiner Tables 2, 7, Figures 1, 2
    probe --recipe dinov2_reduced --best_epoch          MIM-Refiner Table 4, iNat18
    probe --recipe dinov2_reduced --best_epoch --shots 1 --splits 3     MIM-Refiner Table 4, iNat18, 1-shot
    probe --block 20                                    MIM-Refiner Figure 3c, which says neither task nor blocks
    probe --recipe lars --pool mean                     CAN Tables 1, 2, 3, 5, Figures 1, 6, 7
    probe --recipe lars --epochs 90                     CMAE Figure 5a, 0 blocks: as He et al., who warm up for 10, here 9
    probe --recipe vicmae                               ViC-MAE Tables 2, 4, 5, 6; the paper's feature: --pool cls
    lowshot --lists LIST LIST LIST                      MAE-CT Tables 2, 16: 1, 2, 5 shots
    lowshot --lists LIST LIST LIST --raw                MIM-Refiner Tables 1, 2, 7, Figure 2; Table 11: --image_size 518
    lowshot --block 20 --shots 1                        MIM-Refiner Figure 3c
    lowshot --recipe can --shots 1 5 --image_size 384   CAN Figures 4, 10-14, 16; also 10 and 25 shots
    finetune --recipe crop_flip --lists LIST LIST LIST  MAE-CT Tables 2, 16: 1, 2, 5 shots of MAE
    finetune --recipe crop_flip --lists LIST            MAE-CT Tables 2, 16: 1 and 10 % of MAE-CT; 1 % of MAE (H: --lr 1e-2)
                                                        and of MAE-CT_aug's ViT-H
    finetune --recipe lowshot --randaugment 0 --lists LIST      MAE-CT Tables 2, 16: 1 % of MAE-CT_aug's B, L
    finetune --recipe lowshot --lists LIST              MAE-CT Tables 2, 16: 10 % of MAE-CT_aug's B, L
    finetune --recipe mae --lists LIST                  MAE-CT Tables 2, 16: 10 % of MAE, of MAE-CT_aug's ViT-H
    finetune --recipe mae                               MAE-CT Table 14, Figure 7; MIM-Refiner Table 5 (--drop_path 0.1, H 0.2)
    finetune --recipe mim_refiner_1 --lists LIST        MIM-Refiner Tables 2, 7: 1 % of refined models (2B: --blocks 18)
    finetune --recipe mim_refiner_10 --lists LIST       MIM-Refiner Tables 2, 7: 10 %
    finetune --recipe mim_refiner_1 --lr 1e-4 --weight_decay 0.05 --batch 250 --lists LIST LIST LIST
                                                        MIM-Refiner Table 2: shots of MIM models; H, 2B: --batch 125
    finetune --recipe mim_refiner_1 --lr 1e-3 --weight_decay 0.05 --lists LIST
                                                        MIM-Refiner Table 2: 1 % of MIM models; H, 2B: --batch 128
    finetune --recipe mae --drop_path 0.1 --batch 512 --positions --lists LIST
                                                        MIM-Refiner Table 2: 10 % of MIM models, ViT-L
    finetune --recipe inat18 --shots 5 --splits 3       MIM-Refiner Table 4, iNat18: 5 shots; also 10
    finetune --recipe can                               CAN Table 3, Figure 1; for Figures 5, 8, 9, 15
    finetune --recipe can --scratch vit_b16 --layer_decay 1     CAN Table 3: from scratch, as chosen; Figure 9: --mixup 0.8
    finetune --recipe cmae                              CMAE Tables 1, 2, Figures 2, 4b, 5b
    finetune --recipe cmae --lr 5e-4                    CMAE Table 4, Figures 2, 4a: after 300 epochs
    finetune --recipe partial --blocks 1                CMAE Figure 5a
    finetune --recipe vicmae                            ViC-MAE Table 1; the paper's feature: --pool cls
    finetune --recipe vicmae --scratch vit_b16 --layer_decay 1  ViC-MAE Table 1: Scratch, by a recipe that is chosen
    finetune --recipe vicmae_subset --fraction 0.05     ViC-MAE Table 10
    curve --curves mae/finetune.json cmae/finetune.json                          CMAE Figure 4b
    curve --curves MAE=1/finetune.json,10/finetune.json --y finetune --x images  MAE-CT Figure 7
    curve --curves MAE=b/probe.json,l/probe.json --y probe --at 448 792          MAE-CT Figure 6: GPU-hours, 8 x Table 5
    transfer --sets caltech101 cifar100 dtd flowers102 oxfordiiitpet sun397 svhn --against FILE  MIM-Refiner Tables 4, 8
    transfer --sets food101 cifar10 cifar100 sun397 fgvcaircraft voc2007 dtd oxfordiiitpet caltech101 flowers102
                                                        ViC-MAE Table 3; Birdsnap and Cars are folders
    robust --sets FOLDER                                MAE-CT Table 17
    robust --classifier finetuned.pt --sets FOLDER      CAN Figures 5, 8, 9, 15; IN-ReaL: --real FILE
    video                                               ViC-MAE Table 1, Kinetics-400
    cluster                                             MAE-CT Tables 3, 19, 20; of MAE's B/16: --pool cls
    cluster --classes LIST                              MAE-CT Tables 21, 22, Figures 4, 8, 9
    cluster --normalization l2                          MIM-Refiner Tables 3, 9; Figure 5: --classes LIST
    retrieve                                            MAE-CT Figure 11
    retrieve --classes LIST                             MAE-CT Figures 5, 10 (--samples 15)
    embed --classes LIST                                MAE-CT Figures 1, 4, 8; MIM-Refiner Figure 5
    segment                                             MIM-Refiner Table 4, ADE20K
    segment --head upernet                              CMAE Table 3a; CMAE*: --layer_decay 0.75 --drop_path 0.2
    detect                                              CMAE Table 3b
    blocks                                              MIM-Refiner Figures 3d, 6
    invariance                                          MAE-CT Table 6
    colorhist                                           MAE-CT Figure 3
    stats                                               MIM-Refiner Table 14

Not here: CAN Figure 9's PyramidAT, another method; costs: --cost of a paper's file.
"""

import argparse
import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFont
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import betaincinv, gammaln
from scipy.stats import entropy, rankdata
from scipy.stats.contingency import crosstab
from torch import nn
from torch.linalg import matrix_norm
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import (
    Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign, box_area, box_convert, clip_boxes_to_image, masks_to_boxes,
    remove_small_boxes,
)  # fmt: skip
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomErasing
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common import (
    BatchNorm, BatchSize, Count, Dice, Fraction, FromMinusOne, Images, InputError, MAEDecoder, MARKS, MEAN, MOTIONS, Machine,
    Number, Parser, Positive, Ratio, Run, RunSettings, SHAPE_NAMES, SUFFIXES, Share, TEXT, Training, ViT, View, Whole, adamw,
    add_flag, augment, autocast, backward, batches, blank, build_vit, check_batch, check_settings, check_value, comments,
    crop_box, decode, draw_curves, draw_per_class, draw_rows, file_names, find_files, fingerprint, gather, launch, load_encoder,
    load_file, load_images, load_splits, load_state, load_videos, made_by, mae_loss, measured, need, need_alike, noisy_bytes,
    open_run, paint, parameter_groups, patchwork, pixel_centres, print0, print_table, progress, promote, random_masking, rank,
    read_json, read_lines, resize_positions, save_encoder, save_file, save_picture, set_lr, shuffled, standardise,
    start_machine, to_bytes, to_json, to_uint8, torchvision_dataset, understanding, uniform, unit, unstandardise, warmup_cosine,
    world, write_atomic,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- job


@dataclass
class Job:
    """What every protocol gets: an encoder and its file, the data by name, where it runs."""

    encoder: ViT
    path: Path  # the encoder's file, beside which results go
    data: str
    machine: Machine
    protocol: str = ""
    resume: bool = False
    image_size: int | None = None  # where it was given
    pool: str | None = None  # likewise
    out: Path | None = None  # folder of the results; None: the encoder's
    sets: list[str] = field(default_factory=list)  # data of robust and transfer, where several were given
    number: int = 1  # of the results: 1 2 … where others are of other data

    def file(self, name, number=None):
        """Where a result goes: `name` beside encoder.pt, mae_`name` beside mae.pt, and so on; with the number of results from
        the second on."""
        number = number or self.number
        if number > 1:
            name = f"{Path(name).stem}_{number}{Path(name).suffix}"
        if self.path.stem != "encoder":
            name = f"{self.path.stem}_{name}"
        return (self.out or self.path.parent) / name

    def find_place(self):
        """The job with the number of its results: the first that no result of other data has. An error before any work if
        nothing can be written there."""
        folder = self.out or self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            raise InputError(f"no result can be written to {folder} ({e.strerror}): choose another folder with --out") from e
        for self.number in itertools.count(1):
            path = self.file(f"{self.protocol}.json")
            settings = dict(data=self.data, sets=self.sets)
            if path.exists():
                settings = read_json(path, "delete it, or choose another folder with --out").get("settings")
            if isinstance(settings, dict) and settings.get("data") == self.data and settings.get("sets", []) == self.sets:
                return self

    def save(self, classifier, name):
        """Writes a classifier, in a temporary folder if it cannot be written where it should be."""
        if rank() > 0:
            return
        try:
            classifier.save(self.file(name))
        except InputError as e:
            path = Path(tempfile.mkdtemp()) / name
            classifier.save(path)
            print0(f"{e}\nThe classifier is in {path}")

    def load_labelled(self):
        """(training, validation images) of the data, both with labels."""
        train, val = load_splits(self.data, labels=True)
        need(val is not None, f"--data {self.data}: there is no val/, validation/ or test/ to evaluate on")
        return train, val

    def load_classifier(self, path=None):
        """The Classifier of a file, by default of probe.pt where results go, which must be one of this encoder; where the job
        runs."""
        need(self.pool is None, f"--pool {self.pool}: a classifier has a feature of its own, leave it out")
        file = path or self.file("probe.pt", 1)
        need(path or file.is_file(), f"there is no {file}: run `eval.py probe` before, or give --classifier FILE")
        classifier = load_classifier(file, self.image_size).to(self.machine.device)
        print0(f"the classifier is {file}")
        if not path:
            of_file, own = (encoder.state_dict() for encoder in (classifier.encoder, self.encoder))
            del of_file["pos_embed"], own["pos_embed"]  # of the image size
            same = of_file.keys() == own.keys() and all(torch.equal(v, own[name]) for name, v in of_file.items())
            need(same, f"{file} is the probe of another encoder: give --classifier FILE")
        return classifier

    def open_run(self, config, clip_grad=0.0):
        """The Run of a long protocol, in a folder of its own; to resume it, all its settings `config` must be the same."""
        folder = self.file(f"{self.protocol}.run")
        path = folder / "protocol.json"
        weights = sum(torch.hash_tensor(value.cpu()).item() for value in self.encoder.state_dict().values())
        config = dict(data=self.data, encoder=self.encoder.config, weights=weights) | config
        need_alike(config)
        config = json.dumps(config, default=str)
        if rank() == 0 and self.resume:
            same = path.is_file() and path.read_bytes() == config.encode()
            need(same, f"--resume: {folder} holds no run of this data, encoder and settings: leave --resume out, or see {path}")
        elif rank() == 0:
            need(not any(folder.glob("*.pt")), f"{folder} holds a run that was stopped: add --resume, or delete the folder")
            shutil.rmtree(folder, ignore_errors=True)
        settings = RunSettings(data=self.data, out=str(folder), resume=self.resume, clip_grad=clip_grad)
        command = [*sys.argv, "--resume"] if not self.resume else sys.argv
        run = open_run(settings, self.machine, command)
        if rank() == 0:
            write_atomic(path, config.encode())
        return run

    def close_run(self, unless_stopped=False):
        """Removes that folder: the result is written; or, `unless_stopped`, if this job made it and it holds no checkpoint to
        go on from."""
        folder = self.file(f"{self.protocol}.run")
        if rank() > 0 or unless_stopped and (self.resume or any(folder.glob("*.pt"))):
            return
        for path in sorted(folder.glob("*.pt")):  # a stop meanwhile leaves a run that can go on, or begin again
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def indices_listed_in(path, images):
    """Indices of the images that a file names, one a line: SimCLRv2's 1 % and 10 % of ImageNet, MSN's 1, 2 or 5 images a
    class. A line is a file's name or the end of its path (n01440764/n01440764_10026.JPEG)."""
    need(images.files is not None, f"{path}: a list of files needs a folder of files as --data")
    by_name = {}
    for i in range(len(images)):
        by_name.setdefault(os.path.basename(images.name(i)), []).append(i)
    indices = []
    for line in dict.fromkeys(read_lines(path)):
        alike = by_name.get(os.path.basename(line), [])
        found = [i for i in alike if f"/{images.name(i)}".endswith(f"/{line}")]
        need(len(found) == 1, f"{path}: {line} names {len(found)} images of the training set, expected one")
        indices += found
    return torch.tensor(indices)


def of_classes(images, path):
    """The images of the classes that a file names, one a line (MAE-CT's ImageNet-Dogs15, MIM-Refiner's 53 food classes);
    all of them without a file."""
    if path is None:
        return images
    by_name = {str(c): c for c in images.classes}
    names = read_lines(path)
    for name in names:
        need(name in by_name, f"{path}: {name!r} is no class; the data has {', '.join(list(by_name)[:5])}, …")
    need(len(set(names)) > 1, f"{path}: fewer than two classes")
    images = images.subset(range(len(images)), [by_name[name] for name in names])
    return images.subset((images.labels >= 0).nonzero()[:, 0])


def label_splits(images, shots=None, fraction=None, splits=1, lists=(), seed=0):
    """Indices of training sets of few labels: the images of each of `lists`; or `splits` draws of `shots` images of every
    class or of a `fraction` of them; else the whole set alone."""
    need(bool(shots) + bool(fraction) + bool(lists) <= 1, "--fraction, --shots and --lists: choose one")
    if lists:
        return [indices_listed_in(path, images) for path in lists]
    if shots or fraction:
        draws = range(seed, seed + splits)
        return [draw_per_class(images.labels, (draw, "drawn"), shots, fraction) for draw in draws]
    return [torch.arange(len(images))]


def mean_of_splits(name, values):
    """A number of several training sets as one result: its mean, its deviation and the single values."""
    return {name: float(np.mean(values)), "std": float(np.std(values)), "by_split": values}


def learn_splits(job, run, train, splits, name, file, learn):
    """A classifier of each of several training sets, their indices in `train`, one stage of the run each: the result, or
    of several what all of them say, with the means of `name` and of top5; the last classifier is written as `file`.
    learn(images, run, stage) → (result, Classifier)."""
    for i, index in enumerate(splits, 1):
        stage = f"{name} {i}"
        if stage in run.results:  # of before the run was resumed
            continue
        result, classifier = learn(train.subset(index), run=run, stage=stage)
        job.save(classifier, file)
        run.report(stage, result)
    results = list(run.results.values())
    whole = all(isinstance(result.get(name), int | float) for result in results)
    need(whole, f"results.json of the run has no {name}: begin anew")
    first, *others = results
    if not others:
        return first
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    if "top5" in first:
        alike["top5"] = float(np.mean([result["top5"] for result in results]))
    return alike | mean_of_splits(name, [result[name] for result in results])


def default_batch(batch, images, pairs=False):
    """A batch that nobody chose: at most the set, and so that all processes have as much, or as many pairs."""
    share = world() * (2 if pairs else 1)
    return min(batch, len(images)) // share * share


# --------------------------------------------------------------------------------------------- one pass over the data


@dataclass
class CenterCrop:
    """The evaluation crop: shorter side to size · 256 / 224, then the central square; an image that already has the size
    stays as it is."""

    size: int

    def __call__(self, images, epoch, index):
        image = images.open(index)
        if image.size != (self.size, self.size):
            long = 16 * min(image.size)  # of a line of pixels not all is enlarged
            image = v2.center_crop(image, [min(image.height, long), min(image.width, long)])
            image = v2.resize(image, [round(self.size * 256 / 224)], InterpolationMode.BICUBIC)
            image = v2.center_crop(image, [self.size, self.size])
        return [to_uint8(image)]


def center_views(images, size, machine, index, batch=256):
    """Yields (evaluation crops uint8 [n, 3, size, size], their indices [n]) of images `index`, in order; an unreadable
    image is replaced by another, whose index it then has."""
    if images.pixels is not None and images.pixels.shape[2:] == (size, size):
        for part in index.split(batch):
            yield images.pixels[part].to(machine.device), part.to(machine.device)
        return
    order = [(0, part) for part in index.split(batch)]
    for views, used in decode(images, order, CenterCrop(size), machine):
        yield views[0], used


def outputs(function, images, size, machine, index=None):
    """A function of every image, unaugmented, in one pass: ([N, …], at least float32; labels [N]), both on the device.

    `function` maps standardised center crops [n, 3, size, size] to [n, …]; `index` [N] chooses images. Under torchrun each
    rank computes its part and all get the whole. An unreadable image counts as the next readable one.
    """
    index = torch.arange(len(images)) if index is None else index
    mine = part_of_rank(index)
    views = center_views(images, size, machine, mine)
    return one_pass(lambda x: function(augment(x)), views, images, machine, len(index), math.ceil(len(mine) / 256))


@torch.no_grad()
def one_pass(function, inputs, images, machine, count, parts):
    """A function of every image (or video) in one pass: ([count, …], at least float32; labels [count]), both on the device.

    `inputs` yields this rank's (input of the function, indices of its images) in order, `parts` times; all ranks get the
    whole.
    """
    found, used = [], []
    for x, index in progress(inputs, parts, "batches evaluated"):
        with autocast(machine.device, machine.precision):
            found.append(promote(function(x)))
        used.append(index)
    found, used = (gather(torch.cat(column))[:count] for column in (found, used))
    odd = found.isfinite().logical_not().view(count, -1).any(1)
    if odd.any():
        raise InputError(f"what the encoder says of {odd.sum()} of {count} images is not finite, first of "
                         f"{images.name(used[odd][0].item())}: try --precision float32, or look at the weights")  # fmt: skip
    return found, images.labels.to(machine.device)[used]


def pool_tokens(tokens, pool):
    """Tokens […, 1 + L, D] → […, D] of [CLS] ("cls") or of the patches' mean ("mean"), or […, 2D] of "both"."""
    cls, mean = tokens[..., 0, :], tokens[..., 1:, :].mean(-2)
    return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], -1)}[pool]


def pooled(encoder, x, blocks=None, pool=None, drop=None):
    """Features of standardised images x [n, 3, S, S].

    Args:
        blocks: None: after the final norm, [n, F]; or numbers from 1: after these blocks, before the final norm,
            [n, blocks, F].
        pool: "cls", "mean" (of the patch tokens), or "both" side by side (F = 2D); None: the encoder's own.
        drop: drop-path factors, see ViT.
    """
    tokens = encoder(x, drop=drop, blocks=blocks)
    if blocks:
        tokens = torch.stack(tokens, 1)  # [n, blocks, 1 + L, D]
    return pool_tokens(tokens, pool or encoder.pool)


def last_blocks(encoder, count):
    """Numbers of the last `count` blocks."""
    need(count <= encoder.depth,
         f"the last {count} blocks are wanted, but the encoder has {encoder.depth}: choose 1 or more of them")  # fmt: skip
    return list(range(encoder.depth - count + 1, encoder.depth + 1))


def features(encoder, images, machine, blocks=None, pool=None, index=None):
    """Features of a whole set, as of `pooled`: ([N, (blocks,) F], labels [N])."""
    function = partial(pooled, encoder, blocks=blocks, pool=pool)
    return outputs(function, images, encoder.config["image_size"], machine, index)


def features_of_splits(encoder, train, val, machine, blocks=None, index=None):
    """Features and labels of the training images (of `index` [N]), then of the validation images, blocks side by side."""
    x, y = features(encoder, train, machine, blocks, index=index)
    test_x, test_y = features(encoder, val, machine, blocks)
    return x.flatten(1), y, test_x.flatten(1), test_y


class Classifier(nn.Module):
    """An encoder and a linear classifier on its feature: standardised images [N, 3, S, S] → logits [N, C].

    What probe.pt and finetuned.pt hold. The feature is that of `pooled`, blocks side by side; `norm` is a probe's non-affine
    BatchNorm, a LayerNorm in fine-tuning post-norm encoders, or nothing.
    """

    def __init__(self, encoder, classes, blocks=None, pool=None, norm=None):
        super().__init__()
        self.encoder = encoder
        self.classes = list(classes)
        self.blocks = blocks
        self.pool = pool or encoder.pool
        self.norm = norm or nn.Identity()
        width = encoder.dim * len(blocks or [0]) * (2 if self.pool == "both" else 1)
        self.head = nn.Linear(width, len(self.classes))

    def feature(self, x, drop=None):
        """What the head reads, [N, F]; drop: see ViT."""
        return pooled(self.encoder, x, self.blocks, self.pool, drop).flatten(1)

    def forward(self, x):
        feature = promote(self.feature(x))
        with torch.autocast(x.device.type, enabled=False):  # logits as those that the probe was chosen by
            return self.head(self.norm(feature))

    def save(self, path):
        """All that encoder.pt has, and {"classifier": …}."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        save_encoder(path, self.encoder, classifier=dict(state=state, classes=self.classes, blocks=self.blocks, pool=self.pool))


def load_classifier(path, image_size=None):
    """The Classifier of probe.pt or finetuned.pt, on the CPU; positions are interpolated for another `image_size`."""
    content = load_file(path)
    whole = isinstance(content, dict) and {"model", "classifier"} <= content.keys()
    need(whole, f"{path} holds no classifier: `eval.py probe` writes probe.pt, `eval.py finetune` finetuned.pt")
    encoder = load_encoder(path, image_size)
    size = encoder.config["image_size"]
    with understanding(path):
        found = content["classifier"]
        state = found["state"]
        norm = None
        if "norm.running_mean" in state:
            norm = BatchNorm(len(state["norm.running_mean"]), affine=False)
        elif "norm.weight" in state:
            norm = nn.LayerNorm(len(state["norm.weight"]), eps=1e-6)
        classifier = Classifier(encoder, found["classes"], found["blocks"], found["pool"], norm)
        load_state(classifier, {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | state, str(path))
        classifier.eval().requires_grad_(False)
        classifier(torch.zeros(1, 3, size, size))  # an error here where blocks or pooling are none
    return classifier


# --------------------------------------------------------------------------------------------------------------- k-NN


@torch.no_grad()
def nearest(train_x, test_x, k, chunk=65536, prepare=None):
    """The k most similar rows of train_x [N, D] for each row of test_x [n, D]: (similarities, indices), both [n, k].

    The training set is visited in chunks, each prepared once (`prepare`: rows → rows, by default as they are), so that
    beside the features there are at most `chunk` prepared rows, 1024 · chunk similarities, and of each chunk the k best.
    """
    values, indices = [], []
    starts = range(0, len(train_x), chunk)
    for first in progress(starts, len(starts), "parts of the training features compared"):
        rows = train_x[first : first + chunk]
        rows = (prepare(rows) if prepare else rows).T
        best = [(part @ rows).topk(min(k, rows.shape[1]), 1) for part in test_x.split(1024)]
        values.append(torch.cat([of_part.values for of_part in best]))
        indices.append(torch.cat([of_part.indices for of_part in best]) + first)
    values, order = torch.cat(values, 1).topk(min(k, len(train_x)), 1)
    return values, torch.cat(indices, 1).gather(1, order)


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
    """
    need(max(ks) <= len(train_x), f"k = {max(ks)} is larger than the training set of {len(train_x)}")
    prepare = F.normalize
    if standardize:
        std, mean = torch.std_mean(train_x, 0)

        def prepare(x):
            return F.normalize((x - mean) / (std + 1e-6))

    own = slice(rank(), None, world())  # rows of the test set
    similarities, neighbours = nearest(train_x, prepare(test_x[own]), max(ks), prepare=prepare)
    classes = int(max(train_y.max(), test_y.max())) + 1
    right = torch.zeros(len(ks), dtype=torch.long, device=test_x.device)
    for similarity, index, label in zip(similarities.split(1024), neighbours.split(1024), test_y[own].split(1024)):
        weight = similarity
        if temperature:
            weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        for i, k in enumerate(ks):
            votes = similarity.new_zeros(len(label), classes).scatter_add_(1, train_y[index[:, :k]], weight[:, :k])
            right[i] += (votes.argmax(1) == label).sum()
    right = gather(right[None]).sum(0)
    by_k = {k: 100 * r / len(test_x) for k, r in zip(ks, right.tolist())}
    best = max(by_k, key=by_k.get)
    return {"knn": by_k[best], "k": best, "knn_by_k": by_k}


KNN_BANK = 100_000  # training images in the k-NN of every block


def knn_per_block(encoder, train, val, machine, blocks=None, bank=KNN_BANK, **how):
    """k-NN of the feature after each block (all of them, or `blocks`), before the final norm: MIM-Refiner's Figure 3b.

    k = 10 (C.4) on standardised features (the authors' code), or as `how` tells `knn`, against at most `bank` training
    images drawn at random, since N · blocks · D values are kept at once. Returns a list of accuracies in percent.
    """
    blocks = blocks or last_blocks(encoder, encoder.depth)
    index = uniform(("bank",), torch.arange(len(train)), 1)[:, 0].argsort()[:bank]
    x, y = features(encoder, train, machine, blocks, index=index)
    test_x, test_y = features(encoder, val, machine, blocks)
    how = dict(ks=[min(10, len(x))], standardize=True) | how
    return [knn(x[:, b], y, test_x[:, b], test_y, **how)["knn"] for b in range(len(blocks))]


def run_knn(
    job,
    *,
    k: list[Count] = (10,),  # neighbours; of several numbers the best counts
    votes: Literal["exp", "similarity"] = "exp",  # weights of the neighbours: DINO's, or those of the papers' texts
    standardize: bool = False,  # features by the training set's mean and deviation: MIM-Refiner, with --raw
    raw: bool = False,  # the feature is the last block's output before the final norm
    last: Count = 1,  # number of last blocks side by side, before the final norm (C.10: 4)
    per_block: bool = False,  # one k-NN of each block's output, before the final norm
):
    """Weighted k-NN on cosine similarity (MAE-CT A.3). Several blocks, or with --raw the last, are taken before the final
    norm, as in MIM-Refiner's code: C.10 is `--last 4 --standardize`, Figure 3b `--per_block --standardize`."""
    need(last == 1 or not per_block, f"--per_block takes each block by itself: leave out --last {last}")
    how = dict(ks=k, temperature=0.07 if votes == "exp" else 0, standardize=standardize)
    train, val = job.load_labelled()
    if per_block:
        return {"knn_per_block": knn_per_block(job.encoder, train, val, job.machine, **how)}
    blocks = last_blocks(job.encoder, last) if raw or last > 1 else None
    return knn(*features_of_splits(job.encoder, train, val, job.machine, blocks), **how)


# ----------------------------------------------------------------------------------------------------- linear probing

DINOV2_LRS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class ProbeRecipe:
    """How probes are trained; all with momentum 0.9, no weight decay, linear warm-up, cosine to 0, random crops."""

    lrs: tuple = tuple(i / 100 for i in range(10, 0, -1))  # at batch 256, all at once; MAE-CT Table 11: 0.1, 0.09, … 0.01
    epochs: int = 50
    batch: int = 1024
    warmup: float = 0.1  # share of the steps: 5 epochs
    flip: bool = True
    lars: bool = False
    grid: tuple = None  # of features: (last blocks, pooling), None for the encoder's own


PROBE_RECIPES = {
    # MAE-CT, Table 11
    "mae_ct": ProbeRecipe(),
    # MIM-Refiner C.3, DINOv2's grid: 52 probes. Batch and warm-up are those of the authors' code
    "dinov2": ProbeRecipe(DINOV2_LRS, grid=((1, None), (1, "both"), (4, None), (4, "both"))),
    # MIM-Refiner C.8, what is left of it for many classes (iNat18), in the authors' code
    "dinov2_reduced": ProbeRecipe(DINOV2_LRS[3:7], grid=((4, None), (4, "both"))),
    # CAN, Table 11, after MAE (which has 90 epochs); no flip is listed. Of the patches' mean (C): --pool mean
    "lars": ProbeRecipe((0.1,), epochs=100, batch=16384, flip=False, lars=True),
    # ViC-MAE, Table 9 (its Section 5: 100 epochs); no flip is listed
    "vicmae": ProbeRecipe((0.1,), epochs=90, batch=4096, warmup=10 / 90, flip=False),
}


class LARS(torch.optim.SGD):
    """SGD with momentum that moves a matrix in proportion to its own length (You et al. 2017, arXiv 1708.03888), in the
    form that MAE has for linear probes of large batches (CAN, Table 11), which knows no weight decay.

        g ← trust · ‖w‖ / ‖g‖ · g;  m ← momentum · m + g;  w ← w − lr · m

    w may be [P, C, D], P matrices, and a group's trust of shape [P, 1, 1]. Vectors, and matrices of trust 0, skip the first
    step; where ‖w‖ or ‖g‖ is 0 the ratio is 1.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    ratio = matrix_norm(p, keepdim=True) / matrix_norm(p.grad, keepdim=True) * group["trust"]
                    p.grad *= torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
        super().step()


class Probes(nn.Module):
    """P linear classifiers behind one non-affine BatchNorm: [N, D] → [P, N, C]; weights normal(0.01), biases 0."""

    def __init__(self, probes, dim, classes):
        super().__init__()
        self.norm = BatchNorm(dim, affine=False)
        self.weight = nn.Parameter(torch.empty(probes, classes, dim).normal_(std=0.01))
        self.bias = nn.Parameter(torch.zeros(probes, classes))

    def forward(self, x):
        logits = F.linear(self.norm(x), self.weight.flatten(0, 1), self.bias.flatten())  # one product, not P
        return logits.unflatten(1, self.bias.shape).transpose(0, 1)

    def logits(self, number, x):
        """Of probe `number`: [N, D] → [N, C]."""
        return F.linear(self.norm(x), self.weight[number], self.bias[number])


def cached_batches(x, y, training):
    """A Training's batches of cached features [N, D] and labels [N], shuffled every epoch; each rank gets its part."""
    for _, rows in shuffled(len(x), training.batch, training.step, training.total, 0):
        rows = rows.to(x.device)
        yield x[rows], y[rows]


@torch.no_grad()
def augmented_batches(function, images, view, training):
    """A Training's batches of a function of random crops (Table 11), say the encoder's features: yields ([n, …], labels
    [n])."""
    machine = training.run.machine
    for data in batches(images, [view], training.batch, training.step, training.total, 0, machine):
        with autocast(machine.device, machine.precision):  # in pieces: on CPUs faster by 40 % (fewer page faults), less memory
            x = torch.cat([promote(function(augment(x))) for x in data.views[0].split(256)])
        yield x, data.labels


def cross_entropy(logits, y):
    """Of probes side by side: logits [P, n, C], labels [n] → [P]."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none").view(len(logits), -1).mean(1)


def accuracy(logits, y):
    """In percent: logits [N, C], labels [N]."""
    return 100 * (logits.argmax(1) == y).sum().item() / len(y)


def top5(logits, y):
    """{"top5": percent of the samples whose label is among the five best}, where there are more than five classes and one
    label each (ViC-MAE Tables 1, 2, 4, 5, 6); else nothing."""
    if logits.shape[1] <= 5 or y.ndim > 1:
        return {}
    return {"top5": 100 * (logits.topk(5).indices == y[:, None]).sum().item() / len(y)}


@torch.no_grad()
def probe_scores(heads, sets, lrs, x, y, score):
    """{(feature set, base rate): score} of Probes, one module a set, on x [N, D] and y."""
    heads.eval()
    scores = {}
    for name, head, part in zip(sets, heads, x.split(list(sets.values()), 1)):
        for number, lr in enumerate(lrs):
            scores[name, lr] = score(head.logits(number, part), y)
    heads.train()
    return scores


@torch.no_grad()
def best_probe(heads, sets, lrs, x, y, score):
    """What `probe` returns of trained heads."""
    scores = probe_scores(heads, sets, lrs, x, y, score)
    name, lr = max(scores, key=scores.get)
    number, place = lrs.index(lr), list(sets).index(name)
    probes = heads[place].eval()
    logits = probes.logits(number, x.split(list(sets.values()), 1)[place])
    result = {"probe": scores[name, lr]} | top5(logits, y)
    result |= {"lr": lr, "probe_by_lr": {lr: scores[name, lr] for lr in lrs}}
    if len(sets) > 1:
        by_set = {name: max(scores[name, lr] for lr in lrs) for name in sets}
        result |= {"features": name, "probe_by_features": by_set}
    return result, probes, number


def probe(stream, test_x, test_y, count, classes, run, how=ProbeRecipe(), sets=None, loss=cross_entropy,
          score=accuracy, best_epoch=False, stage="probe"):  # fmt: skip
    """Linear probes of one or several feature sets, every learning rate of a sweep, trained side by side on the same
    batches (MAE-CT A.3, Table 11; MIM-Refiner C.3). As in the papers, the best on the test set is reported.

    SGD or LARS with momentum 0.9, no weight decay, lr = base · batch / 256, warm-up and cosine.

    Args:
        stream: a function from a Training to its batches, ([n, D], labels [n]) of this rank, from its step on; test_x [N, D],
        test_y [N]; count: training samples; classes: their number; how: the recipe; sets: {name: width} of the feature sets
        that stand side by side in D; loss, score: other than cross-entropy and accuracy, for other than one label an image;
        best_epoch: the epoch of the best score counts (MIM-Refiner's code), not the last.
    Returns:
        {"probe": score in percent, "top5", "lr": its base rate, "probe_by_lr": of its feature set}, for several feature
        sets also {"features": its name, "probe_by_features": the best of each}, with `best_epoch` {"probe_by_epoch"}; the
        best's Probes and its number in them.
    """
    torch.manual_seed(0)
    sets = sets or {"": test_x.shape[1]}
    widths = list(sets.values())
    heads = nn.ModuleList(Probes(len(how.lrs), width, classes) for width in widths).to(test_x.device)
    rates = test_x.new_tensor(how.lrs) * how.batch / 256
    # SGD's update is proportional to the rate, which is therefore a weight of the loss; in LARS's of matrices the length of
    # the gradients, and with it that weight, cancels
    weights = dict(params=[head.weight for head in heads], peak_lr=1.0, trust=0.001 * rates[:, None, None])
    biases = dict(params=[head.bias for head in heads], peak_lr=1.0, trust=0.0)
    optimizer = (LARS if how.lars else torch.optim.SGD)([weights, biases], momentum=0.9)

    best = copy.deepcopy(heads) if best_epoch else heads
    by_epoch = Series()
    state = dict(heads=heads, best=best, by_epoch=by_epoch, optimizer=optimizer)
    training = Training(run, stage, state, count, how.batch, how.epochs)
    warmup = round(how.warmup * training.total)
    for x, y in training.steps(stream(training)):
        logits = [head(part) for head, part in zip(heads, x.split(widths, 1))]
        losses = loss(torch.cat(logits), y)  # of all probes
        (losses * rates.repeat(len(heads))).sum().backward()
        set_lr(optimizer, warmup_cosine(training.step, training.total, warmup))
        _, means = training.take_step(optimizer, losses.detach().mean())
        training.log(means)
        if best_epoch and epoch_ends(training):
            scores = probe_scores(heads, sets, how.lrs, test_x, test_y, score)
            if max(scores.values()) > max(by_epoch, default=-1):
                best.load_state_dict(heads.state_dict())
            by_epoch.append(max(scores.values()))
        training.save_if_due()

    result, probes, number = best_probe(best, sets, how.lrs, test_x, test_y, score)
    if best_epoch:
        result["probe_by_epoch"] = list(by_epoch)
    return result, probes, number


def cached_probe(x, y, test_x, test_y):
    """`probe` by MAE-CT's recipe on features [N, D] that are computed once; batch 1024 or all."""
    how = ProbeRecipe(batch=min(1024, len(x)))
    classes = int(torch.cat([y, test_y]).max()) + 1
    run = Run(Machine(x.device))
    return probe(partial(cached_batches, x, y), test_x, test_y, len(x), classes, run, how)[0]


def feature_sets(encoder, x, sets):
    """Features of standardised images x [n, 3, S, S] for each (blocks, pooling) of `sets`, as of `pooled`, side by side:
    [n, F]. "both" pools each of several blocks (DINOv2: the last one's patches)."""
    needed = sorted({encoder.depth}.union(*(blocks or [] for blocks, _ in sets)))
    tokens = dict(zip(needed, encoder(x, blocks=needed)))
    found = []
    for blocks, pool in sets:
        of_blocks = encoder.norm(tokens[encoder.depth])  # [n, (blocks,) 1 + L, D]
        if blocks:
            of_blocks = torch.stack([tokens[b] for b in blocks], 1)
        found.append(pool_tokens(of_blocks, pool).flatten(1))
    return torch.cat(found, 1)


def chosen_blocks(encoder, last, block=None):
    """Blocks whose output is read, as of `pooled`: `block` alone, or the last ones. The last block alone is taken after the
    final norm, others before it (MIM-Refiner's code; DINOv2's passes each of several through the final norm)."""
    if block:
        need(block <= encoder.depth, f"--block {block}: the encoder has {encoder.depth} blocks")
        return [block]
    return last_blocks(encoder, last) if last > 1 else None


def linear_probe(encoder, train, val, run, recipe="mae_ct", epochs=None, batch=None, last=1, pool=None, block=None,
                 cached=False, **other):  # fmt: skip
    """`probe` with a recipe, on random crops, or `cached`: on features of unaugmented images, computed once.

    Args:
        encoder: a frozen ViT; train, val: labelled Images; recipe: of PROBE_RECIPES; epochs, batch: others than its own
        (which is at most the training set). last, pool, block: the feature, by default the encoder's own: last blocks side by
        side, "cls", "mean" or "both" (MAE-CT Table 15), a block by its number; recipes with a grid try its features instead.
        other: of `probe`.
    Returns:
        (result of `probe` and the recipe, the best probe as a Classifier).
    """
    how = PROBE_RECIPES[recipe]
    batch = batch or default_batch(how.batch, train)
    how = dataclasses.replace(how, epochs=epochs or how.epochs, batch=batch)
    check_batch(run.settings, train, how.batch, how.epochs)
    sets, widths = {}, {}
    for n, p in how.grid or [(last, pool)]:
        p = p or pool or encoder.pool
        name = f"{p} of the last {n} blocks" if n > 1 else f"{p} of {f'block {block}' if block else 'the last block'}"
        sets[name] = (chosen_blocks(encoder, n, block), p)
        widths[name] = encoder.dim * n * (2 if p == "both" else 1)
    size = encoder.config["image_size"]
    function = partial(feature_sets, encoder, sets=list(sets.values()))
    test_x, test_y = outputs(function, val, size, run.machine)

    if cached:
        stream = partial(cached_batches, *outputs(function, train, size, run.machine))
    else:
        stream = partial(augmented_batches, function, train, View(size, (0.08, 1.0), how.flip))
    count = len(train.classes)
    result, probes, number = probe(stream, test_x, test_y, len(train), count, run, how, widths, **other)
    result = {"features": next(iter(sets))} | result
    classifier = Classifier(encoder, train.classes, *sets[result["features"]], probes.norm)
    classifier.head.weight.data = probes.weight.data[number]
    classifier.head.bias.data = probes.bias.data[number]
    return result | dict(recipe=recipe, epochs=how.epochs, batch=batch, cached=cached), classifier


def run_probe(
    job,
    *,
    recipe: Literal[tuple(PROBE_RECIPES)] = "mae_ct",  # whose settings; dinov2: 52 probes at once; lars: as CAN and MAE
    epochs: Count | None = None,  # over the training images; default: the recipe's
    batch: BatchSize | None = None,  # global: of all processes together; default: the recipe's
    last: Count = 1,  # number of last blocks side by side, several before the final norm
    block: Count | None = None,  # instead: this one, counted from 1, before the final norm (MIM-Refiner Figure 3c)
    both: bool = False,  # feature: [CLS] and the patches' mean side by side (MAE-CT Table 15)
    cached: bool = False,  # one unaugmented pass instead of crops and flips
    best_epoch: bool = False,  # the epoch of the best accuracy counts, as in MIM-Refiner's code; default: the last
    shots: Count | None = None,  # training images of every class (MIM-Refiner C.6: 1); default: all
    splits: Count = 1,  # draws of these, each probed by itself; means are reported (C.6: 3)
    lists: list[Path] = (),  # instead: files with names of training images, one a line; a split each
):
    """Linear probing with a recipe, on random crops or on cached features; writes the best probe (of the last split) as
    probe.pt."""
    plain = last == 1 and not both and not block
    need(plain or not PROBE_RECIPES[recipe].grid,
         f"--recipe {recipe} tries features of its own: leave out --last, --both and --block")  # fmt: skip
    need(last == 1 or not block, f"--block {block} is read alone: leave out --last {last}")
    train, val = job.load_labelled()
    pool = "both" if both else None
    how = dict(recipe=recipe, epochs=epochs, batch=batch, last=last, pool=pool, block=block, cached=cached,
               best_epoch=best_epoch)  # fmt: skip
    run = Run(job.machine) if cached else job.open_run(how | dict(shots=shots, splits=splits, lists=lists))
    sets = label_splits(train, shots, None, splits, lists)
    return learn_splits(job, run, train, sets, "probe", "probe.pt", partial(linear_probe, job.encoder, val=val, **how))


# --------------------------------------------------------------------------------------------------------- few labels


def logistic_regression(x, y, classes, penalty, tolerance=1e-4):
    """Multinomial logistic regression without intercept: the W [D, C] that minimises
    mean cross-entropy(x W, y) + penalty / 2 · |W|², by L-BFGS.

    Ends where the value is certain to be within the share `tolerance` of the least one: no second derivative is below the
    penalty, so the distance is at most |gradient|² / (2 · penalty). x [N, D], y [N]; scikit-learn's C = 1 / (penalty · N).
    The search is for V of W = axes · scale · V, in which the loss is about as curved in all directions: fewer steps.
    """
    curvature, axes = torch.linalg.eigh(x.T @ x / (len(x) * classes))  # at W = 0
    scale = (curvature.clamp(min=0) + 200 * penalty) ** -0.5  # 200: chosen; the curvature falls on the way to the minimum
    onehot = F.one_hot(y, classes).to(x)
    descent = (x @ (axes * scale)).T @ (onehot - 1 / classes)
    scale = scale * (2 * math.log(classes) * len(x) / descent.norm().clamp(min=1e-30))  # the first step's length is 1
    x = x @ (axes * scale)
    shrink = penalty * scale.double().square()[:, None]
    certain = False

    def loss(flat):
        nonlocal certain
        v = torch.from_numpy(flat).to(x.device).view(-1, classes)
        logits = x @ v.to(x)  # [N, C]
        logits = logits - logits.gather(1, y[:, None])  # so that a loss near 0 does not cancel
        log_sum = logits.logsumexp(1, keepdim=True)
        error = (logits - log_sum).exp() - onehot
        gradient = (x.T @ error / len(x)).double() + shrink * v
        value = (log_sum.double().mean() + (shrink * v * v).sum() / 2).item()
        of_w = gradient / scale[:, None]
        certain = of_w.square().sum().item() <= 2 * penalty * tolerance * value
        return value, gradient.cpu().numpy().ravel()

    def stop_if_certain(flat):
        if certain:
            raise StopIteration

    start = np.zeros(x.shape[1] * classes)
    never = dict(ftol=0, gtol=0)  # other reasons to stop
    v = minimize(loss, start, method="L-BFGS-B", jac=True, callback=stop_if_certain, options=never).x
    return axes @ (scale[:, None] * torch.from_numpy(v).to(x).view(-1, classes))


def linear_fewshot(x, y, classes, steps=2500, lr=0.01, batch=512):
    """CAN's few-shot classifier (its appendix C): W [D, C] of a linear layer, learning rate 0.01, 2500 steps.

    What it refers to (Dosovitskiy et al. 2021, Table 4) has SGD with momentum 0.9, batch 512, cosine, gradients clipped to
    1. Chosen: features of unaugmented center crops, no warm-up, a start at 0, no bias.
    """
    w = x.new_zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.SGD([dict(params=[w], peak_lr=lr)], momentum=0.9)
    run = Run(Machine(x.device), RunSettings(clip_grad=1.0))
    training = Training(run, "few labels", dict(optimizer=optimizer), batch, batch, steps)  # an epoch is a step
    for step in training.steps(range(steps)):
        dice = uniform((0, step, "fewshot"), torch.arange(min(batch, len(x))), 1)[:, 0]
        rows = (dice * len(x)).long().to(x.device)
        loss = F.cross_entropy(x[rows] @ w, y[rows])
        loss.backward()
        set_lr(optimizer, warmup_cosine(step, steps, 0))
        _, means = training.take_step(optimizer, loss.detach())
        training.log(means)
    return w.detach()


def lowshot(x, y, test_x, test_y, splits, recipe="logistic"):
    """A linear classifier from a few labels a class, mean accuracy in percent over several splits.

    "logistic": L2-regularised logistic regression, without intercept (MAE-CT A.3, MIM-Refiner C.5, both after MSN): its
    penalty is 0.00025 / N, training features are centred and L2-normalised, test features are taken as they are (the
    authors' code). "can": `linear_fewshot`.

    Args:
        x [N, D], y [N]: of all training images; test_x [n, D], test_y [n]; splits: index tensors into x.
    Returns:
        {"lowshot": mean accuracy, "std" over splits, "by_split"}.
    """
    by_split = []
    classes = int(max(y.max(), test_y.max())) + 1
    for split in progress(splits, len(splits), "classifiers of few labels"):
        few, labels = x[split], y[split]
        if recipe == "logistic":
            few = F.normalize(few - few.mean(1, keepdim=True))
            w = logistic_regression(few, labels, classes, 0.00025 / len(few))
        else:
            w = linear_fewshot(few, labels, classes)
        by_split.append(accuracy(test_x @ w, test_y))
    return mean_of_splits("lowshot", by_split)


def run_lowshot(
    job,
    *,
    shots: list[Count] = (1, 2, 5),  # labels a class; CAN: 1 5 10 25
    splits: Count = 3,  # draws of each number of shots
    lists: list[Path] = (),  # instead: files that name the labelled images, one split each
    recipe: Literal["logistic", "can"] = "logistic",  # the classifier; can: with --image_size 384
    raw: bool = False,  # the feature is the last block's output before the final norm, as MIM-Refiner
    block: Count | None = None,  # this block's, counted from 1 (MIM-Refiner Figure 3c)
):
    """A linear classifier from a few labels a class (MAE-CT A.3; MIM-Refiner C.5; CAN C): one result for each number of
    shots, or one for all the lists."""
    train, val = job.load_labelled()
    if lists:
        draws = {"lists": label_splits(train, lists=lists)}
    else:
        draws = {str(n): label_splits(train, n, splits=splits) for n in shots}
    needed = torch.cat(sum(draws.values(), [])).unique()
    blocks = chosen_blocks(job.encoder, 1, block or (job.encoder.depth if raw else None))
    found = features_of_splits(job.encoder, train, val, job.machine, blocks, needed)
    result = {}
    for name, indices in draws.items():
        rows = [torch.searchsorted(needed, i) for i in indices]
        result[name] = lowshot(*found, rows, recipe=recipe)
    return result


# -------------------------------------------------------------------------------------------------------- fine-tuning


@dataclass(kw_only=True)
class FineTuning:
    """Settings of fine-tuning. The defaults are MAE's for a ViT-B (He et al. 2022, Table 9), which MAE-CT A.3,
    MIM-Refiner C.9 and CMAE 4.2 refer to; `recipe` changes what other tables and sizes change."""

    blocks: FromMinusOne = -1  # last blocks that are tuned; all of them, or -1: stem and [CLS] too; 0: the classifier alone
    epochs: Positive = 100  # over the training images
    warmup: Fraction = 0.05  # share of the steps: 5 epochs
    batch: Count = 1024  # global: of all processes together
    lr: Positive = 1e-3  # highest learning rate, at batch 256
    min_lr: Number = 0.0  # learning rate at which the cosine ends
    clip_grad: Number = 0.0  # largest gradient norm; 0: no clipping
    weight_decay: Number = 0.05  # AdamW's, of all but biases and norms
    layer_decay: Share = 0.75  # factor of the rate from a block to the one below
    positions: bool = False  # the position table learns too, as in the codes of MAE and MIM-Refiner; no paper says it
    drop_path: Ratio = 0.1  # share of samples that skip the last block's branches, less below
    label_smoothing: Fraction = 0.1  # share of a target that all classes have alike
    randaugment: Whole = 2  # operations of RandAugment, one after the other; 0: none
    magnitude: Number = 9.0  # RandAugment's strength, of 10
    mixup: Number = 0.8  # alpha of Mixup's beta distribution; 0: none
    cutmix: Number = 1.0  # alpha of CutMix's; 0: none
    erasing: Fraction = 0.25  # probability of a random box of noise: the authors' code
    micro_batch: Whole = 0  # samples of one process at a time; 0: all
    seed: Whole = 0  # of all random numbers


CROP_FLIP = dict(randaugment=0, mixup=0.0, cutmix=0.0, erasing=0.0)
RECIPES = ("mae", "lowshot", "crop_flip", "mim_refiner_1", "mim_refiner_10", "inat18", "can", "cmae", "partial", "vicmae",
           "vicmae_subset", "shapes")  # fmt: skip


def recipe(name, dim):
    """What a recipe changes of FineTuning's defaults for an encoder of width `dim`, as a dict.

        mae            MAE-CT A.3: drop path 0.1 / 0.2 / 0.3 for B / L / H; MIM-Refiner C.9 and He et al.: 0.1 / 0.1 / 0.2
        lowshot        10 % of ImageNet's labels: MAE-CT Table 12
        crop_flip      1 % and 10 % of the labels for MAE-CT: A.3; 1 % for MAE (ViT-H: --lr 1e-2), whose other rates it
                       leaves open
        mim_refiner_1, mim_refiner_10    1 % and 10 % of the labels: MIM-Refiner C.5, which refers to its code
        inat18         5 and 10 labels a class: MIM-Refiner C.6, Table 12; without its resizing to 256 before the crop
        can            CAN Table 10
        cmae           CMAE 4.2, "mixup, cutmix, drop path, etc.": MAE's, layer decay and last lr of the authors' configs;
                       --lr 5e-4 after 300 epochs of pre-training
        partial        CMAE 4.5, after He et al. A.1: Table 9, but the best of 50 (--warmup 0.1), 100, 200 (--warmup 0.025)
                       epochs for each --blocks from 1; with 0 it is linear probing: eval.py probe
        vicmae         ViC-MAE Table 8; Table 1
        vicmae_subset  5 to 100 % of ImageNet: ViC-MAE Table 10, Table 8 without RandAugment and Mixup
        shapes         the built-in images in a minute or two: chosen on MAE's encoder

    Optimiser and schedule are MAE's; what a table of low-shot fine-tuning does not list is off. MAE-CT's Table 14:
    --recipe mae --label_smoothing 0 --mixup 0 --cutmix 0 --erasing 0 --randaugment 0, then one after the other back on.
    """
    size = {}
    layer_decay = 0.65  # with few labels
    mae_ct = he = 0.1  # drop paths
    if dim >= 1024:  # ViT-L and larger
        size = dict(epochs=50, warmup=0.1)  # 5 of 50 epochs
        layer_decay = 0.75
        mae_ct = 0.2
    if dim >= 1280:
        mae_ct = 0.3
        he = 0.2
    few = CROP_FLIP | size | dict(batch=512, layer_decay=layer_decay)
    refiner = CROP_FLIP | size | dict(batch=512, lr=3e-5, drop_path=0.0, positions=True)
    refiner_10 = refiner | dict(randaugment=2)
    if dim >= 1280:
        refiner |= dict(weight_decay=0.4)
        refiner_10 = size | dict(batch=256, lr=1e-3, drop_path=0.2, positions=True)
    return {
        "mae": size | dict(drop_path=mae_ct),
        "lowshot": few | dict(lr=3e-5, drop_path=0.0, randaugment=2),
        "crop_flip": few | dict(lr=1e-3, drop_path=mae_ct),
        "mim_refiner_1": refiner,
        "mim_refiner_10": refiner_10,
        "inat18": CROP_FLIP | dict(epochs=50, warmup=0.1, batch=256, drop_path=0.0, positions=True),
        "can": dict(lr=5e-4, weight_decay=0.005, layer_decay=0.65, mixup=0.0, cutmix=0.0),
        "cmae": dict(lr=2.5e-4, drop_path=he, layer_decay=0.65, min_lr=1e-6),
        "partial": size | dict(blocks=1, drop_path=he),
        "vicmae": dict(cutmix=0.0, erasing=0.0),
        "vicmae_subset": CROP_FLIP,
        "shapes": CROP_FLIP | dict(epochs=4, warmup=0.1, batch=128, lr=8e-3),
    }[name]


def drop_path(rate, noise):
    """Drop-path factors from uniform noise [N, depth, 2]: the rate grows linearly from 0 to `rate` over the depth."""
    rates = torch.linspace(0, rate, noise.shape[1], device=noise.device)[:, None]
    return (noise >= rates) / (1 - rates)


def solarize(x, m):
    """Inverts values from a threshold of 256 (none) down to 0."""
    levels = int(256 * abs(m))
    return v2.solarize(x, 256 - levels) if levels else x


def affine(x, shear=(0, 0), translate=(0, 0)):
    """An image bent or moved along both axes; what comes in from outside is ImageNet's mean: 0 once standardised."""
    angles = [math.degrees(math.atan(0.3 * m)) for m in shear]  # the upper left corner stays
    pixels = [0.45 * m * x.shape[-1] for m in translate]
    return v2.affine(x, 0.0, pixels, 1.0, angles, InterpolationMode.BILINEAR, FILL, [0, 0])


def enhancement(m):
    """The factor of colour, contrast, brightness or sharpness."""
    return max(0.1, 1 + 0.9 * m)


FILL = [255 * value for value in MEAN]
# The operations of RandAugment, of an image uint8 [3, S, S] and a strength m in [-1, 1]; where a sign means nothing, |m|
# counts. Those of MAE's code (timm's "increasing" list).
RAND_AUGMENT = {
    "autocontrast": lambda x, m: v2.autocontrast(x),
    "equalize": lambda x, m: v2.equalize(x),
    "invert": lambda x, m: v2.invert(x),
    "rotate": lambda x, m: v2.rotate(x, 30 * m, InterpolationMode.BILINEAR, fill=FILL),
    "posterize": lambda x, m: v2.posterize(x, 4 - int(4 * abs(m))),
    "solarize": solarize,
    "solarize_add": lambda x, m: torch.where(x < 128, x + int(110 * abs(m)), x),
    "color": lambda x, m: v2.adjust_saturation(x, enhancement(m)),
    "contrast": lambda x, m: v2.adjust_contrast(x, enhancement(m)),
    "brightness": lambda x, m: v2.adjust_brightness(x, enhancement(m)),
    "sharpness": lambda x, m: v2.adjust_sharpness(x, enhancement(m)),
    "shear_x": lambda x, m: affine(x, shear=(m, 0)),
    "shear_y": lambda x, m: affine(x, shear=(0, m)),
    "translate_x": lambda x, m: affine(x, translate=(m, 0)),
    "translate_y": lambda x, m: affine(x, translate=(0, m)),
}


def rand_augment(image, dice, layers, magnitude):
    """RandAugment (Cubuk et al. 2020) as in MAE's code: timm's rand-m9-mstd0.5-inc1.

    In each layer an image uint8 [3, S, S] gets one of RAND_AUGMENT with probability 0.5, at a strength of
    normal(magnitude, 0.5) / 10 within [0, 1] and of either sign; dice: a random.Random.
    """
    for _ in range(layers):
        operation = dice.choice(list(RAND_AUGMENT.values()))
        strength = min(max(dice.gauss(magnitude, 0.5), 0), 10) / 10
        sign = dice.choice([-1, 1])
        if dice.random() < 0.5:
            image = operation(image, sign * strength)
    return image


def cutmix_box(share, middle, size):
    """CutMix's boxes [N, size, size] bool: share [N] of the image where they do not reach over its edge, their middle
    [N, 2] in [0, 1) anywhere in it."""
    side = (size * share.sqrt()).floor()[:, None]
    start = (middle * size).floor() - side // 2  # [N, 2]
    at = torch.arange(size, device=share.device)
    inside = (at >= start[..., None]) & (at < (start + side)[..., None])  # [N, 2, S]
    return inside[:, 0, :, None] & inside[:, 1, None]


def mix(x, target, noise, s):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of neighbours: the images in rows 2i and 2i + 1 of the global
    batch are mixed with each other, so that none crosses from one process to another. Every pair is mixed, where both are on
    half of them by each (MAE's code).

    Args:
        x: [N, 3, S, S], N even; target: [N, C]; noise: [N, 4] in [0, 1), on the CPU, alike in both rows of a pair;
        s: FineTuning.
    Returns:
        lam · x + (1 - lam) · neighbour, lam ~ Beta(alpha, alpha) the same for both; or x with a box of the neighbour,
        whose share of the area is 1 - lam where it does not reach over the edge; and the targets mixed by the shares.
    """
    noise = noise.double()
    cut = noise[:, 0] < (0.5 if s.mixup and s.cutmix else float(s.cutmix > 0))
    alpha = np.where(cut, s.cutmix, s.mixup)
    lam = torch.from_numpy(betaincinv(alpha, alpha, noise[:, 1].numpy()))  # the beta distribution's inverse
    cut, lam, middle = (v.to(x.device) for v in (cut, lam, noise[:, 2:]))
    box = cutmix_box(1 - lam, middle, x.shape[-1])
    own = torch.where(cut[:, None, None], (~box).double(), lam[:, None, None]).to(x)  # [N, S, S]: weight of the own pixel
    share = own.mean((1, 2))[:, None]
    own = own[:, None]
    neighbour = torch.arange(len(x), device=x.device).view(-1, 2).flip(1).flatten()
    return own * x + (1 - own) * x[neighbour], share * target + (1 - share) * target[neighbour]


def regularize(data, step, classes, s):
    """A Batch as fine-tuning sees it: (x standardised [n, 3, S, S], targets [n, classes])."""
    images = data.views[0].clone()
    rows = data.rows.tolist()
    for i, row in enumerate(rows):
        dice = random.Random(repr((s.seed, step, "randaugment", row)))
        images[i] = rand_augment(images[i], dice, s.randaugment, s.magnitude)
    x = augment(images)
    target = F.one_hot(data.labels, classes).to(x)
    if s.erasing:
        erase = RandomErasing(s.erasing, (0.02, 1 / 3), (0.3, 1 / 0.3), "random")  # Zhong et al. 2020, with normal noise
        for i, row in enumerate(rows):
            dice = random.Random(repr((s.seed, step, "erasing", row)))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(dice.getrandbits(63))
                x[i] = erase(x[i])
    if s.mixup or s.cutmix:
        x, target = mix(x, target, uniform((s.seed, step, "mix"), data.rows // 2, 4), s)
    return x, target


def check_tuning(s, encoder):
    """An error for settings of fine-tuning that cannot work."""
    check_settings(s)
    fits = s.blocks <= encoder.depth
    need(fits, f"--blocks {s.blocks}: expected 0 to {encoder.depth}, the encoder's blocks, or -1 for all of it")
    need(s.magnitude <= 10, f"--magnitude {s.magnitude}: expected 0 to 10")
    even = s.batch // world() % 2 == 0 or not (s.mixup or s.cutmix)
    need(even, f"--batch {s.batch}: Mixup and CutMix pair images, so a process's batch must be even")


def trainable_copy(encoder, s):
    """A copy of an encoder whose last `s.blocks` blocks with the final norm can learn; −1: all of it."""
    encoder = copy.deepcopy(encoder)
    encoder.freeze(encoder.depth - s.blocks if s.blocks >= 0 else 0)
    encoder.pos_embed.requires_grad_(s.positions and s.blocks < 0)
    return encoder


def epoch_ends(training):
    """Whether the step in progress is the last of an epoch, or of all."""
    done = training.step + 1
    return done % training.per_epoch == 0 or done == training.total


class Series(list):
    """A list that checkpoints keep."""

    def state_dict(self):
        return dict(values=list(self))

    def load_state_dict(self, state):
        self[:] = state["values"]


def tune(classifier, stream, count, validate, s, run, stage="finetune"):
    """The loop of fine-tuning (He et al. Table 9): AdamW with betas 0.9 and 0.999, lr · batch / 256, linear warm-up, cosine
    to 0, layer-wise decay and drop path in the encoder, cross-entropy with smoothed labels; the head starts at
    normal(2e-5). No EMA.

    Args:
        classifier: a Classifier, whose encoder may be frozen in part; stream: a function from a Training to its batches from
        its step on, (x [n, …], targets [n, C], rows [n]); count: training samples; validate: () -> (logits, labels) of val;
        s: FineTuning; run: keeps checkpoints, if it has a folder.
    Returns:
        {"finetune": accuracy after the last epoch, "top5", "finetune_by_epoch": [accuracy, …]} (CMAE Figure 4b).
    """
    nn.init.normal_(classifier.head.weight, std=2e-5)
    nn.init.zeros_(classifier.head.bias)
    encoder = classifier.encoder
    new = nn.ModuleList(m for name, m in classifier.named_children() if name != "encoder")
    peak = s.lr * s.batch / 256
    groups = parameter_groups(encoder, peak, s.weight_decay, s.layer_decay) + parameter_groups(new, peak, s.weight_decay)
    optimizer = adamw(groups, betas=(0.9, 0.999))
    by_epoch = Series()
    state = dict(classifier=classifier, optimizer=optimizer, accuracy=by_epoch)
    training = Training(run, stage, state, count, s.batch, s.epochs)

    def encode(x, target, drop):
        logits = promote(classifier.head(classifier.norm(classifier.feature(x, drop))))
        return (), F.cross_entropy(logits, target, reduction="none", label_smoothing=s.label_smoothing)

    for x, target, rows in training.steps(stream(training)):
        drop = None
        if s.drop_path:
            noise = uniform((s.seed, training.step, "drop"), rows, encoder.residual_blocks, 2, device=x.device)
            drop = drop_path(s.drop_path, noise)
        # in one piece: encode(x, target, drop)[1].mean().backward()
        loss, _ = backward(encode, None, (x, target, drop), s.micro_batch, run.machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.warmup * training.total, s.min_lr / peak))
        _, means = training.take_step(optimizer, loss)
        training.log(means)
        if epoch_ends(training):
            logits, y = validate()
            by_epoch.append({"finetune": accuracy(logits, y)} | top5(logits, y))
            print0(f"epoch {len(by_epoch)}: {by_epoch[-1]['finetune']:.2f}")
        training.save_if_due()
    return by_epoch[-1] | {"finetune_by_epoch": [scores["finetune"] for scores in by_epoch]}


def finetune(encoder, train, val, run, s, stage="finetune"):
    """Fine-tuning of an encoder (He et al. 2022, A.1; MAE-CT A.3), of its last `s.blocks` blocks with the final norm (He et
    al. 4.3; CMAE 4.5), or, with 0 blocks, of the classifier alone.

    The classifier is linear on the encoder's own pooled feature (MAE's code: patch mean under a norm of its own), of a
    post-norm encoder (data2vec 2.0) under a new LayerNorm, as in MIM-Refiner's code. Crops of 0.08-1 of the area, flips, then
    what `s` asks for.

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: labelled Images; run: a Run, which keeps checkpoints if it has
        a folder; s: FineTuning; stage: its name in the run.
    Returns:
        what `tune` returns and {"blocks"}; the Classifier after the last epoch.
    """
    check_tuning(s, encoder)
    size = encoder.config["image_size"]
    torch.manual_seed(s.seed)
    norm = nn.LayerNorm(encoder.dim, eps=1e-6) if encoder.config["post_norm"] else None
    classifier = Classifier(trainable_copy(encoder, s), train.classes, norm=norm).to(run.machine.device)

    def stream(training):
        views = [View(size, (0.08, 1.0))]
        crops = batches(train, views, s.batch, training.step, training.total, s.seed, run.machine)
        for step, data in enumerate(crops, training.step):
            yield *regularize(data, step, len(train.classes), s), data.rows

    validate = partial(outputs, classifier, val, size, run.machine)
    return tune(classifier, stream, len(train), validate, s, run, stage) | {"blocks": s.blocks}, classifier


def given_settings(given, train, data, name, encoder, **changes):
    """FineTuning from a recipe, changes to it, and the flags that were given; a recipe's batch is at most the set."""
    s = FineTuning(**recipe(name, encoder.dim) | changes | given)
    if "batch" not in given:
        s.batch = default_batch(s.batch, train, pairs=True)
    check_batch(RunSettings(data=data, micro_batch=s.micro_batch), train, s.batch, s.epochs)
    check_tuning(s, encoder)
    return s


def run_finetune(
    job,
    *,
    recipe: Literal[RECIPES] | None = None,  # whose settings; default mae; shapes for the built-in images
    fraction: Share | None = None,  # of the training images, drawn class by class
    shots: Count | None = None,  # instead: training images of every class (MIM-Refiner C.6: 5, 10)
    splits: Count = 1,  # draws of these, each tuned on by itself; means are reported (C.5, C.6: 3)
    lists: list[Path] = (),  # instead: files with names of training images, one a line; a split each
    **given,
):
    """Fine-tuning (He et al. 2022, A.1; MAE-CT A.3), also with few labels; writes finetuned.pt, the classifier after the last
    epoch (of the last split)."""
    train, val = job.load_labelled()
    sets = label_splits(train, shots, fraction, splits, lists, given.get("seed", 0))
    name = recipe or ("shapes" if job.data == "shapes" else "mae")
    s = given_settings(given, train.subset(min(sets, key=len)), job.data, name, job.encoder)
    settings = dict(recipe=name, fraction=fraction, shots=shots, splits=splits, lists=lists) | dataclasses.asdict(s)
    run = job.open_run(settings, s.clip_grad)
    learn = partial(finetune, job.encoder, val=val, s=s)
    result = learn_splits(job, run, train, sets, "finetune", "finetuned.pt", learn)
    return {"images": len(sets[-1])} | result | {"settings": settings}


# --------------------------------------------------------------------------------------------------------- clustering


def part_of_rank(rows):
    """This rank's part of rows [N, …], as long as the others': the last parts repeat the first rows."""
    share = math.ceil(len(rows) / world())
    return rows[torch.arange(rank() * share, (rank() + 1) * share) % len(rows)]


def z_scores(x):
    """Features [N, D] with mean 0 and deviation 1."""
    std, mean = torch.std_mean(x, 0, unbiased=False)
    return (x - mean) / std.clamp(min=1e-12)


def kmeans_plus_plus(x, k, runs, precision, seed):
    """Indices [runs, k] of starting points, for all runs at once: greedy k-means++ (Arthur & Vassilvitskii 2007), where
    the best of 2 + log k candidates becomes the next centre (scikit-learn's rule)."""
    numbers = torch.arange(runs, device=x.device)
    trials = 2 + int(math.log(k))
    low = x.to(precision)
    squares = x.square().sum(1)

    def distances(i):  # squared ones from points i [runs, t] to all: [runs, t, N]
        products = (low[i] @ low.T).to(x.dtype)
        return products.mul_(-2).add_(squares).add_(squares[i][..., None]).clamp_(min=0)

    chosen = (uniform((seed, "k-means++"), numbers, 1) * len(x)).long()
    closest = distances(chosen)[:, 0]  # [runs, N], to the nearest of the chosen points
    for step in range(1, k):
        total = closest.cumsum(1)
        dice = uniform((seed, "k-means++", step), numbers, trials) * total[:, -1:]
        candidates = torch.searchsorted(total, dice.to(total)).clamp_(max=len(x) - 1)  # with the odds of their distances
        closer = torch.minimum(distances(candidates), closest[:, None])
        best = closer.sum(-1).argmin(1)
        closest = closer[numbers, best]
        chosen = torch.cat([chosen, candidates[numbers, best][:, None]], 1)
    return chosen


def assign(points, centres):
    """(|c|² / 2 − x·c, number) of the nearest centre c of each point x."""
    return (centres.square().sum(1) / 2 - points @ centres.to(points.dtype).T).min(1)


@torch.no_grad()
def kmeans(x, k, runs=100, seed=0, precision=torch.float32):
    """k-means (Lloyd) from k-means++ starts.

    Points go to their centres in `precision` until the centres stand still, from then on in x's own type until they do so
    there. They stand still when they moved, in squared length, by no more than 1e-4 of the mean feature variance, or after
    300 rounds (scikit-learn's rules). A cluster that loses all its points keeps its centre. Under torchrun each rank has its
    part of the runs.

    Args:
        x [N, D]; k clusters.
    Returns:
        assignments [runs, N] and losses [runs] (sum of squared distances).
    """
    x = x - x.mean(0)  # what is rounded should be small
    low = x.to(precision)
    still = 1e-4 * x.var(0, unbiased=False).mean()
    starts = part_of_rank(kmeans_plus_plus(x, k, runs, precision, seed))
    assignments, losses = [], []
    for chosen in progress(starts, len(starts), "k-means runs"):
        centres = x[chosen]
        points = low
        for _ in range(300):
            assigned = assign(points, centres).indices
            count = torch.bincount(assigned, minlength=k)
            means = F.embedding_bag(assigned.argsort(), x, count.cumsum(0) - count, mode="mean")
            means = torch.where(count[:, None] > 0, means, centres)
            moved = (means - centres).square().sum()
            centres = means
            if moved <= still:
                if points is x:
                    break
                points = x
        nearest_centre = assign(x, centres)
        assignments.append(nearest_centre.indices)
        losses.append((2 * nearest_centre.values + x.square().sum(1)).double().sum())
    return gather(torch.stack(assignments))[:runs], gather(torch.stack(losses))[:runs].to(x.dtype)


def pairs(counts):
    """Number of pairs within groups of these sizes."""
    return (counts * (counts - 1) / 2).sum()


def cluster_scores(truth, assigned):
    """Agreement of clusters with classes (MAE-CT B.3), all in percent.

    cluster_acc: accuracy under the best one-to-one matching (Hungarian); nmi, ami: normalised and adjusted mutual
    information (arithmetic mean of the entropies); ari: adjusted Rand index.
    """
    counts = crosstab(truth.cpu(), assigned.cpu()).count  # [classes, clusters]
    n, a, b = counts.sum(), counts.sum(1), counts.sum(0)
    mean_entropy = (entropy(a) + entropy(b)) / 2
    mutual = 2 * mean_entropy - entropy(counts, axis=None)
    expected = expected_mutual_information(a, b)
    pairs_by_chance = pairs(a) * pairs(b) / pairs(n)
    with np.errstate(invalid="ignore"):  # of one class in one cluster they are undefined: nan, null in JSON
        scores = {
            "cluster_acc": counts[linear_sum_assignment(-counts)].sum() / n,
            "nmi": mutual / mean_entropy,
            "ami": (mutual - expected) / (mean_entropy - expected),
            "ari": (pairs(counts) - pairs_by_chance) / ((pairs(a) + pairs(b)) / 2 - pairs_by_chance),
        }
    return {name: 100 * float(value) for name, value in scores.items()}


def expected_mutual_information(a, b):
    """Mean mutual information of two random partitions with class sizes a and b (Vinh et al. 2010, Eq. 24a)."""
    n = a.sum()
    log = gammaln(np.arange(n + 1) + 1)  # of factorials
    total = 0.0
    b, times_b = np.unique(b, return_counts=True)  # classes and clusters of one size share their terms
    for size, times in zip(*np.unique(a, return_counts=True)):
        nij = np.arange(1, min(size, b.max()) + 1)[:, None]  # [m, 1] against b [C]
        possible = (nij >= size + b - n) & (nij <= b)
        log_odds = log[size] + log[b] + log[n - size] + log[n - b] - log[n]
        log_odds = log_odds - log[nij] - log[size - nij] - log[b - nij] - log[n - size - b + nij]
        odds = np.exp(np.where(possible, log_odds, -np.inf))
        information = nij / n * np.log(n * nij / (size * b))
        total += times * (odds * information * times_b).sum()
    return total


@torch.no_grad()
def silhouette(x, y, chunk=1024):
    """Mean silhouette coefficient of the classes y (Rousseeuw 1987), in percent; classes of one sample count 0."""
    onehot = F.one_hot(y).to(x.dtype)
    size = onehot.sum(0)
    scores = []
    parts = list(zip(x.split(chunk), y.split(chunk), onehot.split(chunk)))
    for part, label, own in progress(parts, len(parts), "parts of the silhouette"):
        sums = torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist") @ onehot  # [n, C]
        inside = (sums * own).sum(1) / (size[label] - 1).clamp(min=1)
        outside = (sums / size).masked_fill((size == 0) | (own == 1), math.inf).amin(1)
        scores.append(((outside - inside) / torch.maximum(inside, outside)).where(size[label] > 1, 0))
    return 100 * torch.cat(scores).mean().item()


@torch.no_grad()
def davies_bouldin(x, y):
    """Davies-Bouldin index of the classes y (1979): 0 is best; classes without samples do not count."""
    y = y.unique(return_inverse=True)[1]
    onehot = F.one_hot(y).to(x.dtype)
    size = onehot.sum(0)
    centres = onehot.T @ x / size[:, None]
    spread = onehot.T @ (x - centres[y]).norm(dim=1) / size
    ratio = (spread[:, None] + spread) / torch.cdist(centres, centres).fill_diagonal_(math.inf)
    return ratio.max(1).values.mean().item()


def cluster(x, y, runs=100, normalization="standardize", precision=torch.float32):
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
    x = z_scores(x) if normalization == "standardize" else F.normalize(x)
    y = y.unique(return_inverse=True)[1]
    k = int(y.max()) + 1
    assigned, losses = kmeans(x, k, runs, precision=precision)
    scores = [cluster_scores(y, a) for a in assigned]
    best = losses.argmin().item()
    average = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    of_truth = dict(silhouette=silhouette(x, y), davies_bouldin=davies_bouldin(x, y))
    confusion = crosstab(y.cpu(), assigned[best].cpu(), levels=(range(k), range(k))).count
    confusion = confusion[:, linear_sum_assignment(-confusion)[1]]
    return scores[best] | of_truth | dict(loss=losses[best].item(), average=average), confusion


def shades(share):
    """Shares […] → colours uint8 […, 3], white for 0 to blue for 1."""
    return np.round(255 - share[..., None] * np.array([255, 141, 77])).astype(np.uint8)


def draw_matrix(path, counts, names, caption=""):
    """A picture of a matrix of counts [C, C] as shares of their row; `names` stand beside rows and below columns, as many
    as there is room for."""
    side = min(800, 160 * len(counts))
    cell = side / len(counts)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    names = [name if len(name) <= 24 else name[:23] + "…" for name in map(str, names)]
    _, pen = blank(1, 1)
    room = max(map(pen.textlength, names)) + TEXT
    canvas, pen = blank(room + side, TEXT + side + room)
    upright = ImageFont.TransposedFont(pen.font, Image.Transpose.ROTATE_90)
    canvas.paste(Image.fromarray(shades(share)).resize((side, side), Image.Resampling.NEAREST), (round(room), TEXT))
    every = math.ceil(1.2 * TEXT / cell)
    for i in range(0, len(counts), every):
        middle = (i + 0.5) * cell
        pen.text((room - TEXT / 2, TEXT + middle), names[i], fill="black", anchor="rm")
        pen.text((room + middle - TEXT / 2, side + 1.5 * TEXT), names[i], fill="black", font=upright)
    for (row, column), value in np.ndenumerate(share) if cell > 2 * TEXT else []:
        place = (room + (column + 0.5) * cell, TEXT + (row + 0.5) * cell)
        pen.text(place, f"{100 * value:.0f}", fill="white" if value > 0.5 else "black", anchor="mm")
    legend = {f"{p} %": (tuple(shades(np.array(p / 100))), 4, 0) for p in (25, 50, 75, 100)}
    save_picture(path, canvas, caption + (f"; one name in {every} is shown" if every > 1 else ""), legend)


def run_cluster(
    job,
    *,
    runs: Count = 100,  # of k-means, of which the best counts
    normalization: Literal["standardize", "l2"] = "standardize",  # of features: MAE-CT B.3; MIM-Refiner C.12
    classes: Path | None = None,  # file that names the classes to cluster, one a line
):
    """k-means of the validation images with as many clusters as classes (MAE-CT B.3, MIM-Refiner C.12), and a picture of
    the best run's confusion matrix."""
    _, images = job.load_labelled()
    images = of_classes(images, classes)
    x, y = features(job.encoder, images, job.machine)
    result, confusion = cluster(x, y, runs, normalization, job.machine.precision)
    if rank() == 0:
        names = [images.classes[c] for c in y.unique().tolist()]
        caption = "rows: classes; columns: k-means clusters, by the classes that they are matched with; share of the row"
        draw_matrix(job.file("confusion.png"), confusion, names, caption)
    return result


# ------------------------------------------------------------------------------------------------- retrieval and maps


def draw_neighbours(path, images, size, index, names, labels, caption, queries=0):
    """A picture grid: each row of `index` [R, K] is a row of images under its name; the first `queries` are framed as such,
    and where there are classes, the others by whether they are of the row's label (labels [R])."""
    rows = []
    for row, name, label in zip(index.cpu(), names, labels.tolist()):
        views = torch.cat([x for x, _ in center_views(images, size, Machine(torch.device("cpu")), row)])
        frames = [None] * len(row)
        if images.classes:
            frames = ["same class" if images.labels[i] == label else "another class" for i in row]
            name = f"{name}: {images.classes[label]}"
        rows.append((name, views, ["query"] * queries + frames[queries:]))
    draw_rows(path, rows, caption=caption)


def run_retrieve(
    job,
    *,
    samples: Count = 8,  # rows of either picture
    neighbours: Count = 10,  # that are shown of each
    clusters: Whole = 0,  # of k-means; 0: the number of classes
    classes: Path | None = None,  # file that names the classes to search, one a line
):
    """The nearest neighbours of some samples (MAE-CT Figure 11), and of the centres of k-means clusters (Figures 5, 10),
    as pictures; the share of neighbours of the same class where there are labels.

    Features are L2-normalised for the former, standardised for the latter. A cluster's class is that of most of its
    samples. Chosen: samples drawn at random, the largest clusters.
    """
    train, val = load_splits(job.data, labels=bool(classes))
    images = of_classes(val or train, classes)
    k = clusters or max(2, len(images.classes))
    fits = max(neighbours, k) < len(images)
    need(fits, f"{neighbours} neighbours, {k} clusters: the data has {len(images)} images, choose fewer")
    x, y = features(job.encoder, images, job.machine)

    normal = F.normalize(x)
    order = uniform((0, "queries"), torch.arange(len(x)), 1)[:, 0].argsort()
    queries = order[:samples].to(x.device)
    similarity = (normal[queries] @ normal.T).scatter(1, queries[:, None], math.inf)  # the sample itself comes first
    index = similarity.topk(neighbours + 1, 1).indices

    x = z_scores(x)
    assigned, losses = kmeans(x, k, precision=job.machine.precision)
    assigned = assigned[losses.argmin()]
    largest = torch.bincount(assigned).argsort(descending=True)[:samples]
    centres = torch.stack([x[assigned == c].mean(0) for c in largest])
    centre_y = torch.stack([y[assigned == c].mode().values for c in largest])
    centre_index = torch.cdist(centres, x).topk(neighbours, 1, largest=False).indices

    if rank() == 0:
        size = job.encoder.config["image_size"]
        names = [f"image {i}" for i in queries]
        caption = "nearest images by the cosine similarity of their features, from left to right"
        draw_neighbours(job.file("neighbours.png"), images, size, index, names, y[queries], caption, queries=1)
        names = [f"cluster {i + 1}" for i in range(len(largest))]
        caption = "images nearest to the centres of k-means clusters, named by most of their images"
        draw_neighbours(job.file("clusters.png"), images, size, centre_index, names, centre_y, caption)
    if not images.classes:
        return {}
    right = y[index[:, 1:]] == y[queries, None]
    centre_right = y[centre_index] == centre_y[:, None]
    return dict(neighbours=100 * right.float().mean().item(), of_centres=100 * centre_right.float().mean().item())


def embed(x):
    """Features in two dimensions: UMAP with its default parameters (MIM-Refiner C.12) if it is installed, else the first
    two principal components, each with its largest weight positive.

    x [N, D]; returns ([N, 2], what was used).
    """
    try:
        from umap import UMAP

        return torch.from_numpy(UMAP(random_state=0).fit_transform(x.cpu().numpy())).to(x.device), "UMAP"
    except ImportError:
        centred = x - x.mean(0)
        _, singular, v = torch.linalg.svd(centred, full_matrices=False)
        axes = v[:2] * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
        share = 100 * (singular[:2].square().sum() / singular.square().sum()).item()
        print0("UMAP is not installed (pip install umap-learn): principal components instead")
        return centred @ axes.T, f"PCA ({share:.1f} % of the variance)"


def run_embed(
    job,
    *,
    classes: Path | None = None,  # file that names the classes to show, one a line
):
    """A picture of L2-normalised features in two dimensions, coloured by class (MAE-CT Figures 1, 4, 8; MIM-Refiner
    Figure 5), with their silhouette."""
    _, images = job.load_labelled()
    images = of_classes(images, classes)
    x, y = features(job.encoder, images, job.machine)
    x = F.normalize(x)
    points, how = embed(x)
    if rank() == 0:
        names = [*map(str, images.classes[: len(MARKS)]), "others"]
        group = y.clamp(max=len(MARKS))
        curves = {names[c]: points[group == c].T.tolist() for c in group.unique()}
        caption = f"{len(x)} L2-normalised features by {how}"
        draw_curves(job.file("embed.png"), curves, "first dimension", "second dimension", caption, joined=False)
    return dict(embedding=how, silhouette=silhouette(x, y))


# ------------------------------------------------------------------------------------------------- what features hold


DECODERS = dict(epochs=20, batch=4096, lr=1.5e-4, dim=512, heads=16)  # MIM-Refiner C.2
DECODERS_SHAPES = dict(epochs=8, batch=256, lr=2e-3, dim=64, heads=4)  # of the built-in images: chosen


def reconstruction_per_block(encoder, train, val, machine, epochs, batch, lr, dim, heads):
    """Loss of an MAE decoder of two blocks after every block of the frozen encoder (MIM-Refiner C.2, Figures 3d and 6).

    As in training from scratch (75 % masked, AdamW, lr · batch / 256, weight decay 0.05, crops of 0.2-1), but for 20
    epochs, 5 of them warm-up (a quarter). Each decoder begins with a LayerNorm of its own (the authors' code); all learn
    side by side from one encoder pass a batch. Chosen: losses are those of center crops of `val`, all under one mask.

    Returns:
        list of losses (normalised patches), block 1 first.
    """
    torch.manual_seed(0)
    size = encoder.config["image_size"]
    patches = math.prod(encoder.grid)
    blocks = last_blocks(encoder, encoder.depth)
    learned = nn.ModuleList()
    for _ in blocks:
        decoder = MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, dim, 2, heads)
        learned.append(nn.ModuleList([nn.LayerNorm(encoder.dim, eps=1e-6), decoder]))
    learned.to(machine.device)
    optimizer = adamw(parameter_groups(learned, lr * batch / 256, 0.05))
    training = Training(Run(machine), "blocks", dict(optimizer=optimizer), len(train), batch, epochs)

    def losses(x, noise):
        """Yields the losses [n] of one block's decoder after the other."""
        ids_keep, ids_restore, mask = random_masking(noise, 0.75)
        with torch.no_grad(), autocast(machine.device, machine.precision):
            tokens_by_block = encoder(x, ids_keep, blocks=blocks)
        for (norm, decoder), tokens in zip(learned, tokens_by_block):
            with autocast(machine.device, machine.precision):
                loss = mae_loss(decoder(norm(tokens), ids_restore), x, mask)
            yield loss

    for data in training.batches(train, [View(size, (0.2, 1.0))]):
        noise = uniform((0, "blocks", training.step), data.rows, patches, device=machine.device)
        total = 0
        for loss in losses(augment(data.views[0]), noise):
            loss.mean().backward()  # at once, which frees what this decoder has kept for it
            total += loss.detach().mean()
        set_lr(optimizer, warmup_cosine(training.step, training.total, training.total / 4))
        _, means = training.take_step(optimizer, total / len(blocks))
        training.log(means)

    one_mask = uniform((0, "blocks"), torch.zeros(1, dtype=torch.long), patches, device=machine.device)

    def losses_by_block(x):  # [n, blocks]
        return torch.stack(list(losses(x, one_mask.expand(len(x), -1))), 1)

    found, _ = outputs(losses_by_block, val, size, machine)
    return found.mean(0).tolist()


def improvements(values):
    """Changes from one block to the next over the largest change. C.2 divides by the "maximum delta", which would turn all
    signs where every block is worse than the one before."""
    change = np.diff(values)
    return (change / max(np.abs(change).max(), 1e-12)).tolist()


def run_blocks(
    job,
    *,
    epochs: Positive | None = None,  # of the decoders; default 20, on the built-in images 8
    batch: BatchSize | None = None,  # global: of all processes together; default 4096, built-in 256
):
    """k-NN and reconstruction loss of every block, and both as improvements from one block to the next (MIM-Refiner
    Figures 3b, 3d, 6); a picture of the improvements."""
    train, val = job.load_labelled()
    usual = DECODERS_SHAPES if job.data == "shapes" else DECODERS
    batch = batch or default_batch(usual["batch"], train)
    settings = usual | dict(batch=batch, epochs=epochs or usual["epochs"])
    check_batch(RunSettings(data=job.data), train, batch, settings["epochs"])
    accuracies = knn_per_block(job.encoder, train, val, job.machine)
    losses = reconstruction_per_block(job.encoder, train, val, job.machine, **settings)
    gains = dict(knn=improvements(accuracies), reconstruction=improvements(-np.array(losses)))
    if rank() == 0:
        numbers = list(range(2, job.encoder.depth + 1))
        curves = {name: (numbers, values) for name, values in gains.items()}
        draw_curves(job.file("blocks.png"), curves, "block", "improvement over the block before / the largest")
    result = dict(knn=accuracies, reconstruction=losses, settings=settings)
    return result | {f"{name}_improvement": values for name, values in gains.items()}


CHANGES = {  # of images in [0, 1]; Table 6 names the operations, their amounts are chosen
    "rotation": [(v2.rotate, 90), (v2.rotate, 180), (v2.rotate, 270)],
    "colour": [
        *itertools.product((v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation), (0.5, 1.5)),
        (v2.adjust_hue, -0.25),
        (v2.adjust_hue, 0.25),
    ],
}


def invariance(classifier, images, machine, all_classes=False):
    """Average effective invariance of a linear classifier to CHANGES (MAE-CT 4.4, Table 6, after Deng et al. 2022).

    Of the probabilities p of an image and p_t of its changed version it is √(p̂ p̂_t) of the predicted classes where these
    agree, else 0. The text fits √(Σ p p_t) over all classes as well, which is the authors' code's: `all_classes`.

    Returns:
        {"rotation", "colour"}: means over images and changes, between 0 and 1.
    """

    def invariances(x):  # [n, all changes]
        pixels = unstandardise(x)
        p = classifier(x).softmax(-1)
        found = []
        for change, amount in itertools.chain(*CHANGES.values()):
            p_t = classifier(standardise(change(pixels, amount))).softmax(-1)
            product = (p * p_t).sum(-1) if all_classes else p.amax(-1) * p_t.amax(-1)
            found.append(product.sqrt() * (p.argmax(-1) == p_t.argmax(-1)))
        return torch.stack(found, 1)

    found, _ = outputs(invariances, images, classifier.encoder.config["image_size"], machine)
    by_kind = found.split([len(changes) for changes in CHANGES.values()], 1)
    return {kind: values.mean().item() for kind, values in zip(CHANGES, by_kind)}


def run_invariance(
    job,
    *,
    classifier: Path | None = None,  # probe.pt or finetuned.pt; default: probe.pt where results go
    all_classes: bool = False,  # multiply the probabilities of all classes, as the authors' code, not of the predicted one
):
    """Effective invariance of a classifier to rotations and to changes of colour (MAE-CT Table 6), on the validation
    images."""
    train, val = load_splits(job.data)
    loaded = job.load_classifier(classifier)
    same = classifier or loaded.classes == list(train.classes)
    need(same, f"probe.pt tells other classes than those of --data {job.data}: give --classifier FILE")
    return invariance(loaded, val or train, job.machine, all_classes)


def histograms(x):
    """Colour histograms of standardised images [n, 3, H, W]: each channel's shares of 64 bins, [n, 192] (MAE-CT A.4)."""
    level = (unstandardise(x) * 255).round().long() * 64 // 256
    counts = x.new_zeros(len(x), 3, 64).scatter_add_(2, level.flatten(2), torch.ones_like(x).flatten(2))
    return (counts / math.prod(x.shape[2:])).flatten(1)


def colorhist(encoder, train, val, machine, epochs, batch, lr, softmax=False):
    """Histogram prediction error: how badly linear probes tell an image's colour histogram from [CLS] after each block
    (MAE-CT A.4, Figure 3).

    One probe a block, side by side: BatchNorm without weights, 192 outputs, L1 loss, otherwise as Table 11 with 10 epochs,
    one of them warm-up, and a rate of 0.1 (at batch 256). The histogram is that of the very crop the encoder sees. The
    text regresses it; with `softmax` a channel's 64 outputs go through one first (the authors' code).

    Returns:
        list of errors in percent of those of a uniform prediction, on center crops of `val`; block 1 first.
    """
    torch.manual_seed(0)
    device = machine.device
    size = encoder.config["image_size"]
    blocks = last_blocks(encoder, encoder.depth)
    norm = BatchNorm(len(blocks), encoder.dim, affine=False).to(device)
    weight = nn.Parameter(torch.empty(len(blocks), encoder.dim, 192, device=device).normal_(std=0.01))
    bias = nn.Parameter(torch.zeros(len(blocks), 1, 192, device=device))
    optimizer = torch.optim.SGD([dict(params=[weight, bias], peak_lr=lr * batch / 256)], momentum=0.9)
    training = Training(Run(machine), "colorhist", dict(optimizer=optimizer), len(train), batch, epochs)

    def errors(x):  # [n, blocks + 1]: of the probes, and of a uniform prediction
        truth = histograms(x)
        with torch.no_grad(), autocast(device, machine.precision):
            cls = torch.cat([promote(pooled(encoder, part, blocks, "cls")) for part in x.split(256)])  # [n, blocks, D]
        with torch.autocast(device.type, enabled=False):
            prediction = norm(cls.transpose(0, 1)) @ weight + bias  # [blocks, n, 192]
            if softmax:
                prediction = prediction.unflatten(-1, (3, 64)).softmax(-1).flatten(-2)
        of_guess = torch.full_like(truth, 1 / 64)[None]
        return (torch.cat([prediction, of_guess]) - truth).abs().mean(2).T

    for data in training.batches(train, [View(size, (0.08, 1.0))]):
        loss = errors(augment(data.views[0]))[:, :-1].mean(0).sum()
        loss.backward()
        set_lr(optimizer, warmup_cosine(training.step, training.total, training.total / epochs))
        _, means = training.take_step(optimizer, loss)
        training.log(means)

    norm.eval()
    found, _ = outputs(errors, val, size, machine)
    *of_probes, of_guess = found.mean(0)
    return [(100 * error / of_guess).item() for error in of_probes]


def run_colorhist(
    job,
    *,
    epochs: Count = 10,  # over the training images, one of them warm-up
    batch: BatchSize | None = None,  # global: of all processes together; default 1024, on the built-in images 64
    lr: Positive = 0.1,  # highest learning rate, at batch 256
    softmax: bool = False,  # over a channel's 64 outputs, as the authors' code
):
    """Histogram prediction error of every block (MAE-CT A.4, Figure 3), with a picture of it."""
    train, val = job.load_labelled()
    batch = batch or default_batch(64 if job.data == "shapes" else 1024, train)
    check_batch(RunSettings(data=job.data), train, batch, epochs)
    errors = colorhist(job.encoder, train, val, job.machine, epochs, batch, lr, softmax)
    if rank() == 0:
        curve = {"histogram prediction error": (list(range(1, len(errors) + 1)), errors)}
        draw_curves(job.file("colorhist.png"), curve, "block", "error / % of a uniform guess's")
    return dict(colorhist=errors, last=errors[-1], settings=dict(batch=batch))


def run_stats(job):
    """Averages over features of the mean and of the variance of [CLS], after the last block and after the final norm
    (MIM-Refiner Table 14 does not say which)."""
    train, val = load_splits(job.data)
    raw, _ = features(job.encoder, val or train, job.machine, [job.encoder.depth], "cls")
    result = {}
    for name, x in dict(last_block=raw[:, 0], final_norm=job.encoder.norm(raw[:, 0])).items():
        variance, mean = torch.var_mean(x, 0)
        result[name] = dict(mean=mean.mean().item(), variance=variance.mean().item())
    return result


# -------------------------------------------------------------------------------------------- robustness and transfer


def classes_of_folders(folders, classes, mapping=None):
    """Which classes each folder of images stands for: [folders, classes] bool.

    A folder has the name of a class, or `mapping` {folder: class or list of classes} says what it holds; with a mapping
    other folders count for nothing (ObjectNet shares 113 of its 313 classes with ImageNet). Where all folders are numbers
    that name no class (ImageNet-V2's 0 … 999) they are positions in the sorted list of classes.
    """
    number = {str(c): i for i, c in enumerate(classes)}
    if mapping is None and all(f.isdecimal() and f not in number for f in folders):
        number = {str(i): i for i in range(len(classes))}
    names = {folder: folder for folder in folders if folder in number} | (mapping or {})
    held = torch.zeros(len(folders), len(classes), dtype=torch.bool)
    for folder, row in zip(folders, held):
        classes_of_folder = names.get(folder, [])
        for name in classes_of_folder if isinstance(classes_of_folder, list) else [classes_of_folder]:
            is_class = isinstance(name, str) and name in number
            need(is_class, f"the mapping says {folder}: {name!r}, which is no class of the classifier")
            row[number[name]] = True
    unknown = [folder for folder, row in zip(folders, held) if not row.any()]
    if unknown:
        has = ", ".join(map(str, classes[:3]))
        some = mapping is not None and len(unknown) < len(folders)
        need(some, f"folder {unknown[0]} is no class of the classifier ({has}, …): say what it holds by --mapping FILE")
        print0(f"{len(unknown)} of {len(folders)} folders hold none of the classes and are left out ({unknown[0]}, …)")
    return held


def real_labels(images, content, classes, path):
    """ImageNet-ReaL's answers: [N, classes] bool of the labels that count as right for each validation image.

    `content` is a list of lists of class numbers in the order of the file names (reassessed-imagenet's real.json).
    """
    order = range(len(images))
    if images.files is not None:
        order = sorted(order, key=lambda i: os.path.basename(images.name(i)))
    need(len(content) == len(images), f"{path} has labels of {len(content)} images, the validation set has {len(images)}")
    right = torch.zeros(len(images), len(classes), dtype=torch.bool)
    for i, numbers in zip(order, content):
        are_classes = isinstance(numbers, list) and all(type(n) is int and 0 <= n < len(classes) for n in numbers)
        need(are_classes, f"{path}: expected lists of numbers from 0 to {len(classes) - 1}, found {numbers!r}")
        right[i, numbers] = True
    return right


def robust(classifier, images, right, machine, among=None):
    """Top-1 accuracy of a trained classifier on other images of its classes (MAE-CT B.2, Table 17; CAN 4.4, Figure 5).

    Args:
        classifier: a Classifier; right [N, C] bool: the classes that count as right for each image; images without any
            are skipped; among [C] bool: predictions are made among these classes only. The papers are silent; among the
            classes of the set is how the authors of ImageNet-R and -A measure, and the same for ObjectNet; for
            ImageNet-V2, -Sketch and ReaL it is no restriction. (The red border of ObjectNet's images is not cut off here.)
    Returns:
        {"accuracy": percent, "images": how many count, "classes": how many are predicted among}.
    """
    kept = right.any(1).nonzero()[:, 0]
    need(len(kept), "none of the images has a label that counts")
    if among is None:
        among = torch.ones(right.shape[1], dtype=torch.bool)
    images = dataclasses.replace(images.subset(kept), labels=right[kept])
    logits, right = outputs(classifier, images, classifier.encoder.config["image_size"], machine)
    predicted = logits.masked_fill(~among.to(machine.device), -math.inf).argmax(1, keepdim=True)
    percent = 100 * right.gather(1, predicted).double().mean().item()
    return dict(accuracy=percent, images=len(right), classes=int(among.sum()))


def run_robust(
    job,
    *,
    classifier: Path | None = None,  # probe.pt or finetuned.pt; default: probe.pt where results go
    sets: list[str] = (),  # instead of --data: folders with one folder of images per class
    mapping: Path | None = None,  # JSON {folder: class or list of classes}
    real: Path | None = None,  # ReaL labels of --data's validation images, JSON
):
    """Accuracy of a classifier on other images of its classes (MAE-CT Table 17; CAN Figure 5): on each folder of --sets (or
    --data) and, with --real, on the validation images of --data."""
    classifier = job.load_classifier(classifier)
    if mapping:
        mapping = read_json(mapping, "expected {folder: class or list of classes}")
    result = {}
    for name in sets or [job.data]:
        images = load_images(name, "val", labels=False)
        need(images.classes, f"{name}: expected one folder of images per class")
        held = classes_of_folders(images.classes, classifier.classes, mapping)
        result[name] = robust(classifier, images, held[images.labels], job.machine, held.any(0))
    if real:
        images = load_images(job.data, "val", labels=False)
        content = read_json(real, "expected ReaL's lists of class numbers", (list,))
        right = real_labels(images, content, classifier.classes, real)
        result["ReaL"] = robust(classifier, images, right, job.machine)
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
        counts = label >= 0
        ranking = score[counts].argsort(descending=True, stable=True)
        found = label[counts][ranking].double().cumsum(0)
        if found.any():
            recall = found / found[-1]
            precision = found / torch.arange(1, len(found) + 1, device=y.device)
            values.append(sum(precision[recall >= t / 10].max().item() for t in range(11)) / 11)
    return 100 * sum(values) / len(values)


def mean_per_class(logits, y):
    """Accuracy in percent, every class of y [N] counting the same; logits [N, C]."""
    right = (logits.argmax(1) == y).double()
    return 100 * torch.stack([right[y == c].mean() for c in y.unique()]).mean().item()


def transfer(encoder, train, val, machine):
    """Linear probing of another data set (MIM-Refiner C.8, Table 8; ViC-MAE Table 3), by DINOv2's grid on cached,
    unaugmented features; batch 256: chosen.

    Returns accuracies in percent: {"accuracy", "mean per class"}, or {"mAP"} where images have several labels. Table 8
    reports accuracy. ViC-MAE leaves its metrics open; its predecessors (Kornblith et al. 2019, Table 1) take the mean per
    class for Aircraft, Pets, Caltech101 and Flowers, and VOC2007's mAP.
    """
    how = dict(batch=default_batch(256, train), cached=True)
    if train.labels.ndim == 2:
        how |= dict(loss=several_labels, score=mean_average_precision)
    result, classifier = linear_probe(encoder, train, val, Run(machine), "dinov2", **how)
    if train.labels.ndim == 2:
        return {"mAP": result["probe"]}
    logits, y = outputs(classifier, val, encoder.config["image_size"], machine)
    return {"accuracy": result["probe"], "mean per class": mean_per_class(logits, y)}


def average_rank(values):
    """Average over data sets of each encoder's rank among the encoders, 1 is best (MIM-Refiner Table 8); values
    [encoders, sets]. Encoders that tie share the mean of their ranks."""
    return rankdata(-np.asarray(values), axis=0).mean(1).tolist()


def load_voc2007(split):
    """VOC2007's classification task: trainval ("train", 5 011 images) or test (4 952), downloaded to ./data by torchvision.

    Labels [N, 20]: 1 present, 0 absent, −1 where all objects of the class are "difficult", which the task neither trains
    nor tests on (the devkit's ImageSets/Main).
    """
    part = "trainval" if split == "train" else "test"
    lists = Path("data/VOCdevkit/VOC2007/ImageSets/Main")
    missing = not (lists / f"{part}.txt").is_file()  # torchvision would unpack it every time
    dataset = torchvision_dataset("VOCDetection", missing, year="2007", image_set=part)
    meaning = {"1": 1, "-1": 0, "0": -1}
    labels = {}
    for file in sorted(lists.glob(f"*_{part}.txt")):
        flags = file.read_text().split()[1::2]  # "000005 -1", image by image
        labels[file.stem.removesuffix(f"_{part}")] = [meaning[flag] for flag in flags]
    need(labels, f"{lists} has no lists of classes (aeroplane_{part}.txt, …)")
    return Images(torch.tensor(list(labels.values())).T, list(labels), files=file_names(dataset.images))


def load_transfer_set(job, name):
    """(training, validation images) of a data set by name, VOC2007 among them."""
    if name.lower() == "voc2007":
        return load_voc2007("train"), load_voc2007("val")
    return dataclasses.replace(job, data=name).load_labelled()


def run_transfer(
    job,
    *,
    against: list[Path] = (),  # other encoders, for the average rank
    sets: list[str] = (),  # several instead of --data; also voc2007
):
    """Linear probing of other data sets (MIM-Refiner Table 8, ViC-MAE Table 3): of each of --sets (or --data), for the
    encoder and those that it is compared --against."""
    paths = [job.path, *against]
    sets = sets or [job.data]
    need(len(set(paths)) == len(paths) and len(set(sets)) == len(sets), "an encoder or a data set is named twice")
    encoders = [job.encoder] + [load_encoder(path, job.image_size, job.pool) for path in against]
    loaded = {name: load_transfer_set(job, name) for name in sets}
    result, values = {}, []
    for path, encoder in zip(paths, encoders):
        encoder.to(job.machine.device).requires_grad_(False)
        result[str(path)] = {}
        values.append([])
        for name, (train, val) in loaded.items():
            scores = transfer(encoder, train, val, job.machine)
            values[-1].append(next(iter(scores.values())))
            result[str(path)] |= {f"{name} {metric}": value for metric, value in scores.items()}
    if against:
        for scores, average in zip(result.values(), average_rank(values)):
            scores["rank"] = average
    return result


# ------------------------------------------------------------------------------------------- maps of an encoder


class RelativeBias(nn.Module):
    """What a block adds to its scores for the place of the key relative to the query (Swin, BEiT), on a grid of rows x columns:
    () → [heads, L, L]. A number for each head and difference, 0 at the start."""

    def __init__(self, heads, rows, columns):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, 2 * rows - 1, 2 * columns - 1))
        self.grid = rows, columns

    def forward(self):
        rows, columns = self.grid
        of_keys = self.bias.unfold(1, rows, 1).unfold(2, columns, 1)  # [heads, h, w, h, w], queries from the last to the first
        return of_keys.flip(1, 2).flatten(3).flatten(1, 2)


class Pyramid(nn.Module):
    """Four maps of an encoder, which the modules of `scaling` bring to strides of 4 to 32 for patches of 16 pixels: of four
    blocks (Li et al. 2021, arXiv 2111.11429; mmsegmentation's BEiT and MAE), or all of the last (ViTDet, arXiv 2203.16527). A
    convolutional stem has the two finest maps itself (ConvMAE), the others are of the last block.

    Positions are interpolated to the grid. [CLS] is left out, as in ViTDet: windows have no place for it.

    Args:
        encoder: a ViT; blocks: numbers of the blocks from 1, in rising order; shape: (H, W) of the images.
        window: side in patches of the windows within which all other blocks attend (14 in Li et al.); 0: all blocks attend to
            the whole grid. Zeros fill a grid up to whole windows; they are attended to, as in ViTDet.
        relative: whether each block has a `RelativeBias`; last: whether only the last block's map is used.
    """

    def __init__(self, encoder, blocks, shape, window=0, relative=True, last=False):
        super().__init__()
        patch = encoder.patch_size
        fits = all(side % patch == 0 for side in shape)
        need(fits, f"--image_size {shape[0]} is not divisible by the patch size {patch}")
        need(min(shape) > patch, f"--image_size {shape[0]} is one patch: too few for a map half as fine")
        need(encoder.depth >= 4, f"the encoder has {encoder.depth} blocks, expected at least the 4 whose maps are used")
        self.encoder, self.blocks, self.last = encoder, blocks, last
        self.grid = tuple(side // patch for side in shape)
        self.windows = [(window, window) if window else self.grid] * encoder.depth
        for i in blocks:
            self.windows[i - 1] = self.grid
        heads = encoder.config["heads"]
        self.biases = nn.ModuleList(RelativeBias(heads, *sides) for sides in self.windows if relative)
        self.biases[: encoder.frozen].requires_grad_(False)  # frozen blocks stay as they are

    def forward(self, x, drop=None):
        """Standardised images [n, 3, H, W] and drop-path factors (see ViT) → maps, before they are scaled: [n, D, rows,
        columns], a convolutional stem's two finer ones [n, D/3, 4 · rows, 4 · columns] and [n, D/2, 2 · rows, 2 · columns]."""
        encoder = self.encoder
        *finer, x = encoder.patch_embed(x, drop=drop)
        positions = resize_positions(encoder.pos_embed, encoder.grid, self.grid)[:, 1:]
        x = encoder.embed_norm(x.flatten(2).mT + positions).unflatten(1, self.grid)
        maps = []
        for i, block in enumerate(encoder.stack()):
            block_drop = None if drop is None else drop[:, i - encoder.depth]
            x = in_windows(block, x, self.windows[i], block_drop, self.biases[i]() if self.biases else None)
            if i + 1 in self.blocks:
                maps.append(x.movedim(-1, 1))
        if self.last or finer:
            maps = [*finer, *maps[-1:] * (4 - len(finer))]
        return maps


def in_windows(block, x, window, drop=None, bias=None):
    """A transformer block within windows of (rows, columns): x [n, h, w, D] → alike."""
    n, h, w, _ = x.shape
    rows, columns = window
    x = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)  # [n, down, across, rows, columns, D]
    windows = x.flatten(3, 4).flatten(0, 2)
    if drop is not None:
        drop = drop.repeat_interleave(len(windows) // n, 0)
    x = block(windows, drop, bias).view_as(x).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :h, :w]


class MapNorm(BatchNorm):
    """BatchNorm2d over all ranks: [n, C, …] → alike, at least float32; n may differ between ranks."""

    def forward(self, x):
        rows = x.movedim(1, -1)
        return super().forward(rows.flatten(0, -2)).view(rows.shape).movedim(-1, 1)


def scaling(pyramid, norm=partial(nn.GroupNorm, 32)):
    """(Modules of a Pyramid's four maps, the channels of what they give): 4 and 2 times as fine as patches by transposed
    convolutions, as fine, half as fine by max-pooling. norm: of maps, given their channels."""
    dim = pyramid.encoder.dim
    coarse = nn.Identity(), nn.MaxPool2d(2)
    if pyramid.encoder.config["stem"] == "conv":
        widths = [norm.normalized_shape[0] for norm in pyramid.encoder.patch_embed.norms]
        return nn.ModuleList([nn.Identity(), nn.Identity(), *coarse]), [*widths, dim]
    half, quarter = (dim // 2, dim // 4) if pyramid.last else (dim, dim)
    twice, again = nn.ConvTranspose2d(dim, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
    finest = nn.Sequential(twice, norm(half), nn.GELU(), again)
    return nn.ModuleList([finest, nn.ConvTranspose2d(dim, half, 2, 2), *coarse]), [quarter, half, dim, dim]


def tune_on_maps(model, stage, stream, objective, schedule, count, s, run):
    """The loop of UperNet and of detection (CMAE 4.3): AdamW with betas 0.9 and 0.999, lr · batch / 256, layer-wise decay and
    drop path in the encoder. With --cost it prints what a step costs and ends the program.

    Args:
        model: has `pyramid`, whose encoder is tuned, and what else is new; stream: a function from what `decode` takes as order
        to batches (x [n, 3, H, W], targets); objective: (targets, key, rows [n], *maps of the pyramid) -> (loss,
        {name: what is logged too}); schedule: as `warmup_cosine`; count: training images; s: FineTuning.
    """
    pyramid, precision = model.pyramid, run.machine.precision
    encoder = pyramid.encoder
    new = nn.ModuleList([pyramid.biases, *(m for m in model.children() if m is not pyramid)])
    peak = s.lr * s.batch / 256
    groups = parameter_groups(encoder, peak, s.weight_decay, s.layer_decay) + parameter_groups(new, peak, s.weight_decay)
    optimizer = adamw(groups, betas=(0.9, 0.999))
    training = Training(run, stage, dict(model=model, optimizer=optimizer), count, s.batch, s.epochs)
    rows = part_of_rank(torch.arange(s.batch))

    def encode(x, drop):
        return tuple(pyramid(x, drop)), None

    data = stream(shuffled(count, s.batch, training.step, training.total, s.seed))
    if run.settings.cost:
        data = measured(training, partial(tuple, next(data)))
    for x, targets in training.steps(data):
        key = s.seed, training.step
        drop = None
        if s.drop_path:
            noise = uniform((*key, "drop"), rows, encoder.residual_blocks, 2, device=x.device)
            drop = drop_path(s.drop_path, noise)
        # in one piece: objective(targets, key, rows, *encode(x, drop)[0])[0].backward()
        loss, parts = backward(encode, partial(objective, targets, key, rows), (x, drop), s.micro_batch, precision)
        set_lr(optimizer, schedule(training.step, training.total, s.warmup * training.total, s.min_lr / peak))
        _, means = training.take_step(optimizer, loss, **parts)
        training.log(means)
        training.save_if_due()
    if run.settings.cost:
        print_table(run.results)
        raise SystemExit(0)


# ------------------------------------------------------------------------------------------------------- segmentation

SEGMENT_LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # C.8: a reduced grid; this is the authors' code's


@dataclass
class Annotated(Images):
    """Images with a label map each, as ADE20K keeps them: class + 1 for every pixel, 0 (or 255) where it counts nowhere."""

    maps: torch.Tensor | np.ndarray = None  # [N, H, W] uint8, or [N] names of files as bytes

    def open_both(self, i):
        """Image i and its label map. If the map has another size, colours, or a number that is no class, the image is
        unreadable: another takes its place, and its name is printed."""
        image, labels = self.open(i), self.maps[i]
        labels = Image.open(os.fsdecode(labels)) if isinstance(labels, bytes) else Image.fromarray(labels.numpy())
        if image.size != labels.size or len(labels.getbands()) > 1:
            raise ValueError(f"its label map is {labels.size} {labels.mode}, expected {image.size} in one channel")
        if labels.mode in ("L", "P"):
            labels = labels.point([*range(255), 0])
        if (largest := labels.getextrema()[1]) > len(self.classes):
            raise ValueError(f"its label map has {largest}, expected 0 to {len(self.classes)}")
        return image, labels


def load_annotated(data, split, classes=150):
    """A split of "shapes" (class 0 is the background, class c + 1 the objects of class c) or of a folder of ADE20K's
    layout: images/training/NAME.jpg with annotations/training/NAME.png, and the same for validation."""
    if data == "shapes":
        images = load_images(data, split)
        maps = 1 + torch.where(images.masks, 1 + images.labels[:, None, None], 0).byte()
        return Annotated(images.labels, ["background", *images.classes], pixels=images.pixels, maps=maps)
    part = {"train": "training", "val": "validation"}[split]
    folder = Path(data, "images", part)
    files = find_files(folder, SUFFIXES)
    layout = "ADE20K's layout, images/ and annotations/ with training/ and validation/ in each"
    need(files, f"--data {data}: there is no {folder} with images; give `shapes` or a folder of {layout}")
    maps = [Path(data, "annotations", part, f"{Path(file).stem}.png") for file in files]
    for path in maps:
        need(path.is_file(), f"--data {data}: no label map {path}; every image needs one")
    labels = torch.full((len(files),), -1)
    need_alike({f"the images of {part}": fingerprint(files, folder, labels)})
    return Annotated(labels, list(range(1, classes + 1)), files=file_names(files), maps=file_names(maps))


def to_labels(label_map):
    """A label map as uint8 [H, W]."""
    return torch.from_numpy(np.array(label_map, np.uint8))


@dataclass
class AnnotatedCrop:
    """Cuts an image and its label map alike, uint8 [3, size, size] and [size, size]: a random crop and flip as a probe's
    (C.3), or with `seed` None C.7's evaluation crop, the shorter edge to `size` and the central square. Labels are those
    of the nearest pixels."""

    size: int
    seed: int = None

    def __call__(self, images, epoch, index):
        both = images.open_both(index)
        square = [self.size, self.size]
        dice = random.Random(repr((self.seed, epoch, index)))
        box = crop_box(dice, both[0].height, both[0].width, (0.08, 1.0))
        flipped = dice.random() < 0.5
        cut = []
        for picture, mode in zip(both, (InterpolationMode.BICUBIC, InterpolationMode.NEAREST)):
            if self.seed is None:
                picture = v2.center_crop(v2.resize(picture, [self.size], mode), square)
            else:
                picture = v2.resized_crop(picture, *box, square, mode)
                picture = v2.horizontal_flip(picture) if flipped else picture
            cut.append(picture)
        return [to_uint8(cut[0]), to_labels(cut[1])]


def annotated_batches(images, order, crop, machine):
    """Yields (standardised images [n, 3, S, S], classes [n, S, S], −1 where a pixel counts nowhere)."""
    for (x, labels), _ in decode(images, order, crop, machine):
        yield augment(x), labels.long() - 1


def pixel_logits(logits, grid, shape):
    """Logits of patches [P, n · L, C] of the grid, upsampled (bilinear, as two matrix products) to pixels [P, n, H, W, C]."""
    rows, columns = (F.interpolate(torch.eye(a).to(logits)[None], b, mode="linear")[0].T for a, b in zip(grid, shape))
    logits = columns @ logits.unflatten(1, (-1, *grid))  # [P, n, h, W, C]
    return (rows @ logits.flatten(3)).unflatten(3, (shape[1], -1))


def mean_iou(confusion):
    """Mean intersection over union, in percent, from counts of pixels [..., classes, predicted classes]. A class that is
    nowhere, neither in truth nor in prediction, is left out of the mean."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 100 * (hits / (confusion.sum(-1) + confusion.sum(-2) - hits)).nanmean(-1)


def segment(encoder, train, val, run, epochs=50, batch=16, lrs=SEGMENT_LRS):
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
    machine, size = run.machine, encoder.config["image_size"]
    blocks = [b for b in range(encoder.depth, encoder.depth - 13, -4) if b > 0]
    torch.manual_seed(0)
    probes = Probes(len(lrs), encoder.dim * len(blocks), len(train.classes)).to(machine.device)
    peaks = torch.tensor(lrs, device=machine.device) * batch / 256
    groups = [dict(params=list(probes.parameters()), peak_lr=1.0)]  # a probe's rate is a weight of its loss
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    training = Training(run, "segment", dict(probes=probes, optimizer=optimizer), len(train), batch, epochs)

    def logits(x, shape):  # [lrs, n, H, W, C]
        with torch.no_grad(), autocast(machine.device, machine.precision):
            tokens = torch.cat(encoder(x, blocks=blocks), -1)[:, 1:]  # [n, L, blocks · D]
        return pixel_logits(probes(promote(tokens).flatten(0, 1)), encoder.grid, shape)

    order = shuffled(len(train), batch, training.step, training.total, 0)
    for x, labels in training.steps(annotated_batches(train, order, AnnotatedCrop(size, 0), machine)):
        counted = gather((labels >= 0).sum()[None]).sum().clamp(min=1)  # pixels of the global batch
        found = logits(x, labels.shape[1:])
        losses = [F.cross_entropy(one.movedim(-1, 1), labels, ignore_index=-1, reduction="sum") for one in found]
        loss = torch.stack(losses) @ peaks * world() / counted
        loss.backward()
        set_lr(optimizer, warmup_cosine(training.step, training.total, training.total // 10))
        _, means = training.take_step(optimizer, loss)
        training.log(means)
        training.save_if_due()
    probes.eval()
    by_lr = mean_iou(pixel_confusion(logits, val, AnnotatedCrop(size), machine, len(lrs))).tolist()
    best = int(np.argmax(by_lr))
    result = dict(miou=by_lr[best], lr=lrs[best], miou_by_lr=dict(zip(lrs, by_lr)), blocks=blocks)
    return result, lambda x: logits(x, x.shape[2:])[best].argmax(-1)


@torch.no_grad()
def pixel_confusion(logits, val, crop, machine, probes=1, batch=16):
    """Counts of all pixels of `val` (Annotated): [P, classes, predicted classes]; logits: (x [n, 3, h, w], (H, W) of the label
    maps) → [P, n, H, W, C] of P probes; crop: makes x and the label maps, alike in size if batch is not 1."""
    classes = len(val.classes)
    confusion = torch.zeros(probes, classes**2, dtype=torch.long, device=machine.device)
    mine = [(0, part) for part in torch.arange(rank(), len(val), world()).split(batch) if len(part)]
    stream = annotated_batches(val, mine, crop, machine)
    for (_, part), (x, labels) in zip(mine, progress(stream, len(mine), "batches segmented")):
        found = logits(x, labels.shape[1:])
        first = val.name(part[0])
        need(found.isfinite().all(), f"logits of the images from {first} on are not finite: look at the encoder's weights")
        of_pixels = (labels * classes + found.argmax(-1))[:, labels >= 0]  # [P, pixels that count]
        confusion = confusion + torch.stack([one.bincount(minlength=classes**2) for one in of_pixels])
    return gather(confusion[None]).sum(0).unflatten(1, (classes, classes))


# UperNet (Xiao et al. 2018, arXiv 1807.10221; CMAE 4.3, Table 3a). The paper follows others and says no more: what is left
# open is mmsegmentation's recipe for MAE. ConvMAE's, which CMAE* follows, has --layer_decay 0.75 --drop_path 0.2.
UPERNET = CROP_FLIP | dict(batch=16, lr=1.6e-3, warmup=1500 / 160_000, layer_decay=0.65, drop_path=0.1)  # lr 1e-4 at batch 16
UPERNET_SHAPES = dict(epochs=0.5, warmup=0.1, lr=4.8e-2, layer_decay=0.75, drop_path=0.0)  # a minute or two: chosen


def to_square(x, size, fill=0):
    """Maps [n, h, w] in the upper left corner of squares [n, size, size]."""
    return v2.pad(x, [0, 0, size - x.shape[2], size - x.shape[1]], fill)


GRAY = [round(value) for value in FILL]


@dataclass
class ScaledCrop:
    """Cuts an image and its label map alike. In training: sides x 0.5-2, where the shorter is `size` at x 1, a random square of
    `size`, of ten tries the first in which no class has more than 75 % of the pixels, flip, photometric distortion; what is
    missing is ImageNet's mean, and counts nowhere. With `seed` None the image at x 1 and the label map at its own size."""

    size: int
    seed: int = None

    def __call__(self, images, epoch, index):
        image, labels = images.open_both(index)
        dice = random.Random(repr((self.seed, epoch, index)))
        factor = 1 if self.seed is None else dice.uniform(0.5, 2)
        factor *= self.size * min(1 / min(image.size), 4 / max(image.size))  # at x 1 no side is longer than 4 · size
        sides = [max(1, round(factor * side)) for side in image.size]
        x = to_uint8(image.resize(sides, Image.Resampling.BILINEAR))
        if self.seed is None:
            return [x, to_labels(labels)]
        both = x, to_labels(labels.resize(sides, Image.Resampling.NEAREST))[None]
        for _ in range(10):
            top, left = (dice.randint(0, max(0, side - self.size)) for side in both[0].shape[1:])
            x, labels = (picture[:, top : top + self.size, left : left + self.size] for picture in both)
            counts = labels.flatten().bincount(minlength=2)[1:]
            if counts.max() < 0.75 * counts.sum():
                break
        if dice.random() < 0.5:
            x, labels = x.flip(-1), labels.flip(-1)
        return [to_square(distort(x, dice), self.size, GRAY), to_square(labels, self.size)[0]]


# Of colours x in [0, 1], by a number u in [-1, 1]
DISTORTIONS = dict(
    brightness=lambda x, u: x + 32 / 255 * u,
    contrast=lambda x, u: x * (1 + u / 2),
    saturation=lambda x, u: v2.adjust_saturation(x, 1 + u / 2),
    hue=lambda x, u: v2.adjust_hue(x, u / 10),
)


def distort(image, dice):
    """Photometric distortion (SSD, Liu et al. 2016; amounts of mmsegmentation) of an image uint8 [3, H, W]: each change with
    probability 0.5, contrast before the two that follow or after them; dice: a random.Random."""
    x = image / 255
    last = ["contrast", "saturation", "hue"] if dice.random() < 0.5 else ["saturation", "hue", "contrast"]
    for name in ["brightness", *last]:
        amount = dice.uniform(-1, 1)
        if dice.random() < 0.5:
            x = DISTORTIONS[name](x, amount).clamp(0, 1)
    return (255 * x).round().byte()


def resized(x, shape):
    """Maps [n, C, h, w], bilinear, at least float32 → [n, C, H, W]."""
    return F.interpolate(promote(x), shape, mode="bilinear")


class UperNet(nn.Module):
    """A Pyramid, UperNet's head on its maps, of `width` channels, and an auxiliary one (FCN) on the third map."""

    def __init__(self, pyramid, classes, width):
        super().__init__()
        convolution = partial(Conv2dNormActivation, norm_layer=MapNorm)
        scales, (*finer, top) = scaling(pyramid, MapNorm)
        pools = (nn.Sequential(nn.AdaptiveAvgPool2d(side), convolution(top, width, 1)) for side in (1, 2, 3, 6))
        self.pools = nn.ModuleList(pools)
        self.pooled = convolution(top + 4 * width, width, 3)
        self.laterals = nn.ModuleList(convolution(w, width, 1) for w in finer)
        self.outputs = nn.ModuleList(convolution(width, width, 3) for _ in finer)
        self.fused = convolution(4 * width, width, 3)
        self.head = nn.Conv2d(width, classes, 1)
        self.auxiliary = convolution(finer[-1], 256, 3)
        self.auxiliary_head = nn.Conv2d(256, classes, 1)
        self.scales = scales
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(m.weight)  # 4.3
        self.pyramid = pyramid

    def forward(self, maps, keep=1, keep_auxiliary=1):
        """The pyramid's maps [n, C, h, w] → logits on the grids of the first and of the third. keep, keep_auxiliary: factors
        of dropout, channel by channel, [n, width, 1, 1] and [n, 256, 1, 1]."""
        *finer, top = (scale(m) for scale, m in zip(self.scales, maps))
        pools = [resized(pool(top), top.shape[2:]) for pool in self.pools]
        levels = [lateral(m) for lateral, m in zip(self.laterals, finer)]
        levels.append(self.pooled(torch.cat([top, *pools], 1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resized(levels[i + 1], levels[i].shape[2:])
        levels[:3] = [output(level) for output, level in zip(self.outputs, levels)]
        x = self.fused(torch.cat([resized(level, levels[0].shape[2:]) for level in levels], 1))
        return self.head(x * keep), self.auxiliary_head(self.auxiliary(finer[2]) * keep_auxiliary)


def slide(function, x, size):
    """A function of squares, images [n, 3, size, size] → [n, C, h, w], on images of any size: the mean, resized, of windows
    that are at most two thirds of their side apart: [n, 3, H, W] → [n, C, H, W]."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, max(0, size - width), 0, max(0, size - height)))
    stride = size * 2 // 3  # 341 for 512
    starts = (range(0, side - size + stride, stride) for side in x.shape[2:])
    total = 0
    for top, left in itertools.product(*starts):
        top, left = min(top, x.shape[2] - size), min(left, x.shape[3] - size)
        found = resized(function(x[..., top : top + size, left : left + size]), (size, size))
        found = F.pad(found, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel that counts the windows of a pixel
        total = total + F.pad(found, (left, x.shape[3] - size - left, top, x.shape[2] - size - top))
    total = total[..., :height, :width]
    return total[:, :-1] / total[:, -1:]


def warmup_linear(step, steps, warmup, end=0.0):
    """As `warmup_cosine`: a linear warm-up, times what falls linearly to `end`."""
    return min(1, (step + 1) / max(1, warmup)) * (1 - (1 - end) * step / steps)


def upernet(encoder, train, val, run, s, size, relative=True):
    """Semantic segmentation by UperNet, whose encoder is tuned with it (CMAE 4.3).

    Maps of blocks 4, 6, 8 and 12 of 12; linear warm-up, then linear to 0; cross-entropy of the head and 0.4 of the auxiliary
    one; dropout of 0.1 of their channels. Tested on whole images in windows. As in mmsegmentation, but without [CLS] (see
    `Pyramid`), a learned scale of the residual branches, and a decay of the relative positions' rate and weights.

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: Annotated; s: FineTuning; size: of crops and windows; relative:
        whether there is a relative position bias.
    Returns:
        as `segment`: {"miou"}, and a function that predicts classes.
    """
    machine = run.machine
    torch.manual_seed(s.seed)
    blocks = [round(encoder.depth * share / 12) for share in (4, 6, 8, 12)]
    pyramid = Pyramid(trainable_copy(encoder, s), blocks, (size, size), relative=relative)
    model = UperNet(pyramid, len(train.classes), encoder.dim).to(machine.device)
    stream = partial(annotated_batches, train, crop=ScaledCrop(size, s.seed), machine=machine)

    def objective(labels, key, rows, *maps):
        noise = uniform((*key, "dropout"), rows, encoder.dim + 256, 1, 1, device=labels.device)
        keep = ((noise >= 0.1) / 0.9).split([encoder.dim, 256], 1)
        pixels = [resized(logits, labels.shape[1:]) for logits in model(maps, *keep)]
        ours, auxiliary = (F.cross_entropy(one, labels, ignore_index=-1, reduction="sum") for one in pixels)
        return (ours + 0.4 * auxiliary) / labels.numel(), {}

    tune_on_maps(model, "segment", stream, objective, warmup_linear, len(train), s, run)
    model.eval()

    def logits(x, shape):  # [1, n, H, W, C]
        with torch.no_grad(), autocast(machine.device, machine.precision):
            found = slide(lambda part: model(pyramid(part))[0], x, size)
        return resized(found, shape).movedim(1, -1)[None]

    confusion = pixel_confusion(logits, val, ScaledCrop(size), machine, batch=1)
    return dict(miou=mean_iou(confusion).item()), lambda x: logits(x, x.shape[2:])[0].argmax(-1)


def map_colours(maps):
    """Label maps [n, H, W] in PASCAL VOC's colours, uint8 [n, 3, H, W]: bits 0, 3, 6 of a number are the highest bits of
    red, 1, 4, 7 those of green, 2, 5, 8 those of blue. 0 is black."""
    colours = torch.zeros(len(maps), 3, *maps.shape[1:], dtype=torch.uint8)
    for bit in range(9):
        colours[:, bit % 3] += (maps.cpu() >> bit & 1).byte() * (128 >> bit // 3)
    return colours


def colours_of(labels):
    """VOC's colours of labels [n], a list of (red, green, blue)."""
    return [tuple(colour) for colour in map_colours(labels[None, None])[0, :, 0].T.tolist()]


def draw_segmentation(path, x, labels, predictions, classes):
    """A picture of images, their labels and what is predicted, in VOC's colours."""
    maps = dict(images=to_bytes(x), labels=map_colours(labels + 1), predictions=map_colours(predictions + 1))
    shown = torch.cat([labels, predictions]).unique() + 1
    names = [["unlabelled", *map(str, classes)][number] for number in shown.tolist()]
    legend = {name: (colour, 4, 0) for name, colour in zip(names, colours_of(shown))}
    draw_rows(path, [(caption, images, None) for caption, images in maps.items()], legend=legend)


def run_segment(
    job,
    *,
    head: Literal["linear", "upernet"] = "linear",  # of frozen features (MIM-Refiner), or tuned with the encoder (CMAE)
    relative: bool = True,  # of UperNet, as all flags but --epochs and --batch: relative position bias
    cost: bool = False,  # train nothing: print what a step costs
    **given,
):
    """Semantic segmentation by a linear classifier of frozen patch features (MIM-Refiner C.7, Table 4; 50 epochs of batch 16,
    on the built-in images 4) or by UperNet (CMAE 4.3, Table 3a; 160 000 steps of batch 16, crops of 512 or --image_size; on
    the built-in images half an epoch, crops of 48); draws the first validation images, their labels and what is predicted, in
    VOC's colours."""
    train, val = load_annotated(job.data, "train"), load_annotated(job.data, "val")
    built_in = job.data == "shapes"
    size = job.encoder.config["image_size"]
    if head == "linear":
        plain = relative and not cost and given.keys() <= {"epochs", "batch"}
        need(plain, "--head linear takes --epochs and --batch; the other settings are UperNet's")
        settings = dict(epochs=4 if built_in else 50, batch=default_batch(16, train)) | given
        check_batch(RunSettings(data=job.data), train, settings["batch"], settings["epochs"])
        result, predict = segment(job.encoder, train, val, job.open_run(settings), **settings)
    else:
        changes = UPERNET | (UPERNET_SHAPES if built_in else dict(epochs=160_000 / max(1, len(train) // 16)))
        size = size if built_in else job.image_size or 512
        s = given_settings(given, train, job.data, "mae", job.encoder, **changes)
        need(s.batch > 1 or cost, "--batch 1: UperNet's BatchNorm of whole images would see one value; only with --cost")
        settings = dict(head=head, size=size, relative=relative) | dataclasses.asdict(s)
        run = Run(job.machine, RunSettings(cost=True)) if cost else job.open_run(settings, s.clip_grad)
        result, predict = upernet(job.encoder, train, val, run, s, size, relative)
    ((x, labels),) = annotated_batches(val, [(0, torch.arange(min(8, len(val))))], AnnotatedCrop(size), job.machine)
    with torch.no_grad():
        predictions = predict(x)
    if rank() == 0:
        draw_segmentation(job.file("segment.png"), x, labels, predictions, val.classes)
    return result | dict(settings=settings)


# ------------------------------------------------------------------------------------------- objects as COCO keeps them


@dataclass
class Objects(Images):
    """Images whose objects have boxes and masks. What is known of an image, its size and its objects in COCO's words, is text
    in one block of memory, which forked workers share."""

    annotations: bytes = b""  # JSON
    spans: np.ndarray = None  # [N, 2], where in it an image's part begins and ends

    def open_both(self, i):
        """Image i and its `target`; it is unreadable if it has another size than the annotations say."""
        image, target = self.open(i), self.target(i)
        height, width = target["masks"].shape[1:]
        if image.size != (width, height):
            raise ValueError(f"it has {image.size} pixels, its annotations are for {(width, height)}")
        return image, target

    def target(self, i):
        """The objects of image i: boxes [m, 4] in pixels (left, top, right, bottom), labels [m] from 1, masks [m, H, W] bool,
        area [m], crowd [m] bool (a group whose members are not told apart: no training example), image_id."""
        start, end = self.spans[i].tolist()
        known = json.loads(self.annotations[start:end])  # {"id", "width", "height", "objects": [{"label", "bbox", …}, …], …}
        objects, size = known["objects"], (known["height"], known["width"])
        masks = torch.zeros(len(objects), *size, dtype=torch.bool)
        for mask, o in zip(masks.numpy(), objects):
            mask[:] = draw_mask(o["segmentation"], *size)
        return dict(
            boxes=box_convert(torch.tensor([o["bbox"] for o in objects]).view(-1, 4), "xywh", "xyxy"),
            labels=torch.tensor([o["label"] for o in objects], dtype=torch.long),
            masks=masks,
            area=torch.tensor([o["area"] for o in objects], dtype=torch.float64),
            crowd=torch.tensor([o["iscrowd"] for o in objects], dtype=torch.bool),
            image_id=known["id"],
        )


def with_annotations(known, classes, **images):
    """Objects from what is known of each image."""
    texts = [json.dumps(one).encode() for one in known]
    ends = np.cumsum([0, *map(len, texts)])
    spans = np.stack([ends[:-1], ends[1:]], 1)
    return Objects(torch.full((len(known),), -1), classes, annotations=b"".join(texts), spans=spans, **images)


def load_objects(data, split):
    """A split of `scenes` (for "shapes") or of a folder of COCO's layout: train2017/, val2017/ with the images and
    annotations/instances_train2017.json, instances_val2017.json. Labels count the categories from 1, in the order of their
    numbers. Objects without size are left out, and named; images without objects are kept."""
    if data == "shapes":
        return scenes(split)
    folder, path = Path(data, f"{split}2017"), Path(data, "annotations", f"instances_{split}2017.json")
    layout = "COCO's layout, train2017/, val2017/ and annotations/instances_*.json"
    need(folder.is_dir(), f"--data {data}: there is no {folder}; give `shapes` or a folder of {layout}")
    content = read_json(path, f"give a folder of {layout}")
    with understanding(path):
        names = {c["id"]: c["name"] for c in content["categories"]}
        label = {number: i for i, number in enumerate(sorted(names), 1)}
        known = {}
        for image in content["images"]:
            kept = {name: image[name] for name in ("id", "file_name", "height", "width")}
            known[image["id"]] = kept | dict(objects=[])
        flat = []
        for o in content["annotations"]:
            number, image, category = o["id"], o["image_id"], o["category_id"]
            listed = image in known and category in label
            need(listed, f"{path}: annotation {number} has image {image}, category {category}: one of them is not listed there")
            if min(o["bbox"][2:]) > 0 and any(o["segmentation"]):
                own = dict(label=label[category], area=o["area"], iscrowd=o.get("iscrowd", 0))
                known[image]["objects"].append(o | own)
            else:
                flat.append(str(number))
        known = [known[number] for number in sorted(known)]
        missing = sorted({image["file_name"] for image in known} - set(os.listdir(folder)))
    need(not missing, f"{path}: {len(missing)} of {len(known)} images are not in {folder}: {', '.join(missing[:3])}")
    counts = [len(image["objects"]) for image in known]
    need_alike({f"the images of {split}": ([image["file_name"] for image in known], counts)})
    print0(f"{path}: {len(known)} images, {counts.count(0)} without objects, {sum(counts)} objects, {len(label)} classes")
    if flat:
        print0(f"left out for want of a size or an outline: annotations {', '.join(flat[:9])} ({len(flat)})")
    files = file_names([folder / image["file_name"] for image in known])
    return with_annotations(known, [names[number] for number in label], files=files)


def draw_mask(segmentation, height, width):
    """An object's mask, bool [height, width], from COCO's "segmentation": a list of polygons (x, y, x, y, …), of which it
    is the union, or the lengths of runs of 0 and 1 by turns, column after column, as a list or as text."""
    if isinstance(segmentation, list):
        return np.any([fill_polygon(polygon, height, width) for polygon in segmentation], 0)
    counts = segmentation["counts"]
    counts = np.array(counts if isinstance(counts, list) else read_counts(counts))
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"the runs of a mask fill {counts.sum()} pixels, the image has {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def read_counts(text):
    """Run lengths from COCO's text: six bits a character from "0" on, the lower five first; the sixth says that more
    follow, the fifth of the last is the sign. From the fourth length on it is the difference to the last but one."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def fill_polygon(polygon, height, width):
    """The pixels in a polygon (x, y, x, y, …) by COCO's rule, bool [height, width].

    The outline is drawn on a grid five times as fine, from corner to corner in steps of one along an edge's longer axis.
    Where it passes the middle of a column of pixels, all that follow, column after column, change sides.
    """
    corners = (5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(int)
    edges = []
    for a, b in zip(corners, np.roll(corners, -1, 0)):
        longer = abs(b - a).argmax()
        low, high = (a, b) if a[longer] <= b[longer] else (b, a)  # either direction is drawn from the lower end
        steps = np.arange(low[longer], high[longer] + 1)
        edge = (np.linspace(low, high, len(steps)) + 0.5).astype(int)
        edge[:, longer] = steps
        edges.append(edge if low is a else edge[::-1])
    point = np.concatenate(edges)
    x, y = np.minimum(point[1:], point[:-1])[point[1:, 0] != point[:-1, 0]].T
    column, part = np.divmod(x, 5)
    row = ((y + 2) // 5).clip(0, height)
    passed = (part == 2) & (column >= 0) & (column < width)
    changes = np.bincount((column * height + row)[passed], minlength=height * width + 1)
    return (changes[:-1].cumsum(dtype=np.uint8) % 2 == 1).reshape(width, height).T


def run_lengths(mask):
    """A mask [H, W] as COCO's run lengths, column after column, 0 first."""
    flat = np.asarray(mask).T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(changes, prepend=0, append=len(flat)).tolist()


def scenes(split):
    """Up to four objects of `shapes`, larger and smaller ones, which may hide each other, on patchworks of 64 x 64 pixels:
    2000 to train on, 500 to validate, drawn as `shapes` are. The masks are of what is seen, if that is at least 40 pixels."""
    count, size = {"train": 2000, "val": 500}[split], 64
    y, x = pixel_centres(size)
    pixels, known = [], []
    for index in torch.arange(count).split(50):
        dice = Dice(("scenes", split), index, 100, 2)
        sites = [(dice.between(0, size), dice.between(0, size)) for _ in range(5)]
        image = patchwork(dice, x, y, sites)
        owner = torch.zeros(len(index), size, size, dtype=torch.long)  # of a pixel: 16 · object + label; 0: the background
        objects = dice.between(0, 5).long()
        for k in range(1, 5):
            c = dice.between(0, 10).long()  # [n, 1, 1]
            radius, angle = dice.between(8, 16), dice.between(0, 2 * math.pi)
            cx, cy = (radius + (size - 2 * radius) * dice.between(0, 1) for _ in range(2))
            looks = radius, angle, cx, cy, *dice.shades(c)
            for label in range(1, 11):
                rows = ((c + 1 == label) & (k <= objects)).flatten().nonzero()[:, 0]
                image[rows], inside = paint(image[rows], x, y, label - 1, *(value[rows] for value in looks))
                owner[rows] = torch.where(inside[:, 0] > 0.5, 16 * k + label, owner[rows])
        pixels.append(noisy_bytes(image, uniform(("scenes", split, "noise"), index, 3, size, size)))
        for i, whose in zip(index.tolist(), owner):
            numbers, areas = whose[whose > 0].unique(return_counts=True)
            seen = [in_cocos_words(whose == number, number.item() % 16) for number in numbers[areas >= 40]]
            known.append(dict(id=i, width=size, height=size, objects=seen))
    return with_annotations(known, SHAPE_NAMES, pixels=torch.cat(pixels))


def in_cocos_words(mask, label):
    """An object of a mask [H, W] that is not empty."""
    left, top, right, bottom = masks_to_boxes(mask[None])[0].tolist()  # the outermost pixels
    bbox = [left, top, right + 1 - left, bottom + 1 - top]
    return dict(label=label, bbox=bbox, area=mask.sum().item(), iscrowd=0, segmentation=dict(counts=run_lengths(mask)))


# COCO's average precision: an overlap of 0.5, 0.55 … 0.95 is asked for, precision is read at recalls of 0, 0.01 … 1, and
# objects are all, small, medium or large, by their area in pixels.
OVERLAPS = torch.from_numpy(np.linspace(0.5, 0.95, 10))
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
AREAS = torch.tensor([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])


def within(area):
    """Whether objects of an area [n] are part of each of AREAS: [n, 4]."""
    return (area[:, None] >= AREAS[:, 0]) & (area[:, None] <= AREAS[:, 1])


def compare(found, truth, kind):
    """What `average_precision` needs to know of one image: of each detection, the surest first, its score, its label and
    whether it is right or wrong, [D, 4, 10] by AREAS and OVERLAPS (neither if it has an object that does not count, or none
    and another area); of each object its label and whether it counts, [G, 4].

    Args:
        found: {"scores" [D], "labels" [D], and "boxes" [D, 4] or "masks" [D, H, W] bool}; truth: see `Objects.target`;
        kind: "boxes" or "masks", which are compared.
    """
    order = found["scores"].argsort(descending=True, stable=True)
    found = {name: found[name][order].cpu() for name in ("scores", "labels", kind)}
    a, b = (side[kind].double().flatten(1) for side in (found, truth))
    if kind == "masks":
        inside, area, of_truth = a @ b.T, a.sum(1), b.sum(1)
    else:
        low = torch.maximum(a[:, None, :2], b[:, :2])
        high = torch.minimum(a[:, None, 2:], b[:, 2:])
        inside, area, of_truth = (high - low).clamp(min=0).prod(-1), box_area(a), box_area(b)
    crowd = truth["crowd"]
    union = area[:, None] + torch.where(crowd, 0, of_truth - inside)  # a crowd may be overlapped in part
    iou = inside / torch.where(inside > 0, union, 1)
    iou[found["labels"][:, None] != truth["labels"]] = 0  # below all overlaps
    counts = within(truth["area"]) & ~crowd[:, None]
    objects = match(iou, crowd, counts.T)
    right = (objects & counts.T[:, None]).any(-1)
    wrong = ~objects.any(-1) & within(area)[..., None]
    del found[kind]
    return found | dict(right=right, wrong=wrong, true_labels=truth["labels"], counts=counts, image_id=truth["image_id"])


def match(iou, crowd, counts):
    """COCO's matching in one image: detections, the surest first, take the free object that they overlap most (of equals the
    last), one that counts before one that does not; a crowd is always free.

    Args:
        iou [D, G], crowd [G]; counts [4, G]: which objects count, by AREAS.
    Returns:
        which object a detection takes, if any, [D, 4, 10, G], by AREAS and OVERLAPS.
    """
    objects = torch.zeros(len(iou), len(AREAS), len(OVERLAPS), len(crowd), dtype=torch.bool)
    for d, overlap in enumerate(iou):
        free = (crowd | ~objects[:d].any(0)) & (overlap >= OVERLAPS[:, None])
        counting = free & counts[:, None]
        free = torch.where(counting.any(-1, keepdim=True), counting, free)
        most = torch.where(free, overlap, 0).cummax(-1).indices[..., -1:]  # of equals the last
        objects[d] = free & (torch.arange(len(crowd)) == most)
    return objects


def precision_table(scores, right, wrong, wanted):
    """Precision of a class at each of AREAS, OVERLAPS and RECALLS, [4, 10, 101]: the best from that recall on; nan for an area
    without objects. scores [D], right, wrong [D, 4, 10]: of `compare`, by image; wanted [4]: objects that count."""
    order = scores.argsort(descending=True, stable=True)
    right, wrong = (flags[order].movedim(0, -1).cumsum(-1).double() for flags in (right, wrong))
    precision = right / (right + wrong + torch.finfo(torch.double).eps)
    precision = F.pad(precision.flip(-1).cummax(-1).values.flip(-1), (0, 1))  # 0 for recalls that are not reached
    recall = right / wanted[:, None, None]
    table = precision.gather(-1, torch.searchsorted(recall, RECALLS.repeat(*recall.shape[:2], 1)))
    table[wanted == 0] = math.nan
    return table


def average_precision(images):
    """COCO's average precision, in percent, of images seen by `compare`, of at most 100 detections each; nan where there are
    no objects."""
    images = sorted(images, key=lambda image: image["image_id"])
    names = ("labels", "scores", "right", "wrong", "true_labels", "counts")
    labels, *of_found, true_labels, counts = (torch.cat([image[name] for image in images]) for name in names)
    tables = [torch.empty(0, 4, 10, 101)]
    for label in true_labels.unique():
        mine = [values[labels == label] for values in of_found]
        tables.append(precision_table(*mine, counts[true_labels == label].sum(0))[None])
    of_all, small, medium, large = torch.cat(tables).unbind(1)
    parts = dict(AP=of_all, AP50=of_all[:, 0], AP75=of_all[:, 5], small=small, medium=medium, large=large)
    return {name: 100 * part.nanmean().item() for name, part in parts.items()}


# ----------------------------------------------------------------------------------------------------------- detection


class SimpleNeck(FeaturePyramidNetwork):
    """Its layers without the way from coarse to fine maps (ViTDet)."""

    def forward(self, x):
        maps = [layer(inner(m)) for inner, layer, m in zip(self.inner_blocks, self.layer_blocks, x.values())]
        maps, names = self.extra_blocks(maps, maps, list(x))
        return dict(zip(names, maps))


class ProposalConvolutions(nn.Module):
    """Two convolutions of the proposals, each with a norm and ReLU: a list of maps [n, C, h, w] → alike. A BatchNorm sees the
    positions of all maps together, so that its running statistics are those of each step."""

    def __init__(self, width, norm):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)  # torchvision's
            nn.init.zeros_(layer.bias)

    def forward(self, maps):
        for layer, norm in zip(self.layers, self.norms):
            maps = [layer(m) for m in maps]
            rows = norm(torch.cat([m.flatten(2) for m in maps], 2)).relu()
            parts = rows.split([m.shape[2:].numel() for m in maps], 2)
            maps = [part.view_as(m) for part, m in zip(parts, maps)]
        return maps


def at_least_float32(module, inputs, outputs):
    """A forward hook: what boxes and losses are computed from."""
    return tuple([promote(m) for m in part] if isinstance(part, list) else promote(part) for part in outputs)


def sample(count, share, key, rows, labels):
    """Which anchors or proposals of each image are trained on: `count`, of which at most a `share` are objects. torchvision's
    BalancedPositiveNegativeSampler, with draws that depend on the key and the image's row alone.

    labels: of each image [A], from 1 for objects, 0 for the background, −1 for neither. Returns masks [A] of the objects and
    of the background, a list of each.
    """
    objects, others = [], []
    for one, row in zip(labels, rows.split(1)):
        order = uniform(key, row, len(one), device=one.device)[0].argsort(stable=True)
        chosen = order[one[order] > 0][: int(count * share)]
        rest = order[one[order] == 0][: count - len(chosen)]
        nothing = torch.zeros_like(one, dtype=torch.uint8)
        objects.append(nothing.index_fill(0, chosen, 1))
        others.append(nothing.index_fill(0, rest, 1))
    return objects, others


class Detector(MaskRCNN):
    """Mask R-CNN (He et al. 2017) on a Pyramid, as Li et al. 2021 (arXiv 2111.11429) build it: FPN; a region proposal network
    with two convolutions; four convolutions and a linear layer for boxes, four for masks; BatchNorm over all ranks in all of
    them (mmdetection has none in the proposals). With the last block's pyramid it is ViTDet's: LayerNorm, none in the
    proposals, no FPN, but no decomposed relative positions.

    torchvision's parts, which differ from theirs: smooth L1 (β = 1/9) for boxes, RoIAlign without its shift of half a pixel.

    Args:
        encoder: a ViT whose patch size is a power of two; classes: their number; size: side of the images.
        pyramid: of "four" evenly spaced blocks, or of the "last"; window, relative: of `Pyramid`; width: of the maps and
            convolutions; rois: proposals an image that are trained on.
    """

    def __init__(self, encoder, classes, size, pyramid="four", window=14, relative=True, width=256, rois=512):
        patch, last = encoder.patch_size, pyramid == "last"
        level = round(math.log2(patch))
        need(2**level == patch, f"the encoder's patches have {patch} pixels: torchvision's detectors need a power of two")
        neck, norm, rpn_norm, norm_of_scales = FeaturePyramidNetwork, MapNorm, MapNorm, partial(nn.GroupNorm, 32)
        if last:
            neck, norm, rpn_norm, norm_of_scales = SimpleNeck, LayerNorm2d, nn.Identity, LayerNorm2d
        blocks = [encoder.depth * i // 4 for i in (1, 2, 3, 4)]
        maps = Pyramid(encoder, blocks, (size, size), window, relative, last)
        scales, widths = scaling(maps, norm_of_scales)
        neck = neck(widths, width, LastLevelMaxPool(), norm)
        neck.out_channels = width
        pool = partial(MultiScaleRoIAlign, "0123", sampling_ratio=0, canonical_scale=14 * patch, canonical_level=level)
        super().__init__(
            neck,
            rpn_anchor_generator=AnchorGenerator([[side * patch] for side in (2, 4, 8, 16, 32)], [[0.5, 1.0, 2.0]] * 5),
            rpn_head=RPNHead(width, 3, conv_depth=0),
            rpn_pre_nms_top_n_train=4 * rois,
            rpn_pre_nms_top_n_test=2 * rois,
            rpn_post_nms_top_n_train=2 * rois,
            rpn_post_nms_top_n_test=2 * rois,
            box_roi_pool=pool(output_size=7),
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], norm),
            box_predictor=FastRCNNPredictor(1024, classes + 1),
            mask_roi_pool=pool(output_size=14),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        )
        self.pyramid, self.scales, self.size, self.rois = maps, scales, (size, size), rois
        self.rpn.convolutions = ProposalConvolutions(width, rpn_norm)
        for part in (self.rpn.head, self.roi_heads.box_predictor):
            part.register_forward_hook(at_least_float32)

    def neck(self, maps):
        """The pyramid's maps → ({name: map [n, width, h, w]} of five, the last half as fine as the fourth; a list of those on
        which proposals are made)."""
        levels = self.backbone({str(i): scale(m) for i, (scale, m) in enumerate(zip(self.scales, maps))})
        return levels, [promote(m) for m in self.rpn.convolutions(levels.values())]  # whose type the anchors take

    def propose(self, maps, targets=None):
        """torchvision's proposals [P, 4] of each image, and with targets its losses."""
        n = len(maps[0])
        images = ImageList(torch.empty(n, 3, *self.size, device="meta"), [self.size] * n)
        return self.rpn(images, dict(enumerate(maps)), targets)

    def losses(self, maps, targets, key, rows):
        """Of each image {"rpn", "boxes", "masks"}: [n], each divided by what is trained on in this image (torchvision divides
        by that of all images).

        Args:
            maps: of the pyramid; targets: of each image {boxes [m, 4], labels [m], masks [m, S, S]}; key, rows [n]: of draws.
        """
        levels, maps = self.neck(maps)
        proposals, losses = [], dict(rpn=[], boxes=[], masks=[])
        for i, row in enumerate(rows.split(1)):
            self.rpn.fg_bg_sampler = partial(sample, 256, 0.5, (*key, "anchors"), row)
            found, of_image = self.propose([m[i : i + 1] for m in maps], targets[i : i + 1])
            proposals += found
            losses["rpn"].append(sum(of_image.values()))
        heads, sizes = self.roi_heads, [self.size] * len(targets)
        heads.fg_bg_sampler = partial(sample, self.rois, 0.25, (*key, "proposals"), rows)
        proposals, matched, labels, shifts = heads.select_training_samples(proposals, targets)
        found = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, proposals, sizes)))
        logits, moves = (part.split([len(p) for p in proposals]) for part in found)
        objects = [label > 0 for label in labels]
        proposals = [part[chosen] for part, chosen in zip(proposals, objects)]
        masks = promote(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, proposals, sizes))))
        masks = masks.split([len(p) for p in proposals])
        for i, target in enumerate(targets):
            of_image = roi_heads.fastrcnn_loss(logits[i], moves[i], labels[i : i + 1], shifts[i : i + 1])
            losses["boxes"].append(sum(of_image))
            truth = [target["masks"]], [target["labels"]], [matched[i][objects[i]]]
            losses["masks"].append(roi_heads.maskrcnn_loss(masks[i], proposals[i : i + 1], *truth))
        return {name: torch.stack(column) for name, column in losses.items()}

    @torch.no_grad()
    def detect(self, x, sizes):
        """Objects of standardised images x [n, 3, S, S]: of each {boxes [m, 4], labels [m], scores [m], masks [m, H, W]}, in
        the pixels of the original images; sizes: their (H, W), of which the longer side filled S."""
        levels, maps = self.neck(self.pyramid(x))
        proposals, _ = self.propose(maps)
        found, _ = self.roi_heads(levels, proposals, [self.size] * len(x))
        for one, (height, width) in zip(found, sizes):
            seen = [max(1, round(side * self.size[0] / max(height, width))) for side in (height, width)]
            boxes = clip_boxes_to_image(resize_boxes(one["boxes"], seen, (height, width)), (height, width))
            kept = remove_small_boxes(boxes, 1e-2)  # in the gray nothing is left of them
            one |= {name: value[kept] for name, value in (one | dict(boxes=boxes)).items()}
            one["masks"] = roi_heads.paste_masks_in_image(one["masks"].float(), one["boxes"], (height, width))[:, 0] > 0.5
        return found


@dataclass
class ObjectCrop:
    """Cuts an image, uint8 [3, size, size], and its objects; in training by large-scale jitter (Ghiasi et al. 2021): the longer
    side becomes `scales` of the size, of what is larger a random part is kept; flips. Crowds are left out, boxes are those of
    the masks that are left. With `seed` None the longer side becomes the size, and objects are the original's.

    What is smaller stands in the upper left corner, on gray.
    """

    size: int
    scales: tuple = (0.1, 2.0)
    seed: int = None

    def __call__(self, images, epoch, index):
        image, target = images.open_both(index)
        scale, places = 1.0, (0.0, 0.0)
        dice = random.Random(repr((self.seed, epoch, index)))
        if self.seed is not None:
            scale = dice.uniform(*self.scales)
            places = dice.random(), dice.random()
        ratio = scale * self.size / max(image.size)
        (left, right, column), (top, bottom, row) = (self.span(*side, ratio) for side in zip(image.size, places))
        part = image.resize((len(column), len(row)), Image.Resampling.BILINEAR, (left, top, right, bottom))
        x = to_square(to_uint8(part), self.size, GRAY)
        if self.seed is None:
            return [x, target]
        known = ~target["crowd"]
        masks, labels = to_square(target["masks"][known][:, row][:, :, column], self.size), target["labels"][known]
        if dice.random() < 0.5:
            x, masks = x.flip(-1), masks.flip(-1)
        seen = masks.flatten(1).any(1)
        boxes = masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])  # to the far edges of the last pixels
        return [x, dict(boxes=boxes, labels=labels[seen], masks=masks[seen])]

    def span(self, side, place, ratio):
        """What is kept of a side in pixels: where it begins and ends, and the nearest pixel of each that it becomes."""
        scaled = max(1, round(side * ratio))
        count = min(scaled, self.size)
        start = int(place * (scaled - count + 1))
        pixels = (start + torch.arange(count) + 0.5) * side / scaled
        return start * side / scaled, (start + count) * side / scaled, pixels.long()


def searched(detector, images, order, machine):
    """Yields (indices, what a Detector finds, the objects) for each (0, indices) of `order`, the latter two of each image."""
    detector.eval()
    for (x, truths), index in decode(images, order, ObjectCrop(detector.size[0]), machine):
        sizes = [tuple(truth["masks"].shape[1:]) for truth in truths]
        with autocast(machine.device, machine.precision):
            yield index, detector.detect(augment(x), sizes), truths


def detection_scores(detector, val, machine):
    """COCO's average precision of boxes and of masks, {"boxes": {"AP": in percent, …}, "masks": likewise}."""
    order = [(0, part) for part in torch.arange(len(val))[rank() :: world()].split(8) if len(part)]
    compared = {"boxes": [], "masks": []}
    for _, found, truths in progress(searched(detector, val, order, machine), len(order), "batches of images searched"):
        for kind, rows in compared.items():
            rows += map(partial(compare, kind=kind), found, truths)
    of_ranks = [compared] * world()
    if world() > 1:
        dist.all_gather_object(of_ranks, compared)
    return {kind: average_precision(sum((part[kind] for part in of_ranks), [])) for kind in compared}


# Mask R-CNN in CMAE's Table 3b, after Li et al. 2021: lr 1e-4 at batch 64, a quarter of an epoch warm-up
MASK_RCNN = CROP_FLIP | dict(epochs=100, warmup=0.0025, batch=64, lr=4e-4, weight_decay=0.1, layer_decay=1.0, drop_path=0.1)


def detect(encoder, train, run, s, size=1024, scales=(0.1, 2.0), **kind):
    """Mask R-CNN, whose encoder is tuned with it (CMAE 4.3, Table 3b), cosine to 0.

    Args:
        encoder: a ViT, of which a copy is tuned; train: Objects; run: a Run, which keeps checkpoints if it has a folder;
        s: FineTuning; size: side of the images; scales: of `ObjectCrop`; kind: what else `Detector` takes.
    Returns:
        the Detector after the last epoch.
    """
    machine = run.machine
    torch.manual_seed(s.seed)
    detector = Detector(trainable_copy(encoder, s), len(train.classes), size, **kind).to(machine.device)

    def stream(order):
        for (x, targets), _ in decode(train, order, ObjectCrop(size, scales, s.seed), machine):
            yield augment(x), [{name: v.to(machine.device) for name, v in target.items()} for target in targets]

    def objective(targets, key, rows, *maps):
        means = {name: loss.mean() for name, loss in detector.losses(maps, targets, key, rows).items()}
        return sum(means.values()), {name: loss.detach() for name, loss in means.items()}

    tune_on_maps(detector, "detect", stream, objective, warmup_cosine, len(train), s, run)
    return detector


def marked(image, objects):
    """An image, uint8 [3, H, W], with the masks and boxes of its objects in VOC's colours of their classes."""
    if len(objects["labels"]) == 0:
        return image
    colours = colours_of(objects["labels"])
    image = draw_segmentation_masks(image, objects["masks"].cpu(), alpha=0.5, colors=colours)
    return draw_bounding_boxes(image, objects["boxes"].cpu(), colors=colours)


def draw_objects(path, detector, val, machine):
    """A picture of the first validation images, their objects, and those of which a Detector is at least half sure."""
    ((index, found, truths),) = searched(detector, val, [(0, torch.arange(min(8, len(val))))], machine)
    images = [to_uint8(val.open(i)) for i in index.tolist()]
    sure = [{name: values[one["scores"] >= 0.5] for name, values in one.items()} for one in found]
    rows = {"images": images, "objects": map(marked, images, truths)}
    rows["detected, at least half sure"] = map(marked, images, sure)
    labels = torch.cat([one["labels"].cpu() for one in (*truths, *sure)]).unique()
    legend = {str(val.classes[i - 1]): (colour, 4, 0) for i, colour in zip(labels.tolist(), colours_of(labels))}
    draw_rows(path, [(caption, list(row), None) for caption, row in rows.items()], side=128, legend=legend)


def run_detect(
    job,
    *,
    pyramid: Literal["four", "last"] = "four",  # maps of four blocks, or all of the last (ViTDet)
    relative: bool = True,  # relative position bias
    cost: bool = False,  # train nothing: print what a step costs
    **given,
):
    """Object detection and instance segmentation by Mask R-CNN, tuned with the encoder (CMAE 4.3, Table 3b), on COCO or on
    scenes of built-in shapes. --image_size is 1024 by default, 64 for the scenes. Writes detector.pt and draws the first
    validation images."""
    train, val = load_objects(job.data, "train"), load_objects(job.data, "val")
    need(train.classes == val.classes, f"--data {job.data}: training and validation list different categories")
    size, scales, changes = 1024, (0.1, 2.0), MASK_RCNN
    kind = dict(pyramid=pyramid, relative=relative)
    if job.data == "shapes":  # chosen on an untrained encoder
        size, scales = 64, (0.8, 1.25)
        kind |= dict(window=0, width=64, rois=32)
        changes = changes | dict(epochs=3, warmup=0.1, batch=8, lr=1.6e-2)
    if pyramid == "last":
        changes = changes | dict(layer_decay=0.7)
    size = job.image_size or size
    s = given_settings(given, train, job.data, "mae", job.encoder, **changes)
    settings = dict(image_size=size) | kind | dataclasses.asdict(s)
    run = Run(job.machine, RunSettings(cost=True)) if cost else job.open_run(settings, s.clip_grad)
    detector = detect(job.encoder, train, run, s, size, scales, **kind)
    result = detection_scores(detector, val, job.machine)
    if rank() == 0:
        save_file(job.file("detector.pt"), dict(detector=detector.state_dict(), classes=val.classes, settings=settings))
        draw_objects(job.file("detect.png"), detector, val, job.machine)
    return result | dict(settings=settings)


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
        dice = random.Random(repr((self.seed, epoch, index)))
        clip = videos.open_clip(index)
        views = []
        for offset in [(k + 0.5) / self.temporal for k in range(self.temporal)] or [dice.random()]:
            pictures = [clip.frame(int((t + offset) * clip.length / self.frames)) for t in range(self.frames)]
            for top, left, h, w in self.boxes(dice, *pictures[0].size):
                how = (self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + w, top + h)
                views.append(torch.stack([to_uint8(picture.resize(*how)) for picture in pictures]))
        if not self.temporal and dice.random() < 0.5:
            views[0] = views[0].flip(-1)
        return views

    def boxes(self, dice, width, height):
        """(top, left, height, width) of a random crop, or of the squares."""
        if not self.temporal:
            return [crop_box(dice, height, width, (0.5, 1.0))]
        side = min(width, height)
        places = np.linspace(0, 1, self.spatial) if self.spatial > 1 else [0.5]
        return [(round((height - side) * p), round((width - side) * p), side, side) for p in places]


def standardise_clips(clips):
    """uint8 [N, T, 3, S, S] → standardised, alike."""
    return augment(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


class ClipClassifier(Classifier):
    """A Classifier of clips: standardised [N, T, 3, S, S] → logits [N, C].

    how: "frames": the mean of the frames' features; "joint": the patch tokens of all frames in one sequence behind one
    [CLS], with a learned embedding a frame that starts at zero.
    """

    def __init__(self, encoder, classes, frames, how):
        super().__init__(encoder, classes)
        self.how = how
        if how == "joint":
            self.time = nn.Embedding(frames, encoder.dim)
            nn.init.zeros_(self.time.weight)

    def feature(self, x, drop=None):
        n, t = x.shape[:2]
        drop_frames = None if drop is None else drop.repeat_interleave(t, 0)
        tokens = self.encoder.embed(x.flatten(0, 1), drop=drop_frames)  # [N · T, 1 + L, D]
        if self.how == "joint":
            patches = tokens[:, 1:].unflatten(0, (n, t)) + self.time.weight[:, None]
            tokens = torch.cat([tokens[::t, :1], patches.flatten(1, 2)], 1)  # [N, 1 + T · L, D]
        else:
            drop = drop_frames
        for i, block in enumerate(self.encoder.stack()):
            tokens = block(tokens, None if drop is None else drop[:, i - self.encoder.depth])
        return self.encoder.pooled(self.encoder.norm(tokens)).unflatten(0, (n, -1)).mean(1)


def multi_view(classifier, videos, cut, machine, batch=32):
    """The average of all views' probabilities (ViC-MAE Section 4, "K x 3"), [N, C], and the labels [N]."""

    def probabilities(views):
        return sum(classifier(standardise_clips(view)).softmax(1) for view in views) / len(views)

    order = [(0, part) for part in part_of_rank(torch.arange(len(videos))).split(batch)]
    return one_pass(probabilities, decode(videos, order, cut, machine), videos, machine, len(videos), len(order))


def video(encoder, train, val, run, s, frames, how, temporal, spatial):
    """Fine-tuning on videos, or with s.blocks = 0 a probe, and multi-view testing (ViC-MAE Section 4).

    Args:
        encoder: a ViT, of which a copy is tuned; train, val: labelled Videos; s: FineTuning, of which the augmentation of
        images is not used; frames, how: of `Clips` and `ClipClassifier`; temporal, spatial: views at test time.
    Returns:
        what `tune` returns, by the central view; "video" and "top5", the accuracies of all views in percent.
    """
    machine = run.machine
    size = encoder.config["image_size"]
    torch.manual_seed(s.seed)
    classifier = ClipClassifier(trainable_copy(encoder, s), train.classes, frames, how).to(machine.device)
    if how == "joint":
        classifier.time.requires_grad_(s.blocks != 0)  # else every block would compute gradients
    targets = F.one_hot(train.labels, len(train.classes)).float().to(machine.device)
    rows = part_of_rank(torch.arange(s.batch))

    def stream(training):
        order = shuffled(len(train), s.batch, training.step, training.total, s.seed)
        for views, index in decode(train, order, Clips(frames, size, seed=s.seed), machine):
            yield standardise_clips(views[0]), targets[index], rows

    validate = partial(multi_view, classifier, val, Clips(frames, size, temporal=1), machine)
    result = tune(classifier, stream, len(train), validate, s, run)
    probabilities, y = multi_view(classifier, val, Clips(frames, size, temporal, spatial), machine)
    return {"video": accuracy(probabilities, y)} | result | top5(probabilities, y)


def run_video(
    job,
    *,
    how: Literal["frames", "joint"] = "joint",  # mean of the frames' features, or of all patches in one sequence
    label: Literal["class", "motion"] = "class",  # what is told; motion: the second label of moving_shapes
    frames: Count = 4,  # number of frames of a clip
    temporal: Count | None = None,  # temporal views at test time; default 7 (Section 4), moving_shapes 3
    spatial: Count | None = None,  # squares cut from each of these; default 3, moving_shapes 1: its videos are square
    **given,
):
    """Fine-tuning on videos, or with --blocks 0 a probe, and multi-view testing (ViC-MAE Section 4, Table 8)."""
    built_in = job.data in ("shapes", "moving_shapes")
    data = "moving_shapes" if built_in else job.data
    train, val = load_splits(data, labels=True, load=load_videos)
    need(val is not None, f"--data {data}: expected labelled videos, train/CLASS/VIDEO and val/CLASS/VIDEO")
    if label == "motion":
        need(train.motions is not None, f"--label motion: --data {data} has no second label, moving_shapes has")
        train, val = (dataclasses.replace(videos, labels=videos.motions, classes=MOTIONS) for videos in (train, val))
    changes = dict(epochs=4, warmup=0.1, batch=32, lr=8e-3) if built_in else {}  # chosen
    s = given_settings(given, train, data, "vicmae_subset", job.encoder, **changes)
    temporal = temporal or (3 if built_in else 7)
    spatial = spatial or (1 if built_in else 3)
    clips = dict(how=how, frames=frames, temporal=temporal, spatial=spatial)
    settings = dict(data=data, label=label) | clips | dataclasses.asdict(s)
    return video(job.encoder, train, val, job.open_run(settings), s, **clips) | dict(settings=settings)


# ------------------------------------------------------------------------------------------------------------- curves


def read_values(path, name):
    """The number, or the list of numbers, that a file of results or its settings have under `name`, as a list."""
    content = read_json(path, "expected a protocol's results")
    settings = content.get("settings")
    value = content.get(name, settings.get(name) if isinstance(settings, dict) else None)
    values = value if isinstance(value, list) else [value]
    found = values and all(isinstance(v, int | float) for v in values)
    need(found, f"{path} has no number or list of numbers {name!r}; it has {', '.join(content)} and settings")
    return values


def run_curve(
    *,
    curves: list[str],  # files of results; several of one curve as NAME=FILE,FILE
    y: str = "finetune_by_epoch",  # what is drawn: a list in each file, or a number (finetune, probe)
    x: str | None = None,  # against a number of each file or its settings (images, lr); default: the place in the list
    at: list[float] = (),  # against these instead, one a file in their order (MAE-CT Figure 6: the hours that --cost tells)
    out: Path = Path("curve.png"),
):
    """A picture of results: accuracy by epoch, a file each curve (CMAE Figure 4b), or several runs as one curve (MAE-CT
    Figures 6, 7)."""
    need(not (x and at), "--x and --at: give one of them")
    given = iter(at)
    drawn = {}
    for curve in curves:
        name, _, files = curve.rpartition("=")
        need((name or files) not in drawn, f"--curves: {name or files} is given twice; write NAME=FILE,FILE for one curve")
        heights, places = [], []
        for file in files.split(","):
            heights += read_values(file, y)
            places += itertools.islice(given, 1) if at else read_values(file, x) if x else []
        places = places or list(range(1, len(heights) + 1))
        need(len(places) == len(heights), f"{curve}: {len(heights)} values of {y}, but {len(places)} to draw them against")
        drawn[name or files] = tuple(zip(*sorted(zip(places, heights))))
    need(next(given, None) is None, "--at has more numbers than there are files")
    draw_curves(out, drawn, x or ("" if at else "epoch"), y)
    print0(f"{out} is drawn")


# --------------------------------------------------------------------------------------------------------------- main


def evaluate(encoder, train, val, machine, normalization="standardize"):
    """The table that ends a training run: k-NN, linear probe (on cached, unaugmented features), clusters of the pooled
    feature. `normalization` is that of `cluster`."""
    found = features_of_splits(encoder, train, val, machine)
    clusters, _ = cluster(*found[2:], normalization=normalization, precision=machine.precision)
    values = dict(knn=knn(*found, ks=[min(10, len(train))])["knn"], probe=cached_probe(*found)["probe"])
    return values | {name: clusters[name] for name in ("cluster_acc", "nmi", "silhouette")}


PROTOCOLS = [
    run_knn, run_probe, run_lowshot, run_cluster, run_finetune, run_retrieve, run_embed, run_blocks, run_invariance,
    run_colorhist, run_stats, run_segment, run_detect, run_robust, run_transfer, run_video,
]  # fmt: skip
OF_IMAGES = ("randaugment", "magnitude", "mixup", "cutmix", "erasing")
TUNED = {  # protocols with FineTuning's flags, but for these
    run_finetune: (),
    run_detect: OF_IMAGES,
    run_video: OF_IMAGES,
    run_segment: (*OF_IMAGES, "label_smoothing", "min_lr"),
}


def start_job(
    protocol,
    *,
    encoder: Path | None = None,  # encoder file, ours or a public one
    scratch: str | None = None,  # instead: an untrained ViT by name, such as vit_b16; --out is then runs/NAME by default
    data: str = "shapes",  # built-in set, folder with train/ and val/, or torchvision name
    image_size: Count | None = None,  # side of the images in pixels; default: the encoder's
    pool: Literal["cls", "mean"] | None = None,  # the feature: [CLS], or the patches' mean; default: the encoder's
    attention_heads: Count | None = None,  # default: what the file says, or what is usual for its width
    precision: Literal["auto", "float32", "bfloat16"] = "auto",  # auto: bfloat16 where the hardware has units for it
    workers: FromMinusOne = -1,  # decoding processes; −1: one for each core, at most 12
    out: Path | None = None,  # folder of the results; default: the encoder's
    resume: bool = False,  # go on with what was stopped (probe, finetune, segment, detect, video)
    **of_protocol,
):
    """The Job of a subcommand, from the flags that all have; and the other flags."""
    need((encoder is None) != (scratch is None), "give --encoder FILE, or --scratch MODEL for an untrained one")
    machine = start_machine(precision, workers)
    if scratch:
        torch.manual_seed(of_protocol.get("seed", 0))
        size = image_size or (48 if data in ("shapes", "moving_shapes") else 224)
        model = build_vit(scratch, size, pool or "cls", heads=attention_heads or 0)
        encoder = Path("runs", scratch, "encoder.pt")  # where it would be
    else:
        model = load_encoder(encoder, image_size, pool, attention_heads)
    model.to(machine.device).requires_grad_(False)
    sets = list(of_protocol.get("sets", ()))
    return Job(model, encoder, data, machine, protocol, resume, image_size, pool, out, sets).find_place(), of_protocol


def add_flags(parser, thing, leave_out=()):
    """A flag for each keyword parameter of a function or field of FineTuning, explained by the comment behind it, its default
    in brackets; FineTuning's are the recipe's."""
    words = comments(thing)
    for name, p in inspect.signature(thing).parameters.items():
        if p.kind is p.KEYWORD_ONLY and name not in leave_out:
            required = p.default is p.empty
            default, said = p.default, f"[{as_text(p.default)}] "
            if thing is FineTuning:
                default, said = argparse.SUPPRESS, "[the recipe's] "
            elif required or default in (None, ()):
                said = ""
            add_flag(parser, name, p.annotation, said + words.get(name, ""), default=default, required=required)


def command_line():
    """The parser: a subcommand for each protocol, whose flags are the keyword parameters of its function."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="protocol", required=True)
    for run in [*PROTOCOLS, run_curve]:
        text = " ".join((run.__doc__ or "").split("\n\n")[0].split()).replace("%", "%%")
        usage = "%(prog)s [--FLAG VALUE ...] [--SWITCH ...]"
        command = commands.add_parser(run.__name__.removeprefix("run_"), help=text, description=text, usage=usage)
        command.set_defaults(run=run)
        add_flags(command.add_argument_group("of the protocol", "a switch --X has an opposite, --no_X"), run)
        if run in TUNED:
            add_flags(command.add_argument_group("of fine-tuning"), FineTuning, TUNED[run])
        if run is not run_curve:
            add_flags(command.add_argument_group("of every protocol"), start_job)
    return parser


def as_text(value):
    """A number, a list or a dict of numbers as text."""
    if isinstance(value, dict):
        return "  ".join(f"{name}: {as_text(v)} {unit(str(name))}".rstrip() for name, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv):
    """Runs a subcommand: prints its result and writes it, with all settings, as PROTOCOL.json beside the encoder."""
    given = vars(command_line().parse_args(argv))
    protocol, run = given.pop("protocol"), given.pop("run")
    kinds = FineTuning.__annotations__ | start_job.__annotations__ | run.__annotations__
    for name, value in given.items():
        check_value(name, value, kinds[name])
    if run is run_curve:
        run(**given)
        return
    job, of_protocol = start_job(protocol, **given)
    try:
        result = run(job, **of_protocol)
    except InputError:
        job.close_run(unless_stopped=True)
        raise
    settings = dict(protocol=protocol) | given | result.pop("settings", {})
    del settings["resume"]
    if job.machine.unreadable:  # by this process
        print(f"{len(job.machine.unreadable)} unreadable files were passed over: the next ones count twice", flush=True)
    for name, value in result.items():  # lists and dicts in one line
        print0(f"{name:>16}  {as_text(value)} {unit(name)}".rstrip())
    if rank() == 0:
        units = {name: unit(name) for name in result if unit(name)}
        about = dict(settings=settings, units=units, made_by=made_by(job.machine))
        write_atomic(job.file(f"{protocol}.json"), to_json(about | result))
    job.close_run()


if __name__ == "__main__":
    launch(main)
