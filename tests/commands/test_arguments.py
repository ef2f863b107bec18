from typing import get_args

import pytest

from optvq_hf.commands.evaluate import make_parser as evaluate_parser
from optvq_hf.commands.model_arguments import ModelArguments
from optvq_hf.commands.train import make_parser as train_parser
from optvq_hf.configuration_fields_optvq import OptVQFields
from optvq_hf.evaluation.arguments import EvaluationArguments
from optvq_hf.solver_choice import SOLVERS, Solver
from optvq_hf.training.arguments import ObjectiveArguments, TrainingArguments
from optvq_hf.training.losses.adversarial import DISCRIMINATOR_LOSSES
from optvq_hf.training.losses.perceptual import NETWORKS


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    path = recipe(
        tmp_path, "max_steps: 5\nlearning_rate: 3e-4\nchannel_multiplier: [1, 2]\nstreaming: true\ndropout: 0.1\n"
    )
    flags = ["--config", path, "--max-steps", "7", "--codebook_size", "32", "--epsilon-schedule", "10", "50"]
    training, optimization, _, codebook, _, data, model = train_parser().parse(flags)
    assert (training.max_steps, optimization.learning_rate, training.batch_size) == (7, 3e-4, 64)
    assert codebook.epsilon_schedule == [10.0, 50.0]
    assert data.streaming is True
    assert (model.channel_multiplier, model.codebook_size, model.dropout, model.codebook_dim) == ([1, 2], 32, 0.1, None)


def test_every_field_of_the_configuration_is_a_flag():
    own = list(OptVQFields.__dataclass_fields__)
    own.remove("autoencoder")  # comes with a model
    assert list(ModelArguments.__dataclass_fields__) == own
    text = " ".join(train_parser().format_help().split())  # of --help-all
    for name in own:
        assert f"--{name.replace('_', '-')} " in text
    assert (
        "Inverse of the entropic regularisation strength. Larger is closer to unregularised transport. (default: 10.0)"
        in text
    )
    assert (
        "--no-check-memory The same as --check-memory false --" in text
    )  # not the text of --check-memory, and its default
    assert "--max_steps " not in text.split("options:")[1]


def test_choices_are_those_of_the_code_they_are_for():
    """Flags name them anew, as what they are for imports torch."""
    for arguments in (TrainingArguments, EvaluationArguments):
        assert get_args(arguments.__annotations__["solver"]) == get_args(Solver) == SOLVERS
    objective = ObjectiveArguments.__annotations__
    assert get_args(objective["perceptual_network"]) == NETWORKS
    assert get_args(objective["discriminator_loss"]) == DISCRIMINATOR_LOSSES


def test_switches(tmp_path):
    *_, data, model = train_parser().parse(["--freeze-codebook", "--streaming", "--use-codebook-projection", "no"])
    assert model.freeze_codebook is True and data.streaming is True and model.use_codebook_projection is False
    path = recipe(tmp_path, "check_memory: False\n")
    given = (["--config", path], ["--no-check-memory"], ["--check_memory", "0"], ["--config", path, "--check-memory"])
    for argv, value in zip((*given, []), (False, False, False, True, True)):
        assert train_parser().parse(argv)[0].check_memory is value, argv


def test_a_recipe_that_is_not_text(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    check_refused(
        capsys, train_parser(), ["--config", str(tmp_path / "recipe.yaml")], "cannot read recipe .*: not a text file"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("codebok_size: 5", "unknown key 'codebok_size' in recipe .*; did you mean codebook_size?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("max_steps: many", "invalid value for max_steps in recipe .*: 'many'"),
        ("max_steps: 1.5", "invalid value for max_steps"),
        ("max_steps: [1, 2]", r"max_steps in recipe .* must be a single value, got \[1, 2\]"),
        ("channel_multiplier: 4", "channel_multiplier in recipe .* must be a list, got 4"),
        ("backbone: resnet", "backbone in recipe .* must be one of vqgan, plain_cnn, got 'resnet'"),
        ("check_memory: maybe", "invalid value for check_memory in recipe .*: 'maybe'"),
        ("- 1\n- 2", "must hold `flag_name: value` lines"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_wrong_recipes(tmp_path, capsys, text, message):
    check_refused(capsys, train_parser(), ["--config", recipe(tmp_path, text)], message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-stesp", "5"], "unknown argument --max-stesp; did you mean --max-steps?"),
        (["--max-steps", "many"], "--max.steps: invalid int value: 'many'"),
        (["--batch-size", "0"], "batch_size must be greater than 0, got 0"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "/no/such.yaml"], "cannot read recipe /no/such.yaml: No such file"),
        (["--config", "minst"], "cannot read recipe minst: No such file or directory; did you mean mnist?"),
        (["--backbone", "resnet"], "invalid choice: 'resnet'"),
        (["--streaming", "maybe"], "--streaming: must be true or false, got 'maybe'"),
    ],
)
def test_wrong_flags(capsys, argv, message):
    check_refused(capsys, train_parser(), argv, message)


def test_wrong_assignment(capsys):
    check_refused(capsys, evaluate_parser(), ["--assignment", "best"], "nearest, potentials, sinkhorn, got 'best'")


def check_refused(capsys, parser, argv, message):
    import re

    with pytest.raises(SystemExit) as stopped:
        parser.parse(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error) and "--help" in error
