"""HPSv3 on tiny random weights, and what both reward models share: sizes, names, templates."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from megatron_kvpo.config import RewardConfig  # noqa: E402
from megatron_kvpo.records import Clip, Span  # noqa: E402
from megatron_kvpo.reward.base import build_rewards  # noqa: E402
from megatron_kvpo.reward.hpsv3 import PIXELS, HpsV3  # noqa: E402
from megatron_kvpo.reward.qwen2vl import (  # noqa: E402
    Question,
    local_name,
    patchify,
    read_template,
    resize,
    smart_resize,
)
from megatron_kvpo.reward_config import HpsV3Config  # noqa: E402
from tests.unit import tiny_qwen2vl as tiny  # noqa: E402

CPU = torch.device("cpu")
ROWS = len(tiny.IDS) + 1
TEMPLATE = """import os
INSTRUCTION = (
    "Rate {text_prompt} "
    "well\\n"
)
prompt_with_special_token = 'Rating: <|Reward|>\\nEND'
raise SystemExit
"""
QUESTION = "Rate {text_prompt} well\nRating: <|Reward|>\nEND"


class Lab:
    """Folders, settings, and transformers' own model with HPSv3's head."""

    def __init__(self, root):
        self.root = root
        self.base = tiny.save_base(root / "base", tiny.state_of(tiny.model(tiny.BASE_ROWS)))
        self.model = tiny.model(ROWS, seed=3)
        self.model.rm_head = nn.Sequential(
            nn.Linear(tiny.HIDDEN, 1024), nn.ReLU(), nn.Dropout(0.05),
            nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2),
        ).eval()  # fmt: skip
        self.state = tiny.state_of(self.model)
        tiny.rounded(self.model)
        self.template = root / "data_collator_qwen.py"
        self.template.write_text(TEMPLATE)
        self.weights = self.save(
            "HPSv3.safetensors", {tiny.older(n): t for n, t in self.state.items()}
        )

    def save(self, name, state):
        save_file({n: t.clone() for n, t in state.items()}, self.root / name)
        return self.root / name

    def config(self, **settings):
        known = {"weights": self.weights, "base": self.base, "template": self.template, "every": 4}
        return RewardConfig(hpsv3=HpsV3Config(**known | settings))

    def build(self, **settings):
        return HpsV3.build(self.config(**settings), CPU)

    def refuses(self, match, **settings):
        with pytest.raises(ValueError, match=match):
            self.build(**settings)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(lab):
    return lab.build()


def clip_of(*spans, size=(60, 100), seed=0):
    """A clip of (stop, text) spans."""
    starts = [0, *(stop for stop, _ in spans)]
    frames = torch.rand(starts[-1], 3, *size, generator=torch.Generator().manual_seed(seed))
    return Clip(frames_FCHW=frames, spans=tuple(
        Span(start=start, stop=stop, text=text)
        for start, (stop, text) in zip(starts, spans, strict=False)
    ))  # fmt: skip


def by_hand(lab, frame_CHW, text):
    """mu and sigma by transformers' processor for images, its model, and HPSv3's head."""
    shown = nn.functional.interpolate(frame_CHW[None], (364, 588), mode="bicubic", antialias=True)
    images = transformers.Qwen2VLImageProcessorPil(image_mean=tiny.MEAN, image_std=tiny.STD)
    made = images(
        shown[0].clamp(0, 1).numpy(), do_resize=False, do_rescale=False, do_convert_rgb=False,
        input_data_format="channels_first", return_tensors="pt",
    )  # fmt: skip
    grid = made["image_grid_thw"][0].tolist()
    assert grid == [1, 26, 42]
    tokens = tiny.tokenizer()
    tokens.add_tokens(["<|Reward|>"], special_tokens=True)
    asked = tiny.asked("image", QUESTION.replace("{text_prompt}", text))
    ids = tokens(asked.replace("<|image_pad|>", "<|image_pad|>" * (26 * 42 // 4)))["input_ids"]
    hidden_LD = tiny.hidden_by_hand(lab.model, ids, "image", made["pixel_values"], grid)
    return lab.model.rm_head(hidden_LD[ids.index(ROWS - 1)]).detach()


def test_the_score_is_the_mean_of_mu_over_every_nth_frame_against_its_own_text(lab, reward):
    clip = clip_of((6, "a cat"), (10, "it runs away"))
    texts = {0: "a cat", 4: "a cat", 8: "it runs away"}
    mu_sigma = torch.stack([by_hand(lab, clip.frames_FCHW[i], text) for i, text in texts.items()])
    found = reward.score([clip])
    assert (found.shape, found.dtype, found.requires_grad) == ((1, 1), torch.float32, False)
    torch.testing.assert_close(found[0, 0], mu_sigma[:, 0].mean(), rtol=1e-4, atol=1e-5)
    assert (mu_sigma[:, 0] - mu_sigma[:, 1]).abs().min() > 0.01
    other = by_hand(lab, clip.frames_FCHW[8], "a cat")[0]
    assert (other - mu_sigma[2, 0]).abs() > 0.001
    assert reward.components == ("hpsv3",)


def test_the_first_frame_always_counts(lab):
    clip = clip_of((3, "a cat"))
    wanted = by_hand(lab, clip.frames_FCHW[0], "a cat")[0]
    found = lab.build(every=100).score([clip])[0, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_clip_scores_the_same_whatever_else_is_scored(lab, reward, monkeypatch):
    clips = [clip_of((9, "a cat")), clip_of((5, "a dog that runs a long way"), seed=1),
             clip_of((2, ""), (4, "a bird"), size=(90, 60), seed=2)]  # fmt: skip
    together = reward.score(clips)
    for row, clip in enumerate(clips):
        torch.testing.assert_close(together[:, [row]], reward.score([clip]), rtol=1e-5, atol=1e-5)
    few, seen = lab.build(max_images=2), []
    ask = few._judge.ask
    monkeypatch.setattr(few._judge, "ask", lambda q, kind: seen.append(len(q)) or ask(q, kind))
    torch.testing.assert_close(few.score(clips[::-1]), together.flip(1), rtol=1e-5, atol=1e-5)
    assert sorted(seen) == [1, 1, 2, 2]
    assert len(together.unique()) == 3
    assert reward.score([]).shape == (1, 0)


def test_todays_names_wrapped_names_and_a_text_template_are_the_same(lab, reward, tmp_path):
    clip = clip_of((5, "a cat"))
    wanted = reward.score([clip])
    today = lab.save("today.safetensors", lab.state)
    wrapped = lab.save(
        "wrap.safetensors", {f"model.{tiny.older(n)}": t for n, t in lab.state.items()}
    )
    for weights in (today, wrapped):
        assert torch.equal(lab.build(weights=weights).score([clip]), wanted)
    text = tmp_path / "question.txt"
    text.write_text(QUESTION)
    assert torch.equal(lab.build(template=text).score([clip]), wanted)
    assert [r.components for r in build_rewards(["hpsv3"], lab.config())] == [("hpsv3",)]


@pytest.mark.parametrize(("size", "wanted"), [
    ((480, 832), (336, 588)), ((60, 100), (252, 420)), ((280, 420), (280, 420)),
    ((480, 480), (448, 448)), ((70, 2000), (56, 1988)),
])  # fmt: skip
def test_sizes_follow_qwens_rule(size, wanted):
    assert smart_resize(*size, 28, min_pixels=128 * 28**2, max_pixels=448**2) == wanted


def test_names_of_all_makers_become_one():
    wanted = "language_model.layers.0.self_attn.q_proj"
    old, new = "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"
    for name in (old, new, f"base_model.model.{old}", f"base_model.model.{new}", f"model.{old}"):
        assert local_name(f"{name}.weight") == f"{wanted}.weight"
        assert local_name(f"{name}.base_layer.bias") == f"{wanted}.bias"
        assert local_name(f"{name}.lora_B.default.weight") == f"{wanted}.lora_B.weight"
    for name in ("visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias"):
        assert local_name(name) == "visual.merger.mlp.0.bias"
    saved = "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    assert local_name(saved) == "language_model.embed_tokens.weight"
    assert local_name("base_model.model.model.embed_tokens.original_module.weight") is None
    assert local_name("lm_head.weight") is None
    assert local_name("base_model.model.rm_head.weight") == "rm_head.weight"


def test_images_have_hpsv3s_size():
    size = smart_resize(480, 832, 28, min_pixels=PIXELS, max_pixels=PIXELS)
    assert size == (336, 588)
    assert smart_resize(60, 100, 28, min_pixels=PIXELS, max_pixels=PIXELS) == (364, 588)
    with pytest.raises(ValueError, match="20 x 5000: Qwen2-VL takes 200 to 1"):
        smart_resize(20, 5000, 28, min_pixels=PIXELS, max_pixels=PIXELS)


def test_patches_are_in_qwens_order_and_resizing_stays_in_range():
    frames = torch.rand(4, 3, 56, 84)
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.MEAN, tiny.STD))
    found = patchify((frames - mean) / std, 14, 2, 2)
    assert torch.equal(found, tiny.patches_by_hand(frames))
    odd = patchify(frames[:3], 14, 2, 2)
    assert torch.equal(odd, patchify(frames[[0, 1, 2, 2]], 14, 2, 2))
    sharp = resize((frames > 0.5).float(), 112, 168)
    assert (sharp.min(), sharp.max()) == (0, 1)
    assert resize(frames, 56, 84) is frames


def test_what_is_asked_is_one_user_turn_with_a_token_for_each_merged_patch(reward):
    question = Question(frames_FCHW=torch.zeros(1, 3, 56, 84), text="hi <|Reward|>")
    ids = reward._judge.token_ids(question, "image")
    asked = tiny.asked("image", "hi <|Reward|>").replace("<|image_pad|>", "<|image_pad|>" * 6)
    assert reward._judge._tokenizer.decode(ids) == asked


def test_settings_that_are_missing_are_named(lab, tmp_path):
    lab.refuses(r"reward.hpsv3.weights is not set: give the file HPSv3.safetensors", weights=None)
    lab.refuses(r"reward.hpsv3.base is not set: give the folder of Qwen2-VL-7B", base=None)
    lab.refuses(
        r"reward.hpsv3.template is .*gone, which does not exist", template=tmp_path / "gone"
    )


@pytest.mark.parametrize(("name", "text", "match"), [
    ("t.py", "INSTRUCTION = f'{1}'", r"assigns no plain string to \['INSTRUCTION', 'prompt_w"),
    ("t.py", "def (", r"t.py is no Python"),
    ("t.txt", "<|Reward|>", r"t.txt has {text_prompt} 0 times"),
    ("t.txt", "{text_prompt}", r"of its markers {'<\|Reward\|>': 0}"),
    ("t.txt", "{text_prompt} <|Reward|> <|Reward|>", r"of its markers {'<\|Reward\|>': 2}"),
])  # fmt: skip
def test_templates_that_do_not_ask_are_refused(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    names = ("INSTRUCTION", "prompt_with_special_token")
    with pytest.raises(ValueError, match=match):
        read_template(tmp_path / name, names, ("<|Reward|>",))


def test_a_base_that_is_no_qwen2_vl_is_refused(lab, tmp_path):
    base = tiny.save_base(tmp_path, tiny.state_of(tiny.model(tiny.BASE_ROWS)))
    settings = json.loads((base / "config.json").read_text())
    for file, content, match in (
        (
            "preprocessor_config.json",
            '{"image_mean": [1]}',
            "preprocessor_config.json has no image_",
        ),
        (
            "preprocessor_config.json",
            '{"image_mean": [1], "image_std": [1]}',
            "of other than 3 numb",
        ),
        ("config.json", "{", "config.json cannot be read as JSON"),
        (
            "config.json",
            json.dumps(settings | {"hidden_size": "x"}),
            "config.json is refused: .*hid",
        ),
        ("config.json", json.dumps(settings | {"model_type": "umt5"}), "is of model_type 'umt5'"),
    ):
        kept = (base / file).read_text()
        (base / file).write_text(content)
        lab.refuses(match, base=base)
        (base / file).write_text(kept)
    (base / "tokenizer.json").unlink()
    lab.refuses("has no tokenizer: tokenizer.json or vocab.json is needed", base=base)


def test_weights_that_do_not_fit_are_refused_by_name(lab):
    cut = lab.root / "cut.safetensors"
    cut.write_bytes(lab.weights.read_bytes()[:5000])
    lab.refuses(r"cut.safetensors is not a safetensors file", weights=cut)
    state = load_file(lab.weights)
    for match, missing, extra in (
        (r"no.safetensors has no rm_head.\* tensor", "rm_head", {}),
        (r"1 missing \['rm_head.3.bias'\]", "rm_head.3.bias", {}),
        (
            r"rm_head.5.weight \[1, 16\] instead",
            "rm_head.5.w",
            {"rm_head.5.weight": torch.ones(1, 16)},
        ),
        (r"1 missing \['visual.merger.ln_q.bias'\]", "merger.ln_q.bias", {}),
    ):
        rest = {n: t for n, t in state.items() if missing not in n} | extra
        lab.refuses(match, weights=lab.save("no.safetensors", rest))


@pytest.mark.gpu
def test_a_gpu_in_bfloat16_is_near_the_cpu(lab, reward):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    clips = [clip_of((9, "a cat")), clip_of((5, "a dog that runs"), seed=1)]
    found = HpsV3.build(lab.config(), torch.device("cuda")).score(clips)
    assert found.device == CPU
    assert (found - reward.score(clips)).abs().max() < 0.1
