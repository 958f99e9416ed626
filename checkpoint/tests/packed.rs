//! Packed linears of several writers, from literal words.

use std::path::Path;

use lowbit_checkpoint::linear;
use lowbit_checkpoint::quant_config::QuantConfig;
use lowbit_checkpoint::store::TensorStore;
use lowbit_kernels::QuantizedMatrix;
use lowbit_kernels::backend::HostWeight;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Value, json};

fn words(w: &[u32]) -> Vec<u8> {
    w.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn halves(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()
}

type Stored = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// Reads the linear `m` `[out, n]` of these tensors.
fn read(config: &Value, tensors: &[Stored], out: usize, n: usize) -> Result<QuantizedMatrix, String> {
    let dir = tempfile::tempdir().unwrap();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (format!("m.{name}"), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let store = TensorStore::open(dir.path()).unwrap();
    let quant = QuantConfig::parse(Path::new("config.json"), config).map_err(|e| e.to_string())?;
    match linear::read(&store, Some(&quant), "m", out, n).map_err(|e| e.to_string())? {
        HostWeight::Packed(p) => Ok(linear::unpack(&p).unwrap()),
        _ => panic!("packed"),
    }
}

fn compressed_tensors(bits: u8, symmetric: bool) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": bits, "type": "int", "strategy": "channel", "symmetric": symmetric,
        }}},
    })
}

#[test]
fn awq_gemm() {
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": 2, "version": "GEMM", "zero_point": true});
    // Two columns of one group, eight rows: row r has the codes r and 15 − r, the zero point r.
    let tensors = |zeros: u32| -> Vec<Stored> {
        vec![
            ("qweight", Dtype::I32, vec![2, 1], words(&[0x7531_6420, 0x8ace_9bdf])),
            ("qzeros", Dtype::I32, vec![1, 1], words(&[zeros])),
            ("scales", Dtype::F16, vec![1, 8], halves(&[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])),
        ]
    };
    let q = read(&config, &tensors(0x7531_6420), 8, 2).unwrap();
    assert_eq!(q.codes, [0, 15, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9, 7, 8]);
    assert_eq!(q.zeros, Some(vec![0, 1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(q.scales, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
    assert_eq!(q.dequantize().unwrap()[..4], [0.0, 7.5, 0.0, 13.0]);

    let q = read(&config, &tensors(0x8888_8888), 8, 2).unwrap();
    assert!(q.scheme.symmetric && q.zeros.is_none());
    let plain = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 2, "zero_point": false});
    assert!(read(&plain, &tensors(0x8888_8888), 8, 2).is_ok());
    let e = read(&plain, &tensors(0x7531_6420), 8, 2).unwrap_err();
    assert!(e.contains("m.qzeros") && e.contains("zero point 8"), "{e}");
    for (key, value) in [("version", json!("gemv")), ("bits", json!(3))] {
        let mut config = config.clone();
        config[key] = value;
        let e = read(&config, &tensors(0x8888_8888), 8, 2).unwrap_err();
        assert!(e.contains("AWQ"), "{e}");
    }
}

#[test]
fn the_packing_of_late_2025_and_before_is_told_by_its_width() {
    // 32 codes of 3 bits, 10 a word: code i is i mod 8.
    let code = |i: usize| (i % 8) as u32;
    let old: Vec<u32> =
        (0..4).map(|w| (0..10).filter(|j| w * 10 + j < 32).fold(0, |a, j| a | code(w * 10 + j) << (3 * j))).collect();
    let mut new = [0u32; 3];
    for i in 0..32 {
        let wide = u64::from(code(i)) << (3 * i % 32);
        new[3 * i / 32] |= wide as u32;
        if 3 * i % 32 > 29 {
            new[3 * i / 32 + 1] |= (wide >> 32) as u32;
        }
    }
    let tensors = |packed: &[u32], zeros: Option<&[u32]>| -> Vec<Stored> {
        let mut t = vec![
            ("weight_packed", Dtype::I32, vec![1, packed.len()], words(packed)),
            ("weight_scale", Dtype::F16, vec![1, 1], halves(&[0.25])),
        ];
        t.extend(zeros.map(|z| ("weight_zero_point", Dtype::I32, vec![z.len(), 1], words(z))));
        t
    };
    let want: Vec<u8> = (0..32).map(|i| (i % 8) as u8).collect();
    for packed in [&old[..], &new] {
        assert_eq!(read(&compressed_tensors(3, true), &tensors(packed, None), 1, 32).unwrap().codes, want);
        let q = read(&compressed_tensors(3, false), &tensors(packed, Some(&[5])), 1, 32).unwrap();
        assert_eq!((q.codes, q.zeros), (want.clone(), Some(vec![5])));
    }
    // Five words, or none of the two.
    let e = read(&compressed_tensors(3, true), &tensors(&[0; 5], None), 1, 32).unwrap_err();
    assert!(e.contains("[1, 3]") && e.contains("[1, 5]"), "{e}");
    // 40 codes need four words either way: a top bit tells, and without one nobody knows.
    let e = read(&compressed_tensors(3, true), &tensors(&[0x0924_9249; 4], None), 1, 40).unwrap_err();
    assert!(e.contains("m.weight_packed") && e.contains("10 codes a word"), "{e}");
    assert!(read(&compressed_tensors(3, true), &tensors(&[0x8924_9249; 4], None), 1, 40).is_ok());
    // Widths that divide 32 have one packing.
    assert!(read(&compressed_tensors(4, true), &tensors(&[0; 4], None), 1, 32).is_ok());
}

#[test]
fn gptq_versions_are_told_by_the_symmetric_constant() {
    let config = |version: &str| json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": false, "sym": true, "checkpoint_format": version});
    let tensors = |zeros: u32| -> Vec<Stored> {
        vec![
            ("qweight", Dtype::I32, vec![1, 8], words(&[0x7654_3210; 8])),
            ("qzeros", Dtype::I32, vec![1, 1], words(&[zeros])),
            ("scales", Dtype::F16, vec![1, 8], halves(&[-0.5; 8])),
        ]
    };
    for (version, right, wrong) in [("gptq", 0x7777_7777, 0x8888_8888), ("gptq_v2", 0x8888_8888, 0x7777_7777)] {
        let q = read(&config(version), &tensors(right), 8, 8).unwrap();
        // A negative scale is a scale.
        assert_eq!(q.dequantize().unwrap()[..2], [4.0, 3.5]);
        let e = read(&config(version), &tensors(wrong), 8, 8).unwrap_err();
        assert!(e.contains("the other GPTQ version's label"), "{e}");
    }
}
