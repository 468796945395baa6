"""Cases, rows, tables and picture of `tq bench engine`, on made-up rates."""

import dataclasses
import io
import json
from xml.etree import ElementTree

import pytest
from rich.console import Console

from turboquant_kernels.formats import BF16, KVFormat
from turboquant_runtime.bench import report
from turboquant_runtime.bench.cases import GROUPS, MODELS, SETTINGS, Batch, Decode, Prefill, Sessions, plan
from turboquant_runtime.bench.results import Row, merge, read_rows, repeated, warm_start, write_rows

PROMISED = {
    *("gpu", "model", "kv_cache_dtype", "case", "capacity_tokens", "decode_tokens_per_second"),
    *("prefill_tokens_per_second", "start_seconds", "repeats", "spread"),
}


def fixture_row(cache="tq-k4v4", case="8x32000", **changes):
    """Made-up numbers, which no engine had."""
    row = Row(
        gpu="fixture GPU",
        model="llama-3.1-8b",
        settings="plain",
        kv_cache_dtype=cache,
        case=case,
        capacity_tokens=3_400_000,
        start_seconds=20.0,
        decode_tokens_per_second=1000.0,
        repeats=3,
        spread=0.01,
        date="2026-01-01 00:00",
    )
    return dataclasses.replace(row, **changes)


def rendered(tables):
    console = Console(file=io.StringIO(), width=80)
    console.print(*tables)
    return console.file.getvalue()


class TestCases:
    def test_groups_that_share_an_engine_are_measured_on_one_start(self):
        runs = plan(["prefill", "decode", "short"])
        assert [run.cache for run in runs] == ["auto", "fp8", "tq-k4v4", "tq-k3v3"]
        assert [type(case) for case in runs[2].cases] == [Prefill, Decode, Batch]
        assert [type(case) for case in runs[3].cases] == [Prefill, Decode]

    def test_groups_of_other_flags_and_models_have_engines_of_their_own(self):
        runs = plan(["decode", "sessions", "moe"], ["auto"])
        assert [(run.model, run.settings) for run in runs] == [
            ("llama-3.1-8b", "plain"),
            ("llama-3.1-8b", "small-cache"),
            ("qwen3-30b-a3b", "plain"),
        ]

    def test_an_engine_that_only_one_group_has_measures_only_its_cases(self):
        cases = {run.cache: run.cases for run in plan(["decode", "start"])}
        assert [len(cases[cache]) for cache in ("auto", "fp8", "tq-k4v4", "tq-k3v3")] == [2, 1, 2, 1]

    def test_a_group_named_twice_is_measured_once(self):
        assert plan(["short", "short"]) == plan(["short"])

    @pytest.mark.parametrize("name", GROUPS)
    def test_every_group_compares_with_bf16_on_a_model_that_exists(self, name):
        group = GROUPS[name]
        assert group.caches[0] == "auto"
        config = json.loads((MODELS / group.model / "config.json").read_text())
        assert config["architectures"][0].endswith("ForCausalLM")
        assert config["torch_dtype"] == "bfloat16"
        longest = SETTINGS[group.settings]["max_model_len"]
        assert longest <= config["max_position_embeddings"]
        for case in group.cases:
            if isinstance(case, Decode):
                assert case.context < longest
            if isinstance(case, Sessions):
                assert case.last_tokens < longest

    def test_sessions_are_three_times_what_the_small_bf16_cache_holds(self):
        (case,) = GROUPS["sessions"].cases
        config = json.loads((MODELS / "llama-3.1-8b" / "config.json").read_text())
        memory = SETTINGS["small-cache"]["kv_cache_memory_bytes"]

        def holds(fmt: KVFormat) -> float:
            token = config["num_hidden_layers"] * config["num_key_value_heads"] * fmt.slot_bytes(128)
            return memory / token

        tokens = case.sessions * case.last_tokens
        assert tokens / holds(BF16) == pytest.approx(3, rel=0.02)
        assert case.at_once * case.last_tokens < holds(BF16)
        assert tokens < holds(KVFormat.parse("tq-k4v4"))


class TestRows:
    def test_a_row_is_written_with_the_fields_the_benchmark_promises(self, tmp_path):
        write_rows(tmp_path / "engine.json", [fixture_row(decode_tokens_per_second=1234.56)])
        (written,) = json.loads((tmp_path / "engine.json").read_text())
        assert set(written) >= PROMISED
        assert written["decode_tokens_per_second"] == 1235
        assert written["capacity_tokens"] == 3_400_000

    def test_rows_are_read_back(self, tmp_path):
        row = fixture_row()
        write_rows(tmp_path / "engine.json", [row])
        assert read_rows(tmp_path / "engine.json") == [row]
        assert read_rows(tmp_path / "absent.json") == []

    def test_new_rows_replace_those_of_the_same_engine_and_case_alone(self):
        old = [
            fixture_row("auto"),
            fixture_row(),
            fixture_row(gpu="other"),
            fixture_row(case="prefill 32000"),
        ]
        new = fixture_row(decode_tokens_per_second=1.0)
        merged = merge(old, [new])
        assert len(merged) == 4
        assert new in merged
        assert old[1] not in merged

    def test_rows_stand_in_the_order_of_the_groups(self):
        rows = [
            fixture_row("tq-k3v3"),
            fixture_row("unknown"),
            fixture_row("auto", model="qwen3-30b-a3b"),
            fixture_row("auto", settings="small-cache"),
            fixture_row("auto", case="32x32000"),
            fixture_row("auto"),
        ]
        ordered = [rows[5], rows[0], rows[1], rows[4], rows[3], rows[2]]
        assert merge([], rows) == ordered

    def test_spread_is_the_range_over_the_median(self):
        assert repeated([10.0, 9.0, 12.0]) == {"repeats": 3, "spread": pytest.approx(0.3)}

    def test_warm_starts_become_one_row(self):
        row = warm_start([fixture_row(case="start", start_seconds=seconds) for seconds in (10.0, 12.0)])
        assert (row.start_seconds, row.repeats) == (11.0, 2)
        assert row.spread == pytest.approx(2 / 11)


class TestReport:
    ROWS = (
        fixture_row("auto", decode_tokens_per_second=500.0, capacity_tokens=900_000),
        fixture_row("fp8", decode_tokens_per_second=800.0, capacity_tokens=1_800_000),
        fixture_row(),
        fixture_row("auto", case="32x32000", decode_tokens_per_second=None, note="holds 1 of the 2 tokens"),
        fixture_row("fp8", case="32x32000", decode_tokens_per_second=1000.0),
        fixture_row(case="32x32000", decode_tokens_per_second=2000.0),
        fixture_row("auto", settings="vllm-defaults", decode_tokens_per_second=4000.0),
        fixture_row("auto", case="1x32000", decode_tokens_per_second=400.0),
        fixture_row(
            "int4_per_token_head", "1x32000", decode_tokens_per_second=100.0, date="2026-01-02 00:00"
        ),
    )

    def test_ratios_are_taken_within_one_case_and_one_set_of_flags(self):
        over = report.ratios(self.ROWS)
        assert over[self.ROWS[2].key] == {"auto": 2.0, "fp8": 1.25}
        assert over[self.ROWS[5].key] == {"fp8": 2.0}
        assert over[self.ROWS[6].key] == {"auto": 1.0}

    def test_tables_fit_a_terminal_and_show_what_was_measured(self):
        text = rendered(report.tables(self.ROWS))
        assert "…" not in text
        (line,) = [line for line in text.splitlines() if "tq-k4v4" in line and "1.25" in line]
        assert line.split() == ["tq-k4v4", "3,400,000", "1,000.0", "2.00", "1.25", "1.0%", "20.0"]
        assert "TTFT" not in text

    def test_a_ratio_to_a_row_of_another_run_is_marked(self, tmp_path):
        (line,) = [line for line in rendered(report.tables(self.ROWS)).splitlines() if "vLLM int4" in line]
        assert "~0.25" in line.split()
        report.draw(self.ROWS, tmp_path / "engine.svg")
        svg = (tmp_path / "engine.svg").read_text()
        assert "~0.25x" in svg
        assert "~1.00x" not in svg

    def test_sessions_show_their_waiting_and_hits(self):
        measured = {"decode_tokens_per_second": None, "output_tokens_per_second": 70.0}
        waiting = {"median_ttft_seconds": 0.5, "cached_prompt_fraction": 0.9}
        rows = [
            fixture_row(cache, case="sessions 16x17000", **measured, **waiting)
            for cache in ("auto", "fp8", "int4_per_token_head")
        ]
        text = rendered(report.tables(rows))
        assert all(part in text for part in ("TTFT", "0.50", "cached", "90%"))
        assert "…" not in text

    def test_an_engine_that_cannot_hold_a_case_is_named(self):
        assert report.notes(self.ROWS) == ["llama-3.1-8b 32x32000: bf16 holds 1 of the 2 tokens"]

    def test_the_picture_has_a_bar_for_each_rate_and_ratios_to_what_could_hold_the_case(self, tmp_path):
        report.draw(self.ROWS, tmp_path / "engine.svg")
        svg = (tmp_path / "engine.svg").read_text()
        ElementTree.fromstring(svg)
        for text in (
            "llama-3.1-8b",
            "vllm-defaults",
            "8x32000",
            "32x32000, tokens/s (over fp8)",
            "2.00x",
            "1.60x",
        ):
            assert text in svg
        before = svg
        report.draw(self.ROWS, tmp_path / "engine.svg")
        assert (tmp_path / "engine.svg").read_text() == before

    def test_without_a_rate_there_is_no_picture(self, tmp_path):
        with pytest.raises(ValueError, match="no row has a rate"):
            report.draw([self.ROWS[3]], tmp_path / "engine.svg")
