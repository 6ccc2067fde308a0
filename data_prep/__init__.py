"""From RedPajama-format text to the MDS token shards that llm-foundry's `text` dataloader streams.

Importing this package imports neither torch nor any other part of apex_composer.
"""

from apex_composer.data_prep.embedded import write_embedded_corpus
from apex_composer.data_prep.preparation import is_prepared, prepare

__all__ = ["is_prepared", "prepare", "write_embedded_corpus"]
