"""How the random cases are dealt out and told, with a check in place of the kernels'."""

import fuzz
import pytest
import torch
from cases import all_variants


@pytest.fixture
def drawn(monkeypatch):
    """What the check drew, by variant, in place of running kernels; it fails for small numbers."""
    drawn = {}

    def check(variant, draw, device, budget):
        number = draw.random() + float(torch.rand(()))
        drawn.setdefault(str(variant), []).append(number)
        if number < 0.2:
            raise ValueError("too small\nand more")
        return number

    monkeypatch.setattr(fuzz, "check", check)
    monkeypatch.setattr(fuzz, "_warm", lambda variant, device: None)
    return drawn


def run(**options):
    return fuzz.run(**{"seed": 5, "device": torch.device("cpu"), "processes": 1, "tell": list} | options)


def test_every_variant_takes_its_share_of_the_cases(drawn):
    reports = run(cases=325)
    assert [report.cases for report in reports] == [5] * 65
    assert drawn.keys() == {str(variant) for variant in all_variants()}
    assert len({number for numbers in drawn.values() for number in numbers}) == 325


def test_a_failure_names_the_case_that_draws_the_same_again(drawn):
    failing = [report for report in run(cases=325) if report.failures]
    assert failing
    first = failing[0].failures[0]
    assert first.endswith(f"{failing[0].name}: ValueError: too small")
    case = int(first.split(":")[0].removeprefix("seed 5 case "))
    before = drawn[failing[0].name][case // 65]
    drawn.clear()
    (again,) = run(only=case)
    assert again.failures == [first]
    assert drawn == {again.name: [before]}


def test_the_largest_error_is_kept_and_no_case_begins_late(drawn):
    report = run(cases=650)[7]
    assert report.worst_error == max(drawn[report.name])
    assert sum(report.cases for report in run(cases=650, seconds=-1)) == 0
