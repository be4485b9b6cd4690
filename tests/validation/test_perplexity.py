from __future__ import annotations

import numpy as np
import pytest

from validation.perplexity import Window, default_tokens, make_windows, score, shares

TEXT = np.arange(100, 111)  # 11 tokens


def pairs(windows: list[Window]) -> list[tuple[list[int], list[int]]]:
    return [(window.inputs.tolist(), window.targets.tolist()) for window in windows]


def test_windows_without_bos_slide_by_half_and_score_every_token_but_the_first_once() -> None:
    assert pairs(make_windows(TEXT, 10, 4, None)) == [
        ([100, 101, 102, 103], [101, 102, 103, 104]),
        ([102, 103, 104, 105], [105, 106]),
        ([104, 105, 106, 107], [107, 108]),
        ([106, 107, 108, 109], [109, 110]),
    ]


def test_windows_with_bos_start_with_it_and_score_every_token_once() -> None:
    windows = make_windows(TEXT, 11, 4, 1)
    assert pairs(windows)[:3] == [
        ([1, 100, 101, 102], [100, 101, 102, 103]),
        ([1, 102, 103, 104], [104, 105]),
        ([1, 104, 105, 106], [106, 107]),
    ]
    assert np.concatenate([window.targets for window in windows]).tolist() == TEXT.tolist()


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("scored", [2, 511, 512, 513, 1024, 1700])
def test_every_scored_token_but_those_of_the_first_window_has_half_a_window_before_it(scored: int, bos: int | None) -> None:
    text = np.arange(2, 2000)
    windows = make_windows(text, scored, 512, bos)
    assert sum(len(window.targets) for window in windows) == scored
    assert max(len(window.inputs) for window in windows) <= 512
    for window in windows[1:]:
        read = len(window.inputs) - len(window.targets)
        assert read >= 256
        assert (window.inputs[1:] + 1)[-len(window.targets) :].tolist() == window.targets.tolist()


def test_make_windows_leaves_the_text_alone_and_says_whose_they_are() -> None:
    assert {window.text for window in make_windows(TEXT, 10, 4, 1, 3)} == {3}
    assert TEXT.tolist() == list(range(100, 111))


def test_score_takes_windows_in_order_and_compares_with_the_reference() -> None:
    windows = [Window(np.array([0]), np.array([1])), Window(np.array([0, 0]), np.array([0, 1]))]
    even = [np.zeros((1, 2)), np.zeros((2, 2))]
    skewed = [np.array([[0.0, np.log(3)]]), np.array([[0.0, 0.0], [1.0, 0.0]])]
    scores = score(windows, skewed.__getitem__, even.__getitem__)
    assert scores.nll[:2] == pytest.approx([-np.log(0.75), np.log(2)])
    assert scores.kl[0] > 0.1
    assert scores.kl[1] == pytest.approx(0)
    itself = score(windows, even.__getitem__)
    assert (itself.kl.tolist(), itself.best.tolist(), itself.shared.tolist()) == ([0] * 3, [1] * 3, [1] * 3)


def test_score_leaves_out_what_a_window_only_reads() -> None:
    window = Window(np.array([0, 0, 0]), np.array([1]))
    logits = np.array([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    whole, last = score([window], lambda _: logits), score([window], lambda _: logits[-1:])
    assert whole.nll.tolist() == last.nll.tolist() == pytest.approx([np.log(2)])


def test_the_best_token_and_the_five_best_are_told_apart() -> None:
    reference = np.array([[6.0, 5, 4, 3, 2, 1]] * 3)
    ours = np.array([[9.0, 4, 5, 2, 3, 0], [1, 2, 3, 4, 5.0, 0], [0, 1, 2, 3, 4, 9.0]])
    scores = score([Window(np.zeros(3, np.int64), np.zeros(3, np.int64))], lambda _: ours, lambda _: reference)
    assert scores.best.tolist() == [1, 0, 0]
    assert scores.shared.tolist() == pytest.approx([1, 1, 0.8])


def test_tokens_are_shared_by_the_texts() -> None:
    assert [default_tokens(texts) for texts in (1, 2, 3)] == [2048, 2048, 3072]
    assert shares(2049, 2) == [1025, 1024]
    assert shares(300, 1) == [300]
