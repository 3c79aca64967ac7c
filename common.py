"""What the five papers share. Read a paper's file first and come here for a name.

The sections stand in the order in which a paper's loop meets them; each begins with what a paper calls:

    model            ViT, build_vit
    masking, MAE     random_masking, MAEDecoder, mae_loss, reconstruct, pretrain_mae
    contrast         mlp_head, BatchNorm, info_nce, nt_xent, Queue, ema_update
    the step         backward, without_gradient, parameter_groups, adamw, warmup_cosine, set_lr
    random numbers   uniform, normal
    processes        start_machine, gather, rank, world
    views, colours   View, Colour, augment, augment_views
    data             load_splits, Images, Videos, batches
    built-in data    shapes, moving_shapes
    settings         RunSettings, parse_settings, need, check_batch
    run              open_run, Run, Training (take_step, log, save_if_due)
    files            save_encoder, load_encoder, init_encoder, launch
    pictures         draw_rows, draw_curves

Who reads a loop may stop after the random numbers. Shapes in comments: N samples (of this process), L patches, K kept
patches, D width, C classes, S image side, V views, H heads.
"""

import argparse
import atexit
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import zipfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class InputError(ValueError):
    """Something the user gave cannot work; the message says what was given, what was expected and what to do.

    Whatever is wrong with an input raises it, in every function of the project.
    """


def need(condition, message):
    """Raises InputError unless the condition holds."""
    if not condition:
        raise InputError(message)


def optional(module, remedy):
    """A module that the project does without; if it is not installed, an error that says how."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"{module} is not installed: {remedy}") from e


# -------------------------------------------------------------------------------------------------------------- model

# size: (width D, depth, heads); patch size and image size are free. `nano` and `mini` serve small images.
VIT_SIZES = {
    "nano": (128, 6, 4),
    "mini": (192, 8, 6),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "sw": (768, 8, 8),  # "small" in CMAE's code, after MMPretrain
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "2b": (2560, 24, 32),
}
MLP_RATIO = {"sw": 3}  # hidden width of the blocks' MLPs in widths D; 4 elsewhere


def model_size(name):
    """(size, patch size) of a model's name: ("l", 16) of vit_l16; ("", 0) of a name that is none."""
    match = re.fullmatch(r"vit_(2b|\D+)([1-9]\d*)", name)
    return (match[1], int(match[2])) if match else ("", 0)


def build_vit(name, image_size, pool="cls", stem="patch", heads=0, **kind):
    """A ViT by name: `vit_` + a size of VIT_SIZES + the patch size in pixels, such as vit_l16, vit_2b14, vit_nano4.
    With the stem "conv" it has one block less, and so as many parameters. `heads` other than the size's; `kind`:
    post_norm and checkpoint_blocks of ViT."""
    size, patch_size = model_size(name)
    known = ", ".join(VIT_SIZES)
    need(size in VIT_SIZES, f"unknown model {name!r}: write vit_SIZE PATCH in one word (vit_b16); sizes are {known}")
    dim, depth, usual_heads = VIT_SIZES[size]
    depth -= stem == "conv"
    kind |= dict(pool=pool, stem=stem, mlp_ratio=MLP_RATIO.get(size, 4))
    return ViT(image_size, patch_size, dim, depth, heads or usual_heads, **kind)


class ViT(nn.Module):
    """Vision transformer encoder with MAE's details and with the parameter names of facebookresearch/mae and timm.

    Post-norm encoders (data2vec 2.0: a norm before the blocks, none after) keep their blocks under `post_blocks`, so
    that no reader of pre-norm weights takes them silently.

    Args:
        image_size, patch_size: sides in pixels; patch_size divides image_size.
        dim, depth, heads: width, number of blocks, attention heads.
        pool: what `pooled` returns, "cls" or "mean" (of the patch tokens).
        stem: "patch", or "conv" for the hybrid of ConvMAE and CMAE 4.1 (`ConvStem`).
        checkpoint_blocks: recompute each block's activations in the backward pass instead of keeping them.
        mlp_ratio: hidden width of the MLPs, in widths.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, post_norm=False, pool="cls", stem="patch",
                 checkpoint_blocks=False, mlp_ratio=4):  # fmt: skip
        super().__init__()
        need(image_size % patch_size == 0, f"image size {image_size} is not divisible by the patch size {patch_size}")
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads,
                           post_norm=post_norm, pool=pool, stem=stem, mlp_ratio=mlp_ratio)  # fmt: skip
        self.patch_size, self.dim, self.depth, self.pool = patch_size, dim, depth, pool
        self.checkpoint_blocks = checkpoint_blocks
        self.grid = (image_size // patch_size,) * 2
        self.frozen = 0
        self.patch_embed = ConvStem(patch_size, dim) if stem == "conv" else PatchEmbed(patch_size, dim)
        self.residual_blocks = depth + 4 * (stem == "conv")  # that drop path reaches: the stem's too, as in ConvMAE
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, *self.grid), requires_grad=False)
        self.embed_norm = nn.LayerNorm(dim, eps=1e-6) if post_norm else nn.Identity()
        blocks = nn.ModuleList(Block(dim, heads, post_norm, mlp_ratio) for _ in range(depth))
        self.add_module("post_blocks" if post_norm else "blocks", blocks)
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(dim, eps=1e-6)
        init_weights(self)
        if stem == "conv":
            self.patch_embed.init_weights()

    def freeze(self, blocks, embed_norm=True):
        """Freezes the patch embedding, [CLS] and the lower `blocks` blocks (all of them: the final norm too). They run
        without gradient and store no activations; unless the norm before the blocks is not frozen (`embed_norm` False), whose
        gradient comes through them."""
        self.requires_grad_(True)
        self.pos_embed.requires_grad_(False)
        self.frozen = blocks
        if blocks == 0:
            return
        for module in (self.patch_embed, *self.stack()[:blocks]):
            module.requires_grad_(False)
        self.embed_norm.requires_grad_(not embed_norm)
        if self.config["post_norm"] and not embed_norm:
            self.frozen = 0
        self.cls_token.requires_grad_(False)
        self.norm.requires_grad_(blocks < self.depth)

    def stack(self):
        """The blocks, whichever name they are kept under."""
        return self.post_blocks if self.config["post_norm"] else self.blocks

    def embed(self, x, ids_keep=None, drop=None):
        """Image [N, 3, H, W] → tokens [N, 1 + K, D] of the kept patches, positions added, [CLS] (zero position) first."""
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        positions = resize_positions(self.pos_embed, self.grid, grid)
        *_, patches = self.patch_embed(x, ids_keep, drop)
        tokens = patches.flatten(2).transpose(1, 2) + positions[:, 1:]  # [N, L, D]
        if ids_keep is not None:
            tokens = take(tokens, ids_keep)  # [N, K, D]
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return self.embed_norm(torch.cat([cls.to(tokens.dtype), tokens], 1))

    def forward(self, x, ids_keep=None, drop=None, blocks=None):
        """Tokens after the final norm, or the raw outputs of chosen blocks.

        Args:
            x: images [N, 3, H, W]; a grid other than the encoder's own gets interpolated positions. Or, of frozen blocks,
                the raw output [N, 1 + K, D] of the last.
            ids_keep: [N, K] indices of the visible patches, or None for all.
            drop: drop-path factors [N, residual_blocks, 2] (see `Block`), the stem's first, or None.
            blocks: numbers of blocks counted from 1, or None.
        Returns:
            [N, 1 + K, D], [CLS] first; with `blocks` a list of such, in the order given, before the final norm.
        """
        done = self.frozen if x.ndim == 3 else 0
        if not done:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen == 0):
                x = self.embed(x, ids_keep, drop)
        outputs = {}
        last = max(blocks) if blocks else self.depth
        for i, block in enumerate(self.stack()[done:last], done + 1):
            block_drop = None if drop is None else drop[:, i - 1 - self.depth]
            with torch.set_grad_enabled(torch.is_grad_enabled() and i > self.frozen):
                if self.checkpoint_blocks:
                    x = checkpoint(block, x, block_drop, use_reentrant=False)
                else:
                    x = block(x, block_drop)
            if blocks and i in blocks:
                outputs[i] = x
        return self.norm(x) if blocks is None else [outputs[b] for b in blocks]

    def pooled(self, tokens):
        """[N, 1 + K, D] → feature [N, D]: [CLS], or the mean of the patch tokens."""
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(1)


class Block(nn.Module):
    """Transformer block, [N, L, D] → [N, L, D]: pre-norm as in MAE, or post-norm as in data2vec 2.0.

    `drop` [N, 2] multiplies the two residual branches (drop path): 0, or 1 / probability of keeping. `bias` [heads, L, L] is
    added to the scores of attention.
    """

    def __init__(self, dim, heads, post_norm=False, mlp_ratio=4):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x, drop=None, bias=None):
        keep_attn, keep_mlp = residual_factors(x, drop)
        if self.post_norm:
            x = self.norm1(x + keep_attn * self.attn(x, bias))
            return self.norm2(x + keep_mlp * self.mlp(x))
        x = x + keep_attn * self.attn(self.norm1(x), bias)
        return x + keep_mlp * self.mlp(self.norm2(x))


def residual_factors(x, drop):
    """Both factors of drop path, drop [N, 2], in the shape of x [N, …]; ones for None."""
    if drop is None:
        return 1, 1
    return drop.to(x.dtype).view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)


class Attention(nn.Module):
    """Multi-head self-attention, [N, L, D] → [N, L, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        need(dim % heads == 0, f"width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, bias=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [N, L, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, L, d] each
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))


def attend(q, k, v, bias=None):
    """softmax(q kᵀ / √d + bias) v for [N, heads, L, d]: flash kernels on GPUs; written out on CPUs, where torch's fused
    kernel makes a step in bfloat16 slower (in float32 5 % faster) and is not counted by FlopCounterMode, for as many samples
    at a time as have 4 MiB of scores (larger tensors cost page faults)."""
    if bias is not None:
        bias = bias.to(q.dtype)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, bias)
    few = max(1, 2**22 // (q.element_size() * q.shape[1] * q.shape[2] ** 2))
    parts = []
    for q, k, v in zip(q.split(few), k.split(few), v.split(few)):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if bias is not None:
            scores += bias
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts)


class Mlp(nn.Module):
    """Linear-GELU-Linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Image [N, 3, H, W] → patches [N, D, rows, columns], the one map, by a convolution whose stride is its kernel."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x, ids_keep=None, drop=None):
        return [self.proj(x)]  # no patch sees another: removed ones need no care


class ConvStem(nn.Module):
    """Image [N, 3, H, W] → maps of convolutions in three layers (ConvMAE, arXiv 2205.03892; CMAE 4.1): [N, D/3, 4 · rows,
    4 · columns], [N, D/2, 2 · rows, 2 · columns] and the patches [N, D, rows, columns].

    Two stages of a strided convolution and two blocks, D/3 and D/2 wide, on grids four times and twice as fine as that
    of the patches, then a third strided convolution and a linear. About 11 D² parameters, a transformer block has
    12 D²: `build_vit` leaves one of those out. Removed patches (`ids_keep` [N, K] stay) are zeroed before every
    convolution, and every norm is of one position: no pixel of theirs reaches a visible patch.
    Norms have PyTorch's eps, `drop` [N, 4, 2] is as in `Block`.
    """

    def __init__(self, patch_size, dim):
        super().__init__()
        need(patch_size % 4 == 0, f"a convolutional stem needs a patch size divisible by 4, not {patch_size}")
        widths = (8 * round(dim / 24), dim // 2, dim)
        sizes = zip((3, *widths), widths, (patch_size // 4, 2, 2))
        self.down = nn.ModuleList(nn.Conv2d(i, o, stride, stride) for i, o, stride in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)
        self.stages = nn.ModuleList(nn.ModuleList([ConvBlock(w), ConvBlock(w)]) for w in widths[:2])
        self.fc = nn.Linear(dim, dim)
        self.patch_size = patch_size

    def init_weights(self):
        """ConvMAE's start, after `init_weights`: PyTorch's for all but the third convolution and the linear."""
        for module in (*self.down[:2], *self.stages.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()

    def forward(self, x, ids_keep=None, drop=None):
        drops = iter([None] * 4 if drop is None else drop[:, :4].unbind(1))
        visible = x.new_ones(len(x), 1, x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        if ids_keep is not None:
            visible = torch.zeros_like(visible).flatten(1).scatter(1, ids_keep, 1.0).view_as(visible)
        maps = []
        for down, norm, blocks in zip(self.down, self.norms, (*self.stages, [])):
            x = down(hide_removed(x, visible)).permute(0, 2, 3, 1)  # [N, h, w, C]
            x = F.gelu(norm(x))
            for block in blocks:
                x = block(x, visible, next(drops))
            if len(maps) == 2:
                x = self.fc(x)
            x = x.permute(0, 3, 1, 2)
            maps.append(x)
        return maps


class ConvBlock(nn.Module):
    """A transformer block with a 5 x 5 convolution, channel by channel, in the place of attention (ConvMAE):
    [N, h, w, C] → [N, h, w, C]; visible [N, 1, rows, columns] is 0 for removed patches; `drop` as in `Block`."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, visible, drop=None):
        keep_conv, keep_mlp = residual_factors(x, drop)
        a = self.fc(self.norm1(x)).permute(0, 3, 1, 2)
        a = self.conv(hide_removed(a, visible)).permute(0, 2, 3, 1)
        x = x + keep_conv * self.proj(a)
        return x + keep_mlp * self.mlp(self.norm2(x))


def hide_removed(x, visible):
    """Zeroes removed patches of x [N, C, h, w], in which a patch has k x k positions."""
    return x * F.interpolate(visible, x.shape[2:]).to(x.dtype)


def init_weights(module):
    """MAE's initialisation: xavier-uniform matrices (convolutions seen as such), zero biases of linears,
    normal(0.02) for [CLS] and mask tokens."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
    for name, p in module.named_parameters(recurse=False):
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(p, std=0.02)


def sincos_positions(dim, height, width):
    """The fixed table of MAE, [1, 1 + height · width, dim]: zeros for [CLS], then half the channels for the column and
    half for the row, each sin then cos; computed in float64, returned in float32."""
    need(dim % 4 == 0, f"sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = column.reshape(-1, 1).double() * omega
    y = row.reshape(-1, 1).double() * omega
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def resize_positions(table, old, new):
    """Position table [1, 1 + h·w, D] of grid old = (h, w), interpolated (bicubic) to the grid `new`; [CLS] stays."""
    if old == new:
        return table
    grid = promote(table[:, 1:]).transpose(1, 2).unflatten(2, old)
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table)], 1)


def promote(x):
    """At least float32, for losses and statistics; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take(tokens, ids):
    """Rows `ids` [N, K] of tokens [N, L, D] → [N, K, D]."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


# -------------------------------------------------------------------------------------------------------- masking, MAE


def random_masking(noise, ratio):
    """Per-sample random mask from uniform noise [N, L]: the int(L · (1 − ratio)) patches of least noise stay.

    Returns:
        ids_keep [N, K] in shuffled order, ids_restore [N, L] (undoes the shuffle), mask [N, L] (1 = removed).
    """
    shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = shuffle.argsort(1)
    keep = int(noise.shape[1] * (1 - ratio))
    return shuffle[:, :keep], ids_restore, (ids_restore >= keep).float()


class MAEDecoder(nn.Module):
    """MAE's decoder: encoded visible tokens and mask tokens → every patch. Names are facebookresearch/mae's.

    Args:
        grid: (rows, columns) of patches; patch_size in pixels; encoder_dim the encoder's width.
        dim, depth, heads: 512, 8 and 16 in MAE for every encoder.
        out: values a token, by default the pixels of a patch.
    """

    def __init__(self, grid, patch_size, encoder_dim, dim=512, depth=8, heads=16, out=None):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(dim, *grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, out or patch_size**2 * 3)
        init_weights(self)

    def forward(self, tokens, ids_restore, level=None):
        """tokens [N, 1 + K, encoder_dim], ids_restore [N, L] → [N, L, out]; [CLS] passes through and is dropped.

        level [N, encoder_dim], if given, is added to every token at the encoder's width, mask tokens included (CAN 3.4).
        """
        x = self.decoder_embed(tokens)
        removed = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), removed, -1)
        patches = take(torch.cat([x[:, 1:], mask_tokens], 1), ids_restore)  # [N, L, dim]
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        if level is not None:  # decoder_embed is linear: what is added before it arrives as its product with the weight
            x = x + F.linear(level, self.decoder_embed.weight)[:, None]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def new_decoder(encoder, s, depth=None, out=None):
    """The MAEDecoder that a paper's settings want for an encoder; `depth` and `out` other than theirs."""
    depth = s.decoder_depth if depth is None else depth
    return MAEDecoder(encoder.grid, encoder.patch_size, encoder.dim, s.decoder_dim, depth, s.decoder_heads, out)


def mae_loss(pred, images, mask, norm_pix=True):
    """Squared error on removed patches, [N]: mean over a patch's pixels, then over the sample's removed patches.

    pred [N, L, p·p·3], images [N, 3, H, W], mask [N, L] (1 = removed). Every sample loses equally many patches, so the
    mean over samples is the MAE loss of the batch.
    """
    target = patchify(images, math.isqrt(pred.shape[-1] // 3))
    return patch_loss(mask, normalize_patches(target) if norm_pix else target, pred)


def patch_loss(chosen, target, pred):
    """Squared error [N]: mean over pixels, then over the patches whose `chosen` [N, L] is 1; 0 where there are none.
    target, pred [N, L, p·p·3]."""
    error = (promote(pred) - target).square().mean(-1)  # [N, L]
    return (error * chosen).sum(1) / chosen.sum(1).clamp(min=1)


def patchify(images, p):
    """[N, 3, H, W] → [N, L, p·p·3], pixels row by row, colour last."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [N, 3, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, p, height, width):
    """[N, L, p·p·3] → [N, 3, height, width]."""
    x = patches.view(len(patches), height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def normalize_patches(patches):
    """Each patch [.., p·p·3] minus its mean, over its standard deviation (unbiased; 1e-6 inside the root)."""
    var, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def unnormalize_patches(patches, target):
    """Normalised patches with the mean and deviation of the true ones; both [.., p·p·3]."""
    var, mean = torch.var_mean(target, -1, keepdim=True)
    return patches * (var + 1e-6).sqrt() + mean


def pretrain_mae(run, encoder, decoder, images, views=1, mask_ratio=0.75, norm_pix=True):
    """MAE pre-training (He et al. 2022): stage "mae" of a run, by its settings mae_epochs, mae_batch (of all ranks), mae_lr
    (at batch 256) and mae_warmup_epochs.

    views: views an image, each with a mask of its own (2 in MAE-CT's re-implementation, A.1); the lr does not count them.
    """
    s, machine = run.settings, run.machine
    encoder.freeze(0)
    groups = parameter_groups(nn.ModuleList([encoder, decoder]), s.mae_lr * s.mae_batch / 256, 0.05)
    optimizer = adamw(groups, zero=s.zero)
    state = dict(encoder=encoder, decoder=decoder, optimizer=optimizer)
    training = Training(run, "mae", state, len(images), s.mae_batch, s.mae_epochs)

    def encode(x, noise):
        x, noise = x.flatten(0, 1), noise.flatten(0, 1)  # [N · V, …]
        ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
        pred = decoder(encoder(x, ids_keep), ids_restore)
        return (), mae_loss(pred, x, mask, norm_pix).view(-1, views).mean(1)

    for data in training.batches(images, [View(s.image_size)] * views):
        x = torch.stack([augment(v) for v in data.views], 1)  # [N, V, 3, S, S]
        key = (s.seed, "mae", training.step, "mask")
        noise = uniform(key, data.rows, views, math.prod(encoder.grid), device=machine.device)
        # in one piece: loss = encode(x, noise)[1].mean(); loss.backward()
        loss, _ = backward(encode, None, (x, noise), s.micro_batch, machine.precision)
        set_lr(optimizer, warmup_cosine(training.step, training.total, s.mae_warmup_epochs * training.per_epoch))
        _, log = training.take_step(optimizer, loss)
        training.log(log)
        training.save_if_due()


@torch.no_grad()
def reconstruct(encoder, decoder, x, noise, mask_ratio=0.75, norm_pix=True):
    """Pictures of a masked autoencoder: x standardised [N, 3, H, W] → (masked input, reconstruction), alike.

    Removed patches are gray in the first; in the second they are the decoder's, visible ones the input's. Predictions of
    normalised patches get the true patch's mean and deviation back.
    """
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
    pred = promote(decoder(encoder(x, ids_keep), ids_restore))
    target = patchify(x, encoder.patch_size)
    if norm_pix:
        pred = unnormalize_patches(pred, target)
    visible = target * (1 - mask[..., None])
    restored = visible + pred * mask[..., None]
    return tuple(unpatchify(patches, encoder.patch_size, *x.shape[-2:]) for patches in (visible, restored))


def reconstruction_rows(encoder, decoder, x, noise, mask_ratio=0.75, norm_pix=True):
    """Rows for `draw_rows`: images x, what the encoder sees of them, the decoder's reconstruction."""
    masked, restored = reconstruct(encoder, decoder, x, noise, mask_ratio, norm_pix)
    rows = [("input", x), (f"{100 * mask_ratio:.0f} % removed", masked), ("reconstruction", restored)]
    return [(caption, to_bytes(images), None) for caption, images in rows]


# ------------------------------------------------------------------------------------------------------------ contrast


def mlp_head(*dims, last_norm, eps=1e-5):
    """Linear-BatchNorm-ReLU, …, Linear(-BatchNorm): the projectors and predictors of MAE-CT (A.2), CAN and CMAE.

    dims are widths from input to output; eps is the BatchNorms'. No linear has a bias: those before a BatchNorm need
    none, and the last has none in MAE-CT's and CMAE's code. Weights keep PyTorch's default initialisation.
    """
    layers = []
    for i, o in zip(dims, dims[1:-1]):
        layers += [nn.Linear(i, o, bias=False), BatchNorm(o, eps=eps), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(*dims[-2:], bias=False))
    if last_norm:
        layers.append(BatchNorm(dims[-1], eps=eps))
    return nn.Sequential(*layers)


class BatchNorm(nn.Module):
    """BatchNorm1d over the samples of all ranks, on any device (torch's SyncBatchNorm refuses CPUs).

    Input [N, D], or [H, N, D] with `shape=(H, D)` for H heads at once; ranks may hold different numbers of samples, or none.
    Each rank contributes its mean and its centred square sum, so nothing cancels; statistics are at least float32.
    Names, defaults and running statistics are BatchNorm1d's.
    """

    def __init__(self, *shape, eps=1e-5, affine=True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x):
        x = promote(x)
        mean, var = self.batch_statistics(x) if self.training else (self.running_mean, self.running_var)
        x = (x - mean.unsqueeze(-2)) * (var + self.eps).rsqrt().unsqueeze(-2)
        if self.weight is not None:
            x = x * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)
        return x

    def batch_statistics(self, x):
        """Mean and (biased) variance of the global batch, [(H,) D]; moves the running ones towards them."""
        n = x.shape[-2]
        mean = x.sum(-2) / max(n, 1)
        squares = (x - mean.unsqueeze(-2)).square().sum(-2)
        of_ranks = torch.stack([mean, squares, torch.full_like(mean, n)])
        means, squares, counts = gather(of_ranks[None]).unbind(1)  # each [world, (H,) D]
        total = counts.sum(0)
        mean = (means * (counts / total)).sum(0)
        var = (squares + counts * (means - mean).square()).sum(0) / total
        with torch.no_grad():
            unbiased = var * (total / (total - 1).clamp(min=1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                new = torch.where(new.isfinite(), new.to(running), running)  # a step that is skipped leaves no trace
                running.lerp_(new, 0.1)
        return mean, var


def normalize(x):
    """Rows of unit length, at least float32."""
    return F.normalize(promote(x), dim=-1)


def info_nce(rows, columns, temperature):
    """−log softmax of row i at its own column, averaged over this rank's rows (Oord et al. 2018).

    rows [N, d] of this rank and columns [N, d] of this rank, both of unit length; the columns of all ranks are gathered
    with gradient and serve as negatives. Logits and cross-entropy are at least float32.
    """
    with torch.autocast(rows.device.type, enabled=False):
        logits = promote(rows) @ gather(promote(columns)).T / temperature  # [N, world · N]
        target = torch.arange(len(rows), device=rows.device) + rank() * len(rows)
        return F.cross_entropy(logits, target)


def nt_xent(z1, z2, temperature):
    """InfoNCE among both views of all samples (SimCLR; CAN 3.2, ViC-MAE Eq. 7), averaged over this rank's 2N rows.

    z1, z2 [N, d] of unit length. The positive of a row is the sample's other view; negatives are both views of the other
    samples of all ranks, 2 · world · N − 2 in all, gathered with gradient. Logits are at least float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack([promote(z1), promote(z2)], 1).flatten(0, 1)  # [2N, d], a sample's views side by side
        logits = z @ gather(z).T / temperature  # [2N, world · 2N]
        own = torch.arange(len(z), device=z.device) + rank() * len(z)
        partner = own + 1 - 2 * (own % 2)  # rows 2i and 2i + 1 are each other's positive
        logits = logits.scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(logits, partner)


class Queue(nn.Module):
    """First in, first out memory of embeddings for nearest-neighbour lookup (NNCLR; MAE-CT Eq. 1); alike on every rank.

    Starts with random unit vectors. Keeps the samples' dataset indices, and labels where there are any: those serve
    the NN-accuracy metric and the oracle variant alone.

    Args:
        size: entries (65 536 in MAE-CT and MIM-Refiner); shape: (d,), their width, or (H, d) for the queues of H heads,
            which hold the same samples in the same places. Below, [(H,) …] has the heads' dimension where `shape` has.
    """

    def __init__(self, size, *shape):
        super().__init__()
        *heads, dim = shape
        self.register_buffer("embeddings", F.normalize(torch.randn(*heads, size, dim), dim=-1))
        self.register_buffer("indices", torch.full((size,), -1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def lookup(self, z, index, k, dice, labels=None):
        """One of the k nearest entries of each row, Eq. 1: [(H,) N] positions in the queue.

        z [(H,) N, d] of unit length; index [N] the samples' dataset indices: an entry of the same sample (its embedding
        of an earlier epoch) gets similarity −1; dice [(H,) N] in [0, 1) picks among the k. With labels [N], entries of
        other classes come last (the oracle of MAE-CT's B.2).
        """
        with torch.autocast(z.device.type, enabled=False):
            similarity = promote(z) @ self.embeddings.to(promote(z)).mT  # [(H,) N, size]
        similarity.masked_fill_(index[:, None] == self.indices, -1)
        if labels is not None:
            similarity -= 4 * (labels[:, None] != self.labels)
        candidates = similarity.topk(k, dim=-1).indices
        return candidates.gather(-1, (dice * k).long()[..., None])[..., 0]

    @torch.no_grad()
    def push(self, z, index, labels):
        """Writes the rows of all ranks, in rank order, over the oldest entries: z [(H,) N, d], index [N], labels [N]."""
        size = len(self.indices)
        z = gather(z.detach().movedim(-2, 0).contiguous())[-size:]
        index, labels = gather(index)[-size:], gather(labels)[-size:]
        slots = (self.cursor + torch.arange(len(z), device=z.device)) % size
        self.embeddings[..., slots, :] = z.movedim(0, -2).to(self.embeddings)
        self.indices[slots] = index
        self.labels[slots] = labels
        self.cursor.copy_((self.cursor + len(z)) % size)


@torch.no_grad()
def ema_update(target, source, momentum):
    """target ← momentum · target + (1 − momentum) · source for parameters; buffers (BatchNorm statistics) are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - momentum)
    for t, s in zip(target.buffers(), source.buffers()):
        t.copy_(s)


def frozen_copy(module):
    """A copy that gets no gradients: the starting point of an EMA."""
    return copy.deepcopy(module).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ the step


def backward(encode, objective, inputs, micro_batch=0, precision=torch.float32):
    """Forward and backward of one step, in one piece or in micro-batches with the same numbers.

    encode works on each sample by itself, objective on the whole (global) batch. In micro-batches the features are
    first computed without gradient, the objective then gives the gradient of every feature, and each micro-batch (but
    the first, whose activations are kept) is encoded once more to send its part of that gradient on (Gao et al. 2021,
    arXiv 2101.06983): the memory is that of a micro-batch, the arithmetic one forward pass to the features more.

    Args:
        encode: (*inputs) → (features, loss): a tuple of tensors [n, …], and a loss per sample [n] or None. If it yields
            one after the other, the first pass asks for the features alone.
        objective: (*features) → (loss, aux): a scalar, averaged over this rank's rows, and anything; or None.
        inputs: tuple of tensors [N, …] (or None entries) of this rank; all randomness is in them.
        micro_batch: samples of this rank at a time; 0 for all. Its number must divide N.
        precision: torch.bfloat16 for autocast of the forward passes, or torch.float32.
    Returns:
        (loss, aux): the detached loss of this rank, and the objective's second value (None without objective).
    """
    chunks = in_chunks(inputs, micro_batch)
    precision = autocast(inputs[0].device, precision)
    if len(chunks) == 1:
        return backward_whole(encode, objective, inputs, precision)
    return backward_in_pieces(encode, objective, chunks, len(inputs[0]), precision)


@torch.no_grad()
def without_gradient(function, inputs, micro_batch=0, precision=torch.float32):
    """function(*inputs), a tuple of tensors [N, …], by micro-batches: what frozen blocks or a target encoder make of the
    inputs, once before `backward`, which would compute it in both passes. Arguments as there."""
    with autocast(inputs[0].device, precision):
        parts = [function(*chunk) for chunk in in_chunks(inputs, micro_batch)]
    return tuple(map(torch.cat, zip(*parts)))


def in_chunks(inputs, micro_batch):
    """A list of the inputs of each micro-batch, in the order of the samples."""
    n = len(inputs[0])
    micro_batch = micro_batch or n
    need(n % micro_batch == 0, f"micro-batches of {micro_batch} do not divide {n} samples")
    split = [[None] * (n // micro_batch) if t is None else t.split(micro_batch) for t in inputs]
    return list(zip(*split))


def backward_whole(encode, objective, inputs, precision):
    """`backward` in one piece."""
    loss, aux = 0.0, None
    with precision:
        features, sample_loss = encode(*inputs)
        if objective:
            loss, aux = objective(*features)
        if sample_loss is not None:
            loss = loss + sample_loss.mean()
    loss.backward()
    return loss.detach(), aux


def backward_in_pieces(encode, objective, chunks, n, precision):
    """`backward` in micro-batches: `chunks` is a list of the inputs of each, n the samples of all."""
    loss, aux = torch.zeros((), device=chunks[0][0].device), None
    gradients = [()] * len(chunks)  # of the features of each chunk
    with precision:
        first = iter(encode(*chunks[0]))
        kept = next(first)
    if objective:
        with torch.no_grad(), precision:
            others = [next(iter(encode(*chunk))) for chunk in chunks[1:]]  # no loss of a sample
        features = [torch.cat(parts).detach().requires_grad_(parts[0].requires_grad) for parts in zip(kept, *others)]
        with precision:
            loss, aux = objective(*features)
        Bucket.more_passes = True
        loss.backward()
        loss = loss.detach()
        of_feature = [torch.zeros_like(f) if f.grad is None else f.grad for f in features]  # None: a target's feature
        gradients = list(zip(*[g.chunk(len(chunks)) for g in of_feature]))

    for i, (chunk, gradient) in enumerate(zip(chunks, gradients)):
        Bucket.more_passes = i < len(chunks) - 1  # gradients of the last pass go to the other ranks while it runs
        with precision:
            features, sample_loss = (kept, next(first)) if chunk is chunks[0] else encode(*chunk)
        pairs = list(zip(features, gradient))
        if sample_loss is not None:
            pairs.append((sample_loss, torch.full_like(sample_loss, 1 / n)))
            loss = loss + sample_loss.detach().sum() / n
        pairs = [(output, g) for output, g in pairs if output.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        elif sample_loss is None:  # a frozen encoder: only the heads learn
            break
    return loss, aux


def autocast(device, precision):
    """Within it, matrix products and convolutions run in bfloat16, if that is the `precision`; float32 changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def parameter_groups(module, lr, weight_decay, layer_decay=1.0):
    """AdamW groups of the trainable parameters: {"params", "peak_lr", "weight_decay"}.

    No weight decay on biases, norms, tokens and positions. For a ViT, block i = 0 … depth − 1 learns with
    lr · layer_decay^(depth − i), the stem with layer_decay^(depth + 1), the final norm with lr.
    """
    groups = {}
    norms = [m.parameters() for m in module.modules() if isinstance(m, BatchNorm)]
    norms = set(itertools.chain(*norms))  # [H, D] for H heads
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        power = layers_above(name, module.depth) if layer_decay != 1 else 0
        decays = p.ndim >= 2 and p not in norms and not name.endswith(("bias", "_token", "pos_embed"))
        decay = weight_decay if decays else 0.0
        group = dict(params=[], peak_lr=lr * layer_decay**power, weight_decay=decay)
        groups.setdefault((power, decay), group)["params"].append(p)
    return list(groups.values())


def layers_above(name, depth):
    """How many layers of a ViT lie above the parameter `name`: 0 for the final norm, depth + 1 for the stem."""
    block = re.match(r"(?:post_)?blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return 0 if name.startswith("norm.") else depth + 1


def adamw(groups, betas=(0.9, 0.95), zero=False):
    """AdamW over groups of `parameter_groups`; `set_lr` must be called before every step. With `zero` the ranks share
    its two moments out among themselves."""
    if zero and world() > 1:
        return ZeroOptimizer(groups, torch.optim.AdamW, lr=0.0, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


class ZeroOptimizer(ZeroRedundancyOptimizer):
    """An optimizer whose moments are spread over the ranks (ZeRO, stage 1; arXiv 1910.02054).

    Its saved state is that of the optimizer itself on one process; all ranks must call `consolidate_state_dict` before.
    """

    def load_state_dict(self, state):
        """As torch's, which keeps a second copy of this rank's part and moves the counts of steps to the CPU, where the
        fused AdamW of a GPU refuses them."""
        super().load_state_dict(state)
        self.state.clear()
        for p, values in self.optim.state.items():
            values["step"] = values["step"].to(p.device)


def warmup_cosine(step, steps, warmup, end=0.0):
    """Factor of the peak lr at a step (0 … steps − 1): linear over `warmup` steps, then half a cosine down to `end`."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    share = (step - warmup) / max(steps - warmup, 1)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share))


def parameters_of(optimizer):
    """A list of all that it changes."""
    return list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))


def set_lr(optimizer, factor):
    """lr of every group = its peak · factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# ------------------------------------------------------------------------------------------------------ random numbers


def uniform(key, rows, *shape, device=None):
    """Numbers in [0, 1) that depend on `key`, the row and nothing else: [len(rows), *shape], float32, on `device` (by
    default that of the rows).

    `key` is a tuple such as (seed, step, "mask"); `rows` [N] int64 are positions in the global batch (or indices of
    samples). Since no generator has a state, 1, 2 or 8 processes, split batches or resumed runs draw the same numbers.
    """
    rows = rows.to(device or rows.device, non_blocking=True)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    golden = -0x61C8864680B583EB
    row = splitmix64(rows * golden + int.from_bytes(digest, "little", signed=True))
    count = torch.arange(1, math.prod(shape) + 1, device=rows.device) * golden
    bits = splitmix64(row[:, None] + count) >> 40 & 0xFFFFFF
    return (bits.float() * 2**-24).view(len(rows), *shape)


def normal(key, rows, *shape, device=None):
    """The same of N(0, 1) (Box and Muller 1958): r cos and r sin of r² = −2 log(1 − u)."""
    size = math.prod(shape)
    u, turn = uniform(key, rows, 2, (size + 1) // 2, device=device).unbind(1)
    r, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * turn
    return torch.cat([r * angle.cos(), r * angle.sin()], 1)[:, :size].unflatten(1, shape)


def splitmix64(z):
    """The output function of splitmix64 (Steele et al. 2014) on int64, whose products wrap around."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


# ----------------------------------------------------------------------------------------------------------- processes


@dataclass
class Machine:
    """What a program runs on."""

    device: torch.device
    precision: torch.dtype = torch.float32  # of autocast
    workers: int = 0  # decoding processes of this rank
    unreadable: dict = field(default_factory=collections.Counter)  # files that were passed over: {name: how often}


def start_machine(precision="auto", workers=-1):
    """Joins torchrun's processes and returns this one's Machine, for the flags --precision and --workers."""
    device = start_processes()
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # the latter: not on Linux
        workers = min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 12)
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    need_alike(dict(precision=precision))
    print0(f"{device_name(device)}; processes: {world()}; precision: {precision}; workers: {workers}")
    return Machine(device, getattr(torch, precision), workers)


def device_name(device):
    """What the maker calls a GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):  # other systems than Linux; processors without a name
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.machine()


def made_by(machine):
    """What results depend on beside their settings: command line, versions, hardware."""
    return dict(
        command=shlex.join(sys.argv),
        versions={m.__name__: m.__version__ for m in (torch, torchvision, np, scipy)},
        python=platform.python_version(),
        device=device_name(machine.device),
        processor=device_name(torch.device("cpu")),
        processes=world(),
        precision=str(machine.precision),
    )


def start_processes():
    """Joins torchrun's process group, or runs alone; returns this process's device."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the patch projection too
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    need(not missing, f"WORLD_SIZE is set, but {', '.join(missing)} is not: start with torchrun, or unset WORLD_SIZE")
    device = torch.device("cpu")
    if cuda:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        need(number < count, f"--nproc_per_node: there are {count} GPUs here, one for each process")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        patience = datetime.timedelta(hours=3)  # while rank 0 downloads or draws
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=patience)
    return device


def has_bfloat16(device):
    """Whether the device has units for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rank():
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


def need_alike(found):
    """An error unless all processes have found the same by every name: nodes may have other data and command lines."""
    of_ranks = [found]
    if world() > 1:
        of_ranks *= world()
        dist.all_gather_object(of_ranks, found)
    odd = [name for name in of_ranks[0] if any(other.get(name) != of_ranks[0][name] for other in of_ranks)]
    need(not odd, f"processes differ in {', '.join(odd)}: give all nodes the same command and data")


def gather(x):
    """Rows of all ranks in rank order, [n, …] → [world · n, …]; the gradient flows back to the rank that owns a row.

    Detach `x` first to gather without gradient. With a loss that each rank averages over its own rows, the average of
    the ranks' gradients is the gradient of the loss over the global batch.
    """
    return Gather.apply(x) if world() > 1 else x


class Gather(torch.autograd.Function):
    """What `gather` does."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world(), *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be others' gradient too
        dist.all_reduce(grad)  # reduce-scatter would do, but gloo has none
        return grad.chunk(world())[rank()]


class Bucket:
    """Gradients that travel over ranks together, as DistributedDataParallel's: they lie in one flat tensor, which is sent as
    soon as the last backward pass of a step has reached all of them, while the pass goes on; or else by `take_step`."""

    more_passes = False  # of this step are to come: see `backward_in_pieces`

    def __init__(self, parameters):
        self.parameters = parameters
        self.reached = set()
        self.flat = self.transfer = None
        self.hooks = [p.register_post_accumulate_grad_hook(self.reach) for p in parameters]

    def reach(self, p):
        """A backward pass has come to p."""
        need(self.transfer is None, "a second backward pass in a step: over ranks it has to be one call of `backward`")
        if Bucket.more_passes:
            return
        self.reached.add(p)
        if len(self.reached) == len(self.parameters):
            self.send()

    def send(self):
        """Starts the transfer, unless there are no gradients; those that are missing count as 0 and stay away."""
        if all(p.grad is None for p in self.parameters):
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.flat = torch.cat([g.flatten() for g in gradients])
        for p, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            if p.grad is not None:
                p.grad = part.view_as(p)
        self.transfer = dist.all_reduce(self.flat, async_op=True)

    def receive(self):
        """Makes the gradients their means over ranks."""
        if self.transfer:
            self.transfer.wait()
            self.flat /= world()
        self.transfer = None
        self.reached.clear()


def fill_buckets(parameters, state):
    """Eight buckets of parameters, from the last ones of the modules in `state` to the first: as the backward pass comes to
    them."""
    modules = [part for part in state.values() if isinstance(part, nn.Module)]
    place = {p: i for i, p in enumerate(itertools.chain(*(m.parameters() for m in modules)))}
    parameters = sorted(parameters, key=lambda p: -place.get(p, 0))
    size = math.ceil(len(parameters) / 8)
    return [Bucket(parameters[i : i + size]) for i in range(0, len(parameters), size)]


def means_over_ranks(values, device):
    """Means over ranks of a dict of tensors, as numbers and lists, by one transfer and one wait for the device."""
    flat = torch.cat([v.detach().float().flatten().to(device) for v in values.values()])
    if world() > 1:
        dist.all_reduce(flat)
    parts = (flat / world()).cpu().split([v.numel() for v in values.values()])
    return {name: part.tolist() if v.ndim else part.item() for (name, v), part in zip(values.items(), parts)}


# ------------------------------------------------------------------------------------------------------ views, colours


@dataclass
class View:
    """A random resized crop: output side in pixels, range of the area as a fraction, and whether to flip half of them."""

    size: int
    scale: tuple = (0.2, 1.0)
    flip: bool = True
    bilinear: bool = False  # instead of bicubic


@dataclass(frozen=True)
class Colour:
    """Colour augmentation of one view, BYOL's kinds: strengths and probabilities; zeros do nothing."""

    jitter: tuple = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    p_jitter: float = 0.0
    p_gray: float = 0.0
    p_blur: float = 0.0
    sigma: tuple = (0.1, 2.0)  # of the blur, in pixels
    p_solarize: float = 0.0


BYOL = [  # the two views' augmentations, of MAE-CT_aug and of MIM-Refiner's global views
    Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=1.0),
    Colour(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.1, p_solarize=0.2),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def augment(x, colour=None, noise=None):
    """uint8 views [N, 3, H, W] → standardised float32 (ImageNet's mean and deviation), colours changed on the way.

    noise [N, 13] in [0, 1), on the CPU: which samples get which operation is known there, so the device never waits.
    Jitter applies its four operations in an order of each sample's own, then gray, blur, solarize.
    """
    x = x.float() / 255
    if colour:
        jitter(x, colour, noise[:, :9])
        gray, blur, solar, amount = noise[:, 9:].unbind(1)
        least, largest = colour.sigma
        change(x, gray < colour.p_gray, luma)
        change(x, blur < colour.p_blur, functools.partial(gaussian_blur, largest=largest), least + (largest - least) * amount)
        change(x, solar < colour.p_solarize, solarize)
    return standardise(x)


def augment_views(views, colours, noise):
    """`augment` of each view of a list, by its Colour or None; noise [N, V, 13]. Views of one size and Colour go together, so
    that a device has few operations to start."""
    alike = collections.defaultdict(list)
    for i, (x, colour) in enumerate(zip(views, colours)):
        alike[x.shape, colour].append(i)
    found = [None] * len(views)
    for (_, colour), members in alike.items():
        x = augment(torch.cat([views[i] for i in members]), colour, torch.cat([noise[:, i] for i in members]))
        for i, part in zip(members, x.chunk(len(members))):
            found[i] = part
    return found


def jitter(x, colour, noise):
    """Colour jitter of some of x [N, 3, H, W], in place; noise [N, 9]: whether, the operations' order, their amounts."""
    jittered = noise[:, 0] < colour.p_jitter
    order = noise[:, 1:5].argsort(dim=1, stable=True)
    strength = torch.tensor(colour.jitter, dtype=torch.float64)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0])  # hue is shifted, the others are multiplied
    low, high = (middle - strength).maximum(middle - 1), middle + strength
    amounts = low.to(noise) + (high - low).to(noise) * noise[:, 5:]
    amounts = amounts.gather(1, order)  # of the first operation, the second, …
    for kind, amount in zip(order.unbind(1), amounts.unbind(1)):
        chosen = jittered & (strength[kind] > 0)
        change(x, chosen & (kind < 3), adjust, amount, kind)
        change(x, chosen & (kind == 3), adjust_hue, amount)


def change(x, chosen, operation, *amounts):
    """x[chosen] ← operation(x[chosen], …) with the same rows of the amounts; chosen and amounts [N] are on the CPU: the
    device never waits."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        amounts = [amount[rows].to(x.device, non_blocking=True) for amount in amounts]
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = operation(x[rows], *amounts)


@functools.cache
def channels(values, device, dtype):
    """Three constants as [3, 1, 1], copied to the device once: every such copy waits for the device."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def standardise(x):
    """Pixels in [0, 1] → ImageNet's mean and deviation taken out."""
    return (x - channels(MEAN, x.device, x.dtype)) / channels(STD, x.device, x.dtype)


def unstandardise(x):
    """Standardised images → pixels in [0, 1]."""
    return (x * channels(STD, x.device, x.dtype) + channels(MEAN, x.device, x.dtype)).clamp(0, 1)


# torchvision's operations, but with an amount of its own for each sample of x [N, 3, H, W] in [0, 1]


def luma(x):
    """Gray [N, 1, H, W]."""
    return (x * channels((0.2989, 0.587, 0.114), x.device, x.dtype)).sum(1, keepdim=True)


def solarize(x):
    """Inverts the upper half of the values."""
    return torch.where(x >= 0.5, 1 - x, x)


def adjust(x, factor, kind):
    """Brightness (kind 0: from black), contrast (1: from the mean gray) or saturation (2: from gray) of each sample:
    factor · x + (1 − factor) · where it starts from, within [0, 1]; factor, kind [N]."""
    factor, kind = factor.view(-1, 1, 1, 1), kind.view(-1, 1, 1, 1)
    gray = luma(x)
    start = torch.where(kind == 1, gray.mean((1, 2, 3), keepdim=True), gray) * (kind > 0)
    return (factor * x + (1 - factor) * start).clamp(0, 1)


def adjust_hue(x, shift):
    """shift [N] in turns (−0.5 … 0.5)."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = ((high[:, None] - x) / chroma.where(chroma > 0, 1)[:, None]).unbind(1)  # 0 where the channel is the highest
    hue = torch.where(r == 0, b - g, torch.where(g == 0, 2 + r - b, 4 + g - r))  # the first of equals, as torchvision
    hue = (hue / 6 * (chroma > 0) + shift.view(-1, 1, 1)) % 1.0
    return high[:, None] - chroma[:, None] * hue_distance(hue)


def hue_distance(hue):
    """Of hues in turns, how far each channel lies below the highest, in chromas (HSV → RGB): [N, …] → [N, 3, …]."""
    k = (hue[:, None] * 6 + channels((5, 3, 1), hue.device, hue.dtype)) % 6
    return torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, largest=2.0):
    """Gaussian blur with a sigma [N] per sample, up to `largest` pixels; the kernel spans a tenth of the side (23 at 224)
    and at least 3 of the largest sigma either way, borders reflect."""
    n, c, h, w = x.shape
    radius = min(max(math.ceil(3 * largest), round(0.05 * min(h, w))), min(h, w) - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # [N · 3, 1, taps]
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(x, kernel[:, :, None], groups=n * c)
    x = F.conv2d(x, kernel[..., None], groups=n * c)
    return x.view(n, c, h, w)


def crop_box(dice, height, width, scale):
    """torchvision's RandomResizedCrop rule: a box (top, left, height, width), drawn from a random.Random.

    Ten tries of an area in `scale` (fractions) and an aspect ratio in (3/4, 4/3); the first that fits is taken, else the
    largest central box of an allowed ratio. Not torchvision's is that the whole area, scale (1, 1), is the largest central
    square: of a wide picture nothing of an allowed ratio has it, and the box of 4/3 would be squeezed.
    """
    whole = scale == (1, 1)
    widest = 1 if whole else 4 / 3
    for _ in range(0 if whole else 10):
        area = height * width * dice.uniform(*scale)
        ratio = math.exp(dice.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return dice.randint(0, height - h), dice.randint(0, width - w), h, w
    w = min(width, round(height * widest))
    h = min(height, round(width * widest))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass
class RandomCrops:
    """Cuts the views of a sample, uint8 [3, size, size] each, by the dice of (seed, epoch, index): called in the workers."""

    views: list
    seed: int

    def __call__(self, images, epoch, index):
        dice = random.Random(repr((self.seed, epoch, index)))
        cut = []
        for view, image in zip(self.views, images.sources(index, len(self.views), dice)):
            top, left, h, w = crop_box(dice, *image.shape[1:], view.scale)
            crop = image[None, :, top : top + h, left : left + w]
            mode = "bilinear" if view.bilinear else "bicubic"
            x = F.interpolate(crop, (view.size, view.size), mode=mode, antialias=True)[0]
            cut.append(x.flip(2) if dice.random() < 0.5 and view.flip else x)
        return cut


def to_uint8(image):
    """A PIL image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------- data

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".avi", ".mkv", ".webm", ".mov"}


def load_splits(data, labels=False, val=True, load=None, **how):
    """(training images, validation images), the latter None if not wanted (`val`), or where there are no labels or no val/
    or test/ to evaluate on. `load` is load_images or load_videos, `how` what else it takes."""
    load = load or load_images
    train = load(data, "train", labels, **how)
    if not val:
        return train, None
    has_val = not Path(data).is_dir() or split_folder(data, "val") != Path(data)
    val = load(data, "val", False, **how) if train.classes and has_val else None
    if not (val and val.classes):
        print0(f"no evaluation on {data}: it needs class folders, and val/, validation/ or test/ of the same, or a flat one and "
               "its list val.txt")  # fmt: skip
        return train, None
    odd = sorted(set(train.classes) ^ set(val.classes))
    need(not odd, f"--data {data}: training and validation folders have different classes ({', '.join(map(str, odd[:5]))})")
    return train, val


def load_images(data, split, labels=True):
    """A split of a built-in set, a folder, or a torchvision set by name.

    Args:
        data: "shapes"; a folder with train/ and val/ (validation/, test/) of class folders, or any tree of images if
            `labels` is False; or a torchvision class name in any case ("cifar10"), downloaded to ./data by torchvision; or
            "random", noise that stands for ImageNet's 1 281 167 images under --cost.
        split: "train" or "val".
        labels: whether class labels are needed.
    """
    if data == "shapes":
        return shapes(split)
    if data == "random":
        return Images(torch.full((1281167,), -1), [], dataset=Noise())
    if os.path.isdir(data):  # Path("") would be this folder
        return load_folder(data, split, labels)
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    need(data.lower() in known, f"--data {data}: no such folder, and neither 'shapes' nor the name of a torchvision data set")
    return load_torchvision(known[data.lower()], split)


def load_folder(data, split, labels):
    """`load_images` of a folder."""
    folder = split_folder(data, split, labels)
    listed = Path(f"{folder}.txt")
    has_split = folder != Path(data)
    ignored = collections.Counter()
    print0(f"looking for images in {folder}")
    files = find_files(folder, SUFFIXES, ignored)
    need(files, f"--data {data}: no images in {folder} (looked for {' '.join(sorted(SUFFIXES))})")
    start = len(os.path.join(folder, ""))
    loose = next((f for f in files if os.sep not in f[start:]), None)
    numbers, classes = torch.full((len(files),), -1), []
    if not loose:
        numbers, classes = class_labels(files, folder)
    elif has_split and listed.is_file():
        numbers, classes = listed_labels(files, listed)
    need(classes or not labels, f"--data {data}: labels are needed, but {loose} lies in no class folder of {folder}, and "
                                f"there is no {listed} with a line NAME CLASS for each image")  # fmt: skip
    said = f"{len(classes)} classes" if classes else f"no labels: {loose} lies in no class folder"
    print0(f"{folder}: {len(files)} images, {said}{told(ignored)}")
    need_alike({f"the images of {split}": fingerprint(files, folder, numbers, classes)})
    return Images(numbers, classes, files=file_names(files))


def split_folder(data, split, labels=False):
    """The folder of a split below the folder `data`: train/, or val/, validation/ or test/; `data` itself if there is none,
    which is an error where `labels` are needed."""
    for name in ["train"] if split == "train" else ["val", "validation", "test"]:
        folder = Path(data) / name
        if folder.is_dir():
            return folder
    need(not labels, f"--data {data}: labels are needed, but there is no {split}/ with one folder per class")
    if split == "train":
        need(split_folder(data, "val") == Path(data), f"--data {data}: there is something to evaluate on, but no train/")
    return Path(data)


def find_files(folder, suffixes, ignored=None):
    """The paths of all files below a folder, sorted, whose name ends in one of the suffixes, in any case. Hidden files and
    folders (.DS_Store, ._1.jpg) do not count, links that lead back are not followed; `ignored` counts other suffixes."""
    files, wanted = [], tuple(suffixes)
    for path, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".") and not leads_back(os.path.join(path, f))]
        inside = os.path.join(path, "")
        for name in names:  # a million of them: nothing here that takes long
            if name[0] == ".":
                continue
            if name.lower().endswith(wanted):
                files.append(inside + name)
            elif ignored is not None:
                ignored[suffix_of(name)] += 1
    return sorted(files)


def fingerprint(files, folder, numbers, *more):
    """Text that tells sets of files apart: by their names in the folder, a number each [N], and more."""
    start = len(os.path.join(folder, ""))
    names = "\0".join(file[start:] for file in files)
    return hashlib.sha256(repr((names, *more)).encode() + numbers.numpy().tobytes()).hexdigest()


def unlisted(e):
    """os.walk's complaint, but of a folder that is not there."""
    need(isinstance(e, FileNotFoundError), f"{e.filename} cannot be listed ({e.strerror})")


def suffix_of(file):
    """".jpg" of a path or name, in lower case."""
    return os.path.splitext(file)[1].lower()


def told(ignored):
    """What is said of ignored files: a Counter of suffixes."""
    return "".join(f", {count} {suffix or 'other files'} ignored" for suffix, count in ignored.most_common(4))


def leads_back(path):
    """Whether a path is a link to a folder that holds it."""
    return os.path.islink(path) and os.path.abspath(path).startswith(os.path.join(os.path.realpath(path), ""))


def class_labels(files, folder):
    """(labels [N], class names) of paths in class folders below `folder`."""
    start = len(os.path.join(folder, ""))
    return numbered([file[start:].partition(os.sep)[0] for file in files])


def listed_labels(files, path):
    """(labels [N], class names) of paths by a text file with a line NAME CLASS for each, the name with or without its suffix,
    what stands behind of no matter: Kaggle's LOC_val_solution.csv for ImageNet, for one."""
    listed = {}
    for line in read_lines(path):
        words = re.split(r"[\s,]+", line)
        name = Path(words[0]).name
        need(listed.setdefault(name, words[1:2]) == words[1:2], f"{path} gives {name} two classes")
    of_file, unused = [], dict(listed)
    for file in files:
        name = Path(file).name if Path(file).name in listed else Path(file).stem
        need(listed.get(name), f"{path} has no line NAME CLASS for {file}")
        of_file += listed[name]
        unused.pop(name, None)
    if unused:
        print0(f"{path}: {len(unused)} of {len(listed)} lines name no image here, first {next(iter(unused))}")
    return numbered(of_file)


def numbered(of_file):
    """(numbers [N], names in order) of names."""
    classes, numbers = np.unique(of_file, return_inverse=True)
    return torch.from_numpy(numbers), classes.tolist()


def read_lines(path):
    """The lines of a text file that say something."""
    need(Path(path).is_file(), f"{path}: no such list")
    raw = Path(path).read_bytes()
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    need(lines, f"{path}: the list is empty")
    return lines


def file_names(files):
    """Paths as an array of bytes: one block of memory, which forked workers share."""
    return np.array([os.fsencode(file) for file in files])


@dataclass
class Images:
    """An image set: pixels in memory, or files, or a torchvision data set; labels are −1 where there are none."""

    labels: torch.Tensor  # [N] int64; [N, C] where an image has several
    classes: list
    pixels: torch.Tensor = None  # [N, 3, H, W] uint8
    masks: torch.Tensor = None  # [N, H, W] bool, the object's pixels (shapes only)
    files: np.ndarray = None  # [N], see file_names
    dataset: object = None

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """What to call image i when it cannot be read."""
        return f"image {i}" if self.files is None else os.fsdecode(self.files[i])

    def open(self, i):
        """Image i as an RGB PIL image."""
        if self.pixels is not None:
            return to_pil(self.pixels[i])
        return read_image(self.name(i)) if self.files is not None else to_rgb(self.dataset[i][0])

    def sources(self, index, views, dice):
        """The image, uint8 [3, H, W], that each of a sample's views is cut from: the same one."""
        return [to_uint8(self.open(index))] * views

    def subset(self, index, classes=None):
        """The images `index` [n]; with `classes`, names that are all the subset's labels may refer to, renumbered."""
        index = np.asarray(index)  # numpy takes a tensor of one number for that number
        part = {k: v[index] for k, v in vars(self).items() if isinstance(v, torch.Tensor | np.ndarray)}
        if self.dataset is not None:
            part["dataset"] = torch.utils.data.Subset(self.dataset, index.tolist())
        if classes is not None:
            number = torch.full((len(self.classes),), -1)
            number[[self.classes.index(c) for c in classes]] = torch.arange(len(classes))
            part |= dict(labels=number[part["labels"]], classes=list(classes))
        return dataclasses.replace(self, **part)


class Noise:
    """Random images of 256 x 256 pixels."""

    def __getitem__(self, i):
        return Image.effect_noise((256, 256), 64), -1


def to_pil(x):
    """uint8 [3, H, W] as a PIL image."""
    return Image.fromarray(x.permute(1, 2, 0).numpy())


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # whatever the name; Pillow's others may start programs
if find_spec("PIL.AvifImagePlugin"):  # from Pillow 11.3 on
    SUFFIXES.add(".avif")
    FORMATS += ("AVIF",)


def read_image(path):
    """An image file as an RGB PIL image; an OSError if it cannot be decoded, or if its header promises more than Pillow's
    limit of 179 million pixels."""
    if not os.path.isfile(path):  # to open a named pipe would be to wait for ever
        raise OSError("no regular file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as e:  # damaged files raise whatever the decoder trips over
        raise OSError(str(e) or type(e).__name__) from e


def to_rgb(image):
    """A PIL image as RGB: on white where it is transparent, of an animation the first frame, of 16 bits the upper 8.

    As in torchvision's ImageFolder, EXIF's orientation turns nothing. An OSError for 32-bit integers or floats, for which
    white is not defined.
    """
    deep = image.mode == "I" and image.format in ("PNG", "PPM")
    if deep or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert("RGB") makes all above 255 white
    if image.mode in ("I", "F"):
        raise OSError(f"pixels of mode {image.mode} have no white: save it with 8 or 16 bits")
    if image.has_transparency_data:  # convert("RGB") shows the colours below
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Training and test part of torchvision's sets, where they are not called "train" and "test": all that is not for testing.
TORCHVISION_PARTS = {
    "DTD": (["train", "val"], ["test"]),  # of the first of its ten splits
    "Flowers102": (["train", "val"], ["test"]),
    "FGVCAircraft": (["trainval"], ["test"]),
    "OxfordIIITPet": (["trainval"], ["test"]),
}
# Sets without parts: images a class that are drawn to train and to test on. Caltech101 (without its background class) is
# tested on the rest, as usual; SUN397's ten published partitions have 50 and 50 as well.
TORCHVISION_DRAWN = {
    "Caltech101": dict(train=dict(count=30), val=dict(skip=30)),
    "SUN397": dict(train=dict(count=50), val=dict(count=50, skip=50)),
}


def load_torchvision(name, split):
    """`load_images` of a torchvision data set."""
    accepted = inspect.signature(getattr(torchvision.datasets, name)).parameters
    if name in TORCHVISION_DRAWN:
        choices = [{}]
    elif "train" in accepted:
        choices = [dict(train=split == "train")]
    else:
        train_parts, test_parts = TORCHVISION_PARTS.get(name, (["train"], ["test"]))
        choices = [dict(split=part) for part in (train_parts if split == "train" else test_parts)]
    parts = [torchvision_dataset(name, **choice) for choice in choices]
    first = parts[0]
    attribute = next((a for a in ("targets", "labels", "_labels", "y") if hasattr(first, a)), None)
    need(attribute, f"--data {name.lower()}: torchvision's {name} has no class labels")
    labels = torch.cat([torch.as_tensor(getattr(part, attribute)).long() for part in parts])
    classes = list(getattr(first, "classes", getattr(first, "categories", range(int(labels.max()) + 1))))
    pixels = getattr(first, "data", None)
    if isinstance(pixels, np.ndarray) and pixels.ndim == 4:  # CIFAR is [N, H, W, 3]; SVHN and STL10 are [N, 3, H, W]
        pixels = torch.from_numpy(pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2)).contiguous()
        return Images(labels, classes, pixels=pixels)
    images = Images(labels, classes, dataset=torch.utils.data.ConcatDataset(parts))
    if name == "SUN397":  # listed as the file system has them, which differs from machine to machine
        images = images.subset(torch.from_numpy(np.argsort([str(file) for file in first._image_files])))
    if name in TORCHVISION_DRAWN:
        return images.subset(draw_per_class(images.labels, ("split",), **TORCHVISION_DRAWN[name][split]))
    return images


def torchvision_dataset(name, download=True, **choice):
    """A data set of torchvision's, downloaded to ./data by rank 0."""
    cls = getattr(torchvision.datasets, name)
    try:
        if rank() == 0:
            cls("data", download=download, **choice)
        if world() > 1:
            dist.barrier()
        return cls("data", **choice)
    except Exception as e:  # also of names that are no data set
        raise InputError(f"--data {name.lower()}: torchvision could not provide it ({e}); a folder will do too") from e


def draw_per_class(labels, key, count=None, fraction=None, skip=0):
    """Indices of images drawn at random by a key of `uniform`, in the order of the set: `count` of every class (all of a
    smaller one) or a `fraction` of it, behind the `skip` ones that are drawn first; by default all the others. labels [N]."""
    order = uniform(key, torch.arange(len(labels)), 1)[:, 0].argsort(stable=True)
    kept, small = [], 0
    for c in labels.unique().tolist():
        of_class = order[labels[order] == c][skip:]
        wanted = count or len(of_class)
        if fraction:
            wanted = max(1, round(fraction * len(of_class)))
        small += wanted > len(of_class)
        kept.append(of_class[:wanted])
    need(small < len(kept), f"{count} images a class are wanted, but no class has as many")
    if small:
        print0(f"{small} of {len(kept)} classes have fewer than {count} images: all of theirs are taken")
    return torch.cat(kept).sort().values


def load_videos(data, split, labels=False, gap=-1):
    """A split of a video set.

    Args:
        data: "moving_shapes", "random" (see load_images), or a folder. In train/ and val/ (validation/, test/) of class
            folders, a folder in a class folder holds the frames of one video, and a file there is a video or a still image
            of its own: train/CLASS/VIDEO/000001.jpg, train/CLASS/VIDEO.mp4, train/CLASS/IMAGE.jpg. In any other tree each
            folder of images is one video; those that lie in the root itself are stills.
        split: "train" or "val"; labels: whether class labels are needed; gap: see sample_frames.
    """
    if data == "moving_shapes":
        return dataclasses.replace(moving_shapes(split), gap=gap)
    if data == "random":
        return Videos(load_images(data, split).labels, [], gap=gap)
    need(os.path.isdir(data), f"--data {data}: no such folder, and not the built-in 'moving_shapes'")
    folder = split_folder(data, split, labels)
    has_split = folder != Path(data)
    ignored = collections.Counter()
    clips = find_files(folder, VIDEO_SUFFIXES, ignored)
    images = find_files(folder, SUFFIXES)
    if clips:
        need_torchcodec(data, clips)
    if any(clip.lower().endswith(".avi") for clip in clips):
        print0("AVI files have no presentation times: with B-frames other frames come than are asked for; to be safe encode "
               "them anew: ffmpeg -i x.avi -fps_mode passthrough -c:v libx264 x.mp4")  # fmt: skip
    stills_at = 2 if has_split else 1  # how deep in the tree an image is one of its own
    depth = len(folder.parts)
    frames = [f for f in images if len(Path(f).parts) - depth > stills_at]
    folders = sorted({os.path.dirname(f) for f in frames})
    stills = sorted(set(images) - set(frames))
    files = sorted(clips + folders + stills)
    need(files, f"--data {data}: no folders of frames, video files or images in {folder}")
    number, classes = torch.full((len(files),), -1), []
    if has_split and not any(os.path.dirname(f) == str(folder) for f in clips + stills):
        number, classes = class_labels(files, folder)
    kinds = f"{len(folders)} folders of frames, {len(clips)} video files, {len(stills)} still images"
    said = f"{len(classes)} classes" if classes else "no labels"
    print0(f"{folder}: {kinds}, {said}{told(ignored - collections.Counter(suffix_of(f) for f in images))}")
    need_alike({f"the videos of {split}": fingerprint(files, folder, number, classes)})
    return Videos(number, classes, files=file_names(files), gap=gap)


def need_torchcodec(data, clips):
    """Raises InputError if video files cannot be decoded here."""
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception as e:  # torchcodec without its FFmpeg raises a RuntimeError
        raise InputError(
            f"--data {data}: {len(clips)} video files such as {clips[0]} need torchcodec and FFmpeg "
            "(pip install torchcodec); or make folders of frames: mkdir CLIP; "
            "ffmpeg -i CLIP.mp4 -fps_mode passthrough CLIP/%06d.jpg (older ffmpeg: -vsync 0)"
        ) from e


@dataclass
class Videos(Images):
    """A video set: `pixels` [N, T, 3, H, W] uint8, or `files`: folders of frames, video files, images (of one frame)."""

    motions: torch.Tensor = None  # [N] int64, a second label (moving_shapes only)
    gap: int = -1  # see sample_frames

    def sources(self, index, views, dice):
        """The frames of a pair: the first view is cut from the one, the second from the other."""
        clip = self.open_clip(index)
        noise = torch.tensor([[dice.random(), dice.random()]])
        numbers = sample_frames(noise, clip.length, self.gap)[0, :views]
        return [to_uint8(clip.frame(number)) for number in numbers.tolist()]

    def open_clip(self, i):
        """Video i as a Clip."""
        if self.pixels is not None:
            return Clip(self.pixels[i])
        path = Path(self.name(i))
        if path.is_dir():
            names = [name for name in os.listdir(path) if suffix_of(name) in SUFFIXES and name[0] != "."]
            return Clip([path / name for name in sorted(names, key=natural_key)])
        return Clip(open_video(path) if suffix_of(path) in VIDEO_SUFFIXES else [path])


class Clip:
    """One video, of which only the frames that are asked for are decoded: `length`, and `frame(number)`, an RGB image.

    An OSError says what cannot be read. `frames`: uint8 [T, 3, H, W], image files, or torchcodec's decoder.
    """

    def __init__(self, frames):
        self.frames = frames
        self.length = len(frames)
        if self.length == 0:
            raise OSError("no frames")

    def frame(self, number):
        """Frame `number`, counted from 0."""
        try:
            frame = self.frames[number]
        except (RuntimeError, IndexError) as e:
            raise OSError(f"frame {number} is not readable ({torchcodec_reason(e)})") from e
        return to_pil(frame) if isinstance(frame, torch.Tensor) else read_image(frame)


def open_video(path):
    """torchcodec's decoder of a video file."""
    from torchcodec.decoders import VideoDecoder

    if not path.is_file():
        raise OSError("no regular file")
    try:
        decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
        len(decoder)
        return decoder
    except (RuntimeError, ValueError) as e:
        raise OSError(f"no readable video ({torchcodec_reason(e)})") from e


def torchcodec_reason(error):
    """What went wrong, without the place in torchcodec's source."""
    return str(error).splitlines()[0].split(", ")[-1]


def natural_key(name):
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def sample_frames(noise, length, gap=-1):
    """Two frames of a video from noise [N, 2]: their numbers [N, 2], from 0 (ViC-MAE 5.3, Table 4).

    gap −1 is distant sampling: one frame from either half. Else the second follows the first within `gap` frames; 0 takes
    the same frame twice. A video of one frame gives that twice, a short one its last frame.
    """
    if gap < 0:
        half = length // 2
        first = (noise[:, 0] * max(1, half)).long()
        second = half + (noise[:, 1] * (length - half)).long()
    else:
        first = (noise[:, 0] * max(length - gap, 1)).long()
        second = first + (gap > 0) + (noise[:, 1] * gap).long()
    return torch.stack([first, second], 1).clamp(max=length - 1)  # noise may be rounded to 1


class Stills(Images):
    """Images of `count` frames of each video, evenly spread, one video after the other."""

    def __init__(self, videos, count):
        super().__init__(videos.labels.repeat_interleave(count), videos.classes)
        self.videos, self.count = videos, count

    def name(self, i):
        return self.videos.name(i // self.count)

    def open(self, i):
        clip = self.videos.open_clip(i // self.count)
        return clip.frame(int((i % self.count + 0.5) * clip.length / self.count))


@dataclass
class Batch:
    """One rank's part of a global batch of n · world samples."""

    views: list  # of [n, 3, S, S] uint8
    index: torch.Tensor  # [n] dataset indices
    labels: torch.Tensor  # [n], −1 where there are none
    rows: torch.Tensor  # [n] positions in the global batch, on the CPU: the rows of `uniform`
    epoch: int


def batches(images, views, batch, first, total, seed, machine):
    """Batches of random crops (list of View) for the steps first … total − 1, in the order of `shuffled`; `batch` is the
    global size."""
    rows = torch.arange(batch // world()) + rank() * (batch // world())
    order = shuffled(len(images), batch, first, total, seed)
    labels = images.labels.to(machine.device)
    for step, (cut, index) in enumerate(decode(images, order, RandomCrops(views, seed), machine), first):
        yield Batch(cut, index, labels[index], rows, step // (len(images) // batch))


def some_crops(images, views, seed, machine):
    """A Batch of up to eight samples of this process, for pictures."""
    count = min(8, len(images) // world()) * world()
    return next(batches(images, views, count, 0, 1, seed, machine))


def shuffled(count, batch, first, total, seed):
    """Yields (epoch, indices [batch // world]) of steps first … total − 1. An epoch is a permutation, cut into global
    batches (the rest is left out) and into equal parts for the ranks: 1 or 8 processes see the same global batches."""
    n, per_epoch = batch // world(), count // batch
    order = None
    for step in range(first, total):
        epoch, part = divmod(step, per_epoch)
        if order is None or part == 0:
            order = uniform((seed, epoch, "order"), torch.arange(count), 1)[:, 0].argsort(stable=True)
        yield epoch, order[part * batch + rank() * n :][:n]


def decode(images, order, cut, machine):
    """Yields (views, index) on the device for each (epoch, index [n]) of `order`: workers open each image once, and
    cut(images, epoch, index) makes all its views. Each worker makes a part of every batch and is two parts ahead, so that
    shared memory holds two batches, however many workers there are.

    Unreadable images are replaced by the next readable one; each is named once and counted in machine.unreadable.
    """
    device = machine.device
    order, ahead = itertools.tee(order)
    loader = torch.utils.data.DataLoader(
        Decoded(images, cut),
        batch_size=None,
        sampler=parts_of_batches(ahead, machine),
        num_workers=machine.workers,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
    )
    stream = watched(loader)
    for _, wanted in order:
        parts = []
        for _, (views, index, bad) in zip(in_parts(wanted, machine), stream):
            if views is None:
                raise InputError(f"100 unreadable images in a row, the last one {bad[-1][0]}: {bad[-1][1]}")
            for name, why in bad:
                if name not in machine.unreadable:
                    print(f"skipped {name}: {why}", file=sys.stderr, flush=True)
                machine.unreadable[name] += 1
            parts.append([v if isinstance(v, list) else v.to(device, non_blocking=True) for v in (*views, index)])
        *views, index = map(joined, zip(*parts))
        yield views, index


def parts_of_batches(order, machine):
    """Yields (epoch, index [n]) of each worker's part of each batch."""
    for epoch, index in order:
        for part in in_parts(index, machine):
            yield epoch, part


def in_parts(index, machine):
    """Indices [n] in as many parts as there are workers."""
    return index.tensor_split(min(max(1, machine.workers), len(index)))


def joined(parts):
    """A view of the workers' parts of a batch: tensors [n, …], or lists."""
    return list(itertools.chain(*parts)) if isinstance(parts[0], list) else torch.cat(parts)


def watched(loader):
    """Yields a loader's batches; the death of a worker becomes an error that names the remedy."""
    try:
        yield from loader
    except RuntimeError as e:
        if "worker" not in str(e):
            raise
        raise InputError(
            f"a decoding process ended ({str(e).splitlines()[-1]}): for too little memory choose fewer --workers, or "
            "--workers 0; in a container give more shared memory (docker run --shm-size 16g)"
        ) from e


@dataclass
class Decoded(torch.utils.data.Dataset):
    """(epoch, index [n]) → views [n, …], or lists of what is no tensor (targets of objects), the indices used, and
    (name, reason) of unreadable files passed over on the way to them; without views behind 100 of those in a row."""

    images: Images
    cut: object

    def __getitem__(self, key):
        epoch, wanted = key
        samples, used, bad = [], [], []
        for index in wanted.tolist():
            first = len(bad)
            while len(samples) == len(used):
                try:
                    samples.append(self.cut(self.images, epoch, index))
                except UNREADABLE as e:
                    bad.append((self.images.name(index), str(e)))
                    index = (index + 1) % len(self.images)
                if len(bad) - first == 100:  # an exception would arrive from a worker with its traceback as the message
                    return None, None, bad
            used.append(index)
        columns = [torch.stack(v) if isinstance(v[0], torch.Tensor) else list(v) for v in zip(*samples)]
        return columns, torch.tensor(used), bad


def start_worker(_):
    """What a worker does first."""
    os.setsid()  # signals to the process group (torchrun, Ctrl-C) are the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends a worker
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------------------- built-in data

# Outlines and patterns of `shapes`, functions of object coordinates u, v (the object fits the unit circle). An outline is
# negative inside; a pattern chooses between the object's two colours by its sign.


def box(u, v, x, y, w, h):
    """Outline of an upright rectangle around (x, y), 2 w wide and 2 h high."""
    return torch.maximum((u - x).abs() - w, (v - y).abs() - h)


def striped_disc(u, v):
    """(outline, pattern), like all that follow."""
    return torch.hypot(u, v) - 0.8, torch.sin(24 * u)


def banded_ring(u, v):
    """A ring with bands across."""
    return (torch.hypot(u, v) - 0.68).abs() - 0.2, torch.sin(12 * u)


def checkered_square(u, v):
    """A square of squares."""
    return box(u, v, 0, 0, 0.7, 0.7), torch.sin(13 * u) * torch.sin(13 * v)


def target_triangle(u, v):
    """A triangle with rings."""
    third = 2 * math.pi / 3
    side = torch.hypot(u, v) * torch.cos((torch.atan2(v, u) + math.pi / 3) % third - math.pi / 3)
    return side - 0.5, torch.sin(18 * torch.hypot(u, v))


def split_flower(u, v):
    """Five petals, coloured by sectors."""
    angle = torch.atan2(v, u)
    return torch.hypot(u, v) - 0.62 - 0.33 * torch.cos(5 * angle), torch.sin(6 * angle)


def dotted_cross(u, v):
    """A cross with dots."""
    outline = torch.minimum(box(u, v, 0, 0, 0.9, 0.26), box(u, v, 0, 0, 0.26, 0.9))
    return outline, torch.sin(18 * u) * torch.sin(18 * v) - 0.4


def shaded_crescent(u, v):
    """A crescent, one half in either colour."""
    return torch.maximum(torch.hypot(u, v) - 0.9, 0.75 - torch.hypot(u - 0.45, v)), 2 * u


def chevron_bars(u, v):
    """Two bars with chevrons."""
    outline = torch.minimum(box(u, v, 0, 0.45, 0.85, 0.22), box(u, v, 0, -0.45, 0.85, 0.22))
    return outline, torch.sin(15 * u + 8 * (2.4 * v % 1 - 0.5).abs())


def rimmed_corner(u, v):
    """Two bars at right angles, darker within."""
    outline = torch.minimum(box(u, v, -0.5, 0, 0.25, 0.85), box(u, v, 0.1, 0.6, 0.75, 0.25))
    return outline, 3 * (torch.hypot(u, v) - 0.62)


def plain_dumbbell(u, v):
    """Two discs of one colour."""
    return torch.hypot(u.abs() - 0.5, v) - 0.38, torch.full_like(u, -2)


SHAPES = [striped_disc, banded_ring, checkered_square, target_triangle, split_flower, dotted_cross, shaded_crescent,
          chevron_bars, rimmed_corner, plain_dumbbell]  # fmt: skip
SHAPE_NAMES = [shape.__name__.replace("_", " ") for shape in SHAPES]
MOTIONS = ["sliding", "circling", "spinning", "swelling", "swinging"]


def shapes(split):
    """The built-in images: one object of ten classes on a patchwork of five flat, shaded colours.

    The class is the object's outline and pattern; classes i and i + 5 share their hue. Place, size, rotation, shade and
    background are drawn anew for every image and say nothing of the class. An image depends on (split, index) alone; all
    is computed in float64, so that machines agree on every byte.

    Args:
        split: "train" (6000 images) or "val" (2000).
    Returns:
        Images of [N, 3, 48, 48] with labels and the object's masks [N, 48, 48].
    """
    count, size = {"train": 600, "val": 200}[split], 48
    y, x = pixel_centres(size)
    pixels, masks = [], []
    for c, index in class_parts(count, 50):
        dice = Dice(("shapes", split), index, 100, 2)

        # background: each pixel takes the colour of the nearest of five sites, plus a smooth shade
        sites = [(dice.between(0, size), dice.between(0, size)) for _ in range(5)]
        image = patchwork(dice, x, y, sites)  # [n, 3, size, size]

        # object: somewhere within the picture
        radius, angle = dice.between(15, 20), dice.between(0, 2 * math.pi)
        cx = 0.8 * radius + (size - 1.6 * radius) * dice.between(0, 1)
        cy = 0.8 * radius + (size - 1.6 * radius) * dice.between(0, 1)
        image, inside = paint(image, x, y, c, radius, angle, cx, cy, *dice.shades(c))
        pixels.append(noisy_bytes(image, uniform(("shapes", split, "noise"), index, 3, size, size)))
        masks.append(inside[:, 0] > 0.5)
    labels = torch.arange(count * 10) % 10
    return Images(labels, SHAPE_NAMES, pixels=interleave(pixels, count), masks=interleave(masks, count))


def moving_shapes(split):
    """The built-in videos: an object of `shapes` that moves, turns and changes its size over a background that moves as
    well, while the light changes. Its class is the label, the kind of its motion (MOTIONS) a second one.

    Made as `shapes` is: a video depends on (split, index) alone, place, size, rotation, shade, speed, light and background
    say nothing of the labels.

    Args:
        split: "train" (1200 videos) or "val" (400).
    Returns:
        Videos of [N, 12, 3, 48, 48] with labels and motions.
    """
    count, size, frames, turn = {"train": 120, "val": 40}[split], 48, 12, 2 * math.pi
    y, x = pixel_centres(size)
    t = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None, None]  # [T, 1, 1]
    pixels = []
    for c, index in class_parts(count, 8):
        dice = Dice(("moving_shapes", split), index, 160, 3, frames)
        kind = (index // 10 % 5)[:, None, None, None]

        # background: a patchwork of four times the picture's area, seen by a camera that pans over it
        heading, distance = dice.between(0, turn), dice.between(0.5, 0.8) * size
        pan = [distance * (t - 0.5) * heading.cos(), distance * (t - 0.5) * heading.sin()]
        sites = []
        for _ in range(14):
            sites.append([dice.each_frame(dice.between(-size / 2, 1.5 * size) + p) for p in pan])
        image = patchwork(dice, x, y, sites)  # [n · T, 3, size, size]

        # object: its motion, and a little of every other
        sign, phase, speed = dice.between(-1, 1).sign(), dice.between(0, turn), dice.between(0.7, 1)
        sliding, circling, spinning, swelling, swinging = ((kind == k).double() for k in range(5))
        swing = swinging * speed * torch.sin(2 * turn * t + phase)
        radius = dice.between(13, 17) * (1 + dice.between(-0.1, 0.1) * t + 0.5 * swelling * sign * (t - 0.5))
        angle = dice.between(0, turn) + dice.between(-0.5, 0.5) * t
        angle = angle + turn * spinning * sign * 1.5 * speed * t + swing
        slide = 18 * sliding * speed * (t - 0.5)
        circle = turn * sign * t + phase
        path_x = slide * phase.cos() + 8 * circling * speed * circle.cos() + 6 * swing
        path_y = slide * phase.sin() + 8 * circling * speed * circle.sin()
        cx = size / 2 + dice.between(-5, 5) + dice.between(-3, 3) * (t - 0.5) + path_x
        cy = size / 2 + dice.between(-5, 5) + dice.between(-3, 3) * (t - 0.5) + path_y
        moving = [dice.each_frame(v) for v in (radius, angle, cx, cy)]
        image, _ = paint(image, x, y, c, *moving, *dice.shades(c))
        image = image * dice.each_frame(dice.between(0.75, 1.15) + dice.between(-0.35, 0.35) * t)[:, None]
        noise = uniform(("moving_shapes", split, "noise"), index, frames, 3, size, size)
        pixels.append(noisy_bytes(image.view_as(noise), noise))
    index = torch.arange(count * 10)
    return Videos(index % 10, SHAPE_NAMES, pixels=interleave(pixels, count), motions=index // 10 % 5)


class Dice:
    """Random numbers of samples `index` [n], drawn one after the other: the order of the calls is part of the data set.

    Numbers have the shape [n, 1, …] with `ones` ones; with `frames` colours and shades are given once a frame.
    """

    def __init__(self, key, index, count, ones, frames=0):
        numbers = uniform(key, index, count).double()
        self.numbers = iter(numbers.view(*numbers.shape, *[1] * ones).unbind(1))
        self.frames = frames

    def between(self, low, high):
        """A number a sample."""
        return low + (high - low) * next(self.numbers)

    def each_frame(self, v):
        """A value a frame, [n · T, 1, 1], of numbers [n, 1 or T, 1, 1]."""
        return v.expand(-1, self.frames, 1, 1).flatten(0, 1) if self.frames else v

    def colour(self, hue, saturation, value):
        """RGB [n (· T), 3, 1, 1], drawn in HSV; each argument is (low, high)."""
        h, s, v = (self.each_frame(self.between(*limits)) for limits in (hue, saturation, value))
        return v[:, None] * (1 - s[:, None] * hue_distance(h))

    def shade(self):
        """A coarse grid of shades [n (· T), 3, 3, 3]."""
        shades = [self.each_frame(self.between(-0.1, 0.1)) for _ in range(27)]
        return torch.stack(shades, 1).view(-1, 3, 3, 3)

    def shades(self, c):
        """Two colours of an object of class c, light and dark; classes c and c + 5 share their hue."""
        hue = c % 5 / 5
        light = self.colour((hue - 0.07, hue + 0.07), (0.5, 1), (0.6, 1))
        return light, self.colour((hue + 0.03, hue + 0.17), (0.3, 0.8), (0.1, 0.4))


def pixel_centres(size):
    """Their coordinates (y, x), [size, size] each."""
    return torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")


def class_parts(count, part):
    """Yields (class, indices [part]) of 10 · count samples, class i % 10; a part's temporaries stay in the cache."""
    for c in range(10):
        for index in torch.arange(c, count * 10, 10).split(part):
            yield c, index


def interleave(parts, count):
    """Parts of `class_parts` as a set in which the classes take turns."""
    return torch.cat(parts).unflatten(0, (10, count)).transpose(0, 1).flatten(0, 1)


def patchwork(dice, x, y, sites):
    """Each pixel takes the colour, drawn here, of the nearest site (cx, cy), plus a smooth shade: [n, 3, size, size]."""
    colours = [dice.colour((0, 1), (0, 0.7), (0.15, 1)) for _ in sites]  # [n, 3, 1, 1] each
    distances = [(x[:1] - cx).square() + (y[:, :1] - cy).square() for cx, cy in sites]  # [n, 1, size] + [n, size, 1]
    closest = torch.stack(distances).argmin(0)  # [n, size, size]
    palette = torch.stack(colours, 2)[..., 0, 0]  # [n, 3, sites]
    image = palette.gather(2, closest.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, x.shape)
    return image + F.interpolate(dice.shade(), x.shape, mode="bicubic", align_corners=True)


def noisy_bytes(image, noise):
    """Images in [0, 1] with noise in [0, 1), a tenth of it, as uint8."""
    image = image + 0.1 * (noise - 0.5)
    return (image.clamp(0, 1) * 255).round().byte()


def paint(image, x, y, c, radius, angle, cx, cy, light, dark):
    """Paints objects of class c, turned by an angle, over images [n, 3, size, size]: a soft outline, filled with two
    colours by the class's pattern. Returns the images and the objects' coverage [n, 1, size, size]."""
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    outline, pattern = SHAPES[c](u, v)
    inside = torch.sigmoid(-2.5 * radius * outline)[:, None]
    mix = torch.sigmoid(4 * pattern)[:, None]
    return image * (1 - inside) + (light * (1 - mix) + dark * mix) * inside, inside


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class Range:
    """What a number may be: from the least to the greatest, finite."""

    words: str
    least: float
    greatest: float = sys.float_info.max


# Types of settings: argparse gets its types and choices from them, `check_value` the ranges.
ABOVE_0, BELOW_1 = math.ulp(0), math.nextafter(1, 0)
Whole = Annotated[int, Range("from 0", 0)]
Count = Annotated[int, Range("from 1", 1)]
BatchSize = Annotated[int, Range("from 2", 2)]  # alone, a sample has nothing to be told from
FromMinusOne = Annotated[int, Range("from -1", -1)]
Number = Annotated[float, Range("from 0", 0)]
Positive = Annotated[float, Range("above 0", ABOVE_0)]
Fraction = Annotated[float, Range("from 0, up to 1", 0, 1)]
Share = Annotated[float, Range("above 0, up to 1", ABOVE_0, 1)]
Ratio = Annotated[float, Range("from 0, below 1", 0, BELOW_1)]


@dataclass
class RunSettings:
    """The flags that every paper's program has and no paper speaks of."""

    data: str = "shapes"  # a built-in set, a torchvision name, or a folder
    model: str = ""  # vit_ + size (nano mini ti s sw b l h 2b) + side of a patch in pixels: vit_b16
    image_size: Count = 224  # side of the encoder's images in pixels
    out: str = ""  # run folder; default: a fresh numbered one under runs/
    resume: bool = False  # go on with the run in `out`
    init: str = ""  # encoder file to start from
    seed: Annotated[int, Range("from 0, below 2^63", 0, 2**63 - 1)] = 0  # of all random numbers
    authors: bool = False  # settings of the authors' code where it is not the paper's (AUTHORS); other flags win
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware has units for it
    micro_batch: Whole = 0  # samples of one process at a time; 0: all
    clip_grad: Number = 0.0  # largest gradient norm; 0: no clipping
    workers: FromMinusOne = -1  # decoding processes of each rank; −1: one for each core it has, at most 12
    attention_heads: Whole = 0  # of the encoder; 0: the model's own (MoCo v3's ViT-S has 12 instead of 6)
    eval: bool = True  # evaluate before and after the training, where the data have labels and a val/
    save_every: Whole = 0  # steps between checkpoints; 0: one an epoch
    short: bool = False  # the built-in run in a minute or two
    checkpoint_blocks: bool = False  # recompute the encoder's blocks in the backward pass: less memory, a third more time
    zero: bool = False  # spread AdamW's moments over the processes
    compile: bool = False  # torch.compile of the transformer blocks; meant for GPUs, tested on CPUs
    tensorboard: bool = False  # the numbers of log.jsonl for TensorBoard too, if it is installed
    cost: bool = False  # train nothing: print what a step of each stage costs with these settings


# what may differ when a run is resumed: what changes no result, and what helps after a divergence
FREE_ON_RESUME = ("out", "resume", "workers", "micro_batch", "checkpoint_blocks", "zero", "compile", "save_every",
                  "tensorboard")  # fmt: skip
REMEDIES = ("precision", "clip_grad", "lr", "mae_lr", "head_lr", "ct_head_lr")


def parse_settings(cls, presets, argv, description):
    """Command line → settings: defaults of the dataclass, then `presets(given)`, then the flags that were given.

    Every field of `cls` is a flag of its name, for a bool with its opposite --no_NAME; --help shows the values that the
    rest of the command line leads to, where it is another beside the recipe's, explained by the comments of the fields,
    which speak of the latter. `presets` gets the given flags as a dict
    and returns field values, among them the model's row of the paper's table. With --resume the run's config.json is
    the base, and flags that say otherwise are refused.
    """
    title = " ".join((description or "").split("\n\n")[0].split())  # none under python -OO
    usage = "%(prog)s [--FLAG VALUE ...] [--SWITCH ...]"
    how = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    parser = Parser(description=title, usage=usage, **how)
    of_paper = parser.add_argument_group("of the paper", "its value in brackets; a switch --X has an opposite, --no_X")
    of_all = parser.add_argument_group("of every program")
    of_all.add_argument("-h", "--help", action="store_true", help="this text, for the rest of the command line")
    shared, meaning = comments(RunSettings), comments(cls)
    flags = []
    for f in dataclasses.fields(cls):
        group = of_all if f.name in shared else of_paper
        flags.append(add_flag(group, f.name, f.type, meaning.get(f.name) or shared.get(f.name, "")))
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        values = vars(cls(**{**presets(given), **given}))
        recipe = vars(cls(**presets(given | dict(data="random"))))
        for flag in flags:
            value, usual = values[flag.dest], recipe[flag.dest]
            said = value if value == usual or flag.dest in shared else f"{value} instead of {usual}"
            flag.help = f"[{said}] {flag.help}".replace("[] ", "")
        parser.print_help()
        raise SystemExit(0)
    if given.get("resume"):
        return resumed_settings(cls, given)
    if given.get("cost"):
        given.setdefault("data", "random")
    settings = check_settings(cls(**{**presets(given), **given}))
    built_in = settings.data in ("shapes", "moving_shapes")
    need(built_in or not settings.short,
         f"--short is a length of the built-in runs, not of --data {settings.data}: give --epochs")  # fmt: skip
    return settings


def resumed_settings(cls, given):
    """Settings of the run in --out, and of the given flags, which may not contradict it."""
    folder = given.get("out", "")
    config = Path(folder) / "config.json"
    need(folder and config.is_file(), "--resume needs --out DIR with a folder that holds a run")
    saved = read_json(config, "restore it, or start a new run")
    saved.pop("made_by", None)
    types = {f.name: value_type(f.type) for f in dataclasses.fields(cls)}
    odd = sorted(types.keys() ^ saved.keys())
    odd += [name for name in types.keys() & saved.keys() if not fits(saved[name], types[name])]
    need(not odd, f"{config} does not fit this program ({', '.join(odd[:4])}): "
                  "resume with the program and version that wrote it, or start a new run")  # fmt: skip
    for name, value in given.items():
        free = name in FREE_ON_RESUME + REMEDIES and not (name.endswith("lr") and value > saved[name])
        need(free or saved.get(name) == value,
             f"--{name} {value} contradicts {config}, which says {saved.get(name)}; leave the flag out")  # fmt: skip
    return check_settings(cls(**{**saved, **given}))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def add_flag(parser, name, kind, text, **more):
    """Adds --name, of one of the types of settings, to a parser; `more` as of add_argument. Returns argparse's action."""
    text = text.replace("%", "%%")
    kind = without_none(kind)
    if kind is bool:
        off = dict(dest=name, action="store_false", help=argparse.SUPPRESS)
        parser.add_argument(f"--no_{name}", f"--no-{name}", **off, **more)
        return parser.add_argument(f"--{name}", action="store_true", help=text, **more)
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
        more["nargs"] = "+"
    if get_origin(kind) is Literal:
        return parser.add_argument(f"--{name}", choices=get_args(kind), help=text, **more)
    return parser.add_argument(f"--{name}", type=value_type(kind), metavar="X", help=text, **more)


def without_none(kind):
    """X of X | None, which stands for "the recipe's"."""
    return get_args(kind)[0] if type(None) in get_args(kind) else kind


def value_type(kind):
    """The plain type of a setting's values: int of Whole, str of a Literal."""
    if get_origin(kind) is Literal:
        return str
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def fits(value, kind):
    """Whether a value from a JSON file is of a plain type; whole numbers are floats too."""
    return type(value) is kind or kind is float and type(value) is int


@functools.cache
def comments(thing):
    """{name: the comment behind it} of a dataclass's fields or a function's keyword parameters, written one a line:
    `    seed: int = 0,  # of all random numbers`. Empty where there is no source, as under `python -m cProfile`."""
    try:
        source = inspect.getsource(thing)
    except OSError:
        return {}
    return dict(re.findall(r"^    (\w+): .*?# (.*)", source, re.M))


def check_settings(settings):
    """A dataclass of settings again; an error for a value that its field's type does not allow, or a warm-up that
    outlasts its training."""
    for f in dataclasses.fields(settings):
        check_value(f.name, getattr(settings, f.name), f.type)
        if f.name.endswith("warmup_epochs"):
            training = f.name.replace("warmup_", "")
            warmup, epochs = getattr(settings, f.name), getattr(settings, training)
            need(warmup <= epochs, f"--{f.name} {warmup:g} outlasts --{training} {epochs:g}: choose less")
    return settings


def check_value(name, value, kind):
    """An error if the flag --name may not have this value, or one of these, by its type."""
    kind = without_none(kind)
    if value is None:
        return
    if get_origin(kind) is list:
        for one in value:
            check_value(name, one, get_args(kind)[0])
    elif get_origin(kind) is Literal:
        need(value in get_args(kind), f"--{name} {value}: choose from {', '.join(get_args(kind))}")
    elif get_origin(kind) is Annotated:
        allowed = get_args(kind)[1]
        said = f"{value:g}" if isinstance(value, float) else value
        need(allowed.least <= value <= allowed.greatest, f"--{name} {said}: choose a number {allowed.words}")


def check_batch(settings, images, batch, epochs):
    """An error if the global batch does not fit the set, the processes or the micro-batches, or if the epochs are less
    than a step."""
    need(batch >= 1, f"the training set ({len(images)} images) is too small for a batch on {world()} processes")
    flag = next((name for name in ("batch", "mae_batch") if getattr(settings, name, 0) == batch), "batch")
    need(batch <= len(images),
         f"--{flag} {batch} is larger than the training set ({len(images)} images of --data {settings.data}): choose a smaller "
         "one, and smaller queues and warm-ups where there are any")  # fmt: skip
    per_epoch = len(images) // batch
    need(round(epochs * per_epoch) >= 1, f"{epochs:g} epochs of {per_epoch} steps are not one step: choose more")
    need(batch % world() == 0, f"batch {batch} is not divisible by {world()} processes")
    share, micro_batch = batch // world(), settings.micro_batch
    need(not micro_batch or share % micro_batch == 0,
         f"--micro_batch {micro_batch} does not divide a process's batch of {share}")  # fmt: skip


def check_masking(grid, *ratios):
    """An error if one of the mask ratios removes all patches of a grid (height, width)."""
    patches = math.prod(grid)
    for ratio in ratios:
        need(int(patches * (1 - ratio)) >= 1,
             f"masking {ratio:g} of {patches} patches keeps none: mask less, or smaller ones")  # fmt: skip


def new_encoder(s, pool="cls", **kind):
    """The encoder that settings ask for, with the weights of --init; `kind` as of build_vit."""
    kind |= dict(checkpoint_blocks=s.checkpoint_blocks, heads=s.attention_heads)
    encoder = build_vit(s.model, s.image_size, pool, **kind)
    has_checkpoint = s.resume and any((Path(s.out) / name).exists() for name in CHECKPOINTS)  # with the encoder's weights
    if s.init and not has_checkpoint:
        init_encoder(encoder, s.init)
    return encoder


# ----------------------------------------------------------------------------------------------------------------- run


CHECKPOINTS = ("last.pt", "previous.pt")


def open_run(settings, machine, command=None):
    """Makes the folder of a run (--out, or a fresh numbered one), or opens it to go on with --resume, and writes config.json.
    `command`: the words of the command line that resumes it, if not this program with --out and --resume."""
    if settings.tensorboard:
        summary_writer()
    need_alike({name: value for name, value in vars(settings).items() if name not in ("out", "workers", "tensorboard")})
    folder = [str(make_folder(settings))] if rank() == 0 else [""]
    if world() > 1:
        dist.broadcast_object_list(folder, device=machine.device)
    folder = Path(folder[0])
    config = dataclasses.asdict(settings) | dict(out=str(folder), resume=False)
    changes = {}
    if settings.resume:
        before = read_json(folder / "config.json", "restore it, or start a new run")
        changes = {name: config[name] for name in REMEDIES if name in config and config[name] != before.get(name)}
    run = Run(machine, settings, folder, changes, command or [sys.argv[0], "--out", str(folder), "--resume"])
    if changes or not settings.resume:
        write_atomic(folder / "config.json", to_json(config | dict(made_by=made_by(machine))))
    if world() > 1:
        dist.barrier()
        need(settings.cost or (folder / "config.json").exists(),
             f"rank 0's run folder {folder} is not visible here: put it where all nodes see it")  # fmt: skip
    if not settings.cost:
        print0(f"run folder {folder}" + (f", resuming {run.checkpoint['stage']}" if run.checkpoint else ""))
    return run


def summary_writer():
    """TensorBoard's class that writes scalars."""
    remedy = "pip install tensorboard, or leave out --tensorboard: log.jsonl has the same numbers"
    return optional("torch.utils.tensorboard", remedy).SummaryWriter


def make_folder(settings):
    """The folder of a run; nothing that is there is overwritten."""
    if settings.cost:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    folder = Path(settings.out or "runs")
    try:
        if settings.out:
            used = folder.is_dir() and any(folder.iterdir())
            need(settings.resume or not used,
                 f"--out {folder} holds a run or other files: add --resume to go on, or choose another")  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        for number in itertools.count(1):
            folder = Path("runs") / f"{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as e:
        raise InputError(f"run folder {folder} cannot be made ({e.strerror}): choose another with --out DIR") from e


class Run:
    """What a program keeps of a run: its folder with results.json and checkpoints, and the stages that are behind it.

    Without a folder nothing is kept: for trainings that are too short to be stopped.
    """

    def __init__(self, machine, settings=None, folder=None, changes=None, command=()):
        self.machine = machine
        self.command = command  # that resumes it, without the interpreter
        self.settings = settings or RunSettings()
        self.folder = folder
        self.changes = changes or {}  # settings that are others since the run was resumed
        self.checkpoint = read_checkpoint(folder) if self.settings.resume else None
        self.finished = self.checkpoint["finished"] if self.checkpoint else []  # stages
        self.results = {}
        if self.settings.resume and (folder / "results.json").exists():
            path, remedy = folder / "results.json", "delete it, or restore it"
            self.results = read_json(path, remedy)
            self.results.pop("units", None)
            need(all(isinstance(row, dict) for row in self.results.values()), f"{path} holds no table: {remedy}")

    def report(self, name, values):
        """Adds a dict of final numbers to results.json under `name`; their units stand there once. Prints those that have
        one."""
        self.results[name] = values
        if self.folder and not self.settings.cost:
            numbers = {number: v for number, v in values.items() if isinstance(v, float) and unit(number)}
            print0(f"{name}:", "  ".join(f"{number} {v:.1f} {unit(number)}" for number, v in numbers.items()))
            units = {number: unit(number) for number in itertools.chain(*self.results.values())}
            write_atomic(self.folder / "results.json", to_json(self.results | dict(units=units)))

    def take_checkpoint(self, stage, state, count):
        """Loads the checkpoint of a stage into its state; returns the step to go on with, 0 without one."""
        if not self.checkpoint or self.checkpoint["stage"] != stage:
            return 0
        path, saved = self.folder / "last.pt", self.checkpoint
        need(state.keys() == saved["state"].keys(), f"{path} is a checkpoint of another program")
        need(saved["count"] == count,
             f"{path} is of a training with {saved['count']} samples, now there are {count}: restore the data, "
             "or start a new run")  # fmt: skip
        for name, part in state.items():
            load_state(part, saved["state"][name], f"{path} ({name})")
        self.checkpoint = None
        return saved["step"]

    def write_checkpoint(self, stage, step, state, count):
        """Saves the state of a stage before its step number `step`; the checkpoint before becomes previous.pt."""
        for name, part in state.items():
            if isinstance(part, ZeroOptimizer):
                part.consolidate_state_dict()  # on rank 0
            if isinstance(part, nn.Module):
                odd = not_finite(part.state_dict())
                need(not odd, f"after step {step} of {stage} weights are not finite ({name}: {', '.join(odd[:3])}); the "
                              f"checkpoint before is kept in {self.folder}")  # fmt: skip
        if rank() == 0:  # which alone has the state of a ZeroOptimizer
            states = {name: part.state_dict() for name, part in state.items()}
            content = dict(stage=stage, step=step, count=count, finished=self.finished, state=states)
            save_file(self.folder / "last.pt", content, keep=self.folder / "previous.pt")
        if world() > 1:
            dist.barrier()

    def finish(self, stage):
        """Notes that a stage is behind the run."""
        if self.folder and stage not in self.finished:
            self.finished = [*self.finished, stage]

    def how_to_resume(self):
        """What to type to go on from the last checkpoint."""
        program = ["python"]
        if world() > 1:
            program = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(world()))]
        return f"go on with {shlex.join([*program, *self.command])}"

    def close(self):
        """Prints the table of results.json, one row a stage; draws the losses."""
        print_table(self.results)
        if not self.settings.cost:
            if rank() == 0:
                draw_losses(self.folder)
            print0(f"everything is in {self.folder}")


def read_checkpoint(folder):
    """The newest checkpoint of a run, None before the first; if it is damaged, the error offers the one before it. A kill
    amid the two renamings of a save leaves previous.pt alone."""
    last, previous = (folder / name for name in CHECKPOINTS)
    path = last if last.exists() else previous
    if not path.exists():
        return None
    try:
        content = load_file(path)
        kinds = dict(stage=str, step=int, count=int, finished=list, state=dict)
        whole = isinstance(content, dict) and {name: type(v) for name, v in content.items()} == kinds
        need(whole, f"{path} is no checkpoint of a run")
        return content
    except InputError as e:
        older = path == last and previous.exists()
        command = shlex.join(["mv", str(previous), str(last)] if older else ["rm", str(path)])
        what = "the checkpoint before it is whole: go on from that" if older else "there is no other: begin anew"
        raise InputError(f"{str(e).splitlines()[0]}; {what} after `{command}`, with --resume") from e


class StopSignals:
    """SIGTERM and SIGINT while a training runs, within `with`: the first is told to `save_if_due`, which ends the program after
    the step in progress. If no step is in progress, since the data do not come (a dead disk), the program ends some
    seconds later with exit status 1, and at a second signal at once."""

    def __init__(self, stage, hint):
        self.stage, self.hint = stage, hint
        self.told, self.waiting = 0.0, False  # when it was told first

    def __enter__(self):
        reactions = {signal.SIGTERM: self.on_signal, signal.SIGINT: self.on_signal, signal.SIGALRM: self.on_alarm}
        self.handlers = {number: signal.signal(number, reaction) for number, reaction in reactions.items()}

    def __exit__(self, *error):
        signal.alarm(0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def wait_for(self, stream):
        """The next item of an iterator, None at its end."""
        self.waiting = True
        item = next(stream, None)
        self.waiting = False
        return item

    def on_signal(self, number, frame):
        """The first or the second. Within a second it is the same one, which torchrun or the sender gives to all processes."""
        now = time.monotonic()
        if self.told and now - self.told > 1:
            self.end("by a second signal")
        self.told = self.told or now
        signal.setitimer(signal.ITIMER_REAL, 5, 1)

    def on_alarm(self, number, frame):
        """Five seconds after the first, and each second from then on."""
        if self.waiting:
            self.end("while it waited for data")

    def end(self, how):
        """Ends the program and its decoding processes, whatever they do; the last checkpoint is whole."""
        if rank() == 0:
            print(f"\n{self.stage} was stopped {how}; {self.hint}", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


class Training:
    """The steps of one training of a run: counted, taken or skipped, logged, saved, and resumed where they stopped.

        training = Training(run, "mae", dict(encoder=encoder, optimizer=optimizer), len(images), batch, epochs)
        for data in training.batches(images, views):
            loss, aux = backward(encode, objective, inputs)
            set_lr(optimizer, warmup_cosine(training.step, training.total, warmup))
            taken, log = training.take_step(optimizer, loss)
            training.log(log)
            training.save_if_due()

    A training that the run has behind it yields no steps. SIGTERM and SIGINT end the program after the step in progress.

    Args:
        stage: its name in the log; state: {name: module or optimizer} of all that it changes; count: samples in an epoch
        of count // batch steps; batch: global size; epochs: how many, also in part.
    """

    def __init__(self, run, stage, state, count, batch, epochs):
        self.run, self.stage, self.state = run, stage, state
        self.count, self.batch = count, batch
        self.per_epoch = count // batch
        self.total = max(1, round(epochs * self.per_epoch))
        self.step = self.total  # the next one, or the one in progress
        if stage not in run.finished:
            self.step = run.take_checkpoint(stage, state, count)
        self.skipped_in_a_row = 0
        self.stop = False  # some process was told to end
        self.buckets = []  # of gradients; none on one process
        self.signals = StopSignals(stage, run.how_to_resume())
        self.progress = Progress(stage, self.total, self.step, batch)
        self.scalars = None  # TensorBoard's writer

    @property
    def epoch(self):
        """Of the step in progress, from 0."""
        return self.step // self.per_epoch

    def batches(self, images, views):
        """Yields a Batch of random crops for each step; with --cost a few of random pixels, which are timed."""
        if self.run.settings.compile:
            compile_blocks(self.state)
        if self.run.settings.cost:
            return self.steps(measured_batches(self, images, views))
        seed, machine = self.run.settings.seed, self.run.machine
        return self.steps(batches(images, views, self.batch, self.step, self.total, seed, machine))

    def steps(self, stream):
        """Counts what `stream` yields: it begins with the step that is to come first and ends with the last."""
        if self.step >= self.total:  # all of it is behind the run
            self.run.finish(self.stage)
            return
        stream = iter(stream)
        with contextlib.ExitStack() as at_end:
            at_end.callback(self.remove_hooks)
            if self.run.folder:
                at_end.enter_context(self.signals)
                begin_log(self.run, self.stage, self.step)
                if self.run.settings.tensorboard and rank() == 0:
                    folder = self.run.folder / "tensorboard" / self.stage
                    self.scalars = summary_writer()(folder, purge_step=self.step)
                    at_end.callback(self.scalars.close)
            for self.step in itertools.count(self.step):
                data = self.signals.wait_for(stream)
                if data is None:
                    break
                yield data
        self.run.finish(self.stage)
        if unreadable := self.run.machine.unreadable:
            print(f"{len(unreadable)} unreadable files were passed over", flush=True)  # by this process

    def take_step(self, optimizer, loss, **values):
        """Averages gradients over ranks, clips them and steps; what is not finite is skipped, on all ranks. Ten skipped steps
        in a row end the run.

        Args:
            loss: this rank's detached loss; values: further tensors to average over ranks, scalars or vectors.
        Returns:
            (whether the step was taken, {"loss", "lr", "grad_norm" and the values} as numbers or lists).
        """
        parameters = parameters_of(optimizer)
        self.average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.run.settings.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.settings.clip_grad, norm)
        stop = torch.tensor(float(self.signals.told > 0))
        values = dict(loss=loss, grad_norm=norm, stop=stop, **values)
        means = means_over_ranks(values, self.run.machine.device)  # the one wait for the device in a step
        self.stop = means.pop("stop") > 0  # all ranks agree
        taken = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.count_skipped(taken, means)
        return taken, means | dict(lr=max(group["lr"] for group in optimizer.param_groups))

    def average_gradients(self, parameters):
        """Replaces gradients by their means over ranks; from the second step on most transfers have started before."""
        if world() > 1 and not self.buckets:
            self.buckets = fill_buckets(parameters, self.state)
        for bucket in self.buckets:
            if not bucket.transfer:
                bucket.send()
        for bucket in self.buckets:
            bucket.receive()

    def remove_hooks(self):
        """Parameters may have another training, with buckets of its own."""
        for bucket in self.buckets:
            for hook in bucket.hooks:
                hook.remove()

    def count_skipped(self, taken, means):
        """Tells of a skipped step; the tenth in a row is an error."""
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if not taken:
            print0(f"\nstep {self.step} ({self.stage}) skipped: loss {means['loss']}, gradient norm {means['grad_norm']}")
        remedy = "start a new run with a lower learning rate, --clip_grad 1 or --precision float32"
        need(self.skipped_in_a_row < 10, f"10 steps in a row were not finite: {remedy}")

    def log(self, means, **more):
        """A line of log.jsonl, and now and then one of progress on the terminal; lists are not shown there."""
        if self.run.settings.cost:
            return
        values = means | more
        scalars = [f"{name} {v:.4g}" for name, v in values.items() if not isinstance(v, list)]
        rate = self.progress.rate(self.step + 1)
        if self.run.folder and rank() == 0:
            line = dict(stage=self.stage, step=self.step, epoch=self.epoch, images_per_s=round(rate, 1), **values)
            append_line(self.run.folder / "log.jsonl", line)
        for name, v in values.items() if self.scalars else ():
            self.scalars.add_scalar(name, np.mean(v), self.step)  # of a list the mean
        text = f"epoch {self.epoch + 1}  {rate:.0f} images/s  {'  '.join(scalars)}"
        self.progress.show(self.step + 1, text, show_last=self.run.folder is not None)

    def save_if_due(self):
        """Writes a checkpoint after every epoch (or --save_every steps) and at the end; if the program was told to end, it
        does so here."""
        if not self.run.folder or self.run.settings.cost:
            return
        done = self.step + 1
        every = self.run.settings.save_every or self.per_epoch
        if self.stop or done % every == 0 or done == self.total:
            self.run.write_checkpoint(self.stage, done, self.state, self.count)
        if self.stop:
            print0(f"\nstopped after step {done} of {self.total} ({self.stage}); {self.run.how_to_resume()}")
            raise SystemExit(0)


def begin_log(run, stage, step):
    """Cuts log.jsonl off behind the last line that belongs to the checkpoint before this step."""
    path = run.folder / "log.jsonl"
    keep = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, LookupError, TypeError):  # the last line of a killed run
            entry = json.loads(line)
            if entry["stage"] in run.finished or entry["stage"] == stage and entry["step"] < step:
                keep.append(line + "\n")
    write_atomic(path, "".join(keep).encode())
    if run.changes and rank() == 0:
        append_line(path, dict(stage=stage, step=step, changed=run.changes))


def append_line(path, content):
    """Adds a line of JSON to a file."""
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(finite(content)) + "\n")


def tell_proportions(training, ema, queue):
    """Says before a training how much of its start the EMA of the encoder will keep, and whether the queue will be filled;
    and what to change if the training is too short for them."""
    steps, settings = training.total, training.run.settings
    if settings.cost or training.step == steps:
        return
    constants = steps * (1 - ema)
    print0(f"{training.stage}: {steps} steps are {constants:.3g} time constants of the EMA, which keeps "
           f"{100 * ema**steps:.3g} % of its start")  # fmt: skip
    if constants < 2:  # Table 9 of MAE-CT has 2.5
        print0(f"that is little: encoder.pt will be near its start; choose --ema {max(0.0, 1 - 5 / steps):.4g} or more epochs")
    if steps * training.batch < queue:
        print0(f"{steps * training.batch} samples will not fill the queue of {queue}: choose a smaller --queue or more epochs")


def finite(value):
    """A number, or a list or dict of values, with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(content):
    """Text in UTF-8; what JSON does not know (paths) as text."""
    return json.dumps(finite(content), indent=1, default=str).encode()


def compile_blocks(state):
    """torch.compile of the transformer blocks, one by one and in place: quick to compile, and no name changes."""
    for part in state.values():
        for module in part.modules() if isinstance(part, nn.Module) else []:
            if isinstance(module, Block):
                module.compile()


class Progress:
    """One line that says how far a loop is: on a terminal it is rewritten, less what does not fit, in a log file there is one
    every ten seconds, later every minute.

    Args:
        what: is done; total: steps; done: of them before this program began; batch: what `rate` counts a step as.
    """

    def __init__(self, what, total, done=0, batch=1):
        self.what, self.total, self.first, self.batch = what, total, done, batch
        self.begin = self.shown = time.monotonic()

    def rate(self, done):
        """Samples a second."""
        return (done - self.first) * self.batch / max(time.monotonic() - self.begin, 1e-9)

    def show(self, done, text="", show_last=False):
        """Shows the line if it is time, and after the last step where that is wanted, or ends the line on a terminal."""
        now = time.monotonic()
        terminal = sys.stdout.isatty()
        ended = done >= self.total
        pause = 0.5 if terminal else min(60, max(10, (now - self.begin) / 10))
        started = terminal and self.shown > self.begin
        if now - self.shown < pause and not (ended and (started or show_last)):
            return
        self.shown = now
        left = int((self.total - done) * (now - self.begin) / max(done - self.first, 1))
        line = f"{self.what}  {done}/{self.total}  {left // 60}:{left % 60:02d} left  {text}"
        if not terminal:
            return print0(line)
        width = shutil.get_terminal_size().columns - 1
        if len(line) > width:
            line = line[: width + 2].rpartition("  ")[0] or line[:width]
        print0(f"\r{line}\033[K", end="\n" if ended else "")


def progress(items, total, what):
    """Yields the items under a line of progress."""
    shown = Progress(what, total)
    for done, item in enumerate(items, 1):
        yield item
        shown.show(done)


def measured_batches(training, images, views):
    """The steps of --cost on random pixels."""
    n, device = training.batch // world(), training.run.machine.device
    noise = [torch.randint(256, (n, 3, v.size, v.size), dtype=torch.uint8) for v in views]
    rows = torch.arange(n) + rank() * n
    labels = images.labels[rows].to(device)
    return measured(training, lambda: Batch([x.to(device, copy=True) for x in noise], rows.to(device), labels, rows, 0))


def measured(training, draw):
    """The steps of --cost: five times what `draw` gives. Multiply-adds are counted in the first, the last three are timed;
    what they cost becomes the stage's row of results.json."""
    run, device = training.run, training.run.machine.device
    n = training.batch // world()
    reset_peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        yield draw()
    multiply_adds = counter.get_total_flops() / 2 / n  # the counter gives FLOPs
    yield draw()
    begin = synchronized_clock(device)
    for _ in range(3):
        yield draw()
    seconds = (synchronized_clock(device) - begin) / 3
    run.report(training.stage, {
        "parameters/M": sum(p.numel() for p in parameters_of(training.state["optimizer"])) / 1e6,
        "madds/M": multiply_adds / 1e6,
        "images/s": training.batch / seconds,
        "peak/GiB": peak_memory(device) / 2**30,
        "of matmul/%": 100 * multiply_adds * n / seconds / matmul_rate(run.machine),
        "device-hours": training.total * seconds * world() / 3600,
    })  # fmt: skip


def synchronized_clock(device):
    """Seconds, once the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(machine):
    """Multiply-adds a second of a plain matrix product."""
    side = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=machine.device, dtype=machine.precision)
    a @ a
    begin = synchronized_clock(machine.device)
    for _ in range(5):
        a @ a
    return 5 * side**3 / (synchronized_clock(machine.device) - begin)


def reset_peak_memory(device):
    """`peak_memory` counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # without this right the peak is that of all stages so far
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """The most memory that was in use, in bytes: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


UNITS = {  # of results, by the ends of their names
    "%": "knn|neighbours|of_centres|probe|cluster_acc|lowshot|finetune|video|miou|accuracy|mean per class|mAP|std|by_split"
         "|_cls|_object|_motion",
    "x 100": "nmi|ami|ari|silhouette",
    "% of a uniform guess": "colorhist|last",
}


def unit(name):
    """The unit of a result's number or numbers, "" for one that has none."""
    name = re.sub("_(by|per)_.*", "", name)
    return next((found for found, names in UNITS.items() if re.search(f"({names})$", name)), "")


def print_table(rows):
    """Prints {row: {name: number}}, each row as a column; lists are left out."""
    if not rows:
        return
    names = [name for name, v in next(iter(rows.values())).items() if not isinstance(v, list)]
    print0(" " * 16 + "".join(f"{row:>13}" for row in rows))
    for name in names:
        values = [row.get(name) for row in rows.values()]
        values = [value if isinstance(value, int | float) else math.nan for value in values]
        print0(f"{name:>16}" + "".join(f"{value:13.1f}" for value in values) + f" {unit(name)}".rstrip())


# --------------------------------------------------------------------------------------------------------------- files


def save_encoder(path, encoder, **more):
    """Writes encoder.pt: {"model": weights under MAE's and timm's names, "encoder": what a reader needs to know, **more}; or
    encoder.safetensors, by the name's end: the weights, and "encoder" as JSON in the metadata.

    "encoder" holds image_size, patch_size, dim, depth, heads, post_norm, pool, final_norm (whether the norm after the
    last block belongs to the feature) and stem.
    """
    config = encoder.config | dict(final_norm=not encoder.config["post_norm"])
    if Path(path).suffix == ".safetensors":
        safetensors = optional("safetensors.torch", f"pip install safetensors, or choose another end than that of {path}")
        write_atomic(path, safetensors.save(encoder.state_dict(), dict(format="pt", encoder=json.dumps(config))))
        return
    save_file(path, dict(model=encoder.state_dict(), encoder=config, **more))


def load_encoder(path, image_size=None, pool=None, heads=None):
    """A ViT built from an encoder file, on the CPU, in evaluation mode; positions are interpolated if `image_size` differs
    from the file's, `pool` and `heads` replace what the file says or what is assumed of it, which is printed."""
    with understanding(path):
        state, config = read_encoder(path)
        side, dim = config["image_size"] // config["patch_size"], config["dim"]
        pool, heads = pool or config["pool"], heads or config["heads"]
        if not heads:
            known = ", ".join(VIT_SIZES)
            need(dim in HEADS_OF_WIDTH, f"{path}: a ViT of width {dim} is none of {known}: give --attention_heads")
            heads = HEADS_OF_WIDTH[dim]
            print0(f"{path}: {heads} attention heads are assumed of its width of {dim}")
        if not pool:
            pool = "cls"
            print0(f"{path}: [CLS] is assumed to be the feature")
        config |= dict(image_size=image_size or config["image_size"], pool=pool, heads=heads)
        encoder = ViT(**config)
        load_encoder_state(encoder, state, side, path)
    return encoder.eval()


def init_encoder(encoder, path):
    """Loads an encoder file into an encoder of the same width, depth, patch and norm placement (`--init`)."""
    with understanding(path):
        state, config = read_encoder(path)
    of_file, of_model = ("post-norm" if c["post_norm"] else "pre-norm" for c in (config, encoder.config))
    need(of_file == of_model,
         f"{path}: its blocks are {of_file}, those of the model {of_model} "
         "(data2vec 2.0 is post-norm, MAE pre-norm)")  # fmt: skip
    load_encoder_state(encoder, state, config["image_size"] // config["patch_size"], path)
    of_file, of_model = config["heads"], encoder.config["heads"]
    need(of_file in (None, of_model),
         f"{path}: its blocks have {of_file} attention heads, those of the model {of_model}: "
         f"choose --attention_heads {of_file}")  # fmt: skip
    if of_file is None:
        print0(f"{path}: the model's {of_model} attention heads are assumed to be its own")


def load_encoder_state(encoder, state, side, path):
    """Loads weights whose position table has a grid of side x side."""
    odd = not_finite(state)
    need(not odd, f"{path}: weights are not finite ({', '.join(odd[:3])})")
    if state["pos_embed"].shape[-1] == encoder.dim:
        state["pos_embed"] = resize_positions(state["pos_embed"], (side, side), encoder.grid)
    load_state(encoder, state, str(path))


def not_finite(state):
    """Names in a state dict whose values are not all finite."""
    return [name for name, v in state.items() if not v.isfinite().all()]


HEADS_OF_WIDTH = {dim: heads for dim, _, heads in VIT_SIZES.values()}  # of public files, which do not say
ENCODER_NAMES = r"(cls_token|pos_embed|patch_embed\.(proj|down|norms|stages|fc)|embed_norm|(post_)?blocks\.\d+|norm)(\.|$)"
DATA2VEC_NAMES = {
    "modality_encoders.IMAGE.local_encoder.proj.": "patch_embed.proj.",
    "modality_encoders.IMAGE.extra_tokens": "cls_token",
    "modality_encoders.IMAGE.fixed_positional_encoder.positions": "pos_embed",
    "modality_encoders.IMAGE.context_encoder.norm.": "embed_norm.",
    "blocks.": "post_blocks.",
}


def read_encoder(path):
    """An encoder file, ours or a public one → (state dict under our names, config for ViT, whose heads and pool are None
    where the file does not say).

    Understands files written here, public MAE (encoder-only, with decoder, fine-tuned), timm, MAE-CT (no position of [CLS]),
    MIM-Refiner and data2vec 2.0 (fairseq's names, stripped of other objects); also under a prefix (module., backbone.,
    base_encoder., …) or in a dict of a teacher and a student. Classifiers and decoders are left out. What is taken is
    printed.
    """
    content = load_file(path)
    state = renamed(without_prefix(encoder_state(content, path), path), path)
    own = content.get("encoder")
    own = own if isinstance(own, dict) and "patch_size" in own else {}
    tuned = "mean" if "fc_norm.weight" in state else None
    state = {name: v for name, v in state.items() if re.match(ENCODER_NAMES, name)}
    stem = "conv" if "patch_embed.down.0.weight" in state else "patch"
    first = "patch_embed.down.0.weight" if stem == "conv" else "patch_embed.proj.weight"
    need(first in state and "pos_embed" in state, f"{path} is no ViT encoder: it has no patch_embed.proj.weight and pos_embed")
    state["pos_embed"] = square_positions(state["pos_embed"], path)
    rows, dim = state["pos_embed"].shape[1:]
    heads, pool = own.get("heads"), own.get("pool") or tuned
    known = (heads is None or type(heads) is int and heads > 0) and pool in (None, "cls", "mean")
    need(known, f"{path} says of its encoder: {heads} heads, pool {pool}")
    patch_size = state[first].shape[-1] * (4 if stem == "conv" else 1)
    hidden = (len(v) for name, v in state.items() if name.endswith("blocks.0.mlp.fc1.weight") and v.ndim)
    config = dict(
        image_size=math.isqrt(rows - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        depth=len({name.split(".")[1] for name in state if name.startswith(("blocks.", "post_blocks."))}),
        heads=heads,
        post_norm=any(name.startswith("post_blocks.") for name in state),
        pool=pool,
        stem=stem,
        mlp_ratio=next(hidden, 4 * dim) // dim,
    )
    return state, config


def encoder_state(content, path):
    """The dict of tensors in an encoder file, by itself or within others."""
    state = content if isinstance(content, dict) else {"": content}
    for key in ("teacher", "student", "model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
            if key in ("teacher", "student"):
                print0(f"{path}: the {key}'s weights are taken")
    # fairseq keeps a second, nested copy
    state = {name: v for name, v in state.items() if not str(name).removeprefix("model.").startswith("_ema")}
    tensors = all(isinstance(v, torch.Tensor) for v in state.values())
    need(tensors, f"{path} is no encoder file: expected a dict of tensors, or one under 'model' or 'state_dict'")
    return state


def without_prefix(state, path):
    """Weights without what stands before patch_embed.proj.weight in their names; of several encoders the first is taken."""
    first = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first)]
    if not prefixes or "" in prefixes:
        return state
    print0(f"{path}: the weights under {prefixes[0]} are taken")
    return {name.removeprefix(prefixes[0]): v for name, v in state.items() if name.startswith(prefixes[0])}


def renamed(state, path):
    """Weights under fairseq's names of data2vec 2.0, those of MIM-Refiner's files or of MAE's fine-tuned ones → ours."""
    if any("modality_encoders.IMAGE." in name for name in state):
        found = {}
        for name, value in state.items():
            name = name.removeprefix("model.")
            for theirs, ours in DATA2VEC_NAMES.items():
                if name.startswith(theirs):
                    found[ours + name.removeprefix(theirs)] = value
        return found | dict(pos_embed=with_cls_row(found["pos_embed"])) if "pos_embed" in found else found
    state = dict(state)
    if "cls_tokens.tokens" in state and "pos_embed.embed" in state:
        state["pos_embed"] = with_cls_row(state.pop("pos_embed.embed").flatten(1, 2))  # of [1, h, w, D]
        state["cls_token"] = state.pop("cls_tokens.tokens")
    if "fc_norm.weight" in state and "norm.weight" not in state:
        print0(f"{path}: its norm stands behind the mean of the patches (fc_norm), here before it")
        state |= {f"norm.{part}": state[f"fc_norm.{part}"] for part in ("weight", "bias")}
    return state


def with_cls_row(table):
    """A position table [1, h · w, D] with a row of zeros for [CLS]."""
    return torch.cat([torch.zeros_like(table[:, :1]), table], 1)


def square_positions(table, path):
    """A position table [1, 1 + h · h, D]; MAE-CT's fixed one, which has no row for [CLS], gets it. Others are refused."""
    rows, dim = table.shape[1:]
    if math.isqrt(rows - 1) ** 2 == rows - 1:
        return table
    side = math.isqrt(rows)
    fixed = side**2 == rows and torch.allclose(table.float(), sincos_positions(dim, side, side)[:, 1:], atol=1e-2)
    need(fixed, f"{path}: its position table has {rows} rows, which is no square grid and a row for [CLS]")
    return with_cls_row(table)


def load_file(path):
    """torch.load of tensors and plain values only (argparse.Namespace is allowed for the public MAE files)."""
    need(Path(path).is_file(), f"{path}: no such file")
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        if not is_torch_file(path):
            raise InputError(f"{path} is not a readable torch file: torch.save did not write it, or it is not whole") from e
        if not isinstance(e, pickle.UnpicklingError):
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise InputError(f"{path} is not a readable torch file ({why})") from e
        raise InputError(
            f"{path} holds more than tensors and plain values; loading it could run code\n"
            "If you trust it, strip it once:\n"
            f"    import torch; content = torch.load({str(path)!r}, weights_only=False)\n"
            "    content = content if isinstance(content, dict) else {'model': content}\n"
            "    state = next((content[k] for k in ('teacher', 'model', 'state_dict') if k in content), content)\n"
            "    torch.save({'model': state.state_dict() if hasattr(state, 'state_dict') else dict(state)}, 'stripped.pt')"
        ) from e


def load_safetensors(path):
    """{"model": weights, and of a file of ours "encoder"}, as torch.load would give them."""
    safetensors = optional("safetensors", f"pip install safetensors, or save {path} with torch.save elsewhere")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("encoder", "null"))
            return dict(model={name: file.get_tensor(name) for name in file.keys()}, encoder=about)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise InputError(f"{path} is not a readable safetensors file ({e})") from e


def is_torch_file(path):
    """Whether torch.save wrote a file: a zip with data.pkl, or torch's old magic number."""
    with contextlib.suppress(zipfile.BadZipFile, ValueError, RuntimeError):  # a damaged one has names that are no text, …
        return any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist())
    return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in Path(path).open("rb").read(20)


def load_state(part, state, where):
    """load_state_dict of a module or optimizer, whose complaint becomes one line. An optimizer keeps the rates and decays
    that it has: one may have been lowered since."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in getattr(part, "param_groups", [])]
    try:
        part.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:  # torch leaves an optimizer as it was
        why = "; ".join(line.strip() for line in str(e).splitlines()[1:]) or str(e)
        raise InputError(f"{where} does not fit: {why}"[:600]) from e
    if isinstance(part, torch.optim.Optimizer):
        for group, own in zip(part.param_groups, groups):
            group.update(own)
        need(has_moments(part), f"{where} does not fit: its moments are not those of the parameters")


def has_moments(optimizer):
    """Whether what an optimizer holds of each parameter is of the same names, and numbers or of the parameter's shape."""
    states = list(optimizer.state.items())
    for p, values in states:
        fit = all(isinstance(v, torch.Tensor) and v.shape in ((), p.shape) for v in values.values())
        if not fit or values.keys() != states[0][1].keys():
            return False
    return True


@contextlib.contextmanager
def understanding(path):
    """Within it, content of another form than expected becomes an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        why = str(e).splitlines()[:1]
        raise InputError(f"{path} is damaged, or of another version ({type(e).__name__}: {''.join(why)[:200]})") from e


@contextlib.contextmanager
def writing(path):
    """Within it, a full disk and its like become an InputError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save makes a RuntimeError of an OSError
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        why = getattr(cause, "strerror", None) or str(e).splitlines()[0]
        what = f"{path} cannot be written ({why}); what it held before is whole"
        remedy = f"make room and start again, a training with --out {Path(path).parent} --resume"
        raise InputError(f"{what}: {remedy}") from e


def write_atomic(path, data, keep=None):
    """Writes bytes so that `path` holds the old or the new content, whatever happens; on rank 0 alone.

    Args:
        data: bytes, or a function that writes them to the open file it is given.
        keep: where the old content goes; at every moment a whole file has one of the two names.
    """
    if rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                data(f) if callable(data) else f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_file(path, content, keep=None):
    """torch.save, atomically; `keep` as in write_atomic."""
    write_atomic(path, lambda f: torch.save(content, f), keep)


def read_json(path, remedy, kinds=(dict,)):
    """The dict (or another of `kinds`) in a JSON file; the error if there is none ends with `remedy`, what to do."""
    try:
        content = json.loads(Path(path).read_bytes())  # UTF-8 or UTF-16, with or without a byte-order mark
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable ({e}): {remedy}") from e
    need(isinstance(content, kinds), f"{path} holds no JSON {' or '.join(kind.__name__ for kind in kinds)}: {remedy}")
    return content


def launch(main):
    """Runs a program's main; input errors become one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8, terminals that know ASCII alone
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except InputError as e:
        where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{where}{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ pictures

TEXT, LINE = 16, 24  # heights of letters and of a line in pixels
# Okabe and Ito's colours, which the colour-blind tell apart; a mark is (colour, corners, rotation in degrees)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "#F0E442")
POLYGONS = ((24, 0), (4, 0), (3, 0), (4, 45))
MARKS = [(colour, *shape) for shape, colour in itertools.product(POLYGONS, COLOURS)]
FRAMES = {"query": "black", "same class": COLOURS[0], "another class": COLOURS[1]}


def to_bytes(x):
    """Standardised views [N, 3, H, W] → uint8 pictures."""
    return (unstandardise(promote(x)) * 255).round().byte().cpu()


def blank(width, height):
    """(A white picture, its pen)."""
    canvas = Image.new("RGB", (math.ceil(width), math.ceil(height)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(TEXT)
    return canvas, pen


def save_picture(path, body, caption="", legend=None):
    """Writes a PIL image as PNG; below it stand a legend {name: mark} and a caption."""
    legend = legend or {}
    words = textwrap.wrap(caption, body.width // (TEXT // 2))
    canvas, pen = blank(body.width, body.height + LINE * (len(legend) + len(words) + 1))
    canvas.paste(body)
    x, y = body.width, body.height - TEXT / 2
    for name, mark in legend.items():
        width = pen.textlength(name) + 3 * TEXT
        if x + width > body.width:
            x, y = TEXT, y + LINE
        draw_mark(pen, x, y, mark, 6)
        pen.text((x + TEXT, y), name, fill="black", anchor="lm")
        x += width
    for text in words:
        y += LINE
        pen.text((TEXT / 2, y), text, fill="black", anchor="lm")
    canvas = canvas.crop((0, 0, body.width, y + LINE))
    write_atomic(path, lambda f: canvas.save(f, "PNG"))


def draw_mark(pen, x, y, mark, radius):
    """A filled polygon."""
    colour, corners, rotation = mark
    pen.regular_polygon((x, y, radius), corners, rotation, fill=colour)


def draw_rows(path, rows, side=96, caption="", legend=None):
    """A picture of captioned rows of images, all at one scale.

    rows: list of (caption, images, frames): N images [3, S, S] uint8, the smallest of which are shown `side` pixels wide;
    frames is None or N names of FRAMES (or None) drawn around them. legend: {name: mark} of more than these.
    """
    used = set(itertools.chain(*(frames or () for _, _, frames in rows)))
    legend = {name: (colour, 4, 0) for name, colour in FRAMES.items() if name in used} | (legend or {})
    widths = [images[0].shape[-1] for _, images, _ in rows]
    scale = side / min(widths)
    step = 10 + round(scale * max(widths))
    columns = max(len(images) for _, images, _ in rows)
    canvas, pen = blank(max(10 + step * columns, 5 * side), (LINE + step) * len(rows))
    for row, (words, images, frames) in enumerate(rows):
        own = round(scale * widths[row])
        top = LINE + 4 + (LINE + step) * row
        pen.text((10, top - TEXT), words, fill="black", anchor="lm")
        for column, image in enumerate(images):
            left = 10 + step * column
            canvas.paste(to_pil(image).resize((own, own), Image.Resampling.BICUBIC), (left, top))
            if frames and frames[column]:
                colour = FRAMES[frames[column]]
                pen.rectangle((left - 3, top - 3, left + own + 2, top + own + 2), outline=colour, width=3)
    save_picture(path, canvas, caption, legend)


def draw_curves(path, curves, x_label, y_label, caption="", joined=True, marked=None):
    """A picture of curves {name: (x values, y values)}, or of points that are not `joined`, over axes that span the data;
    those beyond MARKS are gray. marked: {name: x values} to mark at the lower edge."""
    left, right, bottom, top = 80, 776, 440, 36
    canvas, pen = blank(800, 500)
    xs, ys = (list(itertools.chain(*values)) for values in zip(*curves.values()))
    x_axis, y_axis = Axis(xs, left, right), Axis(ys, bottom, top)
    for value in x_axis.ticks():
        at = x_axis.place(value)
        pen.line([(at, bottom), (at, top)], fill="gainsboro")
        pen.text((at, bottom + 10), f"{value:,.6g}", fill="black", anchor="ma")
    for value in y_axis.ticks():
        at = y_axis.place(value)
        pen.line([(left, at), (right, at)], fill="gainsboro")
        pen.text((left - 8, at), f"{value:,.6g}", fill="black", anchor="rm")
    pen.text((right, bottom + 2 * TEXT), x_label, fill="black", anchor="ra")
    pen.text((8, 6), y_label, fill="black")
    legend = dict(zip(curves, MARKS))
    for name in reversed(curves):  # the first on top
        mark = legend.setdefault(name, ("silver", 24, 0))
        points = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(*curves[name])]
        if joined:
            pen.line(points, fill=mark[0], width=3)
        for x, y in points if len(points) <= 50 or not joined else []:
            draw_mark(pen, x, y, mark, 5 if joined else 3)
    for name, values in (marked or {}).items():
        legend[name] = ("black", 3, 0)
        for value in values:
            draw_mark(pen, x_axis.place(value), bottom, legend[name], 8)
    save_picture(path, canvas, caption, legend)


def draw_losses(folder):
    """loss_STAGE.png of each training in a run's log.jsonl: its loss by step, in at most 200 means."""
    stages = {}
    log = folder / "log.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else []:
        entry = json.loads(line)
        if entry.get("loss") is not None:  # it was finite
            stages.setdefault(entry["stage"], []).append((entry["step"], entry["loss"]))
    for stage, points in stages.items():
        parts = np.array_split(np.array(points), min(200, len(points)))
        means = np.array([part.mean(0) for part in parts])
        label = f"loss, mean of {len(parts[0])} steps" if len(parts[0]) > 1 else "loss"
        draw_curves(folder / f"loss_{stage}.png", {stage: means.T.tolist()}, "step", label)


class Axis:
    """Places values between the pixels `start` and `end` of a picture."""

    def __init__(self, values, start, end):
        self.values = sorted(set(values))
        self.low, self.high = self.values[0], self.values[-1]
        self.start, self.end = start, end

    def place(self, value):
        """The pixel of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def ticks(self):
        """The values if they are few whole numbers, else round ones, at most nine."""
        if len(self.values) <= 12 and all(value % 1 == 0 for value in self.values):
            return self.values
        span = (self.high - self.low) or 1
        power = 10 ** math.floor(math.log10(span))
        step = power * next(f for f in (0.2, 0.5, 1, 2) if span <= 8 * f * power)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
