"""Every random number, from (seed, round, client, step)."""

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """
    Seed in `[0, 2**63)` that depends on `seed` and `parts` alone, never on what was drawn before.

    SHA-256 keeps neighbouring rounds and clients independent, which `seed + round_index` would not.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
