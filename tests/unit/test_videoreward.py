"""VideoReward on tiny random weights: checkpoints, inputs, head, and what it refuses."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from megatron_kvpo.config import RewardConfig  # noqa: E402
from megatron_kvpo.records import Clip, Span  # noqa: E402
from megatron_kvpo.reward.base import build_rewards  # noqa: E402
from megatron_kvpo.reward.videoreward import MARKERS, Recipe, VideoReward, gray  # noqa: E402
from megatron_kvpo.reward_config import VideoRewardConfig  # noqa: E402
from tests.unit import tiny_qwen2vl as tiny  # noqa: E402

CPU = torch.device("cpu")
NAMES = VideoReward.components
ROWS = len(tiny.IDS) + len(MARKERS)
QUESTION = (
    "Of {text_prompt} {x}: text <|TA_reward|> looks <|VQ_reward|> {text_prompt} <|MQ_reward|>."
)
TEMPLATE = f'OTHER = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{QUESTION}"""\nraise SystemExit\n'
NORMS = {"VQ_mean": 3.0, "VQ_std": 2.0, "MQ_mean": 1.0, "MQ_std": 0.5, "TA_mean": -1.0,
         "TA_std": 4.0}  # fmt: skip
RANK, ALPHA = 4, 6
MODEL_CONFIG = {
    "data_config": {"max_frame_pixels": 448 * 448, "num_frames": None, "fps": 2,
                    "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special",
                    "sample_type": "uniform", "meta_data": "x.csv"},
    "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "output_dim": 3,
                     "use_special_tokens": True, "reward_token": "last"},
    "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA,
                         "use_rslora": False, "lora_namespan_exclude": ["lm_head"]},
    "inference_config": NORMS,
}  # fmt: skip


def changed(section, **values):
    """MODEL_CONFIG with some values of one section, or without it."""
    return MODEL_CONFIG | {section: {**MODEL_CONFIG[section], **values} if values else None}


def adapted(base_state, *, rslora=False, targets=("q_proj", "v_proj", "down_proj", "attn.qkv")):
    """What VideoAlign trains: the base cut to the tokens, a head, and PEFT's adapters on both."""
    made = tiny.model(tiny.BASE_ROWS)
    made.load_state_dict(base_state)
    made.resize_token_embeddings(ROWS, mean_resizing=False)
    torch.manual_seed(1)
    made.rm_head = nn.Linear(tiny.HIDDEN, 3, bias=False)
    made.get_input_embeddings().weight.data[-3:].normal_()
    names = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n.endswith(targets)]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=False, use_rslora=rslora
    )
    return tiny.rounded(peft.get_peft_model(made, config)).eval()


def by_old_names(state, prefix="base_model.model."):
    """Names that an older transformers would have given, under a prefix or none."""
    return {prefix + tiny.older(n.removeprefix("base_model.model.")): t for n, t in state.items()}


def save(folder, files, config=MODEL_CONFIG, step=7):
    """A VideoReward folder with one checkpoint of these files."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        if name.endswith(".safetensors"):
            save_file({n: t.clone() for n, t in content.items()}, checkpoint / name)
        elif name.endswith(".json"):
            (checkpoint / name).write_text(json.dumps(content))
        else:
            torch.save(content, checkpoint / name)
    return folder


class Lab:
    """Folders, settings and the model as PEFT has it."""

    def __init__(self, root):
        self.root, self.number = root, 0
        self.base_state = tiny.state_of(tiny.model(tiny.BASE_ROWS))
        self.base = tiny.save_base(root / "base", self.base_state)
        self.peft = adapted(self.base_state)
        self.state = tiny.state_of(self.peft)
        self.template = root / "prompt_template.py"
        self.template.write_text(TEMPLATE)
        self.whole = save(root / "whole", {"model.pth": by_old_names(self.state)})

    def new(self):
        self.number += 1
        return self.root / f"folder-{self.number}"

    def merged(self):
        """The state with adapters merged, as PEFT merges."""
        copied = adapted(self.base_state)
        copied.load_state_dict(self.state)
        return tiny.state_of(copied.merge_and_unload())

    def config(self, folder=None, **settings):
        known = {"folder": folder or self.whole, "base": self.base, "template": self.template}
        return RewardConfig(video_reward=VideoRewardConfig(**known | settings))

    def build(self, folder=None, **settings):
        return VideoReward.build(self.config(folder, **settings), CPU)

    def refuses(self, match, folder=None, **settings):
        with pytest.raises(ValueError, match=match):
            self.build(folder, **settings)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def reward(lab):
    return lab.build()


def clip_of(num_frames, text="a cat", size=(60, 100), seed=0, spans=None):
    frames = torch.rand(num_frames, 3, *size, generator=torch.Generator().manual_seed(seed))
    return Clip(frames_FCHW=frames, spans=spans or (Span(start=0, stop=num_frames, text=text),))


def raw_by_hand(made, frames_FCHW, text):
    """[3, outputs]: transformers' own model and head at VQ, MQ, TA; pixel frames as shown."""
    height, width = frames_FCHW.shape[-2:]
    grid = (len(frames_FCHW) // 2, height // 14, width // 14)
    tokens = tiny.tokenizer()
    tokens.add_tokens(list(MARKERS), special_tokens=True)
    pads = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
    asked = tiny.asked("video", QUESTION.replace("{text_prompt}", text))
    ids = tokens(asked.replace("<|video_pad|>", pads))["input_ids"]
    hidden_LD = tiny.hidden_by_hand(made, ids, "video", tiny.patches_by_hand(frames_FCHW), grid)
    places = [ids.index(len(tiny.IDS) + aspect) for aspect in range(3)]
    return made.rm_head(hidden_LD[places]).detach()


def bigger(frames_FCHW, size=(252, 420)):
    grown = nn.functional.interpolate(frames_FCHW, size, mode="bicubic", antialias=True)
    return grown.clamp(0, 1)


def test_scores_are_those_of_pefts_own_forward_at_the_marked_tokens(lab, reward):
    clip = clip_of(36)
    shown = clip.frames_FCHW[[0, 12, 23, 35]]
    made = lab.peft.base_model.model
    colour, grey = (
        raw_by_hand(made, bigger(f), "a cat")
        for f in (shown, (shown * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, True)
                  .expand(-1, 3, -1, -1))
    )  # fmt: skip
    wanted = torch.stack([(colour[0, 0] - 3) / 2, (grey[1, 1] - 1) / 0.5, (colour[2, 2] + 1) / 4])
    found = reward.score([clip])
    assert (found.shape, found.dtype, found.requires_grad) == ((3, 1), torch.float32, False)
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-4, atol=1e-4)
    off_diagonal = (colour[1, 0] - 3) / 2
    assert (found[0, 0] - off_diagonal).abs() > 0.1
    assert reward.components == NAMES


def layouts(lab):
    """Every form a checkpoint comes in, by name."""
    adapters = {n.replace(".default", ""): t for n, t in lab.state.items() if ".lora_" in n}
    ends = ("rm_head.weight", "embed_tokens.weight")
    beside = {n: t for n, t in lab.state.items() if n.endswith(ends)}
    said = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "peft_type": "LORA"}
    plain = lab.merged()
    old = by_old_names(adapters)
    return {
        "adapters": {"adapter_model.safetensors": old, "adapter_config.json": said,
                     "non_lora_state_dict.pth": by_old_names(beside)},
        "adapters, today's names": {"adapter_model.safetensors": adapters,
                                    "non_lora_state_dict.safetensors": beside},
        "plain beside": {"adapter_model.safetensors": old,
                         "non_lora_state_dict.pth": by_old_names(beside, "")},
        "whole, safetensors": {"model.safetensors": by_old_names(lab.state)},
        "whole, today's names": {"model.pth": lab.state},
        "merged, old names": {"model.pth": by_old_names(plain, "")},
        "merged, prefix": {"model.pth": by_old_names(plain)},
        "merged, today's names, no lm_head": {"model.safetensors": {
            n: t for n, t in plain.items() if n != "lm_head.weight"}},
    }  # fmt: skip


def test_every_layout_gives_the_same_scores(lab, reward):
    clip = clip_of(16)
    wanted = reward.score([clip])
    for name, files in layouts(lab).items():
        found = lab.build(save(lab.new(), files)).score([clip])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(lab):
    twin = adapted(lab.base_state, rslora=True)
    twin.load_state_dict(lab.state)
    config = changed("peft_lora_config", use_rslora=True)
    built = lab.build(save(lab.new(), {"model.pth": by_old_names(lab.state)}, config))
    clip = clip_of(4)
    raw = raw_by_hand(twin.base_model.model, bigger(clip.frames_FCHW), "a cat")
    torch.testing.assert_close(built.score([clip])[0, 0], (raw[0, 0] - 3) / 2, rtol=1e-4, atol=1e-4)


def test_one_output_is_read_at_each_token_and_without_constants_nothing_is_normalised(lab):
    state = dict(lab.state)
    state["base_model.model.rm_head.weight"] = state["base_model.model.rm_head.weight"][1:2]
    config = changed("model_config", output_dim=1) | {"inference_config": None}
    built = lab.build(save(lab.new(), {"model.pth": state}, config), grayscale_motion=False)
    clip = clip_of(4)
    raw = raw_by_hand(lab.peft.base_model.model, bigger(clip.frames_FCHW), "a cat")
    torch.testing.assert_close(built.score([clip])[:, 0], raw[:, 1], rtol=1e-4, atol=1e-4)


def test_grayscale_changes_motion_only(lab, reward):
    clip = clip_of(16)
    colour = lab.build(grayscale_motion=False).score([clip])
    torch.testing.assert_close(reward.score([clip])[[0, 2]], colour[[0, 2]], rtol=1e-5, atol=1e-5)
    assert (reward.score([clip])[1] - colour[1]).abs() > 0.01
    grey = replace(clip, frames_FCHW=gray(clip.frames_FCHW))
    torch.testing.assert_close(reward.score([clip])[1], reward.score([grey])[1])
    luma = gray(torch.tensor([1.0, 0.5, 0.25])[None, :, None, None])
    assert torch.allclose(luma, torch.full((1, 3, 1, 1), 0.299 + 0.2935 + 0.0285))


def test_a_clip_scores_the_same_whatever_else_is_scored(lab, reward, monkeypatch):
    clips = [clip_of(4), clip_of(5, "a dog that runs a long way home", seed=1),
             clip_of(36, "", (90, 60), seed=2), clip_of(4, "a bird", seed=3),
             clip_of(60, "a house", seed=4)]  # fmt: skip
    together = reward.score(clips)
    assert together.shape == (3, 5)
    for row, clip in enumerate(clips):
        alone = reward.score([clip])[:, 0]
        torch.testing.assert_close(together[:, row], alone, rtol=1e-5, atol=1e-5)
    order, limited, seen = [3, 0, 4, 2, 1], lab.build(max_clips=1), []
    ask = limited._judge.ask
    monkeypatch.setattr(limited._judge, "ask", lambda q, kind: seen.append(len(q)) or ask(q, kind))
    few = limited.score([clips[i] for i in order])
    assert seen == [2] * 5, "one clip a forward, in colour and gray"
    torch.testing.assert_close(few, together[:, order], rtol=1e-5, atol=1e-5)
    assert together.T.unique(dim=0).shape == (5, 3)
    assert reward.score([]).shape == (3, 0)


def test_texts_of_several_spans_are_sentences_of_one(reward):
    texts = ("A cat runs. ", "it turns blue", "it stops.", "it stays")
    spans = tuple(Span(start=i, stop=i + 1, text=text) for i, text in enumerate(texts))
    several, one = (
        clip_of(4, spans=spans),
        clip_of(4, "A cat runs. it turns blue. it stops. it stays"),
    )
    assert torch.equal(reward.score([several]), reward.score([one]))
    assert not torch.equal(reward.score([several]), reward.score([clip_of(4, "A cat runs.")]))


@pytest.mark.parametrize(("num_frames", "places"), [
    (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (36, [0, 12, 23, 35]),
    (60, [0, 8, 17, 25, 34, 42, 51, 59]), (69, [0, 10, 19, 29, 39, 49, 58, 68]),
    (81, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
])  # fmt: skip
def test_two_pixel_frames_a_second_an_even_number(lab, num_frames, places):
    recipe = Recipe.read(lab.whole / "model_config.json")
    assert recipe.frame_positions(num_frames, 16) == places


def test_a_fixed_number_of_pixel_frames_and_too_few(lab):
    recipe = Recipe.read(lab.whole / "model_config.json")
    seven = replace(recipe, num_frames=7)
    assert seven.frame_positions(9, 16) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert len(seven.frame_positions(100, 16)) == 8
    assert seven.frame_positions(7, 16) == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="3 pixel frames: VideoReward needs at least 4"):
        recipe.frame_positions(3, 16)


def test_the_highest_step_counts_and_more_rows_than_tokens_may_be(lab, reward):
    rows = dict(lab.state)
    for name in list(rows):
        if name.endswith("embed_tokens.weight"):
            rows[name] = torch.cat([rows[name], torch.ones(5, tiny.HIDDEN)])
    folder = save(lab.new(), {"model.pth": {"x": torch.ones(1)}}, step=9)
    save(folder, {"model.pth": by_old_names(rows)}, step=10)
    clips = [clip_of(4)]
    torch.testing.assert_close(lab.build(folder).score(clips), reward.score(clips))


def test_the_tokenizer_may_know_the_markers_already(lab, reward):
    base = tiny.save_base(lab.new(), lab.base_state)
    tokens = tiny.tokenizer()
    tokens.add_tokens(list(MARKERS), special_tokens=True)
    tokens.save_pretrained(base)
    assert torch.equal(lab.build(base=base).score([clip_of(4)]), reward.score([clip_of(4)]))


def test_components_of_one_model_are_scored_by_one_reward(lab):
    rewards = build_rewards([NAMES[0], NAMES[2]], lab.config())
    assert [r.components for r in rewards] == [NAMES]


def test_transformers_is_not_imported_by_rewards_that_do_without():
    code = (
        "import sys; from megatron_kvpo.reward.base import REWARDS, build_rewards; "
        "from megatron_kvpo.config import RewardConfig; "
        "build_rewards(['visual_quality'], RewardConfig()); "
        "assert 'videoreward_mq' in REWARDS and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_that_are_missing_are_named(lab, tmp_path):
    lab.refuses(r"reward.video_reward.base is not set: give the folder of Qwen2-VL-2B", base=None)
    lab.refuses(r"video_reward.template is not set: give VideoAlign's prompt_templ", template=None)
    lab.refuses(r"video_reward.folder is .*nowhere, which does not exist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"reward.video_reward.folder is not set: give VideoRew"):
        build_rewards(NAMES, RewardConfig())
    lab.refuses(r"\w+ has no checkpoint-<step>/", save(lab.new(), {}, step="last"))
    lab.refuses(r"checkpoint-7 holds no VideoReward: model.safetensors or", save(lab.new(), {}))


@pytest.mark.parametrize(("config", "match"), [
    ("no JSON", r"model_config.json holds a str: a JSON object is needed"),
    (changed("data_config"), r"model_config.json has no section data_config"),
    (changed("data_config", fps="2"), r"model_config.json has fps '2': a number is needed"),
    (changed("data_config", sample_type="multi_pts"), r"json has {'sample_type': 'multi_pts'}"),
    (changed("data_config", prompt_template_type="none"), r"{'prompt_template_type': 'none'}"),
    (changed("model_config", use_special_tokens=False), r"{'use_special_tokens': False}"),
    (changed("model_config", output_dim=2), r"{'output_dim': 2}"),
    (changed("inference_config", MQ_std=0), r"\*_std that is not above 0"),
    (changed("inference_config", TA_mean=None), r"has TA_mean None: a number is needed"),
    (changed("peft_lora_config", lora_r=8), r"model.pth: .* has adapters of .* instead of .*8"),
    (changed("peft_lora_config", lora_enable=False), r"lora_enable is off: their scale is unkn"),
])  # fmt: skip
def test_a_config_that_is_not_known_is_refused(lab, config, match):
    lab.refuses(match, save(lab.new(), {"model.pth": lab.state}, config))


def test_checkpoints_that_do_not_fit_are_refused_by_name(lab):
    def without(part, **extra):
        return {n: t for n, t in lab.state.items() if part not in n} | extra

    for match, state in {
        r"checkpoint-7 has no rm_head": without("rm_head"),
        r"but \['language_model.layers.0.self_attn.q_proj.lora_A.weight'\]": without(
            "layers.0.self_attn.q_proj.lora_A"),
        r"1 missing \['visual.merger.mlp.0.bias'\]": without("merger.mlp.0.bias"),
        r"1 unknown tensors \['critic.x'\]": without("x x", **{"critic.x": torch.ones(1)}),
        r"language_model.norm.weight \[3\] instead of \[64\]": without(
            "language_model.norm", **{"model.norm.weight": torch.ones(3)}),
        r"embedding of 0 rows, the tokenizer 266 tokens": without("embed_tokens"),
        r"which is there by another name: language_model.norm": without(
            "x x", **{"model.norm.weight": torch.ones(64)}),
        r"adapters that are not LoRA's: .*magnitude": without("x x", **{
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(1)}),
    }.items():  # fmt: skip
        lab.refuses(match, save(lab.new(), {"model.pth": state}))
    said = {"r": RANK, "lora_alpha": 1, "use_rslora": False}
    files = layouts(lab)["adapters"] | {"adapter_config.json": said}
    lab.refuses(r"adapter_config.json says .*alpha=1.* must agree", save(lab.new(), files))


def test_damaged_and_unsafe_files_are_refused_by_name(lab):
    folder = save(lab.new(), {"model.pth": {"x": Recipe}})
    lab.refuses(r"model.pth is refused: .* could run code", folder)
    plain = save(lab.new(), {"model.pth": {"model": {}}})
    lab.refuses(r"model.pth is no state dict", plain)
    whole = save(lab.new(), {"model.safetensors": lab.state}) / "checkpoint-7/model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1000])
    lab.refuses(r"model.safetensors is not a safetensors file", whole.parent.parent)
    bare = save(lab.new(), {}) / "checkpoint-7" / "model.pth"
    bare.write_bytes(pickle.dumps({"x": Recipe}))
    lab.refuses(r"model.pth (is refused|cannot be read)", bare.parent.parent)


def test_a_text_that_holds_a_marker_is_refused(reward):
    with pytest.raises(ValueError, match=r"{'<\|MQ_reward\|>': 3} of tokens that it needs once"):
        reward.score([clip_of(4, "a cat <|MQ_reward|>")])
    with pytest.raises(ValueError, match=r"{'<\|video_pad\|>': 3} of tokens"):
        reward.score([clip_of(4, "<|video_pad|>")])


@pytest.mark.gpu
def test_a_gpu_in_bfloat16_is_near_the_cpu(lab, reward):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    clips = [clip_of(4), clip_of(36, "a dog", seed=1), clip_of(5, "a bird", (90, 60), seed=2)]
    built = VideoReward.build(lab.config(), torch.device("cuda"))
    found, wanted = built.score(clips), reward.score(clips)
    assert found.device == CPU
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
