//! Valid inputs to start from, small so that changes hit what matters.

use std::io::Write;

use serde_json::{Value, json};

use super::{records, root, tiny};

fn bytes(v: Value) -> Vec<u8> {
    v.to_string().into_bytes()
}

/// A safetensors file of tensors `(name, dtype, shape)`, all zeros.
pub fn safetensors_of(tensors: &[(&str, &str, &[usize])]) -> Vec<u8> {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let width = if *dtype == "F32" { 4 } else { 2 };
        let size = shape.iter().product::<usize>() * width;
        header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}));
        at += size;
    }
    let text = Value::Object(header).to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &vec![0; at]].concat()
}

pub fn safetensors() -> Vec<Vec<u8>> {
    vec![safetensors_of(&[("a.weight", "BF16", &[4, 8]), ("b", "F32", &[3]), ("c", "F16", &[])]), safetensors_of(&[])]
}

pub fn index() -> Vec<Vec<u8>> {
    vec![bytes(json!({"metadata": {"total_size": 44}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))]
}

fn demo_config() -> Value {
    serde_json::from_slice(&std::fs::read(root().join("assets/demo/config.json")).unwrap()).unwrap()
}

pub fn config() -> Vec<Vec<u8>> {
    families(&demo_config())
}

/// Configurations of the small model, whose tensors stay as they are: each family loads.
pub fn model() -> Vec<Vec<u8>> {
    families(&tiny::config())
}

fn families(base: &Value) -> Vec<Vec<u8>> {
    let of = |family: &str, class: &str, more: Value| {
        let mut c = base.clone();
        c["model_type"] = family.into();
        c["architectures"] = json!([class]);
        for (k, v) in more.as_object().unwrap() {
            c[k] = v.clone();
        }
        bytes(c)
    };
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let longrope = json!({"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]});
    vec![
        bytes(base.clone()),
        of("llama", "LlamaForCausalLM", json!({"rope_scaling": scaling})),
        of(
            "qwen2",
            "Qwen2ForCausalLM",
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 2}),
        ),
        of("qwen3", "Qwen3ForCausalLM", json!({"head_dim": 64})),
        of(
            "gemma3_text",
            "Gemma3ForCausalLM",
            json!({"sliding_window_pattern": 2, "query_pre_attn_scalar": 64, "sliding_window": 16}),
        ),
        of("phi3", "Phi3ForCausalLM", json!({})),
        of(
            "mixtral",
            "MixtralForCausalLM",
            json!({"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null}),
        ),
        of(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
                "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ),
        of(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            json!({"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 4,
                "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16, "v_head_dim": 32, "routed_scaling_factor": 2.5}),
        ),
        of(
            "gpt_oss",
            "GptOssForCausalLM",
            json!({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "swiglu_limit": 7.0, "attention_bias": true,
                "layer_types": ["sliding_attention"]}),
        ),
        of("phi3", "Phi3ForCausalLM", json!({"rope_scaling": longrope, "original_max_position_embeddings": 64})),
    ]
}

pub fn quantization() -> Vec<Vec<u8>> {
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 64, "actorder": "static"});
    let group = json!({"targets": ["Linear", "re:.*lm_head"], "weights": weights, "format": "pack-quantized"});
    let kv = json!({"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": false});
    let block = json!({"targets": ["re:.*down_proj"], "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": true}});
    let nvfp4 = json!({"targets": ["Linear"], "format": "nvfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "input_activations": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}});
    vec![
        bytes(
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}),
        ),
        bytes(
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true, "lm_head": false,
            "checkpoint_format": "gptq", "dynamic": {"-:.*k_proj": {}, "+:.*q_proj": {"bits": 8}}}),
        ),
        bytes(json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"})),
        bytes(json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})),
        bytes(
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "ignore": ["lm_head"]}),
        ),
        bytes(json!({"quant_method": "compressed-tensors", "format": "mixed-precision", "kv_cache_scheme": kv,
            "config_groups": {"group_0": block, "group_1": nvfp4}})),
    ]
}

/// Configurations of a packed checkpoint whose tensors stay as they are.
pub fn packed() -> Vec<Vec<u8>> {
    tiny::packed().iter().filter(|(name, _)| name == "config.json").map(|(_, bytes)| bytes.clone()).collect()
}

/// Weights of packed checkpoints.
pub fn tensors() -> Vec<Vec<u8>> {
    let files = tiny::packed().iter().chain(tiny::packed_gptq());
    files.filter(|(name, _)| name == "model.safetensors").map(|(_, bytes)| bytes.clone()).collect()
}

/// A GGUF file of one block, and one with the tokenizer of a byte-level vocabulary.
pub fn gguf() -> Vec<Vec<u8>> {
    fn text(out: &mut Vec<u8>, s: &str) {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    }
    let make = |kind: &str| {
        let (hidden, heads, kv, ffn, vocab) = (64u64, 4u64, 2u64, 96u64, 10u64);
        let (mut keys, mut count) = (Vec::new(), 0u64);
        let mut put = |key: &str, kind: u32, value: &[u8]| {
            text(&mut keys, key);
            keys.extend(kind.to_le_bytes());
            keys.extend(value);
            count += 1;
        };
        let string = |s: &str| {
            let mut v = Vec::new();
            text(&mut v, s);
            v
        };
        let strings = |all: &[&str]| {
            let mut v = [&8u32.to_le_bytes()[..], &(all.len() as u64).to_le_bytes()].concat();
            all.iter().for_each(|s| text(&mut v, s));
            v
        };
        let numbers = |kind: u32, all: &[[u8; 4]]| {
            [&kind.to_le_bytes()[..], &(all.len() as u64).to_le_bytes(), &all.concat()].concat()
        };
        put("general.architecture", 8, &string("llama"));
        for (key, n) in [
            ("block_count", 1),
            ("context_length", 128),
            ("embedding_length", hidden),
            ("feed_forward_length", ffn),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv),
        ] {
            put(&format!("llama.{key}"), 4, &(n as u32).to_le_bytes());
        }
        put("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
        put("llama.rope.freq_base", 6, &5e5f32.to_le_bytes());
        put("tokenizer.ggml.model", 8, &string(kind));
        put("tokenizer.ggml.pre", 8, &string("llama-bpe"));
        let tokens = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "ab", "\u{2581}ab", "<0x0A>", "c"];
        put("tokenizer.ggml.tokens", 9, &strings(&tokens));
        put("tokenizer.ggml.merges", 9, &strings(&["a b", "\u{2581} ab"]));
        let kinds = [2i32, 3, 3, 1, 1, 1, 1, 1, 6, 1].map(i32::to_le_bytes);
        put("tokenizer.ggml.token_type", 9, &numbers(5, &kinds));
        let scores = [0.0f32, 0.0, 0.0, -5.0, -4.0, -4.5, -1.0, -2.0, 0.0, -6.0].map(f32::to_le_bytes);
        put("tokenizer.ggml.scores", 9, &numbers(6, &scores));
        put("tokenizer.ggml.bos_token_id", 4, &1u32.to_le_bytes());
        put("tokenizer.ggml.eos_token_id", 4, &2u32.to_le_bytes());
        put("tokenizer.chat_template", 8, &string("{{ messages }}"));
        // GGUF writes the innermost dimension first; kind 0 is f32, 1 f16, 2 Q4_0, 8 Q8_0.
        let small = hidden / heads * kv;
        let tensors: [(&str, &[u64], u32); 11] = [
            ("token_embd.weight", &[hidden, vocab], 8),
            ("output_norm.weight", &[hidden], 0),
            ("blk.0.attn_norm.weight", &[hidden], 0),
            ("blk.0.ffn_norm.weight", &[hidden], 0),
            ("blk.0.attn_q.weight", &[hidden, hidden], 2),
            ("blk.0.attn_k.weight", &[hidden, small], 1),
            ("blk.0.attn_v.weight", &[hidden, small], 2),
            ("blk.0.attn_output.weight", &[hidden, hidden], 2),
            ("blk.0.ffn_gate.weight", &[hidden, ffn], 2),
            ("blk.0.ffn_up.weight", &[hidden, ffn], 8),
            ("blk.0.ffn_down.weight", &[ffn, hidden], 2),
        ];
        let (mut infos, mut at) = (Vec::new(), 0u64);
        for (name, dims, kind) in tensors {
            text(&mut infos, name);
            infos.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| infos.extend(d.to_le_bytes()));
            infos.extend(kind.to_le_bytes());
            infos.extend(at.to_le_bytes());
            let n: u64 = dims.iter().product();
            let size = match kind {
                0 => n * 4,
                1 => n * 2,
                2 => n / 32 * 18,
                _ => n / 32 * 34,
            };
            at += size.next_multiple_of(32);
        }
        let mut out =
            [&b"GGUF"[..], &3u32.to_le_bytes(), &11u64.to_le_bytes(), &count.to_le_bytes(), &keys, &infos].concat();
        out.resize(out.len().next_multiple_of(32) + at as usize, 0);
        out
    };
    vec![make("llama"), make("gpt2")]
}

pub fn tokenizer() -> Vec<Vec<u8>> {
    let vocab = json!({"a": 0, "b": 1, "ab": 2, "\u{0120}": 3, "\u{0120}ab": 4, "c": 5, "<s>": 6});
    let token = json!({"id": 6, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let single = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let post = json!({"type": "TemplateProcessing", "single": single, "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}}});
    let of = |pre: Value, model: Value| {
        bytes(
            json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [token], "normalizer": {"type": "NFC"},
            "pre_tokenizer": pre, "post_processor": post, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}, "model": model}),
        )
    };
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let split = json!({"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)| ?"}, "behavior": "Isolated", "invert": false});
    let bpe = json!({"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"], ["\u{0120}", "ab"]]});
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0], ["b", -2.5], ["ab", -1.5]], "byte_fallback": false});
    vec![
        of(level.clone(), bpe.clone()),
        of(json!({"type": "Sequence", "pretokenizers": [split, level]}), bpe),
        of(json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}), unigram),
    ]
}

pub fn template() -> Vec<Vec<u8>> {
    [
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'user' and ns.n % 2 %}{{ m.content.strip().split(' ')[0] }}{% elif tools %}{{ tools | tojson(indent=2) }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{% macro again(n) %}{% if n %}{{ n }}{{ again(n - 1) }}{% endif %}{% endmacro %}{{ again(3) }}{{ strftime_now('%d %b %Y') }}{{ messages[0].content[1:-1] }}{{ messages | length }}",
    ]
    .map(|s| s.as_bytes().to_vec())
    .to_vec()
}

pub fn task() -> Vec<Vec<u8>> {
    let head = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n";
    [
        format!("task: words\n{head}output_type: loglikelihood\ndoc_to_text: '{{{{context}}}}'\ndoc_to_target: last\nmetric_list:\n  - metric: acc\n    aggregation: mean\n  - metric: perplexity\n"),
        format!("task: pick\n{head}output_type: multiple_choice\ndoc_to_text: '{{{{context}}}}'\ndoc_to_target: label\ndoc_to_choice: options\nnum_fewshot: 1\nfewshot_split: test\nfewshot_config: {{sampler: first_n}}\n"),
        format!("task: write\n{head}output_type: generate_until\ndoc_to_text: 'Q: {{{{context.split(\" \")[0]}}}}'\ndoc_to_target: '{{{{last}}}}'\ngeneration_kwargs: {{until: [\"\\n\"], max_gen_toks: 8}}\nfilter_list:\n  - name: strict\n    filter:\n      - function: regex\n        regex_pattern: '(-?[0-9]+)'\n      - function: take_first\nmetric_list:\n  - metric: exact_match\n    ignore_case: true\n    regexes_to_ignore: [\",\", \"(?s).*#### \"]\n"),
        "group: all\ntask: [words, {task: pick, num_fewshot: 2}]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n".into(),
        "include: task.yaml\ntask: loop\n".into(),
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: [*d, *d, *d, *d]\ntask: bomb\n".into(),
    ]
    .map(String::into_bytes)
    .to_vec()
}

/// The first byte picks the kind of file.
pub fn rows() -> Vec<Vec<u8>> {
    let lines = "{\"text\": \"a\", \"n\": [1, {\"b\": null}]}\n{\"text\": \"\\u00e9\"}\n";
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    zipped.write_all(lines.as_bytes()).unwrap();
    let tagged = |kind: u8, data: &[u8]| [&[kind][..], data].concat();
    vec![
        tagged(0, lines.as_bytes()),
        tagged(1, &zipped.finish().unwrap()),
        tagged(2, b"[{\"text\": \"a\"}, {\"text\": \"b\", \"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}]"),
        tagged(3, b"text,n\n\"a \"\"b\"\"\",1\n\"c\nd\",2\n"),
        tagged(4, &parquet_file()),
    ]
}

fn parquet_file() -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use std::sync::Arc;
    let schema = "message m { REQUIRED BYTE_ARRAY text (UTF8); REQUIRED INT64 n; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let texts = [ByteArray::from("one"), ByteArray::from("two"), ByteArray::from("one")];
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[1, 2, 3], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.into_inner().unwrap()
}

/// A load record of few requests: more of the same say nothing new, and take their time.
fn load_record() -> Value {
    let mut load = records::load_record(0.2);
    load.stages.truncate(2);
    for stage in &mut load.stages {
        stage.requests.truncate(3);
        stage.metrics.concurrency.truncate(3);
    }
    serde_json::to_value(load).unwrap()
}

/// A record of ours, GuideLLM's report, vLLM's result.
pub fn import() -> Vec<Vec<u8>> {
    let sample = |name: &str| std::fs::read(root().join("bench/tests/import").join(name)).unwrap();
    let mut guidellm: Value = serde_json::from_slice(&sample("guidellm-0.8.1.json")).unwrap();
    for benchmark in guidellm["benchmarks"].as_array_mut().unwrap() {
        // What nothing reads is most of it.
        benchmark.as_object_mut().unwrap().remove("metrics");
        let requests = &mut benchmark["requests"];
        requests["successful"].as_array_mut().unwrap().truncate(2);
        if let Some(errored) = requests["errored"].as_array_mut() {
            errored.truncate(1);
        }
    }
    vec![bytes(load_record()), bytes(guidellm), sample("vllm-bench.json")]
}

/// The first byte picks the reader: ours, llm-compressor's.
pub fn recipe() -> Vec<Vec<u8>> {
    [
        "\0[made]\ntool = \"lowbit 0.1.0\"\n\n[quantize]\nscheme = \"w4a16\"\ngroup-size = \"64\"\nsamples = 8\ndamp = 0.01\nignore = [\"re:.*down_proj\", \"x\"]\nasymmetric = true\nstrict = false\n",
        "\u{1}default_stage:\n  default_modifiers:\n    GPTQModifier:\n      config_groups:\n        group_0:\n          targets: [Linear]\n          weights: {num_bits: 4, type: int, symmetric: false, group_size: 64, strategy: group, actorder: static, observer: mse}\n      ignore: [lm_head, 're:.*mlp.*']\n      dampening_frac: 0.02\n",
        "\u{1}quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {targets: Linear, scheme: W8A16, ignore: [lm_head]}\n",
        "\u{1}a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\nGPTQModifier: {ignore: [*d, *d], scheme: W4A16}\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// The first byte picks the record's name.
pub fn record() -> Vec<Vec<u8>> {
    let mut r = records::all();
    if let Some(quantize) = &mut r.quantize {
        // Two blocks.
        quantize.layers.truncate(14);
    }
    if let Some(eval) = &mut r.eval {
        if let Some(kl) = &mut eval.kl {
            kl.window_means.truncate(4);
        }
        if let Some(blame) = &mut eval.blame {
            blame.suspects.truncate(3);
        }
    }
    let of = |kind: u8, v: Value| [&[kind][..], v.to_string().as_bytes()].concat();
    let value = |v: &dyn erased::Record| v.json();
    vec![
        of(0, value(r.plan.as_ref().unwrap())),
        of(1, value(r.quantize.as_ref().unwrap())),
        of(2, value(r.eval.as_ref().unwrap())),
        of(3, value(r.gate.as_ref().unwrap())),
        of(4, value(r.bench.as_ref().unwrap())),
        of(5, load_record()),
        of(6, value(&records::capacity())),
    ]
}

/// Records of all kinds as JSON, through one pointer.
mod erased {
    pub trait Record {
        fn json(&self) -> serde_json::Value;
    }

    impl<T: serde::Serialize> Record for T {
        fn json(&self) -> serde_json::Value {
            serde_json::to_value(self).unwrap()
        }
    }
}

pub fn journal() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("j");
    let mut journal = lowbit_eval::engine::journal::Journal::open(&path, "identity").unwrap();
    use lowbit_eval::engine::journal::Store;
    let response = lowbit_eval::Response::LogLikelihood { log_prob: -1.5, greedy: true };
    let answer = lowbit_eval::engine::Answer { reference: Some(response.clone()), response, drift: Vec::new() };
    journal.put("a", &answer).unwrap();
    journal.put("b", &answer).unwrap();
    drop(journal);
    vec![std::fs::read(path).unwrap(), b"lowbit journal1\n".to_vec()]
}

pub fn response() -> Vec<Vec<u8>> {
    let events = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n: note\nevent: x\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n";
    let chunked: String =
        events.as_bytes().chunks(17).map(|c| format!("{:x}\r\n{}\r\n", c.len(), String::from_utf8_lossy(c))).collect();
    vec![
        format!("\u{7}HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}0\r\n\r\n").into_bytes(),
        format!("\u{3}HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{events}", events.len()).into_bytes(),
        b"\x01HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nConnection: close\r\n\r\nlater".to_vec(),
        b"\x02HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nServer: x\r\n\r\n".to_vec(),
    ]
}

/// A server's list of models.
pub fn listed() -> Value {
    json!({"object": "list", "data": [{"id": "m", "created": 7, "max_model_len": 66, "meta": {"n_ctx": 64}}]})
}

/// An answer to a chat.
pub fn said() -> Value {
    json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "a\nb"}, "finish_reason": "stop"}]})
}

/// Log-probabilities of an echoed prompt, of more tokens than any that is asked about.
pub fn scored() -> Value {
    let (names, values, tops) = (["t"; 12], [-0.5; 12], vec![json!({"t": -0.5, "u": -1.5}); 12]);
    json!({"choices": [{"text": "abc", "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": tops}}]})
}

/// An answer to `/tokenize`.
pub fn tokenized() -> Value {
    json!({"tokens": [97, 98], "count": 2, "max_model_len": 66})
}

/// The first byte picks the question that is answered.
pub fn endpoint() -> Vec<Vec<u8>> {
    let call = json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]);
    let calls = json!({"choices": [{"message": {"content": null, "tool_calls": call}, "finish_reason": "tool_calls"}]});
    let all = [(0, listed()), (1, said()), (1, calls), (2, scored()), (3, tokenized())];
    all.map(|(kind, v)| [&[kind][..], v.to_string().as_bytes()].concat()).to_vec()
}

/// The first byte picks: the body of a chat, of a completion, or all of a request.
pub fn request() -> Vec<Vec<u8>> {
    let body = |kind: u8, v: Value| [&[kind][..], v.to_string().as_bytes()].concat();
    let message = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}});
    vec![
        body(0, json!({"model": "demo", "messages": message, "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 1, "logprobs": true, "top_logprobs": 2, "stream": true, "stream_options": {"include_usage": true}})),
        body(0, json!({"messages": message, "max_completion_tokens": 2, "response_format": schema, "tools": [{"type": "function"}], "chat_template_kwargs": {"x": 1}})),
        body(1, json!({"model": "demo", "prompt": ["a", "b"], "max_tokens": 2, "echo": true, "logprobs": 1, "n": 2, "stop": ["x"], "logit_bias": {"5": -100}})),
        body(1, json!({"prompt": [[1, 2, 3]], "max_tokens": 1, "guided_regex": "[a-z]+", "stop_token_ids": [1]})),
        body(1, json!({"prompt": "a", "max_tokens": 1, "guided_grammar": "start: \"a\"", "presence_penalty": 1})),
        b"\x02GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"\x02GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec(),
        b"\x02POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n{\"prompt\":\"a\",\"max_tokens\":1}".to_vec(),
    ]
}
