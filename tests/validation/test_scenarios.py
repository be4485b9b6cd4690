from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.presets import preset
from validation.scenarios import Scenario, make_scenarios, scenario_lengths, split_sequences, tokens_needed


@pytest.fixture
def scenarios(config: LlamaConfig) -> dict[str, Scenario]:
    long = replace(config, max_position_embeddings=4096)
    main, short = split_sequences(long, np.arange(1, tokens_needed(long) + 1), None)
    return {scenario.name: scenario for scenario in make_scenarios(long, main, short)}


def test_scenarios_are_those_of_the_design(scenarios: dict[str, Scenario]) -> None:
    assert scenarios["prefill"].chunks == (320,)
    assert scenarios["decode"].chunks == (256, *[1] * 64)
    assert scenarios["chunked"].chunks == (100, 156, 64)
    assert scenarios["padded"].chunks == (256, *[1] * 8)
    assert scenarios["padded"].pads == (0, 104)


def test_scenarios_of_a_large_model_are_shorter_and_prefill_is_not_below_256() -> None:
    large = preset("7b")
    main, short = split_sequences(large, np.arange(1, tokens_needed(large) + 1), None)
    scenarios = {scenario.name: scenario for scenario in make_scenarios(large, main, short)}
    assert scenarios["prefill"].chunks == (256,)
    assert scenarios["decode"].chunks == (192, *[1] * 64)
    assert scenarios["chunked"].chunks == (80, 124, 52)
    assert scenarios["padded"].chunks == (96, *[1] * 8)
    assert scenarios["padded"].pads == (0, 39)


@pytest.mark.parametrize("name", ["prefill", "decode", "chunked", "padded"])
def test_turns_bring_every_token_once_in_order(name: str, scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios[name]
    turns = list(scenario.turns())
    assert tuple(turn.width for turn in turns) == scenario.chunks
    for row, tokens in enumerate(scenario.rows):
        assert np.concatenate([turn.new[row] for turn in turns]).tolist() == tokens.tolist()
        assert [turn.past[row] for turn in turns] == [0, *np.cumsum([len(turn.new[row]) for turn in turns])[:-1]]


def test_last_positions_are_what_an_engine_graph_gathers(scenarios: dict[str, Scenario]) -> None:
    assert scenarios["chunked"].last_positions(0).tolist() == [99, 255, 319]
    assert scenarios["padded"].last_positions(1).tolist() == [151, 152, 153, 154, 155, 156, 157, 158, 159]


def test_last_positions_leave_out_calls_that_are_all_padding() -> None:
    scenario = Scenario("x", (np.arange(6), np.arange(2)), (0, 1), (3, 3))
    assert scenario.last_positions(1).tolist() == [1]


def test_parts_are_each_rows_prompt_chunks_and_steps(scenarios: dict[str, Scenario]) -> None:
    parts = {part.where: part.positions for scenario in scenarios.values() for part in scenario.parts()}
    spans = {where: (int(positions[0]), int(positions[-1])) for where, positions in parts.items()}
    assert spans == {
        "prefill, prompt": (0, 319),
        "decode, prompt": (0, 255),
        "decode, steps": (256, 319),
        "chunked, prompt": (0, 99),
        "chunked, chunk 2": (100, 255),
        "chunked, chunk 3": (256, 319),
        "padded, row 0, prompt": (0, 255),
        "padded, row 0, steps": (256, 263),
        "padded, row 1, prompt": (0, 151),
        "padded, row 1, steps": (152, 159),
    }
    assert all((np.diff(positions) == 1).all() for positions in parts.values())


def test_parts_cover_every_real_position_once_and_leave_out_what_is_padding() -> None:
    scenario = Scenario("x", (np.arange(7), np.arange(2)), (0, 1), (3, 3, 1))
    covered = [(part.row, position) for part in scenario.parts() for position in part.positions.tolist()]
    assert sorted(covered) == [(0, position) for position in range(7)] + [(1, 0), (1, 1)]
    assert [part.name for part in scenario.parts() if part.row == 1] == ["chunk 2", "steps"]


def test_means_of_one_row_are_of_what_came_from_a_cache(scenarios: dict[str, Scenario]) -> None:
    new = {name: int(sum(scenario.is_new(np.arange(len(row))).sum() for row in scenario.rows)) for name, scenario in scenarios.items()}
    assert new == {"prefill": 320, "decode": 64, "chunked": 220, "padded": 264 + 160}


@pytest.mark.parametrize("maximum", [20, 33, 96, 319])
def test_scenarios_shrink_to_a_short_model(maximum: int, config: LlamaConfig) -> None:
    short = replace(config, max_position_embeddings=maximum)
    sequences = split_sequences(short, np.arange(tokens_needed(short)), None)
    for scenario in make_scenarios(short, *sequences):
        assert sum(scenario.chunks) == scenario.width <= maximum
        assert min(scenario.chunks) > 0
    assert scenario_lengths(short)["prompt"] < maximum


def test_scenario_lengths_refuse_a_model_too_short(config: LlamaConfig) -> None:
    with pytest.raises(ValidationError, match="max_position_embeddings is 19"):
        scenario_lengths(replace(config, max_position_embeddings=19))


def test_sequences_start_with_bos_and_keep_their_length(config: LlamaConfig) -> None:
    tokens = np.arange(10, 10 + tokens_needed(config))
    plain, with_bos = split_sequences(config, tokens, None), split_sequences(config, tokens, 1)
    for ours, theirs in zip(with_bos, plain, strict=True):
        assert ours[0] == 1
        assert ours[1:].tolist() == theirs[:-1].tolist()
