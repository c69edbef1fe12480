"""The shapes world's videos in memory: every segment of every manifest line, on its own frames."""

from __future__ import annotations

import json
from itertools import islice, pairwise

import pytest
import torch

pytest.importorskip("nvidia.dali")

from megatron_kvpo.data.video import ClipSpec, decode_file
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.training.shapes_corpus import load_corpus
from tests.unit import small
from tests.unit.tiny_pretrain import recipe

ranks = small.ranks


def test_a_row_is_a_segment_of_a_video_as_its_manifest_tells_it(tmp_path, ranks):
    config = recipe(
        tmp_path, f"videos.folder={tmp_path / 'shapes'}", "videos.count=3", "videos.seed=5",
        "codec.width=8", "fitting.codec_steps=1", "fitting.codec_batch=2", "model.text_length=24",
    )  # fmt: skip
    config.run_folder.mkdir(parents=True)
    corpus, codec = load_corpus(config, ranks)
    lines = (tmp_path / "shapes" / "manifest.jsonl").read_text().splitlines()
    wanted, texts = [], []
    for row, line in enumerate(map(json.loads, lines)):
        edges = [0, *line["switch_frames"], 18]
        wanted += [[row, a, b] for a, b in pairwise(edges)]
        texts += line["segments"]
        spec = ClipSpec(num_pixel_frames=69, size=(32, 32), dtype=torch.uint8)
        video = decode_file(tmp_path / "shapes" / line["file"], spec).float() / 127.5 - 1
        with torch.no_grad():
            found = codec.encode(video[None])[0]
        torch.testing.assert_close(corpus.latent_NFCHW[row], found, rtol=1e-4, atol=1e-4)
    assert len(wanted) > 3, "no video of several segments: take another seed"
    assert corpus.segment_S3.tolist() == wanted
    assert torch.equal(corpus.text_SXD, WordEncoder(16, 24).encode(texts))
    again, _ = load_corpus(config, ranks)
    assert again.fingerprint() == corpus.fingerprint()
    for ours, theirs in islice(zip(corpus.batches(2), again.batches(2), strict=False), 2):
        assert torch.equal(ours.latent_BFCHW, theirs.latent_BFCHW)
        assert ours.index_B.tolist() == theirs.index_B.tolist()
