"""Small tasks in lm-eval's formats, of the bundled model's held-out stories and questions, to be read with --include_path.

story_end       multiple choice as in HellaSwag: which sentence ends the story
story_letter    multiple choice as in MMLU: the letter of that sentence, with examples
small_sums      answers as in GSM8K: stop strings and a regular expression
story_text      perplexity of whole texts
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from bundled.make_data import records

NAMES = ("story_end", "story_letter", "small_sums", "story_text")

YAML = {
    "story_end": """
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_choice: "{{ends}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "story_letter": """
output_type: multiple_choice
fewshot_split: shots
fewshot_config: {sampler: first_n}
num_fewshot: 1
doc_to_text: "{{beginning}}\\nA. {{ends[0]}}\\nB. {{ends[1]}}\\nC. {{ends[2]}}\\nD. {{ends[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "small_sums": """
output_type: generate_until
fewshot_split: shots
fewshot_config: {sampler: first_n}
num_fewshot: 3
fewshot_delimiter: "\\n"
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:", "</s>"], do_sample: false, max_gen_toks: 24}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "(-?[0-9]+)\\\\."}
      - {function: take_first}
  - name: whole
    filter:
      - {function: remove_whitespace}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [".*= ", "\\\\.$"]}
""",
    "story_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path, documents: int) -> None:
    """YAML and JSONL of all tasks, with so many documents each."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = [record["text"] for record in records("held_out", "story", range(documents + 4))]
    ends = [_with_ends(i, stories) for i in range(len(stories))]
    sums = list(_sums(documents + 4))
    found = {"story_end": ends, "story_letter": ends, "small_sums": sums, "story_text": [{"text": s} for s in stories]}
    for name, rows in found.items():
        files = {"test": rows[:documents], "shots": rows[documents:]}
        for split, part in files.items():
            lines = (json.dumps(row) + "\n" for row in part)
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines))
        data = {split: str(folder.resolve() / f"{name}_{split}.jsonl") for split in files}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(data)}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + YAML[name].lstrip())


def _with_ends(i: int, stories: list[str]) -> dict:
    """A story without its last sentence, and four sentences, one of which it is."""
    beginning, end = _cut(stories[i])
    ends = [end, *(_cut(stories[(i + k) % len(stories)])[1] for k in (1, 2, 3))]
    order = random.Random(i).sample(range(4), 4)
    return {"beginning": beginning, "ends": [ends[k] for k in order], "answer": order.index(0)}


def _cut(story: str) -> tuple[str, str]:
    at = story.rstrip('.!?"').rfind(". ") + 1
    return story[:at], story[at:].strip()


def _sums(count: int) -> Iterator[dict]:
    """Questions with numbers for an answer, from the held-out exercises."""
    number = 0
    while count:
        lines = records("held_out", "exercise", [number])[0]["text"].splitlines()
        number += 1
        for question, answer in itertools.pairwise(lines):
            if question.startswith("Question: How much is") and count:
                count -= 1
                yield {"question": question.removeprefix("Question: "), "answer": answer.removeprefix("Answer: ")}
