"""What is installed: versions, extras, and whether torch is built for this machine's GPUs."""

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from apex_composer.extras import EXTRAS, installation, missing_packages
from apex_composer.tools.finding import Finding
from apex_composer.tools.torch_build import runs_as, which_build

# Among what they ask for are all that changes a run: torch has triton and CUDA's libraries,
# transformers tokenizers.
_ASKING = ("apex-composer", "llm-foundry", "torch", "transformers")


def check_versions() -> Iterator[Finding]:
    """Installed packages against the versions that those which compute ask for.

    What an extra asks for counts where the extra is there.
    """
    from packaging.requirements import Requirement

    wrong = []
    asking = [name for name in _ASKING if installed_version(name)]
    extras = ["", *(extra for extra in EXTRAS if not missing_packages(extra))]
    for package in asking:
        wanted = map(Requirement, requires(package) or ())
        environments = [{"extra": extra} for extra in (extras if package == _ASKING[0] else [""])]
        for one in wanted:
            if one.marker and not any(map(one.marker.evaluate, environments)):
                continue
            found = installed_version(one.name)
            if found is None or not one.specifier.contains(found, prereleases=True):
                wrong.append(f"{one.name} {found or 'missing'}, needed {one.specifier}")
    text = f"{'; '.join(wrong)}. Install with `make install`, or pip -c constraints.txt"
    if not wrong:
        text = f"torch {installed_version('torch')} and others, as {', '.join(asking)} need them"
    yield Finding("versions", "warning" if wrong else "ok", text)


def installed_version(package: str) -> str | None:
    """A package's version, without what names a build (+cu128), or None."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def check_extras() -> Iterator[Finding]:
    """Which extras are there; none is needed for a training loop of one's own."""
    for extra, packages in EXTRAS.items():
        missing = missing_packages(extra)
        text = f"has {', '.join(packages)}"
        if missing:
            text = f"without {', '.join(missing)}: {installation(extra)}"
        yield Finding(f"extra: {extra}", "absent" if missing else "ok", text)


def check_torch_build() -> Iterator[Finding]:
    """The code in torch against the GPUs that are visible, one line for each kind of them."""
    import torch

    # AMD's have no CUDA, and other names for what is built.
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return
    built = torch.cuda.get_arch_list()
    if not built:  # some builds do not say
        return
    kinds = Counter(
        (torch.cuda.get_device_capability(number), torch.cuda.get_device_name(number))
        for number in range(torch.cuda.device_count())
    )
    for (capability, name), count in kinds.items():
        gpu = f"{count} x {name}, capability {capability[0]}.{capability[1]}"
        how = runs_as(capability, built)
        if how is None:
            advice = which_build(capability, built, str(installed_version("torch")))
            text = f"{gpu}: torch {torch.__version__} has only {' '.join(built)}; {advice}"
            yield Finding("torch build", "failure", text)
        elif how == "binary":
            yield Finding("torch build", "ok", f"{gpu}: torch {torch.__version__} has its code")
        else:
            text = f"{gpu}: torch has PTX, which the driver compiles at the first start (minutes)"
            yield Finding("torch build", "ok", text)
