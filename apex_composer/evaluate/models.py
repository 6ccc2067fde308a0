"""Open a model for looking at it: from a Hugging Face folder or name, or a Composer checkpoint."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apex_composer.callbacks.start_checks import has_soft_cap
from apex_composer.data_prep.atomic_files import read_json
from apex_composer.tools.saved_model import is_foundry_mpt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
ALLOWED = (
    "a folder for from_pretrained (config.json), a folder of an adapter (adapter_config.json), a "
    "checkpoint of Composer (a file .pt, or the folder of a sharded one with .metadata), or a name "
    "on the hub"
)


@dataclass
class OpenedModel:
    """A model that is ready for forward passes, and where its files are.

    Args:
        model: in evaluation mode, without gradients, on its device.
        tokenizer: the model's own.
        name: what was given.
        folder: for `from_pretrained`: what was given, the hub's copy, or a temporary conversion.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    folder: Path
    _made: ExitStack = field(default_factory=ExitStack, repr=False)

    def close(self) -> None:
        """Remove the temporary conversion, if one was made; a second call does nothing."""
        self._made.close()

    def __enter__(self) -> "OpenedModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_model(source: str, *, device: str | None = None, dtype: str = "auto") -> OpenedModel:
    """Open a model; checkpoints become a temporary Hugging Face folder, as `merge` writes it.

    Adapters become part of the weights. Checkpoints are unpickled, as Composer itself does it:
    open only those that you trust. Code that was downloaded with a model is not run.

    Args:
        source: folder, checkpoint (file or folder of shards), or a name on the hub, which is
            fetched unless HF_HUB_OFFLINE=1 is set and then looked up among what was fetched before.
        device: torch's name. Default: cuda where there is one, else cpu.
        dtype: one of DTYPES; `auto` is that of the weights. Default: auto.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it cannot be opened; the message
            names what was given and what is allowed.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    device = _check_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    source = str(source)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with ExitStack() as made:
        folder = _find_folder(source, made, kind)
        tokenizer = _load(
            source, "tokenizer", lambda: AutoTokenizer.from_pretrained(folder or source)
        )
        model = _load(
            source,
            "model",
            lambda: _model_class(folder).from_pretrained(
                folder or source, torch_dtype=kind, **_attention(folder or source)
            ),
        )
        model = model.to(device).eval().requires_grad_(False)
        folder = folder or Path(cached_file(source, "config.json")).parent
        return OpenedModel(model, tokenizer, source, folder, made.pop_all())


def _check_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device of torch: give cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no GPU here. Give cpu, or see doctor")
    return found


def _find_folder(source: str, made: ExitStack, kind: Any) -> Path | None:
    """The Hugging Face folder of a source, made where it has none; None for a name on the hub."""
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            return _convert(path, made, partial(_merge_adapter_folder, kind=kind))
        if (path / ".metadata").is_file():
            return _convert(path, made, _merge_checkpoint)
        raise ValueError(f"{source} is a folder, but of no model. Allowed is {ALLOWED}")
    if path.is_file():
        return _convert(path, made, _merge_checkpoint)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.suffix:
        if not _is_hub_name(source):
            raise FileNotFoundError(f"{source} does not exist. Allowed is {ALLOWED}")
    return None


def _is_hub_name(source: str) -> bool:
    """Names such as `org/model-v1.0` have what looks like a suffix."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return Path(source).suffix not in (".pt", ".symlink", ".yaml", ".safetensors", ".bin")


def _convert(path: Path, made: ExitStack, write: Callable[[Path, Path], None]) -> Path:
    """A temporary folder, removed by `made`, with what `write(path, folder)` makes of a path."""
    parent = tempfile.mkdtemp(prefix="apex-model-")
    made.callback(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent) / (path.stem or "model")
    write(path, folder)
    return folder


def _merge_checkpoint(path: Path, folder: Path) -> None:
    from apex_composer.tools.merge import merge

    merge([path], folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"{path} holds no tokenizer. Convert it by `apex-composer merge {path} --out FOLDER`, "
            "put the run's tokenizer into the folder (save_pretrained), and give the folder"
        )


def _merge_adapter_folder(path: Path, folder: Path, kind: Any) -> None:
    """What `hf_checkpointer` exports of LoRA: the adapter, and the name of its base.

    Their sum is rounded to the dtype that is asked for, not to the base's before.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    def load() -> Any:
        adapted = AutoPeftModelForCausalLM.from_pretrained(path, torch_dtype=kind)
        return adapted.merge_and_unload()

    _load(str(path), "adapter and its base", load).save_pretrained(folder)
    _load(str(path), "tokenizer", lambda: AutoTokenizer.from_pretrained(path)).save_pretrained(
        folder
    )


def _model_class(folder: Path | None) -> Any:
    """llm-foundry's MPT has the name of transformers' own."""
    from transformers import AutoModelForCausalLM

    if folder is not None and is_foundry_mpt(read_json(folder / "config.json") or {}):
        from llmfoundry.models.mpt import MPTForCausalLM

        return MPTForCausalLM
    return AutoModelForCausalLM


def _attention(source: Path | str) -> dict[str, str]:
    """transformers' sdpa, its default, leaves out the soft-cap of Gemma 2's attention."""
    from transformers import PretrainedConfig

    settings, _ = PretrainedConfig.get_config_dict(source)
    return {"attn_implementation": "eager"} if has_soft_cap(settings) else {}


def _load(source: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises what its parts raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{source}: its {what} cannot be loaded ({reason}). Allowed is {ALLOWED}"
        ) from error
