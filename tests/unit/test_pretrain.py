"""Pre-training: what is refused, what is drawn, where it begins and what it leaves."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kvpo.data.embeddings import add_texts
from megatron_kvpo.model import sight
from megatron_kvpo.model.held import FFN, Held
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.training import forcing as module
from megatron_kvpo.training.forcing import pick_segments
from megatron_kvpo.training.latent_streams import open_cache, open_videos, opener
from megatron_kvpo.training.pretrain import cut_curve, empty_text
from tests.unit import small
from tests.unit.tiny_pretrain import LORA, Clips, lively, recipe

ranks = small.ranks


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.fp8=[ffn]"], "model.fp8 is .*trained.mode full: .*trained.mode lora"),
        (["fitting.autocast=true", "model.dtype=bfloat16"], "autocast is for a float32 model"),
        (["fitting.autocast=true", *LORA], "autocast is for weights that all train"),
        (["parallel.branch=2"], "parallel.branch is 2: pre-training has no branches"),
        (["fitting.forcing=diffusion"], "own_estimates_from 0.5: .*set fitting.own_estimates_from"),
        (["latents.folder=x", "fitting.sample_every=5"], "sample_every is 5: .*set it to 0"),
        (["latents.videos.path=x", "fitting.sample_every=5"], "latents.videos is set, and look"),
        (["latents.videos.path=x", "latents.folder=y"], "folder is y and .* reads one of them"),
        (["latents.embeddings=x"], "embeddings is x and there is no latents.videos"),
        (["codec.vae=x"], "vae is x, and neither latents.folder nor latents.videos says"),
        (["codec.vae=x", "latents.videos.path=y"], "path y, without latents.embeddings: tools"),
        (["latents.videos.start=random", "latents.videos.every=9"], "start is random, and starts"),
        (["latents.videos.fps=0"], "fps is 0.0: it must be above 0"),
        (["latents.videos.max_bad=2"], "max_bad 2.0 is a share of the files"),
        (["trained.adapter=x"], "trained.adapter is x and trained.mode full: merge it first"),
        (["fitting.own_history=1.5"], "fitting.own_history is 1.5: it is a share"),
        (["fitting.micro_rows=-1"], "fitting.micro_rows is -1: it must be above 0"),
        (["fitting.ema_decay=1"], "ema_decay 1.0 must lie in"),
        (["stream.num_frames=33", "stream.resident_frames=33"], "33 exceeds model.max_frames 32"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        recipe(tmp_path, *overrides)


def objective(tmp_path, ranks, *overrides):
    config = recipe(tmp_path, *overrides)
    learner = lively(config, ranks, torch.full((12, 16), 7.0))
    return learner.forcing, Clips(config, ranks).batch(0, 0, 4)


def test_a_row_is_told_by_one_of_its_segments_and_learns_from_its_frames(tmp_path, ranks):
    forcing, batch = objective(tmp_path, ranks, "fitting.caption_drop=0")
    seen = set()
    for step in range(20):
        rows = forcing.rows(batch, step, 0, own=False)
        for row, (text, inside) in enumerate(zip(rows.text_BXD, rows.inside_BF, strict=True)):
            (segment,) = [i for i, t in enumerate(batch.text_SXD) if torch.equal(t, text)]
            of, start, stop = batch.segment_S3[segment].tolist()
            assert of == row
            assert inside.nonzero().flatten().tolist() == list(range(start, stop))
            seen.add(segment)
    assert seen == set(range(6))


def test_captions_are_dropped_or_swapped_for_another_of_the_batch(tmp_path, ranks):
    forcing, batch = objective(tmp_path, ranks, "fitting.caption_drop=1")
    assert (forcing.rows(batch, 0, 0, own=False).text_BXD == 7).all()
    swapped = ["fitting.caption_drop=0", "fitting.caption_noise=1"]
    forcing, batch = objective(tmp_path, ranks, *swapped)
    told = set()
    for step in range(40):
        rows = forcing.rows(batch, step, 0, own=False)
        picked = rows.inside_BF[0].nonzero()[0, 0]  # the first row has segments at 0 and 6
        own = batch.text_SXD[0 if picked == 0 else 1]
        assert not torch.equal(rows.text_BXD[0], own)
        told |= {i for i, t in enumerate(batch.text_SXD) if torch.equal(t, rows.text_BXD[0])}
    assert told == set(range(6))
    alone = Clips(forcing._config, ranks).batch(0, 1, 1)
    with pytest.raises(ValueError, match=r"share of a batch has 1 caption: set it to 0"):
        forcing.rows(alone, 0, 0, own=False)


def test_a_draw_depends_on_the_step_and_the_row_alone(tmp_path, ranks):
    forcing, batch = objective(tmp_path, ranks)
    whole = forcing.rows(batch, 3, 8, own=True)
    later = Clips(forcing._config, ranks).batch(0, 2, 2)
    part = forcing.rows(later, 3, 10, own=True)
    assert torch.equal(part.noise_SBFCHW, whole.noise_SBFCHW[:, 2:])
    assert torch.equal(part.uniform_BKN, whole.part(slice(2, 4)).uniform_BKN)
    other = forcing.rows(later, 4, 10, own=True)
    assert not torch.equal(other.noise_SBFCHW, part.noise_SBFCHW)
    noise_BFCHW = whole.noise_SBFCHW[0]
    assert abs(float(noise_BFCHW.std()) - 1) < 0.05
    assert not torch.equal(noise_BFCHW[0], noise_BFCHW[1])


def test_a_row_without_a_segment_is_refused():
    assert pick_segments(torch.tensor([[0, 0, 3], [1, 0, 3]]), torch.tensor([0.9, 0.1])).tolist() \
        == [0, 1]  # fmt: skip
    with pytest.raises(ValueError, match=r"batch of 3 rows are of rows \[0, 2\]"):
        pick_segments(torch.tensor([[0, 0, 3], [2, 0, 3]]), torch.zeros(3))
    with pytest.raises(ValueError, match=r"batch of 1 rows"):
        pick_segments(torch.tensor([[0, 0, 3], [2, 0, 3]]), torch.zeros(1))


def test_the_bell_has_mean_one_over_the_shifted_levels_and_spares_the_samplers_own(tmp_path, ranks):
    forcing, _ = objective(tmp_path, ranks, "fitting.weighting=bell")
    levels = module._shifted(module._steps(), 5.0)
    weight = forcing._weight(levels, torch.ones_like(levels, dtype=torch.bool))
    assert float(weight.mean()) == pytest.approx(1)
    assert float(weight.max()) == pytest.approx(float(forcing._weight(
        torch.tensor([0.5]), torch.tensor([True]))), rel=1e-3)  # fmt: skip
    assert float(weight[-1]) == 0
    assert forcing._weight(torch.tensor([1.0]), torch.tensor([False])).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_BFCHW": torch.zeros(1, 15, 4, 8, 8)}, r"\[15, 4, 8, 8\].* say \[18, 4, 8, 8\]"),
        ({"text_SXD": torch.zeros(1, 12, 8)}, r"texts are \[12, 8\], the model takes \[12, 16\]"),
    ],
)
def test_batches_of_other_sizes_are_refused(tmp_path, ranks, change, words):
    forcing, _ = objective(tmp_path, ranks)
    one = {
        "latent_BFCHW": torch.zeros(1, 18, 4, 8, 8), "text_SXD": torch.zeros(1, 12, 16),
        "segment_S3": torch.tensor([[0, 0, 18]]), "index_B": torch.zeros(1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        forcing.rows(LatentBatch(**{**one, **change}), 0, 0, own=False)


@pytest.mark.parametrize("more", [[], LORA, [*LORA, "model.fp8=[ffn]"]])
def test_in_bfloat16_what_trains_is_float32_and_learns_as_in_float32(tmp_path, ranks, more):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        fitting = ["fitting.caption_drop=0", "optimizer.lr=3e-3", "fitting.sampler_levels=0"]
        config = recipe(tmp_path, f"model.dtype={dtype}", *more, *fitting)
        learner = lively(config, ranks, empty_text(config))
        assert {p.dtype for p in learner.trained.values()} == {torch.float32}
        if more:
            weight = learner.model.blocks[0].ffn["0"].weight
            assert str(weight.dtype) == f"torch.{dtype}"
        batch = Clips(config, ranks).batch(0, 0, 4)
        losses[dtype] = [
            float(learner.train_step(batch, step=0, own=False, scale=1.0)) for _ in range(12)
        ]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"][-1] < 0.97 * losses["bfloat16"][0]


class Products(TorchDispatchMode):
    """How often the feed-forward's second product is computed."""

    def __init__(self, ffn_dim: int) -> None:
        super().__init__()
        self.ffn_dim, self.runs = ffn_dim, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.aten.addmm.default:
            self.runs += args[1].shape[-1] == self.ffn_dim
        return func(*args, **(kwargs or {}))


PLANS = {"kept": (0, 2, 0, 0), "again": (0, 0, 0, 0), "attention": (0, 0, 2, 0),
         "ffn": (0, 0, 0, 2), "both": (0, 0, 2, 2), "mixed": (0, 1, 1, 0)}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        [], LORA, [*LORA, "model.fp8=[ffn]"], ["model.dtype=bfloat16"],
        [*LORA, "model.dtype=bfloat16"], ["fitting.autocast=true"],
    ],
    ids=lambda more: " ".join(more) or "full",
)  # fmt: skip
def test_blocks_that_hold_results_train_to_the_same_bits(tmp_path, ranks, monkeypatch, more):
    forward, runs, found = sight._forward, [], {}
    monkeypatch.setattr(sight, "_forward", lambda *a: runs.append(1) or forward(*a))
    counts = "model.dtype=bfloat16" not in more and "model.fp8=[ffn]" not in more
    for name, kept in PLANS.items():
        config = recipe(tmp_path, *more)
        learner = lively(config, ranks, empty_text(config))
        monkeypatch.setattr(learner.model.recompute, "_kept", lambda *a, kept=kept: kept)
        runs.clear()
        with Products(config.model.ffn_dim) as products:
            learner.train_step(Clips(config, ranks).batch(0, 0, 4), 0, own=True, scale=1.0)
        least = 2 * config.model.num_layers  # the estimate's pass, and one forward
        again = config.model.num_layers - kept[1]
        assert len(runs) == least + again - kept[2]
        if counts or more == ["model.dtype=bfloat16"]:
            assert products.runs == least + again - kept[3]
        found[name] = {n: p.main_grad.clone() for n, p in learner.trained.items()}
        assert all(g.any() for n, g in found[name].items() if n.endswith("ffn.2.weight"))
    for name in found:
        for weight, value in found["kept"].items():
            assert torch.equal(found[name][weight], value), (name, weight)


@pytest.mark.parametrize("more", [[], LORA])
def test_what_is_held_is_a_result_a_block_and_goes_in_backward(
    tmp_path, ranks, monkeypatch, more
):  # fmt: skip
    config = recipe(tmp_path, *more)
    learner = lively(config, ranks, empty_text(config))
    monkeypatch.setattr(learner.model.recompute, "_kept", lambda *a: (0, 0, 0, 2))
    made, refs, init = [], [], Held.__init__

    def watched(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Held, "__init__", watched)
    batch = Clips(config, ranks).batch(0, 0, 4)
    with learner.acting():
        loss = learner.forcing.loss_sum(learner.forcing.rows(batch, 0, 0, own=False), own=False)
        tokens = learner.forcing.sight.num_tokens
        for held in (ref() for ref in made):
            (result,) = (t for results in held.results[FFN] for t in results)
            assert result.shape == (tokens, 4, config.model.hidden_dim)
            assert held.num_bytes(FFN) == result.numel() * 4
            assert result.grad_fn is None
            refs.append(weakref.ref(result.untyped_storage()))
        del held, result
        loss.backward()
    assert len(made) == len(refs) == 2
    del loss
    gc.collect()
    assert not any(ref() for ref in made)
    assert not any(ref() for ref in refs)


class OneEnd:
    """A text encoder for which the empty text is one token of ones."""

    identity, dtype, text_length, text_dim = "one end", torch.float32, 12, 16

    def embed(self, texts):
        return [torch.ones(1 + len(text.split()), 16) for text in texts]


def test_the_empty_text_is_padding_or_what_the_text_encoder_says(tmp_path):
    assert not empty_text(recipe(tmp_path)).any()
    path = tmp_path / "texts.safetensors"
    add_texts(path, OneEnd(), ["a word"])
    config = recipe(tmp_path, f"latents.empty_text={path}")
    with pytest.raises(ValueError, match="1 texts are not in"):
        empty_text(config)
    add_texts(path, OneEnd(), [""])
    assert empty_text(config).sum(1).tolist() == [16, *[0] * 11]


def test_what_the_recipe_names_is_opened_with_this_ranks_share(tmp_path, ranks, monkeypatch):
    opened: dict[str, object] = {}
    config = recipe(tmp_path, "latents.folder=there")
    assert opener(recipe(tmp_path)) is None
    assert opener(config) is open_cache
    with pytest.raises(ValueError, match="no latents at there"):
        open_cache(config, ranks)

    def cache(folder, **how):
        opened.update(how, folder=folder)
        line = SimpleNamespace(shape=(18, 4, 8, 8))
        spec = SimpleNamespace(text_length=12, text_dim=16)
        return SimpleNamespace(manifest=SimpleNamespace(lines=[line]), spec=spec)

    monkeypatch.setattr("megatron_kvpo.training.latent_streams.LatentCache", cache)
    open_cache(config, ranks)
    assert opened == {"folder": Path("there"), "batch_size": 4, "seed": 3, "rank": 0,
                      "world_size": 1, "device": ranks.device}  # fmt: skip
    videos = recipe(tmp_path, "latents.videos.path=there")
    assert opener(videos) is open_videos
    with pytest.raises(ValueError, match="no videos at there: give a folder"):
        open_videos(videos, ranks)
    other = recipe(tmp_path, "latents.videos.path=x", "latents.embeddings=nowhere")
    with pytest.raises(ValueError, match="no prompt embeddings at nowhere"):
        open_videos(other, ranks)


def test_the_curve_is_cut_where_a_run_goes_on(tmp_path, ranks):
    path = tmp_path / "curve.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 4, 6)]
    path.write_text("\n".join(lines) + "\n")
    cut_curve(path, 4, ranks)
    assert path.read_text().splitlines() == lines[:3]
    cut_curve(path, 0, ranks)
    assert not path.read_text()
