from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runtime import Generator

if TYPE_CHECKING:
    from tests.runtime.serving.live import Live
    from tests.runtime.serving.tools import Models


@pytest.fixture(scope="session")
def generator(tiny_engine: Path) -> Iterator[Generator]:
    with Generator(tiny_engine, threads=1, adapt=False, max_queue=64) as generator:
        yield generator


@pytest.fixture(scope="session")
def live(generator: Generator) -> Iterator[Live]:
    from tests.runtime.serving.live import Live

    server = Live(generator)
    yield server
    server.close()


@pytest.fixture
def serve(generator: Generator, tiny_engine: Path) -> Iterator[Callable[..., Live]]:
    """Starts servers with these settings, on a generator of their own where it has `options`."""
    from runtime.serving import Settings
    from tests.runtime.serving.live import Live

    started: list[Live] = []
    made: list[Generator] = []

    def start(options: dict[str, Any] | None = None, **settings: Any) -> Live:
        if options is not None:
            made.append(Generator(tiny_engine, threads=1, adapt=False, **options))
        started.append(Live(made[-1] if options is not None else generator, Settings(warm_up=False, **settings)))
        return started[-1]

    yield start
    for one in started:
        one.close()
    for other in made:
        other.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    from runtime.serving import Settings
    from tests.runtime.serving.live import Live
    from tests.runtime.serving.tools import KINDS
    from tests.runtime.tools.speaking import Speaking

    made: Models = {}
    for kind, (template, special) in KINDS.items():
        speaking = Speaking(tmp_path_factory.mktemp(kind), template, special)
        made[kind] = speaking, Live(speaking.generator, Settings(warm_up=False))
    yield made
    for speaking, live in made.values():
        live.close()
        speaking.generator.close()
