"""The flags and variables that `engine` refuses, against the engine's own parser."""

import pytest

from turboquant_operator.api.spec import OWNED_ENV, OWNED_FLAGS
from turboquant_operator.planner.choice import LONG_CONTEXT_VARIABLE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def options() -> list[set[str]]:
    """The options of `vllm serve`, each as the set of its spellings."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return [set(action.option_strings) for action in make_arg_parser(FlexibleArgumentParser())._actions]


def test_every_owned_flag_is_one_of_the_engine(options: list[set[str]]) -> None:
    assert set(OWNED_FLAGS) - set().union(*options) == set()


def test_every_spelling_of_an_owned_flag_is_owned(options: list[set[str]]) -> None:
    owned = [spellings for spellings in options if spellings & set(OWNED_FLAGS)]
    assert set().union(*owned) == set(OWNED_FLAGS)


def test_no_free_flag_looks_like_a_shortened_owned_one(options: list[set[str]]) -> None:
    free = set().union(*options) - set(OWNED_FLAGS)
    assert {(flag, owned) for flag in free for owned in OWNED_FLAGS if owned.startswith(flag)} == set()


def test_every_variable_of_the_engine_is_one_that_it_reads() -> None:
    from vllm.envs import environment_variables

    named = {name for name in (*OWNED_ENV, LONG_CONTEXT_VARIABLE) if name.startswith("VLLM_")}
    assert named - environment_variables.keys() == set()
