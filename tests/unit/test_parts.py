"""A run with Wan's VAE and cached embeddings in the places of the shapes codec and its words."""

from __future__ import annotations

import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from megatron_kvpo.data.embeddings import add_texts  # noqa: E402
from megatron_kvpo.training.parts import check_run  # noqa: E402
from tests.parallel import tiny_run  # noqa: E402
from tests.unit.test_embeddings import FakeEncoder  # noqa: E402

TEXTS = [text for prompt in tiny_run.PROMPTS for text in prompt["segments"]]


class Words(FakeEncoder):
    """A vector of the model's size for each word."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32, text_length=12)
        self.text_dim = 16


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "wan" / "vae")
    return tmp_path / "wan"


@pytest.fixture
def embeddings(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    add_texts(path, Words(), TEXTS)
    return path


def test_a_run_decodes_with_wans_vae_and_reads_embeddings(tmp_path, vae, embeddings):
    strong = tiny_run.write_strong_weights(tmp_path / "strong")
    config = tiny_run.tiny_config(
        tmp_path / "run", "num_updates=2", f"codec.vae={vae}", "codec.max_rows=2",
        f"data.embeddings={embeddings}", model={**tiny_run.RECIPE["model"], **strong["model"]},
    )  # fmt: skip
    trace = tiny_run.train_traced(config)
    assert len(trace.gradients) == 2
    lines = [line for line in trace.metrics if "policy/grad_norm" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["policy/energy_mean"] > 0
        assert line["policy/grad_norm"] > 0
        assert math.isfinite(line["reward/composite"])


def test_texts_and_files_that_do_not_fit_are_named_before_a_run_begins(tmp_path, vae, embeddings):
    other = [{"segments": ["a red square moves left"]}]
    with pytest.raises(ValueError, match=r"1 texts are not in .*'a red square moves left'"):
        check_run(tiny_run.tiny_config(
            tmp_path / "run", f"data.embeddings={embeddings}", prompts=other
        ))  # fmt: skip
    with pytest.raises(ValueError, match=r"text_dim 16, not 24"):
        check_run(tiny_run.tiny_config(
            tmp_path / "run", f"data.embeddings={embeddings}", "model.text_dim=24"
        ))  # fmt: skip
    config = tiny_run.tiny_config(tmp_path / "run", f"codec.vae={vae}", "model.latent_channels=16")
    with pytest.raises(ValueError, match=r"has 4 latent channels, model.latent_channels is 16"):
        tiny_run.train_traced(config)
