"""Calibration windows as `lowbit quantize` makes them: the texts of a JSONL joined by blank lines, encoded once, cut from the start."""
import array
import hashlib
import json
import sys


def calibration(tokenizer, source, windows, length):
    """(token ids by window, SHA-256 of all ids as little-endian u32, which is `windows_sha256` of quantize.json)"""
    text = "\n\n".join(json.loads(line)["text"] for line in open(source, encoding="utf-8") if line.strip())
    ids = tokenizer(text)["input_ids"]
    rows = [ids[i * length : (i + 1) * length] for i in range(windows)]
    if len(rows[-1]) < length:
        sys.exit(f"{source}: {len(ids)} tokens are not {windows} windows of {length}")
    flat = array.array("I", (i for row in rows for i in row))
    if sys.byteorder == "big":
        flat.byteswap()
    return rows, hashlib.sha256(flat.tobytes()).hexdigest()
