import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mmclip.config import config_names, load_config
from mmclip.config_io import RESOURCES, ConfigError, config_hash, parse
from mmclip.data.disease_prompts import load_disease_prompts
from mmclip.prompts import PromptSet, load_prompts


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_of_the_package_loads(name: str):
    assert load_config(name).train.steps > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"templates": []}, 'templates: give a table of keys and values, in TOML { key = "value"'),
        ({"findings": {"mass": "a mass"}}, "findings.mass: give a table of keys and values"),
        ({"templates": {"positive": "yes", "negative": []}}, "templates.positive: give a list"),
    ],
)
def test_an_error_in_toml_uses_the_words_of_toml(values: dict, said: str):
    head = {"id": "a", "version": 1, "description": "a"}
    with pytest.raises(ConfigError) as error:
        parse(PromptSet, head | values, "prompt set a.toml")
    assert said in str(error.value) and "dictionary" not in str(error.value)


def test_an_unknown_key_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown key 'model\.image\.dept'; known here: depth, "):
        load_config("tiny", ["model.image.dept=3"])


def test_overrides_are_read_as_toml_and_else_as_strings():
    config = load_config("tiny", ["train.steps=7", "train.precision=bf16", 'data.views=["PA"]'])
    assert (config.train.steps, config.train.precision) == (7, "bf16")
    assert config.data.views == ("PA",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "is no override"),
        ("train.steps=0", r"train\.steps: Input should be greater than 0"),
        ("train.steps.x=1", "is a value, not a section|Input should be"),
        ("train.micro_batch_size=7", "batch_size=64 is not a multiple of micro_batch_size=7"),
        ("data.image_size=63", r"is not a multiple of model\.image\.patch_size=8; 56 is"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config("tiny", ["train.steps=3", override])


def test_a_file_holds_only_what_differs_from_the_one_it_extends(tmp_path: Path):
    arm = tmp_path / "arm.toml"
    arm.write_text('extends = "paper"\n[model.image]\ndepth = 2\n')
    config, paper = load_config(str(arm)), load_config("paper")
    assert config.model.image.depth == 2
    assert config.model.image.width == paper.model.image.width
    assert config.train == paper.train


def test_the_arms_hold_only_what_differs_from_the_ablation():
    ablation = load_config("ablation")
    arms = [name for name in config_names() if name.startswith("arms/")]
    assert {"arms/contrastive", "arms/whole"} <= set(arms)
    assert load_config("arms/contrastive") == ablation
    for arm in arms:
        file = RESOURCES / "configs" / f"{arm}.toml"
        values = tomllib.loads(file.read_text("utf-8"))
        assert values.pop("extends") == "ablation", arm
        config, base = load_config(arm).model_dump(), ablation.model_dump()
        for section, keys in values.items():
            for key in keys:
                assert config[section][key] != base[section][key], f"{arm}: {section}.{key}"


def test_the_long_control_follows_the_steps_of_the_ablation():
    steps = load_config("ablation").train.steps
    assert load_config("arms/contrastive_long").train.steps == round(3.05 * steps)


def test_files_that_extend_in_a_circle_are_refused(tmp_path: Path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'extends = "{b}"')
    b.write_text(f'extends = "{a}"')
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(str(a))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "huge",
            r"name one of ablation, demo, paper, recommended, recommended_random, tiny, "
            r"or of arms/ one of .*, pixels, prompts, ",
        ),
        (
            "whole",
            "there is no configuration 'whole'; .* or of arms/ one of .*, whole, or give a path",
        ),
        ("none.toml", "cannot be read"),
    ],
)
def test_a_missing_configuration_says_what_there_is(name: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(name)


@pytest.mark.parametrize("load", [load_config, load_prompts, load_disease_prompts])
def test_whatever_is_named_or_a_path_fails_in_the_same_words(load: Callable, tmp_path: Path):
    def fails(name: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            load(name)

    fails("nowhere", "there is no .* 'nowhere'; name one of .*default|tiny.*, or give a path that")
    fails(str(tmp_path / "no.toml"), r"no\.toml cannot be read: No such file")
    (tmp_path / "folder.toml").mkdir()
    fails(str(tmp_path / "folder.toml"), r"folder\.toml cannot be read: Is a directory")
    for content in (b"a = = 1", "name = 'Müller'".encode("latin-1")):
        (tmp_path / "bad.toml").write_bytes(content)
        fails(str(tmp_path / "bad.toml"), r"bad\.toml is no valid TOML: ")
    (tmp_path / "odd.toml").write_text("colour = 1")
    fails(
        str(tmp_path / "odd.toml"), r"odd\.toml: unknown key 'colour'; known here: \w+, |; unknown"
    )


def test_the_hash_follows_the_values_and_not_the_way_they_were_written():
    default = load_config("tiny").train.steps
    assert config_hash(load_config("tiny")) == config_hash(
        load_config("tiny", [f"train.steps={default}"])
    )
    assert config_hash(load_config("tiny")) != config_hash(load_config("tiny", ["train.seed=1"]))
