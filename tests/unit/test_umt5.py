"""The umT5 encoder on tiny random weights: padding, cleaning, the forms it is loaded from."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from megatron_kvpo.model import umt5  # noqa: E402
from megatron_kvpo.model.frozen import resident  # noqa: E402
from megatron_kvpo.model.umt5 import EncoderFiles, clean_text, load_umt5  # noqa: E402

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "square", "moves", "blue", "circle", "&")
LENGTH, DIM = 12, 32
TEXTS = ["a red square moves", "blue", "a blue circle moves a red square"]


def tiny_model():
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=16, d_model=DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    model = transformers.UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def tiny_tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_folder(folder, model, layout="plain"):
    inner = {"plain": ("", ""), "diffusers": ("text_encoder", "tokenizer")}[layout]
    model.save_pretrained(folder / inner[0])
    tiny_tokenizer().save_pretrained(folder / inner[1])
    return folder


def original_state(model):
    """The model's tensors by Wan's names."""
    blocks = {theirs: ours for ours, theirs in umt5.BLOCK_NAMES.items()}
    outer = {theirs: ours for ours, theirs in umt5.OUTER_NAMES.items()}
    state = {}
    for name, tensor in model.state_dict().items():
        if name in outer:
            state[outer[name]] = tensor
        elif name not in umt5.EMBEDDING_NAMES:
            _, _, number, inner = name.split(".", 3)
            state[f"blocks.{number}.{blocks[inner]}"] = tensor
    return state


def save_original(folder, state):
    tiny_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    torch.save(state, folder / umt5.ORIGINAL_FILE)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("umt5"), model)


def load(folder, **options):
    return load_umt5(folder, **{"text_length": LENGTH, "dtype": torch.float32, **options})


@pytest.fixture(scope="module")
def encoder(folder):
    return load(folder)


def test_embeddings_are_the_models_own_and_zero_past_the_end(model, encoder):
    text_BXD = encoder.encode(TEXTS)
    assert text_BXD.shape == (3, LENGTH, DIM)
    assert text_BXD.dtype == torch.float32
    assert not text_BXD.requires_grad
    for text, text_XD in zip(TEXTS, text_BXD, strict=True):
        ids = [WORDS.index(word) for word in text.split()] + [1]
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(text_XD[: len(ids)], alone, rtol=1e-5, atol=1e-5)
        assert (text_XD[: len(ids)] != 0).any(1).all()
        assert not text_XD[len(ids) :].any()


def test_padding_and_neighbours_do_not_change_a_text(encoder):
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(encoder.encode([text])[0], together[row], rtol=1e-5, atol=1e-5)
    assert [len(rows) for rows in encoder.embed(TEXTS)] == [5, 2, 8]
    assert encoder.embed([]) == []
    assert encoder.encode([]).shape == (0, LENGTH, DIM)


def test_order_counts_and_an_empty_text_is_its_end_token(encoder):
    first, second = encoder.embed(["a red square", "square red a"])
    assert (first.flip(0)[1:] - second[:-1]).abs().max() > 0.01
    assert len(encoder.embed([""])[0]) == 1


def test_text_is_cleaned_as_wan_does(encoder):
    assert clean_text(" a\n red\t&amp;amp;  square ") == "a red & square"
    assert torch.equal(encoder.encode(["  a   red\nsquare "]), encoder.encode(["a red square"]))


def test_long_texts_are_cut_with_a_warning_or_refused(folder, encoder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_kvpo"), "propagate", True)
    long = " ".join(["red"] * 20)
    with caplog.at_level(logging.WARNING):
        ids = encoder.token_ids(long)
    assert ids == [4] * (LENGTH - 1) + [1]
    assert "21 tokens" in caplog.text
    assert "the last 9" in caplog.text
    with pytest.raises(ValueError, match=r"21 tokens in 'red red .* exceed text_length 12"):
        load(folder, strict=True).encode([long])


def test_all_layouts_load_to_the_same_bits(model, encoder, tmp_path):
    wanted = encoder.encode(TEXTS)
    diffusers = save_folder(tmp_path / "diffusers", model, "diffusers")
    assert torch.equal(load(diffusers).encode(TEXTS), wanted)
    original = save_original(tmp_path / "original", original_state(model))
    assert torch.equal(load(original).encode(TEXTS), wanted)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="4KB")
    tiny_tokenizer().save_pretrained(sharded)
    assert len(EncoderFiles.find(sharded).weights) > 1
    assert torch.equal(load(sharded).encode(TEXTS), wanted)


def test_the_decoder_of_a_full_checkpoint_is_left_out(model, encoder, tmp_path):
    save_folder(tmp_path, model)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["shared.weight"] = model.shared.weight.detach().clone()
    state["encoder.embed_tokens.weight"] = model.shared.weight.detach().clone()
    extra = {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(2),
             "lm_head.weight": torch.ones(2)}  # fmt: skip
    save_file(state | extra, path)
    assert torch.equal(load(tmp_path).encode(TEXTS), encoder.encode(TEXTS))
    save_file(state | {"shared.weight": torch.zeros(16, DIM)}, path)
    with pytest.raises(ValueError, match="differ"):
        load(tmp_path)


def test_bfloat16_is_the_default_and_close(folder, encoder):
    narrow = load_umt5(folder, text_length=LENGTH)
    assert narrow.dtype == torch.bfloat16
    assert narrow.embed(["a"])[0].dtype == torch.bfloat16
    text_BXD = narrow.encode(TEXTS)
    assert text_BXD.dtype == torch.float32
    error = (text_BXD - encoder.encode(TEXTS)).norm() / text_BXD.norm()
    assert 0 < error < 0.05


def test_wans_names_are_complete_and_strict(model, tmp_path):
    state = original_state(model)
    assert len(state) == 2 + 10 * 2  # at 24 layers 242
    for change, named in (
        ({"blocks.1.attn.q.weight": None}, r"1 missing .*block\.1\.layer\.0\.SelfAttention\.q"),
        ({"blocks.0.norm1.weight": torch.ones(3)}, r"layer_norm\.weight \[3\] instead of \[32\]"),
        ({"blocks.0.stray": torch.ones(3)}, r"1 unknown tensors .*blocks\.0\.stray"),
        ({"token_embedding.weight": None}, r"shared\.weight is missing"),
    ):
        faulty = {n: t for n, t in (state | change).items() if t is not None}
        with pytest.raises(ValueError, match=named):
            load(save_original(tmp_path, faulty))


def test_an_unsafe_or_damaged_pickle_is_refused(tmp_path):
    save_original(tmp_path, {"token_embedding.weight": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="could run code"):
        load(tmp_path)
    (tmp_path / umt5.ORIGINAL_FILE).write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match=r"cannot be read|could run code"):
        load(tmp_path)
    save_original(tmp_path, {"token_embedding.weight": 3})
    with pytest.raises(ValueError, match="no state dict"):
        load(tmp_path)


def test_faulty_folders_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="no folder at"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no umT5"):
        load(tmp_path)
    save_folder(tmp_path, model)
    (tmp_path / "tokenizer.json").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="no tokenizer at"):
        load(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "tokenizer.json")
    state = load_file(tmp_path / "model.safetensors")
    name = "encoder.final_layer_norm.weight"
    save_file({n: t for n, t in state.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 missing .*{name}"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 1 .* model\.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="model_type 't5'"):
        load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(10)])
    with pytest.raises(ValueError, match="20 tokens, the model 16"):
        umt5.UMT5Encoder(model, tokenizer, "x")


def test_identity_follows_the_files_not_their_place(model, folder, tmp_path):
    identity = EncoderFiles.find(folder).identity()
    moved = save_folder(tmp_path / "moved", model)
    assert EncoderFiles.find(moved).identity() == identity == load(moved).identity
    config = moved / "config.json"
    config.write_text(config.read_text() + " ")
    assert EncoderFiles.find(moved).identity() != identity


def test_resident_weights_come_back_as_they_were():
    module = nn.Linear(2, 2)
    before = [p.data_ptr() for p in module.parameters()]

    def fail():
        module.weight.data = torch.zeros(2, 2)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), resident(module, "cpu"):
        fail()
    assert [p.data_ptr() for p in module.parameters()] == before
    assert module.weight.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_leave_the_gpu_after_the_call(folder, encoder):
    on_gpu = load(folder, device="cuda")
    torch.testing.assert_close(on_gpu.encode(TEXTS), encoder.encode(TEXTS), rtol=1e-2, atol=1e-2)
    assert {p.device.type for p in on_gpu._model.parameters()} == {"cpu"}
    with on_gpu.resident():
        assert {p.device.type for p in on_gpu._model.parameters()} == {"cuda"}
        on_gpu.encode(TEXTS)
        assert {p.device.type for p in on_gpu._model.parameters()} == {"cuda"}
