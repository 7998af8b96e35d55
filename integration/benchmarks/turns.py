"""How the graphs of one loop are timed against each other: in turn, by a few steps each.

A graph's steps are up to a tenth slower for as long as its session lives, by where its weights came to lie in memory,
and a machine's mood changes within seconds. So a round opens every graph anew, and then lets all of them generate side
by side: a block of steps of one, a block of the next, forwards and backwards. What hits one block hits its neighbours,
and what a session is born with differs from round to round. The first prefill of a turn and the first steps of a block
are not counted: threads of the graph before still spin, and the weights come from memory again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Protocol

from tqdm.auto import tqdm

BLOCK, WARM_UP = 16, 5  # steps
_PREFILLS = 3  # of a round
Turn = tuple[float, float]  # seconds of the prefill, seconds of one decoding step


class Player(Protocol):
    """A graph that one round has opened."""

    def prefill(self) -> float:
        """Read the prompt, as often as it is called; seconds."""

    def steps(self, count: int) -> list[float]:
        """The next steps of one generation behind the prompt; seconds of each."""

    def close(self) -> None:
        """Give up what it holds."""


@dataclass
class Row:
    """One graph in one loop: tokens per second, ratios to the loop's first graph, share of what the machine reads."""

    graph: str
    loop: str
    megabytes: float
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    bandwidth: float


def take_turns(loop: str, opened: Mapping[str, Callable[[], Player]], rounds: int, new: int) -> dict[str, list[Turn]]:
    """Seconds of every graph in every round, medians within the round.

    Args:
        opened: opens a graph, by name; all are open at once.
        new: tokens that each generates in a round, in whole blocks.
    """
    found: dict[str, list[Turn]] = {name: [] for name in opened}
    for number in tqdm(range(rounds), desc=loop):
        order = list(opened)[:: 1 if number % 2 == 0 else -1]
        players = {name: opened[name]() for name in order}
        prefills: dict[str, list[float]] = {name: [] for name in order}
        steps: dict[str, list[float]] = {name: [] for name in order}
        for turn in range(_PREFILLS):
            for name in order[:: 1 if turn % 2 == 0 else -1]:
                players[name].prefill()
                prefills[name].append(players[name].prefill())
        for turn in range(new // BLOCK):
            for name in order[:: 1 if turn % 2 == 0 else -1]:
                steps[name] += players[name].steps(BLOCK)[WARM_UP:]
        for name, player in players.items():
            player.close()
            found[name].append((median(prefills[name]), median(steps[name])))
    return found


def rows_of(
    loop: str,
    sizes: Mapping[str, int],
    found: Mapping[str, list[Turn]],
    prompt: int,
    bandwidth: float,
    unread: Mapping[str, int] = MappingProxyType({}),
) -> list[Row]:
    """Median speeds, and the medians of the ratios to the first graph in the same round.

    Args:
        sizes: bytes of each graph.
        prompt: tokens of the prompt.
        bandwidth: bytes per second that the machine reads.
        unread: bytes of `sizes` that no step reads.
    """
    rows, first = [], next(iter(found.values()))
    for name, turns in found.items():
        prefill, decode = (median(seconds) for seconds in zip(*turns, strict=True))
        ratios = [[theirs[i] / ours[i] for ours, theirs in zip(turns, first, strict=True)] for i in (0, 1)]
        rows.append(
            Row(
                graph=name,
                loop=loop,
                megabytes=sizes[name] / 1e6,
                prefill=prompt / prefill,
                decode=1 / decode,
                prefill_ratio=median(ratios[0]),
                decode_ratio=median(ratios[1]),
                bandwidth=(sizes[name] - unread.get(name, 0)) / decode / bandwidth,
            )
        )
    return rows
