"""Resolvers for `mlflow.yml`: `${km.…:}`."""

from __future__ import annotations

import random

_ADJECTIVES = (
    "amber bold brave brisk calm clever crisp daring eager fair fleet gentle golden grand keen "
    "kind lively lucky mellow mighty nimble noble placid proud quick quiet rapid silent sleek "
    "smooth steady sunny swift vivid wise witty"
).split()
_NOUNS = (
    "albatross auk cormorant crane curlew dipper dove eider falcon finch gannet goose grebe gull "
    "heron ibis kestrel kite lark loon merlin murre osprey owl penguin petrel plover puffin raven "
    "robin skua stork swan swift tern wren"
).split()


def random_name() -> str:
    """Return a run name as MLflow makes one, of an adjective, a noun and a number: `wise-owl-7`.

    For `custom_resolvers` in settings.py, under the name `km.random_name`.
    """
    chooser = random.SystemRandom()
    return f"{chooser.choice(_ADJECTIVES)}-{chooser.choice(_NOUNS)}-{chooser.randrange(1000)}"
