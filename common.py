"""What the five papers share: vision transformer, masking, heads, queue, the exact step, data, runs, weights, pictures.

Read a paper's file first and come here for a name. The parts, in order:

    distributed · random numbers by key · vision transformer · masked autoencoder · heads, InfoNCE, queue, EMA ·
    the step · optimisation · data · augmentation · runs · MAE pre-training · weights in and out · pictures

Shapes in comments: N samples (of this process), L patches, K kept patches, D width, C classes, S image side, V views.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2


class InputError(ValueError):
    """Something the user gave cannot work; the message says what was given, what was expected and what to do."""


# -------------------------------------------------------------------------------------------------------- distributed


def start() -> torch.device:
    """Joins torchrun's process group, or runs alone; returns this process's device."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the patch projection too
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be others' gradient too
        dist.all_reduce(grad)  # reduce-scatter would do, but gloo has none
        return grad.chunk(world())[rank()]


def gather(x):
    """Rows of all ranks in rank order, [n, …] → [world · n, …]; the gradient flows back to the rank that owns a row.

    Detach `x` first to gather without gradient. With a loss that each rank averages over its own rows, the average of
    the ranks' gradients is the gradient of the loss over the global batch.
    """
    return _Gather.apply(x) if world() > 1 else x


def average_gradients(parameters):
    """Replaces every gradient by its mean over ranks: what DistributedDataParallel does, after the backward pass.

    All transfers are in flight at once. Not hidden behind the backward pass, which the step with cached feature
    gradients runs several times.
    """
    if world() > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        for work in [dist.all_reduce(g, async_op=True) for g in grads]:
            work.wait()
        torch._foreach_div_(grads, world())


class BatchNorm(nn.Module):
    """BatchNorm1d over the samples of all ranks, on any device (torch's SyncBatchNorm refuses CPUs).

    Input [N, D], or [H, N, D] with `shape=(H, D)` for H heads at once. Every rank must hold the same number of samples.
    Each rank contributes its mean and its centred square sum, so nothing cancels; statistics are at least float32.
    Names, defaults and running statistics are BatchNorm1d's.
    """

    def __init__(self, *shape, eps=1e-5, momentum=0.1, affine=True):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x):
        x = promote(x)
        if self.training:
            n = x.shape[-2]
            mean = x.mean(-2)
            squares = (x - mean.unsqueeze(-2)).square().sum(-2)
            means, squares = gather(torch.stack([mean, squares])[None]).unbind(1)  # each [world, (H,) D]
            mean = means.mean(0)
            var = (squares + n * (means - mean).square()).sum(0) / (n * world())
            with torch.no_grad():
                unbiased = var * (n * world() / max(n * world() - 1, 1))
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    new = torch.where(new.isfinite(), new.to(running), running)  # a step that is skipped leaves no trace
                    running.lerp_(new, self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean.unsqueeze(-2)) * (var + self.eps).rsqrt().unsqueeze(-2)
        if self.weight is not None:
            x = x * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)
        return x


# ---------------------------------------------------------------------------------------------- random numbers by key


def _mix(z):
    """The output function of splitmix64 (Steele et al. 2014) on int64, whose products wrap around."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniform(key, rows, *shape, device=None):
    """Numbers in [0, 1) that depend on `key`, the row and nothing else: [len(rows), *shape], float32, on `device` (by
    default that of the rows).

    `key` is a tuple such as (seed, step, "mask"); `rows` [N] int64 are positions in the global batch (or indices of
    samples). Since no generator has a state, 1, 2 or 8 processes, split batches or resumed runs draw the same numbers.
    """
    rows = rows.to(device or rows.device, non_blocking=True)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    golden = -0x61C8864680B583EB
    row = _mix(rows * golden + int.from_bytes(digest, "little", signed=True))
    count = torch.arange(1, math.prod(shape) + 1, device=rows.device) * golden
    bits = _mix(row[:, None] + count) >> 40 & 0xFFFFFF
    return (bits.float() * 2**-24).view(len(rows), *shape)


# ------------------------------------------------------------------------------------------------- vision transformer

# size: (width D, depth, heads); patch size and image size are free. `nano` and `mini` serve small images.
VIT_SIZES = {
    "nano": (128, 6, 4),
    "mini": (192, 8, 6),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "2b": (2560, 24, 32),
}


def promote(x):
    """At least float32, for losses and statistics; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sincos_positions(dim, height, width):
    """The fixed table of MAE, [1, 1 + height · width, dim]: zeros for [CLS], then half the channels for the column and
    half for the row, each sin then cos; computed in float64, returned in float32."""
    if dim % 4:
        raise InputError(f"sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [p.reshape(-1, 1).double() * omega for p in (column, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def resize_positions(table, old, new):
    """Position table [1, 1 + h·w, D] of grid old = (h, w), interpolated (bicubic) to the grid `new`; [CLS] stays."""
    if old == new:
        return table
    grid = promote(table[:, 1:]).transpose(1, 2).unflatten(2, old)
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table)], 1)


def attend(q, k, v):
    """softmax(q kᵀ / √d) v for [N, heads, L, d]: flash kernels on GPUs; written out on CPUs, where torch's fused kernel
    is the slower one, for as many samples at a time as have 4 MiB of scores (larger tensors cost page faults)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    few = max(1, 2**22 // (q.element_size() * q.shape[1] * q.shape[2] ** 2))
    parts = zip(q.split(few), k.split(few), v.split(few))
    return torch.cat([(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v for q, k, v in parts])


class Attention(nn.Module):
    """Multi-head self-attention, [N, L, D] → [N, L, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise InputError(f"width {dim} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 × [N, heads, L, d]
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear-GELU-Linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block, [N, L, D] → [N, L, D]: pre-norm as in MAE, or post-norm as in data2vec 2.0.

    `drop` [N, 2] multiplies the two residual branches (drop path): 0, or 1 / probability of keeping.
    """

    def __init__(self, dim, heads, post_norm=False, mlp_ratio=4):
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, drop=None):
        a, m = (1, 1) if drop is None else drop.to(x.dtype)[:, :, None, None].unbind(1)
        if self.post_norm:
            x = self.norm1(x + a * self.attn(x))
            return self.norm2(x + m * self.mlp(x))
        x = x + a * self.attn(self.norm1(x))
        return x + m * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Image [N, 3, H, W] → patches [N, L, D] by a convolution whose stride is its kernel."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x, ids_keep=None):
        return self.proj(x).flatten(2).transpose(1, 2)  # no patch sees another: removed ones need no care


class ConvBlock(nn.Module):
    """A transformer block with a 5 x 5 convolution, channel by channel, in the place of attention (ConvMAE):
    [N, h, w, C] → [N, h, w, C]. `hide` zeroes the removed patches of [N, C, h, w]."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.fc = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, hide):
        a = self.fc(self.norm1(x)).permute(0, 3, 1, 2)
        x = x + self.proj(self.conv(hide(a)).permute(0, 2, 3, 1))
        return x + self.mlp(self.norm2(x))


class ConvStem(nn.Module):
    """Image [N, 3, H, W] → patches [N, L, D] by convolutions in three layers (ConvMAE, arXiv 2205.03892; CMAE 4.1).

    Two stages of a strided convolution and two blocks, D/3 and D/2 wide, on grids four times and twice as fine as that
    of the patches, then a third strided convolution and a linear. About 11 D² parameters, a transformer block has
    12 D²: `build_vit` leaves one of those out. Removed patches (`ids_keep` [N, K] stay) are zeroed before every
    convolution, and every norm is of one position: no pixel of theirs reaches a visible patch.
    """

    def __init__(self, patch_size, dim):
        super().__init__()
        if patch_size % 4:
            raise InputError(f"a convolutional stem needs a patch size divisible by 4, not {patch_size}")
        widths, strides = (8 * round(dim / 24), dim // 2, dim), (patch_size // 4, 2, 2)
        self.down = nn.ModuleList(nn.Conv2d(i, o, k, k) for i, o, k in zip((3, *widths), widths, strides))
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=1e-6) for w in widths)
        self.stages = nn.ModuleList(nn.ModuleList(ConvBlock(w) for _ in range(2)) for w in widths[:2])
        self.fc = nn.Linear(dim, dim)
        self.patch_size = patch_size

    def forward(self, x, ids_keep=None):
        visible = x.new_ones(len(x), 1, x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        if ids_keep is not None:
            visible = torch.zeros_like(visible).flatten(1).scatter(1, ids_keep, 1.0).view_as(visible)
        hide = lambda x: x * F.interpolate(visible, x.shape[2:]).to(x.dtype)  # [N, C, h, w], each patch k x k positions
        for down, norm, blocks in zip(self.down, self.norms, (*self.stages, [])):
            x = F.gelu(norm(down(hide(x)).permute(0, 2, 3, 1)))  # [N, h, w, C]
            for block in blocks:
                x = block(x, hide)
            x = x.permute(0, 3, 1, 2)
        return self.fc(x.flatten(2).transpose(1, 2))


class ViT(nn.Module):
    """Vision transformer encoder with MAE's details and with the parameter names of facebookresearch/mae and timm.

    Post-norm encoders (data2vec 2.0: a norm before the blocks, none after) keep their blocks under `post_blocks`, so
    that no reader of pre-norm weights takes them silently.

    Args:
        image_size, patch_size: sides in pixels; patch_size divides image_size.
        dim, depth, heads: width, number of blocks, attention heads.
        pool: what `pooled` returns, "cls" or "mean" (of the patch tokens).
        stem: "patch", or "conv" for the hybrid of ConvMAE and CMAE 4.1 (`ConvStem`).
    Raises:
        InputError: sizes that do not divide.
    """

    def __init__(self, image_size, patch_size, dim, depth, heads, post_norm=False, pool="cls", stem="patch"):
        super().__init__()
        if image_size % patch_size:
            raise InputError(f"image size {image_size} is not divisible by the patch size {patch_size}")
        self.config = dict(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads)
        self.config |= dict(post_norm=post_norm, pool=pool, stem=stem)
        self.patch_size, self.dim, self.depth, self.pool = patch_size, dim, depth, pool
        self.grid = (image_size // patch_size,) * 2
        self.frozen = 0
        self.checkpoint_blocks = False  # recompute each block's activations in the backward pass instead of keeping them
        self.patch_embed = {"patch": PatchEmbed, "conv": ConvStem}[stem](patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, *self.grid), requires_grad=False)
        self.embed_norm = nn.LayerNorm(dim, eps=1e-6) if post_norm else nn.Identity()
        blocks = nn.ModuleList(Block(dim, heads, post_norm) for _ in range(depth))
        self.add_module("post_blocks" if post_norm else "blocks", blocks)
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(dim, eps=1e-6)
        init_weights(self)

    def freeze(self, blocks):
        """Freezes the patch embedding, [CLS] and the lower `blocks` blocks (all of them: the final norm too). They run
        without gradient and store no activations."""
        self.requires_grad_(True)
        self.pos_embed.requires_grad_(False)
        self.frozen = blocks
        if blocks:
            frozen = [self.patch_embed, self.embed_norm, *self.stack()[:blocks]]
            for module in frozen + [self.norm] * (blocks >= self.depth):
                module.requires_grad_(False)
            self.cls_token.requires_grad_(False)

    def stack(self):
        """The blocks, whichever name they are kept under."""
        return self.post_blocks if self.config["post_norm"] else self.blocks

    def embed(self, x, ids_keep=None):
        """Image [N, 3, H, W] → tokens [N, 1 + K, D] of the kept patches, positions added, [CLS] (zero position) first."""
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        positions = resize_positions(self.pos_embed, self.grid, grid)
        tokens = self.patch_embed(x, ids_keep) + positions[:, 1:]  # [N, L, D]
        if ids_keep is not None:
            tokens = take(tokens, ids_keep)  # [N, K, D]
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return self.embed_norm(torch.cat([cls.to(tokens.dtype), tokens], 1))

    def forward(self, x, ids_keep=None, drop=None, blocks=None):
        """Tokens after the final norm, or the raw outputs of chosen blocks.

        Args:
            x: images [N, 3, H, W]; a grid other than the encoder's own gets interpolated positions.
            ids_keep: [N, K] indices of the visible patches, or None for all.
            drop: drop-path factors [N, depth, 2] (see `drop_path`), or None.
            blocks: numbers of blocks counted from 1, or None.
        Returns:
            [N, 1 + K, D], [CLS] first; with `blocks` a list of such, in the order given, before the final norm.
        """
        outputs = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen == 0):
            x = self.embed(x, ids_keep)
        for i, block in enumerate(self.stack(), 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i > self.frozen):
                inputs = (x, None if drop is None else drop[:, i - 1])
                x = checkpoint(block, *inputs, use_reentrant=False) if self.checkpoint_blocks else block(*inputs)
            if blocks and i in blocks:
                outputs[i] = x
        return self.norm(x) if blocks is None else [outputs[b] for b in blocks]

    def pooled(self, tokens):
        """[N, 1 + K, D] → feature [N, D]: [CLS], or the mean of the patch tokens."""
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(1)


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


def build_vit(name, image_size, pool="cls", post_norm=False, stem="patch"):
    """A ViT by name: `vit_` + a size of VIT_SIZES + the patch size in pixels, such as vit_l16, vit_2b14, vit_nano4.
    With the stem "conv" it has one block less, and so as many parameters."""
    match = re.fullmatch(r"vit_(\D+|2b)([1-9]\d*)", name)
    if not match or match[1] not in VIT_SIZES:
        known = ", ".join(VIT_SIZES)
        raise InputError(f"unknown model {name!r}: write vit_SIZE PATCH in one word (vit_b16); sizes are {known}")
    dim, depth, heads = VIT_SIZES[match[1]]
    return ViT(image_size, int(match[2]), dim, depth - (stem == "conv"), heads, post_norm, pool, stem)


def drop_path(rate, noise):
    """Drop-path factors from uniform noise [N, depth, 2]: the rate grows linearly from 0 to `rate` over the depth."""
    rates = torch.linspace(0, rate, noise.shape[1], device=noise.device)[:, None]
    return (noise >= rates) / (1 - rates)


# ------------------------------------------------------------------------------------------------- masked autoencoder


def take(tokens, ids):
    """Rows `ids` [N, K] of tokens [N, L, D] → [N, K, D]."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def random_masking(noise, ratio):
    """Per-sample random mask from uniform noise [N, L]: the int(L · (1 − ratio)) patches of least noise stay.

    Returns:
        ids_keep [N, K] in shuffled order, ids_restore [N, L] (undoes the shuffle), mask [N, L] (1 = removed).
    """
    shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = shuffle.argsort(1)
    keep = int(noise.shape[1] * (1 - ratio))
    return shuffle[:, :keep], ids_restore, (ids_restore >= keep).float()


def patchify(images, p):
    """[N, 3, H, W] → [N, L, p·p·3], pixels row by row, colour last."""
    n, c, h, w = images.shape
    return images.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)


def unpatchify(patches, p, height, width):
    """[N, L, p·p·3] → [N, 3, height, width]."""
    x = patches.view(len(patches), height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


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
        filled = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(len(x), removed, -1)], 1)  # [N, L, dim]
        x = torch.cat([x[:, :1], take(filled, ids_restore)], 1) + self.decoder_pos_embed
        if level is not None:  # decoder_embed is linear: what is added before it arrives as its product with the weight
            x = x + F.linear(level, self.decoder_embed.weight)[:, None]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def normalize_patches(patches):
    """Each patch [.., p·p·3] minus its mean, over its standard deviation (unbiased; 1e-6 inside the root)."""
    var, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def mae_loss(pred, images, mask, norm_pix=True):
    """Squared error on removed patches, [N]: mean over a patch's pixels, then over the sample's removed patches.

    pred [N, L, p·p·3], images [N, 3, H, W], mask [N, L] (1 = removed). Every sample loses equally many patches, so the
    mean over samples is the MAE loss of the batch.
    """
    target = patchify(images, math.isqrt(pred.shape[-1] // 3))
    if norm_pix:
        target = normalize_patches(target)
    error = (promote(pred) - target).square().mean(-1)  # [N, L]
    return (error * mask).sum(1) / mask.sum(1)


# ----------------------------------------------------------------------------------------- heads, InfoNCE, queue, EMA


def mlp_head(*dims, last_norm, eps=1e-5):
    """Linear-BatchNorm-ReLU, …, Linear(-BatchNorm): the projectors and predictors of MAE-CT (A.2), CAN and CMAE.

    dims are widths from input to output; eps is the BatchNorms'. No linear has a bias: those before a BatchNorm need
    none, and the last has none in the authors' code. Weights keep PyTorch's default initialisation.
    """
    layers = []
    for i, o in zip(dims, dims[1:]):
        layers += [nn.Linear(i, o, bias=False), BatchNorm(o, eps=eps), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[: -1 if last_norm else -2])


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
        logits = logits.scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(logits, own ^ 1)  # rows 2i and 2i + 1 are each other's positive


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
        z, index, labels = (gather(t.detach().contiguous())[-size:] for t in (z.movedim(-2, 0), index, labels))
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


# ----------------------------------------------------------------------------------------------------------- the step


def autocast(device, precision):
    """Within it, matrix products and convolutions run in bfloat16, if that is the `precision`; float32 changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def backward(encode, objective, inputs, micro_batch=0, precision=torch.float32):
    """Forward and backward of one step, in one piece or in micro-batches with the same numbers.

    encode works on each sample by itself, objective on the whole (global) batch. In micro-batches the features are
    first computed without gradient, the objective then gives the gradient of every feature, and each micro-batch is
    encoded once more to send its part of that gradient on (Gao et al. 2021, arXiv 2101.06983): the memory is that of a
    micro-batch, the arithmetic one forward pass more.

    Args:
        encode: (*inputs) → (features, loss): a tuple of tensors [n, …], and a loss per sample [n] or None.
        objective: (*features) → (loss, aux): a scalar, averaged over this rank's rows, and anything; or None.
        inputs: tuple of tensors [N, …] (or None entries) of this rank; all randomness is in them.
        micro_batch: samples of this rank at a time; 0 for all. Its number must divide N.
        precision: torch.bfloat16 for autocast of the forward passes, or torch.float32.
    Returns:
        (loss, aux): the detached loss of this rank, and the objective's second value (None without objective).
    """
    n = len(inputs[0])
    micro_batch = micro_batch or n
    if n % micro_batch:
        raise InputError(f"micro-batches of {micro_batch} do not divide {n} samples")
    pieces = [t.split(micro_batch) if t is not None else [None] * (n // micro_batch) for t in inputs]
    chunks = list(zip(*pieces))
    device = inputs[0].device
    loss, aux = torch.zeros((), device=device), None

    if len(chunks) == 1:
        with autocast(device, precision):
            features, sample_loss = encode(*chunks[0])
            if objective is not None:
                loss, aux = objective(*features)
            if sample_loss is not None:
                loss = loss + sample_loss.mean()
        loss.backward()
        return loss.detach(), aux

    gradients = [()] * len(chunks)
    if objective is not None:
        with torch.no_grad():
            cached = []
            for chunk in chunks:
                with autocast(device, precision):
                    cached.append(encode(*chunk)[0])
        features = [torch.cat(f).requires_grad_() for f in zip(*cached)]
        with autocast(device, precision):
            loss, aux = objective(*features)
        loss.backward()
        gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in features]  # None: a target's feature
        gradients = list(zip(*[g.split(micro_batch) for g in gradients]))
    loss = loss.detach()
    for chunk, gradient in zip(chunks, gradients):
        with autocast(device, precision):
            features, sample_loss = encode(*chunk)
        pairs = list(zip(features, gradient))
        if sample_loss is not None:
            pairs.append((sample_loss, torch.full_like(sample_loss, 1 / n)))
            loss = loss + sample_loss.detach().sum() / n
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        elif sample_loss is None:  # a frozen encoder: only the heads learn
            break
    return loss, aux


# ------------------------------------------------------------------------------------------------------- optimisation


def parameter_groups(module, lr, weight_decay, layer_decay=1.0):
    """AdamW groups of the trainable parameters: {"params", "peak_lr", "weight_decay"}.

    No weight decay on biases, norms and tokens. For a ViT, block i = 0 … depth − 1 learns with
    lr · layer_decay^(depth − i), the stem with layer_decay^(depth + 1), the final norm with lr.
    """
    groups = {}
    norms = {p for m in module.modules() if isinstance(m, BatchNorm) for p in m.parameters()}  # [H, D] for H heads
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        power = 0
        if layer_decay != 1:
            block = re.match(r"(?:post_)?blocks\.(\d+)\.", name)
            power = module.depth - int(block[1]) if block else 0 if name.startswith("norm.") else module.depth + 1
        decay = 0.0 if p.ndim < 2 or p in norms or name.endswith(("bias", "_token")) else weight_decay
        group = dict(params=[], peak_lr=lr * layer_decay**power, weight_decay=decay)
        groups.setdefault((power, decay), group)["params"].append(p)
    return list(groups.values())


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


def adamw(groups, betas=(0.9, 0.95), zero=False):
    """AdamW over groups of `parameter_groups`; `set_lr` must be called before every step. With `zero` the ranks share
    its two moments out among themselves."""
    if zero and world() > 1:
        return ZeroOptimizer(groups, torch.optim.AdamW, lr=0.0, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


class LARS(torch.optim.Optimizer):
    """SGD with momentum that moves a matrix in proportion to its own length (You et al. 2017, arXiv 1708.03888), in the
    form that MAE has for linear probes of large batches (CAN, Table 11).

        g ← g + weight_decay · w;  g ← trust · ‖w‖ / ‖g‖ · g;  m ← momentum · m + g;  w ← w − lr · m

    Vectors (biases, norms), and groups with trust 0, skip the first two. Where ‖w‖ or ‖g‖ is 0 the ratio is 1.
    """

    def __init__(self, groups, lr=0.0, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1 and group["trust"]:
                    g = g + group["weight_decay"] * p
                    ratio = group["trust"] * p.norm() / g.norm()
                    g = g * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * m.mul_(group["momentum"]).add_(g))


def warmup_cosine(step, steps, warmup, end=0.0):
    """Factor of the peak lr at a step (0 … steps − 1): linear over `warmup` steps, then half a cosine down to `end`."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def set_lr(optimizer, factor):
    """lr of every group = its peak · factor; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


# --------------------------------------------------------------------------------------------------------------- data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass
class Images:
    """An image set: pixels in memory, or files, or a torchvision data set; labels are −1 where there are none."""

    labels: torch.Tensor  # [N] int64; [N, C] where an image has several (load_voc2007)
    classes: list
    pixels: torch.Tensor = None  # [N, 3, H, W] uint8
    masks: torch.Tensor = None  # [N, H, W] bool, the object's pixels (shapes only)
    files: np.ndarray = None  # [N] names as bytes: one block of memory, which forked workers share
    dataset: object = None

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """What to call image i when it cannot be read."""
        return f"image {i}" if self.files is None else os.fsdecode(self.files[i])

    def open(self, i):
        """Image i as an RGB PIL image."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy())
        return to_rgb(self.dataset[i][0]) if self.files is None else read_image(self.name(i))

    def subset(self, index, classes=None):
        """The images `index` [n]; with `classes`, names that are all the subset's labels may refer to, renumbered."""
        of_images = lambda v: isinstance(v, torch.Tensor | np.ndarray)
        part = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self) if of_images(getattr(self, f.name))}
        if self.dataset is not None:
            part["dataset"] = torch.utils.data.Subset(self.dataset, index.tolist())
        if classes is not None:
            number = torch.full((len(self.classes),), -1)
            number[[self.classes.index(c) for c in classes]] = torch.arange(len(classes))
            part |= dict(labels=number[part["labels"]], classes=list(classes))
        return dataclasses.replace(self, **part)

    def sources(self, index, views, dice):
        """The RGB image that each of a sample's views is cut from: the same one."""
        return [self.open(index)] * views


VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov"}


@dataclass
class Videos(Images):
    """A video set: `pixels` [N, T, 3, H, W] uint8, or `files`: folders of frames, video files, images (of one frame)."""

    motions: torch.Tensor = None  # [N] int64, a second label (moving_shapes only)
    gap: int = -1  # see sample_frames

    def sources(self, index, views, dice):
        """The frames of a pair: the first view is cut from the one, the second from the other."""
        length, read = self.open_clip(index)
        noise = torch.tensor([[dice.random(), dice.random()]])
        return [read(frame) for frame in sample_frames(noise, length, self.gap)[0, :views].tolist()]

    def open_clip(self, i):
        """(number of frames of video i, a function from a frame's number to its RGB image); nothing else is decoded."""
        if self.pixels is not None:
            return self.pixels.shape[1], lambda frame: Image.fromarray(self.pixels[i, frame].permute(1, 2, 0).numpy())
        path = Path(self.name(i))
        if path.is_dir():  # 2.png comes before 10.png
            number = lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]
            frames = sorted((f for f in os.listdir(path) if Path(f).suffix.lower() in SUFFIXES), key=number)
            if not frames:
                raise OSError("no frames")
            return len(frames), lambda frame: read_image(path / frames[frame])
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            return 1, lambda frame: read_image(path)
        if not path.is_file():
            raise OSError("no regular file")
        from torchcodec.decoders import VideoDecoder

        try:
            clip = VideoDecoder(str(path), num_ffmpeg_threads=1)
            length = len(clip)
        except (RuntimeError, ValueError) as e:
            raise OSError(f"no readable video ({str(e).splitlines()[0].split(', ')[-1]})") from e

        def read(frame):
            try:
                return Image.fromarray(clip[frame].permute(1, 2, 0).numpy())
            except (RuntimeError, IndexError) as e:
                raise OSError(f"frame {frame} is not readable ({str(e).splitlines()[0].split(', ')[-1]})") from e

        return length, read

    def stills(self, count):
        """Images of `count` frames of each video, evenly spread, one video after the other."""
        labels = self.labels.repeat_interleave(count)
        if self.pixels is None:
            return _Stills(labels, self.classes, videos=self, count=count)
        frames = ((torch.arange(count) + 0.5) * self.pixels.shape[1] / count).long()
        return Images(labels, self.classes, pixels=self.pixels[:, frames].flatten(0, 1))


@dataclass
class _Stills(Images):
    videos: Videos = None
    count: int = 1

    def name(self, i):
        return self.videos.name(i // self.count)

    def open(self, i):
        length, read = self.videos.open_clip(i // self.count)
        return read(int((i % self.count + 0.5) * length / self.count))


def sample_frames(noise, length, gap=-1):
    """Two frames of a video from noise [N, 2]: their numbers [N, 2], from 0 (ViC-MAE 5.3, Table 4).

    gap −1 is distant sampling: one frame from either half. Else the second follows the first within `gap` frames; 0 takes
    the same frame twice. A video of one frame gives that twice, a short one its last frame.
    """
    if gap < 0:
        half = length // 2
        first, second = (noise[:, 0] * max(1, half)).long(), half + (noise[:, 1] * (length - half)).long()
        return torch.stack([first, second], 1)
    first = (noise[:, 0] * max(length - gap, 1)).long()
    second = first + (gap > 0) + (noise[:, 1] * gap).long()
    return torch.stack([first, second.clamp(max=length - 1)], 1)


def load_images(data, split, labels=True):
    """A split of a built-in set, a folder, or a torchvision set by name.

    Args:
        data: "shapes"; a folder with train/ and val/ (or test/) of class folders, or any tree of images if `labels` is
            False; or a torchvision class name in any case ("cifar10"), downloaded to ./data by torchvision; or "random",
            noise that stands for ImageNet's 1 281 167 images under --cost.
        split: "train" or "val".
        labels: whether class labels are needed.
    Raises:
        InputError: no such set, no images, or no class folders where labels are needed.
    """
    if data == "shapes":
        return shapes(split)
    if data == "random":
        return Images(torch.full((1281167,), -1), [], dataset=_Noise())
    if os.path.isdir(data):  # Path("") would be this folder
        return _load_folder(Path(data), split, labels)
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    if data.lower() not in known:
        raise InputError(f"--data {data}: no such folder, and neither 'shapes' nor the name of a torchvision data set")
    return _load_torchvision(known[data.lower()], split)


def load_videos(data, split, labels=False):
    """A split of a video set.

    Args:
        data: "moving_shapes", "random" (see load_images), or a folder. In train/ and val/ (or test/) of class folders, a
            folder in a class folder holds the frames of one video, and a file there is a video or a still image of its
            own: train/CLASS/VIDEO/000001.jpg, train/CLASS/VIDEO.mp4, train/CLASS/IMAGE.jpg. In any other tree each folder
            of images is one video; those that lie in the root itself are stills.
        split: "train" or "val"; labels: whether class labels are needed.
    Raises:
        InputError: no such set, nothing to read, or video files but no torchcodec.
    """
    if data == "moving_shapes":
        return moving_shapes(split)
    if data == "random":
        return Videos(load_images(data, split).labels, [])
    if not os.path.isdir(data):
        raise InputError(f"--data {data}: no such folder, and not the built-in 'moving_shapes'")
    root, names = Path(data), ["train"] if split == "train" else ["val", "test"]
    folder = next((root / n for n in names if (root / n).is_dir()), root)
    of_class = folder != root
    if labels and not of_class:
        raise InputError(f"--data {data}: labels are needed, but there is no train/ and val/ with one folder per class")
    clips, folders, stills = [], [], []
    for at, _, found in os.walk(folder, followlinks=True):
        of_type = lambda suffixes: (os.path.join(at, f) for f in found if os.path.splitext(f)[1].lower() in suffixes)
        clips += of_type(VIDEO_SUFFIXES)
        depth = len(Path(os.path.relpath(at, folder)).parts)
        if depth <= of_class:
            stills += of_type(SUFFIXES)
        elif next(of_type(SUFFIXES), None):
            folders.append(at)
    files = sorted(clips + folders + stills)
    if not files:
        raise InputError(f"--data {data}: no folders of frames, video files or images in {folder}")
    if clips:
        try:
            import torchcodec.decoders  # noqa: F401
        except Exception as e:  # torchcodec without its FFmpeg raises a RuntimeError
            raise InputError(
                f"--data {data}: {len(clips)} video files such as {clips[0]} need torchcodec and FFmpeg "
                "(pip install torchcodec); or make folders of frames with: mkdir CLIP; ffmpeg -i CLIP.mp4 CLIP/%06d.jpg"
            ) from e
    of_file = [os.path.relpath(f, folder).split(os.sep)[0] for f in files]
    loose = any(os.path.dirname(f) == str(folder) for f in clips + stills)
    classes = sorted(set(of_file)) if of_class and not loose else []
    number = {c: i for i, c in enumerate(classes)}
    kinds = f"{len(folders)} folders of frames, {len(clips)} video files, {len(stills)} still images"
    print0(f"{folder}: {kinds}, " + (f"{len(classes)} classes" if classes else "no labels"))
    labels = torch.tensor([number.get(c, -1) for c in of_file])
    return Videos(labels, classes, files=np.array([os.fsencode(f) for f in files]))


class _Noise:
    def __getitem__(self, i):
        return Image.effect_noise((256, 256), 64), -1


def load_splits(data, labels=False, val=True, load=load_images):
    """(training images, validation images), the latter None if not wanted (`val`), or where there are no labels or no val/
    or test/ to evaluate on. `load` is load_images or load_videos.

    Raises:
        InputError: as load_images; or the two have different classes.
    """
    train = load(data, "train", labels)
    if not val or not train.classes or Path(data).is_dir() and not any((Path(data) / n).is_dir() for n in ("val", "test")):
        return train, None
    val = load(data, "val")
    if val.classes != train.classes:
        raise InputError(f"--data {data}: training and validation folders have different classes")
    return train, val


def _load_folder(root, split, labels):
    names = ["train"] if split == "train" else ["val", "test"]
    folder = next((root / n for n in names if (root / n).is_dir()), root)
    if folder == root and labels:
        wanted = " or ".join(f"{n}/" for n in names)
        raise InputError(f"--data {root}: labels are needed, but there is no {wanted} with one folder per class")
    walk = os.walk(folder, followlinks=True)
    files = sorted(os.path.join(at, f) for at, _, names in walk for f in names if Path(f).suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"--data {root}: no images in {folder} (looked for {' '.join(sorted(SUFFIXES))})")
    parts = [os.path.relpath(f, folder).split(os.sep) for f in files]
    loose = next((f for f, p in zip(files, parts) if len(p) == 1), None)
    if loose and labels:
        raise InputError(f"--data {root}: labels are needed, but {loose} lies in no class folder of {folder}")
    if folder == root or loose:
        print0(f"{folder} is taken without labels" + (f": {loose} lies in no class folder" if loose else ""))
        return Images(torch.full((len(files),), -1), [], files=np.array([os.fsencode(f) for f in files]))
    classes = sorted({p[0] for p in parts})
    number = {c: i for i, c in enumerate(classes)}
    labels = torch.tensor([number[p[0]] for p in parts])
    return Images(labels, classes, files=np.array([os.fsencode(f) for f in files]))


# Training and test part of torchvision's sets, where they are not called "train" and "test": all that is not for testing.
_PARTS = {
    "DTD": (["train", "val"], ["test"]),  # of the first of its ten splits
    "Flowers102": (["train", "val"], ["test"]),
    "FGVCAircraft": (["trainval"], ["test"]),
    "OxfordIIITPet": (["trainval"], ["test"]),
}
# Sets without parts: images a class that are drawn to train and to test on. Caltech101 (without its background class) is
# tested on the rest, as usual; SUN397's ten published partitions have 50 and 50 as well.
_DRAWN = {"Caltech101": (30, None), "SUN397": (50, 50)}


def _torchvision(name, download=True, **choice):
    cls = getattr(torchvision.datasets, name)
    try:
        if rank() == 0:
            cls("data", download=download, **choice)
        if world() > 1:
            dist.barrier()
        return cls("data", **choice)
    except (TypeError, ValueError, RuntimeError, OSError) as e:
        raise InputError(f"--data {name.lower()}: torchvision could not provide it ({e})") from e


def _load_torchvision(name, split):
    accepted, train = getattr(torchvision.datasets, name).__init__.__code__.co_varnames, split == "train"
    if name in _DRAWN:
        choices = [{}]
    elif "train" in accepted:
        choices = [dict(train=train)]
    else:
        choices = [dict(split=part) for part in _PARTS.get(name, (["train"], ["test"]))[0 if train else 1]]
    parts = [_torchvision(name, **choice) for choice in choices]
    first = parts[0]
    attribute = next((a for a in ("targets", "labels", "_labels", "y") if hasattr(first, a)), None)
    if attribute is None:
        raise InputError(f"--data {name.lower()}: torchvision's {name} has no class labels")
    labels = torch.cat([torch.as_tensor(getattr(part, attribute)).long() for part in parts])
    classes = list(getattr(first, "classes", getattr(first, "categories", range(int(labels.max()) + 1))))
    pixels = getattr(first, "data", None)
    if isinstance(pixels, np.ndarray) and pixels.ndim == 4:  # CIFAR is [N, H, W, 3]; SVHN and STL10 are [N, 3, H, W]
        pixels = torch.from_numpy(pixels if pixels.shape[1] == 3 else pixels.transpose(0, 3, 1, 2)).contiguous()
        return Images(labels, classes, pixels=pixels)
    images = Images(labels, classes, dataset=torch.utils.data.ConcatDataset(parts))
    if name not in _DRAWN:
        return images
    if name == "SUN397":  # listed as the file system has them, which differs from machine to machine
        images = images.subset(torch.from_numpy(np.argsort([str(file) for file in first._image_files])))
    return images.subset(_drawn_by_class(images.labels, *_DRAWN[name], train))


def _drawn_by_class(labels, train_count, test_count, train):
    """Indices of `train_count` images of every class, or of `test_count` others (None: all others)."""
    order = uniform(("split",), torch.arange(len(labels)), 1)[:, 0].argsort(stable=True)
    of_classes = [order[labels[order] == c] for c in labels.unique().tolist()]
    parts = [i[:train_count] if train else i[train_count:][:test_count] for i in of_classes]
    return torch.cat(parts).sort().values


def load_voc2007(split):
    """VOC2007's classification task: trainval ("train", 5 011 images) or test (4 952), downloaded to ./data by torchvision.

    Labels [N, 20]: 1 present, 0 absent, −1 where all objects of the class are "difficult", which the task neither trains
    nor tests on (the devkit's ImageSets/Main).

    Raises:
        InputError: torchvision could not provide it.
    """
    part, lists = "trainval" if split == "train" else "test", Path("data/VOCdevkit/VOC2007/ImageSets/Main")
    missing = not (lists / f"{part}.txt").is_file()  # torchvision would unpack it every time
    dataset = _torchvision("VOCDetection", missing, year="2007", image_set=part)
    classes = sorted(file.stem.removesuffix(f"_{part}") for file in lists.glob(f"*_{part}.txt"))
    if not classes:
        raise InputError(f"{lists} has no lists of classes (aeroplane_{part}.txt, …)")
    meaning = {"1": 1, "-1": 0, "0": -1}
    flags = [(lists / f"{c}_{part}.txt").read_text().split()[1::2] for c in classes]  # "000005 -1", image by image
    labels = torch.tensor([[meaning[flag] for flag in column] for column in flags]).T
    return Images(labels, classes, files=np.array([os.fsencode(file) for file in dataset.images]))


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # whatever the name; Pillow's others may start programs


def read_image(path):
    """An image file as an RGB PIL image.

    Raises:
        OSError: a file that cannot be decoded, or whose header promises more than Pillow's limit of 179 million pixels.
    """
    if not os.path.isfile(path):  # to open a named pipe would be to wait for ever
        raise OSError("no regular file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as e:  # damaged files raise whatever the decoder trips over
        raise OSError(str(e) or type(e).__name__) from e


def to_rgb(image):
    """A PIL image as RGB: on white where it is transparent, of an animation the first frame, of 16 bits the upper 8.

    As in torchvision's ImageFolder, EXIF's orientation turns nothing.

    Raises:
        OSError: 32-bit integers or floats, for which white is not defined.
    """
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert("RGB") makes all above 255 white
    if image.mode in ("I", "F"):
        raise OSError(f"pixels of mode {image.mode} have no white: save it with 8 or 16 bits")
    if image.has_transparency_data:  # convert("RGB") shows the colours below
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_uint8(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Built-in set `shapes`: class name → (outline, pattern), functions of object coordinates u, v (the object fits the unit
# circle). An outline is negative inside; a pattern chooses between the object's two colours by its sign.
_BOX = lambda u, v, x, y, w, h: torch.maximum((u - x).abs() - w, (v - y).abs() - h)
_SIDE = lambda u, v: torch.hypot(u, v) * torch.cos((torch.atan2(v, u) + math.pi / 3) % (2 * math.pi / 3) - math.pi / 3)
SHAPES = {
    "striped disc": (lambda u, v: torch.hypot(u, v) - 0.8, lambda u, v: torch.sin(24 * u)),
    "banded ring": (lambda u, v: (torch.hypot(u, v) - 0.68).abs() - 0.2, lambda u, v: torch.sin(12 * u)),
    "checkered square": (lambda u, v: _BOX(u, v, 0, 0, 0.7, 0.7), lambda u, v: torch.sin(13 * u) * torch.sin(13 * v)),
    "target triangle": (lambda u, v: _SIDE(u, v) - 0.5, lambda u, v: torch.sin(18 * torch.hypot(u, v))),
    "split flower": (
        lambda u, v: torch.hypot(u, v) - 0.62 - 0.33 * torch.cos(5 * torch.atan2(v, u)),
        lambda u, v: torch.sin(6 * torch.atan2(v, u)),
    ),
    "dotted cross": (
        lambda u, v: torch.minimum(_BOX(u, v, 0, 0, 0.9, 0.26), _BOX(u, v, 0, 0, 0.26, 0.9)),
        lambda u, v: torch.sin(18 * u) * torch.sin(18 * v) - 0.4,
    ),
    "shaded crescent": (
        lambda u, v: torch.maximum(torch.hypot(u, v) - 0.9, 0.75 - torch.hypot(u - 0.45, v)),
        lambda u, v: 2 * u,
    ),
    "chevron bars": (
        lambda u, v: torch.minimum(_BOX(u, v, 0, 0.45, 0.85, 0.22), _BOX(u, v, 0, -0.45, 0.85, 0.22)),
        lambda u, v: torch.sin(15 * u + 8 * (2.4 * v % 1 - 0.5).abs()),
    ),
    "rimmed corner": (
        lambda u, v: torch.minimum(_BOX(u, v, -0.5, 0, 0.25, 0.85), _BOX(u, v, 0.1, 0.6, 0.75, 0.25)),
        lambda u, v: 3 * (torch.hypot(u, v) - 0.62),
    ),
    "plain dumbbell": (
        lambda u, v: torch.hypot(u.abs() - 0.5, v) - 0.38,
        lambda u, v: torch.full_like(u, -2),
    ),
}


def shapes(split, size=48):
    """The built-in images: one object of ten classes on a patchwork of five flat, shaded colours.

    The class is the object's outline and pattern; classes i and i + 5 share their hue. Place, size, rotation, shade and
    background are drawn anew for every image and say nothing of the class. An image depends on (split, index) alone; all
    is computed in float64, so that machines agree on every byte.

    Args:
        split: "train" (6000 images) or "val" (2000).
    Returns:
        Images of [N, 3, size, size] with labels and the object's masks [N, size, size].
    """
    count, cells, part = {"train": 600, "val": 200}[split], 5, 50  # a part's temporaries stay in the cache
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    pixels, masks = [], []
    for index in [i for c in range(10) for i in torch.arange(c, count * 10, 10).split(part)]:
        draw = iter(uniform(("shapes", split), index, 100).double()[..., None, None].unbind(1))
        number = lambda low, high: low + (high - low) * next(draw)  # [n, 1, 1]

        # background: each pixel takes the colour of the nearest of `cells` sites, plus a smooth shade
        sites = [(number(0, size), number(0, size)) for _ in range(cells)]
        colours = [_rgb(number(0, 1), number(0, 0.7), number(0.15, 1)) for _ in range(cells)]
        shade = torch.stack([number(-0.1, 0.1) for _ in range(27)], 1).view(-1, 3, 3, 3)
        image = _patchwork(x, y, sites, colours, shade)  # [n, 3, size, size]

        # object: somewhere within the picture
        radius, angle = number(15, 20), number(0, 2 * math.pi)
        cx, cy = (0.8 * radius + (size - 1.6 * radius) * number(0, 1) for _ in range(2))
        c = index[0].item() % 10
        image, inside = _paint(image, x, y, c, radius, angle, cx, cy, *_shades(c, number))
        image = image + 0.1 * (uniform(("shapes", split, "noise"), index, 3, size, size) - 0.5)
        pixels.append((image.clamp(0, 1) * 255).round().byte())
        masks.append(inside[:, 0] > 0.5)
    turns = lambda parts: torch.cat(parts).unflatten(0, (10, count)).transpose(0, 1).flatten(0, 1)  # classes take turns
    return Images(torch.arange(count * 10) % 10, list(SHAPES), pixels=turns(pixels), masks=turns(masks))


MOTIONS = ["sliding", "circling", "spinning", "swelling", "swinging"]


def moving_shapes(split, size=48, frames=12):
    """The built-in videos: an object of `shapes` that moves, turns and changes its size over a background that moves as
    well, while the light changes. Its class is the label, the kind of its motion (MOTIONS) a second one.

    Made as `shapes` is: a video depends on (split, index) alone, place, size, rotation, shade, speed, light and background
    say nothing of the labels.

    Args:
        split: "train" (1200 videos) or "val" (400).
    Returns:
        Videos of [N, frames, 3, size, size] with labels and motions.
    """
    count, cells, part, turn = {"train": 120, "val": 40}[split], 14, 8, 2 * math.pi
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    t = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None, None]  # [T, 1, 1]
    pixels = []
    for index in [i for c in range(10) for i in torch.arange(c, count * 10, 10).split(part)]:
        draw = iter(uniform(("moving_shapes", split), index, 160).double()[..., None, None, None].unbind(1))
        number = lambda low, high: low + (high - low) * next(draw)  # [n, 1, 1, 1]
        each = lambda v: v.expand(-1, frames, 1, 1).flatten(0, 1)  # a value a frame: [n · T, 1, 1]
        still = lambda low, high: each(number(low, high))
        kind = index // 10 % 5
        sliding, circling, spinning, swelling, swinging = ((kind == k).double()[:, None, None, None] for k in range(5))

        # background: a patchwork of four times the picture's area, seen by a camera that pans over it
        heading, distance = number(0, turn), number(0.5, 0.8) * size
        pan = [distance * (t - 0.5) * f(heading) for f in (torch.cos, torch.sin)]
        sites = [tuple(each(number(-size / 2, 1.5 * size) + p) for p in pan) for _ in range(cells)]
        colours = [_rgb(still(0, 1), still(0, 0.7), still(0.15, 1)) for _ in range(cells)]
        shade = torch.stack([still(-0.1, 0.1) for _ in range(27)], 1).view(-1, 3, 3, 3)
        image = _patchwork(x, y, sites, colours, shade)  # [n · T, 3, size, size]

        # object: its motion, and a little of every other
        sign, phase, speed = number(-1, 1).sign(), number(0, turn), number(0.7, 1)
        swing = speed * torch.sin(2 * turn * t + phase)
        radius = number(13, 17) * (1 + number(-0.1, 0.1) * t + 0.5 * swelling * sign * (t - 0.5))
        angle = number(0, turn) + number(-0.5, 0.5) * t + turn * spinning * sign * 1.5 * speed * t + swinging * swing
        path = [18 * sliding * speed * (t - 0.5) * f(phase) + 8 * circling * speed * f(turn * sign * t + phase)
                for f in (torch.cos, torch.sin)]  # fmt: skip
        path[0] = path[0] + 6 * swinging * swing
        cx, cy = (size / 2 + number(-5, 5) + number(-3, 3) * (t - 0.5) + p for p in path)
        c = index[0].item() % 10
        image, _ = _paint(image, x, y, c, *map(each, (radius, angle, cx, cy)), *_shades(c, still))
        image = image * each(number(0.75, 1.15) + number(-0.35, 0.35) * t)[:, None]
        image = image + 0.1 * (uniform(("moving_shapes", split, "noise"), index, frames, 3, size, size).flatten(0, 1) - 0.5)
        pixels.append((image.clamp(0, 1) * 255).round().byte().unflatten(0, (-1, frames)))
    pixels = torch.cat(pixels).unflatten(0, (10, count)).transpose(0, 1).flatten(0, 1)  # classes take turns
    index = torch.arange(count * 10)
    return Videos(index % 10, list(SHAPES), pixels=pixels, motions=index // 10 % 5)


def _patchwork(x, y, sites, colours, shade):
    """Each pixel takes the colour [n, 3, 1, 1] of the nearest site (cx, cy), plus a smooth shade [n, 3, 3, 3]."""
    distances = [(x[:1] - cx).square() + (y[:, :1] - cy).square() for cx, cy in sites]  # [n, 1, size] + [n, size, 1]
    nearest = torch.stack(distances).argmin(0)  # [n, size, size]
    palette = torch.stack(colours, 2)[..., 0, 0]  # [n, 3, cells]
    image = palette.gather(2, nearest.flatten(1)[:, None].expand(-1, 3, -1)).unflatten(2, x.shape)
    return image + F.interpolate(shade, x.shape, mode="bicubic", align_corners=True)


def _shades(c, number):
    """Two colours of an object of class c, light and dark; classes c and c + 5 share their hue."""
    hue = c % 5 / 5
    light = _rgb(hue + number(-0.07, 0.07), number(0.5, 1), number(0.6, 1))
    return light, _rgb(hue + number(0.03, 0.17), number(0.3, 0.8), number(0.1, 0.4))


def _paint(image, x, y, c, radius, angle, cx, cy, light, dark):
    """Paints objects of class c, turned by an angle, over images [n, 3, size, size]: a soft outline, filled with two
    colours by the class's pattern. Returns the images and the objects' coverage [n, 1, size, size]."""
    outline, pattern = list(SHAPES.values())[c]
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    inside = torch.sigmoid(-2.5 * radius * outline(u, v))[:, None]
    mix = torch.sigmoid(4 * pattern(u, v))[:, None]
    return image * (1 - inside) + (light * (1 - mix) + dark * mix) * inside, inside


def _rgb(hue, saturation, value):
    """HSV → RGB for [n, 1, 1] values: [n, 3, 1, 1]."""
    k = (hue[:, None] * 6 + channels((5, 3, 1), hue.device, hue.dtype)) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


@dataclass
class View:
    """A random resized crop: output side in pixels, range of the area as a fraction, and whether to flip half of them."""

    size: int
    scale: tuple = (0.2, 1.0)
    flip: bool = True


def crop_box(dice, height, width, scale):
    """torchvision's RandomResizedCrop rule: a box (top, left, height, width), drawn from a random.Random.

    Ten tries of an area in `scale` (fractions) and an aspect ratio in (3/4, 4/3); the first that fits is taken, else the
    largest central box of an allowed ratio.
    """
    for _ in range(10):
        area = height * width * dice.uniform(*scale)
        ratio = math.exp(dice.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return dice.randint(0, height - h), dice.randint(0, width - w), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
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
            top, left, h, w = crop_box(dice, image.height, image.width, view.scale)
            x = image.crop((left, top, left + w, top + h)).resize((view.size, view.size), Image.Resampling.BICUBIC)
            if dice.random() < 0.5 and view.flip:
                x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            cut.append(_to_uint8(x))
        return cut


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
        return [_to_uint8(image)]


@dataclass
class _Decoded(torch.utils.data.Dataset):
    """(epoch, index) → views, the index used, and the names of unreadable files passed over on the way to it."""

    images: Images
    cut: object

    def __getitem__(self, key):
        epoch, index = key
        bad = []
        for _ in range(100):
            try:
                return self.cut(self.images, epoch, index), index, bad
            except UNREADABLE as e:
                bad.append((self.images.name(index), str(e)))
                index = (index + 1) % len(self.images)
        return None, index, bad


def _collate(items):
    views, index, bad = zip(*items)
    bad = [b for names in bad for b in names]
    if None in views:  # a worker's exception would arrive with its traceback as the message
        return None, None, bad
    return [torch.stack(v) for v in zip(*views)], torch.tensor(index), bad


def _worker(_):
    os.setsid()  # signals to the process group (torchrun, Ctrl-C) are the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the parent ends a worker
    torch.set_num_threads(1)


def decode(images, order, cut, device, workers, skipped):
    """Yields (views, index) for each (epoch, index [n]) of `order`: workers decode each image once and cut every view.

    Unreadable images are replaced by the next readable one; each is named once and counted in the dict `skipped`.
    """
    loader = torch.utils.data.DataLoader(
        _Decoded(images, cut),
        batch_sampler=([(epoch, i) for i in index.tolist()] for epoch, index in order),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_worker,
        pin_memory=device.type == "cuda",
    )
    for views, index, bad in loader:
        if views is None:
            raise InputError(f"100 unreadable images in a row, the last one {bad[-1][0]}: {bad[-1][1]}")
        for name, why in bad:
            if name not in skipped:
                print(f"skipped {name}: {why}", file=sys.stderr, flush=True)
            skipped[name] = skipped.get(name, 0) + 1
        yield [v.to(device, non_blocking=True) for v in views], index.to(device, non_blocking=True)


@dataclass
class Batch:
    """One rank's part of a global batch of n · world samples."""

    views: list  # of [n, 3, S, S] uint8
    index: torch.Tensor  # [n] dataset indices
    labels: torch.Tensor  # [n], −1 where there are none
    rows: torch.Tensor  # [n] positions in the global batch, on the CPU: the rows of `uniform`
    epoch: int


def shuffled(count, batch, start, stop, seed):
    """Yields (epoch, indices [batch // world]) of steps start … stop − 1. An epoch is a permutation, cut into global batches
    (the rest is left out) and into equal parts for the ranks: 1 or 8 processes see the same global batches."""
    n, per_epoch, shuffle = batch // world(), count // batch, None
    for step in range(start, stop):
        epoch, part = divmod(step, per_epoch)
        if shuffle is None or part == 0:
            shuffle = uniform((seed, epoch, "order"), torch.arange(count), 1)[:, 0].argsort(stable=True)
        yield epoch, shuffle[part * batch + rank() * n :][:n]


def batches(images, views, batch, start, stop, seed, device, workers, skipped):
    """Batches of steps start … stop − 1, in the order of `shuffled`.

    Args:
        views: list of View; batch: global batch size; skipped: dict that counts unreadable images.
    """
    rows = torch.arange(batch // world()) + rank() * (batch // world())
    per_epoch = len(images) // batch
    order = shuffled(len(images), batch, start, stop, seed)
    source = decode(images, order, RandomCrops(views, seed), device, workers, skipped)
    labels = images.labels.to(device)
    for step, (cut, index) in zip(range(start, stop), source):
        yield Batch(cut, index, labels[index], rows, step // per_epoch)


# ------------------------------------------------------------------------------------------------------- augmentation


@dataclass
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


def grayscale(x):
    """[N, 3, H, W] → luma [N, 1, H, W]."""
    return (x * channels((0.2989, 0.587, 0.114), x.device, x.dtype)).sum(1, keepdim=True)


def blend(x, other, factor):
    """factor · x + (1 − factor) · other within [0, 1]; factor [N]."""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(x, factor):
    """torchvision's adjust_brightness with a factor per sample: x [N, 3, H, W] in [0, 1], factor [N]."""
    return blend(x, torch.zeros_like(x), factor)


def adjust_contrast(x, factor):
    """torchvision's adjust_contrast with a factor per sample."""
    return blend(x, grayscale(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x, factor):
    """torchvision's adjust_saturation with a factor per sample."""
    return blend(x, grayscale(x), factor)


def adjust_hue(x, shift):
    """torchvision's adjust_hue with a shift per sample, in turns (−0.5 … 0.5)."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = ((high[:, None] - x) / chroma.where(chroma > 0, 1)[:, None]).unbind(1)  # 0 where the channel is the highest
    hue = torch.where(r == 0, b - g, torch.where(g == 0, 2 + r - b, 4 + g - r))  # the first of equals, as torchvision
    hue = (hue / 6 * (chroma > 0) + shift.view(-1, 1, 1)) % 1.0
    # channel n of HSV → RGB: high − chroma · max(0, min(k, 4 − k, 1)), k = (n + 6 · hue) mod 6, n = 5, 3, 1
    k = (hue[:, None] * 6 + channels((5, 3, 1), x.device, x.dtype)) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, largest=2.0):
    """Gaussian blur with a sigma [N] per sample, up to `largest` pixels; the kernel spans a tenth of the side (23 at 224)
    and at least 3 of the largest sigma either way, borders reflect."""
    n, c, h, w = x.shape
    radius = min(max(math.ceil(3 * largest), round(0.05 * min(h, w))), min(h, w) - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # [N · 3, 1, taps]
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(F.conv2d(x, kernel[:, :, None], groups=n * c), kernel[..., None], groups=n * c)
    return x.view(n, c, h, w)


def augment(x, colour=None, noise=None):
    """uint8 views [N, 3, H, W] → standardised float32 (ImageNet's mean and deviation), colours changed on the way.

    noise [N, 13] in [0, 1), on the CPU: which samples get which operation is known there, so the device never waits.
    Jitter applies its four operations in an order of each sample's own, then gray, blur, solarize.
    """
    x = x.float() / 255
    if colour:
        draw = lambda low, high, u: low + (high - low) * u
        on = lambda rows: rows.nonzero()[:, 0].to(x.device, non_blocking=True)
        jittered, order = noise[:, 0] < colour.p_jitter, noise[:, 1:5].argsort(dim=1, stable=True)
        operations = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
        for place in range(4):
            for i, (operation, strength) in enumerate(zip(operations, colour.jitter)):
                chosen = jittered & (order[:, place] == i)
                if strength and chosen.any():
                    centre = 0 if operation is adjust_hue else 1
                    low = centre - strength if centre == 0 else max(0.0, 1 - strength)
                    amount = draw(low, centre + strength, noise[chosen, 5 + i]).to(x.device, non_blocking=True)
                    rows = on(chosen)
                    x[rows] = operation(x[rows], amount)
        gray, blur, solar = (noise[:, 9:12] < torch.tensor([colour.p_gray, colour.p_blur, colour.p_solarize])).T
        if gray.any():
            rows = on(gray)
            x[rows] = grayscale(x[rows]).expand(-1, 3, -1, -1)
        if blur.any():
            rows, sigma = on(blur), draw(*colour.sigma, noise[blur, 12]).to(x.device, non_blocking=True)
            x[rows] = gaussian_blur(x[rows], sigma, colour.sigma[1])
        if solar.any():
            rows = on(solar)
            x[rows] = torch.where(x[rows] >= 0.5, 1 - x[rows], x[rows])
    return standardise(x)


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class RunSettings:
    """The flags that every paper's program has and no paper speaks of."""

    data: str = "shapes"  # a built-in set, a torchvision name, or a folder
    model: str = ""  # see build_vit
    image_size: int = 224  # pixels
    out: str = ""  # run folder; default: a fresh numbered one under runs/
    resume: bool = False  # go on with the run in `out`
    init: str = ""  # encoder file to start from
    seed: int = 0
    precision: str = "auto"  # float32, bfloat16, or auto: bfloat16 where the hardware has units for it
    micro_batch: int = 0  # samples of one process at a time; 0: all
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping
    workers: int = -1  # decoding processes of each rank; −1: one for each core it has, at most 12
    save_every: int = 0  # steps between checkpoints; 0: one an epoch
    short: bool = False  # the built-in run in a minute or two
    checkpoint_blocks: bool = False  # recompute the encoder's blocks in the backward pass: less memory, a third more time
    zero: bool = False  # spread AdamW's moments over the processes
    compile: bool = False  # torch.compile of the transformer blocks; meant for GPUs, tested on CPUs
    cost: bool = False  # train nothing: print what a step of each stage costs with these settings


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def comments(*classes):
    """{field: the comment behind it} of dataclasses, as help texts of the flags."""
    source = "".join(map(inspect.getsource, classes)).replace("%", "%%")
    return dict(re.findall(r"^    (\w+): .*?# (.*)", source, re.M))


def parse_settings(cls, presets, argv, description):
    """Command line → settings: defaults of the dataclass, then `presets(given)`, then the flags that were given.

    Every field of `cls` is a flag of its name, for a bool with its opposite --no_NAME; --help shows the values that the
    rest of the command line leads to, explained by the comments of the fields. `presets` gets the given flags as a dict
    and returns field values, among them the model's row of the paper's table. With --resume the run's config.json is
    the base, and flags that say otherwise are refused.

    Raises:
        InputError: an unknown flag or value, or a config.json that is not of this program.
    """
    title = " ".join(description.split("\n\n")[0].split())
    parser = Parser(description=title, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="[the settings of this command line] and what they are")
    actions, meaning = [], comments(RunSettings, cls)
    for field in dataclasses.fields(cls):
        if field.type is bool:
            actions.append(parser.add_argument(f"--{field.name}", dest=field.name, action="store_true"))
            parser.add_argument(f"--no_{field.name}", f"--no-{field.name}", dest=field.name, action="store_false")
        else:
            actions.append(parser.add_argument(f"--{field.name}", type=field.type, metavar="X"))
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        values = vars(cls(**{**presets(given), **given}))
        for action in actions:
            action.help = f"[{values[action.dest]}] {meaning.get(action.dest, '')}".replace("[]", "")
        parser.print_help()
        raise SystemExit(0)
    if given.get("cost"):
        given.setdefault("data", "random")
    if not given.get("resume"):
        settings = check_numbers(cls(**{**presets(given), **given}))
        if settings.short and settings.data not in ("shapes", "moving_shapes"):
            raise InputError(f"--short is a length of the built-in runs, not of --data {settings.data}: give --epochs")
        return settings
    config = Path(given.get("out", "")) / "config.json"
    if not given.get("out") or not config.is_file():
        raise InputError("--resume needs --out DIR with a folder that holds a run")
    saved = read_json(config, "restore it, or start a new run")
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    odd = sorted(types.keys() ^ saved.keys())
    odd += [k for k, v in saved.items() if k in types and type(v) not in (types[k], {float: int}.get(types[k]))]
    if odd:
        what = f"{config} does not fit this program ({', '.join(odd[:4])})"
        raise InputError(f"{what}: resume with the program and version that wrote it, or start a new run")
    for key, value in given.items():
        # what changes no result
        free = ("out", "resume", "workers", "micro_batch", "checkpoint_blocks", "zero", "compile", "save_every")
        if key not in free and saved.get(key) != value:
            raise InputError(f"--{key} {value} contradicts {config}, which says {saved.get(key)}; leave the flag out")
    return check_numbers(cls(**{**saved, **given}))


# What a number may be, by the name of its setting: the first line that fits.
LIMITS = (
    ("workers|gap|blocks", lambda v: v >= -1, "from -1"),
    ("seed", lambda v: 0 <= v < 2**63, "from 0, below 2^63"),
    ("batch", lambda v: v >= 2, "from 2"),  # alone, a sample has nothing to be told from
    ("(projector_)?ema|warmup|lam|lambda_infonce|strength", lambda v: 0 <= v <= 1, "from 0 to 1"),
    (".*mask_ratio", lambda v: 0 <= v < 1, "from 0, below 1"),
    (".*(scale|crop)_min|layer_decay", lambda v: 0 < v <= 1, "above 0, up to 1"),
    ("micro_batch|save_every|local_views|.*warmup_epochs", lambda v: v >= 0, "from 0"),
    (".*(batch|epochs|lr|temperature|size|dim|hidden|heads)", lambda v: v > 0, "above 0"),
    (".*(queue|every|views|runs|shots|splits|samples|neighbours)|k|mask_block", lambda v: v > 0, "above 0"),
    (".*", lambda v: v >= 0, "from 0"),
)


def check_numbers(settings):
    """The settings (a dataclass or a namespace) again.

    Raises:
        InputError: a number, alone or in a list, that is not finite or not within LIMITS; a warm-up that outlasts its
            training.
    """
    for name, value in vars(settings).items():
        allowed, words = next((a, w) for names, a, w in LIMITS if re.fullmatch(names, name))
        for v in value if isinstance(value, list) else [value]:
            if type(v) in (int, float) and not (allowed(v) and v < math.inf):
                raise InputError(f"--{name} {f'{v:g}' if isinstance(v, float) else v}: choose a number {words}")
        training = name.replace("warmup_", "")
        if name.endswith("warmup_epochs") and value > getattr(settings, training):
            raise InputError(f"--{name} {value:g} outlasts --{training} {getattr(settings, training):g}: choose less")
    return settings


def precision_of(name, device):
    """The autocast dtype for --precision."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise InputError(f"--precision {name}: choose float32, bfloat16 or auto")
    return getattr(torch, name)


def workers_of(wanted):
    """Decoding processes of this rank: as many as wanted, or for −1 one for each core it has, at most 12."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return wanted if wanted >= 0 else min(max(cores, 1), 12)


def check_batch(settings, images, batch, epochs):
    """Raises InputError if the global batch does not fit the set, the processes or the micro-batches, or if the epochs
    are less than a step."""
    if batch < 1:
        raise InputError(f"the training set ({len(images)} images) is too small for a batch on {world()} processes")
    if batch > len(images):
        raise InputError(f"batch {batch} is larger than the training set ({len(images)} images of --data {settings.data})")
    if round(epochs * (len(images) // batch)) < 1:
        raise InputError(f"{epochs:g} epochs of {len(images) // batch} steps are not one step: choose more")
    if batch % world():
        raise InputError(f"batch {batch} is not divisible by {world()} processes")
    if settings.micro_batch and (batch // world()) % settings.micro_batch:
        raise InputError(f"--micro_batch {settings.micro_batch} does not divide a process's batch of {batch // world()}")


def check_masking(grid, *ratios):
    """Raises InputError if one of the mask ratios removes all patches of a grid (height, width)."""
    for ratio in ratios:
        if int(math.prod(grid) * (1 - ratio)) < 1:
            raise InputError(f"masking {ratio:g} of {math.prod(grid)} patches keeps none: mask less, or smaller ones")


class Run:
    """A run's folder and everything around a loop that is not the paper's: resuming, checkpoints, log, progress.

        run = Run(settings, device)
        for batch in run.steps("mae", images, views, batch, epochs, state=dict(encoder=encoder, optimizer=optimizer)):
            loss, _ = backward(…)
            run.optimize(optimizer, loss)

    A stage that the folder's checkpoint has behind it yields no steps; the one it stands in continues where it stopped.
    Whatever a stage changes is in its `state`. After SIGTERM or SIGINT the step in progress is finished and saved.

    Raises:
        InputError: the folder holds a run and --resume was not given.
    """

    def __init__(self, settings, device):
        self.settings, self.device = settings, device
        self.precision = precision_of(settings.precision, device)
        self.workers = workers_of(settings.workers)
        self.checkpoint, self.finished, self.skipped = None, [], {}
        self.stage = self.epoch = None
        self.stop = self.signalled = False
        self.step = self.bad = 0
        folder = [settings.out]
        if rank() == 0:
            folder = [str(self._folder())]
        if world() > 1:
            dist.broadcast_object_list(folder, device=device)
        self.folder = Path(folder[0])
        if settings.resume:
            self.checkpoint = self._read_checkpoint()
            self.finished = self.checkpoint["finished"] if self.checkpoint else []
        self.results = self._read_results()
        if rank() == 0 and not settings.resume:
            config = dataclasses.asdict(settings) | dict(out=str(self.folder), resume=False)
            write_atomic(self.folder / "config.json", json.dumps(config, indent=1).encode())
        if world() > 1:
            dist.barrier()
            if not settings.cost and not (self.folder / "config.json").exists():
                raise InputError(f"rank 0's run folder {self.folder} is not visible here: put it where all nodes see it")
        if not settings.cost:
            print0(f"run folder {self.folder}" + (f", resuming {self.checkpoint['stage']}" if self.checkpoint else ""))

    def _folder(self):
        if self.settings.cost:
            self.scratch = tempfile.TemporaryDirectory()  # gone with the run
            return Path(self.scratch.name)
        try:
            if self.settings.out:
                folder = Path(self.settings.out)
                if not self.settings.resume and folder.is_dir() and any(folder.iterdir()):
                    what = f"--out {folder} holds a run or other files"
                    raise InputError(f"{what}: add --resume to go on, or choose another")
                folder.mkdir(parents=True, exist_ok=True)
                return folder
            for number in itertools.count(1):
                folder = Path("runs") / f"{number:03d}"
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    return folder
        except OSError as e:
            raise InputError(f"run folder {folder} cannot be made ({e.strerror}): choose another with --out DIR") from e

    def _read_checkpoint(self):
        """The newest checkpoint, None before the first. A kill amid `_save`'s two renamings leaves previous.pt alone.

        Raises:
            InputError: it is damaged; the one before it is offered.
        """
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        path = last if last.exists() else previous
        if not path.exists():
            return None
        try:
            checkpoint = load_file(path)
            if not isinstance(checkpoint, dict) or checkpoint.keys() != {"stage", "step", "finished", "state"}:
                raise InputError(f"{path} is no checkpoint of a run")
            return checkpoint
        except InputError as e:
            older = path == last and previous.exists()
            command = shlex.join(["mv", str(previous), str(last)] if older else ["rm", str(path)])
            what = "the checkpoint before it is whole: go on from that" if older else "there is no other: begin anew"
            raise InputError(f"{str(e).splitlines()[0]}; {what} after `{command}`, with --resume") from e

    def _read_results(self):
        path = self.folder / "results.json"
        return read_json(path, "delete it, or restore it") if self.settings.resume and path.exists() else {}

    def report(self, name, values):
        """Adds a dict of final numbers to results.json under `name`."""
        self.results[name] = values
        if rank() == 0:
            write_atomic(self.folder / "results.json", json.dumps(self.results, indent=1).encode())

    def steps(self, stage, images, views, batch, epochs, state):
        """Yields the Batches of a stage, from where it stopped; saves `state` (modules and optimizers) as it goes.

        An epoch is len(images) // batch steps. `self.step`, `self.total` and `self.per_epoch` are the loop's counters.
        """
        self.stage, self.per_epoch = stage, len(images) // batch
        self.step, self.total, self.batch, self.bad = 0, round(epochs * self.per_epoch), batch, 0
        if stage in self.finished:
            return
        if self.settings.compile:  # block by block and in place: quick to compile, and no name changes
            modules = [m for part in state.values() if isinstance(part, nn.Module) for m in part.modules()]
            for block in (m for m in modules if isinstance(m, Block)):
                block.compile()
        if self.settings.cost:
            yield from self._cost(images, views, epochs, state["optimizer"])
            return
        if self.checkpoint and self.checkpoint["stage"] == stage:
            self.step = self.checkpoint["step"]
            if state.keys() != self.checkpoint["state"].keys():
                raise InputError(f"{self.folder / 'last.pt'} is a checkpoint of another program")
            for name, part in state.items():
                load_state(part, self.checkpoint["state"][name], f"{self.folder / 'last.pt'} ({name})")
            self.checkpoint = None
        self._open_log()
        self.clock, self.since, self.shown = time.time(), self.step, time.time()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        every = self.settings.save_every or self.per_epoch
        where = (self.step, self.total, self.settings.seed, self.device, self.workers, self.skipped)
        try:
            for batch_of_rank in batches(images, views, batch, *where):
                self.epoch = self.step // self.per_epoch
                yield batch_of_rank
                self.step += 1
                if self.stop or self.step % every == 0 or self.step == self.total:
                    self._save(state)
                if self.stop and self.step < self.total:
                    flags = f"--out {self.folder} --resume"
                    print0(f"\nstopped after step {self.step} of {self.total} ({stage}); go on with {sys.argv[0]} {flags}")
                    raise SystemExit(0)
        finally:
            self.log_file.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if sys.stdout.isatty():
            print0()
        self.finished.append(stage)
        if self.skipped:
            print0(f"{sum(self.skipped.values())} reads of {len(self.skipped)} unreadable images were skipped")

    def _cost(self, images, views, epochs, optimizer):
        """Five steps of the loop on random pixels: in the first, multiply-adds are counted; the last three are timed."""
        n, cuda = self.batch // world(), self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # without this right the peak is that of all stages so far
                Path("/proc/self/clear_refs").write_text("5")
        noise = [torch.randint(256, (n, 3, v.size, v.size), dtype=torch.uint8) for v in views]
        rows = torch.arange(n) + rank() * n
        index = rows.to(self.device)
        self.log_file, self.shown, self.clock, self.since, self.epoch = io.BytesIO(), math.inf, time.time(), 0, 0
        self.total = max(self.total, 6)  # so that no step is the last
        for self.step in range(5):
            if self.step == 2:
                self._wait()
                begin = time.perf_counter()
            views_of_step = [x.to(self.device, copy=True) for x in noise]
            data = Batch(views_of_step, index, images.labels[rows].to(self.device), rows, 0)
            with FlopCounterMode(display=False) if self.step == 0 else contextlib.nullcontext() as counter:
                yield data
            if self.step == 0:
                multiply_adds = counter.get_total_flops() / 2 / n  # the counter gives FLOPs
        self._wait()
        seconds = (time.perf_counter() - begin) / 3
        side = 8192 if cuda else 2048
        a = torch.randn(side, side, device=self.device, dtype=self.precision)
        for i in range(6):
            if i == 1:
                self._wait()
                begin = time.perf_counter()
            a @ a
        self._wait()
        matmul = 5 * side**3 / (time.perf_counter() - begin)  # multiply-adds/s of a plain matrix product
        resident = lambda: int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        memory = torch.cuda.max_memory_allocated() if cuda else resident()
        self.report(self.stage, {
            "parameters/M": sum(p.numel() for g in optimizer.param_groups for p in g["params"]) / 1e6,
            "madds/M": multiply_adds / 1e6,
            "images/s": self.batch / seconds,
            "peak/GiB": memory / 2**30,
            "of matmul/%": 100 * multiply_adds * n / seconds / matmul,
            "device-hours": epochs * len(images) * seconds / self.batch * world() / 3600,
        })  # fmt: skip

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self):
        """Prints the table of results.json, one row a stage."""
        if self.results:
            columns = [c for c, v in next(iter(self.results.values())).items() if not isinstance(v, list)]
            print0("".join(f"{c:>15}" for c in [""] + columns))
            for name, row in self.results.items():
                print0(f"{name:>15}" + "".join(f"{row[c]:15.1f}" for c in columns))
        if not self.settings.cost:
            print0(f"everything is in {self.folder}")

    def _on_signal(self, number, frame):
        self.signalled = True

    def optimize(self, optimizer, loss, log=None, lr_factor=1.0):
        """Averages gradients over ranks, steps, logs. Returns whether the step was taken.

        A loss or gradient that is not finite skips the step on all ranks; ten in a row end the run.

        Args:
            loss: this rank's detached loss; log: dict of further tensors to average over ranks and log, scalars or
            vectors (a value for each head, say; those stay out of the progress line); lr_factor: of every group's peak lr.
        """
        lr = set_lr(optimizer, lr_factor)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_grad, norm)
        log = log or {}
        values = [loss, norm, torch.tensor(float(self.signalled)), *log.values()]
        values = torch.cat([v.detach().float().reshape(-1).to(self.device) for v in values])
        if world() > 1:
            dist.all_reduce(values)
        loss, norm, stop, *rest = (values / world()).tolist()  # the one wait for the device in a step
        rest = iter(rest)
        log = {name: [next(rest) for _ in v] if v.ndim else next(rest) for name, v in log.items()}
        self.stop = stop > 0  # some rank was told to: all agree
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimizer.step()
            self.bad = 0
        else:
            self.bad += 1
            print0(f"\nstep {self.step} ({self.stage}) skipped: loss {loss}, gradient norm {norm}")
            if self.bad == 10:
                remedy = "start a new run with a lower learning rate, --clip_grad 1 or --precision float32"
                raise InputError(f"10 steps in a row were not finite: {remedy}")
        optimizer.zero_grad(set_to_none=True)
        self._log(dict(loss=loss, lr=lr, grad_norm=norm, **log))
        return finite

    def _log(self, values):
        now = time.time()
        rate = (self.step + 1 - self.since) * self.batch / max(now - self.clock, 1e-9)
        line = dict(stage=self.stage, step=self.step, epoch=self.epoch, images_per_s=round(rate, 1))
        known = lambda v: [known(x) for x in v] if isinstance(v, list) else v if math.isfinite(v) else None
        line |= {k: known(v) for k, v in values.items()}  # JSON has no NaN
        if rank() == 0:
            with writing(self.folder / "log.jsonl"):
                self.log_file.write((json.dumps(line) + "\n").encode())
        tty = sys.stdout.isatty()
        if now - self.shown > (0.5 if tty else 10) or self.step + 1 == self.total:
            self.shown = now
            left = (self.total - self.step - 1) * self.batch / rate
            shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not isinstance(v, list))
            text = f"{self.stage}  epoch {self.epoch + 1}  step {self.step + 1}/{self.total}  {shown}"
            text += f"  {rate:.0f} images/s  {int(left // 60)}:{int(left % 60):02d} left"
            print0(text, end="\r" if tty else "\n")

    def _open_log(self):
        """Opens log.jsonl behind the last line that belongs to the checkpoint."""
        if rank() != 0:
            self.log_file = io.BytesIO()
            return
        path = self.folder / "log.jsonl"
        keep = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                entry = json.loads(line)
                if entry["stage"] in self.finished or entry["stage"] == self.stage and entry["step"] < self.step:
                    keep.append(line)
        write_atomic(path, "".join(line + "\n" for line in keep).encode())
        self.log_file = open(path, "ab", buffering=0)

    def _save(self, state):
        for part in state.values():
            if isinstance(part, ZeroOptimizer):
                part.consolidate_state_dict()  # on rank 0
        if rank() == 0:
            states = {name: part.state_dict() for name, part in state.items()}
            checkpoint = dict(stage=self.stage, step=self.step, finished=self.finished, state=states)
            save_file(self.folder / "last.pt", checkpoint, keep=self.folder / "previous.pt")
        if world() > 1:
            dist.barrier()


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
    """Writes bytes so that `path` holds the old or the new content, whatever happens.

    Args:
        data: bytes, or a function that writes them to the open file it is given.
        keep: where the old content goes; at every moment a whole file has one of the two names.
    Raises:
        InputError: it cannot be written.
    """
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
    """The dict (or another of `kinds`) in a JSON file.

    Raises:
        InputError: there is none; `remedy` says what to do.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable ({e}): {remedy}") from e
    if not isinstance(content, kinds):
        raise InputError(f"{path} holds no JSON {' or '.join(kind.__name__ for kind in kinds)}: {remedy}")
    return content


def load_file(path):
    """torch.load of tensors and plain values only (argparse.Namespace is allowed for the public MAE files).

    Raises:
        InputError: no such file, no torch file, or one that holds other objects.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        with open(path, "rb") as f:
            pickled = f.read(2).startswith((b"PK", b"\x80"))
        if not pickled or not isinstance(e, pickle.UnpicklingError):
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise InputError(f"{path} is not a readable torch file ({why})") from e
        raise InputError(
            f"{path} holds more than tensors and plain values; loading it could run code\n"
            "If you trust it, strip it once:\n"
            f"    import torch; content = torch.load({str(path)!r}, weights_only=False)\n"
            f"    state = content['model'] if 'model' in content else content\n"
            f"    torch.save({{'model': dict(state)}}, 'stripped.pt')"
        ) from e


def load_state(part, state, where):
    """load_state_dict that names missing, unexpected and misshapen keys in one line.

    Raises:
        InputError: the state does not fit.
    """
    if isinstance(part, nn.Module):
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise InputError(f"{where} does not fit this model: expected a dict of tensors")
        own = part.state_dict()
        faults = [f"{k} is missing" for k in own.keys() - state.keys()]
        faults += [f"{k} is not expected" for k in state.keys() - own.keys()]
        for k in own.keys() & state.keys():
            if own[k].shape != state[k].shape:
                faults.append(f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}")
        if faults:
            more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise InputError(f"{where} does not fit this model: {'; '.join(sorted(faults)[:4])}{more}")
    try:
        part.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as e:  # an optimizer's; torch leaves it as it was
        raise InputError(f"{where} does not fit: {str(e).splitlines()[0]}") from e


def launch(main):
    """Runs a program's main; input errors become one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except InputError as e:
        where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{where}{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- MAE pre-training


def pretrain_mae(run, encoder, decoder, images, *, epochs, batch, lr, warmup_epochs, weight_decay=0.05, mask_ratio=0.75,
                 norm_pix=True, views=1, scale=(0.2, 1.0)):  # fmt: skip
    """MAE pre-training (He et al. 2022): stage "mae" of a run.

    Args:
        epochs, batch (images of all ranks), lr (at batch 256), warmup_epochs, weight_decay: the recipe.
        views: views an image, each with a mask of its own (2 in MAE-CT's re-implementation, A.1); the lr does not count
            them. scale: of the crops.
    """
    s = run.settings
    encoder.freeze(0)
    peak = lr * batch / 256
    optimizer = adamw(parameter_groups(nn.ModuleList([encoder, decoder]), peak, weight_decay), zero=s.zero)
    state = dict(encoder=encoder, decoder=decoder, optimizer=optimizer)

    def encode(x, noise):
        x, noise = x.flatten(0, 1), noise.flatten(0, 1)  # [N · V, …]
        ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
        pred = decoder(encoder(x, ids_keep), ids_restore)
        return (), mae_loss(pred, x, mask, norm_pix).view(-1, views).mean(1)

    for data in run.steps("mae", images, [View(s.image_size, scale)] * views, batch, epochs, state):
        x = torch.stack([augment(v) for v in data.views], 1)  # [N, V, 3, S, S]
        noise = uniform((s.seed, "mae", run.step, "mask"), data.rows, views, math.prod(encoder.grid), device=run.device)
        loss, _ = backward(encode, None, (x, noise), s.micro_batch, run.precision)
        run.optimize(optimizer, loss, lr_factor=warmup_cosine(run.step, run.total, warmup_epochs * run.per_epoch))


@torch.no_grad()
def reconstruct(encoder, decoder, x, noise, mask_ratio=0.75, norm_pix=True):
    """Pictures of a masked autoencoder: x standardised [N, 3, H, W] → (masked input, reconstruction), alike.

    Removed patches are gray in the first; in the second they are the decoder's, visible ones the input's. Predictions of
    normalised patches get the true patch's mean and deviation back.
    """
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
    p, (h, w) = encoder.patch_size, x.shape[-2:]
    pred, target = promote(decoder(encoder(x, ids_keep), ids_restore)), patchify(x, p)
    if norm_pix:
        var, mean = torch.var_mean(target, -1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    mask = mask[..., None]
    return unpatchify(target * (1 - mask), p, h, w), unpatchify(target * (1 - mask) + pred * mask, p, h, w)


# ------------------------------------------------------------------------------------------------- weights in and out

HEADS_OF_WIDTH = {dim: heads for dim, _, heads in VIT_SIZES.values()}  # of public files, which do not say
DATA2VEC_NAMES = {
    "modality_encoders.IMAGE.local_encoder.proj.": "patch_embed.proj.",
    "modality_encoders.IMAGE.extra_tokens": "cls_token",
    "modality_encoders.IMAGE.fixed_positional_encoder.positions": "pos_embed",
    "modality_encoders.IMAGE.context_encoder.norm.": "embed_norm.",
    "blocks.": "post_blocks.",
}


def save_encoder(path, encoder, **more):
    """Writes encoder.pt: {"model": weights under MAE's and timm's names, "encoder": what a reader needs to know, **more}.

    "encoder" holds image_size, patch_size, dim, depth, heads, post_norm, pool, final_norm (whether the norm after the
    last block belongs to the feature) and stem.
    """
    config = encoder.config | dict(pool=encoder.pool, final_norm=not encoder.config["post_norm"])
    save_file(path, dict(model=encoder.state_dict(), encoder=config, **more))


def read_encoder(path):
    """An encoder file, ours or a public one → (state dict under our names, config for ViT).

    Understands files written here, public MAE (encoder-only or with decoder), timm, MAE-CT (no position of [CLS]) and
    data2vec 2.0 (fairseq's names, stripped of other objects). Classifiers and decoders are left out.

    Raises:
        InputError: not an encoder that this project knows.
    """
    content = load_file(path)
    state = content
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if isinstance(state, dict):  # fairseq keeps a second, nested copy
        state = {k: v for k, v in state.items() if not str(k).removeprefix("model.").startswith("_ema")}
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} is no encoder file: expected a dict of tensors, or one under 'model' or 'state_dict'")
    if any("modality_encoders.IMAGE." in k for k in state):
        renamed = {}
        for key, value in state.items():
            key = key.removeprefix("model.")
            old = next((o for o in DATA2VEC_NAMES if key.startswith(o)), None)
            if old:
                renamed[DATA2VEC_NAMES[old] + key.removeprefix(old)] = value
        state = renamed
    names = r"(cls_token|pos_embed|patch_embed\.(proj|down|norms|stages|fc)|embed_norm|(post_)?blocks\.\d+|norm)(\.|$)"
    state = {k: v for k, v in state.items() if re.match(names, k)}
    stem = "conv" if "patch_embed.down.0.weight" in state else "patch"
    first = "patch_embed.down.0.weight" if stem == "conv" else "patch_embed.proj.weight"
    if first not in state or "pos_embed" not in state:
        raise InputError(f"{path} is no ViT encoder: it has no patch_embed.proj.weight and pos_embed")
    own = content.get("encoder") if isinstance(content.get("encoder"), dict) else {}
    dim, patch = state["pos_embed"].shape[-1], state[first].shape[-1] * (4 if stem == "conv" else 1)
    if math.isqrt(state["pos_embed"].shape[1]) ** 2 == state["pos_embed"].shape[1]:  # no row for [CLS]
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), state["pos_embed"]], 1)
    if not own and dim not in HEADS_OF_WIDTH:
        raise InputError(f"{path}: a ViT of width {dim} is none of {', '.join(VIT_SIZES)}")
    config = dict(
        image_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        dim=dim,
        depth=len({k.split(".")[1] for k in state if k.startswith(("blocks.", "post_blocks."))}),
        heads=own.get("heads") or HEADS_OF_WIDTH[dim],
        post_norm=any(k.startswith("post_blocks.") for k in state),
        pool=own.get("pool", "cls"),
        stem=stem,
    )
    return state, config


def load_encoder(path, image_size=None):
    """A ViT built from an encoder file, on the CPU; positions are interpolated if `image_size` differs from the file's."""
    state, config = read_encoder(path)
    side = config["image_size"] // config["patch_size"]
    config["image_size"] = image_size or config["image_size"]
    encoder = ViT(**config)
    _load_weights(encoder, state, side, path)
    return encoder


def init_encoder(encoder, path):
    """Loads an encoder file into an encoder of the same width, depth, patch and norm placement (`--init`).

    Raises:
        InputError: names the keys and shapes that do not fit.
    """
    state, config = read_encoder(path)
    if config["post_norm"] != encoder.config["post_norm"]:
        theirs, ours = ("post-norm", "pre-norm") if config["post_norm"] else ("pre-norm", "post-norm")
        raise InputError(f"{path}: its blocks are {theirs}, those of the model {ours} (data2vec 2.0 is post-norm, MAE pre-norm)")
    _load_weights(encoder, state, config["image_size"] // config["patch_size"], path)


def _load_weights(encoder, state, side, path):
    if state["pos_embed"].shape[-1] == encoder.dim:
        state["pos_embed"] = resize_positions(state["pos_embed"], (side, side), encoder.grid)
    load_state(encoder, state, str(path))


# ----------------------------------------------------------------------------------------------------------- pictures


def to_bytes(x):
    """Standardised views [N, 3, H, W] → uint8 pictures."""
    return (unstandardise(promote(x)) * 255).round().byte().cpu()


def draw(path, rows, side=64):
    """A picture of captioned rows of images.

    rows: list of (caption, images, frames): images [N, 3, H, W] uint8, shown `side` pixels wide; frames is None or N
    colours (name or None) drawn around them.
    """
    gap, text = 4, 14
    width = max(len(images) for _, images, _ in rows) * (side + gap) + gap
    canvas = Image.new("RGB", (max(width, 240), len(rows) * (side + gap + text) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for r, (caption, images, frames) in enumerate(rows):
        top = r * (side + gap + text) + gap
        pen.text((gap, top - 2), caption, fill="black")
        for i, image in enumerate(images):
            left = gap + i * (side + gap)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left, top + text))
            if frames and frames[i]:
                box = (left - 2, top + text - 2, left + side + 1, top + text + side + 1)
                pen.rectangle(box, outline=frames[i], width=2)
    write_atomic(path, lambda f: canvas.save(f, "PNG"))


def draw_curves(path, curves, x_label, y_label, width=480, height=320):
    """A picture of curves, {name: (x values, y values)}, over common axes that span the data; names stand in a legend."""
    left, right, top, bottom = 48, width - 16, 16, height - 40
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    x, y = ([v for curve in curves.values() for v in curve[axis]] for axis in (0, 1))
    place = lambda v, values, start, end: start + (v - min(values)) / ((max(values) - min(values)) or 1) * (end - start)
    ticks = lambda values: [min(values) + i / 4 * (max(values) - min(values)) for i in range(5)]
    for value in sorted(set(x)) if len(set(x)) <= 12 else ticks(x):
        at = place(value, x, left, right)
        pen.line([(at, top), (at, bottom)], fill="gainsboro")
        pen.text((at, bottom + 6), f"{value:.3g}", fill="black", anchor="ma")
    for value in ticks(y):
        at = place(value, y, bottom, top)
        pen.line([(left, at), (right, at)], fill="gainsboro")
        pen.text((left - 6, at), f"{value:.3g}", fill="black", anchor="rm")
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = ("steelblue", "darkorange", "seagreen", "firebrick", "slateblue", "gray")[i % 6]
        points = [(place(a, x, left, right), place(b, y, bottom, top)) for a, b in zip(xs, ys)]
        pen.line(points, fill=colour, width=2)
        for a, b in points:
            pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=colour)
        pen.text((left + 8, top + 2 + 13 * i), name, fill=colour)
    pen.text(((left + right) / 2, height - 4), x_label, fill="black", anchor="ms")
    pen.text((4, 2), y_label, fill="black")
    write_atomic(path, lambda f: canvas.save(f, "PNG"))


def draw_matrix(path, values, names, side=480):
    """A picture of a matrix [rows, columns] of counts as shares of their row, white for 0 to blue for 1; `names` of the
    rows stand beside them where there is room."""
    share = np.asarray(values) / np.maximum(np.sum(values, 1, keepdims=True), 1)
    shades = np.array([255, 255, 255]) + share[..., None] * (np.array([8, 48, 107]) - 255)
    room = 120 if side / len(share) >= 11 else 0
    canvas = Image.new("RGB", (room + side + 8, side + 8), "white")
    picture = Image.fromarray(shades.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(picture, (room + 4, 4))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((room + 3, 3, room + side + 4, side + 4), outline="gray")
    for i, name in enumerate(names if room else []):
        pen.text((room, 4 + (i + 0.5) * side / len(share)), str(name)[:18], fill="black", anchor="rm")
    write_atomic(path, lambda f: canvas.save(f, "PNG"))


def draw_points(path, points, labels, names, side=480):
    """A picture of points [N, 2], coloured by label; up to 20 names stand in a legend."""
    low, high = points.min(0).values, points.max(0).values
    at = ((points - low) / (high - low).clamp(min=1e-12) * (side - 16) + 8).tolist()
    canvas = Image.new("RGB", (side + 140 * (len(names) <= 20), side), "white")
    pen = ImageDraw.Draw(canvas)
    shade = lambda i: f"hsv({360 * i / len(names):.0f}, {90 - 30 * (i % 2)}%, {85 - 25 * (i % 3 == 0)}%)"
    colours = [shade(i) for i in range(len(names))]
    for (x, y), label in zip(at, labels.tolist()):
        pen.ellipse((x - 1.5, side - y - 1.5, x + 1.5, side - y + 1.5), fill=colours[label])
    for i, name in enumerate(names if len(names) <= 20 else []):
        pen.text((side + 8, 8 + 14 * i), str(name)[:20], fill=colours[i])
    write_atomic(path, lambda f: canvas.save(f, "PNG"))
