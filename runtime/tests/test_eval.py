"""`tq eval` without an engine: what is computed, the numbers made of it, the command and its messages."""

import json
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from typer.testing import CliRunner

from turboquant_kernels import cli
from turboquant_runtime.eval import engine, far, metrics, report, results, workload
from turboquant_runtime.eval.cli import _Found
from turboquant_runtime.eval.results import EngineRun, Measured
from turboquant_runtime.eval.workload import Code, Text, Workload

EVAL = [EntryPoint("eval", "turboquant_runtime.eval.cli:evaluate", cli.COMMAND_GROUP)]


def encode(text: str) -> list[int]:
    """One token a character, behind a first one."""
    return [1, *map(ord, text)]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens[1:]))


# Texts, codes


def test_shipped_texts_are_long_enough_for_the_default() -> None:
    texts = workload.read_texts([])
    assert list(texts) == ["code.txt", "prose.txt", "technical.txt"]
    for text in texts.values():  # no tokenizer in use makes more than about 4.5 characters a token of these
        assert len(text) > 4.5 * 1536


def test_a_short_text_is_refused_with_what_was_found_and_the_way_out() -> None:
    message = r"short.txt: 101 tokens found, 256 needed; name a longer file with --text"
    with pytest.raises(ValueError, match=message):
        workload.make({"short.txt": "x" * 100}, encode, 1536)


def test_two_files_of_one_name_and_a_binary_file_are_refused(tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("text")
    with pytest.raises(ValueError, match="rename one of the two"):
        workload.read_texts([tmp_path / "a/t.txt", tmp_path / "b/t.txt"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        workload.read_texts([tmp_path / "binary"])


@pytest.mark.parametrize(
    ("characters", "tokens", "kept"), [(2000, 512, 512), (300, 512, 256), (447, 512, 448)]
)
def test_texts_are_cut_to_whole_half_chunks(characters, tokens, kept) -> None:
    (text,) = workload.make({"t": "x" * characters}, encode, tokens).texts
    assert len(text.tokens) == kept
    assert text.scored == range(128, kept - 1)


def test_every_code_lies_in_the_one_context_and_is_asked_for() -> None:
    codes = workload.plant_codes(encode, 4096)
    assert len({code.answer for code in codes}) == len(codes) == 12
    (context,) = {decode(code.prompt).rpartition(" The code of")[0] for code in codes}
    for code in codes:
        assert len(code.prompt) == pytest.approx(4096, abs=80)
        question = decode(code.prompt).removeprefix(context).strip()
        assert f"{question} {code.answer}." in context
    places = [context.index(code.answer) for code in codes]
    assert places == sorted(places)
    assert places[0] < 60
    assert places[-1] > 0.85 * len(context)


# Numbers


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * numpy.log(2) - 0.25 * numpy.log(2)
    assert metrics.divergence(p.log()[None], q.log()[None]).item() == pytest.approx(expected)
    assert metrics.divergence(p.log()[None], p.log()[None]).item() == 0


def test_a_token_that_the_reference_excludes_adds_nothing() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    assert metrics.divergence(p.log(), q.log()).item() == 0


def test_far_positions_are_the_tenth_with_the_largest_dependence_over_all_texts() -> None:
    dependence = [numpy.arange(10, dtype="f4"), numpy.full(10, 8.5, "f4")]
    chosen = metrics.far_positions(dependence)
    assert [mask.tolist().count(True) for mask in chosen] == [1, 1]
    assert chosen[0][9]


def test_agreeing_tokens_end_at_the_first_difference() -> None:
    assert metrics.agreeing_tokens([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert metrics.agreeing_tokens([1, 2], [1, 2]) == 2


def visible(mask: torch.Tensor, query: int) -> list[int]:
    """The keys that a query sees."""
    return (mask[0, 0, query] == 0).nonzero().flatten().tolist()


def test_masks_let_a_query_see_near_and_first_tokens_within_the_window() -> None:
    config = SimpleNamespace(sliding_window=200, layer_types=["sliding_attention", "full_attention"])
    near = far.masks(config, 400, near=True, dtype=torch.float32)
    assert visible(near["full_attention"], 300) == [0, 1, 2, 3, *range(173, 301)]
    assert visible(near["sliding_attention"], 300) == list(range(173, 301))
    full = far.masks(config, 400, near=False, dtype=torch.float32)
    assert visible(full["full_attention"], 300) == list(range(301))
    assert visible(full["sliding_attention"], 300) == list(range(101, 301))


def test_a_model_without_layer_types_takes_one_mask() -> None:
    mask = far.masks(SimpleNamespace(), 130, near=True, dtype=torch.float32)
    assert mask.shape == (1, 1, 130, 130)


def test_layers_of_an_unknown_type_are_refused() -> None:
    with pytest.raises(ValueError, match="layer_types linear_attention"):
        far.masks(SimpleNamespace(layer_types=["linear_attention"]), 4, near=True, dtype=torch.float32)


# Logits out of vLLM


class FakeLLM:
    """Calls `compute_logits` as vLLM's model runners do: for the row that is sampled, then for the prompt's.

    The second runner computes the row of the text's last token with the prompt's, the first does not.
    `logits` has a row for each token.
    """

    def __init__(self, logits: torch.Tensor, runner: str) -> None:
        self.logits, self.runner = logits, runner
        self.model = SimpleNamespace(compute_logits=lambda positions: self.logits[positions])

    def apply_model(self, function):
        return [function(self.model)]

    def generate(self, prompt):
        length = len(prompt)
        for start in range(0, length, 128):
            end = min(start + 128, length)
            self.model.compute_logits([end - 1])
            self.model.compute_logits(
                list(range(start, end if self.runner == "v2" else min(end, length - 1)))
            )


@pytest.fixture
def _no_vllm(monkeypatch) -> None:
    def generate(llm, prompts, tokens, **sampling):
        return llm.generate(prompts[0])

    monkeypatch.setattr(engine, "_generate", generate)


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.usefixtures("_no_vllm")
def test_each_scored_row_is_compared_with_the_reference_of_its_position(tmp_path, runner) -> None:
    text = Text("t", list(range(320)))
    logits = torch.randn(320, 50, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[200] = logits[200].flip(0)
    engine.write_reference(FakeLLM(logits, "v1"), text, tmp_path / "0")
    assert (tmp_path / "0").stat().st_size == len(text.scored) * 50 * 4
    kl, top1 = engine.compare(FakeLLM(other, runner), text, tmp_path / "0")
    assert len(kl) == len(top1) == len(text.scored)
    assert (numpy.abs(kl) > 1e-5).nonzero()[0].tolist() == [200 - 128]
    assert (~top1).nonzero()[0].tolist() == [200 - 128]


@pytest.mark.usefixtures("_no_vllm")
def test_logits_that_are_not_numbers_are_refused(tmp_path) -> None:
    logits = torch.randn(320, 50)
    logits[300, 3] = float("nan")
    with pytest.raises(ValueError, match="t: logits are not numbers in the chunk of position 256"):
        engine.write_reference(FakeLLM(logits, "v1"), Text("t", list(range(320))), tmp_path / "0")


# Rows and what is shown of them

TEXTS = (Text("a.txt", list(range(256))), Text("b.txt", list(range(256))))
WORK = Workload(TEXTS, (Code([1], "4821"), Code([2], "77")), ([1],))
RUNS = [EngineRun("m", "auto", is_reference=True), EngineRun("m", "auto", 64), EngineRun("m", "tq-k4v4")]


def measured(kl: float | None = None) -> Measured:
    """What an engine reports whose KL is `kl` all over the first text, three times that over the second."""
    if kl is None:
        return Measured("cpu", "cpu", "vllm 0", 128, [" 4821.", " 78"], [[1, 2, 3]])
    distances = [numpy.full(127, kl, "f4"), numpy.full(127, 3 * kl, "f4")]
    top1 = [numpy.ones(127, bool), numpy.zeros(127, bool)]
    return Measured("cpu", "cpu", "vllm 0", 128, [" 4821.", " 78"], [[1, 2, 4]], distances, top1)


def row(run=RUNS[2], kl=0.1, far=None) -> results.Row:
    return results.row(run, measured(kl), WORK, measured(), far)


def test_a_row_has_distances_bytes_codes_and_agreement() -> None:
    chosen = [numpy.arange(127) < 0, numpy.arange(127) < 5]
    made = row(far=chosen)
    assert made.kl_mean == pytest.approx(0.2)
    assert made.kl_far == made.kl_p99 == pytest.approx(0.3)
    assert (made.worst_text, made.top1, made.greedy_tokens) == ("b.txt", 0.5, 2)
    assert (made.codes, made.codes_planted, made.bytes_per_token_per_head) == (1, 2, 132)


def test_the_reference_has_no_distance_to_itself() -> None:
    made = row(RUNS[0], None)
    assert (made.kl_mean, made.greedy_tokens, made.codes, made.bytes_per_token_per_head) == (
        None,
        None,
        1,
        512,
    )


def test_bytes_are_unknown_for_a_cache_that_is_no_uniform_format() -> None:
    assert results.token_bytes("int4_per_token_head", 128, "cuda") is None


def test_the_picture_is_the_same_bytes_each_time(tmp_path) -> None:
    pictures = []
    for name in ("1.svg", "2.svg"):
        report.draw("m", [row()], {"tq-k4v4": measured(0.1).kl}, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    with pytest.raises(ValueError, match="no engine was compared"):
        report.draw("m", [], {}, tmp_path / "3.svg")


# The command


def tq_eval(*arguments):
    arguments = ("eval", *map(str, arguments))
    return CliRunner().invoke(cli.app(arguments, EVAL), arguments)


def plain_text(result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def engines(monkeypatch):
    """Stands in for all processes; caches named in the set fail."""
    failing: set[str] = set()

    def measure(runs, work, log):
        found = _Found(far_reason="ValueError: no masks")
        for run in runs:
            if run.cache in failing:
                found.failures[run] = "ValueError: too big"
            else:
                found.measured[run] = measured(None if run.is_reference else 0.1)
        return found

    monkeypatch.setattr("turboquant_runtime.eval.cli._measure", measure)
    monkeypatch.setattr("turboquant_runtime.eval.cli._workload", lambda *_: WORK)
    return failing


def test_the_command_is_one_of_tq() -> None:
    assert "eval" in {entry.name for entry in entry_points(group=cli.COMMAND_GROUP)}


def test_json_has_every_engine_and_how_it_was_measured(engines, tmp_path) -> None:
    engines.add("fp8")
    result = tq_eval("m", "--cache", "tq-k5v3", "--json", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document.keys() == {"model", "versions", "device", "date", "texts", "far_reason", "rows"}
    assert [entry["label"] for entry in document["rows"]] == ["bf16", "bf16, chunk 64", "fp8", "tq-k5v3"]
    assert document["rows"][2]["note"] == "ValueError: too big"
    assert document["rows"][3]["kl_mean"] == 0.2
    assert "fp8: not measured: ValueError: too big" in result.stderr
    assert "far KL: not measured: ValueError: no masks" in result.stderr
    assert (tmp_path / "p.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("failing", "message"), [("auto", "the bf16 reference was not"), ("tq-k9v9", "tq-k9v9: not")]
)
def test_without_the_reference_or_a_named_cache_the_command_fails(engines, failing, message) -> None:
    engines.add(failing)
    result = tq_eval("m", "--cache", "tq-k9v9")
    assert result.exit_code == 1
    assert message in plain_text(result)


def test_a_picture_that_is_no_svg_is_refused_before_anything_runs(engines) -> None:
    result = tq_eval("m", "--plot", "p.png")
    assert result.exit_code == 2
    assert "'p.png' does not end in .svg" in plain_text(result)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    result = tq_eval(tmp_path)
    assert result.exit_code == 2
    assert "has no tokenizer that transformers reads" in plain_text(result)
