"""Keys of `rank_pattern` and `alpha_pattern`: what PEFT finds, and an end to every key."""

from __future__ import annotations

import random
import re
import time

import pytest
from peft.utils.other import get_pattern_key

from peft_composition.upstream import patterns
from peft_composition.upstream.patterns import PatternError, value_for


MODULE = "base.model.layers.0.self_attn.q_proj"


def as_peft(pattern: dict[str, int], module: str) -> int | None:
    return pattern.get(get_pattern_key(list(pattern), module))


@pytest.mark.parametrize(
    ("key", "module", "is_found"),
    [
        ("q_proj", MODULE, True),
        ("q_proj", "q_proj", True),
        ("proj", MODULE, False),
        ("self_attn.q_proj", MODULE, True),
        ("self_attn.q_proj", "self_attn_q_proj", True),  # a dot is any character
        (MODULE, MODULE, True),
        (re.escape(MODULE), MODULE, True),
        ("^" + re.escape(MODULE), MODULE, True),
        ("^q_proj", MODULE, False),
        ("^q_proj$", "q_proj", True),
        (r"layers\.[0-3]\.self_attn\.(q|v)_proj", MODULE, True),
        (r"layers\.[1-3]\.self_attn\.(q|v)_proj", MODULE, False),
        (r".*\.0\..*", MODULE, True),
        (r"(?:layers\.\d+\.)+?self_attn\.q_proj", MODULE, True),
        (r"(?P<kind>self)_\w{4}\.q_proj", MODULE, True),
        (r"q|q_proj|layers", MODULE, True),
        (r"\bq_proj", MODULE, True),
        ("", "lin.", True),
        ("{", "lin.{", True),
    ],
)
def test_keys_find_what_they_find_in_peft(key: str, module: str, is_found: bool) -> None:
    assert (as_peft({key: 8}, module) == 8) is is_found
    assert (value_for({key: 8}, module, None) == 8) is is_found


def test_the_first_key_that_matches_counts() -> None:
    keys = ["x_proj", ".*q.*", "q_proj", "(self|cross)_attn.q_proj", "attn_q_proj", MODULE]
    for start in range(len(keys)):
        pattern = {key: number for number, key in enumerate(keys[start:] + keys[:start])}
        assert value_for(pattern, MODULE, None) == as_peft(pattern, MODULE)


def test_a_key_that_does_not_match_itself_stands_for_the_module_of_that_name() -> None:
    assert value_for({"lin+": 3}, "lin+", None) == as_peft({"lin+": 3}, "lin+") == 3


def test_no_pattern_gives_the_default() -> None:
    assert value_for(None, MODULE, 4) == value_for({}, MODULE, 4) == value_for({"v_proj": 1}, MODULE, 4) == 4


def _expression(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.45:
        return draw.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "[a-c.]", "_", "{", "[]a]", r"\x61"])
    inner = _expression(draw, depth - 1)
    if kind < 0.6:
        return inner + _expression(draw, depth - 1)
    if kind < 0.75:
        return f"({inner}|{_expression(draw, depth - 1)})"
    if kind < 0.95:
        return f"{draw.choice(['(', '(?:'])}{inner}){draw.choice(['*', '+', '?', '{2}', '{,2}', '{1,}', '*?', '??'])}"
    return draw.choice(["^", "$", r"\b", r"\B"]) + inner


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_random_expressions_find_what_they_find_in_peft() -> None:
    draw = random.Random(0)
    found = 0
    for _ in range(2000):
        pattern = {_expression(draw, 3): number for number in range(2)}
        module = "".join(draw.choice("ab._0") for _ in range(draw.randrange(9)))
        expected = as_peft(pattern, module)
        assert value_for(pattern, module, None) == expected, (pattern, module)
        found += expected is not None
    assert found > 200


# The first eight hang PEFT and `re`.
ENDLESS = [
    r"(([\w.])+)+!",
    r"(.*)*!",
    r"(a|a)*b|(\w|\w|\.)*!",
    r"(.*?,){30}P",
    r"(\w+\.?)+x!",
    r"((((.*)*)*)*)*!",
    r"(?:(?:(?:\w\w?)*\w?)*\w?)*!",
    r"(?:[\w.]{1,9000}){1,9000}!",
    r"((a{1000}){1000}){1000}",
    "(?:a?){64}" * 50,
    "a|" * 450 + "b",
]


@pytest.mark.parametrize("key", ENDLESS, ids=lambda key: key[:20])
def test_expressions_that_never_end_end(key: str) -> None:
    start = time.process_time()
    assert value_for({key: 8}, MODULE * 5, 4) == 4
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("(" * 30 + ".?" + ")*" * 30, "takes too long to match with module 'base.model"),
        ("(" * 20 + r"[\w.]" + "{1,900})" * 20 + "!", "takes too long to match with module 'base.model"),
        ("(" * 400 + "a" + ")" * 400, "not supported from character 52 on"),
        ("*.q_proj", "is not a regular expression: nothing to repeat"),
        ("(q_proj", "is not a regular expression: missing )"),
        ("[", "is not a regular expression: unterminated character set"),
        ("a)|(b", "is not a regular expression: unbalanced parenthesis"),
        ("(?=q)q_proj", "not supported from character 1 on"),
        (r"(q)\1", r"not supported from character 4 on"),
        ("q++", "not supported from character 4 on"),
        ("x" * 1001, "is longer than 1000 characters"),
    ],
    ids=lambda value: value[:20],
)
def test_keys_that_are_refused(key: str, message: str) -> None:
    start = time.process_time()
    for _ in range(2):  # the second time, what is cached
        with pytest.raises(PatternError, match=re.escape(message)) as caught:
            value_for({key: 8}, MODULE * 5, 4)
        assert len(str(caught.value)) < 800
    assert time.process_time() - start < 10


def test_many_keys_and_modules_are_quick() -> None:
    """PEFT compiles more than 512 keys anew for every module."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.gate_proj" for layer in range(20) for expert in range(150)]
    pattern = {name: 8 + number for number, name in enumerate(names)}
    start = time.process_time()
    for name in names:
        assert value_for(pattern, f"base_model.{name}", None) == pattern[name]
    assert time.process_time() - start < 5


def test_too_many_expressions() -> None:
    with pytest.raises(PatternError, match="more than 1000 of its keys are regular expressions"):
        value_for({f"x{number}*": 1 for number in range(patterns.MAX_EXPRESSIONS + 1)}, MODULE, None)


def test_all_keys_together_end() -> None:
    """Each key is short of the limit for one."""
    hard = {f"({'(' * 13}.?{')*' * 13}){{{number}}}!": 8 for number in range(1, 400)}
    assert value_for({next(iter(hard)): 8}, MODULE, 4) == 4
    start = time.process_time()
    with pytest.raises(PatternError, match="takes too long to match"):
        value_for(hard, MODULE, 4)
    assert time.process_time() - start < 30
