"""The merges of a SentencePiece BPE, which stores pieces with scores where Hugging Face's tokenizers want a list of merges."""

from __future__ import annotations

from collections.abc import Mapping


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first.

    SentencePiece joins the two neighbours whose union has the highest score; a list of merges in order of that score does the same.

    Args:
        scores: the normal pieces (no control, byte or user-defined ones) in order of their ids; higher is joined earlier.

    Returns:
        (left, right) pairs; those of one piece follow each other, the pair of earlier ids first.

    Source: SentencePiece, arXiv:1808.06226; its BPE model in src/bpe_model.cc.
    """
    ids = {piece: index for index, piece in enumerate(scores)}
    merges = [(piece, piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
    merges.sort(key=lambda merge: (-scores[merge[0]], ids[merge[0]], ids[merge[1]], ids[merge[2]]))
    return [(left, right) for _, left, right in merges]
