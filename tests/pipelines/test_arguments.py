import pytest

from ldm.errors import UserError
from pipelines.arguments import ArgumentParser, parse_training_arguments


def test_options_and_overrides_come_in_any_order():
    for argv in (
        ["--config", "a.yaml", "--resume", "seed=1", "training.max_steps=5"],
        ["seed=1", "--config", "a.yaml", "training.max_steps=5", "--resume"],
        ["seed=1", "training.max_steps=5", "--resume", "--config=a.yaml"],
    ):
        arguments = parse_training_arguments("a script", argv)
        assert arguments.config == "a.yaml"
        assert arguments.resume is True
        assert arguments.overrides == ["seed=1", "training.max_steps=5"]


def test_defaults():
    arguments = parse_training_arguments("a script", ["--config", "a.yaml"])
    assert arguments.resume is False
    assert arguments.overrides == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg", "a.yaml"], "unknown option '--confg'; did you mean '--config'?"),
        (["--confg=a.yaml"], "unknown option '--confg'; did you mean '--config'?"),
        (["--config", "a.yaml", "--res"], "unknown option '--res'; did you mean '--resume'?"),
        (["--config", "a.yaml", "--zzzzzzzz"], "unknown option '--zzzzzzzz'; the options are"),
        ([], "--config"),
        (["--config"], "--config"),
        (["--config", ""], "--config '' is empty; give a name"),
        (["--config", "a.yaml", ""], "override '' is not key=value"),
        (["--config", "a.yaml", "steps"], "override 'steps' is not key=value"),
        (["--config", "a.yaml", "=3"], "override '=3' is not key=value"),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        parse_training_arguments("a script", argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_negative_number_is_a_value():
    parser = ArgumentParser(prog="x")
    parser.add_argument("--seed", type=int)
    assert parser.parse_args(["--seed", "-3"]).seed == -3


def test_subcommands_know_their_own_options():
    parser = ArgumentParser(prog="x")
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("draw").add_argument("--output")
    assert parser.parse_args(["draw", "--output", "a.png"]).output == "a.png"
    with pytest.raises(UserError, match="unknown option '--outptu'; did you mean '--output'"):
        parser.parse_args(["draw", "--outptu", "a.png"])
    with pytest.raises(UserError, match="unknown option '--verbos'"):
        parser.parse_args(["--verbos", "draw"])
    with pytest.raises(UserError, match="drw"):
        parser.parse_args(["drw"])
