//! Memory of a measured variant: its weights, and how many requests fit beside them on a card.

use serde::{Deserialize, Serialize};

use crate::capacity::estimate::{EstimateOptions, kv_room_bytes};
use crate::capacity::gpus::Gpu;
use crate::record::MemoryRow;

/// Memory of one server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Room {
    /// Weights as stored.
    pub weight_bytes: u64,
    /// Keys and values of a token.
    pub kv_bytes_per_token: f64,
    /// Cards and their kind, where one was named: `2 × h100`.
    pub gpu: Option<String>,
    /// What the weights leave there for keys and values; negative when they do not fit.
    pub kv_room_bytes: Option<f64>,
    /// Tokens of the load's mean request, prompt and answer.
    pub tokens_per_request: Option<f64>,
    /// Such requests at once.
    pub concurrency: Option<u64>,
}

impl Room {
    /// From a row of `bench.json`. `o` has the number of cards, what an engine may use of them, and the bytes of a key or value there;
    /// without a card those of the bench are told, and no room.
    pub fn of(
        row: &MemoryRow,
        gpu: Option<&Gpu>,
        o: &EstimateOptions,
        tokens_per_request: Option<f64>,
    ) -> Option<Self> {
        let measured = row.kv_bytes as f64 / row.kv_tokens as f64;
        if !(measured.is_finite() && measured > 0.0) {
            return None;
        }
        // Old records do not say how wide their numbers were.
        let element = gpu.filter(|_| row.kv_element_bytes > 0).map(|_| o.kv_bytes / row.kv_element_bytes as f64);
        let kv_bytes_per_token = measured * element.unwrap_or(1.0);
        let kv_room_bytes = gpu.map(|g| kv_room_bytes(g, row.weight_bytes as f64, o));
        let whole = kv_room_bytes.zip(tokens_per_request.filter(|t| *t > 0.0));
        let concurrency = whole.map(|(room, tokens)| (room / (kv_bytes_per_token * tokens)).floor().max(0.0) as u64);
        Some(Self {
            weight_bytes: row.weight_bytes,
            kv_bytes_per_token,
            gpu: gpu.map(|g| format!("{} × {}", o.gpus.max(1), g.name)),
            kv_room_bytes,
            tokens_per_request,
            concurrency,
        })
    }

    /// Why no request can be served there.
    pub(crate) fn refuses(&self) -> Option<String> {
        let full = self.concurrency == Some(0) || self.kv_room_bytes.is_some_and(|b| b <= 0.0);
        let gpu = self.gpu.as_ref().filter(|_| full)?;
        Some(format!("{:.1} GB of weights leave no room for a request on {gpu}", self.weight_bytes as f64 / 1e9))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_by_hand() {
        // Llama 3.1 8B at 4 bits, benched on a CPU with keys and values of four bytes.
        let row = MemoryRow {
            role: "candidate".into(),
            model: "m".into(),
            weight_bytes: 5_600_000_000,
            parameters: 8_000_000_000,
            kv_element_bytes: 4,
            kv_bytes: 262_144 * 640,
            kv_tokens: 640,
            peak_rss_bytes: None,
        };
        let o = EstimateOptions::default();
        let l4 = Gpu::find("l4").unwrap();
        let room = Room::of(&row, Some(l4), &o, Some(768.0)).unwrap();
        // 24 · 0.9 − 2 − 5.6 = 14 GB; 131,072 bytes a token.
        assert!((room.kv_room_bytes.unwrap() - 14e9).abs() < 1.0 && room.kv_bytes_per_token == 131_072.0, "{room:?}");
        assert_eq!((room.concurrency, room.gpu.as_deref()), (Some(139), Some("1 × l4")));
        assert_eq!(room.refuses(), None);
        let large = MemoryRow { weight_bytes: 140_000_000_000, ..row.clone() };
        let none = Room::of(&large, Some(l4), &o, None).unwrap();
        assert!(none.refuses().unwrap().contains("140.0 GB of weights leave no room"));
        // Without a card the bench's own numbers, and nothing refused.
        let alone = Room::of(&large, None, &o, Some(768.0)).unwrap();
        assert_eq!((alone.kv_bytes_per_token, alone.kv_room_bytes, alone.refuses()), (262_144.0, None, None));
        assert_eq!(Room::of(&MemoryRow { kv_tokens: 0, ..row }, None, &o, None), None);
    }
}
