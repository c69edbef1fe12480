from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from megatron_kvpo import settings
from megatron_kvpo.config import ModelConfig, RunConfig, load_config
from megatron_kvpo.method_config import BACKBONES


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    count: int = 1
    folder: Path | None = None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: tuple[float, ...] = (1.0,)
    patch: tuple[int, int, int] = (1, 2, 2)
    table: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    name: str = ""


def outer(**values: object) -> Outer:
    return settings.from_mapping(Outer, values)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("num_updates: 7\noptimizer:\n  lr: 0.001\nreward:\n  weights: {vq: 1, ta: 2}\n")
    return path


def test_a_recipe_fills_what_it_names_and_leaves_the_rest(recipe: Path):
    config = load_config(recipe)
    assert (config.num_updates, config.optimizer.lr) == (7, 0.001)
    assert config.reward.weights == {"vq": 1.0, "ta": 2.0}
    assert (config.seed, config.optimizer.beta1) == (42, 0.9)


def test_an_empty_recipe_is_all_defaults(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == RunConfig()


def test_overrides_win_in_order(recipe: Path):
    config = load_config(recipe, ["num_updates=2", "seed=3", "seed=4", "optimizer.lr=0"])
    assert (config.num_updates, config.seed) == (2, 4)
    assert config.optimizer.lr == 0.0
    assert isinstance(config.optimizer.lr, float)


def test_scientific_notation_without_a_point_is_a_number(recipe: Path):
    assert yaml.safe_load("1e-5") == "1e-5"  # what YAML 1.1 makes of it
    assert load_config(recipe, ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


def test_overrides_reach_lists_tables_paths_and_null(recipe: Path):
    config = load_config(
        recipe,
        ["stream.steps=[1, 0.5]", "reward.weights.mq=0.5", "model.weights=a/b.safetensors"],
    )
    assert config.stream.steps == (1.0, 0.5)
    assert config.reward.weights == {"vq": 1.0, "ta": 2.0, "mq": 0.5}
    assert config.model.weights == Path("a/b.safetensors")
    assert load_config(recipe, ["model.weights=null"]).model.weights is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown setting optimiser; did you mean optimizer?"),
        ("loss.clip_hihg=1", r"unknown setting loss\.clip_hihg; did you mean loss\.clip_high\?"),
        ("loss.zzz=1", r"unknown setting loss\.zzz; known: \['clip_high', 'clip_low'"),
        ("seed=1.5", "seed is 1.5: it takes a whole number"),
        ("seed=yes", "seed is True: it takes a whole number"),
        ("optimizer.lr=fast", r"optimizer\.lr is 'fast': it takes a number"),
        ("optimizer.lr=true", r"optimizer\.lr is True: it takes a number"),
        ("model.recompute=1", r"model\.recompute is 1: it takes true or false"),
        ("model.recompute=maybe", r"model\.recompute is 'maybe': .*choose one of \['auto'\]"),
        ("model.fp8=[nonsense]", r"model\.fp8\[0\] is 'nonsense': choose one of \['ffn', 'att"),
        ("model.fp8=ffn", r"model\.fp8 is a list, not 'ffn': write \[ffn\]"),
        ("model.fp8_scaling=column", r"is 'column': choose one of \['row', 'block'\]"),
        ("stream.sampler=heun", r"'heun': choose one of \['renoise', 'euler'\]"),
        ("stream.steps=1", r"stream\.steps is a list, not 1: write \[1\]"),
        ("stream.steps=[1, x]", r"stream\.steps\[1\] is 'x': it takes a number"),
        ("model.patch=[1, 2]", "has 2 entries: it takes 3"),
        ("reward.weights=[1]", "is a table of names and values"),
        ("reward.weights.vq=big", r"reward\.weights\.vq is 'big': it takes a number"),
        ("model.weights=3", r"model\.weights is 3: it takes a path"),
        ("loss=3", "loss is a section: give it keys, not 3"),
        ("num_updates.x=3", "num_updates is a value, not a section"),
        ("num_updates", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
    ],
)
def test_a_bad_override_says_what_is_wrong(recipe: Path, override: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_updates=0", "run.num_updates is 0"),
        ("optimizer.ema_decay=1", r"ema_decay 1\.0 must lie in \[0, 1\)"),
        ("routing.num_branches=1", "a group needs at least 2 branches"),
        ("stream.num_frames=100", "stream.num_frames is 100: it must be a multiple"),
        ("stream.steps=[0.5, 0.75]", "must fall"),
        ("energy.grad_steps=5", "grad_steps 5 exceeds the 4 denoising steps"),
        ("model.max_frames=90", "stream.num_frames 147 exceeds model.max_frames 90"),
        ("model.num_heads=7", "the head size"),
        ("model.cuda_graph_rows=-1", "model.cuda_graph_rows is -1: use 0 or more"),
        ("parallel.memory_gib=0", r"parallel\.memory_gib is 0\.0: it must be above 0"),
        ("parallel.sequence_parallel=true", "set parallel.tensor above 1"),
        ("reward.held_out=[vq]", r"rewards \['vq'\] are both trained on and held out"),
        ("energy.temperature=0", "energy.temperature is 0.0: it must be above 0"),
        ("advantage.std_floor=0", "advantage.std_floor is 0.0"),
        ("routing.noise_strength=1.5", r"use \(0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(
    recipe: Path, override: str, message: str
):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


def test_merging_is_of_adapters(recipe: Path):
    assert load_config(recipe, ["policy.merge=true"]).policy.merge
    with pytest.raises(ValueError, match=r"policy\.merge merges adapters: set policy\.mode lora"):
        load_config(recipe, ["policy.merge=true", "policy.mode=full"])


@pytest.mark.parametrize(("value", "taken"), [("auto", "auto"), ("true", True), ("false", False)])
def test_recompute_is_a_choice_or_auto(recipe: Path, tmp_path: Path, value: str, taken: bool | str):
    config = load_config(recipe, [f"model.recompute={value}"])
    assert config.model.recompute is taken or config.model.recompute == taken == "auto"
    settings.dump(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml") == config


def test_what_speed_takes_is_read_by_its_types(recipe: Path):
    given = ["model.fp8=[text, ffn]", "model.cuda_graph_rows=0", "parallel.memory_gib=40"]
    config = load_config(recipe, given)
    assert config.model.fp8 == ("text", "ffn")
    assert config.model.cuda_graph_rows == 0
    assert config.parallel.memory_gib == 40.0
    assert load_config(recipe, ["parallel.memory_gib=null"]).parallel.memory_gib is None


def test_a_missing_or_foreign_recipe_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no recipe at .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold sections and keys, not a list"):
        load_config(path)


def test_types_are_what_the_fields_declare():
    built = outer(
        inner={"rate": 1, "folder": "x", "kind": "b"},
        steps=[1, 0],
        patch=[1, 4, 4],
        table={"a": 1},
        flag=True,
        name="n",
    )
    assert built.inner == Inner(rate=1.0, folder=Path("x"), kind="b")
    assert isinstance(built.inner.rate, float)
    assert built.steps == (1.0, 0.0)
    assert all(isinstance(s, float) for s in built.steps)
    assert built.patch == (1, 4, 4)
    assert built.table == {"a": 1.0}
    assert isinstance(built.table["a"], float)


def test_none_only_where_it_is_allowed():
    assert outer(inner={"folder": None}).inner.folder is None
    with pytest.raises(ValueError, match=r"inner\.rate is None: it takes a number"):
        outer(inner={"rate": None})


def test_what_is_dumped_loads_back_equal(tmp_path: Path):
    for config in (
        RunConfig(),
        settings.from_mapping(
            RunConfig,
            {
                "optimizer": {"lr": 1e-5, "eps": "1e-12"},
                "model": {"weights": "w.safetensors", "patch": [1, 1, 1]},
                "reward": {"weights": {"vq": 0.5}, "held_out": ["tc"]},
                "stream": {"steps": [1.0, 0.1]},
            },
        ),
    ):
        settings.dump(config, tmp_path / "out.yaml")
        assert load_config(tmp_path / "out.yaml") == config


def test_a_dump_names_every_setting(tmp_path: Path):
    settings.dump(RunConfig(), tmp_path / "out.yaml")
    values = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert values["optimizer"]["warmup_updates"] == 5
    assert values["model"]["weights"] is None
    assert values["stream"]["steps"] == [1.0, 0.75, 0.5, 0.25]


def test_a_preset_fills_in_sizes_and_keys_beside_it_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: wan2.1_14b, num_layers: 2}\n")
    model = load_config(recipe).model
    assert (model.hidden_dim, model.ffn_dim, model.num_heads) == (5120, 13824, 40)
    assert model.num_layers == 2
    assert load_config(recipe, ["model.preset=wan2.1_1.3b"]).model.hidden_dim == 1536
    settings.dump(load_config(recipe), tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == load_config(recipe)


def test_an_unknown_preset_is_named_with_the_known_ones(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: wan2.1_13b}\n")
    with pytest.raises(ValueError, match=r"model.preset is 'wan2.1_13b'.*wan2.1_1.3b"):
        load_config(recipe)


def test_the_default_sizes_are_those_of_the_smaller_backbone():
    default = ModelConfig()
    for name, value in BACKBONES["wan2.1_1.3b"].items():
        assert settings.to_mapping(default)[name] == value
