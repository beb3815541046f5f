"""Loops told from text that repeats by itself: real English, code, Chinese, Japanese and Korean, and tables.

Each kind's text is cut into pieces of 256 ids by a tokenizer trained on all of them. A check holds 16 pieces against 16
others of the same kind, as the detector holds what was generated against the targets; loops are made of the same texts.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from sidestep.worker.detectors.repetition import MAX_PERIOD, is_looping, is_nearly_looping
from sidestep.worker.detectors.settings import DetectorSettings

PIECE_TOKENS = 256
_CHECK_PIECES = 16
_MOST_PIECES = 128
_VOCABULARY = 4_000
_CHARACTERS = 250_000
_PREFIX_TOKENS = 40
_SEED = 5
_MODULES = ("argparse.py", "ast.py", "decimal.py", "inspect.py", "typing.py", "tarfile.py", "zipfile.py")


def materials() -> dict[str, str]:
    """Return kind to text; what a system does not have is not among them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [file.read_text(encoding="utf-8") for file in (library / name for name in _MODULES) if file.is_file()]
    east = sorted((library / "test" / "cjkencodings").glob("*-utf8.txt"))
    found = {
        "english": " ".join(topics[name] for name in sorted(topics)),
        "code": "\n".join(code),
        "cjk": "\n".join(file.read_text(encoding="utf-8") for file in east),
        "tables": "\n".join(_table(np.random.default_rng([_SEED, number])) for number in range(200)),
        "json": json.dumps([{"id": number, "name": f"item {number}", "value": number**2} for number in range(4_000)]),
    }
    return {kind: text[:_CHARACTERS] for kind, text in found.items() if text}


def _table(rng: np.random.Generator) -> str:
    """Return a table of numbers and words in Markdown."""
    words = ("north", "south", "east", "west", "total", "open", "closed", "n/a")
    rows = [
        f"| {int(rng.integers(10_000))} | {words[int(rng.integers(len(words)))]} | {rng.random():.2f} |"
        for _ in range(int(rng.integers(8, 30)))
    ]
    return "\n".join(["| count | state | share |", "| --- | --- | --- |", *rows])


def pieces_of(texts: dict[str, str]) -> dict[str, list[list[int]]]:
    """Return each kind's pieces of 256 ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=_VOCABULARY, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(list(texts.values()), trainer=trainer)
    found = {}
    for kind, text in texts.items():
        ids = tokenizer.encode(text).ids
        starts = range(0, len(ids) - PIECE_TOKENS + 1, PIECE_TOKENS)
        found[kind] = [ids[start : start + PIECE_TOKENS] for start in starts][:_MOST_PIECES]
    return found


def _share(judged: Sequence[bool]) -> float:
    return sum(judged) / len(judged)


def _checks(pieces: Sequence[list[int]]) -> Iterator[float]:
    """Yield the detector's value of each check: 16 pieces as if generated, against 16 others as their targets."""
    order = np.random.default_rng(_SEED).permutation(len(pieces)).tolist()
    mixed = [pieces[place] for place in order]
    size = min(_CHECK_PIECES, len(mixed) // 2)
    groups = [mixed[first : first + size] for first in range(0, len(mixed) - size + 1, size)]
    for generated, targets in zip(groups, [*groups[1:], *groups[:1]], strict=True):
        exact = _share([*map(is_looping, generated)]) - _share([*map(is_looping, targets)])
        near = _share([*map(is_nearly_looping, generated)]) - _share([*map(is_nearly_looping, targets)])
        yield max(exact, near)


def judge_repetition() -> dict[str, Any]:
    """Return false alarms by kind, and the share of loops found by period."""
    threshold = DetectorSettings().gen_repetition.threshold
    pieces = pieces_of(materials())
    kinds = {}
    for kind, own in pieces.items():
        values = list(_checks(own))
        kinds[kind] = {
            "pieces": len(own),
            "exact_share": round(_share([*map(is_looping, own)]), 4),
            "near_share": round(_share([*map(is_nearly_looping, own)]), 4),
            "checks": len(values),
            "false_checks": sum(value > threshold for value in values),
        }
    loops = [
        is_looping([*own[0][:_PREFIX_TOKENS], *_loop(own[1], period)][:PIECE_TOKENS])
        for own in pieces.values()
        for period in range(1, MAX_PERIOD + 1)
        if len(own) > 1
    ]
    return {"kinds": kinds, "loops": len(loops), "loops_found": sum(loops)}


def _loop(piece: Sequence[int], period: int) -> list[int]:
    return list(piece[:period]) * (PIECE_TOKENS // period + 1)
