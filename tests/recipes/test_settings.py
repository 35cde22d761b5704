"""A run as a dataclass, from a YAML file and `key=value` words."""

import pytest

from fastkd.recipes import (
    RECIPES,
    ArcRecipe,
    ArcStageAConfig,
    from_settings,
    read_settings,
    run_recipe,
    shipped_recipes,
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: arc\nteacher: there\ntask: sst2\nstage_a: {max_steps: 5, learning_rate: 1e-4}\n")
    return path


def test_a_shipped_recipe_is_read_by_its_name():
    assert "arc-sst2" in shipped_recipes()
    assert read_settings("arc-sst2")["task"] == "sst2"


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_has_settings_that_fit(name, tmp_path):
    settings = read_settings(name, ["teacher=somewhere", f"output_dir={tmp_path}"])
    sections = {
        "arc": {"finetune", "stage_a", "stage_b"},
        "lrc_bert": {"finetune", "general", "distil"},
        "egkd": {"finetune", "distil"},
    }
    kind = settings.pop("recipe")
    assert set(from_settings(RECIPES[kind], settings, kind).configs()) == sections[kind]


def test_words_override_the_file_and_reach_into_sections(file):
    settings = read_settings(str(file), ["teacher=here", "stage_a.max_steps=7", "stage_b.schedule=cosine", "seed=3"])
    assert settings["teacher"] == "here"
    assert settings["stage_a"] == {"max_steps": 7, "learning_rate": "1e-4"}
    assert settings["stage_b"] == {"schedule": "cosine"}
    assert settings["seed"] == 3


def test_values_are_read_as_yaml(file):
    words = ["stage_a.learning_rate=1e-4", "corpus=[a, b]", "overwrite=true", "data=null", "stage_a.relation_heads=12"]
    settings = read_settings(str(file), words)
    assert settings["stage_a"]["learning_rate"] == 1e-4
    assert settings["corpus"] == ["a", "b"]
    assert settings["overwrite"] is True
    assert settings["data"] is None


def test_a_number_like_1e_4_in_a_file_is_a_number(file, tmp_path):
    section = read_settings(str(file))["stage_a"] | {"output_dir": str(tmp_path)}
    assert from_settings(ArcStageAConfig, section, "stage_a").learning_rate == 1e-4


@pytest.mark.parametrize("word", ["teacher", "=5", "teacher here"])
def test_a_word_without_an_equals_sign_is_refused(file, word):
    with pytest.raises(ValueError, match=f"'{word}' is not of the form key=value"):
        read_settings(str(file), [word])


def test_a_word_that_takes_a_value_for_a_section_is_refused(file):
    with pytest.raises(ValueError, match=r"'teacher\.size=5': teacher is a value, not a section"):
        read_settings(str(file), ["teacher.size=5"])


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ValueError, match=r"no recipe 'arc-sst3'; .*arc-sst2"):
        read_settings("arc-sst3")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe '.*other\.yaml'"):
        read_settings(str(tmp_path / "other.yaml"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    with pytest.raises(ValueError, match="holds no `key: value` settings"):
        read_settings(str(tmp_path / "empty.yaml"))


def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path):
    (tmp_path / "broken.yaml").write_text("recipe: [arc\nteacher: x")
    with pytest.raises(ValueError, match=r"broken\.yaml is no valid YAML"):
        read_settings(str(tmp_path / "broken.yaml"))


def test_the_kind_of_recipe_must_be_known():
    with pytest.raises(ValueError, match="recipe: 'acr' is not one of arc"):
        run_recipe({"recipe": "acr"})


def test_a_missing_teacher_is_asked_for():
    with pytest.raises(ValueError, match="arc: teacher must be given"):
        run_recipe({"recipe": "arc", "teacher": None, "task": "sst2"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"techer": "x"}, "arc: unknown key 'techer'; did you mean 'teacher'"),
        ({"zzzz": 1}, "arc: unknown key 'zzzz'; allowed are corpus, data, finetune"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(settings, message):
    with pytest.raises(ValueError, match=message):
        from_settings(ArcRecipe, {"teacher": "x", "task": "sst2"} | settings, "arc")
