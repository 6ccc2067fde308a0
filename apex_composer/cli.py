"""The command `apex-composer`: one name for the jobs that this package brings.

Their commands import torch, Composer and llm-foundry only when they run, so that
`apex-composer --help` waits for none of them.
"""

import typer

from apex_composer.compare.__main__ import app as compare
from apex_composer.data_prep.__main__ import app as data_prep
from apex_composer.demo.__main__ import app as demo
from apex_composer.evaluate.command import app as evaluate
from apex_composer.observe.command import app as observe
from apex_composer.report.command import app as report
from apex_composer.tools.commands import app as tools
from apex_composer.tools.merge_command import app as merge

app = typer.Typer(
    name="apex-composer",
    help="APEX training of language models on Composer: jobs around the algorithm.",
    no_args_is_help=True,
    add_completion=False,
)
for commands in (demo, compare, data_prep, tools, merge, evaluate, observe, report):
    app.add_typer(commands)

if __name__ == "__main__":
    app()
