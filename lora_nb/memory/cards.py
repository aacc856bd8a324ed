"""What cards hold, as `nvidia-smi` and `rocm-smi` give their total, in MiB. State of November 2026."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_nb.errors import ConfigError, nearest

AS_OF = "2026-11"


@dataclass(frozen=True)
class Card:
    """A GPU: its name, bytes in total, and whether it is sold to consumers or for data centres."""

    name: str
    mib: int
    market: Literal["consumer", "workstation", "data centre"]

    @property
    def bytes(self) -> int:
        return self.mib * 2**20


CARDS = {
    card.name: card
    for card in (
        Card("RTX 4060", 8188, "consumer"),
        Card("RTX 3080", 10240, "consumer"),
        Card("RTX 3060", 12288, "consumer"),
        Card("RTX 4070", 12282, "consumer"),
        Card("RTX 4060 Ti 16GB", 16380, "consumer"),
        Card("RTX 4080", 16376, "consumer"),
        Card("RTX 5080", 16303, "consumer"),
        Card("RTX 3090", 24576, "consumer"),
        Card("RTX 4090", 24564, "consumer"),
        Card("RTX 5090", 32607, "consumer"),
        Card("RTX A6000", 49140, "workstation"),
        Card("RTX 6000 Ada", 49140, "workstation"),
        Card("RTX PRO 6000", 97887, "workstation"),
        Card("T4", 15360, "data centre"),
        Card("V100 16GB", 16160, "data centre"),
        Card("V100 32GB", 32510, "data centre"),
        Card("A10G", 23028, "data centre"),
        Card("L4", 23034, "data centre"),
        Card("A40", 46068, "data centre"),
        Card("L40S", 46068, "data centre"),
        Card("A100 40GB", 40960, "data centre"),
        Card("A100 80GB", 81920, "data centre"),
        Card("H100 80GB", 81559, "data centre"),
        Card("H200", 143771, "data centre"),
        Card("B200", 183359, "data centre"),
        Card("MI300X", 196592, "data centre"),
    )
}


def card(name: str | Card) -> Card:
    """The card of that name, whatever the case, spaces and dashes.

    Raises:
        ConfigError: there is none; with the nearest.
    """
    if isinstance(name, Card):
        return name
    by_key = {_key(known): found for known, found in CARDS.items()}
    hits = [found for key, found in by_key.items() if _key(str(name)) in key]
    if _key(str(name)) in by_key:
        return by_key[_key(str(name))]
    if len(hits) == 1:
        return hits[0]
    raise ConfigError(
        f"There is no card {name!r} in the table of {AS_OF}; a Card(name, mib, market) of your own is taken as well."
        + nearest(str(name), CARDS)
    )


def _key(name: str) -> str:
    return "".join(ch for ch in name.lower() if ch.isalnum()).removeprefix("nvidia").removeprefix("geforce")
