"""A model of two layers, data of a few documents, and a preset of both kinds of tasks on it."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny_run
import yaml

LANGUAGES = "arabic bengali english finnish indonesian korean russian swahili telugu".split()
TASKS = [
    {"task": "sciq", "column": "SciQ", "shots": 2, "metric": "acc", "folder": "sciq"},
    {"task": "nq_open", "column": "NQ", "shots": 1, "metric": "exact_match", "folder": "nq_open"},
    {"task": "tydiqa", "column": "TyDiQA", "shots": 1, "metric": "f1", "folder": "tydiqa"},
    {"task": "humaneval_pass_at_10", "column": "HumanEval", "shots": 0, "metric": "pass@10"},
]


def words(start, count):
    return " ".join(f"w{start + offset}" for offset in range(count))


def sciq(number):
    """The right answer is of one to three words, as the wrong ones are."""
    return {
        "support": words(number, 2),
        "question": words(number + 2, 2),
        **{f"distractor{length}": words(number * length, length) for length in (1, 2, 3)},
        "correct_answer": words(number + 4, number % 3 + 1),
    }


def tydiqa(language, number):
    text = f"w{number} w{number + 1}"
    answers = {"text": [f"w{number}"], "answer_start": [0]}
    row = {"id": f"{language}-{number}", "title": "w1", "context": text, "question": "w2"}
    return {**row, "answers": answers}


DATA = {
    "allenai/sciq/default/train": [sciq(number) for number in range(17, 20)],
    "allenai/sciq/default/test": [sciq(number) for number in range(1, 17)],
    "google-research-datasets/nq_open/default/train": [
        {"question": f"w{number}", "answer": [f"w{number + 1}"]} for number in range(3)
    ],
    "google-research-datasets/nq_open/default/validation": [
        {"question": f"w{number}", "answer": [f"w{number + 1}", "w9"]} for number in range(5, 7)
    ],
    "google-research-datasets/tydiqa/secondary_task/train": [
        tydiqa(language, number) for language in LANGUAGES for number in (1, 2)
    ],
    "google-research-datasets/tydiqa/secondary_task/validation": [
        tydiqa(language, 3) for language in LANGUAGES
    ],
    "openai/openai_humaneval/default/test": [
        {
            "task_id": "0",
            "prompt": "def two():\n",
            "entry_point": "two",
            "canonical_solution": "    return 2\n",
            "test": "def check(candidate):\n    assert candidate() == 2\n",
        }
    ],
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, documents in DATA.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.fixture(autouse=True, scope="session")
def data_cache(tmp_path_factory):
    """What `datasets` makes of the files stays out of the home folder."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True, scope="session")
def no_inventory():
    """The harness asks pip and the machine for all that there is, a second for every task."""
    import lm_eval.evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def short_answers():
    """Answers of 8 tokens, whatever a task allows; a model of random weights would go on."""
    from lm_eval.models.huggingface import HFLM

    generate = HFLM._model_generate

    def generate_few(self, context, max_length, stop, **options):
        return generate(self, context, context.shape[1] + 8, stop, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "_model_generate", generate_few)
        yield


@pytest.fixture(scope="session")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "small.yaml"
    paper = {"source": "a table", "columns": ["perplexity", "SciQ"]}
    paper["rows"] = [{"method": "paper", "numbers": [5.5, 88.0]}]
    path.write_text(yaml.safe_dump({"title": "Small", "tasks": TASKS, "paper": paper}))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_run.write_model(folder)
    config = AutoConfig.from_pretrained(folder, max_position_embeddings=512)
    config.initializer_range = 0.5  # answers differ by more than rounding
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_model():
    @contextmanager
    def open_small(source, **_):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(source).eval()
        yield SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(source))

    return open_small
