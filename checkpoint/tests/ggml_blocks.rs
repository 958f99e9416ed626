//! Block formats against candle's decoders, bit for bit.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use lowbit_kernels::ggml::{GgmlType, decode, decode_codes, encode_codes, k_quants};

const ROWS: usize = 3;
const COLS: usize = 512;

const TYPES: [(GgmlType, GgmlDType); 8] = [
    (GgmlType::F32, GgmlDType::F32),
    (GgmlType::F16, GgmlDType::F16),
    (GgmlType::Bf16, GgmlDType::BF16),
    (GgmlType::Q4_0, GgmlDType::Q4_0),
    (GgmlType::Q5_0, GgmlDType::Q5_0),
    (GgmlType::Q8_0, GgmlDType::Q8_0),
    (GgmlType::Q4K, GgmlDType::Q4K),
    (GgmlType::Q6K, GgmlDType::Q6K),
];

/// Neither symmetric nor of one magnitude.
fn weights() -> Vec<f32> {
    (0..ROWS * COLS).map(|i| ((i as f32 * 0.37).sin() + 0.2) * (1.0 + (i % 97) as f32 / 31.0)).collect()
}

fn candle(data: &[u8], dtype: GgmlDType) -> Vec<f32> {
    let storage = QStorage::from_data(Cow::Borrowed(data), &Device::Cpu, dtype).unwrap();
    let tensor = QTensor::new(storage, (ROWS, COLS)).unwrap();
    tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn decoders_agree_on_blocks_of_another_encoder() {
    let source = Tensor::from_vec(weights(), (ROWS, COLS), &Device::Cpu).unwrap();
    for (ours, theirs) in TYPES {
        let q = QTensor::quantize(&source, theirs).unwrap();
        let data = q.data().unwrap();
        assert_eq!(data.len(), ours.bytes(ROWS, COLS).unwrap(), "{ours:?}");
        assert_eq!(theirs.block_size(), ours.block().0, "{ours:?}");
        assert_eq!(bits(&decode(ours, &data, ROWS, COLS).unwrap()), bits(&candle(&data, theirs)), "{ours:?}");
    }
}

#[test]
fn blocks_that_are_written_are_read_alike_and_no_worse_than_candles() {
    let w = weights();
    let source = Tensor::from_vec(w.clone(), (ROWS, COLS), &Device::Cpu).unwrap();
    let error = |v: &[f32]| v.iter().zip(&w).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    for (ours, theirs) in TYPES {
        let other = QTensor::quantize(&source, theirs).unwrap().data().unwrap().into_owned();
        let data: Vec<u8> = match ours {
            GgmlType::Q4K | GgmlType::Q6K => {
                let ones = [1f32; COLS];
                w.chunks(COLS).flat_map(|row| k_quants::encode_row(ours, row, &ones).unwrap()).collect()
            }
            // Codes and scales out and in again.
            _ if ours.scheme().is_some() => {
                let q = decode_codes(ours, &other, ROWS, COLS).unwrap();
                let data = encode_codes(ours, &q).unwrap();
                assert!(data == other, "{ours:?}");
                data
            }
            _ => continue,
        };
        let values = decode(ours, &data, ROWS, COLS).unwrap();
        assert_eq!(bits(&values), bits(&candle(&data, theirs)), "{ours:?}");
        assert!(error(&values) <= 1.001 * error(&candle(&other, theirs)), "{ours:?}");
    }
}
