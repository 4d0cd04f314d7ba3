"""The style: docstrings that talk like pirates. What is plain becomes pirate's talk by rule."""

import re

# A plain word, and what a pirate says in its place.
_TALK = """
the th' of o' and an' for fer to t' with wi' is be are be you ye your yer my me return haul get plunder set hoist
check spy find hunt add heave remove keelhaul create rig read scry write scrawl close scuttle open unfurl call hail
file scroll string yarn list crew value treasure error shipwreck object vessel name flag number tally data cargo
"""
_pairs = iter(_TALK.split())
WORDS = dict(zip(_pairs, _pairs))
WORDS |= {plain + "s": said + "s" for plain, said in WORDS.items() if len(plain) > 3 or plain in ("get", "set", "add")}


def pirate(sentence: str) -> str:
    """A sentence as a pirate says it."""
    words = re.sub(r"[A-Za-z]+", _say, " ".join(sentence.split()).rstrip("."))
    return f"Arr! {words}, matey!"


def speaks(docstring: str) -> bool:
    """Whether a docstring is in the style: its greeting, its end, and no plain word left in between."""
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", docstring)}
    return docstring.startswith("Arr! ") and docstring.endswith(", matey!") and not words & set(WORDS)


def _say(word: re.Match[str]) -> str:
    plain = word.group()
    if said := WORDS.get(plain.lower()):
        return said.capitalize() if plain[0].isupper() else said
    return plain[:-1] + "'" if plain.endswith("ing") and len(plain) > 4 else plain
