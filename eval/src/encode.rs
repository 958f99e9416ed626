//! What an evaluation asks of a tokenizer.

use lowbit_checkpoint::tokenizer::Tokenizer;

use crate::error::Result;

/// Text to token ids.
pub trait Encode {
    /// Tokens of `text`, with the tokenizer's own special tokens when `special`.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>>;

    /// The beginning-of-sequence token, whether or not the tokenizer adds it.
    fn bos_id(&self) -> Option<u32>;

    /// The BOS token where the tokenizer puts it in front of a text by itself.
    fn added_bos(&self) -> Result<Option<u32>> {
        let first = self.encode("", true)?.first().copied();
        Ok(self.bos_id().filter(|bos| first == Some(*bos)))
    }
}

impl Encode for Tokenizer {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        Ok(Tokenizer::encode(self, text, special)?)
    }

    fn bos_id(&self) -> Option<u32> {
        Tokenizer::bos_id(self)
    }
}
