"""Time to first token of llama.cpp in a new process: llama_cpp_start.py GGUF THREADS PROMPT

From the call that opens the file to the id of the first token: load, tokenize, prompt, greedy choice, without a warm-up. Starting
Python and loading the library are left out, in the peer's favour. One JSON line.
"""
import json
import sys
import time

import llama_cpp

path, threads, prompt = sys.argv[1], int(sys.argv[2]), sys.argv[3]
start = time.perf_counter()
model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = model.tokenize(prompt.encode(), add_bos=False)
model.eval(ids)
first = model.sample(temp=0.0)
seconds = time.perf_counter() - start
print(json.dumps({"version": llama_cpp.__version__, "seconds": seconds, "prompt_tokens": len(ids), "first": int(first)}))
