"""The cache of prompt embeddings and the tool that fills it."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kvpo.data.embeddings import EmbeddingCache, add_texts, missing_texts, text_key
from megatron_kvpo.model.umt5 import load_umt5
from tools import encode_prompts

TEXTS = ["a red square moves", "blue", "a blue circle moves a red square"]


class FakeEncoder:
    """A vector for each word, and the texts that it was asked for."""

    def __init__(self, identity="fake", dtype=torch.bfloat16, text_length=8, fail_at=None):
        self.identity, self.dtype, self.text_length, self.text_dim = identity, dtype, text_length, 4
        self.fail_at, self.asked = fail_at, []

    def embed(self, texts):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked.extend(texts)
        return [torch.stack([self._vector(word) for word in text.split()]) for text in texts]

    def _vector(self, word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        draw = torch.randn(self.text_dim, generator=torch.Generator().manual_seed(seed))
        return draw.to(self.dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "embeddings.safetensors"


def test_a_cache_gives_what_the_encoder_gave(path):
    encoder = FakeEncoder()
    assert add_texts(path, encoder, [*TEXTS, TEXTS[0]], batch=2) == 3
    cache = EmbeddingCache(path, encoder="fake", text_dim=4, text_length=8)
    assert (len(cache), cache.text_dim, cache.text_length) == (3, 4, 8)
    text_BXD = cache.encode([TEXTS[2], TEXTS[0], TEXTS[2]])
    assert text_BXD.shape == (3, 8, 4)
    assert text_BXD.dtype == torch.float32
    for row, text in enumerate((TEXTS[2], TEXTS[0], TEXTS[2])):
        (own,) = encoder.embed([text])
        assert torch.equal(text_BXD[row, : len(own)], own.float())
        assert not text_BXD[row, len(own) :].any()


def test_stored_tensors_hold_no_padding_and_the_encoders_dtype(path):
    add_texts(path, FakeEncoder(), TEXTS)
    stored = load_file(path)
    assert sorted(len(tensor) for tensor in stored.values()) == [1, 4, 7]
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert set(stored) == {text_key("fake", text) for text in TEXTS}


def test_only_what_is_missing_is_added(path):
    add_texts(path, FakeEncoder(), TEXTS[:2])
    before = load_file(path)
    second = FakeEncoder()
    assert missing_texts(path, [*TEXTS, " blue "]) == [TEXTS[2]]
    assert add_texts(path, second, TEXTS) == 1
    assert second.asked == [TEXTS[2]]
    after = load_file(path)
    assert len(after) == 3
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    stamp = path.stat().st_mtime_ns
    assert add_texts(path, second, TEXTS) == 0
    assert path.stat().st_mtime_ns == stamp


def test_an_interrupted_call_keeps_what_was_done(path):
    with pytest.raises(KeyboardInterrupt):
        add_texts(path, FakeEncoder(fail_at=2), TEXTS, batch=1)
    assert len(EmbeddingCache(path)) == 2
    assert add_texts(path, FakeEncoder(), TEXTS) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_white_space_makes_no_other_text(path):
    add_texts(path, FakeEncoder(), TEXTS)
    cache = EmbeddingCache(path)
    assert "  a red\nsquare moves" in cache
    assert torch.equal(cache.encode(["  a red\nsquare moves"]), cache.encode([TEXTS[0]]))
    assert "a red square" not in cache


def test_an_unknown_text_is_named_with_the_command_that_adds_it(path):
    add_texts(path, FakeEncoder(), TEXTS)
    with pytest.raises(ValueError, match=r"2 texts .* 'green': python -m tools\.enc") as found:
        EmbeddingCache(path).encode(["green", TEXTS[0], "yellow", "green"])
    assert f"--output {path}" in str(found.value)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (FakeEncoder(identity="other"), "encoder fake, not other"),
        (FakeEncoder(dtype=torch.float32), "dtype bfloat16, not float32"),
        (FakeEncoder(text_length=9), "text_length 8, not 9"),
    ],
)
def test_a_cache_that_was_made_otherwise_is_refused(path, other, named):
    add_texts(path, FakeEncoder(), TEXTS[:1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=named):
        add_texts(path, other, TEXTS)
    with pytest.raises(ValueError, match="text_dim 4, not 5"):
        EmbeddingCache(path, text_dim=5)
    assert path.read_bytes() == before


def test_files_that_are_no_cache_are_refused(path):
    with pytest.raises(ValueError, match=r"no prompt embeddings at .*encode_prompts"):
        EmbeddingCache(path)
    path.parent.mkdir()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no prompt embeddings"):
        EmbeddingCache(path)
    path.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        add_texts(path, FakeEncoder(), TEXTS)
    with pytest.raises(ValueError, match=r"not as torch\.float16"):
        add_texts(path, FakeEncoder(dtype=torch.float16), TEXTS)


def test_the_tool_writes_what_umt5_says_and_loads_it_only_when_needed(tmp_path, path, monkeypatch):
    pytest.importorskip("transformers")
    from tests.unit.test_umt5 import save_folder, tiny_model

    folder = save_folder(tmp_path / "umt5", tiny_model())
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"segments": TEXTS[:2], "switch_frames": [9]}, {"segments": [TEXTS[2]]}]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["--prompts", str(prompts), "--encoder", str(folder), "--output", str(path),
                 "--text-length", "12", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert encode_prompts.main(arguments) == 0
    encoder = load_umt5(folder, text_length=12, dtype=torch.float32)
    cache = EmbeddingCache(path, encoder=encoder.identity)
    torch.testing.assert_close(cache.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(encode_prompts, "load_umt5", None)
    assert encode_prompts.main(arguments) == 0
    with pytest.raises(ValueError, match="text_length 12, not 13"):
        encode_prompts.main([*arguments, "--text-length", "13"])
    monkeypatch.undo()
    assert "" not in cache
    assert encode_prompts.main([*arguments[2:], "--empty"]) == 0
    told = EmbeddingCache(path).encode(["", TEXTS[0]])
    torch.testing.assert_close(told, encoder.encode(["", TEXTS[0]]), rtol=1e-5, atol=1e-5)
    rows = [{"file": "a.mp4", "caption": "a dog"}, {"file": "b.mp4"},
            {"file": "c.mp4", "segments": [{"text": "it naps", "start_s": 1}]}]  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert encode_prompts.main([*arguments[2:], "--videos", str(tmp_path)]) == 0
    found = EmbeddingCache(path)
    assert len(found) == len(TEXTS) + 3
    assert all(text in found for text in ("a dog", "it naps", ""))
    with pytest.raises(SystemExit):
        encode_prompts.main(arguments[2:])
