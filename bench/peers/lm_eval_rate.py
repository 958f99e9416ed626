"""Seconds lm-evaluation-harness takes to score tasks: lm_eval_rate.py MODEL DATA DTYPE LIMIT TASK[:SHOTS]...

Its own task definitions over local copies of their data (DATA as `lowbit eval --data`), transformers on two threads. Counted
are rendering and scoring, not imports, the model's load or the reading of data, as in lowbit's `scoring_seconds`. One JSON line a task.
"""
import glob
import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import datasets

model, data, dtype, limit, specs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
FILES = {
    ("Rowan/hellaswag", None): {"validation": "hellaswag/validation.jsonl"},
    ("allenai/ai2_arc", "ARC-Easy"): {"test": "arc_easy/test.jsonl", "validation": "arc_easy/validation.jsonl"},
    ("allenai/ai2_arc", "ARC-Challenge"): {
        "test": "arc_challenge/test.jsonl",
        "validation": "arc_challenge/validation.jsonl",
    },
    ("baber/piqa", None): {"validation": "piqa/validation.jsonl"},
}
for path in glob.glob(f"{data}/mmlu/test/*.jsonl"):
    subject = os.path.basename(path)[:-6]
    FILES["cais/mmlu", subject] = {"test": f"mmlu/test/{subject}.jsonl", "dev": f"mmlu/dev/{subject}.jsonl"}


def local(path=None, name=None, **_):
    read = lambda f: [json.loads(line) for line in open(os.path.join(data, f), encoding="utf-8")]
    sets = {split: datasets.Dataset.from_list(read(f)) for split, f in FILES[path, name].items()}
    some = next(iter(sets.values()))
    for split in ("train", "validation", "test"):  # named by the task but not read without shots
        sets.setdefault(split, some.select(range(1)))
    return datasets.DatasetDict(sets)


datasets.load_dataset = local
import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

torch.set_num_threads(int(os.environ.get("THREADS", "2")))
lm = HFLM(pretrained=model, dtype=dtype, device="cpu", batch_size=8)
manager = TaskManager()


def find(tasks, name):
    for key, value in tasks.items():
        if isinstance(value, dict):
            found = find(value, name)
            if found is not None:
                return found
        elif str(key) == name:
            return value


for spec in specs:
    name, _, shots = spec.partition(":")
    task = find(manager.load([name])["tasks"], name)
    if shots:
        task.set_config(key="num_fewshot", value=int(shots))
    task.set_fewshot_seed(1234)
    start = time.perf_counter()
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    requests = [r for r in task.instances if r.request_type == "loglikelihood"]
    lm.loglikelihood(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    documents = len({r.doc_id for r in requests})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"version": lm_eval.__version__, "task": spec, "documents": documents, "seconds": seconds, "peak": peak}), flush=True)
