"""Options are fields of models, declared once: every command has them, with their help and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field

from counterlens.engine.cli.generated import only, with_options, without
from counterlens.engine.cli.main import app
from counterlens.engine.cli.opening import EngineOptions
from counterlens.engine.config import Config, Settings, StepOptions, declared
from tests.engine.cli.test_cli import one_line_error, run

COMMANDS = {"counterfactual": ["x.png"], "audit": ["x", "--out", "o"], "export": [], "profile": []}
OF_THE_MODELS = {"pack", "classifier"}  # of a config; a command's are those of the engine
NOT_IN_A_FILE = {"neighbours", "dtype", "device", "runtime", "attention", "checkpointing", "memory_budget"}
NOT_OF_THE_RUN = {"export": {"seed", "fit"}, "profile": {"count"}}  # a profile's count is of images
# One value that does not fit, of every field that has a type, a range or choices.
WRONG = {
    "region": "1,2,3", "count": "0",
    "mode": "quick", "preset": "mine", "speed": "warp", "seed": "-1", "steps": "0", "strength": "0", "angle": "181",
    "guidance_scale": "-1", "class_scale": "-0.1", "distance_scale": "much", "noise": "none", "solver": "euler",
    "spacing": "even", "guidance_start": "1", "guidance_end": "0", "filter": "some", "gradient": "half",
    "guidance_decoder": "big", "denoiser": "new", "distance": "l2", "guidance_every": "0", "fit": "stretch",
    "reuse_features": "0", "reuse_gradients": "two",
}  # fmt: skip


def options_of(command: str, of: typer.Typer = app) -> dict[str, Any]:
    """The options of a command by name, as the command line knows them."""
    group: Any = typer.main.get_command(of)
    return {p.name: p for p in getattr(group, "commands", {command: group})[command].params}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_an_option_with_its_help(command: str) -> None:
    given = options_of(command)
    run_fields = set(Config.model_fields) - OF_THE_MODELS - NOT_OF_THE_RUN.get(command, set())
    of_the_engine = set(EngineOptions.model_fields) - (NOT_IN_A_FILE if command == "export" else set())
    assert run_fields | of_the_engine <= set(given)
    for model, names in ((Config, run_fields), (EngineOptions, of_the_engine)):
        for name in names:
            description = model.model_fields[name].description
            assert description
            assert f"--{name.replace('_', '-')}" in given[name].opts
            assert given[name].default == model.model_fields[name].default
            if "{" not in description:  # a table's names are filled in when help is read
                assert given[name].help == description


@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_fit_is_one_line_that_names_the_option(command: str) -> None:
    for name, value in WRONG.items():
        if name in options_of(command) and name not in NOT_OF_THE_RUN.get(command, set()):
            option = f"--{name.replace('_', '-')}"
            result = run(command, *COMMANDS[command], option, value)
            one_line_error(result, 2, f"'{option}'", repr(value))
            assert len(result.stderr.splitlines()) == 1


def test_wrong_values_leave_no_field_out() -> None:
    assert set(WRONG) == set(Config.model_fields) - OF_THE_MODELS - {"match_official"}


def test_config_has_every_field_of_settings_and_none_is_said_twice() -> None:
    assert set(Settings.model_fields) <= set(Config.model_fields)
    own = {name for name in Config.model_fields if name in Config.__annotations__}
    assert not own & set(Settings.model_fields)
    for name in Settings.model_fields:
        assert Config.model_fields[name].description == Settings.model_fields[name].description
    assert declared(Config)[: len(own)] == [name for name in Config.__annotations__ if name in own]


def test_what_decides_the_graph_is_of_the_settings() -> None:
    settings = Config(mode="official", filter="off", guidance_every=3).settings({})
    assert settings.graph == StepOptions(filter="off", guidance_every=2)
    assert settings.graph == Config(mode="official", filter="off", guidance_every=9, steps=60).settings({}).graph
    assert settings.graph != Config(mode="official", filter="off").settings({}).graph


class Larger(Config):
    """A config with one more option, declared nowhere else."""

    sharpness: float = Field(0.5, ge=0, lt=2, description="How sharp it is.")


def test_a_new_field_is_an_option_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    made = typer.Typer()

    @made.command()
    @with_options
    def show(
        config: Annotated[Larger, without("pack", "classifier")],
        opening: Annotated[EngineOptions, only("pack", "checkpointing")],
        amount: Annotated[int, typer.Option(help="How many.")] = 3,
    ) -> None:
        """Show it."""
        seen.append((config, opening, amount))

    def call(*arguments: str) -> None:
        made(list(arguments), standalone_mode=False)

    call()
    call("--sharpness", "1.5", "--steps", "7", "--no-checkpointing", "--pack", "mine", "--amount", "4")
    assert seen[0] == (Larger(), EngineOptions(), 3)
    assert seen[0][0].model_fields_set == set()
    assert seen[1] == (Larger(sharpness=1.5, steps=7), EngineOptions(pack="mine", checkpointing=False), 4)
    with pytest.raises(typer.BadParameter, match="less than 2, got '2'"):
        call("--sharpness", "2")
    with pytest.raises(SystemExit):
        made(["--help"])
    assert "How sharp it is." in capsys.readouterr().out


def test_two_models_with_one_option_and_names_that_are_no_field() -> None:
    with pytest.raises(TypeError, match="classifier"):

        @with_options
        def twice(config: Config, opening: EngineOptions) -> None: ...

    with pytest.raises(TypeError, match=r"Config has no \['stpes'\]"):

        @with_options
        def mistyped(config: Annotated[Config, only("stpes")]) -> None: ...


@pytest.mark.parametrize("command", ["info", "export", "convert x", "audit-merge x --out o", "audit-report x"])
def test_no_seed_where_nothing_is_random(command: str) -> None:
    one_line_error(run(*command.split(), "--seed", 1), 2, "No such option", "--seed")


def test_numbers_that_a_compiled_step_takes_as_inputs_are_refused() -> None:
    one_line_error(run("export", "--what", "guided-step", "--steps", 5), 2, "steps: of --what counterfactual")
    one_line_error(run("export", "--what", "saliency", "--filter", "off"), 2, "filter: of counterfactuals")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export --what counterfactual --out o --dtype fp16", "dtype: of compiled parts"),
        ("export --what saliency --out o --format aoti", "format: of compiled parts"),
        ("export --what saliency --out o --prompts pets", "prompts: a saliency file holds"),
        ("export --what saliency --out o --tiny-decoder x", "tiny_decoder: a saliency file holds"),
        ("profile --match-official --speed fast --out o", "the authors' code has no speed fast; leave"),
        ("export --what foo", "classifier, all, counterfactual, saliency, got 'foo'"),
        ("saliency x.png --method ig --adapter a --out o", "adapter: ig takes none"),
        ("evaluate --methods ig,rise --count 2 --adapter a --out o", "adapter: ig, rise takes none"),
        ("saliency x.png --overwrite --resume --out o", "overwrite: not together with --resume"),
        ("saliency x.png --quantity a/b --out o", "expected class, groups such as a,b/c,d, an index or one of 0, 1"),
    ],
)
def test_an_option_without_effect_is_refused(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line_error(run(*command.split()), 2, said)
    assert not list(tmp_path.iterdir())


def test_help_breaks_lines_where_the_terminal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = run("counterfactual", "--help").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "Writes a PNG" in line)
    assert len(lines[start + 1].split()) > 3
    assert not lines[start + 2].strip()
