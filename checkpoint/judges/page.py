"""What the judges write: records, and the blocks of `docs/formats.md` made of them."""
import json
import os
import subprocess
import time


def facts(lowbit):
    """Of a record: its schema, when, and by which lowbit."""
    version = subprocess.run([lowbit, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {"schema": 1, "date": time.strftime("%Y-%m-%d"), "lowbit": version}


def write(path, record):
    """A record, whole or not at all."""
    with open(path + ".part", "w") as f:
        json.dump(record, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)


def load(path):
    with open(path) as f:
        return json.load(f)


def place(path, name, text):
    """Puts `text` where a page has it: between `<!-- generated: NAME -->` and the next `<!-- end -->`."""
    with open(path, encoding="utf-8") as f:
        page = f.read()
    before, start, rest = page.partition(f"<!-- generated: {name} -->\n")
    old, end, after = rest.partition("<!-- end -->")
    if not (start and end):
        raise SystemExit(f"{path}: no `<!-- generated: {name} -->` with an `<!-- end -->`")
    with open(path, "w", encoding="utf-8") as f:
        f.write(before + start + text + end + after)
