"""Tests against something independent, grouped as the files are.

That is a loop written from the formula, torch's own modules, timm, scikit-learn, scipy, torchvision, finite
differences, one process against two, a killed run against an unbroken one.

    pytest test_all.py --durations=15            # some minutes on two CPU cores
    SLOW=1 pytest test_all.py                    # the long ones too
    python test_all.py bench attention           # ratios of alternating runs; also: bench heads, bench step, bench eval
    python test_all.py bench input FOLDER        # images a second of one worker

"Equal" is max|a - b| / max|b| of a tensor (`error`): 1e-10 in float64, 1e-5 in float32, unless a test says otherwise.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import timm
import timm.optim
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as tv

import can
import cmae
import common
import eval as protocols
import mae_ct
import mim_refiner
import vicmae
from common import Images, InputError, View, backward, uniform

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="long: SLOW=1 runs it")
MOVING_SHAPES_HASH = "684979fd83c25c32e1d3c8b3e5fbb039570d8aba878742ac686d4f9b882ee01a"
CPU, HERE = torch.device("cpu"), Path(__file__).parent
SHAPES_HASH = "6f06f909b35e5c3c44968c027b6d0c623ef421d24757b39d95f5d6b456669458"  # the built-in set is final


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the programs that tests start, which must find the same bits."""
    torch.set_num_threads(1)


def error(a, b):
    """max|a - b| / max|b|."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def all_equal(found, expected, tolerance):
    """Whether lists of gradients are equal; for those that are 0 but for rounding (a bias before a BatchNorm), that."""
    largest = max(e.abs().max() for e in expected)
    rounding = lambda t: t.abs().max() < tolerance * largest
    return all(error(a, b) < tolerance or rounding(a) and rounding(b) for a, b in zip(found, expected, strict=True))


def normal(*shape, seed=0):
    """The same float64 numbers in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module):
    """The module in float64, its parameters moved away from the zeros and ones under which mistakes hide."""
    module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p += 0.1 * normal(*p.shape, seed=i)
    return module


def vit(**changes):
    """A small encoder: 16 patches of 8 x 8 pixels, 3 blocks."""
    torch.manual_seed(0)
    return randomized(common.ViT(**(dict(image_size=32, patch_size=8, dim=32, depth=3, heads=4) | changes)))


def timm_vit(state):
    """The same in timm, with the given weights: every name and shape must fit."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0, norm_layer=norm
    )
    model.double().load_state_dict(state)
    return model


def pictures(count, height, width, seed=0):
    """Random pictures, uint8 [count, 3, height, width], with structure at every scale."""
    rng = np.random.default_rng(seed)
    grids = [rng.random((count, 3, h, w)) for h, w in ((2, 2), (5, 5), (11, 11), (height, width))]
    x = sum(F.interpolate(torch.from_numpy(g), (height, width), mode="bilinear") for g in grids)
    return (x / len(grids) * 255).round().byte()


def write_pictures(folder, sizes, suffix="png"):
    """One picture file for each (height, width), named so that they sort in this order; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03d}.{suffix}" for i in range(len(sizes))]
    for i, (file, (height, width)) in enumerate(zip(files, sizes)):
        Image.fromarray(pictures(1, height, width, seed=i)[0].permute(1, 2, 0).numpy()).save(file)
    return files


# -------------------------------------------------------------------------------------------------------- distributed

# What one process computes with the whole global batch, and each of two with its half: `worker` runs this under
# torchrun, the fixture `two` alone as well.


def part(t, dim=0):
    """This process's rows of a global tensor."""
    return t.chunk(common.world(), dim)[common.rank()]


def gather_outcome():
    x, other = part(normal(6, 3)).clone().requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    doubled = 2 * other  # made before the gather: its gradient is the very tensor that the gather's backward receives
    rows = common.gather(x)
    ((rows + doubled) * normal(2, 6, 3, seed=2)[common.rank()]).sum().backward()
    return dict(rows=rows.detach(), gradient=x.grad, other=other.grad)


def batch_norm_outcome(*shape):
    *heads, dim = shape
    norm = randomized(common.BatchNorm(*shape))
    x = part(normal(*heads, 12, dim, seed=3), -2).clone().requires_grad_()
    out = norm(x)
    (out * part(normal(*heads, 12, dim, seed=4), -2)).sum().backward()
    weight, bias = (common.gather(p.grad[None]).sum(0) for p in (norm.weight, norm.bias))
    return dict(
        out=out.detach(), gradient=x.grad, weight=weight, bias=bias, mean=norm.running_mean, var=norm.running_var
    )


class Recorder(common.Run):
    """A run that keeps the global loss and gradients of each step, and how many moments its optimizer holds here."""

    def optimize(self, optimizer, loss, log=None, lr_factor=1.0):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        common.average_gradients(parameters)  # done again by the run itself, which changes nothing
        self.__dict__.setdefault("losses", []).append(common.gather(loss[None]).mean())
        self.__dict__.setdefault("gradients", []).append([p.grad.clone() for p in parameters if p.grad is not None])
        self.__dict__.setdefault("peaks", []).append(sorted({g["peak_lr"] for g in optimizer.param_groups}))
        taken = super().optimize(optimizer, loss, log, lr_factor)
        own = getattr(optimizer, "optim", optimizer).state.values()
        self.moments = sum(values["exp_avg"].numel() for values in own)
        return taken

    def outcome(self, **state):
        """What a test compares; `state` is what else the steps change."""
        return dict(losses=torch.stack(self.losses), gradients=self.gradients, moments=self.moments, state=state)


def tiny_settings(**changes):
    given = dict(image_size=16, batch=8, mae_batch=8, queue=32, projector_hidden=16, predictor_hidden=16, head_dim=8,
                 decoder_dim=16, decoder_depth=1, decoder_heads=2, mae_views=2, mae_epochs=1, mae_warmup_epochs=0,
                 warmup=0.0, ema=0.9, k=4, workers=0, precision="float32", seed=3)  # fmt: skip
    return mae_ct.Settings(**(given | changes))


def tiny_images(count=16):
    return Images(torch.arange(count) % 4, list("abcd"), pixels=pictures(count, 20, 20))


def tiny_models(s, dtype):
    """Encoder of 16 patches, decoder and head."""
    torch.manual_seed(0)
    encoder = randomized(common.ViT(16, 4, dim=16, depth=3, heads=2, pool="mean"))
    decoder = randomized(common.MAEDecoder(encoder.grid, 4, 16, s.decoder_dim, s.decoder_depth, s.decoder_heads))
    head = mae_ct.NNCLRHead(16, s).double()
    return [m.to(dtype) for m in (encoder, decoder, head)]


@contextlib.contextmanager
def views_in(dtype):
    """Inside, the training loops get their augmented views in `dtype`."""
    real = common.augment
    cast = lambda *args: real(*args).to(dtype)
    with contextlib.ExitStack() as stack:
        for module in (common, mae_ct, cmae):
            stack.enter_context(mock.patch.object(module, "augment", cast))
        yield


def step_outcome(stage, micro_batch, folder, dtype=torch.float64, **changes):
    """Two steps of a stage, by the paper's own loop: losses, gradients, and what else it changes as `state`."""
    if stage == "cmae":
        return cmae_outcome(micro_batch, folder, dtype, **changes)
    s = tiny_settings(micro_batch=micro_batch, out=str(folder / f"{stage}{micro_batch}{dtype}{changes}"), **changes)
    encoder, decoder, head = tiny_models(s, dtype)
    with views_in(dtype), contextlib.redirect_stdout(io.StringIO()):
        run = Recorder(s, CPU)
        if stage == "mae":
            common.pretrain_mae(
                run, encoder, decoder, tiny_images(), epochs=1, batch=8, lr=1e-3, warmup_epochs=0, views=2
            )
        elif stage == "combined":
            mae_ct.combined_pretraining(run, encoder, decoder, head, tiny_images())
        else:
            frozen = 3 if stage == "head" else 1
            mae_ct.contrastive(run, stage, encoder, head, tiny_images(), epochs=1, lr=1e-3, head_lr=1e-3, frozen=frozen,
                               temperature=0.2, k=4, projector_ema=0.5)  # fmt: skip
    return run.outcome(**dict(head.Q.named_buffers()))


STEPS = {
    "mae": dict(),
    "combined": dict(combined_weight=0.5),
    "head": dict(),
    "ct": dict(ct_mask_ratio=0.5),
    "ct float32": dict(ct_mask_ratio=0.5, aug=True, dtype=torch.float32),
    "mae zero": dict(zero=True),
    "combined zero": dict(combined_weight=0.5, detach=True, zero=True),
    "ct zero": dict(nn_lookup=False, zero=True),
    "cmae": dict(),
    "cmae zero": dict(loss="byol", feature_depth=0, zero=True),
    "cmae without contrast": dict(lambda_c=0.0),
    "cmae conv": dict(stem="conv", random_crops=True, target_mask_ratio=0.5, share_decoder=True),
    "cmae float32": dict(loss="byol", mask_block=2, dtype=torch.float32),
}


def tiny_refiner(blocks=(2, 3), **changes):
    """Settings, encoder of 16 patches and heads."""
    given = dict(image_size=16, batch=8, queue=32, projector_hidden=16, predictor_hidden=12, head_dim=8, k=4, ema=0.9,
                 local_size=8, local_views=3, warmup_epochs=0, workers=0, precision="float32", seed=3)  # fmt: skip
    s = mim_refiner.Settings(**(given | changes))
    torch.manual_seed(0)
    encoder = randomized(common.ViT(16, 4, dim=16, depth=3, heads=2, post_norm=s.mim == "data2vec2"))
    return s, encoder, randomized(mim_refiner.IDHeads(len(blocks), 16, s))


def refiner_outcome(micro_batch, folder, dtype=torch.float64, frozen=1, **changes):
    """Two steps of refinement (frozen=3: of head initialisation), by the paper's own loop."""
    out = str(folder / f"refiner{micro_batch}{dtype}{frozen}{changes}")
    s, encoder, heads = tiny_refiner(micro_batch=micro_batch, out=out, **changes)
    real = common.augment
    with mock.patch.object(mim_refiner, "augment", lambda *args: real(*args).to(dtype)):
        run = Recorder(s, CPU)
        mim_refiner.contrast(run, "refine", encoder.to(dtype), heads.to(dtype), [2, 3], tiny_images(), None, epochs=1,
                             lr=1e-3, frozen=frozen, k=4)  # fmt: skip
    return run.outcome(**dict(heads.Q.named_buffers()))


REFINER_STEPS = {
    "refine": dict(),
    "heads": dict(frozen=3),
    "authors_loss": dict(authors_loss=True, local_views=0),
    "data2vec2": dict(mim="data2vec2"),
    "refine zero": dict(schedule="one_hot", swap_negatives=True, zero=True),
    "refine float32": dict(dtype=torch.float32),
}


def tiny_videos(count=16, frames=5):
    pixels = pictures(count * frames, 20, 20).unflatten(0, (count, frames))
    return common.Videos(torch.arange(count) % 4, list("abcd"), pixels=pixels)


def tiny_vicmae(dtype=torch.float64, method="vicmae", **changes):
    """Settings, encoder of 16 patches, decoder and branch."""
    given = dict(model="vit_nano4", image_size=16, batch=8, lr=1e-2, warmup_epochs=0, contrast_from=0, contrast_weight=0.5,
                 decoder_dim=16, decoder_depth=1, decoder_heads=2, workers=0, precision="float32", seed=3)  # fmt: skip
    s = vicmae.Settings(**(given | changes))
    torch.manual_seed(0)
    small = common.ViT(16, 4, dim=16, depth=2, heads=2, pool="mean")
    with mock.patch.object(vicmae, "build_vit", lambda *args: small):
        return s, *(randomized(m).to(dtype) for m in vicmae.models(s, method))


def vicmae_outcome(micro_batch, folder, dtype=torch.float64, method="vicmae", **changes):
    """Two steps by the paper's own loop."""
    out = str(folder / f"vicmae{micro_batch}{dtype}{method}{changes}")
    s, *modules = tiny_vicmae(dtype, method, micro_batch=micro_batch, out=out, epochs=1, **changes)
    real = common.augment
    with mock.patch.object(vicmae, "augment", lambda *args: real(*args).to(dtype)):
        run = Recorder(s, CPU)
        vicmae.pretrain(run, method, *modules, tiny_videos())
    return run.outcome()


VICMAE_STEPS = {
    "vicmae": dict(pooling="gem", color=True),
    "simsiam": dict(method="simsiam", reconstruct_both=True),
    "vicreg": dict(method="vicreg", gap=2),
    "mae on frames": dict(method="mae"),
    "vicmae before the contrast": dict(contrast_from=1),
    "vicmae zero": dict(pooling="max", projector_last=True, zero=True),
    "vicmae float32": dict(dtype=torch.float32),
}


def collectives_of_heads(heads):
    """Calls of torch.distributed in a step of so many heads."""
    s, _, module = tiny_refiner(blocks=range(heads))
    y, index = normal(4, 5, heads, 16).requires_grad_(), torch.arange(4)
    calls = []
    counted = lambda real: lambda *args, **kwargs: (calls.append(0), real(*args, **kwargs))[1]
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "all_reduce"):
            stack.enter_context(mock.patch.object(common.dist, name, counted(getattr(common.dist, name))))
        losses, aux = module.loss(y, index, index, torch.zeros(4, 2), s, 4)
        losses.sum().backward()
        module.Q.push(aux["z"], index, index)
    return len(calls)


def tiny_can(dtype=torch.float64, **changes):
    """Settings and model: an encoder of 16 patches, 6 blocks."""
    given = dict(model="vit_nano4", image_size=16, batch=8, epochs=1, lr=1e-2, warmup_epochs=0, projector_hidden=16,
                 projector_dim=8, decoder_dim=16, decoder_depth=1, decoder_heads=2, sigma_max=0.5, lambda_infonce=0.3,
                 workers=0, precision="float32", seed=3)  # fmt: skip
    s = can.Settings(**(given | changes))
    torch.manual_seed(0)
    small = common.ViT(16, 4, dim=16, depth=2, heads=2, pool="mean")
    with mock.patch.object(can, "build_vit", lambda *args, **kwargs: small):
        return s, randomized(can.CAN(s)).to(dtype)


def can_outcome(micro_batch, folder, dtype=torch.float64, **changes):
    """Two steps by the paper's own loop."""
    out = str(folder / f"can{micro_batch}{dtype}{changes}")
    s, model = tiny_can(dtype, micro_batch=micro_batch, out=out, **changes)
    real = common.augment
    with mock.patch.object(can, "augment", lambda *args: real(*args).to(dtype)):
        run = Recorder(s, CPU)
        can.pretrain(run, "can", model, tiny_images(), s)
    return run.outcome()


CAN_STEPS = {
    "can": dict(),
    "simclr": can.METHODS["simclr"],
    "mae by can": can.METHODS["mae"],
    "can zero": dict(noisy_target=True, norm_pix=True, zero=True),
    "can float32": dict(dtype=torch.float32),
}


def zero_runs(folder):
    """Runs of two stages that break off in the second and are resumed: with --zero, without, and in turns."""
    flags = [*TINY, "--data", folder.parent / "pictures", "--stages", "mae,head", "--save_every", 1]
    for name, before, after in [("plain", "--no_zero", "--no_zero"), ("zero", "--zero", "--zero"),
                                ("to zero", "--no_zero", "--zero"), ("from zero", "--zero", "--no_zero")]:  # fmt: skip
        break_at(8, *flags, before, "--out", folder / name)
        main("--out", folder / name, "--resume", after)
    break_at(8, *flags, "--zero", "--out", folder / "broken")


def outcomes(folder):
    found = dict(gather=gather_outcome(), batch_norm=batch_norm_outcome(5), batch_norm_heads=batch_norm_outcome(2, 5))
    found["segment"] = segment_outcome()
    found["uniform"] = uniform((0, "key"), part(torch.arange(8)), 3)
    encoder, images = vit().float(), Images(torch.arange(7), [], pixels=pictures(7, 32, 32))
    found["features"] = protocols.features(encoder, images, protocols.Machine(CPU))[0]
    found["knn"] = protocols.knn(*knn_data(), ks=(1, 5, 20))
    x, y = normal(20, 4).float(), torch.arange(20) % 3
    found["probe"] = protocols.probe(protocols.cached_batches(x, y, 8, 3), 6, 1, 3, x, y, 8)[1].weight.detach()
    sets = dict(lrs=(1.0,), sets={"a": 1, "b": 3}, lars=True)
    found["lars"] = protocols.probe(protocols.cached_batches(x, y, 8, 3), 6, 1, 3, x, y, 8, **sets)[1].weight.detach()
    z = [common.normalize(part(normal(6, 5, seed=i))).requires_grad_() for i in (6, 7)]
    loss = common.nt_xent(*z, 0.2)
    loss.backward()
    found["nt_xent"] = dict(loss=loss.detach(), gradients=[v.grad / common.world() for v in z])
    found["kmeans"] = protocols.kmeans(x, 3, runs=5)[0]
    images = Images(torch.arange(32) % 4, list("abcd"), pixels=pictures(32, 32, 32))
    analysed = encoder, images, images, protocols.Machine(CPU)
    found["reconstruction"] = protocols.reconstruction_per_block(*analysed, epochs=2, batch=8, lr=0.03, dim=16, heads=2)
    found["colorhist"] = protocols.colorhist(*analysed, epochs=2, batch=8, lr=1.0)
    found["invariance"] = protocols.invariance(tiny_classifier(encoder, "abcd"), images, protocols.Machine(CPU))
    found["transfer"] = protocols.transfer(vit(depth=4).float(), images, images, protocols.Machine(CPU))
    s = protocols.FineTuning(epochs=2, batch=8, lr=1e-2, drop_path=0.3, erasing=0.5)  # and all other regularisers
    found["finetune"], classifier = protocols.finetune(encoder, images, images, protocols.Machine(CPU), s)
    found["finetuned"] = classifier.head.weight.detach()
    s = protocols.FineTuning(**protocols.recipe("vicmae_subset", 32) | dict(epochs=2, batch=8, lr=1e-2, drop_path=0.3))
    videos = tiny_videos()
    found["video"] = protocols.video(encoder, videos, videos, protocols.Machine(CPU), s, 2, "joint", 2, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        for micro_batch in (0, 2):
            for name, changes in STEPS.items():
                found[name, micro_batch] = step_outcome(name.split()[0], micro_batch, folder, **changes)
            for name, changes in REFINER_STEPS.items():
                found[name, micro_batch] = refiner_outcome(micro_batch, folder, **changes)
            for name, changes in CAN_STEPS.items():
                found[name, micro_batch] = can_outcome(micro_batch, folder, **changes)
            for name, changes in VICMAE_STEPS.items():
                found[name, micro_batch] = vicmae_outcome(micro_batch, folder, **changes)
    found["collectives"] = [collectives_of_heads(heads) for heads in (1, 8)]
    return found


def worker(folder):
    common.start()
    found = outcomes(Path(folder))
    zero_runs(Path(folder))
    torch.save(found, Path(folder) / f"{common.rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(outcomes of one process, [outcomes of either of two])."""
    folder = tmp_path_factory.mktemp("two")
    write_pictures(folder / "pictures", [(24, 24)] * 16)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, __file__, "worker", str(folder / "both")], capture_output=True, text=True, env=quiet_environment()
    )
    assert done.returncode == 0, done.stderr
    both = [torch.load(folder / "both" / f"{r}.pt") for r in (0, 1)]
    return outcomes(folder / "alone") | dict(folder=folder), both


def quiet_environment():
    """For programs that tests start: on the CPU, with one thread, importing the files beside this one."""
    return os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))


def test_gather_returns_all_rows_and_their_gradient_from_all_ranks(two):
    weights = normal(2, 6, 3, seed=2)
    for rank, found in enumerate(two[1]):
        assert torch.equal(found["gather"]["rows"], normal(6, 3))
        assert error(found["gather"]["gradient"], weights.sum(0).chunk(2)[rank]) < 1e-12


def test_gather_leaves_the_gradients_of_others_alone(two):
    for rank, found in enumerate(two[1]):
        assert error(found["gather"]["other"], 2 * normal(2, 6, 3, seed=2)[rank]) < 1e-12


@pytest.mark.parametrize("name, heads", [("batch_norm", None), ("batch_norm_heads", 2)])
def test_batch_norm_over_two_ranks_is_torchs_over_the_whole_batch(two, name, heads):
    shape = (5,) if heads is None else (heads, 5)
    parameters = randomized(common.BatchNorm(*shape))
    for head in range(heads or 1):
        of_head = lambda t: t if heads is None else t[head]
        reference = nn.BatchNorm1d(5).double()
        reference.weight.data, reference.bias.data = (of_head(p).detach().clone() for p in parameters.parameters())
        x = of_head(normal(*shape[:-1], 12, 5, seed=3)).clone().requires_grad_()
        out = reference(x)
        (out * of_head(normal(*shape[:-1], 12, 5, seed=4))).sum().backward()
        expected = dict(weight=reference.weight.grad, bias=reference.bias.grad)
        expected |= dict(mean=reference.running_mean, var=reference.running_var)
        for rank, found in enumerate(two[1]):
            mine = {k: of_head(v) for k, v in found[name].items()}
            assert error(mine["out"], out.chunk(2)[rank]) < 1e-12
            assert error(mine["gradient"], x.grad.chunk(2)[rank]) < 1e-10
            assert all(error(mine[k], v) < 1e-10 for k, v in expected.items())


@pytest.mark.parametrize("name", [*STEPS, *REFINER_STEPS, *CAN_STEPS, *VICMAE_STEPS])
def test_one_process_or_two_and_whole_or_in_pieces_take_the_same_steps(two, name):
    alone, ranks = two
    whole, tolerance = alone[name, 0], 1e-5 if "float32" in name else 1e-10
    assert len(whole["losses"]) == 2 and whole["gradients"][0]
    for other in (alone[name, 2], *(r[name, m] for r in ranks for m in (0, 2))):
        later = 100 * tolerance  # Adam's first step divides every gradient by itself, rounding errors too
        assert error(other["losses"][0], whole["losses"][0]) < tolerance
        assert error(other["losses"][1], whole["losses"][1]) < later
        assert all_equal(other["gradients"][0], whole["gradients"][0], tolerance)
        assert all_equal(other["gradients"][1], whole["gradients"][1], later)
        for key, value in whole["state"].items():
            same = error(other["state"][key], value) < later if value.is_floating_point() else None
            assert torch.equal(other["state"][key], value) if same is None else same, key


@pytest.mark.parametrize("name", [n for n in [*STEPS, *REFINER_STEPS, *CAN_STEPS, *VICMAE_STEPS] if "zero" in n])
def test_zero_shares_the_moments_out_in_every_paper(two, name):
    whole, parts = two[0][name, 0]["moments"], [found[name, 0]["moments"] for found in two[1]]
    assert sum(parts) == whole and max(parts) < 0.7 * whole


def test_zero_takes_adamws_steps_and_its_checkpoints_are_adamws(two):
    both = two[0]["folder"] / "both"
    for name in ("zero", "to zero", "from zero"):
        same_weights(both / name, both / "plain", ("mae.pt", "head.pt"))
    main("--out", both / "broken", "--resume")  # by one process
    losses = [[e["loss"] for e in log_of(both / name)] for name in ("broken", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 12


def test_nt_xent_over_two_ranks_is_that_of_all_rows(two):
    alone, ranks = two[0]["nt_xent"], [r["nt_xent"] for r in two[1]]
    assert error(sum(r["loss"] for r in ranks) / 2, alone["loss"]) < 1e-12
    for view in (0, 1):
        assert error(torch.cat([r["gradients"][view] for r in ranks]), alone["gradients"][view]) < 1e-10


def test_eight_heads_have_the_collectives_of_one(two):
    assert two[0]["collectives"] == [0, 0]
    for found in two[1]:
        assert found["collectives"][0] == found["collectives"][1] > 0


@pytest.mark.parametrize("name", ["features", "probe", "lars", "kmeans"])
def test_two_processes_evaluate_as_one(two, name):
    assert all(error(found[name], two[0][name]) < 1e-5 for found in two[1])


def test_fine_tuning_with_every_regulariser_ends_with_the_same_weights_on_two_processes(two):
    assert all(error(found["finetuned"], two[0]["finetuned"]) < 1e-3 for found in two[1])  # 8 steps of AdamW in float32


@pytest.mark.parametrize("name", ["knn", "finetune", "transfer", "video"])
def test_accuracy_over_two_processes_is_that_of_one(two, name):
    assert two[1][0][name] == two[1][1][name] == two[0][name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_is_torchs(dtype):
    ours, reference = randomized(common.BatchNorm(5)).to(dtype), nn.BatchNorm1d(5).to(dtype)
    reference.load_state_dict(ours.state_dict(), strict=False)  # all but num_batches_tracked
    x = (3 + 2 * normal(12, 5)).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for training in (True, False):
        ours.train(training), reference.train(training)
        assert error(ours(x), reference(x)) < (1e-5 if dtype == torch.float32 else 1e-12)
    for module, leaf in ((ours, a), (reference, b)):
        (module.train()(leaf) * normal(12, 5, seed=1).to(dtype)).sum().backward()
    pairs = [(a.grad, b.grad), (ours.weight.grad, reference.weight.grad), (ours.bias.grad, reference.bias.grad)]
    pairs += [(ours.running_mean, reference.running_mean), (ours.running_var, reference.running_var)]
    assert all(error(p, q) < (1e-5 if dtype == torch.float32 else 1e-10) for p, q in pairs)


def test_batch_norm_of_several_heads_is_one_for_each():
    ours, x = randomized(common.BatchNorm(3, 5)), normal(3, 12, 5)
    out = ours(x)
    for h in range(3):
        one = nn.BatchNorm1d(5).double()
        one.weight.data, one.bias.data = ours.weight.data[h], ours.bias.data[h]
        assert error(out[h], one(x[h])) < 1e-12
        assert error(ours.running_var[h], one.running_var) < 1e-12


def test_batch_norm_does_not_cancel_far_from_zero():
    x = 1e4 + normal(64, 5)
    exact = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert error(common.BatchNorm(5)(x.float()), exact) < 2e-3  # a mean square minus squared mean would lose it all


def test_batch_norm_computes_in_float32_for_bfloat16():
    x = (5 + normal(64, 5)).bfloat16()
    out = common.BatchNorm(5)(x)
    assert out.dtype == torch.float32 and error(out, nn.BatchNorm1d(5)(x.float())) < 1e-5


def test_a_batch_that_is_not_finite_leaves_no_trace_in_batch_norm():
    norm, x = common.BatchNorm(3), normal(8, 3).float()
    x[2, 1] = math.inf
    norm(x)
    reference = nn.BatchNorm1d(3)
    reference(x)
    for ours, theirs, start in (
        (norm.running_mean, reference.running_mean, 0),
        (norm.running_var, reference.running_var, 1),
    ):
        assert error(ours[[0, 2]], theirs[[0, 2]]) < 1e-6 and ours[1] == start


def test_batch_norm_has_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(common.BatchNorm(2, 3).double(), normal(2, 6, 3).requires_grad_())


# ---------------------------------------------------------------------------------------------- random numbers by key


def splitmix(z):
    """Steele et al. 2014 in Python's integers, 64 bits."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_is_splitmix64_of_key_row_and_position():
    key, rows, golden = (7, 12, "mask"), torch.tensor([0, 3, 2**40]), 0x9E3779B97F4A7C15
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    found = uniform(key, rows, 2, 3)
    for i, row in enumerate(rows.tolist()):
        state = splitmix((row * golden + start) % 2**64)
        for j in range(6):
            top24 = splitmix((state + (j + 1) * golden) % 2**64) >> 40
            assert found[i].flatten()[j].item() == top24 / 2**24


def test_uniform_is_uniform():
    x = uniform((0, "uniform"), torch.arange(2000), 100)
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() < 1
    assert scipy.stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-3
    assert scipy.stats.chisquare(torch.histc(x, 256, 0, 1).numpy()).pvalue > 1e-3
    assert scipy.stats.kstest(x[:, 17].numpy(), "uniform").pvalue > 1e-3  # one position, many rows
    assert scipy.stats.kstest(x[1234].numpy(), "uniform").pvalue > 1e-3  # one row
    assert abs(x.mean() - 0.5) < 4 / math.sqrt(12 * x.numel()) and abs(x.var() - 1 / 12) < 1e-3


def test_uniform_of_neighbouring_keys_rows_and_positions_is_uncorrelated():
    x = uniform((0, 5, "mask"), torch.arange(400), 100)
    others = dict(
        step=uniform((0, 6, "mask"), torch.arange(400), 100), seed=uniform((1, 5, "mask"), torch.arange(400), 100)
    )
    others |= dict(name=uniform((0, 5, "dice"), torch.arange(400), 100), row=x.roll(1, 0), position=x.roll(1, 1))
    for other in others.values():
        assert not torch.equal(x, other)
        assert abs(np.corrcoef(x.flatten(), other.flatten())[0, 1]) < 4 / math.sqrt(x.numel())


def test_uniform_does_not_depend_on_how_rows_are_split():
    rows = torch.arange(10)
    whole = uniform((3,), rows, 4)
    assert torch.equal(torch.cat([uniform((3,), r, 4) for r in rows.split(3)]), whole)
    assert torch.equal(uniform((3,), rows.flip(0), 4).flip(0), whole)


def test_uniform_on_a_rank_is_its_part_of_the_whole(two):
    assert torch.equal(torch.cat([found["uniform"] for found in two[1]]), two[0]["uniform"])


@cuda
def test_uniform_on_a_gpu_is_that_of_the_cpu():
    rows = torch.arange(100)
    assert torch.equal(uniform((3,), rows, 50, device="cuda").cpu(), uniform((3,), rows, 50))


# ------------------------------------------------------------------------------------------------- vision transformer


def plain_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def plain_attention(x, attn):
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
    width, heads = x.shape[-1] // attn.heads, []
    for h in range(attn.heads):
        s = slice(h * width, (h + 1) * width)
        weights = (q[..., s] @ k[..., s].transpose(-2, -1) / math.sqrt(width)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., s])
    return torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias


def plain_mlp(x, mlp):
    x = x @ mlp.fc1.weight.T + mlp.fc1.bias
    return (x * (1 + torch.erf(x / math.sqrt(2))) / 2) @ mlp.fc2.weight.T + mlp.fc2.bias


def plain_block(x, block):
    x = x + plain_attention(plain_norm(x, block.norm1), block.attn)
    return x + plain_mlp(plain_norm(x, block.norm2), block.mlp)


def plain_post_norm_block(x, block):
    x = plain_norm(x + plain_attention(x, block.attn), block.norm1)
    return plain_norm(x + plain_mlp(x, block.mlp), block.norm2)


def plain_patch_tokens(encoder, x):
    """Each patch times the projection, plus its position: [N, L, D]."""
    p, proj, tokens = encoder.patch_size, encoder.patch_embed.proj, []
    for row, column in itertools.product(range(encoder.grid[0]), range(encoder.grid[1])):
        patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten(1)
        tokens.append(patch @ proj.weight.flatten(1).T + proj.bias)
    return torch.stack(tokens, 1) + encoder.pos_embed[:, 1:]


def test_encoder_is_timms():
    encoder, x = vit(), normal(2, 3, 32, 32)
    reference = timm_vit(encoder.state_dict())
    assert error(encoder(x), reference.forward_features(x)) < 1e-10
    encoder.float(), reference.float()
    assert error(encoder(x.float()), reference.forward_features(x.float())) < 1e-5


def test_pooled_feature_is_cls_or_the_mean_of_the_patches():
    tokens, encoder = normal(2, 17, 32), vit()
    assert torch.equal(encoder.pooled(tokens), tokens[:, 0])
    encoder.pool = "mean"
    assert error(encoder.pooled(tokens), sum(tokens[:, i] for i in range(1, 17)) / 16) < 1e-12


def test_intermediate_blocks_are_counted_from_1_and_come_before_the_final_norm():
    encoder, x, outputs = vit(), normal(2, 3, 32, 32), []
    reference = timm_vit(encoder.state_dict())
    for block in reference.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    reference.forward_features(x)
    found = encoder(x, blocks=(3, 1))  # in the order asked for
    assert error(found[0], outputs[2]) < 1e-10 and error(found[1], outputs[0]) < 1e-10
    assert error(encoder.norm(found[0]), encoder(x)) < 1e-12


def test_visible_patches_are_those_of_ids_keep_in_its_order():
    encoder, x = vit(), normal(3, 3, 32, 32)
    ids = torch.stack([torch.from_numpy(np.random.default_rng(n).permutation(16)[:5]) for n in range(3)])
    found, every = encoder(x, ids), plain_patch_tokens(encoder, x)
    for n in range(3):
        tokens = torch.cat([encoder.cls_token[0] + encoder.pos_embed[0, :1]] + [every[n, i : i + 1] for i in ids[n]])
        for block in encoder.blocks:
            tokens = plain_block(tokens, block)
        assert error(found[n], plain_norm(tokens, encoder.norm)) < 1e-10


def test_post_norm_encoder_is_data2vecs():
    encoder, x = vit(post_norm=True), normal(2, 3, 32, 32)
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    tokens = plain_norm(torch.cat([cls, plain_patch_tokens(encoder, x)], 1), encoder.embed_norm)
    for block in encoder.post_blocks:
        tokens = plain_post_norm_block(tokens, block)
    assert error(encoder(x), tokens) < 1e-10  # no norm at the end


@pytest.mark.parametrize("length", [7, 200])  # 200: three samples at a time
def test_attention_is_torchs(length):
    q, k, v = normal(3, 5, 4, length, 8)
    assert error(common.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-12


@cuda
def test_attention_of_the_flash_kernels_is_the_formula():
    q, k, v = normal(3, 2, 4, 197, 64).cuda().bfloat16()
    formula = (q.double() @ k.double().transpose(-2, -1) / 8).softmax(-1) @ v.double()
    assert error(common.attend(q, k, v), formula) < 2e-2


def saved_for_backward(function):
    """Shapes of the tensors that autograd keeps while `function` runs."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        function()
    return shapes


def test_frozen_blocks_get_no_gradient_and_save_nothing():
    encoder, x = vit(), normal(2, 3, 32, 32)
    free = encoder(x)
    encoder.freeze(2)
    out = encoder(x)
    assert torch.equal(out, free)
    out.square().sum().backward()
    learns = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in encoder.named_parameters() if name.startswith(("blocks.2.", "norm."))}
    tokens = encoder(x, blocks=[2])[0].detach()
    assert saved_for_backward(lambda: encoder(x)) == saved_for_backward(lambda: encoder.norm(encoder.blocks[2](tokens)))


def test_a_wholly_frozen_encoder_saves_nothing_and_thaws():
    encoder, x = vit(), normal(2, 3, 32, 32)
    encoder.freeze(3)
    assert saved_for_backward(lambda: encoder(x)) == [] and not encoder(x).requires_grad
    encoder.freeze(0)
    encoder(x).square().sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == {"pos_embed"}


def test_checkpointed_blocks_give_the_same_gradients_and_keep_less():
    encoder, x, saved = vit(), normal(2, 3, 32, 32), []

    def gradients(checkpoint):
        encoder.checkpoint_blocks = checkpoint
        encoder.zero_grad()
        saved.append(0)

        def pack(t):
            saved[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = encoder(x, drop=common.drop_path(0.5, uniform((0,), torch.arange(2), 3, 2))).square().mean()
        loss.backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    assert all_equal(gradients(True), gradients(False), 1e-12)
    assert saved[0] < saved[1] / 4


def test_drop_path_rate_grows_linearly_and_keeps_the_mean():
    factors = common.drop_path(0.4, uniform((0, "drop"), torch.arange(20000), 5, 2))
    dropped = (factors == 0).double().mean(0)  # [depth, 2]
    for block, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        assert (dropped[block] - rate).abs().max() < 0.015
        assert error(factors[:, block].max(), torch.tensor(1 / (1 - rate))) < 1e-6
    assert (factors.mean(0) - 1).abs().max() < 0.03


def test_drop_path_scales_each_samples_two_branches():
    encoder, x, drop = vit(), normal(2, 3, 32, 32), torch.tensor([[[0, 2], [1, 1], [3, 0]], [[1, 0], [0, 0], [1, 2]]])
    found = encoder(x, drop=drop, blocks=[3])[0]
    for n in range(2):
        tokens = encoder.embed(x)[n]
        for block, (a, m) in zip(encoder.blocks, drop[n].tolist()):
            tokens = tokens + a * plain_attention(plain_norm(tokens, block.norm1), block.attn)
            tokens = tokens + m * plain_mlp(plain_norm(tokens, block.norm2), block.mlp)
        assert error(found[n], tokens) < 1e-10


def test_position_table_is_maes():
    dim, height, width = 16, 3, 40  # wide enough to show angles that were rounded to float32
    table = common.sincos_positions(dim, height, width)
    assert table.shape == (1, 121, dim) and not table[0, 0].any()
    for row, column, channel in itertools.product(range(height), range(width), range(dim)):
        place = column if channel < dim // 2 else row
        angle = place / 10000 ** (channel % (dim // 4) / (dim // 4))
        wave = math.cos if channel // (dim // 4) % 2 else math.sin
        assert table[0, 1 + row * width + column, channel].item() == pytest.approx(wave(angle), abs=1e-7)


def test_positions_of_another_grid_are_timms_interpolation():
    table = normal(1, 1 + 16, 8)
    assert torch.equal(common.resize_positions(table, (4, 4), (4, 4)), table)
    expected = timm.layers.resample_abs_pos_embed(table, (6, 3), num_prefix_tokens=1, antialias=False)
    assert error(common.resize_positions(table, (4, 4), (6, 3)), expected) < 1e-6


def test_an_image_of_another_size_gets_interpolated_positions():
    encoder, x = vit(), normal(1, 3, 48, 24)
    larger = timm_vit(encoder.state_dict())
    larger.set_input_size((48, 24))
    larger.pos_embed.data = common.resize_positions(encoder.pos_embed, (4, 4), (6, 3))  # timm's are antialiased
    assert error(encoder(x), larger.forward_features(x)) < 1e-10


@pytest.mark.parametrize(
    "build, fault",
    [
        (lambda: common.build_vit("vit_b16", 225), "225 is not divisible by the patch size 16"),
        (lambda: common.ViT(32, 8, dim=32, depth=1, heads=5), "width 32 is not divisible by 5 heads"),
        (lambda: common.build_vit("vit_xl16", 224), "unknown model 'vit_xl16'"),
        (lambda: common.build_vit("resnet50", 224), "unknown model 'resnet50'"),
        (lambda: common.sincos_positions(30, 2, 2), "divisible by 4, not 30"),
    ],
)
def test_impossible_encoders_are_refused(build, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        build()


@pytest.mark.parametrize("size", common.VIT_SIZES)
def test_every_size_has_its_number_of_parameters(size):
    dim, depth, heads = common.VIT_SIZES[size]
    with torch.device("meta"):
        encoder = common.build_vit(f"vit_{size}14", 224)
    block = (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 5 * dim) + 4 * dim
    rest = (3 * 14 * 14 * dim + dim) + dim + (1 + 16 * 16) * dim + 2 * dim  # patches, [CLS], positions, final norm
    assert sum(p.numel() for p in encoder.parameters()) == depth * block + rest


@pytest.mark.parametrize("ours, timms", [("b16", "base_patch16"), ("l16", "large_patch16"), ("h14", "huge_patch14")])
def test_published_sizes_have_timms_number_of_parameters(ours, timms):
    with torch.device("meta"):
        encoder = common.build_vit(f"vit_{ours}", 224)
        reference = timm.create_model(f"vit_{timms}_224", num_classes=0)
    count = sum(p.numel() for p in encoder.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert ours != "b16" or count == 85_798_656


def test_weights_start_as_maes():
    torch.manual_seed(0)
    encoder, decoder = common.ViT(32, 8, 64, 1, 4), common.MAEDecoder((4, 4), 8, 64, 64, 1, 4)
    bound = lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))  # of xavier-uniform
    for weight, fans in [
        (encoder.patch_embed.proj.weight, (3 * 8 * 8, 64)),
        (encoder.blocks[0].attn.qkv.weight, (64, 192)),
        (encoder.blocks[0].mlp.fc2.weight, (256, 64)),
        (decoder.decoder_pred.weight, (64, 192)),
    ]:
        assert 0.97 * bound(*fans) < weight.abs().max() <= bound(*fans)
        assert weight.std().item() == pytest.approx(bound(*fans) / math.sqrt(3), rel=0.03)
    assert not encoder.blocks[0].attn.qkv.bias.any() and encoder.patch_embed.proj.bias.any()
    for token in (encoder.cls_token, decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.4)


# ------------------------------------------------------------------------------------------------- masked autoencoder


@pytest.mark.parametrize(
    "patches, ratio, kept", [(196, 0.75, 49), (196, 0.5, 98), (36, 0.75, 9), (10, 0.65, 3), (7, 0, 7)]
)
def test_random_masking_keeps_the_patches_of_least_noise(patches, ratio, kept):
    noise = uniform((0, "mask"), torch.arange(4), patches)
    ids_keep, ids_restore, mask = common.random_masking(noise, ratio)
    assert ids_keep.shape == (4, kept) and kept == int(patches * (1 - ratio))
    for n in range(4):
        order = sorted(range(patches), key=lambda i: noise[n, i])
        assert ids_keep[n].tolist() == order[:kept]
        assert [order[i] for i in ids_restore[n]] == list(range(patches))  # undoes the shuffle
        assert [i for i in range(patches) if mask[n, i] == 0] == sorted(order[:kept])


def test_every_patch_is_masked_equally_often():
    _, _, mask = common.random_masking(uniform((0, "mask"), torch.arange(4000), 16), 0.75)
    assert scipy.stats.chisquare(mask.sum(0).numpy()).pvalue > 1e-3


def test_patches_are_cut_row_by_row_with_the_colour_last():
    x = normal(2, 3, 8, 12)
    patches = common.patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    for n, row, column, y, z, c in itertools.product(range(2), range(2), range(3), range(4), range(4), range(3)):
        assert patches[n, row * 3 + column, (y * 4 + z) * 3 + c] == x[n, c, row * 4 + y, column * 4 + z]
    assert torch.equal(common.unpatchify(patches, 4, 8, 12), x)


def test_a_noise_level_is_added_before_the_decoder_to_mask_tokens_too():
    encoder, decoder = vit(), randomized(common.MAEDecoder((4, 4), 8, 32, 16, 1, 2))
    ids_keep, ids_restore, _ = common.random_masking(uniform((0,), torch.arange(2), 16), 0.5)
    tokens, level = encoder(normal(2, 3, 32, 32), ids_keep).detach(), normal(2, 32, seed=1)
    weight, bias = decoder.decoder_embed.weight, decoder.decoder_embed.bias
    # a mask token of the encoder's width that decoder_embed maps to the decoder's own
    at_encoder = torch.linalg.lstsq(weight, (decoder.mask_token[0, 0] - bias)[:, None]).solution[:, 0]
    full = torch.cat([tokens[:, 1:], at_encoder.expand(2, 8, -1)], 1)
    full = torch.cat([tokens[:, :1], common.take(full, ids_restore)], 1) + level[:, None]
    x = F.linear(full, weight, bias) + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = block(x)
    expected = decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]
    assert error(decoder(tokens, ids_restore, level), expected) < 1e-9


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_is_the_formula(norm_pix):
    x, pred = normal(3, 3, 16, 16), normal(3, 16, 48, seed=1)
    mask = common.random_masking(uniform((0,), torch.arange(3), 16), 0.75)[2]
    per_patch = torch.zeros(3, 16).double()
    for n, l in itertools.product(range(3), range(16)):
        row, column = divmod(l, 4)
        target = x[n, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].permute(1, 2, 0).flatten()
        if norm_pix:
            variance = ((target - target.mean()) ** 2).sum() / 47  # unbiased
            target = (target - target.mean()) / math.sqrt(variance + 1e-6)
        per_patch[n, l] = ((pred[n, l] - target) ** 2).mean()
    found = common.mae_loss(pred, x, mask, norm_pix)
    for n in range(3):
        assert error(found[n], sum(per_patch[n, l] for l in range(16) if mask[n, l]) / 12) < 1e-12
    assert error(found.mean(), (per_patch * mask).sum() / mask.sum()) < 1e-12  # MAE's loss of a batch


def test_decoder_puts_every_token_in_its_place():
    torch.manual_seed(0)
    decoder, tokens = randomized(common.MAEDecoder((4, 4), 4, 16, dim=24, depth=2, heads=3)), normal(2, 1 + 4, 16)
    ids_keep, ids_restore, _ = common.random_masking(uniform((1,), torch.arange(2), 16), 0.75)  # 4 of 16 stay
    found = decoder(tokens, ids_restore)
    embed = lambda t: decoder.decoder_embed.weight @ t + decoder.decoder_embed.bias
    for n in range(2):
        x = [embed(tokens[n, 0])] + [decoder.mask_token[0, 0]] * 16  # [CLS] first
        for j, place in enumerate(ids_keep[n].tolist()):
            x[1 + place] = embed(tokens[n, 1 + j])
        x = torch.stack(x) + decoder.decoder_pos_embed[0]
        for block in decoder.decoder_blocks:
            x = plain_block(x, block)
        x = plain_norm(x, decoder.decoder_norm) @ decoder.decoder_pred.weight.T + decoder.decoder_pred.bias
        assert error(found[n], x[1:]) < 1e-10


# ----------------------------------------------------------------------------------------- heads, InfoNCE, queue, EMA


def torch_head(head):
    """The same head of torch's own modules."""
    layers = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            layers.append(nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
        else:
            norm = isinstance(layer, common.BatchNorm)
            layers.append(nn.BatchNorm1d(len(layer.weight), eps=layer.eps) if norm else nn.ReLU())
    reference = nn.Sequential(*layers).double()
    assert not reference.load_state_dict(head.state_dict(), strict=False).unexpected_keys
    return reference


def test_projector_and_predictor_are_those_of_A2():
    head = mae_ct.NNCLRHead(1024, mae_ct.Settings(queue=8))
    shape = lambda m: tuple(m.weight.shape) if hasattr(m, "weight") else type(m).__name__
    assert [shape(m) for m in head.g] == [
        (2048, 1024),
        (2048,),
        "ReLU",
        (2048, 2048),
        (2048,),
        "ReLU",
        (256, 2048),
        (256,),
    ]
    assert [shape(m) for m in head.h] == [(4096, 256), (4096,), "ReLU", (256, 4096)]
    assert all(m.bias is None for m in [*head.g, *head.h] if isinstance(m, nn.Linear))
    assert not any(p.requires_grad for p in head.g_m.parameters())


def test_a_head_is_that_of_torchs_modules():
    torch.manual_seed(0)
    for head in (common.mlp_head(6, 7, 7, 4, last_norm=True), common.mlp_head(6, 7, 4, last_norm=False)):
        reference, x = torch_head(randomized(head)), normal(9, 6)
        assert error(head(x), reference(x)) < 1e-12


def test_info_nce_is_the_formula():
    rows, columns = common.normalize(normal(5, 8)), common.normalize(normal(5, 8, seed=1))
    total = 0
    for i in range(5):
        similarities = [math.exp(rows[i] @ columns[j] / 0.2) for j in range(5)]
        total -= math.log(similarities[i] / sum(similarities))
    assert common.info_nce(rows, columns, 0.2).item() == pytest.approx(total / 5, rel=1e-12)
    columns = columns.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: common.info_nce(rows, c, 0.2), columns)


def test_nt_xent_is_the_formula():
    views = [common.normalize(normal(5, 8, seed=v)).requires_grad_() for v in (0, 1)]
    total = 0
    for v in (0, 1):
        for i in range(5):
            e = lambda w, j: math.exp((views[v][i] @ views[w][j]).item() / 0.2)
            negatives = [e(w, j) for w in (0, 1) for j in range(5) if j != i]  # of 2n - 2
            total -= math.log(e(1 - v, i) / (e(1 - v, i) + sum(negatives)))
    assert common.nt_xent(*views, 0.2).item() == pytest.approx(total / 10, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *z: common.nt_xent(*z, 0.2), views)


def test_logits_stay_in_float32_under_autocast():
    rows, columns = (common.normalize(normal(64, 32, seed=i).float()) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = common.info_nce(rows, columns, 0.1)
        assert common.normalize(rows.bfloat16()).dtype == torch.float32
    assert found.dtype == torch.float32
    assert error(found, common.info_nce(rows.double(), columns.double(), 0.1)) < 1e-6


def filled_queue(size=40, dim=6, classes=3):
    torch.manual_seed(0)
    queue = common.Queue(size, dim).double()
    queue.push(common.normalize(normal(size, dim, seed=5)), torch.arange(size), torch.arange(size) % classes)
    return queue


def test_queue_starts_with_random_unit_vectors_of_no_sample():
    torch.manual_seed(0)
    queue = common.Queue(4096, 4)
    assert error(queue.embeddings.norm(dim=1), torch.ones(4096)) < 1e-6
    assert queue.embeddings.mean(0).abs().max() < 0.05
    assert (queue.indices == -1).all() and (queue.labels == -1).all()


def test_queue_lookup_takes_one_of_the_k_most_similar_but_never_the_samples_own():
    queue, z, index = filled_queue(), common.normalize(normal(20, 6, seed=6)), torch.arange(20) * 2
    z[3] = queue.embeddings[6]  # sample 6 finds its own entry at similarity 1
    dice = uniform((0, "dice"), torch.arange(20), 2)[:, 0]
    found = queue.lookup(z, index, 5, dice)
    for n in range(20):
        similarity = {i: (z[n] @ queue.embeddings[i]).item() for i in range(40) if i != index[n]}
        nearest = sorted(similarity, key=similarity.get, reverse=True)[:5]
        assert found[n] == nearest[int(dice[n] * 5)]


def test_queue_lookup_throws_fair_dice():
    queue, k = filled_queue(), 5
    z = common.normalize(normal(1, 6, seed=7)).expand(5000, -1)
    found = queue.lookup(z, torch.full((5000,), 1000), k, uniform((0, "dice"), torch.arange(5000), 1)[:, 0])
    counts = found.bincount(minlength=40)
    assert set(counts.nonzero()[:, 0].tolist()) == set((queue.embeddings @ z[0]).topk(k).indices.tolist())
    assert scipy.stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3


def test_oracle_lookup_finds_the_nearest_of_the_same_class():
    queue, z, labels = filled_queue(), common.normalize(normal(20, 6, seed=8)), torch.arange(20) % 3
    found = queue.lookup(z, torch.arange(20), 1, torch.zeros(20), labels)
    for n in range(20):
        of_class = [i for i in range(40) if i % 3 == labels[n] and i != n]
        assert found[n] == max(of_class, key=lambda i: (z[n] @ queue.embeddings[i]).item())


def test_oracle_lookup_prefers_the_farthest_of_the_class_to_the_nearest_of_another():
    queue = common.Queue(4, 2).double()
    queue.push(torch.tensor([[1, 0], [0.8, 0.6], [-1, 0], [-0.8, 0.6]]), torch.arange(4), torch.tensor([1, 1, 0, 0]))
    z, index = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([9])
    for dice, expected in ((0.4, 3), (0.6, 2)):
        assert queue.lookup(z, index, 2, torch.tensor([dice]), torch.tensor([0])) == expected


def test_queue_is_first_in_first_out():
    queue, memory = common.Queue(10, 2).double(), collections.deque([(-1, None)] * 10, maxlen=10)
    counter = itertools.count()
    for size in (4, 4, 4, 1, 10, 7, 3):  # across the end, exactly full, and a last one that ends on the border
        index = torch.tensor([next(counter) for _ in range(size)])
        z = torch.stack([index, index + 0.5], 1).double()
        queue.push(z, index, index % 3)
        memory.extend((i, i % 3) for i in index.tolist())
        assert sorted(queue.indices.tolist()) == sorted(i for i, _ in memory)
        for slot, i in enumerate(queue.indices.tolist()):
            assert i == -1 or queue.embeddings[slot].tolist() == [i, i + 0.5] and queue.labels[slot] == i % 3


def test_a_push_larger_than_the_queue_leaves_its_last_rows():
    queue, index = common.Queue(4, 2), torch.arange(11)
    queue.push(torch.stack([index, index], 1).float(), index, index)
    queue.push(torch.zeros(1, 2), torch.tensor([50]), torch.tensor([50]))
    assert sorted(queue.indices.tolist()) == [8, 9, 10, 50]


def test_queues_of_several_heads_are_one_for_each():
    torch.manual_seed(0)
    together, single = common.Queue(12, 3, 4).double(), [common.Queue(12, 4).double() for _ in range(3)]
    for h, queue in enumerate(single):
        queue.embeddings.copy_(together.embeddings[h])
    for step in range(3):
        z, dice = common.normalize(normal(3, 5, 4, seed=step)), uniform((step,), torch.arange(3), 5)
        index = torch.arange(5) + 3 * step
        at = together.lookup(z, index, 3, dice)
        for h, queue in enumerate(single):
            assert torch.equal(at[h], queue.lookup(z[h], index, 3, dice[h]))
            queue.push(z[h], index, index)
        together.push(z, index, index)
    for h, queue in enumerate(single):
        assert torch.equal(together.embeddings[h], queue.embeddings) and torch.equal(together.indices, queue.indices)


def test_ema_is_the_formula_and_copies_batch_norm_statistics():
    source, target = (randomized(nn.Sequential(nn.Linear(3, 4), common.BatchNorm(4))) for _ in range(2))
    source(normal(8, 3))
    for p in source.parameters():
        p.data.mul_(-2)
    old = copy.deepcopy(target)
    common.ema_update(target, source, 0.97)
    for new, before, of in zip(target.parameters(), old.parameters(), source.parameters()):
        assert error(new, 0.97 * before + 0.03 * of) < 1e-12
    assert torch.equal(target[1].running_mean, source[1].running_mean)
    assert torch.equal(target[1].running_var, source[1].running_var)


def test_ema_of_zero_is_a_copy():
    source, target = nn.Linear(3, 4), nn.Linear(3, 4)
    common.ema_update(target, source, 0.0)
    assert torch.equal(target.weight, source.weight)


# ----------------------------------------------------------------------------------------------------------- the step


def step_case(kind):
    """encode, objective, inputs and the modules of a step of one kind."""
    torch.manual_seed(0)
    encoder = randomized(common.ViT(16, 4, dim=16, depth=2, heads=2))
    decoder = randomized(common.MAEDecoder((4, 4), 4, 16, dim=16, depth=1, heads=2))
    head = randomized(common.mlp_head(16, 8, 8, last_norm=True))
    encoder.freeze(2 if "frozen" in kind else 0)
    decoder.requires_grad_(kind != "all but the head frozen")
    noise = None if kind == "no noise" else uniform((0,), torch.arange(8), 16)

    def encode(x, noise):
        ids, restore, mask = common.random_masking(torch.zeros(len(x), 16) if noise is None else noise, 0.5)
        tokens = encoder(x, ids)
        y = encoder.pooled(tokens.detach() if kind == "detached features" else tokens)
        sample_loss = common.mae_loss(decoder(tokens, restore), x, mask)
        return () if kind == "no objective" else (y, 2 * y), None if kind == "no loss a sample" else sample_loss

    def objective(a, b):
        z = common.normalize(head(a + b))
        return common.info_nce(z.roll(1, 0), z, 0.2), dict(z=z.detach())

    return (
        encode,
        None if kind == "no objective" else objective,
        (normal(8, 3, 16, 16), noise),
        [encoder, decoder, head],
    )


KINDS = ["both losses", "no objective", "no loss a sample", "no noise"]
KINDS += ["frozen encoder", "all but the head frozen", "detached features"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_in_micro_batches_is_the_step_in_one_piece(kind, micro_batch):
    results = []
    for size in (0, micro_batch):
        encode, objective, inputs, modules = step_case(kind)
        loss, aux = backward(encode, objective, inputs, size)
        results.append((loss, aux, [p.grad for m in modules for p in m.parameters()]))
    (loss, aux, gradients), (split_loss, split_aux, split_gradients) = results
    assert error(split_loss, loss) < 1e-10 and not loss.requires_grad
    assert objective is None or error(split_aux["z"], aux["z"]) < 1e-10
    assert [g is None for g in split_gradients] == [g is None for g in gradients]
    assert all_equal([g for g in split_gradients if g is not None], [g for g in gradients if g is not None], 1e-10)


def test_a_step_in_one_piece_is_autograds():
    encode, objective, inputs, modules = step_case("both losses")
    loss, aux = backward(encode, objective, inputs)
    found = [p.grad for m in modules for p in m.parameters()]
    encode, objective, inputs, modules = step_case("both losses")
    features, sample_loss = encode(*inputs)
    expected = objective(*features)[0] + sample_loss.sum() / 8
    expected.backward()
    assert error(loss, expected) < 1e-12
    for a, p in zip(found, [p for m in modules for p in m.parameters()]):
        assert (a is None) == (p.grad is None) and (a is None or torch.equal(a, p.grad))


def test_gradients_add_up_over_calls_as_autograds_do():
    encode, objective, inputs, modules = step_case("both losses")
    learning = [p for m in modules for p in m.parameters() if p.requires_grad]
    backward(encode, objective, inputs, 2)
    once = [p.grad.clone() for p in learning]
    backward(encode, objective, inputs, 2)
    assert all_equal([p.grad for p in learning], [2 * g for g in once], 1e-10)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_bfloat16_step_is_near_the_float32_step(micro_batch):
    losses, gradients = [], []
    for precision in (torch.float32, torch.bfloat16):
        encode, objective, (x, noise), modules = step_case("both losses")
        for m in modules:
            m.float()
        losses.append(backward(encode, objective, (x.float(), noise), micro_batch, precision)[0])
        gradients.append(modules[0].blocks[0].mlp.fc1.weight.grad)
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert 0 < error(losses[1], losses[0]) < 0.02 and 0 < error(gradients[1], gradients[0]) < 0.1


@cuda
def test_micro_batches_on_a_gpu_give_the_step_in_one_piece():
    common.start()  # float32 without tf32
    results = []
    for size in (0, 2):
        encode, objective, inputs, modules = step_case("both losses")
        for m in modules:
            m.cuda().float()
        inputs = [t.cuda().float() for t in inputs]
        loss, _ = backward(encode, objective, inputs, size)
        results.append([loss] + [p.grad for m in modules for p in m.parameters() if p.grad is not None])
    assert all_equal(results[1], results[0], 1e-5)


# ------------------------------------------------------------------------------------------------------- optimisation


def test_layer_wise_decay_by_number():
    encoder = vit()
    groups = common.parameter_groups(encoder, 0.1, 0.05, 0.5)
    names = {p: name for name, p in encoder.named_parameters()}
    found = {names[p]: (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found["patch_embed.proj.weight"] == (0.1 * 0.5**4, 0.05)
    assert found["patch_embed.proj.bias"] == (0.1 * 0.5**4, 0)
    assert found["cls_token"] == (0.1 * 0.5**4, 0)
    assert found["blocks.0.attn.qkv.weight"] == (0.1 * 0.5**3, 0.05)
    assert found["blocks.1.mlp.fc1.bias"] == (0.1 * 0.5**2, 0)
    assert found["blocks.2.norm1.weight"] == (0.1 * 0.5, 0)  # the last block is decayed once
    assert found["norm.weight"] == (0.1, 0)
    assert "pos_embed" not in found and len(found) == len(names) - 1


def test_layer_wise_decay_is_timms_of_a_classifier():
    encoder = vit()
    reference = timm_vit(encoder.state_dict())
    reference.reset_classifier(5)  # learns with the full rate
    reference.pos_embed.requires_grad_(False)
    expected = timm.optim.param_groups_layer_decay(reference, 0.05, ("cls_token", "pos_embed"), layer_decay=0.65)
    names = {p: name for name, p in reference.named_parameters()}
    expected = {names[p]: (g["lr_scale"], g["weight_decay"]) for g in expected for p in g["params"]}
    names = {p: name for name, p in encoder.named_parameters()}
    groups = common.parameter_groups(encoder, 1.0, 0.05, 0.65)
    found = {names[p]: (g["peak_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name in found.keys() - {"norm.weight", "norm.bias"}:  # timm counts the final norm to the last block
        assert found[name] == pytest.approx(expected[name]), name


def test_frozen_parameters_are_in_no_group_and_post_norm_blocks_decay_alike():
    encoder = vit(post_norm=True)
    encoder.freeze(2)
    names = {p: name for name, p in encoder.named_parameters()}
    groups = common.parameter_groups(encoder, 1.0, 0.05, 0.5)
    found = {names[p]: g["peak_lr"] for g in groups for p in g["params"]}
    assert found == {name: 0.5 for name in names.values() if name.startswith("post_blocks.2.")}


def test_mask_and_cls_tokens_of_an_encoder_and_decoder_are_not_decayed():
    modules = nn.ModuleList([vit(), common.MAEDecoder((4, 4), 8, 32, 16, 1, 2)])
    names = {p: name for name, p in modules.named_parameters()}
    decayed = {names[p] for g in common.parameter_groups(modules, 1.0, 0.05) if g["weight_decay"] for p in g["params"]}
    assert decayed == {
        n for n, p in modules.named_parameters() if p.requires_grad and n.endswith("weight") and "norm" not in n
    }


def test_schedule_by_number():
    factor = lambda step: common.warmup_cosine(step, 100, 20)
    assert [factor(s) for s in (0, 9, 19, 20)] == pytest.approx([0.05, 0.5, 1, 1])
    assert factor(40) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(60) == pytest.approx(0.5) and factor(100) == pytest.approx(0)
    assert common.warmup_cosine(100, 100, 20, end=0.1) == pytest.approx(0.1)
    assert common.warmup_cosine(0, 10, 0) == 1


@pytest.mark.parametrize("steps, warmup", [(6, 1.2), (138, 27.6), (23, 4.6), (5, 0.5), (3, 3), (10, 20)])
def test_schedule_never_exceeds_the_peak(steps, warmup):
    assert max(common.warmup_cosine(s, steps, warmup) for s in range(steps)) <= 1


def test_adamw_is_torchs_with_the_groups_learning_rates():
    ours = nn.Linear(4, 3).double()
    reference = copy.deepcopy(ours)
    a = common.adamw(common.parameter_groups(ours, 0.1, 0.05))
    groups = [dict(params=[reference.weight], weight_decay=0.05), dict(params=[reference.bias], weight_decay=0)]
    b = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        assert common.set_lr(a, factor) == pytest.approx(0.1 * factor)
        for group in b.param_groups:
            group["lr"] = 0.1 * factor
        for model, optimizer in ((ours, a), (reference, b)):
            optimizer.zero_grad()
            model(normal(8, 4, seed=step)).square().sum().backward()
            optimizer.step()
    assert error(ours.weight, reference.weight) < 1e-12 and error(ours.bias, reference.bias) < 1e-12


def test_lars_is_its_formula():
    w, zero, b, stacked = (nn.Parameter(v) for v in (normal(3, 4), torch.zeros(2, 2).double(), normal(4), normal(2, 3)))
    plain = [v.detach().numpy().copy() for v in (w, zero, b, stacked)]
    groups = [dict(params=[w, zero, b]), dict(params=[stacked], trust=0)]
    optimizer, momenta = common.LARS(groups, weight_decay=0.1, trust=0.02), [0] * 4
    for step in range(5):
        for i, p in enumerate((w, zero, b, stacked)):
            p.grad = normal(*p.shape, seed=10 * step + i)
        if step == 3:
            w.grad = -0.1 * w.detach()  # weight decay alone: nothing is left
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + step
        for i, p in enumerate((w, zero, b, stacked)):
            g = p.grad.numpy().copy()
            if i < 2:
                g += 0.1 * plain[i]
                lengths = np.sqrt((plain[i] ** 2).sum()), np.sqrt((g**2).sum())
                g *= 0.02 * lengths[0] / lengths[1] if all(lengths) else 1
            momenta[i] = 0.9 * momenta[i] + g
            plain[i] = plain[i] - (0.5 + step) * momenta[i]
        optimizer.step()
        for p, expected in zip((w, zero, b, stacked), plain):
            assert error(p, torch.from_numpy(expected)) < 1e-12


# --------------------------------------------------------------------------------------------------------------- data


def random_resized_crop(noise, height, width, scale):
    """RandomResizedCrop.get_params of torchvision, with its random numbers given."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for t in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * noise[t])
        aspect = math.exp(low + (high - low) * noise[10 + t])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(noise[20] * (height - h + 1)), int(noise[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("height, width", [(224, 320), (48, 48), (333, 251), (30, 400), (401, 31), (60, 401)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.6, 1.0)])
def test_crop_boxes_are_torchvisions(height, width, scale):
    noise = uniform((0, "crop"), torch.arange(200), 22)
    boxes = common.crop_boxes(noise, height, width, scale)
    for n in range(200):
        assert boxes[n].tolist() == random_resized_crop(noise[n].tolist(), height, width, scale)


@pytest.mark.parametrize("size", [16, 40, 96])  # smaller, similar and larger than the boxes
def test_crop_resize_is_torchvisions(size):
    x, boxes = pictures(20, 48, 56), common.crop_boxes(uniform((0,), torch.arange(20), 22), 48, 56, (0.08, 1))
    found = common.crop_resize(x, boxes, size)
    for n in range(20):
        expected = tv.resized_crop(x[n], *boxes[n].tolist(), [size, size], InterpolationMode.BICUBIC, antialias=True)
        assert (found[n].int() - expected.int()).abs().max() <= 1


def test_random_crops_of_a_pil_image_are_torchvisions():
    x = pictures(1, 48, 56)[0]
    image, index = Image.fromarray(x.permute(1, 2, 0).numpy()), torch.tensor([11])
    crops = common.RandomCrops([View(16, (0.2, 1.0)), View(40, (0.05, 0.25))], seed=3)
    boxes = [crops.box(v, 2, index, 48, 56)[0].tolist() for v in (0, 1)]
    assert boxes[0] != boxes[1]  # views are drawn apart
    images = mock.Mock(sources=lambda seed, epoch, index: [image, image])
    for found, view, box in zip(crops(images, 2, 11), crops.views, boxes):
        expected = tv.resized_crop(image, *box, [view.size, view.size], InterpolationMode.BICUBIC)
        assert (found.int() - tv.pil_to_tensor(expected).int()).abs().max() <= 1


def test_center_crop_is_torchvisions():
    for height, width in ((40, 61), (32, 32), (100, 33)):
        image = Image.fromarray(pictures(1, height, width)[0].permute(1, 2, 0).numpy())
        expected = image
        if (height, width) != (32, 32):  # an image of the right size stays as it is
            resize = torchvision.transforms.Resize(round(32 / 224 * 256), InterpolationMode.BICUBIC)
            expected = torchvision.transforms.CenterCrop(32)(resize(image))
        assert torch.equal(common.CenterCrop(32)(mock.Mock(open=lambda i: image), 0, 0)[0], tv.pil_to_tensor(expected))


def all_batches(images, views, batch, start, stop, workers=0, skipped=None):
    return list(common.batches(images, views, batch, start, stop, 5, CPU, workers, {} if skipped is None else skipped))


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    """The same 14 pictures as pixels in memory and as files."""
    files = write_pictures(tmp_path_factory.mktemp("files"), [(30, 34)] * 14)
    pixels = torch.stack([pictures(1, 30, 34, seed=i)[0] for i in range(14)])
    labels = torch.arange(14) % 3
    return Images(labels, list("abc"), pixels=pixels), Images(labels, list("abc"), files=files)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_files_are_those_from_memory(in_files, workers):
    views = [View(16, (0.2, 1.0)), View(8, (0.05, 0.25))]
    memory, files = (all_batches(images, views, 4, 0, 5, workers) for images in in_files)
    assert len(memory) == len(files) == 5
    for a, b in zip(memory, files):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels) and a.epoch == b.epoch
        for v, w in zip(a.views, b.views):
            assert v.dtype == w.dtype == torch.uint8 and (v.int() - w.int()).abs().max() <= 2


def test_batches_visit_a_permutation_an_epoch_and_leave_the_rest_out(in_files):
    found = all_batches(in_files[0], [View(8)], 4, 0, 9)  # 14 images: 3 batches of 4 an epoch
    assert [b.epoch for b in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    epochs = [torch.cat([b.index for b in found[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(len(set(e)) == 12 for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert all(torch.equal(b.labels, b.index % 3) for b in found)


def test_batches_from_a_step_on_are_the_rest_of_the_batches(in_files):
    whole, rest = (all_batches(in_files[0], [View(8)], 4, start, 7) for start in (0, 4))
    assert len(rest) == 3
    for a, b in zip(whole[4:], rest):
        assert torch.equal(a.index, b.index) and torch.equal(a.views[0], b.views[0]) and a.epoch == b.epoch


def test_the_ranks_parts_are_the_global_batch(in_files, monkeypatch):
    views = [View(8), View(16)]
    whole, parts = all_batches(in_files[0], views, 6, 0, 4), []
    monkeypatch.setattr(common, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda: rank)
        parts.append(all_batches(in_files[0], views, 6, 0, 4))
    for step, batch in enumerate(whole):
        mine = [p[step] for p in parts]
        assert torch.equal(torch.cat([b.index for b in mine]), batch.index)
        assert torch.equal(torch.cat([b.rows for b in mine]), torch.arange(6))
        assert all(torch.equal(torch.cat([b.views[v] for b in mine]), batch.views[v]) for v in (0, 1))


def test_half_of_the_views_are_mirrored():
    images = Images(torch.zeros(400).long(), ["a"], pixels=pictures(400, 8, 8))
    plain, flipped = (all_batches(images, [View(8, flip=f)] * 2, 400, 0, 1)[0].views for f in (False, True))
    mirrored = []
    for a, b in zip(plain, flipped):
        mirrored.append((b == tv.horizontal_flip(a)).flatten(1).all(1))
        assert ((b == a).flatten(1).all(1) | mirrored[-1]).all()
        assert 160 < mirrored[-1].sum() < 240
    assert 140 < (mirrored[0] != mirrored[1]).sum() < 260  # each view for itself


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_named_once_and_counted(tmp_path, capsys, workers):
    files = write_pictures(tmp_path, [(20 + i, 24) for i in range(8)], "jpg")
    files[2].write_bytes(files[2].read_bytes()[:200])
    images, skipped = common.load_images(str(tmp_path), "train", labels=False), {}
    batches = all_batches(images, [View(8)], 4, 0, 6, workers, skipped)  # three epochs
    assert skipped == {str(files[2]): 3}
    assert capsys.readouterr().err.count(str(files[2])) == 1
    for first in (0, 2, 4):
        index = torch.cat([b.index for b in batches[first : first + 2]])
        assert sorted(index.tolist()) == [0, 1, 3, 3, 4, 5, 6, 7]  # the next image takes its place


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_of_nothing_readable_is_refused_in_one_line(tmp_path, workers):
    for file in write_pictures(tmp_path, [(20 + i, 24) for i in range(4)], "jpg"):
        file.write_bytes(file.read_bytes()[:200])
    images = common.load_images(str(tmp_path), "train", labels=False)
    with pytest.raises(InputError, match="100 unreadable images in a row") as refused:
        all_batches(images, [View(8)], 4, 0, 1, workers)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage",  # a PNG's pixels start at byte 33: four bytes of length, four of type, then the pixels
    [
        pytest.param(lambda b: b[:60], id="cut off"),
        pytest.param(lambda b: b[:33] + bytes([0, 0, 0, 9]) + b[37:], id="wrong length"),  # a SyntaxError in Pillow
        pytest.param(lambda b: b[:41] + bytes(4) + b[45:], id="wrong pixels"),
        pytest.param(lambda b: b"", id="empty"),
        pytest.param(lambda b: b"GIF89a", id="another format"),
    ],
)
def test_a_damaged_first_file_does_not_keep_a_folder_from_loading(tmp_path, damage):
    files = write_pictures(tmp_path, [(20, 24)] * 4)
    files[0].write_bytes(damage(files[0].read_bytes()))
    images = common.load_images(str(tmp_path), "train", labels=False)
    assert len(images) == 4 and images.pixels is None


def test_folders_of_classes_give_labels(tmp_path):
    for split, classes in (("train", "ba"), ("test", "ab")):
        for c in classes:
            write_pictures(tmp_path / split / c / "deeper", [(20, 24)] * 2)
    train, val = common.load_splits(str(tmp_path), labels=True)
    assert train.classes == val.classes == ["a", "b"] and train.labels.tolist() == [0, 0, 1, 1]
    assert train.pixels.shape == (4, 3, 20, 24)  # small and of one size: decoded once
    for i in range(4):
        assert torch.equal(train.pixels[i], tv.pil_to_tensor(Image.open(train.name(i))))
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(InputError, match="different classes"):
        common.load_splits(str(tmp_path))


def test_any_tree_of_images_will_do_without_labels(tmp_path):
    write_pictures(tmp_path / "x" / "y", [(20, 24), (30, 30)])
    write_pictures(tmp_path, [(20, 24)], "jpg")
    (tmp_path / "notes.txt").write_text("no image")
    train, val = common.load_splits(str(tmp_path))
    assert len(train) == 3 and val is None and train.labels.tolist() == [-1] * 3
    assert train.pixels is None  # of different sizes: stay files


def png_header(side, path):
    """A PNG of a few bytes that promises side x side pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    parts = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), chunk(b"IDAT", zlib.compress(bytes(99)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def palette_png(path):
    """All pixels of a colour that the palette has as red and the transparency as invisible."""
    image = Image.new("P", (20, 30), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(path, transparency=1)


def animated_gif(path):
    frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def saved(mode, colour, suffix, size=(20, 30), **options):
    return lambda path: Image.new(mode, size, colour).save(path, suffix, **options)


# name: (what writes the file, its RGB value everywhere, or what is said when it is skipped)
ODD_IMAGES = {
    "gray.png": (saved("L", 7, "PNG"), (7, 7, 7)),
    "gray of 16 bits.png": (saved("I;16", 0x8034, "PNG"), (128, 128, 128)),
    "gray of 16 bits.tif": (saved("I;16", 0x8034, "TIFF"), (128, 128, 128)),
    "gray of 16 bits.ppm": (lambda path: path.write_bytes(b"P5 20 30 65535\n" + b"\x80\x34" * 600), (128, 128, 128)),
    "colour of 16 bits.ppm": (lambda path: path.write_bytes(b"P6 2 3 65535\n" + b"\x80\x34" * 18), (128, 128, 128)),
    "cmyk.jpg": (saved("CMYK", (0, 255, 255, 0), "JPEG"), (254, 0, 0)),
    "half transparent.png": (saved("RGBA", (0, 100, 200, 51), "PNG"), (204, 224, 244)),
    "hidden colour.webp": (saved("RGBA", (0, 100, 200, 0), "WEBP", lossless=True, exact=True), (255, 255, 255)),
    "gray and transparent.png": (saved("LA", (7, 0), "PNG"), (255, 255, 255)),
    "palette.png": (palette_png, (255, 255, 255)),
    "animated.gif": (animated_gif, (255, 0, 0)),
    "one pixel.png": (saved("RGB", (9, 8, 7), "PNG", (1, 1)), (9, 8, 7)),
    "long.png": (saved("RGB", (9, 8, 7), "PNG", (5000, 1)), (9, 8, 7)),
    "tall.png": (saved("RGB", (9, 8, 7), "PNG", (1, 5000)), (9, 8, 7)),
    "png.jpg": (saved("RGB", (9, 8, 7), "PNG"), (9, 8, 7)),
    "float.tif": (saved("F", 0.5, "TIFF"), "pixels of mode F"),
    "integer.tif": (saved("I", 70000, "TIFF"), "pixels of mode I"),
    "huge.png": (partial(png_header, 30000), "exceeds limit"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda path: path.write_text("no picture"), "cannot identify"),
    "postscript.jpg": (saved("RGB", (9, 8, 7), "EPS"), "cannot identify"),  # Pillow would start Ghostscript
    "cut off.jpg": (lambda path: path.write_bytes(jpeg()[:-300]), "truncated"),
    "pipe.jpg": (os.mkfifo, "no regular file"),
    "broken link.jpg": (lambda path: path.symlink_to("nowhere"), "no regular file"),
    "link to a device.jpg": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
}


def jpeg():
    file = io.BytesIO()
    Image.fromarray(pictures(1, 40, 40)[0].permute(1, 2, 0).numpy()).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_are_read_right_or_skipped_and_named(tmp_path, capsys, name):
    """In training and in evaluation, between two plain ones."""
    write, expected = ODD_IMAGES[name]
    for plain in ("a.png", "z.png"):
        Image.new("RGB", (20, 30), (1, 2, 3)).save(tmp_path / plain)
    write(tmp_path / name)
    (tmp_path / "folder.jpg").mkdir()
    images, skipped = common.load_images(str(tmp_path), "train", labels=False), {}
    assert len(images) == 3
    odd = [images.name(i) for i in range(3)].index(str(tmp_path / name))
    [trained] = all_batches(images, [View(16)], 3, 0, 1, 0, skipped)
    [(crops, used)] = protocols.center_views(images, 16, CPU, 0, torch.arange(3))
    said = capsys.readouterr().err
    if isinstance(expected, str):
        assert said.count(f"skipped {tmp_path / name}") == 2 and expected in said
        assert skipped == {str(tmp_path / name): 1}
        assert odd not in used and odd not in trained.index
    else:
        for x, index in ((trained.views[0], trained.index), (crops, used)):
            difference = x[index == odd].int() - torch.tensor(expected)[:, None, None]
            assert difference.shape == (1, 3, 16, 16) and difference.abs().max() <= 1  # JPEG and WebP round
        assert said == "" and skipped == {}


def test_of_a_line_of_pixels_the_middle_alone_is_enlarged():
    line = Image.fromarray(pictures(1, 2, 500)[0].permute(1, 2, 0).numpy())
    images = Images(torch.zeros(1), ["a"], dataset=[(line, 0)])
    with mock.patch.object(common.v2, "resize", wraps=common.v2.resize) as resize:
        [crop] = common.CenterCrop(28)(images, 0, 0)
    assert resize.call_args.args[0].size == (32, 2)
    whole = tv.center_crop(tv.resize(line, [32], InterpolationMode.BICUBIC), [28, 28])
    assert (crop.int() - tv.pil_to_tensor(whole).int()).abs().max() <= 1


def test_exif_turns_no_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (20, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert common.read_image(tmp_path / "a.jpg").size == (20, 30)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_no_damage_to_a_file_is_more_than_unreadable(tmp_path, suffix):
    """Random bytes in random places; a decoder may not notice, but nothing else than an OSError may come of it."""
    dice, file = random.Random(0), io.BytesIO()
    Image.fromarray(pictures(1, 24, 24)[0].permute(1, 2, 0).numpy()).save(file, suffix)
    whole, noticed = file.getvalue(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(min(len(damaged), dice.choice([40, 200, 10000])))] = dice.randrange(256)
        (tmp_path / "a.jpg").write_bytes(damaged[: dice.choice([len(damaged), dice.randrange(len(damaged))])])
        try:
            assert common.read_image(tmp_path / "a.jpg").mode == "RGB"
        except OSError:
            noticed += 1
    assert noticed > 40


def test_shapes_are_ten_classes_with_masks_of_their_objects():
    images = common.shapes("val")
    assert len(images) == 2000 and images.labels.bincount().tolist() == [200] * 10 and len(images.classes) == 10
    assert images.pixels.dtype == torch.uint8 and images.masks.shape == (2000, *images.pixels.shape[2:])
    area = images.masks.float().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.6


def test_shapes_are_the_same_bytes_everywhere():
    found = hashlib.sha256()
    for images in map(common.shapes, ("train", "val")):
        for t in (images.pixels, images.masks, images.labels):
            found.update(t.numpy().tobytes())
    assert found.hexdigest() == SHAPES_HASH


def test_moving_shapes_are_the_same_bytes_everywhere():
    found, sets = hashlib.sha256(), [common.moving_shapes(split) for split in ("train", "val")]
    for videos in sets:
        for t in (videos.pixels, videos.labels, videos.motions):
            found.update(t.numpy().tobytes())
        pairs = torch.stack([videos.labels, videos.motions], 1).unique(dim=0, return_counts=True)
        assert len(pairs[0]) == 50 and pairs[1].unique().tolist() == [len(videos) // 50]  # labels are independent
    assert [tuple(videos.pixels.shape) for videos in sets] == [(1200, 12, 3, 48, 48), (400, 12, 3, 48, 48)]
    assert found.hexdigest() == MOVING_SHAPES_HASH


@pytest.mark.parametrize("length", [1, 2, 3, 7, 12])
def test_distant_sampling_takes_a_frame_from_either_half(length):
    frames = common.sample_frames(uniform((0,), torch.arange(400), 2), length)
    expected = [set(range(max(1, length // 2))), set(range(length // 2, length))]
    assert [set(column.tolist()) for column in frames.T] == expected


@pytest.mark.parametrize("length, gap", [(12, 0), (12, 4), (12, 8), (3, 8), (1, 2), (5, 4)])
def test_continuous_sampling_keeps_within_the_gap(length, gap):
    first, second = common.sample_frames(uniform((0,), torch.arange(600), 2), length, gap).T
    assert set(first.tolist()) == set(range(max(1, length - gap)))
    assert second.max() == length - 1 and second.max() < length
    distance = set((second - first).tolist())
    assert distance == ({0} if gap == 0 or length == 1 else set(range(1, min(gap, length - 1) + 1)))


def test_views_of_a_video_are_cut_from_two_frames(tmp_path):
    videos, index = tiny_videos(), torch.tensor([3, 5, 9])
    frames = common.sample_frames(uniform((7, 2, "frames"), index, 2), 5)
    for v, source in enumerate(videos.sources(7, 2, index)):
        assert torch.equal(source, torch.stack([videos.pixels[i, f] for i, f in zip(index, frames[:, v])]))
    files = write_clips(tmp_path, videos)
    views = [View(16, (0.5, 1.0))] * 2
    from_files = common.Videos(videos.labels, videos.classes, files=files)
    for a, b in zip(all_batches(videos, views, 8, 0, 2), all_batches(from_files, views, 8, 0, 2)):
        assert torch.equal(a.index, b.index)
        assert max((x.int() - y.int()).abs().max() for x, y in zip(a.views, b.views)) <= 1  # rounding
    stills, of_files = videos.stills(2), from_files.stills(2)
    assert torch.equal(stills.pixels[6:8], videos.pixels[3, [1, 3]]) and stills.labels[6:8].tolist() == [3, 3]
    assert torch.equal(common._to_uint8(of_files.open(7)), stills.pixels[7])


def write_clips(folder, videos):
    """A folder of frames for each video, whose names sort by number and not by text."""
    files = []
    for i, clip in enumerate(videos.pixels):
        files.append(folder / f"clip{i:02d}")
        files[-1].mkdir(parents=True)
        for f, frame in enumerate(clip):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(files[-1] / f"frame{8 + f}.png")  # 8, 9, 10, …
    return files


def test_videos_are_frame_folders_files_and_stills(tmp_path, monkeypatch):
    clips = tiny_videos(2).pixels
    for c, clip in zip("ab", clips):
        write_clips(tmp_path / "set/train" / c, argparse.Namespace(pixels=clip[None]))
    write_pictures(tmp_path / "set/train/b", [(20, 20)] * 2)  # in a class folder, so stills
    videos = common.load_videos(str(tmp_path / "set"), "train", labels=True)
    assert [Path(videos.name(i)).name for i in range(4)] == ["clip00", "000.png", "001.png", "clip00"]
    assert videos.labels.tolist() == [0, 1, 1, 1] and [videos.open_clip(i)[0] for i in range(4)] == [5, 1, 1, 5]
    tree = common.load_videos(str(tmp_path / "set/train"), "train")  # without train/: each folder of images is a video
    assert tree.classes == [] and [Path(tree.name(i)).name for i in range(3)] == ["clip00", "b", "clip00"]
    with pytest.raises(InputError, match="labels are needed"):
        common.load_videos(str(tmp_path / "set/train"), "train", labels=True)
    (tmp_path / "set/train/a/film.mp4").write_bytes(b"no film")
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # as if it were not installed
    with pytest.raises(InputError, match="1 video files such as .*film.mp4 need torchcodec and FFmpeg.*ffmpeg -i"):
        common.load_videos(str(tmp_path / "set"), "train")


def test_only_the_sampled_frames_of_a_video_file_are_decoded(tmp_path, monkeypatch, capsys):
    clips, decoded = tiny_videos(4).pixels, []

    class Decoder:  # the part of torchcodec's VideoDecoder that is used
        def __init__(self, path, num_ffmpeg_threads):
            self.i = int(Path(path).stem)
            if self.i == 2:
                raise RuntimeError("moov atom not found\nmore of it")

        def __len__(self):
            return 5

        def __getitem__(self, frame):
            decoded.append((self.i, frame))
            return clips[self.i, frame]

    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, argparse.Namespace(VideoDecoder=Decoder))
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    videos, skipped = common.load_videos(str(tmp_path), "train"), {}
    (batch,) = all_batches(videos, [View(16)] * 2, 4, 0, 1, skipped=skipped)
    assert sorted(batch.index.tolist()) == [0, 1, 3, 3] and len(decoded) == 8
    assert list(skipped) == [str(tmp_path / "2.mp4")]
    assert "2.mp4: no readable video (moov atom not found)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- augmentation


def unit_pictures(count, side):
    return pictures(count, side, side).double() / 255


@pytest.mark.parametrize(
    "ours, torchvisions, amounts",
    [
        (common.adjust_brightness, tv.adjust_brightness, (0.2, 0.9, 1.0, 1.8)),
        (common.adjust_contrast, tv.adjust_contrast, (0.2, 0.9, 1.0, 1.8)),
        (common.adjust_saturation, tv.adjust_saturation, (0.0, 0.9, 1.0, 1.8)),
        (common.adjust_hue, tv.adjust_hue, (-0.5, -0.1, 0.0, 0.3)),
        (common.gaussian_blur, lambda x, s: tv.gaussian_blur(x, [5, 5], [s, s]), (0.1, 0.5, 1.0, 2.0)),
    ],
)
def test_colour_operations_are_torchvisions_with_an_amount_a_sample(ours, torchvisions, amounts):
    x = unit_pictures(4, 40)
    x[3, :, :3] = x[3, :1, :3]  # gray pixels have no hue
    found = ours(x, torch.tensor(amounts).double())
    for n, amount in enumerate(amounts):
        assert error(found[n], torchvisions(x[n], amount)) < (1e-4 if ours is common.adjust_hue else 1e-5)


def test_grayscale_is_torchvisions():
    x = unit_pictures(4, 16)
    assert error(common.grayscale(x), tv.rgb_to_grayscale(x)) < 1e-5


def test_blur_spans_a_tenth_of_the_side():
    point = torch.zeros(1, 3, 224, 224)
    point[..., 112, 112] = 1
    row = common.gaussian_blur(point, torch.tensor([50.0]))[0, 0, 112]
    assert row.nonzero()[:, 0].tolist() == list(range(112 - 11, 112 + 12))  # 23 wide


def test_views_without_colours_are_standardised():
    x = pictures(3, 16, 16)
    expected = tv.normalize(x.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert error(common.augment(x), expected) < 1e-6
    assert torch.equal(common.to_bytes(common.augment(x)), x)


def test_augment_is_torchvisions_operations_sample_by_sample():
    colour = common.Colour((0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.3, p_blur=0.5, sigma=(0.3, 2.0), p_solarize=0.4)
    x, noise = pictures(40, 32, 32), uniform((0, "colour"), torch.arange(40), 13)
    found, counts = common.augment(x, colour, noise), collections.Counter()
    for n in range(40):
        y, u, near = x[n].float() / 255, noise[n].tolist(), torch.zeros(3, 32, 32, dtype=torch.bool)
        operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        if u[0] < 0.8:
            order = sorted(range(4), key=lambda i: u[1 + i])
            counts[tuple(order)] += 1
            for i in order:
                low, high = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)][i]
                y = operations[i](y, low + (high - low) * u[5 + i])
        if u[9] < 0.3:
            y = tv.rgb_to_grayscale(y, 3)
        if u[10] < 0.5:
            sigma = 0.3 + 1.7 * u[12]
            y = tv.gaussian_blur(y, [5, 5], [sigma, sigma])  # a tenth of 32
        if u[11] < 0.4:
            near = (y - 0.5).abs() < 1e-4  # a rounding error decides these
            y = tv.solarize(y, 0.5)
        y = tv.normalize(y, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert near.float().mean() < 0.01
        assert error(found[n].masked_fill(near, 0), y.masked_fill(near, 0)) < 1e-3
    assert len(counts) > 10  # orders of the jitter


def test_colours_are_off_by_default_and_every_part_has_its_probability():
    x, noise = pictures(300, 8, 8), uniform((1, "colour"), torch.arange(300), 13)
    plain = common.augment(x)
    assert torch.equal(common.augment(x, common.Colour(), noise), plain)
    for colour in (common.Colour(p_gray=0.3), common.Colour(p_blur=0.3), common.Colour(p_solarize=0.3),
                   common.Colour((0.4, 0.4, 0.2, 0.1), p_jitter=0.3)):  # fmt: skip
        changed = (common.augment(x, colour, noise) != plain).flatten(1).any(1).sum().item()
        assert scipy.stats.binomtest(changed, 300, 0.3).pvalue > 1e-3


@cuda
def test_crops_and_colours_on_a_gpu_are_those_of_the_cpu():
    x, noise = pictures(20, 48, 48), uniform((0, "colour"), torch.arange(20), 13)
    boxes = common.crop_boxes(uniform((0,), torch.arange(20), 22), 48, 48, (0.08, 1))
    a, b = common.crop_resize(x, boxes, 32), common.crop_resize(x.cuda(), boxes.cuda(), 32).cpu()
    assert (a.int() - b.int()).abs().max() <= 1
    colour = common.Colour((0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)
    assert error(common.augment(x.cuda(), colour, noise), common.augment(x, colour, noise)) < 1e-3


# --------------------------------------------------------------------------------------------------------------- runs

# A whole run in a second: 16 pictures of 24 x 24, 2 steps an epoch, 6 steps a stage
TINY = """--model vit_nano8 --image_size 16 --decoder_dim 16 --decoder_depth 1 --decoder_heads 2 --mae_batch 8 --batch 8
    --queue 32 --projector_hidden 16 --predictor_hidden 16 --head_dim 8 --k 4 --frozen 2 --ema 0.9 --mae_epochs 3
    --mae_warmup_epochs 1 --head_epochs 3 --epochs 3 --precision float32 --workers 0""".split()
LOG = [(stage, step) for stage in ("mae", "head", "ct") for step in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Image folders: `flat` without labels, `labelled` with train/ and val/ of two classes, `mixed` sizes, `empty`.
    Their pictures are larger than the encoder's 16 pixels, so that both crops have work."""
    root = tmp_path_factory.mktemp("folders")
    write_pictures(root / "flat", [(24, 24)] * 16)
    write_pictures(root / "mixed", [(24 + i, 24) for i in range(16)])
    for split, count in (("train", 8), ("val", 6)):
        for c in "ab":
            write_pictures(root / "labelled" / split / c, [(24, 24)] * count)
    (root / "empty").mkdir()
    return root


def main(*argv, program=mae_ct):
    """A program's main in this process, on the CPU; returns what it printed."""
    with mock.patch("torch.cuda.is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()) as out:
        program.main([str(a) for a in argv])
    return out.getvalue()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b, files=("mae.pt", "head.pt", "encoder.pt")):
    """Whether two run folders hold the same bits."""
    for file in files:
        x, y = (torch.load(folder / file) for folder in (a, b))
        x, y = x.get("model", x), y.get("model", y)
        assert x.keys() == y.keys()
        different = [k for k in x if not torch.equal(x[k], y[k])]
        assert not different, f"{file}: {different}"


KILL = "os.kill(os.getpid(), 9)"


def program_with(fault, owner, name, call, suffix=""):
    """Source of a mae_ct.py in which `fault` comes before a function's call of this number, counting those whose last
    argument ends in `suffix`; under torchrun on rank 1 alone."""
    return f"""if True:
        import os, resource, sys, torch, common, mae_ct
        real, calls = {owner}.{name}, []
        def faulty(*args):
            calls.extend([0] * str(args[-1]).endswith({suffix!r}))
            if len(calls) == {call} and os.environ.get("RANK", "1") == "1":
                {fault}
            return real(*args)
        {owner}.{name} = faulty
        common.launch(mae_ct.main)"""


def run_with(fault, owner, name, call, suffix, *argv):
    command = [sys.executable, "-c", program_with(fault, owner, name, call, suffix), *map(str, argv)]
    return subprocess.run(command, env=quiet_environment(), capture_output=True, text=True)


def kill_at(owner, name, call, suffix, *argv):
    """Runs mae_ct.py in a process that ends as by `kill -9` at that call."""
    done = run_with(KILL, owner, name, call, suffix, *argv)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def unbroken(folders):
    """A run of all stages without labels."""
    main(*TINY, "--data", folders / "flat", "--out", folders / "unbroken", "--save_every", 4)
    return folders / "unbroken"


def test_a_run_killed_twice_and_resumed_ends_with_the_same_bits(folders, unbroken):
    flags, out = [*TINY, "--data", folders / "flat", "--save_every", 4], folders / "killed"
    kill_at("common.Run", "_log", 6, "", *flags, "--out", out)  # in step 5, the checkpoint is of step 4
    assert len(log_of(out)) == 5
    kill_at(
        "os", "replace", 4, "last.pt", "--out", out, "--resume"
    )  # half-way through writing a checkpoint of stage ct
    assert torch.load(out / "previous.pt")["stage"] == "head" and not (out / "last.pt").exists()
    assert "resuming head" in main("--out", out, "--resume")
    same_weights(out, unbroken)
    assert [(e["stage"], e["step"]) for e in log_of(out)] == LOG
    assert [e["epoch"] for e in log_of(out)] == [step // 2 for _, step in LOG]
    assert [e["loss"] for e in log_of(out)] == [e["loss"] for e in log_of(unbroken)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=slow) for i in range(1, 5))])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(folders, unbroken, tmp_path, seed):
    """Twice: within the saving of a checkpoint, and at a random time."""
    dice, out = random.Random(seed), tmp_path / "run"
    owner, name = [("os", "replace"), ("os", "fsync"), ("torch", "save")][seed % 3]  # the file is whole, whole, empty
    kill_at(owner, name, dice.randint(3, 12), "", *TINY, "--data", folders / "flat", "--save_every", 1, "--out", out)
    command = [sys.executable, HERE / "mae_ct.py", "--out", out, "--resume"]
    program = subprocess.Popen([str(c) for c in command], env=quiet_environment(), stdout=subprocess.DEVNULL)
    lines = dice.randint(len(log_of(out)) + 1, 13)
    while program.poll() is None and (out / "log.jsonl").read_bytes().count(b"\n") < lines:
        time.sleep(0.001)
    time.sleep(dice.random() / 30)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    main("--out", out, "--resume")
    same_weights(out, unbroken)
    assert [e["loss"] for e in log_of(out)] == [e["loss"] for e in log_of(unbroken)]


def torchrun(*argv):
    """A program on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv]
    return subprocess.run([str(c) for c in command], env=quiet_environment(), capture_output=True, text=True)


def same_up_to_rounding(a, b):
    """Whether two run folders of float32 runs hold the same losses and weights, those apart that are next to 0."""
    losses = [[(e["stage"], e["step"], e["loss"]) for e in log_of(folder)] for folder in (a, b)]
    assert [x[:2] for x in losses[0]] == [x[:2] for x in losses[1]]
    assert [x[2] for x in losses[0]] == pytest.approx([x[2] for x in losses[1]], rel=1e-2)
    x, y = (torch.load(folder / "mae.pt")["model"] for folder in (a, b))
    assert all(error(x[k], y[k]) < 1e-2 for k in y if y[k].abs().max() > 1e-3)


def test_a_killed_rank_ends_the_job_and_any_number_of_ranks_goes_on(folders, unbroken, tmp_path):
    two, flags = tmp_path / "two", [*TINY, "--data", folders / "flat", "--save_every", 4]
    (tmp_path / "dying.py").write_text(program_with(KILL, "common.Run", "_log", 9))
    done = torchrun(tmp_path / "dying.py", *flags, "--out", two)
    assert done.returncode and re.search("exitcode *: -9", done.stderr), done.stderr
    assert time.time() - (two / "log.jsonl").stat().st_mtime < 60
    assert len(log_of(two)) in (8, 9) and torch.load(two / "last.pt")["step"] == 6  # rank 0 may have been a line ahead
    shutil.copytree(two, tmp_path / "then_one")
    done = torchrun(HERE / "mae_ct.py", "--out", two, "--resume")
    assert done.returncode == 0, done.stderr
    main("--out", tmp_path / "then_one", "--resume")
    for folder in (two, tmp_path / "then_one"):
        same_up_to_rounding(folder, unbroken)


@slow
def test_a_run_of_one_process_goes_on_with_two(folders, unbroken, tmp_path):
    break_at(9, *TINY, "--data", folders / "flat", "--out", tmp_path / "run")
    done = torchrun(HERE / "mae_ct.py", "--out", tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    same_up_to_rounding(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    "file, call, bytes",
    [
        ("last.pt", ("common.Run", "_log", 9), 20000),  # half-way through the second stage
        ("results.json", ("common.Run", "report", 2), 100),
        pytest.param("log.jsonl", ("common.Run", "_log", 5), 500, marks=slow),
        pytest.param("mae.pt", ("mae_ct", "save_encoder", 1), 20000, marks=slow),
        pytest.param("retrieval.png", ("mae_ct", "picture_retrieval", 1), 100, marks=slow),
    ],
)
def test_a_full_disk_is_named_and_leaves_whole_files(folders, tmp_path, file, call, bytes):
    """Files may not grow beyond so many bytes from that call on."""
    out, flags = tmp_path / "run", [*TINY, "--data", folders / "labelled"]
    fault = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))"
    done = run_with(fault, *call, "", *flags, "--save_every", 4, "--out", out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{out / file} cannot be written (File too large)" in done.stderr and f"--out {out} --resume" in done.stderr
    assert not list(out.glob("*.part"))
    if file != "log.jsonl":  # which fails before the first checkpoint
        torch.load(out / "last.pt")
    main("--out", out, "--resume")
    whole = whole_run(folders)
    same_weights(out, whole)
    assert [e["loss"] for e in log_of(out)] == [e["loss"] for e in log_of(whole)]
    assert (out / "results.json").read_text() == (whole / "results.json").read_text()


class Mischief:
    """Unpickled, it makes the folder `ran`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, fault",
    [
        (cut_off, "last.pt is not a readable torch file"),
        (lambda path: path.write_bytes(b""), "last.pt is not a readable torch file"),
        (lambda path: torch.save([1], path), "last.pt is no checkpoint of a run"),
        (lambda path: torch.save(dict(state=Mischief()), path), "last.pt holds more than tensors"),
    ],
    ids=["cut off", "empty", "another file", "code"],
)
def test_of_a_damaged_checkpoint_the_one_before_it_is_offered(folders, unbroken, tmp_path, monkeypatch, damage, fault):
    monkeypatch.chdir(tmp_path)
    out = Path("a run")  # a name to be quoted
    break_at(11, *TINY, "--data", folders / "flat", "--save_every", 4, "--out", out)
    assert [torch.load(out / f)["step"] for f in ("previous.pt", "last.pt")] == [6, 4]  # of stages mae and head
    damage(out / "last.pt")
    with pytest.raises(InputError, match=fault) as refused:
        main("--out", out, "--resume")
    assert "\n" not in str(refused.value) and not Path("ran").exists()
    subprocess.run(re.search("`(mv .*)`", str(refused.value))[1], shell=True, check=True)
    assert "resuming mae" in main("--out", out, "--resume")
    same_weights(out, unbroken)
    assert [e["loss"] for e in log_of(out)] == [e["loss"] for e in log_of(unbroken)]


def test_of_the_only_checkpoint_when_damaged_a_new_beginning_is_offered(folders, unbroken, tmp_path):
    break_at(5, *TINY, "--data", folders / "flat", "--save_every", 4, "--out", tmp_path)
    cut_off(tmp_path / "last.pt")
    with pytest.raises(InputError, match="begin anew after `rm .*last.pt`, with --resume"):
        main("--out", tmp_path, "--resume")
    (tmp_path / "last.pt").unlink()
    main("--out", tmp_path, "--resume")
    same_weights(tmp_path, unbroken)
    assert [e["loss"] for e in log_of(tmp_path)] == [e["loss"] for e in log_of(unbroken)]


class Killed(Exception):
    pass


def break_at(step, *argv, program=mae_ct):
    """Runs main until it has taken so many steps."""
    real, calls = common.Run.optimize, []

    def optimize(self, *args, **kwargs):
        calls.append(0)
        if len(calls) > step:
            raise Killed
        return real(self, *args, **kwargs)

    with mock.patch.object(common.Run, "optimize", optimize), pytest.raises(Killed):
        main(*argv, program=program)


def whole_run(folders, stages="mae,head,ct"):
    """The folder of a run with labels."""
    if not (folders / stages).exists():
        main(*TINY, "--data", folders / "labelled", "--stages", stages, "--out", folders / stages)
    return folders / stages


@pytest.mark.parametrize("stages", ["mae,head,ct", "combined,head,ct"])
@pytest.mark.parametrize("step", [6, 9, 12, 17])  # a stage's first step, the middle, the run's last step
def test_a_run_broken_off_at_any_stage_ends_with_the_same_files(folders, tmp_path, stages, step):
    whole = whole_run(folders, stages)
    break_at(step, *TINY, "--data", folders / "labelled", "--stages", stages, "--out", tmp_path / "run")
    main("--out", tmp_path / "run", "--resume")
    same_weights(tmp_path / "run", whole)
    assert (tmp_path / "run" / "results.json").read_text() == (whole / "results.json").read_text()


def test_resuming_a_finished_run_changes_nothing(folders, unbroken):
    before = {f.name: f.read_bytes() for f in unbroken.iterdir()}
    main("--out", unbroken, "--resume")
    assert [(e["stage"], e["step"]) for e in log_of(unbroken)] == LOG
    after = {f.name: f.read_bytes() for f in unbroken.iterdir()}
    assert before.keys() == after.keys() and before["log.jsonl"] == after["log.jsonl"]
    for name in before.keys() - {"last.pt", "previous.pt"}:
        assert before[name] == after[name], name


def test_a_half_written_log_line_is_dropped(folders, tmp_path):
    flags = [*TINY, "--data", folders / "flat", "--stages", "mae"]
    break_at(5, *flags, "--out", tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as f:
        f.write('{"stage": "mae", "st')
    main("--out", tmp_path / "run", "--resume")
    assert [(e["stage"], e["step"]) for e in log_of(tmp_path / "run")] == LOG[:6]


@pytest.mark.parametrize("whom", ["the process", "its workers too"])  # as `timeout`, Slurm and terminals do
def test_sigterm_saves_says_how_to_resume_and_exits_with_0(folders, tmp_path, whom):
    out = tmp_path / "run"
    flags = [*TINY, "--data", folders / "mixed", "--stages", "mae", "--mae_epochs", 10000, "--workers", 1, "--out", out]
    command = [sys.executable, HERE / "mae_ct.py", *flags]
    program = subprocess.Popen([str(c) for c in command], env=quiet_environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    while program.poll() is None and not ((out / "log.jsonl").exists() and len(log_of(out)) > 3):
        time.sleep(0.2)
    (os.kill if whom == "the process" else os.killpg)(program.pid, signal.SIGTERM)
    printed, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    assert f"--out {out} --resume" in printed
    assert torch.load(out / "last.pt")["step"] == len(log_of(out)) > 3


@pytest.mark.parametrize("program", ["mae_ct", "mim_refiner", "can", "cmae", "vicmae"])
def test_sigterm_stops_every_program_at_a_checkpoint(folders, tmp_path, program):
    program, flags = {"mae_ct": (mae_ct, TINY), "mim_refiner": (mim_refiner, REFINER), "can": (can, CAN),
                      "cmae": (cmae, CMAE_TINY), "vicmae": (vicmae, VICMAE)}[program]  # fmt: skip
    real = common.Run.optimize

    def optimize(self, *args, **kwargs):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with mock.patch.object(common.Run, "optimize", optimize), pytest.raises(SystemExit) as end:
        main(*flags, "--data", folders / "flat", "--out", tmp_path / "run", program=program)
    assert end.value.code == 0
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == len(log_of(tmp_path / "run")) == 3


def runaway(tmp_path, bad):
    """Trains a tiny module for as many steps as `bad` has, with a loss of nan where it is true; yields its weight."""
    module, images = nn.Linear(4, 1), Images(torch.zeros(8).long(), [], pixels=pictures(8, 8, 8))
    optimizer = common.adamw(common.parameter_groups(module, 0.1, 0.0))
    run = common.Run(common.RunSettings(out=str(tmp_path / "run"), precision="float32", workers=0), CPU)
    state = dict(module=module, optimizer=optimizer)
    for _ in run.steps("stage", images, [View(8)], 8, len(bad), state):
        loss = module(torch.ones(1, 4)).square().sum() * (math.nan if bad[run.step] else 1)
        loss.backward()
        taken = run.optimize(optimizer, loss.detach())
        yield taken, module.weight.detach().clone()


def test_a_step_that_is_not_finite_is_skipped(tmp_path, capsys):
    taken, weights = zip(*runaway(tmp_path, [False, True, False]))
    assert taken == (True, False, True)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert "step 1 (stage) skipped" in capsys.readouterr().out
    assert [e["step"] for e in log_of(tmp_path / "run")] == [0, 1, 2]


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    bad, steps = [True] * 9 + [False] + [True] * 9 + [False] + [True] * 20, 0
    with pytest.raises(InputError, match="10 steps in a row were not finite: .* lower learning rate"):
        for _ in runaway(tmp_path, bad):
            steps += 1
    assert steps == 9 + 1 + 9 + 1 + 9


def test_gradients_are_clipped_as_torch_does(tmp_path):
    norms = []
    for clip in (0.0, 0.5):
        module, images = nn.Linear(4, 1), Images(torch.zeros(8).long(), [], pixels=pictures(8, 8, 8))
        optimizer = torch.optim.SGD([dict(params=module.parameters(), peak_lr=1.0)])
        settings = common.RunSettings(out=str(tmp_path / f"{clip}"), precision="float32", workers=0, clip_grad=clip)
        run, old = common.Run(settings, CPU), copy.deepcopy(module)
        for _ in run.steps("stage", images, [View(8)], 8, 1, dict(module=module, optimizer=optimizer)):
            loss = (100 * module(torch.ones(1, 4))).sum()
            loss.backward()
            run.optimize(optimizer, loss.detach())
        step = torch.cat([(p - q).flatten() for p, q in zip(module.parameters(), old.parameters())])
        norms.append((step.norm().item(), log_of(run.folder)[0]["grad_norm"]))
    full = 100 * math.sqrt(5)
    assert norms[0] == pytest.approx((full, full), rel=1e-4) and norms[1] == pytest.approx((0.5, full), rel=1e-4)


def test_runs_without_a_name_get_fresh_numbered_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [common.Run(common.RunSettings(), CPU).folder for _ in range(3)]
    assert [str(f) for f in folders] == ["runs/001", "runs/002", "runs/003"]
    assert json.loads((folders[0] / "config.json").read_text())["seed"] == 0


def test_settings_are_flags_of_their_names_and_given_ones_win():
    parse = lambda *argv: common.parse_settings(mae_ct.Settings, mae_ct.presets, list(argv), "x")
    s = parse("--data", "folder", "--model", "vit_h14", "--epochs", "7", "--no-nn_lookup", "--aug")
    assert (s.model, s.epochs, s.nn_lookup, s.aug) == ("vit_h14", 7, False, True)
    assert s.temperature == 0.35 and s.frozen == 16  # the model's column of Table 10


@pytest.mark.parametrize("program", [mae_ct, mim_refiner, can, cmae, vicmae])
def test_help_explains_what_the_command_line_would_run(program, capsys):
    title = " ".join(program.__doc__.split("\n\n")[0].split())
    with pytest.raises(SystemExit) as ended:
        program.main("--data folder --model vit_b16 --seed 12345 --help".split())
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and title in text.replace("- ", "-")
    assert "[12345]" in text and "[folder]" in text and "[224] pixels" in text
    assert "[0] samples of one process at a time; 0: all" in text  # the comment of --micro_batch
    if program is mae_ct:
        assert "[0.15]" in text  # ViT-B's temperature in Table 10, where the dataclass has L's


def test_resume_takes_the_runs_settings_and_refuses_others(folders, unbroken):
    parse = lambda *argv: common.parse_settings(mae_ct.Settings, mae_ct.presets, list(argv), "x")
    s = parse("--out", str(unbroken), "--resume", "--workers", "3")
    assert s.resume and s.workers == 3 and s.queue == 32 and s.data == str(folders / "flat")
    with pytest.raises(InputError, match="--queue 64 contradicts"):
        parse("--out", str(unbroken), "--resume", "--queue", "64")


def test_precision_is_named_or_found():
    assert (
        common.precision_of("float32", CPU) == torch.float32 and common.precision_of("bfloat16", CPU) == torch.bfloat16
    )
    assert common.precision_of("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(InputError, match="--precision fp16"):
        common.precision_of("fp16", CPU)


# --------------------------------------------------------------------------------------------------- MAE pre-training


def test_pretraining_takes_the_steps_of_a_plain_loop(tmp_path):
    s, images = tiny_settings(out=str(tmp_path / "run")), tiny_images()
    encoder, decoder, _ = tiny_models(s, torch.float64)
    modules = copy.deepcopy(nn.ModuleList([encoder, decoder]))
    with views_in(torch.float64):
        common.pretrain_mae(common.Run(s, CPU), encoder, decoder, images, epochs=2, batch=8, lr=1e-2, warmup_epochs=1)

    decay = [p for n, p in modules.named_parameters() if p.ndim > 1 and "token" not in n and p.requires_grad]
    rest = [p for n, p in modules.named_parameters() if (p.ndim == 1 or "token" in n) and p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.05), dict(params=rest, weight_decay=0.0)],
                                  betas=(0.9, 0.95))  # fmt: skip
    for step, data in enumerate(common.batches(images, [View(16)], 8, 0, 4, s.seed, CPU, 0, {})):
        x, (f, d) = common.augment(data.views[0]).double(), modules
        ids, restore, mask = common.random_masking(
            uniform((s.seed, "mae", step, "mask"), torch.arange(8), 1, 16)[:, 0], 0.75
        )
        target = F.unfold(x, 4, stride=4).transpose(1, 2).unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (((d(f(x, ids), restore) - target) ** 2).mean(-1) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:  # 2 steps of warm-up, 2 of cosine; lr x batch / 256
            group["lr"] = 1e-2 * 8 / 256 * (0.5, 1.0, 1.0, 0.5)[step]
        optimizer.step()
    for (name, a), b in zip(nn.ModuleList([encoder, decoder]).named_parameters(), modules.parameters()):
        assert error(a, b) < 1e-9, name


def test_reconstruction_shows_visible_patches_and_predictions():
    s = tiny_settings()
    encoder, decoder, _ = tiny_models(s, torch.float64)
    x, noise = normal(2, 3, 16, 16), uniform((0,), torch.arange(2), 16)
    masked, restored = common.reconstruct(encoder, decoder, x, noise)
    ids, restore, mask = common.random_masking(noise, 0.75)
    pred = decoder(encoder(x, ids), restore)
    for n, l in itertools.product(range(2), range(16)):
        row, column = divmod(l, 4)
        cut = lambda t: t[n, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        if mask[n, l]:
            patch = pred[n, l].view(4, 4, 3).permute(2, 0, 1) * (cut(x).var() + 1e-6).sqrt() + cut(x).mean()
            assert not cut(masked).any() and error(cut(restored), patch) < 1e-10
        else:
            assert torch.equal(cut(masked), cut(x)) and error(cut(restored), cut(x)) < 1e-12


# ------------------------------------------------------------------------------------------------- weights in and out


def nano(**changes):
    """An encoder of a width that files of others may have (`nano`: 128 wide, 4 heads)."""
    return vit(**(dict(dim=128, heads=4, depth=2) | changes)).float()


def test_a_file_written_here_loads_into_timms_vit_base(tmp_path):
    with torch.no_grad():
        encoder = common.build_vit("vit_b16", 224)
    common.save_encoder(tmp_path / "encoder.pt", encoder)
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    with torch.device("meta"):
        reference = timm.create_model("vit_base_patch16_224")
    fit = reference.load_state_dict(content["model"], strict=False, assign=True)
    assert fit.missing_keys == ["head.weight", "head.bias"] and not fit.unexpected_keys
    x = normal(1, 3, 224, 224).float()
    assert error(encoder(x), reference.eval().forward_features(x)) < 1e-4


def test_a_post_norm_encoder_does_not_pass_for_a_pre_norm_one(tmp_path):
    common.save_encoder(tmp_path / "encoder.pt", vit(post_norm=True))
    state = torch.load(tmp_path / "encoder.pt")["model"]
    fit = timm_vit(vit().state_dict()).load_state_dict(state, strict=False)
    assert {k for k in fit.missing_keys if k.startswith("blocks.")} >= {
        "blocks.0.attn.qkv.weight",
        "blocks.2.norm2.bias",
    }
    assert "post_blocks.0.attn.qkv.weight" in fit.unexpected_keys
    with pytest.raises(InputError, match="its blocks are post-norm, those of the model pre-norm"):
        common.init_encoder(vit(), tmp_path / "encoder.pt")


def test_an_encoder_file_says_what_a_reader_needs(tmp_path):
    common.save_encoder(tmp_path / "encoder.pt", nano(pool="mean"), more=3)
    content = torch.load(tmp_path / "encoder.pt")
    assert content["more"] == 3 and content["encoder"] == dict(
        image_size=32, patch_size=8, dim=128, depth=2, heads=4, post_norm=False, pool="mean", final_norm=True,
        stem="patch",
    )  # fmt: skip
    x = normal(1, 3, 32, 32).float()
    for encoder in (nano(pool="mean"), nano(post_norm=True), nano(dim=24, heads=3)):
        common.save_encoder(tmp_path / "encoder.pt", encoder)
        again = common.load_encoder(tmp_path / "encoder.pt")
        assert torch.equal(again(x), encoder(x)) and again.pool == encoder.pool


def public_files(encoder):
    """The same weights as others write them: name → content."""
    state = encoder.state_dict()
    decoder = common.MAEDecoder((4, 4), 8, 128, 32, 1, 2).state_dict()
    bare = state | dict(pos_embed=state["pos_embed"][:, 1:])
    return {
        "MAE": dict(model=state),
        "MAE with decoder": dict(model=state | decoder, args=argparse.Namespace(lr=1e-3, output_dir="x"), epoch=800),
        "timm": state | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)},
        "MAE-CT": dict(state_dict=bare, ctor_kwargs=dict(patch_size=8)),
    }


@pytest.mark.parametrize("name", public_files(nano()))
def test_public_files_load(tmp_path, name):
    encoder, x = nano(), normal(1, 3, 32, 32).float()
    encoder.pos_embed.data[:, 0] = 0  # as in all of them
    torch.save(public_files(encoder)[name], tmp_path / "public.pth")
    assert error(common.load_encoder(tmp_path / "public.pth")(x), encoder(x)) < 1e-6


@pytest.mark.parametrize("prefix", ["", "model."])
def test_data2vec_files_load(tmp_path, prefix):
    encoder, x, image = nano(post_norm=True), normal(1, 3, 32, 32).float(), "modality_encoders.IMAGE."
    encoder.pos_embed.data[:, 0] = 0
    names = {"patch_embed.": image + "local_encoder.", "cls_token": image + "extra_tokens", "post_blocks.": "blocks."}
    names |= {"embed_norm.": image + "context_encoder.norm.", "pos_embed": image + "fixed_positional_encoder.positions"}
    state = {}
    for key, value in encoder.state_dict().items():
        old = next(n for n in names if key.startswith(n))
        state[prefix + names[old] + key.removeprefix(old)] = value[:, 1:] if key == "pos_embed" else value
    state[prefix + image + "decoder.blocks.0.0.weight"] = torch.zeros(3)
    state[prefix + "_ema"] = {"0.attn.qkv.weight": torch.zeros(3)}  # fairseq keeps the teacher as a dict in the dict
    torch.save(dict(model=state), tmp_path / "data2vec.pt")
    assert error(common.load_encoder(tmp_path / "data2vec.pt")(x), encoder(x)) < 1e-6


def test_positions_are_interpolated_to_another_image_size(tmp_path):
    encoder, x = nano(), normal(1, 3, 48, 48).float()
    common.save_encoder(tmp_path / "encoder.pt", encoder)
    assert error(common.load_encoder(tmp_path / "encoder.pt", image_size=48)(x), encoder(x)) < 1e-5


def test_weights_that_do_not_fit_are_named_with_their_shapes(tmp_path):
    common.save_encoder(tmp_path / "encoder.pt", nano())
    with pytest.raises(
        InputError, match=r"encoder.pt does not fit.*blocks.0.attn.proj.bias is \(128,\), expected \(32,\)"
    ):
        common.init_encoder(vit(depth=2), tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="blocks.2.attn.proj.bias is missing"):
        common.init_encoder(nano(depth=3), tmp_path / "encoder.pt")


def test_a_file_with_objects_is_refused_and_the_advice_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=nano().state_dict(), cfg=Fraction(1, 2)), "fairseq.pt")
    with pytest.raises(InputError, match="fairseq.pt holds more than tensors") as refused:
        common.load_encoder("fairseq.pt")
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 3 and any("torch.save" in line for line in lines)
    exec("\n".join(lines))
    common.load_encoder("stripped.pt")


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "no such file"),
        (b"", "not a readable torch file"),
        (b"hello", "not a readable torch file"),
        (b"<!DOCTYPE html><html>404 Not Found</html>", "not a readable torch file"),
        (b"PK\x03\x04 cut off", "not a readable torch file"),
        ([1, 2], "is no encoder file"),
        (dict(model=dict(a=1)), "is no encoder file"),
        (dict(fc=torch.zeros(3)), "is no ViT encoder"),
        ({"patch_embed.proj.weight": torch.zeros(100, 3, 8, 8), "pos_embed": torch.zeros(1, 17, 100)}, "width 100"),
    ],
)
def test_files_that_are_no_encoder_are_refused(tmp_path, content, fault):
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(InputError, match=fault) as refused:
        common.load_encoder(file)
    assert "file.pt" in str(refused.value)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    common.save_file(tmp_path / "x.pt", 1)
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        common.save_file(tmp_path / "x.pt", 2)
    assert torch.load(tmp_path / "x.pt") == 1


# ----------------------------------------------------------------------------------------------------------- pictures


def test_a_drawn_picture_holds_the_images_and_their_frames(tmp_path):
    x = pictures(3, 16, 16)
    common.draw(tmp_path / "p.png", [("row", x, ["red", None, "black"]), ("another", x[:1], None)], side=16)
    canvas = np.array(Image.open(tmp_path / "p.png"))
    found = 0
    for top, left in itertools.product(range(canvas.shape[0] - 15), range(canvas.shape[1] - 15)):
        window = canvas[top : top + 16, left : left + 16]
        found += any(np.array_equal(window, i.permute(1, 2, 0).numpy()) for i in x)
    assert found == 4
    red = (canvas == [255, 0, 0]).all(-1).sum()
    assert red >= 4 * 16  # a frame around 16 x 16


def test_drawn_curves_stand_where_their_values_are(tmp_path):
    curves = {"a": ([1, 2, 3], [10, 30, 20]), "b": ([1, 3], [10.0, 30.0])}
    common.draw_curves(tmp_path / "c.png", curves, "x", "y", width=400, height=300)
    canvas = np.array(Image.open(tmp_path / "c.png"))
    assert canvas.shape == (300, 400, 3)
    left, right, top, bottom = 48, 400 - 16, 16, 300 - 40
    blue, orange = ((canvas == c).all(-1) for c in ([70, 130, 180], [255, 140, 0]))  # steelblue, darkorange
    assert blue[top, (left + right) // 2] and blue[(top + bottom) // 2, right] and orange[top, right]
    assert orange[(top + bottom) // 2, (left + right) // 2] and orange[bottom, left]  # b is drawn last


# ------------------------------------------------------------------------------------------------------------- MAE-CT


def test_settings_are_those_of_tables_9_and_10():
    columns = "vit_b16 vit_l16 vit_h16 vit_h14".split()
    every = dict(layer_decay=0.65, lr=1e-4, weight_decay=0.05, ema=0.9999, head_weight_decay=1e-5, warmup=0.2)
    table_9 = dict(
        epochs=[20, 20, 30, 30],
        batch=[1024, 1024, 512, 512],
        frozen=[6, 12, 16, 16],
        ct_head_lr=[1e-4] * 4,
        temperature=[0.15, 0.2, 0.3, 0.3],
        k=[20, 20, 20, 20],
        projector_ema=[0.99, 0.99, 0.995, 0.995],
    )
    table_10 = dict(
        epochs=[80, 40, 40, 40],
        batch=[1024, 1024, 512, 512],
        frozen=[6, 12, 16, 16],
        ct_head_lr=[5e-4] * 4,
        temperature=[0.15, 0.15, 0.35, 0.35],
        k=[10, 10, 30, 30],
        projector_ema=[0.99, 0.99, 0.995, 0.995],
    )
    text = dict(queue=65536, head_epochs=20, head_lr=1e-4, head_temperature=0.15, head_dim=256)  # Algorithm 1, A.2
    text |= dict(
        projector_hidden=2048, predictor_hidden=4096, mae_epochs=1600, mae_lr=1.5e-4, mask_ratio=0.75, image_size=224
    )
    for flags, table in (([], table_9), (["--aug"], table_10)):
        for i, model in enumerate(columns):
            argv = ["--data", "imagenet", "--model", model, *flags]
            s = common.parse_settings(mae_ct.Settings, mae_ct.presets, argv, "x")
            expected = every | text | {name: row[i] for name, row in table.items()}
            expected |= dict(pool="mean" if model == "vit_b16" else "cls")  # A.2
            assert {name: getattr(s, name) for name in expected} == expected


def test_variants_have_their_settings():
    parse = lambda *argv: common.parse_settings(mae_ct.Settings, mae_ct.presets, ["--data", "imagenet", *argv], "x")
    s = parse("--mae_views", "2")
    assert (s.mae_epochs, s.mae_batch, s.mae_warmup_epochs) == (800, 1024, 20)  # A.1
    assert parse("--mae_views", "2", "--model", "vit_h16").mae_batch == 512
    assert parse("--oracle").epochs == 30  # B.2
    assert parse("--stages", "combined,ct").mae_views == 2  # 4.5
    assert parse("--model", "vit_l14").frozen == 12 and parse("--model", "vit_s16").frozen == 6  # the lower half


@pytest.mark.parametrize("stage, frozen, k, projector_ema", [("ct", 1, 3, 0.7), ("head", 3, 1, 0.0)])
def test_the_loop_is_algorithm_1(tmp_path, stage, frozen, k, projector_ema):
    s, images = tiny_settings(out=str(tmp_path / "run"), layer_decay=1.0), tiny_images(8)  # an epoch is one step
    encoder, _, head = tiny_models(s, torch.float64)
    f, g, h, Q, own = (
        copy.deepcopy(encoder),
        torch_head(head.g),
        torch_head(head.h),
        head.Q.embeddings.clone(),
        [-1] * 32,
    )
    with views_in(torch.float64):
        kwargs = dict(epochs=4, lr=1e-2, head_lr=2e-2, frozen=frozen, temperature=0.2, k=k, projector_ema=projector_ema)
        found_f_m = mae_ct.contrastive(common.Run(s, CPU), stage, encoder, head, images, **kwargs)

    trained = (
        [p for name, p in f.named_parameters() if name.startswith(("blocks.1", "blocks.2", "norm"))]
        if frozen < 3
        else []
    )
    heads = [*g.parameters(), *h.parameters()]
    f_m, g_m = copy.deepcopy(f), copy.deepcopy(g)
    groups = [dict(params=[p for p in trained if p.ndim > 1], lr=1e-2, weight_decay=0.05),
              dict(params=[p for p in trained if p.ndim == 1], lr=1e-2, weight_decay=0.0),
              dict(params=[p for p in heads if p.ndim > 1], lr=2e-2, weight_decay=1e-5),
              dict(params=[p for p in heads if p.ndim == 1], lr=2e-2, weight_decay=0.0)]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
    peaks = [group["lr"] * 8 * 2 / 256 for group in optimizer.param_groups]  # lr x batch x views / 256

    def topk_NN(z, Q, dice, index):
        similarities = z @ Q.T
        for n, i in enumerate(index):
            for place, o in enumerate(own):
                if o == i:
                    similarities[n, place] = -1  # the sample's own embedding of the last epoch
        candidates = similarities.topk(k, dim=1).indices
        return Q[candidates[torch.arange(len(z)), dice]]

    def L(nn, p):
        return F.cross_entropy(nn @ p.T / 0.2, torch.arange(len(p)))

    for step, data in enumerate(common.batches(images, [View(16, (0.08, 1.0))] * 2, 8, 0, 4, s.seed, CPU, 0, {})):
        x1, x2 = (common.augment(x).double() for x in data.views)
        dice = (uniform((s.seed, stage, step, "dice"), torch.arange(8), 2) * k).long()
        y1, y2 = f(x1)[:, 1:].mean(1), f(x2)[:, 1:].mean(1)
        p1, p2 = F.normalize(h(g(y1)), dim=1), F.normalize(h(g(y2)), dim=1)
        with torch.no_grad():
            z1, z2 = F.normalize(g_m(y1), dim=1), F.normalize(g_m(y2), dim=1)
        nn1, nn2 = topk_NN(z1, Q, dice[:, 0], data.index.tolist()), topk_NN(z2, Q, dice[:, 1], data.index.tolist())
        loss = L(nn1, p2) / 2 + L(nn2, p1) / 2
        optimizer.zero_grad()
        loss.backward()
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.step()
        Q, own = torch.cat([Q[8:], z1]), own[8:] + data.index.tolist()
        for average, source, t in ((f_m, f, 0.9), (g_m, g, projector_ema)):
            for a, b in zip(average.parameters(), source.parameters()):
                a.data = t * a.data + (1 - t) * b.data
        for a, b in zip(g_m.buffers(), g.buffers()):
            a.copy_(b)

    assert error(head.Q.embeddings.roll(-32, 0), Q) < 1e-9 and head.Q.indices.tolist() == own
    pairs = dict(f=(encoder, f), f_m=(found_f_m, f_m), g=(head.g, g), h=(head.h, h), g_m=(head.g_m, g_m))
    for name, (ours, reference) in pairs.items():
        assert all_equal(list(ours.parameters()), list(reference.parameters()), 1e-8), name
    assert error(head.g_m[1].running_var, g_m[1].running_var) < 1e-9


def test_one_view_in_mae_and_two_in_contrastive_stages_scale_the_lr(tmp_path):
    for stage, peaks in (("mae", [1e-3 * 8 / 256]), ("head", [1e-3 * 8 * 2 / 256])):
        s = tiny_settings(out=str(tmp_path / stage))
        encoder, decoder, head = tiny_models(s, torch.float32)
        run = Recorder(s, CPU)
        if stage == "mae":
            common.pretrain_mae(
                run, encoder, decoder, tiny_images(), epochs=1, batch=8, lr=1e-3, warmup_epochs=0, views=2
            )
        else:
            mae_ct.contrastive(run, stage, encoder, head, tiny_images(), epochs=1, lr=0.0, head_lr=1e-3, frozen=3,
                               temperature=0.2, k=1, projector_ema=0.0)  # fmt: skip
        assert run.peaks == [pytest.approx(peaks)] * 2


def nnclr_case():
    torch.manual_seed(0)
    head = mae_ct.NNCLRHead(16, tiny_settings()).double()
    head.Q.push(common.normalize(normal(32, 8, seed=9)), torch.arange(32), torch.arange(32) % 4)
    y1, y2 = normal(8, 16, seed=1), normal(8, 16, seed=2)
    return head, (y1, y2, torch.arange(8), torch.arange(8) % 4, uniform((0,), torch.arange(8), 2))


def test_without_nn_lookup_the_samples_own_projection_is_the_positive():
    head, (y1, y2, *rest) = nnclr_case()
    found, aux = head.loss(y1, y2, *rest, 0.2, 3, nn_lookup=False)
    g, h = torch_head(head.g), torch_head(head.h)
    (p1, z1), (p2, z2) = ((F.normalize(h(g(y)), dim=1), F.normalize(g(y), dim=1)) for y in (y1, y2))
    target = torch.arange(8)
    expected = F.cross_entropy(z1 @ p2.T / 0.2, target) / 2 + F.cross_entropy(z2 @ p1.T / 0.2, target) / 2
    assert error(found, expected) < 1e-10 and error(aux["z1"], z1) < 1e-10


def test_oracle_neighbours_are_all_of_the_samples_class():
    head, inputs = nnclr_case()
    assert head.loss(*inputs, 0.2, 3, oracle=True)[1]["nn_accuracy"] == 1
    assert head.loss(*inputs, 0.2, 3, oracle=False)[1]["nn_accuracy"] < 1


def test_a_detached_head_sends_no_gradient_to_the_encoder(tmp_path):
    def gradients(folder, micro_batch=0, **changes):
        found = step_outcome("combined", micro_batch, tmp_path / folder, **changes)["gradients"][0]
        return found[: len([p for p in tiny_models(tiny_settings(), torch.float64)[0].parameters() if p.requires_grad])]

    alone, detached = gradients("a", combined_weight=0.0), gradients("b", combined_weight=5.0, detach=True)
    attached = gradients("c", combined_weight=5.0)
    in_pieces = gradients("d", 2, combined_weight=5.0, detach=True)
    assert all_equal(detached, alone, 1e-10) and all_equal(in_pieces, alone, 1e-10)
    assert not all_equal(attached, alone, 1e-3)


def test_a_whole_run_leaves_its_files_and_eval_repeats_its_table(folders, tmp_path):
    out, data = tmp_path / "run", folders / "labelled"
    printed = main(*TINY, "--data", data, "--out", out)
    names = (
        "config.json log.jsonl last.pt previous.pt mae.pt head.pt encoder.pt results.json reconstruction.png".split()
        + ["retrieval.png"]
    )
    assert {f.name for f in out.iterdir()} == set(names)
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"mae", "mae_ct"} and results["mae"].keys() >= {"knn", "probe", "cluster_acc"}
    assert "mae_ct" in printed and str(out) in printed
    for stage, file in (("mae", "mae.pt"), ("mae_ct", "encoder.pt")):
        for protocol, flags in (("knn", []), ("probe", ["--cached"]), ("cluster", [])):
            with mock.patch("torch.cuda.is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
                argv = [
                    protocol,
                    "--encoder",
                    out / file,
                    "--data",
                    data,
                    "--precision",
                    "float32",
                    "--workers",
                    0,
                    *flags,
                ]
                protocols.main([str(a) for a in argv])
            written = json.loads(protocols.beside(out / file, f"{protocol}.json").read_text())
            for name in results[stage].keys() & written.keys():
                assert written[name] == pytest.approx(results[stage][name], abs=1e-3), (stage, name)

    val, encoder = common.load_images(str(data), "val"), common.load_encoder(out / "encoder.pt")
    classifier = protocols.load_classifier(out / "probe.pt", encoder)
    logits, y = protocols.outputs(classifier, val, 16, protocols.Machine(CPU))
    assert 100 * (logits.argmax(1) == y).float().mean().item() == pytest.approx(written_probe(out), abs=1e-3)
    x, state = protocols.features(encoder, val, protocols.Machine(CPU))[0], torch.load(out / "probe.pt")["classifier"]["state"]
    by_hand = (x - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt() @ state["head.weight"].T
    assert error(logits, by_hand + state["head.bias"]) < 1e-4


def written_probe(out):
    return json.loads((out / "probe.json").read_text())["probe"]


@slow
def test_torchrun_of_the_program_is_the_program(folders, tmp_path):
    flags = [*TINY, "--data", folders / "labelled"]
    main(*flags, "--out", tmp_path / "one")
    done = torchrun(HERE / "mae_ct.py", *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    same_up_to_rounding(tmp_path / "two", tmp_path / "one")


@slow
def test_two_nodes_of_one_process_are_one_of_two(folders, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        end = f"localhost:{free.getsockname()[1]}"
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", end]
    printed = {}
    for name, flags in {"one": ["--standalone", "--nproc_per_node", "2"], "two": nodes}.items():
        command = [sys.executable, "-m", "torch.distributed.run", *flags, HERE / "mae_ct.py", *TINY]
        command += ["--stages", "mae,head", "--data", folders / "flat", "--out", tmp_path / name]
        command = [str(c) for c in command]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet_environment())
        agents = [subprocess.Popen(command, **pipes) for _ in range(1 if name == "one" else 2)]
        printed[name] = [agent.communicate(timeout=300) for agent in agents]
        assert all(agent.returncode == 0 for agent in agents), printed[name]
    same_weights(tmp_path / "two", tmp_path / "one", ("mae.pt", "head.pt"))
    assert [e["loss"] for e in log_of(tmp_path / "two")] == [e["loss"] for e in log_of(tmp_path / "one")]
    assert sorted("run folder" in out for out, _ in printed["two"]) == [False, True]  # rank 0 alone speaks


@slow
def test_the_short_built_in_run_learns(tmp_path):
    main("--short", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["mae_ct"]["knn"] > results["mae"]["knn"] > 15  # chance is 10


# -------------------------------------------------------------------------------------------------------- MIM-Refiner


def test_settings_are_those_of_table_10():
    parse = lambda *argv: common.parse_settings(mim_refiner.Settings, mim_refiner.presets, ["--data", "imagenet", *argv], "x")
    columns = {
        ("vit_l16",): (30, 1024, 0.2, 8, 0, 96),
        ("vit_h16",): (30, 512, 0.3, 12, 0, 96),
        ("vit_h14",): (30, 512, 0.3, 12, 0, 98),
        ("vit_2b14",): (20, 512, 0.35, 8, 6, 98),
        ("vit_l16", "--mim", "data2vec2"): (20, 1024, 0.2, 8, 0, 96),
        ("vit_h14", "--mim", "data2vec2"): (20, 512, 0.3, 12, 0, 98),
        ("vit_h14", "--mim", "data2vec2", "--no_color"): (10, 512, 0.3, 12, 0, 98),  # A.2
    }
    names = "epochs batch temperature heads frozen local_size".split()
    every = dict(warmup_epochs=4, lr=4e-4, layer_decay=0.65, weight_decay=0.05, ema=0.9999, head_weight_decay=1e-5, k=20,
                 global_scale_min=0.25, local_scale_min=0.05, local_views=10, image_size=224, head_epochs=20, head_lr=2e-4,
                 queue=65536, projector_hidden=2048, predictor_hidden=4096, head_dim=256)  # fmt: skip
    for argv, row in columns.items():
        s = parse("--model", *argv)
        expected = every | dict(zip(names, row))
        assert {name: getattr(s, name) for name in expected} == expected


def nna_loop(p, z, nn_z, temperature, swap_negatives=False, authors_loss=False):
    """Eq. 1 for one head, anchor by anchor: p [N, V, d], z and nn_z [N, 2, d]; also the number of pairs of views."""
    total, pairs, count = 0, 0, len(p)
    others = nn_z if swap_negatives else z
    for i in (0, 1):
        for j in range(p.shape[1]):
            if i == j:
                continue
            pairs += 1
            for n in range(count):
                positive = torch.exp(nn_z[n, i] @ p[n, j] / temperature)
                if authors_loss:
                    negatives = [torch.exp(others[n, i] @ p[m, j] / temperature) for m in range(count) if m != n]
                else:
                    negatives = [torch.exp(others[m, i] @ p[n, j] / temperature) for m in range(count) if m != n]
                total = total - torch.log(positive / (positive + sum(negatives)))
    return total / (count * pairs), pairs


@pytest.mark.parametrize("variant", [{}, {"swap_negatives": True}, {"authors_loss": True}])
def test_nearest_neighbor_alignment_is_the_formula_over_22_pairs(variant):
    p = common.normalize(normal(2, 5, 12, 6)).requires_grad_()
    z, nn_z = (common.normalize(normal(2, 5, 2, 6, seed=i)) for i in (1, 2))
    losses = mim_refiner.nearest_neighbor_alignment(p, z, nn_z, 0.2, **variant)
    loops = [nna_loop(p[h], z[h], nn_z[h], 0.2, **variant) for h in (0, 1)]
    assert [pairs for _, pairs in loops] == [22, 22]
    assert error(losses, torch.stack([loss for loss, _ in loops])) < 1e-12
    (ours,) = torch.autograd.grad(losses.sum(), p)
    (expected,) = torch.autograd.grad(sum(loss for loss, _ in loops), p)
    assert error(ours, expected) < 1e-10


def separate_heads(heads):
    """Each head as (projector, predictor) of torch's own modules."""

    def torch_mlp(layers, h):
        modules = []
        for layer in layers:
            if isinstance(layer, mim_refiner.HeadLinear):
                _, o, i = layer.weight.shape
                modules.append(nn.Linear(i, o, bias=layer.bias is not None))
            else:
                modules.append(nn.GELU() if isinstance(layer, nn.GELU) else nn.BatchNorm1d(layer.weight.shape[1]))
        reference = nn.Sequential(*modules).double()
        state = {name: v[h] for name, v in layers.state_dict().items()}
        assert not reference.load_state_dict(state, strict=False).unexpected_keys
        return reference

    count = len(heads.Q.embeddings)
    return [(torch_mlp(heads.projector, h), torch_mlp(heads.predictor, h)) for h in range(count)]


def torch_head_loss(projector, predictor, queue, own, y, index, dice, temperature, k):
    """One head's loss by torch's modules and loops; y [N, V, D]. Returns it and z of view 0."""
    n, views = y.shape[:2]
    projected = projector(y.flatten(0, 1))  # all views in one BatchNorm batch
    p = F.normalize(predictor(projected), dim=1).unflatten(0, (n, views))
    z = F.normalize(projected.detach(), dim=1).unflatten(0, (n, views))[:, :2]
    nn_z = torch.zeros_like(z)
    for i in range(n):
        for v in (0, 1):
            similarity = queue @ z[i, v]
            similarity[own == index[i]] = -1
            nn_z[i, v] = queue[similarity.topk(k).indices[int(dice[i, v] * k)]]
    return nna_loop(p, z, nn_z, temperature)[0], z[:, 0]


@pytest.mark.parametrize("authors_head", [False, True])
def test_batched_heads_are_separate_ones(authors_head):
    s, _, heads = tiny_refiner(blocks=(1, 2, 3), authors_head=authors_head)
    kinds = [type(m).__name__ for m in heads.projector]
    first, second = ("BatchNorm", "GELU") if authors_head else ("GELU", "BatchNorm")
    assert kinds == ["HeadLinear", first, second] * 2 + ["HeadLinear", "BatchNorm"]
    assert [type(m).__name__ for m in heads.predictor] == ["HeadLinear", first, second, "HeadLinear", "BatchNorm"]
    y, index = normal(6, 5, 3, 16).requires_grad_(), torch.arange(6)
    heads.Q.push(common.normalize(normal(3, 20, 8, seed=1)), torch.arange(20) % 12, torch.arange(20) % 4)
    dice, references = uniform((0,), index, 2), separate_heads(heads)
    losses, aux = heads.loss(y, index, index % 4, dice, s, 4)
    losses.sum().backward()
    grads, y.grad = y.grad, None
    for h, (projector, predictor) in enumerate(references):
        loss, z = torch_head_loss(projector, predictor, heads.Q.embeddings[h], heads.Q.indices, y[:, :, h], index, dice, 0.2, 4)
        loss.backward()
        assert error(losses[h], loss) < 1e-12 and error(aux["z"][h], z) < 1e-12
        for ours, theirs in ((heads.projector, projector), (heads.predictor, predictor)):
            assert all_equal([q.grad[h] for q in ours.parameters()], [q.grad for q in theirs.parameters()], 1e-9)
    assert error(grads, y.grad) < 1e-9


def test_blocks_with_heads_are_the_last_or_those_that_are_named():
    blocks = lambda **changes: mim_refiner.blocks_of(mim_refiner.Settings(**changes), 24)
    assert blocks() == list(range(17, 25)) and blocks(heads=2) == [23, 24]
    assert blocks(head_blocks="17-24") == blocks() and blocks(head_blocks="15,18,21-24") == [15, 18, 21, 22, 23, 24]


def test_nn_accuracy_is_the_share_of_neighbours_of_the_class():
    s, _, heads = tiny_refiner()
    heads.Q.push(heads.Q.embeddings.clone(), torch.full((32,), -1), torch.arange(32) % 4)
    heads.Q.labels[:] = 2
    _, aux = heads.loss(normal(4, 3, 2, 16), torch.arange(4), torch.tensor([2, 1, 2, 2]), torch.zeros(4, 2), s, 1)
    assert aux["nn_accuracy"].tolist() == [0.75, 0.75]


def test_loss_schedules_by_number():
    at = lambda schedule, epoch: [round(w, 3) for w in mim_refiner.head_weights(schedule, epoch / 20, 8)]
    cosine = lambda since, epoch: round((1 + math.cos(math.pi * (epoch - since) / (20 - since))) / 2, 3)
    assert at("constant", 19) == [1] * 8
    assert at("uniform_decay", 4) == [1] * 8 and at("uniform_decay", 12) == [0.5] * 7 + [1]
    assert at("uniform_decay", 20) == [0] * 7 + [1]
    assert at("staggered_decay", 3.9) == [1] * 8 and at("staggered_decay", 20) == [0] * 7 + [1]
    assert at("staggered_decay", 9) == [cosine(4, 9), cosine(6, 9), cosine(8, 9), 1, 1, 1, 1, 1]
    assert at("staggered_step", 3.9) == [1] * 8 and at("staggered_step", 4.1) == [0] + [1] * 7
    assert at("staggered_step", 9) == [0, 0, 0, 1, 1, 1, 1, 1] and at("staggered_step", 16.1) == [0] * 7 + [1]
    assert at("one_hot", 3.9) == [0.1] * 7 + [1] and at("one_hot", 5) == [1] + [0.1] * 6 + [1]
    assert at("one_hot", 9) == [0, 0, 1, 0.1, 0.1, 0.1, 0.1, 1] and at("one_hot", 18.1) == [0] * 7 + [1]
    assert mim_refiner.head_weights("one_hot", 0.5, 1) == [1]
    assert mim_refiner.head_weights("uniform_decay", 0.6, 2) == pytest.approx([0.5, 1])


@pytest.mark.parametrize("flags, crops", [({}, 12), ({"local_views": 0}, 2), ({"color": False}, 12)])
def test_views_are_two_global_and_ten_local_crops_of_their_colours(tmp_path, flags, crops):
    s, encoder, heads = tiny_refiner(**dict(local_views=10, out=str(tmp_path / "run")) | flags)
    seen, real, steps = [], common.augment, common.Run.steps

    def recorded_steps(run, stage, images, views, *args):
        seen.append(views)
        return steps(run, stage, images, views, *args)

    def recorded_augment(x, colour, noise):
        seen.append((x.shape[-1], colour))
        return real(x, colour, noise)

    with mock.patch.object(common.Run, "steps", recorded_steps), mock.patch.object(mim_refiner, "augment", recorded_augment):
        mim_refiner.contrast(common.Run(s, CPU), "heads", encoder.float(), heads.float(), [2, 3], tiny_images(8), None,
                             epochs=1, lr=1e-3, frozen=3, k=1)  # fmt: skip
    views, *augmented = seen
    assert views == [View(16, (0.25, 1.0))] * 2 + [View(8, (0.05, 0.25))] * (crops - 2)
    assert [size for size, _ in augmented] == [16] * 2 + [8] * (crops - 2)
    jitter = dict(jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_gray=0.2, sigma=(0.1, 2.0))
    expected = [dict(p_blur=1.0, p_solarize=0.0), dict(p_blur=0.1, p_solarize=0.2)]
    expected += [dict(p_blur=0.5, p_solarize=0.0)] * (crops - 2)
    colours = [common.Colour(**jitter, **e) if s.color else None for e in expected]
    assert [colour for _, colour in augmented] == colours


@pytest.mark.parametrize("mim", ["mae", "data2vec2"])
def test_refinement_is_a_plain_loop_over_heads(tmp_path, mim):
    s, encoder, heads = tiny_refiner(out=str(tmp_path / "run"), mim=mim, local_views=2, schedule="uniform_decay")
    f, f_ema, references = copy.deepcopy(encoder), copy.deepcopy(encoder), separate_heads(heads)
    queues, own = list(heads.Q.embeddings.clone()), torch.full((32,), -1)
    images, real = tiny_images(8), common.augment  # an epoch is one step
    with mock.patch.object(mim_refiner, "augment", lambda *args: real(*args).double()):
        run = common.Run(s, CPU)
        ema = mim_refiner.contrast(run, "refine", encoder, heads, [1, 3], images, None, epochs=4, lr=1e-2, frozen=0, k=4)

    stack, groups = f.stack(), []
    for name, q in f.named_parameters():
        if q.requires_grad:
            block = re.search(r"blocks\.(\d+)", name)
            power = 3 - int(block[1]) if block else 0 if name.startswith("norm") else 4
            groups.append(dict(params=[q], lr=1e-2 * 0.65**power, weight_decay=0.05 if q.ndim > 1 and "cls" not in name else 0))
    for pair in references:
        for q in (q for m in pair for q in m.parameters()):
            groups.append(dict(params=[q], lr=1e-2, weight_decay=1e-5 if q.ndim > 1 else 0))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    peaks = [group["lr"] * 8 / 256 for group in groups]
    views = [View(16, (0.25, 1.0))] * 2 + [View(8, (0.05, 0.25))] * 2
    for step, data in enumerate(common.batches(images, views, 8, 0, 4, s.seed, CPU, 0, {})):
        noise = uniform((s.seed, "refine", step, "colour"), torch.arange(8), 4, 13)
        dice = uniform((s.seed, "refine", step, "dice"), torch.arange(8), 2)
        colours = [*common.BYOL, mim_refiner.LOCAL_COLOURS, mim_refiner.LOCAL_COLOURS]
        cls = []
        for v, x in enumerate(data.views):
            tokens = f.embed(real(x, colours[v], noise[:, v]).double())
            first = stack[0](tokens)
            cls.append([first[:, 0], f.norm(stack[2](stack[1](first)))[:, 0]])
        decay = 1 if step / 4 < 0.2 else (1 + math.cos(math.pi * (step / 4 - 0.2) / 0.8)) / 2
        losses, zs = [], []
        for h, pair in enumerate(references):
            y = torch.stack([c[h] for c in cls], 1)
            loss, z = torch_head_loss(*pair, queues[h], own, y, data.index, dice, 0.2, 4)
            losses.append(loss)
            zs.append(z)
        optimizer.zero_grad()
        (decay * losses[0] + losses[1]).backward()
        end = 1e-6 / (1e-2 * 8 / 256)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * (end + (1 - end) * (1 + math.cos(math.pi * step / 4)) / 2)
        optimizer.step()
        queues, own = [torch.cat([q[8:], z]) for q, z in zip(queues, zs)], torch.cat([own[8:], data.index])
        for a, b in zip(f_ema.parameters(), f.parameters()):
            a.data = 0.9 * a.data + 0.1 * b.data

    assert all_equal(list(encoder.parameters()), list(f.parameters()), 1e-7)
    assert all_equal(list(ema.parameters()), list(f_ema.parameters()), 1e-7)
    assert error(heads.Q.embeddings.roll(-32, 1), torch.stack(queues)) < 1e-7 and torch.equal(heads.Q.indices, own)


REFINER = """--model vit_nano8 --image_size 16 --decoder_dim 16 --decoder_depth 1 --decoder_heads 2 --mae_batch 8 --batch 8
    --heads 2 --queue 32 --projector_hidden 16 --predictor_hidden 16 --head_dim 8 --k 4 --ema 0.9 --mae_epochs 3
    --mae_warmup_epochs 1 --head_epochs 3 --epochs 3 --warmup_epochs 1 --local_views 2 --local_size 8 --knn_every 1
    --precision float32 --workers 0""".split()


def test_a_refinement_leaves_its_files_and_resumes_to_the_same(folders, tmp_path):
    flags = [*REFINER, "--data", folders / "labelled"]
    main(*flags, "--out", tmp_path / "whole", program=mim_refiner)
    names = "config.json log.jsonl last.pt previous.pt mae.pt encoder.pt results.json knn_per_block.png".split()
    assert {f.name for f in (tmp_path / "whole").iterdir()} == set(names)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert list(results) == ["mae", "mim_refiner"]
    for row in results.values():
        assert row.keys() >= {"knn", "probe", "cluster_acc"} and len(row["knn_per_block"]) == 6
        assert row["knn"] == row["knn_per_block"][-1]
    last = log_of(tmp_path / "whole")[-1]
    assert len(last["losses"]) == len(last["nn_accuracy"]) == len(last["knn"]) == 2
    for step in (8, 15):  # in stage heads, in stage refine
        break_at(step, *flags, "--out", tmp_path / str(step), program=mim_refiner)
        main("--out", tmp_path / str(step), "--resume", program=mim_refiner)
        same_weights(tmp_path / str(step), tmp_path / "whole", ("mae.pt", "encoder.pt"))
        assert json.loads((tmp_path / str(step) / "results.json").read_text()) == results


def test_an_encoder_that_is_given_is_refined_without_pre_training(folders, tmp_path):
    torch.manual_seed(0)
    common.save_encoder(tmp_path / "post.pt", common.build_vit("vit_nano8", 16, post_norm=True))
    flags = [*REFINER, "--data", folders / "flat", "--init", tmp_path / "post.pt", "--mim", "data2vec2"]
    main(*flags, "--out", tmp_path / "run", program=mim_refiner)
    assert {e["stage"] for e in log_of(tmp_path / "run")} == {"heads", "refine"}
    assert torch.load(tmp_path / "run" / "encoder.pt")["encoder"]["final_norm"] is False


def test_knn_per_block_is_a_vote_on_each_blocks_standardised_cls_token():
    encoder = vit().float()
    train, val = (Images(torch.arange(n) % 3, list("abc"), pixels=pictures(n, 32, 32, seed=n)) for n in (24, 18))
    run = argparse.Namespace(device=CPU, precision=torch.float32, workers=0)
    found = protocols.knn_per_block(encoder, train, val, run)
    x, test = encoder.embed(common.augment(train.pixels)), encoder.embed(common.augment(val.pixels))
    for block, accuracy in zip(encoder.blocks, found, strict=True):
        x, test = block(x), block(test)
        mean, std = x[:, 0].mean(0), x[:, 0].std(0) + 1e-6
        similarity = F.normalize((test[:, 0] - mean) / std, dim=1) @ F.normalize((x[:, 0] - mean) / std, dim=1).T
        right = 0
        for s, label in zip(similarity, val.labels):
            votes = collections.Counter()
            for i in s.argsort(descending=True)[:10].tolist():
                votes[train.labels[i].item()] += math.exp(s[i].item() / 0.07)
            right += max(votes, key=votes.get) == label
        assert accuracy == pytest.approx(100 * right / 18)
    assert protocols.knn_per_block(encoder, train, val, run, blocks=[3, 1]) == [found[2], found[0]]
    seen, real = [], protocols.features
    record = lambda *args, **more: seen.append((args, more)) or real(*args, **more)
    with mock.patch.object(protocols, "features", record):
        protocols.knn_per_block(encoder, train, val, run, bank=12)
    (_, kept), (whole, _) = seen
    drawn = kept["index"]
    assert len(set(drawn.tolist())) == 12 and len(train.labels[drawn].unique()) == 3 and whole[1] is val


# ------------------------------------------------------------------------------------------------------------ ViC-MAE


def test_settings_are_those_of_table_7():
    s = common.parse_settings(vicmae.Settings, vicmae.presets, ["--data", "kinetics"], "x")
    table_7 = dict(lr=1.5e-4, weight_decay=0.05, batch=4096, warmup_epochs=40, epochs=800, crop_min=0.5, flip=True,
                   contrast_weight=0.025, contrast_from=200)  # fmt: skip
    table_7 |= dict(model="vit_b16", image_size=224, methods="vicmae", gap=-1, pooling="mean", color=False, mask_ratio=0.75)
    assert {name: getattr(s, name) for name in table_7} == table_7


def test_simsiam_is_equation_2_and_stops_the_gradient():
    p_i, z_i, p_j, z_j = (common.normalize(normal(4, 6, seed=i)).requires_grad_() for i in range(4))
    loss = vicmae.simsiam(p_i, z_i, p_j, z_j)
    expected = [(p_i[n] - z_j[n]).square().sum() + (p_j[n] - z_i[n]).square().sum() for n in range(4)]
    assert error(loss, sum(expected) / 8) < 1e-12
    loss.backward()
    assert p_i.grad.abs().max() > 0 and p_j.grad.abs().max() > 0 and z_i.grad is None and z_j.grad is None


def test_vicreg_is_equations_3_to_5():
    p, z = (common.normalize(normal(5, 3, seed=i)) for i in (0, 1))

    def v(x):
        columns = [[row[d].item() for row in x] for d in range(3)]
        return sum(max(0, 1 - math.sqrt(statistics.variance(c) + 1e-4)) for c in columns) / 3

    def c(x):
        mean = [statistics.mean(row[d].item() for row in x) for d in range(3)]
        total = 0
        for l, k in itertools.permutations(range(3), 2):
            total += (sum((row[l] - mean[l]) * (row[k] - mean[k]) for row in x).item() / 4) ** 2
        return total / 3

    distance = sum(((a - b) ** 2).sum().item() for a, b in zip(p, z)) / 5
    expected = 25 * distance + 25 * (v(p) + v(z)) + c(p) + c(z)
    assert vicmae.vicreg(p, z).item() == pytest.approx(expected, rel=1e-12)


def test_generalized_mean_lies_between_mean_and_maximum():
    x = normal(3, 7, 4).abs() + 0.1
    gem = lambda p: vicmae.generalized_mean(x, torch.tensor(p, dtype=torch.float64))
    assert error(gem(1.0), x.mean(1)) < 1e-12
    assert error(gem(3.0), (x**3).mean(1) ** (1 / 3)) < 1e-12
    assert error(gem(2000.0), x.amax(1)) < 2e-3
    power = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: vicmae.generalized_mean(x, p), (x.requires_grad_(), power))


def test_branch_is_the_appendixs():
    kinds = lambda b: [tuple(m.weight.shape) if hasattr(m, "weight") else "ReLU" for m in b.projector]
    block = [(12, 12), (12,), "ReLU"]
    assert kinds(vicmae.Branch(6, "mean")) == [(12, 6), *block, *block]
    assert kinds(vicmae.Branch(6, "cls", last=6)) == [(12, 6), *block, *block, (6, 12)]
    tokens = normal(2, 5, 6)
    for pooling, expected in (("mean", tokens[:, 1:].mean(1)), ("max", tokens[:, 1:].amax(1)), ("cls", tokens[:, 0])):
        assert torch.equal(vicmae.Branch(6, pooling).pool(tokens), expected)
    assert [n for n, _ in vicmae.Branch(6, "gem").named_parameters()][0] == "power"


@pytest.mark.parametrize("both", [False, True])
def test_a_step_is_equations_6_and_7(tmp_path, both):
    s, f, decoder, branch = tiny_vicmae(out=str(tmp_path / "run"), epochs=1, reconstruct_both=both)
    copies, videos, real = copy.deepcopy([f, decoder, branch.projector]), tiny_videos(8), common.augment
    with mock.patch.object(vicmae, "augment", lambda *args: real(*args).double()):
        run = Recorder(s, CPU)
        vicmae.pretrain(run, "vicmae", f, decoder, branch, videos)
    (data,) = common.batches(videos, [View(16, (0.5, 1.0))] * 2, 8, 0, 1, s.seed, CPU, 0, {})
    noise = uniform((s.seed, "vicmae", 0, "mask"), torch.arange(8), 2, 16)
    f, decoder, projector = copies
    units, masked = [], []
    for frame in (0, 1):
        x = real(data.views[frame]).double()
        ids_keep, ids_restore, mask = common.random_masking(noise[:, frame], 0.75)
        tokens = f(x, ids_keep)
        assert tokens.shape[1] == 1 + 4
        units.append(F.normalize(projector(tokens[:, 1:].mean(1)), dim=1))
        masked.append(common.mae_loss(decoder(tokens, ids_restore), x, mask).mean())
    z, negative = torch.stack(units), 0
    for v in (0, 1):
        for i in range(8):
            others = [torch.exp(z[v, i] @ z[w, k] / 0.1) for w in (0, 1) for k in range(8) if (w, k) != (v, i)]
            negative = negative - torch.log(torch.exp(z[v, i] @ z[1 - v, i] / 0.1) / sum(others)) / 16
    expected = (sum(masked) / 2 if both else masked[0]) + 0.5 * negative
    assert error(run.losses[0], expected) < 1e-10
    expected.backward()
    theirs = [p.grad for m in (f, decoder, projector) for p in m.parameters() if p.grad is not None]
    order = lambda grads: sorted(grads, key=lambda g: (g.shape, g.flatten()[0].item()))
    assert all_equal(order(run.gradients[0]), order(theirs), 1e-9)


def test_the_contrastive_loss_joins_at_its_epoch(tmp_path):
    s, *modules = tiny_vicmae(torch.float32, out=str(tmp_path / "run"), epochs=3, contrast_from=2)
    start = copy.deepcopy(modules[2].state_dict())
    with mock.patch.object(common.Run, "_save", lambda *args: None):
        vicmae.pretrain(common.Run(s, CPU), "vicmae", *modules, tiny_videos())
    assert [("contrast" in e) for e in log_of(tmp_path / "run")] == [False] * 4 + [True] * 2
    changed = [k for k, v in modules[2].state_dict().items() if not torch.equal(v, start[k])]
    assert changed
    s, *modules = tiny_vicmae(torch.float32, out=str(tmp_path / "mae"), epochs=3, contrast_from=0)
    start = copy.deepcopy(modules[2].state_dict())
    vicmae.pretrain(common.Run(s, CPU), "mae", *modules, tiny_videos())
    assert all(torch.equal(v, start[k]) for k, v in modules[2].state_dict().items())


VICMAE = """--model vit_nano8 --image_size 16 --decoder_dim 16 --decoder_depth 1 --decoder_heads 2 --batch 8 --epochs 3
    --warmup_epochs 1 --contrast_from 1 --methods mae,vicmae --precision float32 --workers 0""".split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A video set of two classes, in folders of frames."""
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 8), ("val", 6)):
        for c, seed in (("a", 0), ("b", 1)):
            pixels = pictures(count * 3, 20, 20, seed=seed).unflatten(0, (count, 3))
            write_clips(root / split / c, argparse.Namespace(pixels=pixels))
    return root


def test_vicmae_leaves_its_files_and_resumes_to_the_same(folders, clips, tmp_path):
    flags = [*VICMAE, "--data", clips, "--images", folders / "labelled"]
    main(*flags, "--out", tmp_path / "whole", program=vicmae)
    names = "config.json log.jsonl last.pt previous.pt mae.pt vicmae.pt encoder.pt results.json mae.png vicmae.png"
    assert {f.name for f in (tmp_path / "whole").iterdir()} == set(names.split())
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert list(results) == ["mae", "vicmae"]
    for row in results.values():
        assert row.keys() >= {"knn", "probe", "knn_cls", "probe_cls", "video_object"}
    for step in (4, 8):
        break_at(step, *flags, "--out", tmp_path / str(step), program=vicmae)
        main("--out", tmp_path / str(step), "--resume", program=vicmae)
        same_weights(tmp_path / str(step), tmp_path / "whole", ("mae.pt", "vicmae.pt", "encoder.pt"))
        assert json.loads((tmp_path / str(step) / "results.json").read_text()) == results
        assert len(log_of(tmp_path / str(step))) == len(log_of(tmp_path / "whole"))


def test_videos_without_labels_train_too(clips, tmp_path):
    main(*VICMAE, "--data", clips / "train", "--out", tmp_path / "run", program=vicmae)
    assert not (tmp_path / "run" / "results.json").exists() and (tmp_path / "run" / "encoder.pt").exists()
# --------------------------------------------------------------------------------------------------------------- CMAE


def cmae_settings(**changes):
    """16 patches of 4 x 4 pixels, shifts of 0 to 3 pixels."""
    given = dict(model="vit_nano4", image_size=16, batch=8, epochs=1, lr=1e-2, warmup_epochs=0, shift=4, ema=0.9,
                 decoder_dim=16, decoder_depth=3, decoder_heads=2, head_hidden=16, head_dim=8, workers=0,
                 precision="float32", seed=3)  # fmt: skip
    return cmae.Settings(**(given | changes))


def cmae_models(s, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"nano": (16, 3, 2)}
    with mock.patch.object(common, "VIT_SIZES", sizes):
        online = randomized(cmae.Online(s)).to(dtype)
    return online, cmae.Target(online)


def cmae_outcome(micro_batch, folder, dtype=torch.float64, **changes):
    """Two steps of CMAE's loop."""
    out = folder / "-".join(map(str, ["cmae", micro_batch, dtype, *changes.values()]))
    s = cmae_settings(micro_batch=micro_batch, out=str(out), **changes)
    online, target = cmae_models(s, dtype)
    with views_in(dtype), contextlib.redirect_stdout(io.StringIO()):
        run = Recorder(s, CPU)
        cmae.pretrain(run, "cmae", online, target, tiny_images(), s.lambda_c)
    return run.outcome(target=torch.cat([p.flatten() for p in target.parameters()]))


def test_cmae_settings_are_those_of_the_paper():
    s = common.parse_settings(cmae.Settings, cmae.presets, ["--data", "folder"], cmae.__doc__)
    assert (s.epochs, s.batch, s.lr, s.warmup_epochs, s.weight_decay) == (1600, 4096, 1.5e-4, 40, 0.05)  # 4.1, 4.6
    assert (s.decoder_dim, s.decoder_depth, s.decoder_heads, s.mask_ratio, s.norm_pix) == (512, 8, 16, 0.75, True)
    assert (s.feature_depth, s.share_decoder, s.target_mask_ratio, s.shift) == (2, False, 0, 32)  # Tables 4c, 4e, 3.2
    assert (s.temperature, s.lambda_c, s.ema, s.loss) == (0.07, 1, 0.996, "infonce")  # 3.1, 3.3
    assert (s.methods, s.finetune_epochs, s.finetune_lr) == ("cmae", 100, 1e-3)  # He et al. Table 9


@pytest.mark.parametrize("p", [0, 1, 7, 32])
def test_the_target_view_is_shifted_by_r_pixels_and_never_leaves_the_master_crop(p):
    size, steps = 20, torch.linspace(0, 1 - 2**-24, 33)
    noise = torch.cartesian_prod(steps, steps)  # both ends of [0, 1) too
    row, column = torch.meshgrid(torch.arange(size + p), torch.arange(size + p), indexing="ij")
    sample = torch.arange(len(noise))[:, None, None].expand(-1, size + p, size + p)
    master = torch.stack([row.expand_as(sample), column.expand_as(sample), sample], 1)  # pixels that know their place
    I_s, I_t = cmae.pixel_shift(master, size, p, noise)
    assert torch.equal(I_s, master[:, :, :size, :size])
    seen = set()
    for n, (r_h, r_w) in enumerate((noise.double() * p).floor().long().tolist()):
        assert torch.equal(I_t[n], master[n, :, r_h : r_h + size, r_w : r_w + size]), (r_h, r_w)
        seen.add((r_h, r_w))
    assert seen == set(itertools.product(range(max(p, 1)), repeat=2))  # every shift of [0, p) occurs here


def test_views_share_their_crop_and_only_the_targets_colours_change():
    images, key = tiny_images(64), (0, "key")
    for random_crops in (False, True):
        s = cmae_settings(random_crops=random_crops)
        views = cmae.views_of(s)
        assert [v.size for v in views] == ([16, 16] if random_crops else [20])
        assert all(v.scale == (0.2, 1) and v.flip for v in views)
        data = next(common.batches(images, views, 64, 0, 1, 0, CPU, 0, {}))
        x_s, x_t = cmae.make_views(data, s, key, CPU)
        plain = cmae.make_views(data, cmae_settings(random_crops=random_crops, color=False), key, CPU)
        if random_crops:
            cuts = data.views
        else:
            cuts = cmae.pixel_shift(data.views[0], 16, 4, uniform((*key, "shift"), torch.arange(64), 2))
        assert torch.equal(x_s, plain[0]) and torch.equal(x_s, common.augment(cuts[0]))
        assert torch.equal(plain[1], common.augment(cuts[1]))
        changed = (x_t != plain[1]).flatten(1).any(1).float().mean()
        assert 0.8 < changed <= 1  # 1 - 0.2 * 0.8 * 0.5 = 0.92 in the mean
    assert cmae.COLOUR == common.Colour(jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_gray=0.2, p_blur=0.5)


@pytest.mark.parametrize(
    "grid, block, ratio, kept", [(14, 2, 0.65, 68), (6, 2, 0.65, 12), (6, 3, 0.5, 18), (4, 1, 0.75, 4)]
)
def test_masking_in_blocks_removes_whole_blocks(grid, block, ratio, kept):
    noise = uniform((0,), torch.arange(50), grid * grid // block**2)
    ids_keep, _, mask = common.random_masking(cmae.block_noise(noise, (grid, grid), block), ratio)
    assert ids_keep.shape == (50, kept)
    for n in range(50):
        visible = {divmod(i // grid // block * grid + i % grid // block, grid) for i in ids_keep[n].tolist()}
        assert len(visible) == kept // block**2  # blocks touched: none of them in part
        most = max(noise[n, a * (grid // block) + b] for a, b in visible)
        assert (noise[n] <= most).sum() == len(visible)  # and those of least noise
        assert mask[n].sum() == grid * grid - kept


def test_the_contrastive_loss_is_eq_6_and_7():
    y, z = normal(6, 5), 3 * normal(6, 5, seed=1)
    rho = [[(y[i] @ z[j] / y[i].norm() / z[j].norm()).item() for j in range(6)] for i in range(6)]
    expected = 0
    for i in range(6):
        negatives = sum(math.exp(rho[i][j] / 0.07) for j in range(6) if j != i)
        expected -= math.log(math.exp(rho[i][i] / 0.07) / (math.exp(rho[i][i] / 0.07) + negatives)) / 6
    assert cmae.contrastive_loss(y, z, 0.07).item() == pytest.approx(expected, rel=1e-10)
    distance = sum((y[i] / y[i].norm() - z[i] / z[i].norm()).square().sum().item() for i in range(6)) / 6
    assert cmae.contrastive_loss(y, z, 0.07, "byol").item() == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize("changes", [
    dict(), dict(random_crops=True, color=False, feature_depth=0, target_mask_ratio=0.5),
    dict(loss="byol", mask_block=2), dict(share_decoder=True, lambda_c=0.3, mask_ratio=0.5),
])  # fmt: skip
def test_the_loop_is_section_3(tmp_path, changes):
    s = cmae_settings(out=str(tmp_path / "run"), **changes)
    images = tiny_images(8)  # an epoch is one step
    s.epochs, s.warmup_epochs = 4, 1
    online, target = cmae_models(s)
    f, G_p, G_f = copy.deepcopy([online.F_s, online.G_p, online.G_f])
    g, h = torch_head(online.projector), torch_head(online.predictor)
    f_t, g_t = copy.deepcopy(f), copy.deepcopy(g)
    starts, history = [p.clone() for m in (f, g) for p in m.parameters()], []
    with views_in(torch.float64):
        cmae.pretrain(common.Run(s, CPU), "cmae", online, target, images, s.lambda_c)

    modules = nn.ModuleList([m for m in (f, G_p, G_f, g, h) if m is not None])
    named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if p.ndim > 1 and "token" not in n]
    rest = [p for n, p in named if p.ndim == 1 or "token" in n]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.05), dict(params=rest, weight_decay=0.0)],
                                  betas=(0.9, 0.95))  # fmt: skip
    views = [View(16)] * 2 if s.random_crops else [View(20)]
    for step, data in enumerate(common.batches(images, views, 8, 0, 4, s.seed, CPU, 0, {})):
        draw = lambda name, *shape: uniform((s.seed, "cmae", step, name), torch.arange(8), *shape)
        I_s = data.views[0][:, :, :16, :16]
        if s.random_crops:
            I_t = data.views[1]
        else:
            r = (draw("shift", 2) * 4).long().tolist()
            I_t = torch.stack([x[:, a : a + 16, b : b + 16] for x, (a, b) in zip(data.views[0], r)])
        x_s = common.augment(I_s).double()
        x_t = (common.augment(I_t, cmae.COLOUR, draw("colour", 13)) if s.color else common.augment(I_t)).double()
        noise = draw("mask", 16 // s.mask_block**2)
        if s.mask_block == 2:
            noise = noise.view(8, 2, 1, 2, 1).expand(8, 2, 2, 2, 2).reshape(8, 16)
        ids, restore, mask = common.random_masking(noise, s.mask_ratio)
        z_s = f(x_s, ids)
        L_r = common.mae_loss(G_p(z_s, restore), x_s, mask).mean()
        y_s = z_s[:, 1:].mean(1) if G_f is None else G_f(z_s, restore).mean(1)
        tokens = f_t.embed(x_t)
        if s.target_mask_ratio:
            tokens = f_t.embed(x_t, draw("target mask", 16).argsort(1)[:, : int(16 * (1 - s.target_mask_ratio))])
        for block in f_t.blocks:
            tokens = block(tokens)
        z_t = tokens[:, 1:].mean(1)  # no final norm
        with torch.no_grad():
            z_p = F.normalize(g_t(z_t), dim=1)
        y_p = F.normalize(h(g(y_s)), dim=1)
        if s.loss == "byol":
            L_c = (y_p - z_p).square().sum(1).mean()
        else:
            L_c = F.cross_entropy(y_p @ z_p.T / 0.07, torch.arange(8))
        optimizer.zero_grad()
        (L_r + s.lambda_c * L_c).backward()
        for group in optimizer.param_groups:  # 1 step of warm-up, 3 of cosine; lr x batch / 256
            group["lr"] = 1e-2 * 8 / 256 * (1, 1, 0.75, 0.25)[step]
        optimizer.step()
        history.append([p.detach().clone() for m in (f, g) for p in m.parameters()])
        for average, source in ((f_t, f), (g_t, g)):
            for a, b in zip(average.parameters(), source.parameters()):
                a.data = 0.9 * a.data + 0.1 * b.data

    found = [online.F_s, online.G_p, online.G_f, online.projector, online.predictor]
    for ours, reference in zip(found, (f, G_p, G_f, g, h)):
        if reference is not None:
            assert all_equal(list(ours.parameters()), list(reference.parameters()), 1e-8)
    # theta_t after n steps: mu^n theta_0 + (1 - mu) sum_i mu^(n - i) theta_i, of the encoder and the projector
    for i, p in enumerate([*target.F_t.parameters(), *target.projector.parameters()]):
        expected = 0.9**4 * starts[i] + 0.1 * sum(0.9 ** (3 - step) * history[step][i] for step in range(4))
        assert error(p, expected) < 1e-8 or (p - expected).abs().max() < 1e-10
        assert p.grad is None and not p.requires_grad


def test_no_gradient_reaches_the_target_side(tmp_path):
    s = cmae_settings(out=str(tmp_path / "run"))
    online, target = cmae_models(s)
    target.requires_grad_(True)  # even if its parameters could take one
    with views_in(torch.float64), mock.patch.object(common.Run, "optimize", lambda *_: False):  # leaves them in place
        cmae.pretrain(common.Run(s, CPU), "cmae", online, target, tiny_images(8), 1.0)
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for name, p in online.named_parameters() if "pos_embed" not in name)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_without_contrast_it_is_mae_exactly(tmp_path, micro_batch):
    found = []
    for trainer in ("pretrain_mae", "cmae"):
        s = cmae_settings(out=str(tmp_path / trainer), micro_batch=micro_batch, epochs=2, warmup_epochs=1)
        online, target = cmae_models(s)
        before = copy.deepcopy(target.state_dict())
        with views_in(torch.float64), mock.patch.object(cmae.Target, "feature", side_effect=AssertionError("computed")):
            run = Recorder(s, CPU)
            if trainer == "cmae":
                cmae.pretrain(run, "mae", online, target, tiny_images(), 0.0)
            else:
                recipe = dict(epochs=2, batch=8, lr=1e-2, warmup_epochs=1)
                common.pretrain_mae(run, online.F_s, online.G_p, tiny_images(), **recipe)
        assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
        state = {k: v for k, v in online.state_dict().items() if k.startswith(("F_s", "G_p"))}
        found.append((run.losses, run.gradients, state))
    (losses, gradients, state), (other_losses, other_gradients, other_state) = found
    assert len(losses) == 4 and torch.equal(torch.stack(losses), torch.stack(other_losses))
    for ours, other in zip(gradients, other_gradients, strict=True):
        ours, other = (sorted(gs, key=lambda g: (g.shape, g.flatten()[0].item())) for gs in (ours, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    assert all(torch.equal(state[k], other_state[k]) for k in state)


def test_the_feature_decoder_shares_nothing_with_the_pixel_decoder_unless_asked():
    ids = lambda module: {id(p) for p in module.parameters()}
    online, _ = cmae_models(cmae_settings())
    assert not ids(online.G_f) & (ids(online.G_p) | ids(online.F_s)) and len(online.G_f.decoder_blocks) == 2
    shared, _ = cmae_models(cmae_settings(share_decoder=True))
    assert ids(shared.G_f.decoder_blocks) == ids(shared.G_p.decoder_blocks[:2])
    own = {n for n, p in shared.G_f.named_parameters() if id(p) not in ids(shared.G_p)}
    assert {name.split(".")[0] for name in own} == {"decoder_pos_embed", "decoder_norm", "decoder_pred"}
    assert cmae_models(cmae_settings(feature_depth=0))[0].G_f is None
    z_s, restore = normal(8, 5, 16), normal(8, 16).argsort(1)
    x = online.G_f(z_s, restore)
    assert x.shape == (8, 16, 16) and error(online.feature(z_s, restore), x.sum(1) / 16) < 1e-12  # Eq. 4: all tokens


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("model", ["vit_s16", "vit_b16", "vit_l16"])
@pytest.mark.parametrize("depth", [0, 2, 4, 8])
def test_every_size_builds_with_every_feature_decoder(model, depth, stem):
    with torch.device("meta"):
        online = cmae.Online(cmae.Settings(model=model, feature_depth=depth, stem=stem))
        x, noise = torch.empty(2, 3, 224, 224), torch.empty(2, 196)
        ids_keep, ids_restore, _ = common.random_masking(noise, 0.75)
        z_s = online.F_s(x, ids_keep)
        y_s = online.feature(z_s, ids_restore)
        assert z_s.shape == (2, 50, online.F_s.dim) and y_s.shape == (2, online.F_s.dim)
        assert online.G_p(z_s, ids_restore).shape == (2, 196, 768)
        assert online.predictor(online.projector(y_s)).shape == (2, 256)
    assert len(online.G_f.decoder_blocks if depth else []) == depth and len(online.G_p.decoder_blocks) == 8


def conv_vit():
    """A small hybrid encoder: 16 patches of 8 x 8 pixels."""
    return vit(stem="conv", dim=48)


def test_no_pixel_of_a_removed_patch_reaches_a_visible_token_of_the_convolutional_stem():
    encoder, x = conv_vit(), normal(5, 3, 32, 32)
    ids = normal(5, 16).argsort(1)[:, :6]
    removed = torch.ones(5, 16).scatter(1, ids, 0).view(5, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = x + 100 * removed * normal(5, 3, 32, 32, seed=1)
    assert torch.equal(encoder(x, ids), encoder(other, ids))
    whole = encoder.patch_embed(x)
    assert error(common.take(encoder.patch_embed(x, ids), ids), common.take(whole, ids)) > 1e-2  # they would otherwise
    everything = torch.arange(16).expand(5, -1)
    assert error(encoder(x, everything), encoder(x)) < 1e-12
    for n in range(5):  # a sample's mask is its own
        assert error(encoder(x[n : n + 1], ids[n : n + 1]), encoder(x, ids)[n : n + 1]) < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_the_convolutional_stem_is_that_of_plain_modules_with_removed_patches_zeroed_before_each(masked):
    stem, x, ids = conv_vit().patch_embed, normal(2, 3, 32, 32), normal(2, 16).argsort(1)[:, :6]
    visible = torch.zeros(2, 16).double().scatter(1, ids, 1) if masked else torch.ones(2, 16).double()
    hide = lambda x: x * torch.kron(visible.view(2, 1, 4, 4), torch.ones(x.shape[2] // 4, x.shape[3] // 4).double())
    layer_norm = lambda x, m: F.layer_norm(x.movedim(1, -1), m.normalized_shape, m.weight, m.bias, 1e-6).movedim(-1, 1)
    linear = lambda x, m: F.conv2d(x, m.weight[:, :, None, None], m.bias)  # at each position
    for i, down in enumerate(stem.down):
        x = F.gelu(layer_norm(F.conv2d(hide(x), down.weight, down.bias, stride=down.kernel_size), stem.norms[i]))
        for block in stem.stages[i] if i < 2 else []:
            a = linear(layer_norm(x, block.norm1), block.fc)
            a = F.conv2d(hide(a), block.conv.weight, block.conv.bias, padding=2, groups=a.shape[1])
            x = x + linear(a, block.proj)
            x = x + linear(F.gelu(linear(layer_norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)
    x = linear(x, stem.fc)
    assert [d.kernel_size for d in stem.down] == [(2, 2)] * 3 and [len(s) for s in stem.stages] == [2, 2]
    found = stem(normal(2, 3, 32, 32), ids if masked else None)
    assert error(found, x.flatten(2).transpose(1, 2)) < 1e-10


@pytest.mark.parametrize("model", ["vit_s16", "vit_b16", "vit_l16", "vit_h16"])
def test_the_hybrid_has_the_size_of_the_vit(model):
    with torch.device("meta"):
        plain, hybrid = (common.build_vit(model, 224, stem=stem) for stem in ("patch", "conv"))
    count = lambda encoder: sum(p.numel() for p in encoder.parameters())
    assert count(hybrid) == pytest.approx(count(plain), rel=0.03)
    assert hybrid.depth == len(hybrid.blocks) == plain.depth - 1


def test_encoders_of_either_stem_are_read_as_what_they_are(tmp_path):
    hybrid, plain, x = conv_vit().float(), vit(dim=48).float(), normal(2, 3, 32, 32).float()
    for name, encoder in (("conv", hybrid), ("patch", plain)):
        common.save_encoder(tmp_path / name, encoder)
        again = common.load_encoder(tmp_path / name)
        assert again.config == encoder.config and again.config["stem"] == name
        assert torch.equal(again(x), encoder(x))
        assert torch.load(tmp_path / name)["encoder"]["stem"] == name
    with pytest.raises(InputError, match="patch_embed.down.0.bias is missing"):
        common.init_encoder(hybrid, tmp_path / "patch")
    with pytest.raises(InputError, match="patch_embed.down.0.bias is not expected"):
        common.init_encoder(plain, tmp_path / "conv")
    with pytest.raises(RuntimeError, match="patch_embed.proj.weight"):
        timm_vit(hybrid.state_dict())


CMAE_TINY = """--model vit_nano8 --image_size 16 --decoder_dim 16 --decoder_depth 1 --decoder_heads 2 --batch 8
    --shift 4 --head_hidden 16 --head_dim 8 --epochs 3 --warmup_epochs 1 --finetune_epochs 2 --finetune_batch 8
    --precision float32 --workers 0""".split()


def test_a_whole_cmae_run_leaves_its_files_and_eval_repeats_its_table(folders, tmp_path):
    out, data = tmp_path / "run", folders / "labelled"
    printed = main(*CMAE_TINY, "--methods", "mae,cmae", "--stem", "conv", "--data", data, "--out", out, program=cmae)
    files = "config.json log.jsonl last.pt previous.pt mae.pt encoder.pt results.json views.png"
    assert {f.name for f in out.iterdir()} == set(files.split())
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["mae", "cmae"] and results["mae"].keys() >= {"knn", "probe", "finetune"}
    assert "finetune" in printed and [(e["stage"], e["step"]) for e in log_of(out)] == [
        (stage, step) for stage in ("mae", "cmae") for step in range(6)
    ]
    last = torch.load(out / "last.pt")["state"]["online"]
    saved = torch.load(out / "encoder.pt")["model"]
    assert all(torch.equal(v, last[f"F_s.{k}"]) for k, v in saved.items()) and "patch_embed.down.0.weight" in saved
    for stage, file in (("mae", "mae.pt"), ("cmae", "encoder.pt")):
        for protocol, flags in (("knn", []), ("finetune", "--recipe partial --epochs 2 --batch 8".split())):
            argv = [protocol, "--encoder", out / file, "--data", data, "--precision", "float32", "--workers", 0, *flags]
            main(*argv, program=protocols)
            written = json.loads(protocols.beside(out / file, f"{protocol}.json").read_text())
            assert written[protocol] == pytest.approx(results[stage][protocol], abs=1e-3), (stage, protocol)


@pytest.mark.parametrize("step", [6, 9, 11])  # a stage's first step, the middle, the run's last step
def test_a_cmae_run_broken_off_at_any_stage_ends_with_the_same_files(folders, tmp_path, step):
    flags, whole = [*CMAE_TINY, "--data", folders / "labelled", "--methods", "mae,cmae"], folders / "whole_cmae"
    if not whole.exists():
        main(*flags, "--out", whole, program=cmae)
    break_at(step, *flags, "--out", tmp_path / "run", program=cmae)
    main("--out", tmp_path / "run", "--resume", program=cmae)
    same_weights(tmp_path / "run", whole, ("mae.pt", "encoder.pt"))
    assert (tmp_path / "run" / "results.json").read_text() == (whole / "results.json").read_text()
# ---------------------------------------------------------------------------------------------------------------- CAN


def can_settings(*argv):
    return common.parse_settings(can.Settings, can.presets, ["--data", "imagenet", *argv], "x")


@pytest.mark.parametrize(
    "argv, lr, weight_decay",
    [
        ("--model vit_b16", 2.5e-4, 0.05),  # Table 6
        ("--model vit_l16", 1.25e-4, 0.1),
        ("--model vit_l16 --methods simclr", 1.25e-4, 0.1),
        ("--model vit_b16 --epoch_images 1281167", 2.5e-4, 0.05),  # Table 7
        ("--model vit_l16 --epoch_images 1281167", 3.125e-5, 0.05),
        ("--model vit_l16 --methods mae", 1.5e-4, 0.05),  # Table 8
        ("--model vit_l16 --methods mae --epoch_images 1281167", 3.75e-5, 0.05),  # Table 9
    ],
)
def test_can_settings_are_those_of_tables_6_to_9(argv, lr, weight_decay):
    s = can_settings(*argv.split())
    assert (s.lr, s.weight_decay, s.batch, s.warmup_epochs) == (lr, weight_decay, 4096, 40)
    assert s.epochs == (800 if s.model == "vit_l16" else 1600) or s.epoch_images
    if s.methods == "can":
        assert (s.mask_ratio, s.sigma_max, s.lambda_infonce, s.temperature, s.views) == (0.5, 0.05, 0.03, 0.1, 2)
        assert (s.projector_hidden, s.projector_dim) == (4096, 128)
        assert (s.decoder_dim, s.decoder_depth, s.decoder_heads) == (512, 8, 16)


def test_flags_win_over_a_methods_own_row():
    s = can_settings("--methods", "simclr", "--mask_ratio", "0.25")  # Figure 6
    assert (s.mask_ratio, s.lambda_infonce, s.sigma_max) == (0.25, 1, 0)


def test_simclr_colours_have_strength_1():
    s = can_settings()
    colours = can.simclr_colours(s.strength)
    assert colours.jitter == (0.8, 0.8, 0.8, 0.2)
    assert (colours.p_jitter, colours.p_gray, colours.p_blur, colours.p_solarize) == (0.8, 0.2, 0.5, 0)
    assert can.simclr_colours(can_settings("--methods", "mae").strength) is None  # He et al.: crop and flip


@pytest.mark.parametrize("lambda_infonce, lam", [(0.03, 0.7), (0, 0.7), (0.03, 0), (0.03, 1), (1, 0.7)])
def test_loss_weights_sum_to_1(lambda_infonce, lam):
    c, rec, denoise = can.loss_weights(can.Settings(lambda_infonce=lambda_infonce, lam=lam))
    assert c == lambda_infonce and c + rec + denoise == pytest.approx(1, rel=1e-12) and min(rec, denoise) >= 0
    assert rec * (1 - lam) == pytest.approx(denoise * lam, abs=1e-15)


def can_inputs(s, n=6):
    x, e = (normal(n, s.views, 3, 16, 16, seed=seed) for seed in (1, 2))
    noise = torch.rand(n, s.views, 16, generator=torch.Generator().manual_seed(3))
    sigma = s.sigma_max * torch.rand(n, s.views, generator=torch.Generator().manual_seed(4)).double()
    return x, noise, sigma, e


def test_can_contrast_is_a_loop_over_the_formula():
    s, model = tiny_can()
    y, zero = normal(6, 2, 16), torch.zeros(6, dtype=torch.float64)
    loss, log = model.objective(y, zero, zero)
    u = model.projector(y.transpose(0, 1).flatten(0, 1)).detach()  # views one after the other
    u = F.normalize(u, dim=1).view(2, 6, 8)
    total = 0
    for v in range(2):
        for i in range(6):
            positive = math.exp(u[0, i] @ u[1, i] / 0.1)
            negatives = [math.exp(u[v, i] @ u[w, j] / 0.1) for w in range(2) for j in range(6) if j != i]
            assert len(negatives) == 2 * 6 - 2
            total -= math.log(positive / (positive + sum(negatives))) / (2 * 6)
    assert log["infonce"].item() == pytest.approx(total, rel=1e-12)
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-12)


def test_can_projector_has_two_hidden_layers():
    kinds = [(type(m), *m.weight.shape) for m in tiny_can()[1].projector if hasattr(m, "weight")]
    norm = (common.BatchNorm, 16)
    assert kinds == [(nn.Linear, 16, 16), norm, (nn.Linear, 16, 16), norm, (nn.Linear, 8, 16)]


def test_can_objective_is_the_weighted_sum_of_its_losses():
    s, model = tiny_can()
    inputs = model.encode(*can_inputs(s))
    loss, log = model.objective(*inputs)
    assert list(log) == ["infonce", "rec", "denoise"]
    expected = 0.3 * log["infonce"] + 0.7 * 0.7 * log["rec"] + 0.7 * 0.3 * log["denoise"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("variant", [dict(), dict(noisy_target=True), dict(norm_pix=True), dict(mask_ratio=0.0)])
def test_can_losses_are_loops_over_the_formulas(variant):
    """Removed patches have the clean (or noisy) view as target, kept ones sigma e."""
    s, model = tiny_can(**variant)
    x, noise, sigma, e = can_inputs(s)
    with mock.patch.object(model, "decode", side_effect=model.decode) as decode:
        _, rec, denoise = model.encode(x, noise, sigma, e)
    z, _, of_decoder = decode.call_args.args
    kept = 16 if s.mask_ratio == 0 else 8
    assert z.shape == (12, 1 + kept, 16) and error(of_decoder, sigma.flatten()) == 0
    x_hat = model.decode(*decode.call_args.args)
    for i in range(6):
        expected = dict(rec=0.0, denoise=0.0)
        for v in range(2):
            keep = set(noise[i, v].argsort()[:kept].tolist())
            for t in range(16):
                row, column = 4 * (t // 4), 4 * (t % 4)
                cut = lambda image: image[:, row : row + 4, column : column + 4].permute(1, 2, 0).flatten()
                added = sigma[i, v] * cut(e[i, v])
                target = cut(x[i, v]) + (added if s.noisy_target else 0)
                if s.norm_pix:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                name, aim = ("denoise", added) if t in keep else ("rec", target)
                count = kept if t in keep else 16 - kept
                expected[name] += ((aim - x_hat[2 * i + v, t]) ** 2).mean().item() / count / 2
        assert rec[i].item() == pytest.approx(expected["rec"], rel=1e-10)
        assert denoise[i].item() == pytest.approx(expected["denoise"], rel=1e-10)


def test_the_encoder_sees_the_noisy_kept_patches_alone():
    s, model = tiny_can()
    x, noise, sigma, e = can_inputs(s)
    y, *_ = model.encode(x, noise, sigma, e)
    for i, v in ((0, 0), (3, 1)):
        view = (x + sigma[..., None, None, None] * e)[i, v][None]
        tokens = model.f(view, noise[i, v].argsort()[None, :8])
        assert error(y[i, v], tokens[0, 1:].mean(0)) < 1e-12
    with pytest.raises(AssertionError):
        assert error(y[0, 0], model.f(x[0, :1], noise[0, :1].argsort()[:, :8])[0, 1:].mean(0)) < 1e-3  # the clean view


def test_mae_by_settings_is_maes_loss():
    s, model = tiny_can(**can.METHODS["mae"])
    x, noise, sigma, e = can_inputs(s)
    _, rec, _ = model.encode(x, noise, 0 * sigma, e)
    ids_keep, ids_restore, mask = common.random_masking(noise[:, 0], 0.75)
    pred = model.decoder(model.f(x[:, 0], ids_keep), ids_restore)
    assert error(rec, common.mae_loss(pred, x[:, 0], mask, norm_pix=False)) < 1e-12
    loss, log = model.objective(*model.encode(x, noise, 0 * sigma, e))
    assert loss.item() == pytest.approx(rec.mean().item(), rel=1e-12) and list(log) == ["rec"]
    assert model.projector is None and model.level is None


def test_simclr_pays_for_no_decoder_and_sees_full_views():
    s, model = tiny_can(**can.METHODS["simclr"])
    assert model.decoder is None and model.level is None
    x, noise, sigma, e = can_inputs(s)
    y, rec, denoise = model.encode(x, noise, 0 * sigma, e)
    assert error(y[:, 1], model.f.pooled(model.f(x[:, 1]))) < 1e-12 and not rec.any() and not denoise.any()
    loss, log = model.objective(y, rec, denoise)
    assert list(log) == ["infonce"] and loss == log["infonce"]


def test_level_embedding_is_sinusoids_and_an_mlp():
    level, sigma = randomized(can.LevelEmbedding(8, 0.05)), torch.tensor([0, 0.013, 0.05], dtype=torch.float64)
    rows = []
    for value in sigma.tolist():
        angles = [1000 * value / 0.05 / 10000 ** (i / 4) for i in range(4)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    first, _, second = level.mlp
    hidden = (torch.tensor(rows, dtype=torch.float64) @ first.weight.T + first.bias).clamp(min=0)
    assert first.weight.shape == second.weight.shape == (8, 8)
    assert error(level(sigma), hidden @ second.weight.T + second.bias) < 1e-12


def test_the_level_reaches_every_token_mask_tokens_included():
    s, model = tiny_can(decoder_depth=0)  # no attention: a token's output is of that token alone
    z, sigma = normal(1, 1 + 8, 16), torch.tensor([0.2], dtype=torch.float64)
    ids_restore = torch.randperm(16, generator=torch.Generator().manual_seed(0))[None]
    found = model.decode(z, ids_restore, sigma)
    d, p = model.decoder, model.level(sigma)
    for t in range(16):
        place = ids_restore[0, t].item()
        shift = d.decoder_embed.weight @ p[0]
        token = d.decoder_embed(z[0, 1 + place] + p[0]) if place < 8 else d.mask_token[0, 0] + shift
        assert error(found[0, t], d.decoder_pred(d.decoder_norm(token + d.decoder_pos_embed[0, 1 + t]))) < 1e-10
    assert ((found - model.decode(z, ids_restore, 2 * sigma)).abs().amax(-1) > 1e-6).all()
    unaware = tiny_can(level_embedding=False)[1]
    assert torch.equal(unaware.decode(z, ids_restore, sigma), unaware.decode(z, ids_restore, 2 * sigma))


@pytest.fixture(scope="module")
def can_draws(tmp_path_factory):
    """What the loop hands to `encode` in two steps of 128 images: views, masks' noise, levels, noise."""
    s, model = tiny_can(torch.float32, batch=128, out=str(tmp_path_factory.mktemp("draws") / "run"))
    seen, real = [], can.CAN.encode

    def encode(self, *inputs):
        seen.append(inputs)
        return real(self, *inputs)

    with mock.patch.object(can.CAN, "encode", encode), contextlib.redirect_stdout(io.StringIO()):
        can.pretrain(common.Run(s, CPU), "can", model, tiny_images(256), s)
    assert len(seen) == 2
    return seen


def test_the_two_masks_are_independent_and_hold_half_of_the_patches(can_draws):
    masks = [common.random_masking(noise.flatten(0, 1), 0.5)[2].view(128, 2, 16) for _, noise, _, _ in can_draws]
    masks = torch.stack(masks)
    assert (masks.sum(-1) == 8).all()
    assert not torch.equal(masks[0], masks[1])
    both = (masks[:, :, 0] * masks[:, :, 1]).sum(-1)  # hypergeometric: 8 draws from 16, 8 of them good
    expected = scipy.stats.hypergeom(16, 8, 8)
    assert abs(both.mean().item() - expected.mean()) < 4 * expected.std() / math.sqrt(256)
    assert both.var().item() == pytest.approx(expected.var(), rel=0.4)


def test_levels_are_uniform_and_noise_is_normal_a_view(can_draws):
    sigma = torch.stack([d[2] for d in can_draws])
    assert scipy.stats.kstest(sigma.flatten() / 0.5, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(sigma[..., 0].flatten(), sigma[..., 1].flatten())[0, 1]) < 0.2
    e = torch.stack([d[3] for d in can_draws])[:, :, :, 0].flatten(3)  # one colour
    assert scipy.stats.kstest(e[:, ::16].flatten(), "norm").pvalue > 0.01
    views = torch.corrcoef(e.transpose(1, 2).flatten(2).flatten(0, 1))  # views of both steps
    assert (views - torch.eye(4)).abs().max() < 4 / math.sqrt(128 * 256)


def test_keyed_gaussians_do_not_depend_on_how_rows_are_split():
    rows = torch.arange(6)
    whole = can.gaussian((0, "e"), rows, 3, 5, device=CPU)
    assert whole.shape == (6, 3, 5) and whole.isfinite().all()
    assert torch.equal(torch.cat([can.gaussian((0, "e"), r, 3, 5, device=CPU) for r in rows.split(2)]), whole)
    many = can.gaussian((0, "e"), torch.arange(2000), 51, device=CPU)
    assert scipy.stats.kstest(many.flatten(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(many[:, 0], many[:, 26])[0, 1]) < 0.1  # sine and cosine of one angle


def test_jft_epochs_are_counted_in_imagenets_images(tmp_path):
    s, model = tiny_can(torch.float32, out=str(tmp_path / "run"), epochs=2, epoch_images=40)
    with contextlib.redirect_stdout(io.StringIO()):
        can.pretrain(common.Run(s, CPU), "can", model, tiny_images(16), s)  # 16 images are two steps, 40 are five
    assert len(log_of(tmp_path / "run")) == 10


def can_multiply_adds(s, d, depth, hidden, out):
    """A step's multiply-adds per image from the layers' sizes, and the batch's logits for two images."""
    patch = int(re.search(r"\d+$", s.model)[0])
    patches = (s.image_size // patch) ** 2
    kept = int(patches * (1 - s.mask_ratio))
    blocks = lambda tokens, d, depth: depth * (12 * tokens * d**2 + 2 * tokens**2 * d)
    forward = blocks(kept + 1, d, depth)
    leaves = patches * 3 * patch**2 * d  # layers on the input: no gradient flows on to it
    if s.lambda_infonce < 1:
        D = s.decoder_dim
        forward += (kept + 1) * d * D + blocks(patches + 1, D, s.decoder_depth) + (patches + 1) * D * 3 * patch**2
        if s.sigma_max and s.level_embedding:
            forward += d**2 + d * D
            leaves += d**2
    forward, leaves = s.views * forward, s.views * leaves
    if s.lambda_infonce:
        forward += 2 * (d * hidden + hidden**2 + hidden * out) + 2 * 4 * out
    return 3 * forward + 2 * leaves


@pytest.mark.parametrize("method", can.METHODS)
def test_multiply_adds_of_a_step_by_arithmetic(method):
    sizes = dict(model="vit_nano8", image_size=32, projector_hidden=64, decoder_dim=32, decoder_depth=2, decoder_heads=2)
    s = can.Settings(**(can.METHODS[method] | sizes))
    found, before = can.multiply_adds(model := can.CAN(s)), copy.deepcopy(model.state_dict())
    assert found == pytest.approx(can_multiply_adds(s, 128, 6, 64, 128), rel=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_simclr_costs_70_percent_more_than_can_at_the_papers_size():
    cost = {m: can_multiply_adds(can.Settings(**can.METHODS[m]), 1024, 24, 4096, 128) for m in ("can", "simclr")}
    assert cost["simclr"] / cost["can"] == pytest.approx(1.70, abs=0.02)  # 1 Introduction: 70 % more
    assert cost["can"] / cost["simclr"] == pytest.approx(0.59, abs=0.01)  # Figure 1: 41 % fewer


# A whole run in a second, as TINY: 2 steps an epoch, 4 steps a method
CAN = """--model vit_nano8 --image_size 16 --decoder_dim 16 --decoder_depth 1 --decoder_heads 2 --batch 8 --epochs 2
    --warmup_epochs 1 --lr 1e-3 --projector_hidden 16 --projector_dim 8 --precision float32 --workers 0""".split()


def test_can_leaves_its_files_and_resumes_to_the_same(folders, tmp_path):
    flags = [*CAN, "--data", folders / "labelled", "--methods", "can,simclr,mae", "--save_every", 1]
    printed = main(*flags, "--out", tmp_path / "whole", program=can)
    names = "config.json log.jsonl last.pt previous.pt can.pt simclr.pt mae.pt encoder.pt results.json can.png mae.png"
    assert {f.name for f in (tmp_path / "whole").iterdir()} == set(names.split())
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert list(results) == ["can", "simclr", "mae"] and "simclr" in printed
    assert all(row.keys() >= {"knn", "probe", "madds/M"} for row in results.values())
    steps = [e for e in log_of(tmp_path / "whole") if e["stage"] == "can"]
    assert len(steps) == 4 and all({"infonce", "rec", "denoise"} <= e.keys() for e in steps)
    for step in (1, 6, 10):
        break_at(step, *flags, "--out", tmp_path / str(step), program=can)
        main("--out", tmp_path / str(step), "--resume", program=can)
        same_weights(tmp_path / str(step), tmp_path / "whole", ("can.pt", "simclr.pt", "mae.pt", "encoder.pt"))
        assert json.loads((tmp_path / str(step) / "results.json").read_text()).keys() == results.keys()
    assert common.load_encoder(tmp_path / "whole" / "encoder.pt").pool == "mean"


def test_can_alone_is_can_beside_others(folders, tmp_path):
    for name, methods in (("alone", "can"), ("beside", "simclr,can")):
        main(*CAN, "--data", folders / "flat", "--methods", methods, "--out", tmp_path / name, program=can)
    same_weights(tmp_path / "alone", tmp_path / "beside", ["can.pt"])


def test_the_cost_of_a_can_step_is_that_of_its_table(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = main(*CAN, "--cost", "--methods", "can,simclr", program=can)
    assert "madds/M" in printed and "simclr" in printed and not list(tmp_path.iterdir())


@slow
def test_the_short_can_run_learns(tmp_path):
    main("--short", "--methods", "can", "--out", tmp_path / "run", program=can)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["can"]["knn"] > 15  # chance is 10


# --------------------------------------------------------------------------------------------------------- all papers

SHORT_RUNS = {mae_ct: TINY, mim_refiner: REFINER, can: [*CAN, "--epochs", "4"], cmae: CMAE_TINY, vicmae: VICMAE}
all_papers = pytest.mark.parametrize("program", SHORT_RUNS, ids=lambda program: program.__name__)


def short_run(program, folder, out, *flags):
    """The losses of a whole run and its encoder's weights."""
    main(*SHORT_RUNS[program], "--data", folder / "labelled", "--out", out, *flags, program=program)
    return [e["loss"] for e in log_of(out)], torch.load(out / "encoder.pt")["model"]


@all_papers
def test_checkpointed_and_compiled_blocks_change_no_result_of_a_run(folders, tmp_path, program):
    losses, weights = short_run(program, folders, tmp_path / "plain")
    with mock.patch.object(common, "checkpoint", side_effect=common.checkpoint) as checkpoint:
        again, same = short_run(program, folders, tmp_path / "checkpointed", "--checkpoint_blocks")
    assert checkpoint.called and again == losses and all(torch.equal(same[k], v) for k, v in weights.items())
    # without a compiler: what torch.compile makes of the blocks, run by torch's own operations
    torch.compiler.reset()
    real, limit = nn.Module.compile, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with limit, mock.patch.object(nn.Module, "compile", lambda block: real(block, backend="aot_eager")):
        torch._dynamo.utils.counters.clear()
        again, close = short_run(program, folders, tmp_path / "compiled", "--compile", "--checkpoint_blocks")
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(losses)  # not one a step
    assert again == pytest.approx(losses, rel=1e-3) and close.keys() == weights.keys()


@slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_compiled_steps_are_the_steps(tmp_path):
    torch.compiler.reset()
    cases = [(partial(step_outcome, "ct"), STEPS["ct float32"]), (refiner_outcome, REFINER_STEPS["refine"])]
    for outcome, changes in cases:
        with contextlib.redirect_stdout(io.StringIO()):
            plain, compiled = (outcome(2, tmp_path, compile=c, **changes) for c in (False, True))
        tolerance = 1e-5 if changes.get("dtype") else 1e-10
        assert error(compiled["losses"], plain["losses"]) < tolerance
        assert all_equal(compiled["gradients"][0], plain["gradients"][0], tolerance)


@all_papers
def test_2b14_is_built_by_every_paper(monkeypatch, program):
    """On the meta device: every module of a program by its own `prepare`, and the shapes of what they compute."""
    meta = torch.device("meta")
    monkeypatch.setattr(program, "start", lambda: meta)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta device
    with meta:
        s, *parts = program.prepare(["--cost", "--model", "vit_2b14"])
        x, index = torch.zeros(2, 3, 224, 224), torch.zeros(2).long()
        modules = [m for m in parts if isinstance(m, nn.Module)]
        if program is vicmae:
            modules = list(vicmae.models(s, "vicmae"))
        elif program is can:
            modules = [parts[-1]["can"][1]]
        elif program is cmae:
            modules = list(parts[-1]["cmae"])
        encoder = next(m for module in modules for m in module.modules() if isinstance(m, common.ViT))
        ids_keep, ids_restore, _ = common.random_masking(torch.zeros(2, 256), 0.75)
        tokens = encoder(x, ids_keep)
        if program is can:
            y, rec, denoise = modules[0].encode(x[None], torch.zeros(1, 2, 256), torch.zeros(1, 2), x[None])
            assert y.shape == (1, 2, 2560) and modules[0].objective(y, rec, denoise)[0].shape == ()
        elif program is cmae:
            online, target = modules
            y, z = online.feature(tokens, ids_restore), target.feature(x, torch.arange(256).expand(2, -1))
            assert y.shape == z.shape == (2, 2560) and online.G_p(tokens, ids_restore).shape == (2, 256, 588)
            assert online.predictor(online.projector(y)).shape == target.projector(z).shape == (2, 256)
        else:
            decoder, head = modules[1:]
            assert decoder(tokens, ids_restore).shape == (2, 256, 588)
            if program is mae_ct:
                loss, aux = head.loss(tokens[:, 0], tokens[:, 0], index, index, torch.zeros(2, 2), 0.2, 20)
                assert loss.shape == () and aux["z1"].shape == (2, 256)
            elif program is mim_refiner:
                y = torch.stack([t[:, 0] for t in encoder(x, blocks=parts[-1])], 1)[:, None].expand(-1, 12, -1, -1)
                losses, aux = head.loss(y, index, index, torch.zeros(2, 2), s, 20)
                assert parts[-1] == list(range(17, 25)) and losses.shape == (8,) and aux["z"].shape == (8, 2, 256)
            else:
                assert head(head.pool(tokens)).shape == (2, 5120)
    block = 12 * 2560**2 + 13 * 2560
    assert tokens.is_meta and tokens.shape == (2, 65, 2560)
    assert sum(p.numel() for p in encoder.parameters()) == 24 * block + (589 + 1 + 257 + 2) * 2560


def test_multiply_adds_of_the_largest_encoders_by_arithmetic(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    for model, d, depth in (("vit_h14", 1280, 32), ("vit_2b14", 2560, 24)):
        s = can.Settings(model=model)
        with torch.device("meta"):
            found = can.multiply_adds(can.CAN(s))
        assert found == pytest.approx(can_multiply_adds(s, d, depth, 4096, 128), rel=1e-12)


def test_the_peak_of_a_stage_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = lambda name: int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20  # GiB
    torch.ones(2**28)  # 1 GiB, given back at once
    before = read("VmRSS")
    assert read("VmHWM") > before + 0.9
    columns, row = main(*TINY, "--stages", "mae", "--cost").splitlines()
    assert 0.1 < dict(zip(columns.split(), map(float, row.split()[1:])))["peak/GiB"] < before + 0.5


def test_cost_is_arithmetic_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # 4 patches of 8 x 8 in 16 x 16 pixels, of which one stays: 6 blocks of width 128, decoder of 1 block of 16
    block = lambda tokens, d: 12 * tokens * d**2 + 2 * tokens**2 * d
    forward = 6 * block(2, 128) + 2 * 128 * 16 + block(5, 16) + 5 * 16 * 192
    expected = (3 * forward + 2 * 4 * 192 * 128) / 1e6  # no gradient flows on to the pixels
    programs = {mae_ct: [*TINY, "--stages", "mae"], mim_refiner: REFINER, cmae: [*CMAE_TINY, "--methods", "mae,cmae"]}
    programs |= {vicmae: VICMAE}
    for program, flags in programs.items():
        columns, *rows = [line.split() for line in main(*flags, "--cost", program=program).splitlines()]
        table = {row[0]: dict(zip(columns, map(float, row[1:]))) for row in rows}
        assert table["mae"]["madds/M"] == pytest.approx(expected, abs=0.06), program
        assert all(row["images/s"] > 0 and row["peak/GiB"] > 0 and row["madds/M"] > 0 for row in table.values())
        assert table.keys() == {mae_ct: {"mae"}, mim_refiner: {"mae", "heads", "refine"}, cmae: {"mae", "cmae"},
                                vicmae: {"mae", "vicmae"}}[program]  # fmt: skip
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- evaluation


def knn_data():
    """Three overlapping classes: train features and labels, test features and labels."""
    x = normal(113, 6) + 0.7 * F.one_hot(torch.arange(113) % 3, 6).double()
    y = torch.arange(113) % 3
    return x[:80].float(), y[:80], x[80:].float(), y[80:]


@pytest.mark.parametrize("temperature", [0.07, 0])
@pytest.mark.parametrize("standardize", [True, False])
def test_knn_is_a_vote_weighted_by_similarity(temperature, standardize):
    train_x, train_y, test_x, test_y = knn_data()
    found = protocols.knn(train_x, train_y, test_x, test_y, (1, 7, 20), temperature, standardize)["knn_by_k"]
    a, b = train_x.double().numpy(), test_x.double().numpy()
    if standardize:
        mean, std = a.mean(0), a.std(0, ddof=1) + 1e-6
        a, b = (a - mean) / std, (b - mean) / std
    for k in (1, 7, 20):
        right = 0
        for n in range(len(b)):
            similarity = [x @ b[n] / np.linalg.norm(x) / np.linalg.norm(b[n]) for x in a]
            votes = [0.0] * 3
            for i in sorted(range(len(a)), key=lambda i: -similarity[i])[:k]:
                votes[train_y[i]] += math.exp(similarity[i] / temperature) if temperature else similarity[i]
            right += votes.index(max(votes)) == test_y[n]
        assert found[k] == pytest.approx(100 * right / len(b))


def test_knn_is_scikit_learns():
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y, test_x, test_y = knn_data()
    found = protocols.knn(train_x, train_y, test_x, test_y, ks=(5, 10, 30))
    for k, accuracy in found["knn_by_k"].items():
        weights = lambda distances: np.exp((1 - distances) / 0.07)
        reference = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine").fit(train_x, train_y)
        assert accuracy == pytest.approx(100 * reference.score(test_x, test_y))
    assert found["knn"] == max(found["knn_by_k"].values()) == found["knn_by_k"][found["k"]]


def test_knn_of_the_last_blocks_is_of_their_features_side_by_side(folders, tmp_path):
    file, data = tmp_path / "encoder.pt", folders / "labelled"
    common.save_encoder(file, nano(depth=3))
    encoder, run = common.load_encoder(file), protocols.Machine(CPU)
    (x, y), (test_x, _) = (protocols.features(encoder, i, run, [1, 2, 3]) for i in common.load_splits(str(data), labels=True))

    def asked(*flags):
        argv = ["knn", "--encoder", file, "--data", data, "--precision", "float32", "--workers", 0, "--k", 3, *flags]
        with mock.patch.object(protocols, "knn", return_value={"knn": 1.0}) as knn:
            with mock.patch("torch.cuda.is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
                protocols.main([str(a) for a in argv])
        return [(call.args[0], call.args[2], call.kwargs) for call in knn.call_args_list]

    dino = dict(ks=[3], temperature=0.07, standardize=False)
    ((found, found_test, how),) = asked("--last", 2, "--standardize")
    assert error(found, torch.cat([x[:, 1], x[:, 2]], 1)) < 1e-6 and how == dino | dict(standardize=True)
    assert error(found_test, torch.cat([test_x[:, 1], test_x[:, 2]], 1)) < 1e-6
    ((found, _, how),) = asked("--raw")
    assert error(found, x[:, 2]) < 1e-6 and how == dino
    ((found, _, _),) = asked()
    assert error(found, protocols.features(encoder, common.load_images(str(data), "train"), run)[0]) < 1e-6
    calls = asked("--per_block", "--votes", "similarity")
    assert len(calls) == 3 and all(how == dino | dict(temperature=0) for *_, how in calls)
    order = torch.stack([(calls[0][0] - row).abs().sum(1).argmin() for row in x[:, 0]])  # a bank is in an order of its own
    for block, (found, found_test, _) in enumerate(calls):
        assert error(found[order], x[:, block]) < 1e-6 and error(found_test, test_x[:, block]) < 1e-6


def test_nearest_in_chunks_is_nearest_at_once():
    train, test = common.normalize(normal(57, 8)), common.normalize(normal(9, 8, seed=1))
    order = (test @ train.T).argsort(1, descending=True)[:, :6]
    for chunk in (4, 5, 20, 57, 100):
        similarity, index = protocols.nearest(train, test, 6, chunk)
        assert torch.equal(index, order)
        assert error(similarity, (test @ train.T).gather(1, order)) < 1e-12


def test_features_are_those_of_each_image_alone_in_order():
    encoder, images = vit(pool="mean").float(), Images(torch.arange(9), [], pixels=pictures(9, 32, 32))
    x, y = protocols.features(encoder, images, protocols.Machine(CPU))
    for n in range(9):
        tokens = encoder(common.augment(images.pixels[n : n + 1]))
        assert error(x[n], tokens[0, 1:].mean(0)) < 1e-5
    assert torch.equal(y, torch.arange(9)) and not x.requires_grad


def test_an_unreadable_image_is_evaluated_as_the_one_in_its_place(tmp_path):
    files = write_pictures(tmp_path, [(32 + i, 32) for i in range(4)], "jpg")
    files[1].write_bytes(files[1].read_bytes()[:200])
    x, y = protocols.features(vit().float(), Images(torch.arange(4), list("abcd"), files=files), protocols.Machine(CPU))
    assert y.tolist() == [0, 2, 2, 3] and torch.equal(x[1], x[2])


def test_probes_side_by_side_are_probes_alone():
    x, y, steps = normal(60, 5).float(), torch.arange(60) % 3, 12
    batches, lrs = list(protocols.cached_batches(x, y, 20, 4)), (0.1, 0.5, 3.0)
    result, probes, number = protocols.probe(batches, steps, 2, 3, x, y, 20, lrs)
    torch.manual_seed(0)
    start = protocols.Probes(3, 5, 3)
    for i, lr in enumerate(lrs):
        norm, linear = nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)
        linear.weight.data, linear.bias.data = start.weight.data[i].clone(), start.bias.data[i].clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9)
        for step, (a, b) in enumerate(batches):
            factor = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 10)) / 2
            optimizer.param_groups[0]["lr"] = lr * 20 / 256 * factor
            optimizer.zero_grad()
            F.cross_entropy(linear(norm(a)), b).backward()
            optimizer.step()
        assert error(probes.weight[i], linear.weight) < 1e-5 and error(probes.bias[i], linear.bias) < 1e-4
        accuracy = 100 * (linear(norm.eval()(x)).argmax(1) == y).float().mean().item()
        assert result["probe_by_lr"][lr] == pytest.approx(accuracy)
    assert result["probe"] == max(result["probe_by_lr"].values()) == result["probe_by_lr"][result["lr"]]
    assert lrs[number] == result["lr"] and result.keys() == {"probe", "lr", "probe_by_lr"}


@pytest.mark.parametrize("lars", [False, True])
def test_probes_of_several_feature_sets_are_probes_of_each(lars):
    x, y, lrs, widths = normal(60, 5).float(), torch.arange(60) % 3, (0.002, 40.0), {"a": 2, "b": 3}
    x[:, 2:] += F.one_hot(y, 3)  # the better set
    batches = list(protocols.cached_batches(x, y, 20, 10))
    result, probes, number = protocols.probe(batches, 30, 3, 3, x, y, 20, lrs, widths, lars)
    torch.manual_seed(0)
    starts = [protocols.Probes(1 if lars else 2, d, 3) for d in widths.values() for _ in range(2 if lars else 1)]
    accuracy = {}
    for s, (name, columns) in enumerate((("a", slice(2)), ("b", slice(2, None)))):
        for i, lr in enumerate(lrs):
            start, row = (starts[2 * s + i], 0) if lars else (starts[s], i)
            w, b = start.weight.data[row].clone().requires_grad_(), start.bias.data[row].clone().requires_grad_()
            norm, momenta = nn.BatchNorm1d(w.shape[1], affine=False), [0, 0]
            for step, (batch, labels) in enumerate(batches):
                rate = lr * 20 / 256 * ((step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 27)) / 2)
                loss = F.cross_entropy(norm(batch[:, columns]) @ w.T + b, labels)
                grads = list(torch.autograd.grad(loss, (w, b)))
                if lars:
                    grads[0] *= 0.001 * w.detach().square().sum().sqrt() / grads[0].square().sum().sqrt()
                momenta = [0.9 * m + g for m, g in zip(momenta, grads)]
                for p, m in zip((w, b), momenta):
                    p.data -= rate * m
            accuracy[name, lr] = 100 * ((norm.eval()(x[:, columns]) @ w.T + b).argmax(1) == y).float().mean().item()
            if (name, lr) == (result["features"], result["lr"]):
                assert error(probes.weight[number], w) < 1e-4 and error(probes.bias[number], b) < 1e-4
    assert result["features"] == "b" and result["probe"] == pytest.approx(max(accuracy.values()))
    assert result["probe_by_lr"] == pytest.approx({lr: accuracy["b", lr] for lr in lrs})
    assert result["probe_by_features"] == pytest.approx({n: max(accuracy[n, lr] for lr in lrs) for n in widths})
    assert len({round(a) for a in accuracy.values()}) > 2


def test_probe_rates_are_table_11s():
    assert protocols.PROBE_LRS == (0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)


def test_grids_have_as_many_probes_as_the_papers():
    grids = {name: len(r.lrs) * len(r.grid) for name, r in protocols.PROBE_RECIPES.items() if r.grid}
    assert grids == {"dinov2": 52, "dinov2_reduced": 8}
    assert protocols.PROBE_RECIPES["dinov2_reduced"].lrs == (0.001, 0.002, 0.005, 0.01)


def test_feature_sets_are_tokens_of_the_last_blocks_side_by_side():
    encoder, x = vit(), normal(2, 3, 32, 32)
    blocks = [encoder.blocks[0](encoder.embed(x))]
    blocks += [encoder.blocks[1](blocks[0])]
    blocks += [encoder.blocks[2](blocks[1])]
    final = encoder.norm(blocks[2])
    expected = [final[:, 0], final[:, 1:].mean(1), blocks[1][:, 1:].mean(1), blocks[2][:, 1:].mean(1)]
    for tokens in blocks:
        expected += [tokens[:, 0], tokens[:, 1:].mean(1)]
    found = protocols.feature_sets(encoder, x, [(1, "both"), (2, "mean"), (3, "both")])
    assert found.dtype == torch.float64 and error(found, torch.cat(expected, 1)) < 1e-12


@pytest.mark.parametrize("recipe, last, pool", [("dinov2", 1, None), ("mae_ct", 2, None), ("lars", 1, "both"),
                                                ("vicmae", 3, "cls"), ("dinov2_reduced", 1, None)])  # fmt: skip
def test_the_best_probe_is_written_as_a_classifier_of_its_features(recipe, last, pool, tmp_path):
    encoder = vit(depth=4, pool="mean").float().requires_grad_(False)
    train, val = (Images(torch.arange(n) % 4, list("abcd"), pixels=pictures(n, 32, 32, seed=n)) for n in (48, 40))
    for images in (train, val):  # a colour for each class, and noise
        images.pixels[torch.arange(len(images)), images.labels % 3] //= 2
    run, seen = protocols.Machine(CPU), []
    real = protocols.augmented_batches
    record = lambda *args, **how: seen.append((args, how)) or real(*args, **how)
    with mock.patch.object(protocols, "augmented_batches", record):
        result, classifier = protocols.linear_probe(encoder, train, val, run, recipe, 3, 16, last, pool)
    args, how = seen[0]
    assert args[3:5] == (16, 3) and how["flip"] == (recipe not in ("lars", "vicmae"))
    classifier.save(tmp_path / "probe.pt", False)
    logits, y = protocols.outputs(protocols.load_classifier(tmp_path / "probe.pt", encoder), val, 32, run)
    assert 100 * (logits.argmax(1) == y).float().mean().item() == pytest.approx(result["probe"], abs=1e-4)
    assert result["probe"] > 30  # chance is 25
    if recipe.startswith("dinov2"):
        names = [f"{pool} of the last {what}" for what in ("block", "4 blocks") for pool in ("mean", "both")]
        assert list(result["probe_by_features"]) == (names if recipe == "dinov2" else names[2:])
    elif last > 1:
        assert classifier.blocks == list(range(5 - last, 5)) and classifier.pool == (pool or "mean")


def test_cached_batches_visit_every_sample_once_an_epoch_and_are_split_over_ranks(monkeypatch):
    x, y = torch.arange(20).float()[:, None], torch.arange(20)
    whole = [b[1] for b in protocols.cached_batches(x, y, 4, 2)]
    assert len(whole) == 10 and all(sorted(torch.cat(whole[i : i + 5]).tolist()) == list(range(20)) for i in (0, 5))
    monkeypatch.setattr(common, "world", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda: rank)
        parts.append([b[1] for b in protocols.cached_batches(x, y, 4, 2)])
    assert all(torch.equal(torch.cat([a, b]), w) for a, b, w in zip(*parts, whole, strict=True))


def test_augmented_batches_are_features_of_crops():
    encoder, images = vit().float(), tiny_images(12)
    found = list(protocols.augmented_batches(lambda x: encoder(x)[:, 0], images, 32, 4, 2, protocols.Machine(CPU)))
    batches = list(common.batches(images, [View(32, (0.08, 1.0))], 4, 0, 6, 0, CPU, 0, {}))
    assert len(found) == 6
    for (x, y), data in zip(found, batches):
        assert torch.equal(y, data.labels) and error(x, encoder(common.augment(data.views[0]))[:, 0]) < 1e-5


def finetuned(encoder, images, blocks):
    """A plain loop: a classifier on the pooled feature and the last blocks, by torch's AdamW; logits of `images`."""
    torch.manual_seed(0)
    head = nn.Linear(32, 4)
    nn.init.normal_(head.weight, std=2e-5), nn.init.zeros_(head.bias)
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    tuned = [*encoder.blocks[3 - blocks :], encoder.norm] if blocks else []
    if blocks == 3:
        tuned = [encoder]
    parameters = [p for m in (*tuned, head) for p in m.parameters() if p is not encoder.pos_embed]
    for p in parameters:
        p.requires_grad_(True)
    vectors = [p for p in parameters if p.ndim == 1 or p is encoder.cls_token]
    matrices = [p for p in parameters if not any(p is v for v in vectors)]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0)],
                                  betas=(0.9, 0.999))  # fmt: skip
    for step, data in enumerate(common.batches(images, [View(32, (0.08, 1))], 8, 0, 20, 0, CPU, 0, {})):
        logits = head(encoder(common.augment(data.views[0]))[:, 1:].mean(1))
        optimizer.zero_grad()
        F.cross_entropy(logits, data.labels).backward()
        warm, rate = 2, 2.0 * 8 / 256
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (20 - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
    return head(encoder(common.augment(images.pixels))[:, 1:].mean(1))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_finetuning_trains_the_last_blocks_and_a_linear_classifier(blocks):
    encoder, images = vit(pool="mean").float(), Images(torch.arange(32) % 4, list("abcd"), pixels=pictures(32, 32, 32))
    before, logits = copy.deepcopy(encoder.state_dict()), []
    real = nn.Linear.forward
    record = lambda self, x: logits.append(real(self, x)) or logits[-1]
    with mock.patch.object(nn.Linear, "forward", record):
        off = protocols.CROP_FLIP | dict(warmup=0.1, layer_decay=1.0, drop_path=0.0, label_smoothing=0.0)
        s = protocols.FineTuning(**off, blocks=blocks, epochs=5, lr=2.0, batch=8)
        found, _ = protocols.finetune(encoder, images, images, protocols.Machine(CPU), s)
    expected = finetuned(encoder, images, blocks)
    assert error(logits[-1], expected) < 1e-3  # after 20 steps of AdamW in float32
    assert found["finetune"] == pytest.approx(100 * (expected.argmax(1) == images.labels).float().mean().item())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())  # a copy was tuned


def test_recipes_are_those_of_the_tables():
    settings = lambda name, dim=768: protocols.FineTuning(**protocols.recipe(name, dim))
    row = lambda s: (s.epochs, s.warmup * s.epochs, s.batch, s.lr, s.weight_decay, s.layer_decay, s.drop_path)
    augmentations = lambda s: (s.randaugment, s.mixup, s.cutmix, s.erasing)
    every, none = (2, 0.8, 1.0, 0.25), (0, 0, 0, 0)
    expected = {
        ("mae", 768): ((100, 5, 1024, 1e-3, 0.05, 0.75, 0.1), every),
        ("mae", 1024): ((50, 5, 1024, 1e-3, 0.05, 0.75, 0.2), every),
        ("mae", 1280): ((50, 5, 1024, 1e-3, 0.05, 0.75, 0.3), every),
        ("lowshot", 768): ((100, 5, 512, 3e-5, 0.05, 0.65, 0.0), (2, 0, 0, 0)),  # MAE-CT Table 12
        ("lowshot", 1280): ((50, 5, 512, 3e-5, 0.05, 0.75, 0.0), (2, 0, 0, 0)),
        ("crop_flip", 1280): ((50, 5, 512, 1e-3, 0.05, 0.75, 0.3), none),
        ("inat18", 1024): ((50, 5, 256, 1e-3, 0.05, 0.75, 0.0), none),  # MIM-Refiner Table 12
        ("can", 1024): ((100, 5, 1024, 5e-4, 0.005, 0.65, 0.1), (2, 0, 0, 0.25)),  # CAN Table 10
        ("cmae", 768): ((100, 5, 1024, 2.5e-4, 0.05, 0.75, 0.1), every),
        ("partial", 768): ((100, 5, 1024, 1e-3, 0.05, 0.75, 0.1), every),  # He et al. A.1, Table 9
        ("partial", 1280): ((50, 5, 1024, 1e-3, 0.05, 0.75, 0.2), every),
        ("vicmae", 768): ((100, 5, 1024, 1e-3, 0.05, 0.75, 0.1), (2, 0.8, 0, 0)),  # ViC-MAE Table 8
        ("vicmae_subset", 768): ((100, 5, 1024, 1e-3, 0.05, 0.75, 0.1), none),
    }
    for (name, dim), (values, chosen) in expected.items():
        s = settings(name, dim)
        assert row(s) == pytest.approx(values) and augmentations(s) == chosen, (name, dim)
        assert s.label_smoothing == 0.1 and s.magnitude == 9
    assert [settings(name).blocks for name in protocols.RECIPES].count(-1) == len(protocols.RECIPES) - 1


STRENGTHS = [-1.0, -0.9, -0.31, 0.0, 0.42, 0.86, 1.0]
TORCHVISIONS = {  # of an image and a strength; where nothing else is said, as torchvision's RandAugment calls it
    "autocontrast": lambda x, m: tv.autocontrast(x),
    "equalize": lambda x, m: tv.equalize(x),
    "invert": lambda x, m: tv.invert(x),
    "rotate": lambda x, m: tv.rotate(x, 30 * m, InterpolationMode.BILINEAR, fill=[255 * v for v in common.MEAN]),
    "posterize": lambda x, m: tv.posterize(x, 4 - int(4 * abs(m))),
    "solarize": lambda x, m: tv.solarize(x, 256 - int(256 * abs(m))) if m else x,
    "color": lambda x, m: tv.adjust_saturation(x, max(0.1, 1 + 0.9 * m)),
    "contrast": lambda x, m: tv.adjust_contrast(x, max(0.1, 1 + 0.9 * m)),
    "brightness": lambda x, m: tv.adjust_brightness(x, max(0.1, 1 + 0.9 * m)),
    "sharpness": lambda x, m: tv.adjust_sharpness(x, max(0.1, 1 + 0.9 * m)),
    "shear_x": lambda x, m: sheared(x, [math.degrees(math.atan(0.3 * m)), 0.0]),
    "shear_y": lambda x, m: sheared(x, [0.0, math.degrees(math.atan(0.3 * m))]),
    "translate_x": lambda x, m: shifted(x, m, 2),
    "translate_y": lambda x, m: shifted(x, m, 1),
}


def sheared(x, shear):
    fill = [255 * v for v in common.MEAN]
    return tv.affine(x, 0.0, [0, 0], 1.0, shear, InterpolationMode.BILINEAR, fill=fill, center=[0, 0])


def shifted(x, m, dim):
    """By whole pixels: `m` is made so."""
    fill = torch.tensor([255 * v for v in common.MEAN]).round().byte()[:, None, None].expand_as(x)
    pixels = round(0.45 * m * x.shape[dim])
    return torch.cat([fill, x, fill], dim).narrow(dim, x.shape[dim] + pixels, x.shape[dim])


@pytest.mark.parametrize("name", protocols.RAND_AUGMENT)
def test_operations_of_randaugment_are_torchvisions_with_a_strength_an_image(name):
    x, strengths = pictures(len(STRENGTHS), 40, 40), STRENGTHS
    if name.startswith("translate"):
        strengths = [round(0.45 * m * 40) / (0.45 * 40) for m in STRENGTHS]
    found = protocols.RAND_AUGMENT[name](x, torch.tensor(strengths))
    assert found.dtype == torch.uint8
    if name == "solarize_add":  # by the formula of timm's
        expected = [np.where(i < 128, i + int(110 * abs(m)), i) for i, m in zip(x.int().numpy(), strengths)]
        assert np.array_equal(found.numpy(), expected)
        return
    expected = torch.stack([TORCHVISIONS[name](i, m) for i, m in zip(x, strengths)])
    # torchvision cuts fractions off where this rounds, those of the gray too
    compared = torch.ones_like(x, dtype=torch.bool)
    if name in ("rotate", "shear_x", "shear_y"):  # on its edge torchvision weighs the image twice: those pixels are left out
        inside = torch.stack([TORCHVISIONS[name](torch.ones(3, 40, 40), m) for m in strengths])
        compared = (inside == 1) | (inside == torch.tensor(common.MEAN)[:, None, None] * 255)
        assert compared.float().mean() > 0.95
    levels = {"color": 2, "brightness": 1, "sharpness": 1, "contrast": 2, "rotate": 1, "shear_x": 1, "shear_y": 1}
    assert (found.int() - expected.int()).abs()[compared].max() <= levels.get(name, 0)


def test_operations_and_their_strengths_are_timms():
    from timm.data import auto_augment

    names = "AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd ColorIncreasing"
    names += " ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY TranslateXRel TranslateYRel"
    assert auto_augment._RAND_INCREASING_TRANSFORMS == names.split()
    assert [n.replace("Increasing", "").replace("Rel", "").lower() for n in names.split()] == [
        n.replace("_", "") for n in protocols.RAND_AUGMENT
    ]
    x = pictures(1, 40, 40)[0]
    picture = Image.fromarray(x.permute(1, 2, 0).numpy())
    for timms, operation in zip(names.split(), protocols.RAND_AUGMENT.values()):
        for level in (3, 9):
            with mock.patch("random.random", lambda: 0.0):  # positive signs
                argument = auto_augment.LEVEL_TO_ARG[timms]
                args = argument(level, {}) if argument else ()
            same = dict(resample=Image.Resampling.BILINEAR, fillcolor=tuple(round(255 * v) for v in common.MEAN))
            expected = np.array(auto_augment.NAME_TO_OP[timms](picture, *args, **same)).transpose(2, 0, 1).astype(int)
            found = [operation(x[None], torch.tensor([sign * level / 10]))[0].int().numpy() for sign in (1, -1)]
            far = min((np.abs(f - expected) > 2).mean() for f in found)  # PIL does not blend the fill into the image
            assert far < (0.1 if "X" in timms or "Y" in timms or timms == "Rotate" else 1e-3), (timms, level, far)


def test_randaugment_gives_every_image_operations_of_its_own():
    x, noise = pictures(60, 24, 24), uniform((0, "noise"), torch.arange(60), 2, 4)
    noise[0, 0] = torch.tensor([0.99999, 0.7, 0.0, 0.2])  # the last operation, at the lowest amount there is
    found, operations = protocols.rand_augment(x, noise, 9.0), list(protocols.RAND_AUGMENT.values())
    used = set()
    for i in range(60):
        image = x[i : i + 1]
        for choice, sign, amount, applied in noise[i].tolist():
            if applied < 0.5:
                strength = scipy.stats.norm.ppf(max(amount, 2**-25), loc=9, scale=0.5) / 10
                strength = min(1.0, max(0.0, strength)) * (-1 if sign < 0.5 else 1)
                image = operations[int(choice * 15)](image, torch.tensor([strength], dtype=torch.float32))
                used.add(int(choice * 15))
        assert (found[i].int() - image[0].int()).abs().max() <= 1, i
    assert len(used) == 15 and torch.equal(x, pictures(60, 24, 24))


def test_erasing_fills_boxes_of_some_images_with_noise():
    x, noise = normal(200, 3, 32, 32), uniform((0, "erasing"), torch.arange(200), 23)
    pixels = lambda rows: uniform((0, "pixels"), rows, 3, 32, 32)
    found = protocols.random_erasing(x.clone(), noise, pixels, 0.25)
    erased = 0
    for i, u in enumerate(noise.tolist()):
        expected = x[i].clone()
        for a, r in zip(u[:10], u[10:20]) if u[20] < 0.25 else []:
            area, ratio = (0.02 + a * (1 / 3 - 0.02)) * 32 * 32, 0.3 * (1 / 0.3**2) ** r
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < 32 and w < 32:
                top, left = int(u[21] * (33 - h)), int(u[22] * (33 - w))
                fresh = scipy.stats.norm.ppf(pixels(torch.tensor([i]))[0].double().clamp(min=2**-25))
                expected[:, top : top + h, left : left + w] = torch.from_numpy(fresh)[:, top : top + h, left : left + w]
                erased += 1
                break
        assert error(found[i], expected) < 1e-5, i
    assert 30 < erased < 70


@pytest.mark.parametrize("mixup, cutmix, mix_prob", [(0.8, 1.0, 1.0), (0.8, 0.0, 0.6), (0.0, 1.0, 1.0), (0.3, 0.5, 0.7)])
def test_mixup_and_cutmix_mix_neighbours_and_their_labels(mixup, cutmix, mix_prob):
    s = protocols.FineTuning(mixup=mixup, cutmix=cutmix, mix_prob=mix_prob)
    x, target = normal(40, 3, 16, 16), F.one_hot(torch.arange(40) % 7, 7).double()
    noise = uniform((0, "mix"), torch.arange(40) // 2, 5)
    found, mixed = protocols.mix(x, target, noise, s)
    kinds = collections.Counter()
    for i, (kind, amount, row, column, applied) in enumerate(noise.double().tolist()):
        other, image, lam = i + 1 - 2 * (i % 2), x[i].clone(), 1.0
        cut = cutmix and (not mixup or kind < 0.5)
        if applied < mix_prob:
            lam = scipy.stats.beta.ppf(amount, *([cutmix if cut else mixup] * 2))
            if cut:
                side = int(16 * math.sqrt(1 - lam))
                top, left = int(row * 16) - side // 2, int(column * 16) - side // 2
                pixels = 0
                for r in range(max(top, 0), min(top + side, 16)):
                    for c in range(max(left, 0), min(left + side, 16)):
                        image[:, r, c] = x[other, :, r, c]
                        pixels += 1
                lam = 1 - pixels / 256
            else:
                image = lam * image + (1 - lam) * x[other]
        kinds[bool(cut), applied < mix_prob] += 1
        assert error(found[i], image) < 1e-10 and error(mixed[i], lam * target[i] + (1 - lam) * target[other]) < 1e-10
    assert len(kinds) == (1 + (mixup > 0 and cutmix > 0)) * (1 + (mix_prob < 1))


def test_a_step_of_fine_tuning_has_every_regulariser_where_it_belongs():
    """Against a loop over images with timm's soft cross-entropy."""
    from timm.loss import SoftTargetCrossEntropy

    encoder, images = vit().float(), Images(torch.arange(16) % 4, list("abcd"), pixels=pictures(16, 32, 32))
    s = protocols.FineTuning(epochs=1, warmup=0, batch=8, lr=0.3, drop_path=0.4, erasing=0.6, weight_decay=0.2)
    gradients, real = [], common.average_gradients
    keep = lambda parameters: (gradients.append([p.grad.clone() for p in parameters]), real(parameters))[1]
    with mock.patch.object(protocols, "average_gradients", keep):
        _, classifier = protocols.finetune(encoder, images, images, protocols.Machine(CPU), s)

    torch.manual_seed(0)
    head = nn.Linear(32, 4)
    nn.init.normal_(head.weight, std=2e-5), nn.init.zeros_(head.bias)
    tuned = copy.deepcopy(encoder)
    tuned.pos_embed.requires_grad_(False)
    rate = lambda name: 0.75 ** (
        0 if name.startswith(("norm", "head")) else 3 - int(name[7]) if name.startswith("blocks") else 4
    )
    parameters = dict(tuned.named_parameters()) | {f"head.{n}": p for n, p in head.named_parameters()}
    parameters = {n: p for n, p in parameters.items() if p.requires_grad}
    decay = lambda name, p: 0.0 if p.ndim == 1 or name == "cls_token" else 0.2
    groups = [dict(params=[p], weight_decay=decay(n, p), rate=rate(n)) for n, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    for step, data in enumerate(common.batches(images, [View(32, (0.08, 1))], 8, 0, 2, 0, CPU, 0, {})):
        u = lambda name, *shape: uniform((0, step, name), torch.arange(8), *shape)
        x = common.augment(protocols.rand_augment(data.views[0], u("randaugment", 2, 4)))
        pixels = lambda at: uniform((0, step, "erased"), at, 3, 32, 32)
        x = protocols.random_erasing(x, u("erasing", 23), pixels, 0.6)
        target = F.one_hot(data.labels, 4).float()
        x, target = protocols.mix(x, target, uniform((0, step, "mix"), torch.arange(8) // 2, 5), s)
        dice, loss = u("drop", 3, 2), 0
        for i in range(8):
            tokens = tuned.embed(x[i : i + 1])
            for b, block in enumerate(tuned.blocks):
                p = [0, 0.2, 0.4][b]
                if dice[i, b, 0] >= p:
                    tokens = tokens + block.attn(block.norm1(tokens)) / (1 - p)
                if dice[i, b, 1] >= p:
                    tokens = tokens + block.mlp(block.norm2(tokens)) / (1 - p)
            smooth = 0.9 * target[i : i + 1] + 0.1 / 4
            loss = loss + SoftTargetCrossEntropy()(head(tuned.norm(tokens)[:, 0]), smooth) / 8
        optimizer.zero_grad()
        loss.backward()
        if step == 0:  # later ones differ by what AdamW makes of rounding errors
            expected = {p.grad.shape: p.grad.abs().sum() for p in parameters.values()}
            found = sorted(g.abs().sum().item() for g in gradients[0])
            assert found == pytest.approx(sorted(p.grad.abs().sum().item() for p in parameters.values()), rel=1e-4)
            assert len(expected) > 5
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * 8 / 256 * group["rate"] * (1, 0.5)[step]  # half a cosine over two steps
        optimizer.step()
    assert error(classifier.head.weight, head.weight) < 1e-3
    for found, p in zip(classifier.encoder.parameters(), tuned.parameters()):
        assert error(found, p) < 1e-2


def tuned_by(folders, tmp_path, *flags):
    """The JSON that `eval.py finetune` writes for a small encoder on labelled pictures."""
    common.save_encoder(tmp_path / "encoder.pt", nano(image_size=16))
    argv = ["finetune", "--encoder", tmp_path / "encoder.pt", "--data", folders / "labelled", "--epochs", 2, *flags]
    printed = main(*argv, "--batch", 4, "--workers", 0, "--precision", "float32", program=protocols)
    return json.loads((tmp_path / "finetune.json").read_text()), printed


def test_a_tuned_classifier_is_read_again_with_its_accuracy(folders, tmp_path):
    result, printed = tuned_by(folders, tmp_path, "--lr", "1e-2")
    assert result["settings"]["recipe"] == "mae" and result["images"] == 16 and len(result["finetune_by_epoch"]) == 2
    assert f"epoch 2: {result['finetune']:.2f}" in printed and result["finetune"] == result["finetune_by_epoch"][1]
    classifier = protocols.load_classifier(tmp_path / "finetuned.pt", common.load_encoder(tmp_path / "encoder.pt"))
    _, val = common.load_splits(str(folders / "labelled"))
    logits, y = protocols.outputs(classifier, val, 16, protocols.Machine(CPU))
    assert 100 * (logits.argmax(1) == y).float().mean().item() == pytest.approx(result["finetune"])
    again = common.load_encoder(tmp_path / "finetuned.pt")  # as --encoder reads it
    before = common.load_encoder(tmp_path / "encoder.pt")
    assert not torch.equal(again.patch_embed.proj.weight, before.patch_embed.proj.weight)
    norm = partial(nn.LayerNorm, eps=1e-6)
    size = dict(img_size=16, patch_size=8, embed_dim=128, depth=2, num_heads=4)
    reference = timm.models.vision_transformer.VisionTransformer(**size, num_classes=0, norm_layer=norm)
    reference.load_state_dict(torch.load(tmp_path / "finetuned.pt")["model"])
    x = normal(2, 3, 16, 16).float()
    assert error(classifier(x), classifier.head(reference.forward_features(x)[:, 0])) < 1e-5


def test_fine_tuning_on_a_share_of_the_images_or_on_those_of_a_list(folders, tmp_path):
    names = ["a/000.png", "a/003.png", "b/001.png", "b/007.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    seen, real = [], protocols.batches
    record = lambda images, *args: (seen.append(images), real(images, *args))[1]
    with mock.patch.object(protocols, "batches", record):
        assert tuned_by(folders, tmp_path, "--list", tmp_path / "list.txt")[0]["images"] == 4
        assert tuned_by(folders, tmp_path, "--fraction", "0.25")[0]["images"] == 4
    train, _ = common.load_splits(str(folders / "labelled"))
    assert torch.equal(seen[0].pixels, train.pixels[[0, 3, 9, 15]]) and seen[1].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["random", "near", "one cluster", "perfect", "more clusters"])
def test_cluster_scores_are_scikit_learns(kind):
    from sklearn import metrics

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    assigned = {
        "random": rng.integers(0, 4, 200),
        "near": np.where(rng.random(200) < 0.7, (truth + 1) % 4, rng.integers(0, 4, 200)),
        "one cluster": np.zeros(200, int),
        "perfect": (truth * 3 + 2) % 4,
        "more clusters": rng.integers(0, 6, 200),
    }[kind]
    found = protocols.cluster_scores(torch.from_numpy(truth), torch.from_numpy(assigned))
    expected = dict(
        nmi=metrics.normalized_mutual_info_score(truth, assigned),
        ami=metrics.adjusted_mutual_info_score(truth, assigned),
        ari=metrics.adjusted_rand_score(truth, assigned),
        cluster_acc=max((np.array(p)[assigned] == truth).mean() for p in itertools.permutations(range(6))),
    )
    assert found == pytest.approx({k: 100 * v for k, v in expected.items()}, abs=1e-6)


def labelled_points():
    y = torch.arange(90) % 4
    y[0] = 5  # a class of one sample, and a number that no sample has
    return normal(90, 6) + F.one_hot(y, 6), y


def test_silhouette_and_davies_bouldin_are_scikit_learns():
    from sklearn import metrics

    x, y = labelled_points()
    assert protocols.silhouette(x, y, chunk=32) == pytest.approx(100 * metrics.silhouette_score(x, y), abs=1e-6)
    assert protocols.davies_bouldin(x, y) == pytest.approx(metrics.davies_bouldin_score(x, y), abs=1e-6)


def gaussian_clusters(count, dim, clusters, noise):
    y = torch.arange(count) % clusters
    return (noise * normal(count, dim) + normal(clusters, dim, seed=1)[y]).float(), y


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_kmeans_is_not_worse_than_scikit_learns(precision):
    from sklearn.cluster import KMeans, MiniBatchKMeans

    x, _ = gaussian_clusters(1200, 16, 12, 0.7)
    assigned, losses = protocols.kmeans(x, 12, runs=30, precision=precision)
    for model in (MiniBatchKMeans, KMeans):
        theirs = [model(12, n_init=1, tol=1e-4, random_state=i).fit(x.numpy()).inertia_ for i in range(30)]
        assert losses.min() <= 1.005 * min(theirs)
    best = assigned[losses.argmin()]
    centres = torch.stack([x[best == c].mean(0) for c in range(12)])
    assert losses.min().item() == pytest.approx((x - centres[best]).square().sum().item(), rel=1e-4)
    assert (torch.cdist(x, centres).argmin(1) == best).float().mean() > 0.995  # it stands still, in float32 as well


def test_kmeans_runs_differ_and_repeat():
    x = normal(60, 3).float()
    assigned, losses = protocols.kmeans(x, 4, runs=5)
    assert assigned.shape == (5, 60) and losses.shape == (5,) and len(set(losses.tolist())) > 1
    assert torch.equal(protocols.kmeans(x, 4, runs=5)[0], assigned)
    assert not torch.equal(protocols.kmeans(x, 4, runs=5, seed=1)[0], assigned)


def test_kmeans_starts_are_points_far_apart():
    x, y = gaussian_clusters(400, 8, 20, 0.01)
    starts = protocols.kmeans_plus_plus(x, 20, 6, torch.float32, 0)
    assert all(len(set(y[run].tolist())) == 20 for run in starts)  # one in each of 20 tight clusters, never two
    assert len({tuple(run) for run in starts.tolist()}) == 6


@pytest.mark.parametrize("normalization", ["standardize", "l2"])
def test_clusters_are_scored_on_normalised_features(normalization):
    from sklearn import metrics, preprocessing

    x, y = labelled_points()
    x, y = x[1:] * torch.tensor([1, 10, 1, 1, 3, 1]) + 2, y[1:]
    found, confusion = protocols.cluster(x, y, runs=20, normalization=normalization)
    z = (
        preprocessing.StandardScaler().fit_transform(x)
        if normalization == "standardize"
        else preprocessing.normalize(x)
    )
    assert found["silhouette"] == pytest.approx(100 * metrics.silhouette_score(z, y), abs=1e-5)
    assert found["davies_bouldin"] == pytest.approx(metrics.davies_bouldin_score(z, y), abs=1e-5)
    assigned, losses = protocols.kmeans(torch.from_numpy(z), 4, runs=20)
    assert found["nmi"] == pytest.approx(protocols.cluster_scores(y, assigned[losses.argmin()])["nmi"])
    every = [metrics.normalized_mutual_info_score(y, a) for a in assigned]
    assert found["average"]["nmi"] == pytest.approx(100 * np.mean(every))
    assert confusion.sum(1).tolist() == torch.bincount(y).tolist()
    assert 100 * confusion.trace() / len(y) == pytest.approx(found["cluster_acc"])


def test_classes_of_a_file_are_clustered_alone(tmp_path):
    images = Images(torch.arange(12) % 4, list("abcd"), pixels=pictures(12, 8, 8))
    (tmp_path / "names").write_text("d\nb\n")
    found = protocols.of_classes(images, tmp_path / "names")
    assert found.classes == ["d", "b"] and found.labels.tolist() == [1, 0] * 3
    assert torch.equal(found.pixels, images.pixels[1::2])
    (tmp_path / "names").write_text("3\n1\n")  # of a set whose classes are numbers
    assert protocols.of_classes(dataclasses.replace(images, classes=range(4)), tmp_path / "names").classes == [3, 1]
    for text, fault in (("a\nx\n", "names: 'x' is no class; the data has a, b"), ("a\n", "fewer than two classes")):
        (tmp_path / "names").write_text(text)
        with pytest.raises(InputError, match=fault):
            protocols.of_classes(images, tmp_path / "names")


def test_a_drawn_matrix_is_darkest_where_its_row_is_fullest(tmp_path):
    common.draw_matrix(tmp_path / "m.png", [[9, 1], [0, 4]], ["one", "two"], side=40)
    found = np.array(Image.open(tmp_path / "m.png"))[:, 124:164].astype(int).sum(-1)
    corners = [[found[14, 10], found[14, 30]], [found[34, 10], found[34, 30]]]
    assert corners[1][1] < corners[0][0] < corners[0][1] < corners[1][0] == 3 * 255


# --------------------------------------------------------------------------------------------------------- few labels


def logistic_objective(x, y, w, penalty):
    """By a loop over samples, in float64."""
    x, w = x.double(), w.double()
    losses = [(v @ w).logsumexp(0) - v @ w[:, c] for v, c in zip(x, y.tolist())]
    return (sum(losses) / len(x) + penalty / 2 * w.square().sum()).item()


def few_points(classes=20, shots=5, dim=48, tests=0, noise=1.0):
    y = torch.arange(classes).repeat_interleave(shots + tests)
    x = (normal(classes, dim, seed=1)[y] + noise * normal(len(y), dim)).float().unflatten(0, (classes, -1))
    y = y.unflatten(0, (classes, -1))
    return [t.flatten(0, 1) for t in (x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])]


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_logistic_regression_is_scikit_learns(noise):
    from sklearn.linear_model import LogisticRegression

    x, y, test_x, test_y = few_points(tests=50, noise=noise)
    x, penalties = F.normalize(x - x.mean(1, keepdim=True), dim=1), [1e-7, 2.5e-6, 1e-4, 1e-2, 1]
    found = protocols.logistic_regression(x, y, 20, penalties)
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * len(x)), fit_intercept=False, tol=1e-10, max_iter=100_000)
        theirs = torch.from_numpy(model.fit(x.double().numpy(), y.numpy()).coef_.T)
        loss, their_loss = (logistic_objective(x, y, w, penalty) for w in (found[penalty], theirs))
        assert loss < 1.001 * their_loss
        accuracy, their_accuracy = (
            100 * ((test_x @ w.float()).argmax(1) == test_y).double().mean() for w in (found[penalty], theirs)
        )
        assert abs(accuracy - their_accuracy) <= 0.5 and accuracy > 20  # of 1000 test points


def test_lbfgs_finds_the_minimum_of_a_quadratic():
    a = normal(12, 12)
    a, b = a @ a.T + 0.1 * torch.eye(12).double(), normal(12)
    function = lambda w: ((w @ a @ w / 2 - b @ w + 100).item(), a @ w - b)
    assert error(protocols.minimise(function, torch.zeros(12).double(), 0.1, 1e-14), torch.linalg.solve(a, b)) < 1e-5


def test_fewshot_classifier_is_a_plain_loop():
    x, y, *_ = few_points(4, 3, 6)
    linear = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for step in range(30):
        rows = (uniform((0, step, "fewshot"), torch.arange(8), 1)[:, 0] * 12).long()
        optimizer.zero_grad()
        F.cross_entropy(linear(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        optimizer.step(), schedule.step()
    assert error(protocols.linear_fewshot(x, y, 4, 30, 0.5, 8).T, linear.weight) < 1e-5


def test_lowshot_is_the_mean_over_splits_of_classifiers_on_rows_of_mean_0_and_length_1():
    x, y, test_x, test_y = few_points(6, 8, 24, tests=20)
    splits = [torch.arange(first, 48, 4) for first in (0, 1)]
    found, by_hand = protocols.lowshot(x, y, test_x, test_y, splits), []
    for split in splits:
        few, test = (F.normalize(t - t.mean(1, keepdim=True), dim=1) for t in (x[split], test_x))
        w = protocols.logistic_regression(few, y[split], 6, [0.00025 / 12])[0.00025 / 12]
        by_hand.append(100 * ((test @ w).argmax(1) == test_y).float().mean().item())  # test rows too: the same classes
    assert found["by_split"] == pytest.approx(by_hand) and found["lowshot"] == pytest.approx(np.mean(by_hand))
    assert protocols.lowshot(x, y, test_x, test_y, splits, recipe="can")["lowshot"] > 50


def test_labels_are_drawn_by_class_and_by_seed():
    y = torch.arange(30) % 3
    index = protocols.drawn(y, shots=4)
    assert torch.bincount(y[index]).tolist() == [4, 4, 4] and index.tolist() == sorted(set(index.tolist()))
    assert torch.equal(index, protocols.drawn(y, shots=4)) and not torch.equal(index, protocols.drawn(y, shots=4, seed=1))
    assert torch.bincount(y[protocols.drawn(y, fraction=0.31)]).tolist() == [3, 3, 3]
    with pytest.raises(InputError, match="11 images a class are wanted, but class 0 has 10"):
        protocols.drawn(y, shots=11)


def test_lists_name_files_or_the_ends_of_paths(folders, tmp_path):
    images = common.load_images(str(folders / "labelled"), "train")
    names = [os.fsdecode(f) for f in images.files[[5, 2]]]
    for text in ("\n".join(names), "\n".join("/".join(n.split("/")[-2:]) for n in names)):
        (tmp_path / "list").write_text(text)
        assert protocols.listed(images, tmp_path / "list").tolist() == [5, 2]
    (tmp_path / "list").write_text("no_such.png")
    with pytest.raises(InputError, match="list: no_such.png names 0 images of the training set, expected one"):
        protocols.listed(images, tmp_path / "list")


def test_a_subset_keeps_what_belongs_to_its_images(folders):
    whole = common.load_images("shapes", "val")
    index = torch.tensor([3, 25, 8])
    part = whole.subset(index)
    assert all(torch.equal(getattr(part, name), getattr(whole, name)[index]) for name in ("labels", "pixels", "masks"))
    files = common.load_images(str(folders / "labelled"), "train").subset(torch.tensor([1, 0]))
    assert files.name(0) > files.name(1) and len(files) == 2
    dataset = Images(torch.arange(4), list("abcd"), dataset=[(Image.new("RGB", (2, 2), (c, c, c)), c) for c in range(4)])
    assert dataset.subset(torch.tensor([2, 0])).open(0).getpixel((0, 0)) == (2, 2, 2)


# ------------------------------------------------------------------------------------------------- retrieval and maps


@pytest.fixture
def labelled_encoder(folders, tmp_path):
    """Flags that name an encoder file of 6 blocks and 16 x 16 pixels, and labelled images (4 classes)."""
    common.save_encoder(tmp_path / "encoder.pt", randomized(common.build_vit("vit_nano8", 16)).float())
    return ["--encoder", tmp_path / "encoder.pt", "--data", folders / "labelled", "--workers", 0, "--precision", "float32"]


def protocol(name, *argv):
    """Runs a subcommand of eval.py; returns what it wrote beside the encoder, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch("torch.cuda.is_available", lambda: False):
        protocols.main([name, *map(str, argv)])
    return json.loads((Path(argv[argv.index("--encoder") + 1]).parent / f"{name}.json").read_text()), printed.getvalue()


def test_results_of_encoders_in_one_folder_stay_apart(labelled_encoder, tmp_path):
    common.save_encoder(tmp_path / "mae.pt", randomized(common.build_vit("vit_nano8", 16)).float())
    for name, prefix in (("encoder", ""), ("mae", "mae_")):
        argv = ["--encoder", tmp_path / f"{name}.pt", *labelled_encoder[2:]]
        main("probe", *argv, "--epochs", 1, "--batch", 4, program=protocols)
        main("invariance", *argv, program=protocols)  # a probe of the other encoder would be refused
        settings = json.loads((tmp_path / f"{prefix}invariance.json").read_text())["settings"]
        assert Path(settings["encoder"]).stem == name
    written = ("probe.pt", "probe.json", "invariance.json")
    expected = {"encoder.pt", "mae.pt", *written, *(f"mae_{f}" for f in written)}
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == expected


def test_retrieval_draws_nearest_neighbours_and_cluster_centres(labelled_encoder, tmp_path):
    for i, picture in enumerate(pictures(32, 16, 16)):
        file = tmp_path / "data" / ("train", "val")[i < 24] / "abcd"[i % 4] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    labelled_encoder[3], drawn = tmp_path / "data", []
    with mock.patch.object(protocols, "draw_neighbours", lambda *args: drawn.append(args)):
        found, _ = protocol("retrieve", *labelled_encoder, "--samples", 3, "--neighbours", 4)
    encoder = common.load_encoder(tmp_path / "encoder.pt")
    x, y = protocols.features(encoder, drawn[0][1], protocols.Machine(CPU))
    neighbours, clusters = (args[3] for args in drawn)
    assert neighbours.shape == (3, 5) and clusters.shape[1] == 4
    right = 0
    for row in neighbours:
        similarity = torch.cosine_similarity(x[row[:1]], x)
        similarity[row[0]] = 1 + 1e-5
        assert similarity[row].tolist() == pytest.approx(similarity.sort(descending=True).values[:5].tolist(), abs=2e-6)
        assert len(set(row.tolist())) == 5
        right += sum(y[i] == y[row[0]] for i in row[1:])
    assert found["neighbours"] == pytest.approx(100 * right.item() / 12)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    assigned, losses = protocols.kmeans(x, 4)
    best = assigned[losses.argmin()]
    for row in clusters:
        distance = (x - x[best == best[row[0]]].mean(0)).norm(dim=1)
        assert distance[row].tolist() == pytest.approx(distance.sort().values[:4].tolist(), abs=1e-5)


def test_a_picture_of_neighbours_frames_the_rows_class_green(tmp_path):
    images = Images(torch.tensor([0, 1, 0]), list("ab"), pixels=pictures(3, 16, 16))
    protocols.draw_neighbours(tmp_path / "n.png", images, 16, torch.tensor([[2, 1]]), lambda r: "row", torch.tensor([0]))
    found = np.array(Image.open(tmp_path / "n.png"))
    green, red = (found == c for c in ((0, 128, 0), (255, 0, 0)))
    assert green.all(-1).any(0)[:72].any() and red.all(-1).any(0)[72:].any() and not red.all(-1).any(0)[:70].any()


def test_an_embedding_is_the_first_two_principal_components_where_umap_is_missing(monkeypatch):
    from sklearn.decomposition import PCA

    monkeypatch.setitem(sys.modules, "umap", None)
    x = normal(40, 6) * torch.tensor([3, 1, 2, 1, 1, 1]) + 1
    found, how = protocols.embed(x)
    pca = PCA(2).fit(x.numpy())
    assert error(found.abs(), torch.from_numpy(pca.transform(x.numpy())).abs()) < 1e-9
    assert float(how.split("(")[1].split(" ")[0]) == pytest.approx(100 * pca.explained_variance_ratio_.sum(), abs=0.05)
    assert error(protocols.embed(-x)[0], -found) < 1e-9  # axes have one direction


def test_embed_draws_points_in_the_colours_of_their_classes(labelled_encoder, tmp_path):
    found, printed = protocol("embed", *labelled_encoder)
    assert found["embedding"].startswith(("PCA", "UMAP")) and "silhouette" in printed
    common.draw_points(tmp_path / "p.png", torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1]), ["a", "b"], side=100)
    picture = np.array(Image.open(tmp_path / "p.png")).astype(int)
    low_left, high_right = picture[91:94, 7:10].min((0, 1)), picture[7:10, 91:94].min((0, 1))
    assert low_left[0] > low_left[2] and high_right[2] > high_right[0]  # red, then cyan
    assert (picture[:, 30:70, :] == 255).all()



# ------------------------------------------------------------------------------------------------- what features hold


@pytest.mark.parametrize("name", ["reconstruction", "colorhist", "invariance"])
def test_analyses_with_two_ranks_are_those_of_one(two, name):
    alone, ranks = two
    for found in ranks:
        assert found[name] == pytest.approx(alone[name], rel=1e-4)


def test_effective_invariance_is_the_formula():
    p, p_t = (normal(50, 3, seed=i).softmax(-1) for i in (0, 1))
    expected = []
    for a, b in zip(p.tolist(), p_t.tolist()):
        agree = a.index(max(a)) == b.index(max(b))
        expected.append(math.sqrt(max(a) * max(b)) if agree else 0.0)
    assert protocols.effective_invariance(p, p_t).tolist() == pytest.approx(expected)
    assert 0 < sum(e > 0 for e in expected) < 50


def tiny_classifier(encoder, classes):
    classifier = protocols.Classifier(encoder, classes).eval().requires_grad_(False)
    classifier.head.weight.data = normal(*classifier.head.weight.shape, seed=9).to(classifier.head.weight)
    return classifier


def test_invariance_is_the_mean_over_torchvisions_changes():
    classifier = tiny_classifier(vit().float(), list("abcd"))
    images = Images(torch.arange(6) % 4, list("abcd"), pixels=pictures(6, 32, 32))
    found = protocols.invariance(classifier, images, protocols.Machine(CPU))
    amounts = {tv.adjust_brightness: (0.5, 1.5), tv.adjust_contrast: (0.5, 1.5), tv.adjust_saturation: (0.5, 1.5),
               tv.adjust_hue: (-0.25, 0.25)}  # fmt: skip
    changes = dict(rotation=[lambda x, a=a: tv.rotate(x, a) for a in (90, 180, 270)],
                   colour=[lambda x, f=f, a=a: f(x, a) for f, both in amounts.items() for a in both])  # fmt: skip
    standard = lambda x: tv.normalize(x, common.MEAN, common.STD)
    with torch.no_grad():
        for name, every in changes.items():
            values = []
            for image in images.pixels.float() / 255:
                p = classifier(standard(image)[None]).softmax(-1)[0]
                for change in every:
                    q = classifier(standard(change(image))[None]).softmax(-1)[0]
                    values.append(math.sqrt(p.max() * q.max()) if p.argmax() == q.argmax() else 0.0)
            assert found[name] == pytest.approx(np.mean(values), abs=2e-3) and 0 < found[name] < 1


def test_classifiers_come_back_from_their_files(tmp_path):
    x = normal(2, 3, 32, 32).float()
    for changes in (dict(), dict(blocks=[1, 3], pool="both"), dict(norm=None)):
        encoder = vit().float()
        dim = 128 if "blocks" in changes else 32
        norm = changes.pop("norm", common.BatchNorm(dim, affine=False, eps=1e-3))
        classifier = protocols.Classifier(encoder, list("abcd"), norm=norm, **changes).eval()
        if norm is not None:
            norm.running_mean += 0.1
        classifier.save(tmp_path / "probe.pt", with_encoder=False)
        classifier.save(tmp_path / "finetuned.pt", with_encoder=True)
        for file, given in (("probe.pt", encoder), ("finetuned.pt", vit(depth=2).float())):
            again = protocols.load_classifier(tmp_path / file, given)
            assert error(again(x), classifier(x)) < 1e-6 and again.classes == list("abcd")
    assert common.load_encoder(tmp_path / "finetuned.pt").depth == 3  # an encoder file as well
    for other in (vit(dim=64), randomized(vit())):
        with pytest.raises(InputError, match="probe.pt is the probe of another encoder: run `eval.py probe` with this one"):
            protocols.load_classifier(tmp_path / "probe.pt", other.float())
    protocols.load_classifier(tmp_path / "probe.pt", common.load_encoder(tmp_path / "finetuned.pt", 64))  # larger images
    common.save_encoder(tmp_path / "encoder.pt", encoder)
    encoder.pool = "cls"  # as by --pool
    protocols.Classifier(encoder, "abcd").save(tmp_path / "finetuned.pt", with_encoder=True)
    assert common.load_encoder(tmp_path / "finetuned.pt").pool == "cls"
    with pytest.raises(InputError, match="encoder.pt holds no classifier"):
        protocols.load_classifier(tmp_path / "encoder.pt", encoder)


def test_histograms_count_pixels_in_64_bins_a_channel():
    pixels = pictures(3, 12, 10)
    found = protocols.histograms(common.augment(pixels))
    for image, row in zip(pixels, found):
        for channel, part in zip(image, row.split(64)):
            counts = collections.Counter(v // 4 for v in channel.flatten().tolist())
            assert [v * 120 for v in part.tolist()] == pytest.approx([counts[b] for b in range(64)], abs=1e-4)


def test_histogram_error_is_that_of_probes_trained_one_by_one():
    encoder, run = vit().float(), protocols.Machine(CPU)
    train, val = (Images(torch.zeros(n).long(), ["a"], pixels=pictures(n, 32, 32, seed=n)) for n in (24, 10))
    found = protocols.colorhist(encoder, train, val, run, epochs=3, batch=8, lr=3.0)
    torch.manual_seed(0)
    start = torch.empty(3, 32, 192).normal_(std=0.01)
    cls = lambda x, block: encoder(x, blocks=[block])[0][:, 0].detach()
    truth = protocols.histograms(common.augment(val.pixels))
    for block in (1, 2, 3):
        norm, linear = nn.BatchNorm1d(32, affine=False), nn.Linear(32, 192)
        linear.weight.data, linear.bias.data = start[block - 1].T.clone(), torch.zeros(192)
        optimizer = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9)
        for step, data in enumerate(common.batches(train, [View(32, (0.08, 1))], 8, 0, 9, 0, CPU, 0, {})):
            x = common.augment(data.views[0])
            optimizer.param_groups[0]["lr"] = 3.0 * 8 / 256 * common.warmup_cosine(step, 9, 3)
            optimizer.zero_grad()
            F.l1_loss(linear(norm(cls(x, block))), protocols.histograms(x)).backward()
            optimizer.step()
        prediction = linear(norm.eval()(cls(common.augment(val.pixels), block)))
        uniform_guess = (truth - 1 / 64).abs().mean()
        assert found[block - 1] == pytest.approx(100 * (F.l1_loss(prediction, truth) / uniform_guess).item(), rel=1e-3)


def test_decoders_side_by_side_are_decoders_alone():
    encoder, run = vit().float(), protocols.Machine(CPU)
    train, val = (Images(torch.zeros(n).long(), ["a"], pixels=pictures(n, 32, 32, seed=n)) for n in (16, 6))
    found = protocols.reconstruction_per_block(encoder, train, val, run, 4, 8, 0.01, dim=16, heads=2)
    for block in (1, 3):
        torch.manual_seed(0)
        decoder = [common.MAEDecoder((4, 4), 8, 32, 16, 2, 2) for _ in range(3)][block - 1]
        vectors = [p for n, p in decoder.named_parameters() if p.ndim == 1 or n == "mask_token"]
        matrices = [p for p in decoder.parameters() if p.ndim > 1 and p.requires_grad and p is not decoder.mask_token]
        optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=vectors, weight_decay=0)],
                                      betas=(0.9, 0.95))  # fmt: skip

        def loss(x, noise):
            ids_keep, ids_restore, mask = common.random_masking(noise, 0.75)
            tokens = encoder(x, ids_keep, blocks=[block])[0].detach()
            return common.mae_loss(decoder(tokens, ids_restore), x, mask).mean()

        for step, data in enumerate(common.batches(train, [View(32, (0.2, 1))], 8, 0, 8, 0, CPU, 0, {})):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * 8 / 256 * common.warmup_cosine(step, 8, 2)
            optimizer.zero_grad()
            loss(common.augment(data.views[0]), uniform((0, "blocks", step), data.rows, 16)).backward()
            optimizer.step()
        mask = uniform((0, "blocks"), torch.zeros(1).long(), 16).expand(6, -1)
        assert found[block - 1] == pytest.approx(loss(common.augment(val.pixels), mask).item(), rel=1e-3)


def test_blocks_draws_improvements_over_the_largest(labelled_encoder, tmp_path):
    flags = ["--epochs", 1, "--batch", 8, "--lr", 1e-3, "--dim", 16, "--heads", 2]
    found, _ = protocol("blocks", *labelled_encoder, *flags)
    assert len(found["knn"]) == len(found["reconstruction"]) == 6 and (tmp_path / "blocks.png").exists()
    deltas = [a - b for a, b in zip(found["reconstruction"], found["reconstruction"][1:])]
    assert found["reconstruction_improvement"] == pytest.approx([d / max(map(abs, deltas)) for d in deltas])


def test_statistics_are_averages_over_features_of_cls(labelled_encoder, tmp_path, folders):
    found, _ = protocol("stats", *labelled_encoder)
    encoder, val = common.load_encoder(tmp_path / "encoder.pt"), common.load_images(str(folders / "labelled"), "val")
    raw, _ = protocols.features(encoder, val, protocols.Machine(CPU), [6], "cls")
    for name, x in (("last_block", raw[:, 0]), ("final_norm", encoder.norm(raw[:, 0]))):
        assert found[name]["mean"] == pytest.approx(np.mean([v.mean().item() for v in x.T]), abs=1e-5)
        assert found[name]["variance"] == pytest.approx(np.mean([v.var().item() for v in x.T]), rel=1e-4)



# -------------------------------------------------------------------------------------------- robustness and transfer


def test_folders_are_matched_by_name_position_or_mapping(capsys):
    classes = ["hen", "jay", "owl", "tit"]
    held = lambda *a: [row.nonzero()[:, 0].tolist() for row in protocols.matched(*a)]
    assert held(["owl", "hen"], classes) == [[2], [0]]
    assert held(["0", "10", "2"], list("abcdefghijkl")) == [[0], [10], [2]]  # ImageNet-V2
    assert held(["0", "10", "2"], ["0", "1", "10", "2"]) == [[0], [2], [3]]  # a classifier of such folders
    assert held(["0", "2"], [0, 1, 2]) == [[0], [2]]
    mapping = {"bird of prey": "owl", "songbird": ["jay", "tit"]}
    assert held(["bird of prey", "cow", "songbird", "hen"], classes, mapping) == [[2], [], [1, 3], [0]]
    assert "1 of 4 folders" in capsys.readouterr().out
    for folders, mapping, fault in (
        (["owl", "cow"], None, "folder cow is no class of the classifier (hen, jay, owl, …)"),
        (["3", "4"], None, "folder 4 is no class"),
        (["cow"], {"owl": "owl"}, "folder cow is no class"),
        (["owl"], {"owl": ["howl"]}, "the mapping says owl: 'howl', which is no class"),
        (["owl"], {"owl": 3}, "the mapping says owl: 3, which is no class"),
    ):
        with pytest.raises(InputError, match=re.escape(fault)):
            protocols.matched(folders, classes, mapping)


def test_robust_counts_predictions_among_the_sets_classes():
    encoder = vit().float()
    classifier, run = tiny_classifier(encoder, list("abcdef")), protocols.Machine(CPU)
    images = Images(torch.arange(40) % 4, ["e", "b", "x", "d"], pixels=pictures(40, 32, 32))
    held = protocols.matched(images.classes, list("abcdef"), {"d": ["d", "c"]})
    counts = {True: 0, False: 0}
    for restricted in counts:
        for n, label in enumerate(images.labels.tolist()):
            logits = dict(zip("abcdef", classifier(common.augment(images.pixels[n : n + 1]))[0].tolist()))
            allowed = "bcde" if restricted else "abcdef"
            best = max(allowed, key=logits.get)
            counts[restricted] += best in {0: "e", 1: "b", 2: "", 3: "dc"}[label]
        among = held.any(0) if restricted else None
        found = protocols.robust(classifier, images, held[images.labels], run, among)
        assert found["accuracy"] == pytest.approx(100 * counts[restricted] / 30)
        assert found["images"] == 30 and found["classes"] == (4 if restricted else 6)
    assert counts[True] != counts[False]
    with pytest.raises(InputError, match="none of the images has a label"):
        protocols.robust(classifier, images, torch.zeros(40, 6, dtype=torch.bool), run)


def test_real_labels_follow_the_file_names():
    files = np.array([b"/val/b/3.png", b"/val/b/1.png", b"/val/a/2.png"])
    images = Images(torch.tensor([1, 1, 0]), ["a", "b"], files=files)
    real_labels = lambda content: protocols.real_labels(images, content, range(5), "real.json")
    right = lambda content: [row.nonzero()[:, 0].tolist() for row in real_labels(content)]
    assert right([[4], [], [0, 2]]) == [[0, 2], [4], []]  # of 1.png, 2.png, 3.png
    assert right({"1.png": [4], "3.png": [0, 2], "2.png": [], "9.png": [1]}) == [[0, 2], [4], []]
    for content, fault in (
        ([[4], []], "real.json has labels of 2 images, the validation set has 3"),
        ({"1.png": [4], "3.png": [0]}, "real.json has no labels for 2.png"),
        ([[4], [], [5]], "expected lists of numbers from 0 to 4, found 5"),
        ([[4], [], ["owl"]], "expected lists of numbers from 0 to 4, found 'owl'"),
    ):
        with pytest.raises(InputError, match=re.escape(fault)):
            right(content)


def write_shapes(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def test_robust_reads_folders_like_imagenet_v2_and_objectnet_and_real_labels(tmp_path):
    shapes = common.shapes("val", 32).subset(torch.arange(60))
    for i, (image, label) in enumerate(zip(shapes.pixels, shapes.labels.tolist())):
        write_shapes(tmp_path / "v2" / str(label) / f"{i}.png", image)
        write_shapes(tmp_path / "imagenet/val" / shapes.classes[label] / f"val_{i:04d}.png", image)
        if label in (2, 5, 7):
            write_shapes(tmp_path / "objectnet" / {2: "tile", 5: "plus", 7: "stick"}[label] / f"{i}.png", image)
    encoder = vit().float()
    classifier = tiny_classifier(encoder, shapes.classes)
    common.save_encoder(tmp_path / "encoder.pt", encoder)
    classifier.save(tmp_path / "probe.pt", with_encoder=False)
    classifier.save(tmp_path / "finetuned.pt", with_encoder=True)
    (tmp_path / "map.json").write_text(json.dumps({"tile": shapes.classes[2], "plus": shapes.classes[4:6]}))
    logits = torch.cat([classifier(common.augment(x[None])) for x in shapes.pixels])
    answers = lambda p: ([], [p, 0], [(p + 1) % 10])  # of every three images one without, one with the prediction
    real = [answers(p)[i % 3] for i, p in enumerate(logits.argmax(1).tolist())]
    (tmp_path / "real.json").write_text(json.dumps(real))

    def robust(*flags):
        argv = ["robust", "--encoder", tmp_path / "encoder.pt", "--precision", "float32", "--workers", "0", *flags]
        with mock.patch("torch.cuda.is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
            protocols.main(list(map(str, argv)))
        return json.loads((tmp_path / "robust.json").read_text())

    plain = 100 * (logits.argmax(1) == shapes.labels).double().mean().item()
    v2, objectnet = str(tmp_path / "v2"), str(tmp_path / "objectnet")
    on_val = ["--real", tmp_path / "real.json", "--data", tmp_path / "imagenet"]
    found = robust("--sets", v2, "--classifier", tmp_path / "finetuned.pt", *on_val)
    assert found[v2] == dict(accuracy=pytest.approx(plain), images=60, classes=10)
    assert found["ReaL"] == dict(accuracy=50, images=40, classes=10)
    found = robust("--sets", objectnet, "--mapping", tmp_path / "map.json")[objectnet]
    rows = [i for i in range(60) if shapes.labels[i] in (2, 5)]
    best = [max((2, 4, 5), key=logits[i].tolist().__getitem__) for i in rows]
    right = sum(p == 2 if shapes.labels[i] == 2 else p in (4, 5) for i, p in zip(rows, best))
    assert found == dict(accuracy=pytest.approx(100 * right / len(rows)), images=len(rows), classes=3)
    assert robust("--data", tmp_path / "imagenet")[str(tmp_path / "imagenet")]["accuracy"] == pytest.approx(plain)


def test_logits_of_a_classifier_are_not_rounded_by_autocast():
    classifier, x = tiny_classifier(vit().float(), list("abc")), normal(4, 3, 32, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        found, feature = classifier(x), protocols.pooled(classifier.encoder, x)
    assert torch.equal(found, classifier.head(feature.float()))


def test_mean_average_precision_is_the_devkits():
    logits, y = normal(60, 4).round(decimals=1), torch.randint(-1, 2, (60, 4), generator=torch.Generator().manual_seed(1))
    y[:, 3] = -y[:, 3].abs()  # no image has the last class
    precisions = []
    for c in range(3):
        ranking = sorted((i for i in range(60) if y[i, c] >= 0), key=lambda i: -logits[i, c])
        total, found, curve = sum(int(y[i, c]) for i in ranking), 0, []
        for place, i in enumerate(ranking, 1):
            found += int(y[i, c])
            curve.append((Fraction(found, total), Fraction(found, place)))
        reached = [max((p for r, p in curve if r >= Fraction(t, 10)), default=0) for t in range(11)]
        precisions.append(sum(reached) / 11)
    assert protocols.mean_average_precision(logits, y) == pytest.approx(float(100 * sum(precisions) / 3))
    ten = torch.arange(20, 0, -1)[:, None].double(), (torch.arange(20) % 2 == 0).long()[:, None]  # recalls 0.1, 0.2, …
    expected = (1 + sum(k / (2 * k - 1) for k in range(1, 11))) / 11
    assert protocols.mean_average_precision(*ten) == pytest.approx(100 * expected)


def test_loss_of_several_labels_is_that_of_each_class_that_counts():
    logits, y = normal(2, 5, 3), torch.randint(-1, 2, (5, 3), generator=torch.Generator().manual_seed(0))
    for p in range(2):
        total = 0.0
        for n, c in itertools.product(range(5), range(3)):
            odds = 1 / (1 + math.exp(-logits[p, n, c]))
            total -= {1: math.log(odds), 0: math.log(1 - odds), -1: 0}[y[n, c].item()]
        assert protocols.several_labels(logits, y)[p].item() == pytest.approx(total / 5)


def test_mean_per_class_is_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score

    logits, y = normal(50, 4), torch.arange(50).sqrt().long() % 3
    expected = 100 * balanced_accuracy_score(y, logits[:, :3].argmax(1))
    assert protocols.mean_per_class(logits[:, :3], y) == pytest.approx(expected)
    assert protocols.accuracy(logits, y) == pytest.approx(2 * (logits.argmax(1) == y).sum().item())


def test_average_rank_is_that_of_mim_refiners_table_8():
    table = """91.0 79.6 78.0 91.6 91.9 76.0 75.7 10.0
        90.7 85.0 76.4 92.6 86.7 76.8 77.5 9.5
        90.5 86.6 80.4 97.8 93.4 77.4 74.6 6.8
        90.9 89.2 79.6 97.3 93.7 77.7 69.9 6.4
        89.6 89.4 78.4 97.8 95.4 77.2 76.5 6.6
        91.1 89.0 80.4 97.1 96.0 79.0 71.1 5.0
        88.7 88.8 75.6 94.1 94.7 77.3 59.1 9.9
        89.8 81.1 78.3 91.5 91.6 76.3 73.0 10.8
        90.5 87.0 80.0 92.9 86.2 78.3 77.8 7.4
        91.2 90.0 82.0 98.0 96.1 79.5 69.7 3.6
        89.2 90.5 77.4 95.3 95.7 78.4 61.7 7.4
        91.5 82.5 79.5 93.5 92.8 77.9 78.5 6.4
        91.8 90.8 82.8 98.2 96.5 80.3 77.5 1.4"""
    rows = [list(map(float, row.split())) for row in table.splitlines()]
    differences = [abs(found - row[7]) for found, row in zip(protocols.average_rank([row[:7] for row in rows]), rows)]
    assert sum(d < 0.051 for d in differences) == 9  # the printed accuracies do not give the other four printed ranks:
    assert max(differences) < 0.2  # 10.8 say is no seventh of a number of ranks
    assert protocols.average_rank([[3, 1], [3, 2], [1, 3]]) == [(1.5 + 3) / 2, (1.5 + 2) / 2, (3 + 1) / 2]


@pytest.fixture(scope="module")
def sets_of_shapes(tmp_path_factory):
    """data/ as torchvision lays it out: VOC2007, DTD, Caltech101, SUN397, of `shapes`."""
    root = tmp_path_factory.mktemp("sets")
    shapes = common.shapes("train", 32).subset(torch.arange(240))
    pixels, labels, data = shapes.pixels, shapes.labels, root / "data"
    voc = data / "VOCdevkit/VOC2007"
    lists = voc / "ImageSets/Main"
    lists.mkdir(parents=True)
    for part, numbers in (("trainval", range(0, 60)), ("test", range(60, 100))):
        for i in numbers:
            write_shapes(voc / f"JPEGImages/{i:06d}.jpg", pixels[i])
        (lists / f"{part}.txt").write_text("".join(f"{i:06d}\n" for i in numbers))
        for c in range(3):  # a shape is one object or two; every seventh is hard to see
            flag = lambda i: -1 if c not in (labels[i] % 3, labels[i] // 5) else 0 if i % 7 == 0 else 1
            (lists / f"{'abc'[c]}_{part}.txt").write_text("".join(f"{i:06d} {flag(i):2d}\n" for i in numbers))
    for part, numbers in (("train", range(0, 40)), ("val", range(40, 60)), ("test", range(60, 80))):
        names = [f"kind{labels[i]}/kind{labels[i]}_{i:04d}.jpg" for i in numbers]
        for i, name in zip(numbers, names):
            write_shapes(data / "dtd/dtd/images" / name, pixels[i])
        (data / "dtd/dtd/labels").mkdir(exist_ok=True)
        (data / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names))
    caltech = data / "caltech101/101_ObjectCategories"
    (caltech / "BACKGROUND_Google").mkdir(parents=True)
    for c, count in (("ant", 33), ("bee", 36)):
        for i in range(count):
            write_shapes(caltech / c / f"image_{i + 1:04d}.jpg", pixels[i])
    (data / "SUN397").mkdir()
    (data / "SUN397/ClassName.txt").write_text("/a/abbey\n/b/bar/outdoor\n")
    for folder, count in (("a/abbey", 105), ("b/bar/outdoor", 101)):
        for i in range(count):
            write_shapes(data / f"SUN397/{folder}/sun_{i:04d}.jpg", pixels[i])
    return root


@pytest.fixture
def torchvision_sets(sets_of_shapes, monkeypatch):
    """./data with these sets; any download fails."""
    monkeypatch.chdir(sets_of_shapes)
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=RuntimeError("offline")))


def test_torchvision_sets_have_their_official_parts(torchvision_sets):
    train, test = common.load_splits("dtd", labels=True)
    theirs = [torchvision.datasets.DTD("data", part) for part in ("train", "val", "test")]
    assert (len(train), len(test)) == (60, 20) and train.classes == theirs[0].classes
    expected = [pair for part in theirs[:2] for pair in part]
    assert train.labels.tolist() == [label for _, label in expected]
    assert all(np.array_equal(train.open(i), image) for i, (image, _) in enumerate(expected))
    assert test.labels.tolist() == [label for _, label in theirs[2]] and np.array_equal(test.open(7), theirs[2][7][0])
    with pytest.raises(InputError, match="--data eurosat: torchvision could not provide it"):
        common.load_images("eurosat", "train")


@pytest.mark.parametrize("name, train_count, test_counts", [("caltech101", 30, [3, 6]), ("sun397", 50, [50, 50])])
def test_torchvision_sets_without_parts_are_drawn_by_class(torchvision_sets, name, train_count, test_counts):
    train, test = common.load_splits(name, labels=True)
    assert torch.bincount(train.labels).tolist() == [train_count] * 2 and torch.bincount(test.labels).tolist() == test_counts
    pick = lambda images: [(int(c), np.array(images.open(i)).tobytes()) for i, c in enumerate(images.labels)]
    assert len({*pick(train), *pick(test)}) == len(train) + len(test)  # no image is in both, none twice
    glob = Path.rglob
    with mock.patch.object(Path, "rglob", lambda self, pattern: reversed(list(glob(self, pattern)))):
        assert pick(common.load_images(name, "val")) == pick(test)  # in whatever order the file system lists them


def test_voc2007_has_several_labels_an_image_and_unknown_ones(torchvision_sets):
    shapes = common.shapes("train", 32)
    for split, numbers in (("train", range(60)), ("val", range(60, 100))):
        images = common.load_voc2007(split)
        theirs = torchvision.datasets.VOCDetection("data", "2007", {"train": "trainval", "val": "test"}[split])
        assert images.classes == ["a", "b", "c"] and [os.fsdecode(f) for f in images.files] == theirs.images
        for row, i in zip(images.labels.tolist(), numbers, strict=True):
            present = {shapes.labels[i].item() % 3, shapes.labels[i].item() // 5}
            assert row == [(-1 if i % 7 == 0 else 1) if c in present else 0 for c in range(3)]


def test_probe_of_several_labels_is_that_of_every_class_alone():
    x = normal(150, 20).float()
    y = (x[:, :3] + 2 * normal(150, 3, seed=1).float() > 0).long()
    y[::5, 1] = -1
    (x, test_x), (y, test_y) = x.split([90, 60]), y.split([90, 60])
    other = dict(loss=protocols.several_labels, score=protocols.mean_average_precision)
    batches = protocols.cached_batches(x, y, 90, 50)
    _, probes, number = protocols.probe(batches, 50, 5, 3, test_x, test_y, 90, **other)
    found = probes(test_x)[number].detach()
    torch.manual_seed(0)
    start = protocols.Probes(10, 20, 3)
    outcomes = []
    for number, lr in enumerate(protocols.PROBE_LRS):
        norm, linear = nn.BatchNorm1d(20, affine=False), nn.Linear(20, 3)
        linear.weight.data, linear.bias.data = start.weight.data[number].clone(), start.bias.data[number].clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9)
        for step, (a, b) in enumerate(protocols.cached_batches(x, y, 90, 50)):
            factor = (step + 1) / 5 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 45)) / 2
            optimizer.param_groups[0]["lr"] = lr * 90 / 256 * factor
            out = linear(norm(a))
            rows = [(b[:, c] >= 0).nonzero()[:, 0] for c in range(3)]
            bce = partial(F.binary_cross_entropy_with_logits, reduction="sum")
            optimizer.zero_grad()
            (sum(bce(out[r, c], b[r, c].float()) for c, r in enumerate(rows)) / len(a)).backward()
            optimizer.step()
        out = linear(norm.eval()(test_x)).detach()
        outcomes.append((protocols.mean_average_precision(out, test_y), out))
    best = max(outcomes, key=lambda o: o[0])
    assert error(found, best[1]) < 1e-4 and best is not outcomes[0]


def test_transfer_compares_encoders_on_several_sets(torchvision_sets):
    for name, seed in (("one", 0), ("two", 1)):
        encoder = vit(dim=64, depth=4).float()
        encoder.patch_embed.proj.weight.data += 0.1 * normal(64, 3, 8, 8, seed=seed).float()
        Path(name).mkdir()
        common.save_encoder(f"{name}/encoder.pt", encoder)
    argv = ["transfer", "--encoder", "one/encoder.pt", "--against", "two/encoder.pt", "--sets", "voc2007", "dtd"]
    with mock.patch("torch.cuda.is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
        protocols.main([*argv, "--precision", "float32", "--workers", "0"])
    found = json.loads(Path("one/transfer.json").read_text())
    for name, other in (("one/encoder.pt", "two/encoder.pt"), ("two/encoder.pt", "one/encoder.pt")):
        scores, others = ([found[n][k] for k in ("voc2007 mAP", "dtd accuracy")] for n in (name, other))
        assert found[name]["rank"] == sum(1 + (a < b) + (a == b) / 2 for a, b in zip(scores, others)) / 2
    for name in ("one/encoder.pt", "two/encoder.pt"):
        encoder = common.load_encoder(name)
        run, sets = protocols.Machine(CPU), common.load_splits("dtd", labels=True)
        again, _ = protocols.linear_probe(encoder, *sets, run, "dinov2", batch=60, cached=True)
        assert found[name]["dtd accuracy"] == pytest.approx(again["probe"])
        assert 0 < found[name]["voc2007 mAP"] < 100 and 0 <= found[name]["dtd mean per class"] <= 100


# ------------------------------------------------------------------------------------------------------- segmentation


def annotated_shapes(split, count):
    """The first of the built-in images; a stripe of every third label map counts nowhere."""
    images = protocols.load_annotated("shapes", split).subset(torch.arange(count))
    images.maps[::3, :, :20] = 0
    return images


def write_ade20k(root, **sets):
    """A folder of ADE20K's layout from sets by the name of their folder."""
    for name, images in sets.items():
        for part in ("images", "annotations"):
            (root / part / name).mkdir(parents=True)
        for i in range(len(images)):
            images.open(i).save(root / "images" / name / f"ADE_{i:08d}.bmp")  # lossless, unlike the real set's .jpg
            images.open_map(i).save(root / "annotations" / name / f"ADE_{i:08d}.png")
    return str(root)


def tiny_segmentation(train, val, **changes):
    encoder = vit(image_size=24, patch_size=4, depth=6).float().requires_grad_(False)
    given = dict(epochs=6, batch=8, lrs=(0.5, 20.0)) | changes
    return encoder, *protocols.segment(encoder, train, val, protocols.Machine(CPU), **given)


def segment_outcome():
    return tiny_segmentation(annotated_shapes("train", 48), annotated_shapes("val", 21))[1]["miou_by_lr"]


def test_segmentation_with_two_ranks_is_that_of_one(two):
    alone, ranks = two
    for found in ranks:
        assert found["segment"] == pytest.approx(alone["segment"], abs=1e-2)


def test_segmentation_is_a_linear_classifier_of_patches_trained_on_pixels():
    """Against torch's modules, its bilinear upsampling and counts pixel by pixel, for each learning rate by itself."""
    train, val = annotated_shapes("train", 48), annotated_shapes("val", 20)
    encoder, result, predict = tiny_segmentation(train, val)
    assert result["blocks"] == [6, 2]

    def tokens(x):
        a, b = encoder(x, blocks=[6, 2])
        return torch.cat([a, b], 2)[:, 1:].flatten(0, 1)

    for number, lr in enumerate((0.5, 20.0)):
        torch.manual_seed(0)
        start = protocols.Probes(2, 64, 11)
        norm, linear = nn.BatchNorm1d(64, affine=False), nn.Linear(64, 11)
        linear.weight.data, linear.bias.data = start.weight.data[number].clone(), start.bias.data[number].clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)

        def upsampled(x):
            grid = linear(norm(tokens(x))).view(len(x), 6, 6, 11).permute(0, 3, 1, 2)
            return F.interpolate(grid, 24, mode="bilinear", align_corners=False)

        def cut(images, epoch, index, seed):
            crop = protocols.AnnotatedCrop(24, seed)
            x, y = (torch.stack(t) for t in zip(*[crop(images, epoch, i) for i in index]))
            return common.augment(x), y.long() - 1

        for step in range(36):
            epoch, part = divmod(step, 6)
            order = uniform((0, epoch, "order"), torch.arange(48), 1)[:, 0].argsort(stable=True)
            x, y = cut(train, epoch, order[part * 8 : part * 8 + 8].tolist(), 0)
            loss = F.cross_entropy(upsampled(x), y, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            warmup = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 33))
            optimizer.param_groups[0]["lr"] = lr * 8 / 256 * warmup
            optimizer.step()

        norm.eval()
        x, y = cut(val, 0, range(20), None)
        predicted = upsampled(x).argmax(1)
        overlap, union = [0] * 11, [0] * 11
        for truth, guess in zip(y.flatten().tolist(), predicted.flatten().tolist()):
            if truth == guess:
                overlap[truth], union[truth] = overlap[truth] + 1, union[truth] + 1
            elif truth >= 0:
                union[truth], union[guess] = union[truth] + 1, union[guess] + 1
        miou = 100 * np.mean([o / u for o, u in zip(overlap, union) if u])
        assert result["miou_by_lr"][lr] == pytest.approx(miou, abs=0.05)
        if lr == result["lr"]:
            assert result["miou"] == max(result["miou_by_lr"].values()) > 9
            assert (predict(x) == predicted).double().mean() > 0.999


def test_a_folder_of_ade20ks_layout_gives_what_the_same_images_in_memory_give(tmp_path):
    train, val = annotated_shapes("train", 32), annotated_shapes("val", 9)
    root = write_ade20k(tmp_path, training=train, validation=val)
    folders = [protocols.load_annotated(root, split, classes=11) for split in ("train", "val")]
    assert [len(images.classes) for images in folders] == [11, 11] and folders[0].pixels is None
    assert tiny_segmentation(*folders, epochs=2)[1] == tiny_segmentation(train, val, epochs=2)[1]
    assert len(protocols.load_annotated(root, "val").classes) == 150


def test_labels_of_shapes_are_the_objects_class_or_the_background():
    images, plain = protocols.load_annotated("shapes", "val"), common.load_images("shapes", "val")
    assert images.classes == ["background", *plain.classes] and len(images) == len(plain)
    for i in (0, 7, 1999):
        expected = [[2 + i % 10 if inside else 1 for inside in row] for row in plain.masks[i].tolist()]
        assert np.array(images.open_map(i)).tolist() == expected


@pytest.mark.parametrize("size, predicted", [(4, 4), (4, 3)])
def test_mean_iou_is_that_of_a_loop_and_leaves_out_classes_that_are_nowhere(size, predicted):
    confusion = (normal(2, 5, 5).abs() * 10).long()
    confusion[:, size:] = confusion[:, :, predicted:] = 0  # class 4 is nowhere; class 3 nowhere or never predicted
    for table, found in zip(confusion.tolist(), protocols.mean_iou(confusion).tolist()):
        scores = []
        for c in range(5):
            union = sum(table[c]) + sum(row[c] for row in table) - table[c][c]
            if union:
                scores.append(table[c][c] / union)
        assert len(scores) == 4 and found == pytest.approx(100 * sum(scores) / 4, rel=1e-12)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_logits_of_pixels_are_torchs_bilinear_upsampling(grid):
    logits = normal(2, 4 * math.prod(grid), 7)  # two classifiers, four images
    expected = logits.view(8, *grid, 7).permute(0, 3, 1, 2)
    expected = F.interpolate(expected, (30, 30), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert error(protocols.pixel_logits(logits, grid, 30), expected.view(2, 4, 30, 30, 7)) < 1e-12


def test_image_and_label_map_are_cut_and_flipped_alike():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    maps = (1 + y // 20 * 5 + x // 18)[None].byte()  # 15 tiles
    images = protocols.Annotated(torch.tensor([-1]), list(range(15)), pixels=(maps * 16).expand(1, 3, -1, -1), maps=maps)
    flipped, sizes = [], set()
    for epoch in range(40):
        image, labels = protocols.AnnotatedCrop(32, seed=0)(images, epoch, 0)
        agree = ((image[0] / 16).round() == labels).double().mean()
        assert agree > 0.75  # bicubic values differ along the edges of tiles
        rows = labels.int().diff(dim=1)
        flipped.append(rows.min().item() < 0)
        assert not (rows.min() < 0 < rows.max())  # the number of a tile grows to the right, or everywhere to the left
        sizes.add(len(labels.unique()))
    assert 8 < sum(flipped) < 32 and len(sizes) > 4
    image, labels = protocols.AnnotatedCrop(32)(images, 0, 0)  # 60 x 90 becomes 32 x 48
    nearest = lambda places: (places + 0.5).mul(60 / 32).long()
    assert torch.equal(labels, maps[0][nearest(torch.arange(32))][:, nearest(torch.arange(8, 40))])
    expected = tv.center_crop(tv.resize(images.open(0), [32], InterpolationMode.BICUBIC), [32, 32])
    assert np.array_equal(image.permute(1, 2, 0), np.array(expected))


def test_subcommand_segment_writes_numbers_and_a_picture(tmp_path):
    root = write_ade20k(tmp_path / "set", training=annotated_shapes("train", 16), validation=annotated_shapes("val", 5))
    common.save_encoder(tmp_path / "encoder.pt", vit(image_size=24, depth=6).float())
    flags = ["--encoder", tmp_path / "encoder.pt", "--data", root, "--epochs", 1, "--workers", 0]
    out = main("segment", *flags, program=protocols)
    found = json.loads((tmp_path / "segment.json").read_text())
    assert 0 <= found["miou"] <= 100 and len(found["miou_by_lr"]) == 9 and "miou" in out
    assert Image.open(tmp_path / "segment.png").width > 5 * 96


def test_label_maps_have_vocs_colours():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128)}
    known[20] = (0, 64, 128)
    colours = protocols.map_colours(torch.tensor(list(known)).view(1, 1, -1))  # [1, 3, 1, 7]
    assert [tuple(c) for c in colours[0, :, 0].T.tolist()] == list(known.values())


def test_annotations_that_do_not_fit_are_named_in_one_line(tmp_path, capsys):
    val = annotated_shapes("val", 3)
    root = write_ade20k(tmp_path, training=val, validation=val)
    load = lambda: protocols.load_annotated(root, "train", classes=11)
    other = tmp_path / "annotations" / "training"
    crop, broken = protocols.AnnotatedCrop(24), other / "ADE_00000001.png"
    for picture, fault in [(Image.new("L", (9, 9)), r"label map is \(9, 9\) L, expected \(48, 48\)"),
                           (Image.new("RGB", (48, 48)), "label map is .* RGB, expected .* in one channel"),
                           (Image.new("L", (48, 48), 12), "label map has 12, expected 0 to 11")]:  # fmt: skip
        picture.save(broken)
        with pytest.raises(ValueError, match=fault):
            crop(load(), 0, 1)
        list(protocols.annotated_batches(load(), [(0, torch.tensor([1]))], crop, protocols.Machine(CPU)))  # another takes its place
        assert re.search(f"skipped .*ADE_00000001.bmp: .*{fault}", capsys.readouterr().err)
    broken.unlink()
    with pytest.raises(InputError, match="no label map .*ADE_00000001.png; every image needs one"):
        load()
    (other / "ADE_00000002.png").unlink()
    with pytest.raises(InputError, match="no label map .*ADE_00000001.png and 1 more"):
        load()
    for file in (tmp_path / "images" / "training").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="no images in"):
        load()
    with pytest.raises(InputError, match="there is no .*images/validation; give `shapes` or a folder of ADE20K's layout"):
        protocols.load_annotated(str(other), "val")



# -------------------------------------------------------------------------------------------------------------- video


def test_one_frame_is_the_same_to_both_ways_of_seeing_a_clip():
    encoder = vit(pool="mean")
    frames, joint = (protocols.ClipClassifier(encoder, 4, 1, how).double() for how in ("frames", "joint"))
    frames.head = joint.head
    x, drop = normal(3, 1, 3, 32, 32), common.drop_path(0.4, uniform(("drop",), torch.arange(3), 3, 2)).double()
    assert error(joint(x), frames(x)) < 1e-12 and error(frames(x), frames.head(encoder(x[:, 0])[:, 1:].mean(1))) < 1e-12
    assert error(joint.feature(x, drop), frames.feature(x, drop)) < 1e-12
    joint.time.weight.data = normal(1, 32)
    assert error(joint(x), frames(x)) > 1e-3


def test_frames_average_features_and_joint_sees_all_patches_with_their_times():
    encoder = vit(pool="mean")
    frames, joint = (protocols.ClipClassifier(encoder, 4, 3, how).double() for how in ("frames", "joint"))
    x, drop = normal(2, 3, 3, 32, 32), common.drop_path(0.4, uniform(("drop",), torch.arange(2), 3, 2)).double()
    each = [encoder(x[:, t], drop=drop)[:, 1:].mean(1) for t in range(3)]
    assert error(frames.feature(x, drop), sum(each) / 3) < 1e-12
    turned = x.flip(1)
    assert error(joint(turned), joint(x)) < 1e-12  # without times a clip is a set
    joint.time.weight.data = normal(3, 32)
    assert error(joint(turned), joint(x)) > 1e-3
    clips = []
    for i in range(2):
        tokens = [encoder.embed(x[i, t : t + 1])[0] for t in range(3)]
        clips.append(torch.cat([tokens[0][:1], *(tokens[t][1:] + joint.time.weight[t] for t in range(3))]))
    tokens = torch.stack(clips)
    for block in encoder.blocks:
        tokens = block(tokens)
    assert error(joint(x), joint.head(encoder.norm(tokens)[:, 1:].mean(1))) < 1e-12


def test_clips_are_evenly_spread_frames_cut_alike():
    pixels = (torch.arange(12)[:, None, None, None] * 20 + torch.zeros(3, 20, 30)).byte()[None].repeat(2, 1, 1, 1, 1)
    pixels[1] = pictures(1, 20, 30)[0]  # a still picture: all frames of a clip must be cut alike
    videos = common.Videos(torch.arange(2), list("ab"), pixels=pixels)
    of = lambda cut, epoch=0: [[round(f.float().mean().item() / 20) for f in v] for v in cut(videos, epoch, 0)]
    assert of(protocols.Clips(3, 16, temporal=2, spatial=1)) == [[1, 5, 9], [3, 7, 11]]  # (t + 1/4, 3/4) / 3 of 12
    training = [of(protocols.Clips(3, 16), epoch)[0] for epoch in range(50)]
    assert {c[0] for c in training} == {0, 1, 2, 3} and all(c == [c[0], c[0] + 4, c[0] + 8] for c in training)
    clips = [protocols.Clips(3, 16)(videos, epoch, 1)[0] for epoch in range(20)]
    assert all(torch.equal(c[0], f) for c in clips for f in c) and len({c.sum().item() for c in clips}) > 10
    views = protocols.Clips(1, 20, temporal=1, spatial=3)(videos, 0, 1)  # the height fits: squares cut out of 20 x 30
    assert all(torch.equal(v[0], pixels[1, 0, :, :, left : left + 20]) for v, left in zip(views, (0, 5, 10), strict=True))
    assert torch.equal(protocols.Clips(1, 20, temporal=1)(videos, 0, 1)[0][0], pixels[1, 0, :, :, 5:25])


def test_all_views_of_a_video_are_averaged():
    videos = common.Videos(torch.arange(25) % 4, list("abcd"), pixels=pictures(150, 32, 48).unflatten(0, (25, 6)))
    classifier = protocols.ClipClassifier(vit().float(), 4, 2, "joint")
    classifier.time.weight.data = normal(2, 32).float()
    classifier.head.weight.data *= 50
    with torch.no_grad():  # every class is the best for some
        x = common.augment(videos.pixels[:, :2, ..., :32].flatten(0, 1)).unflatten(0, (25, 2))
        classifier.head.bias -= classifier(x).mean(0)
    expected, of_logits = [], []
    for video in videos.pixels:
        views = []
        for k in range(3):
            clip = video[[int((t + (k + 0.5) / 3) / 2 * 6) for t in range(2)]]
            views += [clip[..., left : left + 32] for left in (0, 8, 16)]
        logits = [classifier(common.augment(v)[None])[0] for v in views]
        expected.append((sum(v.exp() / v.exp().sum() for v in logits) / 9).argmax())
        of_logits.append(sum(logits).argmax())
    assert expected != of_logits  # so that it matters what is averaged
    seen, real = [], torch.Tensor.argmax
    record = lambda self, *args: seen.append(real(self, *args)) or seen[-1]
    with mock.patch.object(torch.Tensor, "argmax", record):
        cut = protocols.Clips(2, 32, temporal=3, spatial=3)
        found = protocols.multi_view(classifier, videos, cut, protocols.Machine(CPU), batch=10)
    assert torch.equal(torch.cat(seen), torch.stack(expected)) and len(seen) == 3
    assert found == pytest.approx(100 * (torch.stack(expected) == videos.labels).float().mean().item())


def test_joint_fine_tuning_sees_an_order_of_frames_that_single_frames_do_not_show():
    """Two classes of the same two pictures, in either order: frames are at chance, joint is not."""
    pair = torch.stack([torch.full((3, 16, 16), 60), torch.full((3, 16, 16), 200)]).byte()
    sets = []
    for seed in (0, 1):
        noise = (pictures(64, 16, 16, seed).int() - 128) // 8
        pixels = torch.stack([(pair.flip(0) if i % 2 else pair).int() + noise[i] for i in range(64)]).clamp(0, 255).byte()
        sets.append(common.Videos(torch.arange(64) % 2, list("ab"), pixels=pixels))
    torch.manual_seed(0)
    encoder = common.ViT(16, 8, dim=32, depth=2, heads=2, pool="mean")
    s = protocols.FineTuning(**protocols.recipe("vicmae_subset", 32) | dict(epochs=20, batch=16, lr=0.05, drop_path=0.0))
    run = lambda how: protocols.video(encoder, *sets, protocols.Machine(CPU), s, 2, how, 1, 1)["video"]
    assert run("joint") > 90 and run("frames") < 65


def test_video_runs_on_folders_of_frames(clips, tmp_path):
    common.save_encoder(tmp_path / "encoder.pt", nano(image_size=16))
    argv = ["video", "--encoder", tmp_path / "encoder.pt", "--data", clips, "--workers", 0, "--precision", "float32"]
    for flags in (["--how", "frames", "--blocks", 0], ["--how", "joint", "--micro_batch", 2]):
        main(*argv, "--epochs", 2, "--batch", 4, "--frames", 2, "--temporal", 2, *flags, program=protocols)
        result = json.loads((tmp_path / "video.json").read_text())
        assert len(result["finetune_by_epoch"]) == 2 and 0 <= result["video"] <= 100



# ---------------------------------------------------------------------------------------------------------- bad input

FLAT = [*TINY, "--data", "flat"]
BAD = [
    ([*TINY, "--data", "no/such"], "--data no/such: no such folder"),
    ([*TINY, "--data", "empty"], "--data empty: no images"),
    ([*FLAT, "--oracle"], "--data flat: labels are needed"),
    ([*FLAT, "--image_size", "20"], "image size 20 is not divisible by the patch size 8"),
    ([*FLAT, "--mae_batch", "64"], "batch 64 is larger than the training set (16 images"),
    ([*FLAT, "--batch", "17"], "batch 17 is larger than the training set (16 images"),
    ([*FLAT, "--batch", "16", "--queue", "8"], "--batch 16 is larger than the queue of 8"),
    ([*FLAT, "--micro_batch", "3"], "--micro_batch 3 does not divide"),
    ([*FLAT, "--k", "33"], "--k 33"),
    ([*FLAT, "--frozen", "7"], "--frozen 7: vit_nano8 has 6 blocks"),
    ([*FLAT, "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ([*FLAT, "--epochs", "many"], "--epochs: invalid float value: 'many'"),
    ([*FLAT, "--model", "vit_xl16"], "unknown model 'vit_xl16'"),
    ([*FLAT, "--stages", "mae,tune"], "--stages mae,tune: choose from"),
    ([*FLAT, "--stages", ""], "--stages"),
    ([*FLAT, "--stages", "head,ct"], "--init"),  # an encoder that learned nothing
    ([*FLAT, "--pool", "max"], "--pool max: choose"),
    ([*FLAT, "--precision", "fp16"], "--precision fp16: choose"),
    ([*FLAT, "--out", "a_run"], "--out a_run"),
    ([*FLAT, "--out", "a_file"], "a_file"),
    (["--resume"], "--resume needs --out"),
    (["--resume", "--out", "empty"], "--resume needs --out"),
    ([*FLAT, "--init", "no_such.pt"], "no_such.pt: no such file"),
    ([*FLAT, "--init", "a_file"], "a_file is not a readable torch file"),
    ([*FLAT, "--init", "wide.pt"], "wide.pt does not fit this model"),
    ([*FLAT, "--head", "no_such.pt"], "no_such.pt: no such file"),
    ([*FLAT, "--head", "wide.pt"], "wide.pt does not fit this model"),
    ([*FLAT, "--head", "numbers.pt"], "numbers.pt does not fit this model"),
    ([*FLAT, "--decoder_heads", "3"], "width 16 is not divisible by 3 heads"),
    ([*FLAT, "--decoder_heads", "0"], "--decoder_heads 0: choose a number above 0"),
    ([*FLAT, "--batch", "1"], "--batch 1: choose a number from 2"),
    ([*FLAT, "--mae_batch", "0"], "--mae_batch 0: choose a number above 0"),
    ([*FLAT, "--micro_batch", "-2"], "--micro_batch -2: choose a number from 0"),
    ([*FLAT, "--k", "0"], "--k 0: choose a number above 0"),
    ([*FLAT, "--mask_ratio", "1.5"], "--mask_ratio 1.5: choose a number from 0, below 1"),
    ([*FLAT, "--mask_ratio", "-0.1"], "--mask_ratio -0.1: choose"),
    ([*FLAT, "--mask_ratio", "0"], "--mask_ratio 0 leaves nothing to reconstruct"),
    ([*FLAT, "--mask_ratio", "0.9"], "masking 0.9 of 4 patches keeps none"),
    ([*FLAT, "--ct_mask_ratio", "0.99"], "masking 0.99 of 4 patches keeps none"),
    ([*FLAT, "--temperature", "0"], "--temperature 0: choose a number above 0"),
    ([*FLAT, "--head_temperature", "inf"], "--head_temperature inf: choose a number above 0"),
    ([*FLAT, "--lr", "nan"], "--lr nan: choose a number above 0"),
    ([*FLAT, "--mae_lr=-1e-3"], "--mae_lr -0.001: choose"),
    ([*FLAT, "--weight_decay", "-1"], "--weight_decay -1: choose a number from 0"),
    ([*FLAT, "--layer_decay", "0"], "--layer_decay 0: choose a number above 0, up to 1"),
    ([*FLAT, "--scale_min", "1.1"], "--scale_min 1.1: choose a number above 0, up to 1"),
    ([*FLAT, "--projector_ema", "2"], "--projector_ema 2: choose a number from 0 to 1"),
    ([*FLAT, "--warmup", "1.5"], "--warmup 1.5: choose a number from 0 to 1"),
    ([*FLAT, "--mae_warmup_epochs", "4"], "--mae_warmup_epochs 4 outlasts --mae_epochs 3"),
    ([*FLAT, "--epochs", "0"], "--epochs 0: choose a number above 0"),
    ([*FLAT, "--head_epochs", "-1"], "--head_epochs -1: choose"),
    ([*FLAT, "--epochs", "0.1"], "0.1 epochs of 2 steps are not one step"),
    ([*FLAT, "--queue", "0"], "--queue 0: choose a number above 0"),
    ([*FLAT, "--frozen", "-1"], "--frozen -1: choose a number from 0"),
    ([*FLAT, "--image_size", "0"], "--image_size 0: choose"),
    ([*FLAT, "--model", "vit_nano32"], "image size 16 is not divisible by the patch size 32"),
    ([*FLAT, "--model", "vit_nano0"], "unknown model 'vit_nano0'"),
    ([*FLAT, "--workers", "-5"], "--workers -5: choose a number from -1"),
    ([*FLAT, "--save_every", "-1"], "--save_every -1: choose"),
    ([*FLAT, "--clip_grad", "-1"], "--clip_grad -1: choose"),
    ([*FLAT, "--seed", "-1"], "--seed -1: choose"),
    ([*FLAT, "--short"], "--short is a length of the built-in runs"),
    ([*FLAT, "--seed", "1" + "0" * 400], "choose a number from 0, below 2^63"),
    ([*FLAT, "--init", "empty"], "empty: no such file"),
    ([*FLAT, "--out", "a_file/run"], "run folder a_file/run cannot be made (Not a directory)"),
    ([*TINY, "--data", ""], "--data : no such folder"),
    ([*TINY, "--data", "a_file"], "--data a_file: no such folder"),
    (["--resume", "--out", "no/such"], "--resume needs --out"),
    (["--resume", "--out", "a_run"], "a_run/config.json does not fit this program (aug, "),
    (["--resume", "--out", "of_can"], "of_can/config.json does not fit this program"),
    (["--resume", "--out", "newer"], "newer/config.json does not fit this program (shape): resume with"),
    (["--resume", "--out", "no_json"], "no_json/config.json is not readable"),
    (["--resume", "--out", "no_object"], "no_object/config.json holds no JSON dict"),
    (["--resume", "--out", "wrong_type"], "wrong_type/config.json does not fit this program (batch)"),
    (["--resume", "--out", "wrong_value"], "--batch -8: choose"),
    (["--resume", "--out", "damaged_results"], "damaged_results/results.json is not readable"),
]
BAD_REFINER = [
    (["--mim", "dino"], "--mim dino: choose"),
    (["--mim", "data2vec2"], "--mim data2vec2 refines a trained encoder: give it with --init"),
    (["--schedule", "linear"], "--schedule linear: choose from constant"),
    (["--temperature", "0"], "--temperature 0: choose"),
    (["--local_scale_min", "0.3"], "rising fractions of the area"),
    (["--local_views", "-1"], "--local_views -1: choose a number from 0"),
    (["--knn_every", "0"], "--knn_every 0: choose a number above 0"),
    (["--heads", "0"], "--heads 0: choose a number above 0"),
    (["--warmup_epochs", "4"], "--warmup_epochs 4 outlasts --epochs 3"),
    (["--model", "vit_nano16", "--local_views", "0"], "masking 0.75 of 1 patches keeps none"),
    (["--heads", "7"], "heads behind blocks [0, 1, 2, 3, 4, 5, 6]: expected rising numbers from 1"),
    (["--head_blocks", "4,2"], "heads behind blocks [4, 2]: expected rising numbers"),
    (["--head_blocks", "2-4"], "heads behind blocks [2, 3, 4]: expected rising numbers from 1 to the last block, 6"),
    (["--head_blocks", "all"], "--head_blocks all: write numbers"),
    (["--frozen", "6"], "--frozen 6: vit_nano8 has 6 blocks"),
    (["--lr", "0"], "--lr 0: choose a number above 0"),
    (["--head_epochs", "0"], "--head_epochs 0: choose a number above 0"),
    (["--ema", "2"], "--ema 2: choose"),
    (["--local_size", "0"], "--local_size 0: choose a number above 0"),
    (["--init", "post.pt"], "post.pt: its blocks are post-norm"),
    (["--local_size", "12"], "--local_size 12 is not divisible by the patch size 8"),
    (["--k", "33"], "--k 33"),
    (["--batch", "16", "--queue", "8"], "--batch 16 is larger than the queue of 8"),
    (["--init", "wide.pt"], "wide.pt does not fit this model"),
]
BAD_VICMAE = [
    (["--methods", "vicmae,moco"], "--methods vicmae,moco: choose some of"),
    (["--methods", "mae,mae"], "--methods mae,mae: choose some of"),
    (["--pooling", "sum"], "--pooling sum: choose mean"),
    (["--gap", "-2"], "--gap -2: choose"),
    (["--temperature", "0"], "--temperature 0: choose"),
    (["--crop_min", "0"], "--crop_min 0: choose a number above 0, up to 1"),
    (["--mask_ratio", "0.9"], "masking 0.9 of 4 patches keeps none"),
    (["--mask_ratio", "0"], "--mask_ratio 0 leaves nothing"),
    (["--contrast_weight", "nan"], "--contrast_weight nan: choose"),
    (["--contrast_from", "-1"], "--contrast_from -1: choose"),
    (["--epochs", "0"], "--epochs 0: choose"),
    (["--data", ""], "--data : no such folder"),
    (["--contrast_from", "3"], "--contrast_from 3 leaves no epoch of 3"),
    (["--data", "no/such"], "--data no/such: no such folder"),
    (["--data", "empty"], "--data empty: no folders of frames"),
    (["--images", "flat"], "--data flat: labels are needed"),
    (["--images", "no_val"], "--images no_val: there is no val/"),
    (["--init", "wide.pt"], "wide.pt does not fit this model"),
]
CMAE_FLAT = [*CMAE_TINY, "--data", "flat"]
BAD_CMAE = [
    ([*CMAE_FLAT, "--methods", "cmae,mae"], "--methods cmae,mae: choose"),
    ([*CMAE_FLAT, "--methods", ""], "--methods"),
    ([*CMAE_FLAT, "--stem", "fc"], "--stem fc: choose patch or conv"),
    ([*CMAE_FLAT, "--stem", "conv", "--model", "vit_nano2"], "divisible by 4, not 2"),
    ([*CMAE_FLAT, "--loss", "vicreg"], "--loss vicreg: choose"),
    ([*CMAE_FLAT, "--pool", "max"], "--pool max: choose"),
    ([*CMAE_FLAT, "--temperature", "0"], "--temperature 0"),
    ([*CMAE_FLAT, "--lambda_c", "-1"], "--lambda_c -1"),
    ([*CMAE_FLAT, "--ema", "1.1"], "--ema 1.1"),
    ([*CMAE_FLAT, "--mask_ratio", "1"], "--mask_ratio 1"),
    ([*CMAE_FLAT, "--target_mask_ratio", "-0.1"], "--target_mask_ratio -0.1"),
    ([*CMAE_FLAT, "--mask_ratio", "0.9"], "masking 0.9 of 4 patches keeps none"),
    ([*CMAE_FLAT, "--mask_ratio", "0"], "--mask_ratio 0 leaves nothing"),
    ([*CMAE_FLAT, "--mask_block", "3"], "--mask_block 3"),
    ([*CMAE_FLAT, "--mask_block", "0"], "--mask_block 0: choose"),
    ([*CMAE_FLAT, "--head_hidden", "0"], "--head_hidden 0: choose"),
    ([*CMAE_FLAT, "--finetune_lr", "nan"], "--finetune_lr nan: choose"),
    ([*CMAE_FLAT, "--warmup_epochs", "5"], "--warmup_epochs 5 outlasts --epochs 3"),
    ([*CMAE_FLAT, "--shift", "-1"], "--shift -1"),
    ([*CMAE_FLAT, "--feature_depth", "-1"], "--feature_depth -1"),
    ([*CMAE_FLAT, "--feature_depth", "2", "--share_decoder"], "--feature_depth 2: with --share_decoder choose 1 to 1"),
    ([*CMAE_FLAT, "--batch", "17"], "batch 17 is larger than the training set (16 images"),
    ([*CMAE_FLAT, "--init", "wide.pt"], "wide.pt does not fit this model"),
    ([*CMAE_TINY, "--data", "labelled", "--finetune_batch", "64"], "--finetune_batch 64"),
]
CAN_FLAT = [*CAN, "--data", "flat"]
BAD_CAN = [
    ([*CAN, "--data", "no/such"], "--data no/such: no such folder"),
    ([*CAN_FLAT, "--methods", "can,byol"], "--methods can,byol: choose"),
    ([*CAN_FLAT, "--methods", "can,can"], "--methods can,can: choose"),
    ([*CAN_FLAT, "--methods", "can,mae", "--mask_ratio", "0.6"], "--mask_ratio belongs to one method"),
    ([*CAN_FLAT, "--lambda_infonce", "1.5"], "--lambda_infonce 1.5: choose a number from 0 to 1"),
    ([*CAN_FLAT, "--lam", "-1"], "--lam -1: choose a number from 0 to 1"),
    ([*CAN_FLAT, "--mask_ratio", "1"], "--mask_ratio 1: choose a number from 0, below 1"),
    ([*CAN_FLAT, "--mask_ratio", "0.9"], "masking 0.9 of 4 patches keeps none"),
    ([*CAN_FLAT, "--strength", "nan"], "--strength nan: choose"),
    ([*CAN_FLAT, "--epoch_images", "-1"], "--epoch_images -1: choose"),
    ([*CAN_FLAT, "--projector_dim", "-8"], "--projector_dim -8: choose"),
    ([*CAN_FLAT, "--lr", "0"], "--lr 0: choose"),
    ([*CAN_FLAT, "--temperature", "0"], "--temperature 0"),
    ([*CAN_FLAT, "--sigma_max", "-0.1"], "--sigma_max -0.1: choose a number from 0"),
    ([*CAN_FLAT, "--views", "1"], "--views 1: choose 2"),
    ([*CAN_FLAT, "--lambda_infonce", "0", "--lam", "0", "--sigma_max", "0"], "no loss is left"),
    ([*CAN_FLAT, "--epoch_images", "4"], "--epoch_images 4 is less than the batch of 8"),
    ([*CAN_FLAT, "--batch", "17"], "batch 17 is larger than the training set (16 images"),
    ([*CAN_FLAT, "--init", "wide.pt"], "wide.pt does not fit this model"),
]
ROBUST = ["robust", "--encoder", "wide.pt", "--classifier", "of_ab.pt"]
BAD_EVAL = [
    (["finetune", "--encoder", "wide.pt", "--data", "labelled", "--blocks", "7", "--workers", "0"], "--blocks 7"),
    (["finetune", "--encoder", "wide.pt", "--data", "labelled", "--batch", "0"], "--batch 0: choose"),
    *((["finetune", "--encoder", "wide.pt", "--data", "labelled", "--workers", "0", *flags.split()], fault) for flags, fault in [
        ("--fraction 0", "--fraction 0.0: expected more than 0"),
        ("--fraction 1.5", "--fraction 1.5: expected more than 0 and at most 1"),
        ("--fraction 0.5 --list list.txt", "--fraction and --list: choose one"),
        ("--list no_such.txt", "no_such.txt: no such list"),
        ("--list a_file", "a_file: hello names 0 images"),
        ("--batch 5", "--batch 5: Mixup and CutMix pair images"),
        ("--batch 17", "batch 17 is larger"),
        ("--epochs 0", "--epochs 0"),
        ("--drop_path 1", "--drop_path 1.0: choose"),
        ("--label_smoothing -1", "--label_smoothing -1: choose"),
        ("--mixup -1", "--mixup"),
        ("--recipe best", "invalid choice: 'best'"),
    ]),
    *((["video", "--encoder", "wide.pt", "--workers", "0", *flags.split()], fault) for flags, fault in [
        ("--data flat", "--data flat: labels are needed"),
        ("--data labelled --label motion --frames 1", "--label motion: --data labelled has no second label"),
        ("--data no_val", "--data no_val: expected labelled videos"),
        ("--data stills --frames 0", "--frames 0"),
        ("--data stills --blocks 7", "--blocks 7"),
        ("--data loose", "--data loose: expected labelled videos"),
    ]),
    (["knn", "--encoder", "no_such.pt", "--data", "flat"], "no_such.pt: no such file"),
    (["knn", "--encoder", "wide.pt", "--data", "no/such"], "--data no/such: no such folder"),
    (["knn", "--encoder", "wide.pt", "--data", "flat"], "--data flat: labels are needed, but there is no train/"),
    (["knn", "--encoder", "wide.pt", "--data", "loose"], "lies in no class folder"),
    (["knn", "--encoder", "wide.pt", "--data", "no_val"], "no val/ or test/"),
    (
        ["knn", "--encoder", "wide.pt", "--data", "labelled", "--k", "99", "--workers", "0"],
        "99 is larger than the training set of 16",
    ),
    (
        ["knn", "--encoder", "wide.pt", "--data", "labelled", "--image_size", "30"],
        "30 is not divisible by the patch size 8",
    ),
    (["knn", "--encoder", "wide.pt", "--data", "labelled", "--precision", "fp16"], "--precision fp16"),
    *(
        ([protocol, "--encoder", "wide.pt", "--data", "labelled", f"--{name}", value], f"--{name} {value}: choose")
        for protocol, name, value in (
            ("knn", "k", "0"), ("knn", "workers", "-5"), ("knn", "image_size", "0"), ("probe", "epochs", "0"),
            ("probe", "batch", "-1"), ("cluster", "runs", "0"), ("finetune", "lr", "nan"), ("finetune", "blocks", "-2"),
        )
    ),  # fmt: skip
    (["knn", "--encoder", "empty", "--data", "labelled"], "empty: no such file"),
    (["knn", "--encoder", "code.pt", "--data", "labelled"], "code.pt holds more than tensors"),
    (["knn", "--encoder", "wide.pt", "--data", "labelled", "--votes", "none"], "--votes: invalid choice"),
    (["transfer", "--encoder", "wide.pt", "--sets", "labelled", "nowhere"], "--data nowhere: no such folder"),
    (["transfer", "--encoder", "wide.pt", "--sets", "no_val"], "--data no_val: there is no val/"),
    (["transfer", "--encoder", "wide.pt", "--against", "wide.pt"], "an encoder or a data set is named twice"),
    (["transfer", "--encoder", "wide.pt", "--against", "no_such.pt"], "no_such.pt: no such file"),
    (["robust", "--encoder", "wide.pt"], "probe.pt: no such file"),
    (["robust", "--encoder", "wide.pt", "--classifier", "wide.pt"], "wide.pt holds no classifier"),
    ([*ROBUST, "--sets", "empty"], "empty: expected one folder of images"),
    ([*ROBUST, "--sets", "no_val"], "folder train is no class of the classifier (a, b"),
    ([*ROBUST, "--mapping", "no.json"], "no.json is not readable"),
    ([*ROBUST, "--mapping", "a_file"], "a_file is not readable"),
    ([*ROBUST, "--mapping", "list.json"], "list.json holds no JSON dict"),
    (["knn", "--data", "labelled"], "--encoder"),
    (["knn", "--encoder", "wide.pt", "--data", "labelled", "--last", "7"], "the last 7 blocks are wanted, but"),
    (["knn", "--encoder", "wide.pt", "--data", "labelled", "--last", "0"], "the last 0 blocks"),
    (["knn", "--encoder", "wide.pt", "--data", "labelled", "--last", "2", "--per_block"], "leave out --last 2"),
    (["probe", "--encoder", "wide.pt", "--data", "labelled", "--last", "7"], "the last 7 blocks are wanted"),
    (["probe", "--encoder", "wide.pt", "--data", "labelled", "--recipe", "dinov2", "--both"], "leave out --last"),
    (["probe", "--encoder", "wide.pt", "--data", "labelled", "--epochs", "0"], "--epochs 0"),
    (["probe", "--encoder", "wide.pt", "--data", "labelled", "--batch", "0"], "batch 0"),
    (["probe", "--encoder", "wide.pt", "--data", "labelled", "--recipe", "adam"], "invalid choice: 'adam'"),
    (["segment", "--encoder", "wide.pt", "--data", "labelled"], "there is no labelled/images/training"),
    *(([*flags.split(), "--encoder", "wide.pt", "--workers", "0"], fault) for flags, fault in [
        ("retrieve --data labelled --neighbours 12", "12 neighbours, 2 clusters: the data has 12 images, choose fewer"),
        ("retrieve --data labelled --clusters 13 --neighbours 2", "2 neighbours, 13 clusters: the data has 12 images"),
        ("retrieve --data flat --classes a_file", "--data flat: labels are needed"),
        ("retrieve --data labelled --classes a_file", "a_file: 'hello' is no class"),
        ("finetune --data labelled --list empty.txt", "empty.txt: the list names no image"),
        ("lowshot --data labelled --shots 9 --lists empty.txt", "empty.txt: the list names no image"),  # nothing is drawn
        ("finetune --data labelled --list one.txt", "the training set (1 images) is too small for a batch on 1 processes"),
        ("embed --data flat", "--data flat: labels are needed"),
        ("embed --data labelled --classes no_such.txt", "no_such.txt: no such list of classes"),
        ("blocks --data flat", "--data flat: labels are needed"),
        ("blocks --data labelled --epochs 0", "--epochs 0"),
        ("invariance --data labelled", "probe.pt: no such file"),
        ("invariance --data labelled --classifier wide.pt", "wide.pt holds no classifier"),
        ("colorhist --data no_val", "--data no_val: there is no val/"),
        ("stats --data no/such", "--data no/such: no such folder"),
        ("segment --data no/such", "there is no no/such/images/training"),
    ]),
    (["sing", "--encoder", "wide.pt"], "'sing'"),
]


PROGRAMS = [(mae_ct, BAD), (can, BAD_CAN), (cmae, BAD_CMAE), (protocols, BAD_EVAL)]
PROGRAMS += [(mim_refiner, [([*REFINER, "--data", "flat", *flags], fault) for flags, fault in BAD_REFINER])]
PROGRAMS += [(p, [([*flags, "--data", "flat", "--init", "code.pt"], "code.pt holds more than tensors")])
             for p, flags in ((can, CAN), (cmae, CMAE_TINY), (mim_refiner, REFINER), (vicmae, VICMAE))]  # fmt: skip
CODE = [[flag, file] for flag in ("--init", "--head") for file in ("code.pt", "code.pkl")]
PROGRAMS += [(mae_ct, [([*FLAT, *given], f"{given[1]} holds more than tensors") for given in CODE])]
PROGRAMS += [(vicmae, [([*VICMAE, "--data", "flat", *flags], fault) for flags, fault in BAD_VICMAE])]


@pytest.fixture
def bad_files(folders, monkeypatch):
    monkeypatch.chdir(folders)
    if not Path("a_run").exists():
        Path("a_run").mkdir()
        Path("a_run/config.json").write_text("{}")
        config = dataclasses.asdict(mae_ct.Settings())
        flat = common.parse_settings(mae_ct.Settings, mae_ct.presets, [*TINY, "--data", str(folders / "flat")], "x")
        for name, content in {
            "of_can": json.dumps(dataclasses.asdict(can.Settings())),
            "newer": json.dumps(config | dict(shape=1)),
            "no_json": json.dumps(config)[:100],
            "no_object": "[1]",
            "wrong_type": json.dumps(config | dict(batch="8")),
            "wrong_value": json.dumps(config | dict(batch=-8)),
            "damaged_results": json.dumps(dataclasses.asdict(flat)),
        }.items():
            Path(name).mkdir()
            Path(name, "config.json").write_text(content)
        Path("damaged_results/results.json").write_text('{"mae')
        torch.save(dict(model=Mischief()), "code.pt")
        Path("code.pkl").write_bytes(pickle.dumps(Mischief(), 4))
        torch.save(dict(weight=1), "numbers.pt")
        Path("a_file").write_text("hello")
        Path("empty.txt").write_text("\n")
        Path("one.txt").write_text("b/000.png\n")
        common.save_encoder("wide.pt", nano(depth=6, dim=192, heads=6))
        common.save_encoder("post.pt", nano(depth=6, post_norm=True))
        protocols.Classifier(common.load_encoder("wide.pt"), ["a", "b"]).save("of_ab.pt", with_encoder=False)
        Path("list.json").write_text("[]")
        write_pictures(Path("loose/train"), [(24, 24)])
        write_pictures(Path("no_val/train/a"), [(24, 24)])
        for split in ("train", "val"):
            write_pictures(Path("stills") / split / "a", [(24, 24)] * 4)
    return folders


@pytest.mark.parametrize("program, argv, fault", [(p, *c) for p, bad in PROGRAMS for c in bad])
def test_bad_input_is_named_before_anything_is_written(bad_files, program, argv, fault):
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError, match=re.escape(fault)) as refused, contextlib.redirect_stdout(io.StringIO()):
        program.main(argv)
    assert len(str(refused.value).splitlines()) == 1 or "strip it once" in str(refused.value)
    assert sorted(Path().rglob("*")) == before  # what would run as code makes a folder


def test_a_classifier_runs_no_code(bad_files):
    with pytest.raises(InputError, match="code.pt holds more than tensors"):
        protocols.load_classifier("code.pt", nano())
    assert not Path("ran").exists()
    torch.load("code.pt", weights_only=False)  # it would
    Path("ran").rmdir()


def test_a_checkpoint_of_another_shape_is_refused(folders, tmp_path):
    out = tmp_path / "run"
    break_at(4, *TINY, "--data", folders / "flat", "--stages", "mae", "--out", out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | dict(decoder_dim=32)))
    with pytest.raises(InputError, match=r"last.pt \(decoder\) does not fit.*\(16, .*expected \(32, "):
        main("--out", out, "--resume")


def test_a_batch_must_fit_the_processes(monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 3)
    with pytest.raises(InputError, match="batch 8 is not divisible by 3 processes"):
        common.check_batch(common.RunSettings(), tiny_images(), 8, 1)


@pytest.mark.parametrize("program, flags, fault", [
    ("mae_ct.py", [*TINY, "--data", "no/such"], "--data no/such"),
    ("eval.py", ["knn", "--encoder", "no_such.pt"], "no_such.pt: no such file"),
    *(pytest.param(f"{p}.py", ["--lr", "nan"], "--lr nan: choose", marks=slow)
      for p in ("mim_refiner", "can", "cmae", "vicmae")),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_no_traceback(tmp_path, program, flags, fault):
    command = [sys.executable, HERE / program, *flags]
    done = subprocess.run(command, env=quiet_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{program}: {fault}")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- benchmarks


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name, ours, other, pairs):
    """Prints the median ratio of times over alternating pairs."""
    ours(), other()
    ratios = [seconds(other) / seconds(ours) for _ in range(pairs)]
    spread = f"median of {pairs} pairs, {min(ratios):.2f}-{max(ratios):.2f}"
    print(f"{name}: {statistics.median(ratios):.2f} times as fast ({spread})")


def bench_attention():
    """A training step of a small ViT on this CPU with common.attend and with torch's fused kernel."""
    encoder, x = common.build_vit("vit_nano8", 48), torch.randn(128, 3, 48, 48)

    def step(attention, precision):
        with mock.patch.object(common, "attend", attention):
            backward(
                lambda x: ((encoder.pooled(encoder(x)),), None), lambda y: (y.square().mean(), None), (x,), 0, precision
            )

    for precision in (torch.float32, torch.bfloat16):
        steps = [partial(step, f, precision) for f in (common.attend, F.scaled_dot_product_attention)]
        compare(f"attention in {precision}, against F.scaled_dot_product_attention", *steps, pairs=7)


def bench_step():
    """Steps at the papers' sizes. On a CPU that of MAE, ViT-B/16 at 224 pixels, batch 32 in bfloat16, against the same
    with torch's fused attention. On a GPU --cost of all papers, B and L: flash and written-out attention, compiled or not.
    """
    if torch.cuda.is_available():
        batch = "--batch 64".split()
        programs = {mae_ct: [*batch, "--mae_batch", "64"], mim_refiner: [*batch, "--mae_batch", "64"]}
        for program, model in itertools.product((mae_ct, mim_refiner, can, cmae, vicmae), ("vit_b16", "vit_l16")):
            for kernel, compiled in itertools.product(("FLASH_ATTENTION", "MATH"), ("--no_compile", "--compile")):
                print(f"\n{program.__name__} {model} {kernel} {compiled}", flush=True)
                torch.compiler.reset()
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend[kernel]):
                    program.main(["--cost", "--model", model, *programs.get(program, batch), compiled])
        return
    encoder, x = common.build_vit("vit_b16", 224), torch.randn(32, 3, 224, 224)
    decoder = common.MAEDecoder(encoder.grid, 16, encoder.dim)
    optimizer = common.adamw(common.parameter_groups(nn.ModuleList([encoder, decoder]), 1e-4, 0.05))

    def encode(x, noise):
        ids_keep, ids_restore, mask = common.random_masking(noise, 0.75)
        return (), common.mae_loss(decoder(encoder(x, ids_keep), ids_restore), x, mask)

    def step(attention):
        with mock.patch.object(common, "attend", attention):
            backward(encode, None, (x, uniform((0,), torch.arange(32), 196)), 0, torch.bfloat16)
        optimizer.step()
        optimizer.zero_grad()

    steps = [partial(step, f) for f in (common.attend, F.scaled_dot_product_attention)]
    compare("MAE step of ViT-B/16, against the fused kernel", *steps, pairs=5)
    print(f"{32 / seconds(steps[0]):.1f} images/s")


def bench_input(folder, gpu_rate=1000.0):
    """Images a second of one worker, two views of 224 pixels and MIM-Refiner's 12, against torchvision's v2 transforms;
    and the workers that a GPU of an assumed `gpu_rate` in images/s needs."""
    torch.set_num_threads(1)
    images, s = common.load_images(folder, "train", labels=False), mim_refiner.Settings()
    few, n = [View(224)] * 2, min(len(images), 250)
    many = [View(224, (s.global_scale_min, 1.0))] * 2
    many += [View(s.local_size, (s.local_scale_min, s.global_scale_min))] * s.local_views
    for name, views in (("2 views", few), ("12 views", many)):
        cut = common.RandomCrops(views, 0)
        plain = [
            transforms.Compose([
                transforms.RandomResizedCrop(v.size, v.scale, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ])
            for v in views
        ]  # fmt: skip
        ours = lambda: [cut(images, 0, i) for i in range(n)]
        theirs = lambda: [[t(image) for t in plain] for image in map(images.open, range(n))]
        compare(f"{name} of {n} images, against torchvision's v2", ours, theirs, pairs=5)
        rate = n / seconds(ours)
        need = f"a GPU of {gpu_rate:g} images/s (assumed) needs {math.ceil(gpu_rate / rate)} such workers"
        print(f"{rate:.1f} images/s by one worker; {need}")


def bench_eval():
    """k-NN, k-means and logistic regression against scikit-learn, both on all cores of this CPU."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    x, y = torch.randn(60_000, 1024), torch.randint(100, (60_000,))
    weights = lambda distances: np.exp((1 - distances) / 0.07)
    model = KNeighborsClassifier(10, weights=weights, algorithm="brute", metric="cosine", n_jobs=-1)
    model.fit(x[:50_000].numpy(), y[:50_000].numpy())
    ours = lambda: protocols.knn(x[:50_000], y[:50_000], x[50_000:], y[50_000:])
    theirs = lambda: model.score(x[50_000:].numpy(), y[50_000:].numpy())
    compare("k-NN, 50 000 x 1024 and 10 000 features, against KNeighborsClassifier", ours, theirs, pairs=3)

    precision = common.precision_of("auto", CPU)
    for noise in (2.0, 5.0):  # the centres are 28 apart: clusters that hardly touch, clusters that overlap
        y = torch.randint(100, (10_000,))
        x, best = torch.randn(100, 384)[y] + noise * torch.randn(10_000, 384), {}
        fit = lambda i: MiniBatchKMeans(100, n_init=1, tol=1e-4, random_state=i).fit(x.numpy()).inertia_
        ours = lambda: best.update(ours=protocols.kmeans(x, 100, 100, precision=precision)[1].min().item())
        theirs = lambda: best.update(theirs=min(map(fit, range(100))))
        compare(f"100 k-means runs, noise {noise:g}, against MiniBatchKMeans", ours, theirs, pairs=1)
        print(f"    best loss {best['ours']:.0f}, MiniBatchKMeans {best['theirs']:.0f}")

    centres, y = torch.randn(100, 384), torch.arange(100).repeat_interleave(5)
    splits = [F.normalize(centres[y] + 2 * torch.randn(500, 384), dim=1) for _ in range(3)]
    penalties, solutions = [10.0**e for e in range(-7, 1)], {}

    def objectives(name):
        return [logistic_objective(x, y, solutions[name, i, p], p) for i, x in enumerate(splits) for p in penalties]

    def ours():
        for i, x in enumerate(splits):
            found = protocols.logistic_regression(x, y, 100, penalties)
            solutions.update({("ours", i, p): w for p, w in found.items()})

    def theirs(name, **options):
        for i, x in enumerate(splits):
            for p in penalties:
                model = LogisticRegression(C=1 / (p * len(x)), fit_intercept=False, max_iter=100_000, **options)
                solutions[name, i, p] = torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_.T)

    theirs("exact", tol=1e-10)
    excess = lambda name: max(a / b - 1 for a, b in zip(objectives(name), objectives("exact")))
    for tol in (1e-4, 1e-7):  # its default; what it takes to come as near to the minimum as we do
        compare(f"logistic regression, against LogisticRegression(tol={tol})", ours, partial(theirs, tol, tol=tol), pairs=5)
        print(f"    largest excess over the least loss {100 * excess('ours'):.3f} %, LogisticRegression {100 * excess(tol):.3f} %")


def bench_heads():
    """Forward and backward of 8 heads (MIM-Refiner B.2), batch 256 of width 1024, 12 views, as one module and as eight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, s = common.precision_of("auto", device), mim_refiner.Settings()
    torch.manual_seed(0)
    together = mim_refiner.IDHeads(8, 1024, s).to(device)
    separate = [mim_refiner.IDHeads(1, 1024, s).to(device) for _ in range(8)]
    y, index = torch.randn(256, 12, 8, 1024, device=device), torch.arange(256, device=device)
    dice = torch.rand(256, 2, device=device)

    def step(heads):
        with common.autocast(device, precision):
            parts = [y] if len(heads) == 1 else y.split(1, 2)
            sum(h.loss(part, index, index, dice, s, 20)[0].sum() for h, part in zip(heads, parts)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    compare(f"8 heads batched, against separate ones ({device}, {precision})", lambda: step([together]), lambda: step(separate), 5)


if __name__ == "__main__":
    action, name, *more = sys.argv[1:]
    {"worker": worker, "bench": lambda name, *more: globals()[f"bench_{name}"](*more)}[action](name, *more)
