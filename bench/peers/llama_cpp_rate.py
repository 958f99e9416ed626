"""Prompt and decode rates of llama.cpp: llama_cpp_rate.py GGUF THREADS REPETITIONS

A prompt of 512 random tokens from an empty cache, then 128 single tokens; a warm-up first. One JSON line.
"""
import json
import sys
import time

import llama_cpp

path, threads, repetitions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
vocab = model.n_vocab()
prompt, decode = [], []
for r in range(repetitions + 1):
    model.reset()
    start = time.perf_counter()
    model.eval([(7 * i + r) % (vocab - 8) + 3 for i in range(512)])
    first = 512 / (time.perf_counter() - start)
    model.reset()
    model.eval([1])
    start = time.perf_counter()
    for i in range(128):
        model.eval([(11 * i + r) % (vocab - 8) + 3])
    if r:
        prompt.append(first)
        decode.append(128 / (time.perf_counter() - start))
print(json.dumps({"version": llama_cpp.__version__, "pp512": prompt, "tg128": decode}))
