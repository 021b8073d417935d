from __future__ import annotations

import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_dpo import recipe, recipe_toml
from lora_dpo.errors import UserError
from lora_dpo.recipe_errors import RecipeError

GOOD = """
[data]
path = "tinyworld"
resolution = 64

[base]
family = "sdxl"
model = "tinyworld"

[method]
kind = "dpo"
beta = 2000
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return _write


def problems_of(path: Path, *arguments: str) -> dict[str, tuple[str, int | None]]:
    with pytest.raises(RecipeError) as caught:
        recipe.load(str(path), arguments)
    return {".".join(p.key): (p.message, p.place.line if p.place else None) for p in caught.value.problems}


def test_all_problems_come_at_once_with_their_lines(write) -> None:
    path = write(
        """name = "x"
[data]
path = "nowhere"
resolution = 63
[base]
family = "sdl"
model = "tinyworld"
[adapter]
rank = 8.5
targets = [1,
           2]
alpha = 0
[method]
kind = "sft"
beta = 3
[train]
batch_pairs = 32
micro_batch_pairs = 5
stpes = 3
warmup_steps = true
[trian]
steps = 1
"""
    )
    found = problems_of(path)
    assert found == {
        "data.path": (f"{path.parent / 'nowhere'} doesn't exist", 3),
        "data.resolution": ("got 63, expected a multiple of 8", 4),
        "base.family": ('got "sdl", expected one of "sdxl" or "stable_diffusion"', 6),
        "adapter.rank": ("got 8.5, expected an integer", 9),
        "adapter.targets": (
            'got [1, 2], expected "attention", "attention+ff" or "all-linear", each with "+conv" or without, or an '
            "array of module name endings",
            10,
        ),
        "adapter.alpha": ("got 0, expected more than 0", 12),
        "method.beta": ('method.kind = "sft" has no beta (it belongs to dpo, ipo, hinge, dmpo, kto, dspo)', 15),
        "train.micro_batch_pairs": ("got 5, expected a divisor of train.batch_pairs = 32", 18),
        "train.stpes": ("unknown key (did you mean steps?)", 19),
        "train.warmup_steps": ("got true, expected an integer", 20),
        "trian": ("unknown table (did you mean train?)", 21),
    }


@pytest.mark.parametrize(
    ("argument", "key", "part"),
    [
        ("train.steps=0", "train.steps", "expected more than 0"),
        ("method.timestep_range=[500, 500]", "method.timestep_range", "low < high"),
        ("method.kind=kta", "method.kind", 'expected one of "dpo", "ipo"'),
        ("method.kind=['a']", "method.kind", "expected one of"),
        ("method=3", "method", "expected a table"),
        ("data.heldout_split=train", "data.heldout_split", "nothing is held out"),
        ("data.bucket_step_pixels=32", "data.bucket_step_pixels", "no effect on squares"),
        ("data.max_aspect=1.5", "data.max_aspect", "no effect on squares"),
        ("data.max_aspect=0.5", "data.max_aspect", "expected at least 1"),
        ("data.bucket_step_pixels=12", "data.bucket_step_pixels", "a multiple of 8"),
        ("data.aspect=buckets", "data.aspect", "no bucket but the square of 64"),
        ("data.pairs_of_ranking=adjacent", "data.pairs_of_ranking", "has no rankings"),
        ("data.crop=bottom", "data.crop", 'expected one of "center" or "top"'),
        ("train.precision=fp16", "train.precision", 'expected one of "float32" or "bfloat16"'),
        ("base.family=stable_diffusion", "base.family", 'of family "sdxl"'),
        ("base.vae=./here", "base.vae", "neither a folder nor a hub id"),
        ("base.config=owner/name", "base.config", "only a single-file checkpoint"),
        ("base.model=owner/name", "evaluate.scorer", "tiny world's pictures only"),
        ("train.learning_rate=nan", "train.learning_rate", "a finite number"),
        ("train.device=gpu", "train.device", "expected text like"),
        ("evaluate.prompts_file=no.txt", "evaluate.prompts_file", "is not a file"),
        ("beta=3", "beta", "did you mean method.beta?"),
        ("train.learning_rat=3", "train.learning_rat", "did you mean learning_rate?"),
        ("data.columns={prompt=3}", "data.columns.prompt", "expected text in quotes"),
        ("name=../up", "name", "expected text like"),
    ],
)
def test_one_wrong_override(write, argument: str, key: str, part: str) -> None:
    found = problems_of(write(GOOD + '[evaluate]\nscorer = "tinyworld"\n'), argument)
    assert list(found) == [key]
    assert part in found[key][0]


def test_buckets_have_to_fit(write) -> None:
    path = write(GOOD)
    loaded = recipe.load(str(path), ["data.aspect=buckets", "data.bucket_step_pixels=16"])
    assert (loaded.data.bucket_step_pixels, loaded.data.max_aspect) == (16, 2.0)
    found = problems_of(path, "data.aspect=buckets", "data.bucket_step_pixels=24")
    assert found == {"data.bucket_step_pixels": ("got 24, expected a divisor of data.resolution = 64", None)}
    found = problems_of(path, "data.aspect=buckets", "data.bucket_step_pixels=8", "data.max_aspect=1.01")
    assert "in steps of 8 up to 1.01:1 there is no bucket but the square" in found["data.aspect"][0]
    # What is wrong by itself is reported once.
    assert list(problems_of(path, "data.aspect=buckets", "data.bucket_step_pixels=0")) == ["data.bucket_step_pixels"]


def test_missing_keys_are_named(write) -> None:
    assert set(problems_of(write("[data]\nresolution = 64"))) == {"data.path", "base", "method"}


@pytest.mark.parametrize(
    ("text", "line"), [('[data]\npath = "x\n', 2), ("[data\n", 1), ("\n\na = b\n", 3), ("[a]\nb = 1\n\n[a]\n", 4)]
)
def test_malformed_toml_shows_its_line(write, text: str, line: int) -> None:
    path = write(text)
    with pytest.raises(UserError, match=f"^{path}:{line}: malformed TOML"):
        recipe.load(str(path))


def test_text_in_another_encoding_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        recipe.load(str(path))


def test_unknown_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(UserError, match="did you mean quickstart"):
        recipe.load("quickstrat")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder"):
        recipe.load(str(tmp_path))


def test_extends_by_path_and_by_shipped_name(write) -> None:
    write(GOOD)
    child = write('extends = "mine.toml"\n[train]\nsteps = 7\n[adapter]\ntargets = ["to_q"]\n', "child.toml")
    loaded = recipe.load(str(child), ["train.batch_pairs=4"])
    assert (loaded.train.steps, loaded.train.batch_pairs, loaded.method.kind) == (7, 4, "dpo")
    assert loaded.adapter.targets == ("to_q",)
    assert loaded.name == "child"
    shipped = recipe.load(str(write('extends = "quickstart"\n', "q.toml")))
    assert recipe.differences(write(recipe.dump(shipped), "held.toml"), recipe.load("quickstart")) == {}


def test_a_problem_of_the_parent_is_shown_in_the_parents_file(write) -> None:
    parent = write(GOOD.replace("2000", "0"))
    child = write('extends = "mine.toml"\n', "child.toml")
    with pytest.raises(RecipeError, match=f"{parent}:12 · method.beta: got 0"):
        recipe.load(str(child))


@pytest.mark.parametrize(
    ("extends", "message"), [('"b.toml"', "extends itself"), ("3", "in quotes"), ('"no"', "no such")]
)
def test_bad_extends(write, extends: str, message: str) -> None:
    write('extends = "a.toml"\n', "b.toml")
    with pytest.raises(UserError, match=message):
        recipe.load(str(write(f"extends = {extends}\n", "a.toml")))


def test_another_kind_drops_what_only_the_old_one_has_and_nothing_else(write) -> None:
    path = write(GOOD + "timestep_range = [100, 900]\n")
    loaded = recipe.load(str(path), ["method.kind=sft"])
    assert loaded.method.model_dump() == {
        "kind": "sft",
        "timestep_range": (100, 900),
        "timestep_sampling": "uniform",
        "visits_per_pair": None,
    }
    assert "method.beta" in problems_of(path, "method.kind=sft", "method.beta=3")


def test_overrides_are_toml_and_bare_words_are_text(write) -> None:
    arguments = ["train.gradient_checkpointing=3", "train.schedule=cosine", "train.learning_rate=1e-3"]
    loaded = recipe.load(str(write(GOOD)), [*arguments, "adapter.targets=['to_q', 'to_k']", "name=a.b"])
    assert loaded.train.gradient_checkpointing == 3
    assert (loaded.train.schedule, loaded.train.learning_rate) == ("cosine", 1e-3)
    assert (loaded.adapter.targets, loaded.name) == (("to_q", "to_k"), "a.b")


@pytest.mark.parametrize("argument", ["train.steps", "=3", "train..steps=3", ".=1"])
def test_an_argument_that_is_no_override(write, argument: str) -> None:
    with pytest.raises(UserError, match=r"not section\.key=value"):
        recipe.load(str(write(GOOD)), [argument])


def test_input_paths_are_beside_the_file_that_sets_them(write, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    path = write(GOOD.replace('path = "tinyworld"', 'path = "there"'))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert recipe.load(str(path)).data.path == str(tmp_path / "there")
    assert recipe.load(str(path), ["data.path=here"]).data.path == str(tmp_path / "elsewhere" / "here")


def test_a_hub_id_stays_as_it_is(write) -> None:
    assert recipe.load(str(write(GOOD)), ["base.model=owner/some-model"]).base.model == "owner/some-model"


@pytest.mark.parametrize("name", recipe_toml.shipped_names())
def test_every_shipped_recipe_is_valid_and_survives_its_dump(name: str, write, tmp_path: Path) -> None:
    arguments = [] if "path" in tomllib.loads(recipe_toml.find(name).read_text()).get("data", {}) else ["data.path=."]
    loaded = recipe.load(name, arguments)
    assert recipe.load(str(write(recipe.dump(loaded)))) == loaded
    jsonschema.validate(loaded.model_dump(mode="json", exclude_none=True), recipe.json_schema())
    jsonschema.validate(tomllib.loads(recipe_toml.find(name).read_text()), recipe.json_schema())


def test_the_schema_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="stpes"):
        jsonschema.validate({"train": {"stpes": 1}}, recipe.json_schema())


def test_differences_leave_out_what_does_not_change_the_result(write) -> None:
    held = write(recipe.dump(recipe.load(str(write(GOOD)))), "held.toml")
    assert recipe.differences(held, recipe.load(str(held))) == {}
    two = recipe.load(
        str(write(GOOD)),
        ["train.steps=3", "method.beta=1", "train.device=cpu", "output.hub_repo=a/b", "train.micro_batch_pairs=2"],
    )
    steps = recipe.load(str(held)).train.steps
    assert recipe.differences(held, two) == {"method.beta": (2000.0, 1.0), "train.steps": (steps, 3)}
    other = recipe.load(str(write(GOOD)), ["method.kind=sft"])
    assert list(recipe.differences(held, other)) == ["method.kind"]


def test_a_run_s_recipe_is_compared_even_if_it_could_not_be_trained_any_more(write) -> None:
    """An earlier version wrote it, without a key and with one that is gone, and its data have moved."""
    new = recipe.load(str(write(GOOD)), ["evaluate.prompts=3"])
    held = recipe.dump(new).replace('path = "tinyworld"', 'path = "/no/such/place"').replace("rslora = false\n", "")
    held = held.replace("[train]\n", "[train]\ngone = 3\n")
    found = recipe.differences(write(held, "held.toml"), new)
    assert found == {"data.path": ("/no/such/place", "tinyworld"), "train.gone": (3, None)}
    assert [recipe.resumes(key, new) for key in found] == [True, False]
    with pytest.raises(UserError, match="can't be read"):
        recipe.differences(write("name = ", "broken.toml"), new)


def test_steps_may_be_added_where_no_schedule_ends_with_them(write) -> None:
    constant = recipe.load(str(write(GOOD)))
    cosine = recipe.load(str(write(GOOD)), ["train.schedule=cosine"])
    assert [recipe.resumes("train.steps", one) for one in (constant, cosine)] == [True, False]
    assert recipe.resumes("evaluate.prompts", cosine)
    assert not recipe.resumes("adapter.rank", constant)


KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
VALUES = st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=12), st.lists(st.text(max_size=5), max_size=3))


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=4), max_size=4), st.integers(0, 3))
def test_key_lines_find_every_key(tables: dict[str, dict[str, object]], blank: int) -> None:
    import tomli_w

    text = "# first\n" * blank + tomli_w.dumps(tables, multiline_strings=True)
    lines = text.splitlines(keepends=True)
    found = dict(recipe_toml.key_lines(text))
    wanted = {(name,) for name in tables} | {(name, key) for name, table in tables.items() for key in table}
    assert set(found) == wanted
    for key, line in found.items():
        assert lines[line - 1].startswith(f"[{key[0]}]" if len(key) == 1 else f"{key[1]} = ")


def test_key_lines_of_inline_and_dotted_tables() -> None:
    text = 'a.b = 1\n[c]\nd = { e = 1 }\nf = """\ng = 2\n"""\n[c.h]\ni = [\n  1,\n]\nj = 1\n'
    found = dict(recipe_toml.key_lines(text))
    assert found == {
        ("a",): 1, ("a", "b"): 1, ("c",): 2, ("c", "d"): 3, ("c", "d", "e"): 3, ("c", "f"): 4, ("c", "h"): 7,
        ("c", "h", "i"): 8, ("c", "h", "j"): 11,
    }  # fmt: skip


def test_a_single_file_model_is_a_file_and_never_a_hub_id(write, tmp_path: Path) -> None:
    found = problems_of(write(GOOD), "base.model=models/none.safetensors")
    assert "none.safetensors doesn't exist" in found["base.model"][0]
    (tmp_path / "here.safetensors").touch()
    loaded = recipe.load(str(write(GOOD)), [f"base.model={tmp_path / 'here.safetensors'}", "base.config=owner/name"])
    assert loaded.base.config == "owner/name"


def test_a_vae_may_be_a_file(write, tmp_path: Path) -> None:
    assert "vae.safetensors doesn't exist" in problems_of(write(GOOD), "base.vae=vae.safetensors")["base.vae"][0]
    (tmp_path / "vae.safetensors").touch()
    beside = write(GOOD.replace('model = "tinyworld"', 'model = "tinyworld"\nvae = "vae.safetensors"'))
    assert recipe.load(str(beside)).base.vae == str(tmp_path / "vae.safetensors")
    (tmp_path / "vae.pt").touch()
    assert "neither a folder nor a hub id" in problems_of(write(GOOD), f"base.vae={tmp_path}/vae.pt")["base.vae"][0]
