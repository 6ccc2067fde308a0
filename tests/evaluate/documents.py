"""A document by hand for every data set of the presets, with the fields that users are told of."""

TEXTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
TARGETS = {"choices": TEXTS, "labels": [1, 0, 1, 0]}


def document(dataset: str, number: int) -> dict:
    """The same for every number but for the texts, so that examples differ."""
    text, other = f"w{number} first", f"w{number} second"
    return {
        "allenai/sciq": {
            "support": text,
            "question": other,
            "distractor1": "w1",
            "distractor2": "w2",
            "distractor3": "w3",
            "correct_answer": "w4",
        },
        "baber/piqa": {"goal": text, "sol1": other, "sol2": "w9", "label": 1},
        "allenai/winogrande": {
            "sentence": f"{text} _ {other}",
            "option1": "w1",
            "option2": "w2",
            "answer": "2",
        },
        "allenai/ai2_arc": {
            "question": text,
            "choices": {"text": TEXTS, "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
        "Rowan/hellaswag": {
            "activity_label": text,
            "ctx_a": f"{other} [title] w1",
            "ctx_b": "then",
            "endings": TEXTS,
            "label": "3",
        },
        "EleutherAI/logiqa": {"context": text, "question": other, "options": TEXTS, "label": "b"},
        "aps/super_glue": {"passage": text, "question": other, "label": 0},
        "EleutherAI/lambada_openai": {"text": f"{text} {other} last"},
        "cais/mmlu": {"question": text, "choices": TEXTS, "answer": 2},
        "google-research-datasets/nq_open": {"question": text, "answer": [other, "w1"]},
        "openai/gsm8k": {"question": text, "answer": f"{other} #### 7"},
        "SaylorTwift/bbh": {"input": text, "target": other},
        "google-research-datasets/tydiqa": {
            "id": f"finnish-{number}",
            "title": "w1",
            "context": text,
            "question": other,
            "answers": {"text": ["w2"], "answer_start": [0]},
        },
        "truthfulqa/truthful_qa": {
            "question": text,
            "mc1_targets": TARGETS,
            "mc2_targets": TARGETS,
        },
        "openai/openai_humaneval": {"prompt": text, "entry_point": other, "test": "w3"},
    }[dataset]
