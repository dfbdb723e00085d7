"""Clock: exclusive sections that add up to the time that passed."""

import time

import pytest

from kd.clock import Clock


def test_nothing_measured_is_an_empty_answer() -> None:
    assert Clock().read() == {}


def test_an_inner_section_pauses_the_outer_one() -> None:
    clock, began = Clock(), time.perf_counter()
    with clock.section("outer"):
        time.sleep(0.02)
        with clock.section("inner"):
            time.sleep(0.04)
        time.sleep(0.02)
    passed, spent = time.perf_counter() - began, clock.read()
    assert spent.keys() == {"outer", "inner"}
    assert spent["outer"] >= 0.04
    assert spent["inner"] >= 0.04
    assert sum(spent.values()) == pytest.approx(passed, abs=5e-3)
    assert sum(spent.values()) <= passed


def test_time_between_sections_is_nobodys_and_equal_names_add_up() -> None:
    clock = Clock()
    began = time.perf_counter()
    for _ in range(2):
        with clock.section("a"):
            time.sleep(0.01)
        time.sleep(0.05)
    passed, spent = time.perf_counter() - began, clock.read()
    assert spent.keys() == {"a"}
    assert 0.02 <= spent["a"] <= passed - 0.1


def test_reading_begins_anew_and_a_raising_section_is_closed() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock.section("a"):
        raise KeyError
    assert clock.read().keys() == {"a"}
    assert clock.read() == {}
    with clock.section("b"):
        pass
    assert clock.read().keys() == {"b"}
