"""Random weights in the shape of Llama-3.2-1B as GGUF: llama_cpp_shape.py OUT_PREFIX

Writes OUT_PREFIX.bf16.gguf and, by llama.cpp's own quantizer, OUT_PREFIX.q4_0.gguf.
"""
import sys

import gguf
import llama_cpp
import numpy as np

LAYERS, HIDDEN, MLP, HEADS, KV, DIM, VOCAB = 16, 2048, 8192, 32, 8, 64, 128256
out = sys.argv[1]
w = gguf.GGUFWriter(out + ".bf16.gguf", "llama")
w.add_context_length(8192)
w.add_embedding_length(HIDDEN)
w.add_block_count(LAYERS)
w.add_feed_forward_length(MLP)
w.add_head_count(HEADS)
w.add_head_count_kv(KV)
w.add_rope_dimension_count(DIM)
w.add_rope_freq_base(500000.0)
w.add_layer_norm_rms_eps(1e-5)
w.add_vocab_size(VOCAB)
w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
w.add_tokenizer_model("none")
rng = np.random.default_rng(0)


def matrix(name, rows, cols):
    x = (rng.standard_normal((rows, cols), dtype=np.float32) * 0.02).view(np.uint32)
    half = ((x + 0x8000) >> 16).astype(np.uint16)
    w.add_tensor(name, half.view(np.uint8), raw_shape=(rows, cols * 2), raw_dtype=gguf.GGMLQuantizationType.BF16)


matrix("token_embd.weight", VOCAB, HIDDEN)
w.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
for i in range(LAYERS):
    p = f"blk.{i}."
    w.add_tensor(p + "attn_norm.weight", np.ones(HIDDEN, np.float32))
    w.add_tensor(p + "ffn_norm.weight", np.ones(HIDDEN, np.float32))
    matrix(p + "attn_q.weight", HEADS * DIM, HIDDEN)
    matrix(p + "attn_k.weight", KV * DIM, HIDDEN)
    matrix(p + "attn_v.weight", KV * DIM, HIDDEN)
    matrix(p + "attn_output.weight", HIDDEN, HEADS * DIM)
    matrix(p + "ffn_gate.weight", MLP, HIDDEN)
    matrix(p + "ffn_up.weight", MLP, HIDDEN)
    matrix(p + "ffn_down.weight", HIDDEN, MLP)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = 2, True, 2
sys.exit(llama_cpp.llama_model_quantize((out + ".bf16.gguf").encode(), (out + ".q4_0.gguf").encode(), params))
