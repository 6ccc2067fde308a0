"""From RedPajama-format text to the MDS token shards that llm-foundry's `text` dataloader streams.

Importing this package imports neither torch nor any other part of apex_composer but
`extras`, and nothing that the core does not have: `prep` and `remote` are needed by those who call.
"""

from apex_composer.data_prep.dry_run import estimate_preparation
from apex_composer.data_prep.instruct.options import InstructOptions
from apex_composer.data_prep.instruct.preparation import prepare_instruct
from apex_composer.data_prep.instruct.verify import verify_instruct
from apex_composer.data_prep.options import Options
from apex_composer.data_prep.preparation import merge, prepare
from apex_composer.data_prep.write.manifest import check_manifest, read_manifest
from apex_composer.data_prep.write.upload import upload
from apex_composer.data_prep.write.verify import verify

__all__ = [
    "InstructOptions",
    "Options",
    "check_manifest",
    "estimate_preparation",
    "merge",
    "prepare",
    "prepare_instruct",
    "read_manifest",
    "upload",
    "verify",
    "verify_instruct",
]
