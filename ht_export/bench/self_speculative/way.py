"""Self-speculative decoding as a way of answering prompts, by the engine's own passes and loop."""

from __future__ import annotations

from ht_export.bench.self_speculative.draft_model import DraftModel
from ht_export.bench.self_speculative.source import SelfDrafts
from ht_export.bench.settings import SELF_SPECULATIVE, BenchSettings
from ht_export.bench.ways import Way, decoder, gap_of, is_exact
from ht_export.model.blocks import SkippedBlocks, read_skipped_blocks
from runtime.generator import Generator
from runtime.tree import TreeSizes


def self_speculative_way(settings: BenchSettings, generator: Generator) -> Way:
    """Return the way, in an engine of its own, opened from the file of `generator`. Raises `InputError` for a file of
    blocks that is not for its model, and for an engine that cannot leave blocks out.
    """
    assert settings.self_speculative is not None
    skipped = read_skipped_blocks(settings.self_speculative, generator.about.base_model)
    drafting = self_speculating(settings, skipped)
    # All rows are for the chain and none for transfer layers.
    tree = TreeSizes(1 + skipped.draft_tokens, (0,) * generator.about.dims.num_steps)
    answer = decoder(drafting, settings, tree=tree, ngrams=False)
    return Way(SELF_SPECULATIVE, answer, gap_of(generator), is_exact(generator))


def self_speculating(settings: BenchSettings, skipped: SkippedBlocks) -> Generator:
    """Return the engine with a draft model beside it, which drafts every text."""
    generator = Generator(
        settings.engine, device=settings.device, threads=settings.threads, prefix_cache_bytes=0, adapt=False
    )
    model = DraftModel(settings.engine, generator.engine, skipped.blocks, settings.threads)
    generator.add_draft_source(lambda: SelfDrafts(model, skipped.draft_tokens, skipped.confidence))
    return generator
