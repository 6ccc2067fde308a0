"""Makes a plain checkout importable where nothing is installed: no links, no copies, no pip.

`apex_composer.triton_kernels` lies in the folder `triton_kernels` beside `apex_composer`; an
install maps the one to the other by `package-dir` in pyproject.toml. Here the repository's root is
appended to `apex_composer.__path__`, the list of folders in which Python looks for sub-packages,
so that `triton_kernels` in the root is found as `apex_composer.triton_kernels`.

    import checkout

    checkout.activate()
    from apex_composer import triton_kernels
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def activate() -> None:
    """Let `import apex_composer`, sub-packages included, find this checkout.

    Raises:
        RuntimeError: if another copy of the package is imported already.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import apex_composer

    found = Path(apex_composer.__file__).resolve().parent
    if found != ROOT / "apex_composer":
        raise RuntimeError(
            f"apex_composer is imported from {found}, this checkout is {ROOT}: results would be "
            "those of other code. Install the checkout (pip install -e .), or uninstall the other"
        )
    if str(ROOT) not in apex_composer.__path__:
        apex_composer.__path__.append(str(ROOT))
