"""The columns of Llama 2's table of base models as lm-eval's tasks (arXiv:2307.09288, tables 3 and 19 to 25).

    python -m llama_jax.evaluate --config=configs/eval.py:commonsense --checkpoint DIR --published llama2_7b

Columns: code, commonsense, world, reading, math, mmlu, bbh, agieval. docs/evaluation.md says where lm-eval's tasks are not what
the paper did.
"""

import ml_collections

MODELS = (
    "llama1_7b", "llama1_13b", "llama1_33b", "llama1_65b", "llama2_7b", "llama2_13b", "llama2_34b", "llama2_70b",
)  # fmt: skip


def score(name: str, task: str = "", shots: int = 0, metric: str = "", group: bool = False, percent: bool = False) -> dict:
    """Fields of llama_jax.evaluation.columns.Score."""
    return dict(name=name, task=task, shots=shots, metric=metric, group=group, percent=percent)


COLUMNS = {
    "code": [
        score("HumanEval", "humaneval", 0, "pass@1,create_test"),
        score("MBPP", "mbpp", 3, "pass_at_1,none"),
    ],
    "commonsense": [
        score("PIQA", "piqa", 0, "acc_norm,none"),
        score("SIQA", "social_iqa", 0, "acc,none"),
        score("HellaSwag", "hellaswag", 0, "acc_norm,none"),
        score("WinoGrande", "winogrande", 0, "acc,none"),
        score("ARC-e", "arc_easy", 0, "acc_norm,none"),
        score("ARC-c", "arc_challenge", 0, "acc_norm,none"),
        score("OBQA", "openbookqa", 0, "acc_norm,none"),
        score("CSQA", "commonsense_qa", 7, "acc,none"),
    ],
    "world": [
        score("NQ", "nq_open", 5, "exact_match,remove_whitespace"),
        score("TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace"),
    ],
    "reading": [
        score("SQuAD", "squadv2", 0, "exact,none", percent=True),
        score("QuAC"),
        score("BoolQ", "boolq", 0, "acc,none"),
    ],
    "math": [
        score("GSM8K", "gsm8k_cot", 8, "exact_match,strict-match"),
        score("MATH", "minerva_math", 4, "exact_match,none", group=True),
    ],
    "mmlu": [score("MMLU", "mmlu", 5, "acc,none", group=True)],
    "bbh": [score("BBH", "bbh_fewshot", 3, "exact_match,none", group=True)],
    "agieval": [score("AGIEval", "agieval_en", -1, "acc,none", group=True)],
}

# In the order of MODELS. "mean" is the column of table 3, the others are the benchmarks that it is the mean of.
PUBLISHED = {
    "code": {
        "HumanEval": (10.5, 15.8, 21.7, 23.7, 12.8, 18.3, 22.6, 29.9),
        "MBPP": (17.7, 22.0, 30.2, 37.7, 20.8, 30.6, 33.0, 45.0),
        "mean": (14.1, 18.9, 26.0, 30.7, 16.8, 24.5, 27.8, 37.5),
    },
    "commonsense": {
        "PIQA": (79.8, 80.1, 82.3, 82.8, 78.8, 80.5, 81.9, 82.8),
        "SIQA": (48.9, 50.4, 50.4, 52.3, 48.3, 50.3, 50.9, 50.7),
        "HellaSwag": (76.1, 79.2, 82.8, 84.2, 77.2, 80.7, 83.3, 85.3),
        "WinoGrande": (70.1, 73.0, 76.0, 77.0, 69.2, 72.8, 76.7, 80.2),
        "ARC-e": (72.8, 74.8, 80.0, 78.9, 75.2, 77.3, 79.4, 80.2),
        "ARC-c": (47.6, 52.7, 57.8, 56.0, 45.9, 49.4, 54.5, 57.4),
        "OBQA": (57.2, 56.4, 58.6, 60.2, 58.6, 57.0, 58.2, 60.2),
        "CSQA": (33.6, 62.0, 72.5, 74.0, 57.8, 67.3, 74.3, 78.5),
        "mean": (60.8, 66.1, 70.0, 70.7, 63.9, 66.9, 69.9, 71.9),
    },
    "world": {
        "NQ": (22.0, 28.1, 32.9, 35.0, 25.7, 31.2, 32.8, 39.5),
        "TriviaQA": (70.4, 77.1, 83.8, 85.9, 72.1, 79.6, 84.5, 87.6),
        "mean": (46.2, 52.6, 58.4, 60.5, 48.9, 55.4, 58.7, 63.6),
    },
    "reading": {
        "SQuAD": (60.0, 68.9, 75.5, 79.4, 67.2, 72.9, 77.4, 80.7),
        "QuAC": (38.9, 39.9, 44.1, 41.0, 39.4, 42.7, 42.9, 42.4),
        "BoolQ": (76.5, 78.1, 83.1, 85.3, 77.4, 81.7, 83.7, 85.0),
        "mean": (58.5, 62.3, 67.6, 68.6, 61.3, 65.8, 68.0, 69.4),
    },
    "math": {
        "GSM8K": (11.0, 17.8, 35.6, 50.9, 14.6, 28.7, 42.2, 56.8),
        "MATH": (2.9, 3.9, 7.1, 10.6, 2.5, 3.9, 6.24, 13.5),
        "mean": (6.95, 10.9, 21.4, 30.8, 14.6, 28.7, 24.2, 35.2),
    },
    "mmlu": {"MMLU": (35.1, 46.9, 57.8, 63.4, 45.3, 54.8, 62.6, 68.9)},
    "bbh": {"BBH": (30.3, 37.0, 39.8, 43.5, 32.6, 39.4, 44.1, 51.2)},
    "agieval": {"AGIEval": (23.9, 33.9, 41.7, 47.6, 29.3, 39.1, 43.4, 54.2)},
}

NOTES = {
    "code": "The paper samples at temperature 0.1 and top-p 0.95; lm-eval's tasks are greedy. Both run the model's programs.",
    "commonsense": "The paper divides by P(choice | \"Answer:\") for OBQA; lm-eval by the length of the choice.",
    "world": "",
    "reading": "lm-eval has no QuAC, so the measured mean is of two and not comparable with the published one.",
    "math": (
        "For llama2_7b and llama2_13b the published column is the GSM8K number alone; the mean of the paper's own "
        "GSM8K and MATH is 8.55 and 16.3."
    ),
    "mmlu": "",
    "bbh": "The paper does not say whether the model reasons before it answers; here it answers at once.",
    "agieval": "The paper uses 3 to 5 shots; lm-eval's task has no examples to show, so this is 0-shot.",
}  # fmt: skip


def get_config(column: str) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f"llama2_table_{column}"
    c.scores = COLUMNS[column]
    published = PUBLISHED[column]
    if len(published) == 1:
        published = published | {"mean": next(iter(published.values()))}
    c.published = {model: {name: row[i] for name, row in published.items()} for i, model in enumerate(MODELS)}
    c.note = NOTES[column]
    return c
