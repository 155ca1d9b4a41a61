"""lm-eval over completions and chat completions: generated texts, and likelihoods."""

from __future__ import annotations

from told import FOLDER, URL, tell  # isort: skip

import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

GENERATE = """
task: generated
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
task: chosen
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["hello world", "x"]
metric_list: [{metric: acc}]
"""

folder = Path(FOLDER)
lines = [{"question": f"What {i}?", "answer": "hello world"} for i in range(3)]
data = folder / "data.jsonl"
data.write_text("\n".join(map(json.dumps, lines)))
for name, text in (("generated", GENERATE), ("chosen", CHOOSE)):
    (folder / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
tasks = TaskManager(include_path=str(folder), include_defaults=False)
common = f"model=planner,num_concurrent=1,max_retries=1,tokenizer={folder / 'tokenizer'}"


def scores(model: str, path: str, task: str, **options: object) -> dict:
    """Of one task."""
    done = lm_eval.simple_evaluate(
        model=model,
        model_args=f"{common},base_url={URL}/{path}",
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        **options,
    )
    return done["results"][task]


chat = scores("local-chat-completions", "chat/completions", "generated", apply_chat_template=True)
tell(
    generated=scores("local-completions", "completions", "generated")["exact_match,none"],
    chosen=scores("local-completions", "completions", "chosen")["acc,none"],
    chat=chat["exact_match,none"],
)
