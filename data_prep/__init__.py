"""From RedPajama-format text to the MDS token shards that llm-foundry's `text` dataloader streams.

Importing this package imports neither torch nor any other part of apex_composer.
"""

from apex_composer.data_prep.dry_run import estimate_preparation
from apex_composer.data_prep.embedded import write_embedded_corpus
from apex_composer.data_prep.from_scratch import is_prepared, prepare_from_scratch
from apex_composer.data_prep.manifest import check_manifest, read_manifest
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.preparation import merge, prepare
from apex_composer.data_prep.upload import upload
from apex_composer.data_prep.verify import verify

__all__ = [
    "Options",
    "check_manifest",
    "estimate_preparation",
    "is_prepared",
    "merge",
    "prepare",
    "prepare_from_scratch",
    "read_manifest",
    "upload",
    "verify",
    "write_embedded_corpus",
]
